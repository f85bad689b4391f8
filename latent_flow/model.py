"""The model of all variants, and one training step of each: networks -> coefficients -> rollout -> losses.

Axes: T steps, B samples, C channels, N pixels a side, K flows, D latent units, H spike heads.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated, Literal, Self

import torch
from annotated_types import Ge, Gt, Le, Lt
from pydantic import AfterValidator, model_validator
from torch import Tensor, nn

from common.errors import UserError
from common.launch import Distributed
from common.options import Count, NonNegative, Options, Says, Whole
from latent_flow import objective
from latent_flow.baselines import TRANSITIONS
from latent_flow.encoders import (
    CoefficientEncoder,
    ConvVAE,
    ConvVAE2,
    IndexEncoder,
    gumbel_softmax,
    relaxed_bernoulli,
    reparameterize,
    spike_probability,
    temperature,
)
from latent_flow.fields import DiffusionPrior
from latent_flow.flow_field import FlowField
from latent_flow.objective import Coefficients
from latent_flow.rollout import constant_coefficients, rollout

VARIANTS = ("supervised", "weakly", "unsupervised")


def _even(size: int) -> int:
    if size % 2:
        raise ValueError("expected an even number of at least 4 (the time embedding halves it)")
    return size


LatentSize = Annotated[int, Ge(4), Le(2048), AfterValidator(_even), Says("an even number from 4 to 2048")]
ImageSize = Annotated[int, Ge(4), Le(1024)]
Width = Annotated[int, Ge(1), Le(4096)]
Probability = Annotated[float, Gt(0), Lt(1)]


class Config(Options):
    """Everything that defines a model and its objective; stored in checkpoints. Defaults: supervised MNIST."""

    variant: Literal["supervised", "weakly", "unsupervised"] = "supervised"
    dataset: str = "mnist"
    flows: Annotated[int, Ge(1)] = 3  # K
    steps: Annotated[int, Ge(1)] = 8  # T
    channels: Annotated[int, Ge(1), Le(3)] = 3
    image_size: ImageSize = 28
    latent_size: LatentSize = 324
    deep: bool = False  # ConvVAE2 (Falcor3D, Isaac3D)
    index_width: Whole = 0  # channel width of the index or coefficient encoder; 0: the papers' (latent size; 100)
    frame_stride: Annotated[int, Ge(1)] = 1  # pictures from frame to frame (frames)
    single_control: bool = False
    field: Literal["soft", "divfree"] = "soft"  # rotational field of the unsupervised variant
    objective: Literal["paper", "upstream"] = "paper"
    logdet: Literal["rowsum", "trace", "hutchinson", "exact"] = "hutchinson"
    logdet_terms: Annotated[int, Ge(1)] = 2
    path_kl: Literal["shared", "marginal"] = "shared"  # see `objective.py`
    decode_frames: Annotated[int, Ge(1)] | None = None  # of a sequence, in a training step; None: all
    transition: Literal["flow", "linear", "free"] = "flow"  # what moves the latents; see `baselines.py`
    diffusion: NonNegative = 1.0
    index_weight: NonNegative = 20.0
    entropy_weight: NonNegative = 0.0
    index_labels: bool = False
    spike_weight: NonNegative = 1.0
    p_on: Probability = 0.1
    p_stay: Probability = 0.9
    slab_start: Count = 75001

    @model_validator(mode="after")
    def _has_a_determinant(self) -> Self:
        if self.logdet == "rowsum" and self.objective == "paper" and self.path_kl == "marginal":
            raise ValueError("--logdet rowsum is no determinant: use it with --objective upstream only")
        if self.transition != "flow" and (self.objective == "upstream" or self.path_kl == "marginal"):
            raise ValueError(f"--transition {self.transition}: --objective upstream and --path-kl marginal need flows")
        return self


class LatentFlow(nn.Module):
    """VAE, flows, prior, and (weakly, unsupervised) the encoder that infers the coefficients."""

    def __init__(self, config: Config):
        super().__init__()
        self.config = config
        c, s, n, k = config.channels, config.latent_size, config.image_size, config.flows
        bound = 10.0 if config.objective == "paper" else None
        self.vae = (ConvVAE2 if config.deep else ConvVAE)(c, s, n, bound)
        unsupervised = config.variant == "unsupervised"
        if config.transition == "flow":
            self.support_sets = FlowField(k, s, config.field if unsupervised else None)
        else:
            self.support_sets = TRANSITIONS[config.transition](k, s)
        self.prior = DiffusionPrior(k, config.steps) if config.objective == "upstream" else None
        self.reconstructor = None
        if config.variant == "weakly":
            self.reconstructor = IndexEncoder(c * (config.steps + 1), config.index_width or s, n, k)
        elif unsupervised:
            self.reconstructor = CoefficientEncoder(2 * c, config.index_width or 100, n, k, config.single_control)

    @property
    def link(self) -> str:
        """Noise of the relaxed spikes: logistic, or the published single Gumbel variable."""
        return "gumbel" if self.config.objective == "upstream" else "logistic"

    def stacked(self, steps: int, only: list[int] | None = None):
        """The flows ready for the times 0..`steps`."""
        return self.support_sets.stacked(steps, only)

    def pairs(self, frames: Tensor) -> Tensor:
        """Consecutive frames (T+1, B, C, N, N) side by side: (T * B, 2C, N, N)."""
        return torch.cat([frames[:-1], frames[1:]], dim=2).flatten(0, 1)

    @torch.no_grad()
    def infer(self, frames: Tensor, slab: bool = True) -> tuple[Coefficients, Tensor]:
        """Coefficients without noise, and what was inferred, from frames (T+1, B, C, N, N).

        Weakly: argmax of q(k | x_0..x_T), and the probabilities (B, K). Unsupervised: spikes that are more
        likely on than off, times speeds when `slab`, and the spike probabilities (T, H, B, K).
        """
        steps, batch = len(frames) - 1, frames.shape[1]
        count = self.config.flows
        if self.config.variant == "weakly":
            # a sequence longer than the trained one is judged by its first T+1 frames
            stacked = frames[: self.config.steps + 1].transpose(0, 1).flatten(1, 2)
            q = torch.softmax(self.reconstructor(stacked), dim=-1)
            return Coefficients(constant_coefficients(q.argmax(-1), count, steps, frames.dtype)), q
        if self.config.variant == "supervised":
            raise UserError("a supervised model infers no coefficients: it is given the flow")
        pairs = self.pairs(frames)
        probability = spike_probability(self.reconstructor.spike_logits(pairs), self.link)
        probability = probability.unflatten(0, (steps, batch)).transpose(1, 2)  # (T, H, B, K)
        spikes = (probability > 0.5).to(frames)
        speed = self.reconstructor.slab(pairs).unflatten(0, (steps, batch)) if slab else 1.0
        c1 = spikes[:, 0] * speed
        return Coefficients(c1, c1 if self.config.single_control else spikes[:, 1] * speed), probability


@dataclass
class Noise:
    """Fixed random numbers of one step, for tests: eps (B, D), uniform (B, K) or (T, H, B, K), a temperature, and which
    frames are decoded (N, B).
    """

    eps: Tensor | None = None
    uniform: Tensor | None = None
    tau: float | Tensor | None = None
    decoded: Tensor | None = None


def training_step(
    model: LatentFlow,
    frames: Tensor,
    labels: Tensor | int | None = None,
    iteration: int = 1,
    noise: Noise | None = None,
    amp: bool = False,
    generator: torch.Generator | None = None,
    dist: Distributed | None = None,
) -> dict[str, Tensor]:
    """Losses of one batch of frames (T+1, B, C, N, N) in [0, 1]: the entries of `objective.LOSSES`, and
    `active_units`, scalars.

    labels: the flow of each sample (B,), or one number for the whole batch (then only that flow is evaluated);
    needed by the supervised variant and by `index_labels`. `amp`: bfloat16 in the convolutional networks only.
    `generator`: source of the log-determinant's probes. `dist`: processes that share the work of the convolutional
    networks; each is given the whole batch, draws the same noise and returns the same losses.
    """
    config, noise = model.config, noise or Noise()
    steps, batch = len(frames) - 1, frames.shape[1]
    upstream = config.objective == "upstream"
    network = Network(frames.device.type, frames.dtype, amp, dist or Distributed(frames.device))
    mean, log_var = network(model.vae.encode, frames[0])
    z = reparameterize(mean, log_var, noise.eps)

    losses = {name: frames.new_zeros(()) for name in objective.LOSSES}
    only = [labels] if isinstance(labels, int) and config.variant == "supervised" else None
    if config.variant == "supervised":
        if only is not None:
            coefficients = Coefficients(frames.new_ones(steps, batch, 1))
        else:
            coefficients = Coefficients(constant_coefficients(labels, config.flows, steps, frames.dtype))
    elif config.variant == "weakly":
        coefficients = _weak_coefficients(model, frames, labels, iteration, noise, network, losses)
    else:
        coefficients = _sparse_coefficients(model, frames, iteration, noise, network, losses)

    flows = model.stacked(steps, only)
    with_log_det = not upstream and config.path_kl == "marginal"
    path = rollout(
        flows,
        z,
        coefficients.c1,
        coefficients.c2,
        config.logdet if with_log_det else "none",
        config.logdet_terms,
        generator,
    )

    latents, targets = path.z, frames
    if config.decode_frames is not None:
        # another few of the T+1 frames for each sample, their sum scaled to all: the mean over draws is the whole term
        order = (
            torch.rand(steps + 1, batch, device=frames.device).argsort(0) if noise.decoded is None else noise.decoded
        )
        chosen = order[: config.decode_frames], torch.arange(batch, device=frames.device)
        latents, targets = path.z[chosen], frames[chosen]
    logits = network(model.vae.decoder.logits, latents.flatten(0, 1))  # all frames in one call
    scale = (steps + 1) / len(latents)
    losses["loss_recon"] = scale * objective.reconstruction(logits.unflatten(0, latents.shape[:2]), targets)
    losses["loss_kl0"] = objective.gaussian_kl(mean, log_var).mean()
    if upstream:
        losses["loss_pde"] = objective.upstream_pde_loss(path, flows, coefficients)
        rho, rho_t = objective.upstream_densities(path, model.prior, mean, log_var, coefficients, only)
        losses["loss_kl_path"] = objective.upstream_path_kl(rho, rho_t).sum()
    elif config.transition == "flow":
        losses["loss_pde"] = objective.pde_loss(path, flows, coefficients)
        if with_log_det:
            losses["loss_kl_path"] = objective.path_kl(path, mean, log_var, config.diffusion).sum()
    losses["loss_total"] = sum(value for name, value in losses.items() if name != "loss_total")
    losses["active_units"] = objective.active_units(mean, log_var)
    return losses


@dataclass
class Network:
    """How a convolutional network is called: in bfloat16 with `amp`, by all processes together."""

    device: str
    dtype: torch.dtype
    amp: bool
    dist: Distributed

    def __call__(self, network: Callable[[Tensor], Tensor | tuple[Tensor, ...]], x: Tensor):
        """network(x) in the type of the frames."""

        def call(rows: Tensor) -> Tensor | tuple[Tensor, ...]:
            with torch.autocast(self.device, torch.bfloat16, enabled=self.amp):
                out = network(rows)
            return out.to(self.dtype) if isinstance(out, Tensor) else tuple(part.to(self.dtype) for part in out)

        return self.dist.over_rows(call, x)


def _weak_coefficients(model, frames, labels, iteration, noise, network, losses) -> Coefficients:
    """Infer one flow a sequence (straight-through one-hot) and add the index loss."""
    config = model.config
    logits = network(model.reconstructor, frames.transpose(0, 1).flatten(1, 2))
    tau = temperature(iteration) if noise.tau is None else noise.tau
    one_hot = gumbel_softmax(logits, tau, noise.uniform)
    if config.objective == "upstream":
        losses["loss_index"] = objective.upstream_index_loss(one_hot)
    elif config.index_labels:
        target = torch.full((len(logits),), labels, device=logits.device) if isinstance(labels, int) else labels
        losses["loss_index"] = config.index_weight * torch.nn.functional.cross_entropy(logits, target)
    else:
        losses["loss_index"] = config.index_weight * objective.index_loss(logits, config.entropy_weight)
    return Coefficients(one_hot.expand(len(frames) - 1, -1, -1))


def _sparse_coefficients(model, frames, iteration, noise, network, losses) -> Coefficients:
    """Infer spikes (and from `slab_start` on speeds) of every step and add their divergences."""
    config = model.config
    steps, batch = len(frames) - 1, frames.shape[1]
    slab_on = iteration >= config.slab_start
    pairs = model.pairs(frames)
    logits = network(model.reconstructor.spike_logits, pairs)
    speed = network(model.reconstructor.slab, pairs) if slab_on else None
    logits = logits.unflatten(0, (steps, batch)).transpose(1, 2)  # (T, H, B, K)
    tau = temperature(iteration) if noise.tau is None else noise.tau
    spikes = relaxed_bernoulli(logits, tau, noise.uniform, link=model.link)
    if config.objective == "upstream":
        losses["loss_spike"] = objective.upstream_spike_loss(spikes, config.p_on, config.p_stay)
    else:
        losses["loss_spike"] = config.spike_weight * objective.spike_loss(logits, spikes, config.p_on, config.p_stay)
    if slab_on:
        speed = speed.unflatten(0, (steps, batch))
        losses["loss_slab"] = objective.slab_loss(speed)
    c1 = spikes[:, 0] * speed if slab_on else spikes[:, 0]
    if config.single_control:
        return Coefficients(c1, c1)
    return Coefficients(c1, spikes[:, 1] * speed if slab_on else spikes[:, 1])
