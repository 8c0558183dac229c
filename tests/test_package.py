"""pyproject.toml, requirements.txt and requirements.lock agree with each other and with the code."""

import ast
import re
import sys
import tomllib
from collections.abc import Iterable
from importlib.metadata import packages_distributions

import pytest
from entry_points import MODULES, ROOT
from packaging.markers import Marker
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PROJECT = tomllib.loads((ROOT / 'pyproject.toml').read_text())
FOLDERS = sorted({name.rpartition('/')[0].replace('/', '.') for name in MODULES if '/' in name})
TESTS = '# For scripts/test.sh'


def ranges(lines: Iterable[str]) -> dict[str, Requirement]:
    """Map the name of each package to its requirement; our own extras are left out."""
    found = {canonicalize_name(word.name): word for word in map(Requirement, lines)}
    found.pop(canonicalize_name(PROJECT['project']['name']), None)
    return found


def pins(text: str) -> dict[str, str]:
    """Map the name of each package to the version that a requirements file gives it, in comments too."""
    found = re.findall(r'([\w-]+)==([\w.]+)', text)
    assert len(dict(found)) == len(found)
    return {canonicalize_name(name): version for name, version in found}


DEPENDENCIES = ranges(PROJECT['project']['dependencies'])
EXTRAS = {name: ranges(lines) for name, lines in PROJECT['project']['optional-dependencies'].items()}
TEXT = (ROOT / 'requirements.txt').read_text()


def test_every_module_and_folder_is_declared():
    declared = PROJECT['tool']['setuptools']
    assert sorted(declared['py-modules']) == sorted(name[:-3] for name in MODULES if '/' not in name)
    assert sorted(declared['packages']) == FOLDERS


def test_requirements_pin_what_pyproject_asks_for():
    to_run, to_test = TEXT.split(TESTS)
    extras = {name: line for extra in EXTRAS.values() for name, line in extra.items()}
    asked = DEPENDENCIES | {name: line for name, line in extras.items() if name not in EXTRAS['test']}
    for text, lines in (to_run, asked), (to_test, EXTRAS['test']):
        versions = pins(text)
        assert versions.keys() == lines.keys()
        for name, version in versions.items():
            assert version in lines[name].specifier, f'{name}: {version} is not in {lines[name].specifier}'


def test_python_is_the_one_that_setup_asks_for():
    oldest = re.search(r'version_info < \((\d+), (\d+)\)', (ROOT / 'scripts/setup.sh').read_text()).groups()
    assert PROJECT['project']['requires-python'] == f'>={".".join(oldest)}'
    assert PROJECT['tool']['ruff']['target-version'] == 'py' + ''.join(oldest)


def test_every_package_that_is_imported_is_declared():
    declared = DEPENDENCIES | {name: line for extra in EXTRAS.values() for name, line in extra.items()}
    owners = packages_distributions()
    for name in MODULES:
        for node in ast.walk(ast.parse((ROOT / name).read_text())):
            words = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            words = [node.module] if isinstance(node, ast.ImportFrom) else words
            for top in {word.split('.')[0] for word in words} - sys.stdlib_module_names:
                found = {canonicalize_name(owner) for owner in owners.get(top, [])}  # none: ours, or absent
                assert not found or found & declared.keys(), f'{name} imports {top}'


# --- requirements.lock -------------------------------------------------------------------------------------

LOCKED = re.findall(
    r'^(\S+)==(\S+)(?: ; (.*?))? \\\n((?:    --hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)((?:    #.*\n)+)',
    (ROOT / 'requirements.lock').read_text(),
    re.MULTILINE,
)


def test_lock_is_read_whole():
    text = (ROOT / 'requirements.lock').read_text()
    assert len(LOCKED) == len(re.findall(r'^[^#\s]', text, re.MULTILINE)) > 100


def test_lock_has_what_requirements_pin():
    lines = [line for line in TEXT.splitlines() if not line.startswith('#')]
    direct = {(name, version) for name, version, _, _, origin in LOCKED if '-r requirements.txt' in origin}
    assert direct == set(pins('\n'.join(lines)).items())


@pytest.mark.parametrize('python', ['3.11', '3.12', '3.14'])
def test_lock_names_a_package_once(python):
    environment = {'python_version': python, 'python_full_version': f'{python}.0'}
    names = [name for name, _, marker, _, _ in LOCKED if not marker or Marker(marker).evaluate(environment)]
    assert len(names) == len(set(names)) > 100
