"""Import data sets of other formats: YOLO segmentation labels, and photos with PNG masks of class ids.

    import_yolo(Path('set/data.yaml'), Path('input/mine'))
    import_masks(Path('photos'), Path('masks'), classes, Path('input/mine'))

Photos that are not RGB, or have an EXIF orientation, are saved again upright, as labelling tools show them.
The JSON files are written last: an import that was interrupted has none.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from pycocotools import mask as rle_codec

from config import read_yaml
from data.coco import inside
from data.photos import copy_upright, open_photo, upright_size
from metrics import IGNORED
from utils.errors import BadInput, one_line
from utils.files import write_text
from utils.progress import progress

PHOTO_SUFFIXES = {'.jpg', '.jpeg', '.png', '.webp', '.bmp', '.tif', '.tiff'}
TOLERANCE = 0.01  # YOLO coordinates may lie this far outside 0 to 1, as in its own tools; they are clipped

Size = tuple[int, int]  # (H, W)
Annotate = Callable[[Path, Size], list[dict[str, Any]]]  # takes a photo's path and size


def import_yolo(data_yaml: Path, out: Path, overwrite: bool) -> tuple[str, ...]:
    """Import a YOLO segmentation set and return its classes, the background first. Raises BadInput.

    Its train and val become train_all.json, its test becomes test.json and test_labels.json.
    """
    settings = read_yaml(data_yaml)
    if not isinstance(settings, dict):
        raise BadInput(f'{data_yaml}: found {type(settings).__name__}, expected train, val and names')
    classes = read_names(data_yaml, settings)
    root = data_yaml.parent / str(settings.get('path') or '')
    root = root if root.is_dir() else data_yaml.parent  # `path` may be a folder on its author's machine
    train, val, test = (list_yolo(data_yaml, root, settings, split) for split in ('train', 'val', 'test'))
    train += val
    if not train:
        raise BadInput(f'{data_yaml}: lists no photos under train or val')
    repeated = [path for path, count in Counter(train + test).items() if count > 1]
    if repeated:
        raise BadInput(f'{data_yaml}: {repeated[0]} is listed twice in train, val and test')
    refuse_existing(out, overwrite)

    def annotate(path: Path, size: Size) -> list[dict[str, Any]]:
        return [polygon_annotation(*item, size) for item in read_yolo_label(path, len(classes))]

    names = {path: photo_name(root, path) for path in train + test}
    splits = {'train_all.json': train, 'test.json': test, 'test_labels.json': test}
    write_set(out, classes, splits, names, annotate)
    return classes


def read_names(path: Path, settings: dict[str, Any]) -> tuple[str, ...]:
    """Read the class names of a data.yaml, a list or a dictionary of 0 to n - 1, and put Background first."""
    names = settings.get('names')
    if isinstance(names, dict) and sorted(names, key=str) == sorted(range(len(names)), key=str):
        names = [names[k] for k in range(len(names))]
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        raise BadInput(f'{path}: names is {str(names)[:80]!r}, expected a list of names, or 0: name, 1: ...')
    classes = ('Background', *names)
    if len(set(classes)) < len(classes) or len(classes) > IGNORED:
        rule = f'must be unique, without Background, and at most {IGNORED - 1}'
        raise BadInput(f'{path}: names {rule}: {names}')
    return classes


def list_yolo(data_yaml: Path, root: Path, settings: dict[str, Any], split: str) -> list[Path]:
    """List the photos of a split: a folder, a .txt file of paths, or a list of either. Raises BadInput."""
    sources = settings.get(split) or []
    photos = []
    for text in sources if isinstance(sources, list) else [sources]:
        # Roboflow writes ../train/images, relative to a folder that does not exist
        choices = [root / str(text), root / str(text).removeprefix('../')]
        path = next((path for path in choices if path.exists()), None)
        if path is None:
            raise BadInput(f'{data_yaml}: {split}: {choices[0]}: no such folder or list')
        if path.is_dir():
            photos += list_photos(path)
        else:
            photos += [path.parent / line.strip() for line in read_lines(path) if line.strip()]
    return photos


def photo_name(root: Path, path: Path) -> str:
    """Return a photo's file_name, its path relative to the root; raise BadInput if it lies elsewhere."""
    if not inside(root, str(path.absolute())):
        raise BadInput(f'{path}: lies outside {root}')
    return path.resolve().relative_to(root.resolve()).as_posix()


