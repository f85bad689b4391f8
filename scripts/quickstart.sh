#!/usr/bin/env bash
# Install everything, then train, evaluate and picture all five papers in small, and write one page about it.
#   bash scripts/quickstart.sh                     results/quickstart/index.html; what is done already is skipped
#   bash scripts/quickstart.sh --paper lbae        one paper (may be repeated)
#   bash scripts/quickstart.sh --help              all options
# Environment: VENV (.venv), PYTHON (python3, to make it), DATA_ROOT (data): real MNIST is used when it is there.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

python=${PYTHON:-python3}
for word in "$@"; do
    case "$word" in -h | --help) exec "$python" scripts/quickstart.py --help ;; esac
done
# a wrong option is told before minutes of installation; setup.sh speaks about a Python that is missing or too old
if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
    "$python" scripts/quickstart.py --dry-run "$@" >/dev/null
fi
bash scripts/setup.sh
exec "${VENV:-.venv}/bin/python" scripts/quickstart.py "$@"
