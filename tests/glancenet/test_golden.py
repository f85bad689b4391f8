"""Every reference vector of tests/golden/glancenet (or GOLDEN_DIR); sizes, seeds and weights come from the files."""

import re
from dataclasses import replace

import numpy as np
import published_measures
import pytest
import torch
import torch.nn.functional as F
from golden_cases import check_complete, load
from metric_definitions import squared_correlations
from torch import nn

from common.metrics import disentanglement as dm
from common.metrics.disentanglement_points import Grid, Split
from glancenet import labels, losses, mnist_objective, osr, schedules
from glancenet.architectures import DECODERS, ENCODERS, SimpleDiscriminator
from glancenet.dci_celeba import celeba_categories, dci_celeba

PAPER = "glancenet"
WEIGHTS = losses.Weights(1, 1, 5, 5, "MSE", 0, None, 10000, 1, 1, 1, 1, 10, 1, 1, ())
COVERED = {
    "kl_terms", "total_correlation", "dip_vae", "infovae_mmd", "factorvae", "glancenet_objective", "cbm_objective",
    "accuracy", "multi_label", "osr", "schedules", "mnist_losses", "data_rules", "architectures", "metric_mig",
    "metric_sap", "metric_irs", "metric_dci", "metric_factor_vae", "metric_beta_vae", "metric_sampling",
    "metric_dci_linear",
}  # fmt: skip


def tensors(name: str) -> dict[str, torch.Tensor]:
    """The file's numeric arrays as tensors."""
    return {k: torch.from_numpy(v) for k, v in load(PAPER, name).items() if v.dtype.kind in "fiub"}


def close(got, expected, rtol=1e-8, atol=1e-12):
    """Compare as float64 arrays; a tensor may require a gradient."""
    got = got.detach().numpy() if isinstance(got, torch.Tensor) else got
    np.testing.assert_allclose(np.asarray(got, np.float64), np.asarray(expected, np.float64), rtol=rtol, atol=atol)


def leaf(x: torch.Tensor) -> torch.Tensor:
    return x.clone().requires_grad_(True)


def test_every_file_is_covered():
    check_complete(PAPER, {f"{name}.npz" for name in COVERED})


def test_kl_terms():
    g = tensors("kl_terms")
    mu, logvar, target = leaf(g["mu"]), leaf(g["logvar"]), leaf(g["target_mu"])
    close(losses.kl_divergence(mu, logvar), g["kl_std"])
    close(losses.kl_divergence(mu, logvar, mu), g["kl_var1_only"])
    full = losses.kl_divergence(mu, logvar, losses.prior_target(target, 0))
    close(full, g["kl_cond_full"])
    for got, key in zip(torch.autograd.grad(full, (mu, logvar, target)), ("mu", "logvar", "target"), strict=True):
        close(got, g[f"grad_{key}"])
    before = g["mu"].clone()
    part = losses.kl_divergence(g["mu"], g["logvar"], losses.prior_target(g["target_mu"], int(g["cluster_dim"])))
    close(part, g["kl_cond_partial_correct"])
    assert torch.equal(before, g["mu"]), "the KL must not change its input"


def test_capacity():
    g = tensors("kl_terms")
    steps, w_kld = g["cap_iters"].tolist(), float(g["cap_w_kld"])
    caps = [losses.capacity(step, float(g["cap_max_c"]), float(g["cap_iterations_c"])) for step in steps]
    close(caps, g["cap_value"], rtol=1e-4)
    for kl, key in ((g["kl_std"], "cap_loss_std"), (g["kl_cond_full"], "cap_loss_cond")):
        close([float(losses.kl_term(kl, w_kld, cap)) for cap in caps], g[key], rtol=1e-4)


def test_total_correlation():
    g = tensors("total_correlation")
    close(losses.reparametrize(g["mu"], g["logvar"], g["eps"]), g["z"])
    z, mu, logvar = leaf(g["z"]), leaf(g["mu"]), leaf(g["logvar"])
    close(losses.pairwise_log_density(z, mu, logvar), g["log_density"])
    tc = losses.total_correlation(z, mu, logvar)
    close(tc, g["tc"])
    close(tc, g["tc_logsumexp"])
    for got, key in zip(torch.autograd.grad(tc, (z, mu, logvar)), ("z", "mu", "logvar"), strict=True):
        close(got, g[f"grad_{key}"])
    close(losses.beta_tc_loss(g["z"], g["mu"], g["logvar"], float(g["w_tc"])), g["betatc_loss"])
    big = losses.total_correlation(g["big_z"], g["big_mu"], g["big_logvar"])
    close(big, g["big_tc_correct"], rtol=1e-3)


