"""Every key of an Inverse-Flow experiment, once: name, type, default, meaning. Scripts and `Experiment` read it from
here.
"""

import argparse
import dataclasses
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from common.errors import UserError, suggest

# Keys of the published configurations that did nothing there; asking for one is an error that says why.
DEAD = {
    "grad_clip_value": "it was commented out; use grad_clip (by value) or grad_clip_norm",
    "verbose": "nothing read it",
    "loss_bpd": "nothing read it; bits per dimension are always reported",
    "run_name": "nothing read it; use name",
    "Optimizer": "nothing read it; use optimizer_name",
    "Scheduler": "nothing read it; use scheduler_name",
    "input_size": "nothing read it; use image_size",
    "num_layers": "it repeated num_blocks; use num_blocks",
}


def key(default: Any, help: str, group: str, choices: tuple[str, ...] | None = None) -> Any:
    """A field of `Config` with its help text."""
    metadata = {"help": help, "group": group, "choices": choices}
    if isinstance(default, (list, dict)):
        return field(default_factory=lambda: default, metadata=metadata)
    return field(default=default, metadata=metadata)


LAYERS = ("inverse", "none", "glow", "finc", "emerging", "convexp", "snf", "unit")


@dataclass
class Config:
    """The resolved configuration of a run. Defaults follow the paper's training (supplement 7) and its L = 2, K = 16
    flow.
    """

    # data
    dataset: str = key("mnist", "data set: mnist, cifar10, imagenet, imagenet32, imagenet64, celeba, digits", "data")
    data_root: str | None = key(None, "folder of the data sets (default: DATA_ROOT or data/)", "data")
    resolution: int = key(0, "side of the images: celeba (64), imagenet (32), others resized (0: their own)", "data")
    data_aug: bool = key(False, "random crops (mnist) or shifts and flips (cifar10) of training images", "data")
    n_train: int = key(0, "use only that many training images, drawn by the seed (0: all)", "data")
    n_test: int = key(0, "use only the first test images (0: all)", "data")
    test: bool = key(False, "train on random images of image_size or resolution, for timing", "data")
    workers: int = key(0, "worker processes of the loaders", "data")
    # model
    image_size: tuple[int, ...] | None = key(None, "channels, height, width: set from the data (none)", "model")
    padding: int = key(0, "zero padding on each side (2 makes 28x28 images 32x32, so that three blocks fit)", "model")
    levels: int = key(256, "grey levels of a pixel (17 for scikit-learn's digits)", "model")
    alpha: float = key(1e-6, "margin of the logit: (v + alpha)(1 - 2 alpha); at least 1e-6", "model")
    num_blocks: int = key(2, "L: levels", "model")
    block_size: int = key(16, "K: steps a level", "model")
    coupling: str = key("small", "coupling network: small (Inverse-Flow) or snf (SNF, FInC)", "model", ("small", "snf"))
    coupling_width: int = key(512, "hidden channels of the coupling (0: no coupling)", "model")
    split_width: int = key(512, "hidden channels of the split prior's coupling", "model")
    first_squeeze: bool = key(True, "squeeze before the first level too, not only between levels", "model")
    split_prior: bool = key(True, "split half of the channels off between levels", "model")
    actnorm: bool = key(True, "activation normalisation in each step", "model")
    conv1x1: bool = key(False, "invertible 1x1 convolution in each step", "model")
    inv_conv: bool = key(True, "inverse convolution in each step", "model")
    inv_conv_no_pad: bool = key(False, "one more, of the next order (the published twin of inv_conv)", "model")
    inv_flow: bool = key(False, "the unit of four inverse convolutions TL, TR, BL, BR in each step", "model")
    ff: bool = key(False, "FInC Flow's masked convolution in each step", "model")
    ff_units: int = key(1, "FInC units a step", "model")
    emerging: bool = key(False, "Emerging convolution in each step", "model")
    convexp: bool = key(False, "convolution exponential in each step", "model")
    convexp_maps: bool = key(False, "learned additive maps before and after the convolution exponential", "model")
    snf: bool = key(False, "self-normalising convolution in each step", "model")
    snf_kernel_size: int = key(1, "kernel of the self-normalising convolution (odd)", "model")
    fc: bool = key(False, "num_blocks * block_size self-normalising fully connected layers and nothing else", "model")
    if_kernel_size: int = key(3, "kernel of the inverse, masked or Emerging convolution", "model")
    order: str = key(
        "alternate", "scan order of the inverse convolutions", "model", ("alternate", "cycle", "TL", "TR", "BL", "BR")
    )
    groups: int = key(1, "channel groups of the inverse convolutions", "model")
    init_std: float = key(0.01, "standard deviation of the free kernel entries at the start", "model")
    max_row_sum: float | None = key(None, "cap < 1 on a row's free taps: certifies a stable inverse", "model")
    activation: str = key(
        "Spline",
        "SLR, LLR, Spline, SELU, LeakyRelu, SmoothTanh or Identity (none)",
        "model",
        ("SLR", "LLR", "Spline", "SELU", "LeakyRelu", "SmoothTanh", "Identity"),
    )
    last_activation: bool = key(True, "an activation in the last step too", "model")
    n_bins: int = key(5, "bins of the spline", "model")
    tail_bound: float = key(20.0, "the spline acts on [-tail_bound, tail_bound]", "model")
    individual_weights: bool = key(True, "one spline for each position instead of one for the layer", "model")
    autocast: bool = key(False, "coupling networks in bfloat16; solves and log-determinants stay in float32", "model")
    # training
    epochs: int = key(10_000, "training epochs", "training")
    batch_size: int = key(100, "images a step, over all processes", "training")
    lr: float = key(1e-3, "learning rate", "training")
    lr_inv_conv: float = key(1.0, "factor on the learning rate of the inverse convolutions' kernels", "training")
    optimizer_name: str = key("Adam", "optimiser", "training", ("Adam", "Adamax", "SGD"))
    weight_decay: float = key(0.0, "weight decay", "training")
    scheduler_name: str = key(
        "Step", "schedule, one step an epoch", "training", ("Step", "Exponential", "MultiStep", "none")
    )
    gamma: float = key(0.1, "factor of the schedule", "training")
    step_epochs: int = key(50, "epochs between the factors of Step", "training")
    milestones: tuple[int, ...] = key((), "epochs of MultiStep", "training")
    warmup_epochs: int = key(2, "epochs of linear learning-rate warm-up (0: none)", "training")
    grad_clip_norm: float | None = key(50.0, "largest norm of the whole gradient (none: no limit)", "training")
    grad_clip: float | None = key(None, "largest absolute value of a gradient's entry (none: no limit)", "training")
    modified_grad: bool = key(True, "self-normalising layers: modified gradients, not exact ones", "training")
    add_recon_grad: bool = key(True, "add the reconstruction loss of the self-normalising layers", "training")
    recon_loss_weight: float = key(1.0, "its weight lambda", "training")
    sym_recon_grad: bool = key(False, "symmetric reconstruction loss", "training")
    only_R_recon: bool = key(False, "reconstruction gradient to the learned inverse only", "training")
    recon_loss_lr: float = key(0.0, "rate of GECO's update of lambda (0: lambda is constant)", "training")
    recon_alpha: float = key(0.9, "decay of GECO's moving average", "training")
    multi_gpu: bool = key(False, "refuse to start with one process (torchrun sets their number)", "training")
    # evaluation and files
    eval_epochs: int = key(1, "epochs between evaluations", "evaluation")
    eval_train: bool = key(False, "evaluate the training set too", "evaluation")
    max_eval_ex: int | None = key(None, "stop an evaluation after that many images (none: all)", "evaluation")
    eval_draws: int = key(1, "dequantisation draws averaged in the test likelihood", "evaluation")
    sample_epochs: int = key(10_000, "epochs between pictures; epochs 1-4, 10 and the last have them too", "evaluation")
    n_samples: int = key(100, "images of a sample grid", "evaluation")
    temperature: float = key(1.0, "standard deviation of the latents of the samples", "evaluation")
    sample_true_inv: bool = key(True, "a grid with the exact inverse too (self-normalising layers)", "evaluation")
    plot_recon: bool = key(True, "grids of images, reconstructions and differences", "evaluation")
    vis_epochs: int = key(10_000, "epochs between pictures of the first inverse convolution's kernel", "evaluation")
    log_interval: int = key(100, "steps between logged training losses", "evaluation")
    log_timing: bool = key(True, "write timing.csv: seconds of steps, evaluations and sampling", "evaluation")
    sample_dir: str = key("samples", "folder of the sample grids, inside the run folder", "evaluation")
    checkpoint_path: str | None = key(None, "folder of the checkpoints (default: in the run folder)", "evaluation")
    # launch
    out: str | None = key(None, "run folder (default: runs/inv_flow/<name>)", "launch")
    name: str = key("inv_flow", "name of the run", "launch")
    notes: str = key("", "free text, stored with the run", "launch")
    seed: int = key(0, "seed of everything random", "launch")
    device: str = key("auto", "auto, cpu, cuda[:i], mps", "launch")
    deterministic: bool = key(False, "refuse kernels whose result varies between runs", "launch")
    resume: bool = key(False, "go on from checkpoints/last.pt, with the same data, model and training keys", "launch")
    overwrite: bool = key(False, "replace a run that is already in the folder", "launch")
    evaluate: bool = key(False, "no training: evaluate and sample the run's best.safetensors", "launch")
    wandb: bool = key(False, "log to Weights & Biases too (it must be installed)", "launch")
    wandb_project: str = key("inverse-flow", "its project", "launch")
    wandb_entity: str | None = key(None, "its account", "launch")
    smoke: bool = key(False, "a tiny flow on scikit-learn's digits, a few steps of every phase", "launch")

    def replace(self, **changes: Any) -> "Config":
        """A copy with other values; raises UserError for unknown and dead keys and for values of the wrong type."""
        return dataclasses.replace(self, **{name: coerce(name, value) for name, value in changes.items()})

    def as_dict(self) -> dict[str, Any]:
        """Plain values, for JSON."""
        return dataclasses.asdict(self)

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.out or Path("runs") / "inv_flow" / self.name)

    @property
    def checkpoints(self) -> Path:
        """The folder of last.pt, best.pt, best.safetensors."""
        return Path(self.checkpoint_path or self.folder / "checkpoints")


