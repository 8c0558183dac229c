"""Measures each hot path beside what people use instead, in turn, in one process.

    python bench.py csv                      # also: data, vote, train, infer, all
    python bench.py all --repeats 5 --json output/bench.json
    python bench.py train --device cuda --cfg configs/convnext_knet.yaml

A row of the table: median seconds, the spread (slowest over fastest), and how many times as long as ours it
took. Times are of this machine as it is now; the ratio is what carries over.
"""

import contextlib
import io
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import albumentations as A
import cv2
import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
import ttach
from torch import nn

import ensemble
from augment import Augment
from config import ArgumentParser, Config, load_config, run_script
from dataset import normalize
from files import write_text
from losses import segmentation_loss
from metrics import confusion_matrix
from models import SegModel
from predict import autocast, main_logits, predict_probs
from submission import SubmissionWriter, board_ids, board_probs, encode_mask, read_rows
from train import build_optimizer

Case = dict[str, Callable[[], object]]  # name of a way of doing it → the work; ours first


def bench_csv(args) -> dict[str, Case]:
    """Reading, with validation, and writing submissions."""
    path = sample_csv(args.folder / 'a.csv', args.rows, seed=0)
    masks = list(blobs(args.rows, 256, seed=0))

    def pandas_split() -> None:
        for text in pd.read_csv(path)['PredictionString']:
            np.array(text.split(), np.uint8)

    def pandas_fromstring() -> None:
        for text in pd.read_csv(path)['PredictionString']:
            np.fromstring(text, np.uint8, sep=' ')

    return {
        f'read {args.rows} rows': {
            'ours': lambda: sum(1 for _ in read_rows(path)),
            'pandas, np.array(s.split())': pandas_split,
            'pandas, np.fromstring': pandas_fromstring,
            'the bytes alone': path.read_bytes,
        },
        f'write {args.rows} rows': {
            'ours': lambda: [encode_mask(mask) for mask in masks],
            "' '.join(map(str, ...))": lambda: [' '.join(map(str, mask.ravel().tolist())) for mask in masks],
        },
    }


def bench_vote(args) -> dict[str, Case]:
    """A hard vote of five CSVs into one."""
    paths = [sample_csv(args.folder / f'{seed}.csv', args.rows, seed) for seed in range(5)]
    out = args.folder / 'out.csv'

    def with_pandas() -> None:
        frames = [pd.read_csv(path) for path in paths]
        rows = []
        for texts in zip(*(frame['PredictionString'] for frame in frames), strict=True):
            votes = np.stack([np.fromstring(text, np.int64, sep=' ') for text in texts])
            cells = votes + 11 * np.arange(votes.shape[1])
            counts = np.bincount(cells.ravel(), minlength=11 * votes.shape[1]).reshape(-1, 11)
            rows.append(' '.join(map(str, counts.argmax(1))))
        pd.DataFrame({'image_id': frames[0]['image_id'], 'PredictionString': rows}).to_csv(
            args.folder / 'p.csv', index=False
        )

    def ours() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            ensemble.main([*map(str, paths), '--out', str(out)])

    return {f'vote of 5 x {args.rows} rows': {'ours': ours, 'pandas, np.bincount': with_pandas}}


