"""Released weights from a server on this machine: the good case, and everything that goes wrong on the way."""

import hashlib
import http.server
import io
import subprocess
import tarfile
import threading
import zipfile
from pathlib import Path

import pytest

from common.errors import UserError
from lbae import download


def zip_of(members: dict[str, bytes], links: tuple[str, ...] = ()) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for name, content in members.items():
            info = zipfile.ZipInfo(name)
            if name in links:
                info.external_attr = 0o120777 << 16
            file.writestr(info, content)
    return buffer.getvalue()


def tar_of(members: dict[str, bytes], link: str | None = None) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w:gz") as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            file.addfile(info, io.BytesIO(content))
        if link:
            info = tarfile.TarInfo(link)
            info.type, info.linkname = tarfile.SYMTYPE, "/etc"
            file.addfile(info)
    return buffer.getvalue()


GOOD = zip_of({"mnist_bae_exp/models/last.cp": bytes(range(256)) * 1000, "mnist_bae_exp/log/cfg-0-0.json": b"{}"})


class Server:
    """Files on 127.0.0.1; `cut` names end after so many bytes although more were promised. Knows Range requests."""

    def __init__(self):
        self.files, self.cut, self.ranges = {}, {}, []
        outer = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                name = self.path.lstrip("/")
                if name not in outer.files:
                    self.send_error(404)
                    return
                body, start = outer.files[name], 0
                wanted = self.headers.get("Range")
                outer.ranges.append(wanted)
                if wanted:
                    start = int(wanted.removeprefix("bytes=").rstrip("-"))
                    if start >= len(body):
                        self.send_error(416)
                        return
                self.send_response(206 if wanted else 200)
                self.send_header("Content-Length", str(len(body) - start))
                if wanted:
                    self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
                self.end_headers()
                self.wfile.write(body[start : outer.cut.get(name, len(body))])

            def log_message(self, *_):
                pass

        self.http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.http.serve_forever, daemon=True).start()

    def url(self, name: str) -> str:
        return f"http://127.0.0.1:{self.http.server_address[1]}/{name}"


@pytest.fixture
def server():
    one = Server()
    yield one
    one.http.shutdown()
    one.http.server_close()


def listed(folder: Path, server: Server, name: str, content: bytes, digest: str | None = None) -> list[str]:
    """Arguments that fetch `content` under `name`, by a list with its digest (or another one)."""
    server.files[name] = content
    digest = hashlib.sha256(content).hexdigest() if digest is None else digest
    (folder / "urls.txt").write_text(f"# comment\n\n{server.url(name)} {name} {digest}\n")
    return [str(folder / "urls.txt"), "--to", str(folder / "weights")]


def left_in(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "weights").iterdir())


@pytest.mark.parametrize("name", ["mnist.zip", "mnist.tar.gz"])
def test_downloads_checks_and_unpacks(server, tmp_path, capsys, name):
    content = GOOD if name.endswith("zip") else tar_of({"mnist_bae_exp/models/last.cp": bytes(range(256)) * 1000})
    download.main(listed(tmp_path, server, name, content))
    assert (tmp_path / "weights/mnist_bae_exp/models/last.cp").read_bytes() == bytes(range(256)) * 1000
    assert left_in(tmp_path) == ["mnist_bae_exp"]  # the archive is gone
    assert "mnist_bae_exp" in capsys.readouterr().out


def test_truncated_download_is_kept_and_continued(server, tmp_path):
    arguments = listed(tmp_path, server, "mnist.zip", GOOD)
    server.cut["mnist.zip"] = 1000
    with pytest.raises(UserError, match=r"ended after 1,000 of .*next run goes on"):
        download.main(arguments)
    assert left_in(tmp_path) == ["mnist.zip.part"]
    server.cut.clear()
    download.main(arguments)
    assert server.ranges == [None, "bytes=1000-"]
    assert left_in(tmp_path) == ["mnist_bae_exp"]


def test_a_finished_part_is_taken_over(server, tmp_path):
    arguments = listed(tmp_path, server, "mnist.zip", GOOD)
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights/mnist.zip.part").write_bytes(GOOD)
    download.main(arguments)
    assert left_in(tmp_path) == ["mnist_bae_exp"]


