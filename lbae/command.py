"""The command behind mnist.py, cifar10.py, celeba.py and folder.py: which experiment it means, what it does there."""

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from common.checkpoint import read_json, write_json
from common.datasets.folder import check_split
from common.errors import UserError
from common.launch import pick_device
from common.options import from_tokens
from common.released import released
from lbae.experiment import is_experiment, newest_config
from lbae.generate import check_generator, generate
from lbae.options import MODEL, Params, experiment_name, from_saved, keys_of, saved_keys, without_effect
from lbae.reconstruct import evaluate
from lbae.release import unpack
from lbae.train import train

Configs = Mapping[str, Mapping[str, Any]]
RELEASES = {"mnist_bae": "mnist_bae_w16"}  # what evaluation takes while there is no experiment of one's own


def main(configs: Configs, script: str, about: str, argv: list[str] | None = None) -> None:
    """One command of a script: train, `eval`, or `eval gen`; `configs` are the script's configurations."""
    argv = sys.argv[1:] if argv is None else list(argv)
    about += f"\nConfigurations: {', '.join(configs)} (cfg=, the first is the default; help shows its values)."
    _, given = from_tokens(Params, argv, about, lambda words: preset(configs, words.get("cfg") or ""))
    params, folder = resolve(configs, script, given)
    pick_device(params.device_name)
    if idle := without_effect(params, given):
        print(f"without effect in this command: {', '.join(idle)}", file=sys.stderr)
    if params.gen:
        check_generator(params)
    if params.dry_run:
        print(json.dumps({**params.as_dict(), "exp": str(folder)}, indent=2))
    elif params.eval:
        generate(params, folder) if params.gen else evaluate(params, folder)
    else:
        use_all_gpus(params, script, argv)
        train(params.with_changes(**absolute_places(params)), folder)


def absolute_places(params: Params) -> dict[str, str]:
    """The data's places as evaluations in the experiment's own folder find them, too."""
    given = {key: Path(getattr(params, key)).expanduser() for key in ("data_root", "labels") if getattr(params, key)}
    return {key: str(path.resolve()) for key, path in given.items() if path.exists()}


def preset(configs: Configs, cfg: str) -> dict[str, Any]:
    """The values of a configuration, of the first one when none is named. Raises UserError for another script's."""
    name = cfg or next(iter(configs))
    if name not in configs:
        raise UserError(f"cfg={name}: this script has {', '.join(configs)}; the name says which script to run")
    return {**configs[name], "cfg": name}


def resolve(configs: Configs, script: str | Path, given: Mapping[str, Any]) -> tuple[Params, Path]:
    """The options of a command and its experiment folder.

    Defaults < the configuration `cfg` (the script's first one when not named) < what the experiment saved (the model
    when evaluating, the training too when resuming) < the command line. The folder is `exp=`; else the current one if
    it is an experiment; else `<folder of the script>/<name>`; where that is not there, an evaluation of MNIST takes the
    released model.
    """
    params = Params.build(preset(configs, given.get("cfg") or ""), given)
    folder = Path(params.exp) if params.exp else _current_or_named(script, params)
    if not params.eval and params.resume == "auto" and not (folder / "models" / "last.cp").is_file():
        return params, folder  # nothing to go on from: start
    if not (params.eval or params.loads or params.resume):
        return params, folder
    if not folder.is_dir():
        reason = f"no experiment at {folder}"
        if not params.eval or params.exp or params.reload is not None or params.cfg not in RELEASES:
            raise UserError(f"{reason}; train it first, or name one by exp=")
        folder = released_experiment(params.cfg, folder.with_name(f"{folder.name}-released"), given, reason)
    return with_saved(configs, folder, given, resumes=not params.eval), folder


def with_saved(configs: Configs, folder: Path, given: Mapping[str, Any], resumes: bool = False) -> Params:
    """The options of an experiment: its configuration, what it saved, and what is given."""
    config, source = newest_config(folder)
    saved = from_saved(config, saved_keys(resumes), source)
    if given.get("cfg") and saved.get("cfg") not in (None, "", given["cfg"]):
        raise UserError(f"cfg={given['cfg']}, but {folder} holds a {saved['cfg']} experiment")
    base = preset(configs, given.get("cfg") or saved.get("cfg") or "")
    own = {"latents": "best"} if given.get("reload") == "best" else {}
    params = Params.build(base, saved, own, {**given, "cfg": base["cfg"]})
    if params.dataset == saved.get("dataset") == "folder":
        seed = saved.get("held_out_seed", params.held_out_seed)
        check_split(params.data_root, params.held_out_seed, saved.get("data_root", ""), seed, "held_out_seed")
    return params


def released_experiment(cfg: str, target: Path, given: Mapping[str, Any], reason: str) -> Path:
    """The experiment `target`, made of the weights that ship where it is not there yet; says so in one line.

    Raises UserError when the command line asks for another network or other data than the release's.
    """
    release = released("lbae", RELEASES[cfg])
    stored = read_json(release.path.with_suffix(".json"))
    asked = {key: given[key] for key in keys_of(MODEL) & set(given) - {"train_images", "test_images"}}
    release.refuse(asked, stored, reason)
    mark = target / "release.json"
    if given.get("dry_run"):
        return target
    if not (mark.is_file() and read_json(mark).get("sha256") == release.sha256):
        unpack(release.path, target, renew=True)
        write_json(mark, {"release": release.name, "sha256": release.sha256})
    print(release.notice(reason), f"(files in {target})", flush=True)
    return target


def _current_or_named(script: str | Path, params: Params) -> Path:
    here, name = Path.cwd(), experiment_name(params)
    if here.name == name or is_experiment(here):
        return Path(".")
    return Path(script).resolve().parent / name


def use_all_gpus(params: Params, script: str, argv: list[str]) -> None:
    """With `parallel` and several GPUs, start this command again under torchrun, one process a GPU."""
    wanted = params.parallel and params.device in ("auto", "cuda") and params.cuda_device < 0
    if wanted and "WORLD_SIZE" not in os.environ and torch.cuda.device_count() > 1:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={torch.cuda.device_count()}"]
        os.execv(sys.executable, [sys.executable, *launcher, script, *argv])
