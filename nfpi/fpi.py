"""The fixed point iteration that places the class Gaussians (Enescu & Sahbi, BMVC 2024).

It solves the stationarity conditions of

    sum_i 1/N_i sum_{n: y_n = i} log N(z_n; mu_i, diag v_i)  +  lambda' sum_{i != j} Phi(KL_ij),

KL_ij = KL(N_i || N_j), lambda' = lambda / (K (K - 1)), Phi' = the weight K_ij of `pair_weights`. All right-hand sides
use the previous iterate (Jacobi). The step costs K x K and K x d matrices; `step_ref` loops over the pairs.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from common.errors import UserError
from nfpi.gaussians import kl_matrix, kl_matrix_ref, off_diagonal

MIN_KL = 1e-12  # two equal Gaussians exert no force on each other; their weight must only stay finite


@dataclass(frozen=True)
class FixedPoint:
    """What the iteration solves, and when it stops. Defaults: cifar10/mean.

    `exp_den_update` 1: K_ij = exp(-1/alpha)/(alpha KL_ij), Phi = c ln KL with c = exp(-1/alpha)/alpha; 0: K_ij =
    exp(-KL_ij/s)/s, Phi = -exp(-KL/s), s the mean of alpha KL over the pairs, a constant within an iteration.
    `isotropic`: the mean update sees the average over the dimensions of v_i and of 1/v_j. `sum_trick`: the variance
    update sees sum_l (mu_j - mu_l)^2 in place of (mu_i - mu_j)^2. `variance_update` `upstream` is the published one,
    v' = sqrt(A B)/A. `exact` is v' = v sqrt(B/A); `solve` then leaves out the two approximations where the variances
    move, so that its fixed points are the points where the gradient of the objective (with s held at its last value)
    vanishes in all that moves. `damping` w: x' = (1-w) new + w old. Stops when the largest L2 change of a class's mean
    and of its variance is at most `epsilon`, or after `max_iters`.
    """

    strength: float = 500_000.0  # lambda
    means: bool = True
    variances: bool = False
    isotropic: bool = True
    sum_trick: bool = True
    exp_den_update: bool = True
    alpha: float = 10.0
    variance_update: str = "upstream"
    damping: float = 0.0
    max_iters: int = 1000
    epsilon: float = 0.1

    def __post_init__(self):
        if self.variance_update not in ("upstream", "exact"):
            raise UserError(f"variance_update={self.variance_update}: expected upstream or exact")
        if not 0 <= self.damping < 1:
            raise UserError(f"damping={self.damping}: expected 0 <= damping < 1")

    @property
    def exact(self) -> bool:
        """Whether the iteration solves for a stationary point of means and variances."""
        return self.variances and self.variance_update == "exact"

    def pull(self, classes: int) -> float:
        """lambda' = lambda / (K (K - 1))."""
        return self.strength / (classes * (classes - 1))

    def bounded(self, classes: int) -> bool:
        """Whether the exact objective has a maximum. With Phi = c ln KL: lambda <= K/(2c), if variances move."""
        c = math.exp(-1 / self.alpha) / self.alpha
        return not (self.exact and self.exp_den_update) or self.strength <= classes / (2 * c)


@dataclass
class FixedPointResult:
    """The last valid iterate, (K, d) each, and one record an iteration (changes, KL statistics)."""

    mean: Tensor
    var: Tensor
    iterations: int = 0
    converged: bool = False
    non_finite: bool = False
    history: list[dict[str, float]] = field(default_factory=list)


def pair_weights(kl: Tensor, alpha: float, exp_den_update: bool) -> Tensor:
    """K_ij (K, K), zero on the diagonal: the derivative of Phi at KL_ij.

    With `exp_den_update` the exponent of the published formula, -KL/(alpha KL), is the constant -1/alpha.
    """
    if exp_den_update:
        weights = math.exp(-1 / alpha) / (alpha * kl.clamp_min(MIN_KL))
    else:
        scaled = alpha * kl
        s = scaled.sum() / (scaled != 0).sum().clamp_min(1)
        weights = torch.exp(-kl / s) / s
    return weights.fill_diagonal_(0)


def step(
    mean: Tensor, var: Tensor, data_mean: Tensor, data_var: Tensor, settings: FixedPoint
) -> tuple[Tensor, Tensor, Tensor]:
    """One iteration: means and variances (K, d) of the Gaussians and of the latents -> (new mean, new var, KL matrix).

    All in float64. The weights come from the current iterate.
    """
    kl = kl_matrix(mean, var)
    weight = pair_weights(kl.clone(), settings.alpha, settings.exp_den_update)
    pull = settings.pull(len(mean))
    tau = pull * (weight.sum(1) - weight.sum(0))
    centre = mean.mean(0)
    mu, precision = mean - centre, 1 / var  # differences of means only: centring limits cancellation
    new_mean, new_var = mean, var
    if settings.means:
        if settings.isotropic:
            w = precision.mean(1)
            pairs = weight * w + weight.T * w[:, None]  # (K, K)
            force = var.mean(1, keepdim=True) * (pairs.sum(1, keepdim=True) * mu - pairs @ mu)
        else:
            pushed = mu * (weight @ precision) - weight @ (precision * mu)
            pushing = precision * (weight.sum(0)[:, None] * mu - weight.T @ mu)
            force = var * (pushed + pushing)
        new_mean = data_mean + pull * force
    if settings.variances:
        if settings.sum_trick:
            spread = len(mu) * mu**2 - 2 * mu * mu.sum(0) + (mu**2).sum(0)  # Q_j = sum_l (mu_j - mu_l)^2
            inflow = weight.T @ (spread + var)
        else:
            inflow = weight.sum(0)[:, None] * mu**2 - 2 * mu * (weight.T @ mu) + weight.T @ (mu**2 + var)
        new_var = _variance(mean, var, data_mean, data_var, weight @ precision, inflow, tau, pull, settings)
    return new_mean, new_var, kl


