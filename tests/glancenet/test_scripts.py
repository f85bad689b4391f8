"""The shell scripts: each is run from another folder, and the command line it makes is parsed by the real parser."""

import ast
import itertools
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from common.options import from_flags
from glancenet import compare, leakage, mnist_parity
from glancenet.options import Config, parse

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts"
TRAINING = {
    "glancenet_dsprites.sh": {"alg": "GlanceNet", "dset_name": "dsprites_full", "z_dim": 7, "label_weight": 100,
    "max_iter": 250000,
                              "conditional_prior": True, "classification_epoch": 20, "latent_loss": "MSE",
                              "batch_size": 64},
    "cbnm_dsprites.sh": {"alg": "CBNM", "z_dim": 7, "label_weight": 100, "max_iter": 250000, "evaluation_metric":
    ["dci"]}, "glancenet_mpi3d.sh": {"alg": "GlanceNet", "dset_name": "mpi3d_toy", "z_dim": 21, "label_weight": 1000,
    "latent_weight": 7000,
                           "n_classes": 10, "lr_G": 0.001, "max_epoch": 30, "lr_scheduler_args": ["gamma=0.99"]},
    "cbnm_mpi3d.sh": {"alg": "CBNM", "label_weight": 1, "latent_weight": 2, "max_epoch": 15, "lr_scheduler_args":
    ["gamma=0.75"]},
    "glancenet_celeba.sh": {"alg": "GlanceNet", "dset_name": "celebA", "encoder": ["EncConv64"], "w_recon": 0.01,
    "z_dim": 10,
                            "n_classes": 4, "max_epoch": 70, "latent_weight": 7000},
    "cbnm_celeba.sh": {"alg": "CBNM", "z_dim": 64, "max_epoch": 30, "lr_scheduler_args": ["gamma=0.8"]},
}  # fmt: skip


