"""Convolution exponentials and splines on MNIST, no coupling.

python inv_flow/experiments/exponential_cnn_mnist.py [--key value ...]
"""

import sys

from common.errors import run_command
from inv_flow.train import launch

PRESET = {
    "name": "exponential_cnn_mnist",
    "dataset": "mnist",
    "num_blocks": 3,
    "block_size": 3,
    "convexp": True,
    "convexp_maps": True,
    "actnorm": False,
    "first_squeeze": False,
    "split_prior": False,
    "last_activation": False,
    "coupling_width": 0,
    "lr": 0.001,
    "scheduler_name": "none",
    "epochs": 10000,
    "inv_conv": False,
    "activation": "Spline",
    "n_bins": 5,
    "tail_bound": 10.0,
    "individual_weights": True,
}


def main(argv: list[str] | None = None) -> None:
    """Run the command line `argv`."""
    launch.main(argv, __doc__, PRESET)


if __name__ == "__main__":
    sys.exit(run_command(main))
