"""The manifests in sweeps/: what is wrong with one is one line; the shipped ones fit their scripts. 15 CPU s."""

import json
import os
import shlex
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest

from common.errors import UserError
from scripts import experiments

ROOT = Path(__file__).resolve().parents[2]


def write(folder: Path, text: str) -> Path:
    path = folder / "nfpi" / "table.yaml"
    path.parent.mkdir(exist_ok=True)
    path.write_text(text)
    return path


GOOD = """
about: one line
grid: {model: {big: --width 64 --deep, small: ""}, p: [0.5, 1e-3]}
exclude: [{model: small, p: 0.5}]
train: python train.py {model} --p={p} --name 'a b {p}' --out {out} '${val.x}'
final: weights
evaluate: |
  python a.py {out}
  python b.py {out}
result: r.json
"""


def test_grid_words_exclusions_and_several_commands(tmp_path):
    table = experiments.read_table(write(tmp_path, GOOD))
    assert list(table.experiments) == ["big_0.5", "big_1e-3", "small_1e-3"]
    train, evaluate = table.steps
    assert table.commands("big_1e-3", train) == [[
        "python", "train.py", "--width", "64", "--deep", "--p=1e-3", "--name", "a b 1e-3", "--out",
        "runs/nfpi/table/big_1e-3", "${val.x}",
    ]]  # fmt: skip
    assert table.commands("small_1e-3", train)[0][2] == "--p=1e-3"  # an empty value adds no word
    assert [words[1] for words in table.commands("big_0.5", evaluate)] == ["a.py", "b.py"]
    assert len({table.digest(name, train) for name in table.experiments}) == 3
    assert table.fill(evaluate.makes[0], "big_0.5") == "runs/nfpi/table/big_0.5/r.json"


def test_several_processes_start_under_torchrun(tmp_path):
    table = experiments.read_table(write(tmp_path, GOOD + "processes: 4\ngpus: 4\n"))
    words = table.commands("big_0.5", table.steps[0])[0]
    assert words[:4] == ["torchrun", "--standalone", "--nproc_per_node=4", "train.py"]
    assert table.commands("big_0.5", table.steps[1])[0][0] == "python"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("train:", "trein:", "unknown key 'trein' (did you mean 'train'?)"),
        ("about: one line", "", "key 'about' is missing"),
        ("p: [0.5, 1e-3]", "p: [0.5, true]", "grid p is [0.5, true], not a list of values, each once"),
        ("p: [0.5, 1e-3]", "p: [0.5, 0.5]", "grid p is [0.5, 0.5], not a list of values, each once"),
        ("p: [0.5, 1e-3]", "p: []", "grid p is []"),
        ("p: [0.5, 1e-3]", "p: [a/b, a:b]", "exclude: the grid has no p: 0.5"),
        ("--p={p}", "--p={q}", "nothing is called {q}"),
        ("'a b {p}'", "'a b {p}", "No closing quotation"),
        ("exclude: [{model: small, p: 0.5}]", "exclude: [{z: 1}]", "exclude: the grid has no z: 1"),
        ("exclude: [{model: small, p: 0.5}]", "exclude: [{model: small}, {model: big}]", "leaves no experiment"),
        ("final: weights", "final: 7", "final is 7, not "),
        ("final: weights", "final: weights\ngpus: -1", "gpus is -1, not a whole number"),
        ("about: one line", "about: one line\nabout: two", "the key 'about' stands twice"),
        ("about: one line", "about: [", "while parsing"),
        ("final: weights\n", "", "'final' is a dependency of 'train'"),
    ],
)
def test_a_bad_manifest_is_one_line(tmp_path, old, new, message):
    assert old in GOOD
    with pytest.raises(UserError) as caught:
        experiments.read_table(write(tmp_path, GOOD.replace(old, new)))
    assert message in str(caught.value) and "table.yaml" in str(caught.value)


@pytest.mark.parametrize("text", ["", "[1]", "about: \x00", "grid: 1\nabout: a"])
def test_a_damaged_manifest_is_a_user_error(tmp_path, text):
    with pytest.raises(UserError):
        experiments.read_table(write(tmp_path, text))
    with pytest.raises(UserError, match=r"none\.yaml"):
        experiments.read_table(tmp_path / "none.yaml")


# ------------------------------------------------------------------------------------------------ shipped manifests


class Reached(BaseException):
    """A script's parser accepted the command; carries the resolved options."""


