"""The reference vectors of the published code; every size, seed and name comes from the files."""

import json
import math
import re

import numpy as np
import pytest
import torch
from golden_cases import check_complete, folder, load
from metric_definitions import mmd2, mmd2_and_variance
from PIL import Image
from torch import Tensor

from common.datasets.classic import _finish as finish_images
from common.datasets.files import fit
from common.errors import UserError
from common.images import grid, mosaic, to_uint8
from common.metrics import (
    Statistics,
    f_beta_pair,
    frechet_distance,
    kernel_distance,
    prd_from_histograms,
    precision_recall_distribution,
)
from common.metrics.precision_recall import f_beta
from common.options import from_tokens
from lbae import reference, sampler
from lbae.eval import Scores
from lbae.model import LBAE, kl_divergence, losses, quantise, reconstruction_loss, reparametrise
from lbae.options import LAST, Params, experiment_name
from lbae.reconstruct import pair_columns
from lbae.results import Results, Section, read_line

MODELS = (
    "model_mnist",
    "model_cifar10",
    "model_celeba",
    "model_small_mnist",
    "model_small_cifar10",
    "model_small_celeba",
)
STEPS = ("train_steps_mnist", "train_steps_cifar10")
OTHERS = (
    "fid", "get_covb", "images", "interpolate", "kid", "losses", "nearest_pd", "prd", "preprocess", "quantizer",
    "sample_boundary", "set_attr", "slerp", "split_sphere", "vae",
)  # fmt: skip


def test_every_file_is_covered():
    check_complete("lbae", {f"{name}.npz" for name in (*MODELS, *STEPS, *OTHERS)} | {"cli_cases.json"})


def tensor(array) -> Tensor:
    return torch.from_numpy(np.asarray(array)).double()


def close(ours, array, rtol=1e-9, atol=1e-12):
    ours = ours.detach().numpy() if isinstance(ours, Tensor) else ours
    np.testing.assert_allclose(ours, array, rtol=rtol, atol=atol)


def exactly(ours, array):
    ours = ours.detach().numpy() if isinstance(ours, Tensor) else np.asarray(ours)
    np.testing.assert_array_equal(ours, array)


def case_names(z: dict, end: str) -> list[str]:
    """The prefixes of the keys that end with `end`."""
    names = [key.removesuffix(end) for key in z if key.endswith(end)]
    assert names
    return names


# ------------------------------------------------------------------------------------------------------------ networks


def fill(key: str, shape: tuple[int, ...], g: np.random.Generator) -> np.ndarray:
    name = key.split(".", 1)[1]
    if name.endswith("running_var"):
        return 0.5 + g.random(shape)
    if name.endswith("running_mean"):
        return 0.1 * g.standard_normal(shape)
    if name.startswith("bn") and name.endswith("weight"):
        return 1 + 0.1 * g.standard_normal(shape)
    if name.endswith("bias"):
        return 0.1 * g.standard_normal(shape)
    return g.standard_normal(shape) / math.sqrt(math.prod(shape[1:]))


def weights_of(z: dict) -> dict[str, Tensor]:
    """The stored weights, or those of the fill recipe, checked by their sums."""
    stored = {key[2:]: tensor(z[key]) for key in z if key.startswith("w:")}
    if stored:
        return stored
    weights = {}
    for i, key in enumerate(map(str, z["keys"])):
        shape = tuple(int(n) for n in z["shapes"][i] if n)
        weights[key] = tensor(fill(key, shape, np.random.default_rng([int(z["seed"]), i])))
        close([weights[key].sum(), weights[key].abs().sum()], z["checksum"][i])
    return weights


def model_of(weights: dict[str, Tensor], img_size: int) -> LBAE:
    """A model whose sizes are read off the weights; every weight must find its place."""
    vae, width = "enc.l1.weight" in weights, len(weights["enc.ec0.weight"])
    zsize = weights["gen.l1l.weight"].shape[1]
    model = LBAE(
        img_size, weights["enc.ec0.weight"].shape[1], zsize, width, vae,
        dec_in_channels=weights["gen.l1l.weight"].shape[0] // 16,
    ).double()  # fmt: skip
    own = model.state_dict()
    assert {key for key in own if not key.endswith("num_batches_tracked")} == set(weights)
    model.load_state_dict({**{key: value for key, value in own.items() if key not in weights}, **weights})
    return model


