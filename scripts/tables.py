"""RESULTS.md as a function of the rows in results/*.json, through templates/RESULTS.md.j2."""

import re
import statistics
from pathlib import Path
from typing import Any

import jinja2

ROOT = Path(__file__).resolve().parents[1]
PAPERS = {  # file stem -> heading, in the order of RESULTS.md
    "lbae": "LBAE: Latent Bernoulli Autoencoder (ICML 2020)",
    "glancenet": "GlanceNets (NeurIPS 2022)",
    "latent_flow": "Latent flow: Flow Factorized Representation Learning (NeurIPS 2023), Sparse Transformations",
    "inv_flow": "Inverse-Flow (AISTATS 2025)",
    "nfpi": "NFPI: class Gaussians by fixed point iteration (BMVC 2024)",
}
NOT_RUN = "not yet run"
ARROWS = {"higher": " ↑", "lower": " ↓", "neither": ""}

Row = dict[str, Any]


def mean_std(ours: Any) -> tuple[float, float, int]:
    """Mean, sample standard deviation (0 for one seed) and number of seeds of a measured row's `ours`."""
    if isinstance(ours, dict):
        return ours["mean"], ours["std"], ours["seeds"]
    return statistics.fmean(ours), statistics.stdev(ours) if len(ours) > 1 else 0.0, len(ours)


def our_cell(row: Row) -> str:
    if row["ours"] is None:
        return NOT_RUN
    mean, std, seeds = mean_std(row["ours"])
    digits, mark = row["decimals"], "" if row.get("learned", True) else " °"
    return (f"{mean:.{digits}f}" if seeds == 1 else f"{mean:.{digits}f} ± {std:.{digits}f} ({seeds})") + mark


def paper_cell(row: Row) -> str:
    if row["paper_value"] is None:
        return "–"
    return f"{row['paper_value']:.10g}" + ("" if row["paper_std"] is None else f" ± {row['paper_std']:g}")


def line_key(row: Row) -> tuple:
    """Rows with one key are the numbers of one run: they stand in one line."""
    return tuple(row[key] for key in ("setting", "data", "protocol", "n", "command", "hardware", "minutes", "date"))


def column_key(row: Row) -> tuple[str, str, str]:
    return row["metric"], row["unit"], row["direction"]


def markdown(head: list[str], lines: list[list[str]]) -> str:
    """A table."""
    shown = [[cell.replace("|", "\\|") for cell in line] for line in [head, ["---"] * len(head), *lines]]
    return "\n".join("| " + " | ".join(line) + " |" for line in shown)


def table_part(rows: list[Row], number: Any) -> dict[str, Any]:
    """One table of one paper: a line a run, for each metric the paper's value beside ours."""
    columns = list(dict.fromkeys(map(column_key, rows)))
    with_paper = {column_key(row) for row in rows if row["paper_value"] is not None}
    runs: dict[tuple, list[Row]] = {}
    for row in rows:
        runs.setdefault(line_key(row), []).append(row)
    one_data = len({row["data"] for row in rows}) == 1
    facts = [key for key in ("n", "minutes") if any(row[key] is not None for row in rows)]
    head = ["model, setting"] if one_data else ["model, setting", "data"]
    for column in columns:
        name = column[0] + (f", {column[1]}" if column[1] else "") + ARROWS[column[2]]
        head += [f"{name}: paper", "ours"] if column in with_paper else [name]
    head += ["protocol", *({"n": "items", "minutes": "minutes"}[key] for key in facts), "command"]
    lines = []
    for found in sorted(runs.values(), key=lambda found: found[0]["ours"] is None):
        first, by_column = found[0], {column_key(row): row for row in found}
        line = [first["setting"]] if one_data else [first["setting"], first["data"]]
        for column in columns:
            row = by_column.get(column)
            line += [paper_cell(row) if row else "–"] if column in with_paper else []
            line += [our_cell(row) if row else "–"]
        shown = {"n": f"{first['n']:,}" if first["n"] is not None else "–"}
        shown["minutes"] = "–" if first["minutes"] is None else f"{first['minutes']:g}"
        lines.append([*line, first["protocol"], *(shown[key] for key in facts), f"[{number(first)}]"])
    where = "; ".join(dict.fromkeys(row["paper_where"] for row in rows))
    notes = list(dict.fromkeys(row["note"] for row in rows if row["note"]))
    return {"name": rows[0]["table"], "data": rows[0]["data"] if one_data else "", "where": where, "head": head,
            "lines": lines, "notes": notes}  # fmt: skip


