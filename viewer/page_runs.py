"""The app's first page: how the runs stand, their scores out of fold, the ensemble, curves, confusion."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import streamlit as st

from config import load_config
from data.coco import CocoSet
from engine.runs import FoldRun, best_miou, fold_number, read_metrics
from metrics import DRAWS, LEVEL, Interval, class_iou, interval
from utils.errors import BadInput
from utils.plotting import draw_confusion
from viewer.app_data import (
    Counted,
    count_source,
    find_sources,
    key_of,
    load_coco,
    plain,
    remember,
    show_error,
)
from viewer.html_page import html_table
from viewer.report import bracket, shown
from voting.recipe import format_weights, read_ensemble, score_ensemble


def page(data: Path, output: Path, classes: tuple[str, ...]) -> None:
    """Raises BadInput."""
    st.title('How the runs stand')
    coco = load_coco(data, 'train', classes)
    st.caption(plain(f'{len(coco.photos):,} training photos of {data}; runs of {output}'))
    runs, errors = find_runs(output)
    sources = find_sources(output, 'train')
    counted: dict[str, Counted] = {}
    for name, paths in sources.items():
        try:
            counted[name] = count_source(name, paths, coco, len(classes))
        except BadInput as error:
            errors.append(error)
    for error in errors:
        show_error(error)
    if not runs and not counted:
        st.info(plain(f'No runs under {output} yet: python train.py --cfg configs/demo.yaml --fold 0'))
        return
    scores = {name: score_of(name, sources[name], one, coco) for name, one in counted.items()}
    show_runs(runs, counted, scores)
    show_ensemble(output / 'ensemble.yaml', data, classes)
    if any(fold.metrics for folds in runs.values() for fold in folds):
        show_curves(runs)
    if counted:
        show_classes(counted, scores, classes)
        show_confusion(counted, scores, classes)


def find_runs(output: Path) -> tuple[dict[str, list[FoldRun]], list[BadInput]]:
    """The folds of each run, by its name, and what is wrong with those that cannot be read."""
    runs: dict[str, list[FoldRun]] = {}
    errors = []
    for run in sorted(output.glob('*')):
        for path in fold_files(run, 'config.yaml', with_all=True):
            try:
                runs.setdefault(run.name, []).append(read_fold(path.parent))
            except BadInput as error:
                errors.append(error)
    return runs, errors


def score_of(name: str, paths: list[Path], counted: Counted, coco: CocoSet) -> Interval:
    """mIoU out of fold with its interval, drawn once; nan where no pixel of a truth is known."""

    def make(_) -> Interval:
        return interval(counted.counts) if len(counted.counts) else Interval(math.nan, math.nan, math.nan)

    return remember(('interval', name, *key_of(paths), coco.fingerprint), make)


def show_runs(
    runs: dict[str, list[FoldRun]], counted: dict[str, Counted], scores: dict[str, Interval]
) -> None:
    """A row a run, the best out of fold first."""
    nowhere = Interval(-1, -1, -1)
    names = sorted({*runs, *counted}, key=lambda name: (-scores.get(name, nowhere).value, name))
    lines = [['run', 'encoder', 'head', 'folds', 'epochs', 'validation mIoU', 'mIoU out of fold',
              f'{LEVEL:.0%} interval', 'photos']]  # fmt: skip
    for name in names:
        folds = runs.get(name, [])
        first = folds[0].cfg if folds else None
        trained = ' '.join(str(fold.number) for fold in folds if fold.number >= 0)
        if any(fold.number < 0 for fold in folds):
            trained += ' all'
        epochs = {int(fold.metrics[-1]['epoch']) + 1 for fold in folds if fold.metrics}
        best = [one for one in (best_miou(fold.metrics) for fold in folds) if not math.isnan(one)]
        score = scores.get(name)
        lines.append([
            name, first.encoder if first else '-', first.head if first else '-',
            f'{trained} of {first.folds}' if first else '-',
            ' to '.join(str(epoch) for epoch in sorted({min(epochs), max(epochs)})) if epochs else '-',
            shown(float(np.mean(best))) if best else '-',
            shown(score.value) if score else '-',
            bracket(score) if score else '-',
            f'{len(counted[name].counts):,}' if name in counted else '-',
        ])  # fmt: skip
    st.html(html_table(lines))
    st.caption(
        'Validation: the mean over the folds of their best epochs. Out of fold: one confusion matrix of all '
        f'photos, each predicted by the model that had not seen it; {DRAWS:,} draws of the photos.'
    )
    waiting = [
        f'{name}: fold {fold.number} has no predictions out of fold yet: python infer.py --cfg '
        f'{fold.folder / "config.yaml"} --fold {fold.number} --split oof'
        for name, folds in runs.items()
        for fold in folds
        if fold.number >= 0 and (fold.folder / 'best.pt').exists() and not (fold.folder / 'oof.csv').exists()
    ]
    for line in waiting:
        st.caption(plain(line))


def show_ensemble(path: Path, data: Path, classes: tuple[str, ...]) -> None:
    """The recipe that ensemble.py --search chose, and on request what it does out of fold."""
    st.header('The ensemble')
    if not path.exists():
        st.caption(
            plain(f'{path} is not there yet: python ensemble.py {path.parent}/*/fold*/test.csv --search '
                  f'--out {path.with_name("submission.csv")}')
        )  # fmt: skip
        return
    try:
        members, recipe = read_ensemble(path, len(classes))
    except BadInput as error:
        show_error(error)
        return
    lines = [['member', 'weight', 'temperature']]
    for member, row, temperature in zip(members, recipe.table, recipe.temperatures, strict=True):
        lines.append([str(member.path), format_weights(row), f'{temperature:g}'])
    st.markdown(f'{recipe.rule.capitalize()} of {len(members)} members')
    st.html(html_table(lines))
    if st.button('What does it do out of fold?', key='score-ensemble'):
        try:
            with st.spinner('Voting on every photo out of fold'):
                found = score_ensemble(path, data, classes)
        except BadInput as error:
            show_error(error)
            return
        gain = found.gain()
        st.markdown(
            f'Above its best model: **{gain.value:+.4f}** ({gain.low:+.4f} to {gain.high:+.4f}), on the '
            'photos that its weights were chosen on'
        )
        st.html(html_table(found.lines()) + html_table(found.class_lines(classes)))


def show_curves(runs: dict[str, list[FoldRun]]) -> None:
    """Loss and validation mIoU of all runs, a line a run or a fold."""
    st.header('Curves')
    each = st.toggle('A line a fold', len(runs) == 1, key='each-fold', persist_state='session')
    rows = [
        {
            'run': f'{name} fold {fold.number}' if each else name,
            'epoch': int(row['epoch']) + 1,
            'mIoU': row['miou'],
            'loss': row['loss'],
        }
        for name, folds in runs.items()
        for fold in folds
        for row in fold.metrics
    ]
    table = pd.DataFrame(rows).groupby(['run', 'epoch'], as_index=False).mean()
    for column, key in zip(st.columns(2), ('mIoU', 'loss'), strict=True):
        own = table.dropna(subset=[key])
        column.markdown('**Validation mIoU**' if key == 'mIoU' else '**Training loss**')
        column.line_chart(own, x='epoch', y=key, color='run', height=320, alt=f'{key} of {", ".join(runs)}')


def show_classes(counted: dict[str, Counted], scores: dict[str, Interval], classes: tuple[str, ...]) -> None:
    """The IoU of each class in each run."""
    st.header('Classes')
    ious = {name: class_iou(one.confusion) for name, one in counted.items()}
    pixels = next(iter(counted.values())).confusion.sum(1)
    lines = [['IoU out of fold', *counted, 'share of pixels']]
    for k, name in enumerate(classes):
        share = f'{pixels[k] / max(1, pixels.sum()):.2%}'
        lines.append([name, *(shown(own[k]) for own in ious.values()), share])
    lines.append(['mIoU', *(shown(scores[name].value) for name in counted), ''])
    st.html(html_table(lines, total='mIoU'))


def show_confusion(
    counted: dict[str, Counted], scores: dict[str, Interval], classes: tuple[str, ...]
) -> None:
    """What the pixels of each class were taken for, by one run."""
    st.header('Confusion')
    names = sorted(counted, key=lambda name: -scores[name].value)
    name = st.selectbox('Run', names, key='confusion-run', width=320)
    st.image(
        draw_confusion(counted[name].confusion, classes),
        output_format='PNG',
        alt=f'confusion of {name}: rows are the truth, columns the prediction, in per cent of the row',
    )
