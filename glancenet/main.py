"""Train and evaluate GlanceNets, concept bottlenecks (CBNM) and the VAE family.

Marconato, Passerini, Teso: GlanceNets: Interpretable, Leak-proof Concept-based Models (NeurIPS 2022).

    python glancenet/main.py --alg GlanceNet --dset_name dsprites_full --dset_dir data --encoder SimpleGaussianConv64 \\
        --decoder SimpleConv64 --z_dim 7 --label_weight 100 --conditional_prior true --masking_fact 10 --max_iter 250000
    python glancenet/main.py --alg CBNM --dset_name dsprites_full --encoder SimpleGaussianConv64 --z_dim 7
    python glancenet/main.py --alg BetaVAE --dset_name sprites --encoder SimpleGaussianConv64 --decoder SimpleConv64 \\
        --loss_terms BetaTCVAE INFOVAE --w_tc 6
    python glancenet/main.py ... --test true --ckpt_load checkpoints/NAME/last --evaluation_metric mig dci

Written: logs/<data set>__<alg>/<out_path>/ (train_runs, eval_results, run/tb for TensorBoard, commandline_args.txt),
<ckpt_dir>/<name>/{last,best,final,model.safetensors} and pictures in <train_output_dir>/<name>. The files are
described in glancenet/README.md; `python glancenet/evaluate.py LOG_FOLDER` makes tables and plots of them.
"""

import argparse
import datetime
import json
import logging
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.checkpoint import load_into, load_state, restore_rng, rng_state, save_state, save_weights, write_json
from common.errors import UserError, run_command
from common.images import save_image
from common.launch import Distributed, StopSignal, check_finite, pick_device, seed_everything
from common.run import Run
from glancenet import osr, passes, visual
from glancenet.algorithms import Algorithm, Batch, Terms, algorithm_class
from glancenet.data import ConceptData, load_data
from glancenet.options import make_parser, resolve
from glancenet.records import Table, save_arrays
from glancenet.schedules import EarlyStopping, LearningRate, LinearWeight, parse_scheduler_args

KIND = "glancenet"
SAVED_TRAIN_ROWS = 10_000
HOLD_LIMIT = 16_000_000_000  # bytes of images kept on a GPU
PICTURE_IMAGES = 64
STOPPING_FROM = {"GlanceNet": 10, "CBNM": 12}  # validations before the stopping rule judges
FINITE_EVERY = 50  # steps between checks of the loss on a GPU, where reading it waits


class Files(NamedTuple):
    """Where a run writes."""

    log: Path
    train: Path
    evaluation: Path
    checkpoints: Path
    pictures: Path


class Every(NamedTuple):
    """Intervals in steps."""

    evaluate: int
    test: int
    print: int
    float: int
    recon: int
    traverse: int
    ckpt_save: int
    schedulers: int

    @staticmethod
    def due(step: int, interval: int) -> bool:
        """Whether `step` finished steps call for it."""
        return step % interval == 0


def intervals(o: argparse.Namespace, per_epoch: int) -> Every:
    """The intervals in steps: the flag, then --all_iter, then one epoch; test_iter follows evaluate_iter."""
    unit = per_epoch if o.treat_iter_as_epoch else 1

    def steps(flag: float | None, default: int) -> int:
        return max(1, int(flag * unit)) if flag is not None else default

    common = steps(o.all_iter, per_epoch)
    found = {name: steps(getattr(o, f"{name}_iter"), common) for name in Every._fields if name != "test"}
    return Every(test=steps(o.test_iter, found["evaluate"]), **found)


def log_folder(o: argparse.Namespace) -> Path:
    """logs/<data set>__<alg>/<out_path>, or logs/<data set>__<alg>__<year_month>/<day-hour-minute> (made unique)."""
    stem = Path(o.log_dir) / f"{o.dset_name}__{o.alg}"
    if o.out_path:
        return stem / o.out_path
    now = datetime.datetime.now()
    base = stem.with_name(f"{stem.name}__{now:%Y_%m}") / f"{now:%d-%H-%M}"
    folder, n = base, 1
    while folder.exists():
        n += 1
        folder = base.with_name(f"{base.name}-{n}")
    return folder


