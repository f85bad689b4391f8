"""GlanceNet against the concept bottleneck on dSprites or its rendered twin, with published and with equal settings.

GlanceNets, figure 3, first row: accuracy, alignment (DCI) and explicitness against the percentage of supervision. The
published comparison is confounded: the scripts for MPI3D and CelebA weigh concepts against classes by 7000 / 1000 for
GlanceNet and by 2 / 1 for the bottleneck, and the warm-ups differ. So every model is trained under several settings:

  published    the dSprites scripts: concept and class weight 100 each, own warm-ups, class loss alone after epoch 20 of
               27 (after the same share of the steps when --max_iter is given)
  fair_<r>     both models: class weight 100, concept weight 100 r, the same warm-up and schedule, all losses to the end
  mpi3d        weights of the MPI3D and CelebA scripts: GlanceNet 1000 / 7000, bottleneck 1 / 2

    python glancenet/compare.py --dset_name dsprites_full --dset_dir data --out runs/compare
    python glancenet/compare.py --settings fair_7 --supervision 100 --seeds 0 1 2
    python glancenet/compare.py --dset_name sprites -- --max_iter 2000 --decoder ShallowLinear   # overrides of main.py

Finished runs are not repeated, so the command can be interrupted and given again. Written in --out: logs, checkpoints,
compare.csv, compare.md and compare.png.
"""

import argparse
import sys
from pathlib import Path
from typing import Any

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.checkpoint import atomic_write, read_json, write_json
from common.errors import UserError, run_command
from glancenet import main as training
from glancenet.evaluate import FIGURE, aggregate, markdown, run_scores, write_csv
from glancenet.options import Parser

MODELS = ("GlanceNet", "CBNM")
BASE = [
    "--encoder",
    "SimpleGaussianConv64",
    "--z_dim",
    "7",
    "--z_class",
    "7",
    "--batch_size",
    "64",
    "--max_iter",
    "250000",
]
BASE += ["--evaluation_metric", "dci", "--evaluate_iter", "125000", "--test_iter", "9216", "--show_loss", "1000"]
VAE = ["--decoder", "SimpleConv64", "--w_kld", "1", "--w_recon", "1", "--conditional_prior", "true"]


def published_share(overrides: list[str]) -> float:
    """Iterations of this comparison over the published 250,000: 1, or less or more with `--max_iter` in the overrides.

    Raises UserError when its value is no positive number.
    """
    if "--max_iter" not in overrides:
        return 1.0
    value = next(iter(overrides[overrides.index("--max_iter") + 1 :]), "")
    try:
        share = float(value) / float(BASE[BASE.index("--max_iter") + 1])
    except ValueError:
        share = 0.0
    if not 0 < share < float("inf"):
        raise UserError(f"--max_iter {value!r}: expected a positive number of iterations")
    return share


def weights(setting: str, model: str, share: float = 1.0) -> list[str]:
    """The flags in which the settings differ, for `share` of the published iterations. Raises UserError for an unknown
    setting.
    """
    if setting == "published":
        return ["--label_weight", "100", "--classification_epoch", f"{20 * share:.6g}"]
    if setting == "mpi3d":
        label, latent = ("1000", "7000") if model == "GlanceNet" else ("1", "2")
        return ["--label_weight", label, "--latent_weight", latent]
    kind, _, ratio = setting.partition("_")
    try:
        factor = float(ratio)
    except ValueError:
        factor = 0.0
    if kind != "fair" or not factor > 0:
        raise UserError(f"setting {setting!r}: expected published, mpi3d or fair_<ratio> (for example fair_7)")
    return ["--label_weight", "100", "--latent_weight", f"{100 * factor:g}", "--warmup_epochs", "5"]


def run_one(
    setting: str, model: str, supervision: float, seed: int, o: argparse.Namespace, overrides: list[str]
) -> Path:
    """Train one model unless its run is finished; returns the log folder.

    Raises UserError when the finished run was made with other overrides.
    """
    out, name = Path(o.out), f"{setting}_{model}_{supervision:g}_{seed}"
    place = ["--name", name, "--ckpt_dir", str(out / "checkpoints"), "--log_dir", str(out / "logs"), "--out_path", name]
    place += ["--train_output_dir", str(out / "pictures"), "--overwrite", "true"]
    log = out / "logs" / f"{o.dset_name}__{model}" / name
    made_with = out / "checkpoints" / name / "overrides.json"
    if (out / "checkpoints" / name / "model.safetensors").exists() and (log / "commandline_args.txt").exists():
        if made_with.exists() and read_json(made_with) != overrides:
            raise UserError(f"{made_with.parent} was trained with other options; name another --out or remove it")
        return log
    words = ["--alg", model, "--dset_name", o.dset_name, *BASE, *(VAE if model == "GlanceNet" else [])]
    words += [
        *weights(setting, model, published_share(overrides)),
        "--masking_fact",
        f"{supervision:g}",
        "--seed",
        str(seed),
        "--device",
        o.device,
    ]
    words += ["--dset_dir", o.dset_dir] if o.dset_dir else []
    write_json(made_with, overrides)
    return training.main([*words, *place, *overrides])


