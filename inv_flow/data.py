"""Training, validation and test images: 8-bit, seeded splits, as loaders for `Experiment`."""

import math

import numpy as np
import torch
from torch import Tensor

from common.batches import Batches
from common.datasets import ArraySet, data_root, folder, load, split, subset
from common.errors import UserError
from common.launch import Distributed
from inv_flow.train.config import Config

TRAIN_SIZES = {"mnist": 50_000, "cifar10": 40_000}  # the rest of the training file is the validation split
IMAGENET_VAL = 20_000
HELD_OUT = 0.1  # of a folder without train/ and test/
HELD_BYTES = 4_000_000_000  # CelebA at 64 pixels takes half of it


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
    """A flip with probability 1/2 and a shift of up to 4 % of the side, edges repeated: (C, H, W) -> (C, H, W)."""

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


AUGMENTATIONS = {"mnist": RandomCrop, "cifar10": ShiftAndFlip}
SIZES = {"mnist": (1, 28, 28), "digits": (1, 8, 8), "cifar10": (3, 32, 32), "celeba": (3, 64, 64)}


def image_size(config: Config) -> tuple[int, int, int]:
    """Channels, height and width of the images, without reading them. Raises UserError for what cannot be had."""
    name, side = config.dataset, config.resolution
    if config.test:
        channels, height, width = config.image_size or (1, 28, 28)
        return channels, side or height, side or width
    if config.data_aug and name not in AUGMENTATIONS:
        raise UserError(f"data_aug: {name} has no augmentation; it is for {' and '.join(AUGMENTATIONS)}")
    if name == "folder":
        found = folder.look(data_root(config.data_root))
        size = (found.channels, side or found.height, side or found.width)
    elif name.startswith("imagenet"):
        own = int(name.removeprefix("imagenet") or side or 32)
        if own not in (32, 64) or side not in (0, own):
            raise UserError(f"resolution={side}: {name} is published at 32 and 64 pixels; set dataset=imagenet and one "
                            "of them as resolution")  # fmt: skip
        size = (3, own, own)
    else:
        channels, height, width = SIZES[name]
        size = (channels, side or height, side or width)
    if config.image_size not in (None, size):
        raise UserError(f"image_size={config.image_size}: the images of {name} are {size}; leave it out")
    return size


def noise_images(n: int, size: tuple[int, ...], seed: int) -> ArraySet:
    """n images of uniform random integers, for timing without data."""
    images = torch.from_numpy(np.random.default_rng(seed).integers(0, 256, (n, *size), dtype=np.uint8))
    return ArraySet("noise", "train", images, torch.zeros(n, dtype=torch.int64))


def datasets(config: Config) -> tuple:
    """(train, val, test) sets of `config.dataset`. Raises UserError where they are absent."""
    name, root, side = config.dataset, config.data_root, config.resolution
    options: dict = {"image_size": side} if side else {}
    size, fetch = image_size(config), not config.evaluate
    if config.test:
        train, val, test = (noise_images(n, size, config.seed + i) for i, n in enumerate((1000, 200, 200)))
    elif name in TRAIN_SIZES:
        plain, test = load(name, root, "train", fetch, **options), load(name, root, "test", **options)
        source = load(name, root, "train", transform=AUGMENTATIONS[name](), **options) if config.data_aug else plain
        train = subset(source, indices=np.arange(min(TRAIN_SIZES[name], len(source) * 5 // 6)))
        val = subset(plain, indices=np.arange(len(train), len(plain)))
    elif name.startswith("imagenet"):
        whole, test = (load(f"imagenet{size[1]}", root, part) for part in ("train", "test"))
        n_val = min(IMAGENET_VAL, len(whole) // 5)
        val, train = split(whole, [n_val, len(whole) - n_val], config.seed)
    elif name == "celeba":
        train, val, test = (load(name, root, part, image_size=side or 64) for part in ("train", "valid", "test"))
    else:
        if name == "folder":
            own = size[1:] if not side and folder.look(data_root(root)).own else None
            options = {"image_size": None if own else size[1], "channels": size[0]}
            options |= {"held_out": HELD_OUT, "seed": config.seed}
        whole, test = load(name, root, "train", fetch, **options), load(name, root, "test", **options)
        if name == "folder":
            whole, test = whole.in_memory(), test.in_memory()
        val, train = split(whole, [len(whole) // 8, len(whole) - len(whole) // 8], config.seed)
    if config.n_train:
        train = subset(train, n=min(config.n_train, len(train)), seed=config.seed)
    if config.n_test:
        val, test = (subset(part, indices=np.arange(min(config.n_test, len(part)))) for part in (val, test))
    return train, val, test


def loaders(config: Config, dist: Distributed) -> tuple[tuple[int, int, int], tuple[Batches, Batches, Batches]]:
    """The image size, and the train, validation and test loaders with this process's share of each batch."""
    train, val, test = datasets(config)
    size = (train.channels, train.height, train.width)
    # on a GPU a set that fits is kept there: a copy from ordinary memory would make the host wait at each step
    held = dist.device.type == "cuda" and len(train) * math.prod(size) <= HELD_BYTES
    options = {
        "seed": config.seed, "workers": config.workers, "rank": dist.rank, "world": dist.world, "device": dist.device,
        "hold": held,
    }  # fmt: skip
    evaluation = {**options, "shuffle": False, "drop_last": False}
    return size, (
        Batches(train, config.batch_size, **(evaluation if config.evaluate else options)),
        Batches(val, config.batch_size, **evaluation),
        Batches(test, config.batch_size, **evaluation),
    )
