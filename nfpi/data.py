"""Data sets of the experiments: the pickle contract, subsets, generators for every use of randomness.

A set is a `Images`: uint8 (N, C, H, W), int64 targets, class names. It comes from `<root>/<name>/<name>.pickle` when
that file exists (a dict {"train": {"data", "targets"}, "test": ..., "classes"}), otherwise from `common.datasets`.
"""

import math
import os
import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.model_selection import train_test_split
from torch import Tensor

from common import unpickle
from common.checkpoint import atomic_write
from common.errors import UserError
from common.images import to_uint8 as _to_uint8


@dataclass
class Images:
    """Labelled images in memory; what `common.batches.Batches` and the loops need of a data set."""

    images: Tensor  # (N, C, H, W) uint8
    targets: Tensor  # (N,) int64
    classes: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.targets)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.targets[index]

    def arrays(self) -> tuple[Tensor, Tensor]:
        """All images and targets."""
        return self.images, self.targets

    def images_at(self, index: np.ndarray) -> Tensor:
        """Images at the given places."""
        return self.images[torch.as_tensor(index)]

    def subset(self, index: Tensor) -> "Images":
        """The images at `index`."""
        return Images(self.images[index], self.targets[index], self.classes)

    def check(self, shape: tuple[int, int, int], classes: int, source: str) -> "Images":
        """Raise UserError unless the images have `shape` (C, H, W) and the labels lie in 0 .. classes-1."""
        if tuple(self.images.shape[1:]) != shape:
            raise UserError(f"{source}: images are {tuple(self.images.shape[1:])}, the configuration says {shape}")
        if len(self) and not 0 <= int(self.targets.min()) <= int(self.targets.max()) < classes:
            raise UserError(
                f"{source}: labels reach {int(self.targets.max())}, the configuration has {classes} classes"
            )
        return self


# ---------------------------------------------------------------- the pickle contract


def read_pickle(path: str | Path) -> Any:
    """The content of a pickled data set. Only tensors, arrays and plain containers are rebuilt.

    Raises UserError for missing, damaged and foreign files.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no pickled data set at {path}; make it with python nfpi/extract_dataset.py")
    return unpickle.read_pickle(path, {**unpickle.ARRAYS, **unpickle.TENSORS})


def write_pickle(path: str | Path, content: Mapping[str, Any]) -> None:
    """Write a data set by the pickle contract, atomically."""
    with atomic_write(path) as file:
        pickle.dump(content, file, protocol=4)


def from_arrays(part: Mapping[str, Any], classes: Sequence[Any], source: str | Path) -> Images:
    """{"data", "targets"} -> Images; grey images may lack the channel axis. Raises UserError for other contents."""
    try:
        images, targets = torch.as_tensor(part["data"]), torch.as_tensor(part["targets"]).long()
    except (KeyError, TypeError) as error:
        raise UserError(f"{source} has no 'data' and 'targets'") from error
    if images.dtype != torch.uint8 or images.ndim not in (3, 4) or len(images) != len(targets):
        raise UserError(
            f"{source}: expected uint8 images (N, C, H, W) and N targets, got {images.dtype} {tuple(images.shape)} and "
            f"{len(targets)} targets"
        )
    return Images(images[:, None] if images.ndim == 3 else images, targets, tuple(str(c) for c in classes))


def load_split(name: str, root: str | None, split: str) -> Images:
    """The `train` or `test` images of data set `name` below `root` (None: the environment's DATA_ROOT, else data/)."""
    base = Path(root or os.environ.get("DATA_ROOT") or "data")
    path = base / name / f"{name}.pickle"
    if path.is_file():
        content = read_pickle(path)
        if not isinstance(content, dict) or split not in content:
            raise UserError(f"{path} has no '{split}' part")
        return from_arrays(content[split], content.get("classes", ()), path)
    from common import datasets

    common_name = {"fashionmnist": "fashion_mnist"}.get(name, name)
    loaded = datasets.load(common_name, root=root, split=split)
    images, targets = loaded.arrays()
    return Images(torch.as_tensor(images), torch.as_tensor(targets).long(), tuple(str(c) for c in loaded.classes or ()))


def load_generated(path: str | Path, classes: Sequence[str]) -> Images:
    """A set that the generation stage wrote: {"data", "targets"} alone, or the train part of a full file."""
    content = read_pickle(path)
    if isinstance(content, dict) and "train" in content:
        content = content["train"]
    return from_arrays(content, classes, path)


# ---------------------------------------------------------------- subsets


def items_per_class(targets: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Indices of the first `count` images a class in a random order of each class, then shuffled all together."""
    classes = int(targets.max()) + 1
    chosen = []
    for k in range(classes):
        index = (targets == k).nonzero().flatten()
        chosen.append(index[torch.randperm(len(index), generator=generator)[:count]])
    joined = torch.cat(chosen)
    return joined[torch.randperm(len(joined), generator=generator)]


def stratified_split(targets: Tensor, held_out: float, seed: int) -> tuple[Tensor, Tensor]:
    """(kept, held out) indices, every class in proportion. Raises UserError when a class is too small."""
    try:
        kept, held = train_test_split(
            np.arange(len(targets)), test_size=held_out, random_state=seed, stratify=targets.numpy()
        )
    except ValueError as error:
        raise UserError(f"cannot hold out {held_out:.3g} of {len(targets)} images by class: {error}") from error
    return torch.from_numpy(kept), torch.from_numpy(held)


def flow_sets(
    train: Images, info: Mapping[str, Any], use_train: bool, ratio: float, seed: int
) -> tuple[Images, Images]:
    """(images that train the flow, images on which the Gaussians are estimated).

    The second is the training set itself with `use_train` (all shipped configurations), else a stratified part
    1 - `ratio`. `items_per_class_train` / `_val` in `info` cut both down, 0 keeps all; equal numbers give equal
    subsets.
    """
    fit = train
    if not use_train:
        kept, held = stratified_split(train.targets, 1 - ratio, seed)
        train, fit = train.subset(kept), train.subset(held)
    return _cut(train, info["items_per_class_train"], seed), _cut(fit, info["items_per_class_val"], seed)


def _cut(images: Images, count: int, seed: int) -> Images:
    if not count:
        return images
    return images.subset(items_per_class(images.targets, count, torch.Generator().manual_seed(seed)))


# ---------------------------------------------------------------- generated images


def to_uint8(x: Tensor) -> Tensor:
    """[0, 1] -> the nearest grey level; the published code multiplies by 256 and moves 127 of 256 levels up by one."""
    return torch.from_numpy(_to_uint8(x)) if x.dtype != torch.uint8 else x


def sampling_batches(per_class: int, processes: int) -> list[int]:
    """Images a class of each sampling batch on one process: about a quarter of `per_class` at a time, one image more so
    that the parts of all processes cover it.
    """
    batches = math.ceil(4 / processes)
    return [per_class // max(4, processes) + 1] * batches


# ---------------------------------------------------------------- randomness


class Use:
    """What a generator is for: each use has its own stream."""

    INIT, TRAIN, LATENTS, TEST, SAMPLE, CNN, PICTURE, CODES = range(8)


def generator(seed: int, use: int, *place: int, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator that is a pure function of (seed, use, place): a resumed run draws what the first one would have."""
    word = int(np.random.SeedSequence([seed % 2**63, use, *place]).generate_state(1, np.uint64)[0])
    return torch.Generator(device=device).manual_seed(word & (2**63 - 1))
