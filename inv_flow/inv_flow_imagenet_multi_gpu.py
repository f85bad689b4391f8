"""Inverse-Flow on downsampled ImageNet, 32x32 or 64x64 (L = 2, K = 16).

    torchrun --nproc_per_node=4 inv_flow/inv_flow_imagenet_multi_gpu.py --preset 32
    torchrun --nproc_per_node=4 inv_flow/inv_flow_imagenet_multi_gpu.py --preset 64
    torchrun --nproc_per_node=4 inv_flow/inv_flow_imagenet_multi_gpu.py --preset released      L = 3, K = 48 on 32x32

Writes runs/inv_flow/imagenet (see inv_flow/train/experiment.py).
"""

import sys

from common.errors import run_command
from inv_flow.train import launch

PRESET = {
    "name": "imagenet",
    "dataset": "imagenet32",
    "num_blocks": 2,
    "block_size": 16,
    "step_epochs": 25,
    "n_bins": 10,
    "individual_weights": False,
}
PRESETS = {
    "32": {"dataset": "imagenet32"},
    "64": {"dataset": "imagenet64"},
    "released": {
        "dataset": "imagenet32",
        "num_blocks": 3,
        "block_size": 48,
        "activation": "Identity",
        "actnorm": False,
        "conv1x1": True,
        "order": "TL",
        "batch_size": 250,
    },
}


def main(argv: list[str] | None = None) -> None:
    """Run the command line `argv`."""
    launch.main(argv, __doc__, PRESET, PRESETS)


if __name__ == "__main__":
    sys.exit(run_command(main))
