#!/usr/bin/env bash
# Sets up, then every check and test. CI runs this.
set -euo pipefail
cd "$(dirname "$0")/.."
bash scripts/setup.sh

for script in scripts/*.sh; do bash -n "$script"; done
.venv/bin/ruff check .
.venv/bin/ruff format --check .
.venv/bin/python -m pytest "$@"
