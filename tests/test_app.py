"""The app without a browser: its pages, what they count and keep, photos that are sent, pieces and bins."""

import base64
import io
import json
import os
import re
import shutil
import time
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
from conftest import write_csv
from PIL import Image

import evaluate
from config import CLASSES, HOME, Competition, dump_config, make_config
from data.coco import CocoSet, draw_mask, read_coco, read_labels, read_photo
from engine.pieces import Piece
from evaluate import read_confusions
from metrics import Metric, confusion_matrix, image_counts, iou_of_counts
from submission import downsample_mask
from utils.errors import BadInput
from utils.id_csv import IdReader
from utils.palette import PALETTE
from viewer.uploads import MAX_MEGABYTES, MAX_SIDE, read_upload
from voting.hard import member_table, vote
from voting.members import find_members
from voting.origin import Origin, write_origin
from voting.recipe import Recipe, write_recipe

testing = pytest.importorskip('streamlit.testing.v1')
from viewer import app_data, page_photos, page_runs, page_sorting  # noqa: E402 - with streamlit
from viewer.html_page import html_table  # noqa: E402


def make_output(data: Path, output: Path) -> Path:
    """Two runs of two folds. Fold 1 of the first took metal for glass; the second sees metal nowhere."""
    photos = read_coco(data, 'train', HOME).photos
    test = read_coco(data, 'test', HOME).photos
    for name, lost in (('run', 5), ('second', 0)):
        for fold in (0, 1):
            folder = output / name / f'fold{fold}'
            masks = {photo.file_name: draw_mask(photo) for photo in photos[fold::2]}
            if fold == 1 or name == 'second':
                masks = {key: np.where(mask == 4, lost, mask) for key, mask in masks.items()}
            write_csv(folder / 'oof.csv', masks)
            values = {'name': name, 'data_root': str(data), 'folds': 2}
            (folder / 'config.yaml').write_text(dump_config(make_config(values, 'here')))
            (folder / 'metrics.csv').write_text(
                'epoch,step,lr,loss,miou\n0,3,1e-4,2.5,0.1\n1,6,1e-4,1.5,\n2,9,1e-4,1.0,0.4\n'
            )
            empty = np.zeros((256, 256), np.uint8)
            for number, photo in enumerate(test):
                masks[photo.file_name] = np.where(np.arange(256)[:, None] < 40 * number * lost, 6, empty)
            write_csv(folder / 'test.csv', {photo.file_name: masks[photo.file_name] for photo in test})
    write_csv(output / 'submission.csv', {photo.file_name: empty for photo in test})
    return output


@pytest.fixture(scope='module')
def output(shapes, tmp_path_factory) -> Path:
    return make_output(shapes, tmp_path_factory.mktemp('app'))


@pytest.fixture(scope='module')
def train(shapes) -> CocoSet:
    return read_coco(shapes, 'train', HOME)


def show_page(page, data, output, competition, options):
    from importlib import import_module
    from pathlib import Path

    import_module(page).page(Path(data), Path(output), competition, **options)


def open_page(page, data, output, competition=HOME, query=(), **options):
    args = (page, str(data), str(output), competition, options)
    test = testing.AppTest.from_function(show_page, args=args, default_timeout=30)
    test.query_params.update(query)
    return test.run()


@pytest.fixture
def photos(shapes, output):
    return open_page('viewer.page_photos', shapes, output)


def components(page, name: str) -> list:
    """What the components of a name are given."""
    found = page.get('bidi_component')
    return [json.loads(one.proto.json) for one in found if one.proto.component_name == name]


def grid(page) -> list[str]:
    """The file names in the grid, in order."""
    (body,) = components(page, 'links')
    return re.findall(r'<a href="[^"]*" title="([^"]*)"', body)


def show(page, number: int):
    """Show a photo as its address does."""
    page.query_params['photo'] = f'batch_01/{number:04d}.jpg'
    return page.run()


def tables(page) -> list[list[list[str]]]:
    """The cells of the HTML tables on a page but the confusion matrix, links as their texts."""
    bodies = [one.proto.body for one in page.get('html')] + [
        body for body in components(page, 'links') if 'class="confusion"' not in body
    ]
    found = []
    for table in (
        table for body in bodies for table in re.findall('<table(?: class="sortable")?>(.*?)</table>', body)
    ):
        rows = re.findall('<tr[^>]*>(.*?)</tr>', table)
        cells = [re.findall('<t[dh](?: scope="col")?(?: class="words")?>(.*?)</t[dh]>', row) for row in rows]
        found.append([[re.sub('</?a[^>]*>', '', cell) for cell in row] for row in cells])
    return found


