"""Read, write and check submission CSVs, strictly; and bring predictions to the size that is scored.

    python submission.py check output/submission.csv --data input/data     # every rule of the format
    python submission.py check output/submission.csv --against other.csv   # and how it differs from another

The format: the header image_id,PredictionString; one row an image, in the order of test.json; 65,536 class
ids separated by one space, the rows of a 256x256 mask one after another; \\n line ends. Files are read and
written a row at a time.

Shapes: N batch, K classes, S side of a prediction, B side that downsample_probs returns: SIDE, or S for
block_max.
"""

from argparse import Namespace
from pathlib import Path

from utils.cli import ArgumentParser, add_config_arguments, parse_early, run_script
from utils.files import require_files


def read_arguments(argv: list[str] | None = None) -> Namespace:
    parser = ArgumentParser(__doc__)
    commands = parser.add_subparsers(title='commands', dest='command', required=True)
    summary = 'check every rule of the format, and show what share each class covers'
    check = commands.add_parser('check', help=summary, doc=f'{summary.capitalize()}.')
    check.add_argument('csv', type=Path, help='the submission')
    check.add_argument(
        '--data', type=Path, help='data root with test.json; by default that of --cfg, or input/data'
    )
    against = 'another submission to compare with; by default none'
    check.add_argument('--against', type=Path, metavar='CSV', help=against)
    add_config_arguments(check, required=False)
    args = parser.parse_args(argv)
    require_files(args.csv, *([args.against] if args.against else []))
    return args


if __name__ == '__main__':
    parse_early(read_arguments)  # --help does not wait for NumPy and pydantic

import json
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, BinaryIO

import cv2
import numpy as np

from config import CLASSES, Config, load_config
from metrics import class_iou, confusion_matrix
from utils.errors import DONE, BadInput, one_line
from utils.files import map_array, refuse_device, write_whole

if TYPE_CHECKING:
    from torch import Tensor

SIDE = 256  # of a scored mask
PIXELS = SIDE * SIDE
HEADER = b'image_id,PredictionString\n'
MAX_LINE = 4 * PIXELS + 16_384  # bytes: class ids of up to three digits, and a file name
MAX_IMAGE_ID = 400  # characters
PAIR = np.uint16(ord('0') + 256 * ord(' '))  # the bytes '0 ' as one little-endian number; '1 ' is one more


def main(argv: list[str] | None = None) -> int:
    args = read_arguments(argv)
    classes, data = classes_and_data(args)
    image_ids = read_test_ids(data)
    pixels = check_submission(args.csv, image_ids, len(classes))
    print(f'{args.csv}: {len(image_ids)} images')
    width = max(map(len, classes))
    for name, share in zip(classes, pixels / pixels.sum(), strict=True):
        print(f'{name:<{width}}  {share:>7.3%}')
    if args.against is not None:
        print(compare_masks(args.csv, args.against, classes))
    print('ok')
    return DONE


def classes_and_data(args: Namespace) -> tuple[tuple[str, ...], Path]:
    """Return the classes and the data root of the arguments --cfg, --set and --data. Raises BadInput."""
    if args.cfg is None and args.set:
        raise BadInput(f'--set {args.set[0]}: changes a config, but none is given; expected --cfg too')
    config = Config() if args.cfg is None else load_config(args.cfg, args.set)
    return config.classes, getattr(args, 'data', None) or config.data_root


def read_test_ids(data: Path) -> list[str]:
    """Read the image ids (file names) of a data root's test.json, in its order. Raises BadInput."""
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
    """Check every rule of a submission of these images; return the (K,) pixels per class. Raises BadInput."""
    known = set(image_ids)
    pixels = np.zeros(num_classes, np.int64)
    row_ids: list[str] = []
    for image_id, mask in read_rows(path, num_classes):
        if image_id not in known:
            line = len(row_ids) + 2
            raise BadInput(f'{path}: line {line}: image {image_id!r} is none of the {len(known)} test images')
        row_ids.append(image_id)
        pixels += np.bincount(mask.ravel(), minlength=num_classes)
    missing = known.difference(row_ids)
    if missing:
        first = next(image_id for image_id in image_ids if image_id in missing)
        raise BadInput(f'{path}: {len(missing)} of {len(known)} test images have no row, such as {first!r}')
    for line, (image_id, expected) in enumerate(zip(row_ids, image_ids, strict=True), start=2):
        if image_id != expected:
            wrong = f'line {line}: found image {image_id!r}, expected {expected!r} as in test.json'
            raise BadInput(f'{path}: {wrong}')
    return pixels


