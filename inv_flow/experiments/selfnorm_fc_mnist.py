"""32 self-normalising fully connected layers with smooth leaky ReLUs on MNIST.

python inv_flow/experiments/selfnorm_fc_mnist.py [--key value ...]
"""

import sys

from common.errors import run_command
from inv_flow.train import launch

PRESET = {
    "name": "selfnorm_fc_mnist",
    "dataset": "mnist",
    "num_blocks": 1,
    "block_size": 32,
    "fc": True,
    "activation": "SLR",
    "last_activation": False,
    "inv_conv": False,
    "lr": 0.0001,
    "scheduler_name": "none",
    "epochs": 10000,
}


def main(argv: list[str] | None = None) -> None:
    """Run the command line `argv`."""
    launch.main(argv, __doc__, PRESET)


if __name__ == "__main__":
    sys.exit(run_command(main))
