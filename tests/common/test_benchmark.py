"""The frame of the five benchmarks: turns, equal losses, operations, the file of figures."""

import json

import pytest
import torch

from common import benchmark
from common.benchmark import BenchmarkOptions, Case, count_flops, peak_flops, run_case, run_cases, seconds
from common.errors import UserError
from common.options import from_flags

CPU = torch.device("cpu")


def test_both_sides_take_turns_after_one_call_each(monkeypatch):
    monkeypatch.setattr(benchmark, "SPAN", 0.0)
    calls = []
    run_case(Case("turns", lambda: calls.append("theirs"), lambda: calls.append("ours")), CPU, 2, 1.0)
    assert calls == ["ours", "theirs", "ours", *["theirs", "ours"] * 2]  # warm-up, the count of operations, two rounds


def test_calls_shorter_than_a_tick_of_the_cpu_clock_are_timed(monkeypatch):
    now = [0.0]

    def work():
        now[0] += 0.0011

    monkeypatch.setattr(benchmark.time, "perf_counter", lambda: now[0])
    monkeypatch.setattr(benchmark.time, "process_time", lambda: now[0] // 0.004 * 0.004)
    assert seconds(work, CPU) == pytest.approx(0.0011, rel=0.05)
    now[0] = 0.0

    def slow():
        now[0] += 2.0

    assert seconds(slow, CPU) == pytest.approx(2.0, abs=0.005)
    assert now[0] == 2.0  # one call where that is long enough


@pytest.mark.parametrize("faster", [2, 4])
def test_the_peak_is_that_of_the_faster_of_two_libraries(monkeypatch, faster):
    products = []

    def of_one(work, device):
        products.append(work())
        return 0.25 if products[-1].ndim == faster else 1.0

    monkeypatch.setattr(benchmark, "seconds", of_one)
    assert peak_flops(CPU, torch.float32, repeat=1) == 2 * 2048**3 / 0.25
    for matrix, images in zip(products[::2], products[1::2], strict=True):
        assert torch.allclose(images.movedim(1, 3).flatten(0, 2), matrix, atol=1e-3)


def test_losses_that_differ_are_an_error():
    run_case(Case("same", lambda: torch.tensor(2.0), lambda: torch.tensor(2.0001)), CPU, 1, 1.0)
    with pytest.raises(ArithmeticError, match=r"loss is 2, ours 2\.00"):
        run_case(Case("other", lambda: torch.tensor(2.0), lambda: torch.tensor(2.001)), CPU, 1, 1.0)
    with pytest.raises(ArithmeticError, match="nan"):
        run_case(Case("nan", lambda: torch.tensor(2.0), lambda: torch.tensor(float("nan"))), CPU, 1, 1.0)


def test_operations_and_share_of_the_peak():
    a = torch.randn(30, 40, requires_grad=True)
    b = torch.randn(40, 50, requires_grad=True)
    assert count_flops(lambda: (a @ b).sum().backward()) == 3 * 2 * 30 * 40 * 50
    row = run_case(Case("product", None, lambda: a @ b), CPU, 3, 5e9)
    assert row["ratio"] is None
    assert row["peak_share"] == pytest.approx(2 * 30 * 40 * 50 / row["seconds"] / 5e9)
    assert peak_flops(CPU, torch.float32) > 1e8


def test_figures_are_printed_and_written(tmp_path, capsys):
    options, _ = from_flags(
        BenchmarkOptions, ["--json", str(tmp_path / "x.json"), "--repeat", "1", "--threads", "1"], ""
    )
    x = torch.randn(64, 64)
    made = []

    def case(device):
        made.append(device)
        return Case("square", lambda: x @ x + 0, lambda: x @ x, rtol=None)

    run_cases(options, [case])
    record = json.loads((tmp_path / "x.json").read_text())
    assert made == [CPU]
    assert record["threads"] == 1
    [row] = record["cases"]
    assert row["ratio"] == row["published_seconds"] / row["seconds"]
    assert row["gigaflop"] == pytest.approx(2 * 64**3 / 1e9)
    assert "square" in capsys.readouterr().out
    with pytest.raises(UserError, match="--json"):  # before anything is timed
        run_cases(options.with_changes(figures=str(tmp_path)), [case])
    assert made == [CPU]
