"""What a run writes beside its checkpoints: tables, latents, metrics, thresholds and pictures (see README.md)."""

import datetime
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from common.checkpoint import write_json
from common.run import Run
from glancenet import osr, passes, visual
from glancenet.algorithms import Algorithm
from glancenet.data import ConceptData
from glancenet.losses import Batch, Terms
from glancenet.options import METRICS, Config
from glancenet.records import Table, save_arrays


class Files(NamedTuple):
    """Where a run writes: its log, with `train` and `evaluation` below it, checkpoints and pictures."""

    log: Path
    train: Path
    evaluation: Path
    checkpoints: Path
    pictures: Path

    @classmethod
    def of(cls, o: Config, log: Path | None = None, discard: str | None = None) -> "Files":
        """The folders that the options name; `log` instead of theirs, or all below `discard` (ranks other than 0)."""
        if discard:
            log, checkpoints, pictures = (Path(discard) / name for name in ("log", "ckpt", "pictures"))
        else:
            log = log or log_folder(o)
            pictures = Path(o.test_output_dir if o.test else o.train_output_dir) / o.name
            checkpoints = Path(o.ckpt_dir) / o.name
        return cls(log, log / "train_runs", log / "eval_results", checkpoints, pictures)


def log_folder(o: Config) -> Path:
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


def columns(model: Algorithm) -> dict[str, list[str]]:
    """The columns of metrics.csv, val_metrics.csv and test_metrics.csv for this algorithm."""
    latents = [f"latent{i}" for i in range(model.shape.n_concepts)] if model.supervises_concepts else []
    vae, classes = model.decoder is not None, model.predicts_classes
    return {
        "metrics": ["iter", "epoch", *(["reconstruction_error", "kld"] if vae else []),
                    *(["latent_error", "classification_error", "accuracy", *latents] if classes else [])],
        "val": ["epoch", *(["rec", "kld"] if vae else []), *(["latent", "bce", "acc", "acc_hard"] if classes else [])],
        "test": ["iter", "rec", "kld",
                 *(["latent", "BCE", "Acc", "I", *latents, "acc_hard", "latent_mu"] if classes else [])],
    }  # fmt: skip