def test_wrong_digest_removes_the_file(server, tmp_path):
    with pytest.raises(UserError, match="0" * 64):
        download.main(listed(tmp_path, server, "mnist.zip", GOOD, "0" * 64))
    assert left_in(tmp_path) == []


def test_an_archive_got_by_hand(server, tmp_path):
    """The remedy that a failing download names."""
    archive = tmp_path / "by hand.zip"
    archive.write_bytes(GOOD)
    server.cut["mnist.zip"] = 10
    arguments = listed(tmp_path, server, "mnist.zip", GOOD)
    with pytest.raises(UserError, match="--from"):
        download.main(arguments)
    download.main([*arguments, "--from", str(archive)])
    assert (tmp_path / "weights/mnist_bae_exp/models/last.cp").is_file()
    assert archive.read_bytes() == GOOD
    archive.write_bytes(GOOD[:-1])
    with pytest.raises(UserError, match="sha256 is not the one listed"):
        download.main([*arguments, "--from", str(archive)])


@pytest.mark.parametrize("digest", [None, "0" * 64, "-"])
def test_a_web_page_is_no_archive(server, tmp_path, digest):
    page = b"<!DOCTYPE html><html>sign in</html>"
    with pytest.raises(UserError, match="web page"):
        download.main(listed(tmp_path, server, "mnist.zip", page, digest))
    assert "mnist_bae_exp" not in left_in(tmp_path)


def test_unknown_digest_is_reported(server, tmp_path, capsys):
    download.main(listed(tmp_path, server, "mnist.zip", GOOD, "-"))
    assert hashlib.sha256(GOOD).hexdigest() in capsys.readouterr().err


@pytest.mark.parametrize(
    "content",
    [
        zip_of({"../evil.txt": b"x"}),
        zip_of({"/evil.txt": b"x"}),
        zip_of({"a\\..\\..\\evil.txt": b"x"}),
        zip_of({"exp/link": b"/etc"}, links=("exp/link",)),
        tar_of({"../evil.txt": b"x"}),
        tar_of({"/evil.txt": b"x"}),
        tar_of({"exp/a": b"x"}, link="exp/b"),
    ],
)
def test_archives_that_lead_outside_are_refused(server, tmp_path, content):
    with pytest.raises(UserError, match=r"leave the folder|not unpacked"):
        download.main(listed(tmp_path, server, "evil.zip", content))
    assert not list(tmp_path.rglob("evil.txt"))
    assert left_in(tmp_path) == ["evil.zip"]


def test_damaged_archives_and_existing_folders(server, tmp_path):
    damaged = bytearray(GOOD)
    damaged[3000] ^= 255
    with pytest.raises(UserError, match="damaged"):
        download.main(listed(tmp_path, server, "mnist.zip", bytes(damaged)))
    (tmp_path / "weights/mnist_bae_exp").mkdir()
    with pytest.raises(UserError, match="exists; move it away"):
        download.main(listed(tmp_path, server, "mnist.zip", GOOD))
    assert list((tmp_path / "weights/mnist_bae_exp").iterdir()) == []


def test_missing_file_and_wrong_lists(server, tmp_path):
    arguments = listed(tmp_path, server, "mnist.zip", GOOD)
    server.files.clear()
    with pytest.raises(UserError, match="404"):
        download.main(arguments)
    for line, message in (
        ("ftp://x y z", "line 1"),
        (f"{server.url('a')} ../a.zip -", "plain file name"),
        (f"{server.url('a')} a.zip 123", "no SHA-256"),
        ("# nothing", "lists nothing"),
    ):
        (tmp_path / "urls.txt").write_text(line)
        with pytest.raises(UserError, match=message):
            download.main([str(tmp_path / "urls.txt")])


def test_the_shell_script_and_the_shipped_list(server, tmp_path):
    root = Path(download.__file__).parent
    assert [item.name for item in download.read_list(root / "model_weights_urls.txt")] == [
        "celeba.zip", "cifar10.zip", "mnist.zip",
    ]  # fmt: skip
    arguments = listed(tmp_path, server, "mnist.zip", GOOD, "0" * 64)
    done = subprocess.run([str(root / "download.sh"), *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "0" * 64 in done.stderr
