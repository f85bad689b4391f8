"""A run's state between its steps: what a checkpoint holds beside networks and schedules, and where it lies.

`<ckpt_dir>/<name>/` has `last` (the last state that the stopping rule did not hold back), `best` (lowest validation
total), `final` (where the training ended or was stopped) and `model.safetensors` for inference.
"""

import dataclasses
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.checkpoint import load_into, load_optimizer, load_state
from common.errors import UserError
from common.launch import Distributed
from common.options import compare
from common.training import FolderLock, Place, Training
from glancenet import osr
from glancenet.algorithms import Algorithm
from glancenet.options import Config
from glancenet.report import Files
from glancenet.schedules import EarlyStopping, LearningRate, LinearWeight

KIND = "glancenet"
WRITTEN = ("last", "best", "final", "model.safetensors", "model.json")  # in <ckpt_dir>/<name>
SAVED_TRAIN_ROWS = 10_000


def make_optimizers(model: Algorithm, o: Config) -> dict[str, torch.optim.Optimizer]:
    """Adam for the networks ('G'), FactorVAE's discriminator ('PermD') and IFCVAE's adversary ('aux_D')."""
    how = {"betas": (o.beta1, o.beta2), "fused": next(model.parameters()).device.type in ("cpu", "cuda")}
    made = {"G": torch.optim.Adam(list(model.main_parameters()), lr=o.lr_G, **how)}
    return made | {name: torch.optim.Adam(net.parameters(), lr=o.lr_D, **how)
                   for name, net in model.adversaries().items()}  # fmt: skip


@dataclass
class Progress:
    """Counters of a run. `tested_at` and `metrics_at` are the steps of the last test point and the last metrics."""

    epoch_sum: Tensor  # of the total loss, in the epoch under way
    epoch_steps: int = 0
    epoch_latents: list[tuple[Tensor, Tensor]] = field(default_factory=list)  # (z, concepts) of its first images
    best_total: float = float("inf")
    tested_at: int = -1
    metrics_at: int = -1
    metric_values: dict[str, float] = field(default_factory=dict)
    thresholds: osr.Thresholds | None = None

    def add(self, total: Tensor, z: Tensor, labels: Tensor) -> None:
        """Count a step: its loss and its latents z (B, D)."""
        self.epoch_sum += total
        self.epoch_steps += 1
        room = SAVED_TRAIN_ROWS - sum(len(part) for part, _ in self.epoch_latents)
        if room > 0:
            self.epoch_latents.append((z[:room], labels[:room]))

    @property
    def mean_loss(self) -> float:
        """Mean total loss of the epoch under way."""
        return float(self.epoch_sum / max(1, self.epoch_steps))

    def next_epoch(self) -> None:
        """Forget the epoch that ended."""
        self.epoch_sum, self.epoch_steps, self.epoch_latents = torch.zeros_like(self.epoch_sum), 0, []


def log_of(state: dict[str, Any], source: Path) -> Path | None:
    """The log folder of the run that `source` holds, wherever it was moved with it; None where it is gone."""
    named, beside = Path(state.get("log", "")), source.parent / state.get("log_place", "")
    if os.path.abspath(named) == os.path.abspath(beside):
        return named if named.is_dir() else None
    return next(
        (Path(os.path.relpath(place)) for place in (beside, named) if (place / "run/config.json").is_file()), None
    )


def newest(folder: Path) -> Path | None:
    """The newer of `final` and `last` in a checkpoint folder."""
    found = [folder / name for name in ("last", "final") if (folder / name).is_file()]
    return max(found, key=lambda path: path.stat().st_mtime_ns, default=None)


