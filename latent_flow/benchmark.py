"""Seconds of one training step of each variant at the paper's size: the plain transcription against this code.

    python -m latent_flow.benchmark                               # batch 128, all variants (an hour on a CPU)
    python -m latent_flow.benchmark --batch-size 16 --variants supervised weakly
    python -m latent_flow.benchmark --no-keep-memory              # what the training loop's memory setting saves
    python -m latent_flow.benchmark --logdet                      # cost of the log-determinants instead
    python -m latent_flow.benchmark --errors --latent-size 128 --batch-size 16   # float32 gradients against float64

A step is forward, backward and Adam. `ref` is `reference.training_step_ref` with one Adam a part and, as published,
anomaly detection for the supervised variant. `same` is the fast step with `--objective upstream`, `paper` the default
objective, `amp` the default objective with `--amp`. Each runs in a process of its own, all with the memory setting of
the training loop. Two lines a variant: CPU seconds of that process, which other load changes least, and seconds on
the clock.
"""

import copy
import sys
import time
from collections.abc import Callable
from pathlib import Path

if __name__ == "__main__":
    sys.path[0:1] = [str(Path(__file__).resolve().parents[1])]
    import common.start  # noqa: F401

from argparse import Namespace
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from typing import Annotated, Literal

import torch
from annotated_types import Ge, Le

from common.errors import run_command
from common.launch import keep_freed_memory
from common.options import Options, option
from latent_flow import fast_conv
from latent_flow.fields import Flows
from latent_flow.model import VARIANTS, Config, LatentFlow, LatentSize, Noise, training_step
from latent_flow.options import is_dry, parse_tool
from latent_flow.reference import training_step_ref
from latent_flow.rollout import log_abs_det
from latent_flow.train import make_optimizer

CASES = ("ref", "same", "paper", "amp")


def seconds(step: Callable[[], None], repeat: int) -> tuple[float, float]:
    """CPU seconds of this process and seconds on the clock: the least of `repeat` runs, after a warm-up if above 1."""
    if repeat > 1:
        step()
    cpu, wall = [], []
    for _ in range(repeat):
        start = time.process_time(), time.perf_counter()
        step()
        cpu.append(time.process_time() - start[0])
        wall.append(time.perf_counter() - start[1])
    return min(cpu), min(wall)


def noise_for(model: LatentFlow, steps: int, batch: int) -> Noise:
    """Complete random numbers of one step."""
    config = model.config
    heads = 1 if config.single_control else 2
    shape = (batch, config.flows) if config.variant == "weakly" else (steps, heads, batch, config.flows)
    return Noise(torch.randn(batch, config.latent_size), torch.rand(shape), 0.5)


def reference_step(model: LatentFlow, frames: torch.Tensor, noise: Noise) -> Callable[[], None]:
    """One published step: three optimizers, anomaly detection for the supervised variant."""
    parts = [[*model.support_sets.parameters(), *model.prior.parameters()], list(model.vae.parameters())]
    if model.reconstructor is not None:
        parts.append(list(model.reconstructor.parameters()))
    optimizers = [torch.optim.Adam(part, lr=1e-4) for part in parts]

    def step() -> None:
        with torch.autograd.set_detect_anomaly(model.config.variant == "supervised"):
            loss = training_step_ref(model, frames, 0, noise)
            for optimizer in optimizers:
                optimizer.zero_grad()
            loss.backward()
            for optimizer in optimizers:
                optimizer.step()

    return step


def fast_step(model: LatentFlow, frames: torch.Tensor, noise: Noise, amp: bool) -> Callable[[], None]:
    """One step of the training loop."""
    optimizer = make_optimizer(model, Namespace(support_set_lr=1e-4, lr_vae=1e-4, lr_index=1e-4))
    labels = 0 if model.config.objective == "upstream" else torch.randint(model.config.flows, (frames.shape[1],))

    def step() -> None:
        losses = training_step(model, frames, labels, 1, noise, amp=amp)
        optimizer.zero_grad(set_to_none=True)
        losses["loss_total"].backward()
        optimizer.step()

    return step


def benchmark_case(
    case: str, variant: str, batch: int, latent: int, repeat: int, threads: int, keep_memory: bool
) -> tuple[float, float]:
    """Seconds of one step of one case, as `seconds` gives them."""
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    if keep_memory:
        keep_freed_memory()
    config = Config(variant=variant, latent_size=latent, objective="upstream" if case in ("ref", "same") else "paper")
    model = LatentFlow(config)
    frames = torch.rand(config.steps + 1, batch, config.channels, config.image_size, config.image_size)
    noise = noise_for(model, config.steps, batch)
    if case == "ref":
        return seconds(reference_step(model, frames, noise), repeat)
    return seconds(fast_step(model, frames, noise, case == "amp"), repeat)


