"""The inverse convolution with library calls alone: tiles of pixels, one small matrix product an anti-diagonal of
tiles.

Cut the image into tiles of (th, tw) pixels. Inside a tile the convolution is a unit triangular matrix T, and the pixels
above and left of the tile enter through a matrix A, so x_tile = T^-1 y_tile - (T^-1 A) x_halo. Both factors are the
same for all tiles; one triangular solve makes them. Tiles on an anti-diagonal do not depend on each other.
"""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from inv_flow.utils.inv_conv_cuda.geometry import mirror


def tile_size(height: int, width: int, size: int, kh: int, kw: int, batch: int) -> tuple[int, int]:
    """The tile (th, tw) that costs least: arithmetic grows with the tile, the number of steps falls with it."""
    best = None
    for th in (1, 2, 4):
        for tw in (1, 2, 4, 8, 16, 32, 64):
            if (th > 1 and th >= 2 * height) or (tw > 1 and tw >= 2 * width):
                continue
            rows, columns = -(-height // th), -(-width // tw)
            unknowns, seen = th * tw * size, (th + kh - 1) * (tw + kw - 1) * size
            # in multiply-adds: the product of every tile, the triangular solve, and what each step costs to launch
            cost = rows * columns * max(batch, 4) * unknowns * seen
            cost += unknowns * unknowns * seen
            cost += (rows + columns - 1) * 600_000
            if best is None or cost < best[0]:
                best = (cost, th, tw)
    return best[1:]


@lru_cache(maxsize=64)
def _tile_indices(th: int, tw: int, kh: int, kw: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """What joins the pixels of a tile to the pixels it sees, for every kernel of this size.

    Returns `tap` (th tw, seen), the flat index in a (kh kw) kernel of the tap between the two pixels, kh kw where there
    is none; and `own` (th tw,), which of the seen = (th + kh - 1)(tw + kw - 1) pixels are the tile's.
    """
    down = torch.arange(th + kh - 1)[None, :] - torch.arange(th)[:, None]  # (th, th + kh - 1), kernel row
    right = torch.arange(tw + kw - 1)[None, :] - torch.arange(tw)[:, None]
    inside = ((down >= 0) & (down < kh))[:, None, :, None] & ((right >= 0) & (right < kw))[None, :, None, :]
    tap = torch.where(inside, down[:, None, :, None] * kw + right[None, :, None, :], kh * kw)
    seen = torch.arange((th + kh - 1) * (tw + kw - 1)).view(th + kh - 1, tw + kw - 1)
    return tap.flatten(2).flatten(0, 1).to(device), seen[kh - 1 :, kw - 1 :].flatten().to(device)


def _tile_operator(taps: Tensor, th: int, tw: int) -> Tensor:
    """taps (G, o, i, kh, kw), pinned, order TL -> (G, seen i, th tw o): from what a tile sees to its x."""
    size, kh, kw = taps.shape[1], *taps.shape[3:]
    tap, own = _tile_indices(th, tw, kh, kw, taps.device)
    flat = F.pad(taps.flatten(3), (0, 1))  # a zero tap at the end
    dense = flat[..., tap]  # (G, o, i, pixels, seen)
    dense = dense.permute(0, 3, 1, 4, 2).flatten(1, 2)  # (G, pixels o, seen, i)
    unknowns = th * tw * size
    inside = dense[:, :, own].flatten(2)  # (G, unknowns, unknowns), unit lower triangular
    identity = torch.eye(unknowns, dtype=taps.dtype, device=taps.device).unflatten(1, (th * tw, size))
    right = -dense
    right[:, :, own] = identity
    solved = torch.linalg.solve_triangular(inside, right.flatten(2), upper=False, unitriangular=True)
    return solved.transpose(1, 2).contiguous()


def solve_tl(y: Tensor, taps: Tensor) -> Tensor:
    """Order TL, channels last: y (G, B, H, W, c), taps (G, c, c, kh, kw) pinned -> x (G, B, H, W, c)."""
    groups, batch, height, width, size = y.shape
    kh, kw = taps.shape[3:]
    th, tw = tile_size(height, width, size, kh, kw, batch)
    operator = _tile_operator(taps, th, tw)
    rows, columns = -(-height // th), -(-width // tw)
    # y with zeros above and left (seen by the first tiles), and below and right (to fill the last tiles); x replaces it
    bottom, right = rows * th - height, columns * tw - width
    x = F.pad(y, (0, 0, kw - 1, right, kh - 1, bottom)).contiguous()
    stride_g, stride_b, stride_h, stride_w, _ = x.stride()
    for step in range(rows + columns - 1):
        first, last = max(0, step - columns + 1), min(step, rows - 1)  # tile rows on this anti-diagonal
        tiles = last - first + 1
        start = first * th * stride_h + (step - first) * tw * stride_w
        along = th * stride_h - tw * stride_w  # one tile down, one tile left
        seen = x.as_strided(
            (groups, tiles, batch, th + kh - 1, (tw + kw - 1) * size), (stride_g, along, stride_b, stride_h, 1), start
        )
        new = seen.reshape(groups, tiles * batch, -1) @ operator
        own = x.as_strided(
            (groups, tiles, batch, th, tw * size),
            (stride_g, along, stride_b, stride_h, 1),
            start + (kh - 1) * stride_h + (kw - 1) * stride_w,
        )
        own.copy_(new.view(groups, tiles, batch, th, tw * size))
    return x[:, :, kh - 1 : kh - 1 + height, kw - 1 : kw - 1 + width]


def solve(y: Tensor, w: Tensor, codes: list[int], groups: int, transposed: bool) -> Tensor:
    """Solve A x = y, or A^T x = y when `transposed`, where A is the masked convolution by `w`.

    y (B, C, H, W), w (C, C/G, kh, kw), `codes` one order code or one a group -> x (B, C, H, W), contiguous.
    """
    channels, height, width = y.shape[1:]
    if y.numel() == 0:
        return torch.empty_like(y, memory_format=torch.contiguous_format)
    size = channels // groups
    taps = mirror(w, codes).unflatten(0, (groups, size))  # order TL
    # taps that reach past the image never meet a pixel
    taps = taps[..., max(0, w.shape[2] - height) :, max(0, w.shape[3] - width) :]
    grouped = y.transpose(0, 1)  # (C, B, H, W)
    if transposed:
        # A^T runs against the order, with input and output channels swapped. Counting channels from the last one makes
        # its own tap lower triangular again.
        codes = [code ^ 3 for code in codes]
        taps = taps.transpose(1, 2).flip(1, 2)
    taps = taps.clone()
    taps[..., -1, -1].tril_(-1).diagonal(dim1=-2, dim2=-1).fill_(1)
    grouped = mirror(grouped, codes).unflatten(0, (groups, size))
    if transposed:
        grouped = grouped.flip(1)
    x = solve_tl(grouped.permute(0, 2, 3, 4, 1), taps).permute(0, 4, 1, 2, 3)
    if transposed:
        x = x.flip(1)
    return mirror(x.flatten(0, 1), codes).transpose(0, 1).contiguous()
