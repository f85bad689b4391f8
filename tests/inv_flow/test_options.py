"""Every option of every script: published values, wrong ones, ones without effect, and what messages advise."""

import ast
import importlib
import json
import re
from pathlib import Path

import pytest
from option_table import judged, option_names, run_inside

from common.errors import UserError
from inv_flow import benchmark, classify_mnist, inv_flow_mnist, timing, toy_2d
from inv_flow.train.config import NEEDS, Config, in_groups, layer_choice, parse

ROOT = Path(__file__).parents[2]
TABLE = json.loads((Path(__file__).parent / "resolved.json").read_text())
SCRIPTS = [path.stem for path in sorted((ROOT / "inv_flow").glob("inv_flow_*.py"))]
SCRIPTS += [f"experiments.{p.stem}" for p in sorted((ROOT / "inv_flow/experiments").glob("*.py")) if p.stem[0] != "_"]
TOOLS = {
    timing: (timing.TimingOptions, ["--sizes", "8", "--block_size", "1"]),
    toy_2d: (toy_2d.ToyOptions, []),
    classify_mnist: (classify_mnist.ClassifierOptions, []),
    benchmark: (benchmark.GlowBenchmarkOptions, []),
}


def module(name):
    return importlib.import_module(f"inv_flow.{name.partition(':')[0]}")


def words(name):
    """--preset of a name of the table."""
    preset = name.partition(":")[2]
    return ["--preset", preset] if preset else []


def resolved(name, *more):
    script = module(name)
    return parse([*words(name), *more], "", script.PRESET, getattr(script, "PRESETS", None))


def test_the_table_names_every_script_and_preset():
    names = {
        f"{name}{preset}"
        for name in SCRIPTS
        for preset in ("", *(f":{preset}" for preset in getattr(module(name), "PRESETS", {})))
    }
    assert names == set(TABLE["scripts"])


@pytest.mark.parametrize("name", TABLE["scripts"])
def test_resolved_values_are_the_published_ones(name):
    expected = TABLE["defaults"] | TABLE["scripts"][name]
    expected["amp"] = expected.pop("autocast")  # as it was called
    values = resolved(name).as_dict()
    assert {key: values[key] for key in expected} == expected
    # what came later changes nothing unless it is asked for
    later = {"num_layers": None, "verbose": False, "tf32": False, "cuda_graph": False, "dry_run": False}
    assert {key: value for key, value in values.items() if key not in expected} == later


