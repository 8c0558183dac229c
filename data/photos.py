"""Read photos of any kind as a viewer shows them, within limits that are checked before a pixel is decoded.

    read_rgb(Path('a.jpg'))                             # (H, W, 3) uint8, upright
    read_rgb(Path('a.tif'), intensity=(0, 4095))        # 12 bits, scaled to 0..255

8 bits a channel: grey, palette, CMYK, Lab and 1-bit photos become RGB; transparent pixels are shown on
white. More than 8 bits: the values of `intensity`, which is the same for the whole set, become 0 and 255.
"""

import io
import struct
from collections.abc import Generator, Iterable, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, BinaryIO, Literal

import cv2
import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps, UnidentifiedImageError
from PIL import TiffImagePlugin as Tiff
from PIL.TiffImagePlugin import ImageFileDirectory_v2 as Tags

from utils.errors import BadInput, one_line
from utils.files import refuse_device, write_whole
from utils.log import log

MAX_SIDE = 20_000  # pixels
MAX_PIXELS = 1 << 27
Image.MAX_IMAGE_PIXELS = MAX_PIXELS  # Pillow warns of more, and refuses twice as many
FORMATS = ('BMP', 'JPEG', 'PNG', 'TIFF', 'WEBP')  # some of Pillow's other readers start programs
# the errors that Pillow raises for damaged files of these formats and for damaged EXIF data
UNREADABLE = (OSError, SyntaxError, ValueError, TypeError, OverflowError, struct.error)
SWAPPED = (5, 6, 7, 8)  # EXIF orientations that swap height and width
INVERSE = {6: 8, 8: 6}  # the others undo themselves

KINDS = {'1': '1-bit', 'L': 'grey', 'P': 'palette', 'PA': 'palette with alpha', 'RGBa': 'RGBA'}  # of modes
KINDS |= dict.fromkeys(('LA', 'La'), 'grey with alpha')
TIFF_COLOURS = {0: 1, 1: 1, 2: 3, 3: 1, 4: 1, 5: 4, 6: 3, 8: 3}  # how many, by photometric interpretation
TIFF_ALPHA = (1, 2, 999)  # values of ExtraSamples; 999 is CorelDRAW's
TIFF_TYPES = {1: 'u', 2: 'i', 3: 'f'}  # numpy's kind, by SampleFormat
HEIF = {b'avif': 'AVIF', b'avis': 'AVIF'} | dict.fromkeys(
    (b'heic', b'heix', b'heim', b'heis', b'hevc', b'hevx', b'mif1', b'msf1'), 'HEIC'
)
OTHER_KINDS = {
    b'GIF8': 'GIF',
    b'\0\0\0\x0cjP  ': 'JPEG 2000',
    b'\xff\x4f\xff\x51': 'JPEG 2000',
    b'8BPS': 'PSD',
}
LFS_START = b'version http'
MISSING, LEAST = (-9999, -32768, -99999), -1e30  # what maps have where nothing was measured
FILL = 'write a value there that the other pixels have, such as their lowest'
JPEG_END = b'\xff\xd9' * (1 << 15)  # longer than any segment, so it ends one that is cut off, too

Orientation = Literal['displayed', 'stored']
Range = tuple[float, float]  # (low, high)


class NotIdentified(BadInput):
    """Pillow does not know the file's format, or the kind of its pixels."""


class OtherBands(BadInput):
    """A photo has another number of bands than is expected."""

    def __init__(self, message: str, bands: int) -> None:
        super().__init__(message)
        self.bands = bands


@dataclass(frozen=True)
class Stored:
    """Hold a decoded photo as it is stored, before `orientation`, its EXIF orientation, turns it upright.

    Of 8 bits a channel: `pixels` (H, W, 3) uint8 is RGB. Of more: `pixels` are values (H, W) or (H, W, 3) of
    another type, `opacity` (H, W) from 0 to 1, and `negative` says that the lowest value is white. What
    data/bands.py reads has (H, W, N) of any N.
    """

    pixels: np.ndarray
    orientation: int
    kind: str  # as a person says it: RGB, palette, 16-bit grey
    format: str
    fault: str = ''  # why not all of it could be decoded
    opacity: np.ndarray | None = None
    negative: bool = False

    @property
    def is_deep(self) -> bool:
        """Return True for more than 8 bits a channel."""
        return self.pixels.dtype != np.uint8

    @property
    def size(self) -> tuple[int, int]:
        """Return the (H, W) as stored."""
        return self.pixels.shape[:2]

    @property
    def upright_size(self) -> tuple[int, int]:
        """Return the (H, W) as displayed."""
        return self.size[::-1] if self.orientation in SWAPPED else self.size


