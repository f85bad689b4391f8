"""Labelled image sets that fit in memory: MNIST, Fashion-MNIST, SVHN, CIFAR-10, CIFAR-100, scikit-learn's digits."""

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from common.datasets.base import MAX_BYTES, ArraySet
from common.datasets.files import FolderSet, absent, first_present, fit
from common.datasets.readers import read_array_pickle, read_idx, read_mat, whole_labels
from common.errors import UserError

FASHION = ("T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot")
DIGITS = tuple("0123456789")
IDX_FILES = {
    "train": ("train-images-idx3-ubyte", "train-labels-idx1-ubyte"),
    "test": ("t10k-images-idx3-ubyte", "t10k-labels-idx1-ubyte"),
}
IDX_FOLDERS = {"mnist": ("MNIST/raw", "mnist"), "fashion_mnist": ("FashionMNIST/raw", "fashion_mnist")}
CIFAR_CLASSES = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")


def _finish(
    name: str, split: str, images: np.ndarray, labels: np.ndarray, classes: Sequence[str], source: Path | str, *,
    pad: int = 0, image_size: int | None = None, transform: Callable[[Tensor], Tensor] | None = None, **facts: Any,
) -> ArraySet:  # fmt: skip
    """Check (N, C, H, W) images against their labels, pad them with black and resize them."""
    if len(images) != len(labels) or not len(images):
        raise UserError(f"{source}: {len(images)} images and {len(labels)} labels do not make {name}; get it again")
    if labels.min() < 0 or labels.max() >= len(classes):
        raise UserError(f"{source}: labels {labels.min()}..{labels.max()}, {name} has {len(classes)} classes")
    side = image_size or images.shape[2] + 2 * pad
    if pad < 0 or side < 1 or images.shape[0] * images.shape[1] * side * side > MAX_BYTES:
        raise UserError(
            f"{name}: pad={pad}, image_size={image_size} must be positive, and the images at most {MAX_BYTES:,} bytes"
        )
    if pad:
        images = np.pad(images, ((0, 0), (0, 0), (pad, pad), (pad, pad)))
    if image_size and images.shape[2:] != (image_size, image_size):
        small = np.empty((*images.shape[:2], image_size, image_size), np.uint8)
        for row, image in enumerate(images):
            picture = Image.fromarray(image[0] if len(image) == 1 else image.transpose(1, 2, 0))
            small[row] = fit(picture, image_size)
        images = small
    options = {"pad": pad, "image_size": image_size, **facts}
    tensors = torch.from_numpy(np.require(images, requirements=["C", "W"])), torch.from_numpy(labels)
    return ArraySet(name, split, *tensors, classes=classes, options=options, transform=transform)


def load_idx(name: str, root: Path, split: str, **options: Any) -> ArraySet:
    """MNIST or Fashion-MNIST: uint8 (1, 28, 28), from `MNIST/raw` or `FashionMNIST/raw`, files plain or .gz."""
    folders = [root / folder for folder in IDX_FOLDERS[name]]
    paths = []
    for stem in IDX_FILES[split]:
        path = first_present([folder / (stem + end) for folder in folders for end in ("", ".gz")])
        if path is None:
            raise absent(name, folders[0] / stem)
        paths.append(path)
    images, labels = read_idx(paths[0], 3), read_idx(paths[1], 1).astype(np.int64)
    if images.shape[1:] != (28, 28):
        raise UserError(f"{paths[0]} holds images of {images.shape[2]}x{images.shape[1]}, not {name}'s 28x28")
    classes = DIGITS if name == "mnist" else FASHION
    return _finish(name, split, images[:, None], labels, classes, paths[0], **options)


def load_svhn(root: Path, split: str, **options: Any) -> ArraySet:
    """SVHN's cropped digits: uint8 (3, 32, 32), splits train, test, extra."""
    places = [root / folder / f"{split}_32x32.mat" for folder in ("SVHN", "svhn", "")]
    path = first_present(places)
    if path is None:
        raise absent("svhn", places[0])
    arrays = read_mat(path, ("X", "y"))
    images, labels = arrays["X"], whole_labels(arrays["y"], path)
    if images.ndim != 4 or images.shape[:3] != (32, 32, 3) or images.dtype != np.uint8:
        raise UserError(f"{path}: images {images.dtype} {images.shape} are not SVHN's 32x32x3; get it again")
    images = np.ascontiguousarray(images.transpose(3, 2, 0, 1))
    return _finish("svhn", split, images, np.where(labels == 10, 0, labels), DIGITS, path, **options)  # 10 means 0


