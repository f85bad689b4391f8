"""What every training loop repeats: the folder and its lock, resuming, the place in the data, stop signals, saving.

    with Training(folder, "toy", options, dist, resume=options.resume) as training:
        model, optimizer = ...
        training.restore(model=model, optimizer=optimizer)
        for images, labels in training.steps(batches, epochs=options.epochs):
            loss = ...
            loss.backward()
            training.check(loss, model)
            optimizer.step()
            if training.every(options.log_interval):
                training.run.log(training.step, loss=loss)

A run stopped at any moment and resumed is the run that was never stopped, to the bit on the same machine: the order of
the data is a function of seed and epoch, and the checkpoint holds the parts, the place in the data (in images), and the
random numbers.
"""

import fcntl
import json
import os
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.batches import Batches
from common.checkpoint import load_into, load_optimizer, load_state, read_json, restore_rng, rng_state, save_state
from common.errors import NonFiniteError, UserError
from common.launch import Distributed, StopSignal, check_finite
from common.options import Options, check_resume
from common.run import Run

POLL = 10  # steps between two questions to the other processes whether one of them was told to stop
FINITE_EVERY = 50  # steps between checks of the loss on a GPU, where reading it waits for the device
PROBE_STEPS, PROBE_WARM, PROBE_SECONDS = 20, 3, 60.0  # of a probe: steps that count, steps before them, time at most


@dataclass(frozen=True)
class Place:
    """Where a training stands: finished steps, the running epoch (from 0), and its images that were used already."""

    step: int = 0
    epoch: int = 0
    images: int = 0


