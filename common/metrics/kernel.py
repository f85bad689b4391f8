"""Kernel distance: squared maximum mean discrepancy with a polynomial kernel (the KID when features are `inception`).

Binkowski et al., "Demystifying MMD GANs", 2018. k(a, b) = (gamma <a, b> + coef0)^degree, by default (<a, b>/d + 1)^3.
"""

import warnings

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from common.metrics.frechet import check_features

ESTIMATORS = ("unbiased", "u-statistic", "biased")
_BLOCK = 1024  # rows of a kernel block: 1024 x 1024 float64 is 8 MB


def kernel_distance(
    x,
    y,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 12345,
    legacy: bool = False,
    estimator: str = "unbiased",
    degree: int = 3,
    gamma: float | None = None,
    coef0: float = 1.0,
    device: str | torch.device = "cpu",
    indices: tuple[np.ndarray, np.ndarray] | None = None,
) -> tuple[float, float]:
    """Mean and population standard deviation of `mmd2` over random subsets; not scaled by 100 or 1000.

    x (n, d) features of the evaluated set, y (m, d) of the reference. Subsets are drawn without replacement, x first.
    The random stream starts from `seed` in every call, so a result does not depend on which folders came before.
    `legacy`: draw as numpy's global generator does after numpy.random.seed(seed), as LBAE's evaluation drew.
    `indices`: the subsets themselves, two integer arrays (subsets, subset_size), instead of drawing.
    A subset larger than a set is reduced to the smaller set, with a warning.
    Raises UserError for fewer than 2 samples and for unknown options. Source: Binkowski et al. 2018, section 4.
    """
    x, y = _features(x, y, device)
    if indices is None:
        size = min(subset_size, len(x), len(y))
        if size < subset_size:
            warnings.warn(
                f"kernel distance: subsets of {size} instead of {subset_size}, the sets have {len(x)} and {len(y)} "
                "samples; the mean stays unbiased, the standard deviation is of another protocol",
                stacklevel=2,
            )
        indices = draw_subsets(len(x), len(y), subsets, size, seed, legacy)
    values = _subset_mmd2(x, y, *indices, estimator, _Kernel(degree, gamma, coef0, x.shape[1]))
    return float(values.mean()), float(values.std())


def draw_subsets(n: int, m: int, subsets: int, size: int, seed: int, legacy: bool = False):
    """Rows of the subsets, (subsets, size) into n and (subsets, size) into m, drawn in turns from one seeded stream."""
    if subsets < 1 or size < 2:
        raise UserError(f"kernel distance: {subsets} subset(s) of {size}; at least 1 subset of 2 samples is needed")
    stream = np.random.RandomState(seed) if legacy else np.random.default_rng(seed)
    pairs = [(stream.choice(n, size, replace=False), stream.choice(m, size, replace=False)) for _ in range(subsets)]
    return np.stack([rows for rows, _ in pairs]), np.stack([rows for _, rows in pairs])


def mmd2(
    x,
    y,
    estimator: str = "unbiased",
    degree: int = 3,
    gamma: float | None = None,
    coef0: float = 1.0,
    device: str | torch.device = "cpu",
) -> float:
    """Squared MMD between all of x (n, d) and all of y (m, d).

    `unbiased`: sum_{i!=j} k(x_i, x_j)/(n(n-1)) + sum_{i!=j} k(y_i, y_j)/(m(m-1)) - 2 sum_ij k(x_i, y_j)/(n m).
    `u-statistic`: the cross term leaves out i = j too (n = m). `biased`: every pair, divisors n^2, m^2.
    Raises UserError for an unknown estimator, sizes that do not fit it, or fewer than 2 samples.
    """
    x, y = _features(x, y, device)
    rows, columns = np.arange(len(x))[None], np.arange(len(y))[None]
    return float(_subset_mmd2(x, y, rows, columns, estimator, _Kernel(degree, gamma, coef0, x.shape[1]))[0])


