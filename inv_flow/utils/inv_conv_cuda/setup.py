"""Builds the compiled inverse convolution: `cd inv_flow/utils/inv_conv_cuda && python setup.py install`.

With nvcc and a CUDA build of torch the library has a CUDA solver (for every architecture from sm_75 on that nvcc knows,
and PTX for newer ones) and a CPU solver, otherwise the CPU solver alone; a line says which, and why.
INV_CONV_CPU_ONLY=1 leaves the CUDA solver out. `install` puts the library into site-packages, where `pip list` shows
and `pip uninstall inv_conv_ops` removes it; `build_ext --inplace` puts it beside this file. Nothing is downloaded.
"""

import base64
import hashlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import ClassVar, NoReturn

import torch
from setuptools import Command, setup

HERE = Path(__file__).resolve().parent
NAME = "_inv_conv_ops"
PACKAGE, VERSION = "inv_conv_ops", "1.0"


def stop(reason: str) -> NoReturn:
    """One line, exit code 2."""
    print(f"error: {reason}", file=sys.stderr)
    sys.exit(2)


def find_compiler() -> str:
    """The C++ compiler: CXX, or the first one on the path."""
    asked = os.environ.get("CXX")
    for command in [asked] if asked else ["c++", "g++", "clang++"]:
        if shutil.which(shlex.split(command)[0]):
            return command
    missing = f"CXX={asked} is not found" if asked else "there is no C++ compiler (c++, g++ or clang++)"
    stop(f"{missing}: install g++ (Debian: apt-get install g++) or name a compiler in CXX; the op runs without, slower")


def find_toolkit() -> tuple[Path | None, str]:
    """The root of a CUDA toolkit that fits this torch (None: there is none), and its version or what is missing."""
    if os.environ.get("INV_CONV_CPU_ONLY") == "1":
        return None, "INV_CONV_CPU_ONLY=1"
    if torch.version.cuda is None:
        return None, f"torch {torch.__version__} is built without CUDA"
    on_path = shutil.which("nvcc")
    roots = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"]
    roots += [str(Path(on_path).resolve().parents[1])] if on_path else []
    root = next((Path(root) for root in roots if root and (Path(root) / "bin" / "nvcc").is_file()), None)
    if root is None:
        return None, "nvcc is not found (CUDA_HOME names the CUDA toolkit)"
    told = subprocess.run([root / "bin" / "nvcc", "--version"], capture_output=True, text=True, check=False).stdout
    version = re.search(r"release (\d+)\.(\d+)", told)
    if version is None:
        return None, f"{root}/bin/nvcc does not tell its version"
    if version[1] != torch.version.cuda.split(".")[0]:
        return None, f"nvcc is CUDA {version[1]}.{version[2]} and torch is built for CUDA {torch.version.cuda}"
    return root, f"{version[1]}.{version[2]}"


