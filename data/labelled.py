"""Import photos on which people drew shapes with names: what the importers of labelling tools share.

    import_shapes(Source(Path('photos'), Path('input/mine')), labelled)

An importer reads its files into LabelledPhoto; here they get class ids, and become a data root.
"""

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal
from urllib.parse import unquote

import cv2
import numpy as np
from pycocotools import mask as rle_codec

from config import COMPETITION_FILE, make_config, match_key, read_competition
from data.importers import (
    ImportedSet,
    PhotoFacts,
    Size,
    list_photos,
    name_photos,
    natural_key,
    read_lines,
    refuse_existing,
    refuse_overlap,
    write_set,
)
from data.masks import LeftOut, check_polygon, decode, encode_segmentation, shared_pixels
from data.photos import MAX_PIXELS, MAX_SIDE
from utils.competition import Task
from utils.errors import BadInput, join_first, one_line, plural
from utils.files import normal_name
from utils.json_files import read_bytes, whole_number
from utils.progress import progress

Boxes = Literal['refuse', 'skip', 'fill']
MOST_MEASURED = 200  # photos in which overlaps are measured
MANY = 0.01  # share of the objects' pixels with several classes from which classes overlap on purpose
IGNORE = '__ignore__'  # labelme's label of what is ignored
COVERED = 'covered by objects that lie on top'
BACKGROUND = 'background'
ELLIPSE_CORNERS = 72
MIN_FOLDERS = 10  # fewer are batches, from which no folds could be made
GROUP = '(.*)/'  # the folder of a file name

# what competition.yaml says of a task: the masks of classes that overlap are scored photo by photo
TASKS: dict[Task, dict[str, Any]] = {
    'multiclass': {},
    'multilabel': {'task': 'multilabel', 'score_size': 'own', 'metric': 'image_dice'},
}


@dataclass(frozen=True)
class Shape:
    """Hold an object that a person drew: the name of its class, and what it covers.

    The segmentation is as in COCO: polygons x0, y0, x1, y1, ..., or RLE. Corners of an outline are pixels of
    the object, as OpenCV fills polygons.
    """

    label: str
    where: str
    segmentation: list[list[float]] | dict[str, Any]
    is_outline: bool = False
    is_box: bool = False
    layer: int = 0  # the objects of a higher one lie on top


@dataclass(frozen=True)
class LabelledPhoto:
    """Hold a photo and its shapes, and its (H, W) as the labelling tool saw it, if that is known."""

    path: Path
    where: str
    shapes: Sequence[Shape]
    size: Size | None = None


@dataclass(frozen=True)
class Source:
    """Hold where photos are and a set is to be, and what the command line says of it."""

    photos: Path
    out: Path
    test: Path | None = None
    classes: Sequence[str] = ()  # names, or a file of them
    task: Task | None = None
    boxes: Boxes = 'refuse'
    unlabelled: Literal['skip', 'empty'] = 'skip'  # what becomes of photos without labels
    overwrite: bool = False

    def check(self, *folders: Path) -> None:
        """Raise BadInput if the set cannot be written, before anything is read."""
        refuse_existing(self.out, self.overwrite)
        refuse_overlap(self.out, [self.photos, *folders, *([self.test] if self.test else [])])

    def list_photos(self) -> list[Path]:
        """List the photos that may have labels: those that are not below `test`. Raises BadInput."""
        test = self.test.resolve() if self.test else None
        photos = list_photos(self.photos)
        return [path for path in photos if test is None or not path.resolve().is_relative_to(test)]


@dataclass
class PhotoIndex:
    """Find photos by the names that a labelling tool has for them."""

    folder: Path
    photos: Sequence[Path]
    by_name: dict[str, Path] = field(init=False)
    by_last: dict[str, list[Path]] = field(init=False)

    def __post_init__(self) -> None:
        self.by_name = {normal_name(path.relative_to(self.folder).as_posix()): path for path in self.photos}
        self.by_last = {}
        for path in self.photos:
            self.by_last.setdefault(normal_name(path.name), []).append(path)

    def find(self, where: str, *names: str) -> Path | None:
        """Return the photo with the longest end of a name: folders of a server may come before it.

        %20 may stand for a space. Raises BadInput if only the last part fits, and fits several photos.
        """
        for name in names:
            for form in dict.fromkeys((name, unquote(name))):
                parts = normal_name(form).split('/')
                for n in range(len(parts)):
                    if path := self.by_name.get('/'.join(parts[n:])):
                        return path
                places = self.by_last.get(parts[-1], [])
                if len(places) > 1:
                    fault = f'{parts[-1]} is in {len(places)} folders, such as {places[0]} and {places[1]}'
                    raise BadInput(f'{where}: photo {name[:80]!r}: {fault}; rename one of them')
                if places:
                    return places[0]
        return None


