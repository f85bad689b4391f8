"""Bounded readers of the files that data sets come in: idx, npz, npy, h5, CIFAR's pickles, SVHN's mat, images.

Each checks what a file claims against what it holds before it allocates, and raises UserError naming the file.
"""

import ast
import gzip
import io
import math
import pickle
import struct
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from PIL import Image

from common.errors import UserError

MAX_ELEMENTS = 1 << 36  # no image set that is read here comes near this many bytes
MAX_PIXELS = 100_000_000
# what the readers below raise on damaged or foreign bytes (RuntimeError: an encrypted or unsupported zip member)
DAMAGE = (
    OSError,
    EOFError,
    ValueError,
    LookupError,
    TypeError,
    AttributeError,
    MemoryError,
    OverflowError,
    SyntaxError,
    RuntimeError,
    struct.error,
    zlib.error,
    zipfile.BadZipFile,
    pickle.UnpicklingError,
    Image.DecompressionBombError,
)
PREPARE_AGAIN = "it is damaged or another kind of file; get it again"


@contextmanager
def reading(path: Path, kind: str) -> Iterator[None]:
    """Turn what a damaged or foreign file does to a reader into one line that names the file."""
    try:
        yield
    except UserError:
        raise
    except DAMAGE as error:
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise UserError(f"cannot read {path} as {kind} ({reason}): {PREPARE_AGAIN}") from error


def read_idx(path: Path, dims: int) -> np.ndarray:
    """A uint8 idx file of `dims` axes, plain or gzip (name ending in .gz): uint8 (N, ...), N the first axis."""
    with reading(path, "idx"):
        opener = gzip.open if path.suffix == ".gz" else open
        with opener(path, "rb") as file:
            header = file.read(4 + 4 * dims)
            if len(header) != 4 + 4 * dims or header[:4] != bytes([0, 0, 8, dims]):
                raise ValueError(f"the header is not that of {dims}-dimensional bytes")
            shape = struct.unpack(f">{dims}I", header[4:])
            size = math.prod(shape)
            if size > 1 << 32:
                raise ValueError(f"the header claims {size:,} values")
            if path.suffix != ".gz" and path.stat().st_size != len(header) + size:
                raise ValueError(
                    f"the header claims {size:,} values, the file holds {path.stat().st_size - len(header):,}"
                )
            # a gzip file expands at most to what its header claims, in pieces, so a false claim costs what is there
            content = bytearray()
            while len(content) <= size and (piece := file.read(min(1 << 24, size + 1 - len(content)))):
                content += piece
            if len(content) != size:
                raise ValueError(f"the header claims {size:,} values, the file holds {len(content):,}")
    return np.frombuffer(content, np.uint8).reshape(shape)


def _npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """(shape, Fortran order, dtype) of an npy stream, which then stands at its data."""
    major, _ = np.lib.format.read_magic(file)
    length = struct.unpack("<H" if major == 1 else "<I", file.read(2 if major == 1 else 4))[0]
    if length > 100_000:
        raise ValueError(f"the header claims {length:,} bytes")
    header = ast.literal_eval(file.read(length).decode("latin1"))
    shape, dtype = header["shape"], np.dtype(header["descr"])
    if dtype.hasobject or not isinstance(shape, tuple) or not all(isinstance(n, int) and n >= 0 for n in shape):
        raise ValueError(f"holds {dtype} {shape}, not numbers")
    return shape, bool(header["fortran_order"]), dtype


