"""Errors that a user can mend, and how a script turns them into one line and an exit code."""

import difflib
import os
import sys
from collections.abc import Callable, Iterable

EXIT_USER_ERROR = 2
EXIT_NON_FINITE = 3
EXIT_INTERRUPTED = 130


class UserError(Exception):
    """Something the user can mend: a wrong option, a missing or foreign file. The message names the thing and the
    remedy.
    """


class NonFiniteError(ArithmeticError):
    """A loss, a gradient or a weight stopped being finite. The message names the step and the layer."""


def suggest(name: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` with the nearest of `known`, or an empty string when nothing is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean '{near[0]}'?)" if near else ""


def run_command(main: Callable[[], object]) -> int:
    """Run a script's `main` and return its exit code: 0, 2 (`UserError`), 3 (`NonFiniteError`) or 130 (Ctrl-C).

    Scripts end with `sys.exit(run_command(main))`. Any other exception is a defect of ours and keeps its traceback.
    """
    try:
        main()
        sys.stdout.flush()
        return 0
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_USER_ERROR
    except NonFiniteError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return EXIT_NON_FINITE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # the reader of our output went away (`... | head`); point stdout elsewhere so that the interpreter's last flush
        # is quiet
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
