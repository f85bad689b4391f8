"""The data sets as the network sees them: uint8 (C, S, S), in a fixed order, without augmentation."""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common import datasets
from common.datasets.base import ImageSet, Subset
from common.errors import UserError
from lbae.options import CROPPED, Params

FACTOR_IMAGES = {"train": 8000, "test": 2000}  # drawn from a set of factor combinations, which has no splits of its own


def load_split(params: Params, split: str) -> ImageSet:
    """The `train` or `test` images of `params.dataset`, of `params.img_size`, limited to train_images / test_images.

    A folder without train/ and test/ gives a tenth of its images, drawn once, for testing. Raises UserError when the
    data are absent, or do not have the model's number of channels.
    """
    name = params.dataset
    options = {"image_size": params.img_size}
    if name in ("mnist", "fashion_mnist"):
        options["pad"] = 2  # 28x28 becomes 32x32 with a black frame, as published
    elif name in CROPPED:
        options |= {"crop": params.img_crop_size or None, "channels": params.channels}
    halves = name == "folder" and not _has_splits(datasets.data_root(params.data_root or None))
    full = datasets.load(name, params.data_root or None, "all" if halves else split, **options)
    limit = params.train_images if split == "train" else params.test_images
    rows = np.arange(len(full))
    if halves:
        held_out = np.random.default_rng(0).permutation(len(full))[: max(1, len(full) // 10)]
        rows = np.sort(held_out) if split == "test" else np.delete(rows, held_out)
    elif hasattr(full, "factor_sizes"):
        n = FACTOR_IMAGES
        drawn = np.random.default_rng(0).permutation(len(full))[: n["train"] + n["test"]]
        rows = drawn[: n["train"]] if split == "train" else drawn[n["train"] :]
    data = Subset(full, rows[:limit] if limit else rows)
    if (data.channels, data.height, data.width) != (params.channels, params.img_size, params.img_size):
        raise UserError(
            f"{name} gives {data.channels} channel(s) of {data.height}x{data.width} pixels, the model takes "
            f"{params.channels} of {params.img_size}x{params.img_size}; set channels= and img_size="
        )
    return data


def _has_splits(root: Path) -> bool:
    """Whether a folder of images holds train/ and test/. Raises UserError for one of the two."""
    found = [name for name in ("train", "test") if (root / name).is_dir()]
    if len(found) == 1:
        raise UserError(f"{root} holds {found[0]}/ alone: add the other one of train/ and test/, or move its images up")
    return bool(found)


def attributes(data: ImageSet, targets: Tensor) -> Tensor:
    """Labels int64 (B, 1) of classes or (B, A) of 0/1 attributes, from a batch of targets.

    The true factors (B, F) of a factor set become one attribute a value: shape 0, 1, 2, then scale 0, ...
    """
    if hasattr(data, "factor_sizes"):
        columns = [F.one_hot(targets[:, i], size) for i, size in enumerate(data.factor_sizes)]
        return torch.cat(columns, 1)
    return targets.reshape(len(targets), -1)


def as_input(images: Tensor) -> Tensor:
    """uint8 (B, C, S, S) -> float32 in [0, 1], channels last: convolutions are faster so."""
    x = images.float() / 255
    return x if x.device.type == "mps" else x.contiguous(memory_format=torch.channels_last)