def where(page) -> tuple[int, str]:
    """The number and the name of the photo that is shown; its address and all views are of it."""
    (views,) = components(page, 'photo_views')
    assert views['name'] == page.query_params['photo']
    return page.number_input(key='number').value, views['name']


# --- the first page -----------------------------------------------------------------------------------------


def test_first_page_says_how_the_runs_stand(shapes, output, train):
    page = open_page('viewer.page_runs', shapes, output)
    assert not page.exception and not page.error
    runs, ious = tables(page)
    right = [draw_mask(photo) for photo in train.photos]
    taken = [np.where(mask == 4, 5, mask) if n % 2 else mask for n, mask in enumerate(right)]
    pairs = zip(right, taken, strict=True)
    counts = sum(confusion_matrix(downsample_mask(a), downsample_mask(b), len(CLASSES)) for a, b in pairs)
    expected = f'{np.nanmean(iou_of_counts(*image_counts(counts))):.4f}'
    assert runs[1][0] == 'second' and runs[2][0] == 'run'  # the best first
    assert [runs[2][n] for n in (1, 3, 4, 5, 6)] == [expected, '24', '0.4000', '0 1 of 2', '3']
    low, high = map(float, runs[2][2].split(' to '))
    assert low < float(expected) < high
    assert ious[5][:3] == ['Metal', f'{iou_of_counts(*image_counts(counts))[4]:.4f}', '0.0000']
    cells = re.findall(r'<td class="([a-z ]*)"[^>]*><a href="([^"]*)"', components(page, 'links')[3])
    addresses = {address: kind for kind, address in cells}
    assert (
        addresses['photos?runs=second&amp;class=Metal&amp;predicted=Background&amp;layer=second']
        == 'wrong strong'
    )
    assert (
        'photos?runs=second&amp;class=Metal&amp;predicted=Metal&amp;layer=second' not in addresses
    )  # seen nowhere
    assert 'photos?runs=run&amp;class=Metal&amp;order=lowest+score' in components(page, 'links')[2]
    said = page.caption[2].value.replace('\\', '')
    assert (
        f'ensemble.yaml yet: python ensemble.py {output}/*/fold*/test.csv --search --data {shapes} --out'
        in said
    )


def test_first_page_without_runs_and_with_broken_ones(shapes, output, tmp_path):
    page = open_page('viewer.page_runs', shapes, tmp_path)
    assert 'No runs under' in page.info[0].value and not page.exception
    shutil.copytree(output / 'run', tmp_path / 'run')
    shutil.copytree(output / 'run', tmp_path / 'bad')
    (tmp_path / 'bad' / 'fold0' / 'config.yaml').write_text('epoch: 1')
    (tmp_path / 'bad' / 'fold1' / 'oof.csv').write_text('nonsense')
    (tmp_path / 'ensemble.yaml').write_text('rule: 7')
    page = open_page('viewer.page_runs', shapes, tmp_path)
    said = [error.value.replace('\\', '') for error in page.error]
    assert len(said) == 3 and "unknown key 'epoch'" in said[0] and 'found the header' in said[1]
    assert 'not a recipe' in said[2] and tables(page)[0][1][0] == 'run' and not page.exception


@pytest.mark.parametrize('page', ['viewer.page_runs', 'viewer.page_photos'])
def test_a_page_says_which_best_pt_has_changed(shapes, output, tmp_path, page):
    shutil.copytree(output / 'run', tmp_path / 'run')
    folder = tmp_path / 'run' / 'fold1'
    (folder / 'best.pt').write_text('trained again')
    write_origin(folder / 'oof.csv', Origin({'best.pt': 'an earlier one'}, {}))
    (warning,) = open_page(page, shapes, tmp_path).warning
    said = f'{folder}/oof.csv: was made before {folder}/best.pt changed; make it again with infer.py'
    assert warning.value.replace('\\', '') == said
    (folder / 'oof.origin.json').write_bytes(b'\xff')
    damaged = open_page(page, shapes, tmp_path)
    (error,) = damaged.error
    assert 'not a file that infer' in error.value and not damaged.exception


