"""Inverse-Flow on MNIST (paper, Table 3: L = 2, K = 16).

    python inv_flow/inv_flow_mnist.py                              the paper's flow, 100 epochs
    python inv_flow/inv_flow_mnist.py --layer finc                 a comparison model at equal depth; also none, glow,
                                                                   emerging, convexp, snf, unit
    python inv_flow/inv_flow_mnist.py --num_blocks 3 --block_size 32 --padding 2       three levels on 32x32
    python inv_flow/inv_flow_mnist.py --resume                     go on from checkpoints/last.pt
    python inv_flow/inv_flow_mnist.py --evaluate                   likelihood and pictures of best.safetensors
    python inv_flow/inv_flow_mnist.py --smoke                      seconds, on scikit-learn's digits
    torchrun --standalone --nproc_per_node=2 inv_flow/inv_flow_mnist.py       the batch size stays the total

Writes runs/inv_flow/mnist (see inv_flow/train/experiment.py).
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0:1] = [str(Path(__file__).resolve().parents[1])]
    import common.start  # noqa: F401

from common.errors import run_command
from inv_flow.train import launch

PRESET = {"name": "mnist", "dataset": "mnist", "num_blocks": 2, "block_size": 16, "epochs": 100, "sample_epochs": 10}

main = launch.script(__doc__, PRESET)

if __name__ == "__main__":
    sys.exit(run_command(main))
