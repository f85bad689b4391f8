"""The same with 3x3 kernels and 20 bins.

python inv_flow/experiments/if_exact_cnn_mnist.py [--key value ...]
"""

import sys

from common.errors import run_command
from inv_flow.train import launch

PRESET = {
    "name": "if_exact_cnn_mnist",
    "dataset": "mnist",
    "order": "TL",
    "actnorm": False,
    "first_squeeze": False,
    "split_prior": False,
    "last_activation": False,
    "coupling_width": 0,
    "lr": 1e-05,
    "scheduler_name": "Exponential",
    "gamma": 0.9997,
    "epochs": 100,
    "activation": "Spline",
    "n_bins": 20,
    "tail_bound": 30.0,
    "individual_weights": True,
}


def main(argv: list[str] | None = None) -> None:
    """Run the command line `argv`."""
    launch.main(argv, __doc__, PRESET)


if __name__ == "__main__":
    sys.exit(run_command(main))
