"""FInC Flow on MNIST.

python inv_flow/experiments/ff_glow_mnist.py [--key value ...]
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0:1] = [str(Path(__file__).resolve().parents[2])]
    import common.start  # noqa: F401

from common.errors import run_command
from inv_flow.experiments import FINC
from inv_flow.train import launch

PRESET = FINC | {"name": "ff_glow_mnist", "n_bins": 7}

main = launch.script(__doc__, PRESET)

if __name__ == "__main__":
    sys.exit(run_command(main))
