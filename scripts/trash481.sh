#!/usr/bin/env bash
# Do a whole small competition on the CPU: train two models of five folds from EfficientNet-Lite2's ImageNet weights, score
# them and their mean out of fold, predict the test photos, and check the submission. Run it again to continue after a stop.
#     bash scripts/trash481.sh DATA [OUTPUT]
set -euo pipefail
[ $# -ge 1 ] && [ $# -le 2 ] || { echo 'usage: scripts/trash481.sh DATA [OUTPUT]' >&2; exit 2; }
[ -f "$1/train_all.json" ] || { echo "trash481.sh: error: $1/train_all.json: no such file" >&2; exit 2; }
data=$(realpath "$1")
out=$(realpath -m "${2:-$(dirname "$0")/../output}")
cd "$(dirname "$0")/.."
bash scripts/setup.sh

# glibc keeps the memory that tensors free instead of returning it at once: CPU training steps have fewer page faults
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=2147483647 MALLOC_TOP_PAD_=268435456

python=.venv/bin/python
cfg=(--cfg configs/trash481.yaml)
set=(--set "data_root=$data" "output_dir=$out" "cache_dir=$out/trash481_cache" workers=2)

$python prepare.py check --data "$data"
$python prepare.py folds "${cfg[@]}" "${set[@]}"
for seed in 0 1; do
    model=("${set[@]}" name=trash481-seed$seed seed=$seed)
    for fold in 0 1 2 3 4; do
        $python train.py "${cfg[@]}" --fold $fold --resume "${model[@]}"
    done
    for split in oof test; do $python infer.py "${cfg[@]}" --fold all --split $split --save-probs --update "${model[@]}"; done
done

# the mean of the probabilities of both models, each of which is the mean of its folds on the test photos
$python ensemble.py "$out"/trash481-seed{0,1}/oof.csv --soft --out "$out/oof.csv" "${cfg[@]}" "${set[@]}"
$python evaluate.py score "$out"/trash481-seed{0,1}/oof.csv "$out/oof.csv" --labels "$data/train_all.json" --data "$data"
$python ensemble.py "$out"/trash481-seed{0,1}/test.csv --soft --out "$out/submission.csv" --data "$data"
$python submission.py check "$out/submission.csv" --data "$data"
