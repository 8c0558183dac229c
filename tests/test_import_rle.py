"""from-rle: training CSVs of run lengths as competitions write them become the masks that they encode."""

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import prepare
from config import read_competition
from data.coco import draw_truth, read_coco
from utils.errors import BadInput

SIZES = {'a_1.png': (20, 30), 'sub/b.png': (16, 12), 'c.png': (9, 9)}


def write_photos(folder: Path) -> Path:
    for name, (height, width) in SIZES.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.random.default_rng(0).integers(0, 255, (height, width, 3), np.uint8)).save(
            folder / name
        )
    return folder


def draw(name: str, *box: int) -> np.ndarray:
    mask = np.zeros(SIZES[name], np.uint8)
    mask[box[0] : box[1], box[2] : box[3]] = 1
    return mask


def usual_text(mask: np.ndarray, order: str = 'column', first: int = 1) -> str:
    """Encode as the functions do that competitors share."""
    pixels = np.concatenate([[0], (mask.T if order == 'column' else mask).flatten(), [0]])
    runs = np.where(pixels[1:] != pixels[:-1])[0] + first
    runs[1::2] -= runs[::2]
    return ' '.join(map(str, runs))


CAN, CUP = draw('a_1.png', 2, 7, 3, 20), draw('a_1.png', 10, 18, 1, 9)
B_CAN = draw('sub/b.png', 0, 16, 0, 2)
MASKS = {('a_1.png', 'can'): CAN, ('a_1.png', 'cup'): CUP, ('sub/b.png', 'can'): B_CAN}


def rows(header: str, line, empty: str = '', order: str = 'column', first: int = 1) -> str:
    """A row for each photo and class; `line` makes it of the photo, the class and the text of the mask."""
    lines = [header]
    for name in SIZES:
        for label in ('can', 'cup'):
            mask = MASKS.get((name, label))
            lines.append(line(name, label, empty if mask is None else usual_text(mask, order, first)))
    return '\n'.join([*lines, ''])


def stem(name: str) -> str:
    return Path(name).stem


IDS = {'can': '1', 'cup': '2'}
CSVS = {
    'image, class, mask': (rows('ImageId,ClassId,EncodedPixels', lambda n, k, t: f'{stem(n)},{k},{t}'), []),
    'ids': (rows('id,class_id,rle', lambda n, k, t: f'{n},{IDS[k]},{t}'), ['--classes', 'can', 'cup']),
    'ids as floats from 0, windows': (
        rows('id,class_id,rle', lambda n, k, t: f'{n},{int(IDS[k]) - 1}.0,{t}').replace('\n', '\r\n'),
        ['--classes', 'can', 'cup'],
    ),
    'joined, -1': (
        rows('EncodedPixels,Image_Label', lambda n, k, t: f'{t},{Path(n).name}_{k}', empty='-1'),
        [],
    ),
    'a spreadsheet, nan': (
        '\ufeff' + rows('id;class;rle', lambda n, k, t: f'{n};{k};{t}', empty='nan').replace('\n', '\r\n'),
        [],
    ),
    'along rows, from 0': (
        rows('image,label,mask', lambda n, k, t: f'{n},{k},{t}', order='row', first=0),
        ['--order', 'row', '--first', '0'],
    ),
    'other columns': (
        rows('id,annotation,width,height,kind', lambda n, k, t: f'{stem(n)},{t},9,8,{k}'),
        ['--columns', 'class=kind'],
    ),
    'an object a row': (
        '\n'.join(['id,class,segmentation', f'a_1,can,{usual_text(draw("a_1.png", 2, 7, 3, 9))}',
                   f'a_1,cup,{usual_text(CUP)}', f'a_1,can,{usual_text(draw("a_1.png", 2, 7, 9, 20))}',
                   f'b,can,{usual_text(B_CAN)}', 'c,cup,', '']),
        [],
    ),
}  # fmt: skip


def run(tmp_path: Path, text: str, *options: str, encoding: str = 'utf-8') -> Path:
    photos = write_photos(tmp_path / 'photos')
    (tmp_path / 'train.csv').write_text(text, encoding, newline='')
    words = ['from-rle', '--csv', str(tmp_path / 'train.csv'), '--photos', str(photos)]
    prepare.command([*words, '--out', str(tmp_path / 'out'), *options])
    return tmp_path / 'out'


