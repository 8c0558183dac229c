"""Import YOLO segmentation labels: `class x1 y1 x2 y2 ...` from 0 to 1, a line an object, a file a photo.

import_yolo(Path('set/data.yaml'), Path('input/mine'), boxes='refuse', overwrite=False)

YOLO's class 0 is class 1 after the background, or class 0 if classes may overlap. A class that is named
background is drawn as such.
"""

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np

from config import make_config
from data.importers import (
    PHOTO_SUFFIXES,
    ImportedSet,
    PhotoFacts,
    Size,
    is_junk,
    list_photos,
    read_lines,
    refuse_existing,
    refuse_overlap,
    refuse_shared,
    write_set,
)
from data.labelled import TASKS, Boxes, given_task, is_background, keep_boxes
from data.paths import find_photo, inside
from utils.competition import Task
from utils.errors import BadInput
from utils.files import normal_name
from utils.json_files import parse_number
from utils.yaml_files import read_yaml

TOLERANCE = 0.01  # coordinates may lie this far outside 0 to 1, as in YOLO's own tools; they are clipped
DARKNET = re.compile(r'^\s*(classes|train|valid|names|backup)\s*=', re.MULTILINE)


@dataclass(frozen=True)
class YoloObject:
    """Hold a line of a label file: its class id, 0 of the background, and the numbers after it, of the
    photo's sides.
    """

    category_id: int
    numbers: tuple[float, ...]
    where: str

    @property
    def is_box(self) -> bool:
        return len(self.numbers) == 4

    def points(self) -> np.ndarray:
        """Return the polygon, or the corners of the box, as (M, 2) x y clipped to 0 to 1."""
        numbers = self.numbers
        if self.is_box:
            x, y, width, height = numbers
            left, right, top, bottom = x - width / 2, x + width / 2, y - height / 2, y + height / 2
            numbers = (left, top, right, top, right, bottom, left, bottom)
        return np.clip(np.array(numbers).reshape(-1, 2), 0, 1)


def import_yolo(data_yaml: Path, out: Path, boxes: Boxes, overwrite: bool, task: Task | None = None) -> None:
    """Import a YOLO segmentation set; its task is by default that of a competition.yaml in `out`, or
    multiclass. Raises BadInput.

    Its train and val become train_all.json, its test becomes test.json and test_labels.json. Boxes among the
    polygons are refused, left out ('skip'), or taken as rectangles ('fill').
    """
    settings = read_settings(data_yaml)
    yolo_names = read_names(data_yaml, settings)
    named = [name for name in yolo_names if not is_background(name)]
    classes = make_config({'classes': ('Background', *named)}, where=str(data_yaml)).classes
    ids = [named.index(name) + 1 if name in named else 0 for name in yolo_names]
    root = data_yaml.parent / str(settings.get('path') or '')
    root = root if root.is_dir() else data_yaml.parent  # `path` may be a folder on its author's machine
    splits = list_splits(data_yaml, root, settings)
    photos = [path for paths in splits.values() for path in paths]
    names = {path: photo_name(root, path) for path in photos}
    labels = label_paths(photos)
    bare = {path for path in photos if not labels[path].is_file()}
    refuse_existing(out, overwrite)
    refuse_overlap(out, {path.parent for path in (*labels, *labels.values())})
    refuse_shared(labels, 'label')
    refuse_unused(labels)
    for split, paths in splits.items():
        if split != 'test' and paths and bare.issuperset(paths):
            example = f'that of {paths[0].name} would be {labels[paths[0]]}'
            raise BadInput(f'{data_yaml}: no photo of {split} has a label file; {example}')
    task = given_task(out, task) or 'multiclass'
    skipped = int(task == 'multilabel')  # the background
    objects = {path: read_label(labels[path], ids) for path in photos}
    refuse_poses(data_yaml, objects.values())
    places = [one.where for some in objects.values() for one in some if one.is_box]
    if not keep_boxes(boxes, places, sum(map(len, objects.values()))):
        objects = {path: [one for one in some if not one.is_box] for path, some in objects.items()}

    def annotate(path: Path, facts: PhotoFacts) -> list[dict[str, Any]]:
        drawn = [one for one in objects[path] if one.category_id >= skipped]
        return [polygon_annotation(one.category_id - skipped, one.points(), facts.displayed) for one in drawn]

    test = splits['test']
    labelled = [path for split, paths in splits.items() if split != 'test' for path in paths]
    files = {'train_all.json': labelled, 'test.json': test}
    if not bare.issuperset(test):
        files['test_labels.json'] = test
    write_set(ImportedSet(classes[skipped:], files, names, annotate, TASKS[task]), out, overwrite)
    for split, paths in splits.items():
        unlabelled = [path for path in paths if path in bare]
        if unlabelled and (split != 'test' or 'test_labels.json' in files):
            count = f'{len(unlabelled)} photos have no label file, so no objects'
            print(f'{split}: {count}, such as {unlabelled[0]}')


