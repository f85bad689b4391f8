"""A trained Latent Bernoulli Autoencoder in one line: `lbae.load("mnist_bae_w16")`."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from common.checkpoint import load_weights
from common.errors import UserError
from common.given import floats, zero_one
from common.launch import pick_device
from common.released import named, weights_file
from lbae.experiment import Latents, checkpoint_path, load_nets, newest_config, read_checkpoint, split_nets, unpack_bits
from lbae.model import LBAE, build_model
from lbae.options import Params, from_saved, saved_keys
from lbae.sampler import HyperplaneSampler


class Autoencoder(nn.Module):
    """Images (B, C, S, S) in [0, 1] and their codes (B, D): bits -1 and +1, or the means of a VAE. In evaluation mode.

    Arrays and tensors of any float type are taken; UserError for other shapes, types and values, in one line.
    codes (N, D) and labels (N, A) are those of the training images: what the samplers are fitted on. `image_shape` is
    (C, S, S), `config` holds the options of the training.
    """

    def __init__(self, model: LBAE, codes: Tensor, labels: Tensor, config: dict[str, Any], names: Sequence[str] = ()):
        super().__init__()
        self.model, self.config, self._names = model, config, tuple(names)
        self.image_shape = (config["channels"], config["img_size"], config["img_size"])
        self.register_buffer("codes", codes)
        self.register_buffer("labels", labels)

    @property
    def class_names(self) -> tuple[str, ...]:
        """Names of the classes, in the order of their numbers; () for attributes."""
        if self.labels.shape[1] > 1:
            return ()
        return self._names or tuple(str(k) for k in range(int(self.labels.max()) + 1))

    @property
    def concept_names(self) -> tuple[str, ...]:
        """Names of the attributes, in the order of `labels`' columns, as `set_attr` takes them; () for classes."""
        return self._names if self.labels.shape[1] > 1 else ()

    def encode(self, images: Tensor) -> Tensor:
        """Images float (B, C, S, S) in [0, 1] -> codes (B, D)."""
        return self.model.enc(floats(images, "images", ("B", *self.image_shape), self._weight, (0, 1))).code

    def decode(self, codes: Tensor) -> Tensor:
        """Codes (B, D), floats or signed integers in [-1, 1] (a VAE's: any) -> images (B, C, S, S) in (0, 1)."""
        model = self.model.enc
        codes = floats(codes, "codes", ("B", self._weight.shape[1]), self._weight, None if model.vae else (-1, 1))
        if not model.vae and model.zround < 0 and zero_one(codes):
            raise UserError("codes of 0 and 1: expected -1 and +1, which are 2 * codes - 1")
        return self.model.gen(codes)

    def forward(self, images: Tensor) -> Tensor:
        """The reconstruction of images."""
        return self.decode(self.encode(images))

    @property
    def _weight(self) -> Tensor:
        return self.model.gen.l1l.weight  # (.., D)

    @cached_property
    def sampler(self) -> HyperplaneSampler:
        """Random hyperplanes fitted to `codes` and `labels`. Raises UserError for a VAE, whose codes are no bits."""
        return HyperplaneSampler().fit(self.codes, self.labels)

    @torch.no_grad()
    def sample(self, n: int, rng: Any = None) -> Tensor:
        """n images (n, C, S, S) in (0, 1) of random hyperplanes' codes; rng: a seed, a numpy or a torch generator."""
        return self.decode(self.sampler.sample(n, rng))


@torch.no_grad()
def load(name: str | Path, device: str = "cpu") -> Autoencoder:
    """The autoencoder of a file that ships (its name), of a .safetensors file of `lbae.release`, or of an experiment's
    folder. Raises UserError for a missing, damaged or foreign one.
    """
    if named(name).is_dir():
        config, source = newest_config(Path(name))
        path = checkpoint_path(Path(name), None)
        nets = read_checkpoint(path)
        names = nets.get("attribute_names", ())
        latents = Latents.load(Path(name) / "latents-last.npz")
    else:
        source = path = weights_file("lbae", name)
        tensors, config = load_weights(path)
        if not {"latents.codes", "latents.labels"} <= tensors.keys():
            raise UserError(f"{path} was not written by `python -m lbae.release pack`")
        nets, names = split_nets(tensors), config.get("release", {}).get("attribute_names", ())
        codes = unpack_bits(tensors["latents.codes"], config["zsize"])
        latents = Latents(codes, tensors["latents.labels"].long())
    known = from_saved(config, saved_keys(resumes=True) - {"data_root", "wandb"}, source)
    model = build_model(Params.build(known))
    load_nets(model, nets, path)
    return Autoencoder(model, latents.codes, latents.labels, known, names).eval().to(pick_device(device))
