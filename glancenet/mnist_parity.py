"""The MNIST parity test: do concepts learned on digits 4 and 5 tell even from odd on the other digits?

GlanceNets, section 5.2, figures 4 and 6. Three MLPs see only 4s and 5s (concepts: is a 4, is a 5): a concept bottleneck
(CBNM), a VAE with supervised latents, and a GlanceNet. A logistic regression then reads the two concept latents of the
other digits and predicts their parity; leakage = 2 |accuracy - 1/2|. The GlanceNet rejects inputs unlike 4 and 5: a
rejected input counts as a coin toss.

    python glancenet/mnist_parity.py                          # all three models, seed 0, the published epochs
    python glancenet/mnist_parity.py --seeds 0 1 2 --out runs/mnist_parity
    python glancenet/mnist_parity.py --models glancenet --epochs 20 --data_root data

Written in --out: results.json and results.csv (one row a model, representation and rejection), leakage.png,
latents.png, and for every seed <seed>/{cbm,vae,osr_vae}.safetensors, samples/*.png and tensorboard_runs/.
Needs MNIST: `python -m common.datasets.prepare mnist`.
"""

import argparse
import csv
import io
import json
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.checkpoint import atomic_write, load_into, load_weights, save_weights, write_json
from common.errors import UserError, run_command
from common.images import mosaic, save_image
from common.launch import check_finite, pick_device, seed_everything
from common.run import Board
from glancenet import osr
from glancenet.mnist_objective import CONCEPTS, KNOWN_DIGITS, MODELS, Terms
from glancenet.options import Parser, boolean

LR, BATCH = 1e-3, 100
PUBLISHED_EPOCHS = {"cbnm": 21, "vae": 51, "glancenet": 51}
GRID_SPAN = (0.0, 2.0)  # the published search for distance thresholds
# leakage in %, figure 4c; the paper's CG-VAE is the GlanceNet without rejection
PAPER = {("cbnm", "none"): 28.0, ("glancenet", "none"): 30.0, ("glancenet", "both checks"): 2.0}
TITLES = {"cbnm": "CBNM", "vae": "VAE", "glancenet": "GlanceNet"}


def learning_rate(model: str, epoch: int) -> float:
    """The published rates: 1e-3 times 0.75 (CBNM) or 0.8 an epoch; GlanceNet halves from epoch 8 on."""
    if model == "cbnm":
        return LR * 0.75**epoch
    if model == "glancenet" and epoch > 7:
        return LR * 0.8**7 * 0.5 ** (epoch - 7)
    return LR * 0.8**epoch


class Digits(NamedTuple):
    """Pixels (n, 784) in [0, 1] and digits (n,)."""

    x: Tensor
    y: Tensor

    def only(self, mask: Tensor) -> "Digits":
        """The rows of a mask."""
        return Digits(self.x[mask], self.y[mask])


def known(y: Tensor) -> Tensor:
    """Mask of the digits 4 and 5."""
    return (y == KNOWN_DIGITS[0]) | (y == KNOWN_DIGITS[1])


def load_digits(root: str | None, device: torch.device) -> tuple[Digits, Digits]:
    """MNIST's training and test images. Raises UserError with the prepare command when they are absent."""
    from common.datasets import load

    parts = []
    for split in ("train", "test"):
        images, targets = load("mnist", root=root, split=split).arrays()
        parts.append(Digits(images.to(device).float().flatten(1) / 255, targets.to(device).long()))
    return parts[0], parts[1]


