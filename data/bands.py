"""Read photos of any number of bands, of 8 or 16 bits a value, and the bands of neighbouring slices (2.5D).

    read_bands(Path('a.tif'), competition)      # (H, W, channels) uint8, or uint16 if depth is 16

photos.py reads grey and RGB. Other bands come from a TIFF, interleaved, in planes or one a page; from a
photo with alpha, as it is stored; or from a NumPy array: (H, W), (H, W, N) or (N, H, W), where the axis whose
length is N holds the bands. All limits are checked before a pixel is decoded.
"""

import io
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from math import prod
from pathlib import Path
from tokenize import TokenError

import numpy as np
from PIL import TiffImagePlugin as Tiff
from PIL.TiffImagePlugin import ImageFileDirectory_v2 as Tags

from config import COMPETITION_FILE, Competition, Slices
from data.paths import find_photo, inside
from data.photos import (
    MAX_PIXELS,
    TIFF_TYPES,
    OtherBands,
    Stored,
    check_limits,
    check_size,
    decode_cv2,
    load,
    open_photo,
    orientation,
    read_content,
    read_rgb,
    read_stored,
    read_tiff_pages,
    refusals,
    refuse_pages,
    tiff_end,
    to_levels,
    turn,
    valid_orientation,
    warn_once,
)
from utils.errors import BadInput, one_line, plural
from utils.files import exists, normal_name, refuse_device

ARRAY_SUFFIX = '.npy'
MAX_VALUES = 3 * MAX_PIXELS  # of all bands, as many as the largest RGB photo has
SUBFILE, IMAGE_DEPTH = 254, 32997  # tags of TIFF
PREVIEW_OR_MASK = 1 | 4  # bits of SUBFILE
# none, LZW, Deflate by both its numbers, PackBits, Zstandard; the decoders of photos stay with Pillow
COMPRESSIONS = (1, 5, 8, 32946, 32773, 50000)
GREY_OR_RGB = (0, 1, 2)  # photometric interpretations whose samples are values
DAMAGED_HEADER = (ValueError, TokenError, SyntaxError, RecursionError, MemoryError, TypeError, KeyError)


def read_bands(
    path: Path,
    competition: Competition,
    expected: tuple[int, int] | None = None,
    lenient: bool = False,
    root: Path | None = None,
) -> np.ndarray:
    """Read a photo of a data set as (H, W, channels) uint8, or uint16 if `depth` is 16; raise BadInput if it
    is not of the `expected` (H, W), or of other bands.

    It is turned and scaled as read_rgb does. Neighbouring slices are named by the path below `root`, which is
    the photo's folder by default.
    """
    if competition.is_rgb and not is_array(path) and len(competition.ranges or (0,)) == 1:
        intensity = competition.ranges and competition.ranges[0]
        return read_rgb(path, expected, competition.orientation, intensity, lenient)
    paths = [path]
    if competition.slices:
        paths = find_slices(path, root or path.parent, competition.slices)
    parts = {one: read_one(one, competition, expected, lenient) for one in dict.fromkeys(paths)}
    if len({part.shape for part in parts.values()}) > 1:
        sizes = ', '.join(f'{one.name} {part.shape[0]}x{part.shape[1]}' for one, part in parts.items())
        raise BadInput(f'{path}: found slices of different sizes, {sizes}; expected those of one volume')
    return np.concatenate([parts[one] for one in paths], axis=2)


def read_one(
    path: Path, competition: Competition, expected: tuple[int, int] | None, lenient: bool
) -> np.ndarray:
    """Read one photo, without its neighbours, as (H, W, N) uint8 or uint16. Raises BadInput."""
    photo = read_stored_bands(path, competition.photo_channels, lenient)
    check_size(path, photo, expected, competition.orientation)
    if photo.fault:
        warn_once(f'warning: {path}: {photo.fault}: predicted from what decodes')
    levels = to_levels(photo, path, competition.ranges, lenient, competition.max_value)
    pixels = to_channels(levels, competition.photo_channels)
    return turn(pixels, photo.orientation) if competition.orientation == 'displayed' else pixels


def to_channels(pixels: np.ndarray, channels: int) -> np.ndarray:
    """Repeat the band of a grey photo (H, W, 1) if photos are RGB."""
    return pixels if pixels.shape[2] == channels else np.repeat(pixels, channels, axis=2)