def paper_part(paper: str, rows: list[Row]) -> dict[str, Any]:
    """The part of one paper; a command has one number for one machine and day."""
    known: dict[tuple, int] = {}

    def number(row: Row) -> int:
        return known.setdefault(tuple(row[key] for key in ("command", "hardware", "date", "commit")), len(known) + 1)

    tables = [[row for row in rows if row["table"] == name] for name in dict.fromkeys(row["table"] for row in rows)]
    parts = [table_part(mine, number) for mine in tables]
    states = [(f"{hardware}; {date}, commit {commit}" if commit else NOT_RUN) for _, hardware, date, commit in known]
    commands = [
        {"number": n, "state": state, "text": key[0].rstrip("\n")}
        for (key, n), state in zip(known.items(), states, strict=True)
    ]
    return {"name": paper, "title": PAPERS[paper], "tables": parts, "commands": commands}


def counts(rows: list[Row]) -> tuple[int, int, int]:
    """Numbers at paper size, of small or different runs, and not yet run."""
    run = [row for row in rows if row["ours"] is not None]
    full = sum(row["protocol"] == "full" for row in run)
    return full, len(run) - full, len(rows) - len(run)


def render(rows: list[Row], only: str = "") -> str:
    """RESULTS.md, or one paper's part of it, as a text; a pure function of the rows."""
    mine = {
        paper: [row for row in rows if row["paper"] == paper] for paper in dict.fromkeys(row["paper"] for row in rows)
    }
    folder = jinja2.FileSystemLoader(ROOT / "scripts/templates")
    pages = jinja2.Environment(loader=folder, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    text = pages.get_template("RESULTS.md.j2").render(
        papers=[paper_part(paper, found) for paper, found in mine.items()], table=markdown,
        typed=sum("typed" in row for row in rows),
        counts={"head": ["paper", "reproduced (full)", "small or different", NOT_RUN],
                "lines": [[PAPERS[paper], *map(str, counts(found))] for paper, found in mine.items()]},
    )  # fmt: skip
    text = text.rstrip() + "\n"
    if not only:
        return text
    start = text.index(f"## {PAPERS[only]}")
    return text[start : text.find("\n## ", start) + 1 or None]


def table_lines(text: str) -> list[tuple[int, str, list[str]]]:
    """Every table line of a Markdown text: line number, headings above it, cells. Code blocks hold no tables."""
    found, heading, paper = [], "", ""
    text = re.sub(r"(?ms)^```.*?^```", lambda code: "\n" * code[0].count("\n"), text)
    for number, line in enumerate(text.splitlines(), start=1):
        if line.startswith("#"):
            name = line.lstrip("# ")
            paper = name if line.startswith("## ") else paper
            heading = name if line.startswith("## ") else f"{paper} / {name}"
        elif line.startswith("|"):
            found.append((number, heading, [part.strip() for part in re.split(r"(?<!\\)\|", line.strip())[1:-1]]))
    return found


def compare(text: str, expected: str) -> list[str]:
    """What is wrong with the text of RESULTS.md, given what the rows make; one line a problem."""
    right = [(heading, cells) for _, heading, cells in table_lines(expected)]
    there = table_lines(text)
    problems = []
    for number, heading, cells in there:
        if (heading, cells) in right:
            continue
        alike = [line for name, line in right if name == heading and len(line) == len(cells)]
        if not alike:
            problems.append(f"RESULTS.md:{number}: no row gives the line {cells[0]!r} of the table {heading!r}")
            continue
        nearest = max(alike, key=lambda line: sum(a == b for a, b in zip(line, cells, strict=True)))
        problems += [
            f"RESULTS.md:{number}: {mine!r} in the line {cells[0]!r} of the table {heading!r} has no row; "
            f"the nearest row gives {theirs!r}"
            for mine, theirs in zip(cells, nearest, strict=True) if mine != theirs
        ]  # fmt: skip
    present = [(heading, cells) for _, heading, cells in there]
    lost = [one for one in right if one not in present]
    problems += [f"RESULTS.md lacks the line {cells[0]!r} of the table {heading!r}" for heading, cells in lost]
    if not problems and text != expected:
        pairs = zip([*text.splitlines(), ""], [*expected.splitlines(), ""], strict=False)
        number = next((i for i, (a, b) in enumerate(pairs, start=1) if a != b), 1)
        problems.append(f"RESULTS.md:{number}: differs from what the rows give")
    return problems
