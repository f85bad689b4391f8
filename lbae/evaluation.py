"""Reconstruct a whole set: the test loss, codes, mosaics, and the image files that the metrics read."""

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.batches import Batches
from common.checkpoint import atomic_write, read_json, write_json
from common.datasets.base import ImageSet
from common.errors import UserError
from common.images import mosaic, save_image, save_images
from common.launch import Distributed, pick_device
from common.run import Run
from lbae.data import attributes, load_split
from lbae.experiment import (
    Latents,
    build_model,
    checkpoint_path,
    load_nets,
    read_checkpoint,
    reference_folder,
)
from lbae.model import LBAE, Encoded, losses
from lbae.parameters import Params
from lbae.textlog import TextLog

MOSAIC_PAIRS, MOSAIC_COLUMNS = 64, 8  # pairs in a mosaic of reconstructions; columns of a mosaic of samples
DECODE = 1024  # codes decoded at once


def device_name(params: Params) -> str:
    """`device`, with the index of `cuda_device` when that is given."""
    if params.cuda_device < 0:
        return params.device
    if params.device not in ("auto", "cuda"):
        raise UserError(f"cuda_device={params.cuda_device} contradicts device={params.device}")
    return f"cuda:{params.cuda_device}"


def as_input(images: Tensor) -> Tensor:
    """uint8 (B, C, S, S) -> float32 in [0, 1], channels last: convolutions are faster so."""
    x = images.float() / 255
    return x if x.device.type == "mps" else x.contiguous(memory_format=torch.channels_last)


def to_device(model: LBAE, device: torch.device) -> LBAE:
    """The model on `device`, its weights laid out as the images are."""
    return model.to(device) if device.type == "mps" else model.to(device, memory_format=torch.channels_last)


def precision(params: Params, device: torch.device) -> AbstractContextManager:
    """bfloat16 convolutions with amp=bf16; the quantiser, the sigmoid and the losses stay float32."""
    return torch.autocast(device.type, torch.bfloat16) if params.amp == "bf16" else nullcontext()


def has_bits(params: Params) -> bool:
    """Whether codes are in {-1, +1}."""
    return not params.vae and params.zround < 0


@dataclass
class Found:
    """What a pass over a set found: reconstruction loss per image, codes, labels, a mosaic's images."""

    loss: float
    codes: Tensor
    labels: Tensor
    pictures: Tensor

    def latents(self, epoch: int, iter: int) -> Latents:
        return Latents(self.codes, self.labels, epoch, iter, "evaluation pass")


@torch.no_grad()
def run_set(
    params: Params, model: LBAE, batches: Batches, data: ImageSet, dist: Distributed, seed: int = 0,
    export: Callable[[int, Tensor, Tensor], None] | None = None,
) -> Found:  # fmt: skip
    """Reconstruct a whole set in evaluation mode; leaves torch's generators as they were.

    The loss is the total over the images divided by their number. `export(first index, images, reconstructions)` is
    called for each batch. The mosaic shows the first images of a batch that `seed` chooses.
    """
    model.eval()
    shown = int(np.random.default_rng(seed).integers(len(batches)))
    total, codes, labels, pictures, at = 0.0, [], [], None, 0
    with torch.random.fork_rng():
        torch.manual_seed(params.seed)  # a VAE's reconstructions are drawn
        for i, (images, targets) in enumerate(batches.epoch(0)):
            x = as_input(images)
            with precision(params, dist.device):
                xr, encoded = model(x)
            total += reconstruction_sum(xr, x, encoded, params)
            code = encoded.code.to(torch.int8) if has_bits(params) else encoded.code
            codes.append(dist.gather(code).cpu())
            labels.append(dist.gather(attributes(data, targets)).cpu())
            if i == shown:
                pictures = pairs(x, xr)
            if export:
                export(at, images, xr)
            at += len(images)
    loss = float(dist.sum(total)) / len(data)
    return Found(loss, torch.cat(codes), torch.cat(labels), pictures)


def reconstruction_sum(xr: Tensor, x: Tensor, encoded: Encoded, params: Params) -> float:
    """Sum of the images' reconstruction losses, added in float64."""
    terms = losses(xr, x, encoded, params.binary_reco_loss, params.kl_weight, training=False)
    return float(terms["reco_loss"].cpu().double().sum())