def is_binary(z: dict) -> bool:
    return z["x_u8"].shape[-3] == 1  # grey images are trained by cross entropy, colour ones by squared error


@pytest.mark.parametrize("name", MODELS)
def test_model(name):
    z = load("lbae", name)
    weights = weights_of(z)
    model = model_of(weights, int(z["img_size"]))
    assert len(weights["enc.ec0.weight"]) == int(z["width"])
    x = tensor(z["x_u8"]) / 255

    def compare(stage, xr, encoded, loss):
        tolerance = 1e-6 if z[f"{stage}_xr"].dtype == np.float32 else 1e-9
        close(encoded.logits, z[f"{stage}_logits"])
        exactly(encoded.code, z[f"{stage}_z"])
        close(encoded.qerr, z[f"{stage}_qerr"])
        close(xr, z[f"{stage}_xr"], tolerance, tolerance)
        close(loss, z[f"{stage}_loss"])

    model.eval()
    with torch.no_grad():
        xr, encoded = model(x)
        compare("eval", xr, encoded, losses(xr, x, encoded, is_binary(z))["loss"].mean())
        tolerance = 1e-6 if z["rand_xr"].dtype == np.float32 else 1e-9
        close(model.gen(tensor(z["rand_z"])), z["rand_xr"], tolerance, tolerance)
        close(model.gen(tensor(z["rand_z"])[:, None]), z["rand_xr"], tolerance, tolerance)  # (B, 1, D)

    model.train()
    source = x.clone().requires_grad_()
    xr, encoded = model(source)
    loss = losses(xr, x, encoded, is_binary(z))["loss"].mean()
    compare("train", xr, encoded, loss)
    loss.backward()
    close(source.grad, z["grad_x"], 1e-9, 1e-9)
    parameters = dict(model.named_parameters())
    assert set(parameters) == {str(key) for key in z["param_keys"]}
    for key, norm, head in zip(map(str, z["param_keys"]), z["grad_norm"], z["grad_head"], strict=True):
        gradient = parameters[key].grad
        scale = max(1.0, float(norm))
        close(gradient.norm(), norm, 1e-9, 1e-9 * scale)
        ours = np.zeros(len(head))
        ours[: gradient.numel()] = gradient.flatten()[: len(head)].numpy()
        close(ours, head, 1e-8, 1e-9 * scale)
    buffers = {**dict(model.named_buffers())}
    for key in (key for key in z if re.fullmatch(r"(enc|gen)_bn\d+_running_(mean|var)", key)):
        part, layer, rest = key.split("_", 2)
        close(buffers[f"{part}.{layer}.{rest}"], z[key])


@pytest.mark.parametrize("name", STEPS)
def test_training_steps(name):
    z = load("lbae", name)
    model = model_of(weights_of(z), z["x_u8"].shape[-1]).train()
    optimizer = torch.optim.Adam(model.parameters(), lr=float(z["lr"]))
    for i, images in enumerate(z["x_u8"]):
        x = tensor(images) / 255
        xr, encoded = model(x)
        loss = losses(xr, x, encoded, is_binary(z))["loss"].mean()
        close(loss, z["losses"][i], 1e-8)
        close(encoded.qerr, z["qerr"][i], 1e-8)
        exactly(encoded.code, z["latents"][i])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    state = model.state_dict()
    for key, total, absolute in zip(map(str, z["keys"]), z["final_sum"], z["final_abs_sum"], strict=True):
        close([state[key].sum(), state[key].abs().sum()], [total, absolute], 1e-7, 1e-7)
    for key in (key for key in z if key.startswith("final:")):
        close(state[key.removeprefix("final:")], z[key], 1e-7, 1e-7)


