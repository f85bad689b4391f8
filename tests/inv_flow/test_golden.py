"""The layers of Inverse-Flow and two whole flows against the golden vectors (the inverse convolution has its own
module).
"""

import numpy as np
import pytest
import torch
from golden_cases import check_complete, folder, load

from inv_flow.layers.activations import (
    SELU,
    LeakyRelu,
    LearnableLeakyRelu,
    SmoothLeakyRelu,
    SmoothTanh,
    SplineActivation,
)
from inv_flow.layers.actnorm import ActNorm
from inv_flow.layers.conv1x1 import Conv1x1, Conv1x1Householder
from inv_flow.layers.convexp import conv_exp
from inv_flow.layers.coupling import Coupling, SplitPrior
from inv_flow.layers.emerging import Emerging, SquareAutoRegressiveConv2d
from inv_flow.layers.flow import FlowSequential, bits_per_dim, standard_normal_log_prob
from inv_flow.layers.inv_conv import InverseConv2d
from inv_flow.layers.preprocess import (
    Dequantization,
    LogitTransform,
    Normalization,
    SigmoidTransform,
    Squeeze,
    UnSqueeze,
)
from inv_flow.layers.selfnorm import SelfNormConv, conv_matrix
from inv_flow.layers.spline import rational_quadratic_spline

folder("inv_flow")
LAYERS = ["activations", "actnorm", "base_gaussian", "conv1x1", "convexp", "coupling", "coupling_snf", "emerging"]
LAYERS += ["preprocess", "rational_quadratic", "selfnorm", "splitprior", "squeeze", "toeplitz"]
FLOWS = ["tiny_flow_glow", "tiny_flow_inv", "upstream_gpu_layer_wrong"]
ELSEWHERE = ["inv_conv_k2", "inv_conv_k3", "inv_conv_k5", "inv_flow_unit", "finc_unit"]  # the op's own golden module


def golden(name):
    return {
        key: torch.from_numpy(value) if value.dtype.kind in "fiu" else value
        for key, value in load("inv_flow", name).items()
    }


def close(actual, expected, tol=1e-9):
    np.testing.assert_allclose(torch.as_tensor(actual).detach().numpy(), expected.numpy(), rtol=tol, atol=tol)


def fill(module, arrays, prefix):
    """Copy `<prefix><parameter with _ for .>` into the parameters of `module`."""
    for name, parameter in module.named_parameters():
        parameter.data = arrays[prefix + name.replace(".", "_")].clone()


def test_every_file_is_covered():
    check_complete("inv_flow", {f"{name}.npz" for name in (*LAYERS, *FLOWS, *ELSEWHERE)})


@pytest.mark.parametrize("name", ["slr", "leaky", "llr", "smoothtanh", "spline_shared", "spline_indiv", "selu"])
def test_activations(name):
    d = golden("activations")
    size = tuple(d["x"].shape[1:])
    if name.startswith("spline"):
        bins = d[f"{name}_unnormalized_widths"].shape[-1]
        layer = SplineActivation(size, bins, float(d[f"{name}_tail"]), name == "spline_indiv", minimum=1e-6).double()
        fill(layer, d, f"{name}_")
    else:
        kinds = {
            "slr": SmoothLeakyRelu,
            "leaky": LeakyRelu,
            "llr": LearnableLeakyRelu,
            "smoothtanh": SmoothTanh,
            "selu": SELU,
        }
        layer = kinds[name]().double()
        if name == "llr":
            layer.alpha_logit.data = d["llr_alpha_logit"].clone()
    y, log_det = layer(d["x"])
    close(y, d[f"{name}_y"])
    close(log_det, d[f"{name}_logdet"])
    close(layer.reverse(y), d["x"], 1e-7)
    if name != "selu":
        close(layer.reverse(d[f"{name}_y"]), d[f"{name}_reverse_of_y"], 1e-7)
        close(layer.reverse(d["z"]), d[f"{name}_reverse_of_z"], 1e-7)


