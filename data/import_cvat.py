"""Import the XML of CVAT: `CVAT for images 1.1`, and tracks of `CVAT for video 1.1` by frame.

    import_cvat(Source(Path('images'), Path('input/mine')), Path('annotations.xml'))

Polygons are in pixels. The run lengths of a mask go along the rows of its box, the first of pixels that are
not in it. Where objects overlap, those of a higher z_order lie on top.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from xml.etree import ElementTree
from xml.etree.ElementTree import Element

import numpy as np

from data.importers import Size
from data.labelled import (
    LabelledPhoto,
    PhotoIndex,
    Shape,
    Source,
    as_text,
    ellipse_points,
    encode_crop,
    import_shapes,
    read_size,
    turn_points,
)
from data.masks import LeftOut
from utils.errors import BadInput, one_line
from utils.json_files import read_bytes, whole_number

EXPECTED = "expected CVAT's annotations.xml, exported as CVAT for images 1.1 or CVAT for video 1.1"
NO_AREA = ('polyline', 'points', 'cuboid', 'skeleton')
IS_BOX = 'box'


def import_cvat(source: Source, path: Path) -> None:
    """Import the photos of an export, which lie below source.photos. Raises BadInput."""
    source.check()
    root = read_xml(path)
    index, left_out = PhotoIndex(source.photos, source.list_photos()), LeftOut()
    images, tracks = root.findall('image'), root.findall('track')
    labelled = [read_image(path, image, index, left_out) for image in images]
    if tracks:
        labelled += read_tracks(path, root, index, left_out)
    left_out.print()
    if not labelled:
        raise BadInput(f'{path}: has no image and no track, {EXPECTED}')
    names = [(element.text or '').strip() for element in root.iterfind('meta//labels/label/name')]
    import_shapes(source, labelled, order=list(dict.fromkeys(filter(None, names))))


def read_xml(path: Path) -> Element:
    """Parse an XML file of annotations. Raises BadInput, also for one that defines entities of its own."""
    content = read_bytes(path)
    if b'<!DOCTYPE' in content[:4096] or b'<!ENTITY' in content:
        raise BadInput(f'{path}: has a document type, {EXPECTED}')
    if content[:2] == b'PK':
        raise BadInput(f'{path}: is a ZIP archive, {EXPECTED}; unpack it')
    try:
        root = ElementTree.fromstring(content.lstrip())
    except (ElementTree.ParseError, ValueError, LookupError) as error:
        raise BadInput(f'{path}: not XML, or cut off: {one_line(error)}; {EXPECTED}') from None
    if root.tag != 'annotations':
        kind = ' of Pascal VOC' if root.tag == 'annotation' else ''
        raise BadInput(f'{path}: found <{root.tag[:40]}>{kind}, {EXPECTED}')
    return root


def read_image(path: Path, image: Element, index: PhotoIndex, left_out: LeftOut) -> LabelledPhoto:
    """Read the shapes of an image. Raises BadInput."""
    name = image.get('name', '')
    where = f'{path}: image {name[:80]!r}'
    if not name:
        raise BadInput(f'{path}: image {image.get("id")}: lacks its name')
    photo = index.find(where, name)
    if photo is None:
        raise BadInput(f'{where}: is not below {index.folder}; give the folder of the photos with --photos')
    size = read_size(where, image.get('height'), image.get('width'))
    shapes = []
    for n, element in enumerate(image):
        one = f'{where}: {element.tag} number {n + 1}'
        shapes += read_shape(one, element, element.get('label'), size, left_out)
    return LabelledPhoto(photo, where, shapes, size)


def read_tracks(path: Path, root: Element, index: PhotoIndex, left_out: LeftOut) -> list[LabelledPhoto]:
    """Read the shapes of tracks, by frame; those without an object are left out. Raises BadInput."""
    size_of = root.find('meta//original_size')
    if size_of is None:
        raise BadInput(f'{path}: lacks original_size, {EXPECTED}')
    size = read_size(f'{path}: original_size', size_of.findtext('height'), size_of.findtext('width'))
    frames: dict[int, list[Shape]] = {}
    for track in root.iterfind('track'):
        for element in track:
            where = f'{path}: track {track.get("id")}, frame {element.get("frame")}'
            frame = whole_number(element.get('frame'))
            if frame is None or frame < 0:
                raise BadInput(f'{where}: expected the number of a frame')
            if element.get('outside') == '1':
                continue
            shapes = list(read_shape(where, element, track.get('label'), size, left_out))
            frames.setdefault(frame, []).extend(shapes)
    numbered = number_photos(index)
    labelled = []
    for frame, shapes in sorted(frames.items()):
        where = f'{path}: frame {frame}'
        photos = numbered.get(frame, [])
        if len(photos) != 1:
            found = f'{len(photos)} photos' if photos else 'no photo'
            expected = f'expected one, such as frame_{frame:06d}.png'
            raise BadInput(f'{where}: {found} of that number below {index.folder}, {expected}')
        labelled.append(LabelledPhoto(photos[0], where, shapes, size))
    return labelled


def number_photos(index: PhotoIndex) -> dict[int, list[Path]]:
    """Return the photos by the last number in their names."""
    photos: dict[int, list[Path]] = {}
    for path in index.photos:
        if numbers := re.findall(r'\d{1,18}', path.stem, re.ASCII):
            photos.setdefault(int(numbers[-1]), []).append(path)
    return photos


def read_shape(
    where: str, element: Element, label: str | None, size: Size, left_out: LeftOut
) -> Iterator[Shape]:
    """Yield the shape of an element, if it has one; one without an area is counted. Raises BadInput."""
    if element.tag in NO_AREA:
        left_out.note(f'a {element.tag}, which has no area', where)
        return
    read = READERS.get(element.tag)
    if read is None:
        return  # a tag of the photo as a whole
    if not label:
        raise BadInput(f'{where}: lacks its label')
    layer = whole_number(element.get('z_order', '0'))
    if layer is None:
        raise BadInput(f'{where}: z_order is {element.get("z_order")!r:.20}, expected a whole number')
    yield Shape(label, where, read(where, element, size), is_box=element.tag == IS_BOX, layer=layer)


def read_polygon(where: str, element: Element, size: Size) -> list[list[float]]:
    """Read the points x0,y0;x1,y1;... of a polygon."""
    pairs = [pair.split(',') for pair in element.get('points', '').split(';')]
    if any(len(pair) != 2 for pair in pairs):
        found = element.get('points', '')[:60]
        raise BadInput(f'{where}: points are {found!r}, expected x,y of each, with ; between')
    return [read_numbers(where, [value for pair in pairs for value in pair])]


def read_numbers(where: str, texts: list[str | None]) -> list[float]:
    """Parse numbers. Raises BadInput."""
    numbers = []
    for text in texts:
        try:
            numbers.append(float(text or ''))
        except ValueError:
            numbers.append(math.nan)
        if not math.isfinite(numbers[-1]):
            raise BadInput(f'{where}: found {str(text)[:40]!r}, expected a number')
    return numbers


def read_keys(where: str, element: Element, *keys: str) -> list[float]:
    """Parse attributes that are numbers; rotation may be missing. Raises BadInput."""
    missing = next((key for key in keys if key not in element.keys() and key != 'rotation'), None)  # noqa: SIM118
    if missing:
        raise BadInput(f'{where}: lacks the key {missing}')
    return read_numbers(where, [element.get(key, '0') for key in keys])


def read_box(where: str, element: Element, size: Size) -> list[list[float]]:
    """Read the corners of a box, which is turned around its middle."""
    left, top, right, bottom, angle = read_keys(where, element, 'xtl', 'ytl', 'xbr', 'ybr', 'rotation')
    middle = np.array([left + right, top + bottom]) / 2
    corners = np.array([(left, top), (right, top), (right, bottom), (left, bottom)]) - middle
    return [(middle + turn_points(corners, angle)).ravel().tolist()]


def read_ellipse(where: str, element: Element, size: Size) -> list[list[float]]:
    """Read an ellipse, which is turned around its middle."""
    x, y, a, b, angle = read_keys(where, element, 'cx', 'cy', 'rx', 'ry', 'rotation')
    return [(np.array([x, y]) + turn_points(ellipse_points(a, b), angle)).ravel().tolist()]


def read_mask(where: str, element: Element, size: Size) -> dict[str, Any]:
    """Read a mask → RLE as COCO has it. Raises BadInput."""
    left, top, width, height = map(int, read_keys(where, element, 'left', 'top', 'width', 'height'))
    if min(left, top) < 0 or min(width, height) < 1 or left + width > size[1] or top + height > size[0]:
        box = f'{width}x{height} at {left}, {top}'
        raise BadInput(f'{where}: is a mask of {box}, outside its photo of {size[1]}x{size[0]}')
    texts = element.get('rle', '').split(',')
    counts = [whole_number(text) for text in texts]
    if any(count is None or count < 0 for count in counts) or sum(counts) > width * height:
        found = f'run lengths that are no whole numbers, or more than its {width * height} pixels'
        raise BadInput(f'{where}: has {found}; is the file whole?')
    values = np.zeros(len(counts), bool)
    values[1::2] = True
    crop = np.zeros(width * height, bool)  # a last run of pixels that are not in it may be left out
    crop[: sum(counts)] = np.repeat(values, counts)
    return as_text(encode_crop(crop.reshape(height, width), left, top, size))


READERS: Mapping[str, Callable[[str, Element, Size], Any]] = {
    'polygon': read_polygon,
    IS_BOX: read_box,
    'ellipse': read_ellipse,
    'mask': read_mask,
}
