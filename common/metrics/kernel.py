"""Kernel distance: squared maximum mean discrepancy with a polynomial kernel (the KID when features are `inception`).

Binkowski et al., "Demystifying MMD GANs", 2018: k(a, b) = (<a, b>/d + 1)^3 for features of d dimensions.
"""

import warnings

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError
from common.metrics.frechet import check_features

_BLOCK = 512  # rows and columns of a kernel block: 2 MB of float64, whatever the sizes of the sets


def kernel_distance(
    x,
    y,
    subsets: int = 100,
    subset_size: int = 1000,
    seed: int = 12345,
    legacy: bool = False,
    device: str | torch.device = "cpu",
) -> tuple[float, float]:
    """Mean and population standard deviation of the unbiased squared MMD over random subsets; not scaled by 1000.

    x (n, d) features of the evaluated set, y (m, d) of the reference. Subsets are drawn without replacement, x first.
    The random stream starts from `seed` in every call, so a result does not depend on which folders came before.
    `legacy`: draw as numpy's global generator does after numpy.random.seed(seed), as LBAE's evaluation drew.
    A subset larger than a set is reduced to the smaller set, with a warning; subsets that are the whole of both sets
    are all the same, so their standard deviation is 0.
    Raises UserError for fewer than 2 samples and options out of range. Source: Binkowski et al. 2018, section 4.
    """
    x, y = feature_tensors(x, y, device)
    size = min(subset_size, len(x), len(y))
    if subsets < 1 or size < 2:
        raise UserError(f"kernel distance: {subsets} subset(s) of {size}; at least 1 subset of 2 samples is needed")
    whole = size == len(x) == len(y)
    if size < subset_size or whole:
        change = f"subsets of {size} instead of {subset_size}" if size < subset_size else f"subsets of {size}"
        note = "the mean stays unbiased, the standard deviation is of another protocol"
        if whole:
            note = "every subset is the whole of both: there is no standard deviation"
        warnings.warn(f"kernel distance: {change}, the sets have {len(x)} and {len(y)} samples; {note}", stacklevel=2)
    values = subset_mmd2(x, y, *draw_subsets(len(x), len(y), 1 if whole else subsets, size, seed, legacy))
    return float(values.mean()), float(values.std())


def draw_subsets(n: int, m: int, subsets: int, size: int, seed: int, legacy: bool = False):
    """Rows of the subsets, (subsets, size) into n and (subsets, size) into m, drawn in turns from one seeded stream."""
    stream = np.random.RandomState(seed) if legacy else np.random.default_rng(seed)
    pairs = [(stream.choice(n, size, replace=False), stream.choice(m, size, replace=False)) for _ in range(subsets)]
    return np.stack([rows for rows, _ in pairs]), np.stack([rows for _, rows in pairs])


def subset_mmd2(x: Tensor, y: Tensor, rows_x: np.ndarray, rows_y: np.ndarray) -> np.ndarray:
    """Unbiased squared MMD (s,) of s subsets: rows_x (s, m) into x (n, d), rows_y (s, n) into y, float64.

    sum_{i!=j} k(x_i, x_j)/(m(m-1)) + sum_{i!=j} k(y_i, y_j)/(n(n-1)) - 2 sum_ij k(x_i, y_j)/(m n).
    """
    (subsets, m), n = rows_x.shape, rows_y.shape[1]
    # the kernel of the full sets costs less than those of all subsets as long as the subsets overlap enough
    if (len(x) + len(y)) ** 2 <= subsets * (m + n) ** 2:
        sums = _sums(x, y, _membership(rows_x, x), _membership(rows_y, y))
    else:
        ones = x.new_ones(m, 1), x.new_ones(n, 1)
        pairs = zip(torch.from_numpy(rows_x).to(x.device), torch.from_numpy(rows_y).to(x.device), strict=True)
        sums = torch.cat([_sums(x[a], y[b], *ones) for a, b in pairs], 1)
    xx, yy, xy = sums.cpu().numpy()
    return xx / (m * (m - 1)) + yy / (n * (n - 1)) - 2 * xy / (m * n)


def _sums(x: Tensor, y: Tensor, in_x: Tensor, in_y: Tensor) -> Tensor:
    """Sums of k over pairs of different x, of different y, and of an x and a y, of every subset: (3, s)."""
    return torch.stack([_pair_sums(x, in_x, x, in_x), _pair_sums(y, in_y, y, in_y), _pair_sums(x, in_x, y, in_y)])


def _pair_sums(a: Tensor, in_a: Tensor, b: Tensor, in_b: Tensor) -> Tensor:
    """sum_ij in_a[i] k(a_i, b_j) in_b[j], (s,), block by block; with b the same as a: without i = j."""
    total, same = in_a.new_zeros(in_a.shape[1]), b is a
    for i in range(0, len(a), _BLOCK):
        for j in range(i if same else 0, len(b), _BLOCK):
            block = cubic_kernel(a[i : i + _BLOCK], b[j : j + _BLOCK])
            if same and i == j:
                block.fill_diagonal_(0.0)
            part = (in_a[i : i + _BLOCK] * (block @ in_b[j : j + _BLOCK])).sum(0)
            total += 2 * part if same and i != j else part
    return total


def cubic_kernel(a: Tensor, b: Tensor) -> Tensor:
    """(<a_i, b_j>/d + 1)^3, (len(a), len(b))."""
    base = product(a, b).div_(a.shape[1]).add_(1.0)
    return (base * base).mul_(base)  # a general power is an order of magnitude slower


def product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b.T; on the CPU by numpy's library, which is the quicker one for float64."""
    return torch.from_numpy(a.numpy() @ b.numpy().T) if a.device.type == "cpu" else a @ b.T


def _membership(rows: np.ndarray, x: Tensor) -> Tensor:
    """(len(x), subsets): 1 where a row is in a subset."""
    inside = np.zeros((len(x), len(rows)))
    inside[rows, np.arange(len(rows))[:, None]] = 1.0
    return torch.from_numpy(inside).to(x.device)


def feature_tensors(x, y, device, least: int = 2) -> tuple[Tensor, Tensor]:
    """Evaluated (n, d) and reference (m, d) features as float64 tensors on a device. Raises UserError for fewer than
    `least` rows, different d, and values that are not finite.
    """
    x, y = check_features(x, "evaluated features", least), check_features(y, "reference features", least)
    if x.shape[1] != y.shape[1]:
        raise UserError(f"features of {x.shape[1]} and {y.shape[1]} dimensions cannot be compared; use one extractor")
    device = torch.device("cpu" if torch.device(device).type == "mps" else device)  # MPS has no float64
    return torch.from_numpy(x).to(device), torch.from_numpy(y).to(device)
