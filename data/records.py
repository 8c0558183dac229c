"""Hold the record of a photo with its annotations; keep records in an index: memory-mapped arrays, from which
a record is made when it is asked for.

A photo's row is the same in its set, in the index and in the cache.
"""

import json
from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, overload

import numpy as np

from data.masks import Annotation
from utils.errors import BadInput, one_line
from utils.files import map_array, save_array, write_text

Id = int | str  # of an image, a category or an annotator


@dataclass(frozen=True, slots=True)
class Photo:
    """Hold one photo's record and its annotations in the order of the file."""

    image_id: int  # unique across train.json and val.json
    file_name: str  # as the file has it, which is the image_id of a CSV
    height: int
    width: int
    annotations: tuple[Annotation, ...] = ()
    first_object: int = 1  # lowest id of a class of objects: 0 if there is no background
    annotators: tuple[Id | None, ...] = ()  # who each drew a mask of it, if labels are soft

    @property
    def classes(self) -> set[int]:
        """Return the ids of the classes that the photo has objects of, without background and crowds; of
        several annotators those that most of them drew, or half of them with the first.
        """
        drawn = [
            {a.category_id for a in one.annotations if a.category_id >= self.first_object and not a.iscrowd}
            for one in self.by_annotator()
        ]
        votes = Counter(k for ids in drawn for k in ids)
        return {k for k, count in votes.items() if 2 * count + (k in drawn[0]) > len(drawn)}

    def by_annotator(self) -> list['Photo']:
        """Return the photo once for each annotator, with the annotations of that one alone."""
        if len(self.annotators) < 2:
            return [self]
        return [
            replace(self, annotators=(), annotations=tuple(a for a in self.annotations if a.annotator == one))
            for one in self.annotators
        ]

    @property
    def size(self) -> tuple[int, int]:
        """Return (H, W)."""
        return self.height, self.width


class PhotoTuple(tuple[Photo, ...]):
    """Photos in memory, which answer what a PhotoIndex answers."""

    def names(self) -> list[str]:
        """Return the file names."""
        return [photo.file_name for photo in self]

    def sizes(self) -> list[tuple[int, int]]:
        """Return the sizes (H, W)."""
        return [photo.size for photo in self]

    def classes(self) -> list[set[int]]:
        """Return the classes that each photo has objects of."""
        return [photo.classes for photo in self]

    def annotator_counts(self) -> list[int]:
        """Return how many annotators each photo has."""
        return [len(photo.annotators) for photo in self]


# columns of two of the arrays; the last four of a photo and the last one of an annotation say where its part
# of another array ends, and the row before says where it starts
PHOTO = ('height', 'width', 'text', 'annotations', 'classes', 'annotators')
ANNOTATION = ('category_id', 'iscrowd', 'pixels', 'annotator', 'rle')
ARRAYS = {
    'photos': np.int64,  # (N + 1, 6): PHOTO, after a row of zeros
    'text': np.uint8,  # image_id, a space and file_name of each photo, in UTF-8
    'annotations': np.int64,  # (M + 1, 5): ANNOTATION, after a row of zeros
    'rles': np.uint8,
    'classes': np.int64,  # Photo.classes of each photo
    'annotators': np.int64,  # of each photo: numbers of names in meta.json
}


