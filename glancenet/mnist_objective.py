"""Models and losses of the MNIST parity test: MLPs on 784 pixels, all losses summed over the batch (not averaged).

Only digits 4 and 5 are seen in training; their concepts are latents 0 and 1 (4 -> (1, 0), 5 -> (0, 1)).
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from glancenet.losses import reparametrize

PIXELS, HIDDEN, LATENTS, CONCEPTS = 784, 128, 10, 2
PRIOR_LOGVAR = -2.0
KNOWN_DIGITS = (4, 5)


class Terms(NamedTuple):
    """Weighted sums over the batch; `total` is their sum."""

    total: Tensor
    rec: Tensor
    kld: Tensor
    lat: Tensor
    post: Tensor


def concept_targets(digits: Tensor) -> Tensor:
    """Digits 4 and 5 (B,) -> one-hot concepts (B, 2)."""
    return torch.stack([digits == digit for digit in KNOWN_DIGITS], dim=1).float()


def latent_bce(q: Tensor, targets: Tensor) -> Tensor:
    """Sum over the batch and the two concepts of the cross-entropy of sigmoid(q[:, :2])."""
    return F.binary_cross_entropy_with_logits(q[:, :CONCEPTS], targets.to(q.dtype), reduction="sum")


def vae_terms(rec: Tensor, mu: Tensor, logvar: Tensor, z: Tensor, targets: Tensor) -> Terms:
    """VAE: sum BCE + 100 KL(. || N(0, 1)) + 100 latent BCE."""
    kld = 100 * -0.5 * (1 + logvar - mu.square() - logvar.exp()).sum()
    lat = 100 * latent_bce(z, targets)
    return Terms(rec + kld + lat, rec, kld, lat, torch.zeros_like(lat))


def osr_terms(rec: Tensor, mu: Tensor, logvar: Tensor, z: Tensor, class_means: Tensor, targets: Tensor) -> Terms:
    """GlanceNet: sum BCE + KL(. || N(mu_y, e^-2)) + 100 latent BCE of z + 2000 latent BCE of mu_y.

    class_means (B, 2) = mu_y; the prior mean of the other latents is 0.
    """
    means = F.pad(class_means, (0, mu.shape[1] - class_means.shape[1]))  # (B, D)
    s = PRIOR_LOGVAR
    ratio = (logvar.exp() + (mu - means).square()) / torch.exp(torch.tensor(s, dtype=mu.dtype))
    kld = 0.5 * ((s - logvar) + ratio - 1).sum()
    lat, post = 100 * latent_bce(z, targets), 2000 * latent_bce(class_means, targets)
    return Terms(rec + kld + lat + post, rec, kld, lat, post)


def cbm_terms(latents: Tensor, targets: Tensor) -> Terms:
    """Concept bottleneck (sequential): latent BCE alone."""
    lat, zero = latent_bce(latents, targets), latents.new_zeros(())
    return Terms(lat, zero, zero, lat, zero)


class Encoder(nn.Module):
    """784 -> 128 -> 128, then one head for mu (and one for logvar): (B, 784) -> mu, logvar (B, `latents`)."""

    def __init__(self, latents: int, gaussian: bool):
        super().__init__()
        self.stack = nn.Sequential(nn.Linear(PIXELS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU())
        self.mu = nn.Linear(HIDDEN, latents)
        self.logvar = nn.Linear(HIDDEN, latents) if gaussian else None

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        h = self.stack(x)
        return self.mu(h), None if self.logvar is None else self.logvar(h)


class ParityVAE(nn.Module):
    """VAE with two supervised latents ("CG-VAE" and "VAE" of the figure); `classifier` and `leak_classifier` are
    probes.
    """

    name = "VAE"

    def __init__(self):
        super().__init__()
        self.encoder = Encoder(LATENTS, gaussian=True)
        self.decoder = nn.Sequential(
            nn.Linear(LATENTS, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, PIXELS)
        )
        self.classifier = nn.Linear(CONCEPTS, CONCEPTS)
        self.leak_classifier = nn.Linear(LATENTS, 2)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x (B, 784) -> reconstruction logits (B, 784), mu, logvar, z (B, 10)."""
        mu, logvar = self.encoder(x)
        z = reparametrize(mu, logvar)
        return self.decoder(z), mu, logvar, z

    def terms(self, x: Tensor, digits: Tensor) -> Terms:
        """Losses of x (B, 784) in [0, 1] with digits (B,) in {4, 5}."""
        logits, mu, logvar, z = self(x)
        rec = F.binary_cross_entropy_with_logits(logits, x, reduction="sum")
        return self._terms(rec, mu, logvar, z, digits)

    def _terms(self, rec: Tensor, mu: Tensor, logvar: Tensor, z: Tensor, digits: Tensor) -> Terms:
        return vae_terms(rec, mu, logvar, z, concept_targets(digits))


class ParityGlanceNet(ParityVAE):
    """The VAE with a learned prior mean per class on the two concepts."""

    name = "OSR_VAE"

    def __init__(self):
        super().__init__()
        self.prior = nn.Linear(CONCEPTS, CONCEPTS, bias=False)

    def class_means(self) -> Tensor:
        """Prototypes (2 classes, 10 latents)."""
        return F.pad(self.prior.weight.T, (0, LATENTS - CONCEPTS))

    def _terms(self, rec: Tensor, mu: Tensor, logvar: Tensor, z: Tensor, digits: Tensor) -> Terms:
        targets = concept_targets(digits)
        return osr_terms(rec, mu, logvar, z, self.prior(targets), targets)


class ParityCBM(nn.Module):
    """Concept bottleneck: the encoder with two outputs."""

    name = "CBM"

    def __init__(self):
        super().__init__()
        self.encoder = Encoder(CONCEPTS, gaussian=False)
        self.classifier = nn.Linear(CONCEPTS, CONCEPTS)

    def terms(self, x: Tensor, digits: Tensor) -> Terms:
        """Losses of x (B, 784) with digits (B,) in {4, 5}."""
        return cbm_terms(self.encoder(x)[0], concept_targets(digits))


MODELS: dict[str, type[nn.Module]] = {"cbnm": ParityCBM, "vae": ParityVAE, "glancenet": ParityGlanceNet}