def test_vae():
    z = load("lbae", "vae")
    model = model_of(weights_of(z), z["x_u8"].shape[-1]).eval()
    with torch.no_grad():
        encoded = model.enc(tensor(z["x_u8"]) / 255)
    close(encoded.mu, z["mu"], 1e-10)
    close(encoded.logvar, z["logvar"], 1e-10)
    close(reparametrise(encoded.mu, encoded.logvar, tensor(z["eps"])), z["z"], 1e-10)
    weight = float(z["kl_weight"]) / int(z["zsize"])
    close(weight * kl_divergence(encoded.mu, encoded.logvar).mean(), z["loss_kld_eval"], 1e-10)
    mu, logvar = tensor(z["big_mu"]), tensor(z["big_logvar"])
    close(weight * kl_divergence(mu, logvar).mean(), z["big_loss_kld_eval"], 1e-10)
    close(weight * kl_divergence(mu, logvar, clamp=True).mean(), z["big_loss_kld_train"], 1e-10)
    # the same through the sum that training takes
    x = torch.full((len(mu), 1, 2, 2), 0.5).double()
    terms = losses(x, x, encoded._replace(mu=mu, logvar=logvar), False, float(z["kl_weight"]), training=True)
    close(terms["loss"].mean(), z["big_loss_kld_train"], 1e-10)


def test_quantiser():
    z = load("lbae", "quantizer")
    x, gradient = tensor(z["x"]), tensor(z["upstream_grad"])
    for key in (key for key in z if key.startswith("out_n")):
        decimals = int(key.removeprefix("out_n"))
        source = x.clone().requires_grad_()
        out = quantise(source, decimals)
        exactly(out, z[key])
        out.backward(gradient)
        exactly(source.grad, z[f"grad_n{decimals}"])
    source = x.clone().requires_grad_()
    soft = torch.tanh(source)
    code = quantise(soft)
    exactly(code, z["logits_code"])
    close((soft - code).abs().mean(), z["qerr"], 1e-14)
    code.backward(gradient)
    close(source.grad, z["logits_grad"], 1e-14, 1e-14)
    draws = tensor(z["rand_u"]).clamp(-1, 1)
    exactly(quantise(draws), z["rand_code"])
    exactly(quantise(draws, 1), z["rand_round1"])


def test_losses():
    z = load("lbae", "losses")
    x, xr = tensor(z["x"]), tensor(z["xr"])
    sizes = [int(n) for n in z["batch_sizes"]]
    for name, binary in (("bce", True), ("mse", False)):
        per_image = reconstruction_loss(xr, x, binary)
        batches = torch.stack([part.mean() for part in per_image.split(sizes)])
        close(batches, z[f"{name}_per_batch"], 1e-12)
        close(batches.mean(), z[f"{name}_eval_upstream"], 1e-12)  # over-weights the short batch
        close(per_image.mean(), z[f"{name}_eval_correct"], 1e-12)


# ------------------------------------------------------------------------------------------------------------- sampler


def triangular(planes: sampler.Hyperplanes) -> Tensor:
    """The published triangular normals of positive definite H; samples and paths depend on L L^T alone."""
    return torch.linalg.cholesky(torch.sin(torch.pi / 2 * planes.G))


