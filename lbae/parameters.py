"""The command line of the LBAE scripts: `KEY` or `KEY=VALUE` tokens, typed, each key declared once below.

Order is free and later tokens win. An unknown key, a value of the wrong type or outside its choices stops the command.
"""

import dataclasses
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar

from common.errors import UserError, suggest
from lbae.sampler import ATTR_MODES, SPLITS

T = TypeVar("T")
TRUE, FALSE = ("true", "1", "yes", "on"), ("false", "0", "no", "off")
LAST = -1  # reload without a number

MODEL, TRAINING, RUN = "model", "training", "run"


def option(
    default: Any, help: str, group: str = RUN, choices: Iterable[str] = (), bare: Any = None, low: float = -math.inf
):
    """A dataclass field that is a command-line key. `bare` is the value of the key alone, `low` the least number.

    Keys of group MODEL are taken from an experiment's saved configuration, those of TRAINING on resume too.
    """
    facts = {"help": help, "group": group, "choices": tuple(choices), "bare": bare, "low": low}
    return field(default=default, metadata=facts)


@dataclass
class Params:
    """Every key of mnist.py, cifar10.py and celeba.py. The scripts' configurations replace some of the defaults."""

    # what to do
    eval: bool = option(False, "evaluate instead of train: reconstruct the test set")
    gen: bool = option(False, "with eval: generate images")
    eval_train: bool = option(False, "with eval: reconstruct the training set")
    l: bool = option(False, "load models/last.cp (training: resume)")  # noqa: E741 - the published key
    reload: int | None = option(None, "load models/weights-<E>.cp; without a number models/last.cp", bare=LAST, low=-1)
    overwrite: bool = option(False, "train from scratch over an old experiment")
    help: bool = option(False, "print this table")

    # the model; taken from the saved configuration when evaluating or resuming
    cfg: str = option("", "configuration of the script", MODEL)
    dataset: str = option("mnist", "data set: mnist, cifar10, celeba, or another of common.datasets", MODEL)
    img_size: int = option(32, "image side in pixels, 32 or 64", MODEL, low=1)
    img_crop_size: int = option(0, "celeba: centre crop before the resize (0: resize, then crop)", MODEL, low=0)
    channels: int = option(1, "image channels", MODEL, low=1)
    zsize: int = option(200, "latent bits D (VAE: dimensions)", MODEL, low=1)
    vae: bool = option(False, "Gaussian heads instead of bits", MODEL)
    vae_model: str = option("ConvResBlock32", "network", MODEL, ["ConvResBlock32"])
    width: int = option(64, "base width w of both nets", MODEL, low=1)
    dec_in_channels: int = option(
        0, "channels of the decoder's first 4x4 map (0: 2w at 32, 4w at 64 pixels)", MODEL, low=0
    )
    zround: int = option(-1, "decimals of the quantiser; negative: sign", MODEL)
    binary_reco_loss: bool = option(False, "binary cross entropy instead of squared error", MODEL)
    kl_weight: float = option(0.0, "weight of the VAE's KL term, divided by D", MODEL, low=0)
    exp_suffix: str = option("1", "end of the experiment's name", MODEL)
    train_images: int = option(0, "use the first n training images (0: all)", MODEL, low=0)
    test_images: int = option(0, "use the first n test images (0: all)", MODEL, low=0)
    data_root: str = option("", "folder of the data sets (default: DATA_ROOT, else data/)", MODEL)

    # training
    lr: float = option(1e-3, "Adam's learning rate", TRAINING, low=0)
    l2: float = option(0.0, "Adam's coupled weight decay", TRAINING, low=0)
    batch_size: int = option(512, "training images a step, over all processes", TRAINING, low=1)
    epochs_max: int = option(3900, "epochs", TRAINING, low=1)
    keep_last_models: int = option(10, "how many models/weights-<E>.cp are kept", TRAINING, low=1)
    seed: int = option(12345, "seed of initialisation, data order and sampling", TRAINING, low=0)
    amp: str = option("off", "bf16: convolutions in bfloat16", TRAINING, ["off", "bf16"])
    parallel: bool = option(False, "train on all visible GPUs (starts torchrun by itself)", TRAINING)

    # evaluation and generation
    batch_size_test: int = option(1024, "images a batch of evaluation; int: pairs, rows of a mosaic", low=1)
    sample_method: str = option("cov", "generator", choices=["cov", "int", "random", "independent"])
    gen_imgs: int = option(5000, "images to generate", low=1)
    interpolate_steps: int = option(10, "steps between the two ends of an interpolation", low=1)
    int_endpoints: bool = option(True, "count the two ends of an interpolation as generated images")
    int_source: str = option("train", "codes between which is interpolated", choices=["train", "test"])
    split: str = option("margin", "direction of a code: margin perceptron, or the published means", choices=SPLITS)
    set_attr: int = option(-1, "int: interpolate towards this attribute (or class)", low=-1)
    attr_threshold: float = option(0.12, "bits whose mean exceeds this are forced", low=0)
    attr_mode: str = option(
        "conditional", "mean of the bits with the attribute; contrast: minus the mean of all", choices=ATTR_MODES
    )
    latents: str = option(
        "last", "codes to sample from: last epoch, best epoch, or encoded anew", choices=["last", "best", "refresh"]
    )
    zclamp: float = option(1.0, "random: upper limit of the draws before rounding")
    zclamp_min: float = option(-1.0, "random: lower limit of the draws before rounding")
    img_format: str = option("png", "format of single images", choices=["png", "jpg"])
    stretch: bool = option(False, "stretch every image of a mosaic to its own minimum and maximum, as published")

    # machine
    exp: str = option("", "experiment directory (default: this one if it is one, else lbae/<name>)")
    device: str = option("auto", "auto, cpu, cuda[:i] or mps")
    cuda_device: int = option(-1, "with device=auto or cuda: index of the GPU", low=-1)
    workers: int = option(0, "processes that load images", low=0)
    hold: bool = option(True, "keep the images in memory, on the device")
    deterministic: bool = option(False, "refuse kernels whose result varies between runs")
    print_every_batch: int = option(100, "batches between two rows of the table", low=1)
    tensorboard: bool = option(True, "write TensorBoard events")
    wandb: str = option("", "project name: also log to Weights & Biases")


