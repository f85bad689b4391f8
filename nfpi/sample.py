"""Images of wanted classes from a trained flow.

    python nfpi/sample.py                                                   # the released MNIST flow
    python nfpi/sample.py --weights outputs/mnist/.../checkpoints/flow.safetensors --classes 3 8 --temperature 0.8
    python nfpi/sample.py --per-class 100 --out DIR

Written to --out: classes.png (a row a class), samples_<class>.png. A model without classes gives samples.png alone.
"""

import argparse
import sys
from pathlib import Path

if __package__ in (None, ""):  # started as a file: the repository's root is not on the path yet
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import torch

from common.errors import UserError, run_command
from common.images import mosaic, save_image
from common.launch import pick_device
from common.released import released
from nfpi.conditional import ConditionalFlow

RELEASE, RELEASE_FOLDER = "mnist_small", "runs/nfpi/released"
ROW = 10  # images of a class in classes.png


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python nfpi/sample.py", description=__doc__.split("\n")[0])
    parser.add_argument("--weights", help="a flow.safetensors or state_*.pt (default: the released model)")
    parser.add_argument("--classes", nargs="+", type=int, help="which classes (default: all)")
    parser.add_argument("--per-class", type=int, default=64, help="images of each class [64]")
    parser.add_argument("--temperature", type=float, default=0.8, help="factor of the standard deviation [0.8]")
    parser.add_argument("--seed", type=int, default=0, help="seed of the draws [0]")
    parser.add_argument("--out", help="folder (default: samples/ beside the weights; released: runs/nfpi/released)")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda[:i] or mps")
    args = parser.parse_args(argv)
    if args.per_class < 1 or args.temperature < 0:
        raise UserError(
            f"--per-class {args.per_class} --temperature {args.temperature:g}: at least one image, no negative factor"
        )
    if args.weights:
        path, out = Path(args.weights), Path(args.out or Path(args.weights).parent / "samples")
    else:
        release = released("nfpi", RELEASE)
        print(release.notice("no --weights"), flush=True)
        path, out = release.path, Path(args.out or RELEASE_FOLDER)
    model = ConditionalFlow.load(path, pick_device(args.device))
    generator = torch.Generator(device=model.device).manual_seed(args.seed)
    if not model.knows_classes:
        images = draw(model, 0, args, generator)
        save_image(out / "samples.png", mosaic(images, columns=8))
        print(f"{len(images)} samples: {out}")
        return
    classes = list(range(model.classes)) if args.classes is None else args.classes
    if any(not 0 <= k < model.classes for k in classes):
        raise UserError(f"--classes {' '.join(map(str, classes))}: this model has classes 0 to {model.classes - 1}")
    rows = []
    for k in classes:
        images = draw(model, k, args, generator)
        save_image(out / f"samples_{k}.png", mosaic(images, columns=8))
        rows.append(images[:ROW])
    save_image(out / "classes.png", mosaic(torch.cat(rows), columns=len(rows[0])))
    print(f"{args.per_class} samples of each of {len(classes)} classes: {out}")


def draw(model: ConditionalFlow, k: int, args: argparse.Namespace, generator: torch.Generator) -> torch.Tensor:
    """Images (n, C, H, W) in [0, 1] of class k, on the CPU."""
    y = torch.full((args.per_class,), k, device=model.device)
    images = [model.sample(part, args.temperature, generator)[0].float().cpu() for part in y.split(64)]
    return torch.cat(images)


if __name__ == "__main__":
    sys.exit(run_command(main))
