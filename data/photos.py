"""Read and copy photos within limits of format and size, which are checked before a pixel is decoded."""

import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from utils.errors import BadInput, one_line
from utils.files import refuse_device, write_whole

MAX_SIDE = 20_000  # pixels
MAX_PIXELS = 1 << 27
FORMATS = ('BMP', 'JPEG', 'PNG', 'TIFF', 'WEBP')  # some of Pillow's other readers start programs
# the errors that Pillow raises for damaged files of these formats and for damaged EXIF data
UNREADABLE = (OSError, SyntaxError, ValueError, TypeError, struct.error)
SWAPPED = (5, 6, 7, 8)  # EXIF orientations that swap height and width


@contextmanager
def open_photo(
    source: Path | BinaryIO,
    name: object = None,
    formats: Sequence[str] = FORMATS,
    max_pixels: int = MAX_PIXELS,
) -> Iterator[Image.Image]:
    """Open an image file and decode it in a `with` block. Raises BadInput, which begins with `name`."""
    name = source if name is None else name
    limits = f'expected at most {MAX_SIDE:,} a side and {max_pixels // 10**6} million in all'
    if isinstance(source, Path):
        refuse_device(source)
    try:
        with Image.open(source, formats=formats) as image:
            if max(image.size) > MAX_SIDE or image.width * image.height > max_pixels:
                raise BadInput(f'{name}: found {image.height}x{image.width} pixels, {limits}')
            yield image
    except FileNotFoundError:
        raise BadInput(f'{name}: no such image') from None
    except Image.DecompressionBombError:  # Pillow itself refuses 179 million, before our check
        raise BadInput(f'{name}: found far too many pixels, {limits}') from None
    except UnidentifiedImageError:
        raise BadInput(f'{name}: cannot be decoded, expected an image: {", ".join(formats)}') from None
    except UNREADABLE as error:
        raise BadInput(f'{name}: cannot be decoded: {one_line(error)[:300]}') from None


def read_rgb(path: Path, expected: tuple[int, int] | None = None) -> np.ndarray:
    """Read a photo as (H, W, 3) uint8; raise BadInput if it is not RGB or not of the `expected` (H, W)."""
    with open_photo(path) as image:
        size = (image.height, image.width)
        if expected is not None and size != expected:
            recorded = f'its record says {expected[0]}x{expected[1]}'
            raise BadInput(f'{path}: found {size[0]}x{size[1]} pixels, {recorded}')
        if image.mode != 'RGB':
            raise BadInput(f'{path}: found mode {image.mode}, expected a photo in RGB (3 channels, 8 bits)')
        return np.asarray(image)


def orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of a photo: 1 is upright, those in SWAPPED exchange height and width."""
    return image.getexif().get(ExifTags.Base.Orientation, 1)


def upright_size(path: Path) -> tuple[int, int]:
    """Decode a photo and return its (H, W) after its EXIF orientation is applied. Raises BadInput."""
    with open_photo(path) as image:
        image.load()
        width, height = image.size
        return (width, height) if orientation(image) in SWAPPED else (height, width)


def copy_upright(source: Path, target: Path) -> None:
    """Copy a photo byte for byte, or save it again if it is not RGB or not upright. Raises BadInput."""
    with open_photo(source) as image, write_whole(target) as file:
        if image.mode == 'RGB' and orientation(image) == 1:
            file.write(source.read_bytes())
        else:
            options = {'quality': 95} if image.format in ('JPEG', 'MPO', 'WEBP') else {}
            ImageOps.exif_transpose(image).convert('RGB').save(file, image.format, **options)
