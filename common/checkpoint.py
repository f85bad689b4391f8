"""Files that survive: atomic writes, the full state for an exact resume, small weights for inference.

Two artefacts a run: `save_state` (everything, read by `weights_only=True`) and `save_weights` (safetensors + a JSON
config).
"""

import errno
import glob
import hashlib
import json
import os
import pickle
import random
import re
import socket
import tempfile
import time
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor

from common.errors import UserError, disk_full, refuse_web_page

FORMAT_VERSION = 1
STALE_SECONDS = 86_400  # a temporary file of another machine is taken for abandoned after a day
_KEYS = ("format_version", "kind", "state")


@contextmanager
def atomic_write(path: str | Path) -> Iterator[IO[bytes]]:
    """A binary file that takes the name `path` only when the block ends well.

    Written to a temporary file in the same folder, flushed to the disk, renamed. On any error the temporary file is
    removed and an older `path` stays as it was; what a killed process left behind is removed by the next write.
    Raises UserError when the disk is full or the folder cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(path)
        mark = f"{_host()}-{os.getpid()}-"
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.{mark}", suffix=".tmp", dir=path.parent)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from error
    try:
        with os.fdopen(handle, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(name, 0o666 & ~_umask())
        os.replace(name, path)
        _sync_folder(path.parent)
    except BaseException as error:
        Path(name).unlink(missing_ok=True)
        if disk_full(error):
            kept = "; the older file is kept" if path.exists() else ""
            raise UserError(f"cannot write {path}: the disk is full (or over its quota){kept}") from error
        raise


def _host() -> str:
    return f"{zlib.crc32(socket.gethostname().encode()):08x}"


def _remove_abandoned(path: Path) -> None:
    """Remove temporary files of `path` whose writer was killed: a dead process here, or a day old elsewhere."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        found = re.fullmatch(r"([0-9a-f]{8})-(\d+)-[^.]*", left.name[len(path.name) + 2 : -len(".tmp")])
        if found is None:
            continue
        try:
            if found[1] == _host():
                gone = not _is_running(int(found[2]))
            else:
                gone = time.time() - left.stat().st_mtime > STALE_SECONDS
            if gone:
                left.unlink()
        except OSError:  # another process was faster, or the file is not ours to remove
            continue


def _is_running(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (PermissionError, OverflowError):
        return True
    return True


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folder(folder: Path) -> None:
    """Make a rename durable; some file systems refuse fsync on a folder, and then there is nothing more to do."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(handle)


def append_text(path: str | Path, text: str) -> None:
    """Add whole lines to a file: all of `text` or nothing. Raises UserError when the disk is full."""
    data = text.encode()
    try:
        with open(path, "ab", buffering=0) as file:
            size = os.fstat(file.fileno()).st_size
            try:
                written = file.write(data)
                while written < len(data):  # a nearly full disk takes a part, and refuses the rest
                    written += file.write(data[written:])
            except OSError:
                file.truncate(size)
                raise
    except OSError as error:
        if disk_full(error):
            raise UserError(
                f"cannot write {path}: the disk is full (or over its quota); older rows are kept"
            ) from error
        raise UserError(f"cannot write {path}: {error.strerror}") from error


def whole_lines(path: str | Path) -> str:
    """The text of a file without an unfinished last line, which a crash of the machine may leave behind."""
    text = Path(path).read_bytes().decode("utf-8")
    return text[: text.rfind("\n") + 1]


def write_json(path: str | Path, value: Any) -> None:
    """`value` as indented JSON with sorted keys, written atomically."""
    text = json.dumps(value, indent=2, sort_keys=True, default=str)
    with atomic_write(path) as file:
        file.write((text + "\n").encode())


def read_json(path: str | Path) -> Any:
    """The content of a JSON file. Raises UserError when it is missing or is not JSON."""
    try:
        return json.loads(Path(path).read_bytes())
    except FileNotFoundError:
        raise UserError(f"no such file: {path}") from None
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(f"{path} is not a readable JSON file ({str(error)[:120]}); restore or delete it") from error


def save_state(path: str | Path, kind: str, **state: Any) -> None:
    """Write the full state of a run (tensors, numbers, strings, lists and dicts of them) atomically.

    `kind` names the writer ("lbae", ...) and is checked by `load_state`.
    """
    with atomic_write(path) as file:
        torch.save({"format_version": FORMAT_VERSION, "kind": kind, "state": _plain(state)}, file)


def _plain(value: Any) -> Any:
    """numpy scalars and arrays as python numbers and tensors, paths as strings: what a `weights_only` load accepts."""
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(item) for item in value) if type(value) in (list, tuple) else list(map(_plain, value))
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return torch.from_numpy(value.copy())
    if isinstance(value, Path):
        return str(value)
    return value


def load_tensors(path: str | Path, map_location: Any = "cpu") -> Any:
    """What `torch.save` wrote at `path`, read with `weights_only=True`.

    Raises UserError when the file is missing, truncated, foreign, or holds anything but tensors and plain values.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}")
    refuse_web_page(path)
    try:
        check_archive(path)
        return torch.load(path, map_location=map_location, weights_only=True)
    except UserError:
        raise
    except pickle.UnpicklingError as error:
        raise UserError(
            f"{path} is refused: it is damaged, or holds more than tensors and plain values ({str(error)[:80]})"
        ) from error
    except Exception as error:  # torch raises many types on damaged files: RuntimeError, EOFError, struct.error ...
        raise UserError(
            f"{path} is truncated or is no PyTorch file ({type(error).__name__}); use an older checkpoint"
        ) from error


