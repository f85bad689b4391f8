"""Image sets behind one call.

    from common.datasets import load, split, subset
    mnist = load("mnist", split="test")            # `names()` lists the sets
    image, target = mnist[0]                       # uint8 (C, H, W), int64 () or (F,)
    images, targets = mnist.arrays()               # uint8 (N, C, H, W), int64 (N,) or (N, F)

Files are looked for below `root`: the argument, else the environment variable DATA_ROOT, else `data/`. A set that is
not there raises UserError with the expected path and the command that prepares it; only fetch=True downloads.

Every set has `name`, `split`, `classes` (names or None), `channels`, `image_size`, `targets`, `len`, `[i]`,
`images_at(rows)` (many images at once), `arrays(max_bytes)` and `fingerprint()`. Pixels are 0..255; binary images
(sprites) are 0 and 255. Targets are class codes (N,), CelebA's 40 attributes in {0, 1}, or factor codes (N, F).

Options by set:

    mnist fashion_mnist svhn cifar10 cifar100   pad (black, before resizing), image_size
    digits                                      the same, seed, test_fraction (0.2)
    celeba folder                               image_size (celeba: 64), crop, channels, cache, threads
    folder                                      labels, class_column, held_out, seed, need_classes (see folder.py)
    tiny_imagenet imagenet32 imagenet64         image_size, cache, threads (image_size: folders of images only)
    sprites                                     sizes (3, 6, 40, 32, 32), image_size (64)
    dsprites shapes3d mpi3d_toy                 sizes, for a file with another grid

`image_size` alone: the shorter edge to that size, then the centre; with `crop`: the centre `crop` x `crop`, resized
(PIL's bilinear with antialias). `cache=True` decodes image files once into an array file below `root`/.cache.

Factor sets (sprites, dsprites, shapes3d, mpi3d_toy) hold every combination of their factors once; they have no splits
of their own, so every split name gives the whole grid, and `split(...)` makes a held-out part. They add `factor_names`,
`factor_sizes`, `factors_of(rows)` and `index_of(factors)`; sprites and
dsprites also `latents_values(rows)` and `latents_classes(rows)`.

Random sets. `transform=` (any set) takes one uint8 (C, H, W) tensor. A set whose items change from read to read is
random: `is_random` is true. A transform counts as random unless it carries `is_random = False`:

    class Flip:                                # random: draws from torch's global generator
        def __call__(self, image): return image.flip(2) if torch.rand(()) < 0.5 else image

    class Invert:                              # not random: may be fetched in batches and kept in memory
        is_random = False
        def __call__(self, image): return 255 - image

A random transform draws from torch's global generator only. `common.batches.Batches` then seeds that generator for each
item from (seed, epoch, row), so an epoch is the same for any number of workers and after a resume; `arrays()` refuses a
random set. A data set written elsewhere takes part by carrying the same attribute.
"""

import os
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from common.datasets import classic, faces, files, folder, grids, imagenet
from common.datasets.base import ArraySet, FactorSet, ImageSet, Subset, split, subset
from common.datasets.sprites import BITS_FILE, Sprites
from common.errors import MissingDataError, UserError, disk_full, suggest

__all__ = ["ArraySet", "FactorSet", "ImageSet", "Subset", "data_root", "load", "names", "split", "subset"]

REPOSITORY_DATA = Path(__file__).resolve().parents[2] / "data"
LABELLED = ("train", "test")
WITH_VALID = ("train", "valid", "test")
ANY = ("train", "valid", "test", "all")  # sets without splits of their own: each name gives the whole set


def _sprites(root: Path, split: str, **options: Any) -> Sprites:
    sprites = Sprites(**options)
    sprites.use_bits(root / "sprites" / BITS_FILE)
    return sprites


def _kept(read: Callable[..., ImageSet]) -> Callable[..., ImageSet]:
    """`read` with an option `cache`: decode image files once into one array file below `root`, and read that."""

    def kept(root: Path, split: str, cache: bool = False, **options: Any) -> ImageSet:
        images = read(root, split, **options)
        return files.cached(images, root / ".cache") if cache and isinstance(images, files.FileSet) else images

    return kept


