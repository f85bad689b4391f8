"""Open-set recognition and the leakage score (GlanceNets, section 4.3 and appendix C).

An input is accepted when its reconstruction error is below eta_r and its latents are closer to some class prototype
mu_y than eta_y. Both thresholds are quantiles over the training images (of class y for eta_y). Rejected inputs count
as a coin toss.
"""

from collections.abc import Callable
from numbers import Integral, Real
from typing import Any, NamedTuple, Self

import numpy as np
import torch

from common.errors import UserError
from common.given import classes, function


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


def class_means(z: np.ndarray, y: np.ndarray, classes: int) -> np.ndarray:
    """Mean latents (C, D) of the classes (n,) of 0 to C - 1; zeros for one without latents (n, D)."""
    means = np.zeros((classes, z.shape[1]))
    for c in np.unique(y):
        means[c] = z[y == c].mean(0)
    return means


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


def squared_errors(x: np.ndarray, reconstruction: np.ndarray) -> np.ndarray:
    """Sum of squared differences of each input and its reconstruction (n, ...): (n,)."""
    return np.square(x - reconstruction).reshape(len(x), -1).sum(1)


class OpenSet:
    """The rejection around any encoder and decoder: learns from the known classes, then says what is not of them.

    encode: inputs (b, ...) -> latents (b, D); decode: latents as `encode` gave them -> reconstructions (b, ...), or
    None to judge by the distance alone. Both get batches of x as it is (array or tensor), without gradients. quantile:
    the share of the training inputs that each of the two checks keeps. errors: (x, reconstruction), float64 arrays
    -> (b,), the error that is thresholded. Source: GlanceNets (Marconato et al., NeurIPS 2022), section 4.3.

    After `fit`: classes (C,), `thresholds` (see `Thresholds`, in the order of classes).

        OpenSet(encode, decode).fit(x, y).accepts(others)  # bool (n,)
    """

    def __init__(
        self, encode: Callable[[Any], Any], decode: Callable[[Any], Any] | None = None, quantile: float = 0.95,
        errors: Callable[[np.ndarray, np.ndarray], np.ndarray] = squared_errors, batch_size: int = 256,
    ):  # fmt: skip
        numbers = isinstance(quantile, Real) and isinstance(batch_size, Integral)
        if not numbers or not 0 < quantile < 1 or batch_size < 1:
            raise UserError(f"quantile={quantile}, batch_size={batch_size}: expected 0 < quantile < 1, batch_size >= 1")
        self.encode, self.decode = function(encode, "encode"), None if decode is None else function(decode, "decode")
        self.errors, self.quantile, self.batch_size = function(errors, "errors"), quantile, batch_size
        self.thresholds: Thresholds | None = None

    def fit(self, x: Any, y: Any, prototypes: Any = None) -> Self:
        """Set both thresholds from inputs x (n, ...) of the known classes y (n,), numbers or text, at least 3 of each.

        prototypes (C, D): a centre of each class, in the order of the sorted labels; by default the mean latents.
        Raises UserError for labels or prototypes that do not fit x, for labels that are None or NaN, for too few inputs
        of a class, and where all latents of a class or all reconstruction errors are equal: nothing would be accepted.
        """
        _check_inputs(x)
        y = np.asarray(y.detach().cpu() if hasattr(y, "detach") else y)
        if y.ndim != 1 or len(y) != len(x):
            raise UserError(f"labels of shape {y.shape} for {len(x)} inputs: expected one label an input, (n,)")
        self.classes, index, counts = classes(y)
        if not len(y) or counts.min() < 3:
            few = f"class {self.classes[counts.argmin()]} has {counts.min()}" if len(y) else "there are none"
            raise UserError(f"a threshold needs three inputs of each class: {few}")
        errors, z = self._measure(x)
        means = class_means(z, index, len(counts)) if prototypes is None else _array(prototypes, "prototypes")
        if means.shape != (len(counts), z.shape[1]):
            raise UserError(f"prototypes of shape {means.shape} for {len(counts)} classes and latents of {z.shape[1]}")
        found = fit_thresholds(errors, z, index, means, z.shape[1], self.quantile)
        for c, reach in zip(self.classes, found.distance, strict=True):
            if not reach > 0:
                raise UserError(f"class {c}: its latents are all at the prototype, so that none could be accepted")
        if self.decode is not None and not found.reconstruction > 0:
            raise UserError("the reconstruction errors are 0, so that no input could be accepted; leave decode out")
        self.thresholds = found
        return self

    def check(self, x: Any) -> Acceptance:
        """Both checks of inputs x (n, ...): masks (n,) `reconstruction`, `latent`, and `both`."""
        if self.thresholds is None:
            raise UserError("this rejection is not fitted: call fit(x, y) first")
        errors, z = self._measure(x)
        if z.shape[1] != self.thresholds.z_class:
            raise UserError(f"encode gave latents of {z.shape[1]} units, in fit of {self.thresholds.z_class}")
        found = accept(errors, z, self.thresholds)
        return found if self.decode is not None else Acceptance(np.ones(len(z), bool), found.latent)

    def accepts(self, x: Any) -> np.ndarray:
        """Which inputs x (n, ...) are of the known classes: bool (n,), those that pass both checks."""
        return self.check(x).both

    @torch.no_grad()
    def _measure(self, x: Any) -> tuple[np.ndarray, np.ndarray]:
        """Reconstruction errors (n,), 0 without a decoder, and latents (n, D) of inputs x (n, ...)."""
        _check_inputs(x)
        errors, latents = [], []
        for start in range(0, len(x), self.batch_size):
            batch = x[start : start + self.batch_size]
            code = self.encode(batch)
            z = _array(code, "encode's latents")
            if z.ndim != 2 or len(z) != len(batch):
                raise UserError(f"encode gave {z.shape} for {len(batch)} inputs: expected latents (b, D)")
            latents.append(z)
            if self.decode is None:
                errors.append(np.zeros(len(z)))
                continue
            wanted, seen = _array(batch, "the inputs"), _array(self.decode(code), "decode's reconstructions")
            if seen.shape != wanted.shape:
                raise UserError(f"decode gave {seen.shape} for inputs {wanted.shape}")
            errors.append(_array(self.errors(wanted, seen), "the errors"))
        return np.concatenate(errors), np.concatenate(latents)


def _check_inputs(x: Any) -> None:
    if not getattr(x, "shape", ()):
        raise UserError(f"the inputs must be an array or a tensor (n, ...), not {type(x).__name__}")
    if not len(x):
        raise UserError("the inputs must be an array or a tensor (n, ...), at least one; there are none")


def _array(values: Any, name: str) -> np.ndarray:
    """A float64 array. Raises UserError for what is not finite numbers."""
    try:
        array = np.asarray(values.detach().cpu() if hasattr(values, "detach") else values, np.float64)
    except (TypeError, ValueError) as error:
        raise UserError(f"{name} must be an array of numbers or a tensor, not {type(values).__name__}") from error
    if not np.isfinite(array).all():
        raise UserError(f"{name} hold NaN or infinite values")
    return array
