"""Learning rate, loss weights and early stopping as small objects whose whole state is a few numbers."""

from typing import Any

import numpy as np
import torch
from torch.optim import lr_scheduler

from common.errors import UserError

PLATEAU_FACTOR = 1.11
PLATEAU_TOLERANCE = 0.001
WARMUP_START = 1e-7


def warmup_rates(end: float, epochs: int) -> np.ndarray:
    """Learning rates of the first `epochs` epochs: 10^linspace(-7, log10(end), epochs); the last one is `end`."""
    return np.logspace(np.log10(WARMUP_START), np.log10(end), epochs) if epochs > 0 else np.empty(0)


def parse_scheduler_args(words: list[str]) -> dict[str, Any]:
    """`k=v` words to a dict; numbers become int or float, `a,b,c` a list. Raises UserError on a word without `=`."""

    def value(text: str) -> Any:
        if "," in text:
            return [value(part) for part in text.split(",") if part]
        for kind in (int, float):
            try:
                return kind(text)
            except ValueError:
                continue
        return text

    parsed = {}
    for word in words:
        key, sign, text = word.partition("=")
        if not sign or not key:
            raise UserError(f"scheduler argument {word!r}: expected name=value")
        parsed[key] = value(text)
        if any(isinstance(one, float) and not np.isfinite(one) for one in np.atleast_1d(parsed[key]).tolist()):
            raise UserError(f"scheduler argument {word!r}: expected a finite number")
    return parsed


def check_scheduler(lr: float, name: str | None, args: list[str]) -> None:
    """Try a few steps of a schedule. Raises UserError for one that fails or leads to a rate below 0."""
    rate = LearningRate(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr), lr, 0, name, args)
    try:
        rates = [rate.current()]
        for _ in range(3):
            rate.step(1.0)
            rates.append(rate.current())
    except (ArithmeticError, TypeError, ValueError, IndexError) as error:
        raise UserError(f"--lr_scheduler {name} with --lr_scheduler_args {' '.join(args)}: {error}") from error
    if not all(isinstance(one, (int, float)) and 0 <= one < 1e12 for one in rates):
        raise UserError(f"--lr_scheduler_args {' '.join(args)}: the learning rate becomes {rates[-1]}")


def _linear_decay(total: float = 100, start: float = 0):
    """LambdaLR's rule here: the factor falls in a line from 1 at step `start` to 0 at step `total`."""
    return lambda step: max(0.0, 1.0 - max(0.0, step - start) / max(1e-12, total - start))


