"""The members of an ensemble: CSVs of test photos, and what lies beside them: predictions out of fold,
probabilities.

    members = find_members(paths, out)
    for sample in read_samples(list(by_model(members).values()), photos, data, num_classes):

Shapes: M members or models, K classes.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from config import fold_of
from data.coco import Photo, draw_mask
from submission import SubmissionReader, downsample_mask, open_probs
from utils.errors import BadInput
from utils.files import file_hash
from utils.progress import progress

PARTS = 5  # of the photos out of fold, for choosing weights on the others, where they are of one fold


@dataclass(frozen=True)
class OofSample:
    """A photo out of fold: its part, which is left out when weights for it are chosen, its truth (256, 256),
    the ids (M, 256, 256) of the models, and their probabilities (K, 256, 256) uint8, where asked for.
    """

    part: int
    truth: np.ndarray
    preds: np.ndarray
    probs: Sequence[np.ndarray] = ()


@dataclass(frozen=True)
class Member:
    """A CSV that votes, the folder of its model, and its fold where it is <model>/fold<k>/<name>.csv."""

    path: Path
    folder: Path
    fold: int | None


def find_members(paths: Sequence[Path], out: Path) -> list[Member]:
    """The members, in the order given. Raises BadInput where one is given twice or would be written over, or
    out is a folder.
    """
    if out.is_dir():
        raise BadInput(f'{out}: cannot be written: it is a folder')
    seen: set[Path] = set()
    members = []
    for path in paths:
        if path.resolve() == out.resolve():
            raise BadInput(f'{out}: is the --out and among the CSVs that vote')
        if path.resolve() in seen:
            raise BadInput(f'{path}: is given twice; --weights counts a CSV more than once')
        seen.add(path.resolve())
        members.append(member_of(path))
    return members


def member_of(path: Path) -> Member:
    fold = fold_of(path.parent)
    if fold is None or fold < 0:
        return Member(path, path.parent, None)
    return Member(path, path.parent.parent, fold)


def by_model(members: Iterable[Member]) -> dict[Path, list[Member]]:
    """The members of each model, by its folder."""
    models: dict[Path, list[Member]] = {}
    for member in members:
        models.setdefault(member.folder, []).append(member)
    return models


def oof_hash(member: Member) -> str:
    """Which model and fold a CSV is of: the SHA-256 of the oof.csv beside it. Raises BadInput."""
    return file_hash(member.path.with_name('oof.csv'))


def read_samples(
    models: Sequence[Sequence[Member]],
    photos: dict[str, Photo],
    data: Path,
    num_classes: int,
    soft: bool = False,
) -> Iterator[OofSample]:
    """Truth and every model's prediction of each photo out of fold, with soft its probabilities too; `photos`
    by file name. Raises BadInput.

    The part of a photo is its fold, where the CSVs are of several; else its place, in PARTS stretches.
    """
    with ExitStack() as stack:
        found: list[dict[str, tuple[SubmissionReader, int | None]]] = []
        probs: dict[Path, tuple[np.ndarray, dict[str, int]]] = {}
        for model in models:
            found.append({})
            for member in model:
                path = member.path.with_name('oof.csv')
                if not path.is_file():
                    raise BadInput(f'{path}: no such file; --search needs what infer.py --split oof writes')
                reader = stack.enter_context(SubmissionReader(path, num_classes))
                if soft:
                    rows = {image_id: row for row, image_id in enumerate(reader.image_ids)}
                    probs[path] = open_probs(reader, num_classes), rows
                for image_id in reader.image_ids:
                    if image_id in found[-1]:
                        other = found[-1][image_id][0].path
                        raise BadInput(f'{path}: image {image_id!r} is out of fold in {other} too')
                    if image_id not in photos:
                        raise BadInput(f'{path}: image {image_id!r} is none of the training photos of {data}')
                    found[-1][image_id] = (reader, member.fold)
        for model, images in zip(models, found, strict=True):
            for image_id in images.keys() ^ found[0].keys():
                names = f'{models[0][0].folder} and {model[0].folder}'
                raise BadInput(f'{names}: only one has {image_id!r} out of fold; give the same folds of each')
        parts = {image_id: -1 if fold is None else fold for image_id, (_, fold) in found[0].items()}
        if len(set(parts.values())) < 2:
            parts = {image_id: place * PARTS // len(parts) for place, image_id in enumerate(parts)}
        numbers = {part: number for number, part in enumerate(sorted(set(parts.values())))}
        for image_id, part in progress(parts.items(), 'count', 'photo'):
            own = [images[image_id][0] for images in found]
            preds = np.stack([reader.read(image_id) for reader in own])
            truth = downsample_mask(draw_mask(photos[image_id]))
            likely = [probs[reader.path] for reader in own] if soft else []
            yield OofSample(numbers[part], truth, preds, [p[rows[image_id]] for p, rows in likely])
