"""The app's third page: a photo of anybody's, what each piece in it is, and into which bin it goes.

bins.csv has the bins, those of Korea: read it, change it.

Shapes: H W the photo's size, K classes.
"""

import csv
import html
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

import cv2
import numpy as np
import streamlit as st
from PIL import Image, ImageDraw

from config import load_config
from engine.runs import best_miou, fold_number, read_metrics
from utils.errors import BadInput, one_line
from utils.plotting import PALETTE, font, overlay
from viewer.app_data import load_coco, modified, plain, show_error
from viewer.uploads import FORMATS, MAX_MEGABYTES, read_upload

if TYPE_CHECKING:
    from engine.checkpoint import Run

BINS = Path(__file__).with_name('bins.csv')
LEAST = 0.004  # of the photo's pixels: a smaller piece is a speck
PIECES = 20  # at most
DOUBT = 0.5  # below this probability a piece is one to look at
FILE, CAMERA, SAMPLE = 'Drop a photo', 'Take a photo', 'One of the data set'


@dataclass(frozen=True)
class Bin:
    """Where a class goes: the bin's name, its Korean name, and what to do first."""

    name: str
    korean: str
    how: str


@dataclass(frozen=True)
class Piece:
    """Connected pixels of a class: their share of the photo, the mean probability of the class on them, and
    the (x, y) of the pixel that is deepest inside.
    """

    category: int
    share: float
    sure: float
    middle: tuple[int, int]


def page(data: Path, output: Path, classes: tuple[str, ...]) -> None:
    """Raises BadInput."""
    st.title('Sort it for me')
    models = find_models(output)
    if not models:
        st.info(
            plain(f'No trained model under {output} yet: python train.py --cfg configs/demo.yaml --fold 0')
        )
        return
    scores = np.nan_to_num([best_score(path) for path in models.values()], nan=-1)
    side = st.sidebar
    title = side.selectbox(
        'Model', list(models), int(np.argmax(scores)), key='model', persist_state='session'
    )
    opacity = side.slider('Opacity', 0.0, 1.0, 0.5, 0.05, key='opacity-sort', persist_state='session')
    side.caption('What is sorted here stays on this machine, and is not kept.')
    name, image = choose_image(data, classes)
    if image is None:
        return
    run = load_model(models[title], modified(models[title]))
    start = perf_counter()
    with st.spinner('Looking'):
        pieces, ids = find_pieces(predict(run, image))
    show_pieces(name, image, ids, pieces, run.cfg.classes, opacity)
    st.caption(plain(f'{name}, {image.shape[1]} × {image.shape[0]}: {title}, {perf_counter() - start:.1f} s'))


# --- the model ---------------------------------------------------------------------------------------------


def find_models(output: Path) -> dict[str, Path]:
    """The checkpoints of trained folds by what the page calls them."""
    paths = sorted([*output.glob('*/fold*/best.pt'), *output.glob('*/all/best.pt')])
    known = [p for p in paths if fold_number(p.parent) is not None]
    return {f'{p.parent.parent.name}, {p.parent.name}': p for p in known}


def best_score(checkpoint: Path) -> float:
    """The highest validation mIoU of the run; nan where none is known."""
    try:
        return best_miou(read_metrics(checkpoint.with_name('metrics.csv')))
    except BadInput:
        return math.nan


@st.cache_resource(max_entries=2, show_spinner='Loading the model')
def load_model(checkpoint: Path, time: int) -> 'Run':
    """The model of a checkpoint, kept while the file is the same. Raises BadInput."""
    from engine.checkpoint import load_run  # with torch, which the other pages do without
    from engine.distributed import start_ranks

    fold = fold_number(checkpoint.parent)
    places = {'output_dir': checkpoint.parents[2], 'name': checkpoint.parents[1].name, 'device': 'auto'}
    cfg = load_config(checkpoint.with_name('config.yaml')).model_copy(update=places)
    return load_run(cfg, fold, start_ranks(cfg).device)


def predict(run: 'Run', image: np.ndarray) -> np.ndarray:
    """(K, H, W) probabilities of an (H, W, 3) photo, seen once."""
    from engine.inference import photo_probs

    return photo_probs(run, image, tta=False).float().cpu().numpy()


# --- the photo ---------------------------------------------------------------------------------------------


