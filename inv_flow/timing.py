"""Sampling and forward times of whole flows: the paper's Tables 7 (image size) and 10 (kernel size).

    python inv_flow/timing.py --table 7                        sizes 16..256, L = 2, K = 32, batch 100
    python inv_flow/timing.py --table 10                       kernels 2..11 on 32x32 images
    python inv_flow/timing.py --table 7 --layers inverse finc --sizes 16 32 --repeats 3 --coupling_width 64
    python inv_flow/timing.py --share                          what the inverse layers take of the MNIST flow's step

`--share` times the training step of the MNIST flow (L = 2, K = 16, 28x28, its spline activations), its inverse
convolutions alone (forward and backward of each on the input that it gets inside the flow), and the same flow's step
without them, alternately; it writes <out>/timing_share.csv.

Random images; one row a (layer, size, kernel): forward only, training step, latency of one sample, time of a batch of
samples (medians in milliseconds, with the standard deviation), peak memory of the training step (on the CPU: growth of
the resident set), parameters. Rows are written as they are measured to <out>/timing_table<N>.csv; a second call skips
those that are there. A plot stands beside it.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0:1] = [str(Path(__file__).resolve().parents[1])]
    import common.start  # noqa: F401

import csv
import ctypes
import json
import statistics
import time
from collections.abc import Callable
from typing import Annotated, Any, Literal, Self

import torch
from pydantic import Field, model_validator

from common.checkpoint import atomic_write
from common.errors import UserError, run_command
from common.launch import full_precision, keep_freed_memory, pick_device
from common.options import Device, Options, from_flags, option
from inv_flow.layers.inv_conv import InverseConv2d
from inv_flow.train.config import LAYERS, Config, Kernel, Side, Text, layer_choice
from inv_flow.train.launch import check, make_model

SIZES = {"7": (16, 32, 64, 128, 256), "10": (32,)}
KERNELS = {"7": (3,), "10": (2, 3, 5, 7, 9, 11)}
TIMES = ("forward", "train_step", "sample_1", "sample_batch")
# what a row was measured of; a row with the same ones is not measured again
KEYS = (
    "layer", "channels", "size", "kernel", "num_blocks", "block_size", "coupling_width", "conv1x1", "batch", "device",
    "threads",
)  # fmt: skip
COLUMNS = [
    *KEYS, "parameters",
    *(f"{name}_{part}" for name in TIMES for part in ("ms", "std")), "peak_mb",
]  # fmt: skip


class TimingOptions(Options):
    """The options of a measurement."""

    table: Literal["7", "10"] = option("7", "the paper's table: 7 (image sizes) or 10 (kernel sizes)")
    layers: Annotated[list[Literal[LAYERS]], Field(min_length=1)] = option(["inverse", "finc"], "layers to compare")
    sizes: list[Side] | None = option(None, "image sides (none: the table's)")
    kernels: list[Kernel] | None = option(None, "kernel sizes (none: the table's)")
    channels: Annotated[int, Field(ge=1, le=1024)] = option(3, "of the images (3; MNIST: 1)")
    num_blocks: int = option(2, "L: levels", ge=1, le=16)
    block_size: int = option(32, "K: steps a level", ge=1, le=1024)
    coupling_width: int = option(512, "hidden channels of the coupling (0: no coupling)", ge=0, le=8192)
    batch: int = option(100, "images", ge=1, le=100_000)
    repeats: int = option(20, "measurements of each time", ge=1, le=100_000)
    share: bool = option(False, "the inverse layers' share of the MNIST flow's step instead of a table")
    conv1x1: bool = option(False, "a 1x1 convolution in each step, too")
    device: Device = option("auto", "where to compute")
    tf32: bool = option(False, "let a GPU round float32 convolutions and matrix products to TF32")
    out: Text = option("runs/inv_flow/timing", "folder of the tables")
    dry_run: bool = option(False, "check the options, print them as JSON, and leave")

    @model_validator(mode="after")
    def _one_flow(self) -> Self:
        if self.share and self.layers[0] not in ("inverse", "unit"):
            raise ValueError(f"layers={self.layers[0]} has no inverse convolution that share measures; name inverse or "
                             "unit")  # fmt: skip
        return self

    def flow(self, layer: str, size: int, kernel: int) -> Config:
        """The flow of one row."""
        size_keys = ("num_blocks", "block_size", "coupling_width", "device")
        return Config.build(
            layer_choice(layer) | ({"conv1x1": True} if self.conv1x1 else {}),
            {"image_size": (self.channels, size, size), "test": True, "if_kernel_size": kernel},
            {"activation": "Identity"} | {name: getattr(self, name) for name in size_keys},
        )  # fmt: skip

    def rows(self) -> list[tuple[str, int, int]]:
        """(layer, size, kernel) of every row of the table."""
        sizes, kernels = self.sizes or SIZES[self.table], self.kernels or KERNELS[self.table]
        return [(layer, size, kernel) for layer in self.layers for size in sizes for kernel in kernels]


def measure(action: Callable[[], object], device: torch.device, repeats: int) -> tuple[float, float]:
    """Median and standard deviation of `action` in milliseconds after one warm-up call."""
    action()
    times = []
    for _ in range(repeats):
        if device.type == "cuda":
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            action()
            end.record()
            torch.cuda.synchronize(device)
            times.append(start.elapsed_time(end))
        else:
            begun = time.perf_counter()
            action()
            times.append(1000 * (time.perf_counter() - begun))
    return statistics.median(times), statistics.pstdev(times)


def time_flow(config: Config, batch: int, repeats: int, device: torch.device) -> dict[str, float]:
    """The times of one flow, its parameters, and the peak memory of its training step in MB."""
    torch.manual_seed(config.seed)
    model = make_model(config).to(device)
    images = torch.randint(0, 256, (batch, *config.image_size), device=device).float()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-5)

    def forward() -> None:
        with torch.no_grad():
            model.log_prob(images)

    def train_step() -> None:
        optimizer.zero_grad(set_to_none=True)
        (-model.log_prob(images).mean()).backward()
        optimizer.step()

    row: dict[str, float] = {"parameters": sum(p.numel() for p in model.parameters())}
    actions = {
        "forward": forward,
        "sample_1": lambda: model.sample_images(1),
        "sample_batch": lambda: model.sample_images(batch),
        "train_step": train_step,
    }
    train_step()  # the allocator's first pages, else the first flow of a table pays for them
    for name, action in actions.items():
        model.train(name == "train_step")
        before = reset_peak(device)
        row[f"{name}_ms"], row[f"{name}_std"] = (round(value, 3) for value in measure(action, device, repeats))
    row["peak_mb"] = round(peak_memory(device) - before, 1)
    return row


def step_share(config: Config, batch: int, repeats: int, device: torch.device) -> dict[str, float]:
    """What the inverse convolutions of the flow `config` take of its training step.

    Medians in milliseconds: `step_ms`; `layers_ms`, forward and backward of every inverse convolution on the input
    that it gets inside the flow; `without_ms`, the step of the flow with --layer none. `share` = layers / step;
    `share_difference` = 1 - without / step.
    """
    torch.manual_seed(config.seed)
    model = make_model(config).to(device)
    without = make_model(config.with_changes(**layer_choice("none"))).to(device)
    images = torch.randint(0, 256, (batch, *config.image_size), device=device).float()
    inputs: list[tuple[torch.nn.Module, torch.Tensor]] = []
    handles = [
        module.register_forward_pre_hook(
            lambda module, args: inputs.append((module, args[0].detach().requires_grad_()))
        )
        for module in model.modules()
        if isinstance(module, InverseConv2d)
    ]
    with torch.no_grad():
        model.log_prob(images)
    for handle in handles:
        handle.remove()

    def step(flow: torch.nn.Module) -> None:
        flow.zero_grad(set_to_none=True)
        (-flow.log_prob(images).mean()).backward()

    def layers() -> None:
        for layer, x in inputs:
            layer.weight.grad = x.grad = None
            y, _ = layer(x)
            y.backward(x)  # any gradient of that shape costs the same

    actions = {"step": lambda: step(model), "layers": layers, "without": lambda: step(without)}
    times: dict[str, list[float]] = {name: [] for name in actions}
    for _ in range(repeats):
        for name, action in actions.items():
            times[name].append(measure(action, device, 1)[0])
    row = {f"{name}_ms": round(statistics.median(values), 2) for name, values in times.items()}
    return row | {
        "count": len(inputs),
        "share": round(row["layers_ms"] / row["step_ms"], 4),
        "share_difference": round(1 - row["without_ms"] / row["step_ms"], 4),
    }


def share_table(args: TimingOptions, device: torch.device) -> None:
    """Measure `step_share` for --coupling_width and the first of --layers, print it and write timing_share.csv."""
    config = Config.build(
        layer_choice(args.layers[0]),
        {"image_size": (1, 28, 28), "num_blocks": 2, "block_size": 16, "conv1x1": args.conv1x1,
         "coupling_width": args.coupling_width, "split_width": args.coupling_width or 512},
    )  # fmt: skip
    row = {"coupling_width": args.coupling_width, "batch": args.batch, "device": device.type,
           "threads": torch.get_num_threads(), **step_share(config, args.batch, args.repeats, device)}  # fmt: skip
    print(", ".join(f"{key} {value}" for key, value in row.items()), flush=True)
    path = Path(args.out) / "timing_share.csv"
    with atomic_write(path) as file:
        file.write(f"{','.join(row)}\n{','.join(map(str, row.values()))}\n".encode())
    print(path)


def reset_peak(device: torch.device) -> float:
    """Start a new measurement of the peak; returns what to subtract from it (MB): on the CPU what the process holds."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return 0.0
    clear = Path("/proc/self/clear_refs")
    if clear.exists():
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc's; what it keeps is not this action's
        if trim is not None:
            trim(0)
        clear.write_text("5")  # Linux: the resident set's high-water mark starts again
    return peak_memory(device)


