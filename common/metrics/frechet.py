"""Frechet distance between two Gaussians fitted to features (the FID when the features are `inception`).

Heusel et al., "GANs Trained by a Two Time-Scale Update Rule Converge to a Local Nash Equilibrium", 2017, eq. 6:
    d^2 = |mu1 - mu2|^2 + tr(S1) + tr(S2) - 2 tr((S1 S2)^(1/2))
"""

import functools
import warnings
from pathlib import Path

import numpy as np
import scipy.linalg

from common.errors import UserError

_MOST = 8192  # samples or features, whichever are fewer: time grows with the cube, 8192 take minutes


def frechet_distance(mu1: np.ndarray, sigma1: np.ndarray, mu2: np.ndarray, sigma2: np.ndarray) -> float:
    """Squared Frechet distance of N(mu1, sigma1) and N(mu2, sigma2), float64, never negative.

    mu (d,), sigma (d, d) symmetric positive semi-definite, singular ones included.
    Raises UserError for shapes that do not match, non-finite or asymmetric input. Source: Heusel et al. 2017, eq. 6.
    """
    return _distance(Statistics(mu1, sigma1), Statistics(mu2, sigma2))


def _distance(first: "Statistics", second: "Statistics") -> float:
    if first.mu.shape != second.mu.shape:
        raise UserError(
            f"statistics of {len(first.mu)} and {len(second.mu)} features cannot be compared; use one extractor"
        )
    shift = first.mu - second.mu
    traces = sum(np.trace(s.sigma) if s.rows is None else np.square(s.rows).sum() for s in (first, second))
    # equal distributions end a few rounding errors below zero
    return max(float(shift @ shift + traces - 2 * _trace_sqrt_product(first, second)), 0.0)


def _trace_sqrt_product(first: "Statistics", second: "Statistics") -> float:
    """tr((S1 S2)^(1/2)) of the covariances S1, S2 (d, d), without a matrix square root.

    With S1 = F1' F1 and S2 = F2' F2 the eigenvalues of S1 S2 are the squared singular values of F1 F2', so the trace is
    their sum. Full rank: F1 is the Cholesky factor and one symmetric eigenvalue problem, F1 S2 F1', gives the squares.
    Singular, without a Cholesky factor: the singular values are taken directly, of factors with as many rows as there
    are samples, or cut to their numerical rank.
    """
    uppers = [None if s.rows is not None else _cholesky(s.sigma) for s in (first, second)]
    if uppers[0] is not None and uppers[1] is not None:
        squares = uppers[0] @ second.sigma @ uppers[0].T
        squares = scipy.linalg.eigh(squares, eigvals_only=True, check_finite=False, overwrite_a=True)
        return float(np.sqrt(np.clip(squares, 0.0, None)).sum())
    factors = [
        s.rows if s.rows is not None else upper if upper is not None else _eigen_factor(s.sigma)
        for s, upper in zip((first, second), uppers, strict=True)
    ]
    product = factors[0] @ factors[1].T  # (rank1, rank2)
    return float(scipy.linalg.svdvals(product, check_finite=False).sum()) if product.size else 0.0


def _cholesky(sigma: np.ndarray) -> np.ndarray | None:
    """Upper Cholesky factor, or None when `sigma` is singular to working precision."""
    try:
        return scipy.linalg.cholesky(sigma, check_finite=False)
    except scipy.linalg.LinAlgError:
        return None


def _eigen_factor(sigma: np.ndarray) -> np.ndarray:
    """F (rank, d) with F' F = sigma; eigenvalues below rounding error of the largest are dropped."""
    values, vectors = scipy.linalg.eigh(sigma, check_finite=False, driver="evd")
    keep = values > len(values) * np.finfo(np.float64).eps * max(values[-1], 0.0)
    return (vectors[:, keep] * np.sqrt(values[keep])).T


def _moments(mu, sigma) -> tuple[np.ndarray, np.ndarray]:
    mu, sigma = (_numbers(part, name) for part, name in ((mu, "the mean"), (sigma, "the covariance")))
    if mu.ndim != 1 or len(mu) == 0 or sigma.shape != (len(mu), len(mu)):
        raise UserError(f"expected a mean (d,) and a covariance (d, d), got {mu.shape} and {sigma.shape}")
    if np.diag(sigma).min() < 0:
        raise UserError("the covariance has negative variances; store numpy.cov(features, rowvar=False)")
    if np.abs(sigma - sigma.T).max(initial=0.0) > 1e-6 * np.abs(sigma).max(initial=0.0):
        raise UserError("the covariance is not symmetric; store numpy.cov(features, rowvar=False)")
    return mu, (sigma + sigma.T) / 2


