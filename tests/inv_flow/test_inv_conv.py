"""The inverse-convolution op on every backend present: gradients, odd shapes, strides, determinism, compilation."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from inv_conv_cases import DEVICES, MIXED, dense_matrix, random_case
from torch import Tensor
from torch.testing import assert_close
from torch.utils.flop_counter import FlopCounterMode

from common.errors import UserError
from inv_flow.utils.inv_conv_cuda import (
    ORDERS,
    available_backends,
    extension,
    inverse_conv2d,
    inverse_conv2d_ref,
    kernel_mask,
    masked_conv2d,
    torch_backend,
)
from inv_flow.utils.inv_conv_cuda.ops import choose_backend


@pytest.fixture(params=DEVICES, ids=[f"{kind}-{name}" for kind, name in DEVICES])
def device(request, monkeypatch):
    """A device, with the backend forced."""
    kind, backend = request.param
    monkeypatch.setenv("INV_CONV_BACKEND", backend)
    return torch.device(kind)


MAPS = (inverse_conv2d, masked_conv2d)


def dense_solve(y: Tensor, w: Tensor, order: str, groups: int) -> Tensor:
    """`solve_triangular` on the dense matrix, its unknowns sorted so that it is lower triangular."""
    channels, height, width = y.shape[1:]
    position = torch.arange(channels * height * width).view(channels, height, width)
    flips = [axis for axis, letter in ((1, "B"), (2, "R")) if letter in order]
    scan = position.flip(flips).permute(1, 2, 0).flatten()  # pixels in scan order, channels within a pixel
    matrix = dense_matrix(w, order, groups, height, width)[scan][:, scan]
    assert (matrix.triu(1) == 0).all() and (matrix.diagonal() == 1).all()
    solved = torch.linalg.solve_triangular(matrix, y.flatten(1).T[scan], upper=False)
    x = torch.empty_like(solved)
    x[scan] = solved
    return x.T.view_as(y)


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("channels", "groups", "kernel"), [(1, 1, (3, 3)), (4, 2, (2, 3)), (6, 1, (3, 2)), (3, 3, (5, 1))]
)
def test_against_dense_triangular_solve(device, order, channels, groups, kernel):
    y, w = random_case("cpu", 2, channels, groups, 5, 4, *kernel)
    x = inverse_conv2d(y.to(device), w.to(device), order, groups).cpu()
    assert_close(x, dense_solve(y, w, order, groups), rtol=1e-11, atol=1e-11)
    assert_close(inverse_conv2d_ref(y, w, order, groups), x, rtol=1e-11, atol=1e-11)


SHAPES = [
    # batch, channels, groups, height, width, kh, kw
    (1, 1, 1, 1, 1, 1, 1),
    (1, 3, 1, 7, 4, 3, 3),
    (2, 5, 1, 4, 9, 2, 3),
    (3, 4, 4, 5, 5, 3, 3),
    (2, 6, 2, 3, 3, 5, 5),  # kernel larger than the image
    (2, 2, 1, 1, 6, 4, 2),
    (2, 2, 1, 6, 1, 2, 4),
    (17, 8, 1, 6, 5, 3, 3),  # one image more than a vector
    (5, 50, 1, 4, 3, 2, 2),  # more channels than a block of outputs
    (33, 25, 1, 3, 5, 3, 3),
    (1, 30, 2, 9, 8, 3, 3),
    (3, 16, 2, 20, 19, 1, 1),
]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_odd_shapes(device, shape):
    """One order against the reference; every order against the convolution and its gradients."""
    groups = shape[2]
    y, w = random_case(device, *shape)
    want = inverse_conv2d_ref(y, w, ORDERS[sum(shape) % 4], groups)
    assert_close(inverse_conv2d(y, w, ORDERS[sum(shape) % 4], groups), want, rtol=1e-10, atol=1e-10)
    for order in [*ORDERS, ORDERS * (groups // 4)] if groups % 4 == 0 else ORDERS:
        yr, wr = y.clone().requires_grad_(), w.clone().requires_grad_()
        x = inverse_conv2d(yr, wr, order, groups)
        assert_close(masked_conv2d(x, w, order, groups), y, rtol=1e-10, atol=1e-10)
        # <u, A x> = <y, x> with u = A^-T g: the adjoint solve against the convolution's own autograd
        g = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype).to(device)
        x.backward(g)
        xr = x.detach().requires_grad_()
        wr2 = w.clone().requires_grad_()
        masked_conv2d(xr, wr2, order, groups).backward(-yr.grad)
        assert_close(-xr.grad, g, rtol=1e-10, atol=1e-10)
        assert_close(wr.grad, wr2.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("batch", [0, 1, 7, 1030])
def test_batch_sizes(device, batch, dtype):
    y, w = random_case(device, batch, 3, 1, 4, 5, 3, 3, dtype)
    y.requires_grad_(), w.requires_grad_()
    x = inverse_conv2d(y, w, "BL")
    assert x.shape == y.shape and x.dtype == dtype
    assert_close(masked_conv2d(x, w, "BL"), y, rtol=1e-4, atol=1e-5)
    x.square().sum().backward()
    assert y.grad.shape == y.shape and w.grad.shape == w.shape
    if batch == 0:
        assert (w.grad == 0).all()
    else:
        one = inverse_conv2d(y.detach()[batch // 2 : batch // 2 + 1], w, "BL")
        assert_close(x[batch // 2 : batch // 2 + 1], one, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("order", [*ORDERS, MIXED])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kernel", [(3, 3), (2, 1)])
def test_gradcheck(device, order, groups, kernel):
    if order == MIXED and groups == 1:
        order = "TL"
    y, w = random_case(device, 1, 4, groups, 4, 3, *kernel)
    y.requires_grad_(), w.requires_grad_()
    assert torch.autograd.gradcheck(lambda y, w: inverse_conv2d(y, w, order, groups), (y, w))
    for function in MAPS:
        assert torch.autograd.gradcheck(
            lambda y, w, f=function: f(y, w, order, groups), (y, w), check_forward_ad=True, fast_mode=True
        )


@pytest.mark.parametrize("function", MAPS)
@pytest.mark.parametrize("order", ["TR", MIXED])
def test_double_backward(device, function, order):
    y, w = random_case(device, 2, 2, 2, 3, 3, 2, 2)
    y.requires_grad_(), w.requires_grad_()
    assert torch.autograd.gradgradcheck(lambda y, w: function(y, w, order, 2), (y, w), check_fwd_over_rev=True)


@pytest.mark.parametrize("function", MAPS)
@pytest.mark.parametrize("order", [*ORDERS, MIXED])
@pytest.mark.parametrize("other", [7.0, float("nan"), float("inf")])
def test_pinned_entries_are_not_read_and_get_no_gradient(device, function, order, other):
    y, w = random_case(device, 2, 4, 2, 4, 4, 3, 3)
    mask, pin = (part.to(device) for part in kernel_mask(4, (3, 3), order, 2, dtype=w.dtype))
    free = mask == 1
    spoilt = torch.where(free, w, other).requires_grad_()
    x = function(y.requires_grad_(), spoilt, order, 2)
    assert torch.equal(x, function(y, w * mask + pin, order, 2))
    x.square().sum().backward()
    assert y.grad.isfinite().all()
    assert (spoilt.grad[~free] == 0).all() and (spoilt.grad[free] != 0).all()
    # nor through the tangent, which has pinned entries, too
    assert (
        torch.func.jvp(lambda w: function(y.detach(), w, order, 2), (spoilt.detach(),), (spoilt.detach(),))[1]
        .isfinite()
        .all()
    )


@pytest.mark.parametrize("function", MAPS)
@pytest.mark.parametrize("order", [*ORDERS, MIXED])
@pytest.mark.parametrize("sizes", [(0, 4, 3), (2, 0, 3), (2, 4, 0), (0, 0, 0)])
def test_empty_images(device, function, order, sizes):
    batch, height, width = sizes
    y = torch.ones(batch, 4, height, width, device=device, requires_grad=True)
    w = torch.ones(4, 2, 3, 3, device=device, requires_grad=True)
    x = function(y, w, order, 2)
    assert x.shape == y.shape
    x.sum().backward()
    assert y.grad.shape == y.shape and (w.grad == 0).all()


HALVES = (torch.float16, torch.bfloat16)


@pytest.mark.parametrize("function", MAPS)
@pytest.mark.parametrize("order", [*ORDERS, MIXED])
@pytest.mark.parametrize("image", [torch.float32, *HALVES])
@pytest.mark.parametrize("kernel", [torch.float32, *HALVES])
def test_mixed_dtypes(device, function, order, image, kernel):
    """Computed in float32, rounded once to the dtype of the image; each gradient has the dtype of its tensor."""
    y, w = random_case(device, 2, 4, 2, 6, 6, 3, 3, torch.float32)
    y, w = y.to(image).requires_grad_(), w.to(kernel).requires_grad_()
    x = function(y, w, order, 2)
    assert x.dtype == image
    assert torch.equal(x, function(y.detach().float(), w.detach().float(), order, 2).to(image))
    x.float().sum().backward()
    assert y.grad.dtype == image and w.grad.dtype == kernel
    y2, w2 = y.detach().float().requires_grad_(), w.detach().float().requires_grad_()
    function(y2, w2, order, 2).to(image).float().sum().backward()
    assert torch.equal(y.grad, y2.grad.to(image)) and torch.equal(w.grad, w2.grad.to(kernel))


@pytest.mark.parametrize("function", MAPS)
@pytest.mark.parametrize("dtype", HALVES)
def test_autocast_changes_nothing(device, function, dtype):
    """Float32 inside, forward and backward, wherever either runs."""
    y, w = random_case(device, 4, 12, 1, 8, 8, 3, 3, torch.float32)
    y.requires_grad_(), w.requires_grad_()

    def forward():
        return function(y, w, "TR")

    def backward(x):
        return torch.autograd.grad(x.square().sum(), (y, w))

    want = forward()
    wanted = backward(want)
    with torch.autocast(device.type, dtype):
        inside = forward()
        assert inside.dtype == torch.float32 and torch.equal(inside, want)
        got = [backward(forward())]
    got.append(backward(inside))
    outside = forward()
    with torch.autocast(device.type, dtype):
        got.append(backward(outside))
        tangent = torch.func.jvp(lambda y: function(y, w, "TR"), (y.detach(),), (y.detach(),))[1]
        per_image = torch.func.vmap(lambda y: function(y[None], w, "TR")[0])(y.detach())
    for gradients in got:
        assert all(torch.equal(*pair) for pair in zip(gradients, wanted, strict=True))
    assert torch.equal(per_image, want)
    assert_close(tangent, want, rtol=1e-5, atol=1e-5)  # linear in y
    with torch.autocast(device.type, dtype):  # float64 stays float64
        assert torch.equal(function(y.double(), w.double(), "TR"), function(y.double(), w.double(), "TR"))


def emulate_tf32(monkeypatch):
    """Library products round their inputs to ten bits of mantissa where the settings allow it, as from sm_80 on."""

    def rounded(tensor: Tensor) -> Tensor:
        if tensor.dtype != torch.float32:
            return tensor
        bits = tensor.detach().contiguous().view(torch.int32)
        return ((bits + 0x1000) & ~0x1FFF).view(torch.float32)

    def patch(owner, name, setting, positions):
        real = getattr(owner, name)

        def product(*arguments, **options):
            if setting.fp32_precision == "tf32":
                arguments = [rounded(a) if n in positions else a for n, a in enumerate(arguments)]
            else:
                assert not torch.backends.cuda.matmul.allow_tf32  # raises where the settings contradict each other
                if torch.backends.fp32_precision == "none":
                    assert torch.backends.cudnn.allow_tf32 in (True, False)  # so does this
            return real(*arguments, **options)

        monkeypatch.setattr(owner, name, product)

    conv, matmul = torch.backends.cudnn.conv, torch.backends.cuda.matmul
    patch(torch.nn.functional, "conv2d", conv, (0, 1))
    patch(torch.nn.grad, "conv2d_weight", conv, (0, 2))
    patch(torch.Tensor, "__matmul__", matmul, (0, 1))
    patch(torch.linalg, "solve_triangular", matmul, (0, 1))


@pytest.fixture
def precision():
    """The settings of float32 products, put back after the test."""
    settings = (torch.backends, torch.backends.cuda.matmul, torch.backends.cudnn.conv)
    before = [setting.fp32_precision for setting in settings]
    torch.backends.cudnn.allow_tf32 = True  # as PyTorch starts, whatever ran before in this process
    yield
    torch.set_float32_matmul_precision("highest")
    for setting, value in zip(settings, before, strict=True):
        setting.fp32_precision = value
    torch.backends.cudnn.allow_tf32 = True  # of convolutions and recurrent layers, as PyTorch starts


TF32 = {
    "default": lambda: None,  # convolutions on CUDA
    "old": lambda: torch.set_float32_matmul_precision("high"),
    "medium": lambda: torch.set_float32_matmul_precision("medium"),
    "new": lambda: setattr(torch.backends.cuda.matmul, "fp32_precision", "tf32"),
    "everywhere": lambda: setattr(torch.backends, "fp32_precision", "tf32"),
}


@pytest.mark.parametrize("how", TF32)
@pytest.mark.parametrize("compiled", [False, True])
def test_full_float32_whatever_is_set(device, monkeypatch, precision, how, compiled):
    y, w = random_case("cpu", 4, 12, 1, 8, 8, 3, 3)
    exact = everything(y, w)
    emulate_tf32(monkeypatch)
    TF32[how]()
    assert torch.backends.cudnn.conv.fp32_precision == "tf32"

    def settings():
        found = [torch.backends.fp32_precision]
        for backend in (torch.backends.cuda.matmul, torch.backends.cudnn.conv):
            found.append(backend.fp32_precision)
        for backend in (torch.backends.mkldnn.matmul, torch.backends.mkldnn.conv):
            found.append(backend.fp32_precision)
        try:
            return [*found, torch.get_float32_matmul_precision()]
        except RuntimeError:  # it does not know what was set by the newer name
            return found

    before = settings()
    y32, w32 = y.to(device, torch.float32), w.to(device, torch.float32)
    for got, want in zip(everything(y32, w32, compiled), exact, strict=True):
        assert (got.cpu() - want).abs().max() < 2e-6 * want.abs().max()
    assert settings() == before
    # the emulation would show: a plain convolution is off by more
    plain = torch.nn.functional.conv2d(y32, w32).cpu() - torch.nn.functional.conv2d(y, w)
    assert plain.abs().max() > 1e-4
    # what was inherited is still inherited
    torch.backends.fp32_precision = "ieee"
    if how == "everywhere":
        assert torch.backends.cuda.matmul.fp32_precision == torch.backends.cudnn.conv.fp32_precision == "ieee"


def everything(y: Tensor, w: Tensor, compiled: bool = False) -> tuple[Tensor, ...]:
    """Both maps and all their gradients."""
    found = []
    for function in MAPS:
        yr, wr = y.detach().requires_grad_(), w.detach().requires_grad_()
        x = (torch.compile(function, backend="aot_eager", fullgraph=True) if compiled else function)(yr, wr, "TR")
        found += [x.detach(), *torch.autograd.grad(x.square().sum(), (yr, wr))]
    return tuple(found)


@pytest.mark.parametrize("function", MAPS)
def test_operations_are_counted(device, function):
    """As many as torch counts for the plain convolution by the same kernel; three times that with the gradients."""
    y, w = random_case(device, 2, 6, 2, 5, 7, 3, 2, torch.float32)
    with FlopCounterMode(display=False) as counted:
        x = function(y.requires_grad_(), w.requires_grad_(), "TL", 2)
        forward = counted.get_total_flops()
        x.sum().backward()
    with FlopCounterMode(display=False) as plain:
        torch.nn.functional.conv2d(torch.nn.functional.pad(y, (1, 0, 2, 0)), w, groups=2)
    assert forward == plain.get_total_flops() > 0
    assert counted.get_total_flops() == 3 * forward


def test_only_the_output_and_the_kernel_are_saved(device):
    y, w = random_case(device, 2, 4, 1, 4, 4, 3, 3)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        x = inverse_conv2d(y.requires_grad_(), w.requires_grad_())
    pointers = {t.data_ptr() for t in saved}
    assert pointers == {x.data_ptr(), w.data_ptr()}


def test_log_det_of_the_jacobian_is_zero(device):
    y, w = random_case(device, 1, 3, 1, 3, 4, 2, 3, scale=2.0)
    jacobian = torch.autograd.functional.jacobian(lambda y: inverse_conv2d(y, w, "TR"), y)
    assert abs(torch.linalg.slogdet(jacobian.reshape(36, 36)).logabsdet) < 1e-10


def test_strides(device):
    """Non-contiguous and channels-last inputs, kernels and gradients give what contiguous ones give."""
    y, w = random_case(device, 3, 4, 1, 6, 5, 3, 3)
    g = torch.randn(y.shape, generator=torch.Generator().manual_seed(2), dtype=y.dtype).to(device)

    def gradients(y, w, g):
        y, w = y.detach().requires_grad_(), w.detach().requires_grad_()
        x = inverse_conv2d(y, w, "BL")
        x.backward(g)
        return x.detach(), y.grad, w.grad

    want = gradients(y, w, g)
    last = {"memory_format": torch.channels_last}
    sliced = torch.stack([y, y], dim=-1)[..., 0]
    turned = w.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    for got in (
        gradients(y.to(**last), w, g),
        gradients(sliced, turned, g.to(**last)),
        gradients(y.transpose(2, 3).contiguous().transpose(2, 3), w.to(**last), g.flip(0).flip(0)),
        gradients(y, w, g.mT.contiguous().mT),
    ):
        for ours, theirs in zip(got, want, strict=True):
            assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    x = inverse_conv2d(y.requires_grad_(), w)
    x.sum().backward()  # the gradient is an expanded scalar
    assert_close(y.grad, inverse_conv2d_adjoint(torch.ones_like(y), w, "TL"), rtol=1e-10, atol=1e-10)


def inverse_conv2d_adjoint(g: Tensor, w: Tensor, order: str) -> Tensor:
    """A^-T g through the dense matrix."""
    matrix = dense_matrix(w.detach().cpu(), order, 1, *g.shape[2:])
    return torch.linalg.solve(matrix.T, g.cpu().flatten(1).T).T.view_as(g).to(g.device)


def test_the_weight_gradient_is_cut_into_parts_on_a_cpu_alone(monkeypatch):
    """There the library's copies would take memory; elsewhere each part is launches of its own."""
    real, calls = torch.nn.grad.conv2d_weight, []
    monkeypatch.setattr(torch.nn.grad, "conv2d_weight", lambda *a, **o: calls.append(a[0].shape[0]) or real(*a, **o))
    arguments = ([3, 3], [0], 1, False)
    image = torch.zeros(100, 4, 4, 4)
    torch_backend.convolution(image, None, image, *arguments)
    assert len(calls) > 1 and sum(calls) == 100
    calls.clear()
    torch_backend.convolution(image.to("meta"), None, image.to("meta"), *arguments)
    assert calls == [100]


