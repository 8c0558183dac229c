"""Import photos with masks: class ids or colours of pixels, in lossless files of the photos' own size.

    source = MaskSource(Path('photos'), Path('masks'), classes, changes=['255=1'])
    import_masks(source, Path('input/mine'), overwrite=False)

A value of a mask is a whole number: an id, or COLOUR plus 0xRRGGBB.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from PIL import Image
from pycocotools import mask as rle_codec

from config import HOME
from data.importers import (
    ImportedSet,
    PhotoFacts,
    list_photos,
    name_photos,
    refuse_existing,
    refuse_overlap,
    write_set,
)
from data.labelled import TASKS
from data.mask_legend import COLOUR, Legend, grey, read_legend, show
from data.mask_pairs import LOSSY_SUFFIXES, MaskSource, lossy, pair, split_classes
from data.photos import FORMATS, Orientation, open_photo, orientation, turn
from metrics import IGNORED
from utils.competition import Task
from utils.errors import BadInput
from utils.progress import progress

MANY = 0.01  # share of ignored pixels above which a class without a pixel is a question
STRETCHED = {'L;2': 85, 'L;4': 17}  # factors by which Pillow widens ids of 2 and 4 bits to 0..255
LISTED, SHOWN = 6, 24  # values in a message, and with their classes
OTHER: dict[Orientation, Orientation] = {'displayed': 'stored', 'stored': 'displayed'}


@dataclass
class Values:
    """Count the values of masks: their pixels, and for each the first file; and the palettes' colours."""

    pixels: Counter[int] = field(default_factory=Counter)
    sets: Counter[frozenset[int]] = field(default_factory=Counter)  # the ids of each mask
    first: dict[int, Path] = field(default_factory=dict)
    palette: dict[int, tuple[int, Path]] = field(default_factory=dict)

    def share(self, *values: int) -> float:
        return sum(self.pixels[value] for value in values) / self.pixels.total()

    def sort(self, values: Iterable[int]) -> list[int]:
        """Sort values, the commonest first."""
        return sorted(values, key=lambda value: -self.pixels[value])

    def describe(self, values: Iterable[int] | None = None) -> str:
        """Return values, or all, with their shares of all pixels, the commonest first."""
        values = self.sort(self.pixels if values is None else values)
        parts = [f'{show(value)} {100 * self.share(value):.3g} %' for value in values[:LISTED]]
        more = f' and {len(values) - LISTED} more' if len(values) > LISTED else ''
        return ', '.join(parts) + more


@dataclass(frozen=True)
class MaskReader:
    """Read the masks of photos as class ids."""

    source: MaskSource
    masks: Mapping[Path, Path]  # by photo
    has_colours: bool
    known: np.ndarray  # the values of all masks, sorted
    ids: np.ndarray  # and the class id of each, uint8

    @classmethod
    def of(cls, source: MaskSource) -> 'MaskReader':
        """Find the masks and what their values mean. Raises BadInput."""
        masks, legend = pair(source), read_legend(source.changes, source.classes)
        values = count_values(masks.values(), legend)
        known, ids = np.array(sorted(choose_classes(source, legend, values).items())).T
        return cls(source, masks, legend.has_colours, known, ids.astype(np.uint8))

    def describe(self, classes: Sequence[str]) -> str:
        """Return the first values of the masks and the class of each."""
        names = [*classes, *['ignored'] * (IGNORED + 1 - len(classes))]
        parts = [f'{show(value)} {names[k]}' for value, k in zip(self.known.tolist(), self.ids, strict=True)]
        return ', '.join(parts[:SHOWN]) + (' ...' if parts[SHOWN:] else '')

    def read(self, photo: Path, facts: PhotoFacts) -> np.ndarray:
        """Read the (H, W) uint8 mask of a photo, as the photo is displayed. Raises BadInput."""
        path, orientation = self.masks[photo], self.source.orientation
        mask = read_values(path, self.has_colours, orientation == 'displayed')[0]
        check_size(path, mask.shape, facts, orientation)
        mask = self.ids[np.searchsorted(self.known, mask)]
        return turn(mask, facts.orientation) if orientation == 'stored' else mask


