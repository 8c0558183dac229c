"""Write what an importer has read as a data root: whole, or not at all.

    write_set(ImportedSet(classes, splits, names, annotate), Path('input/mine'), overwrite=False)

Photos that are not 8-bit RGB, or have an EXIF turn, are saved again upright, as labelling tools show them.
Everything is written into a folder of its own first. Then the JSON files of an earlier set go, the photos
take their places, and train_all.json comes last: a set whose import was killed has none.
"""

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from config import COMPETITION_FILE, Competition, is_plain, read_competition, write_competition
from data.paths import inside
from data.photos import Range, copy_upright, measure, read_stored
from utils.errors import BadInput, one_line
from utils.files import cannot_write, lock, normal_name, refuse_device, remove_partials, write_text
from utils.progress import progress

PHOTO_SUFFIXES = {'.jpg', '.jpeg', '.png', '.webp', '.bmp', '.tif', '.tiff'}
UNREAD_SUFFIXES = {'.heic', '.heif', '.avif', '.jp2', '.jfif', '.gif', '.dng', '.cr2', '.nef', '.arw'}
JUNK_FILES = {'thumbs.db', 'desktop.ini'}
JUNK_FOLDERS = {'__macosx', '@eadir', '$recycle.bin'}
SET_FILES = ('train_all.json', 'train.json', 'val.json', 'test.json', 'test_labels.json')
LOCK_FILE, PARTIAL, MANIFEST = '.import.lock', '.import', '.import.json'
DESCRIPTION = 'imported by prepare.py'

Size = tuple[int, int]  # (H, W)


@dataclass(frozen=True)
class PhotoFacts:
    """Hold what an importer must know of a photo: its size as stored and as displayed, and its EXIF turn."""

    stored: Size
    displayed: Size
    orientation: int
    values: Range | None  # lowest and highest, if it has more than 8 bits a channel


Annotate = Callable[[Path, PhotoFacts], list[dict[str, Any]]]  # makes the annotations of a photo


@dataclass(frozen=True)
class ImportedSet:
    """Hold a set that is to be written: the photos of each JSON file, their names, their annotations."""

    classes: tuple[str, ...]
    splits: Mapping[str, Sequence[Path]]
    names: Mapping[Path, str]
    annotate: Annotate


def list_files(folder: Path, suffixes: Iterable[str]) -> list[Path]:
    """List the files below a folder that end so, by name, without what systems leave there. Raises BadInput.

    Left out are hidden files and folders, such as ._a.jpg of a Mac or .ipynb_checkpoints, and thumbnails.
    """
    if not folder.is_dir():
        raise BadInput(f'{folder}: no such folder')
    files = (path for path in folder.rglob('*') if path.suffix.lower() in suffixes)
    return sorted(path for path in files if not is_junk(path.relative_to(folder)) and not path.is_dir())


def is_junk(path: Path) -> bool:
    """Return True for a relative path of a hidden file, or of one that a system left beside the photos."""
    folders = {part.lower() for part in path.parts[:-1]}
    hidden = any(part.startswith('.') and part != '..' for part in path.parts)
    return hidden or bool(folders & JUNK_FOLDERS) or path.name.lower() in JUNK_FILES


def list_photos(folder: Path) -> list[Path]:
    """List the photos below a folder by name; raise BadInput for none, or one of a kind that is not read."""
    files = list_files(folder, PHOTO_SUFFIXES | UNREAD_SUFFIXES)
    unread = [path for path in files if path.suffix.lower() in UNREAD_SUFFIXES]
    expected = f'expected {", ".join(sorted(PHOTO_SUFFIXES))}'
    if unread:
        kind = unread[0].suffix + (f' (one of {len(unread)})' if len(unread) > 1 else '')
        raise BadInput(f'{unread[0]}: found {kind}, {expected}; convert it, or move it away')
    if not files:
        raise BadInput(f'{folder}: found no photos, {expected}')
    return files


def refuse_existing(out: Path, overwrite: bool) -> None:
    """Raise BadInput if `out` holds a data set already, or anything else; an interrupted import may go on."""
    if out.exists() and not out.is_dir():
        raise BadInput(f'{out}: is a file, expected a folder')
    sets = [out / name for name in SET_FILES if (out / name).exists()]
    labelled = any(path.name.startswith('train') for path in sets)
    interrupted = not labelled and (out / MANIFEST).exists()
    if sets and not overwrite and not interrupted:
        raise BadInput(f'{sets[0]}: already exists; give another --out, or --overwrite')
    if sets or (out / LOCK_FILE).exists() or not out.is_dir():
        return
    names = {path.name for path in out.iterdir() if not is_junk(Path(path.name))} - {COMPETITION_FILE}
    if names:
        raise BadInput(f'{out}: is not empty, and not a data set ({min(names)}); give another --out')


