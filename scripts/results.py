"""Write RESULTS.md from the rows in results/*.json, check it, add rows.

    python scripts/results.py                      write RESULTS.md
    python scripts/results.py --check              exit code 2 and one line per problem
    python scripts/results.py --paper lbae         print one paper's part, write nothing
    python scripts/results.py --list               one line per row: state, id, what it is
    python scripts/results.py --add new.json       add or fill in rows, then write RESULTS.md ("-" reads standard input)

A row is one number of one model (`KEYS` below says what each key holds). `ours` is null while nobody has run it: such
rows are what is left to do. To report a run, write a snippet and `--add` it:

    {"id": "inv_flow/t3-inverse", "ours": [1.31, 1.30, 1.32], "protocol": "full", "n": 10000,
     "hardware": "one H200", "minutes": 95, "command": "python inv_flow/inv_flow_mnist.py"}

The id names the row to fill in; keys that are left out stay as they are; `date` and `commit` default to today and HEAD.
A reduced run gets a row of its own beside the one still to do: {"like": "inv_flow/t3-inverse", "id":
"inv_flow/t3-inverse-small", "protocol": "small: 5 epochs", ...} copies what is left out from the row `like`. Several
rows at once: {"common": {keys of all}, "rows": [{...}, {...}]}. A measured row is only changed with --replace.
"""

import argparse
import datetime
import json
import math
import re
import shlex
import statistics
import subprocess
import sys
from pathlib import Path, PurePosixPath
from typing import Any, NoReturn

from common.errors import UserError, run_command, suggest

ROOT = Path(__file__).resolve().parents[1]

PAPERS = {  # file stem -> heading, in the order of RESULTS.md
    "lbae": "LBAE: Latent Bernoulli Autoencoder (ICML 2020)",
    "glancenet": "GlanceNets (NeurIPS 2022)",
    "latent_flow": "Latent flow: Flow Factorized Representation Learning (NeurIPS 2023), Sparse Transformations",
    "inv_flow": "Inverse-Flow (AISTATS 2025)",
    "nfpi": "NFPI: class Gaussians by fixed point iteration (BMVC 2024)",
}

TEXT, NUMBER, COUNT, NULL = "text", "number", "whole number", "null"
KEYS: dict[str, tuple[str, ...]] = {
    "id": (TEXT,),  # <paper>/<short name>, unique
    "paper": (TEXT,),  # a key of PAPERS, the name of the row's file
    "table": (TEXT,),  # the paper's table, figure or claim; rows of one table stand together
    "setting": (TEXT,),  # model and variant: the line of the table
    "data": (TEXT,),  # data set and split on which the number was measured
    "metric": (TEXT,),  # the column of the table
    "unit": (TEXT,),  # "" when it has none
    "direction": (TEXT,),  # higher or lower is better, or neither
    "decimals": (COUNT,),  # printed
    "paper_value": (NUMBER, NULL),
    "paper_std": (NUMBER, NULL),
    "paper_where": (TEXT,),  # where the value stands, or why there is none
    "ours": ("a list of numbers, one a seed", NULL),  # or {"mean", "std", "seeds"} when single seeds were not kept
    "n": (COUNT, NULL),  # evaluated items
    "protocol": (TEXT,),  # "full": as the paper; "small: <what is smaller>"; "differs: <what is different>"
    "hardware": (TEXT, NULL),
    "minutes": (NUMBER, NULL),  # of one seed's training; null when it was not noted
    "command": (TEXT,),  # from the repository's root; several lines are allowed
    "date": (TEXT, NULL),  # of the report, YYYY-MM-DD
    "commit": (TEXT, NULL),  # the state of the repository that was run or that reported it
    "note": (TEXT,),  # printed below the table; "" for none
}
DIRECTIONS = {"higher": " ↑", "lower": " ↓", "neither": ""}
MEASURED_KEYS = ("hardware", "date", "commit")  # of a measured row; null in a row still to do
NOT_RUN = "not yet run"

Row = dict[str, Any]


# ---------------------------------------------------------------------------------------------- reading and checking