@pytest.mark.parametrize(("case", "minimum"), [("m6", 1e-6), ("m3", 1e-3)])
def test_rational_quadratic(case, minimum):
    d = golden("rational_quadratic")
    parameters = d["unnorm_w"], d["unnorm_h"], d["unnorm_d"], float(d["tail_bound"]), minimum
    y, log_slope = rational_quadratic_spline(d["x"], *parameters)
    close(y, d[f"{case}_y"])
    close(log_slope, d[f"{case}_logabsdet"])
    x, inverse_log_slope = rational_quadratic_spline(y, *parameters, inverse=True)
    close(x, d["x"], 1e-7)
    close(inverse_log_slope, d[f"{case}_inverse_logabsdet"], 1e-7)


def test_actnorm():
    d = golden("actnorm")
    for prefix, second in (("", True), ("fc_", False)):
        layer = ActNorm(d[f"{prefix}x"].shape[1]).double()
        y, log_det = layer(d[f"{prefix}x"])
        close(y, d[f"{prefix}y"])
        close(log_det, d[f"{prefix}logdet"])
        close(layer.translation, d[f"{prefix}translation"])
        close(layer.log_scale, d[f"{prefix}log_scale"])
        if second:
            y, log_det = layer(d["x2"])
            close(y, d["y2"])
            close(log_det, d["logdet2"])


def test_base_gaussian():
    d = golden("base_gaussian")
    log_prob = standard_normal_log_prob(d["z"])
    close(log_prob, d["logp"])
    close(bits_per_dim(log_prob, d["z"][0].numel()), d["bpd_of_logp"])
    close(standard_normal_log_prob(d["z"].clamp(-10, 10)), d["logp_clamped10"])


def test_conv1x1():
    d = golden("conv1x1")
    layer = Conv1x1(d["W"].shape[0]).double()
    layer.weight.data = d["W"].clone()
    z, log_det = layer(d["x"])
    close(z, d["z"])
    close(log_det, d["logdet"].expand(len(d["x"])))
    close(layer.reverse(z), d["x"])
    layer = Conv1x1Householder(d["V"].shape[1], d["V"].shape[0]).double()
    layer.vectors.data = d["V"].clone()
    close(layer.matrix(), d["Q"])
    close(layer(d["x"])[0], d["z_householder"])
    close(layer.reverse(d["z_householder"]), d["x"])


def test_convexp():
    d = golden("convexp")
    close(conv_exp(d["x"], d["kernel"], 6), d["z_terms6"])
    z = conv_exp(d["x"], d["kernel"], 13)
    close(z, d["z_terms13"])
    close(conv_exp(z, -d["kernel"], 13), d["reverse_terms13"])
    pixels = d["x"].shape[2] * d["x"].shape[3]
    close(pixels * d["kernel"][:, :, 1, 1].diagonal().sum(), d["logdet"])
    matrix = conv_matrix(d["kernel"], tuple(d["x"].shape[1:]))
    close(torch.linalg.slogdet(torch.matrix_exp(matrix))[1], d["logdet"])


@pytest.mark.parametrize(("name", "kind"), [("coupling", "small"), ("coupling_snf", "snf")])
def test_coupling(name, kind):
    d = golden(name)
    layer = Coupling(d["x"].shape[1], d["p_net_0_weight"].shape[0], kind).double()
    fill(layer, d, "p_")
    x = d["x"].clone().requires_grad_()
    z, log_det = layer(x)
    close(z, d["z"])
    close(log_det, d["logdet"])
    close(layer.reverse(z), d["x"])
    if "g" in d:
        ((z * d["g"]).sum() + log_det.sum()).backward()
        close(x.grad, d["grad_x_of_sum_zg_plus_logdet"])
        for key, parameter in layer.named_parameters():
            close(parameter.grad, d["gp_" + key.replace(".", "_")])


def test_splitprior():
    d = golden("splitprior")
    layer = SplitPrior(d["x"].shape[1], d["p_net_0_weight"].shape[0]).double()
    fill(layer.coupling, d, "p_")
    x1, log_prob = layer(d["x"])
    close(x1, d["x1"])
    close(log_prob, d["logp"])
    kept, latent, _ = layer.split(d["x"])
    close(latent, d["x2"])
    close(layer.merge(kept, latent), d["x"])


