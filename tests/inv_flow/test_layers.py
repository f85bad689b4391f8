"""What the golden vectors and the layer contract do not reach: extremes, initial states, float32, whole models."""

import importlib
import math

import pytest
import torch
import torch.nn.functional as F

from common.errors import NonFiniteError, UserError
from inv_flow.layers.activations import SELU, SmoothLeakyRelu, SmoothTanh, SplineActivation
from inv_flow.layers.actnorm import ActNorm
from inv_flow.layers.conv1x1 import Conv1x1
from inv_flow.layers.convexp import ConvExp, conv_exp
from inv_flow.layers.coupling import Coupling
from inv_flow.layers.emerging import SquareAutoRegressiveConv2d
from inv_flow.layers.flow import FlowSequential
from inv_flow.layers.inv_conv import InverseConv2d
from inv_flow.layers.preprocess import Normalization, Squeeze, preprocessing
from inv_flow.layers.selfnorm import SelfNormConv, SelfNormFC, conv_matrix
from inv_flow.layers.spline import rational_quadratic_spline
from inv_flow.model import create_model
from inv_flow.toy_2d import log_density, make_flow
from inv_flow.train.config import LAYERS, Config, layer_choice


def tiny(layer="inverse", **changes):
    keys = {"image_size": (1, 8, 8), "block_size": 2, "coupling_width": 8, "split_width": 8, "tail_bound": 10.0}
    return Config.build(keys, layer_choice(layer), changes)


def moved(model, scale=0.05):
    """Every parameter off its initial value, so that zero-initialised parts take part."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += scale * torch.randn_like(parameter)
    return model


def test_actnorm_survives_a_constant_channel():
    torch.manual_seed(0)
    x = torch.randn(5, 3, 4, 4)
    x[:, 1] = 7.0
    layer = ActNorm(3)
    z, log_det = layer(x)
    assert torch.isfinite(z).all() and torch.isfinite(log_det).all()
    assert z[:, 1].abs().max() == 0 and layer.log_scale[1] == 0
    assert torch.allclose(z[:, 0].std(), torch.tensor(1.0), atol=1e-5)
    (z.square().sum() - log_det.sum()).backward()
    assert all(torch.isfinite(p.grad).all() for p in layer.parameters())
    # what the constant channel holds later must not be blown up
    assert ActNorm(2)(torch.zeros(1, 2, 1, 1))[0].abs().max() == 0
    assert (layer(x + 0.1)[0][:, 1] - 0.1).abs().max() < 1e-5


def test_actnorm_flag_survives_a_checkpoint():
    torch.manual_seed(0)
    x, other = torch.randn(6, 2, 3, 3), 5 + 3 * torch.randn(6, 2, 3, 3)
    trained, fresh = ActNorm(2), ActNorm(2)
    with pytest.raises(RuntimeError, match="not initialised"):
        fresh.reverse(x)
    trained(x)
    fresh.load_state_dict(trained.state_dict())
    assert torch.equal(fresh.reverse(x), trained.reverse(x))
    assert torch.equal(fresh(other)[0], trained(other)[0])  # the other data must not initialise it again


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("layer", [SmoothLeakyRelu(), SmoothLeakyRelu(0.01), SmoothTanh(), SmoothTanh(5.0, 0.01)])
def test_newton_inverses_at_extremes(layer, dtype):
    sizes = torch.logspace(-8, 6, 57, dtype=dtype)
    y = torch.cat([-sizes.flip(0), torch.zeros(1, dtype=dtype), sizes])[None]
    x = layer.reverse(y)
    assert torch.isfinite(x).all()
    assert (x.diff() >= 0).all()  # increasing
    back = layer(x)[0]
    tolerance = 1e-10 if dtype == torch.float64 else 1e-5
    assert ((back - y).abs() <= tolerance * (1 + y.abs())).all()


def test_selu_reverse_below_its_range_is_finite():
    z = torch.tensor([[-1e9, -1.7581, -1.0, 0.0, 3.0]])
    assert torch.isfinite(SELU().reverse(z)).all()


def test_spline_in_float32_at_knots_and_tails():
    torch.manual_seed(0)
    layer = moved(SplineActivation((1, 1, 41), 5, 4.0), 1.0)
    x = torch.linspace(-5, 5, 41)[None, None, None]
    y, log_det = layer(x)
    assert torch.isfinite(log_det).all()
    assert torch.equal(y[x.abs() > 4], x[x.abs() > 4])
    assert (layer.reverse(y) - x).abs().max() < 1e-4


@pytest.mark.parametrize("kind", ["small", "snf"])
def test_coupling_starts_as_the_identity(kind):
    x = torch.randn(2, 6, 5, 3)
    z, log_det = Coupling(6, 16, kind)(x)
    assert torch.equal(z, x)
    assert torch.equal(log_det, torch.zeros(2))


@pytest.mark.parametrize("kind", ["small", "snf"])
@pytest.mark.parametrize(("channels", "width"), [(4, 512), (10, 256), (4, 16)])
def test_a_coupling_of_any_width_computes_its_network(kind, channels, width):
    """On patches, in parts of the batch or as it is: the network's own convolutions, values and gradients."""
    torch.manual_seed(0)
    layer = moved(Coupling(channels, width, kind).double(), 0.1)
    x = torch.randn(30, channels, 14, 14, dtype=torch.float64, requires_grad=True)
    x1, x2 = x.chunk(2, 1)
    first, second, last = layer.net[0], layer.net[2], layer.net[4]
    h = F.relu(F.conv2d(F.relu(F.conv2d(x1, first.weight, first.bias, padding=1)), second.weight, second.bias))
    h = F.conv2d(h, last.weight, last.bias, padding=1) * (3 * last.logs).exp()[:, None, None]
    log_s = 2 * torch.tanh(h[:, 0::2] / 2)
    expected = torch.cat([x1, x2 * log_s.exp() + h[:, 1::2]], 1), log_s.sum((1, 2, 3))
    found = layer(x)
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)
    grads = [torch.autograd.grad(z.square().mean(), [x, *layer.parameters()]) for z, _ in (found, expected)]
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-10)