def mmd2_and_variance(
    x, y, var_at_m: int | None = None, degree: int = 3, gamma: float | None = None, coef0: float = 1.0
) -> tuple[float, float]:
    """Unbiased squared MMD of x, y (m, d) each, and an estimate of the variance it has with `var_at_m` samples.

    Holds three kernel matrices m x m. Source: Sutherland et al., "Generative Models and Model Criticism via Optimized
    Maximum Mean Discrepancy", 2017, eq. 5 (unbiased estimates of the zeta_1 and zeta_2 of a second-order U-statistic).
    """
    x, y = _features(x, y, "cpu")
    m = len(x)
    if len(y) != m or m < 3:
        raise UserError(f"the variance needs two sets of one size, at least 3; got {m} and {len(y)}")
    kernel = _Kernel(degree, gamma, coef0, x.shape[1])
    k_xx, k_yy, k_xy = (kernel(a, b).numpy() for a, b in ((x, x), (y, y), (x, y)))
    np.fill_diagonal(k_xx, 0.0)
    np.fill_diagonal(k_yy, 0.0)

    rows_x, rows_y = k_xx.sum(1), k_yy.sum(1)  # sums over j != i
    cross_x, cross_y = k_xy.sum(1), k_xy.sum(0)
    within = np.array([rows_x.sum(), rows_y.sum()])
    within_squares = (k_xx**2).sum() + (k_yy**2).sum()
    cross, cross_squares = k_xy.sum(), (k_xy**2).sum()
    pairs, triples = m * (m - 1), m * (m - 1) * (m - 2)

    value = within.sum() / pairs - 2 * cross / m**2
    # E[E[h|x]^2]-like products, each over distinct indices, minus the squared means
    mean_within = (within**2).sum() / pairs**2
    mean_cross = 2 * cross**2 / m**4
    mixed = (rows_x @ cross_x + rows_y @ cross_y) / (m * pairs) - within.sum() * cross / (m**2 * pairs)
    zeta1 = (
        (rows_x @ rows_x + rows_y @ rows_y - within_squares) / triples
        - mean_within
        + (cross_x @ cross_x + cross_y @ cross_y - 2 * cross_squares) / (m * pairs)
        - mean_cross
        - 2 * mixed
    )
    zeta2 = within_squares / pairs - mean_within + 2 * cross_squares / m**2 - mean_cross - 4 * mixed
    at = m if var_at_m is None else var_at_m
    variance = 4 * (at - 2) / (at * (at - 1)) * zeta1 + 2 / (at * (at - 1)) * zeta2
    return float(value), float(variance)


class _Kernel:
    """The polynomial kernel as a function of two row sets."""

    def __init__(self, degree: int, gamma: float | None, coef0: float, dim: int):
        self.degree, self.gamma, self.coef0 = degree, 1.0 / dim if gamma is None else gamma, coef0

    def __call__(self, a: Tensor, b: Tensor) -> Tensor:
        """k(a_i, b_j), (len(a), len(b))."""
        # numpy on the CPU: it computes the product of a matrix with itself at half the cost
        product = torch.from_numpy(a.numpy() @ b.numpy().T) if a.device.type == "cpu" else a @ b.T
        return self._power(product.mul_(self.gamma).add_(self.coef0))

    def paired(self, a: Tensor, b: Tensor) -> Tensor:
        """k(a_i, b_i), (len(a),)."""
        return self._power(torch.einsum("id,id->i", a, b).mul_(self.gamma).add_(self.coef0))

    def _power(self, base: Tensor) -> Tensor:
        # repeated products: a general power is an order of magnitude slower
        power = base.clone() if self.degree > 1 else base
        for _ in range(self.degree - 1):
            power *= base
        return power


