"""Options of the training scripts, each declared once; the published values of a data set and --smoke lie below the
command line as mappings, what was saved with a run above them.
"""

import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from annotated_types import Ge, Gt, Le
from pydantic import AfterValidator, model_validator

from common.checkpoint import read_json
from common.errors import UserError
from common.launch import pick_device
from common.options import (
    TRUE,
    Count,
    Device,
    NonNegative,
    Options,
    Resume,
    Says,
    Seed,
    from_flags,
    option,
)
from latent_flow.data import DEFAULTS, SWEPT
from latent_flow.model import Config, ImageSize, LatentSize, Width
from latent_flow.transforms import NAMES

ITERATIONS = {"mnist": 90_000, "fashion_mnist": 90_000, "digits": 90_000}  # others: 100,000
Objective = Annotated[
    Literal["paper", "fixed", "upstream"], AfterValidator(lambda name: "paper" if name == "fixed" else name)
]
Steps = Annotated[int, Ge(2), Le(1000)]
LearningRate = Annotated[float, Gt(0), Le(100)]
SpikeProbability = Annotated[float, Ge(0.001), Le(0.999)]  # the all-zero state is redrawn until a spike is on
SpikePrior = Annotated[tuple[SpikeProbability, SpikeProbability], Says("p_on,p_stay, both from 0.001 to 0.999")]


