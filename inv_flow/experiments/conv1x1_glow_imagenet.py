"""Glow with 1x1 convolutions on ImageNet32, L = 3, K = 48.

python inv_flow/experiments/conv1x1_glow_imagenet.py [--key value ...]
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0:1] = [str(Path(__file__).resolve().parents[2])]
    import common.start  # noqa: F401

from common.errors import run_command
from inv_flow.experiments import GLOW, IMAGENET
from inv_flow.train import launch

PRESET = GLOW | IMAGENET | {
    "name": "conv1x1_glow_imagenet", "num_blocks": 3, "block_size": 48, "conv1x1": True, "batch_size": 64,
}  # fmt: skip

main = launch.script(__doc__, PRESET)

if __name__ == "__main__":
    sys.exit(run_command(main))
