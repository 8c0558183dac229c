"""Code masks as run lengths: pixels are counted down the columns or along the rows, and each run of a mask's
pixels is given by its start and its length.

    runs = encode_runs(mask, 'column')                      # (r, 2) int64: start from 0, and length
    text = format_runs(runs, first=1)                       # b'5131 4 5387 4'
    runs = parse_runs(text, mask.shape, first=1, where='a.csv: line 2')
    mask = decode_runs(runs, mask.shape, 'column')

Runs that are written are maximal and ascending. Only the columns (or rows) that hold an object are touched,
so that most of a large photo costs nothing.

Shapes: H W the size of a mask, r runs.
"""

import cv2
import numpy as np

from utils.competition import Order
from utils.errors import BadInput

Size = tuple[int, int]  # (H, W)
DIGITS, SPACE = b'0123456789', b' \t\r\n'


def encode_runs(mask: np.ndarray, order: Order = 'column') -> np.ndarray:
    """Encode an (H, W) mask, bool or uint8 of 0 and 1, as (r, 2) int64 runs. Raises ValueError."""
    return encode_ids(mask, order)[0]


def encode_ids(mask: np.ndarray, order: Order = 'column') -> tuple[np.ndarray, np.ndarray]:
    """Encode the ids above 0 of an (H, W) mask as (r, 2) int64 runs and the (r,) uint8 id of each.

    Raises ValueError unless the mask is bool or uint8.
    """
    if mask.ndim != 2 or mask.dtype not in (np.bool_, np.uint8):
        raise ValueError(f'a mask is {mask.dtype} {mask.shape}, expected bool or uint8 (H, W)')
    mask = mask.view(np.uint8)
    lines = np.flatnonzero(mask.any(0 if order == 'column' else 1))  # columns or rows with an object
    if not lines.size:
        return np.zeros((0, 2), np.int64), np.zeros(0, np.uint8)
    first, end = int(lines[0]), int(lines[-1]) + 1
    part = cv2.transpose(mask[:, first:end]) if order == 'column' else mask[first:end]
    pixels = part.ravel()
    changes = np.flatnonzero(pixels[1:] != pixels[:-1]) + 1
    bounds = np.concatenate([[0], changes, [pixels.size]])
    ids = pixels[bounds[:-1]]
    runs = np.stack([bounds[:-1] + first * part.shape[1], np.diff(bounds)], axis=1)
    return runs[ids > 0], ids[ids > 0]


def decode_runs(runs: np.ndarray, size: Size, order: Order = 'column') -> np.ndarray:
    """Decode (r, 2) runs, ascending and inside, into an (H, W) bool mask."""
    return decode_ids(runs, np.ones(len(runs), np.uint8), size, order).view(np.bool_)


def decode_ids(runs: np.ndarray, ids: np.ndarray, size: Size, order: Order = 'column') -> np.ndarray:
    """Decode (r, 2) runs, ascending and inside, and the (r,) uint8 id of each into an (H, W) uint8 mask."""
    mask = np.zeros(size, np.uint8)
    draw_runs(mask, runs, ids, order)
    return mask


def draw_runs(mask: np.ndarray, runs: np.ndarray, ids: np.ndarray, order: Order = 'column') -> None:
    """Draw (r, 2) runs, ascending and inside, with their (r,) ids into an (H, W) uint8 mask of zeros."""
    if not len(runs):
        return
    length = mask.shape[0] if order == 'column' else mask.shape[1]  # of a column or row
    first, end = int(runs[0, 0]) // length, int(runs[-1].sum() - 1) // length + 1
    inner = np.stack([runs[:, 0], runs.sum(1)], axis=1).ravel()
    bounds = np.concatenate([[first * length], inner, [end * length]])
    values = np.zeros(len(bounds) - 1, np.uint8)
    values[1::2] = ids
    part = np.repeat(values, np.diff(bounds)).reshape(-1, length)
    if order == 'column':
        mask[:, first:end] = cv2.transpose(part)
    else:
        mask[first:end] = part


