"""Check a data set: read every record, decode every photo, draw every mask, and say what they are.

A fault, with which training or prediction would stop, raises BadInput. What a person should look at is a
remark: the last line counts the remarks.
"""

import hashlib
import os
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from config import COMPETITION_FILE, HOME, Competition, read_competition
from data.coco import CocoSet, Photo, draw_mask, read_coco, require_photo
from data.folds import TooFewScenes, find_scenes, near_duplicates, thumbnail
from data.masks import EMPTY_PART, SHORT_PART
from data.photos import Range, check_size, measure, read_stored, scale, show_range, turn
from metrics import IGNORED
from utils.errors import BadInput, join_first, plural
from utils.json_files import read_bytes
from utils.progress import progress

MAX_LISTED = 20  # groups of duplicates


@dataclass(frozen=True)
class CheckedPhoto:
    """Hold what a check keeps of a photo."""

    name: str  # file_name
    split: str
    size: tuple[int, int]  # recorded (H, W)
    kind: str  # RGB, 16-bit grey, ...
    orientation: int  # EXIF
    fits: tuple[str, ...]  # orientations of a competition with which the size is the recorded one
    truncated: bool
    values: Range | None  # of more than 8 bits
    thumbnail: np.ndarray
    checksum: str  # of the file
    pixels: np.ndarray  # (256,) pixels of each class id in its mask


def check_data(data: Path, competition: Competition, folds: int) -> tuple[list[str], bool]:
    """Check a data root and print what it holds; return the remarks, and whether so many folds can be made.

    Raises BadInput with the first fault.
    """
    cocos = [read_coco(data, 'train', competition)]
    if (data / 'test.json').is_file():
        cocos.append(read_coco(data, 'test', competition))
    photos: list[CheckedPhoto] = []
    faults: list[str] = []
    for coco in cocos:
        print(f'{coco.split}: {plural(len(coco.photos), "photo")}, {", ".join(map(str, coco.files))}')
        photos += check_photos(coco, faults)
    if faults:
        count = sum(len(coco.photos) for coco in cocos)
        more = f' (one of {len(faults)} faulty photos among {count})' if len(faults) > 1 else ''
        raise BadInput(min(faults) + more)
    train = [photo for photo in photos if photo.split == 'train']
    scenes = try_scenes(data, train, competition, folds)
    remarks = [
        *describe_sizes(photos),
        *describe_orientation(data, photos, competition),
        *describe_intensity(data, photos, competition),
        *describe_left_out(cocos),
        *describe_classes(cocos[0], sum(photo.pixels for photo in train)),
        *describe_duplicates(photos),
        *describe_scenes(data, scenes, competition),
    ]
    if len(cocos) == 1:
        print(f'{data / "test.json"}: not found, so no submission can be made')
    return remarks, not isinstance(scenes, TooFewScenes)


def origin_of_classes(data: Path, competition: Competition, cfg: Path | None) -> str:
    """Return a line that says where the classes come from."""
    path, count = data / COMPETITION_FILE, f'{len(competition.classes)} classes'
    in_file = read_competition(data)
    if in_file is None:
        home = competition.classes == HOME.classes
        return f'classes of the home competition: no {path}' if home else f'{count} from {cfg}: no {path}'
    values = in_file.model_dump(mode='json', exclude_defaults=True, exclude={'classes', 'categories'})
    settings = ''.join(f', {key}: {value}' for key, value in values.items())
    if 'classes' in in_file.model_fields_set:
        return f'{count} from {path}{settings}'
    return f'{count} from {cfg or "the home competition"}, the rest from {path}{settings}'


def check_photos(coco: CocoSet, faults: list[str]) -> list[CheckedPhoto]:
    """Decode the photos of a split and draw their masks; add the faults to a list."""

    def check(photo: Photo) -> CheckedPhoto | None:
        try:
            return check_photo(coco, photo)
        except BadInput as error:
            faults.append(str(error))
            return None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = progress(pool.map(check, coco.photos), f'check {coco.split}', 'photo', len(coco.photos))
        return [photo for photo in jobs if photo is not None]


def check_photo(coco: CocoSet, photo: Photo) -> CheckedPhoto:
    """Decode a photo and draw its mask. Raises BadInput."""
    path, competition = require_photo(coco, photo), coco.competition
    stored = read_stored(path, lenient=coco.split == 'test')  # cut-off test photos are predicted
    size = (photo.height, photo.width)
    sizes = {'displayed': stored.upright_size, 'stored': stored.size}
    fits = tuple(name for name, found in sizes.items() if found == size)
    if not fits:
        check_size(path, stored, size, competition.orientation)  # raises
    values = measure(stored, path) if stored.is_deep else None
    pixels = stored.pixels if values is None else scale(stored, competition.intensity or values)
    if competition.orientation == 'displayed':
        pixels = turn(pixels, stored.orientation)
    return CheckedPhoto(
        name=photo.file_name,
        split=coco.split,
        size=size,
        kind=stored.kind,
        orientation=stored.orientation,
        fits=fits,
        truncated=bool(stored.fault),
        values=values,
        thumbnail=thumbnail(pixels),
        checksum=hashlib.sha256(read_bytes(path)).hexdigest(),
        pixels=np.bincount(draw_mask(photo).ravel(), minlength=256),
    )


