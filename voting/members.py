"""Find the members of an ensemble: CSVs of test photos, and the oof.csv and probabilities beside them.

    members = find_members(paths, out)
    for sample in read_samples(list(by_model(members).values()), photos, data, competition):

Shapes: M models, K classes.
"""

from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from config import Competition, fold_of, is_replaced
from data.coco import Photo, scored_truth, sizes_of
from data.groups import group_names
from submission import MaskFormat, Reader, mask_format, open_probs
from utils.errors import BadInput
from utils.progress import progress
from utils.ragged import Ragged
from voting.choices import split_evenly
from voting.origin import content_hash, read_origin, read_photos, refuse_outdated

PARTS = 5  # into which the photos of a single fold are split, so that weights can be chosen without one part


@dataclass(frozen=True)
class OofSample:
    """A photo out of fold: truth and predictions of all models, and their probabilities if asked for."""

    part: int  # weights for this photo are chosen without its part
    truth: np.ndarray  # (H, W) uint8 ids, or (K, H, W) planes, at the scored size
    preds: np.ndarray  # M of these
    probs: Sequence[np.ndarray] = ()  # M of (K, H, W) uint8
    scene: Hashable = None  # the same for near-duplicates; None: not known


@dataclass(frozen=True)
class Member:
    """A CSV that votes, the folder of its model, its fold if the path is <model>/fold<k>/<name>.csv, and the
    CSV of the model's predictions out of fold.
    """

    path: Path
    folder: Path
    fold: int | None
    oof: Path


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
        if is_replaced(path.parent):
            raise BadInput(f'{path}: is of a run that is being replaced; leave it out, or move it elsewhere')
        if resolved[number] in resolved[:number]:
            raise BadInput(f'{path}: is given twice; to count a CSV more than once, use --weights')
    return [member_of(path) for path in paths]


def member_of(path: Path, oof: Path | None = None) -> Member:
    """Return the member that a CSV is; `oof` is by default the oof.csv beside it."""
    oof, fold = oof or path.with_name('oof.csv'), fold_of(path.parent)
    if fold is None or fold < 0:
        return Member(path, path.parent, None, oof)
    return Member(path, path.parent.parent, fold, oof)


def by_model(members: Iterable[Member]) -> dict[Path, list[Member]]:
    """Group the members by the folder of their model."""
    models: dict[Path, list[Member]] = {}
    for member in members:
        models.setdefault(member.folder, []).append(member)
    return models


def check_members(members: Sequence[Member], with_oof: bool) -> None:
    """Raise BadInput for a CSV whose best.pt has changed; `with_oof`: the oof.csv beside each, too, and one
    that another best.pt made than the CSV. Print which CSVs are the same.
    """
    csvs = [member.path for member in members]
    oofs = [path for path in oof_files(members) if with_oof and path.exists()]
    refuse_outdated([*csvs, *oofs])
    for oof in oofs:
        for csv in csvs:
            if csv.parent == oof.parent:
                refuse_other_checkpoints(csv, oof)
    for first, second in find_copies(csvs):
        print(f'warning: {first} and {second} are the same: the vote counts it twice')


def oof_files(members: Iterable[Member]) -> list[Path]:
    """List the oof.csv beside each member, each once."""
    return [*dict.fromkeys(member.oof for member in members)]


def refuse_other_checkpoints(csv: Path, oof: Path) -> None:
    """Raise BadInput if two CSVs of one folder were made by different checkpoints that are gone since."""
    one, other = read_origin(csv), read_origin(oof)
    if one is None or other is None:
        return
    for name, identity in one.checkpoints.items():
        if other.checkpoints.get(name, identity) != identity:
            found = f'was made by another {oof.parent / name} than {oof}'
            raise BadInput(f'{csv}: {found}; make both by one: infer.py --split oof and --split test')


def refuse_same_oof(members: Iterable[Member]) -> None:
    """Raise BadInput if two oof.csv are the same file by content, so that no search can tell them apart."""
    for first, second in find_copies(oof_files(members)):
        raise BadInput(f'{second}: is the same as {first}: one model twice; leave one of them out')


def find_copies(paths: Sequence[Path]) -> list[tuple[Path, Path]]:
    """List each file with an earlier one that has the same content; only files of one size are read."""
    first: dict[tuple[int, str], Path] = {}
    sizes = [path.stat().st_size if path.exists() else -number for number, path in enumerate(paths, 1)]
    copies = []
    for path, size in zip(paths, sizes, strict=True):
        if sizes.count(size) > 1:
            earlier = first.setdefault((size, content_hash(path)), path)
            copies += [(earlier, path)] if earlier != path else []
    return copies