COMPILED = pytest.mark.skipif(
    not (extension.load().path and hasattr(torch.ops.inv_conv, "kernel_gradient")),
    reason="the compiled op is not built, or before it had this",
)
KERNEL_GRADIENTS = [  # batch, channels, groups, height, width, kh, kw: whole and cut vectors of images and channels
    (1, 1, 1, 1, 1, 1, 1), (5, 12, 1, 7, 6, 3, 3), (40, 4, 1, 14, 14, 3, 3), (17, 23, 1, 8, 8, 2, 3),
    (100, 12, 1, 4, 4, 3, 3), (3, 5, 1, 2, 9, 5, 4), (9, 12, 4, 6, 5, 2, 4), (3, 12, 3, 3, 3, 7, 7),
    (2, 4, 1, 70, 40, 3, 3),
]  # fmt: skip


@COMPILED
@pytest.mark.parametrize("sizes", KERNEL_GRADIENTS)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_compiled_kernel_gradient_is_that_of_library_calls(sizes, dtype):
    """Also alike to the bit whatever the number of threads, and 0 at the pinned entries."""
    batch, channels, groups, height, width, kh, kw = sizes
    generator = torch.Generator().manual_seed(0)
    x, g = torch.randn(2, batch, channels, height, width, generator=generator, dtype=torch.float64).to(dtype)
    before = torch.get_num_threads()
    for codes in ([0], [1], [2], [3], *([[n % 4 for n in range(groups)]] if groups > 1 else [])):
        expected = torch_backend.convolution(x.double(), None, g.double(), [kh, kw], codes, groups, False)
        found = []
        try:
            for threads in (1, 2, 5):
                torch.set_num_threads(threads)
                found.append(torch.ops.inv_conv.kernel_gradient(x, g, [kh, kw], codes, groups))
        finally:
            torch.set_num_threads(before)
        assert all(torch.equal(found[0], other) for other in found[1:])
        error = (found[0] - expected).abs().max() / expected.abs().max().clamp(min=1e-9)
        assert error < (1e-13 if dtype == torch.float64 else 2e-6)
        assert not found[0][expected == 0].any()


