"""An experiment's folder: its saved configuration, checkpoints, latents, text log, and folders of images.

    config.json                               the configuration; older and published ones: log/cfg-<k>-<epoch>.json
    models/weights-<E>.cp, last.cp, best.cp   full states; the published {epoch, iter, loss_eval, gen, enc} is read too
    models/best.safetensors, best.json        weights of the best epoch alone, and the configuration
    latents-last.npz, latents.npz             training codes of the last and of the best epoch, packed bits
    log/train-log-<k>.txt                     one line a batch, in the published format
Published pickles (latents*.pk) are read by an unpickler that knows arrays and nothing else.
"""

import itertools
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.checkpoint import (
    append_text,
    atomic_write,
    load_into,
    load_state,
    load_tensors,
    load_weights,
    read_json,
    save_weights,
    write_json,
)
from common.datasets.readers import read_npz
from common.errors import UserError
from common.unpickle import ARRAYS, read_pickle
from lbae.model import LBAE

KIND = "lbae"
LATENTS_ANEW = "training writes it (go on with a larger epochs_max); gen alone does without it by latents=refresh"
OWN_FILES = re.compile(
    r"models/((weights-)?\d+|last|best|crash)\.cp|models/best\.(safetensors|json)|latents(-last|-eval|-train)?\.npz"
)


# ---- configuration


def newest_config(folder: Path) -> tuple[dict[str, Any], Path]:
    """The saved configuration of an experiment ({} when it has none) and its file: config.json, else the
    log/cfg-<k>-<epoch>.json with the highest k. Raises UserError for a damaged file.
    """
    path = folder / "config.json"
    if not path.is_file():
        found = [(int(match[1]), path) for path in (folder / "log").glob("cfg-*.json")
                 if (match := re.match(r"cfg-(\d+)", path.name))]  # fmt: skip
        path = max(found, default=(0, path))[1]
    if not path.is_file():
        return {}, path
    config = read_json(path)
    if not isinstance(config, dict):
        raise UserError(f"{path} does not hold a configuration; restore or delete it")
    return config, path


def is_experiment(folder: Path) -> bool:
    """Whether a folder has what training leaves behind."""
    return (folder / "models").is_dir() and ((folder / "log").is_dir() or (folder / "config.json").is_file())


def own_files(folder: Path) -> list[Path]:
    """The checkpoints, weights and latents of an experiment."""
    found = [*(folder / "models").glob("*"), *folder.glob("latents*.npz")]
    return [path for path in found if OWN_FILES.fullmatch(path.relative_to(folder).as_posix())]


# ---- checkpoints


