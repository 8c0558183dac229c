"""Scoring against labels, comparing two predictions, calibrating, and the names of fold folders."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from conftest import write_csv, write_rectangles

import evaluate
from config import CLASSES, HOME, Competition, fold_dir, fold_files, fold_of, write_competition
from data.coco import draw_mask, read_coco, read_labels
from metrics import image_counts
from utils.errors import BadInput
from voting.calibration import read_temperature
from voting.origin import Origin, write_origin

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope='module')
def truths(shapes) -> dict[str, np.ndarray]:
    """The masks of the test photos by file name."""
    photos = read_labels(shapes / 'test_labels.json', HOME).photos
    return {photo.file_name: draw_mask(photo) for photo in photos}


# --- score --------------------------------------------------------------------------------------------------


def test_score_by_hand(tmp_path, capsys):
    polygon = [0, 0, 256, 0, 256, 512, 0, 512]  # the left half of a photo of 512x512 is paper
    labels = {
        'images': [{'id': 7, 'file_name': 'a.jpg', 'height': 512, 'width': 512}],
        'categories': [{'id': k, 'name': name} for k, name in enumerate(CLASSES) if k],
        'annotations': [{'id': 1, 'image_id': 7, 'category_id': 2, 'area': 1, 'segmentation': [polygon]}],
    }
    (tmp_path / 'labels.json').write_text(json.dumps(labels))
    pred = np.zeros((256, 256), np.uint8)
    pred[:, :64] = 2  # half of the 128 columns of paper
    half = write_csv(tmp_path / 'half.csv', {'a.jpg': pred})
    pred[:, :128] = 2
    right = write_csv(tmp_path / 'right.csv', {'a.jpg': pred})
    for _ in range(2):  # counted, then read from beside the CSV
        evaluate.command(['score', str(half), str(right), '--labels', str(tmp_path / 'labels.json')])
        lines = capsys.readouterr().out.splitlines()
        assert lines[0].split() == ['mIoU', '95%', 'interval']
        # background 128 of 192 columns, paper 64 of 128: (2/3 + 1/2) / 2
        assert lines[1].split() == ['1', '0.5833', '[0.5833,', '0.5833]', str(half)]
        assert lines[2].split() == ['2', '1.0000*', '[1.0000,', '1.0000]', str(right)]
        by_class = {line[:13].strip(): line[13:].split() for line in lines[5:]}
        assert lines[4].split() == ['1', '2'] and [*by_class] == [*CLASSES]
        assert by_class.pop('Background') == ['0.667', '1.000'] and by_class.pop('Paper') == [
            '0.500',
            '1.000',
        ]
        assert all(cells == ['-', '-'] for cells in by_class.values())


def test_scores_of_many_csvs_fit_into_100_columns(shapes, truths, tmp_path):
    csv = write_csv(tmp_path / 'a.csv', truths)
    counts = evaluate.score_csvs([csv], shapes / 'test_labels.json', HOME) * 30
    lines = evaluate.format_scores([Path('a.csv')] * 30, counts, HOME).splitlines()
    assert max(map(len, lines)) <= 100
    assert sum(line.startswith('Plastic bag') for line in lines) == 3  # 12 CSVs a block


def test_rows_in_any_order(shapes, truths, tmp_path):
    """A CSV's rows are taken in the order of the labels, so that intervals are drawn on the same photos."""
    empty = {name: np.where(np.arange(256) < 128, mask, 0) for name, mask in truths.items()}
    first = write_csv(tmp_path / 'a.csv', empty)
    second = write_csv(tmp_path / 'b.csv', dict(reversed(empty.items())))
    counts = evaluate.score_csvs([first, second], shapes / 'test_labels.json', HOME)
    assert np.array_equal(*counts) and not np.array_equal(counts[0], counts[0][::-1])


def test_csvs_of_other_tools_score_the_same(shapes, truths, rectangles, tmp_path, capsys):
    plain = write_csv(tmp_path / 'a.csv', truths)
    theirs = tmp_path / 'theirs.csv'
    content = plain.read_bytes().replace(b'batch_01/', b'.\\batch_01\\').replace(b'\n', b'\r\n')
    theirs.write_bytes(b'\xef\xbb\xbf' + content)
    for _ in range(2):  # counted, then read from beside the CSV
        counts = evaluate.score_csvs([plain, theirs], shapes / 'test_labels.json', HOME)
        assert np.array_equal(*counts)
    data, masks = rectangles
    first, second = (write_csv(tmp_path / f'{name}.csv', masks) for name in 'bc')
    first.write_bytes(first.read_bytes().replace(b'\n', b'\n./', len(masks)))
    evaluate.command(['compare', str(first), str(second), '--data', str(data)])
    assert 'first - second' in capsys.readouterr().out


