"""FInC Flow on CIFAR-10, L = 2, K = 4.

python inv_flow/experiments/ff_glow_cifar.py [--key value ...]
"""

import sys

from common.errors import run_command
from inv_flow.train import launch

PRESET = {
    "name": "ff_glow_cifar",
    "dataset": "cifar10",
    "data_aug": True,
    "block_size": 4,
    "ff": True,
    "ff_units": 2,
    "last_activation": False,
    "actnorm": False,
    "lr": 1e-05,
    "scheduler_name": "Exponential",
    "gamma": 0.9997,
    "epochs": 10000,
    "inv_conv": False,
    "activation": "Spline",
    "n_bins": 5,
    "tail_bound": 20.0,
    "individual_weights": True,
}


def main(argv: list[str] | None = None) -> None:
    """Run the command line `argv`."""
    launch.main(argv, __doc__, PRESET)


if __name__ == "__main__":
    sys.exit(run_command(main))
