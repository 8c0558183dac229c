"""Show the app's first page: the runs with their out-of-fold scores, the ensemble, curves, confusion."""

import math
from pathlib import Path

import numpy as np
import pandas as pd
import streamlit as st

from config import Competition, fold_files
from data.coco import CocoSet
from engine.runs import FoldRun, read_fold
from metrics import DRAWS, LEVEL, Interval, Metric
from submission import metric_of
from utils.errors import BadInput
from utils.plotting import draw_confusion
from viewer import app_data
from viewer.app_data import SourceScores, escape_markdown, show_error
from viewer.html_page import data_url, format_interval, format_score, html_table
from viewer.report import hit_lines
from voting.recipe import format_weights, read_ensemble, score_ensemble


def page(data: Path, output: Path, competition: Competition) -> None:
    """Draw the page. Raises BadInput."""
    st.title('Runs')
    coco, metric = app_data.load_coco(data, 'train', competition), metric_of(competition)
    st.caption(escape_markdown(f'{len(coco.photos):,} training photos of {data}; runs of {output}'))
    runs, errors = find_runs(output)
    sources = app_data.find_sources(output, 'train')
    scored: dict[str, SourceScores] = {}
    for name, paths in sources.items():
        try:
            scored[name] = app_data.score_source(name, paths, coco)
        except BadInput as error:
            errors.append(error)
    for error in errors:
        show_error(error)
    if not runs and not scored:
        train = 'python train.py --cfg configs/demo.yaml --fold 0'
        st.info(escape_markdown(f'No runs under {output} yet: {train}'))
        return
    intervals = {name: interval_of(sources[name], source, coco) for name, source in scored.items()}
    show_runs(runs, scored, intervals, metric)
    try:
        app_data.show_faults(path for name in scored for path in sources[name])
        show_ensemble(output / 'ensemble.yaml', data, competition)
    except BadInput as error:
        show_error(error)
    if any(fold.metrics for folds in runs.values() for fold in folds):
        show_curves(runs, metric)
    if scored:
        show_classes(scored, intervals, competition)
        show_confusion(scored, intervals, competition.classes)


def find_runs(output: Path) -> tuple[dict[str, list[FoldRun]], list[BadInput]]:
    """Return the folds of each run by its name, and the errors of those that cannot be read."""
    runs: dict[str, list[FoldRun]] = {}
    errors = []
    for run in sorted(output.glob('*')):
        for path in fold_files(run, 'config.yaml', with_all=True):
            try:
                runs.setdefault(run.name, []).append(read_fold(path.parent))
            except BadInput as error:
                errors.append(error)
    return runs, errors


def interval_of(paths: list[Path], source: SourceScores, coco: CocoSet) -> Interval:
    """Return the out-of-fold score with its interval, computed once; nan if all pixels are IGNORED."""
    nan, counts = Interval(math.nan, math.nan, math.nan), source.counts
    key = ('interval', *app_data.key_of(paths), app_data.state_of(coco))
    metric = metric_of(coco.competition)
    return app_data.cached(key, lambda: metric.interval(counts) if len(counts) else nan)


def show_runs(
    runs: dict[str, list[FoldRun]],
    scored: dict[str, SourceScores],
    intervals: dict[str, Interval],
    metric: Metric,
) -> None:
    """Draw a table with a row per run, the best out of fold first."""
    unscored = Interval(-1, -1, -1)
    names = sorted({*runs, *scored}, key=lambda name: (-intervals.get(name, unscored).value, name))
    header = f'run|encoder|head|folds|epochs|validation {metric.label}|out-of-fold {metric.label}'
    lines = [[*header.split('|'), f'{LEVEL:.0%} interval', 'photos']]
    for name in names:
        folds = runs.get(name, [])
        first = folds[0].cfg if folds else None
        trained = ' '.join(str(fold.fold) for fold in folds if fold.fold >= 0)
        if any(fold.fold < 0 for fold in folds):
            trained += ' all'
        epochs = sorted({int(fold.metrics[-1]['epoch']) + 1 for fold in folds if fold.metrics})
        valid = [fold.score for fold in folds if not math.isnan(fold.score)]
        score = intervals.get(name)
        cells = [name]
        cells += [first.encoder, first.head, f'{trained} of {first.folds}'] if first else ['-'] * 3
        cells.append(' to '.join(map(str, dict.fromkeys([*epochs[:1], *epochs[-1:]]))) or '-')
        cells.append(format_score(float(np.mean(valid))) if valid else '-')
        cells += [format_score(score.value), format_interval(score)] if score else ['-'] * 2
        cells.append(f'{len(scored[name].counts):,}' if name in scored else '-')
        lines.append(cells)
    st.html(html_table(lines))
    over = 'the mean over photos and classes' if metric.is_by_image else 'the pixels of all photos together'
    st.caption(
        f'Validation: the mean over the folds of the epoch that is kept. Out of fold: {over}, each photo '
        'predicted by the model that was not trained on it, with a bootstrap interval from '
        f'{DRAWS:,} draws of them.'
    )
    if metric.note:
        st.caption(escape_markdown(metric.note))
    for name, folds in runs.items():
        for fold in folds:
            if fold.fold >= 0 and (fold.folder / 'best.pt').exists() and not fold.oof_csv.exists():
                infer = f'python infer.py --cfg {fold.folder / "config.yaml"} --fold {fold.fold} --split oof'
                line = f'{name}: fold {fold.fold} has no out-of-fold predictions yet: {infer}'
                st.caption(escape_markdown(line))


