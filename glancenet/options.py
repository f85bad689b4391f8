"""The options of `main.py`: defaults as published, ranges, and what a resumed run may change."""

import importlib.util
import logging
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BeforeValidator, Field

from common.errors import UserError, suggest
from common.launch import pick_device
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
)  # fmt: skip
from glancenet.architectures import DECODERS, DISCRIMINATORS, ENCODERS, LABEL_TILERS
from glancenet.labels import FACTORS, chosen_factors
from glancenet.schedules import LinearWeight, check_scheduler

log = logging.getLogger(__name__)

ALGORITHMS = ("GlanceNet", "CBNM", "VAE", "BetaVAE", "AE", "CVAE", "IFCVAE")
ALIASES = {"GrayVAE_Join": "GlanceNet", "CBM_Join": "CBNM"}
LOSS_TERMS = ("FACTORVAE", "DIPVAEI", "DIPVAEII", "BetaTCVAE", "INFOVAE")
METRICS = ("dci", "factor_vae_metric", "sap_score", "mig", "irs", "beta_vae_sklearn")
SCHEDULERS = (
    "ReduceLROnPlateau",
    "StepLR",
    "MultiStepLR",
    "ExponentialLR",
    "CosineAnnealingLR",
    "CyclicLR",
    "LambdaLR",
)
DATASETS = ("dsprites_full", "dsprites_leakage", "sprites", "mpi3d_toy", "celebA", "folder")
DATASET_ALIASES = {"dsprites": "dsprites_full", "celeba-64": "celebA", "mpi3d": "mpi3d_toy"}
WARMUP_EPOCHS = {"GlanceNet": 5, "CBNM": 10}  # published; the plain VAE family has none

NO_CODE = "a name without code in the published repository"
NEVER = "never implemented by the published training; use MSE or BCE"
NO_ALGORITHM = dict.fromkeys(("GRAYVAE", "GrayVAE_Standard", "CBM_Seq"), NO_CODE)
NO_LATENT_LOSS = dict.fromkeys(("1st_BCE", "1st_MSE", "exact_MSE", "exact_BCE", "Hybrid", "None"), NEVER)
NO_DATASET = {"mnist": "MNIST serves the parity test alone: python glancenet/mnist_parity.py"}


def one_of(known: Iterable[str], spellings: Mapping[str, str] | None = None, refused: Mapping[str, str] | None = None):
    """The type of a name among `known`, in any case where that is unambiguous.

    `spellings` are further ones and what they mean, `refused` names that are known not to work, and why.
    """
    known = tuple(known)
    meaning = {name.lower(): name for name in known} | dict(spellings or {})
    reasons = {name.lower(): why for name, why in (refused or {}).items()}

    def check(text: str) -> str:
        if text in known:
            return text
        if text.lower() in reasons:
            raise ValueError(reasons[text.lower()])
        if text.lower() not in meaning:
            near = suggest(text, [*known, *(spellings or ())])
            raise ValueError(f"unknown{near}; known are {', '.join(known)}")
        return meaning[text.lower()]

    return Annotated[str, AfterValidator(check), Says(f"one of {', '.join(known)}")]


def _whole_words(words: list[str]) -> list[str]:
    """`milestones=1,3` is one word, though lists may be written with commas."""
    joined: list[str] = []
    for word in words:
        if "=" in word or not joined:
            joined.append(word)
        else:
            joined[-1] += f",{word}"
    return joined


def _number_or_name(value: Any) -> Any:
    number = isinstance(value, str) and value.lstrip("+-").replace(".", "").isdigit()
    value = int(value) if number and value.isdigit() else value
    if (number and isinstance(value, str)) or (isinstance(value, int) and not 0 <= value <= 1000):
        raise ValueError("expected numbers of 0 to 1000, or names")
    return value


def _jobs(number: int) -> int:
    if number == 0:
        raise ValueError("expected a whole number of 1 to 1024, or -1")
    return number


Label = Annotated[int | Annotated[str, Field(min_length=1, max_length=200)], BeforeValidator(_number_or_name),
                  Says("a number of 0 to 1000, or a name")]  # fmt: skip
