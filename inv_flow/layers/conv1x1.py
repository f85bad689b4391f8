"""Invertible 1x1 convolutions: a full matrix (Glow) and a product of Householder reflections."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import NonFiniteError
from inv_flow.layers.flow import FlowLayer, no_log_det


def inverse_matrix(weight: Tensor) -> Tensor:
    """The inverse of weight (C, C), computed in float64, in the precision of weight.

    Raises NonFiniteError for a singular matrix, exactly or up to rounding: its log-determinant is -inf or as good as
    that, and what stands for its inverse then is rounding error of any size.
    """
    # MPS has neither float64 nor slogdet; the matrix is tiny, so it may travel
    here = weight.cpu() if weight.device.type == "mps" else weight
    wide = here.double()
    inverse = torch.linalg.inv_ex(wide)[0]
    missed = (wide @ inverse - torch.eye(len(wide), dtype=wide.dtype, device=wide.device)).abs().max()
    if not bool((missed < 1e-3) & torch.isfinite(torch.linalg.slogdet(here)[1])):
        raise NonFiniteError(
            f"a {len(wide)}x{len(wide)} channel-mixing matrix is singular (log-determinant -inf): it has no inverse, "
            "so this flow cannot sample; go on from an earlier checkpoint"
        )
    return inverse.to(weight)


class Conv1x1(FlowLayer):
    """W x at each pixel; log-determinant H W log|det W|. W (C, C) starts as a random rotation."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.linalg.qr(torch.randn(channels, channels))[0])
        self._inverse: tuple[tuple, Tensor] | None = None  # of the weight as it was at the last `reverse`

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        pixels = x.shape[2] * x.shape[3]
        # MPS has no slogdet; the matrix is tiny, so it may travel
        log_det = torch.linalg.slogdet(self.weight.cpu() if x.device.type == "mps" else self.weight)[1].to(x.device)
        return F.conv2d(x, self.weight[:, :, None, None]), (pixels * log_det).expand(x.shape[0])

    def reverse(self, z: Tensor) -> Tensor:
        """z -> x. Raises NonFiniteError when W is singular."""
        weight = self.weight
        if torch.is_grad_enabled() and weight.requires_grad:
            return F.conv2d(z, inverse_matrix(weight)[:, :, None, None])
        key = (weight._version, weight.device, weight.dtype, weight.data_ptr())
        if self._inverse is None or self._inverse[0] != key:  # asking whether it is singular waits for the device
            self._inverse = key, inverse_matrix(weight.detach())
        return F.conv2d(z, self._inverse[1][:, :, None, None])


class Conv1x1Householder(FlowLayer):
    """Q x at each pixel with Q = product over i = 0, 1, ... of (I - 2 v_i v_i^T / v_i^T v_i); log-determinant 0.

    vectors: (reflections, C), N(0, 1).
    """

    def __init__(self, channels: int, reflections: int | None = None):
        super().__init__()
        self.vectors = nn.Parameter(torch.randn(reflections or channels, channels))

    def matrix(self) -> Tensor:
        """Q (C, C), orthogonal."""
        q = torch.eye(self.vectors.shape[1], dtype=self.vectors.dtype, device=self.vectors.device)
        for v in self.vectors:
            q = q - 2 * torch.outer(q @ v, v) / v.dot(v)
        return q

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return F.conv2d(x, self.matrix()[:, :, None, None]), no_log_det(x)

    def reverse(self, z: Tensor) -> Tensor:
        return F.conv2d(z, self.matrix().T[:, :, None, None])