def show_ensemble(path: Path, data: Path, competition: Competition) -> None:
    """Draw the recipe that ensemble.py --search chose, on request with its score. Raises BadInput."""
    st.header('Ensemble')
    if not path.exists():
        search = f'python ensemble.py {path.parent}/*/fold*/test.csv --search'
        out = path.with_name('submission.csv')
        st.caption(escape_markdown(f'There is no {path} yet: {search} --out {out}'))
        return
    members, recipe = read_ensemble(path, len(competition.classes))
    lines = [['member', 'weight', 'temperature']]
    for member, row, temperature in zip(members, recipe.table, recipe.temperatures, strict=True):
        lines.append([str(member.path), format_weights(row), f'{temperature:g}'])
    st.markdown(f'{recipe.rule.capitalize()} of {len(members)} members')
    st.html(html_table(lines))
    if st.button('Score it out of fold', key='score-ensemble'):
        with st.spinner('Voting on every photo out of fold'):
            ensemble = score_ensemble(path, data, competition)
        gain = ensemble.gain()
        st.markdown(
            f'Above its best model: **{gain.value:+.4f}** ({gain.low:+.4f} to {gain.high:+.4f}). Its weights '
            'were chosen on these photos, so this is optimistic.'
        )
        st.html(html_table(ensemble.lines()) + html_table(ensemble.class_lines(competition.classes)))


def show_curves(runs: dict[str, list[FoldRun]], metric: Metric) -> None:
    """Draw the loss and the validation score of all runs, a line per run or per fold."""
    st.header('Curves')
    by_fold = st.toggle('One line per fold', len(runs) == 1, key='each-fold', persist_state='session')
    rows = [
        (f'{name} fold {fold.fold}' if by_fold else name, int(row['epoch']) + 1, row['score'], row['loss'])
        for name, folds in runs.items()
        for fold in folds
        for row in fold.metrics
    ]
    table = pd.DataFrame(rows, columns=['run', 'epoch', metric.label, 'loss'])
    table = table.groupby(['run', 'epoch'], as_index=False).mean()
    for column, key in zip(st.columns(2), (metric.label, 'loss'), strict=True):
        points = table.dropna(subset=[key])
        column.markdown('**Training loss**' if key == 'loss' else f'**Validation {key}**')
        column.line_chart(
            points, x='epoch', y=key, color='run', height=320, alt=f'{key} of {", ".join(runs)}'
        )


def show_classes(
    scored: dict[str, SourceScores], intervals: dict[str, Interval], competition: Competition
) -> None:
    """Draw a table of the score of each class in each run."""
    st.header('Classes')
    metric, classes = metric_of(competition), competition.classes
    scores = [metric.by_class(source.counts) for source in scored.values()]
    pixels = next(iter(scored.values())).counts[:, 2].sum(0)
    lines = [[f'out-of-fold {metric.class_label}', *scored, 'share of pixels']]
    for k in metric.scored_ids(len(classes)):
        share = f'{pixels[k] / max(1, pixels.sum()):.2%}'
        lines.append([classes[k], *(format_score(score[k]) for score in scores), share])
    lines.append([metric.label, *(format_score(intervals[name].value) for name in scored), ''])
    st.html(html_table(lines, total=metric.label))


def show_confusion(
    scored: dict[str, SourceScores], intervals: dict[str, Interval], classes: tuple[str, ...]
) -> None:
    """Draw the confusion matrix of one run; if classes may overlap, a table of hits and misses."""
    overlap = any(source.confusion is None for source in scored.values())
    st.header('Hits and misses' if overlap else 'Confusion matrix')
    names = sorted(scored, key=lambda name: -intervals[name].value)
    name = st.selectbox('Run', names, key='confusion-run', width=320)
    if overlap:
        st.html(html_table(hit_lines(scored[name].counts.sum(0), classes)))
        return
    st.image(
        data_url(draw_confusion(scored[name].confusion, classes)),
        alt=f'confusion matrix of {name}: rows are true classes, columns predicted ones, in % of the row',
    )
