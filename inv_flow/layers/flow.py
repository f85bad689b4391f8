"""What an invertible layer is, and how layers become a density.

`forward` is data -> latent: (x, ...) -> (z, log-determinant of each sample (B,)). `reverse` is latent -> data and
returns the tensor alone. One sum of log-determinants; split latents are kept, so `reconstruct` is exact.
"""

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn


class FlowLayer(nn.Module):
    """An invertible map. Sub-classes give `forward(x) -> (z, log_det (B,))` and `reverse(z) -> x`."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        raise TypeError(f"{type(self).__name__} does not define forward")

    def reverse(self, z: Tensor) -> Tensor:
        raise TypeError(f"{type(self).__name__} does not define reverse")


class ModifiedGradFlowLayer(FlowLayer):
    """A layer whose training pass replaces the gradient of an expensive log-determinant (Self Normalizing Flows).

    In training `forward` returns log-determinant 0 and puts the approximate gradient of the true one into its backward
    pass; in evaluation, and wherever `exact` is set, both the log-determinant and the inverse are the exact, expensive
    ones.
    """

    def __init__(self):
        super().__init__()
        self.exact = False

    @property
    def modified(self) -> bool:
        """True while the pass uses modified gradients and a log-determinant of 0."""
        return self.training and not self.exact


def no_log_det(x: Tensor) -> Tensor:
    """A log-determinant of 0 for each sample: (B,)."""
    return x.new_zeros(x.shape[0])


def per_sample(x: Tensor) -> Tensor:
    """Sum over everything but the batch axis: (B, ...) -> (B,)."""
    return x.flatten(1).sum(1)


def standard_normal_log_prob(z: Tensor) -> Tensor:
    """log N(z; 0, I) in nats, (B, ...) -> (B,)."""
    return -0.5 * per_sample(z.square()) - 0.5 * math.log(2 * math.pi) * z[0].numel()


def bits_per_dim(log_prob: Tensor, dimensions: int) -> Tensor:
    """-log p / (D ln 2) with log p in nats and D the number of pixel values; lower is better."""
    return -log_prob / (dimensions * math.log(2))


def encode_through(layers: Iterable[nn.Module], x: Tensor) -> tuple[list[Tensor], Tensor]:
    """x (B, ...) through layers of a `FlowSequential` -> (latents, sum of their log-determinants (B,))."""
    latents, log_det = [], None
    for layer in layers:
        if hasattr(layer, "split"):
            x, part, term = layer.split(x)
            latents.append(part)
        else:
            x, term = layer(x)
        log_det = term if log_det is None else log_det + term
    return [*latents, x], log_det


class FlowSequential(nn.Module):
    """Layers in sequence with a standard normal base.

    A layer with the methods `split` and `merge` (SplitPrior) takes a part of the latent out of the sequence; the latent
    of the whole flow is the list of those parts, first split first, and the last tensor.
    """

    def __init__(self, layers: Iterable[nn.Module]):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def encode(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """x (B, ...) -> (latents, sum of all log-determinants (B,))."""
        return encode_through(self.layers, x)

    def decode(self, latents: list[Tensor]) -> Tensor:
        """The inverse of `encode`; the list is not changed."""
        parts = list(latents)
        z = parts.pop()
        for layer in reversed(self.layers):
            z = layer.merge(z, parts.pop()) if hasattr(layer, "merge") else layer.reverse(z)
        return z

    def forward(self, x: Tensor) -> tuple[list[Tensor], Tensor]:
        """x (B, ...) -> (latents, log p(x) in nats (B,))."""
        latents, log_det = self.encode(x)
        return latents, log_det + sum(standard_normal_log_prob(z) for z in latents)

    def log_prob(self, x: Tensor) -> Tensor:
        """log p(x) in nats, (B,)."""
        return self(x)[1]

    def latent_shapes(self, x: Tensor) -> list[torch.Size]:
        """Shapes (without the batch axis) of the latents of x (B, ...)."""
        with torch.no_grad():
            return [z.shape[1:] for z in self.encode(x)[0]]

    @torch.no_grad()
    def sample(self, n: int, shapes: list[torch.Size], temperature: float = 1.0) -> Tensor:
        """n samples; every latent (split parts too) is temperature * N(0, I). `shapes` comes from `latent_shapes`."""
        reference = next(self.parameters())
        z = [temperature * torch.randn(n, *shape, dtype=reference.dtype, device=reference.device) for shape in shapes]
        return self.decode(z)

    @torch.no_grad()
    def reconstruct(self, x: Tensor) -> Tensor:
        """decode(encode(x)): x up to rounding, since the split latents are kept (B, ...)."""
        return self.decode(self.encode(x)[0])
