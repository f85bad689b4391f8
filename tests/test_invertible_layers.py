"""The contract of every invertible layer of the repository, and of whole flows.

Shapes, the inverse, the log-determinant against autograd's Jacobian in float64, a finite gradient in every parameter,
agreement of training and evaluation, a state_dict round trip, and independence of the samples in a batch.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from nfpi_layer_cases import contract_cases
from torch import Tensor, nn

from inv_flow.layers import activations as act
from inv_flow.layers.actnorm import ActNorm
from inv_flow.layers.conv1x1 import Conv1x1, Conv1x1Householder
from inv_flow.layers.convexp import ConvExp
from inv_flow.layers.coupling import Coupling, SplitPrior
from inv_flow.layers.emerging import Emerging, Flip2d, SquareAutoRegressiveConv2d
from inv_flow.layers.flow import FlowSequential
from inv_flow.layers.inv_conv import InverseConv2d, InverseConvUnit, MaskedConv2d
from inv_flow.layers.preprocess import LogitTransform, Normalization, SigmoidTransform, Squeeze, UnSqueeze
from inv_flow.layers.selfnorm import SelfNormConv, SelfNormFC
from nfpi.model import FlowConfig, MultiScaleFlow


@dataclass
class Case:
    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...]  # of one sample
    domain: str = "real"  # or "unit": inputs in (0, 1)
    inverse_tolerance: float = 1e-8
    train_tolerance: float = 1e-10  # how far training and evaluation may differ


def exact(layer: nn.Module) -> nn.Module:
    layer.exact = True
    return layer


def glow_step(channels: int, conv: nn.Module | None) -> list[nn.Module]:
    extra = [] if conv is None else [conv]
    return [ActNorm(channels), *extra, act.SmoothLeakyRelu(0.3), Conv1x1(channels), Coupling(channels, 6)]


def tiny_flow(inverse_conv: bool) -> FlowSequential:
    def conv(channels: int, order: str) -> nn.Module | None:
        return InverseConv2d(channels, 3, order) if inverse_conv else None

    levels = [Squeeze(), *glow_step(4, conv(4, "TL")), SplitPrior(4, 6), Squeeze(), *glow_step(8, conv(8, "BR"))]
    return FlowSequential([Normalization(0.0, 4.0), Normalization(-1e-6, 1 / (1 - 2e-6)), LogitTransform(), *levels])


IMAGE = (4, 4, 6)
CASES = [
    Case("Normalization", lambda: Normalization(0.5, 3.0), IMAGE),
    Case("LogitTransform", LogitTransform, IMAGE, domain="unit"),
    Case("SigmoidTransform", SigmoidTransform, IMAGE),
    Case("Squeeze", Squeeze, IMAGE),
    Case("UnSqueeze", UnSqueeze, IMAGE),
    Case("ActNorm", lambda: ActNorm(4), IMAGE),
    Case("ActNorm-2d", lambda: ActNorm(6), (6,)),
    Case("Conv1x1", lambda: Conv1x1(4), IMAGE),
    Case("Householder", lambda: Conv1x1Householder(4), IMAGE),
    Case("Coupling-small", lambda: Coupling(4, 6, "small"), IMAGE),
    Case("Coupling-snf", lambda: Coupling(4, 6, "snf"), IMAGE),
    Case("Flip2d", Flip2d, IMAGE),
    Case("AutoRegressive", lambda: SquareAutoRegressiveConv2d(4), IMAGE),
    Case("Emerging", lambda: Emerging(4), IMAGE),
    Case("ConvExp", lambda: ConvExp(IMAGE), IMAGE, train_tolerance=1e-3),
    Case("ConvExp-maps", lambda: ConvExp(IMAGE, add_maps=True), IMAGE, train_tolerance=1e-3),
    Case("SelfNorm-1", lambda: exact(SelfNormConv(4, 1)), IMAGE),
    Case("SelfNorm-3", lambda: exact(SelfNormConv(4, 3)), IMAGE),
    Case("SelfNormFC", lambda: exact(SelfNormFC(7)), (7,)),
    Case("InverseConv-TL", lambda: InverseConv2d(4, 3, "TL"), IMAGE),
    Case("InverseConv-TR", lambda: InverseConv2d(4, 2, "TR", groups=2), IMAGE),
    Case("InverseConv-BL", lambda: InverseConv2d(4, (2, 3), "BL"), IMAGE),
    Case("InverseConv-BR", lambda: InverseConv2d(4, 3, "BR", max_row_sum=0.9), IMAGE),
    Case("MaskedConv", lambda: MaskedConv2d(4, 3, "TR"), IMAGE),
    Case("InverseConvUnit", lambda: InverseConvUnit(4, 3), IMAGE),
    Case("InverseConvUnit-split", lambda: InverseConvUnit(4, 3, split=True), IMAGE),
    Case("Identity", act.Identity, IMAGE),
    Case("SLR", act.SmoothLeakyRelu, IMAGE),
    Case("LeakyRelu", act.LeakyRelu, IMAGE),
    Case("LLR", act.LearnableLeakyRelu, IMAGE),
    Case("SmoothTanh", act.SmoothTanh, IMAGE),
    Case("SELU", act.SELU, IMAGE),
    Case("Spline-shared", lambda: act.SplineActivation(IMAGE, 5, 2.0), IMAGE),
    Case("Spline-individual", lambda: act.SplineActivation(IMAGE, 4, 1.5, individual_weights=True), IMAGE),
    Case("flow-glow", lambda: tiny_flow(False), (1, 8, 8), domain="unit", inverse_tolerance=1e-7),
    Case("flow-inverse-conv", lambda: tiny_flow(True), (1, 8, 8), domain="unit", inverse_tolerance=1e-7),
]
CASES += [Case(name, make, shape[1:], inverse_tolerance=1e-7) for name, make, shape in contract_cases()]


class WithSplitPriors(nn.Module):
    """A whole NFPI flow with split priors as a bijection: images <-> (latent, the split-off halves as their priors'
    standard normal noise).
    """

    def __init__(self, **options):
        super().__init__()
        small = {"channels": 1, "height": 8, "width": 8, "flows": (1, 1, 1), "blocks": (1, 1, 1), "hidden": (4, 4, 4)}
        self.flow = MultiScaleFlow(FlowConfig(**small, **options))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        priors = []  # (mean, log_sd) of each split, as the flow computes them
        hooks = [
            prior.register_forward_hook(lambda layer, args, out: priors.append(out.chunk(2, 1)))
            for prior in self.flow.split_coupling_priors
        ]
        z, log_det, _, halves = self.flow(x)
        for hook in hooks:
            hook.remove()
        noise = [(half - mean) / log_sd.exp() for half, (mean, log_sd) in zip(halves, priors, strict=True)]
        self.shapes = [part.shape[1:] for part in noise]
        scales = sum(log_sd.flatten(1).sum(1) for _, log_sd in priors)
        return torch.cat([z, *(part.flatten(1) for part in noise)], 1), log_det - scales

    def inverse(self, y: Tensor) -> Tensor:
        sizes = [self.flow.config.latent_dim, *(shape.numel() for shape in self.shapes)]
        z, *noise = y.split(sizes, 1)
        eps = [part.view(-1, *shape) for part, shape in zip(noise, self.shapes, strict=True)]
        return self.flow.inverse(z, eps=eps[::-1])


CASES += [
    Case("nfpi.spcb", lambda: WithSplitPriors(level_method="spcb"), (1, 8, 8), inverse_tolerance=1e-7),
    Case(
        "nfpi.all_levels_idx",
        lambda: WithSplitPriors(level_method="all_levels_idx", level_idx=2, flow_type="additive"),
        (1, 8, 8),
        inverse_tolerance=1e-7,
    ),
]


def build(case: Case) -> nn.Module:
    """The case's layer in float64, data-dependent parts initialised, every parameter moved off its initial value."""
    torch.manual_seed(0)
    layer = case.make().double()
    layer(inputs(case, 8))
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return layer


