"""Evaluate a trained run and write eval.json: every metric of the papers with its count, seed and trivial baselines.

    python -m latent_flow.evaluate --exp runs/latent_flow/mnist-supervised-K3-D16-s0              # validation split
    python -m latent_flow.evaluate --exp RUN --split test --images 10000 --vp-pairs 40000
    python -m latent_flow.evaluate --baselines --first-image 48000 --images 2000                  # no model needed

Images come from the seeded validation part of the training (20 % of the training images; of frames, of the clips) or
from the official test images; sets without such have the validation part for both. Written: <run>/eval.json or, with
--split test, eval_test.json; after an interruption what was measured as eval.partial.json. The same lines are printed.
"""

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, Literal, Self

if __name__ == "__main__":
    sys.path[0:1] = [str(Path(__file__).resolve().parents[1])]
    import common.start  # noqa: F401

import numpy as np
import torch
from annotated_types import Ge, Le
from pydantic import model_validator

from common.checkpoint import write_json
from common.errors import UserError, run_command
from common.launch import full_precision, pick_device
from common.options import Count, Whole, option
from latent_flow import metrics
from latent_flow.data import DEFAULTS, TESTED, open_source
from latent_flow.model import LatentFlow
from latent_flow.options import ToolOptions, is_dry, parse_tool
from latent_flow.runs import load_run, run_or_release, saw_all, source_of
from latent_flow.vp_score import vp_score

LINEAR_IMAGES = 10_000  # training images that the linear predictor is fitted to


class EvaluateOptions(ToolOptions):
    """Options of the evaluation."""

    split: Literal["valid", "test"] = option("valid", "which images")
    images: Count = option(2000, "how many of them")
    vp_pairs: Annotated[int, Ge(0), Le(10_000_000)] = option(40_000, "pairs of the VP score; 0 leaves it out")
    baselines: bool = option(False, "print the trivial baselines of --dataset and stop")
    dataset: Literal[tuple(name for name in DEFAULTS if name != "frames")] = option("mnist", "with --baselines")
    first_image: Whole = option(0, "with --baselines: skip so many images")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if 0 < self.vp_pairs < 100:
            raise ValueError(f"--vp-pairs {self.vp_pairs}: a VP score needs at least 100 pairs, or 0 for none")
        if self.exp is None and not self.baselines:
            raise ValueError("--exp names the run to evaluate (or ask for --baselines)")
        return self


def evaluate(
    model: LatentFlow,
    source,
    rows: np.ndarray,
    *,
    seed: int = 0,
    iteration: int = 0,
    vp_pairs: int = 0,
    training: tuple[Any, np.ndarray] | None = None,
    write: Callable[[dict, bool], None] = lambda result, whole: None,
) -> dict:
    """All metrics on the items `rows`; `lines` of the result is the readable table; `vp_pairs` 0: no VP score.

    `training` (source, rows) are the images to which the linear predictor of the same latent size is fitted.
    Expensive parts (importance weighting, exact determinants) use the first 500 and 100 rows; counts are in the result.
    A part that fails leaves the others: it is named in `failed`, and its error is raised at the end. `write(result,
    whole)` is called with all that was measured, `whole` being False after an interruption.
    """
    was_training, failure = model.training, None
    model.eval()
    config = model.config
    result: dict = {"variant": config.variant, "dataset": config.dataset, "seed": seed, "iteration": iteration}
    try:
        for name, measure in _parts(model, source, rows, result, seed, iteration, vp_pairs, training):
            try:
                result[name] = measure()
            except Exception as error:
                failure = failure or error
                result.setdefault("failed", {})[name] = f"{type(error).__name__}: {error}"
    except BaseException:
        write(result, False)
        raise
    finally:
        model.train(was_training)
    result["lines"] = _lines(result)
    write(result, True)
    if failure is not None:
        raise failure
    return result


