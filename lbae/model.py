"""The Latent Bernoulli Autoencoder: encoder, hard quantiser with a straight-through gradient, decoder, losses.

Paper: Fajtl et al., "Latent Bernoulli Autoencoder", ICML 2020. Layer names are those of the published checkpoints.
Letters: B batch, C image channels, S image size (32 or 64), D latent bits, w base width (64 in the paper).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from common.errors import UserError

SLOPE = 0.02  # of every leaky ReLU
IMAGE_SIZES = (32, 64)  # the feature map before the code is 4x4 after three or four halvings


class _StraightThrough(torch.autograd.Function):
    """Rounding whose gradient is the identity."""

    @staticmethod
    def forward(ctx, x: Tensor, decimals: int) -> Tensor:
        if decimals < 0:
            return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)  # 0 and -0 become +1
        return torch.round(x * 10**decimals) / 10**decimals

    @staticmethod
    def backward(ctx, grad: Tensor):
        return grad, None


def quantise(x: Tensor, decimals: int = -1) -> Tensor:
    """Sign of `x` in {-1, +1} with sign(0) = +1; for `decimals` >= 0, `x` rounded half-to-even to so many decimals.

    The gradient passes unchanged. Any shape, any float dtype. (Section 3 of the paper: straight-through estimator.)
    """
    return _StraightThrough.apply(x, decimals)


class Encoded(NamedTuple):
    """What the encoder says of a batch: `code` (B, D); `logits` (B, D) and `qerr` of the binary model, or `mu` and
    `logvar` (B, D) of the VAE.
    """

    code: Tensor
    logits: Tensor | None = None
    qerr: Tensor | None = None
    mu: Tensor | None = None
    logvar: Tensor | None = None


def activate(x: Tensor) -> Tensor:
    """The leaky ReLU in the place of its input, which nothing else may need."""
    return F.leaky_relu(x, SLOPE, inplace=True)


class _Residual(nn.Module):
    """Shared by both nets: the block R(c) and the activation."""

    def residual(self, k: int, y: Tensor) -> Tensor:
        """act(bn(conv(act(bn(conv(act(y)))))) + y) with the layers b<k>1, b<k>2. y: (B, c, H, W) -> same."""
        h = F.leaky_relu(y, SLOPE)
        h = activate(self.get_submodule(f"bn{k}1")(self.get_submodule(f"b{k}1")(h)))
        return activate(self.get_submodule(f"bn{k}2")(self.get_submodule(f"b{k}2")(h)).add_(y))

    def add_residual(self, k: int, width: int, conv: type[nn.Module]) -> None:
        for part in (f"{k}1", f"{k}2"):
            setattr(self, f"b{part}", conv(width, width, 3, 1, 1, bias=False))
            setattr(self, f"bn{part}", nn.BatchNorm2d(width))


class Encoder(_Residual):
    """Images (B, C, S, S) in [0, 1] -> `Encoded`. With `vae`, two linear heads give mu and logvar instead of bits."""

    def __init__(self, img_size: int, channels: int, zsize: int, width: int = 64, vae: bool = False, zround: int = -1):
        super().__init__()
        w, self.deep, self.vae, self.zround = width, img_size == 64, vae, zround
        self.ec0, self.bn0 = nn.Conv2d(channels, w, 3, 1, 1, bias=False), nn.BatchNorm2d(w)
        self.ec1, self.bn1 = nn.Conv2d(w, w, 4, 2, 1, bias=False), nn.BatchNorm2d(w)
        self.add_residual(1, w, nn.Conv2d)
        self.ec2, self.bn2 = nn.Conv2d(w, 2 * w, 4, 2, 1, bias=False), nn.BatchNorm2d(2 * w)
        self.add_residual(2, 2 * w, nn.Conv2d)
        if self.deep:
            self.ec3, self.bn3 = nn.Conv2d(2 * w, 4 * w, 4, 2, 1, bias=False), nn.BatchNorm2d(4 * w)
            self.add_residual(3, 4 * w, nn.Conv2d)
        self.ec4 = nn.Conv2d(4 * w if self.deep else 2 * w, 4 * w, 4, 2, 1, bias=False)
        if vae:
            self.l1, self.l2 = nn.Linear(64 * w, zsize), nn.Linear(64 * w, zsize)
        else:
            self.l0l = nn.Linear(64 * w, zsize)

    def forward(self, x: Tensor) -> Encoded:
        h = activate(self.bn0(self.ec0(x)))  # (B, w, S, S)
        h = self.residual(1, self.bn1(self.ec1(h)))  # (B, w, S/2, S/2)
        h = self.residual(2, self.bn2(self.ec2(h)))  # (B, 2w, S/4, S/4)
        if self.deep:
            h = self.residual(3, self.bn3(self.ec3(h)))  # (B, 4w, S/8, S/8)
        h = self.ec4(h).flatten(1)  # (B, 4w * 4 * 4), neither normalised nor activated
        if self.vae:
            mu, logvar = _full_precision(self.l1(h)), _full_precision(self.l2(h))
            return Encoded(code=mu, mu=mu, logvar=logvar)
        logits = _full_precision(self.l0l(h))  # (B, D)
        soft = torch.tanh(logits)
        code = quantise(soft, self.zround)
        return Encoded(code=code, logits=logits, qerr=(soft - code).detach().abs().mean())


class Decoder(_Residual):
    """Codes (B, D) or (B, 1, D) -> images (B, C, S, S) in (0, 1).

    `in_channels` is the depth of the first 4x4 feature map; None takes 4w at 64 pixels and 2w at 32.
    """

    def __init__(self, img_size: int, channels: int, zsize: int, width: int = 64, in_channels: int | None = None):
        super().__init__()
        w, self.deep = width, img_size == 64
        self.in_channels = in_channels or (4 * w if self.deep else 2 * w)
        self.l1l = nn.Linear(zsize, 16 * self.in_channels)
        first = self.in_channels
        if self.deep:
            self.dc1, self.bn1 = nn.ConvTranspose2d(first, 4 * w, 4, 2, 1, bias=False), nn.BatchNorm2d(4 * w)
            self.add_residual(1, 4 * w, nn.ConvTranspose2d)
            first = 4 * w
        self.dc2, self.bn2 = nn.ConvTranspose2d(first, 2 * w, 4, 2, 1, bias=False), nn.BatchNorm2d(2 * w)
        self.add_residual(2, 2 * w, nn.ConvTranspose2d)
        self.dc3, self.bn3 = nn.ConvTranspose2d(2 * w, w, 4, 2, 1, bias=False), nn.BatchNorm2d(w)
        self.add_residual(3, w, nn.ConvTranspose2d)
        self.dc4, self.bn4 = nn.ConvTranspose2d(w, w, 4, 2, 1, bias=False), nn.BatchNorm2d(w)
        self.dc5 = nn.ConvTranspose2d(w, channels, 3, 1, 1, bias=False)

    def forward(self, z: Tensor) -> Tensor:
        h = self.l1l(z.flatten(1)).unflatten(1, (self.in_channels, 4, 4))  # no activation here
        if self.deep:
            h = self.residual(1, self.bn1(self.dc1(h)))  # (B, 4w, 8, 8)
        h = self.residual(2, self.bn2(self.dc2(h)))  # (B, 2w, S/4, S/4)
        h = self.residual(3, self.bn3(self.dc3(h)))  # (B, w, S/2, S/2)
        h = activate(self.bn4(self.dc4(h)))  # (B, w, S, S)
        return torch.sigmoid(_full_precision(self.dc5(h)))


class LBAE(nn.Module):
    """Encoder `enc` and decoder `gen` as one module. Raises UserError for an image size other than 32 or 64.

    `randn_like` draws a VAE's noise; several processes set it to one that gives what one process would draw.
    """

    def __init__(
        self,
        img_size: int,
        channels: int,
        zsize: int,
        width: int = 64,
        vae: bool = False,
        zround: int = -1,
        dec_in_channels: int | None = None,
    ):
        super().__init__()
        if img_size not in IMAGE_SIZES:
            raise UserError(
                f"img_size={img_size}: the network is built for {' or '.join(map(str, IMAGE_SIZES))} pixels"
            )
        self.zsize, self.vae = zsize, vae
        self.randn_like: Callable[[Tensor], Tensor] = torch.randn_like
        self.enc = Encoder(img_size, channels, zsize, width, vae, zround)
        self.gen = Decoder(img_size, channels, zsize, width, dec_in_channels)
        self.apply(_initialise)

    def forward(self, x: Tensor) -> tuple[Tensor, Encoded]:
        """Images (B, C, S, S) in [0, 1] -> reconstructions of the same shape, and the codes.

        The VAE draws its code mu + eps exp(logvar / 2), in evaluation too.
        """
        encoded = self.enc(x)
        z = encoded.code
        if self.vae:
            z = reparametrise(encoded.mu, encoded.logvar, self.randn_like(encoded.mu))
        return self.gen(z), encoded


def _full_precision(x: Tensor) -> Tensor:
    """Half types become float32: quantiser, sigmoid and losses never run in half precision."""
    return x.float() if x.dtype in (torch.bfloat16, torch.float16) else x


def _initialise(module: nn.Module) -> None:
    if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
        nn.init.normal_(module.weight, 0.0, 0.02)


def build_model(params: Any) -> LBAE:
    """The network that the options (`lbae.options.Params`) describe, freshly initialised."""
    return LBAE(
        params.img_size, params.channels, params.zsize, params.width, params.vae, params.zround,
        params.dec_in_channels or None,
    )  # fmt: skip


def to_device(model: LBAE, device: torch.device) -> LBAE:
    """The model on `device`, its weights laid out as the images are (channels last, but on MPS)."""
    return model.to(device) if device.type == "mps" else model.to(device, memory_format=torch.channels_last)


def reparametrise(mu: Tensor, logvar: Tensor, eps: Tensor) -> Tensor:
    """A draw mu + eps exp(logvar / 2) of N(mu, exp(logvar)), eps ~ N(0, 1). All (B, D)."""
    return mu + eps * torch.exp(logvar / 2)


def reconstruction_loss(xr: Tensor, x: Tensor, binary: bool) -> Tensor:
    """Loss of each image (B,), summed over pixels: binary cross entropy (each log clamped at -100), or squared error.

    xr, x: (B, C, S, S) in [0, 1]; no gradient flows into x.
    """
    if binary:
        # torch's kernel refuses NaN (on CUDA it ends the process); here a NaN has to reach the loss
        entropy = F.binary_cross_entropy(torch.nan_to_num(xr, nan=0.5), x, reduction="none")
        return (entropy + 0 * xr).flatten(1).sum(1)
    return (xr - x).square().flatten(1).sum(1)


def kl_divergence(mu: Tensor, logvar: Tensor, clamp: bool = False) -> Tensor:
    """KL(N(mu, exp(logvar)) || N(0, I)) of each image (B,), in nats. `clamp` limits both to [-10, 10] (in training)."""
    if clamp:
        mu, logvar = mu.clamp(-10, 10), logvar.clamp(-10, 10)
    return -0.5 * (1 + logvar - mu.square() - logvar.exp()).sum(1)


def losses(
    xr: Tensor, x: Tensor, encoded: Encoded, binary: bool, kl_weight: float = 0.0, training: bool = True
) -> dict[str, Tensor]:
    """Per-image terms (B,): `reco_loss`, for a VAE `kld_loss` = kl_weight / D * KL, and `loss`, their sum."""
    terms = {"reco_loss": reconstruction_loss(xr, x, binary)}
    if encoded.mu is not None:
        kl = kl_divergence(encoded.mu, encoded.logvar, clamp=training)
        terms["kld_loss"] = kl_weight / encoded.mu.shape[1] * kl
    terms["loss"] = sum(terms.values())
    return terms


def parameter_counts(model: LBAE) -> dict[str, int]:
    """Trainable parameters of the encoder, the decoder, and both."""
    counts = {part: sum(p.numel() for p in getattr(model, part).parameters()) for part in ("enc", "gen")}
    return {**counts, "total": sum(counts.values())}
