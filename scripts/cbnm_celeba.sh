#!/usr/bin/env bash
# Concept bottleneck on CelebA (GlanceNets, figure 3, third row): the published settings (64 latents; the paper says 10).
# Environment: SEED (883), MASKING_FACT (1), MAX_ITER (as published), DATA_ROOT (<repository>/data), PYTHON (python).
# Further options are passed on: bash scripts/cbnm_celeba.sh --device cpu. Results land in the current folder.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
data=${DATA_ROOT:-$root/data}
seed=${SEED:-883}
masking_fact=${MASKING_FACT:-1}
exec "${PYTHON:-python}" "$root/glancenet/main.py" --alg CBNM --name cbnm_celeba_${masking_fact}_${seed} \
    --dset_dir "$data" --dset_name celebA --n_classes 4 --gif_save false \
    --encoder EncConv64 --decoder SimpleConv64 --z_dim "${Z_DIM:-64}" --z_class "${Z_DIM:-64}" \
    --latent_loss BCE --label_weight 1 --latent_weight 2 --classification_epoch 1000 \
    --lr_scheduler ExponentialLR --lr_scheduler_args gamma=0.8 --batch_size 100 --max_epoch 30 \
    ${MAX_ITER:+--max_iter "$MAX_ITER"} --evaluate_iter 1000000 --test_iter 1620 \
    --masking_fact "$masking_fact" --seed "$seed" --use_wandb false "$@"
