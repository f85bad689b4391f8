"""What a user would see of the method: what each option changes, which weights and noise each stage uses, and every
metric against its definition, computed here step by step with derivatives by autograd.
"""

import functools
import hashlib
import itertools
import math
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from option_table import run_inside

from common.checkpoint import load_state
from latent_flow import (
    metrics,
    sample_vae,
    train,
    train_falcol_isaac,
    train_vae_scratch,
    train_vae_scratch_unsuper,
    train_vae_scratch_weakly,
    vp_score,
)
from latent_flow.data import DigitSequences
from latent_flow.encoders import spike_probability
from latent_flow.model import Config, LatentFlow, Noise, training_step
from latent_flow.objective import Coefficients, normal_log_prob, pde_loss
from latent_flow.options import (
    DeepOptions,
    InferringOptions,
    SparseOptions,
    SupervisedOptions,
    TrainOptions,
    WeakOptions,
    parse,
)
from latent_flow.reference import derivatives_ref, potential_ref, rotation_ref
from latent_flow.rollout import log_abs_det_ref, rollout
from latent_flow.runs import source_of
from latent_flow.transforms import sequence

TINY = ["--smoke", "--latent-size", "4", "--batch-size", "6", "--num-timesteps", "4", "--device", "cpu"]
STEPS = ["--max-iter", "9", "--max-steps", "2"]  # no evaluation: the run is not at its end
SCRIPTS = {
    train_vae_scratch: SupervisedOptions,
    train_vae_scratch_weakly: WeakOptions,
    train_vae_scratch_unsuper: SparseOptions,
    train_falcol_isaac: DeepOptions,
}


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    """Two steps of a script on a tiny model: a digest of weights and losses, and the run's folder; each call once."""

    @functools.cache
    def run(script, *words) -> tuple[str, Path]:
        out = tmp_path_factory.mktemp("tiny") / "run"
        sizes = [word for word in TINY if script is not train_falcol_isaac or word != "--smoke"]
        if script is train_falcol_isaac:
            sizes += ["--dataset", "sprites", "--image-size", "16", "-K", "2", "--log-freq", "1"]
        steps = [] if "--max-steps" in words else STEPS
        script.main([*sizes, *steps, *words, "--out", str(out)])
        state = load_state(out / "checkpoint.pt", "latent_flow")
        digest = hashlib.sha256((out / "metrics.csv").read_bytes())
        for name, value in sorted(state["model"].items()):
            digest.update(name.encode() + value.numpy().tobytes())
        return digest.hexdigest(), out

    return run