SMOKE = {
    "dataset": "digits", "data_aug": False, "resolution": 0, "levels": 17, "n_train": 200, "n_test": 100, "padding": 0,
    "batch_size": 50, "num_blocks": 2, "block_size": 2, "split_width": 16, "epochs": 2, "warmup_epochs": 1, "lr": 1e-3,
    "n_samples": 16, "log_interval": 1, "tail_bound": 10.0,
}  # fmt: skip


def layer_choice(name: str) -> dict[str, bool]:
    """The step's linear layer by one name, for comparisons at equal depth: the keys it switches on and off."""
    if name not in LAYERS:
        raise UserError(f"layer={name}: expected one of {', '.join(LAYERS)}{suggest(name, LAYERS)}")
    keys = {"inverse": "inv_conv", "unit": "inv_flow", "finc": "ff"}
    keys |= {name: name for name in ("emerging", "convexp", "snf")}
    switches = dict.fromkeys([*keys.values(), "inv_conv_no_pad"], False)
    if name == "glow":
        return {**switches, "conv1x1": True}
    if name != "none":
        switches[keys[name]] = True
    return switches


_TYPES = typing.get_type_hints(Config)
FIELDS = {item.name: item for item in dataclasses.fields(Config)}
_BOOLEANS = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}


def coerce(name: str, value: Any) -> Any:
    """`value` (from a command line or a dict) as the type of key `name`. Raises UserError naming the key."""
    if name in DEAD:
        raise UserError(f"{name}: this published key is dead ({DEAD[name]})")
    if name not in FIELDS:
        raise UserError(f"unknown key {name}{suggest(name, FIELDS)}; --help lists all")
    kind = _TYPES[name]
    optional = type(None) in typing.get_args(kind)
    if optional:
        if value is None or value is False or str(value).lower() in ("none", "false", "inf"):
            return None
        kind = next(item for item in typing.get_args(kind) if item is not type(None))
    try:
        if typing.get_origin(kind) is tuple:
            items = value.replace("x", ",").split(",") if isinstance(value, str) else value
            value = tuple(int(item) for item in items if item != "")
        elif kind is bool:
            value = value if isinstance(value, bool) else _BOOLEANS[str(value).lower()]
        elif kind is int:
            if float(value) != int(float(value)):
                raise ValueError
            value = int(float(value))
        else:
            value = kind(value)
    except (ValueError, KeyError, TypeError, OverflowError):
        expected = getattr(kind, "__name__", "comma-separated whole numbers")
        raise UserError(f"{name}={value}: expected {expected}{' or none' if optional else ''}") from None
    choices = FIELDS[name].metadata["choices"]
    if choices and value not in choices:
        raise UserError(f"{name}={value}: expected one of {', '.join(choices)}{suggest(str(value), choices)}")
    return value


