"""Every option of an Inverse-Flow training, once: name, range, default, meaning, and the rule for a resumed run."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import AfterValidator, Field, StringConstraints, field_validator, model_validator

from common.errors import UserError, suggest
from common.options import (
    Count,
    Decay,
    Device,
    NonNegative,
    Options,
    Positive,
    Resume,
    Says,
    Seed,
    Whole,
    from_flags,
    option,
)

DATASETS = ("mnist", "cifar10", "imagenet", "imagenet32", "imagenet64", "celeba", "digits", "folder")
LAYERS = ("inverse", "none", "glow", "finc", "emerging", "convexp", "snf", "unit")


def _odd(value: int) -> int:
    if value % 2 == 0:
        raise ValueError("must be odd")
    return value


Text = Annotated[str, StringConstraints(pattern=r"^[^\x00-\x1f]+$"), Says("text")]
Side = Annotated[int, Field(ge=1, le=1024)]
Size = Annotated[tuple[Side, ...], Field(min_length=3, max_length=3), Says("channels,height,width, up to 1024 each")]
Kernel = Annotated[int, Field(ge=1, le=31)]
Width = Annotated[int, Field(ge=1, le=8192)]
Cap = Annotated[float, Field(gt=0, lt=1)]


class Config(Options):
    """The resolved configuration of a run. Defaults follow the paper's training (supplement 7) and its L = 2, K = 16
    flow.
    """

    DEAD: ClassVar[Mapping[str, str]] = {
        "grad_clip_value": "it was commented out in the published code; use grad_clip (by value) or grad_clip_norm",
        "loss_bpd": "nothing read it in the published code; bits per dimension are always reported",
        "run_name": "nothing read it in the published code; use name",
        "Optimizer": "nothing read it in the published code; use optimizer_name",
        "Scheduler": "nothing read it in the published code; use scheduler_name",
        "input_size": "nothing read it in the published code; use image_size",
    }

    # data
    dataset: Literal[DATASETS] = option("mnist", "data set", group="data")
    data_root: Text | None = option(
        None, "folder of the data sets (default: DATA_ROOT or data/)", group="data", resume="change"
    )
    resolution: int = option(
        0,
        "side of the images: celeba (64), imagenet (32), others resized (0: their own; folder: 64 at most)",
        group="data",
        ge=0,
        le=1024,
    )
    data_aug: bool = option(False, "random crops (mnist), shifts and flips (cifar10) of training images", group="data")
    n_train: Whole = option(0, "use only that many training images, drawn by the seed (0: all)", group="data")
    n_test: Whole = option(0, "use only the first test images (0: all)", group="data")
    test: bool = option(False, "train on random images of image_size or resolution, for timing", group="data")
    workers: int = option(0, "worker processes of the loaders", group="data", resume="change", ge=0, le=256)
    # model
    image_size: Size | None = option(None, "set from the data (none)", group="model")
    padding: int = option(
        0,
        "zero padding on each side (2 makes 28x28 images 32x32: three blocks fit)",
        group="model",
        ge=0,
        le=64,
    )
    levels: int = option(256, "grey levels of a pixel (17 for scikit-learn's digits)", group="model", ge=2, le=256)
    alpha: float = option(
        1e-6, "margin of the logit: (v + alpha)(1 - 2 alpha); with less, float32 rounds bright pixels to 1",
        group="model", ge=1e-6, lt=0.5,
    )  # fmt: skip
    num_blocks: int = option(2, "L: levels", group="model", ge=1, le=16)
    block_size: int = option(16, "K: steps a level", group="model", ge=1, le=1024)
    num_layers: Count | None = option(
        None, "steps of all levels of a CNN (coupling_width=0) or fully connected model: block_size = num_layers // "
        "num_blocks (none: block_size says)", group="model", le=16384,
    )  # fmt: skip
    coupling: Literal["small", "snf"] = option(
        "small", "coupling network: small (Inverse-Flow) or snf (SNF, FInC)", group="model"
    )
    coupling_width: int = option(512, "hidden channels of the coupling (0: no coupling)", group="model", ge=0, le=8192)
    split_width: Width = option(512, "hidden channels of the split prior's coupling", group="model")
    first_squeeze: bool = option(True, "squeeze before the first level too, not only between levels", group="model")
    split_prior: bool = option(True, "split half of the channels off between levels", group="model")
    actnorm: bool = option(True, "activation normalisation in each step", group="model")
    conv1x1: bool = option(False, "invertible 1x1 convolution in each step", group="model")
    inv_conv: bool = option(True, "inverse convolution in each step", group="model")
    inv_conv_no_pad: bool = option(False, "one more, of the next order (the published twin of inv_conv)", group="model")
    inv_flow: bool = option(False, "the unit of four inverse convolutions TL, TR, BL, BR in each step", group="model")
    ff: bool = option(False, "FInC Flow's masked convolution in each step", group="model")
    ff_units: int = option(1, "FInC units a step", group="model", ge=1, le=64)
    emerging: bool = option(False, "Emerging convolution in each step", group="model")
    convexp: bool = option(False, "convolution exponential in each step", group="model")
    convexp_maps: bool = option(
        False, "learned additive maps before and after the convolution exponential", group="model"
    )
    snf: bool = option(False, "self-normalising convolution in each step", group="model")
    snf_kernel_size: Annotated[Kernel, AfterValidator(_odd)] = option(
        1, "kernel of the self-normalising convolution (odd)", group="model"
    )
    fc: bool = option(
        False, "num_blocks * block_size self-normalising fully connected layers and nothing else", group="model"
    )
    if_kernel_size: Kernel = option(3, "kernel of the inverse, masked or Emerging convolution", group="model")
    order: Literal["alternate", "cycle", "TL", "TR", "BL", "BR"] = option(
        "alternate", "scan order of the inverse convolutions", group="model"
    )
    groups: Width = option(1, "channel groups of the inverse convolutions", group="model")
    init_std: NonNegative = option(
        0.01, "standard deviation of the free kernel entries at the start", group="model", le=10
    )
    max_row_sum: Cap | None = option(
        None, "cap on a row's free taps: certifies a stable solve, |x| <= |y| / (1 - cap)", group="model"
    )
    activation: Literal["SLR", "LLR", "Spline", "SELU", "LeakyRelu", "SmoothTanh", "Identity"] = option(
        "Spline", "activation of a step; Identity is none", group="model"
    )
    last_activation: bool = option(True, "an activation in the last step too", group="model")
    n_bins: int = option(5, "bins of the spline", group="model", ge=2, le=999)
    tail_bound: Positive = option(20.0, "the spline acts on [-tail_bound, tail_bound]", group="model", le=1e6)
    individual_weights: bool = option(True, "one spline for each position instead of one for the layer", group="model")
    amp: bool = option(
        False, "coupling networks in bfloat16; solves and log-determinants stay in float32", group="model",
        flags=("--autocast",),
    )  # fmt: skip
    # training
    epochs: Count = option(10_000, "training epochs", group="training", resume="change")
    batch_size: Count = option(100, "images a step, over all processes", group="training")
    lr: Positive = option(1e-3, "learning rate", group="training", resume="change")
    lr_inv_conv: NonNegative = option(
        1.0, "factor on the learning rate of the inverse convolutions' kernels", group="training", resume="change"
    )
    optimizer_name: Literal["Adam", "Adamax", "SGD"] = option("Adam", "optimiser", group="training")
    weight_decay: NonNegative = option(0.0, "weight decay", group="training")
    scheduler_name: Literal["Step", "Exponential", "MultiStep", "none"] = option(
        "Step", "schedule, one step an epoch", group="training"
    )
    gamma: Positive = option(0.1, "factor of the schedule", group="training", le=10)
    step_epochs: Count = option(50, "epochs between the factors of Step", group="training")
    milestones: tuple[Count, ...] = option((), "epochs of MultiStep", group="training")
    warmup_epochs: Whole = option(2, "epochs of linear learning-rate warm-up (0: none)", group="training")
    grad_clip_norm: Positive | None = option(
        50.0, "largest norm of the whole gradient (none: no limit)", group="training"
    )
    grad_clip: Positive | None = option(
        None, "largest absolute value of a gradient's entry (none: no limit)", group="training"
    )
    modified_grad: bool = option(True, "self-normalising layers: modified gradients, not exact ones", group="training")
    add_recon_grad: bool = option(True, "add the reconstruction loss of the self-normalising layers", group="training")
    recon_loss_weight: NonNegative = option(1.0, "its weight lambda", group="training")
    sym_recon_grad: bool = option(False, "symmetric reconstruction loss", group="training")
    only_R_recon: bool = option(False, "reconstruction gradient to the learned inverse only", group="training")
    recon_loss_lr: NonNegative = option(
        0.0, "rate of GECO's update of lambda (0: lambda is constant)", group="training"
    )
    recon_alpha: Decay = option(0.9, "decay of GECO's moving average", group="training")
    multi_gpu: bool = option(
        False, "refuse to start with one process (torchrun sets their number)", group="training", resume="call"
    )
    # evaluation and files
    eval_epochs: Count = option(1, "epochs between evaluations", group="evaluation", resume="change")
    eval_train: bool = option(False, "evaluate the training set too", group="evaluation", resume="change")
    max_eval_ex: Count | None = option(
        None, "stop an evaluation after that many images (none: all)", group="evaluation", resume="change"
    )
    eval_draws: int = option(
        1, "dequantisation draws averaged in the test likelihood", group="evaluation", resume="change", ge=1, le=10_000
    )
    sample_epochs: Count = option(
        10_000, "epochs between pictures; epochs 1-4, 10 and the last have them too", group="evaluation",
        resume="change",
    )  # fmt: skip
    n_samples: int = option(100, "images of a sample grid", group="evaluation", resume="change", ge=1, le=10_000)
    temperature: NonNegative = option(
        1.0, "standard deviation of the latents of the samples", group="evaluation", resume="change"
    )
    sample_true_inv: bool = option(
        True, "a grid with the exact inverse too (self-normalising layers)", group="evaluation", resume="change"
    )
    plot_recon: bool = option(
        True, "grids of images, reconstructions and differences", group="evaluation", resume="change"
    )
    vis_epochs: Count = option(
        10_000, "epochs between pictures of the first inverse convolution's kernel", group="evaluation",
        resume="change",
    )  # fmt: skip
    log_interval: Count = option(100, "steps between logged training losses", group="evaluation", resume="change")
    log_timing: bool = option(
        True, "write timing.csv: milliseconds of training steps and of sampling", group="evaluation", resume="change"
    )
    verbose: bool = option(
        False, "log each layer's log-determinant and reconstruction loss with the training loss", group="evaluation",
        resume="change",
    )  # fmt: skip
    sample_dir: Text = option(
        "samples", "folder of the sample grids, inside the run folder", group="evaluation", resume="change"
    )
    checkpoint_path: Text | None = option(
        None, "folder of the checkpoints (default: in the run folder)", group="evaluation", resume="call"
    )
    # launch
    out: Text | None = option(None, "run folder (default: runs/inv_flow/<name>)", group="launch", resume="call")
    name: Text = option("inv_flow", "name of the run", group="launch", resume="call")
    notes: str = option("", "free text, stored with the run", group="launch", resume="change")
    seed: Seed = option(0, "seed of everything random", group="launch")
    device: Device = option("auto", "where to compute", group="launch", resume="change")
    tf32: bool = option(
        False, "let a GPU round float32 convolutions and matrix products to TF32", group="launch", resume="change"
    )
    deterministic: bool = option(
        False, "refuse kernels whose result varies between runs", group="launch", resume="change"
    )
    cuda_graph: bool = option(
        False, "one GPU: launch a training step as one CUDA graph", group="launch", resume="change"
    )
    resume: Resume = option(
        False, "go on from checkpoints/last.pt; auto: where there is one, else start", group="launch", resume="call"
    )
    overwrite: bool = option(False, "replace a run that is already in the folder", group="launch", resume="call")
    evaluate: bool = option(
        False, "no training: evaluate and sample the run's best.safetensors", group="launch", resume="call"
    )
    dry_run: bool = option(False, "check the options, print them as JSON, and leave", group="launch", resume="call")
    wandb: bool = option(False, "log to Weights & Biases too (it must be installed)", group="launch", resume="change")
    wandb_project: Text = option("inverse-flow", "its project", group="launch", resume="change")
    wandb_entity: Text | None = option(None, "its account", group="launch", resume="change")
    smoke: bool = option(
        False, "this flow with an eighth of its steps and a 32nd of its widths, on scikit-learn's digits, two epochs",
        group="launch", resume="call",
    )  # fmt: skip

    @model_validator(mode="before")
    @classmethod
    def _older_names(cls, values: Any) -> Any:
        return older_names(values) if isinstance(values, Mapping) else values

    @field_validator("grad_clip_norm", mode="before")
    @classmethod
    def _published_truth(cls, value: Any) -> Any:
        return 1.0 if value is True else value  # the published files write True, which meant a norm of 1

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.num_layers is not None:
            if self.coupling_width and not self.fc:
                raise ValueError("num_layers is for CNN (coupling_width=0) and fully connected (fc) models; here "
                                 "num_blocks and block_size say how deep the flow is")  # fmt: skip
            if self.num_layers < self.num_blocks:
                raise ValueError(f"num_layers={self.num_layers}: fewer than num_blocks={self.num_blocks}")
        if self.scheduler_name == "MultiStep" and not self.milestones:
            raise ValueError("scheduler_name=MultiStep needs milestones, the epochs at which it acts")
        if self.resume and self.overwrite:
            raise ValueError("resume and overwrite contradict each other; leave one out")
        return self

    @property
    def steps(self) -> int:
        """Steps of a level."""
        return self.block_size if self.num_layers is None else self.num_layers // self.num_blocks

    @property
    def folder(self) -> Path:
        """The run folder."""
        return Path(self.out or Path("runs") / "inv_flow" / self.name)

    @property
    def checkpoints(self) -> Path:
        """The folder of last.pt, best.pt, best.safetensors."""
        return Path(self.checkpoint_path or self.folder / "checkpoints")


def older_names(values: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration with the names that its options have today."""
    return {"amp" if name == "autocast" else name: value for name, value in values.items()}


