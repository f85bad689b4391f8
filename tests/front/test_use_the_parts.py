"""docs/use_the_parts.md: every block is run and does what it says; wrong input to the parts is one line."""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.exceptions import ConvergenceWarning, NotFittedError
from sklearn.utils.estimator_checks import parametrize_with_checks

import glancenet
import inv_flow
import lbae
import nfpi
from common.errors import UserError
from common.metrics import score
from glancenet import OpenSet
from inv_flow import InverseConv2d, MaskedConv2d
from latent_flow import FlowField
from lbae import HyperplaneSampler
from nfpi import FixedPointGaussians

ROOT = Path(__file__).resolve().parents[2]
PAGE = (ROOT / "docs/use_the_parts.md").read_text(encoding="utf-8")
SECTIONS = {part.split("\n")[0]: part for part in PAGE.split("\n## ")[1:]}
WITH_CODE = {title for title, text in SECTIONS.items() if "```python" in text}
needs_onnx = pytest.mark.skipif(
    not all(importlib.util.find_spec(name) for name in ("onnxruntime", "onnxscript")),
    reason="onnxruntime, onnxscript: pip install -e .[parts]",
)


def run(title: str) -> dict:
    """The names that a section's block leaves behind."""
    (block,) = re.findall(r"```python\n(.*?)```", SECTIONS[title], re.S)
    names: dict = {}
    torch.manual_seed(0)
    exec(compile(block, f"docs/use_the_parts.md, {title}", "exec"), names)
    return names


def test_every_block_of_the_page_has_its_test_here():
    text = Path(__file__).read_text(encoding="utf-8")
    assert {title for title in SECTIONS if f'run("{title}")' in text} == WITH_CODE
    links = set(re.findall(r"\]\(#(.*?)\)", PAGE))
    assert links <= {re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in SECTIONS}


# ---- the blocks ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_trained_models():
    n = run("A trained model in one line")
    assert n["images"].shape == (8, 1, 32, 32) and n["codes"].shape == (8, 200)
    apart = (n["images"][1:] - n["images"][:-1]).abs().mean()  # two images that differ
    assert (n["again"] - n["images"]).abs().mean() < 0.4 * apart
    found = nfpi.load("mnist_small").posterior(n["digits"], draws=0).argmax(1)
    assert (found == torch.arange(10)).float().mean() > 0.5  # chance: 0.1
    assert n["concepts"] == ("4", "5") and n["flows"] == ("scale", "rotation", "hue")
    assert n["bits"].shape == (2,) and (n["bits"] > 5).all()  # noise is no digit
    for paper, name in (("lbae", "mnist_bae_w16"), ("glancenet", "mnist_parity"), ("nfpi", "mnist_small"),
                        ("latent_flow", "mnist_supervised_d16"), ("inv_flow", "mnist_inverse_w64")):  # fmt: skip
        model = importlib.import_module(paper).load(name)
        assert isinstance(model.class_names, tuple) and isinstance(model.concept_names, tuple)
        x = torch.rand(2, *model.image_shape)
        assert model.decode(model.encode(x)).shape == x.shape


def jacobian_log_det(function, x):
    """log|det| of a function of one vector, by autograd."""
    return torch.linalg.slogdet(torch.autograd.functional.jacobian(function, x)).logabsdet


def test_zuko():
    pytest.importorskip("zuko", reason="zuko is missing: pip install -e .[parts]")
    n = run("An inverse convolution in a flow of zuko")
    n["loss"].backward()
    (weight,) = n["layer"].parameters()
    assert weight.grad.abs().sum() > 0
    with torch.no_grad():
        weight.add_(0.2 * torch.randn_like(weight))
    x, transform = torch.rand(4, 64), n["flow"]().transform
    z, log_det = transform.call_and_ladj(x)
    torch.testing.assert_close(transform.inv(z), x, atol=1e-4, rtol=0)
    torch.testing.assert_close(jacobian_log_det(lambda v: transform(v[None])[0], x[0]), log_det[0], atol=1e-3, rtol=0)
    plain = n["zuko"].flows.Flow(list(n["spline"].transform.transforms), n["spline"].base)
    assert not torch.allclose(plain().transform(x), z)  # the layer takes part
    assert n["flow"]().sample((3,)).shape == (3, 64)


