"""Fit a linear probe to an encoder's features of whole photos, before the encoder is trained.

A probe is a linear classifier of features that stay as they are (Alain and Bengio, arXiv:1610.01644). A
network that learns from few photos loses some of what such a probe can read (Kumar et al., arXiv:2202.10054).

Shapes: n photos, C features, K classes.
"""

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from config import Config
from data.cache import Cache, fit_size, resize_image
from engine.inference import Predictor, autocast, group_by_shape, needs_tiles, to_images
from models import SegModel
from utils.errors import CheckFailed, join_first
from utils.progress import progress

PENALTY = 1e-3  # of the sum of the squared weights, for features of deviation 1
MOST_STEPS = 200  # of L-BFGS


def fit_probe(model: SegModel, cache: Cache, rows: np.ndarray, cfg: Config) -> int:
    """Fit the probe of a model to rows of a cache, and, where hflip is used, to their mirror images; return
    the number of photos, which are those with objects unless classes may overlap.
    """
    overlapping, first = cfg.competition.is_multilabel, cfg.competition.object_ids.start
    targets = torch.from_numpy(np.stack([class_shares(cache, row, cfg) for row in rows]))
    features = read_features(model, cache, rows, cfg)  # (V, n, C)
    if not (finite := features.isfinite().all(2).all(0).numpy()).all():
        fault = f'{join_first(cache.names(rows[~finite]))}: the features of the probe are not finite'
        raise CheckFailed(f'{fault}; set amp=bf16 or amp=off')
    if not overlapping:
        used = targets.sum(1) > 0
        targets, features = targets[used], features[:, used]
    if len(targets):
        weight, bias = fit_linear(features.flatten(0, 1), targets.repeat(len(features), 1), overlapping)
        model.probe.linear.weight[first:], model.probe.linear.bias[first:] = weight, bias
    return len(targets)


def class_shares(cache: Cache, row: int, cfg: Config) -> np.ndarray:
    """Return what the probe should say of a photo: the share of each class of objects in the pixels of all
    objects, or of classes that may overlap 1 for each that is there, (K,) from the first object on.
    """
    ids = cfg.competition.object_ids
    if cfg.competition.is_multilabel:
        return np.isin(ids, list(cache.coco.photos[row].classes)).astype(float)
    counts = np.bincount(cache.masks[row].ravel(), minlength=ids.stop)[ids.start : ids.stop]
    return counts / max(1, counts.sum())


@torch.no_grad()
def read_features(model: SegModel, cache: Cache, rows: np.ndarray, cfg: Config) -> Tensor:
    """Return the features of photos as they are predicted, and of their mirror images if hflip is used:
    (V, n, C) float64 on the CPU. A photo that is predicted in tiles or windows is resized to
    one, so that the encoder sees all of it at once.
    """
    predictor, probe, views = Predictor(model, cfg, ()), model.probe.eval(), 2 if cfg.hflip else 1
    features: list[list[Tensor]] = [[] for _ in range(views)]
    batches = group_by_shape([cache.photos.shapes[row] for row in rows], cfg.infer_batch_size)
    for batch in progress(batches, 'probe', 'batch'):
        shape = cache.photos.shapes[rows[batch[0]]]
        size = fit_size(tuple(shape[:2]), cfg.window if needs_tiles(shape, cfg) else cfg.image_size)
        if model.fixed_size:
            size = model.fixed_size, model.fixed_size
        photos = np.stack([resize_image(np.array(cache.photos[rows[position]]), size) for position in batch])
        images, _ = predictor.prepare(to_images(photos))
        for view in range(views):
            inputs = images.flip(-1) if view else images
            with autocast(cfg, inputs.device):
                features[view] += probe.features(inputs).double().cpu()
    order = np.argsort([position for batch in batches for position in batch])
    return torch.stack([torch.stack(each)[order] for each in features])


def fit_linear(features: Tensor, targets: Tensor, overlapping: bool) -> tuple[Tensor, Tensor]:
    """Fit a logistic regression of features (n, C) to targets (n, K), shares that sum to 1 or, overlapping, 0
    or 1 for each class: weights (K, C) and biases (K,).
    """
    mean, deviation = features.mean(0), features.std(0, correction=0)
    deviation = deviation.clamp(min=max(1e-3 * float(deviation.max()), 1e-12))
    inputs = (features - mean) / deviation
    weight = features.new_zeros(targets.shape[1], features.shape[1], requires_grad=True)
    bias = features.new_zeros(targets.shape[1], requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=MOST_STEPS, line_search_fn='strong_wolfe')
    loss_of = F.binary_cross_entropy_with_logits if overlapping else F.cross_entropy

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = loss_of(F.linear(inputs, weight, bias), targets, reduction='sum') / len(inputs)
        loss = loss + PENALTY * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    with torch.no_grad():
        scaled = weight / deviation
        return scaled, bias - scaled @ mean
