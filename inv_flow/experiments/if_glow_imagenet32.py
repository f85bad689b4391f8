"""Inverse-Flow on ImageNet32, L = 2, K = 32, width 256.

python inv_flow/experiments/if_glow_imagenet32.py [--key value ...]
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0:1] = [str(Path(__file__).resolve().parents[2])]
    import common.start  # noqa: F401

from common.errors import run_command
from inv_flow.experiments import COLOUR, IMAGENET
from inv_flow.train import launch

PRESET = COLOUR | IMAGENET | {"name": "if_glow_imagenet32", "block_size": 32, "coupling_width": 256, "gamma": 0.99997}

main = launch.script(__doc__, PRESET)

if __name__ == "__main__":
    sys.exit(run_command(main))
