"""The quickstart: its runner (stub commands), its page (numbers, escaping, pictures in Chromium), one paper for real.

About 25 s, most of it two tiny real flows; the slow test runs all papers in tiny.
"""

import dataclasses
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from common.errors import UserError
from common.images import save_gif, save_image

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "scripts"))

import gallery  # noqa: E402
import quickstart  # noqa: E402
from quickstart import Outcome, Paper, Runner, Step  # noqa: E402

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --virtual-time-budget=10000 --dump-dom"
)


# ------------------------------------------------------------------------------------------------------------- runner
def python(code: str) -> tuple[str, ...]:
    return ("python", "-c", code)


def count(name: str) -> str:
    """Python that adds a line to a file: how often it ran, and with which arguments."""
    return f"import sys; open({name!r}, 'a').write(' '.join(sys.argv[1:]) + '\\n')"


def lines(path: Path) -> list[str]:
    return path.read_text().splitlines() if path.exists() else []


@pytest.fixture
def runner(tmp_path):
    return Runner(tmp_path / "out", root=tmp_path)


def two_steps(code: str = "", second: str = "") -> Paper:
    steps = (
        Step("first", python(count("a") + ";" + code), makes=("a",)),
        Step("second", python(count("b") + ";" + second), makes=("b",)),
    )
    return Paper("stub", steps, "nothing")


def test_done_steps_are_skipped_and_a_changed_command_repeats_what_follows(runner, tmp_path):
    outcome = runner.run_paper(two_steps())
    assert not outcome.error and [record["finished"] for record in outcome.records] == [True, True]
    assert all(record["cpu_seconds"] >= 0 and record["seconds"] >= 0 for record in outcome.records)  # rounded to tenths
    again = runner.run_paper(two_steps())
    assert again.records == outcome.records and len(lines(tmp_path / "a")) == len(lines(tmp_path / "b")) == 1
    runner.run_paper(two_steps(second="1"))  # the second alone
    assert (len(lines(tmp_path / "a")), len(lines(tmp_path / "b"))) == (1, 2)
    runner.run_paper(two_steps(code="1", second="1"))  # the first, so both
    assert (len(lines(tmp_path / "a")), len(lines(tmp_path / "b"))) == (2, 3)
    (tmp_path / "a").unlink()  # a result that somebody removed
    runner.run_paper(two_steps(code="1", second="1"))
    assert (len(lines(tmp_path / "a")), len(lines(tmp_path / "b"))) == (1, 4)


def test_a_damaged_marker_counts_as_not_done(runner, tmp_path):
    runner.run_paper(two_steps())
    for marker in (tmp_path / "out/steps/stub").iterdir():
        marker.write_text("{")
    assert not runner.run_paper(two_steps()).error
    assert len(lines(tmp_path / "a")) == 2


def test_a_failing_step_ends_its_paper_only(runner, tmp_path, capsys):
    bad = Paper("bad", (Step("breaks", python("import sys; print('why'); sys.exit(3)")), *two_steps().steps))
    outcomes = runner.run([bad, two_steps()], jobs=2)
    assert outcomes[0].error.startswith("breaks: exit code 3: why") and not outcomes[1].error
    assert lines(tmp_path / "a") == [""]  # by the good paper alone
    assert "bad] FAILED: breaks: exit code 3: why" in capsys.readouterr().out
    mended = dataclasses.replace(bad, steps=(Step("breaks", python("1")), *two_steps().steps))
    assert not runner.run_paper(mended).error


def test_a_step_that_writes_nothing_and_a_missing_program_fail(runner):
    lazy = Paper("lazy", (Step("lazy", python("1"), makes=("result",)),))
    assert "ended without writing result" in runner.run_paper(lazy).error
    assert "cannot start no-such-program" in runner.run_paper(Paper("x", (Step("x", ("no-such-program",)),))).error


SAVES = """
import signal, sys, time
from pathlib import Path
def save(number, frame):
    Path("state").write_text("saved"); sys.exit(0)      # as the trainers do: saved, left, exit code 0
signal.signal(signal.SIGTERM, save)
open("runs", "a").write(" ".join(sys.argv[1:]) + "\\n")
if "--resume" in sys.argv: Path("final").write_text(Path("state").read_text()); sys.exit(0)
while True: time.sleep(0.05)
"""


