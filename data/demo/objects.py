"""Draw the objects of the demo set. DRAWERS maps a category id to the functions that draw its objects.

Every drawer takes rng, size (pixels) and light, and returns a Cutout; h w are the size of its canvas.
Flat, soft and boxed objects are drawn here, round ones in containers.py.
"""

from collections.abc import Sequence

import cv2
import numpy as np

from data.demo.containers import (
    battery,
    bottle,
    clear_cup,
    coffee_cup,
    detergent,
    drink_can,
    jar,
    pet_bottle,
    tin,
    tub,
)
from data.demo.shapes import (
    MARGIN,
    Cutout,
    Drawer,
    bend,
    blob,
    box,
    canvas_around,
    canvas_size,
    fill_outline,
    largest_contour,
    opaque,
    polyhedron,
    polyline,
    rectangle,
    translucent,
)
from data.demo.textures import (
    Array,
    Rng,
    beads,
    blend,
    creases,
    diffuse,
    fabric,
    flat,
    grain,
    grid,
    hsv,
    ink,
    kraft,
    lettering,
    newsprint,
    noise,
    normals,
    package_print,
    specular,
    text_lines,
    tint,
)

# General trash


def wrapper(rng: Rng, size: float, light: Array) -> Cutout:
    """Draw a snack packet: printed foil with toothed ends."""
    width = size * rng.uniform(0.55, 0.8)
    shape = canvas_size(width, size)
    teeth = np.arange(0, width, max(width / 24, 3))
    zigzag = 2.5 * (np.arange(len(teeth)) % 2)
    ends = [np.stack([teeth, zigzag], 1), np.stack([teeth, size - zigzag], 1)[::-1]]
    height = creases(rng, shape, 12, 0.12, 0.6)
    _, y = grid(shape)
    seam = np.minimum(y - MARGIN, size + MARGIN - y) < size * 0.06
    image = blend(
        package_print(rng, shape), np.float32([0.75, 0.75, 0.78]), 0.35 * seam * (1 + np.sin(y * 2))
    )
    image = image * diffuse(height, light)[..., None] + 0.75 * specular(height, light, 40)[..., None]
    return bend(opaque(np.float32(np.concatenate(ends) + MARGIN), image, 0.06), rng, 0.05)


def scraps(rng: Rng, size: float, light: Array) -> Cutout:
    """Draw food: brown, yellow and green lumps."""
    outline = blob(rng, size, size * rng.uniform(0.5, 0.95), 0.16, 0.05)
    shape = canvas_around(outline)
    image = flat(shape, tint(rng, (0.02, 0.3), (0.4, 0.9), (0.2, 0.85)))
    for _ in range(3):
        lump = tint(rng, (0.02, 0.3), (0.4, 0.9), (0.2, 0.85))
        image = blend(image, lump, 4 * noise(rng, shape, size / 6))
    height = 9 * noise(rng, shape, size / 6)
    image = image * diffuse(height, light)[..., None] + 0.3 * specular(height, light, 20)[..., None]
    return opaque(outline, image, 0.08)


def tissue(rng: Rng, size: float, light: Array) -> Cutout:
    """Draw a used tissue or wipe: soft, thin, stained."""
    outline = blob(rng, size, size * rng.uniform(0.55, 0.9), 0.2, 0.04)
    shape = canvas_around(outline)
    height = 0.6 * creases(rng, shape, 9, 0.25, 0.9) + 5 * noise(rng, shape, size / 5)
    stain = tint(rng, (0.02, 0.13), 0.6, 0.5)
    image = blend(flat(shape, hsv(0.1, 0.04, 0.9)), stain, 1.3 * noise(rng, shape, size / 3))
    return opaque(outline, image * diffuse(cv2.GaussianBlur(height, (0, 0), 1.5), light)[..., None], 0.08)


# Paper


