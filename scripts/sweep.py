"""Run a table of a paper, seeds x settings, as independent processes from one manifest.

    python scripts/sweep.py sweeps/glancenet_dsprites.yaml --list            numbered jobs, their state and command
    python scripts/sweep.py sweeps/glancenet_dsprites.yaml --jobs 2          run what is left, two at a time
    python scripts/sweep.py sweeps/glancenet_dsprites.yaml --only seed=0     a part of it
    sbatch --array=0-59 --gpus=1 --cpus-per-task=8 --signal=B:TERM@120 --wrap \\
        'exec python scripts/sweep.py sweeps/glancenet_dsprites.yaml --index $SLURM_ARRAY_TASK_ID'     one job a task

The manifest (YAML or JSON):

    about: one line                                     (optional)
    command: python glancenet/main.py {model} --masking_fact {supervision} --seed {seed} --log_dir {out}/logs
    grid:
      model: {GlanceNet: --alg GlanceNet --decoder SimpleConv64, CBNM: --alg CBNM}     name: words of the command
      supervision: [1, 10, 100]                                                        or plain values
      seed: [0, 1, 2]
    exclude: [{model: CBNM, supervision: 1}]            (optional) combinations that are left out
    out: runs/glancenet/{model}_{supervision}_{seed}    one folder a job; {out} may stand in the command
    env: {DATA_ROOT: data}                              (optional) where the environment does not set it already
    produces: "{out}/model.safetensors"                 (optional) a job without this file (pattern) is not finished
    resume: {if: "{out}/last.pt", add: --resume}        (optional) words added when an earlier try left that file;
                                                        {found} is the newest that fits the pattern

The command is split like a shell line and started without a shell, in the repository (--folder: elsewhere), with this
Python first in PATH. Each process gets OMP_NUM_THREADS = cores / jobs unless that is set; with --jobs above 1 and
several GPUs (CUDA_VISIBLE_DEVICES or nvidia-smi) each running job gets one of them.

State lies in runs/sweeps/<manifest>/: <job>.log, <job>.json (exit code, digest of the command, minutes), <job>.lock. A
second call skips finished jobs and runs failed and interrupted ones again; a job whose command has changed is run anew.
Several calls may share a folder, also on several machines: a lock holds host and process, one of a dead process of
this machine is taken over; one of another machine is respected until somebody removes the file. Ctrl-C and SIGTERM
go on to the running jobs, which save; a second signal kills them. Exit codes: 0, 1 some job failed, 2 bad manifest,
130 or 143 interrupted.
"""

import argparse
import contextlib
import fcntl
import glob
import hashlib
import itertools
import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, NoReturn

import yaml

from common.errors import UserError, run_command, suggest

ROOT = Path(__file__).resolve().parents[1]
KEYS = ("about", "command", "grid", "exclude", "out", "env", "produces", "resume")
POLL_SECONDS = 0.05
PLACEHOLDER = re.compile(r"\{([A-Za-z_]\w*)\}")


# ---------------------------------------------------------------------------------------------------------- manifest


@dataclass
class Job:
    """One point of the grid, ready to start."""

    index: int
    name: str  # safe as a file name
    values: dict[str, str]  # grid key -> printed value
    words: list[str]  # the command, without `resume`
    out: str
    env: dict[str, str] = field(default_factory=dict)
    produces: str | None = None
    resume_if: str | None = None
    resume_words: list[str] = field(default_factory=list)

    @property
    def digest(self) -> str:
        """Changes when the command or its environment does."""
        text = json.dumps([self.words, sorted(self.env.items())])
        return hashlib.sha256(text.encode()).hexdigest()[:16]


