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


class Resized:
    """A transform of one uint8 image (C, h, w) to (C, S, S).

    A black frame when at most 4 pixels a side are missing (28x28 digits, as published), else bilinear with antialias.
    """

    is_random = False

    def __init__(self, size: int):
        self.size = size

    def __call__(self, image: Tensor) -> Tensor:
        h, w = image.shape[1:]
        if (h, w) == (self.size, self.size):
            return image
        missing = self.size - h
        if h == w and 0 < missing <= 8 and missing % 2 == 0:
            return F.pad(image, [missing // 2] * 4)
        x = F.interpolate(image[None].float(), (self.size, self.size), mode="bilinear", antialias=True)[0]
        return (x + 0.5).floor().clamp(0, 255).to(torch.uint8)


def load_split(params: Params, split: str) -> ImageSet:
    """The `train` or `test` images of `params.dataset`, of `params.img_size`, limited to train_images / test_images.

    Raises UserError when the data are absent, or do not have the model's number of channels.
    """
    name = params.dataset
    options = {"size": params.img_size, "crop": params.img_crop_size or None} if name == "celeba" else {}
    full = datasets.load(name, params.data_root or None, split, **options)
    limit = params.train_images if split == "train" else params.test_images
    rows = np.arange(len(full))
    if hasattr(full, "factor_sizes"):
        n = FACTOR_IMAGES
        drawn = np.random.default_rng(0).permutation(len(full))[: n["train"] + n["test"]]
        rows = drawn[: n["train"]] if split == "train" else drawn[n["train"] :]
    data = Subset(full, rows[:limit] if limit else rows)
    data.transform = Resized(params.img_size)
    if data.channels != params.channels:
        raise UserError(f"{name} has {data.channels} channel(s): add channels={data.channels}")
    data.height = data.width = params.img_size
    return data


def attributes(data: ImageSet, targets: Tensor) -> Tensor:
    """Labels int64 (B, 1) of classes or (B, A) of 0/1 attributes, from a batch of targets.

    The true factors (B, F) of a factor set become one attribute a value: shape 0, 1, 2, then scale 0, ...
    """
    if hasattr(data, "factor_sizes"):
        columns = [F.one_hot(targets[:, i], size) for i, size in enumerate(data.factor_sizes)]
        return torch.cat(columns, 1)
    return targets.reshape(len(targets), -1)
