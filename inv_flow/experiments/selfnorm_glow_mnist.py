"""Glow with self-normalising 1x1 convolutions on MNIST, lambda 100.

python inv_flow/experiments/selfnorm_glow_mnist.py [--key value ...]
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0:1] = [str(Path(__file__).resolve().parents[2])]
    import common.start  # noqa: F401

from common.errors import run_command
from inv_flow.experiments import GLOW
from inv_flow.train import launch

PRESET = GLOW | {"name": "selfnorm_glow_mnist", "snf": True, "recon_loss_weight": 100.0}

main = launch.script(__doc__, PRESET)

if __name__ == "__main__":
    sys.exit(run_command(main))
