"""A generated set against a reference set: features once, then every metric asked for."""

import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.errors import UserError, suggest
from common.metrics.features import Extractor, FeatureCache, extractor_kind, make_extractor
from common.metrics.frechet import Statistics, check_features, need_one_extractor, read_npz
from common.metrics.inputs import Images, differences, open_images
from common.metrics.kernel import kernel_distance
from common.metrics.precision_recall import f_beta_pair, improved_precision_recall, precision_recall_distribution

METRICS = ("fid", "kid", "prd", "ipr")


@dataclass
class Sample:
    """One of the two sets: images, or features, or only their statistics."""

    name: str
    images: Images | None = None
    features: np.ndarray | None = None
    statistics: Statistics | None = None
    extractor: str = ""  # fingerprint, empty when unknown

    @property
    def n(self) -> int:
        """Number of images or feature rows; 0 when a statistics file does not tell."""
        rows = self.images if self.images is not None else self.features
        return len(rows) if rows is not None else self.statistics.n

    def moments(self) -> Statistics:
        """The statistics as given, else those of the features."""
        return self.statistics or Statistics.from_features(self.features, self.extractor)


def score(
    evaluated,
    reference,
    metrics=("fid", "kid"),
    features: str | Extractor = "inception",
    *,
    cache: FeatureCache | None = None,
    limit: int | None = None,
    seed: int = 0,
    kid_subsets: int = 100,
    kid_subset_size: int = 1000,
    kid_seed: int = 12345,
    kid_legacy: bool = False,
    prd_clusters: int = 20,
    prd_angles: int = 1001,
    prd_runs: int = 10,
    ipr_k: int = 3,
    **options,
) -> dict:
    """All `metrics` of `evaluated` against `reference` as a flat dict of numbers and strings, ready for JSON.

    Each set: whatever `open_images` takes, an array or tensor of features (n, d), a list of images or of features, a
    `Statistics`, or an .npz with `features` (n, d) or `mu` and `sigma` (`fid` only, unless it holds `activations`).
    metrics: fid, kid, prd, ipr; one, or several.
    features: for images, a name for `make_extractor` (`options` are its options) or an extractor. `cache`: keeps
    features on disk. `limit`: the first so many images. PRD needs sets of one size and draws (by `seed`) that many rows
    from the larger one, with a warning. Sets whose pixels, colour or file format differ are compared with a warning.
    Raises UserError for unknown metrics, unusable sets and options out of range.
    """
    if not isinstance(metrics, Iterable):
        raise UserError(f"metrics={metrics!r}: expected a name, or several; known: {', '.join(METRICS)}")
    metrics = tuple(dict.fromkeys([metrics] if isinstance(metrics, str) else map(str, metrics)))
    for metric in metrics:
        if metric not in METRICS:
            raise UserError(f"unknown metric '{metric}'{suggest(metric, METRICS)}; known: {', '.join(METRICS)}")
    if not metrics:
        raise UserError(f"no metric asked for; known: {', '.join(METRICS)}")
    if isinstance(features, str):
        extractor_kind(features)
    load = {"size": options.get("size"), "mode": options.get("mode") or "paper"}
    x, y = samples = [_open(source, limit, load) for source in (evaluated, reference)]
    _check(samples, metrics, ipr_k, prd_clusters)

    extractor = None
    if any(sample.images is not None for sample in samples):
        extractor = features if isinstance(features, Extractor) else make_extractor(features, **options)
        _extract(samples, extractor, cache)
    need_one_extractor(x.extractor, y.extractor)
    device = extractor.device if extractor is not None else "cpu"

    result = {"n_evaluated": x.n, "n_reference": y.n, **_describe(extractor)}
    if "fid" in metrics:
        result["fid"] = x.moments().distance(y.moments())
    if "kid" in metrics:
        size = min(kid_subset_size, x.n, y.n)
        result["kid_subsets"], result["kid_subset_size"] = 1 if size == x.n == y.n else kid_subsets, size
        draw = {"subsets": kid_subsets, "subset_size": kid_subset_size, "seed": kid_seed, "legacy": kid_legacy}
        result["kid_mean"], result["kid_std"] = kernel_distance(x.features, y.features, **draw, device=device)
    if "prd" in metrics:
        sets = _balance(x.features, y.features, seed)
        curve = precision_recall_distribution(*sets, prd_clusters, prd_angles, prd_runs, seed)
        result["prd_n"] = len(sets[0])
        result["prd_f8"], result["prd_f1/8"] = f_beta_pair(*curve)
    if "ipr" in metrics:
        result["ipr_precision"], result["ipr_recall"] = improved_precision_recall(x.features, y.features, ipr_k, device)
    return result


