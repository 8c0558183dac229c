"""Read, write and check submission CSVs, strictly; and bring predictions to the size that is scored.

    python submission.py check output/submission.csv --data input/data     # every rule of the format
    python submission.py check output/submission.csv --against other.csv   # and how it differs from another

The format: the header image_id,PredictionString; one row an image, in the order of test.json; 65,536 class
ids separated by one space, the rows of a 256x256 mask one after another; \\n line ends. It is written so, and
check accepts nothing else. Everything else reads the CSVs of other tools too, as pandas does: a byte order
mark, \\r\\n, quotes, other or swapped columns, an index, more spaces, 3.0 for 3, and ids that differ from the
data's in Unicode form, slashes or spaces at their ends alone. Files are read and written a row at a time.

Shapes: N batch, K classes, S side of a prediction, B side that downsample_probs returns: SIDE, or S for
block_max.
"""

from argparse import Namespace
from pathlib import Path

from utils.cli import ArgumentParser, add_config_arguments, next_line, parse_early, run_script
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

import math
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import cv2
import numpy as np

from config import CLASSES, HOME, Competition, Config, load_config, read_competition
from metrics import class_iou, confusion_matrix
from utils.errors import DONE, BadInput
from utils.files import map_array, normal_name, refuse_device, write_whole
from utils.foreign_csv import BOM, Layout, find_columns, header_fault, read_lines, split_row
from utils.json_files import find_unknown_category, load_json, read_bytes, require

if TYPE_CHECKING:
    from torch import Tensor

SIDE = 256  # of a scored mask
PIXELS = SIDE * SIDE
WHOLE_NUMBER = re.compile(rb'^0*(\d+)(?:\.0*)?$')  # 3, 03, 3. and 3.0
HEADER = b'image_id,PredictionString\n'
# bytes of a row: 3.0 for 3, more spaces, or the ids of 512x512 pixels, of which an error gives the number
MAX_LINE = 16 * PIXELS + 16_384
HOME_LAYOUT = Layout(b',', 2, (0, 1))
# a row of the format as far as its first class ids, in which no other column or quote is to be looked for
HOME_ROW = re.compile(rb'(?:[^",]++|"(?:[^"]++|"")++"),[\d ]{64}')
MAX_IMAGE_ID = 400  # characters
EXCEL_CELL = 32_767  # characters that a cell holds
PAIR = np.uint16(ord('0') + 256 * ord(' '))  # the bytes '0 ' as one little-endian number; '1 ' is one more


def main(argv: list[str] | None = None) -> int:
    args = read_arguments(argv)
    competition, data = competition_and_data(args)
    classes = competition.classes
    image_ids = read_test_ids(data)
    files = [data / name for name in ('test.json', 'train_all.json', 'train.json')]
    if unknown := find_unknown_category(files, lambda name: competition.class_id(name) is not None):
        command = f'python prepare.py competition --data {data}'
        raise BadInput(f'{unknown} is no class; {command} writes the classes of the data, or give --cfg')
    pixels = check_or_offer_rewrite(args, data, image_ids, len(classes))
    print(f'{args.csv}: {len(image_ids)} images')
    width = max(map(len, classes))
    for name, share in zip(classes, pixels / pixels.sum(), strict=True):
        print(f'{name:<{width}}  {share:>7.3%}')
    if args.against is not None:
        print(compare_masks(args.csv, args.against, classes))
    print('ok')
    return DONE


def competition_and_data(args: Namespace) -> tuple[Competition, Path]:
    """Return what the data set is, and its root, by --cfg, --set and --data. Raises BadInput."""
    data = getattr(args, 'data', None)
    if args.cfg is not None:
        cfg = load_config(args.cfg, args.set, data)
        return cfg.competition, cfg.data_root
    if args.set:
        raise BadInput(f'--set {args.set[0]}: changes a config, but none is given; expected --cfg too')
    data = data or Config().data_root
    return read_competition(data) or HOME, data


def read_test_ids(data: Path) -> list[str]:
    """Read the image ids (file names) of a data root's test.json, in its order. Raises BadInput."""
    path = data / 'test.json'
    images = require(f'{path}: the file', load_json(path, read_bytes(path)), 'images', list)
    image_ids: list[str] = []
    seen: set[str] = set()
    for position, image in enumerate(images):
        image_id = require(f'{path}: images[{position}]', image, 'file_name', str)
        if not image_id:
            raise BadInput(f"{path}: images[{position}]: file_name is '', expected a file name")
        if normal_name(image_id) in seen:
            raise BadInput(f'{path}: image {image_id!r} is listed twice')
        seen.add(normal_name(image_id))
        image_ids.append(image_id)
    if not image_ids:
        raise BadInput(f'{path}: no images')
    return image_ids


