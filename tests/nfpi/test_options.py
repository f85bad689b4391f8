"""Every option of every script: wrong values are one line; the published values; notes; remedies that exist."""

import ast
import copy
import inspect
import json
import re
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import OmegaConf
from option_table import WRONG, judged, option_names, run_inside

from common.errors import UserError
from common.options import all_names, field_at, flat
from nfpi import benchmark, convert_checkpoint, estimator, extract_dataset, main, sample, synthetic_2d
from nfpi.config import CONFIGS, Config, composed, config_place, resolve, without_effect

FOLDER = Path(main.__file__).parent
DIGITS = ["--config-path=___configs/digits", "--config-name=smoke", "device=cpu", "dry_run=true"]
VALUES = OmegaConf.to_container(composed(*config_place("___configs/digits", "smoke"), []), resolve=True)
OPTIONS = [name for name, value in flat(VALUES).items() if not isinstance(value, dict)]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def judge(name, text):
    """The answer to one override: None, or the line of the error; anything else is raised."""
    try:
        override = OverridesParser.create().parse_override(f"{name}={text}")
    except HydraException:
        return "unreadable"
    if override.is_sweep_override():
        return "unreadable"
    values = place = copy.deepcopy(VALUES)
    *groups, last = name.split(".")
    for group in groups:
        place = place[group]
    place[last] = override.value()
    try:
        Config.build(values)
    except UserError as error:
        return str(error)


@pytest.mark.parametrize("name", OPTIONS)
def test_wrong_values_of_every_option_are_one_line(name):
    field = field_at(Config, name.split("."))[1]
    number = any(part in str(field.annotation) for part in ("int", "float"))
    for text in WRONG:
        line = judge(name, text)
        assert line is None or "\n" not in line, text
        if number and text in ("fast", "nan", "inf", "-inf", "no such choice", "a,b", "\x00", "1e300", "true"):
            assert line is not None and (line == "unreadable" or name.split(".")[-1] in line), (text, line)
        if number and text == "" and "None" not in str(field.annotation):
            assert line is not None


@pytest.mark.parametrize(
    "word",
    ["train.lr=fast", "train.lr=-1", "train.lr=nan", "train.lr=null", "num_flows=3", "train.epochs=1.5", "T=hot",
     "T=-1", "train.epochs=true", "seed=abc", "seed=-5", "dataset_info.items_per_class_train=-5",
     "train.ema_name=average",
     "train.init_batch_size=1", "bits=9", "val.gmm.mu_lr_steps_arr=[0]", "num_imgs_scale=1e-9", "device=tpu",
     "hidden_channels=[1e9,1]", "classification.digits.batch_size=999999", "nf_ckpt_path=none.pt",
     "gaussians_load_path=none.safetensors", "classification.digits.epochs=0", "dataset_info.digits.cnn=nope"],
)  # fmt: skip
def test_the_command_refuses_before_anything_is_written(word):
    found = run_inside(main.main, [*DIGITS, word])
    assert found.code == 2 and found.err.startswith("error: ") and len(found.err.strip().splitlines()) == 1, found
    assert word.split("=")[0].split(".")[-1] in found.err or word.split("=")[1] in found.err
    assert not list(Path.cwd().iterdir())


@pytest.mark.parametrize(
    ("word", "named"),
    [("hydra.run.dir=/proc/none", "/proc/none"), ("level_method=nope", "spcb"), ("~train.lr", "train.lr"),
     ("train=3", "group of options"), ("dataset_info.items_per_clas_train=3", "items_per_class_train"),
     ("val.gmm.fpi_info.interval_mu=[5,2]", "ends before"), ("++dataset_info.mine=3", "dataset_info.mine"),
     ("val.gmm.fpi_info.interval_mu=[5]", "two epochs")],
)  # fmt: skip
def test_what_hydra_would_trip_over_is_one_line(word, named):
    found = run_inside(main.main, [*DIGITS[:3], word])
    assert found.code == 2 and named in found.err and len(found.err.strip().splitlines()) == 1, found


