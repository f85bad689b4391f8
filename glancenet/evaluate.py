"""Tables and plots of finished runs: accuracy, alignment, explicitness, over seeds and levels of supervision.

    python glancenet/evaluate.py logs/dsprites_full__GlanceNet/run1              # one run: a table and four plots
    python glancenet/evaluate.py logs/sprites__GlanceNet logs/sprites__CBNM --out results    # every run found below
    python glancenet/evaluate.py RUN --dataset celeba --model glancenet          # checks that the run is what you think

A run is a folder with commandline_args.txt. From its files come
  accuracy      share of right classes in eval_results/downstream_obtained.npy
  alignment     DCI disentanglement (boosted trees on the factor grid, as in the paper's figure), if it was measured
  explicitness  DCI informativeness on held-out points
  alignment_linear, completeness_linear, explicitness_linear: the definition of the paper's appendix B on the saved test
                latents: least squares, |weights|, 1 - 6 MSE on held-out rows
  CelebA: alignment, completeness and explicitness by the published CelebA recipe on the saved latents

Written in --out (default: the run's folder, or ./evaluation): table.csv, table.md, runs.csv, supervision.png (figure
3: means and standard deviations over seeds against % of supervision), and per run train.png, validation.png, test.png,
metrics.png.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0:1] = [str(Path(__file__).resolve().parents[1])]
    import common.start  # noqa: F401

import csv
import functools
import io
import itertools
import json
from collections.abc import Callable
from typing import Any

import numpy as np

from common.checkpoint import atomic_write, read_json
from common.errors import UserError, run_command
from common.options import Options, from_flags, option
from glancenet.options import ALIASES, DATASET_ALIASES
from glancenet.records import load_arrays, read_table
from glancenet.visual import figure, save_figure

MEASURES = (
    "accuracy", "alignment", "completeness", "explicitness",
    "alignment_linear", "completeness_linear", "explicitness_linear", "concept_error",
    "reconstruction", "mig", "sap_score", "irs", "factor_vae_metric", "beta_vae_sklearn",
)  # fmt: skip
FIGURE = (("accuracy", "accuracy"), ("alignment", "alignment"), ("explicitness", "explicitness"))


def find_runs(folders: list[str]) -> list[Path]:
    """Every folder with a commandline_args.txt at or below the given ones. Raises UserError when there is none."""
    found: list[Path] = []
    for folder in folders:
        if not Path(folder).is_dir():
            raise UserError(f"{folder} is not a folder; name a log folder, or a folder above several")
        runs = sorted(path.parent for path in Path(folder).rglob("commandline_args.txt"))
        if not runs:
            raise UserError(f"{folder} holds no run (no commandline_args.txt at or below it)")
        found += [run for run in runs if run not in found]
    return found


def linear_scores(z: np.ndarray, concepts: np.ndarray) -> dict[str, float]:
    """Alignment of appendix B on latents (n, D) and concepts (n, L); concepts that do not vary are left out."""
    from common.metrics.disentanglement import Arrays
    from common.metrics.disentanglement import alignment_linear as align

    varied = concepts[:, np.ptp(concepts, axis=0) > 0]
    if len(z) < 100 or varied.shape[1] < 2:
        return {}
    scores = align(Arrays(z, varied), seed=0)
    return {f"{name}_linear": value for name, value in scores.items()}


def celeba_scores(z: np.ndarray, concepts: np.ndarray) -> dict[str, float]:
    """The published CelebA recipe on sigmoids of all sampled latents (n, >= 10) and attributes (n, 10); nothing where
    --include_labels left attributes out.
    """
    from glancenet.dci_celeba import dci_celeba

    if concepts.shape[1] != 10:
        return {}
    scores = dci_celeba(z, concepts)
    return {name: scores[name] for name in ("alignment", "completeness", "explicitness")}


def dci_scores(run: Path) -> dict[str, float]:
    """What eval_results/dci holds, by the paper's names; empty when DCI was not measured."""
    path = run / "eval_results" / "dci" / "results" / "json" / "evaluation_results.json"
    if not path.is_file():
        return {}
    scores = read_json(path)
    names = {"alignment": "disentanglement", "completeness": "completeness", "explicitness": "informativeness_test"}
    return {name: float(scores[key]) for name, key in names.items() if scores.get(key) is not None}


def class_scores(run: Path) -> dict[str, float]:
    """The accuracy of the saved predictions."""
    _, y, prediction = load_arrays(run / "eval_results" / "downstream_obtained.npy", 3)
    return {"accuracy": float((y == prediction).mean())}


def last_metrics(run: Path) -> dict[str, float]:
    """The last row of dis_metrics.csv, if there is one."""
    path = run / "eval_results" / "dis_metrics.csv"
    table = read_table(path) if path.is_file() else []
    return {k.removeprefix("eval_"): float(v) for k, v in table[-1].items() if v and k != "eval_dci"} if table else {}


