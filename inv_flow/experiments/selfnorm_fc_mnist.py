"""32 self-normalising fully connected layers with smooth leaky ReLUs on MNIST.

python inv_flow/experiments/selfnorm_fc_mnist.py [--key value ...]
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0:1] = [str(Path(__file__).resolve().parents[2])]
    import common.start  # noqa: F401

from common.errors import run_command
from inv_flow.experiments import SNF
from inv_flow.train import launch

PRESET = SNF | {
    "name": "selfnorm_fc_mnist", "num_blocks": 1, "block_size": 32, "fc": True, "inv_conv": False,
    "activation": "SLR", "last_activation": False, "lr": 1e-4,
}  # fmt: skip

main = launch.script(__doc__, PRESET)

if __name__ == "__main__":
    sys.exit(run_command(main))
