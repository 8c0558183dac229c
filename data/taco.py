"""Make a training set of TACO: download its photos, check them, resize them to 512x512, and map its 60
categories to the classes of the competition with taco.csv.

A photo gets its final name only when it is complete, so a run that was killed continues.
"""

import io
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import urllib3
from PIL import Image

from config import CLASSES, HOME
from data.cache import resize_image
from data.coco import inside, load_json, read_bytes, read_coco
from data.exports import read_table
from data.importers import PARTIAL, replace_json, stage_json
from data.photos import decode, open_photo, read_rgb, to_rgb, turn
from utils.errors import BadInput, CheckFailed, one_line
from utils.files import lock, make_folder, remove_partials, write_csv, write_whole
from utils.progress import progress

TABLE = Path(__file__).with_name('taco.csv')  # category,class; edit it to choose other classes
SIDE = 512
DESCRIPTION = 'TACO (github.com/pedropro/TACO, CC BY 4.0) by prepare.py taco'
MAX_LISTED = 20  # missing photos printed on the terminal; missing.csv lists all

BACKOFF = 0.5  # seconds before the second retry; the delay doubles with each retry
TIMEOUT = urllib3.Timeout(connect=10, read=30)  # seconds; read is the longest pause between two bytes
TEMPORARY = (429, 500, 502, 503, 504)  # HTTP statuses that are retried


class Missing(Exception):
    """Say in one line why a photo is missing."""


@dataclass(frozen=True)
class Record:
    """Hold one image of TACO's annotations; `size` is (width, height) with the EXIF orientation applied."""

    file_name: str
    size: tuple[int, int]
    url: str


def make_taco(
    annotations: Path, out: Path, photos: Path | None, workers: int, retries: int, overwrite: bool
) -> None:
    """Download the photos that `out` lacks, or read them from the folder `photos`, and write train_all.json.

    Raises BadInput, and CheckFailed if photos are missing in the end.
    """
    data = read_annotations(annotations)
    path = out / 'train_all.json'
    if path.exists() and not overwrite and not is_made_here(path):
        raise BadInput(f'{path}: already exists; give another --out, or --overwrite')
    records = read_records(annotations, data, out)
    content = convert(annotations, data, read_class_ids(TABLE))
    retry = urllib3.Retry(
        total=retries,
        status_forcelist=TEMPORARY,
        backoff_factor=BACKOFF,
        backoff_jitter=BACKOFF,
        retry_after_max=60,  # seconds of a server's Retry-After
        raise_on_status=False,
    )
    pool = urllib3.PoolManager(maxsize=workers, timeout=TIMEOUT, retries=retry)

    def fetch(record: Record) -> bytes:
        return download(pool, record.url) if photos is None else read_original(photos / record.file_name)

    with lock(out / '.lock', 'making TACO'):
        missing = get_photos(records, out, fetch, workers)
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
            where = f'{path}: image {record.file_name!r}'
            if not record.url.startswith(('http://', 'https://')):
                raise BadInput(f'{where}: flickr_url is {record.url!r}, expected http(s)://')
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
    records: list[Record], out: Path, fetch: Callable[[Record], bytes], workers: int
) -> dict[str, tuple[str, str]]:
    """Save each photo that `out` lacks; return (address, reason) of the missing ones by file name."""

    def get(record: Record) -> None:
        path = out / record.file_name
        with suppress(BadInput):
            read_rgb(path, expected=(SIDE, SIDE))
            return  # an earlier run has completed it
        photo = decode_original(fetch(record), record.size)
        with write_whole(path) as file:
            Image.fromarray(photo).save(file, format='jpeg', quality=95)

    make_folder(out)
    for folder in {(out / record.file_name).parent for record in records}:
        remove_partials(folder, '*')  # from a run that was killed
    missing = {}
    pool = ThreadPoolExecutor(workers)
    try:
        jobs = {pool.submit(get, record): record for record in records}
        for job in progress(as_completed(jobs), 'photos', 'photo', len(jobs)):
            record = jobs[job]
            try:
                job.result()
            except Missing as error:
                missing[record.file_name] = (record.url, str(error))
    finally:
        pool.shutdown(cancel_futures=True)  # start no more downloads after Ctrl-C or on a full disk
    return {name: missing[name] for name in sorted(missing)}


def download(pool: urllib3.PoolManager, url: str) -> bytes:
    """Download a photo. Raises Missing."""
    try:
        response = pool.request('GET', url)
    except urllib3.exceptions.HTTPError as error:
        raise Missing(one_line(getattr(error, 'reason', None) or error)) from None
    if response.status != 200:
        raise Missing(f'the server answers {response.status} {response.reason or ""}'.strip())
    return response.data


def read_original(path: Path) -> bytes:
    """Read a photo that was downloaded before. Raises Missing."""
    try:
        return path.read_bytes()
    except OSError as error:
        raise Missing(f'{path}: {error.strerror}') from None


def decode_original(content: bytes, size: tuple[int, int]) -> np.ndarray:
    """Decode a photo of a recorded (width, height) and resize it to (512, 512, 3) uint8. Raises Missing.

    The record describes the photo after its EXIF orientation is applied, as in TACO's own code. A photo that
    has the recorded size without it was turned before it was uploaded, and its orientation is out of date.
    """
    try:
        name = f'{len(content):,} bytes'
        with open_photo(io.BytesIO(content), name) as image:
            photo = decode(image, name)
        (height, width), recorded = photo.upright_size, size[::-1]
        if recorded not in (photo.upright_size, photo.size):
            raise Missing(f'found {width}x{height} pixels, its record says {size[0]}x{size[1]}')
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
    write_csv(path, [('file_name', 'address', 'why'), *rows])
    for name, (url, why) in list(missing.items())[:MAX_LISTED]:
        print(f'missing: {name}: {why} ({url})')
    if len(missing) > MAX_LISTED:
        print(f'missing: {len(missing) - MAX_LISTED} more')
