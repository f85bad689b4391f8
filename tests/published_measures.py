"""Measures that only the reference vectors need: they were published, and nothing here trains or reports by them."""

import math
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from glancenet.losses import pairwise_log_density


def hard_accuracy(scores: Tensor, y: Tensor) -> Tensor:
    """Share of examples whose largest score (B, C) is that of class y (B,)."""
    return (scores.argmax(1) == y).to(torch.get_default_dtype()).mean()


def balanced_accuracy(scores: Tensor, y: Tensor) -> Tensor:
    """Mean over the classes present in y of their share of right answers."""
    right = (scores.argmax(1) == y).to(torch.float64)
    return torch.stack([right[y == c].mean() for c in y.unique()]).mean()


def soft_f1(probabilities: Tensor, y: Tensor, eps: float = 1e-7) -> Tensor:
    """1 - mean over classes of the F1 score with probabilities in place of decisions (B, C)."""
    truth = F.one_hot(y, probabilities.shape[1]).to(probabilities.dtype)
    tp = (truth * probabilities).sum(0)
    fp = ((1 - truth) * probabilities).sum(0)
    fn = (truth * (1 - probabilities)).sum(0)
    precision, recall = tp / (tp + fp + eps), tp / (tp + fn + eps)
    f1 = (2 * precision * recall / (precision + recall + eps)).clamp(min=eps, max=1 - eps)
    return 1 - f1.mean()


def multi_label_accuracy(logits: Tensor, codes: Tensor, sizes: list[int]) -> Tensor:
    """Mean over the label groups of their hard accuracy."""
    groups = logits.split(sizes, dim=1)
    return torch.stack([hard_accuracy(group, codes[:, i]) for i, group in enumerate(groups)]).mean()


def softmax_entropy(logits: Tensor) -> Tensor:
    """Mean over the batch of the entropy (nats) of softmax(logits)."""
    return -(logits.softmax(1) * logits.log_softmax(1)).sum(1).mean()


class KLParts(NamedTuple):
    """Mean over the batch of mutual information, total correlation, dimension-wise KL, their sum; (B,) log
    densities.
    """

    mi: Tensor
    tc: Tensor
    dwkl: Tensor
    kl: Tensor
    log_qz: Tensor
    log_prod_qzi: Tensor


def importance_weights(batch: int, dataset_size: int, estimator: str) -> Tensor:
    """Log weights (B_j, B_i) of the minibatch estimates of q(z) (Chen et al. 2018, appendix C).

    `mws`: 1/(N B) everywhere. `mss`: in row j 1/N on i = j, (N - M)/(N M) on i = j + 1 (mod B), 1/M elsewhere, M = B
    - 1.
    """
    if estimator == "mws":
        return torch.full((batch, batch), -math.log(dataset_size * batch), dtype=torch.float64)
    if estimator != "mss":
        raise ValueError(f"estimator {estimator!r}: expected 'mws' or 'mss'")
    m = batch - 1
    weights = torch.full((batch, batch), 1 / m, dtype=torch.float64)
    rows = torch.arange(batch)
    weights[rows, rows] = 1 / dataset_size
    weights[rows, (rows + 1) % batch] = (dataset_size - m) / (dataset_size * m)
    return weights.log()


def kl_decomposition(z: Tensor, mu: Tensor, logvar: Tensor, dataset_size: int, estimator: str = "mws") -> KLParts:
    """KL = mutual information + total correlation + dimension-wise KL, estimated within one batch."""
    weights = importance_weights(len(z), dataset_size, estimator).to(z)
    density = pairwise_log_density(z, mu, logvar)
    log_qz = (weights + density.sum(2)).logsumexp(1)
    log_prod_qzi = (weights[:, :, None] + density).logsumexp(1).sum(1)
    log_q_given_x = pairwise_diagonal(density).sum(1)
    log_pz = (-0.5 * (math.log(2 * math.pi) + z.square())).sum(1)
    mi, tc = (log_q_given_x - log_qz).mean(), (log_qz - log_prod_qzi).mean()
    dwkl = (log_prod_qzi - log_pz).mean()
    return KLParts(mi, tc, dwkl, mi + tc + dwkl, log_qz, log_prod_qzi)


def pairwise_diagonal(density: Tensor) -> Tensor:
    """The entries i = j of (B, B, D): (B, D)."""
    return density.diagonal(dim1=0, dim2=1).transpose(0, 1)


def exponential_rate(epoch: int, lr: float, gamma: float, warmup: np.ndarray, decay_start: int | None = None) -> float:
    """The rate of `epoch` (from 0): the warm-up, then lr gamma^(epoch - decay_start).

    `decay_start` is the number of warm-up epochs unless given. The published loop edits the rate of a running
    scheduler:
    that is decay_start = warm-up - 1 with a chainable scheduler (today's torch) and 0 with the closed form (torch 1.1).
    """
    if epoch < len(warmup):
        return float(warmup[epoch])
    return lr * gamma ** (epoch - (len(warmup) if decay_start is None else decay_start))
