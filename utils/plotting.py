"""Masks and numbers as pictures: the contest's colours, overlays, sheets of photos, a matrix, curves.

Shapes: H W a photo's own size, K classes. Pictures are (H, W, 3) uint8 RGB; masks are (H, W) uint8 ids,
IGNORED where nobody knows.
"""

import colorsys
import io
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from metrics import IGNORED, confusion_matrix, mean_iou
from utils.files import write_whole

CONTEST_COLOURS = (
    (0, 0, 0), (192, 0, 128), (0, 128, 192), (0, 128, 64), (128, 0, 0), (64, 0, 128),
    (64, 0, 192), (192, 128, 64), (192, 192, 128), (64, 64, 128), (128, 0, 192),
)  # fmt: skip
LINE_COLOURS = ('#1f77b4', '#ff7f0e', '#2ca02c', '#d62728', '#9467bd', '#8c564b', '#e377c2', '#17becf')
RIGHT, WRONG = (0, 96, 168), (200, 30, 40)  # the blue of Paper, and red
INK, PALE, PAPER = '#1c1c1c', '#6b6b6b', '#ffffff'
VIEW = 256  # side of a photo in a sheet: that of the masks that are submitted
GAP = 8


def make_palette() -> np.ndarray:
    """(256, 3) uint8 RGB: the contest's own colours, then generated ones, white for IGNORED."""
    palette = np.full((256, 3), 255, np.uint8)
    palette[: len(CONTEST_COLOURS)] = CONTEST_COLOURS
    for k in range(len(CONTEST_COLOURS), IGNORED):
        # hues by the golden ratio: far apart for neighbouring ids, and never the same
        rgb = colorsys.hsv_to_rgb(k * 0.618034 % 1, (0.55, 0.75, 0.95)[k % 3], (0.95, 0.75)[k // 3 % 2])
        palette[k] = [round(255 * value) for value in rgb]
    return palette


PALETTE = make_palette()


def overlay(image: np.ndarray, mask: np.ndarray, opacity: float = 0.6) -> np.ndarray:
    """(H, W, 3) photo under its (H, W) mask: objects tinted and outlined, background untouched."""
    if image.shape[:2] != mask.shape:
        raise ValueError(f'image is {image.shape[:2]}, mask is {mask.shape}; expected one size')
    colours = PALETTE[mask]
    mixed = cv2.addWeighted(image, 1 - opacity, colours, opacity, 0)
    painted = np.where((mask > 0)[..., None], mixed, image)
    side = 2 * max(1, round(min(mask.shape) / 400)) + 1  # an outline of 1 pixel at 256, of 3 at 1200
    kernel = np.ones((side, side), np.uint8)
    border = (mask > 0) & (cv2.dilate(mask, kernel) != cv2.erode(mask, kernel))
    return np.where(border[..., None], colours, painted)


def differences(image: np.ndarray, where: np.ndarray) -> np.ndarray:
    """(H, W, 3) photo, grey and pale but for the (H, W) bool pixels, which are red."""
    grey = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY)
    pale = np.repeat((128 + grey[..., None] // 2).astype(np.uint8), 3, axis=2)
    return np.where(where[..., None], np.array(WRONG, np.uint8), pale)


def write_png(path: str | Path, image: np.ndarray, step: int = 1) -> None:
    """Writes an RGB picture, whole or not; its values rounded to multiples of `step`. Raises BadInput.

    A step of 8 halves the file of photos, cannot be seen, and leaves the contest's colours as they are.
    """
    rounded = image if step == 1 else ((image.astype(int) + step // 2) // step * step).clip(max=255)
    file = io.BytesIO()
    Image.fromarray(rounded.astype(np.uint8)).save(file, 'PNG', optimize=True)
    with write_whole(path) as out:
        out.write(file.getvalue())


# --- sheets of photos ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A photo in a sheet: what stands above it, left and right, its views, and the ids seen in them."""

    title: str
    note: str
    views: tuple[np.ndarray, ...]
    ids: frozenset[int]


def comparison_row(name: str, image: np.ndarray, truth: np.ndarray | None, pred: np.ndarray) -> Row:
    """A photo of any size beside its truth, where that is known, and its prediction; masks are (256, 256)."""
    view = cv2.resize(image, (VIEW, VIEW), interpolation=cv2.INTER_AREA)
    masks = [pred] if truth is None else [truth, pred]
    score = np.nan
    if truth is not None:
        num_classes = int(max(pred.max(), truth[truth != IGNORED].max(initial=0))) + 1
        score = mean_iou(confusion_matrix(truth, pred, num_classes))
    return Row(
        name,
        '' if np.isnan(score) else f'mIoU {score:.2f}',
        (view, *(overlay(view, mask) for mask in masks)),
        frozenset(np.unique(masks).tolist()),
    )


def sheet(
    rows: Sequence[Row], headings: Sequence[str], classes: Sequence[str], groups: int = 2
) -> np.ndarray:
    """Rows of views under their headings, in `groups` columns, with a legend of the classes that are seen."""
    groups = min(groups, len(rows))
    wide = len(headings) * VIEW + (len(headings) - 1) * GAP // 2
    tall = VIEW + 28
    legend = draw_legend({k for row in rows for k in row.ids}, classes, groups * (wide + 3 * GAP) - GAP)
    top = 2 * GAP + 20
    lines = [rows[start : start + groups] for start in range(0, len(rows), groups)]
    canvas = Canvas(top + len(lines) * tall + legend.shape[0] + GAP, groups * (wide + 3 * GAP) - GAP)
    for column in range(groups):
        left = GAP + column * (wide + 3 * GAP)
        for number, heading in enumerate(headings):
            canvas.text((left + number * (VIEW + GAP // 2) + VIEW // 2, GAP + 10), heading, 15, anchor='mm')
        for line, row in enumerate(line[column] for line in lines if column < len(line)):
            y = top + line * tall
            note = canvas.text((left + wide, y + 10), row.note, 13, PALE, anchor='rm')
            canvas.text((left, y + 10), elide(row.title, 13, wide - note - GAP), 13, PALE, anchor='lm')
            for number, view in enumerate(row.views):
                canvas.paste((left + number * (VIEW + GAP // 2), y + 22), view)
    canvas.paste((0, top + len(lines) * tall), legend)
    return canvas.pixels()


def draw_legend(ids: Iterable[int], classes: Sequence[str], width: int) -> np.ndarray:
    """A swatch and a name for each id but the background's, in lines of `width` pixels."""
    places: list[tuple[int, int, int, str]] = []
    x, y = GAP, GAP
    for k in sorted(set(ids) - {0}):
        name = 'ignored' if k == IGNORED else classes[k]
        needed = 22 + text_width(name, 14) + 2 * GAP
        if x + needed > width and x > GAP:
            x, y = GAP, y + 24
        places.append((x, y, k, name))
        x += needed
    canvas = Canvas(y + 24, width)
    for x, y, k, name in places:
        canvas.draw.rectangle((x, y + 2, x + 15, y + 17), tuple(PALETTE[k].tolist()), PALE)
        canvas.text((x + 22, y + 10), name, 14, anchor='lm')
    return canvas.pixels()


# --- numbers ------------------------------------------------------------------------------------------------


def draw_confusion(confusion: np.ndarray, classes: Sequence[str]) -> np.ndarray:
    """(K, K) counts in per cent of the row: what the pixels that are truly a class were taken for."""
    totals = confusion.sum(1, keepdims=True)
    shares = np.divide(confusion, totals, out=np.zeros(confusion.shape), where=totals > 0)
    cell_w, cell_h = 58, 34
    names = [elide(name, 15, 180) for name in classes]
    margin = max(text_width(name, 15) for name in names)
    left, top = margin + 3 * GAP, margin + 5 * GAP
    canvas = Canvas(top + cell_h * len(names) + GAP, left + cell_w * len(names) + GAP)
    canvas.text((GAP, GAP), 'rows: truth; columns: prediction; % of the row', 12, PALE)
    for k, name in enumerate(names):
        canvas.text((left - GAP, top + cell_h * k + cell_h // 2), name, 15, anchor='rm')
        canvas.upright((left + cell_w * k + cell_w // 2, top - GAP), name, 15)
    for row, column in np.ndindex(shares.shape):
        share = shares[row, column]
        full = np.array(RIGHT if row == column else WRONG)
        colour = tuple(int(v) for v in 255 + (full - 255) * share**0.7)
        x, y = left + cell_w * column, top + cell_h * row
        canvas.draw.rectangle((x, y, x + cell_w - 2, y + cell_h - 2), colour)
        if totals[row]:
            ink = PAPER if share > 0.45 else INK if share >= 0.005 else '#b0b0b0'
            canvas.text(
                (x + cell_w // 2 - 1, y + cell_h // 2 - 1), f'{100 * share:.1f}', 13, ink, anchor='mm'
            )
    return canvas.pixels()


def draw_curves(panels: dict[str, dict[str, list[tuple[float, float]]]]) -> np.ndarray:
    """A panel for each title, side by side; in it a line of (epoch, value) points for each name."""
    return np.concatenate([_draw_panel(title, lines) for title, lines in panels.items()], axis=1)


def _draw_panel(title: str, lines: dict[str, list[tuple[float, float]]]) -> np.ndarray:
    scale = 2  # drawn twice as large, then averaged: PIL's lines are jagged
    width, height, left, top = 560 * scale, 400 * scale, 56 * scale, 40 * scale
    right, bottom = width - 16 * scale, height - (64 + 18 * ((len(lines) - 1) // 6)) * scale
    canvas = Canvas(height, width)
    canvas.text((left, top // 2), title, 16 * scale, anchor='lm')
    points = [point for line in lines.values() for point in line]
    if not points:
        canvas.text((width // 2, height // 2), 'nothing was recorded', 14 * scale, PALE, anchor='mm')
        return canvas.pixels(scale)
    x0, x1 = 0, max(1, max(x for x, _ in points))
    ticks = round_ticks(min(y for _, y in points), max(y for _, y in points))
    y0, y1 = ticks[0], ticks[-1]

    def place(x: float, y: float) -> tuple[int, int]:
        return (
            round(left + (x - x0) / (x1 - x0) * (right - left)),
            round(bottom - (y - y0) / (y1 - y0) * (bottom - top)),
        )

    for y in ticks:
        canvas.draw.line((place(x0, y), place(x1, y)), '#e4e4e4', scale)
        canvas.text((left - GAP * scale, place(x0, y)[1]), f'{y:.4g}', 12 * scale, PALE, anchor='rm')
    for x in sorted({round(x) for x in np.linspace(x0, x1, 6)}):
        canvas.text((place(x, y0)[0], bottom + 12 * scale), str(x), 12 * scale, PALE, anchor='mm')
    canvas.text((right, bottom + 28 * scale), 'epoch', 12 * scale, PALE, anchor='rm')
    for number, (name, line) in enumerate(lines.items()):
        colour = LINE_COLOURS[number % len(LINE_COLOURS)]
        for start, end in pairwise(line):
            canvas.draw.line((place(*start), place(*end)), colour, 2 * scale)
        for x, y in line if len(line) < 40 else line[-1:]:
            cx, cy = place(x, y)
            canvas.draw.circle((cx, cy), 2.5 * scale, colour)
        x, y = left + number % 6 * 80 * scale, bottom + (46 + number // 6 * 18) * scale
        canvas.draw.line((x, y, x + 16 * scale, y), colour, 3 * scale)
        canvas.text((x + 21 * scale, y), name, 12 * scale, anchor='lm')
    return canvas.pixels(scale)


def round_ticks(low: float, high: float) -> list[float]:
    """Some five round numbers from below `low` to above `high`."""
    span = max(high - low, 1e-3)
    step = 10 ** np.floor(np.log10(span / 4))
    step = next(step * factor for factor in (1, 2, 5, 10) if step * factor >= span / 5)
    first = np.floor(low / step + 1e-9)
    last = max(np.ceil(high / step - 1e-9), first + 1)
    return [round(float(k * step), 10) for k in np.arange(first, last + 1)]


# --- paper and ink ------------------------------------------------------------------------------------------


class Canvas:
    """A white picture to write and paste on."""

    def __init__(self, height: int, width: int) -> None:
        self.image = Image.new('RGB', (width, height), PAPER)
        self.draw = ImageDraw.Draw(self.image)

    def text(self, place: tuple[int, int], text: str, size: int, ink: str = INK, anchor: str = 'la') -> int:
        """Writes at (x, y); the width of what was written."""
        self.draw.text(place, text, ink, font(size), anchor)
        return text_width(text, size)

    def upright(self, foot: tuple[int, int], text: str, size: int) -> None:
        """Writes from (x, y) upwards, x being the middle of the line."""
        strip = Canvas(size + 6, text_width(text, size) + 2)
        strip.text((0, (size + 6) // 2), text, size, anchor='lm')
        turned = strip.image.transpose(Image.Transpose.ROTATE_90)
        self.image.paste(turned, (foot[0] - turned.width // 2, foot[1] - turned.height))

    def paste(self, place: tuple[int, int], picture: np.ndarray) -> None:
        self.image.paste(Image.fromarray(picture), place)

    def pixels(self, scale: int = 1) -> np.ndarray:
        """The picture, made smaller by a whole factor."""
        return np.array(self.image if scale == 1 else self.image.reduce(scale))


@cache
def font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)


def text_width(text: str, size: int) -> int:
    return round(font(size).getlength(text))


def elide(text: str, size: int, width: int) -> str:
    """The text, with dots in place of its beginning where it is wider than `width` pixels."""
    if text_width(text, size) <= width:
        return text
    start = next((i for i in range(len(text)) if text_width('...' + text[i:], size) <= width), len(text))
    return '...' + text[start:]
