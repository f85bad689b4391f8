"""Passes over a split without training: validation, test, fitting and applying the rejection, the metrics."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from glancenet import losses, osr
from glancenet.algorithms import Algorithm
from glancenet.data import ConceptData, Observed, Part
from glancenet.losses import Batch
from glancenet.options import Config

EVAL_BATCH = 256
SAVED_TEST_ROWS = 20_000


@contextmanager
def evaluating(model: Algorithm, seed: int) -> Iterator[None]:
    """Evaluation mode, no gradients, and a random stream of its own: a pass leaves the training's stream as it was."""
    was_training = model.training
    device = next(model.parameters()).device
    devices = [device] if device.type == "cuda" else []
    model.eval()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            yield
    finally:
        model.train(was_training)


class Scores(NamedTuple):
    """Means over the images of a split; `latent` over its supervised rows (all rows in a test)."""

    rec: float
    kld: float
    latent: float
    latent_mu: float
    bce: float
    acc: float  # soft accuracy (published)
    acc_hard: float
    columns: np.ndarray  # (L,) concept errors


class Outputs(NamedTuple):
    """Per image: sampled raw latents (n, D), posterior means (n, D), concepts (n, L), classes (n,), predictions
    (n,).
    """

    z: np.ndarray
    mu: np.ndarray
    concepts: np.ndarray
    y: np.ndarray
    prediction: np.ndarray


def class_scores(model: Algorithm, mu: Tensor, logvar: Tensor, z: Tensor, mc_samples: int) -> tuple[Tensor, Tensor]:
    """(logits, probabilities) (B, C): averaged over `mc_samples` posterior samples; 0: of the mean; 1: of z itself."""
    if mc_samples == 1 or model.sample(mu, logvar) is mu:
        logits = model.classify(z if mc_samples == 1 else mu)
        return logits, logits.softmax(1)
    if mc_samples == 0:
        logits = model.classify(mu)
        return logits, logits.softmax(1)
    noise = torch.randn(mc_samples, *mu.shape, device=mu.device, dtype=mu.dtype)
    logits = model.classify(mu + torch.exp(0.5 * logvar) * noise)  # (S, B, C)
    return logits.mean(0), logits.softmax(2).mean(0)


def evaluate(
    model: Algorithm,
    part: Part,
    step: int,
    device: torch.device,
    mc_samples: int = 1,
    all_rows: bool = False,
    keep: int = 0,
) -> tuple[Scores, Outputs | None]:
    """One pass over a split, every image once. `all_rows` also counts unsupervised rows in the concept errors; `keep`
    returns the outputs of at most so many images (0: none)."""
    w, n_concepts = model.w, part.concepts.shape[1]
    sums: dict[str, Tensor] = {}
    kept: list[tuple[Tensor, ...]] = []
    seen = 0

    def add(name: str, value: Tensor) -> None:
        sums[name] = sums[name] + value if name in sums else value.double()

    for batch in part.batches(EVAL_BATCH, device):
        n = len(batch.x)
        mu, logvar = model.encode(batch)
        z = model.sample(mu, logvar)
        if model.decoder is not None:
            add("rec", n * losses.reconstruction(model.decode(z, batch), batch.x))
            means = model.prior_means() if model.predicts_classes else None
            add("kl", n * losses.kl_divergence(mu, logvar, None if means is None else means[batch.y]))
        if model.supervises_concepts:
            mask = torch.ones_like(batch.mask) if all_rows else batch.mask
            errors = losses.concept_errors(z[:, :n_concepts], batch.labels, w.latent_loss)
            add("columns", (errors * mask[:, None]).sum(0))
            errors_mu = losses.concept_errors(mu[:, :n_concepts], batch.labels, w.latent_loss)
            add("latent_mu", (errors_mu * mask[:, None]).sum() / n_concepts)
            add("supervised", mask.sum())
        prediction = batch.y
        if model.predicts_classes:
            logits, probabilities = class_scores(model, mu, logvar, z, mc_samples)
            prediction = logits.argmax(1)
            add("bce", n * F.cross_entropy(logits, batch.y))
            add("acc", n * losses.soft_accuracy(probabilities, batch.y))
            add("hard", (prediction == batch.y).sum())
        if seen < keep:
            kept.append(tuple(t[: keep - seen].cpu() for t in (z, mu, batch.labels, batch.y, prediction)))
        seen += n
    return _scores(sums, seen, n_concepts, w, step, model), _outputs(kept)


