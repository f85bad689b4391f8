"""The losses: a bound of the sequence with the papers' penalties (`paper`, the default), and the published code's
(`upstream`, for parity). Sum over pixels and latent units, mean over samples, all weights 1 unless said.

What is bounded (`--path-kl shared`). Generative model: z_0 ~ N(0, I), flows k_1..k_T ~ p(k) (one of them, or spikes
times speeds, a step), z_t = z_{t-1} + v^{k_t}(z_{t-1}, t) without noise, x_t ~ p(x_t | z_t) independently. Posterior:
q(z_0 | x_0) q(k | x_0..x_T), and the same transitions, so that a transition's density is the same point mass in p and
in q and cancels. Jensen's inequality then leaves

    log p(x_0..x_T) >= E_q [sum_{t=0..T} log p(x_t | z_t)] - KL(q(z_0 | x_0) || N(0, I)) - KL(q(k | x) || p(k)):

`reconstruction`, `gaussian_kl` and the index, spike and slab terms (supervised: k is given, no such term). The
Hamilton-Jacobi term is a penalty on the fields beside it, no part of the bound. `--path-kl marginal` (`path_kl`) takes
T further divergences off, KL(q(z_t | x_0) || p_t) with p_t = N(0, (1 + 2 D t) I). What is left is the sum of T + 1
bounds, each of one log p_t(x_t) under a prior of its own. As a bound of the sequence it is loose by those T
divergences, and a unit that no image needs is drawn from variance 1 to (T + 1) / sum_t 1 / (1 + 2 D t), 4.3 for T = 8
and D = 1, where z_0 ~ N(0, I) is no longer a sample of what the encoder makes.

Axes: T steps, B samples, K flows, D latent units.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from latent_flow.fields import DiffusionPrior, FieldAt, PotentialAt, StackedFlows, diffused_log_prob
from latent_flow.rollout import Path, row_sums
from latent_flow.spikes import (
    bernoulli_kl_halved,
    expected_fraction_upstream,
    laplace_kl,
    slab_statistics,
    spike_path_kl,
)

LOSSES = (
    "loss_total",
    "loss_recon",
    "loss_kl0",
    "loss_kl_path",
    "loss_pde",
    "loss_index",
    "loss_spike",
    "loss_slab",
)


@dataclass
class Coefficients:
    """What moves the latents: c1 (T, B, K) of the gradient fields, c2 (T, B, K) of the rotational ones (or None)."""

    c1: Tensor
    c2: Tensor | None = None

    @property
    def prior(self) -> Tensor:
        """Coefficients of the published prior: c1, or c1 + c2 - c1 c2 when the two differ."""
        if self.c2 is None or self.c2 is self.c1:
            return self.c1
        return self.c1 + self.c2 - self.c1 * self.c2


def reconstruction(logits: Tensor, frames: Tensor) -> Tensor:
    """Binary cross-entropy of frames (..., B, C, N, N) in [0, 1]: sum over frames and pixels, mean over B; scalar."""
    return F.binary_cross_entropy_with_logits(logits, frames, reduction="sum") / frames.shape[-4]


def gaussian_kl(mean: Tensor, log_var: Tensor) -> Tensor:
    """KL(N(mean, exp(log_var)) || N(0, I)) a sample (B,)."""
    return -0.5 * (1 + log_var - mean**2 - log_var.exp()).sum(-1)


ACTIVE = 0.05  # nats about the image above which a latent unit counts as used


def unit_information(mean: Tensor, log_var: Tensor) -> Tensor:
    """What each latent unit tells about the image, in nats (D,): log(1 + var mean / mean var) / 2, the information of a
    Gaussian channel, from the posterior's means and log-variances (B, D). Whatever the scale of a unit; 0 for B = 1.
    """
    return 0.5 * torch.log1p(mean.var(0, correction=0) / log_var.exp().mean(0))


def active_units(mean: Tensor, log_var: Tensor) -> Tensor:
    """How many units tell more than `ACTIVE` nats about the image, a scalar."""
    return (unit_information(mean, log_var) > ACTIVE).sum()


def normal_log_prob(z: Tensor, mean: Tensor | float = 0.0, log_var: Tensor | float = 0.0) -> Tensor:
    """log N(z; mean, exp(log_var)) in each dimension, shape of z."""
    variance = log_var.exp() if isinstance(log_var, Tensor) else math.exp(log_var)
    return -0.5 * ((z - mean) ** 2 / variance + log_var + math.log(2 * math.pi))


# ---- the default objective ------------------------------------------------------------------------------------------


def hamilton_jacobi_residual(potential: PotentialAt, force: Tensor | None) -> Tensor:
    """d_t u + |grad u|^2 / 2 + f^2 at each sample (K, B): zero for a flow of optimal transport with force -f^2 <= 0."""
    residual = potential.u_t + 0.5 * (potential.grad**2).sum(-1)
    return residual if force is None else residual + force**2


def pde_loss(path: Path, flows: StackedFlows, coefficients: Coefficients) -> Tensor:
    """Squared Hamilton-Jacobi residuals and divergences, mean over samples and steps, plus the initial condition.

    A flow counts at a sample by its coefficient there: the gradient part by c1, the divergence by c2.
    """
    total = path.z.new_zeros(())
    steps = len(path.fields)
    for field, t in zip(path.fields, range(steps), strict=True):
        squared = hamilton_jacobi_residual(field.potential, field.force) ** 2  # (K, B)
        total = total + (coefficients.c1[t].mT * squared).sum(0).mean() / steps
        if field.rotation is not None:
            total = total + (coefficients.c2[t].mT * field.rotation.divergence() ** 2).sum(0).mean() / steps
    start = flows.at(path.z[0], 0)
    condition = (start.potential.grad**2).sum(-1)  # (K, B): no initial velocity, no initial force
    if start.force is not None:
        condition = condition + start.force**2
    return total + (coefficients.c1[0].mT * condition).sum(0).mean()


def path_kl(path: Path, mean: Tensor, log_var: Tensor, diffusion: float = 1.0) -> Tensor:
    """KL(q(z_t | x_0) || p_t) of each step t = 1..T, (T,): one-sample estimates, mean over samples.

    log q(z_t) = log q(z_0) - sum_s log|det(I + J_s)| by the change of variables (Song et al. 2023, posterior
    flow); p_t is the standard normal after t steps of the prior's diffusion. With the reconstruction of x_t each
    step gives a lower bound of log p_t(x_t).
    """
    log_q0 = normal_log_prob(path.z[0], mean, log_var).sum(-1)  # (B,)
    log_q = log_q0 - path.log_det.cumsum(0)  # (T, B)
    log_p = torch.stack([diffused_log_prob(z, t, diffusion) for t, z in enumerate(path.z[1:], start=1)])
    return (log_q - log_p).mean(1)


def index_loss(logits: Tensor, entropy_weight: float = 1.0) -> Tensor:
    """KL(batch mean of q(k | x) || uniform) + weight * mean entropy of q(k | x): logits (B, K), scalar, >= 0.

    Its negative is the information between sequence and flow (up to log K): all flows used, each sequence sure.
    """
    log_q = torch.log_softmax(logits, dim=-1)
    log_mean = torch.logsumexp(log_q, 0) - math.log(len(log_q))  # finite where the mean itself underflows
    balance = (log_mean.exp() * (log_mean + math.log(len(log_mean)))).sum()
    entropy = -(log_q.exp() * log_q).sum(-1).mean()
    return balance + entropy_weight * entropy


def spike_loss(logits: Tensor, spikes: Tensor, p_on: float, stay: float) -> Tensor:
    """KL of the inferred spikes from the sticky prior: logits and samples (T, H, B, K), summed over the H heads."""
    return sum(spike_path_kl(logits[:, h], spikes[:, h], p_on, stay) for h in range(logits.shape[1]))


def slab_loss(slab: Tensor) -> Tensor:
    """KL(Laplace fitted to all speeds (T, B, K) || Laplace(1, 0.1)), mean over flows."""
    return laplace_kl(*slab_statistics(slab)).mean()


# ---- the published code's objective ---------------------------------------------------------------------------------


def upstream_hamilton_jacobi(field: FieldAt) -> Tensor:
    """The published residual (K,): d_t u summed over the batch, |grad u|^2 averaged over batch and dimensions."""
    potential = field.potential
    scalar = potential.u_t.sum(1) + 0.5 * (potential.grad**2).mean((1, 2))  # (K,)
    if field.force is not None:
        return ((scalar[:, None] + field.force**2) ** 2).mean(1)
    loss = scalar**2
    if field.rotation is not None:
        loss = loss + (field.rotation.divergence() ** 2).mean(1)
    return loss


def upstream_initial_condition(start: FieldAt) -> Tensor:
    """The published initial condition (K,): mean over batch and dimensions of |grad u|^2, plus mean force^2."""
    condition = (start.potential.grad**2).mean((1, 2))
    return condition if start.force is None else condition + (start.force**2).mean(1)


def upstream_pde_loss(path: Path, flows: StackedFlows, coefficients: Coefficients) -> Tensor:
    """Sum over steps of batch-mean coefficient times residual; the initial condition of the last flow only."""
    total = path.z.new_zeros(())
    for t, field in enumerate(path.fields):
        total = total + (coefficients.c1[t].mean(0) * upstream_hamilton_jacobi(field)).sum()
    start = upstream_initial_condition(flows.at(path.z[0], 0))
    return total + coefficients.c1[0].mean(0)[-1] * start[-1]


def upstream_densities(
    path: Path, prior: DiffusionPrior, mean: Tensor, log_var: Tensor, coefficients: Coefficients, only=None
) -> tuple[Tensor, Tensor]:
    """The published per-dimension "densities" along the path: prior and posterior, (T+1, B, D) each."""
    rho = [normal_log_prob(path.z[0])]
    rho_t = [normal_log_prob(path.z[0], mean, log_var)]
    for t, field in enumerate(path.fields):
        lap = coefficients.prior[t] @ prior.laplacian(t + 1, only)  # (B,)
        rho_t.append(rho_t[-1] - torch.log((1 + row_sums(field, coefficients.c1[t])).abs()))
        rho.append(rho[-1] - torch.log((1 + lap).abs())[:, None])
    return torch.stack(rho), torch.stack(rho_t)


def upstream_path_kl(rho: Tensor, rho_t: Tensor) -> Tensor:
    """The published term (T,): KL between softmaxes over dimensions of per-dimension densities, steps 1..T."""
    log_input = torch.log_softmax(rho_t[1:].exp(), dim=-1)
    target = torch.softmax(rho[1:].exp(), dim=-1)
    return F.kl_div(log_input, target, reduction="none").sum(-1).mean(1)


def upstream_index_loss(one_hot: Tensor) -> Tensor:
    """-log of the share of the batch that agrees with its majority: one-hot samples (B, K), scalar."""
    return -torch.log(one_hot.mean(0).max(0).values + 1e-20)  # along an axis: at a tie the first one's gradient


def upstream_spike_loss(spikes: Tensor, p_on: float, stay: float) -> Tensor:
    """The published constant (no gradient): spikes (T, H, B, K), H heads; the target is 2/3 of it with two heads."""
    steps, heads = spikes.shape[:2]
    target = float(expected_fraction_upstream(steps, p_on, stay).mean()) * (2 / 3 if heads == 2 else 1)
    means = [(spikes[:, h] != 0).to(spikes).mean().detach() for h in range(heads)]
    return sum(bernoulli_kl_halved(target, mean) for mean in means)