def run_scores(run: Path, problems: list[str] | None = None) -> dict[str, Any]:
    """One row: what was run, and its measures (missing ones are absent). Raises UserError for an unfinished run.

    A measure that cannot be taken is said in `problems` where that is given, and the others stay.
    """
    options = read_json(run / "commandline_args.txt")
    try:
        row: dict[str, Any] = {
            "run": str(run), "dataset": options["dset_name"], "model": ALIASES.get(options["alg"], options["alg"]),
            "supervision": float(options["masking_fact"]), "seed": int(options["seed"]),
        }  # fmt: skip
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{run / 'commandline_args.txt'} was not written by glancenet/main.py ({error})") from error
    evaluation = run / "eval_results"
    last = read_table(evaluation / "test_metrics.csv")
    if not last:
        raise UserError(f"{evaluation / 'test_metrics.csv'} has no row yet: the run has not reached its first test")
    row["iterations"] = int(last[-1]["iter"])
    row["reconstruction"] = float(last[-1]["rec"])
    parts: list[Callable[[], dict[str, float]]] = [lambda: dci_scores(run), lambda: last_metrics(run)]
    if "latent" in last[-1]:
        row["concept_error"] = float(last[-1]["latent"])
        saved = functools.cache(lambda: load_arrays(evaluation / "latents_obtained.npy", 3)[1:])
        parts[:0] = [lambda: class_scores(run), lambda: linear_scores(*saved())]
        if row["dataset"] == "celebA":
            parts.insert(2, lambda: celeba_scores(*saved()))
    for measure in parts:
        try:
            row |= measure()
        except UserError as error:
            if problems is None:
                raise
            problems.append(f"{run}: {error}")
    return row


