"""Train, evaluate and sample the Latent Bernoulli Autoencoder on MNIST (or a small set).

    python lbae/mnist.py                                   train mnist_bae from scratch (5000 epochs)
    python lbae/mnist.py l                                 resume; resume=auto: where there is something
    python lbae/mnist.py cfg=mnist_vae                     train the VAE baseline
    python lbae/mnist.py eval                              reconstruct the test set
    python lbae/mnist.py eval gen sample_method=cov gen_imgs=1000
    python lbae/mnist.py dataset=digits width=8 zsize=32 batch_size=64 epochs_max=2     a minute on a CPU
    python lbae/mnist.py help                              every option

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
    "mnist_bae": {
        "dataset": "mnist", "img_size": 32, "channels": 1, "zsize": 200, "dec_in_channels": 1, "binary_reco_loss": True,
        "lr": 1e-4, "batch_size": 512, "batch_size_test": 1024, "epochs_max": 5000,
        "gen_imgs": 10000, "sample_method": "cov", "exp_suffix": "m169",
    },
    "mnist_vae": {
        "dataset": "mnist", "img_size": 32, "channels": 1, "zsize": 20, "dec_in_channels": 1, "binary_reco_loss": True,
        "vae": True, "kl_weight": 10.0, "l2": 1e-4,
        "lr": 1e-4, "batch_size": 512, "batch_size_test": 512, "epochs_max": 1000,
        "gen_imgs": 512, "sample_method": "random", "exp_suffix": "m64",
    },
}  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    command(CONFIGS, __file__, __doc__, argv)


if __name__ == "__main__":
    sys.exit(run_command(main))
