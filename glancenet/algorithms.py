"""The algorithms: GlanceNet, the concept bottleneck CBNM, and the VAE family they descend from.

Every algorithm is a module with one method for the loop, `train_step`, and small pure objectives beside it
(`glancenet_terms`, `cbnm_terms`). B examples, D latents, L concepts, C classes; see `losses`.

| --alg                     | what it is                                                                              |
|---------------------------|-----------------------------------------------------------------------------------------|
| GlanceNet, GrayVAE_Join   | beta-VAE with supervised latents, class-conditional prior, linear classes (paper, eq. 3) |
| CBNM, CBM_Join            | the same encoder and classes without decoder, KL and prior (joint concept bottleneck)    |
| VAE, BetaVAE, AE          | no supervision                                                                           |
| CVAE                      | labels enter encoder (as image channels) and decoder                                     |
| IFCVAE                    | labels are predicted, and removed from z by an adversary (information factorisation)     |
"""

import argparse
import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError
from common.launch import Distributed, normalise_over_processes
from glancenet import losses
from glancenet.architectures import DECODERS, DISCRIMINATORS, ENCODERS, LABEL_TILERS, SimpleDiscriminator, find

log = logging.getLogger(__name__)

ALIASES = {"GrayVAE_Join": "GlanceNet", "CBM_Join": "CBNM"}
LOSS_TERMS = ("FACTORVAE", "DIPVAEI", "DIPVAEII", "BetaTCVAE", "INFOVAE")
MMD_PRIOR_SAMPLES = 1000


class Batch(NamedTuple):
    """x (B, C, 64, 64) in [0, 1]; labels (B, L) in [0, 1]; y (B,); mask (B,) in {0, 1}; codes (B, n) integer labels."""

    x: Tensor
    labels: Tensor
    y: Tensor
    mask: Tensor
    codes: Tensor


class Shape(NamedTuple):
    """What an algorithm needs to know of a data set."""

    channels: int
    n_concepts: int
    n_classes: int
    code_sizes: tuple[int, ...]
    n_train: int


@dataclass(frozen=True)
class Weights:
    """Weights and switches of the objectives, named as the flags; None means off."""

    w_recon: float = 1.0
    w_kld: float = 1.0
    label_weight: float = 5.0
    latent_weight: float = 5.0
    latent_loss: str = "MSE"
    cluster_dim: int = 0
    max_c: float | None = None
    iterations_c: float = 10000
    w_tc: float = 1.0
    w_infovae: float = 1.0
    w_dipvae: float = 1.0
    lambda_od: float = 1.0
    lambda_d: float = 10.0
    w_le: float = 1.0
    w_aux: float = 1.0
    loss_terms: tuple[str, ...] = field(default=())

    @classmethod
    def of(cls, o: argparse.Namespace) -> "Weights":
        """The weights that the command line gives."""
        return cls(
            w_recon=o.w_recon, w_kld=o.w_kld, label_weight=o.label_weight,
            latent_weight=o.label_weight if o.latent_weight is None else o.latent_weight,
            latent_loss=o.latent_loss, cluster_dim=o.cluster_dim,
            max_c=o.max_c if o.controlled_capacity_increase else None, iterations_c=o.iterations_c,
            w_tc=o.w_tc, w_infovae=o.w_infovae, w_dipvae=o.w_dipvae,
            lambda_od=o.lambda_od, lambda_d=o.lambda_d_factor * o.lambda_od,
            w_le=o.w_le, w_aux=o.w_aux, loss_terms=tuple(o.loss_terms),
        )  # fmt: skip

    def capacity(self, step: int) -> float | None:
        """The controlled capacity after `step` optimiser steps, or None."""
        return None if self.max_c is None else losses.capacity(step, self.max_c, self.iterations_c)


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


