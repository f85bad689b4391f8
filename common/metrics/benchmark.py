"""What the metrics cost on this machine, and what the usual implementations of the same numbers cost.

    python -m common.metrics.benchmark generation          # also against prdc and torch-fidelity, where installed
    python -m common.metrics.benchmark disentanglement     # the paper's protocol on dSprites' factors, 7 codes

CPU seconds of all threads, which other programs hardly change: the best of three for ours and for what takes less than
ten seconds, taken in turns, and by how much the results differ.
"""

import contextlib
import importlib.util
import io
import platform
import sys
import time
from collections.abc import Callable
from types import SimpleNamespace

import numpy as np
import scipy
import sklearn

from common.errors import UserError, run_command
from common.metrics.frechet import Statistics
from common.metrics.kernel import kernel_distance
from common.metrics.precision_recall import improved_precision_recall

PARTS = ("generation", "disentanglement")


def features(n: int, d: int, seed: int) -> np.ndarray:
    """Correlated features (n, d) with a spectrum over four decades, as those of a network."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((d, d)) * np.logspace(0, -2, d) / np.sqrt(d)
    return rng.standard_normal((n, d)) @ mixing + 0.05 * seed


def frechet_sqrtm(x: np.ndarray, y: np.ndarray) -> float:
    """The Frechet distance by scipy's matrix square root, with the usual offset for singular products."""
    from scipy.linalg import sqrtm

    (mu1, s1), (mu2, s2) = ((z.mean(0), np.cov(z, rowvar=False)) for z in (x, y))
    root = sqrtm(s1 @ s2)
    if not np.isfinite(root).all():
        offset = 1e-6 * np.eye(len(mu1))
        root = sqrtm((s1 + offset) @ (s2 + offset))
    return ((mu1 - mu2) ** 2).sum() + np.trace(s1) + np.trace(s2) - 2 * np.trace(root).real


def kernel_loop(x: np.ndarray, y: np.ndarray, subsets: int, size: int) -> float:
    """The kernel distance by scikit-learn's kernel, one subset after the other."""
    from sklearn.metrics.pairwise import polynomial_kernel

    stream, values = np.random.RandomState(12345), []
    for _ in range(subsets):
        a, b = (z[stream.choice(len(z), size, replace=False)] for z in (x, y))
        xx, yy, xy = (polynomial_kernel(p, q) for p, q in ((a, a), (b, b), (a, b)))
        within = xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)
        values.append(within / (size * (size - 1)) - 2 * xy.mean())
    return float(np.mean(values))


def neighbours_prdc(x: np.ndarray, y: np.ndarray) -> float:
    """Precision + recall by prdc, which computes density and coverage beside them."""
    prdc = importlib.import_module("prdc")
    with contextlib.redirect_stdout(io.StringIO()):
        scores = prdc.compute_prdc(y, x, nearest_k=3)
    return scores["precision"] + scores["recall"]


def neighbours_fidelity(x: np.ndarray, y: np.ndarray) -> float:
    """Precision + recall by torch-fidelity."""
    import torch

    score = importlib.import_module("torch_fidelity.metric_prc").prc_features_to_metric
    options = {"prc_neighborhood": 3, "prc_batch_size": 10_000, "verbose": False, "save_cpu_ram": False}
    scores = score(torch.from_numpy(x), torch.from_numpy(y), **options)
    return scores["precision"] + scores["recall"]