def train(
    model: nn.Module, key: str, digits: Digits, epochs: int, seed: int, board=None, max_steps: int | None = None
) -> Terms:
    """The published loop: batches of 100 MNIST images of which only the 4s and 5s are used (about 19). Adam.

    Returns the last batch's terms. TensorBoard scalars carry the loss names, one point an epoch (means an image).
    """
    optimizer = torch.optim.Adam(model.parameters(), lr=LR)
    use, device = known(digits.y), digits.x.device
    step, terms = 0, None
    for epoch in range(epochs):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(key, epoch)
        order = torch.from_numpy(np.random.default_rng([seed, epoch]).permutation(len(digits.y))).to(device)
        sums = torch.zeros(len(Terms._fields), device=device)
        seen = 0
        for rows in order.split(BATCH):
            rows = rows[use[rows]]
            if not len(rows) or step == max_steps:
                continue
            terms = model.terms(digits.x[rows], digits.y[rows])
            optimizer.zero_grad(set_to_none=True)
            terms.total.backward()
            optimizer.step()
            sums += torch.stack([part.detach() for part in terms])
            step, seen = step + 1, seen + len(rows)
        if not seen:
            break
        check_finite(sums[0], step, model)
        if board is not None:
            board.scalars(dict(zip(Terms._fields, (sums / seen).tolist(), strict=True)), epoch)
    return terms


class Seen(NamedTuple):
    """How a model sees images: posterior means and a sample (n, D), reconstruction errors in nats (n,), digits (n,)."""

    mu: np.ndarray
    z: np.ndarray
    errors: np.ndarray
    y: np.ndarray


@torch.no_grad()
def encode(model: nn.Module, digits: Digits, sampled_reconstruction: bool = False) -> Seen:
    """Encode all images; the error is that of the mean's reconstruction, or of the sample's. 0 for the bottleneck."""
    parts = []
    for x, y in zip(digits.x.split(2000), digits.y.split(2000), strict=True):
        mu, logvar = model.encoder(x)
        z, errors = mu, torch.zeros(len(x), device=x.device)
        if logvar is not None:
            z = mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)
            logits = model.decoder(z if sampled_reconstruction else mu)
            errors = F.binary_cross_entropy_with_logits(logits, x, reduction="none").sum(1)
        parts.append([t.double().cpu().numpy() for t in (mu, z, errors)] + [y.cpu().numpy()])
    return Seen(*(np.concatenate(column) for column in zip(*parts, strict=True)))


@torch.no_grad()
def stale_errors(model: nn.Module, digits: Digits, train: Digits) -> np.ndarray:
    """Errors (n,) as the published notebook computes them on the test set: against reconstructions of the last training
    batch instead of the image's own. Kept to measure what that slip does to the published rejection."""
    mu, _ = model.encoder(train.x[-100:])
    logits = model.decoder(mu)
    errors = []
    for start in range(0, len(digits.x), len(logits)):
        x = digits.x[start : start + len(logits)]
        errors.append(F.binary_cross_entropy_with_logits(logits[: len(x)], x, reduction="none").sum(1))
    return torch.cat(errors).double().cpu().numpy()


def prototypes(model: nn.Module, seen: Seen) -> np.ndarray:
    """The prior's class means (2, D), or for models without one the mean latents of the training 4s and 5s."""
    if hasattr(model, "class_means"):
        return model.class_means().detach().double().cpu().numpy()
    return np.stack([seen.mu[seen.y == digit].mean(0) for digit in KNOWN_DIGITS])


class Rejection(NamedTuple):
    """Thresholds and the masks of accepted images among other digits (train, test) and held-out 4s and 5s."""

    thresholds: osr.Thresholds
    train: np.ndarray
    test: np.ndarray
    closed: np.ndarray


