"""Test what prepare.py check says of a data set: what is in it, what to look at, and what is wrong."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import write_set
from PIL import ExifTags, Image

import prepare
from config import CLASSES, HOME, Competition, read_competition, write_competition
from data.cache import open_cache
from data.coco import read_coco
from data.folds import read_folds
from utils.errors import BadInput
from utils.log import log


@pytest.fixture
def root(tmp_path) -> Path:
    return write_set(tmp_path / 'd', train=6, test=2, side=64)


@pytest.fixture
def check(root, capsys):
    """Check the set; return the lines that are printed."""

    def run(*words: str) -> list[str]:
        capsys.readouterr()
        prepare.command(['check', '--data', str(root), *words])
        return capsys.readouterr().out.splitlines()

    return run


def change(root: Path, edit, name: str = 'train_all.json') -> None:
    """Edit the content of a JSON file of the set."""
    content = json.loads((root / name).read_text())
    edit(content)
    (root / name).write_text(json.dumps(content))


def last(lines: list[str]) -> str:
    """Return the line of the result, before the next command."""
    (line,) = [line for line in lines if 'nothing wrong found' in line or 'nothing else wrong found' in line]
    return line


def test_a_clean_set(root, check):
    lines = check()
    assert lines[0] == f'classes of the home competition: no {root / "competition.yaml"}'
    assert lines[1:3] == [f'train: 6 photos, {root}/train_all.json', f'test: 2 photos, {root}/test.json']
    assert 'size, height x width: 64x64' in lines and 'no equal files and no near-duplicates' in lines
    assert not any(line.startswith(('EXIF', 'kinds', 'ignored', 'left out')) for line in lines)
    rows = [line.split() for line in lines[lines.index('size, height x width: 64x64') + 2 :]][:11]
    pixels = [int(row[-2].replace(',', '')) for row in rows]
    assert sum(pixels) == 6 * 64 * 64 and sum(int(row[-3]) for row in rows[1:]) == 6 * 3
    assert all(row[-1] == f'{n / sum(pixels):.2%}' for n, row in zip(pixels, rows, strict=True))
    assert lines[-2] == f'{root}: nothing wrong found' and lines[-1].startswith('next: ')


def test_where_the_classes_come_from(root, check, tmp_path):
    names = ['Background', *(f'class {k}' for k in range(1, 11))]
    change(root, lambda d: d.update(categories=[{'id': k, 'name': names[k]} for k in range(1, 11)]))
    with pytest.raises(BadInput, match=f'is no class.*python prepare.py competition --data {root}'):
        check()
    config = tmp_path / 'mine.yaml'
    config.write_text(json.dumps({'classes': names, 'folds': 2}))
    assert check('--cfg', str(config))[0] == f'11 classes from {config}: no {root / "competition.yaml"}'
    prepare.command(['competition', '--data', str(root)])
    assert read_competition(root) == Competition(classes=tuple(names), score_size='own')
    write_competition(root, Competition(classes=tuple(names), crowds='objects'))
    path = root / 'competition.yaml'
    assert check()[0] == f'11 classes from {path}, crowds: objects'
    path.write_text('crowds: objects\n')
    line = f'11 classes from {config}, the rest from {path}, crowds: objects'
    assert check('--cfg', str(config))[0] == line
    with pytest.raises(BadInput, match='already exists; --overwrite replaces its classes'):
        prepare.command(['competition', '--data', str(root)])
    config.unlink()
    change(root, lambda d: d['categories'].reverse())
    prepare.command(['competition', '--data', str(root), '--overwrite'])
    assert read_competition(root) == Competition(classes=tuple(names), score_size='own', crowds='objects')


@pytest.mark.parametrize(
    ('categories', 'classes'),
    [
        ([(1, 'can', ''), (2, 'bag', '')], 'Background can bag'),
        ([(7, 'bag', ''), (3, 'can', '')], 'Background can bag'),
        ([(0, 'can', None), (1, 'bag', None)], 'Background can bag'),
        ([(0, 'trash', 'none'), (1, 'can', 'trash'), (2, 'bag', 'trash')], 'Background can bag'),
        ([(0, 'can', 'can'), (1, 'bag', 'bag')], 'Background can bag'),
        ([(1, 'can', ''), (2, 'background', '')], 'background can'),
        ([(0, '_background_', ''), (1, 'can', '')], '_background_ can'),
        ([('0', 'can', ''), ('1', 5, '')], 'Background can 5'),
    ],
    ids=[
        'plain',
        'order of ids',
        'from 0',
        'root of others',
        'labelme2coco',
        'background',
        'labelme',
        'text',
    ],
)
def test_categories_become_classes(root, categories, classes):
    keys = ('id', 'name', 'supercategory')
    listed = [dict(zip(keys, values, strict=True)) for values in categories]
    change(root, lambda d: d.update(categories=listed, annotations=[]))
    prepare.command(['competition', '--data', str(root)])
    assert read_competition(root).classes == tuple(classes.split())


@pytest.mark.parametrize('factor', [0.4, 0.9])
def test_objects_that_were_drawn_on_smaller_copies(root, check, factor):
    def shrink(content: dict) -> None:
        for annotation in content['annotations']:
            annotation['segmentation'] = [[v * factor for v in annotation['segmentation'][0]]]

    change(root, shrink)
    remark = 'all objects lie in the left 39% and upper 38% of their photos: were they drawn on smaller'
    assert (remark in last(check())) == (factor == 0.4)


def test_photos_without_an_object(root, check):
    change(root, lambda d: d.update(annotations=[a for a in d['annotations'] if a['image_id'] != 2]))
    assert 'photos without an object: 1, such as batch_01/0002.jpg' in check()


def test_categories_that_cannot_be_classes(root):
    change(root, lambda d: d.update(categories=[{'id': 1, 'name': 'can'}, {'id': 2, 'name': 'a\nb'}]))
    with pytest.raises(BadInput, match='train_all.json: its categories cannot be classes: .*not a name'):
        prepare.command(['competition', '--data', str(root)])
    assert not (root / 'competition.yaml').exists()


def crowd(*classes: int):
    def edit(content: dict) -> None:
        for annotation in content['annotations']:
            annotation['iscrowd'] = int(annotation['category_id'] in classes)

    return edit


def test_crowds_are_counted_apart(root, check):
    change(root, crowd(1))
    lines = check()
    (row,) = [line.split() for line in lines if line.startswith('General trash')]
    assert row[2:6] == ['0', '0', row[4], '0'] and int(row[4]) > 0
    assert any(line.startswith('ignored ') for line in lines)
    assert 'all objects of General trash are crowds, which are ignored (crowds: objects in' in last(lines)
    change(root, crowd(*range(1, 11)))
    assert 'all 18 objects are crowds, which are ignored (crowds: objects in' in last(check())
    write_competition(root, Competition(crowds='objects'))
    lines = check()
    assert last(lines) == f'{root}: nothing wrong found'
    assert not any(line.startswith('ignored') for line in lines)


@pytest.mark.parametrize('iscrowd', [0, 1])
def test_the_background_is_no_object(root, check, iscrowd):
    change(root, lambda d: d.update(categories=[{'id': 0, 'name': 'Background'}]))
    change(root, lambda d: [a.update(category_id=0, iscrowd=iscrowd) for a in d['annotations']])
    assert 'no training photo has an object' in last(check())


def test_objects_that_are_lost(root, check):
    def cover(content: dict) -> None:
        first, second = content['annotations'][:2]
        second.update(image_id=first['image_id'], segmentation=[[0, 0, 64, 0, 64, 64, 0, 64]])
        first['category_id'], second['category_id'] = 9, 10
        content['annotations'] = [second, first | {'segmentation': [[0, 0, 64, 0, 64, 64, 0, 64]]}]

    change(root, lambda d: d.update(annotations=[a for a in d['annotations'] if a['category_id'] < 9]))
    change(root, cover)
    assert 'no pixel is left of the objects of Clothing: others cover them' in last(check())
    change(root, lambda d: d.update(annotations=[]))
    lines = check()
    assert 'no training photo has an object' in last(lines)
    assert any(line.startswith('no object: General trash, Paper, ') for line in lines)


def test_objects_that_are_left_out(root, check):
    change(root, lambda d: d['annotations'][0].update(segmentation=[]))
    change(root, lambda d: d['annotations'][1]['segmentation'].append([1, 1, 2, 2]))
    lines = check()
    box, part = [line for line in lines if line.startswith('left out: ')]
    assert box.endswith(f'(no polygon (a box alone)), the first: {root}/train_all.json: annotation 0')
    assert part.startswith('left out: 1 (a part with fewer than 3 points), the first: ')
    assert '1 object left out; 1 part of objects left out; ' in last(lines)


def save_turned(root: Path, orientations: dict[int, int], size: tuple[int, int] = (64, 48)) -> None:
    """Save photos of a stored (width, height) with an EXIF orientation; the records say 48x64 pixels."""
    rng = np.random.default_rng(0)
    for row in range(8):
        exif = Image.Exif()
        exif[ExifTags.Base.Orientation] = orientations.get(row, 1)
        turned = orientations.get(row, 1) in (5, 6, 7, 8) and row % 2 == 0
        width, height = size[::-1] if turned else size
        noise = rng.integers(0, 256, (height, width, 3), np.uint8)
        Image.fromarray(noise).save(root / f'batch_01/{row:04d}.jpg', exif=exif)
    for name in ('train_all.json', 'test.json'):
        change(root, lambda d: [i.update(width=size[0], height=size[1]) for i in d['images']], name)


def test_turned_photos_whose_size_tells(root, check):
    save_turned(root, {0: 6, 2: 8, 4: 6})
    lines = check()
    assert 'EXIF: 3 photos with a turn; 3 recorded sizes fit orientation: displayed' in lines
    assert 'orientation' not in last(lines)
    save_turned(root, {0: 6, 2: 3})  # the size of one does not tell, but that of the other does
    expected = '1 recorded size fit orientation: displayed, 1 recorded size cannot tell'
    lines = check()
    assert any(expected in line for line in lines) and 'orientation' not in last(lines)


def test_turned_photos_that_were_labelled_as_stored(root, check):
    save_turned(root, {1: 6, 3: 8})
    message = r'2 photos with an EXIF turn are those as stored \(first: batch_01/0001.jpg\)'
    with pytest.raises(BadInput, match=f'{message}, but orientation is displayed; write orientation: stored'):
        check()
    write_competition(root, Competition(orientation='stored'))
    assert 'EXIF: 2 photos with a turn; 2 recorded sizes fit orientation: stored' in check()


def test_turned_photos_of_both_kinds(root, check):
    save_turned(root, {0: 6, 1: 6, 3: 6})
    with pytest.raises(BadInput, match=r'1 as displayed \(first: .*0.jpg\), 2 as stored \(first: .*1.jpg\)'):
        check()


def test_turned_photos_whose_size_does_not_tell(root, check):
    save_turned(root, {0: 3, 7: 2})
    names = r'batch_01/0000.jpg, batch_01/0007.jpg'
    assert f'the size of 2 photos with an EXIF turn ({names}) does not tell' in last(check())
    write_competition(root, Competition())
    path = root / 'competition.yaml'
    path.write_text(path.read_text() + 'orientation: displayed\n')
    assert 'EXIF' not in last(check())


def test_kinds_and_sizes(root, check):
    Image.new('L', (80, 40)).save(root / 'batch_01/0007.jpg')
    change(root, lambda d: d['images'][1].update(width=80, height=40), 'test.json')
    lines = check()
    assert 'sizes, height x width: 2, from 40x80 to 64x64, most often 64x64 (7)' in lines
    assert 'kinds: RGB 7, grey 1' in lines


def save_deep(root: Path, row: int, low: int, high: int) -> None:
    values = np.random.default_rng(row).integers(low, high, (64, 64), np.uint16, endpoint=True)
    values[0, :2] = low, high
    Image.fromarray(values).save(root / f'batch_01/{row:04d}.jpg', 'PNG')


def test_photos_of_more_than_8_bits(root, check):
    for row in range(8):
        save_deep(root, row, 300 + row, 2000 + row)
    with pytest.raises(BadInput, match=r'write intensity: \[300, 2007\] into .*competition.yaml'):
        check()
    write_competition(root, Competition(intensity=(300, 2005)))
    lines = check()
    assert '2 test photos (batch_01/0006.jpg, batch_01/0007.jpg) with values outside' in last(lines)
    assert 'kinds: 16-bit grey 8' in lines
    write_competition(root, Competition(intensity=(301, 4095)))
    with pytest.raises(BadInput, match=r'1 training photo outside .* write intensity: \[300, 2007\]'):
        check()
    write_competition(root, Competition(intensity=(0, 4095)))
    assert 'values' not in last(check())


def test_cut_off_test_photo(root, check):
    path = root / 'batch_01/0006.jpg'
    path.write_bytes(path.read_bytes()[:-40])
    assert '1 cut-off test photo (batch_01/0006.jpg), predicted from what decodes' in last(check())
    path = root / 'batch_01/0001.jpg'
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(BadInput, match=r'0001.jpg: cannot be decoded: image file is truncated'):
        check()


def test_faults_of_train_and_test_are_counted(root, check):
    for row in (3, 7):
        (root / f'batch_01/{row:04d}.jpg').unlink()
    with pytest.raises(BadInput, match=r'0003.jpg: no such image \(one of 2 faulty photos among 8\)'):
        check()


def test_equal_files_and_near_duplicates(root, check):
    photos = root / 'batch_01'
    shutil.copy(photos / '0000.jpg', photos / '0001.jpg')
    with Image.open(photos / '0002.jpg') as image:
        image.save(photos / '0006.jpg', quality=80)
    lines = check()
    assert '1 group of equal files: 1 within train' in lines
    assert '1 group of near-duplicates: 1 between train and test' in lines
    assert '  batch_01/0000.jpg, batch_01/0001.jpg' in lines
    assert '1 group of equal files (1 within train); 1 group of near-duplicates (1 between' in last(lines)


# --- folds --------------------------------------------------------------------------------------------------


@pytest.fixture
def frames(root) -> Path:
    """Make all photos frames of a fixed camera, and name them after two days."""
    for row in range(1, 8):
        shutil.copy(root / 'batch_01/0000.jpg', root / f'batch_01/{row:04d}.jpg')
    return root


def test_frames_of_a_fixed_camera(frames, check, tiny):
    lines = check()
    assert 'no folds can be made: found 6 photos of 1 scene' in last(lines)
    assert 'group in competition.yaml, or folds of your own with folds_csv' in last(lines)
    assert not any(line.startswith('next: ') for line in lines)
    with pytest.raises(BadInput, match='found 6 photos of 1 scene.*folds_csv'):
        make_folds(tiny, frames, None)


def test_folds_of_photos_that_are_mostly_alike(tmp_path, tiny, caplog):
    root = write_set(tmp_path / 'd', train=12, test=1, side=64)
    for row in range(1, 10):
        shutil.copy(root / 'batch_01/0000.jpg', root / f'batch_01/{row:04d}.jpg')
    make_folds(tiny, root, None)
    assert 'warning: 10 of 12 photos are alike, as frames of one camera' in caplog.text


def make_folds(tiny, root: Path, group: str | None, **changes) -> list[int]:
    places = {'data_root': root, 'cache_dir': root.with_name('cache'), **changes}
    cfg = tiny.model_copy(update={**places, 'competition': Competition(classes=CLASSES, group=group)})
    return read_folds(cfg, open_cache(cfg, 'train')).tolist()


def test_groups_alone_if_near_duplicates_join_them(frames, check, tiny, monkeypatch):
    warnings = []
    monkeypatch.setattr(log, 'warning', warnings.append)
    config = frames.with_name('two.yaml')
    config.write_text('folds: 2')
    write_competition(frames, Competition(group='batch'))
    with pytest.raises(BadInput, match='of 1 scene .*give a group of fewer photos in competition.yaml, or'):
        make_folds(tiny, frames, 'batch')
    folds = make_folds(tiny, frames, r'00(0[01])|$')  # 00, 01, and the others
    assert len(set(folds[2:])) == 1 and set(folds) == {0, 1}
    (warning,) = warnings
    assert 'near-duplicates join the 3 groups of photos to 1, fewer than folds' in warning
    write_competition(frames, Competition(group=r'00(0[01])|$'))
    lines = check('--cfg', str(config))
    assert r"group: 3 scenes of 1 to 4 photos by 00(0[01])|$, such as '00'" in lines
    assert 'near-duplicates join the 3 groups' in last(lines)


def test_groups_are_kept_together(tmp_path, tiny):
    root = write_set(tmp_path / 'd', train=12, test=1, side=64)
    folds = make_folds(tiny, root, r'00(\d\d)\.jpg$|nothing', folds=3)
    assert len(set(folds)) == 3
    folds_csv = root.with_name('cache') / 'folds.csv'
    split = "'batch_01/00.*' is in fold ., others of its group in .; move the file away"
    with pytest.raises(BadInput, match=f'{folds_csv}: splits a group: {split}'):
        make_folds(tiny, root, r'00[01]', folds=3)
    folds_csv.unlink()
    folds = make_folds(tiny, root, r'00(0[0-5]|0|1)', folds=3)
    assert len(set(folds[6:10])) == 1 and len(set(folds[10:])) == 1


def test_a_name_that_group_does_not_match(root, check, tiny):
    write_competition(root, Competition(group='000[012]'))
    fault = "competition.yaml: group: 000.012. matches nothing in the file name 'batch_01/0003.jpg'"
    with pytest.raises(BadInput, match=fault):
        check()
    with pytest.raises(BadInput, match=fault):
        make_folds(tiny, root, '000[012]')


def test_folds_of_another_number(root, tiny):
    make_folds(tiny, root, None)
    with pytest.raises(BadInput, match=r'has the folds \[0, 1\], but the config key folds is 3; set folds=2'):
        make_folds(tiny, root, None, folds=3)


def test_folds_csv_of_a_spreadsheet(root, tiny, tmp_path):
    """It begins with a byte order mark, and has the names of Windows."""
    path = tmp_path / 'mine.csv'
    lines = ['file_name,fold', *(rf'batch_01\{row:04d}.jpg,{row % 2}' for row in range(6))]
    path.write_text('\r\n'.join(lines), encoding='utf-8-sig')
    assert make_folds(tiny, root, None, folds_csv=path) == [0, 1, 0, 1, 0, 1]


@pytest.mark.parametrize(
    ('program', 'few', 'name'),
    [('/bin/nvidia-smi', 6, 'convnext'), ('/bin/nvidia-smi', 7, 'trash481'), (None, 6, 'trash481')],
    ids=['GPU', 'few photos', 'no GPU'],
)
def test_config_of_the_next_command(check, program, few, name, monkeypatch):
    monkeypatch.setattr(prepare.shutil, 'which', {'nvidia-smi': program}.get)
    monkeypatch.setattr(prepare, 'FEW_PHOTOS', few)
    assert f'prepare.py folds --cfg configs/{name}.yaml ' in check()[-1]


CSV_ROWS = 'image_id,file_name,fold\n' + ''.join(f'{n},{{{n}}},{n % 2}\n' for n in range(6))
OWN_ROWS = CSV_ROWS.format(*(f'batch_01/{n:04d}.jpg' for n in range(6)))
OTHER_NAMES = 'lists other images, or an image twice, expected the photos of .*/d; use another cache_dir or'
SPREADSHEETS = {
    'semicolons': lambda text: text.replace(',', ';').replace('\n', '\r\n').encode(),
    'tabs and a mark': lambda text: text.replace(',', '\t').encode('utf-8-sig'),
    'capitals and spaces': lambda text: text.replace('file_name,fold', 'File Name, Fold').encode(),
    'floats': lambda text: text.replace(',0\n', ',0.0\n').encode(),
    'empty cells': lambda text: (text.replace('\n', ',,\n') + ',,,,\n\n').encode(),
}


@pytest.mark.parametrize('kind', SPREADSHEETS)
def test_folds_csv_as_spreadsheets_write_it(kind, root, tiny, tmp_path):
    names = [image['file_name'] for image in json.loads((root / 'train_all.json').read_text())['images']]
    path = tmp_path / 'mine.csv'
    path.write_bytes(SPREADSHEETS[kind](CSV_ROWS.format(*names)))
    assert make_folds(tiny, root, None, folds_csv=path) == [0, 1, 0, 1, 0, 1]


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (b'photo,fold\na,0\n', "line 1: found the header 'photo,fold', expected 'image_id,file_name"),
        (CSV_ROWS.encode('utf-16'), 'is UTF-16; expected UTF-8'),
        (b'file_name,fold\na.jpg,one\n', "line 2: the fold is 'one', expected lines of"),
        ('file_name,fold\né.jpg,1\n'.encode('latin-1'), 'save it as CSV in UTF-8'),
        (OWN_ROWS.partition('5,batch')[0].encode(), "lacks 'batch_01/0005.jpg', expected the photos of"),
        (f'{OWN_ROWS}6,b.jpg,0\n'.encode(), OTHER_NAMES),
        (f'{OWN_ROWS}6,batch_01/0000.jpg,0\n'.encode(), OTHER_NAMES),
        (OWN_ROWS.replace(',1\n', ',2\n').encode(), r'folds \[0, 2\], but .* folds is 2; give another cache'),
        (OWN_ROWS.replace(',1\n', ',0\n').encode(), r'folds \[0\], but .* folds is 2; give another cache'),
    ],
)
def test_folds_csv_that_is_refused(content, message, root, tiny, tmp_path):
    path = tmp_path / 'mine.csv'
    path.write_bytes(content)
    with pytest.raises(BadInput, match=message):
        make_folds(tiny, root, None, folds_csv=path)


def test_folds_csv_that_is_a_folder(root, tiny, tmp_path):
    with pytest.raises(BadInput, match=f'{tmp_path}: expected lines of image_id,file_name,fold: .*directory'):
        make_folds(tiny, root, None, folds_csv=tmp_path)


def test_a_link_out_of_the_data_root(root, tmp_path):
    name = json.loads((root / 'train_all.json').read_text())['images'][0]['file_name']
    place = tmp_path / 'elsewhere.jpg'
    (root / name).rename(place)
    (root / name).symlink_to(place)
    with pytest.raises(BadInput, match=r'leads out of .* by a link; link the data root as a whole, or copy'):
        read_coco(root, 'train', HOME)


def test_folds_that_split_near_duplicates(root, check, tiny, tmp_path, caplog):
    for row in (4, 5):
        shutil.copy(root / 'batch_01/0001.jpg', root / f'batch_01/{row:04d}.jpg')
    folds_csv = tmp_path / 'folds.csv'
    rows = [f'{row},batch_01/{row:04d}.jpg,{row % 2}' for row in range(6)]
    folds_csv.write_text('\n'.join(['image_id,file_name,fold', *rows]))
    config = tmp_path / 'own.yaml'
    words = [f'{key}: {value}' for key, value in {'folds': 2, 'folds_csv': folds_csv}.items()]
    config.write_text('\n'.join([*words, f'data_root: {root}', f'cache_dir: {tmp_path / "cache"}']))
    split = "in two folds, such as 'batch_01/0001.jpg' (fold 1) and 'batch_01/0004.jpg' (fold 0)"
    assert f'{folds_csv}: 1 pair of near-duplicates {split}' in last(check('--cfg', str(config)))
    prepare.command(['folds', '--cfg', str(config)])
    (warning,) = [record.message for record in caplog.records if 'near-duplicates' in record.message]
    assert warning.startswith(f'warning: {folds_csv}: ') and split in warning
    folds_csv.write_text(folds_csv.read_text().replace('0004.jpg,0', '0004.jpg,1'))
    assert 'two folds' not in last(check('--cfg', str(config)))
