"""What every image set offers: items, batches by index, whole arrays, a fingerprint, seeded subsets and splits."""

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset
from tqdm import tqdm

from common.errors import UserError

MAX_BYTES = 8_000_000_000


class ImageSet(Dataset):
    """Images with integer targets: `len`, `[i] -> (uint8 (C, H, W), int64 target)`, `images_at(rows)`, `targets`.

    A subclass gives `_fetch(rows: int64 (n,)) -> uint8 (n, C, H, W)`. `transform` takes one uint8 (C, H, W) tensor; it
    counts as random (`is_random`) unless it carries an attribute `is_random = False`.
    """

    def __init__(
        self, name: str, split: str, targets: Tensor | None, image_shape: tuple[int, int, int],
        classes: Sequence[str] | None = None, options: dict[str, Any] | None = None,
        transform: Callable[[Tensor], Tensor] | None = None,
    ):  # fmt: skip
        self.name, self.split = name, split
        if targets is not None:  # else the class makes them when they are asked for
            self.targets = targets
        self.channels, self.height, self.width = image_shape
        self.classes = None if classes is None else list(classes)
        self.options = dict(options or {})
        self.transform = transform

    @property
    def image_size(self) -> int | tuple[int, int]:
        """The side of a square image, else (height, width)."""
        return self.height if self.height == self.width else (self.height, self.width)

    @property
    def is_random(self) -> bool:
        """Whether an item differs from one read to the next (then it draws from torch's global generator)."""
        return self.transform is not None and getattr(self.transform, "is_random", True)

    def __len__(self) -> int:
        return len(self.targets)

    def _fetch(self, rows: np.ndarray) -> Tensor:
        raise TypeError(f"{type(self).__name__} does not say how to fetch images")

    def rows(self, index: Any) -> np.ndarray:
        """`index` (an int, a sequence, an array or a tensor) as int64 rows (n,); IndexError beyond the set."""
        if isinstance(index, Tensor):
            index = index.cpu().numpy()
        rows = np.atleast_1d(np.asarray(index))
        if rows.size == 0:
            return np.zeros(0, np.int64)
        if rows.ndim != 1 or rows.dtype.kind not in "iu":
            raise TypeError(f"an index must be whole numbers in one axis, not {rows.dtype} {rows.shape}")
        rows = rows.astype(np.int64)
        low, high = rows.min(), rows.max()
        if low < -len(self) or high >= len(self):
            raise IndexError(f"index {high if high >= len(self) else low} is outside {self.name}'s {len(self)} items")
        return np.where(rows < 0, rows + len(self), rows)

    def images_at(self, index: Any) -> Tensor:
        """The images of many rows at once: uint8 (n, C, H, W), through the transform where there is one."""
        images = self._fetch(self.rows(index))
        if self.transform is not None and len(images):
            images = torch.stack([self.transform(image) for image in images])
        return images

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images_at(index)[0], self.targets[index]

    def arrays(self, max_bytes: int = MAX_BYTES) -> tuple[Tensor, Tensor]:
        """(uint8 (N, C, H, W), int64 targets (N,) or (N, F)) in memory.

        Raises UserError when the images exceed `max_bytes`, or when a random transform makes them ambiguous.
        """
        size = len(self) * self.channels * self.height * self.width
        if size > max_bytes:
            raise UserError(
                f"{self.name} ({self.split}) takes {size:,} bytes in memory, more than max_bytes={max_bytes:,}: "
                "read it by images_at(rows), or raise max_bytes"
            )
        if self.is_random:
            raise UserError(f"{self.name} has a random transform, so it has no fixed arrays; load it without")
        step = 1024
        starts = tqdm(range(0, len(self), step), f"reading {self.name}", disable=None, leave=False, delay=2)
        return torch.cat([self.images_at(np.arange(i, min(i + step, len(self)))) for i in starts]), self.targets

    def in_memory(self) -> "ArraySet":
        """The same set, every image decoded now: an unreadable file is named before any work."""
        images, targets = self.arrays()
        return ArraySet(self.name, self.split, images, targets, classes=self.classes, options=self.options)

    def fingerprint(self) -> str:
        """16 hex digits that change with the name, split, length, options, and the first or last item."""
        facts = {"name": self.name, "split": self.split, "n": len(self), "options": self.options}
        digest = hashlib.sha256(json.dumps(facts, sort_keys=True, default=str).encode())
        for row in {0, len(self) - 1} if len(self) else ():
            digest.update(self._fetch(np.array([row])).numpy().tobytes())
            digest.update(np.asarray(self.targets[row]).tobytes())
        return digest.hexdigest()[:16]


