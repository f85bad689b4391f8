"""Imported by a script before anything slow: from here on SIGTERM and Ctrl-C end it with exit code 130.

Importing torch takes seconds, in which a job may be cancelled; there is nothing to save yet.
`common.errors.run_command` takes over when the work begins.
"""

import os
import signal
import sys


def _leave(number, frame):
    print("interrupted", file=sys.stderr, flush=True)
    os._exit(130)


for _number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(_number, _leave)
