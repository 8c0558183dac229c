"""CSVs of run lengths: what is written, accepted and refused, against pandas, pycocotools and naive loops."""

import json
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from pycocotools import mask as rle_codec

import ensemble
from config import HOME, Competition, Submission, write_competition
from submission import (
    MaskFormat,
    main,
    mask_format,
    name_images,
    open_probs,
    read_format,
    read_test_sizes,
)
from utils.errors import BadInput

SIZES = {'a/x_1.png': (30, 40), 'b/y.png': (17, 9), 'b/z.jpg': (64, 50)}
OBJECTS = ('can', 'glass bottle', 'can_lid')
JOINED = {'ImageId_ClassId': 'image_class', 'EncodedPixels': 'mask'}
WAYS = {
    'usual': {},
    'along the rows': {'order': 'row', 'class_names': 'id', 'image_names': 'stem'},
    'from 0, -1': {'first': 0, 'empty': '-1', 'image_names': 'name'},
    'joined': {'columns': JOINED, 'image_names': 'stem'},
    'joined by id, from 0': {'columns': JOINED, 'class_names': 'id', 'order': 'row', 'first': 0},
    'by number': {'class_names': 'number'},
    'mask first': {'columns': {'rle': 'mask', 'class': 'class', 'img': 'image'}, 'image_names': 'name'},
}


def make_form(task: str = 'multilabel', sizes=SIZES, objects=OBJECTS, **how) -> MaskFormat:
    background = () if task == 'multilabel' else ('Background',)
    values = {'classes': (*background, *objects), 'task': task, 'score_size': 'own'}
    return mask_format(Competition(**values, submission=Submission(**how)), sizes)


def random_masks(form: MaskFormat, seed: int = 0) -> dict[str, np.ndarray]:
    """Draw masks of a few rectangles; the last class is in the first image alone."""
    rng = np.random.default_rng(seed)
    masks = {}
    for number, image_id in enumerate(form.sizes):
        mask = np.zeros(form.shape(image_id), np.uint8)
        for k in list(form.competition.object_ids)[: None if number == 0 else -1]:
            y, x = (rng.integers(0, side - 1, 2) for side in mask.shape[-2:])
            part = (slice(min(y), max(y) + 2), slice(min(x), max(x) + 2))
            if mask.ndim == 3:
                mask[k][part] = 1
            else:
                mask[part] = k
        masks[image_id] = mask
    return masks


def write_csv(path: Path, form: MaskFormat, masks: dict[str, np.ndarray]) -> Path:
    with form.writer(path) as writer:
        for image_id, mask in masks.items():
            writer.write(image_id, mask)
    return path


def write_root(folder: Path, form: MaskFormat) -> Path:
    folder.mkdir(exist_ok=True)
    images = [{'file_name': name, 'height': h, 'width': w} for name, (h, w) in form.sizes.items()]
    (folder / 'test.json').write_text(json.dumps({'images': images}))
    write_competition(folder, form.competition)
    return folder


def naive_text(mask: np.ndarray, how: Submission) -> str:
    """Encode pixel by pixel."""
    numbers: list[int] = []
    before = 0
    for index, pixel in enumerate(mask.ravel('F' if how.order == 'column' else 'C').tolist()):
        if pixel and not before:
            numbers += [index + how.first, 0]
        if pixel:
            numbers[-1] += 1
        before = pixel
    return ' '.join(map(str, numbers)) or how.empty


def planes_of(mask: np.ndarray, form: MaskFormat) -> list[np.ndarray]:
    return [mask[k] if mask.ndim == 3 else mask == k for k in form.competition.object_ids]


