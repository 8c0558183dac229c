"""Read and write CSVs of class ids: a row an image, and a class id for each pixel of 256x256.

    with IdReader(path, num_classes, image_ids) as reader:
        mask = reader.read(image_id)
    with IdWriter(path) as writer:
        writer.write(image_id, mask)

The format: the header image_id,PredictionString; one row an image; 65,536 class ids separated by one space,
the rows of a 256x256 mask one after another; \\n line ends. It is written so, and check_ids accepts nothing
else. Everything else reads the CSVs of other tools too, as pandas does. A row is in memory at a time.

Shapes: K classes.
"""

import re
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from utils.csv_rows import (
    decode_image_id,
    encode_image_id,
    id_key,
    open_csv,
    read_place,
    require_home_line,
    unknown_image,
)
from utils.errors import BadInput
from utils.files import write_whole
from utils.foreign_csv import BOM, Layout, find_columns, header_fault, read_lines, split_row
from utils.id_text import PIXELS, decode_mask, encode_mask

HEADER = b'image_id,PredictionString\n'
NUM_CLASSES = 11  # of the home competition
# bytes of a row: 3.0 for 3, more spaces, or the ids of 512x512 pixels, of which an error gives the number
MAX_LINE = 16 * PIXELS + 16_384
HOME_LAYOUT = Layout(b',', 2, (0, 1))
# a row of the format as far as its first class ids, in which no other column or quote is to be looked for
HOME_ROW = re.compile(rb'(?:[^",]++|"(?:[^"]++|"")++"),[\d ]{64}')


class IdWriter(ExitStack):
    """Write a submission row by row, whole or not at all. Raises BadInput.

    with IdWriter(path) as writer:
        writer.write(image_id, mask)
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.path = Path(path)

    def __enter__(self) -> 'IdWriter':
        self.file = self.enter_context(write_whole(self.path))
        self.file.write(HEADER)
        return self

    def write(self, image_id: str, mask: np.ndarray) -> None:
        """Write the row of an image; mask is (256, 256) integer class ids. Raises BadInput and ValueError."""
        self.file.write(encode_image_id(image_id, self.path) + b',' + encode_mask(mask) + b'\n')


def check_ids(path: Path, image_ids: Sequence[str], num_classes: int = NUM_CLASSES) -> np.ndarray:
    """Check every rule of a submission of these images; return the (K,) pixels per class. Raises BadInput."""
    known = set(image_ids)
    pixels = np.zeros(num_classes, np.int64)
    row_ids: list[str] = []
    for image_id, mask in read_rows(path, num_classes, strict=True):
        if image_id not in known:
            fault = f'image {image_id!r} is {unknown_image(image_id, image_ids)}'
            raise BadInput(f'{path}: line {len(row_ids) + 2}: {fault}')
        row_ids.append(image_id)
        pixels += np.bincount(mask.ravel(), minlength=num_classes)
    missing = known.difference(row_ids)
    if missing:
        first = next(image_id for image_id in image_ids if image_id in missing)
        raise BadInput(f'{path}: {len(missing)} of {len(known)} test images have no row, such as {first!r}')
    for line, (image_id, expected) in enumerate(zip(row_ids, image_ids, strict=True), start=2):
        if image_id != expected:
            fault = f'found image {image_id!r}, expected {expected!r} as in test.json'
            raise BadInput(f'{path}: line {line}: {fault}')
    return pixels


class Row(NamedTuple):
    """The place of a row in its file, in bytes, and the number of its line."""

    image_id: str
    number: int
    offset: int
    length: int
    layout: Layout


def read_rows(
    path: str | Path, num_classes: int = NUM_CLASSES, strict: bool = False
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (image_id, (256, 256) uint8 mask) of each row, one in memory at a time. Raises BadInput."""
    path = Path(path)
    with open_csv(path) as file:
        for row, text in _read_file(file, path, strict):
            where = f'{path}: line {row.number}: image {row.image_id!r}'
            yield row.image_id, decode_mask(text, num_classes, where, strict)


def read_masks(path: str | Path, num_classes: int = NUM_CLASSES) -> dict[str, np.ndarray]:
    """Read the (256, 256) uint8 mask of each image, in the file's order. Raises BadInput."""
    return dict(read_rows(path, num_classes))