def _check(samples: list[Sample], metrics: tuple[str, ...], ipr_k: int, prd_clusters: int) -> None:
    """Refuse sets that are too small or hold too little for the metrics, before any feature is computed."""
    least = max(2, ipr_k + 1 if "ipr" in metrics else 0)
    for sample in samples:
        only = sample.images is None and sample.features is None
        if sample.n < least and not (only and sample.n == 0):
            raise UserError(f"{sample.name}: {sample.n} image(s), at least {least} are needed")
        if only and set(metrics) != {"fid"}:
            raise UserError(f"{sample.name}: statistics without features serve fid only; leave out the other metrics")
    least = 2 * min(sample.n for sample in samples)
    if "prd" in metrics and least < prd_clusters:
        raise UserError(f"prd: {least} samples for {prd_clusters} clusters; use more samples or fewer clusters")


def _open(source, limit: int | None, load: dict) -> Sample:
    """A set as images, features or statistics, whichever the source holds."""
    name = str(source) if isinstance(source, (str, Path)) else type(source).__name__
    if isinstance(source, Statistics):
        return Sample(name, statistics=source, extractor=source.extractor)
    source = _stacked(source) if isinstance(source, (list, tuple)) else source
    if getattr(source, "ndim", None) == 2:
        return Sample(name, features=check_features(source[:limit], f"features ({name})"))
    if isinstance(source, (str, Path)) and Path(source).suffix == ".npz":
        arrays = read_npz(source)
        if "mu" in arrays and "sigma" in arrays:
            rows = arrays.get("activations")
            rows = check_features(rows, f"{name} activations") if rows is not None else None
            statistics = Statistics.load(source)
            return Sample(name, features=rows, statistics=statistics, extractor=statistics.extractor)
        if "features" in arrays and arrays["features"].ndim == 2:
            rows = check_features(arrays["features"][:limit], f"{name} features")
            return Sample(name, features=rows, extractor=str(arrays.get("extractor", "")))
    return Sample(name, images=open_images(source, limit, **load))


def _stacked(items: Sequence) -> np.ndarray | Sequence:
    """Images of one size, or rows of features, as an array; batches of images, and what is none of these, as it is."""
    try:
        array = np.asarray([item.detach().cpu() if hasattr(item, "detach") else item for item in items])
    except ValueError:  # of several sizes
        return items
    return array if array.ndim in (2, 3, 4) and array.dtype.kind in "fiu" else items


def _extract(samples: list[Sample], extractor: Extractor, cache: FeatureCache | None) -> None:
    """Fill in the features of the samples that are images; extractors that adapt do so on the reference."""
    images = [sample.images for sample in samples]
    if None not in images:
        for line in differences(*images):
            warnings.warn(line, stacklevel=3)
    if images[1] is not None:
        extractor.fit(images[1])
    for sample in samples:
        if sample.images is not None:
            sample.extractor = extractor.fingerprint
            features = cache.features(sample.images, extractor) if cache else extractor.features(sample.images)
            sample.features = features


def _describe(extractor: Extractor | None) -> dict:
    """Name, fingerprint, resize mode and comparability of the features."""
    if extractor is None:
        return {
            "features": "given",
            "fingerprint": "",
            "resize": "",
            "comparable": False,
            "note": "features as they were given: their extractor decides what they may be compared to",
        }
    return {
        "features": extractor.name,
        "fingerprint": extractor.fingerprint,
        "resize": extractor.mode,
        "comparable": extractor.comparable,
        "note": extractor.note,
    }


def _balance(x: np.ndarray, y: np.ndarray, seed: int) -> tuple[np.ndarray, np.ndarray]:
    size = min(len(x), len(y))
    if len(x) == len(y):
        return x, y
    warnings.warn(f"prd: {size} of {max(len(x), len(y))} samples drawn from the larger set, to compare equal numbers")
    stream = np.random.default_rng(seed)
    return tuple(
        part if len(part) == size else part[np.sort(stream.choice(len(part), size, replace=False))] for part in (x, y)
    )
