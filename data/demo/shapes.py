"""Build the shapes of the demo set's objects: outlines, boxes, solids of revolution.

Shapes: h w a canvas's own height and width, M corners of an outline, F faces. `size` is about the longest
side in pixels; `light` is a unit vector to the light in the canvas's axes (x right, y down, z to the viewer).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import cv2
import numpy as np

from data.demo.textures import Array, Rng, grid, noise

MARGIN = 8  # pixels of canvas around an outline


@dataclass(frozen=True)
class Cutout:
    """Hold an object on its own canvas; it is painted beyond its outline, so that its edge has no fringe."""

    outline: Array  # (M, 2) x y
    image: Array  # (h, w, 3) float32 RGB
    opacity: Array  # (h, w) float32; the ground shows through below 1
    height: float = 0.15  # above the ground, relative to its size; sets the length of the shadow
    haze: float = 0.0  # blur in pixels of the ground that shows through


Drawer = Callable[[Rng, float, Array], Cutout]  # rng, size, light


def opaque(outline: Array, image: Array, height: float) -> Cutout:
    return Cutout(outline, np.float32(image), np.ones(image.shape[:2], np.float32), height)


def translucent(outline: Array, image: Array, opacity: Array, height: float, haze: float) -> Cutout:
    return Cutout(outline, np.float32(image), np.float32(np.clip(opacity, 0, 1)), height, haze)


def bend(cutout: Cutout, rng: Rng, amount: float) -> Cutout:
    """Warp a cutout by smooth noise; `amount` is relative to its size."""
    shape = cutout.opacity.shape
    size = max(shape)
    dx, dy = (np.float32(amount * size) * noise(rng, shape, size / 2, 2) for _ in range(2))
    x, y = grid(shape)
    image, opacity = (
        cv2.remap(a, x - dx, y - dy, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)
        for a in (cutout.image, cutout.opacity)
    )
    column, row = (np.clip(np.int32(cutout.outline[:, k]), 0, shape[1 - k] - 1) for k in (0, 1))
    outline = cutout.outline + np.stack([dx[row, column], dy[row, column]], 1)
    return replace(cutout, outline=np.float32(outline), image=image, opacity=opacity)


def canvas_size(width: float, height: float) -> tuple[int, int]:
    """Return the (h, w) of a canvas for an object of that size."""
    return int(height + 2 * MARGIN), int(width + 2 * MARGIN)


def canvas_around(outline: Array) -> tuple[int, int]:
    """Return the (h, w) of the canvas for an outline."""
    width, height = outline.max(0)
    return int(height) + MARGIN, int(width) + MARGIN


def polyline(points: Sequence | Array, rng: Rng, rough: float) -> Array:
    """Draw an (M, 2) closed outline through the points, a corner every 6 pixels, `rough` pixels uneven."""
    points = np.asarray(points, np.float32)
    parts = []
    for point, edge in zip(points, np.roll(points, -1, 0) - points, strict=True):
        steps = np.linspace(0, 1, max(int(np.hypot(*edge) / 6), 1), endpoint=False)
        parts.append(point + edge * steps[:, None])
    dense = np.concatenate(parts)
    moves = rng.normal(0, rough, dense.shape)
    return np.float32(dense + (moves + np.roll(moves, 1, 0) + np.roll(moves, -1, 0)) / 1.7)


def rectangle(width: float, height: float, rng: Rng, rough: float, skew: float) -> Array:
    """Draw the (M, 2) outline of a sheet; its corners move inward by up to `skew` of its size."""
    corners = np.array([(0, 0), (width, 0), (width, height), (0, height)]) + MARGIN
    inward = np.array([(1, 1), (-1, 1), (-1, -1), (1, -1)]) * rng.uniform(0, skew, (4, 2)) * (width, height)
    return polyline(corners + inward, rng, rough)


def blob(rng: Rng, width: float, height: float, lumps: float, spikes: float) -> Array:
    """Draw the (M, 2) outline of a lump: an ellipse with waves and spikes."""
    angle = np.linspace(0, 2 * np.pi, 72, endpoint=False)
    radius = np.ones(72) + rng.normal(0, spikes, 72)
    for k in range(2, 7):
        radius += rng.normal(0, lumps / k**0.5) * np.cos(k * angle + rng.uniform(0, 7))
    radius = np.clip(radius + np.roll(radius, 1), 0.8, 3) / 2  # the mean of two neighbours, without sawteeth
    points = np.stack([np.cos(angle) * radius * width, np.sin(angle) * radius * height], 1) / 2
    return np.float32(points - points.min(0) + MARGIN)


def fill_outline(outline: Array, shape: tuple[int, int]) -> Array:
    """Fill an outline: (h, w) uint8, 1 inside."""
    return cv2.fillPoly(np.zeros(shape, np.uint8), [np.int32(outline)], 1)


def largest_contour(mask: Array) -> Array:
    """Return the (M, 2) outline of the largest part of a uint8 mask."""
    contours = cv2.findContours(mask, cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)[0]
    return np.float32(max(contours, key=len)[:, 0])


@dataclass(frozen=True)
class RoundBody:
    """Hold a solid of revolution, seen from the side and a little from above."""

    outline: Array  # (M, 2)
    u: Array  # (h, w) across it, -1 to 1
    v: Array  # (h, w) along its axis, 0 the top, 1 the bottom
    lid: Array  # (h, w) distance from the middle of its top: 1 on the rim
    shade: Array  # (h, w) brightness of a matt surface

    @property
    def shape(self) -> tuple[int, int]:
        return self.u.shape

    def stripe(self, at: float, width: float) -> Array:
        """Return the (h, w) strength of a highlight along the body."""
        return np.exp(-(((self.u - at) / width) ** 2))

    def ring(self, at: float, width: float) -> Array:
        """Return the (h, w) strength of a circle on its top."""
        return np.exp(-(((self.lid - at) / width) ** 2))

    def between(self, top: float, bottom: float) -> Array:
        """Return as (h, w) bool the part of its side between two heights."""
        return (self.v > top) & (self.v < bottom)

    def wrap(self, label: Array, top: float, bottom: float) -> Array:
        """Wrap a label around it between two heights: (h, w, 3), the label's edges repeated beyond."""
        x = np.float32((np.arcsin(self.u) / np.pi + 0.5) * (label.shape[1] - 1))
        y = np.float32((self.v - top) / (bottom - top) * (label.shape[0] - 1))
        return cv2.remap(label, x, y, cv2.INTER_LINEAR, borderMode=cv2.BORDER_REPLICATE)


