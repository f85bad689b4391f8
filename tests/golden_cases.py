"""Where the golden vectors of a paper lie, and how a test reads them.

The folder is `tests/golden/<paper>` unless the environment variable GOLDEN_DIR names another one: either the
paper's own folder or a folder that holds one sub-folder a paper. Files of the same schema with other seeds and shapes
may
lie there, so a test takes every size from the file.
"""

import os
from pathlib import Path

import numpy as np
import pytest

PAPERS = ("glancenet", "inv_flow", "latent_flow", "lbae", "nfpi")
HERE = Path(__file__).parent / "golden"


def folder(paper: str) -> Path:
    """The golden folder of `paper`; skips the calling module when GOLDEN_DIR is the folder of another paper."""
    named = os.environ.get("GOLDEN_DIR")
    if not named:
        return HERE / paper
    root = Path(named)
    if (root / paper).is_dir():
        return root / paper
    if root.name != paper and (root.name in PAPERS or any((root / other).is_dir() for other in PAPERS)):
        pytest.skip(f"GOLDEN_DIR={root} has no vectors of {paper}", allow_module_level=True)
    return root


def load(paper: str, name: str) -> dict[str, np.ndarray]:
    """All arrays of `<name>.npz`, in memory. A missing file is an error, never a skip."""
    path = folder(paper) / f"{name}.npz"
    if not path.is_file():
        raise FileNotFoundError(f"golden file missing: {path}")
    with np.load(path, allow_pickle=False) as archive:
        return {key: archive[key] for key in archive.files}


def check_complete(paper: str, covered: set[str], only: tuple[str, ...] = ()) -> None:
    """Fail when a covered file is missing, or when the folder holds a file that no test covers.

    `only`: glob patterns that restrict the check, for a module that covers a part of a paper's folder.
    """
    base = folder(paper)
    files = {path.name for path in base.iterdir() if path.suffix in (".npz", ".json")}
    if only:
        files = {name for name in files if any(Path(name).match(pattern) for pattern in only)}
    assert not covered - files, f"golden files missing in {base}: {sorted(covered - files)}"
    assert not files - covered, f"golden files that no test covers in {base}: {sorted(files - covered)}"
