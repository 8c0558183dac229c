"""Runs packed for a machine without the internet: what is packed, its notebook, and the time budget."""

import os
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import nbformat
import numpy as np
import pytest
from conftest import write_set
from nbclient import NotebookClient

import infer
from config import read_competition
from data.importers import write_test
from engine.runs import open_run
from submission import mask_format, read_test_sizes
from tools import offline
from tools.offline import PACKAGES, Clock, Ensemble, in_turn, with_requirements
from utils.errors import BadInput
from utils.log import log

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / 'notebooks/offline.ipynb'
PHOTOS = 5
VIEWS = {'tta_flips': ('h',)}


@pytest.fixture(scope='module')
def runs(tmp_path_factory, shapes, shared_cache) -> Path:
    """Two runs of two folds whose weights are random, in an output folder."""
    import torch
    from conftest import TINY

    from config import make_config
    from engine.checkpoint import save_checkpoint
    from models import SegModel

    output = tmp_path_factory.mktemp('offline') / 'output'
    places = {'data_root': str(shapes), 'cache_dir': str(shared_cache), 'output_dir': str(output)}
    for name in ('a', 'b'):
        cfg = make_config({**TINY, **VIEWS, **places, 'name': name}, 'test')
        for fold in range(2):
            torch.manual_seed(10 * fold + (name == 'b'))
            open_run(cfg, fold, overwrite=True)
            state = {'model': SegModel(cfg).state_dict(), 'config': cfg.model_dump(mode='json'), 'fold': fold}
            more = {'held_out': None, 'epoch': 1, 'score': 0.5}
            save_checkpoint(cfg.run_dir(fold) / 'best.pt', state | more)
    return output


@pytest.fixture(scope='module')
def bundle(runs, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp('packed') / 'offline'
    offline.command(['pack', str(runs / 'a'), str(runs / 'b'), '--out', str(out), '--packages', 'none'])
    return out


@pytest.fixture
def photos(tmp_path) -> Path:
    """A folder of hidden test photos alone."""
    root = write_set(tmp_path / 'set', train=1, test=PHOTOS, side=256, seed=3)
    (root / 'batch_01/0000.jpg').unlink()
    for path in root.glob('*.json'):
        path.unlink()
    return root


def test_what_is_packed(bundle, runs, shapes):
    for name in ('a', 'b'):
        for fold in range(2):
            packed, trained = (folder / name / f'fold{fold}/best.pt' for folder in (bundle / 'runs', runs))
            assert packed.read_bytes() == trained.read_bytes()
    assert read_competition(bundle).classes == read_competition(bundle).classes
    assert (bundle / 'notebooks/offline.ipynb').is_file() and not (bundle / 'packages').exists()
    assert not any(bundle.rglob('*.jpg')) and not any(bundle.rglob('__pycache__'))


def test_packing_again_replaces_it_and_other_folders_stay(bundle, runs, tmp_path, capsys):
    out = tmp_path / 'offline'
    words = ['--out', str(out), '--packages', 'none']
    offline.command(['pack', str(runs / 'a'), str(runs / 'b'), *words])
    assert '4 models of 2 runs, ' in capsys.readouterr().out
    offline.command(['pack', str(runs / 'b'), *words])
    assert [path.name for path in (out / 'runs').iterdir()] == ['b']
    other = tmp_path / 'mine'
    other.mkdir()
    (other / 'file').touch()
    with pytest.raises(BadInput, match='is not empty and was not packed before'):
        offline.command(['pack', str(runs / 'a'), '--out', str(other)])
    with pytest.raises(BadInput, match=r'no fold\*/best.pt in it'):
        offline.command(['pack', str(other), *words])
    assert (other / 'file').exists()


def test_notebook_predicts_as_infer_does(bundle, photos, runs, tmp_path, monkeypatch):
    """In a folder of its own, from photos alone; each run's folds averaged, as infer.py --fold all does."""
    for run in ('a', 'b'):
        shutil.copytree(runs / run, tmp_path / 'output' / run)
    alone = tmp_path / 'alone'
    shutil.copytree(bundle, alone)
    shutil.rmtree(alone / 'runs/b')
    folder = tmp_path / 'kaggle'
    folder.mkdir()
    values = {
        'INPUT': tmp_path,
        'PHOTOS': photos,
        'MINUTES': 60,
        'CUDA_VISIBLE_DEVICES': '',
        'OMP_NUM_THREADS': 1,
    }
    for name, value in values.items():
        monkeypatch.setenv(name, str(value))
    for name in ('BUNDLE', 'OUT'):
        monkeypatch.delenv(name, raising=False)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=300, resources={'metadata': {'path': str(folder)}}).execute()
    outputs = [out.text for cell in notebook.cells for out in cell.get('outputs', []) if 'text' in out]
    assert '5 photos, at the end 2 of 2 models, with test-time augmentation' in ''.join(outputs)

    write_test(photos, photos, overwrite=False)
    cfg = offline.config_of(
        runs / 'a/fold0/best.pt', {'data_root': photos, 'output_dir': tmp_path / 'output'}
    )
    infer.main(cfg.model_copy(update={'cache_dir': tmp_path / 'cache'}), None, 'test')
    expected = (tmp_path / 'output/a/test.csv').read_bytes()
    assert (folder / 'submission.csv').read_bytes() == expected
    mask_format(cfg.competition, read_test_sizes(photos, cfg.competition)).check(folder / 'submission.csv')


