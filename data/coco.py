"""Read COCO annotations, check them record by record, and draw the masks of their photos.

Shapes: H W a photo's own height and width. Class ids in a mask: 0 background, an object's category_id, and
IGNORED (255) for crowd regions.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from pycocotools import mask as rle_codec

from config import is_plain
from data.photos import MAX_PIXELS, MAX_SIDE, read_rgb
from metrics import IGNORED
from utils.errors import BadInput, one_line
from utils.files import refuse_device

MAX_OUTLINE = 1_000_000  # length of a polygon in pixels; drawing it takes about 100 bytes for each of them


@dataclass(frozen=True, slots=True)
class Annotation:
    """Hold one object: its polygons in pixels, or the run lengths of its mask by column, zeros first."""

    category_id: int
    area: float
    iscrowd: bool
    polygons: tuple[tuple[float, ...], ...] = ()  # (x0, y0, x1, y1, ...) each
    counts: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Photo:
    """Hold one photo's record and its annotations in the order of the file."""

    image_id: int  # unique across train.json and val.json
    file_name: str
    height: int
    width: int
    annotations: tuple[Annotation, ...] = ()

    @property
    def classes(self) -> set[int]:
        """Return the ids of the classes that the photo has objects of; crowd regions do not count."""
        return {a.category_id for a in self.annotations if not a.iscrowd}


@dataclass(frozen=True)
class CocoSet:
    """Hold the photos of one split and a SHA-256 of the annotation files that they were read from."""

    root: Path
    split: str
    files: tuple[Path, ...]
    photos: tuple[Photo, ...]
    fingerprint: str

    def path(self, photo: Photo) -> Path:
        return self.root / photo.file_name


def read_coco(root: str | Path, split: str, classes: tuple[str, ...]) -> CocoSet:
    """Read the photos and annotations of a split ('train' or 'test') from a data root. Raises BadInput.

    Train is train_all.json, or train.json and val.json together with new image ids.
    """
    root = Path(root)
    files = annotation_files(root, split)
    digest = hashlib.sha256()
    photos: dict[str, Photo] = {}
    origins: dict[str, Path] = {}
    for path in files:
        content = read_bytes(path)
        digest.update(len(content).to_bytes(8, 'little') + content)
        for photo in _read_file(path, content, classes, first_id=len(photos) if len(files) > 1 else None):
            name = photo.file_name
            if name in photos:
                first = '' if origins[name] == path else f', first in {origins[name]}'
                raise BadInput(f'{path}: image {name!r} is listed twice{first}')
            if not inside(root, name):
                raise BadInput(f'{path}: image {name!r} leads out of {root}')
            photos[name], origins[name] = photo, path
    if not photos:
        raise BadInput(f'{files[0]}: no images')
    return CocoSet(root, split, files, tuple(photos.values()), digest.hexdigest())


def read_labels(path: str | Path, classes: tuple[str, ...]) -> CocoSet:
    """Read one COCO file of any name, such as hidden labels; its folder is the root. Raises BadInput."""
    path = Path(path)
    content = read_bytes(path)
    photos = tuple(_read_file(path, content, classes, first_id=None))
    if not photos:
        raise BadInput(f'{path}: no images')
    if len({photo.file_name for photo in photos}) < len(photos):
        raise BadInput(f'{path}: two images have the same file_name')
    return CocoSet(path.parent, 'labels', (path,), photos, hashlib.sha256(content).hexdigest())


def annotation_files(root: Path, split: str) -> tuple[Path, ...]:
    """Return the JSON files of a split; raise BadInput if they do not exist."""
    if not root.is_dir():
        raise BadInput(
            f'{root}: no such folder; put the photos and JSON files there (docs/data.md), or name another '
            'with --data DIR or --set data_root=DIR'
        )
    train = [('train_all.json',), ('train.json', 'val.json')]
    choices = [('test.json',)] if split == 'test' else train
    for names in choices:
        if all((root / name).is_file() for name in names):
            return tuple(root / name for name in names)
    expected = ', or '.join(' + '.join(names) for names in choices)
    raise BadInput(f'{root}: has no annotations; expected {expected}')


def inside(root: Path, file_name: str) -> bool:
    """Return True if a file name stays below the root after symbolic links are resolved."""
    try:
        return (root / file_name).resolve().is_relative_to(root.resolve())
    except (RuntimeError, OSError):  # a loop of links
        return False


def draw_mask(photo: Photo) -> np.ndarray:
    """Draw the (H, W) uint8 mask of a photo: largest area first, ties in the order of the file."""
    mask = np.zeros((photo.width, photo.height), np.uint8)  # transposed: RLE runs down the columns
    for annotation in sorted(photo.annotations, key=lambda a: -a.area):
        drawn = _draw(annotation, photo.height, photo.width)
        np.copyto(mask, IGNORED if annotation.iscrowd else annotation.category_id, where=drawn)
    return cv2.transpose(mask)


