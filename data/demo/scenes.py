"""Draw the demo set: photo-like scenes of trash in the layout of the competition, from a seed alone.

    make_demo_set(Path('input/demo'), train=120, test=40, seed=0)

A scene depends only on (seed, split, index), so a larger set starts with the photos of a smaller one. Its
mask is exact: pycocotools rasterises each outline before the object is drawn, and the objects are drawn in
the order in which masks are painted.
"""

import json
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from pycocotools import mask as rle_codec

from config import CLASSES
from data.demo.objects import DRAWERS
from data.demo.shapes import Cutout
from data.demo.textures import GROUNDS, Array, Rng, grain, grid, hsv, noise
from utils.files import remove_partials, write_text, write_whole
from utils.progress import progress
from utils.workers import worker_pool

SIDE = 512  # pixels of a photo
QUALITY = 92  # of the JPEG files
SPLITS = ('train', 'test')
# The share of each class among the annotations, about as in the competition. A scene's first object takes its
# class from FIRST_CLASSES in turn instead: any 12 consecutive photos have every rare class, and a small set
# can be scored on all classes.
CLASS_SHARES = {1: 0.12, 2: 0.26, 3: 0.03, 4: 0.03, 5: 0.02, 6: 0.14, 7: 0.06, 8: 0.32, 9: 0.01, 10: 0.01}
FIRST_CLASSES = (9, 8, 10, 3, 5, 2, 4, 9, 10, 7, 5, 3)
# the relative size of the objects of a class
CLASS_SCALES = {1: 0.85, 2: 1.0, 3: 0.95, 4: 0.8, 5: 1.15, 6: 1.0, 7: 0.95, 8: 1.1, 9: 0.65, 10: 1.25}
# the weight of each number of objects in a scene
OBJECT_COUNTS = {1: 0.16, 2: 0.16, 3: 0.16, 4: 0.14, 5: 0.12, 6: 0.09, 8: 0.08, 10: 0.05, 13: 0.04}
DESCRIPTION = 'drawn scenes of trash, for a demo of the whole job'
MIN_VISIBLE = 0.3  # an object is left out if a smaller share of it is visible
PROCESSES = 2


class PlacedObject(NamedTuple):
    """Hold an object of a scene: its annotation, and how it is drawn."""

    category_id: int
    polygon: Array  # (M, 2) x y in pixels, half ones too
    mask: Array  # (512, 512) bool, the polygon as pycocotools rasterises it
    cutout: Cutout
    matrix: Array  # (2, 3) from the cutout's pixels to the scene's
    size: float  # pixels


class Scene(NamedTuple):
    """Hold a scene; painting its `annotations` gives exactly its `mask`."""

    photo: Array  # (512, 512, 3) uint8 RGB
    mask: Array  # (512, 512) uint8, 0 background
    annotations: list[dict[str, Any]]  # in COCO's form, without ids


def make_demo_set(out: Path, train: int = 120, test: int = 40, seed: int = 0) -> None:
    """Write train_all.json, test.json, test_labels.json, and the photos to out/batch_01 and out/batch_02."""
    jobs = [('train', index) for index in range(train)] + [('test', index) for index in range(test)]
    for folder in ('batch_01', 'batch_02'):
        (out / folder).mkdir(parents=True, exist_ok=True)
        remove_partials(out / folder, '*')
    with worker_pool(min(PROCESSES, max(len(jobs), 1))) as pool:
        drawn = pool.map(partial(write_scene, out, seed), jobs, chunksize=4)
        scenes = list(progress(drawn, 'demo set', 'photo', len(jobs)))
    size = {'height': SIDE, 'width': SIDE}
    categories = [{'id': k, 'name': name, 'supercategory': name} for k, name in enumerate(CLASSES) if k]
    for split, name in (('train', 'train_all'), ('test', 'test_labels'), ('test', 'test')):
        images, annotations = [], []
        for image_id, (job, records) in enumerate(zip(jobs, scenes, strict=True)):
            if job[0] != split:
                continue
            image = {'license': 0, 'url': None, 'file_name': file_name(*job), **size, 'date_captured': None}
            images.append({**image, 'id': image_id})
            for record in records if name != 'test' else []:
                annotations.append({'id': len(annotations), 'image_id': image_id, **record})
        content = {
            'info': {'year': 2025, 'version': '1', 'description': DESCRIPTION},
            'licenses': [{'id': 0, 'name': 'as the code that drew them', 'url': None}],
            'images': images,
            'categories': categories,
            'annotations': annotations,
        }
        write_text(out / f'{name}.json', json.dumps(content))


