"""Show the app's second page: a grid of photos, and each with its truth, the predictions of runs, and their
vote. The address of the page holds what is chosen, so that a link shows the same.

Shapes: H W the size of a photo, h w that of its view, K classes; a row is the index of a photo in its split.
"""

import html
from collections.abc import Callable, Sequence
from functools import partial
from math import ceil
from pathlib import Path
from time import monotonic
from typing import Any
from urllib.parse import parse_qs, urlencode

import cv2
import numpy as np
import streamlit as st

from config import HOME, Competition, fold_of
from data.coco import CocoSet, Photo, draw_truth, read_photo, scale_truth
from metrics import IGNORED, count_pixels
from submission import metric_of
from utils.errors import BadInput
from utils.palette import PALETTES
from utils.plotting import (
    WRONG,
    differing,
    fit,
    innermost,
    overlay,
    regions_of,
    resize_mask,
    resize_photo,
    score_note,
)
from viewer import app_data
from viewer.app_data import escape_markdown, modified, open_csv, read_prediction, vote_of
from viewer.components import links, photo_views
from viewer.html_page import data_url, format_score, html_table

SIDE = 2048  # pixels: the longer side of a photo on the page is at most this
NAMED_SIDE = 800  # pixels: the longer side at most at which objects are found for their names
THUMBNAIL = 240  # pixels: the same in the grid
PER_PAGE = 30  # photos, in lines of 6, 5 or 3
STALE = 10  # seconds for which an address may name a photo that was left
MAX_LEGEND = 40  # classes: of more, the legend has those in the photo
MIN_NAMED = 0.004  # of the photo's pixels: a smaller object has its name on hover alone
NAMES_PER_CLASS, NAMES = 3, 12  # objects in a view that have their names
ANY, PHOTO, TRUTH = 'any', 'photo', 'truth'
COLOURS = {'distinct': 'distinct to every eye', 'contest': "the contest's"}
FILE, NAME, WORST, BEST, DIFFER = 'as in the file', 'name', 'lowest score', 'highest score', 'disagreement'
CONFUSED = 'most confused'
KINDS = {'train': 'training', 'test': 'test'}  # of photos, by their split
Sources = dict[str, list[Path]]  # CSVs by the source's name
Notes = dict[int, str]


def page(data: Path, output: Path, competition: Competition, labels: Path | None = None) -> None:
    """Draw the page; labels: a COCO file with the truth of the test photos. Raises BadInput."""
    side = st.sidebar
    split = side.segmented_control(
        'Photos', ['train', 'test'], default='train', required=True, key='split', bind='query-params',
        on_change=show_grid_again,
    )  # fmt: skip
    coco = app_data.load_coco(data, split, competition, labels)
    sources = app_data.find_sources(output, split)
    titles = side.multiselect(
        'Predictions out of fold' if split == 'train' else 'Predictions', list(sources),
        default=list(sources)[:2], key='runs' if split == 'train' else 'test-runs', bind='query-params',
        help='Three or more vote: a pixel gets what most of them predict; a tie goes to the first.',
    )  # fmt: skip
    chosen = {title: sources[title] for title in titles}
    rows, notes = choose_rows(coco, sources, chosen)
    palette = choose_palette(competition)
    app_data.show_faults(path for paths in chosen.values() for path in paths)
    if not sources:
        st.caption(escape_markdown(f'No predictions for {KINDS[split]} photos under {output} yet.'))
    name = asked_photo()
    if name is None:
        show_grid(coco, rows, notes, chosen, palette)
    else:
        show_photo(coco, name, rows, notes, chosen, palette)


def show_grid_again() -> None:
    """Leave the photo that is shown, since other photos are chosen."""
    if name := st.query_params.pop('photo', None):
        st.session_state.left = name, monotonic()
    st.session_state.page = 1


def clear_filters() -> None:
    """Choose all photos again."""
    st.session_state.name = ''
    for key in ('class', 'predicted', 'fold'):
        if key in st.session_state:
            st.session_state[key] = ANY


def asked_photo() -> str | None:
    """Return the photo in the address, None for the grid. The browser may give back one that was just left,
    with an address from before: Streamlit writes its widgets' parameters into the address that it remembers.
    """
    name, (left, since) = st.query_params.get('photo'), st.session_state.get('left', (None, 0))
    if name is not None and name == left and monotonic() - since < STALE:
        del st.query_params['photo']
        return None
    return name