def read_rgb(
    path: Path,
    expected: tuple[int, int] | None = None,
    orientation: Orientation = 'displayed',
    intensity: Range | None = None,
    lenient: bool = False,
) -> np.ndarray:
    """Read a photo as (H, W, 3) uint8 RGB; raise BadInput if it is not of the `expected` (H, W).

    It is turned as its EXIF data say, unless orientation is 'stored'. Transparent pixels are shown on white.
    A photo of more than 8 bits a channel is scaled from `intensity`, (low, high), to 0..255. If lenient, the
    part of a cut-off photo that can be decoded is returned, and values outside `intensity` are clipped, with
    a warning.
    """
    photo = read_stored(path, lenient)
    check_size(path, photo, expected, orientation)
    if photo.fault:
        warn_once(f'warning: {path}: {photo.fault}: predicted from what decodes')
    pixels = to_rgb(photo, path, intensity, lenient)
    return turn(pixels, photo.orientation) if orientation == 'displayed' else pixels


def likely_range(path: Path) -> Range | None:
    """Return the range of the camera that took a photo, as full_range guesses it; None for an 8-bit photo.

    A cut-off photo is read as far as it decodes. Raises BadInput.
    """
    photo = read_stored(path, lenient=True)
    return full_range(photo, path) if photo.is_deep else None


def copy_upright(source: Path, target: Path, intensity: Range | None = None, lenient: bool = False) -> None:
    """Copy a photo byte for byte, or save it again, upright and as 8-bit RGB, if it is not.

    It is saved in its own format, without loss unless that is JPEG. If lenient, a cut-off one is copied, or
    saved as far as it decodes. Raises BadInput.
    """
    photo = read_stored(source, lenient)
    pixels = turn(to_rgb(photo, source, intensity), photo.orientation)
    with write_whole(target) as file:
        if photo.kind == 'RGB' and photo.orientation == 1:
            file.write(source.read_bytes())
        else:
            options = {'JPEG': {'quality': 95}, 'WEBP': {'lossless': True}}.get(photo.format, {})
            Image.fromarray(pixels).save(file, photo.format, **options)


def read_stored(path: Path, lenient: bool = False) -> Stored:
    """Decode a photo as it is stored; if lenient, a cut-off one as far as it goes. Raises BadInput."""
    try:
        with open_photo(path) as image:
            return decode(image, path, lenient)
    except NotIdentified:  # Pillow knows few kinds of TIFF of more than 8 bits
        with refusals(path), path.open('rb') as file:
            content = file.read(16)
            if content[:4] not in Tiff.PREFIXES:
                raise
            content += file.read()
            tags, pages = read_tiff_tags(content)
            check_limits(path, tags[Tiff.IMAGEWIDTH], tags[Tiff.IMAGELENGTH])
            refuse_pages(path, pages, 'pages')
            check_bands(tags, path)
            if not is_deep_tiff(tags):
                raise
            return decode_deep_tiff(content, tags, path, lenient)


@contextmanager
def open_photo(
    source: Path | BinaryIO,
    name: object = None,
    formats: Sequence[str] = FORMATS,
    max_pixels: int = MAX_PIXELS,
) -> Generator[Image.Image]:
    """Open an image file and decode it in a `with` block. Raises BadInput, which begins with `name`."""
    name = source if name is None else name
    if isinstance(source, Path):
        refuse_device(source)
    with refusals(name, max_pixels):
        try:
            image = Image.open(source, formats=formats)
        except UnidentifiedImageError:
            raise NotIdentified(f'{name}: {describe_other(source, formats)}') from None
        with image:
            image.filename = ''  # Pillow maps uncompressed grey TIFFs of a name, with swapped sides if turned
            check_limits(name, *image.size, max_pixels)
            yield image