def choose_image(data: Path, classes: tuple[str, ...]) -> tuple[str, np.ndarray | None]:
    """The name and the pixels of the photo that is dropped, taken or chosen; None while there is none."""
    how = st.segmented_control(
        'Photo', [FILE, CAMERA, SAMPLE], default=FILE, required=True, key='how', label_visibility='collapsed'
    )
    if how == SAMPLE:
        return choose_sample(data, classes)
    place = st.columns([3, 2], gap='large')[0]
    if how == CAMERA:
        upload = place.camera_input('Hold it into the camera', key='camera')
    else:
        upload = place.file_uploader(
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


def choose_sample(data: Path, classes: tuple[str, ...]) -> tuple[str, np.ndarray]:
    """A test photo. Raises BadInput where there is none."""
    coco = load_coco(data, 'test', classes)
    name = st.selectbox('Test photo', [photo.file_name for photo in coco.photos], key='sample')
    path = data / name
    try:
        return name, read_upload(name, path.read_bytes())
    except OSError as error:
        raise BadInput(f'{path}: cannot be read: {error.strerror}') from None


# --- its pieces --------------------------------------------------------------------------------------------


def find_pieces(probs: np.ndarray) -> tuple[list[Piece], np.ndarray]:
    """The pieces in (K, H, W) probabilities, largest first, and the (H, W) ids of them alone, background
    elsewhere. Things of a class that touch are one piece.
    """
    ids = probs.argmax(0).astype(np.uint8)
    places = np.zeros_like(ids)  # of each pixel, its piece's place below, from 1; LEAST leaves room for 250
    pieces = []
    for k in np.unique(ids[ids > 0]):
        count, labels, stats, _ = cv2.connectedComponentsWithStats((ids == k).astype(np.uint8))
        for label in range(1, count):
            share = stats[label, cv2.CC_STAT_AREA] / ids.size
            if share < LEAST:
                continue
            own = labels == label
            depth = cv2.distanceTransform(np.pad(own.astype(np.uint8), 1), cv2.DIST_L2, 3)[1:-1, 1:-1]
            y, x = np.unravel_index(depth.argmax(), depth.shape)
            pieces.append(Piece(int(k), float(share), float(probs[k][own].mean()), (int(x), int(y))))
            places[own] = len(pieces)
    order = sorted(range(len(pieces)), key=lambda n: -pieces[n].share)[:PIECES]
    kept = np.zeros(1 + len(pieces), np.uint8)
    for n in order:
        kept[1 + n] = pieces[n].category
    return [pieces[n] for n in order], kept[places]


def read_bins(path: Path = BINS) -> dict[str, Bin]:
    """The bin of each class. Raises BadInput."""
    try:
        with path.open(newline='', encoding='utf-8') as file:
            rows = [[row[key] for key in ('class', 'bin', 'korean', 'how')] for row in csv.DictReader(file)]
    except (OSError, KeyError, ValueError, csv.Error) as error:
        raise BadInput(f'{path}: expected lines of class,bin,korean,how: {one_line(error)}') from None
    if short := next((row for row in rows if None in row), None):
        raise BadInput(f'{path}: expected lines of class,bin,korean,how: {short[0]!r} has fewer')
    return {name: Bin(*rest) for name, *rest in rows}


def show_pieces(
    name: str, image: np.ndarray, ids: np.ndarray, pieces: list[Piece], classes: Sequence[str], opacity: float
) -> None:
    """The photo with its pieces numbered, beside the bins that they go into."""
    left, right = st.columns([3, 2], gap='large')
    left.image(
        draw_pieces(image, ids, pieces, opacity), width='stretch', output_format='PNG',
        alt=f'{name}, with {len(pieces)} pieces',
    )  # fmt: skip
    if not pieces:
        right.info('No trash is seen in this photo.')
        return
    bins = read_bins()
    for k in dict.fromkeys(piece.category for piece in pieces):
        own = {number: piece for number, piece in enumerate(pieces, start=1) if piece.category == k}
        right.html(bin_card(classes[k], k, bins.get(classes[k]), own))


def draw_pieces(image: np.ndarray, ids: np.ndarray, pieces: list[Piece], opacity: float) -> np.ndarray:
    """The overlay with each piece's number in its middle."""
    picture = Image.fromarray(overlay(image, ids, opacity))
    draw = ImageDraw.Draw(picture)
    radius = max(9, round(max(image.shape[:2]) / 40))
    for number, piece in enumerate(pieces, start=1):
        draw.circle(
            piece.middle, radius, 'white', tuple(PALETTE[piece.category].tolist()), max(2, radius // 5)
        )
        draw.text(piece.middle, str(number), 'black', font(round(1.2 * radius)), 'mm')
    return np.array(picture)


def bin_card(name: str, k: int, bin_: Bin | None, pieces: dict[int, Piece]) -> str:
    """HTML: a class's bin, and its pieces by number."""
    colour = 'rgb({}, {}, {})'.format(*PALETTE[k])
    title = 'no bin is known for it' if bin_ is None else f'{bin_.name} · {bin_.korean}'
    lines = []
    for number, piece in pieces.items():
        doubt = ': look at it yourself' if piece.sure < DOUBT else ''
        lines.append(f'<li><b>{number}</b> {html.escape(name)}, {piece.sure:.0%} sure{doubt}</li>')
    how = '' if bin_ is None else f'<p>{html.escape(bin_.how)}</p>'
    return (
        f'<div class="bin" style="border-color: {colour}"><h4>{html.escape(title)}</h4>'
        f'<ul>{"".join(lines)}</ul>{how}</div>'
    )
