"""scripts/results.py: strict rows, a generated RESULTS.md, a check that finds what no row gives. A few seconds."""

import hashlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from common.errors import UserError
from scripts import results, tables
from scripts.collect import load, lookup
from scripts.experiments import read_tables

ROOT = Path(__file__).resolve().parents[2]


def row(name: str = "t1-big-bpd", **changes) -> dict:
    """A complete row that is still to do."""
    base = {
        "id": f"inv_flow/{name}", "paper": "inv_flow", "table": "Table 1", "setting": "big", "data": "MNIST test",
        "metric": "bits/dim", "unit": "", "direction": "lower", "decimals": 2, "paper_value": 1.31, "paper_std": None,
        "paper_where": "table 1", "ours": None, "n": None, "protocol": "full", "hardware": None, "minutes": None,
        "command": "python inv_flow/flow.py", "date": None, "commit": None, "note": "", "source": None,
    }  # fmt: skip
    return {**base, **changes}


def measured(name: str = "t1-big-bpd", **changes) -> dict:
    known = {"ours": [1.0, 1.2, 1.4], "hardware": "a GPU", "date": "2026-01-02", "commit": "abcdef1", "n": 10000,
             "typed": True}  # fmt: skip
    return row(name, **{**known, **changes})


@pytest.fixture
def repository(tmp_path):
    """A repository with one script, and rows in two lines of one table."""
    (tmp_path / "results").mkdir()
    (tmp_path / "inv_flow").mkdir()
    (tmp_path / "inv_flow/flow.py").touch()
    store(
        tmp_path,
        measured(),
        row("t1-big-nll", metric="NLL", unit="nats", paper_value=None),
        row("t1-small", setting="small"),
    )
    results.main(["--root", str(tmp_path)])
    return tmp_path


def store(root: Path, *rows: dict) -> None:
    (root / "results/inv_flow.json").write_text(json.dumps(rows))


def check(root: Path) -> list[str]:
    return results.check(root, results.read_rows(root))


def add(root: Path, snippet, *argv: str) -> None:
    path = root / "snippet.json"
    path.write_text(json.dumps(snippet))
    results.main(["--root", str(root), "--add", str(path), *argv])


# -------------------------------------------------------------------------------------------------------- committed


def test_the_committed_results_fit_their_rows():
    rows = results.read_rows(ROOT)
    assert results.check(ROOT, rows) == []
    assert {row["paper"] for row in rows} == set(results.PAPERS)
    text = (ROOT / "RESULTS.md").read_text()
    assert tables.NOT_RUN in text and "small: width 16, 20 epochs" in text
    for path in re.findall(r"\]\(([^)#]+)\)", text):
        assert (ROOT / path).exists(), path


# ------------------------------------------------------------------------------------------------------------- rows


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"metrik": "x"}, "unknown key 'metrik' (did you mean 'metric'?)"),
        ({"metric": ...}, "key 'metric' is missing"),
        ({"n": 1.5}, "n is 1.5"),
        ({"n": True}, "n is true"),
        ({"n": -1}, "n is -1"),
        ({"decimals": None}, "decimals is null"),
        ({"minutes": "9"}, 'minutes is "9"'),
        ({"paper_value": "1.31"}, 'paper_value is "1.31"'),
        ({"ours": []}, "ours is []"),
        ({"ours": 1.3}, "ours is 1.3"),
        ({"ours": [1.3, None]}, "ours is [1.3, null]"),
        ({"ours": {"mean": 1.0, "std": 0.1}}, "ours is {"),
        ({"ours": {"mean": 1.0, "std": 0.1, "seeds": 0}}, "ours is {"),
        ({"setting": " "}, 'setting is " ", not one line'),
        ({"note": "a\nb"}, "not one line, printed below"),
        ({"paper": "inf_flow"}, 'paper is "inf_flow", not lbae, glancenet, latent_flow, inv_flow or nfpi'),
        ({"id": "t1"}, 'id is "t1", not <paper>/'),
        ({"id": "lbae/t1"}, "the id must be inv_flow/"),
        ({"direction": "down"}, 'direction is "down", not higher, lower or neither'),
        ({"protocol": "short"}, 'protocol is "short", not full, small:'),
        ({"protocol": "small: "}, 'protocol is "small: "'),
        ({"date": "2.1.2026"}, 'date is "2.1.2026", not YYYY-MM-DD'),
        ({"commit": "HEAD"}, 'commit is "HEAD", not 7 to 40'),
        ({"hardware": None}, "is measured: it needs hardware"),
        ({"typed": ...}, "its number comes from files"),
        ({"date": "2027-01-01"}, "no number is typed any more"),
        ({"source": {"folder": "runs/a"}}, "not null, or an object with folder, file, key and statistic"),
        ({"files": [{"path": "a", "sha256": "0" * 64, "value": 1.0}]}, "its files gave [1.0]"),
        ({"ours": None}, "not yet run: it cannot have"),
        (
            {"ours": None, "hardware": None, "date": None, "commit": None, "typed": ..., "minutes": 3},
            "it cannot have minutes",
        ),
        ({"paper_value": None, "paper_std": 1}, "paper_std without paper_value"),
    ],
)
def test_a_bad_row_is_one_line_naming_it(repository, change, message):
    bad = {key: value for key, value in measured(**change).items() if value is not ...}
    store(repository, bad)
    with pytest.raises(UserError) as caught:
        results.read_rows(repository)
    assert message in str(caught.value) and "results/inv_flow.json" in str(caught.value)


