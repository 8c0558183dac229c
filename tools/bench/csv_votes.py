"""Benches of CSVs, votes, the search for weights, and the score; without a network."""

import contextlib
import io
import os
import subprocess
import sys
from argparse import Namespace
from pathlib import Path

import numpy as np
import pandas as pd

import ensemble
from metrics import confusion_matrix
from submission import encode_mask, read_rows
from tools.bench.cases import Case, Way, blobs, disagreeing, sample_csv
from voting.hard import Scorer, count_votes, member_table, vote
from voting.members import OofSample

MODELS = 5
CANDIDATES = 100_000
OOF_MASKS = 3272  # of the competition
FEW = 4  # rows that slow peers do


def bench_csv(args: Namespace) -> list[Case]:
    """Reading, with validation, and writing a submission."""
    masks = list(blobs(args.rows, 256, seed=0))
    path = sample_csv(args.folder / 'a.csv', masks)

    def pandas_split() -> None:
        for text in pd.read_csv(path)['PredictionString']:
            np.array(text.split(), np.uint8)

    def pandas_fromstring() -> None:
        for text in pd.read_csv(path)['PredictionString']:
            np.fromstring(text, np.uint8, sep=' ')

    def join() -> None:
        for mask in masks:
            ' '.join(map(str, mask.ravel()))

    return [
        Case(
            f'read {args.rows} rows, validated',
            {
                'ours': Way(lambda: sum(1 for _ in read_rows(path))),
                'pandas, np.array(s.split())': Way(pandas_split, 12),
                'pandas, np.fromstring': Way(pandas_fromstring, 4),
                'the bytes alone': Way(path.read_bytes),
            },
        ),
        Case(
            f'write {args.rows} rows',
            {
                'ours': Way(lambda: [encode_mask(mask) for mask in masks]),
                "' '.join(map(str, mask.ravel()))": Way(join, 25),
            },
        ),
    ]


def bench_vote(args: Namespace) -> list[Case]:
    """A hard vote of five CSVs into one."""
    masks = list(blobs(args.rows, 256, seed=0))
    paths = [
        sample_csv(args.folder / f'{seed}.csv', list(disagreeing(masks, seed))) for seed in range(MODELS)
    ]
    few = [sample_csv(args.folder / f'few{n}.csv', masks[:FEW]) for n in range(MODELS)]
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

    def with_dictionaries() -> None:
        """As teams write it: a dictionary a pixel."""
        frames = [pd.read_csv(path) for path in few]
        rows = []
        for texts in zip(*(frame['PredictionString'] for frame in frames), strict=True):
            columns = [text.split() for text in texts]
            winners = []
            for said in zip(*columns, strict=True):
                votes: dict[str, int] = {}
                for one in said:
                    votes[one] = votes.get(one, 0) + 1
                winners.append(max(votes, key=votes.get))
            rows.append(' '.join(winners))
        pd.DataFrame({'PredictionString': rows}).to_csv(args.folder / 'd.csv', index=False)

    def with_arrays() -> None:
        """As it was published after the contest: an array of counts a pixel."""
        frames = [pd.read_csv(path) for path in few]
        rows = []
        for texts in zip(*(frame['PredictionString'] for frame in frames), strict=True):
            columns = [text.split() for text in texts]
            result = ''
            for said in zip(*columns, strict=True):
                votes = np.zeros(11)
                for one in said:
                    votes[int(one)] += 1
                result += f'{votes.argmax()} '
            rows.append(result.strip())
        pd.DataFrame({'PredictionString': rows}).to_csv(args.folder / 'n.csv', index=False)

    def ours() -> None:
        with contextlib.redirect_stdout(io.StringIO()):
            ensemble.main([*map(str, paths), '--out', str(out)])

    return [
        Case(
            f'vote of {MODELS} x {args.rows} rows, validated',
            {
                'ours': Way(ours),
                'pandas, np.bincount': Way(with_pandas, 6),
                'pandas, a dictionary a pixel': Way(with_dictionaries, 300, min(1, FEW / args.rows)),
                'pandas, an array a pixel': Way(with_arrays, 300, min(1, FEW / args.rows)),
            },
        )
    ]


def bench_search(args: Namespace) -> list[Case]:
    """Weightings of five models, scored out of fold, beside voting for each of them."""
    masks = list(blobs(args.rows, 256, seed=0))
    seen = [list(disagreeing(masks, seed)) for seed in range(1, MODELS + 1)]
    samples = [OofSample(n % 5, mask, np.stack([own[n] for own in seen])) for n, mask in enumerate(masks)]
    weights = np.random.default_rng(0).integers(0, 1000, (CANDIDATES, MODELS))
    counts = count_votes(samples, MODELS, 11)

    def by_voting() -> None:
        table = member_table(weights[0], 11)
        total = sum(confusion_matrix(s.truth, vote(s.preds, table), 11) for s in samples[:FEW])
        assert total.any()

    share = FEW / (OOF_MASKS * CANDIDATES)
    return [
        Case(
            f'{CANDIDATES:,} weightings of {MODELS}, {OOF_MASKS:,} masks',
            {
                'ours, counted already': Way(lambda: Scorer(counts).scores(weights)),
                'a vote and a confusion each': Way(by_voting, 10_000, share),
            },
        ),
        Case(
            f'count the votes of {MODELS}, {args.rows} masks',
            {'ours': Way(lambda: count_votes(samples, MODELS, 11))},
        ),
    ]


def bench_metric(args: Namespace) -> list[Case]:
    """The confusion matrix of a test set."""
    masks = list(blobs(args.rows, 256, seed=0))
    preds = list(disagreeing(masks, 1))
    pairs = list(zip(masks, preds, strict=True))

    ways = {'ours': Way(lambda: [confusion_matrix(true, pred, 11) for true, pred in pairs])}
    with contextlib.suppress(ImportError):
        import torch
        from torchmetrics.functional.classification import multiclass_confusion_matrix

        def torchmetrics() -> None:
            for true, pred in pairs:
                multiclass_confusion_matrix(torch.from_numpy(pred), torch.from_numpy(true), 11)

        ways['torchmetrics'] = Way(torchmetrics, 4)
    return [Case(f'confusion of {args.rows} masks', ways)]


def bench_memory(args: Namespace) -> list[Case]:
    """Prints the peak memory of votes of 5 and of 25 CSVs, of these rows and of ten times as many."""
    masks = list(blobs(args.rows, 256, seed=0))
    for rows in (args.rows, 10 * args.rows):
        first = sample_csv(args.folder / f'{rows}.csv', masks * (rows // args.rows))
        for number in (5, 25):
            paths = [args.folder / f'{rows}-{n}.csv' for n in range(number)]
            for path in paths:
                path.unlink(missing_ok=True)
                os.link(first, path)
            said = subprocess.run(
                [sys.executable, '-c', MEASURED, *map(str, paths), '--out', str(args.folder / 'm.csv')],
                cwd=Path(__file__).parents[2],
                capture_output=True,
                text=True,
                check=True,
            )
            print(f'vote of {number} CSVs of {rows:,} rows: {int(said.stdout) / 1024:.0f} MB at the peak')
    return []


MEASURED = """
import contextlib, io, sys
import ensemble
with contextlib.redirect_stdout(io.StringIO()):
    ensemble.main(sys.argv[1:])
print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))
"""
