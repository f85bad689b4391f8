"""What `--cuda-graph` needs of the five training steps: nothing in them is read, made or sent by the host.

The steps run on the device "meta", whose tensors have no values: reading one raises. A dispatch mode refuses, besides,
what would wait for a GPU, and every tensor that does not lie on the device. What it cannot show: libraries that refuse
to be captured.
"""

import contextlib
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from common.launch import Distributed
from glancenet import main as glancenet
from glancenet.algorithms import Shape, make_model
from glancenet.losses import Batch
from glancenet.options import LOSS_TERMS, parse
from inv_flow.model import create_model
from inv_flow.train.config import Config as FlowConfig
from inv_flow.train.experiment import Experiment
from latent_flow import train as latent_flow
from latent_flow.model import Config, LatentFlow
from lbae import train as lbae
from lbae.model import build_model
from lbae.options import Params
from nfpi import train as nfpi
from nfpi.conditional import ConditionalFlow
from nfpi.gaussians import ClassGaussians
from nfpi.matrix_exp import coarse
from nfpi.model import FlowConfig as Architecture
from nfpi.model import MultiScaleFlow

META = torch.device("meta")
DIST = Distributed(META)
WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "_linalg_check_errors", "unique", "item")


class Captured(TorchDispatchMode):
    """Refuses what a CUDA graph cannot hold; counts what it holds."""

    calls = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.calls += 1
        name = function._schema.name.removeprefix("aten::")
        masks = name in ("index", "index_put", "index_put_") and any(
            index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1]
        )
        if name.startswith(WAITS) or masks:
            raise AssertionError(f"{name} waits for the device")
        out = function(*args, **(kwargs or {}))
        if elsewhere := {part.device.type for part in tree_leaves(out) if isinstance(part, Tensor)} - {"meta"}:
            raise AssertionError(f"{name} makes a tensor on {elsewhere}")
        return out


@pytest.fixture(autouse=True)
def no_autocast(monkeypatch):
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())  # it knows no meta


def captured(step, *inputs):
    """`step(*inputs)` twice; a CUDA graph takes its tensors and what else can tell kinds of calls apart."""
    hash(tuple(leaf for leaf in tree_leaves(inputs) if not isinstance(leaf, Tensor)))
    for _ in range(2):
        with Captured() as seen:
            out = step(*inputs)
    assert seen.calls > 20
    assert not any(leaf.requires_grad for leaf in tree_leaves(out) if isinstance(leaf, Tensor))


def optimiser(model):
    return torch.optim.SGD(model.parameters(), lr=0.1)


@pytest.mark.parametrize(
    "words", [{}, {"vae": True, "kl_weight": 1.0}, {"zround": 2, "binary_reco_loss": False}], ids=str
)
def test_lbae(words):
    params = Params(width=2, zsize=6, **{"binary_reco_loss": True} | words)
    with META:
        model = build_model(params)
    captured(partial(lbae.gradients, model, optimiser(model), params), torch.rand(3, 1, 32, 32, device=META))


@pytest.mark.parametrize("flow", ["matrixexp", "affine", "additive"])
@pytest.mark.parametrize("conv", ["matrixexp", "standard", "decomposition"])
def test_nfpi(conv, flow):
    small = {"channels": 1, "height": 8, "width": 8, "flows": (2, 1), "blocks": (1, 1), "hidden": (4, 4)}
    here = MultiScaleFlow(Architecture(**small, conv_type=conv, flow_type=flow, attention=flow == "affine",
                                       activation_checkpointing=flow == "additive"))  # fmt: skip
    bounds = coarse(here.bounds())
    model = ConditionalFlow(here.to(META), ClassGaussians(torch.zeros(5, 64), torch.ones(5, 64)).to(META))
    step = partial(nfpi.gradients, model, model.flow, optimiser(model.flow), 1)
    y = torch.zeros(3, dtype=torch.long, device=META)
    captured(step, torch.rand(3, 1, 8, 8, device=META), y, 3, bounds)


@pytest.mark.parametrize("more", [{}, {"path_kl": "marginal"}, {"path_kl": "marginal", "logdet": "exact"},
                                  {"decode_frames": 2}, {"objective": "upstream"}], ids=str)  # fmt: skip
@pytest.mark.parametrize(
    "variant, iteration", [("supervised", 1), ("weakly", 1), ("unsupervised", 1), ("unsupervised", 9)]
)
def test_latent_flow(variant, iteration, more):
    config = Config(variant=variant, latent_size=8, index_width=8, image_size=8, steps=3, slab_start=5, **more)
    with META:
        model = LatentFlow(config)
    frames, label = torch.rand(4, 5, 3, 8, 8, device=META), 1
    labels = label if "objective" in more else torch.zeros(5, dtype=torch.long, device=META)
    step = partial(latent_flow.gradients, model, optimiser(model), False, DIST)
    captured(step, frames, labels, *latent_flow.stage(model, iteration, graph=True))
    later = latent_flow.stage(model, iteration + 1, graph=True)[0]
    assert later == latent_flow.stage(model, iteration, graph=True)[0], "the same graph serves both"


