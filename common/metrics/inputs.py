"""Image sets, batch by batch: from folders, arrays, tensors, data sets and generators.

Everything a user can get wrong about his images is refused here, in one line that names the file or the range.
"""

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from common.images import PICTURE_SUFFIXES, list_pictures, picture_head, read_picture, to_uint8
from common.metrics.frechet import read_npz
from common.metrics.resize import resize

_ARRAY_NAMES = ("images", "samples", "x", "arr_0")
_READERS = 8  # threads that decode pictures


class Images:
    """A set of images in memory, taken batch by batch; `Folder` has the same interface.

    `name` for messages, `sizes`: the (height, width) that occur, `channels`: 1 or 3, `formats`: of the files, where
    there are any.
    """

    formats: frozenset[str] = frozenset()

    def __init__(self, images: Tensor, name: str):
        self.name, self._images = name, images
        self.channels, self.sizes = images.shape[1], [tuple(images.shape[2:])]

    def __len__(self) -> int:
        return len(self._images)

    def batches(self, count: int) -> Iterator[Tensor]:
        """uint8 (n, C, H, W) of one size each, at most `count` images at a time, in order."""
        yield from self._images.split(count)

    def rows(self, rows: Sequence[int]) -> Tensor:
        """The images with these indices, uint8 (n, C, H, W)."""
        return self._images[torch.as_tensor(rows)]

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of shape and pixels: changed images are never taken for the old ones."""
        digest = hashlib.sha256(str(tuple(self._images.shape)).encode())
        digest.update(self._images.contiguous().numpy())
        return digest.hexdigest()

    def need_one_size(self) -> None:
        """Raise UserError, naming a file, when the images differ in size."""


class Folder(Images):
    """The pictures of a folder in natural order of their names, decoded when a batch is asked for.

    Memory holds two batches, whatever the folder. Grey pictures become colour where any picture is colour. `size`:
    each picture is resized to size x size and rounded.
    """

    def __init__(self, folder: Path, limit: int | None = None, size: int | None = None, mode: str = "paper"):
        self.name, self._size, self._mode = str(folder), size, mode
        self.files = list_pictures(folder)[:limit]
        if not self.files:
            inside = " (its sub-folders are not searched)" if any(path.is_dir() for path in folder.iterdir()) else ""
            raise UserError(f"{folder}: no image in this folder{inside}; expected files {', '.join(PICTURE_SUFFIXES)}")
        with ThreadPoolExecutor(_READERS) as pool:
            formats, colours, self._sizes = zip(*pool.map(picture_head, self.files), strict=True)
        self.formats = frozenset(formats)
        self.channels = 3 if any(colours) else 1
        self.sizes = sorted(set(self._sizes))

    def __len__(self) -> int:
        return len(self.files)

    def batches(self, count: int) -> Iterator[Tensor]:
        """uint8 (n, C, H, W) of one size each, at most `count` images at a time, in order; the next ones are decoded
        meanwhile.
        """
        places = range(len(self.files))
        shape = (lambda i: None) if self._size is not None else self._sizes.__getitem__
        alike = [list(group) for _, group in groupby(places, key=shape)]
        parts = [group[start : start + count] for group in alike for start in range(0, len(group), count)]
        with ThreadPoolExecutor(_READERS) as pool:
            ahead = [pool.submit(self._read, i) for i in parts[0]]
            for following in [*parts[1:], []]:
                pictures = [picture.result() for picture in ahead]
                ahead = [pool.submit(self._read, i) for i in following]
                yield torch.stack(pictures)

    def rows(self, rows: Sequence[int]) -> Tensor:
        """The images with these indices, uint8 (n, C, H, W), all of one size."""
        self.need_one_size()
        with ThreadPoolExecutor(_READERS) as pool:
            return torch.stack(list(pool.map(self._read, map(int, rows))))

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the files' bytes: changed images are never taken for the old ones."""
        with ThreadPoolExecutor(_READERS) as pool:
            parts = list(pool.map(file_sha256, self.files))
        return hashlib.sha256(repr(("files", self._size, self._mode, parts)).encode()).hexdigest()

    def need_one_size(self) -> None:
        """Raise UserError, naming a file, when the images differ in size."""
        if self._size is not None:
            return
        for path, (height, width) in zip(self.files, self._sizes, strict=True):
            if (height, width) != self._sizes[0]:
                first = "x".join(map(str, self._sizes[0][::-1]))
                raise UserError(
                    f"{path}: {width}x{height} pixels, the first image has {first}; make them one size, or use "
                    "features that resize by themselves, such as lenet"
                )

    def _read(self, index: int) -> Tensor:
        picture = torch.from_numpy(np.require(read_picture(self.files[index]), requirements="W"))
        picture = picture.expand(self.channels, -1, -1) if len(picture) == 1 else picture
        if self._size is not None:
            return _resized(picture[None], self._size, self._mode)[0]
        if picture.shape[1:] != self._sizes[index]:
            raise UserError(f"{self.files[index]}: changed while it was read")
        return picture


