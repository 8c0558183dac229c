"""Read JSON files and the values in them; say what a file that is not COCO JSON seems to be."""

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from utils.errors import BadInput, one_line
from utils.files import refuse_device

EXPECTED = 'expected COCO JSON, an object with images, annotations and categories'
# commands of prepare.py that read what a tool writes, by the beginning of its name below
COMMANDS = {'LabelMe': 'from-json', 'Label Studio': 'label-studio', 'CVAT': 'cvat'}

# by their first bytes: files that are no JSON
STARTS = {
    b'version https://git-lfs': f'is the pointer of a Git LFS file, {EXPECTED}; run git lfs pull',
    b'PK\x03\x04': f'is a ZIP archive, {EXPECTED}; unpack it',
    b'\x1f\x8b': f'is compressed with gzip, {EXPECTED}; unpack it',
}

# by the keys that other tools write, in the object or in the first object of a list
OBJECTS = {
    'LabelMe JSON, a file for each photo': {'shapes', 'imagePath'},
    'a project of VIA': {'_via_img_metadata'},
    'GeoJSON': {'type', 'features'},
    'Supervisely JSON, a file for each photo': {'objects', 'size'},
    "datumaro's own JSON": {'items', 'categories'},
    "FiftyOne's own JSON": {'samples'},
    'a Jupyter notebook': {'cells', 'nbformat'},
}
ITEMS = {
    'COCO results, predictions without photos and categories': {'image_id', 'category_id'},
    'Label Studio JSON': {'data', 'annotations'},
    'Label Studio JSON of an old version': {'data', 'completions'},
    'CreateML JSON': {'image', 'annotations'},
    'Kili JSON': {'externalId'},
    'Labelbox JSON': {'data_row'},
}


def read_bytes(path: Path) -> bytes:
    """Read a file. Raises BadInput."""
    try:
        refuse_device(path)
        return path.read_bytes()
    except OSError as error:
        raise BadInput(f'{path}: cannot be read: {error.strerror}') from None


def read_parts(path: Path) -> Iterator[bytes]:
    """Read a file, 16 MiB at a time. Raises BadInput."""
    try:
        refuse_device(path)
        with path.open('rb') as file:
            while part := file.read(2**24):
                yield part
    except OSError as error:
        raise BadInput(f'{path}: cannot be read: {error.strerror}') from None


def load_json(path: Path, content: bytes) -> dict[str, Any]:
    """Parse a COCO file: an object of images, annotations and categories, in UTF-8 or UTF-16.

    Raises BadInput, which says what another tool's file seems to be.
    """
    try:
        data = json.loads(content)
    except UnicodeDecodeError as error:
        raise BadInput(f'{path}: not JSON, or in no Unicode: {one_line(error)}; save it as UTF-8') from None
    except (ValueError, RecursionError) as error:
        fault = _guess_text(content) or f'not JSON, or cut off: {one_line(error)}'
        raise BadInput(f'{path}: {fault}') from None
    kind = guess_json(data)
    if kind:
        raise BadInput(f'{path}: {_refuse(kind)}')
    if not isinstance(data, dict):
        raise BadInput(f'{path}: found {type(data).__name__}, {EXPECTED}')
    return data


def _guess_text(content: bytes) -> str | None:
    """Describe a file that is no JSON by its first bytes."""
    start = content.removeprefix(b'\xef\xbb\xbf').lstrip()[:4096]
    if not start:
        return f'is empty, {EXPECTED}'
    for signature, fault in STARTS.items():
        if start.startswith(signature):
            return fault
    if start.startswith(b'<'):
        tag = re.search(rb'<(annotations?|!doctype html|html)\b', start, re.IGNORECASE)
        names = {b'annotations': 'CVAT XML', b'annotation': 'Pascal VOC XML', None: 'XML'}
        return _refuse(names.get(tag and tag[1].lower(), 'a web page'))
    lines = [line for line in start.splitlines()[:2] if line.strip()]
    if [line.strip()[:1] for line in lines] == [b'{', b'{'] and lines[0].rstrip().endswith(b'}'):
        return _refuse('JSON lines, an object in each line')
    return None


