#!/usr/bin/env bash
# Make .venv with everything that the repository needs, and build the inverse-convolution op in it.
#   bash scripts/setup.sh            does nothing when the environment is already up to date
#   PYTHON=python3.12 bash scripts/setup.sh
#   VENV=/path/to/venv               another place for the environment
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

fail() { echo "setup: $1" >&2; exit 2; }

venv=${VENV:-.venv}
python=${PYTHON:-python3}
command -v "$python" >/dev/null || fail "$python is missing: install Python 3.11 or newer"
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$("$python" --version) is too old: install Python 3.11 or newer, or name one (PYTHON=python3.12)"
"$python" -c 'import ensurepip, venv' 2>/dev/null || fail "$python has no venv module: install it (Debian: python3-venv)"
command -v c++ >/dev/null || command -v g++ >/dev/null || command -v clang++ >/dev/null ||
    echo "setup: no C++ compiler: the inverse convolution will run in plain PyTorch (slower); install g++ and run this again" >&2

# What the environment was made from; a change of any of it makes the next call do the work again.
stamp=$venv/.setup-stamp
state=$(cat requirements.txt pyproject.toml inv_flow/utils/inv_conv_cuda/setup.py \
    $(find inv_flow/utils/inv_conv_cuda -name '*.cpp' -o -name '*.cu' -o -name '*.h' -o -name '*.cuh' | grep -v /build/ | LC_ALL=C sort) \
    2>/dev/null | cksum; "$python" --version; pwd; echo "${INV_CONV_CPU_ONLY:-0}")
if [ -f "$stamp" ] && [ "$(cat "$stamp")" = "$state" ] && "$venv/bin/python" -c 'import torch, torchvision, common' 2>/dev/null; then
    echo "setup: $venv is up to date"
    exit 0
fi

[ -x "$venv/bin/python" ] || "$python" -m venv "$venv"
echo "setup: installing the packages of requirements.txt into $venv (torch is large: a few minutes)"
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check --upgrade pip setuptools wheel
"$venv/bin/python" -m pip install --quiet --disable-pip-version-check -r requirements.txt
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