def read_json(path: Path, expected: str) -> Any:
    """Parse a JSON file in UTF-8 or UTF-16, with a byte order mark or without. Raises BadInput."""
    try:
        return json.loads(read_bytes(path))
    except (ValueError, RecursionError) as error:
        raise BadInput(f'{path}: not JSON, or cut off: {one_line(error)[:120]}; {expected}') from None


def read_size(where: str, height: Any, width: Any) -> Size:
    """Return the (H, W) that a label says its photo has. Raises BadInput."""
    sides = whole_number(height), whole_number(width)
    if any(side is None or not 1 <= side <= MAX_SIDE for side in sides) or math.prod(sides) > MAX_PIXELS:
        raise BadInput(f'{where}: height and width are {height!r:.20} and {width!r:.20}, expected pixels')
    return sides


def read_point(where: str, point: Any, unit: str) -> list[float]:
    """Return [x, y] as floats. Raises BadInput."""
    if not isinstance(point, list) or len(point) != 2 or not all(map(is_finite, point)):
        raise BadInput(f'{where}: found the point {str(point)[:60]}, expected [x, y] in {unit}')
    return list(map(float, point))


def is_finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def import_shapes(
    source: Source,
    labelled: Sequence[LabelledPhoto],
    order: Sequence[str] = (),
    facts: Mapping[str, Any] | None = None,
) -> None:
    """Write a data root of labelled photos and of those below source.test. Raises BadInput.

    Classes are source.classes, those of a competition.yaml in source.out, or the labels: in the `order` of
    the tool, or else as a person counts. `facts` are what else competition.yaml is to say.
    """
    refuse_repeated(labelled)
    labelled = take_boxes(source, labelled)
    names = choose_names(source, labelled, order)
    task = choose_task(source, labelled)
    classes = names if task == 'multilabel' else [BACKGROUND.title(), *names]
    classes = make_config({'classes': classes, 'competition': TASKS[task]}, where='classes').classes
    ids = {match_key(name): k for k, name in enumerate(classes)}
    if task == 'multiclass':
        ids |= {match_key(shape.label): 0 for shape in all_shapes(labelled) if is_background(shape.label)}
    refuse_unknown(labelled, ids, classes)
    by_path, left_out = {photo.path: photo for photo in labelled}, LeftOut()
    bare = [path for path in source.list_photos() if path not in by_path]
    if source.unlabelled == 'empty':
        by_path |= {path: LabelledPhoto(path, str(path), ()) for path in bare}

    def annotate(path: Path, facts: PhotoFacts) -> list[dict[str, Any]]:
        check_label_size(by_path[path], facts)
        return make_annotations(by_path[path], facts.displayed, ids, task, left_out)

    tests = list_photos(source.test) if source.test else []
    names_of = name_photos(source.photos, by_path, source.test, tests)
    group = group_by_folder([names_of[path] for path in by_path])
    settings = TASKS[task] | group | dict(facts or {})
    splits = {'train_all.json': list(by_path), 'test.json': tests}
    write_set(ImportedSet(classes, splits, names_of, annotate, settings), source.out, source.overwrite)
    left_out.print()
    if bare:
        others = 'left out (--unlabelled empty takes them as photos without objects)'
        outcome = others if source.unlabelled == 'skip' else 'taken as photos without objects'
        print(f'photos without labels, {outcome}: {len(bare):,}, such as {bare[0]}')


def all_shapes(labelled: Iterable[LabelledPhoto]) -> list[Shape]:
    return [shape for photo in labelled for shape in photo.shapes]


def is_background(label: str) -> bool:
    """Return True for a label that names what no object covers; labelme writes _background_."""
    return match_key(label).strip('_') == BACKGROUND


def refuse_repeated(labelled: Sequence[LabelledPhoto]) -> None:
    """Raise BadInput if two labels are of the same photo, or none has a shape."""
    first: dict[Path, LabelledPhoto] = {}
    for photo in labelled:
        other = first.setdefault(photo.path, photo)
        if other is not photo:
            fault = f'is of {photo.path}, as is {other.where}'
            raise BadInput(f'{photo.where}: {fault}; expected one label a photo: remove one')


