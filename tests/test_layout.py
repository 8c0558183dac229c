"""The layout of the repository: which file lies where, which module may import which, and fast starts."""

import ast
import re
import resource
import signal
import subprocess
import sys

import pytest
from entry_points import MODULES, ROOT, SCRIPTS

FOLDERS = sorted({name.rpartition('/')[0] for name in MODULES if '/' in name})


@pytest.mark.parametrize('folder', FOLDERS)
def test_a_package_is_one_docstring_line(folder):
    (docstring,) = ast.parse((ROOT / folder / '__init__.py').read_text()).body
    assert '\n' not in ast.literal_eval(docstring.value)


def imports_of(name: str) -> set[str]:
    """Return the modules that a source imports, inside its functions too."""
    modules = set()
    for node in ast.walk(ast.parse((ROOT / name).read_text())):
        if isinstance(node, ast.ImportFrom):
            modules |= {f'{node.module}.{alias.name}' for alias in node.names}
        elif isinstance(node, ast.Import):
            modules |= {alias.name for alias in node.names}
    return modules


def test_nothing_imports_tools():
    others = [name for name in MODULES if not name.startswith('tools/')]
    assert [name for name in others if re.search(r'^tools\b', '\n'.join(imports_of(name)), re.M)] == []


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
        room = name.removesuffix('.py').split('/')[0]
        for module in imports_of(name):
            other = module.split('.')[0]
            if other in LEVELS and other != room:
                assert LEVELS[other] < LEVELS[room], f'{name} imports {module}'


def test_thirteen_files_at_the_root():
    names = {name.removesuffix('.py') for name in MODULES if '/' not in name}
    assert names == {name for name in LEVELS if (ROOT / f'{name}.py').exists()} and len(names) == 13


# --- --help and mistakes are answered at once ---------------------------------------------------------------

# arguments with which a script reads its config
ARGUMENTS = {
    'ensemble.py': ['README.md', '--out', 'b.csv'],  # a file that exists, since that is looked at first
    'evaluate.py': ['score', 'a.csv', '--labels', 'b.json'],
    'infer.py': ['--fold', '0', '--split', 'oof'],
    'models.py': [],
    'prepare.py': ['folds'],
    'pseudo.py': ['--fold', '0', '--teacher', 'a'],
    'submission.py': ['check', 'README.md'],
    'train.py': ['--fold', '0'],
    'viz.py': ['augment', '--out', 'a.png'],
    '-m tools.bench': ['train'],
    '-m tools.export_onnx': ['--fold', '0'],
    '-m tools.postprocess': ['search', 'a.csv'],
    '-m tools.search_tta': ['--fold', '0'],
    '-m tools.soup': ['a.pt', 'b.pt', '--fold', '0'],
}
WITHOUT_CONFIG = {
    'config.py',
    '-m tools.bench.scale',
    '-m tools.compare',
    '-m tools.gpu',
    '-m tools.offline',
    '-m tools.share',
}


def answer(script: str, *words: str) -> tuple[int, str]:
    """Run a script within 1.5 s of CPU time, without torch; return its exit status and error lines."""
    before = cpu_seconds()
    done = subprocess.run(
        [sys.executable, '-X', 'importtime', *script.split(), *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
    )
    seconds = cpu_seconds() - before
    lines = done.stderr.splitlines()
    imported = {line.split('|')[-1].strip() for line in lines if line.startswith('import time:')}
    assert 'argparse' in imported
    imports_torch = 'torch' in imported  # a name of its own: pytest would print all of the set
    assert not imports_torch, f'{script} {" ".join(words)} imports torch'
    assert seconds < 1.5, f'{script} {" ".join(words)} takes {seconds:.1f} s of CPU time'
    return done.returncode, '\n'.join(line for line in lines if not line.startswith('import time:'))


def cpu_seconds() -> float:
    """Return the CPU time of all child processes that have ended."""
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def test_every_script_is_started():
    assert SCRIPTS.keys() <= ARGUMENTS.keys() | WITHOUT_CONFIG


@pytest.mark.parametrize('script', SCRIPTS)
def test_help_is_fast(script):
    assert answer(script, '--help') == (0, '')


@pytest.mark.parametrize('script', sorted(SCRIPTS.keys() - WITHOUT_CONFIG))
@pytest.mark.parametrize(
    ('words', 'message'),
    [
        (['--cfg', 'configs/demo.yaml', '--set', 'epohs=1'], "unknown key 'epohs'; did you mean 'epochs'?"),
        (['--cfg', 'configs/none.yaml'], 'configs/none.yaml: no such file'),
    ],
    ids=['typo', 'missing config'],
)
def test_mistake_in_the_config_is_answered_fast(script, words, message):
    status, error = answer(script, *ARGUMENTS[script], *words)
    assert status == 2 and error.endswith(message) and '\n' not in error


TOOLS = [name for name in MODULES if '-m ' + name.removesuffix('.py').replace('/', '.') in SCRIPTS]


@pytest.mark.parametrize('name', TOOLS)
def test_a_tool_that_is_run_as_a_file_says_how_to_run_it(name):
    done = subprocess.run([sys.executable, name], cwd=ROOT, capture_output=True, text=True)
    module = name.removesuffix('.py').replace('/', '.')
    assert (
        done.returncode == 2
        and done.stderr == f'run this as: python -m {module}, in the root of the repository\n'
    )


@pytest.mark.parametrize('number', [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_torch_is_imported_is_one_line(number):
    code = (
        'import time; from utils.cli import parse_early; parse_early(lambda: None); '
        'print("importing", flush=True); time.sleep(60)'
    )
    pipes = {'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True}
    with subprocess.Popen([sys.executable, '-c', code], cwd=ROOT, **pipes) as process:
        assert process.stdout.readline() == 'importing\n'
        process.send_signal(number)
        assert process.wait(10) == 75 and process.stderr.read() == '-c: interrupted\n'
