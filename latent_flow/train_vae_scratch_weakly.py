"""Train the weakly supervised variant: one unknown transformation a sequence (Song et al. 2023, FFRL).

    python -m latent_flow.train_vae_scratch_weakly                             # MNIST, the paper's setting
    python -m latent_flow.train_vae_scratch_weakly --index-labels              # q(k | x) learns from the true k
    python -m latent_flow.train_vae_scratch_weakly --dataset frames --data-dir CLIPS --image-size 128
    python -m latent_flow.train_vae_scratch_weakly --smoke

Written to --out: args.json, config.json, metrics.csv, log.txt, checkpoint.pt, final.pt, eval.json.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0:1] = [str(Path(__file__).resolve().parents[1])]
    import common.start  # noqa: F401

from common.errors import run_command
from latent_flow.options import WeakOptions
from latent_flow.train import run_script


def main(argv: list[str] | None = None) -> None:
    """Command line of the script."""
    run_script(WeakOptions, __doc__, argv)


if __name__ == "__main__":
    sys.exit(run_command(main))
