"""Draw a demo set whose classes overlap: X-rays of hands, in the layout of a competition, from a seed alone.

    make_hand_set(Path('input/hands'), train=40, test=16, seed=0, side=2048)

A person has two photos, the right and the left hand. A label is a JSON file of polygons, whose corners are
pixels of the bone; bones lie over each other, and each has its whole shape. The hidden labels of the test
photos are in test_labels/. A hand depends on its seed, split and person alone.
"""

import json
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from data.demo.textures import Array, Rng, grain, grid, noise
from utils.files import write_csv, write_text, write_whole
from utils.progress import progress
from utils.workers import worker_pool

CARPALS = ('Trapezium', 'Trapezoid', 'Capitate', 'Hamate', 'Scaphoid', 'Lunate', 'Triquetrum', 'Pisiform')
BONES = (*(f'finger-{k}' for k in range(1, 20)), *CARPALS, 'Radius', 'Ulna')
SPLITS = ('train', 'test')
PROCESSES = 2
FIRST_TIME = 1_661_130_000_000  # names of photos are times in milliseconds
GREY = 255 * 0.9

# a right hand, of a side of 1, x to the right and y down; the thumb first
KNUCKLES = np.array([(0.285, 0.615), (0.385, 0.475), (0.475, 0.455), (0.560, 0.475), (0.635, 0.520)])
WRISTS = np.array([(0.385, 0.705), (0.432, 0.660), (0.487, 0.650), (0.538, 0.660), (0.578, 0.680)])
ANGLES = np.array([-0.60, -0.13, 0.0, 0.11, 0.27])  # of the fingers, from straight up, in radians
LENGTHS = ((0.090, 0.070), *(tuple(f * k for k in (0.115, 0.075, 0.055)) for f in (1.0, 1.1, 1.02, 0.8)))
# the middle of each bone of the wrist, and its sides
WRIST_BONES = (
    (0.392, 0.722, 0.062, 0.050), (0.430, 0.694, 0.048, 0.046), (0.485, 0.698, 0.056, 0.076),
    (0.540, 0.700, 0.056, 0.068), (0.434, 0.754, 0.066, 0.056), (0.490, 0.766, 0.056, 0.048),
    (0.548, 0.752, 0.054, 0.046), (0.562, 0.742, 0.034, 0.034),
)  # fmt: skip


class Hand(NamedTuple):
    """Hold a drawn hand."""

    photo: Array  # (H, W) uint8
    outlines: dict[str, Array]  # (M, 2) int32 x y of each bone's outline, pixels of the bone


class Job(NamedTuple):
    """Name a photo to draw: one hand of a person."""

    split: str
    person: int  # of the split
    folder: str
    name: str  # of the photo, without its ending
    is_left: bool