def test_first_page_scores_the_ensemble(shapes, output, train, tmp_path):
    shutil.copytree(output, tmp_path / 'o')
    paths = sorted((tmp_path / 'o').glob('*/fold*/test.csv'))
    rows = [[Fraction(weight)] * len(CLASSES) for weight in (2, 2, 1, 1)]
    write_recipe(
        tmp_path / 'o/ensemble.yaml',
        find_members(paths, tmp_path / 'x'),
        Recipe('hard vote', rows, [1.0] * 4),
    )
    page = open_page('viewer.page_runs', shapes, tmp_path / 'o')
    assert [row[1] for row in tables(page)[0]] == ['weight', '2', '2', '1', '1']
    page.button(key='score-ensemble').click().run()
    scores, by_class = tables(page)[2:4]  # between the runs and the classes
    assert [row[:2] for row in scores[1:]] == [['run', '4'], ['second', '2'], ['hard vote', '']]
    assert scores[1][2] == scores[3][2] < scores[2][2]  # the first outvotes the second, which is better
    by_class = {row[0]: row for row in by_class}
    metal = sum(np.count_nonzero(downsample_mask(draw_mask(photo)) == 4) for photo in train.photos[::2])
    assert by_class['Metal'][1] == '0.0000' and by_class['Metal'][4:] == [f'{metal:,}', '0']
    assert by_class['Paper'][3:] == ['+0.0000', '0', '0'] and '**-0.0' in page.markdown[1].value


# --- photos -------------------------------------------------------------------------------------------------


def test_photos_go_forward_back_and_anywhere(photos):
    page = photos
    names = [f'batch_01/{n:04d}.jpg' for n in range(24)]
    assert not page.exception and grid(page) == names and 'photo' not in page.query_params
    show(page, 0)
    assert where(page) == (1, names[0])
    assert page.button(key='previous').disabled and not page.button(key='next').disabled
    page.button(key='next').click().run()
    page.button(key='next').click().run()
    assert where(page) == (3, names[2])
    page.button(key='previous').click().run()
    assert where(page) == (2, names[1])
    page.number_input(key='number').set_value(24).run()
    assert where(page) == (24, names[23]) and page.button(key='next').disabled
    page.button(key='grid-button').click().run()
    assert grid(page) == names
    show(page, 9)
    page.segmented_control(key='split').set_value('test').run()
    assert not page.exception and grid(page) == [f'batch_01/{n:04d}.jpg' for n in range(24, 30)]
    assert page.multiselect[0].options[0] == 'submission.csv' and not tables(page)


def test_pages_of_the_grid_and_the_way_back_to_them(photos, monkeypatch):
    monkeypatch.setattr(page_photos, 'PER_PAGE', 10)
    page = photos.run()
    assert [name[-6:-4] for name in grid(page)] == [f'{n:02d}' for n in range(10)]
    assert page.button(key='previous').disabled
    page.button(key='next').click().run()
    page.button(key='next').click().run()
    assert len(grid(page)) == 4 and page.button(key='next').disabled and page.session_state.page == 3
    assert '21 to 24' in page.caption[0].value.replace('\\', '')
    show(page, 12)
    page.button(key='grid-button').click().run()
    assert 'batch_01/0012.jpg' in grid(page) and page.session_state.page == 2
    page.selectbox(key='fold').set_value(1).run()  # other photos: from the first page
    assert page.session_state.page == 1 and grid(page)[0] == 'batch_01/0001.jpg'


def test_an_address_of_another_photo_than_the_chosen_or_of_none(photos):
    page = photos
    page.selectbox(key='fold').set_value(1).run()
    show(page, 2)  # of fold 0
    assert 'not among the chosen' in page.caption[0].value and components(page, 'photo_views')
    page.button(key='next').click().run()
    assert where(page) == (1, 'batch_01/0001.jpg')
    page.query_params['photo'] = '<i>nowhere'
    page.run()
    said = page.error[0].value if page.error else str(page.exception[0].message)
    assert "has no training photo '<i>nowhere'; G shows the grid" in said.replace('\\', '')
    page.button(key='grid-button').click().run()
    assert len(grid(page)) == 12


def test_thumbnails_show_masks(photos):
    pictures = {}
    for layer in ('photo', 'truth', 'run'):
        page = photos.selectbox(key='layer').set_value(layer).run()
        pictures[layer] = re.findall('src="([^"]*)"', components(page, 'links')[0])
        assert len(pictures[layer]) == 24 and not page.exception
    same = [a == b for a, b in zip(pictures['truth'], pictures['run'], strict=True)]
    assert not set(pictures['photo']) & set(pictures['truth'])
    assert all(same[::2]) and not all(same[1::2])  # fold 1 took metal for glass
    pictures['contest'] = photos.selectbox(key='colours').set_value('contest').run()
    assert re.findall('src="([^"]*)"', components(photos, 'links')[0]) != pictures['run']


