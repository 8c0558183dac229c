"""Read uploaded photos as a viewer shows them, small enough to show; refuse large ones before decoding."""

import io

import numpy as np
from PIL import Image

from data.photos import decode, full_range, open_photo, to_rgb, turn
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
        photo = decode(image, name)
    intensity = full_range(photo, name) if photo.is_deep else None
    upright = Image.fromarray(turn(to_rgb(photo, name, intensity), photo.orientation))
    upright.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
    return np.array(upright)
