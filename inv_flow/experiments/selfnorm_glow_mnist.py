"""Glow with self-normalising 1x1 convolutions on MNIST, lambda 100.

python inv_flow/experiments/selfnorm_glow_mnist.py [--key value ...]
"""

import sys

from common.errors import run_command
from inv_flow.train import launch

PRESET = {
    "name": "selfnorm_glow_mnist",
    "dataset": "mnist",
    "snf": True,
    "recon_loss_weight": 100.0,
    "activation": "Identity",
    "scheduler_name": "none",
    "epochs": 10000,
    "warmup_epochs": 10,
    "inv_conv": False,
}


def main(argv: list[str] | None = None) -> None:
    """Run the command line `argv`."""
    launch.main(argv, __doc__, PRESET)


if __name__ == "__main__":
    sys.exit(run_command(main))
