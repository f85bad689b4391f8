"""Inverse-Flow on CIFAR-10, width 128, one shared spline a layer.

python inv_flow/experiments/if_glow_cifar.py [--key value ...]
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0:1] = [str(Path(__file__).resolve().parents[2])]
    import common.start  # noqa: F401

from common.errors import run_command
from inv_flow.experiments import CIFAR, COLOUR
from inv_flow.train import launch

PRESET = COLOUR | CIFAR | {
    "name": "if_glow_cifar", "coupling_width": 128, "batch_size": 140, "weight_decay": 1e-7,
    "scheduler_name": "MultiStep", "milestones": (2, 4, 10, 80, 240), "gamma": 0.109717,
}  # fmt: skip

main = launch.script(__doc__, PRESET)

if __name__ == "__main__":
    sys.exit(run_command(main))