def read_json(text: str, name: str) -> Any:
    """Strict JSON: no NaN, no infinite number, no key twice. Raises UserError naming the file."""

    def no_constant(word: str) -> NoReturn:
        raise ValueError(f"{word} is not a number of a result")

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) < len(items):
            keys = [key for key, _ in items]
            raise ValueError(f"key {next(key for key in keys if keys.count(key) > 1)!r} stands twice")
        return found

    try:
        return json.loads(text, parse_constant=no_constant, object_pairs_hook=pairs)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}: {error}") from error


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def has_type(value: Any, kinds: tuple[str, ...]) -> bool:
    tests = {
        TEXT: lambda: isinstance(value, str),
        NUMBER: lambda: is_number(value),
        COUNT: lambda: is_number(value) and isinstance(value, int) and value >= 0,
        NULL: lambda: value is None,
    }
    return any(tests[kind]() for kind in kinds if kind in tests)


def is_summary(value: Any) -> bool:
    if not isinstance(value, dict) or set(value) != {"mean", "std", "seeds"}:
        return False
    seeds = value["seeds"]
    return is_number(value["mean"]) and is_number(value["std"]) and has_type(seeds, (COUNT,)) and seeds >= 1


def validate(row: Any, where: str) -> Row:
    """The row itself when it keeps to `KEYS`. Raises UserError (one line) naming `where`, the row and the key."""
    if not isinstance(row, dict):
        raise UserError(f"{where}: a row is an object with the keys {', '.join(KEYS)}")
    where = f"{where}, row {row['id']!r}" if isinstance(row.get("id"), str) else where
    for key in row:
        if key not in KEYS:
            raise UserError(f"{where}: unknown key {key!r}{suggest(key, KEYS)}")
    for key, kinds in KEYS.items():
        if key not in row:
            raise UserError(f"{where}: key {key!r} is missing")
        value = row[key]
        if key == "ours":
            several = isinstance(value, list) and len(value) > 0 and all(map(is_number, value))
            fine = value is None or several or is_summary(value)
            kinds = (*kinds, '{"mean", "std", "seeds"}')
        else:
            fine = has_type(value, kinds)
        if not fine:
            raise UserError(f"{where}: {key} is {json.dumps(value)}, not {' or '.join(kinds)}")
    for key in ("table", "setting", "data", "metric", "paper_where", "protocol", "command"):
        if not row[key].strip():
            raise UserError(f"{where}: {key} is empty")
    for key in set(KEYS) - {"command"}:
        if isinstance(row[key], str) and "\n" in row[key]:
            raise UserError(f"{where}: {key} has more than one line")
    if row["paper"] not in PAPERS:
        raise UserError(f"{where}: unknown paper {row['paper']!r}{suggest(row['paper'], PAPERS)}")
    if not re.fullmatch(rf"{row['paper']}/[\w.+-]+", row["id"]):
        raise UserError(f"{where}: the id must be {row['paper']}/<letters, digits, - . _ +>")
    if row["direction"] not in DIRECTIONS:
        raise UserError(f"{where}: direction is {row['direction']!r}, not {', '.join(DIRECTIONS)}")
    if not re.fullmatch(r"full|(small|differs): \S.*", row["protocol"]):
        raise UserError(f"{where}: protocol is {row['protocol']!r}, not full, small: ... or differs: ...")
    if row["paper_std"] is not None and row["paper_value"] is None:
        raise UserError(f"{where}: paper_std without paper_value")
    for key in MEASURED_KEYS:
        if (row[key] is None) != (row["ours"] is None):
            state = "is measured: it needs" if row["ours"] is not None else "is not yet run: it cannot have"
            raise UserError(f"{where}: the row {state} {key}")
    if row["ours"] is None and row["minutes"] is not None:
        raise UserError(f"{where}: the row is not yet run: it cannot have minutes")
    if row["date"] is not None:
        try:
            datetime.date.fromisoformat(row["date"])
        except ValueError:
            raise UserError(f"{where}: date is {row['date']!r}, not YYYY-MM-DD") from None
    if row["commit"] is not None and not re.fullmatch(r"[0-9a-f]{7,40}", row["commit"]):
        raise UserError(f"{where}: commit is {row['commit']!r}, not 7 to 40 hexadecimal digits")
    return row


