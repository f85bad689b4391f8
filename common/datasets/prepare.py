"""Get a data set, or put an archive that you have in its place.

    python -m common.datasets.prepare mnist                                  # download, check, unpack below data/
    python -m common.datasets.prepare cifar10 --from cifar10_jpeg.tar.xz     # unpack an archive of class folders
    python -m common.datasets.prepare celeba --from img_align_celeba.zip list_attr_celeba.txt list_eval_partition.txt
    python -m common.datasets.prepare dsprites --mirror https://my.host/files --root /big/disk

A download goes to a temporary file, resumes where it stopped, is checked against its digest and only then takes its
name. Archives are unpacked without links, absolute paths and `..`. Nothing that is already there is overwritten without
--force.
"""

import argparse
import contextlib
import gzip
import lzma
import shutil
import sys
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO

import numpy as np
import torchvision.datasets as published

from common.checkpoint import atomic_write
from common.datasets import SETS, data_root, grids, load
from common.datasets.classic import IDX_FILES
from common.datasets.download import Remote, fetch
from common.datasets.faces import FOLDERS as CELEBA_FOLDERS
from common.datasets.files import first_present
from common.datasets.imagenet import batch_files
from common.datasets.readers import DAMAGE, NpzFile, reading
from common.datasets.sprites import BITS_FILE, Sprites, write_bits
from common.errors import MissingDataError, UserError, refuse_web_page, run_command, suggest
from common.images import PICTURE_SUFFIXES

IDX_NAMES = {name for pair in IDX_FILES.values() for name in pair}
ARCHIVES = {".zip", ".tar", ".tgz", ".xz", ".bz2"}
CELEBA_LISTS = ("list_attr_celeba", "list_eval_partition")


# ---------------------------------------------------------------- unpacking


def _safe_name(member: str, archive: Path) -> PurePosixPath:
    name = PurePosixPath(member.replace("\\", "/"))
    if name.is_absolute() or ".." in name.parts or (name.parts and name.parts[0].endswith(":")):
        raise UserError(f"{archive}: its member {member!r} would leave the folder; the archive is not trustworthy")
    return name


def _members(archive: Path) -> Iterator[tuple[str, int, IO[bytes]]]:
    """(name, size, stream) of each plain file of a zip or tar archive, in its order. Raises UserError for a link."""
    if zipfile.is_zipfile(archive):
        with zipfile.ZipFile(archive) as packed:
            for info in packed.infolist():
                if info.is_dir():
                    continue
                if (info.external_attr >> 16) & 0o170000 not in (0, 0o100000):
                    raise UserError(f"{archive}: its member {info.filename!r} is a link or a device; not unpacked")
                with packed.open(info) as stream:
                    yield info.filename, info.file_size, stream
        return
    with tarfile.open(archive, "r:*") as packed:
        for member in packed:
            if member.isdir():
                continue
            if not member.isreg():
                raise UserError(f"{archive}: its member {member.name!r} is a link or a device; not unpacked")
            yield member.name, member.size, packed.extractfile(member)


def is_archive(path: Path) -> bool:
    """Whether `path` is a zip or a tar archive, compressed or not (an npz, which is a zip too, does not count)."""
    if path.suffix in ARCHIVES or path.name.endswith(".tar.gz"):
        return True  # whatever it holds: a damaged one is then reported as such
    return path.suffix != ".npz" and (zipfile.is_zipfile(path) or tarfile.is_tarfile(path))


def unpack(archive: Path, folder: Path) -> None:
    """Unpack the plain files of a zip or tar archive into `folder`.

    Raises UserError for links, devices, names that leave the folder, a damaged archive, and contents that exceed the
    free space of the disk.
    """
    folder.mkdir(parents=True, exist_ok=True)
    room = shutil.disk_usage(folder).free
    with reading(archive, "an archive"):
        try:
            for name, size, stream in _members(archive):
                target = folder / _safe_name(name, archive)
                room -= size
                if room < 0:
                    raise UserError(
                        f"{archive} unpacks to more than the free space of {folder}: make room or give --root"
                    )
                target.parent.mkdir(parents=True, exist_ok=True)
                with open(target, "xb") as file:
                    shutil.copyfileobj(stream, file, 1 << 20)
                if target.stat().st_size != size:
                    raise EOFError(f"{name} ends early")
        except (tarfile.TarError, lzma.LZMAError, *DAMAGE) as error:
            if isinstance(error, UserError):
                raise
            raise ValueError(error) from error


def _move(source: Path, target: Path) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists():
        raise UserError(f"{target.name} stands in the given files twice; give it once")
    source.rename(target)