def test_normflows():
    pytest.importorskip("normflows", reason="normflows is missing: pip install -e .[parts]")
    n = run("An inverse convolution in a flow of normflows")
    flow, x = n["flow"], torch.rand(4, 4, 4, 4)
    for layer in n["layers"][1::2]:
        assert layer.weight.grad.abs().sum() > 0
        with torch.no_grad():
            layer.weight.add_(0.2 * torch.randn_like(layer.weight))
    z, log_det = flow.inverse_and_log_det(x)
    torch.testing.assert_close(flow.forward(z), x, atol=1e-4, rtol=0)
    found = jacobian_log_det(lambda v: flow.inverse(v.view(1, 4, 4, 4)).flatten(), x[0].flatten())
    torch.testing.assert_close(found, log_det[0], atol=1e-3, rtol=0)
    torch.testing.assert_close(flow.inverse_and_log_det(flow(z))[1], log_det, atol=1e-3, rtol=0)
    assert n["samples"].shape == (3, 4, 4, 4)
    turned = n["nf"].flows.Reverse(layer)
    torch.testing.assert_close(turned(turned.inverse(x)[0])[0], x)


def test_hyperplane_sampler():
    n = run("New codes for any binary codes")
    codes, new = n["codes"], n["new"]
    assert new.dtype == np.uint8 and new.shape == (2000, 64) and set(np.unique(new)) == {0, 1}
    assert np.abs(new.mean(0) - codes.mean(0)).mean() < 0.04
    wanted, found = np.corrcoef(codes.T), np.corrcoef(new.T)
    off = ~np.eye(64, dtype=bool)
    assert np.abs(wanted - found)[off].mean() < 0.1 * np.abs(wanted)[off].mean() + 0.02
    assert (n["path"][0] == codes[0]).all() and (n["path"][-1] == codes[1]).all()
    flips = (n["path"][1:] != n["path"][:-1]).sum(1)
    assert flips.max() < (codes[0] != codes[1]).sum()  # in several steps
    near = np.abs(codes[n["labels"] == "smiling"].mean(0) - n["smiling"]).mean()
    assert near < np.abs(codes[n["labels"] == "smiling"].mean(0) - codes[:5]).mean()


def test_fixed_point_gaussians():
    n = run("One Gaussian a class, pushed apart")
    assert n["accuracy"] > 0.95
    np.testing.assert_allclose(n["posterior"].sum(1), 1)
    assert (n["model"].predict(n["new"]) == "class_0").mean() > 0.95
    further = FixedPointGaussians(strength=1000).fit(n["z"], n["names"])
    distance = lambda m: np.linalg.norm(m.means_[0] - m.means_[1])  # noqa: E731
    assert distance(further) > 2 * distance(n["model"]) and further.converged_


def test_flow_field():
    n = run("Flows in the latents of any autoencoder")
    images = torch.sigmoid(n["decoder"](n["path"]))
    moved = (images[-1] - n["frames"][-1]).square().sum(1).mean()
    unmoved = (n["frames"][0] - n["frames"][-1]).square().sum(1).mean()
    assert moved < 0.2 * unmoved
    other = torch.sigmoid(n["decoder"](n["flows"].rollout(n["path"][0], 1 - n["k"], 4)))  # the wrong way
    assert (other[-1] - n["frames"][-1]).square().sum(1).mean() > 0.5 * unmoved


def test_open_set():
    n = run("Rejecting what the latents do not describe")
    assert 0.85 < n["kept"].mean() < 0.98
    assert n["unknown"].mean() < 0.35
    assert (n["unknown"] == n["checks"].both).all()


