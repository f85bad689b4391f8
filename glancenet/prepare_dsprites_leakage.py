"""Make dsprites_leakage_train.npz and dsprites_leakage_test.npz: sprites at the centre, and at two opposite corners.

    python glancenet/prepare_dsprites_leakage.py --in data --out data            # from the published dSprites file
    python glancenet/prepare_dsprites_leakage.py --source sprites --out data     # from sprites rendered here

Training: both positions strictly between 0.48 and 0.52 (2 x 2 positions, 2880 images); X images of 0 and 1, G = shape
1..3, scale, orientation, Y = shape. Test: both positions below 0.25 (Y = 0) or above 0.75 (Y = 1), 92,160 images of
which a seeded choice of 5000 is kept; G also has x and y.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0:1] = [str(Path(__file__).resolve().parents[1])]
    import common.start  # noqa: F401

from typing import Literal

import numpy as np

from common.errors import UserError, run_command
from common.options import Count, Options, Seed, from_flags, option
from glancenet.labels import leakage_test_rows, leakage_train_rows
from glancenet.options import data_root
from glancenet.records import whole, write_npz


class Config(Options):
    """The options of this script."""

    source_dir: str | None = option(None, "folder of the data sets (for the published file)", flags=("--in",))
    out: str | None = option(None, "folder for the two files (default: the same folder)")
    source: Literal["dsprites", "sprites"] = option("dsprites", "the file, or rendered sprites")
    sizes: tuple[Count, Count, Count, Count, Count] | None = option(
        None, "sprites: numbers of shapes, scales, orientations, x, y"
    )
    test_images: Count = option(5000, "test images to keep")
    seed: Seed = option(0, "of that choice")


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
    o, _ = from_flags(Config, sys.argv[1:] if argv is None else argv, __doc__)
    if o.source == "sprites":
        from common.datasets.sprites import Sprites

        grid = Sprites(**({} if o.sizes is None else {"sizes": o.sizes}))
    else:
        if o.sizes is not None:
            raise UserError("--sizes belongs to --source sprites")
        from common.datasets import load

        grid = load("dsprites", root=str(data_root(o.source_dir)), fetch=True)
    out = Path(o.out) if o.out else data_root(o.source_dir)
    for split, arrays in zip(("train", "test"), partitions(grid, o.test_images, o.seed), strict=True):
        path = out / f"dsprites_leakage_{split}.npz"
        write_npz(path, {key: whole(value) for key, value in arrays.items()})
        print(f"{path}: {len(arrays['X'])} images")


if __name__ == "__main__":
    sys.exit(run_command(main))
