"""Make dsprites_leakage_train.npz and dsprites_leakage_test.npz: sprites at the centre, and at two opposite corners.

    python glancenet/prepare_dsprites_leakage.py --in data --out data            # from the published dSprites file
    python glancenet/prepare_dsprites_leakage.py --source sprites --out data     # from sprites rendered here

Training: both positions strictly between 0.48 and 0.52 (2 x 2 positions, 2880 images); X images of 0 and 1, G = shape
1..3, scale, orientation, Y = shape. Test: both positions below 0.25 (Y = 0) or above 0.75 (Y = 1), 92,160 images of
which a seeded choice of 5000 is kept; G also has x and y.
"""

import argparse
import sys
from pathlib import Path

import numpy as np

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.errors import UserError, run_command
from glancenet.labels import leakage_test_rows, leakage_train_rows
from glancenet.options import Parser, data_root
from glancenet.records import whole, write_npz


def binary(images) -> np.ndarray:
    """uint8 (n, 1, 64, 64) of 0 and 255 -> (n, 64, 64) of 0 and 1."""
    return (np.asarray(images)[:, 0] > 127).astype(np.uint8)


def partitions(grid, test_images: int, seed: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The arrays X, G, Y of the training and of the test file. Raises UserError when the grid has no such positions."""
    values = grid.latents_values(np.arange(len(grid)))
    train = np.flatnonzero(leakage_train_rows(values))
    mask, corner = leakage_test_rows(values)
    test = np.flatnonzero(mask)
    if not len(train) or not len(test):
        raise UserError(f"{grid.name}: no images at the centre or in the corners; the grid of positions is too coarse")
    chosen = np.random.default_rng(seed).permutation(len(test))[:test_images]
    return (
        {"X": binary(grid.images_at(train)), "G": values[train][:, 1:4], "Y": values[train][:, 1]},
        {
            "X": binary(grid.images_at(test[chosen])),
            "G": values[test[chosen]][:, 1:],
            "Y": corner[chosen].astype(float),
        },
    )


def main(argv: list[str] | None = None) -> None:
    """The command."""
    p = Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False,
               formatter_class=argparse.ArgumentDefaultsHelpFormatter)  # fmt: skip
    p.add_argument("--in", dest="source_dir", default=None, help="folder of the data sets (for the published file)")
    p.add_argument("--out", default=None, help="folder for the two files; default the same folder")
    p.add_argument(
        "--source", choices=("dsprites", "sprites"), default="dsprites", help="the file, or rendered sprites"
    )
    p.add_argument("--sizes", nargs=5, type=int, default=None, help="sprites: shapes, scales, orientations, x, y")
    p.add_argument("--test_images", type=int, default=5000, help="test images to keep")
    p.add_argument("--seed", type=int, default=0, help="of that choice")
    o = p.parse(argv)
    if o.source == "sprites":
        from common.datasets.sprites import Sprites

        grid = Sprites(**({} if o.sizes is None else {"sizes": o.sizes}))
    else:
        if o.sizes is not None:
            raise UserError("--sizes belongs to --source sprites")
        from common.datasets import load

        grid = load("dsprites", root=str(data_root(o.source_dir)))
    out = Path(o.out) if o.out else data_root(o.source_dir)
    for split, arrays in zip(("train", "test"), partitions(grid, o.test_images, o.seed), strict=True):
        path = out / f"dsprites_leakage_{split}.npz"
        write_npz(path, {key: whole(value) for key, value in arrays.items()})
        print(f"{path}: {len(arrays['X'])} images")


if __name__ == "__main__":
    sys.exit(run_command(main))
