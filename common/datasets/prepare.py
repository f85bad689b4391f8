"""Get a data set, or put an archive that you have in its place.

    python -m common.datasets.prepare mnist                                  # download, check, unpack below data/
    python -m common.datasets.prepare cifar10 --from cifar10_jpeg.tar.xz     # unpack an archive of class folders
    python -m common.datasets.prepare celeba --from img_align_celeba.zip list_attr_celeba.txt list_eval_partition.txt
    python -m common.datasets.prepare dsprites --mirror https://my.host/files --root /big/disk

A download goes to a temporary file, resumes where it stopped, is checked against its digest and only then takes its
name. All files are put in order and read in a temporary folder first: all take their places, or none. Nothing that is
already there is overwritten without --force.
"""

if __name__ == "__main__":
    import common.start  # noqa: F401

import contextlib
import fcntl
import os
import re
import shutil
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torchvision.datasets as published
from pydantic import field_validator

from common.checkpoint import atomic_write
from common.datasets import SETS, data_root, grids, load
from common.datasets.archives import is_archive, put, unpack
from common.datasets.download import Remote, fetch, reachable
from common.datasets.imagenet import batch_files
from common.datasets.readers import NpzFile, reading
from common.datasets.sprites import BITS_FILE, Sprites, write_bits
from common.errors import MissingDataError, UserError, refuse_web_page, run_command, suggest
from common.images import PICTURE_SUFFIXES
from common.options import Options, Says, from_flags, option

SMALL = ("mnist", "fashion_mnist", "cifar10", "cifar100", "svhn", "dsprites")  # come by themselves for a training
OPTIONAL = ("extra", "all")  # splits that a prepared set may lack

# ---------------------------------------------------------------- what is made of files in their places


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


def _store_batches(side: int) -> Callable[[Path], None]:
    def settle(root: Path) -> None:
        for path in (path for split in ("train", "valid") for path in batch_files(root, side, split)):
            if path.suffix == ".npz" and NpzFile(path).mapped("data") is None:
                store_npz(path)

    return settle


def _pack_dsprites(root: Path) -> None:
    for path in (root / folder / grids.DSPRITES_FILE for folder in ("dsprites", "")):
        if path.is_file():
            packed = grids.packed_path(path)
            fresh = packed.is_file() and packed.stat().st_mtime >= path.stat().st_mtime
            if not fresh and NpzFile(path).mapped("imgs") is None:
                grids.pack_dsprites(path)
            return


def _unpack_mpi3d(root: Path) -> None:
    try:
        grids.mpi3d_images(root, grids.MPI3D_FACTORS)
    except MissingDataError:
        return
    except UserError:
        for path in (root / folder / "mpi3d_toy.npz" for folder in (*grids.MPI3D_FOLDERS, "")):
            if path.is_file():
                grids.unpack_mpi3d(path)
                return


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
    """Where a data set comes from, and where its files go: the first of `rules` (pattern of a member's whole name,
    place below the root) that fits; a file that fits none is left out. Without rules there is nothing to prepare.
    """

    about: str
    expects: str = ""
    rules: tuple[tuple[str, str], ...] = ()
    remotes: tuple[Remote, ...] = ()
    by_hand: str = ""
    whole: bool = False  # one archive holds all of it
    settle: Callable[[Path], None] | None = None  # does nothing when no file is in place, or all is done

    def place(self, name: str) -> str | None:
        """The place of the member `name` of an archive."""
        if any(part[0] == "." or part == "__MACOSX" for part in name.split("/")):
            return None
        found = ((re.fullmatch(pattern, name), where) for pattern, where in self.rules)
        return next((match.expand(where) for match, where in found if match), None)


PICTURE = rf"[^/]+(?i:{'|'.join(map(re.escape, PICTURE_SUFFIXES))})"
IN = r"(?:.*/)?"  # any folder of the archive
IDX = "(?:train|t10k)-(?:images-idx3|labels-idx1)-ubyte"
CLASS_FOLDERS = rf"(?:.*?/)?((?:train|test)/[^/]+/(?:.*/)?{PICTURE})"
BY_HAND = "https://image-net.org/download-images.php"


def _idx(about: str, folder: str, reader: type) -> Source:
    remotes = [Remote(name, tuple(mirror + name for mirror in reader.mirrors), "md5", md5)
               for name, md5 in reader.resources]  # fmt: skip
    rules = ((rf"{IN}({IDX})(?:\.gz)?", rf"{folder}/raw/\1"),)
    return Source(about, "train-images-idx3-ubyte and its like", rules, tuple(remotes))


