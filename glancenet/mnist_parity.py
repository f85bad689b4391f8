"""The MNIST parity test: do concepts learned on digits 4 and 5 tell even from odd on the other digits?

GlanceNets, section 5.2, figures 4 and 6. Three MLPs see only 4s and 5s (concepts: is a 4, is a 5): a concept bottleneck
(CBNM), a VAE with supervised latents, and a GlanceNet. A logistic regression then reads the two concept latents of the
other digits and predicts their parity; leakage = 2 |accuracy - 1/2|. The GlanceNet rejects inputs unlike 4 and 5: a
rejected input counts as a coin toss.

    python glancenet/mnist_parity.py                          # all three models, seed 0, the published epochs
    python glancenet/mnist_parity.py --seeds 0 1 2 --out runs/mnist_parity --resume auto
    python glancenet/mnist_parity.py --models glancenet --epochs 20 --data_root data

Written in --out after every model: results.json and results.csv (one row a model, representation and rejection),
leakage.png, latents.png, and for every seed <seed>/{cbm,vae,osr_vae}.safetensors, samples/*.png and tensorboard_runs/.
Needs MNIST: `python -m common.datasets.prepare mnist`.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0:1] = [str(Path(__file__).resolve().parents[1])]
    import common.start  # noqa: F401

import json
import time
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.checkpoint import load_into, load_weights, save_weights, write_json
from common.errors import run_command
from common.images import mosaic, save_image
from common.launch import check_finite, full_precision, pick_device, seed_everything
from common.options import Count, Device, Options, Resume, Seed, check_resume, from_flags, option
from common.run import Board
from glancenet import osr
from glancenet.evaluate import write_csv
from glancenet.mnist_objective import CONCEPTS, KNOWN_DIGITS, MODELS, Terms
from glancenet.visual import figure, save_figure

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
        images, targets = load("mnist", root=root, split=split, fetch=True).arrays()
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

    def only(self, mask: np.ndarray) -> "Seen":
        """The rows of a mask."""
        return Seen(*(part[mask] for part in self))


def sampled(seen: Seen) -> Seen:
    """Samples in the place of means."""
    return seen._replace(mu=seen.z)


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


def prototypes(model: nn.Module, seen: Seen) -> np.ndarray:
    """The prior's class means (2, D), or for models without one the mean latents of the training 4s and 5s."""
    if hasattr(model, "class_means"):
        return model.class_means().detach().double().cpu().numpy()
    return osr.class_means(seen.mu, seen.y - KNOWN_DIGITS[0], len(KNOWN_DIGITS))


def fit_rejection(model: nn.Module, known_train: Seen, quantile: float, grid: bool) -> osr.Thresholds:
    """Both thresholds from the training 4s and 5s; `grid` uses the published search instead of the quantile."""
    means, y, z = prototypes(model, known_train), known_train.y - KNOWN_DIGITS[0], known_train.mu
    fitted = osr.fit_thresholds(known_train.errors, z, y, means, CONCEPTS, quantile)
    if not grid:
        return fitted
    distances = osr.prototype_distances(z, means, CONCEPTS)
    reach = [osr.grid_threshold(distances[y == c, c], 0.94, 0.96, span=GRID_SPAN) for c in range(len(means))]
    error = osr.grid_threshold(known_train.errors, 0.94, 0.96)
    return fitted._replace(
        distance=np.where(np.isnan(reach), fitted.distance, reach),
        reconstruction=fitted.reconstruction if np.isnan(error) else error,
    )


@torch.no_grad()
def as_published(model: nn.Module, train: Digits, test: Digits) -> tuple[np.ndarray, np.ndarray, dict[str, Seen]]:
    """The rejection of the published notebook: masks of all training and test images, and how they are encoded.

    Latents and reconstructions are samples, and thresholds come from the published search. A training image is compared
    with its own reconstruction; the i-th image of a test batch of 100, of whatever digit, with the reconstruction that
    the last training batch, shuffled and of all ten digits, left in row i.
    """
    seen = {name: sampled(encode(model, digits, True)) for name, digits in (("train", train), ("test", test))}
    thresholds = fit_rejection(model, seen["train"].only(known(train.y).cpu().numpy()), 0.95, grid=True)
    batch = torch.randperm(len(train.y))[:BATCH].to(train.x.device)
    mu, logvar = model.encoder(train.x[batch])
    left = torch.sigmoid(model.decoder(mu + torch.exp(0.5 * logvar) * torch.randn_like(mu)))
    left = left[torch.arange(len(test.y), device=left.device) % len(left)]
    stale = F.binary_cross_entropy(left, test.x, reduction="none").sum(1).double().cpu().numpy()
    masks = [osr.accept(errors, part.mu, thresholds).both
             for errors, part in ((seen["train"].errors, seen["train"]), (stale, seen["test"]))]  # fmt: skip
    return *masks, seen