def read_rows(root: Path) -> list[Row]:
    """All rows of root/results/*.json in the order of PAPERS, then of the file. Raises UserError."""
    folder = root / "results"
    for path in sorted(folder.glob("*.json")):
        if path.stem not in PAPERS:
            raise UserError(f"results/{path.name}: no paper of that name{suggest(path.stem, PAPERS)}")
    rows: list[Row] = []
    for paper in PAPERS:
        path = folder / f"{paper}.json"
        name = f"results/{path.name}"
        try:
            text = path.read_text(encoding="utf-8")
        except FileNotFoundError:
            continue
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{name}: {error}") from error
        found = read_json(text, name)
        if not isinstance(found, list):
            raise UserError(f"{name}: not a list of rows")
        for row in found:
            if validate(row, name)["paper"] != paper:
                raise UserError(f"{name}, row {row['id']!r}: a row of paper {row['paper']!r} in this file")
            rows.append(row)
    if not rows:
        raise UserError(f"no rows in {folder}: results/<paper>.json holds them")
    check_unique(rows)
    return rows


def check_unique(rows: list[Row]) -> None:
    """Raises UserError when two rows have one id, or would fill one cell of RESULTS.md."""
    ids: set[str] = set()
    cells: dict[tuple, str] = {}
    for row in rows:
        if row["id"] in ids:
            raise UserError(f"results/{row['paper']}.json: two rows have the id {row['id']!r}")
        ids.add(row["id"])
        cell = (*line_key(row), row["table"], row["paper"], column_key(row))
        if cell in cells:
            raise UserError(f"results/{row['paper']}.json: {cells[cell]!r} and {row['id']!r} say the same thing twice")
        cells[cell] = row["id"]


def missing_files(command: str, root: Path) -> list[str]:
    """Scripts, modules, sweep manifests and shipped weights that `command` names and the repository does not have.

    `cd FOLDER` is followed, so that `cd lbae/exp && ../../eval.sh` means root/eval.sh.
    """
    missing = []
    here = PurePosixPath()
    for line in command.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
        lexer.whitespace_split, lexer.commenters = True, "#"
        try:
            words = list(lexer)
        except ValueError as error:
            return [f"{line!r} ({error})"]
        for before, word in zip(["", *words], words, strict=False):
            if before == "cd":
                here = _normal(here / word)
            elif before == "-m" and re.fullmatch(r"[A-Za-z_][\w.]*", word):
                if word.split(".")[0] in ("pip", "pytest", "venv"):
                    continue
                path = root / word.replace(".", "/")
                if not (path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()):
                    missing.append(word)
            elif re.search(r"\.(py|sh)$", word) or re.match(r"(\.\./)*(sweeps|checkpoints)/", word):
                path = PurePosixPath(word.split("=", 1)[-1])
                if not (root / _normal(here / path)).is_file():
                    missing.append(word)
    return missing


def _normal(path: PurePosixPath) -> PurePosixPath:
    parts: list[str] = []
    for part in path.parts:
        if part == ".." and parts and parts[-1] != "..":
            parts.pop()
        elif part != ".":
            parts.append(part)
    return PurePosixPath(*parts)


# ------------------------------------------------------------------------------------------------------- RESULTS.md


def mean_std(ours: Any) -> tuple[float, float, int]:
    """Mean, sample standard deviation (0 for one seed) and number of seeds of a measured row's `ours`."""
    if isinstance(ours, dict):
        return ours["mean"], ours["std"], ours["seeds"]
    return statistics.fmean(ours), statistics.stdev(ours) if len(ours) > 1 else 0.0, len(ours)


def our_cell(row: Row) -> str:
    if row["ours"] is None:
        return NOT_RUN
    mean, std, seeds = mean_std(row["ours"])
    digits = row["decimals"]
    return f"{mean:.{digits}f}" if seeds == 1 else f"{mean:.{digits}f} ± {std:.{digits}f} ({seeds})"