def take_boxes(source: Source, labelled: Sequence[LabelledPhoto]) -> list[LabelledPhoto]:
    """Return the photos without boxes, or with them, and print their number. Raises BadInput."""
    shapes = all_shapes(labelled)
    if keep_boxes(source.boxes, [shape.where for shape in shapes if shape.is_box], len(shapes)):
        return list(labelled)
    return [replace(one, shapes=[shape for shape in one.shapes if not shape.is_box]) for one in labelled]


def keep_boxes(boxes: Boxes, places: Sequence[str], objects: int) -> bool:
    """Return whether the boxes at some places are objects, and print their number. Raises BadInput."""
    are_all, count = len(places) == objects, f'{len(places)} of {objects} objects'
    if places and boxes != 'fill' and (boxes == 'refuse' or are_all):
        others = f'all {objects} objects: these are detection labels' if are_all else count
        ways = '--boxes fill takes boxes as rectangles'
        ways = ways if are_all else f'--boxes skip leaves boxes out, {ways}'
        raise BadInput(f'{places[0]}: found a box, as are {others}; expected polygons or masks; {ways}')
    if places:
        print(f'boxes {"taken as rectangles" if boxes == "fill" else "left out"}: {count}')
    return boxes == 'fill'


def choose_names(source: Source, labelled: Sequence[LabelledPhoto], order: Sequence[str]) -> list[str]:
    """Return the names of the classes of objects, and print where they come from. Raises BadInput."""
    if names := given_names(source):
        if not source.classes:
            print(f'{len(names)} classes of objects from {source.out / COMPETITION_FILE}')
        return names
    found: dict[str, str] = {}
    for shape in all_shapes(labelled):
        found.setdefault(match_key(shape.label), shape.label)
    known = {match_key(name): name for name in order}
    names = [*known.values(), *sorted((found[key] for key in found.keys() - known.keys()), key=natural_key)]
    names = [name for name in names if not is_background(name) and name != IGNORE]
    if not names:
        raise BadInput(f'{source.out}: would have no class: the labels have no object; are these the labels?')
    kind = "of the tool's list" if order else 'in which a person would sort them'
    print(f'classes ({len(names)}), in the order {kind}, or that of --classes: {", ".join(names)}')
    return names


def given_names(source: Source) -> list[str]:
    """Return the classes of objects by --classes, or by a competition.yaml in source.out; [] if neither says.

    Raises BadInput.
    """
    if source.classes:
        return [name for name in read_classes(source.classes) if not is_background(name)]
    competition = read_competition(source.out)
    if competition is None or 'classes' not in competition.model_fields_set:
        return []
    return [competition.classes[k] for k in competition.object_ids]


def given_task(out: Path, task: Task | None) -> Task | None:
    """Return the task by --task, or by a competition.yaml in `out`; None if neither says. Raises BadInput."""
    competition = read_competition(out)
    if task is None and competition is not None and 'task' in competition.model_fields_set:
        return competition.task
    return task


def read_classes(entries: Sequence[str]) -> list[str]:
    """Return names that are given, or those in the lines of a file that is. Raises BadInput."""
    if len(entries) > 1 or not Path(entries[0]).is_file():
        return list(entries)
    return [line.strip() for line in read_lines(Path(entries[0])) if line.strip()]


def refuse_unknown(labelled: Sequence[LabelledPhoto], ids: Mapping[str, int], classes: Sequence[str]) -> None:
    """Raise BadInput for a label that is no class, and print the classes without an object."""
    shapes = all_shapes(labelled)
    unknown = Counter(s.label for s in shapes if s.label != IGNORE and match_key(s.label) not in ids)
    if unknown:
        label = unknown.most_common(1)[0][0]
        first = next(shape for shape in shapes if shape.label == label)
        fault = f'found the label {label[:60]!r} ({plural(unknown[label], "object")}), which is no class'
        advice = 'name it among --classes, or rename it'
        raise BadInput(f'{first.where}: {fault}; the classes are {join_first(classes, 40)}; {advice}')
    used = {ids.get(match_key(shape.label)) for shape in shapes}
    empty = [name for name in classes if ids[match_key(name)] not in used and not is_background(name)]
    if empty:
        print(f'no object: {", ".join(empty)}')