def _scores(sums: dict[str, Tensor], n: int, n_concepts: int, w: Any, step: int, model: Algorithm) -> Scores:
    number = {k: v.cpu().numpy() for k, v in sums.items()}
    supervised = max(1.0, float(number.get("supervised", 0)))
    columns = number.get("columns", np.zeros(n_concepts)) / supervised
    kld = 0.0
    if "kl" in number:
        kld = float(losses.kl_term(torch.tensor(number["kl"] / n), w.w_kld, w.capacity(step)))
    return Scores(
        rec=float(number.get("rec", 0)) / n, kld=kld, latent=float(columns.mean()) if n_concepts else 0.0,
        latent_mu=float(number.get("latent_mu", 0)) / supervised, bce=float(number.get("bce", 0)) / n,
        acc=float(number.get("acc", 0)) / n, acc_hard=float(number.get("hard", 0)) / n, columns=columns,
    )  # fmt: skip


def _outputs(kept: list[tuple[Tensor, ...]]) -> Outputs | None:
    if not kept:
        return None
    return Outputs(*(torch.cat(parts).numpy() for parts in zip(*kept, strict=True)))


# ---- rejection ------------------------------------------------------------------------------------------------------


class Encoded(NamedTuple):
    """Per image: reconstruction error in nats (n,) (0 without a decoder), latents (n, D), classes (n,)."""

    errors: np.ndarray
    z: np.ndarray
    y: np.ndarray


def encode_for_rejection(model: Algorithm, part: Part, device: torch.device, sampled: bool) -> Encoded:
    """What the rejection looks at; latents are posterior means, or samples with `sampled`."""
    rows: list[tuple[Tensor, Tensor, Tensor]] = []
    for batch in part.batches(EVAL_BATCH, device):
        mu, logvar = model.encode(batch)
        z = model.sample(mu, logvar) if sampled else mu
        errors = torch.zeros(len(z), device=device)
        if model.decoder is not None:
            errors = losses.reconstruction_errors(model.decode(z, batch), batch.x)
        rows.append((errors.double().cpu(), z.double().cpu(), batch.y.cpu()))
    return Encoded(*(torch.cat(parts).numpy() for parts in zip(*rows, strict=True)))


def prototypes(model: Algorithm, train: Encoded, n_classes: int) -> np.ndarray:
    """mu_y (C, D) of the conditional prior; without one the mean latent of each training class (zeros for an empty
    one).
    """
    means = model.class_means()
    if means is not None:
        return means.detach().double().cpu().numpy()
    return osr.class_means(train.z, train.y, n_classes)


def fit_rejection(
    model: Algorithm, data: ConceptData, device: torch.device, quantile: float, sampled: bool
) -> tuple[osr.Thresholds, Encoded]:
    """Thresholds from the training images, and those images as the rejection sees them."""
    train = encode_for_rejection(model, data.rejection, device, sampled)
    means = prototypes(model, train, data.n_classes)
    return osr.fit_thresholds(train.errors, train.z, train.y, means, model.z_class, quantile), train


def accepted(model: Algorithm, seen: Encoded, thresholds: osr.Thresholds) -> np.ndarray:
    """Mask (n,) of accepted images; a model without a decoder is judged by distance alone."""
    checks = osr.accept(seen.errors, seen.z, thresholds)
    return checks.both if model.decoder is not None else checks.latent


# ---- disentanglement metrics --------------------------------------------------------------------------------------


def disentanglement(
    model: Algorithm, data: ConceptData, device: torch.device, o: Config
) -> Iterator[tuple[str, dict[str, float]]]:
    """(name, results) of every metric asked for, one after another, on posterior means of images drawn from the whole
    factor grid (seed 0); of a folder of one's own fitted on training images, measured on test images.
    """
    from common.metrics.disentanglement import Arrays, Grid
    from common.metrics.disentanglement import evaluate as evaluate_metrics

    def represent(images: Tensor) -> Tensor:
        x = torch.as_tensor(images).to(device).to(torch.float32, memory_format=torch.channels_last).div_(255)
        nothing = torch.zeros(len(x), 0, device=device)
        y = torch.zeros(len(x), dtype=torch.long, device=device)
        return model.encode(Batch(x, nothing, y, nothing, y[:, None]))[0]

    observed = isinstance(data.grid, Observed)
    most = (o.metric_train, o.metric_eval)
    points = Arrays(*data.grid.tables(represent, most, o.seed)) if observed else Grid(data.grid, represent)
    for name in o.evaluation_metric:
        settings = {"seed": 0, "jobs": o.metric_jobs, "num_train": o.metric_train, "num_test": o.metric_eval}
        yield name, evaluate_metrics(points, [name], **settings)[name]
