"""Where a masked convolution pads, which tap it pins, and which entries of its kernel are free.

A kernel `w` has shape (C, C/G, kh, kw). In order TL pixel (h, w) sees the pixels (h - a, w - b) with a, b >= 0; the
other three orders are TL in a mirror. The tap on the pixel itself, a (C/G, C/G) matrix a group, is unit lower
triangular, so the convolution as a linear map is unit triangular and its log-determinant is 0.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

ORDERS = ("TL", "TR", "BL", "BR")

# Bit 0: mirrored in the width; bit 1: mirrored in the height.
ORDER_CODES = {"TL": 0, "TR": 1, "BL": 2, "BR": 3}
_FLIPPED_AXES = ((), (3,), (2,), (2, 3))

Order = str | Sequence[str]


def order_codes(order: Order, groups: int) -> list[int]:
    """The code of `order`, or one code a group when `order` is a sequence of `groups` names."""
    names = [order] if isinstance(order, str) else list(order)
    for name in names:
        if name not in ORDER_CODES:
            raise ValueError(f"unknown order {name!r}: one of {', '.join(ORDERS)}")
    if len(names) not in (1, groups):
        raise ValueError(f"{len(names)} orders for {groups} groups: give one order, or one a group")
    codes = [ORDER_CODES[name] for name in names]
    return codes[:1] if len(set(codes)) == 1 else codes


def padding(code: int, kh: int, kw: int) -> tuple[int, int, int, int]:
    """Zeros to add (left, right, top, bottom) so that the plain convolution keeps the image size."""
    mirrored_w, mirrored_h = code & 1, code & 2
    return (
        0 if mirrored_w else kw - 1,
        kw - 1 if mirrored_w else 0,
        0 if mirrored_h else kh - 1,
        kh - 1 if mirrored_h else 0,
    )


def pinned_tap(code: int, kh: int, kw: int) -> tuple[int, int]:
    """Index (row, column) in the kernel of the tap on the pixel itself."""
    return (0 if code & 2 else kh - 1), (0 if code & 1 else kw - 1)


def mirror(x: Tensor, codes: Sequence[int]) -> Tensor:
    """Flip the image axes 2 and 3 of each channel group of `x`, TL <-> its order.

    The channels are axis 0, so an image comes as (C, B, H, W); `codes` holds one code, or one a group.
    """
    if len(codes) == 1:
        return x.flip(_FLIPPED_AXES[codes[0]]) if codes[0] else x
    parts = x.chunk(len(codes), dim=0)
    return torch.cat([part.flip(_FLIPPED_AXES[code]) for part, code in zip(parts, codes, strict=True)], dim=0)


def kernel_mask(
    channels: int, kernel_size: tuple[int, int], order: Order = "TL", groups: int = 1, **options
) -> tuple[Tensor, Tensor]:
    """The constants of the parametrisation `w = v * mask + pin`.

    Returns `mask` and `pin`, both (C, C/G, kh, kw) of 0 and 1; `options` (dtype, device) go to the tensors.
    `mask` is 1 on every free entry: all taps but the pinned one, and the strictly lower triangle of that.
    """
    if channels < 1 or groups < 1 or channels % groups:
        raise ValueError(f"{channels} channels cannot be split into {groups} groups")
    kh, kw = kernel_size
    if kh < 1 or kw < 1:
        raise ValueError(f"kernel size {kernel_size}: both sides must be at least 1")
    return mask_of_codes((channels, channels // groups, kh, kw), order_codes(order, groups), **options)


def mask_of_codes(shape: Sequence[int], codes: Sequence[int], **options) -> tuple[Tensor, Tensor]:
    """`kernel_mask` for a kernel of `shape` (C, C/G, kh, kw) and order codes."""
    channels, size, kh, kw = shape
    mask = torch.ones(channels, size, kh, kw, **options)
    pin = torch.zeros_like(mask)
    for start in range(0, channels, size):
        rows = slice(start, start + size)
        row, column = pinned_tap(codes[start // size % len(codes)], kh, kw)
        mask[rows, :, row, column] = torch.ones(size, size, **options).tril(-1)
        pin[rows, :, row, column] = torch.eye(size, **options)
    return mask, pin