def test_brightest_pixel_stays_finite_in_float32():
    layers = preprocessing(1e-6)
    x = torch.tensor([0.0, 255.0]).view(1, 2, 1, 1)
    for noise in (torch.zeros_like(x), torch.full_like(x, 1 - 2**-24)):
        z, _ = layers[0](x, noise)
        log_det = 0
        for layer in layers[1:]:
            z, term = layer(z)
            log_det = log_det + term
        assert torch.isfinite(z).all() and torch.isfinite(log_det).all()
    with pytest.raises(UserError, match="alpha"):
        create_model(tiny(alpha=1e-8))


def test_density_integrates_to_one():
    """The whole bookkeeping at once: exp(log p) of a flow with every kind of factor, summed over a fine grid."""
    torch.manual_seed(0)
    flow = make_flow(3, 8).double()
    log_density(flow, 2 * torch.randn(200, 2, dtype=torch.float64))
    moved(flow, 0.1)
    line = torch.linspace(-20, 20, 301, dtype=torch.float64)
    grid = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1).view(-1, 2)
    with torch.no_grad():
        mass = log_density(flow, grid).exp().sum() * (line[1] - line[0]) ** 2
    assert abs(float(mass) - 1) < 2e-3


@pytest.mark.parametrize("layer", [name for name in LAYERS if name != "snf"])
def test_models_reconstruct_exactly_and_sample_integers(layer):
    torch.manual_seed(0)
    model = create_model(tiny(layer, padding=2))
    x = torch.randint(0, 256, (4, 1, 8, 8)).float()
    model.encode(x)  # initialises
    moved(model).eval()
    assert torch.equal(model.reconstruct(x), x)
    latents, _ = model.encode(x)
    assert [tuple(z.shape[1:]) for z in latents] == model.latent_sizes == [tuple(s) for s in model.latent_shapes(x)]
    samples = model.sample_images(3)
    assert samples.shape == (3, 1, 8, 8)
    assert torch.equal(samples, samples.round()) and samples.min() >= 0 and samples.max() <= 255


def test_temperature_scales_every_latent():
    torch.manual_seed(0)
    model = create_model(tiny())
    model.encode(torch.randint(0, 256, (4, 1, 8, 8)).float())
    cold = model.sample_images(2, temperature=0.0)
    assert torch.equal(cold[0], cold[1])  # split latents are cold too