def _subset_mmd2(x, y, rows_x, rows_y, estimator: str, kernel: _Kernel) -> np.ndarray:
    """`mmd2` of every subset: rows_x (s, m) into x, rows_y (s, n) into y -> (s,)."""
    if estimator not in ESTIMATORS:
        raise UserError(f"estimator={estimator}: expected one of {', '.join(ESTIMATORS)}")
    (subsets, m), n = rows_x.shape, rows_y.shape[1]
    if min(m, n) < 2:
        raise UserError(f"kernel distance: {min(m, n)} sample(s), at least 2 are needed")
    if estimator == "u-statistic" and m != n:
        raise UserError(f"estimator=u-statistic pairs the samples; got {m} and {n}")
    # The kernel matrix of the full sets costs less than those of all subsets as long as the subsets overlap enough.
    whole = (len(x) + len(y)) ** 2 <= subsets * (m + n) ** 2
    sums = _sums_by_indicator if whole else _sums_by_gathering
    xx, yy, xy = sums(x, y, rows_x, rows_y, kernel)

    rows_x, rows_y = torch.from_numpy(rows_x).to(x.device), torch.from_numpy(rows_y).to(y.device)
    if estimator == "biased":
        values = xx / m**2 + yy / n**2 - 2 * xy / (m * n)
        return values.cpu().numpy()
    xx = xx - kernel.paired(x, x)[rows_x].sum(1)
    yy = yy - kernel.paired(y, y)[rows_y].sum(1)
    pairs = m * n
    if estimator == "u-statistic":
        xy = xy - torch.stack([kernel.paired(x[a], y[b]).sum() for a, b in zip(rows_x, rows_y, strict=True)])
        pairs = m * (m - 1)
    return (xx / (m * (m - 1)) + yy / (n * (n - 1)) - 2 * xy / pairs).cpu().numpy()


def _sums_by_indicator(x, y, rows_x, rows_y, kernel):
    """Sums of k over x-x, y-y and x-y pairs of every subset, from one pass over the kernel of the full sets."""
    in_x, in_y = _indicator(rows_x, x), _indicator(rows_y, y)
    return (
        _symmetric_sums(x, in_x, kernel),
        _symmetric_sums(y, in_y, kernel),
        sum(
            torch.einsum(
                "is,is->s", in_x[i : i + _BLOCK], kernel(x[i : i + _BLOCK], y[j : j + _BLOCK]) @ in_y[j : j + _BLOCK]
            )
            for i in range(0, len(x), _BLOCK)
            for j in range(0, len(y), _BLOCK)
        ),
    )


def _symmetric_sums(x: Tensor, inside: Tensor, kernel: _Kernel) -> Tensor:
    """sum_ij inside_is k(x_i, x_j) inside_js -> (s,), from the blocks on and above the diagonal."""
    total = inside.new_zeros(inside.shape[1])
    for i in range(0, len(x), _BLOCK):
        for j in range(i, len(x), _BLOCK):
            block = kernel(x[i : i + _BLOCK], x[j : j + _BLOCK])
            part = torch.einsum("is,is->s", inside[i : i + _BLOCK], block @ inside[j : j + _BLOCK])
            total += part if i == j else 2 * part
    return total


def _sums_by_gathering(x, y, rows_x, rows_y, kernel):
    """The same sums, one subset after another: memory and time do not grow with the full sets."""
    triples = []
    for a, b in zip(rows_x, rows_y, strict=True):
        first, second = x[torch.from_numpy(a).to(x.device)], y[torch.from_numpy(b).to(y.device)]
        triples.append(
            torch.stack([kernel(p, q).sum() for p, q in ((first, first), (second, second), (first, second))])
        )
    return torch.stack(triples, 1)


def _indicator(rows: np.ndarray, x: Tensor) -> Tensor:
    """(len(x), subsets): how often a row is in a subset."""
    inside = np.zeros((len(x), len(rows)))
    np.add.at(inside, (rows, np.arange(len(rows))[:, None]), 1.0)
    return torch.from_numpy(inside).to(x.device)


def _features(x, y, device) -> tuple[Tensor, Tensor]:
    x, y = check_features(x, "evaluated features"), check_features(y, "reference features")
    if x.shape[1] != y.shape[1]:
        raise UserError(f"features of {x.shape[1]} and {y.shape[1]} dimensions cannot be compared; use one extractor")
    device = torch.device(device)
    if device.type == "mps":  # has no float64
        device = torch.device("cpu")
    return torch.from_numpy(x).to(device), torch.from_numpy(y).to(device)
