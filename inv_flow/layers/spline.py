"""Monotone rational-quadratic splines with linear tails (Durkan et al., Neural Spline Flows, 2019)."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def _knots(unnormalized: Tensor, bound: float, minimum: float) -> tuple[Tensor, Tensor]:
    """Bin sizes and knots on [-bound, bound]: (..., n) -> ((..., n), (..., n + 1)); the outer knots are +-bound
    exactly.
    """
    n = unnormalized.shape[-1]
    shares = minimum + (1 - minimum * n) * torch.softmax(unnormalized, dim=-1)
    inner = 2 * bound * torch.cumsum(shares, dim=-1)[..., :-1] - bound
    end = torch.full_like(unnormalized[..., :1], bound)
    knots = torch.cat([-end, inner, end], dim=-1)
    return knots.diff(dim=-1), knots


def rational_quadratic_spline(
    x: Tensor,
    unnormalized_widths: Tensor,
    unnormalized_heights: Tensor,
    unnormalized_derivatives: Tensor,
    tail_bound: float,
    minimum: float = 1e-3,
    inverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Values and log|slope| of the spline (or of its inverse) at x (...).

    The unnormalised widths and heights are (..., n), the inner derivatives (..., n - 1), broadcast against x; the outer
    slopes are 1, and outside [-tail_bound, tail_bound] the map is the identity. minimum: least relative bin size and
    least slope.
    """
    inside = (x >= -tail_bound) & (x <= tail_bound)
    at = x.clamp(-tail_bound, tail_bound)
    widths, knots_x = _knots(unnormalized_widths, tail_bound, minimum)
    heights, knots_y = _knots(unnormalized_heights, tail_bound, minimum)
    edge = math.log(math.expm1(1 - minimum))  # softplus(edge) + minimum = 1: slope 1 at a derivative parameter of 0
    slopes = minimum + F.softplus(edge + F.pad(unnormalized_derivatives, (1, 1)))  # (..., n + 1)

    shape = (*torch.broadcast_shapes(x.shape, widths.shape[:-1]), -1)
    # at = bound belongs to the last bin
    knots = (knots_y if inverse else knots_x)[..., 1:-1].expand(*shape[:-1], -1)
    index = (at.unsqueeze(-1) >= knots).sum(dim=-1, keepdim=True)

    def pick(values: Tensor, offset: int = 0) -> Tensor:
        return values.expand(*shape[:-1], values.shape[-1]).gather(-1, index + offset).squeeze(-1)

    x0, y0, w, h = pick(knots_x), pick(knots_y), pick(widths), pick(heights)
    d0, d1 = pick(slopes), pick(slopes, 1)
    s = h / w
    bend = d0 + d1 - 2 * s
    if inverse:
        rise = at - y0
        a = rise * bend + h * (s - d0)
        b = h * d0 - rise * bend
        c = -s * rise
        # the discriminant is not negative for a monotone spline; rounding may say otherwise
        theta = 2 * c / (-b - torch.sqrt((b.square() - 4 * a * c).clamp(min=0)))
        value = x0 + theta * w
    else:
        theta = (at - x0) / w
        value = y0 + h * (s * theta.square() + d0 * theta * (1 - theta)) / (s + bend * theta * (1 - theta))
    q = theta * (1 - theta)
    log_slope = (
        2 * s.log()
        + torch.log(d1 * theta.square() + 2 * s * q + d0 * (1 - theta).square())
        - 2 * torch.log(s + bend * q)
    )
    if inverse:
        log_slope = -log_slope
    return torch.where(inside, value, x), torch.where(inside, log_slope, torch.zeros_like(log_slope))
