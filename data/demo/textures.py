"""Draw the surfaces of the demo set from noise: grounds, prints, creases, and their shading.

Shapes: h w a picture's own height and width. Pictures are float32 RGB from 0 to 1; `light` is a unit vector
to the light (x right, y down, z to the viewer). A function that takes `rng` draws all its numbers from it.
"""

import colorsys

import cv2
import numpy as np

Array = np.ndarray
Rng = np.random.Generator
Shape = tuple[int, int]
Amount = float | tuple[float, float]  # a number, or a range to draw from
FONT = cv2.FONT_HERSHEY_DUPLEX
WORDS = 'FRESH SODA COLA MILK JUICE GREEN EXTRA SUN DAILY MAX PURE SNACK ORANGE ECO'


def noise(rng: Rng, shape: Shape, cell: float, octaves: int = 3) -> Array:
    """Draw (h, w) of smooth noise, about -1 to 1, with lumps of `cell` pixels; each octave halves them."""
    height, width = shape
    total = np.zeros(shape, np.float32)
    for octave in range(octaves):
        step = max(cell / 2**octave, 1.0)
        grid = rng.standard_normal((int(height / step) + 3, int(width / step) + 3), np.float32)
        total += 0.5**octave * cv2.resize(grid, (width, height), interpolation=cv2.INTER_CUBIC)
    return total * 0.6


def grain(rng: Rng, shape: Shape) -> Array:
    """Draw (h, w) of independent noise."""
    return rng.standard_normal(shape, np.float32)


def grid(shape: Shape) -> tuple[Array, Array]:
    """Return x and y of every pixel, (h, w) each."""
    y, x = np.mgrid[: shape[0], : shape[1]].astype(np.float32)
    return x, y


def creases(rng: Rng, shape: Shape, count: int, warp: float = 0.0, slope: float = 0.35) -> Array:
    """Draw the (h, w) height in pixels of a crumpled sheet: `count` pleats in random directions, bent."""
    size = max(shape)
    x, y = grid(shape)
    if warp:
        x += warp * size * noise(rng, shape, size / 3)
        y += warp * size * noise(rng, shape, size / 3)
    height = np.zeros(shape, np.float32)
    for _ in range(count):
        angle, period = rng.uniform(0, np.pi), size * rng.uniform(0.12, 0.8)
        along = (x * np.float32(np.cos(angle)) + y * np.float32(np.sin(angle))) / period + rng.uniform(0, 2)
        height += rng.uniform(0.3, 1) * period * np.abs(along % 2 - 1)
    return height * np.float32(slope / np.sqrt(count))


def normals(height: Array) -> tuple[Array, Array, Array]:
    """Return the unit normals (x, y, z) of a height field in pixels, (h, w) each."""
    x, y = (cv2.Sobel(height, cv2.CV_32F, *d, ksize=3, scale=-1 / 8) for d in ((1, 0), (0, 1)))
    z = 1 / np.sqrt(1 + x * x + y * y)
    return x * z, y * z, z


def diffuse(height: Array, light: Array, ambient: float = 0.45) -> Array:
    """Return the (h, w) brightness of a matt height field; flat parts have 1."""
    x, y, z = normals(height)
    return ambient + (1 - ambient) * np.clip((x * light[0] + y * light[1] + z * light[2]) / light[2], 0, 2.2)


def specular(height: Array, light: Array, power: float = 30) -> Array:
    """Return the (h, w) highlights of a shiny height field, 0 to 1."""
    x, y, z = normals(height)
    half = light + np.array([0, 0, 1])
    half = half / np.linalg.norm(half)
    return np.clip(x * half[0] + y * half[1] + z * half[2], 0, 1) ** power


def hsv(hue: float, saturation: float, value: float) -> Array:
    """Convert a colour to (3,) RGB."""
    return np.array(colorsys.hsv_to_rgb(hue % 1, saturation, value), np.float32)


def tint(rng: Rng, hue: Amount, saturation: Amount, value: Amount) -> Array:
    """Draw a (3,) RGB colour from ranges of hue, saturation and value."""
    return hsv(*(rng.uniform(*a) if isinstance(a, tuple) else a for a in (hue, saturation, value)))


def ink(rng: Rng) -> Array:
    """Draw the (3,) RGB colour of a print: any hue, often vivid."""
    return hsv(rng.uniform(), rng.beta(3, 2), rng.uniform(0.25, 0.95))


def flat(shape: Shape, colour: Array) -> Array:
    """Return (h, w, 3) of one colour."""
    return np.tile(np.float32(colour), (*shape, 1))


