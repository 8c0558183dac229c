"""Draw the objects of the demo set. DRAWERS maps a category id to the functions that draw its objects.

Every drawer takes rng, size (pixels) and light, and returns a Cutout; h w are the size of its canvas.
"""

from collections.abc import Sequence
from dataclasses import replace

import cv2
import numpy as np

from data.demo.shapes import (
    MARGIN,
    Cutout,
    Drawer,
    RoundBody,
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
    revolve,
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

WHITE = np.ones(3, np.float32)


def select(part: Array, first: Array, second: Array) -> Array:
    """Apply np.where to an (h, w) bool and (h, w, 3) pictures or colours."""
    return np.where(part[..., None], first, second)


def wrapped_label(
    rng: Rng, body: RoundBody, size: float, top: float, bottom: float, base: Array | None = None
) -> Array:
    """Draw a printed label around a body, shaded: (h, w, 3)."""
    label = package_print(rng, (int(size * (bottom - top)), int(size * 1.1)), base)
    return body.wrap(label, top, bottom) * body.shade[..., None]


def coffee_cup(rng: Rng, size: float, light: Array) -> Cutout:
    """Draw a take-away cup with a lid, a print or a sleeve, and stains; squashed."""
    r = rng.uniform(0.24, 0.3)
    profile = [(0, r * 0.92), (0.03, r * 1.06), (0.1, r * 1.06), (0.11, r), (1, r * 0.7)]
    body = revolve(profile, size, rng.uniform(0.15, 0.4), light)
    image = wrapped_label(rng, body, size, 0.1, 1, tint(rng, (0.03, 0.12), (0.1, 0.6), (0.35, 0.95)))
    if rng.random() < 0.5:
        image = select(body.between(0.35, 0.78), kraft(rng, body.shape) * body.shade[..., None], image)
    lid = hsv(0, 0, rng.choice([0.12, 0.9]))
    image = select((body.v < 0.1) | (body.lid < 1), lid * body.shade[..., None], image)
    image = blend(image, lid * 0.65, body.ring(0.8, 0.08))
    image = blend(image, hsv(0.07, 0.6, 0.25), 0.9 * noise(rng, body.shape, size / 4) - 0.35)
    return bend(opaque(body.outline, image, 0.25), rng, rng.uniform(0.02, 0.08))


def steel(rng: Rng, u: Array) -> Array:
    """Return the (h, w) brightness of metal, whose reflections change fast across it."""
    return np.float32(np.interp(u, np.linspace(-1, 1, 14), rng.uniform(0.25, 1.05, 14)))


def metal_top(rng: Rng, body: RoundBody, image: Array, is_open: bool) -> Array:
    """Add the top of a can to the image: a bright rim and brushed metal, or the dark of an open tin."""
    angle = np.arctan2(body.u, 1 - body.lid)
    brushed = 0.66 + 0.25 * np.sin(2 * angle + rng.uniform(0, 6))
    inside = brushed * np.where(body.lid < 0.8, 0.3 if is_open else 1.0, 0.82)
    image = select(body.lid < 1, hsv(0.6, 0.03, 1) * inside[..., None], image)
    return blend(image, WHITE, 0.9 * body.ring(0.94, 0.06))


def drink_can(rng: Rng, size: float, light: Array) -> Cutout:
    """Draw a printed can with bare ends; about every other one is crushed."""
    r = rng.uniform(0.22, 0.3)
    profile = [(0, r * 0.84), (0.02, r * 0.84), (0.1, r), (0.93, r), (1, r * 0.8)]
    body = revolve(profile, size, rng.uniform(0.1, 0.45), light)
    mirrored = steel(rng, body.u)
    label = wrapped_label(rng, body, size, 0.07, 0.95) * (0.45 + 0.75 * mirrored)[..., None]
    bare = hsv(0.6, 0.04, 1) * (mirrored * body.shade)[..., None]
    image = select(body.between(0.09, 0.94), label, bare)
    image += (0.85 * body.stripe(light[0] * 0.8, 0.07) + 0.35 * body.stripe(-0.75, 0.08))[..., None]
    cutout = opaque(body.outline, metal_top(rng, body, image, is_open=False), 0.25)
    if rng.random() < 0.55:
        return cutout
    dents = creases(rng, body.shape, 5, 0.06, 1.0)
    image = cutout.image * diffuse(dents, light, 0.35)[..., None]
    image = np.float32(image + 0.6 * specular(dents, light, 50)[..., None])
    return bend(replace(cutout, image=image), rng, 0.11)


def tin(rng: Rng, size: float, light: Array) -> Cutout:
    """Draw a food tin: ribs, bare or with a paper label, often open."""
    r = rng.uniform(0.3, 0.42)
    body = revolve([(0, r), (1, r)], size * 0.85, rng.uniform(0.2, 0.5), light)
    ribs = 1 + 0.14 * np.sin(body.v * rng.uniform(60, 110)) * body.between(0.2, 0.8)
    metal = tint(rng, rng.choice([0.6, 0.12]), (0.02, 0.2), 1)
    image = metal * (steel(rng, body.u) * ribs)[..., None]
    if rng.random() < 0.4:
        image = select(body.between(0.12, 0.88), wrapped_label(rng, body, size, 0.12, 0.88), image)
    image += 0.7 * body.stripe(light[0] * 0.8, 0.06)[..., None]
    image = metal_top(rng, body, image, is_open=rng.random() < 0.6)
    return bend(opaque(body.outline, image, 0.25), rng, rng.uniform(0, 0.04))


def glass(rng: Rng, body: RoundBody, light: Array) -> tuple[Array, Array]:
    """Return image and opacity of green, brown, clear or blue glass: dark rims, hard highlights."""
    style = rng.integers(4)
    shade = [(rng.uniform(0.27, 0.4), 0.75, 0.45), (rng.uniform(0.05, 0.08), 0.85, 0.38)]
    shade += [(0.45, 0.12, 0.8), (0.58, 0.6, 0.5)]
    rim = np.abs(body.u) ** 5
    image = hsv(*shade[style]) * (1.15 - 0.75 * rim + 0.1 * noise(rng, body.shape, 40))[..., None]
    opacity = (0.28 if style == 2 else 0.72) + 0.55 * rim + 0.25 * body.stripe(-0.55, 0.12)
    shine = 0.95 * body.stripe(light[0] * 0.75, 0.05) + 0.5 * body.stripe(-light[0] * 0.8 - 0.1, 0.07)
    shine = (shine + 0.3 * body.stripe(0.88, 0.05)) * (0.55 + 0.45 * np.sin(body.v * 9 + rng.uniform(0, 6)))
    return image + np.clip(shine, 0, 1)[..., None], opacity + shine


def bottle(rng: Rng, size: float, light: Array) -> Cutout:
    """Draw a wine, beer or sauce bottle, some with a label or a cap."""
    r, neck, shoulder = rng.uniform(0.125, 0.19), rng.uniform(0.04, 0.055), rng.uniform(0.28, 0.42)
    profile = [(0, neck * 1.2), (0.03, neck * 1.2), (0.035, neck), (shoulder - 0.16, neck * 1.1)]
    profile += [(shoulder - 0.08, r * 0.6), (shoulder, r * 0.95), (shoulder + 0.05, r)]
    profile += [(0.97, r), (1, r * 0.93)]
    body = revolve(profile, size, rng.uniform(0.1, 0.3), light)
    image, opacity = glass(rng, body, light)
    if rng.random() < 0.6:
        top = rng.uniform(0.45, 0.55)
        part = body.between(top, top + 0.3)
        label = wrapped_label(rng, body, size, top, top + 0.3, hsv(0.1, 0.15, 0.9))
        image, opacity = select(part, label, image), np.where(part, 1, opacity)
    if rng.random() < 0.4:
        cap = body.v < 0.04
        image, opacity = select(cap, ink(rng) * body.shade[..., None], image), np.where(cap, 1, opacity)
    return translucent(body.outline, image, opacity, 0.15, 1.5)


def jar(rng: Rng, size: float, light: Array) -> Cutout:
    """Draw a jar, open or with its lid on."""
    r = rng.uniform(0.3, 0.38)
    profile = [(0, r * 0.86), (0.13, r * 0.86), (0.2, r), (0.95, r), (1, r * 0.92)]
    body = revolve(profile, size * 0.85, rng.uniform(0.2, 0.45), light)
    image, opacity = glass(rng, body, light)
    if rng.random() < 0.5:
        lid = (body.v < 0.12) | (body.lid < 1)
        image, opacity = select(lid, ink(rng) * body.shade[..., None], image), np.where(lid, 1, opacity)
    rim = 0.8 * body.ring(0.93, 0.06) * (body.v < 0.1)
    return translucent(body.outline, blend(image, WHITE, rim), np.maximum(opacity, rim), 0.25, 1.5)


def pet_bottle(rng: Rng, size: float, light: Array) -> Cutout:
    """Draw a clear drink bottle: ribs, a wrapped label, a coloured cap; often squashed."""
    r, neck = rng.uniform(0.14, 0.19), rng.uniform(0.05, 0.06)
    profile = [(0, neck), (0.07, neck), (0.075, neck * 1.25), (0.09, neck), (0.12, neck), (0.2, r * 0.7)]
    profile += [(0.3, r), (0.42, r), (0.5, r * rng.uniform(0.85, 1)), (0.6, r), (0.94, r), (1, r * 0.8)]
    body = revolve(profile, size, rng.uniform(0.1, 0.3), light)
    ribs = np.sin(body.v * rng.uniform(70, 120)) * (body.v > 0.28)
    wrinkles = creases(rng, body.shape, 8, 0.15, 0.9)
    tone = (0.9 + 0.1 * ribs - 0.3 * np.abs(body.u) ** 4) * diffuse(wrinkles, light)
    shine = body.stripe(light[0] * 0.7, 0.1) * (0.6 + 0.4 * ribs) + 0.3 * body.stripe(-0.7, 0.1)
    shine = np.clip(shine + 0.8 * specular(wrinkles, light, 60), 0, 1)
    colour = tint(rng, rng.choice([0.55, 0.5, 0.35]), (0.03, 0.3), 0.92)
    image = colour * tone[..., None] + 0.8 * shine[..., None]
    opacity = 0.3 + 0.4 * np.abs(body.u) ** 3 + 0.12 * np.abs(ribs) + 0.7 * shine
    if rng.random() < 0.75:
        top = rng.uniform(0.35, 0.5)
        part = body.between(top, top + 0.24)
        label = wrapped_label(rng, body, size, top, top + 0.24) + 0.4 * shine[..., None]
        image, opacity = select(part, label, image), np.where(part, 0.95, opacity)
    if rng.random() < 0.8:
        cap, colour = body.v < 0.075, hsv(rng.choice([0, 0.35, 0.58, 0.1]), rng.choice([0, 0.8]), 0.9)
        knurls = 0.85 + 0.15 * np.sin(body.u * 40)
        image = select(cap, colour * (body.shade * knurls)[..., None], image)
        opacity = np.where(cap, 1, opacity)
    return bend(translucent(body.outline, image, opacity, 0.12, 0.8), rng, rng.choice([0.01, 0.05, 0.09]))


def tub(rng: Rng, size: float, light: Array) -> Cutout:
    """Draw a yoghurt cup or tub, printed or plain, seen a little from above."""
    r = rng.uniform(0.36, 0.6)
    profile = [(0, r * 1.08), (0.05, r * 1.08), (0.06, r), (1, r * rng.uniform(0.7, 0.85))]
    body = revolve(profile, size * 0.75, rng.uniform(0.3, 0.6), light)
    colour = hsv(rng.uniform(), rng.choice([0.05, 0.6, 0.85]), rng.uniform(0.75, 0.98))
    image = colour * body.shade[..., None]
    if rng.random() < 0.5:
        image = wrapped_label(rng, body, size * 0.75, 0.08, 0.95, colour)
    image = image + 0.5 * body.stripe(light[0] * 0.7, 0.12)[..., None]
    inside = 0.5 + 0.35 * np.clip(0.5 - body.u * light[0], 0, 1)
    image = select(body.lid < 0.93, colour * inside[..., None], image)
    image = blend(image, np.clip(colour * 1.15, 0, 1), body.ring(0.96, 0.05) * (body.v < 0.06))
    return bend(opaque(body.outline, image, 0.25), rng, rng.uniform(0, 0.03))


def clear_cup(rng: Rng, size: float, light: Array) -> Cutout:
    """Draw a clear drink cup, empty or with the rest of a drink."""
    r = rng.uniform(0.28, 0.36)
    profile = [(0, r * 1.05), (0.03, r * 1.05), (0.04, r), (1, r * 0.68)]
    body = revolve(profile, size * 0.9, rng.uniform(0.2, 0.45), light)
    image = hsv(0.55, 0.04, 0.95) * body.shade[..., None]
    opacity = 0.3 + 0.35 * np.abs(body.u) ** 4
    if rng.random() < 0.45:
        drink = np.clip((body.v - rng.uniform(0.4, 0.8)) * 30, 0, 1)
        image = blend(image, tint(rng, (0.02, 0.12), 0.8, (0.2, 0.6)), drink)
        opacity = opacity + 0.5 * drink
    ribs = np.abs(np.sin(body.u * 17)) ** 8 * (body.v > 0.55)
    shine = body.stripe(light[0] * 0.7, 0.08) + 0.5 * body.stripe(-0.8, 0.1) + 0.25 * ribs
    shine = np.clip(0.8 * shine + body.ring(0.95, 0.05) * (body.v < 0.06), 0, 1)
    cutout = translucent(body.outline, image + 0.7 * shine[..., None], opacity + shine, 0.2, 1)
    return bend(cutout, rng, rng.uniform(0, 0.05))


def detergent(rng: Rng, size: float, light: Array) -> Cutout:
    """Draw an opaque bottle of soap or shampoo: a bright colour, a label, a cap of another colour."""
    r, neck = rng.uniform(0.17, 0.25), rng.uniform(0.06, 0.08)
    profile = [(0, neck), (0.14, neck * 1.15), (0.15, neck)]
    profile += [(0.24, r * 0.85), (0.32, r), (0.95, r), (1, r * 0.9)]
    body = revolve(profile, size, 0.18, light)
    colour = hsv(rng.uniform(), rng.choice([0.1, 0.8, 0.9]), rng.uniform(0.7, 0.97))
    image = select(body.v < 0.145, ink(rng), colour) * body.shade[..., None]
    part = body.between(0.42, 0.86) & (np.abs(body.u) < 0.8)
    image = select(part, wrapped_label(rng, body, size, 0.42, 0.86, 0.95 * WHITE), image)
    image = image + 0.45 * body.stripe(light[0] * 0.7, 0.12)[..., None]
    return bend(opaque(body.outline, image, 0.2), rng, rng.uniform(0, 0.05))


def battery(rng: Rng, size: float, light: Array) -> Cutout:
    """Draw a battery, AA to D: brass or steel ends, a two-coloured sleeve, the plus."""
    r, nub, split = rng.uniform(0.13, 0.25), 0.05, rng.uniform(0.25, 0.4)
    profile = [(0, r * 0.38), (nub, r * 0.38), (nub + 0.005, r), (0.98, r), (1, r * 0.9)]
    body = revolve(profile, size, rng.uniform(0.05, 0.25), light)
    first = tint(rng, rng.choice([0.07, 0.12, 0, 0.58, 0.33]), (0.7, 0.95), (0.6, 0.95))
    second = hsv(0, 0, rng.choice([0.08, 0.1, 0.85]))
    sleeve = flat((int(size), int(size * 0.8)), second)
    sleeve[: int(size * split)] = first
    word = ('AA', 'POWER', 'ALKALINE', '1.5V')[rng.integers(4)]
    ink_of_word = first if second.max() > 0.5 else np.float32([0.95, 0.93, 0.85])
    sleeve = lettering(sleeve, word, (0.28, 0.65), size / 260, ink_of_word)
    sleeve = lettering(sleeve, '+', (0.42, 0.22), size / 130, 0.98 * WHITE)
    image = body.wrap(cv2.GaussianBlur(sleeve, (0, 0), 0.5), nub, 1) * body.shade[..., None]
    metal = hsv(0.12, 0.12, 1) * (0.35 + 0.65 * steel(rng, body.u))[..., None]
    image = select(body.between(nub + 0.015, 0.965), image, metal)
    image = image + (0.7 * body.stripe(light[0] * 0.75, 0.12) + 0.2 * body.stripe(-0.8, 0.1))[..., None]
    return opaque(body.outline, image, 0.2)


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
    foil_grey = np.float32([0.75, 0.75, 0.78])
    image = blend(package_print(rng, shape), foil_grey, 0.35 * seam * (1 + np.sin(y * 2)))
    image = image * diffuse(height, light)[..., None] + 0.75 * specular(height, light, 40)[..., None]
    return bend(opaque(np.float32(np.concatenate(ends) + MARGIN), image, 0.06), rng, 0.05)


def scraps(rng: Rng, size: float, light: Array) -> Cutout:
    """Draw food: brown, yellow and green lumps."""
    outline = blob(rng, size, size * rng.uniform(0.5, 0.95), 0.16, 0.05)
    shape = canvas_around(outline)
    image = tint(rng, (0.02, 0.3), (0.4, 0.9), (0.2, 0.85))
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
    image = blend(hsv(0.1, 0.04, 0.9), stain, 1.3 * noise(rng, shape, size / 3))
    return opaque(outline, image * diffuse(cv2.GaussianBlur(height, (0, 0), 1.5), light)[..., None], 0.08)


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
    part = page[int(size * rng.uniform(0.1, 0.5)) : int(size * 0.92), 2 * MARGIN : int(width)]
    text_lines(part, rng, int(rng.integers(4, 9)), tuple(rng.integers(30, 130, 3)))
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
    page = tint(rng, 0.1, (0, 0.2), (0.82, 0.97))
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
    cutout = polyhedron(rng, [*box(w, h, d), *map(np.float32, extra)], pictures, size, light)
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


def foil(rng: Rng, size: float, light: Array) -> Cutout:
    """Draw crumpled aluminium foil: facets that mirror light or dark."""
    outline = blob(rng, size, size * rng.uniform(0.5, 0.95), 0.14, 0.05)
    shape = canvas_around(outline)
    height = creases(rng, shape, 18, 0.08, 1.8)
    x, y, z = normals(height)
    mirror = 0.55 + 0.38 * np.sin(3.5 * x / z + 1.5) * np.cos(3 * y / z) + 0.03 * grain(rng, shape)
    image = hsv(0.6, 0.04, 1) * mirror[..., None] + 0.7 * specular(height, light, 60)[..., None]
    return opaque(outline, image, 0.15)


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
    shade = diffuse(cv2.GaussianBlur(height, (0, 0), 1), light)
    return opaque(outline, beads(rng, shape, rng.uniform(4, 9)) * shade[..., None], 0.2)


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
    cutout = translucent(outline, *wrinkled_film(rng, canvas_size(w, h), light), 0.1, 2)
    return bend(cutout, rng, rng.uniform(0.05, 0.11))


def crumpled_bag(rng: Rng, size: float, light: Array) -> Cutout:
    """Draw a bag thrown away: a lump of film with loose ends."""
    outline = blob(rng, size, size * rng.uniform(0.55, 1), 0.16, 0.05)
    image, opacity = wrinkled_film(rng, canvas_around(outline), light)
    return bend(translucent(outline, image, opacity, 0.15, 2.5), rng, 0.08)


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
