from typing import Annotated, ClassVar, Literal

import pytest
from pydantic import ConfigDict, Field, model_validator

from common.errors import UserError
from common.options import (
    Count,
    Device,
    Options,
    Positive,
    Resume,
    Seed,
    check_resume,
    compare,
    from_flags,
    from_tokens,
    option,
)


class Inner(Options):
    beta: Annotated[float, Field(ge=0, lt=1)] = option(0.9, "decay")


class Config(Options):
    DEAD: ClassVar = {"old_name": "nothing read it; use lr"}

    lr: Positive = option(1e-3, "learning rate", group="training", resume="change")
    steps: Count = option(5, "steps", flags=("-n",), resume="change")
    width: Annotated[int, Field(ge=2, le=64)] = option(8, "width", multiple_of=2)
    optimizer: Literal["adam", "sgd"] = option("adam", "optimiser")
    clip: Positive | None = option(None, "largest norm")
    amp: bool = option(False, "half precision")
    size: tuple[Count, ...] = option((1, 28, 28), "image size")
    names: list[str] = option([], "names")
    name: str = option("run", "name", min_length=1)
    device: Device = option("auto", "device", resume="change")
    seed: Seed = option(0, "seed")
    reload: int | None = option(None, "epoch", bare=-1, ge=-1)
    inner: Inner = option(Inner(), "more")
    resume: Resume = option(False, "go on", resume="call")

    @model_validator(mode="after")
    def _fits(self):
        if self.optimizer == "sgd" and self.amp:
            raise ValueError("amp needs optimizer=adam")
        return self


def tokens(*words, **defaults):
    return from_tokens(Config, words, defaults=defaults)[0]


def flags(*words, **defaults):
    return from_flags(Config, words, defaults=defaults)[0]


def message(call, *words):
    with pytest.raises(UserError) as found:
        call(*words)
    assert "\n" not in str(found.value)
    return str(found.value)


def test_every_spelling_gives_the_same_options():
    expected = Config(lr=0.1, steps=30, clip=2.0, amp=True, size=(3, 8, 8), names=["a", "b"], resume="auto")
    assert tokens("lr=0.1", "steps=3e1", "clip=2", "amp", "size=3,8,8", "names=a,b", "resume=auto") == expected
    words = ["--lr", "0.1", "-n", "30", "--clip=2", "--amp", "--size", "3x8x8", "--names", "a", "b", "--resume", "auto"]
    assert flags(*words) == expected
    assert flags("--set", "lr=0.1", *words[2:]) == expected


def test_values_of_the_command_line_win_wherever_they_stand():
    assert tokens("lr=0.1", lr=0.5).lr == 0.1 and tokens(lr=0.5).lr == 0.5
    assert tokens("lr=0.1", "lr=0.2").lr == 0.2
    assert flags("--amp", "--no-amp").amp is False and flags("--amp", "false").amp is False
    assert flags(amp=True).amp is True and flags("--no-amp", amp=True).amp is False


def test_defaults_may_depend_on_what_was_given():
    def below(given):
        return {"lr": 0.5} if given.get("preset") == "fast" else {}

    config, given = from_flags(Config, ["--steps", "2", "--preset", "fast"], defaults=below, extra={"preset": "which"})
    assert (config.lr, config.steps) == (0.5, 2)
    assert given == {"steps": 2, "preset": "fast"}


