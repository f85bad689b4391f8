"""What the parts and the loaded models are given by mistake: one line that names it, or the right result."""

import math
from functools import partial

import numpy as np
import pytest
import torch

import glancenet
import inv_flow
import latent_flow
import lbae
import nfpi
from common.errors import UserError
from common.metrics import bin_factors, score
from glancenet import OpenSet
from inv_flow import InverseConv2d
from latent_flow import FlowField
from lbae import HyperplaneSampler
from nfpi import FixedPointGaussians

MODELS = {
    "lbae": lbae.load("mnist_bae_w16"),
    "glancenet": glancenet.load("mnist_parity"),
    "latent_flow": latent_flow.load("mnist_supervised_d16"),
    "inv_flow": inv_flow.load("mnist_inverse_w64"),
    "nfpi": nfpi.load("mnist_small"),
}
LBAE, GLANCE, LATENT, INVERSE, NFPI = MODELS.values()
LOADS = (lbae.load, glancenet.load, latent_flow.load, inv_flow.load, nfpi.load)
papers = pytest.mark.parametrize("paper", MODELS)


def refused(call, message, error=UserError):
    """`call` raises one line, a UserError and nothing below it."""
    with pytest.raises(error, match=message) as raised:
        call()
    assert "\n" not in str(raised.value)


def images(paper, n=2):
    torch.manual_seed(0)
    return torch.rand(n, *MODELS[paper].image_shape)


def listed(latents):
    return latents if isinstance(latents, list) else [latents]


# ---- the loaded models -----------------------------------------------------------------------------------------------


@papers
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda x: x[0], r"images of shape .*: expected \(B, "),
        (lambda x: x[..., 1:], r"images of shape .*: expected \(B, "),
        (lambda x: x.repeat(1, 2, 1, 1), r"images of shape .*: expected \(B, "),
        (lambda x: x * torch.nan, "images hold NaN"),
        (lambda x: x * 255, r"images in \[.*\]: expected \[0, 1"),
        (lambda x: x - 0.5, r"images in \[.*\]: expected \[0, 1"),
        (lambda x: (x * 255).byte(), r"images of torch.uint8: expected floats in \[0, 1"),
        (lambda x: (x * 255).byte().numpy(), r"images of torch.uint8: expected floats in \[0, 1"),
        (lambda x: [[0.5], [0.5, 1]], "images must be a tensor or an array of numbers, not list"),
        (lambda x: np.full(x.shape, "a"), "images must be a tensor or an array of numbers"),
        (lambda x: None, "images must be a tensor or an array of numbers, not NoneType"),
    ],
)
def test_images_that_a_loaded_model_cannot_take(paper, change, message):
    refused(lambda: MODELS[paper].encode(change(images(paper))), message)
    refused(lambda: MODELS[paper](change(images(paper))), message)


@papers
def test_the_line_names_the_shape(paper):
    wanted = ", ".join(map(str, MODELS[paper].image_shape))
    refused(lambda: MODELS[paper].encode(torch.rand(2, 5, 9, 9)), rf"shape \(2, 5, 9, 9\): expected \(B, {wanted}\)")


@papers
@torch.no_grad()
def test_arrays_and_float64_are_taken(paper):
    model, x = MODELS[paper], images(paper)
    wanted = listed(model.encode(x))
    for same in (x.double(), x.numpy(), x.double().numpy(), np.asfortranarray(x.numpy()), x.tolist()):
        for ours, theirs in zip(listed(model.encode(same)), wanted, strict=True):
            torch.testing.assert_close(ours, theirs)
    z = [part.double().numpy() for part in wanted]
    drawn = (1.0, torch.Generator().manual_seed(0)), (1.0, torch.Generator().manual_seed(0))
    options = drawn if paper == "nfpi" else ((), ())
    found = model.decode(z if paper == "inv_flow" else z[0], *options[0])
    torch.testing.assert_close(found, model.decode(model.encode(x), *options[1]))