@COMPILED
def test_the_compiled_kernel_gradient_is_used_on_a_cpu(monkeypatch):
    monkeypatch.delenv("INV_CONV_BACKEND", raising=False)
    monkeypatch.setattr(torch_backend, "convolution", lambda *_: 1 / 0)
    image = torch.randn(3, 4, 5, 5)
    assert torch.ops.inv_conv.convolution(image, None, image, [3, 3], [0], 1, False).shape == (4, 4, 3, 3)
    monkeypatch.setenv("INV_CONV_BACKEND", "torch")
    with pytest.raises(ZeroDivisionError):
        torch.ops.inv_conv.convolution(image, None, image, [3, 3], [0], 1, False)


def test_two_runs_are_bit_equal_and_batch_elements_do_not_mix(device):
    y, w = random_case(device, 37, 12, 1, 8, 8, 3, 3, torch.float32)
    y.requires_grad_(), w.requires_grad_()

    def run(y):
        x = inverse_conv2d(y, w, "TR")
        return x, *torch.autograd.grad(x.square().sum(), (y, w))

    for first, second in zip(run(y), run(y), strict=True):
        assert torch.equal(first, second)
    order = torch.randperm(37, generator=torch.Generator().manual_seed(0)).to(device)
    x, grad_y, grad_w = run(y)
    x2, grad_y2, grad_w2 = run(y.detach()[order].requires_grad_())
    assert_close(x2, x[order], rtol=1e-5, atol=1e-6)
    assert_close(grad_y2, grad_y[order], rtol=1e-5, atol=1e-5)
    assert_close(grad_w2, grad_w, rtol=1e-4, atol=1e-3 * float(grad_w.abs().max()))


