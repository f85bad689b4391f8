"""Every option of every script of this paper: wrong values, the published defaults, combinations, remedies."""

import ast
import json
import logging
import re
from functools import partial
from pathlib import Path

import pytest
from option_table import judged, run_inside

from common.options import Options, check_resume
from glancenet import (
    benchmark,
    cluster,
    compare,
    evaluate,
    leakage,
    main,
    mnist_parity,
    prepare_celeba,
    prepare_dsprites_leakage,
    prepare_mpi3d,
    traverse,
)  # fmt: skip
from glancenet.options import Config, parse

ROOT = Path(__file__).resolve().parents[2]
BASE = ["--alg", "GlanceNet", "--dset_name", "sprites", "--encoder", "SimpleGaussianConv64", "--decoder"]
BASE += ["SimpleConv64", "--dset_dir", "."]
# script: its model of options, and the words that make a valid call
SCRIPTS = {
    "main": (main, Config, BASE),
    "evaluate": (evaluate, evaluate.Config, ["logs"]),
    "compare": (compare, compare.Config, ["--dset_dir", "."]),
    "leakage": (leakage, leakage.Config, ["--dset_dir", "."]),
    "mnist_parity": (mnist_parity, mnist_parity.Config, []),
    "cluster": (cluster, cluster.Config, ["--dset_name", "celebA", "--dset_dir", "."]),
    "traverse": (traverse, traverse.Config, []),
    "benchmark": (benchmark, benchmark.Config, []),
}
NUMBERS = (int, float)


def dry(module, words: list[str]):
    return run_inside(module.main, [*words, "--dry_run", "true"])


def options_of(model: type[Options]) -> list[str]:
    return [name for name in model.model_fields if name not in ("dry_run",)]


CASES = [(script, name) for script, (_, model, _) in SCRIPTS.items() for name in options_of(model)]


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(("script", "name"), CASES)
def test_wrong_values_are_one_line(script, name):
    """Only exit codes 0 and 2, no traceback, nothing written; no number is a word, nan or nothing."""
    module, model, base = SCRIPTS[script]
    problems = list(judged(partial(_dry_main, module), base, lambda value: [f"--{name}={value}"]))
    assert not problems
    annotation = str(model.model_fields[name].annotation)
    if any(kind in annotation for kind in ("int", "float")):
        for value in ("fast", "nan", ""):
            assert dry(module, [*base, f"--{name}={value}"]).code == 2, value
    assert not list(Path().iterdir()), "a dry run writes nothing"


def _dry_main(module, argv: list[str]):
    return module.main([*argv, "--dry_run", "true"])


@pytest.mark.parametrize("script", SCRIPTS)
def test_dry_run_prints_the_options_and_help_the_defaults(script):
    module, model, base = SCRIPTS[script]
    shown = dry(module, base)
    assert shown.code == 0 and set(model.model_fields) <= set(json.loads(shown.out))
    for word in ("-h", "--help"):
        text = run_inside(module.main, [*base, word])
        assert text.code == 0 and all(f"--{name}" in text.out for name in options_of(model))


ONCE_LATE = ["--lr_G -1", "--lr_G nan", "--beta1 1.5", "--beta2 1", "--seed -5", "--w_kld -1", "--warmup_epochs -3",
         "--metric_jobs 0", "--metric_train 5", "--show_loss 0.5", "--batch_size 0", "--max_iter 0", "--max_epoch inf",
         "--osr_quantile 1", "--traverse_spacing 0", "--size_layer_disc 0", "--num_layer_disc 1", "--n_classes 1",
         "--sprites_sizes 3 2 2 4", "--include_labels -1", "--device cuda:99", "--image_size 32"]  # fmt: skip


SCHEDULES = ["ExponentialLR gamma=nan", "ExponentialLR gamma=inf", "ExponentialLR gamma=-1", "ExponentialLR gamma=abc",
             "StepLR step_size=0", "CosineAnnealingLR T_max=0", "StepLR", "ExponentialLR 0.9", "LambdaLR total=x",
             "MultiStepLR milestones=a gamma=0.1", "CyclicLR base_lr=-1 max_lr=1", "ReduceLROnPlateau factor=2",
             "ExponentialLR gamma=0.9 gama=1", "CyclicLR base_lr=x max_lr=y"]  # fmt: skip


@pytest.mark.parametrize("words", SCHEDULES)
def test_schedules_that_cannot_work_are_refused(words):
    name, *args = words.split()
    outcome = dry(main, [*BASE, "--lr_scheduler", name, *(["--lr_scheduler_args", *args] if args else [])])
    assert outcome.code == 2 and len(outcome.err.strip().splitlines()) == 1, outcome.err
    assert dry(main, [*BASE, "--lr_scheduler", "ExponentialLR", "--lr_scheduler_args", "gamma=0.9"]).code == 0


