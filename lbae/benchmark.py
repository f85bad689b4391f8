"""CPU seconds of a training step and of the sampler: the published form against this code, in turns.

    python -m lbae.benchmark                                    # the three published steps, and the sampler at D = 1500
    python -m lbae.benchmark --cases mnist --batch-size 512 --threads 2
    python -m lbae.benchmark --cases celeba --amp
    python -m lbae.benchmark --cases hyperplanes directions paths --zsize 200 --rows 4000

A step is input, forward, loss, backward and Adam at the published width. Its published form is the same network with
contiguous tensors, activations that make new ones, and an unfused Adam; that of the sampler is `reference.py`, one code
at a time. Codes are correlated so that, as for trained latents, half of the eigenvalues are negative.
"""

import copy
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Literal
from unittest.mock import patch

if __name__ == "__main__":
    sys.path[0:1] = [str(Path(__file__).resolve().parents[1])]
    import common.start  # noqa: F401

import numpy as np
import torch
import torch.nn.functional as F
from pydantic import Field

from common.benchmark import BenchmarkOptions, Case, run_cases
from common.cuda_graph import CudaGraph
from common.errors import run_command
from common.launch import Distributed
from common.options import from_flags, option
from lbae import celeba, cifar10, mnist
from lbae import model as networks
from lbae.data import as_input
from lbae.model import build_model, to_device
from lbae.options import Params, Width
from lbae.reference import direction_ref, hyperplanes_ref, path_ref
from lbae.sampler import Hyperplanes, directions, hyperplanes, interpolate, moments, sign
from lbae.train import gradients

CONFIGS = {name: script.CONFIGS[f"{name}_bae"] for name, script in
           (("mnist", mnist), ("cifar10", cifar10), ("celeba", celeba))}  # fmt: skip
BATCH = {"mnist": 512, "cifar10": 64, "celeba": 16}  # published: 512; the larger images then take a GPU's memory
Cases = Literal["mnist", "cifar10", "celeba", "hyperplanes", "directions", "paths"]


class Config(BenchmarkOptions):
    """The options."""

    cases: Annotated[list[Cases], Field(min_length=1)] = option(
        ["mnist", "cifar10", "celeba", "hyperplanes", "directions", "paths"], "what to time"
    )
    width: Width = option(64, "base width of the networks (published: 64)")
    zsize: Annotated[int, Field(ge=2, le=16384)] = option(1500, "sampler: latent bits (published: 1500 for CelebA)")
    codes: Annotated[int, Field(ge=2, le=100_000)] = option(20, "sampler: codes, of which half begin a path")
    rows: Annotated[int, Field(ge=2, le=10_000_000)] = option(20000, "sampler: training codes behind the moments")


def step_case(name: str, options: Config, device: torch.device) -> Case:
    """A training step of a configuration on random images."""
    params = Params(**CONFIGS[name], width=options.width, amp=options.amp)
    torch.manual_seed(0)
    published = build_model(params).to(device)
    ours = to_device(copy.deepcopy(published), device)
    batch = options.batch_size or BATCH[name]
    images = torch.randint(0, 256, (batch, params.channels, params.img_size, params.img_size), dtype=torch.uint8,
                           device=device)  # fmt: skip
    plain = torch.optim.Adam(published.parameters(), lr=params.lr, weight_decay=params.l2, foreach=False)
    fused = torch.optim.Adam(ours.parameters(), lr=params.lr, weight_decay=params.l2, fused=True)
    graph = CudaGraph(partial(gradients, ours, fused, params), ours.parameters(), Distributed(device),
                      options.cuda_graph, print)  # fmt: skip

    def published_step():
        x = images.float() / 255
        with patch.object(networks, "activate", partial(F.leaky_relu, negative_slope=networks.SLOPE)):
            xr, encoded = published(x)
        flat, target = xr.flatten(1), x.flatten(1)
        entropy = F.binary_cross_entropy if params.binary_reco_loss else F.mse_loss
        loss = entropy(flat, target, reduction="none").sum() / batch
        encoded.code.detach().cpu().numpy()
        plain.zero_grad()
        loss.backward()
        plain.step()
        return loss.detach()

    def our_step():
        loss, *_ = graph(as_input(images))
        fused.step()
        return loss

    # mnist on one thread: 1.1e-5, since 1 of 12,800 logits is 1.7e-6 and its bit the other one; with equal bits 1e-7
    return Case(f"{name}: training step, batch {batch}", published_step, our_step, 1e-2 if options.amp else 1e-4)


