"""Seconds of a training step of the flow and of a fixed point iteration: as published against this code, in turns.

    python -m nfpi.benchmark                                     # MNIST, CIFAR-10 in batches of 16; the iteration
    python -m nfpi.benchmark --cases cifar10 --batch-size 64 --threads 2
    python -m nfpi.benchmark --cases mnist --amp
    python -m nfpi.benchmark --cases iteration --classes 10 --repeat 20

A step is forward, loss, backward, Adamax and the average of the weights, at the published size of the networks
(`reference.py` is the published form). The iteration's published form is a loop over pairs of classes.
"""

import copy
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

if __name__ == "__main__":
    sys.path[0:1] = [str(Path(__file__).resolve().parents[1])]
    import common.start  # noqa: F401

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from common.benchmark import BenchmarkOptions, Case, run_cases
from common.cuda_graph import CudaGraph
from common.errors import run_command
from common.launch import Distributed
from common.options import from_flags, option
from nfpi import augment, reference
from nfpi.conditional import ConditionalFlow
from nfpi.config import config_place, resolve
from nfpi.ema import PowerEma
from nfpi.fpi import FixedPoint, step, step_ref
from nfpi.gaussians import ClassGaussians
from nfpi.matrix_exp import coarse
from nfpi.model import MultiScaleFlow
from nfpi.train import gradients

MODES = {
    "means, isotropic": {"means": True, "variances": False, "isotropic": True},
    "means, anisotropic": {"means": True, "variances": False, "isotropic": False},
    "means and variances": {"means": True, "variances": True, "isotropic": False, "sum_trick": False},
    "means and variances, sum trick": {"means": True, "variances": True, "isotropic": True, "sum_trick": True},
}
FILES = {"mnist": "mean_and_var", "cifar10": "mean"}
BATCH = 16  # published: 1024 and 512, which a GPU holds


class Config(BenchmarkOptions):
    """The options."""

    cases: Annotated[list[Literal["mnist", "cifar10", "transforms", "iteration"]], Field(min_length=1)] = option(
        ["mnist", "cifar10", "transforms", "iteration"], "what to time"
    )
    flows: Annotated[int, Field(ge=1, le=256)] = option(8, "flow steps a level (published: 8)")
    classes: Annotated[int, Field(ge=2, le=10_000)] = option(100, "iteration: classes K")
    dim: Annotated[int, Field(ge=1, le=10**7)] = option(3072, "iteration: latent dimensions d")


def training_steps(
    published: MultiScaleFlow, model: ConditionalFlow, x: Tensor, y: Tensor, graph: bool
) -> tuple[Callable[[], Tensor], Callable[[], Tensor]]:
    """A step of training of both forms; the learning rate is too small to move anything."""

    def step(flow: MultiScaleFlow, compute: Callable[[torch.optim.Optimizer], Callable[[], Tensor]]):
        optimizer, average = torch.optim.Adamax(flow.parameters(), lr=1e-12), PowerEma(flow, update_after_step=-1)
        gradients_of = compute(optimizer)

        def run() -> Tensor:
            loss = gradients_of()
            optimizer.step()
            average.update(flow)
            return loss

        return run

    def plain(optimizer: torch.optim.Optimizer) -> Callable[[], Tensor]:
        def run() -> Tensor:
            loss = reference.loss(published, model.gaussians, x, y)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            return loss.detach()

        return run

    def ours(optimizer: torch.optim.Optimizer) -> Callable[[], Tensor]:
        compute = partial(gradients, model, model.flow, optimizer, 1)
        graphs = CudaGraph(compute, model.flow.parameters(), Distributed(x.device), graph, print)

        def run() -> Tensor:
            bounds = coarse(model.flow.bounds()) if graphs.active else None
            return (graphs(x, y, len(x), bounds) if bounds else compute(x, y, len(x)))[0]

        return run

    return step(published, plain), step(model.flow, ours)


def step_case(name: str, options: Config, device: torch.device) -> Case:
    """A training step of the configuration of data set `name`."""
    config = resolve(
        *config_place(f"___configs/{name}", FILES[name]), [f"num_flows=[{','.join([str(options.flows)] * 3)}]"]
    )
    np.random.seed(0)
    torch.manual_seed(0)
    batch = options.batch_size or BATCH
    flow = MultiScaleFlow(config.flow())
    x, y = (
        2 * torch.rand(batch, flow.config.channels, flow.config.height, flow.config.width) - 1,
        torch.arange(batch) % config.dataset.num_classes,
    )
    flow.initialise(x)
    x, y, flow = x.to(device), y.to(device), flow.to(device)
    shape = config.dataset.num_classes, flow.config.latent_dim
    gaussians = ClassGaussians(0.1 * torch.randn(shape), 0.5 + torch.rand(shape)).to(device)
    published = copy.deepcopy(flow)
    flow.use_amp(options.amp)
    model = ConditionalFlow(flow, gaussians)
    return Case(
        f"{name}, training step of {batch} images",
        *training_steps(published, model, x, y, options.cuda_graph),
        rtol=3e-2 if options.amp else 1e-5,
    )


def transforms_case(options: Config, device: torch.device) -> Case:
    """The transforms of one CIFAR-10 batch, which a step waits for."""
    batch = options.batch_size or BATCH
    rng = torch.Generator(device).manual_seed(0)
    pixels = torch.randint(0, 256, (batch, 3, 32, 32), dtype=torch.uint8, device=device, generator=rng)
    recipe = augment.RECIPES["cifar"]

    def run() -> None:
        augment.for_training(pixels, recipe, augment.Draws.make(recipe, batch, rng))

    return Case(f"cifar10, transforms of {batch} images", None, run)


def iteration_case(name: str, options: Config, device: torch.device) -> Case:
    """One fixed point iteration; the results of both forms are compared by their sums."""
    rng = torch.Generator().manual_seed(0)

    def random() -> Tensor:
        return torch.randn(options.classes, options.dim, generator=rng, dtype=torch.float64).to(device)

    mean, data_mean = random(), random()
    var, data_var = (0.5 + random().square() for _ in range(2))
    inputs = mean, var, data_mean, data_var, FixedPoint(strength=1000.0, **MODES[name])
    return Case(f"iteration: {name}", lambda: _total(step_ref(*inputs)), lambda: _total(step(*inputs)), rtol=1e-9)


def _total(results: tuple[Tensor, ...]) -> Tensor:
    return sum(part.square().sum() for part in results[:2])


def cases(options: Config) -> Iterator[Callable[[torch.device], Case]]:
    """What is timed, one after the other."""
    for name in options.cases:
        if name in FILES:
            yield partial(step_case, name, options)
        elif name == "transforms":
            yield partial(transforms_case, options)
        else:
            yield from (partial(iteration_case, mode, options) for mode in MODES)


def main(argv: list[str] | None = None) -> None:
    """Read the command line and print one line a case."""
    options, _ = from_flags(Config, sys.argv[1:] if argv is None else argv, __doc__)
    if options.dry_run:
        print(options.model_dump_json(indent=2))
        return
    run_cases(options, cases(options))


if __name__ == "__main__":
    sys.exit(run_command(main))