def load_cifar(name: str, root: Path, split: str, **options: Any) -> ArraySet:
    """CIFAR-10 or CIFAR-100 (fine labels): uint8 (3, 32, 32).

    From the published Python batches (`cifar-10-batches-py`, `cifar-100-python`), else from class folders
    `<name>/<split>/<class>/*.jpg`, decoded into memory.
    """
    ten = name == "cifar10"
    folder = root / ("cifar-10-batches-py" if ten else "cifar-100-python")
    if not folder.is_dir():
        folder = first_present([root / name / folder.name]) or folder
    if not folder.is_dir():
        return _cifar_folders(name, root, split, folder, **options)
    files = [split]
    if ten:
        files = [f"data_batch_{i}" for i in range(1, 6)] if split == "train" else ["test_batch"]
    images, labels = [], []
    for path in (folder / file for file in files):
        if not path.is_file():
            raise absent(name, path)
        batch = read_array_pickle(path)
        data, fine = batch.get("data"), batch.get("labels" if ten else "fine_labels")
        if not isinstance(data, np.ndarray) or data.dtype != np.uint8 or data.shape[1:] != (3072,) \
                or not isinstance(fine, (list, tuple, np.ndarray)):  # fmt: skip
            raise UserError(f"{path} does not hold {name}'s images and labels; get it again")
        images.append(data.reshape(-1, 3, 32, 32))
        labels.append(whole_labels(fine, path))
        if len(labels[-1]) != len(data):
            raise UserError(f"{path} holds {len(data)} images and {len(labels[-1])} labels; get it again")
    classes = CIFAR_CLASSES if ten else _cifar100_classes(folder / "meta")
    return _finish(name, split, np.concatenate(images), np.concatenate(labels), classes, folder, **options)


def _cifar100_classes(meta: Path) -> list[str]:
    names = read_array_pickle(meta).get("fine_label_names") if meta.is_file() else [str(i) for i in range(100)]
    if not isinstance(names, list) or len(names) != 100:
        raise UserError(f"{meta} does not hold the names of cifar100's 100 classes; get it again")
    return [name.decode("latin1") if isinstance(name, bytes) else str(name) for name in names]


def _cifar_folders(name: str, root: Path, split: str, expected: Path, **options: Any) -> ArraySet:
    base = first_present([root / place / split for place in (name, f"{name}_jpeg", f"{name}_png")])
    if base is None:
        raise absent(name, expected, f"(or class folders {root / name / split}/<class>/*.jpg)")
    source = FolderSet(name, base, split, train=base.parent / "train", image_size=32)
    found, most = len(source.classes or ()), 10 if name == "cifar10" else 100
    if not 2 <= found <= most:
        raise UserError(f"{base} holds {found} class folder(s), {name} has {most} classes; prepare it again")
    images, targets = source.arrays()
    return _finish(name, split, images.numpy(), targets.numpy(), source.classes, base, **options)


@functools.cache
def _digits() -> tuple[np.ndarray, np.ndarray]:
    """All images and labels of `load_digits`: reading scikit-learn's text file takes longer than a tiny epoch."""
    from sklearn.datasets import load_digits as sklearn_digits

    bunch = sklearn_digits()
    return np.floor(bunch.images * (255 / 16) + 0.5).astype(np.uint8)[:, None], bunch.target.astype(np.int64)


def load_digits(split: str, seed: int = 0, test_fraction: float = 0.2, **options: Any) -> ArraySet:
    """scikit-learn's 1,797 digits: uint8 (1, 8, 8) by rounding 255/16 of the values, split stratified by `seed`."""
    from sklearn.model_selection import train_test_split

    images, targets = _digits()
    rows = np.arange(len(images))
    if split != "all":
        try:
            parts = train_test_split(rows, test_size=float(test_fraction), random_state=seed, stratify=targets)
        except ValueError as error:  # every class must be in both parts
            raise UserError(f"digits: test_fraction={test_fraction} and seed={seed} do not split them") from error
        rows = np.sort(parts[0 if split == "train" else 1])
    facts = {"seed": seed, "test_fraction": test_fraction}
    return _finish("digits", split, images[rows], targets[rows], DIGITS, "digits", **options, **facts)
