"""The one restricted reader of pickles: number arrays, tensors and plain containers, and nothing else of the file.

Published data sets and latents are pickles, and a pickle may name any function of the machine to be called. Here every
name that a file asks for is looked up in a table; the table's entries check what the file claims before they allocate.
"""

import io
import math
import pickle
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import IO, Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError, refuse_web_page

Names = Mapping[tuple[str, str], Any]


class _Dtype:
    """Stands for numpy.dtype: plain numbers only."""

    def __init__(self, code: str, *_: Any):
        self.dtype = np.dtype(code)
        if self.dtype.kind not in "biufO":
            raise pickle.UnpicklingError(f"an array of {self.dtype}")

    def __setstate__(self, state: tuple) -> None:
        if len(state) > 1 and state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


def _array(content: Any, shape: Any, dtype: Any, fortran: Any) -> np.ndarray:
    if isinstance(content, str):  # Python 2 wrote bytes as a latin-1 string
        content = content.encode("latin1")
    if not isinstance(shape, tuple):
        shape = (shape,)
    if isinstance(content, list) and all(isinstance(item, (int, float, np.number)) for item in content):
        array = np.array(content)  # numbers held as objects
        if array.dtype.kind in "biuf":
            return array.reshape(shape, order="F" if fortran else "C")
    if not isinstance(dtype, _Dtype) or dtype.dtype.kind == "O" or not isinstance(content, (bytes, bytearray)):
        raise pickle.UnpicklingError("an array of objects")
    if any(not isinstance(n, int) or n < 0 for n in shape) or math.prod(shape) * dtype.dtype.itemsize != len(content):
        raise pickle.UnpicklingError(f"an array {shape} of {len(content)} bytes")
    return np.frombuffer(bytearray(content), dtype.dtype).reshape(shape, order="F" if fortran else "C")


class _Array:
    """Stands for numpy.ndarray while the file is read: takes the state that an array pickles and checks its size."""

    array: np.ndarray

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, content = state
        self.array = _array(content, shape, dtype, fortran)


class Stated:
    """Stands for an object of a class that `names` maps to it: what is read is the object's state."""

    state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


def _new_array(*_: Any) -> _Array:
    return _Array()


def _from_buffer(content: Any, dtype: Any, shape: Any, order: str, *_: Any) -> np.ndarray:
    return _array(content, shape, dtype, order == "F")


def _scalar(dtype: Any, content: Any = b"") -> Any:
    return _array(content, (), dtype, False)[()]


def _encode(text: str, encoding: str = "latin1") -> bytes:
    return text.encode("latin1")


def _numpy_names() -> dict[tuple[str, str], Any]:
    names: dict[tuple[str, str], Any] = {
        ("numpy", "ndarray"): _Array,
        ("numpy", "dtype"): _Dtype,
        ("_codecs", "encode"): _encode,
    }
    for core in ("numpy.core", "numpy._core"):
        names[f"{core}.multiarray", "_reconstruct"] = _new_array
        names[f"{core}.multiarray", "scalar"] = _scalar
        names[f"{core}.numeric", "_frombuffer"] = _from_buffer
    return names


def _storage(payload: bytes) -> Any:
    return torch.load(io.BytesIO(payload), weights_only=True)


def rebuild_tensor(storage: Any, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
    """A tensor of a storage (or of a flat tensor), refused when its shape claims more numbers than are stored."""
    flat = storage if isinstance(storage, Tensor) else torch.tensor([], dtype=storage.dtype).set_(storage)
    size, stride = tuple(size), tuple(stride)
    if math.prod(size) > flat.numel():
        raise pickle.UnpicklingError(f"a tensor {size} of {flat.numel()} numbers")
    return torch.as_strided(flat, size, stride, offset)


ARRAYS: Names = _numpy_names()
TENSORS: Names = {
    ("collections", "OrderedDict"): OrderedDict,
    ("torch._utils", "_rebuild_tensor_v2"): rebuild_tensor,
    ("torch.storage", "_load_from_bytes"): _storage,
}


class Bounded:
    """A file that refuses to read what it does not hold: a claim of gigabytes would be allocated first."""

    def __init__(self, file: IO[bytes], size: int):
        self._file, self._left = file, size

    def read(self, n: int = -1) -> bytes:
        if n > self._left:
            raise EOFError(f"it claims {n:,} more bytes, and holds {self._left:,}")
        content = self._file.read(n)
        self._left -= len(content)
        return content

    def readline(self) -> bytes:
        content = self._file.readline()
        self._left -= len(content)
        return content


class Unpickler(pickle._Unpickler):
    """Rebuilds plain containers, numbers, strings, and what `names` maps; `other(module, name)` stands for the rest.

    Without `other` any further name is refused. The reader written in Python: the one in C lets a file of a few bytes
    claim a memo of gigabytes. `size`: bytes of the file.
    """

    def __init__(
        self, file: IO[bytes], size: int, names: Names, other: Callable[[str, str], Any] | None = None,
        encoding: str = "latin1",
    ):  # fmt: skip
        super().__init__(Bounded(file, size), encoding=encoding)
        self._names, self._other = names, other

    def find_class(self, module: str, name: str) -> Any:
        """What stands for `module.name`."""
        if (module, name) in self._names:
            return self._names[module, name]
        if self._other is None:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return self._other(module, name)

    def load_build(self) -> None:
        """Give a stand-in its state; a function, a class or a tensor would be changed by one, and is refused."""
        state = self.stack.pop()
        target = self.stack[-1]
        if isinstance(target, OrderedDict):
            return  # notes of a module beside its weights
        take = getattr(type(target), "__setstate__", None)
        if take is None or isinstance(target, Tensor):
            raise pickle.UnpicklingError(f"it sets attributes of a {type(target).__name__}")
        take(target, state)

    dispatch: ClassVar = {**pickle._Unpickler.dispatch, pickle.BUILD[0]: load_build}

    def load(self) -> Any:
        """The content, arrays in place of what stood for them."""
        return _finished(super().load(), {})


def _finished(value: Any, seen: dict[int, Any]) -> Any:
    """`value` with arrays in it; a part that stands at many places is finished once."""
    if isinstance(value, _Array):
        return value.array
    if isinstance(value, Stated):
        return _finished(value.state, seen)
    if not isinstance(value, (list, tuple, dict)):
        return value
    if id(value) not in seen:
        seen[id(value)] = value
        if isinstance(value, dict):
            for key in value:
                value[key] = _finished(value[key], seen)
        elif isinstance(value, list):
            value[:] = [_finished(item, seen) for item in value]
        else:
            seen[id(value)] = tuple(_finished(item, seen) for item in value)
    return seen[id(value)]


def read_pickle(path: str | Path, names: Names, max_bytes: int = 1 << 36, encoding: str = "latin1") -> Any:
    """The content of a pickle of plain containers and what `names` maps; nothing of the file is run.

    Raises UserError for a missing, damaged or too large file, and one that holds anything else.
    """
    path = Path(path)
    refuse_web_page(path)
    try:
        size = path.stat().st_size
        if size > max_bytes:
            raise ValueError(f"{size:,} bytes, more than {max_bytes:,}")
        with open(path, "rb") as file:
            return Unpickler(file, size, names, encoding=encoding).load()
    except FileNotFoundError:
        raise UserError(f"no such file: {path}") from None
    except Exception as error:  # a damaged pickle raises nearly every type
        reason = " ".join(str(error).split())[:120] or type(error).__name__
        raise UserError(f"{path} is refused: damaged, or more than numbers and arrays ({reason})") from error