@papers
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda z: z[:, 1:], r"latents.* of shape .*: expected \(B, "),
        (lambda z: z[0], r"latents.* of shape .*: expected \(B, "),
        (lambda z: z * torch.nan, "latents.* hold NaN"),
        (lambda z: z.bool(), "latents.* of torch.bool: expected floats"),
        (lambda z: "z", "latents.* must be"),
    ],
)
def test_latents_that_a_loaded_model_cannot_take(paper, change, message):
    z = [torch.ones_like(part) for part in listed(MODELS[paper].encode(images(paper)))]
    message = message.replace("latents", "codes") if paper == "lbae" else message
    wrong = [*z[:-1], change(z[-1])]
    refused(lambda: MODELS[paper].decode(wrong if paper == "inv_flow" else wrong[0]), message)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: LBAE.decode((LBAE.codes[:2] + 1) // 2), "codes of 0 and 1: expected -1 and"),
        (lambda: LBAE.decode(LBAE.codes[:2].float() * 3), r"codes in \[-3, 3\]: expected \[-1, 1\]"),
        (lambda: LBAE.sample(0), "n=0: expected a whole number, at least 1"),
        (lambda: LBAE.sample(2.5), "n=2.5: expected a whole number"),
        (lambda: LBAE.sample(2, "x"), "rng 'x'"),
        (lambda: INVERSE.sample(0), "n=0"),
        (lambda: INVERSE.sample("2"), "n='2'"),
        (lambda: INVERSE.sample(2, -1), "temperature=-1: expected a finite number, at least 0"),
        (lambda: INVERSE.sample(2, math.nan), "temperature=nan"),
        (lambda: INVERSE.decode(torch.zeros(2, 4)), r"latents: expected a list of \d+ tensors"),
        (lambda: INVERSE.decode([z[i:] for i, z in enumerate(INVERSE.encode(images("inv_flow")))]), "expected as many"),
        (lambda: INVERSE.decode(INVERSE.encode(images("inv_flow"))[:1]), r"latents: expected a list of \d+ tensors"),
        (lambda: NFPI.sample(torch.tensor([10])), r"y=\[10\]: expected class numbers 0 to 9"),
        (lambda: NFPI.sample(torch.tensor([-1])), r"y=\[-1\]: expected class numbers 0 to 9"),
        (lambda: NFPI.sample(torch.tensor([0.5])), "y of shape .*: expected class numbers"),
        (lambda: NFPI.sample(torch.zeros(2, 2).long()), "y of shape .*: expected class numbers"),
        (lambda: NFPI.sample("four"), "y must be"),
        (lambda: NFPI.sample([]), "y of shape .*: expected class numbers"),
        (lambda: NFPI.sample([1], math.nan), "temperature=nan"),
        (lambda: NFPI.decode(torch.zeros(2, 1024), -1), "temperature=-1"),
        (lambda: NFPI.posterior(images("nfpi"), -1), "draws=-1"),
        (lambda: NFPI.noisy(images("nfpi") * 255), r"images in \["),
        (lambda: LATENT.move(torch.zeros(2, 3), torch.ones(3)), r"latents of shape \(2, 3\): expected \(B, 16\)"),
        (lambda: LATENT.move(torch.zeros(2, 16) * torch.nan, torch.ones(3)), "latents hold NaN"),
        (lambda: LATENT.move(torch.zeros(2, 16), torch.ones(3) * torch.nan), "weights hold NaN"),
        (lambda: LATENT.move(torch.zeros(2, 16), torch.ones(2)), r"weights of shape \(2,\): expected \(3,\)"),
        (lambda: LATENT.move(torch.zeros(2, 16), None), "weights must be"),
        (lambda: LATENT.move(torch.zeros(2, 16), torch.ones(3), 1.5), "steps=1.5"),
        (lambda: LATENT.move(torch.zeros(2, 16), torch.ones(3), 0), "steps=0"),
        *((partial(load, value), "is no name") for load in LOADS for value in (None, 3, "")),
        (
            lambda: lbae.load("mnist_parity"),
            r"checkpoints/lbae has no mnist_parity \(it is glancenet's\); it has mnist",
        ),
        (lambda: lbae.load("mnist_bae_w6"), "did you mean 'mnist_bae_w16'"),
        (lambda: INVERSE.decode([z * 1e30 for z in INVERSE.encode(torch.rand(2, *INVERSE.image_shape))]), "not finite"),
    ],
)
def test_other_arguments_of_a_loaded_model(call, message):
    refused(call, message)