def checkpoint_path(folder: Path, reload: int | str | None) -> Path:
    """models/last.cp, models/weights-<E>.cp for `reload` = E >= 0, or the best epoch's models/best.cp (where that is
    missing, best.safetensors) for "best".
    """
    models = folder / "models"
    if reload == "best":
        alone = not (models / "best.cp").is_file() and (models / "best.safetensors").is_file()
        return models / ("best.safetensors" if alone else "best.cp")
    return models / ("last.cp" if reload is None or reload < 0 else f"weights-{reload}.cp")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The state in a checkpoint of ours or of the published code, or in best.safetensors: at least epoch, iter,
    loss_eval, enc, gen.

    Raises UserError when the file is missing, truncated or foreign.
    """
    if not path.is_file():
        others = sorted(one.name for one in path.parent.glob("*.cp"))
        raise UserError(f"no checkpoint at {path}" + (f"; there are {', '.join(others)}" if others else ""))
    if path.suffix == ".safetensors":
        tensors, config = load_weights(path)
        state = {**split_nets(tensors), "config": config, "epoch": config.get("epoch")}
        state |= {"loss_eval": config.get("loss_eval"), "iter": config.get("iter", 0)}
        state["attribute_names"] = config.get("attribute_names", [])
    else:
        state = load_tensors(path)
        if not (isinstance(state, dict) and {"epoch", "enc", "gen"} <= state.keys()):
            state = load_state(path, KIND)
    state = {
        "iter": 0,
        "loss_eval": None,
        "best": state.get("loss_eval"),
        "batch": 0,
        "codes": [],
        "labels": [],
        **state,
    }
    numbers = all(isinstance(state.get(key), int) for key in ("epoch", "iter", "batch"))
    losses = all(state[key] is None or isinstance(state[key], (int, float)) for key in ("loss_eval", "best"))
    lists = all(isinstance(state[key], list) and all(isinstance(v, Tensor) for v in state[key])
                for key in ("codes", "labels"))  # fmt: skip
    nets = all(isinstance(state.get(part), dict) for part in ("enc", "gen"))
    place, config = state.get("place", {}), state.get("config", {})
    places = isinstance(place, dict) and all(isinstance(value, int) and value >= 0 for value in place.values())
    places &= not place or place.keys() == {"step", "epoch", "images"}
    if not (numbers and losses and lists and nets and places and isinstance(config, dict)):
        raise UserError(f"{path} is damaged: its entries are not those of an LBAE checkpoint; use an older one")
    for part in ("enc", "gen"):  # DataParallel's names
        state[part] = {str(key).removeprefix("module."): value for key, value in state[part].items()}
    return state


def split_nets(tensors: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """{"enc": ..., "gen": ...} of tensors named enc.<name>, gen.<name>."""
    return {
        part: {key.removeprefix(f"{part}."): value for key, value in tensors.items() if key.startswith(f"{part}.")}
        for part in ("enc", "gen")
    }


def join_nets(state: Mapping[str, Any]) -> dict[str, Tensor]:
    """The inverse of `split_nets`, of a checkpoint's state."""
    return {f"{part}.{key}": value for part in ("enc", "gen") for key, value in state[part].items()}


def load_nets(model: LBAE, state: Mapping[str, Any], source: Path) -> None:
    """Put the weights of a checkpoint into the model, strictly. Raises UserError naming what does not fit."""
    for part in ("enc", "gen"):
        load_into(getattr(model, part), state[part], f"{source} ({part})")


def name_checkpoint(numbered: Path, state: Mapping[str, Any], improved: bool, keep: int) -> None:
    """Give the finished models/weights-<epoch>.cp of `state` the name last.cp, and best.cp when improved (with
    best.safetensors); all but `keep` of the weights-*.cp up to this epoch are removed.
    """
    models = numbered.parent
    if improved:
        _alias(numbered, models / "best.cp")
        facts = {key: state[key] for key in ("epoch", "iter", "loss_eval", "attribute_names")}
        save_weights(models / "best.safetensors", join_nets(state), {**state["config"], **facts})
    _alias(numbered, models / "last.cp")
    # later epochs of a run that was taken up again at an earlier one are left alone
    epochs = [int(path.stem.split("-")[1]) for path in models.glob("weights-*.cp") if path.stem[8:].isdigit()]
    for epoch in sorted(one for one in epochs if one <= state["epoch"])[:-keep]:
        (models / f"weights-{epoch}.cp").unlink()


def _alias(source: Path, name: Path) -> None:
    """A second name for a finished file, replaced in one step; a hard link where the file system has them."""
    temporary = name.with_name(f".{name.name}.tmp")
    temporary.unlink(missing_ok=True)
    try:
        os.link(source, temporary)
    except OSError:
        with atomic_write(temporary) as file:
            file.write(source.read_bytes())
    os.replace(temporary, name)


# ---- latents


def pack_bits(codes: Tensor) -> Tensor:
    """Codes (N, D) in {-1, +1} -> uint8 (N, ceil(D / 8)), on their device; the order of numpy.packbits."""
    bits = torch.nn.functional.pad(codes > 0, (0, -codes.shape[1] % 8)).view(len(codes), -1, 8)
    powers = 2 ** torch.arange(7, -1, -1, dtype=torch.uint8, device=codes.device)
    return (bits * powers).sum(-1, dtype=torch.uint8)


