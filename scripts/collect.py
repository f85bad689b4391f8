"""What a run says about a row of results/*.json: its numbers, and the record of what really ran.

A row's source is a folder with {seed} in it, a file in that folder (JSON, CSV or LBAE's results.txt) and a key.
"""

import csv
import glob
import hashlib
import json
import math
import re
import statistics
from pathlib import Path
from typing import Any, NoReturn

from common.errors import UserError
from scripts.experiments import Table

Row = dict[str, Any]


def read_json(text: str, name: str) -> Any:
    """Strict JSON: no NaN, no infinite number, no key twice. Raises UserError naming the file."""

    def no_constant(word: str) -> NoReturn:
        raise ValueError(f"{word} is not a number of a result")

    def number(word: str) -> float:
        return float(word) if math.isfinite(float(word)) else no_constant(word)

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        keys = [key for key, _ in items]
        if twice := [key for key in keys if keys.count(key) > 1]:
            raise ValueError(f"key {twice[0]!r} stands twice")
        return dict(items)

    try:
        return json.loads(text, parse_constant=no_constant, parse_float=number, object_pairs_hook=pairs)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{name}: {error}") from error


def load(path: Path) -> Any:
    """What a result file holds: JSON, the rows of a CSV, or the sections of LBAE's results.txt. Raises UserError."""
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".csv":
            return list(csv.DictReader(text.splitlines()))
        if path.suffix == ".txt":
            from lbae.results import read_line

            lines = [read_line(line) for line in text.splitlines() if line.strip()]
            return [{"loss_eval": one.loss_eval, "features": one.features, "f8": (s.f8 or [None])[0],
                     "f1_8": (s.f8 or [None])[-1]} | {k: v for k, v in vars(s).items() if k != "f8"}
                    for one in lines for s in one.sections]  # fmt: skip
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path}: {error}") from error
    return read_json(text, str(path))


def lookup(data: Any, key: str) -> float:
    """The number that `key` names; at a * the mean over all that stands there. Raises KeyError when it is not there,
    ValueError when it is none.
    """
    while key:
        if key[0] == "*":
            return statistics.fmean(lookup(one, key[2:]) for one in (data.values() if isinstance(data, dict) else data))
        if chosen := re.match(r"\[([^\]]*)\]\.?", key):
            wanted = dict(part.split("=", 1) for part in chosen[1].split(","))
            data = [one for one in data if all(str(one.get(k)) == v for k, v in wanted.items())]
            key = key[chosen.end() :]
            continue
        if isinstance(data, list):
            data = next((one for one in reversed(data) if one.get(key) not in (None, "")), {})
        names = re.split(r"(?=\[)|\.", key)
        ends = [sum(map(len, names[:i])) + i - 1 for i in range(len(names), 0, -1)] if isinstance(data, dict) else []
        end = next((end for end in ends if key[:end] in data), None)
        if end is None:
            raise KeyError(key)
        data, key = data[key[:end]], key[end:].lstrip(".")
    return float(data)


def runs_of(row: Row, root: Path) -> list[Path]:
    """The folders of a row's runs that hold its file, by seed."""
    pattern = row["source"]["folder"]
    found = glob.glob(pattern.replace("{seed}", "*"), root_dir=root)
    seeds = {one: m[1] if "{seed}" in pattern else "0" for one in found
             if (m := re.fullmatch(re.escape(pattern).replace(r"\{seed\}", r"(\d+)"), one))}  # fmt: skip
    return [
        root / one
        for one in sorted(seeds, key=lambda one: int(seeds[one]))
        if (root / one / row["source"]["file"]).is_file()
    ]


def read_value(row: Row, folder: Path, root: Path) -> dict[str, Any]:
    """Path, digest and value of a row's number in one run. Raises UserError naming the file and the key."""
    source, path = row["source"], folder / row["source"]["file"]
    try:
        value = lookup(load(path), source["key"]) * source.get("factor", 1)
    except (KeyError, ValueError, TypeError, AttributeError) as error:
        raise UserError(f"row {row['id']!r}: {path} holds no number {source['key']}") from error
    if not math.isfinite(value):
        raise UserError(f"row {row['id']!r}: {source['key']} in {path} is {value}")
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    return {"path": path.relative_to(root).as_posix(), "sha256": digest, "value": float(f"{value:.10g}")}


def collect_row(row: Row, root: Path) -> Row | None:
    """The row with the numbers of the runs that are there and finished; None without any. Raises UserError."""
    found = []
    for folder in runs_of(row, root):
        path = folder / "record.json"
        if not path.is_file():
            raise UserError(
                f"row {row['id']!r}: {folder} has no record.json: start runs by the engine or scripts/job.py"
            )
        steps = read_json(path.read_text(), str(path))
        if all(step.get("finished") for step in steps.values()):
            found.append((folder, steps))
    if not found:
        return None
    folder, steps = found[0]
    files = [read_value(row, folder, root) for folder, _ in found]
    longest = [max(steps.values(), key=lambda step: step["seconds"])["seconds"] for _, steps in found]
    commands = [
        line if step["folder"] == "." else f"(cd {step['folder']} && {line})"
        for step in steps.values()
        for line in step["commands"]
    ]
    others = [one.name for one, _ in found[1:]]
    last = list(steps.values())[-1]
    known = {"hardware": "; ".join(dict.fromkeys(next(iter(steps.values()))["hardware"] for _, steps in found))}
    n = source_n(row, folder)
    row = {key: value for key, value in row.items() if key not in ("typed", "learned")}
    return row | known | {
        "ours": [file["value"] for file in files], "files": files, "n": row["n"] if n is None else n,
        "minutes": float(f"{statistics.fmean(longest) / 60:.3g}"), "date": last["date"], "commit": last["commit"],
        "command": "\n".join([*commands, *([f"# the same for {', '.join(others)}"] if others else [])]),
    }  # fmt: skip


def source_n(row: Row, folder: Path) -> int | None:
    """The number of evaluated items, where the file of the row says it."""
    key = row["source"].get("n")
    return None if key is None else int(lookup(load(folder / row["source"]["file"]), key))


def asked_for(row: Row, what: str) -> bool:
    """Whether `--collect what` means a row that has a source."""
    if not isinstance(row["source"], dict):
        return False
    folder = row["source"]["folder"].removeprefix("results/")  # results/runs/ holds the runs whose records are kept
    return what in ("", row["id"], row["paper"]) or f"{folder}/".startswith(f"runs/{what}/")


def fits(row: Row, table: Table, experiment: str) -> bool:
    """Whether an experiment of a table makes a number of the row."""
    if not isinstance(row["source"], dict):
        return False
    pattern = re.escape(row["source"]["folder"]).replace(r"\{seed\}", r"\d+")
    return re.fullmatch(pattern, table.out(experiment)) is not None


def minutes_of(rows: list[Row], table: Table) -> float | None:
    """Minutes of an experiment of a table: those of its rows, else of its probes here; None when nobody knows."""
    name, probes = f"{table.paper}/{table.name}", Path("runs/probe.json")
    known = [row["minutes"] for row in rows if asked_for(row, name) and row["minutes"] is not None]
    if not known and probes.is_file():
        found = read_json(probes.read_text(), str(probes))
        known = [entry["minutes"] for key, entry in found.items() if key.startswith(f"{name}/")]
    return statistics.fmean(known) if known else None
