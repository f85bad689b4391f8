"""Pictures: one reader, one order of names, one rounding rule, mosaics, PNG/JPEG/GIF writers.

Nothing here changes the caller's tensors.
"""

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

import imageio.v3 as iio
import numpy as np
import torch
from natsort import natsorted
from PIL import Image, ImageOps
from torch import Tensor

from common.checkpoint import atomic_write
from common.errors import UserError, refuse_web_page

PICTURE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
MAX_PIXELS = 1 << 26  # of one picture; a small file may claim any size
PIXELS_A_BYTE = 1000  # of a file above 16 kB; a picture that shows something takes more room
ORIENTATION = 0x0112  # the EXIF tag
TURNED = (5, 6, 7, 8)  # its values that exchange width and height

P = TypeVar("P", str, Path)


def natural_sorted(names: Iterable[P]) -> list[P]:
    """`names` with 9.png before 10.png, whatever letters and digits they are made of, and however they came."""
    return natsorted(sorted(names, key=str), key=str)


def list_pictures(folder: str | Path) -> list[Path]:
    """The picture files directly in `folder` (not hidden), in natural order.

    Raises UserError when it is no folder, or cannot be read.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder} is no folder of images")
    try:
        with os.scandir(folder) as entries:  # folders of 200,000 faces: no question to the disk for each name
            names = [
                e.name for e in entries
                if e.name.lower().endswith(PICTURE_SUFFIXES) and e.name[0] != "." and e.is_file()
            ]  # fmt: skip
    except OSError as error:
        raise UserError(f"cannot read {folder} ({error.strerror}); check its permissions") from error
    return [folder / name for name in natural_sorted(names)]


def open_picture(path: str | Path, channels: int | None = None) -> Image.Image:
    """A picture file as a PIL image of mode L (grey) or RGB, turned as its EXIF data say, transparency over white.

    `channels` 1 or 3 asks for one of the modes, else a grey file is L. The first frame of several. Raises UserError
    naming a file that is missing, damaged, no picture, or too large.
    """
    path = Path(path)
    try:
        with Image.open(path) as image:
            if image.width * image.height > min(MAX_PIXELS, PIXELS_A_BYTE * max(path.stat().st_size, 1 << 14)):
                raise ValueError(f"it claims {image.width} x {image.height} pixels")
            if image.mode.startswith("I") or image.mode == "F":
                raise ValueError(f"pixels of type {image.mode} are not read: convert it to 8 bits")
            grey = image.mode in ("1", "L", "LA") if channels is None else channels == 1
            image.load()
            if image.getexif().get(ORIENTATION, 1) != 1:
                image = ImageOps.exif_transpose(image)
            if "A" in image.getbands() or "transparency" in image.info:
                image = image.convert("RGBA")
                image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
            mode = "L" if grey else "RGB"
            return image if image.mode == mode else image.convert(mode)
    except Exception as error:  # PIL raises many types on damaged files: SyntaxError, EOFError, struct.error ...
        refuse_web_page(path)
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise UserError(f"cannot read {path} as an image ({reason}); repair it or take it out") from error


def picture_head(path: str | Path) -> tuple[str, bool, tuple[int, int]]:
    """Format, whether it is in colour, (height, width) as it is shown; without decoding the picture.

    Raises UserError as `open_picture` does.
    """
    try:
        with Image.open(path) as picture:
            width, height = picture.size
            if width * height > MAX_PIXELS:
                raise ValueError(f"{width} x {height} pixels")
            turned = picture.getexif().get(ORIENTATION) in TURNED
            return picture.format, picture.mode not in ("1", "L", "LA"), (width, height) if turned else (height, width)
    except Exception:
        open_picture(path)  # says what is wrong with it
        raise


def read_picture(path: str | Path) -> np.ndarray:
    """A picture file as uint8 (1 or 3, H, W); see `open_picture`."""
    pixels = np.asarray(open_picture(path))
    return pixels[None] if pixels.ndim == 2 else np.ascontiguousarray(pixels.transpose(2, 0, 1))


def to_uint8(x: Tensor | np.ndarray) -> np.ndarray:
    """Grey levels floor(clip(255 x + 0.5, 0, 255)) of floats in [0, 1], any shape; uint8 passes through. The input is
    not changed.
    """
    array = x.detach().cpu().numpy() if isinstance(x, Tensor) else np.asarray(x)
    if array.dtype == np.uint8:
        return array.copy()
    if not np.issubdtype(array.dtype, np.floating):
        raise TypeError(f"expected floats in [0, 1] or uint8, got {array.dtype}")
    return np.floor(np.clip(array * array.dtype.type(255) + array.dtype.type(0.5), 0, 255)).astype(np.uint8)


def grid(images: Tensor, columns: int, padding: int = 2, stretch: bool = False) -> Tensor:
    """(N, C, H, W) floats side by side, `columns` a row, `padding` black pixels around each: (3 or C, rows, width).

    `stretch` scales each image to its own minimum and maximum (contrast is exaggerated; a constant image becomes
    black).
    Grey images become three equal channels, as torchvision's make_grid does.
    """
    if images.ndim != 4 or len(images) == 0:
        raise ValueError(f"expected at least one image as (N, C, H, W), got {tuple(images.shape)}")
    if columns < 1:
        raise ValueError(f"expected at least one column, got {columns}")
    x = images.detach()
    if not x.is_floating_point():
        x = x.float() / 255
    from torchvision.utils import make_grid

    return make_grid(x, nrow=columns, padding=padding, normalize=stretch, scale_each=stretch)


def mosaic(images: Tensor | np.ndarray, columns: int, padding: int = 2, stretch: bool = False) -> np.ndarray:
    """(N, C, H, W) floats in [0, 1] or uint8 -> one (rows, width, 3) uint8 picture; see `grid`."""
    x = images if isinstance(images, Tensor) else torch.from_numpy(np.ascontiguousarray(images))
    return to_uint8(grid(x.cpu(), columns, padding, stretch)).transpose(1, 2, 0)


def save_image(path: str | Path, picture: np.ndarray, quality: int = 75) -> None:
    """Write (H, W), (H, W, 1) or (H, W, 3) uint8 as the suffix says (.png or .jpg; `quality` is JPEG's), atomically."""
    path = Path(path)
    array = np.asarray(picture)
    if array.dtype != np.uint8 or array.ndim not in (2, 3) or (array.ndim == 3 and array.shape[2] not in (1, 3)):
        raise ValueError(f"expected a uint8 picture (H, W[, 1 or 3]), got {array.dtype} {array.shape}")
    if array.ndim == 3 and array.shape[2] == 1:
        array = array[:, :, 0]
    formats = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG"}
    if path.suffix.lower() not in formats:
        raise UserError(f"{path}: pictures are written as .png or .jpg")
    options = {"quality": quality} if formats[path.suffix.lower()] == "JPEG" else {}
    with atomic_write(path) as file:
        Image.fromarray(array).save(file, format=formats[path.suffix.lower()], **options)


def save_images(folder: str | Path, images: Tensor | np.ndarray, start: int = 0, fmt: str = "png") -> None:
    """Write each of (N, C, H, W) as `<folder>/<start + i>.<fmt>`; grey images are stored with one channel."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    for i, picture in enumerate(to_uint8(images).transpose(0, 2, 3, 1)):
        # thousands of small files: written plainly, since a fsync each would take minutes
        Image.fromarray(picture[:, :, 0] if picture.shape[2] == 1 else picture).save(folder / f"{start + i}.{fmt}")


def save_gif(path: str | Path, frames: Sequence[np.ndarray] | np.ndarray, fps: float = 8) -> None:
    """An endless GIF of (H, W[, 1 or 3]) uint8 frames at `fps` frames a second, written atomically."""
    pictures = [np.asarray(frame) for frame in frames]
    if not pictures or any(frame.dtype != np.uint8 or frame.shape != pictures[0].shape for frame in pictures):
        raise ValueError("expected at least one uint8 frame, all of one shape")
    if pictures[0].ndim == 3 and pictures[0].shape[2] == 1:
        pictures = [frame[:, :, 0] for frame in pictures]
    data = iio.imwrite("<bytes>", np.stack(pictures), extension=".gif", duration=1000 / fps, loop=0)
    with atomic_write(path) as file:
        file.write(data)
