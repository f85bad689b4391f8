"""The exponential moving average of the flow's weights, with the semantics of the NFPI training runs."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from common.checkpoint import load_into
from common.errors import UserError


class PowerEma:
    """Shadow weights with decay 1 - (1 + e)^(-power), e the updates since the start, at most `beta`.

    `update` is called after every optimiser step. The first calls (up to and including number `update_after_step`) copy
    the model; the next one copies once more and marks the average as initialised. Afterwards floating-point parameters
    and buffers move by (1 - decay) towards the model's, except names with a prefix in `ignore`. The counter lives on
    the host: no call waits for the device.
    """

    def __init__(
        self, model: nn.Module, beta: float = 0.9999, update_after_step: int = 0, update_every: int = 1,
        power: float = 2 / 3, ignore: Sequence[str] = (),
    ):  # fmt: skip
        self.ema_model = copy.deepcopy(model).requires_grad_(False)
        self.beta, self.update_after_step, self.update_every = beta, update_after_step, update_every
        self.power, self.ignore = power, tuple(ignore)
        self.step, self.initialised = 0, False  # evaluation uses the average once it is initialised

    def decay(self) -> float:
        """The decay of the most recent update."""
        elapsed = max(self.step - self.update_after_step - 1, 0)
        if not elapsed:
            return 0.0
        count = torch.tensor(float(elapsed), dtype=torch.float32)  # single precision, as in the published runs
        return min(float(1 - (1 + count) ** -self.power), self.beta)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Count one step of `model`, and move the shadow when it is due."""
        step, self.step = self.step, self.step + 1
        if step % self.update_every:
            return
        if step <= self.update_after_step or not self.initialised:
            self.ema_model.load_state_dict(model.state_dict())
            if step <= self.update_after_step:
                return
            self.initialised = True
        shadow, online = _floats(self.ema_model), _floats(model)
        names = [name for name in shadow if not name.startswith(self.ignore or ("\0",))]
        pairs = [shadow[name] for name in names], [online[name].detach().to(shadow[name]) for name in names]
        torch._foreach_lerp_(*pairs, 1 - self.decay())

    def state_dict(self) -> dict[str, Tensor]:
        """The shadow's entries as ema_model.<name>, step, initted: the published names."""
        weights = {f"ema_model.{name}": value for name, value in self.ema_model.state_dict().items()}
        return weights | {"step": torch.tensor(self.step), "initted": torch.tensor(self.initialised)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what `state_dict` gave. Raises UserError when it does not fit."""
        try:
            step, initialised = int(state["step"]), bool(state["initted"])
            weights = {name.removeprefix("ema_model."): value for name, value in state.items()
                       if name not in ("step", "initted")}  # fmt: skip
        except (KeyError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            raise UserError(f"the state of the weights' average is damaged ({type(error).__name__})") from error
        load_into(self.ema_model, weights, "the state of the weights' average")
        self.step, self.initialised = step, initialised


def _floats(model: nn.Module) -> dict[str, Tensor]:
    """The floating-point parameters and buffers."""
    return {name: value for name, value in [*model.named_parameters(), *model.named_buffers()]
            if value.is_floating_point()}  # fmt: skip
