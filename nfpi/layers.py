"""The layers of the flow: coupling net, ActNorm, 1x1 convolution, coupling, the prior of split-off halves.

Enescu & Sahbi, BMVC 2024; the layers are those of "Generative Flows with Matrix Exponential" (Xiao & Liu, ICML 2020).
Every invertible layer has `forward(x) -> (y, log_det (B,))`, `inverse(y) -> x`, and `initialise(x) -> y`, the
data-dependent initialisation from one batch. Parameter names are those of the published checkpoints.
Letters: B batch, C channels, H x W image, h x w feature map, P = h w, n transformed channels.
"""

import math
from typing import Literal, get_args

import numpy as np
import scipy.linalg
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from common.errors import UserError
from common.launch import autocast
from common.layers import elu
from nfpi.matrix_exp import expm, expm_action, phi_action

ConvType = Literal["matrixexp", "standard", "decomposition"]
FlowType = Literal["matrixexp", "affine", "additive"]
CONV_TYPES, FLOW_TYPES = get_args(ConvType), get_args(FlowType)
ANY_KERNEL = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
RANK = 3  # of the low-rank coupling
FULL_RANK_LIMIT = 24  # more transformed channels than this: low rank
EPS = 1e-8
SQUARINGS = 10  # of exp(W): norms up to 512; a bound that is known beforehand saves asking the device


# ---------------------------------------------------------------- maps between images and the flow's input


