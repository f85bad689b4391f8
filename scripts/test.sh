#!/usr/bin/env bash
# Set up the environment, then run the whole test suite. Arguments go to pytest: bash scripts/test.sh tests/lbae -x
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh
exec "${VENV:-.venv}/bin/python" -m pytest "$@"
