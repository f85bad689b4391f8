"""The data sets as the network sees them: uint8 (C, S, S), in a fixed order, without augmentation."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from common import datasets
from common.datasets.base import ImageSet, Subset
from common.datasets.folder import Column, Table
from common.errors import UserError
from lbae.options import CROPPED, Params

HELD_OUT = 0.1  # of a folder without train/ and test/
FACTOR_IMAGES = {"train": 8000, "test": 2000}  # drawn from a set of factor combinations, which has no splits of its own


def load_split(params: Params, split: str) -> ImageSet:
    """The `train` or `test` images of `params.dataset`, of `params.img_size`, limited to train_images / test_images.

    A folder without train/ and test/ gives a tenth of its images, drawn by held_out_seed, for testing. Its targets are
    the CSV's attributes where there is one, else its classes. Raises UserError when the data are absent, or do not have
    the model's number of channels. A training downloads a small public set that is absent.
    """
    name = params.dataset
    options = {"image_size": params.img_size}
    if name in ("mnist", "fashion_mnist"):
        options["pad"] = 2  # 28x28 becomes 32x32 with a black frame, as published
    elif name in CROPPED:
        options |= {"crop": params.img_crop_size or None, "channels": params.channels}
    if name == "folder":
        options |= {"held_out": HELD_OUT, "seed": params.held_out_seed, "labels": params.labels}
    full = datasets.load(name, params.data_root or None, split, fetch=not params.eval, **options)
    if getattr(full, "table", None) is not None:
        full.targets, full.classes = table_attributes(full.table, params.labels)
    limit = params.train_images if split == "train" else params.test_images
    rows = np.arange(len(full))
    if hasattr(full, "factor_sizes"):
        n = FACTOR_IMAGES
        drawn = np.random.default_rng(0).permutation(len(full))[: n["train"] + n["test"]]
        rows = drawn[: n["train"]] if split == "train" else drawn[n["train"] :]
    data = Subset(full, rows[:limit] if limit else rows)
    if (data.channels, data.height, data.width) != (params.channels, params.img_size, params.img_size):
        raise UserError(
            f"{name} gives {data.channels} channel(s) of {data.height}x{data.width} pixels, the model takes "
            f"{params.channels} of {params.img_size}x{params.img_size}; set channels= and img_size="
        )
    return data


def table_attributes(table: Table, source: str) -> tuple[Tensor, list[str]]:
    """Attributes int64 (N, A), 0 (also where missing) or 1, and their names: a CSV's binary columns, and one for each
    word of its class and its categorical columns. Raises UserError where it has none.
    """
    columns = _label_columns(table)
    if not columns:
        raise UserError(f"{source} has no attributes: every column holds numbers; write 0 and 1, or words")
    names, values = zip(*(column.encoded() for column in columns), strict=True)
    names, table_values = [name for part in names for name in part], np.concatenate(values, axis=1)
    if len(names) == 1:  # one column of labels is taken for classes
        names, table_values = [f"not {names[0]}", names[0]], np.concatenate([1 - table_values, table_values], axis=1)
    return torch.from_numpy(np.nan_to_num(table_values).astype(np.int64)), names


def _label_columns(table: Table) -> list[Column]:
    """The columns of a CSV that are attributes."""
    return [one for one in (table.classes, *table.concepts) if one and one.kind != "continuous"]


def attribute_groups(data: Subset, names: Sequence[str]) -> list[tuple[str, int]]:
    """Names and sizes of the groups that the attributes `names` of a split form, in their order: the values of a factor
    or of a CSV's column, and all classes, of which an image has one; else each by itself.
    """
    if hasattr(data, "factor_sizes"):
        return list(zip(data.factor_names, data.factor_sizes, strict=True))
    if (table := getattr(data.parent, "table", None)) is not None:
        columns = _label_columns(table)
        return [(one.name, len(names) if len(columns) == 1 else len(one.encoded()[0])) for one in columns]
    return [("class", len(names))] if data.targets.ndim == 1 else [(name, 1) for name in names]


def attribute_names(data: ImageSet) -> list[str]:
    """The names that `set_attr` takes: of classes, attributes, or the values of factors; [] where there are none."""
    if hasattr(data, "factor_sizes"):
        factors = zip(data.factor_names, data.factor_sizes, strict=True)
        return [f"{name}={value}" for name, size in factors for value in range(size)]
    return list(data.classes or ())


def attributes(data: ImageSet, targets: Tensor) -> Tensor:
    """Labels int64 (B, 1) of classes or (B, A) of 0/1 attributes, from a batch of targets.

    The true factors (B, F) of a factor set become one attribute a value: shape 0, 1, 2, then scale 0, ...
    """
    if hasattr(data, "factor_sizes"):
        columns = [F.one_hot(targets[:, i], size) for i, size in enumerate(data.factor_sizes)]
        return torch.cat(columns, 1)
    return targets.reshape(len(targets), -1)


def as_input(images: Tensor) -> Tensor:
    """uint8 (B, C, S, S) -> float32 in [0, 1], channels last: convolutions are faster so."""
    x = images.float() / 255
    return x if x.device.type == "mps" else x.contiguous(memory_format=torch.channels_last)
