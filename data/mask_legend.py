"""Read which class a value of a mask is: entries of --map such as 255=1 and '#ff0000'=can, and files."""

import csv
import difflib
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from config import match_key
from data.importers import read_lines
from data.paths import exists
from metrics import IGNORED
from utils.errors import BadInput

COLOUR = 1 << 24  # a colour's value is this and 0xRRGGBB
IGNORED_NAMES = {'ignore', 'ignored'}
NO_CLASSES = {'void', 'unlabelled', 'unlabeled', *IGNORED_NAMES}  # some tables mean the background by them
BACKGROUND = 'background'
# the names of a table's columns, in whatever words
HEADER = re.compile(
    '((pixel|class|category|label)[ _]?)?'
    '(value|id|index|name|class|label|category|colou?r|hex|rgb|[rgb]|red|green|blue)',
    re.I,
)
# CVAT's labelmap.txt is can:255,0,0::, label_colors.txt of CamVid is 255 0 0 can
LABELMAP = re.compile(r'(?P<name>[^:]+):(?P<colour>\d+,\d+,\d+)(:.*)?', re.ASCII)
LABEL_COLORS = re.compile(r'(?P<colour>\d+\s+\d+\s+\d+)\s+(?P<name>\S.*)', re.ASCII)


@dataclass(frozen=True)
class Legend:
    """Hold what --map says: the class id of each value, and how the masks are to be read."""

    classes: dict[int, int]
    entries: dict[str, list[int]]  # the values of each entry of the command line
    unused: dict[int, str]  # the names that files give to values of no class
    has_colours: bool
    has_table: bool  # a file says which class an id is, so that no id is its own class


def show(value: int) -> str:
    """Return a value as a person gives it: 11, or #ff0000."""
    return f'#{value - COLOUR:06x}' if value >= COLOUR else str(value)


def grey(ids: np.ndarray) -> np.ndarray:
    """Return ids below 256 as the colours of those greys, in values; others stay."""
    return np.where(ids < 256, COLOUR + ids * 0x010101, ids)


def read_legend(texts: Sequence[str], classes: Sequence[str]) -> Legend:
    """Read the entries of --map; one of the command line counts before one of a file. Raises BadInput."""
    entries = {text: list(parse_values(text)) for text in texts if '=' in text}
    tables = {text: read_colours(Path(text), classes) for text in texts if text not in entries}
    in_files = [value for table in tables.values() for names in table for value in names]
    has_colours = any(value >= COLOUR for value in (*in_files, *(v[0] for v in entries.values())))
    if has_colours:  # an id is then that grey
        entries = {text: grey(np.array(values)).tolist() for text, values in entries.items()}
    lookup: dict[int, int] = {}
    for text, values in entries.items():
        k = find_class(text.partition('=')[2], classes, where=f'--map {text[:80]}')
        for value in values:
            if lookup.setdefault(value, k) != k:
                first = next(other for other in entries if value in entries[other])
                raise BadInput(f'--map {text[:80]}: {show(value)} is mapped twice, first by {first}')
    unused: dict[int, str] = {}
    for colours, names in tables.values():
        lookup = colours | lookup
        unused |= names
    unused = {value: name for value, name in unused.items() if value not in lookup}
    return Legend(lookup, entries, unused, has_colours, bool(tables))


def parse_values(entry: str) -> range:
    """Parse the values of an entry: an id, a range of ids, #rrggbb, or r,g,b. Raises BadInput."""
    text = entry.partition('=')[0].strip()
    if match := re.fullmatch(r'(\d{1,5})(?:\s*-\s*(\d{1,5}))?', text, re.ASCII):
        first, last = int(match[1]), int(match[2] or match[1])
        if first <= last < 1 << 16:
            return range(first, last + 1)
    colour = parse_colour(re.split(r'\s*,\s*', text.removeprefix('(').removesuffix(')')))
    if re.fullmatch(r'#[0-9a-fA-F]{6}', text, re.ASCII):
        colour = COLOUR + int(text[1:], 16)
    if colour is not None:
        return range(colour, colour + 1)
    ids = 'an id such as 255=1, a range of ids such as 1-40=can'
    expected = f"{ids}, a colour such as '#ff0000'=can or 255,0,0=can, or a file of name,r,g,b"
    raise BadInput(f'--map {entry[:80]}: found {text[:40]!r}, expected {expected}')


