"""Tiny ImageNet and the downsampled ImageNet (32x32, 64x64), from their published layouts."""

import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.datasets.base import MAX_BYTES, ImageSet
from common.datasets.files import FileSet, FolderSet, absent, first_present, tree
from common.datasets.readers import NpzFile, read_array_pickle, reading, whole_labels
from common.errors import UserError
from common.images import natural_sorted

CLASSES = 1000


class ChunkSet(ImageSet):
    """Flat images in several files, uint8 (n_k, 3 * S * S), channel by channel; each array may be memory-mapped."""

    def __init__(self, name: str, split: str, chunks: list[np.ndarray], targets: Tensor, side: int, **facts: Any):
        super().__init__(name, split, targets, (3, side, side), **facts)
        self._chunks = chunks
        self._starts = np.cumsum([0] + [len(chunk) for chunk in chunks])

    def _fetch(self, rows: np.ndarray) -> Tensor:
        images = np.empty((len(rows), 3, self.height, self.width), np.uint8)
        places = np.searchsorted(self._starts, rows, side="right") - 1
        for k in np.unique(places):
            mine = np.flatnonzero(places == k)
            images[mine] = self._chunks[k][rows[mine] - self._starts[k]].reshape(-1, *images.shape[1:])
        return torch.from_numpy(images)


def _batch(path: Path, side: int) -> tuple[np.ndarray, np.ndarray]:
    """(flat images, labels 0..999) of one batch file, npz or pickle."""
    if path.suffix == ".npz":
        archive = NpzFile(path)
        labels, data = archive.read("labels", 1 << 26), archive.mapped("data")
        if data is None:
            size = math.prod(archive.header("data")[0])
            if size > MAX_BYTES // 4:
                raise UserError(
                    f"{path} is compressed and takes {size:,} bytes in memory: store it once by "
                    f"`python -m common.datasets.prepare imagenet{side}`"
                )
            data = archive.read("data")
    else:
        batch = read_array_pickle(path, 1 << 33)
        data, labels = batch.get("data"), batch.get("labels", ())
    labels = whole_labels(labels, path) - 1  # published 1..1000
    if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape != (len(labels), 3 * side * side):
        raise UserError(f"{path} does not hold {side}x{side} images and their labels; get it again")
    if len(labels) and (labels.min() < 0 or labels.max() >= CLASSES):
        raise UserError(f"{path}: labels must lie in 1..{CLASSES}, found {labels.min() + 1}..{labels.max() + 1}")
    return data, labels


def batch_files(root: Path, side: int, split: str) -> list[Path]:
    """The published batch files of a split (`train_data_batch_1` ... or `val_data`, with or without .npz)."""
    part = "train" if split == "train" else "val"
    bases = [root / f"imagenet{side}", root / f"ImageNet{side}", root]
    names = ["", *(f"Imagenet{side}_{part}{end}" for end in ("_npz", ""))]
    pattern = re.compile(r"train_data_batch_\d+(\.npz)?" if part == "train" else r"val_data(\.npz)?")
    for folder in (base / name for base in bases for name in names):
        if folder.is_dir():
            found = natural_sorted(p for p in folder.iterdir() if pattern.fullmatch(p.name))
            if found:
                return found
    return []


def load_imagenet(name: str, root: Path, split: str, **options: Any) -> ImageSet:
    """Downsampled ImageNet: uint8 (3, S, S); `valid` and `test` both are the official validation images.

    From the npz (or pickled) batches with labels, read where they lie, else from folders `train_SxS`, `valid_SxS` of
    images, without labels (targets 0) unless their sub-folders are named by WordNet ids.
    """
    side = int(name.removeprefix("imagenet"))
    files = batch_files(root, side, split)
    if files:
        transform = options.pop("transform", None)
        given = [key for key, value in options.items() if value is not None]
        if given:
            raise UserError(f"{name}: the batch files are {side}x{side} already, {given[0]} does not apply")
        chunks, labels = zip(*(_batch(path, side) for path in files), strict=True)
        targets = torch.from_numpy(np.concatenate(labels))
        classes = [str(i) for i in range(CLASSES)]
        return ChunkSet(name, split, list(chunks), targets, side, classes=classes, transform=transform)
    stem = "train" if split == "train" else "valid"
    bases = (root / f"imagenet{side}", root)
    folder = first_present([base / f"{s}_{side}x{side}" for base in bases for s in {stem, stem.removesuffix("id")}])
    if folder is None:
        expected = root / f"imagenet{side}" / ("train_data_batch_1.npz" if split == "train" else "val_data.npz")
        raise absent(name, expected, f"(or a folder {stem}_{side}x{side} of images)")
    options = {"image_size": side, **{k: v for k, v in options.items() if v is not None}}
    subs = [p.name for p in folder.iterdir() if p.is_dir()]
    if subs and all(re.fullmatch(r"n\d{8}", sub) for sub in subs):
        return FolderSet(name, folder, split, train=folder.with_name(f"train_{side}x{side}"), **options)
    paths = tree(folder)
    if not paths:
        raise UserError(f"{folder} holds no images; prepare {name} again")
    return FileSet(name, split, paths, torch.zeros(len(paths), dtype=torch.int64), **options)


def load_tiny_imagenet(root: Path, split: str, **options: Any) -> FileSet:
    """Tiny ImageNet: uint8 (3, 64, 64), 200 classes in the order of their WordNet ids.

    `valid` and `test` both are the 10,000 labelled validation images (the official test images have no labels).
    """
    folder = first_present([root / "tiny-imagenet-200", root / "tiny_imagenet"])
    if folder is None:
        raise absent("tiny_imagenet", root / "tiny-imagenet-200")
    options = {"image_size": 64, **{k: v for k, v in options.items() if v is not None}}
    if split == "train":
        return FolderSet("tiny_imagenet", _part(folder, "train"), split, **options)
    notes = _part(folder, "val") / "val_annotations.txt"
    if not notes.is_file():
        return FolderSet("tiny_imagenet", folder / "val", split, train=folder / "train", **options)
    classes = sorted(p.name for p in _part(folder, "train").iterdir() if p.is_dir())
    code = {wnid: i for i, wnid in enumerate(classes)}
    paths, targets = [], []
    with reading(notes, "annotations"):
        lines = notes.read_text().splitlines()
    for number, line in enumerate(lines, start=1):
        cells = line.split("\t")
        if len(cells) < 2 or cells[1] not in code or "/" in cells[0]:
            raise UserError(f"{notes}, line {number}: expected a file name and a class, got {line[:60]!r}")
        paths.append(folder / "val" / "images" / cells[0])
        targets.append(code[cells[1]])
    if not paths:
        raise UserError(f"{notes} is empty; prepare tiny_imagenet again")
    return FileSet("tiny_imagenet", split, paths, torch.tensor(targets), classes, **options)


def _part(folder: Path, name: str) -> Path:
    if not (folder / name).is_dir():
        raise absent("tiny_imagenet", folder / name)
    return folder / name
