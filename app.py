"""The browser app: photos, their truth, and what any runs predicted, side by side. Started by viz.py.

    python viz.py app --port 8501

Quick on thousands of photos: the places of a CSV's rows are read once, then only the rows that are shown.
"""

import html
import re
from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
import pandas as pd
import streamlit as st

from coco import CocoSet, Photo, annotation_files, board_truth, draw_mask, read_coco, read_photo
from config import ArgumentParser, BadInput, add_config_arguments
from drawing import PALETTE, overlay
from metrics import class_iou, confusion_matrix, mean_iou
from submission import SubmissionReader, classes_and_data

SIDE = 640  # the longer side of a photo on the page is at most this
STYLE = """
<style>
.block-container { padding-top: 2.5rem; max-width: 1800px; }
.swatch {
    display: inline-block; width: .9em; height: .9em; margin-right: .5em;
    border: 1px solid #8888; vertical-align: -.1em;
}
</style>
"""


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(__doc__)
    parser.add_argument('--data', type=Path)
    parser.add_argument('--output', type=Path, default=Path('output'))
    add_config_arguments(parser, required=False)
    args = parser.parse_args(argv)
    st.set_page_config('Trash', layout='wide')
    st.html(STYLE)
    try:
        classes, data = classes_and_data(args)
        page(data, args.output, classes)
    except BadInput as error:
        st.error(plain(str(error)))


def page(data: Path, output: Path, classes: tuple[str, ...]) -> None:
    """The page: what to look at in the side bar, one photo in the middle. Raises BadInput."""
    side = st.sidebar
    split = side.radio('Photos', ['train', 'test'], horizontal=True, key='split')
    coco = load_coco(data, split, classes)
    sources = find_predictions(output, split)
    label = 'Predictions out of fold' if split == 'train' else 'Predictions'
    chosen = side.multiselect(label, list(sources), default=list(sources)[:2], key=f'chosen-{split}')
    opacity = side.slider('Opacity', 0.0, 1.0, 0.6, 0.05, key='opacity')
    names = [photo.file_name for photo in coco.photos]
    photo = coco.photos[choose_photo(names, split)]
    found = {source: read_prediction(sources[source], photo.file_name, len(classes)) for source in chosen}
    preds = {source: pred for source, pred in found.items() if pred is not None}
    truth = draw_mask(photo) if split == 'train' else None
    show_views(coco, photo, truth, preds, opacity)
    for source in found.keys() - preds.keys():
        st.caption(plain(f'{source} has no prediction of this photo.'))
    if not sources:
        st.caption(plain(f'No predictions of {split} photos under {output} yet.'))
    if truth is not None and preds:
        show_scores(board_truth(truth), preds, classes)
    masks = [*preds.values(), *([] if truth is None else [truth])]
    with side:
        show_legend({int(k) for mask in masks for k in np.unique(mask)}, classes)


def choose_photo(names: Sequence[str], split: str) -> int:
    """The row to show: previous, next, go to a number, or choose a file name; all four say the same."""
    number, name = f'number-{split}', f'name-{split}'
    rows = {file_name: row for row, file_name in enumerate(names)}

    def show(row: int) -> None:
        st.session_state[number] = row + 1
        st.session_state[name] = names[row]

    if st.session_state.get(name) not in rows:
        show(0)
    row = rows[st.session_state[name]]
    previous, following, go_to, by_name = st.columns([1, 1, 1.4, 5], vertical_alignment='bottom')
    previous.button(
        '← Previous', on_click=show, args=(row - 1,), disabled=row == 0, width='stretch', key='previous'
    )
    following.button(
        'Next →', on_click=show, args=(row + 1,), disabled=row == len(names) - 1, width='stretch', key='next'
    )
    go_to.number_input(
        f'Go to (1 to {len(names)})', 1, len(names), key=number,
        on_change=lambda: show(st.session_state[number] - 1),
    )  # fmt: skip
    by_name.selectbox('File name', names, key=name, on_change=lambda: show(rows[st.session_state[name]]))
    return row


