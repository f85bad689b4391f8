"""Run one step of an experiment, or any command, and keep the record of what really ran.

    python scripts/job.py sweeps/glancenet/parity.yaml EXPERIMENT STEP      as the engine (scripts/Snakefile) does
    python scripts/job.py runs/my_run -- python inv_flow/inv_flow_mnist.py --out runs/my_run --resume auto

The record is <folder>/record.json: for each step the commands, seconds (over all tries), hardware, threads, commit,
date, digest. One process at a time works on an experiment, others wait. SIGTERM, Ctrl-C and the death of the engine ask
the command to save; a second signal, three seconds later or more, kills it. Output passes through, each line behind
[minutes:seconds name]; a silent command is spoken for. Exit codes: the command's, 2 for a bad call or a product that
is missing, 130 interrupted.
"""

import contextlib
import fcntl
import json
import os
import platform
import re
import select
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0:1] = [str(Path(__file__).resolve().parents[1])]

from common.errors import UserError, run_command
from scripts.experiments import ROOT, Step, read_table

QUIET = 15.0  # seconds without output after which the step is spoken for
BEGIN = float(os.environ.get("JOB_CLOCK") or time.time())


def read_record(path: Path) -> dict[str, Any]:
    """The steps' records; empty when there is no file or it is damaged."""
    try:
        record = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def asked(*words: str) -> str:
    """What a program answers; "" without it."""
    try:
        return subprocess.run(words, capture_output=True, text=True, timeout=60, cwd=ROOT).stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        return ""


def hardware() -> str:
    """The machine as a row names it: the GPUs that are visible, or the CPU with its threads."""
    gpus = asked("nvidia-smi", "--query-gpu=name", "--format=csv,noheader").splitlines()
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = (
        len(gpus) if visible is None else min(len(gpus), len([v for v in visible.split(",") if v not in ("", "-1")]))
    )
    if count:
        return f"{count} x {gpus[0]}"
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    model = re.search(r"model name\s*:\s*(.*)", info)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    threads = os.environ.get("OMP_NUM_THREADS") or str(cores)
    return f"{model[1].strip() if model else platform.machine()}, {threads} of {cores} threads"


