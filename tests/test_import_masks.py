"""Test prepare.py from-masks: which value is which class, which mask is whose, and what is refused."""

import json
import shutil
import unicodedata
import zlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from conftest import write_set
from PIL import ExifTags, Image
from test_formats import assert_same, masks_of

import prepare
from config import HOME, Competition, read_competition
from data.coco import draw_mask, draw_truth, read_coco, read_photo
from utils.errors import BadInput

HEIGHT, WIDTH = 12, 20
CLASSES = Competition(classes=('Background', 'can', 'big bottle'))


def ids(*values: int) -> np.ndarray:
    """Return a mask of vertical stripes of these ids, of equal width."""
    return np.repeat(np.array(values, np.uint8), WIDTH // len(values))[None].repeat(HEIGHT, 0)


def write_pairs(root: Path, masks: dict[str, Image.Image | np.ndarray], photo: str = '{}.jpg') -> list[str]:
    """Write a photo for each mask, by name; return the words of the command."""
    for name, mask in masks.items():
        image = mask if isinstance(mask, Image.Image) else Image.fromarray(mask)
        path = root / f'm/{name}' if '.' in name else root / f'm/{name}.png'
        path.parent.mkdir(parents=True, exist_ok=True)
        image.save(path)
        path = root / 'p' / photo.format(name.partition('.')[0])
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', image.size, (90, 120, 60)).save(path)
    return ['from-masks', '--photos', str(root / 'p'), '--masks', str(root / 'm'), '--out', str(root / 'out')]


def imported(root: Path, competition: Competition = CLASSES) -> dict[str, np.ndarray]:
    size = 256 if competition.classes == HOME.classes else 'own'
    assert read_competition(root / 'out') == competition.model_copy(update={'score_size': size})
    return masks_of(read_coco(root / 'out', 'train', competition).photos)


TWO = ['--classes', 'can', 'big bottle']


def palette_image(mask: np.ndarray, *colours: tuple[int, int, int]) -> Image.Image:
    image = Image.fromarray(mask, 'P')
    image.putpalette([v for colour in colours for v in colour])
    return image


def coded(mask: np.ndarray) -> np.ndarray:
    """Return ids 0 to 2 as black, red and green."""
    return np.array([(0, 0, 0), (255, 0, 0), (0, 255, 0)], np.uint8)[mask]


MASK = ids(0, 1, 2, 0)
COLOURS = ['#ff0000=can', '0,255,0=big  BOTTLE']


@pytest.mark.parametrize(
    ('mask', 'entries'),
    [
        (Image.fromarray(MASK), []),
        (np.stack([MASK] * 3, 2), []),
        (np.dstack([MASK] * 3 + [np.full_like(MASK, 255)]), []),
        (np.dstack([MASK, np.full_like(MASK, 255)]), []),
        (MASK.astype(np.uint16), []),
        (palette_image(MASK, (0, 0, 0), (128, 0, 0), (0, 128, 0)), []),
        (palette_image(MASK, (0, 0, 0), (255, 0, 0), (0, 255, 0)), COLOURS),
        (palette_image((MASK + 2) % 3, (255, 0, 0), (0, 255, 0), (0, 0, 0)), [*COLOURS, '#000000=0']),
        (coded(MASK), COLOURS),
        (MASK * 100, ['100=1', '200=2']),
        (MASK.astype(np.uint16) * 257, ['257=can', '514=2']),
        (np.where(MASK == 1, 700 + np.arange(WIDTH), MASK * 5).astype(np.uint16), ['600 - 999=can', '10=2']),
        (MASK + 7, ['7=0', '8=can', '9=big bottle']),
        (np.stack([MASK * 100] * 3, 2), ['#646464=1', '200=2']),
    ],
    ids=lambda value: '' if isinstance(value, list) else None,
)
def test_kinds_of_masks(tmp_path, mask, entries):
    words = write_pairs(tmp_path, {'a': mask})
    entries = [word for entry in entries for word in ('--map', entry)]
    prepare.command([*words, *TWO, *entries])
    assert_same(imported(tmp_path), {'a': MASK})


@pytest.mark.parametrize('bits', [1, 2, 4])
def test_greys_of_few_bits_are_ids(tmp_path, bits):
    """Write a PNG whose pixels have 1, 2 or 4 bits, which Pillow reads as 0 to 255."""
    mask = ids(0, 1, 0, 1) if bits == 1 else MASK
    words = write_pairs(tmp_path, {'a': mask})
    rows = ((mask[..., None] >> np.arange(bits - 1, -1, -1)) & 1).reshape(HEIGHT, -1)
    rows = [bytes([0]) + np.packbits(row).tobytes() for row in rows]
    (tmp_path / 'm/a.png').write_bytes(grey_png(bits, b''.join(rows)))
    prepare.command([*words, '--classes', 'can', *(['big bottle'] if bits > 1 else [])])
    competition = Competition(classes=CLASSES.classes[: 2 + (bits > 1)])
    assert_same(imported(tmp_path, competition), {'a': mask})


def grey_png(bits: int, rows: bytes) -> bytes:
    def chunk(kind: bytes, content: bytes) -> bytes:
        length, check = len(content).to_bytes(4), zlib.crc32(kind + content).to_bytes(4)
        return length + kind + content + check

    header = WIDTH.to_bytes(4) + HEIGHT.to_bytes(4) + bytes([bits, 0, 0, 0, 0])
    data = chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(rows)) + chunk(b'IEND', b'')
    return b'\x89PNG\r\n\x1a\n' + data


