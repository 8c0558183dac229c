"""COCO exports as labelling tools lay them out become data roots, or the error says how."""

import json
import re
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from conftest import write_set

import prepare
from config import CLASSES, HOME, read_competition
from data.coco import draw_mask, read_coco, read_labels
from data.layout import annotation_files
from utils.errors import BadInput

PHOTOS = {'train': range(4), 'valid': range(4, 6), 'test': range(6, 8)}  # of the set
ROBOFLOW_ROOT = {'id': 0, 'name': 'trash', 'supercategory': 'none'}


@pytest.fixture(scope='module')
def source(tmp_path_factory) -> Path:
    return write_set(tmp_path_factory.mktemp('exports') / 'source', train=6, test=2, side=64)


def part(source: Path, rows: range, name: str = '{}') -> dict:
    """Return the COCO content of some photos, with image ids from 0; `name` makes their file_names."""
    train, test = (json.loads((source / file).read_text()) for file in ('train_all.json', 'test_labels.json'))
    images = [image for image in train['images'] + test['images'] if image['id'] in rows]
    annotations = [a for a in train['annotations'] + test['annotations'] if a['image_id'] in rows]
    return {
        'images': [
            image | {'id': image['id'] - rows[0], 'file_name': name.format(Path(image['file_name']).name)}
            for image in images
        ],
        'categories': train['categories'],
        'annotations': [
            a | {'id': n, 'image_id': a['image_id'] - rows[0]} for n, a in enumerate(annotations)
        ],
    }


def put(source: Path, rows: range, photos: Path, path: Path, content: dict) -> None:
    """Write a JSON file, and the photos into a folder."""
    for folder in (photos, path.parent):
        folder.mkdir(parents=True, exist_ok=True)
    for row in rows:
        shutil.copy(source / f'batch_01/{row:04d}.jpg', photos)
    path.write_text(json.dumps(content))


def roboflow(source: Path, out: Path) -> None:
    for split, rows in PHOTOS.items():
        content = part(source, rows)
        content['categories'] = [
            ROBOFLOW_ROOT,
            *({**c, 'supercategory': 'trash'} for c in content['categories']),
        ]
        put(source, rows, out / split, out / split / '_annotations.coco.json', content)


def cvat(source: Path, out: Path) -> None:
    rows = range(8)
    put(source, rows, out / 'images', out / 'annotations/instances_default.json', part(source, rows))


def datumaro(source: Path, out: Path) -> None:
    """A folder a subset; the categories of the second file have ids of their own."""
    for split, rows in PHOTOS.items():
        content, shift = part(source, rows), len(split)
        content['categories'] = [c | {'id': c['id'] + shift} for c in reversed(content['categories'])]
        for annotation in content['annotations']:
            annotation['category_id'] += shift
        name = {'valid': 'Validation'}.get(split, split)
        put(source, rows, out / 'images' / name, out / f'annotations/instances_{name}.json', content)


def fiftyone(source: Path, out: Path) -> None:
    put(source, range(8), out / 'data', out / 'labels.json', part(source, range(8)))


def label_studio(source: Path, out: Path) -> None:
    content = part(source, range(8), r'images\{}')
    content['categories'] = [{'id': k - 1, 'name': name} for k, name in enumerate(CLASSES) if k]
    for annotation in content['annotations']:
        annotation['category_id'] -= 1
    put(source, range(8), out / 'images', out / 'result.json', content)


def label_studio_server(source: Path, out: Path) -> None:
    put(source, range(8), out / 'images', out / 'result.json', part(source, range(8), '/data/upload/1/{}'))


def label_studio_encoded(source: Path, out: Path) -> None:
    """Names as in addresses, on Windows."""
    content = part(source, range(8), r'images\my%20shots\{}')
    put(source, range(8), out / 'images/my shots', out / 'result.json', content)


def label_studio_local(source: Path, out: Path) -> None:
    content = part(source, range(8), '/data/local-files/?d=shots%5C{}')
    put(source, range(8), out / 'images', out / 'result.json', content)


