"""Position leakage on dSprites: do concepts learned at the centre tell two corners apart?

GlanceNets, section 5.2, figure 5. The models see sprites at the centre only, with concepts shape, scale, orientation.
A logistic regression then reads the latents (their sigmoid) of sprites in two corners and predicts the corner from 80 %
of them; leakage = 2 |accuracy - 1/2| on the rest. Models with rejection count rejected images as coin tosses.

    python glancenet/leakage.py --dset_dir data                                   # train cbnm, vae, glancenet; compare
    python glancenet/leakage.py --dset_dir data --models glancenet --seeds 0 1 2
    python glancenet/leakage.py --dset_dir data -- --max_epoch 25 --decoder ShallowLinear    # overrides of main.py
    python glancenet/leakage.py --dset_dir data --resume auto                     # keep and go on with what --out has
    python glancenet/leakage.py --checkpoints checkpoints/NAME/final              # measure trained models only
    python glancenet/leakage.py --checkpoints checkpoints/NAME/final --other_dir OTHER      # of a model of your images

OTHER holds images that the concepts do not describe, in two sub-folders: leakage is then what the latents tell of the
sub-folder, and what is kept are the model's own validation images.
CG-VAE in the tables is the GlanceNet without rejection; `vae` is trained with --conditional_prior false. Models
without a prior use the mean latents of each class as prototypes, and a bottleneck is judged by distance alone.
Written in --out after every model: leakage.json, leakage.csv, leakage.png, pca.png. The data are made by
glancenet/prepare_dsprites_leakage.py.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0:1] = [str(Path(__file__).resolve().parents[1])]
    import common.start  # noqa: F401

import json
import shlex
from typing import Any, Literal

import numpy as np
import torch

from common.checkpoint import load_into, load_state, write_json
from common.errors import UserError, run_command
from common.launch import full_precision, pick_device
from common.options import Device, Options, Resume, Seed, from_flags, option
from glancenet import main as training
from glancenet import osr, passes
from glancenet.algorithms import Algorithm, make_model
from glancenet.compare import split_overrides
from glancenet.data import ConceptData, load_data, other_images
from glancenet.evaluate import write_csv
from glancenet.options import Config as TrainingConfig
from glancenet.state import KIND
from glancenet.visual import figure, save_figure

PAPER = {"cbnm": 80.0, "cg-vae": 98.0, "glancenet": 1.0}  # leakage in %, figure 5d
# the published experiment: MSE concepts, no class loss, KL held near 0 with weight 10, prior means on the shape only
COMMON = shlex.split(
    """--dset_name dsprites_leakage --encoder SimpleGaussianConv64 --z_dim 5 --z_class 5 --lr_G 0.0004 --max_epoch 350
    --test_iter 300 --show_loss 5000 --latent_loss MSE --label_weight 0 --latent_weight 250 --n_classes 3
    --masking_fact 100"""
)
VAE = shlex.split(
    """--alg GlanceNet --decoder SimpleConv64 --w_recon 1 --controlled_capacity_increase true --max_c 0 --w_kld 10"""
)
MODELS = {
    "cbnm": [*COMMON, "--alg", "CBNM"],
    "vae": [*COMMON, *VAE, "--conditional_prior", "false"],
    "glancenet": [*COMMON, *VAE, "--conditional_prior", "true", "--cluster_dim", "3"],
}


def load_model(
    path: str, device: torch.device, dset_dir: str | None = None, other_dir: str | None = None
) -> tuple[Algorithm, ConceptData, TrainingConfig]:
    """The model of a checkpoint, the data it was trained on, and its options. `dset_dir` replaces the data folder, the
    images of `other_dir` those of the test.
    """
    state = load_state(path, KIND)
    saved = {name: value for name, value in state.get("options", {}).items() if name in TrainingConfig.model_fields}
    o = TrainingConfig.build(saved, {"dset_dir": dset_dir} if dset_dir else {})
    data = load_data(o)
    model = make_model(o, data.shape)
    load_into(model, state.get("model"), path)
    if other_dir:
        data.test, data.corner = other_images(other_dir, data.train.images.channels)
    return model.to(device, memory_format=torch.channels_last), data, o


def measure(
    model: Algorithm, data: ConceptData, device: torch.device, quantile: float, sampled: bool, seed: int
) -> dict[str, Any]:
    """Leakage without rejection, with both checks and with each alone; shares of rejected corners and kept unseen
    centre images of each.
    """
    if data.corner is None:
        raise UserError(f"{data.name} has no corner label; the model must be trained on dsprites_leakage, "
                        "or name images beyond its concepts by --other_dir")  # fmt: skip
    with passes.evaluating(model, seed):
        thresholds, train = passes.fit_rejection(model, data, device, quantile, sampled)
        corners = passes.encode_for_rejection(model, data.test, device, sampled)
        closed = passes.encode_for_rejection(model, data.val, device, sampled)
        _, outputs = passes.evaluate(model, data.test, 0, device, keep=len(data.test))
    z = torch.from_numpy(outputs.z).double().sigmoid().numpy()
    order = np.random.default_rng(seed).permutation(len(z))
    fit, held = order[: int(0.8 * len(z))], order[int(0.8 * len(z)) :]
    checks = osr.accept(corners.errors, corners.z, thresholds)
    kept = osr.accept(closed.errors, closed.z, thresholds)
    everyone = np.ones(len(z), bool), np.ones(len(closed.z), bool)
    cases = {"none": everyone, "distance": (checks.latent, kept.latent)}
    if model.decoder is not None:
        cases |= {"reconstruction": (checks.reconstruction, kept.reconstruction), "both": (checks.both, kept.both)}
    found: dict[str, Any] = {}
    for name, (mask, closed_mask) in cases.items():
        accuracy, leaked = osr.probe_leakage(
            z[fit], data.corner[fit], z[held], data.corner[held], mask[fit], mask[held]
        )
        found[name] = {
            "accuracy": accuracy, "leakage_percent": 100 * leaked, "rejected_percent": 100 * float(1 - mask.mean()),
            "closed_set_kept_percent": 100 * float(closed_mask.mean()),
        }  # fmt: skip
    medians = [float(np.median(errors)) for errors in (train.errors, closed.errors, corners.errors)]
    return {
        "rejection": found, "median_error_train": medians[0], "median_error_closed": medians[1],
        "median_error_corners": medians[2],
        "largest_error_train": float(train.errors.max()), "smallest_error_corners": float(corners.errors.min()),
        "probe_images": len(fit), "probe_tested": len(held), "latents": z, "corner": data.corner,
    }  # fmt: skip


def table_rows(key: str, seed: int, found: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a model and way of rejection; the GlanceNet without rejection is the paper's CG-VAE."""
    named = {name: "cg-vae" if key == "glancenet" and name == "none" else key for name in found["rejection"]}
    return [{"seed": seed, "model": named[name], "rejection": name, **values}
            for name, values in found["rejection"].items()]  # fmt: skip


