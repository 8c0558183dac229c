"""The app's second page: photos, their truth, what runs predicted and how they vote, one photo at a time.

Chosen by name, class and fold; ordered by score or by how far the runs differ; the keyboard's left and right
go on.

Shapes: H W a photo's own size, K classes; a row is a photo's place in its split.
"""

import html
from collections.abc import Sequence
from math import ceil
from pathlib import Path

import cv2
import numpy as np
import streamlit as st

from data.coco import CocoSet, Photo, draw_mask, read_photo
from metrics import class_iou, confusion_matrix, mean_iou
from submission import downsample_mask
from utils.plotting import PALETTE, highlight, overlay
from viewer.app_data import (
    count_source,
    count_together,
    csv_with,
    find_sources,
    fold_of,
    load_coco,
    modified,
    open_csv,
    plain,
    read_prediction,
    vote_of,
)
from viewer.html_page import html_table
from viewer.report import shown

SIDE = 640  # the longer side of a photo on the page is at most this
VIEWS = 4  # in a line
ANY = 'any'
FILE, NAME, WORST, BEST, DIFFER = 'as in the file', 'name', 'lowest score', 'highest score', 'disagreement'


def page(data: Path, output: Path, classes: tuple[str, ...], labels: Path | None = None) -> None:
    """What to look at in the side bar, one photo in the middle; labels: a COCO file with the truth of
    the test photos. Raises BadInput.
    """
    side = st.sidebar
    split = side.segmented_control(
        'Photos', ['train', 'test'], default='train', required=True, key='split', persist_state='session'
    )
    coco = load_coco(data, split, classes, labels)
    sources = find_sources(output, split)
    titles = side.multiselect(
        'Predictions out of fold' if split == 'train' else 'Predictions', list(sources),
        default=list(sources)[:2], key=f'chosen-{split}', persist_state='session',
        help='Each pixel of their vote is what most of them say; a tie goes to the first.',
    )  # fmt: skip
    chosen = {title: sources[title] for title in titles}
    rows, notes = choose_rows(coco, sources, chosen, classes)
    opacity = side.slider('Opacity', 0.0, 1.0, 0.6, 0.05, key='opacity', persist_state='session')
    if not rows:
        st.info(f'None of the {len(coco.photos):,} {split} photos is like that.')
        return
    row = rows[choose_photo([coco.photos[row].file_name for row in rows], split)]
    photo = coco.photos[row]
    found = {title: read_prediction(paths, photo.file_name, len(classes)) for title, paths in chosen.items()}
    preds = {title: pred for title, pred in found.items() if pred is not None}
    if len(preds) > 1:
        preds['vote'] = vote_of(list(preds.values()), len(classes))
    truth = draw_mask(photo) if has_truth(coco) else None
    st.caption(plain('   ·   '.join(describe(photo, row, chosen, notes, classes))))
    show_views(coco, photo, truth, preds, opacity, classes)
    for title in found.keys() - preds.keys():
        st.caption(plain(f'{title} has no prediction of this photo.'))
    if not sources:
        st.caption(plain(f'No predictions of {split} photos under {output} yet.'))
    if truth is not None and preds:
        show_scores(downsample_mask(truth), preds, classes)
    masks = [*preds.values(), *([] if truth is None else [truth])]
    with side:
        show_legend({int(k) for mask in masks for k in np.unique(mask)}, classes)


# --- which photos, and in which order ----------------------------------------------------------------------