BASE = "--dset_name sprites --encoder PadlessGaussianConv64 --decoder ShallowLinear --z_dim 7 --size_layer_disc 8"
ALGORITHMS = {
    "GlanceNet": "--alg GlanceNet --conditional_prior true --cluster_dim 3 --masking_fact 50",
    "capacity": "--alg GlanceNet --latent_loss BCE --controlled_capacity_increase true",
    "CBNM": "--alg CBNM", "AE": "--alg AE --encoder PadlessConv64", "CVAE": "--alg CVAE",
    "IFCVAE": "--alg IFCVAE --encoder PadlessGaussianConv64 PadlessConv64",
    **{name: f"--alg GlanceNet --loss_terms {name} --w_tc 3" for name in LOSS_TERMS},
}  # fmt: skip


@pytest.mark.parametrize("name", ALGORITHMS)
def test_glancenet(name):
    with META:
        model = make_model(parse([*BASE.split(), *ALGORITHMS[name].split()]), Shape(1, 7, 2, (3, 2), 100))
        codes = torch.zeros(6, 2, dtype=torch.long)
        batch = Batch(torch.rand(6, 1, 64, 64), torch.rand(6, 7), codes[:, 0], torch.ones(6), codes)
        step = torch.full((), 3.0)
    optimizers = {name: optimiser(model) for name in ("G", *model.adversaries())}
    compute, seen = partial(glancenet.gradients, model, optimizers), []

    def run(*inputs):
        captured(compute, *inputs)
        seen.append(inputs[0])
        return compute(*inputs)

    glancenet.train_step(model, optimizers, batch, batch, step, graph=run)
    expected = ["labels"] * (name == "IFCVAE") + ["main"] + ["adversaries"] * (name in ("IFCVAE", "FACTORVAE"))
    assert seen == expected


FLOWS = {
    "Glow": {"conv1x1": True, "inv_conv": False, "activation": "Identity", "warmup_epochs": 1},
    "inverse convolution": {"inv_conv": True, "order": "cycle", "max_row_sum": 0.5},
    "unit": {"inv_flow": True, "inv_conv": False, "activation": "SLR"},
    "FInC": {"ff": True, "inv_conv": False, "activation": "LeakyRelu", "grad_clip": 1.0},
    "Emerging": {"emerging": True, "inv_conv": False, "activation": "SELU"},
    "ConvExp": {"convexp": True, "inv_conv": False, "activation": "SmoothTanh"},
    "self-normalising": {"snf": True, "inv_conv": False, "snf_kernel_size": 3, "recon_loss_lr": 0.1},
    "exact": {"snf": True, "inv_conv": False, "modified_grad": False, "add_recon_grad": False},
    "fully connected": {"fc": True},
}  # fmt: skip


@pytest.mark.parametrize("name", FLOWS)
def test_inv_flow(name):
    config = {"image_size": (1, 8, 8), "block_size": 1, "num_blocks": 2, "coupling_width": 4, "split_width": 4,
              "batch_size": 4, "device": "cpu", "conv1x1": False} | FLOWS[name]  # fmt: skip
    model = create_model(FlowConfig.build(config))
    with torch.no_grad():
        model.encode(torch.randint(0, 256, (6, 1, 8, 8)).float())  # the data-dependent initialisation
    model.to(META)
    experiment = Experiment(model, [], [], [], optimiser(model), dist=DIST, **config)
    model.train()
    geco = experiment.reconstruction_loss.weight, experiment.reconstruction_loss.average
    captured(partial(experiment.gradients, model), torch.zeros(4, 1, 8, 8, device=META))
    later = experiment.reconstruction_loss.weight, experiment.reconstruction_loss.average
    assert all(one is two for one, two in zip(geco, later, strict=True)), "a graph writes where it was captured"


def test_a_step_that_reads_is_noticed():
    """The mode refuses a value that is read, a mask, and a number that the host sends."""
    x = torch.zeros(3, device=META)
    mask = torch.zeros(3, dtype=torch.bool, device=META)
    for step in (lambda: x.sum().item(), lambda: x[mask], lambda: bool(mask.any()), lambda: torch.tensor(1.0),
                 lambda: torch.tensor([1.0]).to(META), lambda: x + torch.ones(()), lambda: mask.nonzero()):  # fmt: skip
        with pytest.raises((AssertionError, RuntimeError)), Captured():
            step()
