"""Photos are split into parts by fold and scene, so that no scene is on both sides of a choice."""

import random
from argparse import Namespace

import numpy as np
import pytest
from conftest import write_csv, write_rectangles

from config import HOME
from data.coco import training_photos
from tools import postprocess
from utils.errors import BadInput
from voting.members import (
    PARTS,
    OofFile,
    complete_scenes,
    deal,
    find_places,
    member_of,
    read_samples,
    split_parts,
)
from voting.origin import Origin, write_origin
from voting.thresholds import split_rows

NAMES = [f'{n:02d}.jpg' for n in range(20)]


def sizes_of_parts(parts):
    return np.bincount([*parts.values()]).tolist()


def test_folds_are_the_parts_unless_they_split_a_scene():
    places = {name: (2 * (n % 3), n) for n, name in enumerate(NAMES)}
    assert [*split_parts(places).values()] == [n % 3 for n in range(20)]
    places['05.jpg'] = places['08.jpg'] = (4, 0)  # of the scene of 00.jpg, which is in fold 0
    parts = split_parts(places)
    assert parts['05.jpg'] == parts['08.jpg'] == parts['00.jpg'] == 0 and parts['02.jpg'] == 2
    unknown = {name: (None if n < 10 else 1, None) for n, name in enumerate(NAMES)}
    assert [*split_parts(unknown).values()] == [0] * 10 + [1] * 10


def test_a_single_fold_is_dealt_out_by_scenes():
    """In a video every photo has its double ten photos later."""
    places = {name: (0, n % 10) for n, name in enumerate(NAMES)}
    parts = split_parts(places)
    assert all(parts[NAMES[n]] == parts[NAMES[n + 10]] for n in range(10))
    assert sizes_of_parts(parts) == [4] * PARTS
    large = {name: (0, max(0, n - 7)) for n, name in enumerate(NAMES)}  # a scene of eight
    assert sizes_of_parts(split_parts(large)) == [8, 3, 3, 3, 3]
    assert deal([1, 2, 1, 4, 1], 2) == [1, 1, 1, 0, 0] and deal([1, 3], 5) == [1, 0]
    assert sizes_of_parts(split_parts({name: (0, n % 2) for n, name in enumerate(NAMES)})) == [10, 10]