MARGINAL = ["--path-kl", "marginal"]
CHANGED = {  # option: (words beside it in both runs, words of the changed run)
    "dataset": ([], ["--dataset", "sprites", "--image-size", "8", "-K", "3"]),
    "image_size": ([], ["--image-size", "12"]),
    "warp_centre": ([], ["--warp-centre", "exact"]),
    "num_support_sets": ([], ["-K", "2"]),
    "num_timesteps": ([], ["--num-timesteps", "6"]),
    "latent_size": ([], ["--latent-size", "6"]),
    "objective": ([], ["--objective", "upstream"]),
    "path_kl": ([], MARGINAL),
    "transition": ([], ["--transition", "linear"]),
    "logdet": (MARGINAL, ["--logdet", "trace"]),
    "logdet_terms": (MARGINAL, ["--logdet-terms", "3"]),
    "diffusion": (MARGINAL, ["--diffusion", "2"]),
    "k_per": ([], ["--k-per", "batch"]),
    "support_set_lr": ([], ["--support-set-lr", "0.01"]),
    "lr_vae": ([], ["--lr-vae", "0.01"]),
    "max_steps": ([], ["--max-steps", "3"]),
    "batch_size": ([], ["--batch-size", "5"]),
    "decode_frames": ([], ["--decode-frames", "2"]),
    "output_bias": ([], ["--output-bias=-3"]),
    "amp": ([], ["--amp"]),
    "log_freq": ([], ["--log-freq", "2"]),
    "seed": ([], ["--seed", "1"]),
    "width": ([], ["--width", "6"]),
    "lr_index": ([], ["--lr-index", "0.01"]),
    "index_weight": ([], ["--index-weight", "3"]),
    "entropy_weight": ([], ["--entropy-weight", "2"]),
    "index_labels": ([], ["--index-labels"]),
    "single_control": ([], ["--single-control"]),
    "field": ([], ["--field", "divfree"]),
    "slab_start": ([], ["--slab-start", "2"]),
    "spike_prior": ([], ["--spike-prior", "0.3,0.6"]),
    "spike_weight": ([], ["--spike-weight", "3"]),
}  # fmt: skip
ELSEWHERE = {
    "data_dir": "which folder is read: test_clips_are_trained_on_and_judged_by_their_later_frames",
    "max_iter": "test_training_writes_its_contract",
    "tf32": "a GPU's arithmetic; no effect on a CPU",
    "deterministic": "which kernels are refused; a CPU's do not vary",
    "cuda_graph": "the same step, in fewer launches: tests/front/test_cuda_graph.py",
    "device": "no other device on a CPU machine; test_dry_run_prints_and_begins_nothing",
    "cuda": "as --device",
    "ckp_freq": "test_checkpoints_by_count_and_by_the_clock",
    "eval_every": "test_an_evaluation_under_way_changes_nothing",
    "eval_images": "test_an_evaluation_under_way_changes_nothing",
    "tensorboard": "test_published_spellings_are_accepted",
    "out": "every test",
    "resume": "test_resume_is_bit_exact",
    "overwrite": "test_overwrite_starts_anew",
    "smoke": "test_published_values",
    "dry_run": "test_dry_run_prints_and_begins_nothing",
    "frame_stride": "test_frames_come_in_the_order_of_their_numbers, and the clips of test_scripts.py",
    "shapes3d": "a name of --dataset: test_published_values",
    "dsprites": "a name of --dataset",
    "isaac": "a name of --dataset",
}
OPTIONS = [
    (script, name)
    for script, model in SCRIPTS.items()
    for name in model.model_fields
    if name not in ELSEWHERE
    and (script is train_vae_scratch or name not in TrainOptions.model_fields)
    and (script is not train_vae_scratch_unsuper or name not in InferringOptions.model_fields or name == "lr_index")
]


def test_every_option_is_in_a_table():
    assert {name for model in SCRIPTS.values() for name in model.model_fields} == CHANGED.keys() | ELSEWHERE.keys()


@pytest.mark.parametrize(("script", "name"), OPTIONS, ids=lambda value: getattr(value, "__name__", value))
def test_every_option_changes_the_training(script, name, outcome):
    beside, words = CHANGED[name]
    assert outcome(script, *beside)[0] != outcome(script, *beside, *words)[0]


def test_the_deep_script_trains_deep_networks(outcome):
    words = ["--decode-frames", "1"]
    assert outcome(train_falcol_isaac)[0] != outcome(train_falcol_isaac, *words)[0]


# ---- what a step trains, and at which rate


def parameters(folder: Path) -> dict[str, torch.Tensor]:
    return load_state(folder / "checkpoint.pt", "latent_flow")["model"]


@pytest.mark.parametrize("part", ["vae.", "support_sets.", "reconstructor."])
def test_each_learning_rate_moves_its_own_part(part, outcome):
    """With the other rates next to nothing, one part moves and the others stand."""
    rates = {"vae.": "--lr-vae", "support_sets.": "--support-set-lr", "reconstructor.": "--lr-index"}
    still = [word for name in rates.values() for word in (name, "1e-12")]
    start = parameters(outcome(train_vae_scratch_weakly, *still)[1])
    moved = parameters(outcome(train_vae_scratch_weakly, *still, rates[part], "1e-2")[1])
    change = {name: (moved[name] - value).abs().max().item() for name, value in start.items()}
    assert all((value > 1e-3) == name.startswith(part) or (value == 0 and name.startswith(part))
               for name, value in change.items())  # fmt: skip
    assert max(value for name, value in change.items() if name.startswith(part)) > 0.01


@pytest.mark.parametrize("variant", ["supervised", "unsupervised"])
def test_amp_is_in_the_networks_alone(variant):
    """bfloat16 rounds what the networks give by a part in 256 at most; flows, losses and gradients are float32."""
    model = tiny(variant, path_kl="marginal", logdet="exact").float()
    frames, labels = torch.rand(3, 6, 3, 8, 8), torch.zeros(6, dtype=torch.long)
    uniform = torch.rand(2, 2, 6, 3)
    kinds = []
    model.vae.decoder.decoder[9].register_forward_hook(lambda layer, given, out: kinds.append(out.dtype))
    totals = []
    for amp in (False, True):
        losses = training_step(model, frames, labels, noise=Noise(torch.ones(6, 4), uniform, 0.5), amp=amp)
        losses["loss_total"].backward()
        assert {value.dtype for name, value in losses.items() if name.startswith("loss")} == {torch.float32}
        assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
        totals.append(losses["loss_total"].item())
    assert kinds == [torch.float32, torch.bfloat16]
    assert totals[0] != totals[1] and abs(totals[1] / totals[0] - 1) < 0.01


