"""Assign the folds of the cross-validation: stratified over the classes present, each scene in one fold.

A scene is a set of near-duplicates, or of photos that `group` in competition.yaml keeps together.
"""

import hashlib
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np

from config import COMPETITION_FILE, Config
from data.cache import Cache
from data.duplicates import VERSION, describe_alike, describe_photos, find_pairs, join_groups
from data.groups import group_names
from data.records import damaged
from utils.errors import BadInput, one_line, plural
from utils.files import lock, normal_name, save_array, write_csv
from utils.foreign_csv import read_texts
from utils.json_files import whole_number
from utils.log import log


def folds_path(cfg: Config) -> Path:
    return cfg.folds_csv or cfg.cache_dir / 'folds.csv'


def read_folds(cfg: Config, cache: Cache) -> np.ndarray:
    """Return the (n,) int64 fold of each training photo; write folds.csv if needed. Raises BadInput."""
    path = folds_path(cfg)
    if not path.exists():
        if cfg.folds_csv is not None:
            raise BadInput(f'{path}: no such file (folds_csv)')
        with lock(cfg.cache_dir / '.folds.lock', 'assigning folds', wait=True):
            if not path.exists():
                folds = zip(cache.coco.photos, make_folds(cfg, cache), strict=True)
                rows = [(photo.image_id, photo.file_name, fold) for photo, fold in folds]
                write_csv(path, [('image_id', 'file_name', 'fold'), *rows])
    rows = read_rows(path)
    fold_of = dict(rows)
    names = [*map(normal_name, cache.coco.photos.names())]
    if len(rows) != len(fold_of) or set(fold_of) != set(names):
        missing = next((name for name in names if name not in fold_of), None)
        fault = f'lacks {missing!r}' if missing else 'lists other images, or an image twice'
        expected = f'expected the photos of {cfg.data_root}'
        raise BadInput(f'{path}: {fault}, {expected}; use another cache_dir or folds_csv')
    numbers = sorted(set(fold_of.values()))
    if numbers != list(range(cfg.folds)):
        whole = numbers == list(range(len(numbers))) and len(numbers) > 1
        advice = f'set folds={len(numbers)}, or give another' if whole else 'give another'
        fault = f'has the folds {numbers}, but the config key folds is {cfg.folds}'
        raise BadInput(f'{path}: {fault}; {advice} cache_dir or folds_csv')
    folds = np.array([fold_of[name] for name in names])
    check_groups(cfg, names, folds)
    return folds


def read_rows(path: Path) -> list[tuple[str, int]]:
    """Read the normal_name and the fold of each row, as spreadsheets write them, too. Raises BadInput."""
    rows, header = [], 'image_id,file_name,fold'
    expected = f'expected lines of {header}'
    try:
        for where, (name, text) in read_texts(path, header, ('file_name', 'fold')):
            fold = whole_number(text)
            if fold is None:
                raise BadInput(f'{where}: the fold is {text[:40]!r}, {expected}, with numbers from 0')
            rows.append((normal_name(name), fold))
    except OSError as error:
        raise BadInput(f'{path}: {expected}: {one_line(error)}') from None
    return rows


def check_groups(cfg: Config, names: list[str], folds: np.ndarray) -> None:
    """Raise BadInput if the photos of a group are in several folds, as before `group` was given."""
    if cfg.competition.group is None:
        return
    fold_of_group: dict[int, int] = {}
    groups = group_names(cfg.data_root, names, cfg.competition.group)
    for name, group, fold in zip(names, groups.tolist(), folds.tolist(), strict=True):
        if fold_of_group.setdefault(group, fold) != fold:
            places = f'{name!r} is in fold {fold}, others of its group in {fold_of_group[group]}'
            advice = f'move the file away to assign the folds anew, or take group out of {COMPETITION_FILE}'
            raise BadInput(f'{folds_path(cfg)}: splits a group: {places}; {advice}')


def make_folds(cfg: Config, cache: Cache) -> np.ndarray:
    """Assign (n,) folds from the seed. Raises BadInput if there are fewer scenes than folds."""
    labels = np.zeros((len(cache), len(cfg.classes)), bool)
    for row, classes in enumerate(cache.coco.photos.classes()):
        labels[row, list(classes)] = True
    scenes, remark = find_scenes(
        cfg.data_root, cache.coco.photos.names(), read_pairs(cache), cfg.competition.group, cfg.folds
    )
    if remark:
        log.warning(f'warning: {remark}')
    return stratify(labels, scenes, cfg.folds, cfg.seed)


def read_scenes(cfg: Config, cache: Cache) -> np.ndarray:
    """Return the (n,) int64 scene of each training photo, by which its folds are made: they are numbered from
    0 by their first photos. Decodes no photo again. Raises BadInput.
    """
    names, group = cache.coco.photos.names(), cfg.competition.group
    try:
        return find_scenes(cfg.data_root, names, read_pairs(cache), group, cfg.folds)[0]
    except TooFewScenes as error:  # with folds of one's own
        return error.scenes


