"""Inverse-Flow on downsampled ImageNet, 32x32 or 64x64 (L = 2, K = 16).

    torchrun --standalone --nproc_per_node=4 inv_flow/inv_flow_imagenet_multi_gpu.py --preset 32
    torchrun --standalone --nproc_per_node=4 inv_flow/inv_flow_imagenet_multi_gpu.py --preset 64
    torchrun --standalone --nproc_per_node=4 inv_flow/inv_flow_imagenet_multi_gpu.py --preset released

`released` is the published script's flow: L = 3, K = 48 on 32x32, 1x1 convolutions, no activation.
Writes runs/inv_flow/imagenet (see inv_flow/train/experiment.py).
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0:1] = [str(Path(__file__).resolve().parents[1])]
    import common.start  # noqa: F401

from common.errors import run_command
from inv_flow.train import launch

PRESET = {
    "name": "imagenet",
    "dataset": "imagenet",
    "resolution": 32,
    "num_blocks": 2,
    "block_size": 16,
    "step_epochs": 25,
    "epochs": 100,
    "sample_epochs": 5,
    "n_bins": 10,
    "individual_weights": False,
}
PRESETS = {
    "32": {"resolution": 32},
    "64": {"resolution": 64},
    "released": {
        "resolution": 32,
        "num_blocks": 3,
        "block_size": 48,
        "activation": "Identity",
        "actnorm": False,
        "conv1x1": True,
        "order": "TL",
        "batch_size": 250,
    },
}

main = launch.script(__doc__, PRESET, PRESETS)

if __name__ == "__main__":
    sys.exit(run_command(main))