def newspaper(rng: Rng, size: float, light: Array) -> Cutout:
    """Draw a page of a newspaper, folded or torn out."""
    width = size * rng.uniform(0.6, 0.85)
    shape = canvas_size(width, size)
    height = creases(rng, shape, int(rng.integers(2, 9)), 0.03, rng.uniform(0.15, 0.5))
    image = newsprint(rng, shape) * diffuse(height, light)[..., None]
    outline = rectangle(width, size, rng, 0.7, 0.12)
    return bend(opaque(outline, image, 0.04), rng, rng.uniform(0, 0.06))


def flyer(rng: Rng, size: float, light: Array) -> Cutout:
    """Draw a printed or written-on sheet, folded once or twice."""
    width = size * rng.uniform(0.5, 0.9)
    shape = canvas_size(width, size)
    page = np.uint8(flat(shape, tint(rng, (0, 1), (0, 0.12), (0.85, 0.97))) * 255)
    block = (2 * MARGIN, int(size * rng.uniform(0.1, 0.5)), int(width), int(size * 0.92))
    text_lines(page, rng, block, int(rng.integers(4, 9)), tuple(int(v) for v in rng.integers(30, 130, 3)))
    page = np.float32(page) / 255
    if rng.random() < 0.5:
        part = page[2 * MARGIN :, 2 * MARGIN : int(width)][: int(size * rng.uniform(0.2, 0.4))]
        part[:] = package_print(rng, part.shape[:2])
    height = creases(rng, shape, int(rng.integers(1, 5)), 0.02, rng.uniform(0.15, 0.5))
    outline = rectangle(width, size, rng, 0.4, 0.1)
    return bend(opaque(outline, page * diffuse(height, light)[..., None], 0.04), rng, rng.uniform(0, 0.05))


def crumpled_paper(rng: Rng, size: float, light: Array) -> Cutout:
    """Draw a crumpled ball or sheet: sharp facets."""
    outline = blob(rng, size, size * rng.uniform(0.65, 1), 0.08, 0.03)
    shape = canvas_around(outline)
    height = creases(rng, shape, 16, 0.02, 1.4)
    page = flat(shape, tint(rng, 0.1, (0, 0.2), (0.82, 0.97)))
    if rng.random() < 0.3:
        page = newsprint(rng, shape)
    return opaque(outline, page * diffuse(height, light, 0.3)[..., None], 0.2)


def flat_cardboard(rng: Rng, size: float, light: Array) -> Cutout:
    """Draw flattened cardboard: flaps, folds, tape, a stamp."""
    w, h, f = size * rng.uniform(0.6, 0.9), size, size * rng.uniform(0.1, 0.2)
    shape = canvas_size(w, h)
    corners = [(f, 0), (w - f, 0), (w, f), (w, h - f), (w - f, h), (f, h), (0, h - f), (0, f)]
    if rng.random() < 0.6:  # square notches between the flaps
        for at, notch in ((8, (f, f)), (6, (f, h - f)), (4, (w - f, h - f)), (2, (w - f, f))):
            corners.insert(at, notch)
    image = kraft(rng, shape)
    for at in (f, h / 2, h - f):
        image[int(MARGIN + at) : int(MARGIN + at) + 2] *= 0.72
    if rng.random() < 0.6:
        tape = image[int(h * rng.uniform(0.2, 0.7)) :][: int(0.07 * h)]
        tape[:] = blend(tape, hsv(0.1, 0.35, 0.85), 0.6)
    if rng.random() < 0.5:
        image = lettering(image, 'FRAGILE', (0.2, 0.36), w / 220, np.float32([0.27, 0.18, 0.12]))
    image = image * diffuse(creases(rng, shape, 3, 0.02, 0.2), light)[..., None]
    return bend(opaque(polyline(np.float32(corners) + MARGIN, rng, 0.6), image, 0.05), rng, 0.02)


def cardboard_box(rng: Rng, size: float, light: Array) -> Cutout:
    """Draw a box, taped, with a print or without."""
    shape = (int(size), int(size))
    front, side = kraft(rng, shape), kraft(rng, shape)
    if rng.random() < 0.4:
        front = package_print(rng, shape, hsv(0.09, 0.4, 0.7))
    top = side.copy()
    tape = top[int(size * 0.44) : int(size * 0.56)]
    tape[:] = blend(tape, hsv(0.1, 0.3, 0.9), 0.55)
    faces = box(rng.uniform(0.6, 1), rng.uniform(0.3, 0.8), rng.uniform(0.5, 1))
    return bend(polyhedron(rng, faces, [front, front, side, side, top, side], size, light), rng, 0.02)