def test_threads_do_not_change_the_solution(device):
    """Also from one image a thread to many."""
    if device.type != "cpu":
        pytest.skip("threads matter on the CPU only")
    before = torch.get_num_threads()
    try:
        for batch in (1, 2, 9, 40):
            y, w = random_case(device, batch, 12, 1, 10, 9, 3, 3)
            found = []
            for threads in (1, 2, 3):
                torch.set_num_threads(threads)
                found.append(inverse_conv2d(y, w))
            for other in found[1:]:
                assert_close(other, found[0], rtol=1e-12, atol=1e-12)
    finally:
        torch.set_num_threads(before)


def operator(device):
    return torch.ops.inv_conv.solve_torch if choose_backend(device.type) == "torch" else torch.ops.inv_conv.solve


@pytest.mark.parametrize("orders", [[1], [0, 3]])
@pytest.mark.parametrize("transposed", [False, True])
def test_opcheck(device, orders, transposed):
    y, w = random_case(device, 2, 4, 2, 4, 5, 3, 2)
    torch.library.opcheck(operator(device), (y.requires_grad_(), w.requires_grad_(), orders, 2, transposed))


@pytest.mark.parametrize("orders", [[1], [0, 3]])
@pytest.mark.parametrize("missing", [0, 1, 2])
def test_opcheck_convolution(device, orders, missing):
    x, w = random_case(device, 2, 4, 2, 4, 5, 3, 2)
    tensors = [tensor.requires_grad_() for tensor in (x, w, x.flip(0))]
    tensors[missing] = None
    torch.library.opcheck(torch.ops.inv_conv.convolution, (*tensors, [3, 2], orders, 2, missing != 1))