@pytest.mark.parametrize(
    ("words", "named"), [(["seed=1,abc"], "seed=abc"), (["seed=1,2", "nf_ckpt_path=a.pt"], "--multirun")]
)
def test_every_job_of_a_multirun_is_judged_before_the_first_starts(words, named):
    found = run_inside(main.main, [*DIGITS, "--multirun", *words])
    assert found.code == 2 and named in found.err and not list(Path.cwd().iterdir())


def test_dry_run_prints_the_resolved_options():
    found = run_inside(main.main, [*DIGITS, "bits=5", "train.ema.beta=0.5"])
    values = json.loads(found.out)
    assert found.code == 0 and values["bits"] == 5 and not list(Path.cwd().iterdir())
    assert flat(values).keys() == set(OPTIONS)
    assert values["train"]["ema"]["beta"] == 0.5 and values["val"]["gmm"]["fpi_info"]["lambda_fpi_mu"] == 1000


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_shows_the_values_of_the_chosen_file(flag):
    found = run_inside(main.main, ["--config-path=___configs/mnist", "--config-name=mean_and_var", "T=0.5", flag])
    assert found.code == 0
    for text in ("train.batch_size=1024 ", "num_blocks=[4, 2, 1] ", "T=0.5 ", "one of adamax, adam, adamw"):
        assert text in found.out, text
    assert all(f"  {name}=" in found.out for name in OPTIONS if name in all_names(Config))
    shown = run_inside(main.main, ["--config-path=___configs/cifar10", "--config-name=mean_reload", flag])
    assert shown.code == 0 and "nf_load_path=<FILE>" in shown.out


TOOLS = {
    "sample": (sample, []), "synthetic_2d": (synthetic_2d, ["--data", "blobs"]),
    "convert_checkpoint": (convert_checkpoint, ["a.ckpt", "b.safetensors"]),
    "extract_dataset": (extract_dataset, ["digits"]), "benchmark": (benchmark, []),
}  # fmt: skip


@pytest.mark.parametrize("tool", TOOLS)
def test_tools(tool):
    module, words = TOOLS[tool]
    assert run_inside(module.main, [*words, "--dry-run"]).code == 0
    for flag in ("--help", "-h"):
        assert "dry_run" in run_inside(module.main, [flag]).out
    for name in set(option_names(module.Config)) - {"dry_run"}:
        found = list(judged(module.main, [*words, "--dry-run"], lambda value, name=name: [f"--{name}={value}"]))
        assert not found
    found = run_inside(module.main, [*words, "--dry-run", "--sed", "1"])
    assert found.code == 2 and "unknown option --sed" in found.err


@pytest.mark.parametrize(
    ("tool", "words", "named"),
    [
        ("synthetic_2d", ["--variance-update", "exact", "--no-variances"], "--variance-update exact"),
        ("extract_dataset", ["--size", "8"], "--size"),
        ("extract_dataset", ["--folder", "x", "--download"], "--download"),
        ("convert_checkpoint", ["--bits", "9"], "bits"),
        ("sample", ["--classes", "11"], "classes"),
        ("sample", ["--device", "cuda:7"], "device"),
    ],
)
def test_tools_refuse_contradictions(tool, words, named):
    module, before = TOOLS[tool]
    found = run_inside(module.main, [*before, *words])
    assert found.code == 2 and named in found.err and not list(Path.cwd().iterdir())


def test_a_value_with_an_equals_sign_gets_the_quotes(tmp_path):
    name = "epoch=499-step=49000.safetensors"
    found = run_inside(main.main, [*DIGITS, "train_nf=0", f"nf_load_path={name}"])
    hint = re.search(r"'(nf_load_path=.*)'$", found.err.strip())
    assert found.code == 2 and hint
    again = run_inside(main.main, [*DIGITS, "train_nf=0", hint[1]])
    assert f"no weights at {name}" in again.err


def test_options_without_effect_are_said():
    given = ["train.lr", "val.gmm.kld", "mixing_nbr", "classification.adam.lr"]
    config = resolve(*config_place("___configs/digits", "smoke"), ["classification.adam.lr=0.1"])
    lines = "\n".join(without_effect(config, given))
    assert "val.gmm.kld" in lines and "mixing_nbr" in lines and "classification.adam.lr" in lines
    assert "train.lr" not in lines
    found = run_inside(main.main, [*DIGITS, "val.gmm.kld=3"])
    assert found.code == 0 and "val.gmm.kld: no effect here (only with training_algorithm=glem)" in found.err


