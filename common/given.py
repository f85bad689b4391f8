"""What a user gives to a public part: taken as tensors and numbers, or refused in one line (`UserError`)."""

import math
from collections.abc import Callable
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError

SLACK = 1e-4  # beyond a range: what resizing an image rounds


def as_tensor(values: Any, name: str) -> Tensor:
    """Numbers, or an array or nested lists of them, as a tensor; a tensor as it is. Raises UserError for the rest."""
    if isinstance(values, Tensor):
        return values
    try:
        return torch.from_numpy(np.require(values, requirements=["C", "W"]))
    except (TypeError, ValueError):
        raise UserError(f"{name} must be a tensor or an array of numbers, not {type(values).__name__}") from None


def floats(
    values: Any, name: str, shape: tuple[int | str, ...], like: Tensor, span: tuple[float, float] | None = None,
    least: int = 0,
) -> Tensor:  # fmt: skip
    """An array or a tensor of a `shape`, in the dtype and on the device of `like`; gradients pass.

    shape: sizes, and "B" for any number, as in ("B", 1, 28, 28). span: the least and the largest value. least: rows,
    at least. Signed integers are taken, too. Raises UserError for what is no array of numbers, for another shape or
    type (uint8, bool), and for values that are not finite or lie outside. A compiler, an export, a transform of
    `torch.func` and a CUDA graph see no values: there only the shape and the type are checked.
    """
    x = as_tensor(values, name)
    sizes = zip(shape, x.shape, strict=False)
    if x.ndim != len(shape) or any(size != got for size, got in sizes if size != "B") or x.shape[0] < least:
        wanted = f"({', '.join(map(str, shape))}{',' * (len(shape) == 1)})" + ", at least one" * (least > 0)
        raise UserError(f"{name} of shape {tuple(x.shape)}: expected {wanted}")
    if x.is_complex() or not x.dtype.is_signed:
        raise UserError(f"{name} of {x.dtype}: expected floats" + (f" in [{span[0]:g}, {span[1]:g}]" if span else ""))
    x = x.to(like)
    if readable(x) and x.numel():
        low, high = torch.stack(x.detach().aminmax()).tolist()
        if not (math.isfinite(low) and math.isfinite(high)):
            raise UserError(f"{name} hold NaN or infinite values")
        if span is not None and not span[0] - SLACK <= low <= high <= span[1] + SLACK:
            raise UserError(f"{name} in [{low:.4g}, {high:.4g}]: expected [{span[0]:g}, {span[1]:g}]")
    return x


def readable(x: Tensor) -> bool:
    """Whether the values of `x` may be asked for, which a graph that is being made of a function does not allow."""
    hidden = torch.compiler.is_compiling() or x.is_meta or torch._C._functorch.is_functorch_wrapped_tensor(x)
    return not (hidden or (x.is_cuda and torch.cuda.is_current_stream_capturing()))


def zero_one(x: Tensor) -> bool:
    """Whether `x` holds zeros and ones alone, and both; False where its values may not be asked for."""
    return readable(x) and x.numel() > 0 and bool(((x == 0) | (x == 1)).all() and x.min() < x.max())


def whole(n: Any, name: str, least: int = 1) -> int:
    """`n` as an int. Raises UserError for what is no whole number of at least `least`."""
    if isinstance(n, bool) or not isinstance(n, Integral) or n < least:
        raise UserError(f"{name}={n!r}: expected a whole number, at least {least}")
    return int(n)


def number(value: Any, name: str, least: float = 0, above: bool = False) -> float:
    """`value` as a float. Raises UserError for what is no finite number of at least `least`, or above it."""
    if not isinstance(value, Real) or not least <= value < math.inf or (above and value == least):
        raise UserError(f"{name}={value!r}: expected a finite number, {'above' if above else 'at least'} {least:g}")
    return float(value)


def function(value: Any, name: str) -> Callable:
    """`value`. Raises UserError for what cannot be called."""
    if not callable(value):
        raise UserError(f"{name}={value!r}: expected a function")
    return value


def classes(labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The sorted classes (C,) of labels (n,), numbers or text; each label's place among them (n,); how often (C,).

    Raises UserError for None and NaN among the labels, and for those that have no order.
    """
    if labels.dtype == object and any(label is None for label in labels):
        raise UserError("labels hold None: expected numbers or text, one an input")
    if (labels != labels).any():
        raise UserError("labels hold NaN: leave these inputs out, or give them a class")
    try:
        return np.unique(labels, return_inverse=True, return_counts=True)
    except TypeError as error:
        raise UserError(f"labels must be numbers or text, all of one kind: {error}") from error