class _Loader(yaml.SafeLoader):
    """YAML that refuses a key standing twice."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"the key {key!r} stands twice")
        return super().construct_mapping(node, deep)


def _printed(value: Any, where: str) -> str:
    if isinstance(value, str) and value.strip() and "\n" not in value:
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise UserError(f"{where}: {value!r} is no text or number (put yes, no, on, off, true, false in quotes)")


def _words(text: str, where: str) -> list[str]:
    try:
        return shlex.split(text)
    except ValueError as error:
        raise UserError(f"{where}: {error}") from error


def _text(manifest: dict, key: str, name: str) -> str | None:
    value = manifest.get(key)
    if value is not None and (not isinstance(value, str) or not value.strip()):
        raise UserError(f"{name}: {key} is {value!r}, not a text")
    return value


def read_manifest(path: Path) -> list[Job]:
    """All jobs of a manifest in the order of its grid, the last key running fastest. Raises UserError (one line)."""
    name = str(path)
    try:
        manifest = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{name}: {getattr(error, 'strerror', None) or error}") from error
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{name}: {error}") from error
    if not isinstance(manifest, dict):
        raise UserError(f"{name}: a manifest is a mapping with the keys {', '.join(KEYS)}")
    for key in manifest:
        if key not in KEYS:
            raise UserError(f"{name}: unknown key {key!r}{suggest(str(key), KEYS)}")
    for key in ("command", "grid", "out"):
        if key not in manifest:
            raise UserError(f"{name}: the key {key!r} is missing")
    _text(manifest, "about", name)
    template = _words(_text(manifest, "command", name) or "", f"{name}: command")
    out, produces = _text(manifest, "out", name) or "", _text(manifest, "produces", name)
    grid = _grid(manifest["grid"], name)
    env = manifest.get("env") or {}
    if not isinstance(env, dict) or not all(isinstance(key, str) for key in env):
        raise UserError(f"{name}: env is a mapping of names to values")
    env = {key: _printed(value, f"{name}: env {key}") for key, value in env.items()}
    resume = manifest.get("resume")
    if resume is not None and (
        not isinstance(resume, dict)
        or set(resume) != {"if", "add"}
        or not all(isinstance(part, str) for part in resume.values())
    ):
        raise UserError(f"{name}: resume is {{if: a file, add: words of the command}}")
    used = {key for word in template for key in PLACEHOLDER.findall(word)}
    if "out" in used:
        used |= set(PLACEHOLDER.findall(out))
    for key in grid:
        if key not in used:
            raise UserError(f"{name}: the command does not use the grid's {key!r}: {{{key}}}")
    jobs: list[Job] = []
    seen: dict[str, str] = {}
    left_out = _excluded(manifest.get("exclude"), grid, name)
    for point in itertools.product(*(values.items() for values in grid.values())):
        chosen = dict(zip(grid, point, strict=True))
        printed = {key: label for key, (label, _) in chosen.items()}
        if any(all(printed[key] == value for key, value in rule.items()) for rule in left_out):
            continue
        folder = _fill(out, printed, f"{name}: out")
        if folder in seen:
            raise UserError(f"{name}: two jobs write to {folder}: out needs more of {', '.join(grid)}")
        seen[folder] = folder
        known = {**printed, "out": folder}
        words = []
        for word in template:
            whole = PLACEHOLDER.fullmatch(word)
            if whole and whole[1] in chosen:
                words += chosen[whole[1]][1]
            else:
                words.append(_fill(word, known, f"{name}: command"))
        job = Job(len(jobs), _file_name(printed), printed, words, folder, env)
        job.produces = None if produces is None else _fill(produces, known, f"{name}: produces")
        if resume:
            job.resume_if = _fill(resume["if"], known, f"{name}: resume")
            found = {**known, "found": "{found}"}
            added = _words(resume["add"], f"{name}: resume")
            job.resume_words = [_fill(word, found, f"{name}: resume") for word in added]
        jobs.append(job)
    if not jobs:
        raise UserError(f"{name}: exclude leaves no job")
    return jobs


def _grid(grid: Any, name: str) -> dict[str, dict[str, list[str]]]:
    """Grid key -> printed value -> words that a word `{key}` of the command becomes."""
    if not isinstance(grid, dict) or not grid:
        raise UserError(f"{name}: grid is a mapping of names to lists of values")
    read: dict[str, dict[str, list[str]]] = {}
    for key, values in grid.items():
        where = f"{name}: grid {key}"
        if not isinstance(key, str) or not re.fullmatch(r"[A-Za-z_]\w*", key) or key in ("out", "found"):
            raise UserError(f"{where}: a name is letters, digits and _, and not out or found")
        if isinstance(values, dict) and values:
            found = {
                _printed(label, where): [] if words in ("", None) else _words(_printed(words, where), where)
                for label, words in values.items()
            }
        elif isinstance(values, list) and values:
            found = {_printed(value, where): [_printed(value, where)] for value in values}
        else:
            raise UserError(f"{where}: a list of values or a mapping of names to words")
        if len(found) < len(values):
            raise UserError(f"{where}: a value stands twice")
        read[key] = found
    return read


def _excluded(rules: Any, grid: dict[str, dict[str, list[str]]], name: str) -> list[dict[str, str]]:
    rules = [] if rules is None else rules
    if not isinstance(rules, list) or not all(isinstance(rule, dict) and rule for rule in rules):
        raise UserError(f"{name}: exclude is a list of mappings, for example [{{model: CBNM, seed: 1}}]")
    read = []
    for rule in rules:
        for key, value in rule.items():
            if key not in grid:
                raise UserError(f"{name}: exclude: the grid has no {key!r}{suggest(str(key), grid)}")
            if str(value) not in grid[key]:
                raise UserError(f"{name}: exclude: {key} is never {value!r}{suggest(str(value), grid[key])}")
        read.append({key: str(value) for key, value in rule.items()})
    return read


def _fill(text: str, values: dict[str, str], where: str) -> str:
    def value(match: re.Match) -> str:
        if match[1] not in values:
            raise UserError(f"{where}: nothing is called {{{match[1]}}}{suggest(match[1], values)}")
        return values[match[1]]

    return PLACEHOLDER.sub(value, text)


def _file_name(values: dict[str, str]) -> str:
    text = ",".join(f"{key}={value}" for key, value in values.items())
    safe = re.sub(r"[^\w.,=+-]", "_", text)
    if safe == text and len(safe) <= 120:
        return safe
    return f"{safe[:100]}-{hashlib.sha256(text.encode()).hexdigest()[:8]}"


# ------------------------------------------------------------------------------------------------ markers and locks


def write_json(path: Path, value: Any) -> None:
    """Atomic: `path` is the old file or the whole new one. (A login node need not import torch for it.)"""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(value, file, indent=1)
            file.flush()
            os.fsync(file.fileno())
        os.replace(name, path)
    except BaseException:
        Path(name).unlink(missing_ok=True)
        raise


def read_json(path: Path) -> dict[str, Any]:
    """The object in `path`; an empty one when it is absent or damaged."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def process_start(pid: int) -> str:
    """What tells a process from a later one with its number: its start time; "" when there is none, or no /proc."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


def is_alive(process: Any) -> bool:
    """Whether a process of this machine, [pid, start], still runs."""
    try:
        pid, start = int(process[0]), str(process[1])
        os.kill(pid, 0)
    except PermissionError:
        pass
    except (TypeError, ValueError, IndexError, KeyError, OverflowError, ProcessLookupError):
        return False
    return start in ("", process_start(pid))


class Lock:
    """`<job>.lock`: who runs the job. Created by O_EXCL, so that of several sweeps one wins, also on a shared disk."""

    def __init__(self, path: Path, digest: str):
        self.path, self.digest = path, digest
        self.mine = {"host": socket.gethostname(), "processes": [[os.getpid(), process_start(os.getpid())]]}
        self.mine |= {"digest": digest, "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        self.earlier: dict[str, Any] = {}  # a dead process's lock that was taken over

    def acquire(self) -> bool:
        try:
            handle = os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        except FileExistsError:
            return self._take_over()
        with os.fdopen(handle, "w") as file:
            json.dump(self.mine, file)
        return True

    def _take_over(self) -> bool:
        # Only processes of one machine ever judge a lock dead, so a lock of that machine's kernel decides between them.
        # The file itself is replaced in one step: nobody can create it meanwhile.
        with open(self.path.with_suffix(".takeover"), "w") as guard:
            fcntl.flock(guard, fcntl.LOCK_EX)
            if not self.path.exists() or not is_stale(self.path):
                return False
            self.earlier = read_json(self.path)
            write_json(self.path, self.mine)
            return True

    def note_child(self, pid: int) -> None:
        """The job's own process keeps the lock alive when the sweep is killed."""
        self.mine["processes"].append([pid, process_start(pid)])
        write_json(self.path, self.mine)

    def release(self) -> None:
        if read_json(self.path) == self.mine:
            self.path.unlink(missing_ok=True)


