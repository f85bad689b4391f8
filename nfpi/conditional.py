"""A flow with its class Gaussians: likelihood, Bayes' rule, class-conditional sampling, the weights file."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.checkpoint import load_into, load_state, load_weights, save_weights
from common.errors import UserError
from nfpi.gaussians import ClassGaussians, marginal_log_prior, negative_log_likelihood
from nfpi.label_encoder import DistancedPixels
from nfpi.layers import postprocess, preprocess
from nfpi.model import FlowConfig, Latent, MultiScaleFlow

STATE_KIND = "nfpi-training"


@dataclass
class ConditionalFlow:
    """p(x | y) of images x in [0, 1], (B, C, H, W), and labels y in 0..K-1.

    `codes`: the band of pixels that tells the class, for the methods conditioned on images; None otherwise.
    `pixel_noise`: in training and tests images got uniform noise in [0, pixel_noise); generated ones carry it.
    `class_names`: of the labels; empty where the set has none.
    """

    flow: MultiScaleFlow
    gaussians: ClassGaussians
    bits: int = 8
    codes: DistancedPixels | None = None
    pixel_noise: float = 0.0
    class_names: tuple[str, ...] = ()

    @property
    def classes(self) -> int:
        """K."""
        return len(self.gaussians.mean)

    @property
    def dim(self) -> int:
        """D of the flow's input: the divisor of bits a dimension."""
        return self.flow.config.dim

    @property
    def knows_classes(self) -> bool:
        """False for the single-Gaussian model without codes, which is unconditional."""
        return not self.gaussians.shared or self.codes is not None

    @property
    def device(self) -> torch.device:
        """Where the Gaussians lie."""
        return self.gaussians.mean.device

    def input(self, x: Tensor, y: Tensor, noise: Tensor | float) -> Tensor:
        """The flow's input in [-1, 1]: class band appended where there is one, dequantised by `noise` in [0, 1)."""
        x = self.codes.encode(x, y) if self.codes else x
        return preprocess(x.to(self.gaussians.mean.dtype), noise, self.bits)

    def latent_nll(self, latent: Latent, y: Tensor) -> Tensor:
        """-log p(x | y) in nats, (B,), of a forward pass of the flow: the training objective a sample."""
        log_prior = self.gaussians.log_prob(latent.z, y)
        return negative_log_likelihood(log_prior, latent.log_det, latent.log_p, self.dim, self.bits)

    def nll(self, x: Tensor, y: Tensor, noise: Tensor | float) -> tuple[Tensor, Tensor]:
        """(-log p(x | y) in nats (B,), z (B, d)) of images."""
        latent = self.flow(self.input(x, y, noise))
        return self.latent_nll(latent, y), latent.z

    @torch.no_grad()
    def scores(self, x: Tensor, noise: Tensor | float) -> Tensor:
        """log p(x | k) of every class, (B, K) float64.

        One pass through the flow; K passes when the class is told in the image.
        """
        if self.codes:
            columns = [-self.nll(x, torch.full((len(x),), k, device=x.device), noise)[0] for k in range(self.classes)]
            return torch.stack(columns, 1).cpu().double()
        latent = self.flow(self.input(x, torch.zeros(len(x), dtype=torch.long, device=x.device), noise))
        logits = self.gaussians.logits(latent.z)
        rest = negative_log_likelihood(
            torch.zeros_like(latent.log_det), latent.log_det, latent.log_p, self.dim, self.bits
        )
        return logits - rest.to(logits)[:, None]

    @torch.no_grad()
    def sample(
        self, y: Tensor, temperature: float = 1.0, generator: torch.Generator | None = None
    ) -> tuple[Tensor, Tensor]:
        """(images in [0, 1], their labels) for the wanted classes y (B,).

        z ~ N(mu_y, T^2 diag v_y), inverted, cut to whole grey levels; split-off halves are drawn at T as well. Where
        the class is told in the image, the label is read from the sampled band and the band is taken off.
        """
        y = y.to(self.device)
        z = self.gaussians.sample(y, temperature, generator)
        x = self.flow.inverse(z, temperature, generator)
        if self.codes:
            x01 = (x * 0.5 + 0.5).clamp(0, 1)
            return postprocess(self.codes.remove(x), self.bits), self.codes.decode(x01)
        return postprocess(x, self.bits), y

    @contextmanager
    def evaluating(self) -> Iterator["ConditionalFlow"]:
        """Evaluation mode inside the block."""
        training = self.flow.training
        self.flow.eval()
        try:
            yield self
        finally:
            self.flow.train(training)

    def facts(self) -> dict[str, Any]:
        """What a weights file says of the model: its architecture, and every field that is no tensor."""
        about = {"shared": self.gaussians.shared, "bits": self.bits, "pixel_noise": self.pixel_noise}
        return {"flow": self.flow.config.as_dict(), **about, "class_names": list(self.class_names)}

    def save(self, path: str | Path, **facts) -> None:
        """The weights file for inference (.safetensors) and its .json."""
        tensors = {f"flow.{k}": v for k, v in self.flow.state_dict().items()}
        tensors |= {f"gaussians.{k}": v for k, v in self.gaussians.state_dict().items()}
        if self.codes:
            tensors["codes"] = self.codes.codes
        save_weights(path, tensors, self.facts() | facts)

    @classmethod
    def load(cls, path: str | Path, device: torch.device | str = "cpu") -> "ConditionalFlow":
        """Read what `save` or the converter wrote, or the averaged weights of a training state (.pt).

        Raises UserError for missing, damaged and foreign files.
        """
        if Path(path).suffix == ".ckpt":
            raise UserError(
                f"{path}: convert a published checkpoint first, python nfpi/convert_checkpoint.py {path} OUT"
            )
        tensors, config = _of_state(path) if Path(path).suffix == ".pt" else load_weights(path)
        try:
            flow, bits = MultiScaleFlow(FlowConfig(**config["flow"])), int(config.get("bits", 8))
            noise, names = float(config.get("pixel_noise", 0.0)), tuple(map(str, config.get("class_names", ())))
            mean, var = tensors["gaussians.mean"], tensors["gaussians.var"]
            shaped = mean.shape == var.shape == (len(mean), flow.config.latent_dim)
            if not (shaped and 1 <= bits <= 8 and 0 <= noise <= 1 and len(names) in (0, len(mean))):
                raise ValueError(f"Gaussians {tuple(mean.shape)}, bits {bits}, pixel_noise {noise}, names {names}")
        except (KeyError, TypeError, ValueError, AttributeError, IndexError, RuntimeError) as error:
            raise UserError(f"{path} is not a weights file of nfpi, or is damaged ({str(error)[:80]})") from error
        own = {k.removeprefix("flow."): v for k, v in tensors.items() if k.startswith("flow.")}
        load_into(flow.to(mean.dtype), own, path)
        gaussians = ClassGaussians(mean, var, bool(config.get("shared", False)))
        codes = DistancedPixels(tensors["codes"].to(device)) if "codes" in tensors else None
        return cls(flow.to(device).eval(), gaussians.to(device), bits, codes, noise, names)


def _of_state(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """Tensors and config, as in a weights file, of a full training state."""
    state = load_state(path, kind=STATE_KIND)
    try:
        weights, ema, codes = state["flow"], state.get("ema"), state.get("codes")
        if ema is not None and bool(ema["initted"]):
            weights = {k.removeprefix("ema_model."): v for k, v in ema.items() if k.startswith("ema_model.")}
        tensors = {f"flow.{k}": v for k, v in weights.items()}
        tensors |= {f"gaussians.{k}": v for k, v in state["gaussians"].items()}
        return tensors | ({} if codes is None else {"codes": codes}), state["model_config"]
    except (KeyError, TypeError, AttributeError, RuntimeError) as error:
        raise UserError(f"{path} is no training state of nfpi, or is damaged ({error})") from error


def marginal_nll(scores: Tensor) -> Tensor:
    """-log p(x) = -log 1/K sum_k p(x | k) in nats, from `ConditionalFlow.scores`: (B, K) -> (B,)."""
    return -marginal_log_prior(scores)
