"""Precision and recall of a generated set: distributions over clusters (PRD) and k-nearest-neighbour manifolds.

Precision: how much of the evaluated set lies where the reference lies (quality). Recall: how much of the reference is
covered by the evaluated set (diversity). A set collapsed onto one mode keeps its precision and loses its recall.

* PRD: Sajjadi et al., "Assessing Generative Models via Precision and Recall", 2018.
* k-NN: Kynkäänniemi et al., "Improved Precision and Recall Metric for Assessing Generative Models", 2019.
"""

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from common.metrics.frechet import check_features
from common.metrics.kernel import feature_tensors, product

_BLOCK = 1024  # rows and columns of a distance block
_EPSILON = 1e-10  # the curve's angles keep this distance from 0 and pi/2


def precision_recall_distribution(
    eval_features,
    ref_features,
    clusters: int = 20,
    angles: int = 1001,
    runs: int = 10,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """PRD curve (precision (angles,), recall (angles,)) of eval_features (n, d) against ref_features (n, d).

    The union is clustered by mini-batch k-means, each set becomes a histogram over the clusters; averaged over `runs`
    clusterings. Run r is seeded with `seed + r`. The sets must have one size, as k-means would otherwise place more
    centres in the larger one. Raises UserError for unequal sizes, fewer samples than clusters and options out of range.
    Source: Sajjadi et al. 2018, algorithm 1 and section 4.1.
    """
    evaluated = check_features(eval_features, "evaluated features")
    reference = check_features(ref_features, "reference features")
    if evaluated.shape[1] != reference.shape[1]:
        raise UserError(f"features of {evaluated.shape[1]} and {reference.shape[1]} dimensions: use one extractor")
    if len(evaluated) != len(reference):
        raise UserError(
            f"PRD compares sets of one size, got {len(evaluated)} evaluated and {len(reference)} reference samples; "
            "take as many of each"
        )
    if runs < 1 or clusters < 1:
        raise UserError(f"PRD: runs={runs}, clusters={clusters}: both must be at least 1")
    _check_angles(angles)
    union = np.concatenate([evaluated, reference])
    if len(union) < clusters:
        raise UserError(f"PRD: {len(union)} samples for {clusters} clusters; use more samples or fewer clusters")
    curves = []
    for run in range(runs):
        labels = _cluster(union, clusters, seed + run)
        histograms = [np.bincount(part, minlength=clusters) / len(part) for part in np.split(labels, [len(evaluated)])]
        curves.append(prd_from_histograms(*histograms, angles))
    precision, recall = np.mean(curves, axis=0)
    return precision, recall


def prd_from_histograms(
    eval_dist: np.ndarray, ref_dist: np.ndarray, angles: int = 1001
) -> tuple[np.ndarray, np.ndarray]:
    """PRD curve of two distributions over the same k states, each (k,) and summing to 1.

    For slope lambda = tan(angle), angles evenly spaced over the open interval (0, pi/2):
    precision = sum_c min(lambda ref_c, eval_c), recall = precision / lambda. Both (angles,), in [0, 1].
    Raises UserError for unequal shapes, angles outside [3, 1e6], or no distributions.
    Source: Sajjadi et al. 2018, theorem 3 and algorithm 1.
    """
    eval_dist, ref_dist = np.asarray(eval_dist, np.float64), np.asarray(ref_dist, np.float64)
    if eval_dist.ndim != 1 or eval_dist.shape != ref_dist.shape:
        raise UserError(f"PRD: histograms of one length expected, got {eval_dist.shape} and {ref_dist.shape}")
    _check_angles(angles)
    slopes = np.tan(np.linspace(_EPSILON, np.pi / 2 - _EPSILON, angles))
    precision = np.minimum(slopes[:, None] * ref_dist, eval_dist).sum(1)
    recall = precision / slopes
    if max(precision.max(), recall.max()) > 1.001 or min(eval_dist.min(), ref_dist.min()) < 0:
        raise UserError("PRD: the histograms must be non-negative and sum to 1")
    return np.clip(precision, 0.0, 1.0), np.clip(recall, 0.0, 1.0)


def _check_angles(angles: int) -> None:
    if not 3 <= angles <= 1_000_000:
        raise UserError(f"PRD: angles={angles}, allowed are 3 to 1000000")


def f_beta(precision: np.ndarray, recall: np.ndarray, beta: float = 1.0) -> np.ndarray:
    """F_beta along a curve; beta > 1 weighs recall, beta < 1 weighs precision. Raises UserError outside [0, 1]."""
    precision, recall = np.asarray(precision, np.float64), np.asarray(recall, np.float64)
    for name, values in (("precision", precision), ("recall", recall)):
        if not (np.isfinite(values).all() and values.min() >= 0 and values.max() <= 1):
            raise UserError(f"{name} must lie in [0, 1]")
    if beta <= 0:
        raise UserError(f"beta={beta}: it must be positive")
    return (1 + beta**2) * precision * recall / (beta**2 * precision + recall + _EPSILON)


def f_beta_pair(precision: np.ndarray, recall: np.ndarray, beta: float = 8.0) -> tuple[float, float]:
    """(max F_beta, max F_{1/beta}) over a PRD curve: the recall summary, then the precision summary.

    Source: Sajjadi et al. 2018, section 4.3 (beta = 8).
    """
    return float(f_beta(precision, recall, beta).max()), float(f_beta(precision, recall, 1 / beta).max())


def improved_precision_recall(
    eval_features, ref_features, k: int = 3, device: str | torch.device = "cpu"
) -> tuple[float, float]:
    """k-NN (precision, recall) of eval_features (n, d) against ref_features (m, d).

    Precision: share of evaluated samples inside the reference manifold, the union of balls around the reference samples
    that reach to the k-th nearest other reference sample. Recall: the same with the roles exchanged.
    Raises UserError for k < 1 or sets with no more than k samples. Source: Kynkäänniemi et al. 2019, eq. 1-3.
    """
    if k < 1:
        raise UserError(f"k={k}: at least one neighbour is needed")
    evaluated, reference = feature_tensors(eval_features, ref_features, device, k + 1)
    centre = reference.mean(0)  # a shift changes no distance, and small norms lose fewer digits
    evaluated, reference = evaluated - centre, reference - centre
    reach_ref, reach_eval = _kth_neighbour(reference, k), _kth_neighbour(evaluated, k)
    in_ref = evaluated.new_zeros(len(evaluated), dtype=torch.bool)
    in_eval = reference.new_zeros(len(reference), dtype=torch.bool)
    # so much may a square be off: equal points are at distance 0, and the k-th neighbour lies on its ball
    noise = 2 * evaluated.shape[1] * torch.finfo(evaluated.dtype).eps
    for i, j, squares in _squared_distances(evaluated, reference, noise):
        in_ref[i] |= (squares <= reach_ref[j]).any(1)
        in_eval[j] |= (squares <= reach_eval[i, None]).any(0)
    return float(in_ref.double().mean()), float(in_eval.double().mean())


def _kth_neighbour(points: Tensor, k: int) -> Tensor:
    """Squared distance (n,) from each point to its k-th nearest other point."""
    nearest = points.new_full((len(points), k), torch.inf)

    def keep(rows: slice, squares: Tensor) -> None:
        closest = squares.topk(min(k, squares.shape[1]), largest=False, sorted=False).values
        nearest[rows] = torch.cat([nearest[rows], closest], 1).topk(k, largest=False).values

    for i, j, squares in _squared_distances(points, points):
        if i == j:
            squares.fill_diagonal_(torch.inf)
        else:
            keep(j, squares.T.contiguous())
        keep(i, squares)
    return nearest[:, -1].clamp(min=0.0)  # topk sorts


def _squared_distances(a: Tensor, b: Tensor, noise: float = 0.0):
    """Yield (rows of a, rows of b, (|a_i|^2 + |b_j|^2)(1 - noise) - 2 <a_i, b_j>) block by block, with b the same as a
    only the blocks on and above the diagonal.
    """
    norm_a, norm_b = (((part * part).sum(1, keepdim=True)) * (1 - noise) for part in (a, b))
    # the squares as products of longer vectors: no pass over the block but the multiplication
    left = torch.cat([-2 * a, norm_a, torch.ones_like(norm_a)], 1)
    right = torch.cat([b, torch.ones_like(norm_b), norm_b], 1)
    for start in range(0, len(a), _BLOCK):
        for other in range(start if b is a else 0, len(b), _BLOCK):
            i, j = slice(start, start + _BLOCK), slice(other, other + _BLOCK)
            yield i, j, product(left[i], right[j])


def _cluster(points: np.ndarray, clusters: int, seed: int) -> np.ndarray:
    """Cluster index (n,) of each point by mini-batch k-means, best of 10 initialisations, as the PRD authors set it."""
    from sklearn.cluster import MiniBatchKMeans

    return MiniBatchKMeans(clusters, n_init=10, random_state=seed).fit_predict(points)
