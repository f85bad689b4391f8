"""Errors that a user can mend, and how a script turns them into one line and an exit code."""

import difflib
import errno
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

EXIT_USER_ERROR = 2
EXIT_NON_FINITE = 3
EXIT_INTERRUPTED = 130


class UserError(Exception):
    """Something the user can mend: a wrong option, a missing or foreign file. The message names the thing and the
    remedy.
    """


class MissingDataError(UserError):
    """A data set is not there. A command that can do without it may say so and go on."""


class NonFiniteError(ArithmeticError):
    """A loss, a gradient or a weight stopped being finite. The message names the step and the layer."""


def suggest(name: str, known: Iterable[str]) -> str:
    """` (did you mean 'x'?)` with the nearest of `known`, or an empty string when nothing is near."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f" (did you mean '{near[0]}'?)" if near else ""


def is_web_page(start: bytes) -> bool:
    """Whether the first bytes of a file are those of a web page: a download that was refused, saved under its name."""
    page = rb"(\xef\xbb\xbf)?\s*(<!--.*?-->\s*)?<(!doctype html|\?xml|html|head)"
    return re.match(page, start[:1024], re.I | re.S) is not None


def refuse_web_page(path: str | os.PathLike) -> None:
    """Raise UserError when the file at `path` is a web page (a missing or unreadable one passes)."""
    try:
        with open(path, "rb") as file:
            start = file.read(1024)
    except OSError:
        return
    if is_web_page(start):
        raise UserError(f"{path} is a web page, not the file: open its address in a browser and save the file itself")


def disk_full(error: BaseException) -> bool:
    """Whether an error, or what caused it, is that of a full disk, an exceeded quota or file size limit."""
    # torch wraps a failed write of its archive into RuntimeError and keeps the cause as context
    seen: BaseException | None = error
    while seen is not None:
        if isinstance(seen, OSError) and seen.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            return True
        seen = seen.__cause__ or seen.__context__
    return False


def _interrupt(number, frame):
    raise KeyboardInterrupt


@contextmanager
def _signals_interrupt() -> Iterator[None]:
    """SIGTERM and Ctrl-C raise KeyboardInterrupt in this block, where no training loop waits for them."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    earlier = {number: signal.signal(number, _interrupt) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in earlier.items():
            signal.signal(number, handler)


def run_command(main: Callable[[], object]) -> int:
    """Run a script's `main` and return its exit code: 0, 2 (`UserError`), 3 (`NonFiniteError`) or 130 (interrupted).

    A trainer that SIGTERM or Ctrl-C reaches saves its state and raises KeyboardInterrupt: 130, so that nothing which
    follows takes the run for a finished one.

    Scripts end with `sys.exit(run_command(main))`. Any other exception is a defect of ours and keeps its traceback.
    """
    try:
        with _signals_interrupt():
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
    except Exception as error:
        if not disk_full(error):
            raise
        name = getattr(error, "filename", None) or "a file"
        print(f"error: cannot write {name}: the disk is full (or over its quota); free some space", file=sys.stderr)
        return EXIT_USER_ERROR
