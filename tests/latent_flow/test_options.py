"""Every option of every script: wrong values, resolved published values, resuming, and the words of the messages."""

import ast
import itertools
import json
import re
from pathlib import Path

import pytest
import torch
from option_table import judged, option_names, run_inside

import latent_flow
from common.errors import UserError
from latent_flow import (
    benchmark,
    evaluate,
    minimal_example,
    options,
    release,
    sample_vae,
    show_flows,
    train_falcol_isaac,
    train_vae_scratch,
    train_vae_scratch_unsuper,
    train_vae_scratch_weakly,
    traverse_latent_space_vae,
)

TRAINERS = {
    train_vae_scratch: options.SupervisedOptions,
    train_vae_scratch_weakly: options.WeakOptions,
    train_vae_scratch_unsuper: options.SparseOptions,
    train_falcol_isaac: options.DeepOptions,
}
TOOLS = {
    evaluate: evaluate.EvaluateOptions,
    sample_vae: sample_vae.SampleOptions,
    show_flows: show_flows.ShowOptions,
    traverse_latent_space_vae: traverse_latent_space_vae.TraverseOptions,
    minimal_example: minimal_example.MinimalOptions,
    benchmark: benchmark.FlowBenchmarkOptions,
}
MODELS = {**TRAINERS, **TOOLS}
NUMBERS = [
    (script, name)
    for script, model in MODELS.items()
    for name, field in model.model_fields.items()
    if re.search(r"\b(int|float)\b", str(field.annotation)) and "str" not in str(field.annotation)
]


def dry(script) -> list[str]:
    return ["--dry-run", *(["--exp", "RUN"] if script is evaluate else [])]


def short(value) -> str:
    return getattr(value, "__name__", str(value)).removeprefix("latent_flow.")


