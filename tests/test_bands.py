"""Test photos of other bands than RGB: TIFFs, arrays, alpha, grey, 16 bits, slices, limits and damage."""

import io
import struct
from pathlib import Path

import imagecodecs
import numpy as np
import pytest
from PIL import Image
from test_photos import COLOURS, DEEP, GREY, PHOTO, png16, save, tiff, write

from config import Competition, Slices
from data.bands import MAX_VALUES, OtherBands, find_slices, read_bands, volume_of
from data.photos import read_rgb
from utils.errors import BadInput

RNG = np.random.default_rng(0)
SIX = RNG.integers(0, 4000, (40, 64, 6)).astype(np.uint16)
WHOLE = {'intensity': (0, 65535), 'depth': 16}  # uint16 values as they are


def encode(values: np.ndarray, planar: bool = False, **options) -> bytes:
    """Write a TIFF with libtiff."""
    values = np.ascontiguousarray(np.moveaxis(values, 2, 0) if planar else values)
    planarconfig = 'separate' if planar else 'contig'
    extra = {} if options.get('photometric') else {'photometric': 'minisblack', 'extrasample': 0}
    options = {**extra, 'planarconfig': planarconfig, **options}
    return imagecodecs.tiff_encode(values, **options)


def tags_first(values: np.ndarray) -> bytes:
    """Write a TIFF whose pixels come last, as they do in files that are written in one go."""
    content = tiff(values, 1, [0] * (values.shape[2] - 1))
    pixels, tags = content[8 : 8 + values.nbytes], content[8 + values.nbytes :]
    count = int.from_bytes(tags[:2], 'little')
    for n in range(count):  # the lists that tags point to have moved to the front, the pixels to the end
        place = 2 + 12 * n
        tag, _, number, value = struct.unpack('<HHII', tags[place : place + 12])
        if tag == 273:
            value = 8 + len(tags)
        elif number > 1:
            value -= values.nbytes
        tags = tags[: place + 8] + struct.pack('<I', value) + tags[place + 12 :]
    return content[:4] + struct.pack('<I', 8) + tags + pixels


def npy(values: np.ndarray, **options) -> bytes:
    file = io.BytesIO()
    np.save(file, values, **options)
    return file.getvalue()


@pytest.mark.parametrize('planar', [False, True])
@pytest.mark.parametrize(
    'options',
    [
        {},
        {'bigtiff': True},
        {'compression': 'deflate'},
        {'compression': 'lzw', 'predictor': True},
        {'compression': 'zstd', 'tile': (16, 16)},
        {'compression': 'packbits', 'rowsperstrip': 7},
    ],
    ids=str,
)
def test_tiffs_of_six_bands(tmp_path, options, planar):
    path = write(tmp_path, encode(SIX, planar, **options), 'a.tif')
    assert np.array_equal(read_bands(path, Competition(channels=6, **WHOLE)), SIX)


@pytest.mark.parametrize('dtype', [np.uint8, np.int16, np.uint32, np.float32, np.float64])
@pytest.mark.parametrize('order', '<>')
def test_values_of_any_type_are_scaled_band_by_band(tmp_path, dtype, order):
    values = (SIX[..., :4] % 200).astype(dtype)
    pairs = [(0, 199), (-10, 300), (0, 400), (-1.5, 256)]
    path = write(tmp_path, tiff(values, 1, [0] * 3, order=order), 'a.tif')
    for depth, top in ((8, 255), (16, 65535)):
        found = read_bands(path, Competition(channels=4, intensity=pairs, depth=depth))
        expected = np.stack(
            [(values[..., k] - 1.0 * a) / (b - a) * top for k, (a, b) in enumerate(pairs)], axis=2
        )
        expected = values * (top / 255.0) if dtype == np.uint8 else expected  # 8 bits have their range
        assert found.dtype == (np.uint8 if depth == 8 else np.uint16)
        assert np.abs(found.astype(float) - expected).max() <= 0.51


PAGES = [Image.fromarray(SIX[..., k]) for k in range(6)]
ARRAYS = {
    'pages': save(PAGES[0], 'TIFF', save_all=True, append_images=PAGES[1:]),
    'H W N.npy': npy(SIX),
    'N H W.npy': npy(np.moveaxis(SIX, 2, 0)),
    'fortran.npy': npy(np.asfortranarray(SIX)),
    'big-endian.npy': npy(SIX.astype('>u2')),
    'int32.NPY': npy(SIX.astype(np.int32)),
}


