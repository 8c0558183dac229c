#!/usr/bin/env bash
# Check a submission, show how it differs from the last one, submit it with the kaggle client if that is set up, and keep a copy.
#     bash scripts/submit.sh [CSV]          # by default output/submission.csv; DATA=input/data; COMPETITION=name on Kaggle; MESSAGE=...
set -euo pipefail
[ $# -le 1 ] || { echo 'usage: scripts/submit.sh [CSV]' >&2; exit 2; }
csv=$(realpath -m "${1:-$(dirname "$0")/../output/submission.csv}")
data=$(realpath -m "${DATA:-$(dirname "$0")/../input/data}")
cd "$(dirname "$0")/.."
kept=${KEPT:-output/submitted}

.venv/bin/python submission.py check "$csv" --data "$data"
last=$({ find "$kept" -name '*.csv' 2>/dev/null || true; } | sort | tail -n 1)
if [ -n "$last" ]; then
    if cmp -s "$csv" "$last"; then
        echo "submit.sh: error: $csv is what was submitted last, $last" >&2
        exit 2
    fi
    .venv/bin/python submission.py check "$csv" --data "$data" --against "$last"
fi
if ! command -v kaggle >/dev/null || [ -z "${COMPETITION:-}" ]; then
    echo "not handed in: the kaggle client and COMPETITION=name are needed; upload $csv by hand"
    exit 0
fi
kaggle competitions submit -c "$COMPETITION" -f "$csv" -m "${MESSAGE:-$(git rev-parse --short HEAD 2>/dev/null || echo submission)}"
mkdir -p "$kept"
copy=$kept/$(date +%Y%m%d-%H%M%S).csv
cp "$csv" "$copy.partial"
mv "$copy.partial" "$copy"
echo "kept as $copy"
