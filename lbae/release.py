"""Ship a trained model as one small file, and make an experiment of it again.

    python -m lbae.release pack lbae/<experiment> checkpoints/lbae/<name>.safetensors
    python -m lbae.release unpack checkpoints/lbae/<name>.safetensors lbae/exp
    cd lbae/exp && ../../eval.sh

The file holds both nets and the packed training codes with their labels (what cov, int and set_attr sample from); the
JSON file beside it holds the configuration, the epoch and the test loss.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    sys.path[0:1] = [str(Path(__file__).resolve().parents[1])]
    import common.start  # noqa: F401

import torch

from common.checkpoint import load_weights, save_state, save_weights, write_json
from common.errors import UserError, run_command
from lbae.experiment import (
    KIND,
    Latents,
    join_nets,
    newest_config,
    own_files,
    pack_bits,
    read_checkpoint,
    split_nets,
    unpack_bits,
)
from lbae.options import from_saved, saved_keys


def pack(folder: Path, target: Path) -> None:
    """Write models/last.cp and latents-last of an experiment as `target` (.safetensors) and its .json."""
    if target.suffix != ".safetensors":
        raise UserError(f"{target}: name a file that ends with .safetensors")
    state, latents = read_checkpoint(folder / "models" / "last.cp"), Latents.load(folder / "latents-last.npz")
    if latents.iter >= 0 and latents.iter != state["iter"]:
        raise UserError(
            f"{folder}: the latents are of epoch {latents.epoch}, the weights of another state; finish an epoch"
        )
    if latents.codes.dtype != torch.int8:
        raise UserError(f"{folder} is no binary model; only bits are packed")
    labels = latents.labels.to(torch.uint8)
    if not torch.equal(labels.long(), latents.labels):
        raise UserError(f"{folder}: labels beyond 0..255 cannot be packed")
    tensors = {**join_nets(state), "latents.codes": pack_bits(latents.codes), "latents.labels": labels}
    facts = {key: state[key] for key in ("epoch", "iter", "loss_eval")}
    facts |= {key: state[key] for key in ("attribute_names",) if state.get(key)}
    config, source = newest_config(folder)
    kept = from_saved(config, saved_keys(resumes=True) - {"data_root", "wandb"}, source)
    save_weights(target, tensors, {**kept, "release": facts})


def unpack(source: Path, folder: Path, renew: bool = False) -> None:
    """Make the experiment `folder` of a packed file; `renew` writes over an unpacked one.

    Raises UserError when the folder holds something (and not `renew`), or the file is another one.
    """
    if not renew and folder.exists() and any(path.name[0] != "." for path in folder.iterdir()):
        raise UserError(f"{folder} exists and is not empty; name another folder")
    tensors, config = load_weights(source)
    facts = config.pop("release", None)
    if not isinstance(facts, dict) or not {"latents.codes", "latents.labels"} <= tensors.keys():
        raise UserError(f"{source} was not written by `python -m lbae.release pack`")
    for path in own_files(folder) if renew else ():
        path.unlink()
    save_state(folder / "models" / "last.cp", KIND, **facts, **split_nets(tensors), config=config)
    codes = unpack_bits(tensors["latents.codes"], config["zsize"])
    Latents(codes, tensors["latents.labels"].long(), facts["epoch"], facts["iter"], "training pass").save(
        folder / "latents-last.npz"
    )
    write_json(folder / "config.json", config)


def main(argv: list[str] | None = None) -> None:
    words = sys.argv[1:] if argv is None else argv
    if any(word in ("-h", "--help", "help") for word in words):
        print(__doc__)
        return
    if len(words) != 3 or words[0] not in ("pack", "unpack"):
        raise UserError("expected `pack EXPERIMENT FILE` or `unpack FILE EXPERIMENT`; see --help")
    (pack if words[0] == "pack" else unpack)(Path(words[1]), Path(words[2]))


if __name__ == "__main__":
    sys.exit(run_command(main))