@pytest.mark.parametrize('name', ARRAYS)
def test_pages_and_arrays_of_bands(tmp_path, name):
    path = write(tmp_path, ARRAYS[name], name)
    assert np.array_equal(read_bands(path, Competition(channels=6, **WHOLE)), SIX)
    if name == 'pages':  # previews, as GDAL adds them, are no bands
        small = [SIX[::2, ::2, :1]]
        with_preview = save(PAGES[0], 'TIFF', save_all=True, append_images=PAGES[1:])
        assert (
            read_bands(write(tmp_path, with_preview), Competition(channels=6, **WHOLE)).shape[2] == 6
            and small
        )


def test_grey(tmp_path):
    grey = Competition(channels=1)
    for content in (save(GREY[..., 0]), save(GREY), save(Image.fromarray(GREY), 'JPEG')):
        path = write(tmp_path, content)
        found = read_bands(path, grey)
        assert found.shape == (40, 64, 1) and np.array_equal(found[..., 0], read_rgb(path)[..., 0])
    with pytest.raises(
        OtherBands, match='found colours, expected grey.*write channels: 3 into competition.yaml'
    ):
        read_bands(write(tmp_path, save(PHOTO)), grey)
    deep = write(tmp_path, save(Image.fromarray(DEEP[..., 0])))
    assert np.array_equal(read_bands(deep, Competition(channels=1, **WHOLE)), DEEP[..., :1])
    scaled = read_bands(deep, Competition(channels=1, intensity=(500, 3050)))
    assert np.array_equal(scaled, read_rgb(deep, intensity=(500, 3050))[..., :1])
    array = write(tmp_path, npy(GREY[..., 0]), 'a.npy')
    assert np.array_equal(read_bands(array, grey), GREY[..., :1])
    assert np.array_equal(read_bands(array, Competition()), GREY)


def test_rgb_of_16_bits_keeps_its_precision(tmp_path):
    path = write(tmp_path, png16(DEEP, 2))
    assert np.array_equal(read_bands(path, Competition(**WHOLE)), DEEP)
    assert np.array_equal(
        read_bands(write(tmp_path, save(PHOTO)), Competition(depth=16)), COLOURS.astype(int) * 257
    )
    competition = Competition(intensity=(500, 3050))
    assert np.array_equal(read_bands(path, competition), COLOURS)
    assert np.array_equal(read_bands(path, competition), read_rgb(path, intensity=(500, 3050)))


def test_alpha_is_a_band_if_there_are_so_many(tmp_path):
    four = np.dstack([COLOURS, COLOURS[..., 1]])
    assert np.array_equal(read_bands(write(tmp_path, save(four)), Competition(channels=4)), four)
    deep = four.astype(np.uint16) * 100
    assert np.array_equal(read_bands(write(tmp_path, png16(deep, 6)), Competition(channels=4, **WHOLE)), deep)
    two = four[..., [0, 3]]
    assert np.array_equal(read_bands(write(tmp_path, save(two)), Competition(channels=2)), two)
    turned = read_bands(write(tmp_path, save(four, 'PNG', 6)), Competition(channels=4))
    assert np.array_equal(turned, np.rot90(four, -1))


OBJECTS = npy(np.array([{}, []], object), allow_pickle=True)
HUGE = npy(np.zeros((2, 2, 6), np.uint8)).replace(b'(2, 2, 6), }', b'(30000, 30000, 6), }')


