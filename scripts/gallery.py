"""The quickstart's page: numbers from the files that the papers' scripts wrote, beside trivial baselines, and pictures.

    python scripts/gallery.py [results/quickstart]         the rule `page` of scripts/Snakefile

What the page tells stands in templates/quickstart.yaml, how it looks in templates/quickstart.html.j2. Written:
<out>/index.html, and its pictures in <out>/pictures; the folder can be moved or sent as a whole. Each number names the
file that it comes from (`data-source`, relative to <out>) and its text there (`data-raw`); a number derived from it
names the formula, too (`data-formula`). A paper whose steps are not all done is shown with the reason.
"""

import csv
import json
import math
import os
import re
import shlex
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.parse import quote

import jinja2
import yaml

if __name__ == "__main__":
    sys.path[0:1] = [str(Path(__file__).resolve().parents[1])]

from common.errors import UserError, run_command
from scripts.experiments import QUICKSTART, ROOT, Table, find_mnist, read_tables

TEMPLATES = ROOT / "scripts/templates"
# what is shown may be one of these functions of the number in the file
FORMULAS: dict[str, Callable[[float], float]] = {
    "": lambda x: x,
    "percent": lambda x: 100 * x,
    "bits of a uniform guess among the levels": math.log2,
    "percent of a guess among the classes": lambda x: 100 / x,
    "minutes": lambda x: x / 60,
}