def write_scene(out: Path, seed: int, job: tuple[str, int]) -> list[dict[str, Any]]:
    """Draw one scene, save its photo, and return its annotations."""
    cv2.setNumThreads(1)
    scene = draw_scene(seed, *job)
    _, jpeg = cv2.imencode('.jpg', scene.photo[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
    with write_whole(out / file_name(*job)) as file:
        file.write(jpeg)
    return scene.annotations


def file_name(split: str, index: int) -> str:
    return f'batch_{1 + SPLITS.index(split):02d}/{index:04d}.jpg'


def draw_scene(seed: int, split: str, index: int) -> Scene:
    """Draw the scene of a seed, a split ('train' or 'test') and an index in that split."""
    rng = np.random.default_rng([seed, SPLITS.index(split), index])
    side, high = rng.uniform(0, 2 * np.pi), rng.uniform(0.6, 1.2)  # of the light: 35 to 70 degrees high
    light = np.array([np.cos(side) * np.cos(high), np.sin(side) * np.cos(high), np.sin(high)])
    picture = draw_ground(rng)
    objects = lay_out(rng, light, first=FIRST_CLASSES[index % len(FIRST_CLASSES)])
    for item in objects:
        cast_shadow(picture, item, light, rng)
        paint(picture, item)
    mask = np.zeros((SIDE, SIDE), np.uint8)
    for item in objects:
        mask[item.mask] = item.category_id
    return Scene(photograph(rng, picture, light), mask, [annotate(item) for item in objects])


def draw_ground(rng: Rng) -> Array:
    """Draw (512, 512, 3) float32 of a ground in a random perspective."""
    ground = GROUNDS[rng.integers(len(GROUNDS))](rng, (640, 640))
    angle, slant, zoom = rng.uniform(0, 2 * np.pi), rng.uniform(0, 0.35), rng.uniform(0.62, 0.75)
    square = np.float32([(-1, -1), (1, -1), (1, 1), (-1, 1)]) * SIDE / 2
    turn = np.float32([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])
    source = square * zoom * np.float32([(1, 1), (1, 1), (1 - slant, 1), (1 - slant, 1)]) @ turn + 320
    matrix = cv2.getPerspectiveTransform(np.float32(source), square + SIDE / 2)
    return cv2.warpPerspective(np.float32(ground), matrix, (SIDE, SIDE), borderMode=cv2.BORDER_REFLECT)


def lay_out(rng: Rng, light: Array, first: int) -> list[PlacedObject]:
    """Place the objects of a scene; return the visible ones largest first, as masks are painted."""
    weights = np.array(list(OBJECT_COUNTS.values()))
    count = int(rng.choice(list(OBJECT_COUNTS), p=weights / sum(OBJECT_COUNTS.values())))
    ids = [first, *rng.choice(list(CLASS_SHARES), count - 1, p=list(CLASS_SHARES.values()))]
    typical_size = SIDE * rng.uniform(0.44, 0.59) / count**0.27
    pile, spread = rng.uniform(0.35, 0.65, 2) * SIDE, rng.uniform(0.16, 0.34) * SIDE
    objects = []
    for k, category_id in enumerate(map(int, ids)):
        size = typical_size * CLASS_SCALES[category_id] * rng.uniform(0.75, 1.3) * (1.15 if k == 0 else 1)
        angle = rng.uniform(0, 2 * np.pi)
        centre = np.clip(rng.normal(pile, spread if k else spread / 2), 0.06 * SIDE, 0.94 * SIDE)
        item = place_object(rng, category_id, size, angle, centre, light)
        if item.mask.sum() >= 150:
            objects.append(item)
    objects.sort(key=lambda item: -item.mask.sum())
    owner = np.full((SIDE, SIDE), -1, np.int32)  # the object that is visible
    for k, item in enumerate(objects):
        owner[item.mask] = k
    return [item for k, item in enumerate(objects) if (owner == k).sum() >= MIN_VISIBLE * item.mask.sum()]


def place_object(
    rng: Rng, category_id: int, size: float, angle: float, centre: Array, light: Array
) -> PlacedObject:
    """Draw an object of a class, turn it by `angle` (radians) and put its middle at `centre` (x, y)."""
    c, s = np.cos(angle), np.sin(angle)
    turned_light = np.array([c * light[0] + s * light[1], c * light[1] - s * light[0], light[2]])
    drawers = DRAWERS[category_id]
    cutout = drawers[rng.integers(len(drawers))](rng, size, turned_light)
    tilt = np.array([[1], [rng.uniform(0.88, 1)]])  # the camera looks a little from the side
    turn = np.array([[c, -s], [s, c]]) * tilt
    middle = (cutout.outline.max(0) + cutout.outline.min(0)) / 2
    matrix = np.column_stack([turn, centre - turn @ middle])
    polygon = clip_outline(cutout.outline @ turn.T + matrix[:, 2])
    return PlacedObject(category_id, polygon, rasterise(polygon), cutout, matrix, size)


def clip_outline(outline: Array) -> Array:
    """Clip an outline to the photo and simplify it to (M, 2) half pixels; empty if it lies outside."""
    edges = ((0, 0, 1), (0, SIDE, -1), (1, 0, 1), (1, SIDE, -1))
    for axis, edge, sign in edges:  # Sutherland and Hodgman, 1974
        corners = []
        for before, point in zip(np.roll(outline, 1, 0), outline, strict=True):
            a, b = sign * (before[axis] - edge), sign * (point[axis] - edge)
            if a * b < 0:
                corners.append(before + (point - before) * (a / (a - b)))
            if b >= 0:
                corners.append(point)
        outline = np.array(corners).reshape(-1, 2)
    if len(outline) < 3:
        return np.zeros((0, 2))
    simple = cv2.approxPolyDP(np.float32(outline)[:, None], 0.35, True)[:, 0]
    return np.round(np.float64(simple) * 2) / 2


def rasterise(polygon: Array) -> Array:
    """Rasterise a polygon as COCO does, to (512, 512) bool."""
    if len(polygon) < 3:
        return np.zeros((SIDE, SIDE), bool)
    rle = rle_codec.frPyObjects([polygon.ravel().tolist()], SIDE, SIDE)
    return rle_codec.decode(rle)[..., 0].astype(bool)


def crop_around(mask: Array, margin: int) -> tuple[slice, slice]:
    """Return the rows and columns of a mask's box with a margin in pixels."""
    x, y, w, h = cv2.boundingRect(mask.astype(np.uint8))
    rows = slice(max(y - margin, 0), min(y + h + margin, SIDE))
    return rows, slice(max(x - margin, 0), min(x + w + margin, SIDE))


def cast_shadow(picture: Array, item: PlacedObject, light: Array, rng: Rng) -> None:
    """Draw the shadow of an object: a soft one away from the light, a dark one along its edge."""
    reach = item.size * item.cutout.height * rng.uniform(0.5, 1)
    part = crop_around(item.mask, int(reach * 1.5) + 12)
    mask = item.mask[part].astype(np.float32) * item.cutout.opacity.mean()
    shift = -light[:2] / light[2] * reach
    moved = cv2.warpAffine(mask, np.float64([[1, 0, shift[0]], [0, 1, shift[1]]]), mask.shape[::-1])
    moved = cv2.GaussianBlur(np.maximum(moved, mask * 0.3), (0, 0), 1.5 + reach / 5)
    close = cv2.GaussianBlur(mask, (0, 0), 3)
    picture[part] *= (1 - rng.uniform(0.35, 0.6) * moved)[..., None] * (1 - 0.35 * close)[..., None]


def paint(picture: Array, item: PlacedObject) -> None:
    """Draw an object inside its mask, with the soft edge of a lens."""
    cutout = item.cutout
    part = crop_around(item.mask, 4)
    mask = cv2.GaussianBlur(item.mask[part].astype(np.float32), (0, 0), 0.6)
    matrix = item.matrix - np.array([[0, 0, part[1].start], [0, 0, part[0].start]])
    image, opacity = (
        cv2.warpAffine(a, matrix, mask.shape[::-1], borderMode=cv2.BORDER_REPLICATE)
        for a in (cutout.image, cutout.opacity)
    )
    behind = picture[part]
    through = cv2.GaussianBlur(behind, (0, 0), cutout.haze) if cutout.haze else behind
    drawn = through + (np.clip(image, 0, 1.2) - through) * opacity[..., None]
    behind += (drawn - behind) * mask[..., None]


def photograph(rng: Rng, picture: Array, light: Array) -> Array:
    """Add uneven light, a vignette, a colour cast, blur and noise; return (512, 512, 3) uint8."""
    x, y = (a / SIDE - 0.5 for a in grid((SIDE, SIDE)))
    lit = 1 + rng.uniform(0.1, 0.5) * (x * light[0] + y * light[1]) + 0.08 * noise(rng, (SIDE, SIDE), 300, 1)
    lit = lit * (1 - rng.uniform(0, 0.6) * (x * x + y * y)) * rng.uniform(0.85, 1.15)
    cast = 1 + 0.22 * (hsv(rng.choice([0.1, 0.1, 0.58, 0.3]), rng.uniform(0, 0.6), 1) - 0.85)
    picture = picture * np.float32(lit)[..., None] * np.float32(cast)
    picture = picture * np.float32((rng.uniform(0.36, 0.58) / picture.mean()) ** 0.7)  # automatic exposure
    grey = picture.mean(-1, keepdims=True)
    picture = grey + (picture - grey) * np.float32(rng.uniform(0.6, 0.95))
    picture = cv2.GaussianBlur(picture, (0, 0), rng.uniform(0.35, 0.95))
    picture = np.clip(picture, 0, 1) ** np.float32(rng.uniform(0.85, 1.15))
    level = np.float32(rng.uniform(0.006, 0.025))
    sensor = grain(rng, (SIDE, SIDE))[..., None] + 0.4 * rng.standard_normal(picture.shape, np.float32)
    return np.uint8(np.clip(picture + level * sensor, 0, 1) * 255 + 0.5)


def annotate(item: PlacedObject) -> dict[str, Any]:
    """Make the COCO annotation of an object; its area is the pixel count of its mask."""
    x, y, w, h = cv2.boundingRect(item.mask.astype(np.uint8))
    return {
        'category_id': item.category_id,
        'segmentation': [item.polygon.ravel().tolist()],
        'area': float(item.mask.sum()),
        'bbox': [float(v) for v in (x, y, w, h)],
        'iscrowd': 0,
    }
