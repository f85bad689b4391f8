"""From 8-bit pixels to real vectors: dequantisation, scaling, logit; and the space-to-depth squeeze."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from inv_flow.layers.flow import FlowLayer, no_log_det, per_sample


class Dequantization(FlowLayer):
    """x + u with u ~ U[0, 1) for integer-valued x: the log-density of u is 0, so the log-determinant is too. Reverse:
    floor.

    The draw is float64 when x is; in float32 a pixel 255 + u may round to 256, which the alpha of `Normalization` and
    logit absorb.
    """

    def forward(self, x: Tensor, noise: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """x integer-valued floats (B, C, H, W); `noise` in [0, 1) replaces the draw."""
        return x + (torch.rand_like(x) if noise is None else noise), no_log_det(x)

    def reverse(self, z: Tensor) -> Tensor:
        """The integers below z."""
        return z.floor()


class Normalization(FlowLayer):
    """(x - translation) / scale; log-determinant -D log scale a sample."""

    def __init__(self, translation: float = 0.0, scale: float = 256.0):
        super().__init__()
        if scale <= 0:
            raise ValueError(f"scale={scale}: must be positive")
        self.translation, self.scale = translation, scale

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return (x - self.translation) / self.scale, no_log_det(x) - x[0].numel() * math.log(self.scale)

    def reverse(self, z: Tensor) -> Tensor:
        return z * self.scale + self.translation


class LogitTransform(FlowLayer):
    """log x - log(1 - x) on (0, 1); log-determinant sum(-log x - log(1 - x))."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_x, log_rest = x.log(), torch.log1p(-x)
        return log_x - log_rest, per_sample(-log_x - log_rest)

    def reverse(self, z: Tensor) -> Tensor:
        return torch.sigmoid(z)


class SigmoidTransform(FlowLayer):
    """sigmoid(x); log-determinant sum(log sigmoid(x) + log sigmoid(-x))."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.sigmoid(x), per_sample(F.logsigmoid(x) + F.logsigmoid(-x))

    def reverse(self, z: Tensor) -> Tensor:
        return z.log() - torch.log1p(-z)


class Squeeze(FlowLayer):
    """Space to depth: (B, C, H, W) -> (B, 4C, H/2, W/2), output channel 4c + 2dy + dx. H and W must be even."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if x.shape[2] % 2 or x.shape[3] % 2:
            raise ValueError(f"a squeeze needs an even height and width, got {x.shape[2]} x {x.shape[3]}")
        return F.pixel_unshuffle(x, 2), no_log_det(x)

    def reverse(self, z: Tensor) -> Tensor:
        return F.pixel_shuffle(z, 2)


class UnSqueeze(FlowLayer):
    """Depth to space, the inverse of `Squeeze`: (B, 4C, H, W) -> (B, C, 2H, 2W)."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return F.pixel_shuffle(x, 2), no_log_det(x)

    def reverse(self, z: Tensor) -> Tensor:
        return F.pixel_unshuffle(z, 2)


class Flatten(FlowLayer):
    """(B, *size) -> (B, D), D the product of `size`."""

    def __init__(self, size: tuple[int, ...]):
        super().__init__()
        self.size = tuple(size)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.flatten(1), no_log_det(x)

    def reverse(self, z: Tensor) -> Tensor:
        return z.view(-1, *self.size)


class Pad2d(FlowLayer):
    """Zero padding by `padding` pixels on each side, so that a third squeeze divides 28 x 28, and by more at the
    `bottom` and on the `right`; reverse crops.

    It stands before `Dequantization`: the flow is then a density on the padded integer image, whose border is always 0,
    and -log p over the unpadded pixel count bounds their bits per dimension from above.
    """

    def __init__(self, padding: int, bottom: int = 0, right: int = 0):
        super().__init__()
        self.padding = (padding, padding + right, padding, padding + bottom)  # left, right, top, bottom

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return F.pad(x, self.padding), no_log_det(x)

    def reverse(self, z: Tensor) -> Tensor:
        left, right, top, bottom = self.padding
        return z[:, :, top : z.shape[2] - bottom, left : z.shape[3] - right]


def preprocessing(alpha: float = 1e-6, levels: int = 256) -> list[FlowLayer]:
    """Dequantise, divide by `levels`, v -> (v + alpha)(1 - 2 alpha), logit: integers 0..levels-1 to the real line.

    alpha >= 1e-6 in float32: with less, 1 - v loses its last digit at the brightest pixel.
    """
    # (v + alpha)(1 - 2 alpha) = (v - (-alpha)) / (1 / (1 - 2 alpha))
    return [
        Dequantization(),
        Normalization(0.0, float(levels)),
        Normalization(-alpha, 1 / (1 - 2 * alpha)),
        LogitTransform(),
    ]