def _numbers(values, name: str) -> np.ndarray:
    """float64 array of numbers that are finite and small enough to be squared; UserError otherwise."""
    if hasattr(values, "detach"):  # a torch tensor, possibly on another device
        values = values.detach().cpu().double().numpy()
    array = np.asarray(values)
    if array.dtype.kind not in "fiub":
        raise UserError(f"{name}: values of type {array.dtype}, expected numbers")
    array = array.astype(np.float64, copy=False)
    if not (np.abs(array) < 1e100).all():
        raise UserError(f"{name}: holds NaN, infinite or huge values; check the features")
    return array


def check_features(features, name: str = "features", least: int = 2) -> np.ndarray:
    """`features` as a finite float64 array (n, d) with n >= `least`; UserError otherwise."""
    array = _numbers(features, name)
    if array.ndim != 2 or array.shape[1] == 0:
        raise UserError(f"{name}: expected an array (samples, features), got shape {array.shape}")
    if len(array) < least:
        raise UserError(f"{name}: {len(array)} sample(s), at least {least} are needed")
    return array


def need_one_extractor(first: str, second: str) -> None:
    """Raise UserError for fingerprints of two extractors; an empty one is unknown."""
    if first and second and first != second:
        raise UserError(
            f"features of '{first}' and '{second}' cannot be compared; "
            "compute both with one extractor, resize mode and size"
        )


class Statistics:
    """Mean mu (d,) and covariance sigma (d, d) of n feature vectors, and which extractor they came from.

    n: 0 when unknown, as in files of other tools. `extractor`: the fingerprint `make_extractor(...).fingerprint`, empty
    when unknown; statistics of two extractors never mix. Of no more samples than features the covariance is kept as
    `rows` (n, d) with sigma = rows' rows, which is smaller.
    """

    def __init__(self, mu, sigma, n: int = 0, extractor: str = ""):
        self.mu, self.sigma = _moments(mu, sigma)
        self.n, self.extractor, self.rows = n, extractor, None

    @classmethod
    def from_features(cls, features, extractor: str = "") -> "Statistics":
        """Statistics of features (n, d), n >= 2, covariance with divisor n - 1. Raises UserError for fewer samples,
        non-finite values, and a covariance that would take hours.
        """
        features = check_features(features)
        n, d = features.shape
        if min(n, d) > _MOST:
            raise UserError(
                f"fid of {d} features would take hours; use features with at most {_MOST}, such as pixel-pca64, or raw "
                "with a smaller size"
            )
        self = cls.__new__(cls)
        self.mu, self.n, self.extractor = features.mean(0), n, extractor
        rows = (features - self.mu) / np.sqrt(n - 1)
        self.rows = rows if n <= d else None
        if n > d:
            self.sigma = rows.T @ rows
        return self

    @functools.cached_property
    def sigma(self) -> np.ndarray:
        return self.rows.T @ self.rows

    def distance(self, other: "Statistics") -> float:
        """`frechet_distance` to `other`; warns when a set has no more samples than features.

        Raises UserError when the two come from different extractors (name, weights, resize mode or size).
        """
        need_one_extractor(self.extractor, other.extractor)
        d = len(self.mu)
        few = [n for n in (self.n, other.n) if 0 < n <= d]
        if few:
            warnings.warn(
                f"{min(few)} samples for {d} features: the covariance is singular and the Frechet distance is biased "
                f"upwards; use more than {d} samples, or the kernel distance, which is unbiased",
                stacklevel=2,
            )
        return _distance(self, other)

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
        try:
            n = int(arrays["n"]) if "n" in arrays else len(arrays.get("activations", ()))
            if n < 0:
                raise ValueError(f"n={n}")
            return cls(arrays["mu"], arrays["sigma"], n, str(arrays.get("extractor", "")))
        except (UserError, TypeError, ValueError, OverflowError) as error:
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
