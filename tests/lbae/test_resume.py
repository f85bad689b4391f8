"""Resuming: what may change and what not, `resume=auto`, reload=best, the folder's lock, places in the data."""

import csv
import json
import os
import shutil
import signal
import threading
import time
from pathlib import Path

import pytest
import torch

from common.checkpoint import load_state, save_state
from common.errors import UserError
from common.training import FolderLock
from lbae import mnist
from lbae.experiment import Latents, read_checkpoint

KEYS = {"dataset": "digits", "width": 2, "zsize": 16, "batch_size": 32, "batch_size_test": 64, "lr": 1e-2,
        "dec_in_channels": 4, "device": "cpu", "train_images": 384, "test_images": 40, "tensorboard": 0}  # fmt: skip
TINY = [f"{key}={value}" for key, value in KEYS.items()]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def losses(folder: Path) -> list[str]:
    with open(folder / "metrics.csv", newline="") as file:
        return [row["losses/Train_loss"] for row in csv.DictReader(file) if row["losses/Train_loss"]]


@pytest.fixture(scope="module")
def stopped(tmp_path_factory) -> Path:
    """Stopped by SIGTERM in the middle of the second of three epochs."""
    folder, pid = tmp_path_factory.mktemp("stopped") / "exp", os.getpid()

    def stop():
        while not (folder / "metrics.csv").exists() or len((folder / "metrics.csv").read_text().split("\n")) < 18:
            time.sleep(0.001)
        os.kill(pid, signal.SIGTERM)

    thread = threading.Thread(target=stop)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        mnist.main([*TINY, "epochs_max=3", f"exp={folder}"])
    thread.join()
    assert read_checkpoint(folder / "models/last.cp")["batch"] > 0
    return folder


@pytest.fixture
def copy(stopped, tmp_path) -> Path:
    return Path(shutil.copytree(stopped, tmp_path / "exp"))


@pytest.mark.parametrize(
    "word", ["batch_size=64", "train_images=200", "zround=1", "zsize=8", "seed=1", "l2=0.1", "width=4", "amp=bf16",
             "test_images=20", "dataset=sprites", "binary_reco_loss=0", "deterministic=1"],
)  # fmt: skip
def test_another_setting_is_refused_by_name_and_nothing_is_written(copy, word):
    before = contents(copy)
    with pytest.raises(UserError, match=f"other settings: {word.split('=')[0]} "):
        mnist.main(["l", f"exp={copy}", "device=cpu", word])
    assert contents(copy) == before


def test_a_refused_call_leaves_a_plain_resume_as_it_was(copy, stopped, tmp_path):
    with pytest.raises(UserError):
        mnist.main(["l", f"exp={copy}", "device=cpu", "batch_size=48"])
    whole = tmp_path / "whole"
    mnist.main([*TINY, "epochs_max=3", f"exp={whole}"])
    mnist.main(["l", f"exp={copy}", "device=cpu"])
    assert losses(copy) == losses(whole)
    assert len(Latents.load(copy / "latents-last.npz").codes) == 384
    one, two = (read_checkpoint(folder / "models/last.cp") for folder in (copy, whole))
    assert all(torch.equal(value, two["gen"][key]) for key, value in one["gen"].items())


def test_what_may_change_takes_effect_and_is_printed(copy, capfd):
    mnist.main(["l", f"exp={copy}", "device=cpu", "lr=0.002", "epochs_max=2", "print_every_batch=7", "workers=0"])
    printed = capfd.readouterr().err
    for line in ("changed lr: 0.01 -> 0.002", "changed epochs_max: 3 -> 2", "changed print_every_batch: 100 -> 7"):
        assert line in printed
    state = read_checkpoint(copy / "models/last.cp")
    assert state["optimizer"]["param_groups"][0]["lr"] == 0.002
    assert json.loads((copy / "config.json").read_text())["lr"] == 0.002
    assert state["config"]["batch_size"] == 32  # not given here: from the experiment
    with pytest.raises(UserError, match="epochs_max=1, but 2 epochs are done"):
        mnist.main(["l", f"exp={copy}", "device=cpu", "epochs_max=1"])
    assert json.loads((copy / "config.json").read_text())["epochs_max"] == 2