# columns of the published files (inf/experiments at its last commit); the rest of a file's keys is its architecture
PUBLISHED = {
    "conv1x1_glow_cifar": (1e-3, 100, 10_000), "conv1x1_glow_imagenet": (1e-3, 64, 10_000),
    "conv1x1_glow_mnist": (1e-3, 100, 10_000), "emerging_cnn_mnist": (1e-5, 100, 10_000),
    "exact_cnn_mnist": (1e-4, 1000, 10_000), "exact_fc_mnist": (1e-4, 100, 10_000),
    "exponential_cnn_mnist": (1e-3, 100, 10_000), "ff_glow_cifar": (1e-5, 100, 10_000),
    "ff_glow_mnist": (1e-5, 100, 10_000), "geco_selfnorm_glow_mnist": (1e-3, 100, 1000),
    "if_cnn_mnist": (1e-5, 100, 100), "if_conv1x1_glow_mnist": (1e-5, 100, 200), "if_exact_cnn_mnist": (1e-5, 100, 100),
    "if_glow_cifar": (1e-4, 140, 10_000), "if_glow_imagenet32": (1e-4, 100, 10_000), "if_glow_mnist": (1e-5, 100, 2000),
    "if_multigpu_imagenet32": (1e-3, 100, 10_000), "selfnorm_cnn_mnist": (1e-3, 100, 10_000),
    "selfnorm_fc_mnist": (1e-4, 100, 10_000), "selfnorm_glow_cifar": (1e-3, 100, 10_000),
    "selfnorm_glow_imagenet": (1e-3, 64, 10_000), "selfnorm_glow_mnist": (1e-3, 100, 10_000),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_learning_rates_batch_sizes_and_epochs_are_the_published_ones(name):
    """The sentence of the README."""
    config = resolved(f"experiments.{name}")
    assert (config.lr, config.batch_size, config.epochs) == PUBLISHED[name]
    # and how many layers the CNN and fully connected models have, in the published key
    layers = {"emerging_cnn_mnist": 9, "exact_cnn_mnist": 9, "exact_fc_mnist": 2, "exponential_cnn_mnist": 9,
              "selfnorm_cnn_mnist": 9, "selfnorm_fc_mnist": 32}.get(name)  # fmt: skip
    if layers:
        assert resolved(f"experiments.{name}", "--num_layers", str(layers)).steps == config.block_size


def test_smoke_runs_each_flow_in_small():
    """Two presets share a smoke flow only where they differ in nothing but their data and training."""
    parts = {}
    for name in TABLE["scripts"]:
        full, small = resolved(name), resolved(name, "--smoke")
        assert small.num_blocks == full.num_blocks and small.tail_bound == full.tail_bound and small.lr == full.lr
        for config, where in ((full, 0), (small, 1)):
            model = config.model_dump(include={name for name in in_groups("model") if name != "levels"})
            parts.setdefault(name, [None, None])[where] = json.dumps(model, sort_keys=True)
    for a in parts:
        for b in parts:
            assert (parts[a][1] == parts[b][1]) == (parts[a][0] == parts[b][0]), (a, b)


# ---- dry runs


@pytest.mark.parametrize("name", TABLE["scripts"])
def test_every_script_has_a_dry_run(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = run_inside(module(name).main, [*words(name), "--dry_run", "--device", "cpu"])
    assert found.code == 0, found.err
    assert json.loads(found.out)["epochs"] == resolved(name).epochs
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("option", [name for name in option_names(Config) if name != "dry_run"])
def test_wrong_values_of_a_training(option, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = ["--smoke", "--device", "cpu", "--dry_run"]
    assert list(judged(inv_flow_mnist.main, argv, lambda value: [f"--{option}={value}"])) == []
    assert not list(tmp_path.iterdir())


TOOL_OPTIONS = [(tool, name) for tool, (model, _) in TOOLS.items() for name in option_names(model) if name != "dry_run"]


@pytest.mark.parametrize(("tool", "option"), TOOL_OPTIONS)
def test_wrong_values_of_the_tools(tool, option, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = [*TOOLS[tool][1], "--dry_run", "--device", "cpu"]
    assert list(judged(tool.main, argv, lambda value: [f"--{option}={value}"])) == []
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("main", [inv_flow_mnist.main, *(tool.main for tool in TOOLS)])
def test_numbers_are_numbers(main):
    model = Config if main is inv_flow_mnist.main else next(m for t, (m, _) in TOOLS.items() if t.main is main)
    numbers = [name for name, field in model.model_fields.items()
               if re.search(r"\b(int|float)\b", str(field.annotation)) and "tuple" not in str(field.annotation)
               and "list" not in str(field.annotation)]  # fmt: skip
    assert len(numbers) >= 5
    for name in numbers:
        for value in ("fast", "nan", "", "1e300"):
            found = run_inside(main, [f"--{name}={value}", "--dry_run", "--device", "cpu"])
            assert found.code == 2 and name in found.err, (name, value, found)


CASES = [
    (("--blok_size", "3"), "did you mean 'block_size'"),
    (("--set", "coupling_wdth=3"), "did you mean 'coupling_width'"),
    (("--set", "lr"), "expected KEY=VALUE"),
    (("--lr", "fast"), "lr=fast: expected a number above 0"),
    (("--epochs", "1.5"), "epochs=1.5: expected a whole number"),
    (("--actnorm", "maybe"), "actnorm=maybe"),
    (("--activation", "SLRR"), "did you mean 'SLR'"),
    (("--layer", "fink"), "did you mean 'finc'"),
    (("--dataset", "celebb"), "did you mean 'celeba'"),
    (("--preset", "64"), "unknown option --preset"),
    (("--multi_gpu",), "torchrun"),
    (("--data_aug",), "data_aug"),
    (("--groups", "3"), "3"),
    (("--image_size", "3,8,8"), "image_size"),
    (("--num_blocks", "4"), "does not squeeze"),
    (("--max_row_sum", "1"), "above 0 and below 1"),
    (("--snf_kernel_size", "2"), "must be odd"),
    (("--scheduler_name", "MultiStep"), "milestones"),
    (("--resume", "--overwrite"), "contradict"),
    (("--num_layers", "4"), "block_size"),
    (("--grad_clip_value", "1"), "use grad_clip"),
]


@pytest.mark.parametrize(("more", "message"), CASES)
def test_bad_options_name_the_thing_and_the_remedy(more, message, tmp_path):
    found = run_inside(inv_flow_mnist.main, ["--smoke", "--device", "cpu", "--out", str(tmp_path / "run"), *more])
    assert found.code == 2 and message in found.err
    assert not (tmp_path / "run/config.json").exists()


@pytest.mark.parametrize("key", Config.DEAD)
def test_dead_keys_are_refused_with_the_reason(key, tmp_path):
    with pytest.raises(UserError, match="published code"):
        inv_flow_mnist.main(["--smoke", "--out", str(tmp_path), f"--{key}", "1"])
    with pytest.raises(UserError, match="published code"):
        Config.build({key: 1})


def test_published_spellings_of_values():
    config = Config.build({"grad_clip_norm": True, "max_eval_ex": float("inf"), "milestones": [2, 4]})
    assert (config.grad_clip_norm, config.max_eval_ex, config.milestones) == (1.0, None, (2, 4))
    assert Config.build({"grad_clip_norm": False}).grad_clip_norm is None  # never "zero all gradients"
    assert Config.build({"autocast": True}).amp and parse(["--autocast"], "", {}).amp
    assert parse(["--preset", "64"], "", {"resolution": 32}, {"64": {"resolution": 64}}).resolution == 64


def test_the_command_line_wins_wherever_it_stands():
    for argv in (["--lr", "0.5", "--smoke", "--layer", "finc"], ["--smoke", "--layer", "finc", "--lr", "0.5"]):
        config = parse([*argv, "--dataset", "mnist", "--num_blocks", "1"], "", inv_flow_mnist.PRESET)
        assert (config.lr, config.dataset, config.num_blocks, config.ff) == (0.5, "mnist", 1, True)


# ---- options without effect

# a flow in which the options do nothing, and a value of each
IDLE = [
    (("--layer", "finc"), {"order": "TL", "groups": "2", "lr_inv_conv": "0.1", "vis_epochs": "2"}),
    (("--layer", "unit"), {"order": "TL"}),
    (("--layer", "emerging"), {"init_std": "0.1"}),
    (("--layer", "glow"), {"max_row_sum": "0.9", "if_kernel_size": "5", "init_std": "0.1", "groups": "2"}),
    ((), {"ff_units": "2", "convexp_maps": "true", "snf_kernel_size": "3", "modified_grad": "false", "milestones": "3",
          "recon_loss_weight": "2", "sym_recon_grad": "true", "only_R_recon": "true",
          "add_recon_grad": "false", "recon_alpha": "0.5", "sample_true_inv": "false",
          "wandb_project": "x", "wandb_entity": "x"}),
    (("--layer", "snf", "--add_recon_grad", "false"), {"recon_loss_weight": "2", "recon_loss_lr": "0.1"}),
    (("--layer", "snf"), {"recon_alpha": "0.5"}),
    (("--activation", "SLR"), {"n_bins": "7", "tail_bound": "9", "individual_weights": "false"}),
    (("--activation", "Identity"), {"last_activation": "false"}),
    (("--num_blocks", "1"), {"split_width": "7", "split_prior": "false"}),
    (("--coupling_width", "0", "--split_prior", "false"), {"coupling": "snf", "amp": "true", "split_width": "9"}),
    (("--scheduler_name", "none"), {"gamma": "0.5", "step_epochs": "7"}),
    (("--scheduler_name", "Exponential"), {"step_epochs": "7"}),
    (("--fc", "--layer", "none"), {}),
    (("--fc",), {"layer": "finc", "coupling_width": "9", "actnorm": "false", "conv1x1": "true", "inv_conv": "false",
                 "order": "TL", "split_width": "9", "first_squeeze": "false", "amp": "true", "snf": "true"}),
    (("--test",), {"dataset": "digits", "data_root": "x", "data_aug": "true"}),
    (("--evaluate",), {"lr": "1", "epochs": "3", "overwrite": "true", "resume": "true", "log_interval": "3",
                       "wandb": "true", "eval_train": "true", "weight_decay": "1"}),
]  # fmt: skip


@pytest.mark.parametrize(("before", "name", "value"), [(b, n, v) for b, idle in IDLE for n, v in idle.items()])
def test_options_without_effect_are_refused(before, name, value):
    found = run_inside(inv_flow_mnist.main, [*before, f"--{name}", value, "--dry_run", "--device", "cpu"])
    assert found.code == 2 and f"--{name} does nothing" in found.err, found


def test_the_cases_of_idle_options_are_complete():
    named = {name for _, idle in IDLE for name in idle}
    of_fc = set(NEEDS[0][0])  # twenty alike; ten are tried
    assert {name for names, _, _ in NEEDS[1:] for name in names} <= named and len(of_fc & named) > 10


def test_repeating_a_default_is_harmless():
    found = run_inside(inv_flow_mnist.main, ["--layer", "finc", "--order", "alternate", "--groups", "1", "--dry_run",
                                             "--device", "cpu"])  # fmt: skip
    assert found.code == 0


@pytest.mark.parametrize(
    ("tool", "argv"),
    [
        (timing, ["--share", "--sizes", "8"]),
        (timing, ["--share", "--table", "10"]),
        (timing, ["--share", "--layers", "finc"]),
        (classify_mnist, ["--no_inverse", "--max_row_sum", "0.5"]),
        (classify_mnist, ["--no_inverse", "--random_taps", "0.1"]),
    ],
)
def test_tools_refuse_options_without_effect(tool, argv):
    assert run_inside(tool.main, [*argv, "--dry_run", "--device", "cpu"]).code == 2


# ---- help and remedies


@pytest.mark.parametrize("name", ["inv_flow_celeba_multi_gpu:128", "experiments.ff_glow_mnist", "inv_flow_mnist"])
def test_help_shows_the_defaults_of_the_script(name, capsys):
    for flag in ("--help", "-h"):
        with pytest.raises(SystemExit):
            module(name).main([*words(name), flag])
        text, config = capsys.readouterr().out, resolved(name)
        for key in ("epochs", "num_blocks", "n_bins", "resolution", "name"):
            assert f"--{key}={getattr(config, key)} " in text, key
        assert "--max_row_sum " in text and "[a number above 0 and below 1 or none]" in text


def texts():
    """(file, text) of every string in a raise statement of this paper, the op's apart."""
    for path in sorted((ROOT / "inv_flow").rglob("*.py")):
        if "inv_conv_cuda" in path.parts:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Raise):
                parts = [part.value for part in ast.walk(node) if isinstance(part, ast.Constant)]
                yield path.name, "".join(part for part in parts if isinstance(part, str))


def test_remedies_exist():
    known = {"layer", "preset", "set", "standalone", "nproc_per_node", "help"} | set(option_names(Config))
    for model, _ in TOOLS.values():
        known |= set(option_names(model))
    own, seen = {"alpha", "scale", "minimum", "kernel_size", "split", "beta"}, set()  # arguments of layers
    for where, text in texts():
        for name in re.findall(r"--([A-Za-z]\w+)|\b([a-z]\w*)=", text):
            seen.add(name[0] or name[1])
            assert seen <= known | own, (where, text)
    assert {"nproc_per_node", "n_bins", "image_size"} <= seen
    for names, _, needed in NEEDS:
        assert set(re.findall(r"\b[a-z]+_[a-z_]+\b", needed)) <= known, names


def test_layer_choice_names_one_layer_each():
    choices = {name: layer_choice(name) for name in ("inverse", "finc", "unit", "emerging", "convexp", "snf")}
    assert len({json.dumps(choice) for choice in choices.values()}) == 6
    assert all(sum(choice.values()) == 1 for choice in choices.values())
