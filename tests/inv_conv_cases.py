"""What the tests of the inverse convolution share: the backends present, random cases, the dense matrix."""

import itertools

import torch
from torch import Tensor

from inv_flow.utils.inv_conv_cuda import available_backends

DEVICES = [("cpu", name) for name in available_backends("cpu")]
if torch.cuda.is_available():
    DEVICES += [("cuda", name) for name in available_backends("cuda")]
MIXED = ("TR", "BL")


def random_case(device, batch, channels, groups, height, width, kh, kw, dtype=torch.float64, scale=0.4, seed=0):
    """An image and free weights whose solve does not explode."""
    generator = torch.Generator().manual_seed(seed)
    size = channels // groups
    y = torch.randn(batch, channels, height, width, generator=generator, dtype=torch.float64)
    w = torch.randn(channels, size, kh, kw, generator=generator, dtype=torch.float64) * scale / (size * kh * kw) ** 0.5
    return y.to(device, dtype), w.to(device, dtype)


def dense_matrix(w: Tensor, order, groups: int, height: int, width: int) -> Tensor:
    """The masked convolution as a (CHW, CHW) matrix, entry by entry from the definition in the paper."""
    channels, size, kh, kw = w.shape
    orders = [order] * groups if isinstance(order, str) else order
    matrix = torch.zeros(channels, height, width, channels, height, width, dtype=w.dtype)
    for out in range(channels):
        name = orders[out // size]
        down, right = (1 if name[0] == "B" else -1), (1 if name[1] == "R" else -1)
        for i, a, b, h, v in itertools.product(range(size), range(kh), range(kw), range(height), range(width)):
            seen_h, seen_v = h + down * a, v + right * b
            if not (0 <= seen_h < height and 0 <= seen_v < width):
                continue
            row, column = (a if name[0] == "B" else kh - 1 - a), (b if name[1] == "R" else kw - 1 - b)
            value = w[out, i, row, column]
            if a == b == 0:
                local = out % size
                value = 1.0 if i == local else 0.0 if i > local else value
            matrix[out, h, v, out // size * size + i, seen_h, seen_v] = value
    return matrix.flatten(0, 2).flatten(1)