@pytest.mark.parametrize("estimator", ["mws", "mss"])
def test_kl_decomposition(estimator):
    g = tensors("total_correlation")
    parts = published_measures.kl_decomposition(g["z"], g["mu"], g["logvar"], int(g["dataset_size"]), estimator)
    for key, got in parts._asdict().items():
        close(got, g[f"{estimator}_{key}"])


def test_dip_vae():
    g = tensors("dip_vae")
    mu, od, d, w = leaf(g["mu"]), float(g["lambda_od"]), float(g["lambda_d"]), float(g["w_dipvae"])
    close(losses.covariance(mu), g["cov_mu"])
    one = w * losses.dip_vae_i_loss(mu, od, d)
    close(one, g["dip_i"])
    close(torch.autograd.grad(one, mu)[0], g["grad_dip_i_mu"])
    close(losses.covariance(g["mu"]) + torch.diag(g["logvar"].exp().mean(0)), g["cov_z_correct"])
    close(w * losses.dip_vae_ii_loss(g["mu"], g["logvar"], od, d), g["dip_ii_correct"])


def test_infovae_mmd():
    g = tensors("infovae_mmd")
    z = leaf(g["z"])
    close(losses.rbf_kernel(g["z_true"], z), g["kernel_true_z"], rtol=1e-10)
    value = losses.mmd(g["z_true"], z)
    close(value, g["mmd"], rtol=1e-10)
    close(torch.autograd.grad(value, z)[0], g["grad_z"], rtol=1e-10)
    close(losses.mmd(g["z_true"].float(), g["z"].float()), g["mmd_float32"], rtol=1e-5, atol=1e-7)


def discriminator_from(g: dict[str, torch.Tensor]) -> tuple[SimpleDiscriminator, list[str]]:
    """SimpleDiscriminator with the file's weights, and the file's layer names in order."""
    middle = sorted(
        (k for k in g if re.fullmatch(r"main__linear\d+__weight", k)), key=lambda k: int(re.search(r"\d+", k)[0])
    )
    names = ["main__0", *(k.removesuffix("__weight") for k in middle), "main__output"]
    first, last = g["main__0__weight"], g["main__output__weight"]
    net = SimpleDiscriminator(first.shape[1], last.shape[0], len(names), first.shape[0]).double()
    linears = [layer for layer in net.main if isinstance(layer, nn.Linear)]
    with torch.no_grad():
        for layer, name in zip(linears, names, strict=True):
            layer.weight.copy_(g[f"{name}__weight"])
            layer.bias.copy_(g[f"{name}__bias"])
    return net, names


def test_factorvae():
    g = tensors("factorvae")
    net, names = discriminator_from(g)
    permuted = losses.permute_latents(g["z2"], g["perms"])
    assert torch.equal(permuted, g["z2_perm"])
    close(net(g["z"]), g["logits_z"])
    close(net(permuted), g["logits_perm"])
    z = leaf(g["z"])
    tc = losses.factor_vae_tc(net(z), float(g["w_tc"]))
    close(tc, g["tc_loss"])
    close(torch.autograd.grad(tc, z)[0], g["grad_tc_z"])
    loss = losses.factor_vae_discriminator_loss(net(g["z"]), net(permuted))
    close(loss, g["disc_loss"])
    loss.backward()
    linears = [layer for layer in net.main if isinstance(layer, nn.Linear)]
    for layer, name in zip(linears, names, strict=True):
        close(layer.weight.grad, g[f"GRAD_D__{name}__weight"])
        close(layer.bias.grad, g[f"GRAD_D__{name}__bias"])


def objective_cases() -> list[str]:
    return sorted(k.removeprefix("correct_") for k in load(PAPER, "glancenet_objective") if k.startswith("correct_"))


