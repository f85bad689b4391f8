"""What a GPU-less machine can check of the compiled op: the CUDA solver's arithmetic, its build, and the benchmark."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from common.errors import UserError
from inv_flow.utils.inv_conv_cuda import benchmark, extension

OP = Path(benchmark.__file__).parent
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
    for (form, numbers), (got, images, pixels, split, threads, shared, error, same) in zip(CASES, results, strict=True):
        assert got == form, numbers
        assert float(error) < (1e-12 if numbers[-1] == 64 else 1e-5), (numbers, error)
        assert same == "1", f"{numbers}: the order of the threads changes the result"
        assert int(threads) % 32 == 0 and int(threads) <= 512 and 32 % int(split) == 0
        seen |= {("images", int(images) > 1), ("pixels", pixels), ("split", split), ("shared", form, shared)}
    # several images a block, two pixels a thread, every split, weights in shared and in global memory
    assert {("images", True), ("images", False), ("pixels", "1"), ("pixels", "2")} <= seen
    assert {("split", "1"), ("split", "2"), ("split", "4"), ("split", "8")} <= seen
    assert {("shared", "tile", "0"), ("shared", "ring", "1"), ("shared", "flat", "0")} <= seen


NVCC = next(
    (path for path in ("/usr/local/cuda/bin/nvcc", shutil.which("nvcc")) if path and Path(path).is_file()), None
)


@pytest.mark.skipif(NVCC is None, reason="needs nvcc")
def test_cuda_kernels_compile_for_hopper_without_spilling(tmp_path):
    flags = ["-O3", "-std=c++17", "-Xptxas", "-v", "-Werror", "all-warnings", "-gencode=arch=compute_90,code=sm_90"]
    done = subprocess.run(
        [NVCC, *flags, "-c", str(OP / "csrc" / "cuda_solver.cu"), "-o", str(tmp_path / "solver.o")],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    spills = [line for line in done.stderr.splitlines() if "spill stores" in line]
    assert len(spills) == 14  # 3 forms x 2 pixels a thread, and the folding, in two dtypes
    assert all("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in line for line in spills), spills


@pytest.mark.parametrize("environment", [{"INV_CONV_CPU_ONLY": "1"}, {"CUDA_HOME": "/nowhere", "PATH": "/nowhere"}])
def test_setup_says_what_it_builds(environment):
    """`--name` prints the line and builds nothing."""
    done = subprocess.run(
        [sys.executable, "setup.py", "--name"],
        cwd=OP,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    first = next(line for line in done.stdout.splitlines() if line.startswith("inverse convolution: building for"))
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
    assert built.cpu and f"torch {torch.__version__}" in built.description
