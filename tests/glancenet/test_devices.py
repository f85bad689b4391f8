"""A training step's losses, an evaluation and a generation on a pretended GPU, where a tensor on another device is an
error, and so is reading a value on the host (FakeTensorMode has no values). Backward passes need a real device: whole
steps run on the CPU, with what would make a GPU wait counted.
"""

import numpy as np
import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from glancenet import leakage, losses, passes, visual
from glancenet.algorithms import Shape, make_model
from glancenet.compare import Config as Comparison
from glancenet.compare import command
from glancenet.data import TrainingBatches, load_data
from glancenet.main import train_step
from glancenet.mnist_objective import MODELS as PARITY
from glancenet.options import LOSS_TERMS, parse
from glancenet.state import Progress

CUDA = torch.device("cuda", 0)
BASE = ["--dset_name", "sprites", "--dset_dir", ".", "--encoder", "PadlessGaussianConv64", "--decoder", "ShallowLinear"]
BASE += ["--z_dim", "7", "--size_layer_disc", "8", "--batch_size", "6", "--sprites_sizes", "3", "2", "2", "4", "4"]
CASES = {
    "GlanceNet": ["--alg", "GlanceNet", "--conditional_prior", "true", "--cluster_dim", "3", "--masking_fact", "50"],
    "GlanceNet, BCE, capacity": [
        "--alg",
        "GlanceNet",
        "--latent_loss",
        "BCE",
        "--controlled_capacity_increase",
        "true",
    ],
    "CBNM": ["--alg", "CBNM"],
    "BetaVAE": ["--alg", "BetaVAE", "--w_kld", "3"],
    "AE": ["--alg", "AE", "--encoder", "PadlessConv64"],
    "CVAE": ["--alg", "CVAE"],
    "IFCVAE": ["--alg", "IFCVAE", "--encoder", "PadlessGaussianConv64", "PadlessConv64"],
} | {name: ["--alg", "GlanceNet", "--loss_terms", name, "--w_tc", "3"] for name in LOSS_TERMS}


class HostReads(TorchDispatchMode):
    """Counts what makes the host wait for a GPU: values read, and copies between devices that block."""

    def __init__(self):
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = function._schema.name
        if name in ("aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select", "aten::equal"):
            self.found.append(name)
        if name == "aten::_to_copy" and not kwargs.get("non_blocking"):
            here = args[0].device.type
            if kwargs.get("device") is not None and torch.device(kwargs["device"]).type != here:
                self.found.append(f"copy {here} -> {kwargs['device']}")
        return function(*args, **kwargs)


def batch(n: int = 6, device: torch.device = CUDA) -> losses.Batch:
    on = {"device": device}
    codes = torch.zeros(n, 2, dtype=torch.long, **on)
    return losses.Batch(torch.rand(n, 1, 64, 64, **on), torch.rand(n, 7, **on), codes[:, 0], torch.ones(n, **on), codes)


@pytest.fixture
def pretended():
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        yield mode


SHAPE, CPU = Shape(1, 7, 2, (3, 2), 100), torch.device("cpu")


def on_gpu(o, shape: Shape = SHAPE):
    with CUDA:  # a fake module cannot be moved
        return make_model(o, shape)


def losses_on_gpu(model, images: losses.Batch) -> list[torch.Tensor]:
    """Every loss of a training step."""
    terms, z = model.terms(images, 3)
    assert all(part.device == CUDA for part in (*terms, z))
    found = [terms.total, *(loss for _, loss in model.adversary_losses(z.detach(), images, images))]
    labels = model.label_loss(images)
    return found if labels is None else [*found, labels]


def whole_step(model, images: losses.Batch, **more) -> list[str]:
    """What a training step on the CPU reads of values."""
    progress = Progress(torch.zeros(()))
    names = ["G", *model.adversaries()]
    optimizers = {name: torch.optim.SGD(model.parameters(), lr=0.0) for name in names}
    with HostReads() as reads:
        terms, z = train_step(model, optimizers, images, images, **more)
        progress.add(terms.total, z, images.labels)
    return reads.found


@pytest.mark.parametrize("case", CASES)
def test_the_losses_stay_on_the_device_and_read_nothing(pretended, case):
    model = on_gpu(parse([*BASE, *CASES[case]]))
    with HostReads() as reads:
        assert all(loss.device == CUDA for loss in losses_on_gpu(model, batch()))
    assert not reads.found


