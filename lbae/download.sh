#!/usr/bin/env bash
# Download and unpack released weights:  lbae/download.sh lbae/model_weights_urls.txt [--to FOLDER]
# Each line of the list is "URL file sha256"; archives are unpacked into FOLDER (default: lbae/).
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
if [[ -z "${PYTHON:-}" ]]; then
    PYTHON=python3
    [[ -z "${VIRTUAL_ENV:-}" && -x "$root/.venv/bin/python" ]] && PYTHON="$root/.venv/bin/python"
fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec "$PYTHON" -m lbae.download "$@"
