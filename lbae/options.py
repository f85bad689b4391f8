"""The options of the LBAE scripts, `KEY` or `KEY=VALUE` in any order, and what an experiment's configuration gives.

Below the command line lie the experiment's saved configuration, the script's configuration `cfg` and the defaults here.
"""

import os
from collections.abc import Iterable, Mapping
from functools import partial
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from common import datasets
from common.errors import UserError
from common.options import Count, Device, NonNegative, Options, Positive, Resume, Says, Seed, Whole, option
from lbae.model import IMAGE_SIZES
from lbae.sampler import ATTR_MODES, SPLITS

CROPPED = ("celeba", "folder")  # data sets that img_crop_size is for
LAST = -1  # reload without a number
WHAT, MODEL, TRAINING, EVALUATION, MACHINE = "what to do", "model", "training", "evaluation", "machine"
GENERATION = "generation"
CODES, PATHS, ATTRIBUTES, COINS = (f"{GENERATION}: {part}" for part in ("codes", "int", "int with set_attr", "random"))


def one_of(*values: int) -> Any:
    """A whole number that is one of `values`."""
    words = " or ".join(map(str, values))

    def check(value: int) -> int:
        if value not in values:
            raise ValueError(f"expected {words}")
        return value

    return Annotated[int, AfterValidator(check), Says(words)]


def _number_or_name(value: Any) -> Any:
    """A word of a command line: -1 and up is a number, anything else the name of an attribute or class."""
    value = int(value) if isinstance(value, str) and value.removeprefix("-").isdigit() else value
    if isinstance(value, int) and not isinstance(value, bool) and not -1 <= value <= 100_000:
        raise ValueError("expected a number of -1 to 100000, or a name")
    return value


def _fits_a_file_system(value: str) -> str:
    if any(len(os.fsencode(part)) > 255 for part in value.split("/")):
        raise ValueError("a name in it is longer than 255 bytes")
    return value


Text = Annotated[
    str,
    Field(pattern=r"^[^\x00-\x1f]*$", max_length=2000),
    AfterValidator(_fits_a_file_system),
    Says("text on one line"),
]
Attribute = Annotated[int | Annotated[str, Field(min_length=1, max_length=200)], BeforeValidator(_number_or_name),
                      Says("a number of -1 to 100000, or a name")]  # fmt: skip
Suffix = Annotated[str, Field(pattern=r"^[^/\x00-\x1f]*$", max_length=100), Says("part of a file name")]
Width = Annotated[int, Field(ge=1, le=1024)]
OLDER_AMP = {"off": False, "bf16": True}
Amp = Annotated[bool, BeforeValidator(lambda value: OLDER_AMP.get(value, value) if isinstance(value, str) else value)]
DataSet = Literal[tuple(datasets.names())]


what = partial(option, group=WHAT, resume="call")
model = partial(option, group=MODEL)
training = partial(option, group=TRAINING, resume="change")
evaluation = partial(option, group=EVALUATION, resume="call")
generation, codes, paths, attributes, coins = (
    partial(option, group=group, resume="call") for group in (GENERATION, CODES, PATHS, ATTRIBUTES, COINS)
)
machine = partial(option, group=MACHINE, resume="change")


def between(low: float, high: float, kind: type = int) -> Any:
    """A number in [low, high]."""
    return Annotated[kind, Field(ge=low, le=high)]


class DataOptions(Options):
    """What every command that opens a data set or a device takes."""

    device: Device = machine("auto", "device")
    data_root: Text = machine("", "folder of the data sets (default: DATA_ROOT, else data/)")
    dry_run: bool = what(False, "check the options, print them as JSON and leave")


