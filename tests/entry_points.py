"""Every script as a person types it: `python train.py ...`, `python -m tools.soup ...`."""

import importlib
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = subprocess.check_output(['git', 'ls-files', '*.py'], cwd=ROOT, text=True).split()
MODULES = [name for name in SOURCES if not name.startswith('tests/')]


def _find_scripts() -> dict[str, tuple[str, str]]:
    """'train.py' or '-m tools.soup' -> its module, and the function there that run_script is given."""
    scripts = {}
    for name in MODULES:
        match = re.search(r'^    run_script\((\w+)\)$', (ROOT / name).read_text(), re.MULTILINE)
        if match:
            module = name.removesuffix('.py').replace('/', '.')
            typed = f'-m {module.removesuffix(".__main__")}' if '/' in name else name
            scripts[typed] = (module, match[1])
    return scripts


SCRIPTS = _find_scripts()


def split_command(words: list[str]) -> tuple[str, list[str]]:
    """The script that the words after `python` name, as in SCRIPTS, and its arguments."""
    count = 2 if words[0] == '-m' else 1
    return ' '.join(words[:count]), words[count:]


def entry(script: str) -> Callable:
    """The function that a script of SCRIPTS runs."""
    module, function = SCRIPTS[script]
    return getattr(importlib.import_module(module), function)
