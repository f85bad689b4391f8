#!/usr/bin/env bash
# The whole LBAE evaluation of one experiment, or of every experiment in a folder. Run it inside:
#
#     cd lbae/<experiment> && ../../eval.sh [KEY=VALUE ...]
#     cd lbae/exp && ../../eval.sh feat=lenet            # an experiment, a folder of experiments, or the released model
#
# `eval.sh help` lists the options; lbae/protocol.py says what is done.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
if [[ -z "${PYTHON:-}" ]]; then
    PYTHON=python3
    [[ -z "${VIRTUAL_ENV:-}" && -x "$root/.venv/bin/python" ]] && PYTHON="$root/.venv/bin/python"
fi
exec "$PYTHON" "$root/lbae/protocol.py" "$@"
