"""Train the unsupervised variant: several transformations, switching at every step (Song et al. 2024, STA).

    python -m latent_flow.train_vae_scratch_unsuper                            # MNIST, spikes for each field type
    python -m latent_flow.train_vae_scratch_unsuper --single-control           # one spike for both field types
    python -m latent_flow.train_vae_scratch_unsuper --dataset sprites --latent-size 64 --field divfree
    python -m latent_flow.train_vae_scratch_unsuper --smoke

Speeds (slabs) join at iteration --slab-start. Written to --out: args.json, config.json, metrics.csv, log.txt,
checkpoint.pt, final.pt, eval.json.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0:1] = [str(Path(__file__).resolve().parents[1])]
    import common.start  # noqa: F401

from common.errors import run_command
from latent_flow.options import SparseOptions
from latent_flow.train import run_script


def main(argv: list[str] | None = None) -> None:
    """Command line of the script."""
    run_script(SparseOptions, __doc__, argv)


if __name__ == "__main__":
    sys.exit(run_command(main))
