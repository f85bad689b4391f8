"""Builds the compiled inverse convolution: `cd inv_flow/utils/inv_conv_cuda && python setup.py install`.

With nvcc and a CUDA build of torch the library has a CUDA solver (sm_80, sm_90, and PTX for newer ones) and a CPU
solver, otherwise the CPU solver alone; a line says which, and why. INV_CONV_CPU_ONLY=1 leaves the CUDA solver out.
`install` puts the library into site-packages and beside this file; `build_ext --inplace` beside this file only. Nothing
is downloaded.
"""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import ClassVar

import torch
from setuptools import Command, setup

HERE = Path(__file__).resolve().parent
NAME = "_inv_conv_ops"


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


def wheel_folders(kind: str) -> list[str]:
    """`include` or `lib` folders of the installed nvidia wheels, which hold what a slim toolkit lacks."""
    site = Path(torch.__file__).resolve().parents[1]
    return [str(folder) for folder in sorted(site.glob(f"nvidia/*/{kind}"))]


def runtime_library(root: Path) -> str:
    """The CUDA runtime to link with: the shared one that torch itself loads."""
    folders = [*wheel_folders("lib"), str(root / "lib64"), str(root / "targets" / "x86_64-linux" / "lib")]
    found = [path for folder in folders for path in sorted(Path(folder).glob("libcudart.so*"))]
    if not found:
        sys.exit(
            "error: libcudart.so is neither in the CUDA toolkit nor in the nvidia wheels: "
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
    sources += ["csrc/cuda_binding.cpp", "csrc/cuda_solver.cu"]
    macros += [("INV_CONV_CUDA", f'"{reason}"')]
    targets = ["80", "90"]
    nvcc = [
        "-O3",
        *(f"-gencode=arch=compute_{cc},code=sm_{cc}" for cc in targets),
        "-gencode=arch=compute_90,code=compute_90",
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


class Install(Command):
    """Build, then copy the one library to site-packages and beside this file."""

    description = "build the library and put it where the package finds it"
    user_options: ClassVar[list] = []

    def initialize_options(self) -> None:
        pass

    def finalize_options(self) -> None:
        pass

    def run(self) -> None:
        build = self.reinitialize_command("build_ext", inplace=True)
        self.run_command("build_ext")
        built = Path(build.get_ext_fullpath(NAME)).resolve()
        target = Path(sysconfig.get_path("platlib")) / built.name
        target.unlink(missing_ok=True)  # a running process keeps the old file
        shutil.copy2(built, target)
        print(f"installed {target} (and {built})")


os.chdir(HERE)
print(
    f"inverse convolution: building for {f'CUDA {reason} and CPU' if toolkit else f'CPU only, because {reason}'}",
    flush=True,
)
setup(
    name="inv_conv_ops",
    version="1.0",
    ext_modules=[extension()],
    cmdclass={"build_ext": cpp_extension.BuildExtension, "install": Install},
)