def _cifar(name: str, folder: str, batches: str, reader: type) -> Source:
    return Source(
        f"50,000 + 10,000 colour 32x32, {170 if name == 'cifar10' else 169} MB; or an archive of class folders",
        f"{name}'s Python batches or folders train/<class>, test/<class>",
        ((rf"{IN}({batches})", rf"{folder}/\1"), (CLASS_FOLDERS, rf"{name}/\1")),
        (Remote(reader.filename, (reader.url,), "md5", reader.tgz_md5),),
        whole=True,
    )


def _imagenet(side: int) -> Source:
    folder = rf"imagenet{side}/\1"
    return Source(
        f"1,281,167 + 50,000 colour {side}x{side}",
        f"train_data_batch_*, val_data or folders train_{side}x{side}, valid_{side}x{side}",
        (
            (rf"{IN}((?:train_data_batch_\d+|val_data)(?:\.npz)?)", folder),
            (rf"(?:.*?/)?((?:train|valid|val)_{side}x{side}/.+)", folder),
        ),
        by_hand=BY_HAND,
        settle=_store_batches(side),
    )


def _remote(url: str, md5: str) -> tuple[Remote, ...]:
    return (Remote(url.rsplit("/", 1)[1], (url,), "md5", md5),)


SVHN = (published.SVHN.split_list[part] for part in ("train", "test"))
CELEBA = ("img_align_celeba.zip", "list_attr_celeba.txt", "list_eval_partition.txt")
STORAGE = "https://storage.googleapis.com"
SOURCES: dict[str, Source] = {
    "mnist": _idx("60,000 + 10,000 grey 28x28, 12 MB", "MNIST", published.MNIST),
    "fashion_mnist": _idx("60,000 + 10,000 grey 28x28, 31 MB", "FashionMNIST", published.FashionMNIST),
    "svhn": Source(
        "73,257 + 26,032 colour 32x32, 247 MB; the extra split by --from extra_32x32.mat",
        "train_32x32.mat, test_32x32.mat or extra_32x32.mat",
        ((rf"{IN}((?:train|test|extra)_32x32\.mat)", r"SVHN/\1"),),
        tuple(Remote(file, (url,), "md5", md5) for url, file, md5 in SVHN),
    ),
    "cifar10": _cifar(
        "cifar10", "cifar-10-batches-py", r"data_batch_[1-5]|test_batch|batches\.meta", published.CIFAR10
    ),
    "cifar100": _cifar("cifar100", "cifar-100-python", "train|test|meta", published.CIFAR100),
    "celeba": Source(
        "202,599 faces 178x218 with 40 attributes, 1.4 GB",
        "a folder img_align_celeba or the lists list_attr_celeba, list_eval_partition",
        (
            (rf"{IN}img_align_celeba/({PICTURE})", r"celeba/img_align_celeba/\1"),
            (rf"{IN}(list_\w+\.(?:txt|csv))", r"celeba/\1"),
        ),
        tuple(Remote(file, (), "md5", md5) for _, md5, file in published.CelebA.file_list if file in CELEBA),
        "https://mmlab.ie.cuhk.edu.hk/projects/CelebA.html",
    ),
    "tiny_imagenet": Source(
        "100,000 + 10,000 colour 64x64 in 200 classes, 248 MB",
        "folders train and val",
        ((r"(?:.*?/)?((?:train|val|test)/.+|wnids\.txt|words\.txt)", r"tiny-imagenet-200/\1"),),
        _remote("http://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de"),
        whole=True,
    ),
    "imagenet32": _imagenet(32),
    "imagenet64": _imagenet(64),
    "dsprites": Source(
        "737,280 binary 64x64 with 5 factors, 26 MB (404 MB prepared)",
        "an npz file",
        ((r".*\.npz", f"dsprites/{grids.DSPRITES_FILE}"),),
        _remote(
            f"https://github.com/google-deepmind/dsprites-dataset/raw/master/{grids.DSPRITES_FILE}",
            "7da33b31b13a06f4b04a70402ce90c2e",
        ),
        settle=_pack_dsprites,
    ),
    "shapes3d": Source(
        "480,000 colour 64x64 with 6 factors, 268 MB",
        "an h5 file",
        ((r".*\.h5", "3dshapes.h5"),),
        _remote(f"{STORAGE}/3d-shapes/3dshapes.h5", "099a2078d58cec4daad0702c55d06868"),
    ),
    "mpi3d_toy": Source(
        "1,036,800 colour 64x64 with 7 factors (12.7 GB unpacked)",
        "an npz file",
        ((r".*\.npz", "mpi3d_toy/mpi3d_toy.npz"),),
        _remote(f"{STORAGE}/disentanglement_dataset/Final_Dataset/mpi3d_toy.npz", "55889cb7c7dfc655d6e0277beee88868"),
        settle=_unpack_mpi3d,
    ),
    "sprites": Source("737,280 binary 64x64 with 5 factors, rendered; a 377 MB file makes reading faster"),
    "digits": Source("1,797 grey 8x8, comes with scikit-learn: nothing to prepare"),
    "folder": Source("any folder of images: nothing to prepare, give the folder as root"),
}

