"""`prepare` against a local server and archives written here."""

import gzip
import hashlib
import io
import pickle
import struct
import tarfile
import threading
import zipfile
from dataclasses import replace
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import numpy as np
import pytest
from PIL import Image

from common.datasets import load, prepare
from common.datasets.classic import IDX_FILES
from common.datasets.download import Remote, fetch
from common.errors import UserError, is_web_page, run_command

RNG = np.random.default_rng(11)
IDX_NAMES = sorted(name for pair in IDX_FILES.values() for name in pair)


class Handler(BaseHTTPRequestHandler):
    """Serves `server.files`; `server.cut` ends each answer after so many bytes, `server.ranges` allows resuming."""

    def do_GET(self):
        self.server.requests.append((self.path, self.headers.get("Range")))
        kind, content = self.server.files.get(self.path.lstrip("/"), (None, b""))
        if kind is None:
            self.send_error(404)
            return
        start, asked = 0, self.headers.get("Range")
        if asked and self.server.ranges:
            start = int(asked.removeprefix("bytes=").rstrip("-"))
            if start >= len(content):
                self.send_error(416)
                return
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start:][: self.server.cut])

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    web = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    web.files, web.requests, web.cut, web.ranges = {}, [], None, True
    web.url = f"http://127.0.0.1:{web.server_port}"
    thread = threading.Thread(target=partial(web.serve_forever, poll_interval=0.01), daemon=True)
    thread.start()
    yield web
    web.shutdown()
    web.server_close()


def binary(server, name, content):
    server.files[name] = ("application/octet-stream", content)
    return Remote(name, (f"{server.url}/{name}",), "md5", hashlib.md5(content).hexdigest())


