"""Write what an importer has read as a data root: whole, or not at all.

    write_set(ImportedSet(classes, splits, names, annotate), Path('input/mine'), overwrite=False)

Photos that are not 8-bit RGB, or have an EXIF turn, are saved again upright, as labelling tools show them.
Everything is written into a folder of its own first. Then the JSON files of an earlier set go, the photos
take their places, and train_all.json comes last: a set whose import was killed has none.
"""

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from config import (
    COMPETITION_FILE,
    HOME,
    Competition,
    is_plain,
    make_competition,
    read_competition,
    write_competition,
)
from data.bands import read_any_bands
from data.layout import SPLITS
from data.paths import inside
from data.photos import Range, copy_upright, measure_bands, warn_once, whole_range, widen
from utils.errors import BadInput, one_line, plural
from utils.files import (
    cannot_write,
    lock,
    normal_name,
    refuse_device,
    remove_partials,
    write_text,
    write_whole,
)
from utils.json_files import load_json, read_bytes
from utils.progress import progress

PHOTO_SUFFIXES = {'.jpg', '.jpeg', '.jfif', '.jpe', '.png', '.webp', '.bmp', '.tif', '.tiff', '.npy'}
UNREAD_SUFFIXES = {'.heic', '.heif', '.avif', '.jp2', '.gif', '.dng', '.cr2', '.nef', '.arw'}
JUNK_FILES = {'thumbs.db', 'desktop.ini'}
JUNK_FOLDERS = {'__macosx', '@eadir', '$recycle.bin'}
SET_FILES = ('train_all.json', 'train.json', 'val.json', 'test.json', 'test_labels.json')
# keys of a competition.yaml that was there before: an importer knows no better
KEPT = ('metric', 'score_size', 'score_background', 'empty_score', 'submission', 'group')
BANDS = ('depth', 'slices', 'intensity')  # and channels, if these are not those of 8-bit RGB
TEST_FOLDER = 'test'  # in a data root, for test photos that lie elsewhere
LOCK_FILE, PARTIAL, MANIFEST = '.import.lock', '.import', '.import.json'
DESCRIPTION = 'imported by prepare.py'

RGB = 3  # bands

Size = tuple[int, int]  # (H, W)


@dataclass(frozen=True)
class PhotoFacts:
    """Hold what an importer must know of a photo: its size as stored and as displayed, and its EXIF turn."""

    stored: Size
    displayed: Size
    orientation: int
    values: Range | None  # lowest and highest, if it has more than 8 bits a channel
    bands: int = RGB
    ranges: tuple[Range, ...] | None = None  # the values of each band


Annotate = Callable[[Path, PhotoFacts], list[dict[str, Any]]]  # makes the annotations of a photo


@dataclass(frozen=True)
class ImportedSet:
    """Hold a set that is to be written: the photos of each JSON file, their names, their annotations."""

    classes: tuple[str, ...]
    splits: Mapping[str, Sequence[Path]]
    names: Mapping[Path, str]
    annotate: Annotate
    facts: Mapping[str, Any] = field(default_factory=dict)  # what else the data tell, for competition.yaml


def list_files(folder: Path, suffixes: Iterable[str]) -> list[Path]:
    """List the files below a folder that end so, by name, without what systems leave there. Raises BadInput.

    Left out are hidden files and folders, such as ._a.jpg of a Mac or .ipynb_checkpoints, and thumbnails.
    """
    if not folder.is_dir():
        raise BadInput(f'{folder}: {"is a file, expected a folder" if folder.exists() else "no such folder"}')
    files = (path for path in folder.rglob('*') if path.suffix.lower() in suffixes)
    return sorted(path for path in files if not is_junk(path.relative_to(folder)) and not path.is_dir())


def natural_key(text: str) -> tuple[list[str | int], str]:
    """Return the key that sorts names as a person counts: a2 before a10."""
    parts = re.split(r'(\d+)', text.casefold(), flags=re.ASCII)
    return [int(part) if n % 2 else part for n, part in enumerate(parts)], text


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


def read_facts(path: Path, channels: int = RGB, lenient: bool = False) -> PhotoFacts:
    """Decode a photo, of so many bands if it can be; return what is known of it. Raises BadInput.

    If lenient, a cut-off photo is taken as far as it decodes, with a warning.
    """
    photo, bands = read_any_bands(path, channels, lenient)
    if photo.fault:
        warn_once(f'warning: {path}: {photo.fault}: will be predicted from what decodes')
    ranges = measure_bands(photo, path, lenient) if photo.is_deep else None
    values = ranges and whole_range(ranges)
    return PhotoFacts(photo.size, photo.upright_size, photo.orientation, values, bands, ranges)