class Job:
    """A step of an experiment in `folder`, under its lock."""

    def __init__(self, folder: Path, name: str, step: str, watch: str = ""):
        self.folder, self.name, self.step, self.watch = folder, name, step, watch
        self.stopped = self.sent = 0.0
        self.last = "no output"
        folder.mkdir(parents=True, exist_ok=True)
        self.record_path, self.done = folder / "record.json", folder / f"{step}.done"
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self.stop)

    def stop(self, number: int, frame: Any) -> None:
        """A first signal asks to save; one that comes three seconds later kills."""
        if self.stopped and time.time() - self.stopped > 3:
            self.sent = -1.0
        self.stopped = self.stopped or time.time()

    def say(self, text: str) -> None:
        """One line with the time since the start."""
        seconds = int(time.time() - BEGIN)
        print(f"[{seconds // 60:02d}:{seconds % 60:02d} {self.name}] {text}"[:400], flush=True)

    def orphaned(self) -> bool:
        """Whether the engine that started this process is dead."""
        return os.getppid() != PARENT

    def lock(self) -> None:
        """Wait until no other process works on the experiment. Raises KeyboardInterrupt when stopped meanwhile."""
        self.handle = open(self.folder / ".job", "a")  # noqa: SIM115  held until the process ends
        told = False
        while not self.stopped and not self.orphaned():
            try:
                return fcntl.flock(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                told = told or self.say(f"{self.step}: another process is at work in {self.folder}; waiting") or True
                time.sleep(0.2)
        raise KeyboardInterrupt

    def write(self, entry: dict[str, Any]) -> None:
        """The record of this step, in one piece."""
        record = read_record(self.record_path) | {self.step: entry}
        part = self.record_path.with_suffix(".part")
        part.write_text(json.dumps(record, indent=1) + "\n")
        os.replace(part, self.record_path)

    def run(self, commands: list[list[str]], cwd: Path, digest: str, env: dict[str, str]) -> int:
        """Run the commands in order up to the first that fails, and keep the record; the exit code."""
        before = read_record(self.record_path).get(self.step, {})
        same = before.get("digest") == digest and not before.get("finished")
        entry = {"commands": [shlex.join(words) for words in commands], "digest": digest, "finished": False,
                 "folder": os.path.relpath(cwd), "seconds": before.get("seconds", 0.0) if same else 0.0,
                 "cpu_seconds": before.get("cpu_seconds", 0.0) if same else 0.0, "hardware": hardware(),
                 "commit": asked("git", "rev-parse", "--short=7", "HEAD"),
                 "changed": bool(asked("git", "diff", "HEAD", "--stat")),
                 "date": time.strftime("%Y-%m-%d"), "python": platform.python_version()}  # fmt: skip
        self.done.unlink(missing_ok=True)
        self.write(entry)
        code = 0
        for words in commands:
            start, clock = time.time(), os.times()
            self.say(f"{self.step}: {shlex.join(words)}")
            code = self.follow(words, cwd, env)
            after = os.times()
            cpu = after.children_user + after.children_system - clock.children_user - clock.children_system
            entry["seconds"] = round(entry["seconds"] + time.time() - start, 1)
            entry["cpu_seconds"] = round(entry["cpu_seconds"] + cpu, 1)
            self.write(entry)
            if self.stopped:
                raise KeyboardInterrupt
            if code:
                self.write(entry | {"exit": code, "last": self.last})
                self.say(f"{self.step}: FAILED, exit code {code}; log: {self.folder / (self.step + '.log')}")
                return code
        self.entry = entry
        return 0

    def finish(self) -> None:
        """Mark the step as done."""
        self.write(self.entry | {"finished": True})
        self.done.touch()
        self.say(f"{self.step}: done in {self.entry['seconds']:.0f} s")

    def follow(self, words: list[str], cwd: Path, env: dict[str, str]) -> int:
        """Run `words`, passing on its lines; the exit code."""
        program = sys.executable if words[0] == "python" else words[0]
        start = spoke = time.time()
        rest = b""
        with open(self.folder / f"{self.step}.log", "ab") as log:
            log.write(f"# {time.strftime('%Y-%m-%d %H:%M:%S')} {platform.node()}: {shlex.join(words)}\n".encode())
            try:  # a session of its own: a terminal's Ctrl-C reaches it once, by us
                child = subprocess.Popen(
                    [program, *words[1:]], cwd=cwd, env=env, stdin=subprocess.DEVNULL, bufsize=0,
                    stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True,
                )  # fmt: skip
            except OSError as error:
                raise UserError(f"cannot start {words[0]}: {error.strerror}") from error
            while True:
                ready, _, _ = select.select([child.stdout], [], [], 0.5)
                chunk = os.read(child.stdout.fileno(), 65536) if ready else b""
                if ready:
                    log.write(chunk)
                    log.flush()
                    *lines, rest = (rest + chunk).replace(b"\r", b"\n").split(b"\n")
                    for line in filter(
                        str.strip, (one.decode(errors="replace") for one in [*lines, b"" if chunk else rest])
                    ):
                        spoke, self.last = time.time(), line.strip()[:200]
                        self.say(f"  {line[:200]}")
                    if not chunk:
                        break
                elif time.time() - spoke > QUIET:
                    spoke = time.time()
                    self.say(f"  {self.step} is running, {spoke - start:.0f} s{progress(self.watch)}")
                self.tell(child)
            return child.wait()

    def tell(self, child: subprocess.Popen) -> None:
        """Pass a stop on to the command, once; kill it when asked again."""
        if self.orphaned() and not self.stopped:
            self.stopped = time.time()
        if self.stopped and self.sent <= 0:
            number = signal.SIGKILL if self.sent < 0 else signal.SIGTERM
            self.sent = time.time()
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, number)


