"""The inverse convolution in plain torch: the specification of the fast paths and the oracle of their tests."""

import torch
from torch import Tensor

from inv_flow.utils.inv_conv_cuda.geometry import Order, kernel_mask, mirror, order_codes


def inverse_conv2d_ref(y: Tensor, w: Tensor, order: Order = "TL", groups: int = 1) -> Tensor:
    """Solve `masked_conv2d(x, w) = y` for x, pixel by pixel and channel by channel (slow; autograd differentiates it).

    y (B, C, H, W), w (C, C/G, kh, kw) -> x (B, C, H, W). Inverse-Flow (Nagar and Varma, 2025), section 3.
    """
    channels, height, width = y.shape[1:]
    size = channels // groups
    kh, kw = w.shape[2:]
    codes = order_codes(order, groups)
    mask, pin = kernel_mask(channels, (kh, kw), order, groups, dtype=w.dtype, device=w.device)
    # everything below is order TL: tap (a, b) stands at [kh - 1 - a, kw - 1 - b]
    taps = mirror(torch.where(mask == 1, w, pin), codes).unflatten(0, (groups, size))  # (G, o, i, kh, kw)
    source = mirror(y.transpose(0, 1), codes).unflatten(0, (groups, size))  # (G, o, B, H, W)
    solved: dict[tuple[int, int], Tensor] = {}  # pixel -> (G, i, B)
    for h in range(height):
        for v in range(width):
            rest = source[..., h, v]
            for a in range(min(kh, h + 1)):
                for b in range(min(kw, v + 1)):
                    if (a, b) != (0, 0):
                        rest = rest - taps[..., kh - 1 - a, kw - 1 - b] @ solved[h - a, v - b]
            pixel: list[Tensor] = []
            for o in range(size):
                value = rest[:, o]
                for i in range(o):
                    value = value - taps[:, o, i, -1, -1, None] * pixel[i]
                pixel.append(value)
            solved[h, v] = torch.stack(pixel, dim=1)
    rows = [torch.stack([solved[h, v] for v in range(width)], dim=-1) for h in range(height)]
    x = torch.stack(rows, dim=-2).flatten(0, 1)  # (C, B, H, W)
    return mirror(x, codes).transpose(0, 1)
