"""Find the scripts, as a person types them: `python train.py ...`, `python -m tools.soup ...`."""

import importlib
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = subprocess.check_output(['git', 'ls-files', '*.py'], cwd=ROOT, text=True).split()
MODULES = [name for name in SOURCES if not name.startswith('tests/')]


def _find_scripts() -> dict[str, tuple[str, str]]:
    """Map 'train.py' or '-m tools.soup' to its module, and to the function there that run_script gets."""
    scripts = {}
    for name in MODULES:
        match = re.search(r'^    run_script\((\w+)\)$', (ROOT / name).read_text(), re.MULTILINE)
        if match:
            module = name.removesuffix('.py').replace('/', '.')
            script = f'-m {module.removesuffix(".__main__")}' if '/' in name else name
            scripts[script] = (module, match[1])
    return scripts


SCRIPTS = _find_scripts()


def split_command(words: list[str]) -> tuple[str, list[str]]:
    """Split the words after `python` into the script, as in SCRIPTS, and its arguments."""
    count = 2 if words[0] == '-m' else 1
    return ' '.join(words[:count]), words[count:]


def entry(script: str) -> Callable:
    """Return the function that a script of SCRIPTS runs."""
    module, function = SCRIPTS[script]
    return getattr(importlib.import_module(module), function)
