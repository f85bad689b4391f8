"""Elementwise invertible activations; log-determinant sum over all elements of log|f'(x)|."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from inv_flow.layers.flow import FlowLayer, no_log_det, per_sample
from inv_flow.layers.spline import rational_quadratic_spline


def invert_increasing(
    f: Callable[[Tensor], Tensor], slope: Callable[[Tensor], Tensor], y: Tensor, low: Tensor, high: Tensor
) -> Tensor:
    """x with f(x) = y for an increasing f and low <= x <= high, elementwise.

    Newton steps from the bracket's nearer guess; a step that leaves the bracket becomes a bisection, so it always
    converges. Stops when every element moves by less than 1e-12 relative (float64; 1e-6 float32), after 60 steps at
    most.
    """
    x, low, high = y.clamp(low, high), low.clone(), high.clone()
    tolerance = 1e-12 if y.dtype == torch.float64 else 1e-6
    for step in range(60):
        gap = f(x) - y
        high = torch.where(gap > 0, torch.minimum(high, x), high)
        low = torch.where(gap < 0, torch.maximum(low, x), low)
        proposal = x - gap / slope(x)
        # written so that a NaN proposal is replaced too
        inside = (proposal >= low) & (proposal <= high)
        proposal = torch.where(inside, proposal, (low + high) / 2)
        moved = (proposal - x).abs() > tolerance * (1 + x.abs())
        x = proposal
        # asking whether all elements stand still waits for the device: not before it is likely
        if step >= 4 and not moved.any():
            break
    return x


class Identity(FlowLayer):
    """x."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return x, no_log_det(x)

    def reverse(self, z: Tensor) -> Tensor:
        return z


class SmoothLeakyRelu(FlowLayer):
    """alpha x + (1 - alpha) softplus(x), 0 < alpha < 1 (`SLR`)."""

    def __init__(self, alpha: float = 0.3):
        super().__init__()
        if not 0 < alpha < 1:
            raise ValueError(f"alpha={alpha}: must lie in (0, 1)")
        self.alpha = alpha

    def _value(self, x: Tensor) -> Tensor:
        return self.alpha * x + (1 - self.alpha) * F.softplus(x)

    def _slope(self, x: Tensor) -> Tensor:
        return self.alpha + (1 - self.alpha) * torch.sigmoid(x)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._value(x), per_sample(self._slope(x).log())

    def reverse(self, z: Tensor) -> Tensor:
        # max(x, 0) <= softplus(x) <= max(x, 0) + ln 2 brackets x between two leaky ReLU inverses
        def leaky_inverse(y: Tensor) -> Tensor:
            return torch.where(y > 0, y, y / self.alpha)

        low = leaky_inverse(z - (1 - self.alpha) * math.log(2))
        return invert_increasing(self._value, self._slope, z, low, leaky_inverse(z))


class LeakyRelu(FlowLayer):
    """x for x >= 0, alpha x below, alpha > 0."""

    def __init__(self, alpha: float = 0.1):
        super().__init__()
        if alpha <= 0:
            raise ValueError(f"alpha={alpha}: must be positive")
        self.alpha = alpha

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.where(x < 0, self.alpha * x, x), math.log(self.alpha) * per_sample((x < 0).to(x.dtype))

    def reverse(self, z: Tensor) -> Tensor:
        return torch.where(z < 0, z / self.alpha, z)


class LearnableLeakyRelu(FlowLayer):
    """x for x >= 0, slope * x below, slope = sigmoid(logit) + 0.5 in (0.5, 1.5), one logit for the layer (`LLR`)."""

    def __init__(self):
        super().__init__()
        self.alpha_logit = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        slope = torch.sigmoid(self.alpha_logit) + 0.5
        return torch.where(x < 0, slope * x, x), slope.log() * per_sample((x < 0).to(x.dtype))

    def reverse(self, z: Tensor) -> Tensor:
        return torch.where(z < 0, z / (torch.sigmoid(self.alpha_logit) + 0.5), z)


