"""Position leakage on dSprites: do concepts learned at the centre tell two corners apart?

GlanceNets, section 5.2, figure 5. The models see sprites at the centre only, with concepts shape, scale and
orientation.
A logistic regression then reads the latents (their sigmoid) of sprites in two corners and predicts the corner from 80 %
of them; leakage = 2 |accuracy - 1/2| on the rest. Models with rejection count rejected images as coin tosses.

    python glancenet/leakage.py --dset_dir data                                   # train cbnm, vae, glancenet; compare
    python glancenet/leakage.py --dset_dir data --models glancenet --seeds 0 1 2
    python glancenet/leakage.py --dset_dir data -- --max_epoch 25 --decoder ShallowLinear    # overrides of main.py
    python glancenet/leakage.py --checkpoints checkpoints/NAME/final              # measure trained models only

CG-VAE in the tables is the GlanceNet without rejection; `vae` is trained with --conditional_prior false. Models
without a prior use the mean latents of each class as prototypes, and a bottleneck is judged by distance alone.
Written in --out: leakage.json, leakage.csv, leakage.png, pca.png. Data: glancenet/prepare_dsprites_leakage.py.
"""

import argparse
import csv
import io
import json
import shlex
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.checkpoint import atomic_write, load_into, load_state, write_json
from common.errors import UserError, run_command
from common.launch import pick_device
from glancenet import main as training
from glancenet import osr, passes
from glancenet.algorithms import Algorithm, algorithm_class
from glancenet.data import ConceptData, load_data
from glancenet.options import Parser

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
    path: str, device: torch.device, dset_dir: str | None = None
) -> tuple[Algorithm, ConceptData, argparse.Namespace]:
    """The model of a checkpoint, the data it was trained on, and its options. `dset_dir` replaces the data folder."""
    state = load_state(path, training.KIND)
    o = argparse.Namespace(**state["options"])
    if dset_dir:
        o.dset_dir = dset_dir
    data = load_data(o)
    model = algorithm_class(o.alg)(o, data.shape)
    load_into(model, state["model"], path)
    return model.to(device, memory_format=torch.channels_last), data, o


def measure(
    model: Algorithm, data: ConceptData, device: torch.device, quantile: float, sampled: bool, seed: int
) -> dict[str, Any]:
    """Leakage without rejection, with both checks, with each alone; shares of rejected corner and kept centre
    images.
    """
    if data.corner is None:
        raise UserError(f"{data.name} has no corner label; the model must be trained on dsprites_leakage")
    with passes.evaluating(model, seed):
        thresholds, train = passes.fit_rejection(model, data, device, quantile, sampled)
        corners = passes.encode_for_rejection(model, data.test, device, sampled)
        closed = passes.encode_for_rejection(model, data.val, device, sampled)
        _, outputs = passes.evaluate(model, data.test, 0, device, keep=len(data.test))
    z = 1 / (1 + np.exp(-outputs.z.astype(np.float64)))
    order = np.random.default_rng(seed).permutation(len(z))
    fit, held = order[: int(0.8 * len(z))], order[int(0.8 * len(z)) :]
    checks = osr.accept(corners.errors, corners.z, thresholds)
    cases: dict[str, np.ndarray | None] = {"none": None, "distance": checks.latent}
    if model.decoder is not None:
        cases |= {"reconstruction": checks.reconstruction, "both": checks.both}
    found: dict[str, Any] = {}
    for name, mask in cases.items():
        masks = (None, None) if mask is None else (mask[fit], mask[held])
        accuracy, leaked = osr.probe_leakage(z[fit], data.corner[fit], z[held], data.corner[held], *masks)
        rejected = 0.0 if mask is None else float(1 - mask.mean())
        found[name] = {"accuracy": accuracy, "leakage_percent": 100 * leaked, "rejected_percent": 100 * rejected}
    kept = passes.accepted(model, closed, thresholds)
    medians = [float(np.median(errors)) for errors in (train.errors, closed.errors, corners.errors)]
    return {
        "rejection": found, "closed_set_kept_percent": float(100 * kept.mean()),
        "median_error_train": medians[0], "median_error_closed": medians[1], "median_error_corners": medians[2],
        "largest_error_train": float(train.errors.max()), "smallest_error_corners": float(corners.errors.min()),
        "latents": z, "corner": data.corner,
    }  # fmt: skip


