"""Benchmark CSVs, votes, the search for weights and the score, all without a network."""

import contextlib
import io
import os
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pandas as pd

import ensemble
from metrics import confusion_matrix
from tools.bench.fixtures import Benchmark, Way, perturb_masks, random_masks, write_masks
from utils.id_csv import read_rows
from utils.id_text import encode_mask
from voting.hard import count_votes, member_table, vote
from voting.members import OofSample
from voting.weights import WeightScorer

MODELS = 5
CANDIDATES = 100_000
OOF_MASKS = 3272  # training photos of the competition
FEW_ROWS = 4  # of a CSV, which the slow ways do


def bench_csv(args: Namespace) -> list[Benchmark]:
    """Read and validate a submission, and write one."""
    masks = list(random_masks(args.rows, 256, seed=0))
    path = write_masks(args.folder / 'a.csv', masks)

    def pandas_split() -> None:
        for text in pd.read_csv(path)['PredictionString']:
            np.array(text.split(), np.uint8)

    def pandas_fromstring() -> None:
        for text in pd.read_csv(path)['PredictionString']:
            np.fromstring(text, np.uint8, sep=' ')

    def join() -> None:
        for mask in masks:
            ' '.join(map(str, mask.ravel()))

    read_ways = {
        'ours': Way(lambda: sum(1 for _ in read_rows(path))),
        'pandas, np.array(s.split())': Way(pandas_split, 12),
        'pandas, np.fromstring': Way(pandas_fromstring, 4),
        'the bytes alone': Way(path.read_bytes),
    }
    ours = Way(lambda: [encode_mask(mask) for mask in masks])
    write_ways = {'ours': ours, "' '.join(map(str, mask.ravel()))": Way(join, 25)}
    return [
        (f'read {args.rows} rows, validated', read_ways),
        (f'write {args.rows} rows', write_ways),
    ]


def bench_vote(args: Namespace) -> list[Benchmark]:
    """Vote over five CSVs and write the result."""
    masks = list(random_masks(args.rows, 256, seed=0))
    paths = [write_masks(args.folder / f'{n}.csv', list(perturb_masks(masks, n))) for n in range(MODELS)]
    short_paths = [write_masks(args.folder / f'short{n}.csv', masks[:FEW_ROWS]) for n in range(MODELS)]
    out = args.folder / 'out.csv'

    def with_pandas() -> None:
        frames = [pd.read_csv(path) for path in paths]
        rows = []
        for texts in zip(*(frame['PredictionString'] for frame in frames), strict=True):
            votes = np.stack([np.fromstring(text, np.int64, sep=' ') for text in texts])
            cells = votes + 11 * np.arange(votes.shape[1])
            counts = np.bincount(cells.ravel(), minlength=11 * votes.shape[1]).reshape(-1, 11)
            rows.append(' '.join(map(str, counts.argmax(1))))
        voted = pd.DataFrame({'image_id': frames[0]['image_id'], 'PredictionString': rows})
        voted.to_csv(args.folder / 'p.csv', index=False)

    def pixel_by_pixel(winner: Callable[[tuple[str, ...]], object]) -> None:
        frames = [pd.read_csv(path) for path in short_paths]
        rows = []
        for texts in zip(*(frame['PredictionString'] for frame in frames), strict=True):
            pixels = zip(*(text.split() for text in texts), strict=True)
            rows.append(' '.join(str(winner(pixel)) for pixel in pixels))
        pd.DataFrame({'PredictionString': rows}).to_csv(args.folder / 'd.csv', index=False)

    def ours() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            ensemble.main([*map(str, paths), '--out', str(out)])

    share = min(1, FEW_ROWS / args.rows)
    ways = {
        'ours': Way(ours),
        'pandas, np.bincount': Way(with_pandas, 6),
        'pandas, a dictionary a pixel': Way(lambda: pixel_by_pixel(winner_by_dictionary), 300, share),
        'pandas, an array a pixel': Way(lambda: pixel_by_pixel(winner_by_array), 300, share),
    }
    return [(f'vote of {MODELS} x {args.rows} rows, validated', ways)]


