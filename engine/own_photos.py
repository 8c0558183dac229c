"""Predict photos that are in no data set: read one, predict some together, draw the overlay of a large one.

Shapes: H W the size of a photo, C bands, K classes.
"""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch

from config import Competition
from data.bands import is_array, read_bands
from data.photos import likely_range, show_range
from engine.checkpoint import Run
from engine.inference import batch_bands, decide
from utils.log import log
from utils.plotting import outline_side, overlay, to_display

BAND_ROWS = 1024  # of a photo, drawn at a time


class LargeMask:
    """The mask of a large photo, which comes in rows: ids, or a bit for each class that may overlap.

    With `keep` also its confidence, the probability of what the mask says as a byte: (H, W), or (K, H, W)
    with 0 where a class is not.
    """

    def __init__(self, size: tuple[int, int], num_classes: int, keep: bool = False) -> None:
        self.pixels = np.zeros(num_classes, np.int64)
        self.painted = np.zeros(size, np.uint8)
        self.bits: np.ndarray | None = None  # (P, H, W), a bit a class
        self.confidence: np.ndarray | None = None
        self.keep = keep

    def add(self, top: int, mask: np.ndarray, confidence: np.ndarray | None = None) -> None:
        """Add rows from `top` on: (h, W) ids, or (K, h, W) planes, and their confidence, if it is kept."""
        band = slice(top, top + mask.shape[-2])
        if self.keep:
            if self.confidence is None:
                self.confidence = np.zeros((*mask.shape[:-2], *self.painted.shape), np.uint8)
            self.confidence[..., band, :] = confidence
        if mask.ndim == 2:
            self.pixels += np.bincount(mask.ravel(), minlength=len(self.pixels))
            self.painted[band] = mask
            return
        self.pixels += np.count_nonzero(mask, axis=(1, 2))
        bits = np.packbits(mask, axis=0)
        if self.bits is None:
            self.bits = np.zeros((len(bits), *self.painted.shape), np.uint8)
        self.bits[:, band] = bits

    def rows(self, top: int, stop: int) -> np.ndarray:
        """Return rows of the mask: (h, W) ids, or (K, h, W) planes."""
        if self.bits is None:
            return self.painted[top:stop]
        return np.unpackbits(self.bits[:, top:stop], axis=0, count=len(self.pixels))

    def whole(self) -> np.ndarray:
        """Return the mask: (H, W) ids, or (K, H, W) planes."""
        return self.rows(0, len(self.painted))


def predict_photos(
    runs: Sequence[Run], photos: Sequence[np.ndarray], tta: bool = True, keep: bool = False
) -> list[LargeMask]:
    """Predict photos (H, W, C) of one free_size together, by the mean of all runs; `keep` the confidence."""
    cfg, thresholds = runs[0].cfg, runs[0].thresholds
    masks = [LargeMask(photo.shape[:2], len(cfg.classes), keep) for photo in photos]
    for parts in zip(*(batch_bands(run, photos, tta) for run in runs), strict=True):
        number, top, _ = parts[0]
        probs = sum(part for *_, part in parts) / len(runs)
        mask = decide(probs, cfg, thresholds).to(torch.uint8)
        confidence = None
        if keep:
            likely = probs * mask if cfg.competition.is_multilabel else probs.max(-3).values
            confidence = (255 * likely.float()).round().to(torch.uint8).cpu().numpy()
        masks[number].add(top, mask.cpu().numpy(), confidence)
    return masks


def draw_overlay(
    photo: np.ndarray, rows: Callable[[int, int], np.ndarray], opacity: float = 0.6
) -> np.ndarray:
    """Draw a mask, of which `rows` returns some, over its photo, a band of rows at a time."""
    side, height = outline_side(photo.shape), len(photo)
    picture = np.empty((*photo.shape[:2], 3), np.uint8)
    for top in range(0, height, BAND_ROWS):
        stop = min(top + BAND_ROWS, height)
        first, last = max(0, top - side), min(height, stop + side)  # an outline looks beyond the band
        drawn = overlay(to_display(photo[first:last]), rows(first, last), opacity, side)
        picture[top:stop] = drawn[top - first : stop - first]
    return picture


def read_single(path: Path, competition: Competition) -> np.ndarray:
    """Read a photo of any kind as (H, W, channels), as far as it decodes. Raises BadInput.

    One of more than 8 bits is scaled from `intensity`, as the training photos were, or grey and RGB ones from
    likely_range.
    """
    if competition.intensity is None and competition.channels in (1, 3) and not is_array(path):
        likely = likely_range(path)
        if likely is not None:
            log.info(f'{path}: more than 8 bits a channel: {show_range(likely)} become 0 to 255')
            competition = competition.model_copy(update={'intensity': likely})
    return read_bands(path, competition, lenient=True)
