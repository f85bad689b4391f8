"""Time one GlanceNet training step against a plain transcription of the published loop.

    python -m glancenet.benchmark                  # batch 64, 64x64, SimpleGaussianConv64 + SimpleConv64
    python -m glancenet.benchmark --steps 20 --encoder PadlessGaussianConv64 --decoder ShallowLinear --device cpu

The transcription does what the published loop does in every step: each image goes through PIL, a resize and ToTensor on
its own, labels are collected image by image, the loss is sigmoid + binary cross-entropy, and every term is read back to
Python. Both sides start from the same data (uint8 sprites), the same weights and the same batches; the benchmark
checks that they also compute the same loss. Printed: seconds a step of both (median of interleaved steps), their ratio,
peak memory.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0:1] = [str(Path(__file__).resolve().parents[1])]
    import common.start  # noqa: F401

import json
import resource
import statistics
import time

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common.errors import run_command
from common.launch import full_precision, pick_device
from common.options import Device, Options, from_flags, option
from glancenet.algorithms import GlanceNet, make_model
from glancenet.architectures import DECODERS, ENCODERS
from glancenet.data import ConceptData, load_data
from glancenet.losses import Batch
from glancenet.main import train_step
from glancenet.options import Config as TrainingConfig
from glancenet.options import one_of, resolve
from glancenet.state import make_optimizers


def transcribed_batch(data: ConceptData, places: Tensor) -> Batch:
    """One batch as the published loader makes it: image by image through PIL."""
    from PIL import Image
    from torchvision.transforms import Compose, Resize, ToTensor

    transform = Compose([Resize((64, 64)), ToTensor()])
    images, labels, classes, masks = [], [], [], []
    part = data.train
    for place in places.tolist():
        array = part.images.fetch(part.rows[place : place + 1])[0, 0].numpy()
        images.append(transform(Image.fromarray(array)))
        labels.append(part.concepts[place])
        classes.append(part.y[place])
        masks.append(part.mask[place])
    return Batch(
        torch.stack(images),
        torch.stack(labels),
        torch.stack(classes),
        torch.stack(masks),
        torch.stack(classes)[:, None],
    )


def transcribed_step(model: GlanceNet, batch: Batch, optimizer: torch.optim.Optimizer) -> dict[str, float]:
    """Forward, backward and step as published, every term read back (conditional prior, BCE concepts)."""
    w, n = model.w, len(batch.x)
    mu, logvar = model.encoder(batch.x)
    z = mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)
    recon = w.w_recon * F.binary_cross_entropy(torch.sigmoid(model.decoder(z)), batch.x, reduction="sum") / n
    onehot = torch.zeros(n, model.shape.n_classes, device=batch.x.device)
    for i in range(n):
        onehot[i, batch.y[i]] = 1
    target = model.prior(onehot)
    kld = w.w_kld * (-0.5 * (1 + logvar - (mu - target) ** 2 - logvar.exp())).sum(1).mean()
    prediction = w.label_weight * F.cross_entropy(model.classifier(torch.tanh(z / 2)), batch.y)
    keep = batch.mask == 1
    probability, anchor = torch.sigmoid(z[keep]), torch.sigmoid(target[keep])
    n_concepts = batch.labels.shape[1]
    latent = F.binary_cross_entropy(probability[:, :n_concepts], batch.labels[keep])
    latent = latent + 100 * F.binary_cross_entropy(anchor[:, :n_concepts], batch.labels[keep])
    latent = w.latent_weight * latent
    total = recon + kld + prediction + latent
    optimizer.zero_grad()
    total.backward()
    optimizer.step()
    values = {"recon": recon, "kld": kld, "prediction": prediction, "latent": latent, "total": total}
    return {name: value.item() for name, value in values.items()}


class Config(Options):
    """What is timed."""

    steps: int = option(10, "timed steps of each side, interleaved", ge=1, le=1_000_000)
    batch_size: int = option(64, "images a step", ge=1, le=100_000)
    encoder: one_of([name for name, kind in ENCODERS.items() if kind.gaussian]) = option(
        "SimpleGaussianConv64", "encoder"
    )
    decoder: one_of([name for name in DECODERS if name != "DeConv64"]) = option("SimpleConv64", "decoder")
    device: Device = option("cpu", "device")
    threads: int = option(1, "CPU threads", ge=1, le=1024)
    dry_run: bool = option(False, "check the options, print them as JSON, and end", bare=True)


def make_options(o: Config) -> TrainingConfig:
    """Training options for both sides: the paper's dSprites model."""
    return resolve(TrainingConfig.build({
        "alg": "GlanceNet", "dset_name": "sprites", "dset_dir": ".", "encoder": [o.encoder], "decoder": [o.decoder],
        "z_dim": 7, "batch_size": o.batch_size, "conditional_prior": True, "latent_loss": "BCE", "label_weight": 100,
        "warmup_epochs": 0, "device": o.device,
    }))  # fmt: skip


def main(argv: list[str] | None = None) -> dict[str, float]:
    """The command; returns the printed numbers."""
    o, _ = from_flags(Config, sys.argv[1:] if argv is None else argv, __doc__)
    options, device = make_options(o), pick_device(o.device)
    if o.dry_run:
        print(json.dumps(o.as_dict(), indent=2))
        return {}
    torch.set_num_threads(o.threads)
    full_precision()
    data = load_data(options)
    torch.manual_seed(0)
    plain = make_model(options, data.shape).to(device)
    ours = make_model(options, data.shape).to(device, memory_format=torch.channels_last)
    ours.load_state_dict(plain.state_dict())
    plain_optimizer = torch.optim.Adam(plain.parameters(), lr=options.lr_G)
    optimizers = make_optimizers(ours, options)
    times: dict[str, list[float]] = {"published": [], "ours": []}
    totals: dict[str, float] = {}

    def wait() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    order = data.train.order(0, 0)
    for step in range(o.steps + 2):  # two steps warm up
        places = order[torch.arange(step * o.batch_size, (step + 1) * o.batch_size) % len(order)]
        torch.manual_seed(step)
        began = time.perf_counter()
        batch = Batch(*(part.to(device) for part in transcribed_batch(data, places)))
        values = transcribed_step(plain, batch, plain_optimizer)
        wait()
        middle = time.perf_counter()
        torch.manual_seed(step)
        terms, _ = train_step(ours, optimizers, data.train.gather(places, device), step=step)
        wait()
        if step >= 2:
            times["published"].append(middle - began)
            times["ours"].append(time.perf_counter() - middle)
        if step == 0:
            totals = {"published": values["total"], "ours": float(terms.total)}
    np.testing.assert_allclose(totals["ours"], totals["published"], rtol=1e-4)
    medians = {name: statistics.median(values) for name, values in times.items()}
    result = {
        "published_seconds_a_step": medians["published"], "seconds_a_step": medians["ours"],
        "ratio": medians["ours"] / medians["published"], "first_loss": totals["ours"],
        "peak_memory_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    }  # fmt: skip
    print(f"batch {o.batch_size}, {o.encoder} + {o.decoder}, {device}, {o.threads} thread(s), {o.steps} steps")
    for name, value in result.items():
        print(f"{name:28s} {value:.4f}")
    print(json.dumps(result))
    return result


if __name__ == "__main__":
    sys.exit(run_command(main))
