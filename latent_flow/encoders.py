"""The convolutional networks: image VAEs, and the encoders that infer which flow moves a sequence.

Layer numbers in the state dicts are those of the published checkpoints. Axes: B samples, C channels, N pixels
a side, S channel width (= latent size of a VAE), K flows.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from common.errors import UserError
from common.layers import ConvTranspose2d


def halving(channels: int, out: int) -> nn.Conv2d:
    """Convolution 4x4, stride 2, padding 1: 2N x 2N -> N x N."""
    return nn.Conv2d(channels, out, 4, 2, 1)


def doubling(channels: int, out: int) -> ConvTranspose2d:
    """Transposed convolution 4x4, stride 2, padding 1: N x N -> 2N x 2N."""
    return ConvTranspose2d(channels, out, 4, 2, 1)


def relu() -> nn.ReLU:
    """In place: the layer before, a convolution or a matrix product, needs its input only."""
    return nn.ReLU(inplace=True)


class CoveringConv2d(nn.Conv2d):
    """A convolution whose kernel covers the whole input (N x N -> 1 x 1), computed as one matrix product."""

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, N, N) -> (B, out, 1, 1)."""
        return F.linear(x.flatten(1), self.weight.flatten(1), self.bias)[..., None, None]


class SpreadingConvTranspose2d(nn.ConvTranspose2d):
    """A transposed convolution of a 1 x 1 input (1 x 1 -> N x N), computed as one matrix product."""

    def forward(self, x: Tensor) -> Tensor:
        """x (B, C, 1, 1) -> (B, out, N, N)."""
        shape = self.out_channels, *self.kernel_size
        out = (x.flatten(1) @ self.weight.flatten(1)).unflatten(1, shape) + self.bias[:, None, None]
        # the strided layers that follow run faster with channels last: cuDNN's always, a CPU's where they are narrow
        last = shape[-1] > 1
        return out.contiguous(memory_format=torch.channels_last) if last else out


class View(nn.Module):
    """(B, S) -> (B, S, 1, 1)."""

    def forward(self, x: Tensor) -> Tensor:
        """x (B, S) -> (B, S, 1, 1)."""
        return x[..., None, None]


def _divisible(size: int, by: int) -> None:
    if size < by or size % by:
        raise UserError(f"the image size must be a multiple of {by} (got {size})")


