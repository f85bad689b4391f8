"""Small trained weights that ship in `checkpoints/`: found by name, held to the digests of its manifest.

    python -m common.released --check           # every file is there, whole, described, and small
    python -m common.released --update          # write sizes and digests of the files that are there
    python -m common.released --list

A release `<paper>/<name>` is <name>.safetensors, <name>.json (its config) and <name>.log (of its training).
MANIFEST.json says of each what it is, the command that trained it, the command that trains the paper's own size, and
every file's sha256.
"""

import argparse
import hashlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from common.checkpoint import read_json, write_json
from common.errors import UserError, run_command, suggest

FOLDER = Path(__file__).resolve().parents[1] / "checkpoints"
MANIFEST, README = "MANIFEST.json", "README.md"
SUFFIXES = (".safetensors", ".json", ".log")
TEXTS = ("what", "command", "full_command")
LIMIT, TOTAL_LIMIT = 8 << 20, 25 << 20  # bytes of one file, of all
POINTER = b"version https://git-lfs"


@dataclass(frozen=True)
class Release:
    """Weights that ship: `path` (.safetensors, its config beside it), what they are, how they were trained."""

    name: str
    path: Path
    what: str
    command: str
    full_command: str
    sha256: str

    def notice(self, reason: str) -> str:
        """The line that says that these weights are used, and why, and how to train one's own."""
        return (
            f"{reason}: using the released checkpoints/{self.name}.safetensors ({self.what}); "
            f"train your own: `{self.full_command}`"
        )

    def refuse(self, given: dict[str, Any], stored: dict[str, Any], reason: str) -> None:
        """Raise UserError when an option that the user gave contradicts the release's own."""
        for key, value in given.items():
            if key in stored and _plain(value) != _plain(stored[key]):
                raise UserError(
                    f"{reason}, and {key}={value} contradicts the released checkpoints/{self.name}.safetensors "
                    f"({key}={stored[key]}): train your own (`{self.full_command}`), or leave {key} out"
                )


