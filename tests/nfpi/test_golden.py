"""The reference vectors of the published code; every size, seed and name comes from the files."""

import ast
import math

import numpy as np
import pytest
import torch
from golden_cases import check_complete, folder, load
from karras_ema import KarrasEma, posthoc_weights, sigma_rel_to_gamma

from nfpi import data, ema, glem, label_encoder
from nfpi.config import config_place, resolve
from nfpi.convert_checkpoint import class_gaussians, flow_tensors, infer_config
from nfpi.fpi import FixedPoint, pair_weights, solve, step
from nfpi.gaussians import (
    bits_per_dim,
    class_log_prob,
    kl_matrix,
    negative_log_likelihood,
    off_diagonal,
    top_k_correct,
)
from nfpi.layers import (
    ActNorm,
    AttentionBlock,
    Block,
    Conv1x1,
    Conv2d,
    CouplingLayer,
    Norm,
    ZeroConv2d,
    gaussian_log_p,
    postprocess,
    preprocess,
    qkv_attention,
    split2d,
    squeeze2d,
    unsqueeze2d,
)
from nfpi.matrix_exp import expm, phi
from nfpi.model import FlowConfig, MultiScaleFlow
from nfpi.train import warmup_lr

BASE = folder("nfpi")
FLOWS = sorted(p.stem for p in BASE.glob("flow_*.npz"))
FPIS = sorted(p.stem for p in BASE.glob("fpi_*.npz") if p.stem not in ("fpi_inputs", "fpi_float32", "fpi_2d"))
COUPLINGS = sorted(p.stem for p in BASE.glob("coupling_*.npz"))
SINGLE = {
    "expm_series",
    "squeeze_split",
    "pre_post_process",
    "actnorm",
    "norm_conv_init",
    "conv1x1",
    "zeroconv_prior",
    "attention",
    "train_from_init",
    "train_steps",
    "gaussian_kl",
    "gaussian_kl_chunk_bug",
    "bayes_classify",
    "fpi_inputs",
    "fpi_float32",
    "fpi_2d",
    "ema",
    "glem",
    "label_encoder",
    "data_helpers",
}
REQUIRED = {
    "flow_all_levels",
    "flow_all_levels_rgb",
    "flow_all_levels_affine",
    "flow_all_levels_idx2",
    "flow_all_levels_idx3",
    "flow_spcb",
    "fpi_mean_iso",
    "fpi_mean_aniso",
    "fpi_var_sum",
    "fpi_var_nosum",
    "fpi_mean_var_iso_sum",
    "fpi_mean_var_aniso_nosum",
    "fpi_mean_var_expdist",
    "coupling_additive",
    "coupling_affine",
    "coupling_matrixexp",
    "coupling_matrixexp_lowrank",
}


@pytest.fixture(autouse=True)
def double():
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(before)


def tensors(name):
    """All numeric arrays of a file as tensors; 0-d and float types as stored."""
    return {k: torch.from_numpy(np.array(v)) for k, v in load("nfpi", name).items() if v.dtype.kind in "fiub"}


def sub(arrays, prefix):
    return {k.removeprefix(prefix): v for k, v in arrays.items() if k.startswith(prefix)}


def close(got, want, tol):
    torch.testing.assert_close(torch.as_tensor(got).to(want.dtype), want, rtol=tol, atol=tol)


def relative(got, want, tol):
    """Error against the largest entry."""
    error = float((got - want).abs().max() / want.abs().max().clamp_min(1e-300))
    assert error <= tol, f"{error:.2e} > {tol:.0e}"


def test_every_file_is_covered():
    names = SINGLE | REQUIRED | set(FLOWS) | set(FPIS) | set(COUPLINGS)
    check_complete("nfpi", {f"{name}.npz" for name in names})


def test_expm_series():
    g = tensors("expm_series")
    for case in [k.removesuffix("_expm") for k in g if k.endswith("_expm")]:
        x = g[f"{case}_x"]
        tol = 2e-6 if x.dtype == torch.float32 else 2e-7
        relative(expm(x), g[f"{case}_expm"], tol)
        relative(expm(x).double(), g[f"{case}_scipy"], tol)
        relative(phi(g[f"{case}_series_x"]), g[f"{case}_series"], tol)
        relative(phi(g[f"{case}_series_x"]), g[f"{case}_series_ref"], tol)


