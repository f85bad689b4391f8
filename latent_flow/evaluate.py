"""Evaluate a trained run and write eval.json: every metric of the papers with its count, seed and trivial baselines.

    python -m latent_flow.evaluate --exp runs/latent_flow/mnist-supervised-K3-D16-s0              # validation split
    python -m latent_flow.evaluate --exp RUN --split test --images 10000 --vp-pairs 40000
    python -m latent_flow.evaluate --baselines --first-image 48000 --images 2000                  # no model needed

Images come from the seeded validation split of the training (20 % of the training images) or from the official test
split. Written: <run>/eval.json (validation) or <run>/eval_test.json; the same lines are printed.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.checkpoint import load_into, load_state, load_weights, write_json
from common.errors import UserError, run_command
from common.launch import pick_device
from common.released import released
from latent_flow import metrics
from latent_flow.data import FrameSequences, open_source, split_rows
from latent_flow.model import Config, LatentFlow
from latent_flow.options import Parser, positive
from latent_flow.vp_score import vp_score

RELEASE, RELEASE_FOLDER = "mnist_supervised_w32", Path("runs/latent_flow/released")


def evaluate(
    model: LatentFlow,
    source,
    rows: np.ndarray,
    *,
    seed: int = 0,
    iteration: int = 0,
    vp_pairs: int = 0,
    extrapolate: bool = True,
) -> dict:
    """All metrics on the items `rows`; `lines` of the result is the readable table; `vp_pairs` 0: no VP score.

    Expensive parts (importance weighting, exact determinants) use the first 500 and 100 rows; counts are in the result.
    """
    was_training = model.training
    model.eval()
    config = model.config
    slab = config.objective == "upstream" or iteration >= config.slab_start
    result: dict = {"variant": config.variant, "dataset": config.dataset, "seed": seed, "iteration": iteration}
    if isinstance(source, FrameSequences):
        result["likelihood"] = metrics.likelihood(model, lambda part: source.sequences(part)[0], rows[:500], seed=seed)
        result["lines"] = _likelihood_lines(result)
        model.train(was_training)
        return result
    names = metrics.known_transformations(model, source)
    counted = names if config.variant != "supervised" else names[: config.flows]
    result["equivariance"] = {
        name: metrics.equivariance(model, source, rows, k, slab=slab, seed=seed) for k, name in enumerate(counted)
    }
    matching = list(range(len(counted)))
    if config.variant == "weakly":
        result["index"] = metrics.index_accuracy(model, source, rows)
        matching = result["index"]["matching"]
    if config.variant == "unsupervised":
        result["sparsity"] = metrics.sparsity(model, source, rows, slab=slab, seed=seed)
        matching = result["sparsity"]["matching"]
    if config.variant != "unsupervised" and len(counted) == len(source.names):
        result["composition"] = metrics.composition(model, source, rows[:500], matching)
    if extrapolate and config.variant == "supervised" and hasattr(source, "centre"):
        steps = 2 * config.steps
        result["extrapolation"] = {
            name: metrics.equivariance(model, source, rows[:500], k, steps=steps, seed=seed)
            for k, name in enumerate(counted)
        }
    first = lambda part: metrics.one_transformation(model, source, part, 0, 1)[0]  # noqa: E731
    result["likelihood"] = metrics.likelihood(model, first, rows[:500], seed=seed)
    result["sequence_bounds"] = {
        name: metrics.sequence_bounds(model, source, rows[:100], k, slab=slab, seed=seed)
        for k, name in enumerate(counted)
    }
    result["diagnostics"] = {
        name: metrics.diagnostics(model, source, rows[:50], k, slab=slab) for k, name in enumerate(counted)
    }
    if vp_pairs:
        result["vp_score"] = vp_score(model, vp_pairs, seed=seed)
    result["lines"] = _lines(result)
    model.train(was_training)
    return result


def _lines(result: dict) -> list[str]:
    lines = [
        f"equivariance error ({result['dataset']}, {result['variant']}), mean +- s.e. of the sum over frames",
        f"{'transformation':>16} {'images':>6} {'T':>3} {'model':>16} {'x_0 same':>9} {'black':>9} {'dec(z_0)':>9} "
        f"{'T-1: model':>10} {'x_0 same':>9} {'black':>9}",
    ]
    for name, entry in result["equivariance"].items():
        short = [entry[key]["upstream_protocol"] for key in ("model", "identity", "black")]
        lines.append(
            f"{name:>16} {entry['images']:>6} {entry['steps']:>3} "
            f"{entry['model']['mean']:>9.1f} +- {entry['model']['stderr']:<3.1f} {entry['identity']['mean']:>9.1f} "
            f"{entry['black']['mean']:>9.1f} {entry['unmoved']['mean']:>9.1f} "
            + " ".join("        -" if value is None else f"{value:>9.1f}" for value in short)
        )
    lines += _likelihood_lines(result)
    for name, entry in result["sequence_bounds"].items():
        lines.append(
            f"sequence of {entry['frames']} frames, {name}: shared transition >= {entry['shared']:.1f} nats, "
            f"marginal {entry['marginal']:.1f} ({entry['images']} images)"
        )
    if "index" in result:
        index = result["index"]
        lines.append(
            f"index accuracy {index['accuracy']:.4f} (chance {index['chance']:.3f}, {index['sequences']} sequences)"
        )
        lines += [f"  {row}" for row in index["confusion"]]
    if "sparsity" in result:
        sparse = result["sparsity"]
        lines.append(
            f"active spikes {sparse['inferred_active']:.3f} inferred, {sparse['true_active']:.3f} true; "
            f"mean F1 {sparse['f1']:.3f} (all always on: {sparse['chance_f1_all_on']:.3f}), {sparse['pairs']} pairs"
        )
        for name, entry in sparse["transformations"].items():
            lines.append(
                f"  {name}: flow {entry['flow']} precision {entry['precision']:.3f} recall {entry['recall']:.3f} "
                f"F1 {entry['f1']:.3f}"
            )
    for kind, entries in result.get("composition", {}).items():
        for name, entry in entries.items():
            lines.append(
                f"{kind} {name}: {entry['model']:.1f}, x_0 same {entry['identity']:.1f} ({entry['images']} images)"
            )
    for name, entry in result.get("extrapolation", {}).items():
        per_step = " ".join(f"{value:.0f}" for value in entry["model"]["per_step"])
        lines.append(f"extrapolation {name}, error at steps 1..{entry['steps']}: {per_step}")
    if "vp_score" in result:
        vp = result["vp_score"]
        scores = [f"{key[6:]}: {value['mean']:.4f}" for key, value in vp.items() if key.startswith("share_")]
        lines.append(f"VP score {', '.join(scores)} (chance {vp['chance']:.3f}, {vp['pairs']} pairs)")
    return lines


def _likelihood_lines(result: dict) -> list[str]:
    entry = result["likelihood"]
    return [
        f"log p(x_0) >= (nats, {entry['images']} images): {kind} ELBO {entry[kind + '_elbo']:.2f}, importance-weighted "
        + ", ".join(f"S={s}: {entry[f'{kind}_iw_{s}']:.2f}" for s in (1, 10, 100))
        for kind in ("bernoulli", "gaussian")
    ]


def read_run(path: str | Path) -> tuple[dict[str, Tensor], dict, dict, int]:
    """Weights, model configuration, options and iteration of a run folder (its final.pt, else its checkpoint.pt), or of
    a .safetensors file of `latent_flow.release`."""
    path = Path(path)
    if path.suffix == ".safetensors":
        tensors, stored = load_weights(path)
        if not {"model", "args", "iteration"} <= stored.keys():
            raise UserError(f"{path} was not written by `python -m latent_flow.release`")
        return tensors, stored["model"], stored["args"], stored["iteration"]
    if (path / "final.pt").is_file():
        state = load_state(path / "final.pt", "latent_flow_weights")
        return state["model"], state["config"], state["args"], state["args"]["max_iter"]
    state = load_state(path / "checkpoint.pt", "latent_flow")
    return state["model"], state["config"], state["args"], state["iteration"]


def load_run(path: str | Path, device: torch.device) -> tuple[LatentFlow, dict, int]:
    """Model, options and iteration of what `read_run` reads."""
    tensors, config, options, iteration = read_run(path)
    model = LatentFlow(Config(**config))
    load_into(model, tensors, path)
    return model.to(device).eval(), options, iteration


def run_or_release(exp: str | None) -> tuple[Path, Path, bool]:
    """What to load, the folder to write to, and whether it is the released model: taken, and said, without `--exp`."""
    if exp is not None:
        return Path(exp), Path(exp), False
    release = released("latent_flow", RELEASE)
    print(f"{release.notice('no --exp')} (files in {RELEASE_FOLDER})", flush=True)
    RELEASE_FOLDER.mkdir(parents=True, exist_ok=True)
    return release.path, RELEASE_FOLDER, True


def main(argv: list[str] | None = None) -> None:
    """Command line of the evaluation."""
    parser = Parser(description=__doc__)
    parser.add_argument("--exp", default=None, help="folder of a run")
    parser.add_argument("--split", choices=("valid", "test"), default="valid")
    parser.add_argument("--images", type=positive, default=2000)
    parser.add_argument("--vp-pairs", type=int, default=40_000, help="pairs of the VP score; 0 leaves it out")
    parser.add_argument("--data-dir", default=None, help="folder of the data sets (default: that of the training)")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--seed", type=int, default=0, help="noise of the evaluation; the split is the run's own")
    parser.add_switch("--baselines", default=False, help="print the trivial baselines of --dataset and stop")
    parser.add_argument("--dataset", default="mnist", help="with --baselines")
    parser.add_argument("--first-image", type=int, default=0, help="with --baselines: skip so many images")
    args = parser.parse(argv)
    device = pick_device(args.device)
    if args.baselines:
        source = open_source(args.dataset, 8, root=args.data_dir, device=device)
        rows = np.arange(len(source))[args.first_image :][: args.images]
        if not len(rows):
            raise UserError(f"--first-image {args.first_image} is beyond the {len(source)} images")
        table = metrics.trivial_baselines(source, rows, source.steps)
        for name, entry in table.items():
            print(f"{name}: " + ", ".join(f"{key} {value:.1f}" for key, value in entry.items()))
        return
    if args.exp is None:
        raise UserError("--exp names the run to evaluate (or ask for --baselines)")
    model, options, iteration = load_run(args.exp, device)
    config = model.config
    source = open_source(
        config.dataset,
        config.steps,
        size=config.image_size,
        root=args.data_dir or options["data_dir"],
        split="test" if args.split == "test" else "train",
        device=device,
        centre=options["warp_centre"],
    )
    rows = np.arange(len(source)) if args.split == "test" else split_rows(len(source), options["seed"])[1]
    result = evaluate(model, source, rows[: args.images], seed=args.seed, iteration=iteration, vp_pairs=args.vp_pairs)
    result["split"] = args.split
    write_json(Path(args.exp) / ("eval_test.json" if args.split == "test" else "eval.json"), result)
    print("\n".join(result["lines"]))


if __name__ == "__main__":
    sys.exit(run_command(main))