def make_hand_set(out: Path, train: int, test: int, seed: int, side: int) -> None:
    """Write photos, labels, hidden labels of the test, and sample_submission.csv."""
    jobs = [*list_jobs('train', train, seed, 1), *list_jobs('test', test, seed, 1 + (train + 1) // 2)]
    with worker_pool(min(PROCESSES, len(jobs))) as pool:
        drawn = pool.map(partial(write_hand, out, seed, side), jobs, chunksize=2)
        list(progress(drawn, 'demo set', 'photo', len(jobs)))
    rows = [(f'{job.name}.png', bone, '') for job in jobs if job.split == 'test' for bone in BONES]
    write_csv(out / 'sample_submission.csv', [('image_name', 'class', 'rle'), *rows])


def list_jobs(split: str, photos: int, seed: int, first_id: int) -> Iterator[Job]:
    """Name the photos of a split; some of the training photos say which hand they show."""
    for index in range(photos):
        person, is_left = divmod(index, 2)
        rng = np.random.default_rng([seed, SPLITS.index(split), person, 2])
        time = FIRST_TIME + 1_000_000 * person + int(rng.integers(500_000)) + 7_000 * is_left
        time += SPLITS.index(split) * 10**10
        says_hand = split == 'train' and rng.uniform() < 0.5
        ending = ('_L' if is_left else '_R') if says_hand else ''
        yield Job(split, person, f'ID{first_id + person:03d}', f'image{time}{ending}', bool(is_left))


def write_hand(out: Path, seed: int, side: int, job: Job) -> None:
    """Draw a hand, and save its photo and its label."""
    cv2.setNumThreads(1)
    hand = draw_hand(seed, job, side)
    photo = np.repeat(hand.photo[..., None], 3, 2)
    _, png = cv2.imencode('.png', photo, [cv2.IMWRITE_PNG_COMPRESSION, 3])
    with write_whole(out / job.split / 'DCM' / job.folder / f'{job.name}.png') as file:
        file.write(png)
    annotations = [
        {
            'id': f'{job.name[-8:]}{k:02d}',
            'type': 'poly_seg',
            'attributes': {},
            'points': outline.tolist(),
            'label': bone,
        }
        for k, (bone, outline) in enumerate(hand.outlines.items())
    ]
    labels = out / ('train' if job.split == 'train' else 'test_labels') / 'outputs_json' / job.folder
    write_text(labels / f'{job.name}.json', json.dumps({'annotations': annotations}))


def draw_hand(seed: int, job: Job, side: int) -> Hand:
    """Draw one hand of a person, a photo of (side, side)."""
    numbers = [seed, SPLITS.index(job.split), job.person]
    person, rng = np.random.default_rng([*numbers, 3]), np.random.default_rng([*numbers, int(job.is_left)])
    shapes, joints = build_hand(person, rng)
    angle, scale = rng.normal(0, 0.07), rng.uniform(1.0, 1.16)
    c, s = scale * np.cos(angle), scale * np.sin(angle)
    turn = np.array([[-c, -s], [-s, c]]) if job.is_left else np.array([[c, s], [-s, c]])
    middle = np.array([0.47, 0.6])
    centre = np.array([0.5, 0.6]) + rng.uniform(-0.04, 0.04, 2)

    def place(points: Array) -> Array:
        return ((points - middle) @ turn + centre) * side

    outlines = {bone: to_pixels(place(shape), side) for bone, shape in shapes.items()}
    photo = expose(rng, outlines, [place(line) for line in joints], side)
    return Hand(photo, outlines)


def build_hand(person: Rng, rng: Rng) -> tuple[dict[str, Array], list[Array]]:
    """Build the outlines of the bones, (M, 2) each, and the lines of the five fingers, of a side of 1.

    What both hands of a person share is drawn from `person`.
    """
    girth = person.uniform(0.9, 1.15)
    lengths = person.normal(1, 0.04, 5) * person.uniform(0.94, 1.06)
    angles = ANGLES + person.normal(0, 0.02, 5) + rng.normal(0, 0.045, 5)
    shapes, lines, number = {}, [], 1
    for finger in range(5):
        knuckle = KNUCKLES[finger] + person.normal(0, 0.004, 2)
        wrist, point = WRISTS[finger] + person.normal(0, 0.004, 2), knuckle
        step = np.array([np.sin(angles[finger]), -np.cos(angles[finger])])
        chain = [(wrist, knuckle)]
        for length in LENGTHS[finger]:
            end = point + step * length * lengths[finger]
            chain.append((point, end))
            point = end
            bend = rng.normal(0, 0.05)
            step = step @ np.array([[np.cos(bend), np.sin(bend)], [-np.sin(bend), np.cos(bend)]])
        lines.append(np.array([wrist, *(end for _, end in chain)]))
        for k, (start, end) in reversed(list(enumerate(chain))):  # the tip of a finger is its first bone
            width = (0.040, 0.035, 0.029, 0.024)[k] * girth * (0.85 if finger == 4 else 1)
            shapes[f'finger-{number}'] = wave(person, long_bone(start, end, width, 0.08), width * 0.05)
            number += 1
    for bone, (x, y, width, height) in zip(CARPALS, WRIST_BONES, strict=True):
        t = np.linspace(0, 2 * np.pi, 60, endpoint=False)
        sides = np.array([width, height]) / 2 * girth * person.uniform(1.05, 1.22, 2)
        middle = np.array([x, y]) + person.normal(0, 0.003, 2)
        shapes[bone] = wave(person, middle + np.stack([np.cos(t), np.sin(t)], 1) * sides, width * 0.07)
    for bone, x, width in (('Radius', 0.45, 0.115), ('Ulna', 0.555, 0.062)):
        start, end = np.array([x, 0.775]), np.array([x + 0.02, 1.3]) + person.normal(0, 0.01, 2)
        shapes[bone] = wave(person, long_bone(start, end, width * girth, 0.02), width * 0.03)
    return shapes, lines


def long_bone(start: Array, end: Array, width: float, overlap: float) -> Array:
    """Return the (M, 2) outline of a bone that is wide at its ends, which reach beyond its joints."""
    axis = end - start
    across = np.array([-axis[1], axis[0]]) / np.hypot(*axis)
    u = np.linspace(-1, 1, 40)
    half = width / 2 * (0.55 + 0.45 * np.abs(u) ** 2.5)
    cap = 1.2 * width / np.hypot(*axis)  # of the round end, relative to half its length
    beyond = np.clip((np.abs(u) - 1 + cap) / cap, 0, 1)
    half = half * np.sqrt(1 - beyond**2)
    along = start + axis * ((u * (1 + 2 * overlap) + 1) / 2)[:, None]
    return np.concatenate([along + across * half[:, None], (along - across * half[:, None])[::-1]])


def wave(rng: Rng, outline: Array, size: float) -> Array:
    """Make an outline uneven, by smooth waves."""
    t = np.linspace(0, 2 * np.pi, len(outline), endpoint=False)
    waves = sum(
        np.stack([np.cos(k * t + a), np.sin(k * t + b)], 1) * rng.normal(0, size / k)
        for k in range(2, 6)
        for a, b in [rng.uniform(0, 7, 2)]
    )
    return outline + waves


def to_pixels(outline: Array, side: int) -> Array:
    """Return the (M, 2) int32 pixels of an outline's corners inside the photo, none twice in a row."""
    outline = outline[outline[:, 1] < 1.03 * side]  # the arm goes on
    pixels = np.clip(np.round(outline), 0, side - 1).astype(np.int32)
    return pixels[(pixels != np.roll(pixels, 1, 0)).any(1)]


def expose(rng: Rng, outlines: dict[str, Array], lines: list[Array], side: int) -> Array:
    """Draw the X-ray: (side, side) uint8; what lies over each other adds up."""
    picture = draw_flesh(rng, lines, outlines, side)
    for outline in outlines.values():
        (left, top), (right, bottom) = outline.min(0), outline.max(0) + 1
        part = np.zeros((bottom - top + 2, right - left + 2), np.uint8)  # with a border, for the distances
        cv2.fillPoly(part, [outline - (left - 1, top - 1)], 1)
        depth = cv2.distanceTransform(part, cv2.DIST_L2, 3)[1:-1, 1:-1] / side
        shell = np.exp(-((depth / 0.0045) ** 2))
        spongy = 1 + 0.12 * noise(rng, depth.shape, max(side * 0.006, 2), 2)
        shine = rng.uniform(0.22, 0.28) * spongy * np.sqrt(np.minimum(depth / 0.012, 1)) + 0.17 * shell
        picture[top:bottom, left:right] += shine * (depth > 0)
    picture = cv2.GaussianBlur(picture, (0, 0), side * rng.uniform(0.0006, 0.0011))
    x, y = (a / side - 0.5 for a in grid((side, side)))
    tilt = rng.uniform(-0.12, 0.12, 2)
    picture = picture * (1 + np.float32(tilt[0]) * x + np.float32(tilt[1]) * y) * rng.uniform(0.9, 1.25)
    picture = np.clip(picture, 0, 1) ** np.float32(rng.uniform(0.8, 1.1))
    level = np.float32(rng.uniform(0.008, 0.02))
    return np.uint8(np.clip(picture + level * grain(rng, (side, side)), 0, 1) * GREY)


def draw_flesh(rng: Rng, lines: list[Array], outlines: dict[str, Array], side: int) -> Array:
    """Draw (side, side) float32 of the soft parts of a hand over the dark of an X-ray."""
    small = 256  # it is smooth
    flesh = np.zeros((small, small), np.float32)
    for line in lines:
        points = np.int32(line / side * small * 8)
        cv2.polylines(flesh, [points], False, 1, int(small * 0.062), cv2.LINE_AA, 3)
    palm = np.concatenate([line[:2] for line in lines] + [outlines['Radius'], outlines['Ulna']])
    hull = cv2.convexHull(np.float32(palm / side * small))
    cv2.fillPoly(flesh, [np.int32(hull)], 1)
    flesh = cv2.GaussianBlur(flesh, (0, 0), small * 0.012)
    flesh = cv2.resize(flesh, (side, side), interpolation=cv2.INTER_LINEAR)
    lumps = 1 + 0.1 * noise(rng, (side, side), side / 12, 2)
    return np.float32(rng.uniform(0.03, 0.07) + rng.uniform(0.16, 0.24) * flesh * lumps)