def test_squeeze_split():
    g = tensors("squeeze_split")
    assert torch.equal(squeeze2d(g["x"]), g["squeezed"])
    assert torch.equal(unsqueeze2d(squeeze2d(g["x"])), g["unsqueezed"])
    for got, want in zip(split2d(g["squeezed"]), (g["split_a"], g["split_b"]), strict=True):
        assert torch.equal(got, want)


def test_pre_post_process():
    g = tensors("pre_post_process")
    for key in g:
        if key.startswith("pre_b") and not key.endswith("nonoise"):
            bits = int(key.removeprefix("pre_b"))
            z = preprocess(g["img"], g["noise"], bits)
            close(z, g[key], 1e-12)
            assert torch.equal(postprocess(z, bits), g[f"post_b{bits}"])
    close(preprocess(g["img"]), g["pre_b8_nonoise"], 1e-12)


def test_actnorm():
    g = tensors("actnorm")
    layer = ActNorm(g["init_x"].shape[1:])
    y = layer.initialise(g["init_x"])
    close(layer.scale, g["scale"], 1e-9)
    close(layer.shift, g["shift"], 1e-9)
    close(y, g["init_y"], 1e-9)
    close(layer(g["init_x"])[1][0], g["init_logdet"], 1e-9)
    y, log_det = layer(g["x"])
    close(y, g["y"], 1e-9)
    close(log_det, g["logdet"].expand(len(y)), 1e-9)
    close(layer.inverse(y), g["x_rec"], 1e-9)
    close(-log_det[0], g["logdet_rev"], 1e-9)
    close(layer.scale, g["scale_ref"], 1e-9)


def test_norm_conv_init():
    g = tensors("norm_conv_init")
    norm = Norm(g["x"].shape[1])
    close(norm.initialise(g["x"]), g["norm_y"], 1e-9)
    close(norm.scale, g["norm_scale"], 1e-9)
    close(norm.shift, g["norm_shift"], 1e-9)
    close(norm.initialise(g["x"], init_scale=0.0), g["norm0_y"], 1e-9)
    close(norm.scale, g["norm0_scale"], 1e-9)
    for name, activation in (("conv", True), ("conv2", False)):
        before = g[f"{name}_w_before"]
        conv = Conv2d(before.shape[1], before.shape[0], before.shape[2], activation)
        conv.conv.weight.data.copy_(before)
        y = conv.initialise(
            g["x"], init_scale=float(g[f"{name}_norm_scale"].any())
        )  # 0: a residual branch's last layer
        close(conv.conv.weight, g[f"{name}_w_after"], 1e-9)
        close(conv.norm.scale, g[f"{name}_norm_scale"], 1e-9)
        close(conv.norm.shift, g[f"{name}_norm_shift"], 1e-9)
        close(y, g[f"{name}_y"], 1e-9)
        close(conv(g["x"]), y, 1e-9)
    block = Block(g["x"].shape[1])
    block.load_state_dict(sub(g, "blk0/"))
    close(block.initialise(g["x"]), g["init_block_y"], 1e-9)
    for key, value in sub(g, "blk1/").items():
        if key.startswith("conv3.norm.") and torch.equal(value, g[f"blkR/{key}"]):
            value = torch.zeros_like(value)  # the file stored this entry after its randomisation; init_block_y says 0
        close(block.state_dict()[key], value, 1e-9)
    block.load_state_dict(sub(g, "blkR/"))
    close(block(g["x2"]), g["y_block"], 1e-9)


def test_conv1x1():
    g = tensors("conv1x1")
    x = g["x"]
    for kind in {k.split("/")[0] for k in g if "/" in k}:
        layer = Conv1x1(x.shape[1], kind)
        own = {k: v for k, v in sub(g, f"{kind}/").items() if k in layer.state_dict()}
        layer.load_state_dict(own)
        y, log_det = layer(x)
        close(y, g[f"{kind}/y"], 1e-7)
        close(log_det, g[f"{kind}/logdet"].expand(len(x)), 1e-7)
        close(layer.inverse(y), g[f"{kind}/x_rec"], 1e-7)
        close(layer.matrices(), g[f"{kind}/W_ref"], 1e-7)
        close(log_det[0], g[f"{kind}/logdet_ref"], 1e-7)
        # the reverse log-determinant is minus the forward one (the published decomposition differs: *_CORRECT)
        reverse = g.get(f"{kind}/logdet_rev_CORRECT", g[f"{kind}/logdet_rev"])
        close(-log_det[0], reverse, 1e-7)


