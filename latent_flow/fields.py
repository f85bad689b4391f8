"""Latent vector fields in closed form: potentials, forces, rotational fields, the diffusion prior.

A set of K flows keeps one module a flow (so that an unused flow gets no gradient and no optimizer step) and
is evaluated with all weights stacked: one batched product for K flows. Derivatives of a potential are
written out instead of taken by nested autograd: they stay differentiable once more for training, and
`tests/latent_flow` holds them against autograd in float64.

Axes: K flows, B samples, D latent units, T steps.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from common.errors import UserError


def sinusoidal_embedding(time: Tensor, dim: int) -> Tensor:
    """Embed times (N,) as (N, dim): sines, then cosines, of `time * 10000^(-i / (dim/2 - 1))`.

    Raises UserError for an odd `dim` or one below 4, for which the frequencies are undefined.
    """
    angle = time[:, None] * _frequencies(dim, time)  # (N, dim/2)
    return torch.cat([angle.sin(), angle.cos()], dim=1)


def _frequencies(dim: int, like: Tensor) -> Tensor:
    if dim < 4 or dim % 2:
        raise UserError(f"the latent size must be even and at least 4 (got {dim}): the time embedding halves it")
    half = dim // 2
    return torch.exp(torch.arange(half, dtype=like.dtype, device=like.device) * (-math.log(10000.0) / (half - 1)))


class PotentialMLP(nn.Module):
    """Parameters of one scalar network u(z, t) of latent size D; evaluated by `Potential`."""

    def __init__(self, dim: int):
        super().__init__()
        self.layer_x = nn.Linear(dim, dim)
        self.layer_time = nn.Linear(dim, dim)
        self.layer_time2 = nn.Linear(dim, dim)
        self.layer_fusion = nn.Linear(dim, dim)
        self.layer_out = nn.Linear(dim, 1)


class RotationMLP(nn.Module):
    """Parameters of one time-independent network F: R^D -> R^D; evaluated by `Rotation` or `DivergenceFree`."""

    def __init__(self, dim: int):
        super().__init__()
        self.layer_x = nn.Linear(dim, dim)
        self.layer_out = nn.Linear(dim, dim)


def _stack(modules: Sequence[nn.Module], layer: str) -> tuple[Tensor, Tensor]:
    """Weights (K, out, in) and biases (K, 1, out) of one layer of K modules."""
    layers = [getattr(module, layer) for module in modules]
    return torch.stack([one.weight for one in layers]), torch.stack([one.bias for one in layers])[:, None]


class Potential:
    """K networks u^k(z, t) = tanh(w_o . tanh(W_f (tanh(W_x z + b_x) + tau(t)) + b_f) + b_o), ready for all times.

    `times` (N,) are the times that `at` may ask for; tau(t) = W_2 GELU(W_1 e(t) + b_1) + b_2 and its time
    derivative are computed once for all of them.
    """

    def __init__(self, modules: Sequence[nn.Module], times: Tensor):
        self.w_x, self.b_x = _stack(modules, "layer_x")  # (K, D, D), (K, 1, D)
        self.w_f, self.b_f = _stack(modules, "layer_fusion")
        w_out, b_out = _stack(modules, "layer_out")
        self.w_o, self.b_o = w_out[:, 0], b_out[:, 0]  # (K, D), (K, 1)
        w_1, b_1 = _stack(modules, "layer_time")
        w_2, b_2 = _stack(modules, "layer_time2")
        dim = self.w_x.shape[-1]
        freq = _frequencies(dim, self.w_x)
        times = times.to(self.w_x)
        angle = times[:, None] * freq  # (N, D/2)
        embedding = torch.cat([angle.sin(), angle.cos()], dim=1).expand(len(modules), -1, -1)  # (K, N, D)
        speed = torch.cat([freq * angle.cos(), -freq * angle.sin()], dim=1).expand(len(modules), -1, -1)
        pre = torch.baddbmm(b_1, embedding, w_1.mT)
        cdf = 0.5 * (1 + torch.erf(pre / math.sqrt(2)))
        pdf = torch.exp(-0.5 * pre**2) / math.sqrt(2 * math.pi)
        self.tau = torch.baddbmm(b_2, pre * cdf, w_2.mT)  # (K, N, D)
        self.tau_t = ((cdf + pre * pdf) * (speed @ w_1.mT)) @ w_2.mT  # (K, N, D)

    def at(self, z: Tensor, index: int) -> "PotentialAt":
        """The potentials at points z (B, D) and the time of number `index`."""
        return PotentialAt(self, z, index)


class PotentialAt:
    """Value and derivatives of K potentials at B points: `u` (K, B), `grad` (K, B, D), `u_t` (K, B).

    Further derivatives are methods: `hvp`, `hessian`, `laplacian`.
    """

    def __init__(self, net: Potential, z: Tensor, index: int):
        self.net = net
        self.a = torch.tanh(torch.baddbmm(net.b_x, z.expand(len(net.w_x), -1, -1), net.w_x.mT))  # (K, B, D)
        tau = net.tau[:, index : index + 1]
        self.h = torch.tanh(torch.baddbmm(net.b_f, self.a + tau, net.w_f.mT))  # (K, B, D)
        self.u = torch.tanh(torch.einsum("kbd,kd->kb", self.h, net.w_o) + net.b_o)
        self.s_a, self.s_h, self.s_u = 1 - self.a**2, 1 - self.h**2, 1 - self.u**2
        self.b = (net.w_o[:, None] * self.s_h) @ net.w_f  # (K, B, D): d o / d a
        self.slope = (self.b * self.s_a) @ net.w_x  # (K, B, D): d o / d z
        self.grad = self.s_u[..., None] * self.slope
        self.u_t = self.s_u * torch.einsum("kbd,kd->kb", self.b, net.tau_t[:, index])

    def hvp(self, x: Tensor) -> Tensor:
        """Hessian times a vector: x (B, D) or (K, B, D) or (D,), result (K, B, D)."""
        net = self.net
        x = x.expand_as(self.a)
        q = x @ net.w_x.mT
        r = (self.s_a * q) @ net.w_f.mT
        through_h = (net.w_o[:, None] * (-2 * self.h * self.s_h) * r) @ net.w_f
        q_o = (self.s_a * through_h + self.b * (-2 * self.a * self.s_a) * q) @ net.w_x
        along = (x * self.slope).sum(-1, keepdim=True)
        s_u, u = self.s_u[..., None], self.u[..., None]
        return s_u * q_o - 2 * u * s_u * along * self.slope

    def row_sums(self) -> Tensor:
        """Hessian times the vector of ones (K, B, D): what the published code takes for second derivatives."""
        return self.hvp(torch.ones_like(self.a))

    def hessian(self) -> Tensor:
        """All second derivatives (K, B, D, D); O(D^3) a sample."""
        net = self.net
        v = net.w_f[:, None] @ (self.s_a[..., None] * net.w_x[:, None])  # (K, B, D, D)
        inner = v.mT @ ((net.w_o[:, None] * (-2 * self.h * self.s_h))[..., None] * v)
        outer = net.w_x.mT[:, None] @ ((self.b * (-2 * self.a * self.s_a))[..., None] * net.w_x[:, None])
        s_u, u = self.s_u[..., None, None], self.u[..., None, None]
        rank_one = self.slope[..., :, None] * self.slope[..., None, :]
        return s_u * (inner + outer) - 2 * u * s_u * rank_one

    def laplacian(self) -> Tensor:
        """Trace of the Hessian (K, B), without forming it."""
        net = self.net
        gram = net.w_x @ net.w_x.mT  # (K, D, D)
        weighted = net.w_f[:, None] * self.s_a[..., None, :]  # (K, B, D, D): rows of W_f diag(s_a)
        norm_v = ((weighted @ gram[:, None]) * weighted).sum(-1)  # (K, B, D): |V_j|^2
        norm_x = (net.w_x**2).sum(-1)[:, None]  # (K, 1, D)
        inner = (net.w_o[:, None] * (-2 * self.h * self.s_h) * norm_v).sum(-1)
        outer = (self.b * (-2 * self.a * self.s_a) * norm_x).sum(-1)
        return self.s_u * (inner + outer) - 2 * self.u * self.s_u * (self.slope**2).sum(-1)


class Rotation:
    """K networks r^k(z) = tanh(W_b tanh(W_a z + b_a) + b_b), the penalised ("soft") rotational fields."""

    def __init__(self, modules: Sequence[nn.Module]):
        self.w_a, self.b_a = _stack(modules, "layer_x")
        self.w_b, self.b_b = _stack(modules, "layer_out")

    def at(self, z: Tensor) -> "RotationAt":
        """The fields at points z (B, D)."""
        return RotationAt(self, z)


class RotationAt:
    """Value `field` (K, B, D) of K rotational networks; `divergence`, `jvp` and `jacobian` in closed form."""

    def __init__(self, net: Rotation, z: Tensor):
        self.net = net
        self.p = torch.tanh(torch.baddbmm(net.b_a, z.expand(len(net.w_a), -1, -1), net.w_a.mT))
        self.field = torch.tanh(torch.baddbmm(net.b_b, self.p, net.w_b.mT))
        self.s_p, self.s_q = 1 - self.p**2, 1 - self.field**2

    def divergence(self) -> Tensor:
        """div r (K, B): one product with the fixed matrix W_b * W_a^T."""
        return (self.s_q * (self.s_p @ (self.net.w_b * self.net.w_a.mT).mT)).sum(-1)

    def jvp(self, x: Tensor) -> Tensor:
        """Jacobian times a vector x (B, D) or (K, B, D): (K, B, D)."""
        x = x.expand_as(self.p)
        return self.s_q * ((self.s_p * (x @ self.net.w_a.mT)) @ self.net.w_b.mT)

    def jacobian(self) -> Tensor:
        """The Jacobian (K, B, D, D): [i, j] = d r_i / d z_j."""
        inner = self.net.w_b[:, None] @ (self.s_p[..., None] * self.net.w_a[:, None])
        return self.s_q[..., None] * inner


class DivergenceFree(Rotation):
    """K fields v_i = sum_j d_j (J_ij - J_ji), J the Jacobian of the network F of `Rotation`: div v = 0 identically.

    Equals laplacian(F)_i - d_i div F. For the two-layer F both terms are closed forms that need only the
    Jacobian, so one evaluation costs O(D^3) a sample and no higher-order autograd.
    """

    def at(self, z: Tensor) -> "DivergenceFreeAt":
        """The fields at points z (B, D)."""
        return DivergenceFreeAt(self, z)


class DivergenceFreeAt:
    """Value `field` (K, B, D) of the divergence-free construction; Jacobians by forward-mode `torch.func`."""

    def __init__(self, net: DivergenceFree, z: Tensor):
        self.net, self.z = net, z
        self.field = self._field(z)

    def _field(self, z: Tensor) -> Tensor:
        net = self.net
        base = RotationAt(net, z)
        q, s_q, p, s_p = base.field, base.s_q, base.p, base.s_p
        g = net.w_b[:, None] @ (s_p[..., None] * net.w_a[:, None])  # (K, B, D, D): d (W_b p) / d z
        curve = -2 * p * s_p  # (K, B, D): second derivative of the inner tanh
        inner_norm = (net.w_a**2).sum(-1)[:, None]  # (K, 1, D): |row m of W_a|^2
        laplacian = -2 * q * s_q * (g**2).sum(-1) + s_q * ((curve * inner_norm) @ net.w_b.mT)
        diagonal = g.diagonal(dim1=-2, dim2=-1)  # (K, B, D)
        outer = ((-2 * q * s_q * diagonal)[..., None, :] @ g)[..., 0, :]
        # sum_j s_q_j W_b[j, m] W_a[m, j], then back through the second derivative of p_m
        coupled = s_q @ (net.w_b * net.w_a.mT)  # (K, B, D)
        return laplacian - outer - (coupled * curve) @ net.w_a

    def divergence(self) -> Tensor:
        """Zero (K, B): the field has none by construction."""
        return torch.zeros_like(self.field[..., 0])

    def jvp(self, x: Tensor) -> Tensor:
        """Jacobian times a vector x (B, D) or (D,): (K, B, D)."""
        return torch.func.jvp(self._field, (self.z,), (x.expand_as(self.z),))[1]

    def jacobian(self) -> Tensor:
        """The Jacobian (K, B, D, D), all columns in one vectorised forward pass."""
        basis = torch.eye(self.z.shape[-1], dtype=self.z.dtype, device=self.z.device)
        columns = torch.func.vmap(self.jvp)(basis)  # (D, K, B, D)
        return columns.permute(1, 2, 3, 0)


ROTATIONS = {"soft": Rotation, "divfree": DivergenceFree}


class Flows(nn.Module):
    """The parameters of K flows: potentials, and forces (supervised, weak) or rotational fields (unsupervised).

    `rotation`: None, "soft" (network with a divergence penalty) or "divfree" (free of divergence by construction).
    State-dict keys are those of the published checkpoints: `MLP_SET`, `FORCE_SET`, `DIV_MLP`.
    """

    def __init__(self, count: int, dim: int, rotation: str | None = None):
        super().__init__()
        if rotation is not None and rotation not in ROTATIONS:
            raise UserError(f"unknown rotational field {rotation!r}; known: {', '.join(ROTATIONS)}")
        self.count, self.dim, self.rotation = count, dim, rotation
        self.MLP_SET = nn.ModuleList(PotentialMLP(dim) for _ in range(count))
        if rotation is None:
            self.FORCE_SET = nn.ModuleList(PotentialMLP(dim) for _ in range(count))
        else:
            self.DIV_MLP = nn.ModuleList(RotationMLP(dim) for _ in range(count))

    def forward(self, times: Tensor, only: Sequence[int] | None = None) -> "StackedFlows":
        """Stack the weights of the flows `only` (default: all) for evaluation at `times` (N,)."""
        chosen = range(self.count) if only is None else only
        potential = Potential([self.MLP_SET[k] for k in chosen], times)
        if self.rotation is None:
            return StackedFlows(potential, Potential([self.FORCE_SET[k] for k in chosen], times), None)
        return StackedFlows(potential, None, ROTATIONS[self.rotation]([self.DIV_MLP[k] for k in chosen]))


class StackedFlows:
    """K flows ready for evaluation: `potential`, and `force` or `rotation` (the other is None)."""

    def __init__(self, potential: Potential, force: Potential | None, rotation: Rotation | None):
        self.potential, self.force, self.rotation = potential, force, rotation

    def at(self, z: Tensor, index: int) -> "FieldAt":
        """All K flows at points z (B, D) and the time of number `index`."""
        return FieldAt(self, z, index)


class FieldAt:
    """K flows at B points: `potential`, `rotation` (or None), `force` (K, B) (or None)."""

    def __init__(self, flows: StackedFlows, z: Tensor, index: int):
        self.potential = flows.potential.at(z, index)
        self.force = None if flows.force is None else flows.force.at(z, index).u
        self.rotation = None if flows.rotation is None else flows.rotation.at(z)

    def velocity(self, c1: Tensor, c2: Tensor | None) -> Tensor:
        """v = sum_k c1_k grad u^k + c2_k r^k (B, D) for coefficients (B, K)."""
        v = torch.einsum("bk,kbd->bd", c1, self.potential.grad)
        if self.rotation is not None:
            v = v + torch.einsum("bk,kbd->bd", c2, self.rotation.field)
        return v

    def jvp(self, c1: Tensor, c2: Tensor | None, x: Tensor) -> Tensor:
        """Jacobian of `velocity` (coefficients held fixed) times x (B, D): (B, D)."""
        out = torch.einsum("bk,kbd->bd", c1, self.potential.hvp(x))
        if self.rotation is not None:
            out = out + torch.einsum("bk,kbd->bd", c2, self.rotation.jvp(x))
        return out

    def jacobian(self, c1: Tensor, c2: Tensor | None) -> Tensor:
        """Jacobian of `velocity` (B, D, D)."""
        out = torch.einsum("bk,kbij->bij", c1, self.potential.hessian())
        if self.rotation is not None:
            out = out + torch.einsum("bk,kbij->bij", c2, self.rotation.jacobian())
        return out

    def trace(self, c1: Tensor, c2: Tensor | None) -> Tensor:
        """Divergence of `velocity` (B,): Laplacians of the potentials and divergences of the rotational fields."""
        out = torch.einsum("bk,kb->b", c1, self.potential.laplacian())
        if self.rotation is not None:
            out = out + torch.einsum("bk,kb->b", c2, self.rotation.divergence())
        return out


class GaussianPath(nn.Module):
    """Parameters of the published diffusion prior of one flow: a mean and a deviation a step, (T, 1) each."""

    def __init__(self, steps: int):
        super().__init__()
        self.mu = nn.Parameter(torch.zeros(steps, 1))
        self.sigma = nn.Parameter(torch.ones(steps, 1))


class DiffusionPrior(nn.Module):
    """The published prior flow psi^k = -D_k log p with D_k = 1 (`MLP_SET` of `GaussianPath`).

    Used by `--objective upstream` only: its density is lowered a step but never evaluated at the moved point.
    `diffused_log_prob` is the density of the diffusion it stands for.
    """

    def __init__(self, count: int, steps: int):
        super().__init__()
        self.MLP_SET = nn.ModuleList(GaussianPath(steps) for _ in range(count))

    def laplacian(self, step: int, only: Sequence[int] | None = None) -> Tensor:
        """Second derivative of psi^k in each dimension (K,) at `step` = 1..T: 1, then 1 / (sigma^2 + 1e-5)."""
        chosen = range(len(self.MLP_SET)) if only is None else only
        sigma = torch.stack([self.MLP_SET[k].sigma[step - 1, 0] for k in chosen])
        return torch.ones_like(sigma).detach() if step == 1 else 1 / (sigma**2 + 1e-5)


def diffused_log_prob(z: Tensor, step: int | Tensor, diffusion: float = 1.0) -> Tensor:
    """log p_t(z) (..., ) of a standard normal that diffuses: p_t = N(0, (1 + 2 D t) I), z (..., D), D >= 0.

    The exact solution of the prior flow psi = -D log p (Song et al. 2023, prior evolution) from p_0 = N(0, I).
    """
    variance = 1 + 2 * diffusion * step
    dim = z.shape[-1]
    log_variance = torch.log(variance) if isinstance(variance, Tensor) else math.log(variance)
    return -0.5 * (z**2).sum(-1) / variance - 0.5 * dim * (math.log(2 * math.pi) + log_variance)
