#!/usr/bin/env bash
# Sets up, then the whole job on a set that it makes itself, on the CPU, in minutes: check, folds, training, out-of-fold score,
# test-time augmentation, pseudo-labels, vote, checked submission, a picture, and the scores on the set's hidden test labels.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh

step() { printf '\n== %s\n' "$1"; }
python() { .venv/bin/python "$@"; }
data=input/demo
cfg=(--cfg configs/demo.yaml)
set=(--set "data_root=$data" cache_dir=input/demo_cache workers=2 device=cpu)

step 'A data set in the layout of the competition'
python prepare.py demo --out "$data" --train 200 --test 40
python prepare.py check --data "$data"
rm -rf input/demo_cache
python prepare.py folds "${cfg[@]}" "${set[@]}"

step 'Two folds from ImageNet weights, and their score on photos that each had not seen'
for fold in 0 1; do python train.py "${cfg[@]}" --fold $fold --overwrite "${set[@]}"; done
python infer.py "${cfg[@]}" --fold all --split oof "${set[@]}"
for fold in 0 1; do python infer.py "${cfg[@]}" --fold $fold --split test "${set[@]}"; done

step "On from there, with each fold's own predictions of the test photos as labels in the first half"
for fold in 0 1; do
    python pseudo.py "${cfg[@]}" --fold $fold --teacher demo --schedule half --overwrite "${set[@]}" \
        "weights=output/demo/fold$fold/best.pt" epochs=4 lr=5e-4
    python infer.py "${cfg[@]}" --fold $fold --split test "${set[@]}" name=demo-pseudo
done
python infer.py "${cfg[@]}" --fold all --split oof "${set[@]}" name=demo-pseudo

step 'The vote, and the submission'
members=(output/demo/fold{0,1}/test.csv output/demo-pseudo/fold{0,1}/test.csv)
python ensemble.py "${members[@]}" --out output/submission.csv --data "$data"
python submission.py check output/submission.csv --data "$data"

step 'Does a vote of the two models pay? Asked of the photos that neither had seen; each is the mean of its folds'
for name in demo demo-pseudo; do python infer.py "${cfg[@]}" --fold all --split test "${set[@]}" name=$name; done
means=(output/demo/test.csv output/demo-pseudo/test.csv)
python ensemble.py "${means[@]}" --search --data "$data" --out output/searched.csv

step 'What it looks like, and how good it is by the labels that were hidden until now'
python viz.py pictures --csv output/submission.csv --data "$data" --split test --labels "$data/test_labels.json" --out output/demo.png
python evaluate.py score "${members[@]}" output/submission.csv "${means[@]}" output/searched.csv --labels "$data/test_labels.json"
