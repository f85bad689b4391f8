"""Pictures of what the flows learned: true sequences above the model's, side by side, as GIFs and as grids.

    python -m latent_flow.show_flows --exp RUN                       # into RUN/pictures
    python -m latent_flow.show_flows --exp RUN --samples 5 --zoom 2 --out DIR
    python -m latent_flow.show_flows                                 # the released MNIST model

Per transformation NAME: NAME.gif (upper row the truth, lower row the model moved from x_0 alone) and NAME.png (the same
frames from left to right, a pair of rows a sample). Supervised runs also get A_then_B.gif (flow A for the first half of
the steps, then B) and A_and_B.gif (both at once). 200 ms a frame.
Where the released model's data set is not there, sequences start at codes of the prior, and there is no truth to show.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0:1] = [str(Path(__file__).resolve().parents[1])]
    import common.start  # noqa: F401

from typing import Annotated

import numpy as np
import torch
from annotated_types import Ge, Le
from torch import Tensor

from common.errors import MissingDataError, UserError, run_command
from common.images import save_gif, save_image, to_uint8
from common.launch import full_precision, pick_device
from common.options import Whole, option
from latent_flow import metrics
from latent_flow.model import LatentFlow
from latent_flow.options import ToolOptions, is_dry, parse_tool
from latent_flow.rollout import rollout
from latent_flow.runs import Written, load_run, run_or_release, source_of
from latent_flow.transforms import NAMES
from latent_flow.traverse_latent_space_vae import prior_codes


def rows_of(frames: Tensor, zoom: int) -> np.ndarray:
    """Frames (T+1, B, C, N, N) -> (T+1, N * zoom, B * N * zoom, 3) uint8, the samples side by side."""
    pixels = to_uint8(frames.flatten(0, 1)).reshape(*frames.shape)
    if pixels.shape[2] == 1:
        pixels = pixels.repeat(3, axis=2)
    pixels = pixels.repeat(zoom, axis=3).repeat(zoom, axis=4)
    return np.concatenate(list(pixels.transpose(1, 0, 3, 4, 2)), axis=2)


def write(written: Written, name: str, sequences: list[Tensor], zoom: int) -> None:
    """The GIF and the grid of sequences (T+1, B, C, N, N), one above the other: the truth and the model's."""
    rows = [rows_of(frames, zoom) for frames in sequences]
    save_gif(written.path(f"{name}.gif"), [np.concatenate(parts) for parts in zip(*rows, strict=True)], fps=5)
    lines = []
    for b in range(sequences[0].shape[1]):
        for frames in sequences:
            lines.append(np.concatenate(list(rows_of(frames[:, b : b + 1], zoom)), axis=1))
    save_image(written.path(f"{name}.png"), np.concatenate(lines))


def moved(model: LatentFlow, z: Tensor, coefficients: metrics.Coefficients) -> Tensor:
    """The model's frames (T+1, B, C, N, N) from codes (B, D) by coefficients of T steps."""
    path = rollout(model.stacked(len(coefficients.c1)), z, coefficients.c1, coefficients.c2)
    return metrics.decode(model, path.z)


def predicted(model: LatentFlow, frames: Tensor, coefficients: metrics.Coefficients) -> Tensor:
    """The model's frames from x_0 and the coefficients: (T+1, B, C, N, N)."""
    return moved(model, model.vae.encode(frames[0])[0], coefficients)


def compositions(names: tuple[str, ...], steps: int) -> list[tuple[str, tuple[int, int], Tensor]]:
    """Name, flows (a, b) and coefficients (T, K) of every switch of two flows half-way and every superposition."""
    found, half, flows = [], steps // 2, torch.eye(len(names))
    for a in range(len(names)):
        for b in range(len(names)):
            if a != b:
                c = torch.cat([flows[a].expand(half, -1), flows[b].expand(steps - half, -1)])
                found.append((f"{names[a]}_then_{names[b]}", (a, b), c))
            if a < b:
                found.append((f"{names[a]}_and_{names[b]}", (a, b), (flows[a] + flows[b]).expand(steps, -1)))
    return found


def from_prior(model: LatentFlow, written: Written, samples: int, zoom: int, seed: int) -> None:
    """What a supervised model's flows do to codes from the prior: one flow, two in turn, two at once."""
    config, device = model.config, next(model.parameters()).device
    digits = config.channels == 3 and config.flows == len(NAMES)
    names = NAMES if digits else tuple(f"flow_{k}" for k in range(config.flows))
    z = prior_codes(model, samples, seed).to(device)
    single = [(name, (k, k), torch.eye(config.flows)[k].expand(config.steps, -1)) for k, name in enumerate(names)]
    for name, _, c in [*single, *compositions(names, config.steps)]:
        write(written, name, [moved(model, z, metrics.Coefficients(c[:, None].expand(-1, samples, -1).to(z)))], zoom)
    print(f"{samples} codes of the prior along {config.flows} flows: {written.folder}")


class ShowOptions(ToolOptions):
    """Options of the pictures."""

    samples: Annotated[int, Ge(1), Le(1000)] = option(5, "sequences side by side")
    first: Whole = option(0, "the first validation image shown")
    zoom: Annotated[int, Ge(1), Le(64)] = option(2, "enlarge every pixel so many times")
    out: str | None = option(None, "folder of the pictures [<exp>/pictures]")


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    """Command line of the pictures."""
    args = parse_tool(ShowOptions, argv, __doc__)
    if is_dry(args):
        return
    device = pick_device(args.device)
    full_precision(args.tf32)
    weights, exp, is_release = run_or_release(args.exp)
    model, options, iteration = load_run(weights, device)
    config = model.config
    written = Written(Path(args.out) if args.out else exp / "pictures")
    try:
        source = source_of(config, args.data_dir or options["data_dir"], device, options["warp_centre"])
    except MissingDataError as error:
        if not is_release:
            raise
        print(f"codes from the prior in place of images, since {error}")
        from_prior(model, written, args.samples, args.zoom, args.seed)
        written.finish()
        return
    rows = source.split(options["seed"])[1][args.first :][: args.samples]
    if len(rows) < args.samples:
        raise UserError(f"--first {args.first}: fewer than {args.samples} validation images remain")
    slab = config.objective == "upstream" or iteration >= config.slab_start
    names = metrics.known_transformations(model, source)[: config.flows if config.variant == "supervised" else None]
    for k, name in enumerate(names):
        frames = metrics.one_transformation(model, source, rows, k, config.steps)
        ours = predicted(model, frames, metrics.coefficients_of(model, frames, k, slab))
        write(written, name, [frames, ours], args.zoom)
    if config.variant == "supervised" and config.flows == len(source.names):
        for name, flows, c in compositions(names, config.steps):
            if "_then_" in name:
                truth = source.chosen(rows, c.argmax(1))
            else:
                truth = source.superposed(rows, flows, config.steps)
            coefficients = metrics.Coefficients(c[:, None].expand(-1, len(rows), -1).to(truth))
            write(written, name, [truth, predicted(model, truth, coefficients)], args.zoom)
    written.finish()
    print(f"{len(rows)} samples of {len(names)} transformations: {written.folder}")


if __name__ == "__main__":
    sys.exit(run_command(main))