def table_rows(key: str, seed: int, found: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a model and way of rejection; the GlanceNet without rejection is the paper's CG-VAE."""
    rows = []
    for name, values in found["rejection"].items():
        shown = "cg-vae" if key == "glancenet" and name == "none" else key
        kept = 100.0 if name == "none" else found["closed_set_kept_percent"]
        rows.append({"seed": seed, "model": shown, "rejection": name, **values, "closed_set_kept_percent": kept})
    return rows


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
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    shown = [row for row in summary if row["rejection"] in ("none", "both")]
    names = [f"{row['model']}\n{'no rejection' if row['rejection'] == 'none' else 'with rejection'}" for row in shown]
    axes.bar(
        range(len(shown)), [row["leakage_percent"] for row in shown], yerr=[row["leakage_percent_std"] for row in shown]
    )
    for i, row in enumerate(shown):
        if row["model"] in PAPER and (row["rejection"] == "both") == (row["model"] == "glancenet"):
            axes.plot([i - 0.4, i + 0.4], [PAPER[row["model"]]] * 2, "k--", label="paper" if i == 0 else None)
    axes.set_xticks(range(len(shown)), names, fontsize=7)
    axes.set_ylabel("leakage, %")
    axes.legend()
    out.mkdir(parents=True, exist_ok=True)
    figure.savefig(out / "leakage.png", dpi=90)
    figure = Figure(figsize=(3 * len(latents), 3), layout="constrained")
    FigureCanvasAgg(figure)
    for i, (key, (z, corner)) in enumerate(latents.items()):
        axes = figure.add_subplot(1, len(latents), i + 1)
        centred = z - z.mean(0)
        components = centred @ np.linalg.svd(centred, full_matrices=False)[2][:2].T
        for label, colour in ((0, "tab:blue"), (1, "tab:red")):
            points = components[corner == label][:1000]
            axes.scatter(points[:, 0], points[:, 1], s=2, c=colour, label=f"corner {label}")
        axes.set_title(key, fontsize=9)
    axes.legend(fontsize=7, markerscale=3)
    figure.savefig(out / "pca.png", dpi=90)


def make_parser() -> Parser:
    """The command line."""
    p = Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False,
               formatter_class=argparse.ArgumentDefaultsHelpFormatter)  # fmt: skip
    p.add_argument("--models", nargs="+", choices=tuple(MODELS), default=list(MODELS), help="which models to train")
    p.add_argument("--seeds", nargs="+", type=int, default=[883], help="one run of every model a seed")
    p.add_argument("--checkpoints", nargs="+", default=[], metavar="PATH", help="measure these instead of training")
    p.add_argument("--dset_dir", default=None, help="folder of the data sets")
    p.add_argument("--out", default="runs/leakage_dsprites", help="folder of results, logs and checkpoints")
    p.add_argument("--osr_quantile", type=float, default=0.95, help="share of training images that each check keeps")
    p.add_argument("--osr_sample", action="store_true", help="rejection on sampled latents instead of means")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:<i> or mps")
    return p


def train_one(key: str, seed: int, o: argparse.Namespace, overrides: list[str]) -> Path:
    """Train a model by main.py into --out; returns its checkpoint."""
    out = Path(o.out)
    place = ["--name", f"{key}_{seed}", "--ckpt_dir", str(out / "checkpoints"), "--log_dir", str(out / "logs")]
    place += ["--out_path", f"{key}_{seed}", "--train_output_dir", str(out / "pictures"), "--overwrite", "true"]
    data = ["--dset_dir", o.dset_dir] if o.dset_dir else []
    words = [*MODELS[key], *place, *data, "--seed", str(seed), "--device", o.device, *overrides]
    training.main(words)
    return out / "checkpoints" / f"{key}_{seed}" / "final"


def main(argv: list[str] | None = None) -> list[dict[str, Any]]:
    """The command; returns the summary rows."""
    argv = list(sys.argv[1:] if argv is None else argv)
    overrides: list[str] = []
    if "--" in argv:
        overrides = argv[argv.index("--") + 1 :]
        argv = argv[: argv.index("--")]
    o = make_parser().parse(argv)
    device = pick_device(o.device)
    jobs = [(key, seed, None) for seed in o.seeds for key in o.models]
    if o.checkpoints:
        jobs = [(None, None, path) for path in o.checkpoints]
    rows, details, latents = [], [], {}
    for key, seed, path in jobs:
        path = path or train_one(key, seed, o, overrides)
        model, data, used = load_model(str(path), device, o.dset_dir)
        if key is None:
            key = "cbnm" if model.decoder is None else "glancenet" if model.class_means() is not None else "vae"
        found = measure(model, data, device, o.osr_quantile, o.osr_sample, used.seed)
        latents.setdefault(key, (found.pop("latents"), found.pop("corner")))
        found.pop("latents", None), found.pop("corner", None)
        rows += table_rows(key, used.seed, found)
        details.append({"model": key, "seed": used.seed, "checkpoint": str(path), **found})
    summary = summarise(rows)
    out = Path(o.out)
    write_json(
        out / "leakage.json",
        {"summary": summary, "runs": details, "paper_leakage_percent": PAPER, "overrides": overrides},
    )
    text = io.StringIO()
    writer = csv.DictWriter(text, list(summary[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(summary)
    with atomic_write(out / "leakage.csv") as file:
        file.write(text.getvalue().encode())
    plot(out, summary, latents)
    for row in summary:
        paper = f"(paper {PAPER[row['model']]:.0f} %)" if row["model"] in PAPER else ""
        print(f"{row['model']:10s} rejection {row['rejection']:15s} leakage {row['leakage_percent']:5.1f} +/- "
              f"{row['leakage_percent_std']:.1f} %  corners rejected {row['rejected_percent']:5.1f} %  centre kept "
              f"{row['closed_set_kept_percent']:5.1f} % {paper}")  # fmt: skip
    print(json.dumps({"results": str(out / "leakage.json")}))
    return summary


if __name__ == "__main__":
    sys.exit(run_command(main))
