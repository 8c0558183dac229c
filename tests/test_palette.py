"""The palettes: any two colours can be told apart, whatever the eye."""

import numpy as np
import pytest

from config import CLASSES
from utils.palette import CONTEST_PALETTE, PALETTE

# Machado, Oliveira and Fernandes (2009), severity 1.0, of linear RGB
EYES = {
    'normal': np.eye(3),
    'protan': [
        [0.152286, 1.052583, -0.204868],
        [0.114503, 0.786281, 0.099216],
        [-0.003882, -0.048116, 1.051998],
    ],
    'deutan': [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ],
    'tritan': [
        [1.255528, -0.076749, -0.178779],
        [-0.078411, 0.930809, 0.147602],
        [0.004733, 0.691367, 0.303900],
    ],
}
TO_XYZ = [
    [0.4124564, 0.3575761, 0.1804375],
    [0.2126729, 0.7151522, 0.0721750],
    [0.0193339, 0.1191920, 0.9503041],
]
WHITE = (0.95047, 1.0, 1.08883)  # D65


def to_lab(colours: np.ndarray, eye: str) -> np.ndarray:
    """Return CIELAB of (n, 3) sRGB of 0 to 255, as an eye sees it."""
    values = colours / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    xyz = np.clip(linear @ np.transpose(EYES[eye]), 0, 1) @ np.transpose(TO_XYZ) / WHITE
    f = np.where(xyz > 216 / 24389, np.cbrt(xyz), (24389 / 27 * xyz + 16) / 116)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], -1)


def ciede2000(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Sharma, Wu and Dalal (2005): the difference of CIELAB colours (..., 3)."""
    (L1, a1, b1), (L2, a2, b2) = np.moveaxis(one, -1, 0), np.moveaxis(other, -1, 0)
    chroma = (np.hypot(a1, b1) + np.hypot(a2, b2)) / 2
    stretch = 1.5 - 0.5 * np.sqrt(chroma**7 / (chroma**7 + 25.0**7))
    C1, C2 = np.hypot(a1 * stretch, b1), np.hypot(a2 * stretch, b2)
    h1 = np.degrees(np.arctan2(b1, a1 * stretch)) % 360
    h2 = np.degrees(np.arctan2(b2, a2 * stretch)) % 360
    turn = np.where(C1 * C2 == 0, 0, (h2 - h1 + 180) % 360 - 180)
    hue = np.where(C1 * C2 == 0, h1 + h2, (h1 + turn / 2) % 360)
    L, C = (L1 + L2) / 2, (C1 + C2) / 2
    T = 1 - 0.17 * np.cos(np.radians(hue - 30)) + 0.24 * np.cos(np.radians(2 * hue))
    T += 0.32 * np.cos(np.radians(3 * hue + 6)) - 0.2 * np.cos(np.radians(4 * hue - 63))
    dL = (L2 - L1) / (1 + 0.015 * (L - 50) ** 2 / np.sqrt(20 + (L - 50) ** 2))
    dC = (C2 - C1) / (1 + 0.045 * C)
    dH = 2 * np.sqrt(C1 * C2) * np.sin(np.radians(turn / 2)) / (1 + 0.015 * C * T)
    rotation = -2 * np.sqrt(C**7 / (C**7 + 25.0**7))
    rotation *= np.sin(np.radians(60 * np.exp(-(((hue - 275) / 25) ** 2))))
    return np.sqrt(np.maximum(0, dL**2 + dC**2 + dH**2 + rotation * dC * dH))


def smallest(colours: np.ndarray, eye: str) -> float:
    lab = to_lab(colours.astype(float), eye)
    return float((ciede2000(lab[:, None], lab[None]) + 1e3 * np.eye(len(lab))).min())


@pytest.mark.parametrize(
    ('one', 'other', 'expected'),
    [
        ((50, 2.6772, -79.7751), (50, 0, -82.7485), 2.0425),
        ((50, 2.5, 0), (50, 0, -2.5), 4.3065),
        ((50, 2.5, 0), (73, 25, -18), 27.1492),
        ((60.2574, -34.0099, 36.2677), (60.4626, -34.1751, 39.4387), 1.2644),
        ((22.7233, 20.0904, -46.6940), (23.0331, 14.9730, -42.5619), 2.0373),
        ((6.7747, -0.2908, -2.4247), (5.8714, -0.0985, -2.2286), 0.6377),
    ],
)
def test_ciede2000_is_that_of_its_authors(one, other, expected):
    assert round(float(ciede2000(np.array(one, float), np.array(other, float))), 4) == expected


@pytest.mark.parametrize('eye', EYES)
def test_any_two_classes_can_be_told_apart_by_every_eye(eye):
    """Background, class 0, is not drawn where it is no object, but has a colour of its own."""
    assert smallest(PALETTE[: len(CLASSES)], eye) > 20
    assert smallest(CONTEST_PALETTE[1 : len(CLASSES)], eye) < 10  # its purples
    assert smallest(PALETTE[[*range(len(CLASSES)), 255]], eye) > 10  # white, for IGNORED, among them
    for count, gap in ((29, 7), (60, 5), (150, 3), (255, 2)):  # what the docstring says of more classes
        assert smallest(PALETTE[:count], eye) > gap


def test_palettes_are_whole_and_never_repeat():
    for palette in (PALETTE, CONTEST_PALETTE):
        assert palette.shape == (256, 3) and palette.dtype == np.uint8
        assert len(np.unique(palette, axis=0)) == 256 and palette[255].tolist() == [255] * 3
    rounded = (PALETTE.astype(int) + 4) // 8 * 8
    assert (rounded.clip(max=255) == PALETTE).all()  # by write_png
    colours = [[192, 0, 128], [192, 192, 128], [128, 0, 192]]
    assert CONTEST_PALETTE[[1, 8, 10]].tolist() == colours  # the organiser's, of General trash to Clothing