def winner_by_dictionary(pixel: tuple[str, ...]) -> str:
    """Vote as many teams do."""
    votes: dict[str, int] = {}
    for category in pixel:
        votes[category] = votes.get(category, 0) + 1
    return max(votes, key=votes.get)


def winner_by_array(pixel: tuple[str, ...]) -> int:
    """Vote as published after the contest."""
    votes = np.zeros(11)
    for category in pixel:
        votes[int(category)] += 1
    return votes.argmax()


def bench_search(args: Namespace) -> list[Benchmark]:
    """Score candidate weights of five models out of fold, and vote once for each of them instead."""
    masks = list(random_masks(args.rows, 256, seed=0))
    preds = [list(perturb_masks(masks, seed)) for seed in range(1, MODELS + 1)]
    samples = [OofSample(n % 5, mask, np.stack([pred[n] for pred in preds])) for n, mask in enumerate(masks)]
    weights = np.random.default_rng(0).integers(0, 1000, (CANDIDATES, MODELS))
    counts = count_votes(samples, MODELS, 11)

    def by_voting() -> None:
        table = member_table(weights[0], 11)
        total = sum(confusion_matrix(s.truth, vote(s.preds, table), 11) for s in samples[:FEW_ROWS])
        assert total.any()

    share = FEW_ROWS / (OOF_MASKS * CANDIDATES)
    search_ways = {
        'ours, counted already': Way(lambda: WeightScorer(counts).scores(weights)),
        'a vote and a confusion each': Way(by_voting, 10_000, share),
    }
    count_ways = {'ours': Way(lambda: count_votes(samples, MODELS, 11))}
    return [
        (f'{CANDIDATES:,} weightings of {MODELS}, {OOF_MASKS:,} masks', search_ways),
        (f'count the votes of {MODELS}, {args.rows} masks', count_ways),
    ]


def bench_metric(args: Namespace) -> list[Benchmark]:
    """Count the confusion matrix of a test set."""
    masks = list(random_masks(args.rows, 256, seed=0))
    preds = list(perturb_masks(masks, 1))
    pairs = list(zip(masks, preds, strict=True))

    ways = {'ours': Way(lambda: [confusion_matrix(true, pred, 11) for true, pred in pairs])}
    with contextlib.suppress(ImportError):
        import torch
        from torchmetrics.functional.classification import multiclass_confusion_matrix

        def torchmetrics() -> None:
            for true, pred in pairs:
                multiclass_confusion_matrix(torch.from_numpy(pred), torch.from_numpy(true), 11)

        ways['torchmetrics'] = Way(torchmetrics, 4)
    return [(f'confusion of {args.rows} masks', ways)]


def bench_memory(args: Namespace) -> list[Benchmark]:
    """Print the peak memory of votes over 5 and 25 CSVs, with --rows rows and with ten times as many."""
    masks = list(random_masks(args.rows, 256, seed=0))
    for rows in (args.rows, 10 * args.rows):
        source = write_masks(args.folder / f'{rows}.csv', masks * (rows // args.rows))
        for number in (5, 25):
            paths = [args.folder / f'{rows}-{n}.csv' for n in range(number)]
            for path in paths:
                path.unlink(missing_ok=True)
                os.link(source, path)
            result = subprocess.run(
                [sys.executable, '-c', PEAK_OF_VOTE, *map(str, paths), '--out', str(args.folder / 'm.csv')],
                cwd=Path(__file__).parents[2],
                capture_output=True,
                text=True,
                check=True,
            )
            print(f'vote of {number} CSVs of {rows:,} rows: {int(result.stdout) / 1024:.0f} MB at the peak')
    return []


PEAK_OF_VOTE = """
import contextlib, io, sys
import ensemble
with contextlib.redirect_stdout(io.StringIO()):
    ensemble.main(sys.argv[1:])
print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))
"""