def test_deep_flow_reconstructs_in_float32():
    """The paper's depth (L = 2, K = 16) with weights as large as training makes them: below a grey level by far."""
    torch.manual_seed(0)
    model = create_model(tiny(block_size=16, conv1x1=True, image_size=(1, 28, 28), individual_weights=False))
    x = torch.randint(0, 256, (8, 1, 28, 28)).float()
    model.encode(x)
    moved(model, 0.02).eval()
    with torch.no_grad():
        noisy, rest = model.layers[0](x)[0], FlowSequential(model.layers[1:])
        error = (rest.reconstruct(noisy) - noisy).abs()
        # one rounding is 256 * 6e-8 = 1.5e-5 grey levels; some 150 layers of them, as a random walk: 2e-4 on average
        assert error.max() < 0.02 and error.mean() < 5e-4
        exact = FlowSequential(rest.layers).double()(noisy.double())[1]
        rounded = FlowSequential(rest.layers).float()(noisy)[1]
    assert ((rounded - exact) / exact).abs().max() < 1e-5


def test_self_normalised_gradient_is_half_the_exact_one_at_the_true_inverse():
    torch.manual_seed(0)
    layer = SelfNormConv(4, 1).double()
    moved(layer, 0.3)
    with torch.no_grad():
        layer.inverse.copy_(layer.weight[:, :, 0, 0].inverse()[:, :, None, None])
    x = torch.randn(5, 4, 3, 6, dtype=torch.float64)

    def gradients(exact):
        layer.exact = exact
        layer.zero_grad()
        z, log_det = layer(x)
        (z.square().flatten(1).sum(1) / 2 - log_det).mean().backward()
        return layer.weight.grad.clone(), layer.inverse.grad

    modified, of_inverse = gradients(False)
    exact, _ = gradients(True)
    assert torch.allclose(2 * modified, exact, atol=1e-10)
    assert of_inverse is not None and of_inverse.abs().sum() > 0


def test_the_exact_log_det_of_a_self_normalised_layer_learns_and_follows_its_weight():
    """Without gradients the dense matrix is kept, until the weight changes; with them it is made anew."""
    layer, x = SelfNormConv(2, 3).double(), torch.randn(1, 2, 4, 4, dtype=torch.float64)
    for _ in range(2):
        expected = torch.linalg.slogdet(conv_matrix(layer.weight, (2, 4, 4)))[1]
        with torch.no_grad():
            assert torch.allclose(layer.log_det(x), expected) and torch.allclose(layer.log_det(x), expected)
        found, right = (torch.autograd.grad(value.sum(), layer.weight)[0] for value in (layer.log_det(x), expected))
        assert torch.allclose(found, right)
        with torch.no_grad():
            layer.weight.mul_(1.1)


# section 3.10 of the published scripts; what differs is explained in inv_flow/README.md
PUBLISHED = {
    "if_glow_mnist": 832_920, "if_conv1x1_glow_mnist": 833_448, "if_cnn_mnist": 705_904, "if_glow_cifar": 650_027,
    "if_exact_cnn_mnist": 1_436_384, "if_glow_imagenet32": 2_075_979, "if_multigpu_imagenet32": 8_409_931,
    "ff_glow_mnist": 935_736, "ff_glow_cifar": 716_328, "emerging_cnn_mnist": 159_804, "exact_fc_mnist": 10_994,
    "exponential_cnn_mnist": 110_110, "exact_cnn_mnist": 95_179, "selfnorm_fc_mnist": 39_363_072,
    "selfnorm_glow_mnist": 567_128, "geco_selfnorm_glow_mnist": 93_880, "conv1x1_glow_mnist": 565_656,
    "conv1x1_glow_cifar": 3_491_112 + 23_040, "conv1x1_glow_imagenet": 12_929_688, "selfnorm_cnn_mnist": 95_179 + 7_434,
    "selfnorm_glow_imagenet": 13_078_872, "selfnorm_glow_cifar": 473_016,
}  # fmt: skip