def representation(key: str, seen: Seen, sampled: bool) -> np.ndarray:
    """What the probe reads: the two concept latents; their sigmoid for CBNM and VAE, raw for GlanceNet (as
    published).
    """
    z = (seen.z if sampled else seen.mu)[:, :CONCEPTS]
    return z if key == "glancenet" else torch.from_numpy(z).sigmoid().numpy()


def leakage_rows(
    model: nn.Module, key: str, train_digits: Digits, test_digits: Digits, o: "Config"
) -> tuple[list[dict], dict[str, Seen], osr.Thresholds]:
    """Leakage of one trained model, with and without rejection: rows for the table, the encodings, the thresholds."""
    in_train, in_test = known(train_digits.y), known(test_digits.y)
    parts = {
        "known_train": train_digits.only(in_train), "others_train": train_digits.only(~in_train),
        "others_test": test_digits.only(~in_test), "known_test": test_digits.only(in_test),
    }  # fmt: skip
    seen = {name: encode(model, part, o.sampled_reconstruction) for name, part in parts.items()}
    thresholds = fit_rejection(model, seen["known_train"], o.quantile, o.threshold_search)
    checks = {name: osr.accept(part.errors, part.mu, thresholds) for name, part in seen.items()}
    has_decoder = hasattr(model, "decoder")
    both = {name: check.both if has_decoder else check.latent for name, check in checks.items()}
    cases = {"none": {name: np.ones(len(part.y), bool) for name, part in seen.items()}, "both checks": both}
    if has_decoder:
        cases["distance only"] = {name: check.latent for name, check in checks.items()}
    features = [representation(key, seen[name], o.sampled) for name in ("others_train", "others_test")]
    even = [(seen[name].y % 2 == 0).astype(np.int64) for name in ("others_train", "others_test")]
    rows = [row_of(key, name, features, even, masks) for name, masks in cases.items()]
    if has_decoder and o.stale:
        in_train, in_test = in_train.cpu().numpy(), in_test.cpu().numpy()
        train_mask, test_mask, drawn = as_published(model, train_digits, test_digits)
        masks = {"others_train": train_mask[~in_train], "others_test": test_mask[~in_test],
                 "known_test": test_mask[in_test]}  # fmt: skip
        features = [representation(key, drawn[name].only(~mask), True)
                    for name, mask in (("train", in_train), ("test", in_test))]  # fmt: skip
        rows.append(row_of(key, "as published", features, even, masks))
    return rows, seen, thresholds


def row_of(
    key: str, rejection: str, features: list[np.ndarray], even: list[np.ndarray], masks: dict[str, np.ndarray]
) -> dict[str, Any]:
    """A row of the table: leakage from the others' features in training and test, and what is rejected and kept."""
    accuracy, leaked = osr.probe_leakage(
        features[0], even[0], features[1], even[1], masks["others_train"], masks["others_test"]
    )
    return {
        "model": key, "rejection": rejection, "accuracy": accuracy, "leakage_percent": 100 * leaked,
        "rejected_percent": float(100 * (1 - masks["others_test"].mean())),
        "closed_set_kept_percent": float(100 * masks["known_test"].mean()),
    }  # fmt: skip


def save_samples(model: nn.Module, digits: Digits, path: Path) -> None:
    """Images of the closed and open set above their reconstructions."""
    pick = torch.cat([torch.nonzero(known(digits.y))[:10, 0], torch.nonzero(~known(digits.y))[:10, 0]])
    with torch.no_grad():
        recon = torch.sigmoid(model.decoder(model.encoder(digits.x[pick])[0]))
    save_image(path, mosaic(torch.cat([digits.x[pick], recon]).view(-1, 1, 28, 28).cpu(), 20))


def plot_leakage(path: Path, summary: list[dict]) -> None:
    """Bars of leakage for each model, without and with rejection; dashed lines are the paper's."""
    made = figure(6, 3.2)
    axes = made.add_subplot()
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
    save_figure(path, made)


def plot_latents(path: Path, seen: dict[str, Seen], thresholds: osr.Thresholds | None) -> None:
    """The two concept latents of the closed and open test sets, with the acceptance discs (figure 4)."""
    made = figure(4.2, 4)
    axes = made.add_subplot()
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
    save_figure(path, made)


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


