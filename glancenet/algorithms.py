"""The algorithms: GlanceNet, the concept bottleneck CBNM, and the VAE family they descend from.

Every algorithm is a module whose `terms(batch, step)` gives its objective (see `losses`); IFCVAE and FactorVAE have
further losses with optimisers of their own, `label_loss` and `adversary_losses`. B examples, D latents, L concepts, C
classes.

| --alg                     | what it is                                                                              |
|---------------------------|-----------------------------------------------------------------------------------------|
| GlanceNet, GrayVAE_Join   | beta-VAE with supervised latents, class-conditional prior, linear classes (paper, eq. 3) |
| CBNM, CBM_Join            | the same encoder and classes without decoder, KL and prior (joint concept bottleneck)    |
| VAE, BetaVAE, AE          | no supervision                                                                           |
| CVAE                      | labels enter encoder (as image channels) and decoder                                     |
| IFCVAE                    | labels are predicted, and removed from z by an adversary (information factorisation)     |
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from common.errors import UserError
from common.launch import Distributed, normalise_over_processes
from glancenet import losses
from glancenet.architectures import DECODERS, ENCODERS, LABEL_TILERS, SimpleDiscriminator
from glancenet.losses import Batch, Terms, Weights, cbnm_terms, glancenet_terms, vae_terms
from glancenet.options import Config


class Shape(NamedTuple):
    """What an algorithm needs to know of a data set."""

    channels: int
    n_concepts: int
    n_classes: int
    code_sizes: tuple[int, ...]
    n_train: int


class Algorithm(nn.Module):
    """Common parts: encoder, decoder, plug-in terms, FactorVAE's discriminator.

    Subclasses give `terms(batch, step) -> (Terms, z)`. Raises UserError for options that do not fit the data.
    """

    has_decoder = True
    predicts_classes = False
    predicts_labels = False
    supervises_concepts = False

    def __init__(self, o: Config, shape: Shape):
        super().__init__()
        self.w, self.shape, self.z_dim = Weights.of(o), shape, o.z_dim
        self.dist = Distributed(torch.device("cpu"))  # one process, until `share`
        self.amp = o.amp
        self.encoder = self._make_encoder(o, shape.channels)
        self.decoder = self._make_decoder(o, o.z_dim) if self.has_decoder else None
        self.discriminator: nn.Module | None = None
        if "FACTORVAE" in self.w.loss_terms:
            self.discriminator = self._make_discriminator(o, 2)

    # ---- parts

    def _make_encoder(self, o: Config, channels: int) -> nn.Module:
        return ENCODERS[o.encoder[0]](o.z_dim, channels)

    def _make_decoder(self, o: Config, n_in: int) -> nn.Module:
        return DECODERS[o.decoder[0]](n_in, self.shape.channels)

    def _make_discriminator(self, o: Config, n_out: int) -> nn.Module:
        return SimpleDiscriminator(o.z_dim, n_out, o.num_layer_disc, o.size_layer_disc)

    def main_parameters(self) -> Iterator[nn.Parameter]:
        """Parameters of the main optimiser: everything but the adversaries."""
        skipped = {id(p) for adversary in self.adversaries().values() for p in adversary.parameters()}
        return (p for p in self.parameters() if id(p) not in skipped)

    def adversaries(self) -> dict[str, nn.Module]:
        """Networks with an optimiser of their own, by its name: FactorVAE's discriminator is 'PermD'."""
        return {} if self.discriminator is None else {"PermD": self.discriminator}

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

    def run(self, network: nn.Module, x: Tensor) -> Any:
        """The float32 output of a network for all rows of x; with --amp it computes in bfloat16 in training."""
        if not self.training:
            return network(x)
        if not self.amp:
            return self.dist.over_rows(network, x)
        with torch.autocast(x.device.type, torch.bfloat16):
            out = self.dist.over_rows(network, x)
        return out.float() if isinstance(out, Tensor) else tuple(part.float() for part in out)

    def shared_parameters(self) -> list[nn.Parameter]:
        """Parameters whose gradient is spread over the processes."""
        return [p for part in (self.encoder, self.decoder) if part is not None for p in part.parameters()]

    def encode(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """(mu, logvar), each (B, D)."""
        return self.run(self.encoder, batch.x)

    def decode(self, z: Tensor, batch: Batch) -> Tensor:
        """Image logits (B, C, 64, 64)."""
        return self.run(self.decoder, z)

    def sample(self, mu: Tensor, logvar: Tensor) -> Tensor:
        """A latent sample (B, D)."""
        return losses.reparametrize(mu, logvar)

    def terms(self, batch: Batch, step: int | Tensor) -> tuple[Terms, Tensor]:
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
                total = total + w.w_infovae * losses.mmd(
                    torch.randn(losses.MMD_PRIOR_SAMPLES, z.shape[1], dtype=z.dtype, device=z.device), z
                )
            elif name == "FACTORVAE":
                # the discriminator is a fixed critic here: its own step comes after, on detached latents
                frozen = {name: p.detach() for name, p in self.discriminator.named_parameters()}
                logits = torch.func.functional_call(self.discriminator, frozen, (z,))
                total = total + losses.factor_vae_tc(logits, w.w_tc)
        return total

    # ---- losses of other optimisers

    def label_loss(self, batch: Batch) -> Tensor | None:
        """A loss whose step comes before that of `terms`, where `predicts_labels`; else None."""
        return None

    def adversary_losses(self, z: Tensor, batch: Batch, second: Batch | None) -> Iterator[tuple[str, Tensor]]:
        """(optimiser, loss) of every adversary on detached latents z (B, D); `second` is another batch."""
        if self.discriminator is not None:
            with torch.no_grad():
                permuted = losses.permute_latents(self.sample(*self.encode(second)))
            yield "PermD", losses.factor_vae_discriminator_loss(self.discriminator(z), self.discriminator(permuted))


class VAE(Algorithm):
    """Reconstruction + KL to N(0, I) (+ plug-ins). `VAE` has a KL of weight 1, `BetaVAE` any weight or a capacity."""


class AE(Algorithm):
    """Reconstruction only; the latent is the encoder's output."""

    def encode(self, batch: Batch) -> tuple[Tensor, Tensor]:
        z = self.run(self.encoder, batch.x)
        return z, torch.zeros_like(z)

    def sample(self, mu: Tensor, logvar: Tensor) -> Tensor:
        return mu

    def terms(self, batch: Batch, step: int | Tensor) -> tuple[Terms, Tensor]:
        z = self.run(self.encoder, batch.x)
        recon = self.w.w_recon * losses.reconstruction(self.decode(z, batch), batch.x)
        zero = torch.zeros_like(recon)
        return self._unsupervised(recon, zero, zero), z


class GlanceNet(Algorithm):
    """Supervised latents, linear classes on tanh(z/2), and (with --conditional_prior) a prior mean per class."""

    predicts_classes = True
    supervises_concepts = True

    def __init__(self, o: Config, shape: Shape):
        _check_concepts(o, shape)
        super().__init__(o, shape)
        self.z_class = o.z_class or o.z_dim
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

    def terms(self, batch: Batch, step: int | Tensor) -> tuple[Terms, Tensor]:
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

    has_decoder = False
    predicts_classes = True
    supervises_concepts = True

    def __init__(self, o: Config, shape: Shape):
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
        out = self.run(self.encoder, batch.x)
        return out if self.encoder.gaussian else (out, torch.zeros_like(out))

    def sample(self, mu: Tensor, logvar: Tensor) -> Tensor:
        return mu

    def classify(self, z: Tensor) -> Tensor:
        """Class logits (..., C) of raw latents z (..., D)."""
        return self.classifier(torch.tanh(z / 2))

    def terms(self, batch: Batch, step: int | Tensor) -> tuple[Terms, Tensor]:
        mu, _ = self.encode(batch)
        return cbnm_terms(self.w, batch, mu, self.classify(mu)), torch.tanh(mu / 2)


def _check_concepts(o: Config, shape: Shape) -> None:
    if o.z_dim < shape.n_concepts:
        raise UserError(
            f"--z_dim {o.z_dim} is smaller than the {shape.n_concepts} concepts of the data; give at least that many"
        )


def _check_labels(o: Config, shape: Shape) -> None:
    if not shape.code_sizes:
        raise UserError(f"--alg {o.alg} needs labels; name them by --include_labels")


class CVAE(Algorithm):
    """Conditional VAE: every one-hot label becomes an extra image channel for the encoder and an input of the
    decoder.
    """

    def __init__(self, o: Config, shape: Shape):
        _check_labels(o, shape)
        self.n_labels = sum(shape.code_sizes)
        super().__init__(o, shape)
        self.tiler = LABEL_TILERS[(o.label_tiler or ["MultiTo2DChannel"])[0]](self.n_labels)

    def _make_encoder(self, o: Config, channels: int) -> nn.Module:
        return super()._make_encoder(o, channels + self.n_labels)

    def _make_decoder(self, o: Config, n_in: int) -> nn.Module:
        return super()._make_decoder(o, n_in + self.n_labels)

    def labels(self, batch: Batch) -> Tensor:
        """One-hot labels (B, sum of sizes)."""
        return losses.one_hot_labels(batch.codes, list(self.shape.code_sizes)).to(batch.x)

    def encode(self, batch: Batch) -> tuple[Tensor, Tensor]:
        return self.run(self.encoder, torch.cat([batch.x, self.tiler(self.labels(batch))], dim=1))

    def decode(self, z: Tensor, batch: Batch) -> Tensor:
        return self.run(self.decoder, torch.cat([z, self.labels(batch)], dim=1))


class IFCVAE(Algorithm):
    """Information-factorising CVAE: a second encoder predicts the labels, an adversary keeps them out of z."""

    predicts_labels = True

    def __init__(self, o: Config, shape: Shape):
        _check_labels(o, shape)
        self.sizes = list(shape.code_sizes)
        super().__init__(o, shape)
        self.label_encoder = ENCODERS[o.encoder[1]](sum(self.sizes), shape.channels)
        self.auxiliary = self._make_discriminator(o, sum(self.sizes))

    def _make_decoder(self, o: Config, n_in: int) -> nn.Module:
        return super()._make_decoder(o, n_in + sum(self.sizes))

    def adversaries(self) -> dict[str, nn.Module]:
        """The discriminator, and 'aux_D': the classifier that looks for labels in z."""
        return super().adversaries() | {"aux_D": self.auxiliary}

    def label_probabilities(self, x: Tensor) -> Tensor:
        """Predicted labels (B, sum of sizes), a softmax within every label."""
        return losses.multi_label_softmax(self.label_encoder(x), self.sizes)

    def decode(self, z: Tensor, batch: Batch) -> Tensor:
        return self.run(self.decoder, torch.cat([z, self.label_probabilities(batch.x).detach()], dim=1))

    def terms(self, batch: Batch, step: int | Tensor) -> tuple[Terms, Tensor]:
        """The VAE terms; `prediction` = label loss of the reconstruction minus the adversary's loss."""
        mu, logvar = self.encode(batch)
        z = self.sample(mu, logvar)
        logits = self.decode(z, batch)
        recon, kld = vae_terms(self.w, batch.x, logits, mu, logvar, step)
        again = losses.multi_label_cross_entropy(self.label_encoder(torch.sigmoid(logits)), batch.codes, self.sizes)
        leaked = losses.multi_label_cross_entropy(self.auxiliary(z), batch.codes, self.sizes)
        terms = self._unsupervised(recon, kld, self.plugin_terms(mu, logvar, z))
        return terms._replace(prediction=self.w.w_le * again - self.w.w_aux * leaked), z

    def label_loss(self, batch: Batch) -> Tensor:
        """Labels from the image."""
        return self.w.w_le * losses.multi_label_cross_entropy(self.label_encoder(batch.x), batch.codes, self.sizes)

    def adversary_losses(self, z: Tensor, batch: Batch, second: Batch | None) -> Iterator[tuple[str, Tensor]]:
        yield from super().adversary_losses(z, batch, second)
        # a fresh graph on detached z: the encoder has just been stepped
        yield "aux_D", self.w.w_aux * losses.multi_label_cross_entropy(self.auxiliary(z), batch.codes, self.sizes)


MODELS: dict[str, type[Algorithm]] = {
    "GlanceNet": GlanceNet, "CBNM": CBNM, "VAE": VAE, "BetaVAE": VAE, "AE": AE, "CVAE": CVAE, "IFCVAE": IFCVAE,
}  # fmt: skip


def make_model(o: Config, shape: Shape) -> Algorithm:
    """The model of --alg. Raises UserError for options that do not fit the data."""
    return MODELS[o.algorithm](o, shape)
