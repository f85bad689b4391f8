"""A sixth paper in 50 lines, written with `common` alone: a small VAE on digits. python tests/toy_paper.py --out DIR"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0:1] = [str(Path(__file__).resolve().parents[1])]
    import common.start  # noqa: F401

import torch
from torch import nn

from common.batches import Batches
from common.datasets import load
from common.errors import run_command
from common.launch import Distributed, seed_everything
from common.options import Count, Device, Options, Positive, Resume, Seed, from_flags, option
from common.training import Training


class Config(Options):
    lr: Positive = option(1e-3, "learning rate", resume="change")
    batch_size: Count = option(48, "images a step")
    epochs: Count = option(3, "epochs", resume="change")
    seed: Seed = option(0, "seed of everything random")
    device: Device = option("cpu", "device", resume="change")
    out: str = option("runs/toy", "run folder", resume="call")
    resume: Resume = option(False, "go on; auto: if there is something", resume="call")


def main(argv: list[str] | None = None) -> None:
    config, _ = from_flags(Config, sys.argv[1:] if argv is None else argv, __doc__)
    dist = Distributed.start(config.device)
    seed_everything(config.seed)
    batches = Batches(load("digits", "train"), config.batch_size, config.seed, rank=dist.rank, world=dist.world)
    with Training(config.out, "toy", config, dist, resume=config.resume) as training:
        model = nn.ModuleList([nn.Linear(64, 16), nn.Linear(8, 64)]).to(dist.device)
        optimizer = torch.optim.Adam(model.parameters(), lr=config.lr)
        training.restore(model=model, optimizer=optimizer)
        for images, _ in training.steps(batches, epochs=config.epochs):
            x = images.to(dist.device).flatten(1) / 255  # (B, 64)
            mean, log_var = model[0](x).chunk(2, 1)  # (B, 8) each
            z = mean + dist.randn_like(mean) * (log_var / 2).exp()
            kl = 0.5 * (mean**2 + log_var.exp() - 1 - log_var).sum(1)
            loss = ((model[1](z) - x) ** 2).sum(1).mean() + kl.mean()
            optimizer.zero_grad()
            (loss / dist.world).backward()
            dist.sum_gradients(model.parameters())
            training.check(loss, model)
            optimizer.step()
            training.run.log(training.step, loss=dist.mean(loss))
    dist.close()


if __name__ == "__main__":
    sys.exit(run_command(main))