class Slow(Ensemble):
    """Models whose photos take a second a view, by their own word."""

    def time(self, rows):
        self.seconds = [1.0] * len(self.runs)


@pytest.mark.parametrize(
    ('seconds', 'choice', 'says'),
    [
        (45, (4, True), ''),
        (25, (4, False), '4 of 4 models, no test-time augmentation, which takes 0.3'),
        (12, (2, False), '2 of 4 models'),
        (1, (1, False), '1 of 4 models'),
    ],
)
def test_views_and_then_folds_are_left_out_to_fit(
    bundle, photos, tmp_path, monkeypatch, seconds, choice, says
):
    warnings, chosen = [], []
    monkeypatch.setattr(log, 'warning', warnings.append)
    monkeypatch.setattr(offline, 'Ensemble', Slow)
    fit = Slow.fit
    monkeypatch.setattr(
        Slow, 'fit', lambda self, n, left: (fit(self, n, seconds), chosen.append((self.count, self.tta)))
    )
    out, photo_folder = tmp_path / 'a.csv', photos
    offline.predict(bundle, photo_folder, tmp_path / 'work', out, Clock(60), 'cpu')
    assert chosen == [choice] and (says in warnings[0] if says else not warnings)
    assert out.read_text().count('\n') == PHOTOS + 1


def test_time_is_looked_at_again_after_each_part(bundle, photos, tmp_path, monkeypatch):
    """Models that turn out slower than they were timed lose their views, and all but one of them go."""
    monkeypatch.setattr(offline, 'PART', 2)
    monkeypatch.setattr(Clock, 'left', 1e-3)
    monkeypatch.setattr(
        Ensemble, 'time', lambda self, rows: setattr(self, 'seconds', [1e-6] * len(self.runs))
    )
    counts, fit = [], Ensemble.fit

    def note(self, photos, seconds):
        fit(self, photos, seconds)
        counts.append((self.count, self.tta))

    monkeypatch.setattr(Ensemble, 'fit', note)
    offline.predict(bundle, photos, tmp_path / 'work', tmp_path / 'a.csv', Clock(60), 'cpu')
    assert counts == [(4, True), (1, False), (1, False)]


def test_the_first_fold_of_each_run_comes_first():
    folds = {'a': 3, 'b': 1, 'c': 2}
    runs = [[Path(f'{run}/fold{fold}/best.pt') for fold in range(n)] for run, n in folds.items()]
    order = ['a/fold0', 'b/fold0', 'c/fold0', 'a/fold1', 'c/fold1', 'a/fold2']
    assert [path.parent.as_posix() for path in in_turn(runs)] == order