@torch.no_grad()
def test_what_a_loaded_model_takes_besides():
    """Noise on NFPI's images, lists of classes, signed integers as codes, points between codes."""
    noisy = NFPI.noisy(torch.ones(2, *NFPI.image_shape), torch.Generator().manual_seed(0))
    assert noisy.max() > 1 and NFPI.encode(noisy).isfinite().all()
    same = [NFPI.sample(y, 0.0) for y in ([3, 4], np.array([3, 4]), torch.tensor([3, 4], dtype=torch.int32))]
    assert torch.equal(same[0], same[1]) and torch.equal(same[0], same[2])
    codes = LBAE.codes[:2]
    assert torch.equal(LBAE.decode(codes.to(torch.int8)), LBAE.decode(codes.double()))
    assert LBAE.decode(codes.float().mean(0, keepdim=True)).isfinite().all()
    z = torch.zeros(2, 16)
    assert torch.equal(LATENT.move(z.numpy(), [0, 1, 0]), LATENT.move(z.double(), torch.tensor([0.0, 1, 0])))


@papers
def test_gradients_compilers_and_transforms_pass_the_checks(paper):
    model = MODELS[paper]
    x = images(paper).requires_grad_()
    listed(model.encode(x))[-1].sum().backward()
    assert x.grad.isfinite().all()
    if paper in ("lbae", "glancenet", "latent_flow"):
        x, z = images(paper), model.encode(images(paper)).detach()
        compiled = torch.compile(model.decode, backend="eager", fullgraph=True)
        torch.testing.assert_close(compiled(z), model.decode(z))
        program = torch.export.export(model, (x,))
        torch.testing.assert_close(program.module()(x), model(x))
        if paper != "latent_flow":  # whose channels-last layout vmap does not know
            each = torch.func.vmap(lambda row: model.decode(row[None])[0])(z)
            torch.testing.assert_close(each, model.decode(z))


@papers
@torch.no_grad()
def test_no_images_at_all(paper):
    """Networks give no codes for them; a flow cannot squeeze them, and says so."""
    model, x = MODELS[paper], images(paper)[:0]
    if paper in ("inv_flow", "nfpi"):
        refused(lambda: model.encode(x), r"images of shape \(0, .*: expected \(B, .*\), at least one")
        z = [part[:0] for part in listed(model.encode(images(paper)))]
        refused(
            lambda: model.decode(z if paper == "inv_flow" else z[0]), r"latents.*: expected \(B, .*\), at least one"
        )
    else:
        assert model.decode(model.encode(x)).shape == x.shape


# ---- the parts -------------------------------------------------------------------------------------------------------


BITS = np.random.default_rng(0).random((60, 6)) < np.linspace(0.2, 0.8, 6)
SAMPLER = HyperplaneSampler().fit(BITS, BITS[:, 0])
TABLE = HyperplaneSampler().fit(BITS, np.stack([BITS[:, 0], BITS[:, 1]], 1))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: SAMPLER.sample(2.5), "n=2.5: expected a whole number, at least 1"),
        (lambda: SAMPLER.sample("3"), "n='3'"),
        (lambda: SAMPLER.sample(True), "n=True"),
        (lambda: SAMPLER.sample(2, "x"), "rng 'x': expected a seed"),
        (lambda: SAMPLER.sample(2, -1), "rng -1: expected a seed"),
        (lambda: SAMPLER.interpolate(BITS[0], BITS[1], 2.5), "steps=2.5"),
        (lambda: HyperplaneSampler().fit(BITS, [None] * 60), "labels hold None"),
        (lambda: HyperplaneSampler().fit(BITS, np.full(60, np.nan)), "labels hold NaN"),
        (lambda: HyperplaneSampler().fit(BITS.astype(complex)), "codes of torch.complex128"),
        (lambda: HyperplaneSampler().fit(BITS.astype(np.uint16)), "codes of torch.uint16"),
        (lambda: HyperplaneSampler().fit(None), "codes must be"),
        (lambda: SAMPLER.set_attribute(BITS, True, math.nan), "threshold=nan"),
        (lambda: SAMPLER.set_attribute(BITS, None), "attribute or class None"),
        (lambda: SAMPLER.set_attribute(BITS, [1, 2]), "attribute or class"),
        (lambda: TABLE.set_attribute(BITS, "blue"), "no attribute 'blue': there are 2"),
        (lambda: TABLE.set_attribute(BITS, 1.5), "no attribute 1.5: there are 2"),
        (lambda: TABLE.attribute_mean(2), "no attribute 2: there are 2"),
    ],
)
def test_codes_and_labels_that_the_sampler_cannot_take(call, message):
    refused(call, message)


