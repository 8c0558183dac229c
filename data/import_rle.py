"""Import photos whose masks are run lengths in a CSV, as train.csv of many competitions: a row an image and
class, a row an image, or a row an object.

    import_rle(Source(Path('train_images'), Path('input/mine')), RunCsv(Path('train.csv')))

A CSV does not tell in which order pixels are counted; the usual one is taken, down the columns from 1, and
what leaves a photo is refused. Masks that have been taken in a wrong order look like stripes.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from pycocotools import mask as rle_codec

from config import match_key
from data.importers import Size, read_facts
from data.labelled import (
    LabelledPhoto,
    Shape,
    Source,
    as_text,
    given_names,
    given_task,
    import_shapes,
    measure_overlaps,
)
from data.photos import NotIdentified, open_photo, orientation
from submission import name_images
from utils.competition import Order, Role
from utils.csv_rows import decode_image_id, id_key, open_csv
from utils.errors import BadInput, join_first, plural
from utils.foreign_csv import RUN_LENGTHS, Layout, read_lines, split_row
from utils.json_files import whole_number
from utils.progress import progress
from utils.run_csv import EMPTY
from utils.run_lengths import count_runs, decode_runs, encode_runs, parse_runs
from utils.sample_csv import MAX_LINE, Sample, may_be_runs, read_sample

CLASS_COLUMN = re.compile(r'(class|label|category)([ _-]?(id|name|label))?', re.IGNORECASE)
MASK_COLUMN = re.compile(r'segmentation|annotation|masks?|pixels|predictionstring', re.IGNORECASE)
OBJECT = 'object'  # the class of a CSV without classes


@dataclass(frozen=True)
class RunCsv:
    """Hold a CSV of run lengths, and what the command line says of it."""

    path: Path
    columns: Mapping[Role, str] = field(default_factory=dict)  # names in the header; those left out are found
    order: Order = 'column'
    first: int = 1


@dataclass(frozen=True)
class Columns:
    """Hold the place of each role in a CSV, and the photos by their names there: paths, names or stems."""

    places: Mapping[Role, int]
    kind: str
    photos: Mapping[str, Path]


def import_rle(source: Source, csv: RunCsv) -> None:
    """Import photos and the masks of a CSV. Raises BadInput, also if classes overlap and no task is given."""
    source.check()
    sample = read_sample(csv.path)
    columns = find_columns(csv, sample, source)
    if 'class' not in columns.places and 'image_class' not in columns.places:
        print(f'{csv.path}: no column of classes: all objects are of one (--columns class=NAME gives one)')
    labelled = read_photos(csv, columns, sample, source)
    labels = dict.fromkeys(shape.label for photo in labelled for shape in photo.shapes)
    if not labels:
        raise BadInput(f'{csv.path}: has no mask with a pixel; are these the labels?')
    names = name_labels(csv.path, [*labels], given_names(source))
    labelled = [rename(photo, names) for photo in labelled]
    task = given_task(source.out, source.task)
    if task is None:
        refuse_overlaps(csv.path, labelled)
    how = describe(csv, sample, columns)
    if [*names] != [*names.values()] and OBJECT not in names:  # numbers that stand for names
        base = min(1, *map(int, names))
        if task == 'multilabel' or base == 1:
            how['class_names'] = 'id' if base == (task != 'multilabel') else 'number'
    import_shapes(source, labelled, facts={'submission': how})
    how = 'down the columns' if csv.order == 'column' else 'along the rows'
    print(f'pixels were counted {how} from {csv.first}: look at the masks, which are stripes if it is wrong')


def find_columns(csv: RunCsv, sample: Sample, source: Source) -> Columns:
    """Find the columns of a CSV by --columns, the names of photos, and the header. Raises BadInput."""
    places: dict[Role, int] = {}
    for role, name in csv.columns.items():
        if sample.columns.count(name) != 1:
            fault = f'found the columns {join_first([*sample.columns], 20)}'
            raise BadInput(f'{csv.path}: {fault}, expected one {name!r}, as --columns says')
        places[role] = sample.columns.index(name)
    place, kind, photos, joined = find_photos(sample, source, places)
    places['image_class' if joined else 'image'] = place
    rest = [n for n in range(len(sample.columns)) if n not in places.values()]
    if not joined and 'class' not in places:
        named = [n for n in rest if CLASS_COLUMN.fullmatch(sample.columns[n])]
        if len(named) == 1:
            places['class'] = named[0]
            rest.remove(named[0])
    if 'mask' not in places:
        masks = [n for n in rest if all(map(may_be_runs, sample.values(n)))]
        named = [n for n in masks if is_mask_column(sample.columns[n])]
        found = named if named else masks
        if len(found) != 1:
            listed = join_first([sample.columns[n] for n in found or rest], 20)
            fault = f'{listed} may each be run lengths' if found else f'none of {listed} has run lengths'
            raise BadInput(f'{csv.path}: {fault}; say which: --columns mask=NAME')
        places['mask'] = found[0]
    return Columns(places, kind, photos)


def is_mask_column(name: str) -> bool:
    """Return True if a column is called as those of run lengths usually are."""
    return bool(MASK_COLUMN.fullmatch(name) or RUN_LENGTHS.search(name.encode()))


def find_photos(
    sample: Sample, source: Source, places: Mapping[Role, int]
) -> tuple[int, str, dict[str, Path], bool]:
    """Return the column with the most names of photos, the kind of these names, the photos by name, and
    whether a class is joined to them. Raises BadInput.
    """
    given = places.get('image', places.get('image_class'))
    candidates = range(len(sample.columns)) if given is None else [given]
    photos = {path.relative_to(source.photos).as_posix(): path for path in source.list_photos()}
    best: tuple[int, int, str, dict[str, Path], bool] | None = None
    for kind in ('path', 'name', 'stem'):
        try:
            names = name_images(photos, kind)
        except BadInput:  # two photos have the same name in different folders
            continue
        by_name = {id_key(name): photos[photo] for photo, name in names.items()}
        for place in candidates:
            values = sample.values(place)
            alone = sum(id_key(value) in by_name for value in values)
            joined = sum(split_class(value, by_name) is not None for value in values)
            count = max(alone, joined)
            if count and (best is None or count > best[0]):
                best = count, place, kind, by_name, joined > alone
    if best is None:
        example = next(iter(photos))
        fault = (
            f'no column holds photos below {source.photos}, such as {example!r}, with its ending or without'
        )
        raise BadInput(f'{sample.path}: line 2: {",".join(sample.rows[0])[:80]!r}: {fault}')
    return best[1:]


def split_class(text: str, photos: Mapping[str, Path]) -> tuple[Path, str] | None:
    """Split IMAGE_CLASS into the photo and the class; None if no part in front of a _ is a photo."""
    parts = id_key(text).split('_')
    for place in range(len(parts) - 1, 0, -1):
        if path := photos.get('_'.join(parts[:place])):
            return path, '_'.join(parts[place:])
    return None


def read_photos(csv: RunCsv, columns: Columns, sample: Sample, source: Source) -> list[LabelledPhoto]:
    """Read the masks of all rows by photo. Raises BadInput."""
    shapes: dict[Path, list[Shape]] = {}
    sizes: dict[Path, Size] = {}
    first: dict[Path, str] = {}
    for where, fields in progress(read_fields(sample), 'masks', 'row'):
        path, label = find_owner(fields, columns, where, source)
        if path not in sizes:
            sizes[path], first[path] = read_size(path), where
        text = fields[columns.places['mask']].strip()
        shapes.setdefault(path, [])
        if text not in EMPTY:
            rle = encode_text(text, sizes[path], csv, f'{where}: photo {path.name!r}')
            shapes[path].append(Shape(label, where, rle))
    return [LabelledPhoto(path, first[path], shapes[path], sizes[path]) for path in shapes]


def read_fields(sample: Sample) -> Iterator[tuple[str, list[bytes]]]:
    """Yield the place and the fields of each row of a CSV. Raises BadInput."""
    path, width = sample.path, len(sample.columns)
    layout = Layout(sample.delimiter, width, tuple(range(width)))
    with open_csv(path) as file:
        for n, (number, _, line) in enumerate(read_lines(file, path, MAX_LINE)):
            if n:
                where = f'{path}: line {number}'
                yield where, split_row(line, layout, where)


def find_owner(fields: Sequence[bytes], columns: Columns, where: str, source: Source) -> tuple[Path, str]:
    """Return the photo and the class of a row. Raises BadInput."""
    if 'image_class' in columns.places:
        text = decode_image_id(fields[columns.places['image_class']], where)
        owner = split_class(text, columns.photos)
        if owner is not None:
            return owner
    else:
        text = decode_image_id(fields[columns.places['image']], where)
        path = columns.photos.get(id_key(text))
        if path is not None:
            place = columns.places.get('class')
            label = OBJECT if place is None else fields[place].decode('utf-8', 'replace').strip()
            number = whole_number(label)
            return path, label if number is None else str(number)
    raise BadInput(f'{where}: {text[:80]!r} is no photo below {source.photos}, as the others are')


def read_size(path: Path) -> Size:
    """Read the (H, W) of a photo as it is displayed. Raises BadInput."""
    try:
        with open_photo(path) as image:
            width, height = image.size
            return (width, height) if orientation(image) > 4 else (height, width)
    except NotIdentified:  # a kind of TIFF that has to be decoded
        return read_facts(path).displayed


def encode_text(text: bytes, size: Size, csv: RunCsv, where: str) -> dict[str, Any]:
    """Encode the text of a mask as COCO's compressed RLE. Raises BadInput."""
    try:
        runs = parse_runs(text, size, csv.first, where)
    except BadInput as fault:
        other = f'--first {1 - csv.first} counts from {1 - csv.first}'
        raise BadInput(f'{fault}; {other}, --order says whether along rows or down columns') from None
    if csv.order == 'row':
        runs = encode_runs(decode_runs(runs, size, 'row'), 'column')
    counts = {'size': [*size], 'counts': count_runs(runs, size[0] * size[1])}
    return as_text(rle_codec.frPyObjects(counts, *size))


