"""Submission CSVs: what is accepted, what is refused and how, and that nothing is lost on the way."""

import json
import re
import subprocess
import sys
import unicodedata
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import file_limit, write_rectangles
from hypothesis import given, settings
from hypothesis import strategies as st

import ensemble
import evaluate
import submission
from config import HOME, Competition, write_competition
from data.cache import resize_mask
from metrics import Metric
from submission import (
    competition_and_data,
    downsample_ids,
    downsample_mask,
    downsample_probs,
    main,
    metric_of,
    probs_to_bytes,
    read_test_sizes,
)
from utils.errors import BadInput, Interrupted
from utils.id_csv import IdReader, IdWriter, check_ids, read_masks, read_rows
from utils.id_text import PIXELS, SIDE, decode_mask, encode_mask

HEADER = b'image_id,PredictionString\n'
IDS = ['batch_01/b.jpg', 'batch_01/a.jpg', 'c.jpg']


def random_mask(seed: int, num_classes: int = 11) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, num_classes, (SIDE, SIDE), np.uint8)


def write_csv(path: Path, masks: dict[str, np.ndarray]) -> Path:
    with IdWriter(path) as writer:
        for image_id, mask in masks.items():
            writer.write(image_id, mask)
    return path


def write_test_json(folder: Path, image_ids: list[str]) -> Path:
    folder.mkdir(exist_ok=True)
    images = [{'id': i, 'file_name': image_id} for i, image_id in enumerate(image_ids)]
    (folder / 'test.json').write_text(json.dumps({'images': images}))
    return folder


@pytest.fixture
def data(tmp_path) -> Path:
    return write_test_json(tmp_path / 'data', IDS)


@pytest.fixture
def csv(tmp_path) -> Path:
    return write_csv(
        tmp_path / 'submission.csv', {image_id: random_mask(i) for i, image_id in enumerate(IDS)}
    )


# --- rows: the fast codec against a slow one --------------------------------------------------------------


def slow_decode(text: bytes, num_classes: int) -> list[int] | None:
    """The ids of a row, by the letter of the format; None where it is broken."""
    allowed = {b'%d' % i: i for i in range(num_classes)}
    ids = [allowed.get(token) for token in text.split(b' ')]
    return None if len(ids) != PIXELS or None in ids else ids


def assert_as_slow(text: bytes, num_classes: int) -> None:
    expected = slow_decode(text, num_classes)
    try:
        class_ids = decode_mask(text, num_classes, 'here').ravel().tolist()
    except BadInput as error:
        assert str(error).startswith('here: ') and '\n' not in str(error)
        class_ids = None
    assert class_ids == expected


@pytest.mark.parametrize('num_classes', [1, 2, 9, 10, 11, 12, 20, 100, 101, 255])
def test_masks_come_back(num_classes):
    for mask in (
        random_mask(3, num_classes),
        np.full((SIDE, SIDE), num_classes - 1, np.uint8),
        np.zeros((SIDE, SIDE), np.int64),
    ):
        text = encode_mask(mask)
        assert text == b' '.join(b'%d' % i for i in mask.ravel())
        decoded = decode_mask(text, num_classes, '')
        assert decoded.dtype == np.uint8 and decoded.flags.writeable
        np.testing.assert_array_equal(decoded, mask)
    if num_classes > 1:
        with pytest.raises(BadInput, match=f'expected 0 to {num_classes - 2}'):
            decode_mask(encode_mask(np.full((SIDE, SIDE), num_classes - 1)), num_classes - 1, '')


PIECES = [
    b'0', b'1', b'9', b'10', b'11', b'12', b'01', b'00', b'-1', b'', b' ', b'  ', b':', b'a', b'100', b'1010',
    b'110', b'255', b'256', b'1e1', b'1.0', b'+1', b'1\n', b'\t', b'\xff', b'\x00', b'\r', b',', b'"0"',
    b'\xd9\xa1', b'9' * 5000,
]  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    kinds=st.sampled_from([1, 10, 11, 12]),
    num_classes=st.sampled_from([3, 11, 12, 255]),
    edits=st.lists(st.tuples(st.integers(0, PIXELS - 1), st.sampled_from(PIECES)), max_size=3),
    extra=st.sampled_from([0, 0, 0, -1, 1, 5]),
)
def test_hostile_tokens_as_the_slow_reference(seed, kinds, num_classes, edits, extra):
    tokens = encode_mask(random_mask(seed, min(kinds, num_classes))).split(b' ')
    for position, piece in edits:
        tokens[position] = piece
    tokens = tokens[: PIXELS + extra] + [b'1'] * extra
    assert_as_slow(b' '.join(tokens), num_classes)


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    kinds=st.sampled_from([2, 11]),
    num_classes=st.sampled_from([11, 12]),
    edits=st.lists(
        st.tuples(st.floats(0, 1), st.integers(0, 255), st.sampled_from(['set', 'insert', 'delete'])),
        max_size=4,
    ),
)
def test_hostile_bytes_as_the_slow_reference(seed, kinds, num_classes, edits):
    text = bytearray(encode_mask(random_mask(seed, kinds)))
    for share, value, what in edits:
        place = int(share * (len(text) - 1))
        text[place : place + (what != 'insert')] = b'' if what == 'delete' else bytes([value])
    assert_as_slow(bytes(text), num_classes)


