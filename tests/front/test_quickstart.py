"""The quickstart: its runner (stub commands), its page (numbers, escaping, pictures in Chromium), one paper for real.

About 25 s, most of it two tiny real flows; the slow test runs all papers in tiny.
"""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml

from common.images import save_gif, save_image
from scripts import experiments, gallery, quickstart
from scripts.experiments import read_tables

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
FLAGS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync --virtual-time-budget=10000 --dump-dom"
)


# ---------------------------------------------------------------------------------------------------------------- job
def job(folder: Path, run: str, makes: str = "a", **more) -> tuple[int, str]:
    """One call of scripts/job.py for the step of a toy manifest, as its rule makes it: exit code and output."""
    manifest = folder / "sweeps/quickstart/toy.yaml"
    manifest.parent.mkdir(parents=True, exist_ok=True)
    step = {"name": "first", "run": run, "makes": [makes], **more}
    manifest.write_text(yaml.dump({"about": "a toy", "data": "toy", "out": "out/toy", "gpus": 0, "steps": [step]}))
    words = [sys.executable, str(ROOT / "scripts/job.py"), str(manifest), "all", "first"]
    done = subprocess.run(words, cwd=folder, capture_output=True, text=True, timeout=120)
    return done.returncode, done.stdout + done.stderr


def record_of(folder: Path) -> dict:
    return json.loads((folder / "out/toy/record.json").read_text())["first"]


def test_a_step_keeps_the_record_of_what_ran(tmp_path):
    code, text = job(tmp_path, "python -c \"open('a', 'w').write('x'); print('hello')\"")
    assert code == 0 and re.search(r"(?m)^\[\d\d:\d\d toy\]   hello$", text)
    record = record_of(tmp_path)
    assert record["finished"] and record["seconds"] >= 0 and record["cpu_seconds"] >= 0 and record["hardware"]
    assert len(record["commands"]) == 1 and shlex.split(record["commands"][0])[:2] == ["python", "-c"]
    assert (tmp_path / "out/toy/first.log").read_text().endswith("hello\n")


def test_a_failing_step_says_why_and_a_missing_product_is_a_failure(tmp_path):
    code, text = job(tmp_path, "python -c \"import sys; print('why'); sys.exit(3)\"\npython -c \"open('a', 'w')\"")
    assert code == 3 and "FAILED, exit code 3; log: out/toy/first.log" in text
    record = record_of(tmp_path)
    assert not record["finished"] and record["last"] == "why" and not (tmp_path / "a").exists()
    code, text = job(tmp_path, "python -c 1")
    assert code == 2 and "first ended without writing a" in text and not record_of(tmp_path)["finished"]
    code, text = job(tmp_path, "no-such-program x")
    assert code == 2 and "cannot start no-such-program" in text


def test_another_command_begins_anew_and_the_same_one_goes_on(tmp_path):
    adds = "python -c \"import pathlib; open('runs', 'a').write('{} '); pathlib.Path('a').touch()\""
    (tmp_path / "state").write_text("of somebody else")
    assert job(tmp_path, adds.format(1), clears=["state"])[0] == 0
    assert (tmp_path / "state").exists()  # no step of ours has run before: nothing of ours to remove
    assert job(tmp_path, adds.format(1), clears=["state"])[0] == 0 and (tmp_path / "state").exists()
    assert job(tmp_path, adds.format(2), clears=["state"])[0] == 0 and not (tmp_path / "state").exists()
    (tmp_path / "out/toy/record.json").write_text("{")  # a damaged record counts as none
    assert job(tmp_path, adds.format(2))[0] == 0 and record_of(tmp_path)["finished"]


