"""Pictures and the report of a run."""

import base64
import io
import json
import re
import shutil
import subprocess
import sys
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from conftest import write_csv, write_rectangles
from PIL import Image

import viz
from config import CLASSES, HOME, dump_config, make_config
from data.coco import draw_mask, read_coco, read_labels
from metrics import IGNORED
from submission import downsample_mask
from utils.errors import BadInput
from utils.id_csv import IdReader
from utils.palette import PALETTE
from utils.plotting import (
    GAP,
    VIEW,
    comparison_row,
    differing,
    draw_confusion,
    draw_curves,
    fit,
    overlay,
    resize_mask,
    resize_photo,
    sheet,
    to_display,
    write_png,
)
from viewer import label_errors, report
from viewer.html_page import html_confusion
from voting.members import member_of
from voting.origin import Origin, write_origin
from voting.recipe import Recipe, write_recipe

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope='module')
def output(shapes, tmp_path_factory) -> Path:
    """An output folder with a run of two folds, of which fold 1 took metal for glass, and a submission."""
    output = tmp_path_factory.mktemp('output')
    photos = read_coco(shapes, 'train', HOME).photos
    for fold in (0, 1):
        folder = output / 'run' / f'fold{fold}'
        masks = {photo.file_name: draw_mask(photo) for photo in photos[fold::2]}
        if fold == 1:
            masks = {name: np.where(mask == 4, 5, mask) for name, mask in masks.items()}
        write_csv(folder / 'oof.csv', masks)
        (folder / 'config.yaml').write_text(
            dump_config(make_config({'name': 'run', 'data_root': str(shapes)}, 'here'))
        )
        (folder / 'metrics.csv').write_text(
            'epoch,step,lr,loss,miou\n0,3,1e-4,2.5,0.1\n1,6,1e-4,1.5,\n2,9,1e-4,1.0,0.4\n'
        )
    test = read_coco(shapes, 'test', HOME).photos
    write_csv(output / 'submission.csv', {photo.file_name: np.zeros((256, 256), np.uint8) for photo in test})
    return output


# --- pictures -----------------------------------------------------------------------------------------------


def test_overlay_tints_objects_outlines_them_and_leaves_the_background():
    image = np.random.default_rng(0).integers(0, 256, (40, 60, 3), np.uint8)
    mask = np.zeros((40, 60), np.uint8)
    mask[10:20, 10:30] = 4
    mask[10:20, 30:50] = IGNORED
    before = image.copy()
    out = overlay(image, mask, opacity=0.5)
    assert out.shape == image.shape and out.dtype == np.uint8 and np.array_equal(image, before)
    assert np.array_equal(out[mask == 0], image[mask == 0])
    assert (out[10, 10:30] == PALETTE[4]).all() and (
        out[10:20, 29] == PALETTE[4]
    ).all()  # outlined on both borders
    assert (out[10:20, 30] == 255).all()
    expected = (image[15, 20].astype(float) + PALETTE[4]) / 2
    assert np.abs(out[15, 20] - expected).max() <= 0.5
    assert np.array_equal(overlay(image, mask, opacity=0)[12:18, 12:28], image[12:18, 12:28])
    with pytest.raises(ValueError, match='expected one size'):
        overlay(image, mask[:-1])


