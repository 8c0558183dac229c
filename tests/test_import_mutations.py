"""Change the input of each importer as tools and people do: the set is right, or one line says what is wrong.

The grey of each pixel of a photo tells its class, so that an imported set can be judged by its photos alone.
"""

import re
import shutil
import tempfile
import unicodedata
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

import prepare
from config import read_competition
from data.coco import draw_mask, read_coco, read_photo
from utils.errors import BadInput

HEIGHT, WIDTH = 16, 24
GREYS = np.array([30, 110, 200], np.uint8)  # of the background and two classes
NAMES = ['can', 'big bottle']
QUICK = settings(max_examples=40, deadline=None, derandomize=True, database=None)
Mutation = Callable[[Path], None]


def make_masks() -> dict[str, np.ndarray]:
    """Return masks of a rectangle each, of either class, and one of both."""
    masks = {}
    for n, (k, y, x) in enumerate([(1, 2, 3), (2, 5, 8), (1, 8, 12), (2, 1, 1)]):
        mask = np.zeros((HEIGHT, WIDTH), np.uint8)
        mask[y : y + 6, x : x + 9] = k
        masks[f'é{n}'] = mask
    masks['é3'][12:, :4] = 1
    return masks


MASKS = make_masks()


def assert_right(root: Path) -> None:
    """Check that the mask of each imported photo is what its greys say, and that photos were imported."""
    competition = read_competition(root / 'out')
    assert competition.classes == ('Background', *NAMES)
    coco = read_coco(root / 'out', 'train', competition)
    for photo in coco.photos:
        expected = np.abs(read_photo(coco, photo)[..., :1].astype(int) - GREYS).argmin(2)
        mask = draw_mask(photo)
        assert np.array_equal(mask, expected), photo.file_name
    assert len(coco.photos) >= len(MASKS) - 1 and any(photo.annotations for photo in coco.photos)


def judge(root: Path, words: list[str], mutations: list[Mutation]) -> str:
    """Apply the changes, import, and judge; return the one line, or '' for a set that is right."""
    for mutation in mutations:
        mutation(root)
    try:
        prepare.command([*words, '--out', str(root / 'out')])
    except BadInput as error:
        assert len(str(error).splitlines()) == 1 and not (root / 'out/train_all.json').exists()
        return str(error)
    assert_right(root)
    return ''


def photo_of(mask: np.ndarray) -> Image.Image:
    return Image.fromarray(GREYS[mask]).convert('RGB')


# --- masks --------------------------------------------------------------------------------------------------


def write_mask_set(root: Path) -> list[str]:
    for folder in ('p', 'm'):
        (root / folder).mkdir()
    for name, mask in MASKS.items():
        photo_of(mask).save(root / f'p/{name}.png')
        Image.fromarray(mask).save(root / f'm/{name}.png')
    return ['from-masks', '--photos', str(root / 'p'), '--masks', str(root / 'm'), '--classes', *NAMES]


def each(change: Callable[[np.ndarray], object], only: int | None = None, **options: object) -> Mutation:
    """Return a mutation that saves the masks again, or one of them, as `change` makes them of the ids."""

    def mutate(root: Path) -> None:
        for path in sorted((root / 'm').glob('*.png'))[slice(only, None if only is None else only + 1)]:
            try:
                with Image.open(path) as image:
                    image.load()
            except OSError:
                continue  # another mutation was here
            if image.mode != 'L' or np.asarray(image).max() > 2:
                continue
            made = change(np.asarray(image))
            made = made if isinstance(made, Image.Image) else Image.fromarray(made)
            made.save(path, **options)

    return mutate


def palette(*colours: int) -> Callable[[np.ndarray], Image.Image]:
    """Return a change to indices, of which the colours are 0xRRGGBB."""

    def change(mask: np.ndarray) -> Image.Image:
        image = Image.fromarray(mask, 'P')
        image.putpalette(b''.join(colour.to_bytes(3) for colour in colours))
        return image

    return change


def on_files(pattern: str, act: Callable[[Path], object], only: int | None = None) -> Mutation:
    """Return a mutation that acts on the files of a pattern, or on one of them."""

    def mutate(root: Path) -> None:
        paths = sorted(root.glob(pattern))
        for path in paths if only is None else paths[only : only + 1]:
            act(path)

    return mutate


