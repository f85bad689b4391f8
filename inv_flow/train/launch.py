"""From a configuration to a finished run: what every script of this folder calls."""

from typing import Any

import torch

from common.checkpoint import load_into, load_weights
from common.launch import Distributed, seed_everything
from inv_flow.data import loaders
from inv_flow.model import create_model
from inv_flow.train.config import Config, parse
from inv_flow.train.experiment import Experiment, make_optimizer, make_scheduler


def build(config: Config) -> Experiment:
    """Data, model, optimiser and schedule of `config`, ready to run."""
    dist = Distributed.start(config.device)
    seed_everything(config.seed, config.deterministic)
    size, (train, val, test) = loaders(config, dist)
    config = config.replace(image_size=size)
    model = create_model(config).to(dist.device)
    seed_everything(config.seed + 1000 * dist.rank, config.deterministic)  # each process dequantises with its own noise
    optimizer = make_optimizer(model, config)
    return Experiment(
        model, train, val, test, optimizer, make_scheduler(optimizer, config), dist=dist, **config.as_dict()
    )


def main(argv: list[str] | None, about: str, preset: dict[str, Any], presets: dict[str, dict] | None = None) -> None:
    """Parse the command line over the script's `preset`, then train, or evaluate with `--evaluate`."""
    config = parse(argv, about, preset, presets)
    experiment = build(config)
    try:
        if config.evaluate:
            evaluate(experiment)
        else:
            experiment.run()
    finally:
        experiment.dist.close()


def evaluate(experiment: Experiment) -> dict[str, float]:
    """Test likelihood, a sample grid and a reconstruction grid from best.safetensors, printed and written."""
    path = experiment.checkpoints / "best.safetensors"
    tensors, _ = load_weights(path)
    load_into(experiment.model, tensors, path)
    experiment.model.set_exact(not experiment.config.modified_grad)
    metrics = experiment.evaluate("test", draws=experiment.config.eval_draws)
    x = experiment._images(next(iter(experiment.loaders["test"].epoch(0, 0))))
    largest, mean = experiment.reconstruction_error(x)
    metrics |= {"recon_max_grey": largest, "recon_mean_grey": mean}
    for name, value in metrics.items():
        print(f"{name} {value:.6g}")
    torch.manual_seed(experiment.config.seed)
    return metrics
