"""Do attributes show where they are set? The share of test images that have one before and after, by a classifier.

    python lbae/attributes.py EXP                  EXP: the folder of an experiment; writes EXP/attributes.json
    python lbae/attributes.py EXP --mode contrast --images 500

For each attribute (or class) codes of test images without it get its bits, as `set_attr` does, and are decoded. A small
convolutional network judges, trained on the training images and their labels; its recall on real test images is printed
beside the shares.
"""

import json
import os
import statistics
import sys
from collections.abc import Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

if __name__ == "__main__":
    sys.path[0:1] = [str(Path(__file__).resolve().parents[1])]
    import common.start  # noqa: F401

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from common.checkpoint import write_json
from common.errors import UserError, run_command
from common.launch import full_precision, pick_device
from common.metrics import paths_and_options
from common.options import Device, Options, from_flags, option
from lbae.data import as_input, attribute_groups, attribute_names, attributes, load_split
from lbae.experiment import newest_config
from lbae.options import Params, Text
from lbae.pretrained import Autoencoder, load
from lbae.sampler import ATTR_MODES


class Config(Options):
    """The options of attributes.py."""

    mode: Literal[ATTR_MODES] = option("conditional", "mean bits with the attribute; contrast: minus those of all")
    threshold: Annotated[float, Field(ge=0, le=2)] = option(0.12, "bits whose mean exceeds this are forced")
    images: Annotated[int, Field(ge=1)] = option(200, "test images an attribute is set in, at most")
    epochs: Annotated[int, Field(ge=1, le=1000)] = option(10, "epochs of the classifier")
    seed: Annotated[int, Field(ge=0, lt=2**32)] = option(0, "seed of the classifier")
    data_root: Text = option("", "where the data set is (without: as in the training, DATA_ROOT or data/)")
    device: Device = option("auto", "device")
    dry_run: bool = option(False, "check the options, print them as JSON and leave")


class Labelled(NamedTuple):
    """Images uint8 (N, C, S, S) and which attributes they have, 0 or 1 (N, A)."""

    images: Tensor
    has: Tensor


def labelled(params: Params, split: str, names: Sequence[str]) -> tuple[Labelled, list[tuple[str, int]]]:
    """A split with its attributes and their groups; classes become one attribute each. Raises UserError where they are
    not `names`, those of the training.
    """
    data = load_split(params, split)
    images, targets = data.arrays()
    has = attributes(data, targets)
    known = attribute_names(data) or list(names)
    if known != list(names):
        raise UserError(f"the {split} images have the attributes {_listed(known)}, the model was trained with "
                        f"{_listed(names)}: name the folder of its training by --data_root")  # fmt: skip
    has = F.one_hot(has[:, 0], len(names)) if has.shape[1] == 1 else has
    return Labelled(images, has), attribute_groups(data, names)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


