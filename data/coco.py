"""Read COCO files, check them record by record, and draw the masks of their photos.

Tools differ in what they write: ids may be numbers or text, categories have ids of any kind and are matched
by name, and only what is read here needs to be there. What has no mask is left out and counted.

Shapes: H W a photo's own height and width. Class ids in a mask: 0 background, an object's category_id, and
IGNORED (255) for crowd regions.
"""

import difflib
import hashlib
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import cv2
import numpy as np

from config import Competition, is_plain, match_key
from data.bands import read_bands
from data.layout import annotation_files
from data.masks import Annotation, LeftOut, decode, encode_segmentation
from data.paths import find_photo, index_files, inside, nearest_file
from data.photos import MAX_PIXELS, MAX_SIDE
from data.records import Id, Photo, PhotoIndex, PhotoTuple
from metrics import IGNORED
from submission import MaskFormat, downsample_mask, mask_format
from utils.cli import python_command
from utils.errors import BadInput, join_first, plural
from utils.files import exists, normal_name
from utils.json_files import identify, load_json, read_bytes, read_parts, require, whole_number

FLAGS = {0: False, 1: True, '0': False, '1': True, 'false': False, 'true': True, '': False}
SHOWN = 40  # class names in an error
# keys of a competition that change neither photos nor masks
NOT_OF_PIXELS = {'group', 'metric', 'score_size', 'score_background', 'empty_score', 'submission'}


@dataclass(frozen=True)
class CocoSet:
    """Hold the photos of one split; the fingerprint is a SHA-256 of annotations and conventions."""

    root: Path
    split: str
    files: tuple[Path, ...]
    photos: PhotoTuple | PhotoIndex  # any sequence of photos becomes a PhotoTuple
    fingerprint: str
    competition: Competition
    left_out: LeftOut = field(default_factory=LeftOut)  # objects, and parts of them
    unlabelled: tuple[int, ...] = ()  # classes whose absence is not known where no object is labelled

    def __post_init__(self) -> None:
        if not isinstance(self.photos, PhotoTuple | PhotoIndex):
            object.__setattr__(self, 'photos', PhotoTuple(self.photos))

    def path(self, photo: Photo) -> Path:
        """Return where a photo is, whatever the Unicode form and the slashes of its name."""
        return find_photo(self.root, photo.file_name)

    @cached_property
    def has_annotators(self) -> bool:
        """Whether several annotators drew a mask of a photo each."""
        return max(self.photos.annotator_counts(), default=0) > 1

    @cached_property
    def form(self) -> MaskFormat:
        """The format of CSVs with masks of these photos."""
        sizes = dict(zip(self.photos.names(), self.photos.sizes(), strict=True))
        return mask_format(self.competition, sizes)

    @cached_property
    def files_on_disk(self) -> dict[str, list[str]]:
        """The files below the root, to say which one a wrong name may mean."""
        return index_files(self.root)


def read_coco(root: str | Path, split: str, competition: Competition) -> CocoSet:
    """Read the photos and annotations of a split ('train' or 'test') from a data root. Raises BadInput.

    Train is train_all.json, or train.json and val.json together with new image ids.
    """
    root = Path(root)
    files = annotation_files(root, split)
    digest, left_out = hashlib.sha256(), LeftOut()
    photos: dict[str, Photo] = {}  # by normal_name
    origins: dict[str, Path] = {}
    resolved: dict[Path, Path] = {}
    for path in files:
        content = read_bytes(path)
        digest.update(len(content).to_bytes(8, 'little'))
        digest.update(content)
        first_id = len(photos) if len(files) > 1 else None
        for photo in _read_file(path, content, competition, left_out, first_id):
            name = normal_name(photo.file_name)
            if name in photos:
                spelling = '' if photos[name].file_name == photo.file_name else ', in another spelling'
                origin = '' if origins[name] == path else f', first in {origins[name]}'
                fault = f'image {photo.file_name!r} is listed twice{spelling}{origin}'
                raise BadInput(f'{path}: {fault}; give its annotations one image_id, and remove one')
            refuse_outside(root, path, photo.file_name, resolved)
            photos[name], origins[name] = photo, path
    if not photos:
        raise BadInput(f'{files[0]}: no images')
    digest.update(pixel_conventions(competition))
    return CocoSet(root, split, files, tuple(photos.values()), digest.hexdigest(), competition, left_out)


