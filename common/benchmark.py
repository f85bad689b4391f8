"""What the five papers' benchmarks share: the published form and ours in turns, and how near ours is to the machine.

A paper's `benchmark.py` builds its cases and hands them to `run_cases`. Seconds are CPU seconds of the process (all
threads together), which other load changes least; on a GPU seconds on the clock, with its queue drained. The share of
the peak is the step's floating point operations a second over those of the best matrix product of this run.
"""

import json
import platform
import time
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import torch
import torch.nn.functional as F
from pydantic import Field
from torch.utils.flop_counter import FlopCounterMode

from common.errors import UserError
from common.launch import full_precision, keep_freed_memory, pick_device
from common.options import Device, Options, option

Step = Callable[[], Any]
SPAN = 0.1  # seconds


class BenchmarkOptions(Options):
    """The options that all five benchmarks have."""

    batch_size: Annotated[int, Field(ge=1, le=100_000)] | None = option(None, "images a step (default: as published)")
    threads: Annotated[int, Field(ge=1, le=1024)] = option(torch.get_num_threads(), "CPU threads")
    repeat: Annotated[int, Field(ge=1, le=100_000)] = option(5, "timed rounds; the least time counts")
    amp: bool = option(False, "our side in bfloat16 autocast")
    cuda_graph: bool = option(False, "our training steps as CUDA graphs")
    figures: str | None = option(None, "JSON file for the figures", flags=("--json",))
    device: Device = option("cpu", "device")
    dry_run: bool = option(False, "check the options, print them as JSON and leave")


class Case(NamedTuple):
    """One thing timed twice. A step that returns its loss is compared with the other's: `rtol` (None: not)."""

    name: str
    published: Step | None
    ours: Step
    rtol: float | None = 1e-4


def start(options: BenchmarkOptions) -> torch.device:
    """Set threads, float32 and the allocator as the training scripts do; returns the device."""
    torch.set_num_threads(options.threads)
    full_precision()
    keep_freed_memory()
    return pick_device(options.device)


def seconds(work: Step, device: torch.device) -> float:
    """Time of one call, over as many as take `SPAN`: CPU seconds of the process, or the clock's on a GPU.

    Linux adds what another thread computes to the CPU time of the process at its ticks, 1 to 10 ms apart: one call
    shorter than that would seem to cost what its first thread does.
    """
    clock = time.process_time
    if device.type != "cpu":
        clock = time.perf_counter
        torch.accelerator.synchronize(device)
    calls, began, start = 0, time.perf_counter(), clock()
    while not calls or time.perf_counter() - began < SPAN:
        work()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        calls += 1
    return (clock() - start) / calls


def peak_flops(device: torch.device, dtype: torch.dtype, repeat: int = 3) -> float:
    """Floating point operations a second of the fastest square matrix product of 512, 1024 and 2048 rows.

    Each product is also computed as a 1x1 convolution: on a CPU that is another library, which may be twice as fast.
    """
    best = 0.0
    for n in (512, 1024, 2048):
        a, b = torch.randn(2, n, n, dtype=dtype, device=device)
        images, kernel = a.view(16, n // 16, 1, n).movedim(3, 1), b[:, :, None, None]  # fewer: no oneDNN
        for product in (partial(F.linear, a, b), partial(F.conv2d, images, kernel)):
            product()
            best = max(best, 2 * n**3 / min(seconds(product, device) for _ in range(repeat)))
    return best


def count_flops(step: Step) -> int:
    """Floating point operations of the matrix products and convolutions of one call, forward and backward."""
    with FlopCounterMode(display=False) as counter:
        step()
    return counter.get_total_flops()


def agree(case: Case) -> None:
    """The warm-up call of both sides; raises ArithmeticError where their losses differ."""
    ours = case.ours()
    theirs = case.published() if case.published is not None else None
    if case.rtol is not None and ours is not None and theirs is not None:
        theirs, ours = float(theirs), float(ours)
        if not abs(ours - theirs) <= case.rtol * abs(theirs):
            raise ArithmeticError(f"{case.name}: the published form's loss is {theirs:.8g}, ours {ours:.8g}")


def run_case(case: Case, device: torch.device, repeat: int, peak: float) -> dict[str, Any]:
    """Both sides in turns: seconds (least of `repeat`), their ratio, operations and the share of the peak."""
    agree(case)
    flops = count_flops(case.ours)  # before a step is a CUDA graph, which no longer says what it does
    theirs, ours = [], []
    for _ in range(repeat):
        if case.published is not None:
            theirs.append(seconds(case.published, device))
        ours.append(seconds(case.ours, device))
    return {
        "case": case.name,
        "published_seconds": min(theirs, default=None),
        "seconds": min(ours),
        "ratio": min(theirs) / min(ours) if theirs else None,
        "gigaflop": flops / 1e9,
        "peak_share": flops / min(ours) / peak if flops else None,
    }


def run_cases(options: BenchmarkOptions, cases: Iterable[Callable[[torch.device], Case]]) -> list[dict[str, Any]]:
    """Make and time one case after the other, print a line each, and write `options.figures`.

    Each element of `cases` builds its case on the device when its turn comes, so that one model lives at a time.
    """
    device = start(options)
    if options.figures:
        try:  # before minutes are spent
            Path(options.figures).open("a").close()
        except OSError as error:
            raise UserError(f"--json {options.figures}: cannot be written ({error.strerror})") from None
    peak = peak_flops(device, torch.bfloat16 if options.amp else torch.float32)
    machine = torch.cuda.get_device_name(device) if device.type == "cuda" else processor()
    kind = "bfloat16" if options.amp else "float32"
    print(f"{machine}, {options.threads} thread(s), matrix products {peak / 1e9:.0f} GFLOP/s in {kind}", flush=True)
    print(f"{'case':<44} {'published (s)':>13} {'ours (s)':>10} {'ratio':>6} {'GFLOP':>9} {'of peak':>8}", flush=True)
    rows = []
    for make in cases:
        row = run_case(make(device), device, options.repeat, peak)
        rows.append(row)
        theirs = "-" if row["ratio"] is None else f"{row['published_seconds']:.4f}"
        ratio = "-" if row["ratio"] is None else f"{row['ratio']:.2f}"
        share = "-" if row["peak_share"] is None else f"{row['peak_share']:.0%}"
        print(
            f"{row['case']:<44} {theirs:>13} {row['seconds']:>10.4f} {ratio:>6} {row['gigaflop']:>9.2f} {share:>8}",
            flush=True,
        )
    if options.figures:
        record = {
            "machine": machine, "threads": options.threads, "torch": torch.__version__, "amp": options.amp,
            "peak_gigaflops": peak / 1e9, "cases": rows,
        }  # fmt: skip
        Path(options.figures).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    return rows


def processor() -> str:
    """The CPU's name."""
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
