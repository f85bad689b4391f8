"""From a command line to a finished run: what every training script of this folder calls."""

import json
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from common.checkpoint import load_into, load_weights, write_json
from common.errors import MissingDataError, UserError
from common.launch import Distributed, full_precision, keep_freed_memory, pick_device, seed_everything
from common.released import Release, released
from inv_flow.data import image_size, loaders
from inv_flow.model import FlowModel, create_model
from inv_flow.train.config import Config, older_names, parse_given, trained_options
from inv_flow.train.evaluation import (
    batches_of,
    integer_images,
    layer_values,
    likelihood,
    own_rng,
    reconstruction_errors,
    reconstruction_picture,
    rounding_error,
    sample_pictures,
)
from inv_flow.train.experiment import Experiment
from inv_flow.train.optim import make_optimizer, make_scheduler

RELEASES = {"mnist": "mnist_inverse_w64"}  # what `--evaluate` takes while the script has no run of one's own


def script(
    about: str | None, preset: Mapping[str, Any], presets: Mapping[str, dict] | None = None
) -> Callable[[list[str] | None], None]:
    """The `main` of a script: its command line over its `preset`, then a training, or an evaluation (`--evaluate`).

    `about` is the script's help, `presets` what `--preset` may name.
    """

    def main(argv: list[str] | None = None) -> None:
        config, given = parse_given(sys.argv[1:] if argv is None else argv, about or "", preset, presets)
        if config.dry_run:
            check(config)
            print(json.dumps(config.as_dict(), indent=2))
            return
        keep_freed_memory()
        if config.evaluate:
            evaluate_run(config, given)
        else:
            experiment = build(config)
            try:
                experiment.run()
            finally:
                experiment.dist.close()

    return main


def check(config: Config) -> None:
    """Raise UserError for what needs neither data nor training to be known: an absent device, an impossible model."""
    pick_device(config.device)
    if not config.evaluate:
        with torch.device("meta"):
            make_model(config.with_changes(image_size=image_size(config)))


def make_model(config: Config) -> FlowModel:
    """`create_model`, where a layer's refusal of its size or an option is the user's to mend."""
    try:
        return create_model(config)
    except ValueError as error:
        raise UserError(str(error)) from error


def build(config: Config) -> Experiment:
    """Data, model, optimiser and schedule of `config`, ready to run."""
    check(config)
    dist = Distributed.start(config.device)
    seed_everything(config.seed, config.deterministic)
    size, sets = loaders(config, dist)
    config = config.with_changes(image_size=size)
    model = make_model(config).to(dist.device)
    seed_everything(config.seed, config.deterministic)
    optimizer = make_optimizer(model, config)
    return Experiment(model, *sets, optimizer, make_scheduler(optimizer, config), dist=dist, **config.as_dict())


# ---- evaluation


def evaluate_run(config: Config, given: dict[str, Any]) -> None:
    """Figures and pictures of a run's best.safetensors, or of the weights that ship where there is no run."""
    release = release_for(config)
    if release:
        config = config.with_changes(out=str(config.folder.with_name(f"{config.name}_released")))
    weights = release.path if release else config.checkpoints / "best.safetensors"
    tensors, stored = load_weights(weights)
    stored = older_names(stored)
    asked = {name: value for name, value in given.items() if name in trained_options()}
    if release:
        reason = f"no run in {config.with_changes(out=None).folder}"
        release.refuse(asked, stored, reason)
        print(release.notice(reason), flush=True)
    for name, value in asked.items():
        if name in stored and (list(value) if isinstance(value, tuple) else value) != stored[name]:
            raise UserError(f"{weights} was trained with {name}={stored[name]}, not {value}: leave --{name} out, or "
                            "train such a flow")  # fmt: skip
    config = config.with_changes(**{name: stored[name] for name in trained_options() & stored.keys()})
    full_precision(config.tf32)
    dist = Distributed.start(config.device)
    seed_everything(config.seed, config.deterministic)
    model = make_model(config)
    load_into(model, tensors, weights)
    model.to(dist.device).eval()
    if model.padding_note:
        print(model.padding_note)
    model.set_exact(not config.modified_grad)
    try:
        _, (_, val, test) = loaders(config, dist)
    except MissingDataError as error:
        if release is None:
            raise
        print(f"samples only, since {error}")
        pictures(model, config, dist)
    else:
        evaluate(model, val, test, config, dist)
    finally:
        dist.close()


def release_for(config: Config) -> Release | None:
    """The weights that ship, when the script's own run folder holds none and no other was named."""
    if config.name not in RELEASES or config.out or config.checkpoint_path or config.checkpoints.exists():
        return None
    return released("inv_flow", RELEASES[config.name])


def evaluate(model: FlowModel, val: Any, test: Any, config: Config, dist: Distributed) -> dict[str, float]:
    """Parameters, validation and test likelihood, reconstruction error over the test images, rounding error, sampling
    time.

    Each figure is printed and written to evaluation.json as it is there; then samples/evaluation.png and
    recon/evaluation.png.
    """
    metrics: dict[str, float] = {}

    def report(**values: float) -> None:
        metrics.update(values)
        if dist.is_main:
            write_json(config.folder / "evaluation.json", metrics)
            for name, value in values.items():
                print(f"{name} {value:.6g}", flush=True)

    x = integer_images(next(iter(batches_of(test))), model, dist.device)
    report(**likelihood(model, val, config, dist, "val"))
    report(**likelihood(model, test, config, dist, "test", config.eval_draws))
    report(**reconstruction_errors(model, test, config, dist))
    report(float64_relative_error=rounding_error(model, x[:2], dist, config.seed))
    report(parameters=sum(p.numel() for p in model.parameters()))
    if config.verbose:
        report(**layer_values(model, x, config.seed))
    if dist.is_main:
        report(**pictures(model, config, dist, x[:10]))
    return metrics


def pictures(model: FlowModel, config: Config, dist: Distributed, x: Tensor | None = None) -> dict[str, float]:
    """samples/evaluation.png, and recon/evaluation.png of integer images x (B, C, H, W); the sampling times."""
    said, made = sample_pictures(model, config, config.folder, "evaluation")
    for line in said:
        print(line)
    print(f"samples: {config.folder / config.sample_dir / 'evaluation.png'}")
    if config.plot_recon and x is not None:
        with own_rng(dist.device, config.seed + 4):
            reconstruction_picture(model, x, config.folder / "recon" / "evaluation.png")
    if not config.log_timing:
        return {}
    values = {f"sample{suffix}_ms": median for suffix, (_, median, _) in made.items()}
    return values | {f"sample{suffix}_std_ms": deviation for suffix, (_, _, deviation) in made.items()}