def test_nothing_to_predict(bundle, tmp_path):
    (tmp_path / 'empty').mkdir()
    with pytest.raises(BadInput, match='found no photos'):
        offline.predict(bundle, tmp_path / 'empty', tmp_path / 'work', tmp_path / 'a.csv', Clock(1), 'cpu')
    with pytest.raises(BadInput, match='expected what pack made'):
        offline.predict(tmp_path, tmp_path, tmp_path / 'work', tmp_path / 'a.csv', Clock(1), 'cpu')


def test_installed_packages_where_wheels_cannot_be_fetched(tmp_path, monkeypatch):
    done = subprocess.CompletedProcess([], 1, '', 'no network')
    monkeypatch.setattr(subprocess, 'run', lambda *args, **options: done)
    monkeypatch.setattr(offline, 'PACKAGES', ('tqdm', 'PyYAML'))
    line = offline.add_packages(tmp_path, 'wheels')
    assert line.startswith('packages: 2 as they are installed here') and 'no network' in line
    code = 'import tqdm, yaml; print(tqdm.__file__, yaml.__file__)'
    env = {'PYTHONPATH': str(tmp_path / 'packages'), 'PATH': os.environ['PATH']}
    printed = subprocess.Popen(
        [sys.executable, '-S', '-c', code], env=env, stdout=subprocess.PIPE, text=True
    ).communicate()[0]
    assert printed.count(str(tmp_path / 'packages')) == 2
    assert with_requirements(['timm']) >= {'timm', 'torch', 'numpy', 'PyYAML'}


def test_every_package_that_prediction_imports_is_packed():
    code = 'import sys; import tools.offline; print(*{name.split(".")[0] for name in sys.modules})'
    words = [sys.executable, '-c', code]
    modules = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    origins = metadata.packages_distributions()
    imported = {name for module in modules for name in origins.get(module, ())} - {
        'setuptools',
        'charset-normalizer',
    }  # used if it is there
    packed = {name.lower().replace('_', '-') for name in with_requirements(PACKAGES)}
    assert {name for name in imported if name.lower().replace('_', '-') not in packed} == set()


@pytest.mark.slow
def test_an_empty_environment_without_a_network(runs, photos, tmp_path):
    namespace = next(
        (
            words
            for words in (['unshare', '-n'], ['unshare', '-rn'])
            if subprocess.run([*words, 'true'], capture_output=True, check=False).returncode == 0
        ),
        None,
    )
    if namespace is None:
        pytest.skip('a network namespace is not allowed here')
    bundle = tmp_path / 'offline'
    env = os.environ | {'OUT': str(bundle), 'PACKAGES': 'installed'}
    script = ['bash', str(ROOT / 'scripts/kaggle_offline.sh'), str(runs / 'a')]
    subprocess.run(script, env=env, check=True)
    subprocess.run([sys.executable, '-m', 'venv', '--without-pip', tmp_path / 'empty'], check=True)
    code = '\n'.join(c.source for c in nbformat.read(NOTEBOOK, as_version=4).cells if c.cell_type == 'code')
    (tmp_path / 'notebook.py').write_text(code)
    values = {'INPUT': tmp_path, 'PHOTOS': photos, 'MINUTES': 9, 'OUT': 'submission.csv'}
    env = {'PATH': os.environ['PATH'], **{name: str(value) for name, value in values.items()}}
    python = str(tmp_path / 'empty/bin/python')
    done = subprocess.run(
        [*namespace, python, '-c', 'import numpy'], env=env, capture_output=True, check=False
    )
    assert done.returncode
    subprocess.run([*namespace, python, 'notebook.py'], cwd=tmp_path, env=env, check=True)
    assert (tmp_path / 'submission.csv').read_text().count('\n') == PHOTOS + 1
    assert np.all([path.stat().st_size for path in (bundle / 'runs').rglob('best.pt')])