def test_auto_starts_goes_on_and_refuses(tmp_path):
    folder = tmp_path / "exp"
    run = [*TINY, f"exp={folder}", "resume=auto"]
    mnist.main([*run, "epochs_max=1"])
    assert len(losses(folder)) == 12
    mnist.main([*run, "epochs_max=2"])
    assert len(losses(folder)) == 24
    mnist.main([*run, "epochs_max=2"])  # nothing is left to do
    assert len(losses(folder)) == 24
    with pytest.raises(UserError, match="other settings: zsize"):
        mnist.main([*run, "epochs_max=3", "zsize=5"])
    shutil.rmtree(folder / "models")  # killed before its first checkpoint
    with pytest.raises(UserError, match="other settings: zsize"):
        mnist.main([*run, "epochs_max=1", "zsize=5"])
    mnist.main([*run, "epochs_max=1"])
    assert len(losses(folder)) == 12


def test_a_folder_at_work_is_locked(copy):
    before, lock = contents(copy), FolderLock(copy)
    try:
        with pytest.raises(UserError, match=f"process {os.getpid()} is at work"):
            mnist.main(["l", f"exp={copy}", "device=cpu"])
    finally:
        lock.release()
    assert contents(copy) == before


def test_the_best_epoch_is_evaluated_and_sampled_from(tmp_path, capsys):
    folder = tmp_path / "exp"
    mnist.main([*TINY, f"exp={folder}", "epochs_max=2"])
    state = load_state(folder / "models/weights-0.cp", "lbae")  # let the first epoch be the best
    save_state(folder / "models/best.cp", "lbae", **state)
    latents = Latents.load(folder / "latents-last.npz")
    latents.epoch, latents.iter = state["epoch"], state["iter"]
    latents.save(folder / "latents.npz")
    mnist.main(["eval", "reload=best", f"exp={folder}", "device=cpu"])
    best = float((folder / "fid-epoch.txt").read_text().split("loss_eval:")[1])
    assert best == pytest.approx(state["loss_eval"])
    capsys.readouterr()
    mnist.main(["eval", "gen", "reload=best", f"exp={folder}", "device=cpu", "gen_imgs=3"])
    assert "warning" not in capsys.readouterr().out  # the codes of that epoch
    (folder / "models/best.cp").unlink()  # what a user keeps: the small file alone
    mnist.main(["eval", "reload=best", f"exp={folder}", "device=cpu"])
    tokens = dict(token.split(":") for token in (folder / "fid-epoch.txt").read_text().split())
    assert tokens["e"] == "1"
    assert float(tokens["loss_eval"]) == pytest.approx(
        read_checkpoint(folder / "models/best.safetensors")["loss_eval"], rel=1e-6
    )


def test_an_older_folder_goes_on(copy, stopped, tmp_path):
    """Checkpoints that name the next batch instead of images, configurations in log/."""
    state = load_state(copy / "models/last.cp", "lbae")
    place = state.pop("place")
    assert (place["epoch"], place["images"]) == (state["epoch"] + 1, 32 * state["batch"])
    del state["extra"]
    state["config"]["amp"] = "off"
    save_state(copy / "models/last.cp", "lbae", **state)
    (copy / "config.json").rename(copy / "log/cfg-0-0.json")
    mnist.main(["l", f"exp={copy}", "device=cpu"])
    newer = tmp_path / "newer"
    shutil.copytree(stopped, newer)
    mnist.main(["l", f"exp={newer}", "device=cpu"])
    assert losses(copy) == losses(newer)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("epoch", "1"),
        ("iter", None),
        ("codes", [1]),
        ("batch", 1.5),
        ("enc", []),
        ("best", "x"),
        ("place", {"step": 1}),
        ("config", []),
    ],
)
def test_a_mutated_checkpoint_is_one_line(copy, stopped, key, value):
    state = load_state(copy / "models/last.cp", "lbae")
    save_state(copy / "models/last.cp", "lbae", **{**state, key: value})
    for name in ("last.cp", "best.cp"):  # the best loss is in the latter
        before = contents(copy)
        with pytest.raises(UserError, match=rf"{name} is damaged"):
            mnist.main(["l", f"exp={copy}", "device=cpu", "lr=0.5"])
        assert contents(copy) == before
        good = stopped / "models"
        shutil.copy(good / "last.cp", copy / "models/last.cp")
        save_state(copy / "models/best.cp", "lbae", **{**state, key: value})
