"""Affine coupling with Inverse-Flow's small network or the Self-Normalizing-Flows one, and the split prior."""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.layers import PatchConv2d, in_parts
from inv_flow.layers.flow import FlowLayer, per_sample, standard_normal_log_prob


class Conv2dZero(nn.Module):
    """A 3x3 convolution that starts at zero, times exp(3 logs) with a learned `logs` for each output channel (Glow)."""

    def __init__(self, channels_in: int, channels_out: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(channels_out, channels_in, 3, 3))
        self.bias = nn.Parameter(torch.zeros(channels_out))
        self.logs = nn.Parameter(torch.zeros(channels_out))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, H, W)."""
        return F.conv2d(x, self.weight, self.bias, padding=1) * torch.exp(3 * self.logs).view(1, -1, 1, 1)


def coupling_net(channels: int, width: int, kind: str) -> nn.Sequential:
    """x1 (C/2 channels) -> log-scales and shifts, interleaved (C channels).

    'small' (Inverse-Flow): conv3x3 to `width`, conv1x1 to C, both without bias. 'snf' (Self-Normalizing Flows, FInC
    Flow): conv3x3 to `width`, conv1x1 to `width`, with bias. Both end in a zero convolution.
    """
    conv = PatchConv2d if channels <= 8 and width >= 256 else partial(nn.Conv2d, padding=1)
    if kind == "small":
        return nn.Sequential(
            conv(channels // 2, width, 3, bias=False),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, channels, 1, bias=False),
            nn.ReLU(inplace=True),
            Conv2dZero(channels, channels),
        )
    if kind == "snf":
        return nn.Sequential(
            conv(channels // 2, width, 3),
            nn.ReLU(inplace=True),
            nn.Conv2d(width, width, 1),
            nn.ReLU(inplace=True),
            Conv2dZero(width, channels),
        )
    raise ValueError(f"coupling={kind!r}: expected 'small' or 'snf'")


class Coupling(FlowLayer):
    """z = [x1, x2 exp(log_s) + t], log_s = 2 tanh(h_even / 2), t = h_odd, h = net(x1); log-determinant sum log_s.

    `autocast`: run the network in bfloat16 (the scale and the sum stay in the input's precision). C must be even.
    """

    def __init__(self, channels: int, width: int = 512, kind: str = "small", autocast: bool = False):
        super().__init__()
        if channels % 2:
            raise ValueError(f"a coupling needs an even number of channels, got {channels}")
        self.net = coupling_net(channels, width, kind)
        self.width = width
        self.autocast = autocast

    def _scale_and_shift(self, x1: Tensor) -> tuple[Tensor, Tensor]:
        # a wide network on few channels takes half the time with the channels innermost; a GPU's float32 does not
        last = self.autocast or x1.device.type == "cpu"
        with torch.autocast(x1.device.type, torch.bfloat16, enabled=self.autocast):
            h = in_parts(self.net, x1.contiguous(memory_format=torch.channels_last) if last else x1, self.width)
        h = h.to(x1.dtype, memory_format=torch.contiguous_format)
        return 2 * torch.tanh(h[:, 0::2] / 2), h[:, 1::2]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x1, x2 = x.chunk(2, dim=1)
        log_s, t = self._scale_and_shift(x1)
        return torch.cat([x1, x2 * log_s.exp() + t], dim=1), per_sample(log_s)

    def reverse(self, z: Tensor) -> Tensor:
        z1, z2 = z.chunk(2, dim=1)
        log_s, t = self._scale_and_shift(z1)
        return torch.cat([z1, (z2 - t) * torch.exp(-log_s)], dim=1)


class SplitPrior(nn.Module):
    """Coupling on all channels, then the second half leaves the flow as a standard normal latent.

    `split` and `merge` keep that latent (the flow uses them, so its inverse is exact); `forward` adds its log-density
    instead.
    """

    def __init__(self, channels: int, width: int = 512, kind: str = "small", autocast: bool = False):
        super().__init__()
        self.coupling = Coupling(channels, width, kind, autocast)

    def split(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, C, H, W) -> (kept half, latent half, log-determinant (B,))."""
        z, log_det = self.coupling(x)
        x1, x2 = z.chunk(2, dim=1)
        return x1, x2, log_det

    def merge(self, x1: Tensor, x2: Tensor) -> Tensor:
        """The inverse of `split`."""
        return self.coupling.reverse(torch.cat([x1, x2], dim=1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, C, H, W) -> (kept half, log-determinant + log N(latent half) (B,))."""
        x1, x2, log_det = self.split(x)
        return x1, log_det + standard_normal_log_prob(x2)

    def reverse(self, x1: Tensor) -> Tensor:
        """x1 (B, C/2, H, W) and a fresh N(0, I) latent -> (B, C, H, W)."""
        return self.merge(x1, torch.randn_like(x1))
