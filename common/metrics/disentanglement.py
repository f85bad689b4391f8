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

import csv
import functools
import io
import json
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from joblib import Parallel, delayed
from numpy.random import RandomState
from pydantic import AfterValidator, Field
from sklearn.ensemble import GradientBoostingClassifier, HistGradientBoostingClassifier
from sklearn.inspection import permutation_importance
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import roc_auc_score
from sklearn.svm import LinearSVC
from threadpoolctl import threadpool_limits

from common.errors import UserError, run_command, suggest
from common.metrics import paths_and_options
from common.metrics.disentanglement_points import Arrays, Grid, Split, bin_factors, check_varies, integer_factors
from common.options import Options, Seed, from_flags, option

__all__ = ["DEFAULT", "METRICS", "Arrays", "Grid", "bin_factors", "evaluate", "headline", "main", "table_row"]

Points = Arrays | Grid
Scores = dict[str, Any]  # numbers; None where a number is not defined, and then the reason under another key

NUM_TRAIN, NUM_TEST = 10_000, 5_000  # disentanglement_lib's configuration of every metric
BINS = 20
BATCH = 64  # points behind one vote (FactorVAE) or one difference (BetaVAE)
PRUNE_STD = 0.05  # FactorVAE ignores codes with a smaller standard deviation
IRS_QUANTILE = 0.99
PERMUTED = 2_000  # training points on which `dci_fast` permutes codes
GUESSING_MSE = 1 / 6  # error of one uniform number guessed by another, on [0, 1]


@dataclass(frozen=True)
class Draw:
    """How a metric takes its points: seed, workers (-1: all cores), points or votes of the fit and held out."""

    seed: int = 0
    jobs: int = 1
    num_train: int = NUM_TRAIN
    num_test: int = NUM_TEST

    def __post_init__(self) -> None:
        if min(self.num_train, self.num_test) < 2:
            raise UserError(f"num_train and num_test must be at least 2, not {self.num_train} and {self.num_test}")


@dataclass(frozen=True)
class Metric:
    """A metric, and which of its results is THE number of a table."""

    function: Callable[..., Scores]
    headline: str


METRICS: dict[str, Metric] = {}


def _metric(headline: str) -> Callable:
    """Register a function of (points, Draw) as a metric `name(points | codes, factors, seed=, jobs=, ...)`."""

    def register(function: Callable[[Points, Draw], Scores]) -> Callable[..., Scores]:
        @functools.wraps(function)
        def front(points: Any, factors: Any = None, **draw: int) -> Scores:
            if not isinstance(points, Points):
                points = Arrays(points, factors)
            return function(points, Draw(**draw))

        del front.__wrapped__  # its signature is another one
        METRICS[function.__name__] = Metric(front, headline)
        return front

    return register


# ------------------------------------------------------------------------------------------------ mutual information


def _bin_edges(column: np.ndarray, bins: int) -> np.ndarray:
    """Edges (bins + 1,) of equal intervals over the range of a column, in its own precision when that suffices."""
    try:
        return np.histogram_bin_edges(column, bins)
    except ValueError:  # a collapsed code: its range is a few float32 steps, too few for so many distinct edges
        return np.linspace(float(column.min()), float(column.max()), bins + 1)


def discretize(values: np.ndarray, bins: int = BINS) -> np.ndarray:
    """Bin numbers 1..bins (n, k) of values (n, k): equal intervals over each column's own range, left edges closed."""
    return np.stack([np.digitize(column, _bin_edges(column, bins)[:-1]) for column in values.T], axis=1)


def _ranks(column: np.ndarray) -> np.ndarray:
    """0, 1, ... for the values of a column (n,), in their order."""
    return np.unique(column, return_inverse=True)[1]


def _entropy(counts: np.ndarray) -> float:
    """Entropy in nats of a table of counts."""
    counts = counts[counts > 0]
    total = counts.sum()
    return float(np.log(total) - (counts @ np.log(counts)) / total)