def mask_of(case: str, g: dict[str, torch.Tensor], key: str) -> torch.Tensor:
    n = len(g["y"])
    if "_none" in case:
        return torch.zeros(n, dtype=torch.float64)
    return g[key] if "_partial" in case else torch.ones(n, dtype=torch.float64)


@pytest.mark.parametrize("case", objective_cases())
def test_glancenet_objective(case):
    g = tensors("glancenet_objective")
    w = replace(
        WEIGHTS, w_recon=float(g["w_recon"]), w_kld=float(g["w_kld"]), label_weight=float(g["label_weight"]),
        latent_weight=float(g["latent_weight"]), latent_loss=case.split("_")[0].upper(),
        cluster_dim=int(g["cluster_dim_used"]) if "_cd3" in case else 0,
        max_c=float(g["cap_max_c"]) if "_capacity" in case else None, iterations_c=float(g["cap_iterations_c"]),
    )  # fmt: skip
    mask = mask_of(case, g, "mask_partial")
    batch = losses.Batch(g["x"], g["labels"], g["y"], mask, g["y"][:, None])
    z = losses.reparametrize(g["mu"], g["logvar"], g["eps"])
    close(z, g["z"])
    means = None if "uncond" in case else g["W_prior"].T[g["y"]] + g["b_prior"]
    terms = losses.glancenet_terms(
        w, batch, z @ g["W_dec"].T + g["b_dec"], g["mu"], g["logvar"], z,
        torch.tanh(z / 2) @ g["W_cls"].T + g["b_cls"], means, int(g["cap_iter"]),
    )  # fmt: skip
    values = {
        "recon": terms.recon, "kld": terms.kld, "prediction": terms.prediction, "true_values": terms.true_values,
        "total": terms.total,
    }  # fmt: skip
    order = [str(name) for name in load(PAPER, "glancenet_objective")["term_order"]]
    close([float(values[name]) for name in order], g[f"correct_{case}"], rtol=1e-7 if "_capacity" not in case else 1e-6)
    if f"latent_err_{case}" in g and bool(mask.any()):
        close(terms.columns, g[f"latent_err_{case}"], rtol=1e-7)


@pytest.mark.parametrize("case", ["mse_partial", "mse_none", "bce_partial", "bce_none"])
def test_cbm_objective(case):
    g = tensors("cbm_objective")
    w = replace(
        WEIGHTS, label_weight=float(g["label_weight"]), latent_weight=float(g["latent_weight"]),
        latent_loss=case[:3].upper(),
    )  # fmt: skip
    batch = losses.Batch(g["mu"], g["labels"], g["y"], mask_of(f"_{case}", g, "mask"), g["y"][:, None])
    terms = losses.cbnm_terms(w, batch, g["mu"], torch.tanh(g["mu"] / 2) @ g["W_cls"].T)
    values = {"prediction": terms.prediction, "true_values": terms.true_values, "total": terms.total}
    order = [str(name) for name in load(PAPER, "cbm_objective")["term_order"]]
    close([float(values[name]) for name in order], g[case], rtol=1e-7)
    if bool(batch.mask.any()):
        close(terms.columns, g[f"{case}_per_latent"], rtol=1e-7)


def test_accuracy():
    g = tensors("accuracy")
    close(losses.soft_accuracy(g["probs"], g["y"]), g["UPSTREAM_soft_accuracy_probs"], rtol=1e-6)
    close(losses.soft_accuracy(g["logits"], g["y"]), g["UPSTREAM_soft_accuracy_logits"], rtol=1e-6)
    close(published_measures.hard_accuracy(g["logits"], g["y"]), g["hard_accuracy"], rtol=1e-6)
    close(published_measures.balanced_accuracy(g["logits"], g["y"]), g["balanced_accuracy"], rtol=1e-6)
    close(published_measures.soft_f1(g["f1_probs"], g["f1_y"]), g["UPSTREAM_one_minus_softF1"], rtol=1e-6)


def test_multi_label():
    g = tensors("multi_label")
    sizes = g["num_classes"].tolist()
    close(losses.multi_label_cross_entropy(g["pred"], g["target"], sizes), g["ce_sum"])
    close(published_measures.multi_label_accuracy(g["pred"], g["target"], sizes), g["acc_mean"], rtol=1e-6)
    close(losses.one_hot_labels(g["target"], sizes), g["onehot"])
    close(published_measures.softmax_entropy(g["pred"]), g["entropy"])


