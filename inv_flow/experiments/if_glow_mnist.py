"""Inverse-Flow on MNIST with 2x2 kernels, actnorm and individual splines.

python inv_flow/experiments/if_glow_mnist.py [--key value ...]
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0:1] = [str(Path(__file__).resolve().parents[2])]
    import common.start  # noqa: F401

from common.errors import run_command
from inv_flow.experiments import INVERSE
from inv_flow.train import launch

PRESET = INVERSE | {"name": "if_glow_mnist", "if_kernel_size": 2, "gamma": 0.9617, "epochs": 2000}

main = launch.script(__doc__, PRESET)

if __name__ == "__main__":
    sys.exit(run_command(main))
