"""Reconstruct a whole set: the test loss, codes, mosaics, and the image files that the metrics read."""

import math
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.batches import Batches
from common.checkpoint import atomic_write
from common.datasets.base import ImageSet
from common.images import mosaic, save_image, save_images
from common.launch import Distributed, autocast, full_precision, pick_device, seed_everything
from common.run import Run
from lbae.data import as_input, attributes, load_split
from lbae.experiment import (
    Latents,
    TextLog,
    check_images,
    checkpoint_path,
    load_nets,
    manifest,
    new_images,
    read_checkpoint,
    reference_folder,
    written,
)
from lbae.model import LBAE, build_model, losses, to_device
from lbae.options import Params

MOSAIC_PAIRS = 64


@dataclass
class Reconstructed:
    """What a pass over a set gives: reconstruction loss per image, codes, labels, and images for a mosaic."""

    loss: float
    codes: Tensor
    labels: Tensor
    pictures: Tensor

    def latents(self, epoch: int, iter: int) -> Latents:
        """The codes, with the epoch of the weights that made them and the images seen by then."""
        return Latents(self.codes, self.labels, epoch, iter, "evaluation pass")


@torch.no_grad()
def run_set(
    params: Params, model: LBAE, batches: Batches, data: ImageSet, dist: Distributed, mosaic_seed: int = 0,
    export: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Reconstructed:  # fmt: skip
    """Reconstruct a whole set in evaluation mode; leaves torch's generators as they were.

    The loss is the total over the images divided by their number. `export(first index, images, reconstructions)` is
    called for each batch. The mosaic shows the first images of a batch that `mosaic_seed` chooses.
    """
    model.eval()
    shown = int(np.random.default_rng(mosaic_seed).integers(len(batches)))
    totals, codes, labels, pictures, at = [], [], [], None, 0
    cuda = [dist.device] if dist.device.type == "cuda" else []
    noise, model.randn_like = model.randn_like, lambda mu: _noise_of_share(mu, dist, len(data) - at, params)
    with torch.random.fork_rng(devices=cuda):
        torch.manual_seed(params.seed)  # a VAE's reconstructions are drawn
        for i, (images, targets) in enumerate(batches.epoch(0)):
            x = as_input(images)
            with autocast(dist.device, params.amp):
                xr, encoded = model(x)
            terms = losses(xr, x, encoded, params.binary_reco_loss, params.kl_weight, training=False)
            reco_loss = terms["reco_loss"] if x.device.type != "mps" else terms["reco_loss"].cpu()
            totals.append(reco_loss.double().sum())
            code = encoded.code.to(torch.int8) if params.has_bits else encoded.code
            codes.append(dist.gather(code).cpu())
            labels.append(dist.gather(attributes(data, targets)).cpu())
            if i == shown:
                pictures = pairs(x, xr)
            if export:
                export(at, images, xr)
            at += min(batches.batch_size, len(data) - at)
    model.randn_like = noise
    loss = float(dist.sum(sum(torch.stack(totals).tolist()))) / len(data)
    return Reconstructed(loss, torch.cat(codes), torch.cat(labels), pictures)


def _noise_of_share(mu: Tensor, dist: Distributed, left: int, params: Params) -> Tensor:
    """Standard normal noise for this process's rows of a batch of evaluation, whose shares may differ by one row: the
    numbers that one process would draw.
    """
    rows = min(params.batch_size_test, left)
    first = dist.rank * (rows // dist.world) + min(dist.rank, rows % dist.world)
    return torch.randn(rows, mu.shape[1], dtype=mu.dtype, device=mu.device)[first : first + len(mu)]


def pairs(x: Tensor, xr: Tensor) -> Tensor:
    """Images and their reconstructions in turns: (2n, C, S, S) for the first n <= 64."""
    n = min(MOSAIC_PAIRS, len(x))
    return torch.stack([x[:n], xr[:n].float()], 1).flatten(0, 1).detach().cpu()


def pair_columns(n: int) -> int:
    """Columns of a mosaic of n pairs: even, so that a pair stays in one row; at least one pair."""
    return max(2, int(math.sqrt(2 * n) // 2) * 2)


def save_pairs(path: Path, pictures: Tensor | None, stretch: bool, run: Run | None = None, step: int = 0) -> None:
    """Write a mosaic of pairs, and hand it to TensorBoard."""
    if pictures is None or len(pictures) == 0:
        return
    picture = mosaic(pictures, pair_columns(len(pictures) // 2), stretch=stretch)
    save_image(path, picture, quality=90)
    if run:
        run.image(path.parent.name, picture, step)


def load_trained(params: Params, folder: Path) -> tuple[LBAE, dict[str, Any], torch.device]:
    """The network of an experiment in evaluation mode, its checkpoint's other entries, and its device."""
    full_precision(params.tf32)
    seed_everything(params.seed, params.deterministic)
    device = pick_device(params.device_name)
    path = checkpoint_path(folder, params.reload)
    state = read_checkpoint(path)
    model = build_model(params)
    load_nets(model, state, path)
    return to_device(model, device).eval(), state, device


def evaluate(params: Params, folder: Path) -> None:
    """Reconstruct the test (or training) set: loss, reco/, reference images, mosaic, latents, fid-epoch.txt.

    Images of an earlier call give way only when all is done.
    """
    split, name = ("train", "train") if params.eval_train else ("test", "eval")
    reference = reference_folder(folder, params.dataset, params.img_crop_size, name)
    for place in (reference, folder / "reco"):
        check_images(place)
    model, state, device = load_trained(params, folder)
    data = load_split(params, split)
    batches = Batches(data, params.batch_size_test, shuffle=False, drop_last=False, workers=params.workers,
                      device=device)  # fmt: skip
    facts = reference_facts(reference, data, params)
    with ExitStack() as stack:
        new_reference = new_reco = None
        if facts:
            new_reference = stack.enter_context(new_images(reference, params.img_format, facts))
        if not params.eval_train:
            new_reco = stack.enter_context(new_images(folder / "reco", params.img_format))

        def export(at: int, images: Tensor, xr: Tensor) -> None:
            if new_reference:
                save_images(new_reference, images, at, params.img_format)
            if new_reco:
                save_images(new_reco, xr.float(), at, params.img_format)

        found = run_set(params, model, batches, data, Distributed(device), params.seed, export)
        if new_reference:
            (reference / "fid_stats.npz").unlink(missing_ok=True)
    save_pairs(folder / f"reconstructed_{name}" / "sample_0_0.jpg", found.pictures, params.stretch)
    found.latents(state["epoch"], state["iter"]).save(folder / f"latents-{name}.npz")
    scalars = {"loss": 0.0, "reco_loss": found.loss}
    TextLog(folder, "eval").record(state["epoch"], state["iter"], "Eval", scalars)
    if not params.eval_train:
        write_epoch(folder, state["epoch"], found.loss)
    print(f"epoch {state['epoch']}: {split} reco_loss {found.loss:.4f} per image over {len(data)} images", flush=True)


def write_epoch(folder: Path, epoch: int, loss: float | None) -> None:
    """fid-epoch.txt: the epoch and the test loss of the images that eval.py will score."""
    with atomic_write(folder / "fid-epoch.txt") as file:
        file.write(f"e:{epoch} loss_eval:{-1 if loss is None else loss}".encode())


def reference_facts(reference: Path, data: ImageSet, params: Params) -> dict[str, Any] | None:
    """What to note beside the reference images; None when `reference` holds exactly these images already."""
    facts = {
        "data": data.fingerprint(), "images": len(data), "size": params.img_size, "crop": params.img_crop_size,
        "format": params.img_format,
    }  # fmt: skip
    there = {path.name for path in reference.glob(f"*.{params.img_format}")}
    same = facts.items() <= manifest(reference).items() and there == written(reference) and len(there) == len(data)
    return None if same else facts