def fingerprint_of(files: Iterable[Path], competition: Competition) -> str:
    """Return the fingerprint of the set that read_coco reads from these files. Raises BadInput."""
    digest = hashlib.sha256()
    for path in files:
        digest.update(path.stat().st_size.to_bytes(8, 'little'))
        for content in read_parts(path):
            digest.update(content)
    digest.update(pixel_conventions(competition))
    return digest.hexdigest()


def refuse_outside(root: Path, path: Path, file_name: str, resolved: dict[Path, Path]) -> None:
    """Raise BadInput for a file_name in a JSON file that leads out of the data root; `resolved` as inside."""
    if not inside(root, file_name, resolved):
        hint = _link_hint(file_name) or _hint(index_files(root), file_name)
        raise BadInput(f'{path}: image {file_name!r} leads out of {root}{hint}')


def read_labels(path: str | Path, competition: Competition) -> CocoSet:
    """Read one COCO file of any name, such as hidden labels; its folder is the root. Raises BadInput."""
    path, left_out = Path(path), LeftOut()
    content = read_bytes(path)
    photos = tuple(_read_file(path, content, competition, left_out))
    if not photos:
        raise BadInput(f'{path}: no images')
    if len({normal_name(photo.file_name) for photo in photos}) < len(photos):
        raise BadInput(f'{path}: two images have the same file_name')
    digest = hashlib.sha256(content + pixel_conventions(competition)).hexdigest()
    return CocoSet(path.parent, 'labels', (path,), photos, digest, competition, left_out)


def pixel_conventions(competition: Competition) -> bytes:
    """Return what a competition says of pixels: nothing if it is the home competition."""
    return (
        competition.model_dump_json(exclude_defaults=True, exclude=NOT_OF_PIXELS).removeprefix('{}').encode()
    )


def sizes_of(photos: Iterable[Photo]) -> dict[str, tuple[int, int]]:
    """Return the (H, W) of photos by their file names."""
    return {photo.file_name: photo.size for photo in photos}


def draw_mask(photo: Photo) -> np.ndarray:
    """Draw the (H, W) uint8 mask of a photo: the most pixels first, ties in the order of the file; of several
    annotators the majority of their masks.
    """
    if len(photo.annotators) > 1:
        return majority([draw_mask(one) for one in photo.by_annotator()])
    mask = np.zeros((photo.width, photo.height), np.uint8)  # transposed: RLE runs down the columns
    for annotation in sorted(photo.annotations, key=lambda a: -a.pixels):
        drawn = decode(annotation.rle, (photo.height, photo.width))
        np.copyto(mask, IGNORED if annotation.iscrowd else annotation.category_id, where=drawn)
    return cv2.transpose(mask)


def draw_plane(photo: Photo, class_id: int) -> np.ndarray:
    """Draw the (H, W) uint8 plane of a class that may overlap others; IGNORED where only a crowd is. Of
    several annotators it is the majority of their planes.
    """
    if len(photo.annotators) > 1:
        return majority([draw_plane(one, class_id) for one in photo.by_annotator()])
    plane = np.zeros((photo.width, photo.height), np.uint8)  # transposed, as in draw_mask
    annotations = [a for a in photo.annotations if a.category_id == class_id]
    for annotation in sorted(annotations, key=lambda a: not a.iscrowd):  # objects over crowds
        drawn = decode(annotation.rle, photo.size)
        np.copyto(plane, IGNORED if annotation.iscrowd else 1, where=drawn)
    return cv2.transpose(plane)


def majority(masks: Sequence[np.ndarray]) -> np.ndarray:
    """Return what most of the annotators' masks have at each pixel; ties go to the first annotator among
    them. One who has IGNORED there does not vote.
    """
    stack = np.stack(masks)
    votes = [np.where(mask == IGNORED, 0, (stack == mask).sum(axis=0)) for mask in masks]
    return np.take_along_axis(stack, np.argmax(votes, axis=0)[None], axis=0)[0]


def draw_planes(photo: Photo, num_classes: int) -> np.ndarray:
    """Draw the (K, H, W) uint8 planes of a photo whose classes may overlap."""
    planes = np.zeros((num_classes, photo.height, photo.width), np.uint8)
    for class_id in {annotation.category_id for annotation in photo.annotations}:
        planes[class_id] = draw_plane(photo, class_id)
    return planes


