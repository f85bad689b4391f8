"""scripts/sweep.py: one manifest, independent jobs, resumable, shared.

Half a quiet minute, most of it imports and hydra: the jobs are tiny commands.
"""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from common.errors import UserError
from scripts import sweep

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "scripts" / "sweep.py"
APPEND = "import sys; open('ran.txt', 'a').write(sys.argv[1] + chr(10))"


def write(folder: Path, manifest: dict, name: str = "table.json") -> Path:
    path = folder / name
    path.write_text(json.dumps(manifest))
    return path


def manifest(code: str = APPEND, words: str = "{a}-{b}", **changes) -> dict:
    """Jobs a=1,b=x; a=1,b=y; a=2,b=x; a=2,b=y that run `python -c code words`."""
    base = {
        "command": f"python -c {shlex.quote(code)} {words}",
        "grid": {"a": [1, 2], "b": ["x", "y"]},
        "out": "runs/{a}_{b}",
    }
    return {**base, **changes}


def call(path: Path, *argv: str) -> int:
    """The exit code of the command in `path`'s folder."""
    try:
        sweep.main([str(path), "--folder", str(path.parent), *argv])
    except SystemExit as end:
        return end.code
    return 0


def spawn(path: Path, *argv: str, **env: str) -> subprocess.Popen:
    words = [sys.executable, str(SCRIPT), str(path), "--folder", str(path.parent), *argv]
    env = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    return subprocess.Popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def ran(folder: Path) -> list[str]:
    path = folder / "ran.txt"
    return path.read_text().split() if path.exists() else []


def marker(folder: Path, job: str) -> dict:
    return json.loads((folder / "runs/sweeps/table" / f"{job}.json").read_text())


def wait_for(condition, seconds: float = 30.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the other process did not get there"
        time.sleep(0.02)


# -------------------------------------------------------------------------------------------------------- manifests


def test_grid_words_and_exclusions(tmp_path):
    path = tmp_path / "m.yaml"
    path.write_text(
        "command: python train.py {model} --p={p} --name 'a b {p}' --out {out} '${val.x}'\n"
        "grid:\n  model: {big: --width 64 --deep, small: ''}\n  p: [0.5, 1e-3]\n"
        "exclude: [{model: small, p: 0.5}]\n"
        "out: runs/{model}_{p}\n"
    )
    jobs = sweep.read_manifest(path)
    assert [job.name for job in jobs] == ["model=big,p=0.5", "model=big,p=1e-3", "model=small,p=1e-3"]
    assert jobs[1].words == [
        "python", "train.py", "--width", "64", "--deep", "--p=1e-3", "--name", "a b 1e-3", "--out", "runs/big_1e-3",
        "${val.x}",
    ]  # fmt: skip
    assert jobs[2].words[2] == "--p=1e-3"  # an empty value adds no word
    assert [job.index for job in jobs] == [0, 1, 2] and len({job.digest for job in jobs}) == 3


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"comand": "x"}, "unknown key 'comand' (did you mean 'command'?)"),
        ({"grid": {}}, "grid is a mapping"),
        ({"grid": {"a": [1, 2], "b": ["x"], "c": [1]}}, "does not use the grid's 'c'"),
        ({"grid": {"a": [1], "b": [True]}}, "in quotes"),
        ({"grid": {"a": [1, 1], "b": ["x"]}}, "a value stands twice"),
        ({"grid": {"a": [1], "b": [[2]]}}, "no text or number"),
        ({"grid": {"a": [1], "b": {"x": "'"}}}, "No closing quotation"),
        ({"out": "runs/{a}"}, "two jobs write to runs/1"),
        ({"out": "runs/{a}_{bb}"}, "nothing is called {bb} (did you mean 'b'?)"),
        ({"command": "python {a} {b} {seed}"}, "nothing is called {seed}"),
        ({"command": 7}, "command is 7"),
        ({"exclude": [{"z": 1}]}, "the grid has no 'z'"),
        ({"exclude": [{"b": "z"}]}, "b is never 'z'"),
        ({"exclude": [{"b": "x"}, {"b": "y"}]}, "leaves no job"),
        ({"resume": "--resume"}, "resume is {if"),
        ({"env": ["A"]}, "env is a mapping"),
    ],
)
def test_bad_manifest_is_one_line(tmp_path, change, message):
    with pytest.raises(UserError) as caught:
        sweep.read_manifest(write(tmp_path, manifest(**change)))
    assert message in str(caught.value) and "table.json" in str(caught.value)


