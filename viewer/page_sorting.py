"""Show the app's third page: upload a photo, and see what each object in it is and which bin it goes into.

The bins are those of Korea; edit bins.csv to change them.

Shapes: H W the size of the photo, K classes.
"""

import csv
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

import cv2
import numpy as np
import streamlit as st
from PIL import Image, ImageDraw

from config import Competition, fold_files, fold_of
from data.cache import resize_image
from data.coco import read_photo
from engine.runs import read_fold, read_run_config
from utils.errors import BadInput, one_line
from utils.plotting import PALETTE, fit, font, overlay, regions_of, to_display
from viewer.app_data import escape_markdown, load_coco, modified, show_error
from viewer.html_page import data_url
from viewer.uploads import FORMATS, MAX_MEGABYTES, MAX_SIDE, read_upload

if TYPE_CHECKING:
    from engine.checkpoint import Run

BINS = Path(__file__).with_name('bins.csv')
MIN_SHARE = 0.004  # of the photo's pixels: a smaller piece is left out
MAX_PIECES = 20
DOUBTFUL = 0.5  # below this probability a piece should be checked by a person
FILE, CAMERA, SAMPLE = 'Upload a photo', 'Take a photo', 'Use a test photo'


@dataclass(frozen=True)
class Bin:
    """The bin of a class: its name, its Korean name, and what to do first."""

    name: str
    korean: str
    how: str


@dataclass(frozen=True)
class Piece:
    """A connected region of a class."""

    class_id: int
    share: float  # of the photo's pixels
    prob: float  # mean probability of the class in the region
    middle: tuple[int, int]  # (x, y) of the pixel that is farthest from the region's edge


def page(data: Path, output: Path, competition: Competition) -> None:
    """Draw the page. Raises BadInput."""
    st.title('Sort it for me')
    models = find_models(output)
    if not models:
        train = 'python train.py --cfg configs/demo.yaml --fold 0'
        st.info(escape_markdown(f'No trained model under {output} yet: {train}'))
        return
    side = st.sidebar
    best = int(np.argmax([score_of(path) for path in models.values()]))
    title = side.selectbox('Model', list(models), best, key='model', persist_state='session')
    opacity = side.slider('Opacity', 0.0, 1.0, 0.5, 0.05, key='opacity-sort', persist_state='session')
    side.caption('Photos stay on this machine and are not saved.')
    name, image = choose_image(data, competition)
    if image is None:
        return
    from engine.inference import photo_probs  # imports torch, which the other pages do without

    run = load_model(models[title], modified(models[title]))
    start = perf_counter()
    with st.spinner('Predicting'):
        probs = photo_probs(run, image, tta=False).float().cpu().numpy()
        pieces, mask = find_pieces(probs, run.thresholds if run.cfg.competition.is_multilabel else None)
    show_pieces(name, to_display(image), mask, pieces, run.cfg.classes, opacity)
    size = f'{image.shape[1]} × {image.shape[0]}'
    st.caption(escape_markdown(f'{name}, {size}: {title}, {perf_counter() - start:.1f} s'))


def find_models(output: Path) -> dict[str, Path]:
    """Find the checkpoints of trained folds, by the titles that the page gives them."""
    runs = sorted(output.glob('*'))
    paths = [path for run in runs for path in fold_files(run, 'best.pt', with_all=True)]
    return {f'{path.parents[1].name}, {path.parent.name}': path for path in paths}


def score_of(checkpoint: Path) -> float:
    """Return the validation score of a checkpoint; -1 if it is unknown."""
    try:
        return float(np.nan_to_num(read_fold(checkpoint.parent).score, nan=-1))
    except BadInput:
        return -1


@st.cache_resource(max_entries=2, show_spinner='Loading the model')
def load_model(checkpoint: Path, time: int) -> 'Run':
    """Load the model of a checkpoint, once while the file stays the same. Raises BadInput."""
    from engine.checkpoint import load_run
    from engine.distributed import start_ranks

    changes = {'output_dir': checkpoint.parents[2], 'name': checkpoint.parents[1].name, 'device': 'auto'}
    cfg = read_run_config(checkpoint.parent).model_copy(update=changes)
    return load_run(cfg, fold_of(checkpoint.parent), start_ranks(cfg).device)


def choose_image(data: Path, competition: Competition) -> tuple[str, np.ndarray | None]:
    """Return the name and the pixels of the photo that is uploaded, taken or chosen; None if none is yet."""
    if not competition.is_rgb:
        st.caption('Cameras and uploads have RGB; the photos of this data set have other bands: choose one.')
        return choose_sample(data, competition)
    how = st.segmented_control(
        'Photo', [FILE, CAMERA, SAMPLE], default=FILE, required=True, key='how', label_visibility='collapsed'
    )
    if how == SAMPLE:
        return choose_sample(data, competition)
    column = st.columns([3, 2], gap='large')[0]
    if how == CAMERA:
        upload = column.camera_input('Hold the object in front of the camera', key='camera')
    else:
        upload = column.file_uploader(
            f'A photo of up to {MAX_MEGABYTES} MB: {", ".join(FORMATS)}', key='upload',
            type=['jpg', 'jpeg', 'png', 'webp', 'bmp'], max_upload_size=MAX_MEGABYTES,
        )  # fmt: skip
    if upload is None:
        return '', None
    try:
        return upload.name, read_upload(upload.name, upload.getvalue())
    except BadInput as error:
        show_error(error)
        return upload.name, None