def read_stored_bands(path: Path, channels: int, lenient: bool = False) -> Stored:
    """Decode a photo of so many bands as it is stored. Raises BadInput, and OtherBands.

    Grey will do for RGB, and RGB for grey if its three channels are the same.
    """
    if is_array(path):
        return read_array(path, channels)
    if channels == 3:
        return read_stored(path, lenient)
    if channels == 1:
        return to_grey(read_stored(path, lenient), path)
    refuse_device(path)
    with refusals(path), path.open('rb') as file:
        is_tiff = file.read(4) in Tiff.PREFIXES
    return read_tiff(path, channels, lenient) if is_tiff else read_alpha(path, channels, lenient)


def read_any_bands(path: Path, channels: int, lenient: bool = False) -> tuple[Stored, int]:
    """Decode a photo as it is stored; return it and its number of bands: `channels` if it can be read so.
    Raises BadInput.
    """
    try:
        return read_stored_bands(path, channels, lenient), channels
    except OtherBands as error:
        return read_stored_bands(path, error.bands, lenient), error.bands


def is_array(path: Path) -> bool:
    return path.suffix.lower() == ARRAY_SUFFIX


def other_bands(name: object, found: int, channels: int) -> OtherBands:
    """Return the error for a photo of another number of bands, with the key to write."""
    fault = f'found {plural(found, "band")}, expected {channels}'
    return OtherBands(
        f'{name}: {fault}; write channels: {found} into {COMPETITION_FILE} of the data root', found
    )


def to_grey(photo: Stored, path: Path) -> Stored:
    """Take one channel of a photo whose three are the same. Raises OtherBands for colours."""
    pixels = photo.pixels
    if pixels.ndim == 3:
        if (pixels[..., 1:] != pixels[..., :1]).any():
            fault = 'found colours, expected grey, one channel or three that are the same'
            advice = f'write channels: 3 into {COMPETITION_FILE} of the data root, or save the photo as grey'
            raise OtherBands(f'{path}: {fault}; {advice}', 3)
        pixels = pixels[..., 0]
    return replace(photo, pixels=np.ascontiguousarray(pixels[..., None]))


def check_values(name: object, height: int, width: int, bands: int) -> None:
    """Raise BadInput for a photo of too many pixels, or of too many values in all bands."""
    check_limits(name, width, height)
    if height * width * bands > MAX_VALUES:
        fault = f'found {height}x{width} pixels of {bands} bands'
        raise BadInput(f'{name}: {fault}, expected at most {MAX_VALUES // 10**6} million values in all')


def read_alpha(path: Path, channels: int, lenient: bool) -> Stored:
    """Decode a photo with alpha as four bands, or two if it is grey, as they are stored. Raises BadInput."""
    with open_photo(path) as image:
        refuse_pages(path, getattr(image, 'n_frames', 1), 'frames')
        found = 3 if image.mode == 'P' else len(image.getbands())
        if found != channels or image.mode not in ('RGBA', 'LA'):
            raise other_bands(path, found, channels)
        deep = image.format == 'PNG' and image.tile and ';16' in str(image.tile[0].args)
        content = read_content(image) if deep else b''
        image, fault = load(image, lenient)
        pixels, turned = np.asarray(image), orientation(image)
        if content and fault:
            raise BadInput(f'{path}: cannot be decoded: {fault}')
        if content:
            pixels = decode_cv2(content, pixels.shape[:2])
            pixels = pixels if channels == 4 else pixels[..., [0, 3]]
        return Stored(pixels, turned, describe(pixels), image.format or path.suffix, fault)


def describe(pixels: np.ndarray) -> str:
    """Say what (H, W, N) pixels are, such as 6 bands of 16-bit."""
    word = {'f': ' float', 'i': ' signed'}.get(pixels.dtype.kind, '')
    return f'{plural(pixels.shape[2], "band")} of {pixels.dtype.itemsize * 8}-bit{word}'


