"""Inverse-Flow on CIFAR-10, width 128, one shared spline a layer.

python inv_flow/experiments/if_glow_cifar.py [--key value ...]
"""

import sys

from common.errors import run_command
from inv_flow.train import launch

PRESET = {
    "name": "if_glow_cifar",
    "dataset": "cifar10",
    "data_aug": True,
    "order": "TL",
    "last_activation": False,
    "actnorm": False,
    "coupling_width": 128,
    "batch_size": 140,
    "lr": 0.0001,
    "scheduler_name": "MultiStep",
    "milestones": (2, 4, 10, 80, 240),
    "gamma": 0.109717,
    "epochs": 10000,
    "weight_decay": 1e-07,
    "activation": "Spline",
    "n_bins": 10,
    "tail_bound": 20.0,
    "individual_weights": False,
}


def main(argv: list[str] | None = None) -> None:
    """Run the command line `argv`."""
    launch.main(argv, __doc__, PRESET)


if __name__ == "__main__":
    sys.exit(run_command(main))
