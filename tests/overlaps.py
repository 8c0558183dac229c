"""Data sets of any sizes whose objects may overlap: the more of a colour, the more of its class."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import yaml

NAMES = ('red', 'green', 'blue')


def write_overlaps(
    root: Path,
    sizes: Sequence[tuple[int, int]],
    names: Sequence[str] = NAMES,
    seed: int = 0,
    test: int = 1,
    **competition: Any,
) -> dict[str, np.ndarray]:
    """Write a data root of photos (H, W) with a rectangle of each class, which may overlap; return the
    (K, H, W) planes by file name. The last `test` photos are those of test.json. A class has its channel.
    """
    rng = np.random.default_rng(seed)
    root.mkdir(parents=True, exist_ok=True)
    images, annotations, planes = [], [], {}
    for number, (height, width) in enumerate(sizes):
        name = f'{number:03d}.png'
        planes[name] = np.zeros((len(names), height, width), np.uint8)
        photo = rng.integers(40, 80, (height, width, 3), np.uint8)
        for k in range(len(names)):
            h, w = int(rng.integers(height // 3, height // 2)), int(rng.integers(width // 3, width // 2))
            y, x = int(rng.integers(height - h)), int(rng.integers(width - w))
            planes[name][k, y : y + h, x : x + w] = 1
            photo[y : y + h, x : x + w, k % 3] += 140
            polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
            record = {'id': len(annotations), 'image_id': number, 'category_id': k, 'iscrowd': 0}
            annotations.append({**record, 'segmentation': [polygon]})
        images.append({'id': number, 'file_name': name, 'height': height, 'width': width})
        cv2.imwrite(str(root / name), photo[..., ::-1])
    categories = [{'id': k, 'name': name} for k, name in enumerate(names)]
    count = len(images) - test
    train = [a for a in annotations if a['image_id'] < count]
    write_json(root / 'train_all.json', images=images[:count], categories=categories, annotations=train)
    write_json(root / 'test.json', images=images[count:], categories=categories, annotations=[])
    is_multilabel = competition.setdefault('task', 'multilabel') == 'multilabel'
    classes = [*names] if is_multilabel else ['Background', *names]
    values = {'classes': classes, 'metric': 'dice', 'score_size': 'own', **competition}
    (root / 'competition.yaml').write_text(yaml.safe_dump(values))
    return planes


def write_json(path: Path, **values: Any) -> None:
    path.write_text(json.dumps(values))


def paint(planes: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Paint planes over each other as a multiclass mask has them, (H, W) ids: the smaller ones on top."""
    masks = {}
    for name, all_planes in planes.items():
        masks[name] = np.zeros(all_planes.shape[1:], np.uint8)
        for k in np.argsort(-all_planes.sum((1, 2)), kind='stable'):
            masks[name][all_planes[k] == 1] = k + 1
    return masks
