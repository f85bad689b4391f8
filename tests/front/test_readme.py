r"""Every command, link and path of the READMEs: commands are run by bash with interpreters that only write down what
they were called with, and each call is then read by the real parser of the script it names. About 15 CPU s.

A command that nobody knows, a script that is not there, an option that its parser refuses: each fails, with the file
and the line. Scripts of scripts/ run for real up to their `python` line. What stands for something (RUN, N, <name>,
...) is filled in.
"""

import argparse
import ast
import contextlib
import importlib
import importlib.util
import io
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from PIL import Image

from common.errors import UserError

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("common", "lbae", "glancenet", "latent_flow", "inv_flow", "nfpi", "checkpoints", "data", "sweeps", "docs")
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(path for name in PACKAGES for path in (ROOT / name).rglob("*.md"))])
STARTERS = (
    "python", "python3", "bash", "torchrun", "srun", "sbatch", "snakemake", "pytest", "cd", "source", "git", "pip",
    "lbae/download.sh", "../../eval.sh", "./eval.sh", "eval.sh",
)  # fmt: skip
# written by users and by runs, so not in the repository
OUTPUTS = ("runs", "results/quickstart", "outputs", "logs", "data", ".venv", "lbae/exp", "converted")
PLACEHOLDER = re.compile(r"[A-Z]{2,}|<|\*|\.\.\.|…")


class Snippet(NamedTuple):
    """Shell text of a document, with the line on which it begins."""

    place: str
    text: str


class Call(NamedTuple):
    """A command as bash called it: words, and the folder (relative to the repository) that it believed to be in."""

    place: str
    folder: str
    words: list[str]


class Parsed(Exception):
    """Raised in place of what a command would do once its options are read."""


# ---- what stands in the documents ----------------------------------------------------------------------------------


def is_command(text: str) -> bool:
    """Whether a line or a piece of inline code is meant to be typed."""
    words = text.split()
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):
        words = words[1:]
    # `python` alone is a word; `lbae/mnist.py`-like names are checked as paths
    return len(words) > 1 and words[0] in STARTERS


def snippets(path: Path) -> list[Snippet]:
    """The fenced shell blocks, indented commands and inline commands of a document."""
    name, found, fence, block, begin = path.relative_to(ROOT).as_posix(), [], None, [], 0
    lines = path.read_text(encoding="utf-8").splitlines()
    indented: list[str] = []
    for number, line in enumerate([*lines, ""], 1):
        if fence is not None:
            if line.strip() != "```":
                block.append(line)
                continue
            if fence in ("bash", "sh") or (fence == "" and block and is_command(block[0].split(" #")[0])):
                found.append(Snippet(f"{name}:{begin}", "\n".join(block)))
            fence = None
        elif line.startswith("```"):
            fence, block, begin = line[3:].strip(), [], number + 1
        elif line.startswith("    ") and (indented or is_command(line)):
            begin = begin if indented else number
            indented.append(line)
        else:
            if indented:
                found.append(Snippet(f"{name}:{begin}", "\n".join(indented)))
                indented = []
            found += [Snippet(f"{name}:{number}", code) for code in re.findall(r"`([^`]+)`", line) if is_command(code)]
    assert fence is None, f"{name}: a code block is not closed"
    return found


def filled(text: str) -> str:
    """Shell text with optional parts taken and placeholders filled."""
    text = re.sub(r"\[(--?[a-z][^\]]*)\]", r"\1", text)  # [--split test]
    text = re.sub(r"<([\w ]+)>", lambda m: m[1].replace(" ", "_").upper(), text)  # lbae/<experiment>
    text = re.sub(r"(?m)(^|[;&|]\s*)(?:\.\./)*((?:lbae/)?(?:eval|download)\.sh)\b", r"\1 script \2", text)
    return re.sub(r"\s(\.\.\.|…)(?=\s|$)", "", text)


# ---- what bash makes of it ------------------------------------------------------------------------------------------

