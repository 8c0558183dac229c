"""The confusion of each photo of a CSV with its truth, counted once and kept beside the CSV.

    counted = read_confusions(Path('output/convnext/fold0/oof.csv'), coco, len(classes))

Kept in .<name>.confusions.npz, which is used as long as the CSV and the annotations are the same.

Shapes: n photos, K classes.
"""

import zipfile
import zlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tokenize import TokenError

import numpy as np

from data.coco import CocoSet, draw_mask, training_photos
from metrics import (
    DRAWS,
    LEVEL,
    confusion_matrix,
    image_counts,
    interval,
    iou_of_counts,
    mean_of_iou,
    miou_of_counts,
    paired_by_class,
    paired_interval,
    verdict,
)
from submission import SubmissionReader, downsample_mask, require_same_images
from utils.errors import BadInput
from utils.files import write_whole
from utils.progress import progress

# what NumPy raises for a file that is not there, cut off, or damaged
BROKEN = (OSError, ValueError, KeyError, EOFError, RuntimeError, TokenError, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class Confusions:
    """Photos, and the confusion of each with its truth."""

    image_ids: tuple[str, ...]
    matrices: np.ndarray  # (n, K, K) int32: at most 65,536 pixels

    def counts(self) -> np.ndarray:
        """(n, 3, K) int64 metrics.image_counts of each photo."""
        hits = np.diagonal(self.matrices, axis1=1, axis2=2)
        return np.stack([hits, self.matrices.sum(1), self.matrices.sum(2)], axis=1).astype(np.int64)

    def ious(self) -> np.ndarray:
        """(n, K) IoU of each class in each photo; nan where it is in neither truth nor prediction."""
        return iou_of_counts(*np.moveaxis(self.counts(), 1, 0))

    def scores(self) -> np.ndarray:
        """(n,) mean IoU over the classes in each photo's truth or prediction; nan where all is IGNORED."""
        return mean_of_iou(self.ious())


def read_confusions(
    path: Path,
    coco: CocoSet,
    num_classes: int,
    progress: Callable[[Sequence[str]], Sequence[str]] = lambda image_ids: image_ids,
) -> Confusions:
    """What is kept of a CSV of photos with a truth, or counted now and kept; `progress` is as tqdm.

    Raises BadInput for a CSV that is broken, or that has an image which is none of the photos.
    """
    kept = path.with_name(f'.{path.name}.confusions.npz')
    stamp = stamp_of(path, coco, num_classes)
    found = _read(kept, stamp)
    if found is not None:
        return found
    photos = {photo.file_name: photo for photo in coco.photos}
    kind = 'training' if coco.split == 'train' else coco.split
    with SubmissionReader(path, num_classes) as reader:
        matrices = np.zeros((len(reader.image_ids), num_classes, num_classes), np.int32)
        for row, image_id in enumerate(progress(reader.image_ids)):
            if image_id not in photos:
                raise BadInput(f'{path}: image {image_id!r} is none of the {kind} photos of {coco.root}')
            truth = downsample_mask(draw_mask(photos[image_id]))
            matrices[row] = confusion_matrix(truth, reader.read(image_id), num_classes)
        found = Confusions(tuple(reader.image_ids), matrices)
    _write(kept, stamp, found)
    return found


def stamp_of(path: Path, coco: CocoSet, num_classes: int) -> str:
    """Another one when the CSV is written again, or an annotation changes. Raises BadInput."""
    try:
        status = path.stat()
    except OSError as error:
        raise BadInput(f'{path}: cannot be read: {error.strerror}') from None
    return f'{status.st_size} {status.st_mtime_ns} {num_classes} {coco.fingerprint}'


def _read(kept: Path, stamp: str) -> Confusions | None:
    try:
        with np.load(kept) as file:
            if str(file['stamp']) == stamp:
                return Confusions(tuple(file['image_ids'].tolist()), file['matrices'])
    except BROKEN:
        pass  # it is counted again
    return None


def _write(kept: Path, stamp: str, found: Confusions) -> None:
    try:
        with write_whole(kept) as file:
            arrays = {'image_ids': np.array(found.image_ids), 'matrices': found.matrices}
            np.savez_compressed(file, stamp=np.array(stamp), **arrays)
    except BadInput:
        pass  # a folder that can only be read: it is counted again next time


def cross_fit(totals: np.ndarray) -> tuple[int, np.ndarray]:
    """Of (parts, C, 3, K) counts of C candidates: the best on all parts, and for each part the best on the
    others. The first of equal ones. Raises BadInput for one part alone, which has no others.
    """
    if len(totals) < 2:
        raise BadInput('found fewer than 2 photos out of fold: nothing can be chosen on some for the others')
    everything = totals.sum(0)
    without = [miou_of_counts(everything - own).argmax() for own in totals]
    return int(miou_of_counts(everything).argmax()), np.array(without)


def compare_scores(csvs: Sequence[Path], data: Path, classes: tuple[str, ...]) -> str:
    """The scores of two CSVs on the photos that they have, and the difference, by class too, with paired
    bootstrap intervals. Raises BadInput where one lacks a photo of the other.
    """
    photos = training_photos(data, classes)
    with ExitStack() as stack:
        first, second = (stack.enter_context(SubmissionReader(path, len(classes))) for path in csvs)
        require_same_images(first.image_ids, csvs[0], second)
        counts = np.zeros((2, len(first.image_ids), 3, len(classes)), np.int64)
        for n, image_id in enumerate(progress(first.image_ids, 'compare', 'image')):
            if image_id not in photos:
                raise BadInput(f'{csvs[0]}: image {image_id!r} is none of the training photos of {data}')
            truth = downsample_mask(draw_mask(photos[image_id]))
            for which, reader in enumerate((first, second)):
                confusion = confusion_matrix(truth, reader.read(image_id), len(classes))
                counts[which, n] = image_counts(confusion)
    width = max(map(len, classes))
    lines = [f'{path}: mIoU {interval(own)}' for path, own in zip(csvs, counts, strict=True)]
    lines.append(f'{"first - second":<{width}}  {LEVEL:.0%} of {DRAWS:,} draws of the images')
    for name, one in zip(classes, paired_by_class(*counts), strict=True):
        if not np.isnan(one.value):
            lines.append(f'{name:<{width}}  {one.value:+.4f}  [{one.low:+.4f}, {one.high:+.4f}]')
    total = paired_interval(*counts)
    lines.append(f'{"mIoU":<{width}}  {total.value:+.4f}  [{total.low:+.4f}, {total.high:+.4f}]')
    lines.append(verdict(total, counts.shape[1]))
    return '\n'.join(lines)
