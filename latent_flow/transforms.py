"""The image transformations of the MNIST sequences: zoom, rotation and hue, exact and vectorised over samples.

A digit is one grey channel times a colour, so the warps act on the grey channel alone and a hue shift only turns the
colour. An image in colour is warped as it is, and its own hues are turned. Everything runs on the device of its input,
with another transformation for every sample.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

NAMES = ("scale", "rotation", "hue")
ZOOM_STEP, TURN_STEP, HUE_STEP = 0.1, 10.0, 20.0  # a table entry: factor, degrees, degrees (supervised, weakly)
ZOOM_INCREMENT, TURN_INCREMENT, HUE_INCREMENT = 0.1, 20.0, 20.0  # a step (unsupervised)


def hue_colour(degrees: Tensor) -> Tensor:
    """RGB (..., 3) of pure red turned by `degrees` (...) in hue, any angle."""
    sixth = degrees / 60
    m = torch.remainder(torch.stack([sixth, sixth - 2, sixth - 4], -1), 6)
    return (2 - torch.minimum(m, 6 - m)).clamp(0, 1)


def colour(grey: Tensor, degrees: Tensor) -> Tensor:
    """Grey images (..., 1, N, N) as digits of hue `degrees` (...), or colour ones (..., 3, N, N) with their own hues
    turned by them: (..., 3, N, N).
    """
    if grey.shape[-3] == 3:
        return shift_hue(grey, torch.deg2rad(degrees)[..., None, None])
    return grey * hue_colour(degrees).to(grey)[..., None, None]


def warp(grey: Tensor, zoom: Tensor, degrees: Tensor, centre: str = "upstream") -> Tensor:
    """Zoom and rotate images (M, C, N, N) by zoom (M,) and degrees (M,): bilinear, zeros outside."""
    size = grey.shape[-1]
    c = size / 2 if centre == "upstream" else (size - 1) / 2
    angle = torch.deg2rad(degrees)
    cos, sin = torch.cos(angle) / zoom, torch.sin(angle) / zoom
    inverse = torch.stack([torch.stack([cos, -sin], -1), torch.stack([sin, cos], -1)], -2)  # (M, 2, 2)
    pixel = torch.arange(size, dtype=grey.dtype, device=grey.device) - c
    y, x = torch.meshgrid(pixel, pixel, indexing="ij")
    source = torch.einsum("mij,hwj->mhwi", inverse.to(grey), torch.stack([x, y], -1)) + c  # (M, N, N, 2)
    return F.grid_sample(grey, source * (2 / (size - 1)) - 1, mode="bilinear", align_corners=True)


def sequence(grey: Tensor, labels: Tensor, steps: int, centre: str = "upstream") -> Tensor:
    """Frames x_0..x_T (T+1, B, 3, N, N) of red digits (B, 1, N, N) or images (B, 3, N, N); labels (B,): 0 zoom,
    1 rotation, 2 hue.

    Every frame is a transformation of x_0 by its table entry, not of the frame before it.
    """
    batch = len(grey)
    entry = torch.arange(steps + 1, dtype=grey.dtype, device=grey.device)[:, None]  # (T+1, 1)
    zoom = 1 + ZOOM_STEP * entry * (labels == 0)  # (T+1, B)
    turn, hue = TURN_STEP * entry * (labels == 1), HUE_STEP * entry * (labels == 2)
    moved = warp(grey.repeat(steps + 1, 1, 1, 1), zoom.flatten(), turn.flatten(), centre)
    return colour(moved.unflatten(0, (steps + 1, batch)), hue)


def increments(active: Tensor, speed: Tensor | float = 1.0) -> tuple[Tensor, Tensor, Tensor]:
    """Zoom factor, degrees and hue degrees (...) of one step: active (..., 3) of 0/1, speed (..., 3)."""
    amount = active * speed
    return 1 + ZOOM_INCREMENT * amount[..., 0], TURN_INCREMENT * amount[..., 1], HUE_INCREMENT * amount[..., 2]


def composed_sequence(grey: Tensor, active: Tensor, speed: Tensor | None = None, centre: str = "upstream") -> Tensor:
    """Frames (T+1, B, 3, N, N) of red digits (B, 1, N, N) or images (B, 3, N, N) moved at every step by its active
    transformations.

    active, speed (T, B, 3). Each step warps the frame before it, in the order zoom, rotation, hue; interpolation
    adds up, as published.
    """
    grey_t, hue = grey, torch.zeros(len(grey), dtype=grey.dtype, device=grey.device)
    frames = [colour(grey_t, hue)]
    for t in range(len(active)):
        zoom, turn, shift = increments(active[t].to(grey), 1.0 if speed is None else speed[t].to(grey))
        # a digit that stands still is not interpolated, whatever the others in its batch do
        moved = warp(grey_t, zoom, torch.zeros_like(turn), centre)
        grey_t = torch.where((zoom != 1)[:, None, None, None], moved, grey_t)
        moved = warp(grey_t, torch.ones_like(zoom), turn, centre)
        grey_t = torch.where((turn != 0)[:, None, None, None], moved, grey_t)
        hue = hue + shift
        frames.append(colour(grey_t, hue))
    return torch.stack(frames)


def shift_hue(image: Tensor, radians: Tensor | float) -> Tensor:
    """Hue shift of any RGB image (..., 3, N, N) through HSV, as published."""
    red, green, blue = image.unbind(-3)
    top, index = image.max(-3)
    delta = top - image.min(-3).values
    safe = torch.where(delta == 0, torch.ones_like(delta), delta)
    sixth = torch.stack([(green - blue) / safe, 2 + (blue - red) / safe, 4 + (red - green) / safe], -3)
    hue = torch.gather(sixth, -3, index.unsqueeze(-3)).squeeze(-3) / 6
    hue = torch.where(delta == 0, torch.zeros_like(hue), hue) + torch.as_tensor(
        radians, dtype=image.dtype, device=image.device
    ) / (2 * math.pi)
    saturation = delta / (top + 1e-8)
    m = torch.remainder(hue, 1) * 6
    channels = []
    for offset in (5, 3, 1):
        k = torch.remainder(offset + m, 6)
        channels.append(top * (1 - saturation * torch.minimum(k, 4 - k).clamp(0, 1)))
    return torch.stack(channels, -3)


shift_hue_ref = shift_hue  # the oracle of `hue_colour`