def choose_rows(
    coco: CocoSet,
    sources: dict[str, list[Path]],
    chosen: dict[str, list[Path]],
    classes: tuple[str, ...],
) -> tuple[list[int], dict[int, str]]:
    """The rows that the side bar asks for, in its order, and what each is ordered by. Raises BadInput."""
    side, split = st.sidebar, coco.split
    part = side.text_input('Name contains', key=f'part-{split}', persist_state='session')
    category = side.selectbox(
        'Class', [ANY, *classes[1:]], key=f'class-{split}', persist_state='session',
        help='in the truth' if has_truth(coco) else 'in the vote of the predictions',
    )  # fmt: skip
    k = 0 if category == ANY else classes.index(category)
    rows = [row for row, photo in enumerate(coco.photos) if part.lower() in photo.file_name.lower()]
    if k:
        with_it = rows_with(coco, chosen, k, len(classes))
        rows = [row for row in rows if row in with_it]
    if split == 'train':
        rows = choose_fold(coco, sources, rows, len(classes))
    orders = [FILE, NAME]
    if chosen:
        orders += [WORST, BEST] if has_truth(coco) else []
        orders += [DIFFER] if len(chosen) > 1 else []
    order = side.selectbox('Order', orders, key=f'order-{split}', persist_state='session')
    if order == NAME:
        return sorted(rows, key=lambda row: coco.photos[row].file_name), {}
    if order == DIFFER:
        differ = count_together(chosen, coco, len(classes)).differ
        return sort_rows(rows, -differ), {row: f'the runs differ on {differ[row]:.2%}' for row in rows}
    if order in (WORST, BEST):
        title = next(iter(chosen))
        if len(chosen) > 1:
            title = side.selectbox('Score of', list(chosen), key='score-of')
        counted = count_source(title, chosen[title], coco, len(classes))
        values = counted.ious[:, k] if k else counted.scores
        what = f'IoU of {category}' if k else 'mIoU'
        notes = {row: f'{what} of {title} {shown(values[row])}' for row in rows}
        return sort_rows(rows, values if order == WORST else -values), notes
    return rows, {}


def has_truth(coco: CocoSet) -> bool:
    """Whether the truth of the photos is known: that of training photos is, that of test photos may be."""
    return coco.split == 'train' or any(photo.annotations for photo in coco.photos)


def rows_with(coco: CocoSet, chosen: dict[str, list[Path]], k: int, num_classes: int) -> set[int]:
    """The rows that have a class: in the truth where that is known, else in the vote."""
    if has_truth(coco):
        return {row for row, p in enumerate(coco.photos) if any(a.category_id == k for a in p.annotations)}
    return set(np.flatnonzero(count_together(chosen, coco, num_classes).pixels[:, k]).tolist())


def choose_fold(
    coco: CocoSet, sources: dict[str, list[Path]], rows: list[int], num_classes: int
) -> list[int]:
    """The rows of the fold that the side bar asks for, by the CSVs of any run's folds."""
    paths = [path for own in sources.values() for path in own if fold_of(path) is not None]
    folds = sorted({fold_of(path) for path in paths})
    fold = st.sidebar.selectbox('Fold', [ANY, *folds], key='fold', persist_state='session')
    if fold == ANY:
        return rows
    names = {
        image_id
        for path in paths
        if fold_of(path) == fold
        for image_id in open_csv(path, modified(path), num_classes).places
    }
    return [row for row in rows if coco.photos[row].file_name in names]


def sort_rows(rows: list[int], values: np.ndarray) -> list[int]:
    """The rows by their values, lowest first, equal ones as they are; those of no value are left out."""
    return sorted((row for row in rows if not np.isnan(values[row])), key=lambda row: values[row])


def choose_photo(names: Sequence[str], split: str) -> int:
    """The place to show: previous, next, go to a number, or choose a file name; all four say the same."""
    state = st.session_state
    current, listed, number, name = (f'{key}-{split}' for key in ('current', 'listed', 'number', 'name'))
    places = {file_name: place for place, file_name in enumerate(names)}

    def show(place: int) -> None:
        state[current] = names[place]

    place = places.get(state.get(current), 0)
    if state.get(listed, names) != names:  # other photos, or another order: from the first one on
        place = 0
    state[listed] = names
    show(place)
    state[number], state[name] = place + 1, names[place]
    previous, following, go_to, by_name = st.columns([1, 1, 1.2, 4], vertical_alignment='bottom')
    previous.button(
        'Previous', on_click=show, args=(place - 1,), disabled=place == 0, width='stretch',
        key='previous', shortcut='Left',
    )  # fmt: skip
    following.button(
        'Next', on_click=show, args=(place + 1,), disabled=place == len(names) - 1, width='stretch',
        key='next', shortcut='Right',
    )  # fmt: skip
    go_to.number_input(
        f'Go to (1 to {len(names)})', 1, len(names), key=number, on_change=lambda: show(state[number] - 1)
    )
    by_name.selectbox('File name', names, key=name, on_change=lambda: show(places[state[name]]))
    return place


