"""Handle what all CSVs of masks share: names of images, ends of lines, and rows that are read again later."""

import os
import unicodedata
from collections.abc import Collection
from pathlib import Path
from typing import BinaryIO

from utils.errors import BadInput
from utils.files import normal_name, refuse_device

MAX_IMAGE_ID = 400  # characters


def open_csv(path: Path) -> BinaryIO:
    """Open a CSV for reading. Raises BadInput."""
    refuse_device(path)
    try:
        return path.open('rb', buffering=1 << 18)
    except OSError as error:
        raise BadInput(f'{path}: cannot be read: {error.strerror}') from None


def read_place(file: BinaryIO, path: Path, offset: int, length: int) -> bytes | None:
    """Read the line at a place in a file; None if no whole line is there any more. Raises BadInput."""
    try:
        line = os.pread(file.fileno(), length, offset)
        size = os.fstat(file.fileno()).st_size
    except OSError as error:
        raise BadInput(f'{path}: cannot be read: {error.strerror}') from None
    return line if len(line) == length and (line[-1:] == b'\n' or offset + length == size) else None


def id_key(image_id: str) -> str:
    """Return the form by which image ids are matched, whatever tool wrote them."""
    return normal_name(image_id.strip())


def encode_image_id(image_id: str, path: Path) -> bytes:
    """Encode a field of a row, quoted as in RFC 4180 if needed. Raises BadInput."""
    try:
        field = image_id.encode()
    except UnicodeEncodeError:
        field = b''
    if not field or min(field) < ord(' '):
        raise BadInput(f'{path}: image {image_id!r} is not a name that a row can hold')
    return quote(field)


def quote(field: bytes) -> bytes:
    """Put quotes around a field that needs them."""
    return b'"' + field.replace(b'"', b'""') + b'"' if b',' in field or b'"' in field else field


def decode_image_id(field: bytes, where: str) -> str:
    """Decode an image id, without its quotes. Raises BadInput."""
    try:
        image_id = field.decode()
    except UnicodeDecodeError:
        raise BadInput(f'{where}: the image id {field[:40]!r} is not UTF-8; save the CSV as UTF-8') from None
    if not image_id.strip():
        raise BadInput(f'{where}: the image id is empty')
    if any(character < ' ' for character in image_id):
        raise BadInput(f'{where}: the image id {image_id[:40]!r} has a control character')
    if len(image_id) > MAX_IMAGE_ID:
        raise BadInput(f'{where}: the image id has {len(image_id):,} characters, at most {MAX_IMAGE_ID}')
    return image_id


def require_home_line(line: bytes, where: str) -> None:
    """Raise BadInput unless a row has something in it, and ends with \\n alone."""
    if line == b'\n':
        raise BadInput(f'{where}: is empty; expected a row, or the end of the file')
    if line[-1:] != b'\n':
        raise BadInput(f'{where}: does not end with a newline; the file may be cut off')
    if line[-2:] == b'\r\n':
        raise BadInput(f'{where}: ends as on Windows, \\r\\n; expected \\n alone')


def unknown_image(image_id: str, image_ids: Collection[str]) -> str:
    """Describe what an image id is that is none of the test images: another spelling of one, or unknown."""
    same = next((name for name in image_ids if id_key(name) == id_key(image_id)), None)
    if same is None:
        return f'none of the {len(image_ids)} test images'
    if unicodedata.normalize('NFC', same) == unicodedata.normalize('NFC', image_id):
        return 'one of test.json in another Unicode form: the names look the same, but differ in their bytes'
    return f'another spelling of {same!r}; expected it as in test.json'