def test_compile_fullgraph(device):
    def loss(y, w):
        x = inverse_conv2d(y, w, "TR", 2)
        return (masked_conv2d(x.tanh(), w, "BL", 2) * x).sum()

    y, w = random_case(device, 3, 4, 2, 5, 4, 3, 3)
    y.requires_grad_(), w.requires_grad_()
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    want, got = loss(y, w), compiled(y, w)
    assert_close(got, want, rtol=1e-12, atol=1e-12)
    for a, b in zip(torch.autograd.grad(got, (y, w)), torch.autograd.grad(want, (y, w)), strict=True):
        assert_close(a, b, rtol=1e-10, atol=1e-10)


@pytest.mark.gpu
@pytest.mark.skipif(
    "cuda" not in available_backends("cuda" if torch.cuda.is_available() else "cpu"), reason="no CUDA op"
)
def test_cuda_side_stream_graph_and_agreement_with_cpu():
    """One launch, no wait: the solve runs on the caller's stream and inside a captured graph, for every form of the
    kernel.
    """
    for shape in [
        (100, 12, 1, 16, 16, 3, 3),
        (4, 48, 1, 64, 64, 3, 3),
        (2, 48, 1, 12, 12, 5, 5),
        (3, 256, 1, 40, 40, 3, 3),
    ]:
        y, w = random_case("cpu", *shape, dtype=torch.float32)
        want = inverse_conv2d(y, w)
        y, w = y.cuda(), w.cuda()
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            got = inverse_conv2d(y, w)
        torch.cuda.current_stream().wait_stream(stream)
        assert_close(got.cpu(), want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = inverse_conv2d(y, w)
        graph.replay()
        assert_close(got.cpu(), want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


def test_bad_arguments_are_named():
    y, w = torch.zeros(2, 4, 3, 3), torch.zeros(4, 2, 3, 3)
    for arguments, text in [
        ((y[0], w, "TL", 2), "3 and 4 axes"),
        ((y, w, "TL", 1), "need a kernel"),
        ((y, w, "TL", 3), "3 groups"),
        ((y, w, "LT", 2), "unknown order 'LT'"),
        ((y, w, ("TL", "TR", "BL"), 2), "3 orders for 2 groups"),
        ((y, w[..., :0], "TL", 2), "empty kernel"),
        ((y, w.double(), "TL", 2), "float64"),
        ((y.long(), w, "TL", 2), "floating-point"),
        ((y, w.to("meta"), "TL", 2), "meta"),
    ]:
        for function in (inverse_conv2d, masked_conv2d):
            with pytest.raises(ValueError, match=text):
                function(*arguments)
    for arguments in ((0, (3, 3)), (4, (3, 0)), (4, (3, 3), "TL", 3)):
        with pytest.raises(ValueError):
            kernel_mask(*arguments)


def test_forced_backend(monkeypatch, caplog):
    monkeypatch.setenv("INV_CONV_BACKEND", "cpuu")
    with pytest.raises(UserError, match="did you mean 'cpu'"):
        choose_backend("cpu")
    monkeypatch.setenv("INV_CONV_BACKEND", "cuda")
    with pytest.raises(UserError, match="for tensors on cpu"):
        choose_backend("cpu")
    monkeypatch.setenv("INV_CONV_BACKEND", "torch")
    assert choose_backend("cpu") == choose_backend("cuda") == "torch"
    # without the library: one line, once, with the reason and the command
    monkeypatch.setattr(extension, "load", lambda: extension.Extension(None, "it is not built"))
    extension.say_once.cache_clear()
    monkeypatch.setenv("INV_CONV_BACKEND", "cpu")
    with pytest.raises(UserError, match=r"python setup\.py install"):
        choose_backend("cpu")
    monkeypatch.delenv("INV_CONV_BACKEND")
    with caplog.at_level(logging.WARNING):
        assert [choose_backend("cpu") for _ in range(3)] == ["torch"] * 3
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == 1 and "it is not built" in lines[0] and extension.BUILD_COMMAND in lines[0]
    extension.say_once.cache_clear()


@pytest.mark.parametrize(
    ("sizes", "tile"),
    [((28, 28, 1, 3, 3, 100), (4, 4)), ((28, 28, 4, 3, 3, 100), (2, 2)), ((8, 8, 4, 5, 5, 16), (4, 4)),
     ((16, 16, 16, 3, 3, 100), (1, 1)), ((64, 64, 48, 3, 3, 8), (1, 1)), ((1, 1, 4, 3, 3, 8), (1, 1))],
)  # fmt: skip
def test_tiles_are_wide_where_channels_are_few(sizes, tile):
    """What the estimate makes of the sizes: a step costs as much as many multiply-adds, whose number grows with C^2."""
    assert torch_backend.tile_size(*sizes) == tile


@pytest.mark.skipif(not extension.load().path, reason="the compiled op is not built")
@pytest.mark.parametrize("isa", ["generic", "avx2"])
def test_narrower_instruction_sets(isa):
    """The library has a solver for each instruction set: the widest one runs, and a narrower one on request."""
    script = """
import sys, torch
from inv_flow.utils.inv_conv_cuda import extension, inverse_conv2d, masked_conv2d
torch.manual_seed(0)
for sizes in [(5, 3, 7, 6, 3), (40, 12, 5, 5, 3), (1, 20, 9, 8, 2)]:
    b, c, h, w, k = sizes
    for dtype in (torch.float32, torch.float64):
        y, kernel = torch.randn(b, c, h, w, dtype=dtype), 0.05 * torch.randn(c, c, k, k, dtype=dtype)
        x = inverse_conv2d(y, kernel, "BR")
        assert (masked_conv2d(x, kernel, "BR") - y).abs().max() < (1e-4 if dtype is torch.float32 else 1e-11), sizes
print(extension.load().description)
"""
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={**os.environ, "INV_CONV_ISA": isa, "INV_CONV_BACKEND": "cpu"},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip().endswith(("generic", isa))
