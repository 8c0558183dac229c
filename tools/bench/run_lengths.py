"""Benchmark CSVs of run lengths beside pandas and the functions that competitors pass on."""

from argparse import Namespace
from pathlib import Path

import cv2
import numpy as np
import pandas as pd

from config import Competition, Submission
from submission import MaskFormat, mask_format
from tools.bench.fixtures import Benchmark, Way

SIDE = 2048
PHOTOS = 2
CLASSES = 29
TARGET = 10  # times as long as ours


def bench_run_lengths(args: Namespace) -> list[Benchmark]:
    """Read and validate CSVs of run lengths, and write them: overlapping classes, and one class a pixel."""
    return [
        *bench_task(args.folder, 'multilabel', 'row'),
        *bench_task(args.folder, 'multiclass', 'column'),
    ]


def bench_task(folder: Path, task: str, order: str) -> list[Benchmark]:
    names = [f'class {k}' for k in range(CLASSES)]
    classes = names if task == 'multilabel' else ['Background', *names]
    how = Submission(order=order)
    competition = Competition(classes=classes, task=task, score_size='own', submission=how)
    form = mask_format(competition, {f'{n}.png': (SIDE, SIDE) for n in range(PHOTOS)})
    masks = {image_id: draw_ellipses(form, seed) for seed, image_id in enumerate(form.sizes)}
    path = folder / f'{task}.csv'

    def write() -> None:
        with form.writer(path) as writer:
            for image_id, mask in masks.items():
                writer.write(image_id, mask)

    def read() -> int:
        with form.reader(path) as reader:
            return sum(int(reader.read(image_id)[..., 0, 0].any()) for image_id in reader.image_ids)

    write()
    title = f'{PHOTOS} x {CLASSES} masks of {SIDE}x{SIDE}, {task}'
    read_ways = {'ours': Way(read), 'pandas, rle_decode': Way(lambda: usual_read(path, form), TARGET)}
    usual_path = folder / f'usual_{task}.csv'
    write_ways = {
        'ours': Way(write),
        'pandas, rle_encode': Way(lambda: usual_write(usual_path, masks, form), TARGET),
    }
    return [(f'read {title}', read_ways), (f'write {title}', write_ways)]


def draw_ellipses(form: MaskFormat, seed: int) -> np.ndarray:
    """Draw an ellipse of each class, of 2 % of the photo or so; where only one may be, the last is on top."""
    rng = np.random.default_rng(seed)
    mask = np.zeros(form.shape(f'{seed}.png'), np.uint8)
    for k in form.competition.object_ids:
        plane, value = (mask[k], 1) if mask.ndim == 3 else (mask, k)
        centre, axes = rng.integers(200, SIDE - 200, 2), rng.integers(80, 260, 2)
        cv2.ellipse(plane, centre.tolist(), axes.tolist(), float(rng.integers(180)), 0, 360, value, -1)
    return mask


def usual_read(path: Path, form: MaskFormat) -> int:
    """Read the masks as the code that competitors share does."""
    frame = pd.read_csv(path)
    total = 0
    for _, rows in frame.groupby('image_id', sort=False):
        planes = [usual_decode(text, form.competition.rle.order) for text in rows['rle'].fillna('')]
        if form.competition.is_multilabel:
            mask = np.stack(planes)
        else:
            mask = np.zeros((SIDE, SIDE), np.uint8)
            for k, plane in enumerate(planes, start=1):
                mask[plane == 1] = k
        total += int(mask[..., 0, 0].any())
    return total


def usual_decode(text: str, order: str) -> np.ndarray:
    numbers = text.split()
    starts, lengths = (np.asarray(part, dtype=int) for part in (numbers[0::2], numbers[1::2]))
    starts -= 1
    mask = np.zeros(SIDE * SIDE, np.uint8)
    for start, end in zip(starts, starts + lengths, strict=True):
        mask[start:end] = 1
    mask = mask.reshape(SIDE, SIDE)
    return mask.T if order == 'column' else mask


def usual_write(path: Path, masks: dict[str, np.ndarray], form: MaskFormat) -> None:
    """Write the masks as the code that competitors share does."""
    rows = []
    for image_id, mask in masks.items():
        for k in form.competition.object_ids:
            plane = mask[k] if mask.ndim == 3 else (mask == k).astype(np.uint8)
            text = usual_encode(plane, form.competition.rle.order)
            rows.append((image_id, form.competition.classes[k], text))
    pd.DataFrame(rows, columns=['image_id', 'class', 'rle']).to_csv(path, index=False)


def usual_encode(mask: np.ndarray, order: str) -> str:
    pixels = (mask.T if order == 'column' else mask).flatten()
    pixels = np.concatenate([[0], pixels, [0]])
    runs = np.where(pixels[1:] != pixels[:-1])[0] + 1
    runs[1::2] -= runs[::2]
    return ' '.join(str(number) for number in runs)