def test_overlapping_objects_mix_their_colours_and_keep_their_outlines():
    image = np.full((40, 60, 3), 90, np.uint8)
    planes = np.zeros((3, 40, 60), np.uint8)
    planes[0, 5:25, 5:35], planes[2, 15:35, 20:50], planes[1, 38, 58] = 1, 1, IGNORED
    out = overlay(image, planes, opacity=1)
    colours = PALETTE.astype(int)
    assert out[10, 10].tolist() == PALETTE[0].tolist() and out[30, 40].tolist() == PALETTE[2].tolist()
    assert out[20, 28].tolist() == ((colours[0] + colours[2]) // 2).tolist()
    assert (out[5, 5:20] == PALETTE[0]).all() and (out[15, 20:35] == PALETTE[2]).all()
    assert (out[24, 5:20] == PALETTE[0]).all() and (out[24, 21:34] == PALETTE[0]).all()  # inside the other
    assert (out[38, 58] == 255).all() and (out[0, 0] == 90).all()
    ids = np.where(planes[0] == 1, 4, 0).astype(np.uint8)
    as_plane = np.zeros((5, 40, 60), np.uint8)
    as_plane[4] = planes[0]
    assert np.array_equal(overlay(image, ids), overlay(image, as_plane))


def test_photos_of_any_bands_are_displayed():
    rng = np.random.default_rng(0)
    rgb = rng.integers(0, 256, (6, 9, 3), np.uint8)
    assert np.array_equal(to_display(rgb), rgb)
    for grey in (rgb[..., 0], rgb[..., :1], rgb[..., :2]):
        assert np.array_equal(to_display(grey), np.repeat(rgb[..., :1], 3, 2))
    deep = np.concatenate([rgb, rgb], 2).astype(np.uint16) * 16 + 100
    deep[0, 0, :2], deep[..., 5] = (100, 100 + 255 * 16), 65535  # the sixth band is not shown
    deep[0, 0, 2] = int(rgb[0, 0, 2]) * 16 + 100
    assert np.array_equal(to_display(deep)[1:], rgb[1:])
    assert not to_display(np.full((4, 4, 1), 700, np.uint16)).any()
    assert to_display(rng.random((4, 5, 6))).dtype == np.uint8
    for photo in (rgb[..., 0], rgb[..., :1], rgb[..., :2], rgb, deep):
        assert resize_photo(photo, (4, 5)).shape == (4, 5, 3)


def test_views_keep_the_aspect():
    assert [fit(size, 256) for size in ((512, 512), (100, 300), (300, 100), (5000, 1))] == [
        (256, 256), (85, 256), (256, 85), (256, 1),
    ]  # fmt: skip
    planes = np.random.default_rng(0).integers(0, 2, (3, 64, 32), np.uint8)
    assert np.array_equal(resize_mask(planes, (32, 16)), planes[:, ::2, ::2])
    assert np.array_equal(resize_mask(planes[0], (32, 16)), planes[0, ::2, ::2])
    assert np.array_equal(differing([planes, planes]), np.zeros((64, 32), bool))
    assert np.array_equal(differing([planes, 1 - planes[::-1]]), (planes == planes[::-1]).any(0))
    assert np.array_equal(differing([planes[0], planes[1], planes[2]]), (planes != planes[0]).any(0))


def test_png_is_whole_and_its_faults_are_told(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (8, 9, 3), np.uint8)
    write_png(tmp_path / 'new' / 'a.png', image)
    assert np.array_equal(np.asarray(Image.open(tmp_path / 'new' / 'a.png')), image)
    write_png(tmp_path / 'a.png', np.concatenate([image, PALETTE[None, :9], PALETTE[None, 247:]]), step=8)
    rounded = np.asarray(Image.open(tmp_path / 'a.png')).astype(int)
    assert np.abs(rounded[:8] - image).max() <= 4 and np.array_equal(rounded[8], PALETTE[:9])
    assert (rounded[9, -1] == 255).all()
    for path in (tmp_path / 'a.png' / 'b.png', tmp_path / 'new'):
        with pytest.raises(BadInput, match='cannot be written'):
            write_png(path, image)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['a.png', 'new']


def test_sheet_has_a_place_for_each_view():
    image, pred = np.full((100, 300, 3), 77, np.uint8), np.zeros((256, 256), np.uint8)
    pred[:128] = 3
    truth = pred.copy()
    truth[:64] = 0
    row = comparison_row('photo.jpg', image, truth, pred, 'mIoU 0.58')
    assert [view.shape for view in row.views] == [(85, VIEW, 3)] * 3 and row.ids == {3}  # 100 of 300
    one = sheet([row], ['photo', 'truth', 'prediction'], CLASSES)
    four = sheet([row] * 4, ['photo', 'truth', 'prediction'], CLASSES)
    assert one.shape[1] == 3 * VIEW + GAP * 3 and four.shape[1] == 2 * one.shape[1] + GAP
    assert four.shape[0] == one.shape[0] + 85 + 28
    assert (four == 77).all(2).sum() >= 4 * 85 * VIEW  # the grey photo, four times
    assert (one == PALETTE[3]).all(2).sum() > 14 * 14  # the legend's swatch, and the outlines


def test_long_file_names_and_many_classes_fit(tmp_path):
    pred = np.arange(256, dtype=np.uint8).repeat(256).reshape(256, 256)
    row = comparison_row('쓰레기/' + 'long_name_' * 40 + '.jpg', np.zeros((9, 9, 3), np.uint8), None, pred)
    picture = sheet([row], ['photo', 'prediction'], [f'class {k}' for k in range(255)])
    assert picture.shape[1] == 2 * VIEW + GAP // 2 + 2 * GAP


@pytest.mark.filterwarnings('error')
def test_confusion_and_curves_are_drawn_of_anything():
    confusion = np.diag(np.arange(11))  # nothing of class 0
    assert draw_confusion(confusion, CLASSES).shape[2] == 3
    draw_confusion(np.eye(2), ['$x^', '_' * 300])
    draw_confusion(np.ones((60, 60)), [f'class {k}' for k in range(60)])
    for lines in (
        {},
        {'fold 0': []},
        {'fold 0': [(1, 0.5)]},
        {f'fold {k}': [(1, k), (2, 2e6)] for k in range(20)},
    ):
        assert draw_curves({'loss': lines, 'mIoU': lines}).shape == (400, 1120, 3)


def test_confusion_is_coloured_by_share():
    """Right pixels are blue and wrong ones red, the darker the more of the row they are."""
    picture = draw_confusion(np.array([[90, 10], [0, 0]]), ['a', 'b']).astype(int)
    blue, red = picture[..., 2] - picture[..., 0], picture[..., 0] - picture[..., 2]
    assert blue.max() > 140 and 20 < red.max() < 60  # 90 % of the full blue, 10 % of the full red
    assert np.count_nonzero(blue > 140) > 1000 < np.count_nonzero(red > 20)


def test_pictures_command(shapes, output, tmp_path, capsys):
    out = tmp_path / 'new' / 'pic.png'
    viz.command([
        'pictures', '--csv', str(output / 'submission.csv'), '--data', str(shapes), '--out', str(out),
        '--labels', str(shapes / 'test_labels.json'), '--count', '2',
    ])  # fmt: skip
    assert '2 photos' in capsys.readouterr().out
    assert np.asarray(Image.open(out)).shape[1] == 2 * (3 * VIEW + 3 * GAP) + GAP
    theirs = tmp_path / 'theirs.csv'
    content = (output / 'submission.csv').read_bytes()
    theirs.write_bytes(content.replace(b'batch_01/', b'batch_01\\').replace(b'\n', b'\r\n'))
    viz.command(['pictures', '--csv', str(theirs), '--data', str(shapes), '--out', str(out), '--count', '2'])
    assert '2 photos' in capsys.readouterr().out
    oof = str(output / 'run' / 'fold0' / 'oof.csv')
    options = ['--split', 'train', '--count', '1']
    viz.command(['pictures', '--csv', oof, '--data', str(shapes), '--out', str(out), *options])
    assert '1 photos' in capsys.readouterr().out
    with pytest.raises(BadInput, match='has no row of a test photo'):
        viz.command(['pictures', '--csv', oof, '--data', str(shapes), '--out', str(out)])


# --- labels -------------------------------------------------------------------------------------------------


def test_labels_that_name_an_image_twice(shapes, tmp_path):
    labels = json.loads((shapes / 'test_labels.json').read_text())
    labels['images'][1]['file_name'] = labels['images'][0]['file_name']
    (tmp_path / 'l.json').write_text(json.dumps(labels))
    with pytest.raises(BadInput, match='the same file_name'):
        read_labels(tmp_path / 'l.json', HOME)


# --- the report ---------------------------------------------------------------------------------------------


def cells(page: str, first: str) -> list[list[str]]:
    """The rows of a page's tables whose first cell is this."""
    rows = [re.findall('<t[dh][^>]*>(.*?)</t[dh]>', row) for row in page.split('<tr')]
    return [row for row in rows if row[:1] == [first]]


def test_report_of_a_run(output, shapes, capsys, monkeypatch):
    monkeypatch.setattr(report, 'RANKED', 2)
    path = output / 'run' / 'report.html'
    viz.command(['report', '--name', 'run', '--output', str(output)])
    out = capsys.readouterr().out
    assert 'run: 2 folds: out-of-fold mIoU 0.8' in out and str(path) in out
    assert '(95% bootstrap interval) on 24 photos' in out
    page = path.read_text()
    metal = cells(page, 'Metal')[0]  # all folds, interval, fold 0, fold 1
    low, high = map(float, metal[2].split(' to '))
    assert metal[3:5] == ['1.0000', '0.0000'] and 0 <= low < float(metal[1]) < high <= 1
    assert cells(page, 'Paper')[0][1:4] == ['1.0000', '1.0000 to 1.0000', '1.0000']
    assert page.count('src="data:image/png;base64,') == 2  # the curves of the loss and of the score
    assert 'http' not in page and page.count('<script') == 1 and not (output / 'run' / 'report').exists()
    assert 'ensemble' not in page
    first = base64.b64decode(re.findall('image/webp;base64,([^"]*)', page)[0])
    assert np.asarray(Image.open(io.BytesIO(first))).shape == (VIEW, VIEW, 3)
    assert re.search(r'<h2>Metal</h2><p>4 of \d+ photos, from the lowest IoU to the highest</p>', page)
    assert re.findall(r'<h2>(.*?)</h2>', page) == re.findall(r'<li><a href="#s\d+">(.*?)</a></li>', page)


def test_report_holds_the_picture_of_a_photo_once(output, shapes):
    page = report.main('run', output).read_text()
    figures = re.findall(r'<figure.*?</figure>', page)
    names = [re.search('<b>(.*?)</b>', figure)[1] for figure in figures]
    assert len(figures) > len(set(names)) > 8  # some photos are shown in several sections
    assert page.count('data:image/webp;base64,') == 3 * len(set(names))
    held = {re.search('<b>(.*?)</b>', one)[1]: re.search('<g id="(.*?)">', one) for one in figures[::-1]}
    for name, figure in zip(names, figures, strict=True):
        assert f'<use href="#{held[name][1]}"/>' in figure or f'<g id="{held[name][1]}">' in figure


def test_report_of_many_classes_shows_those_that_score_lowest(output, shapes, monkeypatch):
    monkeypatch.setattr(report, 'GALLERIES', 2)
    titles = re.findall('<h2>(.*?)</h2>', report.main('run', output).read_text())
    assert [title for title in titles if title in CLASSES] == ['Metal', 'Glass']


def test_confusion_is_a_table_whose_cells_may_be_links():
    table = html_confusion(np.array([[90, 10], [0, 0]]), ['<a>', 'b'], '?c={}&{}'.format)
    texts = re.findall('<td[^>]*>(.*?)</td>', table)
    assert texts[0] == '&lt;a&gt;' and texts[1] == '<a href="?c=0&amp;0">90.0</a>' and '<a>' not in table
    assert re.findall('title="(.*?)"', table)[1] == '&lt;a&gt; predicted as b: 10 pixels'
    right, wrong, *empty = re.findall('<td([^>]*)>', table)[1:3]
    assert 'rgba(0, 96, 168' in right and 'rgba(200, 30, 40' in wrong and not empty
    assert '<a href' not in html_confusion(np.eye(2), ['a', 'b'])


def test_report_says_what_the_ensemble_did(output, tmp_path, capsys):
    shutil.copytree(output, tmp_path / 'o')
    shutil.copytree(output / 'run' / 'fold0', tmp_path / 'o' / 'half' / 'fold0')
    shutil.copytree(output / 'run' / 'fold0', tmp_path / 'o' / 'other' / 'fold0')
    name = 'batch_01/0000.jpg'
    with IdReader(tmp_path / 'o/half/fold0/oof.csv') as reader:
        masks = {image_id: reader.read(image_id) for image_id in reader.image_ids}
    wrong = np.count_nonzero(masks[name])
    masks[name] = np.zeros((256, 256), np.uint8)
    write_csv(tmp_path / 'o/half/fold0/oof.csv', masks)
    members = [member_of(tmp_path / f'o/{run}/fold0/test.csv') for run in ('half', 'other')]
    rows = [[Fraction(1)] * len(CLASSES), [Fraction(0)] * len(CLASSES)]
    write_recipe(tmp_path / 'o/ensemble.yaml', members, Recipe('hard vote', rows, [1.0, 1.0]))
    page = report.main('run', tmp_path / 'o').read_text()
    half, other, vote = (cells(page, first)[0] for first in ('half', 'other', 'hard vote'))
    assert [half[1], other[1], vote[1]] == ['1', '0', ''] and half[2:] == vote[2:]
    assert other[2] == '1.0000' and '-0.' in page and 'above its best model, other' in page
    changed = [row[-1] for k in CLASSES for row in cells(page, k) if len(row) == 6]
    assert sum(int(pixels.replace(',', '')) for pixels in changed) == wrong > 0  # all that half has lost
    write_csv(tmp_path / 'o/other/fold0/oof.csv', {key: mask * 0 for key, mask in masks.items()})
    page = report.main('run', tmp_path / 'o').read_text()
    said = 'other/fold0/oof.csv: has changed since'
    assert said in page and said in capsys.readouterr().out


def test_report_and_suspects_say_which_best_pt_has_changed(output, tmp_path, capsys):
    folder = shutil.copytree(output, tmp_path / 'o') / 'run' / 'fold0'
    (folder / 'best.pt').write_text('trained again')
    write_origin(folder / 'oof.csv', Origin({'best.pt': 'an earlier one'}, {}))
    said = f'{folder}/oof.csv: was made before {folder}/best.pt changed; make it again with infer.py'
    assert said in report.main('run', tmp_path / 'o').read_text()
    assert f'warning: {said}\n' in capsys.readouterr().out
    label_errors.main('run', tmp_path / 'o')
    assert f'warning: {said}\n' in capsys.readouterr().out


def test_report_ranks_photos_by_their_own_score(output, shapes):
    runs = report.read_runs(output / 'run')
    coco = read_coco(shapes, 'train', HOME)
    folds = report.read_confusions_of(runs, coco)
    scored = report.score_photos(runs, folds, coco)
    with_metal = {
        photo.file_name for photo in coco.photos[1::2] if (downsample_mask(draw_mask(photo)) == 4).any()
    }
    assert {one.photo.file_name for one in scored if one.score < 1} == with_metal
    assert sum(fold.matrices.sum() for fold in folds) == 24 * 256 * 256
    assert report.curve(runs, 'score')['fold 1'] == [(1, 0.1), (3, 0.4)]


@pytest.mark.parametrize('number', [1, 2, 3, 20])
def test_no_photo_is_among_the_worst_and_among_the_best(number, shapes, monkeypatch):
    photo = read_coco(shapes, 'train', HOME).photos[0]
    scored = [report.ScoredPhoto(photo, Path('x'), score, np.ones((3, 11))) for score in range(number)]
    sheets = []
    monkeypatch.setattr(
        report, 'photo_section', lambda _, photos, __: sheets.append([p.score for p in photos])
    )
    assert len(report.ranking_sections(scored, None)) == len(sheets) == min(2, number)
    chosen = [score for scores in sheets for score in scores]
    assert len(set(chosen)) == len(chosen) == min(number, 2 * report.RANKED) and sheets[0][0] == 0
    assert number == 1 or sheets[1][0] == number - 1


def test_report_of_photos_that_are_all_ignored(tmp_path):
    masks = write_rectangles(tmp_path / 'data', 256, 256, {'a.jpg': (0, 0, 256, 256, 1)})
    path = tmp_path / 'data/train_all.json'
    path.write_text(path.read_text().replace('"iscrowd": 0', '"iscrowd": 1'))
    write_csv(tmp_path / 'o/run/fold0/oof.csv', masks)
    (tmp_path / 'o/run/fold0/config.yaml').write_text(f'data_root: {tmp_path / "data"}')
    with pytest.raises(BadInput, match='run: all pixels of its photos out of fold are ignored'):
        report.main('run', tmp_path / 'o')


def test_report_escapes_what_it_is_given(shapes, tmp_path):
    name = '<b>&'
    photos = read_coco(shapes, 'train', HOME).photos[:2]
    write_csv(tmp_path / name / 'fold0' / 'oof.csv', {photo.file_name: draw_mask(photo) for photo in photos})
    (tmp_path / name / 'fold0' / 'config.yaml').write_text(f'data_root: {shapes}')
    page = report.main(name, tmp_path).read_text()
    assert '<h1>&lt;b&gt;&amp;</h1>' in page and '<b>&' not in page


@pytest.mark.parametrize(
    ('harm', 'message'),
    [
        (lambda run: [path.unlink() for path in run.glob('*/oof.csv')], 'no fold*/oof.csv'),
        (lambda run: (run / 'fold0/config.yaml').unlink(), 'fold0/config.yaml: no such file'),
        (lambda run: (run / 'fold1/config.yaml').write_text('classes: [a, b]'), 'classes is not that of'),
        (lambda run: (run / 'fold1/metrics.csv').write_text('epoch,loss\n0,1\n'), 'expected a row an epoch'),
        (
            lambda run: (run / 'fold1/oof.csv').write_bytes((run / 'fold0/oof.csv').read_bytes()),
            'is out of fold in',
        ),
        (lambda run: (run / 'report.html').mkdir(), 'cannot be written'),
    ],
)
def test_report_of_a_broken_run(output, tmp_path, harm, message):
    for path in output.glob('run/fold*/*'):
        copy = tmp_path / path.relative_to(output)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(path.read_bytes())
    harm(tmp_path / 'run')
    with pytest.raises(BadInput) as error:
        viz.command(['report', '--name', 'run', '--output', str(tmp_path)])
    assert message in str(error.value)


@pytest.mark.parametrize(
    ('words', 'message'),
    [
        (['report', '--name', 'nobody'], 'no such run'),
        (['pictures', '--csv', 'none.csv', '--out', 'x.png', '--data', 'none'], 'none: no such folder'),
        (['app', '--data', 'none'], 'none: no such folder'),
        (
            ['pictures', '--csv', 'a', '--out', 'b', '--count', '0'],
            "found '0', expected a whole number from 1 to",
        ),
        (
            ['pictures', '--csv', 'a', '--out', 'b', '--seed=-1'],
            "found '-1', expected a whole number from 0 to",
        ),
        (['look'], 'invalid choice'),
    ],
)
def test_bad_input_is_one_line_and_status_2(words, message):
    done = subprocess.run(
        [sys.executable, 'viz.py', *words], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2 and message in done.stderr and done.stderr.count('\n') == 1, done.stderr


def test_no_torch_is_imported():
    code = "import sys, viz; assert not {'torch', 'streamlit'} & set(sys.modules)"
    subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=True)