def read(path: Path) -> Any:
    """What a result file holds, its numbers as they are written there."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".csv":
        return list(csv.DictReader(text.splitlines()))
    if path.suffix == ".txt":  # LBAE: a section a folder of images
        found: list[dict[str, str]] = []
        for token in text.split():
            key, mark, value = token.partition(":")
            if not mark:
                found.append({"name": key})
            elif found and key == "f8/18":
                found[-1] |= dict(zip(("f8", "f1_8"), value.split("/"), strict=True))
            elif found:
                found[-1][key] = value
        return found
    return json.loads(text, parse_float=str, parse_int=str)


def find(data: Any, key: str, first: bool = False) -> str:
    """The text of a number: `a.b`, `rows[name=x].c`, `[run~/x].c` (ends so). Raises KeyError when it is not there."""
    while key:
        if chosen := re.match(r"\[([^\]]*)\]\.?", key):
            tests = [re.split(r"([=~])", part, maxsplit=1) for part in chosen[1].split(",")]
            fits = {"=": str.__eq__, "~": lambda text, end: text.rstrip("/").endswith(end)}
            data = [one for one in data if all(fits[sign](str(one.get(k)), v) for k, sign, v in tests)]
            key = key[chosen.end() :]
            continue
        if isinstance(data, list):
            data = next((one for one in (data if first else reversed(data)) if one.get(key)), {})
        names = [key[: found.start()] for found in re.finditer(r"\.|(?=\[)", key)]
        name = next((name for name in (key, *reversed(names)) if name in data), None)
        if name is None:
            raise KeyError(key)
        data, key = data[name], key[len(name) :].lstrip(".")
    return data


def newest(folder: Path, pattern: str) -> Path:
    """The newest file of a pattern. Raises FileNotFoundError when there is none."""
    found = sorted(folder.glob(pattern), key=lambda path: path.stat().st_mtime)
    if not found:
        raise FileNotFoundError(f"no {pattern} in {folder}")
    return found[-1]


def number(path: Path, raw: str, out: Path, digits: int, formula: str = "", unit: str = "") -> dict[str, str]:
    """A number of a table, and the file that holds it."""
    unit = unit or (" %" if formula.startswith("percent") else "")
    shown = f"{FORMULAS[formula](float(raw)):.{digits}f}{unit}"
    return {"text": shown, "raw": raw, "source": os.path.relpath(path, out), "formula": formula}


def table(part: dict[str, Any], folder: Path, out: Path, data: str) -> dict[str, Any]:
    """A table of a paper, its numbers read. Raises OSError, KeyError or ValueError where one is missing."""
    rows = []
    for key, about in part["rows"].items():
        row = part | ({"name": about} if isinstance(about, str) else about)
        key = key.replace("{data}", data)
        path = newest(folder, row["file"].replace("{row}", key))
        numbers = []
        for i, pattern in enumerate(row["keys"]):
            raw = find(read(path), pattern.replace("{row}", key), row.get("row") == "first")
            formula = row.get("formulas", [""] * 9)[i]
            numbers.append(number(path, raw, out, row["digits"][i], formula, row.get("unit", "")))
        rows.append({"name": row["name"], "kind": row.get("kind", ""), "numbers": numbers})
    return {"caption": part["caption"], "head": part["head"], "rows": rows}


def picture(part: dict[str, Any], name: str, out: Path) -> dict[str, Any]:
    """A figure, its pictures copied beside the page. Raises OSError when one is missing."""
    folder = out / name
    files = sorted(folder.glob(part["files"])) if "files" in part else [newest(folder, part["file"])]
    if not files:
        raise FileNotFoundError(f"no {part['files']} in {folder}")
    addresses = []
    for path in files:
        target = out / "pictures" / name / path.relative_to(folder).as_posix().replace("/", "-")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
        addresses.append("/".join(quote(piece) for piece in target.relative_to(out).parts))
    return {"alt": part["caption"], "width": 320, "plot": False} | part | {"addresses": addresses}


def steps_of(tables: list[Table], out: Path) -> tuple[dict[str, Any], str, str, list[float]]:
    """(table of a paper's steps, its commands, why it is not complete or nothing, seconds and CPU seconds)."""
    rows, commands, error, total = [], [], "", [0.0, 0.0]
    for one in tables:
        path = Path(one.out("")) / "record.json"
        path = out / path.relative_to(os.environ.get("QUICKSTART_OUT", QUICKSTART))
        record = read(path) if path.is_file() else {}
        for step in one.steps:
            entry, log = record.get(step.name, {}), path.with_name(f"{step.name}.log")
            title = step.name.replace("_", " ")
            if not entry.get("finished"):
                reason = f"exit code {entry['exit']}: {entry['last']}" if entry.get("exit") else "not done yet"
                error = error or f"{title}: {reason}" + (f" (log: {os.path.relpath(log, out)})" if log.exists() else "")
                continue
            numbers = [number(path, entry[key], out, 1, "minutes") for key in ("seconds", "cpu_seconds")]
            total = [total[0] + float(entry["seconds"]), total[1] + float(entry["cpu_seconds"])]
            rows.append({"name": title, "kind": "", "numbers": numbers, "log": os.path.relpath(log, out)})
            where = entry["folder"]
            commands += [line if where == "." else f"(cd {shlex.quote(where)} && {line})" for line in entry["commands"]]
    head = ["step", "minutes", "minutes of CPU time", "log"]
    return {"caption": "What was run", "head": head, "rows": rows}, "\n".join(commands), error, total


def paper(name: str, about: dict[str, Any], tables: list[Table], out: Path) -> dict[str, Any]:
    """All that the page tells about a paper; an unreadable result costs its own section only."""
    steps, commands, error, total = steps_of(tables, out)
    data = tables[0].chosen()
    made = about | {"name": name, "steps": steps, "commands": commands, "seconds": total, "tables": [], "pictures": []}
    made["data"] = "; ".join(one.keys["data"] for one in tables)
    try:
        for kind, build in (("tables", lambda part: table(part, out / name, out, data)),
                            ("pictures", lambda part: picture(part, name, out))):  # fmt: skip
            for part in about[kind]:
                wanted = part.get("file") or part["files"]
                if not part.get("optional") or list((out / name).glob(wanted)):
                    made[kind].append(build(part))
    except Exception as problem:  # one unreadable result must not take the page with it
        error = error or f"page: {type(problem).__name__}: {problem}"
        made |= {"tables": [], "pictures": []}
    return made | {"error": error}


def write_page(out: Path, tables: list[Table] | None = None) -> list[tuple[str, str]]:
    """Write <out>/index.html; returns (paper, why) of each paper that was begun and is not complete."""
    tables = [one for one in tables or read_tables() if one.paper == "quickstart" and one.possible()]
    content = yaml.safe_load((TEMPLATES / "quickstart.yaml").read_text(encoding="utf-8"))
    made = []
    for name, about in content.items():
        mine = [one for one in tables if one.name == name or one.name.startswith(f"{name}_")]
        if any((out / name).glob("record.json")):
            made.append(paper(name, about, mine, out))
    exports = {
        "DATA_ROOT": str(find_mnist() or ROOT / "data"),
        "METRICS_CACHE": str(out / "cache"),
        "OMP_NUM_THREADS": "1",
    }
    pages = jinja2.Environment(
        loader=jinja2.FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True,
    )  # fmt: skip
    text = pages.get_template("quickstart.html.j2").render(
        papers=made, seconds=sum(one["seconds"][0] for one in made), cpu_seconds=sum(one["seconds"][1] for one in made),
        activate=shlex.quote(os.path.relpath(sys.prefix)) + "/bin/activate",
        exports="\n".join(f"export {name}={shlex.quote(value)}" for name, value in exports.items()),
    )  # fmt: skip
    target, part = out / "index.html", out / "index.html.part"
    part.write_text(text, encoding="utf-8")
    os.replace(part, target)
    return [(one["name"], one["error"]) for one in made if one["error"]]


def main() -> None:
    """The command; a paper that failed is named on stderr. Raises UserError for a folder without runs."""
    out = Path(sys.argv[1] if len(sys.argv) > 1 else QUICKSTART)
    if not out.is_dir():
        raise UserError(f"{out} is no folder: bash scripts/quickstart.sh makes it")
    for name, error in write_page(out):
        print(f"quickstart: {name} failed: {error}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(run_command(main))
