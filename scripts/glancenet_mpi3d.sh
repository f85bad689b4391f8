#!/usr/bin/env bash
# GlanceNet on MPI3D toy (GlanceNets, figure 3, second row): the published settings and the conditional prior.
# Environment: SEED (883), MASKING_FACT (1), MAX_ITER (as published), DATA_ROOT (<repository>/data), PYTHON (python).
# Further options are passed on: bash scripts/glancenet_mpi3d.sh --device cpu. Results land in the current folder.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
data=${DATA_ROOT:-$root/data}
seed=${SEED:-883}
masking_fact=${MASKING_FACT:-1}
exec "${PYTHON:-python}" "$root/glancenet/main.py" --alg GlanceNet --name glancenet_mpi3d_${masking_fact}_${seed} \
    --dset_dir "$data" --dset_name mpi3d_toy --d_version full --n_classes 10 --gif_save false \
    --encoder PadlessGaussianConv64 --decoder SimpleConv64 --z_dim 21 --z_class 21 --conditional_prior true \
    --w_kld 1 --w_recon 1 --latent_loss BCE --label_weight 1000 --latent_weight 7000 --classification_epoch 1000 \
    --lr_G 0.001 --lr_scheduler ExponentialLR --lr_scheduler_args gamma=0.99 --batch_size 100 --max_epoch 30 \
    ${MAX_ITER:+--max_iter "$MAX_ITER"} --evaluation_metric dci --evaluate_iter 1000000 --test_iter 8294 \
    --masking_fact "$masking_fact" --seed "$seed" --use_wandb false "$@"
