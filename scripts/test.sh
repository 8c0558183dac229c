#!/usr/bin/env bash
# Sets up, then every check and test; CI runs this. `quick` is the part of it to run before each commit, in under a minute.
#     bash scripts/test.sh [quick] [PYTEST OPTION ...]
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh

tests=()
if [ "${1:-}" = quick ]; then
    shift
    # what trains nothing and builds no large network
    for noun in coco config files heads intervals losses metrics postprocess recipe submission terminal; do
        tests+=("tests/test_$noun.py")
    done
fi
for script in scripts/*.sh; do bash -n "$script"; done
.venv/bin/ruff check .
.venv/bin/ruff format --check .
# a process for each core, of about a gigabyte each
.venv/bin/python -m pytest -n auto --maxprocesses 4 --dist worksteal "${tests[@]}" "$@"
