"""The averages of Karras et al., "Analyzing and improving the training dynamics of diffusion models" (CVPR 2024), which
the reference vectors hold beside the average that NFPI uses.
"""

import copy

import numpy as np
import torch
from torch import nn


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
        shadow, online = list(self.ema_model.parameters()), list(model.parameters())
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
