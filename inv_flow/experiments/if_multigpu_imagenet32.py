"""Inverse-Flow on ImageNet32, L = 3, K = 48, width 256, one shared spline a layer (published at the top level).

The published schedule, x 0.1097 an epoch, ends training after three epochs; this one divides by 10 every 25.

    python inv_flow/experiments/if_multigpu_imagenet32.py [--key value ...]
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0:1] = [str(Path(__file__).resolve().parents[2])]
    import common.start  # noqa: F401

from common.errors import run_command
from inv_flow.experiments import COLOUR, IMAGENET
from inv_flow.train import launch

PRESET = COLOUR | IMAGENET | {
    "name": "if_multigpu_imagenet32", "num_blocks": 3, "block_size": 48, "coupling_width": 256, "lr": 1e-3,
    "weight_decay": 1e-7, "scheduler_name": "Step", "step_epochs": 25, "gamma": 0.1,
}  # fmt: skip

main = launch.script(__doc__, PRESET)

if __name__ == "__main__":
    sys.exit(run_command(main))
