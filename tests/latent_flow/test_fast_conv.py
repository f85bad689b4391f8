"""The convolutions with fewer multiplications against the plain ones."""

import pytest
import torch

from latent_flow import fast_conv
from latent_flow.benchmark import float32_errors
from latent_flow.benchmark import main as benchmark_main
from latent_flow.encoders import ConvVAE, ConvVAE2
from latent_flow.fast_conv import (
    Conv,
    ConvTranspose,
    DoublingConvTranspose2d,
    HalvingConv2d,
    ThinConvTranspose,
    batch_last,
    conv_ref,
    conv_transpose_ref,
    matrices,
    plan,
)


def problem(size: int, batch: int, c: int = 5, o: int = 6, dtype=torch.float64):
    torch.manual_seed(size * 100 + batch)
    x, g = torch.randn(batch, c, size, size), torch.randn(batch, o, 2 * size, 2 * size)
    parts = (x, g, torch.randn(c, o, 4, 4), torch.randn(c), torch.randn(o))
    return tuple(part.to(dtype).requires_grad_() for part in parts)


def run(function, x, weight, bias):
    return function.apply(batch_last(x), weight, bias).permute(3, 0, 1, 2)


def assert_same_gradients(got, want, inputs, atol=1e-10):
    """Equal gradients of two results for the same random gradient of the result."""
    factor = torch.randn_like(want)
    pairs = zip(torch.autograd.grad(got, inputs, factor), torch.autograd.grad(want, inputs, factor), strict=True)
    for a, b in pairs:
        torch.testing.assert_close(a, b, rtol=1e-10, atol=atol)


@pytest.mark.parametrize("size", range(1, 8))
def test_matrices_multiply_polynomials(size):
    inputs, taps, out = matrices(size)
    a, b = torch.randn(size, dtype=torch.float64), torch.randn(2, dtype=torch.float64)
    product = torch.zeros(size + 1, dtype=torch.float64)
    for i, j in ((i, j) for i in range(size) for j in range(2)):
        product[i + j] += a[i] * b[j]
    torch.testing.assert_close(out @ ((inputs @ a) * (taps @ b)), product, rtol=0, atol=1e-12)


# one tile (1 to 4, 7), several (8, 14, 16), a padded one (5); 500 samples are more than one part of the batch
@pytest.mark.parametrize(
    ("size", "batch"), [(1, 2), (3, 2), (4, 1), (5, 3), (7, 1), (7, 500), (8, 3), (14, 2), (16, 30)]
)
def test_values_and_gradients_equal_the_plain_operations(size, batch):
    x, g, weight, c_bias, o_bias = problem(size, batch)
    cases = [
        (ConvTranspose, conv_transpose_ref, x, o_bias),
        (ThinConvTranspose, conv_transpose_ref, x, o_bias),
        (Conv, conv_ref, g, c_bias),
    ]
    for function, plain, start, bias in cases:
        got, want = run(function, start, weight, bias), plain(start, weight, bias)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-11)
        assert_same_gradients(got, want, (start, weight, bias))


@pytest.mark.parametrize(("size", "batch"), [(7, 3), (7, 500), (8, 3)])
def test_with_a_relu(size, batch):
    x, _g, weight, _c_bias, bias = problem(size, batch)
    got = ConvTranspose.apply(batch_last(x), weight, bias, True).permute(3, 0, 1, 2)
    want = conv_transpose_ref(x, weight, bias).relu()
    torch.testing.assert_close(got, want, rtol=0, atol=1e-11)
    assert_same_gradients(got, want, (x, weight, bias))


@pytest.mark.parametrize("function", [ConvTranspose, ThinConvTranspose, Conv])
@pytest.mark.parametrize("size", [4, 5, 7])
def test_gradcheck(function, size):
    x, g, weight, c_bias, o_bias = problem(size, 2, 2, 3)
    start, bias = (g, c_bias) if function is Conv else (x, o_bias)
    assert torch.autograd.gradcheck(function.apply, (batch_last(start.detach()).requires_grad_(), weight, bias))


@pytest.mark.parametrize(("size", "bound"), [(7, 3e-5), (4, 3e-6), (16, 3e-6)])
def test_float32_error(size, bound):
    x, g, weight, c_bias, o_bias = problem(size, 4, 64, 32)
    for function, plain, start, bias in (
        (ConvTranspose, conv_transpose_ref, x, o_bias),
        (Conv, conv_ref, g, c_bias),
    ):
        want = plain(start, weight, bias)
        got = run(function, start.float(), weight.float(), bias.float())
        assert (got - want).square().mean().sqrt() < bound * want.square().mean().sqrt()


