"""A CSV knows which best.pt and settings made it; where they have changed, it is refused by name."""

import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from argparse import Namespace
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import write_csv, write_rectangles
from entry_points import ROOT

import engine.writer
import ensemble
import infer
from config import HOME, Competition
from data.cache import open_cache
from data.folds import folds_path, held_out_hash, read_folds, read_rows
from engine.checkpoint import load_checkpoint, save_checkpoint
from engine.runs import open_run
from models import SegModel
from tools import postprocess
from utils.errors import BadInput
from utils.id_csv import IdWriter
from utils.id_text import SIDE
from utils.yaml_files import read_yaml
from voting.calibration import read_temperature
from voting.members import member_of
from voting.origin import (
    Origin,
    begin_origin,
    fault_of,
    identify_checkpoint,
    identify_checkpoints,
    is_current,
    origin_path,
    read_origin,
    write_origin,
)
from voting.recipe import Recipe, calibrate_model, read_ensemble, read_recipe, write_recipe
from voting.thresholds import HISTOGRAMS, fit_thresholds, read_thresholds


def change(path: Path) -> None:
    """Let a best.pt be of another training: one of its weights differs in the last bit."""
    checkpoint = load_checkpoint(path)
    tensor = next(iter(checkpoint['model'].values()))
    first = (0,) * tensor.ndim
    tensor[first] = torch.nextafter(tensor[first], torch.tensor(torch.inf))
    save_checkpoint(path, checkpoint)


def test_identity_of_a_checkpoint_is_that_of_its_content(tmp_path):
    content = {'model': {'a': torch.arange(1000.0), 'b': torch.zeros(3)}, 'epoch': 1}
    first, second = tmp_path / 'first.pt', tmp_path / 'other' / 'second.pt'
    save_checkpoint(first, content)
    second.parent.mkdir()
    torch.save(content, second)  # to a path, and not to an open file: other names inside
    assert identify_checkpoint(first) == identify_checkpoint(second)
    with zipfile.ZipFile(first) as archive:
        assert archive.testzip() is None  # the CRCs are true
    changed = {'model': content['model'], 'epoch': 2}
    save_checkpoint(second, changed)
    assert identify_checkpoint(first) != identify_checkpoint(second)
    content['model']['a'][999] += 1
    save_checkpoint(second, content)
    assert identify_checkpoint(first) != identify_checkpoint(second)
    second.write_text('no ZIP')
    assert len(identify_checkpoint(second)) == 64
    with pytest.raises(BadInput, match='none.pt: cannot be read: No such file'):
        identify_checkpoint(tmp_path / 'none.pt')


@pytest.fixture
def made(tmp_path) -> Path:
    """Write a CSV with its origin, and the checkpoint that made it."""
    csv = tmp_path / 'run' / 'fold0' / 'oof.csv'
    csv.parent.mkdir(parents=True)
    csv.with_name('best.pt').write_text('weights')
    csv.write_text('predicted')
    write_origin(csv, origin_of(csv))
    return csv


def origin_of(csv: Path) -> Origin:
    identities = identify_checkpoints(csv.parent, [csv.with_name('best.pt')])
    return Origin(identities, {'tta_scales': (1.0,)}, 'python infer.py --fold 0', {'a.jpg': [0, None]})


def test_a_csv_is_refused_once_its_checkpoint_has_changed(made):
    best = made.with_name('best.pt')
    assert fault_of(made) == '' and read_origin(made).photos == {'a.jpg': [0, None]}
    assert is_current(made, [best], {'tta_scales': (1.0,)})
    assert not is_current(made, [best], {'tta_scales': (1.0, 1.25)})
    best.write_text('others')
    assert (
        fault_of(made) == f'{made}: was made before {best} changed; make it again: python infer.py --fold 0'
    )
    assert not is_current(made, [best], {'tta_scales': (1.0,)})
    best.unlink()  # to save space
    assert fault_of(made) == '' and not is_current(made, [best], {'tta_scales': (1.0,)})
    origin_path(made).unlink()  # as of a team-mate
    assert fault_of(made) == '' and read_origin(made) is None