@pytest.mark.parametrize(
    "words",
    ["target_value=-1 epochs=3", "target_value=nan epochs=3", "epochs=3", "target_value=1", "target_value=1 epochs=0",
     "target_value=a epochs=2"],
)  # fmt: skip
def test_weight_schedules_that_cannot_work_are_refused(words):
    flags = ["--w_recon_scheduler", "LinearScheduler", "--w_recon_scheduler_args", *words.split()]
    assert dry(main, [*BASE, *flags]).code == 2


@pytest.mark.parametrize("words", ONCE_LATE)
def test_values_that_once_failed_late(words):
    outcome = dry(main, [*BASE, *words.split()])
    assert outcome.code == 2 and words.split()[0].lstrip("-") in outcome.err, outcome.err


# what the published scripts and a bare call resolve to, where it is not the default of the table below
DEFAULTS = {
    "z_dim": 16, "z_class": 0, "num_layer_disc": 6, "size_layer_disc": 1000, "w_recon": 1, "w_kld": 1, "w_tc": 1,
    "label_weight": 5, "latent_weight": None, "latent_loss": "MSE", "masking_fact": 100, "conditional_prior": False,
    "cluster_dim": 0, "classification_epoch": None, "controlled_capacity_increase": False, "max_c": 25,
    "iterations_c": 10000, "w_infovae": 1, "w_dipvae": 1, "lambda_od": 1, "lambda_d_factor": 10, "w_le": 1, "w_aux": 1,
    "batch_size": 64, "max_iter": 3e7, "max_epoch": 3e7, "lr_G": 1e-4, "lr_D": 1e-4, "beta1": 0.9, "beta2": 0.999,
    "warmup_epochs": 5, "lr_scheduler": None, "lr_scheduler_args": [], "early_stopping": True, "seed": 123,
    "metric_train": 10000, "metric_eval": 5000, "mc_samples": 100, "osr_quantile": 0.95, "show_loss": 500,
    "traverse_min": -3, "traverse_max": 3, "traverse_spacing": 0.5, "file_save": True, "gif_save": True,
    "loss_terms": [], "include_labels": None, "sprites_sizes": None, "evaluation_metric": [],
    "treat_iter_as_epoch": False, "amp": False, "tf32": False, "deterministic": False,
    "cuda_graph": False,
}  # fmt: skip
DSPRITES = {"z_dim": 7, "z_class": 7, "label_weight": 100, "classification_epoch": 20, "batch_size": 64, "seed": 883,
            "show_loss": 1000, "max_iter": 250000, "evaluate_iter": 125000, "test_iter": 9216, "masking_fact": 1,
            "evaluation_metric": ["dci"], "include_labels": [0, 1, 2, 3, 4, 5]}  # fmt: skip
LEAKAGE = {"z_dim": 5, "z_class": 5, "lr_G": 0.0004, "max_epoch": 350, "test_iter": 300, "show_loss": 5000,
           "label_weight": 0, "latent_weight": 250, "latent_loss": "MSE", "masking_fact": 100}  # fmt: skip
MPI3D = {"z_dim": 21, "z_class": 21, "batch_size": 100, "latent_loss": "BCE", "n_classes": 10, "lr_G": 0.001}
MORE = {
    "glancenet_dsprites.sh": DSPRITES | {"conditional_prior": True, "warmup_epochs": 5, "traverse_z": True},
    "cbnm_dsprites.sh": DSPRITES | {"warmup_epochs": 10},
    "glancenet_mpi3d.sh": MPI3D | {"label_weight": 1000, "latent_weight": 7000, "max_epoch": 30},
    "cbnm_mpi3d.sh": MPI3D | {"label_weight": 1, "latent_weight": 2, "max_epoch": 15, "test_iter": 2500},
    "glancenet_celeba.sh": {"z_dim": 10, "w_recon": 0.01, "batch_size": 100, "max_epoch": 70, "lr_G": 1e-4},
    "cbnm_celeba.sh": {"z_dim": 64, "label_weight": 1, "latent_weight": 2, "max_epoch": 30, "test_iter": 1620},
}


def test_published_values_stay_the_defaults(tmp_path):
    bare = parse(BASE).as_dict()
    assert {name: bare[name] for name in DEFAULTS} == DEFAULTS
    for script, expected in MORE.items():
        text = (ROOT / "scripts" / script).read_text()
        text = text[text.index("main.py") + 9 :].replace("\\\n", " ")
        text = re.sub(r"\$\{MAX_ITER:\+[^}]*\}", "", text)
        text = re.sub(r'"?\$\{\w+:-(\w+)\}"?', r"\1", text).replace('"$@"', "").replace('"$data"', str(tmp_path))
        text = text.replace('"$seed"', "883").replace('"$masking_fact"', "1").replace("${masking_fact}_${seed}", "1")
        found = parse(text.split()).as_dict()
        assert {name: found[name] for name in expected} == expected, script
        rest = {name: DEFAULTS[name] for name in DEFAULTS if f"--{name} " not in text and name != "warmup_epochs"}
        assert {name: found[name] for name in rest} == rest, script
    for key, words in leakage.MODELS.items():
        found = parse([*words, "--dset_dir", "."]).as_dict()
        assert {name: found[name] for name in LEAKAGE} == LEAKAGE
        if key != "cbnm":
            assert (found["w_kld"], found["max_c"], found["controlled_capacity_increase"]) == (10, 0, True)


