"""MNIST's own files, made up."""

import struct

import numpy as np


def write_mnist(root, n):
    """n random images as MNIST's own files."""
    folder, rng = root / "MNIST/raw", np.random.default_rng(0)
    folder.mkdir(parents=True)
    for stem in ("train", "t10k"):
        parts = {"images-idx3": rng.integers(0, 256, (n, 28, 28)), "labels-idx1": np.arange(n) % 10}
        for name, array in parts.items():
            head = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
            (folder / f"{stem}-{name}-ubyte").write_bytes(head + array.astype(np.uint8).tobytes())
