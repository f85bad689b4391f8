"""Train the supervised variant: the transformation of every sequence is given (Song et al. 2023, FFRL).

    python -m latent_flow.train_vae_scratch                                    # MNIST, the paper's setting
    python -m latent_flow.train_vae_scratch --shapes3d                         # needs 3dshapes.h5
    python -m latent_flow.train_vae_scratch --objective upstream               # the published loss, term by term
    python -m latent_flow.train_vae_scratch --smoke                            # seconds, bundled digits

Written to --out: args.json, config.json, metrics.csv, log.txt, checkpoint.pt, final.pt, eval.json.
"""

import sys

from common.errors import run_command
from latent_flow.train import run_script

DATASETS = ("mnist", "shapes3d", "dsprites", "sprites", "fashion_mnist", "digits")


def main(argv: list[str] | None = None) -> None:
    """Command line of the script."""
    run_script("supervised", __doc__, DATASETS, argv)


if __name__ == "__main__":
    sys.exit(run_command(main))
