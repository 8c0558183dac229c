"""Benchmark training samples and the mask cache, on photos that data/demo/scenes.py draws."""

import contextlib
import os
import sys
import types
from argparse import Namespace
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import count
from pathlib import Path

import albumentations as A
import cv2
import numpy as np
from albumentations.pytorch import ToTensorV2
from pycocotools.coco import COCO

from config import HOME, Config, load_config
from data.augment import heavy_transforms
from data.cache import open_cache
from data.coco import draw_mask
from data.demo.scenes import make_demo_set
from dataset import TrainingSet
from tools.bench.fixtures import Benchmark, Way

FILL = (124, 116, 104)
STANDARD = {'shift_rotate': 0.0, 'elastic': 0.0, 'blur': 0.0, 'noise': 0.0, 'clahe': 0.0}


def bench_data(args: Namespace) -> list[Benchmark]:
    """Make training samples for a batch, with the standard augmentation and with a config's heavy one."""
    cfg = demo_config(args)
    standard = cfg.model_copy(update=STANDARD)
    ways = {'ours, from the cache': Way(our_loader(standard)), **mmseg_ways(standard)}
    ways['organiser, albumentations'] = Way(organiser_loader(standard, None), 8)
    organiser = Way(organiser_loader(cfg, heavy_transforms(cfg, FILL)), 3)
    heavy_ways = {'ours, from the cache': Way(our_loader(cfg)), 'organiser, albumentations': organiser}
    return [
        (f'{args.photos} samples, standard chain', ways),
        (f'{args.photos} samples, heavy chain', heavy_ways),
    ]


def bench_cache(args: Namespace) -> list[Benchmark]:
    """Draw the masks of a data set, on all cores and with one annToMask after another."""
    cfg = demo_config(args)
    photos = open_cache(cfg, 'train').coco.photos[:]
    coco = quiet_coco(cfg.data_root / 'train_all.json')

    def ours() -> None:
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(draw_mask, photos * 4))

    def one_by_one() -> None:
        for image_id in list(coco.imgs) * 4:
            organiser_mask(coco, image_id)

    ways = {'ours, on all cores': Way(ours), 'annToMask, one by one': Way(one_by_one, 1.8)}
    return [(f'masks of {4 * args.photos} photos', ways)]


def demo_config(args: Namespace, default: str = 'configs/convnext.yaml') -> Config:
    """Load the config, on a demo set that is made for the benchmark, with its own cache."""
    data = args.folder / 'data'
    if not data.exists():
        make_demo_set(data, train=args.photos, test=1)
    cfg = load_config(args.cfg or default, args.set)
    changes = {'data_root': data, 'cache_dir': args.folder / 'cache', 'competition': HOME}
    return cfg.model_copy(update=changes)


def our_loader(cfg: Config) -> Callable[[], None]:
    """Return a function that reads all training samples of an epoch, another epoch at each call."""
    cache = open_cache(cfg, 'train')
    samples = TrainingSet(cfg, cache, np.arange(len(cache)), FILL)
    epochs = count()

    def run() -> None:
        epoch = next(epochs)
        for position in range(len(samples)):
            samples[epoch, position]

    return run


def organiser_loader(cfg: Config, heavy: A.Compose | None) -> Callable[[], None]:
    """Return a function that reads all samples from the files, as the organiser's dataset class does."""
    coco = quiet_coco(cfg.data_root / 'train_all.json')
    low, high = cfg.scale_range
    side, fill = cfg.crop_size, [value / 255 for value in FILL]
    chain = A.Compose(
        [
            A.RandomScale((low - 1, high - 1), p=1),
            A.PadIfNeeded(side, side, border_mode=cv2.BORDER_CONSTANT, fill=fill, fill_mask=255),
            A.RandomCrop(side, side),
            A.HorizontalFlip(p=0.5),
            A.ColorJitter(brightness=0.125, contrast=0.5, saturation=0.5, hue=0.05, p=1),
            *(heavy.transforms if heavy else []),
            ToTensorV2(),
        ]
    )

    def run() -> None:
        for image_id in coco.imgs:
            image = cv2.imread(str(cfg.data_root / coco.imgs[image_id]['file_name']))
            image = cv2.cvtColor(image, cv2.COLOR_BGR2RGB).astype(np.float32) / 255
            chain(image=image, mask=organiser_mask(coco, image_id))

    return run


def organiser_mask(coco: COCO, image_id: int) -> np.ndarray:
    """Draw a mask as the organiser's baseline does: annotations by area, largest first."""
    info = coco.imgs[image_id]
    mask = np.zeros((info['height'], info['width']), np.uint8)
    for annotation in sorted(coco.imgToAnns[image_id], key=lambda a: -a['area']):
        mask[coco.annToMask(annotation) == 1] = annotation['category_id']
    return mask


def mmseg_ways(cfg: Config) -> dict[str, Way]:
    """Return mmsegmentation's pipeline classes with the same augmentation, if they can be imported."""
    # mmcv-lite has no compiled operators, and these classes call none
    sys.modules.setdefault('mmcv._ext', NoOperators('mmcv._ext'))
    with contextlib.suppress(ImportError):
        from mmcv.transforms import Compose, LoadImageFromFile, RandomFlip, RandomResize
        from mmseg.datasets import transforms

        cache = open_cache(cfg, 'train')
        masks = cfg.data_root / 'masks'
        masks.mkdir(exist_ok=True)
        items = []
        for row, photo in enumerate(cache.coco.photos):
            path = masks / f'{row}.png'
            cv2.imwrite(str(path), cache.masks[row])
            items.append({'img_path': str(cfg.data_root / photo.file_name), 'seg_map_path': str(path)})
        side = (cfg.crop_size, cfg.crop_size)
        pipeline = Compose(
            [
                LoadImageFromFile(),
                transforms.LoadAnnotations(),
                RandomResize(scale=side, ratio_range=cfg.scale_range, keep_ratio=True),
                transforms.RandomCrop(crop_size=side, cat_max_ratio=cfg.crop_max_share),
                RandomFlip(prob=0.5),
                transforms.PhotoMetricDistortion(),
                transforms.PackSegInputs(),
            ]
        )

        def run() -> None:
            for item in items:
                pipeline({**item, 'reduce_zero_label': False, 'seg_fields': []})

        return {"mmsegmentation's pipeline": Way(run, 4)}
    return {}


class NoOperators(types.ModuleType):
    """A module that has every name; each is a function that does nothing."""

    def __getattr__(self, name: str) -> Callable[[], None]:
        if name.startswith('__'):
            raise AttributeError(name)
        return lambda: None


def quiet_coco(path: Path) -> COCO:
    """Read annotations with pycocotools, without what it prints."""
    with contextlib.redirect_stdout(None):
        return COCO(str(path))
