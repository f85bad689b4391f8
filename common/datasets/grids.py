"""Published factor grids read from their files: dSprites, 3D Shapes, MPI3D toy."""

import math
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from common.checkpoint import atomic_write
from common.datasets.base import FactorSet
from common.datasets.files import absent, first_present
from common.datasets.readers import NpzFile, map_npy, reading
from common.datasets.sprites import FACTORS, SHAPES, LatentGrid, factor_values, open_bits, pack, unpack, write_bits
from common.errors import UserError

DSPRITES_FILE = "dsprites_ndarray_co1sh3sc6or40x32y32_64x64.npz"
SHAPES3D_FACTORS = {"floor_hue": 10, "wall_hue": 10, "object_hue": 10, "scale": 8, "shape": 4, "orientation": 15}
MPI3D_FACTORS = {
    "object_color": 6, "object_shape": 6, "object_size": 2, "camera_height": 3, "background_color": 3,
    "horizontal_axis": 40, "vertical_axis": 40,
}  # fmt: skip
Transform = Callable[[Tensor], Tensor]


def find_file(name: str, root: Path, folders: Sequence[str], file: str) -> Path:
    """`file` in one of `folders` below `root`, or in `root`. Raises UserError when it is in none."""
    path = first_present([root / folder / file for folder in (*folders, "")])
    if path is None:
        raise absent(name, root / folders[0] / file)
    return path


def _grid_of(factors: dict[str, int], sizes: Sequence[int] | None) -> dict[str, int]:
    if sizes is None:
        return factors
    if len(sizes) != len(factors) or min(sizes) < 1:
        raise UserError(f"sizes must be {len(factors)} positive numbers ({', '.join(factors)}), got {tuple(sizes)}")
    return dict(zip(factors, (int(size) for size in sizes), strict=True))


def _options(sizes: Sequence[int] | None) -> dict:
    return {} if sizes is None else {"sizes": tuple(sizes)}


def _check_images(path: Path, shape: tuple[int, ...], dtype: np.dtype, factors: dict[str, int], image: tuple) -> None:
    expected = (math.prod(factors.values()), *image)
    if dtype != np.uint8 or tuple(shape) != expected:
        raise UserError(f"{path}: images are {dtype} {tuple(shape)}, expected uint8 {expected}; get it again")


# ---------------------------------------------------------------- dSprites


def packed_path(npz: Path) -> Path:
    """Where the bit-packed images of dSprites' npz lie: beside it."""
    return npz.with_name(npz.stem + "_bits.npy")


def pack_dsprites(npz: Path, sizes: Sequence[int] | None = None) -> Path:
    """Write dSprites' images bit-packed beside the npz (377 MB instead of 3 GB in memory) and return the path."""
    archive = NpzFile(npz)
    factors = _grid_of(FACTORS, sizes)
    shape, dtype = archive.header("imgs")
    _check_images(npz, shape, dtype, factors, (64, 64))
    write_bits(archive.blocks("imgs"), shape[0], 64, packed_path(npz))
    return packed_path(npz)


