"""Open-set recognition and the leakage score (GlanceNets, section 4.3 and appendix C).

An input is accepted when its reconstruction error is below eta_r and its latents are closer to some class prototype
mu_y than eta_y. Both thresholds are quantiles over the training images (of class y for eta_y). Rejected inputs count
as a coin toss.
"""

from typing import NamedTuple

import numpy as np

from common.errors import UserError


class Thresholds(NamedTuple):
    """`reconstruction` (scalar) in nats an image, `distance` (C,), `means` (C, D) prototypes, first `z_class` dims
    used.
    """

    reconstruction: float
    distance: np.ndarray
    means: np.ndarray
    z_class: int


def grid_threshold(
    values: np.ndarray,
    low: float = 0.945,
    high: float = 0.955,
    steps: int = 1000,
    span: tuple[float, float] | None = None,
) -> float:
    """The published search: mean of the grid points below which between `low` and `high` of the values lie.

    The grid has `steps` points over `span` (default: minimum to maximum). NaN when none qualifies (heavy tails).
    """
    start, stop = span if span is not None else (values.min(), values.max())
    grid = np.linspace(start, stop, steps)
    kept = np.searchsorted(np.sort(values), grid, side="left") / len(values)
    chosen = grid[(kept > low) & (kept < high)]
    return float(chosen.mean()) if len(chosen) else float("nan")


def prototype_distances(z: np.ndarray, means: np.ndarray, z_class: int) -> np.ndarray:
    """Euclidean distances (n, C) between latents (n, D) and prototypes (C, D) over the first `z_class` dims."""
    difference = z[:, None, :z_class] - means[None, :, :z_class]
    return np.sqrt(np.square(difference).sum(2))


def fit_thresholds(
    errors: np.ndarray, z: np.ndarray, y: np.ndarray, means: np.ndarray, z_class: int, quantile: float = 0.95
) -> Thresholds:
    """Exact quantiles of the training images: errors (n,), latents (n, D), classes (n,) of 0 to C - 1.

    Raises UserError for other labels (they would belong to no prototype) and for no images. A class without images
    accepts nothing (threshold 0).
    """
    y = np.asarray(y)
    if not len(y) or y.dtype.kind not in "iu" or y.min() < 0 or y.max() >= len(means):
        raise UserError(f"classes must be whole numbers of 0 to {len(means) - 1}, one for each of the {len(means)} "
                        f"prototypes; {sorted(set(y.tolist()))[:5]} are not")  # fmt: skip
    distances = prototype_distances(z, means, z_class)
    per_class = [
        float(np.quantile(distances[y == c, c], quantile)) if np.any(y == c) else 0.0 for c in range(len(means))
    ]
    return Thresholds(float(np.quantile(errors, quantile)), np.array(per_class), np.asarray(means), z_class)


class Acceptance(NamedTuple):
    """Boolean masks (n,)."""

    reconstruction: np.ndarray
    latent: np.ndarray

    @property
    def both(self) -> np.ndarray:
        """Accepted by both checks."""
        return self.reconstruction & self.latent


def accept(errors: np.ndarray, z: np.ndarray, thresholds: Thresholds) -> Acceptance:
    """Which inputs the closed world contains; both comparisons are strict."""
    distances = prototype_distances(z, thresholds.means, thresholds.z_class)
    return Acceptance(errors < thresholds.reconstruction, (distances < thresholds.distance).any(1))


def expected_accuracy(prediction: np.ndarray, label: np.ndarray, accepted: np.ndarray | None = None) -> float:
    """Accuracy of a binary task when every rejected input gets a random label: in expectation it counts 1/2."""
    right = (prediction == label).astype(np.float64)
    if accepted is not None:
        right = np.where(accepted, right, 0.5)
    return float(right.mean())


def leakage(accuracy: float) -> float:
    """2 |accuracy - 1/2|: 0 for chance, 1 for a perfect prediction of a factor that should be absent."""
    return 2 * abs(accuracy - 0.5)


def probe_leakage(
    train: np.ndarray,
    train_label: np.ndarray,
    test: np.ndarray,
    test_label: np.ndarray,
    train_accepted: np.ndarray | None = None,
    test_accepted: np.ndarray | None = None,
) -> tuple[float, float]:
    """(expected accuracy, leakage) of a logistic regression from frozen representations to an absent binary factor.

    The probe is fitted on the accepted training rows; without two classes among them it can only toss a coin.
    """
    from sklearn.linear_model import LogisticRegression

    rows = np.ones(len(train), bool) if train_accepted is None else train_accepted
    if len(np.unique(train_label[rows])) < 2:
        accuracy = expected_accuracy(test_label, test_label, np.zeros(len(test_label), bool))
    else:
        probe = LogisticRegression(max_iter=1000).fit(train[rows], train_label[rows])
        accuracy = expected_accuracy(probe.predict(test), test_label, test_accepted)
    return accuracy, leakage(accuracy)
