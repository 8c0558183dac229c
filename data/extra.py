"""Photos and labels of other data roots, to train on beside those of the target (extra_data in a config).

Their classes are matched with ours by name, or by the entry's map. An object of a class that is none of ours
is ignored, with all its pixels. A class of ours that a root has no object of was not labelled there, as far
as one can know: where it is absent, that is unknown. So a photo's background is ignored there if it is one
class a pixel; of classes that may overlap, the planes of such classes are. `background` in an entry changes
that: trusted takes what is not labelled as absent, ignored takes nothing as absent.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from config import HOME, Competition, Config, ExtraData, match_key, read_competition
from data.cache import Cache, open_set
from data.coco import CocoSet, Photo, pixel_conventions
from data.duplicates import describe_photos, have_duplicates
from data.index import open_coco
from data.layout import annotation_files
from data.masks import Annotation
from utils.errors import BadInput, join_first
from utils.json_files import load_json, read_bytes

VERSION = 1  # raise it when classes are matched differently
IGNORE = 'ignore'  # in a map: a class whose objects are ignored
SHOWN = 10  # names in a line


@dataclass(frozen=True)
class Extra:
    """One other data root: its photos to train on, their share of the samples, and what to say of it."""

    cache: Cache
    rows: np.ndarray
    share: float
    remarks: tuple[str, ...] = ()


def open_extra(cfg: Config, cache: Cache, held_out: np.ndarray) -> tuple[Extra, ...]:
    """Open the other data roots of a config, each with a cache of its own; leave out near-duplicates of the
    target's photos that are held out, which are rows of its cache. Raises BadInput.
    """
    found = []
    for entry in cfg.extra_data:
        coco, remarks = read_extra(entry, cfg)
        extra = open_set(coco, cfg)
        rows = usable_rows(coco)
        copies = find_copies(extra, rows, cache, held_out)
        if copies.any():
            remarks.append(f'left out {copies.sum()} near-duplicates of photos to validate on')
        rows = rows[~copies]
        if not len(rows):
            raise BadInput(f'extra_data: {entry.root}: no photo is left to train on; {"; ".join(remarks)}')
        found.append(Extra(extra, rows, entry.share, tuple(remarks)))
    return tuple(found)


def usable_rows(coco: CocoSet) -> np.ndarray:
    """Return the rows of the photos that have anything to learn: an object, or the absence of a class."""
    is_multilabel, classes = coco.competition.is_multilabel, coco.competition.classes
    knows_absence = len(coco.unlabelled) < len(classes) if is_multilabel else not coco.unlabelled
    return np.array([row for row, found in enumerate(coco.photos.classes()) if knows_absence or found], int)


def read_extra(entry: ExtraData, cfg: Config) -> tuple[CocoSet, list[str]]:
    """Read another data root with our classes, and remarks on how they were matched. Raises BadInput."""
    theirs, ours = read_theirs(entry), cfg.competition
    coco = open_coco(entry.root, 'train', theirs, cfg.cache_dir)
    targets = match_classes(entry, theirs, ours)
    photos = tuple(convert(photo, targets, ours) for photo in coco.photos)
    labelled = {class_id for photo in photos for class_id in photo.classes}
    if not labelled:
        found = join_first(theirs.classes, SHOWN)
        fault = f'none of its classes, {found}, with objects is one of ours'
        raise BadInput(f'extra_data: {entry.root}: {fault}; expected a map of their names to ours')
    unlabelled = tuple(k for k in ours.object_ids if k not in labelled)
    if entry.background:
        unlabelled = () if entry.background == 'trusted' else tuple(ours.object_ids)
    used = {class_id for found in coco.photos.classes() for class_id in found}
    remarks = {
        'ignored: ': [theirs.classes[k] for k in sorted(used) if targets[k] is None],
        'absence is unknown of ': [ours.classes[k] for k in unlabelled],
    }
    shared = {key: getattr(theirs, key) for key in ('orientation', 'intensity', 'labels')}
    competition = ours.model_copy(update=shared)
    text = repr(
        (VERSION, coco.fingerprint, pixel_conventions(competition), ours.classes, targets, unlabelled)
    )
    changed = replace(
        coco,
        split='extra',
        photos=photos,
        fingerprint=hashlib.sha256(text.encode()).hexdigest(),
        competition=competition,
        unlabelled=unlabelled,
    )
    return changed, [f'{start}{join_first(names, SHOWN)}' for start, names in remarks.items() if names]


def read_theirs(entry: ExtraData) -> Competition:
    """Return what another data root is: by its competition.yaml, else by the names of its categories."""
    theirs = read_competition(entry.root)
    if theirs is not None and 'classes' in theirs.model_fields_set:
        return theirs
    names: dict[str, str] = {}
    for path in annotation_files(entry.root, 'train'):
        for category in load_json(path, read_bytes(path)).get('categories') or []:
            if isinstance(category, dict) and isinstance(category.get('name'), str | int):
                names.setdefault(match_key(str(category['name'])), str(category['name']))
    # as if they could overlap, so that none of them is the background by its place
    update = {'classes': tuple(names.values()), 'categories': {}, 'task': 'multilabel', 'score_size': 'own'}
    return (theirs or HOME).model_copy(update=update)


def match_classes(entry: ExtraData, theirs: Competition, ours: Competition) -> list[int | None]:
    """Return our class of each of theirs, by the map or by name; None for what is ignored.

    Raises BadInput for a map with names that are no classes.
    """
    where, targets = f'extra_data: {entry.root}: map', [*theirs.classes]
    for name, target in entry.map.items():
        class_id = theirs.class_id(name)
        if class_id is None:
            known = join_first(theirs.classes, SHOWN)
            raise BadInput(f'{where}: {name!r} is no class there; expected one of {known}')
        targets[class_id] = target
        if target != IGNORE and ours.class_id(target) is None:
            known = join_first(ours.classes, SHOWN)
            raise BadInput(f'{where}: {name} is {target!r}, expected {IGNORE}, or one of {known}')
    return [None if target == IGNORE else ours.class_id(target) for target in targets]


def convert(photo: Photo, targets: Sequence[int | None], ours: Competition) -> Photo:
    """Give a photo's annotations our classes; what is ignored is a crowd, in the planes of all classes."""
    annotations: list[Annotation] = []
    for annotation in photo.annotations:
        target = targets[annotation.category_id]
        if target is not None:
            annotations.append(replace(annotation, category_id=target))
        elif not is_background(annotation.category_id, photo):
            planes = ours.object_ids if ours.is_multilabel else range(1)
            annotations += [replace(annotation, category_id=k, iscrowd=True) for k in planes]
    return replace(photo, annotations=tuple(annotations), first_object=ours.object_ids.start)


def is_background(class_id: int, photo: Photo) -> bool:
    """Tell whether an annotation is of the background of a photo as it was read."""
    return class_id < photo.first_object


def find_copies(extra: Cache, rows: np.ndarray, cache: Cache, held_out: np.ndarray) -> np.ndarray:
    """Return which of the rows, (n,) bool, are near-duplicates of photos that are held out."""
    if not len(held_out) or not len(rows):
        return np.zeros(len(rows), bool)
    theirs, ours = (
        describe_photos((source.photos[row] for row in which), len(which))
        for source, which in ((extra, rows), (cache, held_out))
    )
    return have_duplicates(theirs, ours)
