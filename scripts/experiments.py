"""Experiments = (paper, table, setting, seed), read from the manifests sweeps/<paper>/<table>.yaml.

    about: one line
    grid:                                                   every combination is an experiment, named by its values
      model: {GlanceNet: --alg GlanceNet, CBNM: --alg CBNM}          name: words of the command
      seed: [0, 1, 2]                                                or plain values
    train: python glancenet/main.py {model} --seed {seed} --resume auto --log_dir {out}/logs ...
    final: checkpoints/run/model.safetensors                the final weights, below {out}
    evaluate: python glancenet/evaluate.py {out}/logs --out {out}/evaluation
    result: evaluation/runs.csv                             the numbers, below {out}

{out} is runs/<paper>/<table>/<values joined by _>, {root} the repository as seen from the folder of a step. Several
commands stand on lines of their own. Instead of train and evaluate a manifest may list `steps`. Further keys:
scripts/templates/manifest.schema.json.
"""

import hashlib
import itertools
import json
import os
import re
import shlex
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import yaml

from common.errors import UserError, suggest

ROOT = Path(__file__).resolve().parents[1]
QUICKSTART = "results/quickstart"
MNIST_FILES = [f"{part}-{kind}" for part in ("train", "t10k") for kind in ("images-idx3-ubyte", "labels-idx1-ubyte")]
PLACEHOLDER = re.compile(r"\{([A-Za-z_]\w*)\}")


@dataclass(frozen=True)
class Step:
    """One rule: commands, run in `folder`, that write the files `makes`. All texts hold placeholders."""

    name: str
    run: str
    makes: tuple[str, ...]
    folder: str = "."
    clears: tuple[str, ...] = ()  # what a step with another command left, removed before this one starts
    watch: str = ""

    @property
    def done(self) -> str:
        """The empty file that says that the step came to its end."""
        return f"{{out}}/{self.name}.done"


@dataclass(frozen=True)
class Table:
    """A manifest. `grid` maps a key to its printed values, each with the words that stand for it."""

    path: Path
    paper: str
    name: str
    keys: dict[str, Any]
    grid: dict[str, dict[str, str]]
    steps: tuple[Step, ...]

    @cached_property
    def experiments(self) -> dict[str, dict[str, str]]:
        """Name of an experiment -> its values, in the order of the grid, the last key running fastest."""
        found: dict[str, dict[str, str]] = {}
        for point in itertools.product(*self.grid.values()):
            values = dict(zip(self.grid, point, strict=True))
            if any(all(values[k] == str(v) for k, v in rule.items()) for rule in self.keys.get("exclude", ())):
                continue
            name = "_".join(re.sub(r"[^\w.+=-]", "-", value) for value in values.values()) or "all"
            if name in found:
                raise UserError(f"{self.path}: two experiments are called {name}: give their values other names")
            found[name] = values
        if not found:
            raise UserError(f"{self.path}: exclude leaves no experiment")
        return found

    @property
    def out_pattern(self) -> str:
        """The folder of an experiment; {experiment} stands for its name."""
        if "out" not in self.keys:
            return f"runs/{self.paper}/{self.name}/{{experiment}}"
        return self.keys["out"].replace(QUICKSTART, os.environ.get("QUICKSTART_OUT", QUICKSTART))

    def out(self, experiment: str) -> str:
        """The folder of an experiment."""
        return self.out_pattern.replace("{experiment}", experiment)

    def chosen(self) -> str:
        """The experiment of a table that makes one of several: the one for MNIST where that is here, else the first."""
        return "mnist" if "mnist" in self.experiments and find_mnist() else next(iter(self.experiments))

    def possible(self) -> bool:
        """Whether the data that it needs are there."""
        root = Path(os.environ.get("DATA_ROOT") or ROOT / "data")
        return all((root / name).exists() for name in self.keys.get("needs", ()))

    def fill(self, text: str, experiment: str, folder: str = ".") -> str:
        """`text` with the placeholders of an experiment filled in. Raises UserError for an unknown one."""
        values = self.experiments[experiment]
        known = {key: self.grid[key][value] for key, value in values.items()}
        root = os.path.relpath(ROOT, ROOT / folder) if folder != "." else "."
        known |= {"out": self.out(experiment), "root": root, "experiment": experiment}

        def value(match: re.Match) -> str:
            if match[1] not in known:
                raise UserError(f"{self.path}: nothing is called {{{match[1]}}}{suggest(match[1], known)}")
            return known[match[1]]

        return PLACEHOLDER.sub(value, text)

    def commands(self, experiment: str, step: Step) -> list[list[str]]:
        """The words of each command of a step. Raises UserError for unbalanced quotes or unknown placeholders."""
        folder, values = self.fill(step.folder, experiment), self.experiments[experiment]
        lines: list[list[str]] = []
        try:
            for line in step.run.splitlines():
                lines.append([])
                for word in shlex.split(line):
                    whole = PLACEHOLDER.fullmatch(word)
                    if whole and whole[1] in values:  # a value may be several words, or none
                        lines[-1] += shlex.split(self.grid[whole[1]][values[whole[1]]])
                    else:
                        lines[-1].append(self.fill(word, experiment, folder))
        except ValueError as error:
            raise UserError(f"{self.path}: {step.name}: {error}") from None
        processes = self.keys.get("processes", 1)
        if processes > 1 and step.name == "train":
            launch = ["torchrun", "--standalone", f"--nproc_per_node={processes}"]
            lines = [launch + words[1:] if words[:1] == ["python"] else words for words in lines]
        return [words for words in lines if words]

    def digest(self, experiment: str, step: Step) -> str:
        """Changes when the commands of a step or their environment do."""
        text = json.dumps([self.commands(experiment, step), self.keys.get("env", {})], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]


