"""Scores, report, label errors, pictures and the app of competitions other than the home one: classes that
overlap, photos of own sizes, bands and bits, one class or many.
"""

import base64
import csv
import io
import json
import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path

import cv2
import numpy as np
import pytest
from overlaps import paint, write_overlaps
from PIL import Image
from test_viz import cells

import evaluate
import viz
from config import Competition, Config, dump_config, read_competition
from data.coco import read_coco
from metrics import count_pixels
from submission import mask_format, metric_of
from utils.errors import BadInput
from utils.plotting import VIEW, differing, to_display
from viewer import label_errors

pytest.importorskip('streamlit')
from test_app import components, notes, open_page, tables

from viewer import app_data, page_photos, page_sorting

SIZES = [(60, 90), (90, 60), (64, 64), (300, 200), (60, 90), (90, 61)]  # of photos; the last is for the test
SMALL = [(40, 50), (50, 40), (44, 44), (40, 50), (60, 50), (90, 61)]


@dataclass(frozen=True)
class Made:
    """A data root, a folder of runs, and the true and predicted masks of its photos."""

    data: Path
    output: Path
    competition: Competition
    truths: dict[str, np.ndarray]
    preds: dict[str, np.ndarray]

    @property
    def rows(self) -> list[np.ndarray]:
        """The (3, K) counts of the training photos."""
        names = list(self.truths)[:-1]
        return [count_pixels(self.truths[n], self.preds[n], len(self.competition.classes)) for n in names]


KINDS = {
    'overlaps': {'metric': 'image_dice'},
    'binary': {'task': 'multiclass', 'names': ('cell',), 'channels': 1},
    'bands': {
        'task': 'multiclass',
        'metric': 'image_miou',
        'channels': 6,
        'depth': 16,
        'intensity': [0, 30000],
    },
    'many': {'task': 'multiclass', 'metric': 'miou', 'names': [f'class {k}' for k in range(41)]},
}


def make(folder: Path, kind: str) -> Made:
    """Write a data set, and a run of two folds whose predictions are the truth, moved by some pixels."""
    data, output = folder / 'data', folder / 'output'
    planes = write_overlaps(
        data, SMALL if kind == 'many' else SIZES, **{'names': ('red', 'green', 'blue'), **KINDS[kind]}
    )
    competition = read_competition(data)
    end = write_photos(data, competition)
    planes = {name.replace('.png', end): mask for name, mask in planes.items()}
    truths = planes if competition.is_multilabel else paint(planes)
    preds = {name: np.roll(mask, 3, -1) for name, mask in truths.items()}
    form = mask_format(competition, {name: mask.shape[-2:] for name, mask in truths.items()})
    names = list(truths)
    for fold in (0, 1):
        run = output / 'run' / f'fold{fold}'
        run.mkdir(parents=True)
        for file, photos in (('oof.csv', names[fold:-1:2]), ('test.csv', names[-1:])):
            with form.writer(run / file) as writer:
                for name in photos:
                    writer.write(name, preds[name])
        cfg = Config(name='run', data_root=data, competition=competition, folds=2)
        (run / 'config.yaml').write_text(dump_config(cfg))
        (run / 'metrics.csv').write_text(f'epoch,loss,{competition.metric}\n0,2,0.1\n1,1,0.4\n')
    return Made(data, output, competition, truths, preds)


def write_photos(data: Path, competition: Competition) -> str:
    """Write the photos again with the bands and bits of the competition; return the end of their names."""
    end = '.npy' if competition.channels > 3 else '.png'
    for path in sorted(data.glob('*.png')) if competition.channels != 3 else ():
        photo = cv2.imread(str(path), cv2.IMREAD_GRAYSCALE)
        if competition.channels == 1:
            cv2.imwrite(str(path), photo)
        else:
            bands = [photo.astype(np.uint16) * (100 - 20 * k) for k in range(competition.channels)]
            np.save(path.with_suffix(end), np.stack(bands, -1))
            path.unlink()
    for path in data.glob('*.json'):
        path.write_text(path.read_text().replace('.png', end))
    return end