class NpzFile:
    """An npz file whose arrays are read one at a time: memory-mapped when stored, in pieces when compressed."""

    def __init__(self, path: Path):
        self.path = path
        with reading(path, "npz"):
            self._zip = zipfile.ZipFile(path)
            self._names = {name.removesuffix(".npy"): name for name in self._zip.namelist()}

    def __contains__(self, key: str) -> bool:
        return key in self._names

    def header(self, key: str) -> tuple[tuple[int, ...], np.dtype]:
        """(shape, dtype) of array `key`, checked against the number of bytes the archive says it has."""
        return self._open(key)[1:]

    def _open(self, key: str) -> tuple[IO[bytes], tuple[int, ...], np.dtype]:
        if key not in self._names:
            raise UserError(f"{self.path} has no array '{key}', only {', '.join(sorted(self._names)) or 'none'}")
        with reading(self.path, f"npz array '{key}'"):
            file = self._zip.open(self._names[key])
            shape, fortran, dtype = _npy_header(file)
            size = math.prod(shape) * dtype.itemsize
            held = self._zip.getinfo(self._names[key]).file_size - file.tell()
            if size != held or size > MAX_ELEMENTS:
                raise ValueError(f"'{key}' claims {size:,} bytes for {shape}, the archive holds {held:,}")
            if fortran and len(shape) > 1:
                raise ValueError(f"'{key}' is stored in Fortran order")
        return file, shape, dtype

    def mapped(self, key: str) -> np.ndarray | None:
        """Array `key` memory-mapped read-only, or None when the archive compressed it."""
        file, shape, dtype = self._open(key)
        info = self._zip.getinfo(self._names[key])
        if info.compress_type != zipfile.ZIP_STORED:
            return None
        with reading(self.path, f"npz array '{key}'"), open(self.path, "rb") as raw:
            raw.seek(info.header_offset)
            local = raw.read(30)  # the local header's own name and extra lengths give where the data start
            if local[:4] != b"PK\3\4":
                raise ValueError("a local header is missing")
            name, extra = struct.unpack("<HH", local[26:30])
            start = info.header_offset + 30 + name + extra + file.tell()
            return np.memmap(self.path, dtype, "r", start, shape)

    def blocks(self, key: str, block_bytes: int = 1 << 26) -> Iterator[np.ndarray]:
        """Array `key` as consecutive blocks of rows of about `block_bytes`."""
        file, shape, dtype = self._open(key)
        row = math.prod(shape[1:]) * dtype.itemsize
        step = max(1, block_bytes // max(row, 1))
        with reading(self.path, f"npz array '{key}'"):
            for start in range(0, shape[0], step):
                n = min(step, shape[0] - start)
                content = file.read(n * row)
                if len(content) != n * row:
                    raise EOFError(f"'{key}' ends after {start:,} of {shape[0]:,} rows")
                yield np.frombuffer(content, dtype).reshape(n, *shape[1:])

    def read(self, key: str, max_bytes: int = 1 << 33) -> np.ndarray:
        """Array `key` in memory. Raises UserError beyond `max_bytes`."""
        shape, dtype = self.header(key)
        if math.prod(shape) * dtype.itemsize > max_bytes:
            raise UserError(f"{self.path}: array '{key}' {shape} exceeds {max_bytes:,} bytes in memory")
        if not shape:
            with reading(self.path, f"npz array '{key}'"):
                return np.frombuffer(self._open(key)[0].read(), dtype)[0]
        return np.concatenate(list(self.blocks(key)) or [np.zeros(shape, dtype)])


# ---------------------------------------------------------------- pickles of arrays


class _PickledArray:
    """Stands for numpy.ndarray while a pickle is read: takes the state that an array pickles and checks its size."""

    array: np.ndarray

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, content = state
        if isinstance(content, str):  # Python 2 wrote bytes as a latin-1 string
            content = content.encode("latin1")
        if not isinstance(dtype, _PickledDtype) or not isinstance(content, bytes):
            raise pickle.UnpicklingError("an array of objects")
        if math.prod(shape) * dtype.dtype.itemsize != len(content):
            raise pickle.UnpicklingError(f"an array {shape} of {len(content)} bytes")
        self.array = np.frombuffer(content, dtype.dtype).reshape(shape, order="F" if fortran else "C")


class _PickledDtype:
    """Stands for numpy.dtype: plain numbers only."""

    def __init__(self, code: str, *_: Any):
        self.dtype = np.dtype(code)
        if self.dtype.kind not in "biuf":
            raise pickle.UnpicklingError(f"an array of {self.dtype}")

    def __setstate__(self, state: tuple) -> None:
        if len(state) > 1 and state[1] in ("<", ">"):
            self.dtype = self.dtype.newbyteorder(state[1])


def _new_array(*_: Any) -> _PickledArray:
    return _PickledArray()


def _encode(text: str, encoding: str = "latin1") -> bytes:
    return text.encode("latin1")


# (name, last part of the module): what stands for it
_ARRAY_PARTS = {
    ("_reconstruct", "multiarray"): _new_array,
    ("ndarray", "numpy"): _PickledArray,
    ("dtype", "numpy"): _PickledDtype,
    ("encode", "_codecs"): _encode,
}


class _ArrayUnpickler(pickle._Unpickler):
    """Reads lists, dicts, numbers, strings and number arrays; runs nothing else.

    The reader written in Python: the one in C lets a file of a few bytes claim a memo of gigabytes.
    """

    def find_class(self, module: str, name: str) -> Any:
        known = _ARRAY_PARTS.get((name, module.rsplit(".", 1)[-1]))
        if known is None or not (module == "_codecs" or module.split(".")[0] == "numpy"):
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which no array needs")
        return known


def read_array_pickle(path: Path, max_bytes: int = 1 << 31) -> dict[str, Any]:
    """A pickled dict of lists and number arrays (CIFAR's batches), without running code from it."""
    with reading(path, "a pickled dict of arrays"):
        if path.stat().st_size > max_bytes:
            raise ValueError(f"{path.stat().st_size:,} bytes, more than {max_bytes:,}")
        content = _ArrayUnpickler(io.BytesIO(path.read_bytes()), encoding="latin1").load()
        if not isinstance(content, dict):
            raise ValueError(f"holds a {type(content).__name__}")
    return {
        key.decode("latin1") if isinstance(key, bytes) else str(key): value.array if hasattr(value, "array") else value
        for key, value in content.items()
    }


# ---------------------------------------------------------------- mat, images


def read_mat(path: Path, keys: tuple[str, ...], max_bytes: int = 1 << 32) -> dict[str, np.ndarray]:
    """Number arrays of a MATLAB 5 file; their claimed sizes are checked before they are read."""
    from scipy.io import loadmat, whosmat
    from scipy.io.matlab import MatReadError

    with reading(path, "a MATLAB file"):
        try:
            found = {name: (shape, kind) for name, shape, kind in whosmat(path)}
            for key in keys:
                shape, kind = found[key]
                if kind not in ("uint8", "double", "int64", "int32", "uint16") or math.prod(shape) > max_bytes:
                    raise ValueError(f"'{key}' claims {kind} {shape}")
            return {key: np.asarray(value) for key, value in loadmat(path, variable_names=keys).items() if key in keys}
        except MatReadError as error:
            raise ValueError(str(error)) from error


def read_image(path: Path, channels: int) -> Image.Image:
    """An image file as RGB (3 channels) or L (1)."""
    with reading(path, "an image"), Image.open(path) as image:
        if image.width * image.height > MAX_PIXELS:
            raise ValueError(f"it claims {image.width} x {image.height} pixels")
        return image.convert("RGB" if channels == 3 else "L")
