"""Share among the tests a small data set that a network learns in seconds, a tiny config, and real data."""

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch

from config import CLASSES, Config, load_config
from metrics import Metric, image_counts
from utils.id_csv import IdWriter
from utils.log import log

os.environ['PATH'] = (
    f'{Path(sys.executable).parent}:{os.environ["PATH"]}'  # as in an environment that is active
)
SHARED = Path(__file__).resolve().parents[2] / 'shared'
DATA_DIR = Path(os.environ.get('DATA_DIR', SHARED / 'data'))
REFERENCE_DIR = Path(os.environ.get('REFERENCE_DIR', SHARED / 'reference' / 'heads'))
COLOURS = np.random.default_rng(0).permutation(
    np.array([(r, g, b) for r in (40, 220) for g in (40, 130, 220) for b in (40, 220)])
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Start the longest test first: at the end, one process would wait for it."""
    items.sort(key=lambda item: item.name != 'test_overfits_eight_real_photos')


@pytest.fixture(autouse=True, scope='session')
def _one_thread():
    torch.set_num_threads(1)
    cv2.setNumThreads(1)


@pytest.fixture(scope='module')
def browser():
    """Chromium, driven by Playwright."""
    from chromium import ARGS, CHROMIUM, playwright  # which skip a module where they are absent

    with playwright.sync_playwright() as drivers:
        browser = drivers.chromium.launch(executable_path=CHROMIUM, args=ARGS)
        yield browser
        browser.close()


@pytest.fixture
def deterministic() -> Iterator[None]:
    """Let torch be deterministic, as the config key does."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture(autouse=True)
def _main_is_pytest():
    """Restore __main__, which Streamlit's tests replace by a page, and which later processes look for."""
    main = sys.modules['__main__']
    yield
    sys.modules['__main__'] = main


@pytest.fixture(autouse=True)
def _log_is_pytest():
    """Take the log from the command that a test ran: its output is closed then, and caplog sees nothing."""
    yield
    for handler in log.handlers[:]:
        handler.close()
        log.removeHandler(handler)
    log.propagate = True


def _need(path: Path, variable: str) -> Path:
    if not path.exists():
        pytest.skip(f'{path.name} is missing: set {variable} to its folder')
    return path


@pytest.fixture(scope='session')
def reference_dir() -> Path:
    return _need(REFERENCE_DIR, 'REFERENCE_DIR')


@pytest.fixture(scope='session')
def boostcamp60() -> Path:
    return _need(DATA_DIR / 'boostcamp60', 'DATA_DIR')


@pytest.fixture(scope='session')
def trash481() -> Path:
    return _need(DATA_DIR / 'trash481', 'DATA_DIR')


@pytest.fixture(scope='session')
def taco() -> Path:
    return _need(DATA_DIR / 'taco' / 'annotations.json', 'DATA_DIR')


def write_set(root: Path, train: int = 24, test: int = 6, side: int = 256, seed: int = 0) -> Path:
    """Write a data root in the competition's layout: rectangles whose colour tells their class, on noise."""
    rng = np.random.default_rng(seed)
    categories = [{'id': i, 'name': name, 'supercategory': name} for i, name in enumerate(CLASSES) if i]
    (root / 'batch_01').mkdir(parents=True, exist_ok=True)
    images, annotations = [], []
    for index in range(train + test):
        photo = rng.integers(90, 160, (side, side, 3), np.uint8)
        name = f'batch_01/{index:04d}.jpg'
        images.append({'id': index, 'file_name': name, 'height': side, 'width': side})
        for k in range(3):
            category = 1 + (index * 3 + k) % 10
            w, h = (int(v) for v in rng.integers(side // 4, side // 2, 2))
            x, y = int(rng.integers(0, side - w)), int(rng.integers(0, side - h))
            annotations.append(
                {
                    'id': len(annotations),
                    'image_id': index,
                    'category_id': category,
                    'iscrowd': 0,
                    'segmentation': [[x, y, x + w, y, x + w, y + h, x, y + h]],
                    'area': float(w * h),
                    'bbox': [x, y, w, h],
                }
            )
        for a in sorted((a for a in annotations if a['image_id'] == index), key=lambda a: -a['area']):
            x, y, w, h = a['bbox']
            photo[y : y + h, x : x + w] = COLOURS[a['category_id']] + rng.integers(-8, 8, (h, w, 3))
        cv2.imwrite(str(root / name), photo[..., ::-1], [cv2.IMWRITE_JPEG_QUALITY, 95])
    train_set = {
        'images': images[:train],
        'categories': categories,
        'annotations': [a for a in annotations if a['image_id'] < train],
    }
    labels = {
        'images': images[train:],
        'categories': categories,
        'annotations': [a for a in annotations if a['image_id'] >= train],
    }
    (root / 'train_all.json').write_text(json.dumps(train_set))
    (root / 'test.json').write_text(json.dumps({**labels, 'annotations': []}))
    (root / 'test_labels.json').write_text(json.dumps(labels))
    return root


def write_rectangles(
    root: Path, height: int, width: int, boxes: dict[str, tuple[int, int, int, int, int]]
) -> dict[str, np.ndarray]:
    """Write the train_all.json of photos with a rectangle (x, y, w, h, category) each; return their masks."""
    annotations, masks = [], {}
    for i, (name, (x, y, w, h, category)) in enumerate(boxes.items()):
        polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
        annotation = {'id': i, 'image_id': i, 'category_id': category, 'iscrowd': 0, 'area': w * h}
        annotations.append({**annotation, 'segmentation': [polygon]})
        masks[name] = np.zeros((height, width), np.uint8)
        masks[name][y : y + h, x : x + w] = category
    images = [{'id': i, 'file_name': n, 'height': height, 'width': width} for i, n in enumerate(boxes)]
    categories = [{'id': i, 'name': name} for i, name in enumerate(CLASSES)]
    root.mkdir()
    coco = {'images': images, 'categories': categories, 'annotations': annotations}
    (root / 'train_all.json').write_text(json.dumps(coco))
    return masks


def write_csv(path: Path, masks: dict[str, np.ndarray]) -> Path:
    """Write a submission of (256, 256) masks by image id."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with IdWriter(path) as writer:
        for image_id, mask in masks.items():
            writer.write(image_id, mask)
    return path


@pytest.fixture(scope='session')
def shapes(tmp_path_factory) -> Path:
    """Make the small set once; a test that changes it copies it first."""
    return write_set(tmp_path_factory.mktemp('data') / 'shapes')


@pytest.fixture(scope='session')
def shared_cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp('cache')


TINY = dict(
    encoder='test_convnext.r160_in1k',
    encoder_weights='none',
    head='upernet',
    head_channels=16,
    aux_channels=8,
    folds=2,
    cache_size=256,
    image_size=64,
    crop_size=64,
    batch_size=4,
    epochs=1,
    workers=0,
    warmup_iters=0,
    device='cpu',
    amp='off',
)


@pytest.fixture
def tiny(shapes, shared_cache, tmp_path) -> Config:
    """Return a config that trains in seconds on the small set."""
    values = {
        **TINY,
        'data_root': str(shapes),
        'cache_dir': str(shared_cache),
        'output_dir': str(tmp_path / 'output'),
    }
    path = tmp_path / 'tiny.yaml'
    path.write_text('\n'.join(f'{key}: {value}' for key, value in values.items()))
    return load_config(path)


@pytest.fixture
def tiny_yaml(tiny, tmp_path) -> Path:
    """Return the file from which `tiny` was read."""
    return tmp_path / 'tiny.yaml'


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Callable[[int], Path]]:
    """Mount a file system of so many MiB; skip the test if that is not allowed."""
    folder = tmp_path / 'disk'
    folder.mkdir()

    def mount(size: int) -> Path:
        words = ['mount', '-t', 'tmpfs', '-o', f'size={size}m', 'tmpfs', str(folder)]
        if os.geteuid() or subprocess.run(words, capture_output=True, check=False).returncode:
            pytest.skip('only root can mount a small file system')
        return folder

    yield mount
    if folder.is_mount():
        subprocess.run(['umount', '-l', str(folder)], check=True)


@contextmanager
def file_limit(size: int) -> Iterator[None]:
    """Let no file grow beyond so many bytes, as if the disk were full; nor the file that pytest writes to."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def mean_iou(confusion: np.ndarray) -> float:
    """Compute the mIoU of a confusion matrix."""
    return float(Metric().score(image_counts(confusion)[None]))
