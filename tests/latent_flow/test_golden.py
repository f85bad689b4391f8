"""Every file of the golden folder against this implementation, in float64. Sizes and names come from the files."""

import re

import numpy as np
import pytest
import torch
from golden_cases import check_complete, load
from torch import Tensor, nn

from common.datasets.base import FactorSet
from common.datasets.grids import SHAPES3D_FACTORS
from latent_flow import data, metrics, minimal_example, objective, spikes, transforms
from latent_flow.encoders import (
    CoefficientEncoder,
    ConvVAE,
    ConvVAE2,
    IndexEncoder,
    gumbel_noise,
    gumbel_softmax,
    relaxed_bernoulli,
    reparameterize,
    temperature,
)
from latent_flow.fields import DiffusionPrior, DivergenceFree, Flows, Potential, PotentialMLP, Rotation, RotationMLP
from latent_flow.fields import sinusoidal_embedding as embed
from latent_flow.model import Config, LatentFlow, Noise, training_step
from latent_flow.objective import Coefficients
from latent_flow.rollout import constant_coefficients, log_abs_det, log_abs_det_ref, rollout, row_sums
from latent_flow.traverse_latent_space_vae import traverse

PAPER = "latent_flow"
TRAIN_STEPS = [
    "supervised",
    "falcor",
    "weakly",
    "unsuper_single_stage1",
    "unsuper_single_stage2",
    "unsuper_double_stage1",
    "unsuper_double_stage2",
]
FILES = {
    "sinusoidal_embedding",
    "potential_mlp",
    "hj_loss",
    "hjpde2_loss",
    "divfree_field",
    "diffusion_prior",
    "latent_rollout",
    "gumbel",
    "spike_slab",
    "conv_vae_small",
    "conv_vae2_small",
    "index_encoder_weak_small",
    "index_encoder_unsuper_single_small",
    "index_encoder_unsuper_double_small",
    "mnist_transforms",
    "dataset_indexing",
    "eval_metrics",
    "traversal",
    "minimal_example_step",
    *(f"train_step_{name}" for name in TRAIN_STEPS),
}


def tensors(name):
    """All arrays of a file as float64 (or integer) tensors."""
    return {
        key: torch.from_numpy(np.array(value)).to(torch.float64) if value.dtype.kind == "f" else torch.from_numpy(value)
        for key, value in load(PAPER, name).items()
    }


def state(case, prefix):
    """The entries below `prefix`, without it."""
    return {key[len(prefix) :]: value for key, value in case.items() if key.startswith(prefix)}


def loaded(module: nn.Module, weights) -> nn.Module:
    module = module.double()
    module.load_state_dict(weights)
    return module


def count_of(weights, group="MLP_SET"):
    return 1 + max(int(key.split(".")[1]) for key in weights if key.startswith(group))


def close(actual, expected, tolerance=1e-10):
    actual = actual if torch.is_tensor(actual) else torch.as_tensor(actual)
    assert torch.isfinite(actual).all()
    torch.testing.assert_close(
        actual.detach().double(), expected.double().reshape(actual.shape), rtol=tolerance, atol=tolerance
    )


def times_of(case):
    """The step numbers t of the keys `t<t>.`"""
    return sorted({int(match[1]) for key in case if (match := re.match(r"t(\d+)\.", key))})


def flows_of(case, rotation=None):
    weights = state(case, "w.")
    return loaded(Flows(count_of(weights), case["z"].shape[-1], rotation), weights)


def test_folder_is_complete():
    check_complete(PAPER, {f"{name}.npz" for name in FILES})


def test_sinusoidal_embedding():
    case = tensors("sinusoidal_embedding")
    for key, value in case.items():
        if key.startswith("emb_D"):
            close(embed(case["time"], int(key[5:])), value, 1e-12)


def test_potential_mlp():
    case = tensors("potential_mlp")
    z = case["z"]
    net = loaded(PotentialMLP(z.shape[1]), state(case, "w."))
    potential = Potential([net], case["t_values"])
    for i in range(len(case["t_values"])):
        at = potential.at(z, i)
        close(at.u[0], case[f"t{i}.u"])
        close(at.grad[0], case[f"t{i}.grad_z"])
        hessian = at.hessian()[0]
        close(hessian, case[f"t{i}.hessian"])
        close(hessian.diagonal(dim1=1, dim2=2), case[f"t{i}.hess_diag"])
        close(at.row_sums()[0], case[f"t{i}.hess_rowsum_upstream_uzz"])
        close(at.laplacian()[0], case[f"t{i}.laplacian"])
        close(at.u_t[0], case[f"t{i}.u_t_per_sample"])
        close(at.u_t[0].sum(), case[f"t{i}.u_t_upstream_batch_sum"])
        close(torch.linalg.slogdet(torch.eye(z.shape[1]) + hessian).logabsdet, case[f"t{i}.logabsdet_exact"])
        close(torch.log((1 + at.row_sums()[0]).abs()), case[f"t{i}.upstream_log_abs_1p_uzz"])


