"""Make mpi3d_toy/mpi3d_toy_full.npz (memory-mappable, with factors) from the published mpi3d_toy.npz.

    python glancenet/prepare_mpi3d.py --in data/mpi3d_toy.npz --out data
    python glancenet/prepare_mpi3d.py --in data/mpi3d_toy.npz --out data --small 50000     # also mpi3d_toy_small.npz

X: uint8 (1,036,800, 64, 64, 3); Y: factors (1,036,800, 7), row-major over 6 colours, 6 shapes, 2 sizes, 3 camera
heights, 3 backgrounds, 40 x 40 angles. The images are unpacked once (12.7 GB): `common.datasets` reads them from this
file, too. The classes are the published prototypes; `cluster.py` fits others, `prepare_clusters.py` reads a pickle.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0:1] = [str(Path(__file__).resolve().parents[1])]
    import common.start  # noqa: F401

from collections.abc import Iterable

import numpy as np

from common.datasets.readers import NpzFile
from common.errors import UserError, run_command
from common.options import Count, Options, Seed, Whole, from_flags, option
from glancenet.labels import MPI3D_SIZES
from glancenet.records import write_npz

PIECE = 4096
DOWNLOAD = "downloading mpi3d_toy.npz (github.com/rr-learning/disentanglement_dataset), and name it by --in"


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


def write(path: Path, images: Iterable[np.ndarray], sizes: tuple[int, ...], rows: np.ndarray) -> None:
    """Images (given piece by piece) and factors of the given rows."""
    parts = (rows[i : i + PIECE] for i in range(0, len(rows), PIECE))
    write_npz(path, {
        "X": ((len(rows), 64, 64, 3), np.uint8, images),
        "Y": ((len(rows), len(sizes)), np.int64, (factor_rows(sizes, part) for part in parts)),
    })  # fmt: skip
    print(f"{path}: {len(rows)} images")


def main(argv: list[str] | None = None) -> None:
    """The command."""
    o, _ = from_flags(Config, sys.argv[1:] if argv is None else argv, __doc__)
    sizes, n = tuple(o.sizes), int(np.prod(o.sizes))
    if any(given > known for given, known in zip(sizes, MPI3D_SIZES, strict=True)):
        raise UserError(f"--sizes {sizes}: at most {MPI3D_SIZES}")
    if o.small > n:
        raise UserError(f"--small {o.small}: the file has {n} images")
    if not Path(o.source).is_file():
        raise UserError(f"{o.source} is missing; get it by: {DOWNLOAD}")
    archive, folder = NpzFile(Path(o.source)), Path(o.out) / "mpi3d_toy"
    shape, dtype = archive.header("images")
    if shape != (n, 64, 64, 3) or dtype != np.uint8:
        raise UserError(f"{o.source} holds images {dtype} {shape}, expected uint8 {(n, 64, 64, 3)} for sizes {sizes}")
    full = folder / "mpi3d_toy_full.npz"
    write(full, archive.blocks("images"), sizes, np.arange(n))
    if o.small:
        rows, images = np.sort(np.random.default_rng(o.seed).permutation(n)[: o.small]), NpzFile(full).mapped("X")
        pieces = (images[rows[i : i + PIECE]] for i in range(0, len(rows), PIECE))
        write(folder / "mpi3d_toy_small.npz", pieces, sizes, rows)


if __name__ == "__main__":
    sys.exit(run_command(main))
