"""Time and memory of the inverse convolution against `torch.nn.functional.conv2d` of the same shape.

    python -m inv_flow.utils.inv_conv_cuda.benchmark     # CPU with 1 and with all threads; GPU if present
    python -m inv_flow.utils.inv_conv_cuda.benchmark --device cpu --threads 1 --json bench.json
    python -m inv_flow.utils.inv_conv_cuda.benchmark --shape 100,12,16,16,3 --repeats 50

What is compared runs in turns in one process, so that a busy machine slows all of it alike; a time is the median over
the rounds, in milliseconds, and a ratio is our median over conv2d's. conv2d has padding k // 2 and no bias. Backward
makes the gradients of the image and of the kernel. On a GPU, times come from CUDA events; "graph" replays a captured
CUDA graph, so it has no launch cost. Memory is what the allocator holds at most in forward + backward beyond the
inputs, the output and the gradients, in units of one activation (B, C, H, W); on the CPU the solver's scratch memory,
kept a thread, is listed apart.
"""

import argparse
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from common.benchmark import processor
from common.errors import UserError, run_command
from inv_flow.utils.inv_conv_cuda import extension
from inv_flow.utils.inv_conv_cuda.ops import available_backends, choose_backend, inverse_conv2d

SHAPES = (
    (100, 4, 14, 14, 3),
    (100, 12, 16, 16, 3),
    (100, 12, 16, 16, 5),
    (100, 24, 8, 8, 3),
    (100, 48, 4, 4, 3),
    (64, 12, 32, 32, 3),
    (16, 12, 32, 32, 3),
    (1, 12, 32, 32, 3),
    (32, 12, 64, 64, 3),
    (64, 48, 16, 16, 3),
    (8, 48, 64, 64, 3),
)

Run = Callable[[], object]


def shape(text: str) -> tuple[int, ...]:
    """B,C,H,W,k from the command line."""
    try:
        numbers = tuple(int(part) for part in text.split(","))
    except ValueError:
        numbers = ()
    if len(numbers) != 5 or min(numbers) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not B,C,H,W,k, five positive integers")
    return numbers