@contextmanager
def refusals(name: object, max_pixels: int = MAX_PIXELS) -> Generator[None]:
    """Turn what Pillow and OpenCV raise for a file into BadInput."""
    try:
        yield
    except FileNotFoundError:
        raise BadInput(f'{name}: no such image') from None
    except IsADirectoryError:
        raise BadInput(f'{name}: is a folder, expected an image') from None
    except Image.DecompressionBombError:  # Pillow refuses them before our check
        raise BadInput(f'{name}: found far too many pixels, {limits(max_pixels)}') from None
    except (*UNREADABLE, cv2.error) as error:
        fault = one_line(error)[:300]
        advice = '; copy or download it again' if 'truncated' in fault else ''
        raise BadInput(f'{name}: cannot be decoded: {fault}{advice}') from None


def limits(max_pixels: int) -> str:
    return f'expected at most {MAX_SIDE:,} a side and {max_pixels // 10**6} million in all'


def check_limits(name: object, width: int, height: int, max_pixels: int = MAX_PIXELS) -> None:
    """Raise BadInput for a photo of too many pixels."""
    if max(width, height) > MAX_SIDE or width * height > max_pixels:
        raise BadInput(f'{name}: found {height}x{width} pixels, {limits(max_pixels)}')


def describe_other(source: Path | BinaryIO, formats: Sequence[str]) -> str:
    """Say what a file that is none of these formats seems to be, by its first bytes, and the way out."""
    with source.open('rb') if isinstance(source, Path) else nullcontext(source) as file:
        file.seek(0)
        head = file.read(12)
    expected = f'expected an image: {", ".join(formats)}'
    if not head:
        return f'is empty, {expected}; copy or download it again'
    if head.lower().lstrip().startswith((b'<html', b'<!doctype')):
        return f'seems to be a web page, {expected}; download it again'
    if head == LFS_START:
        return f'is the pointer of a Git LFS file, {expected}; run git lfs pull'
    known = (kind for start, kind in OTHER_KINDS.items() if head.startswith(start))
    kind = HEIF.get(head[8:]) if head[4:8] == b'ftyp' else next(known, None)
    return f'found {kind}, {expected}; convert {kind} to JPEG' if kind else f'cannot be decoded, {expected}'


def decode(image: Image.Image, name: object, lenient: bool = False) -> Stored:
    """Decode a photo that Pillow has opened; if lenient, a cut-off one as far as it goes. Raises BadInput."""
    file_format = 'JPEG' if image.format == 'MPO' else image.format  # a phone's JPEG with its preview
    if image.format != 'MPO':
        refuse_pages(name, getattr(image, 'n_frames', 1), 'pages' if image.format == 'TIFF' else 'frames')
    if file_format == 'TIFF':
        check_bands(image.tag_v2, name)
        if is_deep_tiff(image.tag_v2):
            return decode_deep_tiff(read_content(image), image.tag_v2, name, lenient)
    raw_mode = str(image.tile[0].args) if file_format == 'PNG' and image.tile else ''
    content = read_content(image) if ';16' in raw_mode else b''
    turned_by_pillow = orientation(image) if file_format == 'TIFF' else 1
    image, fault = load(image, lenient)
    if content:
        return decode_deep_png(image, content, raw_mode, fault)
    kind = KINDS.get(image.mode, image.mode)
    if image.mode not in ('LA', 'La', 'PA', 'RGBA', 'RGBa') and image.has_transparency_data:
        kind += ' with transparency'
    pixels = turn(as_shown(image), INVERSE.get(turned_by_pillow, turned_by_pillow))
    return Stored(pixels, max(orientation(image), turned_by_pillow), kind, file_format, fault)


def refuse_pages(name: object, count: int, word: str) -> None:
    """Raise BadInput for a file of several pages, or an animation."""
    if count > 1:
        advice = 'save the one that was labelled as a file of its own'
        raise BadInput(f'{name}: found {count} {word}, expected a photo of one; {advice}')


def read_content(image: Image.Image) -> bytes:
    """Return the bytes of an opened file; leave Pillow's position in it where it is."""
    position = image.fp.tell()
    image.fp.seek(0)
    content = image.fp.read()
    image.fp.seek(position)
    return content


def orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of a photo; damaged EXIF data count as 1, upright."""
    try:
        return valid_orientation(image.getexif())
    except UNREADABLE:
        return 1


def valid_orientation(tags: Mapping[int, Any]) -> int:
    """Return the orientation that EXIF or TIFF tags hold; missing and unknown ones count as 1, upright."""
    value = tags.get(ExifTags.Base.Orientation)
    return int(value) if value in range(1, 9) else 1


def load(image: Image.Image, lenient: bool) -> tuple[Image.Image, str]:
    """Decode all pixels; if lenient, return what decodes of a cut-off photo, and why it is not all."""
    start = image.fp.tell()  # where the pixels of a JPEG begin
    try:
        image.load()
        return image, ''
    except UNREADABLE as error:
        if not lenient or (image.fp is not None and image.fp.seek(0, io.SEEK_END) <= start):
            raise
        part = load_part(image)
        if not np.asarray(part).any():
            raise  # nothing was decoded
        text = one_line(error)
        return part, f'is {"cut off" if "truncated" in text else "damaged"} ({text})'


def load_part(image: Image.Image) -> Image.Image:
    """Decode a cut-off photo as far as it goes; the rest is grey or black.

    Pillow's own LOAD_TRUNCATED_IMAGES holds for all threads, so it would let strict ones pass.
    """
    if image.format in ('JPEG', 'MPO') and image.fp is not None:  # Pillow closes it after damage, not a cut
        content = read_content(image)
        for end in (len(content), content.rfind(b'\xff\xc4'), content.rfind(b'\xff\xda')):
            with suppress(*UNREADABLE):  # a progressive JPEG may be cut off in a table between two scans
                part = Image.open(io.BytesIO(content[:end] + JPEG_END), formats=['JPEG'])
                part.load()
                return part
    image.tile = []  # what was decoded before the error stays
    image.load()
    if image.format == 'TIFF':
        ImageOps.exif_transpose(image, in_place=True)  # as Pillow does after a whole TIFF
    return image


def as_shown(image: Image.Image) -> np.ndarray:
    """Return a decoded image of 8 bits a channel as (H, W, 3) uint8 RGB, its transparent pixels on white."""
    if image.mode == 'La':
        image = image.convert('LA')
    if image.has_transparency_data:
        white = Image.new('RGBA', image.size, 'white')
        white.alpha_composite(image.convert('RGBA'))
        image = white
    elif image.mode == 'LAB':
        profiles = (ImageCms.createProfile('LAB'), ImageCms.createProfile('sRGB'))
        image = ImageCms.profileToProfile(image, *profiles, outputMode='RGB')
    return np.asarray(image if image.mode == 'RGB' else image.convert('RGB'))


def decode_deep_png(image: Image.Image, content: bytes, raw_mode: str, fault: str) -> Stored:
    """Return a decoded PNG of 16 bits, of which Pillow keeps the high bytes alone unless it is grey."""
    turned = orientation(image)
    if image.mode.startswith('I;16'):
        values, key = np.asarray(image), image.info.get('transparency')
        opacity = None if key is None else (values != key).astype(np.float32)
        return Stored(values, turned, '16-bit grey', 'PNG', fault, opacity)
    colours = raw_mode.split(';')[0]
    if colours == 'LA':
        kind, values = '16-bit grey with alpha', decode_cv2(content, (image.height, image.width))
    else:
        kind = f'16-bit {colours}'
        with Image.open(io.BytesIO(content), formats=['PNG']) as low:
            # the high bytes of little-endian pixels are the low bytes of PNG's
            low.tile = [tile._replace(args=f'{colours};16L') for tile in low.tile]
            low_bytes = np.asarray(load(low, lenient=bool(fault))[0])
        values = np.asarray(image).astype(np.uint16) << 8 | low_bytes
    values, opacity = split_alpha(values)
    key = image.info.get('transparency')
    if opacity is None and key is not None:
        opacity = (values != key).any(axis=2).astype(np.float32)
    return Stored(values, turned, kind, 'PNG', fault, opacity)


def decode_cv2(content: bytes, size: tuple[int, int]) -> np.ndarray:
    """Decode a file of more than 8 bits as (H, W) or (H, W, C) in R G B A order. Raises ValueError."""
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)  # our one line says what is wrong
    values = cv2.imdecode(np.frombuffer(content, np.uint8), cv2.IMREAD_UNCHANGED)
    if values is None or values.shape[:2] != size:
        raise ValueError('its pixels are damaged, or of a kind that is not read')
    return values[..., [2, 1, 0, 3][: values.shape[2]]] if values.ndim == 3 else values


def split_alpha(values: np.ndarray) -> tuple[np.ndarray, np.ndarray | None]:
    """Split (H, W, 4) into (H, W, 3) and the opacity (H, W) from 0 to 1; others have none."""
    if values.ndim == 2 or values.shape[2] < 4:
        return values, None
    full = np.iinfo(values.dtype).max if values.dtype.kind in 'ui' else 1
    return values[..., :3], values[..., 3].astype(np.float32) / full


def read_tiff_tags(content: bytes) -> tuple[Tags, int]:
    """Read the tags of a TIFF's first page, and count its pages. Raises some of UNREADABLE."""
    pages = read_tiff_pages(content)
    return pages[0], len(pages)


