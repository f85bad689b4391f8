#!/usr/bin/env bash
# MNIST parity leakage (GlanceNets, figures 4 and 6): CBNM, VAE and GlanceNet trained on 4 and 5, tested on the other digits.
# Environment: SEED ("0 1 2"), MAX_ITER (training steps of every model; as published: 21 epochs for CBNM, 51 for the others),
# DATA_ROOT (<repository>/data), PYTHON (python), OUT (runs/mnist_parity). MASKING_FACT must be 100: every training image is
# supervised. Further options go to glancenet/mnist_parity.py.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if [ "${MASKING_FACT:-100}" != 100 ]; then
    echo "error: MASKING_FACT=$MASKING_FACT: the parity test has no partial supervision; leave it out" >&2
    exit 2
fi
read -ra seeds <<< "${SEED:-0 1 2}"
exec "${PYTHON:-python}" "$root/glancenet/mnist_parity.py" --seeds "${seeds[@]}" --data_root "${DATA_ROOT:-$root/data}" \
    --out "${OUT:-runs/mnist_parity}" ${MAX_ITER:+--max_iter "$MAX_ITER"} "$@"
