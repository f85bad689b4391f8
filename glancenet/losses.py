"""The objectives of GlanceNets, concept bottlenecks and the VAE family, and every loss in them: functions of tensors.

B examples, D latents, L supervised concepts (L <= D), C classes. Unless said otherwise a loss is a mean over the batch.
The concept activation is tanh(z/2) = 2 sigmoid(z) - 1 in (-1, 1); concept labels lie in [0, 1].
"""

import math
from dataclasses import dataclass, fields
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from glancenet.options import Config

ANCHOR_WEIGHT = 100.0
MMD_PRIOR_SAMPLES = 1000


class Batch(NamedTuple):
    """x (B, C, 64, 64) in [0, 1]; labels (B, L) in [0, 1]; y (B,); mask (B,) in {0, 1}; codes (B, n) integer labels."""

    x: Tensor
    labels: Tensor
    y: Tensor
    mask: Tensor
    codes: Tensor


@dataclass(frozen=True)
class Weights:
    """Weights and switches of the objectives, named as the flags, which have the defaults; None means off."""

    w_recon: float
    w_kld: float
    label_weight: float
    latent_weight: float
    latent_loss: str
    cluster_dim: int
    max_c: float | None
    iterations_c: float
    w_tc: float
    w_infovae: float
    w_dipvae: float
    lambda_od: float
    lambda_d: float
    w_le: float
    w_aux: float
    loss_terms: tuple[str, ...]

    @classmethod
    def of(cls, o: Config) -> "Weights":
        """The weights that the command line gives."""
        named = {field.name: getattr(o, field.name) for field in fields(cls) if field.name != "lambda_d"}
        named["latent_weight"] = o.label_weight if o.latent_weight is None else o.latent_weight
        named["max_c"] = o.max_c if o.controlled_capacity_increase else None
        return cls(**named | {"lambda_d": o.lambda_d_factor * o.lambda_od, "loss_terms": tuple(o.loss_terms)})

    def capacity(self, step: int | Tensor) -> float | Tensor | None:
        """The controlled capacity after `step` optimiser steps, or None."""
        return None if self.max_c is None else capacity(step, self.max_c, self.iterations_c)


class Terms(NamedTuple):
    """The weighted parts of one objective: scalars. `latent` is 0 when no row is supervised; see `supervised`."""

    recon: Tensor
    kld: Tensor
    prediction: Tensor
    latent: Tensor
    plugins: Tensor
    columns: Tensor  # (L,) unweighted concept errors
    supervised: Tensor  # bool: some row of the batch carries concept labels

    @property
    def total(self) -> Tensor:
        """What is minimised."""
        return self.recon + self.kld + self.prediction + self.latent + self.plugins

    @property
    def true_values(self) -> Tensor:
        """The concept term as it is logged: -1 when no row is supervised."""
        return torch.where(self.supervised, self.latent, torch.full_like(self.latent, -1.0))


# ---- building blocks ------------------------------------------------------------------------------------------------


def reparametrize(mu: Tensor, logvar: Tensor, eps: Tensor | None = None) -> Tensor:
    """z = mu + exp(logvar/2) eps, eps ~ N(0, I) unless given; all (B, D)."""
    eps = torch.randn_like(mu) if eps is None else eps
    return mu + torch.exp(0.5 * logvar) * eps


def reconstruction(logits: Tensor, x: Tensor) -> Tensor:
    """Bernoulli negative log-likelihood in nats: sum over pixels, mean over the batch."""
    return F.binary_cross_entropy_with_logits(logits, x, reduction="sum") / len(x)


def reconstruction_errors(logits: Tensor, x: Tensor) -> Tensor:
    """The same for every image: (B,)."""
    return F.binary_cross_entropy_with_logits(logits, x, reduction="none").flatten(1).sum(1)