def progress(watch: str) -> str:
    """How far a quiet step is, from the last row of the file that it writes."""
    found = sorted(Path().glob(watch), key=lambda path: path.stat().st_mtime) if watch else []
    lines = found[-1].read_text(errors="replace").splitlines() if found else []
    row = dict(zip(lines[0].split(","), lines[-1].split(","), strict=False)) if len(lines) > 1 else {}
    return "".join(f", {name} {row[name]}" for name in ("epoch", "step", "iter", "iteration") if row.get(name))


def take_gpus(count: int) -> str | None:
    """Indices for CUDA_VISIBLE_DEVICES that no other job of this machine holds; None leaves the variable alone."""
    if "SLURM_JOB_ID" in os.environ or not count:
        return None
    names = os.environ.get("CUDA_VISIBLE_DEVICES") or os.environ.get("JOB_GPUS", "")
    names = [name for name in names.split(",") if name not in ("", "-1")]
    held = []
    for name in names if len(names) > count else []:
        handle = open(f".snakemake/gpu_{re.sub(r'[^A-Za-z0-9-]', '_', name)}", "a")  # noqa: SIM115
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            held.append((name, handle))
        except BlockingIOError:
            handle.close()
        if len(held) == count:
            HELD.extend(held)
            return ",".join(name for name, _ in held)
    return None


def run_step(manifest: str, experiment: str, step: Step, table: Any) -> None:
    """One step of a table's experiment, as its rule asks for it."""
    out = Path(table.out(experiment))
    name = table.name if table.paper == "quickstart" else f"{table.paper}/{table.name}/{experiment}"
    job = Job(out, name, step.name, table.fill(step.watch, experiment))
    job.lock()
    digest, makes = table.digest(experiment, step), [Path(table.fill(name, experiment)) for name in step.makes]
    record = read_record(job.record_path).get(step.name, {})
    if step.clears and record and record.get("digest") != digest:
        for name in step.clears:
            path = Path(table.fill(name, experiment))
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    for path in makes:
        path.parent.mkdir(parents=True, exist_ok=True)
    env = {**table.keys.get("env", {}), **os.environ, "PYTHONUNBUFFERED": "1", "PYTHON": sys.executable}
    gpus = take_gpus(table.keys.get("gpus", 1))
    env |= {"CUDA_VISIBLE_DEVICES": gpus} if gpus else {}
    env["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), env.get("PATH", "")])
    env = {key: str(value) for key, value in env.items()}
    os.environ |= {"CUDA_VISIBLE_DEVICES": gpus} if gpus else {}
    if code := job.run(table.commands(experiment, step), Path(table.fill(step.folder, experiment)), digest, env):
        raise SystemExit(code if code > 0 else 128 - code)
    if absent := [str(path) for path in makes if not path.exists()]:
        raise UserError(f"{experiment}: {step.name} ended without writing {', '.join(absent)}")
    job.finish()


HELD: list[Any] = []
PARENT = os.getppid()


def main() -> None:
    """The command. Raises UserError for a bad call, SystemExit with the command's exit code."""
    argv = sys.argv[1:]
    if len(argv) > 2 and argv[1] == "--":
        job = Job(Path(argv[0]), argv[0], "run")
        job.lock()
        if code := job.run([argv[2:]], Path(), shlex.join(argv[2:]), dict(os.environ)):
            raise SystemExit(code if code > 0 else 128 - code)
        return job.finish()
    if len(argv) != 3:
        raise UserError("python scripts/job.py MANIFEST EXPERIMENT STEP, or FOLDER -- COMMAND")
    table = read_table(Path(argv[0]), checked=True)
    step = next((step for step in table.steps if step.name == argv[2]), None)
    if step is None or argv[1] not in table.experiments:
        raise UserError(f"{argv[0]}: no step {argv[2]} of an experiment {argv[1]}")
    run_step(argv[0], argv[1], step, table)


if __name__ == "__main__":
    sys.exit(run_command(main))