def parse(
    argv: list[str] | None, description: str, preset: dict[str, Any], extra: dict[str, dict] | None = None
) -> Config:
    """The configuration of a script; see `parse_given`."""
    return parse_given(argv, description, preset, extra)[0]


def parse_given(
    argv: list[str] | None, description: str, preset: dict[str, Any], extra: dict[str, dict] | None = None
) -> tuple[Config, dict[str, Any]]:
    """The configuration of a script (defaults, then its `preset`, then `--layer`, then the command line), and the keys
    that the command line set, those of `--preset` and `--layer` among them.

    `--key value` for every key (a bare `--key` switches a boolean on), or `--set key=value`. `extra` maps the names of
    the script's presets to what they change (`--preset`). Raises UserError for anything unknown or ill-typed.
    """
    parser = argparse.ArgumentParser(
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
        exit_on_error=False,
    )
    base = Config().replace(**preset)
    parser.add_argument("--layer", help=f"linear layer of a step: {', '.join(LAYERS)}")
    if extra:
        parser.add_argument("--preset", help=f"named settings: {', '.join(extra)}")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="any key, in another spelling")
    groups: dict[str, Any] = {}
    for name, item in FIELDS.items():
        title = item.metadata["group"]
        groups.setdefault(title, parser.add_argument_group(title))
        options = {"nargs": "?", "const": "true"} if _TYPES[name] is bool else {}
        groups[title].add_argument(
            f"--{name}", metavar="V", default=None, help=f"{item.metadata['help']} [{getattr(base, name)}]", **options
        )
    try:
        values, unknown = parser.parse_known_args(argv)
    except argparse.ArgumentError as error:
        raise UserError(str(error)) from None
    if unknown:
        name = unknown[0].lstrip("-").split("=")[0]
        coerce(name, "")  # a dead or unknown key has its own message
        raise UserError(f"unexpected argument {unknown[0]}")
    given = {name: value for name, value in vars(values).items() if value is not None}
    for pair in given.pop("set"):
        name, equals, value = pair.partition("=")
        if not equals:
            raise UserError(f"--set {pair}: expected KEY=VALUE")
        given[name] = value
    changes: dict[str, Any] = {}
    chosen, layer = given.pop("preset", None), given.pop("layer", None)
    if chosen is not None:
        if chosen not in extra:
            raise UserError(f"preset={chosen}: expected one of {', '.join(extra)}{suggest(chosen, extra)}")
        changes |= extra[chosen]
    if layer is not None:
        changes |= layer_choice(layer)
    if coerce("smoke", given.get("smoke", False)):
        full = base.replace(**changes)
        changes |= SMOKE | {"name": f"{full.name}_smoke", "coupling_width": min(full.coupling_width, 16)}
    changes |= given
    config = base.replace(**changes)
    return config, {name: getattr(config, name) for name in changes}
