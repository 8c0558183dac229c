"""COCO annotations to photos and masks: read, checked record by record, drawn. No torch here: ensemble.py
and viz.py read truth too.

Shapes: H W a photo's own height and width. Ids: 0 background, category_id elsewhere, IGNORED where nobody
knows.
"""

import hashlib
import json
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image, UnidentifiedImageError
from pycocotools import mask as rle_codec

from config import is_plain
from metrics import IGNORED
from utils.errors import BadInput, one_line
from utils.files import refuse_device

# beyond these a record is a mistake or an attack
MAX_SIDE = 20_000  # of a photo, in pixels
MAX_PIXELS = 1 << 27
MAX_OUTLINE = 1_000_000  # length of a polygon, in pixels: drawing takes some 100 bytes for each
FORMATS = ('BMP', 'JPEG', 'PNG', 'TIFF', 'WEBP')  # Pillow's others have run programs, such as gs
Image.MAX_IMAGE_PIXELS = MAX_PIXELS // 2  # Pillow refuses twice as many, in every reader of images
# what Pillow's decoders raise for bytes that are not what they expect
UNREADABLE = (
    UnidentifiedImageError, OSError, SyntaxError, ValueError, LookupError, TypeError, ArithmeticError,
    EOFError, RuntimeError, struct.error, zlib.error, MemoryError, Image.DecompressionBombError,
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Annotation:
    """One object: its polygons ([[x0, y0, x1, y1, ...], ...], pixels) or run lengths (column-major, zeros
    first).
    """

    category_id: int
    area: float
    iscrowd: bool
    polygons: tuple[tuple[float, ...], ...] = ()
    counts: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Photo:
    """One image record, with its annotations in the order of the file. `image_id` is unique over all files
    read together.
    """

    image_id: int
    file_name: str
    height: int
    width: int
    annotations: tuple[Annotation, ...] = ()

    @property
    def classes(self) -> set[int]:
        """Ids of the classes that it has objects of; crowds are IGNORED, and so of none."""
        return {a.category_id for a in self.annotations if not a.iscrowd}


@dataclass(frozen=True)
class CocoSet:
    """The photos of one split, and a fingerprint of the annotation files they were read from."""

    root: Path
    split: str
    files: tuple[Path, ...]
    photos: tuple[Photo, ...]
    fingerprint: str

    def path(self, photo: Photo) -> Path:
        return self.root / photo.file_name


def read_coco(root: str | Path, split: str, classes: tuple[str, ...]) -> CocoSet:
    """The photos of `split` ('train' or 'test') under a data root.

    train is train_all.json, or train.json and val.json together, their ids made unique. Raises BadInput,
    naming file and record, for anything in them that could not be trained on.
    """
    root = Path(root)
    files = annotation_files(root, split)
    digest = hashlib.sha256()
    photos: list[Photo] = []
    seen: dict[str, Path] = {}
    for path in files:
        content = _read_bytes(path)
        digest.update(len(content).to_bytes(8, 'little') + content)
        own = _read_file(path, content, classes, first_id=len(photos) if len(files) > 1 else None)
        for photo in own:
            if photo.file_name in seen:
                also = '' if seen[photo.file_name] == path else f', first in {seen[photo.file_name]}'
                raise BadInput(f'{path}: image {photo.file_name!r} is listed twice{also}')
            seen[photo.file_name] = path
            if not inside(root, photo.file_name):
                raise BadInput(f'{path}: image {photo.file_name!r} leads out of {root}')
        photos += own
    if not photos:
        raise BadInput(f'{files[0]}: no images')
    return CocoSet(root, split, files, tuple(photos), digest.hexdigest())


def read_labels(path: str | Path, classes: tuple[str, ...]) -> CocoSet:
    """The photos of one COCO file of any name, such as hidden labels; root is its folder. Raises BadInput."""
    path = Path(path)
    content = _read_bytes(path)
    photos = tuple(_read_file(path, content, classes, first_id=None))
    if not photos:
        raise BadInput(f'{path}: no images')
    if len({photo.file_name for photo in photos}) < len(photos):
        raise BadInput(f'{path}: two images have the same file_name')
    return CocoSet(path.parent, 'labels', (path,), photos, hashlib.sha256(content).hexdigest())


def annotation_files(root: Path, split: str) -> tuple[Path, ...]:
    """The JSON files of a split, those that are there. Raises BadInput where there is none."""
    if not root.is_dir():
        raise BadInput(f'{root}: no such folder (data_root)')
    if split == 'test':
        choices = [('test.json',)]
    else:
        choices = [('train_all.json',), ('train.json', 'val.json')]
    for names in choices:
        if all((root / name).is_file() for name in names):
            return tuple(root / name for name in names)
    wanted = ', or '.join(' + '.join(names) for names in choices)
    raise BadInput(f'{root}: has no annotations; expected {wanted}')


def inside(root: Path, file_name: str) -> bool:
    """Whether a file name stays below the root, symbolic links followed."""
    try:
        return (root / file_name).resolve().is_relative_to(root.resolve())
    except (RuntimeError, OSError):  # links in a circle
        return False


def draw_mask(photo: Photo) -> np.ndarray:
    """(H, W) uint8 ids. Painted by area, largest first, ties by order in the file; iscrowd regions are
    IGNORED.
    """
    mask = np.zeros((photo.width, photo.height), np.uint8)  # columns first, as RLE goes
    for annotation in sorted(photo.annotations, key=lambda a: -a.area):
        drawn = _draw(annotation, photo.height, photo.width)
        np.copyto(mask, IGNORED if annotation.iscrowd else annotation.category_id, where=drawn)
    return cv2.transpose(mask)


def read_photo(coco: CocoSet, photo: Photo) -> np.ndarray:
    """(H, W, 3) uint8 RGB. Raises BadInput for a photo that is missing, broken, not RGB, or not of its
    record's size.
    """
    return read_rgb(coco.path(photo), expected=(photo.height, photo.width))


def read_rgb(path: Path, expected: tuple[int, int] | None = None) -> np.ndarray:
    """(H, W, 3) uint8 of an RGB image file; `expected` (H, W) is checked before a pixel is decoded. Raises
    BadInput.
    """
    refuse_device(path)
    try:
        with Image.open(path, formats=FORMATS) as image:
            size = (image.height, image.width)
            if expected is not None and size != expected:
                raise BadInput(
                    f'{path}: found {size[0]}x{size[1]} pixels, its record says {expected[0]}x{expected[1]}'
                )
            if max(size) > MAX_SIDE or size[0] * size[1] > MAX_PIXELS:
                allowed = f'at most {MAX_SIDE:,} a side and {MAX_PIXELS:,} in all are read'
                raise BadInput(f'{path}: found {size[0]}x{size[1]} pixels, {allowed}')
            if image.mode != 'RGB':
                raise BadInput(
                    f'{path}: found mode {image.mode}, expected a photo in RGB (3 channels, 8 bits)'
                )
            return np.asarray(image)
    except FileNotFoundError:
        raise BadInput(f'{path}: no such image') from None
    except UNREADABLE as error:
        raise BadInput(f'{path}: cannot be decoded: {one_line(error)[:300]}') from None


def _read_bytes(path: Path) -> bytes:
    try:
        refuse_device(path)
        return path.read_bytes()
    except OSError as error:
        raise BadInput(f'{path}: cannot be read: {error.strerror}') from None


def load_json(path: Path, content: bytes) -> dict[str, Any]:
    """The object in a JSON file. Raises BadInput."""
    try:
        data = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BadInput(f'{path}: not JSON, or cut off: {one_line(error)}') from None
    if not isinstance(data, dict):
        raise BadInput(f'{path}: found {type(data).__name__}, expected an object with images and categories')
    return data


def _read_file(path: Path, content: bytes, classes: tuple[str, ...], first_id: int | None) -> list[Photo]:
    """The photos of one file; `first_id` renumbers them from it, None keeps their ids."""
    data = load_json(path, content)
    for key in ('images', 'categories'):
        _require(path, 'the file', data, key, list)
    _check_categories(path, data['categories'], classes)
    records: dict[int, dict[str, Any]] = {}
    for position, record in enumerate(data['images']):
        where = f'images[{position}]'
        image_id = _require(path, where, record, 'id', int)
        if image_id in records:
            raise BadInput(f'{path}: {where}: id {image_id} is there twice')
        _check_image(path, where, record)
        records[image_id] = record
    annotations: dict[int, list[Annotation]] = {image_id: [] for image_id in records}
    is_test = path.name == 'test.json'
    if is_test:
        data.setdefault('annotations', [])
    listed = _require(path, 'the file', data, 'annotations', list)
    ids: set[int] = set()
    for position, record in enumerate(listed):
        where = f'annotations[{position}]'
        annotation_id = _require(path, where, record, 'id', int)
        where = f'annotation {annotation_id}'
        if annotation_id in ids:
            raise BadInput(f'{path}: {where}: the id is there twice')
        ids.add(annotation_id)
        image_id = _require(path, where, record, 'image_id', int)
        if image_id not in records:
            raise BadInput(f'{path}: {where}: image_id {image_id} is not among the images')
        annotations[image_id].append(_read_annotation(path, where, record, records[image_id], len(classes)))
    return [
        Photo(
            image_id if first_id is None else first_id + position,
            record['file_name'],
            record['height'],
            record['width'],
            tuple(annotations[image_id]),
        )
        for position, (image_id, record) in enumerate(records.items())
    ]


def _require(path: Path, where: str, record: Any, key: str, kind: type | tuple[type, ...]) -> Any:
    """record[key], of the type it has to be."""
    if not isinstance(record, dict):
        raise BadInput(f'{path}: {where}: found {type(record).__name__}, expected an object')
    if key not in record:
        raise BadInput(f'{path}: {where} lacks the key {key!r}')
    value = record[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        names = ' or '.join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise BadInput(f'{path}: {where}: {key} is {str(value)[:60]!r}, expected {names}')
    return value


def _check_categories(path: Path, categories: list[Any], classes: tuple[str, ...]) -> None:
    found: dict[int, str] = {}
    for position, category in enumerate(categories):
        category_id = _require(path, f'categories[{position}]', category, 'id', int)
        if category_id in found:
            raise BadInput(f'{path}: category id {category_id} is there twice')
        found[category_id] = _require(path, f'categories[{position}]', category, 'name', str)
    expected = dict(enumerate(classes))
    if 0 not in found:
        expected.pop(0)  # the background need not be listed
    for category_id in sorted(found.keys() | expected.keys()):
        if found.get(category_id) != expected.get(category_id):
            raise BadInput(
                f'{path}: category {category_id} is {found.get(category_id)!r}, '
                f'but the config key classes has {expected.get(category_id)!r} there'
            )


def _check_image(path: Path, where: str, record: dict[str, Any]) -> None:
    name = _require(path, where, record, 'file_name', str)
    if not name or not is_plain(name):
        raise BadInput(f'{path}: {where}: file_name {name[:80]!r} is not a file name')
    for key in ('height', 'width'):
        side = _require(path, where, record, key, int)
        if not 1 <= side <= MAX_SIDE:
            raise BadInput(f'{path}: {where}: {key} is {str(side)[:60]}, expected 1 to {MAX_SIDE}')
    pixels = record['height'] * record['width']
    if pixels > MAX_PIXELS:
        raise BadInput(f'{path}: {where}: has {pixels:,} pixels, expected at most {MAX_PIXELS:,}')


def _read_annotation(
    path: Path, where: str, record: dict[str, Any], image: dict[str, Any], num_classes: int
) -> Annotation:
    category_id = _require(path, where, record, 'category_id', int)
    if not 1 <= category_id < num_classes:
        raise BadInput(
            f'{path}: {where}: category_id {category_id} is not among the categories, 1 to {num_classes - 1}'
        )
    area = _require(path, where, record, 'area', (int, float))
    if not 0 <= area < 1e18:  # NaN too
        raise BadInput(f'{path}: {where}: area is {str(area)[:60]}, expected a number from 0')
    iscrowd = record.get('iscrowd', 0)
    if iscrowd not in (0, 1):
        raise BadInput(f'{path}: {where}: iscrowd is {str(iscrowd)[:60]!r}, expected 0 or 1')
    segmentation = _require(path, where, record, 'segmentation', (list, dict))
    height, width = image['height'], image['width']
    if isinstance(segmentation, list):
        polygons = _check_polygons(path, where, segmentation, height, width)
        return Annotation(category_id, float(area), bool(iscrowd), polygons=polygons)
    counts = _check_rle(path, where, segmentation, height, width)
    return Annotation(category_id, float(area), bool(iscrowd), counts=counts)


def _check_polygons(
    path: Path, where: str, polygons: list[Any], height: int, width: int
) -> tuple[tuple[float, ...], ...]:
    if not polygons:
        raise BadInput(f'{path}: {where}: segmentation has no polygon')
    for polygon in polygons:
        if not isinstance(polygon, list) or not all(type(v) in (int, float) for v in polygon):
            raise BadInput(f'{path}: {where}: a polygon is {str(polygon)[:60]!r}, expected a list of numbers')
        if len(polygon) < 6 or len(polygon) % 2:
            raise BadInput(
                f'{path}: {where}: a polygon has {len(polygon)} coordinates, expected x, y of at '
                'least 3 points'
            )
        for value, side in zip(polygon, (width, height) * (len(polygon) // 2), strict=True):
            if not -side <= value <= 2 * side:  # NaN too; far outside, drawing would need memory without end
                raise BadInput(
                    f'{path}: {where}: a polygon has the coordinate {str(value)[:60]}, '
                    f'expected one near 0 to {side}'
                )
        steps = np.abs(np.diff(np.reshape(polygon + polygon[:2], (-1, 2)), axis=0))
        if (length := steps.max(1).sum()) > MAX_OUTLINE:
            raise BadInput(
                f'{path}: {where}: a polygon is {length:,.0f} pixels long, expected at most {MAX_OUTLINE:,}'
            )
    return tuple(tuple(map(float, polygon)) for polygon in polygons)


def _check_rle(path: Path, where: str, rle: dict[str, Any], height: int, width: int) -> tuple[int, ...]:
    """Run lengths of either RLE form, known to fill the image exactly (pycocotools itself trusts them)."""
    size = _require(path, where, rle, 'size', list)
    if size != [height, width]:
        raise BadInput(f'{path}: {where}: RLE size is {str(size)[:60]}, the image is [{height}, {width}]')
    counts = _require(path, where, rle, 'counts', (list, str))
    if isinstance(counts, str):
        counts = _decompress(path, where, counts)
    if not all(type(c) is int and c >= 0 for c in counts):
        raise BadInput(f'{path}: {where}: RLE counts must be whole numbers from 0')
    if sum(counts) != height * width:
        raise BadInput(
            f'{path}: {where}: RLE counts add up to {str(sum(counts))[:60]}, '
            f'the image has {height * width} pixels'
        )
    return tuple(counts)


def _decompress(path: Path, where: str, text: str) -> list[int]:
    """Run lengths of COCO's compressed form: 5 bits a character from '0' on, low bits first, deltas to the
    last but one.
    """
    counts: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 50:
            raise BadInput(
                f'{path}: {where}: compressed RLE has the character {character!r} where it cannot be'
            )
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:  # the last character of a number; its bit 4 is the sign
            if bits & 16:
                value -= 1 << shift
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))
            value = shift = 0
    if shift:
        raise BadInput(f'{path}: {where}: compressed RLE is cut off')
    return counts


def _draw(annotation: Annotation, height: int, width: int) -> np.ndarray:
    """(W, H) bool, the transpose of what pycocotools' annToMask draws."""
    if annotation.polygons:
        parts = rle_codec.frPyObjects([list(p) for p in annotation.polygons], height, width)
        return rle_codec.decode(rle_codec.merge(parts)).T.view(bool)
    ends = np.cumsum(annotation.counts)
    flat = np.zeros(height * width, bool)
    for start, end in zip(ends[0::2], ends[1::2], strict=False):
        flat[start:end] = True
    return flat.reshape(width, height)


def training_photos(data: Path, classes: tuple[str, ...]) -> dict[str, Photo]:
    """The training photos of a data root by file name. Raises BadInput."""
    return {photo.file_name: photo for photo in read_coco(data, 'train', classes).photos}
