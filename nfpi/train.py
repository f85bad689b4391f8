"""Training of the conditional flow (Enescu & Sahbi, BMVC 2024): maximum likelihood with one fixed Gaussian a class.

Called by main.py. `train_flow` is the whole procedure: data-dependent initialisation, class Gaussians from the latents
of the untrained flow, epochs of Adamax, the fixed point iteration at the end of epoch 0, then frozen Gaussians and a
moving average of the weights. A step reads as: this loop, the flow (model.py), the objective (gaussians.py).

Written below the run's folder: config.json, metrics.csv, tb/, log.txt, fpi_epoch<e>.csv (one row an iteration),
pictures/, checkpoints/state_epoch<e>.pt (the full state; the newest is kept) and checkpoints/flow.safetensors (+ .json:
the weights for inference). Every random number is a function of (seed, use, epoch, batch): an interrupted run resumes
exactly, and one process and several draw the same numbers.
"""

import math
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from common.checkpoint import load_into, load_state, load_weights, prune, rng_state
from common.cuda_graph import CudaGraph, detached
from common.errors import UserError
from common.launch import Distributed
from common.run import Run
from common.training import FINITE_EVERY, Place, Training
from nfpi import pictures
from nfpi.conditional import STATE_KIND, ConditionalFlow
from nfpi.config import Config
from nfpi.data import FlowSets, Images, Stream, Use, generator
from nfpi.ema import PowerEma
from nfpi.evaluate import evaluate, test_stream
from nfpi.fit_gaussians import (
    GlemMoments,
    fit_by_fixed_point,
    fit_by_gradients,
    gaussians_move,
    place_initially,
    reparametrisation,
)
from nfpi.gaussians import ClassGaussians, bits_per_dim
from nfpi.label_encoder import DistancedPixels
from nfpi.matrix_exp import coarse
from nfpi.model import MultiScaleFlow

OPTIMIZERS = {"adamax": torch.optim.Adamax, "adam": torch.optim.Adam, "adamw": torch.optim.AdamW}
REACH = 4.0  # learning rates by which these optimisers move a weight in a step at most


def warmup_lr(step: int, lr: float, warmup_steps: int) -> float:
    """Linear warm-up: min((step + 1) / warmup_steps, 1) lr."""
    return min((step + 1) / warmup_steps, 1.0) * lr if warmup_steps > 0 else lr


def learning_rate(config: Config, step: int, epoch: int) -> float:
    """Warm-up over global steps (from 0), then a factor `lr_decay` from every epoch in `step_size` on."""
    train = config.train
    decays = sum(epoch >= milestone for milestone in train.step_size)
    return warmup_lr(step, train.lr * train.lr_decay**decays, train.warmup_steps)


