"""Random image transforms on whole batches: the published per-image chain of PIL operations as tensor operations.

The geometry (flip, edge padding, rotation, centre crop, random crop) is composed into one gather. Random numbers are
drawn first, as a `Draws` of the batch, so that a batch is a pure function of its images and its generator, and several
processes can share the draws of one batch. Images are uint8 (B, C, H, W) throughout.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Recipe:
    """What happens to a training image of the flow, in this order.

    Flip with probability 1/2; jitter of brightness, contrast and saturation in random order; `zero_pad` black pixels
    around (also at test time); `edge_pad` repeated pixels; rotation by up to `degrees`, nearest pixel; centre crop to
    the padded size plus `margin`; random crop to the padded size. `noise`: whether uniform noise is added afterwards.
    """

    flip: bool = False
    jitter: tuple[float, float, float] = (0.0, 0.0, 0.0)
    zero_pad: int = 0
    edge_pad: int = 0
    degrees: float = 0.0
    margin: int = 0
    noise: bool = False


RECIPES = {
    "none": Recipe(),
    "noise": Recipe(noise=True),
    "mnist": Recipe(zero_pad=2, edge_pad=8, degrees=12, margin=4, noise=True),
    "svhn": Recipe(jitter=(0.1, 0.1, 0.05), edge_pad=8, degrees=12, margin=4),
    "cifar": Recipe(flip=True, jitter=(0.1, 0.1, 0.05), edge_pad=8, degrees=12, margin=4),
    "tinyimagenet": Recipe(flip=True, jitter=(0.05, 0.05, 0.025), edge_pad=8, degrees=2, margin=4),
}


@dataclass(frozen=True)
class CnnRecipe:
    """The classifier's transforms: random crop after `crop_pad` black pixels and flips in training, `zero_pad`
    always.
    """

    crop_pad: int = 0
    flip: bool = False
    vertical: bool = False
    zero_pad: int = 0


CNN_RECIPES = {
    "plain": CnnRecipe(),
    "mnist": CnnRecipe(zero_pad=2),
    "svhn": CnnRecipe(zero_pad=2),
    "cifar": CnnRecipe(crop_pad=4, flip=True),
    "tinyimagenet": CnnRecipe(crop_pad=4, flip=True),
    "aerial": CnnRecipe(crop_pad=4, flip=True, vertical=True),
}


@dataclass
class Draws:
    """The random numbers of a batch of B images, a row an image."""

    flip: Tensor  # (B,) bool
    factors: Tensor  # (B, 3) brightness, contrast, saturation
    order: Tensor  # (B, 3) a permutation of 0, 1, 2
    radians: Tensor  # (B,) counter-clockwise
    offset: Tensor  # (B, 2) rows, columns of the random crop

    @classmethod
    def make(cls, recipe: Recipe, count: int, generator: torch.Generator) -> "Draws":
        """Draw for `count` images; the same number of draws whatever the recipe."""
        device = generator.device
        uniform = torch.rand(count, 10, generator=generator, device=device)
        factors = [1 + (2 * uniform[:, 1 + i] - 1) * size for i, size in enumerate(recipe.jitter)]
        return cls(
            flip=(uniform[:, 0] < 0.5) & recipe.flip,
            factors=torch.stack(factors, 1),
            order=uniform[:, 4:7].argsort(1),
            radians=torch.deg2rad((2 * uniform[:, 7] - 1) * recipe.degrees),
            offset=(uniform[:, 8:10] * (recipe.margin + 1)).long().clamp_max(recipe.margin),
        )

    def rows(self, start: int, stop: int) -> "Draws":
        """The draws of images start .. stop-1."""
        return Draws(*(getattr(self, name)[start:stop] for name in self.__dataclass_fields__))


def for_training(x: Tensor, recipe: Recipe, draws: Draws) -> Tensor:
    """The transformed images: (B, C, H, W) uint8 -> (B, C, H + 2 zero_pad, W + 2 zero_pad) uint8."""
    if any(recipe.jitter):
        x = color_jitter(flip_rows(x, draws.flip), draws.factors, draws.order)
    elif recipe.flip:
        x = flip_rows(x, draws.flip)
    x = for_test(x, recipe)
    return rotate_and_crop(x, draws.radians, draws.offset, recipe.edge_pad, recipe.margin) if recipe.edge_pad else x


def for_test(x: Tensor, recipe: Recipe) -> Tensor:
    """Black padding only."""
    return F.pad(x, (recipe.zero_pad,) * 4) if recipe.zero_pad else x


def flip_rows(x: Tensor, which: Tensor) -> Tensor:
    """Mirror the chosen images left to right."""
    return torch.where(which[:, None, None, None], x.flip(3), x)


def grey(x: Tensor) -> Tensor:
    """Luma of RGB levels as PIL computes it (ITU-R 601, rounded): (B, 3, H, W) float -> (B, 1, H, W)."""
    red, green, blue = x.float().unbind(1)
    total = 19595 * red + 38470 * green + 7471 * blue  # whole numbers below 2^24: exact in float32
    return torch.floor((total + 32768) / 65536).to(x.dtype)[:, None]


def blend(degenerate: Tensor, x: Tensor, factor: Tensor) -> Tensor:
    """PIL's blend: degenerate + factor (x - degenerate), clipped to 0..255 and cut to whole levels."""
    return torch.floor((degenerate + factor * (x - degenerate)).clamp(0, 255))