# ---------------------------------------------------------------- all of it, or nothing


def prepare(
    name: str, root: Path, sources: Sequence[Path] = (), mirror: str | None = None, force: bool = False
) -> list[str]:
    """Make data set `name` ready below `root` and return one line a split.

    `sources` are files at hand; without them the published files are downloaded, from `mirror`/<file> when given.
    Raises UserError when a file is missing, damaged, or already there without `force`, and when no split is complete.
    """
    source = SOURCES[name]
    if name == "sprites":
        return [f"wrote {write_sprites(root)}"]
    if not source.rules:
        return [f"{name}: {source.about}"]
    downloads = not sources
    if downloads:
        if not force:
            try:
                if source.settle:
                    source.settle(root)
                lines, missing = report(name, root)
            except UserError as error:
                raise UserError(f"{error}; --force replaces it") from error
            if not missing:
                return [f"{name} is there already", *lines]
        sources = _downloaded(name, source, root, mirror)
    for path in sources:
        if not os.path.isfile(path):
            kind = f"a folder: put or link it into {root} instead" if os.path.isdir(path) else "not there"
            raise UserError(f"--from {path} is {kind}")
        refuse_web_page(path)
    with _stage(root) as stage:
        for path in sources:
            take = unpack if source.place(path.name) is None and is_archive(path) else put
            if not take(path, stage, source.place):
                raise UserError(f"{path} does not hold {source.expects}")
        if source.settle:
            source.settle(stage)
        units = [path.relative_to(stage) for path in _units(stage)]
        try:
            lines, missing = _read_together(name, stage, root)
        except UserError as error:
            raise UserError(str(error).replace(f"{stage}/", "the new ")) from error
        still = [str(error).replace(str(stage), str(root)) for error in missing]
        if missing and source.whole:
            raise UserError(f"{', '.join(map(str, sources))} is not complete: {still[0]}")
        _move_in(units, stage, root, force)
    if downloads:
        for path in sources:
            path.unlink()
    if not lines:
        raise UserError(f"{', '.join(map(str, units))} is in place; still missing: {still[0]}")
    return [*lines, *(f"still missing: {line}" for line in still)]


def fetch_small(name: str, root: Path) -> bool:
    """Download a small public set that is absent, and say so; False where it is none of them, OFFLINE is set, or its
    server cannot be reached. Of several processes one downloads, the others wait for it.
    """
    if name not in SMALL or os.environ.get("OFFLINE", "0") not in ("", "0"):
        return False
    source = SOURCES[name]
    if not any(reachable(url) for url in source.remotes[0].urls):
        return False
    folder = root / ".downloads"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT)
    except OSError as error:
        raise UserError(f"cannot write into {root} ({error.strerror}): give another folder") from error
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        print(f"{name} is not in {root}: getting it from {source.remotes[0].urls[-1].split('/')[2]} ({source.about}; "
              "its digest is checked, OFFLINE=1 prevents this)", file=sys.stderr, flush=True)  # fmt: skip
        prepare(name, root)
    finally:
        os.close(lock)
    return True


def report(name: str, root: Path) -> tuple[list[str], list[MissingDataError]]:
    """A line for each split of `name` that can be read below `root`, and what is missing of the others."""
    lines: list[str] = []
    missing: list[MissingDataError] = []
    for split in SETS[name][2]:
        try:
            images = load(name, root, split)
        except MissingDataError as error:
            if split not in OPTIONAL:
                missing.append(error)
            continue
        lines.append(f"{name} {split}: {len(images)} images, fingerprint {images.fingerprint()}")
        if hasattr(images, "factor_names"):
            break  # every split is the whole grid
    return lines, missing