@given(st.binary(max_size=200), st.sampled_from([11, 255]))
def test_rubbish_is_refused(text, num_classes):
    with pytest.raises(BadInput):
        decode_mask(text, num_classes, '')


def test_a_colon_is_no_ten():
    for row in ([b':'] * PIXELS, [b':'] + [b'0'] * (PIXELS - 1), [b':', b'10'] + [b'0'] * (PIXELS - 2)):
        assert_as_slow(b' '.join(row), 11)


@pytest.mark.parametrize('mask', [
    np.zeros((SIDE, SIDE + 1), np.uint8), np.zeros(PIXELS, np.uint8), np.zeros((SIDE, SIDE)),
    np.full((SIDE, SIDE), 255), np.full((SIDE, SIDE), -1),
])  # fmt: skip
def test_only_masks_are_written(mask):
    with pytest.raises(ValueError, match='a mask'):
        encode_mask(mask)


# --- files ------------------------------------------------------------------------------------------------


def test_files_come_back(csv):
    rows = list(read_rows(csv))
    assert [image_id for image_id, _ in rows] == IDS
    for seed, (_, mask) in enumerate(rows):
        np.testing.assert_array_equal(mask, random_mask(seed))
    assert list(read_masks(csv)) == IDS
    assert csv.read_bytes() == HEADER + b''.join(
        image_id.encode() + b',' + b' '.join(b'%d' % i for i in random_mask(seed).ravel()) + b'\n'
        for seed, image_id in enumerate(IDS)
    )
    with IdReader(csv) as reader:
        assert reader.image_ids == IDS
        for seed in (2, 0, 1, 1):
            np.testing.assert_array_equal(reader.read(IDS[seed]), random_mask(seed))


def test_pandas_reads_the_same(csv):
    pandas = pytest.importorskip('pandas')
    frame = pandas.read_csv(csv)
    assert frame['image_id'].tolist() == IDS
    for seed, text in enumerate(frame['PredictionString']):
        assert list(map(int, text.split(' '))) == random_mask(seed).ravel().tolist()


NAMES = ['a,b.jpg', '"quoted".jpg', 'both",".jpg', ' spaces .jpg', 'été/사진.jpg', ',', '"', "'"]


def test_image_ids_are_quoted_and_unquoted(tmp_path):
    path = write_csv(tmp_path / 'a.csv', {name: random_mask(0) for name in NAMES})
    assert [image_id for image_id, _ in read_rows(path)] == NAMES
    with IdReader(path) as reader:
        assert reader.image_ids == NAMES
        np.testing.assert_array_equal(reader.read(NAMES[2]), random_mask(0))
    pandas = pytest.importorskip('pandas')
    assert pandas.read_csv(path)['image_id'].tolist() == NAMES


@pytest.mark.parametrize('name', ['', 'a\nb', 'a\rb', '\x00', '\ud800'])
def test_names_that_no_row_holds_are_refused(tmp_path, name):
    with pytest.raises(BadInput, match=r'a\.csv.*not a name'):
        write_csv(tmp_path / 'a.csv', {name: random_mask(0)})
    assert not list(tmp_path.iterdir())


def test_reading_is_row_by_row(csv):
    text = csv.read_bytes()
    csv.write_bytes(text[:-1] + b'1\n')  # the last row has an id too large
    rows = read_rows(csv)
    assert next(rows)[0] == IDS[0] and next(rows)[0] == IDS[1]
    with pytest.raises(BadInput, match='line 4'):
        next(rows)


def test_the_file_changes_while_it_is_read(csv):
    with IdReader(csv) as reader:
        text = csv.read_bytes()
        csv.write_bytes(text[:-30])
        with pytest.raises(BadInput, match=r'c\.jpg.*changed'):
            reader.read(IDS[2])
        csv.write_bytes(text.replace(b'a.jpg', b'x.jpg'))
        with pytest.raises(BadInput, match=r'a\.jpg.*changed'):
            reader.read(IDS[1])


# --- writing, and what is left after an error -------------------------------------------------------------


@pytest.mark.parametrize('error', [RuntimeError, KeyboardInterrupt])
def test_an_error_leaves_what_was_there(csv, error):
    before = csv.read_bytes()
    with pytest.raises(error), IdWriter(csv) as writer:
        writer.write('x.jpg', random_mask(9))
        raise error
    assert csv.read_bytes() == before
    assert list(csv.parent.iterdir()) == [csv]


def test_a_full_disk_is_one_line_and_leaves_what_was_there(csv):
    before = csv.read_bytes()
    with file_limit(300_000), pytest.raises(Interrupted, match=r'submission\.csv: cannot be written'):
        write_csv(csv, {str(i): random_mask(i) for i in range(5)})
    assert csv.read_bytes() == before
    assert list(csv.parent.iterdir()) == [csv]


def test_output_that_cannot_be_written(tmp_path):
    (tmp_path / 'file').write_text('')
    (tmp_path / 'folder').mkdir()
    for path in (
        tmp_path / 'folder',
        tmp_path / 'file' / 'a.csv',
        tmp_path / ('x' * 300),
        Path('/'),
        Path('/dev/null'),
    ):
        with pytest.raises(BadInput, match='cannot be written'):
            write_csv(path, {'a.jpg': random_mask(0)})
    write_csv(tmp_path / 'new' / 'folders' / 'a.csv', {'a.jpg': random_mask(0)})
    assert [p.name for p in (tmp_path / 'new' / 'folders').iterdir()] == ['a.csv']