@pytest.mark.parametrize("text", ["", "[", "{}", "[1]", "[]x", '[{"a": 1, "a": 2}]', "[" * 100_000])
def test_damaged_files_are_user_errors(repository, text):
    (repository / "results/inv_flow.json").write_text(text)
    with pytest.raises(UserError, match=r"results/inv_flow\.json"):
        results.read_rows(repository)


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_numbers_that_are_none(repository, number):
    text = json.dumps([measured(ours=[77.125])]).replace("77.125", number)
    (repository / "results/inv_flow.json").write_text(text)
    with pytest.raises(UserError, match="results/inv_flow"):
        results.read_rows(repository)


def test_rows_that_cannot_stand_together(repository):
    store(repository, row(), row())
    with pytest.raises(UserError, match="two rows have the id"):
        results.read_rows(repository)
    store(repository, row("a"), row("b"))
    with pytest.raises(UserError, match="say the same thing twice"):
        results.read_rows(repository)
    store(repository, row())
    (repository / "results/inv_flows.json").write_text("[]")
    with pytest.raises(UserError, match="did you mean 'inv_flow'"):
        results.read_rows(repository)
    (repository / "results/inv_flows.json").rename(repository / "results/lbae.json")
    (repository / "results/lbae.json").write_text(json.dumps([row("other")]))
    with pytest.raises(UserError, match="a row of paper 'inv_flow' in this file"):
        results.read_rows(repository)


# ------------------------------------------------------------------------------------------------------- RESULTS.md


def test_the_page(repository):
    text = (repository / "RESULTS.md").read_text()
    lines = [line for line in text.splitlines() if line.startswith(("| model", "| big", "| small"))]
    assert lines == [
        "| model, setting | bits/dim ↓: paper | ours | NLL, nats ↓ | protocol | items | command |",
        "| big | 1.31 | 1.20 ± 0.20 (3) | – | full | 10,000 | [1] |",
        "| big | – | – | not yet run | full | – | [2] |",
        "| small | 1.31 | not yet run | – | full | – | [2] |",
    ]
    assert "**[1]** a GPU; 2026-01-02, commit abcdef1" in text and "python inv_flow/flow.py" in text
    assert check(repository) == []
    before = (repository / "RESULTS.md").stat()
    results.main(["--root", str(repository)])
    assert (repository / "RESULTS.md").read_text() == text and before.st_size == len(text.encode())


def test_mean_and_std_of_seeds():
    assert tables.mean_std([1.0, 1.2, 1.4]) == pytest.approx((1.2, 0.2, 3))
    assert tables.mean_std([2.5]) == (2.5, 0.0, 1)
    assert tables.our_cell(measured(ours={"mean": 3.14159, "std": 0.055, "seeds": 5}, decimals=1)) == "3.1 ± 0.1 (5)"
    assert tables.our_cell(measured(ours=[0.5])) == "0.50"
    assert tables.paper_cell(row(paper_value=52, paper_std=1.3)) == "52 ± 1.3"


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("1.20 ± 0.20 (3)", "1.02 ± 0.20 (3)", "'1.02 ± 0.20 (3)' in the line 'big'"),
        ("| 1.31 | not yet run", "| 1.31 | 1.30", "'1.30' in the line 'small'"),
        ("| 1.31 | not yet run", "| 1.13 | not yet run", "'1.13' in the line 'small'"),
        ("10,000", "100,000", "'100,000' in the line 'big'"),
        ("| small |", "| tiny |", "'tiny' in the line 'tiny'"),
        ("\n| small", "\n| huge | 9 |\n| small", "no row gives the line 'huge'"),
        ("Numbers of the papers", "Numbers of papers", "RESULTS.md:3: differs"),
        ("commit abcdef1", "commit abcdef2", "differs from what the rows give"),
    ],
)
def test_a_hand_edit_is_found_and_named(repository, old, new, message):
    path = repository / "RESULTS.md"
    assert path.read_text().count(old) == 1
    path.write_text(path.read_text().replace(old, new))
    problems = check(repository)
    assert message in problems[0] and len(problems) <= 3
    assert re.match(r"RESULTS\.md:\d+: ", problems[0]) and all("\n" not in line for line in problems)


