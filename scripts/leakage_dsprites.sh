#!/usr/bin/env bash
# Position leakage on dSprites (GlanceNets, figure 5): train and compare CBNM, VAE and GlanceNet, with and without rejection.
#   bash scripts/leakage_dsprites.sh                      all three models
#   bash scripts/leakage_dsprites.sh glancenet            one of glancenet, cbnm, vae
#   bash scripts/leakage_dsprites.sh glancenet cbnm --max_epoch 25      further options go to the training
# Environment: SEED (883; several: "0 1 2"), MASKING_FACT (100; the data set is fully supervised whatever it says), MAX_ITER
# (350 epochs), DATA_ROOT (<repository>/data), PYTHON (python), OUT (runs/leakage_dsprites).
# Data: python glancenet/prepare_dsprites_leakage.py --out DATA_ROOT (--source sprites renders them).
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
models=()
while [ $# -gt 0 ] && [ "${1#-}" = "$1" ]; do
    models+=("$1")
    shift
done
[ ${#models[@]} -gt 0 ] || models=(cbnm vae glancenet)
read -ra seeds <<< "${SEED:-883}"
exec "${PYTHON:-python}" "$root/glancenet/leakage.py" --models "${models[@]}" \
    --seeds "${seeds[@]}" --dset_dir "${DATA_ROOT:-$root/data}" --out "${OUT:-runs/leakage_dsprites}" -- \
    --masking_fact "${MASKING_FACT:-100}" ${MAX_ITER:+--max_iter "$MAX_ITER"} "$@"
