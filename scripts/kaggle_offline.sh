#!/usr/bin/env bash
# Pack runs for a notebook without the internet: code, checkpoints, thresholds and wheels, in one folder to upload as a data set.
#     bash scripts/kaggle_offline.sh RUN...     # output/<name> of trained runs; OUT=output/offline, PACKAGES=wheels|installed|none
# notebooks/offline.ipynb predicts from it. PACKAGES=none where the notebook's image has torch, timm and the others already.
set -euo pipefail
[ $# -gt 0 ] || { echo 'usage: scripts/kaggle_offline.sh RUN...' >&2; exit 2; }
runs=()
for run in "$@"; do
    [ -d "$run" ] || { echo "kaggle_offline.sh: error: $run: no such folder; expected output/<name> of a trained run" >&2; exit 2; }
    runs+=("$(realpath "$run")")
done
out=$(realpath -m "${OUT:-$(dirname "$0")/../output/offline}")
cd "$(dirname "$0")/.."
exec .venv/bin/python -m tools.offline pack "${runs[@]}" --out "$out" --packages "${PACKAGES:-wheels}"