@pytest.mark.parametrize(
    ('harm', 'message'),
    [
        (lambda masks: masks.pop('batch_01/0025.jpg'), "has no row of image 'batch_01/0025.jpg'"),
        (lambda masks: masks.update({'b.jpg': np.zeros((256, 256), np.uint8)}), "has a row of image 'b.jpg'"),
    ],
)
def test_score_of_other_images(shapes, truths, tmp_path, harm, message):
    masks = dict(truths)
    harm(masks)
    csv = write_csv(tmp_path / 'a.csv', masks)
    with pytest.raises(BadInput, match=message):
        evaluate.command(['score', str(csv), '--labels', str(shapes / 'test_labels.json')])


def test_score_without_truth(shapes, truths, tmp_path):
    csv = write_csv(tmp_path / 'a.csv', truths)
    with pytest.raises(BadInput, match='has no annotations'):
        evaluate.command(['score', str(csv), '--labels', str(shapes / 'test.json')])
    with pytest.raises(BadInput, match='No such file'):
        evaluate.command(['score', str(csv), '--labels', str(shapes / 'none.json')])


# --- compare and calibrate ----------------------------------------------------------------------------------


@pytest.fixture
def rectangles(tmp_path):
    """A data root of 12 photos, and their masks."""
    boxes = {f'{n}.jpg': (10 + 5 * n, 20, 60, 80, 1 + n % 3) for n in range(12)}
    return tmp_path / 'data', write_rectangles(tmp_path / 'data', 256, 256, boxes)


def test_compare_says_which_is_better(rectangles, tmp_path, capsys):
    data, masks = rectangles
    good = write_csv(tmp_path / 'good.csv', masks)
    bad = write_csv(tmp_path / 'bad.csv', {name: np.roll(mask, 9, 1) for name, mask in masks.items()})
    options = ['--data', str(data)]
    assert evaluate.command(['compare', str(good), str(bad), *options]) == 0
    printed = capsys.readouterr().out
    assert f'{good}: mIoU 1.0000 [1.0000, 1.0000]\n' in printed and '95% bootstrap interval' in printed
    assert printed.endswith('the first is better: a significant difference on 12 photos\n')
    evaluate.command(['compare', str(bad), str(good), *options])
    assert 'the second is better: a significant difference on 12 photos' in capsys.readouterr().out
    evaluate.command(['compare', str(good), str(good), *options])
    assert 'no significant difference on 12 photos' in capsys.readouterr().out
    some = write_csv(tmp_path / 'some.csv', dict(list(masks.items())[:-1]))
    with pytest.raises(BadInput, match="some.csv: has no row of image '11.jpg', which .*good.csv has"):
        evaluate.command(['compare', str(good), str(some), *options])
    other = write_csv(tmp_path / 'other.csv', {'x.jpg': masks['0.jpg']})
    with pytest.raises(BadInput, match="image 'x.jpg' is not among the training photos of"):
        evaluate.command(['compare', str(other), str(other), *options])