class Judge(nn.Module):
    """Which attributes images (B, C, S, S) have: of each group one (its values exclude each other), or yes and no."""

    def __init__(self, channels: int, size: int, groups: Sequence[int]):
        super().__init__()
        self.groups = list(groups)
        widths = [channels, 32, 64, 64, 64]
        layers = [nn.Sequential(nn.Conv2d(a, b, 4, 2, 1), nn.ReLU()) for a, b in pairwise(widths)]
        self.logits = nn.Sequential(*layers, nn.Flatten(), nn.Linear(64 * (size // 16) ** 2, sum(groups)))

    def loss(self, images: Tensor, has: Tensor) -> Tensor:
        """Cross entropy, summed over the groups, of has (B, A)."""
        return sum(
            F.cross_entropy(logit, label) if logit.shape[1] > 1 else F.binary_cross_entropy_with_logits(logit, label)
            for logit, label in self._by_group(self.logits(images), has.float())
        )

    def forward(self, images: Tensor) -> Tensor:
        """Bool (B, A)."""
        logits = self.logits(images)
        return torch.cat([
            logit == logit.amax(1, keepdim=True) if logit.shape[1] > 1 else logit > 0
            for (logit,) in self._by_group(logits)
        ], 1)  # fmt: skip

    def _by_group(self, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
        return zip(*(tensor.split(self.groups, 1) for tensor in tensors), strict=True)


def train_judge(data: Labelled, groups: Sequence[int], epochs: int, seed: int, device: torch.device) -> Judge:
    """A judge of labelled images."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        judge = Judge(*data.images.shape[1:3], groups).to(device, memory_format=torch.channels_last)
        optimizer = torch.optim.Adam(judge.parameters(), lr=1e-3)
        for _ in range(epochs):
            for rows in torch.randperm(len(data.images)).split(64):
                loss = judge.loss(as_input(data.images[rows].to(device)), data.has[rows].to(device))
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return judge.eval()


@torch.no_grad()
def shares(model: Autoencoder, judge: Judge, test: Labelled, k: int, options: Config) -> dict[str, float]:
    """Of attribute k, in per cent: its recall on test images, and the share of images without it that show it in their
    reconstruction, before and after it is set.
    """
    rows = [test.has[:, k] == value for value in (1, 0)]
    having, lacking = (as_input(test.images[row][: options.images].to(model.codes.device)) for row in rows)

    def share(images: Tensor) -> float:
        return 100 * float(judge(images)[:, k].double().mean())

    codes = model.encode(lacking)
    changed = model.sampler.set_attribute(codes, k, options.threshold, options.mode)
    return {"recall": share(having), "before": share(model.decode(codes)), "set": share(model.decode(changed))}


def main(argv: list[str] | None = None) -> None:
    paths, rest = paths_and_options(list(sys.argv[1:] if argv is None else argv), ("EXP",))
    options, _ = from_flags(Config, rest, __doc__)
    device, folder = pick_device(options.device), Path(paths[0])
    if not (folder / "latents-last.npz").is_file():
        raise UserError(f"{folder} is no folder of an experiment with training codes (latents-last.npz): train one, or "
                        "unpack a file that ships by `python -m lbae.release unpack FILE FOLDER`")  # fmt: skip
    if not os.access(folder, os.W_OK) or (folder / "attributes.json").is_dir():
        raise UserError(f"{folder / 'attributes.json'} cannot be written")
    if options.dry_run:
        print(json.dumps(options.as_dict(), indent=2))
        return
    full_precision()
    saved, _ = newest_config(folder)
    model = load(folder, str(device))
    if model.config["vae"]:
        raise UserError(f"{folder} is a VAE, whose codes have no bits to set; take an experiment without vae=1")
    data_root = options.data_root or saved.get("data_root", "")
    params = Params.build(model.config, {"eval": True, "data_root": data_root})
    names = model.class_names if model.labels.shape[1] == 1 else model.concept_names
    (train, groups), (test, _) = (labelled(params, split, names) for split in ("train", "test"))
    # what no image has cannot be learned, and what all have cannot be set
    known = (train.has.any(0) & test.has.any(0) & ~test.has.all(0)).tolist()
    if not any(known):
        raise UserError(f"{folder}: its images have no attributes to set: train with class sub-folders or labels=CSV")
    judge = train_judge(train, [size for _, size in groups], options.epochs, options.seed, device)
    found = {name: shares(model, judge, test, k, options) for k, name in enumerate(names) if known[k]}
    if not all(known):
        out = [name for name, judged in zip(names, known, strict=True) if not judged]
        print(f"left out, as no training or test image has them or every one: {_listed(out)}")
    means, end = {}, 0
    for group, size in groups:
        part = [found[name] for name in names[end : end + size] if name in found]
        end += size
        if part:
            mean = means[group] = {key: statistics.fmean(one[key] for one in part) for key in part[0]}
            recall, before, after = mean.values()
            print(
                f"{group}: the classifier finds {recall:.1f} % of the test images that have it; of those without it "
                f"{before:.1f} % show it before, {after:.1f} % after"
            )
    write_json(folder / "attributes.json", {**options.as_dict(), "attributes": found, "mean": means})


if __name__ == "__main__":
    sys.exit(run_command(main))
