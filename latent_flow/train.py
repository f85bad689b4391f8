"""The training loop that the four scripts share; they differ in their options.

A run folder receives args.json, config.json, metrics.csv, timing.csv, log.txt, checkpoint.pt (everything, for an exact
resume), final.pt (weights and configuration) and eval.json. Batches, transformations and spikes are pure functions of
(seed, iteration); the remaining noise comes from torch's generator, whose state is in the checkpoint. Under torchrun
the convolutional networks work on shares of the batch, the flows and the objective on the whole of it.
"""

import time
from collections.abc import Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.batches import Batches
from common.checkpoint import append_text, load_state, restore_rng, rng_state, save_state, write_json
from common.cuda_graph import CudaGraph, detached
from common.errors import UserError
from common.launch import Distributed, full_precision, keep_freed_memory, seed_everything
from common.training import POLL, Place, Training
from latent_flow.data import FrameSequences
from latent_flow.encoders import temperature
from latent_flow.evaluate import LINEAR_IMAGES, evaluate
from latent_flow.model import LatentFlow, Noise, training_step
from latent_flow.options import TrainOptions, is_dry, known, parse
from latent_flow.runs import saw_all, source_of
from latent_flow.spikes import draw_speed, draw_spikes

KIND = "latent_flow"
CALL = {"resume", "overwrite", "max_steps", "dry_run"}  # what args.json leaves out
SAVE_SECONDS = 600.0  # between checkpoints, without --ckp-freq


def run_script(options_type: type[TrainOptions], about: str, argv: list[str] | None) -> None:
    """Read the options of one script, train, evaluate the final weights."""
    options = parse(options_type, argv, about)
    options.config  # noqa: B018 judged before any work
    if not is_dry(options):
        train(options)


def train(options: TrainOptions) -> None:
    """Train one model; see the module's docstring for what is written."""
    dist = Distributed.start(options.device)
    try:
        _train(options, dist)
    finally:
        dist.close()


def _train(options: TrainOptions, dist: Distributed) -> None:
    if dist.device.type == "cpu":
        keep_freed_memory()
    full_precision(options.tf32)
    seed_everything(options.seed, options.deterministic)  # the same on every process: they draw the same noise
    config = options.config
    source = source_of(config, options.data_dir, dist.device, options.warp_centre, fetch=True)
    rows, held_out = source.split(options.seed)
    if options.batch_size > len(rows):
        raise UserError(f"--batch-size {options.batch_size} exceeds the {len(rows)} training items; lower it")
    if options.batch_size % dist.world:
        raise UserError(f"--batch-size {options.batch_size} must be a multiple of the {dist.world} processes")
    batches = Batches(Rows(rows), options.batch_size, options.seed)  # every process is given the whole batch
    with FlowTraining(options, dist, len(batches)) as training:
        model = LatentFlow(config).to(dist.device)
        if options.output_bias is not None:
            torch.nn.init.constant_(model.vae.decoder.decoder[-2].bias, options.output_bias)
        optimizer = make_optimizer(model, options)
        training.restore(model=model, optimizer=optimizer)
        last = min(options.max_iter, training.step + (options.max_steps or options.max_iter))
        training.describe(model, len(rows))
        shared = [p for part in (model.vae, model.reconstructor) if part is not None for p in part.parameters()]
        step = CudaGraph(
            partial(gradients, model, optimizer, options.amp, dist), model.parameters(), dist, options.cuda_graph,
            training.run.info,
        )  # fmt: skip

        for picked, _ in training.steps(batches, last=last):
            frames, labels = draw_batch(source, picked.numpy(), options, training.step)
            losses = step(frames, labels, *stage(model, training.step, step.active))
            dist.sum_gradients(shared)  # those of the flows are complete: every process moves the whole batch
            training.check(losses["loss_total"], model)
            optimizer.step()

            if training.every(options.log_freq) or training.step == last:
                training.log(losses, temperature(training.step) if model.reconstructor is not None else 1.0)
            if training.is_due(options.ckp_freq):
                training.save()
            if options.eval_every and training.every(options.eval_every) and training.step < options.max_iter:
                training.evaluate(model, source, held_out, f"eval_{training.step}.json")

        if training.step < options.max_iter:
            training.run.info(
                f"{training.step} of {options.max_iter} iterations done; go on with --resume --out {options.out}"
            )
        elif dist.is_main:
            state = {"config": config.as_dict(), "args": training.args, "model": model.state_dict()}
            save_state(training.folder / "final.pt", f"{KIND}_weights", **state)
            for line in training.evaluate(model, source, held_out, "eval.json"):
                training.run.info(line)