def test_photos_that_vanish_are_told_in_a_line(shapes, output, tmp_path):
    shutil.copytree(shapes, tmp_path / 'set')
    page = open_page('viewer.page_photos', tmp_path / 'set', output)
    assert 'missing' not in components(page, 'links')[0]
    for n in (0, 1):
        (tmp_path / f'set/batch_01/000{n}.jpg').unlink()
        body = components(page.run(), 'links')[0]
        assert body.count('class="missing"') == n + 1 and f'000{n}.jpg: cannot be read' in body
        assert len(grid(page)) == 24 and not page.exception
        coco = app_data.load_coco(tmp_path / 'set', 'train', HOME)
        with pytest.raises(BadInput, match=f'000{n}.jpg: no such image$'):
            read_photo(coco, coco.photos[n])


def test_photo_is_scored(photos, train):
    row = next(row for row in range(1, 24, 2) if (downsample_mask(draw_mask(train.photos[row])) == 4).any())
    show(photos, row)
    table = {cells[0]: cells[1:4] for cells in tables(photos)[0]}
    assert table['IoU in this photo'] == ['run', 'second', 'share of the truth']  # two have no vote
    assert (
        table['Metal'][:2] == ['0.0000'] * 2 and table['Background'][0] == '1.0000' > table['Background'][1]
    )


def decode(url: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(base64.b64decode(url.partition(',')[2]))))


def test_views_hold_the_masks_their_names_and_colours(photos, train):
    (data,) = components(show(photos, 3), 'photo_views')
    truth, run = data['views'][1:3]
    assert [view['title'] for view in data['views'][:4]] == ['photo', 'truth', 'run', 'second']
    mask = draw_mask(train.photos[3])
    assert np.array_equal(decode(truth['mask']), mask)
    assert np.array_equal(decode(run['mask']), np.where(mask == 4, 5, mask))
    assert np.array_equal(decode(data['views'][4]['mask']), mask == 4)  # the second sees no metal
    assert data['visible'] == sorted(set(np.unique([mask, np.where(mask == 4, 5, mask)])) - {0})
    for k, x, y in truth['labels']:
        assert mask[int(y * 256), int(x * 256)] == k
    assert {k for k, _, _ in truth['labels']} == set(np.unique(mask)) - {0}
    assert data['legend'] == list(range(1, 11)) and '0' not in data['classes']
    assert data['classes']['4'] == {'name': 'Metal', 'colour': PALETTE[4].tolist()}
    photos.selectbox(key='colours').set_value('contest').run()
    (data,) = components(photos, 'photo_views')
    assert data['classes']['4']['colour'] == [128, 0, 0]


def test_regions_that_overlap_are_coded_by_their_sets():
    planes = np.random.default_rng(0).integers(0, 2, (12, 30, 40), np.uint8)
    encoded = page_photos.encode_mask(planes)
    codes = decode(encoded['mask']).astype(int)
    codes = codes[..., 0] + 256 * codes[..., 1]
    assert codes.max() > 256 and len(encoded['sets']) == codes.max() + 1
    for y, x in np.ndindex(30, 40):
        assert encoded['sets'][codes[y, x]] == np.flatnonzero(planes[:, y, x]).tolist()


def test_names_stand_in_the_largest_objects():
    regions = {3: np.zeros((100, 100), bool), 255: np.ones((100, 100), bool)}
    for n in range(5):
        regions[3][20 * n : 20 * n + 4 + 2 * n, 10:50] = True
    regions[3][98:, 98:] = True
    names = page_photos.place_names(regions)
    assert [k for k, _, _ in names] == [3] * page_photos.NAMES_PER_CLASS
    assert [round(y, 1) for _, _, y in names] == [0.9, 0.6, 0.4] and names[0][1] > 0.1


def test_photos_are_chosen_by_name_class_and_fold(photos, train):
    page = photos
    page.text_input(key='name').set_value('/000').run()
    assert len(grid(page)) == 10
    page.text_input(key='name').set_value('').run()
    page.selectbox(key='fold').set_value(1).run()
    assert grid(page) == [p.file_name for p in train.photos[1::2]]
    page.selectbox(key='fold').set_value(page_photos.ANY).run()
    page.selectbox(key='class').set_value('Metal').run()
    with_metal = [p.file_name for p in train.photos if any(a.category_id == 4 for a in p.annotations)]
    assert 0 < len(with_metal) < 24 and grid(page) == with_metal
    page.text_input(key='name').set_value('nothing like it').run()
    assert 'None of the 24 training photos' in page.info[0].value and not page.exception


