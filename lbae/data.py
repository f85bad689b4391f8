"""The data sets as the network sees them: uint8 (C, S, S), in a fixed order, without augmentation."""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common import datasets
from common.datasets.base import ImageSet, Subset
from common.errors import UserError
from lbae.parameters import Params

FACTOR_IMAGES = {"train": 8000, "test": 2000}  # drawn from a set of factor combinations, which has no splits of its own


def load_split(params: Params, split: str) -> ImageSet:
    """The `train` or `test` images of `params.dataset`, of `params.img_size`, limited to train_images / test_images.

    Raises UserError when the data are absent, or do not have the model's number of channels.
    """
    name = params.dataset
    options = {"image_size": params.img_size}
    if name in ("mnist", "fashion_mnist"):
        options["pad"] = 2  # 28x28 becomes 32x32 with a black frame, as published
    elif name == "celeba" and params.img_crop_size:
        options["crop"] = params.img_crop_size
    full = datasets.load(name, params.data_root or None, split, **options)
    limit = params.train_images if split == "train" else params.test_images
    rows = np.arange(len(full))
    if hasattr(full, "factor_sizes"):
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


def attributes(data: ImageSet, targets: Tensor) -> Tensor:
    """Labels int64 (B, 1) of classes or (B, A) of 0/1 attributes, from a batch of targets.

    The true factors (B, F) of a factor set become one attribute a value: shape 0, 1, 2, then scale 0, ...
    """
    if hasattr(data, "factor_sizes"):
        columns = [F.one_hot(targets[:, i], size) for i, size in enumerate(data.factor_sizes)]
        return torch.cat(columns, 1)
    return targets.reshape(len(targets), -1)