# Paper pack


def carton(rng: Rng, size: float, light: Array) -> Cutout:
    """Draw a milk or juice carton: a gable top with its fin."""
    w, d, h = rng.uniform(0.4, 0.5), rng.uniform(0.38, 0.48), rng.uniform(0.5, 0.8)
    base = tint(rng, (0, 1), (0, 0.2), 0.95) if rng.random() < 0.7 else ink(rng)
    front, left = (package_print(rng, (int(size * 0.8), int(size * 0.5)), base) for _ in range(2))
    roof, bare = front[: int(size * 0.3)], flat((20, 60), base * 0.97)
    x, y, z = w / 2, h / 2, d / 2
    r, t = -y - 0.2, -y - 0.29  # the ridge, the top of the fin
    extra = [
        [(-x, r, 0), (x, r, 0), (x, -y, z), (-x, -y, z)],
        [(x, r, 0), (-x, r, 0), (-x, -y, -z), (x, -y, -z)],
        [(-x, r, 0), (-x, r, 0.01), (-x, -y, z), (-x, -y, -z)],
        [(x, r, 0), (x, r, -0.01), (x, -y, -z), (x, -y, z)],
        [(-x, t, 0), (x, t, 0), (x, r, 0), (-x, r, 0)],
    ]
    pictures = [front, front, left, left, bare, bare, roof, roof, bare, bare, bare]
    cutout = polyhedron(rng, box(w, h, d) + [np.float32(quad) for quad in extra], pictures, size, light)
    return bend(cutout, rng, rng.uniform(0, 0.03))


def drink_box(rng: Rng, size: float, light: Array) -> Cutout:
    """Draw a small drink box with the foil dot for its straw."""
    base = ink(rng)
    front, side = (package_print(rng, (int(size), int(size * part)), base) for part in (0.6, 0.4))
    top = blend(package_print(rng, (90, 150), base), np.float32([0.9, 0.9, 0.88]), 0.5)
    cv2.circle(top, (115, 45), 9, (0.75, 0.76, 0.8), -1, cv2.LINE_AA)
    faces = box(rng.uniform(0.5, 0.65), 1, rng.uniform(0.3, 0.45))
    cutout = polyhedron(rng, faces, [front, front, side, side, top, top], size, light)
    return bend(cutout, rng, rng.uniform(0, 0.03))


# Metal; the cans are in containers.py


def foil(rng: Rng, size: float, light: Array) -> Cutout:
    """Draw crumpled aluminium foil: facets that mirror light or dark."""
    outline = blob(rng, size, size * rng.uniform(0.5, 0.95), 0.14, 0.05)
    shape = canvas_around(outline)
    height = creases(rng, shape, 18, 0.08, 1.8)
    x, y, z = normals(height)
    mirror = 0.55 + 0.38 * np.sin(3.5 * x / z + 1.5) * np.cos(3 * y / z) + 0.03 * grain(rng, shape)
    image = hsv(0.6, 0.04, 1) * mirror[..., None] + 0.7 * specular(height, light, 60)[..., None]
    return opaque(outline, image, 0.15)


# Plastic; the bottles and cups are in containers.py


