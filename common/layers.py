"""Layers that compute what PyTorch's own do, by operations that are faster on a CPU; on a GPU they are PyTorch's."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad


def on_cpu(x: Tensor) -> bool:
    """Whether a CPU computes with x now: a compiler or an export sees PyTorch's own layers."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


class ConvTranspose2d(nn.ConvTranspose2d):
    """nn.ConvTranspose2d that adds its bias after the convolution.

    With channels last oneDNN's gradient of a bias is slow; the sum over pixels that replaces it is not. In whole steps:
    `python -m glancenet.benchmark --cases glancenet`, whose published form is nn.ConvTranspose2d.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, H', W')."""
        if self.bias is None or not on_cpu(x):
            return super().forward(x)
        y = F.conv_transpose2d(
            x, self.weight, None, self.stride, self.padding, self.output_padding, self.groups, self.dilation
        )
        return y.add_(self.bias.to(y.dtype)[:, None, None])  # of one type: else the sum is made in float32


class PatchConv2d(nn.Conv2d):
    """nn.Conv2d with an odd kernel that keeps the size, as a 1x1 convolution of patches: C k k channels.

    For few channels and many outputs, where oneDNN's convolution is slow. In whole steps: `python -m
    inv_flow.benchmark`, whose published form is nn.Conv2d.
    """

    def __init__(self, channels_in: int, channels_out: int, kernel: int, bias: bool = True):
        super().__init__(channels_in, channels_out, kernel, padding=kernel // 2, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, H, W)."""
        if not on_cpu(x):
            return super().forward(x)
        patches = F.unfold(x, self.kernel_size, padding=self.padding).unflatten(2, x.shape[2:])
        patches = patches.contiguous(memory_format=torch.channels_last)
        return F.conv2d(patches, self.weight.flatten(1)[..., None, None], self.bias)


class _Elu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        y = x.clamp(max=0).float().exp_().sub_(1)
        # exp(x) - 1 > x but for its rounding, which the maximum takes away where it is below
        y = torch.maximum(x, y.to(x.dtype))
        ctx.save_for_backward(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return torch.ops.aten.elu_backward(grad, 1.0, 1.0, 1.0, True, *ctx.saved_tensors)


def in_parts(net: nn.Module, x: Tensor, width: int) -> Tensor:
    """net(x) for images x (B, C, h, w) and a network that treats each image alone, on parts of the batch on a CPU.

    A part's widest activation, of `width` channels on h x w pixels, takes at most 8 MiB of float32 and stays in the
    cache from layer to layer.
    """
    if not on_cpu(x):
        return net(x)
    parts = math.ceil(width * math.prod(x[:, 0].shape) / 2**21)
    return torch.cat([net(images) for images in x.chunk(parts)]) if parts > 1 else net(x)


def elu(x: Tensor) -> Tensor:
    """F.elu(x), within 1e-7 in float32: x where x > 0, else exp(x) - 1. It may overwrite x.

    PyTorch's goes through expm1, which is slow with AVX-512: compare `torch.expm1(x)` and `torch.exp(x)` by
    `python -m timeit -s "import torch; torch.set_num_threads(1); x = torch.randn(2**19)" "torch.expm1(x)"`.
    """
    transformed = torch._C._functorch.is_functorch_wrapped_tensor(x) or forward_ad._current_level >= 0
    if on_cpu(x) and x.dtype in (torch.float32, torch.bfloat16) and not transformed:
        return _Elu.apply(x)
    return F.elu(x, inplace=not (transformed or (x.is_leaf and x.requires_grad)))