def _copy(source: Path, target: Path) -> None:
    with open(source, "rb") as old, atomic_write(target) as new:
        shutil.copyfileobj(old, new, 1 << 20)


@contextlib.contextmanager
def _stage(root: Path) -> Iterator[Path]:
    """A temporary folder on the disk of `root`, where files are put in order and checked before any takes its name."""
    root.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".preparing-", dir=root) as name:
        yield Path(name)


def _units(folder: Path) -> Iterator[Path]:
    """What moves as a whole from <folder>/<data set>: folders of pictures, and every other file."""
    for path in sorted(folder.glob("*/*")):
        if path.is_dir() and not any(one.suffix.lower() in PICTURE_SUFFIXES for one in path.rglob("*")):
            yield from sorted(one for one in path.rglob("*") if not one.is_dir())
        else:
            yield path
    yield from sorted(path for path in folder.glob("*") if not path.is_dir())


def _settle_into(stage: Path, root: Path, force: bool) -> None:
    """Move everything in `stage` to its place below `root`, or nothing: what gives way to `force` is put back when a
    move fails. Raises UserError, before anything moves, for a target that is there already without `force`.
    """
    units = list(_units(stage))
    targets = [root / path.relative_to(stage) for path in units]
    for target in targets:
        if target.exists() and not force:
            raise UserError(f"{target} is there already: give --force to replace it")
    done: list[tuple[Path, Path, Path | None]] = []
    try:
        for path, target in zip(units, targets, strict=True):
            target.parent.mkdir(parents=True, exist_ok=True)
            old = target.with_name(f".{target.name}.old") if target.exists() else None
            if old:
                target.rename(old)
            done.append((path, target, old))
            path.rename(target)
    except OSError as error:
        for path, target, old in reversed(done):
            if target.exists():
                target.rename(path)
            if old:
                old.rename(target)
        raise UserError(f"cannot put {target} in place: {error.strerror}") from error
    for _, _, old in done:
        if old:
            shutil.rmtree(old) if old.is_dir() and not old.is_symlink() else old.unlink()


def _holding(folder: Path, *names: str) -> Path | None:
    """The topmost folder in `folder` that holds all of `names`."""
    waiting = [folder]
    while waiting:
        here = waiting.pop(0)
        if all((here / name).exists() for name in names):
            return here
        # a class folder of images is not worth descending into, and has no sub-folders
        waiting += sorted(path for path in here.iterdir() if path.is_dir())
    return None


@contextlib.contextmanager
def _unpacked(source: Path, root: Path) -> Iterator[Path]:
    """A temporary folder beside `root` with the contents of the archive, or of the single file, `source`."""
    with _stage(root.parent) as folder:
        if is_archive(source):
            unpack(source, folder)
        else:
            _copy(source, folder / source.name)
        yield folder


def _foreign(source: Path, expected: str) -> UserError:
    return UserError(f"{source} does not hold {expected}")


# ---------------------------------------------------------------- one function a data set: put `source` in its place


def _idx(folder: str) -> Callable[[Path, Path], None]:
    def place(source: Path, root: Path) -> None:
        with _unpacked(source, root) as temporary:
            files = [path for path in temporary.rglob("*") if path.is_file()]
            found = [path for path in files if path.name.removesuffix(".gz") in IDX_NAMES]
            if not found:
                raise _foreign(source, f"any of {', '.join(sorted(IDX_NAMES))}")
            for path in found:
                target = root / folder / path.name.removesuffix(".gz")
                if path.suffix != ".gz":
                    _move(path, target)
                    continue
                with reading(source, "gzip"), gzip.open(path) as packed, atomic_write(target) as file:
                    shutil.copyfileobj(packed, file, 1 << 20)

    return place


def _cifar(name: str, batches: str, marker: str) -> Callable[[Path, Path], None]:
    def place(source: Path, root: Path) -> None:
        with _unpacked(source, root) as temporary:
            if folder := _holding(temporary, marker):
                _move(folder, root / batches)
            elif folder := _holding(temporary, "train", "test"):
                for part in ("train", "test"):
                    _move(folder / part, root / name / part)
            else:
                raise _foreign(source, f"{name}'s batches ({marker}) or folders train/<class>, test/<class>")

    return place


def _svhn(source: Path, root: Path) -> None:
    if source.name not in {f"{part}_32x32.mat" for part in ("train", "test", "extra")}:
        raise _foreign(source, "train_32x32.mat, test_32x32.mat or extra_32x32.mat")
    _copy(source, root / "SVHN" / source.name)


