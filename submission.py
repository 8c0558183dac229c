"""Submission CSVs to masks and back, strict to the byte; and the rule that makes 256x256 ids of a prediction.

    python submission.py check output/submission.csv --data input/data     # every rule of the format
    python submission.py check output/submission.csv --against other.csv   # and where it differs from another

The format: the header image_id,PredictionString; a row an image, in test.json's order; 65,536 ids separated
by one space, the rows of a 256x256 mask one after another; \\n line ends. Read and written a row at a time.

Shapes: N batch, K classes, S side of a prediction, B side of what is kept of it: SIDE, or S for block_max.
"""

import json
import os
import re
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import reduce
from pathlib import Path
from typing import Any, BinaryIO

import cv2
import numpy as np

from config import CLASSES, Config, load_config
from metrics import class_iou, confusion_matrix
from utils.cli import ArgumentParser, add_config_arguments, run_script
from utils.errors import DONE, BadInput, one_line
from utils.files import map_array, refuse_device, write_whole

SIDE = 256
PIXELS = SIDE * SIDE
HEADER = b'image_id,PredictionString\n'
MAX_LINE = 4 * PIXELS + 16_384  # bytes: ids of up to three digits, and a file name
MAX_ID = 400  # characters of an image id
PAIR = np.uint16(ord('0') + 256 * ord(' '))  # the bytes '0 ' as one little-endian number; '1 ' is one more


def main(argv: list[str] | None = None) -> int:
    parser = ArgumentParser(__doc__)
    commands = parser.add_subparsers(dest='command', required=True)
    check = commands.add_parser('check', doc='Every rule of the format; what the classes cover.')
    check.add_argument('csv', type=Path, help='the submission')
    check.add_argument('--data', type=Path, help='the folder of test.json; by default input/data')
    check.add_argument(
        '--against', type=Path, metavar='CSV', help='another submission to compare with; by default none'
    )
    add_config_arguments(check, required=False)
    args = parser.parse_args(argv)
    classes, data = classes_and_data(args)
    image_ids = read_test_ids(data)
    pixels = check_submission(args.csv, image_ids, len(classes))
    print(f'{args.csv}: {len(image_ids)} images')
    print(format_shares(pixels, classes))
    if args.against is not None:
        print(compare_masks(args.csv, args.against, classes))
    print('ok')
    return DONE


def classes_and_data(args: Namespace) -> tuple[tuple[str, ...], Path]:
    """Class names and data root: those of --cfg and --set where they are given, else the competition's;
    --data, where a command has it, comes first. Raises BadInput.
    """
    if args.cfg is None and args.set:
        raise BadInput(f'--set {args.set[0]}: changes a config, but none is given; expected --cfg too')
    config = Config() if args.cfg is None else load_config(args.cfg, args.set)
    return config.classes, getattr(args, 'data', None) or config.data_root


def read_test_ids(data: Path) -> list[str]:
    """The image ids (file names) of a data root's test.json, in its order. Raises BadInput."""
    path = data / 'test.json'
    refuse_device(path)
    try:
        content = json.loads(path.read_bytes())
        image_ids = [image['file_name'] for image in content['images']]
    except OSError as error:
        raise BadInput(f'{path}: cannot be read: {error.strerror}') from None
    except (ValueError, RecursionError) as error:
        raise BadInput(f'{path}: not JSON, or cut off: {one_line(error)}') from None
    except KeyError as error:
        raise BadInput(f'{path}: lacks the key {error}') from None
    except TypeError:
        raise BadInput(f'{path}: expected {{"images": [{{"file_name": ...}}, ...]}}') from None
    seen: set[str] = set()
    for position, image_id in enumerate(image_ids):
        if not isinstance(image_id, str) or not image_id:
            raise BadInput(f'{path}: images[{position}]: file_name is {image_id!r}, expected a file name')
        if image_id in seen:
            raise BadInput(f'{path}: image {image_id!r} is listed twice')
        seen.add(image_id)
    if not image_ids:
        raise BadInput(f'{path}: no images')
    return image_ids


