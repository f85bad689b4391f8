"""Pictures of what the flows learned: true sequences above the model's, side by side, as GIFs and as grids.

    python -m latent_flow.show_flows --exp RUN                       # into RUN/pictures
    python -m latent_flow.show_flows --exp RUN --samples 5 --zoom 2 --out DIR

Per transformation NAME: NAME.gif (upper row the truth, lower row the model moved from x_0 alone) and NAME.png (the same
frames from left to right, a pair of rows a sample). Supervised runs also get A_then_B.gif (flow A for the first half of
the steps, then B) and A_and_B.gif (both at once). 200 ms a frame.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError, run_command
from common.images import save_gif, save_image, to_uint8
from common.launch import pick_device
from latent_flow import metrics
from latent_flow.data import FrameSequences, open_source, split_rows
from latent_flow.evaluate import load_run
from latent_flow.model import LatentFlow
from latent_flow.options import Parser, positive
from latent_flow.rollout import rollout


def rows_of(frames: Tensor, zoom: int) -> np.ndarray:
    """Frames (T+1, B, C, N, N) -> (T+1, N * zoom, B * N * zoom, 3) uint8, the samples side by side."""
    pixels = to_uint8(frames.flatten(0, 1)).reshape(*frames.shape)
    if pixels.shape[2] == 1:
        pixels = pixels.repeat(3, axis=2)
    pixels = pixels.repeat(zoom, axis=3).repeat(zoom, axis=4)
    return np.concatenate(list(pixels.transpose(1, 0, 3, 4, 2)), axis=2)


def write(folder: Path, name: str, truth: Tensor, ours: Tensor, zoom: int) -> None:
    """The GIF and the grid of one pair of sequences (T+1, B, C, N, N)."""
    both = [np.concatenate(pair) for pair in zip(rows_of(truth, zoom), rows_of(ours, zoom), strict=True)]
    save_gif(folder / f"{name}.gif", both, fps=5)
    lines = []
    for b in range(truth.shape[1]):
        for frames in (truth, ours):
            lines.append(np.concatenate(list(rows_of(frames[:, b : b + 1], zoom)), axis=1))
    save_image(folder / f"{name}.png", np.concatenate(lines))


def predicted(model: LatentFlow, frames: Tensor, coefficients: metrics.Coefficients) -> Tensor:
    """The model's frames from x_0 and the coefficients: (T+1, B, C, N, N)."""
    path = rollout(model.stacked(len(frames) - 1), model.vae.encode(frames[0])[0], coefficients.c1, coefficients.c2)
    return metrics.decode(model, path.z)


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    """Command line of the pictures."""
    parser = Parser(description=__doc__)
    parser.add_argument("--exp", required=True, help="folder of a run")
    parser.add_argument("--samples", type=positive, default=5)
    parser.add_argument("--first", type=int, default=0, help="the first validation image shown")
    parser.add_argument("--zoom", type=positive, default=2, help="enlarge every pixel so many times")
    parser.add_argument("--out", default=None, help="folder of the pictures (default: <exp>/pictures)")
    parser.add_argument("--data-dir", default=None)
    parser.add_argument("--device", default="auto")
    args = parser.parse(argv)
    device = pick_device(args.device)
    model, options, iteration = load_run(args.exp, device)
    config = model.config
    source = open_source(
        config.dataset,
        config.steps,
        size=config.image_size,
        root=args.data_dir or options["data_dir"],
        device=device,
        centre=options["warp_centre"],
    )
    if isinstance(source, FrameSequences):
        raise UserError("no transformation of these frames is known: use traverse_latent_space_vae")
    rows = split_rows(len(source), options["seed"])[1][args.first :][: args.samples]
    if len(rows) < args.samples:
        raise UserError(f"--first {args.first}: fewer than {args.samples} validation images remain")
    out = Path(args.out or Path(args.exp) / "pictures")
    out.mkdir(parents=True, exist_ok=True)
    slab = config.objective == "upstream" or iteration >= config.slab_start
    names = metrics.known_transformations(model, source)
    for k, name in enumerate(names):
        frames = metrics.one_transformation(model, source, rows, k, config.steps)
        write(out, name, frames, predicted(model, frames, metrics.coefficients_of(model, frames, k, slab)), args.zoom)
    if config.variant == "supervised" and config.flows == len(names):
        half = config.steps // 2
        for a in range(len(names)):
            for b in range(len(names)):
                order = torch.tensor([a] * half + [b] * (config.steps - half))
                c = torch.nn.functional.one_hot(order, config.flows).float()[:, None].expand(-1, len(rows), -1)
                truth = source.chosen(rows, order)
                if a != b:
                    moved = predicted(model, truth, metrics.Coefficients(c.to(truth)))
                    write(out, f"{names[a]}_then_{names[b]}", truth, moved, args.zoom)
                if a < b:
                    truth = source.superposed(rows, (a, b), config.steps)
                    c = torch.zeros(config.steps, len(rows), config.flows)
                    c[..., [a, b]] = 1
                    moved = predicted(model, truth, metrics.Coefficients(c.to(truth)))
                    write(out, f"{names[a]}_and_{names[b]}", truth, moved, args.zoom)
    print(f"{len(rows)} samples of {len(names)} transformations: {out}")


if __name__ == "__main__":
    sys.exit(run_command(main))