class Training:
    """One training run in `folder`; see the module's docstring. Attributes:

    state       what the checkpoint held (a dict), or None where the run starts
    extra       numbers and tensors of the caller that are saved beside the parts, {} at the start
    run         the record of the run (`common.run.Run`)
    step        in the loop: the number of the step under way, from 1; epoch: its epoch, from 0
    epoch_ends  in the loop: whether this is the last batch of the epoch
    """

    def __init__(
        self,
        folder: str | Path,
        kind: str,
        options: Options,
        dist: Distributed,
        *,
        resume: bool | str = False,
        overwrite: bool = False,
        checkpoint: str | Path | None = None,
        read: Callable[[Path], dict[str, Any]] | None = None,
        place: Callable[[Mapping[str, Any]], Place] | None = None,
        saved_options: Callable[[Mapping[str, Any]], Mapping[str, Any]] | None = None,
        last_row: Callable[[Mapping[str, Any]], int] | None = None,
        tensorboard: bool = True,
        wandb: str | None = None,
    ):
        """Lock the folder, find the state, compare the options, open the record.

        `resume`: True goes on from `checkpoint` (default <folder>/checkpoint.pt), "auto" does so where there is one.
        `read`, `place`, `saved_options` and `last_row` serve papers whose checkpoints have a form of their own: the
        state in a file; the place, the options, and the last row of the record (default: the step) in a state. Raises
        UserError, before anything is written, when another process trains in the folder, the folder holds a run and
        neither resume nor overwrite was asked, there is nothing to resume, or an option changed that a resumed run may
        not change.
        """
        self.folder, self.kind, self.options, self.dist = Path(folder), kind, options, dist
        self.checkpoint = Path(checkpoint or self.folder / "checkpoint.pt")
        self.step, self.epoch, self.epoch_ends = 0, 0, False
        self.state: dict[str, Any] | None = None
        self.extra: dict[str, Any] = {}
        self._parts: dict[str, Any] = {}
        self._lock = FolderLock(self.folder) if dist.is_main else None
        try:
            if resume and (resume is True or self.checkpoint.exists()):
                self.state = (read or (lambda path: load_state(path, kind)))(self.checkpoint)
            elif resume == "auto":  # stopped before its first checkpoint: nothing is lost by starting again
                overwrite = True
            changes = self._changes(saved_options or (lambda state: state["options"]), resume)
            self.place = Place()
            if self.state is not None:
                self.place = (place or (lambda state: Place(**state["place"])))(self.state)
            self.step, self.epoch = self.place.step, self.place.epoch
            self._next, self._before = self.place, self.place
            self._saved_at = -1 if self.state is None else self.step
            row = last_row(self.state) if last_row and self.state is not None else self.step
            self.run = Run(
                self.folder, options.as_dict(), resume=self.state is not None, resume_step=row,
                overwrite=overwrite, tensorboard=tensorboard, wandb=wandb, enabled=dist.is_main,
            )  # fmt: skip
        except BaseException:
            self._unlock()
            raise
        for change in changes:
            self.run.info(f"changed {change}")

    def _changes(
        self, saved_options: Callable[[Mapping[str, Any]], Mapping[str, Any]], resume: bool | str
    ) -> list[str]:
        if self.state is not None:
            return check_resume(saved_options(self.state), self.options, self.checkpoint)
        record = self.folder / "config.json"
        if resume == "auto" and record.is_file():
            return check_resume(read_json(record), self.options, self.folder)
        return []

    def restore(self, **parts: Any) -> None:
        """The parts whose state is saved under their names (modules, optimisers, whatever has `state_dict`), given the
        state of the checkpoint where the run goes on. Raises UserError for one that does not fit.
        """
        self._parts |= parts
        if self.state is None:
            return
        for name, part in parts.items():
            if name not in self.state:
                raise UserError(f"{self.checkpoint} holds no {name}; it cannot be resumed")
            if isinstance(part, nn.Module):
                load_into(part, self.state[name], self.checkpoint)
            elif isinstance(part, torch.optim.Optimizer):
                load_optimizer(part, self.state[name], self.checkpoint)
            else:
                part.load_state_dict(self.state[name])
        self.extra = dict(self.state.get("extra", {}))

    def steps(self, batches: Batches, *, epochs: int | None = None, last: int | None = None) -> Iterator[Any]:
        """The batches from the run's place on, up to `epochs` epochs or step `last`.

        SIGTERM or Ctrl-C: the step under way is finished, the state saved, KeyboardInterrupt raised (exit code 130). At
        the end the state is saved.
        """
        share = batches.batch_size
        if self.place.images % share:
            raise UserError(
                f"{self.checkpoint} stands at image {self.place.images} of an epoch, no multiple of the batch size "
                f"{share}; resume with the batch size that it was made with"
            )
        if self.state is not None:
            restore_rng(self.state["rng"], self.dist.device)
        total = last if last is not None else epochs * len(batches)
        with StopSignal() as stop:
            rest = timed(self._batches(batches, total), total, self.dist.device)
            bar = self.run.progress(rest, total=total, initial=self.step)
            for batch in bar:
                yield batch
                if self._stops(stop):
                    if self._saved_at != self.step:
                        self.save()
                    self.run.info(f"stopped at step {self.step} of {total}; resume to go on")
                    raise KeyboardInterrupt
        if self._saved_at != self.step:
            self.save()

    def _batches(self, batches: Batches, total: int) -> Iterator[Any]:
        share = batches.batch_size
        while self.step < total:
            self.epoch, first = self._next.epoch, self._next.images // share
            for index, batch in enumerate(batches.epoch(self.epoch, first), first):
                self.step, self.epoch_ends = self.step + 1, index + 1 == len(batches)
                self._before = self._next
                self._next = Place(self.step, self.epoch + 1, 0) if self.epoch_ends else \
                    Place(self.step, self.epoch, (index + 1) * share)  # fmt: skip
                yield batch
                if self.step == total:
                    return

    def _stops(self, stop: StopSignal) -> bool:
        if self.dist.world > 1 and self.step % POLL and not self.epoch_ends:
            return False
        return self.dist.any(stop)

    def every(self, interval: int) -> bool:
        """Whether the step under way is a multiple of `interval`."""
        return self.step % interval == 0

    def check(self, loss: Tensor, modules: nn.Module | Iterable[nn.Module] = ()) -> None:
        """Raise NonFiniteError for a loss that is not finite, keeping the state before the step in crash.pt; call it
        before the optimiser's step. On a GPU it looks every 50 steps only.
        """
        if loss.device.type != "cpu" and self.step % FINITE_EVERY:
            return
        if not self.dist.any(not bool(torch.isfinite(loss.detach()).all())):
            return
        crash = self.checkpoint.with_name(f"crash{self.checkpoint.suffix or '.pt'}")
        self._write(crash, self._before)
        try:
            check_finite(float("nan"), self.step, modules)
        except NonFiniteError as error:
            raise NonFiniteError(f"{error}; the state before this step is kept in {crash}") from None

    def save(self, path: str | Path | None = None) -> None:
        """Write the full state, as of after the step under way, to `path` (default: the checkpoint)."""
        self._write(Path(path or self.checkpoint), self._next)
        if path is None:
            self._saved_at = self.step

    def full_state(self) -> dict[str, Any]:
        """What `save` writes: the parts, the options, the place in the data, the random numbers."""
        parts = {name: part.state_dict() for name, part in self._parts.items()}
        own = {"options": self.options.as_dict(), "place": asdict(self._next), "rng": rng_state(), "extra": self.extra}
        return parts | own

    def _write(self, path: Path, place: Place) -> None:
        if self.dist.is_main:
            save_state(path, self.kind, **self.full_state() | {"place": asdict(place)})
        self.dist.barrier()

    def _unlock(self) -> None:
        if self._lock:
            self._lock.release()

    def __enter__(self) -> "Training":
        return self

    def __exit__(self, *_) -> None:
        self.run.close()
        self._unlock()