def test_photos_of_a_cell_of_the_confusion_matrix(shapes, output, train):
    """Fold 1 of the first run took metal for glass."""
    query = {'runs': 'run', 'class': 'Metal', 'predicted': 'Glass'}
    page = open_page('viewer.page_photos', shapes, output, query=query)
    assert page.multiselect[0].value == ['run'] and not page.exception
    masks = {p.file_name: downsample_mask(draw_mask(p)) for p in train.photos[1::2]}
    pixels = {name: np.count_nonzero(mask == 4) for name, mask in masks.items()}
    expected = sorted((name for name in pixels if pixels[name]), key=lambda name: -pixels[name])
    assert grid(page) == expected and f'{pixels[expected[0]]:,} such pixels' in components(page, 'links')[0]
    page.selectbox(key='class').set_value(page_photos.ANY).run()
    assert grid(page) == expected  # nothing else was taken for glass
    page.selectbox(key='class').set_value('Glass').run()
    glass = {p.file_name for p in train.photos if (downsample_mask(draw_mask(p)) == 5).any()}
    assert set(grid(page)) == glass
    page.selectbox(key='class').set_value('Paper').run()
    assert 'None of the 24 training photos' in page.info[0].value


def notes(page) -> list[str]:
    """The notes below the thumbnails."""
    return re.findall('<span>([^<]*)</span></a>', components(page, 'links')[0])


def test_photos_are_ordered_by_score_and_by_disagreement(photos, train):
    page = photos
    page.selectbox(key='order').set_value(page_photos.WORST).run()
    page.selectbox(key='of').set_value('run').run()
    scores = [float(note.removeprefix('mIoU ')) for note in notes(page)]
    assert scores == sorted(scores) and scores[0] < 0.9 and scores[-1] == 1
    page.query_params['photo'] = grid(page)[0]
    page.run()
    assert tables(page)[0][-1][1] == f'{scores[0]:.4f}' and where(page)[0] == 1
    page.selectbox(key='order').set_value(page_photos.BEST).run()
    assert 'photo' not in page.query_params and notes(page)[0] == 'mIoU 1.0000'
    page.selectbox(key='class').set_value('Metal').run()
    assert notes(page)[0] == 'IoU of Metal 1.0000'
    page.selectbox(key='class').set_value(page_photos.ANY).run()
    page.selectbox(key='order').set_value(page_photos.DIFFER).run()
    metal = [np.count_nonzero(downsample_mask(draw_mask(photo)) == 4) for photo in train.photos]
    assert grid(page)[0] == train.photos[int(np.argmax(metal))].file_name
    assert notes(page)[0] == f'differ on {max(metal) / 65536:.2%}'
    page.segmented_control(key='split').set_value('test').run()
    page.multiselect[0].set_value(['run/fold0', 'second/fold0']).run()
    page.selectbox(key='order').set_value(page_photos.DIFFER).run()
    assert grid(page)[0] == 'batch_01/0026.jpg' and not page.exception  # the first of 256 lines of plastic
    page.selectbox(key='class').set_value('Plastic').run()
    assert len(grid(page)) == 5  # all but the first, by the vote


def test_truth_and_scores_of_test_photos_whose_labels_are_known(shapes, output):
    labels = shapes / 'test_labels.json'
    page = open_page('viewer.page_photos', shapes, output, labels=labels)
    page.segmented_control(key='split').set_value('test').run()
    page.multiselect[0].set_value(['run/fold0', 'second/fold0']).run()
    page.selectbox(key='order').set_value(page_photos.WORST).run()
    assert not page.exception and not page.error
    ious = {}
    with IdReader(output / 'run/fold0/test.csv') as reader:
        for photo in read_labels(labels, HOME).photos:
            truth = downsample_mask(draw_mask(photo))
            ious[photo.file_name] = Metric().of_image(truth, reader.read(photo.file_name), len(CLASSES))
    worst = min(ious, key=ious.get)
    assert grid(page)[0] == worst and notes(page)[0] == f'mIoU {ious[worst]:.4f}'
    page.query_params['photo'] = worst
    page.run()
    assert any(f'{ious[worst]:.4f}' in cell for table in tables(page) for line in table for cell in line)
    assert 'vote' not in tables(page)[0][0]
    page.multiselect[0].set_value(['run/fold0', 'second/fold0', 'submission.csv']).run()
    assert tables(page)[0][0][1:5] == ['run/fold0', 'second/fold0', 'submission.csv', 'vote']
    page.multiselect[0].set_value(['run/fold0', 'second/fold0']).run()
    page.selectbox(key='class').set_value('Metal').run()
    metal = [p for p in read_labels(labels, HOME).photos if any(a.category_id == 4 for a in p.annotations)]
    assert len(grid(page)) == len(metal) > 0