def test_emerging():
    d = golden("emerging")
    channels = d["ar_weight"].shape[0]
    layer = SquareAutoRegressiveConv2d(channels).double()
    assert torch.equal(layer.mask, d["ar_mask"])
    layer.weight.data, layer.bias.data = d["ar_weight"].clone(), d["ar_bias"].clone()
    z, log_det = layer(d["x"])
    close(z, d["ar_z"])
    close(log_det, d["ar_logdet"])
    close(layer.reverse(z), d["x"])
    block = Emerging(channels).double()
    block.layers[0].weight.data = d["block_W"].clone()
    for index, n in ((1, 1), (3, 2)):
        block.layers[index].weight.data = d[f"block_w{n}"].clone()
        block.layers[index].bias.data = d[f"block_b{n}"].clone()
    z, log_det = block(d["x"])
    close(z, d["block_z"])
    close(log_det, d["block_logdet"])
    close(block.reverse(z), d["x"])


def test_preprocess():
    d = golden("preprocess")
    for prefix, alpha in (("a6", 1e-6), ("a7", 1e-7)):
        x, steps = Dequantization()(d["x"].double(), d["noise"])[0], []
        for layer in (Normalization(0.0, 256.0), Normalization(-alpha, 1 / (1 - 2 * alpha)), LogitTransform()):
            x, log_det = layer(x)
            steps.append(log_det)
        close(x, d[f"{prefix}_z"], 1e-6)
        close(torch.stack(steps), d[f"{prefix}_logdets"], 1e-6)
    y, log_det = SigmoidTransform()(d["sig_x"])
    close(y, d["sig_y"])
    close(log_det, d["sig_logdet"])


def test_squeeze():
    d = golden("squeeze")
    assert torch.equal(Squeeze()(d["x"])[0], d["y"])
    assert torch.equal(Squeeze().reverse(d["y"]), d["x"])
    assert torch.equal(UnSqueeze()(d["y"])[0], d["x"])


@pytest.mark.parametrize("prefix", ["k1_", "k3_"])
def test_selfnorm(prefix):
    d = {key.removeprefix(prefix): value for key, value in golden("selfnorm").items() if key.startswith(prefix)}
    layer = SelfNormConv(d["W"].shape[0], d["W"].shape[-1]).double()
    layer.weight.data, layer.inverse.data, layer.bias.data = d["W"].clone(), d["R"].clone(), d["b"].clone()
    x = d["x"].clone().requires_grad_()
    y, log_det = layer(x)
    assert not log_det.any()
    close(y, d["y"])
    (y * d["g"]).sum().backward()
    close(x.grad, d["grad_x"])
    close(layer.weight.grad, d["grad_W"])
    close(layer.inverse.grad, d["grad_R"])
    close(layer.bias.grad, d["grad_b"])
    layer.zero_grad()
    loss = layer.reconstruction_loss(d["x"], symmetric=prefix == "k3_")
    close(loss, d["recon_loss"])
    loss.backward()
    close(layer.weight.grad, d["recon_grad_W"])
    close(layer.inverse.grad, d["recon_grad_R"])
    close(layer.reverse(d["y"]), d["approx_reverse"])
    layer.eval()
    y, log_det = layer(d["x"])
    close(log_det, d["exact_logdet"])
    layer.exact = True
    close(layer.reverse(y), d["x"], 1e-8)


