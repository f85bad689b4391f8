#!/usr/bin/env bash
# The MNIST flow with the inverse convolution, without it, and with FInC Flow's masked convolution: same depth, same seeds,
# a 1x1 convolution in each step of all three (without one, nothing mixes the channels where the layer is left out).
# Finished runs are kept, interrupted ones go on; the last lines are the bits/dim on the 10,000 test images.
# Environment: LAYERS ("inverse none finc"), SEED (0; several: "0 1 2"), EPOCHS (100), WIDTH of the couplings (512),
# DATA_ROOT (<repository>/data), PYTHON (python), OUT (runs/inv_flow). Further options go to the training.
# The figures of inv_flow/README.md: WIDTH=64 EPOCHS=5 bash scripts/inv_flow_mnist_compare.sh --warmup_epochs 1 --device cpu
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export DATA_ROOT=${DATA_ROOT:-$root/data}
out=${OUT:-runs/inv_flow}
read -ra layers <<< "${LAYERS:-inverse none finc}"
read -ra seeds <<< "${SEED:-0}"
flags=(--conv1x1 --coupling_width "${WIDTH:-512}" --split_width "${WIDTH:-512}" --epochs "${EPOCHS:-100}" --eval_epochs 1
    --sample_epochs "${EPOCHS:-100}" --log_timing)
for seed in "${seeds[@]}"; do
    for layer in "${layers[@]}"; do
        run=$out/mnist_${layer}_w${WIDTH:-512}_$seed
        "${PYTHON:-python}" "$root/inv_flow/inv_flow_mnist.py" --layer "$layer" --seed "$seed" "${flags[@]}" --out "$run" \
            --resume auto "$@"
    done
done
for seed in "${seeds[@]}"; do
    for layer in "${layers[@]}"; do
        run=$out/mnist_${layer}_w${WIDTH:-512}_$seed
        echo "$layer, seed $seed: $(grep -o 'test_bpd [0-9.]*' "$run/log.txt" | tail -n 1)"
    done
done