def test_a_stopped_training_goes_on_from_its_state(runner, tmp_path):
    paper = Paper("p", (Step("train", python(SAVES), clears=("state",), resume=("sta*", ("--resume", "{}"))),))

    def stop():
        while not (tmp_path / "runs").exists():
            time.sleep(0.02)
        runner.stopping.set()

    waiter = threading.Thread(target=stop)
    waiter.start()
    outcome = runner.run_paper(paper)
    waiter.join()
    assert outcome.error == "train: stopped; the next call goes on" and not outcome.records
    assert (tmp_path / "state").read_text() == "saved"
    outcome = Runner(tmp_path / "out", root=tmp_path).run_paper(paper)
    assert not outcome.error and lines(tmp_path / "runs") == ["", "--resume state"]
    assert outcome.records[0]["command"] == paper.steps[0].shown  # the page shows the command without the resume
    assert (tmp_path / "final").exists()


def test_another_command_does_not_go_on_from_the_old_state(runner, tmp_path):
    step = Step("train", python(count("a") + "; sys.exit(1)"), clears=("state",), resume=("state", ("--resume",)))
    assert runner.run_paper(Paper("p", (step,))).error
    (tmp_path / "state").write_text("of the old command")
    changed = dataclasses.replace(step, words=python(count("a")))
    assert not runner.run_paper(Paper("p", (changed,))).error
    assert lines(tmp_path / "a") == ["", ""] and not (tmp_path / "state").exists()


def test_output_passes_through_and_silence_is_filled(runner, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(quickstart, "QUIET", 0.5)
    code = "import time; print('a line'); print('50%', end='\\r', flush=True); time.sleep(2.5); print('end', end='')"
    (tmp_path / "metrics.csv").write_text("step,epoch,loss\n7,2,0.5\n")
    runner.run_paper(Paper("talks", (Step("work", python(code), watch="metrics.csv"),)))
    shown = capsys.readouterr().out.splitlines()
    assert all(re.match(r"\[\d\d:\d\d talks\] ", line) for line in shown)
    texts = [line.split("] ", 1)[1].strip() for line in shown]
    assert [text for text in texts if text in ("a line", "50%", "end")] == ["a line", "50%", "end"]
    assert any(re.fullmatch(r"work is running, \d s, epoch 2, step 7", text) for text in texts)
    assert (tmp_path / "out/logs/talks/1-work.txt").read_bytes() == b"a line\n50%\rend"


def run_main(monkeypatch, out: Path, papers: list[Paper], *options: str) -> int:
    monkeypatch.setattr(quickstart, "plan", lambda *_: papers)
    return quickstart.main(["--out", str(out), *options])


def test_main_lists_failures_keeps_the_other_papers_and_selects(tmp_path, monkeypatch, capsys):
    out = tmp_path / "out"
    good = Paper("good", (Step("fine", python(count(str(tmp_path / "good")))),), "data")
    bad = Paper("bad", (Step("breaks", python("raise SystemExit('no <memory>')")),), "data")
    assert run_main(monkeypatch, out, [good, bad]) == 1
    told = capsys.readouterr()
    assert "bad failed: breaks: exit code 1: no <memory>" in told.err and str(out / "index.html") in told.out
    page = (out / "index.html").read_text()
    assert "no &lt;memory&gt;" in page and 'id="good"' in page and "<memory>" not in page
    assert run_main(monkeypatch, out, [good, bad], "--paper", "good") == 0  # the failure is not of this call
    assert len(lines(tmp_path / "good")) == 1
    assert run_main(monkeypatch, out, [good, bad], "--paper", "good", "--fresh") == 0
    assert len(lines(tmp_path / "good")) == 2
    with pytest.raises(UserError, match=r"no paper 'godo' \(did you mean 'good'\?\); there are good, bad"):
        run_main(monkeypatch, out, [good, bad], "--paper", "godo")


def test_two_quickstarts_do_not_share_a_folder(tmp_path):
    lock = quickstart.exclusive(tmp_path)
    with pytest.raises(UserError, match="another quickstart is writing"):
        quickstart.exclusive(tmp_path)
    lock.close()
    quickstart.exclusive(tmp_path).close()


def script(*words: str, **more: str) -> subprocess.CompletedProcess:
    command = ["bash", str(ROOT / "scripts/quickstart.sh"), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, **more})


