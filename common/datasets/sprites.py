"""Sprites with dSprites' five factors, rendered from closed forms: shape, scale, orientation, posX, posY.

The default grid (3, 6, 40, 32, 32) has dSprites' 737,280 images, order and latent values (Matthey et al., dSprites,
2017); the shapes are drawn here, so the pixels are not those of the published file.
"""

import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.checkpoint import atomic_write
from common.datasets.base import FactorSet
from common.datasets.readers import map_npy
from common.errors import UserError

SHAPES = ("square", "ellipse", "heart")
FACTORS = {"shape": 3, "scale": 6, "orientation": 40, "posX": 32, "posY": 32}
UNIT = 0.16  # radius of a sprite of scale 1, in image sides
SQUARE_HALF_SIDE, ELLIPSE_RATIO, HEART_STRETCH, HEART_LEVEL = 0.85, 0.55, 1.15, 0.7
REACH = (SQUARE_HALF_SIDE * math.sqrt(2), 1.0, 1.07)  # the farthest point of each shape from its centre, in radii
BITS_FILE = "sprites_bits.npy"
CHUNK = 64  # images rendered at a time: their temporaries stay in the cache


def factor_values(sizes: Sequence[int]) -> list[np.ndarray]:
    """The latent values of each factor: shape 1.., scale 0.5..1, orientation 0..2 pi (both ends), posX and posY 0..1.

    A factor of size 1 takes scale 1, orientation 0, position 0.5.
    """
    shapes, scales, turns, columns, rows = sizes

    def spaced(low: float, high: float, n: int, alone: float) -> np.ndarray:
        return np.linspace(low, high, n) if n > 1 else np.array([alone])

    return [
        np.arange(1.0, shapes + 1),
        spaced(0.5, 1, scales, 1.0),
        spaced(0, 2 * np.pi, turns, 0.0),
        spaced(0, 1, columns, 0.5),
        spaced(0, 1, rows, 0.5),
    ]