def lvis(source: Path, out: Path) -> None:
    """Addresses instead of names."""
    content = part(source, range(8))
    for n, image in enumerate(content['images']):
        folder = 'train2017' if n < 5 else 'val2017'
        image['coco_url'] = f'http://images.cocodataset.org/{folder}/{image.pop("file_name")}'
        (out / folder).mkdir(parents=True, exist_ok=True)
        shutil.copy(source / f'batch_01/{n:04d}.jpg', out / folder)
    (out / 'lvis_v1_train.json').write_text(json.dumps(content))


def labelme2coco(source: Path, out: Path) -> None:
    """The labels that were converted lie beside the photos."""
    one_json(source, out)
    (out / '0000.json').write_text('{"shapes": [], "imagePath": "0000.jpg"}')


def coco2017(source: Path, out: Path) -> None:
    for split, rows in (('train2017', range(6)), ('val2017', range(6, 8))):
        put(source, rows, out / split, out / f'annotations/instances_{split}.json', part(source, rows))
    (out / 'annotations/captions_train2017.json').write_text('{}')


def one_json(source: Path, out: Path) -> None:
    """A file of any name beside a folder of photos."""
    put(source, range(8), out / 'photos', out / 'annotations.json', part(source, range(8), 'photos/{}'))


def label_studio_own_photos(source: Path, out: Path) -> None:
    """Names as after the upload, photos as before."""
    put(source, range(8), out / 'images', out / 'result.json', part(source, range(8), 'images/0a1b2c3d-{}'))


def on_windows(source: Path, out: Path) -> None:
    """Folders in capitals, and ids that are not of one kind."""
    content = part(source, range(8))
    for image in content['images']:
        image['id'] = float(image['id'])
    put(source, range(8), out / 'Images', out / 'Annotations/Instances_Default.json', content)


def folders_of_splits(source: Path, out: Path) -> None:
    """Photos of the same names in folders that are named like the files; ids as text and as numbers."""
    for split, rows in (('train', range(6)), ('val', range(6, 8))):
        content = part(source, rows)
        for annotation in content['annotations']:
            annotation['image_id'] = f'{annotation["image_id"]}.0'
        put(source, rows, out / f'a_{split}_set', out / f'annotations/{split}.json', content)
    shutil.copytree(out / 'a_train_set', out / 'a_pseudo_set')


EXPORTS = [roboflow, cvat, datumaro, fiftyone, label_studio, label_studio_server, coco2017, one_json]
EXPORTS += [label_studio_encoded, label_studio_local, lvis, labelme2coco, label_studio_own_photos]
EXPORTS += [on_windows, folders_of_splits]


@pytest.mark.parametrize('export', EXPORTS, ids=lambda function: function.__name__)
def test_an_export_becomes_a_data_root(export, source, tmp_path, capsys):
    out = tmp_path / 'an export'
    export(source, out)
    with pytest.raises(BadInput, match='has no annotations; found .*expected train_all.json') as refused:
        prepare.command(['check', '--data', str(out)])
    way_out = shlex.split(re.search(r'python prepare.py .*', str(refused.value))[0])[2:]
    assert way_out == ['coco', '--data', str(out)]
    prepare.command(way_out)
    following = capsys.readouterr().out.splitlines()[-1]
    assert set(read_competition(out).classes) == set(CLASSES) and len(read_competition(out).classes) == 11
    prepare.command(shlex.split(following)[3:])

    competition = read_competition(out)
    train = read_coco(out, 'train', competition)
    photos = {Path(photo.file_name).name: photo for photo in train.photos}
    assert (out / 'test.json').exists() == (export in (roboflow, datumaro))
    if (out / 'test.json').exists():
        test = {photo.file_name for photo in read_coco(out, 'test', competition).photos}
        labels = read_labels(out / 'test_labels.json', competition).photos
        assert test == {photo.file_name for photo in labels} and len(train.photos) == 6
        photos |= {Path(photo.file_name).name: photo for photo in labels}
    wanted = [
        *read_coco(source, 'train', HOME).photos,
        *read_labels(source / 'test_labels.json', HOME).photos,
    ]
    ids = np.array([competition.classes.index(name) for name in CLASSES])
    assert len(photos) == len(wanted) == 8
    for photo in wanted:
        found = photos[Path(photo.file_name).name]
        assert (out / found.file_name).is_file()
        assert np.array_equal(draw_mask(found), ids[draw_mask(photo)])