def test_output_bias_is_where_the_decoder_starts(outcome):
    folder = outcome(train_vae_scratch, "--output-bias=-3", "--lr-vae", "1e-9")[1]
    bias = parameters(folder)["vae.decoder.decoder.11.bias"]
    torch.testing.assert_close(bias, torch.full((3,), -3.0), rtol=0, atol=1e-6)


def test_checkpoints_by_count_and_by_the_clock(tmp_path, monkeypatch):
    """What a run that dies at iteration 4 leaves behind."""
    real = train.draw_batch

    def dying(source, rows, options, iteration):
        if iteration == 4:
            raise MemoryError("the machine gave up")
        return real(source, rows, options, iteration)

    monkeypatch.setattr(train, "draw_batch", dying)
    for name, words, seconds, left in (("count", ["--ckp-freq", "2"], 600, 2), ("clock", ["--ckp-freq", "none"], 0, 3),
                                       ("early", ["--ckp-freq", "none"], 600, None)):  # fmt: skip
        monkeypatch.setattr(train, "SAVE_SECONDS", seconds)
        with pytest.raises(MemoryError):
            train_vae_scratch.main([*TINY, *words, "--out", str(tmp_path / name)])
        file = tmp_path / name / "checkpoint.pt"
        assert (load_state(file, "latent_flow")["iteration"] if file.exists() else None) == left, name


def test_an_evaluation_under_way_changes_nothing(outcome, tmp_path):
    digest, _ = outcome(train_vae_scratch)
    again, folder = outcome(train_vae_scratch, "--eval-every", "1", "--eval-images", "3")
    assert digest == again and (folder / "eval_1.json").is_file() and (folder / "eval_2.json").is_file()
    assert '"images": 3' in (folder / "eval_1.json").read_text()


def test_overwrite_starts_anew(tmp_path):
    out = ["--out", str(tmp_path / "run")]
    train_vae_scratch.main([*TINY, *STEPS, *out])
    assert run_inside(train_vae_scratch.main, [*TINY, *STEPS, *out]).code == 2
    train_vae_scratch.main([*TINY, *STEPS, *out, "--overwrite"])
    assert pd.read_csv(tmp_path / "run" / "metrics.csv")["iteration"].tolist() == [1, 2]


def test_runs_from_before_sweeps_were_held_out_are_refused_on_resume(outcome, tmp_path):
    from common.checkpoint import save_state

    folder = outcome(train_vae_scratch, *CHANGED["dataset"][1])[1]
    state = load_state(folder / "checkpoint.pt", "latent_flow")
    del state["args"]["decode_frames"]
    (tmp_path / "old").mkdir()
    state.pop("kind", None)
    save_state(tmp_path / "old" / "checkpoint.pt", "latent_flow", **state)
    found = run_inside(
        train_vae_scratch.main, ["--resume", "--out", str(tmp_path / "old"), *CHANGED["dataset"][1], *TINY]
    )
    assert found.code == 2 and "trained on all sequences" in found.err and "start a new run" in found.err


# ---- the data of a step


def digits(words: list[str], script=SupervisedOptions):
    options = parse(script, [*TINY, *words], "")
    return options, source_of(options.config, None, torch.device("cpu"))


def test_every_iteration_draws_transformations_of_its_own():
    options, source = digits([])
    rows = np.arange(6)
    drawn = [train.draw_batch(source, rows, options, i) for i in (1, 2, 3, 1)]
    labels = [tuple(one.tolist()) for _, one in drawn]
    assert len(set(labels)) == 3 and labels[0] == labels[3] and len(set(sum(labels, ()))) == 3
    for frames, one in drawn:
        assert torch.equal(frames, source.labelled(rows, one))  # each with its own label
    other, _ = digits(["--seed", "5"])
    assert tuple(train.draw_batch(source, rows, other, 1)[1].tolist()) != labels[0]
    batch, _ = digits(["--k-per", "batch"])
    frames, label = train.draw_batch(source, rows, batch, 2)
    assert isinstance(label, int) and torch.equal(frames, source.labelled(rows, torch.full((6,), label)))


