"""Disentanglement metrics: MIG, SAP, IRS, DCI, FactorVAE, BetaVAE, modularity and linear alignment.

The definitions are those of disentanglement_lib (Locatello et al., ICML 2019) and, for the alignment, of GlanceNets
(Marconato et al., NeurIPS 2022, App. B). What each metric means, its range, its chance level and its cost stand in
`disentanglement.md`.

    python -m common.metrics.disentanglement CODES.npz
    python -m common.metrics.disentanglement CODES.npz --metrics mig dci --json
    python -m common.metrics.disentanglement CODES.npz --metrics mig --csv scores.csv --jobs 4

CODES.npz holds `codes` (n, D) and `factors` (n, F), and may hold `codes_test` and `factors_test`. From Python:

    evaluate(Arrays(codes, factors), ["mig", "dci"])                     # a table of codes
    evaluate(Grid(data, representation_function), ["factor_vae_metric"])  # an encoder on a factor set
"""

import argparse
import csv
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from joblib import Parallel, delayed
from numpy.random import RandomState
from sklearn.ensemble import GradientBoostingClassifier, HistGradientBoostingClassifier
from sklearn.inspection import permutation_importance
from sklearn.linear_model import Lasso, LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.multiclass import OneVsRestClassifier
from sklearn.svm import LinearSVC
from threadpoolctl import threadpool_limits

from common.errors import UserError, run_command, suggest
from common.metrics.disentanglement_points import (
    Arrays,
    Grid,
    Points,
    Split,
    bin_factors,
    check_varies,
    integer_factors,
)

__all__ = ["DEFAULT", "METRICS", "Arrays", "Grid", "bin_factors", "evaluate", "headline", "main", "table_row"]

Scores = dict[str, float]

NUM_TRAIN, NUM_TEST = 10_000, 5_000  # disentanglement_lib's configuration of every metric
BINS = 20
BATCH = 64  # points behind one vote (FactorVAE) or one difference (BetaVAE)
PRUNE_STD = 0.05  # FactorVAE ignores codes with a smaller standard deviation
IRS_QUANTILE = 0.99
PERMUTED = 2_000  # training points on which `dci_fast` permutes codes
GUESSING_MSE = 1 / 6  # error of one uniform number guessed by another, on [0, 1]
HAIR = (0, 1, 2, 3, 5)  # CelebA concept columns that exclude one another: bald, black, blond, brown, gray


# ------------------------------------------------------------------------------------------------ mutual information


def _bin_edges(column: np.ndarray, bins: int) -> np.ndarray:
    """Edges (bins + 1,) of equal intervals over the range of a column, in its own precision when that suffices."""
    try:
        return np.histogram_bin_edges(column, bins)
    except ValueError:  # a collapsed code: its range is a few float32 steps, too few for so many distinct edges
        return np.linspace(float(column.min()), float(column.max()), bins + 1)


def discretize(values: np.ndarray, bins: int = BINS) -> np.ndarray:
    """Bin numbers 1..bins (n, k) of values (n, k): equal intervals over each column's own range, left edges closed."""
    binned = np.empty(values.shape, np.int64)
    for k, column in enumerate(values.T):
        edges = _bin_edges(column, bins)
        scaled = (column.astype(np.float64) - float(edges[0])) * (bins / max(float(edges[-1] - edges[0]), 1e-300))
        guess = np.clip(scaled.astype(np.int64), 0, bins - 1)
        # the product rounds, so the edges decide; a guess is one bin off at most unless the edges themselves are coarse
        guess -= column < edges[guess]
        guess += (column >= edges[guess + 1]) & (guess < bins - 1)
        exact = (column >= edges[guess]) & ((column < edges[guess + 1]) | (guess == bins - 1))
        binned[:, k] = guess + 1 if exact.all() else np.digitize(column, edges[:-1])
    return binned


def _ranks(column: np.ndarray) -> tuple[np.ndarray, int]:
    """Small non-negative integers that tell the values of an integer column (n,) apart, and their upper bound."""
    low, high = int(column.min()), int(column.max())
    if high - low < 4 * len(column):
        return column - low, high - low + 1
    values, ranks = np.unique(column, return_inverse=True)
    return ranks, len(values)