# --- check ------------------------------------------------------------------------------------------------


def test_check_says_ok(csv, data, capsys):
    assert main(['check', str(csv), '--data', str(data)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f'{csv}: 3 images'
    assert lines[-1] == 'ok'
    share = sum((random_mask(i) == 10).sum() for i in range(3)) / (3 * PIXELS)
    assert lines[-2] == f'Clothing       {share:>7.3%}'


def row(image_id: str = 'c.jpg', ids: bytes | None = None) -> bytes:
    return image_id.encode() + b',' + (encode_mask(random_mask(7)) if ids is None else ids) + b'\n'


def with_token(position: int, token: bytes) -> bytes:
    tokens = encode_mask(random_mask(7)).split(b' ')
    tokens[position] = token
    return b' '.join(tokens)


ROW = encode_mask(random_mask(1))
BEGIN = HEADER + row(IDS[0]) + row(IDS[1])
GOOD = BEGIN + row()
FAULTS = {
    'empty file': (b'', 'is empty; expected the header'),
    'wrong header': (GOOD.replace(b'image_id', b'id', 1), "line 1: found the header 'id,PredictionString'"),
    'no header': (GOOD[len(HEADER):], r"line 1: found the header 'batch_01/b\.jpg,"),
    'byte order mark': (b'\xef\xbb\xbf' + GOOD, 'line 1: begins with a byte order mark'),
    'header alone': (HEADER, 'no rows'),
    'header cut off': (HEADER[:-1], 'line 1: does not end with a newline'),
    'windows line ends': (GOOD.replace(b'\n', b'\r\n'), r'line 1: ends as on Windows'),
    'windows line ends in a row': (GOOD[:-1] + b'\r\n', r'line 4: ends as on Windows'),
    'missing image': (BEGIN, r"1 of 3 test images have no row, such as 'c\.jpg'"),
    'doubled image': (BEGIN + row(IDS[0]), "line 4: image 'batch_01/b.jpg' is listed twice.* line 2"),
    'unknown image': (BEGIN + row('d.jpg'), r"line 4: image 'd\.jpg' is none of the 3 test images"),
    'wrong order': (HEADER + row() + BEGIN[len(HEADER):], "line 2: found image 'c.jpg', expected 'b"),
    'too few ids': (BEGIN + row(ids=ROW[:-2]), "line 4: image 'c.jpg': found 65,535 ids, expected 65,536"),
    'too many ids': (BEGIN + row(ids=ROW + b' 1'), "'c.jpg': found 65,537 ids, expected 65,536"),
    'no ids': (BEGIN + b'c.jpg,\n', "'c.jpg': has no class ids, expected 65,536"),
    'of 512x512': (BEGIN + row(ids=b'0 ' * 262_143 + b'0'), 'found 262,144 ids, a mask of 512x512, '),
    'runs of ids': (BEGIN + row(ids=b'5 3 900 7'), "id 3 is '900'; .*; 4 numbers may be run lengths"),
    'an id of 11': (BEGIN + row(ids=with_token(4, b'11')), "image 'c.jpg': id 5 is '11'; expected 0 to 10"),
    'a negative id': (BEGIN + row(ids=with_token(0, b'-1')), "id 1 is '-1', negative; expected 0 to 10"),
    'an empty id': (BEGIN + row(ids=with_token(9, b'')), 'id 10 is empty; expected one space'),
    'a space in front': (BEGIN + row(ids=b' ' + ROW), 'id 1 is empty'),
    'a space behind': (BEGIN + row(ids=ROW + b' '), 'id 65537 is empty'),
    'a tab': (BEGIN + row(ids=with_token(1, b'1\t2')), r"id 2 is '1\\t2', not a number"),
    'a letter': (BEGIN + row(ids=with_token(1, b'x')), "id 2 is 'x', not a number"),
    'a fraction': (BEGIN + row(ids=with_token(1, b'1.0')), "id 2 is '1.0', not a number"),
    'a zero in front': (BEGIN + row(ids=with_token(1, b'01')), "id 2 is '01', with a zero in front"),
    'quoted ids': (BEGIN + row(ids=b'"' + ROW + b'"'), 'id 1 is \'"'),
    'no newline at the end': (GOOD[:-1], 'line 4: does not end with a newline'),
    'cut off': (GOOD[:-1000], 'line 4: does not end with a newline'),
    'an empty line': (GOOD + b'\n', 'line 5: is empty'),
    'no comma': (HEADER + b'c.jpg\n', 'line 2: has no comma'),
    'no image id': (HEADER + row(''), 'line 2: the image id is empty'),
    'an open quote': (HEADER + row('"c.jpg'), 'line 2: the quotes around the image id do not end'),
    'a quote within': (HEADER + row('c".jpg'), 'line 2: the image id has a quote'),
    'not utf-8': (HEADER + b'\xff' + row(), 'line 2: the image id .* is not UTF-8'),
    'binary rubbish': (np.random.default_rng(0).bytes(100_000), 'line 1: found the header'),
    'rubbish after the header': (HEADER + np.random.default_rng(0).bytes(100_000), 'line 2: '),
    'an endless line': (HEADER + b'0' * 2_000_000, 'line 2: has over 1,064,960 bytes, .*; is the mask'),
    'utf-16': (GOOD.decode().encode('utf-16'), 'is UTF-16; expected UTF-8: iconv -f UTF-16'),
    'utf-16 without a mark': (GOOD.decode().encode('utf-16-le'), 'is UTF-16'),
    'gzip': (b'\x1f\x8b\x08' + GOOD, 'is compressed by gzip'),
    'run lengths': (b'image_name,class,rle\nc.jpg,1,1 3\n', 'image_name,class,rle.* as of run-length'),
    'more run lengths': (b'ImageId,EncodedPixels\nc.jpg,1 3\n', 'as of run-length encodings'),
    'the line ends of old Macs': (GOOD.replace(b'\n', b'\r'), r'line 1: ends with .r alone'),
}  # fmt: skip
REWRITABLE = {
    'byte order mark', 'windows line ends', 'windows line ends in a row', 'wrong order', 'a space in front',
    'a space behind', 'a fraction', 'a zero in front', 'quoted ids', 'no newline at the end', 'an empty line',
}  # fmt: skip


@pytest.mark.parametrize('fault', FAULTS)
def test_each_fault_has_its_line(fault, data, tmp_path):
    content, message = FAULTS[fault]
    path = tmp_path / 'faulty.csv'
    path.write_bytes(content)
    with pytest.raises(BadInput, match=message) as error:
        main(['check', str(path), '--data', str(data)])
    line, way_out, _ = str(error.value).partition('; to rewrite it: python ensemble.py ')
    assert line.startswith(f'{path}: ') and len(line) < len(str(path)) + 210
    assert bool(way_out) == (fault in REWRITABLE) and '\n' not in str(error.value)


def test_no_file_and_a_folder(data, tmp_path):
    with pytest.raises(BadInput, match=r'none\.csv: cannot be read: No such file'):
        check_ids(tmp_path / 'none.csv', IDS)
    with pytest.raises(BadInput, match='cannot be read: Is a directory'):
        check_ids(tmp_path, IDS)


# --- CSVs of other tools ----------------------------------------------------------------------------------


def texts(csv: Path) -> list[tuple[str, str]]:
    """Return the two fields of each row of a CSV that has neither quotes nor commas in its fields."""
    return [tuple(line.split(',')) for line in csv.read_text().splitlines()[1:]]


def lines(header: str, rows: list[str], end: str = '\n') -> bytes:
    return ''.join(line + end for line in [header, *rows]).encode()


def home(rows: list[str], end: str = '\n') -> bytes:
    return lines('image_id,PredictionString', rows, end)


VARIANTS: dict[str, Callable[[list[tuple[str, str]]], bytes]] = {
    'byte order mark': lambda t: b'\xef\xbb\xbf' + home([f'{i},{p}' for i, p in t]),
    'windows': lambda t: home([f'{i},{p}' for i, p in t], '\r\n'),
    'windows twice': lambda t: home([f'{i},{p}' for i, p in t], '\r\r\n'),
    'mark and windows and quotes': lambda t: (
        b'\xef\xbb\xbf' + lines('"image_id","PredictionString"', [f'"{i}","{p}"' for i, p in t], '\r\n')
    ),
    'quoted': lambda t: lines('"image_id","PredictionString"', [f'"{i}","{p}"' for i, p in t]),
    'ids quoted': lambda t: home([f'{i},"{p}"' for i, p in t]),
    'no newline at the end': lambda t: home([f'{i},{p}' for i, p in t])[:-1],
    'quoted, no newline': lambda t: home([f'{i},"{p}"' for i, p in t])[:-1],
    'lines of commas below': lambda t: home([f'{i},{p}' for i, p in t] + [',', ' ,', '"",""']),
    'empty lines': lambda t: b'\n' + home([f'{i},{p}\n' for i, p in t]) + b'\r\n \n\n',
    'swapped': lambda t: lines('PredictionString,image_id', [f'{p},{i}' for i, p in t]),
    'index': lambda t: lines(',image_id,PredictionString', [f'{n},{i},{p}' for n, (i, p) in enumerate(t)]),
    'index, named by pandas': lambda t: lines(
        'Unnamed: 0,image_id,PredictionString', [f'{n},{i},{p}' for n, (i, p) in enumerate(t)]
    ),
    'index, twice': lambda t: lines(
        'Unnamed: 0.1,Unnamed: 0,image_id,PredictionString',
        [f'{n},{n},{i},{p}' for n, (i, p) in enumerate(t)],
    ),
    'index without a header': lambda t: home([f'{n},{i},{p}' for n, (i, p) in enumerate(t)]),
    'a comma behind': lambda t: home([f'{i},{p},' for i, p in t]),
    'another column': lambda t: lines('image_id,score,PredictionString', [f'{i},0.5,{p}' for i, p in t]),
    'letter case': lambda t: lines('Image_ID,predictionstring', [f'{i},{p}' for i, p in t]),
    'spaces in the header': lambda t: lines(' image id , Prediction String', [f'{i}, {p}' for i, p in t]),
    'semicolons': lambda t: lines('image_id;PredictionString', [f'{i};{p}' for i, p in t]),
    'tabs for commas': lambda t: lines('image_id\tPredictionString', [f'{i}\t{p}' for i, p in t]),
    'space behind': lambda t: home([f'{i},{p} ' for i, p in t]),
    'space in front': lambda t: home([f'{i}, {p}' for i, p in t]),
    'two spaces': lambda t: home([f'{i},{p.replace(" ", "  ")}' for i, p in t]),
    'tabs': lambda t: home([i + ',' + p.replace(' ', '\t') for i, p in t]),
    'line ends between ids': lambda t: home([f'{i},"{p[:64].strip()}\n{p[64:]}"' for i, p in t]),
    'fractions': lambda t: home([f'{i},{p.replace(" ", ".0 ")}.0' for i, p in t]),
    'points': lambda t: home([f'{i},{p.replace(" ", ". ")}.' for i, p in t]),
    'zeros in front': lambda t: home([f'{i},0{p.replace(" ", " 0")}' for i, p in t]),
    'any order': lambda t: home([f'{i},{p}' for i, p in t[::-1]]),
    'spaces around names': lambda t: home([f' {i} ,{p}' for i, p in t]),
    'points in front of names': lambda t: home([f'./{i},{p}' for i, p in t]),
    'backslashes': lambda t: home([i.replace('/', '\\') + f',{p}' for i, p in t]),
    'decomposed letters': lambda t: home([unicodedata.normalize('NFD', i) + f',{p}' for i, p in t]),
}
ACCENTED = ['batch_01/b.jpg', 'batch_01/유리병.jpg', 'é.jpg']  # as in test.json: composed letters


@pytest.mark.parametrize('variant', VARIANTS)
def test_csvs_of_other_tools_are_read_and_rewritten_but_not_handed_in(variant, tmp_path, capsys):
    data = write_test_json(tmp_path / 'data', ACCENTED)
    masks = {image_id: random_mask(seed) for seed, image_id in enumerate(ACCENTED)}
    for mask in masks.values():
        mask[0, :40] = 3  # 64 characters of one digit
    home_csv = write_csv(tmp_path / 'home.csv', masks)
    path = tmp_path / 'theirs.csv'
    path.write_bytes(VARIANTS[variant](texts(home_csv)))
    assert len(read_masks(path)) == 3
    with IdReader(path, names=ACCENTED) as reader:
        assert sorted(reader.image_ids) == sorted(ACCENTED) and 'none.jpg' not in reader
        for image_id in ACCENTED:
            assert image_id in reader
            np.testing.assert_array_equal(reader.read(image_id), masks[image_id])
    with pytest.raises(BadInput) as error:
        main(['check', str(path), '--data', str(data)])
    command = str(error.value).partition('; to rewrite it: python ensemble.py ')[2].split(' ')
    assert ensemble.main(command) == 0
    assert (tmp_path / 'theirs_rewritten.csv').read_bytes() == home_csv.read_bytes()
    assert main(['check', str(tmp_path / 'theirs_rewritten.csv'), '--data', str(data)]) == 0
    assert main(['check', str(home_csv), '--data', str(data), '--against', str(path)]) == 0
    assert 'theirs.csv: 0.000% of the pixels differ' in capsys.readouterr().out


PANDAS_DIFFERS = {
    'semicolons', 'tabs for commas', 'a comma behind', 'spaces in the header', 'letter case',
    'lines of commas below',
}  # fmt: skip


@pytest.mark.parametrize('variant', sorted(VARIANTS.keys() - PANDAS_DIFFERS))
def test_pandas_reads_other_tools_the_same(variant, csv):
    pandas = pytest.importorskip('pandas')
    csv.write_bytes(VARIANTS[variant](texts(csv)))
    frame = pandas.read_csv(csv)
    ours = read_masks(csv)
    assert frame['image_id'].tolist() == list(ours)
    for text, mask in zip(frame['PredictionString'], ours.values(), strict=True):
        assert [float(token) for token in text.split()] == mask.ravel().tolist()


LENIENT_FAULTS = {
    'too few ids': (BEGIN + row(ids=ROW[:-2]), "line 4: image 'c.jpg': found 65,535 ids"),
    'cut by Excel': (BEGIN + row(ids=ROW[:32_767]), 'found 15,643 ids, .*; Excel cuts a cell at 32,767'),
    'an id of 11': (BEGIN + row(ids=with_token(4, b'11.0')), "image 'c.jpg': id 5 is '11'; expected 0 to 10"),
    'a fraction': (BEGIN + row(ids=with_token(1, b'1.5')), "id 2 is '1.5', not a number"),
    'an exponent': (BEGIN + row(ids=with_token(1, b'1e0')), "id 2 is '1e0', not a number"),
    'a negative id': (BEGIN + row(ids=with_token(0, b'-1')), "id 1 is '-1', negative; expected 0 to 10"),
    'a list': (BEGIN + row(ids=b'"[' + ROW.replace(b' ', b', ') + b']"'), 'id 1 is .*, not a number'),
    'no ids': (BEGIN + b'c.jpg,\n', "'c.jpg': has no class ids, expected 65,536"),
    'of 512x512': (
        BEGIN + row(ids=b'0 ' * 262_143 + b'0'),
        'found 262,144 ids, a mask of 512x512, expected 65',
    ),
    'run lengths': (
        BEGIN + row(ids=b'5 3 900 7'),
        "id 3 is '900'; .*; 4 numbers may be run lengths",
    ),
    'no comma': (HEADER + b'c.jpg\n', 'line 2: has 1 fields; expected 2, as the header has'),
    'an unquoted comma': (HEADER + row('d,c.jpg'), 'line 2: has 3 fields; expected 2'),
    'no image id': (HEADER + b' ,' + ROW + b'\n', 'line 2: the image id is empty'),
    'an open quote': (HEADER + row('"c.jpg'), 'line 2: has a quote that does not end'),
    'many open quotes': (HEADER + b'"' + row() * 20, 'line 2: has over 1,064,960 bytes.*quote'),
    'another code': (
        HEADER + row().replace(b'c', '\uac00'.encode('cp949'), 1),
        'is not UTF-8; save the CSV as',
    ),
    'the same name twice': (
        BEGIN + row('batch_01\\a.jpg'),
        r'line 4: .* is listed twice, first in line 3, as',
    ),
    'two columns of a name': (b'image_id,Image ID,PredictionString\n', 'line 1: found the header'),
    'run lengths with a mark': (b'\xef\xbb\xbfImageId,EncodedPixels\n', 'as of run-length encodings'),
    'header alone': (HEADER[:-1], 'no rows'),
    'nothing but empty lines': (b'\n\n', 'is empty; expected the header'),
    'utf-16': (FAULTS['utf-16'][0], 'is UTF-16'),
}


@pytest.mark.parametrize('fault', LENIENT_FAULTS)
def test_each_fault_of_other_tools_has_its_line(fault, tmp_path):
    content, message = LENIENT_FAULTS[fault]
    path = tmp_path / 'faulty.csv'
    path.write_bytes(content)
    with pytest.raises(BadInput, match=message) as error:
        read_masks(path)
    assert str(error.value).startswith(f'{path}: ') and '\n' not in str(error.value)


def test_names_that_only_look_the_same_are_told_apart(tmp_path):
    data = write_test_json(tmp_path / 'data', ['é.jpg', 'a/b.jpg'])
    for image_id, message in (('e\u0301.jpg', 'in another Unicode form'), ('a\\b.jpg', "of 'a/b.jpg'")):
        path = write_csv(tmp_path / 'a.csv', {image_id: random_mask(0)})
        with pytest.raises(BadInput, match=message):
            main(['check', str(path), '--data', str(data)])


def test_another_tools_file_that_grows_while_it_is_read(csv):
    csv.write_bytes(csv.read_bytes()[:-1])
    with IdReader(csv) as reader:
        np.testing.assert_array_equal(reader.read('c.jpg'), random_mask(2))
        csv.write_bytes(csv.read_bytes() + b'0\n')
        with pytest.raises(BadInput, match=r'c\.jpg.*changed'):
            reader.read('c.jpg')


JSON_FAULTS = {
    'cut off': ('{"images": [{"file_na', 'not JSON, or cut off'),
    'no images': ('{"annotations": []}', "lacks the key 'images'"),
    'no file_name': ('{"images": [{"id": 1}]}', "lacks the key 'file_name'"),
    'a list': ('[]', 'found list, expected COCO JSON, an object with images'),
    'null': ('null', 'found NoneType, expected COCO JSON'),
    'a number': ('{"images": [{"file_name": 3}]}', r"images\[0\]: file_name is '3', expected str"),
    'an empty name': ('{"images": [{"file_name": ""}]}', r"images\[0\]: file_name is '', expected a file"),
    'twice': ('{"images": [{"file_name": "a"}, {"file_name": "a"}]}', "image 'a' is listed twice"),
    'none': ('{"images": []}', 'no images'),
    'too deep': ('[' * 100_000, 'not JSON'),
}


@pytest.mark.parametrize('fault', JSON_FAULTS)
def test_a_broken_test_json(fault, csv, tmp_path):
    content, message = JSON_FAULTS[fault]
    (tmp_path / 'test.json').write_text(content)
    with pytest.raises(BadInput, match=message) as error:
        main(['check', str(csv), '--data', str(tmp_path)])
    assert str(error.value).startswith(str(tmp_path / 'test.json'))
    with pytest.raises(BadInput, match=r'test\.json: cannot be read: No such file'):
        read_test_sizes(tmp_path / 'elsewhere', HOME)


def run(*argv: object) -> subprocess.CompletedProcess:
    script = Path(submission.__file__)
    return subprocess.run(
        [sys.executable, script, *map(str, argv)], capture_output=True, text=True, check=False
    )


def test_the_script_ends_in_one_line_with_status_2_and_without_torch(csv, data, tmp_path):
    bad = tmp_path / 'bad.csv'
    bad.write_bytes(GOOD[:-1000])
    result = run('check', bad, '--data', data)
    assert result.returncode == 2 and result.stdout == ''
    assert (
        result.stderr
        == f'submission.py: error: {bad}: line 4: does not end with a newline; the file may be cut off\n'
    )
    result = run('check')
    assert result.returncode == 2 and result.stderr.count('\n') == 1
    result = run('--help')
    assert result.returncode == 0 and re.search('check +check every rule', result.stdout)
    code = 'import sys, submission, metrics; sys.exit("torch" in sys.modules)'
    subprocess.run([sys.executable, '-c', code], check=True, cwd=Path(submission.__file__).parent)


def test_against_another(csv, data, tmp_path, capsys):
    masks = read_masks(csv)
    other = {image_id: masks[image_id].copy() for image_id in reversed(IDS)}  # in another order
    other['c.jpg'][:64] = (other['c.jpg'][:64] + 1) % 11  # a quarter of one of three
    path = write_csv(tmp_path / 'other.csv', other)
    assert main(['check', str(csv), '--data', str(data), '--against', str(path)]) == 0
    out = capsys.readouterr().out
    assert f'against {path}: {1 / 12:.3%} of the pixels differ' in out
    assert 'c.jpg: 25.00% differ' in out and 'batch_01/a.jpg: 0.00% differ' in out
    ours, theirs = np.stack([masks[i] for i in IDS]) == 4, np.stack([other[i] for i in IDS]) == 4
    differ = 1 - (ours & theirs).sum() / (ours | theirs).sum()
    assert f'Metal          {differ:>7.2%} differ, covers {theirs.mean():>7.3%} there' in out
    for words in ([], ['from-sample', str(csv)]):  # no command, no --data
        with pytest.raises(SystemExit, match='2'):
            main(words)
    with pytest.raises(BadInput, match=r'none\.csv: cannot be read'):  # before the faults of the first
        (data.parent / 'bad.csv').write_text('')
        main(['check', str(data.parent / 'bad.csv'), '--data', str(data), '--against', 'none.csv'])
    del other['c.jpg']
    with pytest.raises(
        BadInput, match=r"other\.csv: has no row of image 'c\.jpg', which .*submission\.csv has"
    ):
        main(['check', str(csv), '--data', str(data), '--against', str(write_csv(path, other))])
    with pytest.raises(BadInput, match=r"other\.csv: has a row of image 'x\.jpg'"):
        main(
            [
                'check',
                str(csv),
                '--data',
                str(data),
                '--against',
                str(write_csv(path, masks | {'x.jpg': masks['c.jpg']})),
            ]
        )


def test_another_data_set(tmp_path):
    config = tmp_path / 'other.yaml'
    config.write_text(
        f'data_root: {write_test_json(tmp_path / "data", ["a.jpg"])}\nclasses: [Background, Road, Car]\n'
    )
    path = write_csv(tmp_path / 'a.csv', {'a.jpg': random_mask(0, 3)})
    assert main(['check', str(path), '--cfg', str(config)]) == 0
    check = ['check', str(path), '--cfg', str(config), '--set', 'seed=1']
    path.write_bytes(path.read_bytes().replace(b'\n', b'\r\n'))
    with pytest.raises(BadInput, match='to rewrite it: python ensemble.py ') as error:
        main(check)
    out, data = tmp_path / 'a_rewritten.csv', tmp_path / 'data'
    words = f'{path} --out {out} --data {data} --cfg {config} --set seed=1'
    assert str(error.value).endswith(f' ensemble.py {words}')
    write_csv(path, {'a.jpg': random_mask(0, 4)})
    with pytest.raises(BadInput, match='expected 0 to 2'):
        main(check)


# --- prediction → 256x256 ids -----------------------------------------------------------------------------


@pytest.mark.parametrize('side', [256, 512, 768])
def test_downsampling_by_hand(side):
    step = side // SIDE
    probs = np.random.default_rng(0).random((2, 4, side, side), np.float32)
    ids = probs.argmax(1)
    blocks = ids.reshape(2, SIDE, step, SIDE, step)
    mean = probs.reshape(2, 4, SIDE, step, SIDE, step).mean((3, 5))
    expected = {
        'nearest': ids[:, ::step, ::step],
        'block_max': blocks.max((2, 4)),
        'prob_mean': mean.argmax(1),
    }
    for rule, answer in expected.items():
        pred = downsample_ids(downsample_probs(torch.from_numpy(probs), rule).argmax(1), rule)
        np.testing.assert_array_equal(pred.numpy(), answer)
    if step > 1:
        assert len({answer.tobytes() for answer in expected.values()}) == 3


@pytest.mark.parametrize('size', [(512, 512), (320, 512), (600, 333), (1000, 750), (257, 255), (3024, 4032)])
def test_truth_is_the_organisers(size):
    mask = np.random.default_rng(size[0]).integers(0, 11, size, np.uint8)
    np.testing.assert_array_equal(downsample_mask(mask), resize_mask(mask, (512, 512))[::2, ::2])


def test_probabilities_are_saved_at_the_scored_size():
    probs = torch.rand(3, SIDE, SIDE).softmax(0)
    np.testing.assert_array_equal(probs_to_bytes(probs), (255 * probs).round().numpy())
    rows = probs[:, :2]  # a band of it
    np.testing.assert_array_equal(probs_to_bytes(rows), probs_to_bytes(probs)[:, :2])
    larger = probs_to_bytes(probs.repeat_interleave(4, 1).repeat_interleave(4, 2))  # blocks of 4x4
    assert larger.shape == (3, SIDE, SIDE) and larger.dtype == np.uint8
    assert np.abs(larger - 255 * probs.numpy()).mean() < np.abs(larger[::-1] - 255 * probs.numpy()).mean() / 2
    ramp, stripes = torch.arange(32.0).repeat(1, 32, 1) / 32, torch.tensor([1.0, 0, 0, 1]).repeat(1, 32, 8)
    centres = 255 * (np.arange(8) * 4 + 1.5) / 32
    assert np.abs(probs_to_bytes(ramp, 8)[0, :, 1:7] - centres[1:7]).max() <= 1
    assert np.abs(probs_to_bytes(stripes, 8)[0, :, 1:7] - 127.5).max() < 30  # not of the inner pixels alone


def test_downsampling_refuses_other_sides_and_rules():
    with pytest.raises(ValueError, match='500x500'):
        downsample_probs(torch.zeros(1, 2, 500, 500), 'nearest')
    with pytest.raises(ValueError, match='256x512'):
        downsample_probs(torch.zeros(1, 2, 256, 512), 'nearest')
    with pytest.raises(ValueError, match='bilinear'):
        downsample_probs(torch.zeros(1, 2, 256, 256), 'bilinear')


def test_set_needs_a_config_and_changes_it(tmp_path):
    arguments = Namespace(cfg=None, set=['classes=[a, b]'], data=None)
    with pytest.raises(BadInput, match='none is given; expected --cfg too'):
        competition_and_data(arguments)
    arguments.cfg = tmp_path / 'x.yaml'
    arguments.cfg.write_text('data_root: there\n')
    assert competition_and_data(arguments) == (Competition(classes=('a', 'b')), Path('there'))
    arguments.data = Path('here')
    assert competition_and_data(arguments) == (Competition(classes=('a', 'b')), Path('here'))


def test_the_metric_is_that_of_the_competition():
    assert metric_of(HOME) == Metric('miou', tuple(range(11)), 1.0, False)
    values = {'metric': 'image_dice', 'score_background': False, 'empty_score': 0.5}
    assert metric_of(Competition(**values, score_size='own')) == Metric(
        'image_dice', tuple(range(1, 11)), 0.5, False
    )
    overlapping = Competition(classes=('a', 'b'), task='multilabel', score_size='own')
    assert metric_of(overlapping) == Metric(overlapping.metric, (0, 1), 1.0, True)


def test_check_and_score_take_the_classes_of_the_data_root(tmp_path, capsys):
    write_competition(tmp_path, Competition(classes=('nothing', 'tin can')))
    write_rectangles(tmp_path / 'r', 64, 64, {'a.png': (8, 8, 30, 30, 1)})
    content = json.loads((tmp_path / 'r/train_all.json').read_text().replace('"General trash"', '"Tin Can"'))
    (tmp_path / 'labels.json').write_text(json.dumps(content))
    (tmp_path / 'test.json').write_text(json.dumps({'images': content['images']}))
    csv = write_csv(tmp_path / 's.csv', {'a.png': np.ones((256, 256), np.uint8)})
    assert submission.main(['check', str(csv), '--data', str(tmp_path)]) == 0
    assert re.search(r'nothing\s+0.000%\ntin can\s+100.000%\nok', capsys.readouterr().out)
    score = ['score', str(csv), '--labels', str(tmp_path / 'labels.json')]
    assert evaluate.command(score) == 0
    assert '0.1099' in capsys.readouterr().out  # 900 of 4,096 pixels are right: (0 + .2197) / 2
    with pytest.raises(BadInput, match="id 1 is '2'; expected 0 to 1"):
        write_csv(csv, {'a.png': np.full((256, 256), 2, np.uint8)})
        submission.main(['check', str(csv), '--data', str(tmp_path)])


def test_check_does_not_show_the_home_classes_for_another_data_set(tmp_path):
    root = tmp_path / 'r'
    write_rectangles(root, 64, 64, {'a.png': (8, 8, 30, 30, 1)})
    content = json.loads((root / 'train_all.json').read_text())
    content['categories'].append({'id': 99, 'name': 'objects'})  # unused, as Roboflow's root
    (root / 'train_all.json').write_text(json.dumps(content))
    (root / 'test.json').write_text(json.dumps({**content, 'annotations': []}))
    csv = write_csv(tmp_path / 's.csv', {'a.png': np.ones((256, 256), np.uint8)})
    check = ['check', str(csv), '--data', str(root)]
    assert submission.main(check) == 0
    other = json.dumps(content).replace('"General trash"', '"tin can"')
    (root / 'train_all.json').write_text(other)
    (root / 'test.json').write_text(json.dumps({'images': content['images']}))
    message = (
        "train_all.json: category 'tin can' is no class; python prepare.py competition --data .*, or give"
    )
    with pytest.raises(BadInput, match=message):
        submission.main(check)
    (root / 'test.json').write_text(json.dumps({**json.loads(other), 'annotations': []}))
    (root / 'train_all.json').unlink()
    with pytest.raises(BadInput, match="test.json: category 'tin can' is no class"):
        submission.main(check)
    classes = json.dumps(['Background', *(record['name'] for record in json.loads(other)['categories'][1:])])
    (tmp_path / 'mine.yaml').write_text(f'classes: {classes}')
    assert submission.main([*check, '--cfg', str(tmp_path / 'mine.yaml')]) == 0