def parse_colour(texts: Sequence[str]) -> int | None:
    """Return the value of a colour, given as red, green and blue; None if they are not 0 to 255."""
    if len(texts) != 3 or not all(re.fullmatch(r'\d{1,3}', text, re.ASCII) for text in texts):
        return None
    red, green, blue = map(int, texts)
    return COLOUR + (red << 16) + (green << 8) + blue if max(red, green, blue) < 256 else None


def find_class(text: str, classes: Sequence[str], where: str) -> int:
    """Return the id of a class that is given by its name or id; IGNORED for ignore. Raises BadInput."""
    key = match_key(text)
    names = [match_key(name) for name in classes]
    if key in names:
        return names.index(key)
    if key in IGNORED_NAMES:
        return IGNORED
    if key == BACKGROUND:
        return 0
    if re.fullmatch(r'\d{1,3}', key, re.ASCII) and int(key) < len(classes):
        return int(key)
    near = difflib.get_close_matches(key, names, n=1)
    hint = f'; did you mean {classes[names.index(near[0])]!r}?' if near else ''
    allowed = f'a class ({", ".join(classes[1:6])}{", ..." if len(classes) > 6 else ""})'
    allowed += f', an id from 0 to {len(classes) - 1}, background or ignore'
    raise BadInput(f'{where}: found {text[:60]!r}, expected {allowed}{hint}')


def read_colours(path: Path, classes: Sequence[str]) -> tuple[dict[int, int], dict[int, str]]:
    """Read the class ids of the colours of a file, and the names of those that are no class. Raises BadInput.

    The file is a CSV name,r,g,b, CVAT's labelmap.txt, CamVid's label_colors.txt, or Roboflow's _classes.csv,
    which has ids in place of colours.
    """
    lookup: dict[int, int] = {}
    unused: dict[int, str] = {}
    for number, name, colour in read_rows(path):
        if colour in lookup or colour in unused:
            raise BadInput(f'{path}: line {number}: the value {show(colour)} stands twice')
        try:
            lookup[colour] = find_class(name, classes, where=f'{path}: line {number}')
        except BadInput:
            unused[colour] = f'{name} in {path}'
    if not set(lookup.values()) - {0}:
        names = ', '.join(classes[1:6])
        raise BadInput(f'{path}: has none of the classes {names}; expected name,r,g,b or id,name of each')
    return lookup, unused


def read_names(path: Path) -> tuple[str, ...]:
    """Return the classes of a file of names and colours, the background first. Raises BadInput."""
    names = [name for _, name, _ in read_rows(path)]
    return ('Background', *(name for name in names if match_key(name) not in {BACKGROUND, *NO_CLASSES}))


def is_table(path: Path) -> bool:
    """Return True for a file that --map reads: of names, each with an id or a colour."""
    try:
        return path.is_file() and bool(read_rows(path))
    except BadInput:
        return False


def read_rows(path: Path) -> list[tuple[int, str, int]]:
    """Return the line number, name and value of each row, a colour or an id. Raises BadInput."""
    if not exists(path):
        raise BadInput(f'--map {path}: no such file, and no entry such as 255=1')
    rows = []
    for number, line in enumerate(map(str.strip, read_lines(path)), start=1):
        if not line or line.startswith('#'):
            continue
        if match := LABELMAP.fullmatch(line) or LABEL_COLORS.fullmatch(line):
            name, colour = match['name'].strip(), re.split(r'[,\s]+', match['colour'])
        else:
            delimiter = ',' if ',' in line else ';'  # Excel's, where a comma is in numbers
            row = csv.reader([line], skipinitialspace=True, delimiter=delimiter)
            name, *colour = (text.strip() for text in next(row))
        if not rows and colour and all(HEADER.fullmatch(text) for text in (name, *colour)):
            continue  # the header
        value = parse_colour(colour)
        if len(colour) == 1 and re.fullmatch(r'\d{1,5}', name, re.ASCII) and int(name) < 1 << 16:
            name, value = colour[0], int(name)
        if value is None:
            advice = 'names alone, in the order of ids, go to --classes'
            expected = f'expected name,r,g,b of 0 to 255, or id,name; {advice}'
            raise BadInput(f'{path}: line {number}: found {line[:60]!r}, {expected}')
        rows.append((number, name, value))
    if not rows:
        raise BadInput(f'{path}: has no colours, expected lines of name,r,g,b or id,name')
    return rows
