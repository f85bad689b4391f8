"""Class codes in the image: a band of pixels below it that tells the class (the `*_conditioned_on_images` methods)."""

import torch
from torch import Tensor

from common.errors import UserError


class DistancedPixels:
    """K codes (C, rows, W) in [0, 1], pushed apart from a random start.

    `iterations` synchronous updates a_k <- -a_k + sum_{j != k} (a_k - a_j)/|a_k - a_j|, then one affine map of all
    codes to [0, 1]. Raises UserError for fewer than two classes.
    """

    def __init__(self, codes: Tensor):
        self.codes = codes  # (K, C, rows, W)

    @classmethod
    def make(
        cls, classes: int, channels: int, rows: int, width: int, iterations: int, generator: torch.Generator
    ) -> "DistancedPixels":
        """Draw the start, uniform in [0, 1), one class after the other, and iterate."""
        if classes < 2:
            raise UserError("class codes need at least two classes")
        size = channels * rows * width
        start = torch.stack([torch.rand(size, generator=generator) for _ in range(classes)])
        return cls(repel(start, iterations).view(classes, channels, rows, width))

    @property
    def rows(self) -> int:
        """Height of the band."""
        return self.codes.shape[2]

    def encode(self, x: Tensor, y: Tensor) -> Tensor:
        """(B, C, H, W), (B,) -> (B, C, H + rows, W): the image with its class's band below."""
        return torch.cat([x, self.codes.to(x)[y]], dim=2)

    def decode(self, x: Tensor) -> Tensor:
        """(B, C, H + rows, W) -> (B,): the class whose code is nearest to the band in L1."""
        band = x[:, :, -self.rows :].flatten(1)  # (B, C rows W)
        return torch.cdist(band, self.codes.to(x).flatten(1), p=1).argmin(1)

    def remove(self, x: Tensor) -> Tensor:
        """(B, C, H + rows, W) -> (B, C, H, W). The published code crops a W x W square instead."""
        return x[:, :, : -self.rows]


def repel(codes: Tensor, iterations: int) -> Tensor:
    """`iterations` updates of (K, n) codes, then the affine map to [0, 1]."""
    for _ in range(iterations):
        difference = codes[:, None] - codes[None]  # (K, K, n)
        distance = difference.norm(dim=2, keepdim=True)
        distance.diagonal(dim1=0, dim2=1).fill_(1)  # the difference is zero there
        codes = -codes + (difference / distance).sum(1)
    codes = codes - codes.min()
    return codes / codes.max()
