"""The papers' metrics: equivariance error, likelihood bounds, composition, inferred flows, flow diagnostics.

Every function takes a model and a source of sequences, walks over the given rows in batches without gradients, and
returns plain numbers with their counts. Axes: T steps, B samples, K flows, D latent units.
"""

import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor

from latent_flow import objective
from latent_flow.encoders import reparameterize
from latent_flow.model import LatentFlow
from latent_flow.objective import Coefficients
from latent_flow.rollout import constant_coefficients, rollout
from latent_flow.spikes import draw_speed, draw_spikes

BATCH = 125


def batches(rows: np.ndarray, size: int = BATCH) -> Iterator[np.ndarray]:
    """The rows in pieces of `size`, the last one as long as it is."""
    for start in range(0, len(rows), size):
        yield rows[start : start + size]


def one_transformation(model: LatentFlow, source, rows: np.ndarray, label: int, steps: int) -> Tensor:
    """Frames (T+1, B, C, N, N) of one known transformation: table entries, or (unsupervised) composed step by step; of
    clips, the frames themselves.
    """
    if not source.names:
        return source.sequences(rows)
    if model.config.variant == "unsupervised":
        active = torch.zeros(steps, len(rows), len(source.moving))
        active[..., label] = 1
        return source.composed(rows, active)
    return source.labelled(rows, torch.full((len(rows),), label), steps)


def known_transformations(model: LatentFlow, source) -> tuple[str, ...]:
    """Names of the transformations that the source can apply for the model's variant; of clips, the one "frames"."""
    return (source.moving if model.config.variant == "unsupervised" else source.names) or ("frames",)


def coefficients_of(model: LatentFlow, frames: Tensor, label: int, slab: bool) -> Coefficients:
    """The known flow (supervised), or what the model infers from the frames, without noise."""
    if model.config.variant == "supervised":
        labels = torch.full((frames.shape[1],), label, device=frames.device)
        return Coefficients(constant_coefficients(labels, model.config.flows, len(frames) - 1, frames.dtype))
    return model.infer(frames, slab)[0]


def decode(model: LatentFlow, z: Tensor) -> Tensor:
    """Latents (T, B, D) -> pixel means (T, B, C, N, N)."""
    return model.vae.inference(z.flatten(0, 1)).unflatten(0, z.shape[:2])


def l1(a: Tensor, b: Tensor) -> Tensor:
    """Sum over pixels of |a - b|: (T, B, C, N, N) -> (T, B)."""
    return (a - b).abs().flatten(2).sum(-1)


def summary(errors: Tensor) -> dict:
    """Mean and standard error over images of the sum over steps, and the mean a step: errors (T, n)."""
    total = errors.double().sum(0)
    spread = total.std().item() / math.sqrt(len(total)) if len(total) > 1 else 0.0
    return {"mean": total.mean().item(), "stderr": spread, "per_step": errors.double().mean(1).tolist()}


class LinearPredictor:
    """What a linear model with as many numbers an image as the latent predicts of a transformation.

    z is the first `rank` principal components of x_0, and each frame x_t the least-squares linear map of z, both fitted
    to the training images `rows`. Of a transformation that is linear in the image, as zoom, rotation and the colouring
    of a digit, that map is the transformation itself, applied to the components. Pixels are clamped to [0, 1].
    """

    @torch.no_grad()
    def __init__(self, model: LatentFlow, source, rows: np.ndarray, label: int, steps: int, rank: int):
        from sklearn.decomposition import PCA  # here, as it takes a second to import

        def frames_of(part: np.ndarray, steps: int) -> Tensor:
            return one_transformation(model, source, part, label, steps).flatten(2).cpu()

        first = torch.cat([frames_of(part, 1)[0] for part in batches(rows)]).numpy()
        self.pca = PCA(min(rank, *first.shape), svd_solver="randomized", random_state=0).fit(first)
        gram, moment = 0.0, 0.0
        for part in batches(rows):
            frames = frames_of(part, steps)
            z = self.components(frames[0])
            gram, moment = gram + (z.mT @ z).double(), moment + (z.mT @ frames[1:]).double()
        self.maps = (torch.linalg.pinv(gram, hermitian=True) @ moment).to(frames)  # (T, rank + 1, pixels)

    def components(self, x: Tensor) -> Tensor:
        """(B, pixels) -> components and a one (B, rank + 1)."""
        z = torch.from_numpy(self.pca.transform(x.numpy()))
        return torch.cat([z, torch.ones(len(z), 1, dtype=z.dtype)], 1)

    def __call__(self, x: Tensor) -> Tensor:
        """x_0 (B, C, N, N) -> frames 1..T (T, B, C, N, N)."""
        moved = self.components(x.flatten(1).cpu()) @ self.maps
        return moved.clamp(0, 1).unflatten(2, x.shape[1:]).to(x)