def read_tiff_pages(content: bytes) -> list[Tags]:
    """Read the tags of each page of a TIFF. Raises some of UNREADABLE."""
    file = io.BytesIO(content)
    head = content[: 16 if content[2:4] in (b'+\0', b'\0+') else 8]
    pages, offsets = [], set()
    tags = Tags(head)
    while tags.next and tags.next not in offsets:
        offsets.add(tags.next)
        file.seek(tags.next)
        tags = Tags(head)
        tags.load(file)
        pages.append(tags)
    needed = {Tiff.IMAGEWIDTH, Tiff.IMAGELENGTH, Tiff.BITSPERSAMPLE}
    if not pages or not needed <= set(pages[0]):
        raise ValueError('its tags are cut off or damaged')
    return pages


def is_deep_tiff(tags: Tags) -> bool:
    """Return True for a TIFF of more than 8 bits a channel, or of signed or float ones."""
    bits = tags.get(Tiff.BITSPERSAMPLE, (1,))
    return max(bits) > 8 or max(tags.get(Tiff.SAMPLEFORMAT, (1,))) in (2, 3)


def check_bands(tags: Tags, name: object) -> None:
    """Raise BadInput for a TIFF of bands that are neither its colours nor alpha, which Pillow would drop."""
    if tags.get(254, 0) & 1:
        fault = 'found a small preview first, as in raw photos of cameras'
        raise BadInput(f'{name}: {fault}, expected the photo; convert it to JPEG or TIFF')
    photometric = tags.get(Tiff.PHOTOMETRIC_INTERPRETATION, 0)
    colours = TIFF_COLOURS.get(photometric)
    if colours is None:
        expected = 'expected grey, palette, RGB, CMYK or Lab'
        raise BadInput(f'{name}: found the photometric interpretation {photometric}, {expected}')
    bands = tags.get(Tiff.SAMPLESPERPIXEL, colours)
    extra = tags.get(Tiff.EXTRASAMPLES, ())
    if bands == colours or (bands == colours + 1 and extra and extra[0] in TIFF_ALPHA):
        return
    fault, advice = f'found {bands} bands', 'save red, green and blue alone; alpha must be marked as such'
    if bands == 3:
        fault, advice = f'{fault} that are not marked as RGB', 'gdal_translate -co PHOTOMETRIC=RGB marks them'
    advice += f', or write channels: {bands} into competition.yaml of the data root'
    raise OtherBands(f'{name}: {fault}, expected three, red, green and blue; {advice}', bands)


