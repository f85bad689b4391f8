"""Latent traversals of trained weights, starting at the class prototypes; no data set is needed.

    python glancenet/traverse.py                                       # the released GlanceNet
    python glancenet/traverse.py --weights runs/mnist_parity/0/osr_vae.safetensors --latents 0 1
    python glancenet/traverse.py --weights checkpoints/NAME/model.safetensors --out DIR

Weights are those of mnist_parity.py, or the model.safetensors of a main.py run with --conditional_prior. Written to
--out: for every class prototype traverse_<class>.png (its decoding repeated, then a row a latent, which runs from --min
to --max while the others stay) and gif_<class>.gif (a frame a value); prototypes.png.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

if __package__ in (None, ""):
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from common.checkpoint import load_into, load_weights
from common.errors import UserError, run_command
from common.images import mosaic, save_gif, save_image
from common.launch import pick_device
from common.released import released
from glancenet.mnist_objective import KNOWN_DIGITS, MODELS
from glancenet.options import Parser

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
    from glancenet.algorithms import Shape, algorithm_class

    decodes = "classifier.weight" in tensors and any(key.startswith("decoder.") for key in tensors)
    _need_prototypes(path, config["alg"], decodes and "prior.weight" in tensors)
    classes = len(tensors["classifier.weight"])
    channels = 3 if config["dset_name"] in ("celebA", "mpi3d_toy") else 1
    shape = Shape(channels, min(config["z_dim"], config["z_class"] or config["z_dim"]), classes, (), 1)
    model = algorithm_class(config["alg"])(argparse.Namespace(**config), shape)
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


def make_parser() -> Parser:
    """The command line."""
    p = Parser(description=__doc__.split("\n\n")[0], allow_abbrev=False,
               formatter_class=argparse.ArgumentDefaultsHelpFormatter)  # fmt: skip
    p.add_argument("--weights", default=None, help="a .safetensors file; default: the released model")
    p.add_argument("--out", default=None, help="folder of the pictures; default: beside the weights (released: runs)")
    p.add_argument("--latents", nargs="+", type=int, default=None, help="which latents; default all")
    p.add_argument("--min", type=float, default=-3.0, help="first value")
    p.add_argument("--max", type=float, default=3.0, help="last value")
    p.add_argument("--steps", type=int, default=13, help="values of each latent")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:<i> or mps")
    return p


def main(argv: list[str] | None = None) -> Path:
    """The command; returns the folder of the pictures."""
    o = make_parser().parse(argv)
    if o.steps < 2 or not o.min < o.max:
        raise UserError(
            f"--steps {o.steps} --min {o.min:g} --max {o.max:g}: at least two values, the first one smaller"
        )
    if o.weights is None:
        release = released("glancenet", RELEASE)
        print(release.notice("no --weights"), flush=True)
        path, out = release.path, Path(o.out or RELEASE_FOLDER)
    else:
        path = Path(o.weights)
        out = Path(o.out) if o.out else path.parent / f"{path.stem}_traversals"
    device = pick_device(o.device)
    model = load(path, device)
    size = model.prototypes.shape[1]
    latents = list(range(size)) if o.latents is None else o.latents
    if any(not 0 <= latent < size for latent in latents):
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