def test_a_csv_in_utf_16(tmp_path):
    text = CSVS['image, class, mask'][0].encode('utf-16').decode('latin-1')
    with pytest.raises(BadInput, match=r'train.csv: is UTF-16; expected UTF-8: iconv'):
        run(tmp_path, text, encoding='latin-1')


@pytest.mark.parametrize('name', CSVS)
def test_masks_are_those_of_the_csv(name, tmp_path, capsys):
    text, options = CSVS[name]
    root = run(tmp_path, text, *options)
    competition = read_competition(root)
    assert competition.classes == ('Background', 'can', 'cup')
    photos = {photo.file_name: photo for photo in read_coco(root, 'train', competition).photos}
    assert photos.keys() == SIZES.keys() and all(photos[n].size == size for n, size in SIZES.items())
    for photo in photos.values():
        expected = np.zeros(photo.size, np.uint8)
        for k, label in enumerate(competition.classes):
            mask = MASKS.get((photo.file_name, label))
            if mask is not None:
                expected[mask > 0] = k
        np.testing.assert_array_equal(draw_truth(photo, competition), expected)
    how = competition.submission
    rows_and_first = ('row', 0) if name == 'along rows, from 0' else ('column', 1)
    assert (how.order, how.first) == rows_and_first and competition.score_size == 'own'
    assert how.empty == ('-1' if name == 'joined, -1' else '')
    expected = {'other columns': 'rle', 'an object a row': 'rle', 'a spreadsheet, nan': 'id,class,rle'}.get(
        name, text.split('\n')[0].strip()
    )
    assert ','.join(how.columns).endswith(expected)
    assert how.class_names == ('id' if name == 'ids' else 'name')
    out = capsys.readouterr().out
    assert f'from {rows_and_first[1]}: look at the masks' in out and 'next: python prepare.py masks' in out


def test_one_class_and_no_column_of_classes(tmp_path, capsys):
    lines = ['id,rle', f'a_1,{usual_text(CAN)}', f'a_1,{usual_text(CUP)}', 'b,', 'c,']
    root = run(tmp_path, '\n'.join([*lines, '']), '--classes', 'ship')
    competition = read_competition(root)
    assert competition.classes == ('Background', 'ship') and competition.submission.columns == {
        'id': 'image', 'rle': 'mask',
    }  # fmt: skip
    photo = next(p for p in read_coco(root, 'train', competition).photos if p.file_name == 'a_1.png')
    np.testing.assert_array_equal(draw_truth(photo, competition), CAN | CUP)
    assert len(photo.annotations) == 2


def test_classes_that_overlap_need_a_task(tmp_path):
    lines = ['id,class,rle', f'a_1,can,{usual_text(CAN)}', f'a_1,cup,{usual_text(CAN | CUP)}']
    text = '\n'.join([*lines, ''])
    with pytest.raises(
        BadInput, match=f"'a_1.png': can and cup share {CAN.sum()} pixels; .*--task multilabel"
    ):
        run(tmp_path, text)
    assert not (tmp_path / 'out/train_all.json').exists()
    root = run(tmp_path, text, '--task', 'multilabel')
    competition = read_competition(root)
    assert competition.is_multilabel and competition.classes == ('can', 'cup')
    (photo,) = read_coco(root, 'train', competition).photos
    np.testing.assert_array_equal(draw_truth(photo, competition), [CAN, CAN | CUP])


def test_what_competition_yaml_says_is_kept(tmp_path):
    (tmp_path / 'out').mkdir()
    settings = (
        'classes: [cup, can]\ntask: multilabel\nscore_size: own\nmetric: dice\nsubmission: {order: row}\n'
    )
    (tmp_path / 'out/competition.yaml').write_text(settings)
    text, _ = CSVS['image, class, mask']
    competition = read_competition(run(tmp_path, text))
    assert competition.classes == ('cup', 'can') and competition.submission.order == 'row'
    assert competition.metric == 'dice' and competition.is_multilabel


@pytest.mark.parametrize(('first', 'kind'), [(0, 'id'), (1, 'number')])
def test_numbers_of_classes_that_overlap(first, kind, tmp_path):
    text = (
        f'id,class,rle\na_1,{first},{usual_text(CAN)}\na_1,{first + 1},{usual_text(CAN | CUP)}\nb,{first},\n'
    )
    root = run(tmp_path, text, '--task', 'multilabel', '--classes', 'can', 'cup', 'dent')
    assert read_competition(root).submission.class_names == kind