def test_codes_that_require_a_gradient_are_taken():
    codes = torch.from_numpy(BITS * 2.0 - 1).requires_grad_()
    sampler, plain = HyperplaneSampler().fit(codes), HyperplaneSampler().fit(codes.detach())
    assert torch.equal(sampler.sample(9, 0), plain.sample(9, 0)) and not sampler.sample(9, 0).requires_grad
    assert torch.equal(sampler.interpolate(codes[0], codes[1]), plain.interpolate(codes[0], codes[1]).detach())


FIELD, Z, FRAMES = FlowField(2, 4), torch.zeros(3, 4), torch.rand(5, 3, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: FlowField(2.0, 4), r"FlowField\(2.0, 4\)"),
        (lambda: FlowField("2", 4), r"FlowField\('2', 4\)"),
        (lambda: FlowField(2, 4, "hard"), "rotation"),
        (lambda: FIELD.rollout(Z * torch.nan, 0), "latents hold NaN"),
        (lambda: FIELD.rollout(Z + torch.inf, 0), "latents hold NaN or infinite"),
        (lambda: FIELD.rollout("z", 0), "latents must be a tensor or an array of numbers, not str"),
        (lambda: FIELD.rollout(Z, None), "k must be"),
        (lambda: FIELD.rollout(Z, "a"), "k must be"),
        (lambda: FIELD.rollout(Z, torch.ones(2) * torch.nan), "weights hold NaN"),
        (lambda: FIELD.rollout(Z, torch.ones(2) + 1j), "k of shape"),
        (lambda: FIELD.rollout(Z, 0, 1.5), "T=1.5: expected a whole number, at least 1"),
        (lambda: FIELD.rollout(Z, 0, None), "T=None"),
        (lambda: FIELD.loss(lambda x: x, lambda z: z, FRAMES * torch.nan, 0), "frames hold NaN"),
        (
            lambda: FIELD.loss(lambda x: x, lambda z: z, None, 0),
            "frames must be a tensor or an array of numbers, not NoneType",
        ),
        (lambda: FIELD.loss(lambda x: x, lambda z: z, FRAMES[:, :0], 0), r"frames of shape \(5, 0, 4\)"),
        (lambda: FIELD.loss(lambda x: x * torch.nan, lambda z: z, FRAMES, 0), "latents hold NaN"),
        (lambda: FIELD.loss(lambda x: (x, x, x), lambda z: z, FRAMES, 0), "encode gave 3"),
        (lambda: FIELD.loss(lambda x: x, lambda z: None, FRAMES, 0), "decode gave NoneType"),
        (lambda: FIELD.loss(None, lambda z: z, FRAMES, 0), "encode=None: expected a function"),
        (lambda: FIELD.loss(lambda x: x, None, FRAMES, 0), "decode=None: expected a function"),
    ],
)
def test_latents_and_flows_that_the_field_cannot_take(call, message):
    refused(call, message)


def test_the_field_takes_float64_and_arrays():
    z = torch.randn(3, 4)
    wanted = FIELD.rollout(z, 1)
    for same in (z.double(), z.numpy()):
        torch.testing.assert_close(FIELD.rollout(same, 1), wanted)
    torch.testing.assert_close(FIELD.rollout(z, np.array([1, 1, 1]), np.int64(8)), wanted)
    torch.testing.assert_close(FIELD.rollout(z, [0.0, 1.0]), wanted)
    assert FIELD.rollout(z[:0], torch.zeros(0, dtype=torch.long)).shape == (9, 0, 4)
    found = FIELD.loss(lambda x: x, lambda z: z, FRAMES.numpy(), 0)
    torch.testing.assert_close(found, FIELD.loss(lambda x: x.double(), lambda z: z, FRAMES.double(), 0))