def _inside(shape: int, a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Which points (a, b), in radii from the centre and in the sprite's own axes (b downwards), belong to the shape.

    Overwrites `a` and `b`.
    """
    if shape == 0:
        np.abs(a, out=a)
        np.abs(b, out=b)
        return np.maximum(a, b, out=a) < np.float32(SQUARE_HALF_SIDE)
    if shape == 1:
        b *= np.float32(1 / ELLIPSE_RATIO)
        a *= a
        b *= b
        a += b
        return a < 1
    # heart: (p^2 + q^2 - level)^3 < p^2 q^3 with p = stretch a, q = -stretch b (q upwards)
    a *= np.float32(HEART_STRETCH)
    b *= np.float32(-HEART_STRETCH)
    a *= a
    q2 = b * b
    level = a + q2
    level -= np.float32(HEART_LEVEL)
    a *= q2
    a *= b
    cube = np.multiply(level, level, out=q2)
    cube *= level
    return cube < a


def _render_shape(shape: int, scale: np.ndarray, turn: np.ndarray, centre: np.ndarray, out: np.ndarray) -> None:
    """Draw one shape into `out` (n, S, S), already zero: scale (n,), turn (n,) radians, centre (n, 2) pixels (x, y)."""
    side = out.shape[-1]
    reach = math.ceil(REACH[shape] * UNIT * side * scale.max())
    patch = 2 * reach + 1
    corner = np.floor(centre).astype(np.int64) - reach  # (n, 2)
    # four samples a pixel, at a quarter and three quarters of its sides: (n, 2 axes, 2 halves, patch)
    places = corner[:, :, None, None] + np.array([0.25, 0.75])[:, None] + np.arange(patch)
    places = (places - centre[:, :, None, None]) / (UNIT * side * scale)[:, None, None, None]
    x, y = places[:, 0], places[:, 1]  # (n, 2, patch)
    cos, sin = np.cos(turn)[:, None, None], np.sin(turn)[:, None, None]

    def grid(along_x: np.ndarray, along_y: np.ndarray) -> np.ndarray:
        # (n, half row, row, half column, column)
        columns, rows = along_x.astype(np.float32), along_y.astype(np.float32)
        return rows[:, :, :, None, None] + columns[:, None, None, :, :]

    inside = _inside(shape, grid(cos * x, sin * y), grid(-sin * x, cos * y)).view(np.uint8)
    count = inside[:, 0, :, 0] + inside[:, 0, :, 1] + inside[:, 1, :, 0] + inside[:, 1, :, 1]
    windows = np.lib.stride_tricks.sliding_window_view(out, (patch, patch), axis=(1, 2), writeable=True)
    windows[np.arange(len(out)), corner[:, 1], corner[:, 0]] = (count >= 2).view(np.uint8) * np.uint8(255)


def render(
    shape: np.ndarray, scale: np.ndarray, orientation: np.ndarray, x: np.ndarray, y: np.ndarray, side: int = 64
) -> np.ndarray:
    """Draw sprites: uint8 {0, 255} (n, side, side).

    `shape` (n,) in 1..3 (square, ellipse, heart), `scale` in (0, 1], `orientation` in radians, clockwise on the screen,
    `x`, `y` in [0, 1]: the centre stands at 0.25 + 0.5 x of the width and 0.25 + 0.5 y of the height, y downwards.
    A pixel is white when at least two of its 2 x 2 samples lie inside the shape.
    """
    shape = np.asarray(shape).astype(np.int64) - 1
    scale, orientation = np.asarray(scale, np.float64), np.asarray(orientation, np.float64)
    centre = (0.25 + 0.5 * np.stack([x, y], axis=1)) * side
    images = np.zeros((len(shape), side, side), np.uint8)
    for code in range(len(SHAPES)):
        members = np.flatnonzero(shape == code)
        # large sprites need large patches: neighbours in scale share theirs
        members = members[np.argsort(scale[members], kind="stable")]
        for start in range(0, len(members), CHUNK):
            part = members[start : start + CHUNK]
            drawn = np.zeros((len(part), side, side), np.uint8)
            _render_shape(code, scale[part], orientation[part], centre[part], drawn)
            images[part] = drawn
    return images


class LatentGrid(FactorSet):
    """A factor grid with dSprites' latents: `values` holds the latent values of each factor."""

    values: list[np.ndarray]

    def latents_classes(self, index: Any) -> np.ndarray:
        """dSprites' `latents_classes` of many rows: int64 (n, 6), the colour code 0 first."""
        factors = self.factors_of(index)
        return np.concatenate([np.zeros((len(factors), 1), np.int64), factors], axis=1)

    def latents_values(self, index: Any) -> np.ndarray:
        """dSprites' `latents_values` of many rows: float64 (n, 6), the colour 1 first."""
        factors = self.factors_of(index)
        columns = [np.ones(len(factors))] + [v[f] for v, f in zip(self.values, factors.T, strict=True)]
        return np.stack(columns, axis=1)


class Sprites(LatentGrid):
    """Rendered sprites: uint8 {0, 255} (1, S, S), target (shape, scale, orientation, posX, posY) codes.

    `sizes` gives the grid (default dSprites'); `image_size` >= 16. Images are rendered when asked for.
    """

    def __init__(
        self,
        sizes: Sequence[int] = tuple(FACTORS.values()),
        image_size: int = 64,
        transform: Callable[[Tensor], Tensor] | None = None,
    ):
        sizes = tuple(int(size) for size in sizes)
        if len(sizes) != len(FACTORS) or min(sizes) < 1 or sizes[0] > len(SHAPES) or max(sizes) > 10_000:
            raise UserError(f"sprites: sizes must be 5 numbers of 1 to 10,000 (at most 3 shapes), got {sizes}")
        if not 16 <= image_size <= 4096:
            raise UserError(f"sprites: image_size must lie in 16..4096, got {image_size}")
        factors = dict(zip(FACTORS, sizes, strict=True))
        options = {"sizes": sizes, "image_size": image_size}
        shape = (1, image_size, image_size)
        super().__init__(
            "sprites", "all", factors, shape, classes=SHAPES[: sizes[0]], options=options, transform=transform
        )
        self.values = factor_values(sizes)
        self._bits: np.ndarray | None = None

    def use_bits(self, path: Path) -> None:
        """Read the images from `path`, which `prepare sprites` wrote, when it is there and holds these sprites."""
        bits = open_bits(path, len(self), self.height) if self.height % 4 == 0 else None
        if bits is not None:
            probe = np.linspace(0, len(self) - 1, 16).astype(np.int64)
            if torch.equal(unpack(bits[probe]), self._fetch(probe)):
                self._bits = bits

    def _fetch(self, rows: np.ndarray) -> Tensor:
        if self._bits is not None:
            return unpack(self._bits[rows])
        factors = self.factors_of(rows)
        values = [value[codes] for value, codes in zip(self.values, factors.T, strict=True)]
        return torch.from_numpy(render(*values, side=self.height))[:, None]


# ---------------------------------------------------------------- bit-packed images


def pack(images: np.ndarray) -> np.ndarray:
    """Binary images (n, side, side), white where positive, as bits: uint8 (n, side * side / 8)."""
    return np.packbits(images.reshape(len(images), -1) > 0, axis=1)


def unpack(bits: np.ndarray) -> Tensor:
    """Bit-packed images as uint8 {0, 255} (n, 1, side, side)."""
    side = math.isqrt(bits.shape[1] * 8)
    images = np.unpackbits(bits, axis=1)
    images *= 255
    return torch.from_numpy(images.reshape(-1, 1, side, side))


def write_bits(blocks: Iterable[np.ndarray], n: int, side: int, path: Path) -> None:
    """Write `n` binary images, given as blocks (m, side, side), as an npy file of bits, atomically."""
    with atomic_write(path) as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": (n, side * side // 8)}
        np.lib.format.write_array_header_1_0(file, header)
        for block in blocks:
            file.write(pack(block).tobytes())


def open_bits(path: Path, n: int, side: int) -> np.ndarray | None:
    """The bits in `path`, memory-mapped; None when the file is not there or is not of `n` images of that side."""
    if not path.is_file():
        return None
    bits = map_npy(path)
    return bits if bits.dtype == np.uint8 and bits.shape == (n, side * side // 8) else None
