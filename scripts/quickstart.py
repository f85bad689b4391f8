"""The five papers in small: train, evaluate, draw, and write one page about it. `scripts/quickstart.sh` installs first.

    python scripts/quickstart.py                      # all papers, two at a time
    python scripts/quickstart.py --paper nfpi --paper lbae
    python scripts/quickstart.py --dry-run            # only print the commands
    python scripts/quickstart.py --fresh              # forget what is done and begin anew

Every step is a documented command of a paper's folder, run as it is printed. A step that ended well leaves a marker
with a digest of its command and of those before it: a second call skips it, a changed or interrupted one runs again (an
interrupted training goes on from its last checkpoint). A paper that fails does not stop the others; the exit code is
then 1. Ctrl-C lets the trainings save.

Written to results/quickstart/: index.html and pictures/ (the page), steps/ (markers), logs/ (what each step printed)
and a folder of runs for each paper. Real MNIST, when it is in DATA_ROOT or data/, takes the place of scikit-learn's
digits where a small run on it says something.
"""

import argparse
import concurrent.futures
import fcntl
import hashlib
import json
import os
import select
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from common.errors import EXIT_INTERRUPTED, UserError, run_command, suggest  # noqa: E402

QUIET = 15.0  # seconds without output after which the runner speaks for the child
GRACE = 60.0  # seconds that a child has to save after a stop signal
MNIST_FILES = [f"{part}-{kind}" for part in ("train", "t10k") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")]


@dataclass(frozen=True)
class Step:
    """One command. Paths are relative to the repository."""

    name: str
    words: tuple[str, ...]
    makes: tuple[str, ...] = ()  # files or folders that it must have written
    clears: tuple[str, ...] = ()  # what a start from scratch removes first
    resume: tuple[str, tuple[str, ...]] = ("", ())  # (glob of a saved state, words that go on from it; {} is its path)
    folder: str = "."  # where it runs
    watch: str = ""  # a metrics.csv whose last row tells how far it is

    @property
    def shown(self) -> str:
        """The command as one would type it in the repository's root."""
        text = shlex.join(self.words)
        return text if self.folder == "." else f"(cd {shlex.quote(self.folder)} && {text})"


@dataclass(frozen=True)
class Paper:
    """The steps of one paper, in order, and the data that they use."""

    name: str
    steps: tuple[Step, ...]
    data: str = ""


@dataclass
class Outcome:
    """What happened to a paper: the record of each finished step, and why it stopped."""

    paper: Paper
    records: list[dict[str, Any]] = field(default_factory=list)
    error: str = ""


def find_mnist() -> Path | None:
    """The folder of data sets when it holds all four files of MNIST."""
    root = Path(os.environ.get("DATA_ROOT") or ROOT / "data")
    raw = root / "MNIST" / "raw"
    found = all((raw / name).is_file() or (raw / f"{name}.gz").is_file() for name in MNIST_FILES)
    return root.resolve() if found else None


DATA = {
    "digits": "scikit-learn's digits: 1,797 images of 8x8 pixels and 17 grey levels, a fifth of them for testing",
    "sprites": "sprites rendered here: 3 shapes, 4 scales, 12 x 12 positions, one orientation (1,728 images of 64x64); "
    "for the leakage 20 orientations at the centre (training) and in two corners (1,500 test images)",
    "mnist": "real MNIST from the data folder",
}


def plan(out: str, mnist: bool) -> list[Paper]:
    """The steps of the five papers below `out`, the papers that take longest first; on MNIST where `mnist` says so."""
    return [glancenet(out, mnist), latent_flow(out, mnist), lbae(out, mnist), nfpi(out), inv_flow(out)]


def command(text: str) -> tuple[str, ...]:
    """The words of a command line."""
    return tuple(shlex.split(text))


def lbae(out: str, mnist: bool) -> Paper:
    """Autoencoder with binary codes: train, generate by four methods, distances to test images."""
    name, exp = ("mnist" if mnist else "digits"), f"{out}/lbae/exp"
    sizes = "dataset=digits width=16 zsize=64 batch_size=32 epochs_max=40"
    if mnist:
        sizes = "width=8 zsize=100 batch_size=128 epochs_max=6 train_images=20000 test_images=2000"
    root = os.path.relpath(ROOT, ROOT / exp)
    train = Step(
        "train",
        command(f"python lbae/mnist.py {sizes} lr=1e-3 device=cpu exp={exp}"),
        makes=(f"{exp}/models/best.safetensors", f"{exp}/latents-last.npz"),
        clears=(f"{out}/lbae",),
        resume=(f"{exp}/models/last.cp", ("l",)),
        watch=f"{exp}/metrics.csv",
    )
    generate = Step(
        "generate and score",
        command(f"bash {root}/eval.sh methods=cov,int,independent,random feat=pixel-pca64 device=cpu"),
        makes=(f"{exp}/results.txt", f"{exp}/PR.png"),
        clears=(f"{exp}/results.txt", f"{exp}/generated"),
        folder=exp,
    )
    fewer = " train_images=2000" if mnist else ""
    real = Step(
        "write real images",
        command(f"python lbae/mnist.py l eval eval_train{fewer} device=cpu exp={exp}"),
        makes=(f"{out}/lbae/{name}_train",),
        clears=(f"{out}/lbae/{name}_train",),
    )
    samples = ",".join(f"generated/samples_{method}" for method in ("cov", "int", "independent", "random"))
    score = Step(
        "score real images too",
        command(
            f"python {root}/lbae/eval.py s=../{name}_eval t=../{name}_train,{samples},reco feat=pixel-pca64 device=cpu"
        ),
        makes=(f"{exp}/results.txt", f"{exp}/PR.png"),
        folder=exp,
    )
    return Paper("lbae", (train, generate, real, score), DATA[name])


def glancenet(out: str, mnist: bool) -> Paper:
    """GlanceNet, concept bottleneck, an untrained network and position leakage on sprites; parity leakage on MNIST."""
    base = f"{out}/glancenet"
    common = (
        "--dset_name sprites --dset_dir data --sprites_sizes 3 4 1 12 12 --include_labels 1 2 4 5 "
        "--encoder PadlessGaussianConv64 --z_dim 7 --z_class 7 --label_weight 100 --latent_weight 2000 --lr_G 0.001 "
        "--warmup_epochs 0 --early_stopping false --hold_data true --evaluation_metric dci --evaluate_iter 100000 "
        "--test_iter 210 --ckpt_save_iter 105 --metric_train 1000 --metric_eval 500 --mc_samples 20 --device cpu"
    )
    vae = "--decoder ShallowLinear --conditional_prior true"

    def train(title: str, name: str, alg: str, more: str) -> Step:
        log, place = f"{base}/logs/sprites__{alg}/{name}", f"{base}/checkpoints/{name}"
        return Step(
            title,
            command(
                f"python glancenet/main.py --alg {alg} {common} {more} --name {name} --out_path {name} "
                f"--log_dir {base}/logs --ckpt_dir {base}/checkpoints --train_output_dir {base}/pictures"
            ),
            makes=(f"{place}/model.safetensors", f"{log}/eval_results/dis_metrics.csv"),
            clears=(log, place, f"{base}/pictures/{name}"),
            resume=(f"{place}/last", ("--ckpt_load", "{}")),
            watch=f"{log}/run/metrics.csv",
        )

    steps = [
        train("train GlanceNet", "glancenet", "GlanceNet", f"{vae} --max_epoch 30 --traverse_z true"),
        train("train CBNM", "cbnm", "CBNM", "--max_epoch 30"),
        train("untrained network", "untrained", "GlanceNet", f"{vae} --max_iter 1"),
        Step(
            "evaluate",
            command(f"python glancenet/evaluate.py {base}/logs --out {base}/evaluation"),
            makes=(f"{base}/evaluation/runs.csv",),
        ),
        Step(
            "make leakage sprites",
            command(
                "python glancenet/prepare_dsprites_leakage.py --source sprites --sizes 3 6 20 32 32 --test_images 1500 "
                f"--out {base}/data"
            ),
            makes=(f"{base}/data/dsprites_leakage_train.npz", f"{base}/data/dsprites_leakage_test.npz"),
        ),
        Step(
            "position leakage",
            command(
                f"python glancenet/leakage.py --dset_dir {base}/data --models cbnm glancenet --out {base}/leakage "
                "--device cpu -- --encoder PadlessGaussianConv64 --decoder ShallowLinear --max_epoch 20 "
                "--warmup_epochs 0 --test_iter 180"
            ),
            makes=(f"{base}/leakage/leakage.json", f"{base}/leakage/pca.png"),
            clears=(f"{base}/leakage",),
        ),
    ]
    if mnist:
        parity = f"python glancenet/mnist_parity.py --max_iter 1500 --device cpu --out {base}/parity"
        steps.append(
            Step(
                "parity leakage",
                command(parity),
                makes=(f"{base}/parity/results.json", f"{base}/parity/leakage.png"),
                clears=(f"{base}/parity",),
                resume=(f"{base}/parity/*/*.safetensors", ("--reuse", "true")),
            )
        )
    return Paper("glancenet", tuple(steps), DATA["sprites"] + (f"; {DATA['mnist']}" if mnist else ""))


def latent_flow(out: str, mnist: bool) -> Paper:
    """Supervised flows of scale, rotation and hue: train, evaluate beside trivial baselines, draw."""
    run, name = f"{out}/latent_flow/run", ("mnist" if mnist else "digits")
    sizes = "" if mnist else "--dataset digits --image-size 28 "
    train = Step(
        "train",
        command(
            f"python -m latent_flow.train_vae_scratch {sizes}--latent-size 32 --max-iter 1600 --batch-size 16 "
            "--lr-vae 2e-3 --support-set-lr 1e-3 --log-freq 100 --ckp-freq 200 --eval-images 10 --device cpu "
            f"--out {run}"
        ),
        makes=(f"{run}/final.pt",),
        clears=(run,),
        resume=(f"{run}/checkpoint.pt", ("--resume",)),
        watch=f"{run}/metrics.csv",
    )
    images = 300 if mnist else 280
    evaluate = Step(
        "evaluate",
        command(f"python -m latent_flow.evaluate --exp {run} --images {images} --vp-pairs 0 --device cpu"),
        makes=(f"{run}/eval.json",),
    )
    draw = Step(
        "draw",
        command(f"python -m latent_flow.show_flows --exp {run} --samples 6 --device cpu"),
        makes=(f"{run}/pictures/rotation.gif",),
        clears=(f"{run}/pictures",),
    )
    data = DATA[name] if mnist else f"{DATA[name]}, enlarged to 28x28"
    return Paper("latent_flow", (train, evaluate, draw), data)


def inv_flow(out: str) -> Paper:
    """The same flow with the inverse convolution and without."""
    common = (
        "--dataset digits --levels 17 --block_size 4 --coupling snf --coupling_width 64 --split_width 64 --conv1x1 "
        "--activation SLR --scheduler_name none --warmup_epochs 0 --epochs 30 --eval_epochs 5 --sample_epochs 30"
    )

    def train(title: str, layer: str) -> Step:
        run = f"{out}/inv_flow/{layer}"
        return Step(
            title,
            command(f"python inv_flow/inv_flow_mnist.py {common} --layer {layer} --device cpu --out {run}"),
            makes=(f"{run}/checkpoints/best.safetensors", f"{run}/samples/30.png"),
            clears=(run,),
            resume=(f"{run}/checkpoints/last.pt", ("--resume",)),
            watch=f"{run}/metrics.csv",
        )

    run = f"{out}/inv_flow/inverse"
    evaluate = Step(
        "evaluate",
        command(f"python inv_flow/inv_flow_mnist.py --evaluate --device cpu --out {run}"),
        makes=(f"{run}/evaluation.json", f"{run}/recon/evaluation.png"),
    )
    steps = (train("train with inverse convolution", "inverse"), train("train without", "none"), evaluate)
    return Paper("inv_flow", steps, DATA["digits"])


def nfpi(out: str) -> Paper:
    """Flow with class Gaussians and a CNN on its samples; a CNN on real images to compare."""
    main = "python nfpi/main.py --config-path=___configs/digits --config-name=mean device=cpu only_T=1"
    runs = {name: f"{out}/nfpi/{name}" for name in ("flow", "real")}
    flow = Step(
        "train flow and CNN on samples",
        command(f"{main} save_model_ckpt_every_n_epochs=4 hydra.run.dir={runs['flow']}"),
        makes=(f"{runs['flow']}/version_0/results.json",),
        clears=(runs["flow"],),
        resume=(f"{runs['flow']}/version_0/checkpoints/state_epoch*.pt", ("nf_ckpt_path={}",)),
        watch=f"{runs['flow']}/version_0/metrics.csv",
    )
    real = Step(
        "train CNN on real images",
        command(f"{main} train_nf=0 test_nf_alone=0 classifier_nf_strategy=do_not_use hydra.run.dir={runs['real']}"),
        makes=(f"{runs['real']}/version_0/results.json",),
        clears=(runs["real"],),
    )
    return Paper("nfpi", (flow, real), DATA["digits"])


class Runner:
    """Runs the steps of papers, a few papers at a time, and keeps a marker for each step in `out`/steps."""

    def __init__(self, out: Path, environment: dict[str, str] | None = None, root: Path = ROOT):
        self.out, self.root = out, root
        self.environment = {**os.environ, **(environment or {})}
        self.stopping = threading.Event()
        self.begin, self._lock = time.monotonic(), threading.Lock()

    def say(self, paper: str, text: str) -> None:
        """One line with the paper and the time since the start."""
        seconds = int(time.monotonic() - self.begin)
        with self._lock:
            print(f"[{seconds // 60:02d}:{seconds % 60:02d} {paper}] {text}"[:400], flush=True)

    def run(self, papers: Iterable[Paper], jobs: int) -> list[Outcome]:
        """Run the papers, `jobs` of them at a time; a failure ends its own paper only."""
        with concurrent.futures.ThreadPoolExecutor(max(1, jobs)) as pool:
            return list(pool.map(self.run_paper, papers))

    def run_paper(self, paper: Paper) -> Outcome:
        """All steps in order, up to the first that fails."""
        outcome, digest, again = Outcome(paper), "", False
        try:
            for number, step in enumerate(paper.steps, 1):
                title = f"step {number}/{len(paper.steps)} {step.name}"
                content = json.dumps([digest, step.words, step.folder])
                digest = hashlib.sha256(content.encode()).hexdigest()
                marker = marker_path(self.out, paper, number, step)
                record = read_record(marker)
                same = record.get("digest") == digest
                if same and record.get("finished") and not again and not self.missing(step):
                    self.say(paper.name, f"{title}: done before, skipped")
                else:
                    again = True  # what follows reads what this step writes
                    record = self.run_step(paper, step, title, marker, digest, same and not record.get("finished"))
                outcome.records.append(record)
        except StepError as error:
            outcome.error = str(error)
            self.say(paper.name, str(error) if self.stopping.is_set() else f"FAILED: {error}")
        except Exception as error:  # a defect of this script must not take the other papers with it
            outcome.error = f"{type(error).__name__}: {error}"
            self.say(paper.name, f"FAILED: {outcome.error}")
        return outcome

    def missing(self, step: Step) -> list[str]:
        """The files that `step` should have written and that are not there."""
        return [name for name in step.makes if not any(self.root.glob(name))] if step.makes else []

    def run_step(
        self, paper: Paper, step: Step, title: str, marker: Path, digest: str, interrupted: bool
    ) -> dict[str, Any]:
        """Run one command and write its marker. Raises StepError when it fails or a stop was asked."""
        if self.stopping.is_set():
            raise StepError("stopped before " + step.name)
        words, pattern = list(step.words), step.resume[0]
        states = sorted(self.root.glob(pattern), key=lambda path: path.stat().st_mtime) if pattern else []
        if interrupted and states:
            state = os.path.relpath(states[-1], self.root)
            words += [word.replace("{}", state) for word in step.resume[1]]
            self.say(paper.name, f"{title}: goes on from {state}")
        else:
            for name in step.clears:
                remove(self.root / name)
        record = {"digest": digest, "finished": False, "paper": paper.name, "name": step.name, "command": step.shown}
        write_record(marker, record)
        self.say(paper.name, f"{title}: {shlex.join(words)}")
        log = self.out / "logs" / paper.name / f"{marker.stem}.txt"
        start = time.monotonic()
        code, last, cpu = self.follow(paper, step, words, log)
        seconds = time.monotonic() - start
        if self.stopping.is_set():
            raise StepError(f"{step.name}: stopped; the next call goes on")
        if code:
            raise StepError(f"{step.name}: exit code {code}: {last or 'no output'} (log: {log})")
        if absent := self.missing(step):
            raise StepError(f"{step.name}: ended without writing {', '.join(absent)} (log: {log})")
        record |= {"finished": True, "seconds": round(seconds, 1), "cpu_seconds": round(cpu, 1)}
        write_record(marker, record)
        self.say(paper.name, f"{title}: done in {seconds:.0f} s ({cpu:.0f} s of CPU time)")
        return record

    def follow(self, paper: Paper, step: Step, words: list[str], log: Path) -> tuple[int, str, float]:
        """Run `words`, passing on its lines; returns (exit code, last line, seconds of CPU time with its children)."""
        if words[0] == "python":
            words = [sys.executable, *words[1:]]
        log.parent.mkdir(parents=True, exist_ok=True)
        start = spoke = time.monotonic()
        last, rest, asked = "", b"", 0.0
        with open(log, "wb") as copy:
            try:
                # a session of its own: Ctrl-C reaches this process alone, which then asks the child to save
                child = subprocess.Popen(
                    words, cwd=self.root / step.folder, env=self.environment, stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True, bufsize=0,
                )  # fmt: skip
            except OSError as error:
                raise StepError(f"{step.name}: cannot start {words[0]}: {error.strerror}") from error
            pipe = child.stdout.fileno()
            while True:
                ready, _, _ = select.select([pipe], [], [], 1.0)
                now = time.monotonic()
                if ready:
                    chunk = os.read(pipe, 65536)
                    copy.write(chunk)
                    copy.flush()
                    *lines, rest = (rest + chunk).replace(b"\r", b"\n").split(b"\n")
                    lines += [rest] if not chunk and rest else []
                    for line in filter(str.strip, (line.decode(errors="replace") for line in lines)):
                        last, spoke = line.strip(), now
                        self.say(paper.name, f"  {line[:200]}")
                    if not chunk:
                        break
                elif now - spoke > QUIET:
                    spoke = now
                    self.say(paper.name, f"  {step.name} is running, {now - start:.0f} s{progress(self.root, step)}")
                if self.stopping.is_set() and not asked:
                    asked = now
                    signal_group(child.pid, signal.SIGTERM)
                elif asked and now - asked > GRACE:
                    signal_group(child.pid, signal.SIGKILL)
            child.stdout.close()
            _, status, usage = os.wait4(child.pid, 0)
        child.returncode = os.waitstatus_to_exitcode(status)
        return child.returncode, last, usage.ru_utime + usage.ru_stime


class StepError(Exception):
    """Why a paper stopped, in one line."""


def signal_group(pid: int, number: int) -> None:
    """Send a signal to a child and all that it started."""
    try:
        os.killpg(pid, number)
    except ProcessLookupError:
        return


def progress(root: Path, step: Step) -> str:
    """How far a quiet step is, from the last row of the file that it writes."""
    found = sorted(root.glob(step.watch), key=lambda path: path.stat().st_mtime) if step.watch else []
    lines = found[-1].read_text(errors="replace").splitlines() if found else []
    if len(lines) < 2:
        return ""
    row = dict(zip(lines[0].split(","), lines[-1].split(","), strict=False))
    return ", " + ", ".join(f"{name} {row[name]}" for name in ("epoch", "step", "iter", "iteration") if row.get(name))


def marker_path(out: Path, paper: Paper, number: int, step: Step) -> Path:
    """Where the record of a paper's step stands; steps count from 1."""
    return out / "steps" / paper.name / f"{number}-{step.name.replace(' ', '-')}.json"


def read_record(marker: Path) -> dict[str, Any]:
    """The content of a marker; empty when there is none or it is damaged."""
    try:
        record = json.loads(marker.read_text())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def write_record(marker: Path, record: dict[str, Any]) -> None:
    """Write a marker in one piece."""
    marker.parent.mkdir(parents=True, exist_ok=True)
    part = marker.with_suffix(".part")
    part.write_text(json.dumps(record, indent=2) + "\n")
    os.replace(part, marker)


def remove(path: Path) -> None:
    """Delete a file or a folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def choose(papers: list[Paper], names: list[str]) -> list[Paper]:
    """The named papers (all without a name). Raises UserError for an unknown one."""
    known = [paper.name for paper in papers]
    for name in names:
        if name not in known:
            raise UserError(f"no paper {name!r}{suggest(name, known)}; there are {', '.join(known)}")
    return [paper for paper in papers if not names or paper.name in names]


def known_outcomes(out: Path, papers: list[Paper]) -> list[Outcome]:
    """What the markers of earlier calls tell about papers that this call does not run."""
    outcomes = []
    for paper in papers:
        records = [read_record(marker_path(out, paper, number, step)) for number, step in enumerate(paper.steps, 1)]
        records = [record for record in records if record.get("finished")]
        if records:
            error = "" if len(records) == len(paper.steps) else "steps are missing; run the quickstart again"
            outcomes.append(Outcome(paper, records, error))
    return outcomes


def environment(out: Path, mnist: Path | None) -> dict[str, str]:
    """What the commands need to know: where data and caches are; one thread each, since papers run side by side."""
    return {
        "DATA_ROOT": str(mnist or ROOT / "data"),
        "METRICS_CACHE": str(out / "cache"),
        "OMP_NUM_THREADS": "1",
        "MKL_NUM_THREADS": "1",
    }


class Parser(argparse.ArgumentParser):
    """Bad options raise UserError: one line, exit code 2."""

    def error(self, message: str) -> None:
        raise UserError(f"{message}; see --help")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options."""
    parser = Parser(
        prog="bash scripts/quickstart.sh", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--paper", action="append", default=[], metavar="NAME", help="only this paper; may be repeated")
    parser.add_argument(
        "--fresh", action="store_true", help="remove earlier results (of --paper, or all) and begin anew"
    )
    parser.add_argument(
        "--jobs", type=int, default=2, metavar="N", help="papers at a time, one thread each (default 2)"
    )
    parser.add_argument("--out", default="results/quickstart", metavar="FOLDER", help="default: results/quickstart")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and stop")
    options = parser.parse_args(argv)
    if options.jobs < 1:
        raise UserError(f"--jobs {options.jobs}: at least 1")
    return options


def exclusive(out: Path) -> Any:
    """Hold `out` for this process. Raises UserError when another quickstart has it."""
    out.mkdir(parents=True, exist_ok=True)
    lock = open(out / ".lock", "w")  # noqa: SIM115  held until the process ends
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(f"another quickstart is writing to {out}; wait for it or name another --out") from None
    return lock


def main(argv: list[str] | None = None) -> int:
    """Run the quickstart; returns 1 when a paper failed. Raises UserError for wrong options."""
    options = parse(argv)
    out = (ROOT / options.out).resolve()
    mnist = find_mnist()
    papers = plan(os.path.relpath(out, ROOT), mnist is not None)
    chosen = choose(papers, options.paper)
    if options.dry_run:
        for paper in chosen:
            print(f"# {paper.name}: {paper.data}")
            print("\n".join(step.shown for step in paper.steps))
        return 0
    import gallery  # reads the papers' own files, so it needs the environment

    lock = exclusive(out)
    if options.fresh:
        for paper in chosen:
            for name in (paper.name, f"steps/{paper.name}", f"logs/{paper.name}", f"pictures/{paper.name}"):
                remove(out / name)
    runner = Runner(out, {**environment(out, mnist), "PYTHON": sys.executable, "PYTHONUNBUFFERED": "1"})

    def stop(number: int, frame: Any) -> None:
        runner.stopping.set()

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        outcomes = runner.run(chosen, options.jobs)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        lock.close()
    if runner.stopping.is_set():
        print("quickstart: stopped; the same command goes on", file=sys.stderr)
        return EXIT_INTERRUPTED
    ran = {outcome.paper.name: outcome for outcome in outcomes}
    ran |= {o.paper.name: o for o in known_outcomes(out, [paper for paper in papers if paper.name not in ran])}
    shown = [ran[paper.name] for paper in papers if paper.name in ran]
    page, failures = gallery.write_page(out, shown, environment(out, mnist))
    for name, error in failures:
        print(f"quickstart: {name} failed: {error}", file=sys.stderr)
    minutes = (time.monotonic() - runner.begin) / 60
    print(f"quickstart: {len(chosen)} paper(s) in {minutes:.1f} minutes; open {page}")
    return 1 if any(name in [paper.name for paper in chosen] for name, _ in failures) else 0


if __name__ == "__main__":
    code: list[int] = []
    status = run_command(lambda: code.append(main()))
    sys.exit(status or (code[0] if code else 0))