@pytest.mark.parametrize('task', ['multiclass', 'multilabel'])
@pytest.mark.parametrize('way', WAYS)
def test_masks_are_written_as_a_loop_does_and_come_back(way, task, tmp_path):
    form = make_form(task, **WAYS[way])
    how, masks = form.competition.rle, random_masks(form)
    path = write_csv(tmp_path / 'a.csv', form, masks)
    names = {'path': str, 'name': lambda i: Path(i).name, 'stem': lambda i: Path(i).stem}[how.image_names]
    lines = [','.join(how.columns)]
    for image_id, mask in masks.items():
        for k, plane in zip(form.competition.object_ids, planes_of(mask, form), strict=True):
            numbers = {'id': str(k), 'number': str(k + (task == 'multilabel'))}
            class_name = numbers.get(how.class_names, form.competition.classes[k])
            texts = {'image': names(image_id), 'class': class_name, 'mask': naive_text(plane, how)}
            texts['image_class'] = f'{texts["image"]}_{class_name}'
            lines.append(','.join(texts[role] for role in how.columns.values()))
    assert path.read_text() == '\n'.join([*lines, ''])
    pixels = form.check(path)
    expected = [sum((planes_of(mask, form)[n] > 0).sum() for mask in masks.values()) for n in range(3)]
    assert pixels[form.competition.object_ids.start :].tolist() == expected
    if task == 'multiclass':
        assert pixels.sum() == form.total_pixels == sum(h * w for h, w in SIZES.values())
    with form.reader(path) as reader:
        assert reader.image_ids == [*SIZES] and 'none.png' not in reader
        for image_id in reversed(SIZES):
            assert image_id in reader
            mask = reader.read(image_id)
            assert mask.dtype == np.uint8 and mask.flags.c_contiguous
            np.testing.assert_array_equal(mask, masks[image_id])


def test_pandas_and_pycocotools_read_the_same(tmp_path):
    pandas = pytest.importorskip('pandas')
    form = make_form()
    masks = random_masks(form)
    frame = pandas.read_csv(write_csv(tmp_path / 'a.csv', form, masks))
    assert frame['rle'].isna().sum() == 2  # an empty field
    for row in frame.fillna('').itertuples():
        counts, place = [], 0
        for start, length in np.array(row.rle.split(), int).reshape(-1, 2):
            counts += [int(start) - 1 - place, int(length)]
            place = int(start) - 1 + int(length)
        height, width = SIZES[row.image_id]
        encoded = {'size': [height, width], 'counts': [*counts, height * width - place]}
        decoded = rle_codec.decode(rle_codec.frPyObjects(encoded, height, width))
        np.testing.assert_array_equal(decoded, masks[row.image_id][OBJECTS.index(row[2])])


@pytest.mark.parametrize('task', ['multiclass', 'multilabel'])
def test_one_row_an_image(task, tmp_path):
    form = make_form(task, objects=('cell',), columns={'ID': 'image', 'rle': 'mask'}, image_names='stem')
    masks = random_masks(form)
    masks['b/z.jpg'][:] = 0
    path = write_csv(tmp_path / 'a.csv', form, masks)
    lines = path.read_text().splitlines()
    assert lines[0] == 'ID,rle' and len(lines) == 4 and lines[3] == 'z,'
    assert form.check(path)[-1] == sum(mask.sum() for mask in masks.values())
    with form.reader(path) as reader:
        for image_id, mask in masks.items():
            np.testing.assert_array_equal(reader.read(image_id), mask)


def test_squares_are_scored_at_their_side(tmp_path):
    form = mask_format(
        Competition(classes=('Background', 'a'), score_size=256, submission=Submission()),
        dict.fromkeys('xy', (0, 0)),
    )
    assert form.size('x') == form.shape('x') == (256, 256) and form.total_pixels == 2 * 65_536
    masks = {image_id: np.random.default_rng(0).integers(0, 2, (256, 256), np.uint8) for image_id in 'xy'}
    path = write_csv(tmp_path / 'a.csv', form, masks)
    assert form.check(path).tolist() == [sum((mask == k).sum() for mask in masks.values()) for k in (0, 1)]


# --- what check refuses, and offers to rewrite --------------------------------------------------------------