def test_unsupervised_batches_switch_and_hurry():
    options, source = digits(["--slab-start", "5"], SparseOptions)
    rows = np.arange(6)
    slow, fast = (train.draw_batch(source, rows, options, i)[0] for i in (4, 5))
    assert slow.shape == fast.shape == (3, 6, 3, 8, 8)
    assert (slow[1:] != slow[:-1]).any() and not torch.equal(slow, fast)
    for frames in (slow, fast):  # x_0 is the untouched digit in both stages
        torch.testing.assert_close(frames[0], source.labelled(rows, torch.zeros(6, dtype=torch.long))[0])
    assert torch.equal(slow, train.draw_batch(source, rows, options, 4)[0])


# ---- the loss of the flow, by autograd


def walk(model: LatentFlow, z: torch.Tensor, c1: torch.Tensor, c2: torch.Tensor | None = None) -> list[torch.Tensor]:
    """z_0..z_T with velocities by autograd, flow by flow: c1, c2 (T, B, K)."""
    flows, path = model.support_sets, [z]
    for t in range(1, len(c1) + 1):
        velocity = torch.zeros_like(z)
        for k in range(flows.count):
            with torch.enable_grad():
                grad = derivatives_ref(flows.MLP_SET[k], path[-1].detach(), t)[0].detach()
            velocity = velocity + c1[t - 1, :, k, None] * grad
            if c2 is not None:
                velocity = velocity + c2[t - 1, :, k, None] * rotation_ref(flows.DIV_MLP[k], path[-1]).detach()
        path.append(path[-1] + velocity)
    return path


def tiny(variant: str = "supervised", scale: float = 1.5, **options) -> LatentFlow:
    torch.manual_seed(0)
    config = Config(variant=variant, latent_size=4, index_width=4, image_size=8, steps=2, **options)
    model = LatentFlow(config).double().eval()
    with torch.no_grad():
        for parameter in model.support_sets.parameters():
            parameter.mul_(scale)
    return model


@pytest.mark.parametrize("variant", ["supervised", "unsupervised"])
def test_the_flow_loss_term_by_term(variant):
    """Mean over samples and steps of squared residuals, weighted by the coefficients, and the initial condition."""
    model, batch = tiny(variant), 5
    z, c1, c2 = torch.randn(batch, 4).double(), torch.rand(2, batch, 3).double(), torch.rand(2, batch, 3).double()
    supervised = variant == "supervised"
    stacked = model.stacked(2)
    path = rollout(stacked, z, c1, None if supervised else c2)
    found = pde_loss(path, stacked, Coefficients(c1, None if supervised else c2))
    latents = walk(model, z, c1, None if supervised else c2)
    torch.testing.assert_close(path.z.detach(), torch.stack(latents), rtol=1e-10, atol=1e-12)
    expected, flows = 0.0, model.support_sets
    for t, b, k in itertools.product((1, 2), range(batch), range(3)):
        point = latents[t - 1][b : b + 1].detach()
        grad, _, u_t = derivatives_ref(flows.MLP_SET[k], point, t)
        residual = u_t + 0.5 * (grad**2).sum()
        if supervised:
            residual = residual + potential_ref(flows.FORCE_SET[k], point, torch.tensor([float(t)]).double()) ** 2
        else:
            jacobian = torch.autograd.functional.jacobian(lambda x, k=k: rotation_ref(flows.DIV_MLP[k], x), point[0])
            expected = expected + c2[t - 1, b, k] * jacobian.trace() ** 2 / (2 * batch)
        expected = expected + c1[t - 1, b, k] * residual.squeeze() ** 2 / (2 * batch)
    for b, k in itertools.product(range(batch), range(3)):
        point = z[b : b + 1]
        start = (derivatives_ref(flows.MLP_SET[k], point, 0)[0] ** 2).sum()
        if supervised:
            start = start + potential_ref(flows.FORCE_SET[k], point, torch.zeros(1).double()).squeeze() ** 2
        expected = expected + c1[0, b, k] * start / batch
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=0)


# ---- the metrics against their definitions


@pytest.fixture
def source():
    torch.manual_seed(1)
    source = DigitSequences(torch.randint(0, 256, (9, 1, 8, 8), dtype=torch.uint8), 2)
    source._grey = lambda rows: source.images[torch.as_tensor(rows)].double() / 255  # the models here are in float64
    return source