def _celeba(source: Path, root: Path) -> None:
    target = root / CELEBA_FOLDERS[0]
    with _unpacked(source, root) as temporary:
        used = False
        if folder := _holding(temporary, "img_align_celeba"):
            inner = folder / "img_align_celeba" / "img_align_celeba"
            _move(inner if inner.is_dir() else folder / "img_align_celeba", target / "img_align_celeba")
            used = True
        for path in list(temporary.rglob("list_*")):
            if path.suffix in (".txt", ".csv"):
                _move(path, target / path.name)
                used = True
        if not used:
            raise _foreign(source, f"a folder img_align_celeba or the lists {', '.join(CELEBA_LISTS)}")


def _tiny_imagenet(source: Path, root: Path) -> None:
    with _unpacked(source, root) as temporary:
        folder = _holding(temporary, "train", "val")
        if folder is None:
            raise _foreign(source, "folders train and val")
        _move(folder, root / "tiny-imagenet-200")


def store_npz(path: Path) -> None:
    """Rewrite a compressed npz without compression, so that it can be memory-mapped; atomic, a member at a time."""
    with (
        reading(path, "npz"),
        zipfile.ZipFile(path) as old,
        atomic_write(path) as file,
        zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as new,
    ):
        for info in old.infolist():
            large = info.file_size > 1 << 30
            with old.open(info) as source, new.open(info.filename, "w", force_zip64=large) as target:
                shutil.copyfileobj(source, target, 1 << 24)


def _imagenet(side: int) -> Callable[[Path, Path], None]:
    def place(source: Path, root: Path) -> None:
        base = root / f"imagenet{side}"
        folders = {f"{stem}_{side}x{side}" for stem in ("train", "valid", "val")}
        with _unpacked(source, root) as temporary:
            batches = [
                p for p in temporary.rglob("*") if p.is_file() and p.stem.startswith(("train_data_", "val_data"))
            ]
            for path in batches:
                _move(path, base / path.name)
            for folder in [p for p in temporary.rglob("*") if p.is_dir() and p.name in folders]:
                _move(folder, base / folder.name)
                batches.append(folder)
            if not batches:
                raise _foreign(source, f"train_data_batch_*, val_data or folders {', '.join(sorted(folders))}")

    return place


def _store_batches(side: int) -> Callable[[Path], None]:
    def settle(root: Path) -> None:
        for path in (path for split in ("train", "valid") for path in batch_files(root, side, split)):
            if path.suffix == ".npz" and NpzFile(path).mapped("data") is None:
                store_npz(path)

    return settle


def _newer(made: Path, path: Path) -> bool:
    return made.is_file() and made.stat().st_mtime >= path.stat().st_mtime


def _dsprites(source: Path, root: Path) -> None:
    _copy(source, root / "dsprites" / grids.DSPRITES_FILE)


def _pack_dsprites(root: Path) -> None:
    path = first_present([root / folder / grids.DSPRITES_FILE for folder in ("dsprites", "")])
    if path is None or _newer(grids.packed_path(path), path):
        return
    if NpzFile(path).mapped("imgs") is None:
        grids.pack_dsprites(path)


def _shapes3d(source: Path, root: Path) -> None:
    _copy(source, root / "3dshapes.h5")


def _mpi3d_toy(source: Path, root: Path) -> None:
    _copy(source, root / "mpi3d_toy" / "mpi3d_toy.npz")


def _unpack_mpi3d(root: Path) -> None:
    path = first_present([root / folder / "mpi3d_toy.npz" for folder in ("mpi3d_toy", "mpi3d", "")])
    if path is None or _newer(path.with_name("mpi3d_toy_images.npy"), path):
        return
    if NpzFile(path).mapped("images") is None:
        grids.unpack_mpi3d(path)


def write_sprites(root: Path, sprites: Sprites | None = None) -> Path:
    """Render the whole grid once, bit-packed (377 MB for the default grid), and return the file."""
    sprites = sprites or Sprites()
    path = root / "sprites" / BITS_FILE
    starts = range(0, len(sprites), 4096)
    blocks = (sprites._fetch(np.arange(s, min(s + 4096, len(sprites))))[:, 0].numpy() for s in starts)
    write_bits(blocks, len(sprites), sprites.height, path)
    return path


# ---------------------------------------------------------------- sources


@dataclass(frozen=True)
class Source:
    """Where a data set comes from, how a file of it is put in place, and what is then made of the files in place."""

    about: str
    place: Callable[[Path, Path], None] | None
    remotes: tuple[Remote, ...] = ()
    by_hand: str = ""
    settle: Callable[[Path], None] | None = None  # does nothing when no file is in place, or all is done