def file_sha256(path) -> str:
    """Hexadecimal SHA-256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def open_images(source, limit: int | None = None, size: int | None = None, mode: str = "paper") -> Images:
    """The images of `source`, uint8 with 1 or 3 channels, to be taken batch by batch.

    `source`: a folder of pictures (in natural order of their names), an .npy or .npz file, an array or a tensor
    (N, H, W), (N, C, H, W) or (N, H, W, C), a data set with `.arrays()`, or a generator of such batches.
    Integers must lie in 0..255, floats in [0, 1]. `limit`: the first so many images. `size`: resize to size x size
    (`mode` as in `resize`) and round.
    Raises UserError for an empty, unreadable or non-image source and for values out of range.
    """
    if isinstance(source, Images):
        return source
    if limit is not None and limit < 1:
        raise UserError(f"limit={limit}: at least one image is needed")
    name = str(source) if isinstance(source, (str, Path)) else type(source).__name__
    if isinstance(source, (str, Path)):
        if Path(source).is_dir():
            return Folder(Path(source), limit, size, mode)
        images = _from_file(Path(source), limit)
    elif isinstance(source, (np.ndarray, Tensor)):
        images = as_images(source[:limit] if source.ndim else source)
    elif hasattr(source, "arrays"):
        images = as_images(source.arrays()[0][:limit])
    elif isinstance(source, Iterable):
        images = _from_batches(source, limit)
    else:
        raise UserError(f"cannot take images from a {name}; give a folder, a file, an array or batches")
    if size is not None and images.shape[-2:] != (size, size):
        images = torch.cat([_resized(part, size, mode) for part in images.split(256)])
    return Images(images, name)


def load_images(source, limit: int | None = None, size: int | None = None, mode: str = "paper") -> Tensor:
    """All images of `open_images(...)` in memory, uint8 (N, C, H, W), all of one size."""
    images = open_images(source, limit, size, mode)
    images.need_one_size()
    return torch.cat(list(images.batches(len(images))))


def differences(evaluated: Images, reference: Images) -> list[str]:
    """What makes two sets differ before any content does, a line each: pixels, colour, compression."""
    found = []
    pixels = [{f"{width}x{height}" for height, width in part.sizes} for part in (evaluated, reference)]
    if pixels[0] != pixels[1]:
        shown = [", ".join(sorted(part)[:3]) + (", ..." if len(part) > 3 else "") for part in pixels]
        found.append(f"images of {shown[0]} pixels against {shown[1]}: resizing alone moves the distance")
    if evaluated.channels != reference.channels:
        names = {1: "grey", 3: "colour"}
        found.append(f"{names[evaluated.channels]} images against {names[reference.channels]} ones")
    formats = [part.formats for part in (evaluated, reference)]
    if all(formats) and formats[0] != formats[1]:
        shown = ["/".join(sorted(part)) for part in formats]
        found.append(f"{shown[0]} files against {shown[1]}: compression alone moves the distance")
    return found


def as_images(values: np.ndarray | Tensor, name: str = "images") -> Tensor:
    """An array of images as uint8 (N, C, H, W); see `load_images` for the layouts and ranges that are accepted."""
    array = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if array.ndim == 3:
        array = array[:, None]
    if array.ndim != 4:
        raise UserError(f"{name}: shape {array.shape} is not one of (N, H, W), (N, C, H, W), (N, H, W, C)")
    if len(array) == 0:
        raise UserError(f"{name}: empty, no image in it")
    if array.shape[1] not in (1, 3):
        if array.shape[3] not in (1, 3):
            raise UserError(f"{name}: shape {array.shape} has no axis of 1 or 3 channels")
        array = array.transpose(0, 3, 1, 2)
    return torch.from_numpy(np.require(_levels(array, name), requirements=["C", "W"]))


def _levels(array: np.ndarray, name: str) -> np.ndarray:
    """Grey levels 0..255 as uint8."""
    if array.dtype == np.uint8:
        return array
    if array.dtype == bool or not (np.issubdtype(array.dtype, np.integer) or np.issubdtype(array.dtype, np.floating)):
        raise UserError(f"{name}: values of type {array.dtype}; give uint8, integers in 0..255 or floats in [0, 1]")
    if not np.isfinite(array).all():
        raise UserError(f"{name}: NaN or infinite values")
    low, high = array.min(), array.max()
    if np.issubdtype(array.dtype, np.integer):
        if low < 0 or high > 255:
            raise UserError(f"{name}: integers in [{low}, {high}], expected 0..255")
        return array.astype(np.uint8)
    if low < -1e-4 or high > 1 + 1e-4:
        remedy = "map them by (x + 1) / 2" if low >= -1.001 and high <= 1.001 else "divide by 255, or store uint8"
        raise UserError(f"{name}: floats in [{low:.4g}, {high:.4g}], expected [0, 1]; {remedy}")
    return to_uint8(array)


def _from_file(path: Path, limit: int | None) -> Tensor:
    if not path.exists():
        raise UserError(f"no such folder or file: {path}")
    if path.suffix == ".npz":
        arrays = {key: value for key, value in read_npz(path).items() if value.ndim in (3, 4)}
        named = [key for key in _ARRAY_NAMES if key in arrays]
        if len(arrays) != 1 and not named:
            raise UserError(
                f"{path}: which array holds the images? name it 'images' (found {sorted(arrays) or 'none'})"
            )
        return as_images(arrays[named[0] if named else next(iter(arrays))][:limit], str(path))
    if path.suffix == ".npy":
        from common.datasets import readers  # PyTorch comes with it

        try:
            array = readers.read_npy(path)
        except UserError as error:
            raise UserError(f"{path}: not a readable .npy file ({str(error)[:160]})") from error
        return as_images(array[:limit] if array.ndim else array, str(path))
    raise UserError(f"{path}: neither a folder of images nor an .npy or .npz file")


def _resized(images: Tensor, size: int, mode: str) -> Tensor:
    return resize(images.float(), size, mode).round().to(torch.uint8)


def _from_batches(source: Iterable, limit: int | None) -> Tensor:
    parts, count = [], 0
    for item in source:
        values = item[0] if isinstance(item, (tuple, list)) else item
        if not isinstance(values, (np.ndarray, Tensor)):
            raise UserError(f"batch {len(parts)}: a {type(values).__name__}, expected an array of images")
        parts.append(as_images(values[None] if values.ndim == 3 else values, f"batch {len(parts)}"))
        if parts[-1].shape[1:] != parts[0].shape[1:]:
            raise UserError(
                f"batch {len(parts) - 1}: images {tuple(parts[-1].shape[1:])}, before {tuple(parts[0].shape[1:])}"
            )
        count += len(parts[-1])
        if limit is not None and count >= limit:
            break
    if not count:
        raise UserError("the generator gave no image")
    return torch.cat(parts)[:limit]