Names = Annotated[list[str], AfterValidator(_whole_words), Says("name=value ...")]
Side = Annotated[int, Field(ge=64, le=64), Says("64: the networks are made for images of 64 x 64")]
Sizes = Annotated[
    list[Annotated[int, Field(ge=1, le=256)]], Field(min_length=5, max_length=5), Says("five numbers of 1 to 256")
]
Size = Annotated[int, Field(ge=1, le=4096)]
Interval = Positive | None
Jobs = Annotated[int, AfterValidator(_jobs), Says("a whole number of 1 to 1024, or -1")]
INTERVALS = "intervals (steps; none: one epoch)"


class Config(Options):
    """What one training or test does. `resolve` fills in what depends on the environment and on other options."""

    DEAD: ClassVar[Mapping[str, str]] = {
        "l_dim": "the published code fails with any value; labels are named by --include_labels",
        "reduce_recon": "the published code stores it and never uses it; weigh the reconstruction by --w_recon",
        "num_disc_layers": "never read by the published code; use --num_layer_disc",
        "size_disc_layers": "never read by the published code; use --size_layer_disc",
        "save_iter": "never read by the published code; use --ckpt_save_iter",
        "aicrowd_challenge": "the challenge's server is gone; use --evaluation_metric",
        "wandb_resume_id": "a resumed run (--ckpt_load) opens a new wandb run",
    }

    # algorithm and networks
    alg: one_of([*ALGORITHMS, *ALIASES], refused=NO_ALGORITHM) = option(..., "algorithm", group="networks")
    encoder: list[one_of(ENCODERS)] = option(..., "encoder (IFCVAE: two)", group="networks", min_length=1, max_length=2)
    decoder: list[one_of(DECODERS)] = option([], "decoder; CBNM has none", group="networks", max_length=1)
    discriminator: list[one_of(DISCRIMINATORS)] = option(
        [], "FACTORVAE and IFCVAE; default SimpleDiscriminator", group="networks", max_length=2
    )
    label_tiler: list[one_of(LABEL_TILERS)] = option([], "CVAE", group="networks", max_length=1)
    z_dim: Size = option(16, "number of latents", group="networks")
    z_class: Whole = option(0, "leading latents that the class head reads; 0: all", group="networks")
    num_layer_disc: int = option(6, "layers of a discriminator", group="networks", ge=2, le=100)
    size_layer_disc: int = option(1000, "units of its layers", group="networks", ge=1, le=20_000)
    image_size: Side = option(64, "side of the images", group="networks")

    loss_terms: list[one_of(LOSS_TERMS)] = option([], "plug-in terms of the VAE family, any case", group="objective")
    w_recon: NonNegative = option(1.0, "weight of the reconstruction", group="objective")
    w_kld: NonNegative = option(1.0, "weight of the KL (beta)", group="objective")
    label_weight: NonNegative = option(5.0, "weight of the class loss (lambda)", group="objective")
    latent_weight: NonNegative | None = option(
        None, "weight of the concept loss (gamma); none: label_weight", group="objective"
    )
    latent_loss: one_of(("MSE", "BCE"), refused=NO_LATENT_LOSS) = option("MSE", "concept loss", group="objective")
    masking_fact: float = option(100.0, "percentage of images with concept labels", group="objective", ge=0, le=100)
    conditional_prior: bool = option(False, "prior mean per class", group="objective")
    cluster_dim: Whole = option(0, "leading latents whose prior mean depends on the class; 0: all", group="objective")
    classification_epoch: NonNegative | None = option(
        None, "after this many epochs (2.5: halfway through the third) only the class loss is trained; the published "
        "default, 1, ruins the VAE", group="objective",
    )  # fmt: skip
    controlled_capacity_increase: bool = option(False, "train w_kld |KL - C| with growing C", group="objective")
    max_c: NonNegative = option(25.0, "final capacity in nats", group="objective")
    iterations_c: Positive = option(10000.0, "steps until the final capacity", group="objective")
    w_tc: NonNegative = option(1.0, "BetaTCVAE, FACTORVAE: total correlation", group="objective")
    w_infovae: NonNegative = option(1.0, "INFOVAE: maximum mean discrepancy", group="objective")
    w_dipvae: NonNegative = option(1.0, "DIPVAEI, DIPVAEII: covariance penalty", group="objective")
    lambda_od: NonNegative = option(1.0, "DIP: off-diagonal part", group="objective")
    lambda_d_factor: NonNegative = option(10.0, "DIP: diagonal part over off-diagonal part", group="objective")
    w_le: NonNegative = option(1.0, "IFCVAE: label loss", group="objective")
    w_aux: NonNegative = option(1.0, "IFCVAE: adversary", group="objective")

    batch_size: int = option(64, "images a step", group="optimisation", ge=1, le=1_000_000)
    max_iter: float = option(3e7, "stop after so many steps", group="optimisation", resume="change", ge=1, le=1e12)
    max_epoch: Positive = option(3e7, "stop after so many epochs", group="optimisation", resume="change")
    lr_G: Positive = option(1e-4, "learning rate", group="optimisation", resume="change")
    lr_D: Positive = option(1e-4, "learning rate of the adversaries", group="optimisation", resume="change")
    beta1: Decay = option(0.9, "Adam's first decay", group="optimisation")
    beta2: Decay = option(0.999, "Adam's second decay", group="optimisation")
    warmup_epochs: Annotated[int, Field(ge=0, le=1_000_000)] | None = option(
        None, "epochs from 1e-7 to lr_G; none: 5, CBNM 10 (as published), 0 for the plain VAE family",
        group="optimisation",
    )  # fmt: skip
    lr_scheduler: Literal[SCHEDULERS] | None = option(
        None, "after the warm-up, stepped every schedulers_iter", group="optimisation"
    )
    lr_scheduler_args: Names = option([], "its arguments", group="optimisation")
    w_recon_scheduler: Literal["LinearScheduler"] | None = option(None, "schedule of w_recon", group="optimisation")
    w_recon_scheduler_args: Names = option([], "target_value=... epochs=...", group="optimisation")
    early_stopping: bool = option(
        True, "GlanceNet, CBNM: the published stopping and plateau rules, from epoch 10 / 12 on",
        group="optimisation", resume="change",
    )  # fmt: skip

    dset_dir: str | None = option(
        None, "folder of the data sets; none: environment DISENTANGLEMENT_LIB_DATA, then DATA_ROOT, then data",
        group="data", resume="change",
    )  # fmt: skip
    dset_name: one_of(DATASETS, DATASET_ALIASES, NO_DATASET) | None = option(
        None, "data set; none: environment DATASET_NAME, then AICROWD_DATASET_NAME", group="data"
    )
    d_version: Literal["full", "smaller"] = option("full", "file variant of dSprites and MPI3D", group="data")
    sprites_sizes: Sizes | None = option(
        None, "sprites: numbers of shapes, scales, orientations, x, y (none: 3 6 40 32 32)", group="data"
    )
    concepts: str | None = option(
        None, "folder: CSV of the concepts (file, a class, then a column each; in --dset_dir, too)", group="data"
    )
    class_column: str | None = option(
        None, "folder: the CSV's column of classes; none: `class`, else the sub-folders", group="data"
    )
    include_labels: Annotated[list[Label], Field(min_length=1)] | None = option(
        None, "factors that give concepts and labels, by number or name (dSprites: 0 color, 1 shape, ...); none: all",
        group="data",
    )  # fmt: skip
    n_classes: Annotated[int, Field(ge=2, le=10_000)] | None = option(
        None, "number of classes; none: that of the data set", group="data"
    )
    num_workers: int = option(
        1, "threads that fetch batches ahead of the training (0: none)", group="data", resume="change", ge=0, le=64
    )
    pin_memory: bool = option(True, "page-locked batches for copies to a GPU", group="data", resume="change")
    hold_data: bool | None = option(
        None, "keep the images on the training device; none: on a GPU", group="data", resume="change"
    )

    test: bool = option(
        False, "only evaluate --ckpt_load: test pass, metrics, pictures", group="evaluation", resume="call"
    )
    max_eval_images: Count | None = option(
        None, "a seeded choice of so many images for each pass (validation, test, rejection); none: all",
        group="evaluation",
    )  # fmt: skip
    evaluation_metric: list[one_of(METRICS)] = option(
        [], "disentanglement metrics on the factor grid", group="evaluation"
    )
    metric_train: int = option(10000, "points (or votes) that fit a metric", group="evaluation", ge=10, le=10**7)
    metric_eval: int = option(5000, "held-out points (or votes) of a metric", group="evaluation", ge=10, le=10**7)
    metric_jobs: Jobs = option(
        1, "processes for the metrics; -1: all cores", group="evaluation", resume="change", ge=-1, le=1024
    )
    mc_samples: int = option(
        100, "posterior samples of a test prediction; 0: the mean", group="evaluation", ge=0, le=100_000
    )
    osr_quantile: float = option(0.95, "share of training images that each check keeps", group="evaluation", gt=0, lt=1)
    osr_sample: bool = option(False, "rejection on sampled latents instead of means", group="evaluation")

    evaluate_iter: Interval = option(None, "disentanglement metrics", group=INTERVALS)
    test_iter: Interval = option(None, "metrics.csv, validation, test pass; none: evaluate_iter", group=INTERVALS)
    print_iter: Interval = option(None, "a line on the terminal", group=INTERVALS, resume="change")
    float_iter: Interval = option(None, "TensorBoard scalars", group=INTERVALS, resume="change")
    recon_iter: Interval = option(None, "reconstruction picture", group=INTERVALS, resume="change")
    traverse_iter: Interval = option(None, "traversal picture", group=INTERVALS, resume="change")
    ckpt_save_iter: Interval = option(None, "checkpoint", group=INTERVALS, resume="change")
    schedulers_iter: Interval = option(None, "schedulers", group=INTERVALS)
    all_iter: Interval = option(None, "sets all of the above but test_iter", group=INTERVALS)
    treat_iter_as_epoch: bool = option(False, "the intervals count epochs", group=INTERVALS)
    show_loss: float = option(
        500.0, "log the loss terms every so many steps", group=INTERVALS, resume="change",
        ge=1, le=1e12,
    )  # fmt: skip

    name: str = option(
        "unknown_experiment", "sub-folder for checkpoints and pictures", group="files", resume="call", min_length=1
    )
    log_dir: str = option("logs", "folder of the logs", group="files", resume="call", min_length=1)
    out_path: str | None = option(
        None, "sub-folder of logs/<data set>__<alg>; none: the date", group="files", resume="call", min_length=1
    )
    ckpt_dir: str = option("checkpoints", "folder of the checkpoints", group="files", resume="call", min_length=1)
    ckpt_load: str | None = option(
        None, "a checkpoint (<ckpt_dir>/<name>/last) to go on from or to test", group="files", resume="call",
        min_length=1,
    )  # fmt: skip
    ckpt_load_iternum: bool = option(True, "also take its step and epoch (exact resume)", group="files", resume="call")
    ckpt_load_optim: bool = option(True, "also take its optimisers", group="files", resume="call")
    resume: Resume = option(
        False, "go on from the newest checkpoint in <ckpt_dir>/<name>; auto: if there is one", group="files",
        resume="call",
    )  # fmt: skip
    overwrite: bool = option(False, "replace an earlier run in the log folder", group="files", resume="call")
    train_output_dir: str = option(
        "train_outputs", "pictures of the training", group="files", resume="call", min_length=1
    )
    test_output_dir: str = option("test_outputs", "pictures of --test", group="files", resume="call", min_length=1)
    file_save: bool = option(True, "write pictures", group="files", resume="change")
    gif_save: bool = option(True, "write GIFs of traversals", group="files", resume="change")
    traverse_min: float = option(-3.0, "first value of a traversal", group="files", resume="change", ge=-1000, le=1000)
    traverse_max: float = option(3.0, "end of a traversal, excluded", group="files", resume="change", ge=-1000, le=1000)
    traverse_spacing: float = option(0.5, "step of a traversal", group="files", resume="change", ge=1e-3, le=1000)
    traverse_z: bool = option(False, "traverse latents", group="files", resume="change")
    traverse_l: bool = option(False, "traverse the supervised latents only", group="files", resume="change")
    traverse_c: bool = option(False, "CVAE, IFCVAE: traverse labels", group="files", resume="change")

    seed: Seed = option(123, "of everything", group="machine")
    device: Device = option("auto", "device", group="machine", resume="change")
    deterministic: bool = option(False, "forbid kernels whose results vary", group="machine")
    amp: bool = option(
        False, "train encoder and decoder in bfloat16; objective and every evaluation stay float32", group="machine"
    )
    tf32: bool = option(False, "let a GPU multiply in TF32 (10 bits of mantissa)", group="machine")
    cuda_graph: bool = option(
        False, "one GPU: launch a training step as one CUDA graph", group="machine", resume="change"
    )
    use_wandb: bool = option(False, "also log to wandb (project glancenet)", group="machine", resume="call")
    verbose: int = option(
        20, "logging level: 10 debug, 20 info, 30 warnings", group="machine", resume="call", ge=0, le=50
    )
    dry_run: bool = option(False, "check the options, print them as JSON, and end", group="machine", resume="call")

    @property
    def algorithm(self) -> str:
        """The algorithm by its own name."""
        return ALIASES.get(self.alg, self.alg)