def test_words_are_read_as_ever():
    o = parse([*BASE, "--lr_scheduler", "MultiStepLR", "--lr_scheduler_args", "milestones=1,3", "gamma=0.5",
               "--loss_terms", "factorvae", "BETATCVAE", "--max_iter", "3e3", "--conditional_prior", "Yes",
               "--controlled_capacity_increase", "f", "--metric_jobs", "-1", "--include_labels", "1", "2"])  # fmt: skip
    assert o.lr_scheduler_args == ["milestones=1,3", "gamma=0.5"] and o.loss_terms == ["FACTORVAE", "BetaTCVAE"]
    assert (o.max_iter, o.conditional_prior, o.controlled_capacity_increase) == (3000, True, False)
    assert (o.metric_jobs, o.include_labels) == (-1, [1, 2])
    assert parse([*BASE, "--lr_scheduler", "StepLR", "--lr_scheduler_args=step_size=3"]).lr_scheduler_args == [
        "step_size=3"
    ]


IDLE = {
    "--conditional_prior": (["--alg", "CBNM", "--conditional_prior", "true"], "GlanceNet"),
    "--z_class": (["--alg", "CBNM", "--z_class", "3"], "GlanceNet"),
    "--w_kld": (["--alg", "CBNM", "--w_kld", "3"], "VAEs"),
    "--cluster_dim": (["--cluster_dim", "3"], "--conditional_prior"),
    "--max_c": (["--max_c", "40"], "--controlled_capacity_increase"),
    "--w_tc": (["--w_tc", "3"], "BetaTCVAE"),
    "--size_layer_disc": (["--size_layer_disc", "10"], "FACTORVAE"),
    "--lr_D": (["--lr_D", "0.1"], "FACTORVAE"),
    "--metric_train": (["--metric_train", "100"], "--evaluation_metric"),
    "--traverse_min": (["--traverse_min", "-2"], "--traverse_z"),
    "--masking_fact": (["--alg", "VAE", "--masking_fact", "10"], "GlanceNet and CBNM"),
    "--label_tiler": (["--label_tiler", "MultiTo2DChannel"], "CVAE"),
}


@pytest.mark.parametrize("flag", IDLE)
def test_options_that_do_nothing_are_said(flag, caplog):
    words, needed = IDLE[flag]
    with caplog.at_level(logging.WARNING):
        parse([*BASE, *words])
    (message,) = [record.getMessage() for record in caplog.records]
    assert message.startswith(f"{flag} does nothing here") and needed in message
    caplog.clear()
    parse(BASE)
    assert not caplog.records


def test_class_loss_alone_is_refused_where_there_are_no_classes():
    outcome = dry(main, [*BASE, "--alg", "VAE", "--classification_epoch", "2"])
    assert outcome.code == 2 and "classification_epoch" in outcome.err


def test_what_a_resumed_run_may_change():
    """The documented list, and nothing else."""
    old = parse(BASE).as_dict()
    changed = {"max_epoch": 5, "lr_G": 0.1, "device": "cpu", "num_workers": 0, "ckpt_save_iter": 7, "file_save": False}
    lines = check_resume(old, parse(BASE).with_changes(**changed), "there")
    assert [line.split(":")[0] for line in lines] == [name for name in Config.model_fields if name in changed]
    may = {name for name, field in Config.model_fields.items() if field.json_schema_extra["resume"] == "change"}
    assert may == {
        "max_iter", "max_epoch", "lr_G", "lr_D", "early_stopping", "dset_dir", "num_workers", "pin_memory", "hold_data",
        "metric_jobs", "print_iter", "float_iter", "recon_iter", "traverse_iter", "ckpt_save_iter", "show_loss",
        "file_save", "gif_save", "traverse_min", "traverse_max", "traverse_spacing", "traverse_z", "traverse_l",
        "traverse_c", "device", "cuda_graph",
    }  # fmt: skip


def messages() -> list[tuple[str, str]]:
    """(file, text) of every string constant of this paper's code that is no docstring."""
    found = []
    for path in sorted((ROOT / "glancenet").glob("*.py")):
        tree = ast.parse(path.read_text())
        docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
                found.append((path.name, node.value))
    return found


def test_every_remedy_exists():
    """Options and scripts that a message names are there."""
    tools = {"help"}
    for module in (
        *(module for module, _, _ in SCRIPTS.values()),
        prepare_celeba,
        prepare_dsprites_leakage,
        prepare_mpi3d,
    ):
        for name, field in getattr(module, "Config", Options).model_fields.items():
            tools |= {name, *(flag.lstrip("-") for flag in field.json_schema_extra["flags"])}
    for file, text in messages():
        for name in re.findall(r"(?<![\w-])--([A-Za-z]\w+)", text):
            assert name in tools, f"{file}: --{name}"
        for script in re.findall(r"python (glancenet/\w+\.py)", text):
            assert (ROOT / script).is_file(), f"{file}: {script}"