def _idx_remotes(reader: type) -> tuple[Remote, ...]:
    return tuple(
        Remote(name, tuple(mirror + name for mirror in reader.mirrors), "md5", digest)
        for name, digest in reader.resources
    )


def _single(reader: type) -> tuple[Remote, ...]:
    return (Remote(reader.filename, (reader.url,), "md5", reader.tgz_md5),)


SOURCES: dict[str, Source] = {
    "mnist": Source("60,000 + 10,000 grey 28x28, 12 MB", _idx("MNIST/raw"), _idx_remotes(published.MNIST)),
    "fashion_mnist": Source(
        "60,000 + 10,000 grey 28x28, 31 MB", _idx("FashionMNIST/raw"), _idx_remotes(published.FashionMNIST)
    ),
    "svhn": Source(
        "73,257 + 26,032 colour 32x32, 247 MB; the extra split by --from extra_32x32.mat",
        _svhn,
        tuple(
            Remote(file, (url,), "md5", md5)
            for url, file, md5 in (published.SVHN.split_list[part] for part in ("train", "test"))
        ),
    ),
    "cifar10": Source(
        "50,000 + 10,000 colour 32x32, 170 MB; or an archive of class folders",
        _cifar("cifar10", "cifar-10-batches-py", "data_batch_1"),
        _single(published.CIFAR10),
    ),
    "cifar100": Source(
        "50,000 + 10,000 colour 32x32, 169 MB; or an archive of class folders",
        _cifar("cifar100", "cifar-100-python", "meta"),
        _single(published.CIFAR100),
    ),
    "celeba": Source(
        "202,599 faces 178x218 with 40 attributes, 1.4 GB",
        _celeba,
        tuple(
            Remote(file, (), "md5", md5)
            for _, md5, file in published.CelebA.file_list
            if file in ("img_align_celeba.zip", "list_attr_celeba.txt", "list_eval_partition.txt")
        ),
        "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html",
    ),
    "tiny_imagenet": Source(
        "100,000 + 10,000 colour 64x64 in 200 classes, 248 MB",
        _tiny_imagenet,
        (
            Remote(
                "tiny-imagenet-200.zip",
                ("http://cs231n.stanford.edu/tiny-imagenet-200.zip",),
                "md5",
                "90528d7ca1a48142e341f4ef8d21d0de",
            ),
        ),
    ),
    "imagenet32": Source(
        "1,281,167 + 50,000 colour 32x32",
        _imagenet(32),
        by_hand="https://image-net.org/download-images.php",
        settle=_store_batches(32),
    ),
    "imagenet64": Source(
        "1,281,167 + 50,000 colour 64x64",
        _imagenet(64),
        by_hand="https://image-net.org/download-images.php",
        settle=_store_batches(64),
    ),
    "dsprites": Source(
        "737,280 binary 64x64 with 5 factors, 26 MB (404 MB prepared)",
        _dsprites,
        (
            Remote(
                grids.DSPRITES_FILE,
                (f"https://github.com/google-deepmind/dsprites-dataset/raw/master/{grids.DSPRITES_FILE}",),
                "md5",
                "7da33b31b13a06f4b04a70402ce90c2e",
            ),
        ),
        settle=_pack_dsprites,
    ),
    "shapes3d": Source(
        "480,000 colour 64x64 with 6 factors, 268 MB",
        _shapes3d,
        (
            Remote(
                "3dshapes.h5",
                ("https://storage.googleapis.com/3d-shapes/3dshapes.h5",),
                "md5",
                "099a2078d58cec4daad0702c55d06868",
            ),
        ),
    ),
    "mpi3d_toy": Source(
        "1,036,800 colour 64x64 with 7 factors (12.7 GB unpacked)",
        _mpi3d_toy,
        (
            Remote(
                "mpi3d_toy.npz",
                ("https://storage.googleapis.com/disentanglement_dataset/Final_Dataset/mpi3d_toy.npz",),
                "md5",
                "55889cb7c7dfc655d6e0277beee88868",
            ),
        ),
        settle=_unpack_mpi3d,
    ),
    "sprites": Source("737,280 binary 64x64 with 5 factors, rendered; a 377 MB file makes reading faster", None),
    "digits": Source("1,797 grey 8x8, comes with scikit-learn: nothing to prepare", None),
    "folder": Source("any folder of images: nothing to prepare, give the folder as root", None),
}


