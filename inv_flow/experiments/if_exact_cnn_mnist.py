"""Inverse convolutions and splines alone, 3x3 kernels, 20 bins, no coupling, on MNIST.

python inv_flow/experiments/if_exact_cnn_mnist.py [--key value ...]
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0:1] = [str(Path(__file__).resolve().parents[2])]
    import common.start  # noqa: F401

from common.errors import run_command
from inv_flow.experiments import INVERSE, NO_COUPLING
from inv_flow.train import launch

PRESET = INVERSE | NO_COUPLING | {"name": "if_exact_cnn_mnist", "epochs": 100, "n_bins": 20, "tail_bound": 30.0}

main = launch.script(__doc__, PRESET)

if __name__ == "__main__":
    sys.exit(run_command(main))