def test_remedies_of_messages_exist():
    """Every KEY=VALUE and --flag that a message of this folder names is an option."""
    keys = {name.rpartition(".")[2] for name in OPTIONS} | {"dataset_info", "classification", "gaussian_method_name"}
    flags = {f"--{name.replace('_', '-')}" for module, _ in TOOLS.values() for name in option_names(module.Config)}
    flags |= {"--config-path", "--config-name", "--config_path", "--help", "--no-variances", "--hydra-help",
              "--version", "--cfg", "--info", "--resolve", "--package", "--multirun", "--config_name"}  # fmt: skip
    other = {"KEY", "K", "d", "D", "T", "key", "config", "device", "step_size"}
    other |= set(inspect.signature(estimator.FixedPointGaussians).parameters)
    wrong = []
    for path in FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            called = isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", ""))
            if isinstance(node, ast.Raise | ast.Yield) or called in ("info", "print"):
                text = " ".join(part.value for part in ast.walk(node)
                                if isinstance(part, ast.Constant) and isinstance(part.value, str))  # fmt: skip
                wrong += [(path.name, key) for key in re.findall(r"(?<![\w.-])([a-z_]{3,})=", text)
                          if key not in keys | other]  # fmt: skip
                named = re.findall(r"(?<![\w-])--[a-z][\w-]+", text)
                wrong += [(path.name, flag) for flag in named if flag not in flags]
    assert not wrong


# what differs from cifar10/mean in each shipped file, and cifar10/mean's own published values
DIFFERENCES = {
    "cifar10/mean": {},
    "cifar10/mean_reload": {"train_nf": False, "nf_load_path": "x"},
    "cifar10/imagenet_mean": {"lambda": 1_000_000, "variant": "imagenet_pretrain/again", "nf_weights_load_path": "x"},
    "cifar10/var": {"lambda": 100_000, "identity_diag": False, "interval_mu": [-1, -1], "interval_sigma": [0, 200],
                    "variant": "var"},
    "cifar10/mean_var": {"lambda": 300_000, "identity_diag": False, "interval_sigma": [0, 200], "items": 0,
                         "variant": "mean_and_var"},
    "cifar10/data_init": {"lambda": 100_000, "identity_diag": False, "interval_mu": [-1, -1], "variant": "data_init"},
    "cifar100/mean": {"lambda": 7_500_000, "isotropic": False},
    "cifar100/imagenet_mean": {"lambda": 10_000_000, "identity_diag": False, "items": 0,
                               "variant": "imagenet_pretrain/again", "nf_weights_load_path": "x"},
    "cifar100/var": {"lambda": 2_000_000, "identity_diag": False, "interval_mu": [-1, -1], "interval_sigma": [0, 200],
                     "items": 50, "variant": "var"},
    "cifar100/mean_var": {"lambda": 3_000_000, "identity_diag": False, "interval_sigma": [0, 200], "items": 0,
                          "variant": "mean_and_var"},
    "cifar100/data_init": {"lambda": 1_000_000, "identity_diag": False, "interval_mu": [-1, -1], "isotropic": False,
                           "variant": "data_init"},
    "mnist/mean_and_var": {"lambda": 1, "identity_diag": False, "interval_sigma": [0, 200], "isotropic": False,
                           "items": 0, "variant": "mean_and_var", "num_blocks": [4, 2, 1], "train.epochs": 300,
                           "train.batch_size": 1024},
    "digits/mean": {"lambda": 10_000, "items": 0, "num_levels": 2, "num_flows": [4, 4], "num_blocks": [1, 1],
                    "hidden_channels": [32, 32], "train.epochs": 20, "train.batch_size": 128, "train.warmup_steps": 60},
    "digits/smoke": {"lambda": 1000, "items": 20, "variant": "smoke", "num_levels": 2, "num_flows": [1, 1],
                     "num_blocks": [1, 1], "hidden_channels": [8, 8], "test_every_n_epochs": 1,
                     "save_every_n_epochs": 2, "only_T": True, "train.epochs": 2, "train.batch_size": 100,
                     "train.init_batch_size": 200,
                     "train.warmup_steps": 10},
}  # fmt: skip
FPI = "val.gmm.fpi_info."
LONG = {"lambda": [f"{FPI}lambda_fpi_mu", f"{FPI}lambda_fpi_sigma"], "identity_diag": [f"{FPI}identity_diag"],
        "interval_mu": [f"{FPI}interval_mu"], "interval_sigma": [f"{FPI}interval_sigma"],
        "isotropic": [f"{FPI}use_isotropic_variance_when_training_mean"],
        "items": ["dataset_info.items_per_class_train", "dataset_info.items_per_class_val"]}  # fmt: skip
