"""Traverse the latent space along every flow and write pictures, codes and GIFs.

    python -m latent_flow.traverse_latent_space_vae --exp RUN --pool VAE_MNIST_VIS --gif   # codes of sample_vae
    python -m latent_flow.traverse_latent_space_vae --exp RUN --gif                        # encoded validation images
    python -m latent_flow.traverse_latent_space_vae --exp RUN --compose --gif              # also switch and superpose
    python -m latent_flow.traverse_latent_space_vae --gif                                  # the released MNIST model

Written in RUN/results/<pool>/<2S>_<eps>_<2S eps>/<code>/ with S = --shift-steps: original_image.jpg,
paths_images/path_KKK/NNNNNN.jpg (most negative ... original ... most positive), paths_images/wave_KKK.txt (potential u
at each positive step), paths_images/shift_KKK.txt (the code, then every shift), paths_latent_codes.pt (K, S+1, D).
GIFs with one row a code in <...>/paths_gifs/path_KKK.gif.
"""

import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.checkpoint import atomic_write, load_tensors
from common.errors import MissingDataError, UserError, run_command
from common.images import save_gif, save_image, to_uint8
from common.launch import pick_device
from latent_flow.data import FrameSequences, open_source, split_rows
from latent_flow.evaluate import load_run, run_or_release
from latent_flow.fields import StackedFlows
from latent_flow.model import LatentFlow
from latent_flow.options import Parser, positive
from latent_flow.rollout import inverse_step, rollout

BAR = (252, 186, 3)  # progress bar of the GIFs


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


def write_code(folder: Path, model: LatentFlow, z: Tensor, paths: list[Traversal], args) -> tuple[np.ndarray, list]:
    """Everything of one code; returns its picture and the pictures of its paths."""
    original = pictures_of(model, z, args.batch_size)[0]
    size = args.img_size or original.shape[0]
    save_image(folder / "original_image.jpg", resized(original[None], size)[0], args.img_quality)
    kept = []
    for k, path in enumerate(paths):
        pictures = pictures_of(model, path.codes, args.batch_size)[:: args.shift_leap]
        kept.append(pictures)
        for i, picture in enumerate(resized(pictures, size)):
            save_image(folder / f"paths_images/path_{k:03d}/{i:06d}.jpg", picture, args.img_quality)
        waves = "".join(f"{value:.8g}\n" for value in path.energy.tolist())
        (folder / f"paths_images/wave_{k:03d}.txt").write_text(waves)
        half = len(path.codes) // 2
        moves = torch.cat([z, path.codes[half + 1 :] - path.codes[half:-1]]).flatten()
        (folder / f"paths_images/shift_{k:03d}.txt").write_text("".join(f"{v:.8g}\n" for v in moves.tolist()))
    with atomic_write(folder / "paths_latent_codes.pt") as file:
        torch.save(torch.stack([path.codes.cpu() for path in paths]), file)
    return original, kept


