"""common.training by the toy paper: train, stop, kill, resume, two processes; what is refused before work starts."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
import toy_paper
from front import children

from common.checkpoint import load_state
from common.errors import NonFiniteError, UserError, run_command
from common.launch import Distributed, StopSignal
from common.training import FolderLock, Training

SCRIPT = Path(toy_paper.__file__)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of 87 steps that nothing disturbed."""
    folder = tmp_path_factory.mktemp("toy") / "whole"
    toy_paper.main(["--out", str(folder)])
    return folder


def toy(folder, *words):
    return run_command(lambda: toy_paper.main(["--out", str(folder), *words]))


def same_run(first, second):
    assert (first / "metrics.csv").read_bytes() == (second / "metrics.csv").read_bytes()
    one, two = (load_state(folder / "checkpoint.pt", "toy") for folder in (first, second))
    assert all(torch.equal(one["model"][key], two["model"][key]) for key in one["model"])
    assert one["place"] == two["place"]


def test_the_toy_paper_is_short():
    lines = SCRIPT.read_text().splitlines()
    assert sum(bool(line.strip()) for line in lines) <= 50


def test_resume_in_the_middle_of_an_epoch_equals_the_run_that_was_not_stopped(whole, tmp_path, monkeypatch):
    polls = []

    def stops(self):
        polls.append(1)
        return len(polls) == 40  # the eleventh step of the second epoch

    monkeypatch.setattr(StopSignal, "__bool__", stops)
    assert toy(tmp_path / "run") == 130
    monkeypatch.undo()
    place = load_state(tmp_path / "run" / "checkpoint.pt", "toy")["place"]
    assert place == {"step": 40, "epoch": 1, "images": 11 * 48}
    assert toy(tmp_path / "run", "--resume") == 0
    same_run(whole, tmp_path / "run")


def wait_for_its_first_line(process):
    """Until the process catches SIGTERM: the kernel ends one that the interpreter does not run yet."""
    status = Path(f"/proc/{process.pid}/status")
    bit = 1 << (signal.SIGTERM - 1)
    while not int(re.search(r"SigCgt:\s*(\w+)", status.read_text())[1], 16) & bit:
        assert process.poll() is None
        time.sleep(0.01)


def stopped(run, step, number, *words):
    """The toy paper in a process of its own, which gets the signal when that step has been logged: its exit code."""
    argv = ["--out", str(run), *words]
    return children.finish(children.start(children.train, "toy_paper", argv, str(run.parent), (step, number)), 120)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_it_starts_ends_with_130(tmp_path, number):
    command = [sys.executable, str(SCRIPT), "--out", str(tmp_path / "run"), "--epochs", "100000"]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    wait_for_its_first_line(process)
    time.sleep(0.3)
    process.send_signal(number)
    _, text = process.communicate(timeout=120)
    assert process.returncode == 130, text
    assert "Traceback" not in text


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_training_ends_with_130(tmp_path, number):
    assert stopped(tmp_path / "run", 40, number, "--epochs", "100000") == 130
    assert "Traceback" not in (tmp_path / "output.txt").read_text()


def test_auto_starts_where_there_is_nothing_and_goes_on_where_there_is(whole, tmp_path):
    assert toy(tmp_path / "run", "--resume", "auto", "--epochs", "1") == 0
    assert toy(tmp_path / "run", "--resume", "auto") == 0
    same_run(whole, tmp_path / "run")
    (tmp_path / "run" / "checkpoint.pt").unlink()  # killed before its first checkpoint
    assert toy(tmp_path / "run", "--resume", "auto") == 0
    same_run(whole, tmp_path / "run")


def test_kill_then_auto(whole, tmp_path):
    assert stopped(tmp_path / "run", 40, signal.SIGKILL, "--resume", "auto") == -signal.SIGKILL
    assert toy(tmp_path / "run", "--resume", "auto") == 0
    same_run(whole, tmp_path / "run")


def test_two_processes_make_the_losses_of_one(whole, tmp_path):
    children.train_together("toy_paper", ["--out", tmp_path / "run"], tmp_path)
    one, two = (
        [float(line.split(",")[1]) for line in (folder / "metrics.csv").read_text().splitlines()[1:]]
        for folder in (whole, tmp_path / "run")
    )
    torch.testing.assert_close(torch.tensor(one), torch.tensor(two), rtol=1e-5, atol=0)


