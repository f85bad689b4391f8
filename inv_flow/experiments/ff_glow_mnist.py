"""FInC Flow on MNIST.

python inv_flow/experiments/ff_glow_mnist.py [--key value ...]
"""

import sys

from common.errors import run_command
from inv_flow.train import launch

PRESET = {
    "name": "ff_glow_mnist",
    "dataset": "mnist",
    "ff": True,
    "last_activation": False,
    "lr": 1e-05,
    "scheduler_name": "Exponential",
    "gamma": 0.9997,
    "epochs": 10000,
    "inv_conv": False,
    "activation": "Spline",
    "n_bins": 7,
    "tail_bound": 20.0,
    "individual_weights": True,
}


def main(argv: list[str] | None = None) -> None:
    """Run the command line `argv`."""
    launch.main(argv, __doc__, PRESET)


if __name__ == "__main__":
    sys.exit(run_command(main))
