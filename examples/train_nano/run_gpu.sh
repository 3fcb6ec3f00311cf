#!/usr/bin/env bash
# Trains orthrus-nano in two visits to a GPU machine, each below ten minutes in all, start-up and compilation included.
#   run_gpu.sh first OUT        stage ar, then a short stage diff to prove it; OUT/ar is what the second visit needs
#   run_gpu.sh second AR OUT    stage diff from the checkpoint folder AR; OUT/diff is what export.py reads
# LIMIT is the time of the whole visit in seconds. The results are in OUT as soon as they exist.
set -euo pipefail
cd "$(dirname "$0")/../.."
export PYTHONUNBUFFERED=1 OMP_NUM_THREADS=2
limit=${LIMIT:-585}
nano=examples.train_nano
work=$(mktemp -d)

first() {
    local out=$1
    python3 -m $nano.train ar --verify --minutes 8 --deadline $((limit - 125)) --save weights --out "$out/ar" ${AR_ARGS:-}
    # What follows only proves the second stage: the AR checkpoint is safe already.
    python3 -m $nano.train diff --verify --init "$out/ar" --minutes 8 --deadline $((limit - 32 - SECONDS)) \
        --probe-seconds 15 --save weights --out "$work/diff" ${DIFF_ARGS:-}
    python3 -m $nano.export "$work/diff" --out "$work/nano"
    timeout $((limit - SECONDS)) python3 -m $nano.evaluate "$work/nano" --num 8 --out "$out/eval_first.json"
}

second() {
    local ar=$1 out=$2
    python3 -m $nano.train diff --verify --init "$ar" --minutes 10 --deadline $((limit - 60)) --out "$out/diff" ${DIFF_ARGS:-}
    python3 -m $nano.export "$out/diff" --out "$work/nano"
    timeout $((limit - SECONDS)) python3 -m $nano.evaluate "$work/nano" --num 100 --show 2 --out "$out/eval.json"
}

case "${1:-}" in
    first) first "$2" ;;
    second) second "$2" "$3" ;;
    *) sed -n 2,6p "$0"; exit 2 ;;
esac