@pytest.mark.filterwarnings("ignore:kernel distance", "ignore:prd:")
def test_metrics_of_images(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    n = run("Metrics of images and of features")
    assert n["of_folder"]["n_evaluated"] == 300
    images, features = n["images"], n["features"]
    other = score(1 - images[:300], images[300:], ("fid",), "pixel-pca16")
    assert n["of_folder"]["fid"] < 0.1 * other["fid"]
    found = n["of_features"]
    assert (found["ipr_precision"], found["ipr_recall"]) == (n["precision"], n["recall"])
    shuffled = score(features[:800], torch.from_numpy(features[800:1600] + 0.5), ("fid", "prd", "ipr"))
    assert shuffled["fid"] > 2 * found["fid"] and shuffled["ipr_precision"] < found["ipr_precision"]


def test_metrics_of_disentanglement():
    n = run("Metrics of disentanglement")
    assert n["good"] > 0.9 > 0.3 > n["bad"]
    assert n["parts"]["disentanglement"] > 0.9 and n["alignment"] > 0.9


@needs_onnx
def test_onnx(tmp_path, monkeypatch):
    (command,) = re.findall(r"```bash\npython (.*?) +#", SECTIONS["ONNX"])
    done = subprocess.run([sys.executable, ROOT / command.split()[0], *command.split()[1:]], cwd=tmp_path,
                          capture_output=True, text=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("differs from the model by") == 2
    monkeypatch.chdir(tmp_path)
    n = run("ONNX")
    with torch.no_grad():
        wanted = lbae.load("mnist_bae_w16").decode(torch.from_numpy(n["codes"]))
    np.testing.assert_allclose(n["images"], wanted, atol=1e-5)


# ---- export ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def export():
    spec = importlib.util.spec_from_file_location("export_of_models", ROOT / "scripts/export.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def small_flow(folder: Path) -> Path:
    """An untrained Inverse-Flow of images 1 x 8 x 8 as a file."""
    from common.checkpoint import save_weights
    from inv_flow.train.config import Config
    from inv_flow.train.launch import make_model

    options = {"image_size": (1, 8, 8), "num_blocks": 2, "block_size": 1, "coupling_width": 4, "order": "alternate"}
    config = Config.build({**options, "inv_conv": 1, "conv1x1": True})
    torch.manual_seed(0)
    model = make_model(config)
    model.encode(torch.randint(0, 256, (16, 1, 8, 8)).float())  # sets the ActNorms
    with torch.no_grad():
        for layer in model.modules():
            if isinstance(layer, InverseConv2d):
                layer.weight.add_(0.2 * torch.randn_like(layer.weight))
    save_weights(folder / "flow.safetensors", model.state_dict(), json.loads(config.model_dump_json()))
    return folder / "flow.safetensors"


def small_conditional(folder: Path) -> Path:
    """An untrained NFPI flow of images 1 x 4 x 4 as a file."""
    from nfpi.conditional import ConditionalFlow
    from nfpi.gaussians import ClassGaussians
    from nfpi.model import FlowConfig, MultiScaleFlow

    torch.manual_seed(0)
    config = FlowConfig(1, 8, 8, (1, 1), (1, 1), (4, 4), level_method="spcb")
    flow = MultiScaleFlow(config)
    flow.initialise(torch.rand(16, 1, 8, 8) * 2 - 1)
    mean = torch.randn(3, config.latent_dim)
    ConditionalFlow(flow, ClassGaussians(mean, torch.ones_like(mean))).save(folder / "flow.safetensors")
    return folder / "flow.safetensors"


@needs_onnx
@pytest.mark.parametrize("paper", ["inv_flow", "nfpi"])
def test_flows_are_exported_with_a_free_batch_size(paper, export, tmp_path):
    import onnxruntime

    path = (small_flow if paper == "inv_flow" else small_conditional)(tmp_path)
    assert export.main([paper, str(path), "--onnx", str(tmp_path / "out")]) is None
    model = importlib.import_module(paper).load(path)
    encoder, decoder = (onnxruntime.InferenceSession(tmp_path / f"out/{part}.onnx") for part in ("encoder", "decoder"))
    x = torch.randint(0, 256, (7, *model.image_shape)).float() / 255  # a batch size that was never traced
    latents = encoder.run(None, {"images": x.numpy()})
    with torch.no_grad():
        wanted = model.double().encode(x.double())
    for ours, theirs in zip(latents, wanted if paper == "inv_flow" else [wanted], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-5 * max(1, float(theirs.abs().max())))
    names = [one.name for one in decoder.get_inputs()]
    (again,) = decoder.run(None, dict(zip(names, latents, strict=True)))
    if paper == "inv_flow":  # all latents are given, so the image comes back
        np.testing.assert_allclose(again, x, atol=1e-3)
    assert again.shape == x.shape and 0 <= again.min() <= again.max() <= 1


@needs_onnx
def test_a_graph_that_differs_is_not_written(export, tmp_path, monkeypatch):
    monkeypatch.setattr(export, "functions", lambda paper, model: (lambda x: model.encode(x) + 1e-3, None))
    with pytest.raises(UserError, match="encoder differs from the model by"):
        export.export("glancenet", "mnist_parity", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_cannot_be_exported_is_said(export, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="did you mean"):
        export.export("lbae", "mnist_bae_w61", tmp_path)
    with pytest.raises(SystemExit) as left:
        export.main(["vae", "x", "--onnx", str(tmp_path)])
    assert left.value.code == 2
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(UserError, match=r"pip install -e .\[parts\]"):
        export.export("lbae", "mnist_bae_w16", tmp_path)


# ---- the parts -------------------------------------------------------------------------------------------------------


@parametrize_with_checks([FixedPointGaussians(), FixedPointGaussians(variances=True, strength=1)])
def test_estimator_interface(estimator, check):
    check(estimator)


def random_codes(seed=0, n=400, d=12):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((n, 3)) @ rng.standard_normal((3, d)) > 0.3


@pytest.mark.parametrize("form", ["bool", "zero-one", "signs", "float", "tensor"])
def test_codes_come_back_as_they_were_given(form):
    bits = random_codes()
    codes = {"bool": bits, "zero-one": bits.astype(np.uint8), "signs": bits * 2 - 1, "float": bits * 2.0 - 1,
             "tensor": torch.from_numpy(bits * 2 - 1)}[form]  # fmt: skip
    sampler = HyperplaneSampler().fit(codes, bits[:, 0])
    for out in (sampler.sample(50, 0), sampler.interpolate(codes[:3], codes[3:6], 4),
                sampler.set_attribute(codes[:3], True)):  # fmt: skip
        assert type(out) is type(codes) and out.dtype == codes.dtype
        assert set(np.unique(np.asarray(out)).tolist()) <= set(np.unique(np.asarray(codes)).tolist())
    assert sampler.interpolate(codes[:3], codes[3:6], 4).shape == (3, 6, 12)
    signs = np.asarray(HyperplaneSampler().fit(bits * 2 - 1, bits[:, 0]).sample(50, 0))
    assert ((np.asarray(sampler.sample(50, 0)) > 0) == (signs > 0)).all()  # one distribution, whatever the form
    assert np.asarray(sampler.attribute_mean(True)) == pytest.approx(bits[bits[:, 0]].mean(0) * 2 - 1)
    assert np.asarray(sampler.attribute_mean(True, "contrast")) == pytest.approx(
        2 * (bits[bits[:, 0]].mean(0) - bits.mean(0))
    )


def test_the_sampler_takes_every_source_of_random_numbers():
    sampler = HyperplaneSampler().fit(random_codes())
    assert (sampler.sample(9, 3) == sampler.sample(9, np.random.default_rng(3))).all()
    assert (
        sampler.sample(9, torch.Generator().manual_seed(1)) == sampler.sample(9, torch.Generator().manual_seed(1))
    ).all()
    assert (sampler.sample(9) != sampler.sample(9)).any()


def test_attributes_of_a_table_and_of_classes():
    bits = random_codes()
    table = np.stack([bits[:, 3], ~bits[:, 4]], 1).astype(int)
    sampler = HyperplaneSampler().fit(bits, table)
    assert sampler.set_attribute(bits[:20], 0)[:, 3].all() and not sampler.set_attribute(bits[:20], 1)[:, 4].any()
    by_class = HyperplaneSampler().fit(bits, np.where(bits[:, 3], 7, 5))
    assert (by_class.set_attribute(bits[:20], 7) == sampler.set_attribute(bits[:20], 0)).all()


CODES = random_codes()
FITTED = HyperplaneSampler().fit(CODES, CODES[:, 0])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: HyperplaneSampler("median"), "split=median"),
        (lambda: HyperplaneSampler().sample(3), "not fitted"),
        (lambda: HyperplaneSampler().interpolate(CODES, CODES), "not fitted"),
        (lambda: HyperplaneSampler().fit(CODES[0]), r"expected \(N, D\)"),
        (lambda: HyperplaneSampler().fit(CODES[:0]), r"expected \(N, D\)"),
        (lambda: HyperplaneSampler().fit(np.random.rand(9, 4)), "not bits"),
        (lambda: HyperplaneSampler().fit(np.full((9, 4), np.nan)), "not bits"),
        (lambda: HyperplaneSampler().fit(np.array([["a", "b"]])), "array of numbers"),
        (lambda: HyperplaneSampler().fit(CODES, np.zeros(3)), "labels of shape"),
        (lambda: HyperplaneSampler().fit(CODES, CODES * 2), "0 and 1 only"),
        (lambda: FITTED.sample(0), "n=0: expected a whole number, at least 1"),
        (lambda: FITTED.interpolate(CODES[:2], CODES[:3]), "differ in shape"),
        (lambda: FITTED.interpolate(CODES[:2, :5], CODES[:2, :5]), "fitted width"),
        (lambda: FITTED.interpolate(CODES[:2] * 2.0, CODES[:2]), "expected bits 0 and 1"),
        (lambda: FITTED.interpolate(CODES[:2], CODES[:2], 0), "steps=0: expected a whole number, at least 1"),
        (lambda: FITTED.set_attribute(CODES, "blue"), "known: False, True"),
        (lambda: HyperplaneSampler().fit(CODES).set_attribute(CODES, 1), "need labels"),
    ],
)
def test_wrong_codes(call, message):
    with pytest.raises(UserError, match=message):
        call()


X = np.random.default_rng(0).standard_normal((40, 3))
Y = np.repeat(["a", "b"], 20)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: FixedPointGaussians().fit(X, ["a"] * 40), "only one class"),
        (lambda: FixedPointGaussians().fit(X[:21], Y[:21]), "class b has 1 sample"),
        (lambda: FixedPointGaussians().fit(X * np.nan, Y), "NaN"),
        (lambda: FixedPointGaussians(strength=-1).fit(X, Y), "strength=-1"),
        (lambda: FixedPointGaussians(damping=1).fit(X, Y), "damping=1"),
        (lambda: FixedPointGaussians(start_variance=0).fit(X, Y), "start_variance=0"),
        (lambda: FixedPointGaussians().fit(X, Y).predict(X[:, :2]), "2 features"),
        (lambda: FixedPointGaussians().fit(X, Y).sample(["c"]), "found"),
    ],
)
def test_wrong_latents(call, message):
    with pytest.raises(ValueError, match=message):
        call()


