"""Test the reader of photos: kinds of pixels, EXIF, limits, formats, and damaged files of each format."""

import io
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
import pytest
from conftest import write_set
from PIL import ExifTags, Image, ImageCms, ImageOps

from config import HOME
from data.coco import read_coco, read_photo
from data.photos import (
    FORMATS,
    copy_upright,
    decode,
    likely_range,
    measure,
    measure_bands,
    open_photo,
    read_rgb,
    read_stored,
    turn,
)
from utils.errors import BadInput

Y, X = np.mgrid[0:40, 0:64]
COLOURS = np.stack([X * 4, Y * 6, 255 - X * 3], axis=-1).clip(0, 255).astype(np.uint8)
DEEP = COLOURS.astype(np.uint16) * 10 + 500  # as of a camera of 12 bits
RANGE = (500, 3050)  # of which COLOURS are the scaled DEEP
GREY = COLOURS[..., :1].repeat(3, axis=2)
NOISE = np.random.default_rng(0).integers(0, 256, (64, 96, 3), np.uint8)


def save(pixels, kind: str = 'PNG', turned: int | None = None, **options) -> bytes:
    """Save an array or an image, with an EXIF orientation if given."""
    file = io.BytesIO()
    image = pixels.copy() if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    if turned is not None:
        options['exif'] = Image.Exif()
        options['exif'][ExifTags.Base.Orientation] = turned
    image.save(file, kind, **options)
    return file.getvalue()


def tiff(pixels, photometric: int = 2, extra=(), turned: int = 1, order: str = '<', planes: bool = False):
    """Write a TIFF of any type and number of bands, which Pillow cannot."""
    bands = np.atleast_3d(pixels)
    height, width, count = bands.shape
    bands = np.moveaxis(bands, 2, 0) if planes else bands
    content = bands.astype(bands.dtype.newbyteorder(order)).tobytes()
    strips = count if planes else 1
    length = len(content) // strips
    tags = [
        (256, [width]), (257, [height]), (258, [bands.itemsize * 8] * count), (259, [1]),
        (262, [photometric]),
        (273, [8 + length * k for k in range(strips)]), (274, [turned]), (277, [count]), (278, [height]),
        (279, [length] * strips), (284, [2 if planes else 1]), (338, list(extra)),
        (339, ['-uif'.index(bands.dtype.kind)] * count),
    ]  # fmt: skip
    tags = [(tag, struct.pack(f'{order}{len(v)}I', *v), len(v)) for tag, v in tags if v]
    start = 8 + len(content) + 2 + 12 * len(tags) + 4
    entries, values = b'', b''
    for tag, value, number in tags:
        place = value if number == 1 else struct.pack(f'{order}I', start + len(values))
        entries += struct.pack(f'{order}HHI', tag, 4, number) + place
        values += value if number > 1 else b''
    head = {'<': b'II', '>': b'MM'}[order] + struct.pack(f'{order}HI', 42, 8 + len(content))
    return head + content + struct.pack(f'{order}H', len(tags)) + entries + bytes(4) + values


@pytest.mark.filterwarnings('error')
def test_large_photo_is_read_without_a_warning(tmp_path):
    Image.new('1', (10_000, 10_000)).save(tmp_path / 'a.png')
    with open_photo(tmp_path / 'a.png') as photo:
        assert photo.size == (10_000, 10_000)


