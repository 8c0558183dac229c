"""The layout of the repository: what lies where, and who may import whom."""

import ast
import subprocess
import sys

import pytest
from entry_points import MODULES, ROOT

FOLDERS = sorted({name.rpartition('/')[0] for name in MODULES if '/' in name})


@pytest.mark.parametrize('folder', FOLDERS)
def test_a_package_is_one_docstring_line(folder):
    (docstring,) = ast.parse((ROOT / folder / '__init__.py').read_text()).body
    assert '\n' not in ast.literal_eval(docstring.value)


def imports_of(name: str) -> set[str]:
    """The modules that a source imports, inside its functions too."""
    found = set()
    for node in ast.walk(ast.parse((ROOT / name).read_text())):
        if isinstance(node, ast.ImportFrom):
            found |= {f'{node.module}.{alias.name}' for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return found


def test_nothing_imports_tools():
    importers = [name for name in MODULES if any(one.startswith('tools.') for one in imports_of(name))]
    assert [name for name in importers if not name.startswith('tools/')] == []


@pytest.mark.parametrize('folder', ['data', 'voting'])
def test_torch_stays_out(folder):
    modules = [name[:-3].replace('/', '.') for name in MODULES if name.startswith(f'{folder}/')]
    modules = [module.removesuffix('.__init__') for module in modules]
    code = f'import sys, {", ".join(modules)}; sys.exit("torch" in sys.modules)'
    subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=True)


# each may import what stands in the lines above it, and its own line
ORDER = """
metrics
utils
config
submission networks
data models losses
dataset voting
engine
train infer prepare evaluate
pseudo ensemble viewer
viz tools
"""
LEVELS = {name: level for level, line in enumerate(ORDER.strip().splitlines()) for name in line.split()}


def test_imports_run_downwards():
    for name in MODULES:
        own = name.removesuffix('.py').split('/')[0]
        for module in imports_of(name):
            other = module.split('.')[0]
            if other in LEVELS and other != own:
                assert LEVELS[other] < LEVELS[own], f'{name} imports {module}'


def test_thirteen_files_at_the_root():
    names = {name.removesuffix('.py') for name in MODULES if '/' not in name}
    assert names == {name for name in LEVELS if (ROOT / f'{name}.py').exists()} and len(names) == 13
