"""Folds of the cross-validation: stratified over the classes present, near-duplicates together, made once."""

import csv
import hashlib
import io
from pathlib import Path

import cv2
import numpy as np
from scipy.sparse.csgraph import connected_components

from config import Config
from data.cache import Cache
from utils.errors import BadInput, one_line
from utils.files import lock, write_text

DUPLICATE_CORRELATION = 0.985  # of two photos' thumbnails; from it on they are taken for the same scene


THUMBNAIL = 24


def folds_path(cfg: Config) -> Path:
    return cfg.folds_csv or cfg.cache_dir / 'folds.csv'


def read_folds(cfg: Config, cache: Cache) -> np.ndarray:
    """(n,) int64, the fold of each photo of the training cache. Made once where folds.csv is not there.
    Raises BadInput.
    """
    path = folds_path(cfg)
    if not path.exists():
        if cfg.folds_csv is not None:
            raise BadInput(f'{path}: no such file (folds_csv)')
        with lock(cfg.cache_dir / '.folds.lock', 'assigning folds', wait=True):
            if not path.exists():
                write_folds(path, cache, make_folds(cfg, cache))
    try:
        rows = list(csv.DictReader(path.read_text(encoding='utf-8').splitlines()))
        found = {row['file_name']: int(row['fold']) for row in rows}
    except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
        raise BadInput(f'{path}: expected lines of image_id,file_name,fold: {one_line(error)}') from None
    names = [photo.file_name for photo in cache.coco.photos]
    if len(rows) != len(found) or set(found) != set(names):
        missing = next((name for name in names if name not in found), None)
        what = (
            f'lacks {missing!r}' if missing else 'lists images that the data set does not have, or one twice'
        )
        raise BadInput(
            f'{path}: is not of the data set in {cfg.data_root}: it {what}; use another cache_dir '
            'or folds_csv'
        )
    folds = np.array([found[name] for name in names])
    if set(folds.tolist()) != set(range(cfg.folds)):
        raise BadInput(
            f'{path}: has the folds {sorted(set(folds.tolist()))}, but the config key folds is {cfg.folds}'
        )
    return folds


def write_folds(path: Path, cache: Cache, folds: np.ndarray) -> None:
    text = io.StringIO()
    writer = csv.writer(text, lineterminator='\n')
    writer.writerow(['image_id', 'file_name', 'fold'])
    writer.writerows(
        (photo.image_id, photo.file_name, fold) for photo, fold in zip(cache.coco.photos, folds, strict=True)
    )
    write_text(path, text.getvalue())


def make_folds(cfg: Config, cache: Cache) -> np.ndarray:
    """(n,) folds: stratified over the classes that are present in each photo, near-duplicates together,
    seeded. Raises BadInput where there are fewer scenes than folds.
    """
    labels = np.zeros((len(cache), len(cfg.classes)), bool)
    for row, photo in enumerate(cache.coco.photos):
        labels[row, list(photo.classes)] = True
    groups = near_duplicates(np.stack([thumbnail(photo) for photo in cache.photos]))
    if groups.max() + 1 < cfg.folds:
        raise BadInput(
            f'{cfg.data_root}: {len(cache)} photos of {groups.max() + 1} scenes cannot be {cfg.folds} folds'
        )
    return stratify(labels, groups, cfg.folds, cfg.seed)


def stratify(labels: np.ndarray, groups: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """(n,) folds for (n, K) labels, each group whole: iterative stratification (Sechidis et al., ECML PKDD
    2011).

    The rarest label that is left goes first, its largest groups first, each into the fold that still wants
    it most.
    """
    rng = np.random.default_rng(seed)
    members = np.zeros((groups.max() + 1, labels.shape[1] + 1))
    np.add.at(
        members, groups, np.hstack([labels, np.ones((len(labels), 1))])
    )  # photos with each label; photos
    wanted = np.tile(members.sum(0) / folds, (folds, 1))
    fold_of = np.full(len(members), -1)
    order = rng.permutation(len(members))
    while (left := order[fold_of[order] < 0]).size:
        remaining = members[left, :-1].sum(0)
        if remaining.any():
            label = int(np.argmin(np.where(remaining > 0, remaining, np.inf)))
            left = left[members[left, label] > 0]
        else:
            label = -1
        for group in left[np.argsort(-members[left, label], kind='stable')]:
            ties = rng.random(folds)
            best = max(range(folds), key=lambda k: (wanted[k, label], wanted[k, -1], ties[k]))
            fold_of[group] = best
            wanted[best] -= members[group]
    return fold_of[groups]


def thumbnail(photo: np.ndarray) -> np.ndarray:
    """An (H, W, 3) photo as one vector, of its 24x24 picture, of mean 0 and length 1: the same, but for
    rounding, whether taken from the photo or from its picture in a cache.
    """
    small = cv2.resize(photo, (THUMBNAIL, THUMBNAIL), interpolation=cv2.INTER_AREA).astype(np.float32).ravel()
    small -= small.mean()
    return small / max(np.linalg.norm(small), 1e-6)


def near_duplicates(thumbnails: np.ndarray) -> np.ndarray:
    """(n,) group of each thumbnail: photos whose thumbnails correlate are of one scene, transitively."""
    return connected_components(thumbnails @ thumbnails.T > DUPLICATE_CORRELATION, directed=False)[1]


def split_fold(folds: np.ndarray, fold: int) -> tuple[np.ndarray, np.ndarray]:
    """The rows to train on and those to validate on; fold -1 trains on all of them and validates on none.
    Raises BadInput.
    """
    if not -1 <= fold <= folds.max():
        raise BadInput(
            f'--fold {fold}: found no such fold; there are 0 to {folds.max()}, and -1 to train on everything'
        )
    return np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)


def held_out_hash(names: list[str]) -> str | None:
    """What a checkpoint keeps of the photos whose labels it never saw: a hash of their names, or None."""
    return hashlib.sha256('\n'.join(sorted(names)).encode()).hexdigest() if names else None
