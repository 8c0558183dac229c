#!/usr/bin/env bash
# Say whether a change of a config helps: train both with several seeds on several folds, predict out of fold, and compare.
#     bash scripts/compare.sh BASE KEY=VALUE ... --seeds 0 1 2 --folds all      # --set KEY=VALUE ... is for both; --jobs N; --help
#     bash scripts/compare.sh BASE --seeds 0 1 2    # without a change: how much of its score is luck
# Run it again to continue after a stop.
set -euo pipefail
cd "$(dirname "$0")/.."
exec .venv/bin/python -m tools.compare "$@"
