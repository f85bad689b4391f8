#!/usr/bin/env bash
# GlanceNet against CBNM at 1, 10 and 100 % of supervision under published and equal settings, and a sweep of the concept weight.
# Environment: SEED (883; several: "0 1 2"), MASKING_FACT ("1 10 100"), MAX_ITER (250000), DATA_ROOT (<repository>/data),
# DATASET_NAME (dsprites_full; sprites renders them), PYTHON (python), OUT (runs/compare). Further options go to the training.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
read -ra seeds <<< "${SEED:-883}"
read -ra supervision <<< "${MASKING_FACT:-1 10 100}"
exec "${PYTHON:-python}" "$root/glancenet/compare.py" --dset_name "${DATASET_NAME:-dsprites_full}" \
    --dset_dir "${DATA_ROOT:-$root/data}" --seeds "${seeds[@]}" --supervision "${supervision[@]}" \
    --out "${OUT:-runs/compare}" -- ${MAX_ITER:+--max_iter "$MAX_ITER"} "$@"