def test_compare_and_seeds_take_folders_of_folds(rectangles, tmp_path, capsys):
    """A run that shifts its masks by a pixel a seed, and one that shifts them by nine more."""
    data, masks = rectangles

    def write_run(name: str, shift: int) -> str:
        for fold in (0, 1):
            part = {image: np.roll(mask, shift + fold, 1) for image, mask in [*masks.items()][fold::2]}
            write_csv(tmp_path / name / f'fold{fold}/oof.csv', part)
        return str(tmp_path / name)

    good, bad = ([write_run(f'{more}-seed{seed}', seed + more) for seed in range(3)] for more in (0, 9))
    options = ['--data', str(data)]
    evaluate.command(['compare', *good, '--against', *bad, *options])
    printed = capsys.readouterr().out
    assert printed.endswith('the first is better: a significant difference on 12 photos and 3 seeds\n')
    for part in (
        f'{good[2]}: mIoU 0.',
        'second: 3 seeds, standard',
        'over photos and 3 seeds',
        'in 80% of cases',
    ):
        assert part in printed
    evaluate.command(['compare', *bad, '--against', *good, '--folds', '1', *options])
    assert 'on 6 photos and 3 seeds' in capsys.readouterr().out
    evaluate.command(['compare', good[0], bad[0], *options])
    assert 'the interval holds the photos alone' in capsys.readouterr().out
    evaluate.command(['seeds', *good, *options])
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 4 and printed[3].startswith('3 seeds, standard deviation 0.')
    scores = [float(line.split('mIoU ')[1].split()[0]) for line in printed]
    assert scores[3] == pytest.approx(np.mean(scores[:3]), abs=1e-4)
    for words, status in ((['compare', *good], 2), (['compare', *good, '--against', *bad[:2]], 2)):
        with pytest.raises(SystemExit) as caught:
            evaluate.command([*words, *options])
        assert caught.value.code == status and capsys.readouterr().err.count('\n') == 1
    with pytest.raises(BadInput, match='no fold\\*/oof.csv in it'):
        evaluate.command(['seeds', str(tmp_path), *options])
    with pytest.raises(BadInput, match='fold7/oof.csv: cannot be read'):
        evaluate.command(['seeds', *good, '--folds', '7', *options])
    with pytest.raises(BadInput, match='--folds goes with the folders'):
        evaluate.command(['seeds', f'{good[0]}/fold0/oof.csv', '--folds', '0', *options])
    with pytest.raises(BadInput, match="has no row of image '1.jpg'"):
        evaluate.command(['compare', good[0], f'{bad[0]}/fold0/oof.csv', *options])
    again = f'{good[0]}/fold0/..'
    for words, fault in (
        (['seeds', good[0], again], 'RUN: .* is given twice'),
        (['compare', *good[:2], '--against', bad[0], bad[0]], '--against: .*9-seed0 is given twice'),
        (['seeds', good[0], '--folds', '0', '0'], '--folds: 0 is given twice'),
    ):
        with pytest.raises(BadInput, match=fault):
            evaluate.command([*words, *options])


