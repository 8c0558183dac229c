"""Read uploaded photos: refuse what is too large before a pixel is decoded, turn the rest upright and make
it small enough to show.
"""

import io
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from data.coco import UNREADABLE
from utils.errors import BadInput, one_line

MAX_MEGABYTES = 10  # per upload
MAX_PIXELS = 64_000_000  # per photo: a small file of more may fill the memory
FORMATS = ('JPEG', 'PNG', 'WEBP', 'BMP')
MAX_SIDE = 1600  # longer side of the photo that is predicted and shown


def read_upload(name: str, content: bytes) -> np.ndarray:
    """Return (H, W, 3) uint8 RGB of an image file, upright, its longer side at most MAX_SIDE.

    Raises BadInput.
    """
    if len(content) > MAX_MEGABYTES * 2**20:
        size = len(content) / 2**20
        raise BadInput(f'{name}: found {size:.1f} MB, at most {MAX_MEGABYTES} MB are read')
    limit = f'at most {MAX_PIXELS // 10**6} million are read'
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', Image.DecompressionBombWarning)  # MAX_PIXELS is the limit
            image = Image.open(io.BytesIO(content), formats=FORMATS)
        with image:
            if image.width * image.height > MAX_PIXELS:
                raise BadInput(f'{name}: found {image.width}x{image.height} pixels, {limit}')
            image.draft('RGB', (MAX_SIDE, MAX_SIDE))  # decodes a JPEG at a half, a quarter or an eighth
            upright = ImageOps.exif_transpose(image).convert('RGB')
    except Image.DecompressionBombError:  # Pillow's own limit is higher
        raise BadInput(f'{name}: found far too many pixels, {limit}') from None
    except UnidentifiedImageError:
        raise BadInput(f'{name}: not an image in one of these formats: {", ".join(FORMATS)}') from None
    except UNREADABLE as error:  # also for a broken EXIF
        raise BadInput(f'{name}: cannot be decoded: {one_line(error)}') from None
    upright.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    return np.array(upright)
