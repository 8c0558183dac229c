#!/usr/bin/env bash
# How much of a score is luck: one config and fold, trained with several seeds, and the spread of the out-of-fold mIoU.
#     bash scripts/seeds.sh demo 0 1 2                      # CONFIG SEED SEED ...; FOLD=0; SET="epochs=4 workers=2"
# Folds stay those of the cache; goes on where it was stopped.
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -ge 3 ] || { echo 'usage: scripts/seeds.sh CONFIG SEED SEED [SEED ...]' >&2; exit 2; }
[ "$(printf '%s\n' "${@:2}" | sort | uniq -d)" = "" ] || { echo 'seeds.sh: error: a seed is there twice' >&2; exit 2; }

config=$1 fold=${FOLD:-0}
shift
read -ra changes <<<"${SET:-}"
cfg=(--cfg "configs/$config.yaml" --fold "$fold")
scores=()
for seed; do
    set=(--set "${changes[@]}" "seed=$seed" "name=$config-seed$seed")
    .venv/bin/python train.py "${cfg[@]}" --resume "${set[@]}"
    line=$(.venv/bin/python infer.py "${cfg[@]}" --split oof "${set[@]}" | grep '^mIoU')
    echo "seed $seed: $line"
    read -r _ score _ <<<"$line"
    scores+=("$score")
done
.venv/bin/python - "${scores[@]}" <<'PYTHON'
import statistics
import sys

scores = [float(text) for text in sys.argv[1:]]
spread = statistics.stdev(scores)
print(f'{len(scores)} seeds: mean mIoU {statistics.mean(scores):.4f}, standard deviation {spread:.4f}')
print(f'two runs that differ by less than {2 * 2**0.5 * spread:.4f} may differ by their seeds alone')
PYTHON