def check_submission(path: Path, image_ids: Sequence[str], num_classes: int = len(CLASSES)) -> np.ndarray:
    """(K,) pixels of each class in a submission of these images that keeps every rule. Raises BadInput."""
    known = set(image_ids)
    pixels = np.zeros(num_classes, np.int64)
    found: list[str] = []
    for image_id, mask in read_rows(path, num_classes):
        if image_id not in known:
            line = len(found) + 2
            raise BadInput(f'{path}: line {line}: image {image_id!r} is none of the {len(known)} test images')
        found.append(image_id)
        pixels += np.bincount(mask.ravel(), minlength=num_classes)
    missing = known.difference(found)
    if missing:
        first = next(image_id for image_id in image_ids if image_id in missing)
        raise BadInput(f'{path}: {len(missing)} of {len(known)} test images have no row, such as {first!r}')
    for line, (image_id, expected) in enumerate(zip(found, image_ids, strict=True), start=2):
        if image_id != expected:
            raise BadInput(f'{path}: line {line}: found image {image_id!r}, test.json has {expected!r} there')
    return pixels


def format_shares(pixels: np.ndarray, classes: Sequence[str]) -> str:
    """A line a class: the share of the pixels that it covers."""
    width = max(map(len, classes))
    shares = zip(classes, pixels / pixels.sum(), strict=True)
    return '\n'.join(f'{name:<{width}}  {share:>7.3%}' for name, share in shares)


def compare_masks(path: Path, other: Path, classes: Sequence[str], worst: int = 5) -> str:
    """How two submissions differ: share of the pixels, overall and by class, and the images that differ most.

    Of a class: the pixels where only one of the two has it, as a share of those where either has.
    Raises BadInput.
    """
    confusion = np.zeros((len(classes), len(classes)), np.int64)
    shares: dict[str, float] = {}
    with SubmissionReader(path, len(classes)) as ours, SubmissionReader(other, len(classes)) as theirs:
        require_same_images(ours.image_ids, path, theirs)
        for image_id in ours.image_ids:
            mask, against = ours.read(image_id), theirs.read(image_id)
            confusion += confusion_matrix(mask, against, len(classes))
            shares[image_id] = np.count_nonzero(mask != against) / PIXELS
    width = max(map(len, classes))
    lines = [f'against {other}: {np.mean(list(shares.values())):.3%} of the pixels differ']
    for name, iou, n in zip(classes, class_iou(confusion), confusion.sum(0), strict=True):
        lines.append(f'{name:<{width}}  ' + ('in neither' if np.isnan(iou) else f'{1 - iou:>7.2%} differ'))
        lines[-1] += f', covers {n / confusion.sum():>7.3%} there'
    for image_id in sorted(shares, key=lambda image_id: -shares[image_id])[:worst]:
        lines.append(f'{image_id}: {shares[image_id]:.2%} differ')
    return '\n'.join(lines)


def require_same_images(image_ids: Sequence[str], where: Path | str, reader: 'SubmissionReader') -> None:
    """Raises BadInput where a CSV has other images than these; `where` is their source, for the message."""
    wanted, found = set(image_ids), set(reader.image_ids)
    for image_id in image_ids:
        if image_id not in found:
            raise BadInput(f'{reader.path}: has no row of image {image_id!r}, which {where} has')
    for image_id in reader.image_ids:
        if image_id not in wanted:
            raise BadInput(f'{reader.path}: has a row of image {image_id!r}, which {where} has not')


# --- prediction → 256x256 ids -------------------------------------------------------------------------------


def downsample_probs(probs: Any, rule: str) -> Any:
    """(N, K, S, S) probabilities → the (N, K, B, B) that `probs_to_ids` needs; S is a multiple of 256.

    Takes numpy and torch alike. Rules: `nearest`, every s-th pixel, as the organiser makes the truth;
    `prob_mean`, the mean of each s x s block; `block_max`, the highest id of each block, which needs all.
    """
    step = _step(probs.shape)
    if rule == 'nearest':
        return probs[..., ::step, ::step]
    if rule == 'prob_mean':
        return probs.reshape(*probs.shape[:2], SIDE, step, SIDE, step).mean((3, 5))
    if rule == 'block_max':
        return probs
    raise ValueError(f'downsample is {rule!r}, expected nearest, prob_mean or block_max')


def probs_to_ids(kept: Any, rule: str) -> Any:
    """(N, K, B, B) of `downsample_probs`, or a mean of several → (N, 256, 256) most probable ids."""
    return downsample_ids(kept.argmax(1), rule)


def downsample_ids(ids: Any, rule: str) -> Any:
    """(N, B, B) likeliest classes of what `downsample_probs` keeps → (N, 256, 256) ids."""
    step = _step(ids.shape)
    blocks = (ids[:, row::step, column::step] for row in range(step) for column in range(step))
    return reduce(lambda highest, ids: highest.clip(min=ids), blocks) if rule == 'block_max' else ids