def read_photo(coco: CocoSet, photo: Photo) -> np.ndarray:
    """Read a photo as (H, W, 3) uint8 RGB; raise BadInput if its size is not that of its record."""
    return read_rgb(coco.path(photo), expected=(photo.height, photo.width))


def read_bytes(path: Path) -> bytes:
    """Read a file. Raises BadInput."""
    try:
        refuse_device(path)
        return path.read_bytes()
    except OSError as error:
        raise BadInput(f'{path}: cannot be read: {error.strerror}') from None


def load_json(path: Path, content: bytes) -> dict[str, Any]:
    """Parse a JSON file that holds an object. Raises BadInput."""
    try:
        data = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise BadInput(f'{path}: not JSON, or cut off: {one_line(error)}') from None
    if not isinstance(data, dict):
        raise BadInput(f'{path}: found {type(data).__name__}, expected an object with images and categories')
    return data


def _read_file(path: Path, content: bytes, classes: tuple[str, ...], first_id: int | None) -> list[Photo]:
    """Read the photos of one file; number them from `first_id`, or keep their ids if it is None."""
    data = load_json(path, content)
    if path.name == 'test.json':
        data.setdefault('annotations', [])
    images, categories = (_require(f'{path}: the file', data, key, list) for key in ('images', 'categories'))
    _check_categories(path, categories, classes)
    records = _read_images(path, images)
    listed = _require(f'{path}: the file', data, 'annotations', list)
    annotations = _read_annotations(path, listed, records, len(classes))
    photos = []
    for position, (image_id, record) in enumerate(records.items()):
        number = image_id if first_id is None else first_id + position
        name, size = record['file_name'], (record['height'], record['width'])
        photos.append(Photo(number, name, *size, tuple(annotations[image_id])))
    return photos


def _read_images(path: Path, images: list[Any]) -> dict[int, dict[str, Any]]:
    """Check the image records and return them by id."""
    records: dict[int, dict[str, Any]] = {}
    for position, record in enumerate(images):
        where = f'{path}: images[{position}]'
        image_id = _require(where, record, 'id', int)
        if image_id in records:
            raise BadInput(f'{where}: id {image_id} appears twice')
        name = _require(where, record, 'file_name', str)
        if not name or not is_plain(name):
            raise BadInput(f'{where}: file_name {name[:80]!r} is not a file name')
        for key in ('height', 'width'):
            side = _require(where, record, key, int)
            if not 1 <= side <= MAX_SIDE:
                raise BadInput(f'{where}: {key} is {str(side)[:60]}, expected 1 to {MAX_SIDE}')
        pixels = record['height'] * record['width']
        if pixels > MAX_PIXELS:
            raise BadInput(f'{where}: has {pixels:,} pixels, expected at most {MAX_PIXELS:,}')
        records[image_id] = record
    return records


def _read_annotations(
    path: Path, listed: list[Any], images: dict[int, dict[str, Any]], num_classes: int
) -> dict[int, list[Annotation]]:
    """Check the annotation records and return them by image id."""
    annotations: dict[int, list[Annotation]] = {image_id: [] for image_id in images}
    ids: set[int] = set()
    for position, record in enumerate(listed):
        annotation_id = _require(f'{path}: annotations[{position}]', record, 'id', int)
        where = f'{path}: annotation {annotation_id}'
        if annotation_id in ids:
            raise BadInput(f'{where}: the id appears twice')
        ids.add(annotation_id)
        image_id = _require(where, record, 'image_id', int)
        if image_id not in images:
            raise BadInput(f'{where}: image_id {image_id} is not among the images')
        annotations[image_id].append(_read_annotation(where, record, images[image_id], num_classes))
    return annotations