def decode_deep_tiff(content: bytes, tags: Tags, name: object, lenient: bool) -> Stored:
    """Decode a TIFF of more than 8 bits a channel, whose bands are checked, with OpenCV. Raises BadInput."""
    photometric = tags.get(Tiff.PHOTOMETRIC_INTERPRETATION, 0)
    bands = tags.get(Tiff.SAMPLESPERPIXEL, TIFF_COLOURS[photometric])
    bits = max(tags.get(Tiff.BITSPERSAMPLE, (1,)))
    sample_format = max(tags.get(Tiff.SAMPLEFORMAT, (1,)))
    colours = {0: 'grey', 1: 'grey', 2: 'RGB'}.get(photometric)
    kind = f'{bits}-bit {"float " if sample_format == 3 else ""}{colours or "TIFF"}'
    planar = bands > 1 and tags.get(Tiff.PLANAR_CONFIGURATION, 1) == 2
    half = sample_format == 3 and bits < 32
    if colours is None or planar or half or bands == 2:
        kind += ' in separate planes' if planar else ' with alpha' if bands == 2 else ''
        expected = 'expected whole numbers or floats of 32 bits, grey or interleaved RGB; save it as such'
        raise BadInput(f'{name}: found {kind} of photometric interpretation {photometric}, {expected}')
    fault = '' if tiff_end(tags) <= len(content) else 'is cut off (the last rows of pixels are missing)'
    if fault and not lenient:
        raise BadInput(f'{name}: cannot be decoded: image file is truncated: {fault}')
    size = (tags[Tiff.IMAGELENGTH], tags[Tiff.IMAGEWIDTH])
    turned = valid_orientation(tags)
    values = decode_cv2(content, size[::-1] if turned in SWAPPED else size)  # OpenCV turns TIFFs, always
    channels = 1 if values.ndim == 2 else values.shape[2]
    if channels != bands or values.dtype.kind != TIFF_TYPES.get(sample_format) or values.itemsize * 8 < bits:
        raise ValueError(f'{kind} is not read')
    if bits < 16 and sample_format == 1:
        values = values >> (16 - bits)  # OpenCV fills the high bits
    values, opacity = split_alpha(turn(values, INVERSE.get(turned, turned)))
    if opacity is not None:
        kind += 'A'
        if tags[Tiff.EXTRASAMPLES][0] == 1:  # colours were multiplied by their opacity
            values = values / np.maximum(opacity, 1e-6)[..., None]
    return Stored(values, turned, kind, 'TIFF', fault, opacity, photometric == 0)


def tiff_end(tags: Tags) -> int:
    """Return where the last strip or tile of a TIFF ends, in bytes."""
    tiled = Tiff.TILEOFFSETS in tags
    offsets = tags.get(Tiff.TILEOFFSETS if tiled else Tiff.STRIPOFFSETS, ())
    counts = tags.get(Tiff.TILEBYTECOUNTS if tiled else Tiff.STRIPBYTECOUNTS, ())
    return max((offset + count for offset, count in zip(offsets, counts, strict=False)), default=0)


