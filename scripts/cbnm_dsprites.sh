#!/usr/bin/env bash
# Concept bottleneck on dSprites (GlanceNets, figure 3, first row): the published settings.
# Environment: SEED (883), MASKING_FACT (1), MAX_ITER (as published), DATA_ROOT (<repository>/data), PYTHON (python),
# DATASET_NAME (dsprites_full, which is downloaded where it is absent, 26 MB; sprites renders them).
# Further options are passed on: bash scripts/cbnm_dsprites.sh --device cpu. Results land in the current folder.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
data=${DATA_ROOT:-$root/data}
seed=${SEED:-883}
masking_fact=${MASKING_FACT:-1}
exec "${PYTHON:-python}" "$root/glancenet/main.py" --alg CBNM --name cbnm_dsprites_${masking_fact}_${seed} \
    --dset_dir "$data" --dset_name "${DATASET_NAME:-dsprites_full}" --d_version full --include_labels 0 1 2 3 4 5 \
    --encoder SimpleGaussianConv64 --decoder SimpleConv64 --z_dim 7 --z_class 7 \
    --label_weight 100 --classification_epoch 20 --batch_size 64 --show_loss 1000 \
    --max_iter "${MAX_ITER:-250000}" --evaluation_metric dci --evaluate_iter 125000 --test_iter 9216 \
    --masking_fact "$masking_fact" --seed "$seed" --use_wandb false "$@"