def parse(argv: Iterable[str], about: str = "") -> Config:
    """The resolved options of a command line. Raises UserError."""
    o, given = from_flags(Config, argv, about)
    return resolve(o, given)


def resolve(o: Config, given: Mapping[str, Any] | None = None) -> Config:
    """Names and folders filled in, combinations checked; options among `given` that do nothing are said.

    Raises UserError.
    """
    named = o.dset_name or os.environ.get("DATASET_NAME") or os.environ.get("AICROWD_DATASET_NAME")
    if not named:
        raise UserError(f"name a data set: --dset_name (or environment DATASET_NAME), one of {', '.join(DATASETS)}")
    warmup = WARMUP_EPOCHS.get(o.algorithm, 0) if o.warmup_epochs is None else o.warmup_epochs
    o = Config.build(
        o.model_dump(), {"dset_name": named, "dset_dir": str(data_root(o.dset_dir)), "warmup_epochs": warmup},
        spelling="--",
    )  # fmt: skip
    for message in _contradictions(o):
        raise UserError(message)
    if o.dset_name in FACTORS:
        chosen_factors(o.include_labels, FACTORS[o.dset_name])
    check_scheduler(o.lr_G, o.lr_scheduler, o.lr_scheduler_args)
    LinearWeight.of(o.w_recon, o.w_recon_scheduler, o.w_recon_scheduler_args)
    for name, needed in _idle(o, given or {}):
        log.warning("--%s does nothing here: it %s", name, needed)
    pick_device(o.device)
    return o


