"""Time the disentanglement metrics against plain loops of the same definition, and check that both agree.

    python -m common.metrics.disentanglement_benchmark              # every row: about three minutes on two cores
    python -m common.metrics.disentanglement_benchmark --rows MIG IRS --jobs 1

The loops take the published order of work: one library call a pair of code and factor, one fit a factor, one draw and
one encoding a vote. FactorVAE is timed twice: with a table of codes, which shows our own arithmetic, and with a linear
encoder of 64x64 images, which shows what encoding each image once saves.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterable
from types import SimpleNamespace

import numpy as np
from numpy.random import RandomState
from sklearn.ensemble import GradientBoostingClassifier
from sklearn.metrics import mutual_info_score
from sklearn.svm import LinearSVC

from common.errors import UserError, run_command, suggest
from common.metrics import disentanglement as dis
from common.metrics.disentanglement_points import Grid, Split

SIZES = (3, 6, 40, 32, 32)  # the factors of dSprites
SMALL_SIZES = (3, 6, 10, 8, 8)  # for DCI, whose cost grows with the number of values
NUM_CODES = 7


def discretize_ref(values: np.ndarray, bins: int = dis.BINS) -> np.ndarray:
    """`discretize` by the histogram of each column."""
    return np.stack([np.digitize(column, np.histogram(column, bins)[1][:-1]) for column in values.T], axis=1)


def mig_ref(codes: np.ndarray, factors: np.ndarray) -> float:
    """MIG by one call of scikit-learn a pair."""
    binned = discretize_ref(codes)
    num_codes, num_factors = codes.shape[1], factors.shape[1]
    information = np.zeros((num_codes, num_factors))
    for i in range(num_codes):
        for j in range(num_factors):
            information[i, j] = mutual_info_score(factors[:, j], binned[:, i])
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


def dci_ref(data: Split) -> float:
    """DCI's disentanglement by one boosting after the other."""
    importance = np.zeros((data.codes.shape[1], data.factors.shape[1]))
    for j in range(data.factors.shape[1]):
        model = GradientBoostingClassifier(random_state=0).fit(data.codes, data.factors[:, j])
        (
            model.predict(data.codes),
            model.predict(data.codes_test),
        )  # for the informativeness, which the metric reports too
        importance[:, j] = np.abs(model.feature_importances_)
    total = 0.0
    for row in importance:
        shares = (row + 1e-11) / (row + 1e-11).sum()
        total += row.sum() * (1 + (shares * np.log(shares)).sum() / np.log(len(row)))
    return float(total / importance.sum())


def irs_ref(codes: np.ndarray, factors: np.ndarray) -> float:
    """IRS by one pass over all rows for every value of every factor."""
    codes = codes[:, codes.var(axis=0) > 0].astype(np.float64)
    binned = discretize_ref(factors)
    largest = np.max(np.abs(codes - codes.mean(axis=0)), axis=0)
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


def entangled_table(sizes: tuple[int, ...], num_codes: int = NUM_CODES, seed: int = 0) -> np.ndarray:
    """Codes float32 (prod(sizes), num_codes) of a half disentangled encoder on the grid of factors."""
    rng = np.random.default_rng(seed)
    factors = np.indices(sizes).reshape(len(sizes), -1).T / np.array(sizes)  # (N, F)
    mixing = 0.3 * rng.normal(size=(len(sizes), num_codes)) + np.eye(len(sizes), num_codes)
    return (factors @ mixing + 0.05 * rng.normal(size=(len(factors), num_codes))).astype(np.float32)


def image_encoder(count: int, seed: int = 0) -> Callable[[np.ndarray], np.ndarray]:
    """A linear encoder, image index (n,) -> codes float32 (n, NUM_CODES), of `count` random 64x64 uint8 images."""
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, size=(count, 64 * 64), dtype=np.uint8)
    weight = (rng.normal(size=(64 * 64, NUM_CODES)) / 64).astype(np.float32)
    return lambda index: (images[index].astype(np.float32) / 255) @ weight


def factor_grid(sizes: tuple[int, ...], represent: Callable[[np.ndarray], np.ndarray]) -> Grid:
    """A `Grid` over a function of the image index (n,) -> codes (n, D)."""
    data = SimpleNamespace(
        factor_sizes=sizes,
        index_of=lambda factors: np.ravel_multi_index(tuple(factors.T), sizes),
        images_at=lambda index: index,
    )
    return Grid(data, represent, batch_size=1024)


def _split(sizes: tuple[int, ...], num_train: int, num_test: int) -> tuple[np.ndarray, Split]:
    table = entangled_table(sizes)
    return table, factor_grid(sizes, lambda index: table[index]).split(num_train, num_test, RandomState(0))