def count_runs(runs: np.ndarray, pixels: int) -> list[int]:
    """Return the lengths of what is outside and inside of (r, 2) runs in turn, as COCO counts pixels."""
    inner = np.stack([runs[:, 0], runs.sum(1)], axis=1).ravel()
    return np.diff(np.concatenate([[0], inner, [pixels]])).tolist()


def join_runs(parts: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Sort the runs of several masks: return (r, 2) runs, the (r,) mask of each, and the (n,) places in them
    of runs that begin before the run in front ends.
    """
    runs = np.concatenate([np.zeros((0, 2), np.int64), *parts])
    owners = np.repeat(np.arange(len(parts)), [len(part) for part in parts])
    order = np.argsort(runs[:, 0], kind='stable')
    runs, owners = runs[order], owners[order]
    return runs, owners, np.flatnonzero(runs[1:, 0] < runs[:-1].sum(1)) + 1


def pixel_of(start: int, size: Size, order: Order) -> tuple[int, int]:
    """Return (row, column) of a pixel by its number from 0."""
    return divmod(start, size[1]) if order == 'row' else divmod(start, size[0])[::-1]


def format_runs(runs: np.ndarray, first: int = 1) -> bytes:
    """Format (r, 2) runs as text: start length start length ..., where `first` is the number of pixel 0."""
    return ' '.join(map(str, (runs + (first, 0)).ravel().tolist())).encode()


def parse_runs(text: bytes, size: Size, first: int, where: str, strict: bool = False) -> np.ndarray:
    """Parse the text of an (H, W) mask into (r, 2) int64 runs. Raises BadInput(where ...).

    Runs must be ascending, must not overlap, and lie inside the mask. If `strict`, there is one space between
    numbers, none at the ends, and no zero in front of a number.
    """
    stripped = text.strip()
    if not stripped:
        return np.zeros((0, 2), np.int64)
    if stripped.translate(None, DIGITS + SPACE):
        raise BadInput(f'{where}: {_find_letter(stripped)}')
    numbers = np.fromstring(stripped, np.int64, sep=' ')  # too large ones become the largest
    if len(numbers) % 2:
        raise BadInput(f'{where}: has {len(numbers):,} numbers; expected pairs of a start and a length')
    runs = numbers.reshape(-1, 2)
    runs[:, 0] -= first
    pixels = size[0] * size[1]
    starts, lengths = runs.T
    wrong = (starts < 0) | (lengths < 1) | (starts >= pixels) | (lengths > pixels - starts)
    wrong[1:] |= starts[1:] - starts[:-1] < lengths[:-1]
    if wrong.any():
        raise BadInput(f'{where}: {_describe_run(runs, int(wrong.argmax()), size, first)}')
    if strict and text != format_runs(runs, first):
        fault = 'has a number with a zero in front, or other than one space between two'
        raise BadInput(f'{where}: {fault}; expected such as {format_runs(runs[:2], first).decode()!r}')
    return runs


def _find_letter(text: bytes) -> str:
    """Describe the first token that is not a number."""
    tokens = text.split()
    position, token = next((n, token) for n, token in enumerate(tokens, start=1) if not token.isdigit())
    found = token[:20].decode('ascii', 'backslashreplace')
    return f'number {position} is {found!r}; expected whole numbers, start length start length ...'


def _describe_run(runs: np.ndarray, place: int, size: Size, first: int) -> str:
    """Describe what is wrong with a run."""
    start, length = runs[place].tolist()
    run = f'run {place + 1} ({start + first} {length})'
    pixels = size[0] * size[1]
    if length < 1:
        return f'{run} has no pixel; expected a length of 1 or more'
    if start < 0:
        return f'{run} begins before the first pixel, {first}; is it first: 0?'
    if start >= pixels or length > pixels - start:
        last = f'the last pixel, {pixels - 1 + first}, of {size[0]}x{size[1]}'
        return f'{run} goes beyond {last}'
    before = f'run {place} ({runs[place - 1, 0] + first} {runs[place - 1, 1]})'
    if start < runs[place - 1, 0]:
        return f'{run} begins before {before}; expected ascending starts'
    return f'{run} overlaps {before}'
