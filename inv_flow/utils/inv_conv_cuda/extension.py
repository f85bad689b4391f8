"""Finds and loads the compiled library of the op, when there is one."""

import logging
import mmap
import re
import struct
import sys
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

LIBRARY = "_inv_conv_ops"
INTERFACE = 2  # of the compiled library; csrc/binding.cpp states the same number
OLDEST = (7, 5)  # compute capability that setup.py builds for
BUILD_COMMAND = "cd inv_flow/utils/inv_conv_cuda && python setup.py install"

# What csrc/binding.cpp writes into the library, readable without running any of it.
_STAMP = re.compile(rb"inv_conv library\|interface (\d+)\|torch ([^|]+)\|cuda ([^|]*)\|sm ([\d ]*)\|ptx (\d*)\|")

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Extension:
    """The compiled library: where it is, what it was built for, or why there is none to use."""

    path: Path | None
    description: str
    cuda: str = ""  # version of the toolkit; empty for a CPU solver alone
    kernels: tuple[int, ...] = ()  # compute capabilities with machine code, 10 * major + minor
    ptx: int | None = None  # the capability from which on newer devices compile theirs


def find() -> list[Path]:
    """The compiled libraries beside this file and on `sys.path` (site-packages), the newest first."""
    folders = dict.fromkeys([Path(__file__).parent, *(Path(folder).resolve() for folder in sys.path)])
    found = [path for folder in folders for path in folder.glob(f"{LIBRARY}*.so")]
    return sorted(found, key=lambda path: path.stat().st_mtime, reverse=True)


def _read_stamp(path: Path) -> list[str] | None:
    """The parts of the library's stamp; None without one, or for a file cut short, which would kill who loads it."""
    with path.open("rb") as file:
        if file.seek(0, 2) < 64:
            return None
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if content[:4] == b"\x7fELF":
                # its last part is a table, whose place and size the head tells
                (start,) = struct.unpack_from("<Q", content, 0x28)
                size, count = struct.unpack_from("<HH", content, 0x3A)
                if start + size * count > len(content):
                    return None
            stamp = _STAMP.search(content)
            return stamp and [part.decode() for part in stamp.groups()]


def open_library(path: Path) -> Extension:
    """Load one library. Raises OSError with the reason when it cannot be used."""
    found = _read_stamp(path)
    if found is None:
        raise OSError(f"{path} is damaged or from another version of this repository")
    interface, built_for, cuda, kernels, ptx = found
    if int(interface) != INTERFACE:
        raise OSError(f"{path} is from another version of this repository (interface {interface}, not {INTERFACE})")
    if built_for != torch.__version__:
        raise OSError(f"{path} was built for torch {built_for}, and this is torch {torch.__version__}")
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        cause = str(error.__cause__ or error).splitlines()[0]
        raise OSError(f"{path} does not load ({cause})") from error
    solver = f"torch {built_for}, CPU solver {torch.ops.inv_conv.cpu_solver()}"
    description = f"CUDA {cuda} for sm {kernels.replace(' ', ', ')}, {solver}" if cuda else f"CPU only, {solver}"
    return Extension(path, description, cuda, tuple(map(int, kernels.split())), int(ptx) if ptx else None)


@lru_cache(maxsize=1)
def load() -> Extension:
    """The newest library that can be used, loaded once.

    A missing or unusable library is no error: the description says what is wrong. A newer one that had to be passed
    over is logged.
    """
    reasons: list[str] = []
    for path in find():
        try:
            library = open_library(path)
        except OSError as error:
            reasons.append(str(error))
            continue
        if reasons:
            say_once(f"inverse convolution: {'; '.join(reasons)}; {path} is used. To build it anew: {BUILD_COMMAND}")
        return library
    return Extension(None, "; ".join(reasons) or "it is not built")


def has_kernels(library: Extension, capability: tuple[int, int]) -> bool:
    """Whether a device of that compute capability can run the library's CUDA solver.

    Machine code runs on the capability it was built for and on later ones of the same major number; PTX on all later.
    """
    major, minor = capability
    fits = any(built // 10 == major and built % 10 <= minor for built in library.kernels)
    return fits or (library.ptx is not None and library.ptx <= 10 * major + minor)


def obstacle(device: torch.device) -> str | None:
    """Why the compiled op cannot solve for tensors on `device`; None if it can."""
    return _obstacle(load(), device)


@lru_cache
def _obstacle(library: Extension, device: torch.device) -> str | None:
    remedy = f"to build it: {BUILD_COMMAND}"
    if library.path is None:
        return f"{library.description} ({remedy})"
    if device.type == "cpu":
        return None
    if device.type != "cuda":
        return f"it has no solver for {device.type}"
    if not library.cuda:
        return f"it is built without CUDA ({library.description}; {remedy})"
    if not torch.cuda.is_available():
        return "this torch sees no CUDA device"
    capability = torch.cuda.get_device_capability(device)
    if has_kernels(library, capability):
        return None
    card = f"{torch.cuda.get_device_name(device)}, sm_{capability[0]}{capability[1]}"
    return f"it has no kernels for {card} ({library.description}{f'; {remedy}' if capability >= OLDEST else ''})"


@lru_cache
def say_once(message: str) -> None:
    """Log `message` once in the life of the process."""
    log.warning(message)