def test_silence_is_filled(tmp_path):
    (tmp_path / "metrics.csv").write_text("step,epoch,loss\n7,2,0.5\n")
    code = (
        f"import sys; sys.path[:0] = [{str(ROOT)!r}]; from scripts import job; job.QUIET = 0.5; job.BEGIN -= 61;"
        "one = job.Job(job.Path('out'), 'talks', 'work', 'metrics.csv');"
        "words = [sys.executable, '-c', 'import time; print(1, flush=True); time.sleep(2.5); print(2, end=str())'];"
        "sys.exit(one.run([words], job.Path(), 'x', dict(job.os.environ)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert all(re.match(r"\[01:\d\d talks\] ", line) for line in done.stdout.splitlines())
    assert re.search(r"work is running, \d s, epoch 2, step 7", done.stdout)
    assert (tmp_path / "out/work.log").read_text().splitlines()[1:] == ["1", "2"]


# ---------------------------------------------------------------------------------------------------------- command
def script(*words: str, **more: str) -> subprocess.CompletedProcess:
    command = ["bash", str(ROOT / "scripts/quickstart.sh"), *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=60, env={**os.environ, **more})


def test_wrong_words_are_told_before_anything_is_installed(tmp_path):
    environment = {"PYTHON": sys.executable, "VENV": str(tmp_path / "venv")}
    for words, text in (
        (["--paper", "lbea"], "no paper 'lbea' (did you mean 'lbae'?); there are glancenet"),
        (["--papre", "x"], "--papre"),
        (["--jobs", "0"], "0"),
    ):
        result = script(*words, **environment)
        assert result.returncode == 2 and text in result.stderr, result
        assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1 and not result.stdout
    result = script("--help", **environment)
    assert result.returncode == 0 and "--fresh" in result.stdout and "--paper NAME" in result.stdout
    assert not (tmp_path / "venv").exists()


def quick_tables():
    return [table for table in read_tables() if table.paper == "quickstart"]


def test_the_plan_runs_documented_commands_of_all_papers():
    tables = quick_tables()
    assert {table.name.split("_parity")[0] for table in tables} == set(quickstart.PAPERS) == set(content())
    for table in tables:
        name = next(name for name in quickstart.PAPERS if table.name.startswith(name))
        readme = (ROOT / name / "README.md").read_text()
        for experiment in table.experiments:
            for step in table.steps:
                folder = table.fill(step.folder, experiment)
                for words in table.commands(experiment, step):
                    target = f"{words[2].replace('.', '/')}.py" if words[1] == "-m" else words[1]
                    path = Path(os.path.normpath(Path(folder) / target))
                    assert words[0] in ("python", "bash") and (ROOT / path).is_file(), words
                    assert path.name in readme or path.stem in readme, f"{path} is not in {name}/README.md"
                for text in (*step.makes, *step.clears):
                    assert table.fill(text, experiment).startswith(f"results/quickstart/{name}/")
    ignored = subprocess.run(["git", "check-ignore", "-q", "results/quickstart/index.html"], cwd=ROOT)
    assert ignored.returncode in (0, 128)  # 128: not a git checkout


def test_mnist_is_used_when_all_its_files_are_there(tmp_path, monkeypatch):
    monkeypatch.setenv("DATA_ROOT", str(tmp_path))
    table = next(table for table in quick_tables() if table.name == "lbae")
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for name in experiments.MNIST_FILES[:3]:
        (raw / f"{name}.gz").touch()
    assert experiments.find_mnist() is None and table.chosen() == "digits"
    (raw / experiments.MNIST_FILES[3]).touch()
    assert experiments.find_mnist() == tmp_path and table.chosen() == "mnist"


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
        for k, model in enumerate(("cbnm", "vae", "glancenet"))
        for rejection in ("none", "both checks", "distance")
    ]
    write(out / "glancenet/parity/results.json", json.dumps({"summary": summary}))
    summary = [{**row, "rejection": row["rejection"].removesuffix(" checks")} for row in summary]
    summary += [{**summary[0], "model": "cg-vae"}]
    write(out / "glancenet/leakage/leakage.json", json.dumps({"summary": summary}))
    picture(out / "glancenet/leakage/pca.png")
    picture(out / "glancenet/parity/leakage.png")
    kinds = ("model", "unmoved", "identity", "black", "linear")
    errors = {
        name: {kind: {"mean": 100.5 + k} for k, kind in enumerate(kinds)} for name in ("scale", "rotation", "hue")
    }
    write(out / "latent_flow/run/eval.json", json.dumps({"equivariance": errors}))
    for name in ("scale.gif", "rotation.gif", "hue.gif", "scale.png"):
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


def content() -> dict:
    return yaml.safe_load((ROOT / "scripts/templates/quickstart.yaml").read_text())