def import_masks(source: MaskSource, out: Path, overwrite: bool, task: Task = 'multiclass') -> None:
    """Import photos and their masks. Raises BadInput.

    The mask of a/b.jpg is masks/a/b.jpg.png, as `prepare.py masks` writes it, masks/a/b.png, or has one
    ending more that all masks have, as in masks/a/b_mask.png. If classes may overlap, each has a folder of
    masks, masks/<class>, in which it is 1.
    """
    refuse_existing(out, overwrite)
    refuse_overlap(out, filter(None, [source.photos, source.masks, source.test]))
    readers = [MaskReader.of(one) for one in (split_classes(source) if task == 'multilabel' else [source])]
    if task == 'multiclass':
        print(f'values of the masks: {readers[0].describe(source.classes)}')
    tests = list_photos(source.test) if source.test else []
    turned: list[Path] = []

    def annotate(path: Path, facts: PhotoFacts) -> list[dict[str, Any]]:
        annotations = []
        for n, reader in enumerate(readers):
            mask = reader.read(path, facts)
            drawn = [rle_annotation(int(k), mask == k) for k in np.unique(mask) if k]
            annotations += drawn if task == 'multiclass' else [one | {'category_id': n} for one in drawn]
        if facts.orientation != 1:
            turned.append(readers[0].masks[path])
        return annotations

    photos = list(readers[0].masks)
    names = name_photos(source.photos, photos, source.test, tests)
    splits = {'train_all.json': photos, 'test.json': tests}
    write_set(ImportedSet(source.classes, splits, names, annotate, TASKS[task]), out, overwrite)
    if turned:
        way = f'{source.orientation} (--orientation {OTHER[source.orientation]} for the other way)'
        count = f'{len(turned)}, such as {turned[0]}'
        print(f'masks of photos with an EXIF turn, taken as drawn on the photo as {way}: {count}')


def count_values(paths: Iterable[Path], legend: Legend) -> Values:
    """Count the values of all masks. Raises BadInput, also if two palettes give an index other colours."""
    values = Values()
    for path in progress(list(paths), 'masks', 'mask'):
        mask, palette = read_values(path, legend.has_colours)
        counts = count_pixels(mask)
        if not legend.has_colours:
            values.sets[frozenset(counts)] += 1
        values.pixels.update(counts)
        for value in counts:
            values.first.setdefault(value, path)
            if value in palette and value not in legend.classes:
                colour, first = values.palette.setdefault(value, (palette[value], path))
                if colour != palette[value]:
                    fault = f'index {value} is {show(palette[value])} here, and {show(colour)} in {first}'
                    raise BadInput(f'{path}: {fault}, so indices may be no ids; {offer_both(value, colour)}')
    return values


def offer_both(index: int, colour: int) -> str:
    """Say how to map palettes, by colours or by indices."""
    return f'map colours: --map {entry_of(colour)} ..., or indices: --map {entry_of(index)} ...'


def entry_of(value: int) -> str:
    """Return the entry of --map for a value, as it is typed into a shell."""
    return f"'{show(value)}'=NAME" if value >= COLOUR else f'{value}=NAME'


def count_pixels(mask: np.ndarray) -> dict[int, int]:
    """Return the number of pixels of each value of a mask."""
    if mask.max() >= 1 << 16:
        values, counts = np.unique(mask, return_counts=True)
    else:
        counts = np.bincount(mask.ravel())  # ten times as fast
        values = np.flatnonzero(counts)
        counts = counts[values]
    return dict(zip(values.tolist(), counts.tolist(), strict=True))