def one_hot_path(flows, z, k, step):
    """A one-step path at the time `step` whose coefficients are the one-hot of flow k."""
    coefficients = constant_coefficients(torch.full((len(z),), k), flows.count, 1, z.dtype)
    return flows(torch.arange(step + 1)).at(z, step), coefficients


def test_hj_loss():
    case = tensors("hj_loss")
    z = case["z"]
    flows = flows_of(case)
    for step in times_of(case):
        stacked = flows(torch.arange(step + 1))
        field, start = stacked.at(z, step), stacked.at(z, 0)
        upstream = objective.upstream_hamilton_jacobi(field)
        initial = objective.upstream_initial_condition(start)
        residual = objective.hamilton_jacobi_residual(field.potential, field.force)
        for k in range(flows.count):
            key = f"t{step}.k{k}."
            close(upstream[k], case[key + "pde_loss_upstream"])
            close(field.potential.u[k], case[key + "u"])
            close(field.potential.grad[k], case[key + "u_z"])
            close(field.potential.row_sums()[k], case[key + "u_zz_rowsum"])
            close(field.force[k], case[key + "force"])
            close(residual[k], case[key + "residual_correct"])
            close((residual[k] ** 2).mean(), case[key + "pde_loss_correct"])
            close(upstream[k] + (initial[k] if step == 1 else 0), case[key + "forward_loss_upstream"])
        for kind in ("soft", "hard"):
            key = f"t{step}.index_forward_{kind}."
            y = case[f"index_pred_{kind}"]
            loss = (y.mean(0) * upstream).sum()
            if step == 1:  # the published initial condition counts the last flow only
                loss = loss + y.mean(0)[-1] * initial[-1]
            close(loss, case[key + "loss_upstream"])
            close((y.T * field.potential.u).sum(0), case[key + "u"])
            close(field.velocity(y, None), case[key + "u_z"])
            close(row_sums(field, y), case[key + "u_zz_rowsum"])
    start = flows(torch.arange(1)).at(z, 0)
    for k in range(flows.count):
        close(objective.upstream_initial_condition(start)[k], case[f"k{k}.ic_loss_upstream"])
        summed = (start.potential.grad[k] ** 2).sum(-1).mean() + (start.force[k] ** 2).mean()
        close(summed, case[f"k{k}.ic_loss_sum_over_dims"])


def test_hjpde2_loss():
    case = tensors("hjpde2_loss")
    z = case["z"]
    flows = flows_of(case, "soft")
    for step in times_of(case):
        stacked = flows(torch.arange(step + 1))
        field, start = stacked.at(z, step), stacked.at(z, 0)
        upstream, initial = objective.upstream_hamilton_jacobi(field), objective.upstream_initial_condition(start)
        residual = objective.hamilton_jacobi_residual(field.potential, None)
        divergence = field.rotation.divergence()
        for k in range(flows.count):
            key = f"t{step}.k{k}."
            close(upstream[k], case[key + "loss_upstream"])
            close(field.potential.u[k], case[key + "u"])
            close(field.potential.grad[k], case[key + "u_z"])
            close(field.potential.row_sums()[k], case[key + "u_zz_rowsum"])
            close((residual[k] ** 2 + divergence[k] ** 2).mean(), case[key + "loss_correct"])
            close(upstream[k] + (initial[k] if step == 1 else 0), case[key + "forward_loss_upstream"])
            close(field.potential.grad[k] + field.rotation.field[k], case[key + "forward_velocity"])
        for kind, c2 in (("double", case["y2"]), ("single", case["y1"])):
            key, c1 = f"t{step}.{kind}.", case["y1"]
            loss = (c1.mean(0) * upstream).sum() + (c1.mean(0)[-1] * initial[-1] if step == 1 else 0)
            close(loss, case[key + "loss_upstream"])
            close(field.velocity(c1, c2), case[key + "velocity"])
            close((c1.T * field.potential.u).sum(0), case[key + "u"])
            close(row_sums(field, c1), case[key + "u_zz_rowsum"])
            if key + "jacobian" in case:
                close(field.jacobian(c1, c2), case[key + "jacobian"])
                close(log_abs_det(field, c1, c2, "exact"), case[key + "logabsdet_exact"])
                velocity = lambda x, stacked=stacked, step=step, c1=c1, c2=c2: stacked.at(x, step).velocity(c1, c2)  # noqa: E731
                close(log_abs_det_ref(velocity, z), case[key + "logabsdet_exact"])
    rotation = flows(torch.arange(1)).at(z, 0).rotation
    start = objective.upstream_initial_condition(flows(torch.arange(1)).at(z, 0))
    for k in range(flows.count):
        close(rotation.field[k], case[f"k{k}.r_field"])
        close(rotation.jacobian()[k], case[f"k{k}.r_jacobian"])
        close(rotation.divergence()[k], case[f"k{k}.r_divergence"])
        close(start[k], case[f"k{k}.ic_loss_upstream"])