def png16(pixels, colour: int, transparent=()) -> bytes:
    """Write a PNG of 16 bits of any colour type, with a transparent colour if given."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return (
            struct.pack('>I', len(content)) + kind + content + struct.pack('>I', zlib.crc32(kind + content))
        )

    rows = b''.join(b'\0' + row.astype('>u2').tobytes() for row in pixels)
    head = chunk(b'IHDR', struct.pack('>IIBBBBB', pixels.shape[1], pixels.shape[0], 16, colour, 0, 0, 0))
    key = chunk(b'tRNS', struct.pack(f'>{len(transparent)}H', *transparent)) if transparent else b''
    return b'\x89PNG\r\n\x1a\n' + head + key + chunk(b'IDAT', zlib.compress(rows)) + chunk(b'IEND', b'')


def write(folder: Path, content: bytes, name: str = 'photo') -> Path:
    path = folder / name
    path.write_bytes(content)
    return path


def assert_close(found: np.ndarray, expected: np.ndarray, tolerance: int) -> None:
    assert found.shape == expected.shape and found.dtype == np.uint8
    assert np.abs(found.astype(int) - expected).max() <= tolerance


def on_white(opacity: np.ndarray, pixels: np.ndarray = COLOURS) -> np.ndarray:
    """Composite pixels on white by their (H, W) opacity from 0 to 255."""
    return 255 - (255.0 - pixels) * opacity[..., None] / 255


ALPHA = (X * 4).astype(np.uint8)
LEFT = np.where(X < 32, 0, 255).astype(np.uint8)
PHOTO = Image.fromarray(COLOURS)
PALETTE = PHOTO.quantize(128)
ONE_BIT = Image.fromarray(COLOURS[..., 0] > 99)
LAB = [ImageCms.createProfile(name) for name in ('sRGB', 'LAB')]
GREYS = Image.fromarray(GREY)
KINDS_OF_8_BITS = {  # content, what is shown, tolerance, kind
    'grey jpeg': (save(GREYS.convert('L'), 'JPEG'), GREY, 4, 'grey'),
    'grey with alpha': (save(np.dstack([GREY[..., 0], ALPHA])), on_white(ALPHA, GREY), 1, 'grey with alpha'),
    'palette': (save(PALETTE), np.asarray(PALETTE.convert('RGB')), 0, 'palette'),
    'transparent palette': (
        save(PALETTE, transparency=bytes(range(128))),
        on_white(np.asarray(PALETTE), np.asarray(PALETTE.convert('RGB'))),
        1,
        'palette with transparency',
    ),
    'rgba': (save(np.dstack([COLOURS, ALPHA])), on_white(ALPHA), 1, 'RGBA'),
    'rgba webp': (save(np.dstack([COLOURS, LEFT]), 'WEBP', lossless=True), on_white(LEFT), 0, 'RGBA'),
    'rgba tiff': (tiff(np.dstack([COLOURS, ALPHA]), extra=[2]), on_white(ALPHA), 1, 'RGBA'),
    'transparent colour': (
        save(PHOTO, transparency=tuple(int(v) for v in COLOURS[0, 0])),
        on_white(np.where((COLOURS[0, 0] == COLOURS).all(-1), 0, 255)),
        0,
        'RGB with transparency',
    ),
    'cmyk jpeg': (save(PHOTO.convert('CMYK'), 'JPEG', quality=98), COLOURS, 8, 'CMYK'),
    'cmyk tiff': (save(PHOTO.convert('CMYK'), 'TIFF'), COLOURS, 1, 'CMYK'),
    'lab tiff': (save(ImageCms.profileToProfile(GREYS, *LAB, outputMode='LAB'), 'TIFF'), GREY, 3, 'LAB'),
    'ycbcr tiff': (save(PHOTO.convert('YCbCr'), 'TIFF'), COLOURS, 3, 'YCbCr'),
    'one bit': (save(ONE_BIT), np.asarray(ONE_BIT.convert('RGB')), 0, '1-bit'),
    'one bit tiff, 0 is white': (
        save(ONE_BIT, 'TIFF', tiffinfo={262: 0}),
        np.asarray(ONE_BIT.convert('RGB')),
        0,
        '1-bit',
    ),
    'grey tiff, 0 is white': (tiff(255 - GREY[..., 0], photometric=0), GREY, 0, 'grey'),
    'big-endian tiff': (tiff(COLOURS, order='>'), COLOURS, 0, 'RGB'),
    'tiff in planes': (tiff(COLOURS, planes=True), COLOURS, 0, 'RGB'),
    'bmp': (save(PHOTO, 'BMP'), COLOURS, 0, 'RGB'),
    'png with a profile': (save(PHOTO, icc_profile=b'x' * 200), COLOURS, 0, 'RGB'),
    'mpo of a phone': (save(PHOTO, 'MPO', save_all=True, append_images=[GREYS.copy()]), COLOURS, 12, 'RGB'),
    'one pixel': (save(COLOURS[:1, :1]), COLOURS[:1, :1], 0, 'RGB'),
}


@pytest.mark.parametrize('name', KINDS_OF_8_BITS)
def test_photos_of_8_bits_are_shown_in_rgb(tmp_path, name):
    content, shown, tolerance, kind = KINDS_OF_8_BITS[name]
    path = write(tmp_path, content)
    assert_close(read_rgb(path, intensity=(0, 1)), shown, tolerance)
    photo = read_stored(path)
    assert photo.kind == kind and not photo.is_deep and photo.upright_size == shown.shape[:2]


def test_pixels_of_a_jpeg_are_pillows(tmp_path):
    path = write(tmp_path, save(NOISE, 'JPEG'))
    assert np.array_equal(read_rgb(path), np.asarray(Image.open(path)))


FLOATS = DEEP.astype(np.float32) / 4095
DEEP_GREY = DEEP[..., 0]
DEEP_ALPHA = np.dstack([DEEP, ALPHA.astype(np.uint16) * 257])
KINDS_OF_MORE_BITS = {  # content, what is shown, intensity, kind
    'grey png': (save(DEEP_GREY), GREY, RANGE, '16-bit grey'),
    'rgb png': (png16(DEEP, 2), COLOURS, RANGE, '16-bit RGB'),
    'rgba png': (png16(DEEP_ALPHA, 6), on_white(ALPHA), RANGE, '16-bit RGBA'),
    'grey png with alpha': (
        png16(DEEP_ALPHA[..., [0, 3]], 4),
        on_white(ALPHA, GREY),
        RANGE,
        '16-bit grey with alpha',
    ),
    'grey png, transparent': (
        png16(DEEP_GREY, 0, [500]),
        on_white(np.where(X, 255, 0), GREY),
        RANGE,
        '16-bit grey',
    ),
    'rgb png, transparent': (
        png16(DEEP, 2, [int(v) for v in DEEP[0, 0]]),
        on_white(np.where((DEEP[0, 0] == DEEP).all(-1), 0, 255)),
        RANGE,
        '16-bit RGB',
    ),
    'rgba tiff': (tiff(DEEP_ALPHA, extra=[2]), on_white(ALPHA), RANGE, '16-bit RGBA'),
    'grey tiff, 0 is white': (tiff(3550 - DEEP_GREY, photometric=0), GREY, RANGE, '16-bit grey'),
    'compressed tiff': (cv2.imencode('.tif', DEEP[..., ::-1])[1].tobytes(), COLOURS, RANGE, '16-bit RGB'),
} | {
    f'{order} {np.dtype(kind)} {"rgb" if pixels.ndim == 3 else "grey"} tiff': (
        tiff(pixels.astype(kind), 2 if pixels.ndim == 3 else 1, order=order),
        COLOURS if pixels.ndim == 3 else GREY,
        RANGE,
        f'{np.dtype(kind).itemsize * 8}-bit {"float " if kind in (np.float32, np.float64) else ""}'
        f'{"RGB" if pixels.ndim == 3 else "grey"}',
    )
    for order in '<>'
    for kind in (np.uint16, np.int16, np.uint32, np.int32, np.float32, np.float64)
    for pixels in (DEEP, DEEP_GREY)
}


@pytest.mark.parametrize('name', KINDS_OF_MORE_BITS)
def test_photos_of_more_bits_are_scaled_from_intensity(tmp_path, name):
    content, shown, intensity, kind = KINDS_OF_MORE_BITS[name]
    path = write(tmp_path, content)
    assert_close(read_rgb(path, intensity=intensity), shown, 1)
    photo = read_stored(path)
    assert photo.kind == kind
    low, high = measure(photo, path)
    found = f'found {kind} of {low:g} to {high:g}'
    with pytest.raises(BadInput, match=f'{found}, expected 8 bits .* set intensity'):
        read_rgb(path)
    with pytest.raises(BadInput, match=f'{found}, outside intensity, {low:g} to 1500 of competition.yaml'):
        read_rgb(path, intensity=(low, 1500))


def test_all_digits_of_a_range_are_shown(tmp_path):
    values = np.array([[3_535_000_001, 7]], np.uint32)
    for pixels, shown in ((values, '7 to 3535000001'), (np.float32([[0.1, 1]]), '0.10000000149011612 to 1')):
        with pytest.raises(BadInput, match=f'of {shown}, expected 8 bits'):
            read_rgb(write(tmp_path, tiff(pixels, photometric=1)))


def test_12_bits_in_12(tmp_path):
    """The values of packed pixels are those of the camera, not filled up to 16 bits."""
    flat = DEEP_GREY.ravel().astype(np.uint32)
    packed = np.stack([flat[::2] >> 4, (flat[::2] << 4 | flat[1::2] >> 8) & 255, flat[1::2] & 255], axis=1)
    content = tiff(packed.astype(np.uint8).reshape(len(DEEP_GREY), -1), photometric=1)
    for tag, old, new in ((256, 96, 64), (258, 8, 12)):
        content = content.replace(struct.pack('<HHII', tag, 4, 1, old), struct.pack('<HHII', tag, 4, 1, new))
    path = write(tmp_path, content)
    assert measure(read_stored(path), path) == (DEEP_GREY.min(), DEEP_GREY.max())
    assert_close(read_rgb(path, intensity=RANGE), GREY, 1)


def test_values_outside_are_clipped_in_test_photos(tmp_path, caplog):
    path = write(tmp_path, save(DEEP_GREY))
    for _ in range(2):
        assert_close(read_rgb(path, intensity=(500, 1775), lenient=True), np.minimum(GREY * 2.0, 255), 1)
    assert [r.message for r in caplog.records] == [
        f'warning: {path}: found 16-bit grey of 500 to 3020, outside intensity, 500 to 1775: '
        'the values outside are clipped'
    ]


@pytest.mark.parametrize('value', [np.nan, np.inf])
def test_values_that_are_no_numbers(tmp_path, value):
    path = write(tmp_path, tiff(np.where(X == 3, value, FLOATS[..., 0]).astype(np.float32), photometric=1))
    for read in (likely_range, lambda path: read_rgb(path, intensity=(0, 1), lenient=True)):
        with pytest.raises(BadInput, match='found 40 values that are NaN or infinite'):
            read(path)


@pytest.mark.parametrize('value', [-9999, -3.4028235e38])
def test_values_that_mark_missing_ones(tmp_path, value):
    """A range from there on would leave no contrast."""
    path = write(tmp_path, tiff(np.where(X == 3, value, FLOATS[..., 0]).astype(np.float32), photometric=1))
    photo = read_stored(path)
    with pytest.raises(
        BadInput, match='found 40 values of .*, which marks missing ones; write a value there'
    ):
        measure_bands(photo, path)
    assert measure_bands(photo, path, lenient=True)[0][0] < -9000


def bands(count: int, kind: type = np.uint8) -> np.ndarray:
    return np.concatenate([DEEP, DEEP], axis=2)[..., :count].astype(kind)


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (tiff(bands(4), extra=[0]), 'found 4 bands, expected three'),
        (tiff(bands(4)), 'found 4 bands, expected three'),
        (tiff(bands(4, np.uint16), extra=[0]), 'found 4 bands'),
        (tiff(bands(4, np.float32), extra=[0]), 'found 4 bands'),
        (tiff(bands(5), extra=[2, 0]), 'found 5 bands'),
        (tiff(bands(5), extra=[0, 0], planes=True), 'found 5 bands'),
        (tiff(bands(5, np.uint16), 1, [0] * 4), 'found 5 bands'),
        (tiff(bands(2), 1, [0]), 'found 2 bands'),
        (tiff(bands(2, np.uint16), 1, [0]), 'found 2 bands'),
        (tiff(bands(3), 1, [0, 0]), 'found 3 bands that are not marked as RGB'),
        (tiff(DEEP, planes=True), 'found 16-bit RGB in separate planes .* expected'),
        (tiff(DEEP.astype(np.float16)), 'found 16-bit float RGB'),
        (save(PHOTO, 'TIFF', save_all=True, append_images=[GREYS.copy()] * 2), 'found 3 pages, expected'),
        (save(PHOTO, save_all=True, append_images=[GREYS.copy()]), 'found 2 frames, expected a photo of one'),
        (save(PHOTO, 'WEBP', save_all=True, append_images=[GREYS.copy()]), 'found 2 frames'),
        (save(PHOTO, 'TIFF', tiffinfo={254: 1}), 'found a small preview first, as in raw photos'),
        (b'\0\0\0\x18ftypheic' + bytes(50), 'found HEIC, expected an image: .*; convert HEIC to JPEG'),
        (save(PHOTO, 'GIF'), 'found GIF, expected an image: BMP.*; convert GIF to JPEG'),
        (save(PHOTO, 'JPEG2000'), 'found JPEG 2000, expected'),
        (b'\n<html>404</html>', 'seems to be a web page, expected an image: .*; download it again'),
        (b'hello, hello', 'cannot be decoded, expected an image: BMP'),
        (tiff(DEEP)[:99], 'cannot be decoded: its tags are cut off'),
        (b'', 'is empty, expected an image: BMP'),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings('ignore:Corrupt EXIF')
def test_photos_that_are_refused(tmp_path, content, message):
    path = write(tmp_path, content)
    for lenient in (False, True):
        with pytest.raises(BadInput, match=message) as error:
            read_rgb(path, intensity=(0, 1e5), lenient=lenient)
        assert str(error.value).startswith(f'{path}: ') and '\n' not in str(error.value)
    with pytest.raises(BadInput, match=message):
        read_stored(path)


# --- EXIF ---------------------------------------------------------------------------------------------------


TURNED = {
    'jpeg': lambda turned: save(PHOTO, 'JPEG', turned, quality=98),
    'png': lambda turned: save(PHOTO, 'PNG', turned),
    'webp': lambda turned: save(PHOTO, 'WEBP', turned, lossless=True),
    'tiff': lambda turned: save(PHOTO, 'TIFF', turned),
    '16-bit png': lambda turned: cv2_with_exif(turned),
    '16-bit tiff': lambda turned: tiff(DEEP, turned=turned),
    'float tiff': lambda turned: tiff(DEEP.astype(np.float32), turned=turned),
}


def cv2_with_exif(turned: int) -> bytes:
    """Put the eXIf chunk of another PNG before the pixels of one of 16 bits."""
    other, content = save(PHOTO, 'PNG', turned), png16(DEEP, 2)
    start = other.index(b'eXIf') - 4
    exif = other[start : start + 12 + int.from_bytes(other[start : start + 4])]
    place = content.index(b'IDAT') - 4
    return content[:place] + exif + content[place:]


@pytest.mark.parametrize('turned', range(1, 9))
@pytest.mark.parametrize('mode', ['L', 'P', 'CMYK'])
def test_uncompressed_tiffs_of_one_strip_are_turned_whole(tmp_path, mode, turned):
    image = PHOTO.convert(mode)
    path = write(tmp_path, save(image, 'TIFF', tiffinfo={ExifTags.Base.Orientation: turned}))
    assert np.array_equal(read_rgb(path, (40, 64), 'stored'), np.asarray(image.convert('RGB')))
    image.getexif()[ExifTags.Base.Orientation] = turned
    assert np.array_equal(read_rgb(path), np.asarray(ImageOps.exif_transpose(image).convert('RGB')))


@pytest.mark.parametrize('kind', TURNED)
@pytest.mark.parametrize('turned', [*range(1, 9), 0, 9])
def test_exif_turns_photos_unless_they_are_read_as_stored(tmp_path, kind, turned):
    path = write(tmp_path, TURNED[kind](turned))
    image = Image.fromarray(COLOURS)
    image.getexif()[ExifTags.Base.Orientation] = turned
    upright = np.asarray(ImageOps.exif_transpose(image))
    assert_close(read_rgb(path, upright.shape[:2], intensity=RANGE), upright, 8)
    assert_close(read_rgb(path, (40, 64), 'stored', RANGE), COLOURS, 8)
    photo = read_stored(path)
    assert photo.upright_size == upright.shape[:2] and photo.size == (40, 64)
    assert photo.orientation == (turned if 1 <= turned <= 8 else 1)


def test_size_of_the_other_orientation_is_named(tmp_path):
    path = write(tmp_path, save(PHOTO, 'JPEG', 6))
    for orientation, expected, message in (
        (
            'displayed',
            (40, 64),
            '64x40 pixels as displayed, its record says 40x64, which is its size as stored',
        ),
        ('stored', (64, 40), '40x64 pixels as stored, its record says 64x40, which is its size as displayed'),
        ('stored', (64, 41), '40x64 pixels, its record says 64x41'),
    ):
        with pytest.raises(BadInput) as error:
            read_rgb(path, expected, orientation)
        other = {'displayed': 'stored', 'stored': 'displayed'}[orientation]
        advice = (
            f'; set orientation: {other} in competition.yaml'
            if 'as ' in message
            else '; take the photo as it was labelled, no resized or turned copy, or correct the record'
        )
        assert str(error.value) == f'{path}: found {message}{advice}'


@pytest.mark.filterwarnings('ignore')  # Pillow's own, of damaged EXIF data
def test_exif_of_a_wrong_type_or_damaged(tmp_path):
    content = save(PHOTO, 'JPEG', 6, quality=98)
    entry = (
        content.index(b'\x01\x12\0\x03') if b'\x01\x12\0\x03' in content else content.index(b'\x12\x01\x03\0')
    )
    for change in (b'\x12\x01\x02\0', b'\x12\x01\x05\0', b'\xff' * 4):
        path = write(tmp_path, content[:entry] + change + content[entry + 4 :])
        assert_close(read_rgb(path), COLOURS, 8)
    path = write(
        tmp_path, content.replace(b'Exif\0\0MM', b'Exif\0\0XX').replace(b'Exif\0\0II', b'Exif\0\0XX')
    )
    assert_close(read_rgb(path), COLOURS, 8)


# --- cut-off photos -----------------------------------------------------------------------------------------


CUT = {
    'jpeg': save(NOISE, 'JPEG'),
    'progressive jpeg': save(NOISE, 'JPEG', progressive=True),
    'cmyk jpeg': save(Image.fromarray(NOISE).convert('CMYK'), 'JPEG'),
    'png': save(NOISE),
    'palette png': save(Image.fromarray(NOISE).quantize(255)),
    '16-bit png': png16(NOISE.astype(np.uint16) * 10 + 500, 2),
    'tiff': save(NOISE, 'TIFF'),
}


@pytest.mark.parametrize('kind', CUT)
def test_cut_off_photos_are_decoded_as_far_as_they_go_if_lenient(tmp_path, caplog, kind):
    content = CUT[kind]
    whole = read_rgb(write(tmp_path, content), intensity=RANGE)
    path = write(tmp_path, content[: len(content) // 2], 'half')
    assert read_stored(path, lenient=True).fault and not read_stored(tmp_path / 'photo', lenient=True).fault
    with pytest.raises(BadInput, match='cannot be decoded: image file is truncated'):
        read_rgb(path, intensity=RANGE)
    assert not caplog.records
    for _ in range(2):
        part = (
            read_rgb(path, intensity=RANGE, lenient=True)
            if '16' not in kind
            else read_rgb(path, intensity=(0, 3050), lenient=True)
        )  # the missing values are 0
    assert part.shape == whole.shape
    if kind != 'progressive jpeg' and '16' not in kind:
        assert np.array_equal(part[:15], whole[:15])
    lines = [r.message for r in caplog.records]
    assert len(lines) == 1 and lines[0].startswith(f'warning: {path}: is cut off (image file is truncated')
    assert lines[0].endswith('): predicted from what decodes')


@pytest.mark.parametrize('kind', [kind for kind in CUT if 'jpeg' in kind])
def test_all_rows_of_a_jpeg_without_its_end_marker(tmp_path, kind):
    whole = read_rgb(write(tmp_path, CUT[kind]))
    path = write(tmp_path, CUT[kind][:-2], 'cut')
    assert_close(read_rgb(path, lenient=True), whole, 1)
    with pytest.raises(BadInput, match='truncated'):
        read_rgb(path)


def test_photos_of_which_nothing_decodes(tmp_path):
    content = CUT['jpeg']
    start = content.index(b'\xff\xda') + 14  # after the header of the scan
    for part in (content[:start], content[:100], CUT['png'][:60], save(NOISE, 'WEBP')[:500]):
        with pytest.raises(BadInput, match='cannot be decoded'):
            read_rgb(write(tmp_path, part), lenient=True)


def test_strict_threads_refuse_while_lenient_ones_read(tmp_path):
    path = write(tmp_path, CUT['jpeg'][:2000])

    def read(n: int) -> bool:
        try:
            return read_rgb(path, lenient=n % 2 == 0).shape == NOISE.shape
        except BadInput:
            return n % 2 == 1

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(read, range(200)))


# --- copies -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ('content', 'same', 'tolerance'),
    [
        (save(PHOTO, 'JPEG'), True, 12),
        (save(PHOTO, 'JPEG', 1), True, 12),
        (save(PHOTO, 'JPEG', 6), False, 15),
        (save(PHOTO, 'PNG', 8), False, 0),
        (save(PHOTO, 'TIFF', 3), False, 0),
        (save(PHOTO, 'WEBP', 5, lossless=True), False, 0),
        (png16(DEEP, 2), False, 0),
        (tiff(DEEP, turned=7), False, 0),
        (save(np.dstack([COLOURS, 255 + 0 * ALPHA])), False, 0),
        (save(PHOTO.convert('CMYK'), 'JPEG', quality=98), False, 15),
    ],
)
def test_copies_are_upright_rgb(tmp_path, content, same, tolerance):
    source, target = write(tmp_path, content), tmp_path / 'copy/photo'
    copy_upright(source, target, RANGE)
    assert (target.read_bytes() == content) is same
    with Image.open(target) as image:
        assert image.mode == 'RGB' and image.getexif().get(ExifTags.Base.Orientation, 1) == 1
    assert_close(read_rgb(target), turn(COLOURS, read_stored(source).orientation), tolerance)


# --- limits and damage --------------------------------------------------------------------------------------


def encode(kind: str, mode: str = 'RGB') -> bytes:
    """Save a photo of noise with an EXIF orientation and a text in its EXIF data."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation], exif[ExifTags.Base.Make], exif[ExifTags.Base.ImageWidth] = 6, 'abc', 30
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, kind, **({} if kind == 'BMP' else {'exif': exif}))
    return file.getvalue()