def test_lost_copied_and_added_lines_are_found(repository):
    path = repository / "RESULTS.md"
    text = path.read_text()
    line = next(line for line in text.splitlines() if line.startswith("| small"))
    path.write_text(text.replace(line + "\n", ""))
    assert "lacks the line 'small'" in check(repository)[0]
    path.write_text(text.replace(line, f"{line}\n{line}"))
    assert "differs from what the rows give" in check(repository)[0]
    path.write_text(text + "\n## Mine\n\n| a | b |\n| --- | --- |\n| x | 0.5 |\n")
    assert "no row gives the line 'x' of the table 'Mine'" in "".join(check(repository))
    path.unlink()
    assert "cannot be read" in check(repository)[0]


def test_a_new_row_makes_the_page_out_of_date(repository):
    store(repository, *results.read_rows(repository), row("new", setting="new", paper_value=7))
    problems = check(repository)
    assert any("lacks the line 'new'" in line for line in problems) and "python scripts/results.py" in problems[-1]


@pytest.mark.parametrize(
    ("command", "missing"),
    [
        ("python inv_flow/flow.py --epochs 3", []),
        ("python inv_flow/flov.py", ["inv_flow/flov.py"]),
        ("SEED='0 1' bash scripts/a.sh x=1", ["scripts/a.sh"]),
        ("python -m inv_flow.flow", []),
        ("python -m inv_flow.nothing --x", ["inv_flow.nothing"]),
        ("cd inv_flow/run_1\n../flow.py && ../../eval.sh", ["../../eval.sh"]),
        ("cd inv_flow && python flow.py; python ../inv_flow/flow.py", []),
        ("python inv_flow/flow.py \\\n    --config other.py", ["other.py"]),
        ("python inv_flow/flow.py sweeps/a.yaml", ["sweeps/a.yaml"]),
        ("for i in $(seq 0 9); do\n    ln -s ../a/$((2 * i)).png b/$i.png\ndone", []),
        ("python 'a", ['"python \'a" (No closing quotation)']),
        ("python inv_flow/flow.py  # not other.py", []),
    ],
)
def test_files_that_a_command_names(repository, command, missing):
    assert results.missing_files(command, repository) == missing


def test_a_command_that_names_nothing_is_a_problem_of_its_row(repository):
    store(repository, row(command="python inv_flow/gone.py"))
    results.main(["--root", str(repository)])
    assert check(repository) == [
        "results/inv_flow.json, row 'inv_flow/t1-big-bpd': the command names inv_flow/gone.py: no such file"
    ]


# ------------------------------------------------------------------------------------------------------------ adding

SOURCE = {"folder": "runs/inv_flow/toy/small_{seed}", "file": "evaluation.json", "key": "test_bpd",
          "statistic": "mean and standard deviation over seeds"}  # fmt: skip


def test_rows_to_do_are_added_and_changed(repository):
    rows = [
        {"like": "inv_flow/t1-small", "id": "inv_flow/t1-small-5", "protocol": "small: 5 epochs", "source": SOURCE},
        {"id": "inv_flow/t1-small", "paper_value": 8.25},
        {"id": "inv_flow/t1-big-bpd", "note": "a note"},  # measured: what is no measurement may change
    ]
    add(repository, {"common": {"table": "Table 1"}, "rows": rows})
    found = {row["id"]: row for row in results.read_rows(repository)}
    assert list(found).index("inv_flow/t1-small-5") == list(found).index("inv_flow/t1-small") + 1
    assert found["inv_flow/t1-small-5"]["ours"] is None and found["inv_flow/t1-big-bpd"]["ours"] == [1.0, 1.2, 1.4]
    text = (repository / "RESULTS.md").read_text()
    assert "| small | 8.25 | not yet run |" in text and "* a note" in text and check(repository) == []


