"""Import one JSON file a photo with polygons that have names: `annotations` of `poly_seg`, or labelme's.

    import_json(source, Path('train/outputs_json'))   # Source(Path('train/DCM'), Path('input/mine'))

The first is `{"annotations": [{"type": "poly_seg", "label": NAME, "points": [[x, y], ...]}, ...]}`, of points
that are pixels: the corners and the outline belong to the object. Labelme's has `shapes` with `label` and
`points`, which lie between pixels.
"""

import base64
import binascii
import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from data.importers import Size, list_files, refuse_shared
from data.labelled import (
    LabelledPhoto,
    PhotoIndex,
    Shape,
    Source,
    as_text,
    ellipse_points,
    encode_crop,
    import_shapes,
    read_json,
    read_point,
    read_size,
)
from data.masks import LeftOut
from data.photos import refusals
from utils.errors import BadInput, plural
from utils.files import normal_name
from utils.json_files import guess_json, require, way_in
from utils.progress import progress

EXPECTED = 'expected annotations with a label and points each, or shapes as labelme writes them'
POLYGONS = ('poly_seg', 'polygon', 'poly', 'segmentation')  # types of an annotation that has a polygon
BOXES = ('rectangle', 'rotation')
LINES = ('line', 'linestrip', 'point', 'points')  # shapes without an area


def import_json(source: Source, labels: Path) -> None:
    """Import photos and their label files, which share their path and name but for the ending.

    Raises BadInput.
    """
    source.check(labels)
    photos = source.list_photos()
    files = list_files(labels, {'.json'})
    if not files:
        raise BadInput(f'{labels}: found no .json file, expected one a photo')
    left_out = LeftOut()
    index = PhotoIndex(source.photos, photos)
    pairs = pair_labels(labels, files, index)
    labelled = [read_label(path, pairs[path], left_out) for path in progress(files, 'labels', 'label')]
    left_out.print()
    import_shapes(source, labelled)


def pair_labels(labels: Path, files: Sequence[Path], index: PhotoIndex) -> dict[Path, Path]:
    """Return the photo of each label file: that of the same path and name, or else of the same name alone, or
    that which labelme's imagePath names. Raises BadInput for a label without a photo.
    """
    stems: dict[str, list[Path]] = {}
    for name, path in index.by_name.items():
        stems.setdefault(str(Path(name).with_suffix('')), []).append(path)
        if '/' in name:
            stems.setdefault(f'/{path.stem}', []).append(path)  # of any folder
    pairs: dict[Path, Path] = {}
    unused = []
    for path in files:
        stem = normal_name(path.relative_to(labels).with_suffix('').as_posix())
        places = stems.get(stem) or stems.get(f'/{normal_name(path.stem)}', [])
        if len(places) > 1:
            fault = f'there are {len(places)} photos of that name, such as {places[0]} and {places[1]}'
            raise BadInput(f'{path}: {fault}; rename one of them')
        photo = places[0] if places else find_by_image_path(path, index)
        if photo is None:
            unused.append(path)
        else:
            pairs[path] = photo
    if unused:
        count = f'label files that belong to no photo: {len(unused)} of {len(files)}'
        raise BadInput(f'{unused[0]}: there is no photo of that name below {index.folder} ({count})')
    refuse_shared(pairs, 'photo')
    return pairs


def find_by_image_path(path: Path, index: PhotoIndex) -> Path | None:
    """Return the photo that a label file names, as labelme's do."""
    content = read_content(path)
    content = content if isinstance(content, dict) else {}
    names = [content.get(key) for key in ('imagePath', 'filename', 'file_name')]
    return index.find(str(path), *[name for name in names if isinstance(name, str) and name])


def read_content(path: Path) -> Any:
    """Parse a label file. Raises BadInput, also for that of another tool."""
    content = read_json(path, EXPECTED)
    kind = guess_json(content)
    if kind and not kind.startswith('LabelMe'):
        raise BadInput(f'{path}: seems to be {kind}, {EXPECTED}; {way_in(kind)}')
    return content


def read_label(path: Path, photo: Path, left_out: LeftOut) -> LabelledPhoto:
    """Read the shapes of a label file. Raises BadInput."""
    content = read_content(path)
    if isinstance(content, dict) and {'images', 'categories'} <= content.keys():
        raise BadInput(f'{path}: seems to be COCO, {EXPECTED}; prepare.py coco reads it')
    if isinstance(content, dict) and isinstance(content.get('shapes'), list):
        size = size_of(path, content)
        records = enumerate(content['shapes'])
        shapes = [read_shape(f'{path}: shapes[{n}]', record, size, left_out) for n, record in records]
        return LabelledPhoto(photo, str(path), [shape for shape in shapes if shape is not None], size)
    if not isinstance(content, dict) or not isinstance(content.get('annotations'), list):
        found = ', '.join(map(str, content))[:80] if isinstance(content, dict) else type(content).__name__
        raise BadInput(f'{path}: found {found or "nothing"}, {EXPECTED}')
    records = enumerate(content['annotations'])
    shapes = [read_annotation(f'{path}: annotations[{n}]', record, left_out) for n, record in records]
    return LabelledPhoto(photo, str(path), [shape for shape in shapes if shape is not None])