def _is_there(name: str, root: Path) -> bool:
    """Whether every main split of the data set can be read."""
    try:
        for split in SETS[name][2]:
            if split not in ("extra", "all"):
                load(name, root, split)
    except UserError:
        return False
    return True


def prepare(
    name: str, root: Path, sources: Sequence[Path] = (), mirror: str | None = None, force: bool = False
) -> list[str]:
    """Make data set `name` ready below `root` and return one line a split that can be read.

    `sources` are files at hand; without them the published files are downloaded, from `mirror`/<file> when given.
    Files are put in order and read in a temporary folder first: all take their places, or none. Raises UserError when
    something is missing, damaged, or already there without `force`.
    """
    source = SOURCES[name]
    if name == "sprites":
        return [f"wrote {write_sprites(root)}"]
    if source.place is None:
        return [f"{name}: {source.about}"]
    if not sources:
        if source.settle and not force:
            source.settle(root)
        if not force and _is_there(name, root):
            return [f"{name} is there already", *report(name, root)]
        sources = _downloaded(name, source, root, mirror)
    for path in sources:
        if not path.is_file():
            kind = f"a folder: put or link it into {root} instead" if path.is_dir() else "not there"
            raise UserError(f"--from {path} is {kind}")
        refuse_web_page(path)
    with _stage(root) as stage:
        for path in sources:
            source.place(path, stage / "set")
        if source.settle:
            source.settle(stage / "set")
        _check(name, stage / "set", root)
        _settle_into(stage / "set", root, force)
    lines = report(name, root)
    for path in sources:
        if path.parent == root / ".downloads":
            path.unlink()
    return lines


def _check(name: str, stage: Path, root: Path) -> None:
    """Raise UserError when a split of what was put in order, with the files that are in place already, cannot be read;
    what is still to come is no fault.
    """
    folders = [stage, *(path for path in (*stage.glob("*"), *stage.glob("*/*")) if path.is_dir())]
    links = []
    for folder in folders:
        there = root / folder.relative_to(stage)
        for old in there.iterdir() if there.is_dir() else ():
            if not (folder / old.name).exists() and old.name[0] != ".":
                links.append(folder / old.name)
                links[-1].symlink_to(old.resolve())
    try:
        for split in SETS[name][2]:
            with contextlib.suppress(MissingDataError):
                load(name, stage, split)
    finally:
        for link in links:
            link.unlink()


def _downloaded(name: str, source: Source, root: Path, mirror: str | None) -> list[Path]:
    if not source.remotes or (not mirror and not all(remote.urls for remote in source.remotes)):
        files = ", ".join(remote.file for remote in source.remotes) or "its archives"
        raise UserError(
            f"{name} cannot be downloaded without an account: get {files} from {source.by_hand}, then run "
            f"`python -m common.datasets.prepare {name} --from FILE ...`"
        )
    return [fetch(remote, root / ".downloads", mirror) for remote in source.remotes]


def report(name: str, root: Path) -> list[str]:
    """One line a split of `name` that can be read below `root`. Raises UserError when none can."""
    lines, first_error = [], None
    for split in SETS[name][2]:
        try:
            images = load(name, root, split)
        except UserError as error:
            first_error = first_error or error
            continue
        lines.append(f"{name} {split}: {len(images)} images, fingerprint {images.fingerprint()}")
        if hasattr(images, "factor_names"):
            break  # every split is the whole grid
    if not lines and first_error is not None:
        raise first_error
    return lines


def main(argv: Sequence[str] | None = None) -> None:
    """The command line of the module's docstring."""
    table = "\n".join(f"  {name:14} {source.about}" for name, source in SOURCES.items())
    parser = argparse.ArgumentParser(
        prog="python -m common.datasets.prepare",
        description=__doc__,
        epilog=f"data sets:\n{table}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", help="the data set")
    parser.add_argument("--root", help="folder of all data sets; default DATA_ROOT, else data/")
    parser.add_argument(
        "--from", dest="sources", nargs="+", type=Path, default=[], metavar="FILE", help="files at hand"
    )
    parser.add_argument("--mirror", help="download every file from this address instead of the published ones")
    parser.add_argument("--force", action="store_true", help="replace what is there")
    options = parser.parse_args(argv)
    if options.name not in SOURCES:
        raise UserError(
            f"unknown data set {options.name!r}{suggest(options.name, SOURCES)}; known: {', '.join(SOURCES)}"
        )
    if options.sources and options.mirror:
        raise UserError("--from and --mirror exclude each other")
    root = data_root(options.root)
    for line in prepare(options.name, root, options.sources, options.mirror, options.force):
        print(line)


if __name__ == "__main__":
    sys.exit(run_command(main))
