"""Finds and loads the compiled library of the op, when there is one."""

import importlib.util
import logging
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

LIBRARY = "_inv_conv_ops"
INTERFACE = 1  # of the compiled library; csrc/binding.cpp states the same number
BUILD_COMMAND = "cd inv_flow/utils/inv_conv_cuda && python setup.py install"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Extension:
    """The compiled library: where it is, what it was built for, and why a part of it is missing."""

    path: Path | None
    cpu: bool
    cuda: bool
    description: str


def find() -> Path | None:
    """The newest compiled library beside this file or on `sys.path` (site-packages)."""
    found = list(Path(__file__).parent.glob(f"{LIBRARY}*.so"))
    spec = importlib.util.find_spec(LIBRARY)
    if spec is not None and spec.origin:
        found.append(Path(spec.origin))
    return max(found, key=lambda path: path.stat().st_mtime, default=None)


@lru_cache(maxsize=1)
def load() -> Extension:
    """Load the library once. A missing or unusable library is no error: the description says what is wrong with it."""
    path = find()
    if path is None:
        return Extension(None, False, False, "it is not built")
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        # built for another torch or another machine
        return Extension(path, False, False, f"{path.name} does not load ({str(error).splitlines()[0]})")
    interface, cuda, description = torch.ops.inv_conv.build().split("; ", 2)
    if int(interface) != INTERFACE:
        return Extension(path, False, False, f"{path.name} is of interface {interface}, not {INTERFACE}")
    return Extension(path, True, cuda == "cuda", description)


@lru_cache
def say_once(message: str) -> None:
    """Log `message` once in the life of the process."""
    log.warning(message)
