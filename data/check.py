"""Check a data set: read every record, decode every photo, draw every mask, and say what they are.

A fault, with which training or prediction would stop, raises BadInput. What a person should look at is a
remark: the last line counts the remarks.
"""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pycocotools import mask as rle_codec

from config import COMPETITION_FILE, HOME, Competition, read_competition
from data.bands import find_slices, read_any_bands, to_channels, volume_of
from data.coco import CocoSet, Photo, draw_mask, draw_truth, read_coco, require_photo
from data.duplicates import Descriptors, describe_alike, describe_photo, find_pairs, join_groups
from data.folds import TooFewScenes, describe_split, find_scenes, read_rows
from data.groups import group_names, match_group, suggest_group
from data.masks import EMPTY_PART, SHORT_PART, shared_pixels
from data.photos import Range, check_size, measure_bands, scale, show_range, turn, whole_range, widen
from metrics import IGNORED
from utils.errors import BadInput, join_first, plural
from utils.files import normal_name
from utils.json_files import read_bytes
from utils.progress import Bar
from utils.yaml_files import show_yaml

MAX_LISTED = 20  # groups of duplicates
PHOTOS_AT_ONCE = 1000  # in the queue of the threads
FEW_OBJECTS, CORNER = 10, 0.6  # objects from which it is strange that all lie in a corner, and its sides
MUCH, MUCH_OF_ONE = 0.05, 0.25  # shares of the objects' pixels, and of one class's, that others cover


@dataclass(frozen=True, slots=True)
class CheckedPhoto:
    """Hold what a check keeps of a photo."""

    name: str  # file_name
    split: str
    size: tuple[int, int]  # recorded (H, W)
    kind: str  # RGB, 16-bit grey, ...
    orientation: int  # EXIF
    fits: tuple[str, ...]  # orientations of a competition with which the size is the recorded one
    truncated: bool
    bands: int  # that the competition's photos have, or another number
    values: tuple[Range, ...] | None  # of each band, of more than 8 bits
    type: np.dtype  # of its values
    checksum: str  # of the file


Checked = tuple[CheckedPhoto, tuple[np.ndarray, np.ndarray], np.ndarray]  # with describe_photo, count_pixels


class CheckedPhotos(list[CheckedPhoto]):
    """Hold the photos without a fault, their descriptors, and the (2, 256) sum of count_pixels over the
    training photos.
    """

    def __init__(self, count: int) -> None:
        super().__init__()
        self.descriptors, self.pixels = Descriptors.allocate(count), np.zeros((2, 256), np.int64)

    def add(self, photo: CheckedPhoto, descriptor: tuple[np.ndarray, np.ndarray], pixels: np.ndarray) -> None:
        self.descriptors[len(self)] = descriptor
        if photo.split == 'train':
            self.pixels += pixels
        self.append(photo)


def check_data(
    data: Path, competition: Competition, folds: int, folds_csv: Path | None = None
) -> tuple[list[str], bool]:
    """Check a data root and print what it holds; return the remarks, and whether so many folds can be made.

    Folds that were made are checked if they are those of its photos. Raises BadInput with the first fault.
    """
    cocos = [read_coco(data, 'train', competition)]
    if (data / 'test.json').is_file():
        cocos.append(read_coco(data, 'test', competition))
    count = sum(len(coco.photos) for coco in cocos)
    photos, faults = CheckedPhotos(count), []
    for coco in cocos:
        print(f'{coco.split}: {plural(len(coco.photos), "photo")}, {", ".join(map(str, coco.files))}')
        check_photos(coco, photos, faults)
    if faults:
        more = f' (one of {len(faults)} faulty photos among {count})' if len(faults) > 1 else ''
        raise BadInput(min(faults) + more)
    train = [photo for photo in photos if photo.split == 'train']
    pairs, _, num_alike = find_pairs(photos.descriptors, len(train))
    train_pairs = pairs[(pairs < len(train)).all(axis=1)]
    scenes = try_scenes(data, train, train_pairs, competition, folds)
    remarks = [
        *describe_sizes(photos),
        *describe_orientation(data, photos, competition),
        *describe_intensity(data, photos, competition),
        *describe_slices(cocos),
        *describe_left_out(cocos),
        *describe_annotators(cocos[0]),
        *describe_classes(cocos[0], photos.pixels),
        *describe_extent(cocos[0]),
        *describe_duplicates(photos, pairs),
        *([describe_alike(num_alike, count)] if num_alike and competition.group is None else []),
        *describe_scenes(data, scenes, competition, train[0].name),
        *describe_folds(folds_csv, train, train_pairs),
        *hint_at_groups(train, competition),
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


def check_photos(coco: CocoSet, photos: CheckedPhotos, faults: list[str]) -> None:
    """Decode the photos of a split and draw their masks; add what they are, and the faults."""

    def check(photo: Photo) -> Checked | None:
        try:
            return check_photo(coco, photo)
        except BadInput as error:
            faults.append(str(error))
            return None

    count = len(coco.photos)
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        Bar(total=count, desc=f'check {coco.split}', unit='photo') as bar,
    ):
        for start in range(0, count, PHOTOS_AT_ONCE):
            for found in pool.map(check, coco.photos[start : start + PHOTOS_AT_ONCE]):
                bar.update()
                if found is not None:
                    photos.add(*found)


