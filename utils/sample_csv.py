"""Tell how a competition's CSV is written by looking at its sample submission.

    found, remarks = describe_sample(path, names, classes)

`names` and `classes` are what images and classes may be called, by image_names and class_names of the key
`submission` in competition.yaml; `found` is the value of that key, or None for a class id for each pixel.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from utils.csv_rows import id_key, open_csv
from utils.errors import BadInput, join_first, plural
from utils.foreign_csv import BOM, DELIMITERS, OTHER_FORMATS, Layout, read_lines, split_fields, split_row
from utils.id_csv import HEADER
from utils.id_text import PIXELS, SIDE
from utils.run_csv import EMPTY, class_key

MAX_LINE = 1 << 28  # bytes
MAX_ROWS = 100_000  # which are looked at
SHORT = 200  # bytes of a field that are kept
Names = Mapping[str, Mapping[str, str]]  # image ids, or classes, by the kind of their names and the names


@dataclass(frozen=True)
class Sample:
    """The columns of a sample, the beginnings of its fields, and how many numbers its first row has."""

    path: Path
    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: int
    delimiter: bytes = b','

    def values(self, column: int) -> list[str]:
        return [row[column] for row in self.rows]


def describe_sample(path: Path, names: Names, classes: Names) -> tuple[dict[str, Any] | None, list[str]]:
    """Return the value of `submission`, None for ids, and what the sample cannot tell. Raises BadInput."""
    sample = read_sample(path)
    if is_home(sample, len(next(iter(classes.values())))):
        return None, []
    columns, kinds = find_columns_of(sample, names, classes)
    roles = {column: role for role, column in columns.items()}
    for column, name in enumerate(sample.columns):
        if column not in roles:
            found = f'the column {name!r}, with {sample.rows[0][column]!r}'
            listed = join_first([*next(iter(classes.values())).values()], 40)
            expected = f'expected images, classes ({listed}) and masks'
            raise BadInput(f'{path}: {found}, is none that can be written; {expected}')
    images, objects = names[kinds['image_names']], classes[kinds.get('class_names', 'name')]
    owners = check_rows(sample, columns, images, objects)
    values, remarks = describe_masks(sample.values(columns['mask']))
    remarks += describe_order(owners, [*product(images.values(), objects.values())])
    return {'columns': {name: roles[n] for n, name in enumerate(sample.columns)}, **kinds, **values}, remarks


def read_sample(path: Path) -> Sample:
    """Read the header and the beginnings of the fields of a CSV. Raises BadInput."""
    columns: list[bytes] | None = None
    rows, numbers = [], 0
    with open_csv(path) as file:
        for number, _, line in read_lines(file, path, MAX_LINE):
            if columns is None:
                header = line.removeprefix(BOM).rstrip(b'\r\n')
                delimiter = max(DELIMITERS, key=lambda one: len(split_fields(header, one) or ()))
                columns = split_fields(header, delimiter)
                if fault := next((f for start, f in OTHER_FORMATS.items() if line.startswith(start)), None):
                    raise BadInput(f'{path}: {fault}')
                if columns is None or len(columns) < 2:
                    found = line[:40].decode('utf-8', 'replace').rstrip()
                    raise BadInput(f'{path}: line 1: found {found!r}, expected the names of the columns')
                layout = Layout(delimiter, len(columns), tuple(range(len(columns))))
                continue
            fields = split_row(line, layout, f'{path}: line {number}')
            numbers = numbers or max(len(field.split()) for field in fields)
            rows.append([field[:SHORT].decode('utf-8', 'replace').strip() for field in fields])
            if len(rows) == MAX_ROWS:
                break
    if not rows:
        raise BadInput(f'{path}: has no rows; expected a header and a row for each image, or image and class')
    names = [name.decode('utf-8', 'replace').strip() for name in columns]
    return Sample(path, names, rows, numbers, delimiter)


def is_home(sample: Sample, num_objects: int) -> bool:
    """Tell whether a sample has a class id for each pixel of 256x256. Raises BadInput for other ids."""
    home = HEADER.decode().strip()
    header = ','.join(sample.columns)
    if sample.numbers == PIXELS or (header == home and num_objects > 1 and sample.numbers < 3):
        if header != home:
            fault = f'has {PIXELS:,} ids a row under the header {header[:80]!r}; expected {home!r}'
            raise BadInput(f'{sample.path}: {fault}: ids are written so alone')
        return True
    side = round(sample.numbers**0.5)
    if side > 16 and side**2 == sample.numbers:
        fault = f'has {sample.numbers:,} numbers in its first row, perhaps ids of {side}x{side} pixels'
        raise BadInput(f'{sample.path}: {fault}; ids are written for {SIDE}x{SIDE} alone')
    return False


def find_columns_of(sample: Sample, names: Names, classes: Names) -> tuple[dict[str, int], dict[str, str]]:
    """Return the column of each role, and image_names and class_names if there are any. Raises BadInput."""
    columns, kinds = find_images(sample, names, classes)
    rest = [column for column in range(len(sample.columns)) if column not in columns.values()]
    if 'image' in columns and len(rest) > 1:
        for kind, column in product(classes, rest):
            if set(map(class_key, sample.values(column))) <= classes[kind].keys():
                columns['class'], kinds['class_names'] = column, kind
                rest.remove(column)
                break
    masks = [column for column in rest if all(map(may_be_runs, sample.values(column)))]
    if len(masks) > 1:
        listed = join_first([repr(sample.columns[column]) for column in masks])
        raise BadInput(f'{sample.path}: the columns {listed} could each be the masks')
    if not masks:
        shown = [f'{sample.columns[column]!r} with {sample.rows[0][column][:40]!r}' for column in rest]
        fault = f'no column has run lengths; found {join_first(shown) or "no other column"}'
        raise BadInput(f'{sample.path}: {fault}')
    return columns | {'mask': masks[0]}, kinds


def find_images(sample: Sample, names: Names, classes: Names) -> tuple[dict[str, int], dict[str, str]]:
    """Find the column of the images, or of images and classes joined by _, as find_columns_of returns it."""
    columns = range(len(sample.columns))
    for kind, column in product(names, columns):
        if all(id_key(value) in names[kind] for value in sample.values(column)):
            return {'image': column}, {'image_names': kind}
    for kind, class_kind, column in product(names, classes, columns):
        if all(split_name(value, names[kind], classes[class_kind]) for value in sample.values(column)):
            return {'image_class': column}, {'image_names': kind, 'class_names': class_kind}
    name = next(iter(names['path']))
    fault = f'no column holds test photos, such as {name!r}, alone or with a class'
    row = ','.join(sample.rows[0])[:80]
    raise BadInput(f'{sample.path}: {fault}; the first row is {row!r}')


def split_name(text: str, names: Mapping[str, str], classes: Mapping[str, str]) -> tuple[str, str] | None:
    """Split IMAGE_CLASS into the image id and the class; None if it is not that."""
    parts = id_key(text).split('_')
    for place in range(1, len(parts)):
        name, class_name = '_'.join(parts[:place]), class_key('_'.join(parts[place:]))
        if name in names and class_name in classes:
            return names[name], classes[class_name]
    return None


def may_be_runs(text: str) -> bool:
    """Tell whether the beginning of a field may be run lengths, or what stands for a mask without a pixel."""
    tokens = text.split()
    return text.encode() in EMPTY or (len(tokens) != 1 and all(token.isdigit() for token in tokens))


def check_rows(
    sample: Sample, columns: Mapping[str, int], names: Mapping[str, str], classes: Mapping[str, str]
) -> list[tuple[str, str]]:
    """Return the image and the class of each row. Raises BadInput unless there is one for each of them."""
    expected = [*classes.values()]
    if 'image' in columns and 'class' not in columns and len(expected) > 1:
        fault = f'has no column of the classes {join_first(expected)}, which competition.yaml has'
        raise BadInput(f'{sample.path}: {fault}')
    rows: dict[str, Counter[str]] = {}
    owners = []
    for row in sample.rows:
        if 'image_class' in columns:
            image_id, class_name = split_name(row[columns['image_class']], names, classes)
        else:
            image_id = names[id_key(row[columns['image']])]
            class_name = classes[class_key(row[columns['class']])] if 'class' in columns else expected[0]
        rows.setdefault(image_id, Counter())[class_name] += 1
        owners.append((image_id, class_name))
    if len(sample.rows) == MAX_ROWS:
        rows.popitem()  # its rows may go on
    for image_id, counts in rows.items():
        for name in expected:
            if counts[name] != 1:
                fault = f'image {image_id!r} has {plural(counts[name], "row")} of class {name!r}'
                raise BadInput(f'{sample.path}: {fault}; expected one for each class of competition.yaml')
    return owners


def describe_order(owners: Sequence[tuple[str, str]], written: Sequence[tuple[str, str]]) -> list[str]:
    """Return a remark if rows are not in the order in which they are written."""
    for line, (owner, other) in enumerate(zip(owners, written, strict=False), start=2):
        if owner != other:
            found, expected = (' '.join(pair) for pair in (owner, other))
            order = 'by test.json, then by classes, which you may sort as the sample'
            return [f'rows: line {line} is {found}, where {expected} is written: {order}']
    return []


def describe_masks(texts: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Return order, first and empty, as usual where the masks do not tell them, and remarks on those."""
    starts = {tuple(text.split()[:2]) for text in texts if ' ' in text}
    empty = sorted({text for text in texts if ' ' not in text})
    values = {'order': 'column', 'first': 1, 'empty': empty[0] if len(empty) == 1 else ''}
    remarks = ['order: column is usual; write row if the rules count pixels along the rows']
    if any(start == '0' and length != '0' for start, length in starts):
        values['first'] = 0
    else:
        remarks.append('first: 1 is usual; write 0 if the rules count pixels from 0')
    if len(empty) != 1:
        shown = 'several texts' if empty else f'none, but masks such as {texts[0]!r}'
        remarks.append(f"empty: the sample has {shown}; '' is usual for a mask without a pixel")
    return values, remarks