# --- one photo ---------------------------------------------------------------------------------------------


def describe(
    photo: Photo,
    row: int,
    chosen: dict[str, list[Path]],
    notes: dict[int, str],
    classes: tuple[str, ...],
) -> list[str]:
    """What there is to say of a photo before it is looked at."""
    said = [f'{photo.width} × {photo.height}']
    for paths in list(chosen.values())[:1]:
        path = csv_with(paths, photo.file_name, len(classes))
        said += [f'fold {fold_of(path)}'] if path is not None and fold_of(path) is not None else []
    said += [notes[row]] if row in notes else []
    return said


def show_views(
    coco: CocoSet,
    photo: Photo,
    truth: np.ndarray | None,
    preds: dict[str, np.ndarray],
    opacity: float,
    classes: tuple[str, ...],
) -> None:
    """The photo, its truth where that is known, its predictions, and where these differ."""
    image = read_photo(coco, photo)
    scale = min(1.0, SIDE / max(image.shape[:2]))
    size = max(1, round(photo.width * scale)), max(1, round(photo.height * scale))  # cv2's order
    image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    masks = {'truth': truth} if truth is not None else {}
    views = [('photo', image)]
    for title, mask in (masks | preds).items():
        if title in preds and truth is not None:
            score = mean_iou(confusion_matrix(downsample_mask(truth), mask, len(classes)))
            title = f'{title}, mIoU {score:.2f}'
        fitted = cv2.resize(mask, size, interpolation=cv2.INTER_NEAREST)
        views.append((title, overlay(image, fitted, opacity)))
    if len(preds) > 1:
        differ = (np.stack(list(preds.values())) != preds['vote']).any(0)
        fitted = cv2.resize(differ.astype(np.uint8), size, interpolation=cv2.INTER_NEAREST)
        views.append((f'where they differ: {differ.mean():.2%}', highlight(image, fitted > 0)))
    in_line = max(3, ceil(len(views) / ceil(len(views) / VIEWS)))
    for start in range(0, len(views), in_line):
        line = views[start : start + in_line]
        for column, (title, view) in zip(st.columns(in_line), line, strict=False):
            column.image(
                view, caption=plain(title), width='stretch', output_format='PNG',
                alt=f'{photo.file_name}: {title}',
            )  # fmt: skip


def show_scores(truth: np.ndarray, preds: dict[str, np.ndarray], classes: tuple[str, ...]) -> None:
    """IoU of each class in this photo, a column a prediction; classes that are nowhere in it are left out."""
    confusions = {title: confusion_matrix(truth, pred, len(classes)) for title, pred in preds.items()}
    ious = np.stack([class_iou(counts) for counts in confusions.values()])
    pixels = next(iter(confusions.values())).sum(1)
    lines = [['IoU in this photo', *confusions, 'share of the truth']]
    for k, name in enumerate(classes):
        if not np.isnan(ious[:, k]).all():
            share = f'{pixels[k] / max(1, pixels.sum()):.2%}'
            lines.append([name, *(shown(iou) for iou in ious[:, k]), share])
    lines.append(['mIoU', *(shown(mean_iou(counts)) for counts in confusions.values()), ''])
    st.html(html_table(lines, total='mIoU'))


def show_legend(seen: set[int], classes: tuple[str, ...]) -> None:
    """Every class with its colour; those that are not in view are pale."""
    lines = []
    for k, name in enumerate(classes[1:], start=1):
        colour = 'rgb({}, {}, {})'.format(*PALETTE[k])
        weight = 'font-weight: 600' if k in seen else 'opacity: .45'
        swatch = f'<span class="swatch" style="background: {colour}"></span>'
        lines.append(f'<div style="{weight}">{swatch}{html.escape(name)}</div>')
    st.html(f'<div class="legend">{"".join(lines)}</div>')
