"""The text records of a run: log/<prefix>-log-<k>.txt (one line a batch), log/<prefix>-stdout-<k>.txt and the table.

Scalars go to the `Run` as well (metrics.csv, TensorBoard) under `losses/<Stage>_<name>`, the step being the number of
training images seen.
"""

import itertools
import time
from collections import defaultdict
from pathlib import Path

from common.checkpoint import append_text
from common.run import Run


class TextLog:
    """Opens log/<prefix>-log-<k>.txt with the first free k; `enabled=False` (other ranks) writes nothing."""

    def __init__(self, folder: Path, prefix: str, run: Run | None = None, every: int = 100, enabled: bool = True):
        self.run, self.every, self.enabled = run, every, enabled
        self.columns: list[str] = []
        self.start = time.perf_counter()
        self.k, self.headed = 0, False
        if not enabled:
            return
        logs = folder / "log"
        logs.mkdir(parents=True, exist_ok=True)
        self.k = next(k for k in itertools.count() if not (logs / f"{prefix}-log-{k}.txt").exists())
        self.records, self.lines = logs / f"{prefix}-log-{self.k}.txt", logs / f"{prefix}-stdout-{self.k}.txt"
        for path in (self.records, self.lines):
            append_text(path, "")
        self._start_row()

    def _start_row(self) -> None:
        self.sums, self.batches, self.row_start = defaultdict(float), 0, time.perf_counter()

    def say(self, text: str) -> None:
        """A line for people."""
        if not self.enabled:
            return
        append_text(self.lines, f"{text}\n")
        if self.run:
            self.run.info(text)
        else:
            print(text, flush=True)

    def record(self, epoch: int, iter: int, stage: str, scalars: dict[str, float]) -> None:
        """One record of `stage` (Train or Eval); `iter` counts training images. Rows of the table are averages."""
        if not self.enabled:
            return
        new = [name for name in scalars if name not in self.columns]
        if new:
            self.columns += new
            append_text(self.records, f"\nts epoch iter stage {' '.join(self.columns)}\n")
        values = " ".join(str(scalars.get(name, 0)) for name in self.columns)
        seconds = time.perf_counter() - self.start
        append_text(self.records, f"{seconds:.3f} {epoch} {iter} {stage} {values}\n")
        if self.run:
            self.run.log(iter, epoch=epoch, **{f"losses/{stage}_{name}": value for name, value in scalars.items()})
        if stage == "Train":
            self._row(epoch, iter, scalars, seconds)

    def _row(self, epoch: int, iter: int, scalars: dict[str, float], seconds: float) -> None:
        if not self.headed:
            self.say("  ".join(["Time", "E", "Iter(k)", "ms/batch", *scalars]))
            self.headed = True
        for name, value in scalars.items():
            self.sums[name] += value
        self.batches += 1
        if self.batches == self.every:
            pace = (time.perf_counter() - self.row_start) / self.batches * 1000
            means = "  ".join(f"{self.sums[name] / self.batches:.4f}" for name in scalars)
            self.say(f"{seconds:.0f}s  {epoch}  {iter / 1000:.1f}  {pace:.1f}  {means}")
            self._start_row()

    def __enter__(self) -> "TextLog":
        return self

    def __exit__(self, *_) -> None:
        """Every line is on the disk already."""
