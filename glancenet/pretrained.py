"""A trained concept model in one line: `glancenet.load("mnist_parity")`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.checkpoint import load_into, load_weights
from common.errors import UserError
from common.given import floats
from common.launch import pick_device
from common.released import weights_file
from glancenet.algorithms import Shape, make_model
from glancenet.architectures import IMAGE_SIZE
from glancenet.losses import Batch
from glancenet.mnist_objective import CONCEPTS, KNOWN_DIGITS, LATENTS, MODELS
from glancenet.options import Config


class ConceptModel(nn.Module):
    """Images (B, C, H, W) in [0, 1], latents (B, D) whose first ones are the concepts, and classes. In evaluation mode.

    prototypes: the learned prior mean of each class (K, D), or None. image_shape: (C, H, W). Arrays and tensors of any
    float type are taken; UserError for other shapes, types and values, in one line.
    """

    def __init__(
        self, model: nn.Module, encode: Callable[[Tensor], Tensor], decode: Callable[[Tensor], Tensor] | None,
        prototypes: Tensor | None, classes: tuple[str, ...], concepts: tuple[str, ...], config: dict[str, Any],
        image_shape: tuple[int, int, int], latents: int,
    ):  # fmt: skip
        super().__init__()
        self.model, self.config, self.image_shape = model, config, image_shape
        self._encode, self._decode, self._latents = encode, decode, latents
        self.register_buffer("prototypes", prototypes)
        self.class_names, self.concept_names = classes, concepts

    def encode(self, images: Tensor) -> Tensor:
        """Images float (B, C, H, W) in [0, 1] -> posterior means (B, D); concepts first, in the order of their names.

        The model's estimate of a binary concept is its sigmoid.
        """
        return self._encode(floats(images, "images", ("B", *self.image_shape), next(self.parameters()), (0, 1)))

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, D) -> images (B, C, H, W) in (0, 1). Raises UserError for a bottleneck, which has no decoder."""
        if self._decode is None:
            raise UserError("a concept bottleneck has no decoder")
        latents = floats(latents, "latents", ("B", self._latents), next(self.parameters()))
        return torch.sigmoid(self._decode(latents))

    def forward(self, images: Tensor) -> Tensor:
        """The reconstruction of images."""
        return self.decode(self.encode(images))


@torch.no_grad()
def load(name: str | Path, device: str = "cpu") -> ConceptModel:
    """The model of a file that ships (its name), of a model.safetensors of main.py or mnist_parity.py, or its folder.

    Raises UserError for a missing, damaged or foreign file.
    """
    path = weights_file("glancenet", name, "model.safetensors")
    tensors, config = load_weights(path)
    if config.get("model") in MODELS:
        found = _of_parity(tensors, config, path)
    elif "alg" in config:
        found = _of_main(tensors, config, path)
    else:
        raise UserError(f"{path} holds no model of glancenet (neither of mnist_parity.py nor of main.py)")
    return found.eval().to(pick_device(device))


def _of_parity(tensors: dict[str, Tensor], config: dict[str, Any], path: Path) -> ConceptModel:
    model = MODELS[config["model"]]()
    load_into(model, tensors, path)
    decoder = getattr(model, "decoder", None)
    digits = tuple(str(digit) for digit in KNOWN_DIGITS)
    return ConceptModel(
        model,
        lambda x: model.encoder(x.flatten(1))[0],
        None if decoder is None else lambda z: decoder(z).view(-1, 1, 28, 28),
        model.class_means().detach() if hasattr(model, "class_means") else None,
        digits,
        digits[:CONCEPTS],
        config,
        (1, 28, 28),
        LATENTS,
    )


def _of_main(tensors: dict[str, Tensor], config: dict[str, Any], path: Path) -> ConceptModel:
    options = Config.build({key: value for key, value in config.items() if key in Config.model_fields})
    classes = len(tensors["classifier.weight"]) if "classifier.weight" in tensors else 0
    concepts = min(options.z_dim, options.z_class or options.z_dim) if classes else 0
    channels = next(value for key, value in tensors.items() if key.startswith("encoder.") and value.ndim == 4).shape[1]
    model = make_model(options, Shape(channels, concepts, classes, (), 1))
    load_into(model, {key: value for key, value in tensors.items() if not key.startswith("osr.")}, path)
    names = tuple(config.get("concept_names") or (f"concept {i}" for i in range(concepts)))

    def batch(x: Tensor) -> Batch:
        return Batch(x, *(x.new_zeros(x.shape[0]) for _ in Batch._fields[1:]))

    prototypes = getattr(model, "class_means", lambda: None)()
    return ConceptModel(
        model,
        lambda x: model.encode(batch(x))[0],
        None if model.decoder is None else lambda z: model.decode(z, None),
        None if prototypes is None else prototypes.detach(),
        tuple(config.get("class_names") or (str(k) for k in range(classes))),
        names,
        config,
        (channels, IMAGE_SIZE, IMAGE_SIZE),
        options.z_dim,
    )
