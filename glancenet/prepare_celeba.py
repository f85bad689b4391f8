"""Make celebA/celebA64-full-10.npz and celebA/clusters_4.npz from the aligned CelebA images.

    python glancenet/prepare_celeba.py --in data/celeba --out data

--in holds img_align_celeba/*.jpg (178 x 218), list_attr_celeba.txt and list_eval_partition.txt. Each image is cropped
to the
central 178 x 178 and resized to 64 x 64 (Lanczos). Kept are images with a hair attribute that are not Bald with a hair
colour (127,817 images; --unique_hair also drops two colours at once, as the paper's text says). X uint8 (N, 64, 64, 3),
Y (N, 10) attributes, splits = where validation and test begin.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.datasets.readers import read_image
from common.errors import UserError, run_command
from glancenet.cluster import fit_and_save
from glancenet.labels import CELEBA_ATTRIBUTES, celeba_kept_rows
from glancenet.options import Parser, boolean
from glancenet.records import whole, write_npz

CROP, SIDE = 178, 64


def read_attributes(path: Path) -> tuple[list[str], np.ndarray]:
    """File names and the ten attributes (N, 10) in {0, 1} of list_attr_celeba.txt."""
    lines = _lines(path)
    names = lines[1].split()
    missing = [name for name in CELEBA_ATTRIBUTES if name not in names]
    if missing:
        raise UserError(f"{path} has no attribute {', '.join(missing)} in its second line")
    columns = [names.index(name) for name in CELEBA_ATTRIBUTES]
    rows = [line.split() for line in lines[2:] if line.strip()]
    if any(len(row) != len(names) + 1 for row in rows):
        raise UserError(f"{path} is damaged: every row must hold a file name and {len(names)} numbers")
    return [row[0] for row in rows], np.array([[int(row[1 + c]) > 0 for c in columns] for row in rows], np.int64)


def read_partition(path: Path) -> dict[str, int]:
    """File name -> 0 (train), 1 (validation), 2 (test)."""
    return {name: int(split) for name, split in (line.split() for line in _lines(path) if line.strip())}


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        raise UserError(f"{path} is missing; it belongs to the CelebA download")
    return path.read_text().splitlines()


def image(path: Path) -> np.ndarray:
    """The central square of a CelebA image at 64 x 64: uint8 (64, 64, 3)."""
    picture = read_image(path, 3)
    left, top = (picture.width - CROP) // 2, (picture.height - CROP) // 2
    if left < 0 or top < 0:
        raise UserError(f"{path} is {picture.width} x {picture.height}; the aligned images are 178 x 218")
    square = picture.crop((left, top, left + CROP, top + CROP))
    return np.asarray(square.resize((SIDE, SIDE), Image.Resampling.LANCZOS))


def main(argv: list[str] | None = None) -> None:
    """The command."""
    p = Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False,
               formatter_class=argparse.ArgumentDefaultsHelpFormatter)  # fmt: skip
    p.add_argument("--in", dest="source", required=True, help="folder of the CelebA download")
    p.add_argument("--out", default="data", help="folder of the data sets")
    p.add_argument("--unique_hair", type=boolean, default=False, help="also drop images with two hair colours")
    p.add_argument("--n_classes", type=int, default=4, help="clusters of attributes")
    p.add_argument("--seed", type=int, default=42, help="of the clustering")
    o = p.parse(argv)
    source, out = Path(o.source), Path(o.out) / "celebA"
    names, attributes = read_attributes(source / "list_attr_celeba.txt")
    partition = read_partition(source / "list_eval_partition.txt")
    absent = next((name for name in names if name not in partition), None)
    if absent is not None:
        raise UserError(f"list_eval_partition.txt does not name {absent}, which list_attr_celeba.txt does")
    split = np.array([partition[name] for name in names])
    kept = np.flatnonzero(celeba_kept_rows(attributes, o.unique_hair))
    kept = kept[np.argsort(split[kept], kind="stable")]  # train, validation, test, each in file order
    ends = np.searchsorted(split[kept], [1, 2])
    folder = source / "img_align_celeba"

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
