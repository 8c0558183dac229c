"""Test the reader of photos: limits, formats, and damaged files of each format."""

import io
from pathlib import Path

import numpy as np
import pytest
from conftest import write_set
from PIL import ExifTags, Image, ImageOps

from config import CLASSES
from data.coco import read_coco, read_photo
from data.photos import FORMATS, open_photo, upright_size
from utils.errors import BadInput


def encode(kind: str, mode: str = 'RGB') -> bytes:
    """Save a photo of noise with an EXIF orientation and a text in its EXIF data."""
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), np.uint8)
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation], exif[ExifTags.Base.Make], exif[ExifTags.Base.ImageWidth] = 6, 'abc', 30
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, kind, **({} if kind == 'BMP' else {'exif': exif}))
    return file.getvalue()


@pytest.mark.filterwarnings('ignore')  # of damaged EXIF data
@pytest.mark.parametrize('kind', FORMATS)
def test_damaged_files_end_in_one_line(kind):
    """Change, cut and insert bytes, most of them in headers and EXIF data."""
    rng = np.random.default_rng(0)
    photos = [encode(kind), encode(kind, 'L')]
    refused = 0
    for n in range(1500):
        content = bytearray(photos[n % 2])
        for place in rng.integers(0, min(len(content), 300), rng.integers(1, 4)):
            content[place : place + rng.integers(0, 4)] = rng.bytes(rng.integers(0, 4))
        if n % 4 == 0:
            content = content[: rng.integers(0, len(content))]
        try:
            with open_photo(io.BytesIO(content), 'photo', max_pixels=10**6) as image:
                ImageOps.exif_transpose(image).convert('RGB')
        except BadInput as error:
            refused += 1
            assert str(error).startswith('photo: ') and '\n' not in str(error)
    assert refused > 400


def test_limits_and_formats_can_be_chosen():
    for options, message in (
        (
            {'max_pixels': 599},
            'photo: found 20x30 pixels, expected at most 20,000 a side and 0 million in all',
        ),
        ({'formats': ['JPEG', 'BMP']}, 'photo: cannot be decoded, expected an image: JPEG, BMP'),
    ):
        with pytest.raises(BadInput) as error, open_photo(io.BytesIO(encode('PNG')), 'photo', **options):
            pass
        assert str(error.value) == message
    with open_photo(io.BytesIO(encode('PNG')), 'photo', max_pixels=600) as image:
        assert image.size == (30, 20)


def test_faults_of_a_photo_in_a_data_set(tmp_path):
    root = write_set(tmp_path / 'd', train=1, test=1, side=64)
    coco = read_coco(root, 'train', CLASSES)
    record = coco.photos[0]
    path = coco.path(record)
    content = path.read_bytes()
    assert read_photo(coco, record).shape == (64, 64, 3)

    def refused(message):
        with pytest.raises(BadInput, match=message) as error:
            read_photo(coco, record)
        assert str(path) in str(error.value)

    path.write_bytes(content[: len(content) * 2 // 3])
    refused('cannot be decoded')
    path.write_bytes(b'not an image')
    refused('cannot be decoded, expected an image: BMP, JPEG')
    Image.new('L', (64, 64)).save(path)
    refused('found mode L, expected a photo in RGB')
    Image.new('RGB', (32, 64)).save(path)
    refused('found 64x32 pixels, its record says 64x64')
    path.unlink()
    refused('no such image')


def test_upright_size_decodes_the_whole_photo(tmp_path):
    path: Path = tmp_path / 'cut.jpg'
    path.write_bytes(encode('JPEG'))
    assert upright_size(path) == (30, 20)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 4), np.uint8)
    Image.fromarray(noise, 'CMYK').save(path)
    path.write_bytes(path.read_bytes()[:-400])
    with pytest.raises(BadInput, match=r'cut\.jpg: cannot be decoded: image file is truncated'):
        upright_size(path)