def revolve(profile: Sequence[tuple[float, float]], size: float, tilt: float, light: Array) -> RoundBody:
    """Make the solid of a profile: (position on the axis, 0 to 1; radius relative to `size`)."""
    position, radius = np.float32(profile).T
    widest, first, last = radius.max() * size, radius[0] * size, radius[-1] * size
    shape = canvas_size(2 * widest, size + tilt * (first + last))
    middle, top = MARGIN + widest, MARGIN + tilt * first
    x, y = grid(shape)
    table = np.float32(np.interp(np.linspace(0, 1, 512), position, radius) * size)
    v = (y - top) / size
    for _ in range(3):  # fixed point: a pixel's height depends on the radius there, and that on the height
        around = table[np.int32(np.clip(v, 0, 1) * 511)]
        u = np.clip((x - middle) / np.maximum(around, 1), -1, 1)
        v = (y - top - tilt * around * np.sqrt(1 - u * u)) / size
    axis, arc = np.linspace(0, 1, 40), np.linspace(0, np.pi, 24)
    side = np.interp(axis, position, radius) * size
    right, left = (np.stack([middle + s, top + axis * size], 1) for s in (side, -side))
    lower = np.stack([middle + last * np.cos(arc), top + size + tilt * last * np.sin(arc)], 1)
    upper = np.stack([middle - first * np.cos(arc), top - tilt * first * np.sin(arc)], 1)
    outline = np.concatenate([right, lower, left[::-1], upper])
    lid = np.hypot((x - middle) / first, (y - top) / max(tilt * first, 1))
    shade = 0.4 + 0.75 * np.clip(u * light[0] + np.sqrt(1 - u * u) * light[2], 0, 1)
    return RoundBody(np.float32(outline), u, v, lid, np.float32(shade))


