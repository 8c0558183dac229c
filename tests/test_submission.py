"""Submission CSVs: what is accepted, what is refused and how, and that nothing is lost on the way."""

import json
import resource
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import submission
from data.cache import resize_mask
from submission import (
    PIXELS,
    SIDE,
    SubmissionReader,
    SubmissionWriter,
    check_submission,
    classes_and_data,
    decode_mask,
    downsample_mask,
    downsample_probs,
    encode_mask,
    main,
    probs_to_bytes,
    probs_to_ids,
    read_masks,
    read_rows,
    read_test_ids,
)  # fmt: skip
from utils.errors import BadInput, Interrupted

HEADER = b'image_id,PredictionString\n'
IDS = ['batch_01/b.jpg', 'batch_01/a.jpg', 'c.jpg']


def random_mask(seed: int, num_classes: int = 11) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, num_classes, (SIDE, SIDE), np.uint8)


def write_csv(path: Path, masks: dict[str, np.ndarray]) -> Path:
    with SubmissionWriter(path) as writer:
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
    with SubmissionReader(csv) as reader:
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
    with SubmissionReader(path) as reader:
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
    with SubmissionReader(csv) as reader:
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
    with pytest.raises(error), SubmissionWriter(csv) as writer:
        writer.write('x.jpg', random_mask(9))
        raise error
    assert csv.read_bytes() == before
    assert list(csv.parent.iterdir()) == [csv]


def test_a_full_disk_is_one_line_and_leaves_what_was_there(csv):
    before = csv.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (300_000, limits[1]))
    try:
        with pytest.raises(Interrupted, match=r'submission\.csv: cannot be written'):
            write_csv(csv, {str(i): random_mask(i) for i in range(5)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
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
    'no ids': (BEGIN + b'c.jpg,\n', "'c.jpg': id 1 is empty"),
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
    'an endless line': (HEADER + b'0' * 1_000_000, 'line 2: has over 278,528 bytes'),
    'utf-16': (GOOD[:200].decode().encode('utf-16'), 'line 1: found the header'),
}  # fmt: skip


@pytest.mark.parametrize('fault', FAULTS)
def test_each_fault_has_its_line(fault, data, tmp_path):
    content, message = FAULTS[fault]
    path = tmp_path / 'faulty.csv'
    path.write_bytes(content)
    with pytest.raises(BadInput, match=message) as error:
        main(['check', str(path), '--data', str(data)])
    assert str(error.value).startswith(f'{path}: ')
    assert '\n' not in str(error.value) and len(str(error.value)) < len(str(path)) + 200


def test_no_file_and_a_folder(data, tmp_path):
    with pytest.raises(BadInput, match=r'none\.csv: cannot be read: No such file'):
        check_submission(tmp_path / 'none.csv', IDS)
    with pytest.raises(BadInput, match='cannot be read: Is a directory'):
        check_submission(tmp_path, IDS)


JSON_FAULTS = {
    'cut off': ('{"images": [{"file_na', 'not JSON, or cut off'),
    'no images': ('{"annotations": []}', "lacks the key 'images'"),
    'no file_name': ('{"images": [{"id": 1}]}', "lacks the key 'file_name'"),
    'a list': ('[]', 'expected {"images"'),
    'null': ('null', 'expected {"images"'),
    'a number': ('{"images": [{"file_name": 3}]}', r'images\[0\]: file_name is 3'),
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
        read_test_ids(tmp_path / 'elsewhere')


def run(*argv: object) -> subprocess.CompletedProcess:
    script = Path(submission.__file__)
    return subprocess.run(
        [sys.executable, script, *map(str, argv)], capture_output=True, text=True, check=False
    )


def test_the_script_ends_in_one_line_with_status_2_and_without_torch(csv, data, tmp_path):
    bad = tmp_path / 'bad.csv'
    bad.write_bytes(GOOD[:-1])
    result = run('check', bad, '--data', data)
    assert result.returncode == 2 and result.stdout == ''
    assert (
        result.stderr
        == f'submission.py: error: {bad}: line 4: does not end with a newline; the file may be cut off\n'
    )
    result = run('check')
    assert result.returncode == 2 and result.stderr.count('\n') == 1
    result = run('--help')
    assert result.returncode == 0 and 'check     check every rule' in result.stdout
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
    del other['c.jpg']
    with pytest.raises(BadInput, match=r"other\.csv: has no row of image 'c\.jpg'"):
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
    write_csv(path, {'a.jpg': random_mask(0, 4)})
    with pytest.raises(BadInput, match='expected 0 to 2'):
        main(['check', str(path), '--cfg', str(config)])


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
        pred = probs_to_ids(downsample_probs(torch.from_numpy(probs), rule), rule)
        np.testing.assert_array_equal(pred.numpy(), answer)
    if step > 1:
        assert len({answer.tobytes() for answer in expected.values()}) == 3


@pytest.mark.parametrize('size', [(512, 512), (320, 512), (600, 333), (1000, 750), (257, 255), (3024, 4032)])
def test_truth_is_the_organisers(size):
    mask = np.random.default_rng(size[0]).integers(0, 11, size, np.uint8)
    np.testing.assert_array_equal(downsample_mask(mask), resize_mask(mask, 512)[::2, ::2])


def test_probabilities_are_saved_at_the_scored_size():
    probs = torch.rand(3, SIDE, SIDE).softmax(0)
    np.testing.assert_array_equal(probs_to_bytes(probs), (255 * probs).round().numpy())
    larger = probs_to_bytes(probs.repeat_interleave(4, 1).repeat_interleave(4, 2))  # blocks of 4x4
    assert larger.shape == (3, SIDE, SIDE) and larger.dtype == np.uint8
    assert np.abs(larger - 255 * probs.numpy()).mean() < np.abs(larger[::-1] - 255 * probs.numpy()).mean() / 2


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
        classes_and_data(arguments)
    arguments.cfg = tmp_path / 'x.yaml'
    arguments.cfg.write_text('data_root: there\n')
    assert classes_and_data(arguments) == (('a', 'b'), Path('there'))
    arguments.data = Path('here')
    assert classes_and_data(arguments) == (('a', 'b'), Path('here'))