def check_or_offer_rewrite(
    args: Namespace, data: Path, image_ids: Sequence[str], num_classes: int
) -> np.ndarray:
    """Check args.csv; if only its form is wrong, the error names the command that rewrites it."""
    try:
        return check_submission(args.csv, image_ids, num_classes)
    except BadInput as fault:
        if not has_all_masks(args.csv, image_ids, num_classes):
            raise
        out = args.csv.with_name(f'{args.csv.stem}_rewritten.csv')
        words = ('ensemble.py', args.csv, '--out', out, '--data', data)
        command = next_line(*words, cfg=args.cfg, changes=args.set).removeprefix('next: ')
        raise BadInput(f'{fault}; to rewrite it: {command}') from None


def has_all_masks(path: Path, image_ids: Sequence[str], num_classes: int) -> bool:
    """Say whether a CSV, whatever its form, has a readable mask of each of these images and no other row."""
    try:
        with SubmissionReader(path, num_classes, image_ids) as reader:
            require_same_images(image_ids, 'test.json', reader)
            for image_id in image_ids:
                reader.read(image_id)
    except BadInput:
        return False
    return True


def check_submission(path: Path, image_ids: Sequence[str], num_classes: int = len(CLASSES)) -> np.ndarray:
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


def unknown_image(image_id: str, image_ids: Sequence[str]) -> str:
    """Describe what an image id is that is none of the test images: another spelling of one, or unknown."""
    same = next((name for name in image_ids if id_key(name) == id_key(image_id)), None)
    if same is None:
        return f'none of the {len(image_ids)} test images'
    if unicodedata.normalize('NFC', same) == unicodedata.normalize('NFC', image_id):
        return 'one of test.json in another Unicode form: the names look the same, but differ in their bytes'
    return f'another spelling of {same!r}; expected it as in test.json'


def compare_masks(path: Path, other: Path, classes: Sequence[str], worst: int = 5) -> str:
    """Describe how two submissions differ: overall, by class (1 - IoU), at worst. Raises BadInput."""
    confusion = np.zeros((len(classes), len(classes)), np.int64)
    shares: dict[str, float] = {}
    with SubmissionReader(path, len(classes)) as ours, ExitStack() as stack:
        theirs = stack.enter_context(SubmissionReader(other, len(classes), ours.image_ids))
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


class Row(NamedTuple):
    """The place of a row in its file, in bytes, and the number of its line."""

    image_id: str
    number: int
    offset: int
    length: int
    layout: Layout


def id_key(image_id: str) -> str:
    """Return the form by which image ids are matched, whatever tool wrote them."""
    return normal_name(image_id.strip())


def read_rows(
    path: str | Path, num_classes: int = len(CLASSES), strict: bool = False
) -> Iterator[tuple[str, np.ndarray]]:
    """Yield (image_id, (256, 256) uint8 mask) of each row, one in memory at a time. Raises BadInput."""
    path = Path(path)
    with _open(path) as file:
        for row, text in _read_file(file, path, strict):
            where = f'{path}: line {row.number}: image {row.image_id!r}'
            yield row.image_id, decode_mask(text, num_classes, where, strict)


def read_masks(path: str | Path, num_classes: int = len(CLASSES)) -> dict[str, np.ndarray]:
    """Read the (256, 256) uint8 mask of each image, in the file's order. Raises BadInput."""
    return dict(read_rows(path, num_classes))


class SubmissionReader:
    """Read the rows of a submission in any order; only their places are kept in memory. Raises BadInput.

    with SubmissionReader(path) as reader:
        mask = reader.read(reader.image_ids[0])

    `names` are the data's image ids: a row of one of them has it as its image id, however the CSV writes it.
    """

    def __init__(self, path: str | Path, num_classes: int = len(CLASSES), names: Iterable[str] = ()) -> None:
        self.path = Path(path)
        self.num_classes = num_classes
        exact = {name: name for name in names}
        self.names = {id_key(name): name for name in exact} | exact

    def __enter__(self) -> 'SubmissionReader':
        self.file = _open(self.path)
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
        try:
            line = os.pread(self.file.fileno(), row.length, row.offset)
            size = os.fstat(self.file.fileno()).st_size
        except OSError as error:
            raise BadInput(f'{self.path}: cannot be read: {error.strerror}') from None
        where = f'{self.path}: line {row.number}'
        if len(line) == row.length and (line[-1:] == b'\n' or row.offset + row.length == size):
            id_now, text = _split_row(line, row.layout, where)
            if id_key(id_now) == id_key(image_id):
                return decode_mask(text, self.num_classes, f'{where}: image {image_id!r}', strict=False)
        raise BadInput(f'{where}: image {image_id!r}: the file changed while it was read')


