"""Judge the tests by mutants: single changes of the method's code, made by cosmic-ray, that a test should notice.

Places are drawn with a fixed seed from all those where cosmic-ray's operators can change a file, one operator for each
place, so that long formulas do not crowd out the rest. Each mutant is judged by one pytest run of the closest tests of
its file, in a copy of the tree and in a forked process, so that PyTorch is imported once; a run that fails, or takes
five times as long as the unchanged one, kills it. `bash scripts/mutation.sh PAPER` is the command.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import random
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter, defaultdict
from difflib import unified_diff
from pathlib import Path

import pytest

# imported once, for all mutants
PACKAGES = ["torch", "torch._dynamo", "torchvision", "scipy.stats", "sklearn.ensemble", "pydantic", "matplotlib.pyplot"]

ROOT = Path(__file__).resolve().parent.parent

LATENT_FLOW = "tests/latent_flow/test_golden.py tests/latent_flow/test_contract.py tests/latent_flow/test_behaviour.py "

# the files that hold each method, and the tests closest to them (arguments of pytest)
JUDGES: dict[str, dict[str, str]] = {
    "lbae": {
        "lbae/model.py": "tests/lbae/test_golden.py tests/lbae/test_model.py tests/lbae/test_behaviour.py "
        "-k 'not every_option'",
        "lbae/train.py": "tests/lbae/test_model.py tests/lbae/test_behaviour.py tests/lbae/test_commands.py "
        "tests/lbae/test_resume.py",
        "lbae/sampler.py": "tests/lbae/test_golden.py tests/lbae/test_sampler.py tests/front/test_use_the_parts.py "
        "-k 'not use_the_parts or hyperplane_sampler or codes or sampler_takes or attributes_of'",
        "lbae/generate.py": "tests/lbae/test_sampler.py tests/lbae/test_behaviour.py tests/lbae/test_commands.py",
        "lbae/reconstruct.py": "tests/lbae/test_behaviour.py tests/lbae/test_commands.py",
        "lbae/eval.py": "tests/lbae/test_scores.py tests/lbae/test_behaviour.py tests/lbae/test_commands.py",
    },
    "glancenet": {
        "glancenet/losses.py": "tests/glancenet/test_losses.py tests/glancenet/test_golden.py "
        "-k 'not metric and not data_rules and not architectures'",
        "glancenet/algorithms.py": "tests/glancenet/test_losses.py tests/glancenet/test_golden.py "
        "tests/glancenet/test_devices.py tests/glancenet/test_main.py tests/glancenet/test_behaviour.py "
        "-k 'not metric and not data_rules and not architectures'",
        "glancenet/osr.py": "tests/glancenet/test_leakage.py tests/glancenet/test_golden.py "
        "tests/glancenet/test_behaviour.py tests/front/test_use_the_parts.py -k 'osr or leakage_of or half or "
        "thresholds_keep or prototype or search or probe or both_checks or quantiles or rejection'",
        "glancenet/leakage.py": "tests/glancenet/test_behaviour.py tests/glancenet/test_leakage.py "
        "tests/glancenet/test_scripts.py -k 'probe or position or finish or leakage_needs'",
        "glancenet/main.py": "tests/glancenet/test_losses.py tests/glancenet/test_behaviour.py "
        "tests/glancenet/test_main.py tests/glancenet/test_resume.py",
    },
    "latent_flow": {
        "latent_flow/objective.py": LATENT_FLOW + "-k 'not every_option'",
        "latent_flow/rollout.py": LATENT_FLOW + "-k 'not every_option'",
        "latent_flow/fields.py": LATENT_FLOW + "-k 'not every_option'",
        "latent_flow/spikes.py": LATENT_FLOW + "-k 'not every_option'",
        "latent_flow/train.py": "tests/latent_flow/test_behaviour.py tests/latent_flow/test_scripts.py "
        "-k 'behaviour or contract or bit_exact'",
        "latent_flow/metrics.py": LATENT_FLOW
        + "tests/latent_flow/test_scripts.py -k 'behaviour and not every_option or "
        "eval_metrics or matching or active_units or move_have'",
    },
    "inv_flow": {
        "inv_flow/layers/*.py": "tests/inv_flow/test_golden.py tests/inv_flow/test_layers.py "
        "tests/test_invertible_layers.py tests/inv_flow/test_inv_conv_layers.py",
        "inv_flow/model.py": "tests/inv_flow/test_golden.py tests/inv_flow/test_layers.py "
        "tests/inv_flow/test_behaviour.py",
        "inv_flow/train/experiment.py": "tests/inv_flow/test_behaviour.py tests/inv_flow/test_experiment.py",
        "inv_flow/train/evaluation.py": "tests/inv_flow/test_behaviour.py tests/inv_flow/test_experiment.py",
        "inv_flow/train/optim.py": "tests/inv_flow/test_behaviour.py tests/inv_flow/test_experiment.py",
        "inv_flow/utils/inv_conv_cuda/torch_backend.py": "tests/inv_flow/test_inv_conv.py",
    },
    "nfpi": {
        "nfpi/fpi.py": "tests/nfpi/test_golden.py tests/nfpi/test_gaussians.py",
        "nfpi/gaussians.py": "tests/nfpi/test_golden.py tests/nfpi/test_gaussians.py",
        "nfpi/conditional.py": "tests/nfpi/test_golden.py tests/nfpi/test_model.py tests/nfpi/test_behaviour.py "
        "-k 'not option_changes'",
        "nfpi/train.py": "tests/nfpi/test_behaviour.py tests/nfpi/test_runs.py -k 'not option_changes'",
        "nfpi/cnn.py": "tests/nfpi/test_behaviour.py tests/nfpi/test_main.py -k 'not option_changes'",
    },
    "common": {
        "common/batches.py": "tests/common/test_batches.py",
        "common/checkpoint.py": "tests/common/test_checkpoint.py",
        **dict.fromkeys(
            (f"common/metrics/{name}.py" for name in ("frechet", "kernel", "precision_recall", "generation")),
            "tests/common/metrics/test_generation.py tests/common/metrics/test_generation_golden.py",
        ),
        **dict.fromkeys(
            (f"common/metrics/{name}.py" for name in ("features", "inception", "inputs", "resize")),
            "tests/common/metrics/test_features.py tests/common/metrics/test_command.py",
        ),
        **dict.fromkeys(
            ("common/metrics/disentanglement.py", "common/metrics/disentanglement_points.py"),
            " ".join(f"tests/common/metrics/test_disentanglement{part}.py" for part in ("", "_planted", "_golden")),
        ),
    },
}


def places(files: dict[str, str], number: int, seed: int) -> list:
    """`number` places that cosmic-ray can change, drawn without repetition, with one of their operators each."""
    from cosmic_ray.commands import init
    from cosmic_ray.work_db import WorkDB

    database = WorkDB(":memory:", WorkDB.Mode.create)
    init(sorted(files), database, {})
    operators = defaultdict(list)
    for item in sorted(database.work_items, key=lambda item: str(item.mutations[0])):
        [change] = item.mutations
        if "BitOr" not in change.operator_name:  # `int | None`: an annotation, not the method
            operators[str(change.module_path), change.start_pos, change.end_pos].append(change)
    draw = random.Random(seed)
    return [draw.choice(operators[place]) for place in draw.sample(sorted(operators), min(number, len(operators)))]


def tree_copy(folder: Path) -> None:
    """The files that git lists or would list, as they are now."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"], cwd=ROOT, check=True, stdout=-1
    )
    for name in filter(None, listed.stdout.decode().split("\0")):
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)


