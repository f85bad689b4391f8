"""Write RESULTS.md from the rows in results/*.json, fill rows from runs, check all of it, add rows.

    python scripts/results.py                      write RESULTS.md and the counts of README.md
    python scripts/results.py --collect [WHAT]     read the numbers of a row, a table (paper/manifest), a paper or all
    python scripts/results.py --check              exit code 2 and one line per problem
    python scripts/results.py --paper lbae         print one paper's part, write nothing
    python scripts/results.py --list               one line per row: state, id, what it is
    python scripts/results.py --claims             write CLAIMS.md and the claims of README.md (scripts/claims.py)
    python scripts/results.py --add new.json       add or change rows that are still to do ("-" reads standard input)

A row is one number of one model (scripts/templates/row.schema.json says what each key holds). `ours` is null while
nobody has run it. No number is typed: `source` says where it comes from, and --collect reads it there.

    "source": {"folder": "runs/latent_flow/mnist/supervised_{seed}", "file": "eval.json",
               "key": "equivariance.scale.model.mean", "statistic": "mean and standard deviation over seeds"}

In lists (a CSV file, a "summary") `summary[model=cbnm].leakage` names the last entry that fits and has the value. The
run's record.json, written by the engine or by `python scripts/job.py FOLDER -- COMMAND`, gives command, minutes,
hardware, date and commit; the row keeps the digest of the file. A run of another size gets a row of its own: {"like":
"inv_flow/t3-inverse", "id": "inv_flow/t3-inverse-small", "protocol": "small: 5 epochs", "source": {...}} copies what is
left out. Several rows at once: {"common": {keys of all}, "rows": [{...}, {...}]}.
"""

import argparse
import fcntl
import json
import os
import re
import shlex
import sys
from pathlib import Path, PurePosixPath
from typing import Any

if __name__ == "__main__":
    sys.path[0:1] = [str(Path(__file__).resolve().parents[1])]

from common.errors import UserError, run_command, suggest
from scripts.claims import between, render_claims
from scripts.collect import asked_for, collect_row, read_json, read_value
from scripts.experiments import problem
from scripts.tables import (
    PAPERS,
    column_key,
    compare,
    counts,
    line_key,
    render,
)

ROOT = Path(__file__).resolve().parents[1]

SCHEMA = json.loads((ROOT / "scripts/templates/row.schema.json").read_text())
MEASURED = ("ours", "n", "hardware", "minutes", "date", "commit", "files")  # what only a run can say
TYPED_UNTIL = "2026-11-28"  # no number was typed after that day

Row = dict[str, Any]


# ---------------------------------------------------------------------------------------------- reading and checking


def validate(row: Any, where: str) -> Row:
    """The row itself when it keeps to the schema. Raises UserError (one line) naming `where`, the row and the key."""
    named = isinstance(row, dict) and isinstance(row.get("id"), str)
    where = f"{where}, row {row['id']!r}" if named else where
    if wrong := problem(row, SCHEMA):
        raise UserError(f"{where}: {wrong}")
    if not row["id"].startswith(row["paper"] + "/"):
        raise UserError(f"{where}: the id must be {row['paper']}/<letters, digits, - . _ +>")
    if row.get("typed") and row["date"] > TYPED_UNTIL:
        raise UserError(f"{where}: no number is typed any more: name its source and run --collect {row['id']}")
    if "files" in row and row["ours"] != [file["value"] for file in row["files"]]:
        raise UserError(f"{where}: ours is {row['ours']}, its files gave {[file['value'] for file in row['files']]}")
    return row


