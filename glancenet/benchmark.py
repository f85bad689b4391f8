"""Time GlanceNet's and the bottleneck's training step against a plain transcription of the published loop.

    python -m glancenet.benchmark                                  # both models, and the making of a batch
    python -m glancenet.benchmark --cases mpi3d --amp true --threads 2 --json figures.json
    python -m glancenet.benchmark --cases glancenet --encoder PadlessGaussianConv64 --decoder ShallowLinear

The transcription does what the published step does: the same networks in the default memory layout, sigmoid and binary
cross-entropy apart, plain Adam, every term and every concept's error read back to Python. Both sides start from the
same weights, batch and noise, and must compute the same loss. `loading` makes a batch from uint8 images: image by image
through PIL as published, all at once here.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0:1] = [str(Path(__file__).resolve().parents[1])]
    import common.start  # noqa: F401

import json
from collections.abc import Callable
from functools import partial
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from common.benchmark import BenchmarkOptions, Case, run_cases
from common.cuda_graph import CudaGraph
from common.errors import run_command
from common.launch import Distributed, pick_device
from common.options import from_flags, option
from glancenet.algorithms import Algorithm, Shape, make_model
from glancenet.architectures import DECODERS, ENCODERS
from glancenet.data import Images, Part
from glancenet.losses import Batch
from glancenet.main import gradients, train_step
from glancenet.options import Config as TrainingConfig
from glancenet.options import one_of, resolve
from glancenet.state import make_optimizers


class Setting(NamedTuple):
    """A published model: its algorithm, data, batch size and networks."""

    alg: str
    shape: Shape
    batch: int
    encoder: str
    decoder: str
    loss: str


SETTINGS = {
    "glancenet": Setting("GlanceNet", Shape(1, 7, 2, (), 1), 64, "SimpleGaussianConv64", "SimpleConv64", "MSE"),
    "cbnm": Setting("CBNM", Shape(1, 7, 2, (), 1), 64, "SimpleGaussianConv64", "SimpleConv64", "MSE"),
    "mpi3d": Setting("GlanceNet", Shape(3, 21, 10, (), 1), 100, "PadlessGaussianConv64", "SimpleConv64", "BCE"),
    "celeba": Setting("GlanceNet", Shape(3, 10, 4, (), 1), 100, "EncConv64", "SimpleConv64", "BCE"),
}


def transcribed_batch(part: Part, places: torch.Tensor) -> Batch:
    """One batch as the published loader makes it: image by image through PIL."""
    from PIL import Image
    from torchvision.transforms import Compose, Resize, ToTensor

    transform = Compose([Resize((64, 64)), ToTensor()])
    columns: list[list[Any]] = [[], [], [], []]
    for place in places.tolist():
        array = part.images.fetch(part.rows[place : place + 1])[0, 0].numpy()
        example = transform(Image.fromarray(array)), part.concepts[place], part.y[place], part.mask[place]
        for column, value in zip(columns, example, strict=True):
            column.append(value)
    x, labels, y, mask = (torch.stack(column) for column in columns)
    return Batch(x, labels, y, mask, y[:, None])


def transcribed_step(model: Algorithm, batch: Batch, optimizer: torch.optim.Optimizer) -> float:
    """Forward, backward and step as published; returns the total loss, every term being read back."""
    w, n_concepts = model.w, batch.labels.shape[1]
    mu, logvar = model.encoder(batch.x)
    keep, losses = batch.mask == 1, []
    z, means = mu, None
    if model.decoder is not None:
        z = mu + logvar.mul(0.5).exp() * torch.randn_like(mu)
        image = torch.sigmoid(model.decoder(z))
        losses.append(w.w_recon * F.binary_cross_entropy(image, batch.x, reduction="sum") / len(batch.x))
        means = model.prior(F.one_hot(batch.y, model.shape.n_classes).float())
        losses.append(w.w_kld * (-0.5 * (1 + logvar - (mu - means) ** 2 - logvar.exp())).sum(1).mean())
    active = torch.tanh(z / 2)
    losses.append(w.label_weight * F.cross_entropy(model.classifier(active), batch.y))
    truth = batch.labels[keep]

    def compare(latents: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        if w.latent_loss == "MSE":
            return F.mse_loss(latents, 2 * labels - 1)
        return F.binary_cross_entropy((1 + latents) / 2, labels)

    concepts = compare(active[keep][:, :n_concepts], truth)
    for i in range(n_concepts):
        compare(active[keep][:, i], truth[:, i]).item()
    if means is not None:
        concepts = concepts + 100 * compare(torch.tanh(means / 2)[keep][:, :n_concepts], truth)
    total = sum([*losses, w.latent_weight * concepts])
    optimizer.zero_grad()
    total.backward()
    optimizer.step()
    return total.item()


class Config(BenchmarkOptions):
    """What is timed."""

    cases: list[Literal[(*SETTINGS, "loading")]] = option(
        ["glancenet", "cbnm", "loading"], "published settings (glancenet, cbnm: dSprites), or the making of a batch",
        min_length=1,
    )  # fmt: skip
    encoder: one_of([name for name, kind in ENCODERS.items() if kind.gaussian]) | None = option(
        None, "another encoder; none: as published"
    )
    decoder: one_of([name for name in DECODERS if name != "DeConv64"]) | None = option(
        None, "another decoder; none: as published"
    )


def training_options(setting: Setting, o: Config) -> TrainingConfig:
    """The options of both sides."""
    glance = setting.alg == "GlanceNet"
    return resolve(TrainingConfig.build({
        "alg": setting.alg, "dset_name": "sprites", "dset_dir": ".", "encoder": [o.encoder or setting.encoder],
        "decoder": [o.decoder or setting.decoder] if glance else [], "z_dim": setting.shape.n_concepts,
        "batch_size": o.batch_size or setting.batch, "conditional_prior": glance, "latent_loss": setting.loss,
        "label_weight": 100, "device": o.device, "amp": o.amp,
    }))  # fmt: skip


def random_part(shape: Shape, n: int) -> Part:
    """Images (n) of noise with labels, as a split of a data set."""
    rng = np.random.default_rng(0)
    images = Images(rng.integers(0, 256, (n, 64, 64, shape.channels), np.uint8))
    y = rng.integers(0, shape.n_classes, n)
    return Part(images, np.arange(n), rng.random((n, shape.n_concepts)), y, np.ones(n), y[:, None])


def step_case(name: str, o: Config, device: torch.device) -> Case:
    """A whole step of both sides on a batch that is there."""
    setting = SETTINGS[name]
    options = training_options(setting, o)
    torch.manual_seed(0)
    plain = make_model(options, setting.shape).to(device)
    for layer in plain.modules():
        if isinstance(layer, nn.ConvTranspose2d):
            layer.__class__ = nn.ConvTranspose2d
    ours = make_model(options, setting.shape).to(device, memory_format=torch.channels_last)
    ours.load_state_dict(plain.state_dict())
    optimizer = torch.optim.Adam(plain.parameters(), lr=options.lr_G, foreach=False)
    optimizers = make_optimizers(ours, options)
    compute = partial(gradients, ours, optimizers)
    graph = CudaGraph(compute, ours.parameters(), Distributed(device), o.cuda_graph, print)
    batch = random_part(setting.shape, options.batch_size).gather(torch.arange(options.batch_size), device)
    as_published = batch._replace(x=batch.x.contiguous())

    def published() -> float:
        torch.manual_seed(1)
        return transcribed_step(plain, as_published, optimizer)

    def this() -> torch.Tensor:
        torch.manual_seed(1)
        return train_step(ours, optimizers, batch, graph=graph)[0].total

    networks = " + ".join([*options.encoder, *options.decoder])
    return Case(f"{name}, {networks}, batch {options.batch_size}", published, this, None if o.amp else 1e-5)


def loading_case(o: Config, device: torch.device) -> Case:
    """A batch of dSprites' size from uint8 images."""
    n = o.batch_size or SETTINGS["glancenet"].batch
    part, places = random_part(SETTINGS["glancenet"].shape, n), torch.arange(n)

    def published() -> torch.Tensor:
        return transcribed_batch(part, places).x.to(device).sum()

    return Case(f"loading, batch {n}", published, lambda: part.gather(places, device).x.sum(), 1e-5)


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """The command; returns the rows that it prints."""
    o, _ = from_flags(Config, sys.argv[1:] if argv is None else argv, __doc__)
    pick_device(o.device)
    if o.dry_run:
        print(json.dumps(o.as_dict(), indent=2))
        return []
    cases: list[Callable[[torch.device], Case]] = [
        partial(loading_case, o) if name == "loading" else partial(step_case, name, o) for name in o.cases
    ]
    return run_cases(o, cases)


if __name__ == "__main__":
    sys.exit(run_command(main))