def choose_sample(data: Path, competition: Competition) -> tuple[str, np.ndarray]:
    """Return the test photo that is chosen. Raises BadInput if there is no test photo."""
    coco = load_coco(data, 'test', competition)
    photos = {photo.file_name: photo for photo in coco.photos}
    name = st.selectbox('Test photo', list(photos), key='sample')
    if not competition.is_rgb:
        photo = read_photo(coco, photos[name])
        return name, resize_image(photo, fit(photo.shape[:2], min(MAX_SIDE, max(photo.shape[:2]))))
    path = coco.path(photos[name])
    try:
        return name, read_upload(name, path.read_bytes())
    except OSError as error:
        raise BadInput(f'{path}: cannot be read: {error.strerror}') from None


def find_pieces(
    probs: np.ndarray, thresholds: Sequence[float] | None = None
) -> tuple[list[Piece], np.ndarray]:
    """Find the pieces in (K, H, W) probabilities; return them, largest first, and the mask of them: ids, or
    with `thresholds` (K,) planes of classes that may overlap.
    """
    pieces, regions = [], []
    for k, plane in class_planes(probs, thresholds).items():
        count, labels, stats, _ = cv2.connectedComponentsWithStats(plane.astype(np.uint8))
        for label in range(1, count):
            share = stats[label, cv2.CC_STAT_AREA] / plane.size
            if share < MIN_SHARE:
                continue
            region = labels == label
            depth = cv2.distanceTransform(np.pad(region.astype(np.uint8), 1), cv2.DIST_L2, 3)[1:-1, 1:-1]
            y, x = np.unravel_index(depth.argmax(), depth.shape)
            pieces.append(Piece(k, float(share), float(probs[k][region].mean()), (int(x), int(y))))
            regions.append(np.packbits(region))  # 1,600 x 1,600 pixels of many pieces
    largest = sorted(range(len(pieces)), key=lambda n: -pieces[n].share)[:MAX_PIECES]
    mask = np.zeros(probs.shape[1:] if thresholds is None else probs.shape, np.uint8)
    for n in largest:
        region = np.unpackbits(regions[n], count=probs[0].size).reshape(probs.shape[1:]) == 1
        if thresholds is None:
            mask[region] = pieces[n].class_id
        else:
            mask[pieces[n].class_id][region] = 1
    return [pieces[n] for n in largest], mask


def class_planes(probs: np.ndarray, thresholds: Sequence[float] | None) -> dict[int, np.ndarray]:
    """Return the (H, W) bool pixels of each class of objects that is predicted somewhere."""
    if thresholds is None:
        return regions_of(probs.argmax(0).astype(np.uint8))
    return regions_of((probs >= np.array(thresholds)[:, None, None]).astype(np.uint8))


def read_bins(path: Path = BINS) -> dict[str, Bin]:
    """Read the bin of each class. Raises BadInput."""
    try:
        with path.open(newline='', encoding='utf-8') as file:
            rows = [[row[key] for key in ('class', 'bin', 'korean', 'how')] for row in csv.DictReader(file)]
    except (OSError, KeyError, ValueError, csv.Error) as error:
        raise BadInput(f'{path}: expected lines of class,bin,korean,how: {one_line(error)}') from None
    if short := next((row for row in rows if None in row), None):
        raise BadInput(f'{path}: expected lines of class,bin,korean,how: the line of {short[0]!r} has fewer')
    return {name: Bin(*rest) for name, *rest in rows}


def show_pieces(
    name: str,
    image: np.ndarray,
    mask: np.ndarray,
    pieces: list[Piece],
    classes: Sequence[str],
    opacity: float,
) -> None:
    """Draw the photo with its pieces numbered, beside the bins that they go into."""
    left, right = st.columns([3, 2], gap='large')
    left.image(
        data_url(draw_pieces(image, mask, pieces, opacity), compress_level=1), width='stretch',
        alt=f'{name}, with {len(pieces)} pieces',
    )  # fmt: skip
    if not pieces:
        right.info('Nothing was found in this photo.')
        return
    bins = read_bins()
    for k in dict.fromkeys(piece.class_id for piece in pieces):
        numbered = {number: piece for number, piece in enumerate(pieces, start=1) if piece.class_id == k}
        right.html(bin_card(classes[k], k, bins.get(classes[k]), numbered))


def draw_pieces(image: np.ndarray, mask: np.ndarray, pieces: list[Piece], opacity: float) -> np.ndarray:
    """Draw the overlay with the number of each piece in its middle."""
    picture = Image.fromarray(overlay(image, mask, opacity))
    draw = ImageDraw.Draw(picture)
    radius = max(9, round(max(image.shape[:2]) / 40))
    for number, piece in enumerate(pieces, start=1):
        colour = tuple(PALETTE[piece.class_id].tolist())
        draw.circle(piece.middle, radius, 'white', colour, max(2, radius // 5))
        draw.text(piece.middle, str(number), 'black', font(round(1.2 * radius)), 'mm')
    return np.array(picture)


def bin_card(name: str, k: int, bin_: Bin | None, pieces: dict[int, Piece]) -> str:
    """Make the HTML of a class: its bin, and its pieces by number."""
    colour = 'rgb({}, {}, {})'.format(*PALETTE[k])
    title = 'no bin is listed for it' if bin_ is None else f'{bin_.name} · {bin_.korean}'
    lines = []
    for number, piece in pieces.items():
        advice = ': please check' if piece.prob < DOUBTFUL else ''
        lines.append(f'<li><b>{number}</b> {html.escape(name)}, {piece.prob:.0%} sure{advice}</li>')
    how = '' if bin_ is None else f'<p>{html.escape(bin_.how)}</p>'
    return (
        f'<div class="bin" style="border-color: {colour}"><h4>{html.escape(title)}</h4>'
        f'<ul>{"".join(lines)}</ul>{how}</div>'
    )
