"""Ship a trained model as one small file, and make an experiment of it again.

    python -m lbae.release pack lbae/<experiment> checkpoints/lbae/<name>.safetensors
    python -m lbae.release unpack checkpoints/lbae/<name>.safetensors lbae/exp
    cd lbae/exp && ../../eval.sh

The file holds both nets and the packed training codes with their labels (what cov, int and set_attr sample from); the
JSON file beside it holds the configuration, the epoch and the test loss.
"""

import argparse
import sys
from pathlib import Path

import torch

from common.checkpoint import load_weights, save_state, save_weights, write_json
from common.errors import UserError, run_command
from lbae.describe import newest_config
from lbae.experiment import KIND, Latents, pack_bits, read_checkpoint, unpack_bits
from lbae.parameters import MODEL, TRAINING, keys_of


def pack(folder: Path, target: Path) -> None:
    """Write models/last.cp and latents-last of an experiment as `target` (.safetensors) and its .json."""
    state, latents = read_checkpoint(folder / "models" / "last.cp"), Latents.load(folder / "latents-last.npz")
    if latents.iter >= 0 and latents.iter != state["iter"]:
        raise UserError(
            f"{folder}: the latents are of epoch {latents.epoch}, the weights of another state; finish an epoch"
        )
    if latents.codes.dtype != torch.int8:
        raise UserError(f"{folder} is no binary model; only bits are packed")
    tensors = {f"{part}.{key}": value for part in ("enc", "gen") for key, value in state[part].items()}
    labels = latents.labels.to(torch.uint8)
    if not torch.equal(labels.long(), latents.labels):
        raise UserError(f"{folder}: labels beyond 0..255 cannot be packed")
    tensors |= {"latents.codes": pack_bits(latents.codes), "latents.labels": labels}
    facts = {key: state[key] for key in ("epoch", "iter", "loss_eval")}
    kept = keys_of(MODEL, TRAINING) - {"data_root"}
    config = {key: value for key, value in newest_config(folder).items() if key in kept}
    save_weights(target, tensors, {**config, "release": facts})


def unpack(source: Path, folder: Path, renew: bool = False) -> None:
    """Make the experiment `folder` of a packed file; `renew` writes over an unpacked one.

    Raises UserError when the folder holds something (and not `renew`), or the file is another one.
    """
    if not renew and folder.exists() and any(folder.iterdir()):
        raise UserError(f"{folder} exists and is not empty; name another folder")
    tensors, config = load_weights(source)
    facts = config.pop("release", None)
    if facts is None or "latents.codes" not in tensors:
        raise UserError(f"{source} was not written by `python -m lbae.release pack`")
    nets = {
        part: {key.removeprefix(f"{part}."): value for key, value in tensors.items() if key.startswith(f"{part}.")}
        for part in ("enc", "gen")
    }
    save_state(folder / "models" / "last.cp", KIND, **facts, **nets, config=config)
    write_json(folder / "log" / "cfg-0-0.json", config)
    codes = unpack_bits(tensors["latents.codes"], config["zsize"])
    Latents(codes, tensors["latents.labels"].long(), facts["epoch"], facts["iter"], "training pass").save(
        folder / "latents-last.npz"
    )


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m lbae.release", description=__doc__.split("\n")[0])
    parser.add_argument("action", choices=("pack", "unpack"))
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    args = parser.parse_args(argv)
    (pack if args.action == "pack" else unpack)(args.source, args.target)


if __name__ == "__main__":
    sys.exit(run_command(main))