def test_osr_thresholds_and_acceptance():
    g = load(PAPER, "osr")
    z_class, means = int(g["z_class"]), g["class_means"]
    fitted = osr.fit_thresholds(g["rec_train"], g["z_train"], g["y_train"], means, z_class)
    close(fitted.reconstruction, g["quantile95_thr_rec"], rtol=1e-9)
    close(fitted.distance, g["quantile95_thr_y"], rtol=1e-9)
    close(osr.grid_threshold(g["rec_train"]), g["grid_thr_rec"], rtol=1e-9)
    distances = osr.prototype_distances(g["z_train"], means, z_class)
    grid = [osr.grid_threshold(distances[g["y_train"] == c, c]) for c in range(len(means))]
    close(grid, g["grid_thr_y"], rtol=1e-9)
    close(osr.prototype_distances(g["z_test"], means, z_class), g["dist_test"], rtol=1e-9)
    accepted = osr.accept(g["rec_test"], g["z_test"], fitted)
    assert np.array_equal(accepted.reconstruction, g["accept_rec"])
    assert np.array_equal(accepted.latent, g["accept_latent"])
    assert np.array_equal(accepted.both, g["accepted"])
    accuracy = osr.expected_accuracy(g["test_pred"], g["test_label"], g["accepted"])
    close(accuracy, g["expected_accuracy_random_on_reject"], rtol=1e-12)
    close(osr.leakage(accuracy), g["leakage"], rtol=1e-9)


def test_schedules_rates():
    g = load(PAPER, "schedules")
    lr, gamma = float(g["lr_G"]), float(g["gamma"])
    glance = schedules.warmup_rates(lr, len(g["warmup_glancenet"]))
    cbm = schedules.warmup_rates(1e-4, len(g["warmup_cbm"]))  # the published bottleneck warms up to 1e-4 whatever lr_G
    close(glance, g["warmup_glancenet"], rtol=1e-9)
    close(cbm, g["warmup_cbm"], rtol=1e-9)
    cases = (
        ("lr_glancenet_chainable", lr, glance, len(glance) - 1),
        ("lr_glancenet_closed_form", lr, glance, 0),
        ("lr_cbm_chainable", 1e-4, cbm, len(cbm) - 1),
    )
    for key, end, warmup, start in cases:
        rates = [published_measures.exponential_rate(e, end, gamma, warmup, start) for e in range(len(g[key]))]
        close(rates, g[key], rtol=1e-9)


STOP_CASES = [
    ("stop_trace_mask100", "", True, True), ("stop_trace_mask0", "", False, True),
    ("stop_trace_rising_mask100", "_rising_mask100", True, False), ("stop_trace_rising_mask0", "_rising_mask0", False,
    False),
]  # fmt: skip


@pytest.mark.parametrize("key, suffix, supervised, is_vae", STOP_CASES)
def test_schedules_early_stopping(key, suffix, supervised, is_vae):
    g = load(PAPER, "schedules")
    latent, bce = g[f"val_latent{suffix}"], g[f"val_bce{suffix}"]
    trace = g[key]
    rule = schedules.EarlyStopping(float(g["latent_weight"]), float(g["label_weight"]), supervised)
    rule.count_latent = True
    rate = float(trace[0, 4])
    judged = trace[:, 0].astype(int).tolist()
    got = []
    for t in range(judged[-1] + 1):
        rule.record(g["val_rec"][t] + g["val_kld"][t] if is_vae else 0.0, latent[t], bce[t])
        if t in judged:
            rate = rate / schedules.PLATEAU_FACTOR if rule.plateaued else rate
            stop = rule.update()
            got.append([t, rule.wait, rule.save, stop, rate])
    close(got, trace, rtol=1e-9)