def _require(where: str, record: Any, key: str, kind: type | tuple[type, ...]) -> Any:
    """Return record[key]; raise BadInput if it is missing or of another type."""
    if not isinstance(record, dict):
        raise BadInput(f'{where}: found {type(record).__name__}, expected an object')
    if key not in record:
        raise BadInput(f'{where} lacks the key {key!r}')
    value = record[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        names = ' or '.join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise BadInput(f'{where}: {key} is {str(value)[:60]!r}, expected {names}')
    return value


def _check_categories(path: Path, categories: list[Any], classes: tuple[str, ...]) -> None:
    """Check that the categories of a file are the classes of the config."""
    names: dict[int, str] = {}
    for position, category in enumerate(categories):
        category_id = _require(f'{path}: categories[{position}]', category, 'id', int)
        if category_id in names:
            raise BadInput(f'{path}: category id {category_id} appears twice')
        names[category_id] = _require(f'{path}: categories[{position}]', category, 'name', str)
    expected = dict(enumerate(classes))
    if 0 not in names:
        expected.pop(0)  # a file may leave the background out
    for category_id in sorted(names.keys() | expected.keys()):
        if names.get(category_id) != expected.get(category_id):
            found, there = names.get(category_id), expected.get(category_id)
            fault = f'category {category_id} is {found!r}, but the config key classes has {there!r} there'
            raise BadInput(f'{path}: {fault}')


def _read_annotation(
    where: str, record: dict[str, Any], image: dict[str, Any], num_classes: int
) -> Annotation:
    category_id = _require(where, record, 'category_id', int)
    if not 1 <= category_id < num_classes:
        allowed = f'the categories, 1 to {num_classes - 1}'
        raise BadInput(f'{where}: category_id {category_id} is not among {allowed}')
    area = _require(where, record, 'area', (int, float))
    if not 0 <= area < 1e18:  # refuses NaN too
        raise BadInput(f'{where}: area is {str(area)[:60]}, expected a number of at least 0')
    iscrowd = record.get('iscrowd', 0)
    if iscrowd not in (0, 1):
        raise BadInput(f'{where}: iscrowd is {str(iscrowd)[:60]!r}, expected 0 or 1')
    segmentation = _require(where, record, 'segmentation', (list, dict))
    height, width = image['height'], image['width']
    if isinstance(segmentation, list):
        polygons = _check_polygons(where, segmentation, height, width)
        return Annotation(category_id, float(area), bool(iscrowd), polygons=polygons)
    counts = _check_rle(where, segmentation, height, width)
    return Annotation(category_id, float(area), bool(iscrowd), counts=counts)


def _check_polygons(
    where: str, polygons: list[Any], height: int, width: int
) -> tuple[tuple[float, ...], ...]:
    if not polygons:
        raise BadInput(f'{where}: segmentation has no polygon')
    for polygon in polygons:
        if not isinstance(polygon, list) or not all(type(v) in (int, float) for v in polygon):
            raise BadInput(f'{where}: a polygon is {str(polygon)[:60]!r}, expected a list of numbers')
        if len(polygon) < 6 or len(polygon) % 2:
            count = f'a polygon has {len(polygon)} coordinates'
            raise BadInput(f'{where}: {count}, expected x, y of at least 3 points')
        for value, side in zip(polygon, (width, height) * (len(polygon) // 2), strict=True):
            if not -side <= value <= 2 * side:  # refuses NaN too; drawing far outside needs too much memory
                fault = f'a polygon has the coordinate {str(value)[:60]}'
                raise BadInput(f'{where}: {fault}, expected one near 0 to {side}')
        steps = np.abs(np.diff(np.reshape(polygon + polygon[:2], (-1, 2)), axis=0))
        if (length := steps.max(1).sum()) > MAX_OUTLINE:
            fault = f'a polygon is {length:,.0f} pixels long'
            raise BadInput(f'{where}: {fault}, expected at most {MAX_OUTLINE:,}')
    return tuple(tuple(map(float, polygon)) for polygon in polygons)


def _check_rle(where: str, rle: dict[str, Any], height: int, width: int) -> tuple[int, ...]:
    """Return the run lengths of either RLE form if they fill the image exactly, which pycocotools ignores."""
    size = _require(where, rle, 'size', list)
    if size != [height, width]:
        raise BadInput(f'{where}: RLE size is {str(size)[:60]}, the image is [{height}, {width}]')
    counts = _require(where, rle, 'counts', (list, str))
    if isinstance(counts, str):
        counts = _decompress(where, counts)
    if not all(type(c) is int and c >= 0 for c in counts):
        raise BadInput(f'{where}: RLE counts must be whole numbers of at least 0')
    if sum(counts) != height * width:
        total = str(sum(counts))[:60]
        raise BadInput(f'{where}: RLE counts add up to {total}, the image has {height * width} pixels')
    return tuple(counts)


def _decompress(where: str, text: str) -> list[int]:
    """Decode COCO's compressed run lengths: 5 bits a character from '0' on, low bits first."""
    counts: list[int] = []
    value = shift = 0
    for character in text:
        bits = ord(character) - 48
        if not 0 <= bits < 64 or shift > 50:
            raise BadInput(f'{where}: compressed RLE has the character {character!r} in a wrong place')
        value |= (bits & 31) << shift
        shift += 5
        if not bits & 32:  # the last character of a number; its bit 16 is the sign
            if bits & 16:
                value -= 1 << shift
            counts.append(value + (counts[-2] if len(counts) > 2 else 0))  # from the fourth on, differences
            value = shift = 0
    if shift:
        raise BadInput(f'{where}: compressed RLE is cut off')
    return counts


def _draw(annotation: Annotation, height: int, width: int) -> np.ndarray:
    """Draw an object as (W, H) bool, the transpose of pycocotools' annToMask."""
    if annotation.polygons:
        parts = rle_codec.frPyObjects([list(p) for p in annotation.polygons], height, width)
        return rle_codec.decode(rle_codec.merge(parts)).T.view(bool)
    is_object = np.arange(len(annotation.counts)) % 2 == 1
    return np.repeat(is_object, annotation.counts).reshape(width, height)


def training_photos(data: Path, classes: tuple[str, ...]) -> dict[str, Photo]:
    """Return the training photos of a data root by file name. Raises BadInput."""
    return {photo.file_name: photo for photo in read_coco(data, 'train', classes).photos}