def read_values(path: Path, as_colours: bool, displayed: bool = True) -> tuple[np.ndarray, dict[int, int]]:
    """Read a mask as (H, W) int32 values, ids or colours, and the colours of its palette by index.

    Grey, three equal channels, and the indices of a palette are ids, unless `as_colours`. If `displayed`, an
    EXIF turn of the mask itself is applied. Raises BadInput.
    """
    if path.suffix.lower() in LOSSY_SUFFIXES:
        raise lossy(path)
    with open_photo(path, formats=(*FORMATS, 'GIF')) as image:
        if image.format in ('JPEG', 'MPO', 'WEBP'):
            raise lossy(path)
        if getattr(image, 'n_frames', 1) > 1:
            raise BadInput(f'{path}: found {image.n_frames} pages or frames, expected one')
        if image.format == 'TIFF' and image.tag_v2.get(262) == 0:
            raise BadInput(f'{path}: is a TIFF in which 0 is white; save it as PNG, with 0 as background')
        if image.format == 'GIF':  # its writers number the colours anew in each file
            image = image.convert('RGB')
        raw = raw_mode(image)  # before the pixels are decoded
        mask = turn(np.asarray(image), orientation(image) if displayed else 1)
        if image.mode == 'P':
            colours = pack(np.array(image.getpalette('RGB')).reshape(-1, 3))
            colours = np.pad(colours, (0, 256 - len(colours)), constant_values=COLOUR)
            palette = {index: int(colours[index]) for index in np.unique(mask).tolist()}
            return (colours[mask] if as_colours else mask).astype(np.int32), palette
        mask = plain_values(path, image.mode, raw, mask)
        if as_colours and image.mode == '1':
            mask *= 255
        elif not as_colours:
            mask //= STRETCHED.get(raw, 1)
    if mask.ndim == 2:
        return (grey(mask) if as_colours else mask), {}
    if not as_colours and (mask == mask[..., :1]).all():
        return mask[..., 0], {}
    return pack(mask), {}


def raw_mode(image: Image.Image) -> str:
    """Return how the pixels are stored, such as 'L;4', before Pillow widens them to bytes."""
    tile = getattr(image, 'tile', None)
    arguments = tile[0].args if tile else ''
    return arguments if isinstance(arguments, str) else str(arguments[0])


def plain_values(path: Path, mode: str, raw: str, mask: np.ndarray) -> np.ndarray:
    """Return a decoded mask as (H, W) ids or (H, W, 3) colours, int32. Raises BadInput."""
    deep = mode in ('I', 'I;16', 'I;16B', 'I;16L', 'I;16N')
    if mode not in ('1', 'L', 'LA', 'RGB', 'RGBA') and not deep:
        raise BadInput(f'{path}: found mode {mode}, expected ids in one channel, a palette, or RGB colours')
    if deep and (mask.min() < 0 or mask.max() >= 1 << 16):
        raise BadInput(f'{path}: found values of {mask.min()} to {mask.max()}, expected ids from 0 on')
    if ';16' in raw and not deep:
        raise BadInput(f'{path}: found {mode} of 16 bits, expected 8 bits a channel, or 16 in one channel')
    if mode in ('LA', 'RGBA'):
        if (mask[..., -1] != 255).any():
            fault = f'found transparent pixels ({(mask[..., -1] != 255).mean():.1%})'
            advice = 'save it on a background, without alpha'
            raise BadInput(f'{path}: {fault}, expected an opaque mask; {advice}')
        mask = mask[..., 0] if mode == 'LA' else mask[..., :3]
    return mask.astype(np.int32)


def pack(colours: np.ndarray) -> np.ndarray:
    """Return (..., 3) colours as values."""
    red, green, blue = (colours[..., k].astype(np.int32) for k in range(3))
    return COLOUR + (red << 16) + (green << 8) + blue


def choose_classes(source: MaskSource, legend: Legend, values: Values) -> dict[int, int]:
    """Return the class id of each value. Raises BadInput for values without one, and for doubtful sets."""
    num_classes = len(source.classes)
    refuse_absent_values(legend, values)
    if not legend.has_colours:
        refuse_colours(values)
    refuse_doubtful_palette(source, legend, values)
    defaults = {k: k for k in (*range(1 if legend.has_table else num_classes), IGNORED)}
    if legend.has_colours:
        defaults = {COLOUR: 0}
    defaults = {value: k for value, k in defaults.items() if value not in legend.unused}
    lookup = defaults | legend.classes
    unknown = [value for value in values.pixels if value not in lookup]
    if unknown:
        raise unknown_values(source, legend, values, unknown)
    lookup = {value: lookup[value] for value in values.pixels}
    absent = sorted(set(range(num_classes)) - set(lookup.values()))
    objects = [k for k in absent if k]  # the background may be absent
    if IGNORED in values.pixels and IGNORED not in legend.classes and not legend.has_colours:
        refuse_ignored(source, values, objects)
    refuse_instances(source, legend, values)
    if len(objects) == num_classes - 1:
        raise BadInput(f'{source.masks}: no mask has a pixel of a class; they have {values.describe()}')
    if absent:
        print(f'no mask has a pixel of: {", ".join(source.classes[k] for k in absent)}')
    return lookup