def choose_task(source: Source, labelled: Sequence[LabelledPhoto]) -> Task:
    """Return whether classes may overlap: what is asked for, what competition.yaml says, or what labels show.

    Prints how much they do.
    """
    photos = [photo for photo in labelled if photo.shapes]
    photos = photos[:: -(-len(photos) // MOST_MEASURED) or 1]
    whole, shared = Counter(), Counter()
    for photo in progress(photos, 'overlaps', 'photo'):
        for key, (pixels, several) in measure_overlaps(photo).items():
            whole[key] += pixels
            shared[key] += several
    share = shared.total() / max(whole.total(), 1)
    shares = {key: count / whole[key] for key, count in shared.items() if count}
    worst = sorted(shares, key=lambda key: -shares[key])[:3]
    most = f', most of {", ".join(f"{key} ({shares[key]:.0%})" for key in worst)}' if worst else ''
    print(f"{share:.2%} of objects' pixels have several classes, on {plural(len(photos), 'photo')}{most}")
    if task := given_task(source.out, source.task):
        return task
    if share >= MANY and not any(is_layered(photo) for photo in labelled):
        print('task: multilabel, which keeps them; with --task multiclass, the smaller object is on top')
        return 'multilabel'
    print('task: multiclass, the smaller object is on top, or as the tool says; --task multilabel keeps all')
    return 'multiclass'


def is_layered(photo: LabelledPhoto) -> bool:
    """Return True if somebody said which object lies on top."""
    return len({shape.layer for shape in photo.shapes}) > 1


def measure_overlaps(photo: LabelledPhoto) -> dict[str, tuple[int, int]]:
    """Return the pixels of each label, and how many of them another label has, too."""
    size, lost = photo.size or extent(photo.shapes), LeftOut()
    rles: dict[str, list[bytes]] = {}
    for shape in photo.shapes:
        encoded = encode_shape(shape, size, lost)
        if encoded is not None and shape.label != IGNORE and not is_background(shape.label):
            rles.setdefault(shape.label, []).append(encoded[0])
    return shared_pixels(rles, size)


def extent(shapes: Iterable[Shape]) -> Size:
    """Return an (H, W) that holds all polygons: enough to see how they overlap."""
    points = [[0.0, 0.0]]
    for shape in shapes:
        if isinstance(shape.segmentation, list):
            for polygon in shape.segmentation:
                points += np.reshape(polygon, (-1, 2)).tolist()
    width, height = np.ceil(np.max(points, 0)).astype(int) + 1
    if height * width > MAX_PIXELS:
        first = next(iter(shapes)).where
        raise BadInput(f'{first}: polygons reach to {width}x{height} pixels, expected at most {MAX_PIXELS:,}')
    return int(height), int(width)


def check_label_size(photo: LabelledPhoto, facts: PhotoFacts) -> None:
    """Raise BadInput if a photo is not of the size on which its label was drawn."""
    if photo.size in (None, facts.displayed):
        return
    (height, width), (found_height, found_width) = photo.size, facts.displayed
    fault = f'is of {height}x{width} pixels, {photo.path} has {found_height}x{found_width}'
    if photo.size == facts.stored:
        fault += ', by its EXIF turn; save the photo without the turn'
    raise BadInput(f'{photo.where}: {fault}; expected the photo that was labelled, at its own size')


def encode_shape(shape: Shape, size: Size, left_out: LeftOut) -> tuple[bytes, int] | None:
    """Encode what a shape covers as (RLE, pixels), or count it as left out. Raises BadInput."""
    segmentation = shape.segmentation
    if shape.is_outline:
        polygons = [check_polygon(shape.where, polygon, size) for polygon in segmentation]
        parts = [fill_outline(np.reshape(polygon, (-1, 2)), size) for polygon in polygons if len(polygon) > 5]
        segmentation = rle_codec.merge(parts) if parts else []
        if parts:
            return segmentation['counts'], int(rle_codec.area(segmentation))
    record = {'segmentation': segmentation}
    return encode_segmentation(shape.where, record, size, left_out)


def turn_points(points: np.ndarray, degrees: float) -> np.ndarray:
    """Turn (M, 2) x y around 0, clockwise as a photo is seen."""
    c, s = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    return points @ np.array([[c, s], [-s, c]])


def ellipse_points(width: float, height: float) -> np.ndarray:
    """Return (M, 2) x y of an ellipse around 0, by half its sides."""
    angle = np.linspace(0, 2 * np.pi, ELLIPSE_CORNERS, endpoint=False)
    return np.stack([width * np.cos(angle), height * np.sin(angle)], 1)


def fill_outline(points: np.ndarray, size: Size) -> dict[str, Any]:
    """Fill a polygon, (M, 2) x y, with its outline, as cv2.fillPoly does → RLE."""
    points = np.int32(points)  # cut off, not rounded
    (left, top), (right, bottom) = np.maximum(points.min(0), 0), points.max(0) + 1
    shape = (min(bottom, size[0]) - top, min(right, size[1]) - left)
    if min(shape) <= 0:
        return encode_crop(np.zeros((0, 0), bool), 0, 0, size)
    crop = cv2.fillPoly(np.zeros(shape, np.uint8), [points - np.int32([left, top])], 1)
    return encode_crop(crop.view(bool), int(left), int(top), size)


def encode_crop(crop: np.ndarray, left: int, top: int, size: Size) -> dict[str, Any]:
    """Encode an (h, w) bool part of a mask of (H, W) → RLE; it must lie inside."""
    height, width = size
    rows = np.zeros((crop.shape[1], crop.shape[0] + 2), np.int8)
    rows[:, 1:-1] = crop.T  # down the columns
    changes = np.diff(rows, axis=1)
    (column, first), (_, end) = np.nonzero(changes == 1), np.nonzero(changes == -1)
    start = (left + column) * height + top
    edges = np.stack([start + first, start + end], 1).ravel()
    if len(edges):  # a run that goes on in the next column is one
        ends = np.flatnonzero(edges[1:-1:2] == edges[2::2]) * 2 + 1
        edges = np.delete(edges, [*ends, *(ends + 1)])
    counts = np.diff([0, *edges, height * width]).tolist()
    return rle_codec.frPyObjects({'size': [height, width], 'counts': counts}, height, width)


def as_text(rle: Mapping[str, Any]) -> dict[str, Any]:
    """Return pycocotools' RLE as JSON has it."""
    return {**rle, 'counts': rle['counts'].decode()}


def make_annotations(
    photo: LabelledPhoto, size: Size, ids: Mapping[str, int], task: Task, left_out: LeftOut
) -> list[dict[str, Any]]:
    """Make the annotations of a photo of (H, W). Raises BadInput.

    Where a pixel has one class, objects lose what those of higher layers cover.
    """
    encoded = [(shape, encode_shape(shape, size, left_out)) for shape in photo.shapes]
    drawn = [(shape, *one) for shape, one in encoded if one is not None]
    covered: dict[int, bytes] = {}
    if task == 'multiclass' and is_layered(photo):
        covered = cover([(shape.layer, rle) for shape, rle, _ in drawn], size)
    annotations = []
    for n, (shape, rle, pixels) in enumerate(drawn):
        is_plain = n not in covered and isinstance(shape.segmentation, list) and not shape.is_outline
        rle = {'size': list(size), 'counts': covered.get(n, rle)}
        pixels = int(rle_codec.area(rle)) if n in covered else pixels
        if not pixels:
            left_out.note(COVERED, shape.where)
            continue
        shown = as_text(rle)
        if is_plain:
            shown = [[round(value, 3) for value in polygon] for polygon in shape.segmentation]
        is_ignored = shape.label == IGNORE
        for k in ignored_ids(ids, task) if is_ignored else [ids[match_key(shape.label)]]:
            annotations.append(
                {
                    'category_id': k,
                    'iscrowd': int(is_ignored),
                    'segmentation': shown,
                    'area': pixels,
                    'bbox': rle_codec.toBbox(rle).tolist(),
                }
            )
    return annotations


def ignored_ids(ids: Mapping[str, int], task: Task) -> list[int]:
    """Return the classes under which an ignored region is listed: all if each has a mask, else any."""
    return sorted(set(ids.values())) if task == 'multilabel' else [0]


def cover(layers: Sequence[tuple[int, bytes]], size: Size) -> dict[int, bytes]:
    """Return what is left of each object, by its number, from which objects of higher layers take pixels."""
    left: dict[int, bytes] = {}
    above = np.zeros(size[::-1], bool)
    for layer in sorted({layer for layer, _ in layers}, reverse=True):
        level = np.zeros_like(above)
        for n, (own, rle) in enumerate(layers):
            if own != layer:
                continue
            mask = decode(rle, size)
            level |= mask
            if (mask & above).any():
                left[n] = rle_codec.encode(np.asfortranarray((mask & ~above).T, np.uint8))['counts']
        above |= level
    return left


def group_by_folder(names: Sequence[str]) -> dict[str, str]:
    """Return `group` for competition.yaml if folders seem to be of one person or scene each."""
    folders = Counter(name.rpartition('/')[0] for name in names)
    several = sum(count > 1 for count in folders.values())
    if '' in folders or len(folders) < MIN_FOLDERS or several < len(folders) / 2:
        return {}
    print(f'{len(names)} photos in {len(folders)} folders: group keeps those of a folder in one fold')
    return {'group': GROUP}