def box(width: float, height: float, depth: float) -> list[Array]:
    """Return six faces, (4, 3) each: front, back, left, right, top, bottom; the longest side is about 1."""
    x, y, z = width / 2, height / 2, depth / 2
    a, b, c, d = (-x, -y, z), (x, -y, z), (x, y, z), (-x, y, z)
    e, f, g, h = (-x, -y, -z), (x, -y, -z), (x, y, -z), (-x, y, -z)
    quads = ((a, b, c, d), (f, e, h, g), (e, a, d, h), (b, f, g, c), (e, f, b, a), (d, c, g, h))
    return [np.float32(quad) for quad in quads]


def polyhedron(
    rng: Rng, faces: Sequence[Array], pictures: Sequence[Array], size: float, light: Array
) -> Cutout:
    """Draw an about convex solid of F faces (4, 3) with their (h, w, 3) pictures from a random side above."""
    yaw, pitch = rng.uniform(0, 2 * np.pi), rng.uniform(0.35, 1.2)
    cy, sy, cp, sp = np.cos(yaw), np.sin(yaw), np.cos(pitch), np.sin(pitch)
    view = np.array([[1, 0, 0], [0, cp, sp], [0, -sp, cp]]) @ np.array([[cy, 0, sy], [0, 1, 0], [-sy, 0, cy]])
    corners = np.array(faces) @ view.T  # (F, 4, 3)
    centre = corners.reshape(-1, 3).mean(0)
    flat = corners[..., :2] * (1 + 0.12 * corners[..., 2:])
    flat = np.float32((flat - flat.min((0, 1))) / np.ptp(flat, (0, 1)).max() * size + MARGIN)
    shape = canvas_around(flat.reshape(-1, 2))
    image, mask = np.zeros((*shape, 3), np.float32), np.zeros(shape, np.uint8)
    for k in np.argsort(corners[..., 2].mean(1)):  # farthest first
        normal = np.cross(corners[k, 1] - corners[k, 0], corners[k, 3] - corners[k, 0])
        normal = normal / np.linalg.norm(normal)
        out = normal @ (corners[k].mean(0) - centre)
        normal = normal * np.sign(normal[2] if abs(out) < 0.05 else out)  # both sides of a fin are visible
        if normal[2] <= 0.02:
            continue
        h, w = pictures[k].shape[:2]
        matrix = cv2.getPerspectiveTransform(np.float32([(0, 0), (w, 0), (w, h), (0, h)]), flat[k])
        drawn = cv2.warpPerspective(pictures[k], matrix, shape[::-1], borderMode=cv2.BORDER_REPLICATE)
        quad = np.int32(flat[k].round())
        part = cv2.fillConvexPoly(np.zeros(shape, np.uint8), quad, 1)
        mask |= part
        image[part > 0] = drawn[part > 0] * (0.42 + 0.65 * max(normal @ light, 0))
        cv2.polylines(image, [quad], True, image[part > 0].mean(0).tolist(), 1, cv2.LINE_AA)
    weight = np.maximum(cv2.blur(np.float32(mask), (13, 13)), 1e-3)[..., None]
    beyond = cv2.blur(image * mask[..., None], (13, 13)) / weight
    return opaque(largest_contour(mask), np.where(mask[..., None] > 0, image, beyond), 0.3)