def refuse_colours(values: Values) -> None:
    """Raise BadInput for masks coded by colour, with what to map."""
    coded = [value for value in values.pixels if value >= COLOUR]
    if coded:
        offer = ' '.join([entry_of(value) for value in values.sort(coded) if value != COLOUR][:3])
        fault = f'is coded by colour: the masks have {values.describe()}'
        advice = f'name the class of each: --map {offer}, or --map FILE of name,r,g,b'
        raise BadInput(f'{values.first[coded[0]]}: {fault}; {advice}')


def refuse_ignored(source: MaskSource, values: Values, absent: list[int]) -> None:
    """Raise BadInput if 255 may be a class, by the classes that no mask has, or by its place.

    A border that is ignored is in one mask with its object.
    """
    last, share = len(source.classes) - 1, values.share(IGNORED)
    if absent and (share > MANY or len(absent) == last):
        first = absent[0]
        more = f' (and {len(absent) - 1} more)' if len(absent) > 1 else ''
        fault = f'no mask has the id {first}, {source.classes[first]}{more}'
        offer = f'give --map 255={first} if they are, or --map 255=ignore if it is meant to be ignored'
        question = f'are these masks of 0 and 255? {offer}'
        if 1 < first == last and share > values.share(0):
            offer = 'give --map 255=0 0=1 1=2 ... if so, or --map 255=ignore if it is to be ignored'
            question = f'is 255 the background, and 0 the class {source.classes[1]}? {offer}'
        covers = f'but 255 covers {share:.1%}, which is ignored'
        raise BadInput(f'{source.masks}: {fault}, {covers}: {question}{home_hint(source)}')
    has_object = [bool(ids - {0, IGNORED}) for ids in values.sets if IGNORED in ids]
    if share > MANY and not any(has_object):
        alone = sum(count for ids, count in values.sets.items() if IGNORED in ids)
        counts = f'{alone} of {values.sets.total()} masks have 255 and no id of a class'
        offer = 'give --map 255=1 if they are, or --map 255=ignore if it is meant to be ignored'
        question = f'{values.first[IGNORED].name} the first: are these masks of 0 and 255? {offer}'
        raise BadInput(f'{source.masks}: {counts}, {question}')


def numbers_objects(values: Values) -> bool:
    """Return True if the ids of nearly every mask are 1 to n, as where they count objects."""
    objects = [ids - {0} for ids in values.sets.elements() if ids - {0}]
    counts = [len(ids) for ids in objects if len(ids) == max(ids)]
    return len(counts) >= 0.9 * len(objects) and (len(set(counts)) > 2 or max(counts, default=0) > 2 * LISTED)


def refuse_instances(source: MaskSource, legend: Legend, values: Values) -> None:
    """Raise BadInput if ids seem to count objects: 1 to n in each mask, nearly all of one piece each."""
    if legend.classes or legend.has_colours or not numbers_objects(values):
        return
    pieces = []
    for path in dict.fromkeys(path for value, path in values.first.items() if value):
        mask = read_values(path, as_colours=False)[0]
        ids = np.unique(mask[mask > 0])
        pieces += [cv2.connectedComponents((mask == k).astype(np.uint8))[0] - 1 for k in ids]
    if np.mean(np.array(pieces) == 1) < 0.9:
        return
    offer = f'{one_class(source, values.pixels)}; if they are classes, say so: --map 1=1 ...'
    fault = 'the ids of each mask are 1 to n, of one piece each, as of objects'
    raise BadInput(f'{source.masks}: {fault}; {offer}')


def one_class(source: MaskSource, ids: Iterable[int]) -> str:
    """Say how to make one class of the ids of objects."""
    return f'--map 1-{max(ids)}={source.classes[1]} makes them one class'


def home_hint(source: MaskSource) -> str:
    """Return what to say if the classes may be the home competition's because none were given."""
    hint = '; the classes are those of the home competition, --classes NAME ... gives others'
    return hint if source.classes == HOME.classes else ''


