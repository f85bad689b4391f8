"""Batches in an order that is a pure function of (seed, epoch), so that a run resumes in the middle of an epoch."""

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from common.errors import UserError


class _SeededItems(Dataset):
    """Items of a dataset with random transforms: item (epoch, index) draws from a generator of (seed, epoch, index)."""

    def __init__(self, dataset: Any, seed: int):
        self.dataset, self.seed = dataset, seed

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, place: tuple[int, int]) -> tuple:
        epoch, index = place
        if not getattr(self.dataset, "is_random", False):
            return self.dataset[index]
        word = int(np.random.SeedSequence([self.seed, epoch, index]).generate_state(1, np.uint64)[0])
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(word)  # torch.manual_seed visits every device, at 400 times the cost
            return self.dataset[index]


class Batches:
    """Batches of (images, targets) of `dataset`.

    `dataset` gives `len`, `[i] -> (uint8 (C, H, W) tensor, target)`, and, where it can fetch many at once,
    `images_at(indices)` and `targets` (used when `workers` is 0). `batch_size` is the total over `world` processes;
    process `rank` receives its share of every batch. A dataset whose attribute `is_random` is true draws each item's
    random numbers from (seed, epoch, index), whatever the number of workers. `hold=True` keeps an in-memory dataset on
    `device`.

    Raises UserError when the total batch size is not a multiple of the number of processes, or exceeds the data set
    with `drop_last`.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        drop_last: bool = True,
        workers: int = 0,
        rank: int = 0,
        world: int = 1,
        device: torch.device | str | None = None,
        hold: bool = False,
    ):
        if batch_size < 1 or batch_size % world:
            raise UserError(f"batch size {batch_size} must be a positive multiple of the {world} process(es)")
        if len(dataset) == 0:
            raise UserError("the data set is empty")
        if drop_last and batch_size > len(dataset):
            raise UserError(f"batch size {batch_size} exceeds the {len(dataset)} items of the data set; lower it")
        self.dataset, self.batch_size, self.seed = dataset, batch_size, seed
        self.shuffle, self.drop_last, self.workers = shuffle, drop_last, workers
        self.rank, self.world, self.device = rank, world, device
        random_items = getattr(dataset, "is_random", False)
        self._direct = not (random_items or workers) and hasattr(dataset, "images_at") and hasattr(dataset, "targets")
        self._held: tuple[Tensor, Tensor] | None = None
        if hold and not random_items and hasattr(dataset, "arrays"):
            images, targets = dataset.arrays()
            self._held = images.to(device or "cpu"), targets.to(device or "cpu")

    def __len__(self) -> int:
        """Batches an epoch."""
        n = len(self.dataset) / self.batch_size
        return math.floor(n) if self.drop_last else math.ceil(n)

    def order(self, epoch: int) -> np.ndarray:
        """The item indices of `epoch` in the order in which they are visited."""
        n = len(self.dataset)
        return np.random.default_rng([self.seed, epoch]).permutation(n) if self.shuffle else np.arange(n)

    def _shares(self, epoch: int, start: int) -> list[np.ndarray]:
        order, share = self.order(epoch), self.batch_size // self.world
        shares = []
        for i in range(start, len(self)):
            batch = order[i * self.batch_size : (i + 1) * self.batch_size]
            if self.world > 1 and len(batch) < self.batch_size:
                shares.append(np.array_split(batch, self.world)[self.rank])
            else:
                shares.append(batch[self.rank * share : (self.rank + 1) * share])
        return shares

    def epoch(self, epoch: int, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches `start`, `start` + 1, ... of `epoch`: (uint8 (B, C, H, W), targets), on `device` when given."""
        shares = self._shares(epoch, start)
        if self._held is not None:
            images, targets = self._held
            for share in shares:
                rows = torch.from_numpy(share).to(images.device, non_blocking=True)
                yield images[rows], targets[rows]
        elif self._direct:
            for share in shares:
                targets = torch.as_tensor(self.dataset.targets[share])
                yield self._move(torch.as_tensor(self.dataset.images_at(share)), targets)
        else:
            yield from self._by_items(epoch, shares)

    def _by_items(self, epoch: int, shares: list[np.ndarray]) -> Iterator[tuple[Tensor, Tensor]]:
        places = [[(epoch, int(i)) for i in share] for share in shares]
        # the loader draws a base seed for its workers; a generator of its own keeps the caller's stream as it was
        loader = DataLoader(
            _SeededItems(self.dataset, self.seed),
            batch_sampler=places,
            num_workers=self.workers,
            pin_memory=self.workers > 0 and torch.cuda.is_available(),
            generator=torch.Generator().manual_seed(self.seed),
        )
        for images, targets in loader:
            yield self._move(images, targets)

    def _move(self, images: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        if self.device is None:
            return images, targets
        return images.to(self.device, non_blocking=True), targets.to(self.device, non_blocking=True)
