"""Score folders of images against a reference folder: Frechet distance, kernel distance, precision and recall.

    python lbae/eval.py s=<reference folder> t=<folder>[,<folder>...] [feat=inception|lenet|pixel-pca64|...]

Run it in an experiment's folder (eval.sh does): it appends a line to results.txt, draws PR.pdf and PR.png, and keeps
models/<e>.cp when the distance of the first folder is the best so far (fid-best.txt). The metrics are those of
common.metrics; features of unchanged folders are taken from its cache. `help` lists every key.
"""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from common.checkpoint import atomic_write
from common.errors import UserError, run_command
from common.metrics import (
    FeatureCache,
    Statistics,
    f_beta_pair,
    kernel_distance,
    load_images,
    make_extractor,
    precision_recall_distribution,
)
from lbae.describe import newest_config
from lbae.parameters import option, parse, table
from lbae.results import Results, Section, read_epoch

NOT_PLOTTED = ("reco",)


@dataclass
class Options:
    """The keys of eval.py."""

    s: str = option("", "reference folder")
    t: str = option("", "folders to score, separated by commas")
    feat: str = option("auto", "inception, inception-tf, inception-tv, lenet, pixel-pca<k>, raw; auto: see the README")
    inception: str = option("", "weights file of the Inception network (.pth, or .pb for inception-tf)")
    lenet_data: str = option("", "data set that lenet is trained on (default: the experiment's)")
    data_root: str = option("", "folder of the data sets (default: DATA_ROOT, else data/)")
    mode: str = option("paper", "resize before the network", choices=["paper", "clean"])
    prd: bool = option(True, "precision and recall, and PR.pdf")
    kid_subsets: int = option(100, "subsets of the kernel distance", low=1)
    kid_size: int = option(1000, "images a subset", low=2)
    limit: int = option(0, "score the first n images of every folder (0: all)", low=0)
    device: str = option("auto", "auto, cpu, cuda[:i] or mps")
    help: bool = option(False, "print this table")


def main(argv: list[str] | None = None) -> None:
    options = Options(**parse(sys.argv[1:] if argv is None else argv, Options))
    if options.help or not options.s:
        print("usage: python eval.py s=<reference folder> t=<folder>[,<folder>...]")
        print(
            "appends FID, KID and precision/recall of each folder to results.txt"
            + ("\n" + table(Options) if options.help else "")
        )
        return
    folders = [Path(name) for name in options.t.split(",") if name]
    if not folders:
        raise UserError("t= names no folder to score")
    for folder in (Path(options.s), *folders):
        if not folder.is_dir():
            raise UserError(f"no folder {folder}; generate the images first")
    epoch, loss = read_epoch(Path("fid-epoch.txt").read_text() if Path("fid-epoch.txt").is_file() else "")
    extractor = pick_extractor(options)

    cache, limit = FeatureCache(), options.limit or None
    reference_images = load_images(options.s, limit)
    reference = cache.features(reference_images, extractor.fit(reference_images))
    print(f"features {extractor.fingerprint}{'; ' + extractor.note if extractor.note else ''}")
    statistics = Statistics.from_features(reference, extractor.fingerprint)
    if not limit:
        statistics.save(Path(options.s) / "fid_stats.npz")

    sections, curves = [], {}
    for folder in folders:
        features = cache.features(load_images(folder, limit), extractor)
        section = Section(folder.name, len(features))
        section.fid = Statistics.from_features(features, extractor.fingerprint).distance(statistics)
        size = min(options.kid_size, len(features), len(reference))
        if size < options.kid_size:
            print(f"kernel distance of {folder.name}: subsets of {size}, not {options.kid_size}", file=sys.stderr)
        section.kid_mean, section.kid_std = kernel_distance(
            features, reference, options.kid_subsets, size, device=extractor.device
        )
        if options.prd:
            curves[folder.name] = precision_recall_distribution(*same_size(features, reference))
            section.f8 = f_beta_pair(*curves[folder.name])
        sections.append(section)
        print(section, flush=True)

    line = str(Results(epoch, loss, len(reference), sections, extractor.name))
    with open("results.txt", "a", encoding="utf-8") as file:
        file.write(line)
    plotted = {name: curve for name, curve in curves.items() if name not in NOT_PLOTTED}
    if plotted:
        plot(plotted, Path("PR"))
    if not limit:
        keep_best(sections[0].fid, epoch, extractor.name)


def pick_extractor(options: Options):
    """The extractor of `feat`.

    `auto` takes Inception when its weights are here, else lenet on the experiment's data set, else pixel-pca64.
    """
    common = {"device": options.device, "mode": options.mode, "progress": sys.stderr.isatty()}
    inception = {"weights": options.inception or None, "download": False}
    config = newest_config(Path())
    lenet = {"dataset": options.lenet_data or config.get("dataset") or "mnist",
             "data_root": options.data_root or config.get("data_root") or None}  # fmt: skip
    if options.feat != "auto":
        extra = inception if options.feat.startswith("inception") else lenet if options.feat == "lenet" else {}
        return make_extractor(options.feat, **common, **extra)
    if options.inception:
        name = "inception-tf" if options.inception.endswith(".pb") else "inception"
        return make_extractor(name, **common, **inception)
    for name, extra in (("inception", inception), ("lenet", lenet)):
        try:
            return make_extractor(name, **common, **extra)
        except UserError as error:
            print(f"feat=auto: without {name} ({error})", file=sys.stderr)
    return make_extractor("pixel-pca64", **common)


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


def plot(curves: dict[str, tuple[np.ndarray, np.ndarray]], path: Path) -> None:
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
    best = float(note.read_text()) if note.is_file() else math.inf
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