def choose_palette(competition: Competition) -> str:
    """Return which of PALETTES colours the classes; the home contest has one for its own."""
    if competition.classes != HOME.classes:
        return 'distinct'
    return st.sidebar.selectbox(
        'Colours', list(PALETTES), format_func=COLOURS.get, key='colours', bind='query-params'
    )


# --- which photos, and in which order -----------------------------------------------------------------------


def choose_rows(coco: CocoSet, sources: Sources, chosen: Sources) -> tuple[list[int], Notes]:
    """Return the rows that the side bar selects, in order, and a note on each. Raises BadInput."""
    side, competition = st.sidebar, coco.competition
    classes, known = competition.classes, has_truth(coco)
    options = {'bind': 'query-params', 'on_change': show_grid_again}
    text = side.text_input('Name contains', key='name', **options)
    rows = [row for row, name in enumerate(coco.photos.names()) if text.lower() in name.lower()]
    ids = range(len(classes)) if known and not competition.is_multilabel else competition.object_ids
    category = side.selectbox(
        'Class', [ANY, *(classes[k] for k in ids)], key='class',
        help='in the truth' if known else 'in the vote, or in one of two predictions', **options,
    )  # fmt: skip
    k = None if category == ANY else classes.index(category)
    predicted, title = None, next(iter(chosen), None)
    if known and chosen:
        if not competition.is_multilabel:
            choice = side.selectbox('Predicted as', [ANY, *classes], key='predicted', **options)
            predicted = None if choice == ANY else classes.index(choice)
        if len(chosen) > 1:
            title = side.selectbox('Scores of', list(chosen), key='of', **options)
    if k is not None and not (known and k == 0):
        with_class = rows_with(coco, chosen, k)
        rows = [row for row in rows if row in with_class]
    if coco.split == 'train':
        rows = choose_fold(coco, sources, rows, options)
    orders = [CONFUSED] if predicted is not None else []
    orders += [FILE, NAME]
    orders += [WORST, BEST] if known and chosen else []
    orders += [DIFFER] if len(chosen) > 1 else []
    order = side.selectbox('Order', orders, key='order', **options)
    notes: Notes = {}
    if predicted is not None:
        rows, notes = confused_rows(coco, rows, title, chosen[title], (k, predicted))
    if order == NAME:
        rows = sorted(rows, key=coco.photos.names().__getitem__)
    elif order == DIFFER:
        shares, _ = app_data.compare_sources(chosen, coco)
        rows, notes = sort_rows(rows, -shares), {row: f'differ on {shares[row]:.2%}' for row in rows}
    elif order in (WORST, BEST):
        metric = metric_of(competition)
        source = app_data.score_source(title, chosen[title], coco)
        values, label = source.scores, metric.label
        if k is not None:
            values, label = source.class_scores[:, k], f'{metric.class_label} of {category}'
        notes = {row: f'{label} {format_score(values[row])}' for row in rows}
        rows = sort_rows(rows, values if order == WORST else -values)
    return rows, notes


def has_truth(coco: CocoSet) -> bool:
    """Tell whether the truth of the photos is known: always for training photos, perhaps for test photos."""
    return coco.split == 'train' or any(photo.annotations for photo in coco.photos)


def rows_with(coco: CocoSet, chosen: Sources, k: int) -> set[int]:
    """Return the rows that have a class: in the truth if it is known, else as compare_sources has it."""
    if has_truth(coco):
        return {row for row, p in enumerate(coco.photos) if any(a.category_id == k for a in p.annotations)}
    _, pixels = app_data.compare_sources(chosen, coco)
    return set(np.flatnonzero(pixels[:, k]).tolist())


def choose_fold(coco: CocoSet, sources: Sources, rows: list[int], options: dict[str, Any]) -> list[int]:
    """Return the rows of the fold that the side bar selects, whose photos are those of the oof.csv files."""
    paths = {path: fold_of(path.parent) for csvs in sources.values() for path in csvs}
    folds = sorted({fold for fold in paths.values() if fold is not None})
    fold = st.sidebar.selectbox('Fold', [ANY, *folds], key='fold', **options)
    if fold == ANY:
        return rows
    csvs = [path for path, path_fold in paths.items() if path_fold == fold]
    readers, names = [open_csv(path, coco) for path in csvs], coco.photos.names()
    return [row for row in rows if any(names[row] in reader for reader in readers)]


