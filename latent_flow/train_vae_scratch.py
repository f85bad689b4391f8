"""Train the supervised variant: the transformation of every sequence is given (Song et al. 2023, FFRL).

    python -m latent_flow.train_vae_scratch                                    # MNIST, the paper's setting
    python -m latent_flow.train_vae_scratch --shapes3d                         # needs 3dshapes.h5
    python -m latent_flow.train_vae_scratch --objective upstream               # the published loss, term by term
    python -m latent_flow.train_vae_scratch --smoke                            # seconds, bundled digits

Written to --out: args.json, config.json, metrics.csv, log.txt, checkpoint.pt, final.pt, eval.json.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0:1] = [str(Path(__file__).resolve().parents[1])]
    import common.start  # noqa: F401

from common.errors import run_command
from latent_flow.options import SupervisedOptions
from latent_flow.train import run_script


def main(argv: list[str] | None = None) -> None:
    """Command line of the script."""
    run_script(SupervisedOptions, __doc__, argv)


if __name__ == "__main__":
    sys.exit(run_command(main))
