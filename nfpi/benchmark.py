"""Time of one fixed point iteration: matrix form against the loop over pairs of classes.

    python -m nfpi.benchmark                       # K = 100, d = 3072
    python -m nfpi.benchmark --classes 10 --dim 3072 --repeats 20

Prints the median seconds an iteration of both, for every mode, and the largest relative difference of their results.
"""

import statistics
import sys
import time
from pathlib import Path
from typing import Annotated

if __name__ == "__main__":
    sys.path[0:1] = [str(Path(__file__).resolve().parents[1])]
    import common.start  # noqa: F401

import torch
from pydantic import Field

from common.errors import run_command
from common.launch import pick_device
from common.options import Count, Device, Options, from_flags, option
from nfpi.fpi import FixedPoint, step, step_ref

MODES = {
    "means, isotropic": {"means": True, "variances": False, "isotropic": True},
    "means, anisotropic": {"means": True, "variances": False, "isotropic": False},
    "means and variances": {"means": True, "variances": True, "isotropic": False, "sum_trick": False},
    "means and variances, sum trick": {"means": True, "variances": True, "isotropic": True, "sum_trick": True},
}


class Config(Options):
    """The options."""

    classes: Annotated[int, Field(ge=2, le=10_000)] = option(100, "classes K")
    dim: Annotated[int, Field(ge=1, le=10**7)] = option(3072, "latent dimensions d")
    repeats: Count = option(10, "repeats of the matrix form")
    ref_repeats: Annotated[int, Field(ge=0, le=10**6)] = option(1, "repeats of the loop; 0 leaves it out")
    device: Device = option("cpu", "device")
    dry_run: bool = option(False, "check the options and leave")


def seconds(function, repeats: int) -> float:
    """Median wall time of `function()`."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def main(argv: list[str] | None = None) -> None:
    """Read the command line and print one line a mode."""
    args, _ = from_flags(Config, sys.argv[1:] if argv is None else argv, __doc__)
    pick_device(args.device)
    if args.dry_run:
        print(args.model_dump_json(indent=2))
        return
    rng = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(*shape, generator=rng, dtype=torch.float64).to(args.device)

    mean, data_mean = random(args.classes, args.dim), random(args.classes, args.dim)
    var, data_var = (0.5 + random(args.classes, args.dim).square() for _ in range(2))
    print(f"K = {args.classes}, d = {args.dim}, {torch.get_num_threads()} thread(s), {args.device}")
    for name, flags in MODES.items():
        settings = FixedPoint(strength=1000.0, **flags)
        inputs = (mean, var, data_mean, data_var, settings)
        fast = step(*inputs)
        line = f"{name:32s} matrix form {seconds(lambda inputs=inputs: step(*inputs), args.repeats):8.4f} s"
        if args.ref_repeats:
            start = time.perf_counter()
            for _ in range(args.ref_repeats):
                slow = step_ref(*inputs)
            each = (time.perf_counter() - start) / args.ref_repeats
            worst = max(float(((a - b) / b).abs().max()) for a, b in zip(fast[:2], slow[:2], strict=True))
            line += f"   loop {each:8.3f} s   largest relative difference {worst:.1e}"
        print(line)


if __name__ == "__main__":
    sys.exit(run_command(main))