def paper_cell(row: Row) -> str:
    if row["paper_value"] is None:
        return "–"
    spread = "" if row["paper_std"] is None else f" ± {row['paper_std']:g}"
    return f"{row['paper_value']:.10g}{spread}"


def line_key(row: Row) -> tuple:
    """Rows with one key are the numbers of one run: they stand in one line."""
    return tuple(row[key] for key in ("setting", "data", "protocol", "n", "command", "hardware", "minutes", "date"))


def column_key(row: Row) -> tuple[str, str, str]:
    return row["metric"], row["unit"], row["direction"]


def cell(text: str) -> str:
    return text.replace("|", "\\|")


def markdown_table(head: list[str], lines: list[list[str]]) -> list[str]:
    shown = [head, ["---"] * len(head), *lines]
    return ["| " + " | ".join(map(cell, line)) + " |" for line in shown]


class Commands:
    """Numbers the commands of a paper: one number for one command run once on one machine."""

    def __init__(self) -> None:
        self.known: dict[tuple, int] = {}

    def number(self, row: Row) -> int:
        key = (row["command"], row["hardware"], row["date"], row["commit"])
        return self.known.setdefault(key, len(self.known) + 1)

    def lines(self) -> list[str]:
        out = ["### Commands", ""]
        for (command, hardware, date, commit), number in self.known.items():
            state = f"{hardware}; {date}, commit {commit}" if commit else NOT_RUN
            out += [f"**[{number}]** {state}", "", "```bash", *command.splitlines(), "```", ""]
        return out


def table_section(rows: list[Row], commands: Commands) -> list[str]:
    """One table of one paper: a line a run, for each metric the paper's value beside ours."""
    columns = list(dict.fromkeys(map(column_key, rows)))
    with_paper = {column_key(row) for row in rows if row["paper_value"] is not None}
    runs: dict[tuple, list[Row]] = {}
    for row in rows:
        runs.setdefault(line_key(row), []).append(row)
    measured_first = sorted(runs.values(), key=lambda found: found[0]["ours"] is None)
    one_data = len({row["data"] for row in rows}) == 1
    facts = [key for key in ("n", "minutes") if any(row[key] is not None for row in rows)]
    head = ["model, setting"] if one_data else ["model, setting", "data"]
    for metric, unit, direction in columns:
        name = metric + (f", {unit}" if unit else "") + DIRECTIONS[direction]
        head += [f"{name}: paper", "ours"] if (metric, unit, direction) in with_paper else [name]
    head += ["protocol", *({"n": "items", "minutes": "minutes"}[key] for key in facts), "command"]
    lines = []
    for found in measured_first:
        first = found[0]
        line = [first["setting"]] if one_data else [first["setting"], first["data"]]
        by_column = {column_key(row): row for row in found}
        for column in columns:
            row = by_column.get(column)
            line += [paper_cell(row) if row else "–"] if column in with_paper else []
            line += [our_cell(row) if row else "–"]
        shown = {"n": "–" if first["n"] is None else f"{first['n']:,}"}
        shown["minutes"] = "–" if first["minutes"] is None else f"{first['minutes']:g}"
        line += [first["protocol"], *(shown[key] for key in facts), f"[{commands.number(first)}]"]
        lines.append(line)
    out = [f"### {rows[0]['table']}", ""]
    if one_data:
        out += [f"Data: {rows[0]['data']}.", ""]
    where = list(dict.fromkeys(row["paper_where"] for row in rows))
    out += [f"Paper: {'; '.join(where)}.", "", *markdown_table(head, lines), ""]
    notes = list(dict.fromkeys(row["note"] for row in rows if row["note"]))
    out += [f"* {note}" for note in notes] + ([""] if notes else [])
    return out


