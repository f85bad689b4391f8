"""An experiment's folder: where it lies, its saved configuration, checkpoints and latents.

    models/weights-<E>.cp, last.cp, best.cp   full states; the published {epoch, iter, loss_eval, gen, enc} is read too
    models/best.safetensors, best.json        weights of the best epoch alone, and the configuration
    latents-last.npz, latents.npz             training codes of the last and of the best epoch, packed bits
    log/cfg-<k>-<start epoch>.json            configurations
Published pickles (latents*.pk) are read by an unpickler that knows arrays and nothing else.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from common.checkpoint import (
    atomic_write,
    load_into,
    load_state,
    load_tensors,
    read_json,
    save_state,
    save_weights,
    write_json,
)
from common.datasets.readers import read_npz
from common.errors import UserError
from common.released import released
from common.unpickle import ARRAYS, read_pickle
from lbae.describe import newest_config
from lbae.model import LBAE
from lbae.parameters import MODEL, TRAINING, Params, experiment_name, fields_of, from_saved, keys_of, parse

KIND = "lbae"
RELEASES = {"mnist_bae": "mnist_bae_w16"}  # what evaluation takes while there is no experiment of one's own


def resolve(configs: Mapping[str, Mapping[str, Any]], script: str | Path, argv: list[str]) -> tuple[Params, Path]:
    """The parameters of a command and its experiment folder.

    Defaults < the configuration `cfg` (the script's first one when not named) < what the experiment saved (the model
    when evaluating, the training too when resuming) < the command line. The folder is `exp=`; else the current one if
    it is an experiment; else `<folder of the script>/<name>`; where that is not there, an evaluation of MNIST takes the
    released model. Raises UserError for a configuration of another script.
    """
    given = parse(argv, Params)
    params = _build(configs, given, {})
    folder = Path(params.exp) if params.exp else _current_or_named(script, params)
    resumes = params.l or params.reload is not None
    if not (params.eval or resumes):
        return params, folder
    if not folder.is_dir():
        reason = f"no experiment at {folder}"
        if not params.eval or params.exp or params.reload is not None or params.cfg not in RELEASES:
            raise UserError(f"{reason}; train it first, or name one by exp=")
        folder = _released_experiment(RELEASES[params.cfg], folder, given, reason)
    saved = from_saved(newest_config(folder), (MODEL,) if params.eval else (MODEL, TRAINING))
    if {"cfg"} <= given.keys() & saved.keys() and given["cfg"] != saved["cfg"]:
        raise UserError(f"cfg={given['cfg']}, but {folder} holds a {saved['cfg']} experiment")
    return _build(configs, given, saved), folder


def _released_experiment(name: str, folder: Path, given: dict[str, Any], reason: str) -> Path:
    """The experiment `<folder>-released`, made of the weights that ship; says so in one line.

    Raises UserError when the command line asks for another network or other data than the release's.
    """
    from lbae.release import unpack  # it needs this module

    release = released("lbae", name)
    stored = read_json(release.path.with_suffix(".json"))
    elsewhere = {"data_root", "train_images", "test_images"}  # these say nothing about the weights
    asked = {key: value for key, value in given.items() if key in keys_of(MODEL) - elsewhere}
    release.refuse(asked, stored, reason)
    target = folder.with_name(f"{folder.name}-released")
    mark = target / "release.json"
    if not (mark.is_file() and read_json(mark).get("sha256") == release.sha256):
        unpack(release.path, target, renew=True)
        write_json(mark, {"release": release.name, "sha256": release.sha256})
    print(release.notice(reason), f"(files in {target})", flush=True)
    return target


def _build(configs: Mapping[str, Mapping[str, Any]], given: dict[str, Any], saved: dict[str, Any]) -> Params:
    name = given.get("cfg") or saved.get("cfg") or next(iter(configs))
    if name not in configs:
        raise UserError(f"cfg={name}: this script has {', '.join(configs)}; the name says which script to run")
    return Params(**{**configs[name], **saved, **given, "cfg": name})


def _current_or_named(script: str | Path, params: Params) -> Path:
    here, name = Path.cwd(), experiment_name(params)
    if here.name == name or is_experiment(here):
        return Path(".")
    return Path(script).resolve().parent / name


def is_experiment(folder: Path) -> bool:
    """Whether a folder has what training leaves behind."""
    return (folder / "models").is_dir() and (folder / "log").is_dir()


def reference_folder(folder: Path, dataset: str, crop: int = 0, split: str = "eval") -> Path:
    """Where the images of a data set lie as the network sees them: beside the experiment."""
    return folder.resolve().parent / (f"{dataset}_{crop}_{split}" if crop else f"{dataset}_{split}")


def build_model(params: Params) -> LBAE:
    """The network that the parameters describe, freshly initialised."""
    return LBAE(
        params.img_size, params.channels, params.zsize, params.width, params.vae, params.zround,
        params.dec_in_channels or None,
    )  # fmt: skip


def checkpoint_path(folder: Path, reload: int | None) -> Path:
    """models/last.cp, or models/weights-<E>.cp for `reload` = E >= 0."""
    return folder / "models" / ("last.cp" if reload is None or reload < 0 else f"weights-{reload}.cp")


def read_checkpoint(path: Path) -> dict[str, Any]:
    """The state in a checkpoint of ours or of the published code: at least epoch, iter, loss_eval, enc, gen.

    Raises UserError when the file is missing, truncated or foreign.
    """
    if not path.is_file():
        others = sorted(one.name for one in path.parent.glob("*.cp"))
        raise UserError(f"no checkpoint at {path}" + (f"; there are {', '.join(others)}" if others else ""))
    state = load_tensors(path)
    if not (isinstance(state, dict) and {"epoch", "enc", "gen"} <= state.keys()):
        state = load_state(path, KIND)
    return {"iter": 0, "loss_eval": None, **state}


def load_nets(model: LBAE, state: dict[str, Any], source: Path) -> None:
    """Put the weights of a checkpoint into the model, strictly. Raises UserError naming what does not fit."""
    for part in ("enc", "gen"):
        tensors = {key.removeprefix("module."): value for key, value in state[part].items()}
        load_into(getattr(model, part), tensors, f"{source} ({part})")


def write_checkpoints(folder: Path, state: dict[str, Any], improved: bool, keep: int) -> None:
    """models/weights-<epoch>.cp and last.cp, best.cp when improved; all but `keep` earlier weights-*.cp are removed."""
    models = folder / "models"
    numbered = models / f"weights-{state['epoch']}.cp"
    save_state(numbered, KIND, **state)
    _alias(numbered, models / "last.cp")
    if improved:
        _alias(numbered, models / "best.cp")
        tensors = {f"{part}.{key}": value for part in ("enc", "gen") for key, value in state[part].items()}
        facts = {"epoch": state["epoch"], "loss_eval": state["loss_eval"]}
        save_weights(models / "best.safetensors", tensors, {**state["config"], **facts})
    # later epochs of a run that was taken up again at an earlier one are left alone
    epochs = sorted(int(path.stem.split("-")[1]) for path in models.glob("weights-*.cp"))
    for epoch in [one for one in epochs if one <= state["epoch"]][:-keep]:
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


def pack_bits(codes: Tensor) -> Tensor:
    """Codes (N, D) in {-1, +1} -> uint8 (N, ceil(D / 8)), on their device; the order of numpy.packbits."""
    bits = torch.nn.functional.pad(codes > 0, (0, -codes.shape[1] % 8)).view(len(codes), -1, 8)
    powers = torch.tensor([128, 64, 32, 16, 8, 4, 2, 1], dtype=torch.uint8, device=codes.device)
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
            raise UserError(f"no latents at {path}; train first, or ask for latents=refresh")
        try:
            file = read_npz(path)
            codes = torch.from_numpy(file["codes"])
            codes = unpack_bits(codes, int(file["zsize"])) if bool(file["binary"]) else codes
            labels = torch.from_numpy(file["labels"])
            if codes.ndim != 2 or len(codes) != len(labels):
                raise ValueError("as many codes as labels are expected")
            return cls(codes, labels, int(file["epoch"]), int(file["iter"]), str(file["source"]))
        except (
            Exception
        ) as error:  # zipfile, zlib, struct, EOF, key and value errors: a damaged file raises any of them
            raise UserError(f"{path} is damaged or holds no latents; ask for latents=refresh") from error

    @classmethod
    def _from_pickle(cls, path: Path) -> "Latents":
        codes, labels = read_arrays_pickle(path, 2)
        codes = torch.from_numpy(np.asarray(codes))
        if codes.ndim != 2 or len(codes) != len(labels):
            raise UserError(
                f"{path}: expected codes (N, D) and labels (N, A), got {tuple(codes.shape)} and {labels.shape}"
            )
        if bool((codes.abs() == 1).all()):
            codes = codes.to(torch.int8)
        labels = torch.from_numpy(np.asarray(labels)).reshape(len(codes), -1).long()
        return cls(codes, labels, source="published pickle")


def read_arrays_pickle(path: Path, count: int) -> list[np.ndarray]:
    """A pickled list of `count` numpy arrays. Raises UserError for anything else; no code of the file is run."""
    value = read_pickle(path, ARRAYS)
    if not isinstance(value, (list, tuple)) or len(value) != count or not all(isinstance(v, np.ndarray) for v in value):
        raise UserError(f"{path} does not hold a list of {count} arrays")
    return list(value)


def differences(old: Mapping[str, Any], params: Params) -> list[str]:
    """Lines "key: old -> new" of the declared keys in which a saved configuration differs from the parameters."""
    return [
        f"{name}: {old[name]} -> {getattr(params, name)}"
        for name, one in fields_of(Params).items()
        if one.metadata["group"] in (MODEL, TRAINING) and name in old and old[name] != getattr(params, name)
    ]
