"""Generate images: by random hyperplanes, along interpolations, from independent or fair bits."""

import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.batches import Batches
from common.checkpoint import atomic_write
from common.errors import UserError
from common.images import mosaic, save_image, save_images
from common.launch import Distributed, pick_device
from lbae import sampler
from lbae.data import load_split
from lbae.evaluation import clear_images, device_name, has_bits, load_trained, precision, run_set, write_epoch
from lbae.experiment import (
    Latents,
)
from lbae.model import LBAE
from lbae.parameters import Params
from lbae.textlog import TextLog

MOSAIC_PAIRS, MOSAIC_COLUMNS = 64, 8  # pairs in a mosaic of reconstructions; columns of a mosaic of samples
DECODE = 1024  # codes decoded at once


def generate(params: Params, folder: Path) -> None:
    """Write `gen_imgs` images of `sample_method` to generated/samples_<method>/ and a mosaic a batch to generated/."""
    device = pick_device(device_name(params))
    model, state = load_trained(params, folder, device)
    attribute = params.sample_method == "int" and params.set_attr >= 0
    if params.set_attr >= 0 and not attribute:
        raise UserError(f"set_attr={params.set_attr} goes with sample_method=int")
    with TextLog(folder, "eval") as log:
        source = code_source(params, folder, model, state, device, log)
        name = params.sample_method + (f"_attr_{float(params.set_attr)}" if attribute else "")
        samples = (
            folder / "generated" / f"samples_{params.sample_method + (f'_attr_{params.set_attr}' if attribute else '')}"
        )
        clear_images(samples)
        written, batch = 0, 0
        while written < params.gen_imgs:
            codes, columns, counted = source(params.gen_imgs - written)
            images = decode(params, model, codes, device)
            kept = images[counted][: params.gen_imgs - written]
            save_images(samples, kept, written, params.img_format)
            shown = images if params.sample_method == "int" else images[: MOSAIC_COLUMNS**2]
            save_image(folder / "generated" / f"sample_{batch}_{name}.jpg",
                       mosaic(shown, columns, stretch=params.stretch), quality=90)  # fmt: skip
            written, batch = written + len(kept), batch + 1
        note = folder / "fid-epoch.txt"
        if not (note.is_file() and note.read_text().startswith(f"e:{state['epoch']} ")):
            write_epoch(folder, state["epoch"], state["loss_eval"])
        log.say(f"epoch {state['epoch']}: {written} images of {params.sample_method} in {samples}")


@torch.no_grad()
def decode(params: Params, model: LBAE, codes: Tensor, device: torch.device) -> Tensor:
    """Images (N, C, S, S) in [0, 1] on the CPU of codes (N, D)."""
    parts = []
    for part in codes.split(DECODE):
        with precision(params, device):
            parts.append(model.gen(part.to(device, torch.float32)).float().cpu())
    return torch.cat(parts)


Codes = tuple[Tensor, int, Tensor]  # codes (N, D), columns of their mosaic, which of them count as generated (N,) bool