def test_a_copy_is_the_same_file_and_another_under_its_name_is_not(made, tmp_path):
    shutil.copytree(tmp_path / 'run', tmp_path / 'moved')  # with new times
    copy = tmp_path / 'moved' / 'fold0' / 'oof.csv'
    os.utime(copy, (1, 1))
    assert fault_of(copy) == '' and is_current(copy, [copy.with_name('best.pt')], {'tta_scales': (1.0,)})
    copy.write_text('dredicted')
    assert re.search(
        'oof.csv: is another file than infer.py wrote; make it again: .* or remove', fault_of(copy)
    )
    assert not is_current(copy, [copy.with_name('best.pt')], {'tta_scales': (1.0,)})


@pytest.mark.parametrize(
    'content',
    ['', '[]', '{}', '{"checkpoints": {"best.pt": 1}, "settings": {}}', '{"checkpoints": {}, "settings": []}']
    + ['{"checkpoints": {}, "settings": {}, "x": 1}', '{"checkpoints": {}, "settings": {}, "csv": {"x": 1}}']
    + [f'{{"checkpoints": {{}}, "settings": {{}}, "photos": {{"a": {row}}}}}' for row in ('1', '[0, [1]]')]
    + ['{"checkpoints": {}, "settings": {}, "photos": {"a": {"0": 1, "1": 2}}}', '[' * 100_000],
)
def test_a_broken_origin_is_one_line(made, content):
    origin_path(made).write_text(content)
    with pytest.raises(
        BadInput, match='oof.origin.json: not a file that infer.py wrote; predict .*oof.csv again'
    ):
        fault_of(made)
    assert not is_current(made, [made.with_name('best.pt')], {})


@pytest.mark.parametrize('moment', ['before the CSV', 'after the CSV'])
def test_a_prediction_that_is_killed_between_its_files_leaves_none_that_passes(made, moment):
    made.with_name('best.pt').write_text('others')
    begin_origin(made, origin_of(made))
    if moment == 'after the CSV':
        made.write_text('predicted anew')
    assert re.search(
        'oof.csv: its prediction was interrupted; make it again: python infer.py', fault_of(made)
    )
    assert not is_current(made, [made.with_name('best.pt')], {'tta_scales': (1.0,)})


# --- infer.py ---------------------------------------------------------------------------------------------


@pytest.fixture
def trained(tiny):
    """Write a best.pt of each fold that has learned nothing."""
    cache = open_cache(tiny, 'train')
    folds = read_folds(tiny, cache)
    for fold in (0, 1):
        torch.manual_seed(fold)
        held_out = held_out_hash(cache, np.flatnonzero(folds == fold))
        content = {'model': SegModel(tiny).state_dict(), 'config': tiny.model_dump(mode='json'), 'fold': fold}
        content |= {'epoch': 0, 'score': 0.0, 'held_out': held_out}
        save_checkpoint(tiny.run_dir(fold) / 'best.pt', content)
    return tiny


def test_infer_writes_the_origin_last_and_update_does_nothing_twice(trained, tiny_yaml, monkeypatch, capsys):
    arguments = ['--cfg', str(tiny_yaml), '--fold', 'all', '--split']
    for split in ('oof', 'test'):
        infer.command([*arguments, split, '--update'])
    merged = trained.output_dir / trained.name / 'oof.csv'
    origin = read_origin(merged)
    assert origin.checkpoints.keys() == {'fold0/best.pt', 'fold1/best.pt'}
    assert origin.command.endswith(f'--cfg {tiny_yaml} --fold all --split oof --update')
    by_fold = [read_origin(trained.run_dir(k) / 'oof.csv').photos for k in (0, 1)]
    assert origin.photos == by_fold[0] | by_fold[1] and {v[0] for v in by_fold[1].values()} == {1}
    assert read_origin(merged.with_name('test.csv')).photos is None

    def fail(*args, **kwargs):
        raise AssertionError('predicts again')

    other_folds = trained.output_dir / 'folds.csv'
    other_folds.write_bytes((trained.cache_dir / 'folds.csv').read_bytes()[::-1])
    with monkeypatch.context() as patch:
        patch.setattr(infer, 'main', fail)
        for words in (['oof'], ['test'], ['test', '--no-tta', '--set', 'tta_flips=[h]']):
            with pytest.raises(SystemExit) as end:  # no views are no flips
                infer.command([*arguments, *words, '--update'])
            assert end.value.code == 0
        for more in (
            ['--save-probs'],
            ['--set', 'tta_flips=[h]'],
            ['--set', 'window=64'],
            ['--set', f'folds_csv={other_folds}'],
        ):
            with pytest.raises(AssertionError, match='predicts again'):
                infer.command([*arguments, 'oof', '--update', *more])
        change(trained.run_dir(1) / 'best.pt')
        with pytest.raises(AssertionError, match='predicts again'):
            infer.command([*arguments, 'oof', '--update'])
    for csv in (merged, trained.run_dir(1) / 'oof.csv'):
        assert f'was made before {trained.run_dir(1) / "best.pt"} changed; make it again: ' in fault_of(csv)
    assert fault_of(trained.run_dir(0) / 'oof.csv') == ''


