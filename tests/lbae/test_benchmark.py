"""The benchmark runs, and both sides of what it compares agree (it checks that itself)."""

import json

import pytest

from lbae import benchmark, train


def test_every_case_is_timed(tmp_path):
    figures = tmp_path / "figures.json"
    small = ["--width", "2", "--batch-size", "3", "--repeat", "1", "--zsize", "40", "--codes", "6", "--rows", "500"]
    benchmark.main([*small, "--json", str(figures)])
    rows = json.loads(figures.read_text())["cases"]
    assert [row["case"].split(":")[0].split(",")[0] for row in rows] == [
        "mnist", "cifar10", "celeba", "hyperplanes", "directions of 6 codes", "3 paths of 10 steps",
        "3 paths of 10 steps",
    ]  # fmt: skip
    assert all(row["ratio"] > 0 for row in rows)
    assert all(row["gigaflop"] > 0 for row in rows[:3])


def test_a_step_of_another_loss_is_noticed(monkeypatch):
    losses = train.losses
    monkeypatch.setattr(train, "losses", lambda *a: {"loss": 1.001 * losses(*a)["loss"]})
    with pytest.raises(ArithmeticError, match="the published form's loss"):
        benchmark.main(["--cases", "mnist", "--width", "2", "--batch-size", "3", "--repeat", "1"])
