"""Invertible 1x1 convolutions: a full matrix (Glow) and a product of Householder reflections."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inv_flow.layers.flow import FlowLayer, no_log_det


class Conv1x1(FlowLayer):
    """W x at each pixel; log-determinant H W log|det W|. W (C, C) starts as a random rotation."""

    def __init__(self, channels: int):
        super().__init__()
        self.weight = nn.Parameter(torch.linalg.qr(torch.randn(channels, channels))[0])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        pixels = x.shape[2] * x.shape[3]
        # MPS has no slogdet; the matrix is tiny, so it may travel
        log_det = torch.linalg.slogdet(self.weight.cpu() if x.device.type == "mps" else self.weight)[1].to(x.device)
        return F.conv2d(x, self.weight[:, :, None, None]), (pixels * log_det).expand(x.shape[0])

    def reverse(self, z: Tensor) -> Tensor:
        inverse = (
            torch.linalg.inv(self.weight.double().cpu()) if z.device.type == "mps" else self.weight.double().inverse()
        )
        return F.conv2d(z, inverse.to(z)[:, :, None, None])


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