def rename(change: Callable[[str], str]) -> Callable[[Path], object]:
    return lambda path: path.rename(path.with_name(change(path.name)))


def soften(mask: np.ndarray) -> Image.Image:
    return (
        Image.fromarray(mask * 100)
        .resize((WIDTH, HEIGHT * 2), Image.Resampling.BILINEAR)
        .resize((WIDTH, HEIGHT))
    )


def junk(path: Path) -> None:
    for name in (
        f'._{path.name}',
        '.DS_Store',
        'Thumbs.db',
        '__MACOSX/x.png',
        '@eaDir/x.jpg',
        '.ipynb_checkpoints/x.png',
    ):
        (path.parent / name).parent.mkdir(exist_ok=True)
        (path.parent / name).write_bytes(b'junk')


RIGHT_MASKS = {
    'RGB': each(lambda mask: np.stack([mask] * 3, 2)),
    'one RGB': each(lambda mask: np.stack([mask] * 3, 2), only=1),
    'RGBA': each(lambda mask: np.dstack([mask] * 3 + [np.full_like(mask, 255)])),
    'LA': each(lambda mask: np.dstack([mask, np.full_like(mask, 255)]), only=2),
    '16 bits': each(lambda mask: mask.astype(np.uint16)),
    'palette': each(palette(0, 0x800000, 0x8000)),
    'grey palette': each(palette(0, 0x010101, 0x020202)),
    'suffix': on_files('m/*.png', rename(lambda name: name.replace('.png', '_mask.png'))),
    'photo.png.png': on_files('m/*.png', rename(lambda name: f'{name}.png')),
    'upper case': on_files('m/*.png', rename(lambda name: name.replace('.png', '.PNG')), only=0),
    'NFD masks': on_files('m/*.png', rename(lambda name: unicodedata.normalize('NFD', name))),
    'NFD photo': on_files('p/*.png', rename(lambda name: unicodedata.normalize('NFD', name)), only=1),
    'junk': on_files('*/*.png', junk),
    'without a photo': on_files('p/*.png', Path.unlink, only=3),
    'notes': on_files('m/*.png', lambda path: path.with_suffix('.txt').write_text('notes')),
}
WRONG_MASKS = {
    'without a mask': on_files('m/*.png', Path.unlink, only=0),
    'another name': on_files('m/*.png', rename(lambda name: f'x{name}'), only=2),
    'two masks': on_files('m/*.png', lambda path: shutil.copy(path, f'{path}.png'), only=1),
    'suffix of one': on_files(
        'm/*.png', lambda path: shutil.copy(path, f'{path.with_suffix("")}_2.png'), only=1
    ),
    'photo twice': on_files('p/*.png', lambda path: shutil.copy(path, path.with_suffix('.bmp')), only=0),
    'HEIC': on_files('p/*.png', lambda path: path.with_suffix('.heic').write_bytes(b'x'), only=0),
    'cut off': on_files('m/*.png', lambda path: path.write_bytes(path.read_bytes()[:60]), only=3),
    'empty': on_files('m/*.png', lambda path: path.write_bytes(b''), only=0),
    'cut-off photo': on_files('p/*.png', lambda path: path.write_bytes(path.read_bytes()[:80]), only=2),
    'JPEG': each(lambda mask: mask, only=1, format='JPEG'),
    'turned': each(lambda mask: np.ascontiguousarray(mask.T), only=0),
    'larger': each(lambda mask: mask.repeat(2, 0), only=1),
    '0 and 255': each(lambda mask: np.where(mask > 0, 255, 0).astype(np.uint8)),
    '0, 128, 255': each(lambda mask: np.array([0, 128, 255], np.uint8)[mask]),
    'from 1 on': each(lambda mask: mask + 1),
    'stretched': each(lambda mask: mask.astype(np.uint16) * 257),
    'colours': each(lambda mask: np.array([[0, 0, 0], [255, 0, 0], [0, 0, 255]], np.uint8)[mask]),
    'colours of one': each(lambda mask: np.array([[0, 0, 0], [9, 0, 0], [0, 0, 9]], np.uint8)[mask], only=2),
    'soft edges': each(soften),
    'transparent': each(lambda mask: np.dstack([mask] * 3 + [np.where(mask, 255, 0).astype(np.uint8)])),
    'palettes that differ': each(lambda mask: palette(0, int((mask == 2).sum()), 0xFF00)(mask)),
    'black is 1': each(lambda mask: palette(0xFF, 0, 0xFF00)((mask + 1) % 3)),
    'floats': each(lambda mask: mask.astype(np.float32), format='TIFF'),
    'frames': each(
        lambda mask: mask,
        only=0,
        format='GIF',
        save_all=True,
        append_images=[Image.new('L', (WIDTH, HEIGHT), 1)],
    ),
}


