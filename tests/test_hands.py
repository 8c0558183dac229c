"""The demo set of hands: its layout, its overlaps, and that it depends on its seed alone."""

import csv
import json

import cv2
import numpy as np
import pytest

import prepare
from config import read_competition
from data.coco import draw_truth, read_coco
from data.demo.hands import BONES, draw_hand, list_jobs
from utils.errors import BadInput

SIDE = 192
COMMAND = ['demo', '--task', 'multilabel', '--train', '21', '--test', '4', '--size', str(SIDE)]


@pytest.fixture(scope='module')
def hands(tmp_path_factory):
    root = tmp_path_factory.mktemp('hands') / 'demo'
    prepare.command([*COMMAND, '--out', str(root)])
    return root


def test_layout(hands):
    names = {path.relative_to(hands).as_posix() for path in hands.rglob('*.*') if path.name != '.demo.lock'}
    photos = {name for name in names if name.endswith('.png')}
    train = {name for name in photos if name.startswith('train/DCM/ID')}
    tests = {name for name in photos if name.startswith('test/DCM/ID')}
    labels = {name.replace('DCM', 'outputs_json').replace('.png', '.json') for name in train}
    labels |= {f'test_labels/outputs_json{name[8:-4]}.json' for name in tests}
    assert names == photos | labels | {'sample_submission.csv'} and len(train) == 21 and len(tests) == 4
    assert len({name.split('/')[2] for name in train}) == 11 and not any('_' in name for name in tests)
    assert any(name.endswith('_R.png') for name in train) and any('_' not in name[9:] for name in train)
    photo = cv2.imread(str(hands / min(train)), cv2.IMREAD_UNCHANGED)
    assert photo.shape == (SIDE, SIDE, 3) and (photo == photo[..., :1]).all()
    with (hands / 'sample_submission.csv').open() as file:
        header, *rows = csv.reader(file)
    assert header == ['image_name', 'class', 'rle'] and [row[1] for row in rows] == [*BONES] * 4
    assert {row[0] for row in rows} == {name.rpartition('/')[2] for name in tests}


def test_labels_are_polygons_of_all_bones(hands):
    for path in hands.rglob('*.json'):
        annotations = json.loads(path.read_text())['annotations']
        assert [one['label'] for one in annotations] == list(BONES) and len(BONES) == 29
        for one in annotations:
            points = np.array(one['points'])
            assert set(one) == {'id', 'type', 'attributes', 'points', 'label'} and one['type'] == 'poly_seg'
            assert points.ndim == 2 and len(points) > 5 and points.min() >= 0 and points.max() < SIDE
            assert points.dtype == int


def test_a_hand_depends_on_seed_split_and_person():
    first, second = list(list_jobs('train', 8, 0, 1))[1], list(list_jobs('train', 3, 0, 1))[1]
    assert first == second
    hand = draw_hand(0, first, SIDE)
    np.testing.assert_array_equal(draw_hand(0, second, SIDE).photo, hand.photo)
    others = [draw_hand(1, first, SIDE), draw_hand(0, next(list_jobs('test', 8, 0, 1)), SIDE)]
    others.append(draw_hand(0, next(list_jobs('train', 8, 0, 1)), SIDE))
    assert all(np.abs(hand.photo.astype(int) - other.photo).mean() > 2 for other in others)
    right, left = draw_hand(0, next(list_jobs('train', 8, 0, 1)), SIDE), hand
    thumb, little = 'finger-1', 'finger-16'
    assert right.outlines[thumb][:, 0].mean() < right.outlines[little][:, 0].mean()
    assert left.outlines[thumb][:, 0].mean() > left.outlines[little][:, 0].mean()


def test_bones_are_brighter_than_what_is_around_them():
    """A bone is brighter than the hand, and where two lie over each other, it is brighter still."""
    hand = draw_hand(0, next(list_jobs('train', 2, 0, 1)), 512)
    planes = np.zeros((len(BONES), 512, 512), np.uint8)
    for plane, outline in zip(planes, hand.outlines.values(), strict=True):
        cv2.fillPoly(plane, [outline], 1)
    depth = planes.sum(0)
    means = [hand.photo[depth == k].mean() for k in range(3)]
    assert means[0] + 30 < means[1] < means[2] - 15


def test_import(hands, tmp_path, capsys):
    """The masks of the import are those that OpenCV fills; persons stay together."""
    words = [
        '--photos',
        hands / 'train/DCM',
        '--labels',
        hands / 'train/outputs_json',
        '--test',
        hands / 'test/DCM',
    ]
    prepare.command(['from-json', *map(str, words), '--out', str(tmp_path / 'out'), '--classes', *BONES])
    competition = read_competition(tmp_path / 'out')
    assert competition.is_multilabel and competition.classes == BONES and competition.group == '(.*)/'
    for photo in read_coco(tmp_path / 'out', 'train', competition).photos[:5]:
        content = json.loads(
            (hands / 'train/outputs_json' / photo.file_name).with_suffix('.json').read_text()
        )
        expected = np.zeros((29, SIDE, SIDE), np.uint8)
        for plane, one in zip(expected, content['annotations'], strict=True):
            cv2.fillPoly(plane, [np.array(one['points'])], 1)
        np.testing.assert_array_equal(draw_truth(photo, competition), expected)
    prepare.command(['check', '--data', str(tmp_path / 'out')])
    out = capsys.readouterr().out
    assert 'have several classes, most of Pisiform' in out and 'nothing wrong found' in out


def test_what_is_refused(tmp_path):
    (tmp_path / 'mine').write_text('mine')
    with pytest.raises(BadInput, match='is not empty and not a demo set'):
        prepare.command([*COMMAND, '--out', str(tmp_path)])
    with pytest.raises(BadInput, match='--size is of --task multilabel'):
        prepare.command(['demo', '--out', str(tmp_path / 'x'), '--size', '256'])
