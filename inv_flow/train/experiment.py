"""The training of a flow, from the first batch to the last picture.

    Experiment(model, train_loader, val_loader, test_loader, optimizer, scheduler, **config).run()

Loss: -mean log p(x) in nats (plus the reconstruction loss of self-normalising layers). Every epoch: train, evaluate the
validation images, and, when these improve, the test images; write sample and reconstruction grids, `last.pt` and
`best.pt`. Under torchrun each process takes its share of every batch. Written to the run folder: config.json,
metrics.csv, log.txt, tb/, timing.csv, samples/<epoch>.png, recon/<epoch>.png (images, reconstructions, differences),
kernels/<epoch>.png, checkpoints/{last,best}.pt and best.safetensors. Options: `inv_flow.train.config.Config`.
"""

import math
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.checkpoint import load_state, save_weights
from common.cuda_graph import CudaGraph, detached
from common.errors import NonFiniteError, UserError
from common.launch import Distributed, full_precision
from common.training import Place, Training
from inv_flow.model import FlowModel
from inv_flow.train.config import Config, older_names
from inv_flow.train.evaluation import (
    StepTimes,
    batches_of,
    integer_images,
    kernel_picture,
    layer_outputs,
    layer_values,
    likelihood,
    log_times,
    own_rng,
    reconstruction_error,
    reconstruction_picture,
    rounding_error,
    sample_pictures,
    sum_device,
)
from inv_flow.train.recon import ReconstructionLoss

KIND = "inv_flow"