@torch.no_grad()
def equivariance(
    model: LatentFlow,
    source,
    rows: np.ndarray,
    label: int,
    *,
    steps: int = 0,
    slab: bool = True,
    seed: int = 0,
    linear: LinearPredictor | None = None,
) -> dict:
    """Equivariance error of one transformation: E sum_t |x_t - dec(z_t)|_1, z_0 the posterior mean.

    Beside it: one posterior sample as start, dec(z_0) unmoved, x_0 unchanged ("identity"), the black image and the
    `linear` predictor, each over frames 1..T and, as published, 1..T-1. `steps` beyond the trained T extrapolates.
    """
    steps = steps or model.config.steps
    generator = torch.Generator().manual_seed(seed)
    collected: dict[str, list[Tensor]] = {}
    for part in batches(rows):
        frames = one_transformation(model, source, part, label, steps)
        coefficients = coefficients_of(model, frames, label, slab)
        flows = model.stacked(steps)
        mean, log_var = model.vae.encode(frames[0])
        eps = torch.randn(mean.shape, generator=generator).to(mean)
        predicted = {}
        for name, start in (("model", mean), ("one_sample", reparameterize(mean, log_var, eps))):
            path = rollout(flows, start, coefficients.c1, coefficients.c2)
            predicted[name] = decode(model, path.z[1:])
        predicted["unmoved"] = decode(model, mean[None]).expand_as(frames[1:])
        predicted["identity"] = frames[:1].expand_as(frames[1:])
        predicted["black"] = torch.zeros_like(frames[1:])
        if linear is not None:
            predicted["linear"] = linear(frames[0])
        for name, images in predicted.items():
            collected.setdefault(name, []).append(l1(images, frames[1:]).cpu())
    errors = {name: torch.cat(parts, dim=1) for name, parts in collected.items()}
    result = {"images": len(rows), "steps": steps}
    for name, values in errors.items():
        result[name] = summary(values)
        result[name]["upstream_protocol"] = summary(values[:-1])["mean"] if steps > 1 else None
    still = result["identity"]["mean"]
    result["ratio_to_identity"] = result["model"]["mean"] / still if still else None  # None: nothing moves
    result["best_trivial"] = min(still, result["black"]["mean"])
    return result


@torch.no_grad()
def active_units(model: LatentFlow, source, rows: np.ndarray) -> dict:
    """How many latent units carry information about x_0 (`objective.active_units`), and of each unit that information,
    the mean variance of its posterior, and its divergence from N(0, 1) in nats.
    """
    parts = [model.vae.encode(one_transformation(model, source, part, 0, 1)[0]) for part in batches(rows)]
    mean, log_var = (torch.cat(list(one)) for one in zip(*parts, strict=True))
    return {
        "active": int(objective.active_units(mean, log_var)),
        "units": mean.shape[1],
        "threshold": objective.ACTIVE,
        "images": len(rows),
        "information": objective.unit_information(mean, log_var).tolist(),
        "posterior_variance": log_var.exp().mean(0).tolist(),
        "kl": (-0.5 * (1 + log_var - mean**2 - log_var.exp())).mean(0).tolist(),
    }


def trivial_baselines(source, rows: np.ndarray, steps: int) -> dict[str, dict[str, float]]:
    """Equivariance errors of the black image and of x_0 for each transformation, over frames 1..T-1 and 1..T."""
    result = {}
    for label, name in enumerate(source.names):
        parts = []
        for part in batches(rows):
            frames = source.labelled(part, torch.full((len(part),), label), steps)
            parts.append(torch.stack([frames[1:].abs().flatten(2).sum(-1), l1(frames[:1], frames[1:])]).cpu())
        black, identity = torch.cat(parts, dim=2).double().mean(2)  # (2, T)
        result[name] = {
            "black_upstream": black[:-1].sum().item(),
            "identity_upstream": identity[:-1].sum().item(),
            "black": black.sum().item(),
            "identity": identity.sum().item(),
        }
    return result


# ---- likelihood -----------------------------------------------------------------------------------------------------


def gaussian_log_prob(x: Tensor, mean: Tensor) -> Tensor:
    """log N(x; mean, I) summed over pixels: (B, ...) -> (B,)."""
    return objective.normal_log_prob(x, mean).flatten(1).sum(-1)


