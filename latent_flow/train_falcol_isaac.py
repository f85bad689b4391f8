"""Train the supervised variant on Falcor3D or Isaac3D at 128 pixels with the deeper VAE (Song et al. 2023, FFRL).

    python -m latent_flow.train_falcol_isaac                                   # DATA/Falcor3D_down128/images
    python -m latent_flow.train_falcol_isaac --isaac                           # DATA/Isaac3D_down128/images
    python -m latent_flow.train_falcol_isaac --smoke                           # rendered sprites, 32 pixels

Written to --out: args.json, config.json, metrics.csv, log.txt, checkpoint.pt, final.pt, eval.json.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0:1] = [str(Path(__file__).resolve().parents[1])]
    import common.start  # noqa: F401

from common.errors import run_command
from latent_flow.options import DeepOptions
from latent_flow.train import run_script


def main(argv: list[str] | None = None) -> None:
    """Command line of the script."""
    run_script(DeepOptions, __doc__, argv)


if __name__ == "__main__":
    sys.exit(run_command(main))
