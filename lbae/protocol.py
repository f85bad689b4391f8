"""The whole evaluation of an experiment, or of every experiment in a folder; eval.sh calls it there:

    cd lbae/<experiment> && ../../eval.sh [KEY=VALUE ...]
    cd lbae/exp && ../../eval.sh feat=lenet        an experiment, a folder of them, or empty: the released model

Reconstructs the test set, generates as many images as it has by cov, random and int (a VAE: random), and appends FID,
KID and precision/recall to results.txt; PR.pdf is the precision-recall curve. It stops at the first step that fails,
with that step's exit code. exp=FOLDER evaluates that folder instead of the current one. Options are those of mnist.py,
cifar10.py, celeba.py and folder.py that evaluate and generate, and those of eval.py; int takes batch_size_test=10 and
interpolate_steps=10 where they are not given.
"""

import contextlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

if __name__ == "__main__":
    sys.path[0:1] = [str(Path(__file__).resolve().parents[1])]
    import common.start  # noqa: F401

from pydantic import Field, model_validator

from common.errors import UserError, run_command
from common.launch import pick_device
from common.options import Says, from_tokens, option
from lbae import celeba, cifar10, mnist
from lbae import folder as own
from lbae.command import preset, released_experiment, with_saved
from lbae.eval import ScoreOptions, Scores, score
from lbae.experiment import newest_config, reference_folder, written
from lbae.generate import generate
from lbae.options import TRAINING, Params, experiment_name, keys_of
from lbae.reconstruct import evaluate

SCRIPTS = {"mnist": mnist.CONFIGS, "cifar10": cifar10.CONFIGS, "celeba": celeba.CONFIGS,
           "folder": own.CONFIGS}  # fmt: skip
METHODS = ("cov", "int", "random", "independent")  # in the order of the scores
EMPTY = Path(__file__).resolve().parent / "exp"  # evaluates the released model as long as it holds no experiment
NOT_HERE = {"eval", "gen", "eval_train", "overwrite", "sample_method", "set_attr", "resume"} | keys_of(TRAINING)
Methods = Annotated[str, Field(pattern=rf"^$|^({'|'.join(METHODS)})(,({'|'.join(METHODS)}))*$"), Says(
    f"names of {', '.join(METHODS)}, separated by commas")]  # fmt: skip


class Protocol(Params, ScoreOptions):
    """The options of eval.sh."""

    methods: Methods = option("", "generators (default: cov,random,int; a VAE: random)", group="what to do")

    @model_validator(mode="before")
    @classmethod
    def _refuse(cls, values: dict[str, Any]) -> dict[str, Any]:
        if wrong := sorted(NOT_HERE & set(values)):
            raise ValueError(
                f"{wrong[0]} is no option of eval.sh, which evaluates and generates by itself; leave it out"
            )
        return values


def main(argv: list[str] | None = None) -> None:
    options, given = from_tokens(Protocol, sys.argv[1:] if argv is None else argv, __doc__)
    pick_device(options.device_name)
    root = Path(options.exp)
    given.pop("exp", None)
    for key in ("data_root", "inception") & given.keys():
        given[key] = given[key] and str(Path(given[key]).expanduser().resolve())
    if options.dry_run:
        print(json.dumps({**{key: getattr(options, key) for key in given}, "exp": str(root)}, indent=2))
        return
    if not root.is_dir():
        raise UserError(f"no folder {root}")
    folders = [root] if (root / "models").is_dir() else sorted(p for p in root.iterdir() if (p / "models").is_dir())
    if not folders and root.resolve() == EMPTY:
        name = experiment_name(Params.build(preset(mnist.CONFIGS, "")))
        folders = [released_experiment("mnist_bae", root / f"{name}-released", given, f"no experiment in {EMPTY}")]
    if not folders:
        raise UserError(f"{root.resolve()} is no experiment and holds none (a folder with models/); train one first")
    for folder in folders:
        if folder != root:
            print(f"== {folder.name}", flush=True)
        with contextlib.chdir(folder):
            whole_evaluation(given)


def whole_evaluation(given: Mapping[str, Any]) -> None:
    """Reconstruct, generate and score in the current folder."""
    own = {key: value for key, value in given.items() if key in Params.model_fields}
    here = Path()
    params = experiment_params(here, {**own, "eval": True})
    evaluate(params, here)
    reference = reference_folder(here, params.dataset, params.img_crop_size)
    count = {"gen_imgs": given.get("gen_imgs", len(written(reference)))}
    methods = (given.get("methods") or ("random" if params.vae else "cov,random,int")).split(",")
    for method in methods:
        steps = {"batch_size_test": 10, "interpolate_steps": 10} if method == "int" else {}
        what = {"eval": True, "gen": True, "sample_method": method}
        generate(experiment_params(here, {**steps, **own, **count, **what}), here)
    folders = [f"generated/samples_{method}" for method in METHODS if method in methods]
    scores = {key: value for key, value in given.items() if key in ScoreOptions.model_fields}
    score(Scores.build(scores, {"s": str(Path("..") / reference.name), "t": ",".join([*folders, "reco"])}))


def experiment_params(folder: Path, given: Mapping[str, Any]) -> Params:
    """The options of an experiment by its saved configuration; without one the folder's name says what it is, as
    published.
    """
    config, _ = newest_config(folder)
    name = str(given.get("cfg") or config.get("cfg") or folder.resolve().name)
    script = name.split("_")[0]
    if script not in SCRIPTS:
        raise UserError(
            f"{folder.resolve()} has no saved configuration, and its name says no data set ({', '.join(SCRIPTS)}); "
            "give cfg="
        )
    cfg = next((known for known in SCRIPTS[script] if name.startswith(known)), "")
    return with_saved(SCRIPTS[script], folder, {**given, "cfg": cfg} if cfg else given)


if __name__ == "__main__":
    sys.exit(run_command(main))