def read_settings(path: Path) -> dict[str, Any]:
    """Read a data.yaml, a mapping, or a list of names beside the folder images. Raises BadInput."""
    if path.suffix.lower() in ('.data', '.names'):
        text = '\n'.join(read_lines(path))
        if path.suffix.lower() == '.names' or DARKNET.search(text):
            advice = "write a data.yaml with 'train: train.txt' and 'names: [...]', the lines of obj.names"
            raise BadInput(f'{path}: is a file of Darknet, expected a data.yaml; {advice}')
    if path.suffix.lower() == '.txt':  # Label Studio writes classes.txt and no data.yaml
        return {'names': [line.strip() for line in read_lines(path) if line.strip()], 'train': 'images'}
    settings = read_yaml(path)
    if not isinstance(settings, dict):
        raise BadInput(f'{path}: found {type(settings).__name__}, expected train, val and names')
    if 'kpt_shape' in settings:
        raise BadInput(f'{path}: has kpt_shape, so its labels are poses; expected polygons')
    return settings


def read_names(path: Path, settings: dict[str, Any]) -> list[str]:
    """Read the class names of a data.yaml, a list or a dictionary of 0 to n - 1. Raises BadInput."""
    names = settings.get('names')
    if isinstance(names, dict) and sorted(map(str, names)) == sorted(map(str, range(len(names)))):
        names = [name for _, name in sorted((int(k), name) for k, name in names.items())]
    if not isinstance(names, list) or not names:
        raise BadInput(f'{path}: names is {str(names)[:80]!r}, expected a list of names, or 0: name, 1: ...')
    for name in names:
        if not isinstance(name, str) or not name:
            raise BadInput(f'{path}: names has {str(name)[:60]!r}, expected a name; put it in quotes')
    count = settings.get('nc')
    if count is not None and str(count) != str(len(names)):
        raise BadInput(f'{path}: nc is {str(count)[:20]}, but names has {len(names)}; mend the wrong one')
    return names


def list_splits(data_yaml: Path, root: Path, settings: dict[str, Any]) -> dict[str, list[Path]]:
    """Return the photos of train, of val without those of train, and of test. Raises BadInput."""
    val = next((key for key in ('val', 'valid', 'validation') if settings.get(key)), 'val')
    train, valid, test = (list_yolo(data_yaml, root, settings, split) for split in ('train', val, 'test'))
    if not train and not valid:
        raise BadInput(f'{data_yaml}: lists no photos under train or val')
    real = {path: path.resolve() for path in (*train, *valid, *test)}
    places = {real[path] for path in train}
    new = [path for path in valid if real[path] not in places]
    if shared := len(valid) - len(new):
        print(f'{data_yaml}: {shared} photos are in train and in {val}; each is taken once')
    places |= {real[path] for path in new}
    if leaked := [path for path in test if real[path] in places]:
        fault = f'{leaked[0]} is in train or val, and in test ({len(leaked)} such photos)'
        raise BadInput(f'{data_yaml}: {fault}; take it out of one of them')
    splits = {'train': train, val: new, 'test': test}
    for split, paths in splits.items():
        counts = Counter(real[path] for path in paths)
        if repeated := [path for path in paths if counts[real[path]] > 1]:
            raise BadInput(f'{data_yaml}: {split}: {repeated[0]} is listed twice')
    return splits