def refuse_overlap(out: Path, sources: Iterable[Path]) -> None:
    """Raise BadInput if `out` is one of the folders that are read, or inside one, or around one."""
    place = out.resolve()
    for source in sources:
        folder = source.resolve()
        below = place.is_relative_to(folder)
        if below or folder.is_relative_to(place):
            word = 'is' if place == folder else 'lies inside' if below else 'contains'
            raise BadInput(f'{out}: {word} {source}, which is imported; give an --out beside it')


def refuse_shared(files: Mapping[Path, Path], kind: str) -> None:
    """Raise BadInput if two photos, such as a.jpg and a.png, have the same file: a label, or a mask."""
    photos: dict[Path, Path] = {}
    for photo, path in files.items():
        other = photos.setdefault(path, photo)
        if other != photo:
            names = f'{other.name} and of {photo.name}'
            raise BadInput(f'{path}: would be the {kind} of {names}; rename one of them')


def read_facts(path: Path) -> PhotoFacts:
    """Decode a photo and return its sizes, EXIF turn and range of values. Raises BadInput."""
    photo = read_stored(path)
    values = measure(photo, path) if photo.is_deep else None
    return PhotoFacts(photo.size, photo.upright_size, photo.orientation, values)


def write_set(imported: ImportedSet, out: Path, overwrite: bool) -> None:
    """Read and check everything, then write a data root: photos, a JSON file per split. Raises BadInput."""
    names = check_names(out, imported.names)
    photos = list(dict.fromkeys(path for paths in imported.splits.values() for path in paths))
    facts = {path: read_facts(path) for path in progress(photos, 'photos', 'photo')}
    contents = {
        file_name: make_content(file_name, imported, names, {path: facts[path] for path in paths})
        for file_name, paths in imported.splits.items()
        if paths
    }
    if not any(one['iscrowd'] == 0 for one in contents['train_all.json']['annotations']):
        raise BadInput(f'{out}: would have no object of a class in any training photo; are these the labels?')
    intensity = common_range(facts.values())
    group = (read_competition(out) or Competition()).group
    competition = Competition(classes=imported.classes, intensity=intensity, group=group)
    with lock(out / LOCK_FILE, 'importing a data set'):
        refuse_existing(out, overwrite)  # another import may have ended meanwhile
        partial = out / PARTIAL
        shutil.rmtree(partial, ignore_errors=True)  # of an import that was killed
        remove_partials(out, MANIFEST, COMPETITION_FILE, *SET_FILES)
        try:
            for path in progress(photos, 'copy', 'photo'):
                copy_upright(path, partial / names[path], intensity)
            publish(out, set(names.values()), contents, competition)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    print_summary(contents, facts.values(), intensity)
    print(f'wrote {out}')


def check_names(out: Path, names: Mapping[Path, str]) -> dict[Path, str]:
    """Return the names of the photos in the set, in one Unicode form. Raises BadInput."""
    normal = {path: normal_name(name) for path, name in names.items()}
    places: dict[str, Path] = {}
    for path, name in normal.items():
        if not is_plain(name):
            fault = 'is too long for a file name, or has control characters'
            raise BadInput(f'{str(path)!r}: {fault}; rename it')
        if name in places:
            raise BadInput(f'{path}: would have the same name in {out} as {places[name]}; rename one')
        places[name] = path
    return normal


def common_range(facts: Iterable[PhotoFacts]) -> Range | None:
    """Return the lowest and highest value of all photos of more than 8 bits; None if there are none."""
    ranges = [photo.values for photo in facts if photo.values is not None]
    if not ranges:
        return None
    low, high = min(low for low, _ in ranges), max(high for _, high in ranges)
    return (low, high) if high > low else (low, low + 1)


def make_content(
    file_name: str, imported: ImportedSet, names: Mapping[Path, str], photos: Mapping[Path, PhotoFacts]
) -> dict[str, Any]:
    """Make the content of a split's JSON file; test.json has no annotations."""
    images, annotations = [], []
    for image_id, (path, facts) in enumerate(progress(photos.items(), file_name, 'photo', len(photos))):
        height, width = facts.displayed
        images.append({'id': image_id, 'file_name': names[path], 'height': height, 'width': width})
        for annotation in [] if file_name == 'test.json' else imported.annotate(path, facts):
            annotations.append({'id': len(annotations), 'image_id': image_id, **annotation})
    used = {annotation['category_id'] for annotation in annotations}  # ignored regions are of the background
    categories = [{'id': k, 'name': name} for k, name in enumerate(imported.classes) if k or k in used]
    info = {'description': DESCRIPTION}
    return {'info': info, 'images': images, 'categories': categories, 'annotations': annotations}