def confused_rows(
    coco: CocoSet, rows: list[int], title: str, paths: list[Path], cell: tuple[int | None, int]
) -> tuple[list[int], Notes]:
    """Return the rows with pixels in a cell (true class, predicted class) of a run's confusion matrix, most
    first, and a note on each; without a true class, those of all other classes. Raises BadInput.
    """
    confused = app_data.score_source(title, paths, coco).confused
    true, predicted = cell
    in_cell = (confused[:, 2] == predicted) & (
        confused[:, 1] != predicted if true is None else confused[:, 1] == true
    )
    pixels = np.bincount(confused[in_cell, 0], confused[in_cell, 3], len(coco.photos)).astype(int)
    found = sorted((row for row in rows if pixels[row]), key=lambda row: -pixels[row])
    return found, {row: f'{pixels[row]:,} such pixels' for row in found}


def sort_rows(rows: list[int], values: np.ndarray) -> list[int]:
    """Sort rows by their values, lowest first and stably, without those whose value is nan."""
    return sorted((row for row in rows if not np.isnan(values[row])), key=lambda row: values[row])


# --- the grid -----------------------------------------------------------------------------------------------


def show_grid(coco: CocoSet, rows: list[int], notes: Notes, chosen: Sources, palette: str) -> None:
    """Draw a page of thumbnails, each a link to its photo. Raises BadInput."""
    if not rows:
        st.info(f'None of the {len(coco.photos):,} {KINDS[coco.split]} photos matches.')
        st.button('Clear the filters', on_click=clear_filters, key='clear')
        return
    pages = ceil(len(rows) / PER_PAGE)
    st.session_state.page = min(pages, st.session_state.get('page', 1))
    layers = [PHOTO, *([TRUTH] if has_truth(coco) else []), *chosen]
    with st.container(horizontal=True, vertical_alignment='bottom'):
        step_buttons(
            partial(st.session_state.__setitem__, 'page'), st.session_state.page, range(1, pages + 1)
        )
        st.number_input(f'Page, of {pages:,}', 1, pages, key='page', bind='query-params', width=130)
        layer = st.selectbox('Thumbnails show', layers, key='layer', bind='query-params', width=200)
    start = (st.session_state.page - 1) * PER_PAGE
    part = rows[start : start + PER_PAGE]
    matches = f'{len(rows):,} of {len(coco.photos):,} {KINDS[coco.split]} photos'
    st.caption(f'{matches}, {start + 1:,} to {start + len(part):,}')
    tiles = [tile(coco, row, notes.get(row, ''), layer, chosen, palette) for row in part]
    if href := links(f'<div class="grid">{"".join(tiles)}</div>', key='grid'):
        st.session_state.pop('left', None)
        st.query_params['photo'] = parse_qs(href.removeprefix('?'))['photo'][0]
        st.rerun()


def step_buttons(show: Callable[[Any], None], current: Any, places: Sequence[Any]) -> None:
    """Draw Previous and Next, which keys press too, to step through `places` from the current one."""
    index = places.index(current) if current in places else -1
    for label, key, place in (('Previous', 'Left', index - 1), ('Next', 'Right', index + 1)):
        inside = 0 <= place < len(places)
        st.button(
            label, on_click=show, args=(places[place] if inside else None,), disabled=not inside,
            key=label.lower(), shortcut=key,
        )  # fmt: skip


def tile(coco: CocoSet, row: int, note: str, layer: str, chosen: Sources, palette: str) -> str:
    """Make the HTML of a thumbnail: a link to its photo, whose picture may be missing."""
    photo = coco.photos[row]
    name = html.escape(photo.file_name)
    try:
        picture = f'<img alt="{name}" src="{thumbnail(coco, photo, layer, chosen.get(layer, []), palette)}">'
    except BadInput as error:
        picture = f'<span class="missing">{html.escape(str(error))}</span>'
    address = html.escape('?' + urlencode(address_of(photo.file_name), doseq=True))
    text = f'<span>{html.escape(photo.file_name.rpartition("/")[2])}</span><span>{html.escape(note)}</span>'
    return f'<a href="{address}" title="{name}">{picture}{text}</a>'