def list_yolo(data_yaml: Path, root: Path, settings: dict[str, Any], split: str) -> list[Path]:
    """List the photos of a split: a folder, a .txt file of paths, or a list of either. Raises BadInput."""
    sources = settings.get(split) or []
    photos = []
    for source in sources if isinstance(sources, list) else [sources]:
        # Roboflow writes ../train/images, relative to a folder that does not exist
        text = str(source).replace('\\', '/')
        choices = [root / text.removeprefix('../'), root / text, *tails(root, text)]
        if split == 'test':  # the folder images alone is that of the training photos
            choices = [path for path in choices if path != root / 'images' or text.strip('./') == 'images']
        path = next((path for path in choices if path.exists()), None)
        if path is None and split == 'test':  # Roboflow names it always
            print(f'{data_yaml}: test: {root / text}: no such folder, so the set has no test.json')
            continue
        if path is None:
            advice = f'mend it, or leave {split} out if there are none'
            raise BadInput(f'{data_yaml}: {split}: {root / text}: no such folder or list; {advice}')
        if path.is_dir():
            photos += list_photos(path)
        elif path.suffix.lower() in PHOTO_SUFFIXES:
            photos.append(path)
        else:
            photos += list_of_photos(root, path)
    return photos


def tails(root: Path, name: str) -> list[Path]:
    """Return where an absolute path of another machine, such as /content/set/train/images, may be below the
    root: its last parts, the longest choice first.
    """
    parts = PureWindowsPath(name).parts if PureWindowsPath(name).root else ()
    return [root.joinpath(*parts[n:]) for n in range(1, len(parts))]


def list_of_photos(root: Path, path: Path) -> list[Path]:
    """Read a .txt file of photos, relative to itself or to the root. Raises BadInput."""
    photos = []
    for number, line in enumerate(read_lines(path), start=1):
        name = line.strip().replace('\\', '/')
        if not name or is_junk(Path(Path(name).name)):
            continue
        # CVAT and Darknet write data/ before the paths, for the folder in which the set is to lie
        names = [name, name.removeprefix('data/')]
        choices = [folder / name for name in names for folder in (path.parent, root)]
        choices += [*tails(path.parent, name), *tails(root, name)]
        photo = next((choice for choice in choices if choice.is_file()), None)
        if photo is None:
            raise BadInput(f'{path}: line {number}: {choices[0]}: no such photo')
        photos.append(photo)
    return photos


def photo_name(root: Path, path: Path) -> str:
    """Return a photo's file_name, its path relative to the root; raise BadInput if it lies elsewhere."""
    if not inside(root, str(path.absolute())):
        raise BadInput(f'{path}: lies outside {root}')
    return path.resolve().relative_to(root.resolve()).as_posix()


def label_paths(photos: Iterable[Path]) -> dict[Path, Path]:
    """Return the label file of each photo: its last folder `images` becomes `labels`, if the file is there.

    Else it is beside the photo, as in YOLO's own tools. Any Unicode form of the name is found.
    """
    labels = {}
    for photo in photos:
        choices = [photo.with_suffix('.txt')]
        parts = list(choices[0].parts)
        folders = [part.lower() for part in parts[-2::-1]]
        if 'images' in folders:
            for folder in ('Labels', 'labels'):  # Windows and macOS find either
                parts[len(parts) - 2 - folders.index('images')] = folder
                choices.insert(0, Path(*parts))
        paths = [find_photo(path.parent, path.name) for path in choices]
        labels[photo] = next((path for path in paths if path.is_file()), choices[0])
    return labels


def refuse_unused(labels: dict[Path, Path]) -> None:
    """Raise BadInput for a label file that belongs to no photo, in the folders of the labels."""
    folders: dict[Path, set[Path]] = {}
    for photo, path in labels.items():
        folders.setdefault(path.parent, set()).add(photo.parent)
    used = set(labels.values())
    unused = []
    for folder, photo_folders in folders.items():
        photos = {
            normal_name(path.stem)
            for photo_folder in photo_folders
            for path in photo_folder.iterdir()
            if path.suffix.lower() in PHOTO_SUFFIXES  # a list may leave some of them out
        }
        for path in folder.glob('*.txt') if folder.is_dir() else []:
            known = path in used or normal_name(path.stem) in photos or is_junk(Path(path.name))
            if not known and looks_like_labels(path):
                unused.append(path)
    if unused:
        count = f'label files that belong to no photo: {len(unused)}'
        raise BadInput(f'{min(unused)}: there is no photo of that name ({count}); rename or remove it')


