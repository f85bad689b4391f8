"""The metrics by their definitions, as plain loops and small matrices: oracles of the tests, slow on purpose.

Also what only the original's vectors ask for: further estimators of the kernel distance, SAP of continuous factors.
"""

from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
from numpy.random import RandomState
from sklearn.ensemble import GradientBoostingClassifier
from sklearn.metrics import mutual_info_score
from sklearn.svm import LinearSVC

from common.metrics import disentanglement as dis
from common.metrics.disentanglement_points import Grid, Split

# ---- kernel distance


def mmd2(x, y, estimator="unbiased", degree=3, gamma=None, coef0=1.0) -> float:
    """Squared MMD between x (n, d) and y (m, d), kernel (gamma <a, b> + coef0)^degree.

    `unbiased` leaves out i = j within x and within y, `u-statistic` (n = m) between them too, `biased` nothing.
    """
    gamma = 1 / x.shape[1] if gamma is None else gamma
    xx, yy, xy = ((gamma * a @ b.T + coef0) ** degree for a, b in ((x, x), (y, y), (x, y)))
    n, m = len(x), len(y)
    if estimator == "biased":
        return xx.mean() + yy.mean() - 2 * xy.mean()
    within = (xx.sum() - np.trace(xx)) / (n * (n - 1)) + (yy.sum() - np.trace(yy)) / (m * (m - 1))
    return within - 2 * ((xy.sum() - np.trace(xy)) / (n * (n - 1)) if estimator == "u-statistic" else xy.mean())


