"""Download and unpack released weights: `python -m lbae.download LIST... [--to FOLDER]`, or lbae/download.sh LIST.

A line of a list is "URL file sha256"; blank lines and lines that start with # are skipped. A download goes to
<file>.part, which a later call continues, and takes its name when complete and of the right digest. The archive (zip or
tar) is checked member by member, unpacked beside its destination, moved there in one step, and removed.
"""

import argparse
import hashlib
import lzma
import shutil
import stat
import struct
import sys
import tarfile
import tempfile
import urllib.error
import urllib.request
import zipfile
import zlib
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path, PurePosixPath

from tqdm import tqdm

from common.errors import UserError, run_command

# what zipfile and tarfile raise on damaged bytes (RuntimeError: an encrypted or unsupported member)
DAMAGE = (OSError, EOFError, ValueError, LookupError, RuntimeError, MemoryError, OverflowError, struct.error,
          zlib.error, lzma.LZMAError, zipfile.BadZipFile, tarfile.TarError)  # fmt: skip

BLOCK = 1 << 20
HERE = Path(__file__).resolve().parent


@dataclass
class Item:
    """One line of a list; `sha256` is empty when nobody published it."""

    url: str
    name: str
    sha256: str


def read_list(path: Path) -> list[Item]:
    """The items of a list file. Raises UserError naming the line that is wrong."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the list {path} ({error})") from error
    items = []
    for number, line in enumerate(lines, 1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if len(words) not in (2, 3) or not words[0].startswith(("http://", "https://")):
            raise UserError(f"{path}, line {number}: expected 'URL file sha256'")
        name, digest = words[1], words[2].lower() if len(words) == 3 and words[2] != "-" else ""
        if name != Path(name).name or name.startswith("."):
            raise UserError(f"{path}, line {number}: '{name}' must be a plain file name")
        if digest and (len(digest) != 64 or set(digest) - set("0123456789abcdef")):
            raise UserError(f"{path}, line {number}: '{words[2]}' is no SHA-256 digest (64 hexadecimal digits)")
        items.append(Item(words[0], name, digest))
    if not items:
        raise UserError(f"{path} lists nothing to download")
    return items


def fetch(item: Item, folder: Path) -> Path:
    """Download one item into `folder` and return the file; what an interrupted call left is continued.

    Raises UserError when the server fails, the file ends early, or its digest is not the expected one.
    """
    part, target = folder / f"{item.name}.part", folder / item.name
    have = part.stat().st_size if part.is_file() else 0
    request = urllib.request.Request(item.url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        answer = urllib.request.urlopen(request, timeout=60)
    except urllib.error.HTTPError as error:
        if have and error.code == 416:  # nothing lies beyond what is here: a whole file, or another one
            answer = None
        else:
            raise UserError(f"{item.url}: the server answers {error.code} {error.reason}") from error
    except (OSError, ValueError) as error:
        raise UserError(f"{item.url}: no answer ({error}); check the network and try again") from error
    if answer is not None:
        _receive(answer, item, part, have)
    digest = _sha256(part)
    if item.sha256 and digest != item.sha256:
        start = part.read_bytes()[:512].lstrip().lower()
        part.unlink()
        what = "a web page instead of the file" if start.startswith((b"<!doctype", b"<html")) else "another file"
        raise UserError(f"{item.name}: sha256 is {digest}, expected {item.sha256}: {what}; it is removed")
    if not item.sha256:
        print(f"{item.name}: no digest is listed; sha256 {digest}", file=sys.stderr)
    part.replace(target)
    return target


def _receive(answer, item: Item, part: Path, have: int) -> None:
    continues = answer.status == 206
    left = answer.headers.get("Content-Length")
    received = 0
    bar = tqdm(total=int(left) if left else None, unit="B", unit_scale=True, desc=item.name, disable=None)
    try:
        with answer, bar, open(part, "ab" if continues else "wb") as file:
            while block := answer.read(BLOCK):
                file.write(block)
                received += len(block)
                bar.update(len(block))
    except (OSError, HTTPException) as error:
        raise UserError(f"{item.name}: the connection broke ({error}); call again to continue") from error
    if left and received < int(left):
        kept = received + (have if continues else 0)
        raise UserError(
            f"{item.name} is truncated: {received} of {left} bytes came; {kept} are kept, call again to continue"
        )


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def unpack(archive: Path, folder: Path) -> list[Path]:
    """Unpack a zip or tar into `folder` and return what appeared at its top level.

    Raises UserError, with nothing written, for something that is no archive, a damaged one, and members that are links,
    devices, absolute or lead outside; and when a name exists in `folder` already.
    """
    with tempfile.TemporaryDirectory(prefix=".unpack-", dir=folder) as name:
        place = Path(name)
        try:
            if zipfile.is_zipfile(archive):
                _unpack_zip(archive, place)
            elif tarfile.is_tarfile(archive):
                _unpack_tar(archive, place)
            else:
                page = archive.read_bytes()[:512].lstrip().lower().startswith((b"<!doctype", b"<html"))
                raise UserError(
                    f"{archive.name} is {'a web page' if page else 'neither a zip nor a tar file'}; see its URL"
                )
        except DAMAGE as error:
            raise UserError(f"{archive.name} is damaged ({error}); download it again") from error
        members = sorted(place.iterdir())
        for member in members:
            if (folder / member.name).exists():
                raise UserError(f"{folder / member.name} exists; move it away, then unpack {archive} again")
        for member in members:
            shutil.move(member, folder / member.name)
    return [folder / member.name for member in members]


def _check_member(archive: Path, name: str, regular: bool) -> None:
    path = PurePosixPath(name.replace("\\", "/"))
    if path.is_absolute() or ".." in path.parts or ":" in (path.parts[0] if path.parts else ""):
        raise UserError(f"{archive.name} is refused: its member '{name}' leads outside the folder")
    if not regular:
        raise UserError(f"{archive.name} is refused: its member '{name}' is a link or a device")


def _unpack_zip(archive: Path, place: Path) -> None:
    with zipfile.ZipFile(archive) as file:
        for member in file.infolist():
            kind = stat.S_IFMT(member.external_attr >> 16)
            _check_member(archive, member.filename, kind in (0, stat.S_IFREG, stat.S_IFDIR))
        if sum(member.file_size for member in file.infolist()) > shutil.disk_usage(place).free:
            raise UserError(f"{archive.name} unpacks to more than the free space of {place.parent}; make room")
        if bad := file.testzip():
            raise zipfile.BadZipFile(f"member '{bad}'")
        for member in file.infolist():
            path = Path(file.extract(member, place))
            if path.is_file() and path.stat().st_size != member.file_size:
                raise zipfile.BadZipFile(f"member '{member.filename}' has another size")


def _unpack_tar(archive: Path, place: Path) -> None:
    with tarfile.open(archive) as file:
        members = file.getmembers()
        for member in members:
            _check_member(archive, member.name, member.isfile() or member.isdir())
        if sum(member.size for member in members) > shutil.disk_usage(place).free:
            raise UserError(f"{archive.name} unpacks to more than the free space of {place.parent}; make room")
        file.extractall(place, members, filter="data")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="lbae/download.sh", description=__doc__.split("\n")[0])
    parser.add_argument("lists", nargs="+", type=Path, help="files with lines 'URL file sha256'")
    parser.add_argument("--to", type=Path, default=HERE, help="folder to unpack into (default: lbae/)")
    args = parser.parse_args(argv)
    args.to.mkdir(parents=True, exist_ok=True)
    for item in [item for path in args.lists for item in read_list(path)]:
        archive = fetch(item, args.to)
        for path in unpack(archive, args.to):
            print(path)
        archive.unlink()


if __name__ == "__main__":
    sys.exit(run_command(main))
