"""Show the app's first page: the runs with their out-of-fold scores, the ensemble, curves, confusion."""

import html
import math
import shlex
from pathlib import Path
from urllib.parse import parse_qs, urlencode

import numpy as np
import pandas as pd
import streamlit as st

from config import Competition, fold_files
from data.coco import CocoSet
from engine.provenance import first_command
from engine.runs import FoldRun, read_fold
from metrics import DRAWS, LEVEL, Interval, Metric, row_shares
from submission import metric_of
from utils.cli import in_repository, python_command
from utils.errors import BadInput
from utils.plotting import MAX_NUMBERED
from viewer import app_data
from viewer.app_data import SourceScores, escape_markdown, show_error
from viewer.components import links
from viewer.html_page import format_interval, format_score, html_table
from viewer.page_photos import WORST
from viewer.report import hit_lines
from voting.recipe import format_weights, read_ensemble, score_ensemble

STRONG_SHARE = 0.4  # of a true class: the colour of a cell above it needs a white number
CHART_HEIGHT, LEGEND_LINE = 280, 20  # pixels
SMALL_SHARE = 0.005  # of a true class: a cell below it is empty in a confusion matrix of many classes


def page(data: Path, output: Path, competition: Competition, photos: st.Page | None = None) -> None:
    """Draw the page; `photos` is the one that links to photos lead to. Raises BadInput."""
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
        train = python_command('train.py', '--cfg', in_repository('configs/demo.yaml'), '--fold', 0)
        st.info(escape_markdown(f'No runs under {output} yet: {train}'))
        return
    intervals = {name: interval_of(sources[name], source, coco) for name, source in scored.items()}
    show_runs(runs, scored, intervals, metric)
    app_data.show_faults(path for name in scored for path in sources[name])
    try:
        show_ensemble(output / 'ensemble.yaml', data, competition)
    except BadInput as error:
        show_error(error)
    if any(fold.metrics for folds in runs.values() for fold in folds):
        show_curves(runs, metric)
    if scored:
        hrefs = [
            show_classes(scored, intervals, competition),
            show_confusion(scored, intervals, competition.classes),
        ]
        if href := next(filter(None, hrefs), None):
            st.switch_page(photos, query_params=parse_qs(href.partition('?')[2]))


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
    header = f'run|out-of-fold {metric.label}|{LEVEL:.0%} interval|photos|validation {metric.label}'
    lines = [[*header.split('|'), 'folds', 'epochs', 'encoder', 'head']]
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
        cells += [format_score(score.value), format_interval(score)] if score else ['-'] * 2
        cells.append(f'{len(scored[name].counts):,}' if name in scored else '-')
        cells.append(format_score(float(np.mean(valid))) if valid else '-')
        cells.append(f'{trained} of {first.folds}' if first else '-')
        cells.append(' to '.join(map(str, dict.fromkeys([*epochs[:1], *epochs[-1:]]))) or '-')
        cells += [first.encoder, first.head] if first else ['-'] * 2
        lines.append(cells)
    links(html_table(lines), key='runs')
    show_commands(runs)
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
                words = ('--cfg', fold.folder / 'config.yaml', '--fold', fold.fold, '--split', 'oof')
                infer = python_command('infer.py', *words)
                line = f'{name}: fold {fold.fold} has no out-of-fold predictions yet: {infer}'
                st.caption(escape_markdown(line))


def show_commands(runs: dict[str, list[FoldRun]]) -> None:
    """Draw a button for each run that copies the commands that started its folds. Raises BadInput."""
    buttons = []
    for name, folds in runs.items():
        commands = '\n'.join(command_of(fold) for fold in folds)
        title = html.escape(commands)
        buttons.append(f'<button data-copy="{title}" title="{title}">{html.escape(name)}</button>')
    if buttons:
        links(f'<p class="copies">Copy the commands that trained {"".join(buttons)}</p>', key='commands')


def command_of(fold: FoldRun) -> str:
    """Return the command that started a fold; one by its config if that was not recorded. Raises BadInput."""
    by_config = python_command('train.py', '--cfg', fold.folder / 'config.yaml', '--fold', fold.fold)
    return first_command(fold.folder) or by_config