@pytest.mark.filterwarnings('ignore')  # of damaged EXIF data
@pytest.mark.parametrize('kind', FORMATS)
def test_damaged_files_end_in_one_line(kind):
    """Change, cut and insert bytes, most of them in headers and EXIF data."""
    rng = np.random.default_rng(0)
    photos = [encode(kind), encode(kind, 'L')]
    refused = 0
    for n in range(1500):
        content = bytearray(photos[n % 2])
        for place in rng.integers(0, min(len(content), 300), rng.integers(1, 4)):
            content[place : place + rng.integers(0, 4)] = rng.bytes(rng.integers(0, 4))
        if n % 4 == 0:
            content = content[: rng.integers(0, len(content))]
        try:
            with open_photo(io.BytesIO(content), 'photo', max_pixels=10**6) as image:
                decode(image, 'photo', lenient=n % 3 == 0)
        except BadInput as error:
            refused += 1
            assert str(error).startswith('photo: ') and '\n' not in str(error)
    assert refused > 400


def test_limits_and_formats_can_be_chosen():
    for options, message in (
        (
            {'max_pixels': 599},
            'photo: found 20x30 pixels, expected at most 20,000 a side and 0 million in all',
        ),
        ({'formats': ['JPEG', 'BMP']}, 'photo: cannot be decoded, expected an image: JPEG, BMP'),
    ):
        with pytest.raises(BadInput) as error, open_photo(io.BytesIO(encode('PNG')), 'photo', **options):
            pass
        assert str(error.value) == message
    with open_photo(io.BytesIO(encode('PNG')), 'photo', max_pixels=600) as image:
        assert image.size == (30, 20)