def timed(batches: Iterable[Any], steps: int, device: torch.device) -> Iterator[Any]:
    """The batches of a training of `steps` steps in all. Where the environment variable STRUCTURED_LATENTS_PROBE names
    a file, the first 20 steps are timed and the training ends with KeyboardInterrupt, nothing saved: the file holds
    `seconds_a_step`, the median on the clock, which an evaluation between two steps does not move, and `steps`.
    """
    path = os.environ.get("STRUCTURED_LATENTS_PROBE") if os.environ.get("RANK", "0") == "0" else None
    begin, ends = time.monotonic(), []
    for batch in batches:
        yield batch
        if path is None:
            continue
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        ends.append(time.monotonic())
        if len(ends) > PROBE_WARM + PROBE_STEPS or (len(ends) > PROBE_WARM and ends[-1] - begin > PROBE_SECONDS):
            break
    counted = ends[min(PROBE_WARM, len(ends) - 2) :] if len(ends) > 1 else []
    if counted:
        seconds = statistics.median(after - before for before, after in pairwise(counted))
        Path(path).write_text(json.dumps({"seconds_a_step": seconds, "steps": steps}))
        raise KeyboardInterrupt


class FolderLock:
    """Holds a run folder (made where it is missing) until `release` or the end of the process.

    Raises UserError naming the process that holds it already.
    """

    def __init__(self, folder: str | Path):
        self.folder, self.path = Path(folder), Path(folder) / ".lock"
        self._made = [one for one in (self.folder, *self.folder.parents) if not one.exists()]
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            while not self._acquire():
                pass
        except OSError as error:
            raise UserError(f"cannot write in the run folder {folder}: {error.strerror}") from error

    def _acquire(self) -> bool:
        self._handle = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.read(self._handle, 100).decode(errors="replace") or "unknown"
            os.close(self._handle)
            raise UserError(
                f"process {holder} is at work in {self.folder}; wait until it ends, or name another folder"
            ) from None
        try:  # the holder before may have removed the file between our opening and our locking it
            if os.path.samestat(os.fstat(self._handle), os.stat(self.path)):
                os.ftruncate(self._handle, 0)
                os.write(self._handle, str(os.getpid()).encode())
                return True
        except FileNotFoundError:
            pass
        os.close(self._handle)
        return False

    def release(self) -> None:
        """Let others in, and leave no trace: neither the lock nor folders that were made and stayed empty."""
        self.path.unlink(missing_ok=True)
        os.close(self._handle)
        for folder in self._made:
            try:
                folder.rmdir()
            except OSError:  # something was written there
                break
