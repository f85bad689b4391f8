"""scripts/setup.sh: what each option would install, word for word; an environment keeps its options."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CPU_INDEX = "https://download.pytorch.org/whl/cpu"
PIP = ["-m", "pip", "install", "--quiet", "--disable-pip-version-check"]


@pytest.fixture
def setup(tmp_path):
    """setup(*words, **programs): the commands of a dry run; `programs` are stand-ins on PATH (name: bash text)."""
    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("bash", "cat", "cksum", "dirname", "find", "grep", "pwd", "sed", "sort", "tail", "uname", "c++"):
        where = subprocess.run(["bash", "-c", f"command -v {name}"], capture_output=True, text=True).stdout.strip()
        if where.startswith("/"):
            (tools / name).symlink_to(where)

    def run(*words, rc=0, **programs):
        for name, text in programs.items():
            (tools / name).unlink(missing_ok=True)
            (tools / name).write_text(f"#!/bin/bash\n{text}\n")
            (tools / name).chmod(0o755)
        env = {**os.environ, "PATH": str(tools), "PYTHON": sys.executable, "VENV": str(tmp_path / "v")}
        done = subprocess.run(["bash", ROOT / "scripts" / "setup.sh", *words], env=env, capture_output=True, text=True)
        assert done.returncode == rc, done.stderr
        lines = [line for line in done.stdout.splitlines() if not line.startswith(("setup:", "("))]
        return [shlex.split(line) for line in lines if "--dry-run" in words], done

    run.folder = tmp_path
    return run


def test_the_ordinary_installation(setup):
    python = str(setup.folder / "v/bin/python")
    made, upgraded, installed = setup("--dry-run")[0]
    assert made == [sys.executable, "-m", "venv", str(setup.folder / "v")]
    assert upgraded == [python, *PIP, "--upgrade", "pip", "setuptools", "wheel"]
    assert installed == [python, *PIP, "-r", "requirements.txt"]
    assert not (setup.folder / "v").exists()


def test_cpu_takes_torch_from_its_own_index_first(setup):
    torch = ["torch>=2.11", "torchvision>=0.26", "--index-url", CPU_INDEX]
    commands, done = setup("--cpu", "--dry-run", uname='case "$1" in -s) echo Linux ;; -m) echo x86_64 ;; esac')
    assert commands[1] == [str(setup.folder / "v/bin/python"), *PIP, *torch]
    assert len(commands) == 4
    assert "200 MB" in done.stdout
    for system in ('case "$1" in -s) echo Darwin ;; -m) echo arm64 ;; esac',
                   'case "$1" in -s) echo Linux ;; -m) echo aarch64 ;; esac'):  # fmt: skip
        commands, done = setup("--cpu", "--dry-run", uname=system)
        assert CPU_INDEX not in done.stdout
        assert len(commands) == 3


def test_light_leaves_out_tensorflow_alone(setup):
    whole = (ROOT / "requirements.txt").read_text()
    assert "tensorflow" in whole
    words = setup("--light", "--dry-run")[0][-1][len(PIP) + 1 :]
    wanted = [line for line in whole.splitlines() if line and not line.startswith(("#", "tensorflow"))]
    assert words == shlex.split(" ".join(line.replace(">", "'>'") for line in wanted))


def test_uv_is_used_where_it_is(setup):
    made, _, installed = setup("--dry-run", uv="exit 9")[0]
    assert made == ["uv", "venv", "--quiet", "--python", sys.executable, str(setup.folder / "v")]
    assert installed[:6] == ["uv", "pip", "install", "--quiet", "--python", str(setup.folder / "v/bin/python")]


def test_an_environment_keeps_its_options(setup):
    (setup.folder / "v").mkdir()
    (setup.folder / "v/.setup-stamp").write_text("1 2\nPython\n/x\n0\noptions: cpu light")
    done = setup("--dry-run")[1]
    assert "tensorflow" not in done.stdout.lower().replace("without tensorflow", "")
    (setup.folder / "v/.setup-stamp").write_text("1 2\nPython\n/cpu/light\n0")  # made before there were options
    assert CPU_INDEX not in setup("--dry-run")[1].stdout


def test_wrong_words_are_refused_and_help_does_nothing(setup):
    assert "unknown option --gpu" in setup("--gpu", rc=2)[1].stderr
    assert "--light" in setup("--help")[1].stdout
    assert not (setup.folder / "v").exists()


def test_the_library_needs_no_requirements_file():
    """`pip install -e .` alone brings what the packages import."""
    import ast
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    names = {requirement.split(">")[0].split("[")[0].lower() for requirement in project["dependencies"]}
    comes_with = {
        "sklearn": "scikit-learn", "joblib": "scikit-learn", "threadpoolctl": "scikit-learn", "hydra": "hydra-core",
        "omegaconf": "hydra-core", "yaml": "hydra-core", "PIL": "torchvision", "annotated_types": "pydantic",
        "pydantic_core": "pydantic",
    }  # fmt: skip
    optional = {"tensorflow", "wandb"}  # asked for where they are used, with a line that says what to install
    own = {"common", "lbae", "glancenet", "latent_flow", "inv_flow", "nfpi"}
    for folder in own:
        for path in (ROOT / folder).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                found = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
                found += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
                for name in {name.split(".")[0] for name in found} - own - optional - set(sys.stdlib_module_names):
                    if name != "setuptools":  # of the op's own setup.py
                        assert comes_with.get(name, name).lower() in names, (path, name)
