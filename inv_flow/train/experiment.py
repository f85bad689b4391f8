"""The training of a flow, from the first batch to the last picture.

    Experiment(model, train_loader, val_loader, test_loader, optimizer, scheduler, **config).run()

Loss: -mean log p(x) in nats (plus the reconstruction loss of self-normalising layers). Every epoch: train, evaluate the
validation images, and, when these improve, the test images; write sample and reconstruction grids, `last.pt` and
`best.pt`. Under torchrun each process takes its share of every batch. Written to the run folder: config.json,
metrics.csv, log.txt, tb/, timing.csv, samples/<epoch>.png, recon/<epoch>.png (images, reconstructions, differences),
checkpoints/{last,best}.pt and best.safetensors. Keys: `inv_flow.train.config.Config`.
"""

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.checkpoint import load_into, load_state, restore_rng, rng_state, save_state, save_weights
from common.errors import NonFiniteError, UserError
from common.images import mosaic, save_image
from common.launch import Distributed, StopSignal, check_finite
from common.run import Run
from inv_flow.layers.flow import FlowSequential, bits_per_dim
from inv_flow.layers.inv_conv import InverseConv2d
from inv_flow.model import FlowModel
from inv_flow.train.config import Config

KIND = "inv_flow"


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
        self.model = model.to(self.dist.device)
        self.loaders = {"train": train_loader, "val": val_loader, "test": test_loader}
        self.optimizer, self.scheduler = optimizer, scheduler
        self.folder = Path(self.config.out or Path("runs") / "inv_flow" / self.config.name)
        self.checkpoints = Path(self.config.checkpoint_path or self.folder / "checkpoints")
        self.dimensions = math.prod(model.image_size)
        self.epoch = self.batch = self.step = 0
        self.best = math.inf  # validation NLL in nats
        self.epoch_loss = torch.zeros(2, dtype=torch.float64)  # summed loss and count of the running epoch
        layers = model.self_norm_layers()
        self.geco = {"weight": [self.config.recon_loss_weight] * len(layers), "average": [0.0] * len(layers)}
        self._inputs: dict[nn.Module, Tensor] = {}
        if layers and self.config.add_recon_grad:
            for layer in layers:
                layer.register_forward_pre_hook(self._remember_input)
        self.run_log: Run | None = None

    # ---------------------------------------------------------------------------------------------------- the run

    def run(self) -> dict[str, float]:
        """Train to `epochs` (from `last.pt` with `resume`) and return the last test metrics."""
        config, dist = self.config, self.dist
        if config.resume:
            self.load(self.checkpoints / "last.pt")
        self.run_log = Run(
            self.folder, config.as_dict(), resume=config.resume, resume_step=self.step, overwrite=config.overwrite,
            wandb=config.wandb_project if config.wandb else None, enabled=dist.is_main,
        )  # fmt: skip
        parameters = sum(p.numel() for p in self.model.parameters())
        self.run_log.info(f"{config.name}: {parameters:,} parameters, {dist.world} process(es) on {dist.device}")
        self.model.set_exact(not config.modified_grad)
        self._initialise()
        network = dist.wrap(self.model)
        metrics: dict[str, float] = {}
        with self.run_log, StopSignal() as stop:
            while self.epoch < config.epochs:
                finished = self._train_epoch(network, stop)
                if not finished:
                    self.save("last")
                    self.run_log.info(
                        f"stopped in epoch {self.epoch + 1} at batch {self.batch}; --resume goes on from there"
                    )
                    break
                metrics = self._end_epoch(metrics)
        return metrics

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
        if self.batch == 0:
            self.epoch_loss = torch.zeros(2, dtype=torch.float64)
        batches = _batches(loader, self.epoch, self.batch)
        progress = self.run_log.progress(batches, total=len(loader), initial=self.batch, desc=f"epoch {self.epoch + 1}")
        started, first = time.perf_counter(), self.step
        pending: list[Tensor] = []  # losses still on the device: read in one go, so that a step never waits for it
        for batch in progress:
            x = self._images(batch)
            scale = self._warm_up(len(loader))
            self.optimizer.zero_grad(set_to_none=True)
            log_prob = network(x)[1]
            nll = -log_prob.mean()
            loss = nll + self._reconstruction_loss()
            loss.backward()
            norm = self._clip()
            if self.dist.device.type == "cpu":
                self._guard(nll, norm, x)
            self.optimizer.step()
            self._undo_warm_up(scale)
            self.step, self.batch = self.step + 1, self.batch + 1
            pending.append(torch.stack([nll.detach().double() * len(x), nll.new_tensor(len(x), dtype=torch.float64)]))
            if self.step % config.log_interval == 0 or self.batch == len(loader):
                self._guard(nll, norm, x)
                self._log_train(pending, norm, scale)
                pending = []
            # processes ask each other at the same steps only
            if (self.dist.world == 1 or self.step % 10 == 0) and self.dist.any(bool(stop)):
                self._log_train(pending, None, None)
                return False
        if config.log_timing and self.step > first:
            self._log_time(train_step_ms=1000 * (time.perf_counter() - started) / (self.step - first))
        return True

    def _log_train(self, pending: list[Tensor], norm: Tensor | None, lr_scale: float | None) -> None:
        if pending:
            sums = self.dist.sum(torch.stack(pending).sum(0)).cpu()
            self.epoch_loss += sums
            if norm is not None:
                self.run_log.log(
                    self.step, epoch=self.epoch + 1, batch_nll=sums[0] / sums[1], grad_norm=norm,
                    lr=self.optimizer.param_groups[0]["lr"] * lr_scale,
                )  # fmt: skip

    def _end_epoch(self, metrics: dict[str, float]) -> dict[str, float]:
        config = self.config
        train_nll = float(self.epoch_loss[0] / self.epoch_loss[1])
        row = {"train_nll": train_nll, "train_bpd": train_nll / (self.dimensions * math.log(2))}
        self.epoch, self.batch = self.epoch + 1, 0
        if self.scheduler is not None:
            self.scheduler.step()
        if self.epoch % config.eval_epochs == 0 or self.epoch == config.epochs:
            if config.eval_train:
                row |= self.evaluate("train", prefix="train_eval")
            row |= self.evaluate("val")
            if row["val_nll"] < self.best:
                self.best = row["val_nll"]
                metrics = self.evaluate("test", draws=config.eval_draws)
                self.save("best")
                if self.dist.is_main:
                    save_weights(self.checkpoints / "best.safetensors", self.model.state_dict(), config.as_dict())
            row |= metrics
        if self.epoch <= 5 or self.epoch == 10 or self.epoch % config.sample_epochs == 0 or self.epoch == config.epochs:
            self.pictures()
        if config.vis_epochs and self.epoch % config.vis_epochs == 0:
            self._kernel_picture()
        self.run_log.log(self.step, epoch=self.epoch, **row)
        text = ", ".join(f"{name} {value:.4f}" for name, value in row.items())
        self.run_log.info(f"epoch {self.epoch}/{config.epochs}: {text}")
        self.save("last")
        return metrics

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

    def _undo_warm_up(self, scale: float) -> None:
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

    def _guard(self, nll: Tensor, norm: Tensor, x: Tensor) -> None:
        """Stop on a non-finite loss or gradient: name the layer, keep a crash state. The weights are those before the
        step.
        """
        if math.isfinite(float(nll.detach())) and math.isfinite(float(norm)):
            return
        found = first_non_finite_layer(self.model, x)
        where = f"layer {found} returned it" if found else "the forward pass is finite, the gradient is not"
        self.save("crash")
        try:
            check_finite(math.nan, self.step + 1, self.model)
        except NonFiniteError as error:
            raise NonFiniteError(f"{error}; {where}; state kept in {self.checkpoints / 'crash.pt'}") from None

    def _remember_input(self, layer: nn.Module, inputs: tuple) -> None:
        if layer.training and torch.is_grad_enabled():
            self._inputs[layer] = inputs[0].detach()

    def _reconstruction_loss(self) -> Tensor | float:
        """sum over self-normalising layers of lambda mean ||x - R W x||^2, with GECO's update of lambda when asked."""
        total: Tensor | float = 0.0
        config = self.config
        for index, layer in enumerate(self.model.self_norm_layers()):
            if layer not in self._inputs:
                continue
            loss = layer.reconstruction_loss(self._inputs.pop(layer), config.sym_recon_grad, config.only_R_recon)
            total = total + self.geco["weight"][index] * loss
            if config.recon_loss_lr > 0:
                value = float(self.dist.mean(loss.detach()))
                average = config.recon_alpha * self.geco["average"][index] + (1 - config.recon_alpha) * value
                self.geco["average"][index] = average
                self.geco["weight"][index] *= math.exp(config.recon_loss_lr * average)
        return total

    # ---------------------------------------------------------------------------------------------------- evaluation

    @torch.no_grad()
    def evaluate(self, split: str, draws: int = 1, prefix: str | None = None) -> dict[str, float]:
        """Mean NLL (nats) and bits/dim of a split, each image's log p averaged over `draws` dequantisations of a fixed
        seed.
        """
        was_training = self.model.training
        self.model.eval()
        sums, seen = torch.zeros(2, dtype=torch.float64, device=self._sum_device()), 0
        with self._own_rng(self.config.seed + 1 + self.dist.rank):
            for batch in _batches(self.loaders[split], 0, 0):
                x = self._images(batch)
                if len(x):
                    log_prob = torch.stack([self.model.log_prob(x).to(sums) for _ in range(draws)]).mean(0)
                    sums += torch.stack([-log_prob.sum(), sums.new_tensor(len(x))])
                seen += len(x) * self.dist.world
                if self.config.max_eval_ex and seen >= self.config.max_eval_ex:
                    break
        self.model.train(was_training)
        total, count = self.dist.sum(sums).tolist()
        if count == 0:
            raise UserError(f"the {split} split has no images")
        nll = total / count
        if not math.isfinite(nll):
            raise NonFiniteError(f"the {split} NLL is {nll} after step {self.step}; resume from an earlier checkpoint")
        name = prefix or split
        return {f"{name}_nll": nll, f"{name}_bpd": float(bits_per_dim(torch.tensor(-nll), self.dimensions))}

    @torch.no_grad()
    def reconstruction_error(self, x: Tensor) -> tuple[float, float]:
        """Largest and mean |x - decode(encode(x))| in grey levels, before rounding, of integer images x (B, C, H, W)."""
        self.model.eval()
        with self._own_rng(self.config.seed + 2):
            noisy = x + torch.rand_like(x)
            rest = FlowSequential(self.model.layers[self._first_after_noise() :])
            error = (rest.reconstruct(noisy) - noisy).abs()
        return float(error.max()), float(error.mean())

    def _first_after_noise(self) -> int:
        names = [type(layer).__name__ for layer in self.model.layers]
        return names.index("Dequantization") + 1

    @torch.no_grad()
    def pictures(self) -> None:
        """samples/<epoch>.png and recon/<epoch>.png (images, reconstructions, absolute differences; a row each)."""
        if not self.dist.is_main:
            return
        self.model.eval()
        config, top = self.config, self.model.levels - 1
        columns = max(1, round(math.sqrt(config.n_samples)))
        with self._own_rng(config.seed + 3):
            for exact, suffix in self._inverses():
                self.model.set_exact(exact)
                started = time.perf_counter()
                samples = self.model.sample_images(config.n_samples, config.temperature)
                if config.log_timing:
                    self._log_time(sample_ms=1000 * (time.perf_counter() - started))
                picture = mosaic(torch.nan_to_num(samples).float().cpu() / top, columns)
                save_image(self.folder / config.sample_dir / f"{self.epoch}{suffix}.png", picture)
                self.run_log.image(f"samples{suffix}", picture, self.step)
            self.model.set_exact(not config.modified_grad)
            if config.plot_recon:
                x = self._images(next(iter(_batches(self.loaders["test"], 0, 0))))[:10]
                back = self.model.reconstruct(x)
                rows = torch.cat([x, back.clamp(0, top), (x - back).abs().clamp(0, top)]).cpu() / top
                save_image(self.folder / "recon" / f"{self.epoch}.png", mosaic(rows.float(), len(x)))
                largest, mean = self.reconstruction_error(x)
                self.run_log.info(f"reconstruction error in grey levels: largest {largest:.2e}, mean {mean:.2e}")
        self.model.train()

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
        states = [rng_state()]
        if self.dist.world > 1:
            import torch.distributed as torch_dist

            states = [None] * self.dist.world
            torch_dist.all_gather_object(states, rng_state())
        if self.dist.is_main:
            names = ("epoch", "batch", "step", "best", "epoch_loss", "geco")
            save_state(
                self.checkpoints / f"{name}.pt",
                KIND,
                model=self.model.state_dict(),
                optimizer=self.optimizer.state_dict(),
                scheduler=None if self.scheduler is None else self.scheduler.state_dict(),
                rng=states,
                config=self.config.as_dict(),
                **{key: getattr(self, key) for key in names},
            )
        self.dist.barrier()

    def load(self, path: str | Path) -> None:
        """Continue from a file that `save` wrote. Raises UserError for a foreign file or another architecture."""
        state = load_state(path, KIND)
        load_into(self.model, state["model"], path)
        self.optimizer.load_state_dict(state["optimizer"])
        if self.scheduler is not None and state["scheduler"] is not None:
            self.scheduler.load_state_dict(state["scheduler"])
        for name in ("epoch", "batch", "step", "best", "epoch_loss", "geco"):
            setattr(self, name, state[name])
        if len(state["rng"]) != self.dist.world:
            raise UserError(f"{path} was written by {len(state['rng'])} process(es), this run has {self.dist.world}")
        restore_rng(state["rng"][self.dist.rank])

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
        new = not path.exists()
        with open(path, "a", encoding="utf-8") as file:
            if new:
                file.write("epoch,what,value\n")
            file.writelines(f"{self.epoch},{name},{value:.4f}\n" for name, value in values.items())


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