def test_a_copy_of_a_measured_row_takes_no_measurement_with_it(repository):
    add(repository, {"like": "inv_flow/t1-big-bpd", "id": "inv_flow/t1-big-2", "setting": "bigger"})
    new = next(row for row in results.read_rows(repository) if row["id"] == "inv_flow/t1-big-2")
    assert new["ours"] is None and new["hardware"] is None and new["n"] is None and "typed" not in new


@pytest.mark.parametrize(
    ("snippet", "message"),
    [
        ({"id": "inv_flow/t1-small", "ours": [1]}, "ours comes from a run: name its source, then --collect"),
        ({"id": "inv_flow/t1-big-bpd", "hardware": "a GPU"}, "hardware comes from a run"),
        ({"id": "inv_flow/t1-small", "typed": True}, "cannot have"),
        ({"id": "inv_flow/t1-small", "protocol": "full", "settin": 1}, "did you mean 'setting'"),
        ({"id": "inv_flow/new", "protocol": "full"}, "is missing"),
        ({"id": "inv_flow/new", "like": "inv_flow/t1-smal"}, "did you mean 'inv_flow/t1-small'"),
        ({"id": "inv_flow/t1-small", "like": "inv_flow/t1-big-bpd"}, "there is such a row already"),
        ({"id": "inv_flow/t1-small", "command": "python inv_flow/x.py"}, "the command names inv_flow/x.py"),
        ({"setting": "x"}, 'an object with an "id"'),
        ([], 'an object with an "id"'),
        ({"rows": [], "more": 1}, "several rows are"),
    ],
)
def test_a_bad_snippet_changes_nothing(repository, snippet, message):
    before = {path: path.read_bytes() for path in repository.rglob("*") if path.is_file() and path.suffix != ".py"}
    with pytest.raises(UserError, match=re.escape(message)):
        add(repository, snippet)
    assert all(path.read_bytes() == content for path, content in before.items())


# -------------------------------------------------------------------------------------------------------- collecting


def a_run(root: Path, seed: int, value: float, finished: bool = True, runs: str = "runs", **changes) -> Path:
    """A run as the engine leaves it: the numbers, and the record of what really ran."""
    folder = root / f"{runs}/inv_flow/toy/small_{seed}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "evaluation.json").write_text(json.dumps({"test_bpd": value, "images": 500}))
    step = {"commands": [f"python inv_flow/flow.py --seed {seed}"], "seconds": 60.0 * (seed + 1), "cpu_seconds": 1.0,
            "hardware": "a CPU, 2 of 2 threads", "commit": "1234567", "date": "2027-03-04", "finished": finished,
            "folder": ".", "digest": "x"}  # fmt: skip
    (folder / "record.json").write_text(json.dumps({"train": {**step, **changes}}))
    return folder


def with_source(root: Path, **changes) -> None:
    add(root, {"id": "inv_flow/t1-small", "source": {**SOURCE, **changes}})


def collect(root: Path, *argv: str) -> dict:
    results.main(["--root", str(root), "--collect", *argv])
    return next(row for row in results.read_rows(root) if row["id"] == "inv_flow/t1-small")


def test_a_row_is_filled_from_its_runs(repository):
    with_source(repository, n="images")
    for seed, value in ((0, 1.5), (1, 1.75), (10, 1.25)):
        a_run(repository, seed, value)
    a_run(repository, 11, 9.0, finished=False)  # still at work: its number is none yet
    (repository / "runs/inv_flow/toy/small_x").mkdir()
    row = collect(repository, "inv_flow/toy")
    assert row["ours"] == [1.5, 1.75, 1.25] and row["n"] == 500 and row["minutes"] == 4.67
    assert row["hardware"] == "a CPU, 2 of 2 threads" and row["commit"] == "1234567" and row["date"] == "2027-03-04"
    assert row["command"] == "python inv_flow/flow.py --seed 0\n# the same for small_1, small_10"
    digest = hashlib.sha256((repository / "runs/inv_flow/toy/small_10/evaluation.json").read_bytes()).hexdigest()
    assert row["files"][2] == {"path": "runs/inv_flow/toy/small_10/evaluation.json", "sha256": digest, "value": 1.25}
    assert "| small | 1.31 | 1.50 ± 0.25 (3) |" in (repository / "RESULTS.md").read_text() and check(repository) == []
    assert collect(repository) == row and collect(repository, "inv_flow") == row  # again: the same