def data_root(given: str | None) -> Path:
    """The folder of the data sets: the flag, DISENTANGLEMENT_LIB_DATA, DATA_ROOT, ./data. UserError when it is
    missing.
    """
    root = Path(given or os.environ.get("DISENTANGLEMENT_LIB_DATA") or os.environ.get("DATA_ROOT") or "data")
    if not root.expanduser().is_dir():
        raise UserError(f"the data folder {root} does not exist; name it by --dset_dir or DISENTANGLEMENT_LIB_DATA")
    return root.expanduser()


def _contradictions(o: Config) -> Iterable[str]:
    """What cannot be together, in words."""
    alg, terms = o.algorithm, o.loss_terms
    concepts, labels = alg in ("GlanceNet", "CBNM"), alg in ("CVAE", "IFCVAE")
    gaussian = [name for name, kind in ENCODERS.items() if kind.gaussian]
    plain = [name for name in ENCODERS if name not in gaussian]
    if alg not in ("CBNM", "AE") and o.encoder[0] not in gaussian:
        yield f"--encoder {o.encoder[0]} has no variance, which --alg {o.alg} needs; take one of {', '.join(gaussian)}"
    if alg == "AE" and o.encoder[0] in gaussian:
        yield f"--alg AE needs an encoder without a variance, not {o.encoder[0]}; take one of {', '.join(plain)}"
    if alg == "IFCVAE" and len(o.encoder) < 2:
        yield "--alg IFCVAE needs two encoders: --encoder GAUSSIAN PLAIN (latents, labels)"
    if alg == "IFCVAE" and o.encoder[1] in gaussian:
        yield f"--encoder {' '.join(o.encoder)}: the second encoder predicts labels and has no variance"
    if alg != "CBNM" and not o.decoder:
        yield f"--alg {o.alg} needs --decoder; known are {', '.join(DECODERS)}"
    if alg != "CBNM" and o.decoder[0] == "DeConv64" and (o.z_dim != 64 or labels):
        yield f"--decoder DeConv64 needs --z_dim 64 and no labels beside the latents, not --z_dim {o.z_dim}, {o.alg}"
    if "SimpleDiscriminatorConv64" in o.discriminator:
        yield "--discriminator SimpleDiscriminatorConv64 reads images, but latents are judged here; take " \
              "SimpleDiscriminator"  # fmt: skip
    if terms and alg in ("CBNM", "AE"):
        yield f"--loss_terms {' '.join(terms)}: --alg {o.alg} has no such term (it is no VAE); leave it out"
    if {"DIPVAEI", "DIPVAEII"} <= set(terms):
        yield "--loss_terms DIPVAEI DIPVAEII: two penalties of one covariance with one weight; choose one"
    if len(set(terms)) < len(terms):
        yield f"--loss_terms {' '.join(terms)}: a term is named twice"
    if alg == "VAE" and o.w_kld != 1:
        yield f"--alg VAE weighs the KL by 1, not --w_kld {o.w_kld:g}; use --alg BetaVAE"
    if o.z_class > o.z_dim and alg == "GlanceNet":
        yield f"--z_class {o.z_class} exceeds --z_dim {o.z_dim}"
    if o.cluster_dim > o.z_dim:
        yield f"--cluster_dim {o.cluster_dim}: expected 0 (all) to --z_dim {o.z_dim}"
    if o.conditional_prior and not concepts:
        yield f"--conditional_prior belongs to --alg GlanceNet, not {o.alg}; leave it out"
    if o.classification_epoch is not None and not concepts:
        yield f"--classification_epoch belongs to GlanceNet and CBNM, --alg {o.alg} predicts no classes; leave it out"
    if (o.traverse_c and not labels) or (o.traverse_l and not concepts):
        yield f"--alg {o.alg}: --traverse_c belongs to CVAE and IFCVAE, --traverse_l to GlanceNet"
    if o.evaluation_metric and alg == "CVAE":
        yield "--evaluation_metric: CVAE's encoder needs labels beside the image, so an image alone has no " \
              "representation; leave the metrics out"  # fmt: skip
    if o.evaluation_metric and o.dset_name in ("celebA", "dsprites_leakage"):
        yield _no_grid(o)
    if o.dset_name == "folder" and concepts and not o.concepts:
        yield f"--alg {o.alg} on a folder needs --concepts: a CSV with the columns file, class, concept, ..."
    if o.dset_name != "folder" and (o.concepts or o.class_column):
        yield f"--concepts and --class_column belong to --dset_name folder, not {o.dset_name}"
    if o.class_column and not o.concepts:
        yield f"--class_column {o.class_column} is a column of the CSV: name that by --concepts"
    if o.sprites_sizes is not None and o.dset_name not in ("sprites", "dsprites_full"):
        yield "--sprites_sizes belongs to --dset_name sprites or dsprites_full"
    if o.max_eval_images is not None and o.dset_name == "dsprites_leakage":
        yield "--max_eval_images: the corners of dsprites_leakage are few; leave it out"
    if o.test and not o.ckpt_load:
        yield "--test needs a checkpoint: --ckpt_load <ckpt_dir>/<name>/last"
    if o.resume and o.ckpt_load:
        yield "--resume takes the newest checkpoint and --ckpt_load names one: give one of them"
    if o.traverse_max <= o.traverse_min or (o.traverse_max - o.traverse_min) / o.traverse_spacing > 1000:
        yield "--traverse_max must exceed --traverse_min, with at most 1000 steps of --traverse_spacing between them"
    if o.use_wandb and importlib.util.find_spec("wandb") is None:
        yield "--use_wandb: wandb is not installed: pip install wandb, or leave the option out"


