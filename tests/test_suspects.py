"""Labels to look at again, and pictures of what a model sees in training."""

import csv

import numpy as np
import pytest
from conftest import write_rectangles
from PIL import Image

import viz
from config import CLASSES, Config, dump_config
from metrics import IGNORED, confusion_matrix, image_counts
from utils.id_csv import IdWriter
from viewer import label_errors


@pytest.fixture
def run(tmp_path):
    """A run on 8 photos of a rectangle each: one has an object that nobody labelled, one another class."""
    data = tmp_path / 'data'
    masks = write_rectangles(data, 256, 256, {f'{n}.png': (20, 30, 80, 60, 3) for n in range(8)})
    for name in masks:
        Image.new('RGB', (256, 256)).save(data / name)
    masks['2.png'][200:220, 100:150] = 7
    masks['5.png'][masks['5.png'] == 3] = 4
    masks['6.png'][0, :50] = 9  # too few pixels to look at
    folder = tmp_path / 'output/one/fold0'
    folder.mkdir(parents=True)
    with IdWriter(folder / 'oof.csv') as writer:
        for name, mask in masks.items():
            writer.write(name, mask)
    cfg = Config(name='one', data_root=data)
    (folder / 'config.yaml').write_text(dump_config(cfg))
    return folder, masks


def listed(folder):
    with (folder.parent / 'suspects/suspects.csv').open(newline='') as file:
        return [tuple(row.values()) for row in csv.DictReader(file)]


def test_suspects_are_found_and_ranked(run, capsys):
    folder, _ = run
    viz.command(['suspects', '--name', 'one', '--output', str(folder.parent.parent)])
    assert listed(folder) == [
        ('5.png', '0', 'doubtful', CLASSES[3], '4800', '4800.0'),
        ('2.png', '0', 'missing', CLASSES[7], '1000', '1000.0'),
    ]
    page = (folder.parent / 'suspects/index.html').read_text()
    assert '2.png' in page and 'Styrofoam: missing' in page and page.count('data:image/webp') == 2 * 3
    assert '2 suspects in 2 photos' in capsys.readouterr().out


def test_sure_disagreement_comes_first(run):
    folder, masks = run
    probs = np.zeros((8, 11, 256, 256), np.uint8)
    for row, mask in enumerate(masks.values()):
        np.put_along_axis(probs[row], mask[None].astype(np.intp), 255 if row == 2 else 130, 0)
        if row != 2:
            probs[row, 3][mask != 3] = 125
    np.save(folder / 'oof_probs.npy', probs)
    label_errors.main('one', folder.parent.parent)
    found = listed(folder)
    assert [row[0] for row in found] == ['2.png', '5.png']
    assert float(found[0][5]) == 1000 and float(found[1][5]) == pytest.approx(4800 * 5 / 255, abs=0.1)


def disagreements(truth, pred):
    matrix = confusion_matrix(truth, pred, 11)
    return label_errors.disagreements(image_counts(matrix), matrix)


def test_ignored_pixels_are_no_suspects():
    truth, pred = np.full((256, 256), IGNORED, np.uint8), np.ones((256, 256), np.uint8)
    assert disagreements(truth, pred) == []
    truth[:100] = 0  # what is left of the missing class is not ignored
    assert disagreements(truth, pred) == [('missing', 1, 25600)]
    probs = np.zeros((11, 256, 256), np.uint8)
    probs[1] = 255
    assert label_errors.weigh([('missing', 1, 25600)], truth, pred, probs) == [25600.0]


def test_sheet_of_augmented_samples(tiny_yaml, tiny, tmp_path, capsys):
    out = tmp_path / 'augment.png'
    viz.command(['augment', '--cfg', str(tiny_yaml), '--out', str(out), '--count', '2', '--set', 'mosaic=1'])
    with Image.open(out) as picture:
        assert picture.width > 5 * 256 and picture.height > 2 * 256
    assert '2 photos of fold 0, and 4 samples of each' in capsys.readouterr().out


def test_names_that_a_spreadsheet_would_run(run):
    folder, _ = run
    data = folder.parents[2] / 'data'
    (data / '5.png').rename(data / '=1+1.png')
    for path in (data / 'train_all.json', folder / 'oof.csv'):
        path.write_text(path.read_text().replace('5.png', '=1+1.png'))
    viz.command(['suspects', '--name', 'one', '--output', str(folder.parent.parent)])
    assert [row[0] for row in listed(folder)] == ["'=1+1.png", '2.png']