def plot(path: Path, tables: dict[str, list[dict[str, Any]]]) -> None:
    """One row a setting: accuracy, alignment and explicitness of both models against % of supervision."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 2.4 * len(tables)), layout="constrained")
    FigureCanvasAgg(figure)
    for i, (setting, table) in enumerate(tables.items()):
        for j, (name, title) in enumerate(FIGURE):
            axes = figure.add_subplot(len(tables), 3, 3 * i + j + 1)
            for model in MODELS:
                rows = [row for row in table if row["model"] == model and name in row]
                if rows:
                    axes.errorbar(
                        [row["supervision"] for row in rows], [row[name] for row in rows],
                        [row[f"{name}_std"] for row in rows], marker="o", capsize=3, label=model,
                    )  # fmt: skip
            axes.set_title(f"{setting}: {title}", fontsize=9)
            axes.set_xscale("log")
            axes.set_ylim(0, 1.02)
            if axes.get_legend_handles_labels()[0]:
                axes.legend(fontsize=7)
            if i == len(tables) - 1:
                axes.set_xlabel("% of supervision")
    figure.savefig(path, dpi=80)


def gaps(tables: dict[str, list[dict[str, Any]]]) -> list[str]:
    """One line a setting and supervision: GlanceNet minus CBNM."""
    lines = []
    for setting, table in tables.items():
        for supervision in sorted({row["supervision"] for row in table}):
            pair = {row["model"]: row for row in table if row["supervision"] == supervision}
            if len(pair) == 2:
                found = [
                    f"{name} {pair['GlanceNet'][name] - pair['CBNM'][name]:+.3f}"
                    for name in ("accuracy", "alignment", "explicitness", "alignment_linear")
                    if all(name in row for row in pair.values())
                ]
                lines.append(f"{setting}, {supervision:g} %: GlanceNet - CBNM: {', '.join(found)}")
    return lines


def make_parser() -> Parser:
    """The command line."""
    p = Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False,
               formatter_class=argparse.ArgumentDefaultsHelpFormatter)  # fmt: skip
    p.add_argument(
        "--dset_name", choices=("dsprites_full", "sprites"), default="sprites", help="the file, or rendered sprites"
    )
    p.add_argument("--dset_dir", default=None, help="folder of the data sets")
    p.add_argument(
        "--settings", nargs="+", default=["published", "fair_1", "fair_7", "fair_20", "mpi3d"], help="see above"
    )
    p.add_argument("--supervision", nargs="+", type=float, default=[1, 10, 100], help="percentages")
    p.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), help="models")
    p.add_argument("--seeds", nargs="+", type=int, default=[883], help="seeds")
    p.add_argument("--out", default="runs/compare", help="folder of everything")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:<i> or mps")
    return p


def main(argv: list[str] | None = None) -> dict[str, list[dict[str, Any]]]:
    """The command; returns the table of every setting."""
    argv = list(sys.argv[1:] if argv is None else argv)
    overrides: list[str] = []
    if "--" in argv:
        overrides, argv = argv[argv.index("--") + 1 :], argv[: argv.index("--")]
    o = make_parser().parse(argv)
    for setting in o.settings:
        weights(setting, "GlanceNet")
    rows: dict[str, list[dict[str, Any]]] = {setting: [] for setting in o.settings}
    for seed in o.seeds:
        for supervision in o.supervision:
            for setting in o.settings:
                for model in o.models:
                    log = run_one(setting, model, supervision, seed, o, overrides)
                    row = run_scores(log)
                    rows[setting].append(row)
                    shown = ", ".join(
                        f"{n} {row[n]:.3f}" for n in ("accuracy", "alignment", "explicitness") if n in row
                    )
                    print(f"{setting} {model} {supervision:g} % seed {seed}: {shown}", flush=True)
    tables = {setting: aggregate(found) for setting, found in rows.items()}
    out = Path(o.out)
    write_csv(out / "compare.csv", [{"setting": setting, **row} for setting, table in tables.items() for row in table])
    text = "".join(f"{setting}\n\n{markdown(table)}\n" for setting, table in tables.items())
    text += "".join(f"- {line}\n" for line in gaps(tables))
    with atomic_write(out / "compare.md") as file:
        file.write(text.encode())
    plot(out / "compare.png", tables)
    print(text, end="")
    return tables


if __name__ == "__main__":
    sys.exit(run_command(main))