def test_a_bare_option():
    assert tokens("reload").reload == -1 and tokens("reload=3").reload == 3 and flags("--reload").reload == -1
    assert "a value is missing" in message(tokens, "lr")
    assert "expected one argument" in message(flags, "--lr")


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("lr=fast", "lr=fast: expected a number above 0"),
        ("lr=0", "lr=0: expected a number above 0"),
        ("lr=nan", "lr=nan: expected a number above 0"),
        ("lr=inf", "lr=inf: expected a number above 0"),
        ("lr=1e300", "lr=1e300: expected a number above 0 and of at most 1e+12"),
        ("lr=", "lr=nothing: expected a number above 0"),
        ("lr=true", "lr=true: expected a number"),
        ("steps=1.5", "steps=1.5: expected a whole number of at least 1"),
        ("steps=0", "steps=0: expected a whole number of at least 1"),
        ("steps=99999999999999999999", "expected a whole number of at least 1 and of at most 1000000000"),
        ("width=65", "width=65: expected a whole number of at least 2 and of at most 64"),
        ("optimizer=adm", "optimizer=adm: expected one of adam, sgd (did you mean 'adam'?)"),
        ("amp=maybe", "amp=maybe: expected true or false"),
        ("clip=-1", "clip=-1: expected a number above 0 and of at most 1e+12 or none"),
        ("size=1,0,2", "size"),
        ("name=", "name=nothing: expected text"),
        ("device=gpu", "device=gpu: expected auto, cpu, cuda, cuda:<index> or mps"),
        ("seed=-5", "seed=-5: expected a whole number of at least 0"),
        ("learning=1", "unknown option learning"),
        ("widht=4", "unknown option widht (did you mean 'width'?)"),
        ("old_name=1", "old_name is not supported: nothing read it; use lr"),
    ],
)
def test_one_line_names_the_option_and_what_it_takes(word, expected):
    assert expected in message(tokens, word)
    assert expected.split(": ")[-1].removeprefix("unknown option ") in message(flags, f"--{word}")


def test_a_truth_value_is_no_number():
    assert "steps=True" in message(Config.build, {"steps": True})
    assert "lr=False" in message(Config.build, {"lr": False})


def test_checks_of_several_options_and_nested_models():
    assert message(tokens, "optimizer=sgd", "amp") == "amp needs optimizer=adam"
    assert "inner.beta=1.5: expected a number of at least 0 and below 1" in message(
        Config.build, {"inner": {"beta": 1.5}}
    )
    assert "unknown option inner.bta" in message(Config.build, {"inner": {"bta": 0.5}})


def test_none_means_no_limit():
    for word in ("none", "null", "inf", "false"):
        assert tokens(f"clip={word}", clip=3.0).clip is None


def test_help_shows_the_defaults_of_the_script(capsys):
    for call, words in ((from_tokens, ["help"]), (from_tokens, ["-h"]), (from_flags, ["--help"]), (from_flags, ["-h"])):
        with pytest.raises(SystemExit) as leave:
            call(Config, words, "What it does.", {"lr": 0.25})
        assert leave.value.code == 0
        shown = capsys.readouterr().out
        assert "What it does." in shown and "lr=0.25" in shown and "one of adam, sgd" in shown


def test_json_goes_in_and_out():
    config = tokens("size=1,2,3", "clip=2")
    assert Config.build(config.as_dict()) == config


def test_resume_rules():
    old = Config().as_dict()
    new = Config(lr=0.5, resume="auto")
    assert compare(old, new) == {"same": {}, "change": {"lr": (0.001, 0.5)}, "call": {"resume": (False, "auto")}}
    assert check_resume(old, new, "here") == ["lr: 0.001 -> 0.5"]
    with pytest.raises(UserError, match=r"here was made with other settings: width \(8 there, 16 here\), inner.beta"):
        check_resume(old, Config(width=16, inner=Inner(beta=0.5)), "here")
    del old["width"]  # an option that an older run did not have
    assert check_resume(old, Config(width=16), "here") == []


class Entry(Options):
    size: Count = option(1, "size", resume="change")


class Sets(Options):
    model_config = ConfigDict(extra="allow")
    __pydantic_extra__: dict[str, Entry]
    all: Count = option(1, "of all sets")


class WithSets(Options):
    sets: Sets = option(..., "sets")
    source: str = option("", "file")


def test_entries_of_any_name_are_judged_and_compared():
    made = WithSets.build({"sets": {"mine": {"size": 3}}})
    assert made.as_dict()["sets"] == {"all": 1, "mine": {"size": 3}}
    with pytest.raises(UserError, match=r"sets\.mine\.size=-1: expected a whole number of at least 1"):
        WithSets.build({"sets": {"mine": {"size": -1}}})
    with pytest.raises(UserError, match=r"sets\.mine=3: expected a group"):
        WithSets.build({"sets": {"mine": 3}})
    assert compare({"sets": {"mine": {"size": 4}}}, made)["change"] == {"sets.mine.size": (4, 3)}


def test_positional_words():
    made, given = from_flags(Entry, ["7"], positional=("size",))
    assert made.size == 7 and given == {"size": 7}
    with pytest.raises(UserError, match="unexpected argument 8"):
        from_flags(Entry, ["7", "8"], positional=("size",))