def test_toeplitz():
    d = golden("toeplitz")
    c_out, c_in = d["f"].shape[:2]
    pixels = d["M"].shape[1] // c_in
    assert d["M"].shape[0] == c_out * pixels
    # the image's two sides are not in the file: the right factorisation is the one that matches
    matches = []
    for height in range(1, pixels + 1):
        if pixels % height == 0:
            matches.append(torch.allclose(conv_matrix(d["f"], (c_in, height, pixels // height)), d["M"], atol=1e-12))
    assert sum(matches) == 1


def test_published_gpu_layer_is_wrong_and_ours_is_right():
    d = golden("upstream_gpu_layer_wrong")
    for case in sorted({key.split("_")[0] for key in d}):
        x, w, g = (d[f"{case}_{name}"] for name in ("x", "w", "g"))
        channels, k = w.shape[0], w.shape[-1]
        layer = InverseConv2d(channels, (w.shape[2], k), "TL", groups=4).double()
        layer.weight.data = w[:, : channels // 4].clone()
        x = x.clone().requires_grad_()
        y, log_det = layer(x)
        close(y, d[f"{case}_correct_y_groups4"])
        assert not log_det.any()
        (y * g).sum().backward()
        close(x.grad, d[f"{case}_correct_grad_x"])
        close(layer.weight.grad, d[f"{case}_correct_grad_v"].view_as(layer.weight))
        assert (x.grad - d[f"{case}_upstream_grad_x"]).norm() > 0.1 * x.grad.norm()


def tiny_flow(d):
    """The layers, from the scaling on, of the flow that a tiny_flow file describes; and those that hold its weights."""
    layers, loaded = [Normalization(0.0, 256.0), Normalization(-1e-6, 1 / (1 - 2e-6)), LogitTransform()], {}
    steps = sorted({key[:4] for key in d if key[0] == "l" and key[2] == "s" and key[1].isdigit()})
    level = None
    for step in steps:
        if step[:2] != level:
            if level is not None:
                width = d["sp_net_0_weight"].shape[0]
                split = SplitPrior(d["sp_net_4_weight"].shape[0], width).double()
                fill(split.coupling, d, "sp_")
                loaded["sp_"] = split.coupling
                layers.append(split)
            layers.append(Squeeze())
            level = step[:2]
        channels = d[f"{step}_W"].shape[0]
        norm = ActNorm(channels).double()
        fill(norm, d, f"{step}_an_")
        norm.initialized.fill_(1)
        loaded[f"{step}_an_"] = norm
        layers.append(norm)
        if f"{step}_v" in d:
            v = d[f"{step}_v"]
            conv = InverseConv2d(
                channels, tuple(v.shape[2:]), str(d[f"{step}_order"]), groups=channels // v.shape[1]
            ).double()
            conv.weight.data = v.clone()
            loaded[f"{step}_v"] = conv
            layers.append(conv)
        mix, coupling = Conv1x1(channels).double(), Coupling(channels, d[f"{step}_cp_net_0_weight"].shape[0]).double()
        mix.weight.data = d[f"{step}_W"].clone()
        fill(coupling, d, f"{step}_cp_")
        loaded[f"{step}_W"], loaded[f"{step}_cp_"] = mix, coupling
        layers += [SmoothLeakyRelu(0.3), mix, coupling]
    return FlowSequential(layers), loaded


@pytest.mark.parametrize("name", ["tiny_flow_glow", "tiny_flow_inv"])
def test_tiny_flows(name):
    d = golden(name)
    flow, loaded = tiny_flow(d)
    x = d["x"].double() + d["noise"]
    latents, log_prob = flow(x)
    close(latents[-1], d["z"])
    close(standard_normal_log_prob(latents[-1]), d["base_logp"])
    close(log_prob, d["logp"])
    close(bits_per_dim(log_prob, x[0].numel()), d["bpd"])
    assert (log_prob - d["logp_upstream_double_counted"]).abs().min() > 1
    (-log_prob.mean()).backward()
    checked = 0
    for prefix, module in loaded.items():
        for key, parameter in module.named_parameters():
            grad = d["grad_" + (prefix + key.replace(".", "_") if prefix.endswith("_") else prefix)]
            close(parameter.grad, grad)
            checked += 1
    assert checked == sum(key.startswith("grad_") for key in d)
    close(flow.decode(latents), x, 1e-7)
    # the noise recovers the integers
    assert torch.equal(flow.reconstruct(x).floor(), d["x"].double())