class PhotoIndex(Sequence[Photo]):
    """Read the photos that write_index wrote into a folder; a Photo is made when it is asked for.

    Raises BadInput if the folder is damaged.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        try:
            self.meta: dict[str, Any] = json.loads((folder / 'meta.json').read_text())
            shapes = {name: tuple(shape) for name, shape in self.meta['shapes'].items()}
            self.first_object, self.names_of_annotators = self.meta['first_object'], self.meta['annotators']
            paths = {name: folder / f'{name}.npy' for name in ARRAYS}
            self.arrays = {n: np.asarray(map_array(paths[n], shapes[n], ARRAYS[n])) for n in ARRAYS}
        except (OSError, ValueError, KeyError, BadInput) as error:
            raise damaged(folder, error) from None
        self.count = len(self.arrays['photos']) - 1

    def __reduce__(self) -> tuple:
        """Pickle the folder: a spawned process maps the files again instead of receiving them."""
        return PhotoIndex, (self.folder,)

    def __len__(self) -> int:
        return self.count

    @overload
    def __getitem__(self, row: int) -> Photo: ...
    @overload
    def __getitem__(self, row: slice) -> tuple[Photo, ...]: ...
    def __getitem__(self, row: int | slice) -> Photo | tuple[Photo, ...]:
        if isinstance(row, slice):
            return tuple(self[one] for one in range(*row.indices(self.count)))
        row = range(self.count)[row]
        start, end = (dict(zip(PHOTO, self.arrays['photos'][row + k].tolist(), strict=True)) for k in (0, 1))
        text = self.arrays['text'][start['text'] : end['text']].tobytes().decode()
        image_id, _, file_name = text.partition(' ')
        annotators = self.arrays['annotators'][start['annotators'] : end['annotators']].tolist()
        return Photo(
            int(image_id),
            file_name,
            end['height'],
            end['width'],
            self._annotations(start['annotations'], end['annotations']),
            self.first_object,
            tuple(self.names_of_annotators[number] for number in annotators),
        )

    def _annotations(self, start: int, stop: int) -> tuple[Annotation, ...]:
        annotations = []
        rows = self.arrays['annotations'][start : stop + 1].tolist()
        for (*_, begin), (category_id, iscrowd, pixels, annotator, end) in pairwise(rows):
            rle, name = self.arrays['rles'][begin:end].tobytes(), self.names_of_annotators[annotator]
            annotations.append(Annotation(category_id, bool(iscrowd), rle, pixels, name))
        return tuple(annotations)

    def names(self) -> list[str]:
        """Return the file names."""
        text, ends = self.arrays['text'].tobytes(), self._column('text')
        parts = (text[start:end].decode() for start, end in pairwise(ends))
        return [part.partition(' ')[2] for part in parts]

    def sizes(self) -> list[tuple[int, int]]:
        """Return the sizes (H, W)."""
        return [*map(tuple, self.arrays['photos'][1:, :2].tolist())]

    def classes(self) -> list[set[int]]:
        """Return the classes of each photo, as Photo.classes."""
        ids, ends = self.arrays['classes'].tolist(), self._column('classes')
        return [set(ids[start:end]) for start, end in pairwise(ends)]

    def annotator_counts(self) -> list[int]:
        """Return how many annotators each photo has."""
        return [end - start for start, end in pairwise(self._column('annotators'))]

    def _column(self, name: str) -> list[int]:
        return self.arrays['photos'][:, PHOTO.index(name)].tolist()


def write_index(photos: Sequence[Photo], folder: Path, facts: dict[str, Any]) -> None:
    """Write the index of photos, at least one, into a folder that exists, with more facts for meta.json."""
    numbers: dict[Id | None, int] = {None: 0}
    text, rles = bytearray(), bytearray()
    rows, annotations = array('q', [0] * len(PHOTO)), array('q', [0] * len(ANNOTATION))
    classes, annotators = array('q'), array('q')
    for photo in photos:
        text += f'{photo.image_id} {photo.file_name}'.encode()
        for one in photo.annotations:
            rles += one.rle
            number = numbers.setdefault(one.annotator, len(numbers))
            annotations.extend((one.category_id, one.iscrowd, one.pixels, number, len(rles)))
        classes.extend(sorted(photo.classes))
        annotators.extend(numbers.setdefault(name, len(numbers)) for name in photo.annotators)
        stop = len(annotations) // len(ANNOTATION) - 1
        rows.extend((*photo.size, len(text), stop, len(classes), len(annotators)))
    contents = (rows, text, annotations, rles, classes, annotators)
    arrays = {name: np.frombuffer(c, ARRAYS[name]) for name, c in zip(ARRAYS, contents, strict=True)}
    arrays['photos'] = arrays['photos'].reshape(-1, len(PHOTO))
    arrays['annotations'] = arrays['annotations'].reshape(-1, len(ANNOTATION))
    for name, values in arrays.items():
        save_array(folder / f'{name}.npy', values)
    shapes = {name: values.shape for name, values in arrays.items()}
    meta = {'shapes': shapes, 'first_object': photos[0].first_object, 'annotators': [*numbers], **facts}
    write_text(folder / 'meta.json', json.dumps(meta))


def damaged(folder: Path, error: Exception) -> BadInput:
    """Return the error to raise for a folder of a cache that cannot be read."""
    return BadInput(f'{folder}: is damaged ({one_line(error)}); remove it to make it again')