def read_rows(root: Path) -> list[Row]:
    """All rows of root/results/*.json in the order of PAPERS, then of the file. Raises UserError."""
    rows: list[Row] = []
    found = [path for path in (root / "results").glob("*.json") if path.stem != "claims"]
    paths = sorted(found, key=lambda path: [*PAPERS, path.stem].index(path.stem))
    for path in paths:
        name = f"results/{path.name}"
        if path.stem not in PAPERS:
            raise UserError(f"{name}: no paper of that name{suggest(path.stem, PAPERS)}")
        try:
            found = read_json(path.read_text(encoding="utf-8"), name)
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{name}: {error}") from error
        if not isinstance(found, list):
            raise UserError(f"{name}: not a list of rows")
        for row in found:
            if validate(row, name)["paper"] != path.stem:
                raise UserError(f"{name}, row {row['id']!r}: a row of paper {row['paper']!r} in this file")
            rows.append(row)
    if not rows:
        raise UserError(f"no rows in {root / 'results'}: results/<paper>.json holds them")
    check_unique(rows)
    return rows


def check_unique(rows: list[Row]) -> None:
    """Raises UserError when two rows have one id, or would fill one cell of RESULTS.md."""
    ids: set[str] = set()
    cells: dict[tuple, str] = {}
    for row in rows:
        cell = (*line_key(row), row["table"], row["paper"], column_key(row))
        if row["id"] in ids:
            raise UserError(f"results/{row['paper']}.json: two rows have the id {row['id']!r}")
        if cell in cells:
            raise UserError(f"results/{row['paper']}.json: {cells[cell]!r} and {row['id']!r} say the same thing twice")
        ids.add(row["id"])
        cells[cell] = row["id"]


def missing_files(command: str, root: Path) -> list[str]:
    """Scripts, modules, manifests and shipped weights that `command` names and the repository does not have.

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
                here = PurePosixPath(os.path.normpath(here / word))
            elif before == "-m" and re.fullmatch(r"[A-Za-z_][\w.]*", word):
                path = root / word.replace(".", "/")
                known = word.split(".")[0] in ("pip", "pytest", "venv") or path.with_suffix(".py").is_file()
                missing += [] if known or (path / "__main__.py").is_file() else [word]
            elif re.search(r"\.(py|sh)$", word) or re.match(r"(\.\./)*(sweeps|checkpoints)/", word):
                path = root / os.path.normpath(here / word.split("=", 1)[-1])
                missing += [] if path.is_file() else [word]
    return missing


# ---------------------------------------------------------------------------------------------------------- checking


def check_files(row: Row, root: Path) -> list[str]:
    """Where a row's number differs from the file that it was read from, as far as the file is here."""
    problems = []
    for file in row.get("files", ()):
        path = root / file["path"]
        if not path.is_file():
            continue
        folder = root / file["path"].removesuffix(row["source"]["file"]).rstrip("/")
        found = read_value(row, folder, root)
        for key in ("value", "sha256"):
            if found[key] != file[key]:
                problems.append(f"row {row['id']!r}: {key} {file[key]}, but {file['path']} has {found[key]}: "
                                f"python scripts/results.py --collect {row['id']}")  # fmt: skip
                break
    return problems


def counted(text: str, rows: list[Row]) -> str:
    """README.md with the sentence that counts the numbers."""
    full, small, left = counts(rows)
    line = (f"Of {len(rows)} numbers, {full} were measured at the paper's size, {small} by smaller or different runs, "
            f"{left} are not yet run.")  # fmt: skip
    return between(text, "counts", line)


def check(root: Path, rows: list[Row]) -> list[str]:
    """All problems of RESULTS.md, README.md, the rows' files and commands, one line each."""
    try:
        problems = compare((root / "RESULTS.md").read_text(encoding="utf-8"), render(rows))
    except (OSError, UnicodeDecodeError) as error:
        problems = [f"RESULTS.md cannot be read: {error}"]
    readme = root / "README.md"
    if readme.is_file() and (text := readme.read_text(encoding="utf-8")) != counted(text, rows):
        problems.append("README.md counts the numbers wrong")
    if problems:
        problems.append("write it again: python scripts/results.py")
    if (root / "results/claims.json").is_file():
        problems += [
            f"{path.name}: the claims differ from what their rows give: python scripts/results.py --claims"
            for path, text in render_claims(root, rows).items()
            if not path.is_file() or path.read_text(encoding="utf-8") != text
        ]
    lost: dict[tuple[str, str], list[str]] = {}
    for row in rows:
        problems += check_files(row, root)
        for name in missing_files(row["command"], root):
            lost.setdefault((row["paper"], name), []).append(row["id"])
    for (paper, name), ids in lost.items():
        others = f" and {len(ids) - 1} more" if len(ids) > 1 else ""
        problems.append(f"results/{paper}.json, row {ids[0]!r}{others}: the command names {name}: no such file")
    return problems


