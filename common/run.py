"""One folder a run: config.json, metrics.csv, TensorBoard events, log.txt, and a progress bar.

`metrics.csv` holds no wall-clock column, so that two runs with one seed give identical files; times go to log.txt and
TensorBoard.
"""

import csv
import datetime
import io
import shutil
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from torch import Tensor
from tqdm import tqdm

from common.checkpoint import atomic_write, write_json
from common.errors import UserError

T = TypeVar("T")


class Run:
    """The record of one run in `folder`.

    Raises UserError when the folder already holds a run and neither `resume` nor `overwrite` was asked, when the folder
    cannot
    be written, and when `wandb` is asked but not installed. `enabled=False` (ranks other than 0) writes nothing.
    """

    def __init__(
        self,
        folder: str | Path,
        config: dict[str, Any],
        *,
        resume: bool = False,
        resume_step: int | None = None,
        overwrite: bool = False,
        tensorboard: bool = True,
        wandb: str | None = None,
        enabled: bool = True,
    ):
        self.folder, self.config, self.enabled = Path(folder), config, enabled
        self._columns: list[str] = ["step"]
        self._metrics = self._log = self._board = self._wandb = None
        if not enabled:
            return
        old = [self.folder / name for name in ("config.json", "metrics.csv")]
        if not resume and any(path.exists() for path in old):
            if not overwrite:
                raise UserError(
                    f"{self.folder} already holds a run; resume it, ask for overwrite, or name another folder"
                )
            for path in (*old, self.folder / "log.txt"):
                path.unlink(missing_ok=True)
            shutil.rmtree(self.folder / "tb", ignore_errors=True)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the run folder {self.folder}: {error.strerror}") from error
        write_json(self.folder / "config.json", config)
        self._open_metrics(resume_step if resume else None)
        self._log = open(self.folder / "log.txt", "a", encoding="utf-8")  # noqa: SIM115 - closed by close()
        if tensorboard:
            from tensorboardX import SummaryWriter

            self._board = SummaryWriter(str(self.folder / "tb"), purge_step=resume_step if resume else None)
        if wandb:
            try:
                import wandb as client
            except ImportError:
                raise UserError(
                    "wandb was asked for but is not installed: pip install wandb, or leave the option out"
                ) from None
            self._wandb = client.init(project=wandb, config=config, dir=str(self.folder))

    def _open_metrics(self, resume_step: int | None) -> None:
        path = self.folder / "metrics.csv"
        rows = []
        if path.exists():
            self._columns, rows = _read_rows(path)
            if resume_step is not None:
                rows = [row for row in rows if int(row["step"]) <= resume_step]
        self._write_all(rows)

    def _write_all(self, rows: list[dict[str, str]]) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, self._columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        if self._metrics:
            self._metrics.close()
        with atomic_write(self.folder / "metrics.csv") as file:
            file.write(text.getvalue().encode())
        self._metrics = open(self.folder / "metrics.csv", "a", encoding="utf-8", newline="")  # noqa: SIM115

    def log(self, step: int, **scalars: float | Tensor) -> None:
        """One row of metrics.csv and one TensorBoard point a scalar. A new name adds a column; earlier rows leave it
        empty.
        """
        if not self.enabled:
            return
        values = {name: _number(value) for name, value in scalars.items()}
        new = [name for name in values if name not in self._columns]
        if new:
            rows = _read_rows(self.folder / "metrics.csv")[1]
            self._columns += new
            self._write_all(rows)
        csv.DictWriter(self._metrics, self._columns, restval="", lineterminator="\n").writerow({"step": step, **values})
        self._metrics.flush()
        if self._board:
            for name, value in values.items():
                self._board.add_scalar(name, float(value), step)
        if self._wandb:
            self._wandb.log(values, step=step)

    def info(self, text: str) -> None:
        """A line for people: stderr and log.txt, the latter with the time."""
        if not self.enabled:
            return
        tqdm.write(text, file=sys.stderr)
        self._log.write(f"{datetime.datetime.now().isoformat(timespec='seconds')} {text}\n")
        self._log.flush()

    def image(self, tag: str, picture: Tensor | np.ndarray, step: int) -> None:
        """A (C, H, W) or (H, W, C) uint8 picture for TensorBoard."""
        if not self.enabled or not self._board:
            return
        array = picture.cpu().numpy() if isinstance(picture, Tensor) else np.asarray(picture)
        if array.dtype != np.uint8 or array.ndim != 3:
            raise ValueError(f"expected a uint8 picture with three axes, got {array.dtype} {array.shape}")
        formats = "CHW" if array.shape[0] in (1, 3) else "HWC"
        self._board.add_image(tag, array, step, dataformats=formats)

    def progress(
        self, items: Iterable[T], total: int | None = None, desc: str | None = None, initial: int = 0
    ) -> Iterator[T]:
        """`items` behind one progress bar; quiet when stderr is not a terminal."""
        quiet = not self.enabled or not sys.stderr.isatty()
        return iter(
            tqdm(items, total=total, desc=desc, initial=initial, disable=quiet, leave=False, dynamic_ncols=True)
        )

    def close(self) -> None:
        """Flush and close every file."""
        for part in (self._metrics, self._log, self._board):
            if part:
                part.close()
        if self._wandb:
            self._wandb.finish()
        self._metrics = self._log = self._board = self._wandb = None

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _number(value: float | int | Tensor | np.generic) -> float | int:
    number = value.item() if isinstance(value, (Tensor, np.generic)) else value
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        raise TypeError(f"expected a number to log, got {type(number).__name__}")
    return number


def _read_rows(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    with open(path, encoding="utf-8", newline="") as file:
        reader = csv.DictReader(file)
        try:
            rows = list(reader)
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{path} is damaged ({error}); move it away to go on") from error
        columns = list(reader.fieldnames or ["step"])
    if "step" not in columns or any(None in row or not (row["step"] or "").lstrip("-").isdigit() for row in rows):
        raise UserError(f"{path} is not a metrics file of this repository; move it away to go on")
    return columns, rows