@pytest.mark.parametrize("name", COUPLINGS)
def test_coupling(name):
    g = tensors(name)
    state, x = sub(g, "sd/"), g["x"]
    kind = "matrixexp" if "matrixexp" in name else name.split("_")[1]
    blocks = max(int(k.split(".")[2]) for k in state if k.startswith("net.layers."))
    layer = CouplingLayer(x.shape[1], len(state["net.layers.0.conv.weight"]), blocks, kind)
    layer.load_state_dict(state)
    close(layer.net(x[:, : layer.kept]), g["net_out"], 1e-7)
    y, log_det = layer(x)
    close(y, g["y"], 1e-7)
    close(log_det, g["logdet"], 1e-7)
    close(layer.inverse(y), g["x_rec"], 1e-7)
    close(-log_det, g["logdet_rev"], 1e-7)


def test_zeroconv_prior():
    g = tensors("zeroconv_prior")
    prior = ZeroConv2d(g["x"].shape[1], g["y"].shape[1])
    prior.load_state_dict(sub(g, "sd/"))
    close(prior(g["x"]), g["y"], 1e-10)
    close(prior.log_prob(g["x"], g["out2"]), g["log_p"], 1e-10)
    mean, log_sd = g["y"].chunk(2, 1)
    close(gaussian_log_p(g["out2"], mean, log_sd).flatten(1).sum(1), g["log_p"], 1e-10)
    close(prior.sample(g["x"], g["eps"], 0.7), g["sample_T07"], 1e-10)


