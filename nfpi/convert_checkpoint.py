r"""Turn a published NFPI checkpoint (PyTorch Lightning, `epoch=E-step=S.ckpt`) into this repository's weights file.

    python nfpi/convert_checkpoint.py "epoch=499-step=49000.ckpt" converted/flow.safetensors
    python nfpi/main.py --config-path=___configs/cifar10 --config-name=mean train_nf=0 \
        nf_load_path=converted/flow.safetensors

Writes the EMA weights (the online ones when the average was never started, or with --online), the class Gaussians, and
the architecture, read from the tensors' shapes, in a .json beside it. Nothing in the file is executed: Lightning's
pickled configuration objects are not loaded.
"""

import pickle
import re
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

if __name__ == "__main__":
    sys.path[0:1] = [str(Path(__file__).resolve().parents[1])]
    import common.start  # noqa: F401

import torch
from pydantic import Field, StringConstraints
from torch import Tensor

from common.checkpoint import check_archive, load_into, save_weights
from common.errors import UserError, run_command
from common.options import Options, Says, from_flags, option
from common.unpickle import TENSORS, Unpickler
from nfpi.gaussians import ClassGaussians
from nfpi.layers import CONV_TYPES, FULL_RANK_LIMIT, ConvType
from nfpi.model import FlowConfig, MultiScaleFlow

GAUSSIANS = ("mu_arr", "cov_lower_arr", "scale_tril_arr")
CONSTANT = ("level_out_shape_arr", "l_mask", "u_mask", "identity")  # buffers that follow from the architecture


class _Inert:
    """Stands for any object of a foreign package in the file: it keeps the plain state that pickle gives."""

    def __init__(self, *_, **__):
        self.state: Any = None

    def __setstate__(self, state):
        self.state = state

    def __setitem__(self, key, value):
        pass

    def append(self, item):
        """Lists of foreign objects are dropped."""

    def extend(self, items):
        """Lists of foreign objects are dropped."""


NAMES = {
    **TENSORS,
    ("torch._utils", "_rebuild_parameter"): lambda data, requires_grad, hooks: data,
    ("torch", "Size"): tuple,
}


def _stand_in(module: str, name: str) -> Any:
    """The type of a storage by its name; every other object of the file becomes inert."""
    return name if module in ("torch", "torch.storage") and name.endswith("Storage") else _Inert


class _TensorsOnly(Unpickler):
    """Rebuilds tensors and plain containers; every other class becomes an inert object."""

    def __init__(self, file, size: int, storages: Callable[[str], bytes]):
        super().__init__(file, size, NAMES, _stand_in)
        self.storages = storages

    def persistent_load(self, saved):
        _, storage_type, key, _, count = saved
        dtypes = {
            "FloatStorage": torch.float32,
            "DoubleStorage": torch.float64,
            "HalfStorage": torch.float16,
            "BFloat16Storage": torch.bfloat16,
            "LongStorage": torch.int64,
            "IntStorage": torch.int32,
            "ByteStorage": torch.uint8,
            "BoolStorage": torch.bool,
        }
        if storage_type not in dtypes:
            raise pickle.UnpicklingError(f"unexpected storage {storage_type}")
        data = self.storages(key)
        flat = torch.frombuffer(bytearray(data), dtype=dtypes[storage_type]) if count else torch.empty(0)
        if flat.numel() < count:
            raise pickle.UnpicklingError(f"storage {key} is truncated")
        return flat


def option_of(content: Any, name: str) -> Any:
    """The number under hyper_parameters.cfg.<name>, where the configuration was pickled as plain or hydra's mapping."""
    value = content
    for key in ("hyper_parameters", "cfg", name):
        if isinstance(value, _Inert) and isinstance(value.state, dict):  # hydra keeps the entries in _content
            value = value.state.get("_content")
        value = value.get(key) if isinstance(value, dict) else None
    if isinstance(value, _Inert) and isinstance(value.state, dict):
        value = value.state.get("_val")
    return value if isinstance(value, int) and not isinstance(value, bool) else None


def read_state_dict(path: str | Path) -> dict[str, Tensor]:
    """The tensors under `state_dict` of a Lightning checkpoint; see `read_checkpoint`."""
    return read_checkpoint(path)[0]