@pytest.mark.parametrize('name', RIGHT_MASKS)
def test_masks_that_are_read(tmp_path, name):
    assert judge(tmp_path, write_mask_set(tmp_path), [RIGHT_MASKS[name]]) == ''


@pytest.mark.parametrize('name', WRONG_MASKS)
def test_masks_that_are_refused(tmp_path, name):
    assert judge(tmp_path, write_mask_set(tmp_path), [WRONG_MASKS[name]]) != ''


ALL_MASKS = RIGHT_MASKS | WRONG_MASKS


@QUICK
@given(st.lists(st.sampled_from(sorted(ALL_MASKS)), min_size=2, max_size=4, unique=True))
def test_masks_that_are_changed_in_several_ways(names):
    with tempfile.TemporaryDirectory() as folder:
        judge(Path(folder), write_mask_set(Path(folder)), [ALL_MASKS[name] for name in names])


# --- YOLO ---------------------------------------------------------------------------------------------------


def write_yolo_set(root: Path) -> list[str]:
    """Write the objects of the masks as polygons of pixels' corners, in the layout of Ultralytics."""
    for folder in ('y/images/train', 'y/labels/train'):
        (root / folder).mkdir(parents=True)
    for name, mask in MASKS.items():
        photo_of(mask).save(root / f'y/images/train/{name}.png')
        lines = []
        for k in np.unique(mask[mask > 0]):
            (top, left), (bottom, right) = (np.argwhere(mask == k).min(0), np.argwhere(mask == k).max(0) + 1)
            points = [(left, top), (right, top), (right, bottom), (left, bottom)]
            lines.append(' '.join([str(k - 1), *(f'{x / WIDTH:.6f} {y / HEIGHT:.6f}' for x, y in points)]))
        (root / f'y/labels/train/{name}.txt').write_text('\n'.join(lines))
    settings = {
        'path': '/content/set',
        'train': 'images/train',
        'val': 'images/train',
        'nc': 2,
        'names': NAMES,
    }
    (root / 'y/data.yaml').write_text(yaml.safe_dump(settings))
    return ['yolo', '--yaml', str(root / 'y/data.yaml')]


LABELS = 'y/labels/*/*.txt'


def in_text(pattern: str, old: str, new: str, only: int | None = None, count: int = 0) -> Mutation:
    """Return a mutation that replaces a regular expression in text files."""

    def act(path: Path) -> None:
        path.write_text(
            re.sub(old, new, path.read_text(encoding='utf-8-sig'), count=count, flags=re.MULTILINE)
        )

    return on_files(pattern, act, only)


def in_settings(**changes: object) -> Mutation:
    def act(path: Path) -> None:
        path.write_text(yaml.safe_dump(yaml.safe_load(path.read_text(encoding='utf-8-sig')) | changes))

    return on_files('y/data.yaml', act)


def as_windows(path: Path) -> None:
    text = path.read_bytes().removeprefix(b'\xef\xbb\xbf').replace(b'\r\n', b'\n')
    path.write_bytes(b'\xef\xbb\xbf' + text.replace(b'\n', b'\r\n'))


def as_roboflow(root: Path) -> None:
    for kind in ('images', 'labels'):
        if (root / f'y/{kind}/train').exists():
            (root / 'y/valid').mkdir(exist_ok=True)
            (root / f'y/{kind}/train').rename(root / f'y/valid/{kind}')
    in_settings(train='../valid/images', val='../valid/images')(root)


def as_list(root: Path) -> None:
    paths = sorted((root / 'y/images').rglob('*.png'))
    lines = [f'data/{path.relative_to(root / "y").as_posix()}' for path in paths]
    (root / 'y/train.txt').write_text('\n'.join(lines))
    in_settings(train='train.txt', val=None)(root)


