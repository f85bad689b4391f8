"""Contracts: closed forms against autograd in float64, exact identities, statistics of the spike chain."""

import itertools
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from common.errors import UserError
from latent_flow import objective, spikes
from latent_flow.baselines import FreeSteps, LinearSteps
from latent_flow.data import DigitSequences
from latent_flow.encoders import (
    ConvVAE,
    CoveringConv2d,
    SpreadingConvTranspose2d,
    relaxed_bernoulli,
    spike_probability,
    temperature,
)
from latent_flow.fields import DivergenceFree, Flows, RotationMLP, diffused_log_prob, sinusoidal_embedding
from latent_flow.metrics import match
from latent_flow.model import Config, LatentFlow, Noise, training_step
from latent_flow.objective import Coefficients
from latent_flow.reference import potential_ref, training_step_ref
from latent_flow.rollout import inverse_step, jacobian_ref, log_abs_det, log_abs_det_ref, rollout
from latent_flow.transforms import colour, composed_sequence, hue_colour, sequence, shift_hue_ref, warp


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def wide(flows: Flows, scale: float = 2.0) -> Flows:
    """Weights larger than the default initialisation, so that curvature matters."""
    with torch.no_grad():
        for parameter in flows.parameters():
            parameter.mul_(scale)
    return flows.double()


@pytest.mark.parametrize("steps", [LinearSteps(3, 6), FreeSteps(3, 6)], ids=["linear", "free"])
def test_baselines_start_at_rest_and_have_their_jacobian(steps):
    z, c1, steps = torch.randn(5, 6).double(), torch.rand(5, 3).double(), steps.double()
    assert not steps.stacked(3).at(z, 2).velocity(c1).any()
    with torch.no_grad():
        for parameter in steps.parameters():
            parameter.normal_(0, 0.5)
    field = steps.stacked(3).at(z, 2)
    expected = jacobian_ref(lambda x: steps.stacked(3).at(x, 2).velocity(c1), z)
    torch.testing.assert_close(field.jacobian(c1), expected, rtol=1e-10, atol=1e-12)
    one = steps.stacked(3, [1]).at(z, 2).velocity(torch.ones(5, 1).double())
    torch.testing.assert_close(one, field.velocity(torch.tensor([[0.0, 1.0, 0.0]]).double().expand(5, -1)))


def test_baselines_are_the_formulas_of_their_docstrings():
    linear, free, z = LinearSteps(2, 4).double(), FreeSteps(2, 4).double(), torch.randn(3, 4).double()
    c = torch.tensor([0.0, 1.0]).double().expand(3, 3, -1)  # (T, B, K): the second transformation
    with torch.no_grad():
        for parameter in (*linear.parameters(), *free.parameters()):
            parameter.normal_(0, 0.5)
    one = torch.cat([linear.weight[1] + torch.eye(4), linear.bias[1][:, None]], 1)
    expected, moved = [z], z
    for _ in range(3):
        moved = torch.cat([moved, torch.ones(3, 1).double()], 1) @ one.mT
        expected.append(moved)
    torch.testing.assert_close(rollout(linear.stacked(3), z, c).z, torch.stack(expected))
    e = sinusoidal_embedding(torch.tensor([2.0]).double(), 4)
    hidden = torch.tanh(z @ free.inner[1].weight.mT + free.inner[1].bias + e @ free.time[1].weight.mT)
    expected = hidden @ free.outer[1].weight.mT + free.outer[1].bias
    torch.testing.assert_close(free.stacked(3).at(z, 2).velocity(c[0]), expected)


def test_a_linear_baseline_learns_a_rotation_of_the_latents():
    angle = math.pi / 8
    turn = torch.eye(4)
    turn[:2, :2] = torch.tensor([[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]])
    steps, c = LinearSteps(1, 4), torch.ones(4, 64, 1)
    optimizer = torch.optim.Adam(steps.parameters(), lr=0.02)
    for _ in range(200):
        z = torch.randn(64, 4)
        truth = torch.stack([z @ torch.linalg.matrix_power(turn, t).mT for t in range(5)])
        loss = ((rollout(steps.stacked(4), z, c).z - truth) ** 2).sum(-1).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    torch.testing.assert_close(steps.weight[0] + torch.eye(4), turn, rtol=0, atol=0.02)