class Experiment:
    """Train, evaluate and sample one flow. `config` names are those of `Config`; unknown and dead ones raise UserError.

    Loaders give `len` and either `epoch(number, start)` (an exact resume in the middle of an epoch needs it) or plain
    iteration over (images, targets), images being integer-valued (B, C, H, W). `scheduler` steps once an epoch; warm-up
    is on top of it.
    """

    def __init__(
        self,
        model: FlowModel,
        train_loader: Any,
        val_loader: Any,
        test_loader: Any,
        optimizer: torch.optim.Optimizer | None,
        scheduler: Any = None,
        dist: Distributed | None = None,
        **config: Any,
    ):
        self.config = Config.build(config)
        self.dist = dist or Distributed.start(self.config.device)
        if self.config.multi_gpu and self.dist.world == 1:
            raise UserError("multi_gpu: this is one process; start with torchrun --standalone --nproc_per_node=N")
        self.model = model.to(self.dist.device)
        self.loaders = {"train": train_loader, "val": val_loader, "test": test_loader}
        self.optimizer, self.scheduler = optimizer, scheduler
        self.folder, self.checkpoints = self.config.folder, self.config.checkpoints
        self.reconstruction_loss = ReconstructionLoss(model.self_norm_layers(), self.config, self.dist)

    def run(self) -> dict[str, float]:
        """Train to `epochs` and return the test metrics at the best validation NLL."""
        config, dist, model, optimizer = self.config, self.dist, self.model, self.optimizer
        full_precision(config.tf32)
        batches = self.loaders["train"] if hasattr(self.loaders["train"], "epoch") else Plain(self.loaders["train"])
        with self._open(batches) as training:
            self._initialise(training)
            network, times = dist.wrap(model), StepTimes(dist.device)
            step = CudaGraph(
                partial(self.gradients, network), model.parameters(), dist, config.cuda_graph, training.run.info
            )
            model.train()
            if training.extra.pop("unevaluated", False):
                training.epoch -= 1
                self._end_epoch(training, times)
            for batch in training.steps(batches, epochs=config.epochs):
                times.mark()
                x = integer_images(batch, model, dist.device)
                nll, loss, norm = step(x)
                self._check(training, loss, norm, x)
                warm = min(1.0, training.step / max(1, config.warmup_epochs * len(batches)))
                with scaled_rates(optimizer, warm):
                    optimizer.step()
                training.extra["loss_sum"] += nll.to(training.extra["loss_sum"]) * len(x)
                training.extra["loss_count"] += len(x) * dist.world
                if training.every(config.log_interval) or training.epoch_ends:
                    self._log_step(training, x, norm, warm)
                if training.epoch_ends:
                    self._end_epoch(training, times)
        return training.extra["metrics"]

    def gradients(self, network: nn.Module, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The gradients of integer images x (B, C, H, W), clipped; returns -log p, the loss and the gradients' norm,
        detached. `network` is the model as `Distributed.wrap` gives it.
        """
        self.optimizer.zero_grad(set_to_none=True)
        nll = -network(x, self.dist.rand_like)[1].mean()
        loss = nll + self.reconstruction_loss()
        loss.backward()
        return detached((nll, loss, clip_gradients(self.model, self.config)))

    def _open(self, batches: Any) -> "FlowTraining":
        """The record and the lock of the run folder, with everything as `last.pt` holds it where the run goes on."""
        config = self.config
        if config.wandb:  # wandb reads these names itself
            names = {"WANDB_NAME": config.name, "WANDB_NOTES": config.notes, "WANDB_ENTITY": config.wandb_entity}
            os.environ.update({name: value for name, value in names.items() if value})
        training = FlowTraining(
            self.folder, KIND, config, self.dist, resume=config.resume, overwrite=config.overwrite,
            checkpoint=self.checkpoints / "last.pt", read=lambda path: read_state(path, len(batches)),
            wandb=config.wandb_project if config.wandb else None,
        )  # fmt: skip
        parts = {"model": self.model, "optimizer": self.optimizer, "reconstruction": self.reconstruction_loss}
        if self.scheduler is not None:
            parts["scheduler"] = self.scheduler
        try:
            training.restore(**parts)
            if training.state is not None:
                restore_rates(self.optimizer, training.state["optimizer"])
        except BaseException:
            training.__exit__()
            raise
        if training.state is None:
            training.extra.update(best=math.inf, metrics={}, epoch_loss=0.0, epoch_count=0, loss_sum=0.0, loss_count=0)
            if self.dist.is_main:
                (self.folder / "timing.csv").unlink(missing_ok=True)
        # of this process, on the device, and never read between two logged steps
        own = training.extra["loss_sum"] if self.dist.is_main else 0.0
        training.extra["loss_sum"] = torch.as_tensor(own, dtype=torch.float64, device=sum_device(self.dist))
        return training

    def _initialise(self, training: Training) -> None:
        """Data-dependent initialisation on the first batch, alike on every process; a run that goes on has it."""
        parameters = sum(p.numel() for p in self.model.parameters())
        training.run.info(
            f"{self.config.name} on {self.config.dataset}: {parameters:,} parameters, {self.dist.world} process(es) on "
            f"{self.dist.device}"
        )
        if note := self.model.padding_note:
            training.run.info(note)
        self.model.set_exact(not self.config.modified_grad)
        if training.step == 0:
            batch = next(iter(batches_of(self.loaders["train"])))
            x = self.dist.gather(integer_images(batch, self.model, self.dist.device))
            with torch.no_grad(), own_rng(self.dist.device, self.config.seed):
                self.model.encode(x)

    def _check(self, training: Training, loss: Tensor, norm: Tensor, x: Tensor) -> None:
        """Stop before the step on a non-finite loss or gradient, naming the layer; the state is kept in crash.pt."""
        try:
            training.check(torch.stack([loss.detach(), norm.to(loss)]), self.model)
        except NonFiniteError as error:
            with torch.no_grad():
                bad = next((name for name, *out in layer_outputs(self.model, x)
                            if not all(bool(torch.isfinite(part).all()) for part in out)), None)  # fmt: skip
            index, _, kind = (bad or "").partition("_")
            where = f"layer layers.{index} ({kind}) returned it" if bad else "the forward pass is finite"
            raise NonFiniteError(f"{error}; {where}") from None

    def _log_step(self, training: Training, x: Tensor, norm: Tensor, warm: float) -> None:
        """The mean loss since the last row, over all processes, and with `verbose` every layer's share of it."""
        done = training.extra
        loss, count = float(self.dist.sum(done["loss_sum"])), done["loss_count"]
        done["epoch_loss"], done["epoch_count"] = done["epoch_loss"] + loss, done["epoch_count"] + count
        done["loss_sum"], done["loss_count"] = torch.zeros_like(done["loss_sum"]), 0
        layers = layer_values(self.model, x, self.config.seed) if self.config.verbose else {}
        training.run.log(
            training.step, epoch=training.epoch + 1, batch_nll=loss / count, grad_norm=norm,
            lr=self.optimizer.param_groups[0]["lr"] * warm, **layers,
        )  # fmt: skip

    def _end_epoch(self, training: "FlowTraining", times: StepTimes) -> None:
        """Evaluate, draw, log and save after the last step of an epoch."""
        config, done, epoch = self.config, training.extra, training.epoch + 1
        if config.log_timing and self.dist.is_main:
            log_times(self.folder, epoch, times.summary())
        train_nll, last = done["epoch_loss"] / done["epoch_count"], epoch == config.epochs
        row = {"train_nll": train_nll, "train_bpd": train_nll / (math.prod(self.model.image_size) * math.log(2))}
        done["epoch_loss"], done["epoch_count"] = 0.0, 0
        if self.scheduler is not None:
            self.scheduler.step()
        if epoch % config.eval_epochs == 0 or last:
            if config.eval_train:
                row |= self.evaluate("train", "train_eval")
            row |= self.evaluate("val")
            if row["val_nll"] < done["best"]:
                done["best"] = row["val_nll"]
                done["metrics"] = self.evaluate("test", draws=config.eval_draws)
                training.save(self.checkpoints / "best.pt")
                if self.dist.is_main:
                    save_weights(self.checkpoints / "best.safetensors", self.model.state_dict(), config.as_dict())
            row |= done["metrics"]
        if epoch < 5 or epoch == 10 or epoch % config.sample_epochs == 0 or last:
            self._pictures(training, epoch)
        if self.dist.is_main and (epoch % config.vis_epochs == 0 or last):
            kernel_picture(self.model, self.folder / "kernels" / f"{epoch}.png")
        training.run.log(training.step, epoch=epoch, **row)
        text = ", ".join(f"{name} {value:.4f}" for name, value in row.items())
        training.run.info(f"epoch {epoch}/{config.epochs}: {text}")
        training.save()
        self.model.train()

    def evaluate(self, split: str, name: str | None = None, draws: int = 1) -> dict[str, float]:
        """Mean NLL (nats) and bits/dim of a split; see `evaluation.likelihood`."""
        return likelihood(self.model, self.loaders[split], self.config, self.dist, name or split, draws)

    def _pictures(self, training: Training, epoch: int) -> None:
        """Sample and reconstruction grids, and how exact the flow is."""
        if not self.dist.is_main:
            return
        config, model = self.config, self.model
        model.eval()
        said, made = sample_pictures(model, config, self.folder, str(epoch))
        for line in said:
            training.run.info(line)
        for suffix, (picture, median, deviation) in made.items():
            training.run.image(f"samples{suffix}", picture, training.step)
            if config.log_timing:
                values = {f"sample{suffix}_ms": median, f"sample{suffix}_std_ms": deviation}
                log_times(self.folder, epoch, values)
        if config.plot_recon:
            batch = next(iter(batches_of(self.loaders["test"])))
            x = integer_images(batch, model, self.dist.device)[:10]
            with own_rng(self.dist.device, config.seed + 4):
                reconstruction_picture(model, x, self.folder / "recon" / f"{epoch}.png")
            largest, mean = reconstruction_error(model, x, config.seed)
            training.run.info(
                f"reconstruction error in grey levels over {len(x)} images: largest {largest:.2e}, mean {mean:.2e}; "
                f"log p in float64 differs by {rounding_error(model, x[:2], self.dist, config.seed):.1e} of its value"
            )


class FlowTraining(Training):
    """A `Training` whose checkpoint holds the unlogged losses of all processes."""

    def save(self, path: str | Path | None = None) -> None:
        """Write the full state to `path` (default: the checkpoint)."""
        own = self.extra["loss_sum"]
        self.extra["loss_sum"] = self.dist.sum(own)
        super().save(path)
        self.extra["loss_sum"] = own


class Plain:
    """An ordinary loader as one of numbered epochs; the place in the data is then counted in its batches."""

    def __init__(self, loader: Any):
        self.loader, self.batch_size = loader, getattr(loader, "batch_size", None) or 1

    def __len__(self) -> int:
        return len(self.loader)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[Any]:
        """Batches `start`, `start` + 1, ... of another pass."""
        return batches_of(self.loader, epoch, start)


def clip_gradients(model: nn.Module, config: Config) -> Tensor:
    """Clip gradients (by value, then by norm) and return their norm before the latter."""
    parameters = [p for p in model.parameters() if p.grad is not None]
    if config.grad_clip is not None:
        nn.utils.clip_grad_value_(parameters, config.grad_clip)
    limit = config.grad_clip_norm
    return nn.utils.clip_grad_norm_(parameters, math.inf if limit is None else limit)


@contextmanager
def scaled_rates(optimizer: torch.optim.Optimizer, scale: float) -> Iterator[None]:
    """The learning rates times `scale`; the scheduler finds its own again, since recursive ones multiply them."""
    own = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] *= scale
    yield
    for group, rate in zip(optimizer.param_groups, own, strict=True):
        group["lr"] = rate


