"""A trained conditional flow in one line: `nfpi.load("mnist_small")`."""

from pathlib import Path

import torch
from torch import Tensor, nn

from common.errors import UserError
from common.given import as_tensor, floats, number, whole
from common.launch import pick_device
from common.released import weights_file
from nfpi.conditional import ConditionalFlow
from nfpi.layers import postprocess


class ClassFlow(nn.Module):
    """Images (B, C, H, W) in [0, 1] (MNIST: 32 x 32, two black pixels around) and latents with a Gaussian a class.

    `conditional` is the `ConditionalFlow` itself: likelihoods, scores, Gaussians. In evaluation mode. A flow of MNIST
    was trained on images with uniform noise, `conditional.pixel_noise`, which images of a data set lack and generated
    ones carry: `noisy` adds it. Without it images are far less likely. Arrays and tensors of any float type
    are taken; UserError for other shapes, types and values, in one line.
    """

    concept_names: tuple[str, ...] = ()

    def __init__(self, conditional: ConditionalFlow):
        super().__init__()
        self.flow, self.gaussians = conditional.flow, conditional.gaussians
        self.conditional = conditional
        config, band = self.flow.config, conditional.codes.rows if conditional.codes else 0  # below the image
        self.image_shape = (config.channels, config.height - band, config.width)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes; their numbers where the training set has no names."""
        return self.conditional.class_names or tuple(str(k) for k in range(self.conditional.classes))

    def noisy(self, images: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Images of a data set, as the flow saw them in training: with uniform noise in [0, pixel_noise)."""
        images = self._images(images)
        noise = torch.rand(images.shape, generator=generator, device=images.device, dtype=images.dtype)
        return images + self.conditional.pixel_noise * noise

    def encode(self, images: Tensor) -> Tensor:
        """Images in [0, 1 + pixel_noise] -> latents z (B, d); pixels are taken at their cell's centre."""
        images = self._images(images)
        y = torch.zeros(images.shape[0], dtype=torch.long, device=images.device)
        return self.flow(self.conditional.input(images, y, 0.5)).z

    def decode(self, latents: Tensor, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """Latents (B, d) -> images; halves that the flow split off are drawn at `temperature`."""
        latents = floats(latents, "latents", ("B", self.flow.config.latent_dim), self.gaussians.mean, least=1)
        images = self.flow.inverse(latents, number(temperature, "temperature"), generator)
        return postprocess(images, self.conditional.bits)

    def forward(self, images: Tensor, draws: int = 8, generator: torch.Generator | None = None) -> Tensor:
        """Bayes' rule: p(class | image), (B, K) float64, classes equally likely, of images without noise.

        The mean over `draws` of the noise that the flow was trained with, all in one pass; draws=0 (for generated ones)
        takes the images as they are, as does a flow without. Draws are the same at every call without a generator.
        """
        images, draws = self._images(images), whole(draws, "draws", 0)
        if not draws or not self.conditional.pixel_noise:
            return torch.softmax(self.conditional.scores(images, 0.5), 1)
        generator = generator or torch.Generator(images.device).manual_seed(0)
        scores = self.conditional.scores(self.noisy(images.repeat(draws, 1, 1, 1), generator), 0.5)
        return torch.softmax(scores, 1).unflatten(0, (draws, -1)).mean(0)

    posterior = forward

    def sample(self, y: Tensor, temperature: float = 1.0, generator: torch.Generator | None = None) -> Tensor:
        """Images of the classes y (B,), numbers 0 to K - 1: z ~ N(mu_y, T^2 diag v_y), inverted."""
        y, last = as_tensor(y, "y"), self.conditional.classes - 1
        if y.ndim != 1 or not len(y) or y.is_floating_point() or y.is_complex() or y.dtype == torch.bool:
            raise UserError(f"y of shape {tuple(y.shape)} ({y.dtype}): expected class numbers 0 to {last}, (B,)")
        if not 0 <= int(y.min()) <= int(y.max()) <= last:
            raise UserError(f"y={y.tolist()[:10]}: expected class numbers 0 to {last}")
        return self.conditional.sample(y.long(), number(temperature, "temperature"), generator)[0]

    def _images(self, images: Tensor) -> Tensor:
        shape, span = ("B", *self.image_shape), (0, 1 + self.conditional.pixel_noise)
        return floats(images, "images", shape, self.gaussians.mean, span, least=1)


def load(name: str | Path, device: str = "cpu") -> ClassFlow:
    """The flow of a file that ships (its name), of a flow.safetensors or a training state (.pt), or of a run's folder.

    Raises UserError for a missing, damaged or foreign file.
    """
    return ClassFlow(
        ConditionalFlow.load(weights_file("nfpi", name, "**/checkpoints/flow.safetensors"), pick_device(device))
    ).eval()
