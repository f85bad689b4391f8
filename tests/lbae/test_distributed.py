"""Two processes, as torchrun starts them: the losses of one, complete latents, exact resume."""

import csv
import tempfile
from pathlib import Path

import pytest
import torch
from front import children

from lbae import mnist
from lbae.experiment import Latents, read_checkpoint

KEYS = {"cfg": "mnist_bae", "dataset": "digits", "width": 2, "zsize": 16, "batch_size": 64, "batch_size_test": 64,
        "lr": 1e-2, "train_images": 192, "test_images": 50, "device": "cpu", "dec_in_channels": 1,
        "binary_reco_loss": True, "tensorboard": False}  # fmt: skip


def torchrun(*tokens: str) -> None:
    keys = [f"{key}={value}" for key, value in KEYS.items()]
    with tempfile.TemporaryDirectory() as elsewhere:
        children.train_together("lbae", [*keys, *tokens], elsewhere)


def train_losses(folder: Path) -> list[float]:
    with open(folder / "metrics.csv", newline="") as file:
        return [float(row["losses/Train_loss"]) for row in csv.DictReader(file) if row["losses/Train_loss"]]


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two") / "exp"
    torchrun(f"exp={folder}", "epochs_max=1")
    return folder


@pytest.fixture(scope="module")
def one(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("one") / "exp"
    mnist.main([*(f"{key}={value}" for key, value in KEYS.items()), f"exp={folder}", "epochs_max=1"])
    return folder


def test_losses_are_those_of_one_process(one, two):
    """The batch normalisation sees the whole batch, the gradient is its mean.

    The first loss agrees up to rounding. Adam's first steps turn the sign of a gradient near 0 into a whole step, and a
    bit whose logit is near 0 flips: the later losses get a tolerance of 1e-3.
    """
    losses = torch.tensor([train_losses(folder) for folder in (one, two)])
    torch.testing.assert_close(losses[1, 0], losses[0, 0], rtol=1e-6, atol=0)
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-3, atol=0)
    first, second = (read_checkpoint(folder / "models/last.cp") for folder in (one, two))
    for name in ("bn0.running_mean", "bn0.running_var"):
        torch.testing.assert_close(second["enc"][name], first["enc"][name], rtol=1e-2, atol=1e-3)


def test_latents_are_complete_and_in_order(one, two):
    first, both = (Latents.load(folder / "latents-last.npz") for folder in (one, two))
    assert torch.equal(first.labels, both.labels)
    assert (first.codes == both.codes).double().mean() > 0.99
    assert torch.equal(*(Latents.load(folder / "latents-eval.npz").labels for folder in (one, two)))
    assert read_checkpoint(two / "models/last.cp")["iter"] == 192


@pytest.mark.slow
def test_resume_is_exact(two, tmp_path):
    folder = tmp_path / "exp"
    torchrun(f"exp={folder}", "epochs_max=2")
    torchrun("l", f"exp={two}", "epochs_max=2")
    first, second = (read_checkpoint(one / "models/last.cp") for one in (folder, two))
    for part in ("enc", "gen"):
        assert all(torch.equal(value, second[part][key]) for key, value in first[part].items())
    assert train_losses(folder) == train_losses(two)


@pytest.mark.slow
def test_a_vae_draws_the_noise_of_one_process(tmp_path):
    """Losses of training and of the test set, whose last batch (50 of 64 images, then none) is shared unevenly."""
    keys = ["cfg=mnist_vae", "vae=1", "kl_weight=1", "epochs_max=1", "test_images=33", "batch_size_test=20"]
    torchrun(*keys, f"exp={tmp_path / 'two'}")
    mnist.main([*(f"{key}={value}" for key, value in KEYS.items()), *keys, f"exp={tmp_path / 'one'}"])
    first, second = (torch.tensor(train_losses(tmp_path / name)) for name in ("one", "two"))
    torch.testing.assert_close(second[0], first[0], rtol=1e-6, atol=0)
    torch.testing.assert_close(second, first, rtol=1e-3, atol=0)
    tests = [read_checkpoint(tmp_path / name / "models/last.cp")["loss_eval"] for name in ("one", "two")]
    assert tests[1] == pytest.approx(tests[0], rel=1e-3)
