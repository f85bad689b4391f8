"""What eval.sh asks: `python -m lbae.describe FOLDER` prints an experiment's script, reference folder, generators."""

import json
import re
import sys
from pathlib import Path
from typing import Any

from common.errors import UserError, run_command

SCRIPTS = ("mnist", "cifar10", "celeba")


def newest_config(folder: Path) -> dict[str, Any]:
    """The newest saved configuration of an experiment: log/cfg-<k>-<epoch>.json with the highest k, else config.json.

    Empty when the folder has none. Raises UserError for a damaged file.
    """
    found = [(int(match[1]), path) for path in (folder / "log").glob("cfg-*.json")
             if (match := re.match(r"cfg-(\d+)", path.name))]  # fmt: skip
    path = max(found)[1] if found else folder / "config.json"
    if not path.is_file():
        return {}
    try:
        config = json.loads(path.read_bytes())
    except (ValueError, RecursionError, OSError) as error:
        raise UserError(f"{path} is damaged ({error}); restore or delete it") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} does not hold a configuration")
    return config


def describe(folder: Path) -> tuple[str, Path, list[str]]:
    """(script's name, folder of the reference images, generators) of an experiment.

    Without a saved configuration the folder's name up to the first `_` says the data set, as published.
    """
    config = newest_config(folder)
    script = str(config.get("cfg") or folder.resolve().name).split("_")[0]
    if script not in SCRIPTS:
        raise UserError(
            f"{folder.resolve()} has no saved configuration, and its name says no data set ({', '.join(SCRIPTS)})"
        )
    dataset = config.get("dataset") or script
    try:
        crop = int(config.get("img_crop_size") or 0)
    except (TypeError, ValueError) as error:
        raise UserError(f"{folder.resolve()}: img_crop_size of its configuration is no number") from error
    vae = config.get("vae") or "-vae-" in folder.resolve().name
    reference = Path("..") / (f"{dataset}_{crop}_eval" if crop else f"{dataset}_eval")
    return script, reference, ["random"] if vae else ["cov", "random", "int"]


def main(argv: list[str] | None = None) -> None:
    folder = Path((sys.argv[1:] if argv is None else argv)[0])
    script, reference, methods = describe(folder)
    print(script, reference, ",".join(methods))


if __name__ == "__main__":
    sys.exit(run_command(main))
