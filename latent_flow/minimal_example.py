"""The smallest training loop of Sparse Transformation Analysis: spikes that switch K latent fields on and off.

    python -m latent_flow.minimal_example                          # moving sprites, 64 pixels, CPU
    python -m latent_flow.minimal_example --fields constant        # K constant directions instead of small networks

z_t = z_{t-1} + sum_k y_{t,k} field_k(z_{t-1}), y_t inferred from the frames x_{t-1}, x_t; loss = VAE terms plus the
divergence of the mean spike from what the sticky chain expects. Written to --out: metrics.csv, final.pt, and
spikes.txt with the mean inferred spikes beside the true ones.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path[0:1] = [str(Path(__file__).resolve().parents[1])]
    import common.start  # noqa: F401

from typing import Annotated, Literal

import numpy as np
import torch
from annotated_types import Ge, Gt, Le
from torch import Tensor, nn

from common.checkpoint import atomic_write, save_state
from common.errors import run_command
from common.launch import check_finite, full_precision, pick_device, seed_everything
from common.options import Count, Device, Options, Seed, option
from common.run import Run
from latent_flow import objective, spikes
from latent_flow.data import DEFAULTS, open_source
from latent_flow.encoders import ConvVAE, relaxed_bernoulli, reparameterize, temperature, trunk
from latent_flow.model import ImageSize, LatentSize, Width
from latent_flow.options import SpikePrior, is_dry, parse_tool


class MinimalOptions(Options):
    """Options of the example."""

    dataset: Literal[tuple(DEFAULTS)] = option("sprites", "data set; of frames the true spikes are unknown")
    fields: Literal["mlp", "constant"] = option("mlp", "small networks, or constant directions")
    num_support_sets: Annotated[int, Ge(1), Le(12)] = option(3, "number of fields K", flags=("-K",))
    steps: Annotated[int, Ge(1), Le(500)] = option(8, "steps T of a sequence")
    image_size: ImageSize = option(64, "side of the images", multiple_of=4)
    latent_size: LatentSize = option(128, "latent size = channel width of the VAE")
    width: Width = option(64, "channel width of the spike encoder")
    spike_prior: SpikePrior = option((0.3, 0.7), "spike probabilities p_on,p_stay")
    lr: Annotated[float, Gt(0), Le(100)] = option(1e-4, "learning rate")
    batch_size: Annotated[int, Ge(1), Le(65_536)] = option(32, "sequences a step")
    max_iter: Count = option(2000, "iterations")
    log_freq: Count = option(10, "log every so many iterations")
    seed: Seed = option(0, "seed of everything random")
    device: Device = option("cpu", "device")
    data_dir: str | None = option(None, "folder of the data sets [DATA_ROOT, else data/]")
    out: str = option("runs/latent_flow/minimal", "folder of the run", min_length=1)
    overwrite: bool = option(False, "start anew in a folder that holds a run")
    dry_run: bool = option(False, "check and print the options, and stop")


class SpikeEncoder(nn.Module):
    """Spike logits (B, K) of a pair of frames (B, 2C, N, N)."""

    def __init__(self, channels: int, width: int, size: int, count: int):
        super().__init__()
        self.encoder = trunk(channels, width, size, width)
        self.linear_y = nn.Linear(width, count)

    def forward(self, pair: Tensor) -> Tensor:
        """pair (B, 2C, N, N) -> logits (B, K)."""
        return self.linear_y(self.encoder(pair).flatten(1))


class ConstantFields(nn.Module):
    """K learned directions, the same everywhere: z (B, D) -> (K, B, D)."""

    def __init__(self, directions: Tensor):
        super().__init__()
        self.directions = nn.Parameter(directions)

    def forward(self, z: Tensor) -> Tensor:
        """z (B, D) -> (K, B, D)."""
        return self.directions[:, None].expand(-1, len(z), -1)


class MLPFields(nn.Module):
    """K small networks without time: z (B, D) -> (K, B, D)."""

    def __init__(self, count: int, dim: int):
        super().__init__()
        make = lambda: nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), nn.Linear(dim, dim))  # noqa: E731
        self.fields = nn.ModuleList(make() for _ in range(count))

    def forward(self, z: Tensor) -> Tensor:
        """As `ConstantFields`."""
        return torch.stack([field(z) for field in self.fields])


@dataclass
class Model:
    """The three parts of the example."""

    vae: ConvVAE
    fields: nn.Module
    encoder: SpikeEncoder

    def parameters(self) -> list[nn.Parameter]:
        """All parameters."""
        return [p for part in (self.vae, self.fields, self.encoder) for p in part.parameters()]


def step(
    model: Model,
    frames: Tensor,
    tau: float,
    p_on: float,
    stay: float,
    eps: Tensor | None = None,
    uniform: Tensor | None = None,
    upstream: bool = False,
) -> dict[str, Tensor]:
    """Losses of one batch of frames (T+1, B, C, N, N), the spikes (T, B, K) and the last latent (B, D).

    `upstream`: the published spikes (single Gumbel variable), target (biased recursion) and divergence (no gradient).
    """
    steps, batch = len(frames) - 1, frames.shape[1]
    mean, log_var = model.vae.encode(frames[0])
    z = reparameterize(mean, log_var, eps)
    pairs = torch.cat([frames[:-1], frames[1:]], dim=2).flatten(0, 1)
    logits = model.encoder(pairs).unflatten(0, (steps, batch))  # (T, B, K)
    y = relaxed_bernoulli(logits, tau, uniform, link="gumbel" if upstream else "logistic")
    path = [z]
    for y_t in y:
        z = z + torch.einsum("bk,kbd->bd", y_t, model.fields(z))
        path.append(z)
    decoded = model.vae.decoder.logits(torch.cat(path)).unflatten(0, (steps + 1, batch))
    vae = objective.reconstruction(decoded, frames) + objective.gaussian_kl(mean, log_var).mean()
    if upstream:
        target = float(spikes.expected_fraction_upstream(steps, p_on, stay).mean())
        spike = spikes.bernoulli_kl_halved(target, y.abs().mean().detach())
    else:
        target = float(spikes.expected_fraction(y.shape[-1], steps, p_on, stay).mean())
        spike = 2 * spikes.bernoulli_kl_halved(target, torch.sigmoid(logits).mean())
    return {"loss_total": vae + spike, "loss_vae": vae, "loss_spike": spike, "spikes": y, "z": z}


def build(args: MinimalOptions, channels: int) -> Model:
    """The model of the options."""
    directions = torch.randn(args.num_support_sets, args.latent_size) * 0.1
    vae = ConvVAE(channels, args.latent_size, args.image_size, 10.0)
    fields = ConstantFields(directions) if args.fields == "constant" else MLPFields(*directions.shape)
    return Model(vae, fields, SpikeEncoder(2 * channels, args.width, args.image_size, len(directions)))


def main(argv: list[str] | None = None) -> None:
    """Command line of the example."""
    args = parse_tool(MinimalOptions, argv, __doc__)
    if is_dry(args):
        return
    seed_everything(args.seed)
    full_precision()
    device = pick_device(args.device)
    source = open_source(args.dataset, args.steps, size=args.image_size, root=args.data_dir, device=device)
    rows = source.split(args.seed)[0]
    model = build(args, source.channels)
    nn.ModuleList(vars(model).values()).to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    rng, generator = np.random.default_rng(args.seed), torch.Generator().manual_seed(args.seed)
    with Run(args.out, args.as_dict(), overwrite=args.overwrite, tensorboard=False) as run:
        for iteration in run.progress(range(1, args.max_iter + 1)):
            picked, active, count = rng.choice(rows, args.batch_size), None, len(source.moving)
            if source.names:  # clips move by themselves
                active = spikes.draw_spikes(args.steps, count, *args.spike_prior, generator, args.batch_size)
            frames = source.sequences(picked) if active is None else source.composed(picked, active)
            out = step(model, frames, temperature(iteration), *args.spike_prior)
            optimizer.zero_grad()
            out["loss_total"].backward()
            optimizer.step()
            if iteration % args.log_freq == 0 or iteration == args.max_iter:
                check_finite(out["loss_total"], iteration, vars(model).values())
                losses = {name: value for name, value in out.items() if name.startswith("loss")}
                spike = {"inferred": out["spikes"]} if active is None else {"active": active, "inferred": out["spikes"]}
                run.log(iteration, **losses, **{name: y.sum(-1).mean() for name, y in spike.items()})
                run.info(f"iteration {iteration}: " + ", ".join(f"{k} {v.item():.4f}" for k, v in losses.items()))
        parts = {name: part.state_dict() for name, part in vars(model).items()}
        save_state(Path(args.out) / "final.pt", "latent_flow_minimal", args=args.as_dict(), **parts)
        with atomic_write(Path(args.out) / "spikes.txt") as file:
            file.write(spike_table(active, out["spikes"]).encode())


def spike_table(active: Tensor | None, inferred: Tensor) -> str:
    """Mean number of true (where known) and of inferred spikes (T, B, K) at each step of the last batch."""
    true, found = ([] if y is None else y.detach().sum(-1).mean(1).tolist() for y in (active, inferred))
    known = [f"{a:.3f}" for a in true] or ["unknown"] * len(found)
    return "".join(f"step {t}: true {known[t - 1]} inferred {b:.3f}\n" for t, b in enumerate(found, 1))


if __name__ == "__main__":
    sys.exit(run_command(main))
