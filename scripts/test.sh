#!/usr/bin/env bash
# Set up and run every check and test, as CI does. `quick` runs the fastest ones, in under a minute: for before each commit.
#     bash scripts/test.sh [quick] [PYTEST OPTION ...]
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh

tests=()
if [ "${1:-}" = quick ]; then
    shift
    # tests that train nothing and build no large network
    for noun in coco config files heads intervals losses metrics postprocess recipe submission terminal; do
        tests+=("tests/test_$noun.py")
    done
fi
for script in scripts/*.sh; do bash -n "$script"; done
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/ty check --quiet
# one process per core; each needs about a gigabyte
.venv/bin/python -m pytest -n auto --maxprocesses 4 --dist worksteal "${tests[@]}" "$@"
