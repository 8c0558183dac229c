"""Make a training set of TACO: download its photos, check them, resize them to 512x512, and map its 60
categories to the classes of the competition with taco.csv.

A photo gets its final name only when it is complete, so a run that was killed continues.
"""

import json
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from queue import Queue
from tempfile import TemporaryFile
from typing import Any, BinaryIO, TypeVar

import numpy as np
from PIL import Image

from config import CLASSES, HOME
from data.cache import resize_image
from data.coco import inside, load_json, read_bytes, read_coco
from data.download import Downloads, Missing
from data.exports import read_table
from data.importers import PARTIAL, replace_json, stage_json
from data.photos import SWAPPED, decode, open_photo, orientation, read_rgb, to_rgb, turn
from utils.competition import is_plain
from utils.errors import BadInput, CheckFailed, one_line
from utils.files import (
    cannot_write,
    lock,
    make_folder,
    refuse_device,
    remove_partials,
    write_sheet,
    write_whole,
)
from utils.progress import progress

TABLE = Path(__file__).with_name('taco.csv')  # category,class; edit it to choose other classes
SIDE = 512
DESCRIPTION = 'TACO (github.com/pedropro/TACO, CC BY 4.0) by prepare.py taco'
FORMATS, MAX_PIXELS = ('JPEG', 'PNG'), 32 << 20  # of the originals, which have 24 million at most
R = TypeVar('R')
T = TypeVar('T')
MAX_LISTED = 20  # missing photos printed on the terminal; missing.csv lists all


@dataclass(frozen=True)
class Record:
    """Hold one image of TACO's annotations; `size` is (width, height) with the EXIF orientation applied."""

    file_name: str
    size: tuple[int, int]
    url: str


def make_taco(annotations: Path, out: Path, source: Path | Downloads, workers: int, overwrite: bool) -> None:
    """Download the photos that `out` lacks, or read them from a folder, and write train_all.json.

    Raises BadInput, and CheckFailed if photos are missing in the end.
    """
    data = read_annotations(annotations)
    path = out / 'train_all.json'
    if path.exists() and not overwrite and not is_made_here(path):
        raise BadInput(f'{path}: already exists; give another --out, or --overwrite')
    records = read_records(annotations, data, out)
    content = convert(annotations, data, read_class_ids(TABLE))
    with lock(out / '.lock', 'making TACO'):
        missing = get_photos(records, out, source, workers)
        write_missing(out / 'missing.csv', missing)
        if len(missing) == len(records):
            fault = f'all {len(records)} photos are missing, so {path.name} is not written'
            raise CheckFailed(f'{out}: {fault}; see missing.csv')
        content['images'] = [image for image in content['images'] if image['file_name'] not in missing]
        image_ids = {image['id'] for image in content['images']}
        content['annotations'] = [a for a in content['annotations'] if a['image_id'] in image_ids]
        stage_json(out, {path.name: content}, HOME)
        replace_json(out, [path.name])
        (out / PARTIAL).rmdir()
        coco = read_coco(out, 'train', HOME)
        print(f'wrote {path}: {len(coco.photos)} photos, {len(content["annotations"])} annotations')
    if missing:
        fault = f'{len(missing)} of {len(records)} photos are missing and left out of {path.name}'
        advice = 'missing.csv says why; run the same command again to retry them'
        raise CheckFailed(f'{out}: {fault}; {advice}')


def read_annotations(path: Path) -> dict[str, Any]:
    return load_json(path, read_bytes(path))


def is_made_here(path: Path) -> bool:
    """Return True if an earlier run wrote this train_all.json."""
    with suppress(OSError, ValueError, KeyError, TypeError):
        return json.loads(path.read_bytes())['info']['description'] == DESCRIPTION
    return False