def label_path(photo: Path) -> Path:
    """Return the path of a photo's YOLO label: its last folder `images` becomes `labels`."""
    parts = list(photo.with_suffix('.txt').parts)
    if 'images' in parts[:-1]:
        parts[len(parts) - 2 - parts[-2::-1].index('images')] = 'labels'
    return Path(*parts)


def read_yolo_label(photo: Path, num_classes: int) -> list[tuple[int, np.ndarray]]:
    """Read the objects of a photo: class ids from 1 on, and (M, 2) x y from 0 to 1. Raises BadInput.

    A photo without a label file has no objects, as in YOLO's own tools.
    """
    path = label_path(photo)
    objects = []
    for number, line in enumerate(read_lines(path) if path.exists() else [], start=1):
        if not line.strip():
            continue
        first, *rest = line.split()
        where = f'{path}: line {number}'
        if not re.fullmatch(r'\d{1,3}', first, re.ASCII) or int(first) >= num_classes - 1:
            raise BadInput(f'{where}: found the class {first!r}, expected 0 to {num_classes - 2}')
        if len(rest) == 4:
            raise BadInput(f'{where}: found a box, expected a polygon: a class and x y of at least 3 points')
        if len(rest) < 6 or len(rest) % 2:
            raise BadInput(f'{where}: found {len(rest)} coordinates, expected x y of at least 3 points')
        objects.append((int(first) + 1, read_points(rest, where)))
    return objects


def read_points(words: list[str], where: str) -> np.ndarray:
    """Parse coordinates into (M, 2) x y, clipped to 0 to 1. Raises BadInput."""
    values = []
    for word in words:
        try:
            values.append(float(word))
        except ValueError:
            values.append(math.nan)
        if not -TOLERANCE <= values[-1] <= 1 + TOLERANCE:  # refuses NaN too
            allowed = "0 to 1, a fraction of the photo's side"
            raise BadInput(f'{where}: found the coordinate {word!r}, expected {allowed}')
    return np.clip(np.array(values).reshape(-1, 2), 0, 1)


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


def import_masks(
    photos: Path, masks: Path, classes: Sequence[str], out: Path, test: Path | None, overwrite: bool
) -> None:
    """Import photos and their masks, PNG files of class ids at the photos' own size. Raises BadInput.

    The mask of a/b.jpg is masks/a/b.jpg.png, as `prepare.py masks` writes it, or masks/a/b.png.
    """
    train, tests = list_photos(photos), list_photos(test) if test else []
    mask_paths = {path: find_mask(photos, masks, path) for path in train}
    unused = set(masks.rglob('*.png')) - set(mask_paths.values())
    if unused:
        raise BadInput(f'{min(unused)}: no photo under {photos} has this mask (unused masks: {len(unused)})')
    refuse_existing(out, overwrite)

    def annotate(path: Path, size: Size) -> list[dict[str, Any]]:
        mask = read_mask(mask_paths[path], len(classes))
        if mask.shape != size:
            (height, width), expected = mask.shape, f'{size[0]}x{size[1]}'
            raise BadInput(f'{mask_paths[path]}: found {height}x{width} pixels, its photo has {expected}')
        return [rle_annotation(int(k), mask == k) for k in np.unique(mask) if k]

    names = {path: path.relative_to(photos).as_posix() for path in train}
    names |= {path: path.relative_to(test).as_posix() for path in tests}
    write_set(out, classes, {'train_all.json': train, 'test.json': tests}, names, annotate)


def find_mask(photos: Path, masks: Path, photo: Path) -> Path:
    """Return the path of a photo's mask; raise BadInput if it has none or two."""
    name = photo.relative_to(photos)
    choices = [masks / f'{name}.png', masks / name.with_suffix('.png')]
    paths = [path for path in choices if path.is_file()]
    if len(paths) != 1:
        count = 'two masks' if paths else 'no mask'
        raise BadInput(f'{photo}: has {count}; expected {choices[0]} or {choices[1]}')
    return paths[0]


