"""Show the app's third page: upload a photo, and see what each object in it is and which bin it goes into.

What a piece is, how sure the model is of it and its bin are engine/pieces.py's to say, as for infer.py. The
page speaks the browser's language, if it has it.

Shapes: H W the size of the photo, K classes.
"""

import html
from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING

import numpy as np
import streamlit as st

from config import Competition, fold_files, fold_of
from data.cache import resize_image
from data.coco import read_photo
from engine.pieces import (
    LANGUAGES,
    Bin,
    Limits,
    Piece,
    bin_of,
    draw_numbers,
    find_pieces,
    paint,
    read_bins,
)
from engine.runs import read_fold, read_run_config
from utils.cli import in_repository, python_command
from utils.errors import BadInput
from utils.plotting import PALETTE, fit, overlay, to_display
from viewer.app_data import escape_markdown, load_coco, modified, show_error
from viewer.html_page import data_url
from viewer.uploads import LIMITS, MAX_MEGABYTES, MAX_SIDE, ONE_PHOTO, read_upload

if TYPE_CHECKING:
    from engine.checkpoint import Run

MAX_PIECES = 20
MAX_CLASSES = 3  # that a piece may be of, as far as they are named
TEXTS = {
    'en': {
        'language': 'English',
        'title': 'Sort it for me',
        'no_model': 'No trained model under {output} yet: {train}',
        'model': 'Model',
        'opacity': 'Opacity',
        'threshold': 'Not sure below (confidence)',
        'private': 'Photos stay on this machine and are not saved.',
        'predicting': 'Predicting',
        'bands': 'Cameras and uploads have RGB; the photos of this data set have other bands: choose one.',
        'photo': 'Photo',
        'file': 'Upload a photo',
        'camera': 'Take a photo',
        'sample': 'Use a test photo',
        'hold': 'Hold the object in front of the camera',
        'upload': 'A photo of up to {megabytes} MB: a JPEG of up to {jpeg} megapixels, '
        'or PNG, WEBP or BMP of up to {other}',
        'test_photo': 'Test photo',
        'nothing': 'Nothing was found in this photo.',
        'alt': '{name}, with {count} pieces',
        'no_bin': 'no bin is listed for it',
        'or': ' or ',
        'sure': '{classes}, {percent} sure',
        'below': 'below {percent}',
    },
    'ko': {
        'language': '한국어',
        'title': '어디에 버릴까요?',
        'no_model': '{output}에 학습된 모델이 아직 없습니다: {train}',
        'model': '모델',
        'opacity': '불투명도',
        'threshold': '확실하지 않음의 기준 (확신도)',
        'private': '사진은 이 컴퓨터에만 있고 저장되지 않습니다.',
        'predicting': '예측하는 중',
        'bands': '카메라와 업로드는 RGB 사진이지만 이 데이터의 사진은 채널이 다릅니다. 하나를 고르세요.',
        'photo': '사진',
        'file': '사진 올리기',
        'camera': '사진 찍기',
        'sample': '테스트 사진 쓰기',
        'hold': '물건을 카메라 앞에 대 주세요',
        'upload': '{megabytes} MB 이하의 사진: {jpeg} 메가픽셀 이하의 JPEG, '
        '{other} 메가픽셀 이하의 PNG, WEBP, BMP',
        'test_photo': '테스트 사진',
        'nothing': '이 사진에서 찾은 것이 없습니다.',
        'alt': '{name}, {count}개',
        'no_bin': '등록된 수거함이 없습니다',
        'or': ' 또는 ',
        'sure': '{classes}, 확신도 {percent}',
        'below': '확신도 {percent} 미만',
    },
}


def page(data: Path, output: Path, competition: Competition) -> None:
    """Draw the page. Raises BadInput."""
    side = st.sidebar
    language = choose_language()
    texts = TEXTS[language]
    st.title(texts['title'])
    models = find_models(output)
    if not models:
        train = python_command('train.py', '--cfg', in_repository('configs/demo.yaml'), '--fold', 0)
        st.info(escape_markdown(texts['no_model'].format(output=output, train=train)))
        return
    best = int(np.argmax([score_of(path) for path in models.values()]))
    title = side.selectbox(texts['model'], list(models), best, key='model', persist_state='session')
    threshold = side.slider(
        texts['threshold'], 0.0, 1.0, Limits().confidence, 0.05, key='threshold', persist_state='session'
    )
    opacity = side.slider(texts['opacity'], 0.0, 1.0, 0.5, 0.05, key='opacity-sort', persist_state='session')
    side.caption(texts['private'])
    name, image = choose_image(data, competition, texts)
    version = models[title], modified(models[title])
    run = load_model(*version)  # while a photo is still to be chosen: torch alone takes seconds
    if image is None:
        return
    start = perf_counter()
    with st.spinner(texts['predicting']), ONE_PHOTO:
        mask, confidence = predict(run, image, version)
    pieces = find_pieces(mask, confidence, Limits(confidence=threshold))[:MAX_PIECES]
    seconds = perf_counter() - start
    look = Look(language, opacity, threshold)
    show_pieces(name, to_display(image), paint(pieces, mask.shape), pieces, run.cfg.classes, look)
    size = f'{image.shape[1]} × {image.shape[0]}'
    st.caption(escape_markdown(f'{name}, {size}: {title}, {seconds:.1f} s'))


