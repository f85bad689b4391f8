"""The training loop that the four scripts share; they differ in their variant, data sets and defaults.

A run folder receives args.json, config.json, metrics.csv, timing.csv, log.txt, checkpoint.pt (everything, for an exact
resume), final.pt (weights and configuration) and eval.json. Batches, transformations and spikes are pure functions of
(seed, iteration); the remaining noise comes from torch's generator, whose state is in the checkpoint. Under torchrun
the convolutional networks work on shares of the batch, the flows and the objective on the whole of it.
"""

import argparse
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.batches import Batches
from common.checkpoint import append_text, load_state, restore_rng, rng_state, save_state, write_json
from common.errors import UserError
from common.launch import Distributed, StopSignal, check_finite, keep_freed_memory, seed_everything
from common.run import Run
from latent_flow.data import FrameSequences, open_source, split_rows
from latent_flow.encoders import temperature
from latent_flow.evaluate import evaluate
from latent_flow.metrics import draw_speed
from latent_flow.model import Config, LatentFlow, training_step
from latent_flow.options import resolve, training_parser
from latent_flow.spikes import draw_spikes

KIND = "latent_flow"


def run_script(variant: str, description: str, datasets: tuple[str, ...], argv: list[str] | None) -> None:
    """Parse the options of one script, train, evaluate the final weights."""
    args = training_parser(variant, description, datasets).parse(argv)
    config = resolve(args, variant, datasets)
    train(args, config)


class Rows:
    """The training rows as a data set of indices, for `Batches.order`."""

    def __init__(self, rows: np.ndarray):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)


def draw_batch(
    source, rows: np.ndarray, config: Config, args: argparse.Namespace, iteration: int
) -> tuple[Tensor, Any]:
    """Frames (T+1, B, C, N, N) of the items `rows`, and the transformation: (B,), one number, or None where unknown."""
    if isinstance(source, FrameSequences):
        return source.sequences(rows), None
    generator = torch.Generator().manual_seed(
        np.random.SeedSequence([args.seed, iteration]).generate_state(1)[0].item()
    )
    shared = args.k_per == "batch"
    if config.variant == "unsupervised":
        count = len(getattr(source, "moving", source.names))
        batch = 1 if shared else len(rows)
        active = draw_spikes(config.steps, count, config.p_on, config.p_stay, generator, batch)
        speed = draw_speed(active.shape, generator) if iteration >= config.slab_start else None
        shape = (config.steps, len(rows), count)
        return source.composed(rows, active.expand(shape), None if speed is None else speed.expand(shape)), None
    count = min(len(source.names), config.flows) if config.variant == "supervised" else len(source.names)
    labels = torch.randint(count, (1 if shared else len(rows),), generator=generator)
    frames = source.labelled(rows, labels.expand(len(rows)))
    return frames, int(labels) if shared else labels.to(frames.device)


def make_optimizer(model: LatentFlow, args: argparse.Namespace) -> torch.optim.Adam:
    """One Adam with a learning rate for flows and prior, one for the VAE, one for the index encoder."""
    flow_parameters = [*model.support_sets.parameters()]
    if model.prior is not None:
        flow_parameters += model.prior.parameters()
    groups = [
        {"params": flow_parameters, "lr": args.support_set_lr},
        {"params": list(model.vae.parameters()), "lr": args.lr_vae},
    ]
    if model.reconstructor is not None:
        groups.append({"params": list(model.reconstructor.parameters()), "lr": args.lr_index})
    fused = next(model.parameters()).device.type in ("cpu", "cuda")
    return torch.optim.Adam(groups, fused=fused)


def train(args: argparse.Namespace, config: Config) -> None:
    """Train one model as `args` say; see the module's docstring for what is written."""
    dist = Distributed.start(args.device)
    if dist.device.type == "cpu":
        keep_freed_memory()
    try:
        _train(args, config, dist)
    finally:
        dist.close()