# ------------------------------------------------------------------------------------------------ adding and writing


def add(rows: list[Row], text: str, where: str) -> list[Row]:
    """`rows` with those of a snippet: new ones, or changes of what is no measurement. Raises UserError."""
    snippet = read_json(text, where)
    if isinstance(snippet, dict) and "rows" in snippet:
        shared, snippet = snippet.get("common", {}), snippet["rows"] if set(snippet) <= {"rows", "common"} else None
        if not isinstance(shared, dict) or not isinstance(snippet, list):
            raise UserError(f'{where}: several rows are {{"common": {{...}}, "rows": [...]}}')
        snippet = [{**shared, **row} if isinstance(row, dict) else row for row in snippet]
    snippet = snippet if isinstance(snippet, list) else [snippet]
    if not snippet or not all(isinstance(row, dict) and isinstance(row.get("id"), str) for row in snippet):
        raise UserError(f'{where}: every row of a snippet is an object with an "id"')
    for new in snippet:
        by_id = {row["id"]: row for row in rows}
        name, old = f"{where}, row {new['id']!r}", by_id.get(new["id"])
        if typed := [key for key in MEASURED if new.get(key) is not None]:
            raise UserError(f"{name}: {typed[0]} comes from a run: name its source, then --collect {new['id']}")
        like = by_id.get(new.get("like", ""), {})
        if "like" in new and not like:
            raise UserError(f"{name}: no row {new['like']!r} to copy from{suggest(str(new['like']), by_id)}")
        if like and old:
            raise UserError(f"{name}: there is such a row already")
        fresh = {"note": "", "paper_std": None, "source": None, "paper": new["id"].split("/")[0]} | like
        fresh = {k: v for k, v in fresh.items() if k != "learned"} | dict.fromkeys(MEASURED[:-1])
        row = {
            **(old or {k: v for k, v in fresh.items() if k not in ("files", "typed")}),
            **{k: v for k, v in new.items() if k != "like"},
        }
        validate(row, where)
        same = [i for i, other in enumerate(rows) if (other["table"], other["paper"]) == (row["table"], row["paper"])]
        at = rows.index(like) + 1 if like else same[-1] + 1 if same else len(rows)
        rows = [row if other is old else other for other in rows] if old else [*rows[:at], row, *rows[at:]]
    return rows


def write(path: Path, text: str) -> None:
    """The whole file or the old one."""
    from common.checkpoint import atomic_write  # imports torch: only a call that writes should wait for it

    with atomic_write(path) as file:
        file.write(text.encode())