def read_checkpoint(path: str | Path) -> tuple[dict[str, Tensor], int | None]:
    """The tensors under `state_dict` of a Lightning checkpoint, and the bits of its configuration (None: it does not
    say), without running anything that the file names. Raises UserError for a missing, damaged or foreign file.
    """
    path = Path(path)
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}")
    try:
        check_archive(path)
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            root = next(name for name in names if name.endswith("/data.pkl")).removesuffix("data.pkl")
            size = archive.getinfo(f"{root}data.pkl").file_size
            with archive.open(f"{root}data.pkl") as file:
                content = _TensorsOnly(file, size, lambda key: archive.read(f"{root}data/{key}")).load()
    except UserError:
        raise
    except Exception as error:  # a damaged archive or pickle raises nearly every type
        raise UserError(f"{path} is damaged or is no PyTorch checkpoint ({str(error)[:80]})") from error
    state = content.get("state_dict") if isinstance(content, dict) else None
    if not isinstance(state, dict):
        raise UserError(f"{path} has no 'state_dict': it is no checkpoint of the published NFPI code")
    return {str(key): value for key, value in state.items() if isinstance(value, Tensor)}, option_of(content, "bits")


def under(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries below `prefix`, without it (nor the mark that torch.compile leaves in names)."""
    return {k.removeprefix(prefix).removeprefix("_orig_mod."): v for k, v in state.items() if k.startswith(prefix)}


def flow_tensors(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The flow's own parameters: without class Gaussians and without buffers that the architecture implies."""
    return {k: v for k, v in state.items() if k.split(".")[0] not in GAUSSIANS and k.rsplit(".", 1)[-1] not in CONSTANT}


def class_gaussians(state: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """Means and variances (K, d) of `mu_arr.<k>`, `cov_lower_arr.<k>`."""
    classes = sum(key.startswith("mu_arr.") for key in state)
    if not classes:
        raise UserError("the checkpoint holds no class Gaussians (mu_arr)")
    try:
        return tuple(torch.stack([state[f"{name}.{k}"] for k in range(classes)]) for name in GAUSSIANS[:2])
    except (KeyError, RuntimeError) as error:
        raise UserError(f"the checkpoint's class Gaussians are incomplete ({error})") from error


def infer_config(state: dict[str, Tensor]) -> FlowConfig:
    """The architecture of a flow's tensors. Raises UserError when they are no flow's."""
    try:
        first = state["blocks.0.0.actnorm.scale"].shape
        levels = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))
        flows, blocks, hidden = [], [], []
        for level in range(levels):
            steps = {int(m[1]) for key in state if (m := re.match(rf"blocks\.{level}\.(\d+)\.", key))}
            net = f"blocks.{level}.0.couplinglayer.net.layers."
            flows.append(1 + max(steps))
            blocks.append(max(int(key[len(net) :].split(".")[0]) for key in state if key.startswith(net)))
            hidden.append(len(state[f"{net}0.conv.weight"]))
        channels = first[0]
        n, out = channels // 2, len(state["blocks.0.0.couplinglayer.net.out_layer.weight"])
    except (KeyError, ValueError) as error:
        raise UserError(f"the file holds no flow of the NFPI layout (missing {error})") from error
    conv_type = _conv_type(state)
    groups = 2 * 3 + 1 if n > FULL_RANK_LIMIT else n + 1
    flow_type = "matrixexp" if out == groups * n else "affine"
    if "blocks.0.0.couplinglayer.scale" not in state:
        flow_type = "additive"
    elif n == 1 and out == 2 * n:
        raise UserError("affine and matrixexp couplings of one channel have the same shapes; name the type yourself")
    splits = len({key.split(".")[1] for key in state if key.startswith("split_coupling_priors.")})
    config = {
        "channels": channels // 4,
        "height": 2 * first[1],
        "width": 2 * first[2],
        "flows": flows,
        "blocks": blocks,
        "hidden": hidden,
        "conv_type": conv_type,
        "flow_type": flow_type,
        "level_idx": splits + 1,
        "attention": any("attention_block_after" in key for key in state),
    }
    if splits == 0:
        return FlowConfig(**config, level_method="all_levels")
    spcb = FlowConfig(**config, level_method="spcb")
    shapes = state.get("level_out_shape_arr")
    if splits == levels - 1 and (shapes is None or tuple(shapes[-1].tolist()) == spcb.latent_shape):
        return spcb
    return FlowConfig(**config, level_method="all_levels_idx")