def read_tiff(path: Path, channels: int, lenient: bool) -> Stored:
    """Decode a TIFF of so many bands, interleaved, in planes or one a page, as it is stored.

    If lenient, the missing rows of a cut-off one that is not compressed are 0. Raises BadInput.
    """
    with refusals(path):
        content = path.read_bytes()
        directory = dict(enumerate(read_tiff_pages(content)))
        pages = {n: page for n, page in directory.items() if not page.get(SUBFILE, 0) & PREVIEW_OR_MASK}
        shapes = [check_page(page, path) for page in pages.values()]
        if len(set(shapes)) != 1 or (len(pages) > 1 and shapes[0][2] > 1):
            refuse_pages(path, len(pages), 'pages')
            raise BadInput(f'{path}: found previews and masks alone, expected a photo')
        height, width, samples = shapes[0]
        if samples * len(pages) != channels:
            raise other_bands(path, samples * len(pages), channels)
        check_values(path, height, width, channels)
        missing = max(map(tiff_end, pages.values())) - len(content)
        fault = 'is cut off (the last rows of pixels are missing)' if missing > 0 else ''
        if missing > (MAX_VALUES if lenient else 0):
            raise BadInput(f'{path}: cannot be decoded: image file is truncated: {fault}')
        content += bytes(max(0, missing))
        parts = [decode_page(content, n, page, shapes[0]) for n, page in pages.items()]
    values = np.ascontiguousarray(parts[0] if len(parts) == 1 else np.concatenate(parts, axis=2))
    first = next(iter(pages.values()))
    negative = first.get(Tiff.PHOTOMETRIC_INTERPRETATION, 1) == 0
    if negative and values.dtype == np.uint8:
        values, negative = 255 - values, False
    return Stored(values, valid_orientation(first), describe(values), 'TIFF', fault, negative=negative)


def check_page(tags: Tags, path: Path) -> tuple[int, int, int]:
    """Return the (H, W, samples) of a TIFF's page. Raises BadInput for one that is too large, or of values of
    another kind.
    """
    height, width = (tags.get(tag, 0) for tag in (Tiff.IMAGELENGTH, Tiff.IMAGEWIDTH))
    if not height or not width:
        raise BadInput(f'{path}: cannot be decoded: its tags are damaged')
    samples = tags.get(Tiff.SAMPLESPERPIXEL, 1)
    check_values(path, height, width, samples)
    check_values(path, tags.get(Tiff.TILELENGTH, 1), tags.get(Tiff.TILEWIDTH, 1), samples)
    photometric = tags.get(Tiff.PHOTOMETRIC_INTERPRETATION, 1)
    compression = tags.get(Tiff.COMPRESSION, 1)
    fault = ''
    if value_type(tags) is None or tags.get(IMAGE_DEPTH, 1) != 1:
        bits = sorted(set(tags.get(Tiff.BITSPERSAMPLE, (1,))))
        fault = f'values of {", ".join(map(str, bits))} bits'
    elif photometric not in GREY_OR_RGB:
        fault = f'the photometric interpretation {photometric}'
    elif compression not in COMPRESSIONS:
        fault = f'the compression {compression}'
    if fault:
        expected = 'expected values of 8, 16 or 32 bits, without compression or by Deflate, LZW or Zstandard'
        advice = 'gdal_translate -co COMPRESS=DEFLATE saves it as such'
        raise BadInput(f'{path}: found {fault} in a TIFF of several bands, {expected}; {advice}')
    return height, width, samples


def value_type(tags: Tags) -> np.dtype | None:
    """Return the type of a TIFF's values; None if it is not the same for all bands, or no type of NumPy."""
    bits, formats = tags.get(Tiff.BITSPERSAMPLE, (1,)), tags.get(Tiff.SAMPLEFORMAT, (1,))
    if len(set(bits)) != 1 or len(set(formats)) != 1 or formats[0] not in TIFF_TYPES or bits[0] % 8:
        return None
    with suppress(TypeError):
        return np.dtype(f'{TIFF_TYPES[formats[0]]}{bits[0] // 8}')
    return None


def decode_page(content: bytes, index: int, tags: Tags, shape: tuple[int, int, int]) -> np.ndarray:
    """Decode a page of a TIFF as (H, W, samples). Raises ValueError."""
    import imagecodecs  # 26 MB that a data set without TIFFs does without

    height, width, samples = shape
    planar = samples > 1 and tags.get(Tiff.PLANAR_CONFIGURATION, 1) == 2
    place = (samples, height, width) if planar else shape if samples > 1 else shape[:2]
    out = np.empty(place, value_type(tags))  # libtiff refuses a page of any other size
    try:
        imagecodecs.tiff_decode(content, index, out=out)
    except (imagecodecs.TiffError, IndexError) as error:
        raise ValueError(one_line(error) or 'its pixels are damaged') from None
    return np.moveaxis(out, 0, 2) if planar else out.reshape(shape)