def test_divfree_field():
    case = tensors("divfree_field")
    x = case["x"]
    weights = state(case, "w.")
    net = loaded(RotationMLP(x.shape[1]), weights)
    plain = Rotation([net]).at(x)
    close(plain.field[0], case["F"])
    jacobian = plain.jacobian()[0]
    close(jacobian, case["jac_F"])
    close(plain.divergence()[0], case["div_F"])
    close(jacobian - jacobian.mT, case["A"])
    field = DivergenceFree([net]).at(x)
    close(field.field[0], case["v_divfree"])
    close(field.jacobian()[0], case["jac_v"])
    assert field.jacobian()[0].diagonal(dim1=1, dim2=2).sum(-1).abs().max() < 1e-12


def test_diffusion_prior():
    case = tensors("diffusion_prior")
    weights = state(case, "w.")
    steps = weights["MLP_SET.0.mu"].shape[0]
    prior = loaded(DiffusionPrior(count_of(weights), steps), weights)
    z, y = case["z"], case["index_pred"]
    for step in times_of(case):
        laplacian, gradient = prior.laplacian(step), prior_gradient(prior, z, step)
        for k in range(len(laplacian)):
            key = f"t{step}.k{k}."
            close(-case["rho0"], case[key + "phi"], 1e-12)
            close(laplacian[k], case[key + "lap_phi_per_dim"], 1e-12)
            close(gradient[k], case[key + "nabla_phi"], 1e-12)
            close(case["rho0"] - torch.log((1 + laplacian[k]).abs()), case[key + "rho_next"], 1e-12)
        close(y @ laplacian, case[f"t{step}.index_forward.lap_phi"], 1e-12)
        close(torch.einsum("bk,kbd->bd", y, gradient), case[f"t{step}.index_forward.nabla_phi"], 1e-12)


def test_latent_rollout():
    case = tensors("latent_rollout")
    mean, log_var = case["mean"], case["logvar"]
    weights = state(case, "S.") or state(case, "w.S.")
    prior_weights = state(case, "P.") or state(case, "w.P.")
    flows = loaded(Flows(count_of(weights), mean.shape[1]), weights)
    steps = len(case["z_path"]) - 1
    prior = loaded(DiffusionPrior(flows.count, prior_weights["MLP_SET.0.mu"].shape[0]), prior_weights)
    z0 = reparameterize(mean, log_var, case["eps"])
    close(z0, case["z0"], 1e-9)
    close(objective.normal_log_prob(z0), case["rho0"], 1e-9)
    close(objective.normal_log_prob(z0, mean, log_var), case["rho_t0"], 1e-9)
    close(objective.gaussian_kl(mean, log_var).mean(), case["kl_z0_upstream"], 1e-9)
    close(objective.gaussian_kl(mean, log_var).mean(), case["kl_z0_closed_form"], 1e-9)
    only = [int(case["k"])]
    coefficients = Coefficients(z0.new_ones(steps, len(z0), 1))
    stacked = flows(torch.arange(steps + 1), only)
    path = rollout(stacked, z0, coefficients.c1, log_det="exact")
    close(path.z, case["z_path"], 1e-9)
    rho, rho_t = objective.upstream_densities(path, prior, mean, log_var, coefficients, only)
    close(rho, case["rho_path_upstream"], 1e-9)
    close(rho_t, case["rho_t_path_upstream"], 1e-9)
    close(objective.upstream_path_kl(rho, rho_t), case["kl_upstream"], 1e-9)
    pde = torch.stack([objective.upstream_hamilton_jacobi(field)[0] for field in path.fields])
    start = objective.upstream_initial_condition(stacked.at(z0, 0))[0]
    close(torch.cat([pde[:1] + start, pde[1:]]), case["pde_loss_upstream"], 1e-9)
    close(objective.upstream_pde_loss(path, stacked, coefficients), case["pde_loss_upstream"].sum(), 1e-9)
    close(path.log_det, case["logabsdet_exact"], 1e-9)
    log_q0 = objective.normal_log_prob(z0, mean, log_var).sum(-1)
    log_q = torch.cat([log_q0[None], log_q0 - path.log_det.cumsum(0)])
    close(log_q, case["log_q_path_exact"], 1e-9)


