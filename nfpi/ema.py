"""Exponential moving averages of a model's weights, with the semantics of the NFPI training runs.

`PowerEma` is the average that the runs use; `KarrasEma` and `posthoc_weights` follow Karras et al., "Analyzing and
improving the training dynamics of diffusion models" (CVPR 2024), for a profile that can be chosen after training.
"""

import copy
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn


class PowerEma(nn.Module):
    """Shadow weights with decay 1 - (1 + e/inv_gamma)^(-power), e the updates since the start, clamped to
    [min_value, beta].

    `update` is called after every optimiser step. The first calls (up to and including number `update_after_step`) copy
    the model; the next one copies once more and marks the average as initialised. Afterwards floating-point parameters
    and buffers move by (1 - decay) towards the model's, except names with a prefix in `ignore`. Integer buffers are
    copied with the model.
    """

    def __init__(
        self,
        model: nn.Module,
        beta: float = 0.9999,
        update_after_step: int = 0,
        update_every: int = 1,
        power: float = 2 / 3,
        inv_gamma: float = 1.0,
        min_value: float = 0.0,
        ignore: Sequence[str] = (),
    ):
        super().__init__()
        self.ema_model = copy.deepcopy(model).requires_grad_(False)
        self.beta, self.update_after_step, self.update_every = beta, update_after_step, update_every
        self.power, self.inv_gamma, self.min_value, self.ignore = power, inv_gamma, min_value, tuple(ignore)
        self.register_buffer("step", torch.tensor(0))
        self.register_buffer("initted", torch.tensor(False))

    @property
    def initialised(self) -> bool:
        """Whether the shadow is an average yet (evaluation uses it from then on)."""
        return bool(self.initted)

    def decay(self) -> float:
        """The decay of the most recent update."""
        elapsed = max(int(self.step) - self.update_after_step - 1, 0)
        if elapsed <= 0:
            return 0.0
        # single precision, as the published runs keep the counter
        value = 1 - (1 + torch.tensor(elapsed / self.inv_gamma, dtype=torch.float32)) ** -self.power
        return min(max(float(value), self.min_value), self.beta)

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Count one step of `model`, and move the shadow when it is due."""
        step = int(self.step)
        self.step += 1
        if step % self.update_every:
            return
        if step <= self.update_after_step:
            self.copy_from(model)
            return
        if not self.initialised:
            self.copy_from(model)
            self.initted.fill_(True)
        shadow, online = _pairs(self.ema_model, model, self.ignore)
        torch._foreach_lerp_(shadow, online, 1 - self.decay())

    @torch.no_grad()
    def copy_from(self, model: nn.Module) -> None:
        """The shadow becomes the model."""
        self.ema_model.load_state_dict(model.state_dict())


class KarrasEma(nn.Module):
    """Shadow weights with the power-function profile beta_t = (1 - 1/(t + 1))^(1 + gamma), t = 1, 2, ... updates.

    Karras et al. (algorithm 1) write 1 - 1/t, whose first update copies the model; here the model of the constructor
    counts as the first.
    """

    def __init__(self, model: nn.Module, gamma: float):
        super().__init__()
        self.ema_model = copy.deepcopy(model).requires_grad_(False)
        self.gamma = gamma
        self.register_buffer("step", torch.tensor(0))

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Count one step of `model` and move the shadow."""
        self.step += 1
        # single precision, as the published runs keep the counter
        move = float(1 - (1 - 1 / (self.step.float() + 1)) ** (1 + self.gamma))
        shadow, online = _pairs(self.ema_model, model, ())
        torch._foreach_lerp_(shadow, online, move)


def sigma_rel_to_gamma(sigma_rel: float) -> float:
    """The exponent gamma whose profile has relative width `sigma_rel`: the largest real root of
    g^3 + 7 g^2 + (16 - s) g + 12 - s, s = sigma_rel^-2 (Karras et al., algorithm 2).
    """
    s = sigma_rel**-2
    roots = np.roots([1, 7, 16 - s, 12 - s])
    return float(roots[np.isreal(roots)].real.max())


def posthoc_weights(
    times: np.ndarray, gammas: np.ndarray, target_times: np.ndarray, target_gammas: np.ndarray
) -> np.ndarray:
    """Least-squares coefficients (snapshots, targets) that build averages of other profiles from stored ones.

    Solves A w = b with inner products of the power profiles (Karras et al., algorithm 3).
    """

    def products(t_a, gamma_a, t_b, gamma_b):
        t_a, gamma_a = np.asarray(t_a, np.float64)[:, None], np.asarray(gamma_a, np.float64)[:, None]
        t_b, gamma_b = np.asarray(t_b, np.float64)[None], np.asarray(gamma_b, np.float64)[None]
        ratio = (t_a / t_b) ** np.where(t_a < t_b, gamma_b, -gamma_a)
        return (gamma_a + 1) * (gamma_b + 1) * ratio / ((gamma_a + gamma_b + 1) * np.maximum(t_a, t_b))

    return np.linalg.solve(products(times, gammas, times, gammas), products(times, gammas, target_times, target_gammas))


def _pairs(shadow: nn.Module, model: nn.Module, ignore: tuple[str, ...]) -> tuple[list[Tensor], list[Tensor]]:
    """The floating-point tensors of both models, in one order, without the ignored names."""
    online = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    names = {**dict(shadow.named_parameters()), **dict(shadow.named_buffers())}
    kept = [n for n, t in names.items() if t.is_floating_point() and not n.startswith(ignore or ("\0",))]
    return [names[n] for n in kept], [online[n].detach().to(names[n]) for n in kept]
