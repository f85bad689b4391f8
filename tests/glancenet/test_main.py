"""The training command: files and their columns, exact resume, --test, refusals."""

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common.checkpoint import load_state
from common.errors import NonFiniteError, UserError
from glancenet import main as training
from glancenet.options import parse
from glancenet.records import load_arrays, read_table
from glancenet.state import KIND

ROOT = Path(__file__).resolve().parents[2]
LATENTS = [f"latent{i}" for i in range(7)]


def columns(path: Path) -> list[str]:
    with open(path, newline="") as file:
        return next(csv.reader(file))


def test_tables_of_a_glancenet_run(glancenet_run):
    log = glancenet_run.log
    train = [
        "iter",
        "epoch",
        "reconstruction_error",
        "kld",
        "latent_error",
        "classification_error",
        "accuracy",
        *LATENTS,
    ]
    assert columns(log / "train_runs" / "metrics.csv") == train
    assert columns(log / "train_runs" / "val_metrics.csv") == [
        "epoch",
        "rec",
        "kld",
        "latent",
        "bce",
        "acc",
        "acc_hard",
    ]
    test = ["iter", "rec", "kld", "latent", "BCE", "Acc", "I", *LATENTS, "acc_hard", "latent_mu"]
    assert columns(log / "eval_results" / "test_metrics.csv") == test
    assert columns(log / "eval_results" / "dis_metrics.csv") == ["eval_mig", "eval_sap_score"]
    rows = read_table(log / "train_runs" / "metrics.csv")
    assert [int(row["iter"]) for row in rows] == [4, 8, 12], "one row an epoch of 4 steps, and exactly max_epoch epochs"
    assert len(read_table(log / "eval_results" / "dis_metrics.csv")) == len(rows)
    rec = [float(row["rec"]) for row in read_table(log / "eval_results" / "test_metrics.csv")]
    assert rec[-1] < rec[0], "training lowers the reconstruction error"


def test_arrays_of_a_glancenet_run(glancenet_run):
    log = glancenet_run.log
    epoch, z, g = load_arrays(log / "train_runs" / "latents_obtained.npy", 3)
    assert int(epoch) == 3 and z.shape == (128, 7) and g.shape == (128, 7)
    epoch, z, g = load_arrays(log / "eval_results" / "latents_obtained.npy", 3)
    assert z.dtype == np.float64 and z.shape == (19, 7) and ((z > 0) & (z < 1)).all()
    assert (g[:, :3].sum(1) == 1).all() and np.ptp(g[:, 3:]) == 1
    epoch, y, prediction = load_arrays(log / "eval_results" / "downstream_obtained.npy", 3)
    assert y.shape == prediction.shape == (19,) and set(np.unique(y)) <= {0, 1}
    last = read_table(log / "eval_results" / "test_metrics.csv")[-1]
    assert float(last["acc_hard"]) == pytest.approx((y == prediction).mean())
    errors = [float(last[name]) for name in LATENTS]
    assert float(last["latent"]) == pytest.approx(np.mean(errors)), "per-latent errors are means over all images"


def test_supervision_is_recorded(glancenet_run):
    config = json.loads((glancenet_run.log / "commandline_args.txt").read_text())
    rows = np.load(glancenet_run.log / "supervised_rows.npy")
    assert config["supervised_images"] == len(rows) and 50 < len(rows) < 104
    assert config["train_images"] == 154


def test_metric_files(glancenet_run):
    folder = glancenet_run.log / "eval_results" / "mig" / "results"
    values = json.loads((folder / "json" / "evaluation_results.json").read_text())
    assert 0 <= values["discrete_mig"] <= 1 and values["elapsed_time"] > 0
    prefixed = json.loads((folder / "aggregate" / "evaluation.json").read_text())
    assert prefixed["evaluation_results.discrete_mig"] == values["discrete_mig"]
    last = read_table(glancenet_run.log / "eval_results" / "dis_metrics.csv")[-1]
    assert float(last["eval_mig"]) == pytest.approx(values["discrete_mig"])


