"""The splits of section "Data": integer images, seeded, as loaders for `Experiment`."""

import math

import numpy as np
import torch
from torch import Tensor

from common.batches import Batches
from common.datasets import load, split, subset
from common.errors import UserError
from common.launch import Distributed
from inv_flow.train.config import Config

TRAIN_SIZES = {"mnist": 50_000, "cifar10": 40_000}  # the rest of the training file is the validation split
IMAGENET_VAL = 20_000


class RandomCrop:
    """Reflection padding by `pad` pixels, then a random crop of the old size: (C, H, W) -> (C, H, W)."""

    def __init__(self, pad: int = 1):
        self.pad = pad

    def __call__(self, image: Tensor) -> Tensor:
        height, width = image.shape[1:]
        padded = torch.nn.functional.pad(image[None].float(), (self.pad,) * 4, mode="reflect")[0].to(image.dtype)
        top, left = torch.randint(0, 2 * self.pad + 1, (2,)).tolist()
        return padded[:, top : top + height, left : left + width]


class ShiftAndFlip:
    """A horizontal flip with probability 1/2 and a shift of up to 4 % of the side, edges repeated: (C, H, W) -> (C, H,
    W).
    """

    def __init__(self, share: float = 0.04):
        self.share = share

    def __call__(self, image: Tensor) -> Tensor:
        if torch.rand(()) < 0.5:
            image = image.flip(2)
        height, width = image.shape[1:]
        pad = math.ceil(height * self.share)
        padded = torch.nn.functional.pad(image[None].float(), (pad,) * 4, mode="replicate")[0].to(image.dtype)
        top, left = torch.randint(0, 2 * pad + 1, (2,)).tolist()
        return padded[:, top : top + height, left : left + width]


class NoiseImages:
    """Images of uniform random integers, for timing without data."""

    def __init__(self, n: int, size: tuple[int, int, int], seed: int):
        self.images = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (n, *size), dtype=np.uint8))
        self.targets = torch.zeros(n, dtype=torch.int64)
        self.channels, self.height, self.width = size

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.targets[index]

    def images_at(self, rows: np.ndarray) -> Tensor:
        """uint8 (n, C, H, W)."""
        return self.images[rows]


def datasets(config: Config) -> tuple:
    """(train, val, test) sets of `config.dataset`. Raises UserError for an unknown or absent data set."""
    name, root = config.dataset, config.data_root
    if name == "noise" or config.test:
        side = config.resolution or config.image_size[1]
        size = (config.image_size[0], side, side)
        return tuple(NoiseImages(n, size, config.seed + i) for i, n in enumerate((config.n_train or 1000, 200, 200)))
    if name in TRAIN_SIZES:
        transform = {"mnist": RandomCrop, "cifar10": ShiftAndFlip}[name]() if config.data_aug else None
        plain, test = load(name, root, "train"), load(name, root, "test")
        source = load(name, root, "train", transform=transform) if transform else plain
        cut = TRAIN_SIZES[name]
        train = subset(source, indices=np.arange(min(cut, len(source) * 5 // 6)))
        val = subset(plain, indices=np.arange(len(train), len(plain)))
    elif name in ("imagenet32", "imagenet64"):
        whole, test = load(name, root, "train"), load(name, root, "val")
        n_val = min(IMAGENET_VAL, len(whole) // 5)
        val, train = split(whole, [n_val, len(whole) - n_val], config.seed)
    elif name == "celeba":
        options = {"size": config.resolution or 64}
        train, val, test = (load(name, root, part, **options) for part in ("train", "valid", "test"))
    elif name == "digits":
        whole, test = load(name, root, "train"), load(name, root, "test")
        val, train = split(whole, [len(whole) // 8, len(whole) - len(whole) // 8], config.seed)
    else:
        raise UserError(f"dataset={name}: expected mnist, cifar10, imagenet32, imagenet64, celeba, digits or noise")
    if config.n_train:
        train = subset(train, n=min(config.n_train, len(train)), seed=config.seed)
    if config.n_test:
        val, test = (subset(part, indices=np.arange(min(config.n_test, len(part)))) for part in (val, test))
    return train, val, test


def loaders(config: Config, dist: Distributed) -> tuple[tuple[int, int, int], tuple[Batches, Batches, Batches]]:
    """The image size, and the train, validation and test loaders with this process's share of each batch."""
    train, val, test = datasets(config)
    options = {
        "seed": config.seed,
        "workers": config.workers,
        "rank": dist.rank,
        "world": dist.world,
        "device": dist.device,
    }
    evaluation = {**options, "shuffle": False, "drop_last": False}
    size = (train.channels, train.height, train.width)
    return size, (
        Batches(train, config.batch_size, **options),
        Batches(val, config.batch_size, **evaluation),
        Batches(test, config.batch_size, **evaluation),
    )