def guess_json(data: Any) -> str | None:
    """Name the tool or format whose JSON this seems to be; None for COCO and what is not known."""
    if isinstance(data, list):
        first = data[0] if data else None
        return _match(first, ITEMS) or _match(first, OBJECTS)
    if not isinstance(data, dict):
        return None
    if 'images' in data:
        annotations = data.get('annotations')
        first = annotations[0] if isinstance(annotations, list) and annotations else None
        return _match(first, {'COCO panoptic JSON': {'segments_info'}})
    first = next(iter(data.values()), None)
    return (
        _match(data, OBJECTS) or _match(first, {'VIA JSON': {'filename', 'regions'}}) or _match(data, ITEMS)
    )


def _refuse(kind: str) -> str:
    """Say what a file seems to be, and how its annotations come in."""
    return f'seems to be {kind}, {EXPECTED}; {way_in(kind)}'


def way_in(kind: str) -> str:
    """Say how annotations of a kind that guess_json names come in."""
    command = next((command for tool, command in COMMANDS.items() if kind.startswith(tool)), None)
    return f'python prepare.py {command} imports it' if command else 'export the annotations as COCO'


def _match(record: Any, formats: dict[str, set[str]]) -> str | None:
    keys = record.keys() if isinstance(record, dict) else set()
    return next((name for name, needed in formats.items() if needed <= keys), None)


def require(where: str, record: Any, key: str, kind: type | tuple[type, ...]) -> Any:
    """Return record[key]; raise BadInput if it is missing or of another type."""
    if not isinstance(record, dict):
        raise BadInput(f'{where}: found {type(record).__name__}, expected an object')
    if key not in record:
        raise BadInput(f'{where} lacks the key {key!r}')
    value = record[key]
    if not isinstance(value, kind) or isinstance(value, bool):
        names = ' or '.join(k.__name__ for k in (kind if isinstance(kind, tuple) else (kind,)))
        raise BadInput(f'{where}: {key} is {str(value)[:60]!r}, expected {names}')
    return value


def whole_number(value: Any) -> int | None:
    """Return 96 for 96, 96.0 and '96', as tools write sizes and ids; None for anything else."""
    if isinstance(value, str):
        number = re.fullmatch(r'(-?(?:0|[1-9][0-9]{0,17}))(?:\.0+)?', value.strip())
        return int(number[1]) if number else None
    if isinstance(value, float):
        return int(value) if value.is_integer() and abs(value) < 2**53 else None
    return value if type(value) is int else None


def parse_number(text: str) -> float | None:
    """Parse a finite number, or return None."""
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def identify(value: Any) -> int | str | None:
    """Return an id as it is compared: 5 for 5, 5.0 and '5', else a text; None for what is no id."""
    number = whole_number(value)
    return number if number is not None or not isinstance(value, str) else value.strip() or None


def find_unknown_category(paths: Iterable[Path], is_class: Callable[[str], bool]) -> str | None:
    """Return the place and name of a category that is no class, from the files of a data root that exist.

    One that no annotation uses may be called anything, as Roboflow's root; photos alone may have one such.
    """
    unknown: dict[int | str | None, str] = {}
    for path in filter(Path.is_file, paths):
        content = load_json(path, read_bytes(path))
        records = [record for record in content.get('categories') or [] if isinstance(record, dict)]
        names = {identify(record.get('id')): str(record.get('name')) for record in records}
        unknown |= {key: f'{path}: category {name!r}' for key, name in names.items() if not is_class(name)}
        if records and not unknown:
            return None
        annotations = [record for record in content.get('annotations') or [] if isinstance(record, dict)]
        used = {identify(record.get('category_id')) for record in annotations}
        if used:
            return next((place for key, place in unknown.items() if key in used), None)
    return next(iter(unknown.values())) if len(unknown) > 1 else None