def parameters(preset):
    config = Config.build(preset)
    size = (1, 28, 28) if config.dataset == "mnist" else (3, 32, 32)
    return sum(p.numel() for p in create_model(config.with_changes(image_size=size)).parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_parameter_counts(name):
    preset = importlib.import_module(f"inv_flow.experiments.{name}").PRESET
    if name == "selfnorm_fc_mnist":  # 32 equal layers of 1.2 million parameters: one stands for all
        assert preset["block_size"] * parameters(preset | {"block_size": 1}) == PUBLISHED[name]
    else:
        assert parameters(preset) == PUBLISHED[name]


def test_published_parameter_counts_of_the_main_scripts():
    from inv_flow import inv_flow_cifar10_multi_GPUs as cifar
    from inv_flow import inv_flow_imagenet_multi_gpu as imagenet

    assert parameters(cifar.PRESET | cifar.PRESETS["released"]) == 8_344_632
    assert parameters(imagenet.PRESET | imagenet.PRESETS["released"]) == 14_269_656 - 41_664


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_blocks": 3, "image_size": (1, 28, 28)}, "does not squeeze"),
        ({"layer": "finc", "image_size": (1, 8, 8), "first_squeeze": False}, "multiple of 4"),
        ({"image_size": None}, "image_size"),
        ({"layer": "none", "coupling_width": 0, "activation": "Identity", "actnorm": False}, "without any layer"),
    ],
)
def test_impossible_models_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        create_model(tiny(**changes))


# a rank-deficient matrix whose float64 inverse exists by rounding alone, and one that is exactly singular
SINGULAR = [torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.6], [0.5, 0.7, 0.9]]), torch.tensor([[1.0, 2.0], [2.0, 4.0]])]


@pytest.mark.parametrize("size", [(3, 4), (4, 3)])
def test_an_odd_side_does_not_squeeze(size):
    with pytest.raises(ValueError, match=f"got {size[0]} x {size[1]}"):
        Squeeze()(torch.zeros(1, 1, *size))


def test_a_value_goes_through_many_splines_at_once():
    torch.manual_seed(0)
    parts = torch.randn(3, 1, 4), torch.randn(3, 1, 4), torch.randn(3, 1, 3)
    x = torch.linspace(-4, 4, 9)
    many = rational_quadratic_spline(x, *parts, tail_bound=3.0)
    for k in range(3):
        one = rational_quadratic_spline(x, *(part[k] for part in parts), tail_bound=3.0)
        assert all(torch.equal(a[k], b) for a, b in zip(many, one, strict=True))
    assert many[0].shape == (3, 9) and many[0].unique(dim=0).shape == (3, 9)


def test_a_scale_is_any_positive_number():
    x = torch.rand(2, 1, 3, 3)
    y, log_det = Normalization(0.25, 0.5)(x)
    assert torch.allclose(y, 2 * x - 0.5) and torch.allclose(log_det, torch.full((2,), 9 * math.log(2)))
    with pytest.raises(ValueError, match="scale=0"):
        Normalization(0.25, 0)


@pytest.mark.parametrize("weight", SINGULAR)
def test_a_singular_matrix_has_no_inverse(weight):
    channels = len(weight)
    plain, learned = Conv1x1(channels), SelfNormConv(channels, 1)
    plain.weight.data, learned.weight.data = weight.clone(), weight[:, :, None, None].clone()
    learned.exact = True
    z = torch.randn(2, channels, 3, 3)
    for layer in (plain, learned):
        with pytest.raises(NonFiniteError, match="singular"), torch.no_grad():
            layer.reverse(z)
    kernel = SelfNormConv(channels, 3)
    kernel.weight.data = torch.zeros_like(kernel.weight)
    kernel.weight.data[:, :, 1, 1] = weight
    kernel.exact = True
    with pytest.raises(NonFiniteError, match="singular"), torch.no_grad():
        kernel.reverse(z)


def test_a_kept_inverse_follows_the_weight():
    torch.manual_seed(0)
    layer, z = Conv1x1(4), torch.randn(2, 4, 3, 3)
    with torch.no_grad():
        layer.reverse(z)
        layer.weight += 0.1 * torch.randn(4, 4)
        assert torch.allclose(layer(layer.reverse(z))[0], z, atol=1e-5)
        layer.double()
        assert layer.reverse(z.double()).dtype == torch.float64
    x = layer.reverse(z.double().requires_grad_())  # with gradients to the weight, too
    x.sum().backward()
    assert layer.weight.grad.abs().sum() > 0