def test_fetch_checks_the_digest(server, tmp_path):
    remote = binary(server, "a.bin", b"x" * 3000)
    assert fetch(remote, tmp_path).read_bytes() == b"x" * 3000
    fetch(remote, tmp_path)
    assert len(server.requests) == 1  # what is here and right is not fetched again
    server.files["a.bin"] = ("application/octet-stream", b"y" * 3000)
    (tmp_path / "a.bin").unlink()
    with pytest.raises(UserError, match="md5 is"):
        fetch(remote, tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_fetch_resumes_a_broken_download(server, tmp_path):
    content = bytes(RNG.integers(0, 256, 10_000, dtype=np.uint8))
    remote = binary(server, "a.bin", content)
    server.cut = 4000
    assert fetch(remote, tmp_path).read_bytes() == content  # 4000 + 4000 + 2000 in three attempts
    assert [asked for _, asked in server.requests] == [None, "bytes=4000-", "bytes=8000-"]
    (tmp_path / "a.bin").unlink()
    with pytest.raises(UserError, match=r"ended after 4,000 of 10,000 bytes.*a\.bin\.part is kept"):
        fetch(remote, tmp_path, attempts=1)
    assert fetch(remote, tmp_path, attempts=2).read_bytes() == content


def test_fetch_starts_anew_where_the_server_cannot_resume(server, tmp_path):
    remote = binary(server, "a.bin", b"z" * 5000)
    (tmp_path / "a.bin.part").write_bytes(b"old" * 100)
    server.ranges = False
    assert fetch(remote, tmp_path).read_bytes() == b"z" * 5000


@pytest.mark.parametrize("kind", ["text/html; charset=utf-8", "application/octet-stream"])
def test_fetch_refuses_a_web_page(server, tmp_path, kind):
    server.files["a.bin"] = (kind, b"\n<!DOCTYPE html><html>sign in</html>")
    with pytest.raises(UserError, match="web page"):
        fetch(Remote("a.bin", (f"{server.url}/a.bin",)), tmp_path)
    assert not (tmp_path / "a.bin").exists()


def test_fetch_tries_the_next_address_and_names_the_last_problem(server, tmp_path):
    remote = binary(server, "b.bin", b"content")
    two = Remote("b.bin", (f"{server.url}/gone", *remote.urls), "md5", remote.digest)
    assert fetch(two, tmp_path).read_bytes() == b"content"
    with pytest.raises(UserError, match="404"):
        fetch(Remote("c.bin", (f"{server.url}/gone",)), tmp_path)
    with pytest.raises(UserError, match="cannot download"):
        fetch(Remote("c.bin", ("http://127.0.0.1:9/c.bin",)), tmp_path)


def test_an_unknown_digest_is_recorded_and_held_to(server, tmp_path):
    server.files["a.bin"] = ("application/octet-stream", b"first")
    remote = Remote("a.bin", (f"{server.url}/a.bin",))
    fetch(remote, tmp_path)
    assert (tmp_path / "a.bin.sha256").read_text() == f"{hashlib.sha256(b'first').hexdigest()}  a.bin\n"
    (tmp_path / "a.bin").unlink()
    server.files["a.bin"] = ("application/octet-stream", b"other")
    with pytest.raises(UserError, match="recorded in"):
        fetch(remote, tmp_path)


def test_web_pages_are_told_from_data():
    for page in (b"<html>", b"  <!doctype HTML>", b"\xef\xbb\xbf<!-- x -->\n<head>"):
        assert is_web_page(page)
    for data in (b"\x1f\x8b\x08", b"PK\x03\x04", b"", b"<svg>", b"text about <html>"):
        assert not is_web_page(data)


# ---------------------------------------------------------------- archives


def tar_of(path, members, mode="w:xz"):
    with tarfile.open(path, mode) as file:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            if isinstance(content, tuple):
                info.type, info.linkname = content
                file.addfile(info)
            else:
                info.size = len(content)
                file.addfile(info, io.BytesIO(content))
    return path


def zip_of(path, members):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as file:
        for name, content in members.items():
            file.writestr(name, content)
    return path


def png(side=32, channels=3):
    stream = io.BytesIO()
    Image.fromarray(RNG.integers(0, 256, (side, side, channels), dtype=np.uint8)).save(stream, "png")
    return stream.getvalue()


def cifar_members(prefix=""):
    classes = ("airplane", "cat")
    return {
        f"{prefix}{part}/{name}/{i:04}.png": png() for part in ("train", "test") for name in classes for i in range(3)
    }


@pytest.mark.parametrize("wrap", ["", "cifar10_png/"])
def test_prepare_cifar_from_class_folders(tmp_path, capsys, wrap):
    archive = tar_of(tmp_path / "images.tar.xz", cifar_members(wrap))
    root = tmp_path / "data"
    prepare.main(["cifar10", "--from", str(archive), "--root", str(root)])
    assert "cifar10 train: 6 images" in capsys.readouterr().out
    assert load("cifar10", root, "test").targets.tolist() == [0, 0, 0, 1, 1, 1]
    with pytest.raises(UserError, match="--force"):
        prepare.main(["cifar10", "--from", str(archive), "--root", str(root)])
    before = load("cifar10", root).fingerprint()
    tar_of(archive, cifar_members())
    prepare.main(["cifar10", "--from", str(archive), "--root", str(root), "--force"])
    assert load("cifar10", root).fingerprint() != before
    assert [p.name for p in root.iterdir()] == ["cifar10"]  # no temporary folder is left
    assert sorted(p.name for p in (root / "cifar10").iterdir()) == ["test", "train"]
    prepare.main(["cifar10", "--root", str(root)])
    assert "there already" in capsys.readouterr().out


UNSAFE = {
    "absolute": {"/tmp/evil.png": b"x"},
    "parent": {"train/../../evil.png": b"x"},
    "backslash": {"..\\evil.png": b"x"},
}


@pytest.mark.parametrize("members", UNSAFE.values(), ids=UNSAFE)
@pytest.mark.parametrize("make", [tar_of, zip_of])
def test_unpack_refuses_names_that_leave_the_folder(tmp_path, members, make):
    archive = make(tmp_path / ("a.zip" if make is zip_of else "a.tar.xz"), {**cifar_members(), **members})
    root = tmp_path / "in" / "data"
    with pytest.raises(UserError, match="would leave the folder"):
        prepare.prepare("cifar10", root, [archive])
    assert list(root.iterdir()) == [] and not list(tmp_path.rglob("evil*"))


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE])
def test_unpack_refuses_links_and_devices(tmp_path, kind):
    archive = tar_of(tmp_path / "a.tar.xz", {"train": (kind, "/etc")})
    with pytest.raises(UserError, match="link or a device"):
        prepare.unpack(archive, tmp_path / "out")
    info = zipfile.ZipInfo("link")
    info.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        file.writestr(info, "/etc/passwd")
    with pytest.raises(UserError, match="link or a device"):
        prepare.unpack(tmp_path / "a.zip", tmp_path / "out")