def _downloaded(name: str, source: Source, root: Path, mirror: str | None) -> list[Path]:
    if not source.remotes or (not mirror and not all(remote.urls for remote in source.remotes)):
        files = ", ".join(remote.file for remote in source.remotes) or "its archives"
        raise UserError(
            f"{name} cannot be downloaded without an account: get {files} from {source.by_hand}, then run "
            f"`python -m common.datasets.prepare {name} --from FILE ...`"
        )
    return [fetch(remote, root / ".downloads", mirror) for remote in source.remotes]


@contextlib.contextmanager
def _stage(root: Path) -> Iterator[Path]:
    """A temporary folder on the disk of `root`."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        made = tempfile.TemporaryDirectory(prefix=".preparing-", dir=root)
    except OSError as error:
        raise UserError(f"cannot write into {root} ({error.strerror}): give another --root") from error
    with made as name:
        yield Path(name)


def _units(stage: Path) -> list[Path]:
    """What moves as a whole: files, and folders of pictures two levels down; of MNIST's `raw` each file."""
    inner = [path for path in stage.glob("*/*") if path.name != "raw"]
    return sorted([*(path for path in stage.glob("*") if path.is_file()), *inner, *stage.glob("*/raw/*")])


def _read_together(name: str, stage: Path, root: Path) -> tuple[list[str], list[MissingDataError]]:
    """`report` of the files in `stage` beside those that are in place already."""
    links = []
    for folder in {stage, *(path.parent for path in _units(stage))}:
        there = root / folder.relative_to(stage)
        for old in sorted(there.iterdir()) if there.is_dir() else ():
            if not (folder / old.name).exists() and old.name[0] != ".":
                links.append(folder / old.name)
                links[-1].symlink_to(old.resolve())
    try:
        return report(name, stage)
    finally:
        for link in links:
            link.unlink()


def _move_in(units: Sequence[Path], stage: Path, root: Path, force: bool) -> None:
    """Move all `units` from `stage` to `root`, or none: what gives way to `force` comes back when a move fails."""
    for unit in units:
        if os.path.lexists(root / unit) and not force:
            raise UserError(f"{root / unit} is there already: give --force to replace it")
    done: list[tuple[Path, Path]] = []  # (from, to)
    try:
        for unit in units:
            target, old = root / unit, stage / ".old" / unit
            if os.path.lexists(target):
                old.parent.mkdir(parents=True, exist_ok=True)
                shutil.move(target, old)
                done.append((target, old))
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.move(stage / unit, target)
            done.append((stage / unit, target))
    except BaseException as error:
        for source, target in reversed(done):
            shutil.move(target, source)
        if isinstance(error, OSError):
            raise UserError(f"cannot put {target} in place: {error.strerror or error}") from error
        raise


class Config(Options):
    """The options of this command."""

    name: str = option(..., "the data set", min_length=1)
    root: str | None = option(None, "folder of all data sets (default: DATA_ROOT, else data/)")
    sources: Annotated[list[Path], Says("one or more files")] = option([], "files at hand", flags=("--from",))
    mirror: str | None = option(None, "address to download every file from, instead of the published ones")
    force: bool = option(False, "replace what is there")

    @field_validator("sources", mode="before")
    @classmethod
    def _as_named(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value  # one name, commas and all


def main(argv: Sequence[str] | None = None) -> None:
    """The command line of the module's docstring."""
    table = "\n".join(f"  {name:14} {source.about}" for name, source in SOURCES.items())
    about = f"{__doc__}\ndata sets:\n{table}"
    o, given = from_flags(Config, sys.argv[1:] if argv is None else argv, about, positional=("name",))
    if o.name not in SOURCES:
        raise UserError(f"unknown data set {o.name!r}{suggest(o.name, SOURCES)}; known: {', '.join(SOURCES)}")
    if "sources" in given and not o.sources:
        raise UserError("--from: name the files that you have")
    if o.sources and o.mirror:
        raise UserError("--from and --mirror exclude each other")
    for line in prepare(o.name, data_root(o.root), o.sources, o.mirror, o.force):
        print(line)


if __name__ == "__main__":
    sys.exit(run_command(main))
