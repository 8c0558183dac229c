"""A run that another replaces stays until that one has a checkpoint; nothing that is read is written over."""

import shutil
from datetime import datetime

import numpy as np
import pytest
from conftest import write_csv

import engine.runs
import ensemble
import infer
import prepare
import train
import viz
from engine.runs import move_aside, replaced_runs
from tools import offline, postprocess
from utils.errors import BadInput


def contents(folder) -> dict:
    """The files below a folder, but for the lock and the log, which stay."""
    paths = (path for path in folder.rglob('*') if path.is_file() and path.name not in ('.lock', 'log.txt'))
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def test_a_run_stays_until_the_new_one_has_a_checkpoint(tiny, monkeypatch, capsys):
    train.main(tiny, 0)
    folder = tiny.run_dir(0)
    (folder / 'oof.csv').write_text('of an hour')
    (folder.parent / 'oof.csv').write_text('of all folds')
    before = contents(folder)
    with monkeypatch.context() as patch:
        patch.setattr(train, 'train_epochs', lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train.main(tiny, 0, overwrite=True)
        (old,) = replaced_runs(folder)
        assert contents(old) == before | {'all_folds/oof.csv': b'of all folds'}
        capsys.readouterr()
        with pytest.raises(ZeroDivisionError):
            train.main(tiny, 0, resume=True)
        assert f'{old} holds an earlier run' in capsys.readouterr().out
    with pytest.raises(BadInput, match=f'no such checkpoint; {old} holds an earlier run'):
        infer.main(tiny, 0, 'oof')
    with pytest.raises(BadInput, match='is being replaced; leave it out'):
        ensemble.main([str(old / 'oof.csv'), '--out', str(folder.parent / 'vote.csv')])
    train.main(tiny, 0)
    assert replaced_runs(folder) == [] and (folder / 'best.pt').exists()
    assert not (folder / 'oof.csv').exists() and not (folder.parent / 'oof.csv').exists()


def test_a_clock_that_is_set_back_replaces_nothing(tmp_path, monkeypatch):
    class Clock(datetime):
        @classmethod
        def now(cls, zone=None):
            return datetime(2026, 1, 2, 3, 4, 5)

    monkeypatch.setattr(engine.runs, 'datetime', Clock)
    folder = tmp_path / 'fold0'
    for text in ('one', 'two', 'three'):
        folder.mkdir(exist_ok=True)
        (folder / 'best.pt').write_text(text)
        move_aside(folder)
    assert [(path / 'best.pt').read_text() for path in replaced_runs(folder)] == ['one', 'two', 'three']
    (tmp_path / 'fold0.old-mine').mkdir()
    (tmp_path / 'fold01.old-20260102-030405').mkdir()
    (folder / 'metrics.csv').write_text('of a run without a result')
    move_aside(folder)
    assert len(replaced_runs(folder)) == 3 and not (folder / 'metrics.csv').exists()
    engine.runs.remove_replaced(folder)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {'fold0', 'fold0.old-mine', 'fold01.old-20260102-030405'}


def test_a_model_without_last_pt_is_not_trained_over(tiny, capsys):
    score = train.main(tiny, 0)
    folder = tiny.run_dir(0)
    (folder / 'last.pt').unlink()
    before = contents(folder)
    with pytest.raises(BadInput, match='holds a model, best.pt, but no last.pt .* --overwrite'):
        train.main(tiny, 0)
    assert train.main(tiny, 0, resume=True) == score
    assert 'has ended, with 1 epochs' in capsys.readouterr().out and contents(folder) == before
    for name in ('metrics.csv', 'config.yaml'):  # as of a soup, or a link that tools.compare made
        (folder / name).unlink()
        with pytest.raises(BadInput, match='holds a model'):
            train.main(tiny, 0, resume=True)
    assert (folder / 'best.pt').read_bytes() == before['best.pt']


def test_weights_to_start_from_are_not_replaced(tiny):
    train.main(tiny, 0)
    best = tiny.run_dir(0) / 'best.pt'
    before = best.read_bytes()
    for change in ({'weights': best}, {'encoder_weights': str(best)}):
        with pytest.raises(BadInput, match=f'{best} lies in .*fold0, .* --set name=NAME'):
            train.main(tiny.model_copy(update=change), 0, overwrite=True)
    assert best.read_bytes() == before and replaced_runs(best.parent) == []


def test_what_is_read_is_not_written_over(shapes, tmp_path, tiny_yaml):
    data = shutil.copytree(shapes, tmp_path / 'set')
    photo = data / 'batch_01/0000.jpg'
    csv = write_csv(tmp_path / 'run/test.csv', {'a.jpg': np.zeros((256, 256), np.uint8)})
    recipe = tmp_path / 'recipe.yaml'
    recipe.write_text('{}')
    (tmp_path / 'pack/runs/a/fold0').mkdir(parents=True)
    for name in ('best.pt', 'config.yaml'):
        (tmp_path / 'pack/runs/a/fold0' / name).write_text(tiny_yaml.read_text())
    table, other = data / 'train_all.json', tmp_path / 'other'
    run = tmp_path / 'pack/runs/a'
    predict = ['predict', '--minutes', '1', '--out', tmp_path / 'x.csv', '--bundle', other]
    calls = [
        (prepare, ['masks', '--data', data, '--out', data]),
        (prepare, ['taco', '--annotations', table, '--out', data, '--overwrite']),
        (prepare, ['taco', '--annotations', other, '--photos', data, '--out', data, '--overwrite']),
        (prepare, ['cvat', '--xml', table, '--photos', other, '--out', data, '--overwrite']),
        (infer, ['--cfg', tiny_yaml, '--fold', '0', '--image', photo, '--out', photo]),
        (viz, ['pictures', '--csv', csv, '--out', csv, '--data', data]),
        (postprocess, ['apply', csv, '--out', csv, '--data', data]),
        (offline, ['pack', run, '--out', tmp_path / 'pack', '--packages', 'none']),
        (offline, [*predict, '--photos', tmp_path / 'work/data/photos', '--work', tmp_path / 'work']),
    ]
    votes = [['--out', csv], ['--out', csv.with_name('oof.csv')], ['--out', recipe, '--recipe', recipe]]
    (tmp_path / 'work/data/photos').mkdir(parents=True)
    shutil.copy(photo, tmp_path / 'work/data/photos')
    before = contents(tmp_path)
    for module, words in calls:
        with pytest.raises(BadInput, match=r'which is read|is the CSV that is read'):
            module.command([*map(str, words)])
    for words in votes:
        with pytest.raises(BadInput, match=r'which is read|is both the --out'):
            ensemble.main([*map(str, [csv, *words, '--data', data])])
    after = contents(tmp_path)
    assert {name: after.get(name) for name in before} == before
