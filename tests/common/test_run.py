import csv
import sys

import numpy as np
import pytest
import torch

from common.errors import UserError
from common.run import Run


def rows(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_rows_columns_grow_and_config_is_stored(tmp_path):
    with Run(tmp_path / "r", {"lr": 0.1}) as run:
        run.log(1, loss=torch.tensor(2.5))
        run.log(2, loss=np.float64(0.1), accuracy=1)
        run.info("hello")
        run.image("picture", torch.zeros(3, 4, 4, dtype=torch.uint8), 2)
    assert rows(tmp_path / "r") == [
        {"step": "1", "loss": "2.5", "accuracy": ""},
        {"step": "2", "loss": "0.1", "accuracy": "1"},
    ]
    assert '"lr": 0.1' in (tmp_path / "r" / "config.json").read_text()
    assert "hello" in (tmp_path / "r" / "log.txt").read_text()
    assert list((tmp_path / "r" / "tb").glob("events*"))


def test_resume_drops_later_rows_and_goes_on(tmp_path):
    with Run(tmp_path, {}, tensorboard=False) as run:
        for step in (1, 2, 3, 4):
            run.log(step, loss=float(step))
    with Run(tmp_path, {}, resume=True, resume_step=2, tensorboard=False) as run:
        run.log(3, loss=33.0)
    assert [(row["step"], row["loss"]) for row in rows(tmp_path)] == [("1", "1.0"), ("2", "2.0"), ("3", "33.0")]


def test_an_old_run_is_not_overwritten_unless_told(tmp_path):
    with Run(tmp_path, {}, tensorboard=False) as run:
        run.log(1, loss=1.0)
    with pytest.raises(UserError, match="already holds a run"):
        Run(tmp_path, {}, tensorboard=False)
    assert len(rows(tmp_path)) == 1
    Run(tmp_path, {}, overwrite=True, tensorboard=False).close()
    assert rows(tmp_path) == []


def test_foreign_metrics_file_is_kept(tmp_path):
    (tmp_path / "metrics.csv").write_text("a,b\n1,2\n")
    with pytest.raises(UserError, match="not a metrics file"):
        Run(tmp_path, {}, resume=True, tensorboard=False)
    assert (tmp_path / "metrics.csv").read_text() == "a,b\n1,2\n"


def test_other_ranks_write_nothing(tmp_path):
    with Run(tmp_path / "r", {}, enabled=False) as run:
        run.log(1, loss=1.0)
        run.info("quiet")
    assert not (tmp_path / "r").exists()


def test_only_numbers_are_logged_and_progress_passes_items_through(tmp_path):
    with Run(tmp_path, {}, tensorboard=False) as run:
        with pytest.raises(TypeError, match="expected a number"):
            run.log(1, loss="low")
        assert list(run.progress([1, 2, 3])) == [1, 2, 3]


def test_wandb_is_imported_only_when_asked(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)  # importing it now raises ImportError
    Run(tmp_path / "without", {}, tensorboard=False).close()
    with pytest.raises(UserError, match="wandb was asked for but is not installed"):
        Run(tmp_path / "with", {}, wandb="project", tensorboard=False)
