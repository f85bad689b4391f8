"""Gaussians, fixed point iteration and the gradient baseline against closed forms and plain references."""

import math

import pytest
import torch

from common.errors import UserError
from nfpi import glem
from nfpi.fpi import FixedPoint, pair_weights, solve, step, step_ref
from nfpi.gaussians import (
    ClassGaussians,
    ClassMoments,
    class_log_prob,
    class_log_prob_ref,
    kl_matrix,
    kl_matrix_ref,
    marginal_log_prior,
    off_diagonal,
    top_k_correct,
)

C = math.exp(-0.1) / 10  # c for alpha = 10


def problem(classes=6, dim=9, seed=0, spread=1.0):
    rng = torch.Generator().manual_seed(seed)

    def normal():
        return torch.randn(classes, dim, generator=rng, dtype=torch.float64)

    return spread * normal(), 0.3 + normal().square(), spread * normal(), 0.3 + normal().square()


@pytest.mark.parametrize("shared", [False, True])
def test_the_density_of_a_class_is_the_normal_one(shared):
    mean, var, z, _ = problem(classes=4)
    y = torch.tensor([3, 0, 1, 1])
    gaussians, rows = ClassGaussians(mean, var, shared), y * (not shared)
    wanted = torch.distributions.Normal(mean[rows], var[rows].sqrt()).log_prob(z).sum(1)
    torch.testing.assert_close(gaussians.log_prob(z, y), wanted)
    torch.testing.assert_close(gaussians.logits(z)[range(4), rows], wanted)


def test_a_class_without_latents_has_moments_of_zero():
    moments = ClassMoments.of(torch.randn(5, 3), torch.tensor([0, 0, 2, 2, 2]), 3)
    assert moments.count.tolist() == [2, 0, 3]
    assert not moments.mean[1].any() and not moments.square[1].any() and moments.mean[[0, 2]].all()


def test_a_damping_below_0_is_refused():
    with pytest.raises(UserError, match=r"damping=-0\.5"):
        FixedPoint(strength=1.0, damping=-0.5)


def test_kl_and_log_prob_equal_their_references():
    mean, var, z, _ = problem(classes=7)
    torch.testing.assert_close(kl_matrix(mean, var), kl_matrix_ref(mean, var), rtol=1e-11, atol=1e-11)
    torch.testing.assert_close(class_log_prob(z, mean, var), class_log_prob_ref(z, mean, var), rtol=1e-12, atol=1e-12)


def test_logits_of_far_float32_gaussians_are_accurate():
    rng = torch.Generator().manual_seed(0)
    mean = 100 + 3 * torch.randn(5, 2000, generator=rng)
    var = torch.ones(5, 2000)
    z = mean[:3] + torch.randn(3, 2000, generator=rng)
    want = class_log_prob_ref(z.double(), mean.double(), var.double())
    torch.testing.assert_close(ClassGaussians(mean, var).logits(z), want, rtol=1e-10, atol=1e-8)


def test_marginal_and_top_k():
    logits = torch.tensor([[0.0, 1.0, 2.0], [5.0, 1.0, 0.0]], dtype=torch.float64)
    want = torch.log(torch.exp(logits).mean(1))
    torch.testing.assert_close(marginal_log_prior(logits), want)
    y = torch.tensor([0, 1])
    assert top_k_correct(logits, y, 1).tolist() == [False, False]
    assert top_k_correct(logits, y, 2).tolist() == [False, True]
    assert top_k_correct(logits, y, 5).all()  # fewer than five classes


def test_moments_of_parts_are_those_of_the_whole():
    rng = torch.Generator().manual_seed(0)
    z, y = 1e4 + torch.randn(300, 4, generator=rng, dtype=torch.float64), torch.arange(300) % 3
    merged = ClassMoments.empty(3, 4)
    for part in torch.arange(300).split(37):
        merged = merged.merge(ClassMoments.of(z[part], y[part], 3))
    mean, var = merged.statistics()
    for k in range(3):
        torch.testing.assert_close(mean[k], z[y == k].mean(0), rtol=1e-12, atol=0)
        torch.testing.assert_close(var[k], z[y == k].var(0), rtol=1e-9, atol=0)
    with pytest.raises(UserError, match="class 3"):
        ClassMoments.of(z, y, 4).statistics()