TINY = {'a.png': (3, 4), 'b.png': (2, 2)}
HEAD = 'image_id,class,rle\n'
ROWS = ['a.png,can,1 2 5 1\n', 'a.png,cup,\n', 'b.png,can,4 1\n', 'b.png,cup,1 3\n']
GOOD = HEAD + ''.join(ROWS)
FAULTS = {
    'empty file': ('', "is empty; expected the header 'image_id,class,rle'", False),
    'another header': (GOOD.replace('rle', 'runs', 1), "found the header 'image_id,class,runs'", False),
    'home header': ('image_id,PredictionString\na.png,0\n', "found the header 'image_id,Pred", False),
    'header alone': (HEAD, 'no rows after the header', False),
    'byte order mark': ('\ufeff' + GOOD, 'line 1: begins with a byte order mark', True),
    'windows': (GOOD.replace('\n', '\r\n'), 'line 1: ends as on Windows', True),
    'windows in a row': (GOOD[:-1] + '\r\n', 'line 5: ends as on Windows', True),
    'no newline at the end': (GOOD[:-1], 'line 5: does not end with a newline', True),
    'an empty line': (GOOD + '\n', 'line 6: is empty', True),
    'missing image': (HEAD + ''.join(ROWS[:2]), "1 of 2 test images have no row, such as 'b.png'", False),
    'missing class': (HEAD + ''.join(ROWS[:3]), "image 'b.png', class 'cup': has no row", False),
    'missing in the middle': (HEAD + ''.join(ROWS[1:]), "image 'a.png', class 'can': has no row", False),
    'twice': (GOOD + ROWS[3], "line 6: image 'b.png', class 'cup' is listed twice, first in line 5", False),
    'unknown image': (GOOD.replace('b.png', 'c.png'), "line 4: image 'c.png' is none of the 2 images", False),
    'unknown class': (GOOD.replace('cup', 'mug', 1), "line 3: class 'mug' is none of the .*can, cup", False),
    'wrong order': (HEAD + ''.join(ROWS[::-1]), "line 2: found image 'b.png', .*expected .*a.png", True),
    'order of classes': (HEAD + ''.join([*ROWS[1::-1], *ROWS[2:]]), 'classes by their ids', True),
    'spelling of a class': (GOOD.replace('cup', 'Cup', 1), "line 3: class is 'Cup', another spelling", True),
    'spelling of an image': (GOOD.replace('a.png', './a.png', 1), 'line 2: image_id is .* spelling', True),
    'quotes': (GOOD.replace('1 2 5 1', '"1 2 5 1"'), 'line 2: has quotes around a field', True),
    'two spaces': (GOOD.replace('1 2 5 1', '1 2  5 1'), "image 'a.png', class 'can': .*one space", True),
    'a space behind': (GOOD.replace('1 2 5 1', '1 2 5 1 '), 'line 2: .*one space', True),
    'a zero in front': (GOOD.replace('1 2 5 1', '01 2 5 1'), 'line 2: .*zero in front', True),
    'another empty mask': (GOOD.replace('cup,\n', 'cup,-1\n', 1), "line 3: .*found '-1' for a mask", True),
    'a float': (GOOD.replace('1 2 5 1', '1.0 2'), "line 2: .*number 1 is '1.0'", False),
    'odd': (GOOD.replace('1 2 5 1', '1 2 5'), 'line 2: .*has 3 numbers; expected pairs', False),
    'from 0': (GOOD.replace('1 2 5 1', '0 2 5 1'), 'begins before the first pixel, 1; is it first: 0', False),
    'outside': (GOOD.replace('4 1', '4 2'), r'line 4: .*goes beyond the last pixel, 4, of 2x2', False),
    'descending': (GOOD.replace('1 2 5 1', '5 1 1 2'), 'line 2: .*expected ascending starts', False),
    'overlapping runs': (GOOD.replace('1 2 5 1', '1 2 2 1'), r'line 2: .*run 2 \(2 1\) overlaps', False),
    'no length': (GOOD.replace('1 2 5 1', '1 0'), 'line 2: .*has no pixel', False),
    'too few fields': (HEAD + 'a.png,can\n', 'line 2: has 2 fields; expected 3', False),
    'an open quote': (HEAD + '"a.png,can,\n', 'line 2: has a quote that does not end', False),
    'classes that overlap': (
        GOOD.replace('1 3', '3 2'),
        "line 5: image 'b.png', class 'cup': overlaps class 'can' of line 4 in row 1, column 1.*multilabel",
        False,
    ),
}  # fmt: skip


