"""Cluster the categorical factors of MPI3D or CelebA by k-modes: the clusters are the classes.

    python glancenet/cluster.py --dset_name mpi3d_toy --dset_dir data --n_classes 10     # -> mpi3d_toy/clusters_10.npz
    python glancenet/cluster.py --dset_name celebA --dset_dir data --n_classes 4         # -> celebA/clusters_4.npz

The file holds `centroids` (C, F), `cost` (unequal features over all rows), `shares` (C,) and the seed. The training
reads it; for MPI3D with ten classes the published prototypes serve when no such file exists. Huang's k-modes: start
points drawn by feature frequency and moved to a data row, the best of several restarts, ties to the lowest class.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0:1] = [str(Path(__file__).resolve().parents[1])]
    import common.start  # noqa: F401

import json
from typing import Annotated, Literal

import numpy as np
from pydantic import Field

from common.errors import run_command
from common.options import Options, Seed, from_flags, option
from glancenet.data import PREPARE, whole_numbers
from glancenet.labels import fit_kmodes, nearest_mode
from glancenet.options import data_root
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


class Config(Options):
    """What is clustered, and how."""

    dset_name: Literal[tuple(SOURCES)] = option(..., "data set")
    dset_dir: str | None = option(None, "folder of the data sets")
    n_classes: Annotated[int, Field(ge=2, le=10_000)] | None = option(
        None, "clusters; none: 10 (mpi3d_toy), 4 (celebA)"
    )
    seed: Seed = option(42, "of rows and start points")
    restarts: Annotated[int, Field(ge=1, le=10_000)] | None = option(None, "none: 5 (mpi3d_toy), 10 (celebA)")
    rows: Annotated[int, Field(ge=2, le=10**9)] | None = option(
        None, "rows that are clustered; none: 30000 (mpi3d_toy), 10000 (celebA)"
    )
    dry_run: bool = option(False, "check the options, print them as JSON, and end", bare=True)


def main(argv: list[str] | None = None) -> None:
    """The command."""
    o, _ = from_flags(Config, sys.argv[1:] if argv is None else argv, __doc__)
    path = data_root(o.dset_dir) / SOURCES[o.dset_name][0]
    if o.dry_run:
        print(json.dumps(o.as_dict(), indent=2))
        return
    _, features, restarts, n_rows = SOURCES[o.dset_name]
    table = whole_numbers(path, "Y", PREPARE[o.dset_name], 0, 10_000)
    n_classes = o.n_classes or (10 if o.dset_name == "mpi3d_toy" else 4)
    fit_and_save(
        table[:, :features], n_classes, path.parent / f"clusters_{n_classes}.npz", o.seed, o.restarts or restarts,
        o.rows or n_rows,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(run_command(main))
