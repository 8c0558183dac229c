#!/usr/bin/env bash
# Do a whole run of configs: train every fold, score out of fold, retrain with pseudo-labels, and vote over all of them.
#     bash scripts/run.sh convnext_knet swin_knet          # SCHEDULE=full|half|pretrain, FOLDS="0 1 2 3 4", GPUS=1
# Run it again to continue after a stop.
set -euo pipefail
cd "$(dirname "$0")/.."
[ $# -gt 0 ] || { echo 'usage: scripts/run.sh CONFIG [CONFIG ...]' >&2; exit 2; }

schedule=${SCHEDULE:-half}
[[ $schedule =~ ^(full|half|pretrain)$ ]] || { echo "run.sh: error: SCHEDULE=$schedule: expected full, half or pretrain" >&2; exit 2; }
for name in "$@"; do # check before hours of training
    [ -f "configs/$name.yaml" ] || { echo "run.sh: error: configs/$name.yaml: no such file" >&2; exit 2; }
done
read -ra folds <<<"${FOLDS:-0 1 2 3 4}"
launch=(.venv/bin/python)
[ "${GPUS:-1}" = 1 ] || launch=(.venv/bin/torchrun --standalone "--nproc-per-node=$GPUS")
members=()
for name in "$@"; do
    cfg=(--cfg "configs/$name.yaml")
    for fold in "${folds[@]}"; do
        "${launch[@]}" train.py "${cfg[@]}" --fold "$fold" --resume
        .venv/bin/python infer.py "${cfg[@]}" --fold "$fold" --split oof --update
        "${launch[@]}" pseudo.py "${cfg[@]}" --fold "$fold" --teacher "$name" --schedule "$schedule" --resume
        for split in oof test; do
            .venv/bin/python infer.py "${cfg[@]}" --fold "$fold" --split $split --update --set "name=$name-pseudo"
        done
        members+=("output/$name-pseudo/fold$fold/test.csv")
    done
done
.venv/bin/python ensemble.py "${members[@]}" --out output/submission.csv --search
.venv/bin/python submission.py check output/submission.csv --data input/data
