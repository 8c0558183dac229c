"""Draw masks and numbers: overlays, sheets of photos, curves, a confusion matrix.

Shapes: H W the size of a photo, h w that of a view, C bands, K classes. Pictures are (H, W, 3) uint8 RGB;
masks are (H, W) uint8 ids, or (K, H, W) planes of classes that may overlap, with IGNORED for unknown pixels.
"""

import io
from collections.abc import Collection, Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from metrics import IGNORED, row_shares
from utils.files import write_whole
from utils.palette import PALETTE

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RIGHT, WRONG = (0, 96, 168), (200, 30, 40)  # blue and red
INK, PALE, PAPER = '#1c1c1c', '#6b6b6b', '#ffffff'
VIEW = 256  # longer side of a photo in a sheet, the same as of a mask of the home competition
GAP = 8
MAX_NUMBERED = 40  # classes of a confusion matrix whose cells have numbers


def to_display(photo: np.ndarray) -> np.ndarray:
    """Return (H, W, 3) uint8 of an (H, W) or (H, W, C) photo: grey for one or two bands, else the first three
    as RGB. More than 8 bits are stretched from the darkest to the brightest value.
    """
    bands = photo[..., None] if photo.ndim == 2 else photo
    bands = bands[..., :3] if bands.shape[2] >= 3 else np.repeat(bands[..., :1], 3, axis=2)
    if bands.dtype == np.uint8:
        return np.ascontiguousarray(bands)
    low, high = float(bands.min()), float(bands.max())
    return np.round((bands - low) * (255 / max(high - low, 1e-12))).astype(np.uint8)


def fit(size: tuple[int, int], side: int) -> tuple[int, int]:
    """Return the (h, w) with the aspect of (H, W) whose longer side is `side`."""
    return tuple(max(1, round(length * side / max(size))) for length in size)


