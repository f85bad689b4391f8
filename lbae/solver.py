"""Train the Latent Bernoulli Autoencoder, and the commands behind mnist.py, cifar10.py and celeba.py."""

import math
import os
import sys
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.batches import Batches
from common.checkpoint import restore_rng, rng_state, save_state, write_json
from common.errors import NonFiniteError, UserError
from common.launch import Distributed, StopSignal, check_finite, normalise_over_processes, seed_everything
from common.run import Run
from lbae.data import attributes, load_split
from lbae.describe import newest_config
from lbae.evaluation import as_input, device_name, evaluate, has_bits, pairs, precision, run_set, show, to_device
from lbae.experiment import (
    KIND,
    Latents,
    build_model,
    checkpoint_path,
    differences,
    load_nets,
    pack_bits,
    read_checkpoint,
    resolve,
    unpack_bits,
    write_checkpoints,
)
from lbae.generation import generate
from lbae.model import LBAE, Encoded, losses, parameter_counts
from lbae.parameters import Params, table
from lbae.textlog import TextLog

MOSAIC_PAIRS, MOSAIC_COLUMNS = 64, 8  # pairs in a mosaic of reconstructions; columns of a mosaic of samples
DECODE = 1024  # codes decoded at once


def main(configs: Mapping[str, Mapping[str, Any]], script: str, argv: list[str] | None = None) -> None:
    """One command of a script: train, `eval`, or `eval gen`; `configs` are the script's configurations."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if "help" in argv:
        print(f"configurations: {', '.join(configs)} (cfg=, the first is the default)\n{table(Params)}")
        return
    params, folder = resolve(configs, script, argv)
    if params.eval:
        generate(params, folder) if params.gen else evaluate(params, folder)
    elif params.gen or params.eval_train:
        raise UserError("gen and eval_train go with eval: write `eval gen` or `eval eval_train`")
    else:
        _use_all_gpus(params, script, argv)
        train(params, folder)


def _use_all_gpus(params: Params, script: str, argv: list[str]) -> None:
    """With `parallel` and several GPUs, start this command again under torchrun, one process a GPU."""
    wanted = params.parallel and params.device in ("auto", "cuda") and params.cuda_device < 0
    if wanted and "WORLD_SIZE" not in os.environ and torch.cuda.device_count() > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={torch.cuda.device_count()}"]
        os.execv(sys.executable, [sys.executable, *launcher, script, *argv])


def train(params: Params, folder: Path) -> None:
    """Train from scratch, or resume with `l` / `reload[=E]`; everything is written below `folder` (see the README)."""
    dist = Distributed.start(device_name(params))
    try:
        _train(params, folder, dist)
    finally:
        dist.close()


def _train(params: Params, folder: Path, dist: Distributed) -> None:
    seed_everything(params.seed, params.deterministic)
    train_set, test_set = load_split(params, "train"), load_split(params, "test")
    places = {"workers": params.workers, "rank": dist.rank, "world": dist.world, "device": dist.device,
              "hold": params.hold}  # fmt: skip
    batches = Batches(train_set, params.batch_size, params.seed, **places)
    tests = Batches(test_set, params.batch_size_test, shuffle=False, drop_last=False, **places)

    model = to_device(build_model(params), dist.device)
    fused = dist.device.type == "cuda"
    optimizer = torch.optim.Adam(model.parameters(), lr=params.lr, weight_decay=params.l2, fused=fused)
    resumes = params.l or params.reload is not None
    if resumes:
        progress = resume(model, optimizer, folder, params.reload, dist)
        changes = differences(newest_config(folder), params)
    else:
        progress, changes = Progress(), []
        start_afresh(folder, params.overwrite, dist)
    module = dist.wrap(normalise_over_processes(model, dist))
    if dist.rank:
        torch.manual_seed(params.seed + 1000003 * dist.rank + progress.iter)  # a VAE's noise differs between processes

    config = asdict(params)
    with (
        Run(
            folder, config, resume=resumes, resume_step=progress.iter, overwrite=params.overwrite,
            tensorboard=params.tensorboard, wandb=params.wandb or None, enabled=dist.is_main,
        ) as run,
        TextLog(folder, "train", run, params.print_every_batch, enabled=dist.is_main) as log,
        StopSignal() as stop,
    ):  # fmt: skip
        if dist.is_main:
            write_json(folder / "log" / f"cfg-{log.k}-{progress.epoch}.json", config)
        counts = parameter_counts(model)
        log.say(f"experiment {folder.resolve()}: {counts['total']:,} parameters (encoder {counts['enc']:,}, "
                f"decoder {counts['gen']:,}), {len(train_set):,} training and {len(test_set):,} test images, "
                f"{dist.device}, {dist.world} process(es)")  # fmt: skip
        if resumes:
            for change in changes:
                log.say(f"changed {change}")
            found = run_set(params, model, tests, test_set, dist)
            log.say(f"resumed at epoch {progress.epoch}, batch {progress.batch}: test reco_loss {found.loss:.4f}")

        for epoch in range(progress.epoch, params.epochs_max):
            module.train()
            for b, (images, targets) in enumerate(batches.epoch(epoch, progress.batch), progress.batch):
                x = as_input(images)
                with precision(params, dist.device):
                    xr, encoded = module(x)
                terms = losses(xr, x, encoded, params.binary_reco_loss, params.kl_weight)
                optimizer.zero_grad(set_to_none=True)
                terms["loss"].mean().backward()
                scalars = read_scalars(terms, encoded, dist)
                try:
                    check_finite(scalars["loss"], progress.iter, model)
                except NonFiniteError:
                    if dist.is_main:
                        save_state(
                            folder / "models" / "crash.cp", KIND, **full_state(model, optimizer, progress, config)
                        )
                    raise
                optimizer.step()

                progress.remember(encoded, attributes(train_set, targets), params, dist)
                log.record(epoch, progress.iter, "Train", scalars)
                if dist.any(bool(stop)) and progress.batch < len(batches):
                    if dist.is_main:
                        state = full_state(model, optimizer, progress, config)
                        save_state(folder / "models" / "last.cp", KIND, **state)
                    log.say(f"stopped in epoch {epoch} after batch {b + 1} of {len(batches)}; `l` resumes there")
                    raise KeyboardInterrupt  # exit code 130: the run is not finished

            sync_buffers(model, dist)
            found = run_set(params, model, tests, test_set, dist, seed=epoch)
            log.record(epoch, progress.iter, "Eval", {"loss": 0.0, "reco_loss": found.loss})
            improved = found.loss < progress.best
            progress.best = min(progress.best, found.loss)
            if dist.is_main:
                latents = progress.latents(params, epoch)
                show(folder / "reconstructed_train" / f"sample_{epoch}_0.jpg", pairs(x, xr), params, run, progress.iter)
                show(
                    folder / "reconstructed_eval" / f"sample_{epoch}_0.jpg", found.pictures, params, run, progress.iter
                )
                found.latents(epoch, progress.iter).save(folder / "latents-eval.npz")
                latents.save(folder / "latents-last.npz")
                if improved:
                    latents.save(folder / "latents.npz")
            progress.next_epoch()
            if dist.is_main:
                state = full_state(model, optimizer, progress, config, found.loss)
                write_checkpoints(folder, state, improved, params.keep_last_models)
            dist.barrier()
            log.say(f"epoch {epoch}: test reco_loss {found.loss:.4f}{' (best)' if improved else ''}")
            if dist.any(bool(stop)) and progress.epoch < params.epochs_max:
                log.say(f"stopped after epoch {epoch}; `l` resumes there")
                raise KeyboardInterrupt


@dataclass
class Progress:
    """Where training stands: the next batch of `epoch`, images seen, best test loss, codes of the running epoch."""

    epoch: int = 0
    batch: int = 0
    iter: int = 0
    best: float = math.inf
    codes: list[Tensor] = field(default_factory=list)  # packed bits (B, D / 8), or floats (B, D)
    labels: list[Tensor] = field(default_factory=list)

    def remember(self, encoded: Encoded, labels: Tensor, params: Params, dist: Distributed) -> None:
        """Count a batch and keep its codes and labels, on the device until the epoch ends."""
        code = encoded.code.detach()
        self.codes.append(dist.gather(pack_bits(code) if has_bits(params) else code))
        self.labels.append(dist.gather(labels))
        self.batch += 1
        self.iter += params.batch_size

    def latents(self, params: Params, epoch: int) -> Latents:
        """The epoch's codes as they were when each batch was trained."""
        codes, labels = (torch.cat([part.cpu() for part in parts]) for parts in (self.codes, self.labels))
        codes = unpack_bits(codes, params.zsize) if has_bits(params) else codes
        return Latents(codes, labels, epoch, self.iter, "training pass")

    def next_epoch(self) -> None:
        self.epoch, self.batch, self.codes, self.labels = self.epoch + 1, 0, [], []


