"""scripts/results.py: strict rows, a generated RESULTS.md, a check that finds what no row gives. A few seconds."""

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
from scripts import results

ROOT = Path(__file__).resolve().parents[2]


def row(name: str = "t1-big-bpd", **changes) -> dict:
    """A complete row that is still to do."""
    base = {
        "id": f"inv_flow/{name}", "paper": "inv_flow", "table": "Table 1", "setting": "big", "data": "MNIST test",
        "metric": "bits/dim", "unit": "", "direction": "lower", "decimals": 2, "paper_value": 1.31, "paper_std": None,
        "paper_where": "table 1", "ours": None, "n": None, "protocol": "full", "hardware": None, "minutes": None,
        "command": "python inv_flow/flow.py", "date": None, "commit": None, "note": "",
    }  # fmt: skip
    return {**base, **changes}


def measured(name: str = "t1-big-bpd", **changes) -> dict:
    known = {"ours": [1.0, 1.2, 1.4], "hardware": "a GPU", "date": "2026-01-02", "commit": "abcdef1", "n": 10000}
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
    assert results.NOT_RUN in text and "small: width 16, 20 epochs" in text
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
        ({"setting": " "}, "setting is empty"),
        ({"note": "a\nb"}, "note has more than one line"),
        ({"paper": "inf_flow"}, "unknown paper 'inf_flow' (did you mean 'inv_flow'?)"),
        ({"id": "t1"}, "the id must be inv_flow/"),
        ({"direction": "down"}, "direction is 'down'"),
        ({"protocol": "short"}, "protocol is 'short'"),
        ({"protocol": "small: "}, "protocol is 'small: '"),
        ({"date": "2.1.2026"}, "date is '2.1.2026'"),
        ({"commit": "HEAD"}, "commit is 'HEAD'"),
        ({"hardware": None}, "is measured: it needs hardware"),
        ({"ours": None}, "not yet run: it cannot have"),
        ({"ours": None, "hardware": None, "date": None, "commit": None, "minutes": 3}, "it cannot have minutes"),
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
    assert results.mean_std([1.0, 1.2, 1.4]) == pytest.approx((1.2, 0.2, 3))
    assert results.mean_std([2.5]) == (2.5, 0.0, 1)
    assert results.our_cell(measured(ours={"mean": 3.14159, "std": 0.055, "seeds": 5}, decimals=1)) == "3.1 ± 0.1 (5)"
    assert results.our_cell(measured(ours=[0.5])) == "0.50"
    assert results.paper_cell(row(paper_value=52, paper_std=1.3)) == "52 ± 1.3"


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


def test_fill_a_row(repository):
    snippet = {"id": "inv_flow/t1-small", "ours": [1.5, 1.7], "protocol": "full", "n": 500, "hardware": "a CPU",
               "minutes": 12, "date": "2026-03-04", "commit": "1234567"}  # fmt: skip
    add(repository, snippet)
    assert check(repository) == []
    new = next(row for row in results.read_rows(repository) if row["id"] == "inv_flow/t1-small")
    assert new == row("t1-small", setting="small") | snippet
    assert "| small | 1.31 | 1.60 ± 0.14 (2) | – | full | 500 | 12 |" in (repository / "RESULTS.md").read_text()


def test_a_small_run_stands_beside_the_full_one(repository):
    shared = {"protocol": "small: 5 epochs", "hardware": "a CPU", "n": 100, "minutes": 3, "date": "2026-03-04",
              "commit": "1234567"}  # fmt: skip
    rows = [
        {"like": "inv_flow/t1-small", "id": "inv_flow/t1-small-5", "ours": [2.0]},
        {"like": "inv_flow/t1-big-nll", "id": "inv_flow/t1-small-5-nll", "setting": "small", "ours": [999]},
    ]
    add(repository, {"common": shared, "rows": rows})
    ids = [row["id"] for row in results.read_rows(repository)]
    assert ids.index("inv_flow/t1-small-5") == ids.index("inv_flow/t1-small") + 1
    text = (repository / "RESULTS.md").read_text()
    assert "| small | 1.31 | 2.00 | 999.00 | small: 5 epochs | 100 | 3 |" in text
    assert "| small | 1.31 | not yet run |" in text and check(repository) == []


def test_date_and_commit_have_defaults(repository):
    identity = ["-c", "user.name=n", "-c", "user.email=e"]
    for words in (["init", "-q"], [*identity, "commit", "-q", "--allow-empty", "-m", "x"]):
        subprocess.run(["git", "-C", str(repository), *words], check=True)
    head = subprocess.run(["git", "-C", str(repository), "rev-parse", "HEAD"], capture_output=True, text=True).stdout
    add(repository, {"id": "inv_flow/t1-small", "ours": [1], "protocol": "full", "hardware": "a CPU"})
    new = next(row for row in results.read_rows(repository) if row["id"] == "inv_flow/t1-small")
    assert head.startswith(new["commit"]) and re.fullmatch(r"\d{4}-\d\d-\d\d", new["date"])


@pytest.mark.parametrize(
    ("snippet", "message"),
    [
        ({"id": "inv_flow/t1-big-bpd", "ours": [1], "protocol": "full"}, "already measured; --replace"),
        ({"id": "inv_flow/t1-small", "ours": [1]}, "say in protocol"),
        ({"id": "inv_flow/t1-small", "ours": [1], "protocol": "small: x"}, "the full run stays to do"),
        ({"id": "inv_flow/t1-small", "ours": [1], "protocol": "full", "hardvare": 1}, "did you mean 'hardware'"),
        ({"id": "inv_flow/new", "ours": [1], "protocol": "full"}, "is missing"),
        ({"id": "inv_flow/new", "like": "inv_flow/t1-smal"}, "did you mean 'inv_flow/t1-small'"),
        ({"id": "inv_flow/t1-small", "like": "inv_flow/t1-big-bpd"}, "there is such a row already"),
        ({"id": "inv_flow/t1-small", "command": "python inv_flow/x.py"}, "the command names inv_flow/x.py"),
        ({"ours": [1]}, 'an object with an "id"'),
        ([], 'an object with an "id"'),
        ({"rows": [], "more": 1}, "several rows are"),
    ],
)
def test_a_bad_snippet_changes_nothing(repository, snippet, message):
    before = {path: path.read_bytes() for path in repository.rglob("*") if path.is_file() and path.suffix != ".py"}
    with pytest.raises(UserError, match=re.escape(message)):
        add(repository, snippet)
    assert all(path.read_bytes() == content for path, content in before.items())


def test_replace(repository):
    fresh = {"id": "inv_flow/t1-big-bpd", "ours": [9.0], "protocol": "full", "date": "2026-05-06", "commit": "7654321"}
    add(repository, fresh, "--replace")
    text = (repository / "RESULTS.md").read_text()
    assert "| big | 1.31 | 9.00 |" in text and "1.20" not in text and check(repository) == []


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
    for argv in (["--paper", "inv_flo"], ["--paper", "lbae", "--check"], ["--replace"], ["--chek"]):
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
