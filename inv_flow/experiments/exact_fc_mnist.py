"""Two 3x3 inverse convolutions around one spline on MNIST (the published file has them in place of linear layers).

python inv_flow/experiments/exact_fc_mnist.py [--key value ...]
"""

import sys

from common.errors import run_command
from inv_flow.train import launch

PRESET = {
    "name": "exact_fc_mnist",
    "dataset": "mnist",
    "num_blocks": 1,
    "block_size": 2,
    "first_squeeze": False,
    "split_prior": False,
    "last_activation": False,
    "coupling_width": 0,
    "actnorm": False,
    "order": "TL",
    "activation": "Spline",
    "n_bins": 5,
    "tail_bound": 10.0,
    "individual_weights": True,
    "lr": 0.0001,
    "scheduler_name": "none",
    "epochs": 10000,
}


def main(argv: list[str] | None = None) -> None:
    """Run the command line `argv`."""
    launch.main(argv, __doc__, PRESET)


if __name__ == "__main__":
    sys.exit(run_command(main))