@pytest.mark.parametrize(
    "text", ["", "[1]", "command: [", "a: 1\na: 2", "command: \x00", "grid: 1\nout: a\ncommand: b"]
)
def test_damaged_manifest_is_a_user_error(tmp_path, text):
    path = tmp_path / "m.yaml"
    path.write_text(text)
    with pytest.raises(UserError):
        sweep.read_manifest(path)


def test_missing_manifest_and_bad_options_exit_with_2(tmp_path):
    child = spawn(tmp_path / "none.yaml")
    text = child.communicate(timeout=60)[0]
    assert child.returncode == 2 and text.startswith("error: ") and text.count("\n") == 1
    path = write(tmp_path, manifest())
    for argv in (["--jobs", "0"], ["--index", "4"], ["--index", "-1"], ["--only", "c=1"], ["--only", "a=3"], ["--lst"]):
        with pytest.raises(UserError):
            call(path, *argv)
    assert ran(tmp_path) == []


# ------------------------------------------------------------------------------------------------------------- runs


def test_runs_everything_once_and_remembers(tmp_path, capsys):
    path = write(tmp_path, manifest())
    assert call(path, "--list") == 0
    text = capsys.readouterr().out
    assert text.count("] open ") == 4 and "--array=0-3" in text and ran(tmp_path) == []
    assert call(path, "--jobs", "2") == 0
    assert sorted(ran(tmp_path)) == ["1-x", "1-y", "2-x", "2-y"]
    kept = marker(tmp_path, "a=1,b=x")
    assert kept["exit"] == 0 and kept["minutes"] >= 0 and kept["values"] == {"a": "1", "b": "x"}
    assert kept["digest"] == sweep.read_manifest(path)[0].digest
    assert not list(tmp_path.glob("runs/sweeps/table/*.lock"))
    assert call(path) == 0 and len(ran(tmp_path)) == 4
    assert "4 of 4 jobs done" in capsys.readouterr().out


def test_index_and_only(tmp_path):
    path = write(tmp_path, manifest())
    assert call(path, "--index", "2") == 0 and ran(tmp_path) == ["2-x"]
    assert call(path, "--only", "b=y", "a=1", "a=2") == 0 and ran(tmp_path) == ["2-x", "1-y", "2-y"]


def test_a_failing_job_stops_no_other_and_is_run_again(tmp_path, capfd):
    code = (
        "import sys, pathlib; word = sys.argv[1]; print('hello from', word);"
        "open('ran.txt', 'a').write(word + chr(10));"
        "sys.exit(3 if word == '1-y' and not pathlib.Path('mended').exists() else 0)"
    )
    path = write(tmp_path, manifest(code))
    assert call(path) == 1
    assert "failed: [1] a=1,b=y" in capfd.readouterr().err
    assert ran(tmp_path) == ["1-x", "1-y", "2-x", "2-y"] and marker(tmp_path, "a=1,b=y")["exit"] == 3
    log = (tmp_path / "runs/sweeps/table/a=1,b=y.log").read_text()
    assert "hello from 1-y" in log and "1-x" not in log
    (tmp_path / "mended").touch()
    assert call(path) == 0 and ran(tmp_path)[4:] == ["1-y"]
    assert (tmp_path / "runs/sweeps/table/a=1,b=y.log").read_text().startswith(log)  # the first try is still there


def test_a_program_that_does_not_exist_is_a_failed_job(tmp_path, capfd):
    path = write(tmp_path, manifest(grid={"a": [1], "b": ["x"]}, command="no-such-program {a} {b}"))
    assert call(path) == 1 and "cannot start 'no-such-program'" in capfd.readouterr().out
    assert marker(tmp_path, "a=1,b=x")["exit"] == 127 and not list(tmp_path.glob("runs/sweeps/table/*.lock"))


def test_a_changed_command_is_not_mistaken_for_done(tmp_path, capsys):
    path = write(tmp_path, manifest())
    assert call(path) == 0
    write(tmp_path, manifest(words="{a}-{b}-longer"))
    call(path, "--list")
    assert capsys.readouterr().out.count("] changed ") == 4
    assert call(path, "--index", "0") == 0 and ran(tmp_path)[4:] == ["1-x-longer"]
    write(tmp_path, manifest(env={"WIDTH": 16}))  # a setting by the environment counts too
    assert call(path, "--index", "1") == 0 and ran(tmp_path)[5:] == ["1-y"]


