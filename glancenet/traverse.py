"""Latent traversals of trained weights, starting at the class prototypes; no data set is needed.

    python glancenet/traverse.py                                       # the released GlanceNet
    python glancenet/traverse.py --weights runs/mnist_parity/0/osr_vae.safetensors --latents 0 1
    python glancenet/traverse.py --weights checkpoints/NAME/model.safetensors --out DIR

Weights are those of mnist_parity.py, or the model.safetensors of a main.py run with --conditional_prior. Written to
--out: for every class prototype traverse_<class>.png (its decoding repeated, then a row a latent, which runs from --min
to --max while the others stay) and gif_<class>.gif (a frame a value); prototypes.png.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0:1] = [str(Path(__file__).resolve().parents[1])]
    import common.start  # noqa: F401

import json
from collections.abc import Callable
from typing import Annotated, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from common.checkpoint import load_into, load_weights
from common.errors import UserError, run_command
from common.images import mosaic, save_gif, save_image
from common.launch import pick_device
from common.options import Device, Options, from_flags, option
from common.released import released
from glancenet.mnist_objective import KNOWN_DIGITS, MODELS

RELEASE, RELEASE_FOLDER = "mnist_parity", "runs/glancenet/released"
GIF_FPS = 10


class Decodable(NamedTuple):
    """What a traversal needs: prototypes (C, D), names of the classes, and latents (n, D) -> images (n, c, H, W)."""

    prototypes: Tensor
    classes: list[str]
    decode: Callable[[Tensor], Tensor]


def load(path: Path, device: torch.device) -> Decodable:
    """The decoder and the prototypes of a weights file. Raises UserError for a model that has none."""
    tensors, config = load_weights(path)
    if config.get("model") in MODELS:
        model = MODELS[config["model"]]()
        load_into(model, tensors, path)
        model.to(device).eval()
        _need_prototypes(path, config["model"], hasattr(model, "class_means"))
        names = [str(digit) for digit in KNOWN_DIGITS]
        return Decodable(model.class_means(), names, lambda z: torch.sigmoid(model.decoder(z)).view(len(z), 1, 28, 28))
    if "alg" not in config:
        raise UserError(f"{path} holds no model of glancenet (neither of mnist_parity.py nor of main.py)")
    return _of_main(path, tensors, config, device)


def _of_main(path: Path, tensors: dict[str, Tensor], config: dict, device: torch.device) -> Decodable:
    from glancenet.algorithms import Shape, make_model
    from glancenet.options import Config as TrainingConfig

    decodes = "classifier.weight" in tensors and any(key.startswith("decoder.") for key in tensors)
    _need_prototypes(path, config["alg"], decodes and "prior.weight" in tensors)
    classes = len(tensors["classifier.weight"])
    channels = 3 if config["dset_name"] in ("celebA", "mpi3d_toy") else 1
    shape = Shape(channels, min(config["z_dim"], config["z_class"] or config["z_dim"]), classes, (), 1)
    known = {name: value for name, value in config.items() if name in TrainingConfig.model_fields}
    model = make_model(TrainingConfig.build(known), shape)
    load_into(model, {key: value for key, value in tensors.items() if not key.startswith("osr.")}, path)
    model.to(device).eval()
    names = [str(k) for k in range(classes)]
    return Decodable(model.prior_means(), names, lambda z: torch.sigmoid(model.decode(z, None)))


def _need_prototypes(path: Path, model: str, present: bool) -> None:
    if not present:
        raise UserError(f"{path}: {model} has no decoder or no class prototypes to start from; take a GlanceNet")


@torch.no_grad()
def traverse(model: Decodable, k: int, values: Tensor, latents: list[int]) -> Tensor:
    """Images (1 + rows, values, c, H, W): the prototype of class k repeated, then each of `latents` set to `values`."""
    z = model.prototypes[k].expand(len(values), -1)
    rows = [model.decode(z)]
    for latent in latents:
        changed = z.clone()
        changed[:, latent] = values
        rows.append(model.decode(changed))
    return torch.stack(rows).cpu()


class Config(Options):
    """What is traversed, and where the pictures go."""

    weights: str | None = option(None, "a .safetensors file; none: the released model")
    out: str | None = option(None, "folder of the pictures; none: beside the weights (released: runs)")
    latents: Annotated[list[Annotated[int, Field(ge=0, le=4096)]], Field(min_length=1)] | None = option(
        None, "which latents; none: all"
    )
    min: float = option(-3.0, "first value", ge=-1000, le=1000)
    max: float = option(3.0, "last value", ge=-1000, le=1000)
    steps: int = option(13, "values of each latent", ge=2, le=1000)
    device: Device = option("auto", "device")
    dry_run: bool = option(False, "check the options, print them as JSON, and end", bare=True)


def main(argv: list[str] | None = None) -> Path | None:
    """The command; returns the folder of the pictures."""
    o, _ = from_flags(Config, sys.argv[1:] if argv is None else argv, __doc__)
    if not o.min < o.max:
        raise UserError(f"--min {o.min:g} --max {o.max:g}: the first value must be smaller")
    device = pick_device(o.device)
    if o.dry_run:
        print(json.dumps(o.as_dict(), indent=2))
        return None
    if o.weights is None:
        release = released("glancenet", RELEASE)
        print(release.notice("no --weights"), flush=True)
        path, out = release.path, Path(o.out or RELEASE_FOLDER)
    else:
        path = Path(o.weights)
        out = Path(o.out) if o.out else path.parent / f"{path.stem}_traversals"
    model = load(path, device)
    size = model.prototypes.shape[1]
    latents = list(range(size)) if o.latents is None else o.latents
    if max(latents) >= size:
        raise UserError(f"--latents {' '.join(map(str, latents))}: this model has latents 0 to {size - 1}")
    values = torch.linspace(o.min, o.max, o.steps, device=device)
    for k, name in enumerate(model.classes):
        rows = traverse(model, k, values, latents)
        save_image(out / f"traverse_{name}.png", mosaic(rows.flatten(0, 1), o.steps))
        frames = [mosaic(rows[1:, j], len(latents)) for j in range(o.steps)]
        save_gif(out / f"gif_{name}.gif", frames, fps=GIF_FPS)
    with torch.no_grad():
        save_image(out / "prototypes.png", mosaic(model.decode(model.prototypes).cpu(), len(model.classes)))
    print(f"{len(model.classes)} prototypes along {len(latents)} latents: {out}")
    return out


if __name__ == "__main__":
    sys.exit(run_command(main))
