"""Flows on 2-D densities, with a picture of the density and of samples beside the data.

    python inv_flow/toy_2d.py --density 8gaussians
    python inv_flow/toy_2d.py --density checkerboard --steps 20000 --out runs/inv_flow/toy

A point is an image of two channels and one pixel: a step is ActNorm, a 1x1 inverse convolution, a 1x1 convolution, a
coupling. Writes <out>/<density>.png and <out>/<density>.csv (step, nll in nats).
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0:1] = [str(Path(__file__).resolve().parents[1])]
    import common.start  # noqa: F401

import json
import math
from typing import Annotated, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from common.checkpoint import atomic_write
from common.errors import run_command
from common.launch import check_finite, full_precision, pick_device, seed_everything
from common.options import Count, Device, Options, Positive, Seed, from_flags, option
from inv_flow.layers.actnorm import ActNorm
from inv_flow.layers.conv1x1 import Conv1x1
from inv_flow.layers.coupling import Coupling
from inv_flow.layers.flow import FlowSequential
from inv_flow.layers.inv_conv import InverseConv2d
from inv_flow.train.config import Text, Width

LIMIT = 4.0  # the pictures show [-LIMIT, LIMIT]^2
DENSITIES = (
    "8gaussians", "1gaussian", "sine", "moons", "trimodal", "trimodal2", "smile", "2spirals", "checkerboard", "rings",
)  # fmt: skip


class ToyOptions(Options):
    """The options of a flow on the plane."""

    density: Literal[DENSITIES] = option("8gaussians", "what to learn")
    steps: Count = option(5000, "training steps")
    batch: Annotated[int, Field(ge=1, le=1_000_000)] = option(500, "points a step")
    lr: Positive = option(1e-3, "learning rate at the start; it falls along a cosine")
    depth: Annotated[int, Field(ge=1, le=1000)] = option(8, "steps of the flow")
    width: Width = option(64, "hidden channels of the couplings")
    seed: Seed = option(0, "seed of everything random")
    device: Device = option("auto", "where to compute")
    tf32: bool = option(False, "let a GPU round float32 convolutions and matrix products to TF32")
    out: Text = option("runs/inv_flow/toy", "folder of the picture and the table")
    dry_run: bool = option(False, "check the options, print them as JSON, and leave")


def sample_density(name: str, n: int, rng: np.random.Generator) -> np.ndarray:
    """n points (n, 2) float32 of the density `name`, inside about [-4, 4]^2."""
    turn = rng.uniform(0, 2 * np.pi, n)
    noise = rng.standard_normal((n, 2))
    if name == "1gaussian":
        points = noise
    elif name == "8gaussians":
        angle = rng.integers(0, 8, n) * np.pi / 4
        points = 2.8 * np.stack([np.cos(angle), np.sin(angle)], 1) + 0.2 * noise
    elif name == "sine":
        x = rng.uniform(-3.5, 3.5, n)
        points = np.stack([x, 1.5 * np.sin(2 * x)], 1) + 0.15 * noise
    elif name == "moons":
        upper = rng.integers(0, 2, n)
        angle = np.pi * rng.uniform(size=n)
        points = np.stack([np.cos(angle) * (1 - 2 * upper) + upper, np.sin(angle) * (1 - 2 * upper) + 0.5 * upper], 1)
        points = 2 * (points - [0.5, 0.25]) + 0.15 * noise
    elif name in ("trimodal", "trimodal2"):
        shares = [1 / 3, 1 / 3, 1 / 3] if name == "trimodal" else [0.6, 0.3, 0.1]
        angle = rng.choice(3, n, p=shares) * 2 * np.pi / 3
        points = 2 * np.stack([np.cos(angle), np.sin(angle)], 1) + 0.3 * noise
    elif name == "smile":
        part = rng.choice(3, n, p=[0.2, 0.2, 0.6])
        mouth = rng.uniform(-0.85 * np.pi, -0.15 * np.pi, n)
        centres = np.array([[-1.2, 1.2], [1.2, 1.2]])[np.minimum(part, 1)] + 0.25 * noise
        points = np.where(
            (part == 2)[:, None], 2.2 * np.stack([np.cos(mouth), np.sin(mouth)], 1) + 0.12 * noise, centres
        )
    elif name == "2spirals":
        radius = np.sqrt(rng.uniform(size=n)) * 3 * np.pi
        arm = rng.choice([-1.0, 1.0], n)
        points = (arm * radius / 2.7)[:, None] * np.stack([-np.cos(radius), np.sin(radius)], 1) + 0.08 * noise
    elif name == "checkerboard":
        column = rng.integers(-2, 2, n)
        row = 2 * rng.integers(-1, 1, n) + column % 2
        points = 1.8 * (np.stack([column, row], 1) + rng.uniform(size=(n, 2)))
    else:  # rings
        radius = rng.choice([0.75, 1.5, 2.25, 3.0], n) + 0.08 * rng.standard_normal(n)
        points = radius[:, None] * np.stack([np.cos(turn), np.sin(turn)], 1)
    return points.astype(np.float32)


def make_flow(depth: int, width: int) -> FlowSequential:
    """`depth` steps on (B, 2, 1, 1)."""
    layers = []
    for _ in range(depth):
        layers += [ActNorm(2), InverseConv2d(2, 1), Conv1x1(2), Coupling(2, width, "snf")]
    return FlowSequential(layers)


def log_density(flow: FlowSequential, points: Tensor) -> Tensor:
    """log p of points (N, 2): (N,) nats."""
    return flow.log_prob(points[:, :, None, None])


@torch.no_grad()
def picture(path: Path, name: str, flow: FlowSequential, data: np.ndarray, device: torch.device) -> None:
    """Data, density and samples side by side."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    line = torch.linspace(-LIMIT, LIMIT, 200, device=device)
    grid = torch.stack(torch.meshgrid(line, line, indexing="xy"), -1).view(-1, 2)
    density = log_density(flow, grid).exp().view(200, 200).cpu().numpy()
    samples = flow.sample(len(data), [torch.Size((2, 1, 1))])[:, :, 0, 0].cpu().numpy()
    figure, panels = pyplot.subplots(1, 3, figsize=(10.5, 3.6))
    panels[0].scatter(*data.T, s=1)
    panels[1].imshow(density, origin="lower", extent=(-LIMIT, LIMIT, -LIMIT, LIMIT))
    panels[2].scatter(*samples.T, s=1)
    for panel, title in zip(panels, (f"{name}: data", "density", "samples"), strict=True):
        panel.set(title=title, xlim=(-LIMIT, LIMIT), ylim=(-LIMIT, LIMIT), aspect="equal")
    figure.tight_layout()
    with atomic_write(path) as file:
        figure.savefig(file, format="png", dpi=90)
    pyplot.close(figure)