def mutual_information(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Mutual information in nats (D, F) of every column of integers (n, D) with every column of integers (n, F)."""
    left, right = ([_ranks(column) for column in table.T] for table in (first, second))
    joint = [[_entropy(np.bincount(b * (a.max() + 1) + a)) for b in right] for a in left]
    information = entropies(first)[:, None] + entropies(second) - np.array(joint)
    return np.where(information < 1e-12, 0.0, information)  # rounding leaves about 1e-15 for independent columns


def entropies(columns: np.ndarray) -> np.ndarray:
    """Entropy in nats (k,) of every column of integers (n, k)."""
    return np.array([_entropy(np.bincount(_ranks(column))) for column in columns.T])


def best_gap(scores: np.ndarray) -> np.ndarray:
    """Best minus second best code (F,) of scores (D, F); with one code the second best is 0."""
    ordered = np.sort(np.vstack([np.zeros((2 - min(2, len(scores)), scores.shape[1])), scores]), axis=0)
    return ordered[-1] - ordered[-2]


@_metric("discrete_mig")
def mig(points: Points, draw: Draw) -> Scores:
    """Mutual information gap (Chen et al. 2018), 0..1: how much better the best code informs than the second best."""
    data = points.split(draw.num_train, 0, RandomState(draw.seed))
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


def _auc(probability: np.ndarray, labels: np.ndarray, classes: np.ndarray) -> float | None:
    """Mean one-against-rest area under the ROC curve of probabilities (n, K) of `labels` (K,), over those labels that
    some but not all of `classes` (n,) have; None when there is no such label.
    """
    areas = [
        roc_auc_score(classes == label, probability[:, k])
        for k, label in enumerate(labels)
        if 0 < np.sum(classes == label) < len(classes)
    ]
    return float(np.mean(areas)) if areas else None


def _explicitness_of(codes: np.ndarray, classes: np.ndarray, codes_test: np.ndarray, classes_test: np.ndarray):
    """Areas on training and held-out points of a logistic regression of standardised codes."""
    mean, std = codes.mean(axis=0, dtype=np.float64), codes.std(axis=0, dtype=np.float64)
    std[(np.ptp(codes, axis=0) == 0) | (std == 0)] = np.inf  # that of a constant code may round to 1e-17 of its value
    train, test = ((part - mean) / std for part in (codes, codes_test))
    model = LogisticRegression(max_iter=1000).fit(train, classes)
    return tuple(_auc(model.predict_proba(x), model.classes_, y) for x, y in ((train, classes), (test, classes_test)))


@_metric("modularity_score")
def modularity_explicitness(points: Points, draw: Draw) -> Scores:
    """Modularity 0..1 and explicitness 0.5..1 of Ridgeway & Mozer 2018: the mean area under the ROC curve, over factors
    and their values, of a logistic regression of codes standardised by the training points.

    Without a value that some but not all held-out points have, `explicitness_score_test` is None, and
    `explicitness_reason` names the factor.
    """
    data = _integer_split(points, draw)
    areas = _over_factors(_explicitness_of, data, draw.jobs)
    undefined = [factor for factor, (_, test) in enumerate(areas) if test is None]
    scores: Scores = {
        "modularity_score": modularity_score(mutual_information(discretize(data.codes), data.factors)),
        "explicitness_score_train": float(np.mean([train for train, _ in areas])),
        "explicitness_score_test": None if undefined else float(np.mean([test for _, test in areas])),
    }
    if undefined:
        scores["explicitness_reason"] = (
            f"factor column {undefined[0]}: all held-out points have one value, or values that no training point has"
        )
    return scores


# ------------------------------------------------------------------------------------------------ SAP


def _integer_split(points: Points, draw: Draw) -> Split:
    data = points.split(draw.num_train, draw.num_test, RandomState(draw.seed))
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


@_metric("SAP_score")
def sap_score(points: Points, draw: Draw) -> Scores:
    """Separated attribute predictability (Kumar et al. 2018): best minus second best single-code accuracy."""
    return {"SAP_score": float(np.mean(best_gap(sap_matrix(_integer_split(points, draw), draw.jobs))))}


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


@_metric("IRS")
def irs(points: Points, draw: Draw) -> Scores:
    """Interventional robustness score 0..1 (Suter et al. 2019); constant codes are left out, 0 when none varies.

    `num_active_dims` counts the codes that vary (the published code reports the sum of the codes under this name).
    """
    data = points.split(draw.num_train, 0, RandomState(draw.seed))
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


def _dci(fit: Callable, points: Points, draw: Draw) -> Scores:
    importance, train, test = dci_importance(_integer_split(points, draw), draw.jobs, fit)
    return {
        "informativeness_train": train,
        "informativeness_test": test,
        "disentanglement": disentanglement_of(importance)[0],
        "completeness": completeness_of(importance)[0],
    }


@_metric("disentanglement")
def dci(points: Points, draw: Draw) -> Scores:
    """Disentanglement, completeness, informativeness 0..1 (Eastwood & Williams 2018) from gradient boosted trees."""
    return _dci(_boosting_of, points, draw)


@_metric("disentanglement")
def dci_fast(points: Points, draw: Draw) -> Scores:
    """DCI from histogram boosting and permutation importances: quicker, and NOT comparable with published DCI."""
    return _dci(_fast_boosting_of, points, draw)


# ------------------------------------------------------------------------------------------------ linear alignment


def _unit_range(values: np.ndarray) -> np.ndarray:
    """Columns (n, k) moved to [0, 1]; a constant column becomes 0."""
    values = np.asarray(values, np.float64)
    low, span = values.min(axis=0), np.ptp(values, axis=0)
    return (values - low) / np.where(span > 0, span, 1)


@_metric("alignment")
def alignment_linear(points: Points, draw: Draw) -> Scores:
    """Alignment, completeness (0..1) and explicitness (<= 1, 0 = guessing) of GlanceNets, App. B.

    Least squares (smallest norm) from codes to factors, both moved to [0, 1]; importance = |weight|, explicitness =
    1 - 6 MSE on held-out points: half of the num_train + num_test points are fitted, half held out, as in the paper.
    Give a categorical factor as its one-hot columns.
    """
    half = (draw.num_train + draw.num_test) // 2
    data = points.split(half, half, RandomState(draw.seed))
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


@_metric("eval_accuracy")
def factor_vae_metric(points: Points, draw: Draw) -> Scores:
    """FactorVAE score 1/F..1 (Kim & Mnih 2018): does the least varying code tell which factor was fixed? 0 when no
    code has a standard deviation of 0.05.
    """
    rng = RandomState(draw.seed)
    variance = points.codes_for_variance(NUM_TRAIN, rng).var(axis=0, ddof=1, dtype=np.float64)
    active = np.sqrt(variance) >= PRUNE_STD
    if not active.any():
        return {"train_accuracy": 0.0, "eval_accuracy": 0.0, "num_active_dims": 0.0}
    votes = []
    for count in (draw.num_train, draw.num_test):
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


@_metric("eval_accuracy")
def beta_vae_sklearn(points: Points, draw: Draw) -> Scores:
    """BetaVAE score 1/F..1 (Higgins et al. 2017): a linear classifier of the factor that pairs of points share."""
    rng = RandomState(draw.seed)
    fit: list[np.ndarray] = []
    for count in (draw.num_train, draw.num_test):
        chunks = [
            (np.mean(np.abs(first - second), axis=1, dtype=np.float64), factor)
            for factor, first, second in points.shared_pairs(count, BATCH, rng)
        ]
        fit += [np.concatenate(parts) for parts in zip(*chunks, strict=True)]
    return beta_vae_accuracies(*fit)


# ------------------------------------------------------------------------------------------------ all together

DEFAULT = ("mig", "sap_score", "irs", "factor_vae_metric", "dci", "beta_vae_sklearn")


def check_names(names: Iterable[str]) -> list[str]:
    """The metric names as a list. Raises UserError for one that is not in METRICS."""
    names = list(names)
    for name in names:
        if name not in METRICS:
            raise UserError(f"unknown metric '{name}'{suggest(name, METRICS)}; known: {', '.join(METRICS)}")
    return names


def evaluate(points: Points, metrics: Iterable[str] = DEFAULT, **draw: int) -> dict[str, Scores]:
    """All results of each named metric, every metric with its own `RandomState(seed)`.

    points: `Arrays` or `Grid`. draw: seed=0, jobs=1 (workers for the metrics that fit one model a factor, -1: all
    cores; the results do not depend on it), num_train=10000 and num_test=5000 points, or votes, of the fit and held
    out. Raises UserError (unknown metric, a constant factor, too few points, ...).
    """
    return {name: METRICS[name].function(points, **draw) for name in check_names(metrics)}


def headline(name: str, scores: Scores) -> float | None:
    """The number of metric `name` that tables show (for DCI the disentanglement)."""
    return scores[METRICS[name].headline]


def table_row(results: dict[str, Scores]) -> Scores:
    """One flat row: `eval_<metric>` = its headline, then every number as `<metric>.<key>`."""
    row = {f"eval_{name}": headline(name, scores) for name, scores in results.items()}
    numbers = ((name, key, value) for name, scores in results.items() for key, value in scores.items())
    return row | {f"{name}.{key}": value for name, key, value in numbers if not isinstance(value, str)}


# ------------------------------------------------------------------------------------------------ command


def load_codes(path: str | Path, factor_bins: int | None = None) -> Arrays:
    """The `Arrays` of an npz file with keys `codes`, `factors` and perhaps `codes_test`, `factors_test`.

    factor_bins: cut factors that hold fractions into so many bins, at least 2. Raises UserError for a missing, foreign
    or truncated file and for all that `Arrays` refuses.
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
    if points.test is None:
        return Arrays(points.codes, bin_factors(points.factors, factor_bins))
    binned = bin_factors(np.concatenate([points.factors, points.test[1]]), factor_bins)  # the same edges for both
    rows = len(points.codes)
    return Arrays(points.codes, binned[:rows], points.test[0], binned[rows:])


def _check_table(path: Path, names: list[str]) -> bool:
    """Whether a csv table is still to be made. Raises UserError when it cannot be, or holds other metrics."""
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise UserError(f"cannot write the table {path}: name a file in a folder that exists")
    if not (path.is_file() and path.stat().st_size):
        return True
    try:
        with path.open(newline="") as file:
            present = next(csv.reader(file), [])
    except (csv.Error, UnicodeDecodeError) as error:
        raise UserError(f"{path} is no table ({error}); name another file") from error
    if [column for column in present if column.startswith("eval_")] != [f"eval_{name}" for name in names]:
        raise UserError(f"{path} has other columns ({', '.join(present)}); name another file")
    return False


def _workers(jobs: int) -> int:
    if jobs < 1 and jobs != -1:
        raise ValueError("expected a number of workers, or -1 for all cores")
    return jobs


class Config(Options):
    """The options of the command."""

    metrics: list[str] = option(list(DEFAULT), f"what to compute, of {', '.join(METRICS)}", min_length=1)
    num_train: Annotated[int, Field(ge=2, le=10_000_000)] = option(NUM_TRAIN, "points or votes of each fit")
    num_test: Annotated[int, Field(ge=2, le=10_000_000)] = option(NUM_TEST, "held-out points or votes")
    factor_bins: Annotated[int, Field(ge=2, le=1_000_000)] | None = option(
        None, "cut factors that hold fractions into so many bins"
    )
    seed: Seed = option(0, "of every draw")
    jobs: Annotated[int, Field(le=1024), AfterValidator(_workers)] = option(-1, "workers, -1 for all cores")
    as_json: bool = option(False, "print all results as JSON", flags=("--json",))
    csv: Path | None = option(None, "append one row of all results to this table")


def main(argv: list[str] | None = None) -> None:
    """The command: score a file of codes and factors, print a table (or JSON), perhaps append a csv row."""
    (codes,), words = paths_and_options(sys.argv[1:] if argv is None else argv, ("CODES.npz",))
    options, _ = from_flags(Config, words, about=f"{__doc__}\noptions:")
    names = check_names(options.metrics)
    new = options.csv is not None and _check_table(options.csv, names)
    draw = {key: getattr(options, key) for key in ("seed", "jobs", "num_train", "num_test")}
    results = evaluate(load_codes(codes, options.factor_bins), names, **draw)
    print(json.dumps(results, indent=2, allow_nan=False) if options.as_json else _table(results))
    if options.csv is not None:
        from common.checkpoint import append_text  # PyTorch comes with it

        row = {"file": codes, "seed": options.seed, **table_row(results)}
        lines = io.StringIO(newline="")
        csv.writer(lines).writerows([row.keys()] * new + [row.values()])
        append_text(options.csv, lines.getvalue())


def _table(results: dict[str, Scores]) -> str:
    lines = []
    for name, scores in results.items():
        shown = {key: f"{value:.4f}" if isinstance(value, float) else str(value) for key, value in scores.items()}
        details = "  ".join(f"{key} {value}" for key, value in shown.items())
        lines.append(f"{name:24s} {shown[METRICS[name].headline]}   ({details})")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(run_command(main))
