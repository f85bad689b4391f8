"""Inverse-Flow on MNIST with 2x2 kernels, actnorm and individual splines.

python inv_flow/experiments/if_glow_mnist.py [--key value ...]
"""

import sys

from common.errors import run_command
from inv_flow.train import launch

PRESET = {
    "name": "if_glow_mnist",
    "dataset": "mnist",
    "if_kernel_size": 2,
    "order": "TL",
    "lr": 1e-05,
    "scheduler_name": "Exponential",
    "gamma": 0.9617,
    "epochs": 2000,
    "alpha": 1e-06,
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