def counting(monkeypatch) -> list[str]:
    """The names of the fast functions that were called since."""
    called = []
    for name in ("Conv", "ConvTranspose", "ThinConvTranspose"):
        function = getattr(fast_conv, name)
        counted = type(
            name,
            (),
            {
                "apply": staticmethod(
                    lambda *args, function=function, name=name: called.append(name) or function.apply(*args)
                )
            },
        )
        monkeypatch.setattr(fast_conv, name, counted)
    return called


def test_layers_take_the_fast_way_where_it_pays(monkeypatch):
    called = counting(monkeypatch)
    halving, doubling, image = HalvingConv2d(32, 64), DoublingConvTranspose2d(64, 32), DoublingConvTranspose2d(64, 3)
    large, small = torch.randn(16, 32, 14, 14), torch.randn(16, 64, 7, 7)
    plain = lambda layer, x: getattr(super(type(layer), layer), "forward")(x)  # noqa: E731, B009
    for layer, x, name in (
        (halving, large, "Conv"),
        (doubling, small, "ConvTranspose"),
        (image, small, "ThinConvTranspose"),
    ):
        called.clear()
        torch.testing.assert_close(layer(x), plain(layer, x), rtol=1e-4, atol=1e-4)
        assert called == [name]
        called.clear()
        layer(x[:2])  # too few samples, but for the thin layer
        assert called == ([name] if layer is image else [])
    called.clear()
    HalvingConv2d(3, 64)(torch.randn(16, 3, 28, 28))  # too few channels
    halving(torch.randn(16, 32, 15, 15))  # odd images
    halving.half()(large.half())  # other types
    assert called == []


def test_float32_also_under_autocast(monkeypatch):
    called = counting(monkeypatch)
    layer, x = DoublingConvTranspose2d(64, 32), torch.randn(16, 64, 7, 7)
    with torch.autocast("cpu", torch.bfloat16):
        out = layer(x.bfloat16())
    out.sum().backward()
    assert called == ["ConvTranspose"] and out.dtype == torch.float32 and layer.weight.grad.dtype == torch.float32
    want = conv_transpose_ref(x.bfloat16().float(), layer.weight, layer.bias)
    torch.testing.assert_close(out, want, rtol=1e-4, atol=1e-4)


def test_two_layers_between_forward_and_backward():
    """The scratch memory that layers share holds nothing from the forward to the backward pass."""
    _x, g, weight, c_bias, o_bias = problem(7, 3)
    twice = run(Conv, run(ConvTranspose, run(Conv, g, weight, c_bias), weight, o_bias), weight, c_bias)
    plain = conv_ref(conv_transpose_ref(conv_ref(g, weight, c_bias), weight, o_bias), weight, c_bias)
    torch.testing.assert_close(twice, plain, rtol=1e-11, atol=1e-9)
    assert_same_gradients(twice, plain, (g, weight), atol=1e-7)


@pytest.mark.parametrize(("vae", "size"), [(ConvVAE, 28), (ConvVAE2, 64)])
def test_whole_vae_equals_its_plain_layers(vae, size, monkeypatch):
    torch.manual_seed(0)
    model, x, eps = vae(3, 32, size).double(), torch.rand(16, 3, size, size).double(), torch.randn(16, 32).double()

    def gradients() -> list[torch.Tensor]:
        model.zero_grad()
        out, mean, log_var, _ = model(x, eps)
        (out.square().sum() + mean.sum() + log_var.square().sum()).backward()
        return [out.detach(), *(parameter.grad.clone() for parameter in model.parameters())]

    called = counting(monkeypatch)
    fast = gradients()
    assert "Conv" in called and "ConvTranspose" in called
    called.clear()
    with fast_conv.plain_convolutions():
        plain = gradients()
    assert called == []
    for a, b in zip(fast, plain, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_plans_are_made_once():
    assert plan(7, torch.float32) is plan(7, torch.float32)
    assert plan(7, torch.float64) is not plan(7, torch.float32)


def test_float32_gradients_of_a_whole_step(capsys):
    lines = float32_errors(16, 32, seeds=1)
    assert capsys.readouterr().out.splitlines() == lines
    ninety = [float(line.split("90 % below ")[1].split(",")[0]) for line in lines]  # fast, plain
    assert 0 < ninety[0] < 1e-4 and 0 < ninety[1] < 1e-4
    assert ninety[0] != ninety[1]  # two ways of computing were compared


def test_benchmark_prints_ratios(capsys):
    benchmark_main(["--batch-size", "2", "--latent-size", "16", "--repeat", "1", "--variants", "supervised"])
    head, cpu, wall = capsys.readouterr().out.splitlines()
    assert "ref/same" in head and cpu.split()[2] == "cpu" and wall.split()[2] == "wall"
    values = [float(value) for value in wall.split()[3:]]
    assert len(values) == 7 and all(value > 0 for value in values)
