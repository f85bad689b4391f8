"""Inverse-Flow on ImageNet32, L = 3, K = 48, width 256, one shared spline a layer (published at the top level).

The published schedule, x 0.1097 an epoch, ends training after three epochs; this one divides by 10 every 25.

python inv_flow/experiments/if_multigpu_imagenet32.py [--key value ...]
"""

import sys

from common.errors import run_command
from inv_flow.train import launch

PRESET = {
    "name": "if_multigpu_imagenet32",
    "dataset": "imagenet32",
    "num_blocks": 3,
    "block_size": 48,
    "order": "TL",
    "last_activation": False,
    "actnorm": False,
    "coupling_width": 256,
    "lr": 0.001,
    "weight_decay": 1e-07,
    "step_epochs": 25,
    "epochs": 10000,
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
