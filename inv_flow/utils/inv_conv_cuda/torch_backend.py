"""The convolution and its inverse in library calls alone.

The solve cuts the image into tiles of (th, tw) pixels. Inside a tile the convolution is a unit triangular matrix T, and
the pixels above and left of the tile enter through a matrix A, so x_tile = T^-1 y_tile - (T^-1 A) x_halo. Both factors
are the same for all tiles; one triangular solve makes them. Tiles on an anti-diagonal do not depend on each other.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from inv_flow.utils.inv_conv_cuda.geometry import mask_of_codes, mirror, padding


@contextmanager
def full_float32() -> Iterator[None]:
    """Inside, no float32 product is rounded to TF32 or bfloat16 first, whatever is set; afterwards all is as before.

    The settings are the process's: another thread sees them, too.
    """
    # convolutions on CUDA use TF32 unless they are told not to
    products = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)
    settings = (torch.backends.cudnn.conv, torch.backends.cudnn.rnn, torch.backends.mkldnn.conv, *products)
    older = older_cudnn = None
    if torch.backends.fp32_precision == "none":  # nothing is inherited; then the older names may be in use
        with suppress(RuntimeError):
            older_cudnn = torch.backends.cudnn.allow_tf32
            torch.backends.cudnn.allow_tf32 = False
    rounding = [(setting, value) for setting in settings if (value := setting.fp32_precision) not in ("ieee", "none")]
    if any(setting in products for setting, _ in rounding):
        # the older name of the same; it raises where it does not know what the newer one says, and so is not in use
        with suppress(RuntimeError):
            older = torch.get_float32_matmul_precision()
            torch.set_float32_matmul_precision("highest")
    for setting, _ in rounding:
        setting.fp32_precision = "ieee"
    try:
        yield
    finally:
        if older is not None:
            torch.set_float32_matmul_precision(older)
        if older_cudnn is not None:
            torch.backends.cudnn.allow_tf32 = older_cudnn
        for setting, value in rounding:
            setting.fp32_precision = "none"  # as its parent says
            if setting.fp32_precision != value:
                setting.fp32_precision = value


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


def solve(y: Tensor, w: Tensor, orders: list[int], groups: int, transposed: bool) -> Tensor:
    """Solve A x = y, or A^T x = y when `transposed`, where A is the masked convolution by `w`.

    y (B, C, H, W), w (C, C/G, kh, kw), `orders` the codes that the groups take in turn -> x (B, C, H, W), contiguous.
    """
    channels, height, width = y.shape[1:]
    if y.numel() == 0:
        return torch.empty_like(y, memory_format=torch.contiguous_format)
    size = channels // groups
    codes = _codes(orders, groups)
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
    with full_float32():
        x = solve_tl(grouped.permute(0, 2, 3, 4, 1), taps).permute(0, 4, 1, 2, 3)
    if transposed:
        x = x.flip(1)
    return mirror(x.flatten(0, 1), codes).transpose(0, 1).contiguous()


def _codes(orders: list[int], groups: int) -> list[int]:
    """One code, or one a group."""
    return list(orders) if len(orders) == 1 else list(orders) * (groups // len(orders))


def convolution(
    x: Tensor | None,
    w: Tensor | None,
    g: Tensor | None,
    kernel_size: list[int],
    orders: list[int],
    groups: int,
    unit: bool,
) -> Tensor:
    """The gradient of <g, A x> with respect to the one of x, w, g that is None: A^T g, of the free entries, or A x.

    x, g (B, C, H, W), w (C, C/G, kh, kw); the pinned entries of A are 1 and 0 when `unit`, else 0. Contiguous.
    """
    image = g if x is None else x
    channels = image.shape[1]
    shape = (channels, channels // groups, *kernel_size)
    if image.numel() == 0:
        return image.new_zeros(shape if w is None else image.shape)
    codes = _codes(orders, groups)
    free, pin = _constants(shape, tuple(codes), image.dtype, image.device)
    if w is None:
        with full_float32():
            gradient = _weight_gradient(x, g, shape, codes, groups)
        return torch.where(free, gradient, 0).contiguous()
    w = torch.where(free, w, pin if unit else 0)
    if x is None:
        # A^T is the convolution against the order, with input and output channels swapped
        codes = [code ^ 3 for code in codes]
        w = w.unflatten(0, (groups, -1)).transpose(1, 2).flatten(0, 1).flip(2, 3)
    with full_float32():
        return F.conv2d(_pad(image, codes, *kernel_size), w, groups=groups).contiguous()


@lru_cache(maxsize=256)
def _constants(
    shape: tuple[int, ...], codes: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Which entries of a kernel are free (bool), and what the others are, kept from one call to the next."""
    mask, pin = mask_of_codes(shape, codes, dtype=dtype, device=device)
    return mask == 1, pin


def _pad(x: Tensor, codes: list[int], kh: int, kw: int) -> Tensor:
    """Zeros on the two sides of the image that each channel group sees."""
    if len(codes) == 1:
        return F.pad(x, padding(codes[0], kh, kw))
    parts = zip(x.chunk(len(codes), dim=1), codes, strict=True)
    return torch.cat([F.pad(part, padding(code, kh, kw)) for part, code in parts], dim=1)


def _weight_gradient(x: Tensor, g: Tensor, shape: tuple[int, ...], codes: list[int], groups: int) -> Tensor:
    """Gradient of <g, A x> with respect to every entry of the kernel, (C, C/G, kh, kw)."""
    kh, kw = shape[2:]
    if len(codes) > 1:
        parts = zip(x.chunk(groups, 1), g.chunk(groups, 1), codes, strict=True)
        shape = (shape[0] // groups, *shape[1:])
        return torch.cat([_weight_gradient(part, grad, shape, [code], 1) for part, grad, code in parts])
    pairs = zip(*(image.tensor_split(_parts(x, kh, kw)) for image in (x, g)), strict=True)
    first, *others = [
        torch.nn.grad.conv2d_weight(_pad(part, codes, kh, kw), shape, grad, groups=groups) for part, grad in pairs
    ]
    return sum(others, start=first)


def _parts(x: Tensor, kh: int, kw: int) -> int:
    """In how many parts of the batch to make the weight gradient, so that on a CPU its copies of x stay smaller than x.

    On other devices each part is launches of its own, and the copies are small beside the memory: one.
    """
    if x.device.type != "cpu":
        return 1
    batch, _, height, width = x.shape
    parts = -(-(height + kh - 1) * (width + kw - 1) // (height * width))  # the padded copy
    # the library copies the padded image and the gradient again, with channels in blocks of 16; each thread needs work
    # of its own, though
    return min(batch, max(parts, min(8, batch // torch.get_num_threads())))
