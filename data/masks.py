"""Encode what annotations cover as run lengths of pixels, checked, and decode them.

Shapes: H W a photo's own height and width, which is a `size`. Run lengths go down the columns, so arrays are
(W, H).
"""

import json
import re
from collections import Counter
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import numpy as np
from pycocotools import mask as rle_codec

from utils.errors import BadInput
from utils.json_files import parse_number, require, whole_number

MAX_OUTLINE = 1_000_000  # length of a polygon in pixels; drawing it takes about 100 bytes for each of them

# why an object, or a part of one, is left out
BOX = 'no polygon (a box alone)'
NO_POLYGON = 'no polygon'
SHORT = 'fewer than 3 points'
EMPTY = 'covers no pixel'
OUTSIDE = 'outside the photo'
SHARES = 'coordinates from 0 to 1, which are no pixels'
SHORT_PART = 'a part with fewer than 3 points'
EMPTY_PART = 'a part that covers no pixel'

Size = tuple[int, int]
Key = TypeVar('Key', bound=Hashable)


class LeftOut(Counter):
    """Count what has no mask by the reason, and keep where the first of each is."""

    def __init__(self, counts: Mapping[str, int] | None = None) -> None:
        super().__init__(counts)
        self.examples: dict[str, str] = {}

    def note(self, reason: str, where: str, count: int = 1) -> None:
        """Count an object, or parts of one, if there are any."""
        if count:
            self[reason] += count
            self.examples.setdefault(reason, where)

    def print(self) -> None:
        """Print the count of each reason, the largest first, and where the first is."""
        for reason, count in self.most_common():
            print(f'left out: {count:,} ({reason}), the first: {self.examples[reason]}')


@dataclass(frozen=True, slots=True)
class Annotation:
    """Hold one object: its class, its pixels as pycocotools' compressed run lengths, and their number."""

    category_id: int
    iscrowd: bool  # its pixels are ignored
    rle: bytes
    pixels: int
    annotator: int | str | None = None  # who drew it


def encode_segmentation(
    where: str, record: dict[str, Any], size: Size, left_out: LeftOut
) -> tuple[bytes, int] | None:
    """Encode the segmentation of a record as (RLE, pixels); None, counted in `left_out`, if it has no mask.

    Parts of it that cover nothing are counted there too. Raises BadInput for what cannot be understood.
    """
    segmentation = parse_text(record.get('segmentation'))
    if isinstance(segmentation, list) and len(segmentation) == 1 and isinstance(segmentation[0], dict):
        segmentation = segmentation[0]
    if segmentation in (None, '', [], {}) or (isinstance(segmentation, list) and not any(segmentation)):
        left_out.note(BOX if record.get('bbox') else NO_POLYGON, where)
        return None
    if isinstance(segmentation, dict):
        parts, reason = [encode_counts(where, segmentation, size)], EMPTY
    elif isinstance(segmentation, list):
        parts, reason = encode_polygons(where, segmentation, size, left_out)
    else:
        raise BadInput(f'{where}: segmentation is {str(segmentation)[:60]!r}, expected polygons or RLE')
    rle = parts[0] if len(parts) == 1 else rle_codec.merge(parts)
    pixels = int(rle_codec.area(rle)) if parts else 0
    if not pixels:
        left_out.note(reason, where)
        return None
    return rle['counts'], pixels


def parse_text(segmentation: Any) -> Any:
    """Parse a segmentation that is JSON in a text, as tables write it; return any other as it is."""
    if not isinstance(segmentation, str) or not segmentation.lstrip().startswith(('[', '{')):
        return segmentation
    try:
        return json.loads(segmentation)
    except (ValueError, RecursionError):
        return segmentation


def decode(rle: bytes, size: Size) -> np.ndarray:
    """Decode an annotation's RLE as (W, H) bool, the transpose of pycocotools' annToMask."""
    return rle_codec.decode({'size': list(size), 'counts': rle}).T.view(bool)


def shared_pixels(rles: Mapping[Key, Sequence[bytes]], size: Size) -> dict[Key, tuple[int, int]]:
    """Return the pixels of each class, and how many of them another class has, too; `rles` are by class."""
    unions = {
        key: decode(rle_codec.merge([{'size': size, 'counts': rle} for rle in some])['counts'], size)
        for key, some in rles.items()
    }
    classes = sum((union.view(np.uint8) for union in unions.values()), np.zeros(size[::-1], np.uint8))
    return {
        key: (int(np.count_nonzero(union)), int(np.count_nonzero(classes[union] > 1)))
        for key, union in unions.items()
    }


def encode_polygons(
    where: str, segmentation: list[Any], size: Size, left_out: LeftOut
) -> tuple[list[dict], str]:
    """Encode the parts that cover pixels; return them, and why none of them does if that is so."""
    polygons = [check_polygon(where, polygon, size) for polygon in flatten(where, segmentation)]
    outlines = [polygon for polygon in polygons if len(polygon) >= 6]
    encoded = rle_codec.frPyObjects(outlines, *size) if outlines else []
    parts = [part for part in encoded if rle_codec.area(part)]
    if outlines and min(map(min, outlines)) >= 0 and max(map(max, outlines)) <= 1:
        return [], SHARES
    if not parts:
        outside = outlines and all(is_outside(polygon, size) for polygon in outlines)
        return [], OUTSIDE if outside else EMPTY if outlines else SHORT
    faults = {SHORT_PART: len(polygons) - len(outlines), EMPTY_PART: len(outlines) - len(parts)}
    for reason, count in faults.items():
        left_out.note(reason, where, count)
    return parts, ''