def test_unpack_names_a_damaged_archive(tmp_path):
    members = cifar_members()
    for archive in (tar_of(tmp_path / "a.tar.xz", members), zip_of(tmp_path / "b.zip", members)):
        whole = archive.read_bytes()
        middle = len(whole) // 2
        for content in (whole[:middle], b"", b"<html>", whole[:middle] + b"\0" * 64 + whole[middle + 64 :]):
            archive.write_bytes(content)
            with pytest.raises(UserError) as caught:
                prepare.prepare("cifar10", tmp_path / "data", [archive])
            assert str(archive) in str(caught.value)
            assert not list((tmp_path / "data").iterdir())


def test_unpack_stops_before_the_disk_is_full(tmp_path):
    archive = tmp_path / "bomb.tar"
    info = tarfile.TarInfo("zeros")
    info.size = 1 << 60
    archive.write_bytes(info.tobuf(tarfile.GNU_FORMAT) + bytes(10240))
    with pytest.raises(UserError, match="free space"):
        prepare.unpack(archive, tmp_path / "out")


def idx(array):
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def mnist_files():
    files = {}
    for stem, n in (("train", 6), ("t10k", 4)):
        files[f"{stem}-images-idx3-ubyte.gz"] = gzip.compress(idx(RNG.integers(0, 256, (n, 28, 28), dtype=np.uint8)))
        files[f"{stem}-labels-idx1-ubyte.gz"] = gzip.compress(idx(np.arange(n, dtype=np.uint8)))
    return files


def test_prepare_mnist_from_an_archive_and_from_single_files(tmp_path):
    files = mnist_files()
    archive = zip_of(tmp_path / "mnist.zip", {f"deep/{name}": content for name, content in files.items()})
    prepare.prepare("mnist", tmp_path / "a", [archive])
    single = []
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        single.append(tmp_path / name)
    prepare.prepare("mnist", tmp_path / "b", single)
    assert load("mnist", tmp_path / "a").fingerprint() == load("mnist", tmp_path / "b").fingerprint()
    assert len(load("mnist", tmp_path / "a", "test")) == 4


def test_prepare_refuses_a_mirror_with_other_content(server, tmp_path):
    for name, content in mnist_files().items():
        binary(server, name, content)
    with pytest.raises(UserError, match="not the published one"):
        prepare.main(["mnist", "--mirror", server.url + "/", "--root", str(tmp_path)])
    assert server.requests == [("/train-images-idx3-ubyte.gz", None)]


def test_prepare_downloads_and_puts_in_place(server, tmp_path, monkeypatch, capsys):
    source = prepare.SOURCES["mnist"]
    remotes = tuple(binary(server, name, content) for name, content in mnist_files().items())
    monkeypatch.setitem(prepare.SOURCES, "mnist", replace(source, remotes=remotes))
    prepare.main(["mnist", "--root", str(tmp_path)])
    assert "mnist train: 6 images" in capsys.readouterr().out
    assert list((tmp_path / ".downloads").iterdir()) == []
    asked = len(server.requests)
    prepare.main(["mnist", "--root", str(tmp_path)])
    assert len(server.requests) == asked  # nothing is fetched twice


def test_every_option_of_the_command_changes_what_it_says(server, tmp_path, monkeypatch):
    published, other = mnist_files(), mnist_files()
    remotes = tuple(binary(server, name, content) for name, content in published.items())
    server.files |= {f"mirror/{name}": server.files[name] for name in published}
    for name in ("mnist", "fashion_mnist"):
        monkeypatch.setitem(prepare.SOURCES, name, replace(prepare.SOURCES[name], remotes=remotes))
    monkeypatch.setenv("DATA_ROOT", str(tmp_path / "default"))
    at_hand = str(zip_of(tmp_path / "other.zip", other))

    def asked(*words):
        server.requests.clear()
        code = run_command(lambda: prepare.main(list(words)))
        return code, {path.rpartition("/")[0] for path, _ in server.requests}

    def fingerprint(root="default", name="mnist"):
        return load(name, tmp_path / root).fingerprint()

    assert asked("mnist") == (0, {""})
    first = fingerprint()
    assert asked("fashion_mnist") == (0, {""}) and fingerprint(name="fashion_mnist") != first
    assert not (tmp_path / "there").exists()
    assert asked("mnist", "--root", str(tmp_path / "there"), "--mirror", f"{server.url}/mirror") == (0, {"/mirror"})
    assert fingerprint("there") == first
    assert asked("mnist", "--root", str(tmp_path / "hand"), "--from", at_hand) == (0, set())
    assert fingerprint("hand") != first
    assert asked("mnist", "--from", at_hand) == (2, set()) and fingerprint() == first
    assert asked("mnist", "--from", at_hand, "--force", "true") == (0, set()) and fingerprint() == fingerprint("hand")
    assert asked("mnist") == (0, set()) and asked("mnist", "--force", "true") == (0, {""}) and fingerprint() == first


