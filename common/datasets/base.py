"""What every image set offers: items, batches by index, whole arrays, a fingerprint, seeded subsets and splits."""

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from common.errors import UserError

MAX_BYTES = 8_000_000_000


class ImageSet(Dataset):
    """Images with integer targets: `len`, `[i] -> (uint8 (C, H, W), int64 target)`, `images_at(rows)`, `targets`.

    A subclass gives `_fetch(rows: int64 (n,)) -> uint8 (n, C, H, W)`. `transform` takes one uint8 (C, H, W) tensor; it
    counts as random (`is_random`) unless it carries an attribute `is_random = False`.
    """

    def __init__(
        self,
        name: str,
        split: str,
        targets: Tensor,
        image_shape: tuple[int, int, int],
        classes: Sequence[str] | None = None,
        options: dict[str, Any] | None = None,
        transform: Callable[[Tensor], Tensor] | None = None,
    ):
        self.name, self.split, self.targets = name, split, targets
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
        parts = [self.images_at(np.arange(i, min(i + 4096, len(self)))) for i in range(0, len(self), 4096)]
        return torch.cat(parts), self.targets

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
        classes: Sequence[str] | None = None,
        options: dict[str, Any] | None = None,
        transform: Callable[[Tensor], Tensor] | None = None,
    ):
        self.factor_names, self.factor_sizes = list(factors), tuple(factors.values())
        if min(self.factor_sizes) < 1:
            raise UserError(f"{name}: every factor needs at least one value, got {self.factor_sizes}")
        self.name, self.split = name, split
        self.channels, self.height, self.width = image_shape
        self.classes = None if classes is None else list(classes)
        self.options = dict(options or {})
        self.transform = transform

    def __len__(self) -> int:
        return int(np.prod(self.factor_sizes))

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

    def sample_factors(self, n: int, rng: np.random.RandomState | np.random.Generator) -> np.ndarray:
        """`n` independent uniform factor vectors, int64 (n, F), drawn factor by factor in order."""
        draw = rng.integers if isinstance(rng, np.random.Generator) else rng.randint
        return np.stack([draw(size, size=n) for size in self.factor_sizes], axis=1).astype(np.int64)

    def sample(self, n: int, rng: np.random.RandomState | np.random.Generator) -> tuple[np.ndarray, Tensor]:
        """`n` uniform draws from the grid: (factors int64 (n, F), images uint8 (n, C, H, W))."""
        factors = self.sample_factors(n, rng)
        return factors, self.images_at(self.index_of(factors))


class Subset(ImageSet):
    """Rows of another set, in the given order (of a factor set with `factor_names`, `factor_sizes`, `factors_of`)."""

    def __init__(self, parent: ImageSet, indices: Any, label: str = "subset"):
        self.parent, self.indices = parent, parent.rows(indices)
        self.name, self.split, self.classes = parent.name, parent.split, parent.classes
        self.channels, self.height, self.width = parent.channels, parent.height, parent.width
        self.options = {**parent.options, label: hashlib.sha256(self.indices.tobytes()).hexdigest()[:16]}
        self.transform = parent.transform
        if isinstance(parent, FactorSet) or hasattr(parent, "factor_names"):
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


def subset(
    dataset: ImageSet, n: int | None = None, n_per_class: int | None = None, seed: int = 0, indices: Any = None
) -> Subset:
    """A seeded part of `dataset`: `n` items, or `n_per_class` of each class, or the rows `indices`.

    Rows come in ascending order. With one seed a smaller part lies within a larger one. Raises UserError when there are
    not enough items, or the targets are vectors.
    """
    if sum(choice is not None for choice in (n, n_per_class, indices)) != 1:
        raise UserError("subset() takes exactly one of n, n_per_class and indices")
    if indices is not None:
        return Subset(dataset, indices)
    if n is not None:
        if not 0 < n <= len(dataset):
            raise UserError(f"{dataset.name} ({dataset.split}) has {len(dataset)} items, not {n}")
        return Subset(dataset, np.sort(np.random.default_rng(seed).permutation(len(dataset))[:n]))
    targets = np.asarray(dataset.targets)
    if targets.ndim != 1:
        raise UserError(f"{dataset.name} has vectors as targets, not classes: n_per_class does not apply")
    kept = []
    for label in np.unique(targets):
        rows = np.flatnonzero(targets == label)
        if not 0 < n_per_class <= len(rows):
            raise UserError(
                f"class {label} of {dataset.name} ({dataset.split}) has {len(rows)} items, not {n_per_class}"
            )
        kept.append(np.random.default_rng([seed, int(label)]).permutation(rows)[:n_per_class])
    return Subset(dataset, np.sort(np.concatenate(kept)))


def split(dataset: ImageSet, sizes: Sequence[int | float], seed: int | None = 0) -> list[Subset]:
    """Disjoint parts of the given sizes: whole numbers, or fractions that sum to at most 1.

    The rows are permuted by `seed`; None keeps their order (first part = first rows). Fractions that sum to 1 use every
    item (the last part takes the remainder). Raises UserError when the sizes do not fit.
    """
    total = len(dataset)
    fractions = all(isinstance(size, float) for size in sizes)
    if not sizes or any(size < 0 for size in sizes) or (not fractions and not all(isinstance(s, int) for s in sizes)):
        raise UserError(f"sizes must be all whole numbers or all fractions, got {list(sizes)}")
    counts = [int(size * total + 1e-9) for size in sizes] if fractions else list(sizes)
    if fractions and abs(sum(sizes) - 1) < 1e-9:
        counts[-1] = total - sum(counts[:-1])
    if sum(counts) > total or (fractions and sum(sizes) > 1 + 1e-9):
        raise UserError(f"parts of {list(sizes)} exceed the {total} items of {dataset.name} ({dataset.split})")
    order = np.arange(total) if seed is None else np.random.default_rng(seed).permutation(total)
    ends = np.cumsum(counts)
    return [Subset(dataset, order[end - count : end]) for end, count in zip(ends, counts, strict=True)]