def read_array(path: Path, channels: int) -> Stored:
    """Read a NumPy array of so many bands, without running any code in it. Raises BadInput."""
    refuse_device(path)
    with refusals(path), path.open('rb') as file:
        shape, fortran, dtype = read_header(path, file)
        if dtype.kind not in 'uif' or not 2 <= len(shape) <= 3 or not all(shape):
            fault = f'found an array {shape} of {one_line(dtype)[:40]}'
            raise BadInput(f'{path}: {fault}, expected (H, W, N) or (N, H, W) whole numbers or floats')
        axis = find_band_axis(path, shape, channels)
        height, width = [side for n, side in enumerate(shape) if n != axis]
        check_values(path, height, width, shape[axis] if axis is not None else 1)
        values = np.fromfile(file, dtype, prod(shape))
    if values.size < prod(shape):
        raise BadInput(f'{path}: is cut off: found {values.size:,} values, expected {prod(shape):,}')
    values = values.astype(dtype.newbyteorder('='), copy=False).reshape(shape, order='F' if fortran else 'C')
    values = values[..., None] if axis is None else np.moveaxis(values, axis, 2)
    values = np.ascontiguousarray(values)
    return Stored(values, 1, describe(values), 'NPY')


def read_header(path: Path, file: io.BufferedReader) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Read the shape, the order and the type of a NumPy array. Raises BadInput."""
    try:
        version = np.lib.format.read_magic(file)
        if version not in ((1, 0), (2, 0)):
            raise ValueError(f'version {version}')
        name = f'read_array_header_{version[0]}_0'
        return getattr(np.lib.format, name)(file)
    except DAMAGED_HEADER as error:
        raise BadInput(f'{path}: cannot be read as a NumPy array: {one_line(error)[:200]}') from None


def find_band_axis(path: Path, shape: Sequence[int], channels: int) -> int | None:
    """Return the axis of an array that holds the bands; None for (H, W). Raises BadInput."""
    if len(shape) == 2:
        if channels not in (1, 3):
            raise other_bands(path, 1, channels)
        return None
    axes = [axis for axis in (2, 0) if shape[axis] == channels]
    if len(axes) == 2:
        fault = f'found an array {tuple(shape)}, whose first and last axis are both {channels} long'
        raise BadInput(f'{path}: {fault}, as the bands are; expected one of them')
    if not axes:
        raise other_bands(path, min(shape[0], shape[2]), channels)
    return axes[0]


def find_slices(path: Path, root: Path, slices: Slices) -> list[Path]:
    """Find the files of the slices around a photo, one an offset; where one is missing, the nearest on the
    way to it. Raises BadInput if the name of the photo has no number.
    """
    name = normal_name(path.relative_to(root).as_posix())
    start, end = slice_number(name, slices, path)
    width = end - start
    paths = {0: path}

    def find(offset: int) -> Path:
        if offset not in paths:
            number = int(name[start:end]) + offset
            texts = dict.fromkeys((str(number).zfill(width), str(number))) if number >= 0 else ()
            names = (name[:start] + text + name[end:] for text in texts)
            found = (find_photo(root, other) for other in names if inside(root, other))
            nearer = offset - 1 if offset > 0 else offset + 1
            paths[offset] = next((other for other in found if exists(other)), None) or find(nearer)
        return paths[offset]

    return [find(offset) for offset in slices.offsets]


def slice_number(name: str, slices: Slices, path: object) -> tuple[int, int]:
    """Return where the number of a slice stands in its file name. Raises BadInput if there is none."""
    match = re.search(slices.pattern, name)
    start, end = match.span(match.re.groups) if match else (-1, -1)
    if not re.fullmatch(r'\d{1,18}', name[start:end], re.ASCII) or start < 0:
        fault = f'slices: {slices.pattern} finds no number in the last parenthesis in the file name {name!r}'
        raise BadInput(f'{path}: {fault}; mend the pattern in {COMPETITION_FILE}')
    return start, end


def volume_of(name: str, slices: Slices) -> str:
    """Return a file name without the number of its slice: what slices of one volume share."""
    start, end = slice_number(normal_name(name), slices, name)
    return f'{name[:start]}*{name[end:]}'
