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

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0:1] = [str(Path(__file__).resolve().parents[1])]
    import common.start  # noqa: F401

import json
import shlex
from typing import Annotated, Any, Literal

from pydantic import Field

from common.checkpoint import atomic_write, read_json, write_json
from common.errors import UserError, run_command
from common.launch import pick_device
from common.options import Device, Options, Resume, Seed, from_flags, option
from glancenet import main as training
from glancenet.evaluate import FIGURE, aggregate, markdown, run_scores, write_csv
from glancenet.visual import figure, save_figure

MODELS = ("GlanceNet", "CBNM")
BASE = shlex.split(
    """--encoder SimpleGaussianConv64 --z_dim 7 --z_class 7 --batch_size 64 --max_iter 250000 --evaluation_metric dci
    --evaluate_iter 125000 --test_iter 9216 --show_loss 1000"""
)
VAE = shlex.split("--decoder SimpleConv64 --w_kld 1 --w_recon 1 --conditional_prior true")


def published_share(overrides: list[str]) -> float:
    """Iterations of this comparison over the published 250,000: 1, or less or more with `--max_iter` in the overrides.

    Raises UserError when its value is no positive number.
    """
    words = [part for word in overrides for part in word.split("=", 1)]
    if "--max_iter" not in words:
        return 1.0
    value = next(iter(words[words.index("--max_iter") + 1 :]), "")
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


def command(setting: str, model: str, supervision: float, seed: int, o: "Config", overrides: list[str]) -> list[str]:
    """The words of main.py for one run."""
    out, name = Path(o.out), f"{setting}_{model}_{supervision:g}_{seed}"
    words = ["--alg", model, "--dset_name", o.dset_name, *BASE, *(VAE if model == "GlanceNet" else [])]
    words += [*weights(setting, model, published_share(overrides)), "--masking_fact", f"{supervision:g}"]
    words += ["--seed", str(seed), "--device", o.device, *(["--dset_dir", o.dset_dir] if o.dset_dir else [])]
    words += ["--name", name, "--ckpt_dir", f"{out}/checkpoints", "--log_dir", f"{out}/logs", "--out_path", name]
    words += ["--train_output_dir", f"{out}/pictures", "--resume" if o.resume else "--overwrite", "auto" if o.resume
              else "true"]  # fmt: skip
    return [*words, *overrides]


def run_one(setting: str, model: str, supervision: float, seed: int, o: "Config", overrides: list[str]) -> Path:
    """Train one model unless its run is finished, going on where it was stopped; returns the log folder.

    Raises UserError when the run was made with other overrides.
    """
    name = f"{setting}_{model}_{supervision:g}_{seed}"
    log = Path(o.out) / "logs" / f"{o.dset_name}__{model}" / name
    folder = Path(o.out) / "checkpoints" / name
    made_with = folder / "overrides.json"
    if o.resume:
        if made_with.exists() and read_json(made_with) != overrides and any(folder.glob("*.safetensors")):
            raise UserError(f"{folder} was trained with other options; name another --out or remove it")
        if (folder / "model.safetensors").exists() and (log / "commandline_args.txt").exists():
            return log
    write_json(made_with, overrides)
    return training.main(command(setting, model, supervision, seed, o, overrides))


def plot(path: Path, tables: dict[str, list[dict[str, Any]]]) -> None:
    """One row a setting: accuracy, alignment and explicitness of both models against % of supervision."""
    made = figure(9, 2.4 * len(tables))
    for i, (setting, table) in enumerate(tables.items()):
        for j, (name, title) in enumerate(FIGURE):
            axes = made.add_subplot(len(tables), 3, 3 * i + j + 1)
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
    save_figure(path, made, dpi=80)


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


Percentage = Annotated[float, Field(ge=0, le=100)]


class Config(Options):
    """What is compared; what follows -- on the command line goes to main.py."""

    dset_name: Literal["dsprites_full", "sprites"] = option("sprites", "the file, or rendered sprites")
    dset_dir: str | None = option(None, "folder of the data sets")
    settings: list[str] = option(["published", "fair_1", "fair_7", "fair_20", "mpi3d"], "see above", min_length=1)
    supervision: list[Percentage] = option([1, 10, 100], "percentages", min_length=1)
    models: list[Literal[MODELS]] = option(list(MODELS), "models", min_length=1)
    seeds: list[Seed] = option([883], "seeds", min_length=1)
    out: str = option("runs/compare", "folder of everything", min_length=1)
    resume: Resume = option("auto", "keep finished runs and go on with stopped ones; false: train all again")
    device: Device = option("auto", "device")
    dry_run: bool = option(False, "check the options, print them as JSON, and end", bare=True)


def split_overrides(argv: list[str]) -> tuple[list[str], list[str]]:
    """The words before and after `--`."""
    at = argv.index("--") if "--" in argv else len(argv)
    return argv[:at], argv[at + 1 :]


def main(argv: list[str] | None = None) -> dict[str, list[dict[str, Any]]]:
    """The command; returns the table of every setting."""
    words, overrides = split_overrides(list(sys.argv[1:] if argv is None else argv))
    o, _ = from_flags(Config, words, __doc__)
    pick_device(o.device)
    for setting in o.settings:
        for model in o.models:  # all that can be wrong is said before the first run
            training.parse(command(setting, model, o.supervision[0], o.seeds[0], o, overrides))
    if o.dry_run:
        print(json.dumps(o.as_dict() | {"overrides": overrides}, indent=2))
        return {}
    rows: dict[str, list[dict[str, Any]]] = {setting: [] for setting in o.settings}
    jobs = [(seed, supervision, setting, model) for seed in o.seeds for supervision in o.supervision
            for setting in o.settings for model in o.models]  # fmt: skip
    tables: dict[str, list[dict[str, Any]]] = {}
    try:
        for seed, supervision, setting, model in jobs:
            row = run_scores(run_one(setting, model, supervision, seed, o, overrides))
            rows[setting].append(row)
            shown = ", ".join(f"{n} {row[n]:.3f}" for n in ("accuracy", "alignment", "explicitness") if n in row)
            print(f"{setting} {model} {supervision:g} % seed {seed}: {shown}", flush=True)
            tables = write_tables(Path(o.out), rows)
    finally:
        if tables:
            plot(Path(o.out) / "compare.png", tables)
    print((Path(o.out) / "compare.md").read_text(), end="")
    return tables


def write_tables(out: Path, rows: dict[str, list[dict[str, Any]]]) -> dict[str, list[dict[str, Any]]]:
    """compare.csv and compare.md of the runs so far; returns the tables."""
    tables = {setting: aggregate(found) for setting, found in rows.items()}
    write_csv(out / "compare.csv", [{"setting": setting, **row} for setting, table in tables.items() for row in table])
    text = "".join(f"{setting}\n\n{markdown(table)}\n" for setting, table in tables.items())
    text += "".join(f"- {line}\n" for line in gaps(tables))
    with atomic_write(out / "compare.md") as file:
        file.write(text.encode())
    return tables


if __name__ == "__main__":
    sys.exit(run_command(main))