def paper_section(paper: str, rows: list[Row]) -> list[str]:
    """The part of one paper; `rows` are its rows."""
    commands = Commands()
    out = [f"## {PAPERS[paper]}", "", f"Details: [{paper}/README.md]({paper}/README.md).", ""]
    for table in dict.fromkeys(row["table"] for row in rows):
        out += table_section([row for row in rows if row["table"] == table], commands)
    return out + commands.lines()


HEAD = """\
# Results

Numbers of the papers beside numbers measured with this repository. This file is generated: `python scripts/results.py`
writes it from the rows in [`results/`](results), `python scripts/results.py --check` fails when a number here has no
row. The docstring of [`scripts/results.py`](scripts/results.py) says what a row holds and how to add one.

How to read it:

* **Reproduced** means protocol *full*: the paper's model, data, training length and evaluation, whatever the number
  says.
* **small** means that the same code ran on the paper's kind of data, but with a smaller network, fewer iterations or
  fewer images, as the line says. Such a number shows that the method works and how it orders; it is no number of the
  paper's table and neither confirms nor refutes it. **differs** means another protocol or a number beside the paper's
  tables, as the line says.
* **not yet run** means what it says; the command of the line would make the number. These lines are the list of what is
  left to do.
* "a ± b (k)" is mean and sample standard deviation over k seeds; a number alone is one seed. Minutes are those of one
  training, "–" when they were not noted. Items are the evaluated images, sequences or samples. ↑ higher is better, ↓
  lower.
* "–" in a column of the paper: the paper gives no such number, or it could not be read from the paper's own text; the
  line above each table says where the values stand. Numbers that could not be verified are left out.

Commands run from the repository's root after `bash scripts/setup.sh`; data are prepared as
[data/README.md](data/README.md) says. Sweeps over seeds and settings: [`scripts/sweep.py`](scripts/sweep.py) with the
manifests in [`sweeps/`](sweeps).
"""


def render(rows: list[Row]) -> str:
    """RESULTS.md as a text; a pure function of the rows."""
    out = [HEAD]
    head = ["paper", "reproduced (full)", "small or different", NOT_RUN]
    lines = []
    for paper in dict.fromkeys(row["paper"] for row in rows):
        mine = [row for row in rows if row["paper"] == paper]
        run = [row for row in mine if row["ours"] is not None]
        full = sum(row["protocol"] == "full" for row in run)
        lines.append([PAPERS[paper], str(full), str(len(run) - full), str(len(mine) - len(run))])
    out += ["Numbers in this file:", "", *markdown_table(head, lines), ""]
    for paper in dict.fromkeys(row["paper"] for row in rows):
        out += paper_section(paper, [row for row in rows if row["paper"] == paper])
    return "\n".join(out).rstrip() + "\n"


# ---------------------------------------------------------------------------------------------------------- checking


def parse_tables(text: str) -> list[tuple[int, str, list[str]]]:
    """Every table line of a Markdown text: line number, heading above it, cells. Code blocks hold no tables."""
    found, heading, paper, code = [], "", "", False
    for number, line in enumerate(text.splitlines(), start=1):
        if line.startswith("```"):
            code = not code
        elif code:
            continue
        elif line.startswith("#"):
            name = line.lstrip("# ")
            paper = name if line.startswith("## ") else paper
            heading = name if line.startswith("## ") else f"{paper} / {name}"
        elif line.lstrip().startswith("|"):
            cells = [part.strip() for part in re.split(r"(?<!\\)\|", line.strip())[1:-1]]
            found.append((number, heading, cells))
    return found