def generation(scale: float = 1.0) -> list[str]:
    """The rows of a Markdown table; `scale` shrinks the sizes, for a test."""
    n, d = (lambda count: max(int(count * scale), 40)), max(int(2048 * scale), 8)
    subsets = max(int(100 * scale), 2)
    lines = ["| what | against | ours, s | theirs, s | ratio | difference |", "|---|---|---|---|---|---|"]

    def row(what: str, x: np.ndarray, y: np.ndarray, ours: Callable, others: dict[str, Callable]) -> None:
        taken, values = _in_turns({"ours": ours, **others}, x, y)
        for name in others:
            ratio, change = taken[name] / taken["ours"], abs(values[name] - values["ours"]) / abs(values["ours"])
            lines.append(f"| {what} | {name} | {taken['ours']:.3g} | {taken[name]:.3g} | {ratio:.1f} | {change:.0e} |")

    frechet = lambda x, y: Statistics.from_features(x).distance(Statistics.from_features(y))  # noqa: E731
    for count in (n(6144), n(1000)):
        sets = features(count, d, 1), features(count, d, 2)
        row(f"Frechet distance, {count} x {d}", *sets, frechet, {"scipy.linalg.sqrtm": frechet_sqrtm})
    for count in (n(2000), n(10_000)):
        size, sets = min(n(1000), count // 2), (features(count, d, 1), features(count, d, 2))
        ours = lambda x, y, size=size: kernel_distance(x, y, subsets, size, legacy=True)[0]  # noqa: E731
        theirs = lambda x, y, size=size: kernel_loop(x, y, subsets, size)  # noqa: E731
        row(f"KID, {subsets} x {size} of {count} x {d}", *sets, ours, {"scikit-learn, a loop": theirs})
    packages = {"prdc": neighbours_prdc, "torch_fidelity": neighbours_fidelity}
    found = {name: call for name, call in packages.items() if importlib.util.find_spec(name)}
    for count, width in ((n(3000), 64), (n(4000), 512), (n(5000), d)):
        sets = features(count, width, 1), features(count, width, 2)
        ours = lambda x, y: sum(improved_precision_recall(x, y))  # noqa: E731
        row(f"k-NN precision and recall, {count} x {width}", *sets, ours, found)
    return lines


def _in_turns(calls: dict[str, Callable], *arguments) -> tuple[dict[str, float], dict[str, float]]:
    """CPU seconds and value of each call: the best of three rounds, of one for what takes ten seconds."""
    taken, values = dict.fromkeys(calls, np.inf), {}
    for _ in range(3):
        for name, call in calls.items():
            if name == "ours" or not 10 < taken[name] < np.inf:
                start = time.process_time()
                values[name] = float(call(*arguments))
                taken[name] = min(taken[name], time.process_time() - start)
    return taken, values


def disentanglement(sizes: tuple[int, ...] = (3, 6, 40, 32, 32), codes: int = 7, **draw: int) -> list[str]:
    """The rows of a Markdown table: every metric on a table of half disentangled codes of a grid of factors."""
    from common.metrics.disentanglement import METRICS, Grid

    rng = np.random.default_rng(0)
    factors = np.indices(sizes).reshape(len(sizes), -1).T / np.array(sizes)
    table = factors @ (0.3 * rng.normal(size=(len(sizes), codes)) + np.eye(len(sizes), codes))
    table = (table + 0.05 * rng.normal(size=table.shape)).astype(np.float32)
    index_of = lambda factors: np.ravel_multi_index(tuple(factors.T), sizes)  # noqa: E731
    data = SimpleNamespace(factor_sizes=sizes, index_of=index_of, images_at=lambda index: index)
    lines = ["| metric | value | CPU s |", "|---|---|---|"]
    for name, metric in METRICS.items():
        start = time.process_time()
        value = metric.function(Grid(data, lambda index: table[index], 4096), **draw)[metric.headline]
        lines.append(f"| {name} | {value:.4f} | {time.process_time() - start:.2g} |")
    return lines


def main(argv: list[str] | None = None) -> None:
    """Measure and print the tables."""
    words = sys.argv[1:] if argv is None else argv
    if {"-h", "--help"} & set(words):
        return print(__doc__)
    for word in words:
        if word not in PARTS:
            raise UserError(f"unknown part {word}; expected {' or '.join(PARTS)}")
    print(
        f"{platform.machine()}, numpy {np.__version__}, scipy {scipy.__version__}, scikit-learn {sklearn.__version__}"
    )
    for part in words or PARTS:
        print("\n".join({"generation": generation, "disentanglement": disentanglement}[part]()), flush=True)


if __name__ == "__main__":
    sys.exit(run_command(main))