def test_labels_that_lack_a_test_photo(shapes, output, tmp_path):
    content = json.loads((shapes / 'test_labels.json').read_text())
    content['images'] = content['images'][1:]
    first = content['images'][0]['id']
    content['annotations'] = [one for one in content['annotations'] if one['image_id'] >= first]
    (tmp_path / 'labels.json').write_text(json.dumps(content))
    coco = read_coco(shapes, 'test', HOME)
    with pytest.raises(BadInput, match=r"labels.json: has no image 'batch_01/0024.jpg' of 256x256"):
        app_data.with_truth(coco, tmp_path / 'labels.json')


def test_names_are_shown_as_they_are(shapes, output, tmp_path):
    name = '<script>*x*_[a](b)'
    (tmp_path / name / 'fold0').mkdir(parents=True)
    (tmp_path / name / 'fold0' / 'oof.csv').write_bytes((output / 'run/fold0/oof.csv').read_bytes())
    competition = Competition(classes=(*CLASSES[:-1], '<i>Clothing'))
    for labels in ('train_all.json', 'test.json'):
        text = (shapes / labels).read_text().replace('"Clothing"', '"<i>Clothing"')
        (tmp_path / labels).write_text(text.replace('batch_01/0000.jpg', '<img src=x>.jpg'))
    shutil.copytree(shapes / 'batch_01', tmp_path / 'batch_01')
    (tmp_path / '<img src=x>.jpg').write_bytes((shapes / 'batch_01/0000.jpg').read_bytes())
    page = open_page('viewer.page_photos', tmp_path, tmp_path, competition)
    (body,) = components(page, 'links')
    assert 'title="&lt;img src=x&gt;.jpg"' in body and '<img src=x' not in body
    page.query_params['photo'] = '<img src=x>.jpg'
    page.run()
    assert where(page)[1] == '<img src=x>.jpg' and not page.exception
    assert page.caption[1].value == r'\<script\>\*x\*\_\[a\]\(b\) has no prediction for this photo\.'
    body = tables(open_page('viewer.page_runs', tmp_path, tmp_path, competition))
    assert body == []  # its CSV has an image that is none of the photos
    confusion = np.ones((11, 11), int)
    for table in (
        page_runs.confusion_table(confusion, competition.classes, name),
        html_table([['a', name], ['<i>', '1']], 'total', {('<i>', name): '?"<i>'}),
    ):
        assert '&lt;' in table and '<i>' not in table and '<script' not in table and '"<' not in table
    piece = Piece((0,), 0.9, True, 0.1, (0, 0), np.ones((1, 1), bool))
    card = page_sorting.bin_card(['<i>x'], None, {1: piece}, page_sorting.Look('en', 0.5, 0.5))
    assert '&lt;i&gt;x' in card and '<i>' not in card


def test_page_follows_a_csv_that_is_written_again(photos, output, train):
    show(photos, 0)
    path = output / 'run' / 'fold0' / 'oof.csv'
    before = path.read_bytes()
    assert tables(photos)[0][-1][1] == '1.0000'
    try:
        write_csv(path, {photo.file_name: np.zeros((256, 256), np.uint8) for photo in train.photos[::2]})
        assert float(tables(photos.run())[0][-1][1]) < 0.5
    finally:
        path.write_bytes(before)


# --- what is counted ----------------------------------------------------------------------------------------