def choose_language() -> str:
    """Return the language that is chosen in the sidebar; at first the browser's, if the page has it."""
    asked = (st.context.locale or '').split('-')[0].lower()
    return st.sidebar.segmented_control(
        'Language · 언어', LANGUAGES, default=asked if asked in LANGUAGES else 'en', required=True,
        format_func=lambda key: TEXTS[key]['language'], key='language', persist_state='session',
    )  # fmt: skip


def predict(run: 'Run', image: np.ndarray, version: tuple[Path, int]) -> tuple[np.ndarray, np.ndarray]:
    """Return the mask of a photo and its confidence, for a version of the model; those of the photo before if
    it is the same, as when a slider moves.
    """
    from engine.own_photos import predict_photos  # imports torch, which the other pages do without

    key = (version, image.shape, sha256(np.ascontiguousarray(image)).digest())
    if st.session_state.get('sorted', (None,))[0] != key:
        large = predict_photos([run], [image], tta=False, keep=True)[0]
        st.session_state['sorted'] = (key, large.whole(), large.confidence)
    return st.session_state['sorted'][1:]


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


def choose_image(
    data: Path, competition: Competition, texts: dict[str, str]
) -> tuple[str, np.ndarray | None]:
    """Return the name and the pixels of the photo that is uploaded, taken or chosen; None if none is yet."""
    if not competition.is_rgb:
        st.caption(texts['bands'])
        return choose_sample(data, competition, texts)
    how = st.segmented_control(
        texts['photo'], ('file', 'camera', 'sample'), default='file', required=True, key='how',
        label_visibility='collapsed', format_func=texts.get,
    )  # fmt: skip
    if how == 'sample':
        return choose_sample(data, competition, texts)
    column = st.columns([3, 2], gap='large')[0]
    if how == 'camera':
        upload = column.camera_input(texts['hold'], key='camera')
    else:
        upload = column.file_uploader(
            texts['upload'].format(**LIMITS), key='upload',
            type=['jpg', 'jpeg', 'png', 'webp', 'bmp'], max_upload_size=MAX_MEGABYTES,
        )  # fmt: skip
    if upload is None:
        return '', None
    try:
        return upload.name, read_upload(upload.name, upload.getvalue())
    except BadInput as error:
        show_error(error)
        return upload.name, None


def choose_sample(data: Path, competition: Competition, texts: dict[str, str]) -> tuple[str, np.ndarray]:
    """Return the test photo that is chosen. Raises BadInput if there is no test photo."""
    coco = load_coco(data, 'test', competition)
    photos = {photo.file_name: photo for photo in coco.photos}
    name = st.selectbox(texts['test_photo'], list(photos), key='sample')
    if not competition.is_rgb:
        photo = read_photo(coco, photos[name])
        return name, resize_image(photo, fit(photo.shape[:2], min(MAX_SIDE, max(photo.shape[:2]))))
    path = coco.path(photos[name])
    try:
        return name, read_upload(name, path.read_bytes())
    except OSError as error:
        raise BadInput(f'{path}: cannot be read: {error.strerror}') from None


@dataclass(frozen=True)
class Look:
    """How pieces are shown: in which language, how opaque, and not sure below which confidence."""

    language: str
    opacity: float
    threshold: float


def show_pieces(
    name: str,
    image: np.ndarray,
    mask: np.ndarray,
    pieces: Sequence[Piece],
    classes: Sequence[str],
    look: Look,
) -> None:
    """Draw the photo with its pieces numbered, beside the bins that they go into."""
    texts, bins = TEXTS[look.language], read_bins(look.language)
    left, right = st.columns([3, 2], gap='large')
    picture = draw_numbers(overlay(image, mask, look.opacity), pieces)
    left.image(
        data_url(picture, compress_level=1), width='stretch',
        alt=texts['alt'].format(name=name, count=len(pieces)),
    )  # fmt: skip
    if not pieces:
        right.info(texts['nothing'])
    names = [bins[key].class_name if key in bins else key for key in classes]
    for label in sorted({piece.label for piece in pieces}, key=[piece.label for piece in pieces].index):
        numbered = {n: piece for n, piece in enumerate(pieces, start=1) if piece.label == label}
        first = next(iter(numbered.values()))
        right.html(bin_card(names, bin_of(first, classes, bins, look.language), numbered, look))


def bin_card(names: Sequence[str], bin_: Bin | None, pieces: dict[int, Piece], look: Look) -> str:
    """Make the HTML of a bin, and of the pieces by number that go into it; `names` are the classes'."""
    texts, first = TEXTS[look.language], next(iter(pieces.values()))
    title, how = (texts['no_bin'], '') if bin_ is None else (bin_.name, bin_.how)
    colour = 'rgb({}, {}, {})'.format(*PALETTE[first.label])
    style = f'word-break: keep-all; border-color: {colour}'
    if not first.is_sure:
        title = f'{title} ({texts["below"].format(percent=f"{look.threshold:.0%}")})'
        style = 'word-break: keep-all; border-color: grey'
    lines = []
    for number, piece in pieces.items():
        classes = texts['or'].join(html.escape(names[k]) for k in piece.class_ids[:MAX_CLASSES])
        text = texts['sure'].format(classes=classes, percent=f'{piece.confidence:.0%}')
        lines.append(f'<li><b>{number}</b> {text}</li>')
    return (
        f'<div class="bin" lang="{look.language}" style="{style}"><h4>{html.escape(title)}</h4>'
        f'<ul>{"".join(lines)}</ul><p>{html.escape(how)}</p></div>'
    )
