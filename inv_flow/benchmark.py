"""Seconds of a training step and of 100 samples: the published form written plainly against this code, in turns.

    python -m inv_flow.benchmark                          # MNIST flows, L = 2, K = 16, width 512, batch 100
    python -m inv_flow.benchmark --coupling_width 64 --threads 1
    python -m inv_flow.benchmark --amp --json figures.json

A step is forward, backward, clipping and Adam. The published form of Glow: coupling networks in the default memory
layout without in-place activations, a dense multivariate normal, Adam one weight at a time, the allocator as it comes.
The published inverse convolution runs on CUDA alone, so of the flow with it only this code is timed.
`python -m inv_flow.utils.inv_conv_cuda.benchmark` times the op.
"""

import copy
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    sys.path[0:1] = [str(Path(__file__).resolve().parents[1])]
    import common.start  # noqa: F401

import json

import torch
from torch import Tensor, nn
from torch.distributions import MultivariateNormal

from common.benchmark import BenchmarkOptions, Case, run_cases
from common.cuda_graph import CudaGraph, detached
from common.errors import run_command
from common.launch import Distributed
from common.options import from_flags, option
from inv_flow.layers.coupling import Coupling
from inv_flow.layers.flow import FlowSequential
from inv_flow.train.config import Config
from inv_flow.train.experiment import clip_gradients
from inv_flow.train.launch import make_model
from inv_flow.train.optim import make_optimizer


class GlowBenchmarkOptions(BenchmarkOptions):
    """Options of the benchmark."""

    coupling_width: int = option(512, "hidden channels of the couplings", ge=1, le=8192)
    block_size: int = option(16, "K: steps a level", ge=1, le=1024)


class PublishedCoupling(Coupling):
    """The coupling with its network as published."""

    def _scale_and_shift(self, x1: Tensor) -> tuple[Tensor, Tensor]:
        h = self.net(x1)
        return 2 * torch.tanh(h[:, 0::2] / 2), h[:, 1::2]


def published_form(model: nn.Module) -> nn.Module:
    """A copy of a flow with the same weights and the published form of its couplings."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, Coupling):
            module.__class__ = PublishedCoupling
        if isinstance(module, nn.Conv2d):
            module.__class__ = nn.Conv2d
        if isinstance(module, nn.ReLU):
            module.inplace = False
    return model


def flow(options: GlowBenchmarkOptions, glow: bool, device: torch.device) -> tuple[Config, FlowSequential, Tensor]:
    """The MNIST flow and random images (B, 1, 28, 28), after the data-dependent initialisation."""
    config = Config.build(
        {"image_size": (1, 28, 28), "block_size": options.block_size, "coupling_width": options.coupling_width,
         "split_width": options.coupling_width, "conv1x1": True, "inv_conv": not glow, "lr": 1e-8,
         "activation": "Identity" if glow else "Spline", "amp": options.amp, "device": str(device)},
    )  # fmt: skip
    torch.manual_seed(0)
    model = make_model(config).to(device)
    images = torch.randint(0, 256, (options.batch_size or 100, 1, 28, 28), device=device).float()
    with torch.no_grad():
        model.encode(images)
        for module in model.modules():
            if isinstance(module, Coupling):
                module.net[-1].weight.normal_(0, 0.01)  # as if it had been trained
    return config, model, images


def our_step(
    model: FlowSequential, config: Config, images: Tensor, options: GlowBenchmarkOptions
) -> Callable[[], Tensor]:
    """A step of the training loop."""
    optimizer = make_optimizer(model, config)
    noise = torch.rand_like(images)

    def gradients(images: Tensor) -> Tensor:
        optimizer.zero_grad(set_to_none=True)
        loss = -model(images, lambda _: noise)[1].mean()
        loss.backward()
        clip_gradients(model, config)
        return detached(loss)

    graph = CudaGraph(gradients, model.parameters(), Distributed(images.device), options.cuda_graph, print)

    def step() -> Tensor:
        loss = graph(images)
        optimizer.step()
        return loss

    return step


def published_step(model: FlowSequential, config: Config, images: Tensor) -> Callable[[], Tensor]:
    """The published step of the same flow: its own base density, Adam and gradient norm."""
    optimizer = torch.optim.Adam(model.parameters(), lr=config.lr)
    noise = torch.rand_like(images)
    normals = {
        size: MultivariateNormal(torch.zeros(size, device=images.device), torch.eye(size, device=images.device))
        for size in (torch.Size(shape).numel() for shape in model.latent_sizes)
    }

    def step() -> Tensor:
        optimizer.zero_grad()
        latents, log_det = model.encode(images, lambda _: noise)
        log_prob = log_det + sum(normals[z[0].numel()].log_prob(z.flatten(1)) for z in latents)
        loss = -log_prob.sum() / len(images)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), config.grad_clip_norm)
        optimizer.step()
        return loss.detach()

    return step


def step_case(options: GlowBenchmarkOptions, glow: bool, device: torch.device) -> Case:
    """A training step of Glow, or of the flow with the inverse convolution."""
    config, model, images = flow(options, glow, device)
    torch.manual_seed(1)
    published = published_step(published_form(model), config, images) if glow else None
    torch.manual_seed(1)
    ours = our_step(model, config, images, options)
    name = "Glow" if glow else "inverse convolution, splines"
    return Case(f"{name}: step, batch {len(images)}", published, ours, 2e-2 if options.amp else 1e-5)


def sampling_case(options: GlowBenchmarkOptions, glow: bool, device: torch.device) -> Case:
    """Drawing as many samples as a batch has."""
    _, model, images = flow(options, glow, device)
    plain = published_form(model) if glow else None

    def draw(model: FlowSequential) -> Tensor:
        torch.manual_seed(2)
        return model.sample_images(len(images)).mean()

    name = "Glow" if glow else "inverse convolution, splines"
    published = None if plain is None else partial(draw, plain)
    return Case(f"{name}: {len(images)} samples", published, partial(draw, model), 2e-2 if options.amp else 1e-3)


def main(argv: list[str] | None = None) -> None:
    """Run the command line `argv`."""
    options, _ = from_flags(GlowBenchmarkOptions, sys.argv[1:] if argv is None else argv, __doc__)
    if options.dry_run:
        print(json.dumps(options.as_dict(), indent=2))
        return
    run_cases(options, [partial(case, options, glow) for glow in (True, False) for case in (step_case, sampling_case)])


if __name__ == "__main__":
    sys.exit(run_command(main))