def compare_masks(path: Path, other: Path, classes: Sequence[str], worst: int = 5) -> str:
    """Describe how two submissions differ: overall, by class (1 - IoU), at worst. Raises BadInput."""
    confusion = np.zeros((len(classes), len(classes)), np.int64)
    shares: dict[str, float] = {}
    with SubmissionReader(path, len(classes)) as ours, SubmissionReader(other, len(classes)) as theirs:
        require_same_images(ours.image_ids, path, theirs)
        for image_id in ours.image_ids:
            mask, other_mask = ours.read(image_id), theirs.read(image_id)
            confusion += confusion_matrix(mask, other_mask, len(classes))
            shares[image_id] = np.count_nonzero(mask != other_mask) / PIXELS
    width = max(map(len, classes))
    lines = [f'against {other}: {np.mean(list(shares.values())):.3%} of the pixels differ']
    for name, iou, pixels in zip(classes, class_iou(confusion), confusion.sum(0), strict=True):
        difference = 'in neither' if np.isnan(iou) else f'{1 - iou:>7.2%} differ'
        lines.append(f'{name:<{width}}  {difference}, covers {pixels / confusion.sum():>7.3%} there')
    for image_id in sorted(shares, key=lambda image_id: -shares[image_id])[:worst]:
        lines.append(f'{image_id}: {shares[image_id]:.2%} differ')
    return '\n'.join(lines)


def require_same_images(image_ids: Sequence[str], source: Path | str, reader: 'SubmissionReader') -> None:
    """Raise BadInput unless a CSV has exactly these images; `source` names their origin in the message."""
    expected, rows = set(image_ids), set(reader.image_ids)
    for image_id in image_ids:
        if image_id not in rows:
            raise BadInput(f'{reader.path}: has no row of image {image_id!r}, which {source} has')
    for image_id in reader.image_ids:
        if image_id not in expected:
            raise BadInput(f'{reader.path}: has a row of image {image_id!r}, which {source} does not have')


# --- from a prediction's size to the scored size: s times 256 → 256, by the config's `downsample`
#
#   nearest     every s-th pixel, as the organiser takes the truth
#   prob_mean   the mean probabilities of each s x s block, then the most probable class
#   block_max   the most probable class of each pixel, then the highest class id of each s x s block


def downsample_mask(mask: np.ndarray) -> np.ndarray:
    """Take the truth at the scored size: (H, W) of any size → (256, 256) uint8; mask[::2, ::2] of 512x512."""
    return cv2.resize(mask, (SIDE, SIDE), interpolation=cv2.INTER_NEAREST)


def downsample_probs(probs: 'Tensor', rule: str) -> 'Tensor':
    """Reduce probabilities to what probs_to_ids needs: (N, K, S, S) → (N, K, B, B); S is a multiple of 256.

    Results of several views, folds or models can be averaged. Raises ValueError for another size or rule.
    """
    step = _block_side(probs.shape)
    if rule == 'nearest':
        return probs[..., ::step, ::step]
    if rule == 'prob_mean':
        return probs.reshape(*probs.shape[:2], SIDE, step, SIDE, step).mean((3, 5))
    if rule == 'block_max':
        return probs
    raise ValueError(f'downsample is {rule!r}, expected nearest, prob_mean or block_max')


def probs_to_ids(probs: 'Tensor', rule: str) -> 'Tensor':
    """Choose the class of each scored pixel: (N, K, B, B) of downsample_probs → (N, 256, 256) class ids."""
    return downsample_ids(probs.argmax(1), rule)


def downsample_ids(pred: 'Tensor', rule: str) -> 'Tensor':
    """Apply the rest of the rule to the most probable classes: (N, B, B) → (N, 256, 256)."""
    step = _block_side(pred.shape)
    return pred.reshape(-1, SIDE, step, SIDE, step).amax((2, 4)) if rule == 'block_max' else pred


def probs_to_bytes(probs: 'Tensor') -> np.ndarray:
    """Quantize the probabilities of a photo at the scored size: (K, B, B) → (K, 256, 256) uint8; 255 is 1."""
    from torch.nn.functional import interpolate  # most commands do without torch

    if probs.shape[-1] != SIDE:
        scaling = {'mode': 'bilinear', 'align_corners': False, 'antialias': True}
        probs = interpolate(probs[None].float(), (SIDE, SIDE), **scaling)[0]
    return (probs.float() * 255).round().byte().cpu().numpy()


def _block_side(shape: tuple[int, ...]) -> int:
    """Return the pixels of a prediction along each side of a scored pixel. Raises ValueError."""
    if shape[-1] != shape[-2] or shape[-1] % SIDE:
        raise ValueError(f'a prediction is {shape[-2]}x{shape[-1]}, expected a square of k x {SIDE}')
    return shape[-1] // SIDE