class Params(DataOptions):
    """The options of mnist.py, cifar10.py and celeba.py; group MODEL is what a trained model cannot do without."""

    eval: bool = what(False, "evaluate instead of train: reconstruct the test set")
    gen: bool = what(False, "with eval: generate images instead")
    eval_train: bool = what(False, "with eval: reconstruct the training set")
    l: bool = what(False, "load models/last.cp (training: resume)")  # noqa: E741 the published name
    reload: between(LAST, 10**9) | Literal["best"] | None = what(
        None, "load models/weights-<E>.cp, best.cp, or without a value last.cp", bare=LAST
    )
    resume: Resume = what(False, "as l; auto: where there is something to resume")
    overwrite: bool = what(False, "train from scratch over an old experiment")
    exp: Text = what("", "folder of the experiment (default: this one if it is one, else lbae/<name>)")

    cfg: Suffix = model("", "configuration of the script")
    dataset: DataSet = model("mnist", "data set")
    img_size: one_of(*IMAGE_SIZES) = model(32, "image side in pixels")
    img_crop_size: between(0, 4096) = model(0, "celeba, folder: centre crop before the resize (0: resize, then crop)")
    channels: one_of(1, 3) = model(1, "image channels")
    zsize: between(1, 16384) = model(200, "latent bits D (VAE: dimensions)")
    vae: bool = model(False, "Gaussian heads instead of bits")
    vae_model: Literal["ConvResBlock32"] = model("ConvResBlock32", "network")
    width: Width = model(64, "base width w of both nets")
    dec_in_channels: between(0, 4096) = model(
        0, "channels of the decoder's first 4x4 map (0: 2w at 32, 4w at 64 pixels)"
    )
    zround: between(-9, 9) = model(-1, "decimals to which codes are rounded; negative: sign")
    binary_reco_loss: bool = model(False, "binary cross entropy instead of squared error")
    kl_weight: NonNegative = model(0.0, "weight of the VAE's KL term, divided by D")
    labels: Text = model("", "folder: a CSV of attributes (file, then a column each; data_root's, too)")
    held_out_seed: Seed = model(0, "folder without train/ and test/: seed of the tenth that is held out for testing")
    exp_suffix: Suffix = model("1", "end of the experiment's name")
    train_images: Whole = model(0, "use the first n training images (0: all)")
    test_images: Whole = model(0, "use the first n test images (0: all)")

    lr: Positive = training(1e-3, "Adam's learning rate")
    l2: NonNegative = training(0.0, "Adam's coupled weight decay", resume="same")
    batch_size: Count = training(512, "training images a step, over all processes", resume="same")
    epochs_max: Count = training(3900, "epochs")
    keep_last_models: Count = training(10, "how many models/weights-<E>.cp are kept")
    parallel: bool = training(False, "train on all visible GPUs (starts torchrun by itself)")
    hold: bool = training(True, "keep the images in memory, on the device")
    print_every_batch: Count = training(100, "batches between two printed rows (on a GPU: two reads of the losses)")
    tensorboard: bool = training(True, "write TensorBoard events")
    wandb: Text = training("", "project name: also log to Weights & Biases")

    batch_size_test: Count = evaluation(
        1024, "images a batch of evaluation; int: pairs, rows of a mosaic", resume="change"
    )
    img_format: Literal["png", "jpg"] = evaluation("png", "format of single images")
    stretch: bool = evaluation(False, "stretch every image of a mosaic to its own range, as published")

    sample_method: Literal["cov", "int", "random", "independent"] = generation("cov", "generator")
    gen_imgs: between(1, 10**7) = generation(5000, "images to generate")
    latents: Literal["last", "best", "refresh"] = codes(
        "last", "training codes of the last epoch, the best one (default of reload=best), or encoded anew"
    )
    interpolate_steps: between(1, 10_000) = paths(10, "steps between the two ends of an interpolation")
    int_endpoints: bool = paths(True, "count the two ends as generated images")
    int_source: Literal["train", "test"] = paths(
        "train", "ends are training codes, as the published code takes them, or test codes, as its page says"
    )
    split: Literal[SPLITS] = paths("margin", "direction of a code: growing margins, or the published means")
    set_attr: Attribute = paths(-1, "interpolate from a code towards this attribute or class, by number or name")
    attr_threshold: between(0, 2, float) = attributes(0.12, "bits whose mean exceeds this are forced")
    attr_mode: Literal[ATTR_MODES] = attributes(
        "conditional", "mean of the bits with the attribute; contrast: minus the mean of all"
    )
    zclamp: between(-10, 10, float) = coins(1.0, "upper limit of the draws before rounding")
    zclamp_min: between(-10, 10, float) = coins(-1.0, "lower limit of the draws before rounding")

    seed: Seed = machine(12345, "seed of initialisation, data order and sampling", resume="same")
    amp: Amp = machine(False, "convolutions and products in bfloat16", resume="same")
    tf32: bool = machine(False, "GPU: convolutions and products with 10 bits of mantissa", resume="same")
    deterministic: bool = machine(False, "refuse kernels whose result varies between runs", resume="same")
    cuda_graph: bool = machine(False, "one GPU: launch a training step as one CUDA graph")
    cuda_device: between(-1, 127) = machine(-1, "with device=auto or cuda: index of the GPU")
    workers: between(0, 256) = machine(0, "processes that load images")

    @model_validator(mode="after")
    def _fit_together(self) -> "Params":
        if self.cuda_device >= 0 and self.device not in ("auto", "cuda"):
            raise ValueError(f"cuda_device={self.cuda_device} contradicts device={self.device}")
        if (self.gen or self.eval_train) and not self.eval:
            raise ValueError("gen and eval_train go with eval: write `eval gen` or `eval eval_train`")
        if self.gen and self.eval_train:
            raise ValueError("gen and eval_train are two commands: write `eval gen`, then `eval eval_train`")
        if self.zclamp_min > self.zclamp:
            raise ValueError(f"zclamp_min={self.zclamp_min:g} exceeds zclamp={self.zclamp:g}")
        if self.labels and self.dataset != "folder":
            raise ValueError(f"labels={self.labels} goes with dataset=folder")
        if self.gen and self.sample_method != "int" and self.sets_attribute:
            raise ValueError(f"set_attr={self.set_attr} goes with sample_method=int")
        return self

    @property
    def has_bits(self) -> bool:
        """Whether codes are in {-1, +1}."""
        return not self.vae and self.zround < 0

    @property
    def sets_attribute(self) -> bool:
        """Whether paths lead to an attribute."""
        return self.set_attr != -1

    @property
    def device_name(self) -> str:
        """`device`, with the index of `cuda_device` when that is given."""
        return self.device if self.cuda_device < 0 else f"cuda:{self.cuda_device}"

    @property
    def loads(self) -> bool:
        """Whether the command insists on a checkpoint to go on from."""
        return self.l or self.reload is not None or self.resume is True


