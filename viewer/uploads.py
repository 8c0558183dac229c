"""Read uploaded photos as a viewer shows them, small enough to show; refuse large ones before decoding."""

import io
import re
import threading
from dataclasses import replace

import cv2
import numpy as np
from PIL import Image

from data.photos import Stored, check_limits, decode, full_range, open_photo, to_rgb, turn
from utils.errors import BadInput
from utils.plotting import fit

MAX_MEGABYTES = 10  # per upload
MAX_PIXELS = 64_000_000  # of a JPEG, which is decoded at down to an eighth of its size
MAX_DECODED = 16_000_000  # of all others, and of a JPEG so decoded: a WebP takes 25 bytes a pixel
MAX_SCANS = 100  # of a progressive JPEG: each takes a pass over all pixels, and as little as 12 bytes
SCAN = re.compile(rb'\xff\xda\0[\x06-\x0e][\x01-\x04]')
FORMATS = ('JPEG', 'PNG', 'WEBP', 'BMP')
# as people read them: megabytes, and megapixels of a JPEG and of other formats
LIMITS = {'megabytes': MAX_MEGABYTES, 'jpeg': MAX_PIXELS // 10**6, 'other': MAX_DECODED // 10**6}
MAX_SIDE = 1600  # longer side of the photo that is predicted and shown

# held while a photo is decoded, and while one is predicted: all sessions together need the memory of one
ONE_PHOTO = threading.Lock()


def read_upload(name: str, content: bytes) -> np.ndarray:
    """Return (H, W, 3) uint8 RGB of an image file, its longer side at most MAX_SIDE. Raises BadInput."""
    size = len(content) / 2**20
    if size > MAX_MEGABYTES:
        raise BadInput(f'{name}: found {size:.1f} MB, at most {MAX_MEGABYTES} MB are read')
    with ONE_PHOTO, open_photo(io.BytesIO(content), name, FORMATS, MAX_PIXELS) as image:
        height, width = fit(image.size[::-1], MAX_SIDE)
        image.draft('RGB', (width, height))  # decodes a JPEG at a half, a quarter or an eighth
        check_limits(name, *image.size, MAX_DECODED)
        scans = len(SCAN.findall(content)) if image.format in ('JPEG', 'MPO') else 0
        if scans > MAX_SCANS:
            raise BadInput(f'{name}: found {scans} scans, a JPEG has at most {MAX_SCANS}; save it again')
        photo = decode(image, name)
        intensity = None
        if photo.is_deep:
            intensity, photo = full_range(photo, name), shrink(photo)
        upright = Image.fromarray(turn(to_rgb(photo, name, intensity), photo.orientation))
        upright.thumbnail((MAX_SIDE, MAX_SIDE), Image.Resampling.LANCZOS)
        return np.array(upright)


def shrink(photo: Stored) -> Stored:
    """Shrink a deep photo before it is scaled, which takes many bytes a pixel; a small one stays."""
    if max(photo.size) <= MAX_SIDE:
        return photo
    size = fit(photo.size, MAX_SIDE)[::-1]
    pixels, opacity = (
        None if values is None else cv2.resize(values, size, interpolation=cv2.INTER_AREA)
        for values in (photo.pixels, photo.opacity)
    )
    return replace(photo, pixels=pixels, opacity=opacity)