def test_wrong_words_are_told_before_anything_is_installed(tmp_path):
    environment = {"PYTHON": sys.executable, "VENV": str(tmp_path / "venv")}
    for words, text in (
        (["--paper", "lbea"], "did you mean 'lbae'"),
        (["--papre", "x"], "--papre"),
        (["--jobs", "0"], "0"),
    ):
        result = script(*words, **environment)
        assert result.returncode == 2 and text in result.stderr, result
        assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1 and not result.stdout
    result = script("--help", **environment)
    assert result.returncode == 0 and "--fresh" in result.stdout and "--paper NAME" in result.stdout
    assert not (tmp_path / "venv").exists()


@pytest.mark.parametrize("mnist", [False, True])
def test_the_plan_runs_documented_commands_of_all_papers(mnist):
    papers = quickstart.plan("results/quickstart", mnist)
    assert sorted(paper.name for paper in papers) == sorted(gallery.SECTIONS)
    for paper in papers:
        readme = (ROOT / paper.name / "README.md").read_text()
        for step in paper.steps:
            kind, target = step.words[0], step.words[1]
            if target == "-m":
                target = step.words[2].replace(".", "/") + ".py"
            path = Path(os.path.normpath(Path(step.folder) / target))
            assert kind in ("python", "bash") and (ROOT / path).is_file(), step
            assert path.name in readme or path.stem in readme, f"{path} is not in {paper.name}/README.md"
            assert all(
                name.startswith(f"results/quickstart/{paper.name}/") for name in (*step.makes, *step.clears)
            ) or (step.clears == (f"results/quickstart/{paper.name}",))
    ignored = subprocess.run(["git", "check-ignore", "-q", "results/quickstart/index.html"], cwd=ROOT)
    assert ignored.returncode in (0, 128)  # 128: not a git checkout


def test_mnist_is_used_when_all_its_files_are_there(tmp_path, monkeypatch):
    monkeypatch.setenv("DATA_ROOT", str(tmp_path))
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in quickstart.MNIST_FILES[:3]:
        (raw / f"{name}.gz").touch()
    assert quickstart.find_mnist() is None
    (raw / quickstart.MNIST_FILES[3]).touch()
    assert quickstart.find_mnist() == tmp_path


