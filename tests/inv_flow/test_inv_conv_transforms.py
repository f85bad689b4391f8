"""Derivatives of the inverse and the masked convolution, forward and reverse, and `torch.func` transforms of both.

The yardstick is the dense matrix of the convolution in float64, which plain autograd differentiates.
"""

import copy
import gc
import pickle
import weakref

import pytest
import torch
from inv_conv_cases import DEVICES, MIXED, dense_matrix, random_case
from torch import Tensor
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.testing import assert_close

from inv_flow.layers.inv_conv import InverseConv2d, InverseConvUnit, MaskedConv2d
from inv_flow.utils.inv_conv_cuda import ORDERS, inverse_conv2d, masked_conv2d
from inv_flow.utils.inv_conv_cuda.ops import choose_backend

EXACT = {"rtol": 1e-9, "atol": 1e-9}
MAPS = {"inverse": inverse_conv2d, "masked": masked_conv2d}


@pytest.fixture(params=DEVICES, ids=[f"{kind}-{name}" for kind, name in DEVICES])
def device(request, monkeypatch):
    """A device, with the backend forced."""
    kind, backend = request.param
    monkeypatch.setenv("INV_CONV_BACKEND", backend)
    return torch.device(kind)


def dense(name: str, order, groups: int):
    """The map `name` by its dense matrix."""

    def apply(y: Tensor, w: Tensor) -> Tensor:
        matrix = dense_matrix(w, order, groups, *y.shape[2:])
        flat = y.flatten(1).T
        return (torch.linalg.solve(matrix, flat) if name == "inverse" else matrix @ flat).T.view_as(y)

    return apply


def jacobians(function, y: Tensor, w: Tensor) -> tuple[Tensor, ...]:
    """By plain reverse-mode autograd: d function / d y and d function / d w."""
    return torch.autograd.functional.jacobian(function, (y, w), vectorize=True)


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("order", [*ORDERS, MIXED])
def test_first_derivatives(device, name, order):
    y, w = random_case("cpu", 2, 4, 2, 3, 4, 2, 3)
    want = jacobians(dense(name, order, 2), y, w)
    dy, dw = y.flip(0), w.flip(1)  # the tangents have pinned entries, too
    tangents = [torch.einsum("bchwijkl,ijkl->bchw", jacobian, d) for jacobian, d in zip(want, (dy, dw), strict=True)]
    y, w, dy, dw = (tensor.to(device) for tensor in (y, w, dy, dw))

    def function(y, w):
        return MAPS[name](y, w, order, 2)

    for got in (
        jacfwd(function, argnums=(0, 1))(y, w),
        jacrev(function, argnums=(0, 1))(y, w),
        torch.autograd.functional.jacobian(function, (y, w), strategy="forward-mode", vectorize=True),
        torch.autograd.functional.jacobian(function, (y, w), vectorize=True),
    ):
        for ours, theirs in zip(got, want, strict=True):
            assert_close(ours.cpu(), theirs, **EXACT)

    x = function(y, w)
    for value, tangent in (
        jvp(function, (y, w), (dy, dw)),
        jvp(lambda y: function(y, w), (y,), (dy,)),
        jvp(lambda w: function(y, w), (w,), (dw,)),
        # the image also enters beside the map
        jvp(lambda y: y + function(y, w), (y,), (dy,)),
    ):
        assert_close(value, x if value.equal(x) else x + y, **EXACT)
        assert tangent.abs().max() > 0.1
    assert_close(jvp(function, (y, w), (dy, dw))[1].cpu(), tangents[0] + tangents[1], **EXACT)
    assert_close(jvp(lambda w: function(y, w), (w,), (dw,))[1].cpu(), tangents[1], **EXACT)
    assert_close(jvp(lambda y: y + function(y, w), (y,), (dy,))[1].cpu(), tangents[0] + dy.cpu(), **EXACT)
    with forward_ad.dual_level():
        dual = function(forward_ad.make_dual(y, dy), w.requires_grad_())
        assert_close(forward_ad.unpack_dual(dual).tangent.detach().cpu(), tangents[0], **EXACT)
        # the tangent depends on w
        (mixed,) = torch.autograd.grad(forward_ad.unpack_dual(dual).tangent.sum(), w)
    assert_close(mixed, grad(lambda w: jvp(lambda y: function(y, w), (y,), (dy,))[1].sum())(w.detach()), **EXACT)
    assert mixed.abs().max() > 0.1 or name == "masked"


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("order", ["BR", MIXED])
def test_second_derivatives(device, name, order):
    """Every pair of modes against autograd's through the dense matrix."""
    y, w = random_case("cpu", 1, 2, 2, 2, 3, 2, 2)
    weights = torch.randn(y.shape, generator=torch.Generator().manual_seed(1), dtype=y.dtype)

    def value(function):
        return lambda y, w: (function(y, w).sin() * weights.to(y)).sum()

    want = torch.autograd.functional.hessian(value(dense(name, order, 2)), (y, w))
    ours = value(lambda y, w: MAPS[name](y, w, order, 2))
    y, w = y.to(device), w.to(device)
    for outer in (jacfwd, jacrev):
        for inner in (jacfwd, jacrev):
            got = outer(inner(ours, argnums=(0, 1)), argnums=(0, 1))(y, w)
            for a in range(2):
                for b in range(2):
                    assert_close(got[a][b].cpu(), want[a][b], **EXACT)
    assert_close(hessian(ours)(y, w).cpu(), want[0][0], **EXACT)
    # third order, by three different ways
    v = torch.ones_like(w)
    third = [
        jvp(lambda w: jvp(lambda w: jvp(lambda w: ours(y, w), (w,), (v,))[1], (w,), (v,))[1], (w,), (v,))[1],
        jvp(lambda w: jvp(lambda w: (grad(ours, 1)(y, w) * v).sum(), (w,), (v,))[1], (w,), (v,))[1],
        (grad(lambda w: (grad(lambda w: (grad(ours, 1)(y, w) * v).sum())(w) * v).sum())(w) * v).sum(),
    ]
    assert_close(third[0], third[1], **EXACT)
    assert_close(third[0], third[2], **EXACT)


