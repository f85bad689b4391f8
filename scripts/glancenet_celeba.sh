#!/usr/bin/env bash
# GlanceNet on CelebA (GlanceNets, figure 3, third row): the published settings.
# Environment: SEED (883), MASKING_FACT (1), MAX_ITER (as published), DATA_ROOT (<repository>/data), PYTHON (python).
# Further options are passed on: bash scripts/glancenet_celeba.sh --device cpu. Results land in the current folder.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
data=${DATA_ROOT:-$root/data}
seed=${SEED:-883}
masking_fact=${MASKING_FACT:-1}
exec "${PYTHON:-python}" "$root/glancenet/main.py" --alg GlanceNet --name glancenet_celeba_${masking_fact}_${seed} \
    --dset_dir "$data" --dset_name celebA --n_classes 4 --gif_save false \
    --encoder EncConv64 --decoder SimpleConv64 --z_dim 10 --z_class 10 --conditional_prior true \
    --w_kld 1 --w_recon 0.01 --latent_loss BCE --label_weight 1000 --latent_weight 7000 --classification_epoch 1000 \
    --lr_scheduler ExponentialLR --lr_scheduler_args gamma=0.9 --batch_size 100 --max_epoch 70 \
    ${MAX_ITER:+--max_iter "$MAX_ITER"} --evaluate_iter 1000000 --test_iter 1627 \
    --masking_fact "$masking_fact" --seed "$seed" --use_wandb false "$@"