def test_photos_of_one_name_in_two_folders_of_a_server(source, tmp_path):
    content = part(source, range(2))
    for n, image in enumerate(content['images']):
        image['file_name'] = f'/srv/{n}/a.jpg'
        put(source, range(n, n + 1), tmp_path / f'images/{n}', tmp_path / 'result.json', content)
        (tmp_path / f'images/{n}/{n:04d}.jpg').rename(tmp_path / f'images/{n}/a.jpg')
    prepare.command(['coco', '--data', str(tmp_path)])
    photos = read_coco(tmp_path, 'train', read_competition(tmp_path)).photos
    assert [photo.file_name for photo in photos] == ['images/0/a.jpg', 'images/1/a.jpg']


def test_photos_of_the_same_names_in_folders_that_do_not_tell(source, tmp_path):
    """A folder of masks may have the names of the photos."""
    for folder in ('labels', 'pictures'):
        put(source, range(8), tmp_path / folder, tmp_path / 'annotations/all.json', part(source, range(8)))
    with pytest.raises(
        BadInput, match='0000.jpg. in labels/ and in pictures/; rename the right one to .*/all'
    ):
        prepare.command(['coco', '--data', str(tmp_path)])
    (tmp_path / 'pictures').rename(tmp_path / 'all')
    prepare.command(['coco', '--data', str(tmp_path)])
    photos = read_coco(tmp_path, 'train', read_competition(tmp_path)).photos
    assert {Path(photo.file_name).parent.name for photo in photos} == {'all'}


def test_names_that_differ_in_case_are_one_class(source, tmp_path):
    content = part(source, range(8))
    content['categories'].append({'id': 99, 'name': 'PAPER'})
    content['annotations'][0]['category_id'] = 99
    put(source, range(8), tmp_path / 'images', tmp_path / 'train.json', content)
    prepare.command(['coco', '--data', str(tmp_path)])
    assert set(read_competition(tmp_path).classes) == set(CLASSES)


@pytest.mark.parametrize(
    ('key', 'message'),
    [
        ('image_id', 'annotation 0: image_id 77 is not among the images, which have ids such as 0; remove'),
        ('category_id', 'annotation 0: category_id 77 is not among the categories, which have ids such'),
    ],
)
def test_an_annotation_of_nothing_is_named_in_its_own_file(source, tmp_path, key, message):
    for split, rows in (('train', range(6)), ('val', range(6, 8))):
        content = part(source, rows)
        if split == 'val':
            content['annotations'][0][key] = 77
        put(source, rows, tmp_path / split, tmp_path / f'annotations/{split}.json', content)
    with pytest.raises(BadInput, match=f'val.json: {message}'):
        prepare.command(['coco', '--data', str(tmp_path)])


@pytest.mark.parametrize('start', ['', '\ufeff'])
def test_tables_as_spreadsheets_write_them(source, tmp_path, start):
    put(source, range(8), tmp_path / 'images', tmp_path / 'train_all.json', part(source, range(8)))
    rows = [f'{name};{"Waste" if n % 2 else "Other"}' for n, name in enumerate(CLASSES[1:])]
    text = start + '\r\n'.join(['"Category";"Class"', *rows, ';', ''])
    (tmp_path / 'table.csv').write_bytes(text.encode())
    prepare.command(['competition', '--data', str(tmp_path), '--table', str(tmp_path / 'table.csv')])
    assert read_competition(tmp_path).classes == ('Background', 'Other', 'Waste')
    (tmp_path / 'table.csv').write_text('category,class\ncan,Waste\ncan,Other\n')
    with pytest.raises(BadInput, match="line 3: 'can' has the classes 'Waste' and 'Other'; expected one"):
        prepare.command(
            ['competition', '--data', str(tmp_path), '--table', str(tmp_path / 'table.csv')] + ['--overwrite']
        )