def draw_truth(photo: Photo, competition: Competition) -> np.ndarray:
    """Draw a photo's truth at its own size: (H, W) ids, or (K, H, W) planes if classes may overlap."""
    return draw_planes(photo, len(competition.classes)) if competition.is_multilabel else draw_mask(photo)


def scored_truth(photo: Photo, competition: Competition) -> np.ndarray:
    """Draw a photo's truth at the size that is scored: (h, w) ids, or (K, h, w) planes."""
    return scale_truth(draw_truth(photo, competition), competition)


def scale_truth(truth: np.ndarray, competition: Competition) -> np.ndarray:
    """Bring a photo's truth from its own size to that which is scored: (h, w) ids, or (K, h, w) planes."""
    if competition.score_size == 'own':
        return truth
    if truth.ndim == 2:
        return downsample_mask(truth, competition.score_size)
    return np.stack([downsample_mask(plane, competition.score_size) for plane in truth])


def read_photo(coco: CocoSet, photo: Photo) -> np.ndarray:
    """Read a photo as (H, W, channels) uint8, or uint16 if the data set's depth is 16; raise BadInput if its
    size is not that of its record.

    A cut-off test photo is read as far as it decodes, since a CSV needs all of them.
    """
    path, lenient = require_photo(coco, photo), coco.split == 'test'
    return read_bands(path, coco.competition, photo.size, lenient, coco.root)


def require_photo(coco: CocoSet, photo: Photo) -> Path:
    """Return where a photo is; raise BadInput, with what its name may mean, if it is not there."""
    path = coco.path(photo)
    if not exists(path):
        raise BadInput(f'{path}: no such image{_hint(coco.files_on_disk, photo.file_name)}')
    return path


def _hint(index: dict[str, list[str]], file_name: str) -> str:
    """Say which file a name that is not on disk may mean."""
    file = nearest_file(index, file_name)
    if file is None or file == file_name:  # it vanished after the index was made
        return ''
    return f'; {file} is there: rename it, or change file_name {file_name!r} in the JSON file to that'


def _link_hint(file_name: str) -> str:
    """Say how photos may be linked, for a name that leads out of the root only by a link in it."""
    path = PurePosixPath(file_name.replace('\\', '/'))
    by_name = path.is_absolute() or '..' in path.parts or PureWindowsPath(file_name).drive
    return '' if by_name else ' by a link; link the data root as a whole, or copy the photos'


def _read_file(
    path: Path, content: bytes, competition: Competition, left_out: LeftOut, first_id: int | None = None
) -> list[Photo]:
    """Read the photos of one file; number them from `first_id`, or keep their ids if it is None."""
    data = load_json(path, content)
    is_test = path.name == 'test.json'
    if data.get('annotations') is None and (is_test or 'annotations' in data):
        data['annotations'] = []
    images, listed = (require(f'{path}: the file', data, key, list) for key in ('images', 'annotations'))
    records = _read_images(path, images, need_ids=bool(listed))
    class_ids = _match_categories(path, data, listed, competition)
    lost = LeftOut()
    annotations = _read_annotations(path, listed, records, class_ids, competition, lost)
    if listed and not is_test and not any(annotations.values()):
        reasons = ', '.join(f'{count:,} {reason}' for reason, count in lost.items())
        fault = f'{plural(len(listed), "annotation")} and no mask: {reasons}'
        raise BadInput(f'{path}: {fault}; expected polygons or RLE, in pixels; export masks, not boxes')
    for reason, count in lost.items():
        left_out.note(reason, lost.examples[reason], count)
    keeps_ids = first_id is None and all(isinstance(image_id, int) for image_id in records)
    photos = []
    for position, (image_id, (name, height, width)) in enumerate(records.items()):
        number = image_id if keeps_ids else (first_id or 0) + position
        drawn = tuple(annotations[image_id])
        annotators = ()
        if competition.labels == 'soft':
            annotators = _find_annotators(f'{path}: images[{position}]', images[position], drawn)
        photos.append(Photo(number, name, height, width, drawn, competition.object_ids.start, annotators))
    return photos