def pairs(x: Tensor, xr: Tensor) -> Tensor:
    """Images and their reconstructions in turns: (2n, C, S, S) for the first n <= 64."""
    n = min(MOSAIC_PAIRS, len(x))
    return torch.stack([x[:n], xr[:n].float()], 1).flatten(0, 1).detach().cpu()


def pair_columns(n: int) -> int:
    """Columns of a mosaic of n pairs: even, so that a pair stays in one row; at least one pair."""
    return max(2, int(math.sqrt(2 * n) // 2) * 2)


def show(path: Path, pictures: Tensor | None, params: Params, run: Run | None = None, step: int = 0) -> None:
    """Write a mosaic of pairs, and hand it to TensorBoard."""
    if pictures is None or len(pictures) == 0:
        return
    picture = mosaic(pictures, pair_columns(len(pictures) // 2), stretch=params.stretch)
    save_image(path, picture, quality=90)
    if run:
        run.image(path.parent.name, picture, step)


def load_trained(params: Params, folder: Path, device: torch.device) -> tuple[LBAE, dict[str, Any]]:
    """The network of an experiment in evaluation mode, and its checkpoint's other entries."""
    path = checkpoint_path(folder, params.reload)
    state = read_checkpoint(path)
    model = build_model(params)
    load_nets(model, state, path)
    return to_device(model, device).eval(), state


def evaluate(params: Params, folder: Path) -> None:
    """Reconstruct the test (or training) set: loss, reco/, reference images, mosaic, latents, fid-epoch.txt."""
    device = pick_device(device_name(params))
    model, state = load_trained(params, folder, device)
    split = "train" if params.eval_train else "test"
    data = load_split(params, split)
    batches = Batches(
        data, params.batch_size_test, shuffle=False, drop_last=False, workers=params.workers, device=device
    )
    reference = reference_folder(folder, params.dataset, params.img_crop_size, "train" if params.eval_train else "eval")
    export_reference = stale_reference(reference, data, params)
    reco = None if params.eval_train else folder / "reco"
    if reco:
        clear_images(reco)

    def export(at: int, images: Tensor, xr: Tensor) -> None:
        if export_reference:
            save_images(reference, images, at, params.img_format)
        if reco:
            save_images(reco, xr.float(), at, params.img_format)

    with TextLog(folder, "eval") as log:
        found = run_set(params, model, batches, data, Distributed(device), params.seed, export)
        if export_reference:
            write_json(reference / "reference.json", export_reference)
        show(
            folder / f"reconstructed_{'train' if params.eval_train else 'eval'}" / "sample_0_0.jpg",
            found.pictures,
            params,
        )
        found.latents(state["epoch"], state["iter"]).save(
            folder / f"latents-{'train' if params.eval_train else 'eval'}.npz"
        )
        log.record(state["epoch"], state["iter"], "Eval", {"loss": 0.0, "reco_loss": found.loss})
        if not params.eval_train:
            write_epoch(folder, state["epoch"], found.loss)
        log.say(f"epoch {state['epoch']}: {split} reco_loss {found.loss:.4f} per image over {len(data)} images")


def write_epoch(folder: Path, epoch: int, loss: float | None) -> None:
    """fid-epoch.txt: the epoch and the test loss of the images that eval.py will score."""
    with atomic_write(folder / "fid-epoch.txt") as file:
        file.write(f"e:{epoch} loss_eval:{-1 if loss is None else loss}".encode())


def stale_reference(reference: Path, data: ImageSet, params: Params) -> dict[str, Any] | None:
    """None when `reference` holds exactly these images; else what to note beside them, and the old ones are removed."""
    facts = {
        "data": data.fingerprint(), "images": len(data), "size": params.img_size, "crop": params.img_crop_size,
        "format": params.img_format,
    }  # fmt: skip
    note = reference / "reference.json"
    if note.is_file() and read_json(note) == facts and len(list(reference.glob(f"*.{params.img_format}"))) == len(data):
        return None
    note.unlink(missing_ok=True)
    (reference / "fid_stats.npz").unlink(missing_ok=True)
    clear_images(reference)
    return facts


def clear_images(folder: Path) -> None:
    """Remove <number>.png and <number>.jpg, and nothing else; the folder is made when missing."""
    folder.mkdir(parents=True, exist_ok=True)
    for path in folder.iterdir():
        if path.suffix in (".png", ".jpg") and path.stem.isdigit():
            path.unlink()