def _step(shape: tuple[int, ...]) -> int:
    if shape[-1] != shape[-2] or shape[-1] % SIDE:
        raise ValueError(f'a prediction is {shape[-2]}x{shape[-1]}, expected a square of k x {SIDE}')
    return shape[-1] // SIDE


# --- writing ------------------------------------------------------------------------------------------------


class SubmissionWriter:
    """Writes a submission row by row, into a temporary file beside it that is renamed when all went well.

        with SubmissionWriter(path) as writer:
            writer.write(image_id, mask)

    After an error, what was there before is still there, and nothing else. Raises BadInput where that fails.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.stack = ExitStack()

    def __enter__(self) -> 'SubmissionWriter':
        self.file = self.stack.enter_context(write_whole(self.path))
        self.file.write(HEADER)
        return self

    def write(self, image_id: str, mask: np.ndarray) -> None:
        """Adds the row of an image: (256, 256) integer ids. Raises ValueError for anything else."""
        self.file.write(encode_id(image_id, self.path) + b',' + encode_mask(mask) + b'\n')

    def __exit__(self, *error) -> None:
        self.stack.__exit__(*error)


def encode_id(image_id: str, path: Path) -> bytes:
    """The first field of a row, in quotes (RFC 4180) where needed. Raises BadInput where none can be."""
    if not image_id or any(character < ' ' for character in image_id):
        raise BadInput(f'{path}: image {image_id!r} is not a name that a row can hold')
    if ',' in image_id or '"' in image_id:
        image_id = '"' + image_id.replace('"', '""') + '"'
    try:
        return image_id.encode()
    except UnicodeEncodeError:
        raise BadInput(f'{path}: image {image_id!r} is not a name that a row can hold') from None


def encode_mask(mask: np.ndarray) -> bytes:
    """The ids of a (256, 256) mask, 0 to 254, one space between. Raises ValueError for other arrays."""
    if mask.shape != (SIDE, SIDE) or not np.issubdtype(mask.dtype, np.integer):
        raise ValueError(f'a mask is {mask.dtype} {mask.shape}, expected integers ({SIDE}, {SIDE})')
    low, high = mask.min(), mask.max()
    if low < 0 or high > 254:
        raise ValueError(f'a mask has ids from {low} to {high}, expected 0 to 254')
    if high > 10:
        return ' '.join(map(str, mask.ravel().tolist())).encode()
    # pairs of bytes: a digit and a space; ':' comes after '9', and stands for 10 until it is replaced
    text = (mask.astype('<u2') + PAIR).tobytes()[:-1]
    return text.replace(b':', b'10') if high == 10 else text


# --- reading ------------------------------------------------------------------------------------------------


def read_rows(path: str | Path, num_classes: int = len(CLASSES)) -> Iterator[tuple[str, np.ndarray]]:
    """(image_id, (256, 256) uint8 ids) of each row, one in memory at a time. Raises BadInput."""
    path = Path(path)
    lines: dict[str, int] = {}
    with _open(path) as file:
        for number, _, line in _read_lines(file, path):
            image_id, text = _split_line(line, path, number)
            _add_once(lines, image_id, number, path)
            yield image_id, decode_mask(text, num_classes, f'{path}: line {number}: image {image_id!r}')
    if not lines:
        raise BadInput(f'{path}: no rows after the header')


def read_masks(path: str | Path, num_classes: int = len(CLASSES)) -> dict[str, np.ndarray]:
    """(256, 256) uint8 ids of each image, in the file's order. Raises BadInput."""
    return dict(read_rows(path, num_classes))


