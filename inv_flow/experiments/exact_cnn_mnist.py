"""3x3 inverse convolutions and splines on MNIST, no coupling, batch 1000.

python inv_flow/experiments/exact_cnn_mnist.py [--key value ...]
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
    "name": "exact_cnn_mnist", "num_blocks": 3, "block_size": 3, "order": "TL", "batch_size": 1000, "lr": 1e-4,
    "tail_bound": 100.0,
}  # fmt: skip

main = launch.script(__doc__, PRESET)

if __name__ == "__main__":
    sys.exit(run_command(main))
