"""Assign the folds of the cross-validation: stratified over the classes present, near-duplicates together."""

import csv
import hashlib
import io
from pathlib import Path

import cv2
import numpy as np

from config import Config
from data.cache import Cache
from utils.errors import BadInput, one_line
from utils.files import lock, write_text

DUPLICATE_CORRELATION = 0.985  # photos whose thumbnails correlate more than this show the same scene
THUMBNAIL = 24  # pixels a side


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
                text = io.StringIO()
                writer = csv.writer(text, lineterminator='\n')
                writer.writerow(['image_id', 'file_name', 'fold'])
                for photo, fold in zip(cache.coco.photos, make_folds(cfg, cache), strict=True):
                    writer.writerow((photo.image_id, photo.file_name, fold))
                write_text(path, text.getvalue())
    try:
        rows = list(csv.DictReader(path.read_text(encoding='utf-8').splitlines()))
        fold_of = {row['file_name']: int(row['fold']) for row in rows}
    except (OSError, KeyError, TypeError, ValueError, csv.Error) as error:
        raise BadInput(f'{path}: expected lines of image_id,file_name,fold: {one_line(error)}') from None
    names = [photo.file_name for photo in cache.coco.photos]
    if len(rows) != len(fold_of) or set(fold_of) != set(names):
        missing = next((name for name in names if name not in fold_of), None)
        fault = f'lacks {missing!r}' if missing else 'lists other images, or an image twice'
        expected = f'expected the photos of {cfg.data_root}'
        raise BadInput(f'{path}: {fault}, {expected}; use another cache_dir or folds_csv')
    numbers = sorted(set(fold_of.values()))
    if numbers != list(range(cfg.folds)):
        raise BadInput(f'{path}: has the folds {numbers}, but the config key folds is {cfg.folds}')
    return np.array([fold_of[name] for name in names])


def make_folds(cfg: Config, cache: Cache) -> np.ndarray:
    """Assign (n,) folds from the seed. Raises BadInput if there are fewer scenes than folds."""
    labels = np.zeros((len(cache), len(cfg.classes)), bool)
    for row, photo in enumerate(cache.coco.photos):
        labels[row, list(photo.classes)] = True
    groups = near_duplicates(np.stack([thumbnail(photo) for photo in cache.photos]))
    if groups.max() + 1 < cfg.folds:
        count = f'{len(cache)} photos of {groups.max() + 1} scenes'
        expected = f'expected at least one scene for each of {cfg.folds} folds'
        raise BadInput(f'{cfg.data_root}: found {count}, {expected}')
    return stratify(labels, groups, cfg.folds, cfg.seed)


def stratify(labels: np.ndarray, groups: np.ndarray, folds: int, seed: int) -> np.ndarray:
    """Assign (n,) folds for (n, K) labels by iterative stratification (Sechidis et al., ECML PKDD 2011).

    The rarest remaining label comes first, its largest groups first, each into the fold that needs it most.
    """
    rng = np.random.default_rng(seed)
    members = np.zeros((groups.max() + 1, labels.shape[1] + 1))  # photos with each label, and all photos
    np.add.at(members, groups, np.hstack([labels, np.ones((len(labels), 1))]))
    demand = np.tile(members.sum(0) / folds, (folds, 1))
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
            best = max(range(folds), key=lambda k: (demand[k, label], demand[k, -1], ties[k]))
            fold_of[group] = best
            demand[best] -= members[group]
    return fold_of[groups]


def thumbnail(photo: np.ndarray) -> np.ndarray:
    """Shrink an (H, W, 3) photo to 24x24 and return it as a vector of mean 0 and length 1."""
    small = cv2.resize(photo, (THUMBNAIL, THUMBNAIL), interpolation=cv2.INTER_AREA).astype(np.float32).ravel()
    small -= small.mean()
    return small / max(np.linalg.norm(small), 1e-6)


def near_duplicates(thumbnails: np.ndarray) -> np.ndarray:
    """Return the (n,) group of each thumbnail: photos that correlate, directly or in a chain."""
    from scipy.sparse.csgraph import connected_components  # slow to import; needed only when folds are made

    return connected_components(thumbnails @ thumbnails.T > DUPLICATE_CORRELATION, directed=False)[1]


def split_fold(folds: np.ndarray, fold: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows to train on and those to validate on; fold -1 trains on all. Raises BadInput."""
    if not -1 <= fold <= folds.max():
        expected = f'expected 0 to {folds.max()}, or -1 to train on all photos'
        raise BadInput(f'--fold {fold}: found no such fold, {expected}')
    return np.flatnonzero(folds != fold), np.flatnonzero(folds == fold)


def held_out_hash(names: list[str]) -> str | None:
    """Hash the names of the photos that a model is not trained on; None if there are none."""
    return hashlib.sha256('\n'.join(sorted(names)).encode()).hexdigest() if names else None