def bench_data(args) -> dict[str, Case]:
    """One training sample at 512: the standard chain, and with the heavy transforms on top."""
    rng = np.random.default_rng(0)
    mask = next(blobs(1, 512, seed=0))
    photo = cv2.resize(rng.integers(0, 256, (64, 64, 3), np.uint8), (512, 512), interpolation=cv2.INTER_CUBIC)
    cfg = load_config(args.cfg or 'configs/convnext.yaml', args.set)
    light = cfg.model_copy(
        update={'shift_rotate': 0.0, 'elastic': 0.0, 'blur': 0.0, 'noise': 0.0, 'clahe': 0.0}
    )
    seeds = iter(range(10**9))
    fill = (124, 116, 104)
    scale = [
        A.RandomScale((-0.5, 1.0), p=1),
        A.PadIfNeeded(512, 512, border_mode=cv2.BORDER_CONSTANT, fill=fill, fill_mask=255),
        A.RandomCrop(512, 512),
    ]
    colour = A.ColorJitter(brightness=0.125, contrast=0.5, saturation=0.5, hue=0.05, p=1)
    theirs = A.Compose([*scale, A.HorizontalFlip(p=0.5), colour])
    heavy = Augment(cfg, fill).heavy
    theirs_heavy = A.Compose([*scale, A.HorizontalFlip(p=0.5), colour, *(heavy.transforms if heavy else [])])

    def ours(augment: Augment) -> Callable[[], object]:
        return lambda: [augment(photo, mask, np.random.default_rng(next(seeds))) for _ in range(args.samples)]

    def albumentations(chain: A.Compose) -> Callable[[], object]:
        return lambda: [chain(image=photo, mask=mask) for _ in range(args.samples)]

    return {
        f'{args.samples} samples, standard chain': {
            'ours': ours(Augment(light, fill)),
            'albumentations': albumentations(theirs),
        },
        f'{args.samples} samples, heavy chain': {
            'ours': ours(Augment(cfg, fill)),
            'albumentations': albumentations(theirs_heavy),
        },
        '64 confusion matrices': {
            'ours': lambda: [confusion_matrix(mask, mask, 11) for _ in range(64)],
            'np.bincount, int64': lambda: [
                np.bincount(11 * mask.ravel().astype(np.int64) + mask.ravel(), minlength=121)
                for _ in range(64)
            ],
        },
    }


def bench_train(args) -> dict[str, Case]:
    """A training step of a config, beside the same network in fp32, NCHW, with the plain optimizer."""
    cfg, device = model_config(args), torch.device(args.device)
    images, masks = sample_batch(cfg, cfg.batch_size)

    def step(amp: str, memory_format: torch.memory_format, fused: bool) -> Callable[[], object]:
        config = cfg.model_copy(update={'amp': amp})
        model = SegModel(config, load_weights=False).to(device, memory_format=memory_format).train()
        optimizer = (
            build_optimizer(model, config)
            if fused
            else torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=False)
        )

        def run() -> None:
            inputs = normalize(images.to(device), model.mean, model.std).contiguous(
                memory_format=memory_format
            )
            with autocast(config, device):
                outputs = model(inputs)
            segmentation_loss(outputs, masks.to(device), model.loss_weights, config.loss).backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            synchronize(device)

        return run

    plain = step('off', torch.contiguous_format, fused=False)
    return {
        f'train {cfg.name}, a batch of {cfg.batch_size}': {
            'ours': step('auto', torch.channels_last, fused=True),
            'fp32, NCHW': plain,
        }
    }


def bench_infer(args) -> dict[str, Case]:
    """Four scales and a flip of a batch of four, to board ids."""
    cfg, device = (
        model_config(args).model_copy(update={'tta_flips': ('h',), 'tta_scales': (0.75, 1.0, 1.25, 1.5)}),
        torch.device(args.device),
    )
    images, _ = sample_batch(cfg, 4)
    model = SegModel(cfg, load_weights=False).to(device, memory_format=torch.channels_last).eval()

    class Main(nn.Module):
        def forward(self, inputs):
            return F.interpolate(main_logits(model(inputs)).float(), inputs.shape[-2:], mode='bilinear')

    views = ttach.Compose(
        [ttach.HorizontalFlip(), ttach.Scale([0.75, 1, 1.25, 1.5], interpolation='nearest')]
    )

    @torch.inference_mode()
    def plain() -> None:
        total = torch.zeros(())
        for view in views:
            inputs = view.augment_image(normalize(images.to(device), model.mean, model.std))
            inputs = F.pad(inputs, [0, -inputs.shape[-1] % 32, 0, -inputs.shape[-2] % 32])
            total = total + F.interpolate(Main()(inputs), images.shape[-2:]).softmax(1).cpu()
        total.argmax(1)

    @torch.inference_mode()
    def ours() -> None:
        probs = predict_probs(model, images, cfg, device, (cfg.cache_size, cfg.cache_size))
        board_ids(board_probs(probs, cfg.downsample), cfg.downsample).cpu()

    return {f'infer {cfg.name}, 4 photos x 8 views': {'ours': ours, "ttach's plain loop, fp32": plain}}