def is_stale(path: Path) -> bool:
    """Whether every process of a lock is a dead one of this machine; an unreadable lock is after ten seconds."""
    lock = read_json(path)
    if not lock:
        with contextlib.suppress(OSError):
            return time.time() - path.stat().st_mtime > 10
        return True
    processes = lock.get("processes")
    if lock.get("host") != socket.gethostname() or not isinstance(processes, list):
        return False
    return not any(is_alive(process) for process in processes)


# -------------------------------------------------------------------------------------------------------------- jobs


class Sweep:
    """The jobs of a manifest, the folder they run in, and the folder of their state."""

    def __init__(self, jobs: list[Job], folder: Path, state: Path):
        self.jobs, self.folder, self.state = jobs, folder, state

    def place(self, job: Job, suffix: str) -> Path:
        return self.state / f"{job.name}.{suffix}"

    def has_product(self, job: Job) -> bool:
        return job.produces is None or bool(self.find(job.produces))

    def find(self, pattern: str) -> list[str]:
        place = os.path.join(glob.escape(str(self.folder)), pattern)  # an absolute pattern stands for itself
        return glob.glob(place, recursive=True)

    def status(self, job: Job) -> str:
        """done, failed, interrupted, changed, running or open."""
        lock = self.place(job, "lock")
        if lock.exists() and not is_stale(lock):
            return "running"
        marker = read_json(self.place(job, "json"))
        if not marker:
            return "open"
        if marker.get("digest") != job.digest:
            return "changed"
        if marker.get("interrupted"):
            return "interrupted"
        return "done" if self.finished(job, marker) else "failed"

    def finished(self, job: Job, marker: dict[str, Any]) -> bool:
        went_well = marker.get("exit") == 0 and not marker.get("interrupted") and marker.get("digest") == job.digest
        return went_well and self.has_product(job)

    def command(self, job: Job, earlier: dict[str, Any]) -> list[str]:
        """The words to start: with those of `resume` when an earlier try of the same command left its file."""
        if job.resume_if is None or earlier.get("digest") != job.digest:
            return job.words
        found = self.find(job.resume_if)
        if not found:
            return job.words
        newest = max(found, key=os.path.getmtime)
        return job.words + [word.replace("{found}", newest) for word in job.resume_words]