def options_of(words: list[str], folder: Path, monkeypatch) -> dict:
    """What the script of a command makes of its flags: its own parser is run, its training is not."""

    def reached(options, *_, **__):
        raise Reached(options)

    assert words[0] == "python"
    script = (ROOT / words[1]).relative_to(ROOT) if Path(words[1]).is_absolute() else Path(words[1])
    assert (ROOT / script).is_file(), script
    monkeypatch.chdir(folder)
    (folder / "data").mkdir(exist_ok=True)
    paper = script.parts[0]
    if paper == "glancenet":
        from glancenet import main as module

        monkeypatch.setattr(module, "train", reached)
        run = module.main
    elif paper == "latent_flow":
        import latent_flow.train

        monkeypatch.setattr(latent_flow.train, "train", reached)
        run = __import__(f"latent_flow.{script.stem}", fromlist=["main"]).main
    elif paper == "inv_flow":
        from inv_flow.train import launch

        monkeypatch.setattr(launch, "build", reached)
        run = __import__(f"inv_flow.{script.stem}", fromlist=["main"]).main
    elif paper == "lbae":
        from lbae import command

        monkeypatch.setattr(command, "train", reached)
        run = __import__(f"lbae.{script.stem}", fromlist=["main"]).main
    else:
        from nfpi import main as module

        monkeypatch.setattr(module, "experiment", reached)
        monkeypatch.setattr(module, "resumed_state", lambda config: None)
        run = module.main
    with pytest.raises(Reached) as caught:
        run(words[2:])
    options = caught.value.args[0]
    if paper == "nfpi":
        return options.as_dict()
    return dict(vars(options)) if hasattr(options, "__dict__") else dict(options)


TABLES = {f"{table.paper}/{table.name}": table for table in experiments.read_tables()}
SPECIAL = {
    "glancenet/claims",
    "glancenet/precision",
    "glancenet/parity",
    "glancenet/leakage",
    "inv_flow/timing",
    "inv_flow/claims",
    "inv_flow/op",
    "inv_flow/sampling",
    "nfpi/planar",
}  # tests/front/test_readme.py reads such commands


@pytest.mark.parametrize("name", [name for name in TABLES if not name.startswith("quickstart") and name not in SPECIAL])
def test_shipped_manifests_fit_their_scripts(name, tmp_path, monkeypatch):
    table = TABLES[name]
    firsts: dict[str, str] = {}
    for experiment, values in table.experiments.items():  # one of each setting
        firsts.setdefault(str({k: v for k, v in values.items() if k not in ("seed", "supervision")}), experiment)
    settings = list(firsts.values())[: 2 if name.startswith("nfpi") else None]  # hydra is slow
    for experiment in settings:
        words, values = table.commands(experiment, table.steps[0])[0], table.experiments[experiment]
        if words[0] == "env":
            assert (ROOT / words[3]).is_file() and words[-2:] == ["--resume", "auto"]
            words = words_of_script(Path(words[3]).name, words[4:], SEED=values["seed"])
        options = options_of(words, tmp_path, monkeypatch)
        assert str(options["seed"]) == values["seed"] and options["resume"] == "auto"
        if "supervision" in values:
            assert float(options["masking_fact"]) == float(values["supervision"])


@pytest.mark.parametrize("name", ["glancenet/claims", "glancenet/precision"])
def test_the_grids_of_comparisons_hold_both_models(name, capsys):
    from glancenet import compare

    table = TABLES[name]
    for experiment, values in table.experiments.items():
        words = table.commands(experiment, table.steps[0])[0]
        compare.main(["--dry_run", *words[2:]])
        found = json.loads(capsys.readouterr().out)
        assert (found["settings"], found["models"]) == ([values.get("setting", "fair_7")], ["GlanceNet", "CBNM"])
        assert found["supervision"] == [float(values.get("supervision", 100))]
        assert found["seeds"] == [int(values["seed"])]
        if "precision" in values:
            assert found["overrides"][-2:] == ["--amp", str(values["precision"] == "amp").lower()]
        assert found["out"] == table.out(experiment) and "PadlessGaussianConv64" in found["overrides"]


def test_the_classifier_of_the_claims_is_trained_as_its_manifest_says(capsys):
    from inv_flow import classify_mnist

    table, found = TABLES["inv_flow/claims"], {}
    for experiment, values in table.experiments.items():
        words = table.commands(experiment, table.steps[0])[0]
        classify_mnist.main([*words[2:], "--dry_run"])
        found[values["model"]] = json.loads(capsys.readouterr().out)
        assert found[values["model"]]["seed"] == int(values["seed"])
        assert table.out(experiment) == found[values["model"]]["out"] == f"results/runs/inv_flow/claims/{experiment}"
    learned, control, linear = (found[name] for name in ("learned", "random", "linear"))
    differing = {key for key in learned if learned[key] != control[key]} - {"out"}
    assert differing == {"random_taps"} and learned["padding"] == 10 and learned["max_row_sum"] is None
    assert linear["random_taps"] == 0 and linear["epochs"] == learned["epochs"]


