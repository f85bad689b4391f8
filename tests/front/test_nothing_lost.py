"""Nothing already written is lost: SIGKILL at any moment of a save, a full disk at any file, a crash inside a row.

A full disk is a real one where a tmpfs can be mounted (root in a container). The trainers meet the file size limit of
their process, which the code takes for the same, and the writers get an injected ENOSPC. SIGTERM and Ctrl-C, and the
exit code 130 of each trainer, are in test_resume.py, where the resumed run is compared as well.

Would catch: a checkpoint written in place, a missing rename or fsync error, temporary files that pile up, a traceback
or a hang (TensorBoard's writer thread) on a full disk, rows cut in the middle.
Costs about 25 CPU seconds.
"""

import errno
import os
import random
import signal
import subprocess
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from front.children import finish, save_for_ever, start, train
from front.commands import PAPERS, output

from common import checkpoint, images
from common.checkpoint import append_text, atomic_write, load_state, load_weights, save_state, save_weights
from common.errors import UserError
from common.run import Board, Run


def test_sigkill_while_saving_leaves_a_loadable_file_and_no_litter(tmp_path):
    """32 children, each killed at a random moment of its saving: the state is whole each time.

    A child rewrites the state, the weights and a picture for ever, so nearly every kill is in the middle of a write.
    What it leaves behind goes with the next write of the same file: never more than one temporary file for each.
    """
    rng = random.Random(0)
    path, left = tmp_path / "state.pt", 0
    for number in range(32):
        before = path.stat().st_mtime_ns if path.exists() else 0
        child = start(save_for_ever, str(tmp_path), 1000 * number)
        until = time.monotonic() + 120
        while not path.exists() or path.stat().st_mtime_ns == before:  # it has saved once
            assert time.monotonic() < until and child.is_alive()
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.05))
        child.kill()
        assert finish(child) == -signal.SIGKILL
        state = load_state(path, "test")
        assert state["i"] >= 1000 * number
        assert torch.equal(state["x"], torch.full((50_000,), float(state["i"]))), "half of one, half of another"
        litter = [name.name.split(".")[1] for name in tmp_path.glob(".*.tmp")]
        assert len(litter) <= len(set(litter)) + ("weights" in litter), litter  # weights.json and weights.safetensors
        left += len(litter)
    assert left > 0, "no kill came in the middle of a write"
    tensors, config = load_weights(tmp_path / "weights.safetensors")
    assert config == {"width": 4} and len(set(tensors["x"].tolist())) == 1
    for _ in range(2):
        save_state(path, "test", x=torch.zeros(1))
        save_weights(tmp_path / "weights.safetensors", {"x": torch.zeros(1)}, {"width": 4})
        images.save_image(tmp_path / "picture.png", np.zeros((4, 4), np.uint8))
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "picture.png",
        "state.pt",
        "weights.json",
        "weights.safetensors",
    ]


def test_temporary_files_of_the_living_and_of_others_stay(tmp_path):
    host = checkpoint._host()
    mine = tmp_path / f".a.pt.{host}-{os.getpid()}-x1.tmp"
    elsewhere = tmp_path / f".a.pt.{'0' * 8 if host != '0' * 8 else '1' * 8}-{os.getpid()}-x2.tmp"
    foreign = tmp_path / ".a.pt.notes.tmp"
    for path in (mine, elsewhere, foreign):
        path.touch()
    save_state(tmp_path / "a.pt", "test", x=1)
    assert mine.exists() and elsewhere.exists() and foreign.exists()
    os.utime(elsewhere, (0, 0))  # a machine that has been silent for a day
    save_state(tmp_path / "a.pt", "test", x=1)
    assert mine.exists() and not elsewhere.exists() and foreign.exists()


WRITERS = {
    "state": lambda folder: save_state(folder / "file", "test", x=torch.zeros(1000)),
    "weights": lambda folder: save_weights(folder / "file.safetensors", {"x": torch.zeros(1000)}, {}),
    "json": lambda folder: checkpoint.write_json(folder / "file", list(range(1000))),
    "picture": lambda folder: images.save_image(folder / "file.png", np.zeros((64, 64), np.uint8)),
    "gif": lambda folder: images.save_gif(folder / "file.gif", np.zeros((2, 64, 64), np.uint8)),
}


