#!/usr/bin/env bash
# Set up, make a data set and do the whole job on it, on the CPU, in minutes: check, folds, training, out-of-fold score,
# pseudo-labels, vote, checked submission, a picture, and the scores on the hidden test labels.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh

# glibc keeps the memory that tensors free instead of returning it at once: CPU training steps have fewer page faults
export MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=2147483647 MALLOC_TOP_PAD_=268435456
step() { printf '\n== %s\n' "$1"; }
python() { .venv/bin/python "$@" | sed -u '/^next: /d'; }  # this script is what comes next
data=input/demo
cfg=(--cfg configs/demo.yaml)
set=(--set "data_root=$data" cache_dir=input/demo_cache workers=2 device=cpu)

step 'Make a data set in the layout of the competition'
python prepare.py demo --out "$data" --train 200 --test 40
python prepare.py check --data "$data"
rm -rf input/demo_cache
python prepare.py folds "${cfg[@]}" "${set[@]}"

step 'Train two folds from ImageNet weights, and score each on the photos that it had not seen'
for fold in 0 1; do python train.py "${cfg[@]}" --fold $fold --overwrite "${set[@]}"; done
python infer.py "${cfg[@]}" --fold all --split oof "${set[@]}"

step 'Predict the test photos: by each fold, and by the mean of their probabilities'
python infer.py "${cfg[@]}" --fold all --split test "${set[@]}"

step 'Train on in three ways: with the predictions of each fold on the test photos as labels, with pasted objects, and with mosaics'
more=(epochs=4 lr=5e-4)
for fold in 0 1; do
    start="weights=output/demo/fold$fold/best.pt"
    python pseudo.py "${cfg[@]}" --fold $fold --teacher demo --schedule half --overwrite "${set[@]}" "${more[@]}" "$start"
    for way in copy_paste mosaic; do
        python train.py "${cfg[@]}" --fold $fold --overwrite "${set[@]}" "${more[@]}" "$start" name=demo-$way $way=0.5
    done
done
for name in demo-pseudo demo-copy_paste demo-mosaic; do
    for split in oof test; do python infer.py "${cfg[@]}" --fold all --split $split "${set[@]}" name=$name; done
done

step 'Vote, and check the submission'
members=(output/demo{,-pseudo,-copy_paste,-mosaic}/fold{0,1}/test.csv)
python ensemble.py "${members[@]}" --out output/submission.csv --data "$data"
python submission.py check output/submission.csv --data "$data"

step 'Would other weights score higher? Search on the photos out of fold; each model is the mean of its folds'
means=(output/demo{,-pseudo,-copy_paste,-mosaic}/test.csv)
python ensemble.py "${means[@]}" --search --data "$data" --out output/searched.csv

step 'Draw predictions, and score the CSVs on the labels that were hidden until now'
python viz.py pictures --csv output/submission.csv --data "$data" --split test --labels "$data/test_labels.json" --out output/demo.png
scores=$(python evaluate.py score "${members[@]}" output/submission.csv "${means[@]}" output/searched.csv --labels "$data/test_labels.json")
echo "$scores"

printf '\nscore:   %s\n' "$(grep searched.csv <<< "$scores" | sed 's/^ *[0-9]* *//')"
echo 'picture: output/demo.png'
echo "app:     .venv/bin/python viz.py app --data $data --labels $data/test_labels.json"
