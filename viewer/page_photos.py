"""Show the app's second page: one photo at a time with its truth, the predictions of runs, and their vote.

Shapes: H W the size of a photo, h w that of its view, K classes; a row is the index of a photo in its split.
"""

import html
from collections.abc import Sequence
from math import ceil
from pathlib import Path

import numpy as np
import streamlit as st

from config import Competition, fold_of
from data.coco import CocoSet, Photo, draw_truth, read_photo, scale_truth
from metrics import count_pixels
from submission import metric_of
from utils.plotting import (
    PALETTE,
    differing,
    fit,
    highlight,
    overlay,
    regions_of,
    resize_mask,
    resize_photo,
    score_note,
)
from viewer import app_data
from viewer.app_data import escape_markdown, open_csv, read_prediction, vote_of
from viewer.html_page import data_url, format_score, html_table

SIDE = 640  # pixels: the longer side of a photo on the page is at most this
VIEWS = 4  # per line
ANY = 'any'
Sources = dict[str, list[Path]]  # CSVs by the source's name
FILE, NAME, WORST, BEST, DIFFER = 'as in the file', 'name', 'lowest score', 'highest score', 'disagreement'


def page(data: Path, output: Path, competition: Competition, labels: Path | None = None) -> None:
    """Draw the page; labels: a COCO file with the truth of the test photos. Raises BadInput."""
    side = st.sidebar
    split = side.segmented_control(
        'Photos', ['train', 'test'], default='train', required=True, key='split', persist_state='session'
    )
    coco = app_data.load_coco(data, split, competition, labels)
    sources = app_data.find_sources(output, split)
    titles = side.multiselect(
        'Predictions out of fold' if split == 'train' else 'Predictions', list(sources),
        default=list(sources)[:2], key=f'chosen-{split}', persist_state='session',
        help='Three or more vote: a pixel gets what most of them predict; a tie goes to the first.',
    )  # fmt: skip
    chosen = {title: sources[title] for title in titles}
    rows, notes = choose_rows(coco, sources, chosen)
    opacity = side.slider('Opacity', 0.0, 1.0, 0.6, 0.05, key='opacity', persist_state='session')
    if not rows:
        st.info(f'None of the {len(coco.photos):,} {split} photos matches.')
        return
    row = rows[choose_photo([coco.photos[row].file_name for row in rows], split)]
    photo = coco.photos[row]
    preds = {title: read_prediction(paths, photo.file_name, coco) for title, paths in chosen.items()}
    missing = [title for title, pred in preds.items() if pred is None]
    preds = {title: pred for title, pred in preds.items() if pred is not None}
    if len(preds) > 2:  # of two the first would decide
        preds['vote'] = vote_of(list(preds.values()), len(competition.classes))
    truth, counts = draw_truth(photo, competition) if has_truth(coco) else None, {}
    if truth is not None:
        scored, num_classes = scale_truth(truth, competition), len(competition.classes)
        counts = {title: count_pixels(scored, pred, num_classes) for title, pred in preds.items()}
    app_data.show_faults(path for paths in chosen.values() for path in paths)
    st.caption(escape_markdown('   ·   '.join(describe(photo, row, chosen, notes, coco))))
    masks = ({} if truth is None else {'truth': truth}) | preds
    visible = show_views(coco, photo, masks, counts, opacity)
    for title in missing:
        st.caption(escape_markdown(f'{title} has no prediction for this photo.'))
    if not sources:
        st.caption(escape_markdown(f'No predictions for {split} photos under {output} yet.'))
    if counts:
        show_scores(counts, competition)
    with side:
        show_legend(visible, competition)


