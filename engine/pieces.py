"""Find the pieces in a predicted mask, how sure the model is of each, and the bin that it goes into.

    pieces = find_pieces(mask, confidence)              # the largest first
    bins = read_bins()
    bin_of(pieces[0], classes, bins).name               # 'Glass bottles', or 'not sure'

A piece is a connected region of a class, and its confidence is the mean probability of that class in it.
Regions below a confidence are not sure; those that touch are one piece. The bins are those of Korea; edit
bins.csv to change them.

Shapes: H W the size of the photo, K classes. Masks are (H, W) ids or (K, H, W) planes of classes that may
overlap; `confidence` is of the same shape, uint8: the probability of what the mask says, 255 for 1.
"""

import csv
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw

from metrics import IGNORED
from utils.errors import BadInput, one_line
from utils.plotting import PALETTE, font, innermost, regions_of

BINS = Path(__file__).with_name('bins.csv')
COLUMNS = ('class', 'bin', 'how', 'class_ko', 'bin_ko', 'how_ko')
LANGUAGES = ('en', 'ko')


@dataclass(frozen=True)
class Limits:
    """What a region must have: a confidence, below which it is not sure, and a share of the photo's pixels,
    below which it is no piece.
    """

    confidence: float = 0.5
    share: float = 0.004


@dataclass(frozen=True)
class Piece:
    """A connected region of a class, or of several if the model is not sure which."""

    class_ids: tuple[int, ...]  # the one with most pixels first
    confidence: float
    is_sure: bool
    share: float  # of the photo's pixels
    corner: tuple[int, int]  # (x, y) of its box
    region: np.ndarray = field(repr=False, compare=False)  # (h, w) bool, the pixels of its box

    @property
    def box(self) -> tuple[slice, slice]:
        """Return the rows and the columns of the box."""
        (x, y), (height, width) = self.corner, self.region.shape
        return slice(y, y + height), slice(x, x + width)

    @property
    def label(self) -> int:
        """Return the id that the piece is painted in: of its class, or IGNORED if that is not sure."""
        return self.class_ids[0] if self.is_sure else IGNORED

    @cached_property
    def pixels(self) -> int:
        return int(np.count_nonzero(self.region))

    @cached_property
    def middle(self) -> tuple[int, int]:
        """Return the (x, y) of the pixel that is farthest from the region's edge."""
        x, y = innermost(self.region)
        return self.corner[0] + x, self.corner[1] + y


def find_pieces(mask: np.ndarray, confidence: np.ndarray, limits: Limits | None = None) -> list[Piece]:
    """Find the pieces of ids (H, W) or planes (K, H, W), the largest first."""
    limits = limits or Limits()
    regions = [
        region
        for k, plane in regions_of(mask).items()
        for region in split_plane(k, plane, confidence if mask.ndim == 2 else confidence[k], limits)
    ]
    sure = [region for region in regions if region.is_sure]
    merged = merge([region for region in regions if not region.is_sure], mask.shape[-2:])
    pieces = [piece for piece in [*sure, *merged] if piece.share >= limits.share]
    return sorted(pieces, key=lambda piece: -piece.share)


def split_plane(k: int, plane: np.ndarray, confidence: np.ndarray, limits: Limits) -> Iterator[Piece]:
    """Yield the connected regions of a class in its (H, W) bool pixels."""
    count, labels, stats, _ = cv2.connectedComponentsWithStats(plane.astype(np.uint8))
    for label in range(1, count):
        x, y, width, height = (int(value) for value in stats[label, :4])
        box = slice(y, y + height), slice(x, x + width)
        region = labels[box] == label
        mean = float(confidence[box][region].mean()) / 255
        share = int(stats[label, cv2.CC_STAT_AREA]) / plane.size
        yield Piece((k,), mean, mean >= limits.confidence, share, (x, y), region)


def merge(regions: Sequence[Piece], size: tuple[int, int]) -> list[Piece]:
    """Merge the regions that touch or overlap, on a photo of a size (H, W)."""
    if not regions:
        return []
    canvas = np.zeros(size, np.uint8)
    for region in regions:
        canvas[region.box][region.region] = 1
    _, labels, stats, _ = cv2.connectedComponentsWithStats(canvas)
    groups = defaultdict(list)
    for region in regions:
        groups[int(labels[region.box][region.region][0])].append(region)
    pieces = []
    for label, parts in groups.items():
        x, y, width, height, area = (int(value) for value in stats[label])
        pixels = defaultdict(int)
        for part in parts:
            pixels[part.class_ids[0]] += part.pixels
        mean = sum(part.confidence * part.pixels for part in parts) / sum(pixels.values())
        ids = tuple(sorted(pixels, key=lambda k: -pixels[k]))
        region = labels[y : y + height, x : x + width] == label
        pieces.append(Piece(ids, mean, False, area / canvas.size, (x, y), region))
    return pieces


def paint(pieces: Sequence[Piece], shape: tuple[int, ...]) -> np.ndarray:
    """Paint pieces into a mask of a shape (H, W) or (K, H, W); what is not sure is IGNORED."""
    mask = np.zeros(shape, np.uint8)
    for piece in pieces:
        if mask.ndim == 2:
            mask[piece.box][piece.region] = piece.label
        else:
            plane = mask[piece.class_ids[0]]
            plane[piece.box][piece.region] = 1 if piece.is_sure else IGNORED
    return mask


def draw_numbers(picture: np.ndarray, pieces: Sequence[Piece]) -> np.ndarray:
    """Draw the number of each piece, from 1 on, into its middle, on an (H, W, 3) overlay."""
    drawn = Image.fromarray(picture)
    draw = ImageDraw.Draw(drawn)
    radius = max(9, round(max(picture.shape[:2]) / 40))
    for number, piece in enumerate(pieces, start=1):
        colour = tuple(PALETTE[piece.label].tolist()) if piece.is_sure else 'grey'
        draw.circle(piece.middle, radius, 'white', colour, max(2, radius // 5))
        draw.text(piece.middle, str(number), 'black', font(round(1.2 * radius)), 'mm')
    return np.array(drawn)


# --- bins ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bin:
    """The bin of a class in a language: the class's name there, the bin's, and what to do first."""

    class_name: str
    name: str
    how: str


NOT_SURE = {
    'en': Bin('not sure', 'Not sure', 'Look for yourself.'),
    'ko': Bin('확실하지 않음', '확실하지 않음', '직접 확인해 주세요.'),
}


def read_bins(language: str = 'en', path: Path = BINS) -> dict[str, Bin]:
    """Read the bin of each class in a language. Raises BadInput."""
    end = '' if language == 'en' else f'_{language}'
    try:
        with path.open(newline='', encoding='utf-8') as file:
            rows = [[row[key] for key in COLUMNS] for row in csv.DictReader(file)]
    except (OSError, KeyError, ValueError, csv.Error) as error:
        raise BadInput(f'{path}: expected lines of {",".join(COLUMNS)}: {one_line(error)}') from None
    if short := next((row for row in rows if None in row), None):
        raise BadInput(f'{path}: expected lines of {",".join(COLUMNS)}: the line of {short[0]!r} has fewer')
    tables = [dict(zip(COLUMNS, row, strict=True)) for row in rows]
    return {row['class']: Bin(*(row[f'{key}{end}'] for key in ('class', 'bin', 'how'))) for row in tables}


def bin_of(piece: Piece, classes: Sequence[str], bins: dict[str, Bin], language: str = 'en') -> Bin | None:
    """Return the bin of a piece; None if no bin is listed for its class."""
    return bins.get(classes[piece.class_ids[0]]) if piece.is_sure else NOT_SURE[language]