def trunk(channels: int, width: int, size: int, out: int) -> nn.Sequential:
    """Three convolutions to 1 x 1 and two of kernel 1, shared by all encoders of small images."""
    _divisible(size, 4)
    return nn.Sequential(
        halving(channels, width),
        relu(),
        halving(width, 2 * width),
        relu(),
        CoveringConv2d(2 * width, 3 * width, size // 4),
        relu(),
        CoveringConv2d(3 * width, 2 * width, 1),
        relu(),
        CoveringConv2d(2 * width, out, 1),
    )


def deep_trunk(channels: int, width: int, size: int) -> nn.Sequential:
    """Four halving convolutions, each with a kernel-3 one, then to 1 x 1 (128-pixel images)."""
    _divisible(size, 16)
    layers: list[nn.Module] = []
    for stage in range(4):
        layers += [halving(channels if stage == 0 else width, width), relu()]
        layers += [nn.Conv2d(width, width, 3, 1, 1), relu()]
    layers += [CoveringConv2d(width, width, size // 16), relu()]
    layers += [CoveringConv2d(width, width, 1), relu(), CoveringConv2d(width, width, 1)]
    return nn.Sequential(*layers)


class GaussianEncoder(nn.Module):
    """A trunk with a mean and a log-variance head."""

    def __init__(self, trunk: nn.Sequential, features: int, latent: int):
        super().__init__()
        self.encoder = trunk
        self.linear_means = nn.Linear(features, latent)
        self.linear_log_var = nn.Linear(features, latent)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, C, N, N) -> mean and log-variance, (B, S) each."""
        features = self.encoder(x.contiguous(memory_format=torch.channels_last)).flatten(1)
        return self.linear_means(features), self.linear_log_var(features)


class BernoulliDecoder(nn.Module):
    """Layers from a latent (B, S) to images; the last one is the sigmoid that `logits` leaves out."""

    def __init__(self, layers: list[nn.Module]):
        super().__init__()
        self.decoder = nn.Sequential(*layers, nn.Sigmoid())

    def logits(self, z: Tensor) -> Tensor:
        """z (B, S) -> pixel logits (B, C, N, N)."""
        return self.decoder[:-1](z)

    def forward(self, z: Tensor) -> Tensor:
        """z (B, S) -> pixel means (B, C, N, N) in (0, 1)."""
        return self.decoder(z)


class ImageVAE(nn.Module):
    """What the two VAEs share: encoding, one sample by reparameterisation, decoding.

    `log_var_bound`: clamp of the log-variance on both sides (None leaves it unbounded, as published).
    """

    def __init__(self, encoder: GaussianEncoder, decoder: BernoulliDecoder, log_var_bound: float | None):
        super().__init__()
        self.encoder, self.decoder, self.log_var_bound = encoder, decoder, log_var_bound

    def encode(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """x (B, C, N, N) in [0, 1] -> mean and log-variance of q(z_0 | x_0), (B, S) each."""
        mean, log_var = self.encoder(x)
        if self.log_var_bound is not None:
            log_var = log_var.clamp(-self.log_var_bound, self.log_var_bound)
        return mean, log_var

    def inference(self, z: Tensor) -> Tensor:
        """z (B, S) -> pixel means (B, C, N, N)."""
        return self.decoder(z)

    def forward(self, x: Tensor, eps: Tensor | None = None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """x (B, C, N, N) -> reconstruction, mean, log-variance, sample z; `eps` (B, S) fixes the noise."""
        mean, log_var = self.encode(x)
        z = reparameterize(mean, log_var, eps)
        return self.decoder(z), mean, log_var, z


class ConvVAE(ImageVAE):
    """VAE of MNIST and Shapes3D: latent size = channel width S, images N divisible by 4."""

    def __init__(self, channels: int, width: int, size: int, log_var_bound: float | None = None):
        s = width
        encoder = GaussianEncoder(trunk(channels, s, size, 2 * s), 2 * s, s)
        decoder = BernoulliDecoder(
            [
                nn.Linear(s, s),
                View(),
                relu(),
                SpreadingConvTranspose2d(s, 2 * s, 1),
                relu(),
                SpreadingConvTranspose2d(2 * s, 3 * s, 1),
                relu(),
                SpreadingConvTranspose2d(3 * s, 2 * s, size // 4),
                relu(),
                doubling(2 * s, s),
                relu(),
                doubling(s, channels),
            ]
        )
        super().__init__(encoder, decoder, log_var_bound)


class ConvVAE2(ImageVAE):
    """VAE of Falcor3D and Isaac3D: all layers S channels wide, images N divisible by 16."""

    def __init__(self, channels: int, width: int, size: int, log_var_bound: float | None = None):
        s = width
        encoder = GaussianEncoder(deep_trunk(channels, s, size), s, s)
        layers: list[nn.Module] = [nn.Linear(s, s), View(), relu()]
        layers += [SpreadingConvTranspose2d(s, s, 1), relu(), SpreadingConvTranspose2d(s, s, 1), relu()]
        layers += [SpreadingConvTranspose2d(s, s, size // 16), relu()]
        for stage in range(4):
            last = stage == 3
            layers += [doubling(s, s), relu()]
            layers += [ConvTranspose2d(s, channels if last else s, 3, 1, 1)] + ([] if last else [relu()])
        super().__init__(encoder, BernoulliDecoder(layers), log_var_bound)


def reparameterize(mean: Tensor, log_var: Tensor, eps: Tensor | None = None) -> Tensor:
    """z = mean + eps exp(log_var / 2), (B, S); standard normal `eps` unless given."""
    return mean + (torch.randn_like(mean) if eps is None else eps) * (0.5 * log_var).exp()


class IndexEncoder(nn.Module):
    """Which one of K flows moves a whole sequence: logits of q(k | x_0..x_T) from the stacked frames (weak)."""

    def __init__(self, channels: int, width: int, size: int, count: int):
        super().__init__()
        self.encoder = trunk(channels, width, size, width)
        self.linear1 = nn.Linear(width, count)

    def forward(self, frames: Tensor) -> Tensor:
        """frames (B, (T+1) C, N, N) stacked along channels -> logits (B, K)."""
        return self.linear1(self.encoder(frames).flatten(1))


class CoefficientEncoder(nn.Module):
    """Which flows move a pair of frames, and how fast (unsupervised): spikes y and slabs g.

    `single`: one spike a flow for both its gradient and its rotational part, else one for each.
    """

    def __init__(self, channels: int, width: int, size: int, count: int, single: bool):
        super().__init__()
        self.single = single
        self.encoder = trunk(channels, width, size, width)
        if single:
            self.linear_y = nn.Linear(width, count)
        else:
            self.linear_y1 = nn.Linear(width, count)
            self.linear_y2 = nn.Linear(width, count)
        self.encoder_g = trunk(channels, width, size, width)
        self.linear_g = nn.Linear(width, count)

    def spike_logits(self, pair: Tensor) -> Tensor:
        """pair (B, 2C, N, N) -> logits (B, H, K), H = 1 (single) or 2 spikes a flow."""
        features = self.encoder(pair).flatten(1)
        heads = [self.linear_y] if self.single else [self.linear_y1, self.linear_y2]
        return torch.stack([head(features) for head in heads], dim=1)

    def slab(self, pair: Tensor) -> Tensor:
        """pair (B, 2C, N, N) -> speeds g (B, K) in (0, 2)."""
        return 2 * torch.sigmoid(self.linear_g(self.encoder_g(pair).flatten(1)))


def temperature(iteration: int) -> float:
    """Temperature of the relaxed samples: max(exp(-3e-5 i), 0.05), renewed at iterations i = 1, 101, 201, ..."""
    if iteration < 1:
        return 1.0
    return max(math.exp(-3e-5 * ((iteration - 1) // 100 * 100 + 1)), 0.05)


def gumbel_noise(uniform: Tensor) -> Tensor:
    """-log(-log U) with both logarithms kept from zero by 1e-20."""
    return -torch.log(-torch.log(uniform + 1e-20) + 1e-20)


def gumbel_softmax(logits: Tensor, tau: float | Tensor, uniform: Tensor | None = None, hard: bool = True) -> Tensor:
    """A relaxed one-hot sample (B, K); `hard` returns the one-hot of its argmax with a straight-through gradient."""
    uniform = torch.rand_like(logits) if uniform is None else uniform
    soft = torch.softmax((logits + gumbel_noise(uniform)) / tau, dim=-1)
    if not hard:
        return soft
    one_hot = F.one_hot(soft.argmax(-1), logits.shape[-1]).to(soft)
    return one_hot - soft.detach() + soft


def relaxed_bernoulli(
    logits: Tensor, tau: float | Tensor, uniform: Tensor | None = None, hard: bool = False, link: str = "logistic"
) -> Tensor:
    """A relaxed Bernoulli sample in (0, 1), any shape; `hard` rounds it with a straight-through gradient.

    `link` "logistic": binary concrete, P(y > 1/2) = sigmoid(logit). "gumbel": the published single Gumbel
    variable, P(y > 1/2) = 1 - exp(-exp(logit)).
    """
    uniform = torch.rand_like(logits) if uniform is None else uniform
    if link == "logistic":
        # the same guards as the Gumbel noise: uniform draws may be exactly zero
        noise = torch.log(uniform + 1e-20) - torch.log1p(-uniform + 1e-20)
    elif link == "gumbel":
        noise = gumbel_noise(uniform)
    else:
        raise UserError(f"unknown link {link!r} of a relaxed Bernoulli; known: logistic, gumbel")
    soft = torch.sigmoid((logits + noise) / tau)
    return (soft > 0.5).to(soft) - soft.detach() + soft if hard else soft


def spike_probability(logits: Tensor, link: str = "logistic") -> Tensor:
    """P(spike on) for the noise of `relaxed_bernoulli`: the deterministic value of the evaluation."""
    if link == "gumbel":
        return -torch.expm1(-torch.exp(logits))
    return torch.sigmoid(logits)
