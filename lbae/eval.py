"""Score folders of images against a reference folder: Frechet distance, kernel distance, precision and recall.

    python lbae/eval.py s=<reference folder> t=<folder>[,<folder>...] [feat=inception|lenet|pixel-pca64|...]

Run it in an experiment's folder (eval.sh does): it appends a line to results.txt, draws PR.pdf and PR.png, and keeps
models/<e>.cp when the distance of the first folder is the best so far (fid-best.txt). The metrics are those of
common.metrics; features of unchanged folders are taken from its cache. What one folder or metric refuses does not lose
the others: the line is written, and the exit code is 2.
"""

import json
import math
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Literal

if __name__ == "__main__":
    sys.path[0:1] = [str(Path(__file__).resolve().parents[1])]
    import common.start  # noqa: F401

import numpy as np
from pydantic import Field

from common.checkpoint import append_text, atomic_write
from common.errors import UserError, run_command
from common.launch import full_precision, pick_device
from common.metrics import (
    FeatureCache,
    Statistics,
    f_beta_pair,
    kernel_distance,
    make_extractor,
    open_images,
    precision_recall_distribution,
)
from common.options import Whole, from_tokens, option
from lbae.experiment import newest_config
from lbae.options import DataOptions, DataSet, Text
from lbae.results import Results, Section, read_epoch

NOT_PLOTTED = ("reco",)
CLUSTERS = 20  # of precision and recall
Curve = tuple[np.ndarray, np.ndarray]


class ScoreOptions(DataOptions):
    """How folders are scored; eval.sh takes these too."""

    feat: Annotated[str, Field(pattern=r"^(auto|inception(-tf|-tv)?|lenet|raw|pixel-pca[1-9]\d{0,4})$")] = option(
        "auto", "features: auto (see the README), inception, inception-tf, inception-tv, lenet, pixel-pca<k> or raw",
        group="scores")  # fmt: skip
    inception: Text = option("", "weights file of Inception (.pth, or .pb for inception-tf)", group="scores")
    lenet_data: DataSet | Literal[""] = option(
        "", "data set that lenet is trained on (default: the experiment's)", group="scores")  # fmt: skip
    mode: Literal["paper", "clean"] = option("paper", "resize before the network", group="scores")
    prd: bool = option(True, "precision and recall, and PR.pdf", group="scores")
    kid_subsets: Annotated[int, Field(ge=1, le=100_000)] = option(
        100, "subsets of the kernel distance", group="scores")  # fmt: skip
    kid_size: Annotated[int, Field(ge=2, le=1_000_000)] = option(1000, "images a subset", group="scores")
    limit: Whole = option(0, "score the first n images of every folder (0: all)", group="scores")
    tf32: bool = option(False, "GPU: features with 10 bits of mantissa", group="machine")


class Scores(ScoreOptions):
    """The options of eval.py."""

    s: Text = option("", "reference folder", group="what to do")
    t: Text = option("", "folders to score, separated by commas", group="what to do")


def main(argv: list[str] | None = None) -> None:
    options, _ = from_tokens(Scores, sys.argv[1:] if argv is None else argv, __doc__)
    if not options.s:
        print("usage: python eval.py s=<reference folder> t=<folder>[,<folder>...]")
        print("appends FID, KID and precision/recall of each folder to results.txt; `help` lists all options")
    elif options.dry_run:
        pick_device(options.device)
        print(json.dumps(options.as_dict(), indent=2))
    else:
        score(options)


@contextmanager
def warnings_as_lines() -> Iterator[None]:
    """Print what the metrics warn of as one line each, on stderr."""
    with warnings.catch_warnings():
        warnings.simplefilter("always", UserWarning)
        warnings.showwarning = lambda message, *_, **__: print(f"warning: {message}", file=sys.stderr)
        yield


@warnings_as_lines()
def score(options: Scores) -> None:
    """Score the folders of `options`; everything is read from and written to the current folder."""
    full_precision(options.tf32)
    folders = [Path(name) for name in options.t.split(",") if name]
    if not folders:
        raise UserError("t= names no folder to score")
    for folder in (Path(options.s), *folders):
        if not folder.is_dir():
            raise UserError(f"no folder {folder}; generate the images first")
    epoch, loss = read_epoch(Path("fid-epoch.txt").read_text() if Path("fid-epoch.txt").is_file() else "")
    reference_images = open_images(options.s, options.limit or None)
    extractor = pick_extractor(options, len(reference_images))
    reference = FeatureCache().features(reference_images, extractor.fit(reference_images))
    print(f"features {extractor.fingerprint}{'; ' + extractor.note if extractor.note else ''}")
    statistics = Statistics.from_features(reference, extractor.fingerprint)
    if not options.limit:
        statistics.save(Path(options.s) / "fid_stats.npz")

    sections, curves, problems = [], {}, []
    for folder in folders:
        section = Section(folder.name, 0)
        try:
            measure(section, folder, options, extractor, reference, statistics, curves)
        except UserError as error:
            problems.append(str(error) if f"{folder}/" in str(error) else f"{folder}: {error}")
        if section.ntest:
            sections.append(section)
            print(section, flush=True)
    if sections:
        append_text("results.txt", str(Results(epoch, loss, len(reference), sections, extractor.name)))
    plotted = {name: curve for name, curve in curves.items() if name not in NOT_PLOTTED}
    if plotted:
        plot(plotted, Path("PR"))
    if sections and sections[0].name == folders[0].name and sections[0].fid is not None and not options.limit:
        keep_best(sections[0].fid, epoch, extractor.name)
    if problems:
        raise UserError("; ".join(problems) + ("; what was measured is in results.txt" if sections else ""))