class SubmissionReader:
    """A submission whose rows are read in any order. Holds places, not rows. Raises BadInput.

    with SubmissionReader(path) as reader:
        mask = reader.read(reader.image_ids[0])
    """

    def __init__(self, path: str | Path, num_classes: int = len(CLASSES)) -> None:
        self.path = Path(path)
        self.num_classes = num_classes

    def __enter__(self) -> 'SubmissionReader':
        lines: dict[str, int] = {}
        self.places: dict[str, tuple[int, int, int]] = {}  # line number, offset and length of each row
        self.file = _open(self.path)
        try:
            for number, offset, line in _read_lines(self.file, self.path):
                image_id, _ = _split_line(line, self.path, number)
                _add_once(lines, image_id, number, self.path)
                self.places[image_id] = (number, offset, len(line))
            if not self.places:
                raise BadInput(f'{self.path}: no rows after the header')
        except BaseException:
            self.file.close()
            raise
        return self

    def __exit__(self, *_) -> None:
        self.file.close()

    @property
    def image_ids(self) -> list[str]:
        """In the file's order."""
        return list(self.places)

    def read(self, image_id: str) -> np.ndarray:
        """(256, 256) uint8 ids of an image that is among image_ids."""
        number, offset, length = self.places[image_id]
        try:
            line = os.pread(self.file.fileno(), length, offset)
        except OSError as error:
            raise BadInput(f'{self.path}: cannot be read: {error.strerror}') from None
        where = f'{self.path}: line {number}: image {image_id!r}'
        if len(line) != length or line[-1:] != b'\n' or _split_line(line, self.path, number)[0] != image_id:
            raise BadInput(f'{where}: the file changed while it was read')
        return decode_mask(_split_line(line, self.path, number)[1], self.num_classes, where)


def decode_mask(text: bytes, num_classes: int, where: str) -> np.ndarray:
    """(256, 256) uint8 ids of a row's second field; `where` is what a message calls it. Raises BadInput."""
    ids = _decode_pairs(text) if num_classes <= 11 else _decode_any(text)
    if ids is None or ids.size != PIXELS or ids.max() >= num_classes:
        raise BadInput(f'{where}: {find_fault(text, num_classes)}')
    return ids.reshape(SIDE, SIDE)


def _decode_pairs(text: bytes) -> np.ndarray | None:
    """The ids 0 to 10 of a text, uint8; None where something else is in it.

    Each '10' is made one byte, ':', which comes after '9'; then all is pairs of an id and a space.
    """
    if b':' in text:
        return None
    if len(text) > 2 * PIXELS - 1:
        codes = np.frombuffer(text, np.uint8).copy()
        tens = (codes[:-1] == ord('1')) & (codes[1:] == ord('0'))
        codes[:-1][tens] = ord(':')
        text = codes[1:][~tens].tobytes()
        text = codes[:1].tobytes() + text
    if len(text) != 2 * PIXELS - 1:
        return None
    pairs = np.frombuffer(text + b' ', '<u2') - PAIR  # modulo 65536: above 10 unless it is an id and a space
    return pairs.astype(np.uint8) if pairs.max() <= 10 else None


def _decode_any(text: bytes) -> np.ndarray | None:
    """The ids 0 to 255 of a text, uint8; None where something else is in it. For more than 11 classes."""
    codes = np.frombuffer(b' ' + text + b' ', np.uint8)
    spaces = np.flatnonzero(codes == ord(' '))
    lengths = np.diff(spaces) - 1
    digits = codes - np.uint8(ord('0'))
    digits[spaces] = 0
    first, last = spaces[:-1] + 1, spaces[1:] - 1
    if lengths.min() < 1 or lengths.max() > 3 or digits.max() > 9:
        return None
    if ((digits[first] == 0) & (lengths > 1)).any():  # 01
        return None
    ids = digits[last].astype(np.int64)
    ids += 10 * np.where(lengths > 1, digits[last - 1], 0) + 100 * np.where(lengths > 2, digits[last - 2], 0)
    return ids.astype(np.uint8) if ids.max() <= 255 else None


def find_fault(text: bytes, num_classes: int) -> str:
    """What is wrong with the second field of a row."""
    allowed = f'expected 0 to {num_classes - 1}'
    tokens = text.split(b' ')
    for position, token in enumerate(tokens, start=1):
        shown = repr(token[:20].decode('ascii', 'backslashreplace'))
        if not token:
            return f'id {position} is empty; expected one space between ids, none before or after them'
        if token[:1] == b'-' and token[1:].isdigit():
            return f'id {position} is {shown}, negative; {allowed}'
        if not token.isdigit():
            return f'id {position} is {shown}, not a number; {allowed}'
        if token[:1] == b'0' and len(token) > 1:
            return f'id {position} is {shown}, with a zero in front; {allowed}'
        if len(token) > 3 or int(token) >= num_classes:
            return f'id {position} is {shown}; {allowed}'
    assert len(tokens) != PIXELS, 'a row without a fault was refused'
    return f'found {len(tokens):,} ids, expected {PIXELS:,}, {SIDE}x{SIDE}'


def _open(path: Path) -> BinaryIO:
    refuse_device(path)
    try:
        return path.open('rb', buffering=1 << 18)
    except OSError as error:
        raise BadInput(f'{path}: cannot be read: {error.strerror}') from None


