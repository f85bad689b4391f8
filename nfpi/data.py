"""Data sets of the experiments: the pickle contract, subsets, batches with transforms, generators for every use.

A set is a `Images`: uint8 (N, C, H, W), int64 targets, class names. It comes from `<root>/<name>/<name>.pickle` when
that file exists (a dict {"train": {"data", "targets"}, "test": ..., "classes"}), otherwise from `common.datasets`.
"""

import math
import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from common import datasets, unpickle
from common.batches import Batches
from common.checkpoint import atomic_write
from common.errors import UserError
from common.images import to_uint8 as _to_uint8
from common.launch import Distributed
from nfpi import augment
from nfpi.config import Config


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


def load_split(name: str, root: str | None, split: str, **options: Any) -> Images:
    """The `train` or `test` images of data set `name` below `root` (None: see `common.datasets.data_root`), with the
    `options` of `common.datasets.load`.
    """
    path = datasets.data_root(root) / name / f"{name}.pickle"
    if path.is_file():
        content = read_pickle(path)
        if not isinstance(content, dict) or split not in content:
            raise UserError(f"{path} has no '{split}' part")
        return from_arrays(content[split], content.get("classes", ()), path)
    if {"fashionmnist": "fashion_mnist"}.get(name, name) not in datasets.names():
        raise UserError(
            f"no data set {name}: expected {path}, which python nfpi/extract_dataset.py {name} --folder FOLDER makes, "
            f"or one of {', '.join(datasets.names())}"
        )
    loaded = datasets.load({"fashionmnist": "fashion_mnist"}.get(name, name), root=root, split=split, **options)
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
    from sklearn.model_selection import train_test_split  # here, as it takes seconds to import

    try:
        kept, held = train_test_split(
            np.arange(len(targets)), test_size=held_out, random_state=seed, stratify=targets.numpy()
        )
    except ValueError as error:
        raise UserError(f"cannot hold out {held_out:.3g} of {len(targets)} images by class: {error}") from error
    return torch.from_numpy(kept), torch.from_numpy(held)


class FlowSets(NamedTuple):
    """Images that train the flow; images on which the Gaussians are fitted; images that train it once both have joined
    (None: the same as before).
    """

    train: Images
    fit: Images
    merged: Images | None = None


def flow_sets(images: Images, config: Config) -> FlowSets:
    """The sets of a run, cut to `dataset_info.items_per_class_*` images a class (0 keeps all).

    With `use_train_dataset` (all shipped configurations) the Gaussians are fitted on the training images; otherwise on
    a stratified part 1 - `train_ratio`, which joins the training images from `merge_datasets_after` on.
    """
    info, seed = config.dataset_info, config.seed
    counts = info.items_per_class_train, info.items_per_class_val
    if config.val.gmm.use_train_dataset:
        train = _cut(images, counts[0], seed)
        return FlowSets(train, train if counts[0] == counts[1] else _cut(images, counts[1], seed))
    kept, held = stratified_split(images.targets, 1 - config.dataset.train_ratio, seed)
    train, fit = (_cut(images.subset(index), n, seed) for index, n in zip((kept, held), counts, strict=True))
    both = Images(torch.cat([train.images, fit.images]), torch.cat([train.targets, fit.targets]), images.classes)
    return FlowSets(train, fit, both)


def _cut(images: Images, count: int, seed: int) -> Images:
    if not count:
        return images
    return images.subset(items_per_class(images.targets, count, torch.Generator().manual_seed(seed)))


# ---------------------------------------------------------------- batches


class Stream:
    """Batches of a set as the flow takes them: (x in [0, 1] (B, C, H, W), labels (B,), dequantisation noise in [0, 1)
    of the flow's input, images of the batch over all processes).

    The set stays on the device. Random numbers are a function of (seed, use, epoch, batch), drawn for the whole batch,
    of which a process keeps its rows. `use` TRAIN shuffles, leaves out a last batch with fewer images than processes,
    and takes the images of `merged` from `merged_from` on; TEST has no transforms but black padding.
    """

    def __init__(
        self, images: Images, config: Config, dist: Distributed, use: int, batch_size: int, merged: Images | None = None
    ):
        self.config, self.dist, self.use, self.batch_size = config, dist, use, batch_size
        self.images, self.merged, self.joins = images, merged, config.merged_from
        self.trains, self.test = use == Use.TRAIN, use == Use.TEST
        self.recipe = augment.RECIPES[config.dataset.augmentation]
        self.noise = config.test_noise if self.test else config.train_noise
        self._held: tuple[Images, Batches] | None = None
        self._epoch = 0

    def __len__(self) -> int:
        """Batches of the epoch under way."""
        return self.batches(self._epoch)

    def _at(self, epoch: int) -> Images:
        return self.images if self.merged is None or epoch < self.joins else self.merged

    def _sizes(self, epoch: int) -> list[int]:
        count = len(self._at(epoch))
        sizes = [min(self.batch_size, count - start) for start in range(0, count, self.batch_size)]
        return sizes[:-1] if self.trains and sizes[-1] < self.dist.world else sizes

    def batches(self, epoch: int) -> int:
        """Batches of an epoch."""
        return len(self._sizes(epoch))

    def steps(self, epochs: int) -> int:
        """Batches of the first `epochs` epochs."""
        early = min(epochs, self.joins) if self.merged is not None else epochs
        return early * self.batches(0) + (epochs - early) * self.batches(epochs)

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor, Tensor, int]]:
        """Batches `start`, `start` + 1, ... of `epoch`; a process without rows of a batch skips it."""
        self._epoch, images, config, dist = epoch, self._at(epoch), self.config, self.dist
        if self._held is None or self._held[0] is not images:
            self._held = images, Batches(
                images, self.batch_size, config.seed, self.trains, drop_last=False, rank=dist.rank, world=dist.world,
                device=dist.device, hold=True,
            )  # fmt: skip
        sizes = self._sizes(epoch)
        for index, (pixels, y) in enumerate(self._held[1].epoch(epoch, start), start):
            if index < len(sizes) and len(y):
                rng = generator(config.seed, self.use, epoch, index, device=dist.device)
                x, noise = self._prepared(pixels, sizes[index], rng)
                yield x, y, noise, sizes[index]

    def _prepared(self, pixels: Tensor, count: int, rng: torch.Generator) -> tuple[Tensor, Tensor]:
        start, stop = own_rows(count, self.dist)
        if self.test:
            pixels = augment.for_test(pixels, self.recipe)
        else:
            draws = augment.Draws.make(self.recipe, count, rng).rows(start, stop)
            pixels = augment.for_training(pixels, self.recipe, draws)
        x = pixels.to(torch.float64 if self.config.trainer_precision == 64 else torch.float32) / 255
        if self.noise:
            shape = (count, *pixels.shape[1:])
            x = x + self.noise * torch.rand(shape, generator=rng, device=rng.device)[start:stop].to(x)
        shape = (count, x.shape[1], x.shape[2] + self.config.band_rows, x.shape[3])
        return x, torch.rand(shape, generator=rng, device=rng.device)[start:stop].to(x)


def own_rows(count: int, dist: Distributed) -> tuple[int, int]:
    """The rows of a batch of `count` images that this process works on, as `Batches` deals them out."""
    parts = np.array_split(np.arange(count), dist.world)
    start = sum(len(part) for part in parts[: dist.rank])
    return start, start + len(parts[dist.rank])


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
