"""The layers of common.layers against PyTorch's own: values, gradients, transforms, and what an export sees."""

from collections.abc import Callable
from functools import partial
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from common.layers import ConvTranspose2d, PatchConv2d, elu, in_parts

LAST, FIRST = torch.channels_last, torch.contiguous_format


def numbers() -> torch.Tensor:
    """From -100 to 5, dense about zero, with what is no number."""
    near = torch.logspace(-12, 0, 2001, dtype=torch.float64)
    return torch.cat([torch.linspace(-100, 5, 10_001, dtype=torch.float64), near, -near, torch.zeros(1)])


@pytest.mark.parametrize(("dtype", "error"), [(torch.float32, 1e-7), (torch.bfloat16, 2**-8), (torch.float64, 0)])
def test_elu_is_elu(dtype, error):
    x = numbers().to(dtype)
    exact = F.elu(x.double())
    y = elu(x.clone())
    assert y.dtype == dtype
    assert ((y.double() - exact).abs() <= error * exact.abs() + min(error, 1e-7)).all()


def test_elu_of_what_is_no_number():
    y = elu(torch.tensor([float("nan"), float("inf"), -float("inf")]))
    assert y[0].isnan()
    assert y[1:].tolist() == [float("inf"), -1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_gradient_of_elu(dtype):
    x, weight = numbers().to(dtype), torch.randn(len(numbers())).to(dtype)
    ours, theirs = x.clone().requires_grad_(), x.double().requires_grad_()
    (elu(ours * 1) * weight).sum().backward()
    (F.elu(theirs) * weight).sum().backward()
    error = 1e-6 if dtype == torch.float32 else 2**-6
    torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=error, atol=error)


def test_elu_under_transforms():
    """A second derivative, one forwards, and many at a time."""
    x, direction = torch.linspace(-2, 1, 12).view(4, 3), torch.linspace(1, 2, 12).view(4, 3)

    def f(function):
        return lambda row: (function(row * 1) ** 3).sum()

    for transform in (
        lambda g: torch.func.vmap(torch.func.hessian(g))(x),
        lambda g: torch.func.jvp(torch.func.vmap(g), (x,), (direction,))[1],
        lambda g: torch.func.jacfwd(torch.func.jacfwd(g))(x[0]),
        lambda g: torch.autograd.functional.hessian(g, x[0]),
        lambda g: torch.autograd.functional.hessian(g, x[0], outer_jacobian_strategy="forward-mode", vectorize=True),
    ):
        torch.testing.assert_close(transform(f(elu)), transform(f(F.elu)), rtol=1e-5, atol=1e-6)


def test_elu_leaves_a_parameter_alone():
    for dtype in (torch.float32, torch.float64):
        x = torch.linspace(-1, 1, 5, dtype=dtype).requires_grad_()
        elu(x).sum().backward()
        torch.testing.assert_close(x.grad, x.detach().exp().clamp(max=1))


def same_layer(kind: Callable, plain: Callable, *sizes: int, **options) -> tuple[nn.Module, nn.Module]:
    """A layer and PyTorch's with its weights, in float64."""
    torch.manual_seed(0)
    ours, theirs = kind(*sizes, **options).double(), plain(*sizes, **options).double()
    assert list(ours.state_dict()) == list(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    return ours, theirs


def check(ours: nn.Module, theirs: nn.Module, x: torch.Tensor) -> None:
    """Equal outputs, and gradients of the input and of every parameter."""
    results = []
    for layer in (ours, theirs):
        image = x.clone(memory_format=torch.preserve_format).requires_grad_()
        y = layer(image)
        weight = torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view(y.shape)
        results.append([y, *torch.autograd.grad((y * weight).sum(), [image, *layer.parameters()])])
    for one, other in zip(*results, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("memory", [FIRST, LAST])
@pytest.mark.parametrize(
    "options",
    [{"stride": 2, "padding": 1}, {"stride": 1}, {"stride": (2, 1), "output_padding": (1, 0), "dilation": 2},
     {"stride": 2, "groups": 2}],
)  # fmt: skip
def test_the_transposed_convolution(options, memory, bias):
    ours, theirs = same_layer(ConvTranspose2d, nn.ConvTranspose2d, 4, 6, 4, bias=bias, **options)
    check(ours, theirs, torch.randn(3, 4, 5, 7, dtype=torch.float64).contiguous(memory_format=memory))


class Sums(TorchDispatchMode):
    """Notes the types of what is added in place."""

    def __init__(self):
        super().__init__()
        self.types = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten.add_.Tensor:
            self.types.append((args[0].dtype, args[1].dtype))
        return function(*args, **(kwargs or {}))


def test_the_transposed_convolution_keeps_bfloat16():
    """A bias of float32 must not turn the sum, three times the layer's size in memory, into float32."""
    layer = ConvTranspose2d(4, 6, 4, 2, 1)
    with torch.autocast("cpu", torch.bfloat16):
        assert layer(torch.randn(2, 4, 5, 5)).dtype == torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16), Sums() as sums:
        layer(torch.randn(2, 4, 5, 5))
    assert sums.types == [(torch.bfloat16, torch.bfloat16)]


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_the_convolution_of_patches(kernel, bias):
    plain = partial(nn.Conv2d, padding=kernel // 2)
    ours, theirs = same_layer(PatchConv2d, plain, 3, 8, kernel, bias=bias)
    check(ours, theirs, torch.randn(2, 3, 6, 9, dtype=torch.float64))


@pytest.mark.parametrize("images", [1, 5, 11])
def test_parts_of_a_batch_are_the_batch(images):
    net = nn.Sequential(nn.Conv2d(2, 512, 3, padding=1), nn.ReLU(inplace=True), nn.Conv2d(512, 2, 1)).double()
    x = torch.randn(images, 2, 32, 32, dtype=torch.float64)  # 2**19 numbers an image: four to a part
    sizes = []
    net.register_forward_hook(lambda module, inputs, y: sizes.append(len(y)))
    y = in_parts(net, x, 512)
    assert sum(sizes) == images
    assert max(sizes) <= 4
    assert all(before >= after for before, after in pairwise(sizes))
    torch.testing.assert_close(y, net(x), rtol=1e-12, atol=1e-12)


def test_an_export_sees_pytorchs_own_layers():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches, self.up = PatchConv2d(2, 4, 3), ConvTranspose2d(4, 2, 4, 2, 1)

        def forward(self, x):
            return in_parts(lambda x: self.up(elu(self.patches(x))), x, 2**21)

    program = torch.export.export(Net(), (torch.randn(3, 2, 8, 8),), dynamic_shapes=[{0: torch.export.Dim("batch")}])
    called = [str(node.target) for node in program.graph.nodes if node.op == "call_function"]
    assert called == ["aten.conv2d.default", "aten.elu_.default", "aten.conv_transpose2d.input"]
