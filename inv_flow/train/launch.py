"""From a configuration to a finished run: what every script of this folder calls."""

from pathlib import Path
from typing import Any

from common.checkpoint import load_into, load_weights, read_json, write_json
from common.errors import MissingDataError, UserError
from common.launch import Distributed, seed_everything
from common.released import Release, released
from inv_flow.data import loaders
from inv_flow.model import create_model
from inv_flow.train.config import FIELDS, Config, parse_given
from inv_flow.train.experiment import Experiment
from inv_flow.train.optim import make_optimizer, make_scheduler

RELEASES = {"mnist": "mnist_inverse_w64"}  # what `--evaluate` takes while the script has no run of one's own


def build(config: Config) -> Experiment:
    """Data, model, optimiser and schedule of `config`, ready to run."""
    dist = Distributed.start(config.device)
    seed_everything(config.seed, config.deterministic)
    size, (train, val, test) = loaders(config, dist)
    config = config.replace(image_size=size)
    try:
        model = create_model(config).to(dist.device)
    except ValueError as error:  # a layer refused its size or an option
        raise UserError(str(error)) from error
    seed_everything(config.seed + 1000 * dist.rank, config.deterministic)  # each process dequantises with its own noise
    optimizer = make_optimizer(model, config)
    return Experiment(
        model, train, val, test, optimizer, make_scheduler(optimizer, config), dist=dist, **config.as_dict()
    )


def main(argv: list[str] | None, about: str, preset: dict[str, Any], presets: dict[str, dict] | None = None) -> None:
    """Parse the command line over the script's `preset`, then train, or evaluate with `--evaluate`."""
    config, given = parse_given(argv, about, preset, presets)
    if not config.evaluate:
        experiment = build(config)
        try:
            experiment.run()
        finally:
            experiment.dist.close()
        return
    release = release_for(config, given)
    if release:
        config = config.replace(out=str(config.folder.with_name(f"{config.name}_released")))
    weights = release.path if release else config.checkpoints / "best.safetensors"
    config = as_trained(config, weights)
    try:
        experiment = build(config)
    except MissingDataError as error:
        if release is None:
            raise
        print(f"samples only, since {error}")
        sample(config, weights)
        return
    try:
        evaluate(experiment, weights)
    finally:
        experiment.dist.close()


def release_for(config: Config, given: dict[str, Any]) -> Release | None:
    """The weights that ship, when the script's own run folder holds none and no other was named; says so in one line.

    Raises UserError when the command line asks for another model or other data.
    """
    if config.name not in RELEASES or config.out or config.checkpoint_path or config.checkpoints.exists():
        return None
    release, reason = released("inv_flow", RELEASES[config.name]), f"no run in {config.folder}"
    asked = {name: value for name, value in given.items() if name in _trained_keys()}
    release.refuse(asked, read_json(release.path.with_suffix(".json")), reason)
    print(release.notice(reason), flush=True)
    return release


def _trained_keys() -> set[str]:
    """Keys that belong to the weights: the model and its data, but not where the data lie."""
    names = {name for name, item in FIELDS.items() if item.metadata["group"] in ("model", "data")}
    return names - {"data_root", "workers", "n_test"}


def as_trained(config: Config, weights: Path) -> Config:
    """`config` with the model and the data of `weights`; where the data lie is the caller's to say."""
    stored = read_json(weights.with_suffix(".json"))
    names = _trained_keys() | {"seed", "modified_grad"}
    return config.replace(**{name: stored[name] for name in names if name in stored})


def sample(config: Config, weights: Path) -> None:
    """samples/evaluation.png of `weights`, which needs no data."""
    config = config.replace(plot_recon=False, log_timing=False)
    dist = Distributed.start(config.device)
    experiment = Experiment(create_model(config), None, None, None, None, dist=dist, **config.as_dict())
    load_into(experiment.model, load_weights(weights)[0], weights)
    experiment.pictures("evaluation")
    print(f"samples: {experiment.folder / config.sample_dir / 'evaluation.png'}")
    dist.close()


def evaluate(experiment: Experiment, weights: Path) -> dict[str, float]:
    """Validation and test likelihood and reconstruction error of `weights`: printed, and written with pictures.

    Writes evaluation.json, samples/evaluation.png and recon/evaluation.png.
    """
    config = experiment.config
    load_into(experiment.model, load_weights(weights)[0], weights)
    experiment.model.eval()
    experiment.model.set_exact(not config.modified_grad)
    metrics = experiment.evaluate("val") | experiment.evaluate("test", draws=config.eval_draws)
    x = experiment._images(next(iter(experiment.loaders["test"].epoch(0, 0))))
    metrics["recon_max_grey"], metrics["recon_mean_grey"] = experiment.reconstruction_error(x)
    metrics["float64_relative_error"] = experiment.rounding_error(x[:2])
    experiment.pictures("evaluation")
    if experiment.dist.is_main:
        write_json(experiment.folder / "evaluation.json", metrics)
        for name, value in metrics.items():
            print(f"{name} {value:.6g}")
    return metrics
