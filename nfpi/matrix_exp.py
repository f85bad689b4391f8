"""Matrix exponentials: exp(W), and its action exp(A) x on one vector a pixel (Xiao & Liu, ICML 2020, section 4).

A coupling layer needs only exp(A) x. Its Taylor series costs n^2 a term where squaring the matrix costs n^3, and its
log-determinant is tr(A). Every matrix of a batch is scaled by its own norm, and the host is asked once a call (never
once a term) for the number of terms; a caller that knows a bound of the norm passes it and saves even that.
"""

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

MAX_NORM = 300.0  # exp of it overflows float32; a trained coupling stays below 10


@functools.lru_cache(maxsize=4096)
def taylor_plan(bound: float, eps: float) -> tuple[int, int]:
    """(steps, terms): split the unit interval in `steps` so that each piece has norm <= 2, and take so many Taylor
    terms that the remainder theta^(m+1)/(m+1)! is below a quarter of the float type's `eps`.
    """
    steps = max(1, math.ceil(bound / 2))
    theta = max(bound / steps, 2.0**-10)
    terms, remainder = 1, theta * theta / 2
    while remainder > eps / 4:
        terms += 1
        remainder *= theta / (terms + 1)
    return steps, terms


def coarse(bounds: Sequence[float | None]) -> tuple[float | None, ...] | None:
    """Bounds rounded up to powers of sqrt 2, so that few plans occur; None where one is beyond MAX_NORM, and so may be
    loose and has to be measured.
    """
    if not all(bound is None or bound <= MAX_NORM for bound in bounds):  # NaN too
        return None
    return tuple(bound and min(2 ** (math.ceil(2 * math.log2(bound)) / 2), MAX_NORM) for bound in bounds)


def row_norm(a: Tensor) -> Tensor:
    """Largest absolute row sum of each matrix: (..., n, n) -> (...)."""
    return a.abs().sum(-1).amax(-1)


def expm(a: Tensor, most: int | None = None) -> Tensor:
    """exp(a) of square matrices (..., n, n) by scaling and squaring; each matrix is scaled by its own norm.

    Float32 or float64. A matrix that needs fewer squarings than its neighbours keeps its result, so a batch of mixed
    magnitudes is as accurate as one matrix at a time. `most`: squarings that are enough, where the caller knows it; the
    device is then not asked, and a matrix that would need more becomes NaN.
    """
    norm = row_norm(a.detach()).clamp_min(torch.finfo(a.dtype).tiny)
    squarings = torch.ceil(torch.log2(norm)).clamp_min(-1) + 1  # per matrix: norm / 2^s <= 1/2
    squarings = squarings.nan_to_num(0, 0, 0)  # a lost weight stays lost; the training loop names its layer
    bounded = most is not None
    most = most if bounded else int(squarings.max())  # the one synchronisation of this call
    _, terms = taylor_plan(0.5, torch.finfo(a.dtype).eps)
    x = a * torch.exp2(-squarings)[..., None, None]
    eye = torch.eye(a.shape[-1], dtype=a.dtype, device=a.device)
    y = eye + x / terms
    for k in range(terms - 1, 0, -1):  # Horner: I + x/1 (I + x/2 (I + ...)); the linear term is always there
        y = eye + (x @ y) / k
    for k in range(most):
        y = torch.where((squarings > k)[..., None, None], y @ y, y)
    return torch.where((squarings > most)[..., None, None], math.nan, y) if bounded else y


def expm_ref(a: Tensor) -> Tensor:
    """exp(a) by PyTorch's own matrix exponential: the oracle of `expm`."""
    return torch.matrix_exp(a.contiguous())


def phi(a: Tensor) -> Tensor:
    """(exp(a) - I) a^-1 = sum_j a^j / (j+1)! of (..., n, n), for singular `a` too.

    It is the upper right block of exp([[a, I], [0, 0]]).
    """
    n = a.shape[-1]
    eye = torch.eye(n, dtype=a.dtype, device=a.device).expand_as(a)
    top = torch.cat([a, eye], dim=-1)
    return expm(torch.cat([top, torch.zeros_like(top)], dim=-2))[..., :n, n:]