def _variance(mean, var, data_mean, data_var, outflow, inflow, tau, pull, settings: FixedPoint) -> Tensor:
    """A and B of the stationarity condition A = B, and the new variance. NaN where A is negative."""
    # the likelihood's part is the second moment about mu_i; the published code takes the variance about the class mean
    moment = data_var + (data_mean - mean) ** 2 if settings.exact else data_var
    b = moment + pull * var**2 * outflow
    a = (1 + tau)[:, None] * var + pull * inflow
    return var * torch.sqrt(b / a) if settings.exact else torch.sqrt(b * a) / a


def step_ref(
    mean: Tensor, var: Tensor, data_mean: Tensor, data_var: Tensor, settings: FixedPoint
) -> tuple[Tensor, Tensor, Tensor]:
    """`step` written as its equations, a loop over all pairs of classes: the oracle and the benchmark's baseline."""
    classes = len(mean)
    kl = kl_matrix_ref(mean, var)
    weight = pair_weights(kl.clone(), settings.alpha, settings.exp_den_update)
    pull = settings.pull(classes)
    tau = pull * (weight.sum(1) - weight.sum(0))
    u = var.mean(1, keepdim=True).expand_as(var) if settings.isotropic else var
    w = (1 / var).mean(1, keepdim=True).expand_as(var) if settings.isotropic else 1 / var
    force, outflow, inflow = torch.zeros_like(mean), torch.zeros_like(mean), torch.zeros_like(mean)
    summed = [((mean[j] - mean) ** 2).sum(0) for j in range(classes)]  # for the sum trick
    for i in range(classes):
        for j in range(classes):
            if settings.means:
                force[i] += u[i] * (weight[i, j] * w[j] + weight[j, i] * w[i]) * (mean[i] - mean[j])
            if settings.variances:
                outflow[i] += weight[i, j] / var[j]
                square = summed[j] if settings.sum_trick else (mean[i] - mean[j]) ** 2
                inflow[i] += weight[j, i] * (square + var[j])
    new_mean = data_mean + pull * force if settings.means else mean
    new_var = var
    if settings.variances:
        new_var = _variance(mean, var, data_mean, data_var, outflow, inflow, tau, pull, settings)
    return new_mean, new_var, kl


def solve(
    data_mean: Tensor,
    data_var: Tensor,
    mean: Tensor,
    var: Tensor,
    settings: FixedPoint,
    on_iteration: Callable[[int, dict[str, float]], None] | None = None,
) -> FixedPointResult:
    """Iterate from (mean, var) until the stop rule holds.

    data_mean, data_var: class means and unbiased variances of the latents; all (K, d). Arithmetic is float64; every
    iterate is rounded to the type of `mean`, as the flow stores it. A non-finite iterate ends the iteration: the last
    valid one is returned with `non_finite` set. `on_iteration(index, record)` is called after every iteration.
    """
    if len(mean) < 2:
        raise UserError("the fixed point iteration separates classes: it needs at least two")
    if settings.exact:  # with the approximations the fixed point is no stationary point of the objective
        settings = replace(settings, isotropic=False, sum_trick=False)
    store, device = mean.dtype, mean.device
    if device.type == "mps":  # no float64 there, and K x d is small
        data_mean, data_var, mean, var = (x.cpu() for x in (data_mean, data_var, mean, var))
    data_mean, data_var = data_mean.double(), data_var.double()
    mean, var = mean.double(), var.double()
    result = FixedPointResult(mean, var)
    if not (settings.means or settings.variances):
        result.converged = True
    for index in range(settings.max_iters if not result.converged else 0):
        new_mean, new_var, kl = step(mean, var, data_mean, data_var, settings)
        if settings.damping:
            new_mean = torch.lerp(new_mean, mean, settings.damping)
            new_var = torch.lerp(new_var, var, settings.damping)
        if not (torch.isfinite(new_mean).all() and torch.isfinite(new_var).all()):
            result.non_finite = True
            break
        pairs = off_diagonal(kl)
        record = {
            "mean_change": float((new_mean - mean).norm(dim=1).max()),
            "var_change": float((new_var - var).norm(dim=1).max()),
            "kl_min": float(pairs.min()),
            "kl_mean": float(pairs.mean()),
            "kl_max": float(pairs.max()),
        }
        mean, var = new_mean.to(store).double(), new_var.to(store).double()
        result.iterations = index + 1
        result.history.append(record)
        if on_iteration:
            on_iteration(index, record)
        if record["mean_change"] <= settings.epsilon and record["var_change"] <= settings.epsilon:
            result.converged = True
            break
    result.mean, result.var = mean.to(device, store), var.to(device, store)
    return result
