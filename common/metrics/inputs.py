"""Image sets as one uint8 tensor (N, C, H, W): from folders, arrays, tensors, data sets and generators.

Everything a user can get wrong about his images is refused here, in one line that names the file or the range.
"""

import re
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.errors import UserError
from common.images import to_uint8
from common.metrics.frechet import read_npz
from common.metrics.resize import resize

SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff")
_ARRAY_NAMES = ("images", "samples", "x", "arr_0")


def load_images(source, limit: int | None = None, size: int | None = None, mode: str = "paper") -> Tensor:
    """Images of `source` as uint8 (N, C, H, W), C = 1 or 3, on the CPU.

    `source`: a folder of pictures (in natural order of their names), an .npy or .npz file, an array or a tensor
    (N, H, W), (N, C, H, W) or (N, H, W, C), a data set with `.arrays()`, or a generator of such batches.
    Integers must lie in 0..255, floats in [0, 1]. `limit`: the first so many images. `size`: resize to size x size
    (`mode` as in `resize`); without it all images must have one size.
    Raises UserError for an empty, unreadable or non-image source and for values out of range.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit={limit}: at least one image is needed")
    if isinstance(source, (str, Path)):
        images = _from_path(Path(source), limit, size, mode)
    elif isinstance(source, (np.ndarray, Tensor)):
        images = as_images(source[:limit])
    elif hasattr(source, "arrays"):
        images = as_images(source.arrays()[0][:limit])
    elif isinstance(source, Iterable):
        images = _from_batches(source, limit)
    else:
        raise UserError(
            f"cannot take images from a {type(source).__name__}; give a folder, a file, an array or batches"
        )
    if size is not None and images.shape[-2:] != (size, size):
        images = torch.cat([_resized(part, size, mode) for part in images.split(256)])
    return images


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


def _from_path(path: Path, limit: int | None, size: int | None, mode: str) -> Tensor:
    if path.is_dir():
        return _from_folder(path, limit, size, mode)
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


def _from_folder(folder: Path, limit: int | None, size: int | None, mode: str) -> Tensor:
    files = sorted(
        (path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES and not path.name.startswith(".")),
        key=lambda path: [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)],
    )[:limit]
    if not files:
        inside = " (its sub-folders are not searched)" if any(path.is_dir() for path in folder.iterdir()) else ""
        raise UserError(f"{folder}: no image in this folder{inside}; expected files {', '.join(SUFFIXES)}")
    with ThreadPoolExecutor(8) as pool:
        pictures = list(pool.map(_read_picture, files))
    colour = any(picture.ndim == 3 for picture in pictures)
    if colour:
        pictures = [p if p.ndim == 3 else np.repeat(p[:, :, None], 3, 2) for p in pictures]
    if size is not None:
        pictures = [_resized_picture(picture, size, mode) for picture in pictures]
    for path, picture in zip(files, pictures, strict=True):
        if picture.shape[:2] != pictures[0].shape[:2]:
            sizes = ["x".join(map(str, part.shape[1::-1])) for part in (pictures[0], picture)]
            raise UserError(f"{path}: {sizes[1]} pixels, the first image has {sizes[0]}; give a size to resize to")
    return as_images(np.stack(pictures), str(folder))


def _read_picture(path: Path) -> np.ndarray:
    """(H, W) or (H, W, 3) uint8."""
    from common.datasets import readers

    try:
        with Image.open(path) as picture:
            if picture.mode.startswith(("I", "F")):
                raise UserError(f"{path}: more than 8 bits a pixel (mode {picture.mode}); convert it to 8 bits")
            grey = picture.mode in ("L", "1", "LA")
            return np.asarray(picture.convert("L" if grey else "RGB"))
    except readers.DAMAGE as error:
        raise UserError(f"{path}: not a readable image ({str(error)[:100]})") from error


def _resized_picture(picture: np.ndarray, size: int, mode: str) -> np.ndarray:
    return _resized(as_images(picture[None]), size, mode)[0].permute(1, 2, 0).squeeze(2).numpy()


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