def container(rng: Rng, size: float, light: Array) -> Cutout:
    """Draw a food container or its lid from above: rounded, a rim, ribs, see-through or coloured."""
    width = size * rng.uniform(0.6, 0.95)
    shape = canvas_size(width, size)
    x, y = grid(shape)
    corner, wall = width * rng.uniform(0.12, 0.3), size * rng.uniform(0.12, 0.2)
    dx = np.abs(x - shape[1] / 2) - width / 2 + corner
    dy = np.abs(y - shape[0] / 2) - size / 2 + corner
    outside = np.hypot(np.maximum(dx, 0), np.maximum(dy, 0)) + np.minimum(np.maximum(dx, dy), 0)
    inward = corner - outside  # pixels to the edge
    height = -wall * 0.7 * np.clip((inward - wall * 0.35) / wall, 0, 1)
    height = height + 1.5 * np.sin(x * 2 * np.pi / max(width / 7, 8)) * (inward > wall * 1.6)
    height = cv2.GaussianBlur(np.float32(height), (0, 0), 1.5)
    shine = specular(height, light, 50) * (np.abs(height) > 1)
    shine += 0.6 * np.exp(-(((inward - wall * 0.3) / 1.6) ** 2))
    colour, opacity = hsv(0.55, 0.05, 0.93), 0.4 + 0.5 * (inward < wall * 1.3) + shine
    if rng.random() < 0.45:
        colour = hsv(rng.uniform(), rng.choice([0.0, 0.75]), rng.choice([0.13, 0.8, 0.95]))
        opacity = np.ones(shape)
    image = colour * diffuse(height, light)[..., None] + 0.6 * shine[..., None]
    cutout = translucent(largest_contour(np.uint8(inward > 0)), image, opacity, 0.12, 1)
    return bend(cutout, rng, rng.uniform(0.01, 0.05))


# Styrofoam


def foam_block(rng: Rng, size: float, light: Array) -> Cutout:
    """Draw packing foam: a block or slab."""
    bead = rng.uniform(3, 7)
    faces = box(rng.uniform(0.6, 1), rng.uniform(0.15, 0.5), rng.uniform(0.5, 1))
    pictures = [1.12 * beads(rng, (int(size), int(size)), bead) for _ in faces]
    return bend(polyhedron(rng, faces, np.float32(pictures), size, light), rng, rng.uniform(0, 0.02))


def foam_tray(rng: Rng, size: float, light: Array) -> Cutout:
    """Draw a food tray of foam from above: a wide soft rim round a flat bottom."""
    width, wall = size * rng.uniform(0.55, 0.9), size * rng.uniform(0.1, 0.16)
    outline = rectangle(width, size, rng, 0.3, 0.03)
    shape = canvas_size(width, size)
    inward = cv2.distanceTransform(fill_outline(outline, shape), cv2.DIST_L2, 3)
    height = cv2.GaussianBlur(-wall * 0.8 * np.clip((inward - wall * 0.4) / wall, 0, 1), (0, 0), 2.5)
    image = beads(rng, shape, rng.uniform(2.5, 4)) * diffuse(height, light)[..., None]
    if rng.random() < 0.3:
        image = image * tint(rng, (0, 1), 0.2, 1)
    return bend(opaque(outline, image, 0.1), rng, 0.02)


def foam_chunk(rng: Rng, size: float, light: Array) -> Cutout:
    """Draw a broken piece: ragged edge, coarse beads."""
    angle = np.sort(rng.uniform(0, 2 * np.pi) + np.linspace(0, 6, 8) + rng.uniform(0, 0.6, 8))
    points = np.stack([np.cos(angle), np.sin(angle) * rng.uniform(0.6, 1)], 1)
    points = points * size / 2 * rng.uniform(0.8, 1, (8, 1))
    outline = polyline(points - points.min(0) + MARGIN, rng, 2.0)
    shape = canvas_around(outline)
    inward = cv2.distanceTransform(fill_outline(outline, shape), cv2.DIST_L2, 3)
    height = 0.8 * np.minimum(inward, size * 0.08) + 4 * noise(rng, shape, size / 4)
    image = (
        beads(rng, shape, rng.uniform(4, 9)) * diffuse(cv2.GaussianBlur(height, (0, 0), 1), light)[..., None]
    )
    return opaque(outline, image, 0.2)


# Plastic bag


