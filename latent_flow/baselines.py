"""Two plain ways to move a latent, in place of the flows: what the flows must beat with the same networks and budget.

`--transition linear` is one linear operator a transformation, `--transition free` a network that no potential binds.
Both start at rest and have the parts of `StackedFlows` that a rollout asks for. Axes: B samples, K transformations, D
latent units.
"""

import torch
from torch import Tensor, nn

from latent_flow.fields import sinusoidal_embedding


class LinearSteps(nn.Module):
    """z_t = z_{t-1} + W_k z_{t-1} + b_k, the same at every step of a sequence; latents of size `dim`, k < `count`."""

    rotation = None

    def __init__(self, count: int, dim: int):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(count, dim, dim))
        self.bias = nn.Parameter(torch.zeros(count, dim))

    def stacked(self, steps: int, only: list[int] | None = None) -> "LinearAt":
        """The operators `only` (default: all), at any time."""
        return LinearAt(self, slice(None) if only is None else only)


class LinearAt:
    """The chosen operators at points z (B, D): `velocity` (B, D) and its `jacobian` (B, D, D)."""

    potential = rotation = force = None

    def __init__(self, steps: LinearSteps, only: slice | list[int], z: Tensor | None = None):
        self.steps, self.only, self.z = steps, only, z

    def at(self, z: Tensor, index: int) -> "LinearAt":
        """The operators at points z (B, D); they know no time."""
        return LinearAt(self.steps, self.only, z)

    def velocity(self, c1: Tensor, c2: Tensor | None = None) -> Tensor:
        """sum_k c1_k (W_k z + b_k) (B, D) for coefficients (B, K)."""
        moved = torch.einsum("kij,bj->kbi", self.steps.weight[self.only], self.z)
        return torch.einsum("bk,kbd->bd", c1, moved + self.steps.bias[self.only][:, None])

    def jacobian(self, c1: Tensor, c2: Tensor | None = None) -> Tensor:
        """sum_k c1_k W_k (B, D, D)."""
        return torch.einsum("bk,kij->bij", c1, self.steps.weight[self.only])


class FreeSteps(nn.Module):
    """z_t = z_{t-1} + B_k tanh(A_k z_{t-1} + C_k e(t) + a_k) + b_k with D hidden units, e(t) the flows' embedding."""

    rotation = None

    def __init__(self, count: int, dim: int):
        super().__init__()
        self.inner = nn.ModuleList(nn.Linear(dim, dim) for _ in range(count))
        self.time = nn.ModuleList(nn.Linear(dim, dim, bias=False) for _ in range(count))
        self.outer = nn.ModuleList(nn.Linear(dim, dim) for _ in range(count))
        for layer in self.outer:
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def stacked(self, steps: int, only: list[int] | None = None) -> "FreeStacked":
        """The networks `only` (default: all), ready for the times 0..`steps`."""
        return FreeStacked(self, list(range(len(self.outer))) if only is None else only, steps)


class FreeStacked:
    """The chosen networks with their embedded times (N, D)."""

    def __init__(self, free: FreeSteps, only: list[int], steps: int):
        self.free, self.only = free, only
        weight = free.outer[0].weight
        self.times = sinusoidal_embedding(torch.arange(steps + 1).to(weight), weight.shape[0])

    def at(self, z: Tensor, index: int) -> "FreeAt":
        """The networks at points z (B, D) and the time of number `index`."""
        return FreeAt(self, z, index)


class FreeAt:
    """The chosen networks at B points and one time: `velocity` (B, D) and its `jacobian` (B, D, D)."""

    potential = rotation = force = None

    def __init__(self, stacked: FreeStacked, z: Tensor, index: int):
        free, time = stacked.free, stacked.times[index]
        self.inner, self.outer = ([part[k] for k in stacked.only] for part in (free.inner, free.outer))
        moments = zip(self.inner, (free.time[k] for k in stacked.only), strict=True)
        self.hidden = [torch.tanh(inner(z) + embed(time)) for inner, embed in moments]  # K times (B, D)

    def velocity(self, c1: Tensor, c2: Tensor | None = None) -> Tensor:
        """sum_k c1_k v_k (B, D) for coefficients (B, K)."""
        moved = torch.stack([outer(h) for outer, h in zip(self.outer, self.hidden, strict=True)], 1)  # (B, K, D)
        return torch.einsum("bk,bkd->bd", c1, moved)

    def jacobian(self, c1: Tensor, c2: Tensor | None = None) -> Tensor:
        """sum_k c1_k B_k diag(1 - tanh^2) A_k (B, D, D)."""
        parts = zip(c1.unbind(1), self.outer, self.hidden, self.inner, strict=True)
        return sum(c[:, None, None] * (out.weight @ ((1 - h**2)[..., None] * a.weight)) for c, out, h, a in parts)


TRANSITIONS = {"linear": LinearSteps, "free": FreeSteps}
