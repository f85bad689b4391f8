"""The command line of `main.py`: every flag once, typed, with the published default; dead flags are refused with a
reason.
"""

import argparse
import os
from pathlib import Path
from typing import Any, NoReturn

from common.errors import UserError, suggest
from glancenet.algorithms import ALGORITHMS, ALIASES, LOSS_TERMS
from glancenet.architectures import DECODERS, DISCRIMINATORS, ENCODERS, LABEL_TILERS

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

DATASETS = ("dsprites_full", "dsprites_leakage", "sprites", "mpi3d_toy", "celebA")
DATASET_ALIASES = {"dsprites": "dsprites_full", "celeba-64": "celebA", "mpi3d": "mpi3d_toy"}

DEAD = {
    "--l_dim": "the published code fails with any value; labels are named by --include_labels",
    "--reduce_recon": "the published code stores it and never uses it; weigh the reconstruction by --w_recon",
    "--num_disc_layers": "never read by the published code; use --num_layer_disc",
    "--size_disc_layers": "never read by the published code; use --size_layer_disc",
    "--save_iter": "never read by the published code; use --ckpt_save_iter",
    "--aicrowd_challenge": "the challenge's server is gone; use --evaluation_metric",
    "--wandb_resume_id": "a resumed run (--ckpt_load) opens a new wandb run",
}
DEAD_LATENT_LOSSES = ("1st_BCE", "1st_MSE", "exact_MSE", "exact_BCE", "Hybrid", "None")
UNSUPPORTED_ALGORITHMS = ("GRAYVAE", "GrayVAE_Standard", "CBM_Seq")


def boolean(text: str) -> bool:
    """yes/true/t/y/1 and no/false/f/n/0, any case."""
    word = text.lower()
    if word in ("yes", "true", "t", "y", "1"):
        return True
    if word in ("no", "false", "f", "n", "0"):
        return False
    raise argparse.ArgumentTypeError(f"expected true or false, not {text!r}")


def positive(text: str) -> float:
    """A positive number; 3e7 is allowed for counts."""
    try:
        value = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected a number, not {text!r}") from None
    if not value > 0:
        raise argparse.ArgumentTypeError(f"expected a positive number, not {text}")
    return value


def loss_term(text: str) -> str:
    """A plug-in term in any case."""
    known = {name.lower(): name for name in LOSS_TERMS}
    if text.lower() not in known:
        raise argparse.ArgumentTypeError(
            f"unknown term {text!r}{suggest(text, LOSS_TERMS)}; known: {', '.join(LOSS_TERMS)}"
        )
    return known[text.lower()]


def dataset_name(text: str) -> str:
    """A data set by any of its spellings."""
    known = {name.lower(): name for name in DATASETS} | DATASET_ALIASES
    if text.lower() in known:
        return known[text.lower()]
    if text.lower() == "mnist":
        raise UserError("MNIST serves the parity test alone: python glancenet/mnist_parity.py")
    raise UserError(
        f"unknown data set {text!r}{suggest(text, [*DATASETS, *DATASET_ALIASES])}; known: {', '.join(DATASETS)}"
    )