def bernoulli_log_prob(x: Tensor, logits: Tensor) -> Tensor:
    """Minus the binary cross-entropy summed over pixels, (B, ...) -> (B,): the training likelihood of grey values."""
    bce = torch.nn.functional.binary_cross_entropy_with_logits(logits, x, reduction="none")
    return -bce.flatten(1).sum(-1)


@torch.no_grad()
def likelihood(model: LatentFlow, images: Callable[[np.ndarray], Tensor], rows: np.ndarray, *, seed: int = 0) -> dict:
    """Bounds of log p(x_0) in nats and bits a dimension, for the training likelihood (BCE) and for N(., 1).

    `images(rows)` gives x_0 (B, C, N, N). Importance-weighted bounds log 1/S sum_s p(x|z_s) p(z_s) / q(z_s) with
    S = 1, 10, 100 samples of the posterior; S = 1 is the ELBO with a sampled KL, `elbo` the one with the exact KL.
    """
    generator = torch.Generator().manual_seed(seed)
    sums: dict[str, float] = {}
    most = 100
    for part in batches(rows, 25):
        x = images(part)
        mean, log_var = model.vae.encode(x)
        kl = objective.gaussian_kl(mean, log_var)
        weights: dict[str, list[Tensor]] = {"bernoulli": [], "gaussian": []}
        likelihoods: dict[str, list[Tensor]] = {"bernoulli": [], "gaussian": []}
        for start in range(0, most, 20):
            samples = min(20, most - start)
            eps = torch.randn((samples, *mean.shape), generator=generator).to(mean)
            z = reparameterize(mean, log_var, eps).flatten(0, 1)
            logits = model.vae.decoder.logits(z)
            repeated = x.repeat(samples, 1, 1, 1)
            prior = objective.normal_log_prob(z).sum(-1)
            posterior = objective.normal_log_prob(z, mean.repeat(samples, 1), log_var.repeat(samples, 1)).sum(-1)
            for kind, log_p in (
                ("bernoulli", bernoulli_log_prob(repeated, logits)),
                ("gaussian", gaussian_log_prob(repeated, logits.sigmoid())),
            ):
                likelihoods[kind].append(log_p.unflatten(0, (samples, len(x))))
                weights[kind].append((log_p + prior - posterior).unflatten(0, (samples, len(x))))
        for kind in weights:
            log_w, log_p = torch.cat(weights[kind]).double(), torch.cat(likelihoods[kind]).double()
            values = {"elbo": log_p.mean(0) - kl}
            for count in (1, 10, 100):
                values[f"iw_{count}"] = torch.logsumexp(log_w[:count], 0) - math.log(count)
            for name, value in values.items():
                sums[f"{kind}_{name}"] = sums.get(f"{kind}_{name}", 0.0) + value.sum().item()
        sums["kl0"] = sums.get("kl0", 0.0) + kl.double().sum().item()
    pixels = int(np.prod(x.shape[1:]))
    result = {name: value / len(rows) for name, value in sums.items()}
    result |= {
        f"{name}_bits_per_dim": -value / pixels / math.log(2)
        for name, value in result.items()
        if name.startswith(("bernoulli", "gaussian"))
    }
    result |= {"images": len(rows), "seed": seed, "gaussian_maximum": -0.5 * pixels * math.log(2 * math.pi)}
    return result


@torch.no_grad()
def sequence_bounds(
    model: LatentFlow, source, rows: np.ndarray, label: int, *, slab: bool = True, seed: int = 0
) -> dict:
    """Bounds of a whole sequence in nats, training likelihood, one posterior sample.

    shared: sum_t log p(x_t | z_t) - KL(q(z_0) || p(z_0)), transitions shared by prior and posterior. marginal:
    sum_t [log p(x_t | z_t) - KL(q(z_t) || p_t)] with exact log-determinants, p_t the diffused prior.
    """
    generator = torch.Generator().manual_seed(seed)
    steps = model.config.steps
    totals = torch.zeros(2, dtype=torch.float64)
    for part in batches(rows, 25):
        frames = one_transformation(model, source, part, label, steps)
        coefficients = coefficients_of(model, frames, label, slab)
        mean, log_var = model.vae.encode(frames[0])
        z = reparameterize(mean, log_var, torch.randn(mean.shape, generator=generator).to(mean))
        path = rollout(model.stacked(steps), z, coefficients.c1, coefficients.c2, "exact")
        logits = model.vae.decoder.logits(path.z.flatten(0, 1))
        log_p = bernoulli_log_prob(frames.flatten(0, 1), logits).unflatten(0, frames.shape[:2]).sum(0)
        kl0 = objective.gaussian_kl(mean, log_var)
        path_kl = objective.path_kl(path, mean, log_var, model.config.diffusion).sum() * len(part)
        totals[0] += (log_p - kl0).double().sum().cpu()
        totals[1] += ((log_p - kl0).double().sum() - path_kl.double()).cpu()
    shared, marginal = (totals / len(rows)).tolist()
    return {"shared": shared, "marginal": marginal, "images": len(rows), "frames": steps + 1}


