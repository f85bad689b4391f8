"""Traverse the latent space along every flow and write pictures, codes and GIFs.

    python -m latent_flow.traverse_latent_space_vae --exp RUN --pool VAE_MNIST_VIS --gif   # codes of sample_vae
    python -m latent_flow.traverse_latent_space_vae --exp RUN --gif                        # encoded validation images
    python -m latent_flow.traverse_latent_space_vae --exp RUN --compose --gif              # also switch and superpose
    python -m latent_flow.traverse_latent_space_vae --gif                                  # the released MNIST model

Written in RUN/results/<pool>/<2S>_<eps>_<2S eps>/<code>/ with S = --shift-steps: original_image.jpg,
paths_images/path_KKK/NNNNNN.jpg (most negative ... original ... most positive), paths_images/wave_KKK.txt (potential u
at each positive step), paths_images/shift_KKK.txt (the code, then every shift), paths_latent_codes.pt (K, S+1, D).
GIFs with one row a code in <...>/paths_gifs/path_KKK.gif. written.json lists the files: the next call with the same
pool and steps removes those of them that it does not write again.
"""

import hashlib
import itertools
import sys
from dataclasses import dataclass
from pathlib import Path

if __name__ == "__main__":
    sys.path[0:1] = [str(Path(__file__).resolve().parents[1])]
    import common.start  # noqa: F401

from typing import Annotated, Self

import numpy as np
import torch
from annotated_types import Ge, Le
from PIL import Image
from pydantic import StringConstraints, model_validator
from torch import Tensor

from common.checkpoint import atomic_write, load_tensors
from common.errors import MissingDataError, UserError, run_command
from common.images import save_gif, save_image, to_uint8
from common.launch import full_precision, pick_device
from common.options import Count, Says, option
from latent_flow.fields import StackedFlows
from latent_flow.metrics import one_transformation
from latent_flow.model import LatentFlow
from latent_flow.options import ToolOptions, is_dry, parse_tool
from latent_flow.rollout import inverse_step, rollout
from latent_flow.runs import Written, load_run, need_flows, run_or_release, source_of

BAR = (252, 186, 3)  # progress bar of the GIFs
PoolName = Annotated[str, StringConstraints(pattern=r"^[^/\x00]+$", max_length=200), Says("a name without slashes")]
Side = Annotated[int, Ge(1), Le(4096)]


class TraverseOptions(ToolOptions):
    """Options of the traversal."""

    pool: PoolName | None = option(None, "pool of codes in <exp>/latent_codes/ [encoded validation images]")
    codes: Annotated[int, Ge(1), Le(100_000)] | None = option(None, "without --pool: how many images to encode [5]")
    shift_steps: Annotated[int, Ge(2), Le(10_000)] = option(16, "steps in all: half of them in each direction")
    eps: Annotated[float, Ge(-1000), Le(1000)] = option(1.0, "step multiplier")
    shift_leap: Count = option(1, "keep every n-th picture on both sides of the code")
    batch_size: Count | None = option(None, "decoding batch [2 S + 1]")
    img_size: Side | None = option(None, "side of the saved pictures [the model's]")
    img_quality: Annotated[int, Ge(1), Le(95)] = option(75, "JPEG quality")
    gif: bool = option(False, "also write GIFs")
    gif_size: Side = option(256, "side of a picture in the GIFs")
    gif_fps: Annotated[int, Ge(1), Le(100)] = option(30, "frames a second of the GIFs")
    compose: bool = option(False, "also GIFs of switched and superposed flows (needs --gif)")
    inverse: bool = option(False, "backwards by the true inverse of the flow (needs --eps 1)")
    vae_scratch: bool = option(True, "weights always come from the run")
    shapes3d: bool | None = option(None, "accepted; the run knows its data set")
    verbose: bool = option(False, "print every code", flags=("-v",))

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.inverse and self.eps != 1:
            raise ValueError("--inverse undoes the trained steps: it needs --eps 1")
        if self.compose and not self.gif:
            raise ValueError("--compose writes GIFs: add --gif")
        if self.pool and self.codes:
            raise ValueError("--codes does nothing with --pool; leave one of them out")
        if not self.vae_scratch:
            raise ValueError("an untrained decoder shows nothing: leave --no-vae_scratch out")
        return self


@dataclass
class Traversal:
    """One code along one flow: codes (S+1, D) from most negative to most positive, u (S/2,) at the positive steps."""

    codes: Tensor
    energy: Tensor