def read_annotation(where: str, record: Any, left_out: LeftOut) -> Shape | None:
    """Read an annotation of pixels; None, counted in `left_out`, for one without points. Raises BadInput."""
    label = read_name(where, record)
    kind = record.get('type', POLYGONS[0])
    if kind not in POLYGONS:
        raise BadInput(f'{where}: type is {str(kind)[:60]!r}, expected {POLYGONS[0]}: a polygon')
    polygons = read_rings(where, require(where, record, 'points', list))
    if not polygons:
        left_out.note('no points', where)
        return None
    return Shape(label, where, polygons, is_outline=True)


def read_name(where: str, record: Any) -> str:
    """Read the label of an object. Raises BadInput."""
    label = str(require(where, record, 'label', (str, int))).strip()
    if not label:
        raise BadInput(f'{where}: label is empty, expected the name of a class')
    return label


def read_rings(where: str, points: list[Any]) -> list[list[float]]:
    """Read points [x, y], or lists of them, as polygons x0, y0, x1, ... Raises BadInput."""
    if points and isinstance(points[0], list) and points[0] and isinstance(points[0][0], list):
        return [polygon for ring in points for polygon in read_rings(where, ring)]
    if not points:
        return []
    return [[value for point in points for value in read_point(where, point, 'pixels')]]


def size_of(path: Path, content: dict[str, Any]) -> Size | None:
    """Read the (H, W) that labelme notes; None if it does not. Raises BadInput."""
    if content.get('imageHeight') is None or content.get('imageWidth') is None:
        return None
    return read_size(str(path), content['imageHeight'], content['imageWidth'])


def read_shape(where: str, record: Any, size: Size | None, left_out: LeftOut) -> Shape | None:
    """Read a shape of labelme; None, counted in `left_out`, for one without an area. Raises BadInput."""
    label = read_name(where, record)
    kind = record.get('shape_type') or 'polygon'
    if kind in LINES:
        left_out.note(f'a {kind}, which has no area', where)
        return None
    polygons = read_rings(where, require(where, record, 'points', list))
    points = np.reshape(polygons[0] if polygons else [], (-1, 2))
    if kind == 'polygon' or (kind in BOXES and len(points) > 2):  # X-AnyLabeling writes all corners
        return Shape(label, where, polygons, is_box=kind in BOXES)
    if kind not in ('rectangle', 'circle', 'mask') or len(points) != 2:
        found = f'{plural(len(points), "point")} of a {str(kind)[:40]}'
        expected = 'expected a polygon, or 2 points of a rectangle, circle or mask'
        raise BadInput(f'{where}: found {found}, {expected}')
    if kind == 'mask':
        return Shape(label, where, read_mask(where, record, points, size))
    (left, top), (right, bottom) = points.tolist()
    if kind == 'rectangle':
        return Shape(label, where, [[left, top, right, top, right, bottom, left, bottom]], is_box=True)
    radius = np.hypot(right - left, bottom - top)  # the second point lies on the circle
    return Shape(label, where, [(points[0] + ellipse_points(radius, radius)).ravel().tolist()])


def read_mask(where: str, record: dict[str, Any], points: np.ndarray, size: Size | None) -> dict[str, Any]:
    """Read the mask of a shape: a PNG in base64 that fills the box of two points → RLE. Raises BadInput."""
    if size is None:
        raise BadInput(f'{where}: is a mask, but the file has no imageHeight and imageWidth')
    try:
        content = base64.b64decode(require(where, record, 'mask', str), validate=True)
    except binascii.Error:
        raise BadInput(f'{where}: mask is no base64, expected a PNG in it') from None
    with refusals(where), Image.open(io.BytesIO(content), formats=['PNG']) as image:
        if image.width > size[1] or image.height > size[0]:
            raise BadInput(f'{where}: mask is of {image.height}x{image.width} pixels, more than its photo')
        crop = np.asarray(image.convert('L')) > 0
    left, top = np.int64(points.min(0))
    inside = left >= 0 and top >= 0 and top + crop.shape[0] <= size[0] and left + crop.shape[1] <= size[1]
    if not inside:
        raise BadInput(f'{where}: mask leads out of the photo, at {left}, {top}')
    return as_text(encode_crop(crop, int(left), int(top), size))