class IdReader:
    """Read the rows of a submission in any order; only their places are kept in memory. Raises BadInput.

    with IdReader(path) as reader:
        mask = reader.read(reader.image_ids[0])

    `names` are the data's image ids: a row of one of them has it as its image id, however the CSV writes it.
    """

    def __init__(self, path: str | Path, num_classes: int = NUM_CLASSES, names: Iterable[str] = ()) -> None:
        self.path = Path(path)
        self.num_classes = num_classes
        exact = {name: name for name in names}
        self.names = {id_key(name): name for name in exact} | exact

    def __enter__(self) -> 'IdReader':
        self.file = open_csv(self.path)
        self.rows = {}
        try:
            for row, _ in _read_file(self.file, self.path, strict=False):
                key = id_key(row.image_id)
                name = self.names.get(row.image_id) or self.names.get(key, row.image_id)
                self.rows[key] = row._replace(image_id=name)
        except BaseException:
            self.file.close()
            raise
        return self

    def __exit__(self, *_) -> None:
        self.file.close()

    def __contains__(self, image_id: str) -> bool:
        return id_key(image_id) in self.rows

    @property
    def image_ids(self) -> list[str]:
        """The image ids in the file's order."""
        return [row.image_id for row in self.rows.values()]

    def read(self, image_id: str) -> np.ndarray:
        """Read the (256, 256) uint8 mask of an image that the CSV contains. Raises BadInput."""
        row = self.rows[id_key(image_id)]
        line = read_place(self.file, self.path, row.offset, row.length)
        where = f'{self.path}: line {row.number}'
        if line is not None:
            id_now, text = _split_row(line, row.layout, where)
            if id_key(id_now) == id_key(image_id):
                return decode_mask(text, self.num_classes, f'{where}: image {image_id!r}', strict=False)
        raise BadInput(f'{where}: image {image_id!r}: the file changed while it was read')


def _read_file(file: BinaryIO, path: Path, strict: bool) -> Iterator[tuple[Row, bytes]]:
    """Yield each row, and the unchecked text of its class ids. Raises BadInput."""
    layout: Layout | None = None
    seen: dict[str, Row] = {}
    for number, offset, line in read_lines(file, path, MAX_LINE, strict):
        if layout is None:
            layout = _read_header(line, path, strict)
            continue
        where = f'{path}: line {number}'
        if strict:
            require_home_line(line, where)
        image_id, text = _split_home_row(line, where) if strict else _split_row(line, layout, where)
        row = Row(image_id, number, offset, len(line), layout)
        first = seen.setdefault(image_id if strict else id_key(image_id), row)
        if first is not row:
            spelling = '' if first.image_id == image_id else f', as {first.image_id!r}'
            fault = f'is listed twice, first in line {first.number}{spelling}'
            raise BadInput(f'{where}: image {image_id!r} {fault}')
        yield row, text
    if layout is None:
        raise BadInput(f'{path}: is empty; expected the header {HEADER.decode().strip()!r}')
    if not seen:
        raise BadInput(f'{path}: no rows after the header')


def _read_header(line: bytes, path: Path, strict: bool) -> Layout:
    """Return the columns by the first line of a file. Raises BadInput."""
    if line == HEADER:
        return HOME_LAYOUT
    expected = HEADER.decode().strip()
    if not strict:
        layout = find_columns(line, expected.split(','))
        if layout is not None:
            return layout
        line = line.removeprefix(BOM)  # not what it fails for
    raise BadInput(f'{path}: {header_fault(line, expected)}')


def _split_row(line: bytes, layout: Layout, where: str) -> tuple[str, bytes]:
    """Split a row of any tool into its image id and the text of its class ids. Raises BadInput."""
    if layout == HOME_LAYOUT and line[-1:] == b'\n' and line[-2:-1].isdigit() and HOME_ROW.match(line):
        return _split_home_row(line, where)
    image_id, text = split_row(line, layout, where)
    return decode_image_id(image_id, where), text.strip()


def _split_home_row(line: bytes, where: str) -> tuple[str, bytes]:
    """Split a row into its image id, without quotes, and the text of its class ids, without the \\n."""
    if line[:1] == b'"':
        quoted = re.match(rb'"((?:[^"]|"")*)",', line)
        if quoted is None:
            raise BadInput(f'{where}: the quotes around the image id do not end before a comma')
        return decode_image_id(quoted[1].replace(b'""', b'"'), where), line[quoted.end() : -1]
    field, comma, text = line[:-1].partition(b',')
    if not comma:
        raise BadInput(f'{where}: has no comma; expected image_id,ids')
    if b'"' in field:
        raise BadInput(f'{where}: the image id has a quote in it, but none around it')
    return decode_image_id(field, where), text