@pytest.mark.parametrize('fault', FAULTS)
def test_each_fault_has_its_line(fault, tmp_path, capsys):
    content, message, rewritable = FAULTS[fault]
    form = make_form('multiclass', TINY, ('can', 'cup'))
    data, path = write_root(tmp_path / 'data', form), tmp_path / 'faulty.csv'
    path.write_bytes(content.encode())
    with pytest.raises(BadInput, match=message) as error:
        main(['check', str(path), '--data', str(data)])
    line, _, command = str(error.value).partition('; to rewrite it: python ensemble.py ')
    assert line.startswith(f'{path}: ') and '\n' not in line and bool(command) == rewritable
    if rewritable:
        assert ensemble.main(command.split(' ')) == 0
        assert (tmp_path / 'faulty_rewritten.csv').read_text() == GOOD


def test_check_says_ok_and_shows_shares(tmp_path, capsys):
    form = make_form('multiclass', TINY, ('can', 'cup'))
    data, path = write_root(tmp_path / 'data', form), tmp_path / 'a.csv'
    path.write_text(GOOD)
    assert main(['check', str(path), '--data', str(data)]) == 0
    out = capsys.readouterr().out.splitlines()
    assert out == [f'{path}: 2 images', f'Background  {9 / 16:>7.3%}', f'can         {4 / 16:>7.3%}',
                   f'cup         {3 / 16:>7.3%}', 'ok']  # fmt: skip
    other = tmp_path / 'other.csv'
    other.write_text(HEAD + ''.join(reversed(ROWS)).replace('1 2 5 1', '1 3 5 1'))
    assert main(['check', str(path), '--data', str(data), '--against', str(other)]) == 0
    out = capsys.readouterr().out
    assert f'{1 / 12 / 2:.3%} of the pixels differ' in out and 'a.png: 8.33% differ' in out
    assert f'can         {1 / 5:>7.2%} differ, covers {5 / 16:>7.3%} there' in out


def test_planes_are_compared_and_the_worst_images_listed(tmp_path, capsys):
    sizes = {f'{n}.png': (4 if n == 0 else 2, 4) for n in range(7)}
    form = make_form('multilabel', sizes, ('can', 'cup', 'mug'))
    data = write_root(tmp_path / 'data', form)
    masks = {image_id: np.zeros(form.shape(image_id), np.uint8) for image_id in sizes}
    path = write_csv(tmp_path / 'a.csv', form, masks)
    for n, mask in enumerate(masks.values()):
        mask[0].flat[:n] = mask[1].flat[:n] = 1  # in n of 8 pixels, two planes
    other = write_csv(tmp_path / 'b.csv', form, masks)
    assert main(['check', str(path), '--data', str(data), '--against', str(other)]) == 0
    out = capsys.readouterr().out.splitlines()
    worst = [f'{n}.png: {n / 8:.2%} differ' for n in (6, 5, 4, 3, 2)]
    assert out == [
        f'{path}: 7 images', 'can   0.000%', 'cup   0.000%', 'mug   0.000%',
        f'against {other}: {21 / 8 / 7:.3%} of the pixels differ',
        *(f'{name}  100.00% differ, covers {21 / 64:.3%} there' for name in ('can', 'cup')),
        'mug  in neither, covers  0.000% there', *worst, 'ok',
    ]  # fmt: skip


def test_classes_may_overlap_in_multilabel_tasks(tmp_path):
    form = make_form('multilabel', TINY, ('can', 'cup'))
    path = tmp_path / 'a.csv'
    path.write_text(GOOD.replace('1 3', '1 4'))
    assert form.check(path).tolist() == [4, 4]
    with form.reader(path) as reader:
        assert reader.read('b.png').tolist() == [[[0, 0], [0, 1]], [[1, 1], [1, 1]]]


