"""Resuming: with the same settings, with others, from old checkpoints, after a signal at any moment, twice at once."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from option_table import run_inside
from same_state import same

from common.checkpoint import load_state, save_state
from common.errors import UserError
from glancenet import main as training
from glancenet import passes
from glancenet.records import read_table
from glancenet.report import Report
from glancenet.state import KIND, GlanceTraining

pytestmark = pytest.mark.usefixtures("narrow")
EXTRA = ["--alg", "GlanceNet", "--conditional_prior", "true", "--file_save", "false", "--loss_terms", "FactorVAE"]
EXTRA += ["--encoder", "ShallowGaussianLinear"]
EXTRA += ["--size_layer_disc", "16", "--lr_scheduler", "ExponentialLR", "--lr_scheduler_args", "gamma=0.9"]
EXTRA += ["--mc_samples", "3"]


def state_of(folder, name="x", file="final"):
    return load_state(folder / "ckpt" / name / file, KIND)


def files_below(folder: Path) -> dict[str, float]:
    return {str(path): path.stat().st_mtime_ns for path in folder.rglob("*") if path.is_file()}


@pytest.fixture
def words(command, tmp_path):
    def make(*more: str, folder=tmp_path) -> list[str]:
        return command(folder, *EXTRA, "--name", "x", "--out_path", "x", *more)

    return make


@pytest.fixture(scope="module")
def halves(narrow, command, tmp_path_factory):
    """A run of two of three epochs of 4 steps."""
    folder = tmp_path_factory.mktemp("half")
    training.main(command(folder, *EXTRA, "--name", "x", "--out_path", "x", "--max_epoch", "2"))
    return folder


@pytest.fixture
def half(halves, tmp_path):
    """A copy of it."""
    shutil.copytree(halves, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.fixture(scope="module")
def whole(narrow, command, tmp_path_factory):
    """The run of three epochs that nobody stopped."""
    folder = tmp_path_factory.mktemp("whole")
    training.main(command(folder, *EXTRA, "--name", "x", "--out_path", "x", "--max_epoch", "3"))
    return folder


def same_as(whole, folder):
    """Everything but the places of the files and what may change."""
    one, other = state_of(whole), state_of(folder)
    for state in (one, other):
        state.pop("log"), state.pop("log_place"), state.pop("options")
    same(one, other)
    for name in ("train_runs/metrics.csv", "train_runs/val_metrics.csv", "eval_results/test_metrics.csv"):
        texts = [(place / "logs/sprites__GlanceNet/x" / name).read_text() for place in (whole, folder)]
        assert texts[0] == texts[1], name


@pytest.mark.parametrize("changed", [["--batch_size", "16"], ["--seed", "5"], ["--label_weight", "7"], ["--z_dim", "8"],
                                     ["--mc_samples", "4"], ["--lr_scheduler_args", "gamma=0.5"]])  # fmt: skip
@pytest.mark.parametrize("how", [["--resume", "auto"], ["--ckpt_load", "ckpt/x/last"]])
def test_other_settings_are_refused_by_name(words, half, monkeypatch, changed, how):
    monkeypatch.chdir(half)
    before = files_below(half)
    with pytest.raises(UserError, match=changed[0].lstrip("-")):
        training.main(words("--max_epoch", "3", *changed, *how))
    assert files_below(half) == before, "a refused call changes nothing"


def test_what_may_change_takes_effect_and_is_said(words, half, capsys):
    training.main(words("--max_epoch", "3", "--lr_G", "0.01", "--resume", "true"))
    said = capsys.readouterr().err
    assert "changed lr_G: 0.001 -> 0.01" in said and "changed max_epoch: 2.0 -> 3.0" in said
    state = state_of(half)
    assert state["iter"] == 12
    assert state["optimizers"]["G"]["param_groups"][0]["lr"] == pytest.approx(0.01 * 0.9**3)
    config = json.loads((half / "logs/sprites__GlanceNet/x/run/config.json").read_text())
    assert config["lr_G"] == 0.01


@pytest.mark.parametrize("how", [["--resume", "auto"], ["--resume"], ["--ckpt_load", "ckpt/x/final"]])
def test_going_on_equals_the_unbroken_run(words, half, whole, monkeypatch, how):
    """The end of the second epoch was no test point of the longer run's own: only its tables may not differ."""
    monkeypatch.chdir(half)
    training.main(words("--max_epoch", "3", *how))
    same_as(whole, half)


def test_auto_starts_where_there_is_nothing(words, whole, tmp_path):
    training.main(words("--max_epoch", "3", "--resume", "auto"))
    same_as(whole, tmp_path)
    before = (tmp_path / "logs/sprites__GlanceNet/x/train_runs/metrics.csv").read_text()
    training.main(words("--max_epoch", "3", "--resume", "auto"))
    assert (tmp_path / "logs/sprites__GlanceNet/x/train_runs/metrics.csv").read_text() == before, "no rows twice"
    with pytest.raises(UserError, match="no checkpoint"):
        training.main(words("--name", "other", "--out_path", "other", "--resume"))