def make_optimizer(model: nn.Module, config: Config) -> torch.optim.Optimizer:
    """The optimiser that `config` names; inverse-convolution kernels take `lr_inv_conv` times the learning rate."""
    kernels = [m.weight for m in model.modules() if isinstance(m, InverseConv2d)]
    taken = {id(p) for p in kernels}
    groups = [{"params": [p for p in model.parameters() if id(p) not in taken], "lr": config.lr}]
    if kernels:
        groups.append({"params": kernels, "lr": config.lr * config.lr_inv_conv})
    kinds = {"Adam": torch.optim.Adam, "Adamax": torch.optim.Adamax, "SGD": torch.optim.SGD}
    options: dict[str, Any] = {"momentum": 0.95} if config.optimizer_name == "SGD" else {}
    return kinds[config.optimizer_name](groups, lr=config.lr, weight_decay=config.weight_decay, **options)


def make_scheduler(optimizer: torch.optim.Optimizer, config: Config) -> Any:
    """The learning-rate schedule that `config` names (a step an epoch), or None."""
    schedulers = torch.optim.lr_scheduler
    if config.scheduler_name == "Step":
        return schedulers.StepLR(optimizer, config.step_epochs, config.gamma)
    if config.scheduler_name == "Exponential":
        return schedulers.ExponentialLR(optimizer, config.gamma)
    if config.scheduler_name == "MultiStep":
        return schedulers.MultiStepLR(optimizer, list(config.milestones), config.gamma)
    return None