class Case:
    """Tensors of one shape, and what is timed on them."""

    def __init__(self, sizes: tuple[int, ...], device: torch.device):
        batch, channels, height, width, k = sizes
        generator = torch.Generator().manual_seed(0)
        self.k = k
        self.image = torch.randn(batch, channels, height, width, generator=generator).to(device).requires_grad_()
        self.kernel = (0.01 * torch.randn(channels, channels, k, k, generator=generator)).to(device).requires_grad_()
        self.cotangent = torch.randn(batch, channels, height, width, generator=generator).to(device)

    def conv(self) -> Tensor:
        return F.conv2d(self.image, self.kernel, padding=self.k // 2)

    def ours(self) -> Tensor:
        return inverse_conv2d(self.image, self.kernel)

    def plain(self) -> Tensor:
        # the operator of the `torch` backend itself: INV_CONV_BACKEND chooses for the whole process
        return torch.ops.inv_conv.solve_torch(self.image, self.kernel, [0], 1, False)

    def forward(self, function: Callable[[], Tensor]) -> Run:
        def run() -> None:
            with torch.no_grad():
                function()

        return run

    def both(self, function: Callable[[], Tensor]) -> Run:
        def run() -> None:
            x = function()
            # padding k // 2 enlarges the image when k is even
            torch.autograd.grad(x, (self.image, self.kernel), self.cotangent if x.shape == self.cotangent.shape else x)

        return run

    def runs(self) -> dict[str, Run]:
        return {
            "conv2d": self.forward(self.conv),
            "solve": self.forward(self.ours),
            "torch": self.forward(self.plain),
            "conv2d+backward": self.both(self.conv),
            "solve+backward": self.both(self.ours),
        }


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
STATISTICS = {"median": statistics.median, "min": min}


def time_cpu(runs: dict[str, Run], args: argparse.Namespace) -> dict[str, float]:
    """Seconds of each run, in turns, for `--repeats` rounds or until `--budget` seconds are spent (at least 5)."""
    clock = CLOCKS[args.clock]
    for run in runs.values():
        run()
        run()
    spent: dict[str, list[float]] = {name: [] for name in runs}
    began = time.perf_counter()
    for done in range(args.repeats):
        if done >= 5 and time.perf_counter() - began > args.budget:
            break
        for name, run in runs.items():
            start = clock()
            run()
            spent[name].append(clock() - start)
    return {name: STATISTICS[args.statistic](times) for name, times in spent.items()}


def time_cuda(runs: dict[str, Run], args: argparse.Namespace) -> dict[str, float]:
    """Seconds of each run by CUDA events, in turns."""
    for run in runs.values():
        for _ in range(3):
            run()
    events = {name: [] for name in runs}
    for _ in range(args.repeats):
        for name, run in runs.items():
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            run()
            end.record()
            events[name].append((start, end))
    torch.cuda.synchronize()
    statistic = STATISTICS[args.statistic]
    return {name: statistic(a.elapsed_time(b) for a, b in pairs) / 1e3 for name, pairs in events.items()}


def capture(run: Run, inside: int = 10) -> Run:
    """`inside` runs captured in one CUDA graph, so that the replay's own launch does not count."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(inside):
            run()
    return graph.replay


def extra_memory_cpu(run: Run) -> int:
    """Most bytes that the allocator held during `run` beyond what it held before."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        run()
    held = most = 0
    changes = [event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    for event in sorted(changes, key=lambda event: event.start_ns()):
        held += event.nbytes()
        most = max(most, held)
    return most


def extra_memory_cuda(run: Run) -> int:
    """The same on a GPU."""
    run()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - before


def activations_beyond_results(case: Case, held: int) -> float:
    """Memory of forward + backward without its results (the output and the two gradients), in activations."""
    activation = case.image.numel() * case.image.element_size()
    results = 2 * activation + case.kernel.numel() * case.kernel.element_size()
    return (held - results) / activation


def geometric_mean(values: list[float]) -> float:
    return math.exp(statistics.fmean(math.log(value) for value in values))


def measure(sizes: tuple[int, ...], device: torch.device, args: argparse.Namespace) -> dict[str, float]:
    """All figures of one shape: milliseconds, ratios to conv2d, and memory in activations."""
    case = Case(sizes, device)
    runs = case.runs()
    if device.type == "cuda":
        seconds = time_cuda(runs, args)
        inside = 10
        graphs = {name: capture(runs[name], inside) for name in ("conv2d", "solve")}
        replayed = time_cuda(graphs, args)
        seconds |= {f"{name} graph": value / inside for name, value in replayed.items()}
        held = {name: extra_memory_cuda(runs[name]) for name in ("conv2d+backward", "solve+backward")}
    else:
        seconds = time_cpu(runs, args)
        held = {name: extra_memory_cpu(runs[name]) for name in ("conv2d+backward", "solve+backward")}
    row = {f"{name} ms": 1e3 * value for name, value in seconds.items()}
    row["ratio"] = seconds["solve"] / seconds["conv2d"]
    row["ratio+backward"] = seconds["solve+backward"] / seconds["conv2d+backward"]
    row["ratio torch"] = seconds["torch"] / seconds["conv2d"]
    if "solve graph" in seconds:
        row["ratio graph"] = seconds["solve graph"] / seconds["conv2d graph"]
    row["memory"] = activations_beyond_results(case, held["solve+backward"])
    row["memory conv2d"] = activations_beyond_results(case, held["conv2d+backward"])
    return row


def print_table(rows: list[dict]) -> dict[str, float]:
    """Print all figures; returns the geometric mean over the shapes of each ratio."""
    names = [name for name in rows[0] if name != "shape"]
    print("| B,C,H,W,k | " + " | ".join(names) + " |")
    print("|---" * (len(names) + 1) + "|")
    for row in rows:
        cells = [f"{row[name]:.3f}" if name.endswith("ms") else f"{row[name]:.2f}" for name in names]
        print(f"| {row['shape']} | " + " | ".join(cells) + " |")
    means = {}
    for name in names:
        if name.startswith("ratio"):
            values = [row[name] for row in rows]
            means[name] = geometric_mean(values)
            print(f"{name}: geometric mean {means[name]:.2f}, largest {max(values):.2f}")
    return means


def settings(device: str, threads: list[int] | None) -> list[tuple[torch.device, int]]:
    """(device, threads) to measure."""
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: this torch sees no CUDA device; use --device cpu")
    found = []
    if device in ("auto", "cpu"):
        everyone = torch.get_num_threads()
        found += [(torch.device("cpu"), count) for count in threads or sorted({1, everyone})]
    if device in ("auto", "cuda") and torch.cuda.is_available():
        found.append((torch.device("cuda"), torch.get_num_threads()))
    return found


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m inv_flow.utils.inv_conv_cuda.benchmark",
        description=__doc__.split("\n\n")[0],
        allow_abbrev=False,
    )
    parser.add_argument(
        "--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: CPU, and GPU if present"
    )
    parser.add_argument("--threads", type=int, nargs="+", help="CPU threads to measure with (default: 1, and all)")
    parser.add_argument("--shape", type=shape, action="append", metavar="B,C,H,W,k", help="default: the eleven shapes")
    parser.add_argument("--repeats", type=int, default=50, help="rounds, at most (default %(default)s)")
    parser.add_argument("--budget", type=float, default=8.0, help="seconds a shape on the CPU (default %(default)s)")
    parser.add_argument(
        "--statistic", choices=sorted(STATISTICS), default="median", help="over the rounds (default %(default)s)"
    )
    parser.add_argument(
        "--clock",
        choices=sorted(CLOCKS),
        default="wall",
        help="cpu: processor time of this process instead of elapsed time; for one thread on a busy machine",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures to FILE")
    args = parser.parse_args(argv)
    if args.repeats < 1 or (args.threads and min(args.threads) < 1):
        parser.error("--repeats and --threads must be at least 1")

    machine = {
        "torch": torch.__version__,
        "cpu": processor(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "compiled op": extension.load().description,
    }
    report = {"machine": machine, "clock": args.clock, "statistic": args.statistic, "settings": []}
    print(", ".join(f"{name}: {value}" for name, value in machine.items() if value))
    before = torch.get_num_threads()
    try:
        for device, threads in settings(args.device, args.threads):
            torch.set_num_threads(threads)
            backend = choose_backend(device.type)
            print(f"\n{device.type}, backend {backend} of {available_backends(device)}, {threads} thread(s)")
            rows = []
            for sizes in args.shape or SHAPES:
                row = {"shape": ",".join(map(str, sizes)), **measure(sizes, device, args)}
                rows.append(row)
                print(f"  {row['shape']}: {row['ratio']:.2f} of conv2d", file=sys.stderr, flush=True)
            means = print_table(rows)
            if backend == "cpu":
                print(
                    f"scratch memory of the solver, all threads: {torch.ops.inv_conv.scratch_bytes() / 2**20:.1f} MiB"
                )
            found = {"device": device.type, "threads": threads, "backend": backend}
            report["settings"].append({**found, "rows": rows, "geometric mean": means})
    finally:
        torch.set_num_threads(before)
    if args.json is not None:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(run_command(main))