def publish(
    out: Path, photos: set[str], contents: Mapping[str, dict[str, Any]], competition: Competition
) -> None:
    """Move the photos from the partial folder into `out`, in place of an earlier set, and write the rest.

    Lock the folder first. The manifest names the photos of both sets until all is done.
    """
    for name in photos:
        parents = [out / parent for parent in Path(name).parents]
        if (out / name).is_dir() or any(parent.exists() and not parent.is_dir() for parent in parents):
            raise BadInput(f'{out / name}: cannot be written: a folder or a file of that name is in the way')
    earlier = imported_photos(out)
    stage_json(out, contents, competition)  # if there is no room, the earlier set stays
    try:
        write_text(out / MANIFEST, json.dumps(sorted(earlier | photos)))
        remove_json(out)
        for name in sorted(earlier - photos):
            remove_photo(out, name)
        for name in sorted(photos):
            (out / name).parent.mkdir(parents=True, exist_ok=True)
            (out / PARTIAL / name).replace(out / name)
        replace_json(out, contents)
        (out / MANIFEST).unlink()
    except OSError as error:
        raise cannot_write(out, error) from None


def stage_json(out: Path, contents: Mapping[str, dict[str, Any]], competition: Competition) -> None:
    """Write competition.yaml and the JSON files of a set into the partial folder, for replace_json.

    Raises BadInput, or Interrupted if there is no room.
    """
    write_competition(out / PARTIAL, competition)
    for file_name, content in contents.items():
        write_text(out / PARTIAL / file_name, json.dumps(content))


def replace_json(out: Path, file_names: Iterable[str]) -> None:
    """Move what stage_json wrote to its place, instead of all that is there, train_all.json last."""
    try:
        remove_json(out)
        for name in (COMPETITION_FILE, *sorted(file_names, key='train_all.json'.__eq__)):
            (out / PARTIAL / name).replace(out / name)
    except OSError as error:
        raise cannot_write(out, error) from None


def remove_json(out: Path) -> None:
    """Remove the JSON files of a data root, train_all.json first, so that none describes other photos."""
    for file_name in SET_FILES:
        (out / file_name).unlink(missing_ok=True)


def imported_photos(out: Path) -> set[str]:
    """Return the photos that earlier imports wrote into a folder, whole or killed; those of others stay."""
    names: set[str] = set()
    for file_name in (MANIFEST, *SET_FILES):
        with suppress(OSError, ValueError, KeyError, TypeError):
            content = json.loads((out / file_name).read_bytes())
            if file_name == MANIFEST:
                names |= set(content)
            elif content['info']['description'] == DESCRIPTION:
                names |= {image['file_name'] for image in content['images']}
    return {name for name in names if Path(name).suffix.lower() in PHOTO_SUFFIXES and inside(out, name)}


def remove_photo(out: Path, name: str) -> None:
    """Remove a photo of an earlier set, and its folders if they are empty then."""
    (out / name).unlink(missing_ok=True)
    for parent in list(Path(name).parents)[:-1]:
        with suppress(OSError):
            (out / parent).rmdir()


def print_summary(
    contents: Mapping[str, dict[str, Any]], facts: Iterable[PhotoFacts], intensity: Range | None
) -> None:
    """Print the counts of each split and class, and what was done to the photos."""
    for file_name, content in contents.items():
        images, annotations = content['images'], content['annotations']
        if file_name == 'test.json':
            print(f'{file_name}: {len(images)} photos')
            continue
        empty = len(images) - len({annotation['image_id'] for annotation in annotations})
        print(f'{file_name}: {len(images)} photos, {len(annotations)} annotations, {empty} photos with none')
        counts = Counter('ignored' if a['iscrowd'] else a['category_id'] for a in annotations)
        parts = [f'{one["name"]} {counts[one["id"]]}' for one in content['categories'] if one['id']]
        parts += [f'ignored {counts["ignored"]}'] if counts['ignored'] else []
        print(f'  annotations of each class: {", ".join(parts)}')
    facts = list(facts)
    if turned := sum(photo.orientation != 1 for photo in facts):
        print(f'photos with an EXIF turn, stored upright: {turned}')
    if intensity is not None:
        deep = sum(photo.values is not None for photo in facts)
        span = f'{intensity[0]:g} to {intensity[1]:g} became 0 to 255'
        print(f'photos of more than 8 bits a channel, stored as 8-bit RGB: {deep}; the values {span}')


def read_lines(path: Path) -> list[str]:
    """Read the lines of a UTF-8 file, with or without a byte order mark. Raises BadInput."""
    try:
        refuse_device(path)
        return path.read_text(encoding='utf-8-sig').splitlines()
    except UnicodeDecodeError as error:
        raise BadInput(f'{path}: cannot be read: {one_line(error)}; save it as UTF-8') from None
    except OSError as error:
        raise BadInput(f'{path}: cannot be read: {error.strerror}') from None
