"""Trained models: those of a run folder, the released one, and the published checkpoint files."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from common.checkpoint import load_into, load_state, load_tensors, load_weights, read_json, write_json
from common.errors import UserError
from common.released import released
from latent_flow.data import SWEPT, open_source
from latent_flow.model import Config, LatentFlow

RELEASE, RELEASE_FOLDER = "mnist_supervised_d16", Path("runs/latent_flow/released")
WRITTEN = "written.json"
Run = tuple[dict[str, Tensor], dict[str, Any], dict[str, Any], int]


def read_run(path: str | Path) -> Run:
    """Weights, model configuration, options and iteration of a run folder (its final.pt, else its checkpoint.pt), of
    one of these files, of a .safetensors file of `latent_flow.release`, or of a published checkpoint.

    Raises UserError for anything else.
    """
    path = Path(path)
    if path.suffix == ".safetensors":
        tensors, stored = load_weights(path)
        if not {"model", "args", "iteration"} <= stored.keys():
            raise UserError(f"{path} was not written by `python -m latent_flow.release`")
        return tensors, stored["model"], stored["args"], stored["iteration"]
    if path.is_dir() or not path.exists():
        path = path / "final.pt" if (path / "final.pt").is_file() else path / "checkpoint.pt"
    state = load_tensors(path)
    if isinstance(state, dict) and {"iter", "vae", "support_sets", "prior"} <= state.keys():
        return published_run(state, path)
    kind = "latent_flow_weights" if isinstance(state, dict) and state.get("kind") == "latent_flow_weights" else None
    state = load_state(path, kind or "latent_flow")
    if not {"model", "config", "args"} <= state.keys() or not isinstance(state["args"], dict):
        raise UserError(f"{path} is no whole checkpoint of a run; use an older one")
    return state["model"], state["config"], state["args"], state.get("iteration", state["args"].get("max_iter", 0))


def published_run(state: Mapping[str, Any], path: Path) -> Run:
    """The same of a published checkpoint: {iter, support_sets, prior, vae[, reconstructor]}, state dicts all but one.

    Variant and sizes are read off the weights; the data set is the published one of that image size and K.
    """
    try:
        parts = {name: _plain_keys(state[name]) for name in ("vae", "support_sets", "prior", "reconstructor")
                 if name in state}  # fmt: skip
        vae, index = parts["vae"], parts.get("reconstructor", {})
        deep = "decoder.decoder.23.weight" in vae
        size = 16 * vae["encoder.encoder.16.weight"].shape[-1] if deep else \
            4 * vae["encoder.encoder.4.weight"].shape[-1]  # fmt: skip
        channels = vae["encoder.encoder.0.weight"].shape[1]
        flows = 1 + max(int(key.split(".")[1]) for key in parts["support_sets"] if key.startswith("MLP_SET."))
        steps = len(parts["prior"]["MLP_SET.0.sigma"])
        if deep:  # the published loop ends a step before the prior does
            steps = max(steps - 1, 1)
            parts["prior"] = {key: value[:steps] for key, value in parts["prior"].items()}
        config = {
            "variant": "supervised" if not index else "weakly" if "linear1.weight" in index else "unsupervised",
            "dataset": _published_data(size, channels, flows, deep),
            "flows": flows,
            "steps": steps,
            "channels": channels,
            "image_size": size,
            "latent_size": len(vae["encoder.linear_means.weight"]),
            "deep": deep,
            "index_width": len(index["encoder.0.weight"]) if index else 0,
            "single_control": "linear_y.weight" in index,
            "objective": "upstream",
        }
        iteration = int(state["iter"])
    except (KeyError, AttributeError, TypeError, ValueError, IndexError) as error:
        raise UserError(f"{path} looks like a published checkpoint, but {error} is missing or no tensor") from None
    tensors = {f"{part}.{key}": value for part, weights in parts.items() for key, value in weights.items()}
    return tensors, config, {"data_dir": None, "warp_centre": "upstream", "seed": 0}, iteration


def _plain_keys(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Without the prefix that `nn.DataParallel` adds."""
    return {key.removeprefix("module."): value for key, value in weights.items()}


def _published_data(size: int, channels: int, flows: int, deep: bool) -> str:
    if deep:
        return "isaac3d" if flows == 8 else "falcor3d"
    if size == 64:
        return "shapes3d" if channels == 3 else "dsprites"
    return "mnist"


def load_run(path: str | Path, device: torch.device) -> tuple[LatentFlow, dict[str, Any], int]:
    """Model, options and iteration of what `read_run` reads."""
    tensors, config, options, iteration = read_run(path)
    if not isinstance(config, dict):
        raise UserError(f"{path} holds no configuration of a model")
    model = LatentFlow(Config.build(config))
    load_into(model, tensors, path)
    return model.to(device).eval(), options, iteration


def need_flows(model: LatentFlow, source: str | Path) -> None:
    """Raise UserError for a baseline, which has no flows to draw."""
    if model.config.transition != "flow":
        raise UserError(f"{source} is a baseline (--transition {model.config.transition}) without flows; "
                        "evaluate measures it")  # fmt: skip


def run_or_release(exp: str | None) -> tuple[Path, Path, bool]:
    """What to load, the folder to write to, and whether it is the released model: taken, and said, without `--exp`."""
    if exp is not None:
        return Path(exp), Path(exp).parent if Path(exp).is_file() else Path(exp), False
    release = released("latent_flow", RELEASE)
    print(f"{release.notice('no --exp')} (files in {RELEASE_FOLDER})", flush=True)
    RELEASE_FOLDER.mkdir(parents=True, exist_ok=True)
    return release.path, RELEASE_FOLDER, True


def source_of(
    config: Config, root: str | None, device: torch.device, centre: str = "upstream", split: str = "train",
    fetch: bool = False,
) -> Any:  # fmt: skip
    """The sequences that a model is trained on; `fetch`: get a small public set that is absent."""
    return open_source(
        config.dataset, config.steps, size=config.image_size, root=root, split=split, device=device, centre=centre,
        stride=config.frame_stride, fetch=fetch,
    )  # fmt: skip


def saw_all(args: Mapping[str, Any]) -> bool:
    """Whether a run with these options is from before clips, and later sweeps, were held out whole."""
    dataset = args.get("dataset")
    return (dataset == "frames" and "frame_stride" not in args) or (dataset in SWEPT and "decode_frames" not in args)


class Written:
    """The files that a command writes below `folder`, kept in its written.json: the next such command removes those of
    them that it does not write again, and nothing else.
    """

    def __init__(self, folder: Path):
        self.folder, self.files = folder, set[str]()
        record = folder / WRITTEN
        before = read_json(record) if record.is_file() else []
        self._before = {name for name in before if isinstance(name, str)} if isinstance(before, list) else set()

    def path(self, name: str) -> Path:
        """Where to write `name`, noted."""
        self.files.add(name)
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def finish(self) -> None:
        """Remove what the command before wrote and this one did not, and note the rest."""
        inside = self.folder.resolve()
        for name in self._before - self.files:
            path = self.folder / name
            if path.parent.resolve().is_relative_to(inside):
                path.unlink(missing_ok=True)
        write_json(self.folder / WRITTEN, sorted(self.files))