def show_ensemble(path: Path, data: Path, competition: Competition) -> None:
    """Draw the recipe that ensemble.py --search chose, on request with its score. Raises BadInput."""
    st.header('Ensemble')
    if not path.exists():
        csvs = f'{shlex.quote(str(path.parent))}/*/fold*/test.csv'  # the shell lists them
        rest = shlex.join(['--search', '--data', str(data), '--out', str(path.with_name('submission.csv'))])
        search = f'{python_command("ensemble.py")} {csvs} {rest}'
        st.caption(escape_markdown(f'There is no {path} yet: {search}'))
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
        tables = html_table(ensemble.lines()) + html_table(ensemble.class_lines(competition.classes))
        links(tables, key='ensemble')


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
        # Vega reads dots and brackets in a column's name
        points = table.dropna(subset=[key])[['run', 'epoch', key]].set_axis(['run', 'epoch', 'value'], axis=1)
        column.markdown('**Training loss**' if key == 'loss' else f'**Validation {key}**')
        legend = {'orient': 'bottom', 'columns': 1, 'title': None, 'labelLimit': 260, 'offset': 5}
        chart = {
            'height': CHART_HEIGHT + LEGEND_LINE * points['run'].nunique(),
            'mark': {'type': 'line', 'tooltip': True},
            'encoding': {
                'x': {'field': 'epoch', 'type': 'quantitative', 'axis': {'tickMinStep': 1}},
                'y': {'field': 'value', 'type': 'quantitative', 'title': key},
                'color': {'field': 'run', 'type': 'nominal', 'legend': legend},
            },
        }
        column.vega_lite_chart(points, chart, alt=f'{key} of {", ".join(runs)}')


def show_classes(
    scored: dict[str, SourceScores], intervals: dict[str, Interval], competition: Competition
) -> str | None:
    """Draw a table of the score of each class in each run; return the href of a score that was clicked."""
    st.header('Classes')
    metric, classes = metric_of(competition), competition.classes
    scores = [metric.by_class(source.counts) for source in scored.values()]
    pixels = next(iter(scored.values())).counts[:, 2].sum(0)
    lines = [[f'out-of-fold {metric.class_label}', *scored, 'share of pixels']]
    for k in metric.scored_ids(len(classes)):
        share = f'{pixels[k] / max(1, pixels.sum()):.2%}'
        lines.append([classes[k], *(format_score(score[k]) for score in scores), share])
    lines.append([metric.label, *(format_score(intervals[name].value) for name in scored), ''])
    hrefs = {
        (classes[k], name): address_of(runs=name, **{'class': classes[k], 'order': WORST}, layer=name)
        for k in competition.object_ids
        for name, score in zip(scored, scores, strict=True)
        if not np.isnan(score[k])
    }
    st.caption('A score leads to the photos with the class, the lowest score first.')
    return links(html_table(lines, metric.label, hrefs), key='classes')


def address_of(**parameters: str) -> str:
    """Return the address of the page of photos with these choices."""
    return f'photos?{urlencode(parameters)}'


def show_confusion(
    scored: dict[str, SourceScores], intervals: dict[str, Interval], classes: tuple[str, ...]
) -> str | None:
    """Draw the confusion matrix of one run, and return the href of a cell that was clicked; if classes may
    overlap, a table of hits and misses.
    """
    overlap = any(source.confusion is None for source in scored.values())
    st.header('Hits and misses' if overlap else 'Confusion matrix')
    names = sorted(scored, key=lambda name: -intervals[name].value)
    name = st.selectbox('Run', names, key='confusion-run', width=320)
    if overlap:
        st.html(html_table(hit_lines(scored[name].counts.sum(0), classes)))
        return None
    st.caption('Rows are true classes, columns predicted ones, in % of the row. A cell leads to its photos.')
    return links(confusion_table(scored[name].confusion, classes, name), key='confusion')


def confusion_table(confusion: np.ndarray, classes: tuple[str, ...], run: str) -> str:
    """Make the HTML of (K, K) pixel counts, in % of the row, with a link to the photos of each cell; of many
    classes the cells below SMALL_SHARE are empty.
    """
    shares = row_shares(confusion)
    linked = confusion > 0 if len(classes) <= MAX_NUMBERED else shares >= SMALL_SHARE
    names = [html.escape(name) for name in classes]
    header = ''.join(f'<th scope="col"><span>{name}</span></th>' for name in names)
    rows = [f'<tr><th>true class</th>{header}</tr>']
    for i, name in enumerate(names):
        cells = [f'<tr><th scope="row">{name}</th>']
        for j in range(len(names)):
            if not linked[i, j]:
                cells.append('<td></td>')
                continue
            cell = {'class': classes[i], 'predicted': classes[j]}
            address = address_of(runs=run, **cell, layer=run)
            kind = ('right' if i == j else 'wrong') + (' strong' if shares[i, j] > STRONG_SHARE else '')
            title = f'{name} predicted as {names[j]}: {confusion[i, j]:,} pixels'
            cells.append(
                f'<td class="{kind}" style="--share: {100 * shares[i, j] ** 0.7:.0f}%">'
                f'<a href="{html.escape(address)}" title="{title}">{100 * shares[i, j]:.1f}</a></td>'
            )
        rows.append(''.join(cells) + '</tr>')
    return f'<div class="scroll"><table class="confusion">{"".join(rows)}</table></div>'
