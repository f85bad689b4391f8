"""Matrix functions, initialisation and whole flows; the layers' contract is tests/test_invertible_layers.py."""

import math

import pytest
import torch

from common.errors import UserError
from nfpi.conditional import ConditionalFlow
from nfpi.gaussians import ClassGaussians
from nfpi.label_encoder import DistancedPixels
from nfpi.layers import ActNorm, AttentionBlock, Conv1x1, CouplingLayer, postprocess, preprocess
from nfpi.matrix_exp import MAX_NORM, coarse, expm, expm_action, expm_action_ref, expm_ref, phi_action, taylor_plan
from nfpi.model import FlowConfig, MultiScaleFlow


def randomise(module, seed=0, size=0.3):
    """Every parameter random: a fresh coupling ends in zeros and would hide errors. Scales stay near their start."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(size * torch.randn(p.shape, generator=rng, dtype=torch.float64).to(p))


def test_expm_of_mixed_magnitudes_is_exact_for_each_matrix():
    rng = torch.Generator().manual_seed(0)
    sizes = torch.tensor([1e-9, 1e-3, 0.4, 3.0, 40.0])[:, None, None].double()
    a = sizes * torch.randn(5, 6, 6, generator=rng, dtype=torch.float64)
    a[4] = a[4] - a[4].T  # a rotation: the result stays of order one
    got, want = expm(a), expm_ref(a)
    for g, w in zip(got, want, strict=True):
        assert float((g - w).abs().max() / w.abs().max()) < 1e-13
    alone = torch.stack([expm(m[None])[0] for m in a])
    torch.testing.assert_close(got, alone, rtol=0, atol=0)  # no sample depends on its neighbours
    assert torch.equal(expm(torch.zeros(2, 3, 3)), torch.eye(3).expand(2, 3, 3))


def test_expm_gradients_also_at_zero():
    a = torch.randn(2, 3, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    assert torch.autograd.gradcheck(expm, (a,))
    zero = torch.zeros(3, 3, dtype=torch.float64, requires_grad=True)
    expm(zero).sum().backward()
    torch.testing.assert_close(zero.grad, torch.ones(3, 3, dtype=torch.float64))


@pytest.mark.parametrize("size", [0.0, 0.3, 2.5, 9.0])
def test_expm_action(size):
    rng = torch.Generator().manual_seed(0)
    a = size / 4 * torch.randn(2, 4, 4, 3, generator=rng, dtype=torch.float64)
    x = torch.randn(2, 4, 3, generator=rng, dtype=torch.float64)
    want = expm_action_ref(a, x)
    torch.testing.assert_close(expm_action(a, x), want, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(expm_action(-a, expm_action(a, x)), x, rtol=1e-9, atol=1e-9)
    bound = float(a.abs().sum(2).max()) * 3  # a loose bound costs terms, not accuracy
    torch.testing.assert_close(expm_action(a, x, bound), want, rtol=1e-12, atol=1e-12)
    single = expm_action(a.float(), x.float())
    torch.testing.assert_close(single.double(), want, rtol=1e-5, atol=1e-5 * float(want.abs().max()))
    assert torch.autograd.gradcheck(expm_action, (a.requires_grad_(), x.requires_grad_()))


def test_diverged_matrices_give_nan_at_once_and_loose_bounds_do_not():
    a, x = torch.full((1, 2, 2, 3), 1e20), torch.ones(1, 2, 3)
    for action in (expm_action, phi_action):
        for bound in (None, 1e20, math.inf, math.nan):
            assert torch.isnan(action(a, x, bound)).all()
        small = 1e-20 * a
        torch.testing.assert_close(action(small, x, 1e30), action(small, x))


@pytest.mark.parametrize("size", [0.0, 0.3, 6.0])
def test_phi_action(size):
    rng = torch.Generator().manual_seed(0)
    a = size / 3 * torch.randn(2, 3, 3, 4, generator=rng, dtype=torch.float64)
    u = torch.randn(2, 3, 4, generator=rng, dtype=torch.float64)
    y = phi_action(a, u)
    # a phi(a) u = (exp(a) - 1) u
    torch.testing.assert_close((a * y[:, None]).sum(2) + u, expm_action_ref(a, u), rtol=1e-11, atol=1e-11)
    assert torch.autograd.gradcheck(phi_action, (a.requires_grad_(), u.requires_grad_()))


def test_coarse_bounds_are_few_and_still_bounds():
    bounds = [0.01 * 1.01**i for i in range(1000)]  # 0.01 ... 200
    found = coarse(bounds)
    assert all(bound <= one <= 1.415 * bound for bound, one in zip(bounds, found, strict=True)) and len(set(found)) < 32
    assert coarse([None, 1.0]) == (None, 1.0) and coarse([290.0]) == (MAX_NORM,)
    assert coarse([1.0, 2 * MAX_NORM]) is coarse([math.nan]) is None  # to be measured


def test_taylor_plan_bounds_the_remainder():
    for bound in (0.01, 0.5, 1.0, 2.0, 7.3, 60.0):
        for eps in (torch.finfo(torch.float32).eps, torch.finfo(torch.float64).eps):
            steps, terms = taylor_plan(bound, eps)
            theta = bound / steps
            assert theta <= 2
            assert theta ** (terms + 1) / math.factorial(terms + 1) <= eps / 4


def test_norm_bound_holds():
    for layer in (CouplingLayer(6, 4, 1), CouplingLayer(52, 4, 1)):
        randomise(layer, size=1.0)
        x1 = torch.randn(3, layer.kept, 2, 2)
        r = layer.net(x1)[:, layer.n :]
        if layer.flow_type == "matrixexp":
            a = layer._bounded(r).view(3, layer.n, layer.n, -1).transpose(1, 2)
        else:
            a = layer._low_rank(r)[2]
        assert float(a.detach().abs().sum(2).max()) <= float(layer.norm_bound()) * (1 + 1e-6)


@pytest.mark.parametrize("bits", range(1, 9))
def test_grey_levels_survive_the_flow_s_maps(bits):
    levels = torch.arange(0, 256, 2 ** (8 - bits)).float() / 255
    for noise in (0.0, 0.5, 0.99):
        assert torch.equal(postprocess(preprocess(levels, noise, bits), bits), levels)


def test_initialisation_normalises_every_actnorm_and_survives_constant_pixels():
    torch.manual_seed(0)
    flow = MultiScaleFlow(FlowConfig(channels=1, height=8, width=8, flows=(2, 1), blocks=(1, 1), hidden=(4, 4)))
    x = torch.rand(64, 1, 8, 8)
    x[:, :, 0] = 0.0  # constant pixels; in float32 log(exp(g) - 1) of the published code is inf for them
    flow.initialise(preprocess(x, torch.rand(x.shape)))
    outputs = []
    for module in flow.modules():
        if isinstance(module, ActNorm):
            module.register_forward_hook(lambda _, __, out: outputs.append(out[0].detach()))
    rng = torch.Generator().manual_seed(1)
    noise = torch.rand(x.shape, generator=rng)
    flow.initialise(preprocess(x, noise))
    outputs.clear()
    latent = flow(preprocess(x, noise))
    assert torch.isfinite(latent.log_det).all()
    for y in outputs:
        assert float(y.mean(0).abs().max()) < 2e-3
        assert float((y.std(0) - 1).abs().max()) < 2e-2


def test_exactly_constant_elements_get_the_largest_gain():
    layer = ActNorm((1, 2, 2))
    y = layer.initialise(torch.full((8, 1, 2, 2), 0.3))
    assert torch.isfinite(layer.scale).all()
    assert float(y.detach().abs().max()) < 1e-2


@pytest.mark.parametrize("method", ["all_levels", "all_levels_idx", "spcb"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_round_trip_of_images_is_exact(method, dtype):
    torch.manual_seed(0)
    config = FlowConfig(
        channels=3,
        height=8,
        width=8,
        flows=(1, 1, 1),
        blocks=(1, 1, 1),
        hidden=(6, 6, 6),
        level_method=method,
        level_idx=2,
    )
    flow = MultiScaleFlow(config).to(dtype)
    randomise(flow, size=0.05)
    x = torch.randint(0, 256, (4, 3, 8, 8), generator=torch.Generator().manual_seed(1)).to(dtype) / 255
    with torch.no_grad():
        latent = flow(preprocess(x, 0.5))
        assert latent.z.shape == (4, config.latent_dim)
        back = flow.inverse(latent.z, halves=latent.halves)
    assert torch.equal(postprocess(back), x)


def test_paper_configuration_has_the_published_sizes():
    counted = {}
    for name, options in {
        "cifar": {},
        "attention": {"attention": True},
        "idx2": {"level_method": "all_levels_idx", "level_idx": 2},
        "spcb": {"level_method": "spcb"},
        "mnist": {"channels": 1, "blocks": (4, 2, 1)},
        "mnist_spcb": {"channels": 1, "blocks": (4, 2, 1), "level_method": "spcb"},
    }.items():
        config = FlowConfig(**options)
        with torch.device("meta"):
            flow = MultiScaleFlow(config)
        counted[name] = (sum(p.numel() for p in flow.parameters()), config.dim, config.latent_dim)
    assert counted == {
        "cifar": (42_815_440, 3072, 3072),
        "attention": (55_208_944, 3072, 3072),
        "idx2": (42_816_112, 3072, 1536),
        "spcb": (42_818_752, 3072, 768),
        "mnist": (18_546_160, 1024, 1024),
        "mnist_spcb": (18_546_544, 1024, 256),
    }


def test_attention_takes_mnist_s_channels_and_starts_as_the_identity():
    block = AttentionBlock(20).double()
    x = torch.randn(2, 20, 3, 3, dtype=torch.float64)
    torch.testing.assert_close(block(x), x, rtol=0, atol=0)
    assert block.heads == 5 and AttentionBlock(42).heads == 6


def test_activation_checkpointing_changes_no_gradient():
    grads = []
    for recompute in (False, True):
        torch.manual_seed(0)
        torch.default_generator.manual_seed(0)
        import numpy as np

        np.random.seed(0)
        flow = MultiScaleFlow(
            FlowConfig(
                channels=1, height=4, width=4, flows=(2,), blocks=(1,), hidden=(4,), activation_checkpointing=recompute
            )
        )
        randomise(flow)
        latent = flow(torch.ones(2, 1, 4, 4))
        (latent.z.square().sum() - latent.log_det.sum()).backward()
        grads.append(torch.cat([p.grad.flatten() for p in flow.parameters()]))
    torch.testing.assert_close(*grads, rtol=1e-6, atol=1e-6)


def test_samples_have_the_class_s_moments():
    gaussians = ClassGaussians(torch.tensor([[0.0, 5.0], [-3.0, 1.0]]), torch.tensor([[1.0, 4.0], [0.25, 1.0]]))
    z = gaussians.sample(torch.ones(40000, dtype=torch.long), 0.5, torch.Generator().manual_seed(0))
    torch.testing.assert_close(z.mean(0), torch.tensor([-3.0, 1.0]), rtol=0, atol=0.02)
    torch.testing.assert_close(z.var(0), 0.25 * torch.tensor([0.25, 1.0]), rtol=0.03, atol=0)


def test_scores_of_a_class_that_is_told_in_the_image_are_its_likelihood():
    torch.manual_seed(0)
    config = FlowConfig(channels=1, height=8, width=8, flows=(1, 1), blocks=(1, 1), hidden=(4, 4))
    gaussians = ClassGaussians(torch.zeros(3, config.latent_dim), torch.ones(3, config.latent_dim), shared=True)
    codes = DistancedPixels.make(3, 1, 2, 8, 10, torch.Generator().manual_seed(0))
    model, x = ConditionalFlow(MultiScaleFlow(config), gaussians, 8, codes), torch.rand(5, 1, 6, 8)
    scores = model.scores(x, 0.5)
    assert scores.shape == (5, 3) and scores[0].unique().numel() == 3
    for k in range(3):
        torch.testing.assert_close(scores[:, k], -model.nll(x, torch.full((5,), k), 0.5)[0].detach().double())


def test_temperature_reaches_the_split_priors():
    torch.manual_seed(0)
    config = FlowConfig(channels=1, height=4, width=4, flows=(1, 1), blocks=(1, 1), hidden=(4, 4), level_method="spcb")
    flow = MultiScaleFlow(config)
    model = ConditionalFlow(flow, ClassGaussians(torch.zeros(2, config.latent_dim), torch.ones(2, config.latent_dim)))
    white = torch.ones(1, 1, 4, 4)
    assert torch.equal(model.input(white, torch.zeros(1), 0.5), (255.5 / 128 - 1) * white)  # 8 bits
    z = model.gaussians.mean
    cold = flow.inverse(z, 0.0, torch.Generator().manual_seed(0))
    torch.testing.assert_close(cold, flow.inverse(z, 0.0, torch.Generator().manual_seed(1)))
    warm = flow.inverse(z, 1.0, torch.Generator().manual_seed(0))
    assert float((warm - cold).detach().abs().max()) > 0.1


@pytest.mark.parametrize(
    "options",
    [
        {"conv_type": "x"},
        {"flow_type": "x"},
        {"level_method": "x"},
        {"height": 20},
        {"blocks": (1,)},
        {"level_method": "all_levels_idx", "level_idx": 4},
    ],
)
def test_impossible_architectures_are_refused(options):
    with pytest.raises(UserError):
        FlowConfig(**options)


def test_unknown_layer_types_are_refused():
    with pytest.raises(UserError, match="conv_type"):
        Conv1x1(4, "cayley")
    with pytest.raises(UserError, match="flow_type"):
        CouplingLayer(4, 4, 1, "spline")


@pytest.mark.gpu
def test_gpu_agrees_with_cpu():
    torch.manual_seed(0)
    flow = MultiScaleFlow(
        FlowConfig(channels=1, height=8, width=8, flows=(1, 1), blocks=(1, 1), hidden=(4, 4))
    ).double()
    randomise(flow, size=0.1)
    x = torch.rand(3, 1, 8, 8, dtype=torch.float64)
    cpu, gpu = flow(x), flow.cuda()(x.cuda())
    torch.testing.assert_close(gpu.z.cpu(), cpu.z, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(flow.inverse(gpu.z).cpu(), x, rtol=1e-8, atol=1e-8)