@pytest.mark.parametrize("where", ["write", "fsync", "replace"])
@pytest.mark.parametrize("writer", WRITERS)
def test_no_space_in_any_call_keeps_the_old_file(tmp_path, monkeypatch, writer, where):
    WRITERS[writer](tmp_path)
    old = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    if where == "write":
        opened = os.fdopen

        class Full:
            """A file on a full disk."""

            def __init__(self, *arguments, **options):
                self.file = opened(*arguments, **options)

            write = flush = seek = full

            def tell(self):
                return 0

            def __enter__(self):
                return self

            def __exit__(self, *_):
                self.file.close()

        monkeypatch.setattr(checkpoint.os, "fdopen", Full)
    else:
        monkeypatch.setattr(checkpoint.os, where, full)
    with pytest.raises(UserError, match="the disk is full"):
        WRITERS[writer](tmp_path)
    monkeypatch.undo()
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == old


def test_rows_are_added_whole_or_not_at_all(tmp_path):
    """/dev/full refuses every byte; a resume drops the unfinished last line that a crash of the machine leaves."""
    with pytest.raises(UserError, match="the disk is full"):
        append_text("/dev/full", "1,2\n")
    (tmp_path / "tb").mkdir()
    board = Board(tmp_path / "tb")
    board._file.close()
    os.symlink("/dev/full", tmp_path / "full")
    from tensorboardX.record_writer import RecordWriter

    board._file = RecordWriter(str(tmp_path / "full"))
    with pytest.raises(UserError, match="the disk is full"):  # raised in the loop that logs, not in a thread
        for step in range(10_000):
            board.scalars({"loss": 0.5}, step)
    board.close()  # and only once
    with Run(tmp_path / "run", {}, tensorboard=False) as run:
        for step in (1, 2, 12):
            run.log(step, loss=0.1)
    path = tmp_path / "run" / "metrics.csv"
    path.write_bytes(path.read_bytes()[:-6])  # "1", of "12,0.1"
    assert path.read_text().endswith("\n1")
    Run(tmp_path / "run", {}, resume=True, resume_step=12, tensorboard=False).close()
    assert path.read_text() == "step,loss\n1,0.1\n2,0.1\n"


@pytest.mark.parametrize("paper", PAPERS)
def test_a_full_disk_stops_a_trainer_with_one_line(tmp_path, paper):
    """No file may grow beyond a few kilobytes: the first checkpoint, if not a table before it, does not fit."""
    code = finish(start(train, paper, PAPERS[paper].command(0), str(tmp_path), None, 6_000))
    errors = [line for line in output(tmp_path).splitlines() if line.startswith("error:")]
    assert code == 2, output(tmp_path)
    assert len(errors) == 1 and "the disk is full" in errors[0]
    assert "Traceback" not in output(tmp_path)
    assert not list(tmp_path.rglob(".*.tmp"))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 256 kB."""
    place = tmp_path / "disk"
    place.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(place)], capture_output=True)
    if made.returncode:
        pytest.skip("mounting a tmpfs needs root; the file size limit above stands in for it")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_really_full_disk_keeps_what_is_there(small_disk: Path):
    save_state(small_disk / "state.pt", "test", x=torch.ones(10_000))
    with Run(small_disk / "run", {}, tensorboard=False) as run:
        with pytest.raises(UserError, match=r"state\.pt: the disk is full .*older file is kept"):
            save_state(small_disk / "state.pt", "test", x=torch.ones(100_000))
        assert torch.equal(load_state(small_disk / "state.pt", "test")["x"], torch.ones(10_000))
        with pytest.raises(UserError, match="the disk is full"):
            for step in range(100_000):
                run.log(step, loss=1 / 3)
    text = (small_disk / "run" / "metrics.csv").read_text()
    assert text.endswith("\n") and len({line.count(",") for line in text.splitlines()}) == 1
    with pytest.raises(UserError, match="the disk is full"), atomic_write(small_disk / "other") as file:
        file.write(bytes(1 << 20))
    assert sorted(p.name for p in small_disk.iterdir()) == ["run", "state.pt"]