@dataclass
class Running:
    job: Job
    lock: Lock
    process: subprocess.Popen
    log: IO[bytes]
    started: float
    slot: int


def start(sweep: Sweep, job: Job, slot: int, env: dict[str, str]) -> Running | None:
    """Start a job, or None when another sweep has it (or has finished it meanwhile)."""
    lock = Lock(sweep.place(job, "lock"), job.digest)
    if not lock.acquire():
        return None
    try:
        marker = read_json(sweep.place(job, "json"))
        if sweep.finished(job, marker):
            lock.release()
            return None
        words = sweep.command(job, lock.earlier or marker)
        log = sweep.place(job, "log").open("ab")
        log.write(f"# {time.strftime('%Y-%m-%d %H:%M:%S')} {socket.gethostname()}: {shlex.join(words)}\n".encode())
        log.flush()
        try:
            # a session of its own: a terminal's Ctrl-C reaches the job once, by us
            process = subprocess.Popen(
                words, cwd=sweep.folder, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT,
                start_new_session=True,
            )  # fmt: skip
        except OSError as error:
            log.write(f"cannot start {words[0]}: {error.strerror}\n".encode())
            log.close()
            write_json(sweep.place(job, "json"), result(job, 127, 0.0, False))
            lock.release()
            raise UserError(f"cannot start {words[0]!r}: {error.strerror}") from error
        lock.note_child(process.pid)
    except BaseException:
        lock.release()
        raise
    return Running(job, lock, process, log, time.time(), slot)