class Report:
    """Writes the files of one run. `tested_at` is the last step whose rows a resumed run keeps, None for a new run."""

    def __init__(
        self, o: Config, model: Algorithm, data: ConceptData, files: Files, run: Run, per_epoch: int,
        tested_at: int | None = None,
    ):  # fmt: skip
        self.o, self.model, self.data, self.files, self.run = o, model, data, files, run
        self.device, self.per_epoch = next(model.parameters()).device, per_epoch
        if tested_at is None:
            self._remove_earlier()
        mask = data.train.mask.numpy() > 0
        counts = {"supervised_images": int(mask.sum()), "train_images": len(data.train)}
        write_json(files.log / "commandline_args.txt", o.as_dict() | counts)
        save_arrays(files.log / "supervised_rows.npy", data.train.rows.numpy()[mask])
        names, keep = columns(model), None if tested_at is None else ("iter", tested_at)
        metrics = Table(files.train / "metrics.csv", names["metrics"], keep)
        # a row a test point, as in metrics.csv: its epoch alone does not say whether it was written by then
        rows = None if tested_at is None else metrics.rows
        self.tables = {
            "metrics": metrics,
            "val": Table(files.train / "val_metrics.csv", names["val"], keep_rows=rows),
            "test": Table(files.evaluation / "test_metrics.csv", names["test"], keep),
        }
        if o.evaluation_metric:
            shown = [f"eval_{name}" for name in o.evaluation_metric]
            self.tables["dis"] = Table(files.evaluation / "dis_metrics.csv", shown, keep_rows=rows)

    def _remove_earlier(self) -> None:
        """Results of an earlier run that this one replaces must not be taken for its own."""
        f = self.files
        own = [f.train / name for name in ("latents_obtained.npy", "thr_rec.csv", "thr_y.csv")]
        own += [f.evaluation / name for name in ("latents_obtained.npy", "downstream_obtained.npy", "dis_metrics.csv",
                                                 "centroids.npy", "passed.npy")]  # fmt: skip
        for name in METRICS:
            folder = f.evaluation / name / "results"
            own += [folder / "json" / "evaluation_results.json", folder / "aggregate" / "evaluation.json"]
        for path in own:
            path.unlink(missing_ok=True)

    def epoch_of(self, step: int) -> int:
        """The epoch (from 1) of a finished step."""
        return max(1, -(-step // self.per_epoch))

    # ---- training

    def terms(self, step: int, terms: Terms, lr: float, say: bool) -> None:
        """The weighted terms of a step, for the record and (`say`) the terminal."""
        names = ("recon", "kld", "prediction", "latent", "plugins")
        values = {name: float(getattr(terms, name)) for name in names}
        self.run.log(step, total=float(terms.total), **values, lr=lr)
        if say:
            shown = "  ".join(f"{name} {value:.4g}" for name, value in values.items() if value)
            self.run.info(f"step {step}  epoch {self.epoch_of(step)}  {shown}  lr {lr:.3g}")

    def epoch(self, step: int, mean_loss: float, seconds: float, latents: list | None) -> None:
        """The end of an epoch: its latents (z, concepts), unless the stopping rule holds them back."""
        if latents:
            z, g = (torch.cat(parts).cpu().numpy() for parts in zip(*latents, strict=True))
            save_arrays(self.files.train / "latents_obtained.npy", self.epoch_of(step), z, g)
        self.run.info(f"epoch {self.epoch_of(step)} done at step {step}: mean loss {mean_loss:.4f}, {seconds:.0f} s")

    def train_row(self, step: int, terms: Terms, batch: Batch, z: torch.Tensor) -> None:
        """metrics.csv: weighted losses of the batch, unweighted concept errors (-1: no supervised row)."""
        model, row = self.model, {"iter": step, "epoch": self.epoch_of(step)}
        if model.decoder is not None:
            row |= {"reconstruction_error": float(terms.recon), "kld": float(terms.kld)}
        if model.predicts_classes:
            raw = z if model.decoder is not None else 2 * torch.atanh(z.clamp(-1 + 1e-6, 1 - 1e-6))
            with torch.no_grad():
                hard = (model.classify(raw).argmax(1) == batch.y).double().mean()
            row |= {"latent_error": float(terms.true_values), "classification_error": float(terms.prediction)}
            row["accuracy"] = float(hard)
            errors = terms.columns.tolist() if bool(terms.supervised) else [-1.0] * len(terms.columns)
            row |= {f"latent{i}": value for i, value in enumerate(errors)}
        self.tables["metrics"].append(row)

    # ---- passes

    def validate(self, step: int) -> passes.Scores:
        """val_metrics.csv."""
        with passes.evaluating(self.model, self.o.seed + step):
            scores, _ = passes.evaluate(self.model, self.data.val, step, self.device)
        row = scores._asdict() | {"epoch": self.epoch_of(step)}
        table = self.tables["val"]
        table.append({name: row[name] for name in table.columns})
        self.run.log(step, **{f"val_{name}": row[name] for name in table.columns if name != "epoch"})
        return scores

    def test(self, step: int, save: bool = True) -> passes.Scores:
        """Every test image once: test_metrics.csv and, with `save`, latents and predictions."""
        keep = max(passes.SAVED_TEST_ROWS, len(self.data.test))
        with passes.evaluating(self.model, self.o.seed + step):
            scores, outputs = passes.evaluate(
                self.model, self.data.test, step, self.device, self.o.mc_samples, all_rows=True, keep=keep
            )
        row: dict[str, Any] = scores._asdict() | {"iter": step, "BCE": scores.bce, "Acc": scores.acc, "I": 0}
        row |= {f"latent{i}": value for i, value in enumerate(scores.columns)}
        table = self.tables["test"]
        table.append({name: row[name] for name in table.columns})
        logged = [name for name in table.columns if name not in ("iter", "I")]
        self.run.log(step, **{f"test_{name}": float(row[name]) for name in logged})
        if save:
            n, folder, epoch = passes.SAVED_TEST_ROWS, self.files.evaluation, self.epoch_of(step)
            z = torch.from_numpy(outputs.z[:n]).double().sigmoid().numpy()
            save_arrays(folder / "latents_obtained.npy", epoch, z, outputs.concepts[:n])
            if self.model.predicts_classes:
                save_arrays(folder / "downstream_obtained.npy", epoch, outputs.y, outputs.prediction)
        return scores

    def metrics(self, step: int) -> dict[str, float]:
        """The disentanglement metrics, each written as soon as it is measured; returns the values for tables."""
        from common.metrics.disentanglement import headline

        values, began, o = {}, time.perf_counter(), self.o
        with passes.evaluating(self.model, o.seed):
            for name, scores in passes.disentanglement(self.model, self.data, self.device, o):
                folder = self.files.evaluation / name / "results"
                record = {**scores, "elapsed_time": time.perf_counter() - began, "iter": step}
                write_json(folder / "json" / "evaluation_results.json", record)
                prefixed = {f"evaluation_results.{key}": value for key, value in record.items()}
                write_json(folder / "aggregate" / "evaluation.json", prefixed)
                values[f"eval_{name}"] = headline(name, scores)
        measured = {name: value for name, value in values.items() if value is not None}
        self.run.log(step, **measured)
        text = ", ".join(f"{name} {value:.4f}" for name, value in measured.items())
        self.run.info(f"step {step}: {text} ({time.perf_counter() - began:.0f} s)")
        return values

    def rejection(self) -> osr.Thresholds:
        """Thresholds of the open-set check from the training images; thr_rec.csv, thr_y.csv, centroids, passed."""
        o, f = self.o, self.files
        with passes.evaluating(self.model, o.seed):
            thresholds, _ = passes.fit_rejection(self.model, self.data, self.device, o.osr_quantile, o.osr_sample)
            seen = passes.encode_for_rejection(self.model, self.data.test, self.device, o.osr_sample)
        passed = passes.accepted(self.model, seen, thresholds)
        Table(f.train / "thr_rec.csv", ["thr_rec"]).append({"thr_rec": thresholds.reconstruction})
        per_class = Table(f.train / "thr_y.csv", ["thr_y"])
        for value in thresholds.distance:
            per_class.append({"thr_y": value})
        save_arrays(f.evaluation / "centroids.npy", thresholds.means)
        save_arrays(f.evaluation / "passed.npy", passed)
        self.run.info(f"rejection: {passed.mean():.1%} of the {len(passed):,} test images accepted")
        return thresholds

    # ---- pictures

    @property
    def traverses(self) -> bool:
        """Whether traversals are drawn."""
        o = self.o
        return o.file_save and self.model.decoder is not None and (o.traverse_z or o.traverse_l or o.traverse_c)

    def shown_batch(self) -> Batch:
        """A seeded choice of training images."""
        places = np.random.default_rng(self.o.seed).permutation(len(self.data.train))
        return self.data.train.gather(torch.from_numpy(places[: min(self.o.batch_size, 64)]), self.device)

    def reconstruction(self, step: int, batch: Batch) -> None:
        """recon.jpg (recon_<step>.jpg in a test): images beside their reconstructions."""
        if not self.o.file_save or self.model.decoder is None:
            return
        with passes.evaluating(self.model, self.o.seed):
            picture = visual.reconstruction_picture(self.model, Batch(*(part[:64] for part in batch)))
        visual.save_image(self.files.pictures / (f"recon_{step}.jpg" if self.o.test else "recon.jpg"), picture)
        self.run.image("reconstruction", picture, step)

    def traversals(self, step: int) -> None:
        """traverse_<key>.jpg and gif_<key>.gif of fixed images and of one that is chosen anew each time."""
        if not self.traverses:
            return
        o, m = self.o, self.model
        values = visual.traversal_values(o.traverse_min, o.traverse_max, o.traverse_spacing)
        latents = list(range(o.z_dim)) if o.traverse_z else list(range(m.shape.n_concepts)) if o.traverse_l else []
        keys, places = visual.traversed_places(self.data, o.seed, step)
        batch = self.data.train.gather(torch.tensor(places), self.device)
        with passes.evaluating(m, o.seed):
            for i, key in enumerate(keys):
                rows = visual.traverse(m, batch, i, values, latents, o.traverse_c)
                end = f"{step}_{i}" if o.test else key
                picture = visual.save_traversal(
                    self.files.pictures, f"traverse_{end}", f"gif_{end}" if o.gif_save else None, rows
                )
                self.run.image(f"traversal_{key}", picture, step)

    def matrix(self) -> None:
        """latent_factor_matrix.png: correlations of latents and concepts on the test images."""
        if not self.o.file_save or not self.model.supervises_concepts:
            return
        with passes.evaluating(self.model, self.o.seed):
            _, outputs = passes.evaluate(self.model, self.data.test, 0, self.device, all_rows=True, keep=5000)
        matrix = visual.latent_factor_matrix(outputs.mu, outputs.concepts)
        title = f"|correlation|, {self.o.alg}, {self.o.masking_fact:g} % supervised"
        visual.save_matrix(self.files.pictures / "latent_factor_matrix.png", matrix, self.data.concept_names, title)
