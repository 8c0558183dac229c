"""Read, write and check CSVs of run lengths: a row for each image and class, or for each image.

    with RunReader(path, table) as reader:
        mask = reader.read(image_id)
    with RunWriter(path, table) as writer:
        writer.write(image_id, mask)

A RunTable says which columns there are, and what images and classes are called in them. It is written so, in
the order of its images and classes, and check_runs accepts nothing else. Everything else reads the CSVs of
other tools too: rows and columns in any order, other columns, quotes, a byte order mark, \\r\\n, more white
space; and '' or -1 for a mask without a pixel. A row is in memory at a time.

Shapes: H W the scored size of an image, K classes.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from utils.competition import Role, Submission
from utils.csv_rows import (
    decode_image_id,
    encode_image_id,
    id_key,
    open_csv,
    quote,
    read_place,
    require_home_line,
)
from utils.errors import BadInput, join_first
from utils.files import write_whole
from utils.foreign_csv import BOM, Layout, find_columns, header_fault, read_lines, split_fields, split_row
from utils.json_files import whole_number
from utils.run_lengths import (
    Size,
    draw_runs,
    encode_ids,
    format_runs,
    join_runs,
    parse_runs,
    pixel_of,
)

EMPTY = (b'', b'-1', b'nan', b'NaN', b'None')  # what other tools write for a mask without a pixel
SPARE = 16_384  # bytes of a row besides its numbers


@dataclass(frozen=True)
class RunTable:
    """Say what a CSV of run lengths has: its columns, and its images and classes as they are called there."""

    how: Submission
    names: Mapping[str, str]  # of the images, by image id
    classes: Sequence[str]  # names of the classes that have a row each, by id from first_id on
    first_id: int
    num_classes: int
    may_overlap: bool  # a mask is planes (K, H, W), not ids (H, W)
    sizes: Mapping[str, Size]  # at which images are scored, by image id

    @cached_property
    def image_keys(self) -> Mapping[str, str]:
        """Image ids by what other tools may call them."""
        exact = {name: image_id for image_id, name in self.names.items()}
        return {id_key(name): image_id for name, image_id in exact.items()} | exact

    @cached_property
    def class_keys(self) -> Mapping[str, int]:
        """Classes, from 0, by what other tools may call them."""
        exact = {name: k for k, name in enumerate(self.classes)}
        return {class_key(name): k for name, k in exact.items()} | exact

    @property
    def header(self) -> bytes:
        """The first line of the CSV."""
        return b','.join(quote(name.encode()) for name in self.how.columns) + b'\n'

    @property
    def longest_line(self) -> int:
        """Bytes that no row has: twice those of every other pixel, with room for more white space."""
        pixels = max((h * w for h, w in self.sizes.values()), default=0)
        return pixels * (len(str(pixels)) + 3) + SPARE

    def fields(self, image_id: str, k: int, mask: bytes, path: Path) -> list[bytes]:
        """Return the fields of the row of an image and its class k. Raises BadInput for impossible names."""
        name, class_name = self.names[image_id], self.classes[k]
        texts = {'image': name, 'class': class_name, 'image_class': f'{name}_{class_name}'}
        return [
            mask if role == 'mask' else encode_image_id(texts[role], path)
            for role in self.how.columns.values()
        ]

    def describe(self, image_id: str, k: int | None = None) -> str:
        """Name a row in a message, by its image, and its class if there are any."""
        row_class = f', class {self.classes[k]!r}' if k is not None and self.how.has_classes else ''
        return f'image {image_id!r}{row_class}'


def class_key(name: str) -> str:
    """Return the form by which classes are matched, whatever tool wrote them."""
    number = whole_number(name)
    return str(number) if number is not None else id_key(name).casefold()


class RunWriter(ExitStack):
    """Write a CSV row by row, whole or not at all. Raises BadInput."""

    def __init__(self, path: str | Path, table: RunTable) -> None:
        super().__init__()
        self.path, self.table = Path(path), table

    def __enter__(self) -> 'RunWriter':
        self.file = self.enter_context(write_whole(self.path))
        self.file.write(self.table.header)
        return self

    def write(self, image_id: str, mask: np.ndarray) -> None:
        """Write the rows of an image; mask is (H, W) uint8 ids, or (K, H, W) planes of 0 and 1.

        Raises BadInput, and ValueError for another mask.
        """
        self._write_classes(image_id, split_mask(mask, image_id, self.table))

    def write_runs(self, image_id: str, layers: Sequence[tuple[np.ndarray, np.ndarray]]) -> None:
        """Write the rows of an image by runs and their ids, as RunReader.read_runs returns them. Raises
        BadInput.
        """
        table = self.table
        if table.may_overlap:
            self._write_classes(image_id, (runs for runs, _ in layers))
            return
        ((runs, ids),) = layers
        self._write_classes(image_id, (runs[ids == k] for k in range(table.first_id, table.num_classes)))

    def _write_classes(self, image_id: str, classes: Iterable[np.ndarray]) -> None:
        """Write the rows of an image by the (r, 2) runs of each class that has a row."""
        table = self.table
        for k, runs in enumerate(classes):
            text = format_runs(runs, table.how.first) if len(runs) else table.how.empty.encode()
            self.file.write(b','.join(table.fields(image_id, k, text, self.path)) + b'\n')


def split_mask(mask: np.ndarray, image_id: str, table: RunTable) -> Iterator[np.ndarray]:
    """Yield the (r, 2) runs of each class of a mask that has rows. Raises ValueError for another mask."""
    size = table.sizes[image_id]
    shape = (table.num_classes, *size) if table.may_overlap else size
    if mask.shape != shape:
        raise ValueError(f'the mask of {image_id} is {mask.shape}, expected {shape}')
    if mask.size and mask.max() > (most := 1 if table.may_overlap else table.num_classes - 1):
        raise ValueError(f'the mask of {image_id} has the value {mask.max()}, expected 0 to {most}')
    if table.may_overlap:
        yield from (encode_ids(plane, table.how.order)[0] for plane in mask)
        return
    runs, ids = encode_ids(mask, table.how.order)
    yield from (runs[ids == k] for k in range(table.first_id, table.num_classes))


class Row(NamedTuple):
    """The place of a row in its file, in bytes, and the number of its line."""

    number: int
    offset: int
    length: int


class RunReader:
    """Read the masks of a CSV in any order; only the places of its rows are kept in memory. Raises BadInput.

    The image ids are those of the data, however the CSV writes them.
    """

    def __init__(self, path: str | Path, table: RunTable) -> None:
        self.path, self.table = Path(path), table

    def __enter__(self) -> 'RunReader':
        self.file = open_csv(self.path)
        self.rows: dict[str, dict[int, Row]] = {}
        try:
            self._find_rows()
        except BaseException:
            self.file.close()
            raise
        return self

    def _find_rows(self) -> None:
        """Fill self.rows by image and class. Raises BadInput for a class without a row."""
        table, self.layout = self.table, None
        for number, offset, line in read_lines(self.file, self.path, table.longest_line):
            if self.layout is None:
                self.layout = find_layout(line, table, self.path)
                continue
            where = f'{self.path}: line {number}'
            image_id, k, _ = parse_row(line, self.layout, table, where)
            rows = self.rows.setdefault(image_id, {})
            if k in rows:
                fault = f'is listed twice, first in line {rows[k].number}'
                raise BadInput(f'{where}: {table.describe(image_id, k)} {fault}')
            rows[k] = Row(number, offset, len(line))
        if self.layout is None:
            raise BadInput(f'{self.path}: {describe_empty(table)}')
        if not self.rows:
            raise BadInput(f'{self.path}: no rows after the header')
        for image_id, rows in self.rows.items():
            if len(rows) < len(table.classes):
                k = next(k for k in range(len(table.classes)) if k not in rows)
                fault = 'expected one, empty if the mask has no pixel'
                raise BadInput(f'{self.path}: {table.describe(image_id, k)}: has no row; {fault}')

    def __exit__(self, *_) -> None:
        self.file.close()

    def __contains__(self, image_id: str) -> bool:
        return image_id in self.rows

    @property
    def image_ids(self) -> list[str]:
        """The image ids in the order of their first rows in the file."""
        return [*self.rows]

    def read(self, image_id: str) -> np.ndarray:
        """Read the mask of an image that the CSV contains: (H, W) uint8 ids, or (K, H, W) planes.

        Raises BadInput, also if the masks of two classes overlap that may not.
        """
        table = self.table
        size, layers = table.sizes[image_id], self.read_runs(image_id)
        masks = np.zeros((len(layers), *size), np.uint8)
        for mask, (runs, ids) in zip(masks, layers, strict=True):
            draw_runs(mask, runs, ids, table.how.order)
        return masks if table.may_overlap else masks[0]

    def read_runs(self, image_id: str) -> list[tuple[np.ndarray, np.ndarray]]:
        """Read the (r, 2) runs of an image and the (r,) uint8 id of each: those of each class, with the id 1,
        or, if classes do not overlap, those of all classes in one pair. Raises BadInput, as read does.
        """
        table, rows = self.table, self.rows[image_id]
        size, parts = table.sizes[image_id], []
        for k in range(len(table.classes)):
            where = f'{self.path}: line {rows[k].number}'
            line = read_place(self.file, self.path, rows[k].offset, rows[k].length)
            row = None if line is None else parse_row(line, self.layout, table, where)
            if row is None or row[:2] != (image_id, k):
                raise BadInput(f'{where}: {table.describe(image_id, k)}: the file changed while it was read')
            text = row[2].strip()
            where = f'{where}: {table.describe(image_id, k)}'
            is_empty = text in EMPTY or text == table.how.empty.encode()
            parts.append(parse_runs(b'' if is_empty else text, size, table.how.first, where))
        if table.may_overlap:
            return [(runs, np.ones(len(runs), np.uint8)) for runs in parts]
        lines = [rows[k].number for k in range(len(parts))]
        runs, owners = join_classes(parts, lines, image_id, table, self.path)
        return [(runs, (owners + table.first_id).astype(np.uint8))]


def join_classes(
    parts: Sequence[np.ndarray], lines: Sequence[int], image_id: str, table: RunTable, path: Path
) -> tuple[np.ndarray, np.ndarray]:
    """Join the runs of an image's classes, one an element of parts: return (r, 2) runs and the class of each.

    `lines` are those of the rows in the file. Raises BadInput if two classes overlap.
    """
    runs, owners, overlaps = join_runs(parts)
    if overlaps.size:
        place = int(overlaps[0])
        first, second = sorted(owners[place - 1 : place + 1].tolist())
        y, x = pixel_of(int(runs[place, 0]), table.sizes[image_id], table.how.order)
        other = f'class {table.classes[first]!r} of line {lines[first]}'
        fault = f'overlaps {other} in row {y}, column {x}, both from 0'
        advice = 'expected one class a pixel; if classes may overlap, write task: multilabel'
        raise BadInput(f'{path}: line {lines[second]}: {table.describe(image_id, second)}: {fault}; {advice}')
    return runs, owners


def find_layout(header: bytes, table: RunTable, path: Path) -> Layout:
    """Find the columns of a table, in their order, in the first line of any tool. Raises BadInput."""
    layout = find_columns(header, [*table.how.columns])
    if layout is None:
        expected = table.header.decode().strip()
        raise BadInput(f'{path}: {header_fault(header.removeprefix(BOM), expected, as_runs=True)}')
    return layout


def parse_row(line: bytes, layout: Layout, table: RunTable, where: str) -> tuple[str, int, bytes]:
    """Split a row of any tool into image id, class from 0, and the text of the mask. Raises BadInput."""
    fields = split_row(line, layout, where)
    texts = dict(zip(table.how.columns.values(), fields, strict=True))
    return *find_owner(texts, table, where), texts['mask']


def find_owner(texts: Mapping[Role, bytes], table: RunTable, where: str) -> tuple[str, int]:
    """Return the image id of a row and its class, from 0, by its fields. Raises BadInput for unknown ones."""
    if 'image_class' in texts:
        return find_joined(decode_image_id(texts['image_class'], where), table, where)
    name = decode_image_id(texts['image'], where)
    image_id = find_image(name, table)
    if image_id is None:
        fault = f'is none of the {len(table.names)} images, such as {next(iter(table.names.values()))!r}'
        raise BadInput(f'{where}: image {name!r} {fault}')
    if 'class' not in texts:
        return image_id, 0
    class_name = texts['class'].decode('utf-8', 'backslashreplace')
    k = find_class(class_name, table)
    if k is None:
        known = join_first([*table.classes], 40)
        raise BadInput(f'{where}: class {class_name[:60]!r} is none of the classes, {known}')
    return image_id, k


def find_image(name: str, table: RunTable) -> str | None:
    """Return the image id of a name in a CSV of any tool."""
    return table.image_keys.get(name) or table.image_keys.get(id_key(name))


def find_class(name: str, table: RunTable) -> int | None:
    """Return a class, from 0, by its name in a CSV of any tool."""
    k = table.class_keys.get(name)
    return table.class_keys.get(class_key(name)) if k is None else k


def find_joined(text: str, table: RunTable, where: str) -> tuple[str, int]:
    """Return the image id and the class of IMAGE_CLASS, either of which may have a _. Raises BadInput."""
    parts = text.strip().split('_')
    owners = []
    for place in range(1, len(parts)):
        name, k = '_'.join(parts[:place]), find_class('_'.join(parts[place:]), table)
        image_id = find_image(name, table)
        if image_id is not None and k is not None:
            owners.append((image_id, k))
    if len(owners) != 1:
        example = f'{next(iter(table.names.values()))}_{table.classes[0]}'
        fault = 'could be several of them' if owners else f'is no image and class, such as {example!r}'
        raise BadInput(f'{where}: {text[:200]!r} {fault}')
    return owners[0]


def check_runs(path: Path, table: RunTable) -> np.ndarray:
    """Check every rule of a CSV of the images of a table; return (K,) pixels per class. Raises BadInput."""
    pixels = np.zeros(table.num_classes, np.int64)
    expected = [(image_id, k) for image_id in table.names for k in range(len(table.classes))]
    parts, lines = [], []
    with open_csv(path) as file:
        for place, (number, owner, text) in enumerate(read_strictly(file, path, table)):
            if place == len(expected) or owner != expected[place]:
                raise find_misplaced(path, table, number, [owner, *expected[place : place + 1]])
            image_id, k = owner
            where = f'{path}: line {number}: {table.describe(*owner)}'
            parts.append(parse_strictly(text, table.sizes[image_id], table, where))
            lines.append(number)
            pixels[table.first_id + k] += parts[-1][:, 1].sum()
            if k == len(table.classes) - 1:
                if not table.may_overlap:
                    join_classes(parts, lines, image_id, table, path)
                parts, lines = [], []
    if place + 1 < len(expected):
        raise find_misplaced(path, table, 0, [])
    if not table.may_overlap:
        pixels[0] = sum(h * w for h, w in table.sizes.values()) - pixels.sum()
    return pixels


def find_misplaced(path: Path, table: RunTable, number: int, owners: Sequence[tuple[str, int]]) -> BadInput:
    """Return the error of a CSV whose rows are not those of the table, in its order.

    The row of a line is that of the first of owners, where that of the second is expected.
    """
    try:
        with RunReader(path, table) as reader:
            missing = [image_id for image_id in table.names if image_id not in reader]
    except BadInput as fault:  # a row is missing, or there twice
        return fault
    if missing:
        count = f'{len(missing)} of {len(table.names)} test images'
        return BadInput(f'{path}: {count} have no row, such as {missing[0]!r}')
    found, expected = (table.describe(*owner) for owner in owners)
    order = 'as in test.json' + (', the classes by their ids' if table.how.has_classes else '')
    return BadInput(f'{path}: line {number}: found {found}, expected {expected} {order}')


def read_strictly(
    file: BinaryIO, path: Path, table: RunTable
) -> Iterator[tuple[int, tuple[str, int], bytes]]:
    """Yield line number, (image id, class from 0) and text of each row that is written as RunWriter does.

    Raises BadInput for others, and without any row.
    """
    layout = Layout(b',', len(table.how.columns), tuple(range(len(table.how.columns))))
    number = 0
    for number, _, line in read_lines(file, path, table.longest_line, strict=True):
        if number == 1:
            if line != table.header:
                expected = table.header.decode().strip()
                raise BadInput(f'{path}: {header_fault(line, expected, as_runs=True)}')
            continue
        where = f'{path}: line {number}'
        require_home_line(line, where)
        fields = split_fields(line[:-1], b',')
        if fields is not None and len(fields) != layout.width:
            raise BadInput(f'{where}: has {len(fields):,} fields; expected {layout.width}, as the header has')
        image_id, k, text = parse_row(line, layout, table, where)
        require_spelling(line[:-1], table.fields(image_id, k, text, path), table, where)
        yield number, (image_id, k), text
    if number < 2:
        raise BadInput(f'{path}: ' + ('no rows after the header' if number else describe_empty(table)))


def describe_empty(table: RunTable) -> str:
    """Describe an empty file."""
    return f'is empty; expected the header {table.header.decode().strip()!r}'


def require_spelling(line: bytes, expected: Sequence[bytes], table: RunTable, where: str) -> None:
    """Raise BadInput unless a row, without its line end, has these fields as they are written."""
    if line == b','.join(expected):
        return
    for name, field_found, field_expected in zip(
        table.how.columns, split_fields(line, b','), expected, strict=True
    ):
        if quote(field_found) != field_expected:
            shown = (text.decode('utf-8', 'backslashreplace')[:200] for text in (field_found, field_expected))
            found, spelling = map(repr, shown)
            same = ', which looks the same, but differs in its bytes' if found == spelling else ''
            raise BadInput(f'{where}: {name} is {found}, another spelling of {spelling}{same}')
    raise BadInput(f'{where}: has quotes around a field that needs none')


def parse_strictly(text: bytes, size: Size, table: RunTable, where: str) -> np.ndarray:
    """Parse the text of a mask as RunWriter writes it. Raises BadInput."""
    if text == table.how.empty.encode():
        return np.zeros((0, 2), np.int64)
    if not text.strip() or text in EMPTY:
        fault = f'found {text.decode()!r} for a mask without a pixel, expected {table.how.empty!r}'
        raise BadInput(f'{where}: {fault}')
    return parse_runs(text, size, table.how.first, where, strict=True)