def check_archive(path: Path) -> None:
    """Refuse an archive whose members are compressed (they could fill the memory from a small file) or fail their own
    checksums (torch.load does not look at these: a flipped bit would become another weight).
    """
    if not zipfile.is_zipfile(path):
        return
    with zipfile.ZipFile(path) as archive:
        if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
            raise UserError(f"{path} is refused: a PyTorch file has no compressed members")
        if damaged := archive.testzip():
            raise UserError(f"{path} is damaged (checksum of {damaged}); use an older checkpoint")


def load_state(path: str | Path, kind: str, map_location: Any = "cpu") -> dict[str, Any]:
    """The state that `save_state(path, kind, ...)` wrote.

    Raises UserError for a missing, truncated or foreign file, one of another `kind`, and one of a newer format.
    """
    data = load_tensors(path, map_location)
    if not isinstance(data, dict) or any(key not in data for key in _KEYS):
        raise UserError(f"{path} is not a checkpoint of this repository")
    if not isinstance(data["format_version"], int) or data["format_version"] > FORMAT_VERSION:
        raise UserError(
            f"{path} has format {data['format_version']}, this version reads up to {FORMAT_VERSION}; "
            "update the repository"
        )
    if data["kind"] != kind:
        raise UserError(f"{path} is a checkpoint of '{data['kind']}', expected '{kind}'")
    if not isinstance(data["state"], dict):
        raise UserError(f"{path} is not a checkpoint of this repository")
    return data["state"]


def rng_state() -> dict[str, Any]:
    """The states of python's, numpy's and torch's generators (the CPU's and this process's CUDA device's)."""
    name, keys, position, has_gauss, cached = np.random.get_state()
    version, internal, gauss = random.getstate()
    return {
        "python": [version, list(internal), gauss],
        "numpy": [name, torch.from_numpy(keys.astype(np.int64)), position, has_gauss, cached],
        "torch": torch.get_rng_state(),
        "cuda": [torch.cuda.get_rng_state()] if torch.cuda.is_initialized() else [],
    }


def restore_rng(state: dict[str, Any], device: torch.device | str = "cpu") -> None:
    """Set every generator as `rng_state` found it; the state of a CUDA `device` is the first one stored.

    A run that goes on on another kind of device keeps the generators of the CPU. Raises UserError for a damaged state.
    """
    try:
        version, internal, gauss = state["python"]
        name, keys, position, has_gauss, cached = state["numpy"]
        random.setstate((version, tuple(internal), gauss))
        np.random.set_state((name, keys.numpy().astype(np.uint32), position, has_gauss, cached))
        torch.set_rng_state(state["torch"].cpu())
        if torch.device(device).type == "cuda" and state["cuda"]:
            torch.cuda.set_rng_state(state["cuda"][0].cpu(), device)
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError, RuntimeError) as error:
        raise UserError(
            f"the checkpoint's random states are damaged ({type(error).__name__}); use an older checkpoint"
        ) from error


def save_weights(path: str | Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    """Weights for inference: `<path>` (safetensors; the config and a digest in its metadata), written atomically, and
    `<stem>.json` beside it, the config for people.
    """
    from safetensors.torch import save

    path = Path(path)
    if path.suffix != ".safetensors":
        raise ValueError(f"weights are stored as .safetensors, not {path.name}")
    tensors = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    text = json.dumps(config, sort_keys=True, default=str)
    payload = save(tensors, {"config": text, "sha256": _digest(tensors, text)})
    with atomic_write(path) as file:
        file.write(payload)
    write_json(path.with_suffix(".json"), config)


def _digest(tensors: dict[str, Tensor], config: str) -> str:
    digest = hashlib.sha256(config.encode())
    for key in sorted(tensors):
        value = tensors[key]
        digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().tobytes() if value.numel() else b"")
    return digest.hexdigest()