def address_of(file_name: str) -> dict[str, list[str]]:
    """Return the parameters of the address of a photo: those of this page, and its name."""
    parameters = {key: st.query_params.get_all(key) for key in st.query_params}
    return parameters | {'photo': [file_name]}


def thumbnail(coco: CocoSet, photo: Photo, layer: str, paths: list[Path], palette: str) -> str:
    """Return a small picture as a data URL, drawn once while its files stay the same. Raises BadInput."""
    path, csv = coco.path(photo), app_data.csv_with(paths, photo.file_name, coco)
    state = modified(path), csv, csv and modified(csv), app_data.state_of(coco)
    return _thumbnail(photo.file_name, palette, layer, state, coco, photo, csv)


@st.cache_data(max_entries=4000, show_spinner=False)
def _thumbnail(
    name: str, palette: str, layer: str, state: tuple, _coco: CocoSet, _photo: Photo, _csv: Path | None
) -> str:
    size = fit(_photo.size, THUMBNAIL)
    picture = resize_photo(read_photo(_coco, _photo), size)
    mask = draw_truth(_photo, _coco.competition) if layer == TRUTH else None
    if _csv is not None:
        mask = open_csv(_csv, _coco).read(name)
    if mask is not None:
        picture = overlay(picture, resize_mask(mask, size), palette=PALETTES[palette])
    return data_url(picture, 'jpeg', quality=85)


# --- a photo ------------------------------------------------------------------------------------------------


def show_photo(
    coco: CocoSet, name: str, rows: list[int], notes: Notes, chosen: Sources, palette: str
) -> None:
    """Draw a photo with its masks and scores. Raises BadInput, also if there is no photo of the name."""
    competition, all_names = coco.competition, coco.photos.names()
    names = [all_names[row] for row in rows]
    show_steps(names, name)
    if name not in all_names:
        raise BadInput(
            f'{coco.root}: has no {KINDS[coco.split]} photo {name!r}; G shows the grid of those it has'
        )
    row = all_names.index(name)
    photo = coco.photos[row]
    preds = {title: read_prediction(paths, name, coco) for title, paths in chosen.items()}
    missing = [title for title, pred in preds.items() if pred is None]
    preds = {title: pred for title, pred in preds.items() if pred is not None}
    if len(preds) > 2:  # of two the first would decide
        preds['vote'] = vote_of(list(preds.values()), len(competition.classes))
    truth, counts = draw_truth(photo, competition) if has_truth(coco) else None, {}
    if truth is not None:
        scored, num_classes = scale_truth(truth, competition), len(competition.classes)
        counts = {title: count_pixels(scored, pred, num_classes) for title, pred in preds.items()}
    position = f'{names.index(name) + 1:,} of {len(names):,}' if name in names else 'not among the chosen'
    st.caption(escape_markdown('   ·   '.join([name, position, *describe(photo, row, chosen, notes, coco)])))
    show_views(coco, photo, ({} if truth is None else {TRUTH: truth}) | preds, counts, palette)
    for title in missing:
        st.caption(escape_markdown(f'{title} has no prediction for this photo.'))
    if counts:
        show_scores(counts, competition)


def show_steps(names: Sequence[str], name: str) -> None:
    """Draw the way to the grid, to the previous and the next photo, and to one by its number."""
    state, index = st.session_state, names.index(name) if name in names else None

    def show(other: str) -> None:
        st.query_params['photo'] = other

    def show_grid() -> None:
        st.query_params.pop('photo', None)
        state.page = (index or 0) // PER_PAGE + 1

    state.number = None if index is None else index + 1
    with st.container(horizontal=True, vertical_alignment='bottom'):
        st.button('Grid', on_click=show_grid, key='grid-button', shortcut='g')
        step_buttons(show, name, names)
        if names:
            st.number_input(
                f'Go to (1 to {len(names)})', 1, len(names), key='number', width=150,
                on_change=lambda: state.number and show(names[state.number - 1]),
            )  # fmt: skip