def preprocess(x: Tensor, noise: Tensor | float = 0.0, bits: int = 8) -> Tensor:
    """Dequantise images: x in [0, 1] and noise in [0, 1) -> [-1, 1]; `bits` < 8 drops the low bits first."""
    levels = 2**bits
    t = 255 * x
    if bits < 8:
        t = torch.floor(t / (256 // levels))
    return ((t + noise) / levels - 0.5) / 0.5


def postprocess(z: Tensor, bits: int = 8) -> Tensor:
    """The image in [0, 1] of a flow input in [-1, 1]: exact inverse of `preprocess` on whole grey levels."""
    levels = 2**bits
    t = torch.floor((z * 0.5 + 0.5) * levels) * (256 // levels)
    return t.clamp(0, 255) / 255


def squeeze2d(x: Tensor) -> Tensor:
    """(B, C, H, W) -> (B, 4C, H/2, W/2); channel = (2 row offset + column offset) C + c."""
    b, c, h, w = x.shape
    x = x.reshape(b, c, h // 2, 2, w // 2, 2)
    return x.permute(0, 3, 5, 1, 2, 4).reshape(b, 4 * c, h // 2, w // 2)


def unsqueeze2d(x: Tensor) -> Tensor:
    """(B, 4C, h, w) -> (B, C, 2h, 2w): inverse of `squeeze2d`."""
    b, c, h, w = x.shape
    x = x.reshape(b, 2, 2, c // 4, h, w)
    return x.permute(0, 3, 4, 1, 5, 2).reshape(b, c // 4, 2 * h, 2 * w)


def split2d(x: Tensor) -> tuple[Tensor, Tensor]:
    """The first and the last half of the channels."""
    half = x.shape[1] // 2
    return x[:, :half], x[:, half:]


# ---------------------------------------------------------------- the coupling net


class Norm(nn.Module):
    """A learned scale and shift a channel, set once from the data; it keeps no running statistics."""

    def __init__(self, channels: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(channels, 1, 1))
        self.shift = nn.Parameter(torch.zeros(channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """scale x + shift, (B, C, h, w)."""
        return x * self.scale + self.shift

    @torch.no_grad()
    def initialise(self, x: Tensor, init_scale: float = 1.0) -> Tensor:
        """Set scale and shift so that every channel of `x` gets mean 0 and standard deviation `init_scale`."""
        std, mean = torch.std_mean(x, dim=(0, 2, 3), keepdim=True)
        scale = init_scale / (std + EPS)
        self.scale.copy_(scale[0])
        self.shift.copy_((-mean * scale)[0])
        return self(x)


class Conv2d(nn.Module):
    """A convolution without bias, then `Norm`, then ELU when `activation`; computed as one biased convolution."""

    def __init__(self, in_channels: int, out_channels: int, kernel: int, activation: bool):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel, padding=kernel // 2, bias=False)
        nn.init.kaiming_uniform_(self.conv.weight, a=0)
        self.norm = Norm(out_channels)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, h, w) -> (B, C_out, h, w)."""
        weight = self.conv.weight * self.norm.scale[..., None]  # the scale of an output channel commutes with the sum
        y = F.conv2d(x, weight, self.norm.shift[:, 0, 0], padding=self.conv.padding)
        return elu(y) if self.activation else y

    @torch.no_grad()
    def initialise(self, x: Tensor, init_scale: float = 1.0) -> Tensor:
        """Divide each filter by the standard deviation of its output, then set the norm from the new output."""
        std = self(x).std(dim=(0, 2, 3))
        self.conv.weight.div_(std[:, None, None, None] + EPS)
        y = self.norm.initialise(self.conv(x), init_scale)
        return elu(y) if self.activation else y


class Block(nn.Module):
    """Residual block 3x3 - ELU - 1x1 - ELU - 3x3, + identity, ELU; its branch starts at zero."""

    def __init__(self, channels: int):
        super().__init__()
        # the activations are the block's own, not the convolutions': the initialisation sees outputs without them
        self.conv1 = Conv2d(channels, channels, 3, activation=False)
        self.conv2 = Conv2d(channels, channels, 1, activation=False)
        self.conv3 = Conv2d(channels, channels, 3, activation=False)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> the same shape."""
        y = elu(self.conv1(x))
        y = elu(self.conv2(y))
        return elu(self.conv3(y) + x)

    @torch.no_grad()
    def initialise(self, x: Tensor) -> Tensor:
        """Set the three convolutions in order; the last one's scale is 0."""
        y = elu(self.conv2.initialise(elu(self.conv1.initialise(x))))
        return elu(self.conv3.initialise(y, init_scale=0.0) + x)


def qkv_attention(qkv: Tensor, heads: int) -> Tensor:
    """Softmax attention over the positions: (B, 3C, P), channels (head, qkv, C/heads) -> (B, C, P)."""
    b, width, positions = qkv.shape
    size = width // (3 * heads)
    q, k, v = qkv.reshape(b, heads, 3, size, positions).unbind(2)
    # the memory-efficient kernel's gradient varies from run to run on a GPU
    kernels = [SDPBackend.MATH] if torch.are_deterministic_algorithms_enabled() else list(ANY_KERNEL)
    with sdpa_kernel(kernels):
        out = F.scaled_dot_product_attention(q.transpose(2, 3), k.transpose(2, 3), v.transpose(2, 3))
    return out.transpose(2, 3).reshape(b, heads * size, positions)


class AttentionBlock(nn.Module):
    """x + proj(attention(qkv(GroupNorm(x)))) with one group a channel; the identity at the start.

    The published code fixes 6 heads, which MNIST's 20 channels cannot take: the largest divisor of `channels` that is
    at most 6 is used.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.heads = max(h for h in range(1, 7) if channels % h == 0)
        self.norm = nn.GroupNorm(channels, channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)
        nn.init.zeros_(self.proj_out.weight)
        nn.init.zeros_(self.proj_out.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> the same shape."""
        flat = x.flatten(2)  # (B, C, h w)
        out = self.proj_out(qkv_attention(self.qkv(self.norm(flat)), self.heads))
        return (flat + out).view_as(x)


class ConvBlock(nn.Module):
    """The net of a coupling layer: Conv2d, `num_blocks` residual blocks, a zero-initialised 3x3 convolution, and
    optionally attention. With `amp` it computes in bfloat16 in training mode.
    """

    amp = False

    def __init__(self, in_channels: int, out_channels: int, hidden: int, num_blocks: int, attention: bool = False):
        super().__init__()
        first = Conv2d(in_channels, hidden, 3, activation=True)
        self.layers = nn.ModuleList([first, *(Block(hidden) for _ in range(num_blocks))])
        self.out_layer = nn.Conv2d(hidden, out_channels, 3, padding=1)
        nn.init.zeros_(self.out_layer.weight)
        nn.init.zeros_(self.out_layer.bias)
        self.attention_block_after = AttentionBlock(out_channels) if attention else None

    def forward(self, x: Tensor) -> Tensor:
        """(B, in_channels, h, w) -> (B, out_channels, h, w)."""
        dtype = x.dtype
        with autocast(x.device, self.amp and self.training):
            for layer in self.layers:
                x = layer(x)
            x = self.out_layer(x)
            x = x if self.attention_block_after is None else self.attention_block_after(x)
        return x.to(dtype)

    @torch.no_grad()
    def initialise(self, x: Tensor) -> Tensor:
        """Set the hidden layers in order; the output layer stays as it is."""
        for layer in self.layers:
            x = layer.initialise(x)
        x = self.out_layer(x)
        return x if self.attention_block_after is None else self.attention_block_after(x)


# ---------------------------------------------------------------- the invertible layers


class ActNorm(nn.Module):
    """y = softplus(s) x + b with one scale and one shift an element (C, h, w), not a channel."""

    MAX_GAIN = 1e4  # a constant pixel has no standard deviation; its gain stops here

    def __init__(self, shape: tuple[int, int, int]):
        super().__init__()
        self.scale = nn.Parameter(torch.full(shape, math.log(math.e - 1)))  # softplus^-1(1)
        self.shift = nn.Parameter(torch.zeros(shape))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, h, w) -> (y, log_det (B,))."""
        gain = F.softplus(self.scale)
        return x * gain + self.shift, gain.log().sum().expand(x.shape[0])

    def inverse(self, y: Tensor) -> Tensor:
        """(B, C, h, w) -> x."""
        return (y - self.shift) / F.softplus(self.scale)

    @torch.no_grad()
    def initialise(self, x: Tensor) -> Tensor:
        """Set scale and shift so that every element of the batch gets mean 0 and standard deviation 1."""
        std, mean = torch.std_mean(x, dim=0)
        gain = (1 / (std + EPS)).clamp_max(self.MAX_GAIN)
        # log(exp(g) - 1) overflows float32 from g = 88.7 on; this form does not
        self.scale.copy_(gain + torch.log(-torch.expm1(-gain)))
        self.shift.copy_(-mean * gain)
        return self(x)[0]


class Conv1x1(nn.Module):
    """An invertible C x C matrix on every pixel's channels.

    `matrixexp`: exp(W), log-det tr(W) h w. `standard`: W. `decomposition`: P L (U) with a fixed permutation.
    All start at a random rotation (numpy's global generator).
    """

    def __init__(self, channels: int, conv_type: str = "matrixexp"):
        from scipy.stats import special_ortho_group  # here, as it takes a second to import

        super().__init__()
        self.conv_type = conv_type
        rotation = special_ortho_group.rvs(channels) if channels > 1 else np.ones((1, 1))
        if conv_type == "matrixexp":
            self.weight = nn.Parameter(_float(scipy.linalg.logm(rotation).real))
        elif conv_type == "standard":
            self.weight = nn.Parameter(_float(rotation))
        elif conv_type == "decomposition":
            p, lower, upper = scipy.linalg.lu(rotation)
            self.register_buffer("p", _float(p))
            self.l = nn.Parameter(_float(np.tril(lower, -1)))
            self.u = nn.Parameter(_float(upper))
        else:
            raise UserError(f"conv_type={conv_type}: expected one of {', '.join(CONV_TYPES)}")

    def matrices(self, inverse: bool = False) -> Tensor:
        """The C x C matrix that multiplies the channels, or its inverse."""
        if self.conv_type == "matrixexp":
            return expm(-self.weight if inverse else self.weight, SQUARINGS)
        if self.conv_type == "standard":
            return torch.linalg.inv(self.weight) if inverse else self.weight
        lower = torch.tril(self.l, -1) + torch.eye(len(self.l), dtype=self.l.dtype, device=self.l.device)
        upper = torch.triu(self.u)
        if not inverse:
            return self.p @ lower @ upper
        half = torch.linalg.solve_triangular(lower, self.p.T, upper=False, unitriangular=True)
        return torch.linalg.solve_triangular(upper, half, upper=True)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """(B, C, h, w) -> (y, log_det (B,))."""
        if self.conv_type == "matrixexp":
            log_det = torch.trace(self.weight)
        elif self.conv_type == "standard":
            log_det = torch.linalg.slogdet(self.weight)[1]
        else:
            log_det = self.u.diagonal().abs().log().sum()
        y = (self.matrices() @ x.flatten(2)).view_as(x)
        return y, (log_det * x.shape[2] * x.shape[3]).expand(x.shape[0])

    def inverse(self, y: Tensor) -> Tensor:
        """(B, C, h, w) -> x."""
        return (self.matrices(inverse=True) @ y.flatten(2)).view_as(y)

    @torch.no_grad()
    def initialise(self, x: Tensor) -> Tensor:
        """The output; nothing depends on the data here."""
        return self(x)[0]


class CouplingLayer(nn.Module):
    """Transforms the last C//2 channels x2 by a function of the others, x1.

    `additive` x2 + net(x1); `affine` exp(a) x2 + t; `matrixexp` exp(A) x2 + t at every pixel, A of full rank up to 24
    channels and of rank 3 above. a, A, and the factors of a low-rank A are rho tanh(sigma r + tau) + eta.
    """

    def __init__(
        self, channels: int, hidden: int, num_blocks: int, flow_type: str = "matrixexp", attention: bool = False
    ):
        super().__init__()
        if flow_type not in FLOW_TYPES:
            raise UserError(f"flow_type={flow_type}: expected one of {', '.join(FLOW_TYPES)}")
        self.n = n = channels // 2
        self.kept = channels - n
        self.flow_type = "lowrank" if flow_type == "matrixexp" and n > FULL_RANK_LIMIT else flow_type
        groups = {"additive": 1, "affine": 2, "matrixexp": n + 1, "lowrank": 2 * RANK + 1}[self.flow_type]
        if flow_type != "additive":
            self.scale = nn.Parameter(torch.tensor([1 / 8]))  # sigma
            self.shift = nn.Parameter(torch.zeros(1))  # tau
            self.rescale = nn.Parameter(torch.tensor([1.0 if flow_type == "affine" else 1 / n]))  # rho
            self.reshift = nn.Parameter(torch.zeros(1))  # eta
        self.net = ConvBlock(self.kept, groups * n, hidden, num_blocks, attention)

    def norm_bound(self, reach: float = 0.0) -> Tensor:
        """An upper bound of the row norm of every A (of W1 W2 when A has low rank), also after weights have moved by
        `reach`: how many Taylor terms are due.
        """
        entry = self.rescale.detach().abs() + self.reshift.detach().abs() + EPS + 2 * reach
        return self.n * entry if self.flow_type == "matrixexp" else RANK * self.n * entry**2

    def _bounded(self, r: Tensor) -> Tensor:
        return self.rescale * torch.tanh(self.scale * r + self.shift) + self.reshift

    def _low_rank(self, r: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """W1 and W2^T, both (B, 3, n, P), and W1 W2 (B, 3, 3, P)."""
        w1, w2 = (self._bounded(r) + EPS).view(r.shape[0], 2, RANK, self.n, -1).unbind(1)
        return w1, w2, torch.einsum("binp,bjnp->bijp", w1, w2)

    def _act(self, r: Tensor, x2: Tensor, sign: int, bound: float | None) -> tuple[Tensor, Tensor]:
        """(exp(sign A) x2, log-det of exp(A) (B,)) with A given by the net's output r."""
        b, n = x2.shape[0], self.n
        if self.flow_type == "affine":
            a = self._bounded(r)
            return torch.exp(sign * a) * x2, a.flatten(1).sum(1)
        bound = float(self.norm_bound()) if bound is None else bound
        x = x2.reshape(b, n, -1)  # (B, n, P), P = h w
        if self.flow_type == "matrixexp":
            # the net gives columns: (B, j, i, P) -> (B, i, j, P)
            a = self._bounded(r).view(b, n, n, -1).transpose(1, 2)
            y = expm_action(a if sign > 0 else -a, x, bound)
            log_det = a.diagonal(dim1=1, dim2=2).sum((1, 2))
        else:
            w1, w2, w12 = self._low_rank(r)
            u = phi_action(sign * w12, (w1 * x[:, None]).sum(2), bound)  # exp(A) x = x + W2 phi(W1 W2) W1 x
            y = x + sign * (w2 * u[:, :, None]).sum(1)
            log_det = w12.diagonal(dim1=1, dim2=2).sum((1, 2))
        return y.view_as(x2), log_det

    def forward(self, x: Tensor, bound: float | None = None) -> tuple[Tensor, Tensor]:
        """(B, C, h, w) -> (y, log_det (B,)); `bound` is `float(norm_bound())` where the caller has it."""
        x1, x2 = x[:, : self.kept], x[:, self.kept :]
        out = self.net(x1)
        if self.flow_type == "additive":
            return torch.cat([x1, x2 + out], 1), x.new_zeros(x.shape[0])
        t, r = out[:, : self.n], out[:, self.n :]
        y2, log_det = self._act(r, x2, 1, bound)
        return torch.cat([x1, y2 + t], 1), log_det

    def inverse(self, y: Tensor, bound: float | None = None) -> Tensor:
        """(B, C, h, w) -> x."""
        y1, y2 = y[:, : self.kept], y[:, self.kept :]
        out = self.net(y1)
        if self.flow_type == "additive":
            return torch.cat([y1, y2 - out], 1)
        t, r = out[:, : self.n], out[:, self.n :]
        return torch.cat([y1, self._act(r, y2 - t, -1, bound)[0]], 1)

    @torch.no_grad()
    def initialise(self, x: Tensor) -> Tensor:
        """Set the net from x1 and return the layer's output."""
        self.net.initialise(x[:, : self.kept])
        return self(x)[0]


# ---------------------------------------------------------------- priors of split-off halves


def gaussian_log_p(x: Tensor, mean: Tensor, log_sd: Tensor) -> Tensor:
    """Elementwise log N(x; mean, exp(log_sd)^2)."""
    return -0.5 * (math.log(2 * math.pi) + ((x - mean) * torch.exp(-log_sd)) ** 2) - log_sd


class ZeroConv2d(nn.Module):
    """The split prior: (mean, log_sd) of the second half from the first; 3x3 on a border of ones, starts at zero."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, 3)
        nn.init.zeros_(self.conv.weight)
        nn.init.zeros_(self.conv.bias)
        self.scale = nn.Parameter(torch.zeros(1, out_channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, h, w) -> (B, C_out, h, w)."""
        return self.conv(F.pad(x, (1, 1, 1, 1), value=1.0)) * torch.exp(3 * self.scale)

    def log_prob(self, out: Tensor, half: Tensor) -> Tensor:
        """log p(half | out), summed over the elements: (B,)."""
        mean, log_sd = self(out).chunk(2, 1)
        return gaussian_log_p(half, mean, log_sd).flatten(1).sum(1)

    def sample(self, out: Tensor, eps: Tensor, temperature: float = 1.0) -> Tensor:
        """mean + temperature sd eps, with eps a standard normal draw of the half's shape."""
        mean, log_sd = self(out).chunk(2, 1)
        return mean + temperature * torch.exp(log_sd) * eps


def _float(array: np.ndarray) -> Tensor:
    return torch.tensor(np.ascontiguousarray(array), dtype=torch.get_default_dtype())
