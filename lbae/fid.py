"""Frechet distance of two folders of images, or of saved statistics.

    python lbae/fid.py PATH PATH [-i INCEPTION] [--gpu ID] [--lowprofile] [--features NAME]

PATH is a folder of images or an .npz with `mu` and `sigma`. INCEPTION is the weights file of the FID network (.pth), or
the frozen TensorFlow graph (.pb). Prints one number.
"""

import argparse
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common.datasets.readers import reading
from common.errors import UserError, run_command
from common.metrics import Statistics, load_images, make_extractor
from common.metrics.inputs import SUFFIXES

CHUNK = 256  # images in memory with --lowprofile


def statistics(path: Path, extractor, lowprofile: bool) -> Statistics:
    """Statistics of a folder's images, or those stored in an .npz."""
    if path.suffix == ".npz":
        return Statistics.load(path)
    if not lowprofile:
        return Statistics.from_features(extractor.features(load_images(path)), extractor.fingerprint)
    features = np.concatenate([extractor.features(part) for part in chunks(path)])
    return Statistics.from_features(features, extractor.fingerprint)


def chunks(folder: Path) -> Iterator[torch.Tensor]:
    """The images of a folder, uint8 (n, C, H, W), at most `CHUNK` at a time. Raises UserError for an empty folder."""
    names = sorted((path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES), key=_natural)
    if not names:
        raise UserError(f"{folder}: no image in it")
    for start in range(0, len(names), CHUNK):
        pictures = []
        for path in names[start : start + CHUNK]:
            with reading(path, "an image"), Image.open(path) as picture:
                array = np.asarray(picture if picture.mode == "L" else picture.convert("RGB"))
            pictures.append(np.atleast_3d(array).transpose(2, 0, 1))
        yield torch.from_numpy(np.stack(pictures))


def _natural(path: Path) -> list:
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", path.name)]


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="fid.py", description=__doc__.split("\n")[0])
    parser.add_argument("path", nargs=2, type=Path, help="folder of images, or .npz with mu and sigma")
    parser.add_argument("-i", "--inception", help="weights of the FID network (.pth) or its TensorFlow graph (.pb)")
    parser.add_argument("--gpu", type=int, help="index of the GPU (default: CPU)")
    parser.add_argument("--lowprofile", action="store_true", help="keep few images in memory")
    parser.add_argument("--features", help="other features: lenet, pixel-pca<k>, raw, inception-tv")
    args = parser.parse_args(argv)
    for path in args.path:
        if not path.exists():
            raise UserError(f"no such file or folder: {path}")
    name = args.features or ("inception-tf" if (args.inception or "").endswith(".pb") else "inception")
    extractor = None
    if any(path.suffix != ".npz" for path in args.path):
        device = "cpu" if args.gpu is None else f"cuda:{args.gpu}"
        weights = {"weights": args.inception, "download": False} if name.startswith("inception") else {}
        extractor = make_extractor(name, device=device, progress=sys.stderr.isatty(), **weights)
        if args.path[0].suffix != ".npz":
            extractor.fit(load_images(args.path[0]) if not args.lowprofile else next(chunks(args.path[0])))
    first, second = (statistics(path, extractor, args.lowprofile) for path in args.path)
    print(f"FID: {first.distance(second)}")


if __name__ == "__main__":
    sys.exit(run_command(main))
