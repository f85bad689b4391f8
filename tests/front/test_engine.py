"""The engine: scripts/Snakefile with toy experiments, in real processes that are killed, stopped and started again.

Three quiet minutes, nearly all of it Snakemake's own start; the slow test makes 200 experiments.
"""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

pytest.importorskip("snakemake", reason="the engine is an extra: pip install -e .[reproduce]")

ROOT = Path(__file__).resolve().parents[2]
# steps of 0.1 s; saves on a stop signal, goes on from its state; fails while there is a file broken_<name>
TRAINER = """
import os, pathlib, signal, sys, time
out, steps = pathlib.Path(sys.argv[1]), int(sys.argv[2])
log, stop = pathlib.Path("ran.txt"), []
say = lambda text: log.open("a").write(f"{out.name} {text}\\n")
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, frame: stop.append(number))
out.mkdir(parents=True, exist_ok=True)
state, alive = out / "state", out / "alive"
if alive.exists() and pathlib.Path(f"/proc/{alive.read_text()}").exists():
    say("TWICE")
alive.write_text(str(os.getpid()))
step = int(state.read_text()) if state.exists() else 0
say(f"from {step}")
if pathlib.Path(f"broken_{out.name}").exists():
    print("it is broken")
    sys.exit(3)
while step < steps:
    time.sleep(0.1)
    step += 1
    state.write_text(str(step))
    if not (out / "final").exists():
        (out / "final").write_text("the best so far")
    if stop:
        say(f"saved {step}")
        alive.unlink()
        sys.exit(130)
(out / "final").write_text(str(step))
alive.unlink()
say("end")
"""
ROW = {
    "paper": "nfpi", "table": "Toy", "data": "toy", "metric": "accuracy", "unit": "", "direction": "higher",
    "decimals": 2, "paper_value": None, "paper_std": None, "paper_where": "nowhere", "ours": None, "n": None,
    "protocol": "full",
    "hardware": None, "minutes": None, "command": "snakemake -s scripts/Snakefile --cores 2 results/nfpi/toy",
    "date": None, "commit": None, "note": "",
}  # fmt: skip
MANIFEST = """
about: a toy
grid: {kind: [a, b], seed: [0, 1]}
train: python trainer.py {out} STEPS
final: final
evaluate: python measure.py {out} 0.{seed}5
result: result.json
gpus: 0
"""


class Engine:
    """A folder with a toy table, and calls of the engine in it."""

    def __init__(self, folder: Path):
        self.folder = folder
        (folder / "trainer.py").write_text(TRAINER)
        measure = "import sys; open(sys.argv[1] + '/result.json', 'w').write('{\"accuracy\": ' + sys.argv[2] + '}')"
        (folder / "measure.py").write_text(measure)
        (folder / "sweeps/nfpi").mkdir(parents=True)
        (folder / "results").mkdir()
        source = {"file": "result.json", "key": "accuracy", "statistic": "mean and standard deviation over seeds"}
        rows = [
            {
                **ROW,
                "id": f"nfpi/{kind}",
                "setting": kind,
                "source": {"folder": f"runs/nfpi/toy/{kind}_{{seed}}", **source},
            }
            for kind in "ab"
        ]
        (folder / "results/nfpi.json").write_text(json.dumps(rows))
        self.manifest(1)

    def manifest(self, steps: int, text: str = MANIFEST) -> None:
        (self.folder / "sweeps/nfpi/toy.yaml").write_text(text.replace("STEPS", str(steps)))

    def start(self, *words: str, **more: str) -> subprocess.Popen:
        command = [sys.executable, "-m", "snakemake", "-s", str(ROOT / "scripts/Snakefile"), "--cores", "2", "--config",
                   f"sweeps={self.folder}/sweeps", f"root={self.folder}", "--", "results/nfpi/toy"]  # fmt: skip
        at = command.index("--config")
        command[at:at] = words
        return subprocess.Popen(
            command, cwd=self.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **more}, start_new_session=True,
        )  # fmt: skip

    def call(self, *words: str, **more: str) -> tuple[int, str]:
        engine = self.start(*words, **more)
        text = engine.communicate(timeout=400)[0]
        return engine.returncode, text

    def ran(self) -> list[str]:
        path = self.folder / "ran.txt"
        return path.read_text().splitlines() if path.exists() else []

    def ours(self) -> list:
        return [row["ours"] for row in json.loads((self.folder / "results/nfpi.json").read_text())]

    def record(self, experiment: str) -> dict:
        return json.loads((self.folder / f"runs/nfpi/toy/{experiment}/record.json").read_text())


@pytest.fixture
def engine(tmp_path):
    return Engine(tmp_path)


def wait_for(condition, seconds: float = 120.0) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "the other process did not get there"
        time.sleep(0.05)


