"""`inverse_conv2d` and `masked_conv2d`: the differentiable ops, and the choice of what computes them.

One operator does all the work: `solve(y, w, orders, groups, transposed)` solves A x = y or A^T x = y, where A is the
masked convolution by w. Its gradient is the opposite solve and one convolution weight gradient, so it can be
differentiated again. The compiled library registers it as `inv_conv::solve` (CPU and CUDA); `inv_conv::solve_torch` is
the same in library calls.
"""

import os
from functools import lru_cache

import torch
from torch import Tensor

from common.errors import UserError, suggest
from inv_flow.utils.inv_conv_cuda import extension, torch_backend
from inv_flow.utils.inv_conv_cuda.geometry import Order, kernel_mask, mask_of_codes, order_codes, padding
from inv_flow.utils.inv_conv_cuda.reference import convolve

BACKENDS = ("cuda", "cpu", "torch")


@torch.library.custom_op("inv_conv::solve_torch", mutates_args=())
def _solve_torch(y: Tensor, w: Tensor, orders: list[int], groups: int, transposed: bool) -> Tensor:
    return torch_backend.solve(y, w, orders, groups, transposed)


@lru_cache(maxsize=256)
def _kept_mask(shape: tuple[int, ...], codes: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    return mask_of_codes(shape, codes, dtype=dtype, device=device)[0]


def _mask(like: Tensor, shape: tuple[int, ...], codes: list[int]) -> Tensor:
    """1 on the free entries of a kernel of `shape`, kept from one call to the next."""
    if type(like) is Tensor and not torch.compiler.is_compiling():
        return _kept_mask(shape, tuple(codes), like.dtype, like.device)
    # the stand-in tensors of a compiler must not be kept
    return mask_of_codes(shape, codes, dtype=like.dtype, device=like.device)[0]


def _weight_gradient(x: Tensor, u: Tensor, shape: tuple[int, ...], codes: list[int], groups: int) -> Tensor:
    """Gradient of <masked_conv2d(x, w), u> with respect to every entry of w, (C, C/G, kh, kw)."""
    kh, kw = shape[2:]
    if x.numel() == 0:
        return x.new_zeros(shape)
    if len(codes) > 1:
        parts = zip(x.chunk(groups, 1), u.chunk(groups, 1), codes, strict=True)
        shape = (shape[0] // groups, *shape[1:])
        return torch.cat([_weight_gradient(part, grad, shape, [code], 1) for part, grad, code in parts])
    parts = _parts(x, kh, kw)
    if parts > 1:
        pairs = zip(x.tensor_split(parts), u.tensor_split(parts), strict=True)
        return sum(_weight_gradient_of(part, grad, shape, codes[0], groups) for part, grad in pairs)
    return _weight_gradient_of(x, u, shape, codes[0], groups)


def _parts(x: Tensor, kh: int, kw: int) -> int:
    """In how many parts of the batch to make the weight gradient, so that its copies of x stay smaller than x."""
    batch, _, height, width = x.shape
    parts = -(-(height + kh - 1) * (width + kw - 1) // (height * width))  # the padded copy
    if x.device.type == "cpu":
        # there the library copies the padded image and the gradient again, with channels in blocks of 16; each thread
        # needs work of its own, though
        parts = max(parts, min(8, batch // torch.get_num_threads()))
    return min(batch, parts)


def _weight_gradient_of(x: Tensor, u: Tensor, shape: tuple[int, ...], code: int, groups: int) -> Tensor:
    image = torch.nn.functional.pad(x, padding(code, *shape[2:]))
    return torch.nn.grad.conv2d_weight(image, shape, u, groups=groups)


def _register(name: str) -> None:
    """Give `inv_conv::<name>` its meta kernel and its gradient."""

    def fake(y: Tensor, w: Tensor, orders: list[int], groups: int, transposed: bool) -> Tensor:
        return y.new_empty(y.shape)

    def setup_context(ctx, inputs, output) -> None:
        _, w, ctx.orders, ctx.groups, ctx.transposed = inputs
        ctx.save_for_backward(output, w)

    def backward(ctx, grad: Tensor):
        x, w = ctx.saved_tensors
        u = getattr(torch.ops.inv_conv, name)(grad, w, ctx.orders, ctx.groups, not ctx.transposed)
        grad_w = None
        if ctx.needs_input_grad[1]:
            # A x = y: dA = -u x^T. A^T x = y: dA = -x u^T
            seen, out = (u, x) if ctx.transposed else (x, u)
            free = _mask(w, tuple(w.shape), ctx.orders)
            grad_w = _weight_gradient(seen, out, tuple(w.shape), ctx.orders, ctx.groups) * -free
        return u, grad_w, None, None, None

    torch.library.register_fake(f"inv_conv::{name}", fake)
    torch.library.register_autograd(f"inv_conv::{name}", backward, setup_context=setup_context)


_register("solve_torch")
if extension.load().cpu:
    _register("solve")


def available_backends(device: str | torch.device = "cpu") -> list[str]:
    """The backends that can solve on `device`, best first."""
    kind, built = torch.device(device).type, extension.load()
    compiled = (kind == "cpu" and built.cpu) or (kind == "cuda" and built.cuda)
    return [kind, "torch"] if compiled else ["torch"]


@torch.compiler.assume_constant_result
def choose_backend(kind: str) -> str:
    """The backend for tensors on a device of type `kind`: INV_CONV_BACKEND when it is set, else the best one built.

    Raises `UserError` when INV_CONV_BACKEND names a backend that does not exist, is not built or is for another device.
    """
    present = available_backends(kind)
    forced = os.environ.get("INV_CONV_BACKEND")
    if not forced:
        if present[0] == "torch" and kind in ("cpu", "cuda"):
            built = extension.load()
            reason = built.description if not built.cpu else f"it is built without CUDA ({built.description})"
            extension.say_once(
                f"inverse convolution on {kind}: the compiled op is not used because {reason}; "
                f"running on library calls, which is slower. To build it: {extension.BUILD_COMMAND}"
            )
        return present[0]
    if forced not in BACKENDS:
        raise UserError(f"INV_CONV_BACKEND={forced}: one of {', '.join(BACKENDS)}{suggest(forced, BACKENDS)}")
    if forced not in present:
        if forced != kind:
            raise UserError(
                f"INV_CONV_BACKEND={forced} cannot solve for tensors on {kind}: unset it or move the tensors"
            )
        raise UserError(
            f"INV_CONV_BACKEND={forced}, but {extension.load().description}; build it: {extension.BUILD_COMMAND}"
        )
    return forced


def _check(x: Tensor, w: Tensor, groups: int) -> None:
    if x.dim() != 4 or w.dim() != 4:
        raise ValueError(
            f"expected an image (B, C, H, W) and a kernel (C, C/G, kh, kw), got {x.dim()} and {w.dim()} axes"
        )
    channels = x.shape[1]
    if groups < 1 or channels % groups or tuple(w.shape[:2]) != (channels, channels // groups):
        raise ValueError(
            f"{channels} channels in {groups} groups need a kernel ({channels}, {channels // max(groups, 1)}, kh, kw), "
            f"got {tuple(w.shape)}"
        )
    if min(w.shape) < 1:
        raise ValueError(f"empty kernel {tuple(w.shape)}")
    if x.device != w.device:
        raise ValueError(f"the image is on {x.device} and the kernel on {w.device}")
    if not x.is_floating_point() or not w.is_floating_point():
        raise ValueError(f"expected floating-point tensors, got {x.dtype} and {w.dtype}")
    if (x.dtype == torch.float64) != (w.dtype == torch.float64):
        raise ValueError(f"the image is {x.dtype} and the kernel {w.dtype}: convert one of them")


def inverse_conv2d(y: Tensor, w: Tensor, order: Order = "TL", groups: int = 1) -> Tensor:
    """Inverse of the masked convolution: the x with `masked_conv2d(x, w, order, groups) = y`. Its log-determinant is 0.

    y (B, C, H, W), w (C, C/G, kh, kw) -> x (B, C, H, W), of the dtype of y. float32 and float64 are solved as they are;
    float16 and bfloat16 are solved in float32 and rounded once at the end. `order` is TL, TR, BL or BR, or a sequence
    with one of them a group. Only the free entries of w are read (see `kernel_mask`); the pinned ones count as 1 and 0
    whatever they hold, and get no gradient. Differentiable any number of times; the solve saves x and w only.

    Raises ValueError for shapes, dtypes, devices or orders that do not fit, `UserError` for an INV_CONV_BACKEND that
    cannot be used. Inverse-Flow (Nagar and Varma, 2025), Theorems 1 and 2, in their adjoint form.
    """
    _check(y, w, groups)
    codes = order_codes(order, groups)
    dtype = y.dtype
    if dtype != w.dtype or dtype not in (torch.float32, torch.float64):
        y, w = y.float(), w.float()
    solve = torch.ops.inv_conv.solve_torch if choose_backend(y.device.type) == "torch" else torch.ops.inv_conv.solve
    x = solve(y, w, codes, groups, False)
    return x if x.dtype == dtype else x.to(dtype)


def masked_conv2d(x: Tensor, w: Tensor, order: Order = "TL", groups: int = 1) -> Tensor:
    """Masked convolution, unit triangular as a linear map: the image keeps its size and the log-determinant is 0.

    x (B, C, H, W), w (C, C/G, kh, kw) -> y (B, C, H, W). As in `inverse_conv2d`, only the free entries of w are read.
    Raises ValueError for shapes, dtypes, devices or orders that do not fit.
    """
    _check(x, w, groups)
    codes = order_codes(order, groups)
    mask, pin = kernel_mask(x.shape[1], tuple(w.shape[2:]), order, groups, dtype=w.dtype, device=w.device)
    return convolve(x, w * mask + pin, codes, groups)