def gradients(
    model: LatentFlow, optimizer: torch.optim.Optimizer, amp: bool, dist: Distributed,
    frames: Tensor, labels: Tensor | int | None, iteration: int, tau: Tensor | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """The gradients of one batch; returns its losses, detached. Inputs as in `training_step`; `tau` a temperature."""
    losses = training_step(model, frames, labels, iteration, Noise(tau=tau), amp=amp, dist=dist)
    optimizer.zero_grad(set_to_none=True)
    losses["loss_total"].backward()
    return detached(losses)


def stage(model: LatentFlow, iteration: int, graph: bool) -> tuple[int, Tensor | None]:
    """(iteration, None); for a graph, which serves many iterations, what a step knows of its own: 1, or `slab_start`
    where speeds are on, and the temperature on the device.
    """
    if not graph:
        return iteration, None
    tau = None
    if model.reconstructor is not None:
        tau = torch.full((), temperature(iteration), device=next(model.parameters()).device)
    return model.config.slab_start if iteration >= model.config.slab_start else 1, tau


class Rows:
    """The training rows as a data set whose images are row numbers, for `Batches`."""

    def __init__(self, rows: np.ndarray):
        self.targets = rows

    def __len__(self) -> int:
        return len(self.targets)

    def images_at(self, index: np.ndarray) -> np.ndarray:
        """The rows (n,) at places `index` (n,)."""
        return self.targets[index]


def draw_batch(source, rows: np.ndarray, options: TrainOptions, iteration: int) -> tuple[Tensor, Any]:
    """Frames (T+1, B, C, N, N) of the items `rows`, and the transformation: (B,), one number, or None where unknown."""
    if isinstance(source, FrameSequences):
        return source.sequences(rows), None
    config, shared = options.config, options.k_per == "batch"
    word = np.random.SeedSequence([options.seed, iteration]).generate_state(1)[0].item()
    generator = torch.Generator().manual_seed(word)
    if config.variant == "unsupervised":
        drawn = (config.steps, 1 if shared else len(rows), len(source.moving))
        active = draw_spikes(config.steps, drawn[2], config.p_on, config.p_stay, generator, drawn[1])
        speed = draw_speed(drawn, generator) if iteration >= config.slab_start else None
        whole = (config.steps, len(rows), drawn[2])
        return source.composed(rows, active.expand(whole), None if speed is None else speed.expand(whole)), None
    count = min(len(source.names), config.flows) if config.variant == "supervised" else len(source.names)
    labels = torch.randint(count, (1 if shared else len(rows),), generator=generator)
    frames = source.labelled(rows, labels.expand(len(rows)))
    return frames, int(labels) if shared else labels.to(frames.device, non_blocking=True)


def make_optimizer(model: LatentFlow, options: Any) -> torch.optim.Adam:
    """One Adam with a learning rate for flows and prior, one for the VAE, one for the index encoder."""
    flow_parameters = [*model.support_sets.parameters()]
    if model.prior is not None:
        flow_parameters += model.prior.parameters()
    groups = [
        {"params": flow_parameters, "lr": options.support_set_lr},
        {"params": list(model.vae.parameters()), "lr": options.lr_vae},
    ]
    if model.reconstructor is not None:
        groups.append({"params": list(model.reconstructor.parameters()), "lr": options.lr_index})
    fused = next(model.parameters()).device.type in ("cpu", "cuda")
    return torch.optim.Adam(groups, fused=fused)


class FlowTraining(Training):
    """`Training` with the keys of this paper's checkpoints (config, args, model, optimizer, rng, iteration), its tables
    and its evaluations.
    """

    def __init__(self, options: TrainOptions, dist: Distributed, per_epoch: int):
        self.args = {name: value for name, value in options.as_dict().items() if name not in CALL}
        self.config = options.config
        super().__init__(
            options.out,
            KIND,
            options,
            dist,
            resume=options.resume,
            overwrite=options.overwrite,
            read=_read,
            place=lambda state: _place(state, per_epoch, options.batch_size),
            saved_options=lambda state: known(type(options), state["args"]),
            tensorboard=options.tensorboard,
        )
        self._began, self._since, self._written = time.perf_counter(), self.step, time.monotonic()
        if dist.is_main:
            write_json(self.folder / "args.json", self.args)
            write_json(self.folder / "config.json", self.config.as_dict() | {"args": self.args})
            if self.state is None:
                (self.folder / "timing.csv").unlink(missing_ok=True)

    def full_state(self) -> dict[str, Any]:
        """The state under this paper's names."""
        state = super().full_state()
        del state["options"]
        return state | {"config": self.config.as_dict(), "args": self.args, "iteration": self.step}

    def is_due(self, interval: int | None) -> bool:
        """Whether a checkpoint is: every `interval` iterations, or (None) by the clock."""
        if interval is not None:
            return self.every(interval)
        if self.dist.world > 1 and self.step % POLL:  # all processes save together
            return False
        return self.dist.any(time.monotonic() - self._written >= SAVE_SECONDS)

    def save(self, path: str | Path | None = None) -> None:
        """As `Training.save`; the clock of `is_due` starts anew."""
        super().save(path)
        self._written = time.monotonic()

    def describe(self, model: LatentFlow, items: int) -> None:
        """The first line of the log."""
        parameters = sum(p.numel() for p in model.parameters())
        self.run.info(
            f"{self.config.variant} {self.config.dataset}: {parameters:,} parameters, {items:,} items, "
            f"{self.dist.world} process(es) on {self.dist.device}"
        )

    def log(self, losses: Mapping[str, Tensor], tau: float) -> None:
        """One row of metrics.csv and of timing.csv (apart, so that equal runs have equal metrics)."""
        seconds = (time.perf_counter() - self._began) / (self.step - self._since)
        self._began, self._since = time.perf_counter(), self.step
        self.run.log(self.step, iteration=self.step, **losses, temperature=tau)
        if self.dist.is_main:
            timing = self.folder / "timing.csv"
            head = "" if timing.exists() else "iteration,sec_per_iter\n"
            append_text(timing, f"{head}{self.step},{seconds:.6f}\n")
        self.run.info(
            f"iteration {self.step}: total {losses['loss_total'].item():.3f} recon {losses['loss_recon'].item():.3f} "
            f"active units {losses['active_units'].item()} ({seconds:.3f} s/it)"
        )

    def evaluate(self, model: LatentFlow, source, rows: np.ndarray, name: str) -> Iterable[str]:
        """Measure the held-out rows, write them to `name`; the training's random numbers stay as they were."""
        if not self.dist.is_main:
            return []
        noise = rng_state()
        rows, seed = rows[: self.options.eval_images], self.options.seed

        def write(result: dict, whole: bool) -> None:
            write_json(self.folder / (name if whole else name.replace(".json", ".partial.json")), result)

        training = source, source.split(seed)[0][:LINEAR_IMAGES]
        result = evaluate(model, source, rows, seed=seed, iteration=self.step, training=training, write=write)
        restore_rng(noise, self.dist.device)
        return result["lines"]


def _read(path: Path) -> dict[str, Any]:
    state = load_state(path, KIND)
    missing = {"args", "config", "model", "optimizer", "rng", "iteration"} - state.keys()
    if missing or not isinstance(state["args"], dict) or not isinstance(state["iteration"], int):
        raise UserError(f"{path} is no whole checkpoint of a run; use an older one")
    if saw_all(state["args"]):
        raise UserError(f"{path} was trained on all sequences, those that are held out now too; start a new run")
    return state


def _place(state: Mapping[str, Any], per_epoch: int, batch: int) -> Place:
    if "place" in state:
        return Place(**state["place"])
    step = state["iteration"]  # of an older checkpoint
    return Place(step, step // per_epoch, step % per_epoch * batch)
