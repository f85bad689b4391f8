"""Bounded readers of the files that data sets come in: idx, npz, npy, CIFAR's pickles, SVHN's mat, images.

Each checks what a file claims against what it holds before it allocates, and raises UserError naming the file.
"""

import gzip
import lzma
import math
import pickle
import struct
import tarfile
import tokenize
import zipfile
import zlib
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np

from common.errors import UserError, disk_full, refuse_web_page
from common.images import open_picture as read_image  # noqa: F401  the papers' name for it
from common.unpickle import ARRAYS, Bounded, read_pickle

MAX_ELEMENTS = 1 << 36  # no image set that is read here comes near this many bytes
# what the readers below raise on damaged or foreign bytes (RuntimeError: an encrypted or unsupported zip member)
DAMAGE = (
    OSError, EOFError, ValueError, LookupError, TypeError, AttributeError, MemoryError, OverflowError, SyntaxError,
    RuntimeError, struct.error, tokenize.TokenError, zlib.error, zipfile.BadZipFile, tarfile.TarError, lzma.LZMAError,
    pickle.UnpicklingError,
)  # fmt: skip
PREPARE_AGAIN = "it is damaged or another kind of file; get it again"


@contextmanager
def reading(path: Path, kind: str) -> Iterator[None]:
    """Turn what a damaged or foreign file does to a reader into one line that names the file."""
    refuse_web_page(path)
    try:
        yield
    except UserError:
        raise
    except DAMAGE as error:
        if disk_full(error):  # of what is written from it
            raise
        reason = " ".join(str(error).split())[:160] or type(error).__name__
        raise UserError(f"cannot read {path} as {kind} ({reason}): {PREPARE_AGAIN}") from error