def constant(label: int, steps: int, batch: int) -> torch.Tensor:
    return torch.nn.functional.one_hot(torch.tensor(label), 3).double().expand(steps, batch, 3)


@torch.no_grad()
def error_of(model: LatentFlow, frames: torch.Tensor, start: torch.Tensor, c1, c2=None) -> torch.Tensor:
    """Sum over pixels of |x_t - dec(z_t)| of each step and image, (T, B)."""
    images = [model.vae.decoder(z) for z in walk(model, start, c1, c2)[1:]]
    return torch.stack([(a - b).abs().sum((1, 2, 3)) for a, b in zip(images, frames[1:], strict=True)])


@pytest.mark.parametrize("steps", [0, 4])
def test_equivariance_error(steps, source):
    model, rows = tiny(), np.arange(9)
    found = metrics.equivariance(model, source, rows, 1, steps=steps, seed=3)
    count = steps or 2
    frames = source.labelled(rows, torch.full((9,), 1), count)
    mean, log_var = (one.detach() for one in model.vae.encode(frames[0]))
    eps = torch.randn(mean.shape, generator=torch.Generator().manual_seed(3)).double()
    starts = {"model": mean, "one_sample": mean + eps * (log_var / 2).exp()}
    for name, start in starts.items():
        errors = error_of(model, frames, start, constant(1, count, 9))
        np.testing.assert_allclose(found[name]["per_step"], errors.mean(1), rtol=1e-6)
        spread = errors.sum(0).std() / 3
        np.testing.assert_allclose(
            [found[name]["mean"], found[name]["stderr"]], [errors.sum(0).mean(), spread], rtol=1e-6
        )
        np.testing.assert_allclose(found[name]["upstream_protocol"], errors[:-1].sum(0).mean(), rtol=1e-6)
    plain = {"black": 0 * frames[0], "identity": frames[0], "unmoved": model.vae.decoder(mean).detach()}
    for name, image in plain.items():
        expected = sum((frame - image).abs().sum((1, 2, 3)).mean() for frame in frames[1:])
        np.testing.assert_allclose(found[name]["mean"], expected, rtol=1e-6)
    assert found["best_trivial"] == min(found["identity"]["mean"], found["black"]["mean"])
    np.testing.assert_allclose(found["ratio_to_identity"], found["model"]["mean"] / found["identity"]["mean"])
    assert found["images"] == 9 and found["steps"] == count


@pytest.mark.parametrize("label", [0, 1, 2])
def test_the_linear_predictor_moves_the_principal_components_exactly(label, source):
    model, rows = tiny(), np.arange(9)
    frames = source.labelled(rows, torch.full((9,), label), 2)
    whole = metrics.LinearPredictor(model, source, rows, label, 2, 8)  # nine images span eight directions
    torch.testing.assert_close(whole(frames[0]), frames[1:], rtol=0, atol=1e-9)
    x = frames[0].flatten(1)
    mean = x.mean(0)
    directions = torch.linalg.svd(x - mean).Vh[:3]
    kept = (mean + (x - mean) @ directions.mT @ directions).view_as(frames[0])
    moved = sequence(kept[:, :1], torch.full((9,), label), 2)[1:].clamp(0, 1)  # red digits: one channel is enough
    three = metrics.LinearPredictor(model, source, rows, label, 2, 3)
    torch.testing.assert_close(three(frames[0]), moved, rtol=0, atol=1e-9)
    found = metrics.equivariance(model, source, rows, label, linear=three)
    error = (moved - frames[1:]).abs().sum((2, 3, 4))
    np.testing.assert_allclose(found["linear"]["per_step"], error.mean(1), rtol=1e-6)


def blind(model: LatentFlow, mean: float = 0.0, log_var: float = 0.0) -> LatentFlow:
    """Posterior N(mean, exp(log_var)) whatever the image, decoded images all one half whatever the code."""
    with torch.no_grad():
        for head, value in ((model.vae.encoder.linear_means, mean), (model.vae.encoder.linear_log_var, log_var)):
            head.weight.zero_()
            head.bias.fill_(value)
        model.vae.decoder.decoder[-2].weight.zero_()
        model.vae.decoder.decoder[-2].bias.zero_()
    return model


