"""The training of a flow, from the first batch to the last picture.

    Experiment(model, train_loader, val_loader, test_loader, optimizer, scheduler, **config).run()

Loss: -mean log p(x) in nats (plus the reconstruction loss of self-normalising layers). Every epoch: train, evaluate the
validation images, and, when these improve, the test images; write sample and reconstruction grids, `last.pt` and
`best.pt`. Under torchrun each process takes its share of every batch. Written to the run folder: config.json,
metrics.csv, log.txt, tb/, timing.csv, samples/<epoch>.png, recon/<epoch>.png (images, reconstructions, differences),
kernels/<epoch>.png, checkpoints/{last,best}.pt and best.safetensors. Keys: `inv_flow.train.config.Config`.
"""

import copy
import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.checkpoint import append_text, load_into, load_state, restore_rng, rng_state, save_state, save_weights
from common.errors import NonFiniteError, UserError
from common.images import mosaic, save_image
from common.launch import Distributed, StopSignal, check_finite
from common.run import Run
from inv_flow.layers.flow import FlowSequential, bits_per_dim
from inv_flow.layers.inv_conv import InverseConv2d
from inv_flow.layers.preprocess import Dequantization
from inv_flow.model import FlowModel
from inv_flow.train.config import FIELDS, Config
from inv_flow.train.recon import ReconstructionLoss

KIND = "inv_flow"
STATE = ("epoch", "batch", "step", "best", "metrics", "epoch_loss", "epoch_count")
# what may differ between a checkpoint and the run that goes on from it
FREE_KEYS = ("epochs", "data_root", "workers", "n_test", "multi_gpu")