def _parts(
    model: LatentFlow,
    source,
    rows: np.ndarray,
    result: dict,
    seed: int,
    iteration: int,
    vp_pairs: int,
    training: tuple[Any, np.ndarray] | None,
) -> Iterator[tuple[str, Callable[[], Any]]]:
    """Name and measurement of each part; later ones read earlier ones from `result`."""
    config = model.config
    slab = config.objective == "upstream" or iteration >= config.slab_start
    names = metrics.known_transformations(model, source)
    counted = names if config.variant != "supervised" else names[: config.flows]
    each = lambda measure: {name: measure(k) for k, name in enumerate(counted)}  # noqa: E731
    known = list(counted) == list(source.names)
    yield "active_units", lambda: metrics.active_units(model, source, rows)

    def error(k: int) -> dict:
        rank = config.latent_size
        linear = metrics.LinearPredictor(model, *training, k, config.steps, rank) if training else None
        return metrics.equivariance(model, source, rows, k, slab=slab, seed=seed, linear=linear)

    yield "equivariance", lambda: each(error)
    matching = list(range(len(counted)))
    if config.variant == "weakly" and source.names:
        yield "index", lambda: metrics.index_accuracy(model, source, rows)
        matching = result.get("index", {}).get("matching", matching)
    if config.variant == "unsupervised" and source.moving:
        yield "sparsity", lambda: metrics.sparsity(model, source, rows, slab=slab, seed=seed)
    elif known:
        yield "composition", lambda: metrics.composition(model, source, rows[:500], matching)
    if config.variant == "supervised" and hasattr(source, "centre"):
        steps = 2 * config.steps
        yield (
            "extrapolation",
            lambda: each(lambda k: metrics.equivariance(model, source, rows[:500], k, steps=steps, seed=seed)),
        )
    first = lambda part: metrics.one_transformation(model, source, part, 0, 1)[0]  # noqa: E731
    yield "likelihood", lambda: metrics.likelihood(model, first, rows[:500], seed=seed)
    yield (
        "sequence_bounds",
        lambda: each(lambda k: metrics.sequence_bounds(model, source, rows[:100], k, slab=slab, seed=seed)),
    )
    yield "diagnostics", lambda: each(lambda k: metrics.diagnostics(model, source, rows[:50], k, slab=slab))
    if vp_pairs:
        yield "vp_score", lambda: vp_score(model, vp_pairs, seed=seed)


def _lines(result: dict) -> list[str]:
    lines = []
    if "active_units" in result:
        units = result["active_units"]
        lines.append(
            f"active latent units: {units['active']} of {units['units']} (above {units['threshold']} nats about the "
            f"image, {units['images']} images)"
        )
    if "equivariance" in result:
        lines += _equivariance_lines(result)
    if "likelihood" in result:
        entry = result["likelihood"]
        lines += [
            f"log p(x_0) >= (nats, {entry['images']} images): {kind} ELBO {entry[kind + '_elbo']:.2f}, "
            "importance-weighted " + ", ".join(f"S={s}: {entry[f'{kind}_iw_{s}']:.2f}" for s in (1, 10, 100))
            for kind in ("bernoulli", "gaussian")
        ]
    for name, entry in result.get("sequence_bounds", {}).items():
        lines.append(
            f"sequence of {entry['frames']} frames, {name}: log p >= {entry['shared']:.1f} nats (shared transition), "
            f"less the marginal divergences {entry['marginal']:.1f} ({entry['images']} images)"
        )
    lines += _inferred_lines(result)
    for kind, entries in result.get("composition", {}).items():
        for name, entry in entries.items():
            lines.append(
                f"{kind} {name}: {entry['model']:.1f}, x_0 same {entry['identity']:.1f}, black {entry['black']:.1f} "
                f"({entry['images']} images)"
            )
    for name, entry in result.get("extrapolation", {}).items():
        for key, shown in (("model", "error"), ("identity", "x_0 same"), ("black", "black")):
            per_step = " ".join(f"{value:.0f}" for value in entry[key]["per_step"])
            lines.append(f"extrapolation {name}, {shown} at steps 1..{entry['steps']}: {per_step}")
    if "vp_score" in result:
        vp = result["vp_score"]
        scores = [f"{key[6:]}: {value['mean']:.4f}" for key, value in vp.items() if key.startswith("share_")]
        lines.append(f"VP score {', '.join(scores)} (chance {vp['chance']:.3f}, {vp['pairs']} pairs)")
    return lines + [f"not measured: {name} ({reason})" for name, reason in result.get("failed", {}).items()]