def reject(
    model: nn.Module,
    known_train: Seen,
    others_train: Seen,
    others_test: Seen,
    known_test: Seen,
    quantile: float,
    grid: bool,
) -> Rejection:
    """Fit both checks on training 4s and 5s and apply them. `grid` uses the published threshold search."""
    means, y = prototypes(model, known_train), known_train.y - KNOWN_DIGITS[0]
    fitted = osr.fit_thresholds(known_train.errors, known_train.mu, y, means, CONCEPTS, quantile)
    if grid:
        distances = osr.prototype_distances(known_train.mu, means, CONCEPTS)
        reach = [osr.grid_threshold(distances[y == c, c], 0.94, 0.96, span=GRID_SPAN) for c in range(len(means))]
        reach = np.where(np.isnan(reach), fitted.distance, reach)
        error = osr.grid_threshold(known_train.errors, 0.94, 0.96)
        fitted = fitted._replace(distance=reach, reconstruction=fitted.reconstruction if np.isnan(error) else error)
    has_decoder = hasattr(model, "decoder")

    def judge(seen: Seen) -> np.ndarray:
        checks = osr.accept(seen.errors, seen.mu, fitted)
        return checks.both if has_decoder else checks.latent

    return Rejection(fitted, judge(others_train), judge(others_test), judge(known_test))


def representation(key: str, seen: Seen, sampled: bool) -> np.ndarray:
    """What the probe reads: the two concept latents; their sigmoid for CBNM and VAE, raw for GlanceNet (as
    published).
    """
    z = (seen.z if sampled else seen.mu)[:, :CONCEPTS]
    return z if key == "glancenet" else 1 / (1 + np.exp(-z))


def leakage_rows(
    model: nn.Module, key: str, train_digits: Digits, test_digits: Digits, options: argparse.Namespace
) -> tuple[list[dict], dict[str, Seen]]:
    """Leakage of one trained model, with and without rejection: rows for the table, and the encodings."""
    in_train, in_test = known(train_digits.y), known(test_digits.y)
    parts = {
        "known_train": train_digits.only(in_train), "others_train": train_digits.only(~in_train),
        "others_test": test_digits.only(~in_test), "known_test": test_digits.only(in_test),
    }  # fmt: skip
    seen = {name: encode(model, part, options.sampled_reconstruction) for name, part in parts.items()}
    rejection = reject(model, **seen, quantile=options.quantile, grid=options.threshold_search)
    features = [representation(key, seen[name], options.sampled) for name in ("others_train", "others_test")]
    even = [(seen[name].y % 2 == 0).astype(np.int64) for name in ("others_train", "others_test")]
    everything = np.ones(len(seen["known_test"].y), bool)
    cases = [("none", None, None, everything), ("both checks", rejection.train, rejection.test, rejection.closed)]
    if hasattr(model, "decoder"):
        t = rejection.thresholds
        names = ("others_train", "others_test", "known_test")
        cases.append(("distance only", *(osr.accept(seen[name].errors, seen[name].mu, t).latent for name in names)))
        if options.stale:
            stale = seen["others_test"]._replace(errors=stale_errors(model, parts["others_test"], parts["known_train"]))
            test_mask = osr.accept(stale.errors, stale.mu, t).both
            cases.append(("published slip", rejection.train, test_mask, rejection.closed))
    rows = []
    for name, train_mask, test_mask, closed_mask in cases:
        accuracy, leaked = osr.probe_leakage(features[0], even[0], features[1], even[1], train_mask, test_mask)
        rejected = 0.0 if test_mask is None else 1 - test_mask.mean()
        rows.append({
            "model": key, "rejection": name, "accuracy": accuracy, "leakage_percent": 100 * leaked,
            "rejected_percent": 100 * rejected,
            "closed_set_kept_percent": float(100 * closed_mask.mean()),
        })  # fmt: skip
    return rows, seen


def save_samples(model: nn.Module, digits: Digits, path: Path) -> None:
    """Images of the closed and open set above their reconstructions."""
    pick = torch.cat([torch.nonzero(known(digits.y))[:10, 0], torch.nonzero(~known(digits.y))[:10, 0]])
    with torch.no_grad():
        recon = torch.sigmoid(model.decoder(model.encoder(digits.x[pick])[0]))
    save_image(path, mosaic(torch.cat([digits.x[pick], recon]).view(-1, 1, 28, 28).cpu(), 20))


