"""One JSON file a photo becomes a data root: polygons of pixels that may overlap, or labelme's shapes."""

import base64
import io
import json
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image

import prepare
from config import Competition, read_competition
from data.coco import draw_planes, draw_truth, read_coco, read_photo
from data.labelled import encode_crop, fill_outline
from data.masks import decode
from utils.errors import BadInput

HEIGHT, WIDTH = 60, 80
TRIANGLE = [[5, 5], [40, 8], [20, 50]]
SQUARE = [[20, 10], [60, 10], [60, 40], [20, 40]]  # over the triangle
APART = [[62, 45], [78, 45], [78, 58], [62, 58]]


def poly(label: str, points: list) -> dict:
    return {'id': '1f', 'type': 'poly_seg', 'attributes': {}, 'points': points, 'label': label}


def write(
    root: Path, name: str, annotations: list[dict] | None, size: tuple[int, int] = (WIDTH, HEIGHT)
) -> None:
    """Write a grey photo of 3 channels, and its label."""
    photo = root / f'DCM/{name}.png'
    photo.parent.mkdir(parents=True, exist_ok=True)
    Image.new('RGB', size, (len(name),) * 3).save(photo)
    if annotations is not None:
        label = root / f'outputs_json/{name}.json'
        label.parent.mkdir(parents=True, exist_ok=True)
        label.write_text(json.dumps({'annotations': annotations}))


def words(root: Path, *options: str) -> list[str]:
    places = {'--photos': 'DCM', '--labels': 'outputs_json', '--out': 'out'}
    return [
        'from-json',
        *(word for key, name in places.items() for word in (key, str(root / name))),
        *options,
    ]


def filled(*polygons: list) -> np.ndarray:
    """Fill polygons as a mask's reader does with OpenCV."""
    mask = np.zeros((HEIGHT, WIDTH), np.uint8)
    for points in polygons:
        cv2.fillPoly(mask, [np.array(points)], 1)
    return mask


def imported(root: Path) -> tuple[Competition, dict[str, np.ndarray]]:
    competition = read_competition(root / 'out')
    photos = read_coco(root / 'out', 'train', competition).photos
    return competition, {photo.file_name: draw_truth(photo, competition) for photo in photos}


def test_classes_that_overlap_stay_whole(tmp_path, capsys):
    """A set of people with two photos each; the test photos lie apart, one of them with a known name."""
    for person in range(12):
        for hand in 'RL':
            annotations = [poly('finger-10', TRIANGLE), poly('finger-2', SQUARE), poly('Ulna', [APART])]
            write(tmp_path, f'ID{person:03d}/image{person}_{hand}', annotations)
    (tmp_path / 'test/ID040').mkdir(parents=True)
    Image.new('RGB', (WIDTH, HEIGHT)).save(tmp_path / 'test/ID040/image7.png')
    prepare.command(words(tmp_path, '--test', str(tmp_path / 'test')))
    out = capsys.readouterr().out
    assert 'classes (3), in the order in which a person would sort them' in out
    assert ': finger-2, finger-10, Ulna\n' in out
    whole = [filled(TRIANGLE), filled(SQUARE), filled(APART)]
    both = int((whole[0] & whole[1]).sum())
    assert f'{2 * both / sum(map(np.sum, whole)):.2%} of' in out and 'task: multilabel' in out
    competition, masks = imported(tmp_path)
    assert competition == Competition(
        classes=('finger-2', 'finger-10', 'Ulna'),
        task='multilabel',
        metric='image_dice',
        score_size='own',
        group='(.*)/',
    )
    assert len(masks) == 24 and set(masks) >= {'ID000/image0_R.png', 'ID011/image11_L.png'}
    for planes in masks.values():
        np.testing.assert_array_equal(planes, np.stack([whole[1], whole[0], whole[2]]))
    tests = read_coco(tmp_path / 'out', 'test', competition)
    assert [photo.file_name for photo in tests.photos] == ['ID040/image7.png']
    assert read_photo(tests, tests.photos[0]).shape == (HEIGHT, WIDTH, 3)


def test_classes_that_hardly_overlap_are_multiclass(tmp_path, capsys):
    write(tmp_path, 'a', [poly('can', TRIANGLE), poly('bottle', APART)])
    prepare.command(words(tmp_path))
    competition, masks = imported(tmp_path)
    assert competition == Competition(classes=('Background', 'bottle', 'can'), score_size='own')
    np.testing.assert_array_equal(masks['a.png'], filled(APART) + 2 * filled(TRIANGLE))
    assert 'task: multiclass' in capsys.readouterr().out
    prepare.command(words(tmp_path, '--overwrite', '--task', 'multilabel', '--classes', 'can', 'bottle'))
    competition, masks = imported(tmp_path)
    assert competition.classes == ('can', 'bottle') and masks['a.png'].shape == (2, HEIGHT, WIDTH)