def read_idx(path: Path, dims: int) -> np.ndarray:
    """A uint8 idx file of `dims` axes, plain or gzip (name ending in .gz): uint8 (N, ...), N the first axis."""
    with reading(path, "idx"), (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
        header = file.read(4 + 4 * dims)
        if len(header) != 4 + 4 * dims or header[:4] != bytes([0, 0, 8, dims]):
            raise ValueError(f"the header is not that of {dims}-dimensional bytes")
        shape = struct.unpack(f">{dims}I", header[4:])
        size = math.prod(shape)
        if size > 1 << 32:
            raise ValueError(f"the header claims {size:,} values")
        # in pieces, so that a false claim costs no more than what is there
        content = bytearray()
        while len(content) <= size and (piece := file.read(min(1 << 24, size + 1 - len(content)))):
            content += piece
        if len(content) != size:
            more = " or more" if len(content) > size else ""
            raise ValueError(f"the header claims {size:,} values, the file holds {len(content):,}{more}")
    return np.frombuffer(content, np.uint8).reshape(shape)


def _npy_header(file: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """(shape, Fortran order, dtype) of an npy stream, which then stands at its data."""
    version = np.lib.format.read_magic(file)
    if version != (1, 0):  # later ones are for headers of more than 65 kB, which no array of numbers has
        raise ValueError(f"its header is of version {version}")
    shape, fortran, dtype = np.lib.format.read_array_header_1_0(file)
    if dtype.hasobject or min(shape, default=0) < 0:
        raise ValueError(f"holds {dtype} {shape}, not numbers")
    return shape, fortran, dtype


def read_array(file: IO[bytes], held: int) -> np.ndarray:
    """One array of an npy stream that holds at most `held` bytes from where it stands.

    Raises ValueError or EOFError, before memory is taken, when the header claims more, and for Python objects.
    """
    begin = file.tell()
    shape, fortran, dtype = _npy_header(file)
    size = math.prod(shape) * dtype.itemsize
    if size > held - (file.tell() - begin):
        raise ValueError(f"the header claims {size:,} bytes for {shape}, the file holds fewer")
    content = bytearray(file.read(size))
    if len(content) != size:
        raise EOFError(f"{len(content):,} of {size:,} bytes are there")
    array = np.frombuffer(content, dtype) if size else np.zeros(math.prod(shape), dtype)
    return array.reshape(shape, order="F" if fortran else "C")


def read_npy(path: Path, max_bytes: int = 1 << 33) -> np.ndarray:
    """The array of an npy file in memory. Raises UserError for another, a damaged or a larger one."""
    with reading(path, "npy"), open(path, "rb") as file:
        return read_array(file, min(max_bytes, path.stat().st_size))


def map_npy(path: Path) -> np.ndarray:
    """The array of an npy file, memory-mapped. Raises UserError for another or a damaged one."""
    with reading(path, "npy"):
        return np.load(path, mmap_mode="r", allow_pickle=False)


def read_npz(path: Path, max_bytes: int = 1 << 31, keys: Collection[str] | None = None) -> dict[str, np.ndarray]:
    """The arrays of an npz file (or those of `keys` that it has) in memory.

    Raises UserError for another or a damaged file, and when the arrays exceed `max_bytes`: a compressed file of a few
    kilobytes may claim any size.
    """
    archive, arrays = NpzFile(path), {}
    for key in archive.names if keys is None else [key for key in archive.names if key in keys]:
        arrays[key] = archive.read(key, max_bytes)
        max_bytes -= arrays[key].nbytes
    return arrays


class NpzFile:
    """An npz file whose arrays are read one at a time: memory-mapped when stored, in pieces when compressed."""

    def __init__(self, path: Path):
        self.path = path
        with reading(path, "npz"):
            self._zip = zipfile.ZipFile(path)
            self.names = {info.filename.removesuffix(".npy"): info for info in self._zip.infolist()}

    def __contains__(self, key: str) -> bool:
        return key in self.names

    def _info(self, key: str) -> zipfile.ZipInfo:
        if key not in self.names:
            raise UserError(f"{self.path} has no array '{key}', only {', '.join(sorted(self.names)) or 'none'}")
        return self.names[key]

    def header(self, key: str) -> tuple[tuple[int, ...], np.dtype]:
        """(shape, dtype) of array `key`, checked against the number of bytes the archive says it has."""
        return self._open(key)[1:]

    def _open(self, key: str) -> tuple[IO[bytes], tuple[int, ...], np.dtype]:
        info = self._info(key)
        with reading(self.path, f"npz array '{key}'"):
            file = self._zip.open(info)
            shape, fortran, dtype = _npy_header(file)
            size = math.prod(shape) * dtype.itemsize
            held = info.file_size - file.tell()
            if size != held or size > MAX_ELEMENTS:
                raise ValueError(f"'{key}' claims {size:,} bytes for {shape}, the archive holds {held:,}")
            if fortran and len(shape) > 1:
                raise ValueError(f"'{key}' is stored in Fortran order")
        return file, shape, dtype

    def mapped(self, key: str) -> np.ndarray | None:
        """Array `key` memory-mapped read-only, or None when the archive compressed it."""
        file, shape, dtype = self._open(key)
        info = self._info(key)
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
        info = self._info(key)
        if info.file_size > max_bytes:
            raise UserError(f"{self.path}: array '{key}' takes {info.file_size:,} bytes, more than is read here")
        with reading(self.path, f"npz array '{key}'"), self._zip.open(info) as file:
            return read_array(file, info.file_size)


# ---------------------------------------------------------------- pickles of arrays


def read_array_pickle(path: Path, max_bytes: int = 1 << 31) -> dict[str, Any]:
    """A pickled dict of lists and number arrays (CIFAR's batches), without running code from it."""
    content = read_pickle(path, ARRAYS, max_bytes)
    if not isinstance(content, dict):
        raise UserError(f"{path} holds a {type(content).__name__}, not a dict of arrays: {PREPARE_AGAIN}")
    return {key.decode("latin1") if isinstance(key, bytes) else str(key): value for key, value in content.items()}


def whole_labels(values: Any, source: Path) -> np.ndarray:
    """Labels as int64 (N,). Raises UserError, naming `source`, unless they are whole numbers in one row or column."""
    with reading(source, "labels"):
        labels = np.asarray(values)
        if labels.size == max(labels.shape, default=0):
            labels = labels.reshape(-1)
        whole = labels.dtype.kind in "iuf" and (np.isfinite(labels) & (labels == np.floor(labels))).all()
        if labels.ndim != 1 or not whole:
            raise ValueError(f"they are {labels.dtype} {labels.shape}, not one whole number an image")
        return labels.astype(np.int64)


# ---------------------------------------------------------------- mat


MAT_MATRIX, MAT_COMPRESSED = 14, 15
MAT_NUMBERS = range(6, 16)  # classes of arrays of numbers (level 5 MAT-files, table 1-3)
# type of the stored numbers -> dtype (table 1-1)
MAT_TYPES = {1: "i1", 2: "u1", 3: "i2", 4: "u2", 5: "i4", 6: "u4", 7: "f4", 9: "f8", 12: "i8", 13: "u8"}


class _Inflated:
    """A compressed part of a file, decompressed as far as it is read."""

    def __init__(self, content: bytes):
        self._zlib, self._rest = zlib.decompressobj(), content

    def read(self, n: int) -> bytes:
        content = self._zlib.decompress(self._rest, n) if n else b""
        self._rest = self._zlib.unconsumed_tail if n else self._rest
        return content


def _mat_element(source: Bounded | _Inflated, order: str, limit: int) -> tuple[int, bytes]:
    """(type, content without padding) of the next element of at most `limit` bytes."""
    tag = source.read(8)
    kind, size = struct.unpack(f"{order}2I", tag)
    if kind >> 16:  # at most four bytes stand in the tag itself
        return kind & 0xFFFF, tag[4 : 4 + (kind >> 16)]
    if size > limit:
        raise ValueError(f"an element claims {size:,} bytes, {limit:,} are expected")
    content = source.read(size)
    source.read(-size % 8)
    return kind, content


def _mat_array(source: Bounded | _Inflated, order: str, keys: Collection[str], limit: int) -> dict[str, np.ndarray]:
    """{name: array} of a matrix element whose tag has been read; empty for a name beside `keys`."""
    flags, sizes, name = (_mat_element(source, order, most)[1] for most in (8, 128, 256))
    if (key := name.decode("latin1")) not in keys:
        return {}
    shape = np.frombuffer(sizes, f"{order}i4").tolist()
    if struct.unpack(f"{order}I", flags[:4])[0] & 0xFF not in MAT_NUMBERS or min(shape) < 0:
        raise ValueError(f"'{key}' is no array of numbers")
    kind, content = _mat_element(source, order, min(limit, 8 * math.prod(shape)))
    return {key: np.frombuffer(content, np.dtype(MAT_TYPES[kind]).newbyteorder(order)).reshape(shape, order="F")}


def read_mat(path: Path, keys: Collection[str], max_bytes: int = 1 << 31) -> dict[str, np.ndarray]:
    """The number arrays `keys` of a level 5 MATLAB file, as they are stored; sizes are checked before memory is taken.

    Written here because scipy.io.loadmat ends the process on some damaged files.
    """
    found: dict[str, np.ndarray] = {}
    with reading(path, "a MATLAB file"), open(path, "rb") as file:
        head, held = file.read(128), path.stat().st_size
        if head[126:] not in (b"IM", b"MI"):
            raise ValueError("the header is not that of a level 5 MAT-file")
        order = "<" if head[126:] == b"IM" else ">"
        while len(found) < len(keys) and len(tag := file.read(8)) == 8:
            kind, size = struct.unpack(f"{order}2I", tag)
            after = file.tell() + size
            source: Bounded | _Inflated = Bounded(file, min(size, held - file.tell()))
            if kind == MAT_COMPRESSED:
                source = _Inflated(source.read(min(size, held - file.tell())))
                kind = struct.unpack(f"{order}2I", source.read(8))[0]
            if kind == MAT_MATRIX:
                found |= _mat_array(source, order, keys, max_bytes)
            file.seek(after)
        if missing := [key for key in keys if key not in found]:
            raise ValueError(f"it has no array {', '.join(missing)}")
    return found