def plot_leakage(path: Path, summary: list[dict]) -> None:
    """Bars of leakage for each model, without and with rejection; dashed lines are the paper's."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6, 3.2), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    models = [key for key in MODELS if any(row["model"] == key for row in summary)]
    for k, (rejection, label) in enumerate((("none", "no rejection"), ("both checks", "with rejection"))):
        rows = [next(row for row in summary if (row["model"], row["rejection"]) == (key, rejection)) for key in models]
        places = np.arange(len(models)) + 0.38 * (k - 0.5)
        heights, spread = ([row[name] for row in rows] for name in ("leakage_percent", "leakage_percent_std"))
        axes.bar(places, heights, 0.36, yerr=spread, label=label, capsize=3)
        for place, key in zip(places, models, strict=True):
            if (key, rejection) in PAPER:
                axes.plot([place - 0.18, place + 0.18], [PAPER[key, rejection]] * 2, "k--")
    axes.plot([], [], "k--", label="paper")
    axes.set_xticks(range(len(models)), [TITLES[key] for key in models])
    axes.set_ylabel("leakage, %")
    axes.legend(fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)


def plot_latents(path: Path, seen: dict[str, Seen], thresholds: osr.Thresholds | None) -> None:
    """The two concept latents of the closed and open test sets, with the acceptance discs (figure 4)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(4.2, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    for name, colour in (("others_test", "tab:gray"), ("known_test", "tab:blue")):
        z = seen[name].mu[:1500, :CONCEPTS]
        axes.scatter(z[:, 0], z[:, 1], s=3, c=colour, label="other digits" if name == "others_test" else "4 and 5")
    if thresholds is not None:
        turn = np.linspace(0, 2 * np.pi, 100)
        for mean, reach in zip(thresholds.means, thresholds.distance, strict=True):
            axes.plot(mean[0] + reach * np.cos(turn), mean[1] + reach * np.sin(turn), "r-")
    axes.set_xlabel("$z_4$")
    axes.set_ylabel("$z_5$")
    axes.legend(markerscale=3, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=90)


def summarise(rows: list[dict]) -> list[dict]:
    """Mean and standard deviation (n - 1) over seeds of every (model, rejection)."""
    summary = []
    for key, rejection in dict.fromkeys((row["model"], row["rejection"]) for row in rows):
        group = [row for row in rows if (row["model"], row["rejection"]) == (key, rejection)]
        entry: dict = {"model": key, "rejection": rejection, "seeds": len(group)}
        for name in ("accuracy", "leakage_percent", "rejected_percent", "closed_set_kept_percent"):
            values = [row[name] for row in group]
            entry[name] = float(np.mean(values))
            entry[f"{name}_std"] = float(np.std(values, ddof=1)) if len(values) > 1 else 0.0
        summary.append(entry)
    return summary


def make_parser() -> Parser:
    """The command line."""
    p = Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False,
               formatter_class=argparse.ArgumentDefaultsHelpFormatter)  # fmt: skip
    p.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS), help="which models")
    p.add_argument("--seeds", nargs="+", type=int, default=[0], help="one run of every model a seed")
    p.add_argument("--epochs", type=int, default=None, help="epochs of every model; default 21 (cbnm), 51 (others)")
    p.add_argument("--max_iter", type=int, default=None, help="stop every model after so many steps")
    p.add_argument(
        "--data_root", default=None, help="folder of the data sets; default environment DATA_ROOT, then data"
    )
    p.add_argument("--out", default="runs/mnist_parity", help="folder of the results")
    p.add_argument(
        "--reuse", type=boolean, default=False, help="do not train again what --out already holds (an interrupted run)"
    )
    p.add_argument("--quantile", type=float, default=0.95, help="share of training 4s and 5s that each check keeps")
    p.add_argument(
        "--threshold_search", type=boolean, default=False, help="the published threshold search, not quantiles"
    )
    p.add_argument(
        "--sampled", type=boolean, default=True, help="the probe reads a posterior sample (published), not the mean"
    )
    p.add_argument("--sampled_reconstruction", type=boolean, default=False, help="errors of a sample's reconstruction")
    p.add_argument(
        "--stale",
        type=boolean,
        default=True,
        help="also measure the published slip: test errors against reconstructions of training images",
    )
    p.add_argument("--limit", type=int, default=None, help="use only the first images of each split (smoke runs)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:<i> or mps")
    return p


