#!/usr/bin/env bash
# Do the tests notice a changed line? Mutants of the files that hold one paper's method, judged by the closest tests.
#   bash scripts/mutation.sh lbae|glancenet|latent_flow|inv_flow|nfpi|common [--mutants 40] [--seed 0] [--only FILE] [--json FILE]
# Needs the extra: pip install -e .[dev]. Works in a copy of the tree. The table of results stands in tests/README.md.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root"
exec "${PYTHON:-python}" tests/mutation.py "$@"
