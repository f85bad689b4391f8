"""Image sets behind one call.

    from common.datasets import load, split, subset
    mnist = load("mnist", split="test")            # `names()` lists the sets
    image, target = mnist[0]                       # uint8 (C, H, W), int64 () or (F,)
    images, targets = mnist.arrays()               # uint8 (N, C, H, W), int64 (N,) or (N, F)

Files are looked for below `root`: the argument, else the environment variable DATA_ROOT, else `data/`. A set that is
not there raises UserError with the expected path and the command that prepares it; `load` never downloads.
"""

import inspect
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from common.datasets import classic
from common.datasets.base import ArraySet, FactorSet, ImageSet, Subset, split, subset
from common.datasets.sprites import Sprites
from common.errors import UserError, suggest

__all__ = ["ArraySet", "FactorSet", "ImageSet", "Subset", "data_root", "load", "names", "split", "subset"]

LABELLED = ("train", "test")
WITH_VALID = ("train", "valid", "test")
ANY = ("train", "valid", "test", "all")  # sets without splits of their own: each name gives the whole set


def _sprites(root: Path, split: str, **options: Any) -> Sprites:
    return Sprites(**options)


def _digits(root: Path, split: str, **options: Any) -> ArraySet:
    return classic.load_digits(split, **options)


def _idx(name: str) -> Callable[..., ArraySet]:
    return lambda root, split, **options: classic.load_idx(name, root, split, **options)


def _cifar(name: str) -> Callable[..., ArraySet]:
    return lambda root, split, **options: classic.load_cifar(name, root, split, **options)


# name: (reader, the function whose keywords are its options, splits)
SETS: dict[str, tuple[Callable[..., ImageSet], Callable[..., Any], tuple[str, ...]]] = {
    "mnist": (_idx("mnist"), classic.load_idx, LABELLED),
    "fashion_mnist": (_idx("fashion_mnist"), classic.load_idx, LABELLED),
    "svhn": (classic.load_svhn, classic.load_svhn, ("train", "test", "extra")),
    "cifar10": (_cifar("cifar10"), classic.load_cifar, LABELLED),
    "cifar100": (_cifar("cifar100"), classic.load_cifar, LABELLED),
    "digits": (_digits, classic.load_digits, ("train", "test", "all")),
    "sprites": (_sprites, Sprites, ANY),
}


def names() -> list[str]:
    """The sets that `load` knows."""
    return sorted(SETS)


def data_root(root: str | Path | None = None) -> Path:
    """The folder of all data sets: `root`, else the environment variable DATA_ROOT, else `data`."""
    return Path(root or os.environ.get("DATA_ROOT") or "data").expanduser()


def load(name: str, root: str | Path | None = None, split: str = "train", **options: Any) -> ImageSet:
    """The image set `name`, split `split` (`val` is read as `valid`), with the options of that set.

    Raises UserError for an unknown name, split or option (naming the nearest), for absent files (naming the expected
    path and the command that prepares them) and for damaged ones.
    """
    if name not in SETS:
        raise UserError(f"unknown data set {name!r}{suggest(name, SETS)}; known: {', '.join(names())}")
    reader, described, splits = SETS[name]
    split = "valid" if split == "val" else split
    if split not in splits:
        raise UserError(f"{name} has no split {split!r}{suggest(split, splits)}; it has {', '.join(splits)}")
    known = [
        p for p in inspect.signature(described).parameters if p not in ("name", "root", "split", "paths", "folder")
    ]
    for option in options:
        if option not in known:
            raise UserError(f"{name} has no option {option!r}{suggest(option, known)}; it has {', '.join(known)}")
    return reader(data_root(root), split, **options)