def blend(first: Array, second: Array, weight: Array | float) -> Array:
    """Blend `first` (weight 0) and `second` (weight 1) to (h, w, 3); both may be colours, weight a number."""
    weight = np.clip(np.asarray(weight), 0, 1)[..., None]
    return (first * (1 - weight) + second * weight).astype(np.float32)


def text_lines(part: Array, rng: Rng, pitch: int, colour: tuple[int, ...]) -> None:
    """Fill a part of a uint8 picture with words too small to read, `pitch` pixels a line."""
    x, y = (a.astype(int) for a in grid(part.shape[:2]))
    lines, letter = part.shape[0] // pitch + 1, max(pitch // 4, 1)
    words = rng.random((lines, part.shape[1] // (2 * pitch) + 2)) < 0.82
    starts = rng.integers(0, 2 * pitch, lines)[:, None]
    strokes = rng.random((part.shape[0], part.shape[1] // letter + 1)) < 0.68
    line = y // pitch
    inked = words[line, (x + starts[line[:, 0]]) // (2 * pitch)] & strokes[y, x // letter]
    part[inked & (y % pitch < max(round(0.55 * pitch), 1))] = colour


def lettering(picture: Array, text: str, at: tuple[float, float], scale: float, colour: Array) -> Array:
    """Write a word on an (h, w, 3) picture; `at` is its lower left (x, y), relative to w and h."""
    canvas = (np.clip(picture, 0, 1) * 255).astype(np.uint8)
    corner = (int(at[0] * canvas.shape[1]), int(at[1] * canvas.shape[0]))
    paint = tuple(int(255 * v) for v in colour)
    cv2.putText(canvas, text, corner, FONT, scale, paint, max(round(2 * scale), 1), cv2.LINE_AA)
    return np.float32(canvas) / 255


def package_print(rng: Rng, shape: Shape, base: Array | None = None) -> Array:
    """Draw (h, w, 3) of a package's print: bands, a badge, a word, small text, a bar code."""
    h, w = shape
    colours = [tuple(int(255 * v) for v in ink(rng)) for _ in range(4)] + [(245, 245, 240)]
    canvas = np.uint8(flat(shape, ink(rng) if base is None else base) * 255)
    for _ in range(rng.integers(1, 4)):
        y, thick = int(rng.uniform(-0.1, 0.9) * h), int(rng.uniform(0.08, 0.35) * h)
        lean = int(rng.normal(0, 0.12) * h)
        band = np.array([(0, y), (w, y + lean), (w, y + lean + thick), (0, y + thick)], np.int32)
        cv2.fillPoly(canvas, [band], colours[rng.integers(5)], cv2.LINE_AA)
    for k in range(rng.integers(1, 4)):
        at = (int((0.25 + 0.5 * (k % 2) + rng.normal(0, 0.06)) * w), int(rng.uniform(0.25, 0.7) * h))
        axes = (max(int(rng.uniform(0.08, 0.2) * w), 2), max(int(rng.uniform(0.08, 0.25) * h), 2))
        turn, colour = rng.uniform(0, 180), colours[rng.integers(5)]
        cv2.ellipse(canvas, at, axes, turn, 0, 360, colour, -1, cv2.LINE_AA)
    words = WORDS.split()
    for k in range(2):
        scale = w / 220 * rng.uniform(0.7, 1.5)
        at = (int((0.08 + 0.5 * k) * w), int(rng.uniform(0.3, 0.75) * h))
        word, style = words[rng.integers(len(words))], colours[rng.integers(5)]
        cv2.putText(canvas, word, at, FONT, scale, style, max(int(2.5 * scale), 1), cv2.LINE_AA)
    part = canvas[int(0.78 * h) : int(0.92 * h), int(0.1 * w) : int(0.45 * w)]
    text_lines(part, rng, max(h // 36, 3), colours[4])
    if rng.random() < 0.5 and w > 40:
        x, y = int(0.7 * w), int(0.75 * h)
        bars = canvas[y : y + h // 7, x : x + w // 6]
        bars[:] = np.where(rng.random(bars.shape[1]) < 0.5, 20, 245)[:, None]
    return np.float32(canvas) / 255


def newsprint(rng: Rng, shape: Shape) -> Array:
    """Draw (h, w, 3) of a newspaper page: headline, columns of text, grey pictures."""
    h, w = shape
    canvas = np.uint8(flat(shape, hsv(0.11, rng.uniform(0.03, 0.2), rng.uniform(0.75, 0.92))) * 255)
    dark = (int(rng.integers(40, 80)),) * 3
    pitch, columns = max(h // int(rng.integers(38, 60)), 3), int(rng.integers(2, 6))
    text_lines(canvas[h // 20 : h // 7, w // 20 : w - w // 20], rng, max(h // 14, 4), dark)
    for k in range(columns):
        x0, x1 = int(w * (0.05 + 0.9 * k / columns)), int(w * (0.05 + 0.9 * (k + 0.88) / columns))
        text_lines(canvas[h // 6 : h - h // 20, x0:x1], rng, pitch, dark)
    for _ in range(rng.integers(0, 4)):
        x, y = int(rng.uniform(0.05, 0.6) * w), int(rng.uniform(0.15, 0.7) * h)
        part = canvas[y : y + int(rng.uniform(0.1, 0.3) * h), x : x + int(rng.uniform(0.2, 0.4) * w)]
        tint = ink(rng) if rng.random() < 0.35 else np.ones(3)
        part[:] = np.clip((120 + 70 * noise(rng, part.shape[:2], 12)[..., None]) * tint, 0, 255)
    return np.float32(canvas) / 255


def fabric(rng: Rng, shape: Shape) -> Array:
    """Draw (h, w, 3) of cloth: plain, striped, checked or dotted, with a weave."""
    base, other = ink(rng) * rng.uniform(0.5, 1.05), ink(rng)
    x, y = grid(shape)
    period = max(shape) / rng.uniform(6, 22)
    style = rng.integers(5)
    if style == 0:
        image = blend(base, other, np.float32(y % period < rng.uniform(0.25, 0.6) * period))
    elif style == 1:
        image = blend(base, other, 0.5 * (x % period < 0.45 * period) + 0.5 * (y % period < 0.45 * period))
    elif style == 2:
        far = np.hypot(x % period - period / 2, y % period - period / 2)
        image = blend(base, other, np.float32(far < 0.22 * period))
    else:  # plain; half of them are blue jeans
        image = base if style == 4 else hsv(rng.uniform(0.56, 0.65), 0.55, rng.uniform(0.25, 0.6))
    weave = np.sin(x * 1.9) * np.sin(y * 1.9)
    return image * (1 + 0.05 * weave + 0.05 * grain(rng, shape))[..., None]


def beads(rng: Rng, shape: Shape, cell: float) -> Array:
    """Draw (h, w, 3) of styrofoam: near-white beads, `cell` pixels wide, with dark seams."""
    points = np.uint8(rng.random(shape) > 1 / cell**2)
    far = cv2.distanceTransform(points, cv2.DIST_L2, 3) / cell
    tint = hsv(rng.choice([0.1, 0.55]), rng.uniform(0, 0.06), rng.uniform(0.8, 0.92))
    return tint * (1.03 - 0.16 * np.clip(far, 0, 1.3) ** 2 + 0.02 * grain(rng, shape))[..., None]


def kraft(rng: Rng, shape: Shape) -> Array:
    """Draw (h, w, 3) of brown cardboard: flutes, fibres, stains."""
    x, _ = grid(shape)
    colour = hsv(rng.uniform(0.07, 0.1), rng.uniform(0.3, 0.5), rng.uniform(0.55, 0.8))
    flutes = 0.018 * np.sin(x * 2 * np.pi / rng.uniform(4, 7))
    return colour * (1 + flutes + 0.05 * noise(rng, shape, 40) + 0.03 * grain(rng, shape))[..., None]


def wood(rng: Rng, shape: Shape) -> Array:
    """Draw planks, each with its own grain."""
    x, y = grid(shape)
    plank = rng.uniform(60, 220)
    row = np.int32(y // plank)
    tone = rng.normal(0, 0.09, row.max() + 1)[row]
    shift = rng.uniform(0, 999, row.max() + 1)[row]
    rings = np.sin((y + shift + 14 * noise(rng, shape, 160, 2)) * rng.uniform(0.2, 0.6) + 0.004 * x)
    fibre = cv2.blur(grain(rng, shape), (41, 1))
    colour = hsv(rng.uniform(0.05, 0.1), rng.uniform(0.25, 0.6), rng.uniform(0.35, 0.8))
    seam = np.float32(y % plank < 2.5)
    return colour * (1 + tone + 0.07 * rings + 0.35 * fibre - 0.5 * seam)[..., None]


def tiles(rng: Rng, shape: Shape) -> Array:
    """Draw square tiles or bricks with joints."""
    x, y = grid(shape)
    tall = rng.uniform(50, 190)
    wide = tall * rng.choice([1, 1, 2])
    row = np.int32(y // tall)
    x = x + (wide / 2 * (row % 2) if rng.random() < 0.5 else 0)
    column = np.int32(x // wide)
    tone = rng.normal(0, 0.05, (row.max() + 1, column.max() + 1))[row, column]
    joint = np.minimum.reduce([x % wide, wide - x % wide, y % tall, tall - y % tall])
    colour = hsv(rng.choice([0.03, 0.1, 0.12, 0.55]), rng.uniform(0.02, 0.3), rng.uniform(0.5, 0.92))
    image = colour * (1 + tone + 0.06 * noise(rng, shape, 70) + 0.02 * grain(rng, shape))[..., None]
    return blend(image, colour * rng.uniform(0.5, 0.8), np.float32(joint < rng.uniform(1.5, 5)))


def asphalt(rng: Rng, shape: Shape) -> Array:
    """Draw a road or concrete: grit, patches, a crack."""
    grit = cv2.GaussianBlur(grain(rng, shape), (0, 0), rng.uniform(0.6, 1.4))
    colour = hsv(rng.choice([0.1, 0.6]), rng.uniform(0, 0.12), rng.uniform(0.25, 0.7))
    tone = 1 + rng.uniform(0.15, 0.4) * grit + 0.1 * noise(rng, shape, 150)
    crack = np.abs(noise(rng, shape, 300, 5)) < rng.choice([0, 0.008])
    return colour * (tone - 0.45 * crack)[..., None]


def grass(rng: Rng, shape: Shape) -> Array:
    """Draw a lawn, or dry ground between tufts."""
    blades = sum(cv2.blur(grain(rng, shape), (w, h)) * w * h / 9 for w, h in ((1, 9), (3, 7), (7, 3)))
    patches = noise(rng, shape, 120, 6)
    green = hsv(rng.uniform(0.2, 0.32), rng.uniform(0.35, 0.7), rng.uniform(0.3, 0.6))
    soil = hsv(rng.uniform(0.09, 0.13), rng.uniform(0.25, 0.45), rng.uniform(0.4, 0.6))
    image = blend(green, soil, 0.5 + 0.8 * (patches - rng.uniform(0, 0.8)))
    return image * (1 + 0.16 * blades)[..., None]


def gravel(rng: Rng, shape: Shape) -> Array:
    """Draw soil and pebbles, each of another tone."""
    points = np.uint8(rng.random(shape) > 1 / rng.uniform(15, 110))
    far, stone = cv2.distanceTransformWithLabels(points, cv2.DIST_L2, 3, labelType=cv2.DIST_LABEL_PIXEL)
    tone = rng.normal(1, 0.16, stone.max() + 1)[stone]
    shade = np.clip(1.1 - 0.04 * far**1.3 + 0.15 * noise(rng, shape, 90), 0.45, 1.3) * tone
    colour = hsv(rng.uniform(0.06, 0.13), rng.uniform(0.05, 0.35), rng.uniform(0.4, 0.7))
    return colour * (shade + 0.06 * grain(rng, shape))[..., None]


def table(rng: Rng, shape: Shape) -> Array:
    """Draw a smooth table or wall: painted, laminate, or marbled."""
    colour = hsv(rng.uniform(), rng.uniform(0, 0.25), rng.uniform(0.45, 0.97))
    veins = np.exp(-np.abs(noise(rng, shape, 160, 5)) / 0.05) * rng.choice([0, 0.12])
    return colour * (1 + 0.03 * noise(rng, shape, 90) + 0.012 * grain(rng, shape) - veins)[..., None]


def carpet(rng: Rng, shape: Shape) -> Array:
    """Draw a carpet: woven, soft, speckled."""
    colour = hsv(rng.uniform(), rng.uniform(0.1, 0.5), rng.uniform(0.25, 0.65))
    pile = cv2.GaussianBlur(grain(rng, shape), (0, 0), 1.2)
    return colour * (1 + 0.35 * pile + 0.08 * noise(rng, shape, 60))[..., None]


def crate(rng: Rng, shape: Shape) -> Array:
    """Draw the floor of a collection bin: coloured plastic with ribs."""
    x, y = grid(shape)
    colour = hsv(rng.choice([0.58, 0.35, 0.13, 0.0, 0.6]), rng.uniform(0.2, 0.75), rng.uniform(0.3, 0.7))
    pitch = rng.uniform(30, 70)
    ribs = np.maximum(np.abs(x % pitch - pitch / 2), np.abs(y % pitch - pitch / 2)) > pitch * 0.44
    ribs = cv2.GaussianBlur(np.float32(ribs), (0, 0), 2)
    return colour * (1 + 0.22 * ribs + 0.06 * noise(rng, shape, 80) + 0.02 * grain(rng, shape))[..., None]


GROUNDS = (wood, tiles, asphalt, grass, gravel, table, carpet, crate)