class LearningRate:
    """One rate for an optimiser: warm-up by epoch, then a torch scheduler, times the plateau factor.

    The torch scheduler runs on a private optimiser from lr, starts after the warm-up, and is stepped by `step`.
    `name` is a class of torch.optim.lr_scheduler or None. Raises UserError for arguments the scheduler refuses.
    """

    def __init__(
        self, optimizer: torch.optim.Optimizer, lr: float, warmup_epochs: int, name: str | None = None,
        args: list[str] | tuple[()] = (),
    ):  # fmt: skip
        self.optimizer, self.lr = optimizer, lr
        self.warmup = warmup_rates(lr, warmup_epochs)
        self.plateau, self.epoch = 1.0, 0
        self._shadow = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=lr)
        self._scheduler = self._make(name, parse_scheduler_args(args))
        self._apply()

    def _make(self, name: str | None, args: dict[str, Any]):
        if name is None:
            if args:
                raise UserError("--lr_scheduler_args needs --lr_scheduler")
            return None
        try:
            if name == "LambdaLR":
                return lr_scheduler.LambdaLR(self._shadow, _linear_decay(**args))
            if name == "CyclicLR":
                args.setdefault("cycle_momentum", False)
            if name == "MultiStepLR" and not isinstance(args.get("milestones"), list):
                args["milestones"] = [args["milestones"]]
            if not all(isinstance(step, int) for step in args.get("milestones", ())):
                raise ValueError("milestones must be whole numbers")
            return getattr(lr_scheduler, name)(self._shadow, **args)
        except (TypeError, ValueError, KeyError) as error:
            raise UserError(f"--lr_scheduler {name}: {error}; set --lr_scheduler_args name=value ...") from error

    def current(self) -> float:
        """The rate in force."""
        if self.epoch < len(self.warmup):
            return float(self.warmup[self.epoch])
        return self._shadow.param_groups[0]["lr"] * self.plateau

    def _apply(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.current()

    def start_epoch(self, epoch: int) -> None:
        """Tell the epoch (from 0) that begins."""
        self.epoch = epoch
        self._apply()

    def step(self, metric: float) -> None:
        """One step of the scheduler; nothing happens during the warm-up. `metric` serves ReduceLROnPlateau."""
        if self._scheduler is None or self.epoch < len(self.warmup):
            return
        self._shadow.step()
        if isinstance(self._scheduler, lr_scheduler.ReduceLROnPlateau):
            self._scheduler.step(metric)
        else:
            self._scheduler.step()
        self._apply()

    def plateaued(self) -> None:
        """Divide the rate by 1.11, for good (the validation total has stopped moving)."""
        self.plateau /= PLATEAU_FACTOR
        self._apply()

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        inner = {}
        if self._scheduler is not None:
            kept = (int, float, str, bool, list, type(None))
            inner = {k: v for k, v in self._scheduler.state_dict().items() if isinstance(v, kept)}
        return {"epoch": self.epoch, "plateau": self.plateau, "lr": self._shadow.param_groups[0]["lr"], "inner": inner}

    def restore(self, state: dict[str, Any], scale: float = 1.0) -> None:
        """Set what `state` returned; `scale` is this run's learning rate over that of the saved one."""
        self.epoch, self.plateau = state["epoch"], state["plateau"]
        if isinstance(self._scheduler, lr_scheduler.CyclicLR):
            scale = 1.0  # its rates are its own arguments
        if self._scheduler is not None:
            self._scheduler.load_state_dict(state["inner"])
        if scale != 1.0 and hasattr(self._scheduler, "base_lrs"):
            self._scheduler.base_lrs = [rate * scale for rate in self._scheduler.base_lrs]
        self._shadow.param_groups[0]["lr"] = state["lr"] * scale
        self._apply()


class LinearWeight:
    """A loss weight that moves in a line from `start` to `target_value` in `epochs` steps, then stays."""

    @classmethod
    def of(cls, start: float, name: str | None, words: list[str]) -> "LinearWeight | None":
        """The schedule that --w_recon_scheduler and its arguments name, or None. Raises UserError."""
        args = parse_scheduler_args(words)
        if name is None:
            if args:
                raise UserError("--w_recon_scheduler_args needs --w_recon_scheduler LinearScheduler")
            return None
        numbers = all(isinstance(value, (int, float)) and 0 <= value <= 1e12 for value in args.values())
        if set(args) != {"target_value", "epochs"} or not numbers or not args["epochs"] > 0:
            raise UserError("--w_recon_scheduler_args: expected target_value=... epochs=..., a weight of at least 0 "
                            "and a number of steps above 0")  # fmt: skip
        return cls(start, **args)

    def __init__(self, start: float, target_value: float, epochs: float):
        self.start, self.target, self.epochs, self.steps = start, target_value, epochs, 0

    def value(self) -> float:
        """The weight after the steps so far."""
        low, high = sorted((self.start, self.target))
        return min(high, max(low, self.start + self.steps * (self.target - self.start) / self.epochs))

    def step(self) -> float:
        """Advance by one and return the new weight."""
        self.steps += 1
        return self.value()


class EarlyStopping:
    """The published stopping rule, fed once a validation with (rec + kld, latent, bce); see `update`.

    `supervised` False means masking_fact = 0: then the latent loss does not count (the published rule let the undefined
    one raise the counter), and 5 bad validations end the run instead of 10.
    """

    def __init__(self, latent_weight: float, label_weight: float, supervised: bool):
        self.latent_weight, self.label_weight = latent_weight, label_weight
        self.supervised = self.count_latent = supervised
        self.wait, self.save = 0, True
        self.total: list[float] = []
        self.latent: list[float] = []
        self.bce: list[float] = []

    def record(self, rec_kld: float, latent: float, bce: float) -> None:
        """Append one validation without judging it (before the rule becomes active)."""
        self.latent.append(latent)
        self.bce.append(bce)
        self.total.append(rec_kld + latent * self.latent_weight + bce * self.label_weight)

    @property
    def plateaued(self) -> bool:
        """Whether the total moved by less than 0.1 % since the validation before."""
        if len(self.total) < 2:
            return False
        now, before = self.total[-1], self.total[-2]
        return abs(now - before) < PLATEAU_TOLERANCE * before

    def update(self) -> bool:
        """Judge the last recorded validation: sets `wait` and `save`, returns whether to stop.

        A rise of the class loss or of the latent loss adds 1 to `wait` and stops the saving; falling below the mean of
        the validations t-4 .. t-2 resets both.
        """
        if len(self.bce) < 2:
            return False
        latent, bce = self.latent, self.bce
        if bce[-1] > bce[-2] or (self.count_latent and latent[-1] > latent[-2]):
            self.wait, self.save = self.wait + 1, False
        if self.wait > 0 and len(bce) >= 5:
            recovered = bce[-1] < np.mean(bce[-5:-2])
            if self.supervised:
                recovered = recovered and latent[-1] < np.mean(latent[-5:-2])
            if recovered:
                self.wait, self.save = 0, True
        return self.exhausted

    @property
    def exhausted(self) -> bool:
        """Whether there were too many bad validations."""
        return self.wait > (10 if self.supervised else 5)

    def state(self) -> dict[str, Any]:
        """Plain values for a checkpoint."""
        return {"wait": self.wait, "save": self.save, "total": self.total, "latent": self.latent, "bce": self.bce}

    def restore(self, state: dict[str, Any]) -> None:
        """Set what `state` returned."""
        self.wait, self.save = state["wait"], state["save"]
        self.total, self.latent, self.bce = list(state["total"]), list(state["latent"]), list(state["bce"])