def _no_grid(o: Config) -> str:
    return f"--evaluation_metric {' '.join(o.evaluation_metric)}: {o.dset_name} is no full grid of known factors; " \
           "leave the metrics out, or use dsprites_full, sprites or mpi3d_toy"  # fmt: skip


def _idle(o: Config, given: Mapping[str, Any]) -> Iterable[tuple[str, str]]:
    """Options that were given another value than their default and do nothing in this combination: what they need."""
    alg, terms = o.algorithm, set(o.loss_terms)
    vae, adversary = alg != "CBNM", "FACTORVAE" in terms or alg == "IFCVAE"
    concepts, drawn = alg in ("GlanceNet", "CBNM"), o.file_save and (o.traverse_z or o.traverse_l or o.traverse_c)
    rules: list[tuple[bool, str, str]] = [
        (vae, "belongs to algorithms with a decoder", "w_recon w_recon_scheduler traverse_z traverse_l"),
        (alg not in ("CBNM", "AE"), "belongs to VAEs", "w_kld controlled_capacity_increase"),
        (alg == "GlanceNet", "belongs to --alg GlanceNet", "conditional_prior"),
        (alg == "GlanceNet" or o.z_class in (0, o.z_dim), "belongs to --alg GlanceNet", "z_class"),
        (o.conditional_prior and vae, "needs GlanceNet's --conditional_prior true", "cluster_dim"),
        (o.controlled_capacity_increase, "needs --controlled_capacity_increase true", "max_c iterations_c"),
        (concepts, "belongs to GlanceNet and CBNM", "label_weight latent_weight latent_loss masking_fact osr_quantile "
                                                    "osr_sample mc_samples early_stopping"),
        (bool(terms & {"BetaTCVAE", "FACTORVAE"}), "needs --loss_terms BetaTCVAE or FACTORVAE", "w_tc"),
        ("INFOVAE" in terms, "needs --loss_terms INFOVAE", "w_infovae"),
        (bool(terms & {"DIPVAEI", "DIPVAEII"}), "needs --loss_terms DIPVAEI or DIPVAEII",
         "w_dipvae lambda_od lambda_d_factor"),
        (alg == "IFCVAE", "belongs to --alg IFCVAE", "w_le w_aux"),
        (adversary, "needs --loss_terms FACTORVAE or --alg IFCVAE",
         "discriminator num_layer_disc size_layer_disc lr_D"),
        (alg == "CVAE", "belongs to --alg CVAE", "label_tiler"),
        (bool(o.evaluation_metric), "needs --evaluation_metric", "metric_train metric_eval metric_jobs"),
        (drawn, "needs --traverse_z, --traverse_l or --traverse_c, and --file_save true",
         "traverse_min traverse_max traverse_spacing traverse_iter"),
        (o.ckpt_load is not None and not o.test, "needs --ckpt_load in a training",
         "ckpt_load_iternum ckpt_load_optim"),
        (o.dset_name != "dsprites_leakage", "has no effect on dsprites_leakage, which is supervised as a whole",
         "masking_fact"),
        (o.dset_name in ("dsprites_full", "mpi3d_toy"), "belongs to the files of dSprites and MPI3D", "d_version"),
    ]  # fmt: skip
    defaults = {name: field.get_default(call_default_factory=True) for name, field in Config.model_fields.items()}
    for acts, needed, names in rules:
        for name in names.split():
            if not acts and name in given and getattr(o, name) != defaults[name]:
                yield name, needed
    if "BetaTCVAE" in terms and o.w_tc == 1:
        yield "loss_terms", "adds (w_tc - 1) times the total correlation, and BetaTCVAE has --w_tc 1"
    if {"BetaTCVAE", "FACTORVAE"} <= terms:
        log.warning("BetaTCVAE and FACTORVAE both penalise the total correlation, and both by --w_tc")


def check_grid(o: Config, grid: Any) -> None:
    """Refuse metrics on a data set that turned out to be no full grid."""
    if o.evaluation_metric and grid is None:
        raise UserError(_no_grid(o))
