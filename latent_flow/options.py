"""Command-line options of the training scripts: defined once, typed, with the papers' values as defaults."""

import argparse
import sys
from typing import NoReturn

from common.errors import UserError, suggest
from latent_flow.data import DEFAULTS
from latent_flow.model import Config
from latent_flow.transforms import CENTRES

ITERATIONS = {"mnist": 90_000, "fashion_mnist": 90_000, "digits": 90_000}  # others: 100,000


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaints are `UserError`s with the nearest known option."""

    def __init__(self, **options):
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        """Raise instead of leaving: the script's one error line and exit code stay in one place."""
        raise UserError(f"{message}; see --help")

    def parse(self, argv: list[str] | None) -> argparse.Namespace:
        """Parse `argv` (default: the process's); UserError for an unknown option, with the nearest known one."""
        args, unknown = self.parse_known_args(sys.argv[1:] if argv is None else argv)
        if unknown:
            known = [option for action in self._actions for option in action.option_strings]
            raise UserError(f"unknown option {unknown[0]}{suggest(unknown[0].split('=')[0], known)}; see --help")
        return args

    def add_switch(self, *names: str, default: bool | None, help: str) -> None:
        """A real boolean: `--x`, `--x true|false`, `--no-x`."""
        dest = names[0].lstrip("-").replace("-", "_")
        self.add_argument(*names, dest=dest, nargs="?", const=True, default=default, type=boolean, help=help)
        off = [f"--no-{name.lstrip('-')}" for name in names]
        self.add_argument(*off, dest=dest, action="store_const", const=False, help=argparse.SUPPRESS)


def boolean(text: str) -> bool:
    """true/false, yes/no, on/off, 1/0."""
    if text.lower() in ("true", "yes", "on", "1"):
        return True
    if text.lower() in ("false", "no", "off", "0"):
        return False
    raise argparse.ArgumentTypeError(f"expected true or false, got {text!r}")


def positive(text: str) -> int:
    """A whole number above zero."""
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, got {text!r}")
    return value