def describe_sizes(photos: list[CheckedPhoto]) -> list[str]:
    """Print the sizes, and the kinds of photos that are not all RGB; return a remark on cut-off ones."""
    sizes = Counter(photo.size for photo in photos)
    (common, count), *_ = sizes.most_common()
    usual = f'{common[0]}x{common[1]}'
    if len(sizes) == 1:
        print(f'size, height x width: {usual}')
    else:
        by_area = sorted(sizes, key=lambda size: (size[0] * size[1], size))
        limits = 'from {}x{} to {}x{}'.format(*by_area[0], *by_area[-1])
        print(f'sizes, height x width: {len(sizes)}, {limits}, most often {usual} ({count})')
    kinds = Counter(photo.kind for photo in photos)
    if set(kinds) != {'RGB'}:
        print(f'kinds: {", ".join(f"{kind} {count}" for kind, count in kinds.most_common())}')
    cut = [photo.name for photo in photos if photo.truncated]
    if not cut:
        return []
    return [f'{plural(len(cut), "cut-off test photo")} ({join_first(cut)}), predicted from what decodes']


def describe_orientation(data: Path, photos: list[CheckedPhoto], competition: Competition) -> list[str]:
    """Print how photos with an EXIF turn were labelled, as their sizes tell. Raises BadInput if that is not
    what the competition says, or not the same for all; returns a remark if no size tells it.
    """
    turned = [photo for photo in photos if photo.orientation != 1]
    if not turned:
        return []
    orientation = competition.orientation
    names = {key: [p.name for p in turned if p.fits == (key,)] for key in ('displayed', 'stored')}
    unclear = [photo.name for photo in turned if len(photo.fits) == 2]
    if names['displayed'] and names['stored']:
        counts = ', '.join(f'{len(names[key])} as {key} (first: {names[key][0]})' for key in names)
        advice = 'exiftool -Orientation= FILE takes the turn from those as stored'
        fault = f'the recorded sizes of photos with an EXIF turn are {counts}'
        raise BadInput(f'{data}: {fault}, expected the same for all; {advice}')
    other = 'stored' if orientation == 'displayed' else 'displayed'
    fitting, misfits = names[orientation], names[other]
    if misfits:
        count = plural(len(misfits), 'photo')
        fault = f'the recorded sizes of {count} with an EXIF turn are those as {other}'
        advice = f'write orientation: {other} into {data / COMPETITION_FILE}'
        raise BadInput(f'{data}: {fault} (first: {misfits[0]}), but orientation is {orientation}; {advice}')
    parts = [f'{plural(len(fitting), "recorded size")} fit orientation: {orientation}'] if fitting else []
    if unclear:
        parts += [f'{plural(len(unclear), "recorded size")} cannot tell (upside down, mirrored or square)']
    print(f'EXIF: {plural(len(turned), "photo")} with a turn; {", ".join(parts)}')
    if fitting or 'orientation' in competition.model_fields_set:
        return []
    question = f'the size of {plural(len(unclear), "photo")} with an EXIF turn ({join_first(unclear)})'
    answer = f'taken as {orientation} (orientation in {COMPETITION_FILE})'
    return [f'{question} does not tell the orientation of the labels, {answer}']


def describe_intensity(data: Path, photos: list[CheckedPhoto], competition: Competition) -> list[str]:
    """Print the range of photos of more than 8 bits; raise BadInput unless `intensity` holds the training
    photos. Values of test photos outside it give a remark.
    """
    deep = [photo for photo in photos if photo.values is not None]
    if not deep:
        return []
    low, high = min(p.values[0] for p in deep), max(p.values[1] for p in deep)
    found = f'{plural(len(deep), "photo")} of more than 8 bits a channel: values of {show_range((low, high))}'
    setting = f'intensity: [{show_range((low, high if high > low else low + 1), ", ")}]'
    advice = f'write {setting} into {data / COMPETITION_FILE}, the range of all of them'
    limits = competition.intensity
    if limits is None:
        raise BadInput(f'{data}: {found}, expected 8 bits or a range that becomes 0 to 255; {advice}')
    outside = [p for p in deep if p.values[0] < limits[0] or p.values[1] > limits[1]]
    given = f'intensity: [{show_range(limits, ", ")}]'
    train = [photo.name for photo in outside if photo.split == 'train']
    if train:
        raise BadInput(f'{data}: {found}, {plural(len(train), "training photo")} outside {given}; {advice}')
    print(f'values: {found}; {given} become 0 to 255')
    if not outside:
        return []
    names = join_first([photo.name for photo in outside])
    return [f'{plural(len(outside), "test photo")} ({names}) with values outside {given}, clipped']