def kl_divergence(mu: Tensor, logvar: Tensor, target: Tensor | None = None) -> Tensor:
    """KL(N(mu, e^logvar) || N(target, I)), target 0 unless given (B, D): sum over D, mean over B."""
    mean = mu if target is None else mu - target
    return -0.5 * (1 + logvar - mean.square() - logvar.exp()).sum(1).mean()


def prior_target(class_means: Tensor, cluster_dim: int) -> Tensor:
    """Prior means (B, D) whose first `cluster_dim` columns depend on the class (0: all) and whose others are 0."""
    if cluster_dim == 0:
        return class_means
    keep = torch.arange(class_means.shape[1], device=class_means.device) < cluster_dim
    return torch.where(keep, class_means, torch.zeros_like(class_means))


def capacity(step: int | Tensor, max_c: float, iterations_c: float) -> float | Tensor:
    """Capacity C_t in nats after `step` optimiser steps: a line from 0 to max_c (Burgess et al. 2018)."""
    line = max_c * step / iterations_c
    return line.clamp(max=max_c) if isinstance(line, Tensor) else min(max_c, line)


def kl_term(kl: Tensor, w_kld: float, capacity_now: float | Tensor | None = None) -> Tensor:
    """w_kld KL, or w_kld |KL - C_t| with a controlled capacity."""
    return w_kld * (kl if capacity_now is None else (kl - capacity_now).abs())


# ---- concepts and classes -------------------------------------------------------------------------------------------


def concept_errors(z: Tensor, labels: Tensor, kind: str) -> Tensor:
    """Elementwise concept loss (B, L) of raw latents z against labels in [0, 1].

    MSE: (tanh(z/2) - (2 label - 1))^2; BCE: cross-entropy of sigmoid(z).
    """
    if kind == "MSE":
        return (torch.tanh(z / 2) - (2 * labels - 1)).square()
    if kind == "BCE":
        return F.binary_cross_entropy_with_logits(z, labels, reduction="none")
    raise ValueError(f"latent loss {kind!r}: expected 'MSE' or 'BCE'")