def test_prepare_celeba_in_pieces(tmp_path):
    names = [f"{i:06}.png" for i in range(1, 5)]
    images = zip_of(tmp_path / "faces.zip", {f"img_align_celeba/img_align_celeba/{name}": png(8) for name in names})
    attributes, parts = tmp_path / "list_attr_celeba.csv", tmp_path / "list_eval_partition.txt"
    attributes.write_text("\n".join(["image_id,A,B", *(f"{name},1,-1" for name in names)]))
    parts.write_text("\n".join(f"{name} {i % 3}" for i, name in enumerate(names)))
    lines = prepare.prepare("celeba", tmp_path / "data", [images, attributes, parts])
    assert len(lines) == 4 and "train: 2 images" in lines[0]
    assert load("celeba", tmp_path / "data", "valid", image_size=8).targets.tolist() == [[1, 0]]
    with pytest.raises(UserError, match="does not hold"):
        prepare.prepare(
            "celeba", tmp_path / "data", [tmp_path / "faces.zip", zip_of(tmp_path / "x.zip", {"a": b"b"})], force=True
        )


def test_prepare_imagenet_stores_what_was_compressed(tmp_path):
    data, labels = RNG.integers(0, 256, (4, 3072), dtype=np.uint8), np.array([1, 1000, 3, 4])
    members = {}
    for name in ("train_data_batch_1", "val_data"):
        stream = io.BytesIO()
        np.savez_compressed(stream, data=data, labels=labels)
        members[f"Imagenet32/{name}.npz"] = stream.getvalue()
    lines = prepare.prepare("imagenet32", tmp_path, [zip_of(tmp_path / "a.zip", members)])
    assert "imagenet32 train: 4 images" in lines[0]
    stored = load("imagenet32", tmp_path)
    assert isinstance(stored._chunks[0], np.memmap)
    np.testing.assert_array_equal(stored.arrays()[0].numpy().reshape(4, -1), data)
    assert stored.targets.tolist() == [0, 999, 2, 3]


def test_large_grids_are_packed_and_unpacked(tmp_path):
    from common.datasets import grids

    sizes = (2, 1, 2, 3, 4)
    images = RNG.integers(0, 2, (48, 64, 64), dtype=np.uint8)
    (tmp_path / "dsprites").mkdir()
    path = tmp_path / "dsprites" / grids.DSPRITES_FILE
    np.savez_compressed(path, imgs=images)
    assert grids.pack_dsprites(path, sizes).stat().st_size == 128 + 48 * 512
    packed = load("dsprites", tmp_path, sizes=sizes)
    assert isinstance(packed._packed, np.memmap)
    np.testing.assert_array_equal(packed.images_at([40, 3])[:, 0], images[[40, 3]] * 255)

    sizes = (2, 1, 1, 1, 1, 2, 3)
    colours = RNG.integers(0, 256, (12, 64, 64, 3), dtype=np.uint8)
    npz = tmp_path / "mpi3d_toy.npz"
    np.savez_compressed(npz, images=colours)
    grids.unpack_mpi3d(npz, sizes)  # `prepare` does it for the whole grid
    np.testing.assert_array_equal(load("mpi3d_toy", tmp_path, sizes=sizes)[7][0], colours[7].transpose(2, 0, 1))


def test_batches_put_there_by_hand_are_settled_without_a_download(tmp_path):
    (tmp_path / "imagenet32").mkdir()
    data = RNG.integers(0, 256, (2, 3072), dtype=np.uint8)
    for name in ("train_data_batch_1", "val_data"):
        np.savez_compressed(tmp_path / "imagenet32" / f"{name}.npz", data=data, labels=np.array([5, 6]))
    assert prepare.prepare("imagenet32", tmp_path)[0] == "imagenet32 is there already"
    assert isinstance(load("imagenet32", tmp_path)._chunks[0], np.memmap)


