"""The configuration: one base file, small differences, hydra's override grammar; unknown keys name the nearest one.

`base.yaml` holds every option. An experiment's file names it in its defaults list and holds only what differs; a file
of the user's own in any folder may do the same, because the folder of `base.yaml` is always on the search path.
"""

import difflib
import functools
from pathlib import Path

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from common.errors import UserError, suggest

CONFIGS = Path(__file__).parent / "___configs"
STRATEGIES = ("do_not_use", "nf_datasets", "nf_datasets_resample", "mix_datasets", "mix_datasets_resample")
CHOICES = {
    "conv_type": ("matrixexp", "standard", "decomposition"),
    "flow_type": ("matrixexp", "additive", "affine"),
    "train.optimizer": ("adamax", "adam", "adamw"),
    "val.gmm.gaussian_method_name": (
        "one_per_class_all_in_center",
        "one_per_class_gaussian_checkpoint",
        "one",
        "one_conditioned_on_images",
    ),
    "val.gmm.training_algorithm": ("fpi_nf_kld", "fpi_nf", "glem"),
    "val.gmm.reparam_name": ("sigmoid", "no_reparam"),
    "val.gmm.fpi_info.variance_update": ("upstream", "exact"),
    "classifier_nf_strategy": STRATEGIES,
    "classification.optimizer_name": ("sgd", "adam"),
    "classification.resnet_version": (18, 34, 50, 101, 152),
    "classification.stem": ("small", "imagenet"),
}
# groups to which a user may add an entry of his own, shaped like the named one
OPEN_GROUPS = {"dataset_info": "cifar10", "classification": "cifar10"}


def plain_argv(argv: list[str]) -> list[str]:
    """The arguments in hydra's spelling: `--config_path` and `--config_name` (as published) mean the dashed flags."""
    for old, new in (("--config_path", "--config-path"), ("--config_name", "--config-name")):
        argv = [new + a.removeprefix(old) if a == old or a.startswith(f"{old}=") else a for a in argv]
    return argv


MAX_YAML_BYTES = 1_000_000


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


def resolve(folder: Path, name: str, overrides: list[str]) -> DictConfig:
    """Compose the configuration as hydra will, and check it. Raises UserError naming the key and the nearest one."""
    _check_override_keys(folder, name, overrides)
    _check_yaml(folder / f"{name}.yaml")
    cfg = _compose(folder, name, overrides)
    try:
        check(cfg)
    except (AttributeError, KeyError, TypeError, ValueError, OmegaConfBaseException) as error:
        reason = str(error).splitlines()[0][:160] if str(error) else type(error).__name__
        raise UserError(f"configuration {name}: a value has the wrong type ({reason})") from error
    return cfg


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


def _compose(folder: Path, name: str, overrides: list[str]) -> DictConfig:
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(config_dir=str(folder), version_base="1.3"):
            return compose(name, overrides=[*overrides, search_path()])
    except (
        OSError,
        HydraException,
        OmegaConfBaseException,
        AttributeError,
        KeyError,
        TypeError,
        ValueError,
        yaml.YAMLError,
    ) as error:
        text = (str(error.__cause__ or error) or type(error).__name__).splitlines()[0]
        raise UserError(f"configuration {name}: {text}") from error


def search_path() -> str:
    """The override that puts the folder of base.yaml on hydra's search path."""
    return f"hydra.searchpath=[file://{CONFIGS}]"


def _check_override_keys(folder: Path, name: str, overrides: list[str]) -> None:
    try:
        parsed = OverridesParser.create().parse_overrides(overrides)
    except HydraException as error:
        raise UserError(f"cannot read the overrides {' '.join(overrides)}: {str(error).splitlines()[0]}") from error
    for override in parsed:
        key = override.key_or_group
        if key.startswith("hydra") or key == "level_method":
            continue
        if not _known(key):
            raise UserError(f"unknown option {key}{nearest(key)}; see nfpi/___configs/base.yaml")
        if override.is_delete():
            raise UserError(f"~{key}: options cannot be removed, every one is read")


@functools.cache
def _base() -> DictConfig:
    """base.yaml with its level method; nobody changes it."""
    base = OmegaConf.load(CONFIGS / "base.yaml")
    base.level_method = OmegaConf.load(CONFIGS / "level_method" / "all_levels.yaml")
    del base["defaults"], base["hydra"]
    return base


def _keys(node: DictConfig, prefix: str = "") -> list[str]:
    found = []
    for key in node:
        found.append(f"{prefix}{key}")
        if OmegaConf.is_dict(node._get_node(key)):
            found += _keys(node._get_node(key), f"{prefix}{key}.")
    return found


@functools.cache
def _options() -> frozenset[str]:
    """The names of all options."""
    return frozenset(_keys(_base()))


