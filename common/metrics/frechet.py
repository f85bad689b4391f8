"""Frechet distance between two Gaussians fitted to features (the FID when the features are `inception`).

Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium", 2017, eq. 6:
    d^2 = |mu1 - mu2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^(1/2))
"""

import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import scipy.linalg

from common.errors import UserError

# below this ratio of the smallest to the largest Cholesky pivot a covariance counts as numerically singular
_SMALLEST_PIVOT = 1e-12


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """Squared Frechet distance of N(mu1, sigma1) and N(mu2, sigma2), float64, never negative.

    mu (d,), sigma (d, d) symmetric positive semi-definite, singular ones included.
    Raises UserError for shapes that do not match, non-finite or asymmetric input. Source: Heusel et al. 2017, eq. 6.
    """
    mu1, sigma1 = _moments(mu1, sigma1)
    mu2, sigma2 = _moments(mu2, sigma2)
    if mu1.shape != mu2.shape:
        raise UserError(f"statistics of {len(mu1)} and {len(mu2)} features cannot be compared; use one extractor")
    shift = mu1 - mu2
    distance = shift @ shift + np.trace(sigma1) + np.trace(sigma2) - 2 * trace_sqrt_product(sigma1, sigma2)
    # equal distributions end a few rounding errors below zero
    return max(float(distance), 0.0)


def trace_sqrt_product(sigma1: np.ndarray, sigma2: np.ndarray) -> float:
    """tr((S1 S2)^(1/2)) for symmetric positive semi-definite S1, S2 (d, d), without a matrix square root.

    With S1 = F1 F1' and S2 = F2 F2' the eigenvalues of S1 S2 are the squared singular values of F1' F2, so the trace is
    their sum. Full rank: F1 is the Cholesky factor and one symmetric eigenvalue problem, F1' S2 F1, gives the squares.
    Singular: squares near zero would be rounding noise whose root is large, so the singular values are taken directly,
    of eigen-factors cut to their numerical rank.
    """
    lower1, lower2 = _cholesky(sigma1), _cholesky(sigma2)
    if lower1 is not None and lower2 is not None:
        squares = scipy.linalg.eigh(lower1.T @ sigma2 @ lower1, eigvals_only=True, check_finite=False, overwrite_a=True)
        return float(np.sqrt(np.clip(squares, 0.0, None)).sum())
    product = _eigen_factor(sigma1).T @ _eigen_factor(sigma2)  # (rank1, rank2)
    if product.size == 0:
        return 0.0
    return float(scipy.linalg.svdvals(product, check_finite=False).sum())


def _cholesky(sigma: np.ndarray) -> np.ndarray | None:
    """Lower Cholesky factor, or None when `sigma` is singular to working precision."""
    try:
        lower = scipy.linalg.cholesky(sigma, lower=True, check_finite=False)
    except scipy.linalg.LinAlgError:
        return None
    pivots = np.diag(lower) ** 2
    return lower if pivots.min() > _SMALLEST_PIVOT * pivots.max() else None


def _eigen_factor(sigma: np.ndarray) -> np.ndarray:
    """F (d, rank) with F F' = sigma; eigenvalues below rounding error of the largest are dropped."""
    values, vectors = scipy.linalg.eigh(sigma, check_finite=False, driver="evd")
    keep = values > len(values) * np.finfo(np.float64).eps * max(values[-1], 0.0)
    return vectors[:, keep] * np.sqrt(values[keep])


def _moments(mu, sigma) -> tuple[np.ndarray, np.ndarray]:
    mu, sigma = np.asarray(mu, np.float64), np.asarray(sigma, np.float64)
    if mu.ndim != 1 or sigma.shape != (len(mu), len(mu)):
        raise UserError(f"expected a mean (d,) and a covariance (d, d), got {mu.shape} and {sigma.shape}")
    if not (np.isfinite(mu).all() and np.isfinite(sigma).all()):
        raise UserError("the mean or the covariance holds NaN or infinite values; check the features")
    if np.abs(sigma - sigma.T).max(initial=0.0) > 1e-6 * np.abs(sigma).max(initial=0.0):
        raise UserError("the covariance is not symmetric; store numpy.cov(features, rowvar=False)")
    return mu, (sigma + sigma.T) / 2


