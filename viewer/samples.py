"""Draw photos with their masks, and the augmented samples that a model sees of them in training."""

from pathlib import Path

import numpy as np
import torch

from config import Config
from data.cache import open_cache, with_statistics
from data.folds import read_folds, split_fold
from data.planes import unpack
from dataset import TrainingSet
from models import SegModel
from utils.plotting import (
    VIEW,
    Row,
    fit,
    overlay,
    regions_of,
    resize_mask,
    resize_photo,
    sheet,
    write_png,
)

SAMPLES = 4  # per photo


def main(cfg: Config, fold: int, out: Path, count: int = 6, seed: int = 0) -> None:
    """Write a sheet of `count` photos, chosen by the seed, with SAMPLES of each. Raises BadInput."""
    cache = open_cache(cfg, 'train')
    cfg = with_statistics(cfg, cache)
    train_rows, _ = split_fold(read_folds(cfg, cache), fold)
    with torch.device('meta'):  # only its fill colour is needed
        fill = SegModel(cfg, load_weights=False).fill
    samples = TrainingSet(cfg, cache, train_rows, fill)
    rows = []
    for position in sorted(np.random.default_rng(seed).permutation(len(train_rows))[:count].tolist()):
        train_row = train_rows[position]
        pairs = [(cache.photos[train_row], cache.masks[train_row])]
        for epoch in range(SAMPLES):
            image, mask, _ = samples[epoch, position]
            pairs.append((image.permute(1, 2, 0).numpy(), mask.numpy()))
        if cfg.competition.is_multilabel:
            pairs = [(image, unpack(mask, len(cfg.classes))) for image, mask in pairs]
        ids = frozenset(k for _, mask in pairs for k in regions_of(mask))
        views = tuple(draw_sample(image, mask) for image, mask in pairs)
        rows.append(Row(samples.name(position), '', views, ids))
    headings = ['photo', *(f'epoch {epoch}' for epoch in range(SAMPLES))]
    write_png(out, sheet(rows, headings, cfg.classes, groups=1), step=8)
    print(f'wrote {out}: {len(rows)} photos of fold {fold}, and {SAMPLES} samples of each')


def draw_sample(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Return the photo under its mask, tinted lightly, so that both are visible; its longer side is VIEW."""
    size = fit(image.shape[:2], VIEW)
    return overlay(resize_photo(image, size), resize_mask(mask, size), 0.4)
