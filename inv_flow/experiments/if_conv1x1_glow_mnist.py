"""Inverse-Flow on MNIST with 3x3 kernels and without actnorm (the published file has no 1x1 despite its name).

python inv_flow/experiments/if_conv1x1_glow_mnist.py [--key value ...]
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0:1] = [str(Path(__file__).resolve().parents[2])]
    import common.start  # noqa: F401

from common.errors import run_command
from inv_flow.experiments import INVERSE
from inv_flow.train import launch

PRESET = INVERSE | {"name": "if_conv1x1_glow_mnist", "epochs": 200, "actnorm": False, "last_activation": False}

main = launch.script(__doc__, PRESET)

if __name__ == "__main__":
    sys.exit(run_command(main))
