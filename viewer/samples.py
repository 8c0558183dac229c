"""What a model sees in training: photos with their masks, and samples that the augmentation makes of them.

    python viz.py augment --cfg configs/convnext.yaml --out augment.png

The samples are those of training itself, from the cache, with the seed, epoch and place that they would have.
"""

from pathlib import Path

import cv2
import numpy as np
import torch

from config import Config
from data.cache import open_cache
from data.folds import read_folds, split_fold
from dataset import TrainingSet
from models import SegModel
from utils.plotting import VIEW, Row, overlay, sheet, write_png

SAMPLES = 4  # of each photo


def main(cfg: Config, fold: int, out: Path, count: int = 6, seed: int = 0) -> None:
    """Writes a sheet of `count` photos, chosen by the seed, with SAMPLES of each. Raises BadInput."""
    cache = open_cache(cfg, 'train')
    rows, _ = split_fold(read_folds(cfg, cache), fold)
    with torch.device('meta'):  # only its mean colour is asked for
        fill = SegModel(cfg, load_weights=False).fill
    samples = TrainingSet(cfg, cache, rows, fill)
    shown = []
    for position in sorted(np.random.default_rng(seed).permutation(len(rows))[:count].tolist()):
        row = rows[position]
        pairs = [(cache.photos[row], cache.masks[row])]
        for epoch in range(SAMPLES):
            image, mask, _ = samples[epoch, position]
            pairs.append((image.permute(1, 2, 0).numpy(), mask.numpy()))
        ids = {int(k) for _, mask in pairs for k in np.unique(mask)}
        views = tuple(painted(image, mask) for image, mask in pairs)
        shown.append(Row(samples.name(position), '', views, frozenset(ids)))
    headings = ['photo', *(f'epoch {epoch}' for epoch in range(SAMPLES))]
    write_png(out, sheet(shown, headings, cfg.classes, groups=1), step=8)
    print(f'wrote {out}: {len(shown)} photos of fold {fold}, and {SAMPLES} samples of each')


def painted(image: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """(VIEW, VIEW, 3): the photo under its mask, lightly, so that both can be judged."""
    smooth = cv2.INTER_AREA if len(mask) > VIEW else cv2.INTER_LINEAR
    image = cv2.resize(np.ascontiguousarray(image), (VIEW, VIEW), interpolation=smooth)
    mask = cv2.resize(np.ascontiguousarray(mask), (VIEW, VIEW), interpolation=cv2.INTER_NEAREST)
    return overlay(image, mask, 0.4)
