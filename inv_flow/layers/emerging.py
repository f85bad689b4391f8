"""Emerging convolutions (Hoogeboom et al., 2019): a 1x1 and two autoregressive convolutions in opposite directions."""

import math

import torch
from torch import Tensor, nn

from inv_flow.layers.conv1x1 import Conv1x1
from inv_flow.layers.flow import FlowLayer, no_log_det
from inv_flow.layers.inv_conv import capped
from inv_flow.utils.inv_conv_cuda import inverse_conv2d, kernel_mask, masked_conv2d


class SquareAutoRegressiveConv2d(FlowLayer):
    """An autoregressive convolution with a lower-triangular last tap; log-determinant H W sum_o log|w[o, o, -1, -1]|.

    It is the TL masked convolution of this repository with a free diagonal. weight (C, C, k, k) starts as N(0, 1) /
    sqrt(k^2 C^2) plus 1 on the diagonal of the last tap; bias (C,). `reverse` solves the recursion of `InverseConv2d`
    and can explode like it; max_row_sum = rho in (0, 1) caps each row's taps, relative to its diagonal entry, to
    sum |w| <= rho, so that |x| <= |z - bias| / (|diagonal| (1 - rho)) in the maximum norm.
    """

    def __init__(self, channels: int, kernel_size: int = 2, max_row_sum: float | None = None):
        super().__init__()
        k = kernel_size
        self.max_row_sum = max_row_sum
        mask, pin = kernel_mask(channels, (k, k), "TL", 1)
        self.register_buffer("mask", mask + pin, persistent=False)  # the diagonal is free here
        self.register_buffer("pin", pin, persistent=False)
        weight = torch.randn(channels, channels, k, k) / math.sqrt(k * k * channels * channels)
        self.weight = nn.Parameter(weight * self.mask + pin)
        self.bias = nn.Parameter(torch.zeros(channels))

    def _unit_kernel(self) -> tuple[Tensor, Tensor]:
        """The kernel with each row divided by its diagonal entry, and that diagonal (C,)."""
        kernel = self.weight * self.mask
        diagonal = kernel[:, :, -1, -1].diagonal()
        free = kernel / diagonal.view(-1, 1, 1, 1) * (1 - self.pin)
        if self.max_row_sum is not None:
            free = capped(free, self.max_row_sum)
        return free + self.pin, diagonal  # exactly 1 where the solver expects a 1

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        kernel, diagonal = self._unit_kernel()
        z = masked_conv2d(x, kernel, "TL", 1) * diagonal.view(1, -1, 1, 1) + self.bias.view(1, -1, 1, 1)
        log_det = x.shape[2] * x.shape[3] * diagonal.abs().log().sum()
        return z, log_det.expand(x.shape[0])

    def reverse(self, z: Tensor) -> Tensor:
        kernel, diagonal = self._unit_kernel()
        return inverse_conv2d((z - self.bias.view(1, -1, 1, 1)) / diagonal.view(1, -1, 1, 1), kernel, "TL", 1)


class Flip2d(FlowLayer):
    """Both image axes reversed."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x.flip(2, 3), no_log_det(x)

    def reverse(self, z: Tensor) -> Tensor:
        return z.flip(2, 3)


class Emerging(FlowLayer):
    """Conv1x1, autoregressive convolution, flip, autoregressive convolution, flip."""

    def __init__(self, channels: int, kernel_size: int = 2, max_row_sum: float | None = None):
        super().__init__()
        self.layers = nn.ModuleList(
            [
                Conv1x1(channels),
                SquareAutoRegressiveConv2d(channels, kernel_size, max_row_sum),
                Flip2d(),
                SquareAutoRegressiveConv2d(channels, kernel_size, max_row_sum),
                Flip2d(),
            ]
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_det = no_log_det(x)
        for layer in self.layers:
            x, term = layer(x)
            log_det = log_det + term
        return x, log_det

    def reverse(self, z: Tensor) -> Tensor:
        for layer in reversed(self.layers):
            z = layer.reverse(z)
        return z