def choose_rows(coco: CocoSet, sources: Sources, chosen: Sources) -> tuple[list[int], dict[int, str]]:
    """Return the rows that the side bar selects, in order, and a note on each. Raises BadInput."""
    side, split, competition = st.sidebar, coco.split, coco.competition
    classes, metric = competition.classes, metric_of(competition)
    text = side.text_input('Name contains', key=f'part-{split}', persist_state='session')
    category = side.selectbox(
        'Class', [ANY, *(classes[k] for k in competition.object_ids)],
        key=f'class-{split}', persist_state='session',
        help='in the truth' if has_truth(coco) else 'in the vote, or in one of two predictions',
    )  # fmt: skip
    k = None if category == ANY else classes.index(category)
    rows = [row for row, photo in enumerate(coco.photos) if text.lower() in photo.file_name.lower()]
    if k is not None:
        with_class = rows_with(coco, chosen, k)
        rows = [row for row in rows if row in with_class]
    if split == 'train':
        rows = choose_fold(coco, sources, rows)
    orders = [FILE, NAME]
    if chosen:
        orders += [WORST, BEST] if has_truth(coco) else []
        orders += [DIFFER] if len(chosen) > 1 else []
    order = side.selectbox('Order', orders, key=f'order-{split}', persist_state='session')
    if order == NAME:
        return sorted(rows, key=lambda row: coco.photos[row].file_name), {}
    if order == DIFFER:
        shares, _ = app_data.compare_sources(chosen, coco)
        notes = {row: f'the runs differ on {shares[row]:.2%} of the pixels' for row in rows}
        return sort_rows(rows, -shares), notes
    if order in (WORST, BEST):
        title = next(iter(chosen))
        if len(chosen) > 1:
            title = side.selectbox('Score of', list(chosen), key='score-of')
        source = app_data.score_source(title, chosen[title], coco)
        values, label = source.scores, metric.label
        if k is not None:
            values, label = source.class_scores[:, k], f'{metric.class_label} of {category}'
        notes = {row: f'{label} of {title} {format_score(values[row])}' for row in rows}
        return sort_rows(rows, values if order == WORST else -values), notes
    return rows, {}


def has_truth(coco: CocoSet) -> bool:
    """Tell whether the truth of the photos is known: always for training photos, perhaps for test photos."""
    return coco.split == 'train' or any(photo.annotations for photo in coco.photos)


def rows_with(coco: CocoSet, chosen: Sources, k: int) -> set[int]:
    """Return the rows that have a class: in the truth if it is known, else as compare_sources has it."""
    if has_truth(coco):
        return {row for row, p in enumerate(coco.photos) if any(a.category_id == k for a in p.annotations)}
    _, pixels = app_data.compare_sources(chosen, coco)
    return set(np.flatnonzero(pixels[:, k]).tolist())


def choose_fold(coco: CocoSet, sources: Sources, rows: list[int]) -> list[int]:
    """Return the rows of the fold that the side bar selects, whose photos are those of the oof.csv files."""
    paths = {path: fold_of(path.parent) for csvs in sources.values() for path in csvs}
    folds = sorted({fold for fold in paths.values() if fold is not None})
    fold = st.sidebar.selectbox('Fold', [ANY, *folds], key='fold', persist_state='session')
    if fold == ANY:
        return rows
    csvs = [path for path, path_fold in paths.items() if path_fold == fold]
    readers = [open_csv(path, coco) for path in csvs]
    return [row for row in rows if any(coco.photos[row].file_name in reader for reader in readers)]


def sort_rows(rows: list[int], values: np.ndarray) -> list[int]:
    """Sort rows by their values, lowest first and stably, without those whose value is nan."""
    return sorted((row for row in rows if not np.isnan(values[row])), key=lambda row: values[row])


def choose_photo(names: Sequence[str], split: str) -> int:
    """Draw Previous, Next and the fields for number and name, all in step; return the index to show."""
    state = st.session_state
    current, listed, number, name = (f'{key}-{split}' for key in ('current', 'listed', 'number', 'name'))
    indices = {file_name: index for index, file_name in enumerate(names)}

    def show(index: int) -> None:
        state[current] = names[index]

    index = indices.get(state.get(current), 0)
    if state.get(listed, names) != names:  # other photos or another order: start at the first
        index = 0
    state[listed] = names
    show(index)
    state[number], state[name] = index + 1, names[index]
    previous, following, go_to, by_name = st.columns([1, 1, 1.2, 4], vertical_alignment='bottom')
    previous.button(
        'Previous', on_click=show, args=(index - 1,), disabled=index == 0, width='stretch',
        key='previous', shortcut='Left',
    )  # fmt: skip
    following.button(
        'Next', on_click=show, args=(index + 1,), disabled=index == len(names) - 1, width='stretch',
        key='next', shortcut='Right',
    )  # fmt: skip
    go_to.number_input(
        f'Go to (1 to {len(names)})', 1, len(names), key=number, on_change=lambda: show(state[number] - 1)
    )
    by_name.selectbox('File name', names, key=name, on_change=lambda: show(indices[state[name]]))
    return index