def read_scalars(terms: dict[str, Tensor], encoded: Encoded, dist: Distributed) -> dict[str, float]:
    """The batch means of the terms, and QERR of a binary model: one read of the device, averaged over processes."""
    values = {name: term.detach().mean() for name, term in terms.items()}
    if encoded.qerr is not None:
        values["QERR"] = encoded.qerr
    means = dist.mean(torch.stack([value.float() for value in values.values()])).tolist()
    return dict(zip(values, means, strict=True))


def full_state(
    model: LBAE, optimizer: torch.optim.Optimizer, progress: Progress, config: dict, loss: float | None = None
) -> dict[str, Any]:
    """Everything an exact resume needs; `epoch` is the last complete one, as in the published checkpoints."""
    return {
        "epoch": progress.epoch - 1, "iter": progress.iter, "loss_eval": loss, "best": progress.best,
        "batch": progress.batch, "codes": [part.cpu() for part in progress.codes],
        "labels": [part.cpu() for part in progress.labels],
        "gen": model.gen.state_dict(), "enc": model.enc.state_dict(), "optimizer": optimizer.state_dict(),
        "rng": rng_state(), "config": config,
    }  # fmt: skip


def resume(
    model: LBAE, optimizer: torch.optim.Optimizer, folder: Path, reload: int | None, dist: Distributed
) -> Progress:
    """Put a checkpoint into model and optimizer and return where it stands. Published ones hold the weights alone."""
    path = checkpoint_path(folder, reload)
    state = read_checkpoint(path)
    load_nets(model, state, path)
    best = state.get("best", state["loss_eval"])
    best_path = folder / "models" / "best.cp"
    if best_path.is_file():  # also when an earlier epoch is taken up: what is best stays on the disk
        stored = read_checkpoint(best_path)["loss_eval"]
        best = min(value for value in (best, stored, math.inf) if value is not None)
    if "optimizer" in state:
        optimizer.load_state_dict(state["optimizer"])
        for group in optimizer.param_groups:  # what the command line says now counts
            group.update(lr=optimizer.defaults["lr"], weight_decay=optimizer.defaults["weight_decay"],
                         fused=optimizer.defaults["fused"])  # fmt: skip
        restore_rng(state["rng"])
    to = dist.device
    return Progress(
        state["epoch"] + 1, state.get("batch", 0), state["iter"], math.inf if best is None else best,
        [part.to(to) for part in state.get("codes", [])], [part.to(to) for part in state.get("labels", [])],
    )  # fmt: skip


def start_afresh(folder: Path, overwrite: bool, dist: Distributed) -> None:
    """Refuse an experiment that already has checkpoints, or remove them and the latents with `overwrite`."""
    old = [*(folder / "models").glob("*.cp"), *(folder / "models").glob("best.*"), *folder.glob("latents*.npz")]
    if old and not overwrite:
        raise UserError(
            f"{folder} already holds an experiment; resume it by `l`, or add overwrite=1, or name another by exp="
        )
    dist.barrier()
    if dist.is_main:
        for path in set(old):
            path.unlink()


def sync_buffers(model: LBAE, dist: Distributed) -> None:
    """Give every process the batch-norm statistics of the first one."""
    if dist.world > 1:
        for buffer in model.buffers():
            torch.distributed.broadcast(buffer, 0)