def _conv_type(state: dict[str, Tensor]) -> str:
    """A decomposition has factors. An orthogonal-like W and its logarithm differ: a logarithm of a rotation is nearly
    skew-symmetric, so the trace is small against the norm and W + W^T vanishes at the start of training.
    """
    if "blocks.0.0.conv1x1.l" in state:
        return CONV_TYPES[2]
    weights = [v.double() for k, v in state.items() if k.endswith("conv1x1.weight")]
    skew = sum(float((w + w.T).norm() / w.norm()) for w in weights)
    rotation = sum(float((w @ w.T - torch.eye(len(w))).norm() / len(w) ** 0.5) for w in weights)
    return CONV_TYPES[0] if skew <= rotation else CONV_TYPES[1]


def convert(
    source: str | Path, target: str | Path, online: bool = False, conv_type: str | None = None, bits: int | None = None,
    pixel_noise: float = 0.0,
) -> dict[str, Any]:  # fmt: skip
    """Read `source`, check that its tensors fit the architecture they imply, write `target` (.safetensors, .json).

    `bits`: of a grey level, where the file does not say (8, as in every published configuration). `pixel_noise`:
    range of the uniform noise that training images got, for Bayes' rule on clean images. Returns what is written about
    the model. Raises UserError where both say, and differ.
    """
    state, told = read_checkpoint(source)
    flow = under(state, "flow.")
    if not flow:
        raise UserError(f"{source} has no 'flow.*' tensors: it is no checkpoint of the published NFPI code")
    if told is not None and (bits not in (None, told) or not 1 <= told <= 8):
        raise UserError(f"--bits {bits}: {source} says {told}; leave --bits out")
    averaged = bool(state.get("ema.initted", torch.tensor(False)))
    weights = under(state, "ema.ema_model.") if averaged and not online else flow
    config = infer_config(weights)
    if conv_type:
        config = FlowConfig(**{**config.as_dict(), "conv_type": conv_type})
    tensors = flow_tensors(weights)
    load_into(MultiScaleFlow(config), tensors, source)
    mean, var = class_gaussians(flow)  # the online Gaussians go with the averaged weights
    empty = torch.empty(len(mean), config.latent_dim)
    load_into(ClassGaussians(empty, empty), {"mean": mean, "var": var}, source)
    named = {f"flow.{k}": v.float() for k, v in tensors.items()}
    facts = {"flow": config.as_dict(), "shared": False, "bits": told or bits or 8, "pixel_noise": pixel_noise,
             "source": Path(source).name, "averaged": averaged and not online}  # fmt: skip
    save_weights(target, {**named, "gaussians.mean": mean.float(), "gaussians.var": var.float()}, facts)
    return {**facts, "bits_known": told is not None or bits is not None}


Target = Annotated[str, StringConstraints(pattern=r"\.safetensors$"), Says("a name that ends in .safetensors")]


class Config(Options):
    """The options."""

    source: str = option(..., "Lightning checkpoint (.ckpt)")
    target: Target = option(..., "file to write")
    online: bool = option(False, "take the online weights, not the moving average")
    conv_type: ConvType | None = option(None, "of the 1x1 convolutions, when it cannot be inferred")
    bits: Annotated[int, Field(ge=1, le=8)] | None = option(None, "of a grey level, where the file does not say")
    pixel_noise: Annotated[float, Field(ge=0, le=1)] = option(0.0, "noise on the training images (MNIST's flows: 0.05)")
    dry_run: bool = option(False, "check the options and leave")


def main(argv: list[str] | None = None) -> None:
    """The command."""
    args, _ = from_flags(Config, sys.argv[1:] if argv is None else argv, __doc__, positional=("source", "target"))
    if args.dry_run:
        print(args.model_dump_json(indent=2))
        return
    facts = convert(args.source, args.target, args.online, args.conv_type, args.bits, args.pixel_noise)
    if not facts.pop("bits_known"):
        print(f"{args.source} does not say how many bits a grey level has: 8 is taken; --bits says otherwise")
    print(f"wrote {args.target}: {facts}")


if __name__ == "__main__":
    sys.exit(run_command(main))