RIGHT_YOLO = {
    'Windows': on_files('y/**/*.txt', as_windows),
    'data.yaml of Windows': on_files('y/data.yaml', as_windows),
    'names by id': in_settings(names={'0': NAMES[0], 1: NAMES[1]}),
    'without nc': in_settings(nc=None),
    'tabs and blank lines': in_text(LABELS, r' |$', '\t'),
    'float ids': in_text(LABELS, r'^(\d) ', r'\1.0 '),
    'exponents': in_text(LABELS, r'(0\.\d+)', r'\1e0'),
    'lines twice': in_text(LABELS, r'^(.+)$', r'\1\n\1'),
    'closed': in_text(LABELS, r'^(\S+) (\S+ \S+)(.*)$', r'\1 \2\3 \2'),
    'NFD labels': on_files(LABELS, rename(lambda name: unicodedata.normalize('NFD', name))),
    'classes.txt': on_files(LABELS, lambda path: path.with_name('classes.txt').write_text('\n'.join(NAMES))),
    'junk': on_files('y/*/train/*', junk),
    'Roboflow': as_roboflow,
    'list': as_list,
    'upper case': on_files('y/images/train/*', rename(lambda name: name.replace('.png', '.PNG')), only=1),
    'path': in_settings(path='.'),
}
WRONG_YOLO = {
    'another name': on_files(LABELS, rename(lambda name: f'x{name}'), only=2),
    'more labels': on_files(LABELS, lambda path: shutil.copy(path, f'{path.with_suffix("")}_2.txt'), only=0),
    'no labels': on_files(LABELS, Path.unlink),
    'labels elsewhere': on_files('y/labels', rename(lambda name: 'annotations')),
    'a box': in_text(LABELS, r'^(\S+)( \S+ \S+ \S+ \S+).*', r'\1\2', only=0, count=1),
    'boxes': in_text(LABELS, r'^(\S+)( \S+ \S+ \S+ \S+).*', r'\1\2'),
    'confidence': in_text(LABELS, r'$', ' 0.91'),
    'cut off': in_text(LABELS, r' \S+\Z', '', only=3),
    'pose': in_text(LABELS, r'^(\S+)( \S+ \S+ \S+ \S+)( .*)', r'\1\2 0.5 0.5 2 0.4 0.4 1'),
    'ids from 1 on': in_text(LABELS, r'^1', '2'),
    'names': in_text(LABELS, r'^0', 'can'),
    'pixels': in_text(LABELS, r'0\.(\d+)', r'\1'),
    'commas': in_text(LABELS, ' ', ','),
    'kpt_shape': in_settings(kpt_shape=[17, 3]),
    'nc': in_settings(nc=3),
    'a name less': in_settings(names=NAMES[:1]),
    'names with a gap': in_settings(names={0: NAMES[0], 2: NAMES[1]}),
    'test is train': in_settings(test='images/train'),
    'no folder': in_settings(train='images/train2017'),
    'photo twice': on_files(
        'y/images/*/*.png', lambda path: shutil.copy(path, path.with_suffix('.bmp')), only=0
    ),
    'cut-off photo': on_files(
        'y/images/*/*.png', lambda path: path.write_bytes(path.read_bytes()[:80]), only=2
    ),
    'UTF-16': on_files(LABELS, lambda path: path.write_text(path.read_text(), encoding='utf-16'), only=1),
}


@pytest.mark.parametrize('name', RIGHT_YOLO)
def test_yolo_sets_that_are_read(tmp_path, name):
    assert judge(tmp_path, write_yolo_set(tmp_path), [RIGHT_YOLO[name]]) == ''


@pytest.mark.parametrize('name', WRONG_YOLO)
def test_yolo_sets_that_are_refused(tmp_path, name):
    assert judge(tmp_path, write_yolo_set(tmp_path), [WRONG_YOLO[name]]) != ''


@QUICK
@given(
    st.lists(st.sampled_from(sorted(RIGHT_YOLO)), min_size=1, max_size=4, unique=True),
    st.none() | st.sampled_from(sorted(WRONG_YOLO.keys() - {'UTF-16'})),
)
def test_yolo_sets_that_are_changed_in_several_ways(names, wrong):
    with tempfile.TemporaryDirectory() as folder:
        mutations = [RIGHT_YOLO[name] for name in names]
        judge(
            Path(folder), write_yolo_set(Path(folder)), [*mutations, *([WRONG_YOLO[wrong]] if wrong else [])]
        )