def _read_lines(file: BinaryIO, path: Path) -> Iterator[tuple[int, int, bytes]]:
    """(line number, offset, line with its \\n) of each line after the header. Raises BadInput."""
    number, offset = 0, 0
    while True:
        try:
            line = file.readline(MAX_LINE)
        except OSError as error:
            raise BadInput(f'{path}: cannot be read: {error.strerror}') from None
        number += 1
        if number == 1:
            _check_header(line, path)
        elif not line:
            return
        elif len(line) == MAX_LINE:
            raise BadInput(f'{path}: line {number}: has over {MAX_LINE:,} bytes, more than a row can have')
        elif line == b'\n':
            raise BadInput(f'{path}: line {number}: is empty; expected a row, or the end of the file')
        elif line[-1:] != b'\n':
            raise BadInput(f'{path}: line {number}: does not end with a newline; the file may be cut off')
        elif line[-2:] == b'\r\n':
            raise BadInput(f'{path}: line {number}: ends as on Windows, \\r\\n; expected \\n alone')
        else:
            yield number, offset, line
        offset += len(line)


def _check_header(line: bytes, path: Path) -> None:
    if line == HEADER:
        return
    expected = HEADER.decode().strip()
    if not line:
        raise BadInput(f'{path}: is empty; expected the header {expected!r}')
    if line.startswith(b'\xef\xbb\xbf'):
        raise BadInput(f'{path}: line 1: begins with a byte order mark; expected {expected!r} alone')
    if line == HEADER[:-1] + b'\r\n':
        raise BadInput(f'{path}: line 1: ends as on Windows, \\r\\n; expected \\n alone')
    if line == HEADER[:-1]:
        raise BadInput(f'{path}: line 1: does not end with a newline; the file may be cut off')
    shown = line[:40].decode('utf-8', 'replace').rstrip('\n')
    raise BadInput(f'{path}: line 1: found the header {shown!r}, expected {expected!r}')


def _split_line(line: bytes, path: Path, number: int) -> tuple[str, bytes]:
    """The image id, out of its quotes, and the text of the ids, without the \\n."""
    if line[:1] == b'"':
        quoted = re.match(rb'"((?:[^"]|"")*)",', line)
        if quoted is None:
            raise BadInput(f'{path}: line {number}: the quotes around the image id do not end before a comma')
        field, end = quoted[1].replace(b'""', b'"'), quoted.end()
    else:
        end = line.find(b',') + 1
        field = line[: end - 1]
        if not end:
            raise BadInput(f'{path}: line {number}: has no comma; expected image_id,ids')
        if b'"' in field:
            raise BadInput(f'{path}: line {number}: the image id has a quote in it, but none around it')
    try:
        image_id = field.decode()
    except UnicodeDecodeError:
        raise BadInput(f'{path}: line {number}: the image id {field[:40]!r} is not UTF-8') from None
    if not image_id:
        raise BadInput(f'{path}: line {number}: the image id is empty')
    if any(character < ' ' for character in image_id):
        raise BadInput(f'{path}: line {number}: the image id {image_id[:40]!r} has a control character')
    if len(image_id) > MAX_ID:
        raise BadInput(
            f'{path}: line {number}: the image id has {len(image_id):,} characters, at most {MAX_ID}'
        )
    return image_id, line[end:-1]


def _add_once(lines: dict[str, int], image_id: str, number: int, path: Path) -> None:
    if image_id in lines:
        first = lines[image_id]
        raise BadInput(f'{path}: line {number}: image {image_id!r} is there twice, first in line {first}')
    lines[image_id] = number


if __name__ == '__main__':
    run_script(main)


def downsample_mask(mask: np.ndarray) -> np.ndarray:
    """(256, 256) uint8 ids that the board scores with, of a mask at any size: mask[::2, ::2] of 512x512."""
    return cv2.resize(mask, (256, 256), interpolation=cv2.INTER_NEAREST)


def open_probs(reader: SubmissionReader, num_classes: int) -> np.ndarray:
    """(n, K, 256, 256) uint8, memory-mapped, of the rows of a CSV. Raises BadInput."""
    path = reader.path.with_name(f'{reader.path.stem}_probs.npy')
    if not path.exists():
        raise BadInput(f'{path}: no such file; infer.py --save-probs writes it beside the CSV')
    return map_array(path, (len(reader.image_ids), num_classes, SIDE, SIDE))
