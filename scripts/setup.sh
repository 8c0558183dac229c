#!/usr/bin/env bash
# Make .venv with everything in requirements.txt, unless it is up to date. PYTHON chooses the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."

stamp=.venv/installed-$(cksum requirements.txt | cut -d' ' -f1)
[ -f "$stamp" ] && exit 0

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    { echo "setup.sh: error: $("$python" --version 2>&1) found, 3.11 or newer is needed; set PYTHON" >&2; exit 2; }
"$python" -m venv .venv
.venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
touch "$stamp"
