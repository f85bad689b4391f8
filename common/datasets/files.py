"""Images that stay on disk until asked for: folders, CelebA, Tiny ImageNet, downsampled ImageNet."""

import contextlib
import hashlib
import json
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.checkpoint import atomic_write
from common.datasets.base import ArraySet, ImageSet
from common.datasets.readers import map_npy
from common.errors import MissingDataError, UserError
from common.images import MAX_PIXELS, PICTURE_SUFFIXES, list_pictures, natural_sorted, open_picture

MAX_SIDE = 8192  # of an image that is asked for


def absent(name: str, expected: Path, also: str = "") -> MissingDataError:
    """The one line for a data set that is not there."""
    also = f" {also}" if also else ""
    return MissingDataError(
        f"{name} is not there: expected {expected}{also}; "
        f"prepare it by `python -m common.datasets.prepare {name}`, or point DATA_ROOT at it"
    )


def first_present(paths: Sequence[Path]) -> Path | None:
    """The first of `paths` that exists."""
    return next((path for path in paths if path.exists()), None)


def fit(image: Image.Image, image_size: int | None, crop: int | None = None) -> np.ndarray:
    """A PIL image as uint8 (C, S, S), PIL's bilinear with antialias.

    Without `crop`: shorter edge to `image_size`, then its centre. With `crop`: the centre `crop` x `crop`, resized to
    `image_size`. Without either: as it is.
    """
    from torchvision.transforms import functional as TF  # here: it takes seconds to import

    if crop:
        image = TF.center_crop(image, [crop, crop])
    if image_size and image.size != (image_size, image_size):
        image = TF.resize(image, image_size, TF.InterpolationMode.BILINEAR, antialias=True)
        image = TF.center_crop(image, [image_size, image_size])
    pixels = np.asarray(image)
    return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)


class FileSet(ImageSet):
    """Image files decoded when asked for, by a few threads: `paths` in order, uint8 (C, S, S) through `fit`.

    `image_size=None` keeps the files' own size, which must then be one. Batches of many images are decoded by `threads`
    threads (default: the cores, at most 8).
    """

    def __init__(
        self, name: str, split: str, paths: Sequence[Path], targets: Tensor, classes: Sequence[str] | None = None,
        image_size: int | None = None, crop: int | None = None, channels: int = 3, threads: int | None = None,
        transform: Callable[[Tensor], Tensor] | None = None,
    ):  # fmt: skip
        if channels not in (1, 3):
            raise UserError(f"{name}: channels must be 1 or 3, got {channels}")
        if any(size is not None and not 1 <= size <= MAX_SIDE for size in (image_size, crop)):
            raise UserError(f"{name}: image_size and crop must lie in 1..{MAX_SIDE}, got {image_size} and {crop}")
        self.paths, self._fit, self._channels = paths, (image_size, crop), channels
        self._threads = threads or min(8, os.cpu_count() or 1)
        self._shape = self._decoded(paths[0]).shape
        options = {"image_size": image_size, "crop": crop, "channels": channels}
        super().__init__(name, split, targets, self._shape, classes, options, transform)

    def _decoded(self, path: Path) -> np.ndarray:
        picture, (side, crop) = open_picture(path, self._channels), self._fit
        if side and not crop and side * side * max(picture.size) > MAX_PIXELS * min(picture.size):
            raise UserError(
                f"{path} is {picture.width}x{picture.height}, too long to be resized to {side}; take it out"
            )
        return fit(picture, side, crop)

    def _read(self, row: int) -> np.ndarray:
        pixels = self._decoded(self.paths[row])
        if pixels.shape != self._shape:
            raise UserError(
                f"{self.paths[row]} is {pixels.shape[2]}x{pixels.shape[1]}, the first image "
                f"{self._shape[2]}x{self._shape[1]}: give image_size= to bring them to one size"
            )
        return pixels

    def _fetch(self, rows: np.ndarray) -> Tensor:
        images = np.empty((len(rows), *self._shape), np.uint8)
        with ThreadPoolExecutor(self._threads) as pool:  # threads start with work alone
            apply = pool.map if len(rows) >= 16 and self._threads > 1 else map
            for i, pixels in enumerate(apply(self._read, rows)):
                images[i] = pixels
        return torch.from_numpy(images)