def test_bounds_of_a_likelihood_that_is_known(source):
    first = lambda rows: source.labelled(rows, torch.zeros(len(rows), dtype=torch.long), 1)[0]  # noqa: E731
    rows, pixels = np.arange(9), 3 * 64
    exact = {"bernoulli": -pixels * math.log(2),
             "gaussian": normal_log_prob(first(rows), 0.5).sum((1, 2, 3)).mean().item()}  # fmt: skip
    tight = metrics.likelihood(blind(tiny()), first, rows)
    for kind, value in exact.items():
        for bound in ("elbo", "iw_1", "iw_10", "iw_100"):
            np.testing.assert_allclose(tight[f"{kind}_{bound}"], value, rtol=1e-9)
        np.testing.assert_allclose(tight[f"{kind}_elbo_bits_per_dim"], -value / pixels / math.log(2), rtol=1e-9)
    np.testing.assert_allclose(tight["gaussian_maximum"], -pixels / 2 * math.log(2 * math.pi))
    loose = metrics.likelihood(blind(tiny(), 1.5, -1.0), first, rows)
    kl = 4 * 0.5 * (math.exp(-1) + 1.5**2 - 1 + 1)
    np.testing.assert_allclose(loose["kl0"], kl, rtol=1e-9)
    for kind, value in exact.items():
        np.testing.assert_allclose(loose[f"{kind}_elbo"], value - kl, rtol=1e-9)
        assert loose[f"{kind}_elbo"] < loose[f"{kind}_iw_10"] < loose[f"{kind}_iw_100"] < value + 0.5


def test_bounds_of_a_sequence(source):
    """One sample: the reconstruction of all frames, the exact divergence, log-determinants by forward mode."""
    model, rows = tiny(), np.arange(9)
    found = metrics.sequence_bounds(model, source, rows, 2, seed=4)
    frames = source.labelled(rows, torch.full((9,), 2))
    mean, log_var = (one.detach() for one in model.vae.encode(frames[0]))
    eps = torch.randn(mean.shape, generator=torch.Generator().manual_seed(4)).double()
    z = mean + eps * (log_var / 2).exp()
    c = constant(2, 2, 9)
    path, stacked = walk(model, z, c), model.stacked(2)
    log_q = normal_log_prob(z, mean, log_var).sum(-1)
    kl = torch.distributions.kl_divergence(torch.distributions.Normal(mean, (log_var / 2).exp()),
                                           torch.distributions.Normal(0.0, 1.0)).sum(-1)  # fmt: skip
    shared, marginal = -kl, -kl
    with torch.no_grad():
        for t, (point, frame) in enumerate(zip(path, frames, strict=True)):
            p = model.vae.decoder(point)
            log_p = (frame * p.log() + (1 - frame) * (1 - p).log()).sum((1, 2, 3))
            shared, marginal = shared + log_p, marginal + log_p
            if t:
                velocity = lambda x, t=t: stacked.at(x, t).velocity(c[t - 1], None)  # noqa: E731
                log_q = log_q - log_abs_det_ref(velocity, path[t - 1])
                prior = torch.distributions.Normal(0.0, math.sqrt(1 + 2 * t))
                marginal = marginal - (log_q - prior.log_prob(point).sum(-1))
    np.testing.assert_allclose([found["shared"], found["marginal"]], [shared.mean(), marginal.mean()], rtol=1e-7)
    assert found["images"] == 9 and found["frames"] == 3


def test_compositions_use_the_matched_flows(source):
    model, rows, matching = tiny(), np.arange(9), [2, 0, 1]
    found = metrics.composition(model, source, rows, matching)
    assert len(found["switch"]) == 6 and len(found["superpose"]) == 3
    names = source.names
    for a, b in itertools.permutations(range(3), 2):
        frames = source.chosen(rows, torch.tensor([a, b]))
        mean = model.vae.encode(frames[0])[0].detach()
        c = torch.stack([constant(matching[a], 1, 9)[0], constant(matching[b], 1, 9)[0]])
        entry = found["switch"][f"{names[a]}>{names[b]}"]
        np.testing.assert_allclose(entry["model"], error_of(model, frames, mean, c).sum(0).mean(), rtol=1e-6)
        np.testing.assert_allclose(entry["black"], frames[1:].sum((0, 2, 3, 4)).mean(), rtol=1e-6)
        still = (frames[1:] - frames[:1]).abs().sum((0, 2, 3, 4)).mean()
        np.testing.assert_allclose(entry["identity"], still, rtol=1e-6)
        if a < b:
            frames = source.superposed(rows, (a, b), 2)
            both = constant(matching[a], 2, 9) + constant(matching[b], 2, 9)
            entry = found["superpose"][f"{names[a]}+{names[b]}"]
            np.testing.assert_allclose(entry["model"], error_of(model, frames, mean, both).sum(0).mean(), rtol=1e-6)
            assert entry["images"] == 9


