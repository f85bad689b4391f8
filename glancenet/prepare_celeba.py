"""Make celebA/celebA64-full-10.npz and celebA/clusters_4.npz from the aligned CelebA images.

    python glancenet/prepare_celeba.py --in data/celeba --out data

--in holds img_align_celeba/*.jpg (178 x 218) and the lists list_attr_celeba and list_eval_partition, .txt or .csv, as
published or as Kaggle's archive has them. Each image is cropped to the central 178 x 178 and resized to 64 x 64
(Lanczos). Kept are images with a hair attribute that are not Bald with a hair colour (127,817 images; --unique_hair
also drops two colours at once, as the paper's text says). X uint8 (N, 64, 64, 3), Y (N, 10) attributes, splits = where
validation and test begin.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0:1] = [str(Path(__file__).resolve().parents[1])]
    import common.start  # noqa: F401

from collections.abc import Iterator
from typing import Annotated

import numpy as np
from PIL import Image
from pydantic import Field

from common.datasets.faces import binary, image_folder, list_file, read_list, read_partition
from common.errors import UserError, run_command
from common.images import open_picture
from common.options import Options, Seed, from_flags, option
from glancenet.cluster import fit_and_save
from glancenet.labels import CELEBA_ATTRIBUTES, celeba_kept_rows
from glancenet.records import whole, write_npz

CROP, SIDE = 178, 64


class Config(Options):
    """The options of this script."""

    source: str = option(..., "folder of the CelebA download", flags=("--in",), min_length=1)
    out: str = option("data", "folder of the data sets", min_length=1)
    unique_hair: bool = option(False, "also drop images with two hair colours")
    n_classes: Annotated[int, Field(ge=2, le=1000)] = option(4, "clusters of attributes")
    seed: Seed = option(42, "of the clustering")


def read_attributes(path: Path) -> tuple[list[str], np.ndarray]:
    """File names and the ten attributes (N, 10) in {0, 1} of list_attr_celeba. Raises UserError for other values."""
    columns, files, values = read_list(path)
    missing = [name for name in CELEBA_ATTRIBUTES if name not in (columns or ())]
    if missing:
        raise UserError(f"{path} has no attribute {', '.join(missing)} in its header")
    return files, binary(path, values[:, [columns.index(name) for name in CELEBA_ATTRIBUTES]])


def image(path: Path) -> np.ndarray:
    """The central square of a CelebA image at 64 x 64: uint8 (64, 64, 3)."""
    picture = open_picture(path, 3)
    left, top = (picture.width - CROP) // 2, (picture.height - CROP) // 2
    if left < 0 or top < 0:
        raise UserError(f"{path} is {picture.width} x {picture.height}; the aligned images are 178 x 218")
    square = picture.crop((left, top, left + CROP, top + CROP))
    return np.asarray(square.resize((SIDE, SIDE), Image.Resampling.LANCZOS))


def main(argv: list[str] | None = None) -> None:
    """The command."""
    o, _ = from_flags(Config, sys.argv[1:] if argv is None else argv, __doc__)
    source, out = Path(o.source), Path(o.out) / "celebA"
    names, attributes = read_attributes(list_file(source, "list_attr_celeba"))
    partition = read_partition(list_file(source, "list_eval_partition"))
    absent = next((name for name in names if name not in partition), None)
    if absent is not None:
        raise UserError(f"list_eval_partition does not name {absent}, which list_attr_celeba does; get both again")
    split = np.array([partition[name] for name in names])
    kept = np.flatnonzero(celeba_kept_rows(attributes, o.unique_hair))
    kept = kept[np.argsort(split[kept], kind="stable")]  # train, validation, test, each in file order
    ends = np.searchsorted(split[kept], [1, 2])
    folder = image_folder(source)

    def pieces() -> Iterator[np.ndarray]:
        for start in range(0, len(kept), 512):
            yield np.stack([image(folder / names[i]) for i in kept[start : start + 512]])

    write_npz(out / "celebA64-full-10.npz", {
        "X": ((len(kept), SIDE, SIDE, 3), np.uint8, pieces()),
        "Y": whole(attributes[kept].astype(np.uint8)), "splits": whole(ends.astype(np.int64)),
    })  # fmt: skip
    print(f"{out / 'celebA64-full-10.npz'}: {len(kept)} of {len(names)} images "
          f"({ends[0]} train, {ends[1] - ends[0]} validation, {len(kept) - ends[1]} test)")  # fmt: skip
    fit_and_save(attributes[kept], o.n_classes, out / f"clusters_{o.n_classes}.npz", o.seed, restarts=10, n_rows=10_000)


if __name__ == "__main__":
    sys.exit(run_command(main))