def train_flow(config: Config, sets: FlowSets, test: Images, training: "FlowTraining", dist: Distributed) -> Path:
    """Train the flow and its Gaussians on `sets`; figures on `test`. Returns the weights file.

    Raises KeyboardInterrupt when a signal stopped it; the state is saved.
    """
    device, run = dist.device, training.run
    model = training.model = new_model(config)
    if len(sets.fit.classes) == model.classes:
        model.class_names = sets.fit.classes
    flow, gaussians = model.flow.to(device), model.gaussians.to(device)
    optimizer = OPTIMIZERS[config.train.optimizer](flow.parameters(), lr=config.train.lr)
    moments = GlemMoments(config)
    batches = Stream(sets.train, config, dist, Use.TRAIN, config.train.batch_size, sets.merged)
    latent_batch = dist.world * max(1, config.val.batch_size // dist.world)
    latents = Stream(sets.fit, config, dist, Use.LATENTS, latent_batch)
    tests = test_stream(test, config, dist)
    if training.state is not None and training.state["codes"] is not None:
        model.codes = DistancedPixels(training.state["codes"])
    if training.state is None:
        initialise(model, sets.train, config, run, device)
        place_initially(model, latents, config, training)
    ema = PowerEma(flow, **config.train.ema.as_dict()) if config.train.ema_name else None
    training.restore(flow=flow, gaussians=gaussians, optimizer=optimizer, glem=moments, **{"ema": ema} if ema else {})
    flow.use_amp(config.amp)  # not the average's copy: figures, statistics and pictures are in full precision
    if config.torch_compile:
        flow.compile(mode=config.torch_compile_mode)  # in place: names in the checkpoints stay
    parallel = dist.wrap(flow)
    run.info(f"{sum(p.numel() for p in flow.parameters()):,} parameters, D={model.dim}, d={flow.config.latent_dim}")

    def averaged() -> ConditionalFlow:
        shadow = ema.ema_model if ema and ema.initialised else flow
        return replace(model, flow=shadow)

    def end_epoch() -> None:
        """Move the Gaussians, test, draw, save, as the epoch asks."""
        epoch, last = training.epoch, training.epoch + 1 == config.train.epochs
        figures = training.epoch_figures()
        if gaussians_move(config, epoch):
            if config.val.gmm.training_algorithm == "glem":
                fit_by_gradients(model, latents, config, training, moments)
            else:
                fit_by_fixed_point(model, latents, config, training)
        if (epoch + 1) % config.test_every_n_epochs == 0 or last:
            figures |= {f"test_{k}": v for k, v in evaluate(averaged(), tests, dist).items()}
        run.log(training.step, epoch=epoch, **figures)
        run.info(f"epoch {epoch}: " + ", ".join(f"{k} {v:.4f}" for k, v in figures.items()))
        if dist.is_main and (picture_epoch(config, epoch) or (last and config.save_every_n_epochs)):
            draw_pictures(averaged(), config, run, training.step, last and config.temperature_sampling_for_results)

    if training.left_an_epoch_open(batches):
        end_epoch()
        training.open_next_epoch()
    flow.train()
    flow.reach = REACH * config.train.lr if device.type == "cuda" else None
    compute = partial(gradients, model, parallel, optimizer, dist.world)
    graph = CudaGraph(compute, flow.parameters(), dist, config.cuda_graph, run.info)
    for x, y, noise, count in training.steps(batches, last=batches.steps(config.train.epochs)):
        lr = learning_rate(config, training.step - 1, training.epoch)
        for group in optimizer.param_groups:
            group["lr"] = lr
        x = model.input(x, y, noise)
        bounds = coarse(flow.bounds()) if graph.active else None
        loss, z = (compute if graph.active and bounds is None else graph)(x, y, count, bounds)
        training.check(loss, flow)
        optimizer.step()
        if ema and training.epoch >= config.merged_from:
            ema.update(flow)
        training.log_step(loss, lr, z, y, count)
        if training.epoch_ends:
            end_epoch()
            if (training.epoch + 1) % config.save_model_ckpt_every_n_epochs == 0:
                training.save()
    target = training.folder / "checkpoints" / "flow.safetensors"
    if dist.is_main:
        best = averaged()
        epochs, is_average = training.place_after.epoch, best.flow is not flow
        best.save(target, dataset=config.dataset_name, epochs=epochs, averaged=is_average)
    dist.barrier()
    return target


def gradients(
    model: ConditionalFlow, parallel: nn.Module, optimizer: torch.optim.Optimizer, world: int,
    x: Tensor, y: Tensor, count: int, bounds: tuple[float | None, ...] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """The gradients of this process's rows x (b, C, H, W), in [-1, 1], y (b,), of a batch of `count`; returns the loss
    and z (b, d), detached. `parallel` is the flow as `Distributed.wrap` gives it.
    """
    latent = parallel(x, bounds)  # z (b, d), log-determinant (b,)
    nll = model.latent_nll(latent, y)  # (b,)
    # processes may hold unequal shares of the last batch: the mean over processes is that of the batch
    loss = nll.sum() * world / count
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    return detached((loss, latent.z))


def new_model(config: Config) -> ConditionalFlow:
    """The untrained model: random rotations and kaiming weights by `seed`, Gaussians at the centre."""
    np.random.seed(config.seed)
    torch.manual_seed(config.seed)
    dtype = torch.float64 if config.trainer_precision == 64 else torch.float32
    architecture, info, label = config.flow(), config.dataset, config.label_encoder
    flow = MultiScaleFlow(architecture).to(dtype)
    shared = not config.val.gmm.gaussian_method_name.startswith("one_per_class")
    shape = (info.num_classes, architecture.latent_dim)
    variance = 1.0 if shared else reparametrisation(config).initial
    gaussians = ClassGaussians(torch.zeros(shape, dtype=dtype), torch.full(shape, variance, dtype=dtype), shared)
    codes = None
    if config.band_rows:
        rng = generator(config.seed, Use.CODES)
        codes = DistancedPixels.make(info.num_classes, info.ch, label.pxh, info.w, label.iters, rng)
    return ConditionalFlow(flow, gaussians, config.bits, codes, config.test_noise)


def initialise(model: ConditionalFlow, train: Images, config: Config, run: Run, device: torch.device) -> None:
    """The data-dependent initialisation from the first images, then pre-trained weights where they are asked for."""
    count = min(config.train.init_batch_size, len(train))
    if count < 2:
        raise UserError(f"the data-dependent initialisation needs at least two training images, here are {count}")
    first = train.subset(torch.arange(count))
    for x, y, noise, _ in Stream(first, config, Distributed(device), Use.INIT, count).epoch(0):
        model.flow.initialise(model.input(x, y, noise))
    path = config.nf_weights_load_path
    if path:
        tensors, _ = load_weights(path)
        own = {k.removeprefix("flow."): v for k, v in tensors.items() if k.startswith("flow.")}
        absent = {k: v for k, v in model.flow.state_dict().items() if k not in own and "attention_block_after" in k}
        if absent:
            run.info(f"{path} has no attention blocks: they keep their identity initialisation")
        load_into(model.flow, {**own, **absent}, path)


def picture_epoch(config: Config, epoch: int) -> bool:
    """Whether pictures and the training accuracy are due at the end of `epoch`."""
    every = config.save_every_n_epochs
    return bool(every) and epoch >= config.save_start_epoch and (epoch + 1) % every == 0


def draw_pictures(model: ConditionalFlow, config: Config, run: Run, step: int, temperatures: bool) -> None:
    """Sample grids of the first ten classes, mean and variance curves, t-SNE of class samples; at the end a grid for
    every temperature 0.1 ... 1.0.
    """
    place, device = (config.seed, Use.PICTURE, step), model.device
    with model.evaluating():
        shown = pictures.class_grids(model, config.T, generator(*place, device=device))
        for i in range(10 if temperatures else 0):
            t = round(0.1 * (i + 1), 1)
            grids = pictures.class_grids(model, t, generator(*place, i, device=device))
            shown |= {f"{name}_t{t}": picture for name, picture in grids.items()}
    if not model.gaussians.shared:
        shown |= pictures.gaussian_curves(model.gaussians)
        shown["tsne_latents"] = pictures.latent_tsne(model.gaussians, generator(*place, device=device))
    pictures.write_all(run, shown, step)


# ---------------------------------------------------------------- the record of a run


class FlowTraining(Training):
    """A training run with the states' names and layout, and the figures of its steps.

    `model` is set by the loop. On a GPU the rows of metrics.csv wait until the loss is looked at anyway.
    """

    model: ConditionalFlow

    def __init__(
        self, folder: Path, config: Config, dist: Distributed, state: dict[str, Any] | None = None, **how: Any
    ):
        """`state`: what `read_state` gave, where the caller has read it."""
        read = (lambda _: state) if state is not None else read_state
        super().__init__(folder, STATE_KIND, config, dist, read=read, **how)
        self._rows: list[tuple[int, int, float, Tensor]] = []
        # images, nats, correct ones of this epoch
        number = torch.float32 if dist.device.type == "mps" else torch.float64
        self.sums = torch.zeros(3, dtype=number, device=dist.device)
        if self.state is not None:
            self.sums += torch.as_tensor(self.state["extra"]["sums"], dtype=number).to(dist.device)

    @property
    def place_after(self) -> Place:
        """Where the step under way leads."""
        return self._next

    def left_an_epoch_open(self, batches: Stream) -> bool:
        """Whether the state is an older one, saved between an epoch's last step and the work at its end."""
        return self.place.images > 0 and self.place.images // batches.batch_size >= batches.batches(self.place.epoch)

    def open_next_epoch(self) -> None:
        """Go on with the first batch of the next epoch."""
        self.epoch += 1
        self.place = self._next = self._before = Place(self.step, self.epoch, 0)

    def log_step(self, loss: Tensor, lr: float, z: Tensor, y: Tensor, count: int) -> None:
        """Keep one step's figures; write them at once on a CPU, every FINITE_EVERY steps elsewhere."""
        hits = self.sums.new_zeros(())
        if picture_epoch(self.options, self.epoch) and not self.model.gaussians.shared:
            predicted = self.model.gaussians.logits(z).argmax(1).to(y.device)
            hits = (predicted == y).sum().to(self.sums)
        shared = (loss.to(self.sums) / self.dist.world, hits) if self.dist.world > 1 else (loss.to(self.sums), hits)
        nats, correct = self.dist.sum(torch.stack(shared)).unbind() if self.dist.world > 1 else shared
        self.sums += torch.stack([torch.full_like(nats, count), nats * count, correct])
        self._rows.append((self.step, self.epoch, lr, nats))
        if self.dist.device.type == "cpu" or self.step % FINITE_EVERY == 0:
            self.flush()

    def flush(self) -> None:
        """Write the rows that wait."""
        rows, self._rows = self._rows, []
        if rows:
            losses = torch.stack([nats for *_, nats in rows]).cpu()
            bits = bits_per_dim(losses.float(), self.model.dim).tolist()
            for (step, epoch, lr, _), loss, bpd in zip(rows, losses.tolist(), bits, strict=True):
                self.run.log(step, epoch=epoch, loss=loss, bpd=bpd, lr=lr)

    def epoch_figures(self) -> dict[str, float]:
        """Means over the images of the epoch that ends."""
        self.flush()
        images, nats, correct = self.sums.tolist()
        self.sums.zero_()
        figures = {"train_loss": nats / images, "train_bpd": nats / images / (self.model.dim * math.log(2))}
        if picture_epoch(self.options, self.epoch) and not self.model.gaussians.shared:
            figures["train_acc"] = correct / images
        return figures

    def save(self, path: str | Path | None = None) -> None:
        """Write the rows that wait and the full state, checkpoints/state_epoch<e>.pt; older states go."""
        self.flush()
        if path is None:
            self.checkpoint = self.folder / "checkpoints" / f"state_epoch{self._next.epoch:04d}.pt"
        super().save(path)
        if path is None and self.dist.is_main:
            prune(self.checkpoint.parent, "state_epoch*.pt", keep=1)

    def full_state(self) -> dict[str, Any]:
        """What `save` writes; architecture and codes lie beside the parts, for `ConditionalFlow.load`."""
        self.extra["sums"] = self.sums.tolist()
        codes = None if self.model.codes is None else self.model.codes.codes
        return super().full_state() | {"model_config": self.model.facts(), "codes": codes}


def read_state(path: str | Path) -> dict[str, Any]:
    """A training state; those written before options, place and random numbers had entries of their own are brought
    into today's form. Raises UserError for a damaged or foreign one.
    """
    state = load_state(path, STATE_KIND)
    try:
        if "options" not in state:
            place = {"step": state["step"], "epoch": state["epoch"],
                     "images": state["batch"] * state["config"]["train"]["batch_size"]}  # fmt: skip
            own = {"options": state["config"], "place": place, "rng": rng_state(), "extra": {"sums": state["sums"]}}
            state = {**state, **own}
        if state["codes"] is not None and not isinstance(state["codes"], Tensor):
            raise TypeError("codes")
        Place(**state["place"])
        torch.as_tensor(state["extra"]["sums"], dtype=torch.float64).view(3)
        if any(not isinstance(number, int) or number < 0 for number in state["place"].values()):
            raise ValueError("place")
        return state
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{path} is damaged or of another program ({error}); use an older checkpoint") from error
