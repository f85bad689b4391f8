"""What a flow is judged by: likelihood, reconstruction error, float32 against float64, pictures, times.

Each uses random numbers of its own, so that it neither depends on nor changes those of training.
"""

import copy
import math
import statistics
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.checkpoint import append_text
from common.errors import NonFiniteError
from common.images import mosaic, save_image
from common.launch import Distributed
from inv_flow.layers.flow import bits_per_dim
from inv_flow.layers.inv_conv import InverseConv2d
from inv_flow.layers.selfnorm import SelfNormConv
from inv_flow.model import FlowModel
from inv_flow.train.config import Config

SAMPLINGS = 3  # timed draws of a sample grid


def batches_of(loader: Any, epoch: int = 0, start: int = 0) -> Iterator[Any]:
    """Batches `start`, `start` + 1, ... of an epoch of any kind of loader."""
    if hasattr(loader, "epoch"):
        return loader.epoch(epoch, start)
    return (batch for index, batch in enumerate(loader) if index >= start)


def integer_images(batch: Any, model: FlowModel, device: torch.device) -> Tensor:
    """The images of a batch (tensors, or (images, targets)) as integers 0..levels-1 in the model's precision."""
    images = batch[0] if isinstance(batch, (tuple, list)) else batch
    x = images.to(device, non_blocking=True).to(next(model.parameters()).dtype)
    # 8-bit grey levels to 0..levels-1; 17 levels give back scikit-learn's digits exactly
    return x if model.levels == 256 else (x * (model.levels / 256)).floor()


@contextmanager
def own_rng(device: torch.device, seed: int) -> Iterator[None]:
    """A stream of random numbers that starts from `seed` and leaves the others as they were."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def sum_device(dist: Distributed) -> torch.device:
    """Where float64 sums live: MPS has none."""
    return torch.device("cpu") if dist.device.type == "mps" else dist.device


class Rows:
    """Uniform noise for this process's rows of a batch, as one process would draw it, whatever each process holds."""

    def __init__(self, x: Tensor, dist: Distributed):
        counts = (
            dist.gather(torch.tensor([len(x)], device=x.device), equal=True).tolist() if dist.world > 1 else [len(x)]
        )
        self.total, self.first = sum(counts), sum(counts[: dist.rank])

    def __call__(self, x: Tensor) -> Tensor:
        noise = torch.rand((self.total, *x.shape[1:]), dtype=x.dtype, device=x.device)
        return noise[self.first : self.first + len(x)]


@torch.no_grad()
def likelihood(
    model: FlowModel, loader: Any, config: Config, dist: Distributed, split: str, draws: int = 1
) -> dict[str, float]:
    """Mean NLL (`<split>_nll`, nats) and bits/dim (`<split>_bpd`), each image's log p averaged over `draws` draws.

    The noise does not depend on the number of processes. Raises NonFiniteError when the mean is not finite.
    """
    was_training = model.training
    model.eval()
    total, count, seen = torch.zeros((), dtype=torch.float64, device=sum_device(dist)), 0, 0
    with own_rng(dist.device, config.seed + 1):
        for batch in batches_of(loader):
            x = integer_images(batch, model, dist.device)
            rows = Rows(x, dist)
            for _ in range(draws if len(x) else 0):
                total -= model(x, rows)[1].to(total).sum() / draws
            count, seen = count + len(x), seen + rows.total
            if config.max_eval_ex is not None and seen >= config.max_eval_ex:
                break
    model.train(was_training)
    nll = float(dist.sum(total)) / float(dist.sum(float(count)))
    if not math.isfinite(nll):
        raise NonFiniteError(f"the {split} NLL is {nll}: these weights are spoilt; go on from an earlier checkpoint")
    bits = float(bits_per_dim(torch.tensor(-nll), math.prod(model.image_size)))
    return {f"{split}_nll": nll, f"{split}_bpd": bits}


@torch.no_grad()
def reconstruction_error(model: FlowModel, x: Tensor, seed: int) -> tuple[float, float]:
    """Largest and mean |x - decode(encode(x))| in grey levels, before rounding, of integer images x (B, C, H, W)."""
    with own_rng(x.device, seed + 2):
        noisy = model.dequantize(x)
    error = (model.density().reconstruct(noisy) - noisy).abs()
    return float(error.max()), float(error.mean())


def reconstruction_errors(model: FlowModel, loader: Any, config: Config, dist: Distributed) -> dict[str, float]:
    """`reconstruction_error` over a whole split (up to max_eval_ex images), and the number of its images."""
    largest, total, count = 0.0, 0.0, 0
    for batch in batches_of(loader):
        x = integer_images(batch, model, dist.device)
        if len(x):
            most, mean = reconstruction_error(model, x, config.seed)
            # a NaN is larger than any number
            largest, total = (most if not most <= largest else largest), total + mean * len(x)
        count += len(x)
        if config.max_eval_ex is not None and count * dist.world >= config.max_eval_ex:
            break
    every = dist.gather(torch.tensor([[largest, total, count]], dtype=torch.float64, device=sum_device(dist)))
    largest, (total, count) = float(every[:, 0].max()), every[:, 1:].sum(0).tolist()
    return {"recon_max_grey": largest, "recon_mean_grey": total / count, "recon_images": int(count)}