def test_mnist_losses():
    g = tensors("mnist_losses")
    digits, mu, logvar, z = g["y"], g["mu"], g["logvar"], g["z"]
    targets = mnist_objective.concept_targets(digits).double()
    rec64 = F.binary_cross_entropy(g["recon"].double(), g["x"].double(), reduction="sum")
    vae = mnist_objective.vae_terms(rec64, mu, logvar, z, targets)
    for name in ("total", "rec", "kld", "lat"):
        close(getattr(vae, name), g[f"vae_{name}"], rtol=1e-5)
    close(vae.total, g["ref_vae_total"], rtol=1e-9)
    osr_loss = mnist_objective.osr_terms(rec64, mu, logvar, z, targets @ g["W_prior"].T, targets)
    for name in ("total", "rec", "kld", "lat", "post"):
        close(getattr(osr_loss, name), g[f"osr_{name}"], rtol=1e-5)
    close(osr_loss.total, g["ref_osr_total"], rtol=1e-9)
    close(mnist_objective.cbm_terms(z, targets).total, g["cbm_seq_total"], rtol=1e-5)


def test_data_rules():
    g = load(PAPER, "data_rules")
    values = g["dsprites_latents_values"]
    close(labels.dsprites_normalise(values), g["dsprites_normalised"], rtol=0, atol=1e-15)
    close(labels.DSPRITES_NORMAL, g["dsprites_plane_normal"], rtol=0, atol=0)
    close(labels.dsprites_normalise(values).mean(0), g["dsprites_plane_point"], rtol=1e-12)
    assert np.array_equal(labels.dsprites_classes(values), g["dsprites_y"])
    close(labels.dsprites_concepts(values), g["dsprites_concepts"], rtol=0, atol=1e-15)
    assert np.array_equal(labels.leakage_train_rows(values), g["leak_train_mask"])
    mask, corner = labels.leakage_test_rows(values)
    assert np.array_equal(mask, g["leak_test_mask"])
    expected = g["leak_test_label"]
    assert np.array_equal(corner, expected if len(expected) == mask.sum() else expected[mask])
    close(labels.mpi3d_concepts(g["mpi3d_factors"]), g["mpi3d_concepts"], rtol=0, atol=1e-15)
    assert np.array_equal(labels.MPI3D_CENTROIDS, g["mpi3d_centroids"])
    assert np.array_equal(labels.mpi3d_classes(g["mpi3d_factors"], g["mpi3d_centroids"]), g["mpi3d_class"])


def test_data_rules_on_the_full_dsprites_grid():
    g = load(PAPER, "data_rules")
    axes = [np.array([1.0]), np.arange(1.0, 4), np.linspace(0.5, 1, 6), np.linspace(0, 2 * np.pi, 40)]
    axes += [np.linspace(0, 1, 32)] * 2
    values = np.stack([axis.ravel() for axis in np.meshgrid(*axes, indexing="ij")], axis=1)
    assert len(values) == int(g["dsprites_full_n"])
    assert labels.dsprites_classes(values).sum() == int(g["dsprites_full_n_y1"])


# ---- architectures with hashed weights ----------------------------------------------------------------------------


def hashed(shape: tuple[int, ...], number: int, amplitude: float) -> torch.Tensor:
    h = np.arange(int(np.prod(shape)), dtype=np.uint64) + np.uint64(1000003 * (number + 1))
    h &= np.uint64(0xFFFFFFFF)
    for _ in range(2):
        h = ((h ^ (h >> np.uint64(16))) * np.uint64(0x45D9F3B)) & np.uint64(0xFFFFFFFF)
    h ^= h >> np.uint64(16)
    return torch.from_numpy((amplitude * (2 * h.astype(np.float64) / 2**32 - 1)).reshape(shape))


def fill(module: nn.Module) -> None:
    number = 0
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            with torch.no_grad():
                shape = tuple(layer.weight.shape)
                layer.weight.copy_(hashed(shape, number, float(np.sqrt(6 / np.prod(shape[1:])))))
                layer.bias.copy_(hashed(tuple(layer.bias.shape), number + 1, 0.05))
            number += 2


def architecture_cases() -> list[str]:
    return sorted(k.removesuffix("__nparams") for k in load(PAPER, "architectures") if k.endswith("__nparams"))


