"""Code the (256, 256) class ids of a mask as text: numbers from 0 to 254, separated by one space.

    text = encode_mask(mask)
    mask = decode_mask(text, num_classes, where='a.csv: line 2')

Class ids 0 to 10 are read as pairs of bytes, ten times as fast as number by number.
"""

import math
import re

import numpy as np

from utils.errors import BadInput

SIDE = 256  # of a mask
PIXELS = SIDE * SIDE
WHOLE_NUMBER = re.compile(rb'^0*(\d+)(?:\.0*)?$')  # 3, 03, 3. and 3.0
EXCEL_CELL = 32_767  # characters that a cell holds
PAIR = np.uint16(ord('0') + 256 * ord(' '))  # the bytes '0 ' as one little-endian number; '1 ' is one more


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
