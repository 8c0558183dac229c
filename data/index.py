"""Open the photos of a data root by an index in the cache folder, which is made once from the JSON files.

Without it each process of a training would hold all annotations in memory. An index is used as long as the
size and the times of the JSON files are the same; if these differ, as long as their SHA-256 is.
"""

import json
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from config import Competition
from data.coco import CocoSet, fingerprint_of, pixel_conventions, read_coco
from data.layout import annotation_files
from data.masks import LeftOut
from data.records import PhotoIndex, write_index
from utils.errors import BadInput, Interrupted
from utils.files import cannot_write, lock, whole_folder, write_text

INDEX_VERSION = 1  # raise it when annotations are read differently, or kept in other arrays
STAMP = '.stamp.json'
SETTLED = 2 * 10**9  # ns after which a file that changes again surely has another time

Stamp = dict[str, str | dict[str, list[int]]]


def open_coco(root: Path, split: str, competition: Competition, cache_dir: Path) -> CocoSet:
    """Read a split as read_coco does, with a PhotoIndex in place of the photos. Raises BadInput."""
    files = annotation_files(root, split)
    stamp = stamp_of(files, competition)
    folder = find_stamped(cache_dir, split, stamp)
    if folder is None:
        folder = make_index(root, split, competition, cache_dir)
        if is_settled(stamp):
            with suppress(BadInput, Interrupted):  # it only saves time, and the folder may be read-only
                write_text(folder / STAMP, json.dumps(stamp))
    photos = PhotoIndex(folder)
    left_out = LeftOut(photos.meta['left_out'])
    left_out.examples = photos.meta['examples']
    return CocoSet(root, split, files, photos, photos.meta['fingerprint'], competition, left_out)


def stamp_of(files: Sequence[Path], competition: Competition) -> Stamp:
    """Describe what a set is read from, without reading it: sizes and times of files, and conventions."""
    stats = {str(path.resolve()): path.stat() for path in files}
    times = {name: [stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns] for name, stat in stats.items()}
    return {'conventions': pixel_conventions(competition).decode(), 'files': times}


def find_stamped(cache_dir: Path, split: str, stamp: Stamp) -> Path | None:
    """Return the folder of the index that was made of files with this stamp, if any."""
    for path in sorted(cache_dir.glob(f'index-{split}-v{INDEX_VERSION}-*/{STAMP}')):
        with suppress(OSError, ValueError):
            if json.loads(path.read_text()) == stamp:
                return path.parent
    return None


def is_settled(stamp: Stamp) -> bool:
    """Tell whether the files were written so long ago that a change would show in their times."""
    return all(time.time_ns() - modified > SETTLED for _, modified, _ in stamp['files'].values())


def make_index(root: Path, split: str, competition: Competition, cache_dir: Path) -> Path:
    """Make the index of a split unless one of the same content exists; return its folder. Raises BadInput."""
    folder = index_folder(cache_dir, split, fingerprint_of(annotation_files(root, split), competition))
    if folder.is_dir():
        return folder
    with lock(cache_dir / f'.{folder.name}.lock', f'reading the annotations of {split}', wait=True):
        if not folder.is_dir():
            coco = read_coco(root, split, competition)
            folder = index_folder(cache_dir, split, coco.fingerprint)  # another one if the files just changed
            if not folder.is_dir():
                write_coco(coco, folder)
    return folder


def write_coco(coco: CocoSet, folder: Path) -> None:
    """Write the index of a set; `folder` appears only when it is complete. Raises BadInput."""
    facts = {'fingerprint': coco.fingerprint, 'left_out': coco.left_out, 'examples': coco.left_out.examples}
    try:
        with whole_folder(folder) as partial:
            write_index(coco.photos, partial, facts)
    except OSError as error:
        raise cannot_write(folder, error) from None


def index_folder(cache_dir: Path, split: str, fingerprint: str) -> Path:
    return cache_dir / f'index-{split}-v{INDEX_VERSION}-{fingerprint[:16]}'