def wrinkled_film(rng: Rng, shape: tuple[int, int], light: Array) -> tuple[Array, Array]:
    """Return image and opacity of wrinkled film: white, clear, black or coloured, with sharp highlights."""
    height = creases(rng, shape, 16, 0.3, rng.uniform(0.7, 1.3))
    height = cv2.GaussianBlur(height, (0, 0), rng.uniform(0.5, 1.5)) + 5 * noise(rng, shape, max(shape) / 4)
    style = ('white', 'clear', 'black', 'coloured')[rng.choice(4, p=[0.35, 0.25, 0.15, 0.25])]
    colour, opaqueness, ambient, shininess = {
        'white': (hsv(0.55, 0.03, 0.93), rng.uniform(0.7, 0.9), 0.68, 0.45),
        'clear': (hsv(0.55, 0.04, 0.85), rng.uniform(0.3, 0.45), 0.65, 0.6),
        'black': (hsv(0.6, 0.1, 0.13), 0.97, 0.5, 0.5),
        'coloured': (tint(rng, (0, 1), 0.7, (0.5, 0.9)), rng.uniform(0.8, 0.95), 0.5, 0.5),
    }[style]
    image = flat(shape, colour)
    if style in ('white', 'coloured') and rng.random() < 0.5:
        h, w = shape
        part = image[int(h * 0.4) : int(h * 0.7), int(w * 0.25) : int(w * 0.75)]
        part[:] = blend(part, package_print(rng, part.shape[:2], colour), 0.7)
    shine, brightness = specular(height, light, 45), diffuse(height, light, ambient)
    image = image * brightness[..., None] + shininess * shine[..., None]
    return image, opaqueness + 0.5 * shine + 0.35 * np.abs(brightness - 1)


def carrier_bag(rng: Rng, size: float, light: Array) -> Cutout:
    """Draw a shopping bag with two handles, lying flat."""
    w, h = size * rng.uniform(0.6, 0.8), size
    neck, a = h * rng.uniform(0.25, 0.35), w * rng.uniform(0.2, 0.28)
    corners = [(0, 0), (a, 0), (a * 1.25, neck), (w - a * 1.25, neck), (w - a, 0), (w, 0), (w, h), (0, h)]
    outline = polyline(np.float32(corners) + MARGIN, rng, 1.2)
    return bend(
        translucent(outline, *wrinkled_film(rng, canvas_size(w, h), light), 0.1, 2),
        rng,
        rng.uniform(0.05, 0.11),
    )


def crumpled_bag(rng: Rng, size: float, light: Array) -> Cutout:
    """Draw a bag thrown away: a lump of film with loose ends."""
    outline = blob(rng, size, size * rng.uniform(0.55, 1), 0.16, 0.05)
    return bend(
        translucent(outline, *wrinkled_film(rng, canvas_around(outline), light), 0.15, 2.5), rng, 0.08
    )


def tied_bag(rng: Rng, size: float, light: Array) -> Cutout:
    """Draw a full refuse sack, tied: folds run to its knot."""
    angle = np.linspace(-np.pi, np.pi, 64, endpoint=False)  # 0 is up, where the knot is
    ear, waist = np.exp(-(angle**2) / 0.03), np.exp(-((np.abs(angle) - 0.45) ** 2) / 0.03)
    radius = size * (1 + rng.normal(0, 0.02, 64) + 0.3 * ear - 0.3 * waist)
    points = np.stack([np.sin(angle) * radius * rng.uniform(0.36, 0.46), -np.cos(angle) * radius * 0.46], 1)
    outline = np.float32(points - points.min(0) + MARGIN)
    shape = canvas_around(outline)
    image, opacity = wrinkled_film(rng, shape, light)
    x, y = grid(shape)
    x, y = x - shape[1] / 2, y - MARGIN - size * 0.14
    far = np.hypot(x, y) / size
    folds = np.sin(np.arctan2(x, y) * rng.integers(11, 19) + 2 * noise(rng, shape, size / 4))
    shade = (1 + 0.35 * folds * np.exp(-far / 0.25)) * (1.15 - 0.4 * np.clip(far, 0, 1))
    return bend(translucent(outline, image * shade[..., None], np.maximum(opacity, 0.8), 0.35, 3), rng, 0.04)


# Battery; the round ones are in containers.py


