#!/usr/bin/env bash
# Measure how much of a score is luck: train one config and fold with several seeds, and print the spread of the out-of-fold mIoU.
#     bash scripts/seeds.sh demo 0 1 2                      # CONFIG SEED SEED ...; FOLD=0; SET="epochs=4 workers=2"
# All seeds use the folds of the cache. Run it again to continue after a stop.
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -ge 3 ] || { echo 'usage: scripts/seeds.sh CONFIG SEED SEED [SEED ...]' >&2; exit 2; }
[ "$(printf '%s\n' "${@:2}" | sort | uniq -d)" = "" ] || { echo 'seeds.sh: error: a seed is given twice' >&2; exit 2; }

config=$1 fold=${FOLD:-0}
shift
read -ra changes <<<"${SET:-}"
for seed; do
    run=(--cfg "configs/$config.yaml" --fold "$fold" --set "${changes[@]}" "seed=$seed" "name=$config-seed$seed")
    .venv/bin/python train.py "${run[@]}" --resume
    .venv/bin/python infer.py "${run[@]}" --split oof
done
.venv/bin/python - "$config" "$fold" "$*" "${changes[@]}" <<'PYTHON'
import statistics
import sys

from config import load_config
from data.coco import read_coco
from evaluate import read_confusions
from metrics import interval

config, fold, seeds, *changes = sys.argv[1:]
scores = []
for seed in seeds.split():
    cfg = load_config(f'configs/{config}.yaml', [*changes, f'name={config}-seed{seed}'])
    photos = read_coco(cfg.data_root, 'train', cfg.competition)
    counts = read_confusions(cfg.run_dir(int(fold)) / 'oof.csv', photos, len(cfg.classes)).counts()
    scores.append(interval(counts).value)
    print(f'seed {seed}: mIoU {scores[-1]:.4f}')
spread = statistics.stdev(scores)
print(f'{len(scores)} seeds: mean mIoU {statistics.mean(scores):.4f}, standard deviation {spread:.4f}')
print(f'two runs that differ by less than {2 * 2**0.5 * spread:.4f} may differ by their seeds alone')
PYTHON
