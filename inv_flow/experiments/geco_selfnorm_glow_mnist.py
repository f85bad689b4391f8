"""Glow with self-normalising 5x5 convolutions and GECO on MNIST, width 16.

python inv_flow/experiments/geco_selfnorm_glow_mnist.py [--key value ...]
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0:1] = [str(Path(__file__).resolve().parents[2])]
    import common.start  # noqa: F401

from common.errors import run_command
from inv_flow.experiments import GLOW
from inv_flow.train import launch

PRESET = GLOW | {
    "name": "geco_selfnorm_glow_mnist", "snf": True, "snf_kernel_size": 5, "recon_loss_lr": 1e-3,
    "coupling_width": 16, "split_width": 16, "epochs": 1000,
}  # fmt: skip

main = launch.script(__doc__, PRESET)

if __name__ == "__main__":
    sys.exit(run_command(main))
