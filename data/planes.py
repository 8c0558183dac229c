"""Masks of classes that may overlap: a plane for each class, packed into bits for the cache and for training.

Planes are (K, H, W) uint8: 0, 1, or IGNORED. Packed they are (H, W, 2P) uint8 with P = K/8, rounded up: P
bytes of the bits that are 1, then P bytes of the bits that are known; class k is bit k % 8 of byte k // 8. So
a mask is resized with nearest, cut and turned like a photo, and 0 outside of it means not known.
"""

import numpy as np

from metrics import IGNORED


def pack(planes: np.ndarray) -> np.ndarray:
    """Pack (K, H, W) uint8 planes of 0, 1 and IGNORED → (H, W, 2P) uint8."""
    bits = [np.packbits(which, axis=0, bitorder='little') for which in (planes == 1, planes != IGNORED)]
    return np.ascontiguousarray(np.concatenate(bits).transpose(1, 2, 0))


def unpack(packed: np.ndarray, num_classes: int) -> np.ndarray:
    """Unpack (H, W, 2P) uint8 → (K, H, W) uint8 planes of 0, 1 and IGNORED."""
    true, known = (
        np.unpackbits(part.transpose(2, 0, 1), axis=0, count=num_classes, bitorder='little')
        for part in np.split(packed, 2, axis=2)
    )
    return np.where(known, true, np.uint8(IGNORED))


def pack_nothing(size: tuple[int, int], num_classes: int) -> np.ndarray:
    """Make the packed planes of a photo of size (H, W) without an object: (H, W, 2P) uint8, all known."""
    pixel = pack(np.zeros((num_classes, 1, 1), np.uint8))
    return np.broadcast_to(pixel, (*size, pixel.shape[2])).copy()


def write_plane(packed: np.ndarray, class_id: int, plane: np.ndarray) -> None:
    """Change the plane of one class, (H, W) of 0, 1 and IGNORED, in packed planes (H, W, 2P)."""
    byte, bit = divmod(class_id, 8)
    for first, values in ((0, plane == 1), (packed.shape[2] // 2, plane != IGNORED)):
        packed[..., first + byte] &= np.uint8(255 - (1 << bit))
        packed[..., first + byte] |= values.astype(np.uint8) << np.uint8(bit)


def read_plane(packed: np.ndarray, class_id: int) -> np.ndarray:
    """Return the plane of one class, (H, W) uint8 of 0, 1 and IGNORED, of packed planes (H, W, 2P)."""
    byte, bit = divmod(class_id, 8)
    true, known = ((packed[..., first + byte] >> np.uint8(bit)) & 1 for first in (0, packed.shape[2] // 2))
    return np.where(known, true, np.uint8(IGNORED))


def packed_depth(num_classes: int) -> int:
    """Return 2P, the bytes of a pixel."""
    return 2 * -(-num_classes // 8)