def compare(text: str, expected: str) -> list[str]:
    """What is wrong with the text of RESULTS.md, given what the rows make; one line a problem."""
    if text == expected:
        return []
    right: dict[str, list[list[str]]] = {}
    for _, heading, cells in parse_tables(expected):
        right.setdefault(heading, []).append(cells)
    problems = []
    for number, heading, cells in parse_tables(text):
        known = right.get(heading, [])
        if cells in known:
            continue
        alike = [line for line in known if len(line) == len(cells)]
        nearest = max(alike, key=lambda line: sum(a == b for a, b in zip(line, cells, strict=True)), default=None)
        if nearest is None:
            problems.append(f"RESULTS.md:{number}: no row gives the line {cells[0]!r} of the table {heading!r}")
            continue
        for mine, theirs in zip(cells, nearest, strict=True):
            if mine != theirs:
                problems.append(
                    f"RESULTS.md:{number}: {mine!r} in the line {cells[0]!r} of the table {heading!r} has no row; "
                    f"the nearest row gives {theirs!r}"
                )
    found = [(heading, cells) for _, heading, cells in parse_tables(text)]
    for _, heading, cells in parse_tables(expected):
        if (heading, cells) not in found:
            problems.append(f"RESULTS.md lacks the line {cells[0]!r} of the table {heading!r}")
    if not problems:
        pairs = zip([*text.splitlines(), ""], [*expected.splitlines(), ""], strict=False)
        number = next((i for i, (a, b) in enumerate(pairs, start=1) if a != b), 1)
        problems.append(f"RESULTS.md:{number}: differs from what the rows give")
    return problems


def check(root: Path, rows: list[Row]) -> list[str]:
    """All problems of RESULTS.md and of the rows' commands, one line each."""
    path = root / "RESULTS.md"
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        problems = [f"RESULTS.md cannot be read: {error}"]
    else:
        problems = compare(text, render(rows))
        if problems:
            problems.append("write it again: python scripts/results.py")
    lost: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        for name in missing_files(row["command"], root):
            lost.setdefault((row["paper"], name), []).append(row["id"])
    for (paper, name), ids in lost.items():
        others = f" and {len(ids) - 1} more" if len(ids) > 1 else ""
        problems.append(f"results/{paper}.json, row {ids[0]!r}{others}: the command names {name}: no such file")
    return problems


# ------------------------------------------------------------------------------------------------------ adding rows


def snippet_rows(snippet: Any, where: str) -> list[Row]:
    """The partial rows of a snippet: one, a list, or {"common": ..., "rows": [...]}."""
    if isinstance(snippet, dict) and "rows" in snippet:
        shared, snippet = snippet.get("common", {}), snippet["rows"] if set(snippet) <= {"rows", "common"} else None
        if not isinstance(shared, dict) or not isinstance(snippet, list):
            raise UserError(f'{where}: several rows are {{"common": {{...}}, "rows": [...]}}')
    else:
        shared = {}
    snippet = snippet if isinstance(snippet, list) else [snippet]
    if not snippet or not all(isinstance(row, dict) and isinstance(row.get("id"), str) for row in snippet):
        raise UserError(f'{where}: every row of a snippet is an object with an "id"')
    return [{**shared, **row} for row in snippet]


def add(rows: list[Row], new: Row, where: str, replace: bool, stamp: dict[str, str]) -> list[Row]:
    """`rows` with the partial row `new` filled in or inserted; `stamp` holds the defaults of date and commit."""
    by_id = {row["id"]: row for row in rows}
    name = f"{where}, row {new['id']!r}"
    source = new.pop("like", new["id"])
    if not isinstance(source, str) or (source != new["id"] and source not in by_id):
        raise UserError(f"{name}: no row {source!r} to copy from{suggest(str(source), by_id)}")
    old = by_id.get(new["id"])
    if source != new["id"] and old is not None and not replace:
        raise UserError(f"{name}: there is such a row already; --replace overwrites it")
    if old is not None and old["ours"] is not None and not replace:
        raise UserError(f"{name}: already measured; --replace overwrites it")
    if new.get("ours") is not None:
        if "protocol" not in new:
            raise UserError(f"{name}: say in protocol whether it is full, small: ... or differs: ...")
        if old is not None and old["ours"] is None and old["protocol"] == "full" != new["protocol"]:
            like = f'give this one an id of its own and "like": {source!r}'
            raise UserError(f"{name}: the full run stays to do: {like}")
        new = {**stamp, **new}
    base = by_id.get(source, {"note": "", "paper_std": None, "paper": new["id"].split("/")[0]})
    if base.get("ours") is not None and "minutes" not in new:
        base = {**base, "minutes": None}
    row = validate({"minutes": None, "n": None, **base, **new}, where)
    if old is not None:
        return [row if other is old else other for other in rows]
    same = [i for i, other in enumerate(rows) if other["table"] == row["table"] and other["paper"] == row["paper"]]
    at = rows.index(by_id[source]) + 1 if source in by_id else (same[-1] + 1 if same else len(rows))
    return [*rows[:at], row, *rows[at:]]