def test_overlap_is_refused_when_it_is_read(tmp_path):
    form = make_form('multiclass', TINY, ('can', 'cup'))
    path = tmp_path / 'a.csv'
    path.write_text(GOOD.replace('1 3', '3 2'))
    with form.reader(path) as reader, pytest.raises(BadInput, match='in row 1, column 1'):
        reader.read('b.png')


VARIANTS = {
    'any order': lambda rows: [HEAD, *rows[::-1]],
    'mark and windows': lambda rows: ['\ufeff' + HEAD[:-1] + '\r\n', *(row[:-1] + '\r\n' for row in rows)],
    'other columns': lambda rows: [',RLE,score,Class,Image ID\n'] + [
        f'{n},{text},0.5,{name},{image}\n'
        for n, (image, name, text) in enumerate(row[:-1].split(',') for row in rows)
    ],
    'quoted, -1': lambda rows: [HEAD] + [
        f'"{image}","{name}","{text or -1}"\n' for image, name, text in (row[:-1].split(',') for row in rows)
    ],
    'semicolons and spaces': lambda rows: [row.replace(',', ' ; ') for row in [HEAD, *rows]],
    'no newline': lambda rows: [HEAD, *rows[:-1], rows[-1][:-1]],
}  # fmt: skip


@pytest.mark.parametrize('variant', VARIANTS)
def test_csvs_of_other_tools_are_read(variant, tmp_path):
    form = make_form('multiclass', TINY, ('can', 'cup'))
    path = tmp_path / 'theirs.csv'
    path.write_bytes(''.join(VARIANTS[variant](ROWS)).encode())
    with form.reader(path) as reader:
        assert sorted(reader.image_ids) == [*TINY]
        assert reader.read('a.png').tolist() == [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]]
        assert reader.read('b.png').tolist() == [[2, 2], [2, 1]]
    with pytest.raises(BadInput):
        form.check(path)


def test_ids_as_pandas_writes_floats(tmp_path):
    form = make_form('multiclass', TINY, ('can', 'cup'), class_names='id')
    path = tmp_path / 'a.csv'
    path.write_text(GOOD.replace('can', '1.0').replace('cup', '02'))
    with pytest.raises(BadInput, match="class '02' is none of the classes, 1, 2"), form.reader(path):
        pass
    path.write_text(GOOD.replace('can', '1.0').replace('cup', '2'))
    with form.reader(path) as reader:
        assert reader.read('b.png').tolist() == [[2, 2], [2, 1]]


def test_joined_names_with_the_same_sign(tmp_path):
    sizes = {'a_b.png': (1, 1), 'a.png': (1, 1)}
    form = make_form('multilabel', sizes, ('c', 'b_c'), columns=JOINED, image_names='stem')
    path = tmp_path / 'a.csv'
    path.write_text('ImageId_ClassId,EncodedPixels\na_b_b_c,1 1\na_d,\n')
    with (
        pytest.raises(BadInput, match="line 3: 'a_d' is no image and class, such as 'a_b_c'"),
        form.reader(path),
    ):
        pass
    path.write_text('ImageId_ClassId,EncodedPixels\na_b_c,1 1\n')
    with pytest.raises(BadInput, match="'a_b_c' could be several of them"), form.reader(path):
        pass


def test_the_file_changes_while_it_is_read(tmp_path):
    form = make_form('multiclass', TINY, ('can', 'cup'))
    path = tmp_path / 'a.csv'
    path.write_text(GOOD)
    with form.reader(path) as reader:
        path.write_text(GOOD.replace('b.png,cup', 'a.png,cup'))
        with pytest.raises(BadInput, match=r"line 5: image 'b\.png', class 'cup': the file changed"):
            reader.read('b.png')