def test_hyperplanes():
    z = load("lbae", "get_covb")
    for name in case_names(z, "_z"):
        codes = torch.from_numpy(z[f"{name}_z"])
        mean, second = sampler.moments(codes, chunk=100)
        close(mean, z[f"{name}_mu"])
        close(sampler.moments((codes + 1) // 2)[0], z.get(f"{name}_mu_from_zero_one", z[f"{name}_mu"]))
        positive = z[f"{name}_eig_raw"].real.min() > 1e-10
        tolerance = 1e-8 if positive else 1e-7
        planes = sampler.hyperplanes(mean, second)
        close(planes.G, z[f"{name}_G"])
        close(torch.sin(torch.pi / 2 * planes.G), z[f"{name}_H_raw"], 1e-8, 1e-10)
        close(planes.H, z[f"{name}_H"], tolerance, tolerance)
        close(np.sort(planes.eigenvalues.numpy()), np.sort(z[f"{name}_eig_raw"].real), 1e-8, 1e-8)
        if f"{name}_psd_projection" in z:
            close(planes.H, z[f"{name}_psd_projection"], 1e-7, 1e-7)
        if positive:
            close(triangular(planes), z[f"{name}_L"], 1e-8, 1e-8)
        L, H, _ = reference.hyperplanes_ref(codes.numpy())
        close(H, z[f"{name}_H"], 1e-6, 1e-6)  # float32 moments, as published
        close(L @ L.T, z[f"{name}_H"], 1e-6, 1e-6)


def test_nearest_psd():
    z = load("lbae", "nearest_pd")
    for name in case_names(z, "_A"):
        L, _ = sampler.eigen_factor(tensor(z[f"{name}_A"]))
        close(L @ L.T, z[f"{name}_H"], 1e-7, 1e-7)
        close(L @ L.T, z[f"{name}_psd_projection"], 1e-7, 1e-7)
        H, plain = reference.nearest_psd_ref(z[f"{name}_A"])
        close(H, z[f"{name}_H"], 1e-7, 1e-7)
        close(plain @ plain.T, z[f"{name}_H"], 1e-7, 1e-7)


def published_width(planes: sampler.Hyperplanes, normals: Tensor, zsize: int) -> Tensor:
    """`sample_cov` for a code of another length, as the published routine has it: all D + 1 sides are not flipped, and
    columns beyond D + 1 are -1.
    """
    sides = sampler.sign(normals @ planes.L.T)
    if zsize == sides.shape[1]:
        return sides
    codes = torch.cat([sampler.sample_cov(planes, normals), torch.ones(len(normals), 1, dtype=torch.int8)], 1)
    return torch.nn.functional.pad(codes, (0, max(0, zsize - codes.shape[1])), value=-1)[:, :zsize]


def test_sampling_from_normals():
    z = load("lbae", "sample_boundary")
    d = int(z["D"])
    for name in case_names(z, "_normals"):
        normals = z[f"{name}_normals"]
        exactly(np.random.RandomState(int(z["np_seed"])).randn(*normals.shape), normals)
        planes = sampler.Hyperplanes(tensor(z[f"{name}_L"]))
        for key in (key for key in z if re.fullmatch(rf"{name}_z\d+", key)):
            exactly(published_width(planes, tensor(normals), d + int(key.removeprefix(f"{name}_z"))), z[key])
        exactly(sampler.sample_cov(planes, tensor(normals)), z[f"{name}_z0"])
        exactly(reference.sample_cov_ref(z[f"{name}_L"], normals), z[f"{name}_z0"])


def test_slerp():
    z = load("lbae", "slerp")
    low, high = tensor(z["low"]), tensor(z["high"])  # (B, n)
    a, b = sampler.slerp_weights(tensor(z["t"]), (sampler.unit(low) * sampler.unit(high)).sum(-1))
    close(a[..., None] * low[:, None] + b[..., None] * high[:, None], z["result"])
    for low, high, path in zip(z["low"], z["high"], z["result"], strict=True):
        close(np.stack([reference.slerp_ref(t, low, high) for t in z["t"]]), path)


def test_directions():
    z = load("lbae", "split_sphere")
    for name in case_names(z, "_codes"):
        planes, codes = sampler.Hyperplanes(tensor(z[f"{name}_L"])), torch.from_numpy(z[f"{name}_codes"])
        m = sampler.directions(planes, codes, "mean")
        close(m, z[f"{name}_m"], 1e-9, 1e-9)
        sides = sampler.sign(m @ planes.L[:-1].T)
        exactly(sides, z[f"{name}_b"])
        exactly((sides != codes).sum(1), z[f"{name}_hamming"])
        for code, expected, bits in zip(codes.numpy(), z[f"{name}_m"], z[f"{name}_b"], strict=True):
            plain, own = reference.direction_ref(z[f"{name}_L"], code)
            close(plain, expected, 1e-9, 1e-9)
            exactly(own, bits)
        # the refinement never has more wrong bits
        refined = sampler.sign(sampler.directions(planes, codes, "margin") @ planes.L[:-1].T)
        assert bool(((refined != codes).sum(1).numpy() <= z[f"{name}_hamming"]).all())


def test_interpolation():
    z = load("lbae", "interpolate")
    for name in case_names(z, "_codes"):
        planes, codes = sampler.Hyperplanes(tensor(z[f"{name}_L"])), torch.from_numpy(z[f"{name}_codes"])
        for key in (key for key in z if re.fullmatch(rf"{name}_path\d+", key)):
            steps, pairs = z[key].shape[1] - 2, len(z[key])
            begin, end = codes[:pairs], codes[1 : pairs + 1]
            path, hamming = sampler.interpolate(planes, begin, end, steps, "mean")
            exactly(path, z[key])
            exactly(hamming, z[key.replace("path", "hdist")])
            exactly(reference.path_ref(z[f"{name}_L"], begin[0].numpy(), end[0].numpy(), steps), z[key][0])
        chosen = z[f"{name}_rnd_src"]
        random = np.random.RandomState(int(z[f"{name}_rnd_np_seed"]))
        exactly(sampler.choose_pairs(random, len(z[f"{name}_rnd_z"]), len(chosen)), chosen)
        ends = torch.from_numpy(z[f"{name}_rnd_z"][chosen])
        path, hamming = sampler.interpolate(planes, ends[:, 0], ends[:, 1], z[f"{name}_rnd_hdist"].shape[1], "mean")
        exactly(path.flatten(0, 1), z[f"{name}_rnd_out"])
        exactly(hamming, z[f"{name}_rnd_hdist"])


def test_attributes():
    z = load("lbae", "set_attr")
    codes = torch.from_numpy(z["z"])
    mean = sampler.attribute_mean(codes, torch.from_numpy(z["labels40"]), int(z["attr"]))
    close(mean, z["cond_mean"], 1e-12)
    close(mean[torch.from_numpy(z["cor_sorted"])], z["cor_mean_sorted"], 1e-12)
    close(mean.sort().values, z["cor_mean_sorted"], 1e-12)
    by_class = sampler.attribute_mean(codes, torch.from_numpy(z["class_labels"]), int(z["class_attr"]))
    close(by_class, z["class_cond_mean"], 1e-12)
    planes = sampler.Hyperplanes(tensor(z["L"]))
    begin = torch.from_numpy(z["path"][:, 0])
    end = sampler.set_attribute(begin, mean, float(z["threshold"]))
    path, hamming = sampler.interpolate(planes, begin, end, z["path"].shape[1] - 2, "mean")
    exactly(path, z["path"])
    exactly(hamming, z["hdist"])


# ------------------------------------------------------------------------------------------------------------- metrics


def test_frechet_distance():
    z = load("lbae", "fid")
    for name in case_names(z, "_fid_eig"):
        first, second = (Statistics.from_features(z[f"{name}_{side}"]) for side in "ab")
        for side, one in (("a", first), ("b", second)):
            close(one.mu, z[f"{name}_mu_{side}"])
            close(one.sigma, z[f"{name}_sigma_{side}"])
        full = min(len(z[f"{name}_a"]), len(z[f"{name}_b"])) > z[f"{name}_a"].shape[1]
        value = frechet_distance(first.mu, first.sigma, second.mu, second.sigma)
        close(value, z[f"{name}_fid_eig"], 1e-7 if full else 1e-6)
        if full:
            close(value, z[f"{name}_fid_upstream"], 1e-7)
        assert 0 <= frechet_distance(first.mu, first.sigma, first.mu, first.sigma) < 1e-8


def test_kernel_distance():
    z = load("lbae", "kid")
    m = int(z["m"])
    x, y = z["X"][:m], z["Y"][:m]
    for name, estimator in (("unbiased", "unbiased"), ("ustat", "u-statistic"), ("biased", "biased")):
        close(mmd2(x, y, estimator), z[f"mmd2_{name}"])
    for key in z:  # mmd2_deg2_gamma03_coef05: degree 2, gamma 0.3, coef0 0.5
        if found := re.fullmatch(r"mmd2_deg(\d+)_gamma(\d)(\d+)_coef(\d)(\d+)", key):
            degree, *digits = found.groups()
            gamma, coef0 = (float(f"{digits[i]}.{digits[i + 1]}") for i in (0, 2))
            close(mmd2(x, y, degree=int(degree), gamma=gamma, coef0=coef0), z[key])
    close(mmd2_and_variance(x, y, int(z["var_at_m"]))[1], z["var"])
    close(mmd2_and_variance(x, y)[1], z["var_default"])
    mean, std = kernel_distance(
        z["X"], z["Y"], len(z["avg_mmds"]), int(z["avg_subset_size"]), seed=int(z["avg_np_seed"]), legacy=True
    )
    close([mean, std], [z["avg_mean"], z["avg_std"]])
    for value, rows_x, rows_y in zip(z["avg_mmds"], z["avg_idx_g"], z["avg_idx_r"], strict=True):
        close(mmd2(z["X"][rows_x], z["Y"][rows_y]), value)


def test_precision_recall():
    z = load("lbae", "prd")
    for name in case_names(z, "_precision"):
        base = name if f"{name}_eval" in z else name.rstrip("0123456789")  # generic11: generic at 11 angles
        curve = z[f"{name}_precision"], z[f"{name}_recall"]
        if z[f"{base}_eval"].ndim == 2:
            continue  # features, not histograms: below
        precision, recall = prd_from_histograms(z[f"{base}_eval"], z[f"{base}_ref"], len(curve[0]))
        close([precision, recall], curve)
        if f"{name}_f8" in z:
            close(f_beta_pair(precision, recall), [z[f"{name}_f8"], z[f"{name}_f18"]])
        if f"{name}_f1_curve" in z:
            close(f_beta(precision, recall, 1.0), z[f"{name}_f1_curve"])
    pair = f_beta_pair(*precision_recall_distribution(z["emb_eval"], z["emb_ref"], runs=2))
    np.testing.assert_allclose(pair, z["emb_f_mean"], atol=0.03)  # k-means: another random stream


# ----------------------------------------------------------------------------------------- pictures and command line


def test_images():
    z = load("lbae", "images")
    x = torch.from_numpy(z["x"])
    before = x.clone()
    exactly(to_uint8(x).transpose(0, 2, 3, 1), z["u8"])
    close(grid(x, int(z["grid_nrow"]), stretch=True), z["grid"], 1e-6, 1e-6)
    exactly(mosaic(x, int(z["grid_nrow"]), stretch=True), z["grid_u8"])
    exactly(x, before.numpy())
    for n, columns in zip(z["n_images"], z["recon_cols"], strict=True):
        assert pair_columns(int(n)) == max(2, int(columns))  # the published rule gives no column for one image


def test_preprocessing():
    z = load("lbae", "preprocess")
    face = Image.fromarray(z["celeba_in"])

    def near(ours, expected):
        assert np.abs(ours.astype(int) - expected.astype(int)).max() <= 1

    for key in (key for key in z if re.fullmatch(r"celeba_(default|crop\d+)", key)):
        crop = int(key.removeprefix("celeba_crop")) if "crop" in key else None
        near(fit(face, z[key].shape[0], crop).transpose(1, 2, 0), z[key])
    digit, out = z["mnist_in"], z["mnist_out"]
    pad = (out.shape[-1] - digit.shape[-1]) // 2
    padded = finish_images("mnist", "test", digit[None, None], np.zeros(1, int), ["0"], "memory", pad=pad)
    near(padded.arrays()[0][0].numpy(), np.rint(out * 255))


def test_command_line():
    cases = json.loads((folder("lbae") / "cli_cases.json").read_text())
    for case in cases["argv_cases"]:
        for token in case["argv"]:
            key = token.partition("=")[0]
            expected = case["upstream_values"][key]
            model = next((one for one in (Params, Scores) if key in one.model_fields), None)
            if model is None:  # the published parser takes any key
                with pytest.raises(UserError, match="unknown option"):
                    from_tokens(Params, [token])
                continue
            more = ["eval"] if key in ("gen", "set_attr") else []
            typed = from_tokens(model, [*more, token])[1][key]
            assert typed == expected or (token == "reload" and expected is True and typed == LAST)
    for case in cases["experiment_names"]:
        assert experiment_name(Params(**case["hps"])) == case["name"]
    for case in cases["results_lines"]:
        sections = [Section(*values) for values in case["sections"]]
        results = Results(case["epoch"], case["loss_eval"], case["nref"], sections)
        assert str(results) == case["line"]
        assert str(read_line(case["line"])) == case["line"]