def test_an_estimator_that_is_not_fitted_or_does_not_converge_says_so():
    with pytest.raises(NotFittedError):
        FixedPointGaussians().sample(["a"])
    with pytest.warns(ConvergenceWarning, match="lower strength"):
        FixedPointGaussians(strength=1e6, max_iters=3).fit(X, Y)


def test_the_default_strength_converges_on_standardised_data():
    from sklearn.datasets import load_breast_cancer, load_digits, load_iris, load_wine

    for load in (load_iris, load_wine, load_breast_cancer, load_digits):
        z, y = load(return_X_y=True)
        z = (z - z.mean(0)) / np.where(z.std(0) > 0, z.std(0), 1)
        model = FixedPointGaussians().fit(z, y)
        assert model.converged_ and model.n_iter_ < 50 and model.score(z, y) > 0.8, load.__name__
        # without push the classes stay at their means, and with it they are further apart
        still = FixedPointGaussians(0).fit(z, y)
        np.testing.assert_allclose(still.means_, [z[y == k].mean(0) for k in np.unique(y)], atol=1e-9)
        assert np.square(model.means_).sum() > np.square(still.means_).sum()


def test_samples_of_a_class_have_its_moments():
    model = FixedPointGaussians().fit(X, Y)
    z = model.sample(np.repeat("b", 20_000), random_state=0)
    np.testing.assert_allclose(z.mean(0), model.means_[1], atol=0.05)
    np.testing.assert_allclose(z.var(0), model.variances_[1], rtol=0.1)
    cold = model.sample(["b", "a"], temperature=0, random_state=0)
    np.testing.assert_allclose(cold, model.means_[::-1])