class FastestFirst:
    """A plugin of pytest: the tests of each module in the order of the seconds that they took last time."""

    def __init__(self, record: Path):
        self.record = record
        self.last = json.loads(record.read_text()) if record.exists() else {}
        self.now: Counter = Counter()

    def pytest_collection_modifyitems(self, items: list) -> None:
        modules = list(dict.fromkeys(item.path for item in items))
        items.sort(key=lambda item: (modules.index(item.path), self.last.get(item.nodeid, 0)))

    def pytest_runtest_logreport(self, report) -> None:
        self.now[report.nodeid] += report.duration

    def pytest_sessionfinish(self, exitstatus: int) -> None:
        if exitstatus == 0:
            self.record.write_text(json.dumps(self.last | self.now))


def passes(tests: str, limit: float) -> bool:
    """Whether pytest with these arguments passes within `limit` seconds, in a process group of its own."""
    child = os.fork()
    if child == 0:
        os.setsid()
        with open(os.devnull) as nowhere, open("output.txt", "w") as output:
            for stream, file in enumerate((nowhere, output, output)):
                os.dup2(file.fileno(), stream)
        options = ["-x", "-q", "-n", "0", "-p", "no:cacheprovider", *shlex.split(tests)]
        os._exit(pytest.main(options, [FastestFirst(Path("seconds.json"))]))
    end = time.monotonic() + limit
    while not (ended := os.waitpid(child, os.WNOHANG))[0] and time.monotonic() < end:
        time.sleep(0.05)
    with contextlib.suppress(ProcessLookupError):  # what the tests started ends with them
        os.killpg(child, signal.SIGKILL)
    if not ended[0]:
        os.waitpid(child, 0)
    return bool(ended[0]) and os.waitstatus_to_exitcode(ended[1]) == 0


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("paper", choices=sorted(JUDGES))
    parser.add_argument("--mutants", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", metavar="FILE", help="a file of the table, to look at that one alone")
    parser.add_argument("--json", metavar="FILE", help="where every mutant's verdict and change are written")
    args = parser.parse_args(argv)
    try:
        from cosmic_ray.mutating import use_mutation
        from cosmic_ray.plugins import get_operator
    except ModuleNotFoundError:
        parser.error("cosmic-ray is not installed: pip install -e .[dev]")
    for name in PACKAGES:
        importlib.import_module(name)

    verdicts: list[dict] = []
    with tempfile.TemporaryDirectory(prefix="mutation_") as folder:
        tree_copy(Path(folder))
        os.chdir(folder)
        os.environ |= {"PYTHONPATH": folder, "PYTHONDONTWRITEBYTECODE": "1"}  # before an editable installation
        sys.path[0] = folder
        sys.dont_write_bytecode = True  # a mutant of the same size and second would be taken for the last one
        judges = JUDGES[args.paper].items()
        files = {str(path): tests for pattern, tests in judges for path in sorted(Path().glob(pattern))}
        files = {path: tests for path, tests in files.items() if args.only in (None, path)}
        if not files:
            parser.error(f"{args.only} is not in the table of {Path(__file__).name}")
        limits: dict[str, float] = {}
        for change in places(files, args.mutants, args.seed):
            path = str(change.module_path)
            if files[path] not in limits:
                start = time.monotonic()
                if not passes(files[path], 3600):
                    print(Path("output.txt").read_text()[-3000:])
                    parser.error(f"these tests fail without a mutant: {files[path]}")
                limits[files[path]] = 60 + 5 * (time.monotonic() - start)
                print(f"    unchanged: {files[path]} ({time.monotonic() - start:.0f} s)", flush=True)
            start = time.monotonic()
            operator = get_operator(change.operator_name)(**change.operator_args)
            with use_mutation(change.module_path, operator, change.occurrence) as (before, after):
                verdict = "survived" if passes(files[path], limits[files[path]]) else "killed"
            lines = unified_diff(before.split("\n"), after.split("\n"), lineterm="", n=1)
            diff = "\n".join(line for line in lines if not line.startswith(("---", "+++")))
            verdicts.append({"file": path, "line": change.start_pos[0], "verdict": verdict, "change": diff})
            seconds = time.monotonic() - start
            print(f"{len(verdicts):3} {verdict:8} {path}:{change.start_pos[0]} ({seconds:.0f} s)", flush=True)
            if verdict == "survived":
                print(diff, flush=True)
    if args.json:
        Path(ROOT, args.json).write_text(json.dumps(verdicts, indent=1) + "\n", encoding="utf-8")
    for path in sorted({verdict["file"] for verdict in verdicts}):
        print(path, dict(Counter(verdict["verdict"] for verdict in verdicts if verdict["file"] == path)))
    count = Counter(verdict["verdict"] for verdict in verdicts)
    killed = f"{count['killed']} of {len(verdicts)} mutants killed, {count['survived']} survived"
    print(f"{args.paper}: {killed} (seed {args.seed})")
    return 0


if __name__ == "__main__":
    sys.exit(main())