def test_an_archive_is_to_be_unpacked(tmp_path):
    (tmp_path / 'export.zip').write_bytes(b'PK')
    with pytest.raises(BadInput, match='found export.zip, .*unpack it there'):
        prepare.command(['coco', '--data', str(tmp_path)])
    with pytest.raises(BadInput, match='is a file, expected the folder of an export, unpacked'):
        prepare.command(['coco', '--data', str(tmp_path / 'export.zip')])


def test_a_train_json_whose_photos_lie_in_a_folder(source, tmp_path):
    put(source, range(8), tmp_path / 'images', tmp_path / 'train.json', part(source, range(8)))
    (tmp_path / 'package.json').write_text('[]')
    prepare.command(['coco', '--data', str(tmp_path)])
    assert len(read_coco(tmp_path, 'train', read_competition(tmp_path)).photos) == 8
    for path in (tmp_path / 'train.json', tmp_path / 'package.json'):
        path.unlink()
    with pytest.raises(BadInput, match='is a data root already'):
        prepare.command(['coco', '--data', str(tmp_path)])


def test_a_damaged_file_beside_a_whole_one_is_not_passed_over(source, tmp_path):
    cvat(source, tmp_path)
    (tmp_path / 'annotations/instances_more.json').write_text('{"images": [')
    with pytest.raises(BadInput, match='instances_more.json: not JSON, or cut off'):
        prepare.command(['coco', '--data', str(tmp_path)])


def test_what_there_was_stays(source, tmp_path):
    cvat(source, tmp_path)
    prepare.command(['coco', '--data', str(tmp_path)])
    before = (tmp_path / 'train_all.json').read_bytes()
    (tmp_path / 'competition.yaml').write_text('crowds: objects\n')
    with pytest.raises(BadInput, match='train_all.json: already exists; --overwrite replaces it'):
        prepare.command(['coco', '--data', str(tmp_path)])
    prepare.command(['coco', '--data', str(tmp_path), '--overwrite'])
    assert (tmp_path / 'train_all.json').read_bytes() == before
    assert read_competition(tmp_path).crowds == 'objects'


@pytest.mark.parametrize(
    ('damage', 'message'),
    [
        (
            lambda out: shutil.rmtree(out / 'images'),
            r"found its photo '0000.jpg' in none of .*; put the photos",
        ),
        (lambda out: (out / 'annotations/instances_default.json').unlink(), 'has no COCO file; expected one'),
        (
            lambda out: (out / 'annotations/instances_default.json').write_text('{"images": 3}'),
            'expected a COCO',
        ),
        (
            lambda out: (out / 'annotations/instances_default.json').write_text(
                '{"shapes": 3, "imagePath": 1}'
            ),
            'LabelMe',
        ),
        (
            lambda out: (out / 'annotations/instances_default.json').write_text(
                '{"images": [{"id": 1}], "categories": []}'
            ),
            r"images\[0\] lacks the key 'file_name'",
        ),
        (
            lambda out: (out / 'annotations').rename(out / 'images/annotations'),
            'has no COCO file; found images/annotations/inst.*; give --data .*images',
        ),
        (
            lambda out: (out / 'annotations/instances_default.json').write_text(
                json.dumps({'images': [{'id': 1, 'file_name': 'x' * 500}], 'categories': []})
            ),
            'found its photo .* in none of',
        ),
        (
            lambda out: (out / 'annotations/instances_default.json').rename(
                out / 'annotations/instances_test.json'
            ),
            'is for the test, by its name; found no file for training',
        ),
    ],
    ids=[
        'no photos',
        'no file',
        'no COCO',
        'LabelMe',
        'no name',
        'a folder deeper',
        'a long name',
        'test alone',
    ],
)
def test_an_export_that_is_refused(damage, message, source, tmp_path):
    cvat(source, tmp_path)
    damage(tmp_path)
    with pytest.raises(BadInput, match=message):
        prepare.command(['coco', '--data', str(tmp_path)])
    assert not list(tmp_path.glob('*.json')) and not (tmp_path / 'competition.yaml').exists()