class SmoothTanh(FlowLayer):
    """tanh(alpha x) + beta x, alpha, beta > 0."""

    def __init__(self, alpha: float = 1.0, beta: float = 0.1):
        super().__init__()
        if alpha <= 0 or beta <= 0:
            raise ValueError(f"alpha={alpha}, beta={beta}: both must be positive")
        self.alpha, self.beta = alpha, beta

    def _value(self, x: Tensor) -> Tensor:
        return torch.tanh(self.alpha * x) + self.beta * x

    def _slope(self, x: Tensor) -> Tensor:
        # 1 / cosh^2 = 1 - tanh^2 does not overflow
        return self.beta + self.alpha * (1 - torch.tanh(self.alpha * x).square())

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return self._value(x), per_sample(self._slope(x).log())

    def reverse(self, z: Tensor) -> Tensor:
        return invert_increasing(self._value, self._slope, z, (z - 1) / self.beta, (z + 1) / self.beta)


class SELU(FlowLayer):
    """lambda x for x > 0, lambda alpha (e^x - 1) below; its range is (-lambda alpha, inf), and reverse clamps to it."""

    alpha, scale = 1.6732632423543772, 1.0507009873554805

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        log_slope = math.log(self.scale) + torch.where(x > 0, torch.zeros_like(x), math.log(self.alpha) + x)
        return F.selu(x), per_sample(log_slope)

    def reverse(self, z: Tensor) -> Tensor:
        floor = -1 + torch.finfo(z.dtype).eps
        negative = torch.log1p((z / (self.scale * self.alpha)).clamp(min=floor, max=0))
        return torch.where(z > 0, z / self.scale, negative)


class SplineActivation(FlowLayer):
    """A monotone rational-quadratic spline on [-tail_bound, tail_bound], the identity outside (`Spline`).

    `size` (C, H, W); one spline shared by all positions, or one for each with `individual_weights`. minimum: the least
    bin width, bin height and slope.
    """

    def __init__(
        self,
        size: tuple[int, ...],
        n_bins: int = 5,
        tail_bound: float = 10.0,
        individual_weights: bool = False,
        minimum: float = 1e-3,
    ):
        super().__init__()
        if n_bins < 2 or tail_bound <= 0 or not 0 < minimum * n_bins < 1:
            raise ValueError(f"n_bins={n_bins}, tail_bound={tail_bound}, minimum={minimum}: no such spline")
        lead = (1, *size) if individual_weights else ()
        self.unnormalized_widths = nn.Parameter(0.01 * torch.randn(*lead, n_bins))
        self.unnormalized_heights = nn.Parameter(0.01 * torch.randn(*lead, n_bins))
        self.unnormalized_derivatives = nn.Parameter(0.01 * torch.randn(*lead, n_bins - 1))
        self.tail_bound, self.minimum = tail_bound, minimum

    def _apply_spline(self, x: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
        return rational_quadratic_spline(
            x,
            self.unnormalized_widths,
            self.unnormalized_heights,
            self.unnormalized_derivatives,
            self.tail_bound,
            self.minimum,
            inverse,
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y, log_slope = self._apply_spline(x, inverse=False)
        return y, per_sample(log_slope)

    def reverse(self, z: Tensor) -> Tensor:
        return self._apply_spline(z, inverse=True)[0]


def make_activation(
    name: str,
    size: tuple[int, ...],
    n_bins: int = 5,
    tail_bound: float = 10.0,
    individual_weights: bool = False,
) -> FlowLayer:
    """The activation that the experiments' key `activation` names. Raises ValueError for an unknown name."""
    plain = {
        "SLR": SmoothLeakyRelu,
        "LLR": LearnableLeakyRelu,
        "LeakyRelu": LeakyRelu,
        "SmoothTanh": SmoothTanh,
        "SELU": SELU,
        "Identity": Identity,
    }
    if name == "Spline":
        return SplineActivation(size, n_bins, tail_bound, individual_weights)
    if name not in plain:
        raise ValueError(f"activation={name!r}: expected Spline, {', '.join(plain)}")
    return plain[name]()