@pytest.mark.parametrize('unlabelled', ['skip', 'empty'])
def test_photos_without_a_row(unlabelled, tmp_path, capsys):
    text = f'id,class,rle\na_1,can,{usual_text(CAN)}\na_1,cup,{usual_text(CUP)}\n'
    root = run(tmp_path, text, '--unlabelled', unlabelled)
    photos = {p.file_name: p for p in read_coco(root, 'train', read_competition(root)).photos}
    names = ['a_1.png', 'c.png', 'sub/b.png'] if unlabelled == 'empty' else ['a_1.png']
    assert sorted(photos) == names and all(photos[name].size == SIZES[name] for name in names)
    assert [len(photos[name].annotations) for name in names] == [2, 0, 0][: len(names)]
    outcome = 'left out (--unlabelled empty takes them' if unlabelled == 'skip' else 'taken as photos without'
    assert f'photos without labels, {outcome}' in capsys.readouterr().out


def test_test_photos(tmp_path):
    (tmp_path / 'test').mkdir()
    Image.new('RGB', (5, 6)).save(tmp_path / 'test/t.png')
    root = run(tmp_path, CSVS['image, class, mask'][0], '--test', str(tmp_path / 'test'))
    images = json.loads((root / 'test.json').read_text())['images']
    assert [(image['file_name'], image['height'], image['width']) for image in images] == [('t.png', 6, 5)]


GOOD = CSVS['image, class, mask'][0]
FAULTS = {
    'unknown photo': (GOOD + 'x,can,1 1\n', [], r"line 8: 'x' is no photo below .*photos"),
    'no photo at all': ('id,rle\nx,1 1\n', [], r"line 2: 'x,1 1': no column holds photos below .*a_1\.png"),
    'beyond the photo': ('id,rle\na_1,600 2\n', [], 'goes beyond the last pixel, 600.*--first 0 .*--order'),
    'from 0': ('id,rle\na_1,0 2\n', [], 'begins before the first pixel, 1.*--first 0 counts from 0'),
    'from 1': ('id,rle\na_1,600 1\n', ['--first', '0'], 'goes beyond the last pixel, 599.*--first 1'),
    'no numbers': ('id,rle\na_1,x y\n', [], 'none of rle has run lengths; say which: --columns mask=NAME'),
    'two masks': ('id,rle,mask\na_1,1 1,1 1\n', [], 'rle, mask may each be run lengths'),
    'no such column': (GOOD, ['--columns', 'mask=runs'], "found the columns ImageId, .*expected one 'runs'"),
    'no such role': (GOOD, ['--columns', 'runs=mask'], "found 'runs', expected ROLE=NAME"),
    'another class': (GOOD, ['--classes', 'can', 'mug'], "found the label 'cup'"),
    'too few classes': (
        CSVS['ids'][0], ['--classes', 'can'], 'found classes 1 to 2, expected 1 to 1, of 1 classes: can',
    ),
    'no mask': ('id,class,rle\na_1,can,\n', [], 'has no mask with a pixel'),
    'a field too many': (GOOD + 'a_1,can,1 1,5,6\n', [], 'line 8: has 5 fields; expected 3'),
    'nothing': ('', [], 'has no rows'),
}  # fmt: skip


@pytest.mark.parametrize('fault', FAULTS)
def test_each_fault_has_its_line(fault, tmp_path):
    text, options, message = FAULTS[fault]
    with pytest.raises(BadInput, match=message) as error:
        run(tmp_path, text, *options)
    assert '\n' not in str(error.value) and not (tmp_path / 'out/train_all.json').exists()


def test_a_photo_with_an_exif_turn_is_taken_as_displayed(tmp_path):
    (tmp_path / 'photos').mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6  # stored lying, displayed upright
    Image.new('RGB', (10, 6)).save(tmp_path / 'photos/t.jpg', exif=exif)
    (photo,) = read_coco(
        run(tmp_path, 'id,rle\nt,1 10\n'), 'train', read_competition(tmp_path / 'out')
    ).photos
    assert photo.size == (10, 6)
    mask = draw_truth(photo, read_competition(tmp_path / 'out'))
    assert mask[:, 0].all() and not mask[:, 1:].any()