def code_source(
    params: Params, folder: Path, model: LBAE, state: dict, device: torch.device, log: TextLog
) -> Callable[[int], Codes]:
    """A function that gives the next batch of codes for at most so many images, by `sample_method`.

    Raises UserError where a VAE is asked for bits, and when latents are missing.
    """
    method, batch, d = params.sample_method, params.batch_size_test, params.zsize
    generator = torch.Generator().manual_seed(params.seed)

    def plain(codes: Tensor) -> Codes:
        return codes, MOSAIC_COLUMNS, torch.ones(len(codes), dtype=torch.bool)

    if method == "random" and params.vae:
        return lambda left: plain(torch.randn(min(batch, left), d, generator=generator))
    if method == "random":
        limits = (params.zclamp_min, params.zclamp, params.zround)
        return lambda left: plain(sampler.fair_bits((min(batch, left), d), generator, *limits))
    if not has_bits(params):
        raise UserError(f"sample_method={method} needs bits; for this model use sample_method=random")

    latents = training_latents(params, folder, model, state, device, log)
    mean, second = sampler.moments(latents.codes.to(device if device.type != "mps" else "cpu"))
    if method == "independent":
        return lambda left: plain(sampler.independent_bits(mean, min(batch, left), generator))
    planes = sampler.hyperplanes(mean, second)
    errors, negative = planes.moment_errors(), int((planes.eigenvalues < 0).sum())
    log.say(
        f"hyperplanes from {len(latents.codes)} codes: {negative} of {d + 1} eigenvalues negative; their repair moves "
        f"bit means by {errors[0]:.4f} and second moments by {errors[1]:.4f} on average"
    )
    if method == "cov":

        def cov(left: int) -> Codes:
            normals = torch.randn(min(batch, left), planes.L.shape[1], generator=generator, dtype=torch.float64)
            return plain(sampler.sample_cov(planes, normals).cpu())

        return cov
    return interpolations(params, planes, latents, folder, model, state, device)


def training_latents(
    params: Params, folder: Path, model: LBAE, state: dict, device: torch.device, log: TextLog
) -> Latents:
    """The codes that `latents=` names; a warning when they were made by other weights than those loaded."""
    if params.latents == "refresh":
        return encode_split(params, model, state, device, "train")
    latents = Latents.load(folder / ("latents-last.npz" if params.latents == "last" else "latents.npz"))
    if latents.codes.shape[1] != params.zsize:
        raise UserError(
            f"the latents have {latents.codes.shape[1]} bits, the model {params.zsize}; use latents=refresh"
        )
    if latents.epoch >= 0 and (latents.epoch, latents.iter) != (state["epoch"], state["iter"]):
        log.say(f"warning: the latents are of epoch {latents.epoch}, the weights of epoch {state['epoch']}; "
                "latents=refresh encodes the training set with these weights")  # fmt: skip
    return latents


def encode_split(params: Params, model: LBAE, state: dict, device: torch.device, split: str) -> Latents:
    """Codes of the whole training or test set in evaluation mode."""
    data = load_split(params, split)
    batches = Batches(data, DECODE, shuffle=False, drop_last=False, workers=params.workers, device=device)
    return run_set(params, model, batches, data, Distributed(device)).latents(state["epoch"], state["iter"])


def interpolations(
    params: Params, planes: sampler.Hyperplanes, latents: Latents, folder: Path, model: LBAE, state: dict,
    device: torch.device,
) -> Callable[[int], Codes]:  # fmt: skip
    """Paths between two codes, or from a code to itself with an attribute set."""
    mean = None
    if params.set_attr >= 0:
        mean = sampler.attribute_mean(latents.codes, latents.labels, params.set_attr, params.attr_mode)
        order = mean.argsort()
        with atomic_write(folder / f"prob_dim_{params.set_attr}.npz") as file:
            np.savez(file, bits=order.numpy(), means=mean[order].numpy())
    ends = latents if params.int_source == "train" else encode_split(params, model, state, device, "test")
    rng = np.random.default_rng(params.seed)
    row = params.interpolate_steps + 2
    counted_row = torch.ones(row, dtype=torch.bool)
    if not params.int_endpoints:
        counted_row[[0, -1]] = False

    def paths(left: int) -> Codes:
        count = min(params.batch_size_test, math.ceil(left / int(counted_row.sum())))
        chosen = torch.from_numpy(sampler.choose_pairs(rng, len(ends.codes), count))
        begin, end = ends.codes[chosen[:, 0]], ends.codes[chosen[:, 1]]
        if mean is not None:
            end = sampler.set_attribute(begin, mean, params.attr_threshold)
        codes, _ = sampler.interpolate(
            planes, begin.to(planes.L.device), end.to(planes.L.device), row - 2, params.split
        )
        return codes.flatten(0, 1).cpu(), row, counted_row.repeat(count)

    return paths
