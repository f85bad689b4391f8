#!/usr/bin/env bash
# Tables 7 (image size) and 10 (kernel size) of Inverse-Flow, and the share of the inverse layers in a training step.
# Environment: OUT (runs/inv_flow/timing), PYTHON (python). Further options go to the two tables: --repeats 3 --device cpu.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export DATA_ROOT=${DATA_ROOT:-$root/data}
out=${OUT:-runs/inv_flow/timing}
"${PYTHON:-python}" "$root/inv_flow/timing.py" --share --out "$out"
"${PYTHON:-python}" "$root/inv_flow/timing.py" --table 7 --out "$out" "$@"
exec "${PYTHON:-python}" "$root/inv_flow/timing.py" --table 10 --out "$out" "$@"