def check_features(features, name: str = "features", least: int = 2) -> np.ndarray:
    """`features` as a finite float64 array (n, d) with n >= `least`; UserError otherwise."""
    if hasattr(features, "detach"):  # a torch tensor, possibly on another device
        features = features.detach().cpu().numpy()
    array = np.asarray(features, np.float64)
    if array.ndim != 2:
        raise UserError(f"{name}: expected an array (samples, features), got shape {array.shape}")
    if len(array) < least:
        raise UserError(f"{name}: {len(array)} sample(s), at least {least} are needed")
    if not np.isfinite(array).all():
        raise UserError(f"{name}: holds NaN or infinite values")
    return array


@dataclass
class Statistics:
    """Mean and covariance of n feature vectors, and which extractor they came from.

    mu (d,), sigma (d, d) with divisor n - 1, n samples (0: unknown, as in files of other tools). `extractor` is the
    fingerprint that `make_extractor(...).fingerprint` gives (empty: unknown); statistics of two extractors never mix.
    """

    mu: np.ndarray
    sigma: np.ndarray
    n: int = 0
    extractor: str = ""

    def __post_init__(self):
        self.mu, self.sigma = _moments(self.mu, self.sigma)

    @classmethod
    def from_features(cls, features, extractor: str = "") -> "Statistics":
        """Statistics of features (n, d), n >= 2. Raises UserError for fewer samples or non-finite values."""
        features = check_features(features)
        return cls(features.mean(0), np.atleast_2d(np.cov(features, rowvar=False)), len(features), extractor)

    def distance(self, other: "Statistics") -> float:
        """`frechet_distance` to `other`; warns when a set has no more samples than features.

        Raises UserError when the two come from different extractors (name, weights, resize mode or size).
        """
        if self.extractor and other.extractor and self.extractor != other.extractor:
            raise UserError(
                f"features of '{self.extractor}' and '{other.extractor}' cannot be compared; "
                "compute both with one extractor, resize mode and size"
            )
        d = len(self.mu)
        few = [n for n in (self.n, other.n) if 0 < n <= d]
        if few:
            warnings.warn(
                f"{min(few)} samples for {d} features: the covariance is singular and the Frechet distance is biased "
                f"upwards; use more than {d} samples, or the kernel distance, which is unbiased",
                stacklevel=2,
            )
        return frechet_distance(self.mu, self.sigma, other.mu, other.sigma)

    def save(self, path: str | Path) -> None:
        """Write `path` (.npz) atomically: mu, sigma, n, extractor."""
        from common.checkpoint import atomic_write

        with atomic_write(path) as file:
            np.savez_compressed(file, mu=self.mu, sigma=self.sigma, n=self.n, extractor=self.extractor)

    @classmethod
    def load(cls, path: str | Path) -> "Statistics":
        """Read what `save` wrote, or the `mu`, `sigma` (and `activations`) of other FID tools.

        Raises UserError for a missing, truncated or foreign file.
        """
        arrays = read_npz(path)
        if "mu" not in arrays or "sigma" not in arrays:
            raise UserError(f"{path}: no feature statistics (arrays 'mu' and 'sigma'); it holds {sorted(arrays)}")
        n = int(arrays["n"]) if "n" in arrays else len(arrays.get("activations", ()))
        try:
            return cls(arrays["mu"], arrays["sigma"], n, str(arrays.get("extractor", "")))
        except UserError as error:
            raise UserError(f"{path}: {error}") from error


def read_npz(path: str | Path) -> dict[str, np.ndarray]:
    """Every array of an .npz file, read without pickle. Raises UserError for a missing, truncated or foreign file."""
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no such file: {path}")
    from common.datasets import readers  # PyTorch comes with it

    try:
        return readers.read_npz(path, max_bytes=1 << 34)
    except UserError as error:
        raise UserError(f"{path}: not a readable .npz file ({str(error)[:160]})") from error