def test_the_command_line(tmp_path, capsys):
    assert run_command(lambda: prepare.main(["mnits"])) == 2
    assert "did you mean 'mnist'" in capsys.readouterr().err
    assert run_command(lambda: prepare.main(["celeba", "--root", str(tmp_path)])) == 2
    error = capsys.readouterr().err
    assert "prepare celeba --from FILE" in error and error.count("\n") == 1
    assert run_command(lambda: prepare.main(["mnist", "--from", str(tmp_path / "no.zip")])) == 2
    assert "no.zip is not there" in capsys.readouterr().err
    assert run_command(lambda: prepare.main(["mnist", "--from", str(tmp_path)])) == 2
    assert run_command(lambda: prepare.main(["digits"])) == 0
    with pytest.raises(SystemExit) as help_exit:
        prepare.main(["--help"])
    assert help_exit.value.code == 0
    shown = capsys.readouterr().out
    assert all(f"  {name} " in shown for name in prepare.SOURCES)
    assert set(prepare.SOURCES) == set(prepare.SETS)


# ---- nothing takes its place before all of it was read


def everything(root):
    return {path.relative_to(root): path.read_bytes() for path in root.rglob("*") if path.is_file()}


def mnist_archive(path, wrap=False):
    """An archive of four small idx files; with `wrap` each in a folder of its own name, as one mirror has them."""
    with zipfile.ZipFile(path, "w") as archive:
        for name in IDX_NAMES:
            images = "images" in name
            header = bytes([0, 0, 8, 3 if images else 1]) + struct.pack(
                ">3I" if images else ">I", 4, *[28, 28][: 2 * images]
            )
            archive.writestr(f"{name}/{name}" if wrap else name, header + bytes(4 * (784 if images else 1)))
    return path


def test_an_archive_with_a_folder_for_each_file_leaves_files_only(tmp_path):
    prepare.prepare("mnist", tmp_path / "data", [mnist_archive(tmp_path / "a.zip", wrap=True)])
    assert {path.name for path in (tmp_path / "data" / "MNIST" / "raw").iterdir()} == set(IDX_NAMES)
    assert all(path.is_file() for path in (tmp_path / "data" / "MNIST" / "raw").iterdir())


def test_a_wrong_file_is_refused_before_it_takes_a_place(tmp_path):
    root, wrong = tmp_path / "data", tmp_path / "3dshapes.h5"
    wrong.write_bytes(b"no HDF5")
    with pytest.raises(UserError, match=r"3dshapes\.h5"):
        prepare.prepare("shapes3d", root, [wrong])
    assert everything(root) == {}
    prepare.prepare("mnist", root, [mnist_archive(tmp_path / "a.zip")])  # the right one is then taken


