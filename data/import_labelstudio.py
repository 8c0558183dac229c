"""Import the JSON export of Label Studio: polygons in percent of the photo, and masks of the brush.

    import_label_studio(Source(Path('photos'), Path('input/mine')), Path('project-1.json'))

Its run lengths of the brush are those of the package rle-pack: a stream of bits, the high ones first, of the
photo's red, green, blue and opacity, along the rows. A pixel more than half opaque belongs to the mask.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from pycocotools import mask as rle_codec

from data.importers import PHOTO_SUFFIXES, Size
from data.labelled import (
    LabelledPhoto,
    PhotoIndex,
    Shape,
    Source,
    as_text,
    ellipse_points,
    import_shapes,
    is_finite,
    read_json,
    read_point,
    read_size,
    turn_points,
)
from data.masks import LeftOut
from utils.errors import BadInput, join_first, plural
from utils.json_files import require

EXPECTED = "expected Label Studio's export named JSON, a list of tasks with data and annotations"
UPLOAD_ID = 9  # characters before the name of an uploaded photo: 8 of a number in hexadecimal, and -


def import_label_studio(source: Source, path: Path) -> None:
    """Import the photos below source.photos that have an annotation. Raises BadInput."""
    source.check()
    tasks = read_tasks(path)
    index, left_out = PhotoIndex(source.photos, source.list_photos()), LeftOut()
    labelled = []
    for n, task in enumerate(tasks):
        where = f'{path}: task {task.get("id", f"number {n + 1}")}'
        annotation = choose_annotation(where, task, left_out)
        if annotation is None:
            continue
        photo = find_photo_of(where, task, annotation, index)
        shapes, sizes = [], set()
        for shape, size in read_results(where, annotation, left_out):
            shapes.append(shape)
            sizes.add(size)
        if len(sizes) > 1:
            raise BadInput(f'{where}: has results of {len(sizes)} sizes, {sorted(sizes)[:2]}, expected one')
        labelled.append(LabelledPhoto(photo, where, shapes, *sizes))
    left_out.print()
    if not labelled:
        advice = '; accept its predictions as annotations' if any(t.get('predictions') for t in tasks) else ''
        raise BadInput(f'{path}: none of its {plural(len(tasks), "task")} has an annotation{advice}')
    import_shapes(source, labelled)


def read_tasks(path: Path) -> list[dict[str, Any]]:
    """Read the tasks of an export. Raises BadInput, which says what another export seems to be."""
    tasks = read_json(path, EXPECTED)
    if isinstance(tasks, dict) and 'images' in tasks:
        raise BadInput(f'{path}: seems to be COCO, {EXPECTED}; prepare.py coco reads it')
    if not isinstance(tasks, list) or not tasks:
        raise BadInput(f'{path}: found {type(tasks).__name__ if tasks else "no task"}, {EXPECTED}')
    for n, task in enumerate(tasks):
        if not isinstance(task, dict) or not isinstance(task.get('data'), dict):
            is_small = isinstance(task, dict) and 'annotator' in task
            kind = 'is of the export JSON-MIN' if is_small else 'has no data'
            raise BadInput(f'{path}: task number {n + 1} {kind}, {EXPECTED}')
    return tasks


def choose_annotation(where: str, task: dict[str, Any], left_out: LeftOut) -> dict[str, Any] | None:
    """Return the annotation of a task: the ground truth, or else the first that was not cancelled.

    What is passed over is counted. Raises BadInput.
    """
    listed = task.get('annotations', task.get('completions'))  # its name in old versions
    if listed is None:
        raise BadInput(f'{where}: lacks the key annotations, {EXPECTED}')
    if not isinstance(listed, list) or not all(isinstance(one, dict) for one in listed):
        raise BadInput(f'{where}: annotations is {str(listed)[:40]!r}, {EXPECTED}')
    done = [one for one in listed if not one.get('was_cancelled') and not one.get('skipped')]
    if not done:
        left_out.note('a task without an annotation', where)
        return None
    left_out.note('a second annotation of a task', where, len(done) - 1)
    return next((one for one in done if one.get('ground_truth')), done[0])


def find_photo_of(where: str, task: dict[str, Any], annotation: dict[str, Any], index: PhotoIndex) -> Path:
    """Return the photo of a task, by the addresses in its data and its upload's name; of several photos that
    whose key the shapes of the annotation name. Raises BadInput.
    """
    addresses = [value for value in task['data'].values() if isinstance(value, str)]
    photos = [address for address in addresses if has_suffix(address)] or addresses
    names = [name for address in photos for name in names_of(address)]
    upload = task.get('file_upload')
    if isinstance(upload, str) and upload:
        names += names_of(upload)
    photos_of = {address: index.find(where, *names_of(address)) for address in photos}
    if len({path for path in photos_of.values() if path}) > 1:
        chosen = task['data'].get(drawn_on(where, annotation))
        if photos_of.get(chosen) is None:
            fault = f'has several photos, {join_first(photos)[:200]}'
            raise BadInput(f'{where}: {fault}, and its shapes do not say which is theirs; leave one in data')
        names = names_of(chosen)
    photo = index.find(where, *names)
    if photo is None:
        found = f'its photo {join_first(photos or ["(no address)"])[:200]!r}'
        advice = 'give the folder of the photos with --photos'
        raise BadInput(f'{where}: {found} is not below {index.folder}; {advice}')
    return photo


def drawn_on(where: str, annotation: dict[str, Any]) -> str | None:
    """Return what the shapes of an annotation say that they are drawn on; None if they differ in it."""
    results = require(where, annotation, 'result', list)
    keys = {result.get('to_name') for result in results if isinstance(result, dict) and 'value' in result}
    return str(*keys) if len(keys) == 1 else None


def has_suffix(address: str) -> bool:
    """Return True if an address ends like a photo."""
    return any(PurePosixPath(name).suffix.lower() in PHOTO_SUFFIXES for name in names_of(address))


def names_of(address: str) -> list[str]:
    """Return what an address may call a photo: as it is, the file of local storage, the path of an URL, and
    the name before it was uploaded.
    """
    before, _, query = address.partition('?')
    names = [address, *([query.removeprefix('d=')] if query.startswith('d=') else []), before]
    last = names[-1].replace('\\', '/').rpartition('/')[2]
    head = last[: UPLOAD_ID - 1]
    if last[UPLOAD_ID - 1 : UPLOAD_ID] == '-' and all(c in '0123456789abcdef' for c in head):
        names.append(last[UPLOAD_ID:])
    return names


def read_results(where: str, annotation: dict[str, Any], left_out: LeftOut) -> Iterator[tuple[Shape, Size]]:
    """Yield the shapes of an annotation, and the (H, W) on which each was drawn. Raises BadInput.

    A shape and its label may be two results of the same id.
    """
    results = require(where, annotation, 'result', list)
    labels: dict[str, list[str]] = {}
    for result in results:
        if isinstance(result, dict) and isinstance(result.get('value'), dict):
            labels.setdefault(str(result.get('id')), []).extend(labels_of(result['value']))
    drawn: set[str] = set()
    for n, result in enumerate(results):
        one = f'{where}: result {result.get("id", n) if isinstance(result, dict) else n}'
        if not isinstance(result, dict) or result.get('type') == 'relation':
            continue
        value = result.get('value')
        if not isinstance(value, dict) or not {'x', 'points', 'rle', 'vertices'} & value.keys():
            continue  # choices, texts and ratings are of the photo as a whole
        names = labels_of(value) or labels.get(str(result.get('id')), [])
        if str(result.get('id', n)) in drawn:
            continue
        drawn.add(str(result.get('id', n)))
        size = size_of(one, result)
        segmentation = read_value(one, value, size)
        if segmentation is None:
            left_out.note('a shape without an area', one)
        elif not names:
            left_out.note('a shape without a label', one)
        else:
            for name in dict.fromkeys(names):
                yield Shape(name, one, segmentation, is_box='width' in value), size


def labels_of(value: dict[str, Any]) -> list[str]:
    """Return the names in polygonlabels, brushlabels, labels and the like."""
    lists = [names for key, names in value.items() if key.endswith('labels') and isinstance(names, list)]
    return [str(name) for names in lists for name in names]


def size_of(where: str, result: dict[str, Any]) -> Size:
    """Return the (H, W) of the photo of a result. Raises BadInput, also for one that was turned."""
    if result.get('image_rotation'):
        fault = f'was drawn on the photo turned by {str(result["image_rotation"])[:20]} degrees'
        raise BadInput(f'{where}: {fault}, expected 0; turn it back in Label Studio, and export again')
    return read_size(where, result.get('original_height'), result.get('original_width'))


def read_value(where: str, value: dict[str, Any], size: Size) -> list[list[float]] | dict[str, Any] | None:
    """Return the polygon or the RLE of a value; None if it has no area. Raises BadInput."""
    if 'rle' in value:
        return decode_brush(where, require(where, value, 'rle', list), size)
    scale = np.array([size[1], size[0]]) / 100
    if 'points' in value:
        points = [read_point(where, point, 'percent') for point in require(where, value, 'points', list)]
        points = np.reshape(points, (-1, 2)) * scale
    elif 'radiusX' in value:
        points = ellipse(where, value, scale)
    elif 'width' in value and 'height' in value:
        points = rectangle(where, value, scale)
    else:
        return None
    return [points.ravel().tolist()]


def read_keys(where: str, value: dict[str, Any], *keys: str) -> list[float]:
    """Return numbers of a value; rotation may be missing. Raises BadInput."""
    numbers = [value.get(key, 0 if key == 'rotation' else None) for key in keys]
    if not all(map(is_finite, numbers)):
        raise BadInput(f'{where}: {", ".join(keys)} are {str(numbers)[:80]}, expected numbers')
    return list(map(float, numbers))


def rectangle(where: str, value: dict[str, Any], scale: np.ndarray) -> np.ndarray:
    """Return the corners of a box in pixels; it is turned around its first corner."""
    x, y, width, height, angle = read_keys(where, value, 'x', 'y', 'width', 'height', 'rotation')
    corners = np.array([(0, 0), (width, 0), (width, height), (0, height)]) * scale
    return np.array([x, y]) * scale + turn_points(corners, angle)


def ellipse(where: str, value: dict[str, Any], scale: np.ndarray) -> np.ndarray:
    """Return points of an ellipse in pixels; it is turned around its middle."""
    x, y, *sides, angle = read_keys(where, value, 'x', 'y', 'radiusX', 'radiusY', 'rotation')
    return np.array([x, y]) * scale + turn_points(ellipse_points(*(sides * scale)), angle)


def decode_brush(where: str, rle: Sequence[Any], size: Size) -> dict[str, Any]:
    """Decode the run lengths of the brush → RLE as COCO has it. Raises BadInput."""
    if not all(type(value) is int and 0 <= value < 256 for value in rle):
        raise BadInput(f'{where}: rle has {str(rle)[:40]}, expected bytes, 0 to 255')
    height, width = size
    values = unpack_runs(where, bytes(rle), 4 * height * width)
    mask = values.reshape(height, width, 4)[..., 3] > 127
    return as_text(rle_codec.encode(np.asfortranarray(mask, np.uint8)))


def unpack_runs(where: str, content: bytes, expected: int) -> np.ndarray:
    """Unpack run lengths of rle-pack → (expected,) uint8. Raises BadInput.

    32 bits are the number of values, 5 bits their width less 1, and four times 4 bits the widths less 1 of
    lengths. Then comes, for each run: a bit, 1 if all its values are the same; 2 bits that choose a width;
    the length less 1; and the value, or all of them.
    """
    bits = np.unpackbits(np.frombuffer(content, np.uint8))
    text = (bits + ord('0')).tobytes()
    position = 0

    def read(count: int) -> int:
        nonlocal position
        position += count
        if position > len(text):
            raise BadInput(f'{where}: rle is cut off, after {len(content)} bytes')
        return int(text[position - count : position], 2)

    total, width = read(32), read(5) + 1
    widths = [read(4) + 1 for _ in range(4)]
    if total != expected or width != 8:
        fault = f'rle has {total} values of {width} bits, expected {expected} of 8: 4 of each pixel'
        raise BadInput(f'{where}: {fault}')
    values = np.empty(total, np.uint8)
    done = 0
    while done < total:
        is_run = read(1)
        end = min(done + 1 + read(widths[read(2)]), total)
        if is_run:
            values[done:end] = read(8)
        else:
            first = position
            read(8 * (end - done))
            values[done:end] = np.packbits(bits[first:position])
        done = end
    return values