def test_diagnostics_of_a_flow(source):
    model, rows = tiny(scale=3.0), np.arange(9)
    found = metrics.diagnostics(model, source, rows, 0)
    frames = source.labelled(rows, torch.zeros(9, dtype=torch.long))
    c, stacked = constant(0, 2, 9), model.stacked(2)
    path = walk(model, model.vae.encode(frames[0])[0].detach(), c)
    log_det, flips, residual = [], [], []
    for t in (1, 2):
        velocity = lambda x, t=t: stacked.at(x, t).velocity(c[t - 1], None)  # noqa: E731
        jacobian = torch.stack([torch.autograd.functional.jacobian(velocity, path[t - 1])[b, :, b] for b in range(9)])
        sign, value = torch.linalg.slogdet(torch.eye(4).double() + jacobian.detach())
        log_det.append(value.mean())
        flips.append((sign < 0).double().mean())
        net, force = model.support_sets.MLP_SET[0], model.support_sets.FORCE_SET[0]
        time = torch.tensor([float(t)]).double()
        for b in range(9):
            point = path[t - 1][b : b + 1]
            grad, _, u_t = derivatives_ref(net, point, t)
            pushed = potential_ref(force, point, time).squeeze() ** 2
            residual.append((u_t + 0.5 * (grad**2).sum() + pushed).detach() ** 2)
    speed = torch.stack([(b - a).norm(dim=-1) for a, b in itertools.pairwise(path)]).mean()
    np.testing.assert_allclose(found["mean_log_abs_det"], np.mean(log_det), rtol=1e-7, atol=1e-9)
    np.testing.assert_allclose(found["share_of_negative_determinants"], np.mean(flips))
    np.testing.assert_allclose(found["hamilton_jacobi_residual"], np.mean(residual), rtol=1e-6)
    np.testing.assert_allclose(found["speed"], speed, rtol=1e-7)
    assert found["curl_norm"] < 1e-12 and found["divergence_of_rotation"] == 0 and found["images"] == 9


@pytest.mark.parametrize("single", [True, False])
@pytest.mark.parametrize("objective", ["paper", "upstream"])
def test_a_spike_is_on_where_it_is_likelier_than_not(objective, single):
    model = tiny("unsupervised", objective=objective, single_control=single)
    half = 0.0 if objective == "paper" else math.log(math.log(2))  # 1 - exp(-e^l) = 1/2
    heads = ["linear_y"] if single else ["linear_y1", "linear_y2"]
    with torch.no_grad():
        for number, head in enumerate(heads):
            layer = getattr(model.reconstructor, head)
            layer.weight.zero_()
            layer.bias.copy_(torch.tensor([half + 0.01, half - 0.01, half + (3 if number == 0 else -3)]))
        model.reconstructor.linear_g.weight.zero_()
        model.reconstructor.linear_g.bias.fill_(math.log(3))  # speed 2 * 3/4
    frames = torch.rand(3, 5, 3, 8, 8).double()
    coefficients, probability = model.infer(frames, slab=False)
    assert (coefficients.c1 == torch.tensor([1.0, 0, 1])).all()
    assert (coefficients.c2 == torch.tensor([1.0, 0, 1 if single else 0])).all()
    assert probability.shape == (2, len(heads), 5, 3)
    expected = spike_probability(torch.tensor(half + 0.01).double(), model.link)
    torch.testing.assert_close(probability[..., 0], expected.expand(2, len(heads), 5))
    fast = model.infer(frames, slab=True)[0]
    torch.testing.assert_close(fast.c1, 1.5 * coefficients.c1)


