"""CelebA from an extracted folder: images, 40 attributes, the official partition."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from common.datasets.files import FileSet, absent, first_present
from common.datasets.readers import reading
from common.errors import UserError
from common.images import list_pictures

FOLDERS = ("celeba", "CelebA", "celebA")
PARTS = {"train": 0, "valid": 1, "test": 2}


def read_list(path: Path) -> tuple[list[str] | None, list[str], np.ndarray]:
    """A CelebA list, txt or csv: (column names or None, file names, int64 (N, K)).

    Takes the count line of the txt form or not, a header with or without a name for the first column, commas or spaces
    between the values, and a byte-order mark. Raises UserError naming the line that does not fit.
    """
    with reading(path, "a list"):
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    columns, files, rows = None, [], []
    for number, line in enumerate(lines, start=1):
        cells = line.replace(",", " ").replace(";", " ").split()
        if not cells or (not files and len(cells) == 1 and cells[0].isdigit()):
            continue
        try:
            values = [int(cell) for cell in cells[1:]]
        except ValueError:
            values = None
        is_row = values is not None and len(values) > 0 and "." in cells[0]
        if not is_row and not files and columns is None:
            columns = cells
        elif not is_row or (rows and len(values) != len(rows[0])):
            raise UserError(f"{path}, line {number}: expected a file name and whole numbers, got {line[:60]!r}")
        else:
            files.append(cells[0])
            rows.append(values)
    if not files:
        raise UserError(f"{path} lists no images; get it again")
    try:
        table = np.array(rows, np.int64)
    except OverflowError:
        raise UserError(f"{path} holds a number of more than 18 digits; get it again") from None
    if columns is not None and len(columns) == table.shape[1] + 1:
        columns = columns[1:]  # the csv form names the column of file names too
    if columns is not None and len(columns) != table.shape[1]:
        raise UserError(f"{path}: {len(columns)} column names for {table.shape[1]} columns; get it again")
    return columns, files, table


def list_file(folder: Path, stem: str) -> Path:
    """A CelebA list, .txt or .csv, where one of the archives puts it. Raises MissingDataError."""
    places = [
        place / f"{stem}{end}" for place in (folder, folder / "Anno", folder / "Eval") for end in (".txt", ".csv")
    ]
    path = first_present(places)
    if path is None:
        raise absent("celeba", folder / f"{stem}.txt", "(or .csv)")
    return path


def image_folder(folder: Path) -> Path:
    """The folder of the images, where one of the archives puts it. Raises MissingDataError."""
    # the archive of one mirror holds the folder within a folder of the same name
    places = [folder / "img_align_celeba" / "img_align_celeba", folder / "img_align_celeba"]
    path = first_present([*places, folder / "Img" / "img_align_celeba"])
    if path is None:
        raise absent("celeba", folder / "img_align_celeba")
    return path


def binary(path: Path, values: np.ndarray) -> np.ndarray:
    """Attributes of -1 and 1, or 0 and 1, as int64 0 and 1. Raises UserError naming others."""
    if not (np.isin(values, (-1, 1)).all() or np.isin(values, (0, 1)).all()):
        raise UserError(f"{path}: attributes must be -1 and 1, or 0 and 1, found {np.unique(values)[:5].tolist()}")
    return (values > 0).astype(np.int64)


def read_partition(path: Path) -> dict[str, int]:
    """File name -> 0 (train), 1 (valid), 2 (test). Raises UserError for other values."""
    _, files, values = read_list(path)
    if not np.isin(values[:, 0], list(PARTS.values())).all():
        raise UserError(f"{path}: parts must be 0, 1 or 2, found {np.unique(values[:, 0])[:5].tolist()}")
    return dict(zip(files, values[:, 0].tolist(), strict=True))


def load_celeba(root: Path, split: str, image_size: int | None = 64, **options: Any) -> FileSet:
    """CelebA: uint8 (3, S, S), targets the 40 attributes in {0, 1}, int64 (40,); `classes` their names.

    Without `crop`: shorter edge to `image_size`, then its centre; with `crop`: that centre, resized. Splits train,
    valid, test by the partition file, or all. The order is that of the attribute list.
    """
    folder = first_present([root / name for name in FOLDERS])
    if folder is None:
        folder = root if (root / "img_align_celeba").is_dir() else root / FOLDERS[0]
    images, attributes = image_folder(folder), list_file(folder, "list_attr_celeba")
    columns, files, values = read_list(attributes)
    values, rows = binary(attributes, values), np.arange(len(files))
    if split != "all":
        partition = list_file(folder, "list_eval_partition")
        part_of = read_partition(partition)
        missing = next((file for file in files if file not in part_of), None)
        if missing is not None:
            raise UserError(f"{partition} does not list {missing}, the attribute list does; get both again")
        rows = np.flatnonzero([part_of[file] == PARTS[split] for file in files])
    if not len(rows):
        raise UserError(f"celeba: no image of the lists in {folder} belongs to split {split!r}")
    # a saved list may keep .jpg names while the images became .png
    present = {path.stem: path for path in list_pictures(images)}
    absent_file = next((files[row] for row in rows if Path(files[row]).stem not in present), None)
    if absent_file is not None:
        raise UserError(f"{images} lacks {absent_file}, which the lists name: extract the images again, wholly")
    paths = [present[Path(files[row]).stem] for row in rows]
    return FileSet("celeba", split, paths, torch.from_numpy(values[rows]), columns, image_size, **options)
