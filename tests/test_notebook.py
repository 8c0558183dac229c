"""notebooks/start.ipynb, executed as on Kaggle or Colab: in an empty folder, from a repository to clone."""

import json
import shutil
import subprocess
from pathlib import Path

import nbformat
import numpy as np
import pytest
from conftest import TINY, write_set
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from nbformat import NotebookNode

from config import HOME
from submission import read_test_sizes
from utils.id_csv import IdReader

# train.py and infer.py share the kernel's process: an import of torch takes longer than they do
IN_KERNEL = """
import runpy
run_alone = run


def run(*words):
    if words[0] not in ('train.py', 'infer.py'):
        return run_alone(*words)
    sys.path[0], sys.argv = str(Path.cwd()), [str(word) for word in words]
    try:
        runpy.run_path(words[0], run_name='__main__')
    except SystemExit as end:
        if end.code:
            raise
"""
ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / 'notebooks/start.ipynb'
SMALL = {**TINY, 'encoder': 'test_resnet.r160_in1k', 'tta_flips': [], 'tta_scales': [1]}
KEYS = ' '.join(f'{key}={json.dumps(value)}'.replace('"', '') for key, value in SMALL.items())


@pytest.fixture(scope='module')
def repository(tmp_path_factory) -> Path:
    """The working tree as a repository of one commit, to be cloned."""
    root = tmp_path_factory.mktemp('notebook') / 'trash'
    skip = shutil.ignore_patterns('.*', '__pycache__', 'input', 'output', 'reference')
    shutil.copytree(ROOT, root, ignore=skip)
    git = ['git', '-C', root, '-c', 'user.name=test', '-c', 'user.email=test@localhost']
    for words in (['init', '-q'], ['add', '-A'], ['commit', '-q', '--no-verify', '-m', 'all']):
        subprocess.run([*git, *words], check=True)
    return root


@pytest.fixture
def small(monkeypatch, tmp_path) -> Path:
    """An empty folder, and numbers that take seconds."""
    values = {
        'PHOTOS': '8',
        'DEMO_SET': KEYS,
        'CONFIG': 'fcn_resnet50',
        'EPOCHS': '1',
        'SET': KEYS,
        'OMP_NUM_THREADS': '1',
        'CUDA_VISIBLE_DEVICES': '',
    }
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv('INPUT', str(tmp_path / 'kaggle'))
    for name in ('REPO', 'DATA', 'FOLD'):
        monkeypatch.delenv(name, raising=False)
    return tmp_path


def execute(folder: Path, *parts: str, code: str = '') -> tuple[NotebookNode, str]:
    """Runs in `folder` the code cells that have one of the texts in them, or all, and `code` below the one
    that defines run. Returns them and what they printed.
    """
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    if parts:
        notebook.cells = [c for c in notebook.cells if any(part in c.source for part in parts)]
        assert len(notebook.cells) == len(parts)
    if code:
        next(c for c in notebook.cells if 'def run(' in c.source).source += code
    NotebookClient(notebook, timeout=300, resources={'metadata': {'path': str(folder)}}).execute()
    outputs = [out for cell in notebook.cells for out in cell.get('outputs', [])]
    return notebook, ''.join(out.text for out in outputs if out.output_type == 'stream')


def test_committed_without_outputs():
    for cell in nbformat.read(NOTEBOOK, as_version=4).cells:
        if cell.cell_type == 'code':
            assert not cell.outputs and cell.execution_count is None, cell.source


def test_demo_and_a_real_fold(repository, small, monkeypatch):
    data = write_set(small / 'data', train=8, test=2)
    monkeypatch.setenv('REPO', str(repository))
    monkeypatch.setenv('DATA', str(data))
    notebook, printed = execute(small, code=IN_KERNEL)
    output = small / 'trash/output'
    for name, root in (('first', small / 'trash/input/demo8'), ('fcn_resnet50', data)):
        assert (output / name / 'fold0/oof.csv').is_file() and printed.count(f'output/{name}/fold0/oof.csv')
        with IdReader(output / name / 'fold0/test.csv') as reader:
            assert list(reader.image_ids) == [*read_test_sizes(root, HOME)]
    with IdReader(output / 'submission.csv') as vote, IdReader(reader.path) as fold:
        assert list(vote.image_ids) == [*read_test_sizes(data, HOME)]
        for image_id in vote.image_ids:
            assert np.array_equal(vote.read(image_id), fold.read(image_id))
    assert f'to submit: {output / "submission.csv"}' in printed
    assert any(
        'image/png' in out.get('data', {}) for cell in notebook.cells for out in cell.get('outputs', [])
    )


FIRST = ('REPO = ', 'def run(')


def test_inside_the_repository_without_data(repository, small):
    """Nothing is cloned, and the real part says what is missing."""
    _, printed = execute(repository / 'notebooks', *FIRST, "'--resume'", "'to submit:'")
    assert printed.splitlines()[0] == str(repository)
    assert printed.splitlines()[1].startswith('input/data is not there')
    assert not (repository / 'output').exists()


def test_a_failing_command_stops_it(repository, small, monkeypatch):
    monkeypatch.setenv('DATA', str(small))
    with pytest.raises(CellExecutionError, match='CalledProcessError') as error:
        execute(repository, *FIRST, "'--resume'")
    assert 'train_all.json' in str(error.value)


NEEDS = "needs = ['torch>=99', 'scipy>=1']\n"


def test_code_and_data_that_kaggle_added(repository, small):
    """Both are found below its folder; the code, which cannot be written there, is copied. What is too old is
    installed.
    """
    shutil.copytree(repository, small / 'kaggle/datasets/someone/code/trash-main')
    data = write_set(small / 'kaggle/competitions/a set', train=8, test=3, side=64)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    cells = [next(c for c in notebook.cells if part in c.source) for part in (*FIRST, 'pins = ')]
    cells[2].source = cells[2].source.replace("run('-m'", "print('-m'").replace('pins = ', NEEDS + 'pins = ')
    notebook.cells = [*cells, nbformat.v4.new_code_cell('print(DATA)')]
    NotebookClient(notebook, timeout=60, resources={'metadata': {'path': str(small)}}).execute()
    printed = ''.join(out.text for cell in notebook.cells for out in cell.get('outputs', []))
    copied, installed, found = printed.splitlines()
    assert copied == str(small / 'trash-segmentation') and found == str(data)
    assert installed.startswith('-m pip install --quiet torch==') and 'scipy' not in installed


def test_no_address_to_clone(small):
    with pytest.raises(CellExecutionError, match='give REPO'):
        execute(small, *FIRST)