def in_groups(*groups: str) -> list[str]:
    """The names of the options of some groups."""
    return [name for name, field in Config.model_fields.items() if field.json_schema_extra["group"] in groups]


def layer_choice(name: str) -> dict[str, bool]:
    """The step's linear layer by one name, for comparisons at equal depth: the options it switches on and off."""
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


def smoke(full: Config) -> dict[str, Any]:
    """What `--smoke` changes in a configuration: the size of the flow and of its training, not their kind."""
    return {
        "name": f"{full.name}_smoke", "dataset": "digits", "data_aug": False, "resolution": 0, "padding": 0,
        "levels": 17, "n_train": 200, "n_test": 100, "batch_size": 50, "epochs": 2, "warmup_epochs": 1,
        "n_samples": 16, "log_interval": 1, "block_size": -(-full.block_size // 8), "num_layers": None,
        "coupling_width": -(-full.coupling_width // 32), "split_width": -(-full.split_width // 32),
    }  # fmt: skip


# ---- options that would do nothing

_OF_FC = ("layer", "coupling", "coupling_width", "split_width", "first_squeeze", "split_prior", "actnorm", "conv1x1",
          "inv_conv", "inv_conv_no_pad", "inv_flow", "ff", "emerging", "convexp", "snf", "order", "groups",
          "if_kernel_size", "init_std", "max_row_sum", "lr_inv_conv", "amp", "vis_epochs")  # fmt: skip
# options, when they have an effect, and what they need in words
NEEDS: tuple[tuple[tuple[str, ...], Callable[[Config], bool], str], ...] = (
    (_OF_FC, lambda c: not c.fc, "a convolutional flow; fc has fully connected layers and activations only"),
    (("order",), lambda c: c.inv_conv or c.inv_conv_no_pad, "inv_conv; FInC and the unit have all four orders"),
    (("groups", "lr_inv_conv", "vis_epochs"), lambda c: c.inv_conv or c.inv_conv_no_pad or c.inv_flow,
     "an inverse convolution (inv_conv or inv_flow)"),
    (("init_std",), lambda c: c.inv_conv or c.inv_conv_no_pad or c.inv_flow or c.ff,
     "an inverse or FInC convolution (inv_conv, inv_flow or ff)"),
    (("if_kernel_size", "max_row_sum"),
     lambda c: c.inv_conv or c.inv_conv_no_pad or c.inv_flow or c.ff or c.emerging,
     "an inverse, FInC or Emerging convolution (inv_conv, inv_flow, ff or emerging)"),
    (("ff_units",), lambda c: c.ff and not c.fc, "ff"),
    (("convexp_maps",), lambda c: c.convexp and not c.fc, "convexp"),
    (("snf_kernel_size",), lambda c: c.snf and not c.fc, "snf"),
    (("modified_grad", "add_recon_grad", "sample_true_inv"), lambda c: c.snf or c.fc, "snf or fc"),
    (("recon_loss_weight", "sym_recon_grad", "only_R_recon", "recon_loss_lr"),
     lambda c: (c.snf or c.fc) and c.add_recon_grad, "snf or fc, with add_recon_grad"),
    (("recon_alpha",), lambda c: (c.snf or c.fc) and c.add_recon_grad and c.recon_loss_lr > 0,
     "snf or fc, with recon_loss_lr above 0"),
    (("n_bins", "tail_bound", "individual_weights"), lambda c: c.activation == "Spline", "activation=Spline"),
    (("last_activation",), lambda c: c.activation != "Identity", "an activation"),
    (("split_prior",), lambda c: c.num_blocks > 1, "num_blocks of at least 2"),
    (("split_width",), lambda c: c.split_prior and c.num_blocks > 1, "split_prior and num_blocks of at least 2"),
    (("coupling", "amp"), lambda c: c.coupling_width > 0 or (c.split_prior and c.num_blocks > 1),
     "a coupling (coupling_width above 0)"),
    (("gamma",), lambda c: c.scheduler_name != "none", "a schedule (scheduler_name)"),
    (("step_epochs",), lambda c: c.scheduler_name == "Step", "scheduler_name=Step"),
    (("milestones",), lambda c: c.scheduler_name == "MultiStep", "scheduler_name=MultiStep"),
    (("dataset", "data_root", "data_aug"), lambda c: not c.test, "images; test takes random ones"),
    (("wandb_project", "wandb_entity"), lambda c: c.wandb, "wandb"),
)  # fmt: skip
# what an evaluation reads, beside the options that the weights were trained with
EVALUATION = {
    "data_root", "workers", "n_test", "batch_size", "max_eval_ex", "eval_draws", "n_samples", "temperature", "verbose",
    "sample_true_inv", "plot_recon", "sample_dir", "checkpoint_path", "out", "name", "device", "tf32", "deterministic",
    "evaluate", "dry_run", "smoke", "log_timing",
}  # fmt: skip


def trained_options() -> set[str]:
    """Options that belong to the weights: the model, its data, the seed of their split; not where the data lie."""
    return {*in_groups("model", "data"), "seed", "modified_grad"} - {"data_root", "workers", "n_test"}


def refuse_idle(config: Config, base: Config, given: Mapping[str, Any]) -> None:
    """Raise UserError for a word of the command line that changes nothing, with what it would need.

    `base` is the configuration without those words: to repeat its value is harmless.
    """
    if config.evaluate:
        for name in given:
            if name in Config.model_fields and name not in EVALUATION | trained_options():
                raise UserError(f"--{name} does nothing with --evaluate, which trains nothing; leave it out")
    for names, works, needed in NEEDS:
        for name in names:
            changed = name in given and (name == "layer" or getattr(config, name) != getattr(base, name))
            if changed and not works(config):
                raise UserError(f"--{name} does nothing here: it needs {needed}")


# ---- the command line


def parse(argv: list[str], about: str, preset: Mapping[str, Any], presets: Mapping[str, dict] | None = None) -> Config:
    """The configuration of a script; see `parse_given`."""
    return parse_given(argv, about, preset, presets)[0]


def parse_given(
    argv: list[str], about: str, preset: Mapping[str, Any], presets: Mapping[str, dict] | None = None
) -> tuple[Config, dict[str, Any]]:
    """The configuration of a script (defaults, then its `preset`, `--preset`, `--layer`, `--smoke`, the command line),
    and what the command line set, the options of `--preset` and `--layer` among them.

    `presets` maps the names for `--preset` to what they change. Raises UserError for anything unknown, out of range, or
    without effect.
    """
    named: dict[str, Any] = {}
    extra = {"layer": f"linear layer of a step: {', '.join(LAYERS)}"}
    extra |= {"preset": f"named settings: {', '.join(presets)}"} if presets else {}

    def below(given: dict[str, Any]) -> dict[str, Any]:
        chosen = given.get("preset")
        if chosen is not None and chosen not in presets:
            raise UserError(f"preset={chosen}: expected one of {', '.join(presets)}{suggest(chosen, presets)}")
        named.update(presets[chosen] if chosen is not None else {})
        named.update(layer_choice(given["layer"]) if "layer" in given else {})
        full = Config.build(preset, named)
        shrunk = Config.build({"smoke": given["smoke"]}, spelling="--").smoke if "smoke" in given else full.smoke
        return {**preset, **named, **(smoke(full) if shrunk else {})}

    config, given = from_flags(Config, argv, about, below, extra)
    refuse_idle(config, Config.build(below(given)), given)
    return config, {name: getattr(config, name) for name in (*named, *given) if name in Config.model_fields}
