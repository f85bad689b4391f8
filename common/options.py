"""A paper's options, each declared once in a pydantic model; three spellings of a command line, one line for a mistake.

    class Config(Options):
        lr: Positive = option(1e-3, "learning rate", group="training", resume="change")
        optimizer: Literal["adam", "sgd"] = option("adam", "optimiser", group="training")

    config, given = from_flags(Config, argv, about=__doc__)     # --lr 0.01, --lr=0.01, --set lr=0.01, --no-switch
    config, given = from_tokens(Config, argv, about=__doc__)    # lr=0.01, switch
    config = Config.build(values)                               # a mapping, from hydra or JSON

A wrong value is a UserError that names the option and what it takes; an unknown one names the nearest. Defaults,
presets and what was saved with a run are mappings below the command line: the command line always wins.
"""

import argparse
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, NoReturn, Self

from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, field_validator
from pydantic.fields import FieldInfo

from common.errors import UserError, suggest

TRUE, FALSE, NONE = ("true", "1", "yes", "y", "t", "on"), ("false", "0", "no", "n", "f", "off"), ("none", "null")
RESUME = ("same", "change", "call")
LARGEST = 1_000_000_000  # of a count


class Says(NamedTuple):
    """What a value of an annotated type looks like, in words; for messages and help."""

    words: str


Count = Annotated[int, Field(ge=1, le=LARGEST)]
Whole = Annotated[int, Field(ge=0, le=LARGEST)]
Seed = Annotated[int, Field(ge=0, lt=2**32)]
Positive = Annotated[float, Field(gt=0, le=1e12)]
NonNegative = Annotated[float, Field(ge=0, le=1e12)]
Fraction = Annotated[float, Field(ge=0, le=1)]
Decay = Annotated[float, Field(ge=0, lt=1)]
Device = Annotated[
    str, StringConstraints(pattern=r"^(auto|cpu|mps|cuda(:\d{1,3})?)$"), Says("auto, cpu, cuda, cuda:<index> or mps")
]
Resume = bool | Literal["auto"]


def option(
    default: Any,
    help: str,
    *,
    group: str = "",
    resume: Literal["same", "change", "call"] = "same",
    bare: Any = None,
    flags: Iterable[str] = (),
    **limits: Any,
) -> Any:
    """A field of an `Options` model.

    `resume` is the rule for a resumed run: "same" refuses another value, "change" lets it take effect, "call" belongs
    to the one call and is not compared. `bare` is the value of the option alone (`--resume`), `flags` are further
    spellings (`-K`), `limits` go to pydantic's Field (gt, ge, lt, le, min_length, pattern, ...).
    """
    facts = {"group": group, "resume": resume, "bare": bare, "flags": tuple(flags)}
    return Field(default, description=help, json_schema_extra=facts, **limits)


class Options(BaseModel):
    """Base of a paper's options. Unknown names and values outside their ranges are refused, in assignments too."""

    model_config = ConfigDict(
        extra="forbid", allow_inf_nan=False, validate_default=True, validate_assignment=True, protected_namespaces=()
    )
    DEAD: ClassVar[Mapping[str, str]] = {}  # published names that are refused, and why

    @field_validator("*", mode="before")
    @classmethod
    def _from_text(cls, value: Any, info: Any) -> Any:
        return from_text(value, cls.model_fields[info.field_name].annotation)

    @classmethod
    def build(cls, *layers: Mapping[str, Any], spelling: str = "") -> Self:
        """The options of several mappings, later ones winning. Raises UserError in one line."""
        values = {name: value for layer in layers for name, value in layer.items()}
        try:
            return cls.model_validate(values)
        except ValidationError as error:
            raise UserError(_line(cls, error, spelling)) from None

    def with_changes(self, **changes: Any) -> Self:
        """A copy with other values, checked as a whole."""
        return type(self).build(self.model_dump(), changes)

    def as_dict(self) -> dict[str, Any]:
        """Plain values for JSON and checkpoints."""
        return self.model_dump(mode="json")