@pytest.mark.parametrize("rotation", [None, "soft", "divfree"])
def test_field_derivatives_against_autograd(rotation):
    flows = wide(Flows(3, 6, rotation))
    stacked = flows(torch.arange(4))
    z = torch.randn(5, 6, dtype=torch.float64)
    c1, c2 = torch.rand(5, 3).double(), torch.rand(5, 3).double()

    def velocity(x):
        return stacked.at(x, 2).velocity(c1, c2)

    field = stacked.at(z, 2)
    jacobian = jacobian_ref(velocity, z)
    by_reverse = torch.stack([torch.autograd.functional.jacobian(velocity, z)[b, :, b] for b in range(5)])
    torch.testing.assert_close(jacobian, by_reverse, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(field.jacobian(c1, c2), jacobian, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(field.trace(c1, c2), jacobian.diagonal(dim1=1, dim2=2).sum(-1), rtol=1e-9, atol=1e-11)
    x = torch.randn_like(z)
    torch.testing.assert_close(field.jvp(c1, c2, x), (jacobian @ x[..., None])[..., 0], rtol=1e-10, atol=1e-12)
    exact = log_abs_det(field, c1, c2, "exact")
    torch.testing.assert_close(exact, log_abs_det_ref(velocity, z), rtol=1e-10, atol=1e-12)


def test_time_derivative_and_potential_against_autograd():
    flows = wide(Flows(2, 8))
    z = torch.randn(4, 8, dtype=torch.float64)
    field = flows(torch.tensor([0.0, 3.0])).at(z, 1)
    for k in range(2):
        values, slopes = [], []
        for one in z:  # one sample at a time: a shared time would sum its derivatives over the batch
            t = torch.tensor([3.0], dtype=torch.float64, requires_grad=True)
            u = potential_ref(flows.MLP_SET[k], one[None], t)
            values.append(u.item())
            slopes.append(torch.autograd.grad(u.sum(), t)[0].item())
        torch.testing.assert_close(
            field.potential.u[k], torch.tensor(values, dtype=torch.float64), rtol=1e-10, atol=1e-12
        )
        torch.testing.assert_close(
            field.potential.u_t[k], torch.tensor(slopes, dtype=torch.float64), rtol=1e-9, atol=1e-12
        )


def test_closed_forms_are_differentiable_twice():
    flows = wide(Flows(2, 4, "divfree"))

    def through(z):
        field = flows(torch.arange(2)).at(z, 1)
        return field.potential.grad.sum() + field.potential.u_t.sum() + field.rotation.field.pow(2).sum()

    z = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(through, z)
    parameters = list(flows.parameters())
    gradients = torch.autograd.grad(through(z), parameters, allow_unused=True)
    silent = [p.shape for p, g in zip(parameters, gradients, strict=True) if g is None or not g.any()]
    assert not silent


@pytest.mark.parametrize("dim", [4, 16])
def test_divergence_free_field(dim):
    modules = [RotationMLP(dim).double() for _ in range(2)]
    for module in modules:
        torch.nn.init.normal_(module.layer_x.weight)
        torch.nn.init.normal_(module.layer_out.weight)
    z = torch.randn(3, dim, dtype=torch.float64)
    field = DivergenceFree(modules).at(z)
    divergence = field.jacobian().diagonal(dim1=-2, dim2=-1).sum(-1)
    assert divergence.abs().max() < 1e-10
    assert field.field.abs().max() > 1e-2 and field.jacobian().abs().max() > 1e-2


def test_log_det_modes_agree_for_small_steps():
    flows = Flows(2, 6, "soft").double()
    stacked = flows(torch.arange(2))
    z = torch.randn(7, 6, dtype=torch.float64)
    c = torch.full((7, 2), 0.02, dtype=torch.float64)
    field = stacked.at(z, 1)
    exact, trace = log_abs_det(field, c, c, "exact"), log_abs_det(field, c, c, "trace")
    assert (exact - trace).abs().max() < 1e-3 < exact.abs().max() * 100
    many = stacked.at(z.repeat(4000, 1), 1)
    for terms, bound in ((1, 1e-3), (4, 2e-5)):
        c_many = c.repeat(4000, 1)
        draws = log_abs_det(many, c_many, c_many, "hutchinson", terms).unflatten(0, (4000, 7))
        assert (draws.mean(0) - exact).abs().max() < bound + 4 * draws.std(0).max() / math.sqrt(4000)


def test_hutchinson_is_unbiased_for_its_series():
    """The mean over all 2^D probes is the truncated series exactly."""
    dim = 4
    flows = wide(Flows(1, dim))
    z, c = torch.randn(1, dim, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    field = flows(torch.arange(2)).at(z, 1)
    jacobian = field.jacobian(c, None)[0]
    probes = torch.tensor([[1.0 if i >> d & 1 else -1.0 for d in range(dim)] for i in range(2**dim)]).double()
    first = torch.einsum("pi,ij,pj->p", probes, jacobian, probes).mean()
    second = torch.einsum("pi,ij,pj->p", probes, jacobian @ jacobian, probes).mean()
    many = flows(torch.arange(2)).at(z.expand(3000, -1), 1)
    draws = log_abs_det(many, c.expand(3000, -1), None, "hutchinson", 2, torch.Generator().manual_seed(1))
    expected = first - second / 2
    assert abs(draws.mean() - expected) < 4 * draws.std() / math.sqrt(3000)
    torch.testing.assert_close(expected, jacobian.trace() - (jacobian @ jacobian).trace() / 2)


def test_hamilton_jacobi_residual_of_an_analytic_solution():
    """u = |z|^2 / (2 (t + c)) solves d_t u + |grad u|^2 / 2 = 0; a force -f^2 adds f^2."""
    z, t, c = torch.randn(6, 5, dtype=torch.float64), 2.0, 0.7
    potential = SimpleNamespace(u_t=-(z**2).sum(-1)[None] / (2 * (t + c) ** 2), grad=(z / (t + c))[None])
    assert objective.hamilton_jacobi_residual(potential, None).abs().max() < 1e-14
    force = torch.rand(1, 6, dtype=torch.float64)
    torch.testing.assert_close(objective.hamilton_jacobi_residual(potential, force), force**2)


def test_pde_loss_does_not_depend_on_the_batch_size():
    flows = wide(Flows(2, 6))
    z = torch.randn(3, 6, dtype=torch.float64)
    losses = []
    for repeat in (1, 4):
        x = z.repeat(repeat, 1)
        c = Coefficients(torch.full((2, len(x), 2), 0.5, dtype=torch.float64))
        stacked = flows(torch.arange(3))
        losses.append(objective.pde_loss(rollout(stacked, x, c.c1), stacked, c))
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-12, atol=0)


def test_path_kl_of_gaussians_under_a_linear_flow():
    """A pure expansion keeps q Gaussian, so the one-sample KL averages to the closed form."""
    batch, dim, gain = 200_000, 4, 0.3
    mean, log_var = torch.full((batch, dim), 0.4).double(), torch.full((batch, dim), -0.6).double()
    z0 = mean + torch.randn_like(mean) * (0.5 * log_var).exp()
    path = SimpleNamespace(
        z=torch.stack([z0, z0 * (1 + gain)]), log_det=torch.full((1, batch), dim * math.log1p(gain)).double()
    )
    variance = math.exp(-0.6) * (1 + gain) ** 2
    prior = 1 + 2 * 0.5
    square = (0.4 * (1 + gain)) ** 2
    closed = dim * 0.5 * ((variance + square) / prior - 1 + math.log(prior / variance))
    estimate = objective.path_kl(path, mean, log_var, diffusion=0.5)[0].item()
    assert abs(estimate - closed) < 0.01


def test_diffused_prior_solves_the_heat_equation():
    z = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    t = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    density = diffused_log_prob(z, t, 0.7).exp()
    slope = torch.stack([torch.autograd.grad(one, t, retain_graph=True)[0] for one in density])
    grad = torch.autograd.grad(density.sum(), z, create_graph=True)[0]
    laplacian = sum(torch.autograd.grad(grad[:, d].sum(), z, retain_graph=True)[0][:, d] for d in range(5))
    torch.testing.assert_close(slope, 0.7 * laplacian, rtol=1e-9, atol=1e-14)


def test_inverse_step():
    flows = Flows(2, 6, "soft").double()(torch.arange(3))
    z = torch.randn(4, 6, dtype=torch.float64)
    c = torch.eye(2).double()[torch.tensor([0, 1, 0, 1])]
    moved = z + flows.at(z, 2).velocity(c, c)
    torch.testing.assert_close(inverse_step(flows, moved, 2, c, c), z, rtol=0, atol=1e-10)


def test_spike_chain_against_enumeration_and_simulation():
    count, p_on, stay = 3, 0.1, 0.9
    first, moves = spikes.spike_chain(count, p_on, stay)
    np.testing.assert_allclose(moves.sum(1), 1, atol=1e-14)
    np.testing.assert_allclose(first.sum(), 1, atol=1e-14)
    # one entry by hand: 100 -> 000 is redrawn from the state of all zeros
    states = spikes.spike_states(count).tolist()
    one, two = states.index([1, 0, 0]), states.index([0, 1, 0])
    redrawn = 0.1 * 0.9**2 / (1 - 0.9**3)
    assert abs(moves[one, two] - (0.1 * 0.1 * 0.9 + 0.1 * 0.9**2 * redrawn)) < 1e-14
    n = 20_000
    drawn = spikes.draw_spikes(8, count, p_on, stay, torch.Generator().manual_seed(5), n)
    assert drawn.sum(-1).min() >= 1
    expected = spikes.expected_fraction(count, 8, p_on, stay)
    error = np.abs(drawn.mean((1, 2)).numpy() - expected)
    assert error.max() < 4 * math.sqrt(0.25 / n)
    code = (drawn * torch.tensor([1.0, 2.0, 4.0])).sum(-1).long()
    counted = np.zeros((8, 8))
    np.add.at(counted, (code[3].numpy(), code[4].numpy()), 1)
    rows = counted[1:, 1:].sum(1, keepdims=True)
    assert np.abs(counted[1:, 1:] / rows - moves).max() < 4 * math.sqrt(0.25 / rows.min())


def test_a_single_flow_is_always_on_and_none_is_refused():
    draw = torch.Generator().manual_seed(0)
    assert torch.equal(spikes.draw_spikes(4, 1, 0.3, 0.7, draw, 5), torch.ones(4, 5, 1))
    with pytest.raises(UserError, match="no transformation"):
        spikes.draw_spikes(4, 0, 0.3, 0.7, draw, 5)


def test_spike_path_kl():
    """Zero when q is the prior itself; positive elsewhere; gradient to the logits."""
    p_on, stay = 0.2, 0.8
    y = torch.bernoulli(torch.full((5, 4, 3), 0.5)).double()
    prior = torch.cat([torch.full((1, 4, 3), p_on, dtype=torch.float64), stay * y[:-1] + (1 - stay) * (1 - y[:-1])])
    assert abs(spikes.spike_path_kl(torch.logit(prior), y, p_on, stay)) < 1e-12
    logits = torch.randn(5, 4, 3, dtype=torch.float64, requires_grad=True)
    value = spikes.spike_path_kl(logits, y, p_on, stay)
    value.backward()
    q, p = (torch.distributions.Bernoulli(one) for one in (torch.sigmoid(logits), prior))
    by_hand = torch.distributions.kl_divergence(q, p).sum((0, 2)).mean()
    torch.testing.assert_close(value, by_hand, rtol=1e-10, atol=0)
    assert value > 0 and (logits.grad != 0).all()


@pytest.mark.parametrize("value", [-0.1, 0.0, 1.0, 1.5, math.nan])
def test_spike_probabilities_are_probabilities(value):
    for name, prior in (("p_on", (value, 0.9)), ("p_stay", (0.1, value))):
        with pytest.raises(UserError, match=f"needs {name} strictly between 0 and 1"):
            spikes.spike_chain(3, *prior)


def test_speeds_are_drawn_from_the_slab():
    """|Laplace(1, 0.1)|: quantiles of 1 -+ 0.1 log 2 at the quarters, hundredths 0.1 log 50 away."""
    speed = spikes.draw_speed((40_000,), torch.Generator().manual_seed(0))
    found = speed.quantile(torch.tensor([0.01, 0.25, 0.5, 0.75, 0.99]))
    tail, quarter = 0.1 * math.log(50), 0.1 * math.log(2)
    expected = torch.tensor([1 - tail, 1 - quarter, 1.0, 1 + quarter, 1 + tail])
    torch.testing.assert_close(found, expected, rtol=0, atol=0.02)
    assert speed.min() >= 0


@pytest.mark.parametrize("link", ["logistic", "gumbel"])
def test_relaxed_bernoulli_rate(link):
    logits = torch.tensor([-1.5, 0.0, 0.8])
    n = 200_000
    rate = (relaxed_bernoulli(logits.expand(n, -1), 0.3, link=link) > 0.5).float().mean(0)
    torch.testing.assert_close(rate, spike_probability(logits, link), rtol=0, atol=4 * 0.5 / math.sqrt(n))


def test_laplace_kl_by_quadrature():
    x = torch.linspace(-20, 20, 400_001, dtype=torch.float64)
    mean, scale = torch.tensor(0.8).double(), torch.tensor(0.3).double()
    log_p = -(x - mean).abs() / scale - torch.log(2 * scale)
    log_q = -(x - 1).abs() / 0.1 - math.log(0.2)
    torch.testing.assert_close(
        torch.trapezoid(log_p.exp() * (log_p - log_q), x), spikes.laplace_kl(mean, scale), rtol=1e-6, atol=0
    )


def test_temperature_schedule():
    assert temperature(0) == 1.0
    assert temperature(1) == temperature(100) == math.exp(-3e-5)
    assert temperature(101) == math.exp(-3e-5 * 101)
    assert abs(temperature(90_000) - 0.0674) < 1e-3
    assert temperature(10**6) == 0.05
    values = [temperature(i) for i in range(0, 120_000, 50)]
    assert all(a >= b for a, b in itertools.pairwise(values))


def test_index_loss_bounds():
    sure = torch.eye(3).repeat(4, 1) * 50
    assert objective.index_loss(sure).item() < 1e-6  # all flows used, every sequence sure
    collapsed = torch.zeros(12, 3)
    collapsed[:, 0] = 50
    assert abs(objective.index_loss(collapsed).item() - math.log(3)) < 1e-6
    assert abs(objective.index_loss(torch.zeros(12, 3)).item() - math.log(3)) < 1e-6  # balanced but unsure
    logits = (sure * 10).requires_grad_()  # sure to the point that a probability underflows
    loss = objective.index_loss(torch.cat([logits[:1], logits[:1]]))
    loss.backward()
    assert abs(loss.item() - math.log(3)) < 1e-6
    assert logits.grad.isfinite().all()


def test_published_index_loss_takes_the_first_of_two_equal_flows():
    """As the published code: the gradient of a tie goes to one flow, not to both."""
    votes = torch.eye(3)[torch.tensor([2, 1, 2, 1])].requires_grad_()
    loss = objective.upstream_index_loss(votes)
    loss.backward()
    assert abs(loss.item() - math.log(2)) < 1e-6
    assert votes.grad[:, 1].tolist() == [-0.5] * 4 and not votes.grad[:, [0, 2]].any()


def bounds_of_a_linear_model(spread: float) -> tuple[float, float, float]:
    """log p(x_0, x_1), the shared and the marginal objective of z_0 ~ N(0, 1), z_1 = 2 z_0, x_t ~ N(z_t, 1)."""
    x, gain, count = torch.tensor([0.4, 1.7]).double(), 2.0, 400_000
    exact = torch.distributions.MultivariateNormal(
        torch.zeros(2).double(), torch.tensor([[2.0, gain], [gain, gain**2 + 1]]).double()
    ).log_prob(x)
    slope = torch.tensor([1.0, gain]).double()
    variance = 1 / (1 + slope @ slope)  # the true posterior of z_0
    mean, log_var = torch.full((count, 1), (variance * slope @ x).item()).double(), (variance * spread).log()
    z = mean + torch.randn(count, 1).double() * (0.5 * log_var).exp()
    path = SimpleNamespace(z=torch.stack([z, gain * z]), log_det=torch.full((1, count), math.log(gain)).double())
    log_p = sum(objective.normal_log_prob(x[t], path.z[t]).mean() for t in range(2))
    shared = log_p - objective.gaussian_kl(mean, log_var.expand(count, 1)).mean()
    marginal = shared - objective.path_kl(path, mean, log_var.expand(count, 1), 1.0).sum()
    return exact.item(), shared.item(), marginal.item()


def test_the_default_objective_is_the_evidence_of_the_sequence():
    """Equal to log p(x_0, x_1) at the true posterior, below it elsewhere; the marginal one is below it even there."""
    exact, shared, marginal = bounds_of_a_linear_model(1.0)
    assert abs(shared - exact) < 0.01 and marginal < exact - 0.1
    _, shared, marginal = bounds_of_a_linear_model(2.0)
    assert marginal < shared < exact - 0.1
    assert Config().path_kl == "shared"


def test_unused_units_under_the_marginal_objective():
    """A unit that carries nothing goes to variance 4.33 for T = 8, D = 1; under the shared one it stays at 1."""
    log_var = torch.zeros(1, 4, dtype=torch.float64, requires_grad=True)
    mean = torch.zeros(1, 4, dtype=torch.float64)
    for _ in range(400):
        eps = torch.tensor([[1.0, -1.0, 1.0, -1.0]]).double()  # variance 1 exactly
        z = mean + eps * (0.5 * log_var).exp()
        path = SimpleNamespace(z=z.expand(9, 1, 4), log_det=torch.zeros(8, 1).double())
        loss = objective.gaussian_kl(mean, log_var).mean() + objective.path_kl(path, mean, log_var).sum()
        log_var = (log_var - 0.05 * torch.autograd.grad(loss, log_var)[0]).detach().requires_grad_()
    expected = 9 / sum(1 / (1 + 2 * t) for t in range(9))
    torch.testing.assert_close(log_var.exp(), torch.full_like(log_var, expected), rtol=1e-3, atol=0)
    assert abs(expected - 4.33) < 0.01


def test_what_a_unit_tells_is_the_information_of_a_gaussian_channel():
    mean, log_var = torch.tensor([[0.0, 0.0], [4.0, 0.0]]), torch.zeros(2, 2)
    torch.testing.assert_close(objective.unit_information(mean, log_var), torch.tensor([0.5 * math.log(5), 0.0]))


def test_active_units():
    """By what a unit tells about the image, at any scale: one of variance 4 that hardly follows it is not used."""
    signal = torch.tensor([1.0, 0.5, 0.28, 0.05, 0.0])
    mean = torch.randn(4000, 5) * signal + 3
    log_var = torch.tensor([0.01, 0.3, 4.0, 0.01, 1.0]).log().expand_as(mean)
    information = objective.unit_information(mean, log_var)
    torch.testing.assert_close(information, 0.5 * torch.log1p(signal**2 / log_var[0].exp()), rtol=0.1, atol=1e-6)
    scale = torch.tensor([10.0, 0.1, 3.0, 1.0, 2.0])
    torch.testing.assert_close(objective.unit_information(mean * scale, log_var + 2 * scale.log()), information)
    assert objective.active_units(mean, log_var) == 3 and objective.active_units(mean[:1], log_var[:1]) == 0


def test_dense_layers_equal_convolutions():
    x, wide_x = torch.randn(3, 5, 7, 7).double(), torch.randn(3, 4, 1, 1).double()
    covering = CoveringConv2d(5, 6, 7).double()
    torch.testing.assert_close(
        covering(x), torch.nn.functional.conv2d(x, covering.weight, covering.bias), rtol=1e-12, atol=1e-12
    )
    spreading = SpreadingConvTranspose2d(4, 6, 7).double()
    plain = torch.nn.functional.conv_transpose2d(wide_x, spreading.weight, spreading.bias)
    torch.testing.assert_close(spreading(wide_x), plain, rtol=1e-12, atol=1e-12)


def test_published_parameter_counts():
    with torch.device("meta"):
        count = lambda module: sum(p.numel() for p in module.parameters())  # noqa: E731
        assert count(ConvVAE(3, 324, 28)) == 70_896_711
        weak = LatentFlow(Config(variant="weakly", objective="upstream"))
        assert count(weak.support_sets) == 2_529_150
        assert count(weak.prior) == 48
        assert count(weak.reconstructor) == 35_205_843
        for single, total in ((True, 6_701_606), (False, 6_701_909)):
            free = LatentFlow(Config(variant="unsupervised", single_control=single))
            assert count(free.reconstructor) == total
            assert count(free.support_sets) == 1_896_375
        deep = LatentFlow(Config(deep=True, image_size=128, flows=7))
        assert count(deep.vae) == 32_574_639


STEPS = [
    Config(variant="supervised"),
    Config(variant="weakly"),
    Config(variant="unsupervised"),
    Config(variant="unsupervised", single_control=True, slab_start=1),
]


@pytest.mark.parametrize("config", STEPS, ids=lambda c: f"{c.variant}-{c.single_control}")
def test_step_equals_the_plain_transcription(config):
    settings = config.as_dict() | {
        "objective": "upstream",
        "latent_size": 6,
        "index_width": 5,
        "image_size": 8,
        "steps": 3,
    }
    model = LatentFlow(Config(**settings)).double()
    frames = torch.rand(4, 5, 3, 8, 8, dtype=torch.float64)
    heads = 1 if config.single_control else 2
    uniform = torch.rand((5, 3) if config.variant == "weakly" else (3, heads, 5, 3), dtype=torch.float64)
    noise = Noise(torch.randn(5, 6, dtype=torch.float64), uniform, 0.4)
    gradients = []
    for run in (
        lambda: training_step(model, frames, 1, 1, noise)["loss_total"],
        lambda: training_step_ref(model, frames, 1, noise, slab_on=config.slab_start == 1),
    ):
        model.zero_grad(set_to_none=True)
        loss = run()
        loss.backward()
        gradients.append((loss.detach(), {n: p.grad for n, p in model.named_parameters()}))
    (loss, ours), (expected, plain) = gradients
    torch.testing.assert_close(loss, expected, rtol=1e-11, atol=1e-9)
    for name, gradient in ours.items():
        reference = plain[name]
        if gradient is None or reference is None:
            assert (gradient is None or not gradient.any()) and (reference is None or not reference.any()), name
        else:
            torch.testing.assert_close(gradient, reference, rtol=1e-8, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("count", [1, 2, 4])
def test_a_few_decoded_frames_are_unbiased(count):
    """The mean over all ways to choose the frames of a sequence is the loss and the gradient of all of them."""
    settings = {"latent_size": 6, "image_size": 8, "steps": 3}
    model = LatentFlow(Config(**settings)).double()
    frames, labels = torch.rand(4, 2, 3, 8, 8, dtype=torch.float64), torch.tensor([0, 2])
    eps = torch.randn(2, 6, dtype=torch.float64)
    whole = training_step(model, frames, labels, noise=Noise(eps))["loss_total"]
    parameters = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(whole, parameters, allow_unused=True)
    model.config.decode_frames = count
    losses = []
    for first, second in itertools.product(itertools.combinations(range(4), count), repeat=2):
        noise = Noise(eps, decoded=torch.tensor([first, second]).T)
        losses.append(training_step(model, frames, labels, noise=noise)["loss_total"])
    mean = torch.stack(losses).mean()
    torch.testing.assert_close(mean, whole, rtol=1e-12, atol=0)
    for one, two in zip(torch.autograd.grad(mean, parameters, allow_unused=True), expected, strict=True):
        if two is not None:
            torch.testing.assert_close(one, two, rtol=1e-9, atol=1e-12)
    if count < 4:
        assert torch.stack(losses).std() > 1e-3


def test_each_sample_has_frames_of_its_own_decoded(monkeypatch):
    """Frames of sample b at time t all have the grey value (b, t): what the loss compares with is seen in it."""
    seen = []
    monkeypatch.setattr(objective, "reconstruction", lambda logits, frames: seen.append(frames) or logits.sum())
    model = LatentFlow(Config(latent_size=4, image_size=8, steps=8, decode_frames=3))
    frames = torch.arange(9.0)[:, None].mul(0.1).add(torch.arange(50) * 0.001)[..., None, None, None].expand(
        -1, -1, 3, 8, 8
    )  # fmt: skip
    for _ in range(2):
        training_step(model, frames, torch.zeros(50, dtype=torch.long))
    one, two = (frames[:, :, 0, 0, 0] for frames in seen)
    times, samples = (one * 10).floor(), (one * 1000).round() % 100
    assert one.shape == (3, 50) and (samples == torch.arange(50)).all()
    assert all(len(set(column)) == 3 for column in times.T.tolist())  # no frame twice
    assert len({tuple(sorted(column)) for column in times.T.tolist()}) > 10 and (one != two).any()
    assert set(times.flatten().tolist()) == set(range(9))


@pytest.mark.parametrize("variant", ["supervised", "weakly", "unsupervised"])
@pytest.mark.parametrize("logdet", ["trace", "hutchinson", "exact"])
def test_paper_objective_reaches_every_parameter(variant, logdet):
    config = Config(
        variant=variant,
        latent_size=6,
        index_width=5,
        image_size=8,
        steps=3,
        logdet=logdet,
        path_kl="marginal",
        slab_start=1,
        field="divfree",
    )
    model = LatentFlow(config)
    frames, labels = torch.rand(4, 9, 3, 8, 8), torch.arange(9) % 3
    losses = training_step(model, frames, labels, 1)
    assert all(torch.isfinite(value) for value in losses.values())
    losses["loss_total"].backward()
    silent = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()]
    # a divergence-free field is blind to the bias of its outer tanh only through an odd symmetry, never exactly
    assert not silent, silent
    assert 0 <= losses.pop("active_units") <= 6
    parts = sum(value for name, value in losses.items() if name != "loss_total")
    torch.testing.assert_close(losses["loss_total"], parts)
    expected = {"loss_kl_path", "loss_pde", "loss_recon", "loss_kl0"}
    expected |= {"weakly": {"loss_index"}, "unsupervised": {"loss_spike", "loss_slab"}}.get(variant, set())
    assert {name for name, value in losses.items() if value != 0} - {"loss_total"} == expected


def test_upstream_spike_loss_has_no_gradient_and_ours_has():
    logits = torch.randn(4, 2, 5, 3, requires_grad=True)
    y = relaxed_bernoulli(logits, 0.5)
    assert not objective.upstream_spike_loss(y, 0.1, 0.9).requires_grad
    objective.spike_loss(logits, y, 0.1, 0.9).backward()
    assert logits.grad.abs().min() > 0


# ---- image transformations ------------------------------------------------------------------------------------------


def test_hue_of_red_against_hsv():
    grey = torch.rand(2, 1, 6, 6, dtype=torch.float64)
    red = colour(grey, torch.zeros(2))
    for degrees in (0, 17.0, 60, 119, 160, 222.5, 300, 359, 400, -30):
        ours = colour(grey, torch.full((2,), float(degrees), dtype=torch.float64))
        torch.testing.assert_close(ours, shift_hue_ref(red, math.radians(degrees)), rtol=0, atol=1e-7)
    torch.testing.assert_close(hue_colour(torch.tensor(120.0)), torch.tensor([0.0, 1.0, 0.0]))


def test_warp_directions():
    image = torch.zeros(1, 1, 9, 9)
    image[0, 0, 4, 7] = 1  # right of the exact centre
    one = torch.ones(1)
    turned = warp(image, one, 90 * one, centre="exact")
    assert turned[0, 0, 1, 4] > 0.99  # a quarter turn counter-clockwise: now above it
    zoomed = warp(image, 1.25 * one, 0 * one, centre="exact")
    assert zoomed[0, 0, 4].argmax() == 8
    torch.testing.assert_close(warp(image, one, 0 * one), image, rtol=0, atol=1e-6)


def test_sequences_transform_each_sample_by_its_own_label():
    grey = torch.rand(3, 1, 12, 12)
    mixed = sequence(grey, torch.tensor([0, 1, 2]), 4)
    for b, label in enumerate((0, 1, 2)):
        torch.testing.assert_close(mixed[:, b], sequence(grey[b : b + 1], torch.tensor([label]), 4)[:, 0])
    active = torch.zeros(4, 3, 3)
    active[:, torch.arange(3), torch.arange(3)] = 1
    composed = composed_sequence(grey, active)
    for b in range(3):
        alone = composed_sequence(grey[b : b + 1], active[:, b : b + 1])
        torch.testing.assert_close(composed[:, b], alone[:, 0], rtol=0, atol=2e-6)
    torch.testing.assert_close(composed[:, 2], sequence(grey[2:], torch.tensor([2]), 4)[:, 0], rtol=0, atol=2e-6)


def test_switched_and_superposed_truths():
    source = DigitSequences(torch.randint(0, 256, (4, 1, 8, 8), dtype=torch.uint8), 4)
    rows = np.arange(4)
    hue = source.labelled(rows, torch.full((4,), 2))
    torch.testing.assert_close(source.chosen(rows, torch.tensor([2, 2, 2, 2])), hue, rtol=0, atol=1e-6)
    switched = source.chosen(rows, torch.tensor([1, 1, 2, 2]))
    torch.testing.assert_close(switched[:3], source.labelled(rows, torch.full((4,), 1))[:3], rtol=0, atol=1e-6)
    turned = source.labelled(rows, torch.full((4,), 1))[2]
    torch.testing.assert_close(switched[4], shift_hue_ref(turned, math.radians(40)), rtol=0, atol=1e-5)
    both = source.superposed(rows, (1, 2), 4)
    rotated = source.labelled(rows, torch.full((4,), 1))
    torch.testing.assert_close(both[3], shift_hue_ref(rotated[3], math.radians(60)), rtol=0, atol=1e-5)


def test_matching():
    assert match(np.array([[1, 9, 0], [8, 7, 0], [0, 0, 5]])) == [1, 0, 2]
    assert match(np.array([[5, 1], [4, 9], [6, 0]])) == [0, 1, 0]


@pytest.mark.parametrize("dim", [2, 5])
def test_embedding_refuses_impossible_sizes(dim):
    with pytest.raises(UserError, match="even and at least 4"):
        sinusoidal_embedding(torch.arange(3.0), dim)


class HostTraffic(TorchDispatchMode):
    """Notes reads of device values on the host, and copies from the host to the device."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        target = (kwargs or {}).get("device")
        from_host = any(isinstance(a, torch.Tensor) and a.device.type == "cpu" for a in args)
        if "_local_scalar_dense" in str(func) or (from_host and target is not None and target.type == "cuda"):
            self.found.append(str(func))
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    "options", [{}, {"path_kl": "marginal"}, {"objective": "upstream"}, {"decode_frames": 2}], ids=str
)
@pytest.mark.parametrize("variant", ["supervised", "weakly", "unsupervised"])
def test_a_step_stays_on_its_device(variant, options):
    """On a pretended GPU: losses, inference and decoding find all tensors there, read none and fetch none."""
    config = Config(variant=variant, latent_size=8, index_width=8, image_size=8, steps=3, slab_start=1, **options)
    with FakeTensorMode():
        with torch.device("cuda"):
            model = LatentFlow(config)
            frames, labels = torch.rand(4, 5, 3, 8, 8), torch.zeros(5, dtype=torch.long)
        with HostTraffic() as traffic:
            losses = training_step(model, frames, 0 if config.objective == "upstream" else labels, 1)
            coefficients = Coefficients(frames.new_ones(3, 5, 3), frames.new_ones(3, 5, 3))
            if variant != "supervised":
                coefficients = model.infer(frames)[0]
            path = rollout(model.stacked(3), model.vae.encode(frames[0])[0], coefficients.c1, coefficients.c2)
            images = model.vae.inference(path.z.flatten(0, 1))
        assert {value.device.type for value in [*losses.values(), images]} == {"cuda"}
    assert not traffic.found


@pytest.mark.gpu
@pytest.mark.parametrize("variant", ["supervised", "weakly", "unsupervised"])
def test_step_on_the_gpu_equals_the_cpu(variant):
    """Double precision on both devices, the same noise: the same losses and gradients."""
    small = {"latent_size": 6, "index_width": 5, "image_size": 8, "steps": 3, "slab_start": 1}
    config = Config(variant=variant, logdet="exact", path_kl="marginal", **small)
    frames, labels = torch.rand(4, 9, 3, 8, 8, dtype=torch.float64), torch.arange(9) % 3
    uniform = torch.rand((9, 3) if variant == "weakly" else (3, 2, 9, 3), dtype=torch.float64)
    eps = torch.randn(9, 6, dtype=torch.float64)
    model = LatentFlow(config).double()
    results = []
    for device in ("cpu", "cuda"):
        model = model.to(device)
        model.zero_grad(set_to_none=True)
        noise = Noise(eps.to(device), uniform.to(device), 0.5)
        losses = training_step(model, frames.to(device), labels.to(device), 1, noise)
        losses["loss_total"].backward()
        results.append((losses["loss_total"].item(), [p.grad.cpu() for p in model.parameters()]))
    assert abs(results[0][0] - results[1][0]) < 1e-8 * abs(results[0][0])
    for one, two in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(one, two, rtol=1e-7, atol=1e-9)
