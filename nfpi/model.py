"""The normalizing flow of NFPI: squeeze, (ActNorm, 1x1 convolution, coupling) steps, split, on every level.

Enescu & Sahbi, BMVC 2024. Letters as in layers.py; d is the latent's dimension, D = C H W the image's.
"""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from common.errors import UserError
from nfpi.layers import (
    CONV_TYPES,
    FLOW_TYPES,
    ActNorm,
    Conv1x1,
    ConvBlock,
    CouplingLayer,
    ZeroConv2d,
    split2d,
    squeeze2d,
    unsqueeze2d,
)

LevelMethod = Literal["all_levels", "all_levels_idx", "spcb"]


class FlowStep(nn.Module):
    """ActNorm, then 1x1 convolution, then coupling."""

    def __init__(self, shape: tuple[int, int, int], hidden: int, num_blocks: int, config: "FlowConfig"):
        super().__init__()
        self.actnorm = ActNorm(shape)
        self.conv1x1 = Conv1x1(shape[0], config.conv_type)
        self.couplinglayer = CouplingLayer(shape[0], hidden, num_blocks, config.flow_type, config.attention)

    def forward(self, x: Tensor, bound: float | None = None) -> tuple[Tensor, Tensor]:
        """(B, C, h, w) -> (y, log_det (B,))."""
        x, first = self.actnorm(x)
        x, second = self.conv1x1(x)
        x, third = self.couplinglayer(x, bound)
        return x, first + second + third

    def inverse(self, y: Tensor, bound: float | None = None) -> Tensor:
        """(B, C, h, w) -> x."""
        return self.actnorm.inverse(self.conv1x1.inverse(self.couplinglayer.inverse(y, bound)))

    @torch.no_grad()
    def initialise(self, x: Tensor) -> Tensor:
        """Set the three layers in order, each from the output of the one before."""
        return self.couplinglayer.initialise(self.conv1x1.initialise(self.actnorm.initialise(x)))