BENCHES = {
    'csv': bench_csv,
    'vote': bench_vote,
    'data': bench_data,
    'train': bench_train,
    'infer': bench_infer,
}


def model_config(args) -> Config:
    cfg = load_config(args.cfg or 'configs/demo.yaml', args.set)
    return cfg.model_copy(update={'device': args.device})


def sample_batch(cfg: Config, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(N, 3, C, C) uint8 noise and (N, C, C) masks."""
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(
        0, 256, (size, 3, cfg.crop_size, cfg.crop_size), generator=generator, dtype=torch.uint8
    )
    masks = np.stack(list(blobs(size, cfg.crop_size, seed=0)))
    return images, torch.from_numpy(masks)


def synchronize(device: torch.device) -> None:
    if device.type == 'cuda':
        torch.cuda.synchronize()


def blobs(count: int, side: int, seed: int):
    """Masks (side, side) uint8 of a few rectangles of the eleven classes, as a network predicts them."""
    rng = np.random.default_rng(seed)
    for _ in range(count):
        mask = np.zeros((side, side), np.uint8)
        for _ in range(rng.integers(1, 8)):
            y, x, h, w = rng.integers(0, side, 4)
            mask[y : y + h // 2 + 1, x : x + w // 2 + 1] = rng.integers(1, 11)
        yield mask


def sample_csv(path: Path, rows: int, seed: int) -> Path:
    with SubmissionWriter(path) as writer:
        for index, mask in enumerate(blobs(rows, 256, seed)):
            writer.write(f'batch_01/{index:04d}.jpg', mask)
    return path


def measure(cases: dict[str, Case], repeats: int) -> list[dict]:
    """Runs every way of each case in turn, `repeats` times after a first that does not count."""
    rows = []
    for work, ways in cases.items():
        times: dict[str, list[float]] = {name: [] for name in ways}
        for repeat in range(repeats + 1):
            for name, run in ways.items():
                started = time.perf_counter()
                run()
                if repeat:
                    times[name].append(time.perf_counter() - started)
        ours = statistics.median(times['ours'])
        for name, seconds in times.items():
            median = statistics.median(seconds)
            spread = max(seconds) / min(seconds)
            rows.append(
                {'work': work, 'way': name, 'seconds': median, 'spread': spread, 'ratio': median / ours}
            )
            print(f'{work:<40}{name:<30}{median:>10.4f} s{spread:>7.2f}x{median / ours:>9.2f}x', flush=True)
    return rows


def command(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(__doc__)
    parser.add_argument('path', choices=[*BENCHES, 'all'], help='what to measure')
    parser.add_argument('--repeats', type=int, default=3, help='default 3')
    parser.add_argument(
        '--rows', type=int, default=64, help='of a CSV; a full-size submission has 624; default 64'
    )
    parser.add_argument('--samples', type=int, default=20, help='of training data; default 20')
    parser.add_argument(
        '--device', choices=['cpu', 'cuda'], default='cpu', help='of train and infer; default cpu'
    )
    parser.add_argument('--cfg', type=Path, help='default: demo for train and infer, convnext for data')
    parser.add_argument(
        '--set', nargs='+', action='extend', default=[], metavar='KEY=VALUE', help='changes of the config'
    )
    parser.add_argument('--json', type=Path, help='also write the table here')
    args = parser.parse_args(argv)
    cv2.setNumThreads(1)
    print(
        f'{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}, numpy '
        f'{np.__version__}'
    )
    print(f'{"work":<40}{"way":<30}{"median":>12}{"spread":>8}{"ratio":>10}')
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        args.folder = Path(folder)
        for name in BENCHES if args.path == 'all' else [args.path]:
            rows += measure(BENCHES[name](args), args.repeats)
    if args.json:
        write_text(args.json, json.dumps(rows, indent=1))
        print(f'wrote {args.json}')


if __name__ == '__main__':
    run_script(command)