def from_text(value: Any, kind: Any) -> Any:
    """A word of a command line as what `kind` takes; a truth value is no number, and text is not judged here."""
    kind, args = _bare_type(kind), typing.get_args(_bare_type(kind))
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        kinds = [_bare_type(part) for part in args]
        if type(None) in kinds and (value is None or str(value).lower() in NONE):
            return None
        if type(None) in kinds and {int, float} & set(kinds) and str(value).lower() in ("false", "inf"):
            return None  # no limit
        if isinstance(value, str) and bool in kinds and value.lower() in TRUE + FALSE:
            return value.lower() in TRUE
        rest = [part for part in kinds if part not in (type(None), bool)]
        return from_text(value, rest[0]) if len(rest) == 1 else value
    if typing.get_origin(kind) in (list, tuple):
        if isinstance(value, str):
            value = [part for part in value.strip("[]()").replace("x", ",").split(",") if part.strip()] \
                if _bare_type(args[0]) in (int, float) else [part for part in value.split(",") if part]  # fmt: skip
        if isinstance(value, (list, tuple)):
            parts = [args[0]] * len(value) if len(args) == 1 or args[-1] is ... else [*args, *[Any] * len(value)]
            return [from_text(item, part) for item, part in zip(value, parts, strict=False)]
        return value
    if kind in (int, float):
        if isinstance(value, bool):
            raise ValueError("a truth value is no number")
        return _whole(value) if kind is int else value
    if kind is str and isinstance(value, (int, float)) and not isinstance(value, bool):
        return str(value)
    return value


def _whole(value: Any) -> Any:
    """'3e7' and 3.0 as whole numbers; anything else as it is."""
    try:
        number = float(value)
        return (
            int(number) if isinstance(value, str) and number == int(number) and not value.strip().isdigit() else value
        )
    except (TypeError, ValueError, OverflowError):
        return value


def _bare_type(kind: Any) -> Any:
    while typing.get_origin(kind) is Annotated:
        kind = typing.get_args(kind)[0]
    return kind


# ---- words for a range


def expects(kind: Any, limits: Iterable[Any] = ()) -> str:
    """What a value of an annotation may be, in words: "a whole number of at least 1", "one of adam, sgd"."""
    limits = list(limits)
    while typing.get_origin(kind) is Annotated:
        kind, *extra = typing.get_args(kind)
        limits += [one for item in extra for one in (item.metadata if isinstance(item, FieldInfo) else [item])]
    for limit in limits:
        if isinstance(limit, Says):
            return limit.words
    args = typing.get_args(kind)
    if typing.get_origin(kind) in (typing.Union, types.UnionType):
        parts = [expects(part, limits) for part in args if part is not type(None)]
        return " or ".join([*parts, *(["none"] if type(None) in args else [])])
    if typing.get_origin(kind) is Literal:
        return f"{'one of ' if len(args) > 1 else ''}{', '.join(str(arg) for arg in args)}"
    if typing.get_origin(kind) in (list, tuple):
        return f"a list, each {expects(args[0])}"
    if kind is bool:
        return "true or false"
    if kind in (int, float):
        return " ".join(["a whole number" if kind is int else "a number", *_range(limits)])
    return "text" if kind is str else "a group of options" if isinstance(kind, type) else str(kind)


def _range(limits: list[Any]) -> Iterator[str]:
    words = {Gt: ("gt", "above"), Ge: ("ge", "of at least"), Lt: ("lt", "below"), Le: ("le", "of at most")}
    found = [(word, getattr(limit, name)) for limit in limits for one, (name, word) in words.items()
             if isinstance(limit, one)]  # fmt: skip
    if len(found) > 2:  # a tighter limit on top of the type's own
        lows = [item for item in found if item[0] in ("above", "of at least")]
        highs = [item for item in found if item not in lows]
        found = [max(part, key=lambda item: item[1] if part is lows else -item[1]) for part in (lows, highs) if part]
    if found:
        yield " and ".join(
            f"{word} {value:g}" if isinstance(value, float) else f"{word} {value}" for word, value in found
        )


