"""Frechet distance of two folders of images, or of saved statistics.

    python lbae/fid.py PATH PATH [-i INCEPTION] [--gpu ID] [--lowprofile] [--features NAME]

PATH is a folder of images or an .npz with `mu` and `sigma`. INCEPTION is the weights file of the FID network (.pth), or
the frozen TensorFlow graph (.pb). Prints one number.
"""

import json
import sys
from pathlib import Path
from typing import Annotated

if __name__ == "__main__":
    sys.path[0:1] = [str(Path(__file__).resolve().parents[1])]
    import common.start  # noqa: F401

from pydantic import Field

from common.errors import UserError, run_command
from common.launch import full_precision, pick_device
from common.metrics import Statistics, make_extractor, paths_and_options
from common.options import Options, from_flags, option
from lbae.options import Text


class FidOptions(Options):
    """The options of fid.py."""

    inception: Text = option("", "weights of the FID network (.pth) or its TensorFlow graph (.pb)", flags=["-i"])
    gpu: Annotated[int, Field(ge=0, le=127)] | None = option(None, "index of the GPU (default: CPU)")
    lowprofile: bool = option(False, "keep few images in memory: batches of 8, not 64")
    features: Annotated[str, Field(pattern=r"^(|inception(-tf|-tv)?|lenet|raw|pixel-pca[1-9]\d{0,4})$")] = option(
        "", "other features: lenet, pixel-pca<k>, raw, inception-tv")  # fmt: skip
    dry_run: bool = option(False, "check the options, print them as JSON and leave")


def statistics(path: Path, extractor) -> Statistics:
    """Statistics of a folder's images, or those stored in an .npz."""
    if path.suffix == ".npz":
        return Statistics.load(path)
    return Statistics.from_features(extractor.features(path), extractor.fingerprint)


def main(argv: list[str] | None = None) -> None:
    argv = sys.argv[1:] if argv is None else argv
    paths, rest = paths_and_options(list(argv), ("PATH", "PATH"))
    options, _ = from_flags(FidOptions, rest, __doc__)
    paths = [Path(path) for path in paths]
    for path in paths:
        if not path.exists():
            raise UserError(f"no such file or folder: {path}")
    device = pick_device("cpu" if options.gpu is None else f"cuda:{options.gpu}")
    if options.dry_run:
        print(json.dumps(options.as_dict(), indent=2))
        return
    full_precision()
    name = options.features or ("inception-tf" if options.inception.endswith(".pb") else "inception")
    extractor = None
    if any(path.suffix != ".npz" for path in paths):
        weights = {"weights": options.inception or None, "download": False} if name.startswith("inception") else {}
        batch = 8 if options.lowprofile else 64
        extractor = make_extractor(name, str(device), batch_size=batch, progress=sys.stderr.isatty(), **weights)
        if paths[0].suffix != ".npz":
            extractor.fit(paths[0])
    first, second = (statistics(path, extractor) for path in paths)
    print(f"FID: {first.distance(second)}")


if __name__ == "__main__":
    sys.exit(run_command(main))