def check_photo(coco: CocoSet, photo: Photo) -> Checked:
    """Decode a photo and draw its mask; return it, its descriptor and count_pixels. Raises BadInput."""
    path, competition = require_photo(coco, photo), coco.competition
    lenient = coco.split == 'test'  # cut-off test photos are predicted
    stored, bands = read_any_bands(path, competition.photo_channels, lenient)
    size = (photo.height, photo.width)
    sizes = {'displayed': stored.upright_size, 'stored': stored.size}
    fits = tuple(name for name, found in sizes.items() if found == size)
    if not fits:
        check_size(path, stored, size, competition.orientation)  # raises
    is_given = competition.ranges is not None
    values = measure_bands(stored, path, lenient or is_given) if stored.is_deep else None
    ranges = competition.ranges if bands == competition.photo_channels else None
    pixels = stored.pixels if values is None else scale(stored, ranges or [whole_range(values)])
    pixels = to_channels(pixels, bands)
    if competition.orientation == 'displayed':
        pixels = turn(pixels, stored.orientation)
    checked = CheckedPhoto(
        name=photo.file_name,
        split=coco.split,
        size=size,
        kind=stored.kind,
        orientation=stored.orientation,
        fits=fits,
        truncated=bool(stored.fault),
        bands=bands,
        values=values,
        type=stored.pixels.dtype,
        checksum=hashlib.sha256(read_bytes(path)).hexdigest(),
    )
    return checked, describe_photo(pixels), count_pixels(photo, competition)


def count_pixels(photo: Photo, competition: Competition) -> np.ndarray:
    """Count the pixels of each class id in a photo's mask, and of its objects as a whole → (2, 256) int64.

    If classes may overlap, the second are those that another class has, too.
    """
    counts = np.zeros((2, 256), np.int64)
    if len(photo.annotators) > 1:  # of the majority, where objects as a whole are not known
        truth = draw_truth(photo, competition)
        if not competition.is_multilabel:
            counts[:] = np.bincount(truth.ravel(), minlength=256)
            return counts
        planes = truth == 1
        others = planes & (planes.sum(axis=0) > 1)
        counts[:, : len(planes)] = planes.sum(axis=(1, 2)), others.sum(axis=(1, 2))
        counts[0, IGNORED] = np.count_nonzero(truth == IGNORED)
        return counts
    drawn: dict[tuple[int, bool], list[bytes]] = {}  # by class, and whether it is ignored
    for annotation in photo.annotations:
        drawn.setdefault((annotation.category_id, annotation.iscrowd), []).append(annotation.rle)
    objects = {k: rles for (k, iscrowd), rles in drawn.items() if not iscrowd}
    if not competition.is_multilabel:
        counts[0] = np.bincount(draw_mask(photo).ravel(), minlength=256)
        for k, rles in objects.items():
            counts[1, k] = merged_area(rles, photo.size)
        return counts
    for k, pixels in shared_pixels(objects, photo.size).items():
        counts[:, k] = pixels
    for (k, iscrowd), rles in drawn.items():
        if iscrowd:  # objects lie over crowds
            counts[0, IGNORED] += merged_area([*rles, *objects.get(k, [])], photo.size) - counts[0, k]
    return counts


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
    """Print the bands, and the ranges of photos of more than 8 bits; raise BadInput unless `channels` is the
    number of bands and `intensity` holds the training photos. Values of test photos outside give a remark.
    """
    bands = describe_channels(data, photos, competition)
    deep = [photo for photo in photos if photo.values is not None]
    if not deep and bands == competition.photo_channels:
        return []
    settings = [f'intensity: {range_setting([photo.values for photo in deep])}'] if deep else []
    if bands != competition.photo_channels:
        depth = competition.depth == 8 and any(np.dtype(p.type).itemsize > 1 for p in deep)
        count = bands * competition.channels // competition.photo_channels
        settings = [f'channels: {count}', *(['depth: 16'] if depth else []), *settings]
        fault = f'found photos of {plural(bands, "band")}, expected {competition.photo_channels}'
        raise BadInput(f'{data}: {fault}; write {"; ".join(settings)} into {data / COMPETITION_FILE}')
    low, high = whole_range(pair for photo in deep for pair in photo.values)
    found = f'{plural(len(deep), "photo")} of more than 8 bits a channel: values of {show_range((low, high))}'
    advice = f'write {settings[0]} into {data / COMPETITION_FILE}, the range of all of them'
    limits, top = competition.ranges, competition.max_value
    if limits is None:
        raise BadInput(f'{data}: {found}, expected 8 bits or a range that becomes 0 to {top}; {advice}')
    outside = [photo for photo in deep if is_outside(photo, limits)]
    given = f'intensity: {show_ranges(limits)}'
    train = [photo.name for photo in outside if photo.split == 'train']
    if train:
        raise BadInput(f'{data}: {found}, {plural(len(train), "training photo")} outside {given}; {advice}')
    print(f'values: {found}; {given} become 0 to {top}')
    if not outside:
        return []
    names = join_first([photo.name for photo in outside])
    return [f'{plural(len(outside), "test photo")} ({names}) with values outside {given}, clipped']