def traverse(flows: StackedFlows, z: Tensor, k: int, shift_steps: int, eps: float, inverse: bool = False) -> Traversal:
    """Move one code z (1, D) along flow k, `shift_steps` // 2 steps each way, times eps times its velocity.

    Backwards subtracts the velocity at the same increasing times, as published; `inverse` solves for the true inverse
    of the forward steps instead, at decreasing times (eps must be 1).
    """
    half = shift_steps // 2
    count = len(flows.potential.w_x)
    c1 = torch.nn.functional.one_hot(torch.tensor([k]), count).to(z)
    c2 = c1 if flows.rotation is not None else None
    forward, energy, x = [], [], z
    for t in range(1, half + 1):
        field = flows.at(x, t)
        energy.append(field.potential.u[k])
        x = x + eps * field.velocity(c1, c2)
        forward.append(x)
    backward, x = [], z
    for t in range(1, half + 1):
        if inverse:
            x = inverse_step(flows, x, half + 1 - t, c1, c2)
        else:
            x = x - eps * flows.at(x, t).velocity(c1, c2)
        backward.append(x)
    return Traversal(torch.cat([*reversed(backward), z, *forward]), torch.cat(energy))


def resized(pictures: np.ndarray, size: int) -> np.ndarray:
    """(N, H, W, C) uint8 pictures at side `size`, enlarged pixel by pixel, always with three channels."""
    out = []
    for picture in pictures:
        rgb = np.repeat(picture, 3, axis=2) if picture.shape[2] == 1 else picture
        out.append(np.asarray(Image.fromarray(rgb).resize((size, size), Image.Resampling.NEAREST)))
    return np.stack(out)


def pictures_of(model: LatentFlow, codes: Tensor, batch: int) -> np.ndarray:
    """Decode codes (N, D) to uint8 pictures (N, H, W, C), rounded."""
    images = torch.cat([model.vae.inference(part) for part in codes.split(batch)])
    return to_uint8(images).transpose(0, 2, 3, 1)


def prior_codes(model: LatentFlow, count: int, seed: int = 0) -> Tensor:
    """Codes (count, D) from N(0, I), on the CPU."""
    return torch.randn(count, model.config.latent_size, generator=torch.Generator().manual_seed(seed))


def collage(originals: list[np.ndarray], moving: list[np.ndarray], size: int) -> list[np.ndarray]:
    """GIF frames: a row a code, the original beside the moving picture, a progress bar 7 pixels high on top."""
    frames = []
    left = np.concatenate(list(resized(np.stack(originals), size)))
    paths = [resized(path, size) for path in moving]
    for i in range(len(paths[0])):
        body = np.concatenate([left, np.concatenate([path[i] for path in paths])], axis=1)
        bar = np.zeros((7, body.shape[1], 3), np.uint8)
        bar[:, : round((i + 1) / len(paths[0]) * body.shape[1])] = BAR
        frames.append(np.concatenate([bar, body]))
    return frames


def read_pool(folder: Path, latent: int) -> list[tuple[str, Tensor]]:
    """Names and codes (1, D) of a pool that `sample_vae` wrote."""
    files = sorted(folder.glob("*/latent_code.pt"))
    if not files:
        raise UserError(f"no latent codes in {folder}: write them with python -m latent_flow.sample_vae")
    codes = []
    for file in files:
        code = load_tensors(file)
        if not isinstance(code, Tensor) or code.shape != (1, latent):
            raise UserError(f"{file} holds no code of shape (1, {latent}): sample the pool from this model")
        codes.append((file.parent.name, code))
    return codes


def code_name(z: Tensor) -> str:
    """The SHA-1 of a code's float32 bytes, the published name of its folder."""
    return hashlib.sha1(np.ascontiguousarray(z.detach().cpu().float().numpy()).tobytes()).hexdigest()