def field_at(cls: type[BaseModel], path: Iterable[Any]) -> tuple[str, FieldInfo | None]:
    """(dotted name, field) of a place in nested models; the place may lead on into a list."""
    names, field, kind = [], None, cls
    for part in path:
        kind = _model(kind)
        named = kind and _named_groups(kind)
        if named and part not in kind.model_fields:
            names.append(part)
            kind, field = named, FieldInfo.from_annotation(named)
            continue
        if kind is None or part not in kind.model_fields:
            if isinstance(part, str) and field is not None and typing.get_origin(_bare_type(field.annotation)) is dict:
                names.append(part)
                kind = typing.get_args(_bare_type(field.annotation))[1]
                continue
            break
        names.append(part)
        field = kind.model_fields[part]
        kind = field.annotation
    return ".".join(names), field


def _named_groups(model: type[BaseModel]) -> Any:
    """What entries of any further name are, in a model that declares `__pydantic_extra__: dict[str, ...]`."""
    own = (inspect.get_annotations(one) for one in model.__mro__ if issubclass(one, Options))
    found = next((kinds["__pydantic_extra__"] for kinds in own if "__pydantic_extra__" in kinds), None)
    return typing.get_args(found)[1] if typing.get_origin(found) is dict else None


def _model(kind: Any) -> type[BaseModel] | None:
    parts = [_bare_type(kind), *typing.get_args(_bare_type(kind))]
    return next((part for part in parts if isinstance(part, type) and issubclass(part, BaseModel)), None)


def _line(cls: type[Options], error: ValidationError, spelling: str) -> str:
    """The first mistake, in one line that names the option and what it takes."""
    first = error.errors()[0]
    name, field = field_at(cls, first["loc"])
    if first["type"] == "extra_forbidden":
        return unknown(cls, ".".join(map(str, first["loc"])), spelling)
    if first["type"] == "missing":
        return f"{spelling}{name} is missing: expected {expects(field.annotation, field.metadata)}"
    if field is None:  # a check of several options says all
        return str(first.get("ctx", {}).get("error", first["msg"]))
    shown = "nothing" if first["input"] == "" else str(first["input"])[:60]
    if first["type"] == "value_error" and not isinstance(first["input"], bool):
        return f"{spelling}{name}={shown}: {first['ctx']['error']}"
    near = ""
    choices = _choices(field.annotation)
    if choices and isinstance(first["input"], str):
        near = suggest(first["input"], choices)
    return f"{spelling}{name}={shown}: expected {expects(field.annotation, field.metadata)}{near}"


def _choices(kind: Any) -> list[str]:
    kind = _bare_type(kind)
    if typing.get_origin(kind) is Literal:
        return [str(arg) for arg in typing.get_args(kind)]
    return [choice for part in typing.get_args(kind) for choice in _choices(part)]


def all_names(cls: type[BaseModel], prefix: str = "") -> list[str]:
    """The dotted names of all options, groups before their members."""
    found = []
    for name, field in cls.model_fields.items():
        found.append(f"{prefix}{name}")
        kind = _bare_type(field.annotation)
        if isinstance(kind, type) and issubclass(kind, BaseModel):
            found += all_names(kind, f"{prefix}{name}.")
    return found


def unknown(cls: type[Options], name: str, spelling: str = "") -> str:
    """The line for a name that no option has: why it is refused, or the nearest one."""
    bare = name.lstrip("-").replace("-", "_")
    if bare in cls.DEAD:
        return f"{spelling}{bare} is not supported: {cls.DEAD[bare]}"
    return f"unknown option {spelling}{name.lstrip('-')}{suggest(bare, all_names(cls))}; help lists all"


