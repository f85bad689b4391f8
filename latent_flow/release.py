"""Ship the weights of a run as one small file: no optimiser, no random numbers, no paths.

    python -m latent_flow.release RUN checkpoints/latent_flow/NAME.safetensors

The JSON file beside it holds the model's configuration, the training options and the iteration. RUN may be a published
checkpoint.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0:1] = [str(Path(__file__).resolve().parents[1])]
    import common.start  # noqa: F401

from common.checkpoint import save_weights
from common.errors import run_command
from common.options import Options, option
from latent_flow.options import parse_tool
from latent_flow.runs import read_run

PLACES = ("out", "data_dir", "device", "cuda")  # options that say where a run was, not what it is


class ReleaseOptions(Options):
    """What is exported."""

    run: str = option(..., "folder of a run", min_length=1)
    target: str = option(..., "the .safetensors file to write", pattern=r".\.safetensors$")


def main(argv: list[str] | None = None) -> None:
    """Command line of the export."""
    words = sys.argv[1:] if argv is None else argv
    if len(words) == 2 and not any(word.startswith("-") for word in words):
        words = ["--run", words[0], "--target", words[1]]
    args = parse_tool(ReleaseOptions, words, __doc__)
    tensors, config, options, iteration = read_run(args.run)
    options = {name: None if name in PLACES else value for name, value in options.items()}
    save_weights(args.target, tensors, {"model": config, "args": options, "iteration": iteration})


if __name__ == "__main__":
    sys.exit(run_command(main))