def architectures(told: str) -> list[int]:
    """From `nvcc --list-gpu-code`: sm_75 and later, the lowest of each major number, which runs on the others."""
    codes = sorted(int(code) for code in re.findall(r"^sm_(\d+)$", told, re.MULTILINE) if int(code) >= 75)
    return [code for n, code in enumerate(codes) if n == 0 or codes[n - 1] // 10 != code // 10]


def wheel_folders(kind: str) -> list[str]:
    """`include` or `lib` folders of the installed nvidia wheels, which hold what a slim toolkit lacks."""
    site = Path(torch.__file__).resolve().parents[1]
    return [str(folder) for folder in sorted(site.glob(f"nvidia/*/{kind}"))]


def runtime_library(root: Path) -> str:
    """The CUDA runtime to link with: the shared one that torch itself loads."""
    folders = [*wheel_folders("lib"), str(root / "lib64"), str(root / "targets" / "x86_64-linux" / "lib")]
    found = [path for folder in folders for path in sorted(Path(folder).glob("libcudart.so*"))]
    if not found:
        stop(
            "libcudart.so is neither in the CUDA toolkit nor in the nvidia wheels: "
            "install one of them, or set INV_CONV_CPU_ONLY=1"
        )
    return str(found[0])


toolkit, reason = find_toolkit()
if toolkit is not None:
    os.environ["CUDA_HOME"] = str(toolkit)  # torch.utils.cpp_extension reads it when it is imported

from torch.utils import cpp_extension  # noqa: E402


def extension():
    """The sources and flags of the library."""
    sources = ["csrc/binding.cpp", "csrc/cpu_generic.cpp", "csrc/cpu_avx2.cpp", "csrc/cpu_avx512.cpp"]
    flags = ["-O3", "-fopenmp", "-fvisibility=hidden", "-Wno-ignored-attributes"]
    # at::parallel_for is a template: it must be compiled for the threads that torch uses
    parallel = "AT_PARALLEL_OPENMP" if torch.backends.openmp.is_available() else "AT_PARALLEL_NATIVE"
    macros = [(parallel, "1"), ("INV_CONV_TORCH", f'"{torch.__version__}"')]
    options = {"py_limited_api": True, "extra_link_args": ["-fopenmp"]}
    if toolkit is None:
        return cpp_extension.CppExtension(
            NAME, sources, define_macros=macros, extra_compile_args={"cxx": flags}, **options
        )
    told = subprocess.run(
        [toolkit / "bin" / "nvcc", "--list-gpu-code"], capture_output=True, text=True, check=True
    ).stdout
    targets = architectures(told)
    sources += ["csrc/cuda_binding.cpp", "csrc/cuda_solver.cu"]
    kernels = " ".join(map(str, targets))
    macros += [("INV_CONV_CUDA", f'"{reason}"'), ("INV_CONV_SM", f'"{kernels}"'), ("INV_CONV_PTX", f'"{targets[-1]}"')]
    nvcc = [
        "-O3",
        *(f"-gencode=arch=compute_{cc},code=sm_{cc}" for cc in targets),
        f"-gencode=arch=compute_{targets[-1]},code=compute_{targets[-1]}",
    ]
    return cpp_extension.CppExtension(
        NAME,
        sources,
        define_macros=macros,
        include_dirs=[str(toolkit / "include"), *wheel_folders("include")],
        extra_compile_args={"cxx": flags, "nvcc": nvcc},
        libraries=["c10_cuda"],
        extra_objects=[runtime_library(toolkit)],
        **options,
    )


class Build(cpp_extension.BuildExtension):
    """`build_ext`, after a look for the compiler."""

    def run(self) -> None:
        os.environ["CXX"] = find_compiler()
        super().run()


def install_library(built: Path, site: Path) -> Path:
    """Copy the library to `site` and register it there, so that pip lists and removes it."""
    target, info = site / built.name, site / f"{PACKAGE}-{VERSION}.dist-info"
    try:
        info.mkdir(parents=True, exist_ok=True)
        fresh = target.with_suffix(".new")
        shutil.copy2(built, fresh)
        fresh.replace(target)  # a running process keeps the old file
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {PACKAGE}\nVersion: {VERSION}\n")
        (info / "INSTALLER").write_text("setup.py\n")
        lines = [f"{info.name}/RECORD,,\n"]
        for path in (target, info / "METADATA", info / "INSTALLER"):
            digest = base64.urlsafe_b64encode(hashlib.sha256(path.read_bytes()).digest()).rstrip(b"=").decode()
            lines.append(f"{path.relative_to(site).as_posix()},sha256={digest},{path.stat().st_size}\n")
        (info / "RECORD").write_text("".join(lines))
    except OSError as error:
        stop(f"cannot write to {site} ({error}): use a virtual environment, or `python setup.py build_ext --inplace`")
    return target


class Install(Command):
    """Build, then put the one library into site-packages."""

    description = "build the library and put it into site-packages"
    user_options: ClassVar[list] = []

    def initialize_options(self) -> None:
        pass

    def finalize_options(self) -> None:
        pass

    def run(self) -> None:
        self.run_command("build_ext")
        built = Path(self.get_finalized_command("build_ext").get_ext_fullpath(NAME)).resolve()
        print(f"installed {install_library(built, Path(sysconfig.get_path('platlib')))}")


if __name__ == "__main__":
    os.chdir(HERE)
    what = f"CUDA {reason} and CPU" if toolkit else f"CPU only, because {reason}"
    print(f"inverse convolution: building for {what}", flush=True)
    setup(
        name=PACKAGE,
        version=VERSION,
        ext_modules=[extension()],
        cmdclass={"build_ext": Build, "install": Install},
    )
