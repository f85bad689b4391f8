"""Our metrics against the usual implementations, in seconds on this machine.

    python -m common.metrics.benchmark [generation|disentanglement]

What is compared, seconds of both, their ratio (reference over ours), and by how much the results differ. The generation
part counts CPU seconds (of all threads), which other programs on the machine hardly change.
"""

import argparse
import platform
import sys
import time
import warnings

import numpy as np
import scipy

from common.errors import run_command
from common.metrics.frechet import frechet_distance
from common.metrics.kernel import kernel_distance
from common.metrics.precision_recall import improved_precision_recall, prd_from_histograms


def rows() -> list[dict]:
    """One dict a row: name, reference, ours_s, reference_s, ratio, difference (relative, of the results)."""
    return [_frechet(), _frechet(few=True), _kernel(2000), _kernel(10_000), _prd(), _neighbours()]


def _features(n: int, d: int, seed: int) -> np.ndarray:
    """Correlated features with a spectrum over four decades, as those of a network."""
    rng = np.random.default_rng(seed)
    mixing = rng.standard_normal((d, d)) * np.logspace(0, -2, d) / np.sqrt(d)
    return rng.standard_normal((n, d)) @ mixing + 0.05 * seed


def _frechet(few: bool = False, d: int = 2048) -> dict:
    from scipy.linalg import sqrtm

    stats = []
    for seed in (1, 2):
        x = _features(1000 if few else 3 * d, d, seed)
        stats += [x.mean(0), np.cov(x, rowvar=False)]

    def reference():
        mu1, s1, mu2, s2 = stats
        root = sqrtm(s1 @ s2)
        if not np.isfinite(root).all():  # as the usual implementations do for singular products
            offset = 1e-6 * np.eye(d)
            root = sqrtm((s1 + offset) @ (s2 + offset))
        return ((mu1 - mu2) ** 2).sum() + np.trace(s1) + np.trace(s2) - 2 * np.trace(root).real

    name = f"Frechet distance, d={d}" + (", 1000 samples (singular)" if few else "")
    return _compare(name, "scipy.linalg.sqrtm", lambda: frechet_distance(*stats), reference)


def _kernel(n: int, d: int = 2048) -> dict:
    from sklearn.metrics.pairwise import polynomial_kernel

    x, y, size = _features(n, d, 1), _features(n, d, 2), 1000

    def reference():
        stream, values = np.random.RandomState(12345), []
        for _ in range(100):
            a, b = (z[stream.choice(n, size, replace=False)] for z in (x, y))
            xx, yy, xy = (polynomial_kernel(p, q) for p, q in ((a, a), (b, b), (a, b)))
            within = xx.sum() - np.trace(xx) + yy.sum() - np.trace(yy)
            values.append(within / (size * (size - 1)) - 2 * xy.mean())
        return float(np.mean(values))

    ours = lambda: kernel_distance(x, y, legacy=True)[0]  # noqa: E731
    return _compare(f"KID, 100 x {size} of {n}, d={d}", "loop over subsets (scikit-learn)", ours, reference)


def _prd(k: int = 20, angles: int = 1001) -> dict:
    rng = np.random.default_rng(0)
    pairs = [(rng.dirichlet(np.ones(k)), rng.dirichlet(np.ones(k))) for _ in range(10)]

    def reference():
        total = 0.0
        for e, r in pairs:
            for angle in np.linspace(1e-10, np.pi / 2 - 1e-10, angles):
                slope = np.tan(angle)
                total += sum(min(slope * r[c], e[c]) for c in range(k))
        return total

    ours = lambda: sum(prd_from_histograms(*pair, angles)[0].sum() for pair in pairs)  # noqa: E731
    return _compare("PRD curves, 10 runs (without k-means)", "loop over angles and clusters", ours, reference)


def _neighbours(n: int = 4000, d: int = 512, k: int = 3) -> dict:
    x, y = _features(n, d, 1), _features(n, d, 2)

    def share(points, manifold):
        radius = np.empty(n)
        for i in range(n):
            radius[i] = np.partition(((manifold - manifold[i]) ** 2).sum(1), k)[k]
        return np.mean([(((manifold - point) ** 2).sum(1) <= radius).any() for point in points])

    reference = lambda: share(x, y) + share(y, x)  # noqa: E731
    ours = lambda: sum(improved_precision_recall(x, y, k))  # noqa: E731
    return _compare(f"k-NN precision/recall, {n} x {d}", "loop over samples", ours, reference)


def _compare(name: str, reference_name: str, ours, reference) -> dict:
    """Best of three for ours, one run of the reference."""
    seconds, value = [], None
    for _ in range(3):
        start = time.process_time()
        value = ours()
        seconds.append(time.process_time() - start)
    start = time.process_time()
    expected = reference()
    reference_s = time.process_time() - start
    return {
        "name": name,
        "reference": reference_name,
        "ours_s": min(seconds),
        "reference_s": reference_s,
        "ratio": reference_s / min(seconds),
        "difference": abs(value - expected) / max(abs(expected), 1e-300),
    }


def table(found: list[dict]) -> str:
    """The rows as a Markdown table."""
    lines = ["| metric | against | ours, s | reference, s | ratio | relative difference |", "|---|---|---|---|---|---|"]
    for row in found:
        difference = f"{row['difference']:.0e}" if row.get("difference") is not None else ""
        lines.append(
            f"| {row['name']} | {row['reference']} | {row['ours_s']:.3g} | {row['reference_s']:.3g} "
            f"| {row['ratio']:.1f} | {difference} |"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(prog="python -m common.metrics.benchmark", description=__doc__.splitlines()[0])
    parser.add_argument("part", nargs="?", choices=("generation", "disentanglement"), help="default: both")
    part = parser.parse_args(argv).part
    print(f"{platform.machine()}, numpy {np.__version__}, scipy {scipy.__version__}")
    if part != "disentanglement":
        print(f"generation, CPU seconds\n{table(rows())}", flush=True)
    if part != "generation":
        from common.metrics import disentanglement_benchmark

        print(f"disentanglement, wall seconds\n{table(disentanglement_benchmark.rows())}", flush=True)


if __name__ == "__main__":
    warnings.simplefilter("default")
    sys.exit(run_command(main))
