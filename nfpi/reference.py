"""One training step as the published code computes it, on our modules: the yardstick of the benchmark.

Convolution, norm and activation are apart; exponentials are full matrices a pixel, the host is asked once a term; and
the likelihood goes class by class. The 1x1 convolutions and couplings are those of the shipped configurations.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.distributions import Independent, Normal

from nfpi.gaussians import ClassGaussians, dequantisation_log_det
from nfpi.layers import EPS, RANK, Block, Conv2d, CouplingLayer, split2d, squeeze2d, unsqueeze2d
from nfpi.model import FlowStep, MultiScaleFlow


def largest(x: Tensor) -> float:
    """The largest row sum of absolute entries of all matrices (..., n, n)."""
    return x.norm(p=1, dim=-1).max().item()


def expm_plain(x: Tensor) -> Tensor:
    """exp(x) of (..., n, n): one scale for all matrices, terms until all are below 1e-8, squarings."""
    squarings = math.ceil(math.log2(max(largest(x), 0.5))) + 1
    x = x / 2**squarings
    total, term, k = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device), x, 2
    while largest(term) > EPS:
        total, term, k = total + term, x @ term / k, k + 1
    for _ in range(squarings):
        total = total @ total
    return total


def phi_plain(x: Tensor) -> Tensor:
    """sum_k x^k / (k+1)! of (..., n, n)."""
    total, term, k = torch.eye(x.shape[-1], dtype=x.dtype, device=x.device), x / 2, 3
    while largest(term) > EPS:
        total, term, k = total + term, x @ term / k, k + 1
    return total


def convolution(layer: Conv2d, x: Tensor) -> Tensor:
    """Convolution, then scale and shift."""
    return layer.norm(layer.conv(x))


def net(layer: CouplingLayer, x: Tensor) -> Tensor:
    """The coupling layer's net."""
    for part in layer.net.layers:
        if isinstance(part, Block):
            y = F.elu(convolution(part.conv2, F.elu(convolution(part.conv1, x))))
            x = F.elu(convolution(part.conv3, y) + x)
        else:
            x = F.elu(convolution(part, x))
    x = layer.net.out_layer(x)
    return x if layer.net.attention_block_after is None else layer.net.attention_block_after(x)


def coupling(layer: CouplingLayer, x: Tensor) -> tuple[Tensor, Tensor]:
    """exp(A) x2 + t with a full matrix at every pixel: (B, C, h, w) -> (y, log_det (B,))."""
    x1, x2 = x[:, : layer.kept], x[:, layer.kept :]
    t, *groups = net(layer, x1).chunk(layer.n + 1 if layer.flow_type == "matrixexp" else 2 * RANK + 1, 1)

    def bounded(rows: list[Tensor]) -> Tensor:
        entries = torch.stack(rows, 2).permute(0, 3, 4, 1, 2)  # (B, h, w, n, rows)
        return layer.rescale * torch.tanh(layer.scale * entries + layer.shift) + layer.reshift

    if layer.flow_type == "matrixexp":
        a = bounded(groups)
        matrix, log_det = expm_plain(a), a.diagonal(dim1=-2, dim2=-1).sum((1, 2, 3))
    else:
        left, right = bounded(groups[:RANK]).transpose(-1, -2) + EPS, bounded(groups[RANK:]) + EPS
        small = left @ right
        matrix = torch.eye(layer.n, device=x.device) + right @ phi_plain(small) @ left
        log_det = small.diagonal(dim1=-2, dim2=-1).sum((1, 2, 3))
    y2 = (matrix @ x2.permute(0, 2, 3, 1)[..., None])[..., 0].permute(0, 3, 1, 2) + t
    return torch.cat([x1, y2], 1), log_det


def flow_step(step: FlowStep, x: Tensor) -> tuple[Tensor, Tensor]:
    """ActNorm, 1x1 convolution, coupling."""
    gain = F.softplus(step.actnorm.scale)
    x = gain * x + step.actnorm.shift
    weight = step.conv1x1.weight
    x = F.conv2d(x, expm_plain(weight)[:, :, None, None])
    log_det = gain.log().sum() + weight.diagonal().sum() * x.shape[2] * x.shape[3]
    y, change = coupling(step.couplinglayer, x)
    return y, log_det + change


def loss(flow: MultiScaleFlow, gaussians: ClassGaussians, x: Tensor, y: Tensor, bits: int = 8) -> Tensor:
    """Mean of -log p(x | y) over the batch, `all_levels`: x (B, C, H, W) in [-1, 1], y (B,)."""
    log_det, halves = x.new_zeros(len(x)), []
    for level, steps in enumerate(flow.blocks):
        x = squeeze2d(x)
        for step in steps:
            x, change = flow_step(step, x)
            log_det = log_det + change
        if level < len(flow.blocks) - 1:
            x, half = split2d(x)
            halves.append(half)
    x = unsqueeze2d(x)
    while halves:
        x = unsqueeze2d(torch.cat([x, halves.pop()], 1))
    z = x.flatten(1)
    classes = torch.bincount(y.cpu()).nonzero().flatten().tolist()
    parts = [(y == k).nonzero().flatten() for k in classes]
    densities = [
        Independent(Normal(gaussians.mean[k], gaussians.var[k].sqrt()), 1).log_prob(z[part])
        for k, part in zip(classes, parts, strict=True)
    ]
    log_p = torch.cat(densities).sum() + log_det.sum()
    return -(log_p / len(z) + dequantisation_log_det(flow.config.dim, bits))
