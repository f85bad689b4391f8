#!/usr/bin/env bash
# A small study of minutes: the flow with and without the inverse convolution, and FInC Flow, on scikit-learn's digits.
# Environment: LAYERS ("inverse none finc"), SEED (0; several: "0 1 2"), EPOCHS (30), PYTHON (python), OUT (runs/inv_flow).
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export DATA_ROOT=${DATA_ROOT:-$root/data}
out=${OUT:-runs/inv_flow}
read -ra layers <<< "${LAYERS:-inverse none finc}"
read -ra seeds <<< "${SEED:-0}"
epochs=${EPOCHS:-30}
for seed in "${seeds[@]}"; do
    for layer in "${layers[@]}"; do
        "${PYTHON:-python}" "$root/inv_flow/inv_flow_mnist.py" --dataset digits --levels 17 --block_size 4 --coupling snf \
            --coupling_width 64 --split_width 64 --conv1x1 --activation SLR --scheduler_name none --warmup_epochs 0 \
            --epochs "$epochs" --eval_epochs "$epochs" --sample_epochs "$epochs" --layer "$layer" --seed "$seed" \
            --out "$out/digits_${layer}_$seed" --overwrite "$@"
    done
done
for seed in "${seeds[@]}"; do
    for layer in "${layers[@]}"; do
        echo "$layer, seed $seed: $(grep -o 'test_bpd [0-9.]*' "$out/digits_${layer}_$seed/log.txt" | tail -n 1)"
    done
done
