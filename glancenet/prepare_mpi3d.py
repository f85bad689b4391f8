"""Make mpi3d_toy/mpi3d_toy_full.npz (memory-mappable, with factors) from the published mpi3d_toy.npz.

    python glancenet/prepare_mpi3d.py --in data/mpi3d_toy.npz --out data
    python glancenet/prepare_mpi3d.py --in data/mpi3d_toy.npz --out data --small 50000     # also mpi3d_toy_small.npz

X: uint8 (1,036,800, 64, 64, 3); Y: factors (1,036,800, 7), row-major over 6 colours, 6 shapes, 2 sizes, 3 camera
heights, 3 backgrounds, 40 x 40 angles. The classes are the published prototypes; `cluster.py` fits others.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0:1] = [str(Path(__file__).resolve().parents[1])]
    import common.start  # noqa: F401

import numpy as np

from common.errors import UserError, run_command
from common.options import Count, Options, Seed, Whole, from_flags, option
from glancenet.data import open_npz
from glancenet.labels import MPI3D_SIZES
from glancenet.records import write_npz

PIECE = 4096
DOWNLOAD = "downloading mpi3d_toy.npz of the disentanglement data sets (github.com/rr-learning/disentanglement_dataset)"


class Config(Options):
    """The options of this script."""

    source: str = option(..., "mpi3d_toy.npz as published (key images)", flags=("--in",), min_length=1)
    out: str = option("data", "folder of the data sets", min_length=1)
    small: Whole = option(0, "also write mpi3d_toy_small.npz with so many random images (0: none)")
    seed: Seed = option(0, "of that choice")
    sizes: tuple[Count, Count, Count, Count, Count, Count, Count] = option(MPI3D_SIZES, "factor sizes of the file")


def factor_rows(sizes: tuple[int, ...], rows: np.ndarray) -> np.ndarray:
    """Factors (n, 7) of image indices (n,)."""
    return np.stack(np.unravel_index(rows, sizes), axis=1).astype(np.int64)


def write(path: Path, images: np.ndarray, sizes: tuple[int, ...], rows: np.ndarray) -> None:
    """Images and factors of the given rows."""
    parts = [rows[i : i + PIECE] for i in range(0, len(rows), PIECE)]
    write_npz(path, {
        "X": ((len(rows), *images.shape[1:]), np.uint8, (images[part] for part in parts)),
        "Y": ((len(rows), len(sizes)), np.int64, (factor_rows(sizes, part) for part in parts)),
    })  # fmt: skip
    print(f"{path}: {len(rows)} images")


def main(argv: list[str] | None = None) -> None:
    """The command."""
    o, _ = from_flags(Config, sys.argv[1:] if argv is None else argv, __doc__)
    sizes = tuple(o.sizes)
    if any(given > known for given, known in zip(sizes, MPI3D_SIZES, strict=True)):
        raise UserError(f"--sizes {sizes}: at most {MPI3D_SIZES}")
    images = open_npz(Path(o.source), "images", DOWNLOAD)
    if images.ndim != 4 or images.shape[1:] != (64, 64, 3) or len(images) != np.prod(sizes):
        raise UserError(
            f"{o.source} holds images {images.shape}, expected ({np.prod(sizes)}, 64, 64, 3) for sizes {sizes}"
        )
    if o.small > len(images):
        raise UserError(f"--small {o.small}: the file has {len(images)} images")
    folder = Path(o.out) / "mpi3d_toy"
    write(folder / "mpi3d_toy_full.npz", images, sizes, np.arange(len(images)))
    if o.small:
        rows = np.sort(np.random.default_rng(o.seed).permutation(len(images))[: o.small])
        write(folder / "mpi3d_toy_small.npz", images, sizes, rows)


if __name__ == "__main__":
    sys.exit(run_command(main))