class Parser(argparse.ArgumentParser):
    """argparse whose complaints are UserErrors (one line, exit code 2) and name the nearest flag."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see --help")

    def parse(self, argv: list[str] | None = None) -> argparse.Namespace:
        """Parse, refusing dead and unknown flags."""
        options, rest = self.parse_known_args(argv)
        for word in rest:
            flag = word.split("=")[0]
            if flag in DEAD:
                raise UserError(f"{flag} is not supported: {DEAD[flag]}")
        if rest:
            flag = rest[0].split("=")[0]
            raise UserError(f"unknown option {flag}{suggest(flag, self._option_string_actions)}; see --help")
        return options


class _SchedulerArgs(argparse.Action):
    """`--lr_scheduler_args a=1 b=2` and `--lr_scheduler_args=a=1`."""

    def __call__(
        self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None
    ) -> None:
        setattr(namespace, self.dest, list(values))


def make_parser(prog: str = "glancenet/main.py", description: str = "") -> Parser:
    """The parser of main.py."""
    p = Parser(
        prog=prog, description=description, allow_abbrev=False, formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )

    g = p.add_argument_group("algorithm and networks")
    names = [*ALGORITHMS, *ALIASES]
    g.add_argument("--alg", required=True, metavar="NAME", help=f"one of {', '.join(names)}")
    g.add_argument(
        "--encoder", nargs="+", required=True, metavar="NAME", help=f"one of {', '.join(ENCODERS)} (IFCVAE: two)"
    )
    g.add_argument(
        "--decoder", nargs="+", default=[], metavar="NAME", help=f"one of {', '.join(DECODERS)}; CBNM has none"
    )
    g.add_argument(
        "--discriminator",
        nargs="+",
        default=[],
        metavar="NAME",
        help=f"FACTORVAE and IFCVAE: one of {', '.join(DISCRIMINATORS)} (default SimpleDiscriminator)",
    )
    g.add_argument(
        "--label_tiler", nargs="+", default=[], metavar="NAME", help=f"CVAE: one of {', '.join(LABEL_TILERS)}"
    )
    g.add_argument("--z_dim", type=int, default=16, help="number of latents")
    g.add_argument("--z_class", type=int, default=0, help="leading latents that the class head reads; 0: all")
    g.add_argument("--num_layer_disc", type=int, default=6, help="layers of a discriminator")
    g.add_argument("--size_layer_disc", type=int, default=1000, help="units of its layers")
    g.add_argument("--image_size", type=int, default=64, help="side of the images; only 64")

    g = p.add_argument_group("objective")
    g.add_argument(
        "--loss_terms",
        nargs="*",
        type=loss_term,
        default=[],
        metavar="TERM",
        help=f"plug-in terms of the VAE family, any case: {', '.join(LOSS_TERMS)}",
    )
    g.add_argument("--w_recon", type=float, default=1.0, help="weight of the reconstruction")
    g.add_argument("--w_kld", type=float, default=1.0, help="weight of the KL (beta)")
    g.add_argument("--label_weight", type=float, default=5.0, help="weight of the class loss (lambda)")
    g.add_argument(
        "--latent_weight", type=float, default=None, help="weight of the concept loss (gamma); default label_weight"
    )
    g.add_argument("--latent_loss", default="MSE", metavar="{MSE,BCE}", help="concept loss")
    g.add_argument("--masking_fact", type=float, default=100.0, help="percentage of images with concept labels")
    g.add_argument("--conditional_prior", type=boolean, default=False, help="prior mean per class")
    g.add_argument(
        "--cluster_dim", type=int, default=0, help="leading latents whose prior mean depends on the class; 0: all"
    )
    g.add_argument(
        "--classification_epoch",
        type=float,
        default=None,
        help="after this many epochs (2.5: halfway through the third) only the class loss is trained; the published "
        "default, 1, ruins the VAE",
    )
    g.add_argument(
        "--controlled_capacity_increase", type=boolean, default=False, help="train w_kld |KL - C| with growing C"
    )
    g.add_argument("--max_c", type=float, default=25.0, help="final capacity in nats")
    g.add_argument("--iterations_c", type=positive, default=10000, help="steps until the final capacity")
    g.add_argument("--w_tc", type=float, default=1.0, help="BetaTCVAE, FACTORVAE: total correlation")
    g.add_argument("--w_infovae", type=float, default=1.0, help="INFOVAE: maximum mean discrepancy")
    g.add_argument("--w_dipvae", type=float, default=1.0, help="DIPVAEI, DIPVAEII: covariance penalty")
    g.add_argument("--lambda_od", type=float, default=1.0, help="DIP: off-diagonal part")
    g.add_argument("--lambda_d_factor", type=float, default=10.0, help="DIP: diagonal part over off-diagonal part")
    g.add_argument("--w_le", type=float, default=1.0, help="IFCVAE: label loss")
    g.add_argument("--w_aux", type=float, default=1.0, help="IFCVAE: adversary")

    g = p.add_argument_group("optimisation")
    g.add_argument("--batch_size", type=int, default=64, help="images a step")
    g.add_argument("--max_iter", type=positive, default=3e7, help="stop after so many steps")
    g.add_argument("--max_epoch", type=positive, default=3e7, help="stop after so many epochs")
    g.add_argument("--lr_G", type=float, default=1e-4, help="learning rate")
    g.add_argument("--lr_D", type=float, default=1e-4, help="learning rate of the adversaries")
    g.add_argument("--beta1", type=float, default=0.9, help="Adam's first decay")
    g.add_argument("--beta2", type=float, default=0.999, help="Adam's second decay")
    g.add_argument(
        "--warmup_epochs",
        type=int,
        default=None,
        help="epochs from 1e-7 to lr_G; default 5, CBNM 10 (as published), 0 for the plain VAE family",
    )
    g.add_argument(
        "--lr_scheduler", choices=SCHEDULERS, default=None, help="after the warm-up, stepped every schedulers_iter"
    )
    g.add_argument(
        "--lr_scheduler_args", nargs="+", action=_SchedulerArgs, default=[], metavar="K=V", help="its arguments"
    )
    g.add_argument("--w_recon_scheduler", choices=("LinearScheduler",), default=None, help="schedule of w_recon")
    g.add_argument(
        "--w_recon_scheduler_args",
        nargs="+",
        action=_SchedulerArgs,
        default=[],
        metavar="K=V",
        help="target_value=... epochs=...",
    )
    g.add_argument(
        "--early_stopping",
        type=boolean,
        default=True,
        help="GlanceNet, CBNM: the published stopping and plateau rules, from epoch 10 / 12 on",
    )

    g = p.add_argument_group("data")
    g.add_argument(
        "--dset_dir",
        default=None,
        help="folder of the data sets; default: environment DISENTANGLEMENT_LIB_DATA, then DATA_ROOT, then data",
    )
    g.add_argument(
        "--dset_name",
        default=None,
        help=f"one of {', '.join(DATASETS)}; default: environment DATASET_NAME, then AICROWD_DATASET_NAME",
    )
    g.add_argument(
        "--d_version", choices=("full", "smaller"), default="full", help="file variant of dSprites and MPI3D"
    )
    g.add_argument(
        "--sprites_sizes",
        nargs=5,
        type=int,
        default=None,
        metavar="N",
        help="sprites: numbers of shapes, scales, orientations, x, y (default 3 6 40 32 32)",
    )
    g.add_argument(
        "--include_labels",
        nargs="+",
        type=int,
        default=None,
        metavar="I",
        help="factors (dSprites: 0 colour, 1 shape, ...) that give concepts and labels; default all",
    )
    g.add_argument("--n_classes", type=int, default=None, help="number of classes; default that of the data set")
    g.add_argument(
        "--num_workers", type=int, default=1, help="threads that fetch batches ahead of the training (0: none)"
    )
    g.add_argument("--pin_memory", type=boolean, default=True, help="page-locked batches for copies to a GPU")
    g.add_argument(
        "--hold_data", type=boolean, default=None, help="keep the images on the training device; default: on a GPU"
    )

    g = p.add_argument_group("evaluation")
    g.add_argument(
        "--test", type=boolean, default=False, help="only evaluate --ckpt_load: test pass, metrics, pictures"
    )
    g.add_argument(
        "--max_eval_images",
        type=int,
        default=None,
        help="a seeded choice of so many images for each pass (validation, test, rejection); default all",
    )
    g.add_argument(
        "--evaluation_metric",
        nargs="+",
        choices=METRICS,
        default=[],
        metavar="NAME",
        help=f"disentanglement metrics on the factor grid: {', '.join(METRICS)}",
    )
    g.add_argument("--metric_train", type=int, default=10000, help="points (or votes) that fit a metric")
    g.add_argument("--metric_eval", type=int, default=5000, help="held-out points (or votes) of a metric")
    g.add_argument("--metric_jobs", type=int, default=1, help="processes for the metrics; -1: all cores")
    g.add_argument("--mc_samples", type=int, default=100, help="posterior samples of a test prediction; 0: the mean")
    g.add_argument("--osr_quantile", type=float, default=0.95, help="share of training images that each check keeps")
    g.add_argument("--osr_sample", type=boolean, default=False, help="rejection on sampled latents instead of means")

    g = p.add_argument_group("intervals (steps; default one epoch)")
    for name, text in (
        ("evaluate", "disentanglement metrics"), ("test", "metrics.csv, validation, test pass; default evaluate_iter"),
        ("print", "a line on the terminal"), ("float", "TensorBoard scalars"), ("recon", "reconstruction picture"),
        ("traverse", "traversal picture"), ("ckpt_save", "checkpoint"), ("schedulers", "schedulers"),
    ):  # fmt: skip
        g.add_argument(f"--{name}_iter", type=positive, default=None, help=text)
    g.add_argument("--all_iter", type=positive, default=None, help="sets all of the above but test_iter")
    g.add_argument("--treat_iter_as_epoch", type=boolean, default=False, help="the intervals count epochs")
    g.add_argument("--show_loss", type=positive, default=500, help="log the loss terms every so many steps")

    g = p.add_argument_group("files")
    g.add_argument("--name", default="unknown_experiment", help="sub-folder for checkpoints and pictures")
    g.add_argument("--log_dir", default="logs", help="folder of the logs")
    g.add_argument("--out_path", default=None, help="sub-folder of logs/<data set>__<alg>; default the date")
    g.add_argument("--ckpt_dir", default="checkpoints", help="folder of the checkpoints")
    g.add_argument("--ckpt_load", default=None, help="a checkpoint (<ckpt_dir>/<name>/last) to go on from or to test")
    g.add_argument(
        "--ckpt_load_iternum", type=boolean, default=True, help="also take its step and epoch (exact resume)"
    )
    g.add_argument("--ckpt_load_optim", type=boolean, default=True, help="also take its optimisers")
    g.add_argument("--overwrite", type=boolean, default=False, help="replace an earlier run in the log folder")
    g.add_argument("--train_output_dir", default="train_outputs", help="pictures of the training")
    g.add_argument("--test_output_dir", default="test_outputs", help="pictures of --test")
    g.add_argument("--file_save", type=boolean, default=True, help="write pictures")
    g.add_argument("--gif_save", type=boolean, default=True, help="write GIFs of traversals")
    g.add_argument("--traverse_min", type=float, default=-3.0, help="first value of a traversal")
    g.add_argument("--traverse_max", type=float, default=3.0, help="end of a traversal, excluded")
    g.add_argument("--traverse_spacing", type=positive, default=0.5, help="step of a traversal")
    g.add_argument("--traverse_z", type=boolean, default=False, help="traverse latents")
    g.add_argument("--traverse_l", type=boolean, default=False, help="traverse the supervised latents only")
    g.add_argument("--traverse_c", type=boolean, default=False, help="CVAE, IFCVAE: traverse labels")

    g = p.add_argument_group("machine")
    g.add_argument("--seed", type=int, default=123, help="of everything")
    g.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:<i> or mps")
    g.add_argument("--deterministic", type=boolean, default=False, help="forbid kernels whose results vary")
    g.add_argument("--use_wandb", type=boolean, default=False, help="also log to wandb (project glancenet)")
    g.add_argument("--verbose", type=int, default=20, help="logging level: 10 debug, 20 info, 30 warnings")
    return p


def resolve(o: argparse.Namespace) -> argparse.Namespace:
    """Names resolved and combinations checked; changes and returns `o`. Raises UserError."""
    known = [*ALGORITHMS, *ALIASES]
    if o.alg in UNSUPPORTED_ALGORITHMS:
        raise UserError(f"--alg {o.alg}: a name without code in the published repository; known are {', '.join(known)}")
    if o.alg not in known:
        raise UserError(f"--alg {o.alg}: unknown{suggest(o.alg, known)}; known are {', '.join(known)}")
    if o.latent_loss in DEAD_LATENT_LOSSES:
        raise UserError(f"--latent_loss {o.latent_loss}: never implemented by the published training; use MSE or BCE")
    if o.latent_loss not in ("MSE", "BCE"):
        raise UserError(f"--latent_loss {o.latent_loss}: expected MSE or BCE")
    if not 0 <= o.masking_fact <= 100:
        raise UserError(f"--masking_fact {o.masking_fact:g}: expected a percentage between 0 and 100")
    if not 0 < o.osr_quantile < 1:
        raise UserError(f"--osr_quantile {o.osr_quantile:g}: expected a share between 0 and 1")
    for flag in ("z_dim", "batch_size", "metric_train", "metric_eval"):
        if getattr(o, flag) < 1:
            raise UserError(f"--{flag} {getattr(o, flag)}: must be at least 1")
    if o.max_eval_images is not None and o.max_eval_images < 1:
        raise UserError(f"--max_eval_images {o.max_eval_images}: must be at least 1")
    for flag in ("z_class", "mc_samples", "num_workers"):
        if getattr(o, flag) < 0:
            raise UserError(f"--{flag} {getattr(o, flag)}: must not be negative")
    named = o.dset_name or os.environ.get("DATASET_NAME") or os.environ.get("AICROWD_DATASET_NAME")
    if not named:
        raise UserError(f"name a data set: --dset_name (or environment DATASET_NAME), one of {', '.join(DATASETS)}")
    o.dset_name = dataset_name(named)
    o.dset_dir = str(data_root(o.dset_dir))
    if o.sprites_sizes is not None and o.dset_name not in ("sprites", "dsprites_full"):
        raise UserError("--sprites_sizes belongs to --dset_name sprites or dsprites_full")
    if o.test and not o.ckpt_load:
        raise UserError("--test needs a checkpoint: --ckpt_load <ckpt_dir>/<name>/last")
    if o.traverse_max <= o.traverse_min:
        raise UserError("--traverse_max must exceed --traverse_min")
    canonical = ALIASES.get(o.alg, o.alg)
    if o.warmup_epochs is None:
        o.warmup_epochs = {"GlanceNet": 5, "CBNM": 10}.get(canonical, 0)
    if o.conditional_prior and canonical not in ("GlanceNet", "CBNM"):
        raise UserError(f"--conditional_prior belongs to --alg GlanceNet, not {o.alg}; leave it out")
    if (o.traverse_c and canonical not in ("CVAE", "IFCVAE")) or (
        o.traverse_l and canonical not in ("GlanceNet", "CBNM")
    ):
        raise UserError(f"--alg {o.alg}: --traverse_c belongs to CVAE and IFCVAE, --traverse_l to GlanceNet")
    return o


def data_root(given: str | None) -> Path:
    """The folder of the data sets: the flag, DISENTANGLEMENT_LIB_DATA, DATA_ROOT, ./data. UserError when it is
    missing.
    """
    root = Path(
        given or os.environ.get("DISENTANGLEMENT_LIB_DATA") or os.environ.get("DATA_ROOT") or "data"
    ).expanduser()  # fmt: skip
    if not root.is_dir():
        raise UserError(f"the data folder {root} does not exist; name it by --dset_dir or DISENTANGLEMENT_LIB_DATA")
    return root