def main(argv: list[str] | None = None) -> list[dict]:
    """The command; returns the summary rows."""
    o = make_parser().parse(argv)
    if o.epochs is not None and o.epochs < 1:
        raise UserError(f"--epochs {o.epochs}: at least 1")
    if not 0 < o.quantile < 1:
        raise UserError(f"--quantile {o.quantile:g}: expected a share between 0 and 1")
    device, out = pick_device(o.device), Path(o.out)
    train_digits, test_digits = load_digits(o.data_root, device)
    if o.limit:
        train_digits, test_digits = (Digits(d.x[: o.limit], d.y[: o.limit]) for d in (train_digits, test_digits))
    rows: list[dict] = []
    for seed in o.seeds:
        for key in o.models:
            began = time.perf_counter()
            seed_everything(seed)
            model = MODELS[key]().to(device)
            folder = out / str(seed)
            path = folder / f"{model.name.lower()}.safetensors"
            if o.reuse and path.is_file():
                load_into(model, load_weights(path)[0], path)
            else:
                with Board(folder / "tensorboard_runs" / model.name) as board:
                    train(model, key, train_digits, o.epochs or PUBLISHED_EPOCHS[key], seed, board, o.max_iter)
                save_weights(path, dict(model.state_dict()), {"model": key, **vars(o)})
            found, seen = leakage_rows(model, key, train_digits, test_digits, o)
            rows += [{"seed": seed, **row} for row in found]
            if hasattr(model, "decoder"):
                save_samples(model, test_digits, folder / "samples" / f"{model.name.lower()}.png")
            if key == "glancenet":
                y = seen["known_train"].y - KNOWN_DIGITS[0]
                known_seen = seen["known_train"]
                t = osr.fit_thresholds(
                    known_seen.errors, known_seen.mu, y, prototypes(model, known_seen), CONCEPTS, o.quantile
                )
                plot_latents(out / "latents.png", seen, t)
            seconds = time.perf_counter() - began
            shown = "; ".join(f"{row['rejection']}: leakage {row['leakage_percent']:.1f} %" for row in found)
            print(f"seed {seed} {TITLES[key]} ({seconds:.0f} s): {shown}", flush=True)
    summary = summarise(rows)
    paper = {f"{key}, {rejection}": value for (key, rejection), value in PAPER.items()}
    record = {"options": vars(o), "runs": rows, "summary": summary, "paper_leakage_percent": paper}
    write_json(out / "results.json", record)
    with atomic_write(out / "results.csv") as file:
        text = io.StringIO()
        writer = csv.DictWriter(text, list(summary[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(summary)
        file.write(text.getvalue().encode())
    plot_leakage(out / "leakage.png", summary)
    for row in summary:
        value = PAPER.get((row["model"], row["rejection"]))
        paper = "" if value is None else f"  (paper {value:.0f} %)"
        print(f"{TITLES[row['model']]:10s} {row['rejection']:15s} leakage {row['leakage_percent']:5.1f} +/- "
              f"{row['leakage_percent_std']:.1f} %  rejected {row['rejected_percent']:5.1f} %  4/5 kept "
              f"{row['closed_set_kept_percent']:.1f} %{paper}")  # fmt: skip
    print(json.dumps({"results": str(out / "results.json")}))
    return summary


if __name__ == "__main__":
    sys.exit(run_command(main))
