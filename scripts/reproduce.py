"""Make the rows that are not yet run, the most valuable for the time first, within a budget of hours.

    python scripts/reproduce.py --hours 8 --device cuda             a night on one GPU
    python scripts/reproduce.py --hours 3 --paper glancenet
    python scripts/reproduce.py --hours 8 --dry-run                 only the plan with its estimates

A table's worth is the priority of its manifest (sweeps/) for each row still to do. The time of an experiment comes from
rows of this machine, else from a probe, also for --dry-run: 20 steps of its own training command (runs/probe.json; what
follows the training is not counted; all probes take a fifth of the budget at most). --dry-run downloads nothing.
What is estimated longer than the budget gets a share of it and a stop signal then: it saves, and the next call goes on.
Runs go through scripts/Snakefile; afterwards the rows are collected and RESULTS.md is written. Ctrl-C lets trainings
save (exit code 130). Exit code 1: a run failed, what is done is collected.
"""

import argparse
import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0:1] = [str(Path(__file__).resolve().parents[1])]

from common.errors import EXIT_INTERRUPTED, UserError, run_command, suggest
from scripts.collect import Row, asked_for, fits
from scripts.experiments import ROOT, Table, read_tables
from scripts.job import hardware, read_record
from scripts.results import PAPERS, read_rows, write

PROBE = Path("runs/probe.json")
PATIENCE = 300  # seconds for a probe, with the reading of its data
SILENT: set[str] = set()  # settings whose probe gave nothing in this call


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


def estimate(table: Table, experiment: str, rows: list[Row], machine: str, end: float) -> float | None:
    """Minutes of an experiment on this machine: of rows made on it, else by a probe before the time `end`; None where
    neither tells. Raises UserError when the probe's training fails.
    """
    mine = [row for row in rows if row["hardware"] == machine and fits(row, table, experiment)]
    if known := [row["minutes"] for row in mine if row["minutes"] is not None]:
        return statistics.fmean(known)
    values, paced = table.experiments[experiment], table.keys.get("probe", [key for key in table.grid if key != "seed"])
    key = f"{table.paper}/{table.name}/{'_'.join(values[one] for one in paced)}"
    probes = read_record(PROBE)
    if probes.get(key, {}).get("hardware") != machine and table.steps[0].name == "train" and time.monotonic() < end:
        if not (found := key not in SILENT and probe(table, experiment, end - time.monotonic())):
            return SILENT.add(key)
        minutes = found["seconds_a_step"] * found["steps"] * table.keys.get("trainings", 1) / 60
        probes |= {key: {"hardware": machine, **found, "minutes": minutes}}
        PROBE.parent.mkdir(exist_ok=True)
        write(PROBE, json.dumps(probes, indent=1) + "\n")
    return probes.get(key, {}).get("minutes")  # those of another machine say more than nothing


def probe(table: Table, experiment: str, seconds: float) -> dict[str, Any]:
    """Seconds a step and steps of a training, 20 of which are made here; {} after `seconds`. Raises UserError."""
    print(f"reproduce: 20 steps of {table.paper}/{table.name}/{experiment}", file=sys.stderr, flush=True)
    with tempfile.TemporaryDirectory(prefix="probe_") as place:
        line = table.commands(experiment, table.steps[0])[0]
        words = [word.replace(table.out(experiment), f"{place}/run") for word in line]
        words[0] = sys.executable if words[0] == "python" else words[0]
        env = {**os.environ, "STRUCTURED_LATENTS_PROBE": f"{place}/probe.json", "PYTHON": sys.executable}
        try:
            done = subprocess.run(
                words, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=min(PATIENCE, seconds)
            )
        except subprocess.TimeoutExpired:
            return {}
        found = read_record(Path(place) / "probe.json")
    if done.returncode and not found:
        raise UserError((done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1])
    return found


def plan(args: argparse.Namespace, rows: list[Row]) -> list[dict[str, Any]]:
    """An entry an experiment that is still to do: table, experiment, minutes (None: unknown), worth, why not.

    Experiments of one seed of all settings come before those of the next seed: a table is whole with one seed.
    """
    entries, machine, end = [], hardware(), time.monotonic() + 720 * args.hours
    for table in read_tables(args.sweeps):
        key = f"{table.paper}/{table.name}"
        left = [row for row in rows if asked_for(row, key) and row["ours"] is None]
        if not left or (args.paper and table.paper not in args.paper):
            continue
        lacks = "" if table.possible() else f"needs {', '.join(table.keys['needs'])} in the data folder"
        failed: dict[str, str] = {}
        for number, experiment in enumerate(table.experiments):
            mine = [row for row in left if fits(row, table, experiment)]
            if not mine or all(map(os.path.isfile, products(table, experiment))):
                continue
            minutes, setting = None, str({**table.experiments[experiment], "seed": ""})
            if not lacks and setting not in failed:
                try:
                    minutes = estimate(table, experiment, rows, machine, end)
                except UserError as error:
                    failed[setting] = f"the probe failed: {error}"
            why = lacks or failed.get(setting, "")
            turn = list(table.grid.get("seed", [""])).index(table.experiments[experiment].get("seed", ""))
            worth = table.keys.get("priority", 1) * len(mine) / (turn + 1)
            entries.append({"table": table, "experiment": experiment, "minutes": minutes, "why": why, "worth": worth,
                            "order": (bool(why), minutes is None, -worth / (minutes or 1.0), number)})  # fmt: skip
    return sorted(entries, key=lambda entry: entry["order"])


def products(table: Table, experiment: str) -> list[str]:
    """The files of an experiment's last step."""
    return [table.fill(name, experiment) for name in table.steps[-1].makes]


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
        print(shown(entry, share), flush=True)
        words = ["-s", str(ROOT / "scripts/Snakefile"), "--cores", str(args.cores), "--quiet", "all", "--config"]
        words += [f"sweeps={args.sweeps}", f"root={args.root}", "--", *products(entry["table"], entry["experiment"])]
        engine = subprocess.Popen([sys.executable, "-m", "snakemake", *words], start_new_session=True)
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
    device = args.device or ("cuda" if shutil.which("nvidia-smi") else "cpu")
    if device == "cuda" and not shutil.which("nvidia-smi"):
        raise UserError("--device cuda: no GPU here (nvidia-smi is missing)")
    os.environ |= {"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {}
    os.environ |= {"OFFLINE": "1"} if args.dry_run else {}
    end = time.monotonic() + 3600 * args.hours
    entries = plan(args, read_rows(args.root))
    print(f"{len(entries)} experiments with rows still to do; {args.hours:g} hours on {device}")
    if args.dry_run:
        return print("\n".join(shown(entry, 60 * args.hours) for entry in entries))
    stopped: list[int] = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: stopped.append(number))
    good = run([entry for entry in entries if not entry["why"]], args, end, stopped)
    collected = [sys.executable, str(ROOT / "scripts/results.py"), "--root", str(args.root), "--collect"]
    for paper in args.paper or [""]:
        subprocess.run([*collected, paper])
    if stopped:
        raise KeyboardInterrupt
    if not good:
        raise SystemExit(1)


if __name__ == "__main__":
    sys.exit(run_command(main))
