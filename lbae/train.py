"""The training loop of the Latent Bernoulli Autoencoder; networks and losses are in lbae/model.py.

Started by mnist.py, cifar10.py, celeba.py and folder.py. An epoch ends with a pass over the test set, the codes of the
training images, and models/weights-<E>.cp. SIGTERM or Ctrl-C saves in the middle of an epoch.
"""

import math
from collections.abc import Mapping
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.batches import Batches
from common.checkpoint import rng_state
from common.cuda_graph import CudaGraph, detached
from common.errors import UserError
from common.launch import (
    Distributed,
    autocast,
    full_precision,
    keep_freed_memory,
    normalise_over_processes,
    seed_everything,
)
from common.training import Place, Training
from lbae.data import as_input, attribute_names, attributes, load_split
from lbae.experiment import (
    KIND,
    Latents,
    TextLog,
    checkpoint_path,
    name_checkpoint,
    own_files,
    pack_bits,
    read_checkpoint,
    unpack_bits,
)
from lbae.model import Encoded, build_model, losses, parameter_counts, to_device
from lbae.options import Params, as_declared
from lbae.reconstruct import pairs, run_set, save_pairs


def train(params: Params, folder: Path) -> None:
    """Train from scratch, or resume with `l`, `reload[=E]`, `resume=auto`; everything is written below `folder`."""
    with closing(Distributed.start(params.device_name)) as dist:
        full_precision(params.tf32)
        keep_freed_memory()
        seed_everything(params.seed, params.deterministic)
        train_set, test_set = load_split(params, "train"), load_split(params, "test")
        places = {"workers": params.workers, "rank": dist.rank, "world": dist.world, "device": dist.device,
                  "hold": params.hold}  # fmt: skip
        batches = Batches(train_set, params.batch_size, params.seed, **places)
        tests = Batches(test_set, params.batch_size_test, shuffle=False, drop_last=False, **places)

        model = to_device(build_model(params), dist.device)
        fused = dist.device.type != "mps"
        optimizer = torch.optim.Adam(model.parameters(), lr=params.lr, weight_decay=params.l2, fused=fused)
        with LbaeTraining(folder, params, dist) as training:
            training.restore(enc=model.enc, gen=model.gen, optimizer=optimizer)
            training.names = attribute_names(train_set)
            training.start(model, len(train_set), len(test_set))
            if table := getattr(train_set.parent, "table", None):
                training.run.info(f"{params.labels}: {table}")
            module = dist.wrap(normalise_over_processes(model, dist))
            module.train()
            step = CudaGraph(
                partial(gradients, module, optimizer, params), model.parameters(), dist, params.cuda_graph,
                training.run.info,
            )  # fmt: skip
            for images, targets in training.steps(batches, last=training.last_step(len(batches))):
                x = as_input(images)  # (B, C, S, S) in [0, 1]
                loss, terms, xr, encoded = step(x)
                training.check(loss, model)
                optimizer.step()

                training.remember(terms, encoded, attributes(train_set, targets))
                if training.epoch_ends:
                    sync_buffers(model, dist)
                    found = run_set(params, model, tests, test_set, dist, mosaic_seed=training.epoch)
                    training.end_epoch(found, pairs(x, xr))
                    module.train()


def gradients(
    module: nn.Module, optimizer: torch.optim.Optimizer, params: Params, x: Tensor
) -> tuple[Tensor, dict[str, Tensor], Tensor, Encoded]:
    """The gradients of a batch x (B, C, S, S), in [0, 1]; returns loss, terms, reconstructions and codes, detached."""
    with autocast(x.device, params.amp):
        xr, encoded = module(x)
    terms = losses(xr, x, encoded, params.binary_reco_loss, params.kl_weight)  # (B,) each
    loss = terms["loss"].mean()
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    return detached((loss, terms, xr, encoded))