def words_of(script: str, folder: Path, *more: str, **environment: str) -> list[str]:
    """Run a script in `folder` with an interpreter that only writes down its arguments."""
    fake = folder / "python"
    fake.write_text(f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]))\n")
    fake.chmod(0o755)
    env = {"PATH": os.environ["PATH"], "PYTHON": str(fake), "DATA_ROOT": str(folder), **environment}
    done = subprocess.run(["bash", str(SCRIPTS / script), *more], cwd=folder, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.mark.parametrize("script", TRAINING)
def test_training_scripts(tmp_path, script):
    words = words_of(script, tmp_path, "--num_workers", "0", SEED="5", MASKING_FACT="25")
    assert Path(words[0]) == ROOT / "glancenet" / "main.py"
    o = parse(words[1:])
    assert {key: getattr(o, key) for key in TRAINING[script]} == TRAINING[script]
    assert (o.seed, o.masking_fact, o.dset_dir, o.num_workers) == (5, 25, str(tmp_path), 0)
    assert parse(words_of(script, tmp_path, MAX_ITER="7")[1:]).max_iter == 7
    plain = parse(words_of(script, tmp_path)[1:])
    assert (plain.seed, plain.masking_fact) == (883, 1)


def test_position_leakage_script(tmp_path):
    words = words_of("leakage_dsprites.sh", tmp_path, SEED="3 4", MAX_ITER="9")
    split = words.index("--")
    o = from_flags(leakage.Config, words[1:split])[0]
    assert o.models == ["cbnm", "vae", "glancenet"] and o.seeds == [3, 4] and o.dset_dir == str(tmp_path)
    one = words_of("leakage_dsprites.sh", tmp_path, "glancenet", "--max_epoch", "2")
    assert from_flags(leakage.Config, one[1 : one.index("--")])[0].models == ["glancenet"]
    for key, flags in leakage.MODELS.items():
        options = parse([*flags, "--dset_dir", str(tmp_path), *words[split + 1 :]])
        assert (options.label_weight, options.latent_weight, options.lr_G, options.max_iter) == (0, 250, 0.0004, 9)
        assert options.conditional_prior == (key == "glancenet")
    assert parse([*leakage.MODELS["glancenet"], "--dset_dir", "."]).max_epoch == 350


def test_parity_script(tmp_path):
    words = words_of("glancenet_mnist_parity.sh", tmp_path, "--models", "vae", MAX_ITER="11")
    o = from_flags(mnist_parity.Config, words[1:])[0]
    assert (o.seeds, o.models, o.max_iter, o.data_root, o.epochs) == ([0, 1, 2], ["vae"], 11, str(tmp_path), None)


def test_comparison_script(tmp_path):
    words = words_of("glancenet_fair.sh", tmp_path, SEED="0 1", MAX_ITER="12", DATASET_NAME="sprites")
    split = words.index("--")
    o = from_flags(compare.Config, words[1:split])[0]
    assert o.supervision == [1, 10, 100] and o.seeds == [0, 1] and o.dset_name == "sprites"
    assert words[split + 1 :] == ["--max_iter", "12"]


def test_scripts_forward_a_real_error(tmp_path):
    """With the real interpreter: absent data are one line and exit code 2."""
    env = {**os.environ, "PYTHON": sys.executable, "DATA_ROOT": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        ["bash", str(SCRIPTS / "cbnm_mpi3d.sh")], cwd=tmp_path, env=env, capture_output=True, text=True
    )
    assert done.returncode == 2 and "prepare_mpi3d.py" in done.stderr and done.stderr.count("\n") == 1


def test_readme_names_what_exists():
    """Every script, module and flag that the README names is there, and its example is a valid command."""
    text = (ROOT / "glancenet" / "README.md").read_text()
    named = set(re.findall(r"`(?:bash scripts/)?((?:glancenet|cbnm|leakage)_\w+\.sh)", text))
    assert named == {
        path.name for path in SCRIPTS.glob("*.sh") if path.name.startswith(("glancenet_", "cbnm_", "leakage_"))
    }
    for module in set(re.findall(r"python (glancenet/\w+\.py)", text)):
        assert (ROOT / module).is_file(), module
    known = {f"--{name}" for name in Config.model_fields}
    section = text[text.index("New flags:") : text.index("`--deterministic`")]
    assert set(re.findall(r"--\w+", section)) <= known
    example = text[text.index("    python glancenet/main.py") :].split("\n\n")[0]
    o = parse(shlex.split(example.replace("\\\n", " "))[2:])
    assert o.dset_name == "sprites" and o.conditional_prior
    for picture in re.findall(r"\]\((pictures/[^)]+)\)", text):
        assert (ROOT / "glancenet" / picture).is_file(), picture


COMMANDS = [path for path in sorted((ROOT / "glancenet").glob("*.py")) if "run_command(main)" in path.read_text()]
HIDDEN = """
import runpy, sys
sys.meta_path = [finder for finder in sys.meta_path if "editable" not in repr(finder).lower()]
sys.path = [{folder!r}, *(place for place in sys.path if place not in ("", {root!r}))]
sys.argv = [{name!r}, "--help"]
runpy.run_path({name!r}, run_name="__main__")
"""


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.stem)
def test_commands_find_the_repository_and_heed_signals_before_heavy_imports(path):
    body = [node for node in ast.parse(path.read_text()).body if not isinstance(node, ast.Expr)]
    early = list(itertools.takewhile(lambda node: isinstance(node, (ast.Import, ast.ImportFrom)), body))
    assert {ast.unparse(node) for node in early} == {"import sys", "from pathlib import Path"}, path.name
    guard = body[len(early)]
    assert isinstance(guard, ast.If) and "import common.start" in ast.unparse(guard)
    assert ast.unparse(body[-1].body[0]) == "sys.exit(run_command(main))"


@pytest.mark.parametrize("name", ["main.py", "mnist_parity.py"])
def test_commands_start_from_their_own_folder_without_an_installation(name):
    folder = str(ROOT / "glancenet")
    code = HIDDEN.format(folder=folder, root=str(ROOT), name=name)
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "--seed" in done.stdout


def test_a_signal_during_the_start_ends_with_130(tmp_path):
    words = [sys.executable, "-X", "importtime", str(ROOT / "glancenet" / "main.py"), "--help"]
    child = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in child.stderr:
        if "common.start" in line:
            break
    child.terminate()
    _, rest = child.communicate(timeout=120)
    assert child.returncode == 130 and "interrupted" in rest and "Traceback" not in rest
