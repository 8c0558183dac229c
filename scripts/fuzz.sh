#!/usr/bin/env bash
# Fuzz the readers of CSVs, annotations, configs and checkpoints, each for a quarter of SECONDS (by default 240).
# An input that crashes one is written to output/fuzz/.
#     bash scripts/fuzz.sh 600
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh

seconds=${1:-240}
.venv/bin/python -c 'import atheris' 2>/dev/null ||
    .venv/bin/python -m pip install --quiet --disable-pip-version-check 'atheris>=3,<4' ||
    { echo "fuzz.sh: error: atheris cannot be installed for $(.venv/bin/python --version)" >&2; exit 2; }
for target in csv coco config checkpoint; do
    OMP_NUM_THREADS=1 .venv/bin/python tests/fuzz.py "$target" --seconds $((seconds / 4))
done
