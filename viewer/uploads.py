"""Photos that anybody may have sent: refused before a pixel is decoded where they are too large, else upright
and small enough to look at.
"""

import io
import warnings

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from data.coco import UNREADABLE
from utils.errors import BadInput, one_line

MAX_MEGABYTES = 10  # of an upload
MAX_PIXELS = 64_000_000  # of a photo: beyond it a small file may fill the memory
FORMATS = ('JPEG', 'PNG', 'WEBP', 'BMP')
SEEN = 1600  # the longer side at which a photo is looked at and shown


def read_upload(name: str, content: bytes) -> np.ndarray:
    """(H, W, 3) uint8 RGB of an image file that anybody may have sent, upright, its longer side at most SEEN.

    Raises BadInput: for what is too large before a pixel is decoded.
    """
    if len(content) > MAX_MEGABYTES * 2**20:
        size = len(content) / 2**20
        raise BadInput(f'{name}: found {size:.1f} MB, at most {MAX_MEGABYTES} MB are read')
    try:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore', Image.DecompressionBombWarning)  # the limit is ours
            image = Image.open(io.BytesIO(content), formats=FORMATS)
        with image:
            if image.width * image.height > MAX_PIXELS:
                found = f'{image.width}x{image.height}'
                raise BadInput(
                    f'{name}: found {found} pixels, at most {MAX_PIXELS // 10**6} million are read'
                )
            image.draft('RGB', (SEEN, SEEN))  # JPEG is decoded at a half, a quarter, an eighth
            upright = ImageOps.exif_transpose(image).convert('RGB')
    except Image.DecompressionBombError:  # Pillow's own limit, which is above ours
        most = f'at most {MAX_PIXELS // 10**6} million are read'
        raise BadInput(f'{name}: found far too many pixels, {most}') from None
    except UnidentifiedImageError:
        raise BadInput(f'{name}: not an image of these: {", ".join(FORMATS)}') from None
    except UNREADABLE as error:  # of its EXIF too
        raise BadInput(f'{name}: cannot be decoded: {one_line(error)}') from None
    upright.thumbnail((SEEN, SEEN), Image.Resampling.LANCZOS)
    return np.array(upright)