def aggregate(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation (n - 1) over seeds of every (data set, model, supervision)."""
    keys = ("dataset", "model", "supervision")
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in keys), []).append(row)
    table = []
    for place in sorted(groups):
        entry: dict[str, Any] = dict(zip(keys, place, strict=True))
        entry["seeds"] = len(groups[place])
        for name in MEASURES:
            values = [row[name] for row in groups[place] if name in row]
            if values:
                entry[name] = float(np.mean(values))
                entry[f"{name}_std"] = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
        table.append(entry)
    return table


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    """Rows with the union of their columns, in order of appearance."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    with atomic_write(path) as file:
        file.write(text.getvalue().encode())


def markdown(table: list[dict[str, Any]]) -> str:
    """The aggregate as a Markdown table: mean +/- standard deviation."""
    names = [name for name in MEASURES if any(name in row for row in table)]
    lines = [
        "| data set | model | supervision % | seeds | " + " | ".join(names) + " |",
        "|" + "---|" * (4 + len(names)),
    ]
    for row in table:
        cells = [row["dataset"], row["model"], f"{row['supervision']:g}", str(row["seeds"])]
        for name in names:
            spread = f" ± {row[f'{name}_std']:.3f}" if row["seeds"] > 1 and name in row else ""
            cells.append(f"{row[name]:.4g}{spread}" if name in row else "")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


# ---- plots ----------------------------------------------------------------------------------------------------------


def plot_supervision(path: Path, table: list[dict[str, Any]]) -> None:
    """Accuracy, alignment and explicitness against % of supervision, one row a data set (the paper's figure 3)."""
    datasets = sorted({row["dataset"] for row in table})
    made = figure(9, 2.8 * len(datasets))
    for i, dataset in enumerate(datasets):
        for j, (name, title) in enumerate(FIGURE):
            axes = made.add_subplot(len(datasets), 3, 3 * i + j + 1)
            for model in sorted({row["model"] for row in table if row["dataset"] == dataset}):
                rows = [r for r in table if (r["dataset"], r["model"]) == (dataset, model) and name in r]
                if rows:
                    x, y, spread = ([r[key] for r in rows] for key in ("supervision", name, f"{name}_std"))
                    axes.errorbar(x, y, spread, marker="o", capsize=3, label=model)
            axes.set_title(f"{dataset}: {title}", fontsize=9)
            axes.set_xlabel("% of supervision")
            if axes.get_legend_handles_labels()[0]:
                axes.legend(fontsize=7)
    save_figure(path, made)


def _curves(path: Path, rows: list[dict[str, str]], x: str, columns: list[str], smooth: int = 1) -> None:
    """One panel a column. Empty cells are left out, -1 latent errors are carried forward from the value before."""
    columns = [name for name in columns if any(row.get(name) for row in rows)]
    if not columns or not rows:
        return
    n_across = min(4, len(columns))
    n_down = -(-len(columns) // n_across)
    made = figure(3 * n_across, 2.3 * n_down)
    for i, name in enumerate(columns):
        points = [(float(row[x]) if x in row else k, float(row[name])) for k, row in enumerate(rows) if row.get(name)]
        places, values = (np.array(part) for part in zip(*points, strict=True))
        if name.startswith("latent"):
            for k in range(1, len(values)):
                values[k] = values[k - 1] if values[k] == -1 else values[k]
        if smooth > 1 and len(values) >= smooth and name.startswith("latent"):
            values = np.convolve(values, np.ones(smooth) / smooth, "valid")
            places = places[smooth - 1 :]
        axes = made.add_subplot(n_down, n_across, i + 1)
        axes.plot(places, values, marker="." if len(values) < 30 else "")
        axes.set_title(name, fontsize=8)
        axes.tick_params(labelsize=7)
    save_figure(path, made, dpi=80)


def plot_run(run: Path, out: Path) -> None:
    """The four plots of one run: training, validation, test scores, metrics."""
    out.mkdir(parents=True, exist_ok=True)
    tables = (
        ("train", run / "train_runs" / "metrics.csv", "iter", 1),
        ("validation", run / "train_runs" / "val_metrics.csv", "epoch", 1),
        ("test", run / "eval_results" / "test_metrics.csv", "iter", 2),
        ("metrics", run / "eval_results" / "dis_metrics.csv", "", 1),
    )
    for name, path, x, smooth in tables:
        if path.is_file():
            rows = read_table(path)
            columns = [column for column in (rows[0] if rows else {}) if column not in ("iter", "epoch", "I")]
            _curves(out / f"{name}.png", rows, x, columns, smooth)


# ---- command --------------------------------------------------------------------------------------------------------


class Config(Options):
    """Which runs, and where the tables go."""

    log: list[str] = option([], "runs, or folders above several; also as bare words")
    out: str | None = option(None, "folder of tables and plots; none: the run, or ./evaluation for several")
    dataset: str | None = option(None, "only runs on this data set")
    model: str | None = option(None, "only runs of this model (glancenet, cbnm, ...)")
    as_json: bool = option(False, "print the table as JSON", bare=True, flags=["--json"])
    dry_run: bool = option(False, "check the options, print them as JSON, and end", bare=True)


def parse(argv: list[str]) -> Config:
    """The options of a command line, whose first words may be folders."""
    words = list(itertools.takewhile(lambda word: not word.startswith("-"), argv))
    flags = argv[len(words) :]
    flags = [f"{word}=true" if word == "--json" else word for word in flags]  # a folder may follow it
    o, _ = from_flags(Config, flags, __doc__, positional=("log",))
    return o.with_changes(log=[*words, *o.log])


def chosen(o: Config, rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The rows of --dataset and --model."""
    names = {"dsprites": "dsprites_full", "mpi3d": "mpi3d_toy", "celeba": "celebA"} | DATASET_ALIASES
    if o.dataset:
        rows = [row for row in rows if row["dataset"].lower() == names.get(o.dataset.lower(), o.dataset).lower()]
    if o.model:
        rows = [row for row in rows if row["model"].lower() == ALIASES.get(o.model, o.model).lower()]
    return rows


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """The command; returns the aggregate table. Runs that cannot be read are named at the end."""
    o = parse(list(sys.argv[1:] if argv is None else argv))
    if o.dry_run:
        print(json.dumps(o.as_dict(), indent=2))
        return []
    if not o.log:
        raise UserError("name a log folder: python glancenet/evaluate.py logs/<data set>__<alg>/<run>")
    runs, rows, problems = find_runs(o.log), [], []
    for run in runs:
        try:
            rows.append(run_scores(run, problems))
        except UserError as error:
            problems.append(str(error))
    rows = chosen(o, rows)
    if not rows:
        raise UserError(problems[0] if problems else
                        f"none of the {len(runs)} runs found is --dataset {o.dataset} --model {o.model}")  # fmt: skip
    out = Path(o.out) if o.out else Path(rows[0]["run"]) / "evaluation" if len(rows) == 1 else Path("evaluation")
    table = aggregate(rows)
    write_csv(out / "runs.csv", rows)
    write_csv(out / "table.csv", table)
    with atomic_write(out / "table.md") as file:
        file.write(markdown(table).encode())
    plot_supervision(out / "supervision.png", table)
    for i, row in enumerate(rows):
        folder = f"runs/{i:02d}_{row['model']}_{row['supervision']:g}_{row['seed']}"
        plot_run(Path(row["run"]), out if len(rows) == 1 else out / folder)
    print(json.dumps(table, indent=2) if o.as_json else markdown(table), end="", flush=True)
    if problems:
        raise UserError(f"not measured: {'; '.join(problems)}")
    return table


if __name__ == "__main__":
    sys.exit(run_command(main))