def test_exit_0_without_the_product_is_no_success(tmp_path, capfd):
    path = write(tmp_path, manifest(produces="{out}/weights*.bin", grid={"a": [1], "b": ["x"]}))
    assert call(path) == 1 and "was not written" in capfd.readouterr().out
    (tmp_path / "runs/1_x").mkdir(parents=True)
    (tmp_path / "runs/1_x/weights3.bin").touch()
    assert call(path) == 0 and ran(tmp_path) == ["1-x"]  # it is there now: nothing left to run


def test_resume_words_follow_a_try_of_the_same_command(tmp_path):
    code = "import sys, pathlib; pathlib.Path('ran.txt').open('a').write('/'.join(sys.argv[1:]) + chr(10)); sys.exit(1)"
    resume = {"if": "{out}/state*.pt", "add": "--resume from={found}"}
    path = write(tmp_path, manifest(code, grid={"a": [1], "b": ["x"]}, resume=resume))
    (tmp_path / "runs/1_x").mkdir(parents=True)
    state = tmp_path / "runs/1_x/state1.pt"
    state.touch()  # of somebody else's run: no earlier try of ours
    assert call(path) == 1 and call(path) == 1
    newer = tmp_path / "runs/1_x/state2.pt"
    newer.touch()
    os.utime(state, (1, 1))
    assert call(path) == 1
    write(tmp_path, manifest(code, words="{a}-{b} other", grid={"a": [1], "b": ["x"]}, resume=resume))
    assert call(path) == 1
    assert ran(tmp_path) == ["1-x", f"1-x/--resume/from={state}", f"1-x/--resume/from={newer}", "1-x/other"]


def test_threads_and_gpus(tmp_path, monkeypatch):
    code = (
        "import os, sys, time; time.sleep(0.2);"
        "open(sys.argv[1], 'w').write(' '.join(os.environ.get(k, '-') for k in"
        " ('OMP_NUM_THREADS', 'CUDA_VISIBLE_DEVICES', 'ROOT_OF_DATA')))"
    )
    path = write(tmp_path, manifest(code, env={"ROOT_OF_DATA": "data"}))
    monkeypatch.setattr(sweep.os, "sched_getaffinity", lambda pid: set(range(12)), raising=False)
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert call(path, "--jobs", "4") == 0
    seen = [(tmp_path / name).read_text().split() for name in ("1-x", "1-y", "2-x", "2-y")]
    assert [found[0] for found in seen] == ["3"] * 4 and [found[1] for found in seen] == ["3", "5", "3", "5"]
    assert {found[2] for found in seen} == {"data"}
    write(tmp_path, manifest(code + " ", env={"ROOT_OF_DATA": "data", "OMP_NUM_THREADS": 2}))
    monkeypatch.setenv("ROOT_OF_DATA", "elsewhere")
    assert call(path, "--index", "0") == 0
    assert (tmp_path / "1-x").read_text() == "2 3,5 elsewhere"  # one job keeps all GPUs; the caller's setting wins
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert sweep.visible_gpus() == []


# ------------------------------------------------------------------------------------------------------------ locks


def lock_of(path: Path, **content) -> Path:
    """A lock of the first job, as some process left it."""
    place = path.parent / "runs/sweeps/table/a=1,b=x.lock"
    place.parent.mkdir(parents=True, exist_ok=True)
    place.write_text(json.dumps({"host": socket.gethostname(), "since": "then", **content}))
    return place


def dead_process() -> list:
    child = subprocess.Popen(["true"])
    start = sweep.process_start(child.pid)
    child.wait()
    return [child.pid, start]


def test_locks_of_living_and_of_foreign_processes_are_respected(tmp_path, capsys):
    path = write(tmp_path, manifest())
    mine = [os.getpid(), sweep.process_start(os.getpid())]
    lock = lock_of(path, processes=[dead_process(), mine])  # the sweep is dead, its job still runs
    assert call(path, "--index", "0") == 0 and ran(tmp_path) == [] and lock.exists()
    assert "remove" in capsys.readouterr().out
    lock = lock_of(path, host="another-machine", processes=[dead_process()])
    assert call(path) == 0 and ran(tmp_path) == ["1-y", "2-x", "2-y"] and lock.exists()