def probability_pair(text: str) -> tuple[float, float]:
    """`p_on,p_stay`, two numbers strictly between 0 and 1."""
    try:
        p_on, p_stay = (float(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected two numbers p_on,p_stay, got {text!r}") from None
    if not (0 < p_on < 1 and 0 < p_stay < 1):
        raise argparse.ArgumentTypeError(f"both probabilities must lie strictly between 0 and 1, got {text!r}")
    return p_on, p_stay


def training_parser(variant: str, description: str, datasets: tuple[str, ...]) -> Parser:
    """The options of one training script; `datasets` are those that it can train on, the first is its default."""
    parser = Parser(description=description)
    add = parser.add_argument
    data = parser.add_argument_group("data").add_argument
    data("--dataset", default=None, help=f"one of: {', '.join(datasets)} (default {datasets[0]})")
    if "shapes3d" in datasets:
        parser.add_switch("--shapes3d", default=None, help="the same as --dataset shapes3d")
    if "dsprites" in datasets:
        parser.add_switch("--dsprites", default=None, help="the same as --dataset dsprites")
    if "isaac3d" in datasets:
        parser.add_switch("--isaac", default=None, help="Isaac3D instead of Falcor3D")
    data("--data-dir", default=None, help="folder of the data sets (default: DATA_ROOT, else data/)")
    data("--image-size", type=positive, default=None, help="resize to this side (default: the data set's own)")
    data(
        "--warp-centre",
        choices=CENTRES,
        default="upstream",
        help="centre of zoom and rotation: size/2 as published, or the exact image centre",
    )
    model = parser.add_argument_group("model").add_argument
    model("-K", "--num-support-sets", type=positive, default=None, help="number of flows K (default: the paper's)")
    model(
        "-D",
        "--num-timesteps",
        type=positive,
        default=None,
        help="twice the number of flow steps T (default: the paper's)",
    )
    model("--latent-size", type=positive, default=None, help="latent size = channel width of the VAE (paper: 324, 226)")
    if variant != "supervised":
        model(
            "--width",
            type=positive,
            default=None,
            help="channel width of the encoder that infers the flow (paper: the latent size; unsupervised 100)",
        )
    objective = parser.add_argument_group("objective").add_argument
    objective("--objective", choices=("paper", "fixed", "upstream"), default="paper", help="fixed = paper")
    objective("--logdet", choices=("rowsum", "trace", "hutchinson", "exact"), default="hutchinson")
    objective("--logdet-terms", type=positive, default=2, help="terms of the series of --logdet hutchinson")
    objective(
        "--path-kl",
        choices=("marginal", "shared"),
        default="marginal",
        help="marginal: KL of every z_t from the diffused prior; shared: prior and posterior share the transition",
    )
    objective("--diffusion", type=float, default=1.0, help="diffusion coefficient D of the prior")
    objective(
        "--k-per",
        choices=("sample", "batch"),
        default=None,
        help="draw the transformation per sample, or once a batch as published (default: sample; upstream: batch)",
    )
    if variant == "weakly":
        objective("--index-weight", type=float, default=20.0, help="weight of the index loss")
        objective("--entropy-weight", type=float, default=0.0, help="weight of the entropy of q(k|x) within it")
        parser.add_switch("--index-labels", default=False, help="train q(k|x) with the true k (label-assisted)")
    if variant == "unsupervised":
        parser.add_switch("--single-control", "--single_control", default=False, help="one spike for both fields")
        objective("--field", choices=("soft", "divfree"), default="soft", help="rotational field: penalised, or exact")
        objective("--slab-start", type=positive, default=75_001, help="first iteration with speeds (stage 2)")
        objective("--spike-prior", type=probability_pair, default=(0.1, 0.9), metavar="P_ON,P_STAY")
        objective("--spike-weight", type=float, default=1.0, help="weight of the spike divergence")
    train = parser.add_argument_group("training").add_argument
    train("--support-set-lr", type=float, default=1e-4, help="learning rate of flows and prior")
    train("--lr-vae", "--generator-lr", "--generator_lr", type=float, default=1e-4, help="learning rate of the VAE")
    if variant != "supervised":
        train("--lr-index", "--reconstructor-lr", type=float, default=1e-4, help="learning rate of the index encoder")
    train("--max-iter", type=positive, default=None, help="iterations in all (default: 90,000 MNIST, else 100,000)")
    train("--max-steps", type=positive, default=None, help="at most this many iterations in this call; then resume")
    train("--batch-size", type=positive, default=128)
    parser.add_switch("--amp", default=False, help="bfloat16 in the convolutional networks")
    add("--log-freq", type=positive, default=10, help="log every so many iterations")
    add("--ckp-freq", type=positive, default=1000, help="checkpoint every so many iterations")
    add("--eval-every", type=positive, default=None, help="evaluate every so many iterations (default: at the end)")
    add("--eval-images", type=positive, default=2000, help="validation images of an evaluation")
    parser.add_switch("--tensorboard", default=False, help="also write TensorBoard events")
    add("--seed", type=int, default=0)
    parser.add_switch("--deterministic", default=False, help="refuse kernels whose result varies between runs")
    add("--device", default=None, help="auto, cpu, cuda, cuda:<i>, mps")
    parser.add_switch("--cuda", default=None, help="--no-cuda is the same as --device cpu")
    add("--out", default=None, help="folder of the run (default: runs/latent_flow/<name>)")
    parser.add_switch("--resume", default=False, help="go on from the checkpoint in --out")
    parser.add_switch("--overwrite", default=False, help="start anew in a folder that holds a run")
    add("--smoke", action=Smoke, help="a few iterations of a tiny model on bundled data; options after it win")
    return parser


SMOKE = {
    "dataset": None,
    "shapes3d": None,
    "dsprites": None,
    "isaac": None,
    "num_support_sets": None,
    "latent_size": 8,
    "batch_size": 16,
    "num_timesteps": 8,
    "max_iter": 6,
    "log_freq": 1,
    "ckp_freq": 3,
    "eval_images": 20,
    "width": 8,
    "slab_start": 4,
}


class Smoke(argparse.Action):
    """Set the options of a smoke run where the switch stands: what comes after it wins, as in `script.sh --smoke`."""

    def __init__(self, option_strings, dest, help=None):
        super().__init__(option_strings, dest, nargs=0, default=False, help=help)

    def __call__(self, parser, namespace, values, option_string=None):
        """Called by argparse when it meets `--smoke`."""
        for name, value in SMOKE.items():
            if hasattr(namespace, name):
                setattr(namespace, name, value)
        namespace.smoke = True


def resolve(args: argparse.Namespace, variant: str, datasets: tuple[str, ...]) -> Config:
    """Fill every option that was left open, check them, and return the model's configuration.

    `args` is changed in place: what is written to args.json is what was used.
    """
    asked = {name for name in ("shapes3d", "dsprites", "isaac") if getattr(args, name, None)}
    named = {"isaac3d" if name == "isaac" else name for name in asked} | ({args.dataset} - {None})
    if len(named) > 1:
        raise UserError(f"one data set at a time: {', '.join(sorted(named))} were asked for")
    if args.smoke:
        deep = "falcor3d" in datasets
        named = named or {"sprites" if deep else "digits"}
        args.image_size = args.image_size or (32 if deep else None)
    args.dataset = named.pop() if named else datasets[0]
    if args.dataset not in datasets:
        known = ", ".join(datasets)
        raise UserError(f"no data set {args.dataset!r} here{suggest(args.dataset, datasets)}; known: {known}")
    facts = DEFAULTS[args.dataset]
    moving = variant == "unsupervised" and args.dataset in ("sprites", "dsprites")
    args.num_support_sets = args.num_support_sets or (3 if moving else facts["flows"])
    args.num_timesteps = args.num_timesteps or facts["timesteps"]
    args.latent_size = args.latent_size or facts["latent_size"]
    args.image_size = args.image_size or facts["image_size"]
    args.max_iter = args.max_iter or ITERATIONS.get(args.dataset, 100_000)
    args.objective = "paper" if args.objective == "fixed" else args.objective
    args.k_per = args.k_per or ("batch" if args.objective == "upstream" else "sample")
    if args.latent_size % 2 or args.latent_size < 4:
        raise UserError(f"--latent-size must be even and at least 4 (got {args.latent_size})")
    if args.cuda is not None and args.device is not None:
        raise UserError("--cuda/--no-cuda and --device say the same thing: give one of them")
    args.device = args.device or {True: "cuda", False: "cpu", None: "auto"}[args.cuda]
    for name in ("support_set_lr", "lr_vae", "lr_index"):
        if getattr(args, name, 1.0) <= 0:
            raise UserError(f"--{name.replace('_', '-')} must be above 0")
    if args.diffusion < 0:
        raise UserError(f"--diffusion must not be negative (got {args.diffusion})")
    if args.seed < 0:
        raise UserError(f"--seed must not be negative (got {args.seed})")
    if args.num_timesteps < 2:
        raise UserError("--num-timesteps is twice the number of steps: at least 2")
    args.out = args.out or (
        f"runs/latent_flow/{args.dataset}-{variant}-K{args.num_support_sets}-D{args.num_timesteps}-s{args.seed}"
    )
    steps = args.num_timesteps // 2
    deep = "falcor3d" in datasets
    p_on, p_stay = getattr(args, "spike_prior", (0.1, 0.9))
    config = Config(
        variant=variant,
        dataset=args.dataset,
        flows=args.num_support_sets,
        # the published Falcor3D and Isaac3D loops end one step early: a sweep has T frames, x_0 included
        steps=steps - 1 if deep and steps > 1 else steps,
        channels=facts["channels"],
        image_size=args.image_size,
        latent_size=args.latent_size,
        deep=deep,
        index_width=getattr(args, "width", None) or 0,
        single_control=getattr(args, "single_control", False),
        field=getattr(args, "field", "soft"),
        objective=args.objective,
        logdet=args.logdet,
        logdet_terms=args.logdet_terms,
        path_kl=args.path_kl,
        diffusion=args.diffusion,
        index_weight=getattr(args, "index_weight", 20.0),
        entropy_weight=getattr(args, "entropy_weight", 0.0),
        index_labels=getattr(args, "index_labels", False),
        spike_weight=getattr(args, "spike_weight", 1.0),
        p_on=p_on,
        p_stay=p_stay,
        slab_start=getattr(args, "slab_start", 75_001),
    )
    config.check()
    return config