def test_the_flow_field_has_the_loss_of_the_training():
    from latent_flow.model import Config, LatentFlow, training_step

    torch.manual_seed(0)
    model = LatentFlow(Config(image_size=8, latent_size=16, channels=1, flows=3, steps=4))
    frames, k = torch.rand(5, 6, 1, 8, 8), torch.tensor([0, 1, 2, 0, 1, 2])
    torch.manual_seed(1)
    wanted = training_step(model, frames, k)
    torch.manual_seed(1)
    found = model.support_sets.loss(model.vae.encode, model.vae.decoder.logits, frames, k)
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-6, atol=1e-6)


def test_flow_numbers_and_weights_agree():
    torch.manual_seed(0)
    for rotation in (None, "soft", "divfree"):
        field, z = FlowField(3, 6, rotation), torch.randn(5, 6)
        path = field.rollout(z, 1, T=4)
        assert path.shape == (5, 5, 6) and torch.equal(path[0], z) and not torch.allclose(path[1], z)
        torch.testing.assert_close(field.rollout(z, torch.full((5,), 1), T=4), path)
        torch.testing.assert_close(field.rollout(z, torch.tensor([0.0, 1, 0]), T=4), path)
        switched = field.rollout(z, torch.tensor([[0.0, 1, 0]] * 2 + [[0.0, 0, 1]] * 2), T=4)
        torch.testing.assert_close(switched[:3], path[:3])
        assert not torch.allclose(switched[3], path[3])
        assert field.rotation == rotation