@pytest.mark.parametrize("kind", ["dead", "recycled", "garbage"])
def test_stale_locks_are_taken_over(tmp_path, kind):
    path = write(tmp_path, manifest())
    lock = lock_of(path, processes=[dead_process()])
    if kind == "recycled":  # the number lives, but belongs to a process that started at another time
        lock_of(path, processes=[[os.getpid(), "1"]])
        if not sweep.process_start(os.getpid()):
            pytest.skip("no /proc: a process's start time cannot be known here")
    if kind == "garbage":
        lock.write_text("{")
        assert call(path, "--index", "0") == 0 and ran(tmp_path) == []  # it may be being written
        os.utime(lock, (1, 1))
    assert call(path, "--index", "0") == 0 and ran(tmp_path) == ["1-x"] and not lock.exists()


def test_sweeps_side_by_side_run_every_job_once(tmp_path):
    code = "import sys, time; open('ran.txt', 'a').write(sys.argv[1] + chr(10)); time.sleep(0.05)"
    path = write(tmp_path, manifest(code, grid={"a": list(range(8)), "b": ["x"]}))
    for i in range(8):  # and every one begins with a stale lock that all of them see
        lock_of(path, processes=[dead_process()]).rename(tmp_path / f"runs/sweeps/table/a={i},b=x.lock")
    sweeps = [spawn(path, "--jobs", "2") for _ in range(3)]
    texts = [one.communicate(timeout=120)[0] for one in sweeps]
    assert [one.returncode for one in sweeps] == [0, 0, 0], texts
    assert sorted(ran(tmp_path)) == sorted(f"{i}-x" for i in range(8))


def test_killed_sweep_leaves_its_running_job_alone(tmp_path):
    code = (
        "import sys, time, pathlib; pathlib.Path('pid').write_text(str(__import__('os').getpid()));"
        "time.sleep(60 if not pathlib.Path('quick').exists() else 0); open('ran.txt', 'a').write('x')"
    )
    path = write(tmp_path, manifest(code, grid={"a": [1], "b": ["x"]}))
    child = spawn(path)
    try:
        wait_for(lambda: (tmp_path / "pid").exists() and (tmp_path / "pid").read_text())
        wait_for(lambda: len(sweep.read_json(tmp_path / "runs/sweeps/table/a=1,b=x.lock").get("processes", [])) == 2)
        child.kill()
        child.communicate(timeout=30)
        (tmp_path / "quick").touch()
        assert call(path) == 0 and ran(tmp_path) == []  # the orphan still has the job
    finally:
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)
    wait_for(lambda: sweep.is_stale(tmp_path / "runs/sweeps/table/a=1,b=x.lock"))
    assert call(path) == 0 and ran(tmp_path) == ["x"]


# ---------------------------------------------------------------------------------------------------------- signals

TRAINER = """
import pathlib, signal, sys, time
stop = []
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, frame: stop.append(number))
pathlib.Path("started").open("a").write(" ".join(sys.argv[1:]) + "\\n")
while not stop and not pathlib.Path("quick").exists():
    time.sleep(0.01)
if stop:
    time.sleep(0.3)
    pathlib.Path("saved").write_text(str(int(stop[0])))
sys.exit(0)  # some programs call a stop that was asked for no failure
"""


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_go_to_the_jobs_which_save(tmp_path, number, code):
    (tmp_path / "trainer.py").write_text(TRAINER)
    resume = {"if": "saved", "add": "--resume"}
    path = write(tmp_path, manifest(command="python trainer.py {a} {b}", resume=resume))
    child = spawn(path)
    wait_for((tmp_path / "started").exists)
    child.send_signal(number)
    text = child.communicate(timeout=60)[0]
    assert child.returncode == code, text
    assert (tmp_path / "saved").read_text() == str(int(number))
    assert (tmp_path / "started").read_text().split() == ["1", "x"]  # no other job was begun
    kept = marker(tmp_path, "a=1,b=x")
    assert kept["interrupted"] and kept["exit"] == 0
    (tmp_path / "quick").touch()
    assert call(path, "--index", "0") == 0
    assert (tmp_path / "started").read_text().split() == ["1", "x", "1", "x", "--resume"]


def test_a_second_signal_kills(tmp_path):
    code = (
        "import signal, time, pathlib; signal.signal(signal.SIGTERM, lambda *a: pathlib.Path('told').touch());"
        "pathlib.Path('started').touch(); [time.sleep(0.05) for _ in range(1200)]"
    )
    path = write(tmp_path, manifest(code, grid={"a": [1], "b": ["x"]}))
    child = spawn(path)
    wait_for((tmp_path / "started").exists)
    child.terminate()
    wait_for((tmp_path / "told").exists)
    child.terminate()
    child.communicate(timeout=30)
    assert child.returncode == 143 and marker(tmp_path, "a=1,b=x")["exit"] == 128 + signal.SIGKILL


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


