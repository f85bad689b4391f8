"""The gradient baseline `glem`: class Gaussians moved by scaled gradients instead of the fixed point iteration.

Per pass over the latents: the gradients of the negative log-likelihood and of minus the summed pairwise KL, each
divided by a (max - min) range, are weighted, preconditioned like Adam, and applied to the mean and to the
(re-parametrised) variance of every class.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError


@dataclass
class GaussianAdam:
    """Adam's direction m_hat / (sqrt(v_hat) + eps), one element a parameter; the caller applies the step size."""

    beta1: float = 0.9
    beta2: float = 0.999
    eps: float = 1e-8
    steps: int = 0
    m: Tensor | None = None
    v: Tensor | None = None

    def direction(self, grad: Tensor) -> Tensor:
        """Take in `grad` and return the preconditioned gradient of the same shape."""
        if self.m is None:
            self.m, self.v = torch.zeros_like(grad), torch.zeros_like(grad)
        self.steps += 1
        self.m = self.beta1 * self.m + (1 - self.beta1) * grad
        self.v = self.beta2 * self.v + (1 - self.beta2) * grad**2
        m_hat = self.m / (1 - self.beta1**self.steps)
        v_hat = self.v / (1 - self.beta2**self.steps)
        return m_hat / (v_hat.sqrt() + self.eps)

    def reset(self) -> None:
        """Forget all moments."""
        self.steps, self.m, self.v = 0, None, None

    def state(self) -> dict:
        """Plain tensors for a checkpoint."""
        return {"steps": self.steps, "m": self.m, "v": self.v}

    def load(self, state: dict) -> None:
        """Restore what `state` gave."""
        self.steps, self.m, self.v = state["steps"], state["m"], state["v"]


@dataclass(frozen=True)
class SigmoidVariance:
    """v = c + a / (1 + exp(-b x)): a variance between c and c + a."""

    a: float = 1.0
    b: float = 1.0
    c: float = 0.25

    @property
    def initial(self) -> float:
        """The variance at x = 0."""
        return self.c + self.a / 2

    def ambient(self, x: Tensor) -> Tensor:
        """Latent coordinate -> variance."""
        return self.c + self.a * torch.sigmoid(self.b * x)

    def latent(self, v: Tensor) -> Tensor:
        """Variance -> latent coordinate; variances outside (c, c + a) are moved just inside."""
        edge = 1e-6 * self.a
        return torch.logit((v.clamp(self.c + edge, self.c + self.a - edge) - self.c) / self.a) / self.b

    def derivative(self, x: Tensor) -> Tensor:
        """dv/dx."""
        s = torch.sigmoid(self.b * x)
        return self.a * self.b * s * (1 - s)


@dataclass(frozen=True)
class FreeVariance:
    """v = max(x, eps): no re-parametrisation but a floor."""

    eps: float = 0.21
    initial: float = 1.1

    def ambient(self, x: Tensor) -> Tensor:
        """Latent coordinate -> variance."""
        return x.clamp_min(self.eps)

    def latent(self, v: Tensor) -> Tensor:
        """Variance -> latent coordinate."""
        return v

    def derivative(self, x: Tensor) -> Tensor:
        """dv/dx."""
        return torch.ones_like(x)


def schedule(steps: Sequence[int], values: Sequence[float], kind: str) -> np.ndarray:
    """Piecewise `lin`ear or `geom`etric schedule: values[k] -> values[k+1] on [steps[k], steps[k+1]), then constant.

    Returns the values at 0 .. steps[-1]-1. Raises UserError for unequal lengths or another kind.
    """
    if len(steps) != len(values) or len(steps) < 2:
        raise UserError(f"a schedule needs as many steps as values, and two at least: {list(steps)}, {list(values)}")
    if kind not in ("lin", "geom"):
        raise UserError(f"schedule {kind}: expected lin or geom")
    space = np.linspace if kind == "lin" else np.geomspace
    knots = zip(steps[:-1], steps[1:], values[:-1], values[1:], strict=True)
    return np.concatenate([space(a, b, end - start) for start, end, a, b in knots])


def at(values: np.ndarray, index: int) -> float:
    """The schedule's value at `index`; the last one afterwards."""
    return float(values[min(index, len(values) - 1)])


def nll_gradients(z: Tensor, mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of -sum_n log N(z_n; mean, diag var) for one class's z (N, d), for mean (d,) and var (d,)."""
    scaled = (z - mean) / var
    return -scaled.sum(0), -0.5 * (scaled**2 - 1 / var).sum(0)


def kl_gradients(mean: Tensor, var: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of -sum_ij KL(N_i || N_j) with respect to the means and the variances, (K, d) each, in closed form."""
    k = len(mean)
    precision, centre = 1 / var, mean.mean(0)
    mu = mean - centre
    spread = k * mu**2 - 2 * mu * mu.sum(0) + (mu**2).sum(0)  # sum_l (mu_i - mu_l)^2
    grad_mean = mu * precision.sum(0) - (precision * mu).sum(0) + precision * (k * mu - mu.sum(0))
    as_first = precision.sum(0) - k * precision
    as_second = k * precision - precision**2 * (var.sum(0) + spread)
    return -grad_mean, -0.5 * (as_first + as_second)


def widened_range(values: Tensor, scale: float) -> tuple[float, float]:
    """(min, max) of `values`, each moved outwards by 20 % of its size, times `scale`."""
    low, high = float(values.min()), float(values.max())
    return scale * (low - 0.2 * abs(low)), scale * (high + 0.2 * abs(high))


def class_separation(kl: Tensor) -> Tensor:
    """-sum_j (KL_ij + KL_ji) / (K - 1) of every class: (K, K) -> (K,)."""
    return -(kl + kl.T).sum(1) / (len(kl) - 1)


@dataclass(frozen=True)
class GlemStep:
    """Step sizes, weights and ranges of one update."""

    lr_mean: float
    lr_var: float
    weight_nll_mean: float
    weight_nll_var: float
    weight_kl_mean: float
    weight_kl_var: float
    nll_range: float
    kl_range: float
    blank_mean: bool = False  # no scaling by the ranges and no weights
    blank_var: bool = False


def update(
    mean: Tensor,
    var: Tensor,
    nll: tuple[Tensor, Tensor],
    kl: tuple[Tensor, Tensor],
    adam_mean: GaussianAdam | None,
    adam_var: GaussianAdam | None,
    reparam: SigmoidVariance | FreeVariance,
    settings: GlemStep,
) -> tuple[Tensor, Tensor]:
    """One step of all classes' means and variances, (K, d) or (d,) each, from the two pairs of gradients."""

    def total(nll_grad, kl_grad, weight_nll, weight_kl, blank):
        if blank:
            return nll_grad + kl_grad
        return weight_nll * nll_grad / settings.nll_range + weight_kl * kl_grad / settings.kl_range

    s = settings
    grad_mean = total(nll[0], kl[0], s.weight_nll_mean, s.weight_kl_mean, s.blank_mean)
    grad_var = total(nll[1], kl[1], s.weight_nll_var, s.weight_kl_var, s.blank_var)
    x = reparam.latent(var)
    grad_x = grad_var * reparam.derivative(x)
    step_mean = adam_mean.direction(grad_mean) if adam_mean else grad_mean
    step_x = adam_var.direction(grad_x) if adam_var else grad_x
    return mean - s.lr_mean * step_mean, reparam.ambient(x - s.lr_var * step_x)
