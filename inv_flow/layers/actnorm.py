"""Activation normalisation with data-dependent initialisation (Glow)."""

import torch
from torch import Tensor, nn

from inv_flow.layers.flow import FlowLayer


class ActNorm(FlowLayer):
    """(x - t_c) exp(-s_c) for each channel c; log-determinant -H W sum_c s_c. Input (B, C, H, W) or (B, C).

    The first `forward` sets t to the mean and s to log(std + 1e-8), std unbiased, over everything but the channel axis,
    and marks the buffer `initialized`. A channel that is constant in the first batch (or a batch of one value a
    channel) keeps s = 0: log(0 + 1e-8) would multiply whatever comes next by 1e8.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.translation = nn.Parameter(torch.zeros(channels))
        self.log_scale = nn.Parameter(torch.zeros(channels))
        self.register_buffer("initialized", torch.tensor(0, dtype=torch.int64))
        self._ready = False  # the buffer's value on the host: reading the buffer would wait for the device at each call

    @torch.no_grad()
    def initialize(self, x: Tensor) -> None:
        """Set translation and scale from x (B, C, ...)."""
        rows = x.transpose(0, 1).flatten(1)  # (C, B*H*W)
        mean = rows.mean(1)
        std = rows.std(1) if rows.shape[1] > 1 else torch.zeros_like(mean)
        # below this, the spread is rounding error of the mean and no scale of the data
        constant = std <= 1e3 * torch.finfo(x.dtype).eps * mean.abs().clamp(min=torch.finfo(x.dtype).tiny)
        self.translation.copy_(mean)
        self.log_scale.copy_(torch.where(constant, torch.zeros_like(std), (std + 1e-8).log()))
        self.initialized.fill_(1)
        self._ready = True

    def _load_from_state_dict(self, *args):
        super()._load_from_state_dict(*args)
        self._ready = bool(self.initialized)

    def _shaped(self, x: Tensor) -> tuple[Tensor, Tensor]:
        shape = (1, -1) + (1,) * (x.ndim - 2)
        return self.translation.view(shape), self.log_scale.view(shape)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if not self._ready:
            self._ready = bool(self.initialized)
            if not self._ready:
                self.initialize(x)
        translation, log_scale = self._shaped(x)
        pixels = x[0, 0].numel()
        log_det = -pixels * self.log_scale.sum()
        return (x - translation) * torch.exp(-log_scale), log_det.expand(x.shape[0])

    def reverse(self, z: Tensor) -> Tensor:
        """z -> x. Raises RuntimeError before the first `forward`."""
        if not self._ready and not bool(self.initialized):
            raise RuntimeError("ActNorm is not initialised: run forward on a batch of data first")
        translation, log_scale = self._shaped(z)
        return z * torch.exp(log_scale) + translation