def test_what_competition_yaml_says_stays(tmp_path):
    write(tmp_path, 'a', [poly('can', TRIANGLE), poly('bottle', SQUARE)])
    (tmp_path / 'out').mkdir()
    text = (
        'classes: [can, bottle]\ntask: multilabel\nmetric: dice\nscore_size: own\nsubmission: {order: row}\n'
    )
    (tmp_path / 'out/competition.yaml').write_text(text)
    prepare.command(words(tmp_path))
    competition, masks = imported(tmp_path)
    assert competition.classes == ('can', 'bottle') and competition.metric == 'dice'
    assert competition.submission.order == 'row'
    np.testing.assert_array_equal(masks['a.png'], [filled(TRIANGLE), filled(SQUARE)])


def test_a_class_twice_and_a_file_of_classes(tmp_path):
    """Both polygons count; classes without an object are named; rings may have one more level of brackets."""
    write(tmp_path, 'a', [poly('can', TRIANGLE), poly('can', APART), poly('tin', [SQUARE, APART])])
    (tmp_path / 'names.txt').write_text('\ufefftin\n\ncan\nbag\n')
    prepare.command(words(tmp_path, '--classes', str(tmp_path / 'names.txt'), '--task', 'multilabel'))
    competition, masks = imported(tmp_path)
    assert competition.classes == ('tin', 'can', 'bag')
    expected = [filled(SQUARE, APART), filled(TRIANGLE, APART), filled()]
    np.testing.assert_array_equal(masks['a.png'], expected)


def bom(root: Path) -> None:
    path = root / 'outputs_json/a.json'
    path.write_text('\ufeff' + path.read_text())


def wide(root: Path) -> None:
    path = root / 'outputs_json/a.json'
    path.write_bytes(path.read_text().encode('utf-16'))


def elsewhere(root: Path) -> None:
    (root / 'outputs_json/a.json').rename(root / 'outputs_json/x.json')
    content = json.loads((root / 'outputs_json/x.json').read_text())
    content['filename'] = 'C:\\labels\\DCM\\a.png'
    (root / 'outputs_json/x.json').write_text(json.dumps(content))


def in_a_folder(root: Path) -> None:
    (root / 'DCM/deep').mkdir()
    (root / 'DCM/a.png').rename(root / 'DCM/deep/a.png')


def beside(root: Path) -> None:
    """Labels beside the photos, with files that a Mac leaves."""
    (root / 'outputs_json/a.json').rename(root / 'DCM/a.json')
    (root / 'outputs_json').rmdir()
    (root / 'outputs_json').symlink_to(root / 'DCM')
    (root / 'DCM/._a.json').write_bytes(b'\0')


@pytest.mark.parametrize('mutate', [bom, wide, elsewhere, in_a_folder, beside])
def test_habits_of_tools(tmp_path, mutate):
    write(tmp_path, 'a', [poly('can', TRIANGLE)])
    mutate(tmp_path)
    prepare.command(words(tmp_path))
    np.testing.assert_array_equal(next(iter(imported(tmp_path)[1].values())), filled(TRIANGLE))


def change(act: Callable[[dict], object], name: str = 'a') -> Callable[[Path], None]:
    def mutate(root: Path) -> None:
        path = root / f'outputs_json/{name}.json'
        content = json.loads(path.read_text())
        act(content)
        path.write_text(json.dumps(content))

    return mutate


def first(**values: object) -> Callable[[Path], None]:
    return change(lambda content: content['annotations'][0].update(values))


@pytest.mark.parametrize(
    ('mutate', 'message'),
    [
        (lambda root: (root / 'outputs_json/a.json').write_text('{'), 'a.json: not JSON, or cut off'),
        (lambda root: (root / 'outputs_json/b.json').write_text('{}'), 'there is no photo of that name'),
        (lambda root: (root / 'outputs_json/a.json').unlink(), 'found no .json file'),
        (lambda root: write(root, 'a', [], (HEIGHT, 2)), 'would have no class'),
        (change(lambda content: content.pop('annotations')), 'found nothing, expected annotations'),
        (change(lambda c: c.update(images=[], categories=[])), 'seems to be COCO'),
        (change(lambda c: c['annotations'][0].pop('label')), "annotations\\[0\\] lacks the key 'label'"),
        (change(lambda c: c['annotations'][0].pop('points')), "lacks the key 'points'"),
        (first(label=''), 'label is empty'),
        (first(type='bbox'), "type is 'bbox', expected poly_seg"),
        (first(points=[[1, 2, 3]]), r'found the point \[1, 2, 3\]'),
        (first(points=[[1, 'x']]), 'expected \\[x, y\\] in pixels'),
        (first(points=[[1, 1], [5000, 1], [1, 9]]), 'has the coordinate 5000'),
        (lambda root: Image.new('RGB', (9, 9)).save(root / 'DCM/a.jpg'), 'there are 2 photos of that name'),
    ],
)
def test_what_is_refused(tmp_path, mutate, message):
    """It is refused in one line, and an earlier set stays."""
    write(tmp_path, 'a', [poly('can', TRIANGLE)])
    prepare.command(words(tmp_path))
    before = {path: path.read_bytes() for path in (tmp_path / 'out').rglob('*') if path.is_file()}
    (tmp_path / 'out/competition.yaml').unlink()
    before.pop(tmp_path / 'out/competition.yaml')
    mutate(tmp_path)
    with pytest.raises(BadInput, match=message) as raised:
        prepare.command(words(tmp_path, '--overwrite'))
    assert '\n' not in str(raised.value)
    after = {path: path.read_bytes() for path in (tmp_path / 'out').rglob('*') if path.is_file()}
    assert after == before