# ---- front ends

Defaults = Mapping[str, Any] | Callable[[dict[str, Any]], Mapping[str, Any]]


def from_tokens(
    cls: type[Options], argv: Iterable[str], about: str = "", defaults: Defaults = types.MappingProxyType({})
) -> tuple[Any, dict[str, Any]]:
    """The options of `KEY` and `KEY=VALUE` words, and the words given, by key; later ones win.

    `defaults` go below the words: a mapping, or a function of what was given (a preset's name, say). `help`, `-h` and
    `--help` print the options with these defaults and leave.
    """
    given: dict[str, Any] = {}
    argv, wants_help = list(argv), False
    for word in argv:
        if word in ("help", "-h", "--help"):
            wants_help = True
            continue
        key, mark, text = word.partition("=")
        if key not in cls.model_fields:
            raise UserError(unknown(cls, key))
        given[key] = text if mark else _bare(cls, key)
    return _finish(cls, given, defaults, "", about, wants_help)


def _bare(cls: type[Options], key: str) -> Any:
    field = cls.model_fields[key]
    bare = field.json_schema_extra["bare"]
    if bare is None and bool not in [_bare_type(field.annotation), *map(_bare_type, typing.get_args(field.annotation))]:
        raise UserError(f"{key}: a value is missing, write {key}=VALUE ({expects(field.annotation, field.metadata)})")
    return True if bare is None else bare


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message.removeprefix('argument ')}; --help lists all options")


def from_flags(
    cls: type[Options],
    argv: Iterable[str],
    about: str = "",
    defaults: Defaults = types.MappingProxyType({}),
    extra: Mapping[str, str] = types.MappingProxyType({}),
    positional: Iterable[str] = (),
) -> tuple[Any, dict[str, Any]]:
    """The options of `--key value`, `--key=value`, `--switch`, `--no-switch` and `--set key=value`, and what was given.

    Dashes and underscores mean the same. An option that takes a list takes the words up to the next option. `extra`
    maps names that are no options (a preset) to their help; they are among what was given, for `defaults` to read.
    `positional` options may also stand as bare words, in this order. Help as in `from_tokens`.
    """
    parser = _Parser(allow_abbrev=False, add_help=False, argument_default=argparse.SUPPRESS)
    parser.add_argument("-h", "--help", action="store_true")
    parser.add_argument("--set", action="append", default=[])
    for name in extra:
        parser.add_argument(f"--{name}")
    for name, field in cls.model_fields.items():
        facts, kinds = (
            field.json_schema_extra,
            [_bare_type(field.annotation), *typing.get_args(_bare_type(field.annotation))],
        )
        spellings = dict.fromkeys([f"--{name}", f"--{name.replace('_', '-')}", *facts["flags"]])
        how: dict[str, Any] = {}
        if bool in kinds or facts["bare"] is not None:
            how = {"nargs": "?", "const": True if facts["bare"] is None else facts["bare"]}
        elif any(typing.get_origin(_bare_type(kind)) in (list, tuple) for kind in kinds):
            how = {"nargs": "*"}
        parser.add_argument(*spellings, dest=name, **how)
        if bool in kinds:
            off = dict.fromkeys(f"--no-{one.lstrip('-')}" for one in spellings if one.startswith("--"))
            parser.add_argument(*off, dest=name, action="store_const", const=False)
    values, rest = parser.parse_known_args(list(argv))
    for name in positional:
        if name not in values and rest and not rest[0].startswith("-"):
            setattr(values, name, rest.pop(0))
    if rest:
        raise UserError(unknown(cls, rest[0].split("=")[0], "--") if rest[0].startswith("-") else
                        f"unexpected argument {rest[0]}; --help lists all options")  # fmt: skip
    given = {name: value if name == "set" else _joined(value) for name, value in vars(values).items()}
    wants_help = given.pop("help", False)
    for pair in given.pop("set"):
        key, mark, text = pair.partition("=")
        if not mark:
            raise UserError(f"--set {pair}: expected KEY=VALUE")
        if key not in cls.model_fields:
            raise UserError(unknown(cls, key, "--"))
        given[key] = text
    return _finish(cls, given, defaults, "--", about, wants_help, extra)