def test_one_damaged_batch_refuses_the_whole_archive(tmp_path, monkeypatch):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in (*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"):
        batch = {b"data": np.zeros((10, 3072), np.uint8), b"labels": list(range(10))}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    (folder / "batches.meta").write_bytes(pickle.dumps({b"label_names": []}, protocol=2))
    (folder / "data_batch_3").write_bytes(b"cut off")
    with tarfile.open(tmp_path / "c.tar.gz", "w:gz") as archive:
        archive.add(folder, folder.name)
    root = tmp_path / "data"
    with pytest.raises(UserError, match="data_batch_3"):
        prepare.prepare("cifar10", root, [tmp_path / "c.tar.gz"])
    assert everything(root) == {}


def test_what_is_there_stays_when_the_new_one_is_damaged(tmp_path):
    root = tmp_path / "data"
    prepare.prepare("mnist", root, [mnist_archive(tmp_path / "a.zip")])
    before = everything(root)
    name = IDX_NAMES[0]
    (tmp_path / name).write_bytes(b"cut off")
    for force in (False, True):
        with pytest.raises(UserError):
            prepare.prepare("mnist", root, [tmp_path / name], force=force)
        assert everything(root) == before
    with pytest.raises(UserError, match="is there already: give --force"):
        prepare.prepare("mnist", root, [tmp_path / "a.zip"])
    prepare.prepare("mnist", root, [tmp_path / "a.zip"], force=True)
    assert everything(root) == before


@pytest.mark.parametrize(
    ("name", "file"),
    [("shapes3d", "3dshapes.h5"), ("svhn", "train_32x32.mat"), ("dsprites", "d.npz"), ("cifar10", "cifar10.zip"),
     ("celeba", "list_attr_celeba.txt"), ("mnist", "train-images-idx3-ubyte")],
)  # fmt: skip
def test_a_web_page_under_the_name_of_a_file_is_called_one(tmp_path, name, file):
    (tmp_path / file).write_text("<!DOCTYPE html><html><title>Quota exceeded</title></html>")
    with pytest.raises(UserError, match=f"{file} is a web page"):
        prepare.prepare(name, tmp_path / "data", [tmp_path / file])
    assert everything(tmp_path / "data") == {}


def cifar_folder(tmp_path, without=()):
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in {*(f"data_batch_{i}" for i in range(1, 6)), "test_batch"} - set(without):
        batch = {b"data": np.zeros((10, 3072), np.uint8), b"labels": list(range(10))}
        (folder / name).write_bytes(pickle.dumps(batch, protocol=2))
    with tarfile.open(tmp_path / "c.tar.gz", "w:gz") as archive:
        archive.add(folder, folder.name)
    return tmp_path / "c.tar.gz"


def test_an_archive_that_lacks_a_batch_is_refused_wholly(tmp_path):
    with pytest.raises(UserError, match=r"c\.tar\.gz is not complete.*data_batch_4"):
        prepare.prepare("cifar10", tmp_path / "data", [cifar_folder(tmp_path, ["data_batch_4"])])
    assert everything(tmp_path / "data") == {}


def test_what_is_still_missing_is_said(tmp_path):
    names = sorted(IDX_NAMES)
    for name, content in mnist_files().items():
        (tmp_path / name).write_bytes(content)
    root = tmp_path / "data"
    with pytest.raises(UserError, match=r"is in place; still missing: mnist is not there: expected .*ubyte"):
        prepare.prepare("mnist", root, [tmp_path / f"{names[0]}.gz"])
    lines = prepare.prepare("mnist", root, [tmp_path / f"{names[1]}.gz"])  # now one of two splits is whole
    assert lines[0].startswith("mnist test: 4 images") and lines[1].startswith("still missing: ")
    assert str(root / "MNIST" / "raw" / "train-images-idx3-ubyte") in lines[1]
    lines = prepare.prepare("mnist", root, [tmp_path / f"{name}.gz" for name in names[2:]])
    assert [line.split(":")[0] for line in lines] == ["mnist train", "mnist test"]


def test_celeba_as_a_mirror_has_it(tmp_path):
    """Kaggle's: csv lists, further lists, the images a folder deeper; and what a Mac adds to an archive."""
    names = [f"{i:06}.jpg" for i in range(1, 5)]
    members = {f"img_align_celeba/img_align_celeba/{name}": png(8) for name in names}
    members["list_attr_celeba.csv"] = "\n".join(["image_id,A,B", *(f"{name},1,-1" for name in names)])
    members["list_eval_partition.csv"] = "\n".join(
        ["image_id,partition", *(f"{name},{i % 3}" for i, name in enumerate(names))]
    )
    members["list_bbox_celeba.csv"] = "image_id,x_1\n000001.jpg,3"
    members["__MACOSX/img_align_celeba/img_align_celeba/._000001.jpg"] = b"Mac OS X"
    members["img_align_celeba/img_align_celeba/.DS_Store"] = b"Mac OS X"
    lines = prepare.prepare("celeba", tmp_path / "data", [zip_of(tmp_path / "archive.zip", members)])
    assert [line.split(",")[0] for line in lines] == [
        "celeba train: 2 images", "celeba valid: 1 images", "celeba test: 1 images", "celeba all: 4 images",
    ]  # fmt: skip
    placed = {path.name for path in (tmp_path / "data" / "celeba" / "img_align_celeba").iterdir()}
    assert placed == set(names)


def test_a_move_that_fails_is_taken_back(tmp_path, monkeypatch):
    root = tmp_path / "data"
    prepare.prepare("mnist", root, [mnist_archive(tmp_path / "a.zip")])
    before = everything(root)
    files = mnist_files()
    new = zip_of(tmp_path / "b.zip", files)
    move, calls = prepare.shutil.move, []

    def failing(source, target):
        calls.append(target)
        if len(calls) == 5:  # two files have given way to new ones, a third has gone
            raise OSError(5, "Input/output error")
        return move(source, target)

    monkeypatch.setattr(prepare.shutil, "move", failing)
    with pytest.raises(UserError, match=r"cannot put .* in place: Input/output error"):
        prepare.prepare("mnist", root, [new], force=True)
    assert everything(root) == before
    monkeypatch.undo()
    prepare.prepare("mnist", root, [new], force=True)
    assert len(load("mnist", root)) == 6


def test_force_replaces_a_folder_of_images_wholly(tmp_path):
    root = tmp_path / "data"
    prepare.prepare("cifar10", root, [zip_of(tmp_path / "a.zip", cifar_members())])
    few = {name: content for name, content in cifar_members().items() if "0002" not in name}
    prepare.prepare("cifar10", root, [zip_of(tmp_path / "b.zip", few)], force=True)
    assert len(load("cifar10", root)) == 4
    assert not [path for path in root.iterdir() if path.name != "cifar10"]


def test_names_of_files_at_hand(tmp_path, capsys):
    for name in ("a,b.zip", "a b.zip", "ü\n.zip"):
        archive = mnist_archive(tmp_path / name)
        prepare.main(["mnist", "--from", str(archive), "--root", str(tmp_path / name[:-4])])
        assert capsys.readouterr().out.count("4 images") == 2
    for argv, words in (
        (["mnist", "--from"], "name the files"),
        (["mnist", "--from", str(archive), "--mirror", "http://x"], "exclude each other"),
        (["mnist", "--from", str(archive), "--root", str(archive)], "cannot write into"),
        (["mnist", "--form", str(archive)], "unknown option"),
        ([], "name is missing"),
        (["mnist", "--from", str(archive), str(archive), "--root", str(tmp_path / "twice")], "is given twice"),
    ):
        assert run_command(lambda argv=argv: prepare.main(argv)) == 2
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1


def test_the_place_of_a_download_cannot_be_made(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write into"):
        fetch(Remote("a.bin", ("http://127.0.0.1:9/a.bin",)), tmp_path / "file" / "deeper")


def test_a_set_that_is_damaged_in_place_names_the_remedy(tmp_path):
    root = tmp_path / "data"
    prepare.prepare("mnist", root, [mnist_archive(tmp_path / "a.zip")])
    (root / "MNIST" / "raw" / IDX_NAMES[0]).write_bytes(b"cut off")
    with pytest.raises(UserError, match=f"{IDX_NAMES[0]}.*--force replaces it"):
        prepare.prepare("mnist", root)
    prepare.prepare("mnist", root, [tmp_path / "a.zip"], force=True)
    assert len(load("mnist", root, "test")) == 4


def test_a_gzip_that_unpacks_to_more_than_the_disk_is_stopped(tmp_path, monkeypatch):
    usage = prepare.shutil.disk_usage(tmp_path)
    monkeypatch.setattr("common.datasets.archives.shutil.disk_usage", lambda _: usage._replace(free=10_000_000))
    (tmp_path / "train-images-idx3-ubyte.gz").write_bytes(gzip.compress(bytes(30_000_000)))
    with pytest.raises(UserError, match="free space"):
        prepare.prepare("mnist", tmp_path / "data", [tmp_path / "train-images-idx3-ubyte.gz"])
    assert everything(tmp_path / "data") == {}


@pytest.mark.parametrize("name", ["train-labels-idx1-ubyte.gz", "train-labels-idx1-ubyte", "m.tar.gz", "m.zip"])
def test_cut_files_at_hand(tmp_path, name):
    content = idx(np.arange(100, dtype=np.uint8) % 10)
    if name.endswith(".gz") and "tar" not in name:
        content = gzip.compress(content)
    elif name.startswith("m."):
        make = zip_of if name.endswith("zip") else partial(tar_of, mode="w:gz")
        content = make(tmp_path / "whole", {"train-labels-idx1-ubyte": content}).read_bytes()
    for end in (0, 1, len(content) // 2, len(content) - 9):
        (tmp_path / name).write_bytes(content[:end])
        with pytest.raises(UserError):
            prepare.prepare("mnist", tmp_path / "data", [tmp_path / name])
