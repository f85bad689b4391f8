"""`inverse_conv2d` and `masked_conv2d`, and the choice of what computes them.

A is the masked convolution by a kernel w: its free entries, and 1 or 0 at the pinned ones. Two operators do the work:

* `solve(y, w)`: the x of A x = y, or of A^T x = y. The compiled library has it as `inv_conv::solve` (CPU and CUDA);
  `inv_conv::solve_torch` is the same in library calls.
* `convolution(x, w, g)`: of the three in the number <g, A x> one is left out, and its gradient is returned: without g
  that is A x, without x it is A^T g, without w the gradient of the free entries. Library convolutions; on a CPU the
  last is `inv_conv::kernel_gradient` of the compiled library.

The derivatives of both are solves and convolutions again, forward and reverse, so they exist to any order. Both are a
`torch.autograd.Function` with the rules that `torch.func` needs, around an operator that a compiler sees whole.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from math import prod

import torch
from torch import Tensor
from torch.autograd import forward_ad
from torch.utils.flop_counter import register_flop_formula

from common.errors import UserError, suggest
from inv_flow.utils.inv_conv_cuda import extension, torch_backend
from inv_flow.utils.inv_conv_cuda.geometry import Order, order_codes

BACKENDS = ("cuda", "cpu", "torch")

# An operator's `orders` are codes that its groups take in turn: one code, one a group, or any divisor of their number.
_library = torch.library.Library("inv_conv", "FRAGMENT")


def _register(name: str, function: type[torch.autograd.Function], fake, flops) -> None:
    """Give `inv_conv::<name>` what depends on no device: shapes, costs, derivatives, vmap, float32 in autocast.

    Inside `torch.func` transforms `function` is used instead; there the operator itself raises.
    """
    torch.library.register_fake(f"inv_conv::{name}", fake)
    torch.library.register_vmap(f"inv_conv::{name}", function.vmap)
    register_flop_formula(getattr(torch.ops.inv_conv, name))(flops)
    for device in ("cpu", "cuda"):
        torch.library.register_autocast(f"inv_conv::{name}", device, torch.float32)
    _library.impl(name, function.apply, "Autograd")


def _run(function: type[torch.autograd.Function], *arguments) -> Tensor:
    # a compiler takes the operator, which has the derivatives of `function`: it refuses a Function with a jvp
    return function.operator(*arguments) if torch.compiler.is_compiling() else function.apply(*arguments)


@contextmanager
def _tangents(ctx) -> Iterator[list[Tensor | None]]:
    """The saved tensors within a jvp rule, free of the tangents that the rule is about.

    torch runs such a rule with forward mode off, so the tangents of an outer `jvp` would be dropped without a word.
    """
    with forward_ad._set_fwd_grad_enabled(True):
        yield [tensor if tensor is None else forward_ad.unpack_dual(tensor).primal for tensor in ctx.saved_tensors]


def _spread(image: Tensor, axis: int | None, size: int) -> Tensor:
    """vmap: the copies of an image as further groups of channels, (B, V C, H, W)."""
    image = image.unsqueeze(1).expand(-1, size, -1, -1, -1) if axis is None else image.movedim(axis, 1)
    return image.flatten(1, 2)


def _over_copies(compute, size: int, image: Tensor, axis: int | None, w: Tensor, w_axis: int | None):
    """vmap over what takes an image and a kernel: copies of the image alone are more images, else more groups.

    `compute(image, w, copies)` has `copies` times as many groups. Returns the result and the axis of the copies.
    """
    if w_axis is None:
        image = image.movedim(axis, 0)
        return compute(image.flatten(0, 1), w, 1).unflatten(0, image.shape[:2]), 0
    out = compute(_spread(image, axis, size), w.movedim(w_axis, 0).flatten(0, 1), size)
    return out.unflatten(1, (size, -1)), 1


class _Convolution(torch.autograd.Function):
    """Arguments: x, w, g (one of them None), kernel_size, orders, groups, unit.

    x, g (B, C, H, W), w (C, C/G, kh, kw). `unit`: the pinned entries count as 1 and 0, else all as 0.
    """

    @staticmethod
    def operator(*arguments) -> Tensor:
        return torch.ops.inv_conv.convolution(*arguments)

    @staticmethod
    def forward(*arguments) -> Tensor:
        with torch._C._AutoDispatchBelowAutograd():
            return _Convolution.operator(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        *tensors, ctx.kernel_size, ctx.orders, ctx.groups, ctx.unit = inputs
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        ctx.save_for_forward(*tensors)

    @staticmethod
    def backward(ctx, cotangent: Tensor | None):
        tensors = [cotangent if tensor is None else tensor for tensor in ctx.saved_tensors]
        found: list[Tensor | None] = [None] * 7
        for n in range(3):
            if ctx.needs_input_grad[n] and cotangent is not None:
                others = [None if n == m else tensor for m, tensor in enumerate(tensors)]
                found[n] = _convolution(*others, ctx.kernel_size, ctx.orders, ctx.groups, ctx.unit and n != 1)
        return tuple(found)

    @staticmethod
    def jvp(ctx, *tangents) -> Tensor | None:
        total = None
        with _tangents(ctx) as tensors:
            for n in range(3):
                if tangents[n] is not None and tensors[n] is not None:
                    moved = [tangents[n] if n == m else tensor for m, tensor in enumerate(tensors)]
                    term = _convolution(*moved, ctx.kernel_size, ctx.orders, ctx.groups, ctx.unit and n != 1)
                    total = term if total is None else total + term
        return total

    @staticmethod
    def vmap(info, in_dims, x, w, g, kernel_size, orders, groups, unit):
        size, (x_axis, w_axis, g_axis) = info.batch_size, in_dims[:3]
        if w is None:
            x, g = _spread(x, x_axis, size), _spread(g, g_axis, size)
            return _convolution(x, w, g, kernel_size, orders, size * groups, unit).unflatten(0, (size, -1)), 0

        def compute(image: Tensor, w: Tensor, copies: int) -> Tensor:
            images = (image, w, None) if g is None else (None, w, image)
            return _convolution(*images, kernel_size, orders, copies * groups, unit)

        image, axis = (x, x_axis) if g is None else (g, g_axis)
        return _over_copies(compute, size, image, axis, w, w_axis)


def _convolution(*arguments) -> Tensor:
    return _run(_Convolution, *arguments)


def _fake_convolution(x, w, g, kernel_size, orders, groups, unit) -> Tensor:
    image = g if x is None else x
    channels = image.shape[1]
    return image.new_empty((channels, channels // groups, *kernel_size) if w is None else image.shape)


def _compute_convolution(x, w, g, kernel_size, orders, groups, unit) -> Tensor:
    """Library calls, but for the gradient of the kernel where the compiled library makes it (not one built before)."""
    if w is None and x.device.type == "cpu" and choose_backend("cpu") == "cpu" and _HAS_KERNEL_GRADIENT:
        return torch.ops.inv_conv.kernel_gradient(x, g, kernel_size, orders, groups)
    return torch_backend.convolution(x, w, g, kernel_size, orders, groups, unit)


def _flops_convolution(x, w, g, kernel_size, orders, groups, unit, **_) -> int:
    image = g if x is None else x
    return 2 * prod(image) * (image[1] // groups) * prod(kernel_size)


_library.define(
    "convolution(Tensor? x, Tensor? w, Tensor? g, SymInt[] kernel_size, int[] orders, int groups, bool unit) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
_library.impl("convolution", _compute_convolution, "CompositeExplicitAutograd")
_register("convolution", _Convolution, _fake_convolution, _flops_convolution)


def _solver(name: str) -> type[torch.autograd.Function]:
    """The differentiable form of the operator `inv_conv::<name>`."""

    class Solve(torch.autograd.Function):
        """Arguments: y (B, C, H, W), w (C, C/G, kh, kw), orders, groups, transposed."""

        @staticmethod
        def operator(*arguments) -> Tensor:
            return getattr(torch.ops.inv_conv, name)(*arguments)

        @staticmethod
        def forward(*arguments) -> Tensor:
            with torch._C._AutoDispatchBelowAutograd():
                return Solve.operator(*arguments)

        @staticmethod
        def setup_context(ctx, inputs, output) -> None:
            _, w, ctx.orders, ctx.groups, ctx.transposed = inputs
            ctx.set_materialize_grads(False)
            ctx.save_for_backward(output, w)
            ctx.save_for_forward(output, w)

        @staticmethod
        def backward(ctx, cotangent: Tensor | None):
            if cotangent is None:
                return (None,) * 5
            x, w = ctx.saved_tensors
            u = _run(Solve, cotangent, w, ctx.orders, ctx.groups, not ctx.transposed)
            grad_w = None
            if ctx.needs_input_grad[1]:
                # A x = y: dA = -u x^T. A^T x = y: dA = -x u^T
                seen, out = (u, x) if ctx.transposed else (x, u)
                grad_w = -_convolution(seen, None, out, w.shape[2:], ctx.orders, ctx.groups, False)
            return u, grad_w, None, None, None

        @staticmethod
        def jvp(ctx, dy: Tensor | None, dw: Tensor | None, *_) -> Tensor | None:
            with _tangents(ctx) as (x, w):
                # A dx = dy - dA x
                if dw is not None:
                    images = (None, dw, x) if ctx.transposed else (x, dw, None)
                    moved = _convolution(*images, w.shape[2:], ctx.orders, ctx.groups, False)
                    dy = -moved if dy is None else dy - moved
                return None if dy is None else _run(Solve, dy, w, ctx.orders, ctx.groups, ctx.transposed)

        @staticmethod
        def vmap(info, in_dims, y, w, orders, groups, transposed):
            def compute(y: Tensor, w: Tensor, copies: int) -> Tensor:
                return _run(Solve, y, w, orders, copies * groups, transposed)

            return _over_copies(compute, info.batch_size, y, in_dims[0], w, in_dims[1])

    return Solve


def _fake_solve(y: Tensor, w: Tensor, orders: list[int], groups: int, transposed: bool) -> Tensor:
    return y.new_empty(y.shape)


def _flops_solve(y, w, orders, groups, transposed, **_) -> int:
    return 2 * prod(y) * prod(w[1:])


_library.define(
    "solve_torch(Tensor y, Tensor w, int[] orders, int groups, bool transposed) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
_library.impl("solve_torch", torch_backend.solve, "CompositeExplicitAutograd")
_HAS_KERNEL_GRADIENT = extension.load().path is not None and hasattr(torch.ops.inv_conv, "kernel_gradient")
_SOLVERS = {name: _solver(name) for name in ("solve_torch", "solve")[: 2 if extension.load().path else 1]}
for _name, _function in _SOLVERS.items():
    _register(_name, _function, _fake_solve, _flops_solve)


def available_backends(device: str | torch.device = "cpu") -> list[str]:
    """The backends that can solve on `device`, best first."""
    device = torch.device(device)
    return [device.type, "torch"] if extension.obstacle(device) is None else ["torch"]


@torch.compiler.assume_constant_result
def choose_backend(device: str | torch.device) -> str:
    """The backend for tensors on `device`: INV_CONV_BACKEND when it is set, else the best one built.

    Raises `UserError` when INV_CONV_BACKEND names a backend that does not exist, is not built or is for another device.
    """
    device = torch.device(device)
    forced = os.environ.get("INV_CONV_BACKEND")
    if forced == "torch":
        return forced
    obstacle = extension.obstacle(device)
    if not forced:
        if obstacle is not None and device.type in ("cpu", "cuda"):
            extension.say_once(
                f"inverse convolution on {device.type}: the compiled op is not used because {obstacle}; "
                "running on library calls, which is slower"
            )
        return "torch" if obstacle is not None else device.type
    if forced not in BACKENDS:
        raise UserError(f"INV_CONV_BACKEND={forced}: one of {', '.join(BACKENDS)}{suggest(forced, BACKENDS)}")
    if forced != device.type:
        raise UserError(
            f"INV_CONV_BACKEND={forced} cannot solve for tensors on {device.type}: unset it or move the tensors"
        )
    if obstacle is not None:
        raise UserError(f"INV_CONV_BACKEND={forced}, but {obstacle}")
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


def _prepare(x: Tensor, w: Tensor, order: Order, groups: int) -> tuple[Tensor, Tensor, list[int]]:
    """What both maps ask of their inputs: checked, float64 or float32, and the codes of the orders."""
    _check(x, w, groups)
    codes = order_codes(order, groups)
    return (x, w, codes) if x.dtype == torch.float64 else (x.float(), w.float(), codes)


def inverse_conv2d(y: Tensor, w: Tensor, order: Order = "TL", groups: int = 1) -> Tensor:
    """Inverse of the masked convolution: the x with `masked_conv2d(x, w, order, groups) = y`. Its log-determinant is 0.

    y (B, C, H, W), w (C, C/G, kh, kw) -> x (B, C, H, W), contiguous; B, H and W may be 0. `order` is TL, TR, BL or BR,
    or a sequence with one of them a group. Only the free entries of w are read (see `kernel_mask`); the pinned ones
    count as 1 and 0 whatever they hold, NaN included, and get no gradient. float64 is computed in float64; everything
    else, also under `torch.autocast` and whatever is set for TF32, in float32, rounded once to the dtype of the image.
    Differentiable any number of times, forward and reverse, and under `torch.func`; the solve saves x and w only.

    Raises ValueError for shapes, dtypes (a float64 tensor beside another), devices or orders that do not fit,
    `UserError` for an INV_CONV_BACKEND that cannot be used. Inverse-Flow (Nagar and Varma, 2025), Theorems 1 and 2, in
    their adjoint form.
    """
    dtype = y.dtype
    y, w, codes = _prepare(y, w, order, groups)
    name = "solve_torch" if choose_backend(y.device) == "torch" else "solve"
    return _run(_SOLVERS[name], y, w, codes, groups, False).to(dtype)


def masked_conv2d(x: Tensor, w: Tensor, order: Order = "TL", groups: int = 1) -> Tensor:
    """Masked convolution, unit triangular as a linear map: the image keeps its size and the log-determinant is 0.

    x (B, C, H, W), w (C, C/G, kh, kw) -> y (B, C, H, W), contiguous. What is read of w, dtypes, empty images,
    derivatives and errors are as in `inverse_conv2d`, which undoes it.
    """
    dtype = x.dtype
    x, w, codes = _prepare(x, w, order, groups)
    return _convolution(x, w, None, w.shape[2:], codes, groups, True).to(dtype)