def show_views(
    coco: CocoSet, photo: Photo, truth: np.ndarray | None, preds: dict[str, np.ndarray], opacity: float
) -> None:
    """The photo, its truth where that is known, its predictions; at the photo's own size, or smaller."""
    image = read_photo(coco, photo)
    scale = min(1.0, SIDE / max(image.shape[:2]))
    size = max(1, round(photo.width * scale)), max(1, round(photo.height * scale))  # cv2's order
    image = cv2.resize(image, size, interpolation=cv2.INTER_AREA)
    masks = [*([] if truth is None else [('truth', truth)]), *preds.items()]
    views = [(f'photo, {photo.width} × {photo.height}', image)]
    for title, mask in masks:
        views.append(
            (title, overlay(image, cv2.resize(mask, size, interpolation=cv2.INTER_NEAREST), opacity))
        )
    for column, (title, view) in zip(st.columns(max(3, len(views))), views, strict=False):
        column.image(view, caption=plain(title), width='stretch', output_format='PNG')


def show_scores(truth: np.ndarray, preds: dict[str, np.ndarray], classes: tuple[str, ...]) -> None:
    """IoU of each class in this photo, a column a prediction; classes that are nowhere in it are left out."""
    confusions = {title: confusion_matrix(truth, pred, len(classes)) for title, pred in preds.items()}
    columns = {title: [*class_iou(counts), mean_iou(counts)] for title, counts in confusions.items()}
    number = st.column_config.NumberColumn(format='%.3f')
    st.markdown('**IoU in this photo**')
    st.dataframe(
        pd.DataFrame(columns, [*classes, 'mIoU']).dropna(how='all'),
        width='content',
        column_config=dict.fromkeys(columns, number),
    )


def show_legend(seen: set[int], classes: tuple[str, ...]) -> None:
    """Every class with its colour; those that are not in view are pale."""
    lines = []
    for k, name in enumerate(classes[1:], start=1):
        colour = 'rgb({}, {}, {})'.format(*PALETTE[k])
        weight = 'font-weight: 600' if k in seen else 'opacity: .45'
        swatch = f'<span class="swatch" style="background: {colour}"></span>'
        lines.append(f'<div style="{weight}">{swatch}{html.escape(name)}</div>')
    st.html(''.join(lines))


# --- what is read -------------------------------------------------------------------------------------------


def find_predictions(output: Path, split: str) -> dict[str, list[Path]]:
    """The CSVs of a split by what the page calls them: out of fold, a run's folds together."""
    sources: dict[str, list[Path]] = {}
    if split == 'train':
        merged = sorted(output.glob('*/oof.csv'))
        for path in sorted(output.glob('*/fold*/oof.csv')):
            sources.setdefault(path.parent.parent.name, []).append(path)
        for path in merged:
            sources.setdefault(path.parent.name, [path])
        return dict(sorted(sources.items()))
    for path in (
        sorted(output.glob('*.csv')) + sorted(output.glob('*/test.csv')) + sorted(output.glob('*/*/test.csv'))
    ):
        title = (
            str(path.relative_to(output)) if path.parent == output else str(path.parent.relative_to(output))
        )
        sources[title] = [path]
    return sources


def read_prediction(paths: Sequence[Path], image_id: str, num_classes: int) -> np.ndarray | None:
    """(256, 256) ids of an image, from the first CSV that has it; None where none has. Raises BadInput."""
    for path in paths:
        reader = open_csv(path, modified(path), num_classes)
        if image_id in reader.places:
            return reader.read(image_id)
    return None


def load_coco(data: Path, split: str, classes: tuple[str, ...]) -> CocoSet:
    files = annotation_files(data, split)
    return _load_coco(data, split, classes, tuple(modified(path) for path in files))


@st.cache_resource(max_entries=4, show_spinner='Reading annotations')
def _load_coco(data: Path, split: str, classes: tuple[str, ...], times: tuple[int, ...]) -> CocoSet:
    return read_coco(data, split, classes)


@st.cache_resource(max_entries=128, show_spinner='Looking for the rows of a CSV')
def open_csv(path: Path, time: int, num_classes: int) -> SubmissionReader:
    """A reader, kept while the file is the same: it holds places of rows, not rows. Raises BadInput."""
    return SubmissionReader(path, num_classes).__enter__()


def modified(path: Path) -> int:
    """When a file was last written, as part of the key of what is kept of it. Raises BadInput."""
    try:
        return path.stat().st_mtime_ns
    except OSError as error:
        raise BadInput(f'{path}: cannot be read: {error.strerror}') from None


def plain(text: str) -> str:
    """Text for a place that takes Markdown, so that it is shown as it is: a file name may hold anything."""
    return re.sub(r'([\\`*_{}\[\]()<>#+\-.!|~$:&])', r'\\\1', text)


if __name__ == '__main__':
    main()