@pytest.mark.parametrize('suffix', ['bmp', 'gif', 'tif', 'TIFF', 'PNG'])
def test_lossless_files_of_masks(tmp_path, suffix):
    image = Image.fromarray(MASK)
    prepare.command([*write_pairs(tmp_path, {f'a.{suffix}': image}), *TWO])
    assert_same(imported(tmp_path), {'a': MASK})


@pytest.mark.parametrize(
    ('mask', 'options', 'message'),
    [
        (
            ids(0, 255),
            [],
            r'no mask has the id 1, can \(and 1 more\), but 255 covers 50.0%.* --map 255=1 .*255=ignore',
        ),
        (ids(0, 1, 255, 0), [], 'no mask has the id 2, big bottle, but 255 covers 25.0%'),
        (ids(255, 255, 0, 1), [], 'is 255 the background, and 0 the class can.* --map 255=0 0=1 1=2'),
        (ids(0, 0), [], 'no mask has a pixel of a class; they have 0 100 %'),
        (ids(0, 255), ['--map', '255=ignore'], 'no mask has a pixel of a class'),
        (ids(0, 128, 255, 0), [], 'found the id 128, expected 0 to 2, .* give --map 128=NAME 255=NAME'),
        (
            ids(0, 1, 3, 0),
            [],
            'found the id 3, expected 0 to 2, or 255.* cover 25 % of the masks: 3 25 %; give --map 3=',
        ),
        (ids(0, 1, 2, 0), ['--map', '255=1'], '--map 255=1: no mask has 255; they have 0 50 %, '),
        (ids(0, 1, 2, 0), ['--map', '1=cann'], "found 'cann', expected a class .*; did you mean 'can'"),
        (ids(0, 1, 2, 0), ['--map', '1=3'], "found '3', expected a class .*, an id from 0 to 2"),
        (ids(0, 1, 2, 0), ['--map', '1=1', '1=2'], '--map 1=2: 1 is mapped twice, first by 1=1'),
        (coded(MASK), ['--map', '1=1', '#010101=2'], '#010101 is mapped twice, first by 1=1'),
        (ids(0, 1, 2, 0), ['--map', 'x=1'], "found 'x', expected an id such as 255=1"),
        (ids(0, 1, 2, 0), ['--map', '1=1', '4-9=1'], '--map 4-9=1: no mask has 4 to 9; they have'),
        (
            ids(0, 1, 2, 0),
            ['--map', '2-1=1'],
            "found '2-1', expected an id .* a range of ids such as 1-40=can",
        ),
        (ids(0, 1, 2, 0), ['--map', '0,0,256=1'], "found '0,0,256', expected an id"),
        (ids(0, 1, 2, 0), ['--map', 'none.csv'], 'none.csv: no such file, and no entry such as'),
        (
            coded(MASK),
            [],
            r"is coded by colour: .* #000000 50 %, #00ff00 25 %.*--map '#00ff00'=NAME",
        ),
        (
            coded(MASK),
            ['--map', '#ff0000=can'],
            'found the colour #00ff00, expected those of --map',
        ),
        (palette_image(ids(0, 1), (0, 0, 0), (2, 2, 2)), [], 'index 1 is the grey 2, and both may'),
        (np.arange(240, dtype=np.uint8).reshape(12, 20), [], 'unknown ids cover 98.8 %'),
        (np.dstack([MASK] * 3 + [MASK * 100]), [], 'found transparent pixels'),
        (Image.new('CMYK', (WIDTH, HEIGHT)), [], 'found mode CMYK'),
        (Image.new('F', (WIDTH, HEIGHT)), [], 'found mode F'),
        (
            palette_image(ids(0, 1), (255, 255, 255), (0, 0, 0)),
            [],
            'index 0 is #ffffff, and black is index 1',
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else '',
)
def test_values_that_are_refused(tmp_path, mask, options, message):
    name = 'a.tif' if isinstance(mask, Image.Image) and mask.mode in ('CMYK', 'F') else 'a'
    with pytest.raises(BadInput, match=message) as raised:
        prepare.command([*write_pairs(tmp_path, {name: mask}), *TWO, *options])
    assert '\n' not in str(raised.value) and not (tmp_path / 'out').exists()


def test_masks_of_two_scales_are_refused(tmp_path):
    """Give some masks of 0 and 255, and others of 0 and 1; a border of 255 would be beside its object."""
    words = [*write_pairs(tmp_path, {'a': ids(0, 1), 'b': ids(0, 255)}), '--classes', 'can']
    with pytest.raises(
        BadInput, match=r'1 of 2 masks have 255 and no id of a class, b.png .* --map 255=1 .*'
    ):
        prepare.command(words)
    prepare.command([*words, '--map', '255=1'])
    competition = Competition(classes=CLASSES.classes[:2])
    assert_same(imported(tmp_path, competition), {'a': ids(0, 1), 'b': ids(0, 1)})


def test_numbers_of_objects_are_no_ids_of_classes(tmp_path):
    masks = {str(n): ids(*range(n + 1)).astype(np.uint16) for n in (1, 3, 4)}
    words = [*write_pairs(tmp_path, masks), '--classes']
    with pytest.raises(BadInput, match=r'ids of each mask are 1 to n, .* as of objects; --map 1-4=can makes'):
        prepare.command([*words, 'can', 'bag', 'box', 'cup', 'pan'])
    with pytest.raises(BadInput, match=r'found the id 2, .* do they count objects\? --map 1-4=can makes'):
        prepare.command([*words, 'can'])
    prepare.command([*words, 'can', '--map', '1-4=can'])
    expected = {name: (mask > 0).astype(int) for name, mask in masks.items()}
    assert_same(imported(tmp_path, Competition(classes=CLASSES.classes[:2])), expected)


def test_ids_from_1_to_n_of_several_pieces_are_classes(tmp_path):
    masks = {str(n): ids(*range(n + 1), *range(n, -1, -1)) for n in (1, 4, 9)}
    names = [f'name {n}' for n in range(9)]
    prepare.command([*write_pairs(tmp_path, masks), '--classes', *names])
    assert_same(imported(tmp_path, Competition(classes=('Background', *names))), masks)


def test_sets_without_background_say_so(tmp_path, capsys):
    prepare.command([*write_pairs(tmp_path, {'a': ids(1, 2)}), *TWO])
    assert 'no mask has a pixel of: Background' in capsys.readouterr().out


def test_soft_edges_are_named(tmp_path):
    mask = ids(0, 255)
    mask[0] = np.arange(60, 60 + WIDTH)
    with pytest.raises(BadInput, match=r'unknown ids cover 8.33 % .*and 14 more; are the edges soft'):
        prepare.command([*write_pairs(tmp_path, {'a': mask}), '--classes', 'can', '--map', '255=can'])


def test_rare_classes_and_a_border_of_255(tmp_path, capsys):
    """A narrow border asks nothing; a wide one needs to be mapped if a class has no pixel."""
    narrow, wide = ids(0, 1), ids(0, 1, 255, 0)
    narrow[0, 0] = 255
    words = write_pairs(tmp_path / '1', {'a': narrow, **{f'{n}': ids(0, 1) for n in range(3)}})
    prepare.command([*words, *TWO])
    assert 'no mask has a pixel of: big bottle' in capsys.readouterr().out
    words = write_pairs(tmp_path / '2', {'a': wide})
    prepare.command([*words, *TWO, '--map', '255=ignore'])
    assert_same(imported(tmp_path / '2'), {'a': wide})


def test_all_unknown_ids_of_a_set_are_named_at_once(tmp_path):
    words = write_pairs(tmp_path, {'a': ids(0, 1), 'b': ids(0, 7), 'c': ids(0, 9)})
    with pytest.raises(BadInput, match='unknown ids cover 33.3 % of the masks: 7 16.7 %, 9 16.7 %'):
        prepare.command([*words, *TWO])


def test_the_home_classes_are_named_if_none_were_given(tmp_path):
    with pytest.raises(BadInput, match=r'no mask has the id 1, General trash.*--classes NAME'):
        prepare.command(write_pairs(tmp_path, {'a': ids(0, 255)}))


def test_palettes_that_differ_are_no_ids(tmp_path):
    """Save colours in an order of their own in each file, as programs that shrink palettes do."""
    black, red, green = (0, 0, 0), (255, 0, 0), (0, 255, 0)
    masks = {'a': palette_image(ids(0, 1), black, red), 'b': palette_image(ids(0, 1), black, green)}
    words = write_pairs(tmp_path, masks)
    with pytest.raises(BadInput, match=r'b.png: index 1 is #00ff00 here, and #ff0000 in .*a.png'):
        prepare.command([*words, *TWO])
    prepare.command([*words, *TWO, '--map', *COLOURS])
    assert_same(imported(tmp_path), {'a': ids(0, 1), 'b': ids(0, 2)})


@pytest.mark.parametrize(
    'text',
    [
        '\ufeffname,r,g,b\r\nBackground,0,0,0\r\ncan,255,0,0\r\nbig bottle, 0, 255, 0\r\n',
        '# label:color_rgb:parts:actions\nbackground:0,0,0::\ncan:255,0,0::\nbig bottle:0,255,0:cap:\n',
        '0 0 0\tbackground\n255 0 0 can\n0 255 0\tbig bottle\n',
        'label;red;green;blue\nBackground;0;0;0\ncan;255;0;0\nbig bottle;0;255;0\n',
    ],
    ids=['class_dict.csv', 'labelmap.txt', 'label_colors.txt', 'Excel'],
)
def test_files_of_colours(tmp_path, text):
    (tmp_path / 'colours.txt').write_text(text)
    words = [*write_pairs(tmp_path, {'a': coded(MASK)}), '--map', str(tmp_path / 'colours.txt')]
    prepare.command(words)  # without --classes, they are those of the file
    assert_same(imported(tmp_path), {'a': MASK})
    prepare.command([*words, '--classes', 'big bottle', 'can', '--overwrite'])
    swapped = Competition(classes=('Background', 'big bottle', 'can'))
    assert_same(imported(tmp_path, swapped), {'a': np.array([0, 2, 1], np.uint8)[MASK]})


def test_a_table_of_ids(tmp_path):
    """Roboflow puts masks and _classes.csv beside the photos."""
    masks = {'a': ids(0, 2, 1, 0), 'b': ids(1, 1, 2, 2)}
    words = write_pairs(tmp_path, masks)
    table = tmp_path / '_classes.csv'
    table.write_text('Pixel Value, Class\n0, background\n2, can\n1, big bottle\n')
    prepare.command([*words, '--map', str(table)])
    swapped = np.array([0, 2, 1], np.uint8)  # the classes are can and big bottle
    assert_same(imported(tmp_path), {name: swapped[mask] for name, mask in masks.items()})
    with pytest.raises(BadInput, match='has the values of the classes, too; give --map .*_classes.csv'):
        prepare.command([*words, '--classes', str(table), '--overwrite'])
    table.write_text('0, background\n2, can\n')  # 1 is then no class, though there are so many
    with pytest.raises(BadInput, match='found the id 1'):
        prepare.command([*words, *TWO, '--map', str(table), '--overwrite'])


def test_a_file_of_names(tmp_path):
    (tmp_path / 'classes.txt').write_text('\ufeffcan\r\nbig bottle\r\n')
    prepare.command([*write_pairs(tmp_path, {'a': MASK}), '--classes', str(tmp_path / 'classes.txt')])
    assert_same(imported(tmp_path), {'a': MASK})


@pytest.mark.parametrize(
    ('text', 'message'),
    [
        ('Void,0,0,0\ncan,255,0,0\nbig bottle,0,255,0', r'found the colour #000000 \(Void in .*c.csv\)'),
        ('can,255,0,0\ncan,300,0,0', "line 2: found 'can,300,0,0', expected name,r,g,b"),
        ('can,255,0,0\nbig bottle,255,0,0', 'line 2: the value #ff0000 stands twice'),
        ('car,255,0,0', 'has none of the classes can, big bottle'),
        ('name,r,g,b', 'has no colours'),
        ('car,red', "line 1: found 'car,red', expected name,r,g,b"),
    ],
)
def test_files_of_colours_that_are_refused(tmp_path, text, message):
    (tmp_path / 'c.csv').write_text(text)
    words = [*write_pairs(tmp_path, {'a': coded(MASK)}), *TWO, '--map', str(tmp_path / 'c.csv')]
    with pytest.raises(BadInput, match=message):
        prepare.command(words)


@pytest.mark.parametrize('name', ['Void', 'unlabeled', 'UNLABELLED'])
@pytest.mark.parametrize('classes', [TWO, []], ids=['classes', 'those of the file'])
def test_void_in_a_file_of_colours_is_ignored_or_background(tmp_path, name, classes, capsys):
    (tmp_path / 'c.csv').write_text(f'name,r,g,b\n{name},0,0,0\ncan,255,0,0\nbig bottle,0,255,0\n')
    words = [*write_pairs(tmp_path, {'a': coded(MASK)}), *classes, '--map', str(tmp_path / 'c.csv')]
    with pytest.raises(BadInput, match=rf"#000000 \({name} in .*c.csv\).*; add --map '#000000'=NAME"):
        prepare.command(words)
    prepare.command([*words, '#000000=background'])
    assert_same(imported(tmp_path), {'a': MASK})
    prepare.command([*words, '#000000=ignore', '--overwrite'])
    assert_same(imported(tmp_path), {'a': np.where(MASK == 0, 255, MASK)})
    assert 'annotations of each class: can 1, big bottle 1, ignored 1' in capsys.readouterr().out


def test_ignored_regions_are_of_no_class(tmp_path, capsys):
    words = write_pairs(tmp_path, {'a': ids(0, 255, 2, 2), 'b': ids(0, 255, 2, 0)})
    prepare.command([*words, *TWO, '--map', '255=ignore'])
    capsys.readouterr()
    prepare.command(['check', '--data', str(tmp_path / 'out')])
    lines = capsys.readouterr().out.splitlines()
    rows = {line.rpartition(' ')[0][:15].strip(): line[15:].split() for line in lines}
    assert rows['can'] == ['0', '0', '0', '0', '0.00%'] and rows['ignored'] == ['2', '120', '25.00%']
    assert not any('are crowds' in line for line in lines)
    as_objects = CLASSES.model_copy(update={'crowds': 'objects'})
    masks = masks_of(read_coco(tmp_path / 'out', 'train', as_objects).photos)
    assert_same(masks, {'a': ids(0, 0, 2, 2), 'b': ids(0, 0, 2, 0)})


@pytest.mark.parametrize('name', ['Void', 'unlabeled', 'ignored'])
def test_tables_do_not_make_classes_of_what_is_none(tmp_path, name):
    rows = ['"name", "r", "g", "b"', f'{name}, 0, 0, 0', 'can, 255, 0, 0', 'big bottle, 0, 255, 0']
    (tmp_path / 'c.csv').write_text('\n'.join(rows))
    words = [*write_pairs(tmp_path, {'a': coded(MASK)}), '--map', str(tmp_path / 'c.csv')]
    if name != 'ignored':
        with pytest.raises(BadInput, match=rf"#000000 \({name} in .*; add --map '#000000'=NAME"):
            prepare.command(words)
        words.append('(0, 0, 0)=ignore')
    prepare.command(words)
    assert_same(imported(tmp_path), {'a': np.where(MASK == 0, 255, MASK)})


# --- which mask is whose ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('photo', 'mask', 'options'),
    [
        ('{}.jpg', '{}_mask.png', []),
        ('{}.jpg', '{}.jpg.png', []),
        ('{}.png', '{}_L.png', []),
        ('{}.png', '{}-mask.gif', []),
        ('{}.jpg', '{}_gtFine_labelIds.png', []),
        ('{}_sat.jpg', '{}_mask.png', ['--suffix', '_sat=_mask']),
        ('{}.jpg', '{}_b.png', ['--suffix', '_b']),
    ],
)
def test_names_of_masks(tmp_path, photo, mask, options, capsys):
    expected = {'a': ids(0, 1), 'a_1': ids(0, 2), 'sub/c': ids(1, 2)}
    words = write_pairs(tmp_path, {mask.format(name): Image.fromarray(m) for name, m in expected.items()})
    shutil.rmtree(tmp_path / 'p')
    for name in expected:
        (tmp_path / 'p' / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new('RGB', (WIDTH, HEIGHT)).save(tmp_path / 'p' / photo.format(name))
    prepare.command([*words, *TWO, *options])
    found = {name.removesuffix('_sat'): found for name, found in imported(tmp_path).items()}
    assert_same(found, {Path(name).name: m for name, m in expected.items()})


def test_photos_with_masks_of_several_kinds(tmp_path):
    masks = {
        'a_color.png': coded(MASK),
        'a_labelIds.png': MASK,
        'b_color.png': coded(MASK),
        'b_labelIds.png': MASK,
    }
    words = write_pairs(tmp_path, {name: Image.fromarray(mask) for name, mask in masks.items()})
    for path in (tmp_path / 'p').iterdir():
        path.rename(path.with_name(path.name.replace('_color', '').replace('_labelIds', '')))
    with pytest.raises(BadInput, match=r'each photo has several masks: _color, _labelIds; choose one'):
        prepare.command([*words, *TWO])
    prepare.command([*words, *TWO, '--suffix', '_labelIds'])
    assert_same(imported(tmp_path), {'a': MASK, 'b': MASK})


def test_photos_and_masks_in_one_folder(tmp_path):
    words = write_pairs(tmp_path, {'a_mask.png': Image.fromarray(MASK)})
    (tmp_path / 'm/a_mask.png').rename(tmp_path / 'p/a_mask.png')
    (tmp_path / 'p/a_mask.jpg').rename(tmp_path / 'p/a_sat.jpg')
    words[4] = words[2]
    with pytest.raises(BadInput, match=r'holds photos and masks; expected two folders, or .* --suffix _mask'):
        prepare.command([*words, *TWO])
    prepare.command([*words, *TWO, '--suffix', '_sat=_mask'])
    assert_same(imported(tmp_path), {'a_sat': MASK})


def test_masks_below_the_folder_of_the_photos(tmp_path):
    words = write_pairs(tmp_path, {'a': MASK})
    (tmp_path / 'm').rename(tmp_path / 'p/m')
    words[4] = str(tmp_path / 'p/m')
    prepare.command([*words, *TWO])
    assert_same(imported(tmp_path), {'a': MASK})


def test_names_in_two_unicode_forms(tmp_path):
    words = write_pairs(tmp_path, {unicodedata.normalize('NFC', '사진é'): MASK})
    for path in (tmp_path / 'p').iterdir():
        path.rename(path.with_name(unicodedata.normalize('NFD', path.name)))
    prepare.command([*words, *TWO])
    assert_same(imported(tmp_path), {unicodedata.normalize('NFC', '사진é'): MASK})


def test_two_photos_with_one_mask(tmp_path):
    words = write_pairs(tmp_path, {'a': MASK})
    Image.new('RGB', (WIDTH, HEIGHT)).save(tmp_path / 'p/a.png')
    with pytest.raises(BadInput, match=r'a.png: would be the mask of a.jpg and of a.png'):
        prepare.command([*words, *TWO])


@pytest.mark.parametrize('name', ['a.jpg', 'a.png'])
def test_masks_with_losses_are_refused(tmp_path, name):
    words = write_pairs(tmp_path, {'a': MASK})
    (tmp_path / 'm/a.png').unlink()
    Image.fromarray(MASK).save(tmp_path / 'm' / name, 'JPEG')
    with pytest.raises(BadInput, match=rf'{name}: is a JPEG or WebP, which changes ids'):
        prepare.command([*words, *TWO])


JUNK = [
    '._a.jpg',
    '.DS_Store',
    'Thumbs.db',
    '__MACOSX/._a.jpg',
    '@eaDir/a.jpg',
    '.ipynb_checkpoints/a-checkpoint.jpg',
]


def test_what_systems_leave_beside_photos_is_left_out(tmp_path):
    words = write_pairs(tmp_path, {'a': MASK})
    for folder in ('p', 'm'):
        for name in [*JUNK, *(name.replace('.jpg', '.png') for name in JUNK)]:
            (tmp_path / folder / name).parent.mkdir(exist_ok=True)
            (tmp_path / folder / name).write_bytes(b'Mac OS X        ')
    prepare.command([*words, *TWO])
    assert_same(imported(tmp_path), {'a': MASK})


def test_masks_without_a_photo(tmp_path, capsys):
    words = write_pairs(tmp_path, {'a': MASK, 'overview': MASK})
    (tmp_path / 'p/overview.jpg').unlink()
    prepare.command([*words, *TWO])
    assert 'left out: 1 masks that belong to no photo, such as' in capsys.readouterr().out
    assert_same(imported(tmp_path), {'a': MASK})
    (tmp_path / 'm/overview.png').rename(tmp_path / 'm/a_2.png')
    with pytest.raises(BadInput, match=r'a_2.png: seems to be another mask of a photo that has one'):
        prepare.command([*words, *TWO, '--overwrite'])
    prepare.command([*words, *TWO, '--overwrite', '--suffix', ''])
    assert_same(imported(tmp_path), {'a': MASK})


# --- photos -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize('number', [3, 6])
@pytest.mark.parametrize('of_photo', [False, True])
def test_masks_with_an_exif_turn_of_their_own(tmp_path, number, of_photo):
    mask = MASK.copy()
    mask[:3] = 1
    words = write_pairs(tmp_path, {'a': mask})
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = number
    stored = np.ascontiguousarray(np.rot90(mask, {3: 2, 6: 1}[number]))
    Image.fromarray(stored).save(tmp_path / 'm/a.png', exif=exif)
    if of_photo:
        Image.new('RGB', stored.shape[::-1]).save(tmp_path / 'p/a.jpg', exif=exif)
    prepare.command([*words, *TWO])
    assert_same(imported(tmp_path), {'a': mask})
    if of_photo:
        prepare.command([*words, *TWO, '--orientation', 'stored', '--overwrite'])
        assert_same(imported(tmp_path), {'a': mask})


def test_a_turned_photo_whose_mask_is_of_the_stored_size(tmp_path, capsys):
    mask = MASK.copy()
    mask[:3] = 1
    words = write_pairs(tmp_path, {'a': mask})
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    pixels = np.full((HEIGHT, WIDTH, 3), 200, np.uint8)
    pixels[mask == 1] = 0
    Image.fromarray(pixels).save(tmp_path / 'p/a.jpg', exif=exif, quality=95)
    with pytest.raises(BadInput, match=r'its photo has 20x12 as displayed.*--orientation stored'):
        prepare.command([*words, *TWO])
    prepare.command([*words, *TWO, '--orientation', 'stored'])
    coco = read_coco(tmp_path / 'out', 'train', CLASSES)
    (photo,) = coco.photos
    assert (photo.height, photo.width) == (WIDTH, HEIGHT)
    dark = read_photo(coco, photo)[..., 0] < 100
    assert np.array_equal(dark, draw_mask(photo) == 1) and dark.any()
    assert 'EXIF turn, taken as drawn on the photo as stored' in capsys.readouterr().out


def test_photos_of_16_bits_are_scaled_by_one_range(tmp_path, capsys):
    words = write_pairs(tmp_path, {'a': MASK, 'b': MASK}, photo='{}.png')
    (tmp_path / 't').mkdir()
    for path, low, high in [('p/a.png', 1000, 1500), ('p/b.png', 2000, 3000), ('t/c.png', 500, 2500)]:
        values = np.full((HEIGHT, WIDTH), low, np.uint16)
        values[0] = high
        Image.fromarray(values).save(tmp_path / path)
    Image.new('RGB', (WIDTH, HEIGHT), (7, 8, 9)).save(tmp_path / 't/d.png')
    content = (tmp_path / 't/d.png').read_bytes()
    prepare.command([*words, *TWO, '--test', str(tmp_path / 't')])
    assert '8-bit RGB: 3; the values 500 to 3000 became 0 to 255' in capsys.readouterr().out
    competition = read_competition(tmp_path / 'out')
    assert competition.intensity == (500, 3000) and (tmp_path / 'out/d.png').read_bytes() == content
    for name, low, high in [('a.png', 51, 102), ('b.png', 153, 255), ('c.png', 0, 204)]:
        pixels = np.asarray(Image.open(tmp_path / 'out' / name))
        assert pixels.shape == (HEIGHT, WIDTH, 3) and (pixels[0] == high).all() and (pixels[1:] == low).all()


@pytest.mark.parametrize(
    ('options', 'message'),
    [
        (['--classes', 'can', 'Can'], '--classes: classes: two of them have the same name'),
        (['--classes', 'can', '--cfg', 'configs/demo.yaml'], 'expected --classes or --cfg, not both'),
        (['--classes', 'background'], 'found'),
    ],
)
def test_classes_that_are_refused(tmp_path, options, message):
    with pytest.raises(BadInput, match=message):
        prepare.command([*write_pairs(tmp_path, {'a': MASK}), *options])


def test_classes_and_groups_of_a_competition_yaml_that_lies_there(tmp_path):
    words = write_pairs(tmp_path, {'a': MASK})
    (tmp_path / 'out').mkdir()
    text = "classes: [Background, can, big bottle]\ngroup: '^[a-z]'\n"
    (tmp_path / 'out/competition.yaml').write_text(text)
    prepare.command(words)
    assert_same(imported(tmp_path, CLASSES.model_copy(update={'group': '^[a-z]'})), {'a': MASK})


def test_written_masks_can_be_imported_again(tmp_path):
    data, masks, out = write_set(tmp_path / 'd', train=6, test=2, side=96), tmp_path / 'm', tmp_path / 'out'
    content = json.loads((data / 'train_all.json').read_text())
    content['annotations'][0]['iscrowd'] = 1
    (data / 'train_all.json').write_text(json.dumps(content))
    for split in ('train', 'test'):
        for photo in read_coco(data, split, HOME).photos:
            (tmp_path / split / photo.file_name).parent.mkdir(parents=True, exist_ok=True)
            (data / photo.file_name).rename(tmp_path / split / photo.file_name)
    prepare.command(['masks', '--data', str(data), '--out', str(masks)])
    (masks / 'batch_01/0003.jpg.png').rename(masks / 'batch_01/0003.png')
    words = ['--photos', str(tmp_path / 'train'), '--masks', str(masks), '--test', str(tmp_path / 'test')]
    prepare.command(['from-masks', *words, '--out', str(out)])
    imported, expected = (masks_of(read_coco(root, 'train', HOME).photos) for root in (out, data))
    assert_same(imported, expected)
    assert any((mask == 255).any() for mask in imported.values())
    assert [photo.file_name for photo in read_coco(out, 'test', HOME).photos] == [
        f'batch_01/{i:04d}.jpg' for i in (6, 7)
    ]
    prepare.command(['check', '--data', str(out)])


@pytest.mark.parametrize(
    ('size', 'message'),
    [
        ((HEIGHT, WIDTH), 'found 20x12 pixels, its photo has 12x20: its height and width are swapped'),
        ((WIDTH, HEIGHT * 2), 'found 24x20 pixels, its photo has 12x20$'),
    ],
)
def test_masks_of_another_size(tmp_path, size, message):
    words = write_pairs(tmp_path, {'a': MASK})
    Image.new('L', size, 1).save(tmp_path / 'm/a.png')
    with pytest.raises(BadInput, match=message):
        prepare.command([*words, *TWO])


def test_a_photo_without_a_mask(tmp_path):
    words = write_pairs(tmp_path, {'a': MASK, 'b': MASK})
    (tmp_path / 'm/a.png').unlink()
    with pytest.raises(
        BadInput, match=r'a.jpg: has no mask; expected .*m/a.jpg.png or .*m/a.png; .*--suffix'
    ):
        prepare.command([*words, *TWO])


@pytest.mark.parametrize(
    ('names', 'message'),
    [
        (['a_mask.png', 'b_mask.png'], r'c.jpg: has no mask; .*$'),
        (
            ['a/1.png', 'b/1.png', 'c/1.png'],
            r'a.jpg: has no mask; .* there is a folder .*m/a; draw its masks',
        ),
        ([f'{n}_{k}.png' for n in 'abc' for k in (1, 2)], 'several masks: _1, _2; if each is of one object'),
    ],
)
def test_names_that_nearly_fit(tmp_path, names, message):
    words = [*write_pairs(tmp_path, {'x.png': Image.fromarray(MASK)}), *TWO]
    for path in [*(f'm/{name}' for name in names), *(f'p/{name}.jpg' for name in 'abc')]:
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_bytes((tmp_path / 'm/x.png').read_bytes())
    (tmp_path / 'p/x.jpg').unlink()
    if 'c.jpg' in message:
        with pytest.raises(BadInput, match=r'a.jpg: has no mask; .* there is .*m/a_mask.png: --suffix _mask'):
            prepare.command(words)
        words += ['--suffix', '_mask']
    with pytest.raises(BadInput, match=message):
        prepare.command(words)


def test_a_photo_with_two_masks(tmp_path):
    words = write_pairs(tmp_path, {'a': MASK})
    (tmp_path / 'm/a.jpg.png').write_bytes((tmp_path / 'm/a.png').read_bytes())
    with pytest.raises(BadInput, match='has two masks'):
        prepare.command(words)


def test_photos_are_stored_upright_in_rgb(tmp_path):
    """Import photos with an EXIF orientation, two pictures in one file as phones write them, grey, with
    alpha.
    """
    (tmp_path / 'p').mkdir()
    (tmp_path / 'm').mkdir()
    upright = np.zeros((20, 40, 3), np.uint8)
    upright[:, :8] = 255
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    turned = Image.fromarray(upright).transpose(Image.Transpose.ROTATE_90)
    turned.save(tmp_path / 'p/turned.jpg', exif=exif, quality=97)
    turned.save(tmp_path / 'p/two.jpg', 'MPO', exif=exif, quality=97, save_all=True, append_images=[turned])
    Image.fromarray(upright).convert('L').save(tmp_path / 'p/grey.png')
    Image.fromarray(upright).convert('RGBA').save(tmp_path / 'p/alpha.png')
    mask = np.zeros((20, 40), np.uint8)
    mask[:, :8] = 4
    for name in ('turned', 'two', 'grey', 'alpha'):
        Image.fromarray(mask).save(tmp_path / f'm/{name}.png')
    out = tmp_path / 'out'
    words = ['--photos', str(tmp_path / 'p'), '--masks', str(tmp_path / 'm'), '--out', str(out)]
    prepare.command(['from-masks', *words])
    coco = read_coco(out, 'train', HOME)
    assert len(coco.photos) == 4
    assert (out / 'two.jpg').read_bytes() == (out / 'turned.jpg').read_bytes()
    for photo in coco.photos:
        assert np.array_equal(draw_mask(photo), mask)
        assert np.abs(read_photo(coco, photo).astype(int) - upright).max() < 30


# --- classes that overlap, and what a competition.yaml says -------------------------------------------------


def write_planes(root: Path, planes: np.ndarray, names: Sequence[str], scale: int = 1) -> list[str]:
    """Write a photo and a folder of masks for each class; return the words of the command."""
    (root / 'p/x').mkdir(parents=True)
    Image.new('RGB', planes.shape[:0:-1], (9, 9, 9)).save(root / 'p/x/a.jpg')
    for name, plane in zip(names, planes, strict=True):
        (root / 'm' / name / 'x').mkdir(parents=True)
        Image.fromarray(plane * np.uint8(scale)).save(root / f'm/{name}/x/a.png')
    words = ['--photos', str(root / 'p'), '--masks', str(root / 'm'), '--out', str(root / 'out')]
    return ['from-masks', '--task', 'multilabel', *words]


@pytest.mark.parametrize('scale', [1, 255])
def test_a_folder_of_masks_for_each_class(tmp_path, scale, capsys):
    planes = np.random.default_rng(0).integers(0, 2, (3, 20, 30)).astype(np.uint8)
    words = write_planes(tmp_path, planes, ['c10', 'c9', 'big bottle'], scale)
    if scale == 255:
        with pytest.raises(BadInput, match='are these masks of 0 and 255\\?'):
            prepare.command(words)
        words += ['--map', '255=1']
    prepare.command(words)
    competition = read_competition(tmp_path / 'out')
    assert competition.classes == ('big bottle', 'c9', 'c10') and competition.is_multilabel
    assert 'classes (3), the folders of' in capsys.readouterr().out
    (photo,) = read_coco(tmp_path / 'out', 'train', competition).photos
    np.testing.assert_array_equal(draw_truth(photo, competition), planes[::-1])
    prepare.command([*words, '--overwrite', '--classes', 'c10', 'big bottle'])
    competition = read_competition(tmp_path / 'out')
    (photo,) = read_coco(tmp_path / 'out', 'train', competition).photos
    np.testing.assert_array_equal(draw_truth(photo, competition), planes[[0, 2]])
    with pytest.raises(BadInput, match='m/can: no such folder; expected one of masks for each class'):
        prepare.command([*words, '--overwrite', '--classes', 'c10', 'can'])


def test_masks_of_each_class_come_back(tmp_path):
    """`masks` writes what `from-masks` reads, regions that are ignored too."""
    planes = np.random.default_rng(0).choice(np.uint8([0, 1, 255]), (2, 20, 30))
    words = write_planes(tmp_path, planes, ['can', 'lid'])
    prepare.command([*words, '--map', '255=ignore'])
    prepare.command(['masks', '--data', str(tmp_path / 'out'), '--out', str(tmp_path / 'again')])
    for name, plane in zip(('can', 'lid'), planes, strict=True):
        np.testing.assert_array_equal(Image.open(tmp_path / f'again/{name}/x/a.jpg.png'), plane)
    places = ['--masks', str(tmp_path / 'again'), '--map', '255=ignore']
    prepare.command([*words[:5], *places, '--out', str(tmp_path / 'out2')])
    assert json.loads((tmp_path / 'out/train_all.json').read_text()) == json.loads(
        (tmp_path / 'out2/train_all.json').read_text()
    )


def test_training_and_test_photos_of_the_same_names(tmp_path, capsys):
    """As of slices that are numbered from 0 in both folders."""
    words = write_pairs(tmp_path, {'0': MASK, '1': MASK}, photo='{}.png')
    (tmp_path / 't').mkdir()
    for name in ('1', '2'):
        Image.new('RGB', (WIDTH, HEIGHT), (int(name),) * 3).save(tmp_path / f't/{name}.png')
    prepare.command([*words, *TWO, '--test', str(tmp_path / 't')])
    assert 'names that training and test photos share: 1, such as 1.png' in capsys.readouterr().out
    assert_same(imported(tmp_path), {'0': MASK, '1': MASK})
    photos = read_coco(tmp_path / 'out', 'train', read_competition(tmp_path / 'out')).photos
    assert [photo.file_name for photo in photos] == ['train/0.png', 'train/1.png']
    tests = read_coco(tmp_path / 'out', 'test', read_competition(tmp_path / 'out'))
    assert [photo.file_name for photo in tests.photos] == ['test/1.png', 'test/2.png']
    assert (read_photo(tests, tests.photos[1]) == 2).all()


def test_what_a_competition_yaml_says_of_scores_stays(tmp_path):
    words = write_pairs(tmp_path, {'a': MASK}, photo='{}.png')
    (tmp_path / 'out').mkdir()
    text = 'metric: dice\nscore_size: 512\ncrowds: objects\nsubmission: {order: row}\ngroup: a|b\n'
    (tmp_path / 'out/competition.yaml').write_text(text)
    prepare.command([*words, *TWO])
    competition = read_competition(tmp_path / 'out')
    assert (competition.metric, competition.score_size, competition.group) == ('dice', 512, 'a|b')
    assert competition.submission.order == 'row' and competition.crowds == 'ignored'


@pytest.mark.parametrize(
    ('text', 'facts'),
    [
        ('channels: 1\n', {'channels': 1, 'depth': 16, 'intensity': ((7, 3000),)}),
        ('channels: 1\nintensity: [0, 4095]\n', {'channels': 1, 'depth': 16, 'intensity': (0, 4095)}),
        ('depth: 16\nslices: {offsets: [-1, 0, 1]}\n', {'channels': 3, 'depth': 16}),
    ],
)
def test_bands_of_a_competition_yaml_stay(tmp_path, text, facts):
    words = write_pairs(tmp_path, {'a_1': MASK}, photo='{}.png')
    Image.fromarray(np.linspace(7, 3000, MASK.size).reshape(MASK.shape).astype(np.uint16)).save(
        tmp_path / 'p/a_1.png'
    )
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out/competition.yaml').write_text(text)
    prepare.command([*words, *TWO])
    competition = read_competition(tmp_path / 'out')
    assert {key: getattr(competition, key) for key in facts} == facts
    assert bool(competition.slices) == ('slices' in text)
    assert (tmp_path / 'out/a_1.png').read_bytes() == (tmp_path / 'p/a_1.png').read_bytes()
    Image.fromarray(coded(MASK)).save(tmp_path / 'p/a_1.png')
    with pytest.raises(
        BadInput, match='a_1.png: found 3 bands, but channels: . in competition.yaml expects 1'
    ):
        prepare.command([*words, *TWO, '--overwrite'])


def test_value_0_may_be_a_class_as_real_as_the_others(tmp_path, capsys):
    words = write_pairs(tmp_path, {'a': ids(0, 1, 2, 11)})
    (tmp_path / 'out').mkdir()
    (tmp_path / 'out/competition.yaml').write_text('classes: [sky, road, car]\n')
    prepare.command([*words, '--map', '11=ignore'])
    assert 'values of the masks: 0 sky, 1 road, 2 car, 11 ignored' in capsys.readouterr().out
    competition = read_competition(tmp_path / 'out')
    assert_same(masks_of(read_coco(tmp_path / 'out', 'train', competition).photos), {'a': ids(0, 1, 2, 255)})
    assert list(competition.scored_ids) == [0, 1, 2]


def test_a_set_of_the_home_classes_is_scored_as_at_home(tmp_path):
    prepare.command(write_pairs(tmp_path, {'a': MASK}, photo='{}.png'))
    assert read_competition(tmp_path / 'out') == HOME
