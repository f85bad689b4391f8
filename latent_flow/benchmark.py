"""Seconds of one training step of each variant: the published step transcribed plainly against this code, in turns.

    python -m latent_flow.benchmark                                       # batch 128, latent size 324, as published
    python -m latent_flow.benchmark --batch-size 16 --threads 1 --variants supervised weakly
    python -m latent_flow.benchmark --batch-size 32 --latent-size 32 --amp
    python -m latent_flow.benchmark --logdet --batch-size 16              # cost of the log-determinants instead

A step is forward, backward and Adam. The published form is `reference.training_step_ref` with one Adam a part and, as
published, anomaly detection for the supervised variant; ours is the training loop's step with `--objective upstream`
(the same loss, compared before it is timed) and, alone, with the default objective.
"""

import copy
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    sys.path[0:1] = [str(Path(__file__).resolve().parents[1])]
    import common.start  # noqa: F401

from typing import Literal

import torch
from torch import Tensor

from common.benchmark import BenchmarkOptions, Case, run_cases
from common.cuda_graph import CudaGraph, detached
from common.errors import run_command
from common.launch import Distributed
from common.options import option
from latent_flow.fields import Flows
from latent_flow.model import VARIANTS, Config, LatentFlow, LatentSize, Noise, training_step
from latent_flow.options import is_dry, parse_tool
from latent_flow.reference import training_step_ref
from latent_flow.rollout import log_abs_det
from latent_flow.train import make_optimizer


class FlowBenchmarkOptions(BenchmarkOptions):
    """Options of the benchmark."""

    variants: list[Literal[VARIANTS]] = option(list(VARIANTS), "variants to time", min_length=1)
    latent_size: LatentSize = option(324, "latent size")
    logdet: bool = option(False, "time the log-determinants")


def published_step(model: LatentFlow, frames: Tensor, noise: Noise) -> Callable[[], Tensor]:
    """One published step: an optimizer a part, anomaly detection for the supervised variant."""
    parts = [[*model.support_sets.parameters(), *model.prior.parameters()], list(model.vae.parameters())]
    if model.reconstructor is not None:
        parts.append(list(model.reconstructor.parameters()))
    optimizers = [torch.optim.Adam(part, lr=1e-4) for part in parts]

    def step() -> Tensor:
        with torch.autograd.set_detect_anomaly(model.config.variant == "supervised"):
            loss = training_step_ref(model, frames, 0, noise)
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()
        return loss.detach()

    return step


def our_step(model: LatentFlow, frames: Tensor, noise: Noise, options: FlowBenchmarkOptions) -> Callable[[], Tensor]:
    """One step of the training loop."""
    optimizer = make_optimizer(model, Namespace(support_set_lr=1e-4, lr_vae=1e-4, lr_index=1e-4))
    labels = (
        0 if model.config.objective == "upstream" else torch.zeros(frames.shape[1], dtype=torch.long).to(frames.device)
    )

    def gradients(frames: Tensor) -> Tensor:
        loss = training_step(model, frames, labels, 1, noise, amp=options.amp)["loss_total"]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        return detached(loss)

    graph = CudaGraph(gradients, model.parameters(), Distributed(frames.device), options.cuda_graph, print)

    def step() -> Tensor:
        loss = graph(frames)
        optimizer.step()
        return loss

    return step


def step_case(options: FlowBenchmarkOptions, variant: str, objective: str, device: torch.device) -> Case:
    """The step of one variant, with complete random numbers."""
    torch.manual_seed(0)
    batch = options.batch_size or 128
    config = Config(variant=variant, latent_size=options.latent_size, objective=objective)
    model = LatentFlow(config).to(device)
    frames = torch.rand(config.steps + 1, batch, config.channels, config.image_size, config.image_size, device=device)
    shape = (batch, config.flows) if variant == "weakly" else (config.steps, 2, batch, config.flows)
    noise = Noise(torch.randn(batch, config.latent_size, device=device), torch.rand(shape, device=device), 0.5)
    ours = our_step(copy.deepcopy(model), frames, noise, options)
    if objective == "paper":
        return Case(f"{variant}, default objective", None, ours)
    return Case(
        f"{variant}, the published loss", published_step(model, frames, noise), ours, 1e-2 if options.amp else 1e-5
    )


def log_det_case(options: FlowBenchmarkOptions, mode: str, device: torch.device) -> Case:
    """Forward and backward of one log-determinant of three mixed flows."""
    torch.manual_seed(0)
    batch, latent = options.batch_size or 128, options.latent_size
    flows = Flows(3, latent, "soft").to(device)
    z, c = torch.randn(batch, latent, device=device), torch.rand(batch, 3, device=device)

    def step() -> None:
        start = z.clone().requires_grad_()
        log_abs_det(flows(torch.arange(2, device=device)).at(start, 1), c, c, mode).sum().backward()

    return Case(f"log-determinant {mode}", None, step)


def cases(options: FlowBenchmarkOptions) -> Iterator[Callable[[torch.device], Case]]:
    """What the options ask for, built when its turn comes."""
    if options.logdet:
        yield from (partial(log_det_case, options, mode) for mode in ("rowsum", "hutchinson", "trace", "exact"))
        return
    for variant in options.variants:
        yield from (partial(step_case, options, variant, objective) for objective in ("upstream", "paper"))


def main(argv: list[str] | None = None) -> None:
    """Command line of the benchmark."""
    options = parse_tool(FlowBenchmarkOptions, argv, __doc__)
    if not is_dry(options):
        run_cases(options, cases(options))


if __name__ == "__main__":
    sys.exit(run_command(main))