def read_pairs(cache: Cache) -> np.ndarray:
    """Return the near-duplicates of a cache's photos, (m, 2) rows; find them once, and keep them in its
    folder, if it can be written. Raises BadInput.
    """
    path = cache.folder / f'duplicates-v{VERSION}.npy'
    if path.exists():
        try:
            return np.load(path)
        except (OSError, ValueError, EOFError) as error:
            raise damaged(path, error) from None
    pairs, _, num_alike = find_pairs(describe_photos(cache.photos, len(cache)))
    if num_alike:
        log.warning(f'warning: {describe_alike(num_alike, len(cache))}')
    with suppress(BadInput):
        save_array(path, pairs)
    return pairs


def describe_split(names: Sequence[str], pairs: np.ndarray, folds: np.ndarray) -> str:
    """Say which near-duplicates, (m, 2) pairs of rows, are in several of the (n,) folds; '' if none are."""
    split = pairs[folds[pairs[:, 0]] != folds[pairs[:, 1]]]
    if not len(split):
        return ''
    one, other = (f'{names[row]!r} (fold {folds[row]})' for row in split[0])
    count = f'{plural(len(split), "pair")} of near-duplicates in two folds'
    return f'{count}, such as {one} and {other}: scores on them are too high'


class TooFewScenes(BadInput):
    """There are fewer (n,) scenes than folds."""

    def __init__(self, message: str, scenes: np.ndarray) -> None:
        super().__init__(message)
        self.scenes = scenes


def find_scenes(
    root: Path, names: Sequence[str], pairs: np.ndarray, group: str | None, folds: int
) -> tuple[np.ndarray, str]:
    """Return the (n,) scene of each photo of a data root, and a remark on them, or ''.

    The (m, 2) pairs of near-duplicates and the groups are joined; the groups alone are taken where they are
    enough for the folds and the joined ones are not. Raises BadInput, and TooFewScenes.
    """
    groups = np.arange(len(names)) if group is None else group_names(root, names, group)
    scenes = join_groups(groups, pairs)
    count = scenes.max() + 1
    if count >= folds:
        return scenes, ''
    if group is not None and groups.max() + 1 >= folds:
        joined = f'near-duplicates join the {groups.max() + 1} groups of photos to {count}, fewer than folds'
        return groups, f'{joined}: the folds keep the groups together, and split near-duplicates'
    fault = f'found {len(names)} photos of {plural(count, "scene")}'
    if count < len(names):
        fault += ' (near-duplicates, and photos of one group, are one scene)'
    fewer = f'folds={count} in the config, ' if count > 1 else ''
    finer = 'group' if group is None else 'a group of fewer photos'
    ways = f'{fewer}{finer} in {COMPETITION_FILE}, or folds of your own with folds_csv'
    fault = f'{root}: {fault}, expected at least one for each of {folds} folds; give {ways}'
    raise TooFewScenes(fault, scenes)


def stratify(labels: np.ndarray, groups: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """Assign (n,) folds for (n, K) labels by iterative stratification (Sechidis et al., ECML PKDD 2011).

    The rarest remaining label comes first, its largest groups first, each into the fold that needs it most.
    """
    rng = np.random.default_rng(seed)
    members = np.zeros((groups.max() + 1, labels.shape[1] + 1))  # photos with each label, and all photos
    np.add.at(members, groups, np.hstack([labels, np.ones((len(labels), 1))]))
    placed = np.zeros((folds, members.shape[1]))  # the more, the less the fold needs: all are to have as many
    fold_of = np.full(len(members), -1)
    order = rng.permutation(len(members))
    while (left := order[fold_of[order] < 0]).size:
        remaining = members[left, :-1].sum(0)
        label = -1
        if remaining.any():
            label = int(np.argmin(np.where(remaining > 0, remaining, np.inf)))
            left = left[members[left, label] > 0]
        for group in left[np.argsort(-members[left, label], kind='stable')]:
            ties = rng.random(folds)
            best = min(range(folds), key=lambda k: (placed[k, label], placed[k, -1], -ties[k]))
            fold_of[group] = best
            placed[best] += members[group]
    return fold_of[groups]


def split_fold(folds: np.ndarray, fold: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows to train on and those to validate on; fold -1 trains on all. Raises BadInput."""
    if not -1 <= fold <= folds.max():
        expected = f'expected 0 to {folds.max()}, or -1 to train on all photos'
        raise BadInput(f'--fold {fold}: found no such fold, {expected}')
    return np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)


def held_out_hash(cache: Cache, rows: np.ndarray) -> str | None:
    """Hash the content of the photos that a model is not trained on, whatever their names are; None if there
    are none.
    """
    contents = sorted(cache.contents(rows).tolist())
    return f'photos-{hashlib.sha256(str(contents).encode()).hexdigest()}' if contents else None


def is_held_out(known: str | None, cache: Cache, rows: np.ndarray) -> bool:
    """Tell whether the held_out_hash of a model is of these rows of a cache. An earlier version hashed names:
    it is accepted, with a warning.
    """
    if known == held_out_hash(cache, rows):
        return True
    names = '\n'.join(sorted(cache.names(rows)))
    is_by_name = known == hashlib.sha256(names.encode()).hexdigest()
    if is_by_name:
        log.warning('warning: a model of an earlier version knows by name alone which photos it never saw')
    return is_by_name