def color_jitter(x: Tensor, factors: Tensor, order: Tensor) -> Tensor:
    """Brightness, contrast and saturation of each image by its `factors`, in its own `order`: uint8 RGB -> uint8."""
    y = x.float()
    for place in range(3):
        chosen = order[:, place]
        brightness, contrast, saturation = factors[:, :, None, None, None].float().unbind(1)
        luma = grey(y)
        mean = torch.floor(luma.mean((1, 2, 3), keepdim=True) + 0.5)
        results = torch.stack(
            [blend(torch.zeros_like(y), y, brightness), blend(mean, y, contrast), blend(luma, y, saturation)]
        )
        y = results[chosen, torch.arange(len(y), device=y.device)]
    return y.to(torch.uint8)


def rotate_and_crop(x: Tensor, radians: Tensor, offset: Tensor, edge_pad: int, margin: int) -> Tensor:
    """Pad by repeated edges, rotate about the centre (nearest pixel), centre crop to H + margin, crop H x W at
    `offset`.

    One gather: every output pixel asks which input pixel it comes from.
    """
    b, _, height, width = x.shape
    device = x.device
    rows, cols = torch.arange(height, device=device), torch.arange(width, device=device)
    dtype = torch.float32 if device.type == "mps" else torch.float64  # no float64 there
    centre_y, centre_x = height / 2 + edge_pad, width / 2 + edge_pad
    # positions on the padded canvas: the centre crop starts edge_pad - margin / 2 from its border; +1/2: pixel centres
    start = edge_pad - margin // 2
    dy = (rows[None] + offset[:, :1] + start + 0.5 - centre_y)[:, :, None].to(dtype)  # (B, H, 1)
    dx = (cols[None] + offset[:, 1:] + start + 0.5 - centre_x)[:, None].to(dtype)  # (B, 1, W)
    cos, sin = (f(radians.to(dtype))[:, None, None] for f in (torch.cos, torch.sin))
    from_x = torch.floor(cos * dx - sin * dy + centre_x).long() - edge_pad  # image rows point down
    from_y = torch.floor(sin * dx + cos * dy + centre_y).long() - edge_pad
    outside = (from_x < -edge_pad) | (from_x >= width + edge_pad) | (from_y < -edge_pad) | (from_y >= height + edge_pad)
    from_x, from_y = from_x.clamp(0, width - 1), from_y.clamp(0, height - 1)
    index = torch.arange(b, device=device)[:, None, None]
    y = x.permute(0, 2, 3, 1)[index, from_y, from_x].permute(0, 3, 1, 2)  # (B, C, H, W)
    return y.masked_fill(outside[:, None], 0)


def shift_and_flip(x: Tensor, pad: int, flip: bool, vertical: bool, generator: torch.Generator) -> Tensor:
    """The classifier's augmentation: random crop after `pad` black pixels, random flips. uint8 -> uint8."""
    b, _, height, width = x.shape
    uniform = torch.rand(b, 4, generator=generator, device=generator.device).to(x.device)
    if pad:
        top, left = ((uniform[:, i] * (2 * pad + 1)).long().clamp_max(2 * pad) for i in (0, 1))
        rows = torch.arange(height, device=x.device)[None] + top[:, None]
        cols = torch.arange(width, device=x.device)[None] + left[:, None]
        canvas = F.pad(x, (pad,) * 4).permute(0, 2, 3, 1)
        x = canvas[torch.arange(b, device=x.device)[:, None, None], rows[:, :, None], cols[:, None]].permute(0, 3, 1, 2)
    if flip:
        x = flip_rows(x, uniform[:, 2] < 0.5)
    if vertical:
        x = torch.where((uniform[:, 3] < 0.5)[:, None, None, None], x.flip(2), x)
    return x


def posterize(x: Tensor, bits: int) -> Tensor:
    """Keep the highest `bits` bits of uint8 levels."""
    return x & (256 - 2 ** (8 - bits))