class TrainOptions(Options):
    """What the four training scripts share. `VARIANT` and `DEEP` (the networks of 128-pixel images) are the script's;
    `SHORT` maps its switches to the data sets that they name.
    """

    VARIANT: ClassVar[str] = "supervised"
    DEEP: ClassVar[bool] = False
    SHORT: ClassVar[Mapping[str, str]] = {}

    dataset: str = option("mnist", "data set", group="data")
    data_dir: str | None = option(
        None, "folder of the data sets [DATA_ROOT, else data/]", group="data", resume="change"
    )
    image_size: ImageSize = option(28, "resize to this side", group="data")
    warp_centre: Literal["upstream", "exact"] = option(
        "upstream", "centre of zoom and rotation: size/2 as published, or the exact image centre", group="data"
    )
    num_support_sets: Annotated[int, Ge(1), Le(100)] = option(3, "number of flows K", group="model", flags=("-K",))
    num_timesteps: Steps = option(16, "twice the number of flow steps T", group="model", flags=("-D",))
    latent_size: LatentSize = option(324, "latent size = channel width of the VAE", group="model")
    objective: Objective = option("paper", "fixed is the same as paper", group="objective")
    path_kl: Literal["shared", "marginal"] = option(
        "shared", "shared: a bound of the sequence; marginal: T+1 bounds, one a frame", group="objective"
    )
    logdet: Literal["rowsum", "trace", "hutchinson", "exact"] = option(
        "hutchinson", "log-determinants of --path-kl marginal", group="objective"
    )
    logdet_terms: Annotated[int, Ge(1), Le(100)] = option(2, "terms of --logdet hutchinson", group="objective")
    diffusion: NonNegative = option(1.0, "diffusion coefficient D of the marginal prior", group="objective")
    k_per: Literal["sample", "batch"] = option(
        "sample", "draw the transformation per sample, or once a batch as published", group="objective"
    )
    support_set_lr: LearningRate = option(1e-4, "learning rate of flows and prior", group="training", resume="change")
    lr_vae: LearningRate = option(
        1e-4,
        "learning rate of the VAE",
        group="training",
        resume="change",
        flags=("--generator-lr", "--generator_lr"),
    )
    max_iter: Count = option(90_000, "iterations in all", group="training", resume="change")
    max_steps: Count | None = option(None, "at most this many iterations in this call", group="training", resume="call")
    batch_size: Annotated[int, Ge(1), Le(65_536)] = option(128, "sequences a step", group="training")
    decode_frames: Annotated[int, Ge(1), Le(501)] | None = option(
        None, "decode so many frames of each sequence a step, drawn anew for each [all]", group="training"
    )
    output_bias: Annotated[float, Ge(-20), Le(20)] | None = option(
        None, "start of the decoder's last bias, in logits [PyTorch's random one]", group="training"
    )
    amp: bool = option(False, "bfloat16 in the convolutional networks", group="training")
    tf32: bool = option(False, "TF32 in place of float32 on a GPU", group="training")
    log_freq: Count = option(10, "log every so many iterations", group="record", resume="change")
    ckp_freq: Count | None = option(
        None, "checkpoint every so many iterations [every ten minutes]", group="record", resume="change"
    )
    eval_every: Count | None = option(
        None, "evaluate every so many iterations, not only at the end", group="record", resume="change"
    )
    eval_images: Count = option(2000, "validation images of an evaluation", group="record", resume="change")
    tensorboard: bool = option(False, "also write TensorBoard events", group="record", resume="change")
    seed: Seed = option(0, "seed of everything random, the validation split included", group="run")
    deterministic: bool = option(False, "refuse kernels whose result varies between runs", group="run")
    device: Device = option("auto", "device", group="run", resume="change")
    cuda_graph: bool = option(False, "one GPU: launch a training step as one CUDA graph", group="run", resume="change")
    cuda: bool | None = option(None, "--no-cuda is the same as --device cpu", group="run", resume="call")
    out: str = option("", "folder of the run [runs/latent_flow/<its settings>]", group="run", resume="call")
    resume: Resume = option(
        False, "go on from the checkpoint in --out; auto: if there is one", group="run", resume="call"
    )
    overwrite: bool = option(False, "start anew in a folder that holds a run", group="run", resume="call")
    smoke: bool = option(False, "a few iterations of a tiny model on bundled data", group="run")
    dry_run: bool = option(False, "check and print the options, and stop", group="run", resume="call")

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.image_size % (16 if self.DEEP else 4):
            raise ValueError(f"--image-size must be a multiple of {16 if self.DEEP else 4} (got {self.image_size})")
        names = SWEPT.get(self.dataset, NAMES)
        if self.VARIANT == "supervised" and self.num_support_sets > len(names):
            raise ValueError(
                f"-K {self.num_support_sets}: {self.dataset} has {len(names)} transformations ({', '.join(names)}); "
                "lower it"
            )
        if self.decode_frames is not None and self.decode_frames > self._steps + 1:
            raise ValueError(f"--decode-frames {self.decode_frames}: a sequence has {self._steps + 1} frames; lower it")
        if self.logdet == "rowsum" and self.objective == "paper":
            raise ValueError("--logdet rowsum is no determinant: it belongs to --objective upstream, which needs none "
                             "of --logdet")  # fmt: skip
        return self

    @property
    def _steps(self) -> int:
        steps = self.num_timesteps // 2
        # the published Falcor3D and Isaac3D loops end one step early: a sweep has T frames, x_0 included
        return steps - 1 if self.DEEP and steps > 1 else steps

    @property
    def config(self) -> Config:
        """What defines the model and its objective; goes into checkpoints."""
        own = {name: getattr(self, name) for name in Config.model_fields if name in type(self).model_fields}
        p_on, p_stay = getattr(self, "spike_prior", (0.1, 0.9))
        return Config.build(
            own,
            {
                "variant": self.VARIANT,
                "flows": self.num_support_sets,
                "steps": self._steps,
                "channels": DEFAULTS[self.dataset]["channels"],
                "deep": self.DEEP,
                "index_width": getattr(self, "width", None) or 0,
                "p_on": p_on,
                "p_stay": p_stay,
            },
        )


def _sets(*names: str, default: str | None = None) -> Any:
    return option(default or names[0], "data set", group="data")


def _switch(name: str) -> Any:
    return option(None, f"the same as --dataset {name}", group="data", resume="call")


class SupervisedOptions(TrainOptions):
    """Options of `train_vae_scratch`."""

    SHORT: ClassVar = {"shapes3d": "shapes3d", "dsprites": "dsprites"}

    dataset: Literal["mnist", "shapes3d", "dsprites", "sprites", "fashion_mnist", "digits", "folder"] = _sets("mnist")
    shapes3d: bool | None = _switch("shapes3d")
    dsprites: bool | None = _switch("dsprites")
    transition: Literal["flow", "linear", "free"] = option(
        "flow", "what moves the latents: flows, or a baseline: one linear operator each, a free network", group="model"
    )


class DeepOptions(TrainOptions):
    """Options of `train_falcol_isaac`."""

    DEEP: ClassVar = True
    SHORT: ClassVar = {"isaac": "isaac3d"}

    dataset: Literal["falcor3d", "isaac3d", "sprites"] = _sets("falcor3d")
    isaac: bool | None = _switch("isaac3d")