RECORD = """#!{bash}
printf '%s\\0' "${{VIRTUAL_FOLDER:-.}}" "${{0##*/}}" "$@" >>"$RECORD"
printf '\\1\\0' >>"$RECORD"
"""
# scripts of an experiment run up to their python line; the three that install do not
RUN_SCRIPT = """
case "$1" in
    scripts/setup.sh | scripts/test.sh | scripts/quickstart.sh) ;;
    scripts/*.sh) exec {bash} "{root}/$1" "${{@:2}}" ;;
esac
"""
PRELUDE = """
VIRTUAL_FOLDER=.
export VIRTUAL_FOLDER
cd() { VIRTUAL_FOLDER="$VIRTUAL_FOLDER/$1"; command_record cd "$1"; }
command_record() { printf '%s\\0' "$VIRTUAL_FOLDER" "$@" >>"$RECORD"; printf '\\1\\0' >>"$RECORD"; }
source() { command_record source "$@"; }
command_not_found_handle() { command_record unknown "$@"; }
mkdir() { :; }
ln() { :; }
"""


@pytest.fixture(scope="module")
def stubs(tmp_path_factory) -> Path:
    """A folder to be the whole PATH: interpreters that write down their words, and the few tools that scripts need."""
    folder = tmp_path_factory.mktemp("stubs")
    bash = shutil.which("bash")
    for name in (
        "python",
        "python3",
        "torchrun",
        "srun",
        "sbatch",
        "snakemake",
        "pytest",
        "git",
        "pip",
        "bash",
        "script",
    ):
        (folder / name).write_text(
            RECORD.format(bash=bash) + (RUN_SCRIPT.format(bash=bash, root=ROOT) if name == "bash" else "")
        )
        (folder / name).chmod(0o755)
    for tool in ("dirname", "basename", "seq"):
        (folder / tool).symlink_to(shutil.which(tool))
    for tool in ("grep", "tail"):  # scripts read the logs of trainings that did not happen here
        (folder / tool).symlink_to(shutil.which("true"))
    return folder