def describe_channels(data: Path, photos: list[CheckedPhoto], competition: Competition) -> int:
    """Print the bands of photos other than grey and RGB, with the range of each; return how many they are.
    Raises BadInput if not all have as many.
    """
    counts = Counter(photo.bands for photo in photos)
    (bands, _), *others = counts.most_common()
    if others:
        names = (next(photo.name for photo in photos if photo.bands == n) for n in counts)
        found = ', '.join(
            f'{counts[n]} of {plural(n, "band")} (first: {name})' for n, name in zip(counts, names)
        )
        raise BadInput(f'{data}: found {found}, expected photos of as many bands; leave the others out')
    if bands not in (1, 3):
        print(f'bands: {bands}')
        deep = [photo.values for photo in photos if photo.values is not None]
        for band, pairs in enumerate(zip(*deep, strict=True), 1):
            print(f'  band {band}: values of {show_range(whole_range(pairs))}')
    return bands


def range_setting(values: list[tuple[Range, ...]]) -> str:
    """Write the ranges of all photos as `intensity`: one pair for grey and RGB, else one a band."""
    bands = list(zip(*values, strict=True))
    if len(bands) in (1, 3):
        bands = [sum(bands, ())]
    return show_ranges([widen(whole_range(pairs)) for pairs in bands])


def show_ranges(ranges: Sequence[Range]) -> str:
    """Write ranges as `intensity` has them."""
    pairs = [f'[{show_range(pair, ", ")}]' for pair in ranges]
    return pairs[0] if len(pairs) == 1 else f'[{", ".join(pairs)}]'


def is_outside(photo: CheckedPhoto, limits: Sequence[Range]) -> bool:
    """Return whether a photo has values outside of `intensity`."""
    found = photo.values if len(limits) > 1 else [whole_range(photo.values)]
    pairs = zip(found, limits, strict=True)
    return any(values[0] < limit[0] or values[1] > limit[1] for values, limit in pairs)


def describe_slices(cocos: list[CocoSet]) -> list[str]:
    """Print how many photos have a missing neighbour, if slices are given; return a remark on volumes whose
    slices the folds would separate. Raises BadInput for a name without a number.
    """
    competition, root = cocos[0].competition, cocos[0].root
    slices = competition.slices
    if slices is None:
        return []
    photos = [coco.path(photo) for coco in cocos for photo in coco.photos]
    lacking = [
        path for path in photos if len(set(find_slices(path, root, slices))) < len(set(slices.offsets))
    ]
    names = [photo.file_name for photo in cocos[0].photos]
    volumes = [volume_of(name, slices) for name in names]
    alone = f'{plural(len(lacking), "photo")} without all neighbours, which repeat the nearest'
    print(f'slices: {plural(len(set(volumes)), "volume")}; {alone}')
    if competition.group is not None:
        groups = group_names(root, names, competition.group)
        pairs = len({*zip(volumes, groups.tolist(), strict=True)})
        return [] if pairs == len(set(volumes)) else ['slices of one volume are in several groups of `group`']
    if len(set(volumes)) == len(volumes):
        return []
    groups = re.compile(slices.pattern).groups
    advice = f'group: {show_yaml(slices.pattern)}' if groups > 1 else 'a group'
    return [f'the folds separate slices of one volume; write {advice} into {root / COMPETITION_FILE}']