@pytest.mark.parametrize(
    ('name', 'content', 'channels', 'message'),
    [
        ('a.tif', encode(SIX), 3, 'found 6 bands, expected three.* or write channels: 6 into'),
        ('a.tif', encode(SIX), 4, 'found 6 bands, expected 4; write channels: 6 into competition.yaml'),
        ('a.tif', encode(SIX), 1, 'write channels: 6 into'),
        ('a.npy', npy(SIX), 3, 'found 6 bands, expected 3; write channels: 6 into competition.yaml'),
        ('a.png', save(PHOTO), 6, 'found 3 bands, expected 6; write channels: 3'),
        ('a.png', save(np.dstack([COLOURS, COLOURS])[..., :4]), 6, 'found 4 bands'),
        ('a.npy', npy(GREY[..., 0]), 4, 'found 1 band, expected 4'),
        ('a.npy', npy(np.zeros((6, 40, 6))), 6, 'whose first and last axis are both 6 long'),
        ('a.npy', npy(np.zeros((1, 40, 64, 6))), 6, r'found an array \(1, 40, 64, 6\) of float64, expected'),
        ('a.npy', npy(SIX > 9), 6, 'of bool, expected'),
        ('a.npy', npy(np.zeros((0, 3, 6))), 6, 'expected'),
        ('a.npy', OBJECTS, 6, 'of object, expected'),
        ('a.npy', HUGE, 6, 'found 30000x30000 pixels, expected at most 20,000 a side'),
        ('a.npy', HUGE.replace(b'30000, 30000', b'10000, 10000'), 6, 'expected at most 402 million'),
        ('a.npy', npy(SIX)[:-9], 6, 'is cut off: found 15,355 values, expected 15,360'),
        ('a.npy', npy(SIX)[:70], 6, 'cannot be read as a NumPy array'),
        ('a.npy', save(PHOTO), 6, 'cannot be read as a NumPy array'),
        ('a.npy', npy(SIX.astype(np.float32) * np.nan), 6, 'values that are NaN or infinite'),
        ('a.tif', tags_first(SIX)[:-9], 6, 'cannot be decoded: image file is truncated'),
        ('a.tif', encode(COLOURS, photometric='rgb', compression='jpeg'), 6, 'found the compression 7'),
        ('a.tif', encode(SIX[..., :4] > 9, planar=True), 4, 'expected values of 8, 16 or 32 bits'),
        ('a.tif', tiff(SIX, photometric=5, extra=[0, 0]), 6, 'found the photometric interpretation 5'),
    ],
)  # fmt: skip
def test_photos_of_other_bands_are_refused(tmp_path, name, content, channels, message):
    path = write(tmp_path, content, name)
    with pytest.raises(BadInput, match=message) as error:
        read_bands(path, Competition(channels=channels, **WHOLE))
    assert str(error.value).startswith(f'{path}: ') and '\n' not in str(error.value)


def test_ranges_and_bits(tmp_path):
    path = write(tmp_path, encode(SIX), 'a.tif')
    with pytest.raises(
        BadInput, match=r'found 6 bands of 16-bit of 0 to 3999, .* set intensity: \[low, high\]'
    ):
        read_bands(path, Competition(channels=6))
    pairs = [(0, 4000)] * 5 + [(0, 2000)]
    with pytest.raises(BadInput, match='of 1 to 3998 in band 6, outside intensity, 0 to 2000'):
        read_bands(path, Competition(channels=6, intensity=pairs))
    clipped = read_bands(path, Competition(channels=6, intensity=pairs), lenient=True)
    assert (clipped[..., 5] == np.minimum(np.round(SIX[..., 5] * np.float32(255 / 2000)), 255)).all()