def test_a_row_is_filled_from_the_records_that_are_kept(repository):
    with_source(repository, folder="results/runs/inv_flow/toy/small_{seed}")
    a_run(repository, 0, 1.5, runs="results/runs")
    row = collect(repository, "inv_flow/toy")
    assert row["ours"] == [1.5] and row["files"][0]["path"].startswith("results/runs/inv_flow/toy/small_0/")
    claim = {"number": 1, "paper": "inv_flow", "claim": "c", "where": "w", "tests": [{"better": row["id"], "than": 2}]}
    (repository / "results/claims.json").write_text(json.dumps([claim]))
    results.main(["--root", str(repository), "--claims"])
    assert "snakemake -s scripts/Snakefile --cores 2 results/inv_flow/toy\n" in (repository / "CLAIMS.md").read_text()


def test_a_typed_number_is_replaced_by_that_of_a_run(repository):
    store(repository, measured("t1-small", setting="small", learned=False))
    with_source(repository)
    a_run(repository, 0, 1.5)
    row = collect(repository, "inv_flow/t1-small")
    assert row["ours"] == [1.5] and "typed" not in row and "learned" not in row


def test_a_number_that_differs_from_its_file_fails_the_check(repository):
    with_source(repository)
    folder = a_run(repository, 0, 1.5)
    collect(repository, "inv_flow")
    rows = results.read_rows(repository)
    rows[-1]["ours"] = [1.4]  # by hand, beside the file's value
    store(repository, *rows)
    with pytest.raises(UserError, match=r"ours is \[1\.4\], its files gave \[1\.5\]"):
        results.read_rows(repository)
    rows[-1]["files"][0]["value"] = 1.4  # in both places: the file tells
    store(repository, *rows)
    results.main(["--root", str(repository)])
    assert "value 1.4, but runs/inv_flow/toy/small_0/evaluation.json has 1.5" in check(repository)[0]
    collect(repository, "inv_flow")
    (folder / "evaluation.json").write_text('{"test_bpd": 1.5, "more": 0}')
    assert "sha256" in check(repository)[0]
    shutil.rmtree(repository / "runs")  # another machine, where the run is not
    assert check(repository) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "evaluation.json"),
        ('{"test_bpd": "x"}', "holds no number test_bpd"),
        ('{"test_bpd": NaN}', "NaN is not a number"),
        ('{"other": 1}', "holds no number test_bpd"),
        ("[1, 2]", "holds no number test_bpd"),
    ],
)
def test_a_damaged_result_changes_nothing(repository, content, message):
    with_source(repository)
    (a_run(repository, 0, 1.5) / "evaluation.json").write_text(content)
    before = (repository / "results/inv_flow.json").read_bytes()
    with pytest.raises(UserError, match=re.escape(message)):
        collect(repository, "inv_flow")
    assert (repository / "results/inv_flow.json").read_bytes() == before


def test_a_run_without_a_record_and_an_unknown_name_are_refused(repository):
    with_source(repository)
    (a_run(repository, 0, 1.5) / "record.json").unlink()
    with pytest.raises(UserError, match=r"has no record\.json: start runs by the engine or scripts/job\.py"):
        collect(repository)
    with pytest.raises(UserError, match=r"no row with a source is called so \(did you mean 'inv_flow/t1-small'"):
        collect(repository, "inv_flow/t1-smal")


@pytest.mark.parametrize(
    ("data", "key", "value"),
    [
        ({"cnn": {"1.0": 0.5, "1": 2}}, "cnn.1.0", 0.5),
        ({"a": {"b": [{"k": "x", "v": 1}, {"k": "y", "v": 2}]}}, "a.b[k=x].v", 1),
        ([{"step": "1", "bpd": "3.5"}, {"step": "2", "bpd": ""}], "bpd", 3.5),
        ([{"m": "a", "n": "1", "v": "1"}, {"m": "a", "n": "2", "v": "7"}], "[m=a,n=1].v", 1),
        ([{"name": "reco", "features": "inception", "fid": 2.5}], "[name=reco,features=inception].fid", 2.5),
    ],
)
def test_keys_of_a_source(data, key, value):
    assert lookup(data, key) == value
    with pytest.raises(KeyError):
        lookup(data, key + "x")