def read_mask(path: Path, num_classes: int) -> np.ndarray:
    """Read a mask as (H, W) uint8; raise BadInput for an id that is neither a class nor IGNORED."""
    with open_photo(path) as image:
        if image.mode not in ('L', 'P'):
            raise BadInput(f'{path}: found mode {image.mode}, expected ids in one channel of 8 bits')
        mask = np.asarray(image)
    wrong = np.unique(mask[(mask >= num_classes) & (mask != IGNORED)])
    if len(wrong):
        raise BadInput(f'{path}: found the id {wrong[0]}, expected 0 to {num_classes - 1}, or {IGNORED}')
    return mask


def rle_annotation(k: int, drawn: np.ndarray) -> dict[str, Any]:
    """Make an annotation of the (H, W) bool pixels of a class; IGNORED becomes a crowd region."""
    rle = rle_codec.encode(np.asfortranarray(drawn, np.uint8))
    return {
        'category_id': 1 if k == IGNORED else k,
        'iscrowd': int(k == IGNORED),
        'segmentation': {'size': list(drawn.shape), 'counts': rle['counts'].decode()},
        'area': int(drawn.sum()),
        'bbox': rle_codec.toBbox(rle).tolist(),
    }


def read_lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding='utf-8').splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f'{path}: cannot be read: {one_line(error)}') from None


def list_photos(folder: Path) -> list[Path]:
    """List the photos below a folder by name; raise BadInput if there are none."""
    if not folder.is_dir():
        raise BadInput(f'{folder}: no such folder')
    photos = sorted(path for path in folder.rglob('*') if path.suffix.lower() in PHOTO_SUFFIXES)
    if not photos:
        raise BadInput(f'{folder}: found no photos, expected {", ".join(sorted(PHOTO_SUFFIXES))}')
    return photos


def refuse_existing(out: Path, overwrite: bool) -> None:
    """Raise BadInput if `out` holds a training set already."""
    path = out / 'train_all.json'
    if path.exists() and not overwrite:
        raise BadInput(f'{path}: already exists; give another --out, or --overwrite')


def write_set(
    out: Path,
    classes: Sequence[str],
    splits: dict[str, list[Path]],
    names: dict[Path, str],
    annotate: Annotate,
) -> None:
    """Read and check everything, then write a data root: photos, a JSON file per split. Raises BadInput."""
    photos = list(dict.fromkeys(path for paths in splits.values() for path in paths))
    if len(set(names.values())) < len(names):
        raise BadInput(f'{out}: two photos would have the same name there')
    sizes = {path: upright_size(path) for path in progress(photos, 'photos', 'photo')}
    contents = {
        file_name: make_content(file_name, classes, {path: sizes[path] for path in paths}, names, annotate)
        for file_name, paths in splits.items()
        if paths
    }
    for path in progress(photos, 'copy', 'photo'):
        copy_upright(path, out / names[path])
    for file_name in ('train_all.json', 'test.json', 'test_labels.json'):
        if file_name in contents:
            write_text(out / file_name, json.dumps(contents[file_name]))
        else:
            (out / file_name).unlink(missing_ok=True)  # from an earlier import
    print(f'wrote {out}')


def make_content(
    file_name: str,
    classes: Sequence[str],
    sizes: dict[Path, Size],
    names: dict[Path, str],
    annotate: Annotate,
) -> dict[str, Any]:
    """Make the content of a split's JSON file and print its counts; test.json has no annotations."""
    images, annotations, is_test = [], [], file_name == 'test.json'
    for image_id, (path, size) in enumerate(progress(sizes.items(), file_name, 'photo', len(sizes))):
        images.append({'id': image_id, 'file_name': names[path], 'height': size[0], 'width': size[1]})
        for annotation in [] if is_test else annotate(path, size):
            annotations.append({'id': len(annotations), 'image_id': image_id, **annotation})
    empty = len(images) - len({annotation['image_id'] for annotation in annotations})
    labels = '' if is_test else f', {len(annotations)} annotations, {empty} photos with none'
    print(f'{file_name}: {len(images)} photos{labels}')
    categories = [{'id': k, 'name': name} for k, name in enumerate(classes) if k]
    return {'images': images, 'categories': categories, 'annotations': annotations}