def result(job: Job, code: int, seconds: float, interrupted: bool) -> dict[str, Any]:
    """What `<job>.json` holds."""
    return {
        "exit": code, "interrupted": interrupted, "digest": job.digest, "minutes": round(seconds / 60, 3),
        "command": shlex.join(job.words), "out": job.out, "values": job.values, "host": socket.gethostname(),
        "ended": time.strftime("%Y-%m-%d %H:%M:%S"),
    }  # fmt: skip


def finish(sweep: Sweep, running: Running, interrupted: bool) -> bool:
    """Write the marker of a job that has ended, free it, print a line; whether it went well."""
    job, code = running.job, running.process.returncode
    code = 128 - code if code < 0 else code
    seconds = time.time() - running.started
    running.log.close()
    write_json(sweep.place(job, "json"), result(job, code, seconds, interrupted))
    running.lock.release()
    good = code == 0 and not interrupted and sweep.has_product(job)
    if interrupted:
        say = f"interrupted (exit code {code})"
    elif code == 0 and not good:
        say = f"FAILED: {job.produces} was not written"
    else:
        say = "done" if good else f"FAILED (exit code {code})"
    print(f"[{job.index}] {job.name}: {say} after {seconds / 60:.1f} min, {sweep.place(job, 'log')}", flush=True)
    return good


def visible_gpus() -> list[str]:
    """Names for CUDA_VISIBLE_DEVICES: those that it allows, else all of nvidia-smi."""
    allowed = os.environ.get("CUDA_VISIBLE_DEVICES")
    if allowed is not None:
        names = [name.strip() for name in allowed.split(",")]
        return list(itertools.takewhile(lambda name: name not in ("", "-1"), names))
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return []
    return [str(i) for i in range(sum(line.startswith("GPU ") for line in listed.stdout.splitlines()))]


