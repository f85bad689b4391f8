"""Tiny data sets and one tiny trained run of each kind, shared by the tests of this folder."""

import gzip
import struct
from types import SimpleNamespace

import numpy as np
import pytest

from glancenet import architectures, prepare_dsprites_leakage
from glancenet import main as training

SIZES = ["3", "2", "2", "4", "4"]
SMALL = ["--dset_name", "sprites", "--sprites_sizes", *SIZES, "--encoder", "PadlessGaussianConv64"]
SMALL += ["--decoder", "ShallowLinear", "--z_dim", "7", "--batch_size", "32", "--warmup_epochs", "0", "--lr_G", "0.001"]
SMALL += ["--device", "cpu"]


def small_command(folder, *words: str) -> list[str]:
    """A tiny main.py command line whose files all land in `folder`."""
    places = ["--log_dir", f"{folder}/logs", "--ckpt_dir", f"{folder}/ckpt", "--train_output_dir", f"{folder}/pictures"]
    return [*SMALL, "--dset_dir", str(folder), "--test_output_dir", f"{folder}/test_pictures", *places, *words]


def narrowed(patch: pytest.MonkeyPatch) -> None:
    """Linear networks of 16 hidden units under their published names: for tests of what happens around networks."""
    for network in (architectures.GaussianLinear, architectures.LinearDecoder):
        patch.setattr(network, "widths", (16,))


@pytest.fixture(scope="module")
def narrow():
    """`narrowed` for all tests of a file."""
    with pytest.MonkeyPatch.context() as patch:
        narrowed(patch)
        yield


@pytest.fixture
def narrow_here(monkeypatch):
    """`narrowed` for one test."""
    narrowed(monkeypatch)


@pytest.fixture(scope="session")
def command():
    """`small_command` for the tests."""
    return small_command


@pytest.fixture(scope="session")
def glancenet_run(tmp_path_factory):
    """A trained GlanceNet with metrics, pictures and partial supervision: .folder, .log, .words."""
    folder = tmp_path_factory.mktemp("glancenet_run")
    words = small_command(
        folder, "--alg", "GrayVAE_Join", "--conditional_prior", "yes", "--masking_fact", "50", "--latent_loss", "BCE",
        "--max_epoch", "3", "--out_path", "one", "--name", "one", "--evaluation_metric", "mig", "sap_score",
        "--metric_train", "150", "--metric_eval", "150", "--traverse_z", "true", "--loss_terms", "infovae", "DIPVAEI",
    )  # fmt: skip
    return SimpleNamespace(folder=folder, log=training.main(words), words=words)


@pytest.fixture(scope="session")
def cbnm_run(tmp_path_factory):
    """A trained concept bottleneck on the same data: .folder, .log."""
    folder = tmp_path_factory.mktemp("cbnm_run")
    words = small_command(folder, "--alg", "CBM_Join", "--max_epoch", "2", "--out_path", "one", "--name", "one")
    return SimpleNamespace(folder=folder, log=training.main(words))


@pytest.fixture(scope="session")
def leakage_data(tmp_path_factory):
    """A folder with the two leakage files of a small grid (two shapes of scale and turn, all 32 x 32 positions)."""
    folder = tmp_path_factory.mktemp("leakage_data")
    prepare_dsprites_leakage.main(
        ["--source", "sprites", "--sizes", "3", "2", "4", "32", "32", "--out", str(folder), "--test_images", "400"]
    )
    return folder


def write_idx(path, array: np.ndarray) -> None:
    """A gzipped IDX file of uint8."""
    path.parent.mkdir(parents=True, exist_ok=True)
    head = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    path.write_bytes(gzip.compress(head + array.astype(np.uint8).tobytes()))


@pytest.fixture(scope="session")
def mnist_root(tmp_path_factory):
    """A folder with 1200 + 600 generated 28 x 28 digits in MNIST's files: each digit is a bar at its own place."""
    folder, rng = tmp_path_factory.mktemp("mnist"), np.random.default_rng(0)
    for stem, n in (("train", 1200), ("t10k", 600)):
        digits = rng.integers(0, 10, n)
        images = rng.integers(0, 40, (n, 28, 28))
        for image, digit in zip(images, digits, strict=True):
            image[4 + 2 * digit : 8 + 2 * digit, 4 : 14 + digit] = 220
        write_idx(folder / "MNIST" / "raw" / f"{stem}-images-idx3-ubyte.gz", images)
        write_idx(folder / "MNIST" / "raw" / f"{stem}-labels-idx1-ubyte.gz", digits)
    return folder
