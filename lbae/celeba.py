"""Train, evaluate and sample the Latent Bernoulli Autoencoder on CelebA (64x64).

    python lbae/celeba.py                                  train celeba_bae from scratch (3900 epochs, all GPUs)
    python lbae/celeba.py l                                resume
    python lbae/celeba.py cfg=celeba_vae                   train the VAE baseline
    python lbae/celeba.py eval                             reconstruct the test set
    python lbae/celeba.py eval gen sample_method=cov gen_imgs=1000
    python lbae/celeba.py eval gen sample_method=int gen_imgs=100 batch_size_test=10 set_attr=15     put on eyeglasses
    python lbae/celeba.py help                             every key

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
    "celeba_bae": {
        "dataset": "celeba", "img_size": 64, "channels": 3, "zsize": 1500, "parallel": True,
        "lr": 1e-3, "batch_size": 512, "batch_size_test": 1024, "epochs_max": 3900,
        "gen_imgs": 5000, "sample_method": "cov", "exp_suffix": "m170-3",
    },
    "celeba_vae": {
        "dataset": "celeba", "img_size": 64, "channels": 3, "zsize": 64, "vae": True, "kl_weight": 64.0,
        "parallel": True, "lr": 1e-3, "batch_size": 512, "batch_size_test": 1024, "epochs_max": 3900,
        "gen_imgs": 5000, "sample_method": "random", "exp_suffix": "m173",
    },
}  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    command(CONFIGS, __file__, __doc__, argv)


if __name__ == "__main__":
    sys.exit(run_command(main))