def test_a_table_is_made_once_and_its_rows_are_filled(engine):
    code, text = engine.call("-n")
    assert code == 0 and "no earlier row says how long it takes" in text and not engine.ran(), text
    code, text = engine.call()
    assert code == 0, text
    assert sorted(line for line in engine.ran() if "end" in line) == ["a_0 end", "a_1 end", "b_0 end", "b_1 end"]
    assert engine.ours() == [[0.05, 0.15], [0.05, 0.15]]
    record = engine.record("a_1")["train"]
    assert record["commands"] == ["python trainer.py runs/nfpi/toy/a_1 1"] and record["finished"]
    assert record["seconds"] > 0 and "1 of" in record["hardware"] and len(record["commit"]) == 7
    code, text = engine.call()
    assert code == 0 and "Nothing to be done" in text and len(engine.ran()) == 8
    engine.manifest(2)  # a changed command is not mistaken for done; what is there is not removed before it ran
    code, text = engine.call("-n")
    assert code == 0 and "train_nfpi_toy" in text and "about " in text and "minutes" in text
    code, text = engine.call()
    assert code == 0 and engine.ran().count("a_0 from 1") == 1, text


def test_what_is_left_of_every_table_is_told(tmp_path):
    command = [sys.executable, "-m", "snakemake", "-s", str(ROOT / "scripts/Snakefile"), "-n"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=400)
    tables = [path for path in ROOT.glob("sweeps/*/*.yaml") if path.parent.name != "quickstart"]
    assert done.returncode == 0 and f"collect {len(tables)}" in " ".join(done.stdout.split()), done.stderr


def test_a_failing_job_stops_no_other_and_runs_again(engine):
    (engine.folder / "broken_a_1").touch()
    code, text = engine.call()
    assert code == 1 and "FAILED, exit code 3; log: runs/nfpi/toy/a_1/train.log" in text
    assert sorted(line for line in engine.ran() if "end" in line) == ["a_0 end", "b_0 end", "b_1 end"]
    assert "it is broken" in (engine.folder / "runs/nfpi/toy/a_1/train.log").read_text()
    assert engine.ours() == [None, None] and (engine.folder / "runs/nfpi/toy/b_1/result.json").exists()
    (engine.folder / "broken_a_1").unlink()
    code, text = engine.call()
    assert code == 0 and engine.ran()[-2:] == ["a_1 from 0", "a_1 end"], text
    assert engine.ours() == [[0.05, 0.15], [0.05, 0.15]]


def alive(engine: Engine, count: int) -> list[Path]:
    return [path for path in engine.folder.glob("runs/nfpi/toy/*/alive") if path.exists()][:count]


def test_a_killed_training_goes_on(engine):
    engine.manifest(30)
    first = engine.start()
    wait_for(lambda: alive(engine, 1) and (alive(engine, 1)[0].parent / "state").exists())
    killed = alive(engine, 1)[0]
    pid, steps = int(killed.read_text()), int((killed.parent / "state").read_text())
    os.kill(pid, signal.SIGKILL)
    text = first.communicate(timeout=400)[0]
    assert first.returncode == 1 and "exit code -9" in text
    assert sum("end" in line for line in engine.ran()) == 3  # the others were made
    code, text = engine.call()
    assert code == 0, text
    again = [line for line in engine.ran() if line.startswith(killed.parent.name) and "from" in line]
    assert len(again) == 2 and int(again[1].split()[-1]) >= steps  # it went on, and all the others did not run again


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_stopped_engine_lets_its_jobs_save(engine, number):
    engine.manifest(100)
    first = engine.start()
    wait_for(lambda: len(alive(engine, 2)) == 2)
    first.send_signal(number)
    text = first.communicate(timeout=100)[0]
    assert first.returncode == 130, text
    assert sum("saved" in line for line in engine.ran()) == 2 and sum("from" in line for line in engine.ran()) == 2
    stopped = dict(line.split(" saved ") for line in engine.ran() if "saved" in line)
    for experiment, step in stopped.items():
        assert (engine.folder / f"runs/nfpi/toy/{experiment}/final").read_text() == "the best so far"
        assert (engine.folder / f"runs/nfpi/toy/{experiment}/state").read_text() == step
    second = engine.start()
    wait_for(lambda: sum("from" in line for line in engine.ran()) == 4)
    second.send_signal(number)
    second.communicate(timeout=100)
    assert {line for line in engine.ran() if "from" in line} >= {
        f"{name} from {step}" for name, step in stopped.items()
    }


def test_a_killed_engine_leaves_no_orphan_and_no_lock(engine):
    engine.manifest(60)
    first = engine.start()
    wait_for(lambda: len(alive(engine, 2)) == 2)
    first.kill()
    first.wait()
    second = engine.start()  # at once, while the orphans still save
    text = second.communicate(timeout=400)[0]
    assert second.returncode == 0, text
    assert not any("TWICE" in line for line in engine.ran())
    assert sum("saved" in line for line in engine.ran()) == 2 and sum("end" in line for line in engine.ran()) == 4
    assert engine.ours() == [[0.05, 0.15], [0.05, 0.15]]