def inputs(case: Case, batch: int = 3) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(batch, *case.shape, dtype=torch.float64, generator=generator)
    return 0.02 + 0.96 * torch.sigmoid(x) if case.domain == "unit" else x


def encode(layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """(the latent as one (B, D) tensor, log-determinant (B,))."""
    if isinstance(layer, FlowSequential):
        latents, log_det = layer.encode(x)
        return torch.cat([z.flatten(1) for z in latents], dim=1), log_det
    z, log_det = layer(x)
    return z.flatten(1), log_det


def decode(layer: nn.Module, x: Tensor) -> Tensor:
    if isinstance(layer, FlowSequential):
        return layer.decode(layer.encode(x)[0])
    inverse = layer.reverse if hasattr(layer, "reverse") else layer.inverse
    return inverse(layer(x)[0])


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_contract(case):
    layer, x = build(case), inputs(case)

    # training and evaluation agree; what follows is checked in evaluation mode
    z_train, log_det_train = encode(layer.train(), x)
    layer.eval()
    z, log_det = encode(layer, x)
    assert torch.allclose(z_train, z, atol=case.train_tolerance, rtol=case.train_tolerance)
    assert torch.allclose(log_det_train, log_det, atol=case.train_tolerance, rtol=case.train_tolerance)

    # shapes: a bijection keeps the number of values, and every sample has its own log-determinant
    assert z.shape == (len(x), x[0].numel())
    assert log_det.shape == (len(x),)

    # the inverse
    back = decode(layer, x)
    assert back.shape == x.shape
    assert (back - x).abs().max() < case.inverse_tolerance

    # the log-determinant of each sample is that of autograd's Jacobian
    for i in range(2):
        jacobian = torch.autograd.functional.jacobian(lambda v: encode(layer, v)[0].flatten(), x[i : i + 1])
        expected = torch.linalg.slogdet(jacobian.reshape(z.shape[1], -1))[1]
        assert abs(float(expected - log_det[i].detach())) < 1e-8 * max(1.0, abs(float(expected)))

    # a finite gradient in every parameter, not all zero
    layer.train()
    layer.zero_grad()
    z_train, log_det_train = encode(layer, x.requires_grad_())
    (z_train.square().sum() / 2 - log_det_train.sum()).backward()
    x = x.detach()
    for name, parameter in layer.named_parameters():
        if name.endswith(
            "inverse"
        ):  # the learned inverse of a self-normalising layer: its gradient is the modified one's
            continue
        assert parameter.grad is not None, name
        assert torch.isfinite(parameter.grad).all(), name
        assert parameter.grad.abs().sum() > 0, name
    layer.eval()

    # a state_dict round trip into a fresh layer
    fresh = case.make().double()
    fresh.load_state_dict(copy.deepcopy(layer.state_dict()))
    fresh.eval()
    assert torch.equal(encode(fresh, x)[0], encode(layer, x)[0])

    # samples do not see each other
    order = torch.tensor([2, 0, 1])
    z_permuted, log_det_permuted = encode(layer, x[order])
    assert torch.allclose(z_permuted, encode(layer, x)[0][order], atol=1e-12)
    assert torch.allclose(log_det_permuted, encode(layer, x)[1][order], atol=1e-12)
    assert torch.allclose(encode(layer, x[1:2])[0][0], encode(layer, x)[0][1], atol=1e-12)
