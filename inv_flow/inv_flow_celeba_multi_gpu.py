"""Inverse-Flow on CelebA, 32, 64 or 128 pixels (L = 3, K = 32).

    torchrun --standalone --nproc_per_node=4 inv_flow/inv_flow_celeba_multi_gpu.py --preset 32
    torchrun --standalone --nproc_per_node=4 inv_flow/inv_flow_celeba_multi_gpu.py --preset 64
    torchrun --standalone --nproc_per_node=4 inv_flow/inv_flow_celeba_multi_gpu.py --preset 128

Writes runs/inv_flow/celeba (see inv_flow/train/experiment.py).
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0:1] = [str(Path(__file__).resolve().parents[1])]
    import common.start  # noqa: F401

from common.errors import run_command
from inv_flow.train import launch

PRESET = {
    "name": "celeba",
    "dataset": "celeba",
    "resolution": 64,
    "num_blocks": 3,
    "block_size": 32,
    "step_epochs": 25,
    "epochs": 100,
    "sample_epochs": 5,
    "n_bins": 10,
    "individual_weights": False,
}
PRESETS = {"32": {"resolution": 32}, "64": {"resolution": 64}, "128": {"resolution": 128}}

main = launch.script(__doc__, PRESET, PRESETS)

if __name__ == "__main__":
    sys.exit(run_command(main))