def calls(snippet: Snippet, stubs: Path) -> list[Call]:
    """Every command that bash starts for the snippet, with variables, loops and quotes resolved."""
    record = stubs / "record"
    record.write_bytes(b"")
    environment = {"PATH": str(stubs), "RECORD": str(record), "PYTHON": "python", "WEIGHTS": "flow.safetensors"}
    environment |= {"NODE_RANK": "0", "FIRST_HOST": "host"}
    done = subprocess.run(
        [shutil.which("bash"), "-c", PRELUDE + filled(snippet.text)],
        cwd=stubs, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0 and not done.stderr, (
        f"{snippet.place}: bash says {done.stderr.strip() or done.returncode}"
    )
    found, words = [], []
    for word in record.read_bytes().decode().split("\0")[:-1]:
        if word == "\1":
            found.append(Call(snippet.place, words[0], words[1:]))
            words = []
        else:
            words.append(word)
    return found


# ---- what the scripts make of that ----------------------------------------------------------------------------------


def check(call: Call) -> None:
    """Raise AssertionError or UserError when the call names what is not there."""
    program, *words = call.words
    if program in ("python", "python3"):
        check_python(call.folder, words)
    elif program == "torchrun":
        from torch.distributed.run import get_args_parser

        launch = strictly(lambda: get_args_parser().parse_args(words))
        check_python(
            call.folder, (["-m"] if launch.module else []) + [launch.training_script, *launch.training_script_args]
        )
    elif program == "srun":
        rest = [word for word in words if not re.fullmatch(r"--?[a-z-]+(=\S+)?", word)]
        check(call._replace(words=words[words.index(rest[0]) :]))
    elif program == "sbatch":
        check_sbatch(call, words)
    elif program == "snakemake":
        check_snakemake(words)
    elif program == "pytest":
        check_pytest(words)
    elif program == "bash":
        script = words[0]
        assert (ROOT / script).is_file(), f"there is no {script}"
        subprocess.run(["bash", "-n", str(ROOT / script)], check=True)
        if script == "scripts/test.sh":
            check_pytest(words[1:])
        elif script == "scripts/quickstart.sh":
            check_python(".", ["scripts/quickstart.py", *words[1:]])
        elif script == "scripts/setup.sh":
            assert set(words[1:]) <= {"--cpu", "--light", "--dry-run"}, words
    elif program == "script":
        check_lbae_script(*words)
    elif program == "cd":
        inside = os.path.normpath(call.folder)
        known = (ROOT / inside).is_dir() or inside.startswith(OUTPUTS) or PLACEHOLDER.search(inside)
        assert known or inside.startswith("lbae/"), f"there is no folder {inside}"
    elif program == "source":
        assert words == [".venv/bin/activate"], words
    elif program == "git":
        assert words[0] in ("clone", "checkout", "lfs"), words
    elif program == "pip":
        assert words[0] in ("install", "list", "uninstall"), words
    else:
        raise AssertionError(f"unknown command {' '.join(call.words)}")


def check_sbatch(call: Call, words: list[str]) -> None:
    while words and words[0].startswith("--"):
        flag, equals, value = words[0].partition("=")
        assert re.fullmatch(r"--(array|gpus|nodes|ntasks-per-node|cpus-per-task|time|signal|wrap)", flag), flag
        if flag == "--wrap":
            inner = value if equals else words[1]
            with contextlib.ExitStack() as stack:
                folder = stack.enter_context(_temporary_stubs())
                for one in calls(
                    Snippet(call.place, inner.removeprefix("exec ").replace("$SLURM_ARRAY_TASK_ID", "0")), folder
                ):
                    check(one)
            words = words[1:] if equals else words[2:]
        else:
            words = words[1:]
    assert not words or (ROOT / words[0]).is_file(), words


@contextlib.contextmanager
def _temporary_stubs() -> Iterator[Path]:
    yield _STUBS[0]


_STUBS: list[Path] = []


def check_snakemake(words: list[str]) -> None:
    """Its own parser reads the options; each target is a table that a manifest makes."""
    from snakemake.cli import get_argument_parser

    args = get_argument_parser().parse_args(words)
    assert (ROOT / args.snakefile).is_file(), args.snakefile
    for target in args.targets:
        paper, name = target.removeprefix("results/").split("/")
        assert target == "results/quickstart/index.html" or (ROOT / f"sweeps/{paper}/{name}.yaml").is_file(), target


def check_pytest(words: list[str]) -> None:
    """Paths exist, options are pytest's or conftest's."""
    parser = argparse.ArgumentParser(exit_on_error=False)
    for flags in (("-x",), ("-q",), ("-v",), ("--slow",)):
        parser.add_argument(*flags, action="store_true")
    for flags in (("-k",), ("-m",), ("-n",), ("--durations",)):
        parser.add_argument(*flags)
    parser.add_argument("paths", nargs="*")
    for path in strictly(lambda: parser.parse_args(words)).paths:
        assert (ROOT / path.split("::")[0]).exists(), f"there is no {path}"


def check_lbae_script(script: str, *words: str) -> None:
    """eval.sh KEY=VALUE ..., lbae/download.sh FILE."""
    if script.endswith("download.sh"):
        assert (ROOT / script).is_file() and all((ROOT / word).is_file() for word in words)
        return
    from common.options import from_tokens
    from lbae.protocol import Protocol

    from_tokens(Protocol, [word for word in words if word != "help"])


def check_python(folder: str, words: list[str]) -> None:
    """`X.py ARGS` or `-m MODULE ARGS`: the file is there, and its parser takes the arguments."""
    if words[0] == "-c":
        compile(words[1], "<command>", "exec")
        return
    if re.search(r"\bX\b", words[1] if words[0] == "-m" else words[0]):
        return  # `python latent_flow/X.py`: any of its scripts
    if words[0] == "-m":
        name, argv = words[1], words[2:]
        if name == "pytest":
            check_pytest(argv)
            return
        spec = importlib.util.find_spec(name)
        assert spec is not None, f"there is no module {name}"
        name = f"{name}.__main__" if spec.submodule_search_locations else name
    else:
        homes = (folder, ".", "lbae/exp", "inv_flow/utils/inv_conv_cuda")
        places = [Path(os.path.normpath(ROOT / home / words[0])) for home in homes]
        path = next((place for place in places if place.is_file()), places[0])
        assert path.is_file(), f"there is no {words[0]}"
        argv, name = words[1:], path.relative_to(ROOT).with_suffix("").as_posix().replace("/", ".")
        if path.name == "setup.py":
            assert argv[0] in ("install", "build_ext"), argv
            return
    argv = ["2" if word in ("N", "B", "ID") else word for word in argv if word not in ("...", "…")]
    check_files(argv)
    check_arguments(name, argv)


def check_files(argv: list[str]) -> None:
    """Arguments that look like files of the repository are files of the repository."""
    for word in argv:
        value = word.partition("=")[2] or word
        shipped = re.match(
            r"(sweeps|scripts|tests|checkpoints|lbae|nfpi|glancenet|inv_flow|latent_flow)/.*\.\w+$", value
        )
        if shipped and not PLACEHOLDER.search(value) and not value.startswith(OUTPUTS):
            assert (ROOT / value).exists(), f"there is no {value}"


def check_arguments(name: str, argv: list[str]) -> None:
    """Run `main(argv)` of a module until its options are read and judged."""
    if name in ("lbae.mnist", "lbae.cifar10", "lbae.celeba", "lbae.folder"):
        from common.options import from_tokens
        from lbae.command import preset
        from lbae.options import Params

        configs = importlib.import_module(name).CONFIGS
        defaults = lambda words: preset(configs, words.get("cfg") or "")  # noqa: E731
        from_tokens(Params, [word for word in argv if word != "help"], "", defaults)
    elif name == "lbae.eval":
        from common.options import from_tokens
        from lbae.eval import Scores

        from_tokens(Scores, argv)
    elif name == "nfpi.main":
        check_nfpi(argv)
    elif name == "lbae.release":
        assert argv[0] in ("pack", "unpack") and len(argv) == 3, argv
    elif name == "common.metrics.benchmark":
        from common.metrics.benchmark import PARTS

        assert set(argv) <= set(PARTS), argv
    else:
        module = module_of(name)
        source = Path(module.__file__).read_text()
        if "launch.script(" in source:  # inv_flow: its own parser judges the values, too
            with stopped_after("inv_flow.train.launch", "parse_given"):
                strictly(lambda: module.main(argv))
            return
        if "from_flags(" in source or "from_tokens(" in source:
            with stopped_after("common.options", "_finish"):
                strictly(lambda: module.main(argv))
            return
        known = re.search(r"pars(e|er|e_args|e_tool)\(|parse_args|run_script\(", source)
        # calling main of another would do the work
        assert known, f"{name} has no parser that this test knows"
        before, dashes, after = (
            (argv[: argv.index("--")], True, argv[argv.index("--") + 1 :]) if "--" in argv else (argv, False, [])
        )
        with stopped_after("argparse", "ArgumentParser.parse_known_args"):
            strictly(lambda: module.main(before))
        if dashes:  # glancenet's comparisons pass the rest on
            from glancenet.main import make_parser

            own = ["--alg", "GlanceNet", "--encoder", "SimpleGaussianConv64"]  # the comparison sets these itself
            strictly(lambda: make_parser(description="").parse([*own, *after]))


def check_nfpi(argv: list[str]) -> None:
    """Compose the configuration with hydra, as main does before it starts; the first value of each sweep."""
    from nfpi import main
    from nfpi.config import config_place, plain_argv, resolve

    rest = plain_argv(argv)
    path, rest = main._flag(rest, "--config-path", "-cp")
    name, rest = main._flag(rest, "--config-name", "-cn")
    flags = [word for word in rest if word.startswith("-")]
    assert set(flags) <= {"--multirun", "-m", "--help"}, flags
    overrides = [word for word in rest if word not in flags]
    if flags:
        overrides = [word if "[" in word else word.split(",")[0] for word in overrides]
    with tempfile.TemporaryDirectory() as own:  # what MYIMAGES stands for: its size and classes are looked up
        for i in range(120 if "data_path=MYIMAGES" in overrides else 0):
            (Path(own) / "ab"[i % 2]).mkdir(exist_ok=True)
            Image.new("RGB", (8, 8)).save(Path(own) / "ab"[i % 2] / f"{i}.png")
        resolve(*config_place(path, name), [word.replace("MYIMAGES", own) for word in overrides])


def module_of(name: str):
    """A module of the repository; scripts/ is no package."""
    if not name.startswith("scripts."):
        return importlib.import_module(name)
    key = f"documented_{name.replace('.', '_')}"
    if key not in sys.modules:
        spec = importlib.util.spec_from_file_location(key, ROOT / f"{name.replace('.', '/')}.py")
        sys.modules[key] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[key])
    return sys.modules[key]