def test_rejection_files(glancenet_run):
    log = glancenet_run.log
    centroids = np.load(log / "eval_results" / "centroids.npy")
    passed = np.load(log / "eval_results" / "passed.npy")
    state = load_state(glancenet_run.folder / "ckpt" / "one" / "final", KIND)
    prior = state["model"]["prior.weight"].T + state["model"]["prior.bias"]
    np.testing.assert_allclose(centroids, prior.numpy(), rtol=1e-6)
    assert passed.shape == (19,) and passed.dtype == bool
    thresholds = [float(row["thr_y"]) for row in read_table(log / "train_runs" / "thr_y.csv")]
    np.testing.assert_allclose(state["thresholds"]["osr.distance"].numpy(), thresholds)


def test_pictures_and_board(glancenet_run):
    pictures = glancenet_run.folder / "pictures" / "one"
    for name in ("recon.jpg", "traverse_rand0.jpg", "gif_rand0.gif", "traverse_random.jpg", "latent_factor_matrix.png"):
        assert (pictures / name).stat().st_size > 500, name
    assert list((glancenet_run.log / "run" / "tb").glob("events*"))


def test_tables_of_a_bottleneck(cbnm_run):
    log = cbnm_run.log
    train = ["iter", "epoch", "latent_error", "classification_error", "accuracy", *LATENTS]
    assert columns(log / "train_runs" / "metrics.csv") == train
    assert columns(log / "train_runs" / "val_metrics.csv") == ["epoch", "latent", "bce", "acc", "acc_hard"]
    epoch, z, _ = load_arrays(log / "train_runs" / "latents_obtained.npy", 3)
    assert int(epoch) == 2 and (np.abs(z) < 1).all()
    epoch, y, prediction = load_arrays(log / "eval_results" / "downstream_obtained.npy", 3)
    assert int(epoch) == 2 and len(y) == len(prediction) == 19
    assert not (cbnm_run.folder / "pictures" / "one" / "recon.jpg").exists(), "a bottleneck has nothing to reconstruct"


def test_checkpoint_predicts_as_the_trained_model(glancenet_run):
    """--test of the final checkpoint repeats the last test row: classifier and prior are in the checkpoint."""
    words = [*glancenet_run.words, "--test", "true", "--ckpt_load", f"{glancenet_run.folder}/ckpt/one/final"]
    log = training.main([*words, "--out_path", "tested"])
    before = read_table(glancenet_run.log / "eval_results" / "test_metrics.csv")[-1]
    after = read_table(log / "eval_results" / "test_metrics.csv")[-1]
    assert {k: float(v) for k, v in before.items()} == pytest.approx({k: float(v) for k, v in after.items()}, rel=1e-5)
    assert (glancenet_run.folder / "test_pictures" / "one" / "recon_12.jpg").exists()


@pytest.mark.parametrize("stop", [4, 6])
def test_resume_is_exact(command, tmp_path, stop):
    """Stopping at a step (at an epoch's end, and inside one) and going on gives the weights of an unbroken run."""
    extra = ["--alg", "GlanceNet", "--conditional_prior", "true", "--file_save", "false", "--loss_terms", "FactorVAE"]
    extra += ["--size_layer_disc", "16", "--lr_scheduler", "ExponentialLR", "--lr_scheduler_args", "gamma=0.9"]
    whole = [*extra, "--max_iter", "8", "--name", "whole", "--out_path", "whole"]
    training.main(command(tmp_path, *whole))
    training.main(command(tmp_path, *extra, "--max_iter", str(stop), "--name", "part", "--out_path", "part"))
    state = load_state(tmp_path / "ckpt" / "part" / "final", KIND)
    assert state["iter"] == stop
    more = ["--ckpt_load", f"{tmp_path}/ckpt/part/final", "--max_iter", "8", "--name", "part", "--out_path", "part"]
    training.main(command(tmp_path, *extra, *more))
    states = [load_state(tmp_path / "ckpt" / name / "final", KIND) for name in ("whole", "part")]
    assert states[0]["iter"] == states[1]["iter"] == 8
    for key, value in states[0]["model"].items():
        torch.testing.assert_close(value, states[1]["model"][key], rtol=1e-5, atol=1e-7)


