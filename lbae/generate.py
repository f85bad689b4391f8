"""Generate images: by random hyperplanes, along interpolations, from independent or fair bits."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.batches import Batches
from common.checkpoint import atomic_write
from common.errors import UserError, suggest
from common.images import mosaic, save_image, save_images
from common.launch import Distributed, autocast
from lbae import sampler
from lbae.data import load_split
from lbae.experiment import Latents, check_images, new_images
from lbae.model import LBAE
from lbae.options import Params
from lbae.reconstruct import load_trained, run_set, write_epoch

COLUMNS = 8  # of a mosaic of samples
DECODE = 1024  # codes decoded at once
Codes = tuple[Tensor, int, Tensor]  # codes (N, D), columns of their mosaic, which of them count as generated (N,) bool


@dataclass
class Trained:
    """A trained experiment: its options, folder, network, and the checkpoint's other entries."""

    params: Params
    folder: Path
    model: LBAE
    state: dict[str, Any]
    device: torch.device

    def encode(self, split: str) -> Latents:
        """Codes of the whole training or test set in evaluation mode."""
        data = load_split(self.params, split)
        params = self.params.with_changes(batch_size_test=DECODE)
        batches = Batches(data, DECODE, shuffle=False, drop_last=False, workers=params.workers, device=self.device)
        found = run_set(params, self.model, batches, data, Distributed(self.device))
        return found.latents(self.state["epoch"], self.state["iter"])

    def training_latents(self) -> Latents:
        """The codes that `latents=` names; a warning when they were made by other weights than those loaded."""
        if self.params.latents == "refresh":
            return self.encode("train")
        name = "latents-last.npz" if self.params.latents == "last" else "latents.npz"
        latents, (epoch, iter) = Latents.load(self.folder / name), (self.state["epoch"], self.state["iter"])
        if latents.codes.shape[1] != self.params.zsize:
            raise UserError(
                f"the latents have {latents.codes.shape[1]} bits, the model {self.params.zsize}; use latents=refresh"
            )
        if latents.epoch >= 0 and (latents.epoch, latents.iter) != (epoch, iter):
            print(f"warning: the latents are of epoch {latents.epoch}, the weights of epoch {epoch}; latents=refresh "
                  "encodes the training set with these weights")  # fmt: skip
        return latents

    @torch.no_grad()
    def decode(self, codes: Tensor) -> Tensor:
        """Images (N, C, S, S) in [0, 1] on the CPU of codes (N, D)."""
        parts = []
        for part in codes.split(DECODE):
            with autocast(self.device, self.params.amp):
                parts.append(self.model.gen(part.to(self.device, torch.float32)).float().cpu())
        return torch.cat(parts)


def attribute_number(attribute: int | str, names: Sequence[str]) -> int:
    """The number of an attribute or class, by number or by name. Raises UserError for a name that is not known."""
    if isinstance(attribute, int):
        return attribute
    if attribute not in names:
        known = f"there are {', '.join(names)}" if names else "these weights know no names: give the number"
        raise UserError(f"set_attr={attribute}: no attribute or class of this name{suggest(attribute, names)}; {known}")
    return names.index(attribute)


def generate(params: Params, folder: Path) -> None:
    """Write `gen_imgs` images of `sample_method` to generated/samples_<method>/ and a mosaic a batch to generated/.

    Images of an earlier call give way only when all is done.
    """
    check_generator(params)
    trained = Trained(params, folder, *load_trained(params, folder))
    state, method, attribute = trained.state, params.sample_method, params.sets_attribute
    if attribute:
        number = attribute_number(params.set_attr, state.get("attribute_names", []))
        params = trained.params = params.with_changes(set_attr=number)
    samples = folder / "generated" / f"samples_{method}{f'_attr_{params.set_attr}' if attribute else ''}"
    stem = f"_{method}{f'_attr_{float(params.set_attr)}' if attribute else ''}.jpg"
    check_images(samples)
    with new_images(samples, params.img_format) as new:
        written, batch = 0, 0
        draw = code_source(trained)
        while written < params.gen_imgs:
            codes, columns, counted = draw(params.gen_imgs - written)
            images = trained.decode(codes)
            kept = images[counted][: params.gen_imgs - written]
            save_images(new, kept, written, params.img_format)
            shown = images if method == "int" else images[: COLUMNS**2]
            picture = mosaic(shown, columns, stretch=params.stretch)
            save_image(folder / "generated" / f"sample_{batch}{stem}", picture, quality=90)
            written, batch = written + len(kept), batch + 1
    for old in _numbered(folder / "generated", batch, stem):
        old.unlink()
    note = folder / "fid-epoch.txt"
    if not (note.is_file() and note.read_text().startswith(f"e:{state['epoch']} ")):
        write_epoch(folder, state["epoch"], state["loss_eval"])
    print(f"epoch {state['epoch']}: {written} images of {method} in {samples}", flush=True)


