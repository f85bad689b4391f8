"""What a GPU-less machine can check of the compiled op: the CUDA solver's arithmetic, its build, and the benchmark."""

import importlib.util
import json
import logging
import os
import re
import shutil
import subprocess
import sys
import venv
from pathlib import Path

import pytest
import torch
from front import children

from common.errors import UserError
from inv_flow.utils.inv_conv_cuda import available_backends, benchmark, extension
from inv_flow.utils.inv_conv_cuda.ops import choose_backend

OP = Path(benchmark.__file__).parent
ROOT = OP.parents[2]
H200 = (132, 227 * 1024)  # multiprocessors, bytes of shared memory for a block
A100 = (108, 163 * 1024)


def case(batch, groups, size, height, width, kh, kw, transposed=0, mixed=0, gpu=H200, seed=0, bits=32):
    return (batch, groups, size, height, width, kh, kw, transposed, mixed, *gpu, seed, bits)


# the form that the plan must choose, and the case
CASES = [
    ("tile", case(5, 1, 4, 14, 14, 3, 3)),
    ("tile", case(2, 1, 12, 16, 16, 3, 3, transposed=1, seed=1)),
    ("tile", case(3, 1, 12, 8, 9, 5, 5, seed=2, bits=64)),
    ("tile", case(5, 1, 24, 8, 8, 3, 3, transposed=1, seed=3, gpu=(2, H200[1]))),
    ("tile", case(7, 1, 48, 4, 4, 3, 3, seed=2, gpu=(3, H200[1]))),
    ("tile", case(1, 1, 12, 32, 32, 3, 3, seed=3)),
    ("tile", case(1, 1, 12, 32, 64, 3, 3, seed=1)),
    ("ring", case(1, 1, 12, 64, 64, 3, 3, transposed=1, seed=2, gpu=A100)),
    ("ring", case(1, 1, 48, 64, 20, 3, 3, seed=1)),
    ("ring", case(3, 1, 6, 40, 30, 3, 3, seed=2, gpu=(1, 20000))),
    ("ring", case(2, 4, 3, 30, 41, 2, 4, mixed=1, seed=2, gpu=(1, 9000), bits=64)),
    ("flat", case(2, 1, 6, 20, 30, 3, 3, transposed=1, seed=3, gpu=(2, 900))),
    ("flat", case(2, 4, 3, 9, 8, 2, 4, mixed=1, gpu=(2, 900), bits=64)),
    ("flat", case(1, 1, 27, 6, 40, 3, 2, seed=1, gpu=(2, 900))),
    ("tile", case(4, 4, 3, 6, 5, 2, 4, mixed=1, gpu=(3, H200[1]), bits=64)),
    ("tile", case(4, 4, 3, 6, 5, 2, 4, transposed=1, mixed=1, gpu=(3, 1600), bits=64)),
    ("tile", case(7, 3, 1, 1, 9, 3, 3, bits=64)),
    ("tile", case(7, 3, 1, 9, 1, 7, 7, gpu=(1, H200[1]), bits=64)),
    ("tile", case(3, 1, 5, 4, 4, 1, 1, gpu=(1, H200[1]), bits=64)),
    ("tile", case(9, 2, 7, 5, 5, 7, 6, transposed=1, mixed=1, gpu=(1, H200[1]), bits=64)),
    ("tile", case(3, 1, 15, 6, 7, 3, 3, transposed=1, seed=1)),
]