@torch.no_grad()
def rounding_error(model: FlowModel, x: Tensor, dist: Distributed, seed: int) -> float:
    """Largest |log p - log p in float64| / |log p| of integer images x (B, C, H, W)."""
    with own_rng(dist.device, seed + 2):
        noisy = model.dequantize(x)
    flow, device = model.density(), sum_device(dist)
    exact = copy.deepcopy(flow).to(device, torch.float64)(noisy.to(device, torch.float64))[1]
    return float(((flow(noisy)[1].to(exact) - exact) / exact).abs().max())


def layer_outputs(model: FlowModel, x: Tensor) -> Iterator[tuple[str, Tensor, Tensor]]:
    """(index and name, output, log-determinant (B,)) of every layer on integer images x (B, C, H, W)."""
    for index, layer in enumerate(model.layers):
        if hasattr(layer, "split"):
            x, _, log_det = layer.split(x)
        else:
            x, log_det = layer(x)
        yield f"{index}_{type(layer).__name__}", x, log_det


@torch.no_grad()
def layer_values(model: FlowModel, x: Tensor, seed: int) -> dict[str, float]:
    """`log_det/<layer>`, the mean log-determinant (nats) of each layer on integer images x (B, C, H, W), and
    `recon/<layer>`, the reconstruction loss ||x - R W x||^2 of each self-normalising layer on its own input.
    """
    was_training, values, before = model.training, {}, x
    model.eval()  # the exact log-determinants
    with own_rng(x.device, seed):
        for layer, (name, after, log_det) in zip(model.layers, layer_outputs(model, x), strict=True):
            values[f"log_det/{name}"] = float(log_det.mean())
            if isinstance(layer, SelfNormConv):
                values[f"recon/{name}"] = float(layer.reconstruction_loss(before))
            before = after
    model.train(was_training)
    return values


@torch.no_grad()
def sample_pictures(model: FlowModel, config: Config, folder: Path, name: str) -> tuple[list[str], dict[str, Any]]:
    """samples/<name>.png and, for self-normalising layers, <name>_trueinv.png by their exact inverse.

    Returns what there is to say, and {suffix: (picture, median milliseconds of a grid, standard deviation)}.
    """
    said, made = [], {}
    columns, top = max(1, round(math.sqrt(config.n_samples))), model.levels - 1
    device = next(model.parameters()).device
    inverses = [(False, "")]
    if model.self_norm_layers() and config.sample_true_inv:
        inverses.append((True, "_trueinv"))
    for exact, suffix in inverses:
        model.set_exact(exact)
        times = []
        for _ in range(SAMPLINGS if config.log_timing else 1):
            started = time.perf_counter()
            with own_rng(device, config.seed + 3):
                samples = model.sample_images(config.n_samples, config.temperature).float().cpu()
            times.append(1000 * (time.perf_counter() - started))
        bad = int((~torch.isfinite(samples)).flatten(1).any(1).sum())
        if bad:
            said.append(f"{bad} of {len(samples)} samples{suffix} are not finite (drawn black)")
        picture = mosaic(torch.nan_to_num(samples) / top, columns)
        save_image(folder / config.sample_dir / f"{name}{suffix}.png", picture)
        made[suffix] = (picture, statistics.median(times), statistics.pstdev(times))
    model.set_exact(not config.modified_grad)
    return said, made


@torch.no_grad()
def reconstruction_picture(model: FlowModel, x: Tensor, path: Path) -> None:
    """Images x (B, C, H, W), their reconstructions and the absolute differences, a row each."""
    top = model.levels - 1
    back = model.reconstruct(x)
    rows = torch.cat([x, back.clamp(0, top), (x - back).abs().clamp(0, top)]).float().cpu() / top
    save_image(path, mosaic(torch.nan_to_num(rows), len(x)))


def kernel_picture(model: FlowModel, path: Path) -> None:
    """The free taps of the first inverse convolution, one tile for each channel pair; nothing where there is none."""
    layer = next((module for module in model.modules() if isinstance(module, InverseConv2d)), None)
    if layer is None:
        return
    taps = (layer.kernel() - layer.pin).detach().cpu().flatten(0, 1)[:, None]  # (C C/G, 1, kh, kw)
    taps = 0.5 + taps / (2 * taps.abs().max().clamp(min=1e-12))
    enlarged = taps.repeat_interleave(8, 2).repeat_interleave(8, 3)
    save_image(path, mosaic(enlarged, layer.channels // layer.groups))


class StepTimes:
    """Times of training steps in milliseconds, without making the host wait for a GPU."""

    def __init__(self, device: torch.device):
        self.cuda, self.marks = device.type == "cuda", []

    def mark(self) -> None:
        """A step begins here, and the one before it ends."""
        if self.cuda:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            self.marks.append(event)
        else:
            self.marks.append(time.perf_counter())

    def summary(self) -> dict[str, float]:
        """Mean and standard deviation of the steps marked since the last call, the last of which ends now."""
        if self.marks:
            self.mark()
        marks, self.marks = self.marks, []
        if self.cuda and marks:
            torch.cuda.synchronize()
        times = [a.elapsed_time(b) if self.cuda else 1000 * (b - a) for a, b in pairwise(marks)]
        if not times:
            return {}
        return {"train_step_ms": statistics.fmean(times), "train_step_std_ms": statistics.pstdev(times)}


def log_times(folder: Path, epoch: int, values: dict[str, float]) -> None:
    """Rows `epoch,what,value` in timing.csv."""
    path = folder / "timing.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    head = "" if path.exists() else "epoch,what,value\n"
    append_text(path, head + "".join(f"{epoch},{name},{value:.4f}\n" for name, value in values.items()))