def test_scenes_and_folds_come_from_the_origin_of_a_csv(rectangles, tmp_path):
    data, masks = rectangles
    csvs = [write_csv(tmp_path / f'{name}.csv', dict(order)) for name, order in (('a', masks), ('b', masks))]
    for csv in csvs:
        photos = {image: [n % 2, n // 3] for n, image in enumerate(masks)}
        write_origin(csv, Origin({}, {}, photos=photos))
    runs = evaluate.read_runs(csvs, read_coco(data, 'train', HOME))
    assert runs.counts.shape == (12, 2, 3, 11)
    assert runs.folds.tolist() == [0, 1] * 6 and runs.scenes.tolist() == [n // 3 for n in range(12)]
    photos['0.jpg'] = [1, 0]
    write_origin(csvs[1], Origin({}, {}, photos=photos))
    other = evaluate.read_runs(csvs, read_coco(data, 'train', HOME))
    assert other.folds is None and other.scenes is not None  # other trainings predicted the photos


def test_calibrate_keeps_a_temperature_for_pseudo_labels(rectangles, tmp_path, capsys):
    data, masks = rectangles
    rng = np.random.default_rng(0)
    folder = tmp_path / 'output/b'
    probs = []
    for mask in masks.values():  # overconfident: sure everywhere, right on nine pixels of ten
        wrong = rng.random(mask.shape) < 0.1
        ids = np.where(wrong, (mask + 1) % 11, mask)
        probs.append(np.where(np.arange(11)[:, None, None] == ids, 245, 1).astype(np.uint8))
    write_csv(folder / 'oof.csv', {name: p.argmax(0) for name, p in zip(masks, probs, strict=True)})
    np.save(folder / 'oof_probs.npy', np.stack(probs))
    assert evaluate.command(['calibrate', str(folder), '--data', str(data)]) == 0
    assert 'expected calibration error' in capsys.readouterr().out
    assert read_temperature(folder) > 1.1
    with pytest.raises(BadInput, match='no such file'):
        evaluate.command(['calibrate', str(tmp_path / 'none'), '--data', str(data)])


# --- the confusions of each photo ---------------------------------------------------------------------------


def test_folds_with_the_same_photo_are_refused(rectangles, tmp_path):
    data, masks = rectangles
    coco = read_coco(data, 'train', HOME)
    paths = [write_csv(tmp_path / f'{fold}.csv', dict(list(masks.items())[fold::2])) for fold in (0, 1)]
    folds = evaluate.read_fold_confusions(paths, coco)
    assert [fold.image_ids for fold in folds] == [tuple(masks)[0::2], tuple(masks)[1::2]]
    assert np.array_equal(folds[0].counts[2], image_counts(folds[0].matrices[2]))
    with pytest.raises(BadInput, match=r"b.csv: image '0.jpg' is out of fold in .*0.csv too"):
        again = write_csv(tmp_path / 'b.csv', {'0.jpg': masks['0.jpg']})
        evaluate.read_fold_confusions([*paths, again], coco)


def test_a_folder_that_is_read_only_is_counted_again(rectangles, tmp_path, monkeypatch):
    data, masks = rectangles
    coco = read_coco(data, 'train', HOME)
    path = write_csv(tmp_path / 'a.csv', masks)

    def refuse(path):
        raise BadInput(f'{path}: cannot be written')

    monkeypatch.setattr(evaluate, 'write_whole', refuse)
    assert evaluate.read_confusions(path, coco).matrices.sum() == 12 * 256 * 256
    assert sorted(file.name for file in tmp_path.iterdir()) == ['a.csv', 'data']


# --- fold folders -------------------------------------------------------------------------------------------


def test_fold_folders_are_named_and_found(tmp_path):
    for fold in (-1, 0, 3, 12):
        assert fold_of(tmp_path / fold_dir(fold)) == fold
    for name in ('3', 'fold', 'fold-1', 'foldx', 'fold3x', 'fold٣', 'run'):
        assert fold_of(tmp_path / name) is None
    names = ('fold10', 'fold2', 'all', 'foldx', 'fold0')
    for name in names:
        (tmp_path / name).mkdir()
        if name != 'fold0':
            (tmp_path / name / 'oof.csv').touch()
    found = [path.parent.name for path in fold_files(tmp_path, 'oof.csv')]
    assert found == ['fold2', 'fold10']
    assert fold_files(tmp_path, 'oof.csv', with_all=True)[2:] == [tmp_path / 'all/oof.csv']
    assert fold_files(tmp_path / 'none', 'oof.csv') == []


@pytest.mark.parametrize('script', ['evaluate', 'viz'])
def test_help_imports_nothing_slow(script):
    slow = "{'torch', 'scipy', 'streamlit', 'matplotlib', 'pandas'}"
    code = f'import sys, {script}; assert not {slow} & set(sys.modules), {slow} & set(sys.modules)'
    subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=True)


def test_score_reads_the_competition_beside_the_labels(shapes, tmp_path, capsys):
    labels = json.loads((shapes / 'test_labels.json').read_text())
    for category in labels['categories']:
        category['name'] += ' item'
    (tmp_path / 'labels.json').write_text(json.dumps(labels))
    names = [f'{name} item' for name in CLASSES[1:]]
    write_competition(tmp_path, Competition(classes=('Background', *names)))
    csv = write_csv(
        tmp_path / 'a.csv', {i['file_name']: np.zeros((256, 256), np.uint8) for i in labels['images']}
    )
    evaluate.command(['score', str(csv), '--labels', str(tmp_path / 'labels.json')])
    assert capsys.readouterr().out.count('item') == 10


def test_scenes_that_are_not_known_come_from_the_group(rectangles, tmp_path):
    """A photo without a scene in origin.json is of its group's, or of one of its own; the others stay."""
    data, masks = rectangles
    csv = write_csv(tmp_path / 'a.csv', masks)
    coco = read_coco(data, 'train', HOME)
    grouped = replace(coco, competition=HOME.model_copy(update={'group': r'^(\d)'}))
    assert evaluate.read_runs([csv], coco).scenes is None
    by_name = evaluate.read_runs([csv], grouped).scenes
    assert len(set(by_name.tolist())) == len({name[0] for name in masks}) < len(masks)
    photos = {image: [0, n // 3] for n, image in enumerate(masks)}
    *_, last = photos
    del photos[last]
    write_origin(csv, Origin({}, {}, photos=photos))
    scenes = evaluate.read_runs([csv], coco).scenes.tolist()
    assert scenes[:-1] == [n // 3 for n in range(11)] and scenes[-1] not in scenes[:-1]
    assert evaluate.read_runs([csv], grouped).scenes[-1] in scenes[:-1]  # 11.jpg, with 1.jpg and 10.jpg
