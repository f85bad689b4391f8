"""The two ways in which images reach an extractor's input size.

`paper`: bilinear as TensorFlow 1 did it inside the FID network: no antialiasing, pixel corners aligned at the top left.
`clean`: bicubic with antialiasing (Parmar et al., "On Aliased Resizing and Surprising Subtleties in GAN Evaluation",
2022), which equals Pillow's bicubic on float images.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from common.errors import UserError, suggest

MODES = ("paper", "clean")


def resize(images: Tensor, size: int, mode: str = "paper") -> Tensor:
    """Float images (N, C, H, W) in [0, 255] at (N, C, size, size), unchanged when they have that size already."""
    if mode not in MODES:
        raise UserError(f"resize mode {mode}: expected paper or clean{suggest(mode, MODES)}")
    if size < 1:
        raise UserError(f"size={size}: at least one pixel is needed")
    if images.shape[-2:] == (size, size):
        return images
    if mode == "clean":
        # float32 filter weights are off by up to 1e-2 grey levels; MPS has no float64 and lives with that
        wide = images if images.device.type == "mps" else images.double()
        sharp = F.interpolate(wide, (size, size), mode="bicubic", antialias=True, align_corners=False)
        return sharp.clamp(0.0, 255.0).to(images.dtype)
    return _tf1_lines(_tf1_lines(images, size, 3), size, 2)


def _tf1_lines(images: Tensor, size: int, axis: int) -> Tensor:
    """One axis of TensorFlow 1's resize_bilinear (align_corners=False, half_pixel_centers=False)."""
    length = images.shape[axis]
    # TensorFlow multiplies in float32: float64 positions would round to other weights
    position = torch.arange(size, dtype=torch.float32) * (torch.tensor(length, dtype=torch.float32) / size)
    low = position.floor()
    weight = (position - low).to(images)
    low = low.long()
    first = images.index_select(axis, low.to(images.device))
    second = images.index_select(axis, (low + 1).clamp(max=length - 1).to(images.device))
    shape = [1, 1, 1, 1]
    shape[axis] = size
    return first + (second - first) * weight.view(shape)