FIELD, Z, FRAMES = FlowField(2, 4), torch.zeros(3, 4), torch.rand(5, 3, 4)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: FlowField(2, 5), "even"),
        (lambda: FlowField(0, 4), "at least 1 flow"),
        (lambda: FIELD.rollout(Z, 2), "flows are 0 to 1"),
        (lambda: FIELD.rollout(Z, -1), "flows are 0 to 1"),
        (lambda: FIELD.rollout(Z, torch.zeros(2, dtype=torch.long)), "one for each sample"),
        (lambda: FIELD.rollout(Z, torch.ones(3)), "weights"),
        (lambda: FIELD.rollout(Z[:, :2], 0), r"\(B, 4\)"),
        (lambda: FIELD.rollout(Z.byte(), 0), "floats"),
        (lambda: FIELD.rollout(Z, 0, 0), "T=0"),
        (lambda: FIELD.loss(lambda x: x, lambda z: z, FRAMES * 255, 0), r"\[0, 1\]"),
        (lambda: FIELD.loss(lambda x: x, lambda z: z, FRAMES * torch.nan, 0), "NaN"),
        (lambda: FIELD.loss(lambda x: x, lambda z: z, FRAMES.byte(), 0), "floats"),
        (lambda: FIELD.loss(lambda x: x[:2], lambda z: z, FRAMES, 0), "2 latents for 3"),
        (lambda: FIELD.loss(lambda x: x, lambda z: z[:, :3], FRAMES, 0), "decode gave"),
    ],
)
def test_wrong_flows(call, message):
    with pytest.raises(UserError, match=message):
        call()


POINTS = np.random.default_rng(0).normal(size=(60, 4))


@pytest.mark.parametrize("labels", [np.repeat([5, 6], 30), np.repeat(["cat", "dog"], 30), torch.tensor([8, 9] * 30)])
def test_the_rejection_takes_any_labels(labels):
    names = np.asarray(labels)
    x = POINTS + 8.0 * (names == names[-1])[:, None]
    rejection = OpenSet(lambda x: x, lambda z: 0.9 * z, 0.9).fit(x, labels)
    assert rejection.classes.tolist() == np.unique(names).tolist()
    assert (rejection.thresholds.distance > 0).all() and rejection.thresholds.reconstruction > 0
    assert 0.7 < rejection.accepts(x).mean() < 0.95
    assert not rejection.accepts(x + 4).any() and not rejection.accepts(x - 100).any()
    by_distance = OpenSet(lambda x: x, quantile=0.9).fit(torch.from_numpy(x), labels)
    assert by_distance.accepts(x).mean() == pytest.approx(0.9, abs=0.05)