class Experiment:
    """Train, evaluate and sample one flow. `config` keys are those of `Config`; unknown and dead keys raise UserError.

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
        optimizer: torch.optim.Optimizer,
        scheduler: Any = None,
        dist: Distributed | None = None,
        **config: Any,
    ):
        self.config = Config().replace(**config)
        self.dist = dist or Distributed.start(self.config.device)
        if self.config.multi_gpu and self.dist.world == 1:
            raise UserError("multi_gpu: this is one process; start with torchrun --standalone --nproc_per_node=N")
        self.model = model.to(self.dist.device)
        self.loaders = {"train": train_loader, "val": val_loader, "test": test_loader}
        self.optimizer, self.scheduler = optimizer, scheduler
        self.folder, self.checkpoints = self.config.folder, self.config.checkpoints
        self.dimensions = math.prod(model.image_size)
        self.reconstruction_loss = ReconstructionLoss(model.self_norm_layers(), self.config, self.dist)
        self.run_log = Run(self.folder, {}, enabled=False)  # silent until `run`
        self.epoch = self.batch = self.step = 0
        self.best = math.inf  # validation NLL in nats
        self.metrics: dict[str, float] = {}  # of the test images at the best validation NLL
        self.epoch_loss, self.epoch_count = 0.0, 0  # logged part of the running epoch, over all processes
        # this process's part since the last log; stays on the device, so that a step never waits for it
        self.loss_sum, self.loss_count = torch.zeros((), dtype=torch.float64, device=self._sum_device()), 0

    # ---------------------------------------------------------------------------------------------------- the run

    def run(self) -> dict[str, float]:
        """Train to `epochs` (from `last.pt` with `resume`) and return the test metrics at the best validation NLL."""
        config, dist = self.config, self.dist
        if config.resume:
            self.load(self.checkpoints / "last.pt")
        if config.wandb:  # wandb reads these names itself
            names = {"WANDB_NAME": config.name, "WANDB_NOTES": config.notes, "WANDB_ENTITY": config.wandb_entity}
            os.environ.update({name: value for name, value in names.items() if value})
        self.run_log = Run(
            self.folder, config.as_dict(), resume=config.resume, resume_step=self.step, overwrite=config.overwrite,
            wandb=config.wandb_project if config.wandb else None, enabled=dist.is_main,
        )  # fmt: skip
        if dist.is_main and not config.resume:
            (self.folder / "timing.csv").unlink(missing_ok=True)
        parameters = sum(p.numel() for p in self.model.parameters())
        self.run_log.info(f"{config.name}: {parameters:,} parameters, {dist.world} process(es) on {dist.device}")
        self.model.set_exact(not config.modified_grad)
        self._initialise()
        network = dist.wrap(self.model)
        with self.run_log, StopSignal() as stop:
            while self.epoch < config.epochs:
                if not self._train_epoch(network, stop):
                    self.save("last")
                    self.run_log.info(
                        f"stopped in epoch {self.epoch + 1} at batch {self.batch}; --resume goes on from there"
                    )
                    raise KeyboardInterrupt  # exit code 130: the run is not finished
                self._end_epoch()
        return self.metrics

    def _initialise(self) -> None:
        """Data-dependent initialisation on the first batch, alike on every process; a resumed model is initialised
        already.
        """
        if self.step == 0:
            images = next(iter(_batches(self.loaders["train"], 0, 0)))
            x = self.dist.gather(self._images(images))
            with torch.no_grad(), self._own_rng(self.config.seed):
                self.model.encode(x)

    def _train_epoch(self, network: nn.Module, stop: StopSignal) -> bool:
        """The rest of the current epoch; False when a stop signal ended it early."""
        config, loader = self.config, self.loaders["train"]
        self.model.train()
        batches = _batches(loader, self.epoch, self.batch)
        progress = self.run_log.progress(batches, total=len(loader), initial=self.batch, desc=f"epoch {self.epoch + 1}")
        started, first = time.perf_counter(), self.step
        for batch in progress:
            x = self._images(batch)
            scale = self._warm_up(len(loader))
            self.optimizer.zero_grad(set_to_none=True)
            nll = -network(x)[1].mean()
            loss = nll + self.reconstruction_loss()
            loss.backward()
            norm = self._clip()
            logged = (self.step + 1) % config.log_interval == 0 or self.batch + 1 == len(loader)
            if logged or self.dist.device.type == "cpu":  # reading a value makes the host wait for a GPU
                self._guard(loss, norm, x)
            self.optimizer.step()
            self._undo_warm_up()
            self.step, self.batch = self.step + 1, self.batch + 1
            self.loss_sum += nll.detach().to(self.loss_sum) * len(x)
            self.loss_count += len(x)
            if logged:
                self._log_train(norm, scale)
            # processes ask each other at the same steps only
            if (self.dist.world == 1 or self.step % 10 == 0) and self.dist.any(bool(stop)):
                return False
        if config.log_timing and self.step > first:
            self._log_time(train_step_ms=1000 * (time.perf_counter() - started) / (self.step - first))
        return True

    def _log_train(self, norm: Tensor, lr_scale: float) -> None:
        loss, count = float(self.dist.sum(self.loss_sum)), int(self.dist.sum(float(self.loss_count)))
        self.epoch_loss, self.epoch_count = self.epoch_loss + loss, self.epoch_count + count
        self.loss_sum, self.loss_count = torch.zeros_like(self.loss_sum), 0
        self.run_log.log(
            self.step, epoch=self.epoch + 1, batch_nll=loss / count, grad_norm=norm,
            lr=self.optimizer.param_groups[0]["lr"] * lr_scale,
        )  # fmt: skip

    def _end_epoch(self) -> None:
        config = self.config
        train_nll = self.epoch_loss / self.epoch_count
        row = {"train_nll": train_nll, "train_bpd": train_nll / (self.dimensions * math.log(2))}
        self.epoch, self.batch, self.epoch_loss, self.epoch_count = self.epoch + 1, 0, 0.0, 0
        last = self.epoch == config.epochs
        if self.scheduler is not None:
            self.scheduler.step()
        if self.epoch % config.eval_epochs == 0 or last:
            if config.eval_train:
                row |= self.evaluate("train", prefix="train_eval")
            row |= self.evaluate("val")
            if row["val_nll"] < self.best:
                self.best = row["val_nll"]
                self.metrics = self.evaluate("test", draws=config.eval_draws)
                self.save("best")
                if self.dist.is_main:
                    save_weights(self.checkpoints / "best.safetensors", self.model.state_dict(), config.as_dict())
            row |= self.metrics
        if self.epoch < 5 or self.epoch == 10 or self.epoch % config.sample_epochs == 0 or last:
            self.pictures(str(self.epoch))
        if self.epoch % config.vis_epochs == 0 or last:
            self._kernel_picture()
        self.run_log.log(self.step, epoch=self.epoch, **row)
        text = ", ".join(f"{name} {value:.4f}" for name, value in row.items())
        self.run_log.info(f"epoch {self.epoch}/{config.epochs}: {text}")
        self.save("last")

    # ---------------------------------------------------------------------------------------------------- one step

    def _images(self, batch: Any) -> Tensor:
        images = batch[0] if isinstance(batch, (tuple, list)) else batch
        x = images.to(self.dist.device, non_blocking=True).to(next(self.model.parameters()).dtype)
        # 8-bit grey levels to 0..levels-1; 17 levels give back scikit-learn's digits exactly
        return x if self.model.levels == 256 else (x * (self.model.levels / 256)).floor()

    def _warm_up(self, batches: int) -> float:
        """Scale the learning rates for this step: ((batch + 1) + epoch N) / (warmup_epochs N), at most 1."""
        scale = min(1.0, (self.batch + 1 + self.epoch * batches) / max(1, self.config.warmup_epochs * batches))
        for group in self.optimizer.param_groups:
            group["scheduled_lr"] = group["lr"]
            group["lr"] *= scale
        return scale

    def _undo_warm_up(self) -> None:
        """Give the scheduler its own learning rate back: recursive schedules multiply what they find."""
        for group in self.optimizer.param_groups:
            group["lr"] = group.pop("scheduled_lr")

    def _clip(self) -> Tensor:
        """Clip gradients (by value, then by norm) and return their norm before."""
        parameters = [p for p in self.model.parameters() if p.grad is not None]
        if self.config.grad_clip is not None:
            nn.utils.clip_grad_value_(parameters, self.config.grad_clip)
        limit = self.config.grad_clip_norm
        return nn.utils.clip_grad_norm_(parameters, math.inf if limit is None else limit)

    def _guard(self, loss: Tensor, norm: Tensor, x: Tensor) -> None:
        """Stop before the step on a non-finite loss or gradient: name the layer, keep crash.pt.

        On a GPU this looks at logged steps only; a bad step between them has spoilt the weights of crash.pt then, and
        `last.pt` is the state to go on from.
        """
        if not self.dist.any(not (math.isfinite(float(loss.detach())) and math.isfinite(float(norm)))):
            return
        found = first_non_finite_layer(self.model, x)
        where = f"layer {found} returned it" if found else "the forward pass is finite, the gradient is not"
        self._undo_warm_up()
        self.save("crash")
        try:
            check_finite(math.nan, self.step + 1, self.model)
        except NonFiniteError as error:
            raise NonFiniteError(f"{error}; {where}; state kept in {self.checkpoints / 'crash.pt'}") from None

    # ---------------------------------------------------------------------------------------------------- evaluation

    @torch.no_grad()
    def evaluate(self, split: str, draws: int = 1, prefix: str | None = None) -> dict[str, float]:
        """Mean NLL (nats) and bits/dim of a split, each image's log p averaged over `draws` dequantisations of a fixed
        seed.
        """
        was_training = self.model.training
        self.model.eval()
        sums, count, seen = torch.zeros((), dtype=torch.float64, device=self._sum_device()), 0, 0
        with self._own_rng(self.config.seed + 1 + self.dist.rank):
            for batch in _batches(self.loaders[split], 0, 0):
                x = self._images(batch)
                if len(x):
                    log_prob = torch.stack([self.model.log_prob(x).to(sums) for _ in range(draws)]).mean(0)
                    sums -= log_prob.sum()
                count, seen = count + len(x), seen + len(x) * self.dist.world
                if self.config.max_eval_ex is not None and seen >= self.config.max_eval_ex:
                    break
        self.model.train(was_training)
        nll = float(self.dist.sum(sums)) / float(self.dist.sum(float(count)))
        if not math.isfinite(nll):
            raise NonFiniteError(f"the {split} NLL is {nll} after step {self.step}; resume from an earlier checkpoint")
        name = prefix or split
        return {f"{name}_nll": nll, f"{name}_bpd": float(bits_per_dim(torch.tensor(-nll), self.dimensions))}

    def _noisy(self, x: Tensor) -> tuple[Tensor, FlowSequential]:
        """Dequantised images (padded where the model pads) of integer images x, and the rest of the flow."""
        cut = next(i for i, layer in enumerate(self.model.layers) if isinstance(layer, Dequantization)) + 1
        noisy = FlowSequential(self.model.layers[:cut]).encode(x)[0][-1]
        return noisy, FlowSequential(self.model.layers[cut:])

    @torch.no_grad()
    def reconstruction_error(self, x: Tensor) -> tuple[float, float]:
        """Largest and mean |x - decode(encode(x))| in grey levels, before rounding, of integer images (B, C, H, W)."""
        with self._own_rng(self.config.seed + 2):
            noisy, flow = self._noisy(x)
        error = (flow.reconstruct(noisy) - noisy).abs()
        return float(error.max()), float(error.mean())

    @torch.no_grad()
    def rounding_error(self, x: Tensor) -> float:
        """Largest |log p - log p in float64| / |log p| of integer images (B, C, H, W)."""
        with self._own_rng(self.config.seed + 2):
            noisy, flow = self._noisy(x)
        device = self._sum_device()
        exact = copy.deepcopy(flow).to(device, torch.float64)(noisy.to(device, torch.float64))[1]
        return float(((flow(noisy)[1].to(exact) - exact) / exact).abs().max())

    @torch.no_grad()
    def pictures(self, name: str) -> None:
        """samples/<name>.png and recon/<name>.png (images, reconstructions, absolute differences; a row each)."""
        if not self.dist.is_main:
            return
        was_training = self.model.training
        self.model.eval()
        config, top = self.config, self.model.levels - 1
        columns = max(1, round(math.sqrt(config.n_samples)))
        for exact, suffix in self._inverses():
            self.model.set_exact(exact)
            started = time.perf_counter()
            with self._own_rng(config.seed + 3):
                samples = self.model.sample_images(config.n_samples, config.temperature).float().cpu()
            if config.log_timing:
                self._log_time(**{f"sample{suffix}_ms": 1000 * (time.perf_counter() - started)})
            bad = int((~torch.isfinite(samples)).flatten(1).any(1).sum())
            if bad:
                self.run_log.info(f"{bad} of {len(samples)} samples{suffix} are not finite (drawn black)")
            picture = mosaic(torch.nan_to_num(samples) / top, columns)
            save_image(self.folder / config.sample_dir / f"{name}{suffix}.png", picture)
            self.run_log.image(f"samples{suffix}", picture, self.step)
        self.model.set_exact(not config.modified_grad)
        if config.plot_recon:
            x = self._images(next(iter(_batches(self.loaders["test"], 0, 0))))[:10]
            back = self.model.reconstruct(x)
            rows = torch.cat([x, back.clamp(0, top), (x - back).abs().clamp(0, top)]).float().cpu() / top
            save_image(self.folder / "recon" / f"{name}.png", mosaic(torch.nan_to_num(rows), len(x)))
            largest, mean = self.reconstruction_error(x)
            self.run_log.info(
                f"reconstruction error in grey levels: largest {largest:.2e}, mean {mean:.2e}; "
                f"log p in float64 differs by {self.rounding_error(x[:2]):.1e} of its value"
            )
        self.model.train(was_training)

    def _inverses(self) -> list[tuple[bool, str]]:
        """(exact, file suffix) of each inverse to draw samples with."""
        if not self.model.self_norm_layers():
            return [(False, "")]
        return [(False, ""), (True, "_trueinv")] if self.config.sample_true_inv else [(False, "")]

    def _kernel_picture(self) -> None:
        """kernels/<epoch>.png: the free taps of the first inverse convolution, one tile for each channel pair."""
        layer = next((module for module in self.model.modules() if isinstance(module, InverseConv2d)), None)
        if layer is None or not self.dist.is_main:
            return
        taps = (layer.kernel() - layer.pin).detach().cpu().flatten(0, 1)[:, None]  # (C C/G, 1, kh, kw)
        taps = 0.5 + taps / (2 * taps.abs().max().clamp(min=1e-12))
        enlarged = taps.repeat_interleave(8, 2).repeat_interleave(8, 3)
        save_image(self.folder / "kernels" / f"{self.epoch}.png", mosaic(enlarged, layer.channels // layer.groups))

    # ---------------------------------------------------------------------------------------------------- state

    def save(self, name: str) -> None:
        """`<checkpoints>/<name>.pt`: everything an exact resume needs. The main process writes, all wait."""
        own = {"rng": rng_state(), "loss_sum": self.loss_sum.cpu(), "loss_count": self.loss_count}
        states = [own] * self.dist.world
        if self.dist.world > 1:
            torch.distributed.all_gather_object(states, own)
        if self.dist.is_main:
            save_state(
                self.checkpoints / f"{name}.pt",
                KIND,
                model=self.model.state_dict(),
                optimizer=self.optimizer.state_dict(),
                scheduler=None if self.scheduler is None else self.scheduler.state_dict(),
                reconstruction=self.reconstruction_loss.state_dict(),
                processes=states,
                config=self.config.as_dict(),
                **{key: getattr(self, key) for key in STATE},
            )
        self.dist.barrier()

    def load(self, path: str | Path) -> None:
        """Continue from a file that `save` wrote.

        Raises UserError for a foreign file, another architecture, other data or training keys, another number of
        processes.
        """
        state = load_state(path, KIND)
        for name, item in FIELDS.items():
            fixed = item.metadata["group"] in ("data", "model", "training") or name == "seed"
            old, new = state["config"].get(name), getattr(self.config, name)
            if fixed and name not in FREE_KEYS and old != new:
                raise UserError(f"{path} was written with {name}={old}, this run has {name}={new}: they must agree")
        if len(state["processes"]) != self.dist.world:
            raise UserError(f"{path}: written by {len(state['processes'])} process(es), this run has {self.dist.world}")
        load_into(self.model, state["model"], path)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None:
            self.scheduler.load_state_dict(state["scheduler"])
            # the optimiser's steps of this epoch were taken before the checkpoint; else the scheduler warns of none
            self.optimizer._opt_called = True
        self.reconstruction_loss.load_state_dict(state["reconstruction"])
        for name in STATE:
            setattr(self, name, state[name])
        own = state["processes"][self.dist.rank]
        self.loss_sum, self.loss_count = own["loss_sum"].to(self.loss_sum), own["loss_count"]
        restore_rng(own["rng"])

    # ---------------------------------------------------------------------------------------------------- helpers

    def _sum_device(self) -> torch.device:
        return torch.device("cpu") if self.dist.device.type == "mps" else self.dist.device

    @contextmanager
    def _own_rng(self, seed: int) -> Iterator[None]:
        """Random numbers of their own for evaluation, so that it neither depends on nor changes the training stream."""
        devices = [self.dist.device] if self.dist.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            yield

    def _log_time(self, **values: float) -> None:
        if not self.dist.is_main:
            return
        path = self.folder / "timing.csv"
        head = "" if path.exists() else "epoch,what,value\n"
        append_text(path, head + "".join(f"{self.epoch},{name},{value:.4f}\n" for name, value in values.items()))


def _batches(loader: Any, epoch: int, start: int) -> Iterator[Any]:
    """Batches `start`, start + 1, ... of an epoch of any kind of loader."""
    if hasattr(loader, "epoch"):
        return loader.epoch(epoch, start)
    return (batch for index, batch in enumerate(loader) if index >= start)


@torch.no_grad()
def first_non_finite_layer(model: FlowModel, x: Tensor) -> str | None:
    """Index and name of the first layer whose output or log-determinant on x is not finite, or None."""
    for index, layer in enumerate(model.layers):
        if hasattr(layer, "split"):
            x, _, log_det = layer.split(x)
        else:
            x, log_det = layer(x)
        if not (torch.isfinite(x).all() and torch.isfinite(log_det).all()):
            return f"layers.{index} ({type(layer).__name__})"
    return None
