"""Glow with self-normalising 1x1 convolutions on CIFAR-10, L = 2, K = 4, symmetric reconstruction, lambda 1000.

python inv_flow/experiments/selfnorm_glow_cifar.py [--key value ...]
"""

import sys

from common.errors import run_command
from inv_flow.train import launch

PRESET = {
    "name": "selfnorm_glow_cifar",
    "dataset": "cifar10",
    "data_aug": True,
    "block_size": 4,
    "snf": True,
    "recon_loss_weight": 1000.0,
    "sym_recon_grad": True,
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