class ArraySet(ImageSet):
    """A set held in memory (or memory-mapped): `images` uint8 (N, C, H, W) as a tensor or a numpy array."""

    def __init__(self, name: str, split: str, images: Tensor | np.ndarray, targets: Tensor, **facts: Any):
        super().__init__(name, split, targets, tuple(images.shape[1:]), **facts)
        self.images = images

    def _fetch(self, rows: np.ndarray) -> Tensor:
        if isinstance(self.images, Tensor):
            return self.images[torch.from_numpy(rows)]
        return torch.from_numpy(np.ascontiguousarray(self.images[rows]))

    def arrays(self, max_bytes: int = MAX_BYTES) -> tuple[Tensor, Tensor]:
        if isinstance(self.images, Tensor) and self.transform is None:
            return self.images, self.targets
        return super().arrays(max_bytes)


class FactorSet(ImageSet):
    """Every combination of known factors once, row-major (the last factor varies fastest).

    `factor_names`, `factor_sizes`; the target of an item is its factor vector, int64 (F,).
    """

    def __init__(
        self,
        name: str,
        split: str,
        factors: dict[str, int],
        image_shape: tuple[int, int, int],
        *more: Any,
        **facts: Any,
    ):
        self.factor_names, self.factor_sizes = list(factors), tuple(factors.values())
        if min(self.factor_sizes) < 1:
            raise UserError(f"{name}: every factor needs at least one value, got {self.factor_sizes}")
        super().__init__(name, split, None, image_shape, *more, **facts)

    def __len__(self) -> int:
        return math.prod(self.factor_sizes)

    @cached_property
    def targets(self) -> Tensor:
        """All factor vectors, int64 (N, F); made on first use."""
        return torch.from_numpy(self.factors_of(np.arange(len(self))))

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images_at(index)[0], torch.from_numpy(self.factors_of(index)[0])

    def factors_of(self, index: Any) -> np.ndarray:
        """The factors of many rows: int64 (n, F)."""
        return np.stack(np.unravel_index(self.rows(index), self.factor_sizes), axis=1)

    def index_of(self, factors: Any) -> np.ndarray:
        """The rows of factor vectors (n, F) or (F,): int64 (n,); ValueError for a value outside its factor."""
        factors = np.atleast_2d(np.asarray(factors))
        if factors.shape[1] != len(self.factor_sizes):
            raise ValueError(f"{self.name} has {len(self.factor_sizes)} factors, got vectors of {factors.shape[1]}")
        return np.ravel_multi_index(tuple(factors.astype(np.int64).T), self.factor_sizes)


class Subset(ImageSet):
    """Rows of another set, in the given order (of a factor set with `factor_names`, `factor_sizes`, `factors_of`)."""

    def __init__(self, parent: ImageSet, indices: Any, label: str = "subset"):
        self.parent, self.indices = parent, parent.rows(indices)
        shape = (parent.channels, parent.height, parent.width)
        options = {**parent.options, label: hashlib.sha256(self.indices.tobytes()).hexdigest()[:16]}
        super().__init__(parent.name, parent.split, None, shape, parent.classes, options, parent.transform)
        if hasattr(parent, "factor_names"):
            self.factor_names, self.factor_sizes = parent.factor_names, parent.factor_sizes

    def __len__(self) -> int:
        return len(self.indices)

    @cached_property
    def targets(self) -> Tensor:
        """The targets of the rows of this subset."""
        return self.parent.targets[torch.from_numpy(self.indices)]

    def _fetch(self, rows: np.ndarray) -> Tensor:
        return self.parent._fetch(self.indices[rows])

    def factors_of(self, index: Any) -> np.ndarray:
        """The factors of many rows of a factor set's subset: int64 (n, F)."""
        return self.parent.factors_of(self.indices[self.rows(index)])


def subset(dataset: ImageSet, n: int | None = None, seed: int = 0, indices: Any = None) -> Subset:
    """A part of `dataset`: the rows `indices`, or a seeded choice of `n` items, in ascending order.

    With one seed a smaller part lies within a larger one. Raises UserError when there are not enough items.
    """
    if (n is None) == (indices is None):
        raise UserError("subset() takes exactly one of n and indices")
    if indices is not None:
        return Subset(dataset, indices)
    if not 0 < n <= len(dataset):
        raise UserError(f"{dataset.name} ({dataset.split}) has {len(dataset)} items, not {n}")
    return Subset(dataset, np.sort(np.random.default_rng(seed).permutation(len(dataset))[:n]))


def split(dataset: ImageSet, sizes: Sequence[int], seed: int = 0) -> list[Subset]:
    """Disjoint parts of the given numbers of items, drawn by `seed`. Raises UserError when the sizes do not fit."""
    if not sizes or min(sizes) < 0 or sum(sizes) > len(dataset):
        raise UserError(
            f"parts of {list(sizes)} do not fit the {len(dataset)} items of {dataset.name} ({dataset.split})"
        )
    order = np.random.default_rng(seed).permutation(len(dataset))
    ends = np.cumsum(sizes)
    return [Subset(dataset, order[end - count : end]) for end, count in zip(ends, sizes, strict=True)]
