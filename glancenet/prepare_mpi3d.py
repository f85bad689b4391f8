"""Make mpi3d_toy/mpi3d_toy_full.npz (memory-mappable, with factors) from the published mpi3d_toy.npz.

    python glancenet/prepare_mpi3d.py --in data/mpi3d_toy.npz --out data
    python glancenet/prepare_mpi3d.py --in data/mpi3d_toy.npz --out data --small 50000     # also mpi3d_toy_small.npz

X: uint8 (1,036,800, 64, 64, 3); Y: factors (1,036,800, 7), row-major over 6 colours, 6 shapes, 2 sizes, 3 camera
heights, 3 backgrounds, 40 x 40 angles. The classes are the published prototypes; `cluster.py` fits others.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.errors import UserError, run_command
from glancenet.data import open_npz
from glancenet.labels import MPI3D_SIZES
from glancenet.options import Parser
from glancenet.records import write_npz

PIECE = 4096
DOWNLOAD = "downloading mpi3d_toy.npz of the disentanglement data sets (github.com/rr-learning/disentanglement_dataset)"


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
    p = Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False,
               formatter_class=argparse.ArgumentDefaultsHelpFormatter)  # fmt: skip
    p.add_argument("--in", dest="source", required=True, help="mpi3d_toy.npz as published (key images)")
    p.add_argument("--out", default="data", help="folder of the data sets")
    p.add_argument("--small", type=int, default=0, help="also write mpi3d_toy_small.npz with so many random images")
    p.add_argument("--seed", type=int, default=0, help="of that choice")
    p.add_argument("--sizes", nargs=7, type=int, default=list(MPI3D_SIZES), help="factor sizes of the file")
    o = p.parse(argv)
    sizes = tuple(o.sizes)
    if any(given > known or given < 1 for given, known in zip(sizes, MPI3D_SIZES, strict=True)):
        raise UserError(f"--sizes {sizes}: at most {MPI3D_SIZES}")
    images = open_npz(Path(o.source), "images", DOWNLOAD)
    if images.ndim != 4 or images.shape[1:] != (64, 64, 3) or len(images) != np.prod(sizes):
        raise UserError(
            f"{o.source} holds images {images.shape}, expected ({np.prod(sizes)}, 64, 64, 3) for sizes {sizes}"
        )
    folder = Path(o.out) / "mpi3d_toy"
    write(folder / "mpi3d_toy_full.npz", images, sizes, np.arange(len(images)))
    if o.small:
        if not 0 < o.small <= len(images):
            raise UserError(f"--small {o.small}: the file has {len(images)} images")
        rows = np.sort(np.random.default_rng(o.seed).permutation(len(images))[: o.small])
        write(folder / "mpi3d_toy_small.npz", images, sizes, rows)


if __name__ == "__main__":
    sys.exit(run_command(main))
