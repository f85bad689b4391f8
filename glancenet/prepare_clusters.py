"""Make clusters_<C>.npz from the pickle of a fitted `kmodes.KModes`, such as the published mpi3d_toy/km.pickle.

    python glancenet/prepare_clusters.py --in km.pickle --out data

Centroids of 5 features are MPI3D's (mpi3d_toy/clusters_<C>.npz), of 10 features CelebA's (celebA/clusters_<C>.npz);
the training reads the file as it reads one of `cluster.py`. Nothing of the pickle is run.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0:1] = [str(Path(__file__).resolve().parents[1])]
    import common.start  # noqa: F401

import numpy as np

from common.errors import UserError, run_command
from common.options import Options, from_flags, option
from common.unpickle import ARRAYS, Stated, read_pickle
from glancenet.labels import CELEBA_ATTRIBUTES, MPI3D_SIZES
from glancenet.records import whole, write_npz

# data set: values of each clustered feature
FEATURES = {"mpi3d_toy": MPI3D_SIZES[:5], "celebA": (2,) * len(CELEBA_ATTRIBUTES)}


class Config(Options):
    """The options of this script."""

    source: str = option(..., "the pickle", flags=("--in",), min_length=1)
    out: str = option("data", "folder of the data sets", min_length=1)


def read_centroids(path: Path) -> np.ndarray:
    """Centroids (C, F) int64 of a pickled KModes. Raises UserError for another, damaged or dangerous file."""
    names = {**ARRAYS, ("kmodes.kmodes", "KModes"): Stated, ("kmodes.util.dissim", "matching_dissim"): "unused"}
    state = read_pickle(path, names, max_bytes=1 << 30)
    wrong = UserError(
        f"{path} is no fitted KModes with centroids of whole numbers; make clusters by glancenet/cluster.py"
    )
    if not isinstance(state, dict):
        raise wrong
    # the centroids stand as codes, each column with a table from its values to codes (None: they are the values)
    codes, tables = state.get("_enc_cluster_centroids"), state.get("_enc_map")
    if not isinstance(codes, np.ndarray) or codes.ndim != 2 or codes.dtype.kind not in "iuf" or not codes.size:
        raise wrong
    if tables is None:
        tables = [{code: code for code in column} for column in codes.T.tolist()]
    try:
        values = [{code: value for value, code in table.items()} for table in tables]
        columns = [[table[code] for code in column] for table, column in zip(values, codes.T.tolist(), strict=True)]
        centroids = np.array(columns, float).T
    except (AttributeError, KeyError, TypeError, ValueError):
        raise wrong from None
    if not np.isfinite(centroids).all() or (centroids % 1).any():
        raise wrong
    return centroids.astype(np.int64)


def main(argv: list[str] | None = None) -> None:
    """The command."""
    o, _ = from_flags(Config, sys.argv[1:] if argv is None else argv, __doc__)
    centroids = read_centroids(Path(o.source))
    fits = [name for name, sizes in FEATURES.items() if len(sizes) == centroids.shape[1]]
    if not fits:
        raise UserError(f"{o.source} clusters {centroids.shape[1]} features; MPI3D has 5, CelebA has 10 here: make "
                        "clusters by glancenet/cluster.py")  # fmt: skip
    if not ((centroids >= 0) & (centroids < FEATURES[fits[0]])).all():
        raise UserError(f"{o.source} has centroids beyond the values {FEATURES[fits[0]]} of {fits[0]}'s features")
    path = Path(o.out) / fits[0] / f"clusters_{len(centroids)}.npz"
    write_npz(path, {"centroids": whole(centroids)})
    print(f"{path}: {len(centroids)} clusters of {centroids.shape[1]} features")


if __name__ == "__main__":
    sys.exit(run_command(main))