@pytest.mark.parametrize("script", MODELS, ids=short)
def test_wrong_values_are_one_line(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = [
        fault
        for name in option_names(MODELS[script])
        if name != "dry_run"
        for fault in judged(script.main, dry(script), lambda value, name=name: [f"--{name.replace('_', '-')}={value}"])
    ]
    assert not found
    assert not list(tmp_path.iterdir())  # nothing is begun


@pytest.mark.parametrize(("script", "name"), NUMBERS, ids=short)
def test_a_number_is_a_number(script, name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for value in ("fast", "nan", "", "1e999"):
        found = run_inside(script.main, [*dry(script), f"--{name}={value}"])
        assert found.code == 2 and f"--{name}" in found.err, (value, found)


def test_release_takes_two_names(tmp_path):
    for argv in ([], ["RUN"], ["RUN", "weights.pt"], ["a", "b", "c"], ["nowhere", str(tmp_path / "x.safetensors")]):
        found = run_inside(release.main, argv)
        assert found.code == 2 and len(found.err.strip().splitlines()) == 1, argv
    assert not list(tmp_path.iterdir())


# ---- the published values

COMMON = {
    "dataset": "mnist", "image_size": 28, "warp_centre": "upstream", "num_support_sets": 3, "num_timesteps": 16,
    "latent_size": 324, "objective": "paper", "path_kl": "shared", "logdet": "hutchinson", "logdet_terms": 2,
    "diffusion": 1.0, "k_per": "sample", "support_set_lr": 1e-4, "lr_vae": 1e-4, "max_iter": 90_000, "batch_size": 128,
    "decode_frames": None, "output_bias": None, "amp": False, "tf32": False, "log_freq": 10, "ckp_freq": None,
    "eval_every": None, "eval_images": 2000,
    "tensorboard": False, "seed": 0, "deterministic": False, "device": "auto", "smoke": False, "data_dir": None,
    "cuda_graph": False,
}  # fmt: skip
INDEX = {"width": None, "lr_index": 1e-4, "frame_stride": 1}
OWN = {
    train_vae_scratch: {"transition": "flow"},
    train_vae_scratch_weakly: {**INDEX, "index_weight": 20.0, "entropy_weight": 0.0, "index_labels": False},
    train_vae_scratch_unsuper: {
        **INDEX, "single_control": False, "field": "soft", "slab_start": 75_001, "spike_prior": [0.1, 0.9],
        "spike_weight": 1.0,
    },
    train_falcol_isaac: {
        "dataset": "falcor3d", "image_size": 128, "num_support_sets": 7, "num_timesteps": 10, "max_iter": 100_000,
    },
}  # fmt: skip
SMOKE = {"latent_size": 8, "batch_size": 16, "num_timesteps": 8, "max_iter": 6, "log_freq": 1, "ckp_freq": 3,
         "eval_images": 20, "smoke": True}  # fmt: skip
DIGITS = {"dataset": "digits", "image_size": 8, "num_support_sets": 3}
SETS = {
    "fashion_mnist": {},
    "digits": {"image_size": 8, "latent_size": 32},
    "shapes3d": {"image_size": 64, "latent_size": 226, "num_support_sets": 5, "num_timesteps": 14, "max_iter": 100_000},
    "dsprites": {"image_size": 64, "latent_size": 226, "num_support_sets": 5, "num_timesteps": 12, "max_iter": 100_000},
    "frames": {"image_size": 64, "latent_size": 226, "num_timesteps": 12, "max_iter": 100_000},
    "isaac3d": {"image_size": 128, "num_support_sets": 8, "num_timesteps": 8, "max_iter": 100_000},
}
SETS["sprites"] = SETS["dsprites"]


def resolved(script, *words: str) -> dict:
    values = options.parse(TRAINERS[script], words, "").as_dict()
    call = {
        name for name, field in TRAINERS[script].model_fields.items() if field.json_schema_extra["resume"] == "call"
    }
    return {name: value for name, value in values.items() if name not in call}


@pytest.mark.parametrize("script", TRAINERS, ids=short)
def test_published_values(script):
    assert resolved(script) == COMMON | OWN[script]
    tiny = {name: 8 if name == "width" else 4 for name in ("width", "slab_start") if name in OWN[script]}
    plain = (
        DIGITS if script is not train_falcol_isaac else {"dataset": "sprites", "image_size": 32, "num_support_sets": 5}
    )
    assert resolved(script, "--smoke") == COMMON | OWN[script] | SMOKE | tiny | plain
    for name, values in SETS.items():
        if name not in str(TRAINERS[script].model_fields["dataset"].annotation):
            continue
        flows = {"num_support_sets": 3} if script is train_vae_scratch_unsuper else {}
        assert resolved(script, "--dataset", name) == COMMON | OWN[script] | {"dataset": name} | values | flows, name


def test_help_shows_the_defaults_of_the_script():
    found = run_inside(train_vae_scratch.main, ["--dataset", "shapes3d", "--help"])
    assert found.code == 0 and "--latent_size=226" in found.out and "--num_timesteps=14" in found.out
    assert "--max_iter=6 " in run_inside(train_vae_scratch_weakly.main, ["-h", "--smoke"]).out
    assert "--slab_start=75001" in run_inside(train_vae_scratch_unsuper.main, ["--help"]).out


def test_the_command_line_wins_wherever_smoke_stands():
    given = ["--dataset", "sprites", "--batch-size", "5", "--max-iter", "9", "-K", "2"]
    first, last = resolved(train_vae_scratch, "--smoke", *given), resolved(train_vae_scratch, *given, "--smoke")
    assert first == last
    assert [last[name] for name in ("dataset", "batch_size", "max_iter", "num_support_sets")] == ["sprites", 5, 9, 2]
    with pytest.raises(UserError, match="no folder of frames"):
        train_vae_scratch_weakly.main(["--dataset", "frames", "--data-dir", "nowhere", "--smoke", "--device", "cpu"])


def test_dry_run_prints_and_begins_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = run_inside(train_vae_scratch.main, ["--dry-run", "--latent-size", "32", "--generator_lr", "0.5"])
    assert found.code == 0 and json.loads(found.out)["lr_vae"] == 0.5 and json.loads(found.out)["latent_size"] == 32
    if not torch.cuda.is_available():
        for words in (["--device", "cuda"], ["--cuda"]):
            found = run_inside(train_vae_scratch.main, ["--dry-run", *words])
            assert found.code == 2 and "device=cpu" in found.err
    assert not list(tmp_path.iterdir())


IDLE = [
    (train_vae_scratch, ["--logdet", "exact"], "path-kl marginal"),
    (train_vae_scratch, ["--path-kl", "marginal", "--logdet", "trace", "--logdet-terms", "3"], "logdet trace"),
    (train_vae_scratch, ["--objective", "upstream", "--path-kl", "marginal"], "objective upstream"),
    (train_vae_scratch, ["--dataset", "sprites", "--warp-centre", "exact"], "dataset sprites"),
    (train_vae_scratch_weakly, ["--frame-stride", "2"], "dataset mnist"),
    (train_vae_scratch_weakly, ["--index-labels", "--entropy-weight", "1"], "index-labels"),
    (train_vae_scratch_unsuper, ["--dataset", "frames", "--k-per", "batch"], "dataset frames"),
    (train_vae_scratch_unsuper, ["--objective", "upstream", "--spike-weight", "2"], "objective upstream"),
]


@pytest.mark.parametrize(("script", "argv", "why"), IDLE, ids=lambda value: str(value)[-40:])
def test_options_that_would_do_nothing_are_refused(script, argv, why):
    found = run_inside(script.main, [*argv, "--dry-run"])
    assert found.code == 2 and "does nothing with" in found.err and why in found.err
    assert len(found.err.splitlines()) == 1


def test_every_remedy_exists():
    """Each --word in a message of this folder is an option of one of its scripts."""
    known = {"set", "help", "run", "target"}
    for model in [*MODELS.values()]:
        for name, field in model.model_fields.items():
            spellings = [f"--{name}", *field.json_schema_extra["flags"]]
            known |= {word.lstrip("-").replace("_", "-") for word in spellings}
            known |= {f"no-{word.lstrip('-').replace('_', '-')}" for word in spellings}
    said = set()
    for path in Path(latent_flow.__file__).parent.glob("*.py"):
        tree = ast.parse(path.read_text())
        owners = [node for node in ast.walk(tree) if isinstance(node, (ast.Module, ast.FunctionDef, ast.ClassDef))]
        docs = {id(node.body[0].value) for node in owners if node.body and isinstance(node.body[0], ast.Expr)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs:
                said |= {
                    (path.name, word) for word in re.findall(r"(?<![\w-])--([a-z][a-z0-9_-]*[a-z0-9])", node.value)
                }
    assert len(said) > 20
    assert not {(name, word) for name, word in said if word.replace("_", "-") not in known}


# ---- a resumed run

SMALL = ["--smoke", "--eval-images", "4", "--device", "cpu"]


def test_resume_refuses_by_name_and_writes_nothing(tmp_path):
    out = tmp_path / "run"
    train_vae_scratch.main([*SMALL, "--max-steps", "3", "--out", str(out)])
    before = {path: path.read_bytes() for path in out.iterdir() if path.is_file()}
    changed = {
        "seed": "9", "batch_size": "7", "k_per": "batch", "warp_centre": "exact", "latent_size": "10",
        "path_kl": "marginal", "dataset": "sprites", "amp": "true", "num_timesteps": "6", "deterministic": "true",
    }  # fmt: skip
    for name, value in changed.items():
        found = run_inside(
            train_vae_scratch.main, ["--resume", "--out", str(out), f"--{name}", value, "--device", "cpu"]
        )
        assert found.code == 2 and f"{name} (" in found.err and "other settings" in found.err, (name, found)
    assert {path: path.read_bytes() for path in out.iterdir() if path.is_file()} == before


def test_resume_takes_new_rates_and_says_so(tmp_path):
    out = tmp_path / "run"
    train_vae_scratch.main([*SMALL, "--max-steps", "3", "--out", str(out)])
    words = ["--resume", "--out", str(out), "--lr-vae", "0.5", "--max-iter", "4"]
    found = run_inside(train_vae_scratch.main, words)
    assert found.code == 0 and "changed lr_vae: 0.0001 -> 0.5" in found.err and "changed max_iter: 6 -> 4" in found.err
    state = torch.load(out / "checkpoint.pt", weights_only=True)["state"]
    assert [group["lr"] for group in state["optimizer"]["param_groups"]] == [1e-4, 0.5]
    assert state["args"]["lr_vae"] == json.loads((out / "args.json").read_text())["lr_vae"] == 0.5
    assert state["args"]["batch_size"] == 16  # what the resumed call leaves out stays as it was


def test_resume_auto_starts_and_goes_on(tmp_path):
    out = tmp_path / "run"
    words = [*SMALL, "--resume", "auto", "--out", str(out)]
    train_vae_scratch.main([*words, "--max-steps", "3"])
    train_vae_scratch.main(words)
    assert torch.load(out / "checkpoint.pt", weights_only=True)["state"]["iteration"] == 6
    assert len((out / "metrics.csv").read_text().splitlines()) == 7


def test_resumed_default_of_an_older_run(tmp_path):
    """Runs from before the default objective changed keep the one that they were trained with."""
    out = tmp_path / "run"
    train_vae_scratch.main([*SMALL, "--path-kl", "marginal", "--max-steps", "3", "--out", str(out)])
    train_vae_scratch.main(["--resume", "--out", str(out)])
    state = torch.load(out / "checkpoint.pt", weights_only=True)["state"]
    assert state["iteration"] == 6 and state["config"]["path_kl"] == state["args"]["path_kl"] == "marginal"


def test_two_scripts_have_no_option_of_two_meanings():
    rules = {}
    for (_, one), (_, other) in itertools.combinations(TRAINERS.items(), 2):
        for name in one.model_fields.keys() & other.model_fields.keys():
            rules.setdefault(name, set()).update(
                model.model_fields[name].json_schema_extra["resume"] for model in (one, other)
            )
    assert all(len(found) == 1 for found in rules.values())