IMAGE, CONV = torch.randn(2, 4, 5, 6), InverseConv2d(4, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: CONV(IMAGE.numpy()), r"expected a tensor \(B, 4, H, W\), got ndarray"),
        (lambda: CONV.inverse(IMAGE.tolist()), r"expected a tensor \(B, 4, H, W\), got list"),
        (lambda: CONV.reverse(None), r"expected a tensor \(B, 4, H, W\), got NoneType"),
        (lambda: CONV(IMAGE[:, :3]), r"expected a tensor \(B, 4, H, W\), 4 channels, got \(2, 3, 5, 6\)"),
        (lambda: CONV.inverse(IMAGE[0]), r"expected a tensor \(B, 4, H, W\), 4 axes, got \(4, 5, 6\)"),
        (lambda: InverseConv2d(4, 3.0), "kernel_size=3.0: expected a whole number, or two"),
        (lambda: InverseConv2d(4, (3, 3, 3)), r"kernel_size=\(3, 3, 3\): expected a whole number, or two"),
        (lambda: InverseConv2d(4, None), "kernel_size=None"),
        (lambda: InverseConv2d(4.0, 3), "channels=4.0, groups=1: expected whole numbers"),
        (lambda: InverseConv2d(4, 3, groups=2.0), "channels=4, groups=2.0: expected whole numbers"),
        (lambda: InverseConv2d(4, 3, order=None), "order=None"),
        (lambda: InverseConv2d(4, 3, init_std=-1), "init_std=-1"),
        (lambda: InverseConv2d(4, 3, init_std=math.nan), "init_std=nan"),
    ],
)
def test_images_and_kernels_that_a_convolution_cannot_take(call, message):
    refused(call, message, ValueError)


POINTS = np.random.default_rng(0).normal(size=(60, 4))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: OpenSet(None, lambda z: z), "encode=None: expected a function"),
        (lambda: OpenSet(lambda x: x, 3), "decode=3: expected a function"),
        (lambda: OpenSet(lambda x: x, errors=None), "errors=None: expected a function"),
        (lambda: OpenSet(lambda x: x, quantile="high"), "quantile=high"),
        (lambda: OpenSet(lambda x: x, batch_size=2.5), "batch_size=2.5"),
        (lambda: OpenSet(lambda x: x).fit(POINTS, [0.0] * 59 + [math.nan]), "labels hold NaN"),
        (lambda: OpenSet(lambda x: x).fit(POINTS, np.full(60, np.nan)), "labels hold NaN"),
        (lambda: OpenSet(lambda x: x).fit(POINTS, ["a"] * 59 + [None]), "labels hold None"),
        (lambda: OpenSet(lambda x: x).fit(POINTS, None), "labels"),
        (lambda: OpenSet(lambda x: x).fit(None, [0] * 60), "an array or a tensor"),
        (lambda: OpenSet(lambda x: x).fit(np.array(1.0), [0]), "an array or a tensor"),
    ],
)
def test_what_the_rejection_cannot_take(call, message):
    refused(call, message)


@torch.no_grad()
def test_a_loaded_model_rejects_arrays_as_it_does_tensors():
    model = GLANCE
    torch.manual_seed(0)
    y = np.arange(60) % 2
    x = model.decode(model.prototypes[torch.from_numpy(y)] + torch.randn(60, 10))
    found = [OpenSet(model.encode, model.decode).fit(form, y).accepts(form) for form in (x, x.numpy())]
    assert (found[0] == found[1]).all() and found[0].mean() > 0.8


LATENTS, LABELS = POINTS[:, :3], np.repeat(["a", "b"], 30)
GAUSSIANS = FixedPointGaussians().fit(LATENTS, LABELS)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: GAUSSIANS.sample(["a"], math.nan), "temperature=nan: expected a finite number, at least 0"),
        (lambda: GAUSSIANS.sample(["a"], -1), "temperature=-1"),
        (lambda: GAUSSIANS.predict(LATENTS * 1e200), "too far from the Gaussians"),
        (lambda: GAUSSIANS.sample(["a"], math.inf), "temperature=inf"),
        (lambda: GAUSSIANS.sample(["a"], "hot"), "temperature='hot'"),
        (lambda: GAUSSIANS.sample([None]), "y: expected labels"),
        (lambda: FixedPointGaussians().fit(LATENTS * 1e-12, LABELS), "standardise"),
        (lambda: FixedPointGaussians(min_variance=1e-40).fit(LATENTS * 1e-12, LABELS), "standardise"),
        (lambda: FixedPointGaussians().fit(LATENTS * 1e200, LABELS), "standardise"),
        (lambda: FixedPointGaussians("strong").fit(LATENTS, LABELS), "strength='strong': expected"),
        (lambda: FixedPointGaussians(max_iters=2.5).fit(LATENTS, LABELS), "max_iters=2.5"),
        (lambda: FixedPointGaussians(epsilon=math.nan).fit(LATENTS, LABELS), "epsilon=nan"),
        (lambda: FixedPointGaussians(strength=math.inf).fit(LATENTS, LABELS), "strength=inf"),
    ],
)
def test_what_the_gaussians_cannot_take(call, message):
    refused(call, message, UserError)
    refused(call, message, ValueError)