def test_cut_off_tiff_is_read_as_far_as_it_goes_if_lenient(tmp_path, caplog):
    path = write(tmp_path, tags_first(SIX)[: -SIX.nbytes // 2], 'a.tif')
    found = read_bands(path, Competition(channels=6, **WHOLE), lenient=True)
    assert np.array_equal(found[:19], SIX[:19]) and not found[21:].any()
    assert 'is cut off' in caplog.text


@pytest.mark.filterwarnings('ignore')
def test_damaged_files_end_in_one_line(tmp_path):
    """Change and cut bytes, most of them in tags and headers."""
    rng, refused = np.random.default_rng(0), 0
    photos = [
        ('a.tif', encode(SIX, planar, **more)) for planar in (0, 1) for more in ({}, {'compression': 'lzw'})
    ]
    photos += [('a.npy', npy(SIX)), ('a.tif', ARRAYS['pages'])]
    for n in range(300):
        name, content = photos[n % len(photos)][0], bytearray(photos[n % len(photos)][1])
        for place in rng.integers(0, 400 if n % 3 else len(content), rng.integers(1, 9)):
            content[place] = rng.integers(256)
        if n % 5 == 0:
            content = content[: rng.integers(len(content))]
        path = write(tmp_path, bytes(content), name)
        try:
            found = read_bands(path, Competition(channels=6, **WHOLE), lenient=n % 2 == 0)
            assert found.shape[2] == 6
        except BadInput as error:
            refused += 1
            assert str(error).startswith(str(path)) and '\n' not in str(error)
    assert 100 < refused < 300


def test_largest_photo_is_no_larger_than_in_rgb(tmp_path):
    content = bytearray(tiff(SIX.astype(np.uint8), 1, [0] * 5))
    for tag, value in ((256, 20_000), (257, 6_000)):
        place = content.index(tag.to_bytes(2, 'little') + (4).to_bytes(2, 'little'))
        content[place + 8 : place + 12] = value.to_bytes(4, 'little')
    with pytest.raises(BadInput, match=f'{MAX_VALUES // 10**6} million values'):
        read_bands(write(tmp_path, bytes(content), 'a.tif'), Competition(channels=6, **WHOLE), lenient=True)


# --- slices -------------------------------------------------------------------------------------------------


def write_slices(folder: Path, numbers, form: str = 's_{:03d}.png') -> dict[int, Path]:
    folder.mkdir(parents=True, exist_ok=True)
    paths = {n: folder / form.format(n) for n in numbers}
    for n, path in paths.items():
        Image.new('L', (8, 8), n).save(path)
    return paths


@pytest.mark.parametrize(
    ('number', 'offsets', 'expected'),
    [
        (5, (-1, 0, 1), [4, 5, 6]),
        (4, (-1, 0, 1), [4, 4, 5]),
        (6, (0, 1, 2), [6, 6, 6]),
        (9, (-2, 0, 1, 3), [9, 9, 10, 10]),
        (10, (-1, 5), [9, 10]),
        (6, (-3, -2, 2), [4, 4, 6]),
    ],
)
@pytest.mark.parametrize('form', ['s_{:03d}.png', 's_{}.png'])
def test_slices_are_neighbours_by_number(tmp_path, number, offsets, expected, form):
    paths = write_slices(tmp_path / 'v', (4, 5, 6, 9, 10), form)
    slices = Slices(offsets=offsets)
    assert find_slices(paths[number], tmp_path, slices) == [paths[n] for n in expected]
    competition = Competition(channels=len(offsets), slices=slices)
    found = read_bands(paths[number], competition, (8, 8), root=tmp_path)
    assert found.shape == (8, 8, len(offsets)) and found[3, 3].tolist() == expected
    assert np.array_equal(read_bands(paths[number], competition), found)


def test_slices_of_several_bands_and_of_other_patterns(tmp_path):
    for day in (1, 2):
        (tmp_path / f'day{day}').mkdir()
        Image.fromarray(COLOURS + np.uint8(day)).save(tmp_path / f'day{day}/a.png')
    slices = Slices(pattern=r'day(\d+)', offsets=(0, 1))
    found = read_bands(tmp_path / 'day1/a.png', Competition(channels=6, slices=slices), root=tmp_path)
    assert np.array_equal(found, np.dstack([COLOURS + np.uint8(1), COLOURS + np.uint8(2)]))
    assert (
        volume_of('day1/a.png', slices) == volume_of('day22/a.png', slices) != volume_of('day1/b.png', slices)
    )
    with pytest.raises(BadInput, match=r'finds no number in the last parenthesis in the file name .a\.png.'):
        read_bands(tmp_path / 'day1/a.png', Competition(channels=6, slices=slices))
    paths = write_slices(tmp_path, (1, 2))
    Image.new('L', (8, 9)).save(paths[2])
    with pytest.raises(BadInput, match='found slices of different sizes, s_001.png 8x8, s_002.png 9x8'):
        read_bands(paths[1], Competition(channels=3, slices=Slices()))


@pytest.mark.parametrize(
    ('values', 'message'),
    [
        ({'channels': 4, 'slices': {}}, 'found 4, expected a multiple of the 3 offsets'),
        ({'channels': 6, 'intensity': [(0, 1)] * 2}, 'found 2 pairs, expected one, or 6, one a band'),
        ({'channels': 2, 'intensity': [(0, 1), (3, 2)]}, 'the first must be below the second'),
        ({'slices': {'pattern': 'x+'}}, 'has no parenthesis'),
        ({'slices': {'pattern': '('}}, 'not a regular expression'),
        ({'channels': 0}, 'channels'),
        ({'channels': 256}, 'channels'),
        ({'depth': 12}, 'depth'),
    ],
)
def test_keys_that_do_not_fit_together(values, message):
    with pytest.raises(ValueError, match=message):
        Competition(**values)