def read_records(path: Path, data: dict[str, Any], out: Path) -> list[Record]:
    """Read the images of TACO's annotations. Raises BadInput."""
    try:
        records = [
            Record(image['file_name'], (image['width'], image['height']), image['flickr_url'])
            for image in data['images']
        ]
        for record in records:
            where = f'{path}: image {record.file_name[:80]!r}'
            if not is_plain(record.file_name):
                raise BadInput(f'{where}: is not a file name')
            if not record.url.startswith(('http://', 'https://')):
                raise BadInput(f'{where}: flickr_url is {record.url[:200]!r}, expected http(s)://')
            if not record.file_name.lower().endswith(('.jpg', '.jpeg')):
                raise BadInput(f'{where}: expected a file_name that ends in .jpg')
            if not inside(out, record.file_name):
                raise BadInput(f'{where} leads out of {out}')
    except (KeyError, TypeError, AttributeError) as error:
        raise BadInput(f'{path}: not the annotations of TACO: {error!r}') from None
    if not records:
        raise BadInput(f'{path}: no images')
    if len({record.file_name for record in records}) < len(records):
        raise BadInput(f'{path}: two images have the same file_name')
    return records


def read_class_ids(path: Path) -> dict[str, int]:
    """Read the class id of each category from a table category,class. Raises BadInput."""
    table = read_table(path)
    for category, name in table.items():
        if name not in CLASSES[1:]:
            fault = f'category {category!r} has the class {name!r}, expected one of {CLASSES[1:]}'
            raise BadInput(f'{path}: {fault}')
    return {category: CLASSES.index(name) for category, name in table.items()}


def convert(path: Path, data: dict[str, Any], table: dict[str, int]) -> dict[str, Any]:
    """Convert TACO's annotations: map the categories to classes, scale every polygon to 512x512."""
    try:
        for category in data['categories']:
            if category['name'] not in table:
                raise BadInput(f'{TABLE}: lacks the category {category["name"]!r} of {path}')
        classes = {category['id']: table[category['name']] for category in data['categories']}
        sizes = {image['id']: (image['width'], image['height']) for image in data['images']}
        objects = [
            scale_annotation(number, a, sizes[a['image_id']], classes[a['category_id']])
            for number, a in enumerate(data['annotations'])  # some of TACO's own ids appear twice
        ]
        images = [{**image, 'width': SIDE, 'height': SIDE} for image in data['images']]
    except (KeyError, TypeError, ValueError, ArithmeticError) as error:
        raise BadInput(f'{path}: not the annotations of TACO: {error!r}') from None
    return {
        'info': {'description': DESCRIPTION},
        'images': images,
        'categories': [{'id': k, 'name': name, 'supercategory': name} for k, name in enumerate(CLASSES) if k],
        'annotations': objects,
    }


def scale_annotation(number: int, annotation: dict, size: tuple[int, int], category_id: int) -> dict:
    """Scale a polygon annotation from a (width, height) image to 512x512."""
    fx, fy = SIDE / size[0], SIDE / size[1]
    x, y, w, h = annotation['bbox']
    polygons = annotation['segmentation']
    return {
        'id': number,
        'image_id': annotation['image_id'],
        'category_id': category_id,
        'iscrowd': annotation['iscrowd'],
        'segmentation': [[round(v * (fy if i % 2 else fx), 3) for i, v in enumerate(p)] for p in polygons],
        'area': annotation['area'] * fx * fy,
        'bbox': [x * fx, y * fy, w * fx, h * fy],
    }


def get_photos(
    records: list[Record], out: Path, source: Path | Downloads, workers: int
) -> dict[str, tuple[str, str]]:
    """Save each photo that `out` lacks; return (address, reason) of the missing ones by file name.

    Threads fetch; this one decodes, a photo at a time, which takes up to 20 bytes a pixel.
    """

    def fetch(record: Record) -> BinaryIO | None:
        path = out / record.file_name
        with suppress(BadInput):
            read_rgb(path, expected=(SIDE, SIDE))
            return None  # an earlier run has completed it
        return open_original(record, source, path.parent)

    make_folder(out)
    for folder in {(out / record.file_name).parent for record in records}:
        make_folder(folder)
        remove_partials(folder, '*')  # from a run that was killed
    missing = {}
    for record, get in progress(in_threads(fetch, records, workers), 'photos', 'photo', len(records)):
        try:
            if (file := get()) is not None:
                save_photo(file, record, out)
        except (Missing, BadInput) as error:
            missing[record.file_name] = (record.url, str(error))
    return {name: missing[name] for name in sorted(missing)}


