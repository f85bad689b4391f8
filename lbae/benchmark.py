"""Time the sampler against a plain transcription of the published one: `python -m lbae.benchmark`.

Prints seconds and ratios for the hyperplanes, the directions of a batch of codes and interpolation paths, and images
generated per second. The codes are correlated so that, as for trained latents, half of the eigenvalues are negative.
Both sides run float64 on the same CPU threads; generation runs on the chosen device.

    python -m lbae.benchmark                     # the paper's D = 1500
    python -m lbae.benchmark --zsize 200 --codes 20 --images 64 --width 8
"""

import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

if __name__ == "__main__":
    sys.path[0:1] = [str(Path(__file__).resolve().parents[1])]
    import common.start  # noqa: F401

import numpy as np
import torch
from pydantic import Field

from common.errors import run_command
from common.launch import pick_device
from common.options import Device, Options, from_flags, option
from lbae.model import IMAGE_SIZES, LBAE
from lbae.options import Width, one_of
from lbae.reference import direction_ref, hyperplanes_ref, path_ref
from lbae.sampler import directions, hyperplanes, interpolate, moments, sample_cov, sign


class BenchmarkOptions(Options):
    """The options of benchmark.py."""

    zsize: Annotated[int, Field(ge=2, le=16384)] = option(1500, "latent bits (paper: 1500 for CelebA)")
    codes: Annotated[int, Field(ge=1, le=100_000)] = option(100, "codes whose directions are timed")
    rows: Annotated[int, Field(ge=2, le=10_000_000)] = option(20000, "training codes behind the moments")
    images: Annotated[int, Field(ge=1, le=1_000_000)] = option(128, "images to generate")
    width: Width = option(64, "base width of the decoder")
    img_size: one_of(*IMAGE_SIZES) = option(64, "image side in pixels")
    device: Device = option("auto", "device of the generation")
    dry_run: bool = option(False, "check the options, print them as JSON and leave")


def correlated_codes(n: int, zsize: int, seed: int = 0) -> torch.Tensor:
    """Codes (n, zsize) int8 in {-1, +1}: signs of a random two-layer network of 32 Gaussian inputs, so that bits depend
    on each other as those of a trained encoder do, and no Gaussian has their moments.
    """
    rng = np.random.default_rng(seed)
    hidden = np.tanh(rng.standard_normal((n, 32), np.float32) @ rng.standard_normal((32, 256), np.float32) / 4)
    scores = hidden @ rng.standard_normal((256, zsize), np.float32) / 16 + 0.2 * rng.standard_normal(zsize)
    return torch.from_numpy(np.where(scores > 0, 1, -1).astype(np.int8))


def seconds(work: Callable[[], object], repeat: int = 2) -> float:
    """Best wall time of `repeat` calls."""
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def compare(zsize: int, codes: int, rows: int, steps: int = 10) -> list[tuple[str, float, float]]:
    """(name, seconds of the transcription, seconds here) of the sampler's three pieces; results are compared too."""
    z = correlated_codes(rows, zsize)
    array = z.numpy()
    planes = hyperplanes(*moments(z))
    L, H, _ = hyperplanes_ref(array)
    if not np.allclose(planes.H.numpy(), H, atol=1e-6):
        raise ArithmeticError("the two repaired matrices differ")
    some = z[:codes]
    plain = np.stack([direction_ref(L, code)[1] for code in array[:codes]])
    ours = sign(directions(planes, some, "mean") @ planes.L[:-1].T)
    differ = np.mean(plain != ours.numpy())
    if differ > 1e-3:
        raise ArithmeticError(f"{differ:.1%} of the directions' signs differ")
    pairs = max(1, codes // 10)

    def plain_paths():
        return [path_ref(L, array[i], array[-1 - i], steps) for i in range(pairs)]

    def our_paths():
        return interpolate(planes, z[:pairs], z.flip(0)[:pairs], steps, "mean")

    return [
        (
            f"hyperplanes, D={zsize}, N={rows}",
            seconds(lambda: hyperplanes_ref(array)),
            seconds(lambda: hyperplanes(*moments(z))),
        ),
        (
            f"directions of {codes} codes, split=mean",
            seconds(lambda: [direction_ref(L, code) for code in array[:codes]]),
            seconds(lambda: directions(planes, some, "mean")),
        ),
        (f"{pairs} paths of {steps} steps, split=mean", seconds(plain_paths), seconds(our_paths)),
    ]


@torch.no_grad()
def generation(zsize: int, width: int, img_size: int, images: int, device: torch.device) -> float:
    """Images a second: sample codes by hyperplanes and decode them, in batches of at most 256."""
    planes = hyperplanes(*moments(correlated_codes(4000, zsize).to(device)))
    decoder = LBAE(img_size, 3, zsize, width).eval().to(device).gen
    batch = min(256, images)

    def work():
        for start in range(0, images, batch):
            count = min(batch, images - start)
            normals = torch.randn(count, planes.L.shape[1], dtype=torch.float64, device=device)
            decoder(sample_cov(planes, normals).float()).cpu()

    work()
    return images / seconds(work)


def main(argv: list[str] | None = None) -> None:
    args, _ = from_flags(BenchmarkOptions, sys.argv[1:] if argv is None else argv, __doc__)
    device = pick_device(args.device)
    if args.dry_run:
        print(json.dumps(args.as_dict(), indent=2))
        return
    print(f"threads {torch.get_num_threads()}, float64")
    print(f"{'piece':<44} {'published (s)':>14} {'here (s)':>10} {'ratio':>8}")
    for name, plain, ours in compare(args.zsize, args.codes, args.rows):
        print(f"{name:<44} {plain:>14.3f} {ours:>10.4f} {plain / ours:>7.1f}x")
    planes, codes = hyperplanes(*moments(correlated_codes(2000, args.zsize))), correlated_codes(args.codes, args.zsize)
    print(f"split=margin, {args.codes} codes: {seconds(lambda: directions(planes, codes)):.3f} s")
    rate = generation(args.zsize, args.width, args.img_size, args.images, device)
    print(f"generated images per second ({device}, width {args.width}, {args.img_size}x{args.img_size}): {rate:.1f}")


if __name__ == "__main__":
    sys.exit(run_command(main))
