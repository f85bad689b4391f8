"""The five papers in small: train, evaluate, draw, and write one page about it. `scripts/quickstart.sh` installs first.

    python scripts/quickstart.py                      # all papers, two at a time
    python scripts/quickstart.py --paper nfpi --paper lbae
    python scripts/quickstart.py --dry-run            # only print the commands
    python scripts/quickstart.py --fresh              # forget what is done and begin anew

Every step is a documented command of a paper's folder and a rule of scripts/Snakefile (sweeps/quickstart/), and so is
the page. A second call skips what is done; a changed command runs again, with all that follows; an interrupted training
goes on. A paper that fails does not stop the others; the exit code is then 1. Ctrl-C lets the trainings save (130).

Written to results/quickstart/: index.html and pictures/ (the page), and a folder of runs, logs and a record.json for
each paper. Real MNIST, when it is in DATA_ROOT or data/, takes the place of scikit-learn's digits where a small run on
it says something.
"""

import argparse
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAPERS = ("glancenet", "latent_flow", "lbae", "nfpi", "inv_flow")  # those that take longest first


class Parser(argparse.ArgumentParser):
    """Bad options are one line and exit code 2, before anything is installed or imported."""

    def error(self, message: str) -> None:
        self.exit(2, f"error: {message}; see --help\n")


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The options."""
    parser = Parser(
        prog="bash scripts/quickstart.sh", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("--paper", action="append", default=[], metavar="NAME", help="only this paper; may be repeated")
    parser.add_argument("--fresh", action="store_true", help="remove earlier results and begin anew")
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="papers at a time (default 2)")
    parser.add_argument("--out", default="results/quickstart", metavar="FOLDER", help="default: results/quickstart")
    parser.add_argument("--dry-run", action="store_true", help="print the commands and stop")
    options = parser.parse_args(argv)
    if options.jobs < 1:
        parser.error(f"--jobs {options.jobs}: at least 1")
    import difflib

    for name in options.paper:
        if name not in PAPERS:
            near = difflib.get_close_matches(name, PAPERS, n=1)
            hint = f" (did you mean {near[0]!r}?)" if near else ""
            parser.error(f"no paper {name!r}{hint}; there are {', '.join(PAPERS)}")
    return options


def main(argv: list[str] | None = None) -> int:
    """Run the quickstart through the engine; its exit code."""
    options = parse(argv)
    chosen = [name for name in PAPERS if not options.paper or name in options.paper]
    if options.dry_run and not shutil.which("snakemake", path=f"{Path(sys.executable).parent}"):
        return 0  # before the installation: the options are right
    sys.path[:0] = [str(ROOT)]
    os.chdir(ROOT)
    os.environ["QUICKSTART_OUT"] = out = os.path.relpath(options.out)
    from scripts.experiments import find_mnist, read_tables

    mnist = find_mnist()
    tables = [one for one in read_tables() if one.paper == "quickstart" and one.possible()]
    tables = [one for one in tables if any(one.name == name or one.name.startswith(f"{name}_") for name in chosen)]
    if options.dry_run:
        for one in tables:
            experiment = one.chosen()
            print(f"# {one.name}: {one.keys['data']}")
            for step in one.steps:
                where = one.fill(step.folder, experiment)
                for words in map(shlex.join, one.commands(experiment, step)):
                    print(words if where == "." else f"(cd {shlex.quote(where)} && {words})")
        return 0
    Path(out).mkdir(parents=True, exist_ok=True)
    for name in chosen if options.fresh else ():
        for place in (name, f"pictures/{name}"):
            shutil.rmtree(Path(out) / place, ignore_errors=True)
    begin = time.time()
    environment = {
        **os.environ, "DATA_ROOT": str(mnist or ROOT / "data"), "METRICS_CACHE": str(Path(out).resolve() / "cache"),
        "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "JOB_CLOCK": str(begin),
    }  # fmt: skip
    page, papers = f"{out}/index.html", "+".join(chosen)
    words = ["-s", "scripts/Snakefile", "--cores", str(options.jobs), "--quiet", "all", "--config", f"papers={papers}"]
    words = ["-m", "snakemake", *words, "--", page]
    engine = subprocess.Popen([sys.executable, *words], env=environment, start_new_session=True)
    for number in (signal.SIGINT, signal.SIGTERM):  # the engine lets the trainings save, and we wait for it
        signal.signal(number, lambda number, frame: engine.send_signal(signal.SIGTERM))
    code = engine.wait()
    if code == 130:
        print("quickstart: stopped; the same command goes on", file=sys.stderr)
        return code
    if code:  # the page of what there is
        subprocess.run([sys.executable, "scripts/gallery.py", out], env=environment)
    print(f"quickstart: {len(chosen)} paper(s) in {(time.time() - begin) / 60:.1f} minutes; open {page}")
    return code


if __name__ == "__main__":
    sys.exit(main())