@pytest.mark.parametrize("isotropic", [True, False])
@pytest.mark.parametrize("sum_trick", [True, False])
@pytest.mark.parametrize("exp_den_update", [True, False])
@pytest.mark.parametrize("variance_update", ["upstream", "exact"])
def test_matrix_form_equals_the_loop(isotropic, sum_trick, exp_den_update, variance_update):
    settings = FixedPoint(
        strength=30, variances=True, isotropic=isotropic, sum_trick=sum_trick, exp_den_update=exp_den_update,
        variance_update=variance_update,
    )  # fmt: skip
    inputs = problem()
    for fast, slow in zip(step(*inputs, settings), step_ref(*inputs, settings), strict=True):
        torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-10)


def objective(mean, var, data_mean, data_var, strength, alpha=10.0):
    """Expected class log-likelihood plus lambda' c sum ln KL: what the iteration maximises (exp_den_update = 1)."""
    classes = len(mean)
    likelihood = -0.5 * ((data_var + (data_mean - mean) ** 2) / var + var.log()).sum()
    kl = off_diagonal(kl_matrix_ref(mean, var))
    return likelihood + strength / (classes * (classes - 1)) * C * kl.log().sum()


def test_fixed_point_of_the_means_is_stationary():
    _, var, data_mean, data_var = problem(spread=2.0)
    settings = FixedPoint(strength=500, isotropic=False, epsilon=1e-11, max_iters=5000, damping=0.5)
    result = solve(data_mean, data_var, data_mean, var, settings)
    assert result.converged
    mean = result.mean.clone().requires_grad_()
    objective(mean, var, data_mean, data_var, 500).backward()
    assert float(mean.grad.abs().max()) < 1e-7
    assert float(objective(result.mean, var, data_mean, data_var, 500)) > float(
        objective(data_mean, var, data_mean, data_var, 500)
    )


@pytest.mark.parametrize("isotropic", [True, False])
@pytest.mark.parametrize("sum_trick", [True, False])
@pytest.mark.parametrize("exp_den_update", [True, False])
@pytest.mark.parametrize("means", [True, False])
def test_exact_is_stationary_in_every_combination(isotropic, sum_trick, exp_den_update, means):
    mean, _, data_mean, data_var = problem(spread=2.0)
    settings = FixedPoint(
        strength=5, means=means, variances=True, isotropic=isotropic, sum_trick=sum_trick, alpha=7.0,
        exp_den_update=exp_den_update, variance_update="exact", epsilon=1e-12, max_iters=20000, damping=0.5,
    )  # fmt: skip
    result = solve(data_mean, data_var, data_mean if means else mean, data_var, settings)
    assert result.converged
    mean, var = result.mean.clone().requires_grad_(), result.var.clone().requires_grad_()
    likelihood = -0.5 * ((data_var + (data_mean - mean) ** 2) / var + var.log()).sum()
    kl = off_diagonal(kl_matrix_ref(mean, var))
    s = 7.0 * float(kl.detach().mean())
    phi = math.exp(-1 / 7) / 7 * kl.log() if exp_den_update else -torch.exp(-kl / s)
    (likelihood + settings.pull(len(mean)) * phi.sum()).backward()
    assert float(var.grad.abs().max()) < 1e-8
    assert not means or float(mean.grad.abs().max()) < 1e-8
    moved = torch.stack([result.mean - data_mean, result.var - data_var]).abs().amax((1, 2))
    assert float(moved.min()) > 1e-3  # not the start


def test_exact_variance_update_is_stationary_and_the_published_one_is_not():
    _, _, data_mean, data_var = problem(spread=2.0)
    for update, small in (("exact", True), ("upstream", False)):
        settings = FixedPoint(
            strength=5, variances=True, isotropic=False, sum_trick=False, variance_update=update, epsilon=1e-11,
            max_iters=20000, damping=0.5,
        )  # fmt: skip
        result = solve(data_mean, data_var, data_mean, data_var, settings)
        assert result.converged
        var = result.var.clone().requires_grad_()
        objective(result.mean, var, data_mean, data_var, 5).backward()
        assert (float(var.grad.abs().max()) < 1e-7) is small


