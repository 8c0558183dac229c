#!/usr/bin/env bash
# Check on a GPU what no CPU can show (python -m tools.gpu), in one call under 7 minutes, without a network.
#     bash scripts/gpu.sh [WHEELS [DATA [OPTION ...]]]     # OUT=output/gpu; PYTHON=python3 if there are WHEELS; tools.gpu's options
# Without WHEELS (or with '') it runs in .venv. On a machine whose Python has torch but not the rest, WHEELS is a folder that
# scripts/gpu_wheels.sh filled; they are installed aside, and nothing of that Python changes. DATA is a data root such as trash481.
set -euo pipefail
wheels=${1:-} data=${2:-}
[ -z "$wheels" ] || compgen -G "$wheels/*.whl" >/dev/null || { echo "gpu.sh: error: $wheels: holds no wheels" >&2; exit 2; }
[ -z "$data" ] || [ -f "$data/train_all.json" ] || { echo "gpu.sh: error: $data/train_all.json: no such file" >&2; exit 2; }
out=$(realpath -m "${OUT:-$(dirname "$0")/../output/gpu}")
[ -z "$wheels" ] || wheels=$(realpath "$wheels")
words=(--out "$out")
[ -z "$data" ] || words+=(--data "$(realpath "$data")")
cd "$(dirname "$0")/.."

python=.venv/bin/python
if [ -n "$wheels" ]; then
    python=${PYTHON:-python3}
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    "$python" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$wheels"/*.whl
    export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
fi
"$python" -m tools.gpu "${words[@]}" "${@:3}"
