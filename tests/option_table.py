"""Wrong values for every option that a model declares, and a command run inside this process."""

import contextlib
import io
from collections.abc import Callable, Iterator
from typing import NamedTuple

from common.errors import run_command
from common.options import Options

WRONG = ("fast", "-3", "0", "nan", "inf", "-inf", "1e300", "99999999999999999999", "1.5", "true", "", "no such choice",
         "a,b", "\x00")  # fmt: skip


class Outcome(NamedTuple):
    """Exit code and what a command printed."""

    code: int
    out: str
    err: str


def option_names(model: type[Options]) -> list[str]:
    """The options of a model."""
    return list(model.model_fields)


def run_inside(main: Callable[[list[str]], object], argv: list[str]) -> Outcome:
    """`main(argv)` as its script would run it; any exception that a user would see as a traceback is raised."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = run_command(lambda: main(argv))
        except SystemExit as leave:
            code = leave.code or 0
    return Outcome(code, out.getvalue(), err.getvalue())


def judged(main: Callable[[list[str]], object], argv: list[str], word: Callable[[str], list[str]]) -> Iterator[str]:
    """What is wrong with the answers to each of `WRONG`; `word(value)` gives the words of the option under test."""
    for value in WRONG:
        found = run_inside(main, [*argv, *word(value)])
        if found.code not in (0, 2):
            yield f"{word(value)}: exit code {found.code}"
        if found.code == 2 and (not found.err.startswith("error: ") or len(found.err.strip().splitlines()) != 1):
            yield f"{word(value)}: {found.err!r} is not one line"