def test_a_label_that_is_no_class(tmp_path):
    write(tmp_path, 'a', [poly('can', TRIANGLE), poly('cann', APART)])
    with pytest.raises(BadInput, match="found the label 'cann' .*the classes are Background, can"):
        prepare.command(words(tmp_path, '--classes', 'can'))
    with pytest.raises(BadInput, match='DCM, which is imported'):
        prepare.command([*words(tmp_path)[:-1], str(tmp_path / 'DCM/out')])


def test_a_photo_without_a_label_is_left_out(tmp_path, capsys):
    write(tmp_path, 'a', [poly('can', TRIANGLE)])
    write(tmp_path, 'b', None)
    write(tmp_path, 'c', [])
    prepare.command(words(tmp_path))
    assert 'takes them as photos without objects): 1' in capsys.readouterr().out
    assert list(imported(tmp_path)[1]) == ['a.png', 'c.png']


# --- labelme ------------------------------------------------------------------------------------------------


def labelme(root: Path, shapes: list[dict], **values: object) -> None:
    write(root, 'a', [])
    content = {
        'version': '5.4.1',
        'flags': {},
        'shapes': shapes,
        'imagePath': '..\\DCM\\a.png',
        'imageData': None,
    }
    content |= {'imageHeight': HEIGHT, 'imageWidth': WIDTH} | values
    (root / 'outputs_json/a.json').write_text(json.dumps(content))


def shape(label: str, points: list, kind: str | None = 'polygon', **values: object) -> dict:
    return {'label': label, 'points': points, 'group_id': None, 'shape_type': kind, 'flags': {}} | values


def test_shapes_of_labelme(tmp_path, capsys):
    mask = np.random.default_rng(0).uniform(size=(7, 9)) < 0.5
    mask[0, 0] = mask[-1, -1] = True
    file = io.BytesIO()
    Image.fromarray(mask).save(file, 'PNG')
    brush = shape('brush', [[60, 5], [68, 11]], 'mask', mask=base64.b64encode(file.getvalue()).decode())
    shapes = [
        shape('can', [[1.5, 1.5], [11.5, 1.5], [11.5, 6.5], [1.5, 6.5]], None),
        shape('lid', [[40, 40], [40, 48]], 'circle'),
        shape('can', [[20, 20], [30, 20]], 'line'),
        shape('__ignore__', [[0, 50], [10, 50], [10, 60], [0, 60]]),
        brush,
    ]
    labelme(tmp_path, shapes)
    prepare.command(words(tmp_path, '--classes', 'can', 'lid', 'brush'))
    assert 'left out: 1 (a line, which has no area)' in capsys.readouterr().out
    planes = imported(tmp_path)[1]['a.png']
    assert planes[2:6, 2:11].min() == 1 and (planes == 1).sum() == 50
    assert abs((planes == 2).sum() - np.pi * 64) < 10 and planes[40, 47] == 2 and planes[40, 49] == 0
    assert (planes[50:, :10] == 255).all() and (planes == 255).sum() == 100
    np.testing.assert_array_equal(planes[5:12, 60:69] == 3, mask)
    prepare.command(
        words(tmp_path, '--overwrite', '--task', 'multilabel', '--classes', 'can', 'lid', 'brush')
    )
    planes = imported(tmp_path)[1]['a.png']
    assert (planes[:, 50:, :10] == 255).all() and (planes == 255).sum() == 300


@pytest.mark.parametrize(
    ('values', 'kind', 'message'),
    [
        ({'imageHeight': 61}, 'polygon', r'a.json: is of 61x80 pixels, .*a.png has 60x80'),
        ({'imageHeight': 'x'}, 'polygon', "height and width are 'x' and 80"),
        ({}, 'cube', 'found 3 points of a cube'),
        ({}, 'mask', 'found 3 points of a mask'),
    ],
)
def test_labelme_that_is_refused(tmp_path, values, kind, message):
    labelme(tmp_path, [shape('can', TRIANGLE, kind)], **values)
    with pytest.raises(BadInput, match=message):
        prepare.command(words(tmp_path))
    assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize('kind', ['rectangle', 'rotation'])
