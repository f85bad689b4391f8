"""The plain files of a zip or tar archive, each put where a rule says; nothing leaves the folder, no disk is filled."""

import contextlib
import gzip
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from common.datasets.readers import DAMAGE, reading
from common.errors import UserError

ENDINGS = (".zip", ".tar", ".tar.gz", ".tgz", ".xz", ".bz2")
PIECE = 1 << 20


def is_archive(path: Path) -> bool:
    """Whether `path` is a zip or a tar archive, compressed or not (an npz, which is a zip too, does not count)."""
    if path.name.endswith(ENDINGS):
        return True  # whatever it holds: a damaged one is then reported as such
    with contextlib.suppress(*DAMAGE):  # the test for a tar reads, and so meets what is damaged
        return path.suffix != ".npz" and (zipfile.is_zipfile(path) or tarfile.is_tarfile(path))
    return False


def _members(archive: Path) -> Iterator[tuple[str, int, IO[bytes]]]:
    """(name, size, stream) of each plain file of a zip or tar archive, in its order. Raises UserError for a link."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as packed:
            for info in packed.infolist():
                if (info.external_attr >> 16) & 0o170000 not in (0, 0o100000, 0o040000):
                    raise UserError(f"{archive}: its member {info.filename!r} is a link or a device; not unpacked")
                if not info.is_dir():
                    with packed.open(info) as stream:
                        yield info.filename, info.file_size, stream
        return
    with tarfile.open(archive, "r:*") as packed:
        for member in packed:
            if member.isreg():
                yield member.name, member.size, packed.extractfile(member)
            elif not member.isdir():
                raise UserError(f"{archive}: its member {member.name!r} is a link or a device; not unpacked")


def _safe_name(member: str, archive: Path) -> str:
    name = PurePosixPath(member.replace("\\", "/"))
    if name.is_absolute() or ".." in name.parts or (name.parts and name.parts[0].endswith(":")):
        raise UserError(f"{archive}: its member {member!r} would leave the folder; the archive is not trustworthy")
    return str(name)


def unpack(archive: Path, folder: Path, place: Callable[[str], str | None] = str) -> int:
    """Put each plain file of a zip or tar archive at `folder`/`place(name)`, and count them; None leaves one out.

    A file named .gz whose place is not is decompressed. Raises UserError for links, devices, names that leave the
    folder, a file that stands there twice, a damaged archive, and contents that exceed the free space of the disk.
    """
    with reading(archive, "an archive"):
        return sum(_put(*member, archive, folder, place) for member in _members(archive))


def put(file: Path, folder: Path, place: Callable[[str], str | None]) -> int:
    """A single file that is no archive, as `unpack` does it."""
    with reading(file, "a file"), open(file, "rb") as stream:
        return _put(file.name, file.stat().st_size, stream, file, folder, place)


def _put(
    name: str, size: int, stream: IO[bytes], source: Path, folder: Path, place: Callable[[str], str | None]
) -> bool:
    safe = _safe_name(name, source)
    where = place(safe)
    if where is None:
        return False
    target = folder / where
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        raise UserError(f"{source}: {target.name} is given twice; give it once")
    packed = safe.endswith(".gz") and not where.endswith(".gz")
    room, written = shutil.disk_usage(folder).free, 0
    with open(target, "xb") as file:
        content = gzip.GzipFile(fileobj=stream) if packed else stream
        while max(size, written) <= room and (piece := content.read(PIECE)):
            written += file.write(piece)
    if max(size, written) > room:
        raise UserError(f"{source} unpacks to more than the free space of {folder}: make room or give --root")
    if written != size and not packed:
        raise EOFError(f"{name} ends early")
    return True
