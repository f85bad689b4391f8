"""Emerging convolutions and splines on MNIST, no coupling, L = 2, K = 4.

python inv_flow/experiments/emerging_cnn_mnist.py [--key value ...]
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0:1] = [str(Path(__file__).resolve().parents[2])]
    import common.start  # noqa: F401

from common.errors import run_command
from inv_flow.experiments import CNN
from inv_flow.train import launch

PRESET = CNN | {
    "name": "emerging_cnn_mnist", "block_size": 4, "emerging": True, "inv_conv": False, "if_kernel_size": 2,
    "lr": 1e-5, "n_bins": 10, "tail_bound": 70.0,
}  # fmt: skip

main = launch.script(__doc__, PRESET)

if __name__ == "__main__":
    sys.exit(run_command(main))