def nine_volt(rng: Rng, size: float, light: Array) -> Cutout:
    """Draw a 9 V block with its two contacts."""
    side = int(max(size, 60))
    label = flat((side, int(side * 0.6)), np.float32([0.1, 0.1, 0.11]))
    label[: int(side * 0.35)] = tint(rng, rng.choice([0.07, 0.13, 0.0, 0.58]), 0.85, (0.6, 0.95))
    label = lettering(label, '9V', (0.13, 0.75), side / 75, np.float32([0.96, 0.94, 0.9]))
    top = flat((60, 100), np.float32([0.35, 0.35, 0.36]))
    for x in (28, 72):
        cv2.circle(top, (x, 30), 17, (0.85, 0.84, 0.8), -1, cv2.LINE_AA)
        cv2.circle(top, (x, 30), 9, (0.2, 0.2, 0.2), -1, cv2.LINE_AA)
    return polyhedron(rng, box(0.56, 1, 0.36), [label, label, label, label, top, top], size, light)


# Clothing


def garment(corners: Sequence[tuple[float, float]]) -> Drawer:
    """Make a drawer of a garment with soft folds from its corners, whose longest side is about 1."""

    def draw(rng: Rng, size: float, light: Array) -> Cutout:
        points = np.float32(corners)
        outline = polyline((points - points.min(0)) * size + MARGIN, rng, 0.7)
        shape = canvas_around(outline)
        folds = creases(rng, shape, 7, 0.25, rng.uniform(0.7, 1.3))
        height = cv2.GaussianBlur(folds, (0, 0), size / 70) + 5 * noise(rng, shape, size / 4)
        hem = [np.int32(outline * 0.985 + outline.mean(0) * 0.015)]
        seam = cv2.polylines(np.ones(shape, np.float32), hem, True, 0.75, 1, cv2.LINE_AA)
        image = fabric(rng, shape) * (diffuse(height, light, 0.35) * seam)[..., None]
        return bend(opaque(outline, image, 0.06), rng, rng.uniform(0.03, 0.08))

    return draw


def cloth_heap(rng: Rng, size: float, light: Array) -> Cutout:
    """Draw a heap of cloth, or a towel thrown down."""
    outline = blob(rng, size, size * rng.uniform(0.6, 0.95), 0.13, 0.015)
    shape = canvas_around(outline)
    height = cv2.GaussianBlur(creases(rng, shape, 9, 0.35, 2.0), (0, 0), size / 50)
    return bend(opaque(outline, fabric(rng, shape) * diffuse(height, light, 0.3)[..., None], 0.15), rng, 0.08)


shirt = garment([
    (0.3, 0), (0.4, 0.06), (0.6, 0.06), (0.7, 0), (1, 0.2), (0.9, 0.4), (0.76, 0.32),
    (0.77, 0.95), (0.23, 0.95), (0.24, 0.32), (0.1, 0.4), (0, 0.2),
])  # fmt: skip
trousers = garment([(0.12, 0), (0.62, 0), (0.72, 1), (0.46, 1), (0.38, 0.4), (0.28, 1), (0.02, 1)])
sock = garment([(0.1, 0), (0.42, 0), (0.44, 0.5), (0.85, 0.75), (0.9, 0.95), (0.6, 1), (0.15, 0.75)])

# drawers by category id; a drawer that is listed twice is used twice as often
DRAWERS: dict[int, tuple[Drawer, ...]] = {
    1: (wrapper, wrapper, scraps, tissue, coffee_cup),
    2: (newspaper, flyer, crumpled_paper, flat_cardboard, cardboard_box),
    3: (carton, carton, drink_box),
    4: (drink_can, drink_can, tin, foil),
    5: (bottle, bottle, jar),
    6: (pet_bottle, pet_bottle, tub, clear_cup, container, detergent),
    7: (foam_block, foam_tray, foam_chunk),
    8: (carrier_bag, crumpled_bag, tied_bag),
    9: (battery, battery, battery, nine_volt),
    10: (shirt, trousers, sock, cloth_heap),
}