def test_a_signal_saves_and_the_run_goes_on_from_there(command, tmp_path, monkeypatch):
    """SIGTERM inside an epoch: the state is saved, no finished weights are left, and a resume ends the run."""
    step = training.train_step

    def send(model, optimizers, batch, second, index, *rest):
        if index == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return step(model, optimizers, batch, second, index, *rest)

    words = command(
        tmp_path, "--alg", "CBNM", "--max_epoch", "2", "--name", "x", "--out_path", "x", "--file_save", "false"
    )
    monkeypatch.setattr(training, "train_step", send)
    with pytest.raises(KeyboardInterrupt):
        training.main(words)
    monkeypatch.undo()
    folder = tmp_path / "ckpt" / "x"
    assert load_state(folder / "final", KIND)["iter"] == 3
    assert not (folder / "model.safetensors").exists()
    training.main([*words, "--ckpt_load", str(folder / "final")])
    assert load_state(folder / "final", KIND)["iter"] == 8 and (folder / "model.safetensors").exists()


def test_class_loss_alone_from_the_middle_of_an_epoch(command, tmp_path, monkeypatch):
    seen, step = [], training.train_step

    def spy(model, optimizers, batch, second, index, classes_only, *rest):
        seen.append((index, classes_only))
        return step(model, optimizers, batch, second, index, classes_only, *rest)

    monkeypatch.setattr(training, "train_step", spy)
    words = ["--alg", "CBNM", "--max_epoch", "2", "--file_save", "false", "--classification_epoch", "1.25"]
    training.main(command(tmp_path, *words))
    assert seen == [(i, i >= 5) for i in range(8)], "epochs of 4 steps"


@pytest.mark.parametrize(("unit", "steps"), [("false", 7), ("true", 35)])
def test_intervals_are_steps_or_epochs(command, tmp_path, unit, steps):
    o = parse(command(tmp_path, "--alg", "CBNM", "--float_iter", "7", "--treat_iter_as_epoch", unit))
    assert training.intervals(o, 5).float == steps


