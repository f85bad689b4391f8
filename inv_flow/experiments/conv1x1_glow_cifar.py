"""Glow with 1x1 convolutions on CIFAR-10, L = 2, K = 32.

python inv_flow/experiments/conv1x1_glow_cifar.py [--key value ...]
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0:1] = [str(Path(__file__).resolve().parents[2])]
    import common.start  # noqa: F401

from common.errors import run_command
from inv_flow.experiments import CIFAR, GLOW
from inv_flow.train import launch

PRESET = GLOW | CIFAR | {"name": "conv1x1_glow_cifar", "block_size": 32, "conv1x1": True}

main = launch.script(__doc__, PRESET)

if __name__ == "__main__":
    sys.exit(run_command(main))