def test_changed_settings_are_refused_by_name_and_nothing_is_written(whole, capsys):
    before = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    assert toy(whole, "--resume", "--batch-size", "24") == 2
    assert "batch_size (48 there, 24 here)" in capsys.readouterr().err
    assert toy(whole) == 2
    assert "already holds a run" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()} == before


def test_allowed_changes_take_effect_and_are_said(whole, tmp_path, capsys):
    checkpoint = tmp_path / "run" / "checkpoint.pt"
    assert toy(tmp_path / "run", "--epochs", "1") == 0
    early = load_state(checkpoint, "toy")["model"]
    assert toy(tmp_path / "run", "--resume", "--epochs", "2", "--lr", "1e-9") == 0
    assert "changed lr: 0.001 -> 1e-09" in capsys.readouterr().err
    assert json.loads((tmp_path / "run" / "config.json").read_text())["lr"] == 1e-9
    late = load_state(checkpoint, "toy")["model"]
    for key in early:  # 29 steps of at most about 1e-9 each
        torch.testing.assert_close(early[key], late[key], rtol=0, atol=1e-7)
    assert load_state(checkpoint, "toy")["place"]["step"] == 58


def test_nothing_to_resume_leaves_no_trace(tmp_path, capsys):
    assert toy(tmp_path / "new" / "run", "--resume") == 2
    assert "no checkpoint at" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_second_process_is_refused(tmp_path):
    lock = FolderLock(tmp_path / "run")
    with pytest.raises(UserError, match=f"process {os.getpid()} is at work in"):
        FolderLock(tmp_path / "run")
    lock.release()
    assert not (tmp_path / "run").exists()
    FolderLock(tmp_path / "run").release()


def test_a_loss_that_is_not_finite_keeps_the_state_before_the_step(tmp_path):
    config = toy_paper.Config(out=str(tmp_path / "run"))
    model = torch.nn.Linear(2, 1)

    class Numbers:
        batch_size = 4

        def __len__(self):
            return 3

        def epoch(self, epoch, start):
            yield from range(start, 3)

    with Training(config.out, "toy", config, Distributed.start("cpu"), tensorboard=False) as training:
        training.restore(model=model)
        with pytest.raises(NonFiniteError, match=r"loss is nan at step 2 .*crash\.pt"):
            for number in training.steps(Numbers(), epochs=1):
                training.check(torch.tensor(float("nan") if number == 1 else 1.0), model)
    state = load_state(tmp_path / "run" / "crash.pt", "toy")
    assert state["place"] == {"step": 1, "epoch": 0, "images": 4}
    assert not (tmp_path / "run" / "checkpoint.pt").exists()


def test_a_probe_times_steps_and_leaves_nothing_half_done(tmp_path, monkeypatch):
    monkeypatch.setenv("STRUCTURED_LATENTS_PROBE", str(tmp_path / "probe.json"))
    ticks = iter(range(1000))
    monkeypatch.setattr("common.training.time", type("Clock", (), {"monotonic": lambda: next(ticks)}))
    assert toy(tmp_path / "run", "--epochs", "100") == 130
    found = json.loads((tmp_path / "probe.json").read_text())
    assert found == {"seconds_a_step": 1, "steps": 2900} and next(ticks) == 25  # 24 steps, 20 of them counted
    assert not (tmp_path / "run/checkpoint.pt").exists()
    monkeypatch.setattr("common.training.PROBE_SECONDS", 4)  # slow steps: what a minute gave is enough
    assert toy(tmp_path / "run2") == 130 and next(ticks) < 40
    monkeypatch.setattr("common.training.PROBE_STEPS", 10**6)
    monkeypatch.setattr("common.training.PROBE_SECONDS", 10**6)
    assert toy(tmp_path / "run3", "--epochs", "1") == 130  # a training of fewer steps
    assert json.loads((tmp_path / "probe.json").read_text()) == {"seconds_a_step": 1, "steps": 29}