def main(argv: list[str] | None = None) -> None:
    """Run the command line `argv`."""
    args, _ = from_flags(ToyOptions, sys.argv[1:] if argv is None else argv, __doc__)
    device = pick_device(args.device)
    if args.dry_run:
        print(json.dumps(args.as_dict(), indent=2))
        return
    full_precision(args.tf32)
    seed_everything(args.seed)
    rng = np.random.default_rng(args.seed)
    flow = make_flow(args.depth, args.width).to(device)
    log_density(flow, torch.from_numpy(sample_density(args.density, 5000, rng)).to(device))  # initialises ActNorm
    optimizer = torch.optim.Adam(flow.parameters(), lr=args.lr)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.steps)
    rows = ["step,nll"]
    for step in range(1, args.steps + 1):
        points = torch.from_numpy(sample_density(args.density, args.batch, rng)).to(device)
        loss = -log_density(flow, points).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()
        if step % max(1, args.steps // 20) == 0:
            rows.append(f"{step},{check_finite(loss, step, flow):.4f}")
    held_out = sample_density(args.density, 5000, rng)
    with torch.no_grad():
        nll = float(-log_density(flow, torch.from_numpy(held_out).to(device)).mean())
    folder = Path(args.out)
    with atomic_write(folder / f"{args.density}.csv") as file:
        file.write(("\n".join(rows) + "\n").encode())
    picture(folder / f"{args.density}.png", args.density, flow, held_out, device)
    uniform = 2 * math.log(2 * LIMIT)
    print(f"{args.density}: held-out NLL {nll:.4f} nats (uniform on the picture {uniform:.4f})")
    print(folder / f"{args.density}.png")


if __name__ == "__main__":
    sys.exit(run_command(main))
