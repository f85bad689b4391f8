#!/usr/bin/env bash
# Make .venv with everything that the repository needs, and build the inverse-convolution op in it.
#   bash scripts/setup.sh              pip's own torch, on Linux with CUDA: 7.8 GB in all; does nothing when up to date
#   bash scripts/setup.sh --cpu        PyTorch's wheels without CUDA (Linux on x86: about 3.0 GB in all)
#   bash scripts/setup.sh --light      without TensorFlow (1.3 GB less): only the metrics' frozen Inception graph needs it
#   bash scripts/setup.sh --dry-run    print what would be run
#   PYTHON=python3.12 bash scripts/setup.sh
#   VENV=/path/to/venv                 another place for the environment
# uv is used instead of pip when it is installed. Without --cpu or --light, an environment made with them is kept.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() { echo "setup: $1" >&2; exit 2; }

cpu= light= dry=
for word in "$@"; do
    case "$word" in
        --cpu) cpu=1 ;;
        --light) light=1 ;;
        --dry-run) dry=1 ;;
        -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//p}' "${BASH_SOURCE[0]}"; exit 0 ;;
        *) fail "unknown option $word: --cpu, --light, --dry-run or --help" ;;
    esac
done

venv=${VENV:-.venv}
python=${PYTHON:-python3}
command -v "$python" >/dev/null || fail "$python is missing: install Python 3.11 or newer"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$("$python" --version) is too old: install Python 3.11 or newer, or name one (PYTHON=python3.12)"
if command -v uv >/dev/null; then
    make_venv=(uv venv --quiet --python "$python" "$venv")
    install=(uv pip install --quiet --python "$venv/bin/python")
else
    "$python" -c 'import ensurepip, venv' 2>/dev/null || fail "$python has no venv module: install it (Debian: python3-venv)"
    make_venv=("$python" -m venv "$venv")
    install=("$venv/bin/python" -m pip install --quiet --disable-pip-version-check)
fi
command -v c++ >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null ||
    echo "setup: no C++ compiler: the inverse convolution will run in plain PyTorch (slower); install g++ and run this again" >&2

# What the environment was made from; a change of any of it makes the next call do the work again.
stamp=$venv/.setup-stamp
made=$([ -f "$stamp" ] && tail -n 1 "$stamp" || true)  # the options it was made with
case "$made" in options:*cpu*) cpu=1 ;; esac
case "$made" in options:*light*) light=1 ;; esac
kind="options:${cpu:+ cpu}${light:+ light}"
state=$(cat requirements.txt pyproject.toml inv_flow/utils/inv_conv_cuda/setup.py \
    $(find inv_flow/utils/inv_conv_cuda -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.cuh' | grep -v /build/ | LC_ALL=C sort) \
    2>/dev/null | cksum; "$python" --version; pwd; echo "${INV_CONV_CPU_ONLY:-0}"; echo "$kind")
if [ -z "$dry" ] && [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$state" ] && "$venv/bin/python" -c 'import torch, torchvision, common' 2>/dev/null; then
    echo "setup: $venv is up to date"
    exit 0
fi

run() { if [ -n "$dry" ]; then printf '%q ' "$@"; echo; else "$@"; fi }

[ -x "$venv/bin/python" ] || run "${make_venv[@]}"
if [ -n "$cpu" ] && [ "$(uname -s)-$(uname -m)" = Linux-x86_64 ]; then
    echo "setup: --cpu: torch without CUDA from PyTorch's own index (about 200 MB to fetch, 0.7 GB on the disk)"
    run "${install[@]}" "torch>=2.11" "torchvision>=0.26" --index-url https://download.pytorch.org/whl/cpu
elif [ -n "$cpu" ]; then
    echo "setup: --cpu: the ordinary wheels of this system are that already"
fi
echo "setup: installing the packages of requirements.txt into $venv (a few minutes)"
run "${install[@]}" --upgrade pip setuptools wheel
if [ -n "$light" ]; then
    echo "setup: --light: without TensorFlow (1.3 GB less)"
    # shellcheck disable=SC2046  # a word a requirement
    run "${install[@]}" -e '.[reproduce,explore,parts]' $(sed -n '/^tensorflow/d;/^[a-z]/p' requirements.txt)
else
    run "${install[@]}" -r requirements.txt
fi
if [ -n "$dry" ]; then
    echo "(cd inv_flow/utils/inv_conv_cuda && python setup.py install)"
    exit 0
fi
"$venv/bin/python" -c 'import torch, torchvision' || fail "torch and torchvision do not fit each other in $venv: remove $venv and run this again"

if [ -f inv_flow/utils/inv_conv_cuda/setup.py ]; then
    echo "setup: building the inverse-convolution op"
    log=$venv/inv_conv_build.log
    op_python=$(cd "$venv/bin" && pwd)/python
    if (cd inv_flow/utils/inv_conv_cuda && "$op_python" setup.py install) >"$log" 2>&1; then
        grep '^inverse convolution:' "$log" || true
    else
        echo "setup: the op did not build (see $log); the inverse convolution will run in plain PyTorch" >&2
    fi
fi
printf '%s' "$state" >"$stamp"
echo "setup: done; use $venv/bin/python, or: source $venv/bin/activate"