def _cases(jobs: int) -> dict[str, tuple[str, Callable[[], float], Callable[[], float], int]]:
    """name -> (what the reference is, ours, the reference, repetitions of ours)."""
    table, data = _split(SIZES, dis.NUM_TRAIN, dis.NUM_TEST)
    _, small = _split(SMALL_SIZES, 2_000, 1_000)
    points = dis.Arrays(data.codes, data.factors)
    encode = image_encoder(int(np.prod(SMALL_SIZES)))
    return {
        "MIG": (
            "mutual_info_score a pair, 10000 points",
            lambda: dis.mig(points)["discrete_mig"],
            lambda: mig_ref(data.codes, data.factors),
            5,
        ),
        "SAP": (
            "LinearSVC a pair, 10000 + 5000 points",
            lambda: float(np.mean(dis.best_gap(dis.sap_matrix(data, jobs)))),
            lambda: sap_ref(data),
            2,
        ),
        "DCI": (
            "boosting factor by factor, 2000 + 1000 points, 35 classes",
            lambda: dis.disentanglement_of(dis.dci_importance(small, jobs)[0])[0],
            lambda: dci_ref(small),
            1,
        ),
        "IRS": (
            "all rows for every value, 10000 points",
            lambda: dis.irs(points)["IRS"],
            lambda: irs_ref(data.codes, data.factors),
            5,
        ),
        "FactorVAE": (
            "draw and look-up a vote, 15000 votes of 64",
            lambda: dis.factor_vae_metric(factor_grid(SIZES, lambda index: table[index]))["eval_accuracy"],
            lambda: factor_vae_ref(SIZES, lambda index: table[index], 0, dis.NUM_TRAIN, dis.NUM_TEST),
            1,
        ),
        "FactorVAE-images": (
            "draw and encoding a vote, 3000 votes of 64, 11520 images",
            lambda: dis.factor_vae_metric(factor_grid(SMALL_SIZES, encode), 0, 1, 2_000, 1_000)["eval_accuracy"],
            lambda: factor_vae_ref(SMALL_SIZES, encode, 0, 2_000, 1_000),
            1,
        ),
    }


NAMES = ("MIG", "SAP", "DCI", "IRS", "FactorVAE", "FactorVAE-images")


def _timed(function: Callable[[], float], repeat: int) -> tuple[float, float]:
    """Value and the shortest wall time in seconds of `repeat` calls."""
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        value = function()
        times.append(time.perf_counter() - start)
    return value, min(times)


def rows(names: Iterable[str] = NAMES, jobs: int = -1) -> list[dict[str, str | float]]:
    """One row a metric: name, reference, ours_s, reference_s (wall seconds), ratio = reference_s / ours_s.

    jobs: workers of SAP and DCI (-1: all cores). Raises AssertionError when ours and the loop disagree.
    """
    result = []
    cases = _cases(jobs)
    for name in names:
        reference, ours, loop, repeat = cases[name]
        value, ours_s = _timed(ours, repeat)
        expected, reference_s = _timed(loop, 1)
        assert abs(value - expected) < 1e-9, f"{name}: ours {value}, the loop {expected}"
        row = {"name": name, "reference": reference, "ours_s": ours_s, "reference_s": reference_s}
        result.append({**row, "ratio": reference_s / ours_s})
    return result


def main(argv: list[str] | None = None) -> None:
    """Print the table of ratios."""
    parser = argparse.ArgumentParser(
        prog="python -m common.metrics.disentanglement_benchmark",
        description="Time the disentanglement metrics against plain loops.",
        allow_abbrev=False,
    )
    parser.add_argument("--rows", nargs="+", default=list(NAMES), metavar="NAME", help=", ".join(NAMES))
    parser.add_argument("--jobs", type=int, default=-1, help="workers of SAP and DCI, -1 for all cores (%(default)s)")
    options = parser.parse_args(argv)
    for name in options.rows:
        if name not in NAMES:
            raise UserError(f"unknown row '{name}'{suggest(name, NAMES)}; known: {', '.join(NAMES)}")
    print(f"{'metric':16s} {'ours':>10s} {'loop':>10s} {'ratio':>7s}   loop reference")
    for row in rows(options.rows, options.jobs):
        times = f"{row['ours_s']:9.4f}s {row['reference_s']:9.4f}s {row['ratio']:6.1f}x"
        print(f"{row['name']:16s} {times}   {row['reference']}")


if __name__ == "__main__":
    sys.exit(run_command(main))
