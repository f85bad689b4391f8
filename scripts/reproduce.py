"""Make the rows that are not yet run, the most valuable for the time first, within a budget of hours.

    python scripts/reproduce.py --hours 8 --device cuda             a night on one GPU
    python scripts/reproduce.py --hours 3 --paper glancenet
    python scripts/reproduce.py --hours 8 --dry-run                 only the plan with its estimates

A table's worth is the priority of its manifest (sweeps/) for each row still to do; its time comes from earlier rows and
runs, else from a probe: two short trainings on this device, whose difference is 20 steps (kept in runs/probe.json).
What is estimated longer than the budget gets a share of it and a stop signal then: it saves, and the next call goes on.
Runs go through scripts/Snakefile; afterwards the rows are collected and RESULTS.md is written. Ctrl-C lets trainings
save (exit code 130). Exit code 1: a run failed, what is done is collected.
"""

import argparse
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0:1] = [str(Path(__file__).resolve().parents[1])]

from common.errors import EXIT_INTERRUPTED, UserError, run_command, suggest
from scripts.collect import asked_for, minutes_of
from scripts.experiments import ROOT, Table, read_tables
from scripts.job import read_record
from scripts.results import PAPERS, read_rows, write

PROBE = Path("runs/probe.json")


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> None:
        raise UserError(f"{message} (python scripts/reproduce.py --help)")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options. Raises UserError."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("--hours", type=float, required=True, help="the budget, all runs together")
    parser.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU if there is one")
    parser.add_argument("--paper", action="append", default=[], metavar="NAME", help="only this one; may be repeated")
    parser.add_argument("--cores", type=int, default=1, help="experiments at a time (1)")
    parser.add_argument("--dry-run", action="store_true", help="print plan and estimates, run nothing")
    parser.add_argument("--sweeps", type=Path, default=ROOT / "sweeps", help="other manifests")
    parser.add_argument("--root", type=Path, default=ROOT, help="another checkout's rows")
    args = parser.parse_args(argv)
    if not 0 < args.hours < 10_000 or args.cores < 1:
        raise UserError("--hours is above 0 and --cores at least 1")
    for name in args.paper:
        if name not in PAPERS:
            raise UserError(f"--paper {name}: one of {', '.join(PAPERS)}{suggest(name, PAPERS)}")
    return args


def probed(table: Table, device: str) -> float | None:
    """Minutes of one experiment from a probe on this device; None without one in the manifest. Raises UserError."""
    key, known = f"{table.paper}/{table.name}", read_record(PROBE)
    if known.get(key, {}).get("device") == device:
        return known[key]["minutes"]
    if "probe" not in table.keys or "training_steps" not in table.keys:
        return None
    experiment = next(iter(table.experiments))
    words = table.commands(experiment, table.steps[0])[0]
    times = []
    for steps in (1, 21):
        with tempfile.TemporaryDirectory(prefix="probe_") as place:
            short = [word.replace(table.out(experiment), f"{place}/run") for word in words]
            probe = shlex.split(re.sub(r"\b20\b", str(steps), table.keys["probe"]))
            begin = time.monotonic()
            command = [sys.executable if word == "python" else word for word in [*short, *probe]]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise UserError((done.stderr.strip().splitlines() or ["no output"])[-1])
            times.append(time.monotonic() - begin)
    step = max(times[1] - times[0], 0.0) / 20
    known[key] = {"device": device, "seconds_a_step": step, "minutes": step * table.keys["training_steps"] / 60}
    PROBE.parent.mkdir(exist_ok=True)
    write(PROBE, json.dumps(known, indent=1) + "\n")
    return known[key]["minutes"]


