"""Markers: `gpu` and `data` tests skip themselves with the reason, `slow` ones run with --slow."""

import os
from pathlib import Path

import pytest
import torch

# small tensors gain nothing from threads, and the suite runs in one process a core
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")  # for the commands that tests start
os.environ.setdefault("OFFLINE", "1")  # no test downloads a data set


def pytest_addoption(parser):
    parser.addoption("--slow", action="store_true", help="run the tests marked slow too")


def pytest_collection_modifyitems(config, items):
    root = Path(os.environ.get("DATA_ROOT", "data"))
    mnist = root / "MNIST" / "raw" / "train-images-idx3-ubyte"
    has_data = mnist.exists() or mnist.with_suffix(".gz").exists()
    skips = {
        "gpu": (not torch.cuda.is_available(), "needs a CUDA device"),
        "data": (not has_data, f"needs real MNIST in {root} (set DATA_ROOT)"),
        "slow": (not config.getoption("--slow"), "slow: run with --slow"),
    }
    for item in items:
        for name, (skip, reason) in skips.items():
            if skip and item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=reason))