def flatten(where: str, segmentation: list[Any]) -> list[list[Any]]:
    """Return polygons as lists of x0, y0, x1, y1, ...; [[x, y], ...], a single list and one that is nested
    once more are polygons, too.
    """
    if all(map(is_number, segmentation)):
        return [segmentation]
    if len(segmentation) > 2 and all(map(is_point, segmentation)):
        return [[value for point in segmentation for value in point]]
    nested = [p for p in segmentation if isinstance(p, list) and p and all(isinstance(v, list) for v in p)]
    if not nested:
        return segmentation
    if len(segmentation) == len(nested[0]) == 1 and all(map(is_number, nested[0][0])):
        return nested[0]
    if len(segmentation) > 1 or not all(map(is_point, nested[0])):
        fault = f'segmentation has {len(segmentation)} rings of points, which may be holes'
        raise BadInput(f'{where}: {fault}; expected lists of x0, y0, x1, y1, ..., or RLE')
    return [[value for point in nested[0] for value in point]]


def is_number(value: Any) -> bool:
    return type(value) in (int, float)


def is_point(value: Any) -> bool:
    return isinstance(value, list) and len(value) == 2 and all(map(is_number, value))


def is_outside(polygon: list[float], size: Size) -> bool:
    """Return True if all points of a polygon lie to one side of the photo."""
    x, y = np.reshape(polygon, (-1, 2)).T
    height, width = size
    return bool(x.max() < 0 or y.max() < 0 or x.min() > width or y.min() > height)


def check_polygon(where: str, polygon: Any, size: Size) -> list[float]:
    """Return the coordinates of a polygon, which may be text, as floats. Raises BadInput."""
    given = polygon
    if isinstance(polygon, list) and str in map(type, polygon):
        polygon = [parse_number(value) if isinstance(value, str) else value for value in polygon]
    if not isinstance(polygon, list) or not {*map(type, polygon)} <= {int, float}:
        raise BadInput(f'{where}: a polygon is {str(given)[:60]!r}, expected a list of numbers')
    if len(polygon) % 2:
        raise BadInput(
            f'{where}: a polygon has {len(polygon)} coordinates, expected x, y of at least 3 points'
        )
    sides = size[::-1] * (len(polygon) // 2)
    for value, side in zip(polygon, sides, strict=True):
        if not -side <= value <= 2 * side:  # refuses NaN too; drawing far outside needs too much memory
            number = str(value)[:60]
            raise BadInput(f'{where}: a polygon has the coordinate {number}, expected one near 0 to {side}')
    if len(polygon) * 3 * max(size) > MAX_OUTLINE:  # else it cannot be that long
        steps = np.abs(np.diff(np.reshape(polygon + polygon[:2], (-1, 2)), axis=0))
        if (length := steps.max(1, initial=0).sum()) > MAX_OUTLINE:
            fault = f'a polygon is {length:,.0f} pixels long, expected at most {MAX_OUTLINE:,}'
            raise BadInput(f'{where}: {fault}')
    return list(map(float, polygon))


def encode_counts(where: str, rle: dict[str, Any], size: Size) -> dict[str, Any]:
    """Encode the run lengths of either RLE form if they fill the photo, which pycocotools does not check."""
    rle_size = require(where, rle, 'size', list)
    sides = [whole_number(side) for side in rle_size]
    height, width = size
    if sides != [height, width]:
        turned = ', which is turned' if sides == [width, height] else ''
        fault = f'RLE size is {str(rle_size)[:60]}{turned}, the image is [{height}, {width}]'
        raise BadInput(f'{where}: {fault}; expected [height, width] of the image')
    counts = rle.get('counts')
    if counts in (None, '', []):
        counts = [height * width]
    counts = require(where, rle | {'counts': counts}, 'counts', (list, str))
    if isinstance(counts, str):
        lengths = re.split(r'[\s,]+', counts.strip(' []'))  # plain ones in a text
        counts = lengths if len(lengths) > 1 else decompress(where, counts)
    counts = [c if type(c) is int else whole_number(c) for c in counts]
    if not all(c is not None and c >= 0 for c in counts):
        raise BadInput(f'{where}: RLE counts must be whole numbers of at least 0')
    if sum(counts) != height * width:
        total = str(sum(counts))[:60]
        raise BadInput(f'{where}: RLE counts add up to {total}, the image has {height * width} pixels')
    return rle_codec.frPyObjects({'size': [height, width], 'counts': counts}, height, width)


def decompress(where: str, text: str) -> list[int]:
    """Decode COCO's compressed run lengths: 5 bits a character from '0' on, low bits first."""
    if text[:2] in ("b'", 'b"'):  # bytes that Python printed
        text = text[2:-1].replace('\\\\', '\\')
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
