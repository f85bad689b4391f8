"""Emerging convolutions and splines on MNIST, no coupling, L = 2, K = 4.

python inv_flow/experiments/emerging_cnn_mnist.py [--key value ...]
"""

import sys

from common.errors import run_command
from inv_flow.train import launch

PRESET = {
    "name": "emerging_cnn_mnist",
    "dataset": "mnist",
    "block_size": 4,
    "emerging": True,
    "if_kernel_size": 2,
    "actnorm": False,
    "first_squeeze": False,
    "split_prior": False,
    "last_activation": False,
    "coupling_width": 0,
    "lr": 1e-05,
    "scheduler_name": "none",
    "epochs": 10000,
    "inv_conv": False,
    "activation": "Spline",
    "n_bins": 10,
    "tail_bound": 70.0,
    "individual_weights": True,
}


def main(argv: list[str] | None = None) -> None:
    """Run the command line `argv`."""
    launch.main(argv, __doc__, PRESET)


if __name__ == "__main__":
    sys.exit(run_command(main))