def _plain(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value


def released(paper: str, name: str) -> Release:
    """The release `<paper>/<name>`, its weights and config checked against the manifest.

    Raises UserError when it is unknown, missing, a git-LFS pointer, or not the file that was released.
    """
    manifest, key = _manifest(), f"{paper}/{name}"
    if key not in manifest:
        raise UserError(f"no release {key}{suggest(key, manifest)}; checkpoints/{MANIFEST} has {', '.join(manifest)}")
    entry = manifest[key]
    for suffix in (".safetensors", ".json"):
        if problem := _problem(f"{key}{suffix}", entry["files"].get(f"{key}{suffix}")):
            raise UserError(problem)
    weights = f"{key}.safetensors"
    return Release(key, FOLDER / weights, *(entry[text] for text in TEXTS), entry["files"][weights]["sha256"])


def named(name: Any) -> Path:
    """What a `load` is given as a path. Raises UserError for what is no name."""
    if not isinstance(name, (str, Path)) or not str(name):
        raise UserError(f"{name!r} is no name: give the folder of a run, a file of weights, or a name of checkpoints/")
    return Path(name)


def weights_file(paper: str, name: str | Path, inside: str = "") -> Path:
    """The file of weights that `name` means: a file, the newest one `inside` (a pattern) a run's folder, or a release
    of this paper. Raises UserError for neither.
    """
    path = named(name)
    if path.is_file():
        return path
    if inside and path.is_dir():
        found = max(path.glob(inside), key=lambda file: file.stat().st_mtime, default=None)
        if found is None:
            raise UserError(f"{path} holds no {Path(inside).name}: name the folder of a run, or a file of weights")
        return found
    if path.suffix or len(path.parts) > 1:
        raise UserError(f"there is no file {path}; the names in checkpoints/{paper} need no folder and no ending")
    own = [key.removeprefix(f"{paper}/") for key in _manifest() if key.startswith(f"{paper}/")]
    if path.name not in own:
        others = [key.split("/")[0] for key in _manifest() if key.endswith(f"/{path.name}")]
        near = f" (it is {others[0]}'s)" if others else suggest(path.name, own)
        raise UserError(f"checkpoints/{paper} has no {path.name}{near}; it has {', '.join(own)}")
    return released(paper, path.name).path


def _manifest() -> dict[str, dict[str, Any]]:
    """The manifest's releases. Raises UserError when the file is missing or is no manifest."""
    path = FOLDER / MANIFEST
    manifest = read_json(path)
    if not isinstance(manifest, dict) or not all(
        isinstance(entry, dict) and isinstance(entry.get("files"), dict) and all(text in entry for text in TEXTS)
        for entry in manifest.values()
    ):
        raise UserError(f"{path} is no manifest of releases; restore it by `git checkout -- checkpoints`")
    return manifest


def _problem(file: str, wanted: dict[str, Any] | None) -> str | None:
    """One line on a file that is not what the manifest says, with the remedy; None when all is well."""
    path, shown = FOLDER / file, f"checkpoints/{file}"
    remedy = f"restore it by `git checkout -- {shown}`"
    if wanted is None:
        return f"checkpoints/{MANIFEST} does not list {shown}; run `python -m common.released --update`"
    if not path.is_file():
        return f"{shown} is missing; {remedy}"
    content = path.read_bytes()
    if content.startswith(POINTER):
        return f"{shown} is a git-LFS pointer, not the file; fetch it by `git lfs pull`"
    if len(content) != wanted.get("bytes"):
        return f"{shown} is damaged: {len(content)} bytes, not {wanted.get('bytes')}; {remedy}"
    if hashlib.sha256(content).hexdigest() != wanted.get("sha256"):
        return f"{shown} is damaged or changed: its sha256 is not that of the manifest; {remedy}"
    return None


def problems() -> list[str]:
    """Everything in which `checkpoints/` differs from its manifest, or breaks its limits; a line each."""
    manifest, found = _manifest(), []
    for key, entry in manifest.items():
        found += [
            f"checkpoints/{MANIFEST}: {key} has no {text}" for text in TEXTS if not str(entry[text] or "").strip()
        ]
        expected = {f"{key}{suffix}" for suffix in SUFFIXES}
        found += [
            p for file in sorted(expected | entry["files"].keys()) if (p := _problem(file, entry["files"].get(file)))
        ]
    listed = {file for entry in manifest.values() for file in entry["files"]}
    present = _present()
    found += [f"checkpoints/{file} is in no release" for file in present if file not in listed]
    sizes = {file: (FOLDER / file).stat().st_size for file in present}
    found += [f"checkpoints/{file} has {size} bytes, more than {LIMIT}" for file, size in sizes.items() if size > LIMIT]
    if sum(sizes.values()) > TOTAL_LIMIT:
        found.append(f"checkpoints/ holds {sum(sizes.values())} bytes, more than {TOTAL_LIMIT}")
    return found


def _present() -> list[str]:
    """All files below `checkpoints/` but the manifest and the README, relative to it."""
    files = (path.relative_to(FOLDER).as_posix() for path in FOLDER.rglob("*") if path.is_file())
    return sorted(file for file in files if file not in (MANIFEST, README) and not file.startswith("."))


def update() -> None:
    """Rewrite the sizes and digests; texts of known releases stay, new ones are left to be written by hand."""
    path = FOLDER / MANIFEST
    old = _manifest() if path.is_file() else {}
    manifest: dict[str, dict[str, Any]] = {}
    for file in _present():
        key = file.rpartition(".")[0]
        entry = manifest.setdefault(key, {**{text: old.get(key, {}).get(text, "") for text in TEXTS}, "files": {}})
        content = (FOLDER / file).read_bytes()
        entry["files"][file] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    write_json(path, manifest)


def main(argv: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(prog="python -m common.released", description=__doc__.split("\n")[0])
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--check", action="store_true", help="fail when a file differs from the manifest")
    action.add_argument("--update", action="store_true", help="write sizes and digests of the files that are there")
    action.add_argument("--list", action="store_true", help="print every release")
    args = parser.parse_args(argv)
    if args.update:
        update()
    if args.list:
        for key, entry in _manifest().items():
            print(f"{key}: {entry['what']}; `{entry['command']}`")
        return
    found = problems()
    if found:
        raise UserError("; ".join(found))
    size = sum((FOLDER / file).stat().st_size for file in _present())
    print(f"checkpoints: {len(_manifest())} releases, {size / 2**20:.1f} MiB, as the manifest says")


if __name__ == "__main__":
    sys.exit(run_command(main))