def restore_rates(optimizer: torch.optim.Optimizer, saved: dict[str, Any]) -> None:
    """The learning rates where the schedule left them, times new / old where this run was given other ones."""
    for group, old in zip(optimizer.param_groups, saved["param_groups"], strict=True):
        if "initial_lr" in group and "initial_lr" in old:
            group["lr"] = old["lr"] * (group["initial_lr"] / old["initial_lr"] if old["initial_lr"] else 1.0)
    # the optimiser's steps of this epoch were taken before the checkpoint; else the scheduler warns of none
    optimizer._opt_called = True


def read_state(path: Path, batches: int) -> dict[str, Any]:
    """The state in a checkpoint, as `Training` writes it or as versions before it did."""
    state = load_state(path, KIND)
    if "config" not in state:
        return state
    try:
        config, own = older_names(state["config"]), state["processes"]
        extra = {name: state[name] for name in ("best", "metrics", "epoch_loss", "epoch_count")}
        extra["loss_sum"] = sum(part["loss_sum"] for part in own)
        extra["loss_count"] = sum(part["loss_count"] for part in own)
        place = Place(state["step"], state["epoch"], state["batch"] * config["batch_size"])
        if state["batch"] >= batches:  # stopped between the last step of an epoch and its evaluation
            place, extra["unevaluated"] = Place(state["step"], state["epoch"] + 1, 0), True
        kept = {name: state[name] for name in ("model", "optimizer", "scheduler", "reconstruction")}
        return kept | {"options": config, "place": vars(place), "rng": own[0]["rng"], "extra": extra}
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({type(error).__name__}: {error}); use an older checkpoint") from error
