"""The one latent rollout of all variants: fields -> velocity -> log-determinant -> next latent.

z_t = z_{t-1} + sum_k c1_k grad u^k(z_{t-1}, t) + c2_k r^k(z_{t-1}), for t = 1..T with integer times (the published
convention). Supervised: c1 is the one-hot of the known flow. Weakly: an inferred one-hot. Unsupervised: spikes
times slabs, new at every step.

Axes: T steps, B samples, K flows, D latent units.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from common.errors import UserError
from latent_flow.fields import FieldAt, StackedFlows

LOG_DETS = ("rowsum", "trace", "hutchinson", "exact", "none")


@dataclass
class Path:
    """A rollout: latents z (T+1, B, D), the fields met on the way, and log|det dz_t/dz_{t-1}| (T, B) or None."""

    z: Tensor
    fields: list[FieldAt]  # T entries: at z_{t-1}, time t
    log_det: Tensor | None


def rollout(
    flows: StackedFlows,
    z: Tensor,
    c1: Tensor,
    c2: Tensor | None = None,
    log_det: str = "none",
    terms: int = 2,
    generator: torch.Generator | None = None,
) -> Path:
    """Move z (B, D) along the flows with coefficients c1, c2 (T, B, K).

    `flows` must be stacked for the times 0..T at least. `log_det`: one of `LOG_DETS`, see `log_abs_det`.
    """
    latents, fields, volumes = [z], [], []
    for step in range(1, len(c1) + 1):
        c2_t = None if c2 is None else c2[step - 1]
        field = flows.at(z, step)
        fields.append(field)
        if log_det != "none":
            volumes.append(log_abs_det(field, c1[step - 1], c2_t, log_det, terms, generator))
        z = z + field.velocity(c1[step - 1], c2_t)
        latents.append(z)
    return Path(torch.stack(latents), fields, torch.stack(volumes) if volumes else None)


def log_abs_det(
    field: FieldAt,
    c1: Tensor,
    c2: Tensor | None,
    mode: str,
    terms: int = 2,
    generator: torch.Generator | None = None,
) -> Tensor:
    """log|det(I + J)| of one step (B,), J the Jacobian of the velocity with coefficients (B, K).

    exact: LU of I + J, O(D^3) a sample. trace: tr J, the first-order term. hutchinson: the first `terms` terms of
    sum_n (-1)^(n+1) tr(J^n) / n with one Rademacher probe, valid for |J| < 1. rowsum: the published
    sum_d log|1 + (H 1)_d|, no determinant (parity only).
    """
    if mode == "exact":
        jacobian = field.jacobian(c1, c2)
        eye = torch.eye(jacobian.shape[-1], dtype=jacobian.dtype, device=jacobian.device)
        return torch.linalg.slogdet(eye + jacobian).logabsdet
    if mode == "trace":
        return field.trace(c1, c2)
    if mode == "hutchinson":
        grad = field.potential.grad
        probe = torch.randint(0, 2, grad.shape[1:], device=grad.device, generator=generator).to(grad) * 2 - 1
        total, power = 0.0, probe
        for n in range(1, terms + 1):
            power = field.jvp(c1, c2, power)
            total = total + (-1) ** (n + 1) * (probe * power).sum(-1) / n
        return total
    if mode == "rowsum":
        return torch.log((1 + row_sums(field, c1)).abs()).sum(-1)
    raise UserError(f"unknown log-determinant {mode!r}; known: {', '.join(LOG_DETS)}")


def row_sums(field: FieldAt, c1: Tensor) -> Tensor:
    """sum_k c1_k H^k 1 (B, D): what the published code uses as second derivative (parity only)."""
    return torch.einsum("bk,kbd->bd", c1, field.potential.row_sums())


def jacobian_ref(velocity: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """Jacobian (B, D, D) of a velocity (B, D) -> (B, D) that acts on each sample alone, by `torch.func`.

    One forward-mode derivative a basis vector, all of them vectorised: the oracle of the closed forms.
    """
    basis = torch.eye(z.shape[-1], dtype=z.dtype, device=z.device)
    columns = torch.func.vmap(lambda x: torch.func.jvp(velocity, (z,), (x.expand_as(z),))[1])(basis)
    return columns.permute(1, 2, 0)


def log_abs_det_ref(velocity: Callable[[Tensor], Tensor], z: Tensor) -> Tensor:
    """log|det(I + dv/dz)| (B,) of a velocity by `jacobian_ref`."""
    eye = torch.eye(z.shape[-1], dtype=z.dtype, device=z.device)
    return torch.linalg.slogdet(eye + jacobian_ref(velocity, z)).logabsdet


def inverse_step(flows: StackedFlows, z: Tensor, step: int, c1: Tensor, c2: Tensor | None = None) -> Tensor:
    """Solve y + v(y, step) = z for y (B, D) by fixed-point iteration; the true inverse of one step.

    Converges where the velocity is a contraction (Lipschitz constant below 1). Raises UserError where it is not.
    """
    y = z
    for _ in range(200):
        moved = z - flows.at(y, step).velocity(c1, c2)
        if torch.allclose(moved, y, rtol=0, atol=1e-6 if z.dtype == torch.float32 else 1e-12):
            return moved
        y = moved
    raise UserError("the flow cannot be inverted here: its velocity is no contraction (fixed point not reached)")


def constant_coefficients(labels: Tensor, count: int, steps: int, dtype: torch.dtype) -> Tensor:
    """One-hot coefficients (T, B, K) of the flow numbers `labels` (B,), the same at every step."""
    return torch.nn.functional.one_hot(labels, count).to(dtype).expand(steps, -1, -1)