def load_weights(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """The tensors and the config that `save_weights` wrote; older files have the config in the JSON file beside them.

    Raises UserError for missing and damaged files.
    """
    from safetensors import safe_open

    path = Path(path)
    if not path.is_file():
        raise UserError(f"no weights at {path}")
    refuse_web_page(path)
    try:
        with safe_open(path, "pt") as file:
            facts = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 it is no dict
    except Exception as error:  # SafetensorError, and what a lying header does to PyTorch
        raise UserError(f"{path} is damaged or is no safetensors file ({str(error)[:80]})") from error
    text = facts.get("config")
    if text is not None and facts.get("sha256") != _digest(tensors, text):
        raise UserError(f"{path} is damaged: its content does not have the digest that was written with it")
    try:
        config = json.loads(text) if text is not None else read_json(path.with_suffix(".json"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: its config is not JSON") from error
    if not isinstance(config, dict):
        raise UserError(f"{path.with_suffix('.json')} does not hold a config")
    return tensors, config


def load_into(module: torch.nn.Module, tensors: dict[str, Tensor], source: str | Path) -> None:
    """`module.load_state_dict(tensors)`, strictly. Raises UserError in one line for entries that are missing, unknown,
    no tensors, of another shape or kind of number (float, whole, complex, bool), or not finite.
    """
    expected = module.state_dict()
    if not isinstance(tensors, dict):
        raise UserError(f"{source} holds no weights")
    common = [key for key in expected if key in tensors]
    plain = [key for key in common if isinstance(tensors[key], Tensor)]
    problems = {
        "missing": [key for key in expected if key not in tensors],
        "unknown": [str(key) for key in tensors if key not in expected],
        "no tensor": [key for key in common if key not in plain],
        "other shape": [
            f"{key} is {tuple(tensors[key].shape)}, expected {tuple(expected[key].shape)}"
            for key in plain
            if tensors[key].shape != expected[key].shape
        ],
        "other kind of number": [key for key in plain if _kind(tensors[key]) != _kind(expected[key])],
        "not finite": [key for key in plain if not bool(torch.isfinite(tensors[key]).all())],
    }
    found = [
        f"{what}: {', '.join(items[:3])}{' ...' if len(items) > 3 else ''}" for what, items in problems.items() if items
    ]
    if found:
        raise UserError(f"{source} does not fit this model ({'; '.join(found)}); check the configuration")
    module.load_state_dict(tensors)


def _kind(value: Tensor) -> str:
    if value.is_floating_point():
        return "float"
    return "complex" if value.is_complex() else "bool" if value.dtype == torch.bool else "whole"


def load_optimizer(
    optimizer: torch.optim.Optimizer, state: dict[str, Any], source: str | Path, own_settings: bool = True
) -> None:
    """Give `optimizer` a saved state, whatever device that was made on. Raises UserError when it does not fit.

    With `own_settings` the learning rate and the other settings stay those that the optimiser was made with.
    """
    settings = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    try:
        optimizer.load_state_dict(state)
        for group, own in zip(optimizer.param_groups, settings, strict=True):
            group.update(own if own_settings else {key: own[key] for key in ("fused", "foreach") if key in own})
            for parameter in group["params"]:
                _fit(optimizer.state.get(parameter, {}), parameter, group)
    except (KeyError, TypeError, ValueError, AttributeError, RuntimeError, IndexError) as error:
        reason = str(error).split("\n")[0][:80]
        raise UserError(f"the optimiser's state in {source} does not fit or is damaged ({reason})") from error


def _fit(state: dict[str, Any], parameter: Tensor, group: dict[str, Any]) -> None:
    """Check one parameter's moments, and put its step counter where the optimiser's kernel reads it."""
    for name, value in state.items():
        if name == "step":
            value = torch.as_tensor(value, dtype=torch.float32)
        elif isinstance(value, Tensor) and value.shape != parameter.shape:
            raise ValueError(f"{name} is {tuple(value.shape)}, the weight {tuple(parameter.shape)}")
        if isinstance(value, Tensor) and not bool(torch.isfinite(value).all()):
            raise ValueError(f"{name} is not finite")
        if name == "step":
            state[name] = value.to(parameter.device if group.get("fused") or group.get("capturable") else "cpu")


def prune(folder: str | Path, pattern: str, keep: int) -> list[Path]:
    """Remove all but the `keep` files with the highest last number in their names; returns what was removed."""
    if keep < 1:
        raise ValueError("keep at least one file")

    def number(path: Path) -> int:
        found = re.findall(r"\d+", path.stem)
        return int(found[-1]) if found else -1

    files = sorted(Path(folder).glob(pattern), key=lambda path: (number(path), path.name))
    removed = files[:-keep]
    for path in removed:
        path.unlink()
    return removed
