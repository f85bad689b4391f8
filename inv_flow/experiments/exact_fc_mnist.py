"""Two 3x3 inverse convolutions around one spline on MNIST (the published file has them in place of linear layers).

python inv_flow/experiments/exact_fc_mnist.py [--key value ...]
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
    "name": "exact_fc_mnist", "num_blocks": 1, "block_size": 2, "order": "TL", "lr": 1e-4, "tail_bound": 10.0,
}  # fmt: skip

main = launch.script(__doc__, PRESET)

if __name__ == "__main__":
    sys.exit(run_command(main))