def plan(args: argparse.Namespace, rows: list[dict[str, Any]], device: str) -> list[dict[str, Any]]:
    """An entry an experiment that is still to do: table, experiment, minutes (None: unknown), worth, why not.

    Experiments of one seed of all settings come before those of the next seed: a table is whole with one seed.
    """
    entries = []
    for table in read_tables(args.sweeps):
        key = f"{table.paper}/{table.name}"
        left = [row for row in rows if asked_for(row, key) and row["ours"] is None]
        if not left or (args.paper and table.paper not in args.paper):
            continue
        why = "" if table.possible() else f"needs {', '.join(table.keys['needs'])} in the data folder"
        minutes = minutes_of(rows, table)
        if minutes is None and not why:
            try:
                minutes = probed(table, device)
            except UserError as error:
                why = f"the probe failed: {error}"
        for number, experiment in enumerate(table.experiments):
            mine = [row for row in left if fits(row, table, experiment)]
            if not mine or all(map(os.path.isfile, products(table, experiment))):
                continue
            turn = list(table.grid.get("seed", [""])).index(table.experiments[experiment].get("seed", ""))
            worth = table.keys.get("priority", 1) * len(mine) / (turn + 1)
            entries.append({"table": table, "experiment": experiment, "minutes": minutes, "why": why, "worth": worth,
                            "order": (bool(why), minutes is None, -worth / (minutes or 1.0), number)})  # fmt: skip
    return sorted(entries, key=lambda entry: entry["order"])


def products(table: Table, experiment: str) -> list[str]:
    """The files of an experiment's last step."""
    return [table.fill(name, experiment) for name in table.steps[-1].makes]


def fits(row: dict[str, Any], table: Table, experiment: str) -> bool:
    """Whether an experiment makes a number of the row."""
    pattern = re.escape(row["source"]["folder"]).replace(r"\{seed\}", r"\d+")
    return re.fullmatch(pattern, table.out(experiment)) is not None


def shown(entry: dict[str, Any], share: float) -> str:
    """A line of the plan."""
    minutes = "? min" if entry["minutes"] is None else f"{entry['minutes']:.0f} min"
    stop = "" if entry["minutes"] is not None and entry["minutes"] <= share else f", at most {share:.0f} min"
    name = f"{entry['table'].paper}/{entry['table'].name}/{entry['experiment']}"
    return f"{name:52} {minutes}" + (f": {entry['why']}" if entry["why"] else stop)


def run(entries: list[dict[str, Any]], args: argparse.Namespace, end: float, stopped: list[int]) -> bool:
    """Run the plan through the engine until `end`; whether all that ran went well."""
    good = True
    for number, entry in enumerate(entries):
        left, waiting = (end - time.monotonic()) / 60, len(entries) - number
        if left < 0.05 or stopped:
            break
        wanted = entry["minutes"] or left / min(waiting, 4)
        share = min(left, max(1.5 * wanted + 2, left / waiting))
        table = entry["table"]
        targets = products(table, entry["experiment"])
        print(shown(entry, share), flush=True)
        config = [f"sweeps={args.sweeps}", f"root={args.root}"]
        words = [
            "-s",
            str(ROOT / "scripts/Snakefile"),
            "--cores",
            str(args.cores),
            "--quiet",
            "all",
            "--config",
            *config,
        ]
        engine = subprocess.Popen([sys.executable, "-m", "snakemake", *words, "--", *targets], start_new_session=True)
        stopped_at = time.monotonic() + 60 * share
        while engine.poll() is None:
            if stopped or time.monotonic() > stopped_at:
                engine.send_signal(signal.SIGTERM)
                engine.wait()
            time.sleep(0.2)
        good &= engine.returncode in (0, EXIT_INTERRUPTED)
    return good


def main(argv: list[str] | None = None) -> None:
    """The command. Raises UserError, KeyboardInterrupt after a stop, SystemExit(1) when a run failed."""
    args = parse(argv)
    gpu = shutil.which("nvidia-smi") is not None
    if args.device == "cuda" and not gpu:
        raise UserError("--device cuda: no GPU here (nvidia-smi is missing)")
    device = args.device or ("cuda" if gpu else "cpu")
    if device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    entries = plan(args, read_rows(args.root), device)
    print(f"{len(entries)} experiments with rows still to do; {args.hours:g} hours on {device}")
    if args.dry_run:
        return print("\n".join(shown(entry, 60 * args.hours) for entry in entries))
    stopped: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: stopped.append(number))
    good = run([entry for entry in entries if not entry["why"]], args, time.monotonic() + 3600 * args.hours, stopped)
    collected = [sys.executable, str(ROOT / "scripts/results.py"), "--root", str(args.root), "--collect"]
    for paper in args.paper or [""]:
        subprocess.run([*collected, paper], check=False)
    if stopped:
        raise KeyboardInterrupt
    if not good:
        raise SystemExit(1)


if __name__ == "__main__":
    sys.exit(run_command(main))