class _TaylorAction(torch.autograd.Function):
    """sum_{k<=m} (scale a)^k x / k! with a gradient that is accumulated in place: n^2 work a term, both ways.

    a (B, n, n, P), x (B, n, P): pixels innermost, so that every product is a plain sum over one axis.
    """

    @staticmethod
    def forward(ctx, a: Tensor, x: Tensor, scale: float, terms: int) -> Tensor:
        stages = [x]
        for k in range(terms, 0, -1):
            stages.append(torch.add(x, (a * stages[-1][:, None]).sum(2), alpha=scale / k))
        ctx.save_for_backward(a, torch.stack(stages[:-1]))
        ctx.scale, ctx.terms = scale, terms
        return stages[-1]

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        a, stages = ctx.saved_tensors
        grad_a, grad_x = torch.zeros_like(a), grad.clone()
        for k in range(1, ctx.terms + 1):
            weight = ctx.scale / k
            grad_a.addcmul_(grad[:, :, None], stages[ctx.terms - k][:, None], value=weight)
            grad = (a * grad[:, :, None]).sum(1).mul_(weight)
            grad_x += grad
        return grad_a, grad_x, None, None


def expm_action(a: Tensor, x: Tensor, bound: float | None = None) -> Tensor:
    """exp(a) x for a (B, n, n, P) and x (B, n, P), P matrices a sample (the pixels) on the last axis.

    `bound`: an upper bound of the row norms of `a`; without it the norm is measured (one synchronisation). The action
    is repeated on `bound / 2` pieces of the unit interval. NaN when a norm exceeds MAX_NORM. Once differentiable.
    """
    plan = _plan(a, bound)
    if plan is None:
        return x * math.nan
    steps, terms = plan
    for _ in range(steps):
        x = _TaylorAction.apply(a, x, 1 / steps, terms)
    return x


def expm_action_ref(a: Tensor, x: Tensor) -> Tensor:
    """exp(a) x with the full exponential of every matrix: the oracle of `expm_action`."""
    matrices = torch.matrix_exp(a.permute(0, 3, 1, 2).contiguous())  # (B, P, n, n)
    return (matrices @ x.permute(0, 2, 1)[..., None])[..., 0].permute(0, 2, 1)


def phi_action(a: Tensor, u: Tensor, bound: float | None = None) -> Tensor:
    """phi(a) u, phi(a) = sum_j a^j / (j+1)!, for a (B, n, n, P) and u (B, n, P).

    phi(a) u is the value at t = 1 of y' = a y + u, y(0) = 0; one piece of length h takes y to y + h phi(h a)(a y + u).
    """
    plan = _plan(a, bound)
    if plan is None:
        return u * math.nan
    steps, terms = plan
    y, h = torch.zeros_like(u), 1 / steps
    for _ in range(steps):
        slope = (u + (a * y[:, None]).sum(2)) if steps > 1 else u
        increment = slope
        for k in range(terms, 0, -1):
            increment = slope + (a * increment[:, None]).sum(2) * (h / (k + 1))
        y = y + h * increment
    return y


def _plan(a: Tensor, bound: float | None) -> tuple[int, int] | None:
    """`taylor_plan` for matrices (B, n, n, P); None where a norm beyond MAX_NORM says that the weights have diverged.

    A bound beyond it may only be loose: then the norm itself is measured. Norms are rounded up to a multiple of 1/8, so
    that there are few plans, and forward and inverse use the same one.
    """
    if bound is None or not bound <= MAX_NORM:
        bound = float(a.detach().abs().sum(2).amax()) if a.numel() else 0.0
    if not bound <= MAX_NORM:  # NaN too
        return None
    return taylor_plan(math.ceil(bound * 8) / 8, torch.finfo(a.dtype).eps)
