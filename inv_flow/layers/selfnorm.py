"""Self Normalizing Flows (Keller et al., 2021): a learned inverse R stands for W^-1 in the gradient of log|det W|."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input, conv2d_weight

from common.errors import NonFiniteError
from inv_flow.layers.conv1x1 import inverse_matrix
from inv_flow.layers.flow import ModifiedGradFlowLayer, no_log_det


def flip_kernel(kernel: Tensor) -> Tensor:
    """Both spatial axes reversed and the channel axes exchanged: the kernel of the transposed convolution."""
    return kernel.flip(2, 3).transpose(0, 1)


def conv_matrix(kernel: Tensor, size: tuple[int, int, int]) -> Tensor:
    """The dense matrix (C_out H W, C_in H W) of the zero-padded convolution with `kernel` on images `size` = (C_in, H,
    W).
    """
    count = math.prod(size)
    basis = torch.eye(count, dtype=kernel.dtype, device=kernel.device).view(count, *size)
    padding = (kernel.shape[2] // 2, kernel.shape[3] // 2)
    return F.conv2d(basis, kernel, padding=padding).flatten(1).T


class _SelfNormalized(torch.autograd.Function):
    """W x + b whose backward adds the self-normalised gradients of the log-determinant for W and R."""

    @staticmethod
    def forward(ctx, x, weight, inverse, bias):
        padding = weight.shape[2] // 2, weight.shape[3] // 2
        y = F.conv2d(x, weight, padding=padding)
        ctx.save_for_backward(x, weight, inverse, y)
        return y + bias.view(1, -1, 1, 1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, g):
        x, weight, inverse, y = ctx.saved_tensors
        padding = weight.shape[2] // 2, weight.shape[3] // 2
        grad_x = conv2d_input(x.shape, weight, g, padding=padding)
        # how many pixels each tap touches: (1, 1, k, k)
        ones = g.new_ones(1, 1, *g.shape[2:])
        count = conv2d_weight(ones, (1, 1, *weight.shape[2:]), ones, padding=padding)
        grad_w = (conv2d_weight(x, weight.shape, g, padding=padding) - flip_kernel(inverse) * count) / 2
        grad_r = (
            -conv2d_weight(y, inverse.shape, grad_x, padding=padding) + flip_kernel(weight) * count.flip(2, 3)
        ) / 2
        return grad_x, grad_w, grad_r, g.sum((0, 2, 3))


class SelfNormConv(ModifiedGradFlowLayer):
    """W x + b with a learned approximate inverse kernel R.

    Training: log-determinant 0, self-normalised gradients; the loss must be the batch mean of -log p. Evaluation or
    `exact`: the log-determinant of the dense matrix (1x1: H W log|det W|). `reverse` is R (z - b), or the exact inverse
    when `exact` is set.
    """

    def __init__(self, channels: int, kernel_size: int = 1):
        super().__init__()
        if kernel_size % 2 == 0:
            raise ValueError(f"kernel_size={kernel_size}: must be odd")
        if kernel_size == 1:
            weight = torch.linalg.qr(torch.randn(channels, channels))[0].view(channels, channels, 1, 1)
        else:
            weight = torch.empty(channels, channels, kernel_size, kernel_size)
            nn.init.xavier_normal_(weight, gain=0.01)
            weight += nn.init.dirac_(torch.empty_like(weight))
        self.weight = nn.Parameter(weight)
        self.inverse = nn.Parameter(flip_kernel(weight).clone().contiguous())
        self.bias = nn.Parameter(torch.zeros(channels))
        self.padding = kernel_size // 2
        self._cache: tuple[tuple, Tensor] | None = None

    def matrix(self, size: tuple[int, int, int]) -> Tensor:
        """The dense matrix of W on images `size`; without gradients it is kept until W changes."""
        if torch.is_grad_enabled() and self.weight.requires_grad:
            return conv_matrix(self.weight, size)
        key = (size, self.weight._version, self.weight.device, self.weight.dtype, self.weight.data_ptr())
        if self._cache is None or self._cache[0] != key:
            self._cache = key, conv_matrix(self.weight.detach(), size)
        return self._cache[1]

    def log_det(self, x: Tensor) -> Tensor:
        """The exact log|det W| for images like x (B, C, H, W): (B,)."""
        if self.padding == 0:
            value = x.shape[2] * x.shape[3] * torch.linalg.slogdet(self.weight[:, :, 0, 0])[1]
        else:
            value = torch.linalg.slogdet(self.matrix(tuple(x.shape[1:])))[1]
        return value.expand(x.shape[0])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        if self.modified:
            return _SelfNormalized.apply(x, self.weight, self.inverse, self.bias), no_log_det(x)
        return F.conv2d(x, self.weight, self.bias, padding=self.padding), self.log_det(x)

    def reverse(self, z: Tensor) -> Tensor:
        z = z - self.bias.view(1, -1, 1, 1)
        if not self.exact:
            return F.conv2d(z, self.inverse, padding=self.padding)
        if self.padding == 0:
            return F.conv2d(z, inverse_matrix(self.weight[:, :, 0, 0])[:, :, None, None])
        matrix, right = self.matrix(tuple(z.shape[1:])), z.flatten(1).T
        x = torch.linalg.solve_ex(matrix, right)[0]
        if not bool((matrix @ x - right).abs().max() <= 1e-2 * right.abs().max()):  # a NaN is no solution either
            raise NonFiniteError(
                "a self-normalising convolution is singular (log-determinant -inf): it has no inverse, so this flow "
                "cannot sample exactly; go on from an earlier checkpoint, or leave out sample_true_inv"
            )
        return x.T.view_as(z)

    def reconstruction_loss(self, x: Tensor, symmetric: bool = False, only_r: bool = False) -> Tensor:
        """mean_B ||x - R W x||^2, without the bias and with x detached.

        symmetric: the average with ||W x - W R W x||^2, its target detached. only_r: no gradient to W through W x.
        """
        x = x.detach()
        y = F.conv2d(x, self.weight, padding=self.padding)
        if only_r:
            y = y.detach()
        back = F.conv2d(y, self.inverse, padding=self.padding)
        loss = (x - back).square().flatten(1).sum(1).mean()
        if symmetric:
            again = F.conv2d(back, self.weight, padding=self.padding)
            loss = (loss + (y.detach() - again).square().flatten(1).sum(1).mean()) / 2
        return loss


class SelfNormFC(SelfNormConv):
    """`SelfNormConv` of kernel 1 on flattened inputs: (B, ...) -> (B, D)."""

    def __init__(self, features: int):
        super().__init__(features, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z, log_det = super().forward(x.flatten(1)[:, :, None, None])
        return z[:, :, 0, 0], log_det

    def reverse(self, z: Tensor) -> Tensor:
        return super().reverse(z[:, :, None, None])[:, :, 0, 0]

    def reconstruction_loss(self, x: Tensor, symmetric: bool = False, only_r: bool = False) -> Tensor:
        return super().reconstruction_loss(x.flatten(1)[:, :, None, None], symmetric, only_r)
