"""The layers of the inverse convolution: inverse, log-determinant, gradients, initialisation, the stability
certificate.
"""

import pytest
import torch
from torch.testing import assert_close

from inv_flow.layers.inv_conv import InverseConv2d, InverseConvUnit, MaskedConv2d
from inv_flow.utils.inv_conv_cuda import ORDERS

LAYERS = {
    **{f"inverse {order}": (lambda order=order: InverseConv2d(4, 3, order)) for order in ORDERS},
    **{f"masked {order}": (lambda order=order: MaskedConv2d(4, (2, 3), order)) for order in ORDERS},
    "groups": lambda: InverseConv2d(4, 3, "TR", groups=2),
    "order a group": lambda: MaskedConv2d(4, 2, order=("TL", "BR"), groups=2),
    "unit": lambda: InverseConvUnit(4, 3),
    "split unit": lambda: InverseConvUnit(4, 3, split=True),
    "bounded": lambda: InverseConv2d(4, 3, init_std=0.3, max_row_sum=0.8),
}


@pytest.fixture(params=LAYERS)
def layer(request):
    torch.manual_seed(0)
    made = LAYERS[request.param]()
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))  # also where the mask is 0: it must not matter
    return made


def test_reverse_undoes_forward(layer):
    x = torch.randn(3, 4, 7, 6)
    z, log_det = layer(x)
    assert (layer.reverse(z) - x).abs().max() < 1e-5
    assert (layer(layer.reverse(x))[0] - x).abs().max() < 1e-5
    assert (z - x).abs().max() > 1e-2
    assert log_det.shape == (3,) and (log_det == 0).all()


def test_log_det_is_that_of_the_jacobian(layer):
    layer = layer.double()
    x = torch.randn(1, 4, 3, 4, dtype=torch.float64)
    jacobian = torch.autograd.functional.jacobian(lambda x: layer(x)[0], x).reshape(48, 48)
    assert abs(torch.linalg.slogdet(jacobian).logabsdet) < 1e-10


def test_every_free_weight_has_a_gradient(layer):
    z, _ = layer(torch.randn(2, 4, 6, 6))
    z.square().sum().backward()
    for module in layer.modules():
        if hasattr(module, "mask"):
            assert (module.weight.grad[module.mask == 1] != 0).all()
            assert (module.weight.grad[module.mask == 0] == 0).all()


def test_save_and_load(layer, tmp_path):
    torch.save(layer.state_dict(), tmp_path / "weights.pt")
    state = torch.load(tmp_path / "weights.pt", weights_only=True)
    assert all(name.endswith("weight") for name in state)
    x = torch.randn(2, 4, 5, 5)
    want = layer(x)[0]
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
    assert torch.equal(layer(x)[0], x)  # zero free weights: the identity
    layer.load_state_dict(state)
    assert torch.equal(layer(x)[0], want)


def test_initialisation_is_the_identity_plus_small_noise():
    torch.manual_seed(0)
    layer = InverseConv2d(24, 3)
    free = layer.weight[layer.mask == 1]
    assert free.numel() == 24 * 24 * 9 - 24 * 25 // 2
    assert abs(free.std() - 0.01) < 0.001 and abs(free.mean()) < 0.001
    assert (layer.weight[layer.mask == 0] == 0).all()
    x = torch.randn(2, 24, 16, 16)
    assert_close(layer(x)[0].std(), x.std(), rtol=0.05, atol=0.0)


@pytest.mark.parametrize("rho", [0.5, 0.9])
@pytest.mark.parametrize("order", ORDERS)
def test_row_sum_certificate(rho, order):
    """|x| <= |y| / (1 - rho) in the maximum norm, for weights that explode without the bound."""
    torch.manual_seed(0)
    bounded = InverseConv2d(12, 3, order, init_std=0.2, max_row_sum=rho).double()
    free = InverseConv2d(12, 3, order).double()
    with torch.no_grad():
        free.weight.copy_(bounded.weight)
    y = torch.rand(4, 12, 32, 32, dtype=torch.float64).mul_(2).sub_(1).sign_()
    assert free(y)[0].abs().max() > 1e4 * y.abs().max()
    assert (bounded.free().abs().sum(dim=(1, 2, 3)) <= rho + 1e-12).all() and (
        bounded.free().abs().sum(dim=(1, 2, 3)) > rho - 1e-6
    ).all()
    x = bounded(y)[0]
    assert x.abs().max() <= y.abs().max() / (1 - rho)
    # weights of one sign against an image of one sign approach the bound, as far as the image lets the recurrence run
    with torch.no_grad():
        bounded.weight.copy_(-bounded.weight.abs())
    x = bounded(torch.ones_like(y))[0]
    assert 0.9 / (1 - rho) < x.abs().max() <= (1 + 1e-12) / (1 - rho)
    assert_close(bounded.reverse(x), torch.ones_like(x), rtol=1e-10, atol=1e-10)


def test_row_sums_within_the_bound_are_left_alone():
    torch.manual_seed(0)
    small, plain = InverseConv2d(4, 3, max_row_sum=0.9), InverseConv2d(4, 3)
    plain.load_state_dict(small.state_dict())
    assert torch.equal(small.kernel(), plain.kernel())
    with torch.no_grad():
        small.weight.zero_()
    small.free().abs().sum().backward()
    assert small.weight.grad.isfinite().all()


def test_bad_arguments_are_named():
    for make, text in [
        (lambda: InverseConv2d(4, 3, "XY"), "unknown order 'XY'"),
        (lambda: InverseConv2d(4, 3, groups=3), "4 channels cannot be split into 3 groups"),
        (lambda: MaskedConv2d(4, 0), "kernel size"),
        (lambda: InverseConv2d(4, 3, max_row_sum=1.0), "max_row_sum"),
        (lambda: InverseConvUnit(6, 3, split=True), "multiple of 4"),
    ]:
        with pytest.raises(ValueError, match=text):
            make()
