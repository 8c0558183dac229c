"""Read uploaded photos, upright and small enough to show; refuse large ones before a pixel is decoded."""

import io

import numpy as np
from PIL import Image, ImageOps

from data.photos import open_photo
from utils.errors import BadInput

MAX_MEGABYTES = 10  # per upload
MAX_PIXELS = 64_000_000  # per photo: a small file of more may fill the memory
FORMATS = ('JPEG', 'PNG', 'WEBP', 'BMP')
MAX_SIDE = 1600  # longer side of the photo that is predicted and shown


def read_upload(name: str, content: bytes) -> np.ndarray:
    """Return (H, W, 3) uint8 RGB of an image file, its longer side at most MAX_SIDE. Raises BadInput."""
    size = len(content) / 2**20
    if size > MAX_MEGABYTES:
        raise BadInput(f'{name}: found {size:.1f} MB, at most {MAX_MEGABYTES} MB are read')
    with open_photo(io.BytesIO(content), name, FORMATS, MAX_PIXELS) as image:
        image.draft('RGB', (MAX_SIDE, MAX_SIDE))  # decodes a JPEG at a half, a quarter or an eighth
        upright = ImageOps.exif_transpose(image).convert('RGB')
    upright.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    return np.array(upright)