# ---- metrics ---------------------------------------------------------------------------------------------------------

GREY, COLOUR = np.random.default_rng(0).random((40, 1, 8, 8)), np.random.default_rng(1).random((40, 3, 8, 8))


@pytest.mark.filterwarnings("ignore:images of", "ignore:grey images")
@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: score(GREY, COLOUR, "fid", "pixel-pca4", size=8),
            "images of 1 channel.s., fitted on 3; give one colour",
        ),
        (lambda: score(GREY, GREY[:, :, :7, :7], "fid", "pixel-pca4"), "give a size"),
        (lambda: score(GREY, GREY, "fdi", "pixel-pca4"), "unknown metric 'fdi'.*did you mean 'fid'"),
        (lambda: score(GREY, GREY, None, "pixel-pca4"), "metrics=None: expected a name, or several"),
        (lambda: score(GREY, GREY, 3, "pixel-pca4"), "metrics=3: expected a name, or several"),
        (lambda: score(GREY, GREY, [3], "pixel-pca4"), "unknown metric '3'"),
        (lambda: score([[1.0, 2.0], [3.0]], GREY, "fid"), "batch 0: a float, expected an array of images"),
        (lambda: score(["a", "b"], GREY, "fid"), "batch 0: a str, expected an array of images"),
        (lambda: score([], GREY, "fid"), "no image"),
        (
            lambda: score([*GREY[:, 0], GREY[0, 0, 1:]], GREY, "fid", "pixel-pca4"),
            r"shape \(8, 8\) is not one of",
        ),
        (lambda: bin_factors(np.arange(100), 5), r"factors must be a table .* shape \(100,\)"),
        (lambda: bin_factors(np.full((100, 2), np.nan), 5), r"factors\[0, 0\] is nan"),
        (lambda: bin_factors(np.full((100, 2), "a"), 5), "factors must be numbers"),
        (lambda: bin_factors(np.random.rand(100, 2), 2.5), "bins=2.5: expected a whole number, at least 1"),
        (lambda: bin_factors(np.random.rand(100, 2), 0), "bins=0"),
        (lambda: bin_factors(np.zeros((0, 2)), 3), "factors"),
    ],
)
def test_sets_and_names_that_the_metrics_cannot_take(call, message):
    refused(call, message)


@pytest.mark.filterwarnings("ignore:kernel distance")
def test_the_metrics_take_one_name_and_lists():
    wanted = score(GREY[:20], GREY[20:], ("fid",), "pixel-pca4")["fid"]
    assert score(GREY[:20], GREY[20:], "fid", "pixel-pca4")["fid"] == wanted
    for form in (list, lambda x: list(torch.from_numpy(x)), lambda x: list(x[:, 0]), lambda x: x.tolist()):
        assert score(form(GREY[:20]), form(GREY[20:]), "fid", "pixel-pca4")["fid"] == pytest.approx(wanted)
    rows = GREY.reshape(40, 64)[:, :4]
    of_rows = score(rows[:20], rows[20:], "fid")["fid"]
    assert score(list(rows[:20]), rows[20:].tolist(), "fid")["fid"] == of_rows
    batches = [GREY[:10], GREY[10:20]]  # a list of batches is what a generator of them is
    assert score(batches, GREY[20:], "fid", "pixel-pca4")["fid"] == wanted
    binned = bin_factors(torch.rand(100, 2), 4)
    assert binned.dtype == np.int64 and set(np.unique(binned)) == {1, 2, 3, 4}