def _read_images(path: Path, images: list[Any], need_ids: bool) -> dict[Id, tuple[str, int, int]]:
    """Check the image records; return file_name, height and width by id."""
    records: dict[Id, tuple[str, int, int]] = {}
    for position, record in enumerate(images):
        where = f'{path}: images[{position}]'
        image_id = _read_id(where, record, 'id') if need_ids or 'id' in record else position
        if image_id in records:
            raise BadInput(f'{where}: id {image_id!r:.60} appears twice; remove one of the two images')
        name = _read_name(where, record)
        height, width = _read_side(where, record, 'height'), _read_side(where, record, 'width')
        if height * width > MAX_PIXELS:
            raise BadInput(f'{where}: has {height * width:,} pixels, expected at most {MAX_PIXELS:,}')
        records[image_id] = (name, height, width)
    return records


def _read_id(where: str, record: Any, key: str) -> Id:
    """Read an id, which may be a number or text. Raises BadInput."""
    value = require(where, record, key, (int, float, str))
    number_or_text = identify(value)
    if number_or_text is None:
        raise BadInput(f'{where}: {key} is {str(value)[:60]!r}, expected a whole number or text')
    return number_or_text


def _read_name(where: str, record: dict[str, Any]) -> str:
    """Read the file_name of an image. Raises BadInput."""
    if record.get('file_name') is None:
        keys = ('path', 'filename', 'name', 'coco_url', 'flickr_url', 'url')
        other = next((key for key in keys if record.get(key)), None)
        hint = f'; it has {other} {str(record[other])[:80]!r}' if other else ''
        advice = "expected the photo's path below the data root"
        raise BadInput(f"{where} lacks the key 'file_name'{hint}; {advice}")
    name = require(where, record, 'file_name', str)
    if not name or not is_plain(name):
        raise BadInput(f'{where}: file_name {name[:80]!r} is not a file name')
    return name


def _read_side(where: str, record: dict[str, Any], key: str) -> int:
    """Read the height or width of an image. Raises BadInput."""
    advice = "write the size of the photo there, in pixels, or export again with the images' sizes"
    if record.get(key) is None:
        raise BadInput(f'{where} lacks the key {key!r}; {advice}')
    side = whole_number(record[key])
    if side is None or not 1 <= side <= MAX_SIDE:
        raise BadInput(f'{where}: {key} is {str(record[key])[:60]}, expected 1 to {MAX_SIDE}; {advice}')
    return side


def _match_categories(
    path: Path, data: dict[str, Any], listed: list[Any], competition: Competition
) -> dict[Id, int]:
    """Return the class id of each category that annotations use, by name; the others may be anything."""
    used = Counter(
        _read_id(name_annotation(path, position, record), record, 'category_id')
        for position, record in enumerate(listed)
    )
    if not used:
        return {}
    names: dict[Id, Any] = {}
    for category in require(f'{path}: the file', data, 'categories', list):
        category_id = identify(category.get('id')) if isinstance(category, dict) else None
        if category_id not in used:
            continue
        name = category.get('name')
        name = str(name) if type(name) is int else name
        if not isinstance(name, str):
            count = plural(used[category_id], 'annotation')
            fault = f'category {category_id!r:.60} has {count}, but the name {name!r:.60}'
            raise BadInput(f'{path}: {fault}; expected the name of a class')
        if match_key(names.setdefault(category_id, name)) != match_key(name):
            fault = f'category {category_id!r:.60} is {names[category_id]!r:.60} and {name!r:.60}'
            raise BadInput(f'{path}: {fault}')
    class_ids: dict[Id, int] = {}
    for category_id, number in used.most_common():
        count = plural(number, 'annotation')
        if category_id not in names:
            raise BadInput(f'{path}: category_id {category_id!r:.60} of {count} is not among the categories')
        name = names[category_id]
        class_id = class_ids[category_id] = competition.class_id(name)
        if class_id is None:
            fault = f'category {name!r:.80} has {count}, but is no class'
            raise BadInput(f'{path}: {fault}{_advise_on_class(name, competition.classes, path.parent)}')
        if class_id == 0 and not competition.is_multilabel and not competition.knows_background(name):
            drawn = [record for record in listed if identify(record['category_id']) == category_id]
            if competition.crowds == 'ignored' and all(_read_flag(str(path), record) for record in drawn):
                continue  # regions to ignore are of the first class
            fault = f'category {name!r:.80} has {count}, but is the first class, the background'
            advice = 'if it is an object, write Background before it in classes'
            raise BadInput(f'{path}: {fault}; {advice}; if not, give categories: {{{name}: {name}}}')
    return class_ids