def turn(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """Turn (H, W, ...) pixels upright from an EXIF orientation, 1 to 8."""
    if orientation == 1:
        return pixels
    if orientation in (3, 4, 6, 7):
        pixels = pixels[::-1]
    if orientation in (2, 3, 7, 8):
        pixels = pixels[:, ::-1]
    return np.ascontiguousarray(pixels.swapaxes(0, 1) if orientation in SWAPPED else pixels)


def check_size(path: Path, photo: Stored, expected: tuple[int, int] | None, orientation: Orientation) -> None:
    """Raise BadInput if a photo is not of the expected (H, W)."""
    sizes = {'displayed': photo.upright_size, 'stored': photo.size}
    height, width = sizes[orientation]
    if expected in (None, (height, width)):
        return
    fault, recorded = f'found {height}x{width} pixels', f'its record says {expected[0]}x{expected[1]}'
    other = 'stored' if orientation == 'displayed' else 'displayed'
    if expected == sizes[other]:
        advice = f'which is its size as {other}; set orientation: {other} in competition.yaml'
        raise BadInput(f'{path}: {fault} as {orientation}, {recorded}, {advice}')
    advice = 'take the photo as it was labelled, no resized or turned copy, or correct the record'
    raise BadInput(f'{path}: {fault}, {recorded}; {advice}')


def to_rgb(photo: Stored, name: object, intensity: Range | None, lenient: bool = False) -> np.ndarray:
    """Return a photo as stored as (H, W, 3) uint8 RGB, scaled from `intensity`. Raises BadInput."""
    pixels = to_levels(photo, name, intensity and (intensity,), lenient)
    return pixels if pixels.shape[2] == 3 else np.repeat(pixels, 3, axis=2)


def to_levels(
    photo: Stored, name: object, ranges: Sequence[Range] | None, lenient: bool = False, top: int = 255
) -> np.ndarray:
    """Return a photo as stored as (H, W, N) uint8, or uint16 for a top of 65535, scaled from `ranges`: one
    pair, or one a band. If lenient, values outside them are clipped, with a warning. Raises BadInput.
    """
    if not photo.is_deep:
        return photo.pixels if top == 255 else photo.pixels.astype(np.uint16) * np.uint16(top // 255)
    if ranges is None:
        span = f'found {photo.kind} of {show_range(measure(photo, name))}'
        advice = 'set intensity: [low, high], the range of all photos, in competition.yaml of the data root'
        raise BadInput(
            f'{name}: {span}, expected 8 bits a channel; {advice}; python prepare.py check prints it'
        )
    found = measure_bands(photo, name, lenient=True) if len(ranges) > 1 else (measure(photo, name),)
    for band, ((low, high), limits) in enumerate(zip(found, ranges, strict=True), 1):
        if low >= limits[0] and high <= limits[1]:
            continue
        where = f' in band {band}' if len(ranges) > 1 else ''
        fault = f'{name}: found {photo.kind} of {show_range((low, high))}{where}'
        fault = f'{fault}, outside intensity, {show_range(limits)}'
        if not lenient:
            raise BadInput(f'{fault} of competition.yaml; expected the range of all photos')
        warn_once(f'warning: {fault}: the values outside are clipped')
    return scale(photo, ranges, top)


def measure(photo: Stored, name: object) -> Range:
    """Return the lowest and highest value of a photo; raise BadInput for NaN and infinity."""
    low, high = float(photo.pixels.min()), float(photo.pixels.max())
    if not np.isfinite([low, high]).all():
        fault = f'found {np.count_nonzero(~np.isfinite(photo.pixels))} values that are NaN or infinite'
        raise BadInput(f'{name}: {fault}, expected numbers in all pixels; {FILL}')
    return low, high


def measure_bands(photo: Stored, name: object, lenient: bool = False) -> tuple[Range, ...]:
    """Return the lowest and highest value of each band; raise BadInput for NaN and infinity, and, unless
    lenient, for what marks missing values: the range would leave no contrast to the others.
    """
    low, _ = measure(photo, name)
    if not lenient and (low in MISSING or low < LEAST):
        fault = f'found {np.count_nonzero(photo.pixels == low):,} values of {low:g}, which marks missing ones'
        raise BadInput(f'{name}: {fault}; {FILL}')
    values = np.atleast_3d(photo.pixels)
    ends = values.min((0, 1)).astype(float).tolist(), values.max((0, 1)).astype(float).tolist()
    return tuple(zip(*ends, strict=True))


def full_range(photo: Stored, name: object) -> Range:
    """Guess from which range a photo alone is to be scaled.

    It is 0 to the largest value of as many bits as it needs, 8, 10, 12, 14 or 16; 0 to 1 if it is float
    and has no larger value; else its own range.
    """
    low, high = measure(photo, name)
    tops = [1] if photo.pixels.dtype.kind == 'f' else [2**bits - 1 for bits in (8, 10, 12, 14, 16)]
    top = next((top for top in tops if low >= 0 and high <= top), None)
    return (low, high) if top is None else (0, top)


def whole_range(ranges: Iterable[Range]) -> Range:
    """Return the lowest and the highest value of ranges."""
    lowest, highest = zip(*ranges, strict=True)
    return min(lowest), max(highest)


def widen(values: Range) -> Range:
    """Make a range of one value one that `intensity` can be."""
    low, high = values
    return (low, high) if high > low else (low, low + 1)


def show_range(values: Range, between: str = ' to ') -> str:
    """Write a range so that `intensity` can be set to it: all digits, whole numbers without a point."""
    return between.join(str(int(v)) if v == int(v) else str(v) for v in map(float, values))


def scale(photo: Stored, ranges: Sequence[Range], top: int = 255) -> np.ndarray:
    """Scale the values of a photo from (low, high), one pair or one a band, to 0..top; transparent pixels
    are white: (H, W) → (H, W, 1) uint8, or uint16 if top is above 255; (H, W, N) → (H, W, N).
    """
    values = np.atleast_3d(photo.pixels).astype(np.promote_types(photo.pixels.dtype, np.float32))
    factors = [top / (high - low) if high > low else 0 for low, high in ranges]
    values = (values - np.array(ranges, values.dtype)[:, 0]) * np.array(factors, values.dtype)
    if photo.negative:
        values = top - values
    if photo.opacity is not None:
        values = top - (top - values) * photo.opacity[..., None]
    return values.round().clip(0, top).astype(np.uint8 if top == 255 else np.uint16)


@cache
def warn_once(text: str) -> None:
    """Log a warning, once in this process."""
    log.warning(text)
