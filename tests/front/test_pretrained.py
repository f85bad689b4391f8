"""`<paper>.load(NAME)`: every model that ships, as a module, in one line; and files and folders of one's own."""

import importlib
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common.errors import UserError
from common.released import released

ROOT = Path(__file__).resolve().parents[2]
NAMES = {
    "lbae": "mnist_bae_w16",
    "glancenet": "mnist_parity",
    "latent_flow": "mnist_supervised_d16",
    "inv_flow": "mnist_inverse_w64",
    "nfpi": "mnist_small",
}
DIGITS = tuple("0123456789")


@pytest.fixture(scope="module")
def models():
    return {paper: importlib.import_module(paper).load(name) for paper, name in NAMES.items()}


def test_loading_one_paper_brings_in_no_other_and_importing_costs_nothing():
    code = f"""
import os, sys, {", ".join(NAMES)}
assert "torch" not in sys.modules
import torch
for paper in {list(NAMES)}:
    if os.fork() == 0:  # a paper a process
        sys.modules[paper].load
        loaded = {{name.partition(".")[0] for name in sys.modules if "." in name}} & set({list(NAMES)})
        assert loaded == {{paper}}, loaded
        os._exit(0)
    assert os.wait()[1] == 0
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


@pytest.mark.parametrize("paper", NAMES)
def test_a_file_and_a_name_give_the_same_weights(models, paper, tmp_path):
    path = released(paper, NAMES[paper]).path
    again = importlib.import_module(paper).load(path)
    assert again.state_dict().keys() == models[paper].state_dict().keys()
    for key, value in again.state_dict().items():
        assert torch.equal(value, models[paper].state_dict()[key])
    assert not again.training
    with pytest.raises(UserError, match="did you mean"):
        importlib.import_module(paper).load(NAMES[paper] + "_")
    with pytest.raises(UserError, match="there is no file"):
        importlib.import_module(paper).load(tmp_path / "x.safetensors")
    other = released("nfpi" if paper != "nfpi" else "lbae", NAMES["nfpi" if paper != "nfpi" else "lbae"]).path
    with pytest.raises(UserError, match=str(other)):
        importlib.import_module(paper).load(other)


@torch.no_grad()
def test_lbae(models):
    model = models["lbae"]
    codes = model.codes[:64]
    images = model.decode(codes)
    assert images.shape == (64, 1, 32, 32)
    assert (model.encode(images) == codes).float().mean() > 0.9
    assert torch.equal(model(images), model.decode(model.encode(images)))
    assert model.class_names == DIGITS
    # a code's picture is of its label: the nearest mean picture of a class is its own for most
    means = torch.stack([model.decode(model.codes[model.labels[:, 0] == k][:50]).mean(0) for k in range(10)])
    nearest = (images[:, None] - means).flatten(2).square().sum(2).argmin(1)
    assert (nearest == model.labels[:64, 0]).float().mean() > 0.6


@torch.no_grad()
def test_glancenet(models):
    model = models["glancenet"]
    images = model.decode(model.prototypes)
    assert images.shape == (2, 1, 28, 28)
    assert model.class_names == model.concept_names == ("4", "5")
    assert torch.equal(torch.sigmoid(model.encode(images)[:, :2]).round(), torch.eye(2))


@torch.no_grad()
def test_latent_flow(models):
    model = models["latent_flow"]
    assert model.concept_names == ("scale", "rotation", "hue")
    z = model.encode(torch.zeros(2, 3, 28, 28))
    path = model.move(z, torch.tensor([0.0, 1.0, 0.0]))
    assert path.shape == (9, 2, 16)
    assert torch.equal(path[0], z)
    assert torch.equal(model.move(z, torch.eye(3)[1], steps=3), path[:4])
    switched = torch.tensor([[0, 1.0, 0]] * 2 + [[1.0, 0, 0]] * 2)
    assert torch.equal(model.move(z, switched)[:3], path[:3])
    assert not torch.allclose(model.move(z, switched)[3], path[3])
    assert model.decode(path[-1]).shape == (2, 3, 28, 28)
    with pytest.raises(UserError, match="weights"):
        model.move(z, torch.ones(2))


@torch.no_grad()
def test_inv_flow(models):
    model = models["inv_flow"]
    torch.manual_seed(0)
    images = model.sample(4, temperature=0.7)
    assert images.shape == (4, 1, 28, 28)
    assert 0 <= images.min() <= images.max() <= 1
    assert torch.equal((images * 255).round(), (model.decode(model.encode(images)) * 255).round())
    noise = torch.rand(4, 1, 28, 28)
    assert (model.bits_per_dim(images) < model.bits_per_dim(noise) - 1).all()


@torch.no_grad()
def test_nfpi(models):
    model = models["nfpi"]
    y = torch.arange(10)
    images = model.sample(y, 1.0, torch.Generator().manual_seed(0))
    assert images.shape == (10, 1, 32, 32)
    posterior = model.posterior(images, draws=0)
    assert torch.allclose(posterior.sum(1), torch.ones(10, dtype=posterior.dtype))
    assert (posterior.argmax(1) == y).float().mean() > 0.8
    z = model.encode(images)
    assert (model.decode(z) - images).abs().max() <= 1 / 255 + 1e-6
    assert model.class_names == DIGITS
    # images of a data set have no noise; the digits that LBAE decodes are as clean as those
    digits, labels = models["lbae"].decode(models["lbae"].codes[:200]), models["lbae"].labels[:200, 0]
    posterior = model.posterior(digits)
    assert (posterior.argmax(1) == labels).float().mean() > 0.95
    assert torch.equal(posterior, model.posterior(digits)), "the draws are the same at every call"
    clean, noisy = (model.conditional.scores(x, 0.5).max(1).values for x in (digits, model.noisy(digits)))
    assert (noisy > clean).all(), "the flow knows noisy pixels"


def test_runs_of_ones_own(tmp_path):
    """What the scripts leave behind is loaded by its folder or file."""

    def run(*words):
        done = subprocess.run([sys.executable, *words], cwd=tmp_path, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr

    run(str(ROOT / "lbae/mnist.py"), "exp=own", "dataset=digits", "epochs_max=1", "train_images=64", "test_images=16",
        "batch_size=32", "width=2", "zsize=16", "device=cpu")  # fmt: skip
    import lbae

    own = lbae.load(tmp_path / "own")
    assert own.codes.shape == (64, 16)
    assert own.decode(own.codes[:2]).shape == (2, 1, 32, 32)


def test_the_lines_on_the_front_page_do_what_they_say(models):
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    names: dict = {}
    exec(text.split("```python\n")[1].split("```")[0], names)
    assert names["images"].shape == (5, 1, 32, 32)
    assert torch.equal(names["path"][0], names["a"])
    assert torch.equal(names["path"][-1], names["b"])
    assert not torch.equal(names["images"][0], names["images"][-1])