def oof_hash(member: Member) -> str:
    """Return the SHA-256 of the oof.csv beside a member; it identifies model and fold. Raises BadInput."""
    return content_hash(member.oof)


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
        places = find_places(sources, data, competition)
        parts = split_parts(places)
        for image_id, part in progress(parts.items(), 'count', 'photo'):
            files = [source[image_id] for source in sources]
            preds = np.stack([file.reader.read(image_id) for file in files])
            truth = scored_truth(photos[image_id], competition)
            probs = [file.probs[file.rows[image_id]] for file in files] if soft else []
            yield OofSample(part, truth, preds, probs, places[image_id][1])


def open_oof_files(
    stack: ExitStack, model: Sequence[Member], form: MaskFormat, soft: bool
) -> dict[str, OofFile]:
    """Open the photos out of fold of each member of a model; return the file of each. Raises BadInput."""
    files: dict[str, OofFile] = {}
    for member in model:
        path = member.oof
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


Places = Mapping[str, Sequence]  # the fold and the scene of each photo by image id, None if not known


def find_places(
    sources: Sequence[dict[str, OofFile]], data: Path, competition: Competition
) -> dict[str, Sequence]:
    """Return the fold and the scene of each photo: from the origin.json beside the CSVs of the first model
    that has them, else the fold from the path, and as scene the `group` of competition.yaml, if any.
    """
    image_ids = [*sources[0]]
    known: dict[str, Sequence] = {}
    for source in sources:
        places = read_photos(dict.fromkeys(file.reader.path for file in source.values()))
        if len(places.keys() & source.keys()) > len(known):
            known = {image_id: places[image_id] for image_id in image_ids if image_id in places}
    folds = [known.get(image_id, (sources[0][image_id].fold,))[0] for image_id in image_ids]
    scenes = [known.get(image_id, (None, None))[1] for image_id in image_ids]
    scenes = complete_scenes(image_ids, scenes, data, competition)
    return dict(zip(image_ids, zip(folds, scenes, strict=True), strict=True))


def complete_scenes(
    image_ids: Sequence[str], scenes: Sequence[int | None], data: Path, competition: Competition
) -> list[int | None]:
    """Fill in the scenes that are not known: by the `group` of competition.yaml, or, beside others that are
    known, as scenes of one photo. They stay None if nothing is known.
    """
    if None not in scenes or (competition.group is None and not any(scene is not None for scene in scenes)):
        return [*scenes]
    groups = [*range(len(image_ids))]
    if competition.group is not None:
        groups = group_names(data, image_ids, competition.group).tolist()
    pairs = [*zip(groups, scenes, strict=True)]
    scene_of = {group: scene for group, scene in pairs if scene is not None}
    first = 1 + max(scene_of.values(), default=-1)  # of those that are not known
    return [scene_of.get(group, first + group) if scene is None else scene for group, scene in pairs]


def split_parts(places: Places) -> dict[str, int]:
    """Assign each photo its part, from 0: photos are split by fold, or those of a single fold into PARTS of
    about the same size; a scene is never split, and goes with its first photo by name.

    If the scenes are not known, a single fold is cut in the order of its names, so that photos that were
    taken one after another are mostly in one part.
    """
    scenes: dict[Hashable, list[str]] = {}
    for image_id in sorted(places):
        scene = places[image_id][1]
        scenes.setdefault(image_id if scene is None else (scene,), []).append(image_id)
    folds = [places[image_ids[0]][0] for image_ids in scenes.values()]
    numbers = sorted({-1 if fold is None else fold for fold in folds})
    if len(numbers) > 1:
        parts = [numbers.index(-1 if fold is None else fold) for fold in folds]
    elif all(scene is None for _, scene in places.values()):
        parts = split_evenly(len(scenes), PARTS).tolist()
    else:
        parts = deal([len(image_ids) for image_ids in scenes.values()], PARTS)
    in_part = {i: part for ids, part in zip(scenes.values(), parts, strict=True) for i in ids}
    return {image_id: in_part[image_id] for image_id in places}


def deal(sizes: Sequence[int], parts: int) -> list[int]:
    """Assign things of these sizes to at most so many parts: the largest first, each to the smallest part."""
    totals, assigned = [0] * min(parts, len(sizes)), [0] * len(sizes)
    for number in sorted(range(len(sizes)), key=lambda number: -sizes[number]):
        assigned[number] = totals.index(min(totals))
        totals[assigned[number]] += sizes[number]
    return assigned