def test_update_makes_histograms_that_are_gone(trained):
    competition = trained.competition.model_copy(update={'task': 'multilabel'})
    cfg = trained.model_copy(update={'competition': competition})
    csv = write_csv(cfg.run_dir(0) / 'oof.csv', {})
    settings = infer.prediction_settings(cfg, csv, tta=True)
    write_origin(csv, Origin(identify_checkpoints(csv.parent, [csv.with_name('best.pt')]), settings))
    arguments = Namespace(fold=0, split='oof', save_probs=False, no_tta=False, model=None)
    csv.with_name(HISTOGRAMS).touch()
    assert infer.is_made(cfg, arguments)
    csv.with_name(HISTOGRAMS).unlink()
    assert not infer.is_made(cfg, arguments)


def test_update_needs_no_torch_to_find_that_nothing_is_to_be_done(trained, tiny_yaml):
    infer.main(trained, 0, 'test')
    words = ['infer.py', '--cfg', str(tiny_yaml), '--fold', '0', '--split', 'test', '--update']
    words = [sys.executable, '-X', 'importtime', *words]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == f'{trained.run_dir(0) / "test.csv"}: is up to date\n'
    assert not re.search(r'\| +torch\n', done.stderr)


def test_a_prediction_that_is_killed_while_its_files_are_renamed(trained, monkeypatch):
    """Of another best.pt than the CSV that is there: the writer itself marks it, before and after the CSV."""
    csv = trained.run_dir(0) / 'test.csv'
    infer.main(trained, 0, 'test')
    change(csv.with_name('best.pt'))
    before = csv.stat().st_mtime_ns

    def die(*args, **kwargs):
        raise KeyboardInterrupt

    for owner, name in ((IdWriter, '__exit__'), (engine.writer, 'write_origin')):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(owner, name, die)
            infer.main(trained, 0, 'test')
        assert (csv.stat().st_mtime_ns == before) == (owner is IdWriter)
        assert 'test.csv: its prediction was interrupted; ' in fault_of(csv)
    infer.main(trained, 0, 'test')
    assert fault_of(csv) == ''


# --- who uses a CSV ---------------------------------------------------------------------------------------


@pytest.fixture
def models(tmp_path) -> Path:
    """Write two models of two folds with probabilities, which know what made them, and say where output/ is.

    Their checkpoints are any files.
    """
    rng = np.random.default_rng(0)
    names = [f'{i}.jpg' for i in range(6)]
    truth = write_rectangles(
        tmp_path / 'data', 256, 256, {name: (30 + 20 * i, 60, 100, 140, 1) for i, name in enumerate(names)}
    )
    for model in 'ab':
        for fold in (0, 1):
            predict(tmp_path / 'output' / model / f'fold{fold}', names[fold::2], truth, rng)
    return tmp_path / 'output'


