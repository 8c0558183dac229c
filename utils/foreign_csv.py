"""Read the rows of CSVs as other tools write them: the columns, quotes and line ends that pandas understands.

    layout = find_columns(header, ('image_id', 'PredictionString'))
    for number, offset, line in read_lines(file, path, limit):
        image_id, text = split_row(line, layout, f'{path}: line {number}')

Python's csv.reader refuses long fields, and does not say where in its file a row is.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from utils.errors import BadInput, one_line

MAX_LINE = 10_000  # bytes of a row of a small table
BOM = b'\xef\xbb\xbf'
DELIMITERS = (b',', b';', b'\t')
# a field in quotes or without any, up to a delimiter or the end; no run of characters is tried twice
FIELD = {d: re.compile(rb'(?: *"((?:[^"]++|"")*+)" *|([^"%b]*+))(?=%b|\Z)' % (d, d)) for d in DELIMITERS}
UTF_16 = 'is UTF-16; expected UTF-8: iconv -f UTF-16 -t UTF-8 FILE > NEW'
OTHER_FORMATS = {  # by the first bytes of a file
    b'\xff\xfe': UTF_16,
    b'\xfe\xff': UTF_16,
    b'\x1f\x8b': 'is compressed by gzip; expected a CSV: unpack it first',
    b'PK\3\4': 'is a zip archive or a workbook of Excel; expected a CSV: unpack it, or save it as CSV',
    b'PAR1': "is a Parquet file; expected a CSV: pandas' to_csv writes one",
}
BLANK = b' ,;\t\r\n"'  # what Excel writes below a table, a line of delimiters, and nothing else
RUN_LENGTHS = re.compile(rb'\brle|rle\b|_rle|encoded|run.?length', re.IGNORECASE)


class Layout(NamedTuple):
    """The columns of a CSV: how many there are, and the places of those that were asked for."""

    delimiter: bytes
    width: int
    places: tuple[int, ...]


def find_columns(header: bytes, names: Sequence[str]) -> Layout | None:
    """Find columns in the first line of a CSV, whatever their case, order and company; None without them."""
    text = header.removeprefix(BOM).rstrip(b'\r\n')
    keys = [_plain_name(name.encode()) for name in names]
    for delimiter in DELIMITERS:
        columns = [_plain_name(field) for field in split_fields(text, delimiter) or ()]
        if all(columns.count(key) == 1 for key in keys):
            return Layout(delimiter, len(columns), tuple(map(columns.index, keys)))
    return None


def _plain_name(name: bytes) -> bytes:
    return re.sub(rb'[ _-]', b'', name).lower()


def header_fault(header: bytes, expected: str, as_runs: bool = False) -> str:
    """Describe what is wrong with the first line of a file that is not exactly `expected`, or what it is.

    `as_runs` says that run lengths are expected.
    """
    for start, fault in OTHER_FORMATS.items():
        if header.startswith(start):
            return fault
    if b'\0' in header[:2]:
        return UTF_16
    if header.startswith(BOM):
        return f'line 1: begins with a byte order mark; expected {expected!r} alone'
    if header == expected.encode() + b'\r\n':
        return r'line 1: ends as on Windows, \r\n; expected \n alone'
    if b'\r' in header.rstrip(b'\r\n'):
        return r"line 1: ends with \r alone; expected \n: tr '\r' '\n' < FILE > NEW"
    if header == expected.encode():
        return 'line 1: does not end with a newline; the file may be cut off'
    found = f'line 1: found the header {header[:40].decode("utf-8", "replace").rstrip()!r}'
    if not as_runs and RUN_LENGTHS.search(header[:400]):
        return f'{found}, as of run-length encodings; expected {expected!r}, with a class id for each pixel'
    return f'{found}, expected {expected!r}'


def read_lines(
    file: BinaryIO, path: Path, limit: int, strict: bool = False
) -> Iterator[tuple[int, int, bytes]]:
    """Yield (line number, offset, line with its \\n) of the header and each row. Raises BadInput.

    Without `strict`, a row goes on in the next line if its quotes do, and lines without a value are left out.
    A row of `limit` bytes or more is refused.
    """
    number, offset = 1, 0
    while line := _read_line(file, path, limit):
        following = number + 1
        while not strict and b'"' in line and line.count(b'"') % 2:  # `in` is ten times as fast as count
            more = _read_line(file, path, limit - len(line))
            if not more:
                break
            line += more
            following += 1
        if len(line) >= limit and number > 1:
            hint = '; a quote may not end' if following > number + 1 else '; is the mask too large?'
            raise BadInput(f'{path}: line {number}: has over {limit:,} bytes, more than a row can have{hint}')
        if strict or line[:99].strip(BLANK) or line.strip(BLANK):
            yield number, offset, line
        number, offset = following, offset + len(line)


def _read_line(file: BinaryIO, path: Path, limit: int) -> bytes:
    try:
        return file.readline(limit)
    except OSError as error:
        raise BadInput(f'{path}: cannot be read: {error.strerror}') from None


def read_texts(path: Path, header: str, *choices: Sequence[str]) -> Iterator[tuple[str, list[str]]]:
    """Yield the place of each row of a small table, and the texts of its columns: of the first choice of
    names that its header has. Raises BadInput, and OSError if the file cannot be opened.
    """
    layout = None
    with path.open('rb') as file:
        for number, _, line in read_lines(file, path, MAX_LINE):
            if layout is None:
                layout = next(filter(None, (find_columns(line, names) for names in choices)), None)
                if layout is None:
                    raise BadInput(f'{path}: {header_fault(line, header)}')
                continue
            where = f'{path}: line {number}'
            try:
                texts = [field.decode().strip() for field in split_row(line, layout, where)]
            except UnicodeDecodeError as error:
                fault = f'expected lines of {header}: {one_line(error)}; save it as CSV in UTF-8'
                raise BadInput(f'{path}: {fault}') from None
            yield where, texts


def split_row(line: bytes, layout: Layout, where: str) -> list[bytes]:
    """Return the fields of a row that the layout was asked for, without quotes around them. Raises BadInput.

    A row may have one field more than the header: the number of the row in front, or nothing at the end.
    """
    fields = split_fields(line.rstrip(b'\r\n'), layout.delimiter)
    if fields is None:
        raise BadInput(f'{where}: has a quote that does not end, or that is not around a whole field')
    if len(fields) == layout.width + 1 and fields[0].strip().isdigit():
        fields = fields[1:]
    elif len(fields) == layout.width + 1 and not fields[-1].strip():
        fields = fields[:-1]
    if len(fields) != layout.width:
        fault = f'has {len(fields):,} fields; expected {layout.width}, as the header has'
        raise BadInput(f'{where}: {fault}')
    return [fields[place] for place in layout.places]


def split_fields(text: bytes, delimiter: bytes) -> list[bytes] | None:
    """Split a line into its fields, without the quotes around them; return None if quotes are wrong."""
    if b'"' not in text:
        return text.split(delimiter)
    fields, start = [], 0
    while match := FIELD[delimiter].match(text, start):
        quoted, plain = match.groups()
        fields.append(plain if quoted is None else quoted.replace(b'""', b'"'))
        if match.end() == len(text):
            return fields
        start = match.end() + 1
    return None