def describe_left_out(cocos: list[CocoSet]) -> list[str]:
    """Print what was left out of the masks, by reason; return remarks with the numbers."""
    lost = Counter()
    for coco in cocos:
        for reason, count in coco.left_out.most_common():
            print(f'left out: {count:,} ({reason}), the first: {coco.left_out.examples[reason]}')
            lost['part' if reason in (SHORT_PART, EMPTY_PART) else 'object'] += count
    endings = {'object': 'left out', 'part': 'of objects left out'}
    return [f'{plural(lost[noun], noun)} {ending}' for noun, ending in endings.items() if lost[noun]]


def describe_classes(coco: CocoSet, pixels: np.ndarray) -> list[str]:
    """Print the photos, objects, crowds and pixels of each class; return remarks on crowds and lost ones."""
    classes = coco.competition.classes
    photos, objects, crowds = Counter(), Counter(), Counter()
    for photo in coco.photos:
        photos.update({a.category_id for a in photo.annotations if not a.iscrowd})
        objects.update(a.category_id for a in photo.annotations if not a.iscrowd)
        crowds.update(a.category_id or IGNORED for a in photo.annotations if a.iscrowd)  # of no class
    width = max(15, *map(len, classes))
    columns = ['photos', 'objects', *(['crowds'] if crowds else [])]
    print(f'{"class":<{width}}' + ''.join(f'{name:>9}' for name in columns) + f'{"pixels":>15}{"share":>9}')
    for k, name in [*enumerate(classes), (IGNORED, 'ignored')]:
        if k == IGNORED and not pixels[k]:
            continue
        counts = [counter[k] for counter in (photos, objects, crowds)][: len(columns)]
        numbers = ''.join(f'{n:>9,}' if n or 0 < k < IGNORED else ' ' * 9 for n in counts)
        print(f'{name:<{width}}{numbers}{pixels[k]:>15,}{pixels[k] / pixels.sum():>9.2%}')
    empty = [name for k, name in enumerate(classes) if k and not objects[k] and not crowds[k]]
    if empty:
        print(f'no object: {", ".join(empty)}')
    del objects[0], crowds[IGNORED]  # the background is no object
    ignored = f'crowds, which are ignored (crowds: objects in {COMPETITION_FILE} makes them objects)'
    if not objects and not crowds:
        return ['no training photo has an object']
    if not objects:
        return [f'all {crowds.total()} objects are {ignored}']
    covered = [classes[k] for k in sorted(objects) if not pixels[k]]
    hidden = [classes[k] for k in sorted(crowds) if not objects[k]]
    remarks = []
    if covered:
        remarks.append(f'no pixel is left of the objects of {join_first(covered)}: others cover them')
    if hidden:
        remarks.append(f'all objects of {join_first(hidden)} are {ignored}')
    return remarks


def describe_duplicates(photos: list[CheckedPhoto]) -> list[str]:
    """Print the groups of equal files and of near-duplicates; return a remark on each kind."""
    rows = near_duplicates(np.stack([photo.thumbnail for photo in photos]))
    near = [group for group in groups_of(photos, rows) if len({photo.checksum for photo in group}) > 1]
    equal = groups_of(photos, [photo.checksum for photo in photos])
    remarks = []
    for word, groups in (('equal files', equal), ('near-duplicates', near)):
        if not groups:
            continue
        splits = Counter(' and '.join(sorted({p.split for p in group}, reverse=True)) for group in groups)
        places = ', '.join(f'{n} {"between" if " " in key else "within"} {key}' for key, n in splits.items())
        count = f'{plural(len(groups), "group")} of {word}'
        print(f'{count}: {places}')
        for group in groups[:MAX_LISTED]:
            print('  ' + join_first([photo.name for photo in group], MAX_LISTED))
        if len(groups) > MAX_LISTED:
            print(f'  and {len(groups) - MAX_LISTED} more groups')
        remarks.append(f'{count} ({places})')
    if not remarks:
        print('no equal files and no near-duplicates')
    return remarks


def groups_of(photos: list[CheckedPhoto], keys: Iterable) -> list[list[CheckedPhoto]]:
    """Group photos by their keys; groups of one are left out."""
    groups: dict = {}
    for photo, key in zip(photos, keys, strict=True):
        groups.setdefault(key, []).append(photo)
    return [group for group in groups.values() if len(group) > 1]


Scenes = tuple[np.ndarray, str] | TooFewScenes  # what find_scenes returns or raises


def try_scenes(data: Path, train: list[CheckedPhoto], competition: Competition, folds: int) -> Scenes:
    """Find the scenes of the training photos. Raises BadInput for a name that `group` does not match."""
    names, thumbnails = [photo.name for photo in train], np.stack([photo.thumbnail for photo in train])
    try:
        return find_scenes(data, names, thumbnails, competition.group, folds)
    except TooFewScenes as error:
        return error


def describe_scenes(data: Path, scenes: Scenes, competition: Competition) -> list[str]:
    """Print the scenes, if `group` makes them; return a remark on folds that cannot be made as asked."""
    if isinstance(scenes, TooFewScenes):
        return [f'no folds can be made: {str(scenes).removeprefix(f"{data}: ")}']
    rows, remark = scenes
    if competition.group is not None:
        count = np.bincount(rows)
        print(f'group: {len(count)} scenes of {count.min()} to {count.max()} photos by {competition.group}')
    return [remark] if remark else []