def predict(folder: Path, names: list[str], truth: dict[str, np.ndarray], rng: np.random.Generator) -> None:
    """Write what a fold predicts out of fold and on two test photos, with new weights."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / 'best.pt').write_bytes(rng.bytes(20))
    for split, photos in (('oof', names), ('test', ['x.jpg', 'y.jpg'])):
        scores = rng.integers(0, 90, (len(photos), 11, SIDE, SIDE))
        for row, name in enumerate(photos):
            np.put_along_axis(scores[row], truth.get(name, truth['0.jpg'])[None].astype(int), 75, 0)
        csv = write_csv(
            folder / f'{split}.csv', dict(zip(photos, scores.argmax(1).astype(np.uint8), strict=True))
        )
        np.save(folder / f'{split}_probs.npy', (255 * scores / scores.sum(1, keepdims=True)).astype(np.uint8))
        write_origin(csv, origin_of(csv))


def typed(output: Path, *options: str, order: tuple[str, ...] = ('a', 'b'), folds: tuple[int, ...] = (0, 1)):
    """Return the arguments of a vote."""
    csvs = [str(output / model / f'fold{k}' / 'test.csv') for model in order for k in folds]
    return [*csvs, *options, '--data', str(output.parent / 'data')]


@pytest.fixture
def test_json(models) -> None:
    images = [{'file_name': name} for name in ('x.jpg', 'y.jpg')]
    (models.parent / 'data' / 'test.json').write_text(json.dumps({'images': images}))


@pytest.mark.usefixtures('test_json')
def test_a_retrained_fold_is_refused_in_every_vote(models):
    out = ['--out', str(models / 'vote.csv')]
    ensemble.main(typed(models, *out, '--search'))
    before = (models / 'vote.csv').read_bytes()
    (models / 'b' / 'fold1' / 'best.pt').write_text('trained again')
    recipe = models / 'ensemble.yaml'
    for options in ([], ['--soft'], ['--search'], ['--search', '--soft'], ['--recipe', str(recipe)]):
        with pytest.raises(BadInput, match='b/fold1/test.csv: was made before .*b/fold1/best.pt changed'):
            ensemble.main(typed(models, *out, *options))
    assert (models / 'vote.csv').read_bytes() == before
    ensemble.main([str(models / 'a/fold1/test.csv'), *typed(models, *out, folds=(0,))])
    (models / 'b' / 'fold1' / 'best.pt').unlink()
    ensemble.main(typed(models, *out))  # nothing is known against it
    with pytest.raises(BadInput, match='a/fold0/oof.csv: was made before'):
        shutil.copy(models / 'a' / 'fold1' / 'best.pt', models / 'a' / 'fold0' / 'best.pt')
        write_origin(models / 'a/fold0/test.csv', origin_of(models / 'a/fold0/test.csv'))
        ensemble.main(typed(models, *out, '--search'))
    with pytest.raises(BadInput, match='a/fold0/oof.csv: was made before'):
        read_ensemble(recipe, 11)


@pytest.mark.usefixtures('test_json')
def test_oof_and_test_of_two_best_pt_are_refused_when_both_are_gone(models):
    folder, out = models / 'a' / 'fold0', ['--out', str(models / 'vote.csv'), '--search']
    (folder / 'best.pt').write_text('trained again')
    write_origin(folder / 'test.csv', origin_of(folder / 'test.csv'))
    (folder / 'best.pt').unlink()
    with pytest.raises(
        BadInput, match='fold0/test.csv: was made by another .*fold0/best.pt than .*fold0/oof.csv'
    ):
        ensemble.main(typed(models, *out))


@pytest.mark.usefixtures('test_json')
def test_the_same_csv_twice_is_named_in_a_vote_and_refused_in_a_search(models, capsys):
    out = ['--out', str(models / 'vote.csv')]
    shutil.copytree(models / 'a', models / 'copy')
    ensemble.main(typed(models, *out, order=('a', 'copy', 'b')))
    printed = capsys.readouterr().out
    for k in (0, 1):
        first, second = (models / name / f'fold{k}' / 'test.csv' for name in ('a', 'copy'))
        assert f'warning: {first} and {second} are the same: the vote counts it twice' in printed
    assert printed.count('warning') == 2
    with pytest.raises(
        BadInput, match='copy/fold0/oof.csv: is the same as .*a/fold0/oof.csv: one model twice'
    ):
        ensemble.main(typed(models, *out, '--search', order=('a', 'copy', 'b')))


@pytest.mark.usefixtures('test_json')
@pytest.mark.parametrize('options', [[], ['--by-class'], ['--soft']], ids=str)
def test_a_recipe_gives_the_bytes_of_its_search(models, options, tmp_path, monkeypatch):
    """In whatever order the CSVs are given, from another folder, and after output/ was moved."""
    out, again = models / 'vote.csv', tmp_path / 'again.csv'
    ensemble.main(typed(models, '--search', *options, '--out', str(out)))
    recipe = ['--recipe', str(models / 'ensemble.yaml'), '--out', str(again)]
    for order, folds in ((('a', 'b'), (0, 1)), (('b', 'a'), (1, 0))):
        ensemble.main(typed(models, *recipe, order=order, folds=folds))
        assert again.read_bytes() == out.read_bytes()
    moved = models.rename(tmp_path / 'moved')
    recipe[1] = str(moved / 'ensemble.yaml')
    ensemble.main(typed(moved, *recipe, order=('b', 'a')))
    assert again.read_bytes() == (moved / 'vote.csv').read_bytes()


def test_members_of_a_recipe_with_one_oof_keep_their_own_weights(models):
    """As a search of an earlier version wrote it: a copy of a model, with another weight than the model."""
    shutil.copytree(models / 'a', models / 'copy')
    members = [member_of(models / name / 'fold0' / 'test.csv') for name in ('a', 'copy', 'b')]
    table = [[Fraction(weight)] * 11 for weight in (3, 1, 2)]
    path = models / 'ensemble.yaml'
    write_recipe(path, members, Recipe('soft vote', table, [1.0, 2.0, 0.5], [0.3] * 11))
    written = read_yaml(path)
    assert [one.get('temperature') for one in written['members']] == [None, 2.0, 0.5]
    for given in (members, members[::-1]):
        chosen, recipe = read_recipe(path, given, 11)
        assert chosen == members and recipe == Recipe('soft vote', table, [1.0, 2.0, 0.5], [0.3] * 11)
    moved = [member_of(shutil.copy(m.path, models / f'{n}.csv')) for n, m in enumerate(members)]
    assert moved[0].path.parent == models  # whose oof.csv is
    shutil.copy(members[0].path.with_name('oof.csv'), models / 'oof.csv')
    chosen, recipe = read_recipe(path, [moved[0], members[1], members[2]], 11)
    assert [m.path for m in chosen] == [moved[0].path, members[1].path, members[2].path]
    with pytest.raises(BadInput, match='0.csv: is no member of'):  # both entries of this oof.csv are taken
        read_recipe(path, [moved[0], *members], 11)


@pytest.mark.usefixtures('test_json')
def test_a_recipe_whose_member_was_predicted_anew_is_refused(models):
    out, rng = ['--out', str(models / 'vote.csv')], np.random.default_rng(1)
    ensemble.main(typed(models, *out, '--search'))
    truth = {f'{i}.jpg': np.zeros((SIDE, SIDE), np.uint8) for i in range(6)}
    predict(models / 'b' / 'fold0', ['0.jpg', '2.jpg', '4.jpg'], truth, rng)
    with pytest.raises(BadInput, match='b/fold0/oof.csv: has changed since .*ensemble.yaml was made'):
        ensemble.main(typed(models, *out, '--recipe', str(models / 'ensemble.yaml')))
    with pytest.raises(BadInput, match='has changed since'):
        read_ensemble(models / 'ensemble.yaml', 11)


def test_a_calibration_knows_what_it_was_fitted_on(models):
    """The teacher of pseudo-labels takes it; the fit itself refuses an oof.csv of an earlier best.pt."""
    folder, data = models / 'a', models.parent / 'data'
    calibrate_model(folder, data, HOME)
    fitted = (folder / 'calibration.yaml').read_text()
    read_temperature(folder)
    moved = shutil.copytree(models, models.parent / 'moved')
    read_temperature(moved / 'a')
    best = folder / 'fold1' / 'best.pt'
    before = best.read_bytes()
    best.write_text('trained again')
    again = f'choose again: python evaluate.py calibrate {folder}'
    message = f'a/calibration.yaml: was made before {best} changed; {again}'
    with pytest.raises(BadInput, match=message):
        read_temperature(folder)
    with pytest.raises(BadInput, match='a/fold1/oof.csv: was made before .*best.pt changed; make it again'):
        calibrate_model(folder, data, HOME)
    assert (folder / 'calibration.yaml').read_text() == fitted
    best.write_bytes(before)
    oof = folder / 'fold1' / 'oof.csv'  # of a team-mate: no origin, other predictions
    oof.write_text(oof.read_text().replace(' 0 0', ' 0 1', 1))
    origin_path(oof).unlink()
    with pytest.raises(BadInput, match='a/calibration.yaml: was made before .*a/fold1/oof.csv changed'):
        read_temperature(folder)
    for path in (best, oof):
        path.unlink()
    read_temperature(folder)  # nothing is known against it


def test_thresholds_know_what_they_were_chosen_on(tmp_path):
    competition = Competition(classes=('a', 'b'), task='multilabel', metric='dice', score_size='own')
    rng = np.random.default_rng(0)
    for fold in (0, 1):
        csv = tmp_path / f'fold{fold}' / 'oof.csv'
        csv.parent.mkdir()
        csv.with_name('best.pt').write_text(f'{fold}')
        csv.write_text('predicted')
        write_origin(csv, origin_of(csv))
        np.save(csv.with_name(HISTOGRAMS), rng.integers(0, 9, (4, 2, 2, 256), np.uint32))
    fit_thresholds(tmp_path, competition)
    read_thresholds(tmp_path, 2)
    (tmp_path / 'fold0' / 'best.pt').write_text('trained again')
    with pytest.raises(
        BadInput, match='thresholds.yaml: was made before .*fold0/best.pt changed; choose again: '
    ):
        read_thresholds(tmp_path, 2)
    read_thresholds(tmp_path, 2, fold=0)  # to predict new histograms
    with pytest.raises(BadInput, match='fold0/oof.csv: was made before .*fold0/best.pt changed'):
        fit_thresholds(tmp_path, competition)
    (tmp_path / 'fold0' / 'best.pt').write_text('0')
    read_thresholds(tmp_path, 2)
    np.save(tmp_path / 'fold1' / HISTOGRAMS, np.zeros((4, 2, 2, 256), np.uint32))
    with pytest.raises(BadInput, match='thresholds.yaml: was made before .*fold1/oof_histograms.npy changed'):
        read_thresholds(tmp_path, 2)
    (tmp_path / 'fold1' / HISTOGRAMS).unlink()  # the photos of one fold would be all
    with pytest.raises(BadInput, match='fold1/oof_histograms.npy: no such file; infer.py --split oof writes'):
        fit_thresholds(tmp_path, competition)


def test_masks_of_an_earlier_best_pt_are_not_cleaned(models, capsys):
    csv = models / 'a' / 'fold0' / 'test.csv'
    csv.with_name('best.pt').write_text('trained again')
    data = ['--data', str(models.parent / 'data')]
    for words in (
        ['search', str(csv.with_name('oof.csv'))],
        ['apply', str(csv), '--out', str(models / 'c.csv')],
    ):
        with pytest.raises(BadInput, match='was made before .*best.pt changed'):
            postprocess.command([*words, *data])
    assert not (models / 'c.csv').exists()


def test_overwrite_leaves_no_prediction_and_no_origin(trained):
    infer.main(trained, None, 'oof', save_probs=True)
    infer.main(trained, 0, 'test')
    open_run(trained, 0, overwrite=True)
    for folder in (trained.output_dir / trained.name, trained.run_dir(0)):
        assert [path for split in ('oof', 'test') for path in folder.glob(f'{split}*')] == []
    assert origin_path(trained.run_dir(1) / 'oof.csv').exists()


def test_photos_swapped_between_folds_have_been_seen(trained, tmp_path):
    """folds.csv has the same names, and each the photo of another fold."""
    root = shutil.copytree(trained.data_root, tmp_path / 'swapped')
    folds = dict(read_rows(folds_path(trained)))
    names = [[name for name in folds if folds[name] == fold] for fold in (0, 1)]
    pairs = [*zip(*names, strict=True)]
    other = dict(pairs) | {second: first for first, second in pairs}
    table = root / 'train_all.json'
    content = json.loads(table.read_text())
    for image in content['images']:
        image['file_name'] = other[image['file_name']]
        shutil.copy(trained.data_root / other[image['file_name']], root / image['file_name'])
    table.write_text(json.dumps(content))
    places = {'data_root': root, 'cache_dir': tmp_path / 'cache', 'folds_csv': folds_path(trained)}
    with pytest.raises(BadInput, match='has seen labels of fold 0'):
        infer.main(trained.model_copy(update=places), 0, 'oof')


def test_one_model_in_the_folders_of_two_folds_is_refused(trained):
    shutil.copy(trained.run_dir(0) / 'best.pt', trained.run_dir(1) / 'best.pt')
    for fold, split in ((None, 'test'), (1, 'test'), (1, 'oof')):
        with pytest.raises(
            BadInput, match='fold1/best.pt: is the model of fold 0, .* fold 1; expected it in .*fold0'
        ):
            infer.main(trained, fold, split)