class InferringOptions(TrainOptions):
    """What the variants that infer their flows share."""

    width: Width | None = option(
        None, "channel width of the encoder that infers the flow [weakly: the latent size; else 100]", group="model"
    )
    lr_index: LearningRate = option(
        1e-4,
        "learning rate of the encoder that infers the flow",
        group="training",
        resume="change",
        flags=("--reconstructor-lr",),
    )
    frame_stride: Annotated[int, Ge(1), Le(10_000)] = option(
        1, "pictures from one frame of a sequence to the next (frames)", group="data"
    )


class WeakOptions(InferringOptions):
    """Options of `train_vae_scratch_weakly`."""

    VARIANT: ClassVar = "weakly"
    SHORT: ClassVar = {"shapes3d": "shapes3d", "dsprites": "dsprites"}

    dataset: Literal[
        "mnist", "shapes3d", "dsprites", "sprites", "fashion_mnist", "digits", "folder", "frames"
    ] = _sets("mnist")  # fmt: skip
    shapes3d: bool | None = _switch("shapes3d")
    dsprites: bool | None = _switch("dsprites")
    index_weight: NonNegative = option(20.0, "weight of the index loss", group="objective")
    entropy_weight: NonNegative = option(0.0, "weight of the entropy of q(k|x) within it", group="objective")
    index_labels: bool = option(False, "train q(k|x) with the true k (label-assisted)", group="objective")

    @model_validator(mode="after")
    def _labels(self) -> Self:
        if self.index_labels and self.dataset == "frames":
            raise ValueError("--index-labels needs known transformations: a folder of frames has none")
        return self


class SparseOptions(InferringOptions):
    """Options of `train_vae_scratch_unsuper`."""

    VARIANT: ClassVar = "unsupervised"
    SHORT: ClassVar = {"dsprites": "dsprites"}

    dataset: Literal["mnist", "sprites", "dsprites", "fashion_mnist", "digits", "folder", "frames"] = _sets("mnist")
    dsprites: bool | None = _switch("dsprites")
    single_control: bool = option(False, "one spike for both fields", group="objective")
    field: Literal["soft", "divfree"] = option("soft", "rotational field: penalised, or exact", group="objective")
    slab_start: Count = option(75_001, "first iteration with speeds (stage 2)", group="objective")
    spike_prior: SpikePrior = option((0.1, 0.9), "spike probabilities p_on,p_stay", group="objective")
    spike_weight: NonNegative = option(1.0, "weight of the spike divergence", group="objective")


SMOKE = {
    "latent_size": 8, "batch_size": 16, "num_timesteps": 8, "max_iter": 6, "log_freq": 1, "ckp_freq": 3,
    "eval_images": 20, "width": 8, "slab_start": 4,
}  # fmt: skip


def parse(cls: type[TrainOptions], argv: Iterable[str] | None, about: str) -> TrainOptions:
    """The options of one script. Raises UserError for a wrong one, and for one that would do nothing.

    What a resumed call leaves out is as the run has it (its args.json).
    """
    words = sys.argv[1:] if argv is None else argv
    options, given = from_flags(cls, words, about, lambda raw: published(cls, raw))
    _refuse_idle(options, given)
    folder = options.out or (
        f"runs/latent_flow/{options.dataset}-{cls.VARIANT}-K{options.num_support_sets}-D{options.num_timesteps}"
        f"-s{options.seed}"
    )
    saved = Path(folder) / "args.json"
    kept = known(cls, read_json(saved)) if options.resume and saved.is_file() else {}
    if options.cuda is not None:
        kept["device"] = "cuda" if options.cuda else "cpu"
    if given.keys() & {"dataset", *cls.SHORT}:
        kept["dataset"] = options.dataset
    return cls.build(options.model_dump(), kept, given, {"out": folder}, spelling="--")


def known(cls: type[TrainOptions], saved: Any) -> dict[str, Any]:
    """Of the saved options those that `cls` has and that a resumed run keeps or may change."""
    if not isinstance(saved, Mapping):
        return {}
    rules = {name: field.json_schema_extra["resume"] for name, field in cls.model_fields.items()}
    return {name: value for name, value in saved.items() if rules.get(name, "call") != "call"}


