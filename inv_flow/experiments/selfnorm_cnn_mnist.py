"""3x3 self-normalising convolutions and splines on MNIST, no coupling.

python inv_flow/experiments/selfnorm_cnn_mnist.py [--key value ...]
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
    "name": "selfnorm_cnn_mnist", "num_blocks": 3, "block_size": 3, "snf": True, "snf_kernel_size": 3,
    "inv_conv": False, "tail_bound": 10.0,
}  # fmt: skip

main = launch.script(__doc__, PRESET)

if __name__ == "__main__":
    sys.exit(run_command(main))