def _train(args: argparse.Namespace, config: Config, dist: Distributed) -> None:
    folder = Path(args.out)
    checkpoint = folder / "checkpoint.pt"
    state = load_state(checkpoint, KIND) if args.resume else None
    if state is not None and state["config"] != config.as_dict():
        changed = [name for name, value in config.as_dict().items() if state["config"].get(name) != value]
        raise UserError(f"{checkpoint} was made with other settings ({', '.join(changed)}); resume with the same ones")

    device = dist.device
    seed_everything(args.seed, args.deterministic)  # the same on every process: they draw the same noise
    source = open_source(
        config.dataset,
        config.steps,
        size=config.image_size,
        root=args.data_dir,
        device=device,
        centre=args.warp_centre,
    )
    if config.variant == "supervised" and config.flows > len(source.names):
        known = ", ".join(source.names)
        raise UserError(
            f"-K {config.flows}: {config.dataset} has {len(source.names)} transformations ({known}); lower it"
        )
    if config.index_labels and isinstance(source, FrameSequences):
        raise UserError("--index-labels needs known transformations: a folder of frames has none")
    rows, held_out = split_rows(len(source), args.seed)
    if args.batch_size > len(rows):
        raise UserError(f"--batch-size {args.batch_size} exceeds the {len(rows)} training items; lower it")
    if args.batch_size % dist.world:
        raise UserError(f"--batch-size {args.batch_size} must be a multiple of the {dist.world} processes")
    order = Batches(Rows(rows), args.batch_size, seed=args.seed)

    model = LatentFlow(config).to(device)
    optimizer = make_optimizer(model, args)
    iteration = 0
    if state is not None:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        restore_rng(state["rng"])
        iteration = state["iteration"]
    last = args.max_iter if args.max_steps is None else min(args.max_iter, iteration + args.max_steps)
    options = {name: value for name, value in vars(args).items() if name not in ("resume", "overwrite", "max_steps")}

    with (
        Run(
            folder,
            config.as_dict() | {"args": options},
            resume=state is not None,
            resume_step=iteration,
            overwrite=args.overwrite,
            tensorboard=args.tensorboard,
            enabled=dist.is_main,
        ) as run,
        StopSignal() as stop,
    ):
        if dist.is_main:
            write_json(folder / "args.json", options)
            if state is None:
                (folder / "timing.csv").unlink(missing_ok=True)
        parameters = sum(p.numel() for p in model.parameters())
        run.info(
            f"{config.variant} {config.dataset}: {parameters:,} parameters, {len(rows):,} items, {dist.world} "
            f"process(es) on {device}"
        )
        networks = [part for part in (model.vae, model.reconstructor) if part is not None]
        shared = [p for part in networks for p in part.parameters()]

        def save() -> None:
            if not dist.is_main:
                return
            save_state(
                checkpoint,
                KIND,
                config=config.as_dict(),
                args=options,
                model=model.state_dict(),
                optimizer=optimizer.state_dict(),
                rng=rng_state(),
                iteration=iteration,
            )

        epoch, visiting = -1, np.empty(0, int)
        began, since = time.perf_counter(), iteration
        todo = range(iteration + 1, last + 1)
        for iteration in run.progress(todo, total=args.max_iter, initial=todo.start - 1):
            if (iteration - 1) // len(order) != epoch:
                epoch = (iteration - 1) // len(order)
                visiting = rows[order.order(epoch)]
            place = (iteration - 1) % len(order) * args.batch_size
            frames, labels = draw_batch(source, visiting[place : place + args.batch_size], config, args, iteration)

            losses = training_step(model, frames, labels, iteration, amp=args.amp, dist=dist)
            optimizer.zero_grad(set_to_none=True)
            losses["loss_total"].backward()
            dist.sum_gradients(shared)  # those of the flows are complete: every process moves the whole batch
            optimizer.step()

            if iteration % args.log_freq == 0 or iteration == last:
                check_finite(losses["loss_total"], iteration, model)
                seconds = (time.perf_counter() - began) / (iteration - since)
                began, since = time.perf_counter(), iteration
                run.log(
                    iteration,
                    iteration=iteration,
                    **losses,
                    temperature=temperature(iteration) if model.reconstructor is not None else 1.0,
                )
                if dist.is_main:
                    head = "" if (folder / "timing.csv").exists() else "iteration,sec_per_iter\n"
                    append_text(folder / "timing.csv", f"{head}{iteration},{seconds:.6f}\n")
                total, recon = losses["loss_total"].item(), losses["loss_recon"].item()
                run.info(f"iteration {iteration}: total {total:.3f} recon {recon:.3f} ({seconds:.3f} s/it)")
            stopped = dist.any(stop)
            if iteration % args.ckp_freq == 0 or stopped:
                check_finite(losses["loss_total"], iteration, model)
                save()
            if stopped:
                run.info(f"stopped at iteration {iteration}; go on with --resume --out {folder}")
                raise KeyboardInterrupt  # exit code 130: the run is not finished
            due = args.eval_every and iteration % args.eval_every == 0 and iteration < args.max_iter
            if due and dist.is_main:
                noise = rng_state()  # an evaluation leaves the training's random numbers as they were
                result = evaluate(model, source, held_out[: args.eval_images], seed=args.seed, iteration=iteration)
                write_json(folder / f"eval_{iteration}.json", result)
                restore_rng(noise)
        save()
        if iteration < args.max_iter:
            run.info(f"{iteration} of {args.max_iter} iterations done; go on with --resume --out {folder}")
            return
        if not dist.is_main:
            return
        save_state(
            folder / "final.pt", f"{KIND}_weights", config=config.as_dict(), args=options, model=model.state_dict()
        )
        result = evaluate(model, source, held_out[: args.eval_images], seed=args.seed, iteration=iteration)
        write_json(folder / "eval.json", result)
        for line in result["lines"]:
            run.info(line)
