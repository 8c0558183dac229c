"""Draw the round trash of the demo set: cups, cans, bottles, jars, batteries. objects.py assigns the classes.

Every drawer takes rng, size (pixels) and light, and returns a Cutout; h w are the size of its canvas.
"""

from dataclasses import replace

import cv2
import numpy as np

from data.demo.shapes import Cutout, RoundBody, bend, opaque, revolve, translucent
from data.demo.textures import (
    Array,
    Rng,
    blend,
    creases,
    diffuse,
    flat,
    hsv,
    ink,
    kraft,
    lettering,
    noise,
    package_print,
    specular,
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
    shape = (int(size * (bottom - top)), int(size * 1.1))
    return body.wrap(package_print(rng, shape, base), top, bottom) * body.shade[..., None]


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
    dented = (
        cutout.image * diffuse(dents, light, 0.35)[..., None] + 0.6 * specular(dents, light, 50)[..., None]
    )
    return bend(replace(cutout, image=np.float32(dented)), rng, 0.11)


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
    profile += [
        (shoulder - 0.08, r * 0.6),
        (shoulder, r * 0.95),
        (shoulder + 0.05, r),
        (0.97, r),
        (1, r * 0.93),
    ]
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
    image = (
        tint(rng, rng.choice([0.55, 0.5, 0.35]), (0.03, 0.3), 0.92) * tone[..., None] + 0.8 * shine[..., None]
    )
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
    profile = [
        (0, neck),
        (0.14, neck * 1.15),
        (0.15, neck),
        (0.24, r * 0.85),
        (0.32, r),
        (0.95, r),
        (1, r * 0.9),
    ]
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