def measure(
    section: Section, folder: Path, options: Scores, extractor, reference: np.ndarray, statistics: Statistics,
    curves: dict[str, Curve],
) -> None:  # fmt: skip
    """Fill in the section of one folder, metric after metric, and its precision-recall curve.

    Where every subset of the kernel distance is the whole of both sets, it has no deviation.
    """
    features = FeatureCache().features(open_images(folder, options.limit or None), extractor)
    section.ntest = len(features)
    section.fid = Statistics.from_features(features, extractor.fingerprint).distance(statistics)
    size = min(options.kid_size, len(features), len(reference))
    section.kid_mean, deviation = kernel_distance(
        features, reference, options.kid_subsets, options.kid_size, device=extractor.device
    )
    section.kid_size = size
    if size < max(len(features), len(reference)):
        section.kid_std = deviation
    if options.prd:
        pair = same_size(features, reference)
        clusters = min(CLUSTERS, len(pair[0]))
        if clusters < CLUSTERS:
            note = f"precision and recall: {clusters} clusters instead of {CLUSTERS}, the sets have as many images"
            warnings.warn(note, stacklevel=2)
        curves[folder.name] = precision_recall_distribution(*pair, clusters)
        section.prd_n, section.f8 = len(pair[0]), f_beta_pair(*curves[folder.name])


def pick_extractor(options: ScoreOptions, references: int = 65):
    """The extractor of `feat`.

    `auto` takes Inception when its weights are here, else lenet on the experiment's data set (not on a folder of one's
    own), else pixel-pca64, or with fewer components than there are reference images.
    """
    common = {"device": options.device, "mode": options.mode, "progress": sys.stderr.isatty()}
    inception = {"weights": options.inception or None, "download": False}
    config, _ = newest_config(Path())
    lenet = {"dataset": options.lenet_data or config.get("dataset") or "mnist",
             "data_root": options.data_root or config.get("data_root") or None}  # fmt: skip
    own_images = lenet["dataset"] == "folder"  # whose classes, if any, tell little of what they show
    if options.feat == "lenet" and own_images:
        raise UserError("feat=lenet is trained on a public set: give lenet_data=mnist or cifar10, or feat=pixel-pca8")
    if options.feat != "auto":
        extra = inception if options.feat.startswith("inception") else lenet if options.feat == "lenet" else {}
        return make_extractor(options.feat, **common, **extra)
    if options.inception:
        name = "inception-tf" if options.inception.endswith(".pb") else "inception"
        return make_extractor(name, **common, **inception)
    for name, extra in (("inception", inception), ("lenet", lenet))[: 1 if own_images else 2]:
        try:
            return make_extractor(name, **common, **extra)
        except UserError as error:
            print(f"feat=auto: without {name} ({error})", file=sys.stderr)
    return make_extractor(f"pixel-pca{min(64, max(1, references - 1))}", **common)


def same_size(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Both sets with as many rows as the smaller one; rows of the larger are drawn with a fixed seed."""
    n = min(len(first), len(second))
    if len(first) != len(second):
        print(
            f"precision and recall: {n} rows of each set, as one has {len(first)} and the other {len(second)}",
            file=sys.stderr,
        )
    rng = np.random.default_rng(0)
    first, second = (
        part if len(part) == n else part[np.sort(rng.permutation(len(part))[:n])] for part in (first, second)
    )
    return first, second


def plot(curves: dict[str, Curve], path: Path) -> None:
    """Precision over recall of each folder, to <path>.pdf and <path>.png."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(3.5, 3.5), layout="constrained")
    axes = figure.subplots()
    for name, (precision, recall) in curves.items():
        axes.plot(recall, precision, linewidth=3, alpha=0.5, label=name.removeprefix("samples_"))
    axes.set(xlim=(0, 1), ylim=(0, 1), xlabel="recall", ylabel="precision")
    axes.legend(loc="lower left")
    for suffix in ("pdf", "png"):
        with atomic_write(path.with_suffix(f".{suffix}")) as file:
            figure.savefig(file, format=suffix, dpi=300 if suffix == "pdf" else 100)


def keep_best(fid: float, epoch: int, features: str) -> None:
    """Note the best distance in fid-best.txt (of other features: fid-best-<name>.txt) and keep its checkpoint."""
    note = Path("fid-best.txt" if features == "inception" else f"fid-best-{features}.txt")
    try:
        best = float(note.read_text()) if note.is_file() else math.inf
    except ValueError:
        raise UserError(f"{note} does not hold a number; delete it") from None
    if not fid < best:
        return
    with atomic_write(note) as file:
        file.write(str(fid).encode())
    weights = Path("models") / f"weights-{epoch}.cp"
    if weights.is_file():
        with atomic_write(weights.with_name(f"{epoch}.cp")) as file:
            file.write(weights.read_bytes())


if __name__ == "__main__":
    sys.exit(run_command(main))