def describe(photo: Photo, row: int, chosen: Sources, notes: dict[int, str], coco: CocoSet) -> list[str]:
    """List the size of a photo, its fold in the first source, and the note on its sort value."""
    facts = [f'{photo.width} × {photo.height}']
    for paths in list(chosen.values())[:1]:
        path = app_data.csv_with(paths, photo.file_name, coco)
        fold = None if path is None else fold_of(path.parent)
        if fold is not None and fold >= 0:
            facts.append(f'fold {fold}')
    return facts + ([notes[row]] if row in notes else [])


def show_views(
    coco: CocoSet,
    photo: Photo,
    masks: dict[str, np.ndarray],
    counts: dict[str, np.ndarray],
    opacity: float,
) -> set[int]:
    """Draw the photo, its masks, with the scores of predictions that are counted, and the pixels on which the
    predictions differ, if there are two. Return the ids of the objects in the views.
    """
    metric = metric_of(coco.competition)
    size = fit(photo.size, min(SIDE, max(photo.size)))
    image = resize_photo(read_photo(coco, photo), size)
    views, visible = [('photo', image)], set()
    for title, mask in masks.items():
        note = score_note(metric.label, metric.score(counts[title][None])) if title in counts else ''
        resized = resize_mask(mask, size)
        visible |= regions_of(resized).keys()
        views.append((', '.join(filter(None, [title, note])), overlay(image, resized, opacity)))
    preds = [mask for title, mask in masks.items() if title != 'truth']
    if len(preds) > 1:
        differ = differing(preds)
        resized = resize_mask(differ.astype(np.uint8), size)
        views.append((f'where they differ: {differ.mean():.2%}', highlight(image, resized > 0)))
    per_line = max(3, ceil(len(views) / ceil(len(views) / VIEWS)))
    for start in range(0, len(views), per_line):
        line = views[start : start + per_line]
        for column, (title, view) in zip(st.columns(per_line), line, strict=False):
            texts = {'caption': escape_markdown(title), 'alt': f'{photo.file_name}: {title}'}
            column.image(data_url(view, compress_level=1), width='stretch', **texts)
    return visible


def show_scores(counts: dict[str, np.ndarray], competition: Competition) -> None:
    """Draw a table of the score of each class in this photo, without absent ones, from the (3, K) counts of
    each prediction.
    """
    metric = metric_of(competition)
    scores = [metric.by_class(one[None]) for one in counts.values()]
    pixels = next(iter(counts.values()))[2]
    lines = [[f'{metric.class_label} in this photo', *counts, 'share of the truth']]
    for k in metric.scored_ids(len(competition.classes)):
        if any(one[:, k].any() for one in counts.values()):
            share = f'{pixels[k] / max(1, pixels.sum()):.2%}'
            lines.append([competition.classes[k], *(format_score(score[k]) for score in scores), share])
    lines.append([metric.label, *(format_score(metric.score(one[None])) for one in counts.values()), ''])
    st.html(html_table(lines, total=metric.label))


def show_legend(visible: set[int], competition: Competition) -> None:
    """Draw every class of objects with its colour; classes that are in no view are pale."""
    lines = []
    for k in competition.object_ids:
        colour = 'rgb({}, {}, {})'.format(*PALETTE[k])
        weight = 'font-weight: 600' if k in visible else 'opacity: .45'
        swatch = f'<span class="swatch" style="background: {colour}"></span>'
        lines.append(f'<div style="{weight}">{swatch}{html.escape(competition.classes[k])}</div>')
    st.html(f'<div class="legend">{"".join(lines)}</div>')