def correlated_codes(n: int, zsize: int, seed: int = 0) -> torch.Tensor:
    """Codes (n, zsize) int8 in {-1, +1}: signs of a random two-layer network of 32 Gaussian inputs, so that bits depend
    on each other as those of a trained encoder do, and no Gaussian has their moments.
    """
    rng = np.random.default_rng(seed)
    hidden = np.tanh(rng.standard_normal((n, 32), np.float32) @ rng.standard_normal((32, 256), np.float32) / 4)
    scores = hidden @ rng.standard_normal((256, zsize), np.float32) / 16 + 0.2 * rng.standard_normal(zsize)
    return torch.from_numpy(np.where(scores > 0, 1, -1).astype(np.int8))


def hyperplanes_case(options: Config, device: torch.device) -> Case:
    """Normals from the training codes."""
    z = correlated_codes(options.rows, options.zsize)
    name = f"hyperplanes, D = {options.zsize}, {options.rows} codes"
    return Case(name, lambda: void(hyperplanes_ref(z.numpy())), lambda: void(hyperplanes(*moments(z.to(device)))))


def published_normals(z: torch.Tensor) -> tuple[Hyperplanes, np.ndarray]:
    """Our planes, and as triangular as the published ones, (D + 1, D + 1)."""
    planes = hyperplanes(*moments(z))
    H = planes.H.numpy()
    return planes, np.linalg.cholesky(H + 1e-8 * np.eye(len(H)))


def directions_case(options: Config, device: torch.device) -> Case:
    """Directions of codes by the published rule; both sides make the same codes of them."""
    z = correlated_codes(options.rows, options.zsize)
    (planes, L), codes = published_normals(z), z[: options.codes]

    def published():
        sides = np.stack([direction_ref(L, code)[1] for code in codes.numpy()])
        return (sides != codes.numpy()).mean()

    def ours():
        return (sign(directions(planes, codes, "mean") @ planes.L[:-1].T) != codes).double().mean()

    return Case(f"directions of {options.codes} codes, split=mean", published, ours, rtol=0.05)


def paths_case(options: Config, device: torch.device, split: str) -> Case:
    """Interpolations of 10 steps; the published form knows split=mean alone."""
    z = correlated_codes(options.rows, options.zsize)
    planes, L = published_normals(z)
    pairs = options.codes // 2
    begin, end = z[:pairs], z[pairs : 2 * pairs]

    def published():
        for first, last in zip(begin.numpy(), end.numpy(), strict=True):
            path_ref(L, first, last, 10)

    name = f"{pairs} paths of 10 steps, split={split}{' (default)' if split == 'margin' else ''}"
    return Case(name, published, lambda: void(interpolate(planes, begin, end, 10, split)))


def void(_: object) -> None:
    """Nothing: what was timed has no loss."""


def cases(options: Config) -> Iterator[Callable[[torch.device], Case]]:
    for name in options.cases:
        if name in CONFIGS:
            yield partial(step_case, name, options)
        elif name == "paths":
            yield from (partial(paths_case, options, split=split) for split in ("mean", "margin"))
        else:
            yield partial({"hyperplanes": hyperplanes_case, "directions": directions_case}[name], options)


def main(argv: list[str] | None = None) -> None:
    options, _ = from_flags(Config, sys.argv[1:] if argv is None else argv, __doc__)
    if options.dry_run:
        print(options.model_dump_json(indent=2))
        return
    run_cases(options, cases(options))


if __name__ == "__main__":
    sys.exit(run_command(main))
