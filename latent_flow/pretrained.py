"""A trained latent flow in one line: `latent_flow.load("mnist_supervised_d16")`."""

from pathlib import Path

import torch
from torch import Tensor, nn

from common.given import as_tensor, floats, whole
from common.launch import pick_device
from common.released import named, weights_file
from latent_flow.data import SWEPT, TESTED
from latent_flow.model import LatentFlow
from latent_flow.runs import load_run, need_flows
from latent_flow.transforms import NAMES


class FlowAutoencoder(nn.Module):
    """Images (B, C, N, N) in [0, 1], latents (B, D), and K flows that move latents in time. In evaluation mode.

    Arrays and tensors of any float type are taken; UserError for other shapes, types and values, in one line.
    """

    def __init__(self, model: LatentFlow):
        super().__init__()
        self.model, self.config = model, model.config.as_dict()
        self.image_shape = (model.config.channels, model.config.image_size, model.config.image_size)

    @property
    def class_names(self) -> tuple[str, ...]:
        """None: nothing is classified."""
        return ()

    @property
    def concept_names(self) -> tuple[str, ...]:
        """Names of the flows, in the order of their numbers: transformations, or factors that are swept."""
        config = self.model.config
        known = SWEPT.get(config.dataset, NAMES if config.dataset in TESTED else ())[: config.flows]
        whole = config.variant == "supervised" and len(known) == config.flows
        return known if whole else tuple(f"flow {k}" for k in range(config.flows))

    def encode(self, images: Tensor) -> Tensor:
        """Images float (B, C, N, N) in [0, 1] -> posterior means z_0 (B, D)."""
        return self.model.vae.encode(floats(images, "images", ("B", *self.image_shape), self._weight, (0, 1)))[0]

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, D) -> images (B, C, N, N) in (0, 1)."""
        return torch.sigmoid(self.model.vae.decoder.logits(self._latents(latents)))

    def forward(self, images: Tensor) -> Tensor:
        """The reconstruction of images."""
        return self.decode(self.encode(images))

    @torch.no_grad()
    def move(self, latents: Tensor, weights: Tensor, steps: int | None = None) -> Tensor:
        """Latents (B, D) along the flows with `weights`: (K,) the same at all times, or (T, K) one row a step.

        steps: T (default: as trained). Returns z_0..z_T, (T + 1, B, D). One flow is a one-hot row; several at once
        superpose, other rows at other times switch. Raises UserError for other shapes and values.
        """
        latents, weights = self._latents(latents), as_tensor(weights, "weights")
        steps = self.model.config.steps if steps is None else whole(steps, "steps")
        return self.model.support_sets.rollout(
            latents, weights.to(latents), len(weights) if weights.ndim == 2 else steps
        )

    def _latents(self, values: Tensor) -> Tensor:
        return floats(values, "latents", ("B", self.model.config.latent_size), self._weight)

    @property
    def _weight(self) -> Tensor:
        return next(self.parameters())


def load(name: str | Path, device: str = "cpu") -> FlowAutoencoder:
    """The model of a file that ships (its name), of a run's folder, or of any file that `evaluate --exp` reads.

    Raises UserError for a missing, damaged or foreign one.
    """
    path = Path(name) if named(name).is_dir() else weights_file("latent_flow", name)
    model, _, _ = load_run(path, pick_device(device))
    need_flows(model, path)
    return FlowAutoencoder(model).eval()
