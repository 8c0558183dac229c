"""Photos that are sent to fill the memory or to take hours: what is decoded, how much, how many at once."""

import io
import re
import subprocess
import sys
import threading
import time
import zlib

import cv2
import numpy as np
import pytest
from entry_points import ROOT
from PIL import Image

from utils.errors import BadInput
from viewer import uploads
from viewer.page_sorting import TEXTS
from viewer.uploads import MAX_DECODED, MAX_PIXELS, MAX_SIDE, read_upload


def encode(image: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def png_of(width: int, height: int) -> bytes:
    """A PNG whose header says so many pixels, with none."""
    header = b'IHDR' + width.to_bytes(4, 'big') + height.to_bytes(4, 'big') + b'\10\2\0\0\0'
    parts = (header, b'IDAT' + zlib.compress(b''), b'IEND')
    chunks = (len(part[4:]).to_bytes(4, 'big') + part + zlib.crc32(part).to_bytes(4, 'big') for part in parts)
    return b'\x89PNG\r\n\x1a\n' + b''.join(chunks)


def webp_of(width: int, height: int) -> bytes:
    """A WebP whose header says so many pixels: that of a small one, edited."""
    content = bytearray(encode(Image.new('RGB', (8, 8)), 'WEBP', lossless=True))
    content[21:25] = ((width - 1) | (height - 1) << 14).to_bytes(4, 'little')
    return bytes(content)


def bmp_of(width: int, height: int) -> bytes:
    content = bytearray(encode(Image.new('RGB', (8, 8)), 'BMP'))
    content[18:26] = width.to_bytes(4, 'little') + height.to_bytes(4, 'little')
    return bytes(content)


@pytest.mark.parametrize('make', [png_of, webp_of, bmp_of])
@pytest.mark.parametrize('size', [(8000, 8000), (4001, 4000), (16_000, 1001), (1, 16_383)])
def test_sizes_are_read_before_a_pixel_is_decoded(make, size, monkeypatch):
    def decode(image, name):
        raise BadInput('decoded')

    monkeypatch.setattr(uploads, 'decode', decode)
    found = 'decoded' if size[0] * size[1] <= MAX_DECODED else f'found {size[1]}x{size[0]} pixels'
    with pytest.raises(BadInput, match=found):
        read_upload('a', make(*size))


@pytest.mark.parametrize(
    'kind', ['GIF', 'TIFF', 'AVIF', 'JPEG2000', 'PPM', 'ICO', 'TGA', 'SGI', 'PCX', 'DDS']
)
def test_other_kinds_are_not_opened(kind):
    """A GIF, a TIFF or an AVIF of a few bytes may be of any size; only four formats are tried."""
    Image.init()
    if kind not in Image.SAVE:
        pytest.skip(f'Pillow here writes no {kind}')
    with pytest.raises(BadInput, match='expected an image: JPEG, PNG, WEBP, BMP'):
        read_upload('a', encode(Image.new('RGB', (64, 64)), kind))


def test_animations_are_not_decoded():
    frames = [Image.new('RGB', (8, 8), colour) for colour in ('red', 'green', 'blue')]
    for kind in ('WEBP', 'PNG'):
        with pytest.raises(BadInput, match='found 3 frames'):
            read_upload('a', encode(frames[0], kind, save_all=True, append_images=frames[1:]))


def test_a_text_in_a_png_stays_packed():
    from PIL.PngImagePlugin import PngInfo

    info = PngInfo()
    info.add_text('a', 'x' * 5_000_000, zip=True)
    content = encode(Image.new('RGB', (8, 8)), 'PNG', pnginfo=info)
    before = time.monotonic()
    with pytest.raises(BadInput, match='cannot be decoded'):
        read_upload('a', content)
    assert len(content) < 10_000 and time.monotonic() - before < 5


def test_a_jpeg_of_many_scans():
    """Each scan of a few bytes takes a pass over all pixels: 10 MB of them would take days."""
    content = encode(Image.new('RGB', (64, 64), 'red'), 'JPEG', progressive=True)
    assert read_upload('a', content).shape == (64, 64, 3)
    last = content[content.rfind(b'\xff\xda') : -2]
    with pytest.raises(BadInput, match='found 310 scans, a JPEG has at most 100'):
        read_upload('a', content[:-2] + last * 300 + content[-2:])


def test_a_long_jpeg_is_decoded_small():
    image = Image.new('RGB', (8_000, 2_001), 'red')
    assert image.width * image.height > MAX_DECODED
    assert read_upload('a', encode(image, 'JPEG')).shape == (401, MAX_SIDE, 3)


def test_a_deep_photo_is_shrunk_first():
    ramp = np.linspace(0, 4095, 2000 * 40).reshape(40, 2000).astype(np.uint16)
    small = read_upload('a', cv2.imencode('.png', ramp)[1].tobytes())
    assert small.shape == (32, MAX_SIDE, 3) and small[0, 0, 0] < 5 and small[-1, -1, 0] > 250
    clear = np.dstack([ramp, ramp, ramp, np.zeros_like(ramp)])
    assert (read_upload('a', cv2.imencode('.png', clear)[1].tobytes()) == 255).all(), 'transparent is white'


LARGEST = {  # each of MAX_DECODED pixels, or MAX_PIXELS of a JPEG; the PNG has 16 bits and alpha
    'webp': lambda: encode(Image.new('RGBA', (4000, 4000), (9, 99, 9, 99)), 'WEBP', lossless=True),
    'png': lambda: cv2.imencode('.png', np.full((4000, 4000, 4), 999, np.uint16))[1].tobytes(),
    'jpeg': lambda: encode(Image.new('RGB', (8000, 8000)), 'JPEG', progressive=True, subsampling=0),
}
PEAK = """
import resource, sys
from viewer.uploads import read_upload
content = sys.stdin.buffer.read()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(read_upload('a', content).shape, (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize('kind', LARGEST)
def test_the_memory_of_the_largest(kind):
    done = subprocess.run(
        [sys.executable, '-c', PEAK], input=LARGEST[kind](), cwd=ROOT, capture_output=True, check=True
    )
    assert int(done.stdout.split()[-1]) < 500, 'MB'


def test_one_photo_at_a_time(monkeypatch):
    """Twenty sessions need the memory of one photo, and one that is refused does not stop the others."""
    active, most, errors = [], [], []

    def decode(image, name):
        active.append(name)
        most.append(len(active))
        time.sleep(0.005)
        active.remove(name)
        if name == '3':
            raise BadInput('no')
        return whole(image, name)

    def session(name: str) -> None:
        try:
            read_upload(name, content)
        except BadInput as error:
            errors.append(str(error))

    whole, content = uploads.decode, encode(Image.new('RGB', (30, 20)), 'PNG')
    monkeypatch.setattr(uploads, 'decode', decode)
    threads = [threading.Thread(target=session, args=(str(number),)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert (len(most), max(most), errors) == (20, 1, ['no'])


def test_what_is_allowed_is_said():
    said = TEXTS['en']['upload'].format(**uploads.LIMITS)
    assert re.search(r'up to 10 MB: a JPEG of up to 64 megapixels, or PNG.*16$', said)
    assert TEXTS['ko']['upload'].format(**uploads.LIMITS).count('64') == 1
    assert (MAX_PIXELS, MAX_DECODED) == (64_000_000, 16_000_000)


# how many pools glibc has once 16 threads have taken memory at the same time
POOLS = """
import ctypes, threading
from viewer.guard import share_pools
{}
barrier = threading.Barrier(16)
def take():
    barrier.wait()
    kept = [bytes(100_000) for _ in range(100)]
    barrier.wait()
threads = [threading.Thread(target=take) for _ in range(16)]
for thread in threads: thread.start()
for thread in threads: thread.join()
getattr(ctypes.CDLL(None), 'malloc_stats', int)()  # to standard error
"""


def test_all_sessions_share_two_pools_of_memory():
    pools = []
    for call in ('', 'share_pools()'):
        words = [sys.executable, '-c', POOLS.format(call)]
        run = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True)
        pools.append(run.stderr.count('Arena '))
    if not pools[0]:
        pytest.skip('the C library is not glibc')
    assert pools[0] > 2 >= pools[1]
