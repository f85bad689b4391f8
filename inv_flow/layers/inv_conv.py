"""Flow layers of a masked convolution and of its inverse (Inverse-Flow, section 3; FInC Flow).

`forward` is data -> latent and returns the image and its log-determinant a sample; `reverse` is latent -> data. An
inverse convolution solves in `forward` and convolves in `reverse`, so sampling costs one plain convolution; a masked
convolution has the two roles swapped. Both maps are unit triangular: the log-determinant is 0.
"""

import math

import torch
from torch import Tensor, nn

from inv_flow.utils.inv_conv_cuda import ORDERS, inverse_conv2d, kernel_mask, masked_conv2d
from inv_flow.utils.inv_conv_cuda.geometry import Order


def capped(free: Tensor, max_row_sum: float) -> Tensor:
    """The free taps (C, ...) with each row scaled to an L1 norm of `max_row_sum` at most."""
    sums = free.abs().sum(dim=(1, 2, 3), keepdim=True)
    # the clamp keeps the gradient of an all-zero row finite; such a row is not scaled anyway
    return free * (max_row_sum / sums.clamp(min=max_row_sum))


class _TriangularConv2d(nn.Module):
    """The kernel of a masked convolution: free weights, the constants that pin it, and its stability options."""

    def __init__(
        self,
        channels: int,
        kernel_size: int | tuple[int, int],
        order: Order = "TL",
        groups: int = 1,
        init_std: float = 0.01,
        max_row_sum: float | None = None,
    ):
        super().__init__()
        sizes = kernel_size if isinstance(kernel_size, (tuple, list)) else (kernel_size, kernel_size)
        if len(sizes) != 2 or not all(isinstance(size, int) for size in sizes):
            raise ValueError(f"kernel_size={kernel_size}: expected a whole number, or two")
        if not all(isinstance(n, int) and not isinstance(n, bool) for n in (channels, groups)):
            raise ValueError(f"channels={channels}, groups={groups}: expected whole numbers")
        if not isinstance(order, (str, tuple, list)):
            raise ValueError(f"order={order}: expected one of {', '.join(ORDERS)}, or one a group")
        if not 0 <= init_std < math.inf:
            raise ValueError(f"init_std={init_std}: expected a finite number, at least 0")
        if max_row_sum is not None and not 0 < max_row_sum < 1:
            raise ValueError(f"max_row_sum={max_row_sum}: must lie in (0, 1)")
        self.channels = channels
        self.kernel_size = tuple(sizes)
        self.order = order if isinstance(order, str) else tuple(order)
        self.groups = groups
        self.init_std = init_std
        self.max_row_sum = max_row_sum
        mask, pin = kernel_mask(channels, self.kernel_size, order, groups)
        # constants of the configuration, so no part of a checkpoint
        self.register_buffer("mask", mask.bool(), persistent=False)
        self.register_buffer("pin", pin, persistent=False)
        self.weight = nn.Parameter(torch.empty_like(pin))  # (C, C/G, kh, kw), free weights v where the mask is set
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The identity plus N(0, init_std^2) on the free entries."""
        with torch.no_grad():
            self.weight.normal_(0, self.init_std).mul_(self.mask)

    def free(self) -> Tensor:
        """The free taps, (C, C/G, kh, kw), 0 at the pinned entries.

        With `max_row_sum`, those of an output channel are scaled to that L1 norm at most.
        """
        free = torch.where(self.mask, self.weight, 0)
        if self.max_row_sum is not None:
            free = capped(free, self.max_row_sum)
        return free

    def kernel(self) -> Tensor:
        """The whole kernel w, (C, C/G, kh, kw)."""
        return self.free() + self.pin

    def _weight(self) -> Tensor:
        # both maps read the free entries alone, so the mask is not needed
        return self.weight if self.max_row_sum is None else self.free()

    def convolve(self, x: Tensor) -> Tensor:
        """The masked convolution, x (B, C, H, W) -> (B, C, H, W)."""
        self._check(x)
        return masked_conv2d(x, self._weight(), self.order, self.groups)

    def solve(self, y: Tensor) -> Tensor:
        """The inverse of `convolve`, y (B, C, H, W) -> (B, C, H, W)."""
        self._check(y)
        return inverse_conv2d(y, self._weight(), self.order, self.groups)

    def _check(self, x: Tensor) -> None:
        expected = f"expected a tensor (B, {self.channels}, H, W)"
        if not isinstance(x, Tensor):
            raise ValueError(f"{expected}, got {type(x).__name__}")
        if x.ndim != 4 or x.shape[1] != self.channels:
            wanted = "4 axes" if x.ndim != 4 else f"{self.channels} channels"
            raise ValueError(f"{expected}, {wanted}, got {tuple(x.shape)}")

    def extra_repr(self) -> str:
        return f"{self.channels}, kernel_size={self.kernel_size}, order={self.order}, groups={self.groups}"


def _no_log_det(x: Tensor) -> Tensor:
    """log|det| = 0 for each sample, (B,)."""
    return x.new_zeros(x.shape[0])


class InverseConv2d(_TriangularConv2d):
    """Inverse of a masked convolution as a flow layer: `forward` solves, `reverse` convolves.

    channels C >= 1; kernel_size k or (kh, kw); order TL, TR, BL, BR, or one of them a group; groups divides C. Init:
    identity plus N(0, init_std^2). max_row_sum = rho in (0, 1) rescales each output channel's free taps so that the sum
    of |w| is rho at most, which certifies |x|_inf <= |y|_inf / (1 - rho); without it large weights make the solve
    explode while the log-determinant stays 0. Raises ValueError for arguments and images that do not fit.
    `forward` and `inverse` return the image and its log-determinant, as the flows of normflows do.
    Source: Inverse-Flow (Nagar & Varma, AISTATS 2025), section 3.

        x, log_det = InverseConv2d(12, 3, "TL")(y)  # y, x (B, 12, H, W), log_det (B,)
    """

    def forward(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """y (B, C, H, W) -> x (B, C, H, W) with conv(x) = y, and the log-determinant 0 (B,) in nats."""
        return self.solve(y), _no_log_det(y)

    def inverse(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, C, H, W) -> y = conv(x) (B, C, H, W), and the log-determinant 0 (B,)."""
        return self.convolve(x), _no_log_det(x)

    def reverse(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> y = conv(x) (B, C, H, W)."""
        return self.convolve(x)


class MaskedConv2d(_TriangularConv2d):
    """Masked convolution as a flow layer (FInC Flow): `forward` convolves, `reverse` and `inverse` solve.

    Arguments as in `InverseConv2d`.
    """

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, C, H, W) -> conv(x) (B, C, H, W), and the log-determinant 0 (B,)."""
        return self.convolve(x), _no_log_det(x)

    def inverse(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """y (B, C, H, W) -> x (B, C, H, W) with conv(x) = y, and the log-determinant 0 (B,)."""
        return self.solve(y), _no_log_det(y)

    def reverse(self, y: Tensor) -> Tensor:
        """y (B, C, H, W) -> x (B, C, H, W) with conv(x) = y."""
        return self.solve(y)


class InverseConvUnit(nn.Module):
    """The four orders TL, TR, BL, BR: one inverse convolution after the other on all channels, undone backwards.

    split=True is FInC Flow's unit instead: each quarter of the channels has its own order, and one call solves all four
    (C must be a multiple of 4). `options` go to `InverseConv2d`. Raises ValueError for arguments that do not fit.
    """

    def __init__(self, channels: int, kernel_size: int | tuple[int, int], split: bool = False, **options):
        super().__init__()
        if split:
            if channels % 4:
                raise ValueError(f"split=True needs a multiple of 4 channels, got {channels}")
            layers = [InverseConv2d(channels, kernel_size, order=ORDERS, groups=4, **options)]
        else:
            layers = [InverseConv2d(channels, kernel_size, order=order, **options) for order in ORDERS]
        self.layers = nn.ModuleList(layers)

    def forward(self, y: Tensor) -> tuple[Tensor, Tensor]:
        """y (B, C, H, W) -> x (B, C, H, W), and the log-determinant 0 (B,)."""
        for layer in self.layers:
            y = layer.solve(y)
        return y, _no_log_det(y)

    def reverse(self, x: Tensor) -> Tensor:
        """x (B, C, H, W) -> y (B, C, H, W), the inverse of `forward`."""
        for layer in reversed(self.layers):
            x = layer.convolve(x)
        return x
