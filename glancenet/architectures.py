"""Encoders, decoders and discriminators by their published names (GlanceNets, appendix A, and its parent library).

Images are (B, C, 64, 64) floats in [0, 1]. A Gaussian encoder returns (mu, logvar), each (B, z_dim); a plain one
returns z (B, z_dim). Decoders return logits (B, C, 64, 64): the pixel probabilities are their sigmoid.
"""

from functools import partial
from itertools import pairwise

import torch
from torch import Tensor, nn

from common.layers import ConvTranspose2d

IMAGE_SIZE = 64


def init_layers(module: nn.Module) -> None:
    """Xavier-normal convolutions, Kaiming-normal linear layers; biases and BatchNorm keep PyTorch's defaults."""
    for layer in module.modules():
        if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.xavier_normal_(layer.weight)
        elif isinstance(layer, nn.Linear):
            nn.init.kaiming_normal_(layer.weight)


def _convolutions(
    channels: int, widths: tuple[int, ...], kernel: int, padding: int, norm: bool = False
) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for width in widths:
        layers.append(nn.Conv2d(channels, width, kernel, 2, padding))
        layers += [nn.BatchNorm2d(width)] if norm else []
        layers.append(nn.ReLU(inplace=True))
        channels = width
    return layers


def _linears(widths: tuple[int, ...]) -> list[nn.Module]:
    layers: list[nn.Module] = []
    for n_in, n_out in pairwise(widths):
        layers += [nn.Linear(n_in, n_out), nn.ReLU(inplace=True)]
    return layers


class ConvEncoder(nn.Module):
    """Stride-2 convolutions to 1x1 and one linear layer, whose output Gaussian encoders split into (mu, logvar)."""

    widths: tuple[int, ...] = (32, 32, 64, 128, 256, 256)
    kernel, padding, norm, gaussian = 4, 1, False, True

    def __init__(self, z_dim: int, channels: int):
        super().__init__()
        self.z_dim = z_dim
        stack = _convolutions(channels, self.widths, self.kernel, self.padding, self.norm)
        n_out = 2 * z_dim if self.gaussian else z_dim
        self.main = nn.Sequential(*stack, nn.Flatten(), nn.Linear(self.widths[-1], n_out))
        init_layers(self)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor] | Tensor:
        h = self.main(x)  # (B, 2 z_dim), or (B, z_dim)
        return (h[:, : self.z_dim], h[:, self.z_dim :]) if self.gaussian else h


class SimpleGaussianConv64(ConvEncoder):
    """Six 4x4 convolutions with padding 1: 64 -> 32 -> ... -> 1."""


class SimpleConv64Encoder(SimpleGaussianConv64):
    """SimpleGaussianConv64 without the variance."""

    gaussian = False


class PadlessGaussianConv64(ConvEncoder):
    """Five 3x3 convolutions without padding: 64 -> 31 -> 15 -> 7 -> 3 -> 1."""

    widths = (32, 32, 64, 128, 256)
    kernel, padding = 3, 0


class PadlessConv64(PadlessGaussianConv64):
    """PadlessGaussianConv64 without the variance."""

    gaussian = False


class EncConv64(ConvEncoder):
    """Four 5x5 convolutions with BatchNorm, 128 to 1024 channels: 64 -> 30 -> 13 -> 5 -> 1 (CelebA)."""

    widths = (128, 256, 512, 1024)
    kernel, padding, norm = 5, 0, True


class PlainEncConv64(EncConv64):
    """EncConv64 without the variance (published as Encoder_Conv64)."""

    gaussian = False


class GaussianLinear(nn.Module):
    """Fully connected encoder with one head for mu and one for logvar."""

    widths: tuple[int, ...] = (400,)
    gaussian = True

    def __init__(self, z_dim: int, channels: int):
        super().__init__()
        self.main = nn.Sequential(nn.Flatten(), *_linears((channels * IMAGE_SIZE**2, *self.widths)))
        self.head_mu = nn.Linear(self.widths[-1], z_dim)
        self.head_logvar = nn.Linear(self.widths[-1], z_dim)
        init_layers(self)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        h = self.main(x)
        return self.head_mu(h), self.head_logvar(h)


class ShallowGaussianLinear(GaussianLinear):
    """One hidden layer of 400 units."""


class DeepGaussianLinear(GaussianLinear):
    """Hidden layers of 1000, 400, 200 and 100 units."""

    widths = (1000, 400, 200, 100)


class SimpleConv64Decoder(nn.Module):
    """z -> 1x1 -> 2 -> 6 -> 14 -> 30 -> 62 -> 64 by transposed convolutions."""

    def __init__(self, z_dim: int, channels: int):
        super().__init__()
        relu = partial(nn.ReLU, inplace=True)
        self.main = nn.Sequential(
            nn.Conv2d(z_dim, 256, 1, 2), relu(),
            ConvTranspose2d(256, 256, 4, 2, 1), relu(),
            ConvTranspose2d(256, 128, 4, 2), relu(),
            ConvTranspose2d(128, 128, 4, 2), relu(),
            ConvTranspose2d(128, 64, 4, 2), relu(),
            ConvTranspose2d(64, 64, 4, 2), relu(),
            ConvTranspose2d(64, channels, 3, 1),
        )  # fmt: skip
        init_layers(self)

    def forward(self, z: Tensor) -> Tensor:
        return self.main(z[:, :, None, None])