def _entropy(counts: np.ndarray) -> float:
    """Entropy in nats of a table of counts."""
    counts = counts[counts > 0]
    total = counts.sum()
    return float(np.log(total) - (counts @ np.log(counts)) / total)


def mutual_information(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Mutual information in nats (D, F) of every column of integers (n, D) with every column of integers (n, F)."""
    right = [_ranks(column) for column in second.T]
    marginal = entropies(first)[:, None] + entropies(second)
    joint = np.empty_like(marginal)
    for i, column in enumerate(first.T):
        a, num_a = _ranks(column)
        for j, (b, num_b) in enumerate(right):
            joint[i, j] = _entropy(np.bincount(b * num_a + a, minlength=num_a * num_b))
    information = marginal - joint
    return np.where(information < 1e-12, 0.0, information)  # rounding leaves about 1e-15 for independent columns


def entropies(columns: np.ndarray) -> np.ndarray:
    """Entropy in nats (k,) of every column of integers (n, k)."""
    return np.array([_entropy(np.bincount(_ranks(column)[0])) for column in columns.T])


def best_gap(scores: np.ndarray) -> np.ndarray:
    """Best minus second best code (F,) of scores (D, F); with one code the second best is 0."""
    ordered = np.sort(np.vstack([np.zeros((2 - min(2, len(scores)), scores.shape[1])), scores]), axis=0)
    return ordered[-1] - ordered[-2]


def mig(points: Points, seed: int = 0, jobs: int = 1, num_train: int = NUM_TRAIN, num_test: int = NUM_TEST) -> Scores:
    """Mutual information gap (Chen et al. 2018), 0..1: how much better the best code informs than the second best."""
    data = points.split(num_train, 0, RandomState(seed))
    factors = integer_factors(data.factors)
    information = mutual_information(discretize(data.codes), factors)
    return {"discrete_mig": float(np.mean(best_gap(information) / entropies(factors)))}


def modularity_score(information: np.ndarray) -> float:
    """Modularity 0..1 of mutual information (D, F) (Ridgeway & Mozer 2018, eq. 2); a code that informs of nothing
    scores 0.
    """
    squared = information**2
    best = squared.max(axis=1)
    alive = best > 0
    spill = (squared.sum(axis=1) - best)[alive] / (best[alive] * max(squared.shape[1] - 1, 1))
    return float((1 - spill).sum() / len(information))


def _auc(model: OneVsRestClassifier, codes: np.ndarray, classes: np.ndarray) -> float:
    """Mean one-against-rest area under the ROC curve over the classes that occur among `classes` (n,)."""
    probability = model.predict_proba(codes)
    if len(model.classes_) == 2:
        return float(roc_auc_score(classes == model.classes_[1], probability[:, 1]))
    present = [k for k, label in enumerate(model.classes_) if 0 < np.sum(classes == label) < len(classes)]
    return float(np.mean([roc_auc_score(classes == model.classes_[k], probability[:, k]) for k in present]))


def _explicitness_of(codes: np.ndarray, classes: np.ndarray, codes_test: np.ndarray, classes_test: np.ndarray):
    model = OneVsRestClassifier(LogisticRegression(solver="liblinear", random_state=0)).fit(codes, classes)
    return _auc(model, codes, classes), _auc(model, codes_test, classes_test)


def modularity_explicitness(
    points: Points, seed: int = 0, jobs: int = 1, num_train: int = NUM_TRAIN, num_test: int = NUM_TEST
) -> Scores:
    """Modularity 0..1 and explicitness 0.5..1 (mean ROC-AUC of logistic regressions) of Ridgeway & Mozer 2018."""
    data = _integer_split(points, seed, num_train, num_test)
    areas = _over_factors(_explicitness_of, data, jobs)
    return {
        "modularity_score": modularity_score(mutual_information(discretize(data.codes), data.factors)),
        "explicitness_score_train": float(np.mean([train for train, _ in areas])),
        "explicitness_score_test": float(np.mean([test for _, test in areas])),
    }


# ------------------------------------------------------------------------------------------------ SAP


def _integer_split(points: Points, seed: int, num_train: int, num_test: int) -> Split:
    data = points.split(num_train, num_test, RandomState(seed))
    check_varies(data.factors, " among the training rows")
    return Split(data.codes, integer_factors(data.factors), data.codes_test, integer_factors(data.factors_test))


def _over_factors(function: Callable, data: Split, jobs: int, prefer: str = "processes") -> list:
    """`function(codes, classes, codes_test, classes_test)` for every factor, on `jobs` workers (-1: all cores)."""
    factors = range(data.factors.shape[1])
    # the factor with the most values takes the longest: it starts first, lest the other processes wait for it
    order = sorted(factors, key=lambda j: -len(np.unique(data.factors[:, j])))
    results = Parallel(n_jobs=jobs, prefer=prefer)(
        delayed(function)(data.codes, data.factors[:, j], data.codes_test, data.factors_test[:, j]) for j in order
    )
    return [results[order.index(j)] for j in factors]


def _sap_of(codes: np.ndarray, classes: np.ndarray, codes_test: np.ndarray, classes_test: np.ndarray) -> list[float]:
    """Held-out accuracy (D,) of one linear support vector classifier a code."""
    scores = []
    for code in range(codes.shape[1]):
        model = LinearSVC(C=0.01, class_weight="balanced", dual=False, random_state=0)
        model.fit(codes[:, code : code + 1], classes)
        scores.append(float(np.mean(model.predict(codes_test[:, code : code + 1]) == classes_test)))
    return scores


def sap_matrix(data: Split, jobs: int = 1) -> np.ndarray:
    """Held-out accuracy (D, F) of predicting each factor (integers) from each single code."""
    # threads: liblinear releases the GIL, and starting processes takes longer than all the fits
    return np.array(_over_factors(_sap_of, data, jobs, "threads")).T


def squared_correlations(codes: np.ndarray, factors: np.ndarray) -> np.ndarray:
    """Squared correlation (D, F) of codes (n, D) and factors (n, F), SAP's scores for continuous factors; 0 for a code
    with a variance below 1e-12.
    """
    codes, factors = codes - codes.mean(axis=0), factors - factors.mean(axis=0)
    freedom = len(codes) - 1
    covariance = codes.T @ factors / freedom
    var_codes, var_factors = (codes**2).sum(axis=0) / freedom, (factors**2).sum(axis=0) / freedom
    alive = var_codes > 1e-12
    scores = np.zeros_like(covariance)
    scores[alive] = covariance[alive] ** 2 / (var_codes[alive, None] * var_factors)
    return scores


def sap_score(
    points: Points, seed: int = 0, jobs: int = 1, num_train: int = NUM_TRAIN, num_test: int = NUM_TEST
) -> Scores:
    """Separated attribute predictability (Kumar et al. 2018): best minus second best single-code accuracy."""
    return {"SAP_score": float(np.mean(best_gap(sap_matrix(_integer_split(points, seed, num_train, num_test), jobs))))}


# ------------------------------------------------------------------------------------------------ IRS


def irs_details(codes: np.ndarray, binned: np.ndarray, quantile: float = IRS_QUANTILE) -> dict[str, np.ndarray]:
    """Interventional robustness (Suter et al. 2019) of codes (n, D), none constant, and binned factors (n, F).

    Returns `matrix` (D, F) = 1 - (mean over a factor's values of the `quantile` of |z - group mean|) / max_deviation,
    `scores` (D,) its best per code, `parents` (D,) the best factor, `max_deviations` (D,), and `irs`, the mean of the
    scores weighted by max_deviations.
    """
    codes = np.asarray(codes, np.float64)
    max_deviations = np.abs(codes - codes.mean(axis=0)).max(axis=0)
    matrix = np.empty((codes.shape[1], binned.shape[1]))
    for factor, column in enumerate(binned.T):
        order = np.argsort(column, kind="stable")
        starts = np.flatnonzero(np.diff(column[order])) + 1
        groups = np.split(codes[order], starts)
        spread = [np.quantile(np.abs(group - group.mean(axis=0)), quantile, axis=0) for group in groups]
        matrix[:, factor] = 1 - np.mean(spread, axis=0) / max_deviations
    scores = matrix.max(axis=1)
    return {
        "matrix": matrix,
        "scores": scores,
        "parents": matrix.argmax(axis=1),
        "max_deviations": max_deviations,
        "irs": np.average(scores, weights=max_deviations),
    }


def irs(points: Points, seed: int = 0, jobs: int = 1, num_train: int = NUM_TRAIN, num_test: int = NUM_TEST) -> Scores:
    """Interventional robustness score 0..1 (Suter et al. 2019); constant codes are left out, 0 when none varies.

    `num_active_dims` counts the codes that vary (the published code reports the sum of the codes under this name).
    """
    data = points.split(num_train, 0, RandomState(seed))
    active = np.ptp(data.codes, axis=0) > 0  # the variance of a constant may round to 1e-33
    score = 0.0
    if active.any():
        binned = discretize(integer_factors(data.factors))
        score = float(irs_details(data.codes[:, active], binned)["irs"])
    return {"IRS": score, "num_active_dims": float(active.sum())}


# ------------------------------------------------------------------------------------------------ DCI


def disentanglement_of(importance: np.ndarray) -> tuple[float, np.ndarray]:
    """Disentanglement 0..1 and its value per code (D,) from importance (D, F) >= 0 (Eastwood & Williams 2018)."""
    if importance.shape[1] == 1:
        raise UserError("disentanglement compares factors: at least 2 are needed")
    shares = importance + 1e-11
    shares = shares / shares.sum(axis=1, keepdims=True)
    per_code = 1 + (shares * np.log(shares)).sum(axis=1) / np.log(importance.shape[1])
    if importance.sum() == 0:
        importance = np.ones_like(importance)
    return float(per_code @ importance.sum(axis=1) / importance.sum()), per_code


def completeness_of(importance: np.ndarray) -> tuple[float, np.ndarray]:
    """Completeness 0..1 and its value per factor (F,) from importance (D, F) >= 0."""
    if importance.shape[0] == 1:
        return 1.0, np.ones(importance.shape[1])  # one code: whatever is encoded is encoded in one place
    return disentanglement_of(importance.T)


def _boosting_of(codes: np.ndarray, classes: np.ndarray, codes_test: np.ndarray, classes_test: np.ndarray):
    """Importance (D,), training and held-out accuracy of gradient boosted trees."""
    model = GradientBoostingClassifier(random_state=0).fit(codes, classes)
    train, test = (np.mean(model.predict(x) == y) for x, y in ((codes, classes), (codes_test, classes_test)))
    return np.abs(model.feature_importances_), train, test


def _fast_boosting_of(codes: np.ndarray, classes: np.ndarray, codes_test: np.ndarray, classes_test: np.ndarray):
    """Importance (D,), training and held-out accuracy of histogram boosted trees.

    Importance = the training accuracy lost when a code is permuted: like the gain importances of `dci` it shows what
    the fit used. On held-out points a code without information loses about 0, and the clipped noise would decide.
    """
    with threadpool_limits(1, user_api="openmp"):  # one core a factor, as in `dci`: the factors run beside one another
        model = HistGradientBoostingClassifier(max_depth=3, early_stopping=False, random_state=0).fit(codes, classes)
        train, test = (np.mean(model.predict(x) == y) for x, y in ((codes, classes), (codes_test, classes_test)))
        some = slice(PERMUTED)
        lost = permutation_importance(model, codes[some], classes[some], n_repeats=2, random_state=0).importances_mean
    return np.maximum(lost, 0), train, test


def dci_importance(data: Split, jobs: int = 1, fit: Callable = _boosting_of) -> tuple[np.ndarray, float, float]:
    """Importance (D, F) of each code for each factor (integers), mean training and mean held-out accuracy."""
    fits = _over_factors(fit, data, jobs)
    importance = np.stack([importance for importance, _, _ in fits], axis=1)
    return importance, float(np.mean([train for _, train, _ in fits])), float(np.mean([test for _, _, test in fits]))


def _dci(fit: Callable, points: Points, seed: int, jobs: int, num_train: int, num_test: int) -> Scores:
    importance, train, test = dci_importance(_integer_split(points, seed, num_train, num_test), jobs, fit)
    return {
        "informativeness_train": train,
        "informativeness_test": test,
        "disentanglement": disentanglement_of(importance)[0],
        "completeness": completeness_of(importance)[0],
    }


def dci(points: Points, seed: int = 0, jobs: int = 1, num_train: int = NUM_TRAIN, num_test: int = NUM_TEST) -> Scores:
    """Disentanglement, completeness, informativeness 0..1 (Eastwood & Williams 2018) from gradient boosted trees."""
    return _dci(_boosting_of, points, seed, jobs, num_train, num_test)


def dci_fast(
    points: Points, seed: int = 0, jobs: int = 1, num_train: int = NUM_TRAIN, num_test: int = NUM_TEST
) -> Scores:
    """DCI from histogram boosting and permutation importances: quicker, and NOT comparable with published DCI."""
    return _dci(_fast_boosting_of, points, seed, jobs, num_train, num_test)


# ------------------------------------------------------------------------------------------------ linear alignment


def _unit_range(values: np.ndarray) -> np.ndarray:
    """Columns (n, k) moved to [0, 1]; a constant column becomes 0."""
    values = np.asarray(values, np.float64)
    low, span = values.min(axis=0), np.ptp(values, axis=0)
    return (values - low) / np.where(span > 0, span, 1)


def alignment_linear(
    points: Points, seed: int = 0, jobs: int = 1, num_train: int = NUM_TRAIN, num_test: int = NUM_TEST
) -> Scores:
    """Alignment, completeness (0..1) and explicitness (<= 1, 0 = guessing) of GlanceNets, App. B.

    Least squares (smallest norm) from codes to factors, both moved to [0, 1]; importance = |weight|, explicitness =
    1 - 6 MSE on held-out points: half of the num_train + num_test points are fitted, half held out, as in the paper.
    Give a categorical factor as its one-hot columns.
    """
    half = (num_train + num_test) // 2
    data = points.split(half, half, RandomState(seed))
    check_varies(data.factors, " among the training rows")
    train = len(data.codes)
    codes = _unit_range(np.concatenate([data.codes, data.codes_test]))
    factors = _unit_range(np.concatenate([data.factors, data.factors_test]))
    design = np.column_stack([codes, np.ones(len(codes))])  # (n, D + 1)
    weights = np.linalg.lstsq(design[:train], factors[:train])[0]  # (D + 1, F)
    error = np.mean((design[train:] @ weights - factors[train:]) ** 2)
    importance = np.abs(weights[:-1])
    return {
        "alignment": disentanglement_of(importance)[0],
        "completeness": completeness_of(importance)[0],
        "explicitness": float(1 - error / GUESSING_MSE),
    }


def _l1_logistic() -> LogisticRegression:
    # `penalty` is deprecated since scikit-learn 1.8, and `l1_ratio` means nothing to liblinear before it
    new = LogisticRegression().get_params()["penalty"] == "deprecated"
    lasso = {"l1_ratio": 1.0} if new else {"penalty": "l1"}
    # the usual tolerance, 1e-4, leaves weights that move by 1e-3 of the largest with the solver's seed
    return LogisticRegression(C=100, solver="liblinear", tol=1e-6, max_iter=10_000, random_state=0, **lasso)


def celeba_categories(values: np.ndarray, hair: Iterable[int] = HAIR) -> np.ndarray:
    """(n, k) -> (n, k - 4): the hair columns become one column, their argmax 0..4, in front of the others in order."""
    hair = list(hair)
    return np.column_stack([values[:, hair].argmax(axis=1), np.delete(values, hair, axis=1)]).astype(np.float64)


def dci_celeba(codes: np.ndarray, concepts: np.ndarray, hair: Iterable[int] = HAIR) -> dict[str, float | np.ndarray]:
    """The linear DCI that GlanceNets report on CelebA.

    codes (n, >= k) in [0, 1] (sigmoid of the latents; the first k columns count), concepts (n, k) in {0, 1}. Rows
    without exactly one hair colour are dropped. Lasso (0.01) for the hair index, l1 logistic regression (C = 100) for
    the rest; importance = |coefficient| + 1e-7; explicitness = 1 - 6 MSE of the predictions on the same rows. Returns
    `alignment`, `completeness`, `explicitness` and `importance` (k - 4, k - 4), codes x concepts.
    """
    hair = list(hair)
    points = Arrays(codes, concepts)
    if points.codes.shape[1] < points.num_factors:
        raise UserError(f"codes has {points.codes.shape[1]} columns, fewer than the {points.num_factors} concepts")
    if max(hair) >= points.num_factors:
        raise UserError(f"hair columns {hair} do not fit {points.num_factors} concepts")
    one_colour = points.factors[:, hair].sum(axis=1) == 1
    if not one_colour.any():
        raise UserError(f"no row has exactly one of the hair concepts {hair}")
    z = celeba_categories(points.codes[one_colour, : points.num_factors], hair)
    g = celeba_categories(points.factors[one_colour], hair)
    check_varies(g, " among the rows with one hair colour")
    weights, errors = [], []
    for factor in range(g.shape[1]):
        model = Lasso(alpha=0.01) if factor == 0 else _l1_logistic()
        model.fit(z, g[:, factor])
        weights.append(np.abs(model.coef_).ravel() + 1e-7)
        errors.append(np.mean((model.predict(z) - g[:, factor]) ** 2))
    importance = np.stack(weights, axis=1)
    return {
        "alignment": disentanglement_of(importance)[0],
        "completeness": completeness_of(importance)[0],
        "explicitness": float(1 - np.mean(errors) / GUESSING_MSE),
        "importance": importance,
    }


# ------------------------------------------------------------------------------------------------ FactorVAE, BetaVAE


def factor_vae_argmin(batches: np.ndarray, global_variance: np.ndarray, active: np.ndarray) -> np.ndarray:
    """The code (m,) that varies least in batches (m, B, D), relative to its global variance (D,), counted among the
    active codes only.
    """
    local = batches[..., active].var(axis=1, ddof=1, dtype=np.float64)
    return np.argmin(local / global_variance[active], axis=1)


def count_votes(factor: np.ndarray, code: np.ndarray, num_factors: int, num_codes: int) -> np.ndarray:
    """Votes (F, D): how often each code (m,) answered for each factor (m,)."""
    return np.bincount(factor * num_codes + code, minlength=num_factors * num_codes).reshape(num_factors, num_codes)


def factor_vae_accuracies(votes_train: np.ndarray, votes_test: np.ndarray) -> Scores:
    """Accuracy of the majority vote code -> factor fitted on `votes_train` (F, D), on both tables of votes."""
    majority, code = votes_train.argmax(axis=0), np.arange(votes_train.shape[1])
    return {
        "train_accuracy": float(votes_train[majority, code].sum() / votes_train.sum()),
        "eval_accuracy": float(votes_test[majority, code].sum() / votes_test.sum()),
    }


def factor_vae_metric(
    points: Points, seed: int = 0, jobs: int = 1, num_train: int = NUM_TRAIN, num_test: int = NUM_TEST
) -> Scores:
    """FactorVAE score 1/F..1 (Kim & Mnih 2018): does the least varying code tell which factor was fixed? 0 when no
    code has a standard deviation of 0.05.
    """
    rng = RandomState(seed)
    variance = points.codes_for_variance(NUM_TRAIN, rng).var(axis=0, ddof=1, dtype=np.float64)
    active = np.sqrt(variance) >= PRUNE_STD
    if not active.any():
        return {"train_accuracy": 0.0, "eval_accuracy": 0.0, "num_active_dims": 0.0}
    votes = []
    for count in (num_train, num_test):
        table = np.zeros((points.num_factors, len(variance)), np.int64)
        for factor, batches in points.fixed_value(count, BATCH, rng):
            table += count_votes(factor, factor_vae_argmin(batches, variance, active), *table.shape)
        votes.append(table)
    return {**factor_vae_accuracies(*votes), "num_active_dims": float(active.sum())}


def beta_vae_accuracies(
    features: np.ndarray, factor: np.ndarray, features_test: np.ndarray, factor_test: np.ndarray
) -> Scores:
    """Accuracies of a logistic regression from mean absolute differences (m, D) to the shared factor (m,).

    Raises UserError when all points share one factor: there is nothing to tell apart.
    """
    if len(np.unique(factor)) < 2:
        raise UserError("the BetaVAE score tells factors apart: at least 2 factors and a few votes are needed")
    model = LogisticRegression().fit(features, factor)
    return {
        "train_accuracy": float(np.mean(model.predict(features) == factor)),
        "eval_accuracy": float(np.mean(model.predict(features_test) == factor_test)),
    }


def beta_vae_sklearn(
    points: Points, seed: int = 0, jobs: int = 1, num_train: int = NUM_TRAIN, num_test: int = NUM_TEST
) -> Scores:
    """BetaVAE score 1/F..1 (Higgins et al. 2017): a linear classifier of the factor that pairs of points share."""
    rng = RandomState(seed)
    fit: list[np.ndarray] = []
    for count in (num_train, num_test):
        chunks = [
            (np.mean(np.abs(first - second), axis=1, dtype=np.float64), factor)
            for factor, first, second in points.shared_pairs(count, BATCH, rng)
        ]
        fit += [np.concatenate(parts) for parts in zip(*chunks, strict=True)]
    return beta_vae_accuracies(*fit)


# ------------------------------------------------------------------------------------------------ registry


@dataclass(frozen=True)
class Metric:
    """A metric, and which of its results is THE number of a table."""

    function: Callable[..., Scores]
    headline: str


METRICS: dict[str, Metric] = {
    "mig": Metric(mig, "discrete_mig"),
    "sap_score": Metric(sap_score, "SAP_score"),
    "irs": Metric(irs, "IRS"),
    "factor_vae_metric": Metric(factor_vae_metric, "eval_accuracy"),
    "dci": Metric(dci, "disentanglement"),
    "beta_vae_sklearn": Metric(beta_vae_sklearn, "eval_accuracy"),
    "modularity_explicitness": Metric(modularity_explicitness, "modularity_score"),
    "alignment_linear": Metric(alignment_linear, "alignment"),
    "dci_fast": Metric(dci_fast, "disentanglement"),
}
DEFAULT = ("mig", "sap_score", "irs", "factor_vae_metric", "dci", "beta_vae_sklearn")


def check_names(names: Iterable[str]) -> list[str]:
    """The metric names as a list. Raises UserError for one that is not in METRICS."""
    names = list(names)
    for name in names:
        if name not in METRICS:
            raise UserError(f"unknown metric '{name}'{suggest(name, METRICS)}; known: {', '.join(METRICS)}")
    return names


def evaluate(
    points: Points,
    metrics: Iterable[str] = DEFAULT,
    seed: int = 0,
    jobs: int = 1,
    num_train: int = NUM_TRAIN,
    num_test: int = NUM_TEST,
) -> dict[str, Scores]:
    """All results of each named metric, every metric with its own `RandomState(seed)`.

    points: `Arrays` or `Grid`. jobs: workers for the metrics that fit one model a factor (-1: all cores); the results
    do not depend on it. num_train, num_test: points, or votes, of the fit and of the held-out part. Raises UserError
    (unknown metric, a constant factor, too few points, ...).
    """
    names = check_names(metrics)
    if min(num_train, num_test) < 2:
        raise UserError(f"num_train and num_test must be at least 2, not {num_train} and {num_test}")
    return {name: METRICS[name].function(points, seed, jobs, num_train, num_test) for name in names}


def headline(name: str, scores: Scores) -> float:
    """The number of metric `name` that tables show (for DCI the disentanglement)."""
    return scores[METRICS[name].headline]


def table_row(results: dict[str, Scores]) -> Scores:
    """One flat row: `eval_<metric>` = its headline, then every result as `<metric>.<key>`."""
    row = {f"eval_{name}": headline(name, scores) for name, scores in results.items()}
    row.update({f"{name}.{key}": value for name, scores in results.items() for key, value in scores.items()})
    return row


# ------------------------------------------------------------------------------------------------ command


def load_codes(path: str | Path, factor_bins: int | None = None) -> Arrays:
    """The `Arrays` of an npz file with keys `codes`, `factors` and perhaps `codes_test`, `factors_test`.

    factor_bins: cut factors that hold fractions into so many bins. Raises UserError for a missing, foreign or
    truncated file and for all that `Arrays` refuses.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"{path} is not a file; give an npz with keys codes (n, D) and factors (n, F)")
    with open(path, "rb") as file:
        if file.read(6) == b"\x93NUMPY":
            raise UserError(f"{path} holds one bare array; save with np.savez(path, codes=..., factors=...)")
    from common.datasets import readers  # PyTorch comes with it

    try:
        found = readers.read_npz(path)
    except UserError as error:
        raise UserError(f"{path} is no readable npz file of numbers ({error})") from error
    missing = {"codes", "factors"} - found.keys()
    if missing:
        raise UserError(f"{path} has no key {' and '.join(sorted(missing))} (it has {', '.join(found)})")
    arrays = {key: found[key] for key in ("codes", "factors", "codes_test", "factors_test") if key in found}
    points = Arrays(**arrays)
    if factor_bins is None:
        return points
    if factor_bins < 2:
        raise UserError(f"--factor-bins must be at least 2, not {factor_bins}")
    if points.test is None:
        return Arrays(points.codes, bin_factors(points.factors, factor_bins))
    binned = bin_factors(np.concatenate([points.factors, points.test[1]]), factor_bins)  # the same edges for both
    rows = len(points.codes)
    return Arrays(points.codes, binned[:rows], points.test[0], binned[rows:])


def _append_row(path: Path, row: dict[str, object]) -> None:
    """Add a row to a csv table. Raises UserError when the table has other columns."""
    columns = list(row)
    if path.is_file() and path.stat().st_size:
        try:
            with path.open(newline="") as file:
                present = next(csv.reader(file), [])
        except (csv.Error, UnicodeDecodeError) as error:
            raise UserError(f"{path} is no table ({error}); name another file") from error
        if present != columns:
            raise UserError(f"{path} has other columns ({', '.join(present)}); name another file")
        new = False
    else:
        new = True
    with path.open("a", newline="") as file:
        writer = csv.DictWriter(file, columns)
        if new:
            writer.writeheader()
        writer.writerow(row)


def main(argv: list[str] | None = None) -> None:
    """The command: score a file of codes and factors, print a table (or JSON), perhaps append a csv row."""
    parser = argparse.ArgumentParser(
        prog="python -m common.metrics.disentanglement",
        description="Score codes (n, D) against factors (n, F), both in one npz file.",
        allow_abbrev=False,
    )
    parser.add_argument("codes", metavar="CODES.npz", help="keys: codes, factors (and codes_test, factors_test)")
    parser.add_argument("--metrics", nargs="+", default=list(DEFAULT), metavar="NAME", help=", ".join(METRICS))
    parser.add_argument("--num-train", type=int, default=NUM_TRAIN, help="points or votes of each fit (%(default)s)")
    parser.add_argument("--num-test", type=int, default=NUM_TEST, help="held-out points or votes (%(default)s)")
    parser.add_argument("--factor-bins", type=int, help="cut factors that hold fractions into so many bins")
    parser.add_argument("--seed", type=int, default=0, help="of every draw (%(default)s)")
    parser.add_argument("--jobs", type=int, default=-1, help="workers, -1 for all cores (%(default)s)")
    parser.add_argument("--json", action="store_true", help="print all results as JSON")
    parser.add_argument("--csv", type=Path, metavar="FILE", help="append one row of all results to this table")
    options = parser.parse_args(argv)
    names = check_names(options.metrics)
    points = load_codes(options.codes, options.factor_bins)
    results = evaluate(points, names, options.seed, options.jobs, options.num_train, options.num_test)
    if options.csv:
        _append_row(options.csv, {"file": options.codes, "seed": options.seed, **table_row(results)})
    if options.json:
        print(json.dumps(results, indent=2))
        return
    for name, scores in results.items():
        details = "  ".join(f"{key} {value:.4f}" for key, value in scores.items())
        print(f"{name:24s} {headline(name, scores):.4f}   ({details})")


if __name__ == "__main__":
    sys.exit(run_command(main))
