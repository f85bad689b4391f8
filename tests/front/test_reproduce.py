"""scripts/reproduce.py on toy experiments, and the rehearsal of scripts/gpu_check.sh on the CPU. A quiet minute."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.front.test_engine import MANIFEST, Engine, wait_for

ROOT = Path(__file__).resolve().parents[2]


def reproduce(engine: Engine, *words: str) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "scripts/reproduce.py"), "--sweeps", f"{engine.folder}/sweeps", "--root",
               str(engine.folder), *words]  # fmt: skip
    return subprocess.Popen(
        command, cwd=engine.folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip


@pytest.fixture
def engine(tmp_path):
    return Engine(tmp_path)


def lines_of(text: str) -> list[str]:
    return [line.split()[0].rpartition("/")[2] for line in text.splitlines() if line.startswith("nfpi/")]


def test_the_plan_makes_a_table_whole_with_one_seed_first(engine):
    toy = f"python {ROOT}/tests/toy_paper.py --out {{out}} --lr 0.{{seed}}1 --epochs EPOCHS"
    text = MANIFEST.replace("python trainer.py {out} STEPS", toy) + "needs: [a_set]\n"
    manifest = engine.folder / "sweeps/nfpi/toy.yaml"
    manifest.write_text(text.replace("kind: [a, b]", "kind: {a: '1000', b: '200000'}").replace("EPOCHS", "{kind}"))
    (engine.folder / "runs/nfpi/toy/b_0").mkdir(parents=True)
    (engine.folder / "runs/nfpi/toy/b_0/result.json").write_text("{}")  # made already
    text = reproduce(engine, "--hours", "1", "--dry-run").communicate(timeout=120)[0]
    assert text.count("needs a_set in the data folder") == 3 and not (engine.folder / "runs/probe.json").exists(), text
    manifest.write_text(manifest.read_text().replace("needs: [a_set]\n", "trainings: 2\n"))
    child = reproduce(engine, "--hours", "1", "--dry-run")
    text = child.communicate(timeout=120)[0]
    assert child.returncode == 0 and "3 experiments with rows still to do; 1 hours on" in text, text
    assert text.count("reproduce: 20 steps of") == 2  # a setting, not a seed
    assert lines_of(text) == ["a_0", "a_1", "b_1"] and engine.ours() == [None, None]
    found = json.loads((engine.folder / "runs/probe.json").read_text())
    for kind, epochs, experiment in (("a", 1_000, "a_0"), ("b", 200_000, "b_1")):
        step = found[f"nfpi/toy/{kind}"]
        assert 0 < step["seconds_a_step"] < 1 and step["steps"] == 29 * epochs
        assert step["minutes"] == pytest.approx(2 * step["steps"] * step["seconds_a_step"] / 60)
        assert float(re.search(rf"{experiment} +(\d+) min", text)[1]) == round(step["minutes"])
    text = reproduce(engine, "--hours", "1", "--dry-run").communicate(timeout=120)[0]
    assert "20 steps of" not in text and lines_of(text) == ["a_0", "a_1", "b_1"]  # measured once
    assert not list((engine.folder / "runs/nfpi/toy").glob("a_*"))  # a probe leaves nothing


def test_a_probe_that_fails_is_told_beside_its_experiment(engine):
    (engine.folder / "trainer.py").write_text("import sys; sys.exit('error: no data here')")
    text = reproduce(engine, "--hours", "1", "--dry-run").communicate(timeout=120)[0]
    assert text.count("? min: the probe failed: error: no data here") == 4 and text.count("20 steps of") == 2, text


def test_what_fits_is_run_and_collected_and_the_rest_is_stopped_in_time(engine):
    engine.manifest(1, MANIFEST.replace("[0, 1]", "[0]"))
    slow = MANIFEST.replace("[a, b]", "[c]").replace("STEPS", "100000").replace("[0, 1]", "[0]")
    (engine.folder / "sweeps/nfpi/endless.yaml").write_text(slow + "priority: 0.01\n")
    rows = json.loads((engine.folder / "results/nfpi.json").read_text())
    source = {**rows[0]["source"], "folder": "runs/nfpi/endless/c_{seed}"}
    rows.append({**rows[0], "id": "nfpi/c", "setting": "c", "source": source})
    (engine.folder / "results/nfpi.json").write_text(json.dumps(rows))
    begin = time.monotonic()
    child = reproduce(engine, "--hours", "0.012")
    text = child.communicate(timeout=400)[0]
    assert child.returncode == 0 and time.monotonic() - begin < 200, text
    assert engine.ours()[:2] != [None, None] and engine.ours()[2] is None
    assert lines_of(text)[-1] == "c_0" or "c_0" not in lines_of(text)
    if "c_0" in lines_of(text):  # it was stopped when the time was over, and saved
        assert any(line.startswith("c_0 saved") for line in engine.ran())
    assert "not yet run" in (engine.folder / "RESULTS.md").read_text()


def test_a_stop_lets_the_training_save_and_collects(engine):
    engine.manifest(3000)
    child = reproduce(engine, "--hours", "0.02")  # a fifth of it is the probe's
    wait_for(lambda: sum("from 0" in line for line in engine.ran()) == 2)
    child.send_signal(signal.SIGTERM)
    text = child.communicate(timeout=120)[0]
    assert child.returncode == 130, text
    assert any("saved" in line for line in engine.ran()) and sum("from" in line for line in engine.ran()) == 2


def test_bad_words_are_one_line(engine):
    for words, said in (
        (["--hours", "0"], "--hours is above 0"),
        (["--hours", "1", "--paper", "lbea"], "did you mean 'lbae'"),
        ([], "--hours"),
        (["--hours", "1", "--device", "tpu"], "tpu"),
    ):
        child = reproduce(engine, *words)
        text = child.communicate(timeout=60)[0]
        assert child.returncode == 2 and said in text and text.startswith("error: ") and text.count("\n") == 1, text


def gpu_check(out: Path, *words: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "OUT": str(out), "DEVICE": "cpu", "PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    command = ["bash", str(ROOT / "scripts/gpu_check.sh"), *words]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1500)


def test_pieces_of_the_gpu_hour_are_rehearsed(tmp_path):
    done = gpu_check(tmp_path, "op_table", "benchmark_nfpi_amp", "sanitizer")
    assert done.returncode == 0, done.stdout + done.stderr
    for piece in ("op_table", "benchmark_nfpi_amp", "sanitizer"):
        record = json.loads((tmp_path / f"{piece}.json").read_text())
        assert record["exit"] == 0 and record["device"] == "cpu" and record["hardware"]
    assert '"amp": true' in (tmp_path / "benchmark_nfpi_amp.txt").read_text()
    assert json.loads((tmp_path / "op_table.figures.json").read_text())
    wrong = gpu_check(tmp_path, "op_tabel")
    assert wrong.returncode == 2 and "no piece op_tabel" in wrong.stderr


@pytest.mark.slow
def test_the_whole_gpu_hour_is_rehearsed(tmp_path):
    done = gpu_check(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    records = [json.loads(path.read_text()) for path in tmp_path.glob("*.json") if "figures" not in path.name]
    assert len(records) >= 10 and all(record["exit"] == 0 for record in records)
    assert "experiments with rows still to do" in done.stdout
    again = gpu_check(tmp_path)
    assert again.returncode == 0 and "gpu_check: op_table" not in again.stdout  # what is done is kept