def describe_left_out(cocos: list[CocoSet]) -> list[str]:
    """Print what was left out of the masks, by reason; return remarks with the numbers."""
    lost = Counter()
    for coco in cocos:
        coco.left_out.print()
        for reason, count in coco.left_out.items():
            lost['part' if reason in (SHORT_PART, EMPTY_PART) else 'object'] += count
    endings = {'object': 'left out', 'part': 'of objects left out'}
    return [f'{plural(lost[noun], noun)} {ending}' for noun, ending in endings.items() if lost[noun]]


def describe_annotators(coco: CocoSet) -> list[str]:
    """Print how many annotators the photos have, if they have several; return a remark on those whose masks
    are taken as one, and on soft labels without any.
    """
    is_soft = coco.competition.labels == 'soft'
    counts = [len({a.annotator for a in photo.annotations} - {None}) for photo in coco.photos]
    if is_soft:
        counts = [len(photo.annotators) for photo in coco.photos]
    several = sum(count > 1 for count in counts)
    found = f'{plural(several, "photo")} with several annotators, {max(counts)} at most'
    if is_soft and several:
        print(f'labels: soft; {found}: photos and pixels of a class are those of their majority')
    elif is_soft:
        return ['labels: soft, but no photo has annotations with different values of the key annotator']
    elif several:
        advice = f'labels: soft in {COMPETITION_FILE} makes each a mask of their own'
        return [f'{found}, whose objects are taken as those of one ({advice})']
    return []


def describe_classes(coco: CocoSet, pixels: np.ndarray) -> list[str]:
    """Print the photos, objects, crowds and pixels of each class, and how they overlap; return remarks on
    crowds and lost ones. `pixels` are those of count_pixels.
    """
    classes, ids = coco.competition.classes, coco.competition.object_ids
    pixels, others = pixels
    area = sum(photo.height * photo.width for photo in coco.photos)
    photos, objects, crowds = Counter(), Counter(), Counter()
    for photo in coco.photos:
        photos.update(photo.classes)
        photos.update(
            {a.category_id for a in photo.annotations if not a.iscrowd and a.category_id not in ids}
        )
        objects.update(a.category_id for a in photo.annotations if not a.iscrowd)
        crowded = [a.category_id for a in photo.annotations if a.iscrowd]
        crowds.update(k if k in ids else IGNORED for k in crowded)  # those of the background are of no class
    width = max(15, *map(len, classes))
    columns = ['photos', 'objects', *(['crowds'] if crowds else [])]
    print(f'{"class":<{width}}' + ''.join(f'{name:>9}' for name in columns) + f'{"pixels":>15}{"share":>9}')
    for k, name in [*enumerate(classes), (IGNORED, 'ignored')]:
        if k == IGNORED and not pixels[k]:
            continue
        counts = [counter[k] for counter in (photos, objects, crowds)][: len(columns)]
        numbers = ''.join(f'{n:>9,}' if n or k in ids else ' ' * 9 for n in counts)
        print(f'{name:<{width}}{numbers}{pixels[k]:>15,}{pixels[k] / area:>9.2%}')
    empty = [classes[k] for k in ids if not objects[k] and not crowds[k]]
    if empty:
        print(f'no object: {", ".join(empty)}')
    print_overlaps(coco.competition, pixels, others)
    for k in (*range(ids.start), IGNORED):  # the background is no object
        del objects[k], crowds[k]
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


