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
from common.metrics import paths_and_options, score
from common.options import Options, from_flags, option
from lbae.eval import warnings_as_lines
from lbae.options import Text


class FidOptions(Options):
    """The options of fid.py."""

    inception: Text = option("", "weights of the FID network (.pth) or its TensorFlow graph (.pb)", flags=["-i"])
    gpu: Annotated[int, Field(ge=0, le=127)] | None = option(None, "index of the GPU (default: CPU)")
    lowprofile: bool = option(False, "keep few images in memory: batches of 8, not 64")
    features: Annotated[str, Field(pattern=r"^(|inception(-tf|-tv)?|lenet|raw|pixel-pca[1-9]\d{0,4})$")] = option(
        "", "other features: lenet, pixel-pca<k>, raw, inception-tv")  # fmt: skip
    dry_run: bool = option(False, "check the options, print them as JSON and leave")


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
    weights = {"weights": options.inception or None, "download": False} if name.startswith("inception") else {}
    how = {"features": name, "device": str(device), "batch_size": 8 if options.lowprofile else 64, **weights}
    with warnings_as_lines():
        print(f"FID: {score(paths[1], paths[0], ('fid',), **how, progress=sys.stderr.isatty())['fid']}")


if __name__ == "__main__":
    sys.exit(run_command(main))
