"""Glow with self-normalising 5x5 convolutions and GECO on MNIST, width 16.

python inv_flow/experiments/geco_selfnorm_glow_mnist.py [--key value ...]
"""

import sys

from common.errors import run_command
from inv_flow.train import launch

PRESET = {
    "name": "geco_selfnorm_glow_mnist",
    "dataset": "mnist",
    "snf": True,
    "snf_kernel_size": 5,
    "recon_loss_lr": 0.001,
    "coupling_width": 16,
    "split_width": 16,
    "activation": "Identity",
    "scheduler_name": "none",
    "epochs": 1000,
    "warmup_epochs": 10,
    "inv_conv": False,
}


def main(argv: list[str] | None = None) -> None:
    """Run the command line `argv`."""
    launch.main(argv, __doc__, PRESET)


if __name__ == "__main__":
    sys.exit(run_command(main))
