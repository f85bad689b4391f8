"""Train and evaluate GlanceNets, concept bottlenecks (CBNM) and the VAE family.

Marconato, Passerini, Teso: GlanceNets: Interpretable, Leak-proof Concept-based Models (NeurIPS 2022).

    python glancenet/main.py --alg GlanceNet --dset_name dsprites_full --dset_dir data --encoder SimpleGaussianConv64 \\
        --decoder SimpleConv64 --z_dim 7 --label_weight 100 --conditional_prior true --masking_fact 10 --max_iter 250000
    python glancenet/main.py --alg CBNM --dset_name dsprites_full --encoder SimpleGaussianConv64 --z_dim 7
    python glancenet/main.py --alg BetaVAE --dset_name sprites --encoder SimpleGaussianConv64 --decoder SimpleConv64 \\
        --loss_terms BetaTCVAE INFOVAE --w_tc 6
    python glancenet/main.py ... --test true --ckpt_load checkpoints/NAME/last --evaluation_metric mig dci
    python glancenet/main.py ... --name NAME --out_path NAME --resume auto       # go on if there is something to

Written: logs/<data set>__<alg>/<out_path>/ (train_runs, eval_results, run/tb for TensorBoard, commandline_args.txt),
<ckpt_dir>/<name>/{last,best,final,model.safetensors} and pictures in <train_output_dir>/<name>. The files are
described in glancenet/README.md; `python glancenet/evaluate.py LOG_FOLDER` makes tables and plots of them. One training
step is `train_step` below, the model's `terms` in algorithms.py and the objective in losses.py.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0:1] = [str(Path(__file__).resolve().parents[1])]
    import common.start  # noqa: F401

import json
import logging
import tempfile
import time
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from common.checkpoint import load_into, load_state, save_weights
from common.cuda_graph import CudaGraph, detached
from common.datasets.folder import check_split
from common.errors import NonFiniteError, UserError, run_command
from common.launch import Distributed, full_precision, keep_freed_memory, non_finite_layer, seed_everything
from common.run import Run
from glancenet import passes
from glancenet.algorithms import Algorithm, make_model
from glancenet.data import ConceptData, TrainingBatches, load_data
from glancenet.losses import Batch, Terms, Weights
from glancenet.options import Config, check_grid, parse
from glancenet.report import Files, Report
from glancenet.state import KIND, GlanceTraining, differences, threshold_tensors

STOPPING_FROM = {"GlanceNet": 10, "CBNM": 12}  # epochs before the stopping rule judges


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


def intervals(o: Config, per_epoch: int) -> Every:
    """The intervals in steps: the flag, then --all_iter, then one epoch; test_iter follows evaluate_iter."""
    unit = per_epoch if o.treat_iter_as_epoch else 1

    def steps(flag: float | None, default: int) -> int:
        return max(1, int(flag * unit)) if flag is not None else default

    common = steps(o.all_iter, per_epoch)
    found = {name: steps(getattr(o, f"{name}_iter"), common) for name in Every._fields if name != "test"}
    return Every(test=steps(o.test_iter, found["evaluate"]), **found)


def set_up(o: Config, dist: Distributed) -> tuple[ConceptData, Algorithm]:
    """Seeds, data and model of a training or test. Raises UserError for options that do not fit the data."""
    seed_everything(o.seed, o.deterministic)  # the same on every process: they draw the same noise
    full_precision(o.tf32)
    keep_freed_memory()
    data = load_data(o)
    check_grid(o, data.grid)
    if o.batch_size % dist.world:
        raise UserError(f"--batch_size {o.batch_size} must be a multiple of the {dist.world} processes")
    model = make_model(o, data.shape).to(dist.device, memory_format=torch.channels_last)
    model.share(dist)
    return data, model


def gradients(
    model: Algorithm, optimizers: dict[str, torch.optim.Optimizer], part: str, batch: Batch,
    second: Batch | None = None, z: Tensor | None = None, step: int | Tensor = 0, classes_only: bool = False,
    _weights: Weights | None = None,
) -> tuple[dict[str, Tensor], Terms | None, Tensor | None]:  # fmt: skip
    """The gradients of a part of `train_step`: ({optimiser: loss}, terms, latents z (B, D)), detached.

    `part`: 'labels', 'main', or 'adversaries', which sees the latents z (B, D) and another batch. `_weights`: the
    model's, named by a caller who has to tell steps apart.
    """

    def backward(name: str, loss: Tensor) -> Tensor:
        optimizers[name].zero_grad(set_to_none=True)
        loss.backward()
        return loss

    terms = None
    if part == "labels":
        found = {"G": backward("G", model.label_loss(batch))}
    elif part == "main":
        terms, z = model.terms(batch, step)
        found = {"G": backward("G", terms.prediction if classes_only else terms.total)}
    else:
        found = {name: backward(name, loss) for name, loss in model.adversary_losses(z, batch, second)}
    return detached((found, terms, z))


def train_step(
    model: Algorithm, optimizers: dict[str, torch.optim.Optimizer], batch: Batch, second: Batch | None = None,
    step: int | Tensor = 0, classes_only: bool = False, check=lambda loss, model: None, graph: CudaGraph | None = None,
) -> tuple[Terms, Tensor]:  # fmt: skip
    """One step of every network after `step` finished ones; the terms (detached) and the latents z (B, D).

    `second`: another batch, for FactorVAE; `classes_only`: the class loss alone; `check(loss, model)` looks at a loss
    before its optimiser steps; `graph`: of `gradients` for these networks.
    """
    compute = graph or partial(gradients, model, optimizers)

    def update(part: str, *inputs) -> tuple[Terms | None, Tensor | None]:
        losses, *found = compute(part, batch, *inputs)
        for name, loss in losses.items():
            model.dist.sum_gradients(model.shared_parameters() if name == "G" else ())
            check(loss, model)
            optimizers[name].step()
        return found

    if model.predicts_labels:  # IFCVAE
        update("labels")
    terms, z = update("main", None, None, step, classes_only, model.w)
    if model.adversaries():  # FactorVAE, IFCVAE
        update("adversaries", second, z)
    return terms, z


def train(o: Config, dist: Distributed) -> Path:
    """Train to the last step or the stopping rule, then evaluate; returns the log folder."""
    data, model = set_up(o, dist)
    held = (o.hold_data or (o.hold_data is None and dist.device.type == "cuda")) and \
        all(part.hold(dist.device) for part in (data.train, data.val, data.test))  # fmt: skip
    batches = TrainingBatches(data.train, o, dist.device, second="FACTORVAE" in o.loss_terms)
    per_epoch, every = len(batches), intervals(o, len(batches))
    last_step = max(1, int(min(o.max_iter, o.max_epoch * per_epoch)))
    classes_from = float("inf") if o.classification_epoch is None else o.classification_epoch * per_epoch
    with ExitStack() as stack:
        discard = None if dist.is_main else stack.enter_context(tempfile.TemporaryDirectory())
        training = stack.enter_context(GlanceTraining(o, dist, model, per_epoch, last_step, discard))
        rate, rule, progress, run = training.rate, training.stopping, training.progress, training.run
        tested_at = None if training.state is None else progress.tested_at
        report = Report(o, model, data, training.files, run, per_epoch, tested_at)
        n = sum(p.numel() for p in model.parameters())
        run.info(f"{o.alg} on {o.dset_name}: {n:,} parameters, {len(data.train):,} training images "
                 f"({int(data.train.mask.sum()):,} with concepts), {per_epoch} steps an epoch, {dist.device}"
                 f"{', images held there' if held else ''}; log in {training.files.log}")  # fmt: skip
        if o.early_stopping and rule.exhausted:
            last_step = training.step  # it had stopped
        compute = partial(gradients, model, training.optimizers)
        graph = CudaGraph(compute, model.parameters(), dist, o.cuda_graph, run.info)
        began = time.perf_counter()
        for batch, second in training.steps(batches, last=last_step):
            step = training.step
            rate.start_epoch(training.epoch)
            classes_only = step - 1 >= classes_from
            before = torch.full((), step - 1.0, device=dist.device) if graph.active else step - 1
            terms, z = train_step(
                model, training.optimizers, batch, second, before, classes_only, training.check, graph
            )
            progress.add(terms.total, z, batch.labels)
            if training.every(every.float) or training.every(int(o.show_loss)):
                report.terms(step, terms, rate.current(), say=training.every(every.print))
            stop = best = False
            if training.every(every.test):
                report.train_row(step, terms, batch, z)
                stop, best = validate(o, training, report)
                report.test(step, save=rule.save)
            if rule.save and training.every(every.evaluate):
                measure(training, report)
            if training.every(every.test):
                close_test_point(training, report)
            if rule.save and training.every(every.recon):
                report.reconstruction(step, batch)
            if rule.save and training.every(every.traverse):
                report.traversals(step)
            if training.every(every.schedulers):
                rate.step(progress.mean_loss)
                if training.recon_weight is not None:
                    training.set_w_recon(training.recon_weight.step())
            if training.epoch_ends or step == last_step:
                latents = progress.epoch_latents if rule.save else None
                report.epoch(step, progress.mean_loss, time.perf_counter() - began, latents)
                began = time.perf_counter()
            if training.epoch_ends:
                progress.next_epoch()
            if rule.save and training.every(every.ckpt_save):
                training.save(training.files.checkpoints / "last")
            if best:
                training.save(training.files.checkpoints / "best")
            if stop:
                run.info(f"early stopping at step {step}: {rule.wait} validations without improvement")
                training.save()
                break
        finish(o, training, report)
        return training.files.log


def validate(o: Config, training: GlanceTraining, report: Report) -> tuple[bool, bool]:
    """Validation and the stopping rule: (shall the training end, is this the best state so far)."""
    rule, progress, step = training.stopping, training.progress, training.step
    scores = report.validate(step)
    rule.record(scores.rec + scores.kld, scores.latent, scores.bce)
    best = rule.total[-1] < progress.best_total and training.epoch >= o.warmup_epochs
    if best:
        progress.best_total = rule.total[-1]
    first = STOPPING_FROM.get(o.algorithm)
    if not o.early_stopping or first is None or report.epoch_of(step) <= first:
        return False, best
    if rule.plateaued:
        training.rate.plateaued()
    return rule.update(), best


def measure(training: GlanceTraining, report: Report) -> None:
    """The disentanglement metrics inside a training, where a failing one must not end it."""
    if not report.o.evaluation_metric:
        return
    try:
        training.progress.metric_values = report.metrics(training.step)
        training.progress.metrics_at = training.step
    except UserError as error:
        training.run.info(f"metrics not measured: {error}")


def close_test_point(training: GlanceTraining, report: Report) -> None:
    """The row of dis_metrics.csv that ends a test point."""
    if "dis" in report.tables:
        report.tables["dis"].append(training.progress.metric_values)
    training.progress.tested_at = training.step


def finish(o: Config, training: GlanceTraining, report: Report) -> None:
    """What a finished training leaves behind, whatever the intervals were; the state is saved already."""
    model, step, progress = training.model, training.step, training.progress
    if broken := non_finite_layer(model):
        raise NonFiniteError(f"after step {step}: {broken} is not finite; lower --lr_G or start anew")
    batch = report.shown_batch()
    if progress.tested_at != step:
        with passes.evaluating(model, o.seed):
            terms, z = model.terms(batch, step)
        report.train_row(step, terms, batch, z)
        report.validate(step)  # beside the rule, which must see the same validations as in a longer run
        report.test(step, save=training.stopping.save)
        close_test_point(training, report)
    if model.predicts_classes:
        progress.thresholds = report.rejection()
    report.matrix()
    report.reconstruction(step, batch)
    report.traversals(step)
    try:
        if o.evaluation_metric and progress.metrics_at != step:
            progress.metric_values = report.metrics(step)
            progress.metrics_at = step
            report.tables["dis"].replace_last(progress.metric_values)
    finally:
        if training.stopping.save:
            training.save(training.files.checkpoints / "last")
        training.save()
    if training.dist.is_main:
        tensors = {**model.state_dict(), **threshold_tensors(progress.thresholds)}
        names = {"concept_names": report.data.concept_names, "class_names": list(report.data.class_names)}
        save_weights(training.files.checkpoints / "model.safetensors", tensors, o.as_dict() | names)


def test(o: Config, dist: Distributed) -> Path:
    """--test: the test pass, the rejection, the pictures and the metrics of a loaded model; returns the log folder."""
    data, model = set_up(o, dist)
    state = load_state(o.ckpt_load, KIND)
    load_into(model, state.get("model"), o.ckpt_load)
    trained = state.get("options", {})
    if o.dset_name == trained.get("dset_name") == "folder":
        check_split(o.dset_dir, o.seed, trained["dset_dir"], trained["seed"], "--seed")
    with ExitStack() as stack:
        discard = None if dist.is_main else stack.enter_context(tempfile.TemporaryDirectory())
        files = Files.of(o, discard=discard)
        run = stack.enter_context(
            Run(files.log / "run", o.as_dict(), overwrite=o.overwrite, enabled=dist.is_main,
                wandb="glancenet" if o.use_wandb else None)
        )  # fmt: skip
        for line in differences(state.get("options", {}), o):
            run.info(f"other settings than the training's: {line}")
        step, per_epoch = int(state["iter"]), len(data.train) // o.batch_size
        report = Report(o, model, data, files, run, per_epoch)
        scores = report.test(step)
        if model.predicts_classes:
            report.rejection()
        report.reconstruction(step, report.shown_batch())
        report.traversals(step)
        report.matrix()
        values = report.metrics(step) if o.evaluation_metric else {}
        if "dis" in report.tables:
            report.tables["dis"].append(values)
        names = ("rec", "kld", "latent", "bce", "acc_hard") if model.predicts_classes else ("rec", "kld")
        if dist.is_main:
            print(json.dumps({**{n: float(getattr(scores, n)) for n in names}, **values, "log": str(files.log)}))
        return files.log


def main(argv: list[str] | None = None) -> Path | None:
    """The command; returns the log folder."""
    o = parse(sys.argv[1:] if argv is None else argv, __doc__)
    logging.basicConfig(level=o.verbose, format="%(levelname)s %(message)s")
    if o.dry_run:
        print(json.dumps(o.as_dict(), indent=2))
        return None
    dist = Distributed.start(o.device)
    try:
        return test(o, dist) if o.test else train(o, dist)
    finally:
        dist.close()


if __name__ == "__main__":
    sys.exit(run_command(main))
