"""Every documented command and every shipped script names options that exist."""

import os
import shlex
import subprocess
from pathlib import Path

import pytest
from PIL import Image

from nfpi import benchmark, convert_checkpoint, extract_dataset, main, synthetic_2d
from nfpi.config import config_place, plain_argv, resolve

REPOSITORY = Path(main.__file__).resolve().parents[1]
SCRIPTS = sorted(REPOSITORY.glob("scripts/nfpi_*.sh"))
COMMAND = "nfpi/main.py"


def check(arguments):
    """Compose the configuration of a command line of main.py, as main does before it starts."""
    rest = plain_argv(arguments)
    path, rest = main._flag(rest, "--config-path", "-cp")
    name, rest = main._flag(rest, "--config-name", "-cn")
    multirun = "--multirun" in rest
    overrides = [a for a in rest if not a.startswith("-")]
    if multirun:
        overrides = [a.split(",")[0] if "[" not in a else a for a in overrides]
    return resolve(*config_place(path, name), overrides)


def documented():
    """The commands with main.py in the README and in the modules' docstrings."""
    texts = [m.__doc__ for m in (main, convert_checkpoint, synthetic_2d, benchmark, extract_dataset)]
    texts.append((REPOSITORY / "nfpi/README.md").read_text())
    lines = "\n".join(texts).replace("\\\n", " ").splitlines()
    found = [line.split(COMMAND, 1)[1].split("  #")[0] for line in lines if f"{COMMAND} --config" in line]
    return sorted({" ".join(line.replace("`", " ").split()) for line in found})


@pytest.mark.parametrize("command", documented())
def test_documented_commands_compose(command, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for i in range(120 if "MYIMAGES" in command else 0):
        path = tmp_path / "MYIMAGES" / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (16, 16)).save(path)
    check(shlex.split(command))


@pytest.mark.parametrize("script", SCRIPTS, ids=[s.name for s in SCRIPTS])
def test_scripts_compose(script):
    environment = {**os.environ, "PYTHON": "echo", "WEIGHTS": "flow.safetensors"}
    done = subprocess.run(["bash", str(script)], env=environment, capture_output=True, text=True, check=True)
    program, *arguments = done.stdout.split()
    assert Path(program).is_file()
    if program.endswith(COMMAND):
        check(arguments)
    assert os.access(script, os.X_OK)


def test_there_is_a_script_for_every_published_configuration():
    every = (REPOSITORY / "nfpi/___configs").glob("*/*.yaml")
    shipped = [p for p in every if p.parent.name not in ("level_method", "folder")]  # folder: one's own images
    text = "\n".join(s.read_text() for s in SCRIPTS)
    for path in shipped:
        assert f"--config-path=___configs/{path.parent.name} --config-name={path.stem}" in text, path