def describe(photo: Photo, row: int, chosen: Sources, notes: Notes, coco: CocoSet) -> list[str]:
    """List the size of a photo, its fold in the first source, and the note on its sort value."""
    facts = [f'{photo.width} × {photo.height}']
    if photo.size != (shown := view_size(photo)):
        facts[0] += f', shown as {shown[1]} × {shown[0]}'
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
    palette: str,
) -> None:
    """Draw the photo, its masks, with the scores of predictions that are counted, and the pixels on which the
    predictions differ, if there are two. Raises BadInput.
    """
    competition, metric = coco.competition, metric_of(coco.competition)
    size = view_size(photo)
    named_size = fit(size, min(NAMED_SIDE, max(size)))
    image = resize_photo(read_photo(coco, photo), size)
    views, visible = [{'title': PHOTO, 'caption': PHOTO}], set()
    for title, mask in masks.items():
        note = score_note(metric.label, metric.score(counts[title][None])) if title in counts else ''
        shown = resize_mask(mask, size)
        regions = regions_of(shown)
        visible |= regions.keys()
        small = {k: resize_mask(region.view(np.uint8), named_size) for k, region in regions.items()}
        caption = ', '.join(filter(None, [title, note]))
        view = {'title': title, 'caption': caption, 'labels': place_names(small)}
        views.append(view | encode_mask(shown))
    preds = [mask for title, mask in masks.items() if title != TRUTH]
    if len(preds) > 1:
        differ = differing(preds)
        title = 'where they differ'
        view = {'title': title, 'caption': f'{title}: {differ.mean():.2%}', 'colour': WRONG}
        views.append(view | encode_mask(resize_mask(differ.astype(np.uint8), size)))
    ids = [*competition.object_ids, IGNORED]
    names = {k: 'ignored' if k == IGNORED else competition.classes[k] for k in ids}
    few, colours = len(ids) <= MAX_LEGEND, PALETTES[palette]
    photo_views(
        {
            'name': photo.file_name,
            'photo': data_url(image, 'jpeg', quality=95, subsampling=0),
            'aspect': size[1] / size[0],
            'width': size[1],
            'scale': size[1] / photo.width,
            'views': views,
            'classes': {str(k): {'name': names[k], 'colour': colours[k].tolist()} for k in ids},
            'legend': [k for k in ids if k in visible or (few and k != IGNORED)],
            'visible': sorted(visible),
        }
    )


def view_size(photo: Photo) -> tuple[int, int]:
    """Return the (h, w) at which a photo is shown: its own, if that is not too large."""
    return fit(photo.size, min(SIDE, max(photo.size)))


def place_names(regions: dict[int, np.ndarray]) -> list[tuple[int, float, float]]:
    """Return (class id, x, y) of the largest objects in the (h, w) masks of classes, largest first: x
    and y, of 0 to 1, are in the middle of each.
    """
    named = []
    for k, region in regions.items():
        if k == IGNORED:
            continue
        _, labels, stats, _ = cv2.connectedComponentsWithStats(region.astype(np.uint8))
        largest = 1 + np.argsort(-stats[1:, cv2.CC_STAT_AREA])[:NAMES_PER_CLASS]
        for label in largest:
            area = int(stats[label, cv2.CC_STAT_AREA])
            if area >= MIN_NAMED * region.size:
                x, y = innermost(labels == label)
                named.append((area, k, (x + 0.5) / region.shape[1], (y + 0.5) / region.shape[0]))
    return [(k, x, y) for _, k, x, y in sorted(named, key=lambda one: -one[0])[:NAMES]]


def encode_mask(mask: np.ndarray) -> dict[str, Any]:
    """Encode (H, W) ids as `mask`, a PNG of them; (K, H, W) planes, which may overlap, as a PNG of indices of
    `sets`, the lists of class ids, with their low byte in red and their high byte in green.
    """
    if mask.ndim == 2:
        return {'mask': data_url(mask, compress_level=1)}
    codes, sets = np.zeros(mask.shape[1:], np.int64), [[]]
    for k, region in regions_of(mask).items():
        pairs = codes * 2 + region
        found = np.bincount(pairs.ravel()) > 0
        codes = (np.cumsum(found) - 1)[pairs]
        sets = [sets[pair // 2] + [k] * int(pair % 2) for pair in np.flatnonzero(found)]
    bands = np.stack([codes & 255, codes >> 8, np.zeros_like(codes)], -1).astype(np.uint8)
    return {'mask': data_url(bands, compress_level=1), 'sets': sets}


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