def benchmark_steps(
    variants: list[str], batch: int, latent: int, repeat: int, threads: int, keep_memory: bool = True
) -> list[str]:
    """Two lines a variant: CPU and clock seconds of the reference and of the fast steps, and their ratios."""
    columns = " ".join(f"{case:>8}" for case in CASES)
    lines = [f"{'variant':>13} {'batch':>5} {'clock':>5} {columns}   ref/same ref/paper ref/amp ({threads} threads)"]
    print(lines[0], flush=True)
    for variant in variants:
        times = []
        for case in CASES:
            with ProcessPoolExecutor(1, get_context("spawn")) as pool:
                case_args = (case, variant, batch, latent, repeat, threads, keep_memory)
                times.append(pool.submit(benchmark_case, *case_args).result())
        for clock, values in zip(("cpu", "wall"), zip(*times, strict=True), strict=True):
            ratios = "   ".join(f"{values[0] / value:.2f}" for value in values[1:])
            shown = " ".join(f"{value:>8.2f}" for value in values)
            lines.append(f"{variant:>13} {batch:>5} {clock:>5} {shown}   {ratios}")
            print(lines[-1], flush=True)
    return lines


def benchmark_log_det(batch: int, latent: int, repeat: int) -> list[str]:
    """Forward and backward seconds of one log-determinant of three mixed flows, per mode."""
    flows = Flows(3, latent, "soft")
    z = torch.randn(batch, latent)
    c = torch.rand(batch, 3)
    lines = []
    for mode in ("rowsum", "hutchinson", "trace", "exact"):

        def step(mode: str = mode) -> None:
            start = z.clone().requires_grad_()
            log_abs_det(flows(torch.arange(2)).at(start, 1), c, c, mode).sum().backward()

        lines.append(f"{mode:>11} B={batch} D={latent}: {seconds(step, repeat)[0]:.3f} s")
        print(lines[-1], flush=True)
    return lines


def gradients(model: LatentFlow, frames: torch.Tensor, noise: Noise, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Gradients of one step of the default objective in `dtype`, as float64."""
    model, noise = copy.deepcopy(model).to(dtype), Noise(noise.eps.to(dtype), noise.uniform.to(dtype), noise.tau)
    labels, probes = torch.arange(frames.shape[1]) % model.config.flows, torch.Generator().manual_seed(1)
    training_step(model, frames.to(dtype), labels, 1, noise, generator=probes)["loss_total"].backward()
    return {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


def float32_errors(batch: int, latent: int, seeds: int = 5) -> list[str]:
    """Relative error of each float32 gradient of a supervised step against float64: quantiles over the parameters of
    several random models, with the fast and with the plain convolutions.
    """
    errors: dict[str, list[float]] = {"fast": [], "plain": []}
    for seed in range(seeds):
        torch.manual_seed(seed)
        model = LatentFlow(Config(latent_size=latent))
        frames, noise = (torch.rand(9, batch, 3, 28, 28) > 0.8).float(), noise_for(model, 8, batch)
        with fast_conv.plain_convolutions():
            exact = gradients(model, frames, noise, torch.float64)
            plain = gradients(model, frames, noise, torch.float32)
        for name, found in (("fast", gradients(model, frames, noise, torch.float32)), ("plain", plain)):
            errors[name] += [((found[key] - exact[key]).norm() / exact[key].norm()).item() for key in exact]
    lines = []
    for name, values in errors.items():
        median, high, most = torch.tensor(values).quantile(torch.tensor([0.5, 0.9, 1.0])).tolist()
        lines.append(f"{name:>5} B={batch} D={latent}: median {median:.1e}, 90 % below {high:.1e}, largest {most:.1e}")
        print(lines[-1], flush=True)
    return lines


class BenchmarkOptions(Options):
    """Options of the benchmark."""

    variants: list[Literal[VARIANTS]] = option(list(VARIANTS), "variants to time", min_length=1)
    batch_size: Annotated[int, Ge(1), Le(65_536)] = option(128, "sequences a step")
    latent_size: LatentSize = option(324, "latent size")
    repeat: Annotated[int, Ge(1), Le(1000)] = option(2, "above 1: a warm-up, then the fastest of so many")
    threads: Annotated[int, Ge(1), Le(1024)] = option(torch.get_num_threads(), "threads of PyTorch")
    logdet: bool = option(False, "time the log-determinants")
    errors: bool = option(False, "errors of float32 gradients, five random models")
    keep_memory: bool = option(True, "give all steps the memory setting of the training loop")
    dry_run: bool = option(False, "check and print the options, and stop")


def main(argv: list[str] | None = None) -> None:
    """Command line of the benchmark."""
    args = parse_tool(BenchmarkOptions, argv, __doc__)
    if is_dry(args):
        return
    torch.set_num_threads(args.threads)
    if args.logdet:
        benchmark_log_det(args.batch_size, args.latent_size, args.repeat)
    elif args.errors:
        float32_errors(args.batch_size, args.latent_size)
    else:
        sizes = (args.batch_size, args.latent_size, args.repeat, args.threads)
        benchmark_steps(args.variants, *sizes, args.keep_memory)


if __name__ == "__main__":
    sys.exit(run_command(main))