PUBLISHED = {
    "train.epochs": 500, "train.batch_size": 512, "train.lr": 0.01, "train.lr_decay": 0.5, "train.step_size": [1000],
    "train.warmup_steps": 1000, "train.init_batch_size": 1024, "train.optimizer": "adamax", "train.ema.beta": 0.9999,
    "train.ema.power": 0.75, "train.ema.update_every": 1, "train.ema.update_after_step": 0, "val.batch_size": 5000,
    "test.batch_size": 1000, "seed": 1999, "bits": 8, "T": 1.0, "num_flows": [8, 8, 8], "num_blocks": [8, 4, 2],
    "hidden_channels": [128, 128, 128], "conv_type": "matrixexp", "flow_type": "matrixexp", "val.gmm.kld": 50,
    "level_method.choice": "all_levels", "level_method.level_idx": 3, "uniform_noise_value": 0.05,
    "val.gmm.merge_datasets_after": 1, "val.gmm.use_train_dataset": True, "val.gmm.training_algorithm": "fpi_nf_kld",
    "val.gmm.mu_lr_arr": [0.1, 0.1, 0.01, 0.001], "val.gmm.mu_lr_steps_arr": [0, 10, 11, 100],
    f"{FPI}max_iters": 1000, f"{FPI}epsilon_convergence": 0.1, f"{FPI}pw_kld_factors_scale": 10,
    f"{FPI}sum_mu_diffs_arr_square": True, f"{FPI}exp_den_update": True, f"{FPI}lambda_fpi_mu": 500_000,
    f"{FPI}interval_mu": [0, 200], f"{FPI}interval_sigma": [-1, -1], f"{FPI}identity_diag": True,
    f"{FPI}variance_update": "upstream", f"{FPI}damping": 0, "dataset_info.items_per_class_train": 500,
    "classification.resnet_version": 18, "classification.stem": "small", "classification.sgd.max_lr": 0.1,
    "classification.sgd.momentum": 0.9, "classification.sgd.weight_decay": 0.0005, "classification.cifar10.epochs": 30,
    "classification.cifar100.epochs": 50, "classification.mnist.epochs": 3, "classification.mnist.batch_size": 100,
    "dataset_info.mnist.train_size": 60000, "dataset_info.cifar100.num_classes": 100, "deterministic": True,
}  # fmt: skip


def test_shipped_files_resolve_to_the_published_values():
    shipped = {f"{p.parent.name}/{p.stem}" for p in CONFIGS.glob("*/*.yaml") if p.parent.name != "level_method"}
    assert shipped - {"folder/mean"} == DIFFERENCES.keys()  # which is for one's own images
    base = flat(resolve(*config_place("___configs/cifar10", "mean"), []).as_dict())
    assert {name: base[name] for name in PUBLISHED} == PUBLISHED
    for name, differences in DIFFERENCES.items():
        group, _, stem = name.partition("/")
        needs = [f"{key}=x" for key in ("nf_load_path", "nf_weights_load_path") if key in differences]
        got = flat(resolve(CONFIGS / group, stem, needs).as_dict())
        want = {full: value for key, value in differences.items() for full in LONG.get(key, [key])}
        if group != "cifar10":
            want |= dict.fromkeys(("dataset_name", "dataset_nf", "dataset_classification"), group)
        assert {key: value for key, value in got.items() if base[key] != value} == want, name
        assert len((CONFIGS / group / f"{stem}.yaml").read_text().splitlines()) < 30  # differences only
