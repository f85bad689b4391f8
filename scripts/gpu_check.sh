#!/usr/bin/env bash
# Everything that needs a GPU, in pieces of at most 8 minutes, resumable: tests, sanitizer, tables, benchmarks, checks.
#   bash scripts/gpu_check.sh                      all pieces, then reproduce.py for the rest of the time
#   bash scripts/gpu_check.sh tests op_table       these pieces only, again
#   bash scripts/gpu_check.sh --list               their names and whether they are done
# Environment: OUT (results/gpu_check): <piece>.txt, <piece>.json (exit code, seconds, hardware); MINUTES (25), DEVICE (cuda;
# cpu rehearses all of it in small), PYTHON (.venv/bin/python).
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-.venv/bin/python}
out=${OUT:-results/gpu_check}
device=${DEVICE:-cuda}
limit=$((60 * ${MINUTES:-25}))
begin=$(date +%s)
small=
[ "$device" = cpu ] && small=1

tests() { if [ -n "$small" ]; then "$python" -m pytest -n 0 -q -m gpu tests/inv_flow --collect-only -o addopts=; else "$python" -m pytest -n 0 -m gpu tests; fi; }
sanitizer() {
    command -v compute-sanitizer >/dev/null || { echo "no compute-sanitizer here"; return 0; }
    for tool in racecheck memcheck; do
        compute-sanitizer --tool "$tool" --error-exitcode 9 "$python" -m pytest -n 0 -m gpu tests/inv_flow || return
    done
}
op_table() { "$python" -m inv_flow.utils.inv_conv_cuda.benchmark --device "$device" --json "$out/op_table.figures.json" ${small:+--shape 2,4,8,8,3 --repeats 2 --threads 1}; }
benchmark() { # paper, further options; the CPU rehearsal only judges the options
    "$python" -m "$1.benchmark" --device "$device" ${small:+--dry-run} "${@:2}"
}
determinism() { # two runs give the same losses, and one that was interrupted, too
    "$python" -m pytest -n 0 -q tests/front/test_determinism.py tests/front/test_resume.py ${small:+--collect-only}
}
two_processes() {
    if [ -z "$small" ] && [ "$(nvidia-smi -L | wc -l)" -lt 2 ]; then echo "one GPU: nothing to do"; return 0; fi
    "$python" -m torch.distributed.run --standalone --nproc_per_node=2 inv_flow/inv_flow_mnist.py --dataset digits --levels 17 \
        --block_size 1 --coupling_width 8 --split_width 8 --epochs 1 --device "$device" --overwrite --out "$out/two_processes.run"
}
pieces=(tests sanitizer op_table determinism two_processes)
for paper in lbae glancenet latent_flow inv_flow nfpi; do
    [ -f "$paper/benchmark.py" ] && pieces+=("benchmark_$paper" "benchmark_${paper}_amp")
done

run() { # a piece in a process of its own, its output and its record beside each other
    local piece=$1 code start seconds work
    case "$piece" in
        benchmark_*_amp) work=(benchmark "${piece#benchmark_}") && work=(benchmark "${work[1]%_amp}" --amp) ;;
        benchmark_*) work=(benchmark "${piece#benchmark_}") ;;
        *) work=("$piece") ;;
    esac
    [[ " ${pieces[*]} " == *" $piece "* ]] || { echo "error: no piece $piece; --list names them" >&2; exit 2; }
    start=$(date +%s)
    echo "gpu_check: $piece"
    (
        "${work[@]}" >"$out/$piece.txt" 2>&1 &
        child=$!
        ( sleep 480; kill -TERM "$child" ) >/dev/null 2>&1 &  # holds nobody's pipe
        watch=$!
        wait "$child"; code=$?
        { pkill -P "$watch"; kill "$watch"; } 2>/dev/null
        exit "$code"
    )
    code=$?
    seconds=$(($(date +%s) - start))
    hardware=$("$python" -c 'from scripts.job import hardware; print(hardware())' 2>/dev/null || uname -m)
    printf '{"piece": "%s", "exit": %d, "seconds": %d, "device": "%s", "hardware": "%s", "commit": "%s"}\n' \
        "$piece" "$code" "$seconds" "$device" "$hardware" "$(git rev-parse --short=7 HEAD 2>/dev/null)" >"$out/$piece.part"
    mv "$out/$piece.part" "$out/$piece.json"
    [ "$code" = 0 ] || { echo "gpu_check: $piece FAILED, exit code $code: $(tail -n 1 "$out/$piece.txt")"; failed=1; }
}

[ "$device" = cpu ] || command -v nvidia-smi >/dev/null || { echo "error: no GPU here; DEVICE=cpu rehearses the pieces" >&2; exit 2; }
mkdir -p "$out"
failed=
if [ "${1:-}" = --list ]; then
    for piece in "${pieces[@]}"; do echo "$piece $([ -f "$out/$piece.json" ] && cat "$out/$piece.json")"; done
    exit 0
fi
if [ $# -gt 0 ]; then
    for piece in "$@"; do run "$piece"; done
else
    for piece in "${pieces[@]}"; do
        grep -qs "\"exit\": 0, .*\"device\": \"$device\"" "$out/$piece.json" && continue
        [ $(($(date +%s) - begin)) -ge "$limit" ] && { echo "gpu_check: the time is over; the same command goes on"; exit 1; }
        run "$piece"
    done
    left=$((limit - $(date +%s) + begin))
    hours=$(awk "BEGIN { print $left / 3600 }")
    if [ "$left" -gt 60 ]; then
        "$python" scripts/reproduce.py --hours "$hours" --device "$device" ${small:+--dry-run --paper nfpi} || failed=1
    fi
fi
echo "gpu_check: $(ls "$out"/*.json | wc -l) records in $out"
exit "${failed:-0}"