def looks_like_labels(path: Path) -> bool:
    """Return True if the first line of a text file begins with two numbers; classes.txt and notes do not."""
    lines = [line.split() for line in read_lines(path) if line.strip()]
    return bool(lines) and len(lines[0]) > 4 and all(parse_number(word) is not None for word in lines[0][:2])


def read_label(path: Path, ids: Sequence[int]) -> list[YoloObject]:
    """Read the objects of a label file; one that does not exist has none. `ids` are the class ids of YOLO's
    classes. Raises BadInput.
    """
    objects = []
    for number, line in enumerate(read_lines(path) if path.exists() else [], start=1):
        if not line.strip():
            continue
        first, *rest = line.split()
        where = f'{path}: line {number}'
        match = re.fullmatch(r'(\d{1,3})(\.0*)?', first, re.ASCII)
        if match is None or int(match[1]) >= len(ids):
            raise BadInput(f'{where}: found the class {first[:40]!r}, expected 0 to {len(ids) - 1}')
        if len(rest) % 3 == 1 and len(rest) > 4 and is_visibility(rest[6::3]):
            fault = f'found a box and {len(rest) // 3 - 1} keypoints with their visibility, so a pose'
            raise BadInput(f'{where}: {fault}; expected a polygon: x y of at least 3 points')
        if len(rest) % 2 and len(rest) > 4:
            fault = f'found {len(rest)} coordinates, expected x y of at least 3 points'
            advice = 'is of predictions: save them without (save_conf=False)'
            raise BadInput(f'{where}: {fault}; a last number that is a confidence {advice}')
        if len(rest) < 6 and len(rest) != 4:
            raise BadInput(f'{where}: found {len(rest)} coordinates, expected x y of at least 3 points')
        objects.append(YoloObject(ids[int(match[1])], read_numbers(rest, where), where))
    return objects


def is_visibility(words: Sequence[str]) -> bool:
    """Return True for numbers 0, 1 and 2, of which one at least is 2: no coordinate of a polygon is."""
    values = {parse_number(word) for word in words}
    return 2 in values and values <= {0, 1, 2}


def read_numbers(words: list[str], where: str) -> tuple[float, ...]:
    """Parse coordinates from 0 to 1. Raises BadInput."""
    values = []
    for word in words:
        value = parse_number(word)
        if value is None or not -TOLERANCE <= value <= 1 + TOLERANCE:
            allowed = "0 to 1, a fraction of the photo's side"
            raise BadInput(f'{where}: found the coordinate {word[:40]!r}, expected {allowed}')
        values.append(value)
    return tuple(values)


def refuse_poses(data_yaml: Path, objects: Iterable[Sequence[YoloObject]]) -> None:
    """Raise BadInput if every line is a box and keypoints of x, y and a visibility of 0, 1 or 2."""
    rows = [one.numbers for some in objects for one in some]

    def is_pose(row: tuple[float, ...]) -> bool:
        x, y, width, height = row[:4]
        sides = (x - width / 2, x + width / 2, y - height / 2, y + height / 2)
        is_box = min(width, height) > 0 and min(sides) >= -TOLERANCE and max(sides) <= 1 + TOLERANCE
        return is_box and len(row) > 7 and len(row) % 3 == 1 and set(row[6::3]) <= {0, 1}

    if rows and len({len(row) for row in rows}) == 1 and all(map(is_pose, rows)):
        fault = f'all {len(rows)} labels are boxes with {len(rows[0]) // 3 - 1} keypoints each, so poses'
        raise BadInput(f'{data_yaml}: {fault}; expected polygons: a class and x y of at least 3 points')


def polygon_annotation(category_id: int, points: np.ndarray, size: Size) -> dict[str, Any]:
    """Make an annotation of a polygon, (M, 2) x y from 0 to 1, in a photo of (H, W)."""
    pixels = points * (size[1], size[0])
    x, y = pixels.T
    (left, top), (right, bottom) = pixels.min(0), pixels.max(0)
    return {
        'category_id': category_id,
        'iscrowd': 0,
        'segmentation': [pixels.round(3).ravel().tolist()],
        'area': float(abs(x @ np.roll(y, 1) - y @ np.roll(x, 1)) / 2),  # shoelace formula
        'bbox': [float(v) for v in (left, top, right - left, bottom - top)],
    }
