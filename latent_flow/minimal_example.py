"""The smallest training loop of Sparse Transformation Analysis: spikes that switch K latent fields on and off.

    python -m latent_flow.minimal_example                          # moving sprites, 64 pixels, CPU
    python -m latent_flow.minimal_example --fields constant        # K constant directions instead of small networks
    python -m latent_flow.minimal_example --dataset digits --image-size 8 --latent-size 16 --max-iter 20

z_t = z_{t-1} + sum_k y_{t,k} field_k(z_{t-1}), y_t inferred from the frames x_{t-1}, x_t; loss = VAE terms plus the
divergence of the mean spike from what the sticky chain expects. Written to --out: metrics.csv, final.pt, and
spikes.txt with the mean inferred spikes beside the true ones.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from common.checkpoint import save_state
from common.errors import run_command
from common.launch import check_finite, pick_device, seed_everything
from common.run import Run
from latent_flow import objective, spikes
from latent_flow.data import open_source, split_rows
from latent_flow.encoders import ConvVAE, relaxed_bernoulli, reparameterize, temperature, trunk
from latent_flow.options import Parser, positive, probability_pair


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
        """z (B, D) -> (K, B, D)."""
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


def main(argv: list[str] | None = None) -> None:
    """Command line of the example."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--dataset", default="sprites", help="sprites, dsprites, mnist or digits")
    add("--fields", choices=("mlp", "constant"), default="mlp")
    add("-K", "--num-support-sets", type=positive, default=3)
    add("--steps", type=positive, default=8, help="steps T of a sequence")
    add("--image-size", type=positive, default=64)
    add("--latent-size", type=positive, default=128)
    add("--width", type=positive, default=64, help="channel width of the spike encoder")
    add("--spike-prior", type=probability_pair, default=(0.3, 0.7), metavar="P_ON,P_STAY")
    add("--lr", type=float, default=1e-4)
    add("--batch-size", type=positive, default=32)
    add("--max-iter", type=positive, default=2000)
    add("--log-freq", type=positive, default=10)
    add("--seed", type=int, default=0)
    add("--device", default="cpu")
    add("--data-dir", default=None)
    add("--out", default="runs/latent_flow/minimal")
    parser.add_switch("--overwrite", default=False, help="start anew in a folder that holds a run")
    args = parser.parse(argv)
    seed_everything(args.seed)
    device = pick_device(args.device)
    source = open_source(args.dataset, args.steps, size=args.image_size, root=args.data_dir, device=device)
    rows = split_rows(len(source), args.seed)[0]
    count = len(getattr(source, "moving", source.names))
    directions = torch.randn(args.num_support_sets, args.latent_size) * 0.1
    model = Model(
        ConvVAE(source.channels, args.latent_size, args.image_size, 10.0).to(device),
        (ConstantFields(directions) if args.fields == "constant" else MLPFields(len(directions), args.latent_size)).to(
            device
        ),
        SpikeEncoder(2 * source.channels, args.width, args.image_size, args.num_support_sets).to(device),
    )
    optimizer = torch.optim.Adam(model.parameters(), lr=args.lr)
    rng, generator = np.random.default_rng(args.seed), torch.Generator().manual_seed(args.seed)
    with Run(args.out, vars(args), overwrite=args.overwrite, tensorboard=False) as run:
        for iteration in run.progress(range(1, args.max_iter + 1)):
            active = spikes.draw_spikes(args.steps, count, *args.spike_prior, generator, args.batch_size)
            frames = source.composed(rng.choice(rows, args.batch_size), active)
            out = step(model, frames, temperature(iteration), *args.spike_prior)
            optimizer.zero_grad()
            out["loss_total"].backward()
            optimizer.step()
            if iteration % args.log_freq == 0 or iteration == args.max_iter:
                check_finite(out["loss_total"], iteration, [model.vae, model.fields, model.encoder])
                losses = {name: value for name, value in out.items() if name.startswith("loss")}
                run.log(iteration, **losses, active=active.sum(-1).mean(), inferred=out["spikes"].sum(-1).mean())
                run.info(f"iteration {iteration}: " + ", ".join(f"{k} {v.item():.4f}" for k, v in losses.items()))
        parts = {name: getattr(model, name).state_dict() for name in ("vae", "fields", "encoder")}
        save_state(Path(args.out) / "final.pt", "latent_flow_minimal", args=vars(args), **parts)
        table = [f"step {t + 1}: true {a:.3f} inferred {b:.3f}" for t, (a, b) in enumerate(_per_step(active, out))]
        (Path(args.out) / "spikes.txt").write_text("\n".join(table) + "\n")


def _per_step(active: Tensor, out: dict[str, Tensor]) -> list[tuple[float, float]]:
    """Mean number of true and of inferred spikes at each step of the last batch."""
    return list(zip(active.sum(-1).mean(1).tolist(), out["spikes"].detach().sum(-1).mean(1).tolist(), strict=True))


if __name__ == "__main__":
    sys.exit(run_command(main))