def test_auto_finds_the_log_that_the_date_named(command, tmp_path):
    first = training.main(command(tmp_path, *EXTRA, "--name", "x", "--max_iter", "2"))
    time.sleep(0.01)
    again = training.main(command(tmp_path, *EXTRA, "--name", "x", "--max_iter", "5", "--resume", "auto"))
    assert again == first and [row["iter"] for row in read_table(first / "train_runs/metrics.csv")] == ["2", "4", "5"]


def test_auto_finds_the_log_from_elsewhere_and_after_a_move(command, tmp_path, monkeypatch, capsys):
    """The log that a checkpoint belongs to is kept relative to it."""
    words = [word.replace(f"{tmp_path}/", "") for word in command(tmp_path, *EXTRA, "--name", "x")]
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    first = training.main([*words, "--max_iter", "2"])
    (tmp_path / "here").rename(tmp_path / "there")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    more = ["--ckpt_dir", "../there/ckpt", "--resume", "auto", "--max_iter"]
    again = training.main([*words, *more, "5"])
    assert again.resolve() == (tmp_path / "there" / first).resolve() and not (tmp_path / "elsewhere/logs").exists()
    assert [row["iter"] for row in read_table(again / "train_runs/metrics.csv")] == ["2", "4", "5"]
    shutil.rmtree(tmp_path / "there/logs")
    capsys.readouterr()
    assert (training.main([*words, *more, "6"])).is_relative_to("logs")
    assert "is gone; going on in logs/" in capsys.readouterr().err


def test_checkpoints_of_another_run_are_not_replaced_unasked(words, half):
    """A name used twice; the date gives the second run a log folder of its own."""
    again = [word for word in words("--max_iter", "1") if word not in ("--out_path", "x")]
    again[again.index("--name") :] = ["--name", "x", "--max_iter", "1"]
    before = files_below(half)
    for more in ([], ["--ckpt_load", str(half / "ckpt/x/last"), "--ckpt_load_iternum", "false"]):
        with pytest.raises(UserError, match="--resume auto goes on with it, --overwrite true replaces it"):
            training.main([*again, *more])
    training.main(words("--name", "y", "--out_path", "y", "--max_iter", "1"))
    with pytest.raises(UserError, match="ckpt/y already holds"):  # another run's place
        training.main(words("--name", "y", "--ckpt_load", str(half / "ckpt/x/last"), "--max_epoch", "3"))
    assert {k: v for k, v in files_below(half).items() if "/y/" not in k} == before
    (half / "ckpt/x/own.txt").write_text("mine")
    training.main([*again, "--overwrite", "true", "--warmup_epochs", "5"])
    assert state_of(half)["iter"] == 1 and not (half / "ckpt/x/best").exists(), "the replaced run's best is not its own"
    assert (half / "ckpt/x/own.txt").read_text() == "mine"


def test_a_goal_behind_the_checkpoint_is_refused(words, half):
    with pytest.raises(UserError, match="beyond --max_iter"):
        training.main(words("--max_epoch", "1", "--resume"))


def test_checkpoints_of_older_versions_go_on(words, half, whole):
    """They have no place, log and test point, and at the end of an epoch they still hold its sums."""
    for name in ("last", "final"):
        state = state_of(half, file=name)
        for key in ("place", "log", "log_place", "tested_at", "metrics_at"):
            del state[key]
        if name == "last":
            state |= {"epoch": 1, "epoch_sum": torch.tensor(123.0), "epoch_steps": 4}
        save_state(half / "ckpt/x" / name, KIND, **state)
    training.main(words("--max_epoch", "3", "--ckpt_load", str(half / "ckpt/x/last")))
    same_as(whole, half)