@pytest.mark.parametrize("case", architecture_cases())
def test_architectures(case):
    g = load(PAPER, "architectures")
    kind, name, z_dim, channels = re.fullmatch(r"(enc|dec)_(\w+)_z(\d+)_c(\d+)", case).groups()
    net = (ENCODERS if kind == "enc" else DECODERS)[name](int(z_dim), int(channels)).double().eval()
    assert sum(p.numel() for p in net.parameters()) == int(g[f"{case}__nparams"])
    fill(net)
    with torch.no_grad():
        if kind == "enc":
            n, c = len(g[f"{case}__mu"]), (torch.arange(64, dtype=torch.float64) + 0.5) / 64
            image = 0.5 * torch.sin(3 * c)[None, :] * torch.cos(2 * c)[:, None] + 0.5
            x = (
                image
                + 0.1 * torch.arange(int(channels))[None, :, None, None]
                + 0.05 * torch.arange(n)[:, None, None, None]
            )
            for got, key in zip(net(x), ("mu", "logvar"), strict=True):
                close(got, g[f"{case}__{key}"], rtol=1e-6)
        else:
            logits = net(torch.from_numpy(g[f"{case}__z"]))
            stored = g[f"{case}__logits"]
            close(logits[..., :: 64 // stored.shape[2], :: 64 // stored.shape[3]], stored, rtol=1e-6, atol=1e-9)
            close(logits.sum(), g[f"{case}__logits_sum"], rtol=1e-6)


# ---- metrics ------------------------------------------------------------------------------------------------------


def metric_split(g: dict[str, np.ndarray]) -> Split:
    return Split(g["mus_train"].T, g["ys_train"].T, g["mus_test"].T, g["ys_test"].T)


def test_metric_mig():
    g = load(PAPER, "metric_mig")
    binned = dm.discretize(g["mus"].T, int(g["num_bins"]))
    assert np.array_equal(binned.T, g["discretized"])
    information, entropy = dm.mutual_information(binned, g["ys"].T), dm.entropies(g["ys"].T)
    close(information, g["mutual_info"], rtol=1e-9)
    close(entropy, g["entropy"], rtol=1e-9)
    close(np.mean(dm.best_gap(information) / entropy), g["mig"], rtol=1e-9)
    close(dm.modularity_score(information), g["modularity"], rtol=1e-9)


def test_metric_sap():
    g = load(PAPER, "metric_sap")
    matrix = dm.sap_matrix(metric_split(g))
    close(matrix, g["score_matrix"], rtol=0, atol=0.01)
    close(dm.best_gap(matrix).mean(), g["sap"], rtol=0, atol=0.01)
    continuous = squared_correlations(g["mus_train"].T, g["ys_train"].T)
    close(continuous, g["score_matrix_continuous"], rtol=1e-9)
    close(dm.best_gap(continuous).mean(), g["sap_continuous"], rtol=1e-9)


def test_metric_irs():
    g = load(PAPER, "metric_irs")
    codes = g["mus"].T
    active = np.flatnonzero(codes.var(0) > 0)
    assert np.array_equal(active, g["active_rows"])
    binned = dm.discretize(g["ys"].T)
    assert np.array_equal(binned.T, g["ys_discretized"])
    details = dm.irs_details(codes[:, active], binned)
    close(details["irs"], g["irs"], rtol=1e-9)
    close(details["scores"], g["disentanglement_scores"], rtol=1e-9)
    close(details["matrix"], g["irs_matrix"], rtol=1e-9)
    close(details["max_deviations"], g["max_deviations"], rtol=1e-9)
    assert np.array_equal(details["parents"], g["parents"])
    close(dm.irs_details(codes[:, active], binned, 1.0)["irs"], g["irs_quantile1"], rtol=1e-9)


def test_metric_dci():
    g = load(PAPER, "metric_dci")
    importance, train, test = dm.dci_importance(metric_split(g))
    close(importance, g["importance"], rtol=0, atol=0.02)
    close([train, test], [g["informativeness_train"], g["informativeness_test"]], rtol=0, atol=0.02)
    close(dm.disentanglement_of(importance)[0], g["rerun_disentanglement"], rtol=0, atol=0.02)
    close(test, g["rerun_informativeness_test"], rtol=0, atol=0.02)
    for function, key in ((dm.disentanglement_of, "disentanglement"), (dm.completeness_of, "completeness")):
        value, parts = function(g["importance"])
        close(value, g[key], rtol=1e-9)
        close(parts, g[f"{key}_per_{'code' if key == 'disentanglement' else 'factor'}"], rtol=1e-9)
    zero = np.zeros_like(g["importance"])
    close(dm.disentanglement_of(zero)[0], g["zero_disentanglement"], rtol=1e-9, atol=1e-9)
    close(dm.completeness_of(zero)[0], g["zero_completeness"], rtol=1e-9, atol=1e-9)
    example = g["paper_example_B"]
    close(dm.disentanglement_of(example)[0], g["paper_example_alignment"], rtol=1e-8)
    close(dm.completeness_of(example)[0], g["paper_example_completeness"], rtol=1e-8)


def test_metric_factor_vae():
    g = load(PAPER, "metric_factor_vae")
    variance = g["variance_reps"].var(0, ddof=1)
    close(variance, g["global_variance"], rtol=1e-12)
    active = np.sqrt(variance) >= dm.PRUNE_STD
    assert np.array_equal(active, g["active"])
    winner = dm.factor_vae_argmin(g["batches"], variance, active)
    assert np.array_equal(winner, g["argmin"])
    n, shape = int(g["n_train"]), g["votes_train"].shape
    assert len(winner) == n + int(g["n_eval"])
    tables = [dm.count_votes(g["factor_index"][part], winner[part], *shape) for part in (slice(n), slice(n, None))]
    assert np.array_equal(tables[0], g["votes_train"])
    assert np.array_equal(tables[1], g["votes_eval"])
    scores = dm.factor_vae_accuracies(*tables)
    close([scores["train_accuracy"], scores["eval_accuracy"]], [g["train_accuracy"], g["eval_accuracy"]])


def test_metric_beta_vae():
    g = load(PAPER, "metric_beta_vae")
    n = int(g["n_train"])
    assert len(g["points"]) == n + int(g["n_eval"])
    scores = dm.beta_vae_accuracies(g["points"][:n], g["labels"][:n], g["points"][n:], g["labels"][n:])
    close([scores["train_accuracy"], scores["eval_accuracy"]], [g["train_accuracy"], g["eval_accuracy"]], 0, 0.01)


class _FactorTable:
    """A factor set whose 'image' is its own index."""

    def __init__(self, sizes):
        self.factor_sizes = tuple(int(size) for size in sizes)

    def index_of(self, factors):
        return np.ravel_multi_index(tuple(np.asarray(factors).T), self.factor_sizes)

    def images_at(self, index):
        return np.asarray(index)[:, None]


def test_metric_sampling():
    g = load(PAPER, "metric_sampling")
    grid = Grid(_FactorTable(g["factor_sizes"]), lambda images: images.astype(np.float64))
    rng = np.random.RandomState(int(g["seed"]))
    step = int(g["batch_size"])

    def chunks(n):
        return np.concatenate([grid.draw(min(step, n - i), rng) for i in range(0, n, step)])

    train, test = chunks(int(g["num_train"])), chunks(int(g["num_test"]))
    assert np.array_equal(train.T, g["ys_train"])
    assert np.array_equal(test.T, g["ys_test"])
    assert np.array_equal(grid.index_of(np.concatenate([train, test])), g["image_index"])


def test_metric_dci_linear():
    g = load(PAPER, "metric_dci_linear")
    hair = [int(column) for column in g["hair_columns"]]
    one_colour = g["g"][:, hair].sum(1) == 1
    close(celeba_categories(g["z"][one_colour], hair), g["z_cat"], rtol=1e-12)
    close(celeba_categories(g["g"][one_colour], hair), g["g_cat"], rtol=1e-12)
    scores = dci_celeba(g["z"], g["g"], hair)
    for key in ("alignment", "completeness", "explicitness"):
        close(scores[key], g[key], rtol=0, atol=1e-3)
    # liblinear visits coordinates in random order, so coefficients agree to 1e-3 of the largest, not each of its own
    # size
    close(scores["importance"], g["importance"], rtol=0, atol=1e-3 * g["importance"].max())
    close(dm.disentanglement_of(g["importance"])[1], g["alignment_per_latent"], rtol=1e-3, atol=1e-3)
    close(dm.completeness_of(g["importance"])[1], g["completeness_per_factor"], rtol=1e-3, atol=1e-3)
