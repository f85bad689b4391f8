"""Images of wanted classes from a trained flow.

    python nfpi/sample.py                                                   # the released MNIST flow
    python nfpi/sample.py --weights outputs/mnist/.../checkpoints/flow.safetensors --classes 3 8 --temperature 0.8
    python nfpi/sample.py --per-class 100 --out DIR

Written to --out: classes.png (a row a class), samples_<class>.png. A model without classes gives samples.png alone.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0:1] = [str(Path(__file__).resolve().parents[1])]
    import common.start  # noqa: F401

from typing import Annotated

import torch
from pydantic import Field

from common.errors import UserError, run_command
from common.images import mosaic, save_image
from common.launch import full_precision, pick_device
from common.options import Device, Options, Seed, from_flags, option
from common.released import released
from nfpi.conditional import ConditionalFlow

RELEASE, RELEASE_FOLDER = "mnist_small", "runs/nfpi/released"
ROW = 10  # images of a class in classes.png


class Config(Options):
    """The options."""

    weights: str = option("", "a flow.safetensors or state_*.pt (default: the released model)")
    classes: list[Annotated[int, Field(ge=0, lt=100_000)]] | None = option(None, "which classes (default: all)")
    per_class: Annotated[int, Field(ge=1, le=1_000_000)] = option(64, "images of each class")
    temperature: Annotated[float, Field(ge=0, le=100)] = option(0.8, "factor of the standard deviation")
    seed: Seed = option(0, "seed of the draws")
    out: str = option("", "folder (default: samples/ beside the weights; released: runs/nfpi/released)")
    device: Device = option("auto", "device")
    dry_run: bool = option(False, "check the options and leave")


def main(argv: list[str] | None = None) -> None:
    """The command."""
    config, _ = from_flags(Config, sys.argv[1:] if argv is None else argv, __doc__)
    device = pick_device(config.device)
    full_precision()
    if config.weights:
        path, out = Path(config.weights), Path(config.out or Path(config.weights).parent / "samples")
    else:
        release = released("nfpi", RELEASE)
        print(release.notice("no --weights"), flush=True)
        path, out = release.path, Path(config.out or RELEASE_FOLDER)
    model = ConditionalFlow.load(path, device)
    classes = list(range(model.classes)) if config.classes is None else config.classes
    if any(k >= model.classes for k in classes) or not classes:
        raise UserError(f"--classes {' '.join(map(str, classes))}: this model has classes 0 to {model.classes - 1}")
    if config.dry_run:
        print(config.model_dump_json(indent=2))
        return
    generator = torch.Generator(device=model.device).manual_seed(config.seed)
    if not model.knows_classes:
        images = draw(model, 0, config, generator)
        save_image(out / "samples.png", mosaic(images, columns=8))
        print(f"{len(images)} samples: {out}")
        return
    rows = []
    for k in classes:
        images = draw(model, k, config, generator)
        save_image(out / f"samples_{k}.png", mosaic(images, columns=8))
        rows.append(images[:ROW])
    save_image(out / "classes.png", mosaic(torch.cat(rows), columns=len(rows[0])))
    print(f"{config.per_class} samples of each of {len(classes)} classes: {out}")


def draw(model: ConditionalFlow, k: int, config: Config, generator: torch.Generator) -> torch.Tensor:
    """Images (n, C, H, W) in [0, 1] of class k, on the CPU."""
    y = torch.full((config.per_class,), k, device=model.device)
    images = [model.sample(part, config.temperature, generator)[0].float().cpu() for part in y.split(64)]
    return torch.cat(images)


if __name__ == "__main__":
    sys.exit(run_command(main))