@pytest.mark.skipif(shutil.which("g++") is None, reason="needs a C++ compiler")
def test_cuda_arithmetic_with_emulated_threads(tmp_path):
    """The kernel's header, compiled for the CPU: no access outside shared memory, no race between barriers, right
    values.
    """
    program = tmp_path / "wavefront"
    source = Path(__file__).parent / "test_inv_conv_wavefront.cpp"
    flags = ["-std=c++17", "-O1", "-fsanitize=address", "-Wall", "-Wextra", "-Werror", f"-I{OP / 'csrc'}"]
    subprocess.run(["g++", *flags, str(source), "-o", str(program)], check=True)
    lines = "\n".join(" ".join(map(str, numbers)) for _, numbers in CASES)
    done = subprocess.run([program], input=lines, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    results = [line.split() for line in done.stdout.splitlines()]
    assert len(results) == len(CASES)
    seen = set()
    for (form, numbers), result in zip(CASES, results, strict=True):
        got, images, pixels, split, threads, held, shared, error, same = result
        assert got == form, numbers
        assert float(error) < (1e-12 if numbers[-1] == 64 else 1e-5), (numbers, error)
        assert same == "1", f"{numbers}: the order of the threads changes the result"
        assert int(threads) % 32 == 0 and int(threads) <= 512 and 32 % int(split) == 0
        seen |= {("images", int(images) > 1), ("pixels", pixels), ("split", split), ("shared", form, shared)}
        seen |= {("held", form, held)}
    # several images a block, two pixels a thread, every split, weights in shared and in global memory
    assert {("images", True), ("images", False), ("pixels", "1"), ("pixels", "2")} <= seen
    assert {("split", "1"), ("split", "2"), ("split", "4"), ("split", "8")} <= seen
    assert {("shared", "tile", "0"), ("shared", "ring", "1"), ("shared", "flat", "0")} <= seen
    # weights of one to four quads of channels in registers, and none
    assert {("held", "tile", held) for held in "01234"} | {("held", "ring", "2"), ("held", "ring", "3")} <= seen


NVCC = next(
    (path for path in ("/usr/local/cuda/bin/nvcc", shutil.which("nvcc")) if path and Path(path).is_file()), None
)


CAPABILITIES = [75, 90]


@pytest.fixture(scope="module")
def compiled(tmp_path_factory):
    """What nvcc says of the kernels, by architecture."""
    if NVCC is None:
        pytest.skip("needs nvcc")
    architectures = [f"-gencode=arch=compute_{cc},code=sm_{cc}" for cc in CAPABILITIES]
    flags = ["-O3", "-std=c++17", "-Xptxas", "-v", "-Werror", "all-warnings", *architectures]
    done = subprocess.run(
        [NVCC, *flags, "-c", str(OP / "csrc/cuda_solver.cu"), "-o", str(tmp_path_factory.mktemp("cuda") / "solver.o")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    said = {cc: [] for cc in CAPABILITIES}
    for line in done.stderr.splitlines():
        if entry := re.search(r"Compiling entry function .* for 'sm_(\d+)'", line):
            own = said[int(entry[1])]
        elif "spill stores" in line:
            own.append(line)
    return said


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_cuda_kernels_compile_without_spilling(compiled, capability):
    spills = compiled[capability]
    # in two dtypes 3 forms x 2 pixels a thread, and the folding; weights in registers: 2 forms x (4 float, 2 double)
    assert len(spills) == 14 + 12
    assert all("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in line for line in spills), spills


@pytest.fixture
def setup_script(monkeypatch):
    """The functions of setup.py."""
    monkeypatch.setenv("INV_CONV_CPU_ONLY", "1")
    spec = importlib.util.spec_from_file_location("inv_conv_setup", OP / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_architectures(setup_script):
    """sm_75 and up, one a major number: its code runs on the later ones of the same number."""
    names = "sm_52 sm_60 sm_70 sm_75 sm_80 sm_86 sm_87 sm_88 sm_89 sm_90 sm_90a sm_100 sm_110 sm_103 sm_120 sm_121"
    assert setup_script.architectures("\n".join(names.split())) == [75, 80, 90, 100, 110, 120]
    assert setup_script.architectures("sm_70\nsm_75\nsm_80\nsm_86\nsm_90\n") == [75, 80, 90]
    if NVCC:
        told = subprocess.run([NVCC, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout
        assert {75, 80, 90} <= set(setup_script.architectures(told))


def copied(tmp_path: Path) -> Path:
    """The op's folder without what was built in it."""
    return shutil.copytree(OP, tmp_path / "op", ignore=shutil.ignore_patterns("build", "*.so", "__pycache__"))


def setup(op: Path, words: list[str], environment: dict[str, str], folder: Path) -> tuple[int, str]:
    """setup.py of that copy of the op: its exit code, and what it says."""
    code = children.finish(children.start(children.command, str(op / "setup.py"), words, str(folder), environment))
    return code, (folder / "output.txt").read_text()


@pytest.mark.parametrize(
    ("compiler", "said", "command"),
    [
        (None, "there is no C++ compiler", ["install"]),
        ("c++17 -x", "CXX=c++17 -x is not found", ["build_ext", "--inplace"]),
    ],
)
def test_a_missing_compiler_is_one_line(tmp_path, compiler, said, command):
    environment = os.environ | {"PATH": str(tmp_path), "INV_CONV_CPU_ONLY": "1"}
    environment.pop("CXX", None)
    environment |= {"CXX": compiler} if compiler else {}
    code, output = setup(copied(tmp_path), command, environment, tmp_path)
    assert code == 2, output
    (line,) = [line for line in output.splitlines() if line.startswith("error: ")]
    assert said in line and "install g++" in line
    assert "Traceback" not in output


def pip(python: Path, *arguments: str) -> str:
    """pip of this interpreter on the packages of another one."""
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", str(python), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def scratch_environment(folder: Path) -> tuple[Path, Path]:
    """A virtual environment with the packages of this one besides its own: its interpreter and its site-packages."""
    venv.create(folder, with_pip=False, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    (site / "packages.pth").write_text(f"{Path(torch.__file__).parents[1]}\n")
    return folder / "bin" / "python", site


def test_pip_lists_and_removes_the_library(tmp_path, setup_script):
    python, site = scratch_environment(tmp_path / "venv")
    before = set(site.iterdir())
    library = tmp_path / f"{extension.LIBRARY}.abi3.so"
    library.write_bytes(b"a library")
    for content in (b"a library", b"a newer library"):  # twice: installed over
        library.write_bytes(content)
        assert setup_script.install_library(library, site).read_bytes() == content
    assert re.search(r"^inv[-_]conv[-_]ops +1\.0$", pip(python, "list"), re.MULTILINE)
    assert library.name in pip(python, "show", "--files", "inv_conv_ops")
    pip(python, "uninstall", "--yes", "inv_conv_ops")
    assert set(site.iterdir()) == before


def test_a_place_that_cannot_be_written_is_one_line(tmp_path, setup_script, capsys):
    occupied = tmp_path / "site"
    occupied.write_text("no folder")
    with pytest.raises(SystemExit) as stopped:
        setup_script.install_library(Path(__file__), occupied)
    assert stopped.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"error: cannot write to {occupied}") and "use a virtual environment" in line


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("c++") is None, reason="needs a C++ compiler")
def test_install_and_uninstall(tmp_path):
    """The README's command in a fresh environment: the library is found, listed, removed."""
    python, _ = scratch_environment(tmp_path / "venv")
    done = subprocess.run(
        [python, "setup.py", "install"],
        cwd=copied(tmp_path),
        env=os.environ | {"INV_CONV_CPU_ONLY": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert not list((tmp_path / "op").glob("*.so"))
    assert loaded_by(python).startswith(f"{tmp_path / 'venv'}: CPU only, torch {torch.__version__}, CPU solver ")
    assert "inv_conv_ops" in pip(python, "list").replace("-", "_")
    pip(python, "uninstall", "--yes", "inv_conv_ops")
    assert not loaded_by(python).startswith(str(tmp_path))


LOADED = """
import torch
from inv_flow.utils.inv_conv_cuda import extension, inverse_conv2d, masked_conv2d
y, w = torch.ones(2, 3, 4, 4), 0.1 * torch.ones(3, 3, 2, 2)
assert (masked_conv2d(inverse_conv2d(y, w), w) - y).abs().max() < 1e-6
library = extension.load()
print(library.path and library.path.parents[3], library.description, sep=": ")
"""


def loaded_by(python: Path | str, *folders: Path) -> str:
    """What a fresh process loads, with `folders` before everything else on its path; its log lines go first."""
    done = subprocess.run(
        [python, "-c", LOADED],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(map(str, (*folders, ROOT)))},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stderr + done.stdout


@pytest.mark.skipif(extension.load().path is None, reason="the compiled op is not built")
def test_a_library_that_cannot_be_used_does_not_hide_an_older_one(tmp_path):
    """Whatever is wrong with it; the line names the cause, the library in use and the remedy."""
    good = extension.load().path
    content, version = good.read_bytes(), torch.__version__.encode()

    def stamped(old: bytes, new: bytes) -> bytes:
        assert content.count(old) == 1 and len(old) == len(new)
        return content.replace(old, new)

    other = b"9" * len(version)
    spoilt = {
        "garbage": (b"not a library", "is damaged or from another version"),
        "empty": (b"", "is damaged"),
        "cut": (content[: len(content) // 3], "is damaged"),
        "interface": (stamped(b"library|interface 2|", b"library|interface 1|"), "(interface 1, not 2)"),
        "torch": (stamped(b"|torch " + version, b"|torch " + other), f"was built for torch {other.decode()}"),
        # a library that it needs is not there
        "needs": (content.replace(b"libtorch_cpu.so", b"libtorch_xyz.so"), "does not load (libtorch_xyz.so"),
    }
    for name, (bytes_, _) in spoilt.items():
        broken = tmp_path / name / f"{extension.LIBRARY}.so"
        broken.parent.mkdir()
        broken.write_bytes(bytes_)
        os.utime(broken, (good.stat().st_mtime + 60,) * 2)
    line, last = loaded_by(sys.executable, *(tmp_path / name for name in spoilt)).splitlines()
    for name, (_, cause) in spoilt.items():
        assert re.search(f"{re.escape(str(tmp_path / name))}/[^ ]* [^;]*{re.escape(cause)}", line), (name, line)
    assert f"{good} is used" in line and extension.BUILD_COMMAND in line
    assert last.endswith(extension.load().description)


@pytest.mark.parametrize("environment", [{"INV_CONV_CPU_ONLY": "1"}, {"CUDA_HOME": "/nowhere", "PATH": "/nowhere"}])
def test_setup_says_what_it_builds(tmp_path, environment):
    """`--name` prints the line and builds nothing."""
    code, output = setup(OP, ["--name"], os.environ | environment, tmp_path)
    assert code == 0, output
    first = next(line for line in output.splitlines() if line.startswith("inverse convolution: building for"))
    if "INV_CONV_CPU_ONLY" in environment:
        assert first.endswith("CPU only, because INV_CONV_CPU_ONLY=1")


def test_benchmark_command(tmp_path, capsys):
    report = tmp_path / "out" / "bench.json"
    shapes = ["--shape", "3,4,6,6,3", "--shape", "2,2,5,4,2"]
    benchmark.main(["--device", "cpu", "--threads", "1", *shapes, "--repeats", "5", "--json", str(report)])
    printed = capsys.readouterr().out
    assert "| 3,4,6,6,3 |" in printed and "ratio+backward: geometric mean" in printed
    (setting,) = json.loads(report.read_text())["settings"]
    assert setting["threads"] == 1 and [row["shape"] for row in setting["rows"]] == ["3,4,6,6,3", "2,2,5,4,2"]
    for row in setting["rows"]:
        assert row["ratio"] == pytest.approx(row["solve ms"] / row["conv2d ms"])
        assert all(row[name] > 0 for name in row if name.endswith("ms"))
    first, second = (row["ratio"] for row in setting["rows"])
    assert setting["geometric mean"]["ratio"] == pytest.approx((first * second) ** 0.5)


def test_benchmark_refuses_what_it_cannot_do(capsys):
    for arguments in (["--shape", "1,2,3"], ["--shape", "1,2,3,x,3"], ["--repeats", "0"], ["--device", "tpu"]):
        with pytest.raises(SystemExit) as stopped:
            benchmark.main(arguments)
        assert stopped.value.code == 2
    assert "is not B,C,H,W,k" in capsys.readouterr().err
    if not torch.cuda.is_available():
        with pytest.raises(UserError, match="--device cpu"):
            benchmark.main(["--device", "cuda"])


def test_the_library_in_use_is_the_one_that_was_built():
    built = extension.load()
    if built.path is None:
        pytest.skip(f"the compiled op is not built: {extension.BUILD_COMMAND}")
    assert f"torch {torch.__version__}" in built.description


BUILT = extension.Extension(Path("op.so"), "CUDA 13.0", "13.0", kernels=(75, 80, 90, 120), ptx=120)


@pytest.mark.parametrize(
    ("capability", "runs"),
    [
        ((6, 1), False),
        ((7, 0), False),
        ((7, 5), True),
        ((8, 0), True),
        ((8, 6), True),
        ((8, 9), True),
        ((9, 0), True),
        ((10, 0), False),
        ((11, 0), False),
        ((12, 0), True),
        ((12, 1), True),
        ((13, 0), True),
    ],
)
def test_cards_without_kernels_run_on_library_calls(monkeypatch, caplog, capability, runs):
    """A pretended device: the compiled op where it has code for it, else one line and the torch backend."""
    monkeypatch.delenv("INV_CONV_BACKEND", raising=False)
    monkeypatch.setattr(extension, "load", lambda: BUILT)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Card")
    extension._obstacle.cache_clear()
    extension.say_once.cache_clear()
    try:
        with caplog.at_level(logging.WARNING):
            assert {choose_backend("cuda:0") for _ in range(3)} == {"cuda" if runs else "torch"}
        assert available_backends("cuda:0") == (["cuda", "torch"] if runs else ["torch"])
        lines = [record.getMessage() for record in caplog.records]
        if runs:
            assert not lines
        else:
            (line,) = lines
            assert f"no kernels for Card, sm_{capability[0]}{capability[1]} " in line
            assert (extension.BUILD_COMMAND in line) == (capability >= (7, 5))  # building helps newer cards alone
            monkeypatch.setenv("INV_CONV_BACKEND", "cuda")
            with pytest.raises(UserError, match="no kernels for Card"):
                choose_backend("cuda:0")
    finally:
        extension._obstacle.cache_clear()
        extension.say_once.cache_clear()