def stamp_of(root: Path) -> dict[str, str]:
    """Defaults of a new row: today and the commit that is checked out (left out without git)."""
    stamp = {"date": datetime.date.today().isoformat()}
    try:
        asked = ["git", "-C", str(root), "rev-parse", "--short=7", "HEAD"]
        stamp["commit"] = subprocess.run(asked, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        pass
    return stamp


def write(path: Path, text: str) -> None:
    from common.checkpoint import atomic_write  # imports torch: only a call that writes should wait for it

    with atomic_write(path) as file:
        file.write(text.encode())


def write_rows(root: Path, rows: list[Row], papers: set[str]) -> None:
    for paper in sorted(papers):
        mine = [{key: row[key] for key in KEYS} for row in rows if row["paper"] == paper]
        write(root / "results" / f"{paper}.json", json.dumps(mine, indent=1, ensure_ascii=False) + "\n")


# ----------------------------------------------------------------------------------------------------------- command


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (python scripts/results.py --help)")


def make_parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="write nothing; exit code 2 when something does not fit")
    what.add_argument("--add", nargs="+", metavar="FILE", help="JSON snippets of rows; - is standard input")
    what.add_argument("--list", action="store_true", help="print state, id, setting and metric of every row")
    parser.add_argument("--paper", help="print this paper's part only; with --list, list it only")
    parser.add_argument("--replace", action="store_true", help="let --add change measured rows")
    parser.add_argument("--root", type=Path, default=ROOT, help="another checkout of the repository")
    return parser


def main(argv: list[str] | None = None) -> None:
    """The command. Raises UserError; --check prints its problems on stderr first."""
    args = make_parser().parse_args(argv)
    root = args.root
    if args.replace and not args.add:
        raise UserError("--replace goes with --add")
    if args.paper is not None and (args.check or args.add):
        raise UserError("--paper goes with --list or alone")
    if args.paper is not None and args.paper not in PAPERS:
        raise UserError(f"unknown paper {args.paper!r}{suggest(args.paper, PAPERS)}: one of {', '.join(PAPERS)}")
    rows = read_rows(root)
    shown = [row for row in rows if args.paper in (None, row["paper"])]
    if args.list:
        for row in shown:
            state = "to do" if row["ours"] is None else row["protocol"].split(":")[0]
            print(f"{state:8}{row['id']:48} {row['setting']}: {row['metric']} ({row['data']})")
    elif args.paper is not None:
        print("\n".join(paper_section(args.paper, shown)).rstrip())
    elif args.check:
        problems = check(root, rows)
        if problems:
            for line in problems[:-1]:
                print(f"error: {line}", file=sys.stderr)
            raise UserError(problems[-1])
        print(f"RESULTS.md fits its {len(rows)} rows")
    else:
        changed: set[str] = set()
        for name in args.add or ():
            try:
                text = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
            except (OSError, UnicodeDecodeError) as error:
                raise UserError(f"{name}: {error}") from error
            stamp = stamp_of(root)
            for new in snippet_rows(read_json(text, name), name):
                rows = add(rows, new, name, args.replace, stamp)
                changed.add(new["id"].split("/")[0])
        if changed:
            check_unique(rows)
            for row in rows:
                for lost in missing_files(row["command"], root) if row["paper"] in changed else ():
                    raise UserError(f"row {row['id']!r}: the command names {lost}: no such file in the repository")
            rows = [row for paper in PAPERS for row in rows if row["paper"] == paper]
            write_rows(root, rows, changed)
        write(root / "RESULTS.md", render(rows))
        print(f"wrote {root / 'RESULTS.md'}: {len(rows)} rows")


if __name__ == "__main__":
    sys.exit(run_command(main))