class LbaeTraining(Training):
    """The record of a training in the published forms: rows by images seen, checkpoints, codes of the running epoch.

    iter   training images seen
    best   lowest test loss of an epoch
    """

    def __init__(self, folder: Path, params: Params, dist: Distributed):
        self.params, self.best_path = params, folder / "models" / "best.cp"
        source = checkpoint_path(folder, params.reload)
        resumes: bool | str = params.loads or params.resume
        if not resumes and not params.overwrite and (own_files(folder) or (folder / "config.json").exists()):
            raise UserError(
                f"{folder} already holds an experiment; resume it by `l`, or add overwrite=1, or name another by exp="
            )
        dist.barrier()  # every process has looked before one writes
        super().__init__(
            folder, KIND, params, dist, resume=resumes, overwrite=params.overwrite, checkpoint=source,
            read=self._read, place=self._place, saved_options=lambda state: as_declared(state.get("config", {})),
            last_row=lambda state: state["iter"], tensorboard=params.tensorboard, wandb=params.wandb or None,
        )  # fmt: skip
        self.checkpoint = self.best_path.with_name("last.cp")  # whatever was loaded, this is what is written
        self.iter, self.best, self.loss_eval = 0, math.inf, None
        self.codes: list[Tensor] = []  # packed bits (B, D / 8), or floats (B, D), of the running epoch
        self.labels: list[Tensor] = []
        self.names: list[str] = []  # of attributes or classes
        self._unread: list[tuple[int, dict[str, Tensor]]] = []  # (iter, terms) of batches, still on the device
        self._row: list[list[float]] = []
        if self.state is not None:
            self.iter, self.loss_eval = self.state["iter"], self.state["loss_eval"]
            self.codes = [part.to(dist.device) for part in self.state["codes"]]
            self.labels = [part.to(dist.device) for part in self.state["labels"]]
            self.best = math.inf if self.state["best"] is None else self.state["best"]
        elif dist.is_main and params.overwrite:
            for path in own_files(folder):
                path.unlink()
        dist.barrier()
        self.log = TextLog(folder, "train", enabled=dist.is_main)

    def _place(self, state: Mapping[str, Any]) -> Place:
        """Where a checkpoint stands; published and older ones name the last complete epoch and the next batch."""
        size = state.get("config", {}).get("batch_size", self.params.batch_size)
        epoch, images = state["epoch"] + 1, state["batch"] * size
        if epoch > self.params.epochs_max:
            raise UserError(f"epochs_max={self.params.epochs_max}, but {epoch} epochs are done; give a larger one")
        return Place(**state["place"]) if "place" in state else Place(state["iter"] // size, epoch, images)

    def _read(self, path: Path) -> dict[str, Any]:
        """A checkpoint; also when an earlier epoch is taken up, what is best stays on the disk."""
        state = read_checkpoint(path)
        losses = [state["best"], read_checkpoint(self.best_path)["loss_eval"] if self.best_path.is_file() else None]
        return {**state, "best": min((loss for loss in losses if loss is not None), default=None)}

    def restore(self, **parts: Any) -> None:
        """As in `Training`; published checkpoints hold the networks alone, so Adam and the generators start anew."""
        if self.state is not None:
            self.state = {"optimizer": parts["optimizer"].state_dict(), "rng": rng_state(), **self.state}
        super().restore(**parts)

    def start(self, model: nn.Module, n_train: int, n_test: int) -> None:
        """Say what is trained on what, and where it goes on."""
        model.randn_like = self.dist.randn_like
        counts = parameter_counts(model)
        self.run.info(
            f"experiment {self.folder.resolve()}: {counts['total']:,} parameters (encoder {counts['enc']:,}, decoder "
            f"{counts['gen']:,}), {n_train:,} training and {n_test:,} test images, {self.dist.device}, "
            f"{self.dist.world} process(es)"
        )
        if self.state is not None:
            self.run.info(f"resumed at epoch {self.epoch}, batch {len(self.codes)}")

    def last_step(self, batches: int) -> int:
        """The step that ends the last epoch, `batches` steps an epoch."""
        done = self.place.images // self.params.batch_size
        return self.step + (self.params.epochs_max - self.place.epoch) * batches - done

    def remember(self, terms: dict[str, Tensor], encoded: Encoded, labels: Tensor) -> None:
        """Count a batch and keep its losses, codes and labels on the device; the losses are read and logged after every
        step on a CPU, after every `print_every_batch` steps elsewhere.
        """
        code = encoded.code.detach()
        self.codes.append(self.dist.gather(pack_bits(code) if self.params.has_bits else code, equal=True))
        self.labels.append(self.dist.gather(labels, equal=True))
        self.iter += self.params.batch_size
        means = {name: term.detach().mean() for name, term in terms.items()}
        if encoded.qerr is not None:
            means["QERR"] = encoded.qerr
        self._unread.append((self.iter, means))
        interval = 1 if self.dist.device.type == "cpu" else self.params.print_every_batch
        if self.every(interval) or self.epoch_ends:
            self.log_batches()

    def log_batches(self) -> None:
        """Read the losses of the batches since the last call, one read for all, and log a row for each."""
        if not self._unread:
            return
        values = [torch.stack([value.float() for value in means.values()]) for _, means in self._unread]
        rows = self.dist.mean(torch.stack(values)).tolist()
        for (iter, means), row in zip(self._unread, rows, strict=True):
            self._log(iter, "Train", dict(zip(means, row, strict=True)))
            self._row.append(row)
            if len(self._row) == self.params.print_every_batch:
                columns = zip(means, zip(*self._row, strict=True), strict=True)
                shown = "  ".join(f"{name} {sum(column) / len(column):.4f}" for name, column in columns)
                self.run.info(f"epoch {self.epoch}  {iter / 1000:.1f}k images  {shown}")
                self._row.clear()
        self._unread.clear()

    def _log(self, iter: int, stage: str, scalars: dict[str, float]) -> None:
        self.log.record(self.epoch, iter, stage, scalars)
        self.run.log(iter, epoch=self.epoch, **{f"losses/{stage}_{name}": value for name, value in scalars.items()})

    def end_epoch(self, found: Any, pictures: Tensor) -> None:
        """Log the test loss; write mosaics, the epoch's codes, and the checkpoints."""
        epoch, improved = self.epoch, found.loss < self.best
        self._log(self.iter, "Eval", {"loss": 0.0, "reco_loss": found.loss})
        self.best, self.loss_eval = min(self.best, found.loss), found.loss
        if self.dist.is_main:
            for part, shown in (("train", pictures), ("eval", found.pictures)):
                path = self.folder / f"reconstructed_{part}" / f"sample_{epoch}_0.jpg"
                save_pairs(path, shown, self.params.stretch, self.run, self.iter)
            found.latents(epoch, self.iter).save(self.folder / "latents-eval.npz")
            codes, labels = (torch.cat([part.cpu() for part in parts]) for parts in (self.codes, self.labels))
            codes = unpack_bits(codes, self.params.zsize) if self.params.has_bits else codes
            latents = Latents(codes, labels, epoch, self.iter, "training pass")
            latents.save(self.folder / "latents-last.npz")
            if improved:
                latents.save(self.folder / "latents.npz")
        self.codes, self.labels = [], []
        numbered = self.checkpoint.with_name(f"weights-{epoch}.cp")
        self.save(numbered)
        if self.dist.is_main:
            name_checkpoint(numbered, self.full_state(), improved, self.params.keep_last_models)
        self.dist.barrier()
        self._saved_at = self.step
        self.run.info(f"epoch {epoch}: test reco_loss {found.loss:.4f}{' (best)' if improved else ''}")

    def save(self, path: str | Path | None = None) -> None:
        self.log_batches()
        super().save(path)

    def full_state(self) -> dict[str, Any]:
        """Everything an exact resume needs; `epoch` is the last complete one, as in the published checkpoints."""
        own = super().full_state()
        epoch = self.epoch if self.codes else self._next.epoch
        return own | {
            "epoch": epoch - 1, "iter": self.iter, "loss_eval": None if self.codes else self.loss_eval,
            "best": self.best, "batch": len(self.codes), "config": own.pop("options"),
            "codes": [part.cpu() for part in self.codes], "labels": [part.cpu() for part in self.labels],
            "attribute_names": self.names,
        }  # fmt: skip


def sync_buffers(model: nn.Module, dist: Distributed) -> None:
    """Give every process the batch-norm statistics of the first one."""
    if dist.world > 1:
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, 0)