# --------------------------------------------------------------------------------------------------------------- page
def picture(path: Path, gif: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    frames = np.random.default_rng(0).integers(0, 255, (3, 8, 12, 3), dtype=np.uint8)
    if gif:
        save_gif(path, list(frames))
    else:
        save_image(path, frames[0])


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def fake_runs(out: Path) -> None:
    """Folders with the files that the page reads, in the formats that the scripts write."""
    exp = out / "lbae" / "exp"
    names = ["samples_cov", "samples_int", "samples_random", "samples_independent", "reco"]
    sections = " ".join(f"{name} ntest:9 fid:{k + 0.123456789} f8/18:0.7{k}1/0.8{k}2" for k, name in enumerate(names))
    write(exp / "results.txt", f"e:1 loss_eval:3.5 nref:9 {sections} feat:a<b>&\"'x\n")
    with open(exp / "results.txt", "a") as file:
        file.write("e:1 loss_eval:3.5 nref:9 digits_train ntest:9 fid:0.98765 f8/18:0.99/0.98 feat:a<b>&\"'x\n")
    for name in ("cov", "int", "independent", "random"):
        picture(exp / "generated" / f"sample_0_{name}.jpg")
    picture(exp / "reconstructed_eval" / "sample_3_0.jpg")
    picture(exp / "PR.png")
    text = "run,accuracy,alignment,explicitness\n"
    text += "".join(
        f"logs/sprites__X/{name},0.9{k},0.{k}55,0.{k}77\n" for k, name in enumerate(("glancenet", "cbnm", "untrained"))
    )
    write(out / "glancenet/evaluation/runs.csv", text)
    for name in ("gif_random.gif", "traverse_random.jpg", "latent_factor_matrix.png", "recon.jpg"):
        picture(out / "glancenet/pictures/glancenet" / name, name.endswith("gif"))
    summary = [
        {"model": model, "rejection": rejection, "leakage_percent": 12.5 + k, "rejected_percent": 31.25 + k}
        for k, model in enumerate(("cbnm", "glancenet"))
        for rejection in ("none", "both checks", "distance")
    ]
    write(out / "glancenet/parity/results.json", json.dumps({"summary": summary}))
    summary = [{**row, "rejection": row["rejection"].removesuffix(" checks")} for row in summary]
    write(out / "glancenet/leakage/leakage.json", json.dumps({"summary": summary}))
    picture(out / "glancenet/leakage/pca.png")
    picture(out / "glancenet/parity/leakage.png")
    kinds = ("model", "unmoved", "identity", "black")
    errors = {name: {kind: {"mean": 100.5 + k} for k, kind in enumerate(kinds)} for name in ("scale", "hue")}
    write(out / "latent_flow/run/eval.json", json.dumps({"equivariance": errors}))
    for name in ("scale.gif", "hue.gif", "rotation_then_hue.gif", "scale.png"):
        picture(out / "latent_flow/run/pictures" / name, name.endswith("gif"))
    for layer in ("inverse", "none"):
        write(out / f"inv_flow/{layer}/metrics.csv", "step,test_bpd\n1,3.25\n2,\n3,2.171717\n4,\n")
        picture(out / f"inv_flow/{layer}/samples/30.png")
    picture(out / "inv_flow/inverse/recon/30.png")
    write(out / "inv_flow/inverse/config.json", '{"levels": 17}')
    write(out / "inv_flow/inverse/evaluation.json", '{"recon_max_grey": 2.1e-05}')
    config = {"dataset_name": "digits", "dataset_info": {"digits": {"num_classes": 10}}}
    flow = out / "nfpi/flow/version_0"
    write(flow / "results.json", json.dumps({"config": config, "nf": {"acc": 0.9861111}, "cnn": {"1.0": 0.9305}}))
    write(out / "nfpi/real/version_0/results.json", json.dumps({"config": config, "cnn": {"1.0": 0.97123}}))
    write(flow / "fpi_epoch0000.csv", "iteration,kl_min,kl_mean,kl_max\n0,6.89,16.7,30.7\n1,200.1,250.2,381.5\n")
    for name in (*(f"samples_{c}" for c in range(10)), "tsne_latents", "fpi_epoch0000"):
        picture(flow / "pictures" / f"{name}.png")
    picture(flow / "0_exp_0_T1.0/nf_datasets/confusion.png")


NASTY = "<script>alert(1)</script> \"q\" 'q' & </pre>"


def outcomes(out: Path) -> list[Outcome]:
    """Finished papers, their markers written."""
    made = []
    for number, name in enumerate(gallery.SECTIONS):
        record = {"digest": name, "finished": True, "paper": name, "name": NASTY, "command": f"echo {NASTY}",
                  "seconds": 60.5 + number, "cpu_seconds": 30.25}  # fmt: skip
        write(out / "steps" / name / "1-step.json", json.dumps(record))
        made.append(Outcome(Paper(name, (), NASTY), [record]))
    return made


class Cells(HTMLParser):
    """The cells of the tables with their attributes, the addresses of the pictures, and all tags."""

    def __init__(self, page: str):
        super().__init__()
        self.cells, self.pictures, self.tags, self._open = [], [], [], None
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        if tag == "td":
            self._open = [dict(attributes), ""]
        if tag == "img":
            self.pictures.append(dict(attributes))

    def handle_endtag(self, tag):
        if tag == "td":
            self.cells.append(tuple(self._open))
            self._open = None

    def handle_data(self, data):
        if self._open:
            self._open[1] += data


def check_numbers(out: Path, page: Cells) -> int:
    """Every number of the page stands in the file that it names; returns how many there are."""
    found = 0
    for attributes, text in page.cells:
        if "data-source" not in attributes:
            assert not re.match(r"\s*-?[\d.]", text), f"{text!r} comes from nowhere"
            continue
        found += 1
        raw = attributes["data-raw"]
        source = (out / attributes["data-source"]).read_text()
        assert re.search(rf"(?<![\w.-]){re.escape(raw)}(?![\w.])", source), (raw, attributes["data-source"])
        value = gallery.FORMULAS[attributes.get("data-formula", "")](float(raw))
        digits = re.match(r"-?\d+(\.\d*)?", text)[0]
        assert abs(float(digits) - value) <= 0.5000001 * 10 ** -len(digits.partition(".")[2]), (text, raw)
    return found


def loaded_pictures(page: Path, profile: Path) -> dict[str, int]:
    """natural width of each picture of a page in headless Chromium; 0 when it does not load."""
    if not CHROMIUM:
        pytest.skip("no Chromium on this machine: install the package chromium to see the page in a browser")
    probe = """<pre id=probe></pre><script>addEventListener("load", () => {
        const all = [...document.images].map(i => [i.getAttribute("src"), i.complete ? i.naturalWidth : 0]);
        document.getElementById("probe").textContent = JSON.stringify(all); });</script>"""
    copy = page.with_name("probe.html")
    copy.write_text(page.read_text().replace("</body>", f"{probe}</body>"))
    command = [CHROMIUM, *FLAGS.split(), f"--user-data-dir={profile}", copy.as_uri()]
    result = subprocess.run(command, capture_output=True, text=True, timeout=240)
    copy.unlink()
    text = re.search(r"<pre id=\"probe\">(.*?)</pre>", result.stdout, re.S)
    assert text and text[1], f"Chromium did not run the page: {result.stderr[-500:]}"
    return dict(json.loads(text[1].replace("&amp;", "&")))


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    out = tmp_path_factory.mktemp("gallery") / "a folder & 100%"
    fake_runs(out)
    path, failures = gallery.write_page(out, outcomes(out), {"DATA_ROOT": "/x y"})
    assert not failures
    return path


def test_every_number_stands_in_the_file_that_it_names(page):
    parsed = Cells(page.read_text())
    assert check_numbers(page.parent, parsed) >= 50
    formulas = {attributes.get("data-formula") for attributes, _ in parsed.cells}
    assert formulas >= set(gallery.FORMULAS) - {""}
    shown = dict(zip([t for _, t in parsed.cells], parsed.cells[1:], strict=False))
    assert any("4.087" in text for _, text in shown.values())  # log2(17): the uniform guess
    # a number that was changed on the way is found
    broken = page.read_text().replace('data-raw="0.98765"', 'data-raw="0.98764"')
    with pytest.raises(AssertionError, match="0\\.98764"):
        check_numbers(page.parent, Cells(broken))


def test_text_from_files_and_commands_is_escaped(page):
    text = page.read_text()
    assert "script" not in Cells(text).tags and "<script>alert" not in text
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &quot;q&quot; &#x27;q&#x27; &amp; &lt;/pre&gt;" in text
    assert "a&lt;b&gt;&amp;&quot;&#x27;x" in text  # the name of the features in results.txt
    assert "<b>" not in text


def test_pictures_are_beside_the_page_and_described(page):
    pictures = Cells(page.read_text()).pictures
    assert len(pictures) >= 30 and sum(p["src"].endswith(".gif") for p in pictures) == 4
    for attributes in pictures:
        assert attributes["alt"].strip() and attributes["src"].startswith("pictures/")
        assert (page.parent / attributes["src"]).is_file()
    assert not re.search(r"(src|href)=\"?(https?:|//|/)", page.read_text())  # nothing from a network or this machine


def test_every_picture_loads_in_chromium_and_a_broken_one_is_noticed(page, tmp_path):
    moved = tmp_path / "moved elsewhere"
    shutil.copytree(page.parent, moved)  # the folder is complete in itself
    widths = loaded_pictures(moved / "index.html", tmp_path / "profile1")
    assert len(widths) == len(Cells(page.read_text()).pictures)
    assert all(width == 12 for width in widths.values()), widths
    gif, png = (next(src for src in widths if src.endswith(kind)) for kind in (".gif", ".png"))
    (moved / gif).write_bytes((moved / gif).read_bytes()[:9])
    (moved / png).unlink()
    widths = loaded_pictures(moved / "index.html", tmp_path / "profile2")
    assert {src for src, width in widths.items() if width == 0} == {gif, png}


def test_an_unreadable_result_costs_its_own_section_only(page, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(page.parent, out)
    (out / "nfpi/flow/version_0/results.json").write_text("{")
    (out / "latent_flow/run/pictures/scale.png").unlink()  # one picture fewer is no failure
    path, failures = gallery.write_page(out, outcomes(out))
    assert [name for name, _ in failures] == ["nfpi"]
    text = path.read_text()
    assert "Not complete: page: JSONDecodeError" in text and "Fréchet distance" in text


# --------------------------------------------------------------------------------------------------------------- real
TINY = {
    "epochs_max=40": "epochs_max=1", "width=16": "width=4", "zsize=64": "zsize=16", "batch_size=32": "batch_size=128",
    "epochs_max=6": "epochs_max=1", "train_images=20000": "train_images=500", "train_images=2000": "train_images=100",
    "test_images=2000": "test_images=100", "--max_epoch": "1", "--max_iter": "1", "--test_iter": "10",
    "--metric_train": "60", "--metric_eval": "30", "--max-iter": "3", "--images": "20", "--epochs": "1",
    "--sample_epochs": "1", "--eval_epochs": "1", "--block_size": "1",
}  # fmt: skip


def tiny(paper: Paper) -> Paper:
    """The steps with sizes of a test."""
    steps = []
    for step in paper.steps:
        words = [TINY.get(word, word) if "=" in word else word for word in step.words]
        words = [
            TINY.get(before, word) if "=" not in word else word
            for before, word in zip(["", *words], words, strict=False)
        ]
        if "nfpi/main.py" in words:
            words += ["train.epochs=1", "num_flows=[1,1]", "classification.digits.epochs=1", "num_imgs_scale=0.1"]
        makes = tuple(name.replace("/30.png", "/1.png") for name in step.makes)
        steps.append(dataclasses.replace(step, words=tuple(words), makes=makes))
    return dataclasses.replace(paper, steps=tuple(steps))


def run_tiny(tmp_path: Path, names: list[str], mnist: Path | None = None) -> Path:
    out = tmp_path / "quickstart"
    papers = quickstart.plan(os.path.relpath(out, ROOT), mnist is not None)
    runner = Runner(out, {**quickstart.environment(out, mnist), "PYTHON": sys.executable})
    done = runner.run([tiny(paper) for paper in papers if paper.name in names], jobs=1)
    assert [(o.paper.name, o.error) for o in done if o.error] == []
    path, failures = gallery.write_page(out, done)
    assert not failures
    assert check_numbers(out, Cells(path.read_text())) >= 6 * len(names)
    for attributes in Cells(path.read_text()).pictures:
        assert (out / attributes["src"]).stat().st_size > 50
    return path


def test_one_paper_for_real(tmp_path):
    run_tiny(tmp_path, ["inv_flow"])


@pytest.mark.slow
def test_all_papers_for_real_and_their_page_in_chromium(tmp_path):
    path = run_tiny(tmp_path, list(gallery.SECTIONS))
    widths = loaded_pictures(path, tmp_path / "profile")
    assert len(widths) >= 25 and all(widths.values()), widths


@pytest.mark.slow
@pytest.mark.data
def test_papers_with_real_mnist_for_real(tmp_path):
    path = run_tiny(tmp_path, ["lbae", "glancenet", "latent_flow"], quickstart.find_mnist())
    assert "Leakage on MNIST" in path.read_text()
