"""Inverse-Flow on MNIST with 3x3 kernels and without actnorm (the published file has no 1x1 despite its name).

python inv_flow/experiments/if_conv1x1_glow_mnist.py [--key value ...]
"""

import sys

from common.errors import run_command
from inv_flow.train import launch

PRESET = {
    "name": "if_conv1x1_glow_mnist",
    "dataset": "mnist",
    "order": "TL",
    "last_activation": False,
    "actnorm": False,
    "lr": 1e-05,
    "scheduler_name": "Exponential",
    "gamma": 0.9997,
    "epochs": 200,
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