@pytest.mark.parametrize(('task', 'mask'), [
    ('multiclass', np.zeros((4, 3), np.uint8)), ('multiclass', np.full((3, 4), 3, np.uint8)),
    ('multilabel', np.zeros((3, 4), np.uint8)), ('multilabel', np.full((2, 3, 4), 255, np.uint8)),
    ('multiclass', np.zeros((3, 4))),
])  # fmt: skip
def test_only_masks_are_written_and_what_was_there_stays(task, mask, tmp_path):
    form, path = make_form(task, TINY, ('can', 'cup')), tmp_path / 'a.csv'
    path.write_text('before')
    with pytest.raises(ValueError, match='mask'), form.writer(path) as writer:
        writer.write('a.png', mask)
    assert path.read_text() == 'before' and list(tmp_path.iterdir()) == [path]


def test_names_of_images():
    names = ['a/x.png', 'b\\y.z.jpg']
    assert name_images(names, 'path') == dict(zip(names, names, strict=True))
    assert [*name_images(names, 'name').values()] == ['x.png', 'y.z.jpg']
    assert [*name_images(names, 'stem').values()] == ['x', 'y.z']
    with pytest.raises(
        BadInput, match="'a/x.png' and 'b/x.jpg' are both 'x' in the CSV; write image_names: path"
    ):
        name_images(['a/x.png', 'b/x.jpg'], 'stem')


def test_sizes_of_test_photos(tmp_path):
    form = make_form('multiclass', TINY, ('can', 'cup'))
    root = write_root(tmp_path, form)
    assert read_test_sizes(root, form.competition) == TINY
    (root / 'test.json').write_text('{"images": [{"file_name": "a.png", "height": "3"}]}')
    with pytest.raises(BadInput, match=r"test\.json: image 'a\.png' has no height and width"):
        read_test_sizes(root, form.competition)
    assert read_test_sizes(root, Competition()) == {'a.png': (3, 0)}
    (root / 'test.json').write_text('{"images": [{"file_name": "a.png", "height": 1, "width": "1"}]}')
    assert read_test_sizes(root, form.competition) == {'a.png': (1, 1)}
    assert read_format(root, HOME, required=False).sizes == {'a.png': (1, 1)}
    (root / 'test.json').unlink()
    assert read_format(root, HOME, required=False).sizes == {}
    for competition, required in ((HOME, True), (form.competition, False)):
        with pytest.raises(BadInput, match=r'test\.json: cannot be read'):
            read_format(root, competition, *([] if required else [False]))


def test_probabilities_of_photos_of_different_sizes(tmp_path):
    form = make_form('multilabel', TINY, ('can', 'cup'))
    path = write_csv(tmp_path / 'a.csv', form, random_masks(form))
    probs = np.arange(2 * (12 + 4), dtype=np.uint8)
    np.save(tmp_path / 'a_probs.npy', probs)
    with form.reader(path) as reader:
        ragged = open_probs(reader, form)
    assert ragged[1].shape == (2, 2, 2) and ragged[1].ravel().tolist() == [*range(24, 32)]


def test_a_large_photo(tmp_path):
    form = make_form(
        'multiclass', {'a.png': (10_000, 10_000)}, ('road',), columns={'id': 'image', 'rle': 'mask'}
    )
    mask = np.zeros((10_000, 10_000), np.uint8)
    mask[4000:6000, 9000:9500] = 1
    path = write_csv(tmp_path / 'a.csv', form, {'a.png': mask})
    assert form.check(path).tolist() == [99_000_000, 1_000_000]
    with form.reader(path) as reader:
        assert (reader.read('a.png')[3999:6001, 8999:9501] == mask[3999:6001, 8999:9501]).all()


def test_every_way_is_its_own(tmp_path):
    """No two conventions write the same text for a mask that is not symmetric."""
    mask = np.zeros((1, 3, 4), np.uint8)
    mask[0, 0, 1:3] = 1
    texts = set()
    for order, first in product(('column', 'row'), (0, 1)):
        form = make_form('multilabel', {'a': (3, 4)}, ('can',), order=order, first=first)
        texts.add(write_csv(tmp_path / 'a.csv', form, {'a': mask}).read_text())
    assert len(texts) == 4