@pytest.mark.parametrize("name", MAPS)
@pytest.mark.parametrize("order", ["TR", MIXED])
@pytest.mark.parametrize("in_dims", [(0, None), (2, None), (None, 0), (None, 4), (0, 0), (3, 1), (1, -1)])
def test_vmap(device, name, order, in_dims):
    """Over images, kernels or both, at any axis: values and every gradient of each copy on its own."""
    copies = 3
    cases = [random_case(device, 2, 4, 2, 3, 4, 2, 3, seed=seed) for seed in range(copies)]
    stacked = [
        cases[0][n] if axis is None else torch.stack([case[n] for case in cases], dim=axis)
        for n, axis in enumerate(in_dims)
    ]
    cases = [[cases[0 if axis is None else c][n] for n, axis in enumerate(in_dims)] for c in range(copies)]

    def function(y, w):
        return MAPS[name](y, w, order, 2)

    def loss(y, w):
        return function(y, w).sin().sum()

    def tangent(y, w):
        return jvp(function, (y, w), (y.flip(0), w.flip(0)))[1]

    for of_one in (function, grad(loss), grad(loss, argnums=1), tangent, lambda y, w: vjp(function, y, w)[1](y)[1]):
        got = vmap(of_one, in_dims=in_dims)(*stacked)
        want = torch.stack([of_one(*case) for case in cases])
        assert_close(got, want, rtol=1e-11, atol=1e-11)
    got = vmap(function, in_dims=in_dims, out_dims=2)(*stacked)
    assert_close(got, torch.stack([function(*case) for case in cases], dim=2), rtol=1e-11, atol=1e-11)
    # vmap outside of a derivative and inside of it
    summed = grad(lambda y, w: vmap(loss, in_dims=in_dims)(y, w).sum(), argnums=(0, 1))(*stacked)
    apart = [torch.autograd.functional.jacobian(loss, tuple(case)) for case in cases]
    for n, axis in enumerate(in_dims):
        parts = [gradients[n] for gradients in apart]
        assert_close(summed[n], sum(parts) if axis is None else torch.stack(parts, axis), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("name", MAPS)
def test_nested_vmap(device, name):
    """Images against kernels, all pairs; and gradients of these."""
    y, _ = random_case(device, 6, 4, 2, 3, 4, 2, 3)
    y = y.unflatten(0, (3, 2))
    w = torch.stack([random_case(device, 1, 4, 2, 1, 1, 2, 3, seed=seed)[1] for seed in range(5)])

    def loss(y, w):
        return MAPS[name](y, w, MIXED, 2).sin().sum()

    for of_one in (lambda y, w: MAPS[name](y, w, MIXED, 2), grad(loss), grad(loss, argnums=1)):
        got = vmap(vmap(of_one, (None, 0)), (0, None))(y, w)
        want = torch.stack([torch.stack([of_one(a, b) for b in w]) for a in y])
        assert_close(got, want, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("name", MAPS)
def test_only_one_input_is_differentiated(device, name):
    y, w = random_case(device, 2, 4, 1, 3, 4, 2, 3)
    both = torch.autograd.grad(MAPS[name](y.requires_grad_(), w.requires_grad_(), "BL").sin().sum(), (y, w))
    y, w = y.detach(), w.detach()
    (alone,) = torch.autograd.grad(MAPS[name](y.requires_grad_(), w, "BL").sin().sum(), y)
    assert torch.equal(alone, both[0])
    (alone,) = torch.autograd.grad(MAPS[name](y.detach(), w.requires_grad_(), "BL").sin().sum(), w)
    assert torch.equal(alone, both[1])
    assert not MAPS[name](y.detach(), w.detach(), "BL").requires_grad
    with torch.no_grad():
        assert not MAPS[name](y, w, "BL").requires_grad


@pytest.mark.parametrize("operator", ["solve", "convolution"])
@pytest.mark.parametrize("transform", [jvp, grad, "compiled jvp", "compiled grad"])
def test_what_is_not_supported_raises(device, operator, transform):
    """The bare operators, and transforms inside of compiled code, have no derivative rules: no zeros, an error."""
    y, w = random_case(device, 2, 4, 1, 3, 4, 2, 3)
    if operator == "solve":
        name = "solve_torch" if choose_backend(device) == "torch" else "solve"
        of_image = lambda y: getattr(torch.ops.inv_conv, name)(y, w, [0], 1, False)  # noqa: E731
        function = inverse_conv2d
    else:
        of_image = lambda y: torch.ops.inv_conv.convolution(y, w, None, [2, 3], [0], 1, True)  # noqa: E731
        function = masked_conv2d
    if transform in (jvp, grad):
        run = lambda y: jvp(of_image, (y,), (y,))[1] if transform is jvp else grad(lambda y: of_image(y).sum())(y)  # noqa: E731
    elif transform == "compiled jvp":
        run = torch.compile(lambda y: jvp(lambda y: function(y, w), (y,), (y,))[1], backend="aot_eager", fullgraph=True)
    else:
        run = torch.compile(lambda y: grad(lambda y: function(y, w).sum())(y), backend="aot_eager", fullgraph=True)
    with pytest.raises(Exception, match="custom_function_call"):
        run(y)


def test_bare_operators_keep_plain_tangents(device):
    """Outside of `torch.func` they have every derivative."""
    y, w = random_case(device, 2, 4, 1, 3, 4, 2, 3)
    with forward_ad.dual_level():
        dual = torch.ops.inv_conv.solve_torch(forward_ad.make_dual(y, y), w, [0], 1, False)
        assert_close(forward_ad.unpack_dual(dual).tangent, inverse_conv2d(y, w), **EXACT)
        dual = torch.ops.inv_conv.convolution(forward_ad.make_dual(y, y), w, None, [2, 3], [0], 1, True)
        assert_close(forward_ad.unpack_dual(dual).tangent, masked_conv2d(y, w), **EXACT)


@pytest.mark.parametrize("layer", [InverseConv2d, MaskedConv2d, InverseConvUnit])
def test_layers(device, layer):
    """Per-sample gradients of the parameters, the log-determinant of the Jacobian, copies of the module."""
    torch.manual_seed(0)
    module = layer(4, 3, init_std=0.1).to(device).double()
    x = torch.randn(3, 4, 3, 4, dtype=torch.float64, device=device)
    parameters = dict(module.named_parameters())

    def loss(parameters, x):
        return functional_call(module, parameters, (x[None],))[0].sin().sum()

    got = vmap(grad(loss), in_dims=(None, 0))(parameters, x)
    for n in range(3):
        module.zero_grad()
        module(x[n : n + 1])[0].sin().sum().backward()
        for key, parameter in module.named_parameters():
            assert_close(got[key][n], parameter.grad, **EXACT)
    jacobian = vmap(jacfwd(lambda x: module(x[None])[0][0]))(x).reshape(3, 48, 48)
    assert torch.linalg.slogdet(jacobian).logabsdet.abs().max() < 1e-10
    for twin in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(twin(x)[0], module(x)[0])
        assert_close(twin.reverse(twin(x)[0]), x, **EXACT)


@pytest.mark.parametrize("name", MAPS)
def test_memory_is_given_back_without_the_garbage_collector(device, name):
    y, w = random_case(device, 2, 4, 1, 3, 4, 2, 3)
    gc.disable()
    try:
        x = MAPS[name](y.requires_grad_(), w.requires_grad_())
        alive = [weakref.ref(x), weakref.ref(x.grad_fn)]
        del x
        assert [ref() for ref in alive] == [None, None]
    finally:
        gc.enable()