class SubmissionWriter(ExitStack):
    """Write a submission row by row, whole or not at all. Raises BadInput.

    with SubmissionWriter(path) as writer:
        writer.write(image_id, mask)
    """

    def __init__(self, path: str | Path) -> None:
        super().__init__()
        self.path = Path(path)

    def __enter__(self) -> 'SubmissionWriter':
        self.file = self.enter_context(write_whole(self.path))
        self.file.write(HEADER)
        return self

    def write(self, image_id: str, mask: np.ndarray) -> None:
        """Write the row of an image; mask is (256, 256) integer class ids. Raises BadInput and ValueError."""
        self.file.write(encode_image_id(image_id, self.path) + b',' + encode_mask(mask) + b'\n')


def encode_image_id(image_id: str, path: Path) -> bytes:
    """Encode the first field of a row, quoted as in RFC 4180 if needed. Raises BadInput."""
    try:
        field = image_id.encode()
    except UnicodeEncodeError:
        field = b''
    if not field or min(field) < ord(' '):
        raise BadInput(f'{path}: image {image_id!r} is not a name that a row can hold')
    quoted = b'"' + field.replace(b'"', b'""') + b'"'
    return quoted if b',' in field or b'"' in field else field


def encode_mask(mask: np.ndarray) -> bytes:
    """Encode the second field of a row, (256, 256) class ids from 0 to 254. Raises ValueError."""
    if mask.shape != (SIDE, SIDE) or not np.issubdtype(mask.dtype, np.integer):
        raise ValueError(f'a mask is {mask.dtype} {mask.shape}, expected integers ({SIDE}, {SIDE})')
    low, high = mask.min(), mask.max()
    if low < 0 or high > 254:
        raise ValueError(f'a mask has class ids from {low} to {high}, expected 0 to 254')
    if high > 10:
        return ' '.join(map(str, mask.ravel().tolist())).encode()
    # pairs of bytes: a digit and a space; ':' comes after '9', and stands for 10 until it is replaced
    text = (mask.astype('<u2') + PAIR).tobytes()[:-1]
    return text.replace(b':', b'10') if high == 10 else text


def read_rows(path: str | Path, num_classes: int = len(CLASSES)) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (image_id, (256, 256) uint8 mask) of each row, one in memory at a time. Raises BadInput."""
    path = Path(path)
    with _open(path) as file:
        for image_id, (number, _, _), text in _read_file(file, path):
            yield image_id, decode_mask(text, num_classes, f'{path}: line {number}: image {image_id!r}')


def read_masks(path: str | Path, num_classes: int = len(CLASSES)) -> dict[str, np.ndarray]:
    """Read the (256, 256) uint8 mask of each image, in the file's order. Raises BadInput."""
    return dict(read_rows(path, num_classes))


class SubmissionReader:
    """Read the rows of a submission in any order; only their places are kept in memory. Raises BadInput.

    with SubmissionReader(path) as reader:
        mask = reader.read(reader.image_ids[0])
    """

    def __init__(self, path: str | Path, num_classes: int = len(CLASSES)) -> None:
        self.path = Path(path)
        self.num_classes = num_classes

    def __enter__(self) -> 'SubmissionReader':
        self.file = _open(self.path)
        try:
            self.rows = {image_id: row for image_id, row, _ in _read_file(self.file, self.path)}
        except BaseException:
            self.file.close()
            raise
        return self

    def __exit__(self, *_) -> None:
        self.file.close()

    @property
    def image_ids(self) -> list[str]:
        """The image ids in the file's order."""
        return list(self.rows)

    def read(self, image_id: str) -> np.ndarray:
        """Read the (256, 256) uint8 mask of one of image_ids. Raises BadInput."""
        number, offset, length = self.rows[image_id]
        try:
            line = os.pread(self.file.fileno(), length, offset)
        except OSError as error:
            raise BadInput(f'{self.path}: cannot be read: {error.strerror}') from None
        where = f'{self.path}: line {number}: image {image_id!r}'
        if len(line) == length and line[-1:] == b'\n':
            image_id_now, text = _split_line(line, self.path, number)
            if image_id_now == image_id:
                return decode_mask(text, self.num_classes, where)
        raise BadInput(f'{where}: the file changed while it was read')


def open_probs(reader: SubmissionReader, num_classes: int) -> np.ndarray:
    """Map the (n, K, 256, 256) uint8 probabilities that belong to the n rows of a CSV. Raises BadInput."""
    path = reader.path.with_name(f'{reader.path.stem}_probs.npy')
    if not path.exists():
        raise BadInput(f'{path}: no such file; infer.py --save-probs writes it beside the CSV')
    return map_array(path, (len(reader.image_ids), num_classes, SIDE, SIDE))


