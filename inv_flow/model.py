"""The flow of the papers: L levels of (squeeze, K steps, split prior) between the pixels and a standard normal.

A step is [ActNorm] [self-normalising 1x1] [FInC unit] [Emerging] [ConvExp] [inverse convolution] [activation] [Conv1x1]
Coupling; the configuration says which of the bracketed layers are there. The comparison models of the papers differ in
that choice alone.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from common.errors import UserError
from inv_flow.layers.activations import make_activation
from inv_flow.layers.actnorm import ActNorm
from inv_flow.layers.conv1x1 import Conv1x1
from inv_flow.layers.convexp import ConvExp
from inv_flow.layers.coupling import Coupling, SplitPrior
from inv_flow.layers.emerging import Emerging
from inv_flow.layers.flow import FlowSequential, ModifiedGradFlowLayer, encode_through, standard_normal_log_prob
from inv_flow.layers.inv_conv import InverseConv2d, InverseConvUnit, MaskedConv2d
from inv_flow.layers.preprocess import Dequantization, Flatten, Pad2d, Squeeze, preprocessing
from inv_flow.layers.selfnorm import SelfNormConv, SelfNormFC
from inv_flow.train.config import Config
from inv_flow.utils.inv_conv_cuda import ORDERS


class FlowModel(FlowSequential):
    """A `FlowSequential` on integer images (B, C, H, W) in 0..levels-1 that knows its latent shapes."""

    def __init__(
        self,
        layers: list[nn.Module],
        image_size: tuple[int, int, int],
        latent_sizes: list[tuple[int, ...]],
        levels: int,
    ):
        super().__init__(layers)
        self.image_size, self.latent_sizes, self.levels = image_size, latent_sizes, levels
        # the layers from here on act on real numbers
        self.continuous = next(i for i, layer in enumerate(self.layers) if isinstance(layer, Dequantization)) + 1

    def dequantize(self, x: Tensor, rand_like: Callable[[Tensor], Tensor] = torch.rand_like) -> Tensor:
        """x + u of integer images (B, C, H, W), padded where the flow pads; `rand_like` draws u in [0, 1)."""
        for layer in list(self.layers)[: self.continuous]:
            x = layer(x, rand_like(x))[0] if isinstance(layer, Dequantization) else layer(x)[0]
        return x

    def density(self) -> FlowSequential:
        """The flow on what `dequantize` returns."""
        return FlowSequential(self.layers[self.continuous :])

    def encode(self, x: Tensor, rand_like: Callable[[Tensor], Tensor] = torch.rand_like) -> tuple[list[Tensor], Tensor]:
        """x (B, C, H, W) -> (latents, sum of all log-determinants (B,))."""
        return encode_through(list(self.layers)[self.continuous :], self.dequantize(x, rand_like))

    def forward(
        self, x: Tensor, rand_like: Callable[[Tensor], Tensor] = torch.rand_like
    ) -> tuple[list[Tensor], Tensor]:
        """x (B, C, H, W) -> (latents, log p(x) in nats (B,)), with one draw of the dequantisation noise."""
        latents, log_det = self.encode(x, rand_like)
        return latents, log_det + sum(standard_normal_log_prob(z) for z in latents)

    def sample_images(self, n: int, temperature: float = 1.0) -> Tensor:
        """n images (n, C, H, W) of integers in 0..levels-1; every latent is temperature * N(0, I)."""
        return self.sample(n, self.latent_sizes, temperature).clamp(0, self.levels - 1)

    @property
    def padding_note(self) -> str:
        """What bits per dimension count, in words, where the images are padded; else ""."""
        if not isinstance(self.layers[0], Pad2d):
            return ""
        channels, height, width = self.image_size
        left, right, top, bottom = self.layers[0].padding
        padded = f"{height + top + bottom}x{width + left + right}"
        return (f"images {channels}x{height}x{width} are padded to {padded} so that they squeeze; bits/dim count the "
                f"{math.prod(self.image_size):,} real dimensions")  # fmt: skip

    def set_exact(self, exact: bool) -> None:
        """Let self-normalising layers use the exact log-determinant and inverse (True) or the learned ones (False)."""
        for module in self.modules():
            if isinstance(module, ModifiedGradFlowLayer):
                module.exact = exact

    def self_norm_layers(self) -> list[SelfNormConv]:
        """The layers that have a reconstruction loss."""
        return [module for module in self.modules() if isinstance(module, SelfNormConv)]


def step_order(config: Config, index: int) -> str:
    """The scan order of the inverse convolution of step `index`, counted over the whole flow."""
    if config.order == "alternate":
        return ("TL", "BR")[index % 2]
    if config.order == "cycle":
        return ORDERS[index % 4]
    return config.order


def flow_step(config: Config, size: tuple[int, int, int], index: int, last: bool) -> list[nn.Module]:
    """The layers of one step on images of `size` (C, H, W)."""
    channels, kernel = size[0], config.if_kernel_size
    stability = {"init_std": config.init_std, "max_row_sum": config.max_row_sum}
    layers: list[nn.Module] = []
    if config.actnorm:
        layers.append(ActNorm(channels))
    if config.snf:
        layers.append(SelfNormConv(channels, config.snf_kernel_size))
    if config.ff:
        if channels % 4:
            raise UserError(f"ff: a FInC unit needs a multiple of 4 channels, this level has {channels}")
        layers += [MaskedConv2d(channels, kernel, ORDERS, groups=4, **stability) for _ in range(config.ff_units)]
    if config.emerging:
        layers.append(Emerging(channels, kernel, config.max_row_sum))
    if config.convexp:
        layers.append(ConvExp(size, add_maps=config.convexp_maps))
    for twin in range(config.inv_conv + config.inv_conv_no_pad):
        layers.append(InverseConv2d(channels, kernel, step_order(config, index + twin), config.groups, **stability))
    if config.inv_flow:
        how = {"split": True} if config.groups == 4 else {"groups": config.groups}
        layers.append(InverseConvUnit(channels, kernel, **how, **stability))
    if config.activation != "Identity" and not (last and not config.last_activation):
        layers.append(
            make_activation(config.activation, size, config.n_bins, config.tail_bound, config.individual_weights)
        )
    if config.conv1x1:
        layers.append(Conv1x1(channels))
    if config.coupling_width:
        layers.append(Coupling(channels, config.coupling_width, config.coupling, config.amp))
    if not layers:
        raise UserError("a step without any layer: switch on a convolution, an activation or the coupling")
    return layers


def fully_connected(config: Config, layers: list[nn.Module], size: tuple[int, int, int]) -> FlowModel:
    """The fully connected flow of the SNF experiments: `layers`, then linear layers and activations on (B, C H W)."""
    features, depth = math.prod(size), config.num_blocks * config.steps
    layers.append(Flatten(size))
    for index in range(depth):
        layers.append(SelfNormFC(features))
        if config.activation != "Identity" and (config.last_activation or index < depth - 1):
            layers.append(
                make_activation(
                    config.activation, (features,), config.n_bins, config.tail_bound, config.individual_weights
                )
            )
    return FlowModel(layers, config.image_size, [(features,)], config.levels)


def create_model(config: Config) -> FlowModel:
    """The flow of `config`. Raises UserError for a size that does not squeeze and for steps without layers."""
    if config.image_size is None or len(config.image_size) != 3:
        raise UserError(f"image_size={config.image_size}: expected channels,height,width")
    channels, height, width = config.image_size
    height, width = height + 2 * config.padding, width + 2 * config.padding
    bottom = right = 0
    if config.dataset == "folder" and not config.fc:  # images of any size
        multiple = 2 ** (config.num_blocks - (not config.first_squeeze))
        bottom, right = -height % multiple, -width % multiple
    pad = config.padding or bottom or right
    layers: list[nn.Module] = [Pad2d(config.padding, bottom, right)] if pad else []
    layers += preprocessing(config.alpha, config.levels)
    height, width = height + bottom, width + right
    if config.fc:
        return fully_connected(config, layers, (channels, height, width))
    latents, index, total = [], 0, config.num_blocks * config.steps
    for block in range(config.num_blocks):
        if block or config.first_squeeze:
            if height % 2 or width % 2:
                raise UserError(
                    f"num_blocks={config.num_blocks}: level {block} is {height}x{width}, which does not squeeze; "
                    "lower num_blocks, or pad the images (28x28 with 2 on each side squeezes five times)"
                )
            layers.append(Squeeze())
            channels, height, width = 4 * channels, height // 2, width // 2
        for _ in range(config.steps):
            layers += flow_step(config, (channels, height, width), index, last=index == total - 1)
            index += 1
        if config.split_prior and block < config.num_blocks - 1:
            layers.append(SplitPrior(channels, config.split_width, config.coupling, config.amp))
            channels //= 2
            latents.append((channels, height, width))
    latents.append((channels, height, width))
    return FlowModel(layers, config.image_size, latents, config.levels)