def test_the_rejection_of_the_model_that_ships():
    """Prototypes of the prior, a network as encoder, an error of one's own."""
    model = glancenet.load("mnist_parity")
    torch.manual_seed(0)
    y = torch.arange(400) % 2
    z = model.prototypes[y] + torch.randn(400, model.prototypes.shape[1])
    x = model.decode(z)
    rejection = OpenSet(
        lambda x: model.encode(x)[:, :2], None, errors=lambda x, r: np.abs(x - r).reshape(len(x), -1).max(1)
    ).fit(x, np.array(model.class_names)[y], prototypes=model.prototypes[:, :2])
    np.testing.assert_allclose(rejection.thresholds.means, model.prototypes[:, :2])
    assert rejection.accepts(x).mean() > 0.9
    whole = OpenSet(model.encode, model.decode).fit(x, y)
    assert whole.accepts(x).mean() > 0.85 and whole.accepts(1 - x).mean() < 0.05


IDENTITY = OpenSet(lambda x: x)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: OpenSet(lambda x: x, quantile=1), "quantile=1"),
        (lambda: IDENTITY.accepts(POINTS), "not fitted"),
        (lambda: IDENTITY.fit(POINTS, np.zeros(3)), "one label an input"),
        (lambda: IDENTITY.fit(POINTS, [0] * 58 + [1] * 2), "class 1 has 2"),
        (lambda: IDENTITY.fit(POINTS[:0], []), "there are none"),
        (lambda: IDENTITY.fit(POINTS.tolist(), [0] * 60), "an array or a tensor"),
        (lambda: IDENTITY.fit(POINTS, [0] * 60).accepts(POINTS[:0]), "at least one"),
        (lambda: IDENTITY.fit(POINTS * np.nan, [0] * 60), "NaN"),
        (lambda: IDENTITY.fit(np.zeros((60, 4)), [0] * 60), "none could be accepted"),
        (lambda: OpenSet(lambda x: x, lambda z: z).fit(POINTS, [0] * 60), "leave decode out"),
        (lambda: OpenSet(lambda x: x[0]).fit(POINTS, [0] * 60), r"latents \(b, D\)"),
        (lambda: OpenSet(lambda x: x, lambda z: z[:, :2]).fit(POINTS, [0] * 60), "decode gave"),
        (lambda: OpenSet(lambda x: "no").fit(POINTS, [0] * 60), "encode's latents must be"),
        (lambda: IDENTITY.fit(POINTS, [0] * 60, prototypes=np.zeros((2, 4))), "prototypes of shape"),
        (lambda: OpenSet(lambda x: x).fit(POINTS, [0] * 60).accepts(POINTS[:, :2]), "latents of 2"),
    ],
)
def test_wrong_inputs_of_the_rejection(call, message):
    with pytest.raises(UserError, match=message):
        call()


@pytest.mark.parametrize("layer", [InverseConv2d, MaskedConv2d])
def test_both_directions_of_a_convolution(layer):
    torch.manual_seed(0)
    conv, x = layer(4, (2, 3), "BR", init_std=0.2), torch.randn(2, 4, 5, 6)
    y, log_det = conv(x)
    back, back_log_det = conv.inverse(y)
    torch.testing.assert_close(back, x, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(conv.reverse(y), back)
    assert log_det.tolist() == back_log_det.tolist() == [0, 0] and not torch.allclose(y, x)
    with pytest.raises(ValueError, match="channels"):
        conv(x[:, :3])
    with pytest.raises(ValueError, match="floating"):
        conv(x.long())
    with pytest.raises(ValueError, match="axes"):
        conv(x[0])
    with pytest.raises(ValueError, match="unknown order"):
        layer(4, 3, "XX")


def test_what_is_no_set_of_features_is_refused():
    rng = np.random.default_rng(0)
    with pytest.raises(UserError, match="one extractor"):
        score(rng.random((20, 4)), rng.random((20, 5)), ("fid",))
    with pytest.raises(UserError, match="NaN"):
        score(rng.random((20, 4)) * np.nan, rng.random((20, 4)), ("fid",))


def test_an_unknown_name_of_a_package_is_an_attribute_error():
    for package in (lbae, nfpi, glancenet, inv_flow):
        assert "load" in dir(package)
        with pytest.raises(AttributeError, match="no attribute 'nothing'"):
            package.nothing  # noqa: B018