def write_compositions(folder: Path, model: LatentFlow, codes: Tensor, args) -> None:
    """GIFs of flows switched half-way and of flows superposed, one row a code."""
    steps, count = args.shift_steps // 2, model.config.flows
    flows = model.stacked(steps)
    rotating = model.support_sets.rotation is not None
    size = args.gif_size
    originals = list(pictures_of(model, codes, args.batch_size))
    for a in range(count):
        for b in range(count):
            if a == b:
                continue
            c = torch.zeros(steps, len(codes), count).to(codes)
            c[: steps // 2, :, a], c[steps // 2 :, :, b] = args.eps, args.eps
            kinds = {f"switch_{a:03d}_{b:03d}": c}
            if a < b:
                both = torch.zeros_like(c)
                both[..., [a, b]] = args.eps
                kinds[f"superpose_{a:03d}_{b:03d}"] = both
            for name, coefficients in kinds.items():
                z = rollout(flows, codes, coefficients, coefficients if rotating else None).z  # (T+1, B, D)
                moving = [pictures_of(model, z[:, i], args.batch_size) for i in range(len(codes))]
                save_gif(folder / f"{name}.gif", collage(originals, moving, size), args.gif_fps)


@torch.no_grad()
def main(argv: list[str] | None = None) -> None:
    """Command line of the traversal."""
    parser = Parser(description=__doc__)
    add = parser.add_argument
    add("--exp", default=None, help="folder of a run (default: the released model)")
    add("--pool", default=None, help="pool of latent codes, in <exp>/latent_codes/; default: encoded validation images")
    add("--codes", type=positive, default=5, help="without --pool: how many images to encode")
    add("--shift-steps", type=positive, default=16, help="steps in all: half of them in each direction")
    add("--eps", type=float, default=1.0, help="step multiplier")
    add("--shift-leap", type=positive, default=1, help="keep every n-th picture")
    add("--batch-size", type=positive, default=None, help="decoding batch (default: 2 S + 1)")
    add("--img-size", type=positive, default=None, help="side of the saved pictures (default: the model's)")
    add("--img-quality", type=positive, default=75, help="JPEG quality, 1..95")
    parser.add_switch("--gif", default=False, help="also write GIFs")
    add("--gif-size", type=positive, default=256)
    add("--gif-fps", type=positive, default=30)
    parser.add_switch("--compose", default=False, help="also GIFs of switched and superposed flows (needs --gif)")
    parser.add_switch("--inverse", default=False, help="backwards by the true inverse of the flow (needs --eps 1)")
    parser.add_switch("--vae_scratch", "--vae-scratch", default=True, help="weights always come from the run")
    add("-v", "--verbose", action="store_true", help="print every code")
    parser.add_switch("--shapes3d", default=None, help="accepted; the run knows its data set")
    add("--device", default="auto")
    parser.add_switch("--cuda", default=None, help="--no-cuda is the same as --device cpu")
    add("--data-dir", default=None)
    args = parser.parse(argv)
    args.batch_size = args.batch_size or 2 * args.shift_steps + 1
    if args.shift_steps < 2:
        raise UserError("--shift-steps must be at least 2: half of the steps go each way")
    if args.inverse and args.eps != 1:
        raise UserError("--inverse undoes the trained steps: it needs --eps 1")
    if args.compose and not args.gif:
        raise UserError("--compose writes GIFs: add --gif")
    device = pick_device("cpu" if args.cuda is False else "cuda" if args.cuda else args.device)
    source, exp, is_release = run_or_release(args.exp)
    model, options, _ = load_run(source, device)
    if args.shapes3d is not None and args.shapes3d != (model.config.dataset == "shapes3d"):
        raise UserError(f"{source} was trained on {model.config.dataset}: leave --shapes3d out")
    if not args.vae_scratch:
        raise UserError("an untrained decoder shows nothing: leave --no-vae_scratch out")
    flows = model.stacked(args.shift_steps)
    if args.pool:
        codes = read_pool(exp / "latent_codes" / args.pool, model.config.latent_size)
    else:
        try:
            codes = encode_images(model, options, args.codes, args.data_dir, device)
        except MissingDataError as error:
            if not is_release:
                raise
            print(f"codes from the prior in place of encoded images, since {error}")
            codes = [(code_name(z[None]), z[None]) for z in prior_codes(model, args.codes)]
    label = f"{2 * args.shift_steps}_{args.eps:g}_{2 * args.shift_steps * args.eps:g}"
    out = exp / "results" / (args.pool or "encoded") / label
    shown, kept = [], []
    for name, code in codes:
        z = code.to(device)
        paths = [traverse(flows, z, k, args.shift_steps, args.eps, args.inverse) for k in range(model.config.flows)]
        original, pictures = write_code(out / name, model, z, paths, args)
        shown.append(original)
        kept.append(pictures)
        if args.verbose:
            print(out / name)
    if args.gif:
        for k in range(model.config.flows):
            frames = collage(shown, [pictures[k] for pictures in kept], args.gif_size)
            save_gif(out / "paths_gifs" / f"path_{k:03d}.gif", frames, args.gif_fps)
        if args.compose:
            write_compositions(out / "paths_gifs", model, torch.cat([code for _, code in codes]).to(device), args)
    print(f"{len(codes)} codes along {model.config.flows} flows: {out}")


def encode_images(model: LatentFlow, options: dict, count: int, root: str | None, device) -> list[tuple[str, Tensor]]:
    """Posterior means (1, D) of the first `count` validation images, named as `code_name`."""
    config = model.config
    source = open_source(
        config.dataset,
        config.steps,
        size=config.image_size,
        root=root or options["data_dir"],
        device=device,
        centre=options["warp_centre"],
    )
    rows = split_rows(len(source), options["seed"])[1][:count]
    if isinstance(source, FrameSequences):
        x = source.sequences(rows)[0]
    else:
        x = source.labelled(rows, torch.zeros(len(rows), dtype=torch.long), 1)[0]
    means = model.vae.encode(x)[0]
    return [(code_name(mean[None]), mean[None]) for mean in means]


if __name__ == "__main__":
    sys.exit(run_command(main))
