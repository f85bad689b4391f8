"""Two processes under torchrun: loss and gradient over the total batch, complete latents, exact resume."""

import csv
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common.batches import Batches
from lbae import mnist
from lbae.data import load_split
from lbae.evaluation import as_input
from lbae.experiment import Latents, build_model, read_checkpoint
from lbae.model import losses
from lbae.parameters import Params

KEYS = {"cfg": "mnist_bae", "dataset": "digits", "width": 2, "zsize": 16, "batch_size": 64, "batch_size_test": 64,
        "lr": 1e-2, "train_images": 192, "test_images": 50, "device": "cpu", "dec_in_channels": 1,
        "binary_reco_loss": True, "tensorboard": False}  # fmt: skip


def torchrun(*tokens: str) -> None:
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", mnist.__file__]
    keys = [f"{key}={value}" for key, value in KEYS.items()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *keys, *tokens], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def train_losses(folder: Path) -> list[float]:
    with open(folder / "metrics.csv", newline="") as file:
        return [float(row["losses/Train_loss"]) for row in csv.DictReader(file) if row["losses/Train_loss"]]


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("two") / "exp"
    torchrun(f"exp={folder}", "epochs_max=1")
    return folder


def test_steps_are_those_of_the_total_batch(two):
    """Both halves see the same weights and normalise by their own statistics; their gradients are averaged."""
    torch.manual_seed(Params().seed)
    params = Params(**KEYS)
    model = build_model(params).to(memory_format=torch.channels_last).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=params.lr)
    expected = []
    for images, _ in Batches(load_split(params, "train"), 64, params.seed).epoch(0):
        optimizer.zero_grad()
        values = []
        for half in (1, 0):  # the first half last: it leaves its running statistics, which are unused here
            x = as_input(images[32 * half : 32 * half + 32])
            xr, encoded = model(x)
            loss = losses(xr, x, encoded, True)["loss"].mean() / 2
            loss.backward()
            values.append(float(loss.detach()))
        optimizer.step()
        expected.append(sum(values))
    torch.testing.assert_close(torch.tensor(train_losses(two)), torch.tensor(expected), rtol=1e-4, atol=0)


def test_latents_are_complete_and_in_order(two, tmp_path):
    mnist.main([*(f"{key}={value}" for key, value in KEYS.items()), f"exp={tmp_path / 'one'}", "epochs_max=1"])
    one, both = (Latents.load(folder / "latents-last.npz") for folder in (tmp_path / "one", two))
    assert torch.equal(one.labels, both.labels)
    assert torch.equal(*(Latents.load(folder / "latents-eval.npz").labels for folder in (tmp_path / "one", two)))
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