def open_probs(reader: SubmissionReader, num_classes: int) -> np.ndarray:
    """Map the (n, K, 256, 256) uint8 probabilities that belong to the n rows of a CSV. Raises BadInput."""
    path = reader.path.with_name(f'{reader.path.stem}_probs.npy')
    if not path.exists():
        raise BadInput(f'{path}: no such file; infer.py --save-probs writes it beside the CSV')
    return map_array(path, (len(reader.image_ids), num_classes, SIDE, SIDE))


def decode_mask(text: bytes, num_classes: int, where: str, strict: bool = True) -> np.ndarray:
    """Decode the second field of a row into a (256, 256) uint8 mask. Raises BadInput(where ...).

    Without `strict`, class ids may be separated by any white space, and written as 3.0 or 03.
    """
    pred = _decode(text, num_classes)
    if pred is None and not strict:
        text = _plain_ids(text)
        pred = _decode(text, num_classes)
    if pred is None:
        raise BadInput(f'{where}: {find_fault(text, num_classes)}')
    return pred.reshape(SIDE, SIDE)


def _decode(text: bytes, num_classes: int) -> np.ndarray | None:
    """Decode 65,536 class ids as uint8; return None if the text has anything else."""
    pred = _decode_pairs(text) if num_classes <= 11 else _decode_tokens(text, num_classes)
    return None if pred is None or pred.size != PIXELS or pred.max() >= num_classes else pred


def _plain_ids(text: bytes) -> bytes:
    """Write each whole number without zeros that mean nothing, and one space between them."""
    tokens = text.split()
    plain = {token: WHOLE_NUMBER.sub(rb'\1', token) for token in set(tokens)}
    return b' '.join([plain[token] for token in tokens])


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
    if not text.strip():
        return f'has no class ids, expected {PIXELS:,}'
    allowed = f'expected 0 to {num_classes - 1}'
    tokens = text.split(b' ')
    few = len(tokens) < PIXELS and len(tokens) % 2 == 0
    runs = f'; {len(tokens):,} numbers may be run lengths, expected {PIXELS:,} ids' if few else ''
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
            return f'{name}; {allowed}{runs}'
    assert len(tokens) != PIXELS, 'a row without a fault was refused'
    side = math.isqrt(len(tokens))
    size = f', a mask of {side}x{side}' if side * side == len(tokens) else ''
    fault = f'found {len(tokens):,} ids{size}, expected {PIXELS:,}, {SIDE}x{SIDE}'
    if EXCEL_CELL - 1 <= len(text) <= EXCEL_CELL:
        fault += f'; Excel cuts a cell at {EXCEL_CELL:,} characters: use the CSV as it was before'
    return fault


def _open(path: Path) -> BinaryIO:
    refuse_device(path)
    try:
        return path.open('rb', buffering=1 << 18)
    except OSError as error:
        raise BadInput(f'{path}: cannot be read: {error.strerror}') from None


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
            _require_home_line(line, where)
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


def _require_home_line(line: bytes, where: str) -> None:
    """Raise BadInput unless a row has something in it, and ends with \\n alone."""
    if line == b'\n':
        raise BadInput(f'{where}: is empty; expected a row, or the end of the file')
    if line[-1:] != b'\n':
        raise BadInput(f'{where}: does not end with a newline; the file may be cut off')
    if line[-2:] == b'\r\n':
        raise BadInput(f'{where}: ends as on Windows, \\r\\n; expected \\n alone')


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
    return _decode_image_id(image_id, where), text.strip()


def _split_home_row(line: bytes, where: str) -> tuple[str, bytes]:
    """Split a row into its image id, without quotes, and the text of its class ids, without the \\n."""
    if line[:1] == b'"':
        quoted = re.match(rb'"((?:[^"]|"")*)",', line)
        if quoted is None:
            raise BadInput(f'{where}: the quotes around the image id do not end before a comma')
        return _decode_image_id(quoted[1].replace(b'""', b'"'), where), line[quoted.end() : -1]
    field, comma, text = line[:-1].partition(b',')
    if not comma:
        raise BadInput(f'{where}: has no comma; expected image_id,ids')
    if b'"' in field:
        raise BadInput(f'{where}: the image id has a quote in it, but none around it')
    return _decode_image_id(field, where), text


def _decode_image_id(field: bytes, where: str) -> str:
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


if __name__ == '__main__':
    run_script(main)