def job_environment(job: Job, slot: int, jobs: int, gpus: list[str]) -> dict[str, str]:
    """The environment of a job in `slot` of `jobs`: what is set already wins over the manifest and over our choice."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    env = {"OMP_NUM_THREADS": str(max(1, cores // jobs)), **job.env, **os.environ}
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", "")])
    if jobs > 1 and gpus:
        env["CUDA_VISIBLE_DEVICES"] = gpus[slot % len(gpus)]
    return env


class Signals:
    """Remembers SIGINT and SIGTERM instead of dying of them; `count` says how many came."""

    def __init__(self) -> None:
        self.first: int | None = None
        self.count = 0

    def __enter__(self) -> "Signals":
        self._before = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}
        return self

    def _receive(self, number: int, frame: Any) -> None:
        self.first = self.first or number
        self.count += 1

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


def send(running: list[Running], number: int) -> None:
    for one in running:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(one.process.pid, number)


@contextlib.contextmanager
def stopped_on_error(running: list[Running]) -> Iterator[None]:
    """No job outlives an error of ours (a full disk under the markers): it is told to save, and waited for."""
    try:
        yield
    except BaseException:
        send(running, signal.SIGTERM)
        for one in running:
            one.process.wait()
        raise


def run(sweep: Sweep, chosen: list[Job], slots: int) -> int:
    """Run the jobs, at most `slots` at a time; returns the exit code of the whole."""
    sweep.state.mkdir(parents=True, exist_ok=True)
    gpus = visible_gpus() if slots > 1 else []
    waiting = list(chosen)
    running: list[Running] = []
    failed: list[Job] = []
    elsewhere: list[Job] = []
    forwarded = 0
    with Signals() as signals, stopped_on_error(running):
        while waiting or running:
            if signals.count > forwarded:
                forwarded = signals.count
                waiting.clear()
                print("stopping: waiting for the running jobs" if forwarded == 1 else "killing them", flush=True)
                send(running, signals.first if forwarded == 1 else signal.SIGKILL)
            while waiting and len(running) < slots and not signals.count:
                job = waiting.pop(0)
                if sweep.status(job) == "done":
                    continue
                slot = min(set(range(slots)) - {one.slot for one in running})
                try:
                    begun = start(sweep, job, slot, job_environment(job, slot, slots, gpus))
                except UserError as error:
                    print(f"[{job.index}] {job.name}: FAILED: {error}", flush=True)
                    failed.append(job)
                    continue
                if begun is not None:
                    running.append(begun)
                    print(f"[{job.index}] {job.name}: started, {job.out}", flush=True)
                elif sweep.status(job) != "done":
                    elsewhere.append(job)
            for one in list(running):
                if one.process.poll() is not None:
                    running.remove(one)
                    if not finish(sweep, one, signals.count > 0) and not signals.count:
                        failed.append(one.job)
            if running:
                time.sleep(POLL_SECONDS)
        for job in elsewhere:
            lock = sweep.place(job, "lock")
            held = read_json(lock)
            who = f"{held.get('host')} since {held.get('since')}" if held else "another call"
            print(f"[{job.index}] {job.name}: run by {who}; if it is dead there, remove {lock}", flush=True)
        done = sum(sweep.status(job) == "done" for job in chosen)
        print(f"{done} of {len(chosen)} jobs done", flush=True)
        if signals.first is not None:
            return 128 + signals.first
    for job in failed:
        print(f"failed: [{job.index}] {job.name}, {sweep.place(job, 'log')}", file=sys.stderr)
    return 1 if failed else 0


# ----------------------------------------------------------------------------------------------------------- command


class Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (python scripts/sweep.py --help)")


def make_parser() -> Parser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)
    parser.add_argument("manifest", type=Path)
    parser.add_argument("--jobs", type=int, default=1, help="processes at a time (1)")
    what = parser.add_mutually_exclusive_group()
    what.add_argument("--list", action="store_true", help="print the jobs, run nothing")
    what.add_argument("--index", type=int, help="run this job only (its number in --list)")
    parser.add_argument("--only", nargs="+", default=[], metavar="KEY=VALUE", help="jobs with these values only")
    parser.add_argument("--folder", type=Path, default=ROOT, help="where commands run and runs/ lies (the repository)")
    return parser


def select(jobs: list[Job], only: list[str]) -> list[Job]:
    """The jobs with all the given values; several values of one key mean any of them. Raises UserError."""
    wanted: dict[str, set[str]] = {}
    for item in only:
        key, equals, value = item.partition("=")
        known = {job.values[key] for job in jobs if key in job.values}
        if not equals or not known:
            raise UserError(f"--only {item}: KEY=VALUE with one of {', '.join(jobs[0].values)}")
        if value not in known:
            raise UserError(f"--only {item}: {key} is one of {', '.join(sorted(known))}{suggest(value, known)}")
        wanted.setdefault(key, set()).add(value)
    return [job for job in jobs if all(job.values[key] in values for key, values in wanted.items())]


def main(argv: list[str] | None = None) -> None:
    """The command. Raises UserError for a bad manifest or option, SystemExit(1, 130, 143) after a run."""
    args = make_parser().parse_args(argv)
    if args.jobs < 1:
        raise UserError(f"--jobs {args.jobs}: at least 1")
    jobs = read_manifest(args.manifest)
    folder = args.folder.resolve()
    sweep = Sweep(jobs, folder, folder / "runs" / "sweeps" / args.manifest.stem)
    chosen = select(jobs, args.only)
    if args.index is not None:
        if not 0 <= args.index < len(jobs):
            raise UserError(f"--index {args.index}: the manifest has jobs 0 to {len(jobs) - 1}")
        chosen = [job for job in chosen if job.index == args.index]
    if not chosen:
        raise UserError(f"--only {' '.join(args.only)}: no such job")
    if args.list:
        for job in chosen:
            print(f"[{job.index}] {sweep.status(job):12}{job.name}\n    {shlex.join(job.words)}")
        call = f"python scripts/sweep.py {args.manifest} --index $SLURM_ARRAY_TASK_ID"
        print(f"{len(chosen)} of {len(jobs)} jobs; with SLURM: sbatch --array=0-{len(jobs) - 1} --wrap 'exec {call}'")
        return
    code = run(sweep, chosen, args.jobs)
    if code:
        raise SystemExit(code)


if __name__ == "__main__":
    sys.exit(run_command(main))