class GlanceTraining(Training):
    """`common.training.Training` with this paper's checkpoints, schedules and counters.

    Attributes beside its own: optimizers, rate, recon_weight (None: constant), stopping, progress, files.
    """

    def __init__(
        self, o: Config, dist: Distributed, model: Algorithm, per_epoch: int, last_step: int, discard: str | None = None
    ):
        self.model, self.per_epoch, self.last_step = model, per_epoch, last_step
        self.optimizers = make_optimizers(model, o)
        self.rate = LearningRate(self.optimizers["G"], o.lr_G, o.warmup_epochs, o.lr_scheduler, o.lr_scheduler_args)
        self.recon_weight = LinearWeight.of(o.w_recon, o.w_recon_scheduler, o.w_recon_scheduler_args)
        self.stopping = EarlyStopping(model.w.latent_weight, model.w.label_weight, o.masking_fact > 0)
        self.progress = Progress(torch.zeros((), device=dist.device))
        folder = Path(o.ckpt_dir) / o.name
        goes_on = o.ckpt_load and o.ckpt_load_iternum
        source = Path(o.ckpt_load) if o.ckpt_load else newest(folder) or folder / "last"
        wanted = o.ckpt_load or o.resume is True or (o.resume and source.exists())
        state = load_state(source, KIND) if wanted else None
        if o.ckpt_load and not goes_on:
            load_networks(state, source, model, self.optimizers if o.ckpt_load_optim else {})
        same_log = log_of(state, source) if state and o.resume and not o.out_path else None
        self.files = Files.of(o, same_log, discard)
        self._checkpoints_lock = FolderLock(folder) if dist.is_main else None
        try:
            goes_on_there = state is not None and (goes_on or o.resume) and source.resolve().parent == folder.resolve()
            earlier = [] if goes_on_there or not dist.is_main else \
                [folder / name for name in WRITTEN if (folder / name).is_file()]  # fmt: skip
            if earlier and not (o.overwrite or o.resume):
                raise UserError(
                    f"{folder} already holds checkpoints of a run: --resume auto goes on with it, --overwrite true "
                    "replaces it, another --name keeps it"
                )
            super().__init__(
                self.files.log / "run", KIND, o, dist, resume=True if goes_on else o.resume, overwrite=o.overwrite,
                checkpoint=source, read=lambda path: state, place=self._restore,
                wandb="glancenet" if o.use_wandb else None,
            )  # fmt: skip
        except BaseException:
            self._unlock()
            raise
        self.checkpoint = self.files.checkpoints / "final"
        for path in earlier:  # of the run that this one replaces
            if path.resolve() != source.resolve():
                path.unlink()
        if self.state is not None and o.resume and not o.out_path and same_log is None:
            self.run.info(f"the log folder {state.get('log')} of {source} is gone; going on in {self.files.log}")

    def _restore(self, state: dict[str, Any]) -> Place:
        """Everything that a checkpoint holds, its settings being accepted; nothing has been written yet."""
        o, p = self.options, self.progress
        load_networks(state, self.checkpoint, self.model, self.optimizers if o.ckpt_load_optim else {})
        try:
            self.rate.restore(state["rate"], o.lr_G / state["options"]["lr_G"])
            self.stopping.restore(state["stopping"])
            self.set_w_recon(state["w_recon"])
            if self.recon_weight is not None:
                self.recon_weight.steps = state["recon_steps"]
            step = int(state["iter"])
            if step > self.last_step:
                raise UserError(
                    f"{self.checkpoint} stands at step {step}, beyond --max_iter and --max_epoch (step "
                    f"{self.last_step}); raise them"
                )
            place = Place(**state["place"]) if "place" in state else \
                Place(step, step // self.per_epoch, step % self.per_epoch * o.batch_size)  # fmt: skip
            if place.images:
                device = p.epoch_sum.device
                p.epoch_sum, p.epoch_steps = state["epoch_sum"].to(device), state["epoch_steps"]
                p.epoch_latents = [(z.to(device), g.to(device)) for z, g in state["epoch_latents"]]
            p.best_total, p.metric_values = state["best_total"], dict(state["metric_values"])
            p.tested_at, p.metrics_at = state.get("tested_at", step), state.get("metrics_at", -1)
            p.thresholds = thresholds_of(state["thresholds"], self.model)
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise UserError(
                f"{self.checkpoint} is damaged ({type(error).__name__}); use an older checkpoint"
            ) from error
        return place

    def set_w_recon(self, value: float) -> None:
        """Another weight of the reconstruction."""
        self.model.w = dataclasses.replace(self.model.w, w_recon=value)

    def full_state(self) -> dict[str, Any]:
        """The published keys (iter, ...) and what an exact resume needs beside them."""
        p, own = self.progress, super().full_state()
        return {
            "iter": own["place"]["step"], "epoch": own["place"]["epoch"], "options": own["options"], "rng": own["rng"],
            "place": own["place"], "log": str(self.files.log),
            "log_place": os.path.relpath(self.files.log, self.files.checkpoints), "model": self.model.state_dict(),
            "optimizers": {name: optimizer.state_dict() for name, optimizer in self.optimizers.items()},
            "rate": self.rate.state(), "stopping": self.stopping.state(), "best_total": p.best_total,
            "w_recon": self.model.w.w_recon, "recon_steps": self.recon_weight.steps if self.recon_weight else 0,
            "metric_values": p.metric_values, "thresholds": threshold_tensors(p.thresholds), "epoch_sum": p.epoch_sum,
            "epoch_steps": p.epoch_steps, "epoch_latents": [list(pair) for pair in p.epoch_latents],
            "tested_at": p.tested_at, "metrics_at": p.metrics_at,
        }  # fmt: skip

    def _unlock(self) -> None:
        if getattr(self, "_lock", None):
            super()._unlock()
        if self._checkpoints_lock:
            self._checkpoints_lock.release()
            self._checkpoints_lock = self._lock = None


def load_networks(
    state: dict[str, Any], source: Path, model: Algorithm, optimizers: dict[str, torch.optim.Optimizer]
) -> None:
    """Weights and the states of `optimizers` from a checkpoint; the learning rates stay those of the options."""
    load_into(model, state.get("model"), source)
    for name, optimizer in optimizers.items():
        if name not in state.get("optimizers", {}):
            raise UserError(f"{source} has no optimiser {name}; leave it fresh by --ckpt_load_optim false")
        load_optimizer(optimizer, state["optimizers"][name], source)


def differences(saved: dict[str, Any], o: Config) -> list[str]:
    """The settings in which a test differs from the training of its checkpoint, as lines."""
    return [f"{name}: {old} in the training, {new} here" for name, (old, new) in compare(saved, o)["same"].items()]


def threshold_tensors(thresholds: osr.Thresholds | None) -> dict[str, Tensor]:
    """The thresholds as tensors, for checkpoints and weights; empty where there are none."""
    if thresholds is None:
        return {}
    values = {name: getattr(thresholds, name) for name in ("reconstruction", "distance", "means")}
    return {f"osr.{name}": torch.as_tensor(np.asarray(value), dtype=torch.float64) for name, value in values.items()}


def thresholds_of(tensors: dict[str, Tensor], model: Algorithm) -> osr.Thresholds | None:
    """The inverse of `threshold_tensors`."""
    if "osr.reconstruction" not in tensors:
        return None
    distance, means = tensors["osr.distance"].numpy(), tensors["osr.means"].numpy()
    return osr.Thresholds(float(tensors["osr.reconstruction"]), distance, means, model.z_class)