def test_the_timings_of_the_claims_are_what_their_manifests_say(capsys):
    from inv_flow import timing
    from inv_flow.utils.inv_conv_cuda import benchmark

    for experiment in TABLES["inv_flow/sampling"].experiments:
        timing.main(
            [
                *TABLES["inv_flow/sampling"].commands(experiment, TABLES["inv_flow/sampling"].steps[0])[0][2:],
                "--dry_run",
            ]
        )
        found = json.loads(capsys.readouterr().out)
        assert (found["sizes"], found["coupling_width"], found["block_size"], found["channels"]) == ([28], 512, 16, 1)
        assert found["out"] == f"results/runs/inv_flow/sampling/{experiment}"
    with pytest.raises(SystemExit):
        benchmark.main(["--help"])
    known = capsys.readouterr().out
    table = TABLES["inv_flow/op"]
    for experiment in table.experiments:
        words = table.commands(experiment, table.steps[0])[0]
        assert words[:3] == ["python", "-m", benchmark.__name__]
        assert all(word in known for word in words if word.startswith("--"))
        assert words[words.index("--threads") + 1] == experiment


def words_of_script(script: str, more: Sequence[str] = (), **environment: str) -> list[str]:
    """The command that a script would run (`echo` in the place of Python)."""
    env = {**os.environ, "PYTHON": "echo", "DATA_ROOT": "data", **environment}
    text = subprocess.run(
        ["bash", f"scripts/{script}", *more], cwd=ROOT, env=env, capture_output=True, text=True, check=True
    )
    return ["python", *shlex.split(text.stdout)]


SAME_SETTINGS = {
    "glancenet_dsprites.sh": (
        "glancenet/dsprites",
        {"model": "GlanceNet", "setting": "published", "supervision": "10"},
    ),
    "cbnm_dsprites.sh": ("glancenet/dsprites", {"model": "CBNM", "setting": "published", "supervision": "10"}),
    "glancenet_mpi3d.sh": ("glancenet/mpi3d", {"model": "GlanceNet", "supervision": "10"}),
    "cbnm_mpi3d.sh": ("glancenet/mpi3d", {"model": "CBNM", "supervision": "10"}),
    "glancenet_celeba.sh": ("glancenet/celeba", {"model": "GlanceNet", "supervision": "10"}),
    "cbnm_celeba.sh": ("glancenet/celeba", {"model": "CBNM", "supervision": "10"}),
    "latent_flow_mnist.sh": ("latent_flow/mnist", {"variant": "supervised"}),
    "latent_flow_mnist_weakly.sh": ("latent_flow/mnist", {"variant": "weakly"}),
    "latent_flow_mnist_unsuper_double_control.sh": ("latent_flow/mnist", {"variant": "unsuper_double"}),
    "latent_flow_mnist_unsuper_single_control.sh": ("latent_flow/mnist", {"variant": "unsuper_single"}),
    "nfpi_cifar10_glem.sh": ("nfpi/cifar10", {"method": "glem"}),
}
PLACES = {"name", "dset_dir", "data_dir", "out", "out_path", "log_dir", "ckpt_dir", "train_output_dir", "traverse_z"}
PLACES |= {"extra", "pickle_data_path", "data_path", "resume"}


@pytest.mark.parametrize("script", SAME_SETTINGS)
def test_manifests_have_the_settings_of_the_scripts(script, tmp_path, monkeypatch):
    name, values = SAME_SETTINGS[script]
    table = TABLES[name]
    experiment = next(one for one, known in table.experiments.items() if values.items() <= known.items())
    seed = table.experiments[experiment]["seed"]
    more = words_of_script(script, SEED=seed, MASKING_FACT=values.get("supervision", "100"))
    mine = options_of(table.commands(experiment, table.steps[0])[0], tmp_path, monkeypatch)
    theirs = options_of(more, tmp_path, monkeypatch)
    differing = {key for key in mine if mine[key] != theirs[key]} - PLACES
    assert not {key: (mine[key], theirs[key]) for key in differing if key != "seed"}
    if not script.startswith("nfpi"):  # those scripts take the seed as an override
        assert mine["seed"] == theirs["seed"]