def write_set(imported: ImportedSet, out: Path, overwrite: bool) -> None:
    """Read and check everything, then write a data root: photos, a JSON file per split. Raises BadInput."""
    names = check_names(out, imported.names)
    photos = list(dict.fromkeys(path for paths in imported.splits.values() for path in paths))
    earlier = read_competition(out) or HOME
    channels = earlier.photo_channels
    labelled = set(imported.splits['train_all.json'])
    facts = {
        path: read_facts(path, channels, lenient=path not in labelled)
        for path in progress(photos, 'photos', 'photo')
    }
    intensity, bands = common_range(facts.values()), describe_bands(facts, earlier)
    imported = replace(imported, facts={**imported.facts, **bands})
    competition = competition_of_set(out, imported, bands.get('intensity', intensity), earlier)
    contents = {
        file_name: make_content(file_name, imported, names, {path: facts[path] for path in paths})
        for file_name, paths in imported.splits.items()
        if paths
    }
    for content in contents.values():
        content['categories'] = list_categories(competition, content['annotations'])
    if not any(one['iscrowd'] == 0 for one in contents['train_all.json']['annotations']):
        raise BadInput(f'{out}: would have no object of a class in any training photo; are these the labels?')
    with lock(out / LOCK_FILE, 'importing a data set'):
        refuse_existing(out, overwrite)  # another import may have ended meanwhile
        partial = out / PARTIAL
        shutil.rmtree(partial, ignore_errors=True)  # of an import that was killed
        remove_partials(out, MANIFEST, COMPETITION_FILE, *SET_FILES)
        try:
            for path in progress(photos, 'copy', 'photo'):
                lenient = path not in labelled
                copy_photo(path, partial / names[path], intensity, keep=bool(bands), lenient=lenient)
            publish(out, set(names.values()), contents, competition)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    print_summary(contents, facts.values(), None if bands else intensity)
    print(f'wrote {out}')
    print_competition(out, competition)


def describe_bands(facts: Mapping[Path, PhotoFacts], earlier: Competition) -> dict[str, Any]:
    """Return the keys of competition.yaml for photos of other bands than RGB, those that it has already if
    there are any; {} for RGB. Raises BadInput unless all photos have as many bands.
    """
    first = next(iter(facts))
    bands = facts[first].bands
    for path, photo in facts.items():
        if photo.bands != bands:
            found = f'found {plural(photo.bands, "band")}, but {first} has {bands}'
            raise BadInput(f'{path}: {found}; expected photos of as many bands')
    if bands != earlier.photo_channels and not earlier.is_rgb:
        expected = f'channels: {earlier.channels} in {COMPETITION_FILE} expects {earlier.photo_channels}'
        raise BadInput(f'{first}: found {plural(bands, "band")}, but {expected}; write what is true there')
    if bands == RGB and earlier.is_rgb:
        return {}
    ranges = [photo.ranges for photo in facts.values() if photo.ranges]
    pairs = tuple(widen(whole_range(band)) for band in zip(*ranges, strict=True))
    found = {'channels': bands} | ({'depth': 16, 'intensity': pairs} if ranges else {})
    if earlier.is_rgb:
        return found
    given = {key: getattr(earlier, key) for key in BANDS if key in earlier.model_fields_set}
    return found | given | {'channels': earlier.channels}


def copy_photo(source: Path, target: Path, intensity: Range | None, keep: bool, lenient: bool) -> None:
    """Copy a photo: byte for byte, if it is to keep its bands, else upright and as 8-bit RGB; `lenient` as
    read_facts.
    """
    if not keep:
        copy_upright(source, target, intensity, lenient)
        return
    with write_whole(target) as file:
        file.write(source.read_bytes())


def competition_of_set(
    out: Path, imported: ImportedSet, intensity: Range | None, earlier: Competition
) -> Competition:
    """Return what is true of a set: what the importer knows, and what a competition.yaml in `out` said
    earlier of scores, CSVs and groups. Raises BadInput.
    """
    values: dict[str, Any] = {'score_size': 256 if imported.classes == HOME.classes else 'own'}
    values |= imported.facts
    values |= {key: getattr(earlier, key) for key in KEPT if key in earlier.model_fields_set}
    values |= {'classes': imported.classes, 'intensity': intensity}
    return make_competition(values, where=str(out / COMPETITION_FILE))


def print_competition(out: Path, competition: Competition) -> None:
    """Print what competition.yaml says beside the classes, and what its reader has to say."""
    values = competition.model_dump(mode='json', exclude_defaults=True, exclude={'classes', 'submission'})
    if not values and competition.submission is None:
        return
    settings = ', '.join(f'{key}: {value}' for key, value in values.items())
    print(f'{out / COMPETITION_FILE}: {settings}' if settings else f'{out / COMPETITION_FILE}')
    if competition.rle is not None and competition.submission is None:
        metric = f'the metric ({competition.metric} now)'
        way = 'docs/competitions.md has examples, submission.py from-sample writes it'
        print(f'  left to say there: {metric}, and how masks are written into a CSV (submission): {way}')


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