def check_metrics(o: argparse.Namespace, data: ConceptData) -> None:
    """Refuse metrics that this data set or algorithm cannot have, before anything is trained."""
    if not o.evaluation_metric:
        return
    if data.grid is None:
        raise UserError(f"--evaluation_metric {' '.join(o.evaluation_metric)}: {o.dset_name} is no full grid of known "
                        "factors; leave the metrics out, or use dsprites_full, sprites or mpi3d_toy")  # fmt: skip
    if o.alg == "CVAE":
        raise UserError("--evaluation_metric: CVAE's encoder needs labels beside the image, so an image alone has no "
                        "representation; leave the metrics out")  # fmt: skip


def make_optimizers(model: Algorithm, o: argparse.Namespace) -> dict[str, torch.optim.Optimizer]:
    """Adam for the networks ('G'), FactorVAE's discriminator ('PermD') and IFCVAE's adversary ('aux_D')."""
    betas = (o.beta1, o.beta2)
    fused = next(model.parameters()).device.type == "cuda"
    made = {"G": torch.optim.Adam(list(model.main_parameters()), lr=o.lr_G, betas=betas, fused=fused)}
    if model.discriminator is not None:
        made["PermD"] = torch.optim.Adam(model.discriminator.parameters(), lr=o.lr_D, betas=betas, fused=fused)
    if getattr(model, "auxiliary", None) is not None:
        made["aux_D"] = torch.optim.Adam(model.auxiliary.parameters(), lr=o.lr_D, betas=betas, fused=fused)
    return made


def train_columns(model: Algorithm) -> tuple[list[str], list[str], list[str]]:
    """Columns of metrics.csv, val_metrics.csv and test_metrics.csv for this algorithm."""
    latents = [f"latent{i}" for i in range(model.shape.n_concepts)] if model.supervises_concepts else []
    vae = model.decoder is not None
    train, val = ["iter", "epoch"], ["epoch"]
    test = ["iter", "rec", "kld"]
    if vae:
        train += ["reconstruction_error", "kld"]
        val += ["rec", "kld"]
    if model.predicts_classes:
        train += ["latent_error", "classification_error", "accuracy", *latents]
        val += ["latent", "bce", "acc", "acc_hard"]
        test += ["latent", "BCE", "Acc", "I", *latents, "acc_hard", "latent_mu"]
    return train, val, test


def metrics_row(model: Algorithm, terms: Terms, batch: Batch, z: Tensor, step: int, epoch: int) -> dict[str, float]:
    """One row of metrics.csv: weighted losses of the current batch, unweighted concept errors (-1: no supervised
    row).
    """
    row: dict[str, float] = {"iter": step, "epoch": epoch}
    if model.decoder is not None:
        row |= {"reconstruction_error": float(terms.recon), "kld": float(terms.kld)}
    if model.predicts_classes:
        supervised = bool(terms.supervised)
        raw = z if model.decoder is not None else 2 * torch.atanh(z.clamp(-1 + 1e-6, 1 - 1e-6))
        with torch.no_grad():
            hard = (model.classify(raw).argmax(1) == batch.y).double().mean()
        row |= {"latent_error": float(terms.true_values), "classification_error": float(terms.prediction)}
        row |= {"accuracy": float(hard)}
        columns = terms.columns.tolist() if supervised else [-1.0] * len(terms.columns)
        row |= {f"latent{i}": value for i, value in enumerate(columns)}
    return row