def vae_terms(
    w: Weights, x: Tensor, logits: Tensor, mu: Tensor, logvar: Tensor, step: int, class_means: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(reconstruction, KL) of a VAE, weighted; the prior mean of each row is class_means (B, D) where given."""
    target = None if class_means is None else losses.prior_target(class_means, w.cluster_dim)
    kl = losses.kl_divergence(mu, logvar, target)
    return w.w_recon * losses.reconstruction(logits, x), losses.kl_term(kl, w.w_kld, w.capacity(step))


def glancenet_terms(
    w: Weights, batch: Batch, logits: Tensor, mu: Tensor, logvar: Tensor, z: Tensor, class_logits: Tensor,
    class_means: Tensor | None, step: int,
) -> Terms:  # fmt: skip
    """GlanceNet's objective (paper, eq. 3): reconstruction + KL to the class's prior + classes + concepts.

    class_means (B, D) = mu_y of every row, or None for the standard normal prior (then there is no anchor either).
    """
    recon, kld = vae_terms(w, batch.x, logits, mu, logvar, step, class_means)
    prediction = w.label_weight * F.cross_entropy(class_logits, batch.y)
    concepts = losses.concept_loss(z, batch.labels, batch.mask, w.latent_loss, class_means, w.cluster_dim)
    latent = w.latent_weight * concepts.total
    return Terms(recon, kld, prediction, latent, torch.zeros_like(recon), concepts.columns, concepts.any)


def cbnm_terms(w: Weights, batch: Batch, mu: Tensor, class_logits: Tensor) -> Terms:
    """The joint concept bottleneck: classes + concepts, of the encoder's mean."""
    prediction = w.label_weight * F.cross_entropy(class_logits, batch.y)
    concepts = losses.concept_loss(mu, batch.labels, batch.mask, w.latent_loss)
    zero = torch.zeros_like(prediction)
    return Terms(zero, zero, prediction, w.latent_weight * concepts.total, zero, concepts.columns, concepts.any)


class Algorithm(nn.Module):
    """Common parts: the encoder, plug-in terms, FactorVAE's discriminator, one optimiser step.

    Subclasses give `terms(batch, step) -> (Terms, z)`. Raises UserError for parts that do not fit each other.
    """

    gaussian = True  # needs an encoder with a variance
    has_decoder = True
    plugins = True
    predicts_classes = False
    supervises_concepts = False

    def __init__(self, o: argparse.Namespace, shape: Shape):
        super().__init__()
        self.w, self.shape, self.z_dim = Weights.of(o), shape, o.z_dim
        self.dist = Distributed(torch.device("cpu"))  # one process, until `share`
        self.encoder = self._make_encoder(o, 0, shape.channels)
        self.decoder = self._make_decoder(o, o.z_dim)
        self.discriminator: nn.Module | None = None
        self._check_plugins(o)
        if "FACTORVAE" in self.w.loss_terms:
            self.discriminator = self._make_discriminator(o, 0, 2)

    # ---- parts

    def _make_encoder(self, o: argparse.Namespace, index: int, channels: int, z_dim: int | None = None) -> nn.Module:
        kind = find(ENCODERS, o.encoder[index], "--encoder")
        if self.gaussian and not kind.gaussian:
            known = ", ".join(name for name, one in ENCODERS.items() if one.gaussian)
            raise UserError(
                f"--encoder {o.encoder[index]} has no variance, which --alg {o.alg} needs; take one of {known}"
            )
        return kind(o.z_dim if z_dim is None else z_dim, channels, o.image_size)

    def _make_decoder(self, o: argparse.Namespace, n_in: int) -> nn.Module | None:
        if not self.has_decoder:
            return None
        if not o.decoder:
            raise UserError(f"--alg {o.alg} needs --decoder; known are {', '.join(DECODERS)}")
        return find(DECODERS, o.decoder[0], "--decoder")(n_in, self.shape.channels, o.image_size)

    def _make_discriminator(self, o: argparse.Namespace, index: int, n_out: int) -> nn.Module:
        names = o.discriminator or ["SimpleDiscriminator"]
        kind = find(DISCRIMINATORS, names[min(index, len(names) - 1)], "--discriminator")
        if kind is not SimpleDiscriminator:
            raise UserError("--discriminator SimpleDiscriminatorConv64 reads images, but latents are judged here; "
                            "take SimpleDiscriminator")  # fmt: skip
        return kind(self.z_dim, n_out, o.num_layer_disc, o.size_layer_disc)

    def _check_plugins(self, o: argparse.Namespace) -> None:
        terms = self.w.loss_terms
        if terms and not self.plugins:
            raise UserError(
                f"--loss_terms {' '.join(terms)}: --alg {o.alg} has no such term (it is no VAE); leave it out"
            )
        if "DIPVAEI" in terms and "DIPVAEII" in terms:
            raise UserError(
                "--loss_terms DIPVAEI DIPVAEII: two penalties of one covariance with one weight; choose one"
            )
        if len(set(terms)) < len(terms):
            raise UserError(f"--loss_terms {' '.join(terms)}: a term is named twice")
        if "BetaTCVAE" in terms and "FACTORVAE" in terms:
            log.warning("BetaTCVAE and FACTORVAE both penalise the total correlation, and both by --w_tc")
        if "BetaTCVAE" in terms and self.w.w_tc == 1:
            log.warning("BetaTCVAE adds (w_tc - 1) times the total correlation: with --w_tc 1 it adds nothing")

    def main_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the main optimiser: everything but the adversaries."""
        skipped = {id(p) for p in self.adversary_parameters()}
        return (p for p in self.parameters() if id(p) not in skipped)

    def adversary_parameters(self) -> list[nn.Parameter]:
        """Parameters of FactorVAE's discriminator."""
        return [] if self.discriminator is None else list(self.discriminator.parameters())

    # ---- forward parts

    def share(self, dist: Distributed) -> None:
        """From now on encoder and decoder work on this process's part of the rows in training.

        Every process is given the whole batch, draws the same noise and computes the whole objective: terms that
        compare the rows of a batch are those of one process.
        """
        self.dist = dist
        for part in (self.encoder, self.decoder):
            if part is not None:
                normalise_over_processes(part, dist)

    def run_encoder(self, x: Tensor):
        """The encoder's output for all rows of x."""
        return self.dist.over_rows(self.encoder, x) if self.training else self.encoder(x)

    def run_decoder(self, z: Tensor) -> Tensor:
        """The decoder's output for all rows of z."""
        return self.dist.over_rows(self.decoder, z) if self.training else self.decoder(z)

    def shared_parameters(self) -> list[nn.Parameter]:
        """Parameters whose gradient is spread over the processes."""
        return [p for part in (self.encoder, self.decoder) if part is not None for p in part.parameters()]

    def encode(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(mu, logvar), each (B, D)."""
        return self.run_encoder(batch.x)

    def decode(self, z: Tensor, batch: Batch) -> Tensor:
        """Image logits (B, C, 64, 64)."""
        return self.run_decoder(z)

    def sample(self, mu: Tensor, logvar: Tensor) -> Tensor:
        """A latent sample (B, D)."""
        return losses.reparametrize(mu, logvar)

    def terms(self, batch: Batch, step: int) -> tuple[Terms, Tensor]:
        """The objective and the latents z (B, D) that are logged."""
        mu, logvar = self.encode(batch)
        z = self.sample(mu, logvar)
        recon, kld = vae_terms(self.w, batch.x, self.decode(z, batch), mu, logvar, step)
        return self._unsupervised(recon, kld, self.plugin_terms(mu, logvar, z)), z

    def _unsupervised(self, recon: Tensor, kld: Tensor, plugins: Tensor) -> Terms:
        zero, none = torch.zeros_like(recon), torch.zeros((), dtype=torch.bool, device=recon.device)
        return Terms(recon, kld, zero, zero, plugins, recon.new_zeros(self.shape.n_concepts), none)

    def plugin_terms(self, mu: Tensor, logvar: Tensor, z: Tensor) -> Tensor:
        """Sum of the terms named by --loss_terms (scalar)."""
        w, total = self.w, mu.new_zeros(())
        for name in w.loss_terms:
            if name == "BetaTCVAE":
                total = total + losses.beta_tc_loss(z, mu, logvar, w.w_tc)
            elif name == "DIPVAEI":
                total = total + w.w_dipvae * losses.dip_vae_i_loss(mu, w.lambda_od, w.lambda_d)
            elif name == "DIPVAEII":
                total = total + w.w_dipvae * losses.dip_vae_ii_loss(mu, logvar, w.lambda_od, w.lambda_d)
            elif name == "INFOVAE":
                total = total + w.w_infovae * losses.mmd(torch.randn(MMD_PRIOR_SAMPLES, z.shape[1]).to(z), z)
            elif name == "FACTORVAE":
                # the discriminator is a fixed critic here: its own step comes after, on detached latents
                frozen = {name: p.detach() for name, p in self.discriminator.named_parameters()}
                logits = torch.func.functional_call(self.discriminator, frozen, (z,))
                total = total + losses.factor_vae_tc(logits, w.w_tc)
        return total

    # ---- one optimiser step

    def train_step(
        self, batch: Batch, step: int, optimizers: dict[str, torch.optim.Optimizer], second: Batch | None = None,
        classes_only: bool = False,
    ) -> tuple[Terms, Tensor]:  # fmt: skip
        """Forward, backward, step. `second`: another batch, for FactorVAE; `classes_only`: the class loss alone.

        Returns the terms (detached) and the latents z (B, D).
        """
        terms, z = self.terms(batch, step)
        optimizers["G"].zero_grad(set_to_none=True)
        (terms.prediction if classes_only else terms.total).backward()
        self.dist.sum_gradients(self.shared_parameters())
        optimizers["G"].step()
        if self.discriminator is not None:
            self._discriminator_step(z.detach(), second, optimizers["PermD"])
        return Terms(*(part.detach() for part in terms)), z.detach()

    def _discriminator_step(self, z: Tensor, second: Batch, optimizer: torch.optim.Optimizer) -> None:
        with torch.no_grad():
            permuted = losses.permute_latents(self.sample(*self.encode(second)))
        loss = losses.factor_vae_discriminator_loss(self.discriminator(z), self.discriminator(permuted))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()


class VAE(Algorithm):
    """Reconstruction + KL to N(0, I) (+ plug-ins); the KL's weight is 1."""

    def __init__(self, o: argparse.Namespace, shape: Shape):
        if o.w_kld != 1:
            raise UserError(f"--alg VAE weighs the KL by 1, not --w_kld {o.w_kld:g}; use --alg BetaVAE")
        super().__init__(o, shape)


class BetaVAE(Algorithm):
    """VAE with any weight of the KL, or a controlled capacity."""


class AE(Algorithm):
    """Reconstruction only; the latent is the encoder's output."""

    gaussian = False
    plugins = False

    def __init__(self, o: argparse.Namespace, shape: Shape):
        super().__init__(o, shape)
        if self.encoder.gaussian:
            known = ", ".join(name for name, one in ENCODERS.items() if not one.gaussian)
            raise UserError(f"--alg AE needs an encoder without a variance, not {o.encoder[0]}; take one of {known}")

    def encode(self, batch: Batch) -> tuple[Tensor, Tensor]:
        z = self.run_encoder(batch.x)
        return z, torch.zeros_like(z)

    def sample(self, mu: Tensor, logvar: Tensor) -> Tensor:
        return mu

    def terms(self, batch: Batch, step: int) -> tuple[Terms, Tensor]:
        z = self.run_encoder(batch.x)
        recon = self.w.w_recon * losses.reconstruction(self.decode(z, batch), batch.x)
        zero = torch.zeros_like(recon)
        return self._unsupervised(recon, zero, zero), z


class GlanceNet(Algorithm):
    """Supervised latents, linear classes on tanh(z/2), and (with --conditional_prior) a prior mean per class."""

    predicts_classes = True
    supervises_concepts = True

    def __init__(self, o: argparse.Namespace, shape: Shape):
        _check_concepts(o, shape)
        super().__init__(o, shape)
        self.z_class = o.z_class or o.z_dim
        if self.z_class > o.z_dim:
            raise UserError(f"--z_class {o.z_class} exceeds --z_dim {o.z_dim}")
        self.classifier = nn.Linear(self.z_class, shape.n_classes)
        self.prior = nn.Linear(shape.n_classes, o.z_dim) if o.conditional_prior else None

    def class_means(self) -> Tensor | None:
        """Prototypes mu_y (C, D), or None without a conditional prior."""
        return None if self.prior is None else self.prior.weight.T + self.prior.bias

    def prior_means(self) -> Tensor | None:
        """Prior means (C, D): the prototypes, 0 beyond --cluster_dim."""
        means = self.class_means()
        return None if means is None else losses.prior_target(means, self.w.cluster_dim)

    def classify(self, z: Tensor) -> Tensor:
        """Class logits (..., C) of raw latents z (..., D)."""
        return self.classifier(torch.tanh(z[..., : self.z_class] / 2))

    def terms(self, batch: Batch, step: int) -> tuple[Terms, Tensor]:
        mu, logvar = self.encode(batch)
        z = self.sample(mu, logvar)
        means = self.class_means()
        rows = None if means is None else means[batch.y]
        terms = glancenet_terms(
            self.w, batch, self.decode(z, batch), mu, logvar, z, self.classify(z), rows, step
        )  # fmt: skip
        return terms._replace(plugins=self.plugin_terms(mu, logvar, z)), z


class CBNM(Algorithm):
    """Concept bottleneck: classes and concepts from tanh(mu/2). `latents` are the activations, not raw means."""

    gaussian = False
    has_decoder = False
    plugins = False
    predicts_classes = True
    supervises_concepts = True

    def __init__(self, o: argparse.Namespace, shape: Shape):
        _check_concepts(o, shape)
        super().__init__(o, shape)
        self.z_class = o.z_dim
        self.classifier = nn.Linear(o.z_dim, shape.n_classes, bias=False)

    def class_means(self) -> None:
        """A bottleneck has no prototypes."""
        return None

    prior_means = class_means

    def encode(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(mu, logvar); the variance of a Gaussian encoder is there, but nothing trains it."""
        out = self.run_encoder(batch.x)
        return out if self.encoder.gaussian else (out, torch.zeros_like(out))

    def sample(self, mu: Tensor, logvar: Tensor) -> Tensor:
        return mu

    def classify(self, z: Tensor) -> Tensor:
        """Class logits (..., C) of raw latents z (..., D)."""
        return self.classifier(torch.tanh(z / 2))

    def terms(self, batch: Batch, step: int) -> tuple[Terms, Tensor]:
        mu, _ = self.encode(batch)
        return cbnm_terms(self.w, batch, mu, self.classify(mu)), torch.tanh(mu / 2)


def _check_concepts(o: argparse.Namespace, shape: Shape) -> None:
    if o.z_dim < shape.n_concepts:
        raise UserError(
            f"--z_dim {o.z_dim} is smaller than the {shape.n_concepts} concepts of the data; give at least that many"
        )
    if not 0 <= o.cluster_dim <= o.z_dim:
        raise UserError(f"--cluster_dim {o.cluster_dim}: expected 0 (all) to --z_dim {o.z_dim}")


def _check_labels(o: argparse.Namespace, shape: Shape) -> None:
    if not shape.code_sizes:
        raise UserError(f"--alg {o.alg} needs labels; name them by --include_labels")


class CVAE(Algorithm):
    """Conditional VAE: every one-hot label becomes an extra image channel for the encoder and an input of the
    decoder.
    """

    def __init__(self, o: argparse.Namespace, shape: Shape):
        _check_labels(o, shape)
        self.n_labels = sum(shape.code_sizes)
        super().__init__(o, shape)
        names = o.label_tiler or ["MultiTo2DChannel"]
        self.tiler = find(LABEL_TILERS, names[0], "--label_tiler")(self.n_labels, o.image_size)

    def _make_encoder(self, o: argparse.Namespace, index: int, channels: int, z_dim: int | None = None) -> nn.Module:
        return super()._make_encoder(o, index, channels + self.n_labels, z_dim)

    def _make_decoder(self, o: argparse.Namespace, n_in: int) -> nn.Module | None:
        return super()._make_decoder(o, n_in + self.n_labels)

    def labels(self, batch: Batch) -> Tensor:
        """One-hot labels (B, sum of sizes)."""
        return losses.one_hot_labels(batch.codes, list(self.shape.code_sizes)).to(batch.x)

    def encode(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.run_encoder(torch.cat([batch.x, self.tiler(self.labels(batch))], dim=1))

    def decode(self, z: Tensor, batch: Batch) -> Tensor:
        return self.run_decoder(torch.cat([z, self.labels(batch)], dim=1))


class IFCVAE(Algorithm):
    """Information-factorising CVAE: a second encoder predicts the labels, an adversary keeps them out of z."""

    def __init__(self, o: argparse.Namespace, shape: Shape):
        _check_labels(o, shape)
        if len(o.encoder) < 2:
            raise UserError("--alg IFCVAE needs two encoders: --encoder GAUSSIAN PLAIN (latents, labels)")
        self.sizes = list(shape.code_sizes)
        super().__init__(o, shape)
        kind = find(ENCODERS, o.encoder[1], "--encoder")
        if kind.gaussian:
            raise UserError(f"--encoder {' '.join(o.encoder)}: the second encoder predicts labels and has no variance")
        self.label_encoder = kind(sum(self.sizes), shape.channels, o.image_size)
        self.auxiliary = self._make_discriminator(o, 1, sum(self.sizes))

    def _make_decoder(self, o: argparse.Namespace, n_in: int) -> nn.Module | None:
        return super()._make_decoder(o, n_in + sum(self.sizes))

    def adversary_parameters(self) -> list[nn.Parameter]:
        """The discriminator's and the auxiliary classifier's parameters."""
        auxiliary = getattr(self, "auxiliary", None)
        return super().adversary_parameters() + ([] if auxiliary is None else list(auxiliary.parameters()))

    def label_probabilities(self, x: Tensor) -> Tensor:
        """Predicted labels (B, sum of sizes), a softmax within every label."""
        return losses.multi_label_softmax(self.label_encoder(x), self.sizes)

    def decode(self, z: Tensor, batch: Batch) -> Tensor:
        return self.run_decoder(torch.cat([z, self.label_probabilities(batch.x).detach()], dim=1))

    def terms(self, batch: Batch, step: int) -> tuple[Terms, Tensor]:
        """The VAE terms; `prediction` = label loss of the reconstruction minus the adversary's loss."""
        mu, logvar = self.encode(batch)
        z = self.sample(mu, logvar)
        logits = self.decode(z, batch)
        recon, kld = vae_terms(self.w, batch.x, logits, mu, logvar, step)
        again = losses.multi_label_cross_entropy(self.label_encoder(torch.sigmoid(logits)), batch.codes, self.sizes)
        leaked = losses.multi_label_cross_entropy(self.auxiliary(z), batch.codes, self.sizes)
        terms = self._unsupervised(recon, kld, self.plugin_terms(mu, logvar, z))
        return terms._replace(prediction=self.w.w_le * again - self.w.w_aux * leaked), z

    def train_step(
        self, batch: Batch, step: int, optimizers: dict[str, torch.optim.Optimizer], second: Batch | None = None,
        classes_only: bool = False,
    ) -> tuple[Terms, Tensor]:  # fmt: skip
        """Three steps: labels from the image; the VAE against the adversary; the adversary on detached latents."""
        label_loss = self.w.w_le * losses.multi_label_cross_entropy(
            self.label_encoder(batch.x), batch.codes, self.sizes
        )  # fmt: skip
        optimizers["G"].zero_grad(set_to_none=True)
        label_loss.backward()
        optimizers["G"].step()
        terms, z = super().train_step(batch, step, optimizers, second, classes_only)
        # a fresh graph on detached z: the encoder has just been stepped
        leaked = self.w.w_aux * losses.multi_label_cross_entropy(self.auxiliary(z), batch.codes, self.sizes)
        optimizers["aux_D"].zero_grad(set_to_none=True)
        leaked.backward()
        optimizers["aux_D"].step()
        return terms, z


ALGORITHMS: dict[str, type[Algorithm]] = {
    "GlanceNet": GlanceNet,
    "CBNM": CBNM,
    "VAE": VAE,
    "BetaVAE": BetaVAE,
    "AE": AE,
    "CVAE": CVAE,
    "IFCVAE": IFCVAE,
}


def algorithm_class(name: str) -> type[Algorithm]:
    """The class behind --alg, aliases included."""
    return find(ALGORITHMS, ALIASES.get(name, name), "--alg")