def describe_extent(coco: CocoSet) -> list[str]:
    """Print how many photos have no object; return a remark if no object comes near the right or the lower
    edge of its photo, as if all had been drawn on smaller copies, or in percent.
    """
    empty, ends = [], []
    for photo in coco.photos:
        rles = [{'size': photo.size, 'counts': a.rle} for a in photo.annotations if not a.iscrowd]
        if not rles:
            empty.append(photo.file_name)
            continue
        boxes = rle_codec.toBbox(rles)
        ends += ((boxes[:, :2] + boxes[:, 2:]) / photo.size[::-1]).tolist()  # right, lower
    if empty:
        print(f'photos without an object: {len(empty):,}, such as {empty[0]}')
    right, lower = np.max(ends, axis=0, initial=0) if ends else (1, 1)
    if len(ends) < FEW_OBJECTS or max(right, lower) >= CORNER:
        return []
    part = f'the left {right:.0%} and upper {lower:.0%} of their photos'
    return [f'all objects lie in {part}: were they drawn on smaller copies, or are they in percent?']


def print_overlaps(competition: Competition, pixels: np.ndarray, others: np.ndarray) -> None:
    """Print how much of the objects lies under other classes, if that is much, or belongs to several."""
    ids = competition.object_ids
    whole = {k: pixels[k] if competition.is_multilabel else others[k] for k in ids}
    lost = {k: others[k] if competition.is_multilabel else others[k] - pixels[k] for k in ids}
    shares = {k: lost[k] / whole[k] for k in ids if whole[k]}
    total = sum(lost.values()) / max(sum(whole.values()), 1)
    worst = [k for k in sorted(shares, key=lambda k: -shares[k])[:3] if shares[k] >= 0.005]
    most = ', '.join(f'{competition.classes[k]} ({shares[k]:.0%})' for k in worst)
    if competition.is_multilabel and most:
        print(f"overlaps: {total:.1%} of the objects' pixels have several classes, most of {most}")
    elif total >= MUCH or max(shares.values(), default=0) >= MUCH_OF_ONE:
        advice = f'if it should stay whole, write task: multilabel into {COMPETITION_FILE}'
        print(f"overlaps: {total:.1%} of the objects' pixels lie under others, most of {most}; {advice}")


def merged_area(rles: Sequence[bytes], size: tuple[int, int]) -> int:
    """Return the number of pixels that run lengths cover together."""
    return int(rle_codec.area(rle_codec.merge([{'size': size, 'counts': rle} for rle in rles])))


def describe_duplicates(photos: CheckedPhotos, pairs: np.ndarray) -> list[str]:
    """Print the groups of equal files and of near-duplicates; return a remark on each kind."""
    rows = join_groups(np.arange(len(photos)), pairs)
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


def try_scenes(
    data: Path, train: list[CheckedPhoto], pairs: np.ndarray, competition: Competition, folds: int
) -> Scenes:
    """Find the scenes of the training photos. Raises BadInput for a name that `group` does not match."""
    try:
        return find_scenes(data, [photo.name for photo in train], pairs, competition.group, folds)
    except TooFewScenes as error:
        return error


def describe_scenes(data: Path, scenes: Scenes, competition: Competition, name: str) -> list[str]:
    """Print the scenes, if `group` makes them, and that of a photo by its name; return a remark on folds that
    cannot be made as asked.
    """
    if isinstance(scenes, TooFewScenes):
        return [f'no folds can be made: {str(scenes).removeprefix(f"{data}: ")}']
    rows, remark = scenes
    if competition.group is not None:
        count = np.bincount(rows)
        by_csv = competition.group.lower().endswith('.csv')
        example = '' if by_csv else f', such as {match_group(name, competition.group)!r}'
        photos = f'{count.min()} to {count.max()} photos'
        print(f'group: {len(count)} scenes of {photos} by {competition.group}{example}')
    return [remark] if remark else []


def describe_folds(folds_csv: Path | None, train: list[CheckedPhoto], pairs: np.ndarray) -> list[str]:
    """Return a remark if folds that were made for these photos split near-duplicates. Raises BadInput."""
    names = [photo.name for photo in train]
    fold_of = {} if folds_csv is None else dict(read_rows(folds_csv))
    if set(fold_of) != {*map(normal_name, names)}:  # of another data set
        return []
    remark = describe_split(names, pairs, np.array([fold_of[normal_name(name)] for name in names]))
    return [f'{folds_csv}: {remark}'] if remark else []


def hint_at_groups(train: list[CheckedPhoto], competition: Competition) -> list[str]:
    """Return a remark if the names of the training photos look as if they had groups, and none are given."""
    remark = suggest_group([photo.name for photo in train]) if competition.group is None else ''
    return [remark] if remark else []