def test_reports_come_at_the_intervals_and_at_the_ends_of_epochs(command, tmp_path, monkeypatch):
    """Terms every --float_iter and every --show_loss steps; an epoch's line at its end and at the last step."""
    terms, epochs, clock = [], [], iter(100 + 7 * i for i in range(100))
    monkeypatch.setattr(training.Report, "terms", lambda self, step, *rest, **say: terms.append((step, say["say"])))
    monkeypatch.setattr(training.Report, "epoch", lambda self, step, mean, seconds, z: epochs.append((step, seconds)))
    monkeypatch.setattr(training, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    words = ["--alg", "CBNM", "--max_iter", "7", "--file_save", "false", "--float_iter", "2", "--show_loss", "3"]
    training.main(command(tmp_path, *words, "--print_iter", "6"))
    assert terms == [(2, False), (3, False), (4, False), (6, True)]
    assert epochs == [(4, 7), (7, 7)], "epochs of 4 steps; the seconds since the one before"


def test_a_metric_that_fails_is_said_and_the_training_goes_on(command, cbnm_run, tmp_path, monkeypatch):
    def metrics(report, step):
        if step == 1:
            raise UserError("the codes are constant")
        return {}

    monkeypatch.setattr(training.Report, "metrics", metrics)
    words = ["--alg", "CBNM", "--max_iter", "2", "--evaluation_metric", "mig", "--evaluate_iter", "1"]
    log = training.main(command(tmp_path, *words, "--hold_data", "true"))
    said = (log / "run/log.txt").read_text()
    assert "metrics not measured: the codes are constant" in said
    (final,) = tmp_path.glob("ckpt/*/final")
    assert load_state(final, KIND)["iter"] == 2
    assert ", images held there" in said and "held there" not in (cbnm_run.log / "run/log.txt").read_text()


def test_same_seed_gives_the_same_run_and_another_does_not(command, tmp_path):
    def weights(name: str, seed: str) -> dict:
        words = command(
            tmp_path, "--alg", "CBNM", "--max_iter", "3", "--name", name, "--out_path", name, "--seed", seed
        )
        training.main([*words, "--file_save", "false"])
        return load_state(tmp_path / "ckpt" / name / "final", KIND)["model"]

    one, same, other = weights("a", "1"), weights("b", "1"), weights("c", "2")
    assert all(torch.equal(one[key], same[key]) for key in one)
    assert any(not torch.equal(one[key], other[key]) for key in one)


ALGORITHM_CASES = {
    "VAE": ["--loss_terms", "BetaTCVAE", "--w_tc", "3"],
    "BetaVAE": ["--w_kld", "4", "--controlled_capacity_increase", "true", "--max_c", "5", "--traverse_z", "true"],
    "AE": ["--encoder", "PadlessConv64"],
    "CVAE": ["--include_labels", "1", "--traverse_c", "true", "--traverse_z", "true"],
    "IFCVAE": ["--encoder", "PadlessGaussianConv64", "PadlessConv64", "--include_labels", "1", "2",
               "--traverse_c", "true", "--size_layer_disc", "16"],
    "GlanceNet": ["--w_recon_scheduler", "LinearScheduler", "--w_recon_scheduler_args", "target_value=0.5", "epochs=2"],
}  # fmt: skip


@pytest.mark.parametrize("algorithm", ALGORITHM_CASES)
def test_every_algorithm_runs(command, tmp_path, algorithm):
    words = command(tmp_path, "--alg", algorithm, "--max_epoch", "2", "--out_path", "x", *ALGORITHM_CASES[algorithm])
    log = training.main([*words, "--gif_save", "false"])
    rows = read_table(log / "eval_results" / "test_metrics.csv")
    assert [int(row["iter"]) for row in rows] == [4, 8]
    assert float(rows[-1]["rec"]) < float(rows[0]["rec"])
    if algorithm == "GlanceNet":
        state = load_state(tmp_path / "ckpt" / "unknown_experiment" / "final", KIND)
        assert state["w_recon"] == 0.5


REFUSED = {
    "metrics without factors": (
        ["--alg", "GlanceNet", "--dset_name", "dsprites_leakage", "--evaluation_metric", "dci"], "no full grid",
    ),
    "plug-in of a bottleneck": (["--alg", "CBNM", "--loss_terms", "FACTORVAE"], "no such term"),
    "plug-in of an autoencoder": (
        ["--alg", "AE", "--encoder", "PadlessConv64", "--loss_terms", "INFOVAE"], "no such term",
    ),
    "incompatible plug-ins": (["--alg", "VAE", "--loss_terms", "DIPVAEI", "DIPVAEII"], "choose one"),
    "unknown plug-in": (["--alg", "VAE", "--loss_terms", "DIPVAE"], "did you mean"),
    "unknown flag": (["--alg", "VAE", "--zdim", "7"], "did you mean .z_dim."),
    "dead flag": (["--alg", "VAE", "--reduce_recon", "1"], "never uses it"),
    "dead latent loss": (["--alg", "GlanceNet", "--latent_loss", "Hybrid"], "never implemented"),
    "algorithm without code": (["--alg", "CBM_Seq"], "without code"),
    "unknown algorithm": (["--alg", "GlanceNets"], "did you mean 'GlanceNet'"),
    "string for a bool": (["--alg", "VAE", "--controlled_capacity_increase", "perhaps"], "expected true or false"),
    "plain encoder for a VAE": (["--alg", "VAE", "--encoder", "PadlessConv64"], "has no variance"),
    "Gaussian encoder for an AE": (["--alg", "AE"], "without a variance"),
    "too few latents": (["--alg", "GlanceNet", "--z_dim", "6"], "smaller than the 7 concepts"),
    "weighted VAE": (["--alg", "VAE", "--w_kld", "2"], "BetaVAE"),
    "prior of a VAE": (["--alg", "BetaVAE", "--conditional_prior", "true"], "belongs to --alg GlanceNet"),
    "unknown encoder": (["--alg", "VAE", "--encoder", "PadlesGaussianConv64"], "did you mean 'PadlessGaussianConv64'"),
    "image discriminator": (
        ["--alg", "VAE", "--loss_terms", "FACTORVAE", "--discriminator", "SimpleDiscriminatorConv64"], "reads images",
    ),
    "decoder of another size": (["--alg", "VAE", "--decoder", "DeConv64"], "--z_dim 64"),
    "unknown data set": (["--alg", "VAE", "--dset_name", "mpi3"], "did you mean"),
    "mnist": (["--alg", "VAE", "--dset_name", "mnist"], "mnist_parity.py"),
    "wrong factor": (["--alg", "VAE", "--include_labels", "9"], "9: expected different ones of 0 color, 1 shape"),
    "test without checkpoint": (["--alg", "VAE", "--test", "true"], "--ckpt_load"),
    "missing checkpoint": (["--alg", "VAE", "--ckpt_load", "nowhere/last"], "nowhere/last"),
    "scheduler arguments": (["--alg", "VAE", "--lr_scheduler", "StepLR"], "step_size"),
    "batch too large": (["--alg", "VAE", "--batch_size", "500"], "154 training images"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_refusals(command, tmp_path, leakage_data, case):
    words, message = REFUSED[case]
    place = command(tmp_path, "--max_iter", "1")
    if "dsprites_leakage" in words:
        words = [*words, "--dset_dir", str(leakage_data), "--z_dim", "5"]
        place = [word for word in place if word not in ("--sprites_sizes", "3", "2", "4")]
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        training.main([*place, *words])
    assert not (tmp_path / "logs").exists(), "nothing is written before the check"


def test_data_set_named_by_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("AICROWD_DATASET_NAME", "mpi3d_toy")
    monkeypatch.setenv("DATASET_NAME", "Sprites")
    monkeypatch.setenv("DISENTANGLEMENT_LIB_DATA", str(tmp_path))
    base = ["--alg", "VAE", "--encoder", "SimpleGaussianConv64", "--decoder", "SimpleConv64"]
    o = parse(base)
    assert (o.dset_name, o.dset_dir) == ("sprites", str(tmp_path))
    assert parse([*base, "--dset_name", "celebA-64"]).dset_name == "celebA"
    monkeypatch.delenv("DATASET_NAME")
    assert parse(base).dset_name == "mpi3d_toy"
    monkeypatch.delenv("AICROWD_DATASET_NAME")
    with pytest.raises(UserError, match="name a data set"):
        parse(base)


def test_a_run_names_no_data_folder_for_the_next_one(command, tmp_path, monkeypatch):
    monkeypatch.delenv("DISENTANGLEMENT_LIB_DATA", raising=False)
    training.main(command(tmp_path, "--alg", "GlanceNet", "--max_iter", "1", "--dset_dir", str(tmp_path)))
    assert "DISENTANGLEMENT_LIB_DATA" not in os.environ


def test_a_diverging_run_ends_with_exit_code_3(command, tmp_path):
    with pytest.raises(NonFiniteError, match="step"):
        training.main(command(tmp_path, "--alg", "GlanceNet", "--lr_G", "1e10", "--max_epoch", "3", "--out_path", "x"))


def test_an_existing_run_is_not_overwritten(command, cbnm_run):
    words = command(cbnm_run.folder, "--alg", "CBNM", "--max_iter", "1", "--out_path", "one")
    words[words.index("--alg") + 1] = "CBM_Join"
    with pytest.raises(UserError, match="already holds a run"):
        training.main(words)
    assert len(read_table(cbnm_run.log / "train_runs" / "metrics.csv")) == 2


def test_command_line_from_another_folder(tmp_path):
    """The script itself: help lists the flags in groups; a mistake is one line and exit code 2."""
    script = str(ROOT / "glancenet" / "main.py")
    shown = subprocess.run([sys.executable, script, "--alg", "GlanceNet", "--encoder", "x", "--maks", "1"],
                           cwd=tmp_path, capture_output=True, text=True)  # fmt: skip
    assert shown.returncode == 2
    assert shown.stderr.strip().count("\n") == 0 and shown.stderr.startswith("error: unknown option --maks")
    shown = subprocess.run([sys.executable, script, "--help"], cwd=tmp_path, capture_output=True, text=True)
    assert shown.returncode == 0
    for group in ("networks", "objective", "optimisation", "data", "evaluation", "intervals", "files"):
        assert f"\n{group}" in shown.stdout
