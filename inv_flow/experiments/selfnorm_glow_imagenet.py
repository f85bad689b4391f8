"""Glow with self-normalising 1x1 convolutions on ImageNet32, L = 3, K = 48, lambda 1000.

python inv_flow/experiments/selfnorm_glow_imagenet.py [--key value ...]
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
    "name": "selfnorm_glow_imagenet", "num_blocks": 3, "block_size": 48, "snf": True, "recon_loss_weight": 1000.0,
    "batch_size": 64,
}  # fmt: skip

main = launch.script(__doc__, PRESET)

if __name__ == "__main__":
    sys.exit(run_command(main))