def unpack_bits(packed: Tensor, zsize: int) -> Tensor:
    """The inverse of `pack_bits`: int8 (N, zsize) in {-1, +1}."""
    bits = torch.from_numpy(np.unpackbits(packed.cpu().numpy(), axis=1, count=zsize))
    return bits.to(torch.int8) * 2 - 1


@dataclass
class Latents:
    """Codes of a data set: bits int8 (N, D) in {-1, +1}, or float32 for a VAE; labels int64 (N, 1 or A); origin."""

    codes: Tensor
    labels: Tensor
    epoch: int = -1  # of the weights that made them
    iter: int = -1  # images seen by then
    source: str = ""  # "training pass" (weights changed meanwhile) or "evaluation pass"

    def save(self, path: Path) -> None:
        """Write an .npz atomically; bits take one bit each."""
        binary = self.codes.dtype == torch.int8
        codes = pack_bits(self.codes) if binary else self.codes
        with atomic_write(path) as file:
            np.savez(
                file, codes=codes.cpu().numpy(), binary=binary, zsize=self.codes.shape[1],
                labels=self.labels.cpu().numpy(), epoch=self.epoch, iter=self.iter, source=self.source,
            )  # fmt: skip

    @classmethod
    def load(cls, path: Path) -> "Latents":
        """Read our .npz, or the published pickle of the same stem. Raises UserError for a missing or damaged file."""
        if not path.is_file():
            pickled = path.with_suffix(".pk")
            if pickled.is_file():
                return cls._from_pickle(pickled)
            raise UserError(f"no latents at {path}; {LATENTS_ANEW}")
        try:
            file = read_npz(path)
            codes = torch.from_numpy(file["codes"])
            codes = unpack_bits(codes, int(file["zsize"])) if bool(file["binary"]) else codes
            labels = torch.from_numpy(file["labels"])
            if codes.ndim != 2 or len(codes) != len(labels):
                raise ValueError("as many codes as labels are expected")
            return cls(codes, labels, int(file["epoch"]), int(file["iter"]), str(file["source"]))
        except Exception as error:  # a damaged file: zipfile, zlib, struct, EOF, key or value errors
            raise UserError(f"{path} is damaged or holds no latents; {LATENTS_ANEW}") from error

    @classmethod
    def _from_pickle(cls, path: Path) -> "Latents":
        value = read_pickle(path, ARRAYS)
        if not isinstance(value, (list, tuple)) or len(value) != 2 or not all(isinstance(v, np.ndarray) for v in value):
            raise UserError(f"{path} does not hold a list of 2 arrays")
        codes, labels = (torch.from_numpy(np.asarray(part)) for part in value)
        if codes.ndim != 2 or len(codes) != len(labels):
            raise UserError(
                f"{path}: expected codes (N, D) and labels (N, A), got {tuple(codes.shape)} and {tuple(labels.shape)}"
            )
        if bool((codes.abs() == 1).all()):
            codes = codes.to(torch.int8)
        return cls(codes, labels.reshape(len(codes), -1).long(), source="published pickle")


# ---- the published text log


class TextLog:
    """log/<prefix>-log-<k>.txt with the first free k: a line a record; `enabled=False` (other ranks) writes nothing."""

    def __init__(self, folder: Path, prefix: str, enabled: bool = True):
        self.path: Path | None = None
        self.columns: list[str] = []
        self.start = time.perf_counter()
        if enabled:
            logs = folder / "log"
            try:
                logs.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                raise UserError(f"cannot make the folder {logs}: {error.strerror}") from error
            names = (logs / f"{prefix}-log-{k}.txt" for k in itertools.count())
            self.path = next(path for path in names if not path.exists())
            append_text(self.path, "")

    def record(self, epoch: int, iter: int, stage: str, scalars: Mapping[str, float]) -> None:
        """One record of `stage` (Train or Eval); `iter` counts training images."""
        if self.path is None:
            return
        text, new = "", [name for name in scalars if name not in self.columns]
        if new:
            self.columns += new
            text = f"\nts epoch iter stage {' '.join(self.columns)}\n"
        values = " ".join(str(scalars.get(name, 0)) for name in self.columns)
        append_text(self.path, f"{text}{time.perf_counter() - self.start:.3f} {epoch} {iter} {stage} {values}\n")


