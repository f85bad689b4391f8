"""Cluster the categorical factors of MPI3D or CelebA by k-modes: the clusters are the classes.

    python glancenet/cluster.py --dset_name mpi3d_toy --dset_dir data --n_classes 10     # -> mpi3d_toy/clusters_10.npz
    python glancenet/cluster.py --dset_name celebA --dset_dir data --n_classes 4         # -> celebA/clusters_4.npz

The file holds `centroids` (C, F), `cost` (unequal features over all rows), `shares` (C,) and the seed. The training
reads it; for MPI3D with ten classes the published prototypes serve when no such file exists. Huang's k-modes: start
points drawn by feature frequency and moved to a data row, the best of several restarts, ties to the lowest class.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.errors import UserError, run_command
from glancenet.data import open_npz
from glancenet.labels import fit_kmodes, nearest_mode
from glancenet.options import Parser, data_root
from glancenet.records import whole, write_npz

# file, number of clustered columns, restarts, rows
SOURCES = {
    "mpi3d_toy": ("mpi3d_toy/mpi3d_toy_full.npz", 5, 5, 30_000),
    "celebA": ("celebA/celebA64-full-10.npz", 10, 10, 10_000),
}


def fit_and_save(rows: np.ndarray, n_classes: int, path: Path, seed: int, restarts: int, n_rows: int) -> np.ndarray:
    """Fit on a seeded choice of `n_rows` rows, write the file, print the shares; returns the centroids (C, F)."""
    chosen = np.random.default_rng(seed).permutation(len(rows))[:n_rows]
    centroids, cost = fit_kmodes(rows[chosen], n_classes, seed, restarts)
    shares = np.bincount(nearest_mode(rows, centroids), minlength=n_classes) / len(rows)
    write_npz(path, {
        "centroids": whole(centroids), "cost": whole(np.array([cost])),
        "shares": whole(shares), "seed": whole(np.array([seed])),
    })  # fmt: skip
    print(f"{path}: shares {' '.join(f'{share:.4f}' for share in shares)}, cost {cost} on {len(chosen)} rows")
    return centroids


def main(argv: list[str] | None = None) -> None:
    """The command."""
    p = Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False,
               formatter_class=argparse.ArgumentDefaultsHelpFormatter)  # fmt: skip
    p.add_argument("--dset_name", choices=tuple(SOURCES), required=True, help="data set")
    p.add_argument("--dset_dir", default=None, help="folder of the data sets")
    p.add_argument("--n_classes", type=int, default=None, help="clusters; default 10 (mpi3d_toy), 4 (celebA)")
    p.add_argument("--seed", type=int, default=42, help="of rows and start points")
    p.add_argument("--restarts", type=int, default=None, help="default 5 (mpi3d_toy), 10 (celebA)")
    p.add_argument(
        "--rows", type=int, default=None, help="rows that are clustered; default 30000 (mpi3d_toy), 10000 (celebA)"
    )
    o = p.parse(argv)
    file, features, restarts, n_rows = SOURCES[o.dset_name]
    path = data_root(o.dset_dir) / file
    table = np.asarray(open_npz(path, "Y", f"python glancenet/prepare_{'mpi3d' if 'mpi3d' in file else 'celeba'}.py"))
    n_classes = o.n_classes or (10 if o.dset_name == "mpi3d_toy" else 4)
    if n_classes < 2:
        raise UserError(f"--n_classes {n_classes}: at least 2")
    fit_and_save(
        table[:, :features].astype(np.int64), n_classes, path.parent / f"clusters_{n_classes}.npz", o.seed,
        o.restarts or restarts, o.rows or n_rows,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(run_command(main))
