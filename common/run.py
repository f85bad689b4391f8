"""One folder a run: config.json, metrics.csv, TensorBoard events, log.txt, and a progress bar.

`metrics.csv` holds no wall-clock column, so that two runs with one seed give identical files; times go to log.txt and
TensorBoard.
"""

import csv
import datetime
import io
import os
import socket
import sys
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from torch import Tensor
from tqdm import tqdm

from common.checkpoint import append_text, atomic_write, whole_lines, write_json
from common.errors import UserError, disk_full

T = TypeVar("T")


class Run:
    """The record of one run in `folder`.

    Raises UserError when the folder already holds a run and neither `resume` nor `overwrite` was asked, when the folder
    cannot be written, and when `wandb` is asked but not installed, or does not start. `enabled=False` (ranks other than
    0) writes nothing.
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
        self._board = self._wandb = None
        if not enabled:
            return
        old = [self.folder / name for name in ("config.json", "metrics.csv")]
        replaces = not resume and any(path.exists() for path in old)
        if replaces and not overwrite:
            raise UserError(f"{self.folder} already holds a run; resume it, ask for overwrite, or name another folder")
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot make the run folder {self.folder}: {error.strerror}") from error
        if wandb:
            self._wandb = _wandb_run(wandb, config, self.folder)
        if replaces:
            for path in (*old, self.folder / "log.txt", *(self.folder / "tb").glob("events.out.tfevents.*")):
                path.unlink(missing_ok=True)
        write_json(self.folder / "config.json", config)
        self._open_metrics(resume_step if resume else None)
        if tensorboard:
            self._board = Board(self.folder / "tb", resume_step if resume else None)

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
        with atomic_write(self.folder / "metrics.csv") as file:
            file.write(text.getvalue().encode())

    def log(self, step: int, **scalars: float | Tensor) -> None:
        """One row of metrics.csv and one TensorBoard point a scalar; a name that is new adds a column."""
        if not self.enabled:
            return
        values = {name: _number(value) for name, value in scalars.items()}
        new = [name for name in values if name not in self._columns]
        if new:
            rows = _read_rows(self.folder / "metrics.csv")[1]
            self._columns += new
            self._write_all(rows)
        line = io.StringIO()
        csv.DictWriter(line, self._columns, restval="", lineterminator="\n").writerow({"step": step, **values})
        append_text(self.folder / "metrics.csv", line.getvalue())
        if self._board:
            self._board.scalars(values, step)
        if self._wandb:
            self._wandb.log(values, step=step)

    def info(self, text: str) -> None:
        """A line for people: stderr and log.txt, the latter with the time."""
        if not self.enabled:
            return
        tqdm.write(text, file=sys.stderr)
        append_text(self.folder / "log.txt", f"{datetime.datetime.now().isoformat(timespec='seconds')} {text}\n")

    def image(self, tag: str, picture: Tensor | np.ndarray, step: int) -> None:
        """A (C, H, W) or (H, W, C) uint8 picture for TensorBoard."""
        if not self.enabled or not self._board:
            return
        array = picture.cpu().numpy() if isinstance(picture, Tensor) else np.asarray(picture)
        if array.dtype != np.uint8 or array.ndim != 3:
            raise ValueError(f"expected a uint8 picture with three axes, got {array.dtype} {array.shape}")
        formats = "CHW" if array.shape[0] in (1, 3) else "HWC"
        self._board.image(tag, array, formats, step)

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
        if self._board:
            self._board.close()
        if self._wandb:
            self._wandb.finish()
        self._board = self._wandb = None

    def __enter__(self) -> "Run":
        return self

    def __exit__(self, *_) -> None:
        self.close()


class Board:
    """TensorBoard events, written by the caller's own thread.

    tensorboardX's SummaryWriter writes from a thread behind a queue of ten: on a full disk the thread ends with a
    traceback and the training waits for the queue for ever.
    """

    FLUSH_SECONDS = 10.0

    def __init__(self, folder: Path, resume_step: int | None = None):
        from tensorboardX import summary
        from tensorboardX.proto import event_pb2
        from tensorboardX.record_writer import RecordWriter

        self._summary, self._proto = summary, event_pb2
        self._name = folder / f"events.out.tfevents.{time.time():.6f}.{socket.gethostname()}.{os.getpid()}"
        self._flushed, self._failed = time.monotonic(), False
        with self._writing():
            folder.mkdir(parents=True, exist_ok=True)
            self._file = RecordWriter(str(self._name))
        self._add(file_version="brain.Event:2")
        if resume_step is not None:  # TensorBoard hides what an interrupted run wrote from this step on
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._add(step=resume_step + 1, session_log=start)

    @contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._failed = True
            what = "the disk is full (or over its quota)" if disk_full(error) else error.strerror
            raise UserError(f"cannot write {self._name}: {what}") from error

    def _add(self, **content: Any) -> None:
        event = self._proto.Event(wall_time=time.time(), **content)
        with self._writing():
            self._file.write(event.SerializeToString())
            if time.monotonic() - self._flushed > self.FLUSH_SECONDS:
                self._file.flush()
                self._flushed = time.monotonic()

    def scalars(self, values: dict[str, float], step: int) -> None:
        """A point of every curve."""
        for name, value in values.items():
            self._add(summary=self._summary.scalar(name, float(value)), step=step)

    def image(self, tag: str, array: np.ndarray, formats: str, step: int) -> None:
        """A uint8 picture."""
        self._add(summary=self._summary.image(tag, array, dataformats=formats), step=step)

    def close(self) -> None:
        """Write what is held back; a disk that was full before is not reported again."""
        failed = self._failed
        try:
            with self._writing():
                self._file.close()
        except UserError:
            if not failed:
                raise

    def __enter__(self) -> "Board":
        return self

    def __exit__(self, *_) -> None:
        self.close()


def _wandb_run(project: str, config: dict[str, Any], folder: Path) -> Any:
    """A run of its own in `project`; one that is open already, as a flow's while its CNNs train, stays open."""
    try:
        import wandb
    except ImportError:
        raise UserError(
            "wandb was asked for but is not installed: pip install wandb, or leave the option out"
        ) from None
    try:
        return wandb.init(project=project, config=config, dir=str(folder.absolute()), reinit="create_new")
    except wandb.Error as error:
        why = str(error).partition("\n")[0].rstrip(".")
        raise UserError(
            f"wandb does not start ({why}): log in, set WANDB_MODE=offline, or leave the option out"
        ) from error


def _number(value: float | int | Tensor | np.generic) -> float | int:
    number = value.item() if isinstance(value, (Tensor, np.generic)) else value
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        raise TypeError(f"expected a number to log, got {type(number).__name__}")
    return number


def _read_rows(path: Path) -> tuple[list[str], list[dict[str, str]]]:
    try:
        reader = csv.DictReader(io.StringIO(whole_lines(path), newline=""))
        rows, columns = list(reader), list(reader.fieldnames or ["step"])
    except (csv.Error, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is damaged ({error}); move it away to go on") from error
    if "step" not in columns or any(None in row or not (row["step"] or "").lstrip("-").isdigit() for row in rows):
        raise UserError(f"{path} is not a metrics file of this repository; move it away to go on")
    return columns, rows
