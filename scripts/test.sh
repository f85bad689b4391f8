#!/usr/bin/env bash
# Set up the environment, then run the whole test suite, one process a core.
# Arguments go to pytest: bash scripts/test.sh tests/lbae -x      (-n 0: in one process)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
exec "${VENV:-.venv}/bin/python" -m pytest -n "${TEST_PROCESSES:-auto}" --dist loadfile --no-loadscope-reorder "$@"