def masked_mean(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of (B, L) over the rows with mask = 1 and all columns; 0 when no row is selected. No synchronisation."""
    mask = mask.to(values.dtype)
    return (values * mask[:, None]).sum() / (mask.sum() * values.shape[1]).clamp(min=1)


def masked_column_means(values: Tensor, mask: Tensor) -> Tensor:
    """Mean of every column of (B, L) over the rows with mask = 1: (L,); 0 when no row is selected."""
    mask = mask.to(values.dtype)
    return (values * mask[:, None]).sum(0) / mask.sum().clamp(min=1)


class ConceptLoss(NamedTuple):
    """`total` is 0 when no row is supervised (`any` False); `columns` (L,) is unweighted."""

    total: Tensor
    columns: Tensor
    any: Tensor


def concept_loss(
    z: Tensor, labels: Tensor, mask: Tensor, kind: str, class_means: Tensor | None = None, cluster_dim: int = 0
) -> ConceptLoss:
    """Concept loss of the supervised rows, plus 100 times the anchor of the class means when those are given.

    z (B, D) raw latents, labels (B, L), mask (B,), class_means (B, D) = mu_y of every row. The anchor applies the same
    loss to the first k' = min(cluster_dim or D, L) columns of the class means, so that the prior's prototypes sit on
    the concepts of their class.
    """
    n = labels.shape[1]
    errors = concept_errors(z[:, :n], labels, kind)
    total = masked_mean(errors, mask)
    if class_means is not None:
        k = min(cluster_dim or class_means.shape[1], n)
        total = total + ANCHOR_WEIGHT * masked_mean(concept_errors(class_means[:, :k], labels[:, :k], kind), mask)
    return ConceptLoss(total, masked_column_means(errors, mask).detach(), (mask > 0).any())


# ---- objectives -----------------------------------------------------------------------------------------------------


def vae_terms(
    w: Weights, x: Tensor, logits: Tensor, mu: Tensor, logvar: Tensor, step: int | Tensor,
    class_means: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """(reconstruction, KL) of a VAE, weighted; the prior mean of each row is class_means (B, D) where given."""
    target = None if class_means is None else prior_target(class_means, w.cluster_dim)
    kl = kl_divergence(mu, logvar, target)
    return w.w_recon * reconstruction(logits, x), kl_term(kl, w.w_kld, w.capacity(step))


def glancenet_terms(
    w: Weights, batch: Batch, logits: Tensor, mu: Tensor, logvar: Tensor, z: Tensor, class_logits: Tensor,
    class_means: Tensor | None, step: int | Tensor,
) -> Terms:  # fmt: skip
    """GlanceNet's objective (paper, eq. 3): reconstruction + KL to the class's prior + classes + concepts.

    class_means (B, D) = mu_y of every row, or None for the standard normal prior (then there is no anchor either).
    """
    recon, kld = vae_terms(w, batch.x, logits, mu, logvar, step, class_means)
    prediction = w.label_weight * F.cross_entropy(class_logits, batch.y)
    concepts = concept_loss(z, batch.labels, batch.mask, w.latent_loss, class_means, w.cluster_dim)
    latent = w.latent_weight * concepts.total
    return Terms(recon, kld, prediction, latent, torch.zeros_like(recon), concepts.columns, concepts.any)


def cbnm_terms(w: Weights, batch: Batch, mu: Tensor, class_logits: Tensor) -> Terms:
    """The joint concept bottleneck: classes + concepts, of the encoder's mean."""
    prediction = w.label_weight * F.cross_entropy(class_logits, batch.y)
    concepts = concept_loss(mu, batch.labels, batch.mask, w.latent_loss)
    zero = torch.zeros_like(prediction)
    return Terms(zero, zero, prediction, w.latent_weight * concepts.total, zero, concepts.columns, concepts.any)


def soft_accuracy(probabilities: Tensor, y: Tensor) -> Tensor:
    """The published 'accuracy': mean over examples and classes of the probability given to the right yes/no answer.

    Kept for comparison with published logs only: a uniform guess among C classes scores 1/C^2 + (1 - 1/C)^2.
    """
    truth = F.one_hot(y, probabilities.shape[1]).to(probabilities.dtype)
    return (truth * probabilities + (1 - truth) * (1 - probabilities)).mean()


# ---- several integer labels at once (CVAE, IFCVAE) ------------------------------------------------------------------


def one_hot_labels(codes: Tensor, sizes: list[int]) -> Tensor:
    """Integer labels (B, n) -> concatenated one-hot columns (B, sum sizes)."""
    # F.one_hot reads the largest code on the host
    parts = [codes[:, i, None] == torch.arange(size, device=codes.device) for i, size in enumerate(sizes)]
    return torch.cat(parts, dim=1).to(torch.get_default_dtype())


def multi_label_cross_entropy(logits: Tensor, codes: Tensor, sizes: list[int]) -> Tensor:
    """Sum over the label groups of the mean cross-entropy; logits (B, sum sizes), codes (B, n)."""
    groups = logits.split(sizes, dim=1)
    return torch.stack([F.cross_entropy(group, codes[:, i]) for i, group in enumerate(groups)]).sum()


def multi_label_softmax(logits: Tensor, sizes: list[int]) -> Tensor:
    """Softmax within every label group: (B, sum sizes)."""
    return torch.cat([group.softmax(1) for group in logits.split(sizes, dim=1)], dim=1)


# ---- total correlation (beta-TCVAE, Chen et al. 2018) ---------------------------------------------------------------


def pairwise_log_density(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """log N(z_j,d; mu_i,d, e^logvar_i,d) as (B_j, B_i, D)."""
    z, mu, logvar = z[:, None], mu[None], logvar[None]
    return -0.5 * (math.log(2 * math.pi) + logvar + (z - mu).square() * torch.exp(-logvar))


def total_correlation(z: Tensor, mu: Tensor, logvar: Tensor) -> Tensor:
    """Mean_j [logsumexp_i sum_d l_jid - sum_d logsumexp_i l_jid]; the constant (D - 1) log(N B) is left out."""
    density = pairwise_log_density(z, mu, logvar)  # (B, B, D)
    joint = density.sum(2).logsumexp(1)
    marginals = density.logsumexp(1).sum(1)
    return (joint - marginals).mean()


def beta_tc_loss(z: Tensor, mu: Tensor, logvar: Tensor, w_tc: float) -> Tensor:
    """(w_tc - 1) TC: added to a VAE's KL it weighs the total correlation by w_tc."""
    return (w_tc - 1) * total_correlation(z, mu, logvar)


# ---- DIP-VAE (Kumar et al. 2018) ------------------------------------------------------------------------------------


def covariance(mu: Tensor) -> Tensor:
    """Biased (1/B) covariance of (B, D): (D, D)."""
    centred = mu - mu.mean(0)
    return centred.T @ centred / len(mu)


def dip_penalty(cov: Tensor, lambda_od: float, lambda_d: float) -> Tensor:
    """lambda_od sum_{i != j} cov_ij^2 + lambda_d sum_i (cov_ii - 1)^2."""
    diagonal = cov.diagonal()
    off = cov - torch.diag(diagonal)
    return lambda_od * off.square().sum() + lambda_d * (diagonal - 1).square().sum()


def dip_vae_i_loss(mu: Tensor, lambda_od: float, lambda_d: float) -> Tensor:
    """DIP-VAE-I: the penalty of Cov[mu]."""
    return dip_penalty(covariance(mu), lambda_od, lambda_d)


def dip_vae_ii_loss(mu: Tensor, logvar: Tensor, lambda_od: float, lambda_d: float) -> Tensor:
    """DIP-VAE-II: the penalty of Cov[z] = Cov[mu] + E[diag(e^logvar)]."""
    return dip_penalty(covariance(mu) + torch.diag(logvar.exp().mean(0)), lambda_od, lambda_d)


# ---- InfoVAE (Zhao et al. 2019) -------------------------------------------------------------------------------------


def rbf_kernel(a: Tensor, b: Tensor) -> Tensor:
    """exp(-mean_d (a - b)^2 / D): (n, D), (m, D) -> (n, m). D divides twice, as published."""
    dim = a.shape[1]
    return torch.exp(-(a[:, None] - b[None]).square().mean(2) / dim)


def mmd(prior: Tensor, z: Tensor) -> Tensor:
    """Biased squared maximum mean discrepancy between samples of the prior (n, D) and z (B, D)."""
    return rbf_kernel(prior, prior).mean() + rbf_kernel(z, z).mean() - 2 * rbf_kernel(prior, z).mean()


# ---- FactorVAE (Kim & Mnih 2018) ------------------------------------------------------------------------------------


def permute_latents(z: Tensor, permutations: Tensor | None = None) -> Tensor:
    """Every column of z (B, D) permuted by itself: out[b, d] = z[permutations[d, b], d]; random permutations if
    None.
    """
    if permutations is None:
        permutations = torch.rand(z.shape[1], z.shape[0], device=z.device).argsort(1)
    return z.gather(0, permutations.T)


def factor_vae_tc(logits: Tensor, w_tc: float) -> Tensor:
    """w_tc mean(D_0 - D_1): density-ratio estimate of TC from discriminator logits (B, 2), class 0 = joint."""
    return w_tc * (logits[:, 0] - logits[:, 1]).mean()


def factor_vae_discriminator_loss(logits_joint: Tensor, logits_permuted: Tensor) -> Tensor:
    """Half the cross-entropy of joint samples (class 0) plus that of permuted samples (class 1)."""
    zeros = torch.zeros(len(logits_joint), dtype=torch.long, device=logits_joint.device)
    ones = torch.ones(len(logits_permuted), dtype=torch.long, device=logits_permuted.device)
    return 0.5 * (F.cross_entropy(logits_joint, zeros) + F.cross_entropy(logits_permuted, ones))