def name_labels(path: Path, labels: Sequence[str], classes: Sequence[str]) -> dict[str, str]:
    """Return the class of each label: itself, or that of a number, from 1 or, if there is a 0, from 0.

    Raises BadInput for a number beyond the classes.
    """
    keys = {match_key(name) for name in classes}
    if len(classes) == 1 and [*labels] == [OBJECT]:
        return {OBJECT: classes[0]}
    numbers = [whole_number(label) for label in labels]
    if not classes or None in numbers or all(match_key(label) in keys for label in labels):
        return dict(zip(labels, labels, strict=True))
    base = min(1, *numbers)
    most = len(classes) - 1 + base
    if min(numbers) < 0 or max(numbers) > most:
        fault = f'found classes {min(numbers)} to {max(numbers)}, expected {base} to {most}'
        raise BadInput(f'{path}: {fault}, of {len(classes)} classes: {join_first(classes, 20)}')
    print(f'classes {base} to {most} are {", ".join(classes)}')
    return {label: classes[number - base] for label, number in zip(labels, numbers, strict=True)}


def rename(photo: LabelledPhoto, names: Mapping[str, str]) -> LabelledPhoto:
    """Return a photo whose labels are the names of classes."""
    return replace(photo, shapes=[replace(shape, label=names[shape.label]) for shape in photo.shapes])