def _advise_on_class(name: str, classes: tuple[str, ...], root: Path) -> str:
    """Say which class a category that is none may be, and the way out."""
    keys = {match_key(one): one for one in classes}
    near = difflib.get_close_matches(match_key(name), keys, n=1)
    guess = f'; did you mean {keys[near[0]]!r}?' if near else ';'
    command = python_command('prepare.py', 'competition', '--data', root)
    advice = f'rename it, or let {command} write the classes of the data into competition.yaml'
    return f'{guess} the classes are {join_first(classes, SHOWN)}; {advice}'


def name_annotation(path: Path, position: int, record: Any) -> str:
    """Name an annotation in a message: by its id, which need not be there, or by its position."""
    annotation_id = record.get('id') if isinstance(record, dict) else None
    if isinstance(annotation_id, int | str):
        return f'{path}: annotation {annotation_id!r:.60}'
    return f'{path}: annotations[{position}]'


def not_listed(where: str, key: str, value: Any, ids: Collection[Any], listed: str) -> BadInput:
    """Return the error for an annotation of an image or a category that its file does not list."""
    example = f', which have ids such as {next(iter(ids))!r:.60}' if ids else ''
    way_out = 'remove the annotation, or export both together'
    return BadInput(f'{where}: {key} {value!r:.60} is not among the {listed}{example}; {way_out}')


def _read_annotations(
    path: Path,
    listed: list[dict[str, Any]],
    images: dict[Id, tuple[str, int, int]],
    class_ids: dict[Id, int],
    competition: Competition,
    left_out: LeftOut,
) -> dict[Id, list[Annotation]]:
    """Check the annotation records and return those that have a mask by image id."""
    annotations: dict[Id, list[Annotation]] = {image_id: [] for image_id in images}
    for position, record in enumerate(listed):
        where = name_annotation(path, position, record)
        image_id = _read_id(where, record, 'image_id')
        if image_id not in images:
            raise not_listed(where, 'image_id', image_id, images, 'images')
        class_id = class_ids[identify(record['category_id'])]
        iscrowd = _read_flag(where, record) and competition.crowds == 'ignored'
        annotator = identify(record.get('annotator'))
        if annotator is None and record.get('annotator') is not None and competition.labels == 'soft':
            found = str(record['annotator'])[:60]
            raise BadInput(f'{where}: annotator is {found!r}, expected a whole number or text')
        encoded = encode_segmentation(where, record, images[image_id][1:], left_out)
        if encoded is not None:
            annotations[image_id].append(Annotation(class_id, iscrowd, *encoded, annotator))
    return annotations


def _find_annotators(
    where: str, record: dict[str, Any], drawn: Sequence[Annotation]
) -> tuple[Id | None, ...]:
    """Return who annotated a photo, in the order of the file: those whom its record lists, who may have found
    nothing, else those of its annotations. Raises BadInput.
    """
    found = tuple(dict.fromkeys(annotation.annotator for annotation in drawn))
    listed = record.get('annotators')
    if listed is None:
        if None in found and len(found) > 1:
            fault = "some of its annotations have the key 'annotator', and some have not"
            raise BadInput(f'{where}: {fault}; expected all or none of a photo')
        return found
    names = tuple(dict.fromkeys(map(identify, listed))) if isinstance(listed, list) else (None,)
    if None in names:
        raise BadInput(f'{where}: annotators is {str(listed)[:60]}, expected a list of numbers or texts')
    for one in found:
        if one not in names:
            raise BadInput(f'{where}: annotators lacks {one!r:.60}, of whom there are annotations')
    return names


def _read_flag(where: str, record: dict[str, Any]) -> bool:
    """Read iscrowd, which may be missing, null, a number, text or a truth value. Raises BadInput."""
    value = record.get('iscrowd')
    key = value.strip().lower() if isinstance(value, str) else value
    if key is None:
        return False
    if isinstance(key, list | dict) or key not in FLAGS:
        raise BadInput(f'{where}: iscrowd is {str(value)[:60]!r}, expected 0 or 1')
    return FLAGS[key]


def training_photos(data: Path, competition: Competition) -> dict[str, Photo]:
    """Return the training photos of a data root by file name. Raises BadInput."""
    return {photo.file_name: photo for photo in read_coco(data, 'train', competition).photos}