def test_boxes_of_four_corners(tmp_path, kind):
    """X-AnyLabeling writes all corners, also of boxes that are turned."""
    labelme(tmp_path, [shape('can', SQUARE, kind), shape('can', TRIANGLE)])
    with pytest.raises(BadInput, match=r'shapes\[0\]: found a box, as are 1 of 2 objects.*--boxes skip'):
        prepare.command(words(tmp_path))
    prepare.command(words(tmp_path, '--boxes', 'fill'))
    assert (imported(tmp_path)[1]['a.png'][10:40, 20:60] == 1).all()


@pytest.mark.parametrize(
    ('name', 'content', 'message'),
    [
        (
            'a.png',
            {'objects': [], 'size': {}},
            'seems to be Supervisely JSON.*export the annotations as COCO',
        ),
        ('via', {'a.png9': {'filename': 'a.png', 'regions': []}}, 'seems to be VIA JSON.*as COCO'),
        ('a', {'objects': [], 'size': {}}, 'seems to be Supervisely JSON'),
        ('a', [{'data': {}, 'annotations': []}], 'seems to be Label Studio JSON.*prepare.py label-studio'),
    ],
)
def test_labels_of_other_tools(tmp_path, name, content, message):
    write(tmp_path, 'a', [])
    (tmp_path / 'outputs_json/a.json').unlink()
    (tmp_path / f'outputs_json/{name}.json').write_text(json.dumps(content))
    with pytest.raises(BadInput, match=message):
        prepare.command(words(tmp_path))


def test_boxes(tmp_path, capsys):
    labelme(tmp_path, [shape('can', [[30, 30], [10, 20]], 'rectangle'), shape('can', TRIANGLE)])
    with pytest.raises(BadInput, match=r'shapes\[0\]: found a box, as are 1 of 2 objects.*--boxes skip'):
        prepare.command(words(tmp_path))
    prepare.command(words(tmp_path, '--boxes', 'skip'))
    skipped = imported(tmp_path)[1]['a.png']
    prepare.command(words(tmp_path, '--boxes', 'fill', '--overwrite'))
    box = np.zeros((HEIGHT, WIDTH), bool)
    box[20:30, 10:30] = True
    np.testing.assert_array_equal(imported(tmp_path)[1]['a.png'], box | skipped)
    assert skipped.any() and 'boxes taken as rectangles: 1 of 2 objects' in capsys.readouterr().out


# --- run lengths of parts -----------------------------------------------------------------------------------


@pytest.mark.parametrize('seed', range(20))
def test_a_part_is_encoded_as_the_whole(seed):
    """Against numpy: parts of any place, also of the whole height, whose runs go on in the next column."""
    rng = np.random.default_rng(seed)
    size = tuple(rng.integers(1, 12, 2))
    top, left = (int(rng.integers(0, side)) if seed % 3 else 0 for side in size)
    h, w = (int(rng.integers(1, side - first + 1)) for side, first in zip(size, (top, left), strict=True))
    h = size[0] if seed % 3 == 0 else h
    crop = rng.uniform(size=(h, w)) < rng.uniform()
    mask = np.zeros(size, bool)
    mask[top : top + h, left : left + w] = crop
    np.testing.assert_array_equal(decode(encode_crop(crop, left, top, size)['counts'], size).T, mask)


@pytest.mark.parametrize('seed', range(20))
def test_an_outline_is_filled_as_opencv_does(seed):
    rng = np.random.default_rng(seed)
    points = rng.integers(-20, 70, (int(rng.integers(3, 9)), 2))
    size = (40, 50)
    expected = cv2.fillPoly(np.zeros(size, np.uint8), [points.astype(np.int32)], 1)
    np.testing.assert_array_equal(decode(fill_outline(points, size)['counts'], size).T, expected)


def test_planes_are_those_of_the_polygons_of_each_class(tmp_path):
    """Crowds lie under objects of their own class only."""
    write(tmp_path, 'a', [poly('can', TRIANGLE), poly('__ignore__', SQUARE), poly('tin', APART)])
    prepare.command(words(tmp_path, '--task', 'multilabel'))
    competition, _ = imported(tmp_path)
    (photo,) = read_coco(tmp_path / 'out', 'train', competition).photos
    planes = draw_planes(photo, 2)
    expected = np.where(filled(TRIANGLE), 1, 255 * filled(SQUARE).astype(int))
    np.testing.assert_array_equal(planes[0], expected)