def refuse_overlaps(path: Path, labelled: Sequence[LabelledPhoto]) -> None:
    """Raise BadInput if the masks of two classes overlap in any photo."""
    for photo in progress(labelled, 'overlaps', 'photo'):
        if len({shape.label for shape in photo.shapes}) > 1:
            shared = {label: several for label, (_, several) in measure_overlaps(photo).items() if several}
            if shared:
                names, pixels = ' and '.join([*shared][:2]), max(shared.values())
                fault = f'photo {photo.path.name!r}: {names} share {plural(pixels, "pixel")}'
                ways = '--task multilabel keeps both, with --task multiclass the smaller object is on top'
                raise BadInput(f'{path}: {fault}; expected one class a pixel: {ways}')


def describe(csv: RunCsv, sample: Sample, columns: Columns) -> dict[str, Any]:
    """Return the key `submission` of competition.yaml, as far as a CSV of training masks tells it.

    Its columns are those of this CSV if there is nothing else in it, and a row for each image and class.
    """
    how: dict[str, Any] = {'image_names': columns.kind, 'order': csv.order, 'first': csv.first}
    roles = {place: role for role, place in columns.places.items()}
    values = Counter(tuple(row[n] for n, role in roles.items() if role != 'mask') for row in sample.rows)
    if len(roles) == len(sample.columns) and max(values.values()) == 1:
        how['columns'] = {name: roles[n] for n, name in enumerate(sample.columns)}
    elif columns.places.keys() == {'image', 'mask'}:
        how['columns'] = {sample.columns[columns.places[role]]: role for role in ('image', 'mask')}
    if {text for text in sample.values(columns.places['mask']) if ' ' not in text} == {'-1'}:
        how['empty'] = '-1'
    return how
