"""The files of a run: tables with fixed columns, and .npy files that hold several arrays one after another."""

import csv
import io
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.lib import format as npy

from common.checkpoint import append_text, atomic_write, whole_lines
from common.datasets.readers import DAMAGE, read_array
from common.errors import UserError


class Table:
    """A CSV file with fixed columns, flushed row by row.

    `keep_until=(column, value)` continues an existing file, dropping rows beyond that value (a resumed run), and
    `keep_rows` keeps its first rows; otherwise the file is begun anew. `rows` counts the data rows.
    """

    def __init__(
        self, path: Path, columns: list[str], keep_until: tuple[str, float] | None = None, keep_rows: int | None = None
    ):
        self.path, self.columns = path, columns
        rows: list[dict[str, str]] = []
        if keep_until is not None and path.exists():
            column, last = keep_until
            rows = [row for row in read_table(path) if float(row[column]) <= last]
        elif keep_rows is not None and path.exists():
            rows = read_table(path)[:keep_rows]
        self.rows = len(rows)
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, restval="", extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        with atomic_write(path) as file:
            file.write(text.getvalue().encode())

    def append(self, row: dict[str, Any]) -> None:
        """Add a row; a missing column stays empty, an unknown one is an error of ours."""
        text = io.StringIO()
        csv.DictWriter(text, self.columns, restval="", lineterminator="\n").writerow(row)
        append_text(self.path, text.getvalue())
        self.rows += 1

    def replace_last(self, row: dict[str, Any]) -> None:
        """Another last row (the first one, where there is none)."""
        again = Table(self.path, self.columns, keep_rows=max(0, self.rows - 1))
        again.append(row)
        self.rows = again.rows


def read_table(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file. Raises UserError when it is missing or holds no table."""
    if not path.is_file():
        raise UserError(f"{path} is missing; is this the log folder of a finished run?")
    try:
        reader = csv.DictReader(io.StringIO(whole_lines(path), newline=""))
        rows = list(reader)
    except (csv.Error, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged ({error})") from error
    if not reader.fieldnames:
        raise UserError(f"{path} is empty")
    return rows


def save_arrays(path: Path, *arrays: Any) -> None:
    """Consecutive np.save records in one file, in order."""
    with atomic_write(path) as file:
        for array in arrays:
            np.save(file, np.asarray(array), allow_pickle=False)


def load_arrays(path: Path, n: int) -> list[np.ndarray]:
    """The first `n` records of `save_arrays`. Raises UserError when the file is missing or shorter."""
    if not path.is_file():
        raise UserError(f"{path} is missing; is this the log folder of a finished run?")
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            return [read_array(file, size - file.tell()) for _ in range(n)]
    except DAMAGE as error:
        raise UserError(f"{path} is truncated or holds other records ({error})") from error


def write_npz(path: Path, arrays: dict[str, tuple[tuple[int, ...], Any, Iterable[np.ndarray]]]) -> None:
    """An uncompressed npz, written piece by piece: key -> (shape, dtype, consecutive pieces along the first axis).

    Uncompressed members can be memory-mapped. Raises ValueError when the pieces do not add up to the shape.
    """
    with atomic_write(path) as file, zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
        for key, (shape, dtype, pieces) in arrays.items():
            with archive.open(f"{key}.npy", "w", force_zip64=True) as member:
                header = {"descr": npy.dtype_to_descr(np.dtype(dtype)), "fortran_order": False, "shape": shape}
                npy.write_array_header_1_0(member, header)
                rows = 0
                for piece in pieces:
                    piece = np.ascontiguousarray(piece, dtype)
                    member.write(piece.tobytes())
                    rows += len(piece)
                if rows != shape[0]:
                    raise ValueError(f"{key}: {rows} rows written, {shape[0]} announced")


def whole(array: np.ndarray) -> tuple[tuple[int, ...], Any, Iterable[np.ndarray]]:
    """A small array as `write_npz` takes it."""
    return array.shape, array.dtype, [array]
