"""Find the mask of each photo by its name: of a.jpg, a.png or a.jpg.png, or a_mask.png if all end so."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from data.importers import list_files, list_photos, refuse_shared
from data.photos import Orientation
from utils.errors import BadInput
from utils.files import normal_name

MASK_SUFFIXES = {'.png', '.bmp', '.gif', '.tif', '.tiff'}
LOSSY_SUFFIXES = {'.jpg', '.jpeg', '.webp'}
BACKGROUND = 'Background'
SEPARATORS = '_-. '  # before an ending that the names of masks have and those of photos have not


@dataclass(frozen=True)
class MaskSource:
    """Hold what is imported: the folders, the classes, and how names and values of masks are to be read."""

    photos: Path
    masks: Path
    classes: tuple[str, ...]
    test: Path | None = None
    changes: Sequence[str] = ()  # of --map
    suffix: str | None = None
    orientation: Orientation = 'displayed'


def class_folders(classes: Sequence[str]) -> list[str]:
    """Return the names of the folders of masks, one a class, where classes may overlap."""
    names = [re.sub(r'[/\\]|^\.', '_', name) for name in classes]
    twice = {name for name in names if names.count(name) > 1}
    return [f'{name}_{k}' if name in twice else name for k, name in enumerate(names)]


def split_classes(source: MaskSource) -> list[MaskSource]:
    """Return the masks of each class, in a folder of its name or in one for all of them. Raises BadInput."""
    places = [source.masks / name for name in class_folders(source.classes)]
    if missing := [place for place in places if not place.is_dir()]:
        expected = f'expected one of masks for each class ({len(places)})'
        raise BadInput(f'{missing[0]}: no such folder; {expected}')
    pairs = zip(places, source.classes, strict=True)
    return [replace(source, masks=place, classes=(BACKGROUND, name)) for place, name in pairs]


def pair(source: MaskSource) -> dict[Path, Path]:
    """Return the mask of each photo. Raises BadInput for a photo without a mask, or with two."""
    photos = list_photos(source.photos)
    files = list_files(source.masks, MASK_SUFFIXES | LOSSY_SUFFIXES)
    photo_folder, mask_folder = source.photos.resolve(), source.masks.resolve()
    if photo_folder == mask_folder:
        photos, files = split_folder(source, photos)
    elif photo_folder.is_relative_to(mask_folder):
        files = [path for path in files if not path.resolve().is_relative_to(photo_folder)]
    for folder in [mask_folder, *([source.test.resolve()] if source.test else [])]:
        if photo_folder in folder.parents:
            photos = [path for path in photos if not path.resolve().is_relative_to(folder)]
    if not photos:
        raise BadInput(f'{source.photos}: holds no photo that is not below --masks or --test')
    stems: dict[str, list[Path]] = {}
    for path in files:
        stems.setdefault(stem_of(path, source.masks), []).append(path)
    suffix = source.suffix
    if suffix is None and (suffix := find_suffix(source, photos, stems)):
        print(f'masks are those whose names have {suffix} after the name of the photo')
    masks = {photo: find_mask(source, photo, stems, suffix) for photo in photos}
    refuse_shared(masks, 'mask')
    report_unused(source, masks, files)
    return masks


def stem_of(path: Path, folder: Path) -> str:
    """Return the name of a file below a folder without its last ending, in one Unicode form."""
    return normal_name(path.relative_to(folder).with_suffix('').as_posix())


def split_folder(source: MaskSource, files: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Split the files of a folder that has photos and masks, by the ending of the masks. Raises BadInput."""
    if not source.suffix:
        advice = 'give the ending of the masks, as in --suffix _mask'
        raise BadInput(f'{source.masks}: holds photos and masks; expected two folders, or {advice}')
    ending = normal_name(source.suffix.rpartition('=')[2])
    masks = [path for path in files if stem_of(path, source.masks).endswith(ending)]
    return [path for path in files if path not in set(masks)], masks