def test_a_kill_after_the_last_checkpoint_changes_nothing(words, tmp_path, whole, monkeypatch):
    def killed(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(training, "finish", killed)
    with pytest.raises(KeyboardInterrupt):
        training.main(words("--max_epoch", "3"))
    monkeypatch.undo()
    (tmp_path / "ckpt/x/final").unlink()  # a real kill may come before it is written
    training.main(words("--max_epoch", "3", "--resume", "auto"))
    same_as(whole, tmp_path)


@pytest.mark.parametrize("part", ["validate", "test", "rejection"])
def test_a_signal_in_an_evaluation_ends_with_130_and_loses_nothing(words, tmp_path, whole, monkeypatch, part):
    original, sent = getattr(Report, part), []

    def signalled(self, *arguments, **more):
        if not sent:
            sent.append(os.kill(os.getpid(), signal.SIGTERM))
        return original(self, *arguments, **more)

    monkeypatch.setattr(Report, part, signalled)
    assert run_inside(training.main, words("--max_epoch", "3")).code == 130
    monkeypatch.undo()
    assert not (tmp_path / "ckpt/x/model.safetensors").exists()
    assert run_inside(training.main, words("--max_epoch", "3", "--resume", "auto")).code == 0
    same_as(whole, tmp_path)


def test_a_second_process_is_refused(words, half):
    """The lock of the run folder, and that of the checkpoints when the logs differ; a lock belongs to a handle, so a
    second one in this process stands for another process.
    """
    o = training.parse(words("--max_epoch", "3", "--resume"))
    dist = training.Distributed.start("cpu")
    data, model = training.set_up(o, dist)
    with GlanceTraining(o, dist, model, len(data.train) // 32, 12):
        for more in ([], ["--out_path", "y", "--overwrite", "true"]):
            with pytest.raises(UserError, match=f"process {os.getpid()} is at work"):
                training.main(words("--max_epoch", "3", *more))
    assert not list(half.rglob(".lock"))


def test_weights_alone_start_a_run_of_other_settings(words, half):
    more = ["--ckpt_load", str(half / "ckpt/x/final"), "--ckpt_load_iternum", "false", "--ckpt_load_optim", "false"]
    training.main(words(*more, "--name", "y", "--out_path", "y", "--seed", "9", "--max_iter", "1", "--lr_G", "1e-9"))
    state, before = state_of(half, "y"), state_of(half)
    assert state["iter"] == 1 and state["options"]["seed"] == 9
    torch.testing.assert_close(state["model"]["prior.weight"], before["model"]["prior.weight"], rtol=0, atol=1e-6)


def test_a_stopped_run_stays_stopped(words, half):
    """The stopping rule's verdict is part of the state; --early_stopping false goes on."""
    for name in ("last", "final"):
        state = state_of(half, file=name)
        state["stopping"]["wait"] = 11
        save_state(half / "ckpt/x" / name, KIND, **state)
    training.main(words("--max_epoch", "3", "--resume", "auto"))
    assert state_of(half)["iter"] == 8
    training.main(words("--max_epoch", "3", "--resume", "auto", "--early_stopping", "false"))
    assert state_of(half)["iter"] == 12


def test_a_failing_metric_leaves_everything_else(words, tmp_path, monkeypatch):
    words = words("--max_iter", "2", "--evaluation_metric", "mig", "sap_score", "--metric_train", "60", "--metric_eval")
    measured = passes.disentanglement

    def failing(*arguments):
        yield next(measured(*arguments))
        raise UserError("sap_score cannot be measured")

    monkeypatch.setattr(passes, "disentanglement", failing)
    outcome = run_inside(training.main, [*words, "60"])
    monkeypatch.undo()
    assert outcome.code == 2 and "sap_score cannot be measured" in outcome.err
    log = tmp_path / "logs/sprites__GlanceNet/x"
    assert (log / "eval_results/mig/results/json/evaluation_results.json").is_file()
    assert len(read_table(log / "eval_results/test_metrics.csv")) == 1 and (log / "eval_results/passed.npy").is_file()
    assert state_of(tmp_path)["iter"] == 2 and state_of(tmp_path)["thresholds"]
    assert training.main([*words, "60", "--resume", "auto"]) == log
    assert (log / "eval_results/sap_score/results/json/evaluation_results.json").is_file()
    assert (tmp_path / "ckpt/x/model.safetensors").is_file()


def test_a_new_run_does_not_inherit_results(words, half):
    """--overwrite: metrics of the run before would be read as this one's."""
    log = half / "logs/sprites__GlanceNet/x/eval_results"
    folder = log / "dci/results/json"
    folder.mkdir(parents=True)
    (folder / "evaluation_results.json").write_text("{}")
    (log / "own_notes.txt").write_text("mine")
    training.main(words("--max_iter", "1", "--overwrite", "true"))
    assert not (folder / "evaluation_results.json").exists() and (log / "own_notes.txt").read_text() == "mine"


def test_a_test_with_other_settings_says_so(words, half, capsys):
    more = ["--test", "true", "--ckpt_load", str(half / "ckpt/x/final"), "--out_path", "t", "--seed", "5"]
    training.main(words("--max_epoch", "2", *more))
    assert "other settings than the training's: seed: 123 in the training, 5 here" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_one_line(words, half):
    state = state_of(half)
    shutil.rmtree(half / "ckpt/x")
    for broken in ({"rate": None}, {"stopping": {}}, {"model": None}, {"optimizers": {"G": {}, "PermD": {}}}):
        save_state(half / "ckpt/x/final", KIND, **state | broken)
        outcome = run_inside(training.main, words("--max_epoch", "3", "--resume"))
        assert outcome.code == 2 and len(outcome.err.strip().splitlines()) == 1, outcome.err