def published(cls: type[TrainOptions], given: Mapping[str, Any]) -> dict[str, Any]:
    """What lies below the command line: the published values of the data set, and --smoke."""
    short = {name for name in cls.SHORT if _is_on(given.get(name, "no"))}
    named = {cls.SHORT[name] for name in short} | ({str(given["dataset"])} if "dataset" in given else set())
    if len(named) > 1:
        raise UserError(f"one data set at a time: {', '.join(sorted(named))} were asked for")
    if "cuda" in given and "device" in given:
        raise UserError("--cuda/--no-cuda and --device say the same thing: give one of them")
    smoke = _is_on(given.get("smoke", "no"))
    plain = "sprites" if cls.DEEP else "digits"
    dataset = named.pop() if named else plain if smoke else cls.model_fields["dataset"].default
    facts = DEFAULTS.get(dataset, DEFAULTS["mnist"])  # an unknown name is refused when all is built
    values = {
        "dataset": dataset,
        "image_size": 32 if smoke and cls.DEEP else facts["image_size"],
        "latent_size": facts["latent_size"],
        "num_support_sets": 3 if cls.VARIANT == "unsupervised" else facts["flows"],
        "num_timesteps": facts["timesteps"],
        "max_iter": ITERATIONS.get(dataset, 100_000),
        "k_per": "batch" if given.get("objective") == "upstream" else "sample",
    }
    return values | {name: value for name, value in SMOKE.items() if smoke and name in cls.model_fields}


def _is_on(value: Any) -> bool:
    return str(value).lower() in TRUE


def _refuse_idle(options: TrainOptions, given: Mapping[str, Any]) -> None:
    """Refuse what was given but would do nothing beside the other options."""
    upstream, marginal = options.objective == "upstream", options.path_kl == "marginal"
    weighted = ("index_weight", "entropy_weight", "index_labels", "spike_weight")
    idle = {name: "--objective upstream" for name in ("path_kl", "logdet", "logdet_terms", *weighted) if upstream}
    if not upstream and not marginal:
        idle |= dict.fromkeys(("logdet", "logdet_terms"), "--path-kl shared; add --path-kl marginal")
    if upstream and options.logdet == "rowsum":
        idle.pop("logdet")  # the sum that it computes
    if options.logdet != "hutchinson":
        idle.setdefault("logdet_terms", f"--logdet {options.logdet}")
    if getattr(options, "index_labels", False):
        idle.setdefault("entropy_weight", "--index-labels")
    if options.dataset != "frames":
        idle["frame_stride"] = f"--dataset {options.dataset}"
    else:
        idle["k_per"] = "--dataset frames"
    if options.dataset in SWEPT or options.dataset == "frames":
        idle["warp_centre"] = f"--dataset {options.dataset}"
    for name in given:
        if name in idle:
            raise UserError(f"--{name.replace('_', '-')} does nothing with {idle[name]}; leave it out")


class ToolOptions(Options):
    """What the tools that read a run share."""

    exp: str | None = option(None, "folder of a run, or a published checkpoint file", group="run", resume="call")
    data_dir: str | None = option(None, "folder of the data sets [that of the training]", group="run", resume="call")
    device: Device = option("auto", "device", group="run", resume="call")
    cuda: bool | None = option(None, "--no-cuda is the same as --device cpu", group="run", resume="call")
    tf32: bool = option(False, "TF32 in place of float32 on a GPU", group="run", resume="call")
    seed: Seed = option(0, "seed of the noise", group="run", resume="call")
    dry_run: bool = option(False, "check and print the options, and stop", group="run", resume="call")


def parse_tool(cls: type[Options], argv: Iterable[str] | None, about: str) -> Any:
    """The options of a tool, `--cuda` and `--no-cuda` put into `device`."""
    options, given = from_flags(cls, sys.argv[1:] if argv is None else argv, about)
    if given.get("cuda") is not None:
        if "device" in given:
            raise UserError("--cuda/--no-cuda and --device say the same thing: give one of them")
        options.device = "cuda" if given["cuda"] else "cpu"
    return options


def is_dry(options: Any) -> bool:
    """Whether only a check was asked for; then the device is looked for, and the options are printed."""
    if options.dry_run:
        pick_device(getattr(options, "device", "cpu"))
        print(options.model_dump_json(indent=2))
    return options.dry_run