def keys_of(*groups: str) -> set[str]:
    """The names of the options of some groups."""
    return {name for name, field in Params.model_fields.items() if field.json_schema_extra["group"] in groups}


def saved_keys(resumes: bool) -> set[str]:
    """What an experiment's configuration gives: the model; where training is resumed all that is no matter of the call
    or of the device.
    """
    if not resumes:
        return keys_of(MODEL) | {"data_root"}
    rules = {name: field.json_schema_extra["resume"] for name, field in Params.model_fields.items()}
    return {name for name, rule in rules.items() if rule != "call"} - {"device", "cuda_device"}


def from_saved(config: Mapping[str, Any], keys: Iterable[str], source: Any = "the saved configuration") -> dict:
    """The options `keys` that a saved configuration gives; the published code's configurations are understood.

    Lists and None are left to the defaults. Raises UserError naming `source` for a value that an option does not take.
    """
    values = {key: config[key] for key in set(keys) & set(config) if isinstance(config[key], (bool, int, float, str))}
    if "dec_in_channels" not in config and config.get("dataset") == "mnist":
        values["dec_in_channels"] = 1  # the published network asks for the data set's name
    try:
        judged = Params.build(values)
    except UserError as error:
        raise UserError(f"{source}: {error}; mend or delete the file") from None
    return {key: getattr(judged, key) for key in values}


def as_declared(config: Mapping[str, Any]) -> dict[str, Any]:
    """A saved configuration with the values of today for those of older versions."""
    return {**config, **({"amp": OLDER_AMP[config["amp"]]} if config.get("amp") in OLDER_AMP else {})}


def experiment_name(params: Params) -> str:
    """Directory name of an experiment, as published: <cfg>_res<size>_<network>-<qae|vae>-z<D>-<suffix>."""
    kind = "vae" if params.vae else "qae"
    return f"{params.cfg}_res{params.img_size}_{params.vae_model}-{kind}-z{params.zsize}-{params.exp_suffix}"


def without_effect(params: Params, given: Iterable[str]) -> list[str]:
    """The options among those given that change nothing in this command."""
    idle = {"zround"} if params.vae else {"kl_weight"}
    idle |= set() if params.dataset in CROPPED else {"img_crop_size"}
    idle |= set() if params.dataset == "folder" else {"held_out_seed"}
    idle |= keys_of(TRAINING) | {"overwrite"} if params.eval else keys_of(GENERATION, CODES, PATHS, ATTRIBUTES, COINS)
    if params.eval and not params.gen:
        idle |= keys_of(GENERATION, CODES, PATHS, ATTRIBUTES, COINS)
    if params.gen:
        method = params.sample_method
        idle |= set() if method == "int" else keys_of(PATHS, ATTRIBUTES)
        idle |= set() if params.sets_attribute else keys_of(ATTRIBUTES)
        idle |= keys_of(CODES) if method == "random" else keys_of(COINS)
        idle |= keys_of(COINS) if params.vae else set()
    return sorted(idle & set(given))