MANIFESTS = sorted((ROOT / "sweeps").iterdir())


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.stem)
def test_shipped_manifests_fit_their_scripts(path, tmp_path, monkeypatch):
    jobs = sweep.read_manifest(path)
    firsts: dict[str, sweep.Job] = {}
    for job in jobs:  # one of each setting: seeds and percentages only change a number
        firsts.setdefault(str({k: v for k, v in job.values.items() if k not in ("seed", "supervision")}), job)
    settings = list(firsts.values())
    if path.stem.startswith("nfpi"):
        settings = settings[:2]  # hydra is slow
    for job in settings:
        options = options_of(job.words, tmp_path, monkeypatch)
        assert str(options["seed"]) == job.values["seed"]
        if "supervision" in job.values:
            assert float(options["masking_fact"]) == float(job.values["supervision"])
    # the flags of a second try are the script's too
    job = settings[0]
    words = [*job.words, *(word.replace("{found}", str(tmp_path / "state")) for word in job.resume_words)]
    if path.stem == "lbae":
        with pytest.raises(UserError, match="no experiment at runs/lbae/mnist_bae_12345"):
            options_of(words, tmp_path, monkeypatch)
    else:
        assert options_of(words, tmp_path, monkeypatch) != options_of(job.words, tmp_path, monkeypatch)
    assert f"sweeps/{path.name}" in path.read_text()  # it says how it is called


def words_of_script(script: str, **environment: str) -> list[str]:
    """The command that a script would run (`echo` in the place of Python)."""
    env = {**os.environ, "PYTHON": "echo", "DATA_ROOT": "data", **environment}
    text = subprocess.run(["bash", f"scripts/{script}"], cwd=ROOT, env=env, capture_output=True, text=True, check=True)
    return ["python", *shlex.split(text.stdout)]


SAME_SETTINGS = {
    "glancenet_dsprites.sh": (
        "glancenet_dsprites",
        {"model": "GlanceNet", "setting": "published", "supervision": "10"},
    ),
    "cbnm_dsprites.sh": ("glancenet_dsprites", {"model": "CBNM", "setting": "published", "supervision": "10"}),
    "glancenet_mpi3d.sh": ("glancenet_mpi3d", {"model": "GlanceNet", "supervision": "10"}),
    "cbnm_mpi3d.sh": ("glancenet_mpi3d", {"model": "CBNM", "supervision": "10"}),
    "glancenet_celeba.sh": ("glancenet_celeba", {"model": "GlanceNet", "supervision": "10"}),
    "cbnm_celeba.sh": ("glancenet_celeba", {"model": "CBNM", "supervision": "10"}),
    "latent_flow_mnist.sh": ("latent_flow_mnist", {"variant": "supervised"}),
    "latent_flow_mnist_weakly.sh": ("latent_flow_mnist", {"variant": "weakly"}),
    "latent_flow_mnist_unsuper_double_control.sh": ("latent_flow_mnist", {"variant": "unsuper_double"}),
    "latent_flow_mnist_unsuper_single_control.sh": ("latent_flow_mnist", {"variant": "unsuper_single"}),
    "nfpi_cifar10_glem.sh": ("nfpi_cifar10", {"method": "glem"}),
}
PLACES = {"name", "dset_dir", "data_dir", "out", "out_path", "log_dir", "ckpt_dir", "train_output_dir", "traverse_z"}
PLACES |= {"extra", "pickle_data_path", "data_path"}


@pytest.mark.parametrize("script", SAME_SETTINGS)
def test_manifests_have_the_settings_of_the_scripts(script, tmp_path, monkeypatch):
    name, values = SAME_SETTINGS[script]
    jobs = sweep.read_manifest(ROOT / "sweeps" / f"{name}.yaml")
    job = next(job for job in jobs if values.items() <= job.values.items())
    supervision = values.get("supervision", "100")
    more = words_of_script(script, SEED=job.values["seed"], MASKING_FACT=supervision)
    mine, theirs = options_of(job.words, tmp_path, monkeypatch), options_of(more, tmp_path, monkeypatch)
    differing = {key for key in mine if mine[key] != theirs[key]} - PLACES
    assert not {key: (mine[key], theirs[key]) for key in differing if key != "seed"}
    if not script.startswith("nfpi"):  # those scripts take the seed as an override
        assert mine["seed"] == theirs["seed"]