def test_confusions_are_counted_once_and_again_when_something_changed(output, train, tmp_path, monkeypatch):
    path = shutil.copy(output / 'run/fold1/oof.csv', tmp_path / 'oof.csv')
    found = read_confusions(path, train)
    masks = {photo.file_name: draw_mask(photo) for photo in train.photos[1::2]}
    for row, (name, mask) in enumerate(masks.items()):
        expected = confusion_matrix(downsample_mask(mask), np.where(mask == 4, 5, mask), len(CLASSES))
        assert found.image_ids[row] == name and np.array_equal(found.matrices[row], expected)
        assert np.array_equal(found.counts[row], image_counts(expected))
        ious = iou_of_counts(*image_counts(expected))
        assert np.array_equal(found.class_scores(Metric())[row], ious, equal_nan=True)
    assert (tmp_path / '.oof.csv.confusions.npz').stat().st_size < 10_000

    def never(*_):
        raise AssertionError('counted again')

    with monkeypatch.context() as patch:
        patch.setattr(evaluate.metrics, 'confusion_matrix', never)
        again = read_confusions(path, train)
        assert again.image_ids == found.image_ids and np.array_equal(again.matrices, found.matrices)
    other = CocoSet(train.root, 'train', train.files, train.photos, 'other', HOME)
    monkeypatch.setattr(evaluate.metrics, 'confusion_matrix', never)
    with pytest.raises(AssertionError):
        read_confusions(path, other)
    os.utime(path, (1, 1))
    with pytest.raises(AssertionError):
        read_confusions(path, train)
    monkeypatch.undo()
    path = write_csv(tmp_path / 'few.csv', dict([*masks.items()][:2]))  # quick to count 200 times
    found, kept = read_confusions(path, train), tmp_path / '.few.csv.confusions.npz'
    whole = kept.read_bytes()
    rng = np.random.default_rng(0)
    flipped = [bytearray(whole) for _ in range(200)]
    for content in flipped:
        content[rng.integers(len(content))] ^= 1 << rng.integers(8)
        kept.write_bytes(content)
        read_confusions(path, train)  # raises nothing
    for content in (b'', b'no archive', whole[: len(whole) // 2]):
        kept.write_bytes(content)
        assert np.array_equal(read_confusions(path, train).matrices, found.matrices)


def test_the_vote_is_that_of_the_ensemble():
    preds = list(np.random.default_rng(0).integers(0, 4, (3, 50, 60), np.uint8))
    assert np.array_equal(app_data.vote_of(preds, 4), vote(np.stack(preds), member_table([1, 1, 1], 4)))
    assert np.array_equal(app_data.vote_of(preds[:2], 4), preds[0])  # a tie goes to the first
    assert np.array_equal(app_data.vote_of(preds[:1], 4), preds[0])


def test_a_photo_out_of_fold_twice_is_refused(output, train):
    path = output / 'run/fold0/oof.csv'
    with pytest.raises(BadInput, match='is out of fold in .* too'):
        app_data.score_source('run', [path, output / 'second/fold0/oof.csv'], train)


def test_a_thousand_rows_are_quick(shapes, tmp_path):
    """What is kept of 1,000 rows is read in a fraction of the time to count them, and so is a photo shown."""
    coco = json.loads((shapes / 'train_all.json').read_text())
    first = coco['images'][0]
    boxes = [one for one in coco['annotations'] if one['image_id'] == first['id']]
    images = [{**first, 'id': n, 'file_name': f'{n}.jpg'} for n in range(1000)]
    annotations = [
        {**box, 'id': 10 * n + k, 'image_id': n} for n in range(1000) for k, box in enumerate(boxes)
    ]
    (tmp_path / 'train_all.json').write_text(
        json.dumps({**coco, 'images': images, 'annotations': annotations})
    )
    for n in (0, 999):
        shutil.copy(shapes / first['file_name'], tmp_path / f'{n}.jpg')
    train = read_coco(tmp_path, 'train', HOME)
    mask = draw_mask(train.photos[0])
    path = tmp_path / 'o/run/fold0/oof.csv'
    write_csv(path, {photo.file_name: mask for photo in train.photos})
    times = []
    for _ in range(2):
        start = time.process_time()
        assert len(read_confusions(path, train).image_ids) == 1000
        times.append(time.process_time() - start)
    page = open_page('viewer.page_photos', tmp_path, tmp_path / 'o')
    page.selectbox(key='order').set_value(page_photos.WORST).run()
    start = time.process_time()
    page.query_params['photo'] = '999.jpg'
    page.run()
    shown = time.process_time() - start
    print(f'counted in {times[0]:.1f} s, then read in {times[1]:.2f} s; a photo in {shown:.2f} s')
    path.unlink()  # 130 MB
    assert where(page) == (1000, '999.jpg') and not page.exception
    assert times[1] < min(1, times[0] / 5) and shown < min(3, times[0]), (times, shown)


# --- photos that are sent -----------------------------------------------------------------------------------


def encode(image: Image.Image, kind: str = 'PNG', **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def test_uploads_of_any_kind_become_upright_rgb():
    for mode in ('RGB', 'RGBA', 'L', 'P', '1', 'LA', 'CMYK', 'I;16'):
        kind = 'JPEG' if mode == 'CMYK' else 'PNG'
        assert read_upload('a', encode(Image.new(mode, (30, 20)), kind)).shape == (20, 30, 3)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by 90 degrees
    assert read_upload('a', encode(Image.new('RGB', (30, 20)), 'JPEG', exif=exif)).shape == (30, 20, 3)
    assert read_upload('a', damaged_exif()).shape == (30, 20, 3)
    deep = np.full((20, 30), 500, np.uint16)
    deep[:, 20:] = 3000  # 12 bits in 16: 0 to 4095
    shown = read_upload('a', encode(Image.fromarray(deep)))
    assert shown.shape == (20, 30, 3) and (shown[:, :20] == 31).all() and (shown[:, 20:] == 187).all()
    clear = read_upload('a', encode(Image.new('RGBA', (30, 20), (0, 0, 0, 0))))
    assert (clear == 255).all()
    large = read_upload('a', encode(Image.new('RGB', (5000, 2500), 'red'), 'JPEG'))
    assert large.shape == (MAX_SIDE // 2, MAX_SIDE, 3) and large[0, 0, 0] > 250 and large.flags.writeable
    assert read_upload('a', encode(Image.new('RGB', (4000, 1), 'red'))).shape == (1, MAX_SIDE, 3)


def damaged_exif() -> bytes:
    """A photo that its EXIF turns, and whose width in the EXIF is a text."""
    exif = Image.Exif()
    exif[0x0112], exif[0x0100] = 6, 30
    photo = encode(Image.new('RGB', (30, 20)), 'JPEG', exif=exif)
    place = photo.index(b'\x01\x00\x00\x04') + 3  # the tag, then its type, of two bytes each
    return photo[:place] + b'\x02' + photo[place + 1 :]


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (b'', 'is empty, expected an image: JPEG'),
        (b'GIF89a' + bytes(100), 'found GIF, expected an image'),
        (b'<svg xmlns="http://www.w3.org/2000/svg"/>', 'cannot be decoded, expected an image'),
        (bytes(MAX_MEGABYTES * 2**20 + 1), r'found 10.0 MB, at most 10 MB'),
        (encode(Image.new('1', (20_000, 20_000))), 'found far too many pixels, expected at most'),
        (encode(Image.new('1', (9_000, 8_000))), 'found 8000x9000 pixels, expected at most .* 64 million'),
        (encode(Image.new('RGB', (300, 300), 'red'))[:-200], 'cannot be decoded'),
        (encode(Image.new('RGB', (300, 300), 'red'), 'JPEG')[:400], 'cannot be decoded'),
    ],
)
def test_uploads_that_are_refused(content, message):
    with pytest.raises(BadInput, match=message) as error:
        read_upload('<x>.jpg', content)
    assert str(error.value).startswith('<x>.jpg: ') and '\n' not in str(error.value)


# --- sorting ------------------------------------------------------------------------------------------------


def test_sorting_without_a_model_says_what_to_do(shapes, output):
    assert 'No trained model under' in open_page('viewer.page_sorting', shapes, output).info[0].value


def test_the_model_is_loaded_while_a_photo_is_chosen(shapes, tmp_path, monkeypatch):
    path, loaded = tmp_path / 'run/fold0/best.pt', []
    path.parent.mkdir(parents=True)
    path.touch()
    monkeypatch.setattr(page_sorting, 'load_model', lambda checkpoint, time: loaded.append(checkpoint))
    page = open_page('viewer.page_sorting', shapes, tmp_path)
    assert loaded == [path] and not page.exception


def test_a_sample_is_found_as_check_finds_it(shapes, tmp_path, monkeypatch):
    """A name with backslashes, as Windows writes it."""
    text = (shapes / 'test.json').read_text()
    (tmp_path / 'test.json').write_text(text.replace('batch_01/', r'batch_01\\'))
    shutil.copytree(shapes / 'batch_01', tmp_path / 'batch_01')
    monkeypatch.setattr(page_sorting.st, 'selectbox', lambda _, names, key: names[0])
    monkeypatch.setattr(
        page_sorting, 'load_coco', lambda data, split, competition: read_coco(data, split, HOME)
    )
    name, photo = page_sorting.choose_sample(tmp_path, HOME, page_sorting.TEXTS['en'])
    assert '\\' in name and photo.shape == (256, 256, 3)