def _known(key: str) -> bool:
    """Whether `key` is an option, or an entry of an open group whose parts its model has."""
    known = _options()
    if key in known:
        return True
    group, _, rest = key.partition(".")
    if group not in OPEN_GROUPS or not rest:
        return False
    _, _, part = rest.partition(".")
    model = f"{group}.{OPEN_GROUPS[group]}"
    return f"{model}.{part}" in known if part else False


def nearest(key: str) -> str:
    """ " (did you mean ...?)": the option whose full name, or else whose last part, is nearest to `key`."""
    known = _keys(_base())
    last = key.rpartition(".")[2]
    by_last = {k.rpartition(".")[2]: k for k in reversed(known)}
    if last in by_last:
        return f" (did you mean '{by_last[last]}'?)"
    if hint := suggest(key, known):
        return hint
    close = difflib.get_close_matches(last, by_last, n=1, cutoff=0.6)
    return f" (did you mean '{by_last[close[0]]}'?)" if close else ""


def check(cfg: DictConfig) -> None:
    """Raise UserError for unknown keys (also in YAML files), wrong choices, and values that contradict each other."""
    base = _base()
    for key in _keys(cfg):
        parent = key.rpartition(".")[0]
        is_new_entry = parent in OPEN_GROUPS and OmegaConf.is_dict(OmegaConf.select(cfg, key))
        if not is_new_entry and not _known(key):
            raise UserError(f"unknown option {key}{nearest(key)}; see nfpi/___configs/base.yaml")
    for key, allowed in CHOICES.items():
        if (value := OmegaConf.select(cfg, key)) not in allowed:
            options = [str(a) for a in allowed]
            raise UserError(f"{key}={value}: expected one of {', '.join(options)}{suggest(str(value), options)}")
    info = cfg.val.gmm.fpi_info
    if info.lambda_fpi_mu != info.lambda_fpi_sigma:
        raise UserError(
            f"lambda_fpi_mu={info.lambda_fpi_mu} and lambda_fpi_sigma={info.lambda_fpi_sigma} must be equal: "
            "both weigh the same objective"
        )
    if cfg.dataset_name not in cfg.dataset_info or not OmegaConf.is_dict(cfg.dataset_info[cfg.dataset_name]):
        known = [k for k, v in cfg.dataset_info.items() if OmegaConf.is_dict(v)]
        raise UserError(
            f"dataset_name={cfg.dataset_name}{suggest(cfg.dataset_name, known)}: add dataset_info.{cfg.dataset_name} "
            f"(ch, h, w, train_size, num_classes, train_ratio, augmentation, cnn) or use one of {', '.join(known)}"
        )
    missing = sorted(set(base.dataset_info.cifar10) - set(cfg.dataset_info[cfg.dataset_name]))
    if missing:
        raise UserError(f"dataset_info.{cfg.dataset_name} lacks {', '.join(missing)}")
    for key in ("nf_load_path", "nf_weights_load_path"):
        if OmegaConf.is_missing(cfg, key):
            raise UserError(f"this configuration needs {key}=FILE")
    if str(cfg.trainer_precision) not in ("32", "64"):
        raise UserError(f"trainer_precision={cfg.trainer_precision}: expected 32 or 64")
    if not 1 <= cfg.bits <= 8:
        raise UserError(f"bits={cfg.bits}: expected 1 to 8")
    if cfg.num_test_alone < 1:
        raise UserError(f"num_test_alone={cfg.num_test_alone}: expected 1 or more (test_nf_alone=0 skips the test)")
    for key in (
        "train.epochs",
        "train.batch_size",
        "train.init_batch_size",
        "test.batch_size",
        "val.batch_size",
        "test_every_n_epochs",
        "save_model_ckpt_every_n_epochs",
        "val.gmm.every_n_epochs",
        "val.gmm.n_loops",
    ):
        if OmegaConf.select(cfg, key) < 1:
            raise UserError(f"{key}={OmegaConf.select(cfg, key)}: expected 1 or more")
    _check_stages(cfg)


def _check_stages(cfg: DictConfig) -> None:
    if cfg.train_nf and cfg.nf_load_path:
        raise UserError(
            "nf_load_path is the model that is tested with train_nf=0; to resume a run use nf_ckpt_path, to start from "
            "pre-trained weights nf_weights_load_path"
        )
    needs_flow = cfg.test_nf_alone or (cfg.train_classifier and cfg.classifier_nf_strategy != "do_not_use")
    generated = str(cfg.dataset_classification).endswith(".pickle")
    if not cfg.train_nf and not cfg.nf_load_path and (cfg.test_nf_alone or (needs_flow and not generated)):
        raise UserError("train_nf=0 needs nf_load_path=FILE (a flow.safetensors or a state_*.pt)")
    if (
        cfg.val.gmm.gaussian_method_name == "one"
        and cfg.train_classifier
        and cfg.classifier_nf_strategy != "do_not_use"
    ):
        raise UserError("gaussian_method_name=one has no classes to generate: add train_classifier=0")