def _grid(kind: type) -> Callable[..., FactorSet]:
    return lambda root, split, **options: kind(root, **options)


ARRAY = ("pad", "image_size", "transform")
FILES = ("cache", "threads", "transform")
# name: (reader, options, splits)
SETS: dict[str, tuple[Callable[..., ImageSet], tuple[str, ...], tuple[str, ...]]] = {
    "mnist": (partial(classic.load_idx, "mnist"), ARRAY, LABELLED),
    "fashion_mnist": (partial(classic.load_idx, "fashion_mnist"), ARRAY, LABELLED),
    "svhn": (classic.load_svhn, ARRAY, ("train", "test", "extra")),
    "cifar10": (partial(classic.load_cifar, "cifar10"), ARRAY, LABELLED),
    "cifar100": (partial(classic.load_cifar, "cifar100"), ARRAY, LABELLED),
    "digits": (
        lambda root, split, **options: classic.load_digits(split, **options),
        (*ARRAY, "seed", "test_fraction"),
        ("train", "test", "all"),
    ),
    "celeba": (_kept(faces.load_celeba), ("image_size", "crop", "channels", *FILES), (*WITH_VALID, "all")),
    "imagenet32": (_kept(partial(imagenet.load_imagenet, "imagenet32")), ("image_size", *FILES), WITH_VALID),
    "imagenet64": (_kept(partial(imagenet.load_imagenet, "imagenet64")), ("image_size", *FILES), WITH_VALID),
    "tiny_imagenet": (_kept(imagenet.load_tiny_imagenet), ("image_size", *FILES), WITH_VALID),
    "folder": (
        _kept(folder.load_folder),
        ("image_size", "crop", "channels", "labels", "class_column", "held_out", "seed", "need_classes", *FILES),
        ANY,
    ),
    "sprites": (_sprites, ("sizes", "image_size", "transform"), ANY),
    "dsprites": (_grid(grids.DSprites), ("sizes", "transform"), ANY),
    "shapes3d": (_grid(grids.Shapes3D), ("sizes", "transform"), ANY),
    "mpi3d_toy": (_grid(grids.MPI3D), ("sizes", "transform"), ANY),
}


def names() -> list[str]:
    """The sets that `load` knows."""
    return sorted(SETS)


def data_root(root: str | Path | None = None) -> Path:
    """The folder of all data sets: `root`, else the environment variable DATA_ROOT, else `data` in the current folder,
    else `data` in the repository (scripts run from any folder).
    """
    named = root or os.environ.get("DATA_ROOT")
    if named:
        return Path(named).expanduser()
    return Path("data") if Path("data").is_dir() else REPOSITORY_DATA


def load(
    name: str, root: str | Path | None = None, split: str = "train", fetch: bool = False, **options: Any
) -> ImageSet:
    """The image set `name`, split `split` (`val` is read as `valid`), with the options of that set.

    fetch: download a small public set that is absent (`prepare.SMALL`), where there is a network and no OFFLINE=1.

    Raises UserError for an unknown name, split or option (naming the nearest), for absent files (naming the expected
    path and the command that prepares them) and for damaged ones.
    """
    if name not in SETS:
        raise UserError(f"unknown data set {name!r}{suggest(name, SETS)}; known: {', '.join(names())}")
    reader, known, splits = SETS[name]
    split = "valid" if split == "val" else split
    if split not in splits:
        raise UserError(f"{name} has no split {split!r}{suggest(split, splits)}; it has {', '.join(splits)}")
    for option in options:
        if option not in known:
            raise UserError(f"{name} has no option {option!r}{suggest(option, known)}; it has {', '.join(known)}")
    place = data_root(root)
    try:
        try:
            return reader(place, split, **options)
        except MissingDataError:
            from common.datasets.prepare import fetch_small

            if not (fetch and fetch_small(name, place)):
                raise
        return reader(place, split, **options)
    except OSError as error:
        if disk_full(error):  # of a cache that is written
            raise
        raise UserError(f"cannot read {error.filename or name} ({error.strerror}); check its permissions") from error