def tree(folder: Path, above: tuple[Path, ...] = ()) -> list[Path]:
    """The image files in `folder` and below, folder by folder, in natural order; a link in a circle ends there."""
    real = folder.resolve()
    if real in above:
        return []
    return [*list_pictures(folder), *(path for sub in subfolders(folder) for path in tree(sub, (*above, real)))]


def subfolders(folder: Path) -> list[Path]:
    """The folders directly in `folder` (not hidden), in natural order."""
    return natural_sorted(path for path in folder.iterdir() if path.is_dir() and path.name[0] != ".")


def class_names(folder: Path) -> list[str]:
    """The sub-folders of `folder` that have an image in or below them, in natural order."""

    def files(sub: Path) -> Iterator[str]:
        for _, _, names in os.walk(sub, followlinks=True):
            yield from names

    return [sub.name for sub in subfolders(folder) if any(n.lower().endswith(PICTURE_SUFFIXES) for n in files(sub))]


def folder_items(folder: Path, train: Path | None = None) -> tuple[list[Path], np.ndarray, list[str] | None]:
    """(files, class codes (N,), class names or None) of a folder; classes are its first-level sub-folders.

    Files directly in the folder have no classes, and code 0. `train`, the folder of the training images, gives the
    classes where it is another. Files are in natural order. Raises UserError for a folder without images, and for a
    class that `train` lacks.
    """
    if not folder.is_dir():
        raise UserError(f"no folder of images at {folder}")
    loose = list_pictures(folder)
    groups = {sub.name: paths for sub in subfolders(folder) if (paths := tree(sub))}
    if loose and groups:
        raise UserError(f"{folder} has images beside sub-folders with images ({next(iter(groups))}): keep one kind")
    if not loose and not groups:
        raise UserError(f"{folder} holds no images ({', '.join(PICTURE_SUFFIXES)})")
    classes = list(groups)
    if train is not None and train.is_dir() and train.resolve() != folder.resolve():
        classes = class_names(train)
        odd = next((key for key in groups if key not in classes), "images without a class" if loose else None)
        if odd is not None and (classes or groups):
            raise UserError(f"{folder} has {odd}, which {train} has not: the classes of both must be the same")
    counts = [len(paths) for paths in groups.values()] or [len(loose)]
    codes = [classes.index(key) for key in groups] or [0]
    paths = loose or [path for paths in groups.values() for path in paths]
    return paths, np.repeat(codes, counts).astype(np.int64), classes or None


class FolderSet(FileSet):
    """A folder of images as `folder_items` finds them."""

    def __init__(self, name: str, folder: Path, split: str, train: Path | None = None, **options: Any):
        paths, targets, classes = folder_items(folder, train)
        super().__init__(name, split, paths, torch.from_numpy(targets), classes, **options)


def cached(source: FileSet, folder: Path) -> ArraySet:
    """`source` decoded once into an npy file in `folder`, memory-mapped from then on.

    The file's name holds a digest of the options and of every file's path, size and time, so a changed folder is
    decoded anew, as is a damaged cache. Images are stored without the transform, which stays with the returned set.
    """
    digest = hashlib.sha256(json.dumps([source.name, source.split, source.options], sort_keys=True).encode())
    for path in source.paths:
        try:
            facts = path.stat()
        except OSError as error:
            raise UserError(f"cannot read {path} ({error.strerror}); get it again") from error
        digest.update(os.fsencode(path) + f"\0{facts.st_size}\0{facts.st_mtime_ns}\n".encode())
    target = folder / f"{source.name}-{source.split}-{digest.hexdigest()[:16]}.npy"
    shape = (len(source), source.channels, source.height, source.width)
    images = None
    if target.is_file():
        with contextlib.suppress(UserError):
            images = map_npy(target)
    if images is None or images.shape != shape:
        with atomic_write(target) as file:
            np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
            for start in range(0, len(source), 1024):
                file.write(source._fetch(np.arange(start, min(start + 1024, len(source)))).numpy().tobytes())
        images = map_npy(target)
    facts = {"classes": source.classes, "options": source.options, "transform": source.transform}
    return ArraySet(source.name, source.split, images, source.targets, **facts)