def _equivariance_lines(result: dict) -> list[str]:
    """The table of equivariance errors, trivial predictors beside the model, over T and the published T-1 frames."""
    lines = [
        f"equivariance error ({result['dataset']}, {result['variant']}), mean +- s.e. of the sum over frames",
        f"{'transformation':>16} {'images':>6} {'T':>3} {'model':>16} {'x_0 same':>9} {'black':>9} {'linear':>9} "
        f"{'dec(z_0)':>9} {'T-1: model':>10} {'x_0 same':>9} {'black':>9}",
    ]
    for name, entry in result["equivariance"].items():
        short = [entry[key]["upstream_protocol"] for key in ("model", "identity", "black")]
        linear = f"{entry['linear']['mean']:>9.1f}" if "linear" in entry else "        -"
        lines.append(
            f"{name:>16} {entry['images']:>6} {entry['steps']:>3} "
            f"{entry['model']['mean']:>9.1f} +- {entry['model']['stderr']:<3.1f} {entry['identity']['mean']:>9.1f} "
            f"{entry['black']['mean']:>9.1f} {linear} {entry['unmoved']['mean']:>9.1f} "
            + " ".join("        -" if value is None else f"{value:>9.1f}" for value in short)
        )
    worse = [name for name, entry in result["equivariance"].items() if entry["model"]["mean"] >= entry["best_trivial"]]
    if worse:
        lines.append(f"no better than the best trivial predictor (x_0 same or black): {', '.join(worse)}")
    worse = [name for name, entry in result["equivariance"].items()
             if "linear" in entry and entry["model"]["mean"] >= entry["linear"]["mean"]]  # fmt: skip
    if worse:
        lines.append(f"no better than a linear model with as many numbers an image: {', '.join(worse)}")
    return lines


def _inferred_lines(result: dict) -> list[str]:
    """What the weak and the unsupervised variants inferred, beside the truth."""
    lines = []
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
    return lines


def print_baselines(args: EvaluateOptions, device: torch.device) -> None:
    """Equivariance errors of the trivial predictors on images that no model is needed for."""
    source = open_source(args.dataset, DEFAULTS[args.dataset]["timesteps"] // 2, root=args.data_dir, device=device)
    rows = np.arange(len(source))[args.first_image :][: args.images]
    if not len(rows):
        raise UserError(f"--first-image {args.first_image} is beyond the {len(source)} images")
    for name, entry in metrics.trivial_baselines(source, rows, source.steps).items():
        print(f"{name}: " + ", ".join(f"{key} {value:.1f}" for key, value in entry.items()))


def main(argv: list[str] | None = None) -> None:
    """Command line of the evaluation."""
    args = parse_tool(EvaluateOptions, argv, __doc__)
    if is_dry(args):
        return
    device = pick_device(args.device)
    full_precision(args.tf32)
    if args.baselines:
        print_baselines(args, device)
        return
    weights, folder, _ = run_or_release(args.exp)
    model, options, iteration = load_run(weights, device)
    config = model.config
    has_test = config.dataset in TESTED and args.split == "test"
    root = args.data_dir or options["data_dir"]
    source = source_of(config, root, device, options["warp_centre"], "test" if has_test else "train")
    rows = np.arange(len(source)) if has_test else source.split(options["seed"])[1]
    if saw_all(options):
        print("this run was trained on all sequences: those that are held out now were among them")

    def write(result: dict, whole: bool) -> None:
        name = "eval_test" if args.split == "test" else "eval"
        write_json(folder / f"{name}{'' if whole else '.partial'}.json", result | {"split": args.split})
        print("\n".join(result.get("lines", [])))

    seen = source_of(config, root, device, options["warp_centre"]) if has_test else source
    training = seen, seen.split(options["seed"])[0][:LINEAR_IMAGES]
    evaluate(
        model, source, rows[: args.images], seed=args.seed, iteration=iteration, vp_pairs=args.vp_pairs,
        training=training, write=write,
    )  # fmt: skip


if __name__ == "__main__":
    sys.exit(run_command(main))