def test_a_star_is_the_mean_over_what_stands_there():
    data = {"equivariance": {"scale": {"mean": 1.0}, "hue": {"mean": 4.0}}}
    assert lookup(data, "equivariance.*.mean") == 2.5 and lookup({"std": [[1, 2], [3, 6]]}, "std.*.*") == 3
    with pytest.raises(KeyError):
        lookup(data, "equivariance.*.median")


def test_lbae_results_are_read(tmp_path):
    path = tmp_path / "results.txt"
    path.write_text(
        "e:3 loss_eval:70.5 nref:9 reco ntest:9 fid:1.5 kid_mean:0.2 samples_cov ntest:9 fid:2.5 f8/18:0.7/0.8\n"
    )
    data = load(path)
    assert lookup(data, "[name=samples_cov].f1_8") == 0.8 and lookup(data, "[name=reco].kid_mean") == 0.2
    assert lookup(data, "loss_eval") == 70.5 and lookup(data, "[name=reco].ntest") == 9


def test_every_row_to_do_has_a_source_or_is_known_to_have_none():
    """Of the rows nobody has run yet, the engine makes all but those whose number no result file holds."""
    rows = [row for row in results.read_rows(ROOT) if row["ours"] is None]
    without = [row["id"] for row in rows if row["source"] is None]
    assert set(without) <= {"inv_flow/op-gpu-forward", "inv_flow/op-gpu-both"}  # a summary over shapes
    names = {f"{table.paper}/{table.name}": table for table in read_tables()}
    for row in rows:
        if row["source"]:
            paper, name, experiment = row["source"]["folder"].removeprefix("results/").removeprefix("runs/").split("/")
            table = names[f"{paper}/{name}"]
            fitting = [one for one in table.experiments if re.fullmatch(experiment.replace("{seed}", r"\d+"), one)]
            assert fitting, row["id"]
            assert row["command"].endswith(f"results/{paper}/{name}")


def test_the_readme_counts_the_numbers():
    text = (ROOT / "README.md").read_text()
    rows = results.read_rows(ROOT)
    full, small, left = tables.counts(rows)
    assert f"{full} were measured at the paper's size, {small} by smaller or different runs, {left} are not" in text
    assert results.counted(text.replace(f"{full} were", "7 were"), rows) == text
    assert full + small + left == len(rows)


def test_adding_from_standard_input(repository, monkeypatch):
    snippet = {"id": "inv_flow/t1-small", "paper_value": 8.25}
    monkeypatch.setattr(sys, "stdin", io.StringIO(json.dumps(snippet)))
    results.main(["--root", str(repository), "--add", "-"])
    assert "| small | 8.25 | not yet run |" in (repository / "RESULTS.md").read_text()


# ----------------------------------------------------------------------------------------------------------- command


def test_print_one_paper_and_list(repository, capsys):
    before = (repository / "RESULTS.md").read_text()
    results.main(["--root", str(repository), "--paper", "inv_flow"])
    assert capsys.readouterr().out.rstrip() in before
    results.main(["--root", str(repository), "--list"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["full", "to", "to"] and "inv_flow/t1-small" in lines[2]
    for argv in (
        ["--paper", "inv_flo"],
        ["--paper", "lbae", "--check"],
        ["--replace"],
        ["--chek"],
        ["--add", "none.json"],
    ):
        with pytest.raises(UserError):
            results.main(["--root", str(repository), *argv])


def test_the_command_itself(repository):
    """Exit codes and lines of the real command on an edited page."""
    words = [sys.executable, str(ROOT / "scripts/results.py"), "--root", str(repository), "--check"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    good = subprocess.run(words, env=env, capture_output=True, text=True)
    assert good.returncode == 0 and good.stdout == "RESULTS.md fits its 3 rows\n"
    path = repository / "RESULTS.md"
    path.write_text(path.read_text().replace("1.20 ± 0.20", "1.25 ± 0.20"))
    bad = subprocess.run(words, env=env, capture_output=True, text=True)
    assert bad.returncode == 2 and bad.stdout == ""
    lines = bad.stderr.splitlines()
    assert all(line.startswith("error: ") for line in lines) and "'1.25 ± 0.20 (3)'" in lines[0]
    shutil.rmtree(repository / "results")
    none = subprocess.run(words, env=env, capture_output=True, text=True)
    assert none.returncode == 2 and none.stderr.startswith("error: no rows in ") and none.stderr.count("\n") == 1