class _Loader(yaml.SafeLoader):
    """YAML that refuses a key standing twice."""

    def construct_mapping(self, node, deep=False):
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"the key {key!r} stands twice")
        return super().construct_mapping(node, deep)


def problem(value: Any, schema: dict[str, Any]) -> str:
    """What is wrong with a value by a JSON schema, in one line that names the key; "" when nothing is."""
    import jsonschema  # half a second, which a job need not wait

    errors = list(jsonschema.Draft202012Validator(schema).iter_errors(value))
    order = {"additionalProperties": 0, "required": 1}
    errors.sort(key=lambda error: (len(error.path), order.get(error.validator, 2), str(error.path)))
    if not errors:
        return ""
    error = errors[0]
    where = " ".join(map(str, error.absolute_path))
    if error.validator == "additionalProperties":
        known = error.schema.get("properties", {})
        name = next(key for key in error.instance if key not in known)
        return f"{where + ': ' if where else ''}unknown key {name!r}{suggest(str(name), known)}"
    if error.validator == "required":
        name = next(key for key in error.validator_value if key not in error.instance)
        return f"{where + ': ' if where else ''}key {name!r} is missing"
    if error.validator in ("if", "then", "else", "anyOf", "not") and not where:
        wanted = " or ".join(" and ".join(one.get("required", ())) for one in error.validator_value)
        return error.schema.get("$comment") if "$comment" in error.schema else f"keys are missing: {wanted}"
    if error.validator == "dependentRequired":
        return error.message
    expected = error.schema.get("description")
    if not expected and error.absolute_path:  # what stands in a shared definition is described where it is used
        expected = schema["properties"].get(error.absolute_path[0], {}).get("description")
    expected = expected or schema.get("description") or error.message
    shown = json.dumps(error.instance, default=str, ensure_ascii=False)
    return f"{where or 'it'} is {shown[:80]}, not {expected}"


def read_table(path: Path, checked: bool = False) -> Table:
    """The table of a manifest, `checked` before or not. Raises UserError (one line naming the file)."""
    try:
        keys = yaml.load(path.read_text(encoding="utf-8"), Loader=_Loader)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: {getattr(error, 'strerror', None) or error}") from error
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: {error}") from error
    if not isinstance(keys, dict):
        raise UserError(f"{path}: a manifest is a mapping of keys: about, grid, train, final, evaluate, result, ...")
    schema = json.loads((ROOT / "scripts/templates/manifest.schema.json").read_text())
    if not checked and (wrong := problem(keys, schema)):
        raise UserError(f"{path}: {wrong}")
    grid = {}
    for key, values in keys.get("grid", {}).items():
        named = values.items() if isinstance(values, dict) else ((value, value) for value in values)
        grid[key] = {str(name): str("" if words is None else words) for name, words in named}
    for rule in keys.get("exclude", ()):
        for key, value in rule.items():
            if key not in grid or str(value) not in grid[key]:
                raise UserError(f"{path}: exclude: the grid has no {key}: {value}{suggest(str(key), grid)}")
    steps = [
        Step(**{k: tuple(v) if isinstance(v, list) else v for k, v in one.items()}) for one in keys.get("steps", ())
    ]
    for name, product in (("train", "final"), ("evaluate", "result")):
        if name in keys:
            steps.append(Step(name, keys[name], (f"{{out}}/{keys[product]}",)))
    table = Table(path, path.parent.name, path.stem, keys, grid, tuple(steps))
    if not checked:
        check_placeholders(table)
    return table


def check_placeholders(table: Table) -> None:
    """Raise UserError where a command names what is not there, or a value of the grid is not used."""
    path, grid, steps = table.path, table.grid, table.steps
    used = {key for step in steps for key in PLACEHOLDER.findall(step.run)}
    for key in grid:
        if key not in used and "out" not in used:
            raise UserError(f"{path}: no command uses the grid's {key!r}: {{{key}}}")
    for experiment in table.experiments:
        for step in steps:
            table.commands(experiment, step)
            for text in (*step.makes, *step.clears, step.folder, step.watch):
                table.fill(text, experiment)


def read_tables(folder: Path | None = None) -> list[Table]:
    """All manifests of a folder (SWEEPS, else sweeps/). Raises UserError."""
    folder = folder or Path(os.environ.get("SWEEPS") or ROOT / "sweeps")
    return [read_table(path) for path in sorted(folder.glob("*/*.yaml"))]


def find_mnist() -> Path | None:
    """The folder of data sets when it holds all four files of MNIST."""
    root = Path(os.environ.get("DATA_ROOT") or ROOT / "data")
    raw = root / "MNIST" / "raw"
    found = all((raw / name).is_file() or (raw / f"{name}.gz").is_file() for name in MNIST_FILES)
    return root.resolve() if found else None