def test_gumbel():
    case = tensors("gumbel")
    weights, uniform = case["grad_out_weights"], case["U"]
    close(gumbel_noise(uniform), case["gumbel_noise"], 1e-9)
    samplers = {
        "softmax": lambda x, tau, hard: gumbel_softmax(x, tau, uniform, hard),
        "sigmoid": lambda x, tau, hard: relaxed_bernoulli(x, tau, uniform, hard, link="gumbel"),
    }
    checked = 0
    for key, expected in case.items():
        if match := re.fullmatch(r"(softmax|sigmoid)_tau([\d.]+)_(soft|hard)", key):
            logits = case["logits"].clone().requires_grad_()
            y = samplers[match[1]](logits, float(match[2]), match[3] == "hard")
            close(y, expected, 1e-9)
            (y * weights).sum().backward()
            torch.testing.assert_close(logits.grad, case[key + "_grad"], rtol=1e-8, atol=1e-10)
            checked += 1
        elif match := re.fullmatch(r"sigmoid_correct_logistic_noise_tau([\d.]+)_soft", key):
            close(relaxed_bernoulli(case["logits"], float(match[1]), uniform), expected, 1e-9)
            checked += 1
    assert checked == sum("_soft" in key or "_hard" in key for key in case if "grad" not in key)
    current = 1.0
    for iteration, expected in zip(case["temp_iters"].tolist(), case["temp_after_call_upstream"].tolist(), strict=True):
        if not np.isnan(expected):
            current = temperature(int(iteration))
            assert abs(current - expected) < 1e-12
        elif iteration > 1:  # between renewals the schedule keeps a value of the hundred before
            assert temperature(int(iteration)) == temperature((int(iteration) - 1) // 100 * 100 + 1)


def test_spike_slab():
    case = tensors("spike_slab")
    for name in ("trainer", "minimal"):
        p_on, stay = float(case[f"{name}.p_on"]), float(case[f"{name}.stay"])
        expected = case[f"{name}.upstream_expected_fraction"]
        ours = spikes.expected_fraction_upstream(len(expected), p_on, stay)
        close(torch.from_numpy(ours), expected, 1e-6)
        close(torch.tensor(ours.mean()), case[f"{name}.upstream_target_mean"], 1e-6)
        exact = case[f"{name}.exact_expected_fraction"]
        close(torch.from_numpy(spikes.expected_fraction(case["y_set"].shape[1], len(exact), p_on, stay)), exact, 1e-9)
        kl = spikes.bernoulli_kl_halved(
            float(case[f"{name}.upstream_target_mean"]), case[f"{name}.spike_prob_upstream"].double()
        )
        close(kl, case[f"{name}.spike_kl_upstream"], 1e-9)
        close(kl, case[f"{name}.spike_kl_by_hand"], 1e-9)
    y = case["y_set"]
    close((y != 0).double().mean(), case["trainer.spike_prob_upstream"], 1e-9)
    close(y.abs().mean(), case["minimal.spike_prob_upstream"], 1e-9)
    for (n, k), expected in zip(case["binom_nk"].tolist(), case["binom_upstream"].tolist(), strict=True):
        assert abs(spikes.binomial(n, k) - expected) < 1e-6
    target = float(case["exact_target"])
    fractions = case["trainer.exact_expected_fraction"]
    assert abs(float(fractions.mean()) - target) < 1e-9
    aggregate = 2 * spikes.bernoulli_kl_halved(target, y.mean())
    close(aggregate, case["spike_kl_correct_aggregate_target_vs_q"], 1e-9)
    close(bernoulli_kl(y, target).mean(), case["spike_kl_correct_q_vs_target_per_unit_mean"], 1e-9)
    g = case["g_set"].reshape(int(case["g_T"]), int(case["g_B"]), -1)
    mean, scale = spikes.slab_statistics(g)
    close(mean, case["slab_mean"], 1e-9)
    close(scale, case["slab_scale_b"], 1e-9)
    close(spikes.laplace_kl(mean, scale), case["slab_kl_closed_form_per_unit"], 1e-9)
    close(objective.slab_loss(g), case["slab_kl_upstream"], 1e-9)
    close(spikes.laplace_kl(case["lap_mu"], case["lap_b"]), case["lap_kl"], 1e-9)


@pytest.mark.parametrize(("name", "model"), [("conv_vae_small", ConvVAE), ("conv_vae2_small", ConvVAE2)])
def test_conv_vae(name, model):
    case = tensors(name)
    sizes = (int(case[key]) for key in ("num_channel", "latent_size", "img_size"))
    vae = loaded(model(*sizes), state(case, "w."))
    recon, mean, log_var, z = vae(case["x"], case["eps"])
    for key, value in (("mean", mean), ("log_var", log_var), ("z", z), ("recon", recon)):
        close(value, case[key])
    if "bce" in case:
        bce = objective.reconstruction(vae.decoder.logits(z), case["x"])
        kl = objective.gaussian_kl(mean, log_var).mean()
        close(bce, case["bce"])
        close(kl, case["kl"])
        close(bce + kl, case["loss_bce_plus_kl"])


def encoder_sizes(case):
    return tuple(int(case[key]) for key in ("n_cin", "s_dim", "n_hw", "latent_size"))


def test_index_encoder_weak():
    case = tensors("index_encoder_weak_small")
    encoder = loaded(IndexEncoder(*encoder_sizes(case)), state(case, "w."))
    logits = encoder(case["x"])
    close(logits, case["logits"])
    tau = temperature(int(case["iter"]))
    assert abs(tau - float(case["temp"])) < 1e-12
    close(gumbel_softmax(logits, tau, case["U"]), case["y_hard"])


@pytest.mark.parametrize("kind", ["single", "double"])
def test_index_encoder_unsupervised(kind):
    case = tensors(f"index_encoder_unsuper_{kind}_small")
    encoder = loaded(CoefficientEncoder(*encoder_sizes(case), single=kind == "single"), state(case, "w."))
    logits = encoder.spike_logits(case["x"])  # (B, H, K)
    tau = temperature(int(case["iter"]))
    assert abs(tau - float(case["temp"])) < 1e-12
    y = relaxed_bernoulli(logits.transpose(0, 1), tau, case["U"], link="gumbel")
    for head in range(logits.shape[1]):
        close(y[head], case[f"y{head + 1}"])
    close(encoder.slab(case["x"]), case["g"])


def train_step_model(name, case):
    frames = case["frames"]
    latent = case["w.G.encoder.linear_means.bias"].shape[0]
    encoder = [case[key].shape[0] for key in case if re.fullmatch(r"w\.R\.encoder\.0\.bias", key)]
    config = Config(
        variant={"s": "supervised", "f": "supervised", "w": "weakly", "u": "unsupervised"}[name[0]],
        flows=count_of(state(case, "w.S.")),
        steps=int(case["frames_used"]) - 1 if "frames_used" in case else int(case["T"]),
        channels=frames.shape[2],
        image_size=frames.shape[-1],
        latent_size=latent,
        index_width=encoder[0] if encoder else 0,
        deep=name == "falcor",
        single_control="single" in name,
        objective="upstream",
        slab_start=1 if name.endswith("stage2") else 10**9,
    )
    model = LatentFlow(config).double()
    # the prior keeps a parameter for all T of the file, also where fewer frames are used
    model.prior = DiffusionPrior(config.flows, case["w.P.MLP_SET.0.mu"].shape[0]).double()
    parts = {"G": model.vae, "S": model.support_sets, "P": model.prior, "R": model.reconstructor}
    for letter, part in parts.items():
        if part is not None:
            part.load_state_dict(state(case, f"w.{letter}."))
    return model, parts


@pytest.mark.parametrize("name", TRAIN_STEPS)
def test_train_step(name):
    case = tensors(f"train_step_{name}")
    model, parts = train_step_model(name, case)
    frames = case["frames"][: model.config.steps + 1]
    uniform = case.get("U")
    noise = Noise(case["eps"], uniform, float(case["temp"]) if "temp" in case else None)
    losses = training_step(model, frames, int(case["k"]) if "k" in case else None, 1, noise)
    losses["loss_total"].backward()
    loss_tolerance = 1e-7 if name.startswith("unsuper") else 1e-8

    def check(value, key):
        assert abs(value.item() - case[key].item()) < loss_tolerance, (key, value, case[key])

    check(losses["loss_total"], "loss_total")
    check(losses["loss_pde"], "loss_pde")
    vae = losses["loss_recon"] + losses["loss_kl0"]
    if name == "weakly":
        check(vae + losses["loss_index"], "loss_vae_plus_index")
        check(losses["loss_kl_path"], "loss_kl_rho")
    elif name.startswith("unsuper"):
        check(vae, "loss_vae")
        check(losses["loss_kl_path"] + losses["loss_spike"] + losses["loss_slab"], "loss_kl_total")
    else:
        check(vae, "loss_vae")
        check(losses["loss_kl_path"], "loss_kl_rho")

    checked = 0
    for letter, part in parts.items():
        for key, parameter in part.named_parameters() if part is not None else ():
            expected = case.get(f"grad.{letter}.{key}")
            if expected is None:  # not every file stores gradients; the count below catches one left out here
                continue
            if torch.isnan(expected).all():
                assert parameter.grad is None or not parameter.grad.any(), key
            else:
                scale = max(float(expected.abs().max()), 1e-12)
                error = float((parameter.grad - expected).abs().max()) / scale
                assert error < 1e-9, (letter, key, error)
            checked += 1
    assert checked == sum(key.startswith("grad.") for key in case)


def test_mnist_transforms():
    case = tensors("mnist_transforms")
    grey = case["gray_uint8"][:, None].double() / 255
    close(transforms.colour(grey, torch.zeros(len(grey))), case["x_rgb"], 2e-6)
    steps = len(case["scale_set"]) - 1
    for label, name in enumerate(("scale", "rotation", "hue")):
        labels = torch.full((len(grey),), label)
        close(transforms.sequence(grey, labels, steps), case[f"supervised.{name}"], 2e-6)
    entries = torch.arange(steps + 1).double()
    close(1 + transforms.ZOOM_STEP * entries, case["scale_set"])
    close(transforms.TURN_STEP * entries, case["angle_set"])
    close(transforms.HUE_STEP * entries, case["color_set_deg"] - 180)
    close(torch.deg2rad(transforms.HUE_STEP * entries), case["hue_offset_rad"])
    spikes_t = case["unsup.spikes"].double()
    active = spikes_t[:, None].expand(-1, len(grey), -1)
    close(transforms.composed_sequence(grey, active), case["unsup.frames"], 2e-6)
    for t in (5,):
        one, zero = torch.ones(1, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
        zoom, turn = case["scale_set"][t] * one, case["angle_set"][t] * one
        close(warp_matrix(zoom, zero, grey.shape[-1]), case["M_scale_t5"])
        close(warp_matrix(one, turn, grey.shape[-1]), case["M_rot_t5"])
    slab = case["slab_g"]
    zoom, turn, hue = transforms.increments(torch.ones(3, dtype=torch.float64), slab)
    close(zoom, case["slab.scale_factor"])
    close(turn, case["slab.angle_deg"])
    close(torch.deg2rad(hue), case["slab.hue_intended_rad"])
    x = case["x_rgb"]
    for k, key in enumerate(("scale", "rotation", "hue_intended")):
        active = torch.zeros(1, len(grey), 3).double()
        active[..., k] = 1
        frames = transforms.composed_sequence(grey, active, slab.expand(1, len(grey), 3))
        close(frames[1], case[f"slab.frame_{key}"], 2e-6)
    close(transforms.shift_hue_ref(x, case["slab.hue_upstream_BUG_radians"]), case["slab.frame_hue_upstream_BUG"], 2e-6)
    close(transforms.shift_hue_ref(x, case["slab.hue_intended_rad"]), case["slab.frame_hue_intended"], 2e-6)


def test_dataset_indexing():
    case = {key: value.numpy() for key, value in tensors("dataset_indexing").items()}
    tables = {"falor": (data.FALCOR3D_FACTORS, "falcor3d"), "isaac": (data.ISAAC3D_FACTORS, "isaac3d")}
    for prefix, (factors, name) in tables.items():
        source = FactorSet(name, "train", factors, (3, 128, 128))
        assert tuple(case[f"{prefix}.factor_sizes"]) == source.factor_sizes
        bases = case[f"{prefix}.factor_bases"]
        assert [int(np.prod(source.factor_sizes[i + 1 :])) for i in range(len(bases))] == bases.tolist()
        vectors = source.factors_of(case[f"{prefix}.idx"])
        np.testing.assert_array_equal(vectors, case[f"{prefix}.idx_factors"])
        sequences = data.FactorSequences(source, data.SWEPT[name], 1)
        for k in range(len(data.SWEPT[name])):
            correct = case[f"{prefix}.seq_correct.f{k}"]
            ours = [source.index_of(sequences.sweep(one, k, correct.shape[1] - 1)) for one in vectors]
            np.testing.assert_array_equal(np.stack(ours), correct)
            # the published sweeps: pure only where no other factor moves
            published = case[f"{prefix}.seq_upstream.f{k}"]
            moved = source.factors_of(published.ravel()).reshape(*published.shape, -1)
            others = np.delete(moved, sequences.columns[k], axis=2)
            pure = (others == others[:, :1]).all((1, 2))
            np.testing.assert_array_equal(pure, case[f"{prefix}.upstream_pure.f{k}"])
    source = FactorSet("shapes3d", "train", SHAPES3D_FACTORS, (3, 64, 64))
    vectors = case["shapes3d.factors"].T
    np.testing.assert_array_equal(source.index_of(vectors), case["shapes3d.index"])
    sequences = data.FactorSequences(source, data.SWEPT["shapes3d"], 1)
    for k in range(len(data.SWEPT["shapes3d"])):
        expected = case[f"shapes3d.seq.k{k}"]
        ours = [source.index_of(sequences.sweep(one, k, len(expected) - 1)) for one in vectors]
        np.testing.assert_array_equal(np.stack(ours).T, expected)


def bernoulli_kl(q: Tensor, prior: float) -> Tensor:
    """KL(Bernoulli(q) || Bernoulli(prior)) elementwise, finite at q = 0 and q = 1."""
    return torch.special.xlogy(q, q / prior) + torch.special.xlogy(1 - q, (1 - q) / (1 - prior))


def upstream_log_likelihood(x: Tensor, recon: Tensor, z: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
    """The published `logpx` (B,), "lower is better": its KL part has the wrong sign, so it is no likelihood."""
    log_p, log_q = objective.normal_log_prob(z).sum(-1), objective.normal_log_prob(z, mean, log_var).sum(-1)
    return -metrics.gaussian_log_prob(x, recon) + log_p - log_q


def negative_elbo(x: Tensor, recon: Tensor, z: Tensor, mean: Tensor, log_var: Tensor) -> Tensor:
    """One-sample -(log N(x; recon, I) + log p(z) - log q(z)) (B,)."""
    log_p, log_q = objective.normal_log_prob(z).sum(-1), objective.normal_log_prob(z, mean, log_var).sum(-1)
    return -(metrics.gaussian_log_prob(x, recon) + log_p - log_q)


@torch.no_grad()
def upstream_transformed(model: LatentFlow, x0: Tensor, frames: Tensor, k: int, eps: Tensor) -> dict:
    """The published numbers of transformation k (supervised, `--objective upstream` models), right or wrong.

    frames (T, B, C, N, N) are x_1..x_T; `eps` (B, D) makes z_0. `transformed`: mean over the steps 1..T-1 of the
    negative log-density with its sign error; `eq_error`: the same steps' L1 sum.
    """
    steps = len(frames) - 1
    mean, log_var = model.vae.encode(x0)
    z = reparameterize(mean, log_var, eps)
    coefficients = Coefficients(z.new_ones(steps, len(z), 1))
    path = rollout(model.stacked(steps, [k]), z, coefficients.c1)
    rho, rho_t = objective.upstream_densities(path, model.prior, mean, log_var, coefficients, [k])
    images = metrics.decode(model, path.z[1:])
    log_x = torch.stack([metrics.gaussian_log_prob(x, image) for x, image in zip(frames, images, strict=False)])
    printed = -log_x + rho[1:].sum(-1) - rho_t[1:].sum(-1)
    errors = metrics.l1(images, frames[:-1]).mean(1)
    return {
        "transformed": printed.mean(),
        "eq_error": errors.sum(),
        "eq_error_per_step": errors,
        "z_final": path.z[-1],
    }


def warp_matrix(zoom: Tensor, degrees: Tensor, size: int, centre: str = "upstream") -> Tensor:
    """Forward affine maps (M, 2, 3) in pixels: zoom (M,) and counter-clockwise rotation (M,) about the centre.

    Pixel centres are the integers 0..size-1. `centre` "upstream" is size/2 (as published, half a pixel off), "exact"
    the image centre (size-1)/2.
    """
    c = size / 2 if centre == "upstream" else (size - 1) / 2
    angle = torch.deg2rad(degrees)
    cos, sin = zoom * torch.cos(angle), zoom * torch.sin(angle)
    linear = torch.stack([torch.stack([cos, sin], -1), torch.stack([-sin, cos], -1)], -2)  # (M, 2, 2)
    at = torch.full((2, 1), c, dtype=zoom.dtype, device=zoom.device)
    return torch.cat([linear, at - linear @ at], dim=-1)


def prior_gradient(prior, z: Tensor, step: int) -> Tensor:
    """grad psi^k (K, B, D) at z (B, D): z at the first step, (z - mu) / (sigma^2 + 1e-5) after it."""
    mu = torch.stack([path.mu[step - 1, 0] for path in prior.MLP_SET])
    if step == 1:
        mu = torch.zeros_like(mu)
    return (z[None] - mu[:, None, None]) * prior.laplacian(step)[:, None, None]


def test_eval_metrics():
    case = tensors("eval_metrics")
    x0, frames = case["x0"], case["xt"]
    weights = state(case, "S.")
    config = Config(
        flows=count_of(weights),
        steps=len(frames),
        channels=x0.shape[1],
        image_size=x0.shape[-1],
        latent_size=case["eps_fwd"].shape[1],
        objective="upstream",
    )
    model = LatentFlow(config).double()
    model.vae.load_state_dict(state(case, "vae."))
    model.support_sets.load_state_dict(weights)
    model.prior.load_state_dict(state(case, "P."))
    recon, mean, log_var, _ = model.vae(x0, case["eps_fwd"])
    other = reparameterize(mean, log_var, case["eps_rs"])
    printed = upstream_log_likelihood(x0, recon, other, mean, log_var)
    close(printed.mean(), case["loglik_upstream_printed"], 1e-9)
    close(negative_elbo(x0, recon, other, mean, log_var).mean(), case["neg_elbo_correct"], 1e-9)
    half = 0.5 * np.log(2 * np.pi) * x0[0].numel()
    close(torch.tensor(half), case["const_half_log_2pi_times_dims"], 1e-9)
    result = upstream_transformed(model, x0, frames, int(case["k"]), case["eps_fwd"])
    close(result["eq_error_per_step"], case["eq_error_per_step"], 1e-9)
    close(result["eq_error"], case["eq_error_upstream"], 1e-9)
    close(result["transformed"], case["transformed_upstream_printed"], 1e-9)
    close(result["z_final"], case["z_final"], 1e-9)


def test_traversal():
    case = tensors("traversal")
    weights = state(case, "S.")
    z, shift_steps = case["z"], int(case["shift_steps"])
    half = shift_steps // 2
    flows = loaded(Flows(count_of(weights), z.shape[1]), weights)(torch.arange(half + 1))
    for k in range(count_of(weights)):
        path = traverse(flows, z, k, shift_steps, float(case["eps"]))
        close(path.codes, case[f"k{k}.codes_decoded"])
        close(path.energy, case[f"k{k}.energy"])
        # the published file lags one step behind: the centre three times, both ends missing
        lagging = [*range(1, half + 1), half, *range(half, 2 * half)]
        close(path.codes[lagging], case[f"k{k}.codes_saved_upstream"])


def test_minimal_example_step():
    case = tensors("minimal_example_step")
    frames, directions = case["frames"], case["latent_vectors"]
    channels, size = frames.shape[2], frames.shape[-1]
    width = case["w.R.encoder.0.bias"].shape[0]
    model = minimal_example.Model(
        loaded(ConvVAE(channels, directions.shape[1], size), state(case, "w.G.")),
        minimal_example.ConstantFields(directions.clone()),
        loaded(minimal_example.SpikeEncoder(2 * channels, width, size, len(directions)), state(case, "w.R.")),
    )
    out = minimal_example.step(model, frames, float(case["temp"]), 0.3, 0.7, case["eps"], case["U"], upstream=True)
    close(out["spikes"], case["y"], 1e-6)
    close(out["z"], case["z_final"], 1e-6)
    close(out["loss_vae"], case["loss_vae"], 1e-6)
    close(out["spikes"].abs().mean(), case["spike_prob"], 1e-6)
    target = spikes.expected_fraction_upstream(int(case["T"]), 0.3, 0.7).mean()
    close(torch.tensor(target), case["spike_target"], 1e-6)
    close(out["loss_spike"], case["loss_spike_kl"], 1e-6)
    close(out["loss_total"], case["loss_total"], 1e-6)
    out["loss_total"].backward()
    for letter, part in (("G", model.vae), ("R", model.encoder)):
        for key, parameter in part.named_parameters():
            expected = case[f"grad.{letter}.{key}"]
            error = float((parameter.grad - expected).abs().max()) / max(float(expected.abs().max()), 1e-12)
            assert error < 1e-6, (key, error)
