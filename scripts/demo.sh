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

# both OPTION A B SCRIPT ...: run a script with two values of an option side by side, on half of the cores each: on two
# cores a fifth faster than one after the other. What the second says follows.
second=$(mktemp)
both() {
    local option=$1 values=("$2" "$3") script=$4 status=0
    local -x OMP_NUM_THREADS=$((($(getconf _NPROCESSORS_ONLN) + 1) / 2))
    shift 4
    set -m  # a process group of its own, which ends as a whole
    python "$script" "$option" "${values[1]}" "$@" &> "$second" &
    set +m
    python "$script" "$option" "${values[0]}" "$@"
    wait $! || status=$?
    cat "$second"
    return $status
}
# the second ends with this script, too, where the first has failed or is stopped
trap 'for job in $(jobs -p); do kill -- -$job 2> /dev/null || true; done; rm "$second"' EXIT

data=input/demo
cfg=(--cfg configs/demo.yaml)
set=(--set "data_root=$data" cache_dir=input/demo_cache workers=1 device=cpu)

step 'Make a data set in the layout of the competition'
python prepare.py demo --out "$data" --train 200 --test 40
python prepare.py check --data "$data"
rm -rf input/demo_cache
python prepare.py folds "${cfg[@]}" "${set[@]}"

step 'Train two folds from ImageNet weights, and score each on the photos that it had not seen'
both --fold 0 1 train.py "${cfg[@]}" --overwrite "${set[@]}"

step 'Predict the photos out of fold, and the test photos: by each fold, and by the mean of their probabilities'
both --split oof test infer.py "${cfg[@]}" --fold all "${set[@]}"

step 'Train on in two ways: with the predictions of each fold on the test photos as labels, and with mosaics'
more=(epochs=5 lr=8e-4 weights=output/demo)
both --fold 0 1 pseudo.py "${cfg[@]}" --teacher demo --schedule half --overwrite "${set[@]}" "${more[@]}"
both --fold 0 1 train.py "${cfg[@]}" --overwrite "${set[@]}" "${more[@]}" name=demo-mosaic mosaic=0.5
for name in demo-pseudo demo-mosaic; do
    both --split oof test infer.py "${cfg[@]}" --fold all "${set[@]}" name=$name
done

step 'Vote, and check the submission'
members=(output/demo{,-pseudo,-mosaic}/fold{0,1}/test.csv)
python ensemble.py "${members[@]}" --out output/submission.csv --data "$data"
python submission.py check output/submission.csv --data "$data"

step 'Would other weights score higher? Search on the photos out of fold; each model is the mean of its folds'
means=(output/demo{,-pseudo,-mosaic}/test.csv)
python ensemble.py "${means[@]}" --search --data "$data" --out output/searched.csv

step 'Draw predictions, and score the CSVs on the labels that were hidden until now'
python viz.py pictures --csv output/searched.csv --data "$data" --split test --labels "$data/test_labels.json" --out output/demo.png
scores=$(python evaluate.py score "${members[@]}" output/submission.csv "${means[@]}" output/searched.csv --labels "$data/test_labels.json")
echo "$scores"

printf '\nscore:   %s\n' "$(grep searched.csv <<< "$scores" | sed 's/^ *[0-9]* *//')"
echo 'picture: output/demo.png'
echo "app:     .venv/bin/python viz.py app --data $data --labels $data/test_labels.json"
