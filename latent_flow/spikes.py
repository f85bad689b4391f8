"""The sparse prior of Sparse Transformation Analysis: sticky spikes, Laplace slabs, and their divergences."""

import math

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError

MAX_ENUMERATED = 12  # flows whose 2^K spike states are enumerated


def spike_states(count: int) -> np.ndarray:
    """All spike vectors but the all-zero one, (2^K - 1, K) of 0/1."""
    if count > MAX_ENUMERATED:
        raise UserError(f"the exact spike prior enumerates 2^K states: K is at most {MAX_ENUMERATED} (got {count})")
    states = (np.arange(1, 2**count)[:, None] >> np.arange(count)) & 1
    return states.astype(np.float64)


def spike_chain(count: int, p_on: float, stay: float) -> tuple[np.ndarray, np.ndarray]:
    """The sticky spike chain over the states of `spike_states`: first law (M,) and transition matrix (M, M).

    First: independent Bernoulli(p_on), conditioned on not all zero. Step: each spike keeps its value with
    probability `stay`; a step into all-zero is redrawn from there, until one spike is on.
    """
    for name, value in (("p_on", p_on), ("p_stay", stay)):
        if not 0 < value < 1:
            raise UserError(f"the spike prior needs {name} strictly between 0 and 1 (got {value})")
    states = spike_states(count)

    def conditioned(p: float) -> np.ndarray:
        law = np.prod(np.where(states == 1, p, 1 - p), axis=1)
        return law / law.sum()

    flips = np.abs(states[:, None] - states[None]).sum(-1)  # (M, M)
    moves = (1 - stay) ** flips * stay ** (count - flips)
    lost = 1 - moves.sum(1, keepdims=True)  # the mass that lands on all-zero
    return conditioned(p_on), moves + lost * conditioned(1 - stay)


def expected_fraction(count: int, steps: int, p_on: float, stay: float) -> np.ndarray:
    """Expected fraction of active spikes at each of `steps` steps, exactly, (T,)."""
    law, moves = spike_chain(count, p_on, stay)
    active = spike_states(count).mean(1)
    fractions = []
    for _ in range(steps):
        fractions.append(float(law @ active))
        law = law @ moves
    return np.array(fractions)


def binomial(n: float, k: float) -> float:
    """n choose k by Gamma functions, for real k >= 0; zero beyond n."""
    if k > n:
        return 0.0
    return math.gamma(n + 1) / (math.gamma(k + 1) * math.gamma(n - k + 1))


def expected_fraction_upstream(steps: int, p_on: float, stay: float) -> np.ndarray:
    """The published, biased recursion for three flows, (T,); see `expected_fraction` for the right values."""
    redraw = 1 / 3 + 2 * p_on * (1 - p_on) / 3 + p_on**2 / 3
    switch = 1 - stay
    fractions = [redraw]
    while len(fractions) < steps:
        e = fractions[-1]
        all_off = binomial(3, 3 * e) * switch ** (3 * e) * stay ** (3 - 3 * e)
        fractions.append(stay * e + switch * (1 - e) + all_off * redraw)
    return np.array(fractions[:steps])


def draw_spikes(steps: int, count: int, p_on: float, stay: float, generator: torch.Generator, batch: int) -> Tensor:
    """Sample the sticky chain: (T, B, K) of 0/1 on the generator's device. Raises UserError for K = 0."""
    if count < 1:
        raise UserError("no transformation of this data set is known that could be switched on and off")
    device = generator.device

    def redraw(spikes: Tensor, p: float) -> Tensor:
        dead = spikes.sum(-1) == 0
        while dead.any():
            fresh = (torch.rand(int(dead.sum()), count, generator=generator, device=device) < p).float()
            spikes[dead] = fresh
            dead = spikes.sum(-1) == 0
        return spikes

    path = [redraw(torch.zeros(batch, count, device=device), p_on)]
    for _ in range(steps - 1):
        switch = (torch.rand(batch, count, generator=generator, device=device) >= stay).float()
        path.append(redraw((path[-1] - switch).abs(), 1 - stay))
    return torch.stack(path)


def draw_speed(shape: torch.Size | tuple[int, ...], generator: torch.Generator) -> Tensor:
    """|Laplace(1, 0.1)| speeds by the inverse of its distribution function."""
    u = torch.rand(shape, generator=generator) - 0.5
    return (1 - 0.1 * u.sign() * torch.log1p(-2 * u.abs().clamp(max=0.4999999))).abs()


def bernoulli_kl_halved(target: float, mean: Tensor) -> Tensor:
    """The published aggregate: half of KL(Bernoulli(target) || Bernoulli(mean)), guarded by 1e-20."""
    off = 1 - mean
    on_term = target * (math.log(target) - torch.log(mean + 1e-20))
    off_term = (1 - target) * (math.log(1 - target) - torch.log(off + 1e-20))
    return 0.5 * (on_term + off_term)


def spike_path_kl(logits: Tensor, spikes: Tensor, p_on: float, stay: float) -> Tensor:
    """Per-unit KL of the inferred spikes from the sticky prior given the step before, a scalar: mean over samples.

    logits (T, B, K) of q(y_t), spikes (T, B, K) in [0, 1], the samples whose predecessor conditions the prior:
    p(y_1) = p_on, p(y_t | y_{t-1}) = stay y_{t-1} + (1 - stay)(1 - y_{t-1}). Summed over steps and flows. The exclusion
    of the all-zero state couples the units and is left out: the bound is that of the chain without it.
    """
    q = torch.sigmoid(logits)
    before = spikes[:-1]
    prior = torch.cat([torch.full_like(q[:1], p_on), stay * before + (1 - stay) * (1 - before)])
    log_q, log_not_q = torch.nn.functional.logsigmoid(logits), torch.nn.functional.logsigmoid(-logits)
    kl = q * (log_q - torch.log(prior)) + (1 - q) * (log_not_q - torch.log(1 - prior))
    return kl.sum((0, 2)).mean()


def laplace_kl(mean: Tensor, scale: Tensor, prior_mean: float = 1.0, prior_scale: float = 0.1) -> Tensor:
    """KL(Laplace(mean, scale) || Laplace(prior_mean, prior_scale)), elementwise."""
    distance = (mean - prior_mean).abs()
    inner = scale * torch.exp(-distance / scale) + distance
    return math.log(prior_scale) - torch.log(scale) + inner / prior_scale - 1


def slab_statistics(slab: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and Laplace scale (K,) of all speeds (T, B, K), as published: squares divided by B (T-1), 1e-3 added."""
    steps, batch, count = slab.shape
    flat = slab.reshape(steps * batch, count)
    mean = flat.mean(0)
    squares = ((flat - mean) ** 2).sum(0)
    return mean + 1e-3, torch.sqrt(0.5 * squares / (batch * max(steps - 1, 1))) + 1e-3