def test_faults_of_a_photo_in_a_data_set(tmp_path):
    root = write_set(tmp_path / 'd', train=1, test=1, side=64)
    coco = read_coco(root, 'train', HOME)
    record = coco.photos[0]
    path = coco.path(record)
    content = path.read_bytes()
    assert read_photo(coco, record).shape == (64, 64, 3)

    def refused(message):
        with pytest.raises(BadInput, match=message) as error:
            read_photo(coco, record)
        assert str(path) in str(error.value)

    path.write_bytes(content[: len(content) * 2 // 3])
    refused('cannot be decoded')
    path.write_bytes(b'not an image')
    refused('cannot be decoded, expected an image: BMP, JPEG')
    Image.fromarray(np.full((64, 64), 700, np.uint16)).save(path, 'PNG')
    refused('found 16-bit grey of 700 to 700, expected 8 bits a channel; set intensity')
    Image.new('RGB', (32, 64)).save(path)
    refused('found 64x32 pixels, its record says 64x64')
    path.unlink()
    refused('no such image')
    path.mkdir()
    refused('is a folder, expected an image')


def test_photos_of_a_data_set_are_read_as_its_competition_says(tmp_path):
    root = write_set(tmp_path / 'd', train=1, test=1, side=64)
    pixels = np.zeros((64, 64), np.uint16)
    pixels[:20] = 3000

    def read(split: str, **values) -> np.ndarray:
        coco = read_coco(root, split, HOME.model_copy(update=values))
        return read_photo(coco, coco.photos[0])

    coco = read_coco(root, 'train', HOME)
    write(root, save(pixels, 'PNG', 6), coco.photos[0].file_name)
    upright = read('train', intensity=(0, 3000))
    assert (upright[:, 44:] == 255).all() and not upright[:, :44].any()
    assert (read('train', intensity=(0, 6000), orientation='stored')[:20] == 128).all()
    test_path = coco.path(read_coco(root, 'test', HOME).photos[0])
    test_path.write_bytes(test_path.read_bytes()[:-2])
    assert read('test').shape == (64, 64, 3)


def test_the_whole_photo_is_decoded(tmp_path):
    path: Path = tmp_path / 'cut.jpg'
    path.write_bytes(encode('JPEG'))
    assert read_stored(path).upright_size == (30, 20)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 4), np.uint8)
    Image.fromarray(noise, 'CMYK').save(path)
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(BadInput, match=r'cut\.jpg: cannot be decoded: image file is truncated'):
        read_stored(path)