def refuse_absent_values(legend: Legend, values: Values) -> None:
    """Raise BadInput for an entry of the command line whose value no mask has."""
    for text, mapped in legend.entries.items():
        if values.pixels.keys().isdisjoint(mapped):
            span = show(mapped[0]) + (f' to {show(mapped[-1])}' if len(mapped) > 1 else '')
            raise BadInput(f'--map {text}: no mask has {span}; they have {values.describe()}')


def refuse_doubtful_palette(source: MaskSource, legend: Legend, values: Values) -> None:
    """Raise BadInput for palettes whose indices may be no ids, unless ids are mapped.

    Such have another index than 0 for black, or other greys than the indices that could be ids, too.
    """
    colours = {index: colour for index, (colour, _) in values.palette.items() if index != IGNORED}
    if legend.classes or not colours:
        return
    levels = {index: (colour - COLOUR) & 255 for index, colour in colours.items()}
    are_grey = all(colours[index] == COLOUR + 0x010101 * level for index, level in levels.items())
    moved = [index for index, level in levels.items() if index != level]
    black = [index for index, colour in colours.items() if index and colour == COLOUR]
    if black and colours.get(0, COLOUR) != COLOUR:
        doubtful, question = black[0], f'index 0 is {show(colours[0])}, and black is index {black[0]}'
    elif are_grey and moved and max(levels.values()) < len(source.classes):
        doubtful = moved[0]
        question = f'index {doubtful} is the grey {levels[doubtful]}, and both may be the id'
    else:
        return
    offer = offer_both(doubtful, colours[doubtful])
    raise BadInput(f'{values.palette[doubtful][1]}: {question}; {offer}')


def unknown_values(source: MaskSource, legend: Legend, values: Values, unknown: list[int]) -> BadInput:
    """Return the error for values of masks that are no class."""
    common = values.sort(unknown)
    share = values.share(*unknown)
    word, expected = 'id', f'0 to {len(source.classes) - 1}, or 255, which is ignored'
    if legend.has_colours:
        word, expected = 'colour', 'those of --map'
    name = f' ({legend.unused[common[0]]})' if common[0] in legend.unused else ''
    fault = f'found the {word} {show(common[0])}{name}, expected {expected}'
    listed = f'unknown {word}s cover {100 * share:.3g} % of the masks: {values.describe(unknown)}'
    if not legend.classes and values.sets and numbers_objects(values):
        advice = f'do they count objects? {one_class(source, unknown)}'
    elif len(unknown) > 2 * LISTED and share < 0.1:
        advice = 'are the edges soft? export the masks without anti-aliasing, and resize them with nearest'
    else:
        doubtful = not legend.has_colours and IGNORED in values.pixels and IGNORED not in legend.classes
        entries = ' '.join(map(entry_of, [*common[:3], *([IGNORED] if doubtful else [])]))
        verb = 'add' if legend.unused else 'give'
        advice = f'{verb} --map {entries}, where NAME is a class, an id, background or ignore'
    return BadInput(f'{values.first[common[0]]}: {fault}; {listed}; {advice}{home_hint(source)}')


def check_size(path: Path, shape: tuple[int, ...], facts: PhotoFacts, orientation: Orientation) -> None:
    """Raise BadInput if a mask is not of its photo's size."""
    sizes = {'displayed': facts.displayed, 'stored': facts.stored}
    expected, other = sizes[orientation], OTHER[orientation]
    if shape == expected:
        return
    fault = f'found {shape[0]}x{shape[1]} pixels, its photo has {expected[0]}x{expected[1]}'
    if shape == sizes[other]:
        fault += f' as {orientation}, but that size as {other}, by its EXIF turn; give --orientation {other}'
    elif shape == expected[::-1]:
        fault += ': its height and width are swapped; save the mask turned'
    raise BadInput(f'{path}: {fault}')


def rle_annotation(k: int, drawn: np.ndarray) -> dict[str, Any]:
    """Make an annotation of the (H, W) bool pixels of a class; IGNORED is a crowd of the background."""
    rle = rle_codec.encode(np.asfortranarray(drawn, np.uint8))
    return {
        'category_id': 0 if k == IGNORED else k,
        'iscrowd': int(k == IGNORED),
        'segmentation': {'size': list(drawn.shape), 'counts': rle['counts'].decode()},
        'area': int(drawn.sum()),
        'bbox': rle_codec.toBbox(rle).tolist(),
    }