@contextlib.contextmanager
def stopped_after(module: str, place: str) -> Iterator[None]:
    """Let the function do its work, then raise Parsed; arguments that it left over are an error."""
    *owners, name = place.split(".")
    owner = importlib.import_module(module)
    for part in owners:
        owner = getattr(owner, part)
    original = getattr(owner, name)

    def wrapper(*args, **options):
        result = original(*args, **options)
        if isinstance(result, tuple) and isinstance(result[1], list) and result[1]:
            raise UserError(f"unknown arguments {' '.join(result[1])}")
        raise Parsed

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, wrapper)
        yield


def strictly(action):
    """`action()`, quiet; options that were read, or help that was printed, are well."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            result = action()
    except Parsed:
        return None
    except SystemExit as stop:
        assert not stop.code, said.getvalue().strip().splitlines()[-1:]
        return None
    assert isinstance(result, argparse.Namespace), "the command did its work instead of reading its options"
    return result


# ---- the tests ------------------------------------------------------------------------------------------------------


def faults(document: Path, stubs: Path) -> list[str]:
    """A line for each command of the document that is wrong."""
    _STUBS[:] = [stubs]
    found = []
    for snippet in snippets(document):
        try:
            made = calls(snippet, stubs)
            assert made, "no command in it"
            for call in made:
                check(call)
        except (AssertionError, UserError, argparse.ArgumentError, subprocess.CalledProcessError) as error:
            found.append(
                f"{snippet.place}: {str(error).splitlines()[0] if str(error) else error!r}  [{snippet.text[:90]}]"
            )
    return found


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_commands(document, stubs):
    assert faults(document, stubs) == []


def test_every_script_of_an_experiment_calls_what_exists(stubs):
    found = []
    tools = ("gpu_check.sh", "mutation.sh")  # of no experiment; test_reproduce.py rehearses the first
    paths = [path for path in (ROOT / "scripts").glob("*.sh") if path.name not in tools]
    for path in sorted(path for path in paths if not path.name.startswith("nfpi_")):  # composed in tests/nfpi
        more = " RUN" if "${1:?" in path.read_text() else ""
        try:
            made = calls(Snippet(path.name, f"bash scripts/{path.name}{more}"), stubs)
            for call in made:
                check(call)
            if path.name not in ("setup.sh", "test.sh", "quickstart.sh"):
                assert {call.words[0] for call in made} & {"python", "torchrun"}, "it starts nothing"
        except (AssertionError, UserError, argparse.ArgumentError, subprocess.CalledProcessError) as error:
            found.append(f"{path.name}: {str(error).splitlines()[0]}")
    assert found == []


@pytest.mark.parametrize(
    "right, wrong, expected",
    [
        ("python lbae/mnist.py eval gen gen_imgs=5", "python lbae/mnist.py eval gen gen_img=5", "gen_imgs"),
        ("python -m latent_flow.show_flows --zoom 2", "python -m latent_flow.show_flows --zom 2", "--zom"),
        ("python glancenet/traverse.py --latents 0 1", "python glancenet/traverse.py --latent 0 1", "--latent"),
        ("python inv_flow/inv_flow_mnist.py --layer finc", "python inv_flow/inv_flow_mnist.py --layer fink", "fink"),
        ("python nfpi/main.py --config-path=___configs/mnist --config-name=mean_and_var seed=1",
         "python nfpi/main.py --config-path=___configs/mnist --config-name=mean_and_var sed=1", "seed"),
        ("torchrun --nproc_per_node=2 lbae/celeba.py", "torchrun --nproc_per_nod=2 lbae/celebra.py", ""),
        ("bash scripts/latent_flow_mnist.sh --resume", "bash scripts/latent_flow_mnist.sh --resum", "--resum"),
        ("bash scripts/test.sh tests/lbae -x", "bash scripts/test.sh tests/lbea -x", "tests/lbea"),
        ("cd lbae/exp && ../../eval.sh feat=lenet", "cd lbae/exp && ../../eval.sh feet=lenet", "feet"),
        ("python -m common.released --check", "python -m common.release --check", "common.release"),
        ("snakemake -s scripts/Snakefile --cores 2 results/glancenet/parity",
         "snakemake -s scripts/Snakefile --cores 2 results/glancenet/partiy", "partiy"),
        ("python lbae/mnist.py l", "pyhton lbae/mnist.py l", ""),
    ],
)  # fmt: skip
def test_a_typo_is_found(stubs, right, wrong, expected):
    """The same command with one wrong letter; without this, the test above could pass by reading nothing."""
    for text, count in ((right, 0), (wrong, 1)):
        if not text.startswith("pyhton"):
            assert is_command(text)
        wrongs = []
        for call in calls(Snippet("here", text), stubs):
            try:
                check(call)
            except (AssertionError, UserError, argparse.ArgumentError) as error:
                wrongs.append(str(error))
        assert len(wrongs) >= count and (count or not wrongs), wrongs
        assert not count or expected in " ".join(wrongs)


def slug(heading: str) -> str:
    """The anchor that GitHub gives a heading."""
    text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading.strip().lower())
    return re.sub(r"[^\w\- ]", "", text).replace(" ", "-")


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_links(document):
    text = re.sub(r"(?ms)^```.*?^```$", "", document.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        path = (document.parent / file) if file else document
        assert path.exists() and (path.is_dir() or path.stat().st_size), f"{target} is not there"
        if anchor:
            headings = re.findall(r"(?m)^#+ (.+)$", path.read_text(encoding="utf-8"))
            assert anchor in {slug(heading) for heading in headings}, f"{target}: no such heading"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_python_examples_import_what_exists(document):
    for code in re.findall(r"(?ms)^```python\n(.*?)^```$", document.read_text(encoding="utf-8")):
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom):
                module = importlib.import_module(node.module)
                for alias in node.names:
                    assert hasattr(module, alias.name), f"{node.module} has no {alias.name}"


def test_paths_of_the_first_readme_exist():
    text = re.sub(r"(?ms)^```.*?^```$", "", (ROOT / "README.md").read_text(encoding="utf-8"))
    checked = 0
    for code in re.findall(r"`([^`\s]+)`", text):
        if re.fullmatch(r"[\w.\-/]+(/[\w.\-]*|\.(sh|toml))", code) and not PLACEHOLDER.search(code):
            assert (ROOT / code).exists() or code.startswith(OUTPUTS), f"`{code}` is not there"
            checked += 1
    assert checked > 10


def table_rows(text: str, heading: str) -> list[list[str]]:
    """Cells of the rows of the first table below a heading."""
    part = text[text.index(heading) :]
    lines = re.search(r"(?m)(?:^\|.*\n)+", part)[0].splitlines()[2:]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def test_measured_numbers_of_the_first_readme_are_rows_of_the_results():
    text, results = ((ROOT / name).read_text(encoding="utf-8") for name in ("README.md", "RESULTS.md"))
    rows = table_rows(text, "## The papers")
    assert len(rows) == 5
    for row in rows:
        numbers = re.findall(r"\d+\.\d+|\d{3,}", row[-1])
        assert len(numbers) >= 2, row[-1]
        for number in numbers:
            assert re.search(rf"(?<![\d.]){re.escape(number)}(?![\d])", results), f"{number} is no number of RESULTS.md"


def test_data_sets_are_those_of_the_prepare_command():
    from common.datasets.prepare import SOURCES

    rows = table_rows((ROOT / "README.md").read_text(encoding="utf-8"), "## Data")
    digests = {remote.digest: name for name, source in SOURCES.items() for remote in source.remotes}
    named = []
    for row in rows:
        names = re.findall(r"`(\w+)`", row[0])
        named += names
        for digest in re.findall(r"\b[0-9a-f]{32}\b", row[-1]):
            assert digests[digest] in names, row
    assert sorted(named) == sorted(SOURCES)
    detailed = (ROOT / "data/README.md").read_text(encoding="utf-8")
    assert all(f"`{name}`" in detailed for name in named)
    assert set(re.findall(r"\b[0-9a-f]{32}\b", detailed)) <= set(digests)
