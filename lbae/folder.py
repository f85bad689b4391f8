"""Train, evaluate and sample the Latent Bernoulli Autoencoder on a folder of your own images.

    python lbae/folder.py data_root=MYIMAGES               train folder_bae: 64x64, colour, 300 epochs
    python lbae/folder.py data_root=MYIMAGES labels=labels.csv      with attributes by name, from a CSV
    python lbae/folder.py eval                             reconstruct the images that were held out
    python lbae/folder.py eval gen gen_imgs=100            generate by random hyperplanes
    python lbae/folder.py eval gen sample_method=int gen_imgs=100 batch_size_test=10 set_attr=NAME     set an attribute
    python lbae/folder.py img_size=32 channels=1 width=16 ...       smaller, grey
    python lbae/folder.py help                             every key

Flat, class sub-folders, or train/ and test/; see docs/your_data.md. Files go to lbae/<experiment name>.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0:1] = [str(Path(__file__).resolve().parents[1])]
    import common.start  # noqa: F401

from common.errors import run_command
from lbae.command import main as command

CONFIGS = {
    "folder_bae": {
        "dataset": "folder", "img_size": 64, "channels": 3, "zsize": 500, "width": 32,
        "lr": 1e-3, "batch_size": 64, "batch_size_test": 256, "epochs_max": 300,
        "gen_imgs": 1000, "sample_method": "cov", "exp_suffix": "1",
    },
    "folder_vae": {
        "dataset": "folder", "img_size": 64, "channels": 3, "zsize": 64, "width": 32, "vae": True, "kl_weight": 64.0,
        "lr": 1e-3, "batch_size": 64, "batch_size_test": 256, "epochs_max": 300,
        "gen_imgs": 1000, "sample_method": "random", "exp_suffix": "1",
    },
}  # fmt: skip


def main(argv: list[str] | None = None) -> None:
    command(CONFIGS, __file__, __doc__, argv)


if __name__ == "__main__":
    sys.exit(run_command(main))