def decode_mask(text: bytes, num_classes: int, where: str) -> np.ndarray:
    """Decode the second field of a row into a (256, 256) uint8 mask. Raises BadInput(where ...)."""
    pred = _decode_pairs(text) if num_classes <= 11 else _decode_tokens(text, num_classes)
    if pred is None or pred.size != PIXELS or pred.max() >= num_classes:
        raise BadInput(f'{where}: {find_fault(text, num_classes)}')
    return pred.reshape(SIDE, SIDE)


def _decode_pairs(text: bytes) -> np.ndarray | None:
    """Decode class ids 0 to 10 as uint8; return None if the text has anything else.

    Each '10' becomes one byte, ':', which comes after '9'; then all is pairs of a digit and a space. This is
    ten times as fast as _decode_tokens, and reading CSVs is most of a vote.
    """
    if b':' in text:
        return None
    if len(text) > 2 * PIXELS - 1:
        codes = np.frombuffer(text, np.uint8).copy()
        tens = (codes[:-1] == ord('1')) & (codes[1:] == ord('0'))
        codes[:-1][tens] = ord(':')
        text = codes[:1].tobytes() + codes[1:][~tens].tobytes()
    if len(text) != 2 * PIXELS - 1:
        return None
    # modulo 65536: above 10 unless it is a digit and a space
    pairs = np.frombuffer(text + b' ', '<u2') - PAIR
    return pairs.astype(np.uint8) if pairs.max() <= 10 else None


def _decode_tokens(text: bytes, num_classes: int) -> np.ndarray | None:
    """Decode class ids as uint8; return None if the text has anything else."""
    class_ids = {b'%d' % class_id: class_id for class_id in range(num_classes)}
    try:
        return np.array([class_ids[token] for token in text.split(b' ')], np.uint8)
    except KeyError:
        return None


def find_fault(text: bytes, num_classes: int) -> str:
    """Describe the first thing that is wrong with the second field of a row."""
    allowed = f'expected 0 to {num_classes - 1}'
    tokens = text.split(b' ')
    for position, token in enumerate(tokens, start=1):
        name = f'id {position} is ' + repr(token[:20].decode('ascii', 'backslashreplace'))
        if not token:
            return f'id {position} is empty; expected one space between ids, none before or after them'
        if token[:1] == b'-' and token[1:].isdigit():
            return f'{name}, negative; {allowed}'
        if not token.isdigit():
            return f'{name}, not a number; {allowed}'
        if token[:1] == b'0' and len(token) > 1:
            return f'{name}, with a zero in front; {allowed}'
        if len(token) > 3 or int(token) >= num_classes:
            return f'{name}; {allowed}'
    assert len(tokens) != PIXELS, 'a row without a fault was refused'
    return f'found {len(tokens):,} ids, expected {PIXELS:,}, {SIDE}x{SIDE}'


def _open(path: Path) -> BinaryIO:
    refuse_device(path)
    try:
        return path.open('rb', buffering=1 << 18)
    except OSError as error:
        raise BadInput(f'{path}: cannot be read: {error.strerror}') from None


def _read_file(file: BinaryIO, path: Path) -> Iterator[tuple[str, tuple[int, int, int], bytes]]:
    """Yield (image id, (line number, offset, length), unchecked text of the class ids). Raises BadInput."""
    lines: dict[str, int] = {}
    for number, offset, line in _read_lines(file, path):
        image_id, text = _split_line(line, path, number)
        first = lines.setdefault(image_id, number)
        if first != number:
            twice = f'image {image_id!r} is listed twice, first in line {first}'
            raise BadInput(f'{path}: line {number}: {twice}')
        yield image_id, (number, offset, len(line)), text
    if not lines:
        raise BadInput(f'{path}: no rows after the header')


def _read_lines(file: BinaryIO, path: Path) -> Iterator[tuple[int, int, bytes]]:
    """Yield (line number, offset, line with its \\n) of each line after the header. Raises BadInput."""
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
    """Raise BadInput unless the first line of a file is the header."""
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
    header = line[:40].decode('utf-8', 'replace').rstrip('\n')
    raise BadInput(f'{path}: line 1: found the header {header!r}, expected {expected!r}')


def _split_line(line: bytes, path: Path, number: int) -> tuple[str, bytes]:
    """Split a row into its image id, without quotes, and the text of its class ids, without the \\n."""
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
    if len(image_id) > MAX_IMAGE_ID:
        fault = f'the image id has {len(image_id):,} characters, at most {MAX_IMAGE_ID}'
        raise BadInput(f'{path}: line {number}: {fault}')
    return image_id, line[end:-1]


if __name__ == '__main__':
    run_script(main)