@pytest.mark.parametrize("case", CASES)
def test_a_whole_step_reads_no_value(case):
    model = make_model(parse([*BASE, *CASES[case]]), SHAPE)
    assert whole_step(model, batch(device=CPU), step=3) == []
    if model.predicts_classes:
        assert whole_step(model, batch(device=CPU), classes_only=True) == []


@pytest.mark.parametrize("case", CASES)
def test_evaluation_and_generation_stay_on_the_device(pretended, case):
    model = on_gpu(parse([*BASE, *CASES[case]]))
    model.eval()
    with torch.no_grad():
        mu, logvar = model.encode(batch())
        z = model.sample(mu, logvar)
        if model.predicts_classes:
            for samples in (0, 1, 5):
                logits, shares = passes.class_scores(model, mu, logvar, z, samples)
                assert logits.device == shares.device == CUDA
        if model.decoder is not None:
            values = visual.traversal_values(-3, 3, 0.5)
            rows = visual.traverse(model, batch(), 1, values, [0, 4], codes=case in ("CVAE", "IFCVAE"))
            assert rows.device == CUDA and rows.shape[1] == 12
            assert losses.reconstruction_errors(model.decode(z, batch()), batch().x).shape == (6,)
        terms, _ = model.terms(batch(), 0)
    assert terms.total.device == CUDA


@pytest.mark.parametrize("key", leakage.MODELS)
def test_leakage_models_train_on_the_device(pretended, tmp_path, key):
    words = leakage.command(key, 1, leakage.Config(dset_dir=str(tmp_path), device="cpu"), [])
    o = parse(words)
    model = on_gpu(o, Shape(1, 5, 3, (3,), 100))
    losses_on_gpu(model, batch()._replace(labels=torch.rand(6, 5, device=CUDA)))


@pytest.mark.parametrize("model", ["GlanceNet", "CBNM"])
@pytest.mark.parametrize("setting", ["published", "fair_7", "mpi3d"])
def test_compared_models_train_on_the_device(pretended, model, setting):
    o = Comparison(dset_dir=".", device="cpu")
    net = on_gpu(parse(command(setting, model, 10, 1, o, [])))
    losses_on_gpu(net, batch())


@pytest.mark.parametrize("key", PARITY)
def test_parity_models_train_on_the_device(pretended, key):
    with CUDA:
        model = PARITY[key]()
    x, digits = torch.rand(6, 784, device=CUDA), torch.full((6,), 4, device=CUDA)
    with HostReads() as reads:
        terms = model.terms(x, digits)
    assert not reads.found and all(part.device == CUDA for part in terms)


def test_held_images_give_batches_without_copies(tmp_path):
    """With images and labels on the device a batch is made there; only the order of the epoch is sent, once."""
    o = parse([*BASE, "--alg", "GlanceNet", "--loss_terms", "FACTORVAE"])
    data = load_data(o)
    plain = [pair[0] for pair in TrainingBatches(data.train, o, torch.device("cpu")).epoch(1, 2)]
    assert data.train.hold(torch.device("cpu"))
    assert not data.train.images.hold(torch.device("cpu"), 0) or data.train.images.held is not None
    held = TrainingBatches(data.train, o, torch.device("cpu"), second=True)
    for one, (other, second) in zip(plain, held.epoch(1, 2), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True)) and not torch.equal(other.x, second.x)
    order = data.train.order(o.seed, 1)
    fetched = []
    original = data.train.images.fetch
    data.train.images.fetch = lambda rows: fetched.append(type(rows)) or original(rows)
    next(iter(held.epoch(1)))
    assert fetched == [torch.Tensor] * 2 and isinstance(order, torch.Tensor)
    assert isinstance(data.train.rows.numpy(), np.ndarray), "the labels that tables need stay on the host"


def test_full_float32_unless_asked(command, tmp_path, monkeypatch):
    from glancenet import main as training

    for words, expected in (([], False), (["--tf32", "true"], True)):
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = not expected
        training.set_up(parse(command(tmp_path, "--alg", "CBNM", *words)), training.Distributed.start("cpu"))
        assert torch.backends.cudnn.allow_tf32 is torch.backends.cuda.matmul.allow_tf32 is expected
    torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = True, False
