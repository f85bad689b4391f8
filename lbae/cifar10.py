"""Train, evaluate and sample the Latent Bernoulli Autoencoder on CIFAR-10.

    python lbae/cifar10.py                                 train cifar10_bae from scratch (3000 epochs)
    python lbae/cifar10.py l                               resume
    python lbae/cifar10.py cfg=cifar10_vae                 train the VAE baseline
    python lbae/cifar10.py eval                            reconstruct the test set
    python lbae/cifar10.py eval gen sample_method=cov gen_imgs=1000
    python lbae/cifar10.py help                            every key

Files go to lbae/<experiment name>; see lbae/README.md. Values are those of the published configurations.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0:1] = [str(Path(__file__).resolve().parents[1])]
    import common.start  # noqa: F401

from common.errors import run_command
from lbae.command import main as command

CONFIGS = {
    "cifar10_bae": {
        "dataset": "cifar10", "img_size": 32, "channels": 3, "zsize": 600,
        "lr": 1e-3, "batch_size": 512, "batch_size_test": 1024, "epochs_max": 3000,
        "gen_imgs": 5000, "sample_method": "cov", "exp_suffix": "m171-3",
    },
    "cifar10_vae": {
        "dataset": "cifar10", "img_size": 32, "channels": 3, "zsize": 128, "vae": True, "kl_weight": 128.0,
        "lr": 1e-3, "batch_size": 512, "batch_size_test": 1024, "epochs_max": 3900,
        "gen_imgs": 5000, "sample_method": "random", "exp_suffix": "m173",
    },
}  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    command(CONFIGS, __file__, __doc__, argv)


if __name__ == "__main__":
    sys.exit(run_command(main))
