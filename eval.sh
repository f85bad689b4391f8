#!/usr/bin/env bash
# The whole LBAE evaluation of one experiment, or of every experiment in a folder. Run it inside:
#
#     cd lbae/<experiment> && ../../eval.sh [KEY=VALUE ...]
#     cd lbae/exp && ../../eval.sh feat=lenet            # lbae/exp: an experiment, or a folder of experiments
#
# Reconstructs the test set, generates as many images as it has by cov, random and int (a VAE: random), and appends FID,
# KID and precision/recall to results.txt; PR.pdf is the precision-recall curve. It stops at the first step that fails,
# with that step's exit code. methods=cov,independent names other generators; gen_imgs= another number of images;
# feat=, inception=, lenet_data=, mode=, prd=, kid_subsets=, kid_size= go to lbae/eval.py, device= and data_root= to every
# step, any other key to lbae/mnist.py, cifar10.py or celeba.py.
set -euo pipefail

root="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
if [[ -z "${PYTHON:-}" ]]; then
    PYTHON=python3
    [[ -z "${VIRTUAL_ENV:-}" && -x "$root/.venv/bin/python" ]] && PYTHON="$root/.venv/bin/python"
fi
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" DATA_ROOT="${DATA_ROOT:-$root/data}"

script_keys=() score_keys=() methods="" gen_imgs=""
for token in "$@"; do
    case "$token" in
        methods=*) methods="${token#*=}" ;;
        gen_imgs=*) gen_imgs="${token#*=}" ;;
        feat=* | inception=* | lenet_data=* | mode=* | prd=* | kid_subsets=* | kid_size=*) score_keys+=("$token") ;;
        device=* | data_root=*) script_keys+=("$token") score_keys+=("$token") ;;
        *) script_keys+=("$token") ;;
    esac
done

evaluate() { # in the current folder
    local known script reference methods_here method count folders=""
    known="$("$PYTHON" -m lbae.describe .)"
    read -r script reference methods_here <<<"$known"
    methods_here="${methods:-$methods_here}"
    local run=("$PYTHON" "$root/lbae/$script.py" l eval ${script_keys[@]+"${script_keys[@]}"})

    "${run[@]}"
    # counted after the step above, which writes the reference images
    count="${gen_imgs:-$(find "$reference" -maxdepth 1 \( -name '*.png' -o -name '*.jpg' \) | wc -l)}"
    for method in ${methods_here//,/ }; do
        local steps=()
        [[ "$method" == int ]] && steps=(batch_size_test=10 interpolate_steps=10)
        "${run[@]}" gen "sample_method=$method" "gen_imgs=$count" ${steps[@]+"${steps[@]}"}
    done
    for method in cov int random independent; do
        [[ ",$methods_here," == *",$method,"* ]] && folders+="generated/samples_$method,"
    done
    "$PYTHON" "$root/lbae/eval.py" "s=$reference" "t=${folders}reco" ${score_keys[@]+"${score_keys[@]}"}
}

if [[ -d models ]]; then
    evaluate
    exit
fi
found=0
for folder in */; do
    [[ -d "$folder/models" ]] || continue
    found=1
    echo "== ${folder%/}"
    cd "$folder"
    evaluate
    cd ..
done
if [[ $found == 0 ]]; then
    echo "error: $PWD is no experiment and holds none (a folder with models/); train one first" >&2
    exit 2
fi