@dataclass(frozen=True)
class FlowConfig:
    """The architecture; the defaults are CIFAR-10's. Lists have one entry a level.

    Raises UserError for unknown names, lists of the wrong length, and images whose size 2^levels does not divide.
    """

    channels: int = 3
    height: int = 32
    width: int = 32
    flows: Sequence[int] = (8, 8, 8)
    blocks: Sequence[int] = (8, 4, 2)
    hidden: Sequence[int] = (128, 128, 128)
    conv_type: str = "matrixexp"
    flow_type: str = "matrixexp"
    attention: bool = False
    level_method: str = "all_levels"
    level_idx: int = 3
    activation_checkpointing: bool = False

    def __post_init__(self):
        for name in ("flows", "blocks", "hidden"):
            object.__setattr__(self, name, tuple(int(v) for v in getattr(self, name)))
            if len(getattr(self, name)) != len(self.flows):
                raise UserError(f"{name} has {len(getattr(self, name))} entries for {len(self.flows)} levels")
        side = 2 ** len(self.flows)
        if self.height % side or self.width % side:
            raise UserError(f"{len(self.flows)} levels need image sides that are multiples of {side}, not "
                            f"{self.height} x {self.width}; lower num_levels")  # fmt: skip
        if self.conv_type not in CONV_TYPES:
            raise UserError(f"conv_type={self.conv_type}: expected one of {', '.join(CONV_TYPES)}")
        if self.flow_type not in FLOW_TYPES:
            raise UserError(f"flow_type={self.flow_type}: expected one of {', '.join(FLOW_TYPES)}")
        if self.level_method not in get_args(LevelMethod):
            known = ", ".join(get_args(LevelMethod))
            raise UserError(f"level_method.choice={self.level_method}: expected one of {known}")
        if self.level_method == "all_levels_idx" and not 1 <= self.level_idx <= len(self.flows):
            raise UserError(f"level_method.level_idx={self.level_idx}: expected 1 to {len(self.flows)}")

    @property
    def dim(self) -> int:
        """D = C H W."""
        return self.channels * self.height * self.width

    @property
    def conditional_splits(self) -> int:
        """How many of the first splits have a conditional prior; the later halves belong to the latent."""
        levels = len(self.flows)
        return {"all_levels": 0, "all_levels_idx": self.level_idx - 1, "spcb": levels - 1}[self.level_method]

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of the latent under the class Gaussians."""
        s = self.conditional_splits
        shape = (self.channels * 2**s, self.height // 2**s, self.width // 2**s)
        if self.level_method == "spcb":
            shape = (4 * shape[0], shape[1] // 2, shape[2] // 2)
        return shape

    @property
    def latent_dim(self) -> int:
        """d: D, D / 2^(level_idx - 1), or D / 2^(levels - 1)."""
        return math.prod(self.latent_shape)

    def as_dict(self) -> dict:
        """Plain values for a JSON file."""
        return {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}


class Latent(NamedTuple):
    """z (B, d); log_det (B,); log_p (B,), the log-density of the split-off halves; those halves, first split first."""

    z: Tensor
    log_det: Tensor
    log_p: Tensor
    halves: list[Tensor]


class MultiScaleFlow(nn.Module):
    """Squeeze, flow steps, split, on every level; the level method says which halves belong to the latent.

    `all_levels`: everything, re-assembled to the image's shape. `all_levels_idx` (level_idx l): the halves split off
    before level l-1 have a conditional Gaussian prior, the others are re-assembled. `spcb`: only the last level's
    output; all splits have the prior.
    """

    def __init__(self, config: FlowConfig):
        super().__init__()
        self.config = config
        self.reach: float | None = None  # how far a step of the optimiser moves a weight at most
        self._arriving: tuple[Tensor, torch.cuda.Event] | None = None
        self.blocks, self.split_coupling_priors = nn.ModuleList(), nn.ModuleList()
        c, h, w = config.channels, config.height, config.width
        for level, steps in enumerate(config.flows):
            c, h, w = 4 * c, h // 2, w // 2
            make = [FlowStep((c, h, w), config.hidden[level], config.blocks[level], config) for _ in range(steps)]
            self.blocks.append(nn.ModuleList(make))
            if level < len(config.flows) - 1:
                c //= 2
                if level < config.conditional_splits:
                    self.split_coupling_priors.append(ZeroConv2d(c, 2 * c))

    def use_amp(self, amp: bool) -> None:
        """Let the coupling nets compute in bfloat16 in training mode; the maps and their log-determinants never do."""
        for module in self.modules():
            if isinstance(module, ConvBlock):
                module.amp = amp

    def bounds(self) -> list[float | None]:
        """The norm bounds of all coupling layers, read from the device. With `reach`, in training on a GPU: those of
        the step before, which have arrived, with what one step of the optimiser can add.
        """
        layers = [step.couplinglayer for level in self.blocks for step in level]
        if self.config.flow_type != "matrixexp":
            return [None] * len(layers)
        if self.reach is None or not torch.is_grad_enabled():
            return torch.cat([layer.norm_bound() for layer in layers]).tolist()
        return self._lagging(torch.cat([layer.norm_bound(self.reach) for layer in layers]))

    def _by_level(self, values: Sequence[float | None]) -> list[list[float | None]]:
        """One value a flow step, as the steps lie in `blocks`."""
        iterator = iter(values)
        return [[next(iterator) for _ in level] for level in self.blocks]

    def _lagging(self, bounds: Tensor) -> list[float]:
        """`bounds` on the host as of the call before; only the first call waits for the device."""
        copy, event = bounds.to("cpu", non_blocking=True), torch.cuda.Event()
        event.record()
        (host, arrived), self._arriving = self._arriving or (copy, event), (copy, event)
        arrived.synchronize()
        return host.tolist()

    def forward(self, x: Tensor, bounds: Sequence[float | None] | None = None) -> Latent:
        """x (B, C, H, W) in [-1, 1] -> Latent; `bounds` as `bounds()` gives them, where the caller has them."""
        log_det, log_p, halves = x.new_zeros(x.shape[0]), x.new_zeros(x.shape[0]), []
        recompute = self.config.activation_checkpointing and torch.is_grad_enabled()
        of_levels = self._by_level(self.bounds() if bounds is None else bounds)
        for level, (steps, of_steps) in enumerate(zip(self.blocks, of_levels, strict=True)):
            x = squeeze2d(x)
            for step, bound in zip(steps, of_steps, strict=True):
                if recompute:  # nothing is drawn in a step
                    x, change = checkpoint(step, x, bound, use_reentrant=False, preserve_rng_state=False)
                else:
                    x, change = step(x, bound)
                log_det = log_det + change
            if level < len(self.blocks) - 1:
                x, half = split2d(x)
                halves.append(half)
                if level < self.config.conditional_splits:
                    log_p = log_p + self.split_coupling_priors[level].log_prob(x, half)
        return Latent(self._join(x, halves).flatten(1), log_det, log_p, halves[: self.config.conditional_splits])

    def _join(self, x: Tensor, halves: list[Tensor]) -> Tensor:
        if self.config.level_method == "spcb":
            return x
        for half in reversed(halves[self.config.conditional_splits :]):
            x = torch.cat([unsqueeze2d(x), half], 1)
        return unsqueeze2d(x)

    def inverse(
        self,
        z: Tensor,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        halves: list[Tensor] | None = None,
        eps: list[Tensor] | None = None,
    ) -> Tensor:
        """z (B, d) -> x (B, C, H, W), about [-1, 1].

        The split-off halves are `halves` (those of `forward`: the exact inverse), or drawn from their priors with
        `temperature` times the standard deviation, from `eps` (standard normal, deepest split first) or `generator`.
        """
        config, last = self.config, len(self.blocks) - 1
        splits = config.conditional_splits
        x, own = z.view(z.shape[0], *config.latent_shape), {}
        if config.level_method != "spcb":
            x = squeeze2d(x)
            for level in range(splits, last):  # take the latent's own halves off again
                x, own[level] = split2d(x)
                x = squeeze2d(x)
        draws = iter(eps or ())
        for level, bounds in zip(range(last, -1, -1), reversed(self._by_level(self.bounds())), strict=True):
            if level < last:
                if level >= splits:
                    half = own[level]
                elif halves is not None:
                    half = halves[level]
                else:
                    where = x.device if generator is None else generator.device
                    noise = next(draws) if eps else torch.randn(x.shape, generator=generator, device=where)
                    half = self.split_coupling_priors[level].sample(x, noise.to(x), temperature)
                x = torch.cat([x, half], 1)
            for step, bound in zip(reversed(self.blocks[level]), reversed(bounds), strict=True):
                x = step.inverse(x, bound)
            x = unsqueeze2d(x)
        return x

    @torch.no_grad()
    def initialise(self, x: Tensor) -> None:
        """Data-dependent initialisation from one batch x (B, C, H, W) in [-1, 1]: one pass, layer after layer."""
        for level, steps in enumerate(self.blocks):
            x = squeeze2d(x)
            for step in steps:
                x = step.initialise(x)
            if level < len(self.blocks) - 1:
                x = split2d(x)[0]