def _joined(value: Any) -> Any:
    """`--list 1,2` and `--list 1 2` are the same."""
    return value[0] if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str) else value


def _finish(
    cls: type[Options],
    given: dict[str, Any],
    defaults: Defaults,
    spelling: str,
    about: str,
    wants_help: bool,
    extra: Mapping[str, str] = types.MappingProxyType({}),
) -> tuple[Any, dict[str, Any]]:
    below = defaults(given) if callable(defaults) else defaults
    if wants_help:
        print(help_text(cls, below, spelling, about, extra))
        raise SystemExit(0)
    own = {name: value for name, value in given.items() if name in cls.model_fields}
    options = cls.build(below, own, spelling=spelling)
    return options, {name: given[name] if name in extra else getattr(options, name) for name in given}


def help_text(
    cls: type[Options],
    defaults: Mapping[str, Any],
    spelling: str = "",
    about: str = "",
    extra: Mapping[str, str] = types.MappingProxyType({}),
) -> str:
    """Every option by group, with its default here, meaning and range."""
    lines = [*about.strip().splitlines(), ""] if about else []
    lines += [f"  {spelling + name:<30} {text}" for name, text in extra.items()]
    for group in dict.fromkeys(field.json_schema_extra["group"] for field in cls.model_fields.values()):
        lines.append(f"\n{group}:" if group else "")
        for name, field in cls.model_fields.items():
            facts = field.json_schema_extra
            if facts["group"] != group:
                continue
            default = defaults.get(name, field.get_default(call_default_factory=True))
            shown = "" if default in ("", None) or field.is_required() else f"={_shown(default)}"
            also = f" ({', '.join(facts['flags'])})" if facts["flags"] else ""
            takes = expects(field.annotation, field.metadata)
            lines.append(f"  {spelling + name + shown:<30} {field.description}{also} [{takes}]")
    return "\n".join(lines)


def _shown(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ",".join(map(str, value))
    return str(value).lower() if isinstance(value, bool) else str(value)


# ---- a resumed run


def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested mappings as dotted names; tuples as lists, as JSON has them."""
    found: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{name}.")
        else:
            found[f"{prefix}{name}"] = list(value) if isinstance(value, tuple) else value
    return found


def compare(old: Mapping[str, Any], new: Options) -> dict[str, dict[str, tuple[Any, Any]]]:
    """{"same": {name: (old, new)}, "change": ..., "call": ...}: what differs from a saved configuration, by its resume
    rule. Names that only one of both has are not compared.
    """
    found: dict[str, dict[str, tuple[Any, Any]]] = {rule: {} for rule in RESUME}
    before = flat(old)
    for name, value in flat(new.as_dict()).items():
        field = field_at(type(new), name.split("."))[1]
        rule = (field.json_schema_extra or {}).get("resume", "same") if field else "same"
        if name in before and before[name] != value:
            found[rule][name] = (before[name], value)
    return found


def check_resume(old: Mapping[str, Any], new: Options, where: Any) -> list[str]:
    """The changes that take effect, as lines "name: old -> new". Raises UserError naming every option that a resumed
    run may not change.
    """
    changes = compare(old, new)
    if changes["same"]:
        what = ", ".join(f"{name} ({before} there, {now} here)" for name, (before, now) in changes["same"].items())
        raise UserError(f"{where} was made with other settings: {what}; resume with the same ones, or start a new run")
    return [f"{name}: {before} -> {now}" for name, (before, now) in changes["change"].items()]