@pytest.fixture(scope='module', params=list(KINDS))
def made(request, tmp_path_factory) -> Made:
    return make(tmp_path_factory.mktemp(request.param), request.param)


def csvs(made: Made, name: str = 'oof.csv') -> list[str]:
    return [str(made.output / f'run/fold{fold}' / name) for fold in (0, 1)]


def test_score_and_compare_by_the_competitions_metric(made, capsys):
    metric, counts = metric_of(made.competition), np.stack(made.rows)
    coco = json.loads((made.data / 'train_all.json').read_text())
    names = [image['file_name'] for image in coco['images'][::2]]
    coco['images'] = coco['images'][::2]
    coco['annotations'] = [a for a in coco['annotations'] if a['image_id'] % 2 == 0]
    labels = made.data / 'labels.json'
    labels.write_text(json.dumps(coco))
    oof = csvs(made)[0]
    for _ in range(2):  # counted, then read from beside the CSV
        evaluate.command(['score', oof, '--labels', str(labels)])
        head, line, _, _, *rest = capsys.readouterr().out.splitlines()
        score = metric.interval(counts[::2])
        assert head.split()[0] == metric.label.split()[0]
        bounds = [f'[{score.low:.4f},', f'{score.high:.4f}]']
        assert line.split()[:4] == ['1', f'{score.value:.4f}', *bounds] and line.endswith(oof)
        assert (rest.pop() == metric.note) if metric.is_by_image else True
        values = metric.by_class(counts[::2])[made.competition.scored_ids]
        scored = ['-' if np.isnan(value) else f'{value:.3f}' for value in values]
        beside = 0 if metric.name == 'miou' else 1
        assert [row.split()[-1] for row in rest] == scored and len(names) == 3
        if beside:
            iou = metric_of(made.competition.model_copy(update={'metric': 'miou'})).score(counts[::2])
            assert head.split()[-1] == 'mIoU' and line.split()[4] == f'{iou:.4f}'
    evaluate.command(['compare', oof, oof, '--data', str(made.data)])
    printed = capsys.readouterr().out
    assert f'{oof}: {metric.label} {score}' in printed and printed.count('+0.0000  [') > 1
    assert printed.endswith('no significant difference on 3 photos\n')
    first = made.competition.scored_ids.start
    assert (f'\n{made.competition.classes[0]} ' in printed) == (first == 0)


def test_labels_of_photos_that_are_not_in_the_csv(made):
    with pytest.raises(BadInput, match=r'oof.csv: has no row of image'):
        evaluate.command(['score', csvs(made)[0], '--labels', str(made.data / 'train_all.json')])


def test_what_is_counted_depends_on_how_masks_are_read(made, monkeypatch):
    path = Path(csvs(made)[0])
    coco = read_coco(made.data, 'train', made.competition)
    evaluate.read_confusions(path, coco)
    monkeypatch.setattr(evaluate, 'count_confusions', lambda *_: 1 / 0)
    found = evaluate.read_confusions(path, coco)
    np.testing.assert_array_equal(found.counts, made.rows[::2])
    assert (found.matrices is None) == made.competition.is_multilabel
    other = made.competition.model_copy(update={'score_size': 64})
    with pytest.raises(ZeroDivisionError):
        evaluate.read_confusions(path, replace(coco, competition=other))