def records(out: Path, tables: list) -> None:
    """Records of finished steps, with a hostile command."""
    for number, table in enumerate(tables):
        entry = {
            "finished": True,
            "seconds": 60.5 + number,
            "cpu_seconds": 30.25,
            "commands": [f"echo {NASTY}"],
            "folder": ".",
        }
        path = out / table.out("").removeprefix("results/quickstart/") / "record.json"
        write(path, json.dumps({step.name: entry for step in table.steps}))


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
    tables = quick_tables()
    records(out, tables)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(experiments.Table, "possible", lambda table: True)  # real MNIST, too
        patch.setenv("DATA_ROOT", "/x y")
        assert gallery.write_page(out, tables) == []
    return out / "index.html"


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
    assert "&lt;script&gt;alert(1)&lt;/script&gt; &#34;q&#34; &#39;q&#39; &amp; &lt;/pre&gt;" in text
    assert "a&lt;b&gt;" not in text  # the name of the features in results.txt
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
    failures = gallery.write_page(out)
    assert [name for name, _ in failures] == ["nfpi"]
    text = (out / "index.html").read_text()
    assert "Not complete: page: JSONDecodeError" in text and "Fréchet distance" in text


def test_a_paper_that_failed_is_shown_with_its_reason(page, tmp_path):
    out = tmp_path / "out"
    shutil.copytree(page.parent, out)
    path = out / "nfpi/record.json"
    record = json.loads(path.read_text())
    record["train_cnn_on_real_images"] |= {"finished": False, "exit": 1, "last": "no <memory>"}
    path.write_text(json.dumps(record))
    assert gallery.write_page(out) == [("nfpi", "train cnn on real images: exit code 1: no <memory>")]
    text = (out / "index.html").read_text()
    assert "Not complete: train cnn on real images: exit code 1: no &lt;memory&gt;" in text and "<memory>" not in text
    shutil.rmtree(out / "lbae")  # a paper that nobody asked for is not on the page
    gallery.write_page(out)
    assert 'id="lbae"' not in (out / "index.html").read_text()


# --------------------------------------------------------------------------------------------------------------- real
TINY = {
    "epochs_max=20": "epochs_max=1", "width=16": "width=4", "zsize=64": "zsize=16", "batch_size=32": "batch_size=128",
    "--max_epoch 24": "--max_epoch 1", "--max_epoch 15": "--max_epoch 1", "--test_iter 210": "--test_iter 10",
    "--metric_train 1000": "--metric_train 60", "--metric_eval 500": "--metric_eval 30",
    "--max-iter 1300": "--max-iter 3", "--test_images 1500": "--test_images 100",
    "--images 280": "--images 20", "--epochs 20": "--epochs 1", "--eval_epochs 5": "--eval_epochs 1",
    "--sample_epochs 20": "--sample_epochs 1", "--block_size 4": "--block_size 1",
    "only_T=1": "only_T=1 train.epochs=1 num_flows=[1,1] num_imgs_scale=0.1", "digits.epochs=5": "digits.epochs=1",
}  # fmt: skip


def run_tiny(tmp_path: Path, names: list[str]) -> Path:
    """The quickstart's own command on manifests with sizes of a test."""
    out, sweeps = tmp_path / "quick start", tmp_path / "sweeps/quickstart"
    sweeps.mkdir(parents=True)
    for path in (ROOT / "sweeps/quickstart").iterdir():
        text = path.read_text()
        for old, new in TINY.items():
            text = text.replace(old, new)
        (sweeps / path.name).write_text(text)
    words = [word for name in names for word in ("--paper", name)]
    command = [sys.executable, str(ROOT / "scripts/quickstart.py"), "--out", str(out), "--jobs", "1", *words]
    environment = {**os.environ, "SWEEPS": str(tmp_path / "sweeps"), "DATA_ROOT": str(tmp_path)}
    for turn in range(2):
        done = subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment)
        assert done.returncode == 0 and f"open {os.path.relpath(out, ROOT)}/index.html" in done.stdout, (
            done.stdout + done.stderr
        )
        assert turn == 0 or "done in" not in done.stdout  # a second call skips all steps
    path = out / "index.html"
    assert check_numbers(out, Cells(path.read_text())) >= 6 * len(names)
    for attributes in Cells(path.read_text()).pictures:
        assert (out / attributes["src"]).stat().st_size > 50
    return path


def test_one_paper_for_real(tmp_path):
    run_tiny(tmp_path, ["inv_flow"])


@pytest.mark.slow
def test_all_papers_for_real_and_their_page_in_chromium(tmp_path):
    path = run_tiny(tmp_path, list(quickstart.PAPERS))
    widths = loaded_pictures(path, tmp_path / "profile")
    assert len(widths) >= 25 and all(widths.values()), widths