def save_photo(file: BinaryIO, record: Record, out: Path) -> None:
    """Resize and save a photo, and close it. Raises Missing, BadInput and Interrupted."""
    with file:
        photo = decode_original(file, record.size)
    with write_whole(out / record.file_name) as target:
        Image.fromarray(photo).save(target, format='jpeg', quality=95)


def in_threads(
    function: Callable[[T], R], items: Sequence[T], workers: int
) -> Iterator[tuple[T, Callable[[], R]]]:
    """Call a function with each item; yield those that are done, with what returns or raises the result.

    At most `workers` results wait. The threads are daemons, which end with the process: a signal, or a full
    disk, waits for no server.
    """
    todo, done, stopped = iter(items), Queue(workers), threading.Event()
    turn = threading.Lock()

    def work() -> None:
        while not stopped.is_set():
            with turn:
                item = next(todo, None)
            if item is None:
                return
            future = Future()
            try:
                future.set_result(function(item))
            except Exception as error:  # noqa: BLE001 - raised where the result is taken
                future.set_exception(error)
            done.put((item, future.result))

    for _ in range(workers):
        threading.Thread(target=work, daemon=True).start()
    try:
        for _ in items:
            yield done.get()
    finally:
        stopped.set()


def open_original(record: Record, source: Path | Downloads, folder: Path) -> BinaryIO:
    """Open a photo that was downloaded before, or download it into a nameless file in a folder.

    Raises Missing, and Interrupted if there is no room.
    """
    if isinstance(source, Path):
        path = source / record.file_name
        refuse_device(path)
        try:
            return path.open('rb')
        except OSError as error:
            raise Missing(f'{path}: {error.strerror}') from None
    try:
        with ExitStack() as stack:
            file = stack.enter_context(TemporaryFile(dir=folder))
            source.fetch(record.url, file)
            file.seek(0)
            stack.pop_all()
            return file
    except OSError as error:
        raise cannot_write(folder / record.file_name, error) from None


def decode_original(file: BinaryIO, size: tuple[int, int]) -> np.ndarray:
    """Decode a photo of a recorded (width, height) and resize it to (512, 512, 3) uint8. Raises Missing.

    The record describes the photo after its EXIF orientation is applied, as in TACO's own code. A photo that
    has the recorded size without it was turned before it was uploaded, and its orientation is out of date.
    """
    try:
        name, recorded = f'{os.fstat(file.fileno()).st_size:,} bytes', size[::-1]
        with open_photo(file, name, FORMATS, MAX_PIXELS) as image:
            stored = image.size[::-1]
            height, width = stored[::-1] if orientation(image) in SWAPPED else stored
            if recorded not in ((height, width), stored):  # before a pixel is decoded
                raise Missing(f'found {width}x{height} pixels, its record says {size[0]}x{size[1]}')
            photo = decode(image, name)
        pixels = to_rgb(photo, name, intensity=None)
        upright = turn(pixels, photo.orientation) if recorded == photo.upright_size else pixels
        return resize_image(upright, (SIDE, SIDE))
    except BadInput as error:
        raise Missing(str(error)) from None


def write_missing(path: Path, missing: dict[str, tuple[str, str]]) -> None:
    """Write missing.csv (file_name,address,why) and print its first lines, or remove it."""
    path.unlink(missing_ok=True)
    if not missing:
        return
    rows = [(name, *reason) for name, reason in missing.items()]
    write_sheet(path, [('file_name', 'address', 'why'), *rows])
    for name, (url, why) in list(missing.items())[:MAX_LISTED]:
        print(one_line(f'missing: {name}: {why} ({url})'))
    if len(missing) > MAX_LISTED:
        print(f'missing: {len(missing) - MAX_LISTED} more')
