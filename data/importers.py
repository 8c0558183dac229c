"""Data sets of other formats as data roots: YOLO's segmentation labels, and masks of ids as PNG.

    import_yolo(Path('set/data.yaml'), Path('input/mine'))
    import_masks(Path('photos'), Path('masks'), classes, Path('input/mine'))

Photos are copied, byte for byte; one that is not RGB, or that its EXIF turns, is written anew as one sees it,
which is how other tools label it. The JSON files come last, so that a set is whole or has none.
"""

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import ExifTags, Image, ImageOps
from pycocotools import mask as rle_codec

from config import read_yaml
from data.coco import FORMATS, MAX_PIXELS, MAX_SIDE, UNREADABLE, inside
from metrics import IGNORED
from utils.errors import BadInput, one_line
from utils.files import write_text, write_whole
from utils.progress import progress

PHOTOS = {'.jpg', '.jpeg', '.png', '.webp', '.bmp', '.tif', '.tiff'}
TURNED = (5, 6, 7, 8)  # EXIF orientations that swap height and width
SLACK = 0.01  # how far beyond 0 and 1 a YOLO coordinate may be, as its own tools allow; it is clipped


# --- YOLO


def import_yolo(data_yaml: Path, out: Path, overwrite: bool = False) -> tuple[str, ...]:
    """A YOLO segmentation set, data.yaml and its photos and labels: train and val become train_all.json,
    test becomes test.json and test_labels.json. Returns the classes, those of the set after the background.
    Raises BadInput.
    """
    settings = read_yaml(data_yaml)
    if not isinstance(settings, dict):
        raise BadInput(f'{data_yaml}: found {type(settings).__name__}, expected train, val and names')
    classes = read_names(data_yaml, settings)
    root = data_yaml.parent / str(settings.get('path') or '')
    root = root if root.is_dir() else data_yaml.parent  # a path in its author's own folders
    train = [path for split in ('train', 'val') for path in list_yolo(data_yaml, root, settings, split)]
    test = list_yolo(data_yaml, root, settings, 'test')
    if not train:
        raise BadInput(f'{data_yaml}: has neither train nor val; expected their photos')
    twice = [path for path, count in Counter(train + test).items() if count > 1]
    if twice:
        raise BadInput(f'{data_yaml}: {twice[0]} is in two of train, val and test, or twice in one')
    refuse_existing(out, overwrite)

    def annotate(path: Path, size: tuple[int, int]) -> list[dict[str, Any]]:
        objects = read_yolo_label(path, len(classes))
        return [polygon_annotation(category_id, points, size) for category_id, points in objects]

    names = {path: photo_name(root, path) for path in train + test}
    splits = {'train_all.json': train, 'test.json': test, 'test_labels.json': test}
    write_set(out, classes, splits, names, annotate)
    return classes


def read_names(path: Path, settings: dict[str, Any]) -> tuple[str, ...]:
    """Background, then the names of a data.yaml, a list or a dictionary of 0 to n - 1. Raises BadInput."""
    names = settings.get('names')
    if isinstance(names, dict) and sorted(names, key=str) == sorted(range(len(names)), key=str):
        names = [names[k] for k in range(len(names))]
    if not isinstance(names, list) or not names or not all(isinstance(name, str) and name for name in names):
        raise BadInput(f'{path}: names is {str(names)[:80]!r}, expected a list of names, or 0: name, 1: ...')
    classes = ('Background', *names)
    if len(set(classes)) < len(classes) or len(classes) > IGNORED:
        raise BadInput(f'{path}: names has a name twice, or Background, or more than {IGNORED - 1}: {names}')
    return classes


def list_yolo(data_yaml: Path, root: Path, settings: dict[str, Any], split: str) -> list[Path]:
    """The photos of a split: those of a folder, of a .txt of paths, or of a list of such. Raises BadInput."""
    listed = settings.get(split) or []
    found = []
    for text in listed if isinstance(listed, list) else [listed]:
        # Roboflow writes ../train/images, from a folder that is not there
        choices = [root / str(text), root / str(text).removeprefix('../')]
        path = next((path for path in choices if path.exists()), None)
        if path is None:
            raise BadInput(f'{data_yaml}: {split}: {choices[0]}: no such folder or list')
        if path.is_dir():
            found += list_photos(path)
        else:
            found += [path.parent / line.strip() for line in read_lines(path) if line.strip()]
    return found


def photo_name(root: Path, path: Path) -> str:
    """A photo's file_name: its path below the root of its set. Raises BadInput where it lies elsewhere."""
    if not inside(root, str(path.absolute())):
        raise BadInput(f'{path}: lies outside {root}')
    return path.resolve().relative_to(root.resolve()).as_posix()