def tokenise(argv: Iterable[str]) -> list[tuple[str, str | None]]:
    """(key, value) of each token, split at its first `=`; the value of a bare key is None."""
    return [(key, value if mark else None) for key, mark, value in (token.partition("=") for token in argv)]


def coerce(option_field: dataclasses.Field, text: str | None) -> Any:
    """The value of one token in the type of its field. Raises UserError naming the key and what it takes."""
    name, facts, kind = option_field.name, option_field.metadata, _kind(option_field)
    if text is None:
        if kind is bool:
            return True
        if facts["bare"] is None:
            raise UserError(f"{name}: a value is missing, write {name}=...")
        return facts["bare"]
    if kind is bool:
        if text.lower() in TRUE + FALSE:
            return text.lower() in TRUE
        raise UserError(f"{name}={text}: expected {'/'.join(TRUE)} or {'/'.join(FALSE)}")
    if kind is str:
        if facts["choices"] and text not in facts["choices"]:
            raise UserError(f"{name}={text}: expected {', '.join(facts['choices'])}{suggest(text, facts['choices'])}")
        return text
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not math.isfinite(number) or (kind is int and number != int(number)):
        raise UserError(f"{name}={text}: expected {'a whole number' if kind is int else 'a number'}")
    if number < facts["low"]:
        raise UserError(f"{name}={text}: must be at least {facts['low']:g}")
    return kind(number)


def _kind(option_field: dataclasses.Field) -> type:
    return int if option_field.type == int | None else option_field.type


def parse(argv: Iterable[str], options: type | Mapping[str, dataclasses.Field]) -> dict[str, Any]:
    """The values of the tokens, later ones winning. Raises UserError for a key that `options` does not declare."""
    fields = options if isinstance(options, Mapping) else fields_of(options)
    values = {}
    for key, text in tokenise(argv):
        if key not in fields:
            raise UserError(f"unknown key '{key}'{suggest(key, fields)}; `help` lists all")
        values[key] = coerce(fields[key], text)
    return values


def fields_of(options: type) -> dict[str, dataclasses.Field]:
    """The declared keys of a dataclass of options."""
    return {one.name: one for one in dataclasses.fields(options)}


def keys_of(*groups: str) -> set[str]:
    """The keys of `Params` that belong to the groups."""
    return {name for name, one in fields_of(Params).items() if one.metadata["group"] in groups}


def from_saved(config: Mapping[str, Any], groups: Iterable[str]) -> dict[str, Any]:
    """The keys of `groups` that a saved configuration gives; the published code's configurations are understood.

    Values that do not fit the declared type (lists, None) are left to the defaults.
    """
    fields, values = fields_of(Params), {}
    for key in keys_of(*groups) & set(config):
        value = config[key]
        if isinstance(value, (bool, int, float, str)):
            values[key] = coerce(fields[key], value if isinstance(value, str) else json.dumps(value))
    if "dec_in_channels" not in config and config.get("dataset") == "mnist":
        values["dec_in_channels"] = 1  # the published network asks for the data set's name
    return values


def experiment_name(params: Params) -> str:
    """Directory name of an experiment, as published: <cfg>_res<size>_<network>-<qae|vae>-z<D>-<suffix>."""
    model = f"_{params.vae_model}" if params.vae_model else ""
    kind = "vae" if params.vae else "qae"
    return f"{params.cfg}_res{params.img_size}{model}-{kind}-z{params.zsize}-{params.exp_suffix}"


def table(options: type, defaults: Mapping[str, Any] | None = None) -> str:
    """All keys with default, choices and meaning."""
    lines = []
    for name, one in fields_of(options).items():
        default = (defaults or {}).get(name, one.default)
        shown = "" if default in ("", None) or (one.type is bool and not default) else f"={default}"
        choices = f" [{'|'.join(one.metadata['choices'])}]" if one.metadata["choices"] else ""
        lines.append(f"  {name + shown:<28} {one.metadata['help']}{choices}")
    return "\n".join(lines)
