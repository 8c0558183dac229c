"""Photos that anybody may have sent: refused before a pixel is decoded where they are too large, else upright
and small enough to look at.
"""

import io

import numpy as np
from PIL import Image, ImageOps

from data.photos import open_photo
from utils.errors import BadInput

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
    with open_photo(io.BytesIO(content), name, FORMATS, MAX_PIXELS) as image:
        image.draft('RGB', (SEEN, SEEN))  # JPEG is decoded at a half, a quarter, an eighth
        upright = ImageOps.exif_transpose(image).convert('RGB')
    upright.thumbnail((SEEN, SEEN), Image.Resampling.LANCZOS)
    return np.array(upright)