def test_without_separation_the_gaussians_are_the_data():
    mean, var, data_mean, data_var = problem()
    base = {"strength": 0.0, "variances": True, "epsilon": 1e-12, "max_iters": 3000, "damping": 0.5}
    exact = solve(data_mean, data_var, mean, var, FixedPoint(**base, variance_update="exact"))
    torch.testing.assert_close(exact.mean, data_mean, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(exact.var, data_var, rtol=1e-9, atol=1e-9)
    published = solve(data_mean, data_var, mean, var, FixedPoint(**base))
    torch.testing.assert_close(published.var, data_var ** (1 / 3), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("strength", [1e3, 4e3])
def test_distance_of_separated_means_follows_the_closed_form(strength):
    """D^2 = 4 c v lambda / (K - 1) for close data means, and damping gives the same solution in fewer iterations."""
    rng = torch.Generator().manual_seed(0)
    data = 0.3 / math.sqrt(2 * 64) * torch.randn(10, 64, generator=rng, dtype=torch.float64)
    var = torch.ones_like(data)
    distances, counts = [], []
    for damping in (0.0, 0.5):
        result = solve(
            data, var, data, var, FixedPoint(strength=strength, damping=damping, max_iters=3000, epsilon=1e-3)
        )
        assert result.converged
        distances.append(float(torch.pdist(result.mean).mean()))
        counts.append(result.iterations)
    assert abs(distances[0] / math.sqrt(4 * C * strength / 9) - 1) < 0.03
    assert abs(distances[0] - distances[1]) < 1e-2
    assert counts[1] < counts[0] / 4


def test_iteration_stops_softly():
    mean, var, data_mean, data_var = problem(classes=5, dim=3)
    broken = data_mean.clone()
    settings = FixedPoint(strength=1e5, variances=True, means=False, sum_trick=False, max_iters=500, epsilon=0)
    result = solve(broken, data_var, mean, 1e-3 * var, settings)
    assert torch.isfinite(result.mean).all() and torch.isfinite(result.var).all()
    assert result.non_finite or result.iterations == 500
    nothing = solve(data_mean, data_var, mean, var, FixedPoint(means=False, variances=False))
    assert nothing.converged and nothing.iterations == 0 and torch.equal(nothing.mean, mean)
    data_mean[0, 0] = math.nan
    result = solve(data_mean, data_var, mean, var, FixedPoint())
    assert result.non_finite and torch.equal(result.mean, mean)


def test_equal_gaussians_exert_no_force():
    mean = torch.zeros(3, 4, dtype=torch.float64)
    new, _, _ = step(mean, torch.ones_like(mean), mean, torch.ones_like(mean), FixedPoint())
    assert torch.equal(new, mean)


def test_weights_and_settings():
    kl = torch.tensor([[0.0, 2.0], [5.0, 0.0]], dtype=torch.float64)
    torch.testing.assert_close(pair_weights(kl.clone(), 10, True)[0, 1], torch.tensor(C / 2, dtype=torch.float64))
    s = 35.0  # mean of 10 KL over both pairs
    want = torch.tensor(math.exp(-5 / s) / s, dtype=torch.float64)
    torch.testing.assert_close(pair_weights(kl.clone(), 10, False)[1, 0], want)
    with pytest.raises(UserError, match="variance_update"):
        FixedPoint(variance_update="x")
    with pytest.raises(UserError, match="damping"):
        FixedPoint(damping=1.0)
    exact = FixedPoint(strength=60, variances=True, variance_update="exact")
    assert not exact.bounded(10) and exact.bounded(11)  # threshold K / 2c = 5.53 K
    with pytest.raises(UserError, match="at least two"):
        solve(*(torch.ones(1, 2) for _ in range(4)), FixedPoint())


def test_baseline_gradients_equal_autograd():
    mean, var, z, _ = problem()
    mean, var = mean.requires_grad_(), var.requires_grad_()
    (-kl_matrix_ref(mean, var).sum()).backward()
    for got, want in zip(glem.kl_gradients(mean.detach(), var.detach()), (mean.grad, var.grad), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)
    m, v = mean[0].detach().requires_grad_(), var[0].detach().requires_grad_()
    (-torch.distributions.Normal(m, v.sqrt()).log_prob(z).sum()).backward()
    for got, want in zip(glem.nll_gradients(z, m.detach(), v.detach()), (m.grad, v.grad), strict=True):
        torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_baseline_variances_stay_inside_their_range():
    sigmoid = glem.SigmoidVariance(a=2.0, b=0.7, c=0.1)
    x = torch.linspace(-3, 3, 7, dtype=torch.float64, requires_grad=True)
    v = sigmoid.ambient(x)
    v.sum().backward()
    torch.testing.assert_close(sigmoid.derivative(x.detach()), x.grad)
    torch.testing.assert_close(sigmoid.latent(v.detach()), x.detach())
    assert torch.isfinite(sigmoid.latent(torch.tensor([0.0, 0.1, 2.1, 9.0], dtype=torch.float64))).all()
    assert glem.widened_range(torch.tensor([-10.0, 5.0]), 2.0) == (-24.0, 12.0)
    with pytest.raises(UserError, match="schedule"):
        glem.schedule([0, 1], [1.0], "lin")
