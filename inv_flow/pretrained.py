"""A trained Inverse-Flow in one line: `inv_flow.load("mnist_inverse_w64")`."""

import math
from pathlib import Path

import torch
from torch import Tensor, nn

from common.checkpoint import load_into, load_weights
from common.errors import UserError
from common.given import floats, number, readable, whole
from common.launch import pick_device
from common.released import named, weights_file
from inv_flow.model import FlowModel
from inv_flow.train.config import Config, older_names, trained_options
from inv_flow.train.launch import make_model


class ImageFlow(nn.Module):
    """Images (B, C, H, W) in [0, 1], read as 8-bit (or `levels`) pixels, and their latents. In evaluation mode.

    Arrays and tensors of any float type are taken; UserError for other shapes, types and values, in one line.
    """

    class_names: tuple[str, ...] = ()
    concept_names: tuple[str, ...] = ()

    def __init__(self, flow: FlowModel):
        super().__init__()
        self.flow, self.image_shape = flow, tuple(flow.image_size)  # (C, H, W)

    def _integers(self, images: Tensor) -> Tensor:
        images = floats(images, "images", ("B", *self.image_shape), self._weight, (0, 1), least=1)
        return (images * (self.flow.levels - 1)).round()

    def encode(self, images: Tensor) -> list[Tensor]:
        """Images float (B, C, H, W) in [0, 1] -> latents, split parts first; a pixel is its cell's centre."""
        return self.flow.encode(self._integers(images), lambda x: torch.full_like(x, 0.5))[0]

    def decode(self, latents: list[Tensor]) -> Tensor:
        """Latents as `encode` gives them -> images (B, C, H, W) in [0, 1], on the grid of grey levels."""
        sizes = self.flow.latent_sizes
        if not isinstance(latents, (list, tuple)) or len(latents) != len(sizes):
            raise UserError(f"latents: expected a list of {len(sizes)} tensors, as `encode` gives")
        latents = [floats(z, f"latents[{i}]", ("B", *sizes[i]), self._weight, least=1) for i, z in enumerate(latents)]
        if any(z.shape[0] != latents[0].shape[0] for z in latents):
            raise UserError(f"latents of {[len(z) for z in latents]} images: expected as many in all")
        images = self.flow.decode(latents)
        if readable(images) and not bool(torch.isfinite(images).all()):
            raise UserError("latents too far from 0: the images are not finite")
        return images.clamp(0, self.flow.levels - 1) / (self.flow.levels - 1)

    def forward(self, images: Tensor) -> Tensor:
        """-log2 p(x) a dimension (B,), with one draw of the dequantisation noise: bits/dim."""
        return -self.flow(self._integers(images))[1] / (math.prod(self.image_shape) * math.log(2))

    bits_per_dim = forward

    @property
    def _weight(self) -> Tensor:
        return next(self.parameters())

    @torch.no_grad()
    def sample(self, n: int, temperature: float = 1.0) -> Tensor:
        """n images (n, C, H, W) in [0, 1]; every latent is temperature * N(0, I)."""
        return self.flow.sample_images(whole(n, "n"), number(temperature, "temperature")) / (self.flow.levels - 1)


def load(name: str | Path, device: str = "cpu") -> ImageFlow:
    """The flow of a file that ships (its name), of a run's folder, or of its best.safetensors.

    Raises UserError for a missing, damaged or foreign one.
    """
    folder = named(name) / "checkpoints" / "best.safetensors"
    path = folder if named(name).is_dir() else weights_file("inv_flow", name)
    tensors, stored = load_weights(path)
    stored = older_names(stored)
    if not trained_options() & stored.keys() or not stored.get("image_size"):
        raise UserError(f"{path} holds no flow of inv_flow")
    known = trained_options() | {"image_size"}
    config = Config.build({key: value for key, value in stored.items() if key in known})
    model = make_model(config)
    load_into(model, tensors, path)
    model.set_exact(True)
    return ImageFlow(model.to(pick_device(device))).eval()