def kept_places(count: int, leap: int) -> list[int]:
    """Every `leap`-th of an odd `count` of places, counted from the middle one, which is kept."""
    return [i for i in range(count) if (i - count // 2) % leap == 0]


def write_code(
    written: Written, name: str, model: LatentFlow, z: Tensor, paths: list[Traversal], args: TraverseOptions
) -> tuple[np.ndarray, list]:
    """Everything of one code; returns its picture and the pictures of its paths."""
    batch = args.batch_size or 2 * args.shift_steps + 1
    original = pictures_of(model, z, batch)[0]
    size = args.img_size or original.shape[0]
    save_image(written.path(f"{name}/original_image.jpg"), resized(original[None], size)[0], args.img_quality)
    kept = []
    for k, path in enumerate(paths):
        pictures = pictures_of(model, path.codes[kept_places(len(path.codes), args.shift_leap)], batch)
        kept.append(pictures)
        for i, picture in enumerate(resized(pictures, size)):
            save_image(written.path(f"{name}/paths_images/path_{k:03d}/{i:06d}.jpg"), picture, args.img_quality)
        half = len(path.codes) // 2
        moves = torch.cat([z, path.codes[half + 1 :] - path.codes[half:-1]]).flatten()
        for kind, values in (("wave", path.energy), ("shift", moves)):
            with atomic_write(written.path(f"{name}/paths_images/{kind}_{k:03d}.txt")) as file:
                file.write("".join(f"{value:.8g}\n" for value in values.tolist()).encode())
    with atomic_write(written.path(f"{name}/paths_latent_codes.pt")) as file:
        torch.save(torch.stack([path.codes.cpu() for path in paths]), file)
    return original, kept


def write_compositions(written: Written, model: LatentFlow, codes: Tensor, args: TraverseOptions) -> None:
    """GIFs of flows switched half-way and of flows superposed, one row a code."""
    steps, count, batch = args.shift_steps // 2, model.config.flows, args.batch_size or 2 * args.shift_steps + 1
    flows = model.stacked(steps)
    rotating = model.support_sets.rotation is not None
    originals = list(pictures_of(model, codes, batch))
    for a, b in itertools.permutations(range(count), 2):
        c = torch.zeros(steps, len(codes), count).to(codes)
        c[: steps // 2, :, a], c[steps // 2 :, :, b] = args.eps, args.eps
        kinds = {f"switch_{a:03d}_{b:03d}": c}
        if a < b:
            both = torch.zeros_like(c)
            both[..., [a, b]] = args.eps
            kinds[f"superpose_{a:03d}_{b:03d}"] = both
        for name, coefficients in kinds.items():
            z = rollout(flows, codes, coefficients, coefficients if rotating else None).z  # (T+1, B, D)
            moving = [pictures_of(model, z[:, i], batch) for i in range(len(codes))]
            frames = collage(originals, moving, args.gif_size)
            save_gif(written.path(f"paths_gifs/{name}.gif"), frames, args.gif_fps)


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    """Command line of the traversal."""
    args = parse_tool(TraverseOptions, argv, __doc__)
    if is_dry(args):
        return
    device = pick_device(args.device)
    full_precision(args.tf32)
    source, exp, is_release = run_or_release(args.exp)
    model, options, _ = load_run(source, device)
    need_flows(model, source)
    if args.shapes3d is not None and args.shapes3d != (model.config.dataset == "shapes3d"):
        raise UserError(f"{source} was trained on {model.config.dataset}: leave --shapes3d out")
    flows = model.stacked(args.shift_steps)
    if args.pool:
        codes = read_pool(exp / "latent_codes" / args.pool, model.config.latent_size)
    else:
        try:
            codes = encode_images(model, options, args.codes or 5, args.data_dir, device)
        except MissingDataError as error:
            if not is_release:
                raise
            print(f"codes from the prior in place of encoded images, since {error}")
            codes = [(code_name(z[None]), z[None]) for z in prior_codes(model, args.codes or 5, args.seed)]
    label = f"{2 * args.shift_steps}_{args.eps:g}_{2 * args.shift_steps * args.eps:g}"
    written = Written(exp / "results" / (args.pool or "encoded") / label)
    shown, kept = [], []
    for name, code in codes:
        z = code.to(device)
        paths = [traverse(flows, z, k, args.shift_steps, args.eps, args.inverse) for k in range(model.config.flows)]
        original, pictures = write_code(written, name, model, z, paths, args)
        shown.append(original)
        kept.append(pictures)
        if args.verbose:
            print(written.folder / name)
    if args.gif:
        for k in range(model.config.flows):
            frames = collage(shown, [pictures[k] for pictures in kept], args.gif_size)
            save_gif(written.path(f"paths_gifs/path_{k:03d}.gif"), frames, args.gif_fps)
        if args.compose:
            write_compositions(written, model, torch.cat([code for _, code in codes]).to(device), args)
    written.finish()
    print(f"{len(codes)} codes along {model.config.flows} flows: {written.folder}")


def encode_images(model: LatentFlow, options: dict, count: int, root: str | None, device) -> list[tuple[str, Tensor]]:
    """Posterior means (1, D) of the first `count` validation images, named as `code_name`."""
    source = source_of(model.config, root or options["data_dir"], device, options["warp_centre"])
    rows = source.split(options["seed"])[1][:count]
    means = model.vae.encode(one_transformation(model, source, rows, 0, 1)[0])[0]
    return [(code_name(mean[None]), mean[None]) for mean in means]


if __name__ == "__main__":
    sys.exit(run_command(main))