class Config(Options):
    """What is trained and measured; weights of other settings than those marked "same" are not reused."""

    models: list[Literal[tuple(MODELS)]] = option(list(MODELS), "which models", resume="call", min_length=1)
    seeds: list[Seed] = option([0], "one run of every model a seed", resume="call", min_length=1)
    epochs: Count | None = option(None, "epochs of every model; none: 21 (cbnm), 51 (others)")
    max_iter: Count | None = option(None, "stop every model after so many steps")
    data_root: str | None = option(
        None, "folder of the data sets; none: environment DATA_ROOT, then data", resume="call"
    )
    out: str = option("runs/mnist_parity", "folder of the results", resume="call", min_length=1)
    reuse: bool = option(
        False, "do not train again what --out already holds (an interrupted run)", resume="call", bare=True
    )
    resume: Resume = option(False, "the same as --reuse", resume="call", bare="auto")
    quantile: float = option(0.95, "share of training 4s and 5s that each check keeps", resume="call", gt=0, lt=1)
    threshold_search: bool = option(False, "the published threshold search, not quantiles", resume="call")
    sampled: bool = option(True, "the probe reads a posterior sample (published), not the mean", resume="call")
    sampled_reconstruction: bool = option(False, "errors of a sample's reconstruction", resume="call")
    stale: bool = option(
        True, "also measure the rejection as published: test images against reconstructions of a training batch",
        resume="call",
    )  # fmt: skip
    limit: int | None = option(None, "use only the first images of each split (smoke runs)", ge=200, le=60_000)
    device: Device = option("auto", "device", resume="call")
    dry_run: bool = option(False, "check the options, print them as JSON, and end", resume="call", bare=True)


def trained(model: nn.Module, key: str, digits: Digits, seed: int, o: Config, folder: Path) -> None:
    """Train a model, or with --reuse take the weights that are there. Raises UserError for other settings."""
    path = folder / f"{model.name.lower()}.safetensors"
    if (o.reuse or o.resume) and path.is_file():
        tensors, config = load_weights(path)
        check_resume(config, o, path)
        load_into(model, tensors, path)
        return
    with Board(folder / "tensorboard_runs" / model.name) as board:
        train(model, key, digits, o.epochs or PUBLISHED_EPOCHS[key], seed, board, o.max_iter)
    save_weights(path, dict(model.state_dict()), {"model": key, **o.as_dict()})


def write_results(out: Path, rows: list[dict], o: Config) -> list[dict]:
    """results.json, results.csv and leakage.png of the models measured so far; returns the summary."""
    summary = summarise(rows)
    paper = {f"{key}, {rejection}": value for (key, rejection), value in PAPER.items()}
    record = {"options": o.as_dict(), "runs": rows, "summary": summary, "paper_leakage_percent": paper}
    write_json(out / "results.json", record)
    write_csv(out / "results.csv", summary)
    plot_leakage(out / "leakage.png", summary)
    return summary


def main(argv: list[str] | None = None) -> list[dict]:
    """The command; returns the summary rows."""
    o, _ = from_flags(Config, sys.argv[1:] if argv is None else argv, __doc__)
    device, out = pick_device(o.device), Path(o.out)
    if o.dry_run:
        print(json.dumps(o.as_dict(), indent=2))
        return []
    full_precision()
    train_digits, test_digits = load_digits(o.data_root, device)
    if o.limit:
        train_digits, test_digits = (Digits(d.x[: o.limit], d.y[: o.limit]) for d in (train_digits, test_digits))
    rows: list[dict] = []
    for seed, key in [(seed, key) for seed in o.seeds for key in o.models]:
        began, folder = time.perf_counter(), out / str(seed)
        seed_everything(seed)
        model = MODELS[key]().to(device)
        trained(model, key, train_digits, seed, o, folder)
        found, seen, thresholds = leakage_rows(model, key, train_digits, test_digits, o)
        rows += [{"seed": seed, **row} for row in found]
        if hasattr(model, "decoder"):
            save_samples(model, test_digits, folder / "samples" / f"{model.name.lower()}.png")
        if key == "glancenet":
            plot_latents(out / "latents.png", seen, thresholds)
        summary = write_results(out, rows, o)
        shown = "; ".join(f"{row['rejection']}: leakage {row['leakage_percent']:.1f} %" for row in found)
        print(f"seed {seed} {TITLES[key]} ({time.perf_counter() - began:.0f} s): {shown}", flush=True)
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