def label_path(photo: Path) -> Path:
    """Where YOLO looks for a photo's label: the last folder `images` of the path is `labels` there."""
    parts = list(photo.with_suffix('.txt').parts)
    if 'images' in parts[:-1]:
        parts[len(parts) - 2 - parts[-2::-1].index('images')] = 'labels'
    return Path(*parts)


def read_yolo_label(photo: Path, num_classes: int) -> list[tuple[int, np.ndarray]]:
    """(class id, background counted; (M, 2) x y from 0 to 1) of each line; none where there is no label file,
    YOLO's way to say background alone. Raises BadInput.
    """
    path = label_path(photo)
    lines = read_lines(path) if path.exists() else []
    objects = []
    for number, line in enumerate(lines, start=1):
        first, *rest = line.split() or ['']
        where = f'{path}: line {number}'
        if not first:
            continue
        if not re.fullmatch(r'\d{1,3}', first, re.ASCII) or int(first) >= num_classes - 1:
            raise BadInput(f'{where}: found the class {first!r}, expected 0 to {num_classes - 2}')
        if len(rest) == 4:
            raise BadInput(f'{where}: is a box; expected a polygon, a class and x y of 3 points or more')
        if len(rest) < 6 or len(rest) % 2:
            raise BadInput(f'{where}: has {len(rest)} coordinates, expected x y of 3 points or more')
        objects.append((int(first) + 1, read_points(rest, where)))
    return objects


def read_points(words: list[str], where: str) -> np.ndarray:
    """(M, 2) x y, clipped to 0 to 1. Raises BadInput."""
    values = []
    for word in words:
        try:
            value = float(word)
        except ValueError:
            value = math.nan
        if not -SLACK <= value <= 1 + SLACK:
            raise BadInput(
                f"{where}: found the coordinate {word!r}, expected 0 to 1, of the photo's own side"
            )
        values.append(value)
    return np.clip(np.array(values).reshape(-1, 2), 0, 1)


def polygon_annotation(category_id: int, points: np.ndarray, size: tuple[int, int]) -> dict[str, Any]:
    """An annotation of (M, 2) x y from 0 to 1 in a photo of (H, W)."""
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


# --- masks


def import_masks(
    photos: Path,
    masks: Path,
    classes: Sequence[str],
    out: Path,
    test: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Photos and a PNG of ids for each, of its size: masks/<file_name>.png, as `prepare.py masks` writes
    them, or masks/<file_name without its ending>.png. Photos under `test` need none. Raises BadInput.
    """
    train, tests = list_photos(photos), list_photos(test) if test else []
    places = {path: mask_path(photos, masks, path) for path in train}
    spare = set(masks.rglob('*.png')) - set(places.values())
    if spare:
        raise BadInput(f'{min(spare)}: is the mask of no photo under {photos}, like {len(spare) - 1} others')
    refuse_existing(out, overwrite)

    def annotate(path: Path, size: tuple[int, int]) -> list[dict[str, Any]]:
        mask = read_mask(places[path], len(classes))
        if mask.shape != size:
            raise BadInput(
                f'{places[path]}: found {mask.shape[0]}x{mask.shape[1]} pixels, its photo has '
                f'{size[0]}x{size[1]}'
            )
        return [rle_annotation(int(k), mask == k) for k in np.unique(mask) if k]

    names = {path: path.relative_to(photos).as_posix() for path in train}
    names |= {path: path.relative_to(test).as_posix() for path in tests}
    write_set(out, classes, {'train_all.json': train, 'test.json': tests}, names, annotate)


def mask_path(photos: Path, masks: Path, photo: Path) -> Path:
    """The mask of a photo. Raises BadInput where there is none, or two."""
    name = photo.relative_to(photos)
    choices = [masks / f'{name}.png', masks / name.with_suffix('.png')]
    there = [path for path in choices if path.is_file()]
    if len(there) != 1:
        raise BadInput(
            f'{photo}: has {"two masks" if there else "no mask"}; expected {choices[0]} or {choices[1]}'
        )
    return there[0]


def read_mask(path: Path, num_classes: int) -> np.ndarray:
    """(H, W) uint8 ids. Raises BadInput for anything but a class or IGNORED."""
    with opened(path, path) as image:
        if image.mode not in ('L', 'P'):
            raise BadInput(f'{path}: found mode {image.mode}, expected ids in one channel of 8 bits')
        mask = np.asarray(image)
    wrong = np.unique(mask[(mask >= num_classes) & (mask != IGNORED)])
    if len(wrong):
        raise BadInput(f'{path}: found the id {wrong[0]}, expected 0 to {num_classes - 1}, or {IGNORED}')
    return mask


def rle_annotation(k: int, drawn: np.ndarray) -> dict[str, Any]:
    """An annotation of one class's (H, W) bool pixels; of IGNORED a crowd."""
    rle = rle_codec.encode(np.asfortranarray(drawn, np.uint8))
    return {
        'category_id': 1 if k == IGNORED else k,
        'iscrowd': int(k == IGNORED),
        'segmentation': {'size': list(drawn.shape), 'counts': rle['counts'].decode()},
        'area': int(drawn.sum()),
        'bbox': rle_codec.toBbox(rle).tolist(),
    }


# --- both


def read_lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding='utf-8').splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f'{path}: cannot be read: {one_line(error)}') from None