class Trainer:
    """Everything a run owns; `train` is the loop, the other methods are what happens between steps."""

    def __init__(self, o: argparse.Namespace, dist: Distributed | None = None):
        self.o = o
        self.dist = dist or Distributed(pick_device(o.device))
        self.device = self.dist.device
        if o.batch_size % self.dist.world:
            raise UserError(f"--batch_size {o.batch_size} must be a multiple of the {self.dist.world} processes")
        seed_everything(o.seed, o.deterministic)  # the same on every process: they draw the same noise
        self.data = load_data(o)
        check_metrics(o, self.data)
        self.model = algorithm_class(o.alg)(o, self.data.shape)
        self.model.to(self.device, memory_format=torch.channels_last)
        self.model.share(self.dist)
        self.optimizers = make_optimizers(self.model, o)
        self.rate = LearningRate(
            self.optimizers["G"], o.lr_G, o.warmup_epochs, o.lr_scheduler, parse_scheduler_args(o.lr_scheduler_args)
        )
        self.recon_weight = self._recon_schedule()
        self.stopping = EarlyStopping(self.model.w.latent_weight, self.model.w.label_weight, o.masking_fact > 0)
        self.per_epoch = self.data.train.n_batches(o.batch_size, drop_last=True)
        self.every = intervals(o, self.per_epoch)
        self.last_step = int(min(o.max_iter, o.max_epoch * self.per_epoch))
        self.step, self.epoch = 0, 0  # finished steps; the epoch under way, from 0
        self.best_total = float("inf")
        self.thresholds: osr.Thresholds | None = None
        self.metric_values: dict[str, float] = {}
        self.metrics_at = -1  # the step of the last metrics
        self.epoch_sum = torch.zeros((), device=self.device)
        self.epoch_steps = 0
        self.epoch_latents: list[tuple[Tensor, Tensor]] = []
        self.epoch_rows = 0
        self.resumed = self.interrupted = False
        if o.ckpt_load:
            self._load(o.ckpt_load)
        self.files = self._folders()
        self._open()

    def _recon_schedule(self) -> LinearWeight | None:
        if self.o.w_recon_scheduler is None:
            if self.o.w_recon_scheduler_args:
                raise UserError("--w_recon_scheduler_args needs --w_recon_scheduler LinearScheduler")
            return None
        args = parse_scheduler_args(self.o.w_recon_scheduler_args)
        if set(args) != {"target_value", "epochs"}:
            raise UserError("--w_recon_scheduler_args: expected target_value=... epochs=...")
        return LinearWeight(self.model.w.w_recon, **args)

    def _folders(self) -> Files:
        o, log = self.o, log_folder(self.o)
        pictures = Path(o.test_output_dir if o.test else o.train_output_dir) / o.name
        checkpoints = Path(o.ckpt_dir) / o.name
        if not self.dist.is_main:  # every process makes the same files; the first one's are kept
            self._discarded = tempfile.TemporaryDirectory()
            log, checkpoints, pictures = (Path(self._discarded.name) / name for name in ("log", "ckpt", "pictures"))
        return Files(log, log / "train_runs", log / "eval_results", checkpoints, pictures)

    def _open(self) -> None:
        o, f = self.o, self.files
        config = {**vars(o), "supervised_images": int(self.data.train.mask.sum()), "train_images": len(self.data.train)}
        held = False
        if o.hold_data or (o.hold_data is None and self.device.type == "cuda"):
            held = all(part.images.hold(self.device, HOLD_LIMIT) for part in (self.data.train, self.data.test))
        self.run = Run(
            f.log / "run", config, resume=self.resumed, resume_step=self.step if self.resumed else None,
            overwrite=o.overwrite, wandb="glancenet" if o.use_wandb else None, enabled=self.dist.is_main,
        )  # fmt: skip
        write_json(f.log / "commandline_args.txt", config)
        save_arrays(f.log / "supervised_rows.npy", self.data.train.rows.numpy()[self.data.train.mask.numpy() > 0])
        train, val, test = train_columns(self.model)
        keep = ("iter", self.step) if self.resumed else None
        metrics = Table(f.train / "metrics.csv", train, keep)
        # a row a test point, as in metrics.csv: its epoch alone does not say whether it was written by then
        rows = metrics.rows if self.resumed else None
        self.tables = {
            "metrics": metrics,
            "val": Table(f.train / "val_metrics.csv", val, keep_rows=rows),
            "test": Table(f.evaluation / "test_metrics.csv", test, keep),
        }
        self.dis_columns = [f"eval_{name}" for name in o.evaluation_metric]
        if self.dis_columns:
            rows = self.tables["test"].rows if self.resumed else None  # one row a test point
            self.tables["dis"] = Table(f.evaluation / "dis_metrics.csv", self.dis_columns, keep_rows=rows)
        n = sum(p.numel() for p in self.model.parameters())
        self.run.info(f"{o.alg} on {o.dset_name}: {n:,} parameters, {len(self.data.train):,} training images "
                      f"({config['supervised_images']:,} with concepts), {self.per_epoch} steps an epoch, "
                      f"{self.device}{', images held there' if held else ''}; log in {f.log}")  # fmt: skip

    # ---- the loop

    def train(self) -> None:
        """Train to the last step, to the stopping rule, or to a signal; then the final passes."""
        o, stopped = self.o, False
        with StopSignal() as signal:
            while self.step < self.last_step and not stopped:
                self.rate.start_epoch(self.epoch)
                stopped = self._train_epoch(signal)
            interrupted = self.interrupted
        if interrupted:
            self.run.info(
                f"stopped by a signal at step {self.step}; go on with --ckpt_load {self.files.checkpoints / 'final'}"
            )
            self.save("final")
            self.run.close()
            raise KeyboardInterrupt  # exit code 130; a comparison that trains several models ends as well
        self._finish()
        self.save("final")
        tensors = {**self.model.state_dict(), **self._threshold_tensors()}
        save_weights(self.files.checkpoints / "model.safetensors", tensors, vars(o))
        self.run.close()

    def _train_epoch(self, signal: StopSignal) -> bool:
        """The steps of the epoch under way from where it stands; True when training shall end."""
        o, start = self.o, self.step - self.epoch * self.per_epoch
        order = self.data.train.order(o.seed, self.epoch)
        batches = self.data.train.batches(
            o.batch_size, self.device, order, start, drop_last=True, pin=o.pin_memory, workers=o.num_workers
        )
        tail = float("inf") if o.classification_epoch is None else o.classification_epoch * self.per_epoch
        bar = self.run.progress(batches, total=self.per_epoch, desc=f"epoch {self.epoch + 1}", initial=start)
        began = time.perf_counter()
        for i, batch in enumerate(bar, start):
            second = self._second(order, i) if self.model.discriminator is not None else None
            terms, z = self.model.train_step(batch, self.step, self.optimizers, second, self.step >= tail)
            self.step += 1
            self.epoch_sum += terms.total
            self.epoch_steps += 1
            if self.device.type == "cpu" or self.step % FINITE_EVERY == 0 or self.step == self.last_step:
                check_finite(terms.total, self.step, self.model)
            self._remember(z, batch)
            if self._between_steps(terms, batch, z):
                return True
            self.interrupted = self.dist.any(signal)
            if self.interrupted or self.step >= self.last_step:
                break
        complete = self.step - self.epoch * self.per_epoch >= self.per_epoch
        if complete or self.step >= self.last_step:
            self._report_epoch(time.perf_counter() - began)
        if complete:
            self._next_epoch()
        return self.interrupted

    @property
    def shown_epoch(self) -> int:
        """The epoch (from 1) of the last finished step."""
        return max(1, -(-self.step // self.per_epoch))

    def _second(self, order: Tensor, i: int) -> Batch:
        """The training batch after batch i: FactorVAE permutes other images than it judges."""
        n, j = self.o.batch_size, (i + 1) % self.per_epoch
        return self.data.train.gather(order[j * n : (j + 1) * n], self.device)

    def _remember(self, z: Tensor, batch: Batch) -> None:
        if self.epoch_rows < SAVED_TRAIN_ROWS:
            room = SAVED_TRAIN_ROWS - self.epoch_rows
            self.epoch_latents.append((z[:room], batch.labels[:room]))
            self.epoch_rows += len(z[:room])

    def _between_steps(self, terms: Terms, batch: Batch, z: Tensor) -> bool:
        """Logging, validation, tests, pictures, checkpoint, schedulers that are due; True to stop early."""
        o, every, step, stop = self.o, self.every, self.step, False
        if every.due(step, every.float) or every.due(step, int(o.show_loss)):
            self._log_terms(terms)
        if every.due(step, every.test):
            stop = self._test_point(metrics_row(self.model, terms, batch, z, step, self.shown_epoch))
        if self.stopping.save:
            if every.due(step, every.recon) and o.file_save and self.model.decoder is not None:
                self._reconstruction_picture(batch)
            if every.due(step, every.traverse) and self._traverses():
                self._traversal_pictures()
            if self.dis_columns and every.due(step, every.evaluate) and self.metrics_at != step:
                self._disentanglement()
        if every.due(step, every.schedulers):
            self._step_schedulers()
        if self.stopping.save and every.due(step, every.ckpt_save):
            self.save("last")
        return stop

    def _log_terms(self, terms: Terms) -> None:
        names = ("recon", "kld", "prediction", "latent", "plugins")
        values = {name: float(getattr(terms, name)) for name in names}
        self.run.log(self.step, total=float(terms.total), **values, lr=self.rate.current())
        if self.every.due(self.step, self.every.print):
            shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items() if value)
            self.run.info(f"step {self.step}  epoch {self.epoch + 1}  {shown}  lr {self.rate.current():.3g}")

    def _step_schedulers(self) -> None:
        self.rate.step(float(self.epoch_sum / max(1, self.epoch_steps)))
        if self.recon_weight is not None:
            self._set_w_recon(self.recon_weight.step())

    def _set_w_recon(self, value: float) -> None:
        import dataclasses

        self.model.w = dataclasses.replace(self.model.w, w_recon=value)

    def _report_epoch(self, seconds: float) -> None:
        if self.stopping.save and self.epoch_latents:
            z, g = (torch.cat(parts).cpu().numpy() for parts in zip(*self.epoch_latents, strict=True))
            save_arrays(self.files.train / "latents_obtained.npy", self.shown_epoch, z, g)
        mean = float(self.epoch_sum / max(1, self.epoch_steps))
        self.run.info(f"epoch {self.shown_epoch} done at step {self.step}: mean loss {mean:.4f}, {seconds:.0f} s")

    def _next_epoch(self) -> None:
        self.epoch += 1
        self.epoch_sum, self.epoch_steps = torch.zeros((), device=self.device), 0
        self.epoch_latents, self.epoch_rows = [], 0

    # ---- passes

    def _test_point(self, row: dict[str, float], judge: bool = True) -> bool:
        """metrics.csv, validation with the stopping rule (`judge`), test pass; True to stop."""
        self.tables["metrics"].append(row)
        stop = self._validate(judge)
        self.test_pass()
        if "dis" in self.tables:
            if self.stopping.save and self.every.due(self.step, self.every.evaluate):
                self._disentanglement()
            self.tables["dis"].append(self.metric_values)
        return stop

    def _validate(self, judge: bool) -> bool:
        with passes.evaluating(self.model, self.o.seed + self.step):
            scores, _ = passes.evaluate(self.model, self.data.val, self.step, self.device)
        row = {"rec": scores.rec, "kld": scores.kld, "latent": scores.latent, "bce": scores.bce, "acc": scores.acc}
        row |= {"epoch": self.shown_epoch, "acc_hard": scores.acc_hard}
        table = self.tables["val"]
        table.append({name: row[name] for name in table.columns})
        self.run.log(self.step, **{f"val_{name}": row[name] for name in table.columns if name != "epoch"})
        if not judge:
            return False
        rule = self.stopping
        rule.record(scores.rec + scores.kld, scores.latent, scores.bce)
        if rule.total[-1] < self.best_total and self.epoch >= self.o.warmup_epochs:
            self.best_total = rule.total[-1]
            self.save("best")
        from_epoch = STOPPING_FROM.get(type(self.model).__name__)
        if not self.o.early_stopping or from_epoch is None or self.shown_epoch <= from_epoch:
            return False
        if rule.plateaued:
            self.rate.plateaued()
        stop = rule.update()
        if stop:
            self.run.info(f"early stopping at step {self.step}: {rule.wait} validations without improvement")
        return stop

    def test_pass(self) -> passes.Scores:
        """Every test image once; writes test_metrics.csv and the latents and predictions."""
        keep = max(passes.SAVED_TEST_ROWS, len(self.data.test))
        with passes.evaluating(self.model, self.o.seed + self.step):
            scores, outputs = passes.evaluate(
                self.model, self.data.test, self.step, self.device, self.o.mc_samples, all_rows=True, keep=keep
            )
        row = {"iter": self.step, "rec": scores.rec, "kld": scores.kld, "latent": scores.latent, "BCE": scores.bce}
        row |= {"Acc": scores.acc, "I": 0, "acc_hard": scores.acc_hard, "latent_mu": scores.latent_mu}
        row |= {f"latent{i}": value for i, value in enumerate(scores.columns)}
        table = self.tables["test"]
        table.append({name: row[name] for name in table.columns})
        self.run.log(
            self.step, **{f"test_{name}": float(row[name]) for name in table.columns if name not in ("iter", "I")}
        )
        if self.stopping.save:
            n, folder, epoch = passes.SAVED_TEST_ROWS, self.files.evaluation, self.shown_epoch
            z = 1 / (1 + np.exp(-outputs.z[:n].astype(np.float64)))
            save_arrays(folder / "latents_obtained.npy", epoch, z, outputs.concepts[:n])
            if self.model.predicts_classes:
                save_arrays(folder / "downstream_obtained.npy", epoch, outputs.y, outputs.prediction)
        return scores

    def fit_rejection(self) -> None:
        """Thresholds of the open-set check from the training images; thr_rec.csv, thr_y.csv, centroids, passed."""
        o, f = self.o, self.files
        with passes.evaluating(self.model, o.seed):
            self.thresholds, _ = passes.fit_rejection(self.model, self.data, self.device, o.osr_quantile, o.osr_sample)
            seen = passes.encode_for_rejection(self.model, self.data.test, self.device, o.osr_sample)
        passed = passes.accepted(self.model, seen, self.thresholds)
        Table(f.train / "thr_rec.csv", ["thr_rec"]).append({"thr_rec": self.thresholds.reconstruction})
        per_class = Table(f.train / "thr_y.csv", ["thr_y"])
        for value in self.thresholds.distance:
            per_class.append({"thr_y": value})
        save_arrays(f.evaluation / "centroids.npy", self.thresholds.means)
        save_arrays(f.evaluation / "passed.npy", passed)
        self.run.info(f"rejection: {passed.mean():.1%} of the {len(passed):,} test images accepted")

    def _disentanglement(self) -> None:
        from common.metrics.disentanglement import headline

        o, began = self.o, time.perf_counter()
        with passes.evaluating(self.model, o.seed):
            results = passes.disentanglement(
                self.model, self.data, self.device, o.evaluation_metric, o.metric_train, o.metric_eval, o.metric_jobs
            )
        seconds = time.perf_counter() - began
        for name, scores in results.items():
            folder = self.files.evaluation / name / "results"
            record = {**scores, "elapsed_time": seconds, "iter": self.step}
            write_json(folder / "json" / "evaluation_results.json", record)
            prefixed = {f"evaluation_results.{key}": value for key, value in record.items()}
            write_json(folder / "aggregate" / "evaluation.json", prefixed)
            self.metric_values[f"eval_{name}"] = headline(name, scores)
        self.run.log(self.step, **self.metric_values)
        text = ", ".join(f"{name} {value:.4f}" for name, value in self.metric_values.items())
        self.run.info(f"step {self.step}: {text} ({seconds:.0f} s)")
        self.metrics_at = self.step

    def _finish(self) -> None:
        """What a finished training leaves behind, whatever the intervals were."""
        measured = not self.dis_columns or self.metrics_at == self.step
        if not measured:
            self._disentanglement()
        if not measured or not self.every.due(self.step, self.every.test):
            self._last_test_point()
        if self.model.predicts_classes:
            self.fit_rejection()
        if self.o.file_save:
            self._matrix_picture()
            if self.model.decoder is not None:
                with passes.evaluating(self.model, self.o.seed):
                    self._reconstruction_picture(self._picture_batch())
                if self._traverses():
                    self._traversal_pictures()
        if self.stopping.save:
            self.save("last")

    def _last_test_point(self) -> None:
        batch = self._picture_batch()
        with passes.evaluating(self.model, self.o.seed):
            terms, z = self.model.terms(batch, self.step)
        # beside the intervals: the stopping rule must see the same validations as in a longer run
        self._test_point(metrics_row(self.model, terms, batch, z, self.step, self.shown_epoch), judge=False)

    # ---- pictures

    def _traverses(self) -> bool:
        o = self.o
        return o.file_save and self.model.decoder is not None and (o.traverse_z or o.traverse_l or o.traverse_c)

    def _picture_batch(self) -> Batch:
        rng = np.random.default_rng(self.o.seed)
        places = rng.permutation(len(self.data.train))[: min(self.o.batch_size, PICTURE_IMAGES)]
        return self.data.train.gather(torch.from_numpy(places), self.device)

    def _reconstruction_picture(self, batch: Batch) -> None:
        batch = Batch(*(part[:PICTURE_IMAGES] for part in batch))
        with passes.evaluating(self.model, self.o.seed):
            picture = visual.reconstruction_picture(self.model, batch)
        name = f"recon_{self.step}.jpg" if self.o.test else "recon.jpg"
        save_image(self.files.pictures / name, picture)
        self.run.image("reconstruction", picture, self.step)

    def _traversal_pictures(self) -> None:
        o, m = self.o, self.model
        values = visual.traversal_values(o.traverse_min, o.traverse_max, o.traverse_spacing)
        latents = list(range(o.z_dim)) if o.traverse_z else list(range(m.shape.n_concepts)) if o.traverse_l else []
        batch, keys = self._traversal_batch()
        with passes.evaluating(m, o.seed):
            for i, key in enumerate(keys):
                rows = visual.traverse(m, batch, i, values, latents, o.traverse_c)
                stem = f"traverse_{self.step}_{i}" if o.test else f"traverse_{key}"
                gif = f"gif_{self.step}_{i}" if o.test else f"gif_{key}"
                picture = visual.save_traversal(self.files.pictures, stem, gif if o.gif_save else None, rows)
                self.run.image(f"traversal_{key}", picture, self.step)

    def _traversal_batch(self) -> tuple[Batch, list[str]]:
        """The fixed images of the data set (three seeded ones where it has none) and one chosen anew each time."""
        train, rng = self.data.train, np.random.default_rng([self.o.seed, self.step])
        rows = train.rows.numpy()
        keys, places = [], []
        for name, row in (self.data.fixed or {}).items():
            near = int(np.argmin(np.abs(rows - row)))  # the image itself, or a neighbour when it is held out
            keys.append(name)
            places.append(near)
        if not keys:
            chosen = np.random.default_rng(self.o.seed).permutation(len(train))[:3]
            keys, places = [f"rand{i}" for i in range(len(chosen))], chosen.tolist()
        keys.append("random")
        places.append(int(rng.integers(len(train))))
        return train.gather(torch.tensor(places), self.device), keys

    def _matrix_picture(self) -> None:
        if not self.model.supervises_concepts:
            return
        with passes.evaluating(self.model, self.o.seed):
            _, outputs = passes.evaluate(self.model, self.data.test, self.step, self.device, all_rows=True, keep=5000)
        matrix = visual.latent_factor_matrix(outputs.mu, outputs.concepts)
        title = f"|correlation|, {self.o.alg}, {self.o.masking_fact:g} % supervised"
        visual.save_matrix(self.files.pictures / "latent_factor_matrix.png", matrix, self.data.concept_names, title)

    # ---- checkpoints

    def save(self, name: str) -> None:
        """The full state as <ckpt_dir>/<name>/<name>."""
        if not self.dist.is_main:
            return
        save_state(
            self.files.checkpoints / name, KIND, iter=self.step, epoch=self.epoch, options=vars(self.o),
            model=self.model.state_dict(), optimizers={k: v.state_dict() for k, v in self.optimizers.items()},
            rate=self.rate.state(), stopping=self.stopping.state(), best_total=self.best_total,
            w_recon=self.model.w.w_recon, recon_steps=self.recon_weight.steps if self.recon_weight else 0,
            metric_values=self.metric_values, thresholds=self._threshold_tensors(), rng=rng_state(),
            epoch_sum=self.epoch_sum, epoch_steps=self.epoch_steps, epoch_latents=[list(pair) for pair in
            self.epoch_latents],
        )  # fmt: skip

    def _threshold_tensors(self) -> dict[str, Tensor]:
        t = self.thresholds
        if t is None:
            return {}
        values = {"reconstruction": t.reconstruction, "distance": t.distance, "means": t.means}
        return {f"osr.{k}": torch.as_tensor(np.asarray(v), dtype=torch.float64) for k, v in values.items()}

    def _load(self, path: str) -> None:
        state, o = load_state(path, KIND), self.o
        load_into(self.model, state["model"], path)
        self.thresholds = thresholds_of(state["thresholds"], self.model)
        if o.test or not o.ckpt_load_iternum:
            self.step = state["iter"] if o.test else 0
            self.epoch = state["epoch"] if o.test else 0
        if o.test:
            return
        if o.ckpt_load_optim:
            for name, optimizer in self.optimizers.items():
                if name not in state["optimizers"]:
                    raise UserError(f"{path} has no optimiser {name}; leave it fresh by --ckpt_load_optim false")
                optimizer.load_state_dict(state["optimizers"][name])
        if not o.ckpt_load_iternum:
            return
        self.step, self.epoch, self.best_total = state["iter"], state["epoch"], state["best_total"]
        self.rate.restore(state["rate"])
        self.stopping.restore(state["stopping"])
        self._set_w_recon(state["w_recon"])
        if self.recon_weight is not None:
            self.recon_weight.steps = state["recon_steps"]
        self.metric_values = state["metric_values"]
        self.epoch_sum, self.epoch_steps = state["epoch_sum"].to(self.device), state["epoch_steps"]
        self.epoch_latents = [(z.to(self.device), g.to(self.device)) for z, g in state["epoch_latents"]]
        self.epoch_rows = sum(len(z) for z, _ in self.epoch_latents)
        self.resumed = bool(o.out_path) and (log_folder(o) / "run" / "config.json").exists()
        restore_rng(state["rng"])

    # ---- --test

    def test(self) -> None:
        """--test: the test pass, the rejection, the metrics and the pictures of a loaded model."""
        o = self.o
        scores = self.test_pass()
        names = ("rec", "kld", "latent", "bce", "acc_hard") if self.model.predicts_classes else ("rec", "kld")
        if self.dis_columns:
            self._disentanglement()
            self.tables["dis"].append(self.metric_values)
        if self.model.predicts_classes:
            self.fit_rejection()
        if o.file_save and self.model.decoder is not None:
            with passes.evaluating(self.model, o.seed):
                self._reconstruction_picture(self._picture_batch())
            if self._traverses():
                self._traversal_pictures()
        if o.file_save:
            self._matrix_picture()
        self.run.close()
        if not self.dist.is_main:
            return
        values = {name: float(getattr(scores, name)) for name in names}
        print(json.dumps({**values, **self.metric_values, "log": str(self.files.log)}))


def thresholds_of(tensors: dict[str, Tensor], model: Algorithm) -> osr.Thresholds | None:
    """The thresholds stored in a checkpoint or beside weights, or None."""
    if "osr.reconstruction" not in tensors:
        return None
    distance, means = tensors["osr.distance"].numpy(), tensors["osr.means"].numpy()
    return osr.Thresholds(float(tensors["osr.reconstruction"]), distance, means, model.z_class)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The resolved options of a command line. Raises UserError."""
    return resolve(make_parser(description=__doc__.split("\n\n")[0]).parse(argv))


def main(argv: list[str] | None = None) -> Path:
    """The command; returns the log folder."""
    o = parse(argv)
    logging.basicConfig(level=o.verbose, format="%(levelname)s %(message)s")
    os.environ["DISENTANGLEMENT_LIB_DATA"] = o.dset_dir
    dist = Distributed.start(o.device)
    try:
        trainer = Trainer(o, dist)
        if o.test:
            trainer.test()
        else:
            trainer.train()
    finally:
        dist.close()
    return trainer.files.log


if __name__ == "__main__":
    sys.exit(run_command(main))