def test_the_cap_keeps_emerging_finite_at_64_pixels():
    torch.manual_seed(0)
    z = torch.randn(2, 8, 64, 64)
    for cap, finite in ((None, False), (0.9, True)):
        layer = SquareAutoRegressiveConv2d(8, 3, cap)
        with torch.no_grad():
            layer.weight += 0.6 * torch.randn_like(layer.weight) * layer.mask * (1 - layer.pin)
            x = layer.reverse(z)
        assert bool(torch.isfinite(x).all() and x.abs().max() < 1e4) == finite
    # the certificate, and that the capped layer is a bijection with the log-determinant of its diagonal
    y = (z - layer.bias.view(1, -1, 1, 1)) / layer.weight[:, :, -1, -1].diagonal().view(1, -1, 1, 1)
    assert x.abs().max() <= y.abs().max() / (1 - 0.9) * 1.001
    assert torch.allclose(layer(x)[0], z, atol=1e-3)
    step = create_model(tiny("emerging", max_row_sum=0.9, if_kernel_size=3, image_size=(1, 8, 8)))
    assert {m.max_row_sum for m in step.modules() if isinstance(m, SquareAutoRegressiveConv2d)} == {0.9}


@pytest.mark.parametrize(("layers", "blocks", "steps"), [(9, 2, 4), (9, 3, 3), (2, 2, 1)])
def test_num_layers_is_the_published_depth_of_a_cnn(layers, blocks, steps):
    keys = {"coupling_width": 0, "split_prior": False, "num_blocks": blocks, "first_squeeze": False}
    model = create_model(tiny("inverse", num_layers=layers, **keys))
    assert sum(isinstance(layer, InverseConv2d) for layer in model.layers) == blocks * steps
    model = create_model(tiny("none", fc=True, num_layers=5, num_blocks=1))
    assert sum(isinstance(layer, SelfNormFC) for layer in model.layers) == 5
    for activation, count in (("Spline", 5), ("Identity", 0)):
        model = create_model(tiny("none", fc=True, num_layers=5, num_blocks=1, activation=activation))
        assert sum(isinstance(layer, SplineActivation) for layer in model.layers) == count


def test_the_convolution_exponential_keeps_its_norm_while_its_kernel_grows():
    """Its power iteration follows the kernel in training: one step a pass."""
    torch.manual_seed(0)
    layer, x = ConvExp((2, 5, 5), coeff=0.9).train(), torch.randn(3, 2, 5, 5)

    def norm():
        basis = torch.eye(50).view(50, 2, 5, 5)
        matrix = torch.nn.functional.conv2d(basis, layer.normalized_kernel().detach(), padding=1).flatten(1)
        return float(torch.linalg.matrix_norm(matrix, 2))

    with torch.no_grad():
        layer.kernel.copy_(torch.randn_like(layer.kernel))  # far from where it started
        for _ in range(60):
            layer(x)
        layer.eval()
        assert norm() == pytest.approx(0.9, rel=0.02)
        frozen = layer.u.clone()
        layer(x)
        assert torch.equal(layer.u, frozen)  # an evaluation changes nothing
        assert (layer.reverse(layer(x)[0]) - x).abs().max() < 1e-3
        assert layer.terms_train < layer.terms_eval
        assert torch.allclose(conv_exp(x, layer.kernel * 0, 3), x)


def test_reconstruction_gradient_reaches_what_it_should():
    """only_R_recon: the learned inverse alone, else the weight through W x too."""
    torch.manual_seed(0)
    layer, x = SelfNormConv(3, 3), torch.randn(2, 3, 5, 5)
    with torch.no_grad():
        layer.inverse.mul_(0.8)
    for only_r in (False, True):
        layer.zero_grad(set_to_none=True)
        layer.reconstruction_loss(x, only_r=only_r).backward()
        assert layer.inverse.grad.abs().max() > 0
        assert (layer.weight.grad is None) == only_r


@pytest.mark.parametrize("size, inside", [((8, 6), (8, 8)), ((6, 8), (8, 8)), ((5, 7), (8, 8)), ((8, 4), (8, 4))])
def test_images_of_any_size_are_padded_until_they_squeeze(size, inside):
    torch.manual_seed(0)
    model = create_model(tiny(dataset="folder", image_size=(1, *size), num_blocks=2, first_squeeze=True))
    x = torch.randint(0, 256, (4, 1, *size)).float()
    latents, _ = model.encode(x)
    assert sum(z[0].numel() for z in latents) == inside[0] * inside[1]
    assert torch.equal(model.eval().reconstruct(x), x) and model.sample_images(2).shape == (2, 1, *size)
