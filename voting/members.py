"""Find the members of an ensemble: CSVs of test photos, and the oof.csv and probabilities beside them.

    members = find_members(paths, out)
    for sample in read_samples(list(by_model(members).values()), photos, data, competition):

Shapes: M models, K classes.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from config import Competition, fold_of
from data.coco import Photo, scored_truth, sizes_of
from submission import MaskFormat, Reader, mask_format, open_probs
from utils.errors import BadInput
from utils.files import file_hash
from utils.progress import progress
from utils.ragged import Ragged
from voting.choices import split_evenly

PARTS = 5  # into which the photos of a single fold are split, so that weights can be chosen without one part


@dataclass(frozen=True)
class OofSample:
    """A photo out of fold: truth and predictions of all models, and their probabilities if asked for."""

    part: int  # weights for this photo are chosen without its part
    truth: np.ndarray  # (H, W) uint8 ids, or (K, H, W) planes, at the scored size
    preds: np.ndarray  # M of these
    probs: Sequence[np.ndarray] = ()  # M of (K, H, W) uint8


@dataclass(frozen=True)
class Member:
    """A CSV that votes, the folder of its model, and its fold if the path is <model>/fold<k>/<name>.csv."""

    path: Path
    folder: Path
    fold: int | None


Models = Sequence[Sequence[Member]]


def find_members(paths: Sequence[Path], out: Path) -> list[Member]:
    """Return the members in the order given. Raises BadInput for a CSV that is given twice or is the output,
    and if `out` is a folder.
    """
    if out.is_dir():
        raise BadInput(f'{out}: cannot be written: it is a folder')
    resolved = [path.resolve() for path in paths]
    for number, path in enumerate(paths):
        if resolved[number] == out.resolve():
            raise BadInput(f'{out}: is both the --out and one of the CSVs that vote; give another --out')
        if resolved[number] in resolved[:number]:
            raise BadInput(f'{path}: is given twice; to count a CSV more than once, use --weights')
    return [member_of(path) for path in paths]


def member_of(path: Path) -> Member:
    fold = fold_of(path.parent)
    if fold is None or fold < 0:
        return Member(path, path.parent, None)
    return Member(path, path.parent.parent, fold)


def by_model(members: Iterable[Member]) -> dict[Path, list[Member]]:
    """Group the members by the folder of their model."""
    models: dict[Path, list[Member]] = {}
    for member in members:
        models.setdefault(member.folder, []).append(member)
    return models


def oof_hash(member: Member) -> str:
    """Return the SHA-256 of the oof.csv beside a member; it identifies model and fold. Raises BadInput."""
    return file_hash(member.path.with_name('oof.csv'))


@dataclass(frozen=True)
class OofFile:
    """An open oof.csv, its fold, and the probabilities beside it if asked for, with the same rows."""

    reader: Reader
    fold: int | None
    probs: Ragged | None  # (K, H, W) uint8 of each row
    rows: dict[str, int]  # image id -> row


def read_samples(
    models: Models, photos: dict[str, Photo], data: Path, competition: Competition, soft: bool = False
) -> Iterator[OofSample]:
    """Yield each photo out of fold, with probabilities if `soft`; `photos` are by name. Raises BadInput."""
    form = mask_format(competition, sizes_of(photos.values()))
    with ExitStack() as stack:
        sources = [open_oof_files(stack, model, form, soft) for model in models]
        check_photos(models, sources, photos, data)
        for image_id, part in progress(split_parts(sources[0]).items(), 'count', 'photo'):
            files = [source[image_id] for source in sources]
            preds = np.stack([file.reader.read(image_id) for file in files])
            truth = scored_truth(photos[image_id], competition)
            probs = [file.probs[file.rows[image_id]] for file in files] if soft else []
            yield OofSample(part, truth, preds, probs)


def open_oof_files(
    stack: ExitStack, model: Sequence[Member], form: MaskFormat, soft: bool
) -> dict[str, OofFile]:
    """Open the oof.csv beside each member of a model; return the file of each image id. Raises BadInput."""
    files: dict[str, OofFile] = {}
    for member in model:
        path = member.path.with_name('oof.csv')
        if not path.is_file():
            raise BadInput(f'{path}: no such file; infer.py --split oof writes it')
        reader = stack.enter_context(form.reader(path))
        rows = {image_id: row for row, image_id in enumerate(reader.image_ids)}
        file = OofFile(reader, member.fold, open_probs(reader, form) if soft else None, rows)
        for image_id in rows:
            if image_id in files:
                raise BadInput(
                    f'{path}: photo {image_id!r} is also in {files[image_id].reader.path}; '
                    'expected each photo in one oof.csv of a model'
                )
            files[image_id] = file
    return files


def check_photos(
    models: Models, sources: Sequence[dict[str, OofFile]], photos: dict[str, Photo], data: Path
) -> None:
    """Raise BadInput unless all models have the same photos, all of them training photos."""
    for model, source in zip(models, sources, strict=True):
        for image_id, file in source.items():
            if image_id not in photos:
                raise BadInput(f'{file.reader.path}: {image_id!r} is not a training photo of {data}')
        for image_id in source.keys() ^ sources[0].keys():
            folders = f'{models[0][0].folder} and {model[0].folder}'
            raise BadInput(f'{folders}: only one has {image_id!r} out of fold; give the same folds of each')


def split_parts(files: dict[str, OofFile]) -> dict[str, int]:
    """Assign each image id its part, from 0: its fold, or one of PARTS in the order of a single CSV."""
    parts = {image_id: -1 if file.fold is None else file.fold for image_id, file in files.items()}
    if len(set(parts.values())) < 2:
        return dict(zip(files, split_evenly(len(files), PARTS).tolist(), strict=True))
    numbers = {part: number for number, part in enumerate(sorted(set(parts.values())))}
    return {image_id: numbers[part] for image_id, part in parts.items()}