def test_a_second_engine_is_refused(engine):
    engine.manifest(2000)  # longer than the second engine takes to start
    first = engine.start()
    wait_for(lambda: len(alive(engine, 2)) == 2)
    code, text = engine.call()
    assert code == 1 and "cannot be locked" in text and len(alive(engine, 2)) == 2
    first.send_signal(signal.SIGTERM)
    first.communicate(timeout=100)
    assert not any("TWICE" in line for line in engine.ran())


def test_a_bad_manifest_is_one_line_before_anything_runs(engine):
    engine.manifest(1, MANIFEST.replace("final: final", "finale: final"))
    code, text = engine.call()
    assert code == 1 and "toy.yaml: unknown key 'finale' (did you mean 'final'?)" in text and not engine.ran()


# Stand-ins for SLURM that run the jobs here: what is tested is the submission, not a cluster.
SLURM = {
    "sbatch": """
import json, os, pathlib, subprocess, sys
place = pathlib.Path(os.environ["STAND_IN"])
number = len(list(place.glob("*.job"))) + 1
(place / f"{number}.job").write_text(json.dumps(sys.argv[1:]))
wrap = [word for word in sys.argv[1:] if word.startswith("--wrap=")]
after = dict(zip(sys.argv, sys.argv[1:]))
script = wrap[0].removeprefix("--wrap=") if wrap else after.get("--wrap") or sys.stdin.read()
env = {**os.environ, "SLURM_JOB_ID": str(number), "SLURM_CPUS_PER_TASK": "1"}
run = f"({script}) >{place}/{number}.log 2>&1; echo $? >{place}/{number}.end"
child = subprocess.Popen(["bash", "-c", run], env=env, start_new_session=True, stdin=subprocess.DEVNULL,
                         stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
(place / f"{number}.pid").write_text(str(child.pid))
print(number)
""",
    "sacct": """
import os, pathlib
place = pathlib.Path(os.environ["STAND_IN"])
for job in sorted(place.glob("*.job")):
    end = job.with_suffix(".end")
    state = "RUNNING" if not end.exists() else "COMPLETED" if end.read_text().strip() == "0" else "FAILED"
    print(f"{job.stem}|{state}")
""",
    "scancel": """
import os, pathlib, signal, sys
place = pathlib.Path(os.environ["STAND_IN"])
for word in sys.argv[1:]:
    for number in word.split(","):
        if (place / f"{number}.pid").exists() and not (place / f"{number}.end").exists():
            os.killpg(int((place / f"{number}.pid").read_text()), signal.SIGTERM)
""",
    "srun": """
import os, sys
words = sys.argv[1:]
while words and words[0].startswith("-"):
    words = words[2 if words[0] in ("-n", "-c") else 1:]
os.execvp(words[0], words)
""",
    "sinfo": "print('slurm 23.11.0')",
    "sacctmgr": "print('nobody|')",
    "scontrol": "print('MinJobAge = 300 sec')",
}
SLURM["squeue"] = SLURM["sacct"]


@pytest.mark.slow  # the plugin asks for the state of jobs every 40 s
def test_experiments_are_submitted_to_slurm(engine, tmp_path_factory):
    place = tmp_path_factory.mktemp("slurm")
    for name, code in SLURM.items():
        (place / name).write_text(f"#!{sys.executable}\n{code}")
        (place / name).chmod(0o755)
    engine.manifest(1, MANIFEST.replace("seed: [0, 1]", "seed: [0]").replace("gpus: 0", "gpus: 1\nhours: 2"))
    words = ["--executor", "slurm", "--jobs", "4", "--slurm-init-seconds-before-status-checks", "2"]
    path = f"{place}:{os.environ['PATH']}"
    code, text = engine.call(*words, PATH=path, STAND_IN=str(place), CUDA_VISIBLE_DEVICES="")
    logs = "".join(log.read_text() for log in place.glob("*.log"))
    assert code == 0, text + logs
    jobs = [json.loads(job.read_text()) for job in place.glob("*.job")]
    assert len(jobs) == 4  # two trainings, two evaluations; collecting is done here
    submitted = " ".join(jobs[0])
    assert "--gpus=1" in submitted or "--gpus 1" in submitted, submitted
    assert "-t 120" in submitted or "--time=120" in submitted, submitted
    assert engine.ours() == [[0.05], [0.05]]


@pytest.mark.slow
def test_two_hundred_tiny_jobs(engine):
    engine.manifest(0, MANIFEST.replace("[0, 1]", str(list(range(50)))))
    code, text = engine.call()
    assert code == 0, text[-3000:]
    assert len(engine.ran()) == 200 and [len(ours) for ours in engine.ours()] == [50, 50]