class LinearDecoder(nn.Module):
    """Fully connected decoder."""

    widths: tuple[int, ...] = (400,)

    def __init__(self, z_dim: int, channels: int):
        super().__init__()
        self.shape = (channels, IMAGE_SIZE, IMAGE_SIZE)
        self.main = nn.Sequential(
            *_linears((z_dim, *self.widths)), nn.Linear(self.widths[-1], channels * IMAGE_SIZE**2)
        )
        init_layers(self)

    def forward(self, z: Tensor) -> Tensor:
        return self.main(z).view(-1, *self.shape)


class ShallowLinear(LinearDecoder):
    """One hidden layer of 400 units."""


class DeepLinear(LinearDecoder):
    """Hidden layers of 100, 200, 400 and 1000 units."""

    widths = (100, 200, 400, 1000)


class DeConv64(nn.Module):
    """z (64 latents) -> 1024 x 8 x 8 -> 19 -> 41 -> 85 -> 64 by transposed convolutions with BatchNorm (CelebA)."""

    def __init__(self, z_dim: int, channels: int):
        super().__init__()
        self.project = nn.Sequential(nn.Linear(64, 1024 * 8 * 8), nn.ReLU(inplace=True))
        layers: list[nn.Module] = []
        for n_in, n_out in ((1024, 512), (512, 256), (256, 128)):
            layers += [ConvTranspose2d(n_in, n_out, 5, 2), nn.BatchNorm2d(n_out), nn.ReLU(inplace=True)]
        self.main = nn.Sequential(*layers, ConvTranspose2d(128, channels, 4, 1, 12))
        init_layers(self)

    def forward(self, z: Tensor) -> Tensor:
        return self.main(self.project(z).view(-1, 1024, 8, 8))


class SimpleDiscriminator(nn.Module):
    """MLP with LeakyReLU(0.2): (B, n_in) -> logits (B, n_out), `num_layers` linear layers of `width` units."""

    def __init__(self, n_in: int, n_out: int, num_layers: int = 6, width: int = 1000):
        super().__init__()
        layers: list[nn.Module] = []
        for i in range(num_layers - 1):
            layers += [nn.Linear(n_in if i == 0 else width, width), nn.LeakyReLU(0.2, inplace=True)]
        self.main = nn.Sequential(*layers, nn.Linear(width, n_out))
        init_layers(self)

    def forward(self, z: Tensor) -> Tensor:
        return self.main(z)


class SimpleDiscriminatorConv64(nn.Module):
    """The convolutions of SimpleConv64, then SimpleDiscriminator: images (B, C, 64, 64) -> logits (B, n_out)."""

    def __init__(self, channels: int, n_out: int, num_layers: int = 6, width: int = 1000):
        super().__init__()
        widths = SimpleGaussianConv64.widths
        self.features = nn.Sequential(*_convolutions(channels, widths, 4, 1), nn.Flatten())
        init_layers(self.features)
        self.head = SimpleDiscriminator(widths[-1], n_out, num_layers, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x))


class MultiTo2DChannel(nn.Module):
    """One MLP 1 -> 64 -> 256 -> 4096 for each label column: (B, n) -> (B, n, 64, 64) extra image channels."""

    def __init__(self, n: int):
        super().__init__()
        self.tilers = nn.ModuleList(
            nn.Sequential(
                nn.Linear(1, 64),
                nn.LeakyReLU(0.2, inplace=True),
                nn.Linear(64, 256),
                nn.LeakyReLU(0.2, inplace=True),
                nn.Linear(256, IMAGE_SIZE**2),
            )
            for _ in range(n)
        )
        init_layers(self)

    def forward(self, labels: Tensor) -> Tensor:
        planes = [tiler(labels[:, i : i + 1]) for i, tiler in enumerate(self.tilers)]
        return torch.stack(planes, dim=1).view(len(labels), -1, IMAGE_SIZE, IMAGE_SIZE)


ENCODERS: dict[str, type[nn.Module]] = {
    "SimpleConv64": SimpleConv64Encoder,
    "SimpleGaussianConv64": SimpleGaussianConv64,
    "PadlessConv64": PadlessConv64,
    "PadlessEncoder64": PadlessConv64,
    "PadlessGaussianConv64": PadlessGaussianConv64,
    "EncConv64": EncConv64,
    "Encoder_Conv64": PlainEncConv64,
    "ShallowGaussianLinear": ShallowGaussianLinear,
    "DeepGaussianLinear": DeepGaussianLinear,
}
DECODERS: dict[str, type[nn.Module]] = {
    "SimpleConv64": SimpleConv64Decoder,
    "ShallowLinear": ShallowLinear,
    "DeepLinear": DeepLinear,
    "DeConv64": DeConv64,
}
DISCRIMINATORS: dict[str, type[nn.Module]] = {
    "SimpleDiscriminator": SimpleDiscriminator,
    "SimpleDiscriminatorConv64": SimpleDiscriminatorConv64,
}
LABEL_TILERS: dict[str, type[nn.Module]] = {"MultiTo2DChannel": MultiTo2DChannel}
