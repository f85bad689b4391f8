"""The convolution exponential (Hoogeboom et al., The Convolution Exponential and Generalized Sylvester Flows, 2020)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inv_flow.layers.conv1x1 import Conv1x1, Conv1x1Householder
from inv_flow.layers.flow import FlowLayer


def conv_exp(x: Tensor, kernel: Tensor, terms: int) -> Tensor:
    """sum_{i=0}^{terms} K^i x / i!, K the zero-padded convolution with `kernel` (C, C, k, k), x (B, C, H, W)."""
    padding = kernel.shape[-1] // 2
    total, term = x, x
    for i in range(1, terms + 1):
        term = F.conv2d(term, kernel, padding=padding) / i
        total = total + term
    return total


class ConvExp(FlowLayer):
    """exp(K) after an invertible 1x1 convolution; log-determinant H W trace(centre of K) plus the 1x1's.

    The kernel is scaled so that the operator norm of K on (C, H, W) images stays below `coeff`, by one power-iteration
    step each training pass; 6 series terms in training, 13 in evaluation. The 1x1 is a full matrix up to 64 channels,
    64 Householder reflections beyond.
    """

    terms_train, terms_eval = 6, 13

    def __init__(self, size: tuple[int, int, int], coeff: float = 0.9, add_maps: bool = False):
        super().__init__()
        channels = size[0]
        self.coeff = coeff
        self.conv1x1 = Conv1x1(channels) if channels <= 64 else Conv1x1Householder(channels, 64)
        self.kernel = nn.Parameter(torch.randn(channels, channels, 3, 3) / (9 * channels))
        self.pre = nn.Parameter(torch.zeros(1, *size)) if add_maps else None
        self.post = nn.Parameter(torch.zeros(1, *size)) if add_maps else None
        self.register_buffer("u", F.normalize(torch.randn(1, *size).flatten(), dim=0).view(1, *size))
        with torch.no_grad():
            for _ in range(50):  # a first estimate that one step a pass can follow
                self._power_step()

    def _power_step(self) -> Tensor:
        """One step of the power iteration; returns v with sigma = <u, K v>."""
        v = F.conv_transpose2d(self.u, self.kernel, padding=1)
        v = v / v.norm()
        u = F.conv2d(v, self.kernel, padding=1)
        self.u.copy_(u / u.norm())
        return v

    def normalized_kernel(self) -> Tensor:
        """The kernel divided by max(1, sigma / coeff) + 1e-5; the gradient goes through sigma, not through the
        iteration.
        """
        with torch.no_grad():
            if self.training:
                self._power_step()
            u = self.u.clone()
            v = F.conv_transpose2d(u, self.kernel, padding=1)
            v = v / v.norm()
        sigma = (u * F.conv2d(v, self.kernel, padding=1)).sum()
        return self.kernel / ((sigma / self.coeff).clamp(min=1) + 1e-5)

    def _terms(self) -> int:
        return self.terms_train if self.training else self.terms_eval

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x, log_det = self.conv1x1(x)
        kernel = self.normalized_kernel()
        if self.pre is not None:
            x = x + self.pre
        x = conv_exp(x, kernel, self._terms())
        if self.post is not None:
            x = x + self.post
        trace = kernel[:, :, 1, 1].diagonal().sum()
        return x, log_det + x.shape[2] * x.shape[3] * trace

    def reverse(self, z: Tensor) -> Tensor:
        if self.post is not None:
            z = z - self.post
        z = conv_exp(z, -self.normalized_kernel(), self._terms())
        if self.pre is not None:
            z = z - self.pre
        return self.conv1x1.reverse(z)