def test_an_unknown_fold_is_cut_in_the_order_of_names():
    parts = split_parts(dict.fromkeys(NAMES, (None, None)))
    assert [*parts.values()] == [n // 4 for n in range(20)]


def test_parts_do_not_depend_on_the_order_of_the_rows():
    for places in ({name: (0, n % 7) for n, name in enumerate(NAMES)}, dict.fromkeys(NAMES, (None, None))):
        rows = [*places.items()]
        random.Random(0).shuffle(rows)
        assert split_parts(dict(rows)) == split_parts(places) and [*split_parts(dict(rows))] != NAMES


@pytest.fixture
def oof(tmp_path):
    """A function that writes <folder>/oof.csv of all photos, and their scenes if they are known."""
    boxes = {name: (10 + 5 * n, 20, 60, 80, 1 + n % 3) for n, name in enumerate(NAMES)}
    masks = write_rectangles(tmp_path / 'data', 256, 256, boxes)

    def write(folder, scenes=None, name='oof.csv'):
        path = write_csv(tmp_path / folder / name, masks)
        if scenes is not None:
            photos = {name: [0, scene] for name, scene in zip(NAMES, scenes, strict=True)}
            write_origin(path, Origin({}, {}, photos=photos))
        return path

    return write


def test_scenes_are_those_of_the_origin_beside_a_csv_of_any_model(oof, tmp_path):
    scenes = [n % 10 for n in range(20)]
    unknown, known = oof('team/fold0'), oof('ours/fold0', scenes)
    data = tmp_path / 'data'
    read = [read_samples([[member_of(path)] for path in paths], training_photos(data, HOME), data, HOME)
            for paths in ([unknown], [unknown, known])]  # fmt: skip
    assert [sample.part for sample in read[0]] == [n // 4 for n in range(20)]
    places = [(sample.part, sample.scene) for sample in read[1]]
    parts = [part for part, _ in places]
    assert parts[:10] == parts[10:] and sorted({*parts}) == [*range(PARTS)]
    assert [scene for _, scene in places] == scenes
    part, scene = split_rows([known.with_name('oof_histograms.npy')], [20])
    assert part.tolist() == parts and scene.tolist() == scenes
    part, scene = split_rows([unknown.with_name('oof_histograms.npy')], [20])
    assert part.tolist() == [n // 4 for n in range(20)] and scene is None


def test_scenes_are_taken_from_the_model_that_knows_most(tmp_path):
    """A photo that it does not know has the fold of its folder, and is a scene of its own."""
    sources = []
    for model, photos in (('a', {}), ('b', {'1.jpg': [3, 7]}), ('c', {'0.jpg': [1, 4], '2.jpg': [2, 4]})):
        path = write_csv(tmp_path / model / 'fold5' / 'oof.csv', {})
        write_origin(path, Origin({}, {}, photos=photos))
        file = OofFile(Namespace(path=path), 5, None, {})
        sources.append(dict.fromkeys(['0.jpg', '1.jpg', '2.jpg', '3.jpg'], file))
    expected = {'0.jpg': (1, 4), '1.jpg': (5, 6), '2.jpg': (2, 4), '3.jpg': (5, 8)}
    assert find_places(sources, tmp_path, HOME) == expected
    assert find_places([*sources[:1], *sources[:0:-1]], tmp_path, HOME) == expected


@pytest.mark.parametrize(
    ('scenes', 'group', 'expected'),
    [
        ([None] * 5, None, [None] * 5),
        ([3, None, 0, None, 3], None, [3, 5, 0, 7, 3]),
        ([None] * 5, '(.)', [0, 0, 1, 1, 2]),
        ([7, None, None, 2, None], '(.)', [7, 7, 2, 2, 10]),
        ([1, 1, 2, 0, 1], '(.)', [1, 1, 2, 0, 1]),
    ],
)
def test_scenes_that_are_not_known(scenes, group, expected, tmp_path):
    names, competition = ['a1', 'a2', 'b1', 'b2', 'c1'], HOME.model_copy(update={'group': group})
    assert complete_scenes(names, scenes, tmp_path, competition) == expected


def test_without_an_origin_a_group_is_a_scene(oof, tmp_path):
    path, data = oof('team/fold0'), tmp_path / 'data'
    by_digit = HOME.model_copy(update={'group': r'\d(\d)'})
    samples = read_samples([[member_of(path)]], training_photos(data, HOME), data, by_digit)
    parts = [sample.part for sample in samples]
    assert parts[:10] == parts[10:] and sorted({*parts}) == [*range(PARTS)]


def test_postprocess_reads_the_csvs_that_it_is_given(oof, tmp_path, capsys):
    good, data = oof('a'), tmp_path / 'data'
    masks = {name: np.full((256, 256), 9, np.uint8) for name in NAMES}
    bad = write_csv(tmp_path / 'a/other.csv', masks)
    for path, score in ((good, '1.0000'), (bad, '0.0000')):
        postprocess.search([path], data, HOME)
        assert f'as predicted: mIoU {score}' in capsys.readouterr().out
    with pytest.raises(BadInput, match='none.csv: no such file'):
        postprocess.search([tmp_path / 'a/none.csv'], data, HOME)
    half = write_csv(tmp_path / 'b/fold1/oof.csv', dict([*masks.items()][:10]))
    with pytest.raises(BadInput, match='found CSVs of 2 models .*search each by itself'):
        postprocess.search(
            [half, write_csv(tmp_path / 'c/fold0/oof.csv', dict([*masks.items()][10:]))], data, HOME
        )