def test_report(made, capsys):
    metric, counts = metric_of(made.competition), np.stack(made.rows)
    viz.command(['report', '--name', 'run', '--output', str(made.output)])
    score = metric.interval(np.concatenate([counts[::2], counts[1::2]]))  # in the order of the folds
    assert f'out-of-fold {metric.label} {score} (95%' in capsys.readouterr().out
    page = (made.output / 'run/report.html').read_text()
    assert cells(page, metric.label)[0][1] == f'{score.value:.4f}'
    values = metric.by_class(counts)
    for k in made.competition.object_ids:
        (line,) = [row for row in cells(page, made.competition.classes[k]) if len(row) == 7]
        assert line[1] == ('-' if np.isnan(values[k]) else f'{values[k]:.4f}')
    assert (f'<p>{metric.note}</p>' in page) == metric.is_by_image
    assert ('Confusion matrix' in page) != made.competition.is_multilabel
    assert ('pixel accuracy' in page) != made.competition.is_multilabel
    if made.competition.is_multilabel:
        (red,) = [row for row in cells(page, 'red') if len(row) == 6]
        hits, predicted, true = counts.sum(0)[:, 0]
        assert red[1:3] == [f'{true:,}', f'{hits / true:.2%}'] and red[4] == f'{predicted - hits:,}'
    first = base64.b64decode(re.findall('image/webp;base64,([^"]*)', page)[0])
    with Image.open(io.BytesIO(first)) as picture:
        assert max(picture.size) == VIEW


def test_label_errors(made):
    label_errors.main('run', made.output)
    with (made.output / 'run/suspects/suspects.csv').open(newline='') as file:
        rows = list(csv.DictReader(file))
    expected = []
    for name in list(made.truths)[:-1]:
        truth, pred = made.truths[name], made.preds[name]
        for k in made.competition.object_ids:
            if made.competition.is_multilabel:
                pixels = {
                    'missing': (truth[k] == 0) & (pred[k] == 1),
                    'doubtful': (truth[k] == 1) & (pred[k] == 0),
                }
            else:
                pixels = {'missing': (truth == 0) & (pred == k), 'doubtful': (truth == k) & (pred != k)}
            for kind, where in pixels.items():
                if np.count_nonzero(where) >= label_errors.MIN_PIXELS:
                    expected.append((name, kind, made.competition.classes[k], str(np.count_nonzero(where))))
    assert sorted((row['file_name'], row['kind'], row['class'], row['pixels']) for row in rows) == sorted(
        expected
    )
    page = (made.output / 'run/suspects/index.html').read_text()
    assert ('where it is not labelled' in page) == made.competition.is_multilabel


def test_strength_of_an_overlapping_class():
    truth, pred = np.array([[[1, 1, 0, 0]], [[255, 0, 0, 1]]]), np.array([[[1, 0, 1, 0]], [[1, 1, 0, 1]]])
    probs = np.array([[[250, 51, 204, 9]], [[255, 255, 0, 255]]], np.uint8)
    found = [('missing', 0, 1), ('doubtful', 0, 1), ('missing', 1, 1)]
    assert label_errors.weigh(found, truth, pred, probs) == pytest.approx([0.6, 0.6, 1])


def test_pictures(made, tmp_path):
    out = tmp_path / 'a.png'
    viz.command(
        ['pictures', '--csv', csvs(made)[1], '--split', 'train', '--data', str(made.data), '--out', str(out)]
    )
    with Image.open(out) as picture:
        assert picture.width > 2 * 3 * VIEW
    viz.command(['pictures', '--csv', csvs(made, 'test.csv')[0], '--data', str(made.data), '--out', str(out)])


# --- the app ------------------------------------------------------------------------------------------------


def test_page_of_runs(made):
    page = open_page('viewer.page_runs', made.data, made.output, made.competition)
    assert not page.exception and not page.error
    metric, counts = metric_of(made.competition), np.stack(made.rows)
    *hits, runs, classes = tables(page)
    assert runs[0][1:5:3] == [f'out-of-fold {metric.label}', f'validation {metric.label}']
    assert runs[1][1:5:3] == [f'{metric.score(counts):.4f}', '0.4000']
    assert classes[-1][:2] == [metric.label, f'{metric.score(counts):.4f}']
    assert len(classes) == 2 + len(made.competition.scored_ids)
    assert len(hits) == made.competition.is_multilabel
    assert (
        any(metric.note == caption.value.replace('\\', '') for caption in page.caption) == metric.is_by_image
    )