def test_attention():
    g = tensors("attention")
    block = AttentionBlock(g["x"].shape[1]).float()
    block.load_state_dict(sub(g, "sd/"))
    close(block(g["x"].float()), g["y"], 1e-5)
    double_block = AttentionBlock(g["x"].shape[1])
    double_block.load_state_dict({k: v.double() for k, v in sub(g, "sd/").items()})
    close(double_block(g["x"].double()), g["y"].double(), 1e-5)
    width, heads = g["qkv"].shape[1], AttentionBlock(g["x"].shape[1]).heads
    if (width // 3) % heads:
        heads = max(h for h in range(1, 7) if (width // 3) % h == 0)
    close(qkv_attention(g["qkv"], heads), g["legacy"], 1e-5)
    # the other order of the file: (qkv, head) instead of (head, qkv)
    reordered = g["qkv"].unflatten(1, (3, heads, -1)).transpose(1, 2).flatten(1, 3)
    close(qkv_attention(reordered, heads), g["new_order"], 1e-5)


def architecture(name, arrays):
    text = ast.literal_eval(str(load("nfpi", name)["arch"].ravel()[0]))
    return FlowConfig(
        channels=text["ch"],
        height=text["h"],
        width=text["w"],
        flows=text["flows"],
        blocks=text["blocks"],
        hidden=text["hid"],
        conv_type=text.get("conv", "matrixexp"),
        flow_type=text.get("flow", "matrixexp"),
        level_method=text["choice"],
        level_idx=text.get("idx", 3),
    )


@pytest.mark.parametrize("name", FLOWS)
def test_flow(name):
    g = tensors(name)
    config, state = architecture(name, g), sub(g, "sd/")
    flow = MultiScaleFlow(config)
    flow.load_state_dict(flow_tensors(state))
    assert config.dim == int(g["dim"]) and config.latent_dim == int(g["dim_lower"])
    x = preprocess(g["ints"] / 255, g["noise"])
    latent = flow(x)
    close(latent.z, g["z"].flatten(1), 1e-6)
    close(latent.log_det, g["logdet"], 1e-6)
    close(latent.log_p, g["log_p"].expand(len(x)), 1e-5)
    own = state.get("mu_arr.0")
    mean, var = (g["class_mu"], g["class_var"]) if own is None else class_gaussians(state)
    logits = class_log_prob(latent.z, mean, var)
    close(logits, g["logits"], 1e-5)
    assert torch.equal(logits.argmax(1), g["preds"])
    log_prior = logits.gather(1, g["y"][:, None])[:, 0]
    nll = negative_log_likelihood(log_prior, latent.log_det, latent.log_p, config.dim)
    close(nll, g["nll_per_sample"], 1e-5)
    loss = nll.mean()
    torch.testing.assert_close(loss, g["loss"], rtol=1e-8, atol=0)
    close(bits_per_dim(loss, config.dim), g["bpd"], 1e-8)
    close(torch.stack([nll.min(), nll.max()]), g["min_max_CORRECT"], 1e-5)
    loss.backward()
    gradients = {k: p.grad for k, p in flow.named_parameters()}
    for key, want in sub(g, "grad/").items():
        if key in gradients:
            relative(gradients[key], want, 1e-5)


@pytest.mark.parametrize("name", FLOWS)
def test_flow_inverse(name):
    g = tensors(name)
    flow = MultiScaleFlow(architecture(name, g))
    flow.load_state_dict(flow_tensors(sub(g, "sd/")))
    with torch.no_grad():
        x = preprocess(g["ints"] / 255, g["noise"])
        latent = flow(x)
        close(flow.inverse(latent.z, halves=latent.halves), x, 1e-9)
        eps = [g[f"inv_eps{i}"] for i in range(flow.config.conditional_splits)]
        cont = flow.inverse(g["z"].flatten(1), temperature=float(g["T"]), eps=eps)
        close(cont, g["inv_cont"], 1e-6)
        assert torch.equal(postprocess(cont), g["inv_img"])
        if "decomposition" not in flow.config.conv_type:  # the published reverse log-det is wrong there
            close(-flow(cont).log_det, g["inv_logdet"], 1e-6)
        if "inv_recorded_img" in g:
            cont = flow.inverse(g["z"].flatten(1), halves=latent.halves)
            close(cont, g["inv_recorded_cont"], 1e-6)
            assert torch.equal(postprocess(cont), g["inv_recorded_img"])


@pytest.mark.parametrize("name", FLOWS)
def test_flow_initialisation(name):
    """The first ActNorm after the data-dependent initialisation; it is the only layer that sees the images alone."""
    g = tensors(name)
    flow = MultiScaleFlow(architecture(name, g))
    flow.initialise(preprocess(g["init_ints"] / 255, g["init_noise"]))
    close(flow.blocks[0][0].actnorm.scale, g["init_actnorm_scale"], 1e-9)
    close(flow.blocks[0][0].actnorm.shift, g["init_actnorm_shift"], 1e-9)


@pytest.mark.parametrize("name", FLOWS)
def test_architecture_is_read_from_the_tensors(name):
    g = tensors(name)
    want = architecture(name, g)
    got = infer_config(sub(g, "sd/"))
    known = {"level_idx": got.level_idx if want.level_method != "all_levels_idx" else want.level_idx}
    if want.conv_type != "decomposition":  # randomised weights: rotations and their logarithms look alike
        known["conv_type"] = got.conv_type
    assert FlowConfig(**{**want.as_dict(), **known}) == got


def train(g, flow, mean, var):
    """Adamax steps of the loss with the noise of the file; the losses, and the gradients of the first step."""
    lrs = g["lrs"].tolist()
    warmup = next((i + 1 for i, lr in enumerate(lrs) if lr == max(lrs)), len(lrs))
    optimizer, losses, first = torch.optim.Adamax(flow.parameters(), lr=max(lrs)), [], None
    for i, lr in enumerate(lrs):
        assert math.isclose(warmup_lr(i, max(lrs), warmup), lr, rel_tol=1e-12)
        for group in optimizer.param_groups:
            group["lr"] = lr
        latent = flow(preprocess(g["ints"] / 255, g["noise"][i + 1]))
        log_prior = class_log_prob(latent.z, mean, var).gather(1, g["y"][:, None])[:, 0]
        loss = negative_log_likelihood(log_prior, latent.log_det, latent.log_p, flow.config.dim).mean()
        optimizer.zero_grad()
        loss.backward()
        first = first or {k: p.grad.clone() for k, p in flow.named_parameters()}
        optimizer.step()
        losses.append(loss.detach())
    return torch.stack(losses), first


def test_train_steps():
    g = tensors("train_steps")
    state = sub(g, "sd0/")
    flow = MultiScaleFlow(FlowConfig(**{**infer_config(state).as_dict(), "conv_type": "matrixexp"}))
    flow.load_state_dict(flow_tensors(state))
    losses, _ = train(g, flow, *class_gaussians(state))
    close(losses, g["losses"], 1e-6)
    after = flow_tensors(sub(g, "sd6/"))
    assert set(after) == set(flow.state_dict())
    for key, want in after.items():
        close(flow.state_dict()[key], want, 1e-5)


def test_train_from_init():
    g = tensors("train_from_init")
    state = sub(g, "sd0/")
    flow = MultiScaleFlow(FlowConfig(**{**infer_config(state).as_dict(), "conv_type": "matrixexp"}))
    flow.load_state_dict(flow_tensors(state))  # sd0 is the state after the data-dependent initialisation
    losses, first = train(g, flow, *class_gaussians(state))
    close(losses, g["losses_CORRECT"], 1e-6)
    relative(first["blocks.0.0.couplinglayer.net.out_layer.weight"], g["grad0_out_layer_CORRECT"], 1e-6)


def test_initialised_layers_are_normalised():
    """In the initialised state of the file every ActNorm gives mean 0 and standard deviation 1 on the init batch."""
    g = tensors("train_from_init")
    state = sub(g, "sd0/")
    flow = MultiScaleFlow(FlowConfig(**{**infer_config(state).as_dict(), "conv_type": "matrixexp"}))
    flow.load_state_dict(flow_tensors(state))
    outputs = []
    for module in flow.modules():
        if isinstance(module, ActNorm):
            module.register_forward_hook(lambda _, __, out: outputs.append(out[0]))
    flow(preprocess(g["ints"] / 255, g["noise"][0]))
    for y in outputs:
        close(y.mean(0), torch.zeros_like(y[0]), 1e-5)
        close(y.std(0), torch.ones_like(y[0]), 1e-5)


def test_gaussian_kl():
    g = tensors("gaussian_kl")
    kl = kl_matrix(g["mu"], g["var"])
    close(kl, g["kl"], 1e-9)
    pairs = off_diagonal(kl)
    close(-pairs.mean(), g["kl_total_neg_avg"], 1e-9)
    grad_mean, grad_var = glem.kl_gradients(g["mu"], g["var"])
    close(grad_mean, g["grad_mu"], 1e-9)
    close(grad_var, g["grad_var"], 1e-9)
    separation = glem.class_separation(kl)
    close(torch.stack([separation.min(), separation.max()]), g["min_max"], 1e-9)
    close(class_log_prob(g["x"], g["mu"], g["var"]), g["logprob_diag"], 1e-9)
    # full covariances are the library's business; the file's own values hold it to the same convention
    full = [torch.distributions.MultivariateNormal(m, scale_tril=c) for m, c in zip(g["mu"], g["chol"], strict=True)]
    close(torch.stack([p.log_prob(g["x"]) for p in full], 1), g["logprob_full"], 1e-9)
    pairs = [torch.distributions.kl_divergence(p, q) for p in full for q in full]
    close(torch.stack(pairs).view_as(kl), g["kl_full"], 1e-9)


def test_gaussian_kl_has_no_chunks():
    g = tensors("gaussian_kl_chunk_bug")
    kl = kl_matrix(g["mu"], g["var"])
    close(kl, g["kl_CORRECT"], 1e-9)
    rows = len(g["kl_upstream"])
    close(kl[:rows, :rows], g["kl_upstream"], 1e-9)


def test_bayes_classify():
    g = tensors("bayes_classify")
    logits = class_log_prob(g["z"], g["mu"], g["std"] ** 2)
    close(logits, g["logits"], 1e-9)
    assert torch.equal(logits.argmax(1), g["preds"])
    close(top_k_correct(logits, g["y"], 1).double().mean(), g["acc"], 1e-12)
    close(top_k_correct(logits, g["y"], 5).double().mean(), g["top5"], 1e-12)


def fpi_flags(name, g):
    """The flags of a file, from what moves in it and from its name."""
    prefix = sorted({k.split("/")[0] for k in g if k.startswith("lam")})[-1]
    moves = {part: bool((g[f"{prefix}/{part}"][1] != g[f"{prefix}/{part}"][0]).any()) for part in ("mu", "var")}
    return {
        "means": moves["mu"],
        "variances": moves["var"],
        "isotropic": "aniso" not in name,
        "sum_trick": not ("nosum" in name or "expdist" in name),
        "exp_den_update": "expdist" not in name,
    }


@pytest.mark.parametrize("name", FPIS)
def test_fpi(name):
    inputs, g = tensors("fpi_inputs"), tensors(name)
    flags = fpi_flags(name, g)
    for prefix in sorted({k.split("/")[0] for k in g if k.startswith("lam")}):
        settings = FixedPoint(strength=float(prefix.removeprefix("lam")), **flags)
        case = sub(g, f"{prefix}/")
        mean, var = case["mu"][0], case["var"][0]
        pull = settings.pull(len(mean))
        for i in range(len(case["max_diff"])):
            weight = pair_weights(kl_matrix(mean, var), settings.alpha, settings.exp_den_update)
            torch.testing.assert_close(weight, case["K"][i], rtol=1e-7, atol=1e-12)
            torch.testing.assert_close(pull * (weight.sum(1) - weight.sum(0)), case["tau"][i], rtol=1e-6, atol=1e-9)
            new_mean, new_var, _ = step(mean, var, inputs["data_mean"], inputs["data_var"], settings)
            torch.testing.assert_close(new_mean, case["mu"][i + 1], rtol=1e-7, atol=1e-9)
            torch.testing.assert_close(new_var, case["var"][i + 1], rtol=1e-7, atol=1e-9)
            changes = torch.stack([(new_mean - mean).norm(dim=1).max(), (new_var - var).norm(dim=1).max()])
            torch.testing.assert_close(changes, case["max_diff"][i], rtol=1e-6, atol=1e-8)
            mean, var = new_mean, new_var
        if "var1_CORRECT" in case:
            check_exact_variance(case, inputs, settings)
        check_final(case, inputs, settings)


def check_exact_variance(case, inputs, settings):
    exact = FixedPoint(**{**settings.__dict__, "variance_update": "exact"})
    mean, var = case["mu"][0], case["var"][0]
    # the file's value takes the variance about the class mean; our exact form adds (m_i - mu_i)^2
    moment = inputs["data_var"] - (inputs["data_mean"] - mean) ** 2
    _, new_var, _ = step(mean, var, inputs["data_mean"], moment, exact)
    torch.testing.assert_close(new_var, case["var1_CORRECT"], rtol=1e-7, atol=1e-9)


def check_final(case, inputs, settings):
    final = FixedPoint(**{**settings.__dict__, "epsilon": 1e-6, "max_iters": 400})
    result = solve(inputs["data_mean"], inputs["data_var"], inputs["mu0"], inputs["var0"], final)
    assert result.non_finite == bool(case["final_nan_exit"])
    torch.testing.assert_close(result.mean, case["final_mu"], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(result.var, case["final_var"], rtol=1e-4, atol=1e-4)
    if not result.non_finite:
        assert abs(result.iterations - int(case["final_iters"])) <= 1


def test_fpi_inputs():
    from nfpi.gaussians import ClassMoments

    g = tensors("fpi_inputs")
    classes, cut = len(g["data_mean"]), len(g["y"]) // 3
    parts = [ClassMoments.of(g["z"][s], g["y"][s], classes) for s in (slice(cut), slice(cut, None))]
    mean, var = parts[0].merge(parts[1]).statistics()
    close(mean, g["data_mean"], 1e-12)
    close(var, g["data_var"], 1e-12)


def test_fpi_float32():
    inputs, g = tensors("fpi_inputs"), tensors("fpi_float32")
    start = g["mu"][0], g["var"][0]
    records = []
    for count in range(1, len(g["max_diff"]) + 1):
        settings = FixedPoint(strength=1000, variances=True, epsilon=0, max_iters=count)
        result = solve(inputs["data_mean"], inputs["data_var"], *start, settings)
        assert result.mean.dtype == torch.float32
        torch.testing.assert_close(result.mean, g["mu"][count], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(result.var, g["var"][count], rtol=1e-4, atol=1e-4)
        records = result.history
    changes = torch.tensor([[r["mean_change"], r["var_change"]] for r in records])
    torch.testing.assert_close(changes, g["max_diff"], rtol=1e-4, atol=1e-4)


def test_fpi_2d():
    g = tensors("fpi_2d")
    for prefix in sorted({k.split("/")[0] for k in g if k.startswith("lam")}):
        settings = FixedPoint(
            strength=float(prefix.removeprefix("lam")), variances=True, sum_trick=False, epsilon=0.1, max_iters=10000
        )
        result = solve(g["data_mean"], g["data_var"], g["data_mean"], g["data_var"], settings)
        assert result.iterations == int(g[f"{prefix}/iters"])
        torch.testing.assert_close(result.mean, g[f"{prefix}/mu"], rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(result.var.sqrt(), g[f"{prefix}/std"], rtol=1e-6, atol=1e-6)
        smallest = off_diagonal(kl_matrix(result.mean, result.var)).min()
        torch.testing.assert_close(smallest, g[f"{prefix}/min_offdiag_kl"], rtol=1e-6, atol=1e-6)
        if "notebook_printed_mu_lam1000" in g and prefix == "lam1000":
            torch.testing.assert_close(result.mean, g["notebook_printed_mu_lam1000"], rtol=0, atol=2e-4)
            torch.testing.assert_close(result.var.sqrt(), g["notebook_printed_std_lam1000"], rtol=0, atol=2e-4)


class Toy(torch.nn.Module):
    """A weight, a float buffer and a parameter that the average ignores."""

    def __init__(self, weight, running, bias):
        super().__init__()
        self.weight = torch.nn.Parameter(weight.clone())
        self.ignored = torch.nn.Parameter(bias.clone())
        self.register_buffer("running_mean", running.clone())

    def set(self, weight, running, bias):
        with torch.no_grad():
            self.weight.copy_(weight)
            self.running_mean.copy_(running)
            self.ignored.copy_(bias)


def test_ema():
    g = tensors("ema")
    online, want_running = g["online"], g["ema_running_mean"]
    biases = g["ema_ignored_bias"]
    # the buffer's own values are not in the file; the first two are copied, the others follow from the recursion
    running = [want_running[0], want_running[1]]
    for i in range(2, len(online)):
        decay = g["decay_after"][i]
        running.append((want_running[i] - decay * want_running[i - 1]) / (1 - decay))
    toy = Toy(online[0], running[0], biases[0])
    average = ema.PowerEma(toy, beta=0.9999, update_after_step=0, update_every=1, power=0.75, ignore=("ignored",))
    for i in range(len(online)):
        toy.set(online[i], running[i], biases[i] if i < 2 else biases[i] + 1)
        average.update(toy)
        close(average.ema_model.weight, g["ema"][i], 1e-12)
        close(average.ema_model.ignored, biases[i], 1e-12)
        close(torch.tensor(average.decay()), g["decay_after"][i], 1e-12)
        assert average.initialised == bool(g["initted_after"][i])
        close(average.ema_model.running_mean, want_running[i], 1e-12)
    zero = torch.zeros(1)
    toy = Toy(g["online2"][0], zero, zero)
    average = ema.PowerEma(toy, beta=0.9, update_after_step=3, update_every=2)
    for weight, want in zip(g["online2"], g["ema2"], strict=True):
        toy.set(weight, zero, zero)
        average.update(toy)
        close(average.ema_model.weight, want, 1e-12)


def test_karras_ema():
    g = tensors("ema")
    for sigma, gamma in zip(g["sigma_rel"].tolist(), g["gamma"].tolist(), strict=True):
        assert math.isclose(sigma_rel_to_gamma(sigma), gamma, rel_tol=1e-9)
    weights = posthoc_weights(g["posthoc_t"].numpy(), g["posthoc_gamma"].numpy(), np.array([25.0]), np.array([10.0]))
    close(torch.from_numpy(weights), g["posthoc_weights_t25_g10"], 1e-9)
    online, want = g["online_karras"], g["ema_karras"]
    # the file does not name the profile's exponent: the second row gives it, all other rows must follow
    beta = ((want[1] - online[1]) / (want[0] - online[1])).mean().item()
    gamma = round(math.log(beta) / math.log(2 / 3) - 1, 4)
    zero = torch.zeros(1)
    toy = Toy(online[0], zero, zero)
    average = KarrasEma(toy, gamma)
    for weight, expected in zip(online, want, strict=True):
        toy.set(weight, zero, zero)
        average.update(toy)
        close(average.ema_model.weight, expected, 1e-12)


def test_glem():
    g = tensors("glem")
    adam = glem.GaussianAdam()
    close(torch.stack([adam.direction(grad) for grad in g["adam_grads"]]), g["adam_out"], 1e-7)
    sigmoid = glem.SigmoidVariance()
    close(sigmoid.ambient(g["reparam_latent"]), g["reparam_ambient"], 1e-7)
    close(sigmoid.latent(g["reparam_ambient"]), g["reparam_back"], 1e-7)
    close(sigmoid.derivative(g["reparam_latent"]), g["reparam_deriv"], 1e-7)
    close(torch.tensor([sigmoid.initial]), g["reparam_init"].double(), 1e-7)
    close(glem.FreeVariance().ambient(g["reparam_latent"]), g["noreparam_ambient"], 1e-7)
    grad_mean, grad_var = glem.nll_gradients(g["z"], g["mu"], g["cov"])
    close(grad_mean, g["grad_mu"], 1e-7)
    close(grad_var, g["grad_cov"], 1e-7)
    linear = glem.schedule([0, 100], [50, 25], "lin")
    geometric = glem.schedule([0, 10, 11, 100], [0.1, 0.1, 0.01, 0.001], "geom")
    for i, (lin, geom) in enumerate(zip(g["sched_lin"].tolist(), g["sched_geom"].tolist(), strict=True)):
        index = int(g["sched_idx"][i])
        assert math.isclose(glem.at(linear, index), lin, rel_tol=1e-6)
        assert math.isclose(glem.at(geometric, index), geom, rel_tol=1e-6)
    settings = glem.GlemStep(0.1, 0.1, 1, 1, 50, 50, nll_range=10 - 3, kl_range=-1 + 4)
    new_mean, new_var = glem.update(
        g["mu"],
        g["cov"],
        (grad_mean, grad_var),
        (g["kld_grad_mu"], g["kld_grad_cov"]),
        glem.GaussianAdam(),
        glem.GaussianAdam(),
        sigmoid,
        settings,
    )
    close(new_mean, g["new_mu"], 1e-7)
    close(new_var, g["new_cov"], 1e-7)


def test_label_encoder():
    g = tensors("label_encoder")
    for key in [k for k in g if k.startswith("enc_it")]:
        codes = label_encoder.repel(g["start"], int(key.removeprefix("enc_it")))
        close(codes.view_as(g[key]), g[key], 1e-5)
    iterations = max(int(k.removeprefix("enc_it")) for k in g if k.startswith("enc_it"))
    encoder = label_encoder.DistancedPixels(g[f"enc_it{iterations}"])
    encoded = encoder.encode(g["x"], g["y"])
    close(encoded, g["encoded"], 1e-5)
    assert list(encoded.shape[1:]) == g["shape_out"].tolist()
    assert torch.equal(encoder.decode(encoded), g["decoded"])
    square = g["removed"].shape[-2:]
    close(encoder.remove(encoded)[:, :, : square[0], : square[1]], g["removed"], 0)
    assert torch.equal(encoder.remove(encoded), g["x"])


def test_data_helpers():
    g = tensors("data_helpers")
    targets, k = g["targets"], torch.bincount(g["k_targets"]).max().item()
    picked = data.items_per_class(targets, k, torch.Generator().manual_seed(1999))
    assert torch.equal(picked, g["k_idx"])
    assert torch.equal(targets[picked], g["k_targets"])
    ratio = len(g["split_val"]) / len(targets)
    kept, held = data.stratified_split(targets, held_out=ratio, seed=1999)
    assert torch.equal(kept, g["split_train"]) and torch.equal(held, g["split_val"])
    grid = torch.arange(256, dtype=torch.float32) / 255
    assert torch.equal(data.to_uint8(grid), g["u8_grid_CORRECT"])
    nearest = data.to_uint8(g["u8_x"]).float() - 255 * g["u8_x"].clamp(0, 1)
    assert nearest.abs().max() <= 0.5 + 1e-4
    shipped = resolve(*config_place("___configs/cifar10", "mean"), []).dataset_info.__pydantic_extra__
    for key in [k for k in g if k.startswith("bs_")]:
        _, name, gpus = key.split("_")
        info = shipped[name]
        per_class = info.train_size // info.num_classes
        assert data.sampling_batches(per_class, int(gpus.removeprefix("g"))) == g[key].tolist()
