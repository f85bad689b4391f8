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

import argparse
import csv
import ctypes
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from common.checkpoint import atomic_write
from common.errors import UserError, run_command
from common.launch import pick_device
from inv_flow.layers.inv_conv import InverseConv2d
from inv_flow.model import create_model
from inv_flow.train.config import LAYERS, Config, layer_choice

SIZES = {7: (16, 32, 64, 128, 256), 10: (32,)}
KERNELS = {7: (3,), 10: (2, 3, 5, 7, 9, 11)}
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
    model = create_model(config).to(device)
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
    `share_difference` = 1 - without / step. Raises UserError when the flow has no inverse convolution.
    """
    torch.manual_seed(config.seed)
    model = create_model(config).to(device)
    without = create_model(config.replace(**layer_choice("none"))).to(device)
    images = torch.randint(0, 256, (batch, *config.image_size), device=device).float()
    inputs: list[tuple[torch.nn.Module, torch.Tensor]] = []
    handles = [
        module.register_forward_pre_hook(
            lambda module, args: inputs.append((module, args[0].detach().requires_grad_()))
        )
        for module in model.modules()
        if isinstance(module, InverseConv2d)
    ]
    if not handles:
        raise UserError("this flow has no inverse convolution; name --layers inverse")
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


def share_table(args: argparse.Namespace, device: torch.device) -> None:
    """Measure `step_share` for --coupling_width and the first of --layers, print it and write timing_share.csv."""
    config = Config().replace(
        **layer_choice(args.layers[0]), image_size=(1, 28, 28), num_blocks=2, block_size=16, conv1x1=args.conv1x1,
        coupling_width=args.coupling_width, split_width=args.coupling_width,
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


def main(argv: list[str] | None = None) -> None:
    """Run the command line `argv`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--table", type=int, choices=(7, 10), default=7)
    parser.add_argument("--layers", nargs="+", default=["inverse", "finc"], metavar="LAYER", help=", ".join(LAYERS))
    parser.add_argument("--sizes", nargs="+", type=int, help="image sides (default: the table's)")
    parser.add_argument("--kernels", nargs="+", type=int, help="kernel sizes (default: the table's)")
    parser.add_argument("--channels", type=int, default=3, help="of the images (3; MNIST: 1)")
    parser.add_argument("--num_blocks", type=int, default=2)
    parser.add_argument("--block_size", type=int, default=32)
    parser.add_argument("--coupling_width", type=int, default=512)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--share", action="store_true", help="the inverse layers' share of the MNIST flow's step")
    parser.add_argument("--conv1x1", action="store_true", help="a 1x1 convolution in each step, too")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", default="runs/inv_flow/timing")
    args = parser.parse_args(argv)
    if min(args.batch, args.repeats, args.channels, *(args.sizes or [1]), *(args.kernels or [1])) < 1:
        raise UserError("batch, repeats, channels, sizes and kernels must be positive")
    device = pick_device(args.device)
    if args.share:
        return share_table(args, device)
    path = Path(args.out) / f"timing_table{args.table}.csv"
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    if path.exists():
        with open(path, newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        if rows and list(rows[0]) != COLUMNS:
            raise UserError(f"{path} has other columns; move it away or name another --out")
    done = {tuple(row[key] for key in KEYS) for row in rows}
    shape = (args.num_blocks, args.block_size, args.coupling_width, int(args.conv1x1))
    where = (*shape, args.batch, device.type, torch.get_num_threads())
    for layer in args.layers:
        for size in args.sizes or SIZES[args.table]:
            for kernel in args.kernels or KERNELS[args.table]:
                names = (layer, args.channels, size, kernel, *where)
                if tuple(map(str, names)) in done:
                    continue
                mixing = {"conv1x1": True} if args.conv1x1 else {}
                config = Config().replace(
                    **layer_choice(layer) | mixing, image_size=(args.channels, size, size), if_kernel_size=kernel,
                    activation="Identity", num_blocks=args.num_blocks, block_size=args.block_size,
                    coupling_width=args.coupling_width,
                )  # fmt: skip
                row = dict(zip(KEYS, names, strict=True)) | time_flow(config, args.batch, args.repeats, device)
                rows.append({key: str(row[key]) for key in COLUMNS})
                text = [",".join(COLUMNS), *(",".join(row[key] for key in COLUMNS) for row in rows)]
                with atomic_write(path) as file:
                    file.write(("\n".join(text) + "\n").encode())
                print(", ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
    same = (str(args.channels), *map(str, where))  # one curve a layer: the rows of this configuration
    rows = [row for row in rows if (row["channels"], *(row[key] for key in KEYS[4:])) == same]
    plot(path.with_suffix(".png"), rows, "size" if args.table == 7 else "kernel")
    print(f"{path} and {path.with_suffix('.png')}")


if __name__ == "__main__":
    sys.exit(run_command(main))