def test_page_of_photos(made, tmp_path):
    output = tmp_path / 'output'
    shutil.copytree(made.output, output)
    second = output / 'second/fold0'
    for other in (second, output / 'third/fold0'):  # the third is a copy: two of three decide the vote
        shutil.copytree(made.output / 'run/fold0', other)
    competition, names = made.competition, list(made.truths)
    sizes = {name: mask.shape[-2:] for name, mask in made.truths.items()}
    with mask_format(competition, sizes).writer(second / 'oof.csv') as writer:
        for name in names[:-1:2]:
            writer.write(name, made.truths[name])
    query = {'photo': names[0]}
    page = open_page('viewer.page_photos', made.data, output, competition, query)
    assert not page.exception and not page.error
    metric, classes = metric_of(competition), competition.classes
    run, truth = made.preds[names[0]], made.truths[names[0]]
    (table,) = tables(page)
    assert 'vote' not in table[0]  # of two, the first would decide it
    page.multiselect(key='runs').set_value(['run', 'second', 'third']).run()
    (table,) = tables(page)
    assert table[0][:5] == [f'{metric.class_label} in this photo', 'run', 'second', 'third', 'vote']
    score = f'{metric.of_image(truth, run, len(classes)):.4f}'
    assert table[-1][:5] == [metric.label, score, '1.0000', score, score]
    (views,) = components(page, 'photo_views')
    assert views['aspect'] == pytest.approx(truth.shape[-1] / truth.shape[-2], rel=0.02)
    visible = set(views['visible'])
    assert set(views['classes']) == {str(k) for k in (*competition.object_ids, 255)}
    few = len(classes) <= page_photos.MAX_LEGEND
    assert set(views['legend']) == (visible | set(competition.object_ids) if few else visible)
    page.selectbox(key='order').set_value(page_photos.DIFFER).run()
    shares = [differing([made.truths[n], made.preds[n]]).mean() for n in names[:-1:2]]
    assert notes(page)[0] == f'differ on {max(shares):.2%}'
    page.selectbox(key='class').set_value(classes[-1]).run()
    page.selectbox(key='order').set_value(page_photos.WORST).run()
    assert notes(page)[0].startswith(f'{metric.class_label} of {classes[-1]} ')
    for layer in ('truth', 'run'):
        assert not page.selectbox(key='layer').set_value(layer).run().exception
    page.segmented_control(key='split').set_value('test').run()
    assert not page.exception and not page.error and not tables(page)


def test_votes_of_planes_go_to_most_and_ties_to_the_first():
    rng = np.random.default_rng(0)
    for count in (2, 3, 4):
        preds = rng.integers(0, 2, (count, 3, 5, 6), np.uint8)
        total = preds.sum(0)
        expected = np.where(2 * total == count, preds[0], 2 * total > count)
        np.testing.assert_array_equal(app_data.vote_of(list(preds), 3), expected)


@pytest.mark.parametrize('kind', ['binary', 'bands'])
def test_photos_of_other_bands_are_chosen_for_sorting(kind, tmp_path, monkeypatch):
    made = make(tmp_path, kind)
    monkeypatch.setattr(page_sorting.st, 'selectbox', lambda _, names, key: names[0])
    monkeypatch.setattr(
        page_sorting, 'load_coco', lambda data, split, competition: read_coco(data, split, competition)
    )
    _, photo = page_sorting.choose_image(made.data, made.competition, page_sorting.TEXTS['en'])
    assert photo.shape == (90, 61, made.competition.channels)
    shown = to_display(photo)
    assert shown.shape == (90, 61, 3) and shown.dtype == np.uint8 and shown.max() > 100