class DSprites(LatentGrid):
    """The published dSprites: uint8 {0, 255} (1, 64, 64), target (shape, scale, orientation, posX, posY) codes.

    A stored npz is memory-mapped. The published, compressed one is read from its bit-packed copy, made beside it by
    `prepare dsprites`, or in memory (377 MB) when that file is not there.
    """

    def __init__(self, root: Path, sizes: Sequence[int] | None = None, transform: Transform | None = None):
        factors = _grid_of(FACTORS, sizes)
        path = find_file("dsprites", root, ("dsprites",), DSPRITES_FILE)
        classes = SHAPES[: factors["shape"]]
        super().__init__("dsprites", "all", factors, (1, 64, 64), classes, _options(sizes), transform)
        self.values = factor_values(self.factor_sizes)
        archive = NpzFile(path)
        shape, dtype = archive.header("imgs")
        _check_images(path, shape, dtype, factors, (64, 64))
        self._check_order(archive)
        self._images = archive.mapped("imgs")
        self._packed = None
        if self._images is None:
            bits = packed_path(path)
            fresh = bits.is_file() and bits.stat().st_mtime >= path.stat().st_mtime
            self._packed = open_bits(bits, len(self), 64) if fresh else None
            if self._packed is None:
                self._packed, start = np.empty((len(self), 64 * 64 // 8), np.uint8), 0
                for block in archive.blocks("imgs"):
                    self._packed[start : start + len(block)] = pack(block)
                    start += len(block)

    def _check_order(self, archive: NpzFile) -> None:
        """The file's own codes must be those of the row-major grid."""
        if "latents_classes" not in archive:
            return
        rows = np.unique(np.linspace(0, len(self) - 1, 1000).astype(np.int64))
        codes = archive.read("latents_classes")
        if codes.shape != (len(self), 6) or not np.array_equal(codes[rows], self.latents_classes(rows)):
            raise UserError(f"{archive.path}: its latents_classes are not in dSprites' order; get it again")

    def _fetch(self, rows: np.ndarray) -> Tensor:
        if self._packed is not None:
            return unpack(self._packed[rows])
        return torch.from_numpy((self._images[rows] > 0).view(np.uint8) * np.uint8(255))[:, None]


# ---------------------------------------------------------------- 3D Shapes, MPI3D


class Shapes3D(FactorSet):
    """3D Shapes from `3dshapes.h5`, read row by row through h5py: uint8 (3, 64, 64), 480,000 images."""

    def __init__(self, root: Path, sizes: Sequence[int] | None = None, transform: Transform | None = None):
        factors = _grid_of(SHAPES3D_FACTORS, sizes)
        self.path = find_file("shapes3d", root, ("", "shapes3d", "3dshapes"), "3dshapes.h5")
        super().__init__("shapes3d", "all", factors, (3, 64, 64), None, _options(sizes), transform)
        self._images = None
        images = self._open()
        try:
            _check_images(self.path, images.shape, images.dtype, factors, (64, 64, 3))
        except UserError:
            images.file.close()
            raise

    def _open(self):
        if self._images is None:
            import h5py

            with reading(self.path, "HDF5"):
                file = h5py.File(self.path, "r")
                images = file.get("images")
                if not isinstance(images, h5py.Dataset):
                    file.close()
                    raise ValueError("it has no dataset 'images'")
                self._images = images
        return self._images

    def __getstate__(self) -> dict:
        # an open HDF5 file does not travel to a worker process: it opens its own
        return {**self.__dict__, "_images": None}

    def _fetch(self, rows: np.ndarray) -> Tensor:
        if not len(rows):
            return torch.zeros((0, 3, 64, 64), dtype=torch.uint8)
        # h5py takes increasing rows without repeats
        unique, back = np.unique(rows, return_inverse=True)
        with reading(self.path, "HDF5"):
            images = self._open()[unique]
        return torch.from_numpy(np.ascontiguousarray(images.transpose(0, 3, 1, 2)[back]))


MPI3D_FOLDERS = ("mpi3d_toy", "mpi3d")
# the images unpacked, memory-mapped: by `prepare`, by the publisher, and with their factors by GlanceNet's preparation
MPI3D_FILES = {"mpi3d_toy_images.npy": "", "mpi3d_toy.npz": "images", "mpi3d_toy_full.npz": "X"}


def mpi3d_images(root: Path, factors: dict[str, int]) -> np.ndarray:
    """MPI3D toy's images memory-mapped, uint8 (N, 64, 64, 3). Raises UserError when no file has them uncompressed."""
    compressed = None
    for file, key in MPI3D_FILES.items():
        path = first_present([root / folder / file for folder in (*MPI3D_FOLDERS, "")])
        if path is None:
            continue
        if key:
            archive = NpzFile(path)
            _check_images(path, *archive.header(key), factors, (64, 64, 3))
            images = archive.mapped(key)
        else:
            images = map_npy(path)
            _check_images(path, images.shape, images.dtype, factors, (64, 64, 3))
        if images is not None:
            return images
        compressed = compressed or path
    if compressed is None:
        raise absent("mpi3d_toy", root / MPI3D_FOLDERS[0] / "mpi3d_toy.npz")
    raise UserError(
        f"{compressed} is compressed, so it cannot be read in parts: unpack it once (12.7 GB) by "
        "`python -m common.datasets.prepare mpi3d_toy`"
    )


class MPI3D(FactorSet):
    """MPI3D toy: uint8 (3, 64, 64), 1,036,800 images, memory-mapped from one of `MPI3D_FILES`."""

    def __init__(self, root: Path, sizes: Sequence[int] | None = None, transform: Transform | None = None):
        factors = _grid_of(MPI3D_FACTORS, sizes)
        super().__init__("mpi3d_toy", "all", factors, (3, 64, 64), None, _options(sizes), transform)
        self._images = mpi3d_images(root, factors)

    def _fetch(self, rows: np.ndarray) -> Tensor:
        return torch.from_numpy(np.ascontiguousarray(self._images[rows].transpose(0, 3, 1, 2)))


def unpack_mpi3d(npz: Path, sizes: Sequence[int] | None = None) -> Path:
    """Write the images of `mpi3d_toy.npz` as `mpi3d_toy_images.npy` beside it, a block at a time."""
    archive = NpzFile(npz)
    shape, dtype = archive.header("images")
    _check_images(npz, shape, dtype, _grid_of(MPI3D_FACTORS, sizes), (64, 64, 3))
    path = npz.with_name("mpi3d_toy_images.npy")
    with atomic_write(path) as file:
        np.lib.format.write_array_header_1_0(file, {"descr": "|u1", "fortran_order": False, "shape": shape})
        for block in archive.blocks("images"):
            file.write(block.tobytes())
    return path