def collect(root: Path, rows: list[Row], what: str) -> tuple[list[Row], list[Row]]:
    """All rows, those of `what` with the numbers of the runs that are there; and the latter. Raises UserError."""
    chosen = [row for row in rows if asked_for(row, what)]
    if not chosen:
        known = [*PAPERS, *(row["id"] for row in rows)]
        raise UserError(f"--collect {what}: no row with a source is called so{suggest(what, known)}")
    found = {row["id"]: new for row in chosen if (new := collect_row(row, root))}
    print(f"{len(found)} of {len(chosen)} rows have a finished run")
    return [found.get(row["id"], row) for row in rows], list(found.values())


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise UserError(f"{message} (python scripts/results.py --help)")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options. Raises UserError."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--check", action="store_true", help="write nothing; exit code 2 when something does not fit")
    what.add_argument("--collect", nargs="?", const="", metavar="WHAT", help="a row, a table, a paper; all of them")
    what.add_argument("--claims", action="store_true", help="write CLAIMS.md from results/claims.json and the rows")
    what.add_argument("--add", nargs="+", metavar="FILE", help="JSON snippets of rows; - is standard input")
    what.add_argument("--list", action="store_true", help="print state, id, setting and metric of every row")
    parser.add_argument("--paper", help="print this paper's part only; with --list, list it only")
    parser.add_argument("--out", type=Path, help="with --collect: also write what was collected as JSON")
    parser.add_argument("--root", type=Path, default=ROOT, help="another checkout of the repository")
    args = parser.parse_args(argv)
    if args.paper is not None and (args.check or args.claims or args.add or args.collect is not None):
        raise UserError("--paper goes with --list or alone")
    if args.paper is not None and args.paper not in PAPERS:
        raise UserError(f"unknown paper {args.paper!r}{suggest(args.paper, PAPERS)}: one of {', '.join(PAPERS)}")
    return args


def change(root: Path, args: argparse.Namespace) -> None:
    """Add or collect, and write rows, RESULTS.md and the counts of README.md; one process at a time."""
    (root / "results").mkdir(exist_ok=True)
    guard = os.open(root / "results", os.O_RDONLY)
    try:
        fcntl.flock(guard, fcntl.LOCK_EX)
        _change(root, args)
    finally:
        os.close(guard)


def _change(root: Path, args: argparse.Namespace) -> None:
    before = rows = read_rows(root)
    for name in args.add or ():
        try:
            text = sys.stdin.read() if name == "-" else Path(name).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{name}: {error}") from error
        rows = add(rows, text, name)
    if args.collect is not None:
        rows, found = collect(root, rows, args.collect)
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            write(
                args.out,
                json.dumps([{key: row[key] for key in ("id", "ours", "files")} for row in found], indent=1) + "\n",
            )
    old = {row["id"]: row for row in before}
    new = [row for row in rows if old.get(row["id"]) != row]
    for row in new:
        for lost in missing_files(row["command"], root):
            raise UserError(f"row {row['id']!r}: the command names {lost}: no such file in the repository")
        validate(row, "rows")
    check_unique(rows)
    for paper in dict.fromkeys(row["paper"] for row in new):
        mine = [row for row in rows if row["paper"] == paper]
        write(root / "results" / f"{paper}.json", json.dumps(mine, indent=1, ensure_ascii=False) + "\n")
    write(root / "RESULTS.md", render([row for paper in PAPERS for row in rows if row["paper"] == paper]))
    if (root / "README.md").is_file():
        write(root / "README.md", counted((root / "README.md").read_text(encoding="utf-8"), rows))
    print(f"wrote {root / 'RESULTS.md'}: {len(rows)} rows")


def main(argv: list[str] | None = None) -> None:
    """The command. Raises UserError; --check prints its problems on stderr first."""
    args = parse(argv)
    if args.list or args.check or args.claims or args.paper is not None:
        rows = read_rows(args.root)
        shown = [row for row in rows if args.paper in (None, row["paper"])]
    if args.list:
        for row in shown:
            state = "to do" if row["ours"] is None else row["protocol"].split(":")[0]
            print(f"{state:8}{row['id']:48} {row['setting']}: {row['metric']} ({row['data']})")
    elif args.claims:
        for path, text in render_claims(args.root, rows).items():
            write(path, text)
            print(f"wrote {path}")
    elif args.paper is not None:
        print(render(rows, args.paper).rstrip())
    elif args.check:
        if problems := check(args.root, rows):
            for line in problems[:-1]:
                print(f"error: {line}", file=sys.stderr)
            raise UserError(problems[-1])
        print(f"RESULTS.md fits its {len(rows)} rows")
    else:
        change(args.root, args)


if __name__ == "__main__":
    sys.exit(run_command(main))