def find_suffix(source: MaskSource, photos: Sequence[Path], stems: Mapping[str, Sequence[Path]]) -> str:
    """Return the ending that the masks of all photos have beyond the photos' names; '' if there is none.

    Raises BadInput if there are several, as where each photo has masks of several kinds.
    """
    candidates: set[str] | None = None
    by_folder: dict[str, list[str]] = {}
    for stem in stems:
        by_folder.setdefault(stem.rpartition('/')[0], []).append(stem)
    for photo in photos:
        key = stem_of(photo, source.photos)
        if key in stems or key + photo.suffix in stems:
            return ''
        starts = tuple(key + separator for separator in SEPARATORS)
        beside = by_folder.get(key.rpartition('/')[0], [])
        endings = {stem[len(key) :] for stem in beside if stem.startswith(starts)}
        candidates = endings if candidates is None else candidates & endings
        if not candidates:
            return ''
    if len(candidates) > 1:
        names = ', '.join(sorted(candidates)[:6])
        advice = f'choose one, as in --suffix {min(candidates)}'
        if all(ending[1:].isdigit() for ending in candidates):
            advice = 'if each is of one object, draw those of a photo into one mask, with ids of classes'
        raise BadInput(f'{source.masks}: each photo has several masks: {names}; {advice}')
    return min(candidates)


def find_mask(source: MaskSource, photo: Path, stems: Mapping[str, list[Path]], suffix: str) -> Path:
    """Return the path of a photo's mask; raise BadInput if it has none or two, or a lossy one."""
    key = stem_of(photo, source.photos)
    old, equals, new = suffix.rpartition('=')
    if equals and not key.endswith(normal_name(old)):
        raise BadInput(f'{photo}: its name does not end in {old!r}, as --suffix {suffix} says')
    names = [key.removesuffix(normal_name(old)) + normal_name(new)]
    if not suffix:
        names.insert(0, key + photo.suffix)
    paths = [path for stem in dict.fromkeys(names) for path in stems.get(stem, [])]
    lossless = [path for path in paths if path.suffix.lower() in MASK_SUFFIXES]
    if len(lossless) == 1:
        return lossless[0]
    if lossless:
        two = f'{lossless[0]} and {lossless[1]}'
        raise BadInput(f'{photo}: has two masks, {two}; expected one; remove the other')
    if paths:
        raise lossy(paths[0])
    expected = ' or '.join(str(source.masks / f'{name}.png') for name in names)
    advice = 'another ending of the names is given by --suffix, as in --suffix _mask or _sat=_mask'
    near = [stem for stem in stems if stem.startswith(key) and stem[len(key) :][:1] in (*SEPARATORS, '/')]
    if near and near[0][len(key)] == '/':
        advice = f'there is a folder {source.masks / key}; draw its masks into one, with ids of classes'
    elif near:
        advice = f'there is {stems[near[0]][0]}: --suffix {near[0][len(key) :]}'
    raise BadInput(f'{photo}: has no mask; expected {expected}; {advice}')


def lossy(path: Path) -> BadInput:
    fault = 'is a JPEG or WebP, which changes ids at the edges of objects'
    return BadInput(f'{path}: {fault}; expected a lossless mask; export the masks again, as PNG')


def report_unused(source: MaskSource, masks: Mapping[Path, Path], files: Iterable[Path]) -> None:
    """Print how many masks have no photo; raise BadInput for one that seems to belong to a photo, too."""
    unused = sorted(set(files) - set(masks.values()))
    keys = {stem_of(photo, source.photos) for photo in masks}
    for path in unused:
        stem = stem_of(path, source.masks)
        starts = (stem[:end] for end in range(len(stem)) if stem[end] in SEPARATORS)
        if source.suffix is None and any(start in keys for start in starts):
            fault = 'seems to be another mask of a photo that has one'
            advice = "move it away, or say which ending counts, as in --suffix _mask, or --suffix '' for none"
            raise BadInput(f'{path}: {fault}; {advice}')
    if unused:
        print(f'left out: {len(unused)} masks that belong to no photo, such as {unused[0]}')
