"""The options of main.py, each declared once: hydra composes them from YAML files, the models here judge the result.

`___configs/base.yaml` holds the value of every option, the files in the folders what differs from it; `--help` prints
meaning, range and value. A file of the user's own in any folder starts with `defaults: [base, _self_]` and holds
differences, because the folder of `base.yaml` is always on the search path.
"""

import importlib.util
import itertools
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from common import datasets
from common.datasets import folder
from common.errors import UserError, suggest
from common.options import (
    Count,
    Decay,
    Device,
    Fraction,
    NonNegative,
    Options,
    Positive,
    Says,
    Seed,
    Whole,
    all_names,
    expects,
    field_at,
    flat,
    option,
    unknown,
)
from nfpi import glem
from nfpi.augment import CNN_RECIPES, RECIPES
from nfpi.layers import ConvType, FlowType
from nfpi.model import FlowConfig, LevelMethod

FOLDER, HELD_OUT, LARGEST = "folder", 0.1, 32  # a folder of one's own: held out without test/, largest side
CONFIGS = Path(__file__).parent / "___configs"
MAX_YAML_BYTES = 1_000_000

Depth = Annotated[int, Field(ge=0, le=256)]
Width = Annotated[int, Field(ge=1, le=8192)]
Side = Annotated[int, Field(ge=1, le=4096)]
Epoch = Annotated[int, Field(ge=-1, le=1_000_000_000)]
Interval = Annotated[list[Epoch], Field(min_length=2, max_length=2), Says("two epochs of at least -1, [first, last]")]
Factor = Annotated[float, Field(gt=0, le=1)]
Temperature = Annotated[float, Field(ge=0, le=100)]
Schedule = Literal["lin", "geom"]
Method = Literal["one_per_class_all_in_center", "one_per_class_gaussian_checkpoint", "one", "one_conditioned_on_images"]
Strategy = Literal["do_not_use", "nf_datasets", "nf_datasets_resample", "mix_datasets", "mix_datasets_resample"]
Compiled = Literal["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]


def same(help: str, **limits: Any) -> Any:
    """An option that a resumed run may not change. The values of all options are in base.yaml."""
    return option(..., help, **limits)


def change(help: str, **limits: Any) -> Any:
    """An option that a resumed run may change; the change is printed."""
    return option(..., help, resume="change", **limits)


def call(help: str, **limits: Any) -> Any:
    """An option of this call alone."""
    return option(..., help, resume="call", **limits)


class Average(Options):
    """train.ema"""

    beta: Decay = same("largest decay of the average of the weights")
    update_after_step: Whole = same("updates that only copy the weights")
    update_every: Count = same("steps an update")
    power: Annotated[float, Field(ge=0, le=1000)] = same("the decay is 1 - (1 + updates)^-power")


class Train(Options):
    """train"""

    epochs: Count = change("epochs")
    batch_size: Count = same("images a step, over all processes")
    init_batch_size: Annotated[int, Field(ge=2, le=10**9)] = same("images of the data-dependent initialisation")
    optimizer: Literal["adamax", "adam", "adamw"] = same("optimiser")
    lr: Positive = change("learning rate")
    lr_decay: Factor = change("factor of lr from every epoch in step_size on")
    step_size: list[Whole] = change("epochs at which lr is multiplied by lr_decay")
    warmup_steps: Whole = change("steps of the linear warm-up")
    center_warmup_epochs: Whole = same("first epoch after which the Gaussians may move")
    ema_name: Annotated[Literal["ema", ""], Says("ema, or ''")] = same("'' = no average of the weights")
    ema: Average = same("the average of the weights")


class Test(Options):
    """test"""

    batch_size: Count = change("images a batch of the test")
    uniform_noise_value: Fraction | None = change("null = uniform_noise_value; 0 = noise-free test images")

    @field_validator("uniform_noise_value", mode="before")
    @classmethod
    def _is_no_limit(cls, value: Any) -> Any:
        if str(value).lower() in ("inf", "false"):  # which mean "no limit" where None does
            raise ValueError("expected a number of at least 0 and of at most 1, or null")
        return value


class FpiInfo(Options):
    """val.gmm.fpi_info"""

    lambda_fpi_mu: NonNegative = same("lambda, the weight of the KL separation; equal to lambda_fpi_sigma")
    lambda_fpi_sigma: NonNegative = same("the same; both weigh one objective")
    exp_den_update: bool = same("1: pair weights c/KL; 0: exp(-KL/s)/s, s the mean of alpha KL")
    identity_diag: bool = same("start variance reparam_method.sigmoid.a instead of the latents'")
    max_iters: Count = same("iterations at most")
    epsilon_convergence: NonNegative = same("stop when no mean and no variance moves further (L2)")
    use_isotropic_variance_when_training_mean: bool = same("mean update with averaged variances")
    sum_mu_diffs_arr_square: bool = same("variance update with summed squares of the means' differences")
    interval_mu: Interval = same("epochs, inclusive, in which the means move; [-1, -1] = never")
    interval_sigma: Interval = same("the same of the variances")
    pw_kld_factors_scale: Annotated[float, Field(ge=1e-3, le=1e9)] = same("alpha")
    variance_update: Literal["upstream", "exact"] = same(
        "upstream: the published sqrt(A B)/A; exact: stationary in means and variances, without the two approximations "
        "above")  # fmt: skip
    damping: Decay = same("weight of the previous iterate")


class Sigmoid(Options):
    """val.gmm.reparam_method.sigmoid"""

    a: Positive = same("v = c + a / (1 + exp(-b x)); also the start variance of identity_diag")
    b: Positive = same("see a")
    c: NonNegative = same("see a")


class NoReparam(Options):
    """val.gmm.reparam_method.no_reparam"""

    eps: Positive = same("smallest variance")
    init_value: Positive = same("start variance")


class ReparamMethod(Options):
    """val.gmm.reparam_method"""

    sigmoid: Sigmoid = same("variances between c and c + a")
    no_reparam: NoReparam = same("variances with a floor")


class Gmm(Options):
    """val.gmm"""

    use_train_dataset: bool = same("0: the Gaussians are fitted on a held-out part 1 - train_ratio, which joins the "
                                   "training images from merge_datasets_after on")  # fmt: skip
    every_n_epochs: Count = same("the Gaussians move after every n-th epoch, until merged")
    merge_datasets_after: Whole = same("from this epoch on the Gaussians are frozen and the average runs")
    gaussian_method_name: Method = same("one Gaussian a class, or one for all")
    training_algorithm: Literal["fpi_nf_kld", "fpi_nf", "glem"] = same("fpi_nf: lambda = 0; glem: gradients")
    fpi_info: FpiInfo = same("the fixed point iteration")
    n_loops: Count = same("glem: passes over the latents")
    mu_lr_arr: list[NonNegative] = same("glem: step size of the means at mu_lr_steps_arr")
    mu_lr_steps_arr: list[Whole] = same("glem: epochs")
    sigma_lr_arr: list[NonNegative] = same("glem: step size of the variances at sigma_lr_steps_arr")
    sigma_lr_steps_arr: list[Whole] = same("glem: epochs")
    manual_sched_lr_mu: Schedule = same("glem: linear or geometric between the epochs")
    manual_sched_lr_sigma: Schedule = same("glem: the same")
    kld: NonNegative = same("glem: replaces the first entry of both lambda_kld arrays")
    lambda_kld_mu_arr: list[NonNegative] = same("glem: weight of the KL at lambda_kld_mu_steps, means")
    lambda_kld_mu_steps: list[Whole] = same("glem: epochs")
    lambda_kld_sigma_arr: list[NonNegative] = same("glem: weight of the KL at lambda_kld_sigma_steps, variances")
    lambda_kld_sigma_steps: list[Whole] = same("glem: epochs")
    manual_sched_lambda_kld_mu: Schedule = same("glem: linear or geometric between the epochs")
    manual_sched_lambda_kld_sigma: Schedule = same("glem: the same")
    lambda_nf_mu_arr: list[NonNegative] = same("glem: weight of the likelihood at lambda_nf_mu_steps, means")
    lambda_nf_mu_steps: list[Whole] = same("glem: epochs")
    lambda_nf_sigma_arr: list[NonNegative] = same("glem: weight of the likelihood at lambda_nf_sigma_steps, variances")
    lambda_nf_sigma_steps: list[Whole] = same("glem: epochs")
    manual_sched_lambda_nf_mu: Schedule = same("glem: linear or geometric between the epochs")
    manual_sched_lambda_nf_sigma: Schedule = same("glem: the same")
    kld_blank_mu: bool = same("glem: neither ranges nor weights, means")
    kld_blank_sigma: bool = same("glem: the same, variances")
    use_adam_for_gradients: bool = same("glem: Adam's direction")
    reset_adam_after_first_iteration: bool = same("glem: forget Adam's moments after the first update")
    adam_beta1: Decay = same("glem")
    adam_beta2: Decay = same("glem")
    reparam_name: Literal["sigmoid", "no_reparam"] = same("glem: how variances stay positive")
    reparam_method: ReparamMethod = same("their numbers")


class Val(Options):
    """val"""

    batch_size: Count = same("latents a batch, for the Gaussians")
    gmm: Gmm = same("the class Gaussians")


class LabelEncoder(Options):
    """label_encoder"""

    pxh: Side = same("rows of the class band below the image (one_conditioned_on_images)")
    iters: Annotated[int, Field(ge=0, le=10**6)] = same("iterations that push the classes' bands apart")


class Level(Options):
    """level_method"""

    choice: LevelMethod = same("which halves of the splits belong to the latent")
    level_idx: Annotated[int, Field(ge=1, le=16)] = same("all_levels_idx: the first level of the latent")
    spcb: Literal["ZeroConv2d"] = same("the prior of the other halves")


class Dataset(Options):
    """dataset_info.<name>"""

    ch: Annotated[int, Field(ge=1, le=64)] = same("channels of the flow's input")
    h: Side = same("its height")
    w: Side = same("its width")
    train_size: Count = same("images of the training set; the size of generated sets")
    num_classes: Annotated[int, Field(ge=1, le=100_000)] = same("classes")
    train_ratio: Annotated[float, Field(gt=0, lt=1)] = same("use_train_dataset=0: the part that trains the flow")
    augmentation: Literal[tuple(RECIPES)] = same("recipe of nfpi/augment.py")
    cnn: Literal[tuple(CNN_RECIPES)] = same("recipe of nfpi/cnn.py")


class DatasetInfo(Options):
    """dataset_info; further entries are data sets."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Dataset]
    items_per_class_train: Whole = same("images a class that train the flow; 0 = all")
    items_per_class_val: Whole = same("images a class on which the Gaussians are fitted; 0 = all")


class Sgd(Options):
    """classification.sgd"""

    momentum: Decay = change("no effect, as published: the one cycle moves it from 0.95 to 0.85 and back")
    weight_decay: NonNegative = change("weight decay")
    max_lr: Positive = change("top of the one cycle")


class Adam(Options):
    """classification.adam"""

    lr: Positive = change("learning rate")
    steps: list[Whole] = change("epochs at which lr is multiplied by steps_decay")
    steps_decay: Factor = change("see steps")


class CnnRun(Options):
    """classification.<name>"""

    epochs: Count = change("epochs")
    batch_size: Annotated[int, Field(ge=2, le=10**9)] = change("images a step, over all processes")
    imgs_per_class: Whole = change("real images a class; 0 = all")


class Classification(Options):
    """classification; further entries are data sets."""

    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, CnnRun]
    resnet_version: Literal[18, 34, 50, 101, 152] = change("layers of the ResNet")
    stem: Literal["small", "imagenet"] = change(
        "small: 3x3, stride 1, no pooling; imagenet: torchvision's own, a sixteenth of the work")  # fmt: skip
    drop_last: bool = change("leave out a last batch that is not full")
    optimizer_name: Literal["sgd", "adam"] = change("optimiser")
    sgd: Sgd = change("one cycle of SGD")
    adam: Adam = change("Adam")


class Config(Options):
    """All options."""

    variant: str = call("part of the run folder's name")
    extra: str = call("last part of the run folder's name")
    dry_run: bool = call("check everything that needs no data, print the options as JSON, and leave")
    resume: Annotated[Literal["", "auto"], Says("auto, or ''")] = call(
        "auto: go on with this command's newest unfinished run, else start one"
    )
    train_nf: bool = call("train the flow")
    test_nf_alone: bool = call("test it (Bayes' rule, bits/dim)")
    num_test_alone: Annotated[int, Field(ge=1, le=10**6)] = call("tests, each with other dequantisation noise")
    train_classifier: bool = call("train CNNs on generated images")
    nf_ckpt_path: str = call("resume: <run>/checkpoints/state_*.pt of an unfinished run")
    nf_load_path: str = call("with train_nf=0: weights (.safetensors) or a state (.pt)")
    nf_weights_load_path: str = same("pre-trained flow weights, loaded after the data-dependent initialisation")
    gaussians_load_path: str = same("a weights file whose class Gaussians replace the initial ones")
    cnn_load_path: str = call("cnn.safetensors: test this CNN instead of training one")

    device: Device = change("device")
    seed: Seed = same("seed of everything random")
    deterministic: bool = change("on a GPU: refuse kernels whose result varies from run to run")
    trainer_precision: Literal[32, 64] = same("bits of a floating point number")
    tf32: bool = change("on a GPU: products and convolutions in TF32, with 10 bits of mantissa")
    amp: bool = change("bfloat16 in the coupling nets and CNNs while they train; all else as it is")
    cuda_graph: bool = change("one GPU: launch a training step of the flow as one CUDA graph")
    torch_compile: bool = change("compile the flow")
    torch_compile_mode: Compiled = change("of torch.compile")
    wandb: str = change("project name; '' = off")
    save_start_epoch: Whole = change("first epoch with pictures")
    save_every_n_epochs: Whole = change("pictures every n epochs and at the end; 0 = none")
    test_every_n_epochs: Count = change("test every n epochs and at the end")
    save_model_ckpt_every_n_epochs: Count = change("full state every n epochs and at the end")

    conv_type: ConvType = same("1x1 convolutions")
    flow_type: FlowType = same("coupling layers")
    use_attention_after: bool = same("attention after every coupling net")
    num_levels: Annotated[int, Field(ge=1, le=12)] = same("levels")
    num_flows: list[Annotated[int, Field(ge=1, le=256)]] = same("flow steps of each level")
    num_blocks: list[Depth] = same("residual blocks of the coupling nets of each level")
    hidden_channels: list[Width] = same("their channels")
    activation_checkpointing: bool = change("recompute each step in the backward pass: less memory, more time")
    bits: Annotated[int, Field(ge=1, le=8)] = same("bits of a grey level")
    T: Temperature = change("sampling temperature (factor of the standard deviation)")
    only_T: bool = change("CNNs at T only, not at 1.2 ... 0.7")
    temperature_sampling_for_results: bool = change("grids at T = 0.1 ... 1.0 after training")
    uniform_noise_value: Fraction = same("uniform noise on pixels, for recipes with noise")
    level_method: Level = same("a file of ___configs/level_method, or its parts")
    train: Train = same("training of the flow")
    test: Test = same("test of the flow")
    val: Val = same("the images and Gaussians of the latent space")
    label_encoder: LabelEncoder = same("the class band")

    dataset_name: str = same("an entry of dataset_info")
    dataset_nf: str = same(
        "<data_path>/<dataset_nf>/<dataset_nf>.pickle, or a set of common.datasets; folder: the images below data_path"
    )
    dataset_classification: str = call("images of the real-data CNN; a path ending in .pickle: a generated set")
    data_path: str | None = change("folder of the data sets; null: the environment's DATA_ROOT, else data/")
    dataset_info: DatasetInfo = same("data sets")

    classifier_nf_strategy: Strategy = change("what CNNs are trained on: real, generated, or both")
    do_all_classifications: bool = change("write the generated sets to disk")
    mixing_nbr: Positive = change("mix_*: generated images, as a multiple of the training set")
    num_imgs_scale: Positive = change("nf_*: the same")
    sample_seed_start: Whole = change("seed of the first generated set")
    do_k_bits_posterize_transform: bool = change("cut CNN inputs to `bits` bits")
    classification: Classification = change("CNNs")

    @property
    def dataset(self) -> Dataset:
        """The entry of `dataset_name`."""
        return self.dataset_info.__pydantic_extra__[self.dataset_name]

    @property
    def cnn_run(self) -> CnnRun:
        """The classification's entry of `dataset_name`."""
        return self.classification.__pydantic_extra__[self.dataset_name]

    @property
    def generated_per_class(self) -> int:
        """Images a class of a generated set."""
        scale = self.mixing_nbr if self.classifier_nf_strategy.startswith("mix") else self.num_imgs_scale
        return int(self.dataset.train_size // self.dataset.num_classes * scale)

    @property
    def band_rows(self) -> int:
        """Rows of the class band below the images."""
        return self.label_encoder.pxh if self.val.gmm.gaussian_method_name == "one_conditioned_on_images" else 0

    @property
    def train_noise(self) -> float:
        """Uniform noise on the pixels of training images; 0 for a recipe without."""
        return RECIPES[self.dataset.augmentation].noise * self.uniform_noise_value

    @property
    def test_noise(self) -> float:
        """The same for test images."""
        apart = self.test.uniform_noise_value
        return self.train_noise if apart is None else RECIPES[self.dataset.augmentation].noise * apart

    @property
    def merged_from(self) -> int:
        """The epoch from which the Gaussians are frozen and the average runs; at least one after the centre warm-up."""
        return max(self.val.gmm.merge_datasets_after, self.train.center_warmup_epochs + 1)

    def flow(self) -> FlowConfig:
        """The architecture. Raises UserError for lists that do not fit `num_levels` and impossible image sides."""
        info, levels = self.dataset, slice(0, self.num_levels)
        for name in ("num_flows", "num_blocks", "hidden_channels"):
            if len(getattr(self, name)) < self.num_levels:
                raise UserError(f"{name} has {len(getattr(self, name))} entries for num_levels={self.num_levels}")
        return FlowConfig(
            channels=info.ch, height=info.h + self.band_rows, width=info.w,
            flows=self.num_flows[levels], blocks=self.num_blocks[levels], hidden=self.hidden_channels[levels],
            conv_type=self.conv_type, flow_type=self.flow_type, attention=self.use_attention_after,
            level_method=self.level_method.choice, level_idx=self.level_method.level_idx,
            activation_checkpointing=self.activation_checkpointing,
        )  # fmt: skip

    @model_validator(mode="after")
    def _fits(self) -> "Config":
        for line in _contradictions(self):
            raise UserError(line)
        if self.train_nf:
            self.flow()
        return self


def _contradictions(config: Config) -> Iterator[str]:
    gmm, info, name = config.val.gmm, config.val.gmm.fpi_info, config.dataset_name
    if info.lambda_fpi_mu != info.lambda_fpi_sigma:
        yield (f"lambda_fpi_mu={info.lambda_fpi_mu:g} and lambda_fpi_sigma={info.lambda_fpi_sigma:g} must be equal: "
               "both weigh the same objective")  # fmt: skip
    for key, (first, last) in (("interval_mu", info.interval_mu), ("interval_sigma", info.interval_sigma)):
        if last < first:
            yield f"{key}=[{first},{last}] ends before it begins: [first,last], or [-1,-1] for never"
    sets = list(config.dataset_info.__pydantic_extra__)
    if name not in sets:
        yield (f"dataset_name={name}{suggest(name, sets)}: add ++dataset_info.{name}='{{{_entry(Dataset)}}}' or use "
               f"one of {', '.join(sets)}")  # fmt: skip
    if config.train_classifier and name not in config.classification.__pydantic_extra__:
        yield (f"classification.{name} is missing: add ++classification.{name}='{{{_entry(CnnRun)}}}', or "
               "train_classifier=0")  # fmt: skip
    recipe = RECIPES[config.dataset.augmentation]
    if any(recipe.jitter) and config.dataset.ch != 3:
        yield f"dataset_info.{name}.augmentation={config.dataset.augmentation} needs ch: 3, not {config.dataset.ch}"
    generates = config.train_classifier and config.classifier_nf_strategy != "do_not_use" and not config.cnn_load_path
    if config.train_nf and config.nf_load_path:
        yield ("nf_load_path is the model that is tested with train_nf=0; to resume a run use nf_ckpt_path, to start "
               "from pre-trained weights nf_weights_load_path")  # fmt: skip
    if not config.train_nf and not config.nf_load_path and (config.test_nf_alone or generates):
        yield "train_nf=0 needs nf_load_path=FILE (a flow.safetensors or a state_*.pt)"
    if config.nf_ckpt_path and (config.resume or not config.train_nf):
        yield f"nf_ckpt_path resumes a training run: {'leave resume out' if config.resume else 'it needs train_nf=1'}"
    if generates and config.generated_per_class < 1:
        yield (f"the generated sets would be empty: {config.dataset.train_size} images of {config.dataset.num_classes} "
               "classes, times num_imgs_scale (mixing_nbr for mix_*)")  # fmt: skip
    made = config.generated_per_class * config.dataset.num_classes
    if generates and config.classifier_nf_strategy.startswith("nf") and config.classification.drop_last and (
            config.cnn_run.batch_size > made):  # fmt: skip
        yield (f"classification.{name}.batch_size={config.cnn_run.batch_size} exceeds the {made} generated images; "
               "lower it, or raise num_imgs_scale")  # fmt: skip
    if gmm.gaussian_method_name == "one" and generates:
        yield "gaussian_method_name=one has no classes to generate: add train_classifier=0"
    if gmm.gaussian_method_name == "one_per_class_gaussian_checkpoint" and not config.gaussians_load_path:
        yield "gaussian_method_name=one_per_class_gaussian_checkpoint needs gaussians_load_path=FILE"
    if config.amp and config.trainer_precision == 64:
        yield "amp=1 needs trainer_precision=32"
    if config.cuda_graph and config.torch_compile:
        yield "cuda_graph=1 and torch_compile=1 exclude each other"
    if config.wandb and importlib.util.find_spec("wandb") is None:
        yield f"wandb={config.wandb}: wandb is not installed: pip install wandb, or leave the option out"
    for values, steps, kind in GLEM_SCHEDULES:
        try:
            glem.schedule(getattr(gmm, steps), getattr(gmm, values), getattr(gmm, kind))
        except UserError as error:
            yield f"val.gmm.{values}, {steps}, {kind}: {error}"


GLEM_SCHEDULES = [
    (f"{start}_{part}_arr" if start != "lr" else f"{part}_lr_arr",
     f"{start}_{part}_steps" if start != "lr" else f"{part}_lr_steps_arr", f"manual_sched_{start}_{part}")
    for start in ("lr", "lambda_kld", "lambda_nf") for part in ("mu", "sigma")
]  # fmt: skip


def _entry(model: type[BaseModel]) -> str:
    return ", ".join(f"{name}: ..." for name in model.model_fields)


# ---- options without effect

_CNN = ("classification.", "classifier_nf_strategy", "only_T", "mixing_nbr", "num_imgs_scale", "cnn_load_path",
        "do_all_classifications", "dataset_classification", "do_k_bits_posterize_transform",
        "sample_seed_start")  # fmt: skip
_TRAINING = ("train.", "val.", "label_encoder.", "nf_weights_load_path", "gaussians_load_path", "torch_compile",
             "save_", "test_every", "temperature_sampling", "activation_",
             "dataset_info.items_per_class")  # fmt: skip
_GLEM = tuple(f"val.gmm.{name}" for name, field in Gmm.model_fields.items() if field.description.startswith("glem"))


def without_effect(config: Config, given: Iterable[str]) -> Iterator[str]:
    """Lines that name what was given and does nothing here, and why."""
    gmm = config.val.gmm
    rules = (
        (not config.train_nf, _TRAINING, "train_nf=0"),
        (not config.train_classifier, _CNN, "train_classifier=0"),
        (not config.test_nf_alone, ("num_test_alone",), "test_nf_alone=0"),
        (gmm.training_algorithm != "glem", _GLEM, "only with training_algorithm=glem"),
        (gmm.training_algorithm == "glem", ("val.gmm.fpi_info.",), "training_algorithm=glem"),
        (gmm.gaussian_method_name.startswith("one") and "class" not in gmm.gaussian_method_name, ("val.gmm.fpi_info.",),
         "one Gaussian for all does not move"),
        (gmm.gaussian_method_name != "one_conditioned_on_images", ("label_encoder.",),
         "only with gaussian_method_name=one_conditioned_on_images"),
        (not config.train.ema_name, ("train.ema.",), "ema_name=''"),
        (not RECIPES[config.dataset.augmentation].noise, ("uniform_noise_value", "test.uniform_noise_value"),
         f"augmentation {config.dataset.augmentation} adds no noise"),
        (config.level_method.choice != "all_levels_idx", ("level_method.level_idx",), "only with all_levels_idx"),
        (not config.classifier_nf_strategy.startswith("mix"), ("mixing_nbr",), "only with mix_datasets*"),
        (not config.classifier_nf_strategy.startswith("nf"), ("num_imgs_scale",), "only with nf_datasets*"),
        (config.classification.optimizer_name != "adam", ("classification.adam.",), "optimizer_name=sgd"),
        (config.classification.optimizer_name != "sgd", ("classification.sgd.",), "optimizer_name=adam"),
        (config.classification.optimizer_name == "sgd", ("classification.sgd.momentum",), "the one cycle sets it"),
    )  # fmt: skip
    given = list(given)
    for holds, prefixes, reason in rules:
        names = [name for name in given if holds and name.startswith(prefixes)]
        if names:
            yield f"note: {', '.join(names)}: no effect here ({reason})"
    info = gmm.fpi_info
    if info.variance_update == "exact":
        if info.interval_sigma[1] < 0:
            yield "note: variance_update=exact: no effect here (interval_sigma: the variances never move)"
        elif info.sum_mu_diffs_arr_square or info.use_isotropic_variance_when_training_mean:
            yield ("note: variance_update=exact solves for a stationary point, without the approximations "
                   "sum_mu_diffs_arr_square and use_isotropic_variance_when_training_mean")  # fmt: skip


def architecture_of(facts: Mapping[str, Any]) -> dict[str, Any]:
    """The options that a weights file's config ("flow", "bits") answers, by dotted name."""
    flow = facts["flow"]
    return {
        "conv_type": flow["conv_type"], "flow_type": flow["flow_type"], "use_attention_after": flow["attention"],
        "num_levels": len(flow["flows"]), "num_flows": flow["flows"], "num_blocks": flow["blocks"],
        "hidden_channels": flow["hidden"], "level_method.choice": flow["level_method"],
        "level_method.level_idx": flow["level_idx"], "bits": facts["bits"],
    }  # fmt: skip


def take_architecture(config: Config, facts: Mapping[str, Any], given: Iterable[str], source: str) -> Config:
    """The options with the architecture of a weights file in place of their own. Raises UserError when one that was
    `given` says otherwise.
    """
    own, theirs = flat(config.as_dict()), architecture_of(facts)
    for name in given:
        for key in [key for key in theirs if key == name or key.startswith(f"{name}.")]:
            if own[key] != theirs[key] and not (key == "level_method.level_idx" and "idx" not in own[
                    "level_method.choice"]):  # fmt: skip
                raise UserError(f"{key}={own[key]}: {source} was made with {theirs[key]}; leave {key} out")
    values = config.as_dict()
    for key, value in theirs.items():
        group, _, part = key.rpartition(".")
        (values[group] if group else values)[part] = value
    return Config.build(values)


# ---- hydra


def plain_argv(argv: list[str]) -> list[str]:
    """The arguments in hydra's spelling: `--config_path` and `--config_name` (as published) mean the dashed flags."""
    for old, new in (("--config_path", "--config-path"), ("--config_name", "--config-name")):
        argv = [new + a.removeprefix(old) if a == old or a.startswith(f"{old}=") else a for a in argv]
    return argv


def config_place(path: str | None, name: str | None) -> tuple[Path, str]:
    """(folder, name) of the chosen file; a relative folder is looked up beside this script, then from where we are.

    Raises UserError for a missing folder or file, with the nearest name.
    """
    path, name = path or "___configs/cifar10", (name or "mean").removesuffix(".yaml")
    places = [Path(path)] if Path(path).is_absolute() else [CONFIGS.parent / path, Path.cwd() / path]
    folder = next((place for place in places if place.is_dir()), None)
    if folder is None:
        known = [f"___configs/{p.name}" for p in CONFIGS.iterdir() if p.is_dir()]
        raise UserError(
            f"--config-path={path}: no such folder{suggest(path, known)}; shipped: {', '.join(sorted(known))}"
        )
    if not (folder / f"{name}.yaml").is_file():
        known = sorted(p.stem for p in folder.glob("*.yaml"))
        raise UserError(f"--config-name={name}: not in {path}{suggest(name, known)}; there: {', '.join(known)}")
    return folder.resolve(), name


def resolve(folder: Path, name: str, overrides: list[str]) -> Config:
    """Compose the options as hydra will, and judge them. Raises UserError naming the option and the nearest one."""
    return judge(composed(folder, name, overrides), name)


def composed(folder: Path, name: str, overrides: list[str]) -> DictConfig:
    """What hydra makes of the files and the overrides. Raises UserError for unreadable ones and unknown names."""
    override_names(overrides)
    _check_yaml(folder / f"{name}.yaml")
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(config_dir=str(folder), version_base="1.3"):
            return compose(name, overrides=[*overrides, search_path()])
    except (OSError, HydraException, OmegaConfBaseException, AttributeError, KeyError, TypeError, ValueError,
            yaml.YAMLError) as error:  # fmt: skip
        text = (str(error.__cause__ or error) or type(error).__name__).splitlines()[0]
        hint = "; a new entry is written ++KEY=VALUE" if "is not in struct" in text else ""
        if "Could not find 'level_method/" in text:
            hint = f" (there: {', '.join(sorted(path.stem for path in (CONFIGS / 'level_method').iterdir()))})"
        raise UserError(f"configuration {name}: {text}{hint}") from error


def judge(values: DictConfig, name: str = "") -> Config:
    """The checked options of what hydra composed."""
    try:
        values = OmegaConf.to_container(values, resolve=True)
    except (OmegaConfBaseException, ValueError) as error:
        raise UserError(f"configuration {name}: {str(error).splitlines()[0]}") from error
    for key, value in flat(values).items():
        if value in ("???", "<FILE>"):  # hydra's own mark does not win over a value of base.yaml
            raise UserError(f"this configuration needs {key}=FILE")
    if not values.keys() & {"train", "val"}:
        raise UserError(f"configuration {name} begins with defaults: [base, _self_] and holds differences")
    values.pop("hydra", None)
    if values["dataset_name"] == FOLDER:
        found_in_folder(values)
    return Config.build(values)


def found_in_folder(values: dict[str, Any]) -> None:
    """Fill in what `dataset_info.folder` leaves to the images below data_path: channels, size, number, classes.

    The size is the images' own up to 32 pixels, else a square of them, cut to what `num_levels` halves.
    """
    plain = {"train_ratio": 0.9, "augmentation": "noise", "cnn": "plain"}
    info, root = values["dataset_info"].setdefault(FOLDER, {}), datasets.data_root(values["data_path"])
    found = folder.look(root, LARGEST)
    images = datasets.load(FOLDER, root, held_out=HELD_OUT, seed=values["seed"], need_classes=True)
    step = 2 ** int(values["num_levels"])
    height, width = (max(side // step, 1) * step for side in (found.height, found.width))
    if (height, width) != (found.height, found.width):
        height = width = min(height, width)  # resized: a square
    facts = {"ch": found.channels, "h": height, "w": width, "train_size": len(images),
             "num_classes": len(images.classes)}  # fmt: skip
    info |= {name: value for name, value in {**plain, **facts}.items() if info.get(name) is None}


def folder_options(config: Config) -> dict[str, Any]:
    """How `common.datasets.load` gives the images of `dataset_info.folder`."""
    info, found = config.dataset, folder.look(datasets.data_root(config.data_path), LARGEST)
    own = found.own and (found.height, found.width) == (info.h, info.w)
    return {"held_out": HELD_OUT, "seed": config.seed, "need_classes": True, "channels": info.ch,
            "image_size": None if own else info.h}  # fmt: skip


def _check_yaml(path: Path) -> None:
    """Refuse what is no small plain mapping: aliases of aliases and deep nesting fill the memory from a short file."""
    try:
        if path.stat().st_size > MAX_YAML_BYTES:
            raise UserError(f"{path} is no configuration: it has more than {MAX_YAML_BYTES:,} bytes")
        depth = 0
        for event in yaml.parse(path.read_text(), yaml.SafeLoader):
            depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
            if isinstance(event, yaml.AliasEvent) or depth > 32:
                raise UserError(f"{path}: aliases (*name) and deep nesting are not read; write the values out")
    except (yaml.YAMLError, UnicodeDecodeError, OSError, ValueError) as error:
        raise UserError(f"{path} is no YAML file ({' '.join(str(error).split())[:160]})") from error


def search_path() -> str:
    """The override that puts the folder of base.yaml on hydra's search path."""
    return f"hydra.searchpath=[file://{CONFIGS}]"


def override_names(overrides: list[str]) -> list[str]:
    """The options that overrides name. Raises UserError for unreadable ones and unknown names."""
    names = []
    for text in overrides:
        try:
            override = OverridesParser.create().parse_override(text)
        except HydraException as error:
            hint = ""
            if "=" in text.partition("=")[2]:
                key, _, value = text.partition("=")
                hint = f"; a value with '=' stands in quotes of its own: '{key}=\"{value}\"'"
            raise UserError(f"cannot read the override {text}: {str(error).splitlines()[0]}{hint}") from error
        key = override.key_or_group
        if key.startswith("hydra"):
            continue
        if not _is_option(key):
            raise UserError(unknown(Config, key))
        if override.is_delete():
            raise UserError(f"~{key}: options cannot be removed, every one is read")
        names.append(key)
    return names


def sweep(overrides: list[str]) -> Iterator[list[str]]:
    """The overrides of each job of --multirun, as hydra's own sweeper makes them."""
    choices = []
    for text in overrides:
        override = OverridesParser.create().parse_override(text)
        if override.is_sweep_override() and not text.startswith("hydra"):
            choices.append([f"{override.get_key_element()}={value}" for value in override.sweep_string_iterator()])
        else:
            choices.append([text])
    return map(list, itertools.product(*choices))


def _is_option(key: str) -> bool:
    """Whether `key` is an option, a data set's entry, or a part of one."""
    group, _, rest = key.partition(".")
    model = {"dataset_info": Dataset, "classification": CnnRun}.get(group)
    if key in all_names(Config):
        return True
    if model is None or not rest:
        return False
    name, _, part = rest.partition(".")
    # a new entry has a group's form, a mistyped option of the group does not
    return part in model.model_fields if part else not suggest(name, Config.model_fields[group].annotation.model_fields)


def help_text(values: DictConfig, about: str) -> str:
    """Every option with its value here, meaning and range."""
    lines = [about.strip(), ""]
    for key, value in flat(OmegaConf.to_container(values)).items():
        field = field_at(Config, key.split("."))[1]
        shown = {None: "null", True: "1", False: "0"}[value] if value is None or isinstance(value, bool) else value
        takes = expects(field.annotation, field.metadata)
        lines.append(f"  {f'{key}={shown}':<58} {field.description} [{takes}]")
    return "\n".join(lines)