def test_sparsity_of_a_model_that_says_always_the_same(source):
    """Flow 1 likelier on than not, the others likelier off: recall 1 where it is matched, precision the share of true
    spikes.
    """
    model = tiny("unsupervised")
    with torch.no_grad():
        for layer in (model.reconstructor.linear_y1, model.reconstructor.linear_y2):
            layer.weight.zero_()
            layer.bias.copy_(torch.tensor([-0.4, 0.4, -0.4]))
    found = metrics.sparsity(model, source, np.arange(9), slab=False, seed=2)
    assert found["inferred_active"] == 1 and abs(found["inferred_fraction"] - 1 / 3) < 1e-9 and found["pairs"] == 18
    best = [entry for entry in found["transformations"].values() if entry["flow"] == 1]
    [entry] = best
    k = found["matching"].index(1)
    assert entry["recall"] == 1 and entry["precision"] == found["co_occurrence"][k][1] / 18 < 1
    assert abs(entry["f1"] - 2 * entry["precision"] / (1 + entry["precision"])) < 1e-9
    others = [entry for entry in found["transformations"].values() if entry["flow"] != 1]
    assert all(entry["recall"] == entry["f1"] == 0 for entry in others)
    assert abs(found["f1"] - entry["f1"] / 3) < 1e-9
    assert found["true_active"] == sum(found["co_occurrence"][j][1] for j in range(3)) / 18
    assert abs(found["true_fraction"] - found["true_active"] / 3) < 1e-9
    sigmoid = 1 / (1 + math.exp(-0.4))
    assert abs(found["mean_spike_probability"] - (sigmoid + 2 * (1 - sigmoid)) / 3) < 1e-9
    counts = [found["co_occurrence"][j][1] / 18 for j in range(3)]
    assert abs(found["chance_f1_all_on"] - np.mean([2 * p / (1 + p) for p in counts])) < 1e-9


def test_inferred_index(source):
    """An encoder that always names flow 2: every sequence in that column, accuracy one in three."""
    model = tiny("weakly")
    with torch.no_grad():
        model.reconstructor.linear1.weight.zero_()
        model.reconstructor.linear1.bias.copy_(torch.tensor([0.0, 0.1, 0.2]))
    found = metrics.index_accuracy(model, source, np.arange(9))
    assert found["confusion"] == [[0, 0, 9]] * 3 and found["usage"] == [0, 0, 1] and found["sequences"] == 27
    assert found["accuracy"] == found["chance"] == 1 / 3 and sorted(found["matching"]) == [0, 1, 2]
    coefficients, q = model.infer(source.labelled(np.arange(2), torch.tensor([0, 1])))
    assert (coefficients.c1 == torch.tensor([0.0, 0, 1])).all() and q.sum(-1).allclose(torch.ones(2).double())


# ---- the VP score


def test_the_vp_score_is_tested_on_pairs_that_it_did_not_see():
    """The rule of the shown pairs is the opposite of that of the others: who tests on what was shown scores 1."""
    torch.manual_seed(0)
    pairs, share, seed = torch.zeros(300, 2, 8, 8, dtype=torch.uint8), 0.5, 3
    kind = torch.arange(300) % 2
    pairs[kind == 1] = 255
    shown = np.random.default_rng([seed, 7]).permutation(300)[:150]
    labels = 1 - kind
    labels[shown] = kind[shown]
    assert vp_score.fit_and_test(pairs, labels, share, seed, 2, torch.device("cpu"), epochs=15) == 0
    assert vp_score.fit_and_test(pairs, kind, share, seed, 2, torch.device("cpu"), epochs=15) == 1


def test_pairs_are_first_and_last_images_of_their_flow():
    model = tiny().float()
    images, labels = vp_score.make_pairs(model, 24, torch.Generator().manual_seed(0))
    z = torch.randn(24, 4, generator=torch.Generator().manual_seed(0))
    assert images.shape == (24, 6, 8, 8) and set(labels.tolist()) == {0, 1, 2}
    for b, k in enumerate(labels.tolist()):
        path = walk(model, z[b : b + 1], constant(k, 2, 1).float())
        with torch.no_grad():
            ends = torch.cat([model.vae.decoder(path[0]), model.vae.decoder(path[-1])], 1)[0]
        assert (images[b].int() - (ends * 255).round().int()).abs().max() <= 1


# ---- the stored weights alone


def test_the_same_command_twice_gives_the_same_codes(tmp_path):
    out = tmp_path / "run"
    train_vae_scratch.main([*TINY, *STEPS, "--out", str(out)])
    codes = []
    for pool, seed in (("a", 0), ("b", 0), ("c", 1)):
        words = ["--exp", str(out), "--num-samples", "3", "--pool", pool, "--seed", str(seed), "--device", "cpu"]
        sample_vae.main(words)
        codes.append(sorted(path.name for path in (out / "latent_codes" / pool).iterdir() if path.is_dir()))
    assert codes[0] == codes[1] != codes[2] and len(codes[0]) == 3