def resize_photo(photo: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize a photo of any bands to an (h, w, 3) picture."""
    bands = photo if photo.ndim == 2 else np.ascontiguousarray(photo[..., :3])
    smaller = max(size) <= max(photo.shape[:2])
    interpolation = cv2.INTER_AREA if smaller else cv2.INTER_LINEAR
    return to_display(cv2.resize(bands, size[::-1], interpolation=interpolation))


def resize_mask(mask: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Resize ids or planes to (h, w) or (K, h, w), nearest neighbour."""
    if mask.shape[-2:] == size:
        return mask
    resized = [cv2.resize(plane, size[::-1], interpolation=cv2.INTER_NEAREST) for plane in _planes(mask)]
    return np.stack(resized).reshape(*mask.shape[:-2], *size)


def _planes(mask: np.ndarray) -> np.ndarray:
    """Return planes as they are, and ids as one plane: (n, H, W)."""
    return mask.reshape(-1, *mask.shape[-2:])


def regions_of(mask: np.ndarray) -> dict[int, np.ndarray]:
    """Return the (H, W) bool pixels of each class of objects that a mask has, and of IGNORED."""
    if mask.ndim == 2:
        return {int(k): mask == k for k in np.unique(mask[mask > 0])}
    regions = {k: plane == 1 for k, plane in enumerate(mask)} | {IGNORED: (mask == IGNORED).any(0)}
    return {k: region for k, region in regions.items() if region.any()}


def innermost(region: np.ndarray) -> tuple[int, int]:
    """Return the (x, y) of the pixel of an (H, W) bool region that is farthest from its edge."""
    (rows, columns), inside = _cut(region, 0)
    depth = cv2.distanceTransform(np.pad(inside.astype(np.uint8), 1), cv2.DIST_L2, 3)[1:-1, 1:-1]
    y, x = np.unravel_index(depth.argmax(), depth.shape)
    return columns.start + int(x), rows.start + int(y)


def differing(masks: Sequence[np.ndarray]) -> np.ndarray:
    """Return the (H, W) bool pixels on which ids, or any of the planes, are not the same in all masks."""
    differ = np.zeros(masks[0].shape[-2:], bool)
    for mask in masks[1:]:
        for plane, first in zip(_planes(mask), _planes(masks[0]), strict=True):
            differ |= plane != first
    return differ


def overlay(
    image: np.ndarray,
    mask: np.ndarray,
    opacity: float = 0.6,
    side: int | None = None,
    palette: np.ndarray = PALETTE,
) -> np.ndarray:
    """Tint and outline the objects of a mask on an (H, W, 3) photo; the background is unchanged.

    Colours are mixed where objects overlap, and each keeps its outline; `side` is outline_side of the photo
    if these are some of its rows; the (256, 3) `palette` has the colour of each class.
    """
    if image.shape[:2] != mask.shape[-2:]:
        raise ValueError(f'image is {image.shape[:2]}, mask is {mask.shape[-2:]}; expected one size')
    side = side or outline_side(image.shape)
    regions = [(k, *_cut(region, side // 2)) for k, region in regions_of(mask).items()]
    total, depth = np.zeros(image.shape, np.uint16), np.zeros((*image.shape[:2], 1), np.uint16)
    for k, box, region in regions:
        total[box][region] += palette[k]
        depth[box][region] += 1
    colours = (total // np.maximum(depth, 1)).astype(np.uint8)
    mixed = cv2.addWeighted(image, 1 - opacity, colours, opacity, 0)
    out = np.where(depth > 0, mixed, image)
    kernel = np.ones((side, side), np.uint8)
    for k, box, region in regions:
        inner = cv2.erode(region.astype(np.uint8), kernel)
        out[box][region & (inner == 0)] = palette[k]
    return out


def outline_side(shape: tuple[int, ...]) -> int:
    """Return the side of the square by which an outline is found: 1 pixel wide at 256, and 3 at 1200."""
    return 2 * max(1, round(min(shape[:2]) / 400)) + 1


def _cut(region: np.ndarray, margin: int) -> tuple[tuple[slice, slice], np.ndarray]:
    """Return the box around a region, with a margin as far as the photo reaches, and the region in it."""
    x, y, w, h = cv2.boundingRect(region.astype(np.uint8))
    box = slice(max(0, y - margin), y + h + margin), slice(max(0, x - margin), x + w + margin)
    return box, region[box]


def write_png(path: str | Path, image: np.ndarray, step: int = 1) -> None:
    """Write an RGB picture, whole or not at all; a `step` of 8 rounds it, which halves the size of photos."""
    rounded = image if step == 1 else ((image.astype(int) + step // 2) // step * step).clip(max=255)
    file = io.BytesIO()
    Image.fromarray(rounded.astype(np.uint8)).save(file, 'PNG', optimize=True)
    with write_whole(path) as out:
        out.write(file.getvalue())


# --- sheets of photos ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A photo in a sheet: its title and a note above it, its views, and the ids of the objects in them."""

    title: str
    note: str
    views: tuple[np.ndarray, ...]
    ids: frozenset[int]


def comparison_row(
    name: str,
    photo: np.ndarray,
    truth: np.ndarray | None,
    pred: np.ndarray,
    note: str = '',
    palette: np.ndarray = PALETTE,
) -> Row:
    """Put a photo of any size and bands beside its truth, if known, and its prediction, masks of any size."""
    size = fit(photo.shape[:2], VIEW)
    view = resize_photo(photo, size)
    masks = [resize_mask(mask, size) for mask in (truth, pred) if mask is not None]
    views = (view, *(overlay(view, mask, palette=palette) for mask in masks))
    return Row(name, note, views, frozenset(k for mask in masks for k in regions_of(mask)))


def score_note(label: str, score: float) -> str:
    """Format a score to stand above a photo; nothing for nan."""
    return '' if np.isnan(score) else f'{label} {score:.2f}'


def sheet(
    rows: Sequence[Row],
    headings: Sequence[str],
    classes: Sequence[str],
    groups: int = 2,
    palette: np.ndarray = PALETTE,
) -> np.ndarray:
    """Draw rows of views under their headings, in `groups` columns, with a legend of the classes in them."""
    groups = min(groups, len(rows))
    wide = len(headings) * VIEW + (len(headings) - 1) * GAP // 2
    tallest = max(view.shape[0] for row in rows for view in row.views)
    tall = tallest + 28
    ids, width = {k for row in rows for k in row.ids}, groups * (wide + 3 * GAP) - GAP
    legend = draw_legend(ids, classes, width, palette)
    top = 2 * GAP + 20
    lines = [rows[start : start + groups] for start in range(0, len(rows), groups)]
    height = top + len(lines) * tall + legend.shape[0] + GAP
    canvas = Image.new('RGB', (width, height), PAPER)
    draw = ImageDraw.Draw(canvas)
    for column in range(groups):
        left = GAP + column * (wide + 3 * GAP)
        for number, heading in enumerate(headings):
            middle = left + number * (VIEW + GAP // 2) + VIEW // 2
            draw.text((middle, GAP + 10), heading, INK, font(15), 'mm')
        for line, row in enumerate(line[column] for line in lines if column < len(line)):
            y = top + line * tall
            draw.text((left + wide, y + 10), row.note, PALE, font(13), 'rm')
            title = elide(row.title, 13, wide - text_width(row.note, 13) - GAP)
            draw.text((left, y + 10), title, PALE, font(13), 'lm')
            for number, view in enumerate(row.views):
                x = left + number * (VIEW + GAP // 2) + (VIEW - view.shape[1]) // 2
                canvas.paste(Image.fromarray(view), (x, y + 22 + (tallest - view.shape[0]) // 2))
    canvas.paste(Image.fromarray(legend), (0, top + len(lines) * tall))
    return np.array(canvas)


def draw_legend(
    ids: Collection[int], classes: Sequence[str], width: int, palette: np.ndarray = PALETTE
) -> np.ndarray:
    """Draw a swatch and a name for each id, in lines of `width` pixels."""
    entries: list[tuple[int, int, int, str]] = []
    x, y = GAP, GAP
    for k in sorted(ids):
        name = 'ignored' if k == IGNORED else classes[k]
        needed = 22 + text_width(name, 14) + 2 * GAP
        if x + needed > width and x > GAP:
            x, y = GAP, y + 24
        entries.append((x, y, k, name))
        x += needed
    canvas = Image.new('RGB', (width, y + 24), PAPER)
    draw = ImageDraw.Draw(canvas)
    for x, y, k, name in entries:
        draw.rectangle((x, y + 2, x + 15, y + 17), tuple(palette[k].tolist()), PALE)
        draw.text((x + 22, y + 10), name, INK, font(14), 'lm')
    return np.array(canvas)


# --- charts -------------------------------------------------------------------------------------------------


def draw_confusion(confusion: np.ndarray, classes: Sequence[str]) -> np.ndarray:
    """Draw (K, K) pixel counts as percentages of each row, which holds the pixels of a true class."""
    shares, known = row_shares(confusion), confusion.any(1, keepdims=True)
    names = [elide(name, 15, 200) for name in classes]
    few = len(names) <= MAX_NUMBERED
    width, height = (0.6, 0.36) if few else (0.2, 0.2)  # of a cell, in inches
    margin = 0.9 + max(text_width(name, 15) for name in names) / 100
    full = np.where(np.eye(len(names), dtype=bool)[..., None], RIGHT, WRONG)
    with new_figure(margin + max(2.5, width * len(names)), margin + max(1.2, height * len(names))) as figure:
        axes = figure.add_subplot()
        axes.imshow(np.uint8(255 + (full - 255) * shares[..., None] ** 0.7), aspect='auto')
        for row, column in np.argwhere(np.broadcast_to(known, shares.shape)) if few else ():
            share = shares[row, column]
            ink = PAPER if share > 0.45 else INK if share >= 0.005 else '#b0b0b0'
            axes.text(column, row, f'{100 * share:.1f}', color=ink, size=10, ha='center', va='center')
        style = {'rotation': 45 if few else 90, 'rotation_mode': 'anchor', 'ha': 'left', 'va': 'center'}
        axes.set_xticks(range(len(names)), names, **style)
        axes.set_yticks(range(len(names)), names)
        axes.tick_params(length=0, labeltop=True, labelbottom=False)
        axes.set_xlabel('predicted class, % of the true class', color=PALE)
        axes.set_ylabel('true class', color=PALE)
        borders = np.arange(len(names) - 1) + 0.5
        axes.set_xticks(borders, minor=True)
        axes.set_yticks(borders, minor=True)
        axes.tick_params(which='minor', length=0)
        axes.grid(which='minor', color=PAPER, linewidth=2)
        axes.spines[:].set_visible(False)
        return to_pixels(figure)


def draw_curves(panels: dict[str, dict[str, list[tuple[float, float]]]]) -> np.ndarray:
    """Draw a panel for each title, side by side, with a line of (epoch, value) points for each name."""
    with new_figure(5.6 * len(panels), 4) as figure:
        (row,) = figure.subplots(1, len(panels), squeeze=False)
        for axes, (title, lines) in zip(row, panels.items(), strict=True):
            drawn = {name: points for name, points in lines.items() if points}
            for name, points in drawn.items():
                axes.plot(*zip(*points, strict=True), label=name, marker='.' if len(points) < 40 else '')
            axes.set_xlim(left=0)
            axes.set_title(title, loc='left')
            axes.set_xlabel('epoch', loc='right', color=PALE)
            axes.xaxis.get_major_locator().set_params(integer=True)
            axes.tick_params(length=0, labelcolor=PALE)
            axes.grid(color='#e4e4e4')
            axes.spines[:].set_visible(False)
            if drawn:
                axes.legend(ncols=-(-len(drawn) // 8), fontsize='small', frameon=False)
            else:
                axes.text(0.5, 0.5, 'nothing recorded', color=PALE, ha='center', transform=axes.transAxes)
        return to_pixels(figure)


@contextmanager
def new_figure(width: float, height: float) -> Generator['Figure']:
    """Make a Matplotlib figure of that many inches; $ and _ in names are not markup."""
    import matplotlib  # slow to import, and few need it
    from matplotlib.figure import Figure

    with matplotlib.rc_context({'text.parse_math': False, 'font.size': 11}):
        yield Figure((width, height), dpi=100, layout='constrained')


def to_pixels(figure: 'Figure') -> np.ndarray:
    """Render a figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return np.array(canvas.buffer_rgba())[..., :3]


# --- text ---------------------------------------------------------------------------------------------------


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def text_width(text: str, size: int) -> int:
    return round(font(size).getlength(text))


def elide(text: str, size: int, width: int) -> str:
    """Shorten a text that is wider than `width` pixels: dots replace its beginning."""
    if text_width(text, size) <= width:
        return text
    start = next((i for i in range(len(text)) if text_width('...' + text[i:], size) <= width), len(text))
    return '...' + text[start:]