def _numbered(folder: Path, number: int, stem: str) -> Iterator[Path]:
    """Mosaics of an earlier call with more batches."""
    while (path := folder / f"sample_{number}{stem}").is_file():
        yield path
        number += 1


def check_generator(params: Params) -> None:
    """Refuse a generator of bits for a model that has none."""
    if params.sample_method != "random" and not params.has_bits:
        raise UserError(f"sample_method={params.sample_method} needs bits; for this model use sample_method=random")


def code_source(trained: Trained) -> Callable[[int], Codes]:
    """A function that gives the next batch of codes for at most so many images, by `sample_method`.

    Raises UserError when latents are missing.
    """
    params, device = trained.params, trained.device
    method, d = params.sample_method, params.zsize
    generator = torch.Generator().manual_seed(params.seed)

    def batches_of(draw: Callable[[int], Tensor]) -> Callable[[int], Codes]:
        def next_batch(left: int) -> Codes:
            codes = draw(min(params.batch_size_test, left)).cpu()
            return codes, COLUMNS, torch.ones(len(codes), dtype=torch.bool)

        return next_batch

    if method == "random" and params.vae:
        return batches_of(lambda n: torch.randn(n, d, generator=generator))
    if method == "random":
        limits = (params.zclamp_min, params.zclamp, params.zround)
        return batches_of(lambda n: sampler.fair_bits((n, d), generator, *limits))

    latents = trained.training_latents()
    codes = latents.codes.to(device if device.type != "mps" else "cpu")
    if method == "independent":
        mean, _ = sampler.moments(codes)
        return batches_of(lambda n: sampler.independent_bits(mean, n, generator))
    fitted = sampler.HyperplaneSampler(params.split).fit(codes, latents.labels)
    planes = fitted.planes
    errors, negative = planes.moment_errors(), int((planes.eigenvalues < 0).sum())
    print(f"hyperplanes from {len(latents.codes)} codes: {negative} of {d + 1} eigenvalues negative; their repair "
          f"moves bit means by {errors[0]:.4f} and second moments by {errors[1]:.4f} on average")  # fmt: skip
    if method == "cov":
        return batches_of(lambda n: fitted.sample(n, generator))
    return interpolations(trained, fitted, latents)


def interpolations(trained: Trained, fitted: sampler.HyperplaneSampler, latents: Latents) -> Callable[[int], Codes]:
    """Paths between two codes, or from a code to itself with an attribute set."""
    params, mean = trained.params, None
    if params.sets_attribute:
        try:
            mean = fitted.attribute_mean(params.set_attr, params.attr_mode).cpu()
        except UserError as error:
            raise UserError(f"set_attr={params.set_attr}: {error}") from error
        order = mean.argsort()
        with atomic_write(trained.folder / f"prob_dim_{params.set_attr}.npz") as file:
            np.savez(file, bits=order.numpy(), means=mean[order].numpy())
    ends = latents if params.int_source == "train" else trained.encode("test")
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
            end = fitted.set_attribute(begin, params.set_attr, params.attr_threshold, params.attr_mode)
        codes = fitted.interpolate(begin, end, row - 2)
        return codes.flatten(0, 1).cpu(), row, counted_row.repeat(count)

    return paths