# ---- composition of flows -------------------------------------------------------------------------------------------


@torch.no_grad()
def composition(model: LatentFlow, source, rows: np.ndarray, matching: list[int]) -> dict:
    """Switching (flow a for the first half of the steps, then b) and superposition (both at every step).

    The truth is the image transformation composed the same way; `matching[k]` is the flow of transformation k.
    Errors are sums over frames 1..T, beside x_0 unchanged and the black image.
    """
    steps, count = model.config.steps, len(source.names)
    result: dict[str, dict] = {"switch": {}, "superpose": {}}
    for a in range(count):
        for b in range(count):
            if a == b:
                continue
            order = torch.tensor([a] * (steps // 2) + [b] * (steps - steps // 2))
            key = f"{source.names[a]}>{source.names[b]}"
            flow = torch.tensor([matching[a], matching[b]])[(order == b).long()]
            c = torch.nn.functional.one_hot(flow, model.config.flows).float()[:, None]
            result["switch"][key] = _composed_error(model, rows, lambda part, o=order: source.chosen(part, o), c)
            if a < b:
                key = f"{source.names[a]}+{source.names[b]}"
                both = torch.zeros(steps, 1, model.config.flows)
                both[..., [matching[a], matching[b]]] = 1
                truth = lambda part, pair=(a, b): source.superposed(part, pair, steps)  # noqa: E731
                result["superpose"][key] = _composed_error(model, rows, truth, both)
    return result


def _composed_error(model: LatentFlow, rows: np.ndarray, truth: Callable, c: Tensor) -> dict:
    errors: dict[str, list[Tensor]] = {"model": [], "identity": [], "black": []}
    for part in batches(rows):
        frames = truth(part)
        coefficients = c.to(frames).expand(-1, len(part), -1)
        rotating = model.support_sets.rotation is not None
        mean = model.vae.encode(frames[0])[0]
        path = rollout(model.stacked(len(c)), mean, coefficients, coefficients if rotating else None)
        errors["model"].append(l1(decode(model, path.z[1:]), frames[1:]).cpu())
        errors["identity"].append(l1(frames[:1].expand_as(frames[1:]), frames[1:]).cpu())
        errors["black"].append(frames[1:].flatten(2).sum(-1).cpu())
    return {name: summary(torch.cat(parts, dim=1))["mean"] for name, parts in errors.items()} | {"images": len(rows)}


# ---- what the model inferred ----------------------------------------------------------------------------------------


def match(score: np.ndarray) -> list[int]:
    """The flow of each transformation (rows of `score`) that maximises the total score (Hungarian method).

    With fewer flows than transformations the surplus transformations get their best-scoring flow.
    """
    true, flow = linear_sum_assignment(score, maximize=True)
    found = dict(zip(true.tolist(), flow.tolist(), strict=True))
    return [found.get(k, int(score[k].argmax())) for k in range(len(score))]


@torch.no_grad()
def index_accuracy(model: LatentFlow, source, rows: np.ndarray) -> dict:
    """Weakly: confusion of true transformation (rows) and inferred flow (columns), and the matched accuracy."""
    confusion = np.zeros((len(source.names), model.config.flows), int)
    for label in range(len(source.names)):
        for part in batches(rows):
            frames = one_transformation(model, source, part, label, model.config.steps)
            inferred = model.infer(frames)[1].argmax(-1).cpu().numpy()
            confusion[label] += np.bincount(inferred, minlength=model.config.flows)
    matching = match(confusion)
    hits = sum(confusion[k, flow] for k, flow in enumerate(matching))
    return {
        "confusion": confusion.tolist(),
        "matching": matching,
        "accuracy": hits / confusion.sum(),
        "chance": 1 / model.config.flows,
        "usage": (confusion.sum(0) / confusion.sum()).tolist(),
        "sequences": int(confusion.sum()),
    }


@torch.no_grad()
def sparsity(model: LatentFlow, source, rows: np.ndarray, *, slab: bool, seed: int = 0) -> dict:
    """Unsupervised: inferred spikes against the true active transformations of fresh sticky sequences.

    Precision, recall and F1 of each transformation at its matched flow, the mean number of active spikes beside the
    true one, and (`slab`) the correlation of the inferred speed with the true one where both are active. A flow
    of a double-control model counts as active when one of its two spikes is.
    """
    config = model.config
    count = len(known_transformations(model, source))
    generator = torch.Generator().manual_seed(seed)
    truth, speeds, spikes, inferred, probabilities = [], [], [], [], []
    for part in batches(rows):
        active = draw_spikes(config.steps, count, config.p_on, config.p_stay, generator, len(part))
        speed = draw_speed(active.shape, generator) if slab else None
        frames = source.composed(part, active, speed)
        coefficients, probability = model.infer(frames, slab)
        truth.append(active.flatten(0, 1))
        speeds.append((active if speed is None else speed).flatten(0, 1))
        spikes.append((probability > 0.5).any(1).flatten(0, 1).cpu())
        inferred.append(coefficients.c1.flatten(0, 1).cpu())
        probabilities.append(probability.flatten().cpu())
    active, on = torch.cat(truth).numpy() > 0, torch.cat(spikes).numpy()
    both = np.einsum("nk,nj->kj", active.astype(int), on.astype(int))
    f1 = 2 * both / np.maximum(active.sum(0)[:, None] + on.sum(0)[None], 1)
    matching = match(f1)
    names = known_transformations(model, source)
    result = {
        "matching": matching,
        "co_occurrence": both.tolist(),
        "true_active": float(active.sum(1).mean()),
        "inferred_active": float(on.sum(1).mean()),
        "true_fraction": float(active.mean()),
        "inferred_fraction": float(on.mean()),
        "mean_spike_probability": float(torch.cat(probabilities).mean()),
        "pairs": len(active),
        "transformations": {},
    }
    true_speed, speed = torch.cat(speeds).numpy(), torch.cat(inferred).numpy()
    for k, flow in enumerate(matching):
        hits = both[k, flow]
        entry = {
            "flow": flow,
            "precision": float(hits / max(on[:, flow].sum(), 1)),
            "recall": float(hits / max(active[:, k].sum(), 1)),
            "f1": float(f1[k, flow]),
        }
        where = active[:, k] & on[:, flow]
        if slab and where.sum() > 2 and speed[where, flow].std() > 0:
            entry["speed_correlation"] = float(np.corrcoef(true_speed[where, k], speed[where, flow])[0, 1])
        result["transformations"][names[k]] = entry
    result["f1"] = float(np.mean([entry["f1"] for entry in result["transformations"].values()]))
    result["chance_f1_all_on"] = float(np.mean(2 * active.mean(0) / (1 + active.mean(0))))
    return result


# ---- diagnostics ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def diagnostics(model: LatentFlow, source, rows: np.ndarray, label: int, *, slab: bool = True) -> dict:
    """Facts about the flow along held-out paths: speed, exact log-determinant, sign flips, residual, curl."""
    steps = model.config.steps
    frames = one_transformation(model, source, rows, label, steps)
    coefficients = coefficients_of(model, frames, label, slab)
    path = rollout(model.stacked(steps), model.vae.encode(frames[0])[0], coefficients.c1, coefficients.c2)
    totals = dict.fromkeys(("log_det", "flips", "residual", "curl", "divergence"), 0.0)
    for t, field in enumerate(path.fields):
        c1, c2 = coefficients.c1[t], None if coefficients.c2 is None else coefficients.c2[t]
        jacobian = field.jacobian(c1, c2)
        sign, log_det = torch.linalg.slogdet(torch.eye(jacobian.shape[-1]).to(jacobian) + jacobian)
        totals["log_det"] += log_det.mean().item() / steps
        totals["flips"] += (sign <= 0).double().mean().item() / steps
        if field.potential is not None:
            residual = objective.hamilton_jacobi_residual(field.potential, field.force)
            totals["residual"] += (c1.mT * residual**2).sum(0).mean().item() / steps
        totals["curl"] += (jacobian - jacobian.mT).flatten(1).norm(dim=1).mean().item() / steps
        if field.rotation is not None:
            totals["divergence"] += field.rotation.divergence().abs().mean().item() / steps
    speed = (path.z[1:] - path.z[:-1]).norm(dim=-1).mean().item()
    return {
        "speed": speed,
        "mean_log_abs_det": totals["log_det"],
        "share_of_negative_determinants": totals["flips"],
        "hamilton_jacobi_residual": totals["residual"] if model.config.transition == "flow" else None,
        "curl_norm": totals["curl"],
        "divergence_of_rotation": totals["divergence"],
        "images": len(rows),
    }
