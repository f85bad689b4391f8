"""The inverse convolution against the golden vectors, for every case in the files and every backend present."""

import re
from functools import lru_cache

import numpy as np
import pytest
import torch
from golden_cases import check_complete, folder, load
from torch.testing import assert_close

from inv_flow.layers.inv_conv import InverseConvUnit, MaskedConv2d
from inv_flow.utils.inv_conv_cuda import (
    ORDERS,
    available_backends,
    inverse_conv2d,
    inverse_conv2d_ref,
    kernel_mask,
    masked_conv2d,
)

FILES = sorted(path.stem for path in folder("inv_flow").glob("inv_conv_*.npz"))
CASE = re.compile(r"(?P<order>TL|TR|BL|BR)_C(?P<channels>\d+)_g(?P<groups>\d+)_(?P<height>\d+)x(?P<width>\d+)_")
EXACT = {"rtol": 1e-9, "atol": 1e-9}
FIELDS = {"v", "w", "y", "x", "g", "grad_y", "grad_v"}


@lru_cache
def arrays(name: str) -> dict[str, torch.Tensor]:
    return {key: torch.from_numpy(value) for key, value in load("inv_flow", name).items()}


def cases() -> list[tuple[str, str]]:
    found = []
    for name in FILES:
        keys = load("inv_flow", name).keys()
        found += sorted({(name, match[0]) for key in keys if (match := CASE.match(key))})
    return found


@pytest.fixture(params=available_backends("cpu"))
def backend(request, monkeypatch):
    monkeypatch.setenv("INV_CONV_BACKEND", request.param)
    return request.param


def test_every_file_and_array_is_covered():
    check_complete(
        "inv_flow",
        {"inv_conv_k2.npz", "inv_conv_k3.npz", "inv_conv_k5.npz", "inv_flow_unit.npz", "finc_unit.npz"}
        | {f"{name}.npz" for name in FILES},
        only=("inv_conv_*.npz", "inv_flow_unit.npz", "finc_unit.npz"),
    )
    for name in FILES:
        known = {prefix + field for file, prefix in cases() if file == name for field in FIELDS}
        assert set(arrays(name)) == known, f"arrays of {name} that no test reads, or that are missing"


@pytest.mark.parametrize(("name", "prefix"), cases())
def test_inverse_conv(name, prefix, backend):
    case = {field: arrays(name)[prefix + field] for field in FIELDS}
    named = CASE.match(prefix)
    order, groups = named["order"], int(named["groups"])
    assert case["y"].shape[1:] == (int(named["channels"]), int(named["height"]), int(named["width"]))
    v, y = case["v"].clone().requires_grad_(), case["y"].clone().requires_grad_()
    mask, pin = kernel_mask(v.shape[0], tuple(v.shape[2:]), order, groups, dtype=v.dtype)
    w = v * mask + pin
    assert_close(w.detach(), case["w"], **EXACT)
    x = inverse_conv2d(y, w, order, groups)
    assert_close(x.detach(), case["x"], **EXACT)
    x.backward(case["g"])
    assert_close(y.grad, case["grad_y"], **EXACT)
    assert_close(v.grad, case["grad_v"], **EXACT)
    assert_close(masked_conv2d(case["x"], case["w"], order, groups), case["y"], **EXACT)


@pytest.mark.parametrize(("name", "prefix"), cases())
def test_inverse_conv_float32(name, prefix, backend):
    """The same in float32, to 1e-4 of the largest entry."""
    case = {field: arrays(name)[prefix + field] for field in FIELDS}
    order, groups = CASE.match(prefix)["order"], int(CASE.match(prefix)["groups"])
    w, y = case["w"].float().requires_grad_(), case["y"].float().requires_grad_()
    x = inverse_conv2d(y, w, order, groups)
    x.backward(case["g"].float())
    for got, want in ((x.detach(), case["x"]), (y.grad, case["grad_y"]), (w.grad, case["grad_v"])):
        assert (got.double() - want).abs().max() <= 1e-4 * want.abs().max().clamp(min=1e-30)


@pytest.mark.parametrize(("name", "prefix"), cases())
def test_reference(name, prefix):
    case = {field: arrays(name)[prefix + field] for field in FIELDS}
    named = CASE.match(prefix)
    assert_close(inverse_conv2d_ref(case["y"], case["w"], named["order"], int(named["groups"])), case["x"], **EXACT)


def test_inverse_conv_unit(backend):
    case = arrays("inv_flow_unit")
    y = case["y"].clone().requires_grad_()
    unit = InverseConvUnit(y.shape[1], tuple(case["v_TL"].shape[2:])).double()
    with torch.no_grad():
        for order, layer in zip(ORDERS, unit.layers, strict=True):
            layer.weight.copy_(case[f"v_{order}"])
    x, log_det = unit(y)
    assert_close(x.detach(), case["x"], **EXACT)
    assert_close(log_det, case["logdet"].reshape(-1).expand_as(log_det).to(log_det), **EXACT)
    assert_close(unit.reverse(case["x"]), case["y"], **EXACT)
    x.backward(case["g"])
    assert_close(y.grad, case["grad_y"], **EXACT)
    for order, layer in zip(ORDERS, unit.layers, strict=True):
        assert_close(layer.weight.grad, case[f"grad_v_{order}"], **EXACT)
    fields = {"y", "x", "g", "grad_y", "logdet"} | {f"{kind}_{order}" for kind in ("v", "grad_v") for order in ORDERS}
    assert set(case) == fields


def test_finc_unit(backend):
    case = arrays("finc_unit")
    weights = torch.cat([case[f"w_{order}"] for order in ORDERS])
    layer = MaskedConv2d(weights.shape[0], tuple(weights.shape[2:]), order=ORDERS, groups=4).double()
    with torch.no_grad():
        layer.weight.copy_(weights)
    z, log_det = layer(case["x"])
    assert_close(z, case["z"], **EXACT)
    assert_close(log_det, case["logdet"].to(log_det), **EXACT)
    assert_close(layer.reverse(case["z"]), case["x"], **EXACT)
    unit = InverseConvUnit(weights.shape[0], tuple(weights.shape[2:]), split=True).double()
    with torch.no_grad():
        unit.layers[0].weight.copy_(weights)
    assert_close(unit(case["z"])[0], case["x"], **EXACT)
    assert_close(unit.reverse(case["x"]), case["z"], **EXACT)
    for order, quarter in zip(ORDERS, case["x"].chunk(4, 1), strict=True):
        want = case["z"].chunk(4, 1)[ORDERS.index(order)]
        assert_close(masked_conv2d(quarter, case[f"w_{order}"], order), want, **EXACT)
    assert set(case) == {"x", "z", "logdet"} | {f"w_{order}" for order in ORDERS}


def test_golden_values_are_finite():
    for name in [*FILES, "inv_flow_unit", "finc_unit"]:
        assert all(np.isfinite(value).all() for value in load("inv_flow", name).values())