def mmd2_and_variance(x, y, var_at_m=None) -> tuple[float, float]:
    """Unbiased squared MMD of x, y (m, d) each, and an estimate of the variance it has with `var_at_m` samples.

    Source: Sutherland et al., "Generative Models and Model Criticism via Optimized Maximum Mean Discrepancy", 2017,
    eq. 5 (unbiased estimates of the zeta_1 and zeta_2 of a second-order U-statistic).
    """
    m = len(x)
    k_xx, k_yy, k_xy = ((a @ b.T / x.shape[1] + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    np.fill_diagonal(k_xx, 0.0)
    np.fill_diagonal(k_yy, 0.0)
    rows_x, rows_y = k_xx.sum(1), k_yy.sum(1)  # sums over j != i
    cross_x, cross_y = k_xy.sum(1), k_xy.sum(0)
    within = np.array([rows_x.sum(), rows_y.sum()])
    within_squares = (k_xx**2).sum() + (k_yy**2).sum()
    cross, cross_squares = k_xy.sum(), (k_xy**2).sum()
    pairs, triples = m * (m - 1), m * (m - 1) * (m - 2)
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
    return within.sum() / pairs - 2 * cross / m**2, variance


# ---- precision and recall


def improved_precision_recall_ref(evaluated, reference, k) -> tuple[float, float]:
    """k-NN precision and recall with explicit distances."""

    def share(points, manifold):
        between = np.linalg.norm(manifold[:, None] - manifold[None], axis=2)
        radius = np.sort(between, axis=1)[:, k]  # column 0 is the point itself
        return (np.linalg.norm(points[:, None] - manifold[None], axis=2) <= radius).any(1).mean()

    return share(evaluated, reference), share(reference, evaluated)


# ---- disentanglement


def discretize_ref(values: np.ndarray, bins: int = dis.BINS) -> np.ndarray:
    """`discretize` by the histogram of each column."""
    return np.stack([np.digitize(column, np.histogram(column, bins)[1][:-1]) for column in values.T], axis=1)


def mig_ref(codes: np.ndarray, factors: np.ndarray) -> float:
    """MIG by one call of scikit-learn a pair."""
    binned = discretize_ref(codes)
    information = np.array([[mutual_info_score(factor, code) for factor in factors.T] for code in binned.T])
    entropy = np.array([mutual_info_score(column, column) for column in factors.T])
    ordered = np.sort(information, axis=0)
    return float(np.mean((ordered[-1] - ordered[-2]) / entropy))


def sap_ref(data: Split) -> float:
    """SAP by one classifier a pair."""
    scores = np.zeros((data.codes.shape[1], data.factors.shape[1]))
    for i in range(scores.shape[0]):
        for j in range(scores.shape[1]):
            model = LinearSVC(C=0.01, class_weight="balanced", dual=False, random_state=0)
            model.fit(data.codes[:, [i]], data.factors[:, j])
            scores[i, j] = np.mean(model.predict(data.codes_test[:, [i]]) == data.factors_test[:, j])
    ordered = np.sort(scores, axis=0)
    return float(np.mean(ordered[-1] - ordered[-2]))


def squared_correlations(codes: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """SAP's scores (D, F) for continuous factors: squared correlation, 0 for a code with a variance below 1e-12."""
    codes, factors = codes - codes.mean(axis=0), factors - factors.mean(axis=0)
    var_codes, var_factors = (codes**2).sum(axis=0), (factors**2).sum(axis=0)
    alive = var_codes > 1e-12 * (len(codes) - 1)
    return np.where(
        alive[:, None], (codes.T @ factors) ** 2 / np.where(alive, var_codes, 1.0)[:, None] / var_factors, 0.0
    )


def dci_ref(data: Split) -> float:
    """DCI's disentanglement by one boosting after the other."""
    fits = [GradientBoostingClassifier(random_state=0).fit(data.codes, factor) for factor in data.factors.T]
    importance = np.stack([np.abs(fit.feature_importances_) for fit in fits], axis=1)
    total = 0.0
    for row in importance:
        shares = (row + 1e-11) / (row + 1e-11).sum()
        total += row.sum() * (1 + (shares * np.log(shares)).sum() / np.log(len(row)))
    return float(total / importance.sum())


def irs_ref(codes: np.ndarray, factors: np.ndarray) -> float:
    """IRS by all rows for every value of every factor."""
    codes = codes[:, np.ptp(codes, axis=0) > 0].astype(np.float64)
    binned = discretize_ref(factors)
    largest = np.abs(codes - codes.mean(axis=0)).max(axis=0)
    spread = np.zeros((codes.shape[1], factors.shape[1]))
    for j in range(factors.shape[1]):
        values = np.unique(binned[:, j])
        for value in values:
            group = codes[binned[:, j] == value]
            spread[:, j] += np.percentile(np.abs(group - group.mean(axis=0)), 100 * dis.IRS_QUANTILE, axis=0)
        spread[:, j] /= len(values)
    return float(np.average((1 - spread / largest[:, None]).max(axis=1), weights=largest))


def factor_vae_ref(
    sizes: tuple[int, ...], represent: Callable[[np.ndarray], np.ndarray], seed: int, num_train: int, num_test: int
) -> float:
    """FactorVAE's held-out accuracy, one draw and one encoding a vote. represent: image index (n,) -> codes (n, D)."""
    rng = RandomState(seed)
    bases = np.prod(sizes) // np.cumprod(sizes)

    def draw(count: int) -> np.ndarray:
        factors = np.zeros((count, len(sizes)), np.int64)
        for column, size in enumerate(sizes):
            factors[:, column] = rng.randint(size, size=count)
        return factors

    variance = np.var(represent(draw(dis.NUM_TRAIN) @ bases).astype(np.float64), axis=0, ddof=1)
    active = np.sqrt(variance) >= dis.PRUNE_STD
    tables = []
    for count in (num_train, num_test):
        votes = np.zeros((len(sizes), len(variance)))
        for _ in range(count):
            factor = rng.randint(len(sizes))
            factors = draw(dis.BATCH)
            factors[:, factor] = factors[0, factor]
            local = np.var(represent(factors @ bases).astype(np.float64), axis=0, ddof=1)
            votes[factor, np.argmin(local[active] / variance[active])] += 1
        tables.append(votes)
    majority = tables[0].argmax(axis=0)
    return float(sum(tables[1][majority[code], code] for code in range(len(variance))) / tables[1].sum())


# ---- planted encoders


def entangled_table(sizes: tuple[int, ...], num_codes: int, seed: int = 0) -> np.ndarray:
    """Codes float32 (prod(sizes), num_codes) of a half disentangled encoder on the grid of factors."""
    rng = np.random.default_rng(seed)
    factors = np.indices(sizes).reshape(len(sizes), -1).T / np.array(sizes)  # (N, F)
    mixing = 0.3 * rng.normal(size=(len(sizes), num_codes)) + np.eye(len(sizes), num_codes)
    return (factors @ mixing + 0.05 * rng.normal(size=(len(factors), num_codes))).astype(np.float32)


def factor_grid(sizes: tuple[int, ...], represent: Callable[[np.ndarray], np.ndarray]) -> Grid:
    """A `Grid` over a function of the image index (n,) -> codes (n, D)."""
    data = SimpleNamespace(
        factor_sizes=sizes,
        index_of=lambda factors: np.ravel_multi_index(tuple(factors.T), sizes),
        images_at=lambda index: index,
    )
    return Grid(data, represent, batch_size=1024)