@pytest.mark.parametrize(
    ('names', 'message'),
    [
        (['train.json'], 'found train.json without val.json, .*: mv {root}/train.json {root}/train_all.json'),
        (
            ['data.yaml', 'train/labels/a.txt'],
            'python prepare.py yolo --yaml {root}/data.yaml --out {root}_coco',
        ),
        (['mine/train_all.json'], 'found mine/train_all.json, .*; give --data {root}/mine'),
        (['a/train/_annotations.coco.json'], 'found a/train/_annot.*json, .*; give --data {root}/a'),
        (['a.txt'], 'has no annotations; expected train_all.json, or train.json .*; docs/data.md'),
    ],
    ids=['train alone', 'YOLO', 'a folder deeper', 'an export deeper', 'nothing'],
)
def test_a_folder_without_annotations(names, message, tmp_path):
    root = tmp_path / 'set'
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text('{}')
    with pytest.raises(BadInput, match=message.format(root=root)):
        prepare.command(['check', '--data', str(root)])


def test_a_table_gives_the_categories_their_classes(tmp_path):
    root = write_set(tmp_path / 'd', train=2, test=1, side=64)
    text = (root / 'train_all.json').read_text()
    expected = [draw_mask(photo) for photo in read_coco(root, 'train', HOME).photos]
    (root / 'train_all.json').write_text(text.replace('"Paper"', '"Newspaper"').replace('"Metal"', '"Tin"'))
    table = tmp_path / 'table.csv'
    rows = [f'{name},{name}' for name in CLASSES[1:] if name not in ('Paper', 'Metal')]
    table.write_text('\n'.join(['\ufeffcategory,class', 'Newspaper,Paper', 'Tin,Metal', *rows]))
    prepare.command(['competition', '--data', str(root), '--table', str(table)])
    competition = read_competition(root)
    assert competition.classes == CLASSES
    masks = [draw_mask(photo) for photo in read_coco(root, 'train', competition).photos]
    assert all(map(np.array_equal, masks, expected))
    table.write_text(table.read_text().replace('Tin,Metal', 'Tin,Steel'))
    prepare.command(['competition', '--data', str(root), '--table', str(table), '--overwrite'])
    assert read_competition(root).classes[:3] == ('Background', 'Paper', 'Steel')
    for text in ('category,class\n', ''):
        table.write_text(text)
        with pytest.raises(BadInput, match='table.csv: has no rows'):
            prepare.command(['competition', '--data', str(root), '--table', str(table), '--overwrite'])
    table.write_text('category,class\nTin,\n')
    with pytest.raises(BadInput, match='table.csv: line 2: expected a category and its class'):
        prepare.command(['competition', '--data', str(root), '--table', str(table), '--overwrite'])


def test_a_data_root_without_test_photos(tmp_path):
    (tmp_path / 'train_all.json').write_text('{}')
    with pytest.raises(BadInput, match='has no test photos; expected test.json; docs/data.md says'):
        annotation_files(tmp_path, 'test')


def test_a_data_root_is_no_export(tmp_path):
    root = write_set(tmp_path / 'd', train=2, test=1, side=64)
    with pytest.raises(BadInput, match='is a data root already'):
        prepare.command(['coco', '--data', str(root)])


def test_a_file_in_place_of_its_folder(tmp_path):
    (tmp_path / 'train_all.json').write_text('{}')
    with pytest.raises(BadInput, match=f'is a file, expected the folder .*; give --data {tmp_path}$'):
        prepare.command(['check', '--data', str(tmp_path / 'train_all.json')])