def peak_memory(device: torch.device) -> float:
    """Largest allocation (CUDA) or resident set (Linux) since `reset_peak`, MB; NaN where the system does not tell."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.exists() else []
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM")), float("nan"))


def plot(path: Path, rows: list[dict[str, str]], axis: str) -> None:
    """Sampling (batch) and forward times against `axis`, a line a layer, both axes logarithmic."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.6), sharey=True)
    for panel, name, title in zip(panels, ("sample_batch", "forward"), ("sampling", "forward"), strict=True):
        for layer in sorted({row["layer"] for row in rows}):
            points = sorted((int(row[axis]), float(row[f"{name}_ms"])) for row in rows if row["layer"] == layer)
            panel.plot(*zip(*points, strict=True), marker="o", label=layer)
        panel.set(title=f"{title}, batch of {rows[0]['batch']}", xlabel=f"{axis} (pixels)", xscale="log", yscale="log")
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("milliseconds")
    panels[0].legend()
    figure.tight_layout()
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=110)
    pyplot.close(figure)


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows that are measured already. Raises UserError for a table of another kind."""
    if not path.exists():
        return []
    try:
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} cannot be read ({error}); move it away or name another --out") from error
    if any(list(row) != COLUMNS or None in row.values() for row in rows):
        raise UserError(f"{path} has other columns; move it away or name another --out")
    return rows


def main(argv: list[str] | None = None) -> None:
    """Run the command line `argv`."""
    args, given = from_flags(TimingOptions, sys.argv[1:] if argv is None else argv, __doc__)
    idle = [name for name in ("table", "sizes", "kernels", "channels", "num_blocks", "block_size") if name in given]
    if args.share and idle:
        raise UserError(f"--{idle[0]} does nothing with --share, which measures the MNIST flow; leave it out")
    device = pick_device(args.device)
    for row in [] if args.share else args.rows():
        check(args.flow(*row))
    path = Path(args.out) / f"timing_table{args.table}.csv"
    rows = [] if args.share else read_table(path)
    if args.dry_run:
        print(json.dumps(args.as_dict(), indent=2))
        return
    full_precision(args.tf32)
    keep_freed_memory()  # as training and evaluation do
    if args.share:
        return share_table(args, device)
    done = {tuple(row[key] for key in KEYS) for row in rows}
    shape = (args.num_blocks, args.block_size, args.coupling_width, int(args.conv1x1))
    where = (*shape, args.batch, device.type, torch.get_num_threads())
    for layer, size, kernel in args.rows():
        names = (layer, args.channels, size, kernel, *where)
        if tuple(map(str, names)) in done:
            continue
        times = time_flow(args.flow(layer, size, kernel), args.batch, args.repeats, device)
        row: dict[str, Any] = dict(zip(KEYS, names, strict=True)) | times
        rows.append({key: str(row[key]) for key in COLUMNS})
        text = [",".join(COLUMNS), *(",".join(row[key] for key in COLUMNS) for row in rows)]
        with atomic_write(path) as file:
            file.write(("\n".join(text) + "\n").encode())
        print(", ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    same = (str(args.channels), *map(str, where))  # one curve a layer: the rows of this configuration
    rows = [row for row in rows if (row["channels"], *(row[key] for key in KEYS[4:])) == same]
    plot(path.with_suffix(".png"), rows, "size" if args.table == "7" else "kernel")
    print(f"{path} and {path.with_suffix('.png')}")


if __name__ == "__main__":
    sys.exit(run_command(main))