# ---- folders of images


def reference_folder(folder: Path, dataset: str, crop: int = 0, split: str = "eval") -> Path:
    """Where the images of a data set lie as the network sees them: beside the experiment."""
    return folder.resolve().parent / (f"{dataset}_{crop}_{split}" if crop else f"{dataset}_{split}")


MANIFEST = "written.json"


def manifest(folder: Path) -> dict[str, Any]:
    """What this program noted beside images that it wrote, {} where it wrote none: `images`, their number, `formats`,
    and, of reference images, what they show. Older versions noted only the latter, in reference.json.
    """
    path = next((path for name in (MANIFEST, "reference.json") if (path := folder / name).is_file()), None)
    if path is None:
        return {}
    note = read_json(path)
    if not isinstance(note, dict) or not isinstance(note.get("images"), int):
        raise UserError(f"{path} is damaged; delete it together with the images beside it")
    return note


def written(folder: Path) -> set[str]:
    """The names of the images in a folder that this program wrote.

    Older versions left no note in `reco` and `generated`, whose images were numbered without gaps.
    """
    if note := manifest(folder):
        formats = note.get("formats") or [note.get("format", "png")]
        return {f"{i}.{fmt}" for i in range(note["images"]) for fmt in formats}
    if folder.name == "reco" or folder.parent.name == "generated":
        found = set(_pictures(folder))
        for fmt in ("png", "jpg"):
            if found and found == {f"{i}.{fmt}" for i in range(len(found))}:
                return found
    return set()


def _pictures(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir() if path.suffix in (".png", ".jpg")] if folder.is_dir() else []


def check_images(folder: Path) -> None:
    """Refuse a folder with pictures that this program did not write, as they would be scored together with its own, and
    one whose place a file has.
    """
    if file := next((one for one in (folder, *folder.parents) if one.is_file()), None):
        raise UserError(f"{file} is a file, where the folder {folder} has to be: move it away")
    foreign = sorted(set(_pictures(folder)) - written(folder))
    if foreign:
        raise UserError(
            f"{folder} holds {len(foreign)} picture(s) that were not written here ({foreign[0]}, ...): move them away"
        )


def _runs(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return True


@contextmanager
def new_images(folder: Path, fmt: str, facts: Mapping[str, Any] | None = None) -> Iterator[Path]:
    """A temporary folder whose images 0.<fmt>, 1.<fmt>, ... replace those of `folder` when the block ends well; `facts`
    are noted beside them.

    Removed are only images that an earlier call wrote; when the block fails, the old ones stay. Raises UserError before
    the block where `folder` holds pictures of others.
    """
    check_images(folder)
    for left in folder.parent.glob(f".{folder.name}.*.new"):  # of a process that was killed
        if not _runs(left.name.split(".")[-2].split("-")[0]):
            shutil.rmtree(left, ignore_errors=True)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        place = Path(tempfile.mkdtemp(prefix=f".{folder.name}.{os.getpid()}-", suffix=".new", dir=folder.parent))
    except OSError as error:
        raise UserError(f"cannot write in {folder.parent}: {error.strerror}") from error
    try:
        yield place
        names, old = {path.name for path in place.iterdir()}, written(folder)
        folder.mkdir(exist_ok=True)
        # both lists while files move, so that a kill in between leaves nothing that the next call would not know
        formats = sorted({fmt, *(Path(name).suffix[1:] for name in old)})
        write_json(folder / MANIFEST, {"images": max(len(names), len(old)), "formats": formats})
        for name in names:
            os.replace(place / name, folder / name)
        for name in old - names:
            (folder / name).unlink(missing_ok=True)
        write_json(folder / MANIFEST, {**(facts or {}), "images": len(names), "formats": [fmt]})
        (folder / "reference.json").unlink(missing_ok=True)
    finally:
        shutil.rmtree(place, ignore_errors=True)
