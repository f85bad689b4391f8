"""Ship the weights of a run as one small file: no optimiser, no random numbers, no paths.

    python -m latent_flow.release RUN checkpoints/latent_flow/NAME.safetensors

The JSON file beside it holds the model's configuration, the training options and the iteration.
"""

import sys
from pathlib import Path

from common.checkpoint import save_weights
from common.errors import run_command
from latent_flow.evaluate import read_run
from latent_flow.options import Parser

PLACES = ("out", "data_dir", "device", "cuda")  # options that say where a run was, not what it is


def main(argv: list[str] | None = None) -> None:
    """Command line of the export."""
    parser = Parser(description=__doc__)
    parser.add_argument("run", type=Path, help="folder of a run")
    parser.add_argument("target", type=Path, help="the .safetensors file to write")
    args = parser.parse(argv)
    tensors, config, options, iteration = read_run(args.run)
    options = {name: None if name in PLACES else value for name, value in options.items()}
    save_weights(args.target, tensors, {"model": config, "args": options, "iteration": iteration})


if __name__ == "__main__":
    sys.exit(run_command(main))
