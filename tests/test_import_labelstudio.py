"""Label Studio's JSON export becomes a data root; its brush is decoded as an independent decoder does."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import prepare
from config import read_competition
from data.coco import draw_truth, read_coco
from data.import_labelstudio import unpack_runs
from utils.errors import BadInput

HEIGHT, WIDTH = 40, 50
NAMES = ('label', 'image')  # of the tags


def bits_of(value: int, width: int) -> list[int]:
    return [value >> shift & 1 for shift in range(width - 1, -1, -1)]


def pack_runs(values: np.ndarray, rng: np.random.Generator) -> list[int]:
    """Encode bytes as rle-pack describes it; runs and values one by one are chosen at random."""
    widths = [3, 4, 8, 16]
    bits = (
        bits_of(len(values), 32) + bits_of(7, 5) + [bit for width in widths for bit in bits_of(width - 1, 4)]
    )
    done = 0
    while done < len(values):
        same = 1
        while done + same < len(values) and values[done + same] == values[done] and same < 1 << 16:
            same += 1
        is_run = same > 1 or rng.uniform() < 0.5
        length = same if is_run else int(rng.integers(1, min(40, len(values) - done) + 1))
        index = next(k for k, width in enumerate(widths) if length <= 1 << width)
        bits += [int(is_run), *bits_of(index, 2), *bits_of(length - 1, widths[index])]
        for value in values[done : done + (1 if is_run else length)]:
            bits += bits_of(int(value), 8)
        done += length
    bits += [0] * (-len(bits) % 8)
    return np.packbits(np.array(bits, np.uint8)).tolist()


def slow_decoder(content: list[int]) -> list[int]:
    """Decode rle-pack bit by bit, from its description alone."""
    stream: Iterator[int] = iter([byte >> shift & 1 for byte in content for shift in range(7, -1, -1)])

    def take(count: int) -> int:
        number = 0
        for _ in range(count):
            number = 2 * number + next(stream)
        return number

    total, width = take(32), take(5) + 1
    widths = [take(4) + 1 for _ in range(4)]
    values: list[int] = []
    while len(values) < total:
        if take(1):
            count = take(widths[take(2)]) + 1
            values += [take(width)] * count
        else:
            values += [take(width) for _ in range(take(widths[take(2)]) + 1)]
    return values


@pytest.mark.parametrize('seed', range(12))
def test_the_brush_is_decoded_exactly(seed):
    rng = np.random.default_rng(seed)
    values = np.repeat(rng.integers(0, 256, 60), rng.integers(1, 400, 60)).astype(np.uint8)
    values = values[: int(rng.integers(1, len(values)))]
    content = pack_runs(values, rng)
    assert slow_decoder(content) == values.tolist()
    np.testing.assert_array_equal(unpack_runs('x', bytes(content), len(values)), values)


def test_the_head_of_a_real_export():
    """The first bytes of a mask of 3332x2527 pixels, of a public data set: a run of 65,536 zeros."""
    content = bytes([2, 1, 233, 240, 57, 27, 255, 255, 255, 0, 255, 255, 224, 31])
    with pytest.raises(BadInput, match='is cut off, after 14 bytes'):
        unpack_runs('x', content, 3332 * 2527 * 4)
    with pytest.raises(BadInput, match='has 33679856 values of 8 bits, expected 4 of 8'):
        unpack_runs('x', content, 4)


def result(value: dict, kind: str = 'polygonlabels', n: int = 0, **values: object) -> dict:
    size = {'original_width': WIDTH, 'original_height': HEIGHT, 'image_rotation': 0}
    return {
        **size,
        'id': f'r{n}',
        'type': kind,
        'from_name': NAMES[0],
        'to_name': NAMES[1],
        'value': value,
    } | values


def polygon(label: str, *points: tuple[float, float]) -> dict:
    """Return a value whose points are in percent."""
    return {'points': [[100 * x / WIDTH, 100 * y / HEIGHT] for x, y in points], 'polygonlabels': [label]}


def box(left: int, top: int, right: int, bottom: int) -> list[tuple[float, float]]:
    return [(left, top), (right, top), (right, bottom), (left, bottom)]


def brush(label: str, mask: np.ndarray) -> dict:
    pixels = np.zeros((*mask.shape, 4), np.uint8)
    pixels[mask] = (70, 80, 90, 255)
    rle = pack_runs(pixels.ravel(), np.random.default_rng(0))
    return {'format': 'rle', 'rle': rle, 'brushlabels': [label]}


def task(n: int, image: str, results: list[dict], **values: object) -> dict:
    return {'id': n, 'data': {'image': image}, 'annotations': [{'id': n, 'result': results}]} | values


def write(root: Path, tasks: list[dict] | dict, *photos: str) -> list[str]:
    for name in photos or ('a.png',):
        (root / 'photos' / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (WIDTH, HEIGHT), (len(name),) * 3).save(root / 'photos' / name)
    (root / 'project.json').write_text(json.dumps(tasks))
    places = ['--photos', str(root / 'photos'), '--out', str(root / 'out')]
    return ['label-studio', '--json', str(root / 'project.json'), *places]


def imported(root: Path) -> dict[str, np.ndarray]:
    competition = read_competition(root / 'out')
    photos = read_coco(root / 'out', 'train', competition).photos
    return {photo.file_name: draw_truth(photo, competition) for photo in photos}


def rectangle(left: int, top: int, right: int, bottom: int) -> np.ndarray:
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    mask[top:bottom, left:right] = 1
    return mask


def test_polygons_and_brush(tmp_path, capsys):
    mask = np.random.default_rng(1).uniform(size=(HEIGHT, WIDTH)) < 0.3
    mask[:, :20] = False
    choices = result({'choices': ['good']}, 'choices', 5)
    results = [
        result(polygon('can', *box(2, 3, 12, 9))),
        result(brush('bag', mask), 'brushlabels', 1),
        choices,
    ]
    second = {'id': 9, 'result': [], 'was_cancelled': True}
    tasks = [task(1, '/data/upload/1/a.png', results), task(2, 'b.png', []), task(3, 'c.png', results)]
    tasks[0]['annotations'].insert(0, second)
    tasks[2]['annotations'] = []
    prepare.command(write(tmp_path, tasks, 'a.png', 'b.png', 'c.png'))
    masks = imported(tmp_path)
    assert list(masks) == ['a.png', 'b.png'] and not masks['b.png'].any()
    np.testing.assert_array_equal(masks['a.png'], mask + 2 * rectangle(2, 3, 12, 9))
    assert read_competition(tmp_path / 'out').classes == ('Background', 'bag', 'can')
    out = capsys.readouterr().out
    assert (
        'left out: 1 (a task without an annotation)' in out
        and 'takes them as photos without objects): 1' in out
    )


def test_regions_that_overlap_and_labels_apart(tmp_path):
    """New versions may write a polygon and its labels as two results of one id; one may have two labels."""
    bare = polygon('', *box(2, 3, 30, 20))
    labels = {'points': bare['points'], 'labels': ['can', 'metal']}
    del bare['polygonlabels']
    results = [
        result(bare, 'polygon'),
        result(labels, 'labels'),
        result(polygon('lid', *box(5, 3, 9, 9)), n=1),
    ]
    prepare.command(write(tmp_path, [task(1, 'a.png', results)]))
    competition = read_competition(tmp_path / 'out')
    assert competition.task == 'multilabel' and competition.classes == ('can', 'lid', 'metal')
    whole = rectangle(2, 3, 30, 20)
    np.testing.assert_array_equal(imported(tmp_path)['a.png'], [whole, rectangle(5, 3, 9, 9), whole])


def test_a_task_of_two_photos(tmp_path):
    """The shapes say on which of the data's keys they were drawn; what does not is no photo's."""
    tasks = [task(1, 'b.png', [result(polygon('can', *box(2, 3, 12, 9)))])]
    tasks[0]['data'] = {'before': 'a.png'} | tasks[0]['data']
    words = write(tmp_path, tasks, 'a.png', 'b.png')
    prepare.command(words)
    assert list(imported(tmp_path)) == ['b.png']
    tasks[0]['annotations'][0]['result'][0]['to_name'] = 'img'
    write(tmp_path, tasks)
    with pytest.raises(BadInput, match='task 1: has several photos, a.png, b.png, and its shapes do not say'):
        prepare.command([*words, '--overwrite'])


def test_predictions_alone(tmp_path):
    tasks = [task(1, 'a.png', []) | {'annotations': [], 'predictions': [{'result': []}]}]
    with pytest.raises(BadInput, match='has an annotation; accept its predictions as annotations'):
        prepare.command(write(tmp_path, tasks))


@pytest.mark.parametrize('angle', [0, 90])
def test_boxes_and_ellipses(tmp_path, angle):
    """A box is turned around its first corner, an ellipse around its middle; sides are in percent of each."""
    x, y, w, h = (4, 6, 10, 20) if not angle else (24, 6, 10, 20)
    values = {'x': 100 * x / WIDTH, 'y': 100 * y / HEIGHT, 'rotation': angle, 'rectanglelabels': ['can']}
    values |= {'width': 100 * w / WIDTH, 'height': 100 * h / HEIGHT}
    round_one = {'x': 80, 'y': 50, 'radiusX': 10, 'radiusY': 25, 'ellipselabels': ['lid']}
    results = [result(values, 'rectanglelabels'), result(round_one, 'ellipselabels', 1)]
    words = write(tmp_path, [task(1, 'a.png', results)])
    with pytest.raises(BadInput, match='result r0: found a box, as are 1 of 2 objects'):
        prepare.command(words)
    prepare.command([*words, '--boxes', 'fill'])
    mask = imported(tmp_path)['a.png']
    np.testing.assert_array_equal(mask == 1, rectangle(4, 6, *((14, 26) if not angle else (24, 16))))
    assert abs((mask == 2).sum() - np.pi * 5 * 10) < 8


@pytest.mark.parametrize(
    ('image', 'photo'),
    [
        ('/data/upload/3/0a1b2c3d-my%20photo.png', 'my photo.png'),
        ('/data/upload/3/0a1b2c3d-photo.png', '0a1b2c3d-photo.png'),
        ('/data/local-files/?d=set%5Cshots%5Ca.png', 'shots/a.png'),
        ('/data/local-files/?d=set/shots/a.png', 'set/shots/a.png'),
        ('https://bucket.example.com/x/a.png?sig=12&y=3', 'a.png'),
        ('s3://bucket/folder/a.png', 'folder/a.png'),
        (r'C:\photos\a.png', 'a.png'),
        ('caf\u00e9.png', 'cafe\u0301.png'),
    ],
)
def test_names_of_photos(tmp_path, image, photo):
    """The photo is found, and is not the one of the same name in another folder."""
    tasks = [task(1, image, [result(polygon('can', *box(2, 3, 12, 9)))])]
    (tmp_path / 'photos').mkdir()
    prepare.command(write(tmp_path, tasks, photo, f'other/not {Path(photo).name}'))
    assert [Path(name).name for name in imported(tmp_path)] == [Path(photo.replace('e\u0301', '\u00e9')).name]


def value(**values: object) -> Callable[[list[dict]], object]:
    return lambda tasks: tasks[0]['annotations'][0]['result'][0].update(values)


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda tasks: tasks.clear(), "found no task, expected Label Studio's export"),
        (lambda tasks: tasks[0].pop('data'), 'task number 1 has no data'),
        (lambda tasks: tasks[0].pop('annotations'), 'lacks the key annotations'),
        (lambda tasks: tasks[0].update(data=[], annotator=1), 'is of the export JSON-MIN'),
        (lambda tasks: tasks[0].update(annotations=[]), 'none of its 1 task has an annotation'),
        (lambda tasks: tasks[0].update(data={'image': 'z.png'}), "its photo 'z.png' is not below"),
        (lambda tasks: tasks.append(tasks[0]), 'is of .*a.png, as is .*: remove one'),
        (value(image_rotation=90), 'turned by 90 degrees, expected 0'),
        (value(original_width=None), 'height and width are'),
        (value(original_width=51), r'is of 40x51 pixels, .*a.png has 40x50'),
        (value(value={'points': [[1, 'x']], 'polygonlabels': ['can']}), r"found the point \[1, 'x'\]"),
        (value(value={'rle': [300], 'brushlabels': ['can']}), 'expected bytes, 0 to 255'),
        (value(value={'rle': [1, 2], 'brushlabels': ['can']}), 'rle is cut off'),
        (
            value(value={'x': 1, 'y': 1, 'width': 'a', 'height': 2, 'rectanglelabels': ['c']}),
            'expected numbers',
        ),
    ],
)
def test_what_is_refused(tmp_path, change, message):
    tasks = [task(1, 'a.png', [result(polygon('can', *box(2, 3, 12, 9)))])]
    change(tasks)
    with pytest.raises(BadInput, match=message) as raised:
        prepare.command(write(tmp_path, tasks))
    assert '\n' not in str(raised.value) and not (tmp_path / 'out').exists()


def test_a_name_in_two_folders(tmp_path):
    tasks = [task(1, 'x/a.png', [result(polygon('can', *box(2, 3, 12, 9)))])]
    with pytest.raises(BadInput, match='a.png is in 2 folders, such as'):
        prepare.command(write(tmp_path, tasks, 'y/a.png', 'z/a.png'))
    prepare.command(write(tmp_path, tasks, 'x/a.png'))
    assert list(imported(tmp_path)) == ['x/a.png']


def test_other_exports(tmp_path):
    words = write(tmp_path, {'images': [], 'annotations': []})
    with pytest.raises(BadInput, match='seems to be COCO, .*prepare.py coco reads it'):
        prepare.command(words)