def list_photos(folder: Path) -> list[Path]:
    """The photos below a folder, by name. Raises BadInput where there are none."""
    if not folder.is_dir():
        raise BadInput(f'{folder}: no such folder')
    found = sorted(path for path in folder.rglob('*') if path.suffix.lower() in PHOTOS)
    if not found:
        raise BadInput(f'{folder}: has no photos ({", ".join(sorted(PHOTOS))})')
    return found


def refuse_existing(out: Path, overwrite: bool) -> None:
    path = out / 'train_all.json'
    if path.exists() and not overwrite:
        raise BadInput(f'{path}: is there already; give another --out, or --overwrite')


def write_set(
    out: Path,
    classes: Sequence[str],
    splits: dict[str, list[Path]],
    names: dict[Path, str],
    annotate: Callable[[Path, tuple[int, int]], list[dict[str, Any]]],
) -> None:
    """Writes a data root: photos under their names, and a JSON file a split, of which test.json has no
    annotations. Everything is read before anything is written. Raises BadInput.
    """
    photos = list(dict.fromkeys(path for paths in splits.values() for path in paths))
    if len(set(names.values())) < len(names):
        raise BadInput(f'{out}: two photos would have the same name there')
    sizes = {path: upright_size(path) for path in progress(photos, 'photos', 'photo')}
    categories = [{'id': k, 'name': name} for k, name in enumerate(classes) if k]
    contents = {}
    for file_name, paths in splits.items():
        images, annotations, is_test = [], [], file_name == 'test.json'
        for path in progress(paths, file_name, 'photo'):
            height, width = sizes[path]
            image_id = len(images)
            images.append({'id': image_id, 'file_name': names[path], 'height': height, 'width': width})
            for one in [] if is_test else annotate(path, sizes[path]):
                annotations.append({'id': len(annotations), 'image_id': image_id, **one})
        if images:
            content = {'images': images, 'categories': categories, 'annotations': annotations}
            contents[file_name] = json.dumps(content)
            bare = len(images) - len({one['image_id'] for one in annotations})
            labels = '' if is_test else f', {len(annotations)} annotations, {bare} photos with none'
            print(f'{file_name}: {len(images)} photos{labels}')
    for path in progress(photos, 'copy', 'photo'):
        copy_upright(path, out / names[path])
    for file_name in ('train_all.json', 'test.json', 'test_labels.json'):
        if file_name in contents:
            write_text(out / file_name, contents[file_name])
        else:
            (out / file_name).unlink(missing_ok=True)  # of a set that was there before
    print(f'wrote {out}')


@contextmanager
def opened(source: Path | BinaryIO, where: Path | str) -> Iterator[Image.Image]:
    """A picture; `where` is what a message calls it. Raises BadInput where it is broken or too large, also
    from what is done with it inside.
    """
    try:
        with Image.open(source, formats=FORMATS) as image:
            if max(image.size) > MAX_SIDE or image.width * image.height > MAX_PIXELS:
                raise BadInput(f'{where}: has {image.width:,}x{image.height:,} pixels, more than are read')
            yield image
    except UNREADABLE as error:
        raise BadInput(f'{where}: cannot be decoded: {one_line(error)[:300]}') from None


def upright_size(path: Path) -> tuple[int, int]:
    """(H, W) of a photo, decoded whole, as one sees it, turned by its EXIF. Raises BadInput."""
    with opened(path, path) as image:
        image.load()
        width, height = image.size
        return (width, height) if orientation(image) in TURNED else (height, width)


def copy_upright(source: Path, target: Path) -> None:
    """A photo as coco.read_rgb takes it: RGB, and stored as one sees it. Raises BadInput."""
    with opened(source, source) as image, write_whole(target) as file:
        if image.mode == 'RGB' and orientation(image) == 1:
            file.write(source.read_bytes())
        else:
            options = {'quality': 95} if image.format in ('JPEG', 'MPO', 'WEBP') else {}
            upright = ImageOps.exif_transpose(image).convert('RGB')
            upright.save(file, image.format, **options)


def orientation(image: Image.Image) -> int:
    """What EXIF says: 1 is upright, TURNED swap height and width."""
    return image.getexif().get(ExifTags.Base.Orientation, 1)
