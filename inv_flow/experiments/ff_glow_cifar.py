"""FInC Flow on CIFAR-10, L = 2, K = 4.

python inv_flow/experiments/ff_glow_cifar.py [--key value ...]
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0:1] = [str(Path(__file__).resolve().parents[2])]
    import common.start  # noqa: F401

from common.errors import run_command
from inv_flow.experiments import CIFAR, FINC
from inv_flow.train import launch

PRESET = FINC | CIFAR | {"name": "ff_glow_cifar", "block_size": 4, "ff_units": 2, "actnorm": False}

main = launch.script(__doc__, PRESET)

if __name__ == "__main__":
    sys.exit(run_command(main))