def name_photos(
    folder: Path, photos: Iterable[Path], test: Path | None = None, tests: Iterable[Path] = ()
) -> dict[Path, str]:
    """Return the names of training and test photos in a set: their paths below their folders.

    If a training and a test photo would have the same, all are named below train/ and test/.
    """
    names = {path: path.relative_to(folder).as_posix() for path in photos}
    test_names = {path: path.relative_to(test).as_posix() for path in tests if path not in names}
    shared = set(map(normal_name, names.values())) & set(map(normal_name, test_names.values()))
    if shared:
        count = f'{len(shared)}, such as {min(shared)}'
        print(f'names that training and test photos share: {count}; they are put below train/ and test/')
        names = {path: f'train/{name}' for path, name in names.items()}
        test_names = {path: f'test/{name}' for path, name in test_names.items()}
    return names | test_names


def common_range(facts: Iterable[PhotoFacts]) -> Range | None:
    """Return the lowest and highest value of all photos of more than 8 bits; None if there are none."""
    ranges = [photo.values for photo in facts if photo.values is not None]
    return widen(whole_range(ranges)) if ranges else None


def make_content(
    file_name: str, imported: ImportedSet, names: Mapping[Path, str], photos: Mapping[Path, PhotoFacts]
) -> dict[str, Any]:
    """Make the content of a split's JSON file, without categories; test.json has no annotations."""
    images, annotations = [], []
    for image_id, (path, facts) in enumerate(progress(photos.items(), file_name, 'photo', len(photos))):
        height, width = facts.displayed
        images.append({'id': image_id, 'file_name': names[path], 'height': height, 'width': width})
        for annotation in [] if file_name == 'test.json' else imported.annotate(path, facts):
            annotations.append({'id': len(annotations), 'image_id': image_id, **annotation})
    info = {'description': DESCRIPTION}
    return {'info': info, 'images': images, 'categories': [], 'annotations': annotations}


def list_categories(competition: Competition, annotations: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return the categories of a JSON file: the classes of objects, and the background if it is used."""
    ids = {*competition.object_ids, *(annotation['category_id'] for annotation in annotations)}
    return [{'id': k, 'name': competition.classes[k]} for k in sorted(ids)]  # ignored regions are of id 0


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
        shown = [one for one in content['categories'] if one['id'] or counts[0]]
        parts = [f'{one["name"]} {counts[one["id"]]}' for one in shown]
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


def write_test(folder: Path, root: Path, overwrite: bool) -> None:
    """Write test.json of the photos below a folder, as a person counts; those elsewhere are copied below the
    root. Raises BadInput; what was there before stays then.
    """
    target = root / 'test.json'
    refuse_test(target, overwrite)
    photos = list_photos(folder)
    places = {path: place_of(path, folder, root) for path in photos}
    names = {path: place.relative_to(root.resolve()).as_posix() for path, place in places.items()}
    refuse_training(root, names.values())
    copied = {path: place for path, place in places.items() if path.resolve() != place}
    refuse_other_files(copied)
    orientation = (read_competition(root) or Competition()).orientation
    images = []
    for path in progress(sorted(photos, key=lambda path: natural_key(names[path])), 'photos', 'photo'):
        facts = read_facts(path, lenient=True)
        height, width = facts.displayed if orientation == 'displayed' else facts.stored
        images.append({'id': len(images), 'file_name': names[path], 'height': height, 'width': width})
    with lock(root / LOCK_FILE, 'importing a data set'):
        refuse_test(target, overwrite)
        for path, place in progress(copied.items(), 'copy', 'photo', len(copied)):
            with write_whole(place) as file:
                file.write(read_bytes(path))
        write_text(target, json.dumps({'images': images, 'annotations': [], 'categories': []}))
    done = f', copied below {root / TEST_FOLDER}' if copied else ''
    print(f'wrote {target}: {len(images)} photos{done}')


def refuse_test(target: Path, overwrite: bool) -> None:
    """Raise BadInput if there is a test.json already."""
    if target.exists() and not overwrite:
        raise BadInput(f'{target}: already exists; --overwrite replaces it')


def place_of(path: Path, folder: Path, root: Path) -> Path:
    """Return where a photo lies below a root, or is to be copied to."""
    real = path.resolve()
    if real.is_relative_to(root.resolve()):
        return real
    return root.resolve() / TEST_FOLDER / path.relative_to(folder)


def refuse_training(root: Path, names: Iterable[str]) -> None:
    """Raise BadInput if a photo is among the training photos of a root, which need not have any."""
    names = {normal_name(name) for name in names}
    for file in {root / name for group in SPLITS['train'] for name in group}:
        if not file.is_file():
            continue
        images = load_json(file, read_bytes(file)).get('images') or []
        known = [image.get('file_name') for image in images if isinstance(image, dict)]
        shared = [name for name in known if isinstance(name, str) and normal_name(name) in names]
        if shared:
            fault = f'has the training photo {shared[0]} (one of {len(shared)})'
            raise BadInput(f'{file}: {fault}; expected a folder of test photos alone in --photos')


def refuse_other_files(copied: dict[Path, Path]) -> None:
    """Raise BadInput for a photo in whose place another lies."""
    for path, place in copied.items():
        if place.exists() and (not place.is_file() or read_bytes(place) != read_bytes(path)):
            raise BadInput(f'{place}: is in the way of {path}, and another; move one of them away')
