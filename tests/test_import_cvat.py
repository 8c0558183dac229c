"""CVAT's XML becomes a data root: polygons, masks, boxes, what lies on top, and tracks by frame."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import prepare
from config import read_competition
from data.coco import draw_truth, read_coco
from utils.errors import BadInput

HEIGHT, WIDTH = 40, 50
HEAD = '<?xml version="1.0" encoding="utf-8"?>\n<annotations>\n  <version>1.1</version>\n  <meta><task>'
LABELS = ''.join(f'<label><name>{name}</name></label>' for name in ('lid', 'can', 'bag'))
SIZE = f'<original_size><width>{WIDTH}</width><height>{HEIGHT}</height></original_size>'


def polygon(label: str, left: int, top: int, right: int, bottom: int, **values: object) -> str:
    points = f'{left}.00,{top}.00;{right}.00,{top}.00;{right}.00,{bottom}.00;{left}.00,{bottom}.00'
    rest = ''.join(f' {key}="{value}"' for key, value in values.items())
    return f'<polygon label="{label}" source="manual" occluded="0" points="{points}"{rest}></polygon>'


def mask(label: str, pixels: np.ndarray, left: int, top: int, **values: object) -> str:
    """Write a mask: run lengths along the rows, the first of pixels that are not in it."""
    flat, counts, value = pixels.ravel().tolist(), [0], False
    for pixel in flat:
        if pixel != value:
            counts.append(0)
            value = pixel
        counts[-1] += 1
    rle, (height, width) = ', '.join(map(str, counts)), pixels.shape
    rest = ''.join(f' {key}="{value}"' for key, value in values.items())
    place = f'left="{left}" top="{top}" width="{width}" height="{height}"'
    return f'<mask label="{label}" occluded="0" rle="{rle}" {place}{rest}></mask>'


def image(name: str, *shapes: str, width: object = WIDTH) -> str:
    return f'<image id="0" name="{name}" width="{width}" height="{HEIGHT}">{"".join(shapes)}</image>'


def write(root: Path, *elements: str, photos: tuple[str, ...] = ('a.png',)) -> list[str]:
    for name in photos:
        (root / 'images' / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (WIDTH, HEIGHT), (len(name),) * 3).save(root / 'images' / name)
    text = f'{HEAD}<labels>{LABELS}</labels>{SIZE}</task></meta>{"".join(elements)}</annotations>'
    (root / 'annotations.xml').write_text(text)
    places = ['--photos', str(root / 'images'), '--out', str(root / 'out')]
    return ['cvat', '--xml', str(root / 'annotations.xml'), *places]


def imported(root: Path) -> dict[str, np.ndarray]:
    competition = read_competition(root / 'out')
    photos = read_coco(root / 'out', 'train', competition).photos
    return {photo.file_name: draw_truth(photo, competition) for photo in photos}


def paint(*areas: tuple[int, int, int, int, int]) -> np.ndarray:
    """Paint rectangles of an id, one over the other."""
    drawn = np.zeros((HEIGHT, WIDTH), np.uint8)
    for k, left, top, right, bottom in areas:
        drawn[top:bottom, left:right] = k
    return drawn


def test_polygons_masks_and_what_has_no_area(tmp_path, capsys):
    pixels = np.random.default_rng(0).uniform(size=(9, 7)) < 0.5
    line = '<polyline label="can" points="1,2;3,4" z_order="0"></polyline><tag label="can"></tag>'
    shapes = [polygon('can', 1, 2, 11, 8), mask('bag', pixels, 30, 20), line]
    prepare.command(write(tmp_path, image('a.png', *shapes), image('b.png'), photos=('a.png', 'b.png')))
    competition, masks = read_competition(tmp_path / 'out'), imported(tmp_path)
    assert competition.classes == ('Background', 'lid', 'can', 'bag')  # in the order of the tool
    expected = paint((2, 1, 2, 11, 8))
    expected[20:29, 30:37] = 3 * pixels
    np.testing.assert_array_equal(masks['a.png'], expected)
    assert not masks['b.png'].any()
    out = capsys.readouterr().out
    assert 'left out: 1 (a polyline, which has no area)' in out and 'no object: lid' in out


@pytest.mark.parametrize('seed', range(8))
def test_masks_of_any_runs(tmp_path, seed):
    """Of all, of none before the last pixel, whose run of zeros at the end may be left out."""
    rng = np.random.default_rng(seed)
    pixels = rng.uniform(size=(HEIGHT, 6)) < (0.0, 1.0, 0.1, 0.5, 0.9)[seed % 5]
    pixels[3, 3] = True
    text = mask('can', pixels, 44, 0)
    if not pixels[-1, -1] and seed % 2:
        head, _, rest = text.partition('" left')
        text = head.rpartition(',')[0] + '" left' + rest
    prepare.command(write(tmp_path, image('a.png', text)))
    expected = np.zeros((HEIGHT, WIDTH), bool)
    expected[:, 44:] = pixels
    np.testing.assert_array_equal(imported(tmp_path)['a.png'] == 2, expected)


def test_the_higher_z_order_lies_on_top(tmp_path):
    """A large bag over a can: without z_order, the smaller would lie on top."""
    shapes = [
        polygon('bag', 0, 0, 40, 30, z_order=4),
        polygon('can', 30, 20, 50, 40, z_order=1),
        polygon('can', 2, 2, 8, 8, z_order=1),
        polygon('lid', 35, 25, 38, 28, z_order=4),
    ]
    words = write(tmp_path, image('a.png', *shapes))
    prepare.command(words)  # the order is meant, so it is multiclass
    expected = paint((2, 30, 20, 50, 40), (3, 0, 0, 40, 30), (1, 35, 25, 38, 28))
    np.testing.assert_array_equal(imported(tmp_path)['a.png'], expected)
    prepare.command([*words, '--overwrite', '--task', 'multilabel'])
    whole = [paint((1, *area)) for area in [(35, 25, 38, 28), (30, 20, 50, 40), (0, 0, 40, 30)]]
    whole[1][2:8, 2:8] = 1
    np.testing.assert_array_equal(imported(tmp_path)['a.png'], whole)


def test_an_object_that_others_hide_is_left_out(tmp_path, capsys):
    shapes = [polygon('bag', 0, 0, 40, 30, z_order=1), polygon('can', 2, 2, 8, 8)]
    prepare.command(write(tmp_path, image('a.png', *shapes)))
    np.testing.assert_array_equal(imported(tmp_path)['a.png'], paint((3, 0, 0, 40, 30)))
    assert 'left out: 1 (covered by objects that lie on top)' in capsys.readouterr().out


def test_boxes_and_ellipses_are_turned_around_their_middle(tmp_path):
    turned = '<box label="can" xtl="10" ytl="10" xbr="20" ybr="14" rotation="90.0" z_order="0"></box>'
    ellipse = '<ellipse label="lid" cx="35" cy="20" rx="4" ry="8" rotation="90" z_order="0"></ellipse>'
    words = write(tmp_path, image('a.png', turned, ellipse))
    with pytest.raises(BadInput, match='box number 1: found a box, as are 1 of 2 objects'):
        prepare.command(words)
    prepare.command([*words, '--boxes', 'fill'])
    drawn = imported(tmp_path)['a.png']
    np.testing.assert_array_equal(drawn == 2, paint((1, 13, 7, 17, 17)))
    rows, columns = np.nonzero(drawn == 1)
    assert (np.ptp(rows) + 1, np.ptp(columns) + 1) == (8, 16) and abs(len(rows) - np.pi * 32) < 8


def test_tracks_of_a_video(tmp_path, capsys):
    """Frames are found by the number in their names; an object that has left the picture is no object."""
    tracks = [
        f'<track id="0" label="can">{polygon("", 1, 2, 11, 8, frame=0, outside=0, keyframe=1)}'
        f'{polygon("", 2, 2, 12, 8, frame=1, outside=0, keyframe=0)}'
        f'{polygon("", 2, 2, 12, 8, frame=2, outside=1, keyframe=1)}</track>',
        f'<track id="1" label="lid">{polygon("", 20, 2, 30, 9, frame=1, outside=0, keyframe=1)}</track>',
    ]
    photos = tuple(f'frame_{n:06d}.png' for n in range(4))
    prepare.command(write(tmp_path, *tracks, photos=photos))
    masks = imported(tmp_path)
    assert list(masks) == list(photos[:2])
    np.testing.assert_array_equal(masks[photos[0]], paint((2, 1, 2, 11, 8)))
    np.testing.assert_array_equal(masks[photos[1]], paint((2, 2, 2, 12, 8), (1, 20, 2, 30, 9)))
    assert 'takes them as photos without objects): 2' in capsys.readouterr().out


def text(change: Callable[[str], str]) -> Callable[[Path], object]:
    def mutate(root: Path) -> None:
        path = root / 'annotations.xml'
        path.write_text(change(path.read_text()))

    return mutate


@pytest.mark.parametrize(
    'mutate',
    [
        text(lambda xml: '\ufeff' + xml),
        text(lambda xml: xml.replace('name="a.png"', r'name="shots\a.png"')),
        text(lambda xml: xml.replace('name="a.png"', 'name="my%20set/a.png"')),
        text(lambda xml: xml.replace('<meta>', '<x>').replace('</meta>', '</x>')),
        text(lambda xml: xml.replace('<task>', '<project>').replace('</task>', '</project>')),
        text(lambda xml: xml.replace('\n', '\r\n')),
        lambda root: (
            (root / 'images/a.png').rename(root / 'images/a.PNG')
            and text(lambda xml: xml.replace('a.png', 'a.PNG'))(root)
        ),
    ],
)
def test_habits_of_exports(tmp_path, mutate):
    words = write(tmp_path, image('a.png', polygon('can', 1, 2, 11, 8)))
    mutate(tmp_path)
    prepare.command(words)
    (drawn,) = imported(tmp_path).values()
    k = read_competition(tmp_path / 'out').classes.index('can')
    np.testing.assert_array_equal(drawn, paint((k, 1, 2, 11, 8)))


@pytest.mark.parametrize(
    ('mutate', 'message'),
    [
        (text(lambda xml: xml[:200]), 'not XML, or cut off'),
        (text(lambda xml: xml.replace('annotations>', 'annotation>')), 'found <annotation> of Pascal VOC'),
        (text(lambda xml: '<!DOCTYPE x [<!ENTITY a "b">]>' + xml[39:]), 'has a document type'),
        (lambda root: (root / 'annotations.xml').write_bytes(b'PK\3\4'), 'is a ZIP archive, .*; unpack it'),
        (text(lambda xml: xml.replace('label="can"', '')), 'polygon number 1: lacks its label'),
        (text(lambda xml: xml.replace('"can"', '"tin" z_order="x"')), "z_order is 'x'"),
        (text(lambda xml: xml.replace('1.00,2.00;', '1.00;')), 'expected x,y of each'),
        (text(lambda xml: xml.replace('1.00,2.00;', 'a,2.00;')), "found 'a', expected a number"),
        (text(lambda xml: xml.replace('name="a.png"', '')), 'lacks its name'),
        (text(lambda xml: xml.replace('name="a.png"', 'name="b.png"')), "image 'b.png': is not below"),
        (text(lambda xml: xml.replace(f' width="{WIDTH}"', ' width="51"')), 'is of 40x51 pixels'),
        (text(lambda xml: xml.replace(f' width="{WIDTH}"', ' width="-1"')), 'expected pixels'),
        (
            text(lambda xml: xml.replace('<image', '<i').replace('</image', '</i')),
            'has no image and no track',
        ),
    ],
)
def test_what_is_refused(tmp_path, mutate, message):
    words = write(tmp_path, image('a.png', polygon('can', 1, 2, 11, 8)))
    mutate(tmp_path)
    with pytest.raises(BadInput, match=message) as raised:
        prepare.command(words)
    assert '\n' not in str(raised.value) and not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
    ('values', 'message'),
    [
        ('rle="1, 2" left="49" top="0" width="2" height="2"', 'outside its photo of 50x40'),
        ('rle="1, x" left="0" top="0" width="2" height="2"', 'run lengths that are no whole numbers'),
        ('rle="1, 9" left="0" top="0" width="2" height="2"', 'more than its 4 pixels'),
        ('rle="1, 2" top="0" width="2" height="2"', 'lacks the key left'),
    ],
)
def test_masks_that_are_refused(tmp_path, values, message):
    with pytest.raises(BadInput, match=message):
        prepare.command(write(tmp_path, image('a.png', f'<mask label="can" {values}></mask>')))


def test_frames_that_are_not_there(tmp_path):
    track = f'<track id="0" label="can">{polygon("", 1, 2, 11, 8, frame=7, outside=0)}</track>'
    words = write(tmp_path, track, photos=('x_1.png',))
    with pytest.raises(BadInput, match='frame 7: no photo of that number below .*frame_000007.png'):
        prepare.command(words)