def summarise(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over seeds."""
    summary = []
    for key in dict.fromkeys((row["model"], row["rejection"]) for row in rows):
        group = [row for row in rows if (row["model"], row["rejection"]) == key]
        entry: dict[str, Any] = {"model": key[0], "rejection": key[1], "seeds": len(group)}
        for name in ("accuracy", "leakage_percent", "rejected_percent", "closed_set_kept_percent"):
            values = [row[name] for row in group]
            entry[name], entry[f"{name}_std"] = (
                float(np.mean(values)),
                float(np.std(values, ddof=1)) if len(values) > 1 else 0.0,
            )
        summary.append(entry)
    return summary


def plot(out: Path, summary: list[dict[str, Any]], latents: dict[str, tuple[np.ndarray, np.ndarray]]) -> None:
    """Bars of leakage beside the paper's, and the first two principal components of every model's corner latents."""
    made = figure(6, 3.2)
    axes = made.add_subplot()
    shown = [row for row in summary if row["rejection"] in ("none", "both")]
    names = [f"{row['model']}\n{'no rejection' if row['rejection'] == 'none' else 'with rejection'}" for row in shown]
    heights, spread = ([row[name] for row in shown] for name in ("leakage_percent", "leakage_percent_std"))
    axes.bar(range(len(shown)), heights, yerr=spread)
    for i, row in enumerate(shown):
        if row["model"] in PAPER and (row["rejection"] == "both") == (row["model"] == "glancenet"):
            (line,) = axes.plot([i - 0.4, i + 0.4], [PAPER[row["model"]]] * 2, "k--")
            axes.legend([line], ["paper"])
    axes.set_xticks(range(len(shown)), names, fontsize=7)
    axes.set_ylabel("leakage, %")
    save_figure(out / "leakage.png", made)
    made = figure(3 * len(latents), 3)
    for i, (key, (z, corner)) in enumerate(latents.items()):
        axes = made.add_subplot(1, len(latents), i + 1)
        centred = z - z.mean(0)
        components = centred @ np.linalg.svd(centred, full_matrices=False)[2][:2].T
        for label, colour in ((0, "tab:blue"), (1, "tab:red")):
            points = components[corner == label][:1000]
            axes.scatter(points[:, 0], points[:, 1], s=2, c=colour, label=f"corner {label}")
        axes.set_title(key, fontsize=9)
    axes.legend(fontsize=7, markerscale=3)
    save_figure(out / "pca.png", made)


class Config(Options):
    """Which models are trained and measured; what follows -- on the command line goes to main.py."""

    models: list[Literal[tuple(MODELS)]] = option(list(MODELS), "which models to train", min_length=1)
    seeds: list[Seed] = option([883], "one run of every model a seed", min_length=1)
    checkpoints: list[str] = option([], "measure these instead of training")
    dset_dir: str | None = option(None, "folder of the data sets")
    other_dir: str | None = option(None, "with --checkpoints: images beyond the concepts, in two sub-folders")
    out: str = option("runs/leakage_dsprites", "folder of results, logs and checkpoints", min_length=1)
    osr_quantile: float = option(0.95, "share of training images that each check keeps", gt=0, lt=1)
    osr_sample: bool = option(False, "rejection on sampled latents instead of means", bare=True)
    resume: Resume = option(False, "keep the finished models of --out and go on with a stopped one", bare="auto")
    device: Device = option("auto", "device")
    dry_run: bool = option(False, "check the options, print them as JSON, and end", bare=True)


def command(key: str, seed: int, o: Config, overrides: list[str]) -> list[str]:
    """The words of main.py that train a model into --out."""
    out, name = Path(o.out), f"{key}_{seed}"
    place = ["--name", name, "--ckpt_dir", f"{out}/checkpoints", "--log_dir", f"{out}/logs", "--out_path", name]
    place += ["--train_output_dir", f"{out}/pictures", *(["--resume", "auto"] if o.resume else ["--overwrite", "true"])]
    data = ["--dset_dir", o.dset_dir] if o.dset_dir else []
    return [*MODELS[key], *place, *data, "--seed", str(seed), "--device", o.device, *overrides]


def train_one(key: str, seed: int, o: Config, overrides: list[str]) -> Path:
    """Train a model by main.py into --out, unless --resume finds it there; returns its checkpoint."""
    training.main(command(key, seed, o, overrides))
    return Path(o.out) / "checkpoints" / f"{key}_{seed}" / "final"


def write_results(out: Path, rows: list[dict[str, Any]], details: list[dict[str, Any]], overrides: list[str],
                  latents: dict[str, tuple[np.ndarray, np.ndarray]], published: bool
                  ) -> list[dict[str, Any]]:  # fmt: skip
    """The files of the models measured so far; returns the summary. `published`: on the paper's images."""
    summary = summarise(rows)
    paper = {"paper_leakage_percent": PAPER} if published else {}
    write_json(out / "leakage.json", {"summary": summary, "runs": details, **paper, "overrides": overrides})
    write_csv(out / "leakage.csv", summary)
    plot(out, summary, latents)
    return summary


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """The command; returns the summary rows."""
    words, overrides = split_overrides(list(sys.argv[1:] if argv is None else argv))
    o, _ = from_flags(Config, words, __doc__)
    device, out = pick_device(o.device), Path(o.out)
    if o.other_dir and not o.checkpoints:
        raise UserError("--other_dir needs a trained model: --checkpoints <ckpt_dir>/<name>/final")
    beyond, own = ("other images", "validation") if o.other_dir else ("corners", "centre")
    for key in o.models if not o.checkpoints else ():  # all that can be wrong is said before the first training
        training.parse(command(key, o.seeds[0], o, overrides))
    if o.dry_run:
        print(json.dumps(o.as_dict() | {"overrides": overrides}, indent=2))
        return []
    jobs: list[tuple[str | None, int | None, str | None]] = [(None, None, path) for path in o.checkpoints]
    jobs = jobs or [(key, seed, None) for seed in o.seeds for key in o.models]
    rows, details, latents, summary = [], [], {}, []
    for key, seed, path in jobs:
        path = path or train_one(key, seed, o, overrides)
        full_precision()  # whatever the training used
        model, data, used = load_model(str(path), device, o.dset_dir, o.other_dir)
        if o.other_dir:
            key = Path(path).parent.name  # the run's name: the paper's figures are of other images
        elif key is None:
            key = "cbnm" if model.decoder is None else "glancenet" if model.class_means() is not None else "vae"
        found = measure(model, data, device, o.osr_quantile, o.osr_sample, used.seed)
        latents.setdefault(key, (found.pop("latents"), found.pop("corner")))
        found = {name: value for name, value in found.items() if name not in ("latents", "corner")}
        rows += table_rows(key, used.seed, found)
        print(f"{key}: probe fitted on {found['probe_images']} images, leakage on the other {found['probe_tested']}")
        details.append({"model": key, "seed": used.seed, "checkpoint": str(path), **found})
        summary = write_results(out, rows, details, overrides, latents, not o.other_dir)
    for row in summary:
        published = row["rejection"] == ("both" if row["model"] == "glancenet" else "none")
        paper = f"(paper {PAPER[row['model']]:.0f} %)" if published and row["model"] in PAPER else ""
        spread = f"+/- {row['leakage_percent_std']:.1f} " if row["seeds"] > 1 else ""
        print(f"{row['model']:10s} rejection {row['rejection']:15s} leakage {row['leakage_percent']:5.1f} "
              f"{spread}%  {beyond} rejected {row['rejected_percent']:5.1f} %  {own} kept "
              f"{row['closed_set_kept_percent']:5.1f} % {paper}")  # fmt: skip
    print(json.dumps({"results": str(out / "leakage.json")}))
    return summary


if __name__ == "__main__":
    sys.exit(run_command(main))
