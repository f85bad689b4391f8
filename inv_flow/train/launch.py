"""From a configuration to a finished run: what every script of this folder calls."""

from typing import Any

from common.checkpoint import load_into, load_weights, read_json, write_json
from common.errors import UserError
from common.launch import Distributed, seed_everything
from inv_flow.data import loaders
from inv_flow.model import create_model
from inv_flow.train.config import FIELDS, Config, parse
from inv_flow.train.experiment import Experiment
from inv_flow.train.optim import make_optimizer, make_scheduler


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
    config = parse(argv, about, preset, presets)
    experiment = build(as_trained(config) if config.evaluate else config)
    try:
        if config.evaluate:
            evaluate(experiment)
        else:
            experiment.run()
    finally:
        experiment.dist.close()


def as_trained(config: Config) -> Config:
    """`config` with the model and the data of the run in its folder; where the data lie is the caller's to say."""
    stored = read_json(config.checkpoints / "best.json")
    names = {name for name, item in FIELDS.items() if item.metadata["group"] in ("model", "data")}
    names = names - {"data_root", "workers", "n_test"} | {"seed", "modified_grad"}
    return config.replace(**{name: stored[name] for name in names if name in stored})


def evaluate(experiment: Experiment) -> dict[str, float]:
    """Validation and test likelihood and reconstruction error of best.safetensors: printed, and written with pictures.

    Writes evaluation.json, samples/evaluation.png and recon/evaluation.png.
    """
    config, path = experiment.config, experiment.checkpoints / "best.safetensors"
    load_into(experiment.model, load_weights(path)[0], path)
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
