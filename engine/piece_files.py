"""Read the photos of a folder, or the frames of a video, and write what was found in them into a folder:

    masks/<photo>.png          ids at the photo's own size; masks/<class>/<photo>.png if classes may overlap
    overlays/<photo>.jpg       the pieces, with their numbers
    pieces.csv                 a line for each piece, and one without a piece for a photo that has none
    run.json                   what they were made with, and whether all is done

<photo> is the path below the folder, with its ending; a frame's is <video>/<number>. The lines of a photo are
written after its pictures, so that a run that was interrupted goes on after the last photo in the CSV.
"""

import csv
import hashlib
import io
import json
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch
from PIL import Image

from config import Competition, Config
from data.importers import PHOTO_SUFFIXES, UNREAD_SUFFIXES, is_junk, list_files
from data.mask_pairs import class_folders
from data.photos import NotIdentified, open_photo
from data.video import Video, is_video
from engine.inference import free_size
from engine.own_photos import LargeMask, draw_overlay, read_single
from engine.pieces import NOT_SURE, Limits, Piece, bin_of, draw_numbers, find_pieces, paint, read_bins
from models import SegModel
from utils.competition import is_plain
from utils.errors import BadInput, Interrupted, plural
from utils.files import cannot_write, exists, lock, refuse_device, write_text, write_whole
from utils.json_files import read_bytes
from utils.log import log

CSV, RUN, LOCK, MASKS, OVERLAYS = 'pieces.csv', 'run.json', '.lock', 'masks', 'overlays'
COLUMNS = (
    'file', 'frame', 'seconds', 'piece', 'pieces', 'class', 'bin', 'share', 'confidence', 'x', 'y', 'width',
    'height',
)  # fmt: skip
BATCH_PIXELS = 1 << 25  # of the photos that are in memory together
QUALITY = 90  # of the JPEG of an overlay
MAX_NAME = 220  # bytes; a temporary file's is longer by up to 30, and 255 are allowed


@dataclass(frozen=True)
class Item:
    """A photo, or a frame of a video."""

    file: str  # below the folder that is read
    photo: np.ndarray  # (H, W, C)
    frame: int | None = None
    seconds: float | None = None

    @property
    def name(self) -> str:
        """Return the path of its mask and its overlay, without their ending."""
        return self.file if self.frame is None else f'{self.file}/{self.frame:06}'


@dataclass
class Source:
    """Photos, or a video, to predict; `faults` are those that cannot be, or not to the end."""

    path: Path
    competition: Competition
    photos: dict[str, Path] = field(default_factory=dict)  # by their names below a folder
    video: Video | None = None
    every: int = 1
    faults: list[str] = field(default_factory=list)

    @property
    def noun(self) -> str:
        return 'photo' if self.video is None else 'frame'

    @property
    def pace(self) -> str:
        """Say which frames of a video are taken."""
        return '' if self.video is None else f' (1 of {self.every}, {self.video.fps:g} a second)'

    @property
    def total(self) -> int | None:
        """Return how many photos or frames there are, if that is known."""
        return len(self.photos) if self.video is None else self.video.total(self.every)

    def items(self, done: 'Done') -> Iterator[Item]:
        """Read those that are not done; note the faults of the others, each in one line."""
        if self.video is not None:
            for frame in self.video.frames(self.every, done.next_frame):
                yield Item(self.path.name, frame.photo, frame.index, frame.seconds)
            if self.video.fault:
                self.faults.append(f'{self.path}: {self.video.fault}')
            return
        for name, path in self.photos.items():
            if name in done.files:
                continue
            try:
                self.check_name(name)
                photo = read_single(path, self.competition)
            except BadInput as error:
                if not self.path.is_dir():
                    raise
                self.faults.append(str(error))
            else:
                yield Item(name, photo)

    @cached_property
    def folders(self) -> set[PurePosixPath]:
        return {parent for name in self.photos for parent in PurePosixPath(name).parents}

    def say_faults(self) -> str:
        """Log the faults of all photos; return one line on them."""
        if self.video is not None:
            return f'{self.faults[0]}; what was decoded is written'
        for fault in self.faults:
            log.warning(f'warning: {fault}')
        count = f'{len(self.faults)} of {plural(len(self.photos), "photo")}'
        return f'{self.path}: {count} cannot be predicted; mend them, and the same command goes on'

    def check_name(self, name: str) -> None:
        """Raise BadInput if no mask and overlay can be named after a photo."""
        if not is_plain(name) or len(PurePosixPath(name).name.encode()) > MAX_NAME:
            fault = f'is longer than {MAX_NAME} bytes, or has control characters'
        elif self.folders & {PurePosixPath(f'{name}{end}') for end in ('.png', '.jpg')}:
            fault = 'has the name of a folder, but for the ending that its mask or overlay gets'
        else:
            return
        raise BadInput(f'{str(self.path / name)!a}: {fault}; rename it')


def open_source(path: Path, out: Path, competition: Competition, every: int | None) -> Source:
    """Find the photos below a folder, by name, without those below `out`; or open a video, or one photo.
    Raises BadInput.
    """
    if not exists(path):
        raise BadInput(f'{path}: no such file or folder')
    if path.is_file() and is_movie(path):
        if not competition.is_rgb:
            raise BadInput(f'{path}: a video is RGB of 8 bits, but the model was trained on other photos')
        video = Video(path)
        return Source(path, competition, video=video, every=video.step(every))
    if every is not None:
        raise BadInput(f'{path}: --every is for a video, and this is none')
    if path.is_dir():
        photos = list_files(path, PHOTO_SUFFIXES | UNREAD_SUFFIXES)
        if path.resolve() in out.resolve().parents:
            photos = [photo for photo in photos if out.resolve() not in photo.resolve().parents]
        if not photos:
            files = any(not is_junk(file.relative_to(path)) for file in path.rglob('*') if file.is_file())
            found = 'found no photos' if files else 'is empty'
            raise BadInput(f'{path}: {found}, expected {", ".join(sorted(PHOTO_SUFFIXES))}')
        return Source(path, competition, {photo.relative_to(path).as_posix(): photo for photo in photos})
    return Source(path, competition, {path.name: path})


def is_movie(path: Path) -> bool:
    """Tell a video from a photo, by their content. Raises BadInput for a file that is neither."""
    refuse_device(path)
    if path.suffix.lower() in PHOTO_SUFFIXES:
        return False
    try:
        with open_photo(path):
            return False
    except NotIdentified as error:
        if is_video(path):
            return True
        raise BadInput(f'{error}; or give a video, or a folder of photos') from None


def batches(items: Iterable[Item], cfg: Config) -> Iterator[list[Item]]:
    """Put items that follow each other and have one free_size into batches, of infer_batch_size at most."""
    batch, pixels = [], 0
    for item in items:
        size = item.photo.shape[0] * item.photo.shape[1]
        if batch and (
            len(batch) == cfg.infer_batch_size
            or pixels + size > BATCH_PIXELS
            or free_size(item.photo.shape, cfg) != free_size(batch[0].photo.shape, cfg)
        ):
            yield batch
            batch, pixels = [], 0
        batch.append(item)
        pixels += size
    if batch:
        yield batch


@dataclass
class Done:
    """What an interrupted run has written: the names of its photos, or the first frame that is to come."""

    files: set[str] = field(default_factory=set)
    next_frame: int = 0
    count: int = 0  # of photos or frames
    pieces: int = 0
    not_sure: int = 0  # of the pieces

    def add(self, rows: Sequence[Sequence[str]]) -> None:
        """Add the lines of a photo or a frame."""
        file, frame = rows[0][:2]
        if frame:
            self.next_frame = int(frame) + 1
        else:
            self.files.add(file)
        self.count += 1
        self.pieces += int(rows[0][COLUMNS.index('pieces')])
        self.not_sure += sum(row[COLUMNS.index('bin')] == NOT_SURE['en'].name for row in rows)


class PieceFiles:
    """The folder that a run writes into. Raises BadInput if it holds anything but the begun files of the same
    run; with `overwrite` those of any run are replaced.
    """

    def __init__(
        self,
        out: Path,
        competition: Competition,
        limits: Limits,
        settings: dict[str, Any],
        overwrite: bool = False,
    ) -> None:
        self.out, self.competition, self.limits = out, competition, limits
        self.settings = json.loads(json.dumps(settings))  # as they are read again
        self.overwrite, self.done, self.bins = overwrite, Done(), read_bins()
        multilabel = competition.is_multilabel
        self.folders = class_folders(competition.classes) if multilabel else ['']

    def __enter__(self) -> 'PieceFiles':
        self.refuse_other_files()
        with ExitStack() as stack:
            stack.enter_context(lock(self.out / LOCK, 'predicting'))
            self.prepare()
            self.stack = stack.pop_all()
        return self

    def __exit__(self, kind: type | None, *error: object) -> None:
        with self.stack:
            self.file.close()
        if kind is KeyboardInterrupt:
            done = f'{self.done.count:,} photos or frames are done'
            raise Interrupted(f'{self.out}: {done}; the same command goes on') from None

    def refuse_other_files(self) -> None:
        """Raise BadInput if `out` is no folder, or has files in it that are of no such run."""
        if self.out.exists() and not self.out.is_dir():
            raise BadInput(f'{self.out}: is a file, expected a folder')
        if not self.out.exists() or (self.out / RUN).exists():
            return
        names = {path.name for path in self.out.iterdir() if not is_junk(Path(path.name))}
        if names:
            fault = f'is not empty, and not a folder of predictions ({min(names)})'
            raise BadInput(f'{self.out}: {fault}; give another --out')

    def prepare(self) -> None:
        """Find what was done, or remove it, and open the CSV."""
        path = self.out / CSV
        if (self.out / RUN).exists() and not self.overwrite:
            self.refuse_other_run()
            self.done = keep_whole_photos(path)
        else:
            for folder in (MASKS, OVERLAYS):
                shutil.rmtree(self.out / folder, ignore_errors=True)
            self.write_run(False)
            write_rows(path, [COLUMNS])
        try:
            self.file = path.open('a', newline='', encoding='utf-8')
        except OSError as error:
            raise cannot_write(path, error) from None

    def refuse_other_run(self) -> None:
        path = self.out / RUN
        way = 'give another --out, or --overwrite, which makes it anew'
        try:
            run = json.loads(read_bytes(path))
            settings, finished = run['settings'], run['finished']
            differing = [key for key, value in self.settings.items() if settings[key] != value]
        except (ValueError, TypeError, KeyError):
            raise BadInput(f'{path}: is damaged; {way}') from None
        if differing:
            raise BadInput(f'{self.out}: was made with another {", ".join(differing)}; {way}')
        if finished:
            raise BadInput(f'{self.out}: holds these predictions already; {way}')

    def write_run(self, finished: bool) -> None:
        content = {'settings': self.settings, 'finished': finished}
        write_text(self.out / RUN, json.dumps(content, indent=2) + '\n')

    def write(self, item: Item, mask: LargeMask) -> None:
        """Write the masks and the overlay of an item, then its lines. Raises BadInput and Interrupted."""
        ids = mask.whole()
        pieces = find_pieces(ids, mask.confidence, self.limits)
        for folder, plane in zip(self.folders, ids.reshape(-1, *ids.shape[-2:]), strict=True):
            with write_whole(self.out / MASKS / folder / f'{item.name}.png') as file:
                Image.fromarray(plane).save(file, 'PNG', compress_level=1)
        painted = paint(pieces, ids.shape)
        picture = draw_overlay(item.photo, lambda top, stop: painted[..., top:stop, :])
        with write_whole(self.out / OVERLAYS / f'{item.name}.jpg') as file:
            Image.fromarray(draw_numbers(picture, pieces)).save(file, 'JPEG', quality=QUALITY)
        self.add_rows(self.rows_of(item, pieces))

    def rows_of(self, item: Item, pieces: Sequence[Piece]) -> list[list[str]]:
        """Return the lines of an item: one for each piece, or if it has none, one that says so."""
        seconds = '' if item.seconds is None else f'{item.seconds:.3f}'
        first = [item.file, '' if item.frame is None else str(item.frame), seconds]
        rows = []
        for number, piece in enumerate(pieces, start=1):
            bin_ = bin_of(piece, self.competition.classes, self.bins)
            names = [self.competition.classes[piece.class_ids[0]], bin_.name if bin_ else '']
            values = [f'{piece.share:.5f}', f'{piece.confidence:.3f}']
            box = map(str, (*piece.corner, *piece.region.shape[::-1]))
            rows.append([*first, str(number), str(len(pieces)), *names, *values, *box])
        return rows or [[*first, '', '0', *[''] * 8]]

    def add_rows(self, rows: Sequence[Sequence[str]]) -> None:
        """Append the lines of an item to the CSV. Raises BadInput and Interrupted."""
        try:
            csv.writer(self.file, lineterminator='\n').writerows(rows)
            self.file.flush()
        except OSError as error:
            raise cannot_write(self.out / CSV, error) from None
        self.done.add(rows)

    def finish(self, source: Source) -> None:
        """Note that all is done; a folder with faulty photos is not, so that these can be mended."""
        self.write_run(source.video is not None or not source.faults)


def keep_whole_photos(path: Path) -> Done:
    """Remove the lines of a photo that were not all written from a CSV; return what is done."""
    done = Done()
    if not path.exists():
        write_rows(path, [COLUMNS])

    def whole_photos() -> Iterator[Sequence[str]]:
        yield COLUMNS
        rows = []
        with path.open(newline='', encoding='utf-8') as file:
            for row in csv.reader(terminated(file)):
                if len(row) != len(COLUMNS) or row == [*COLUMNS]:
                    continue
                rows = [*rows, row] if rows and rows[0][:2] == row[:2] else [row]
                if len(rows) == max(1, int(row[4])):
                    done.add(rows)
                    yield from rows

    try:
        write_rows(path, whole_photos())
    except (ValueError, csv.Error):
        raise BadInput(f'{path}: is damaged; give another --out, or --overwrite') from None
    return done


def terminated(lines: Iterable[str]) -> Iterator[str]:
    """Leave out a last line that does not end."""
    return (line for line in lines if line.endswith('\n'))


def write_rows(path: Path, rows: Iterable[Sequence[object]]) -> None:
    """Write a CSV, whole or not at all, however long it is."""
    with write_whole(path) as file:
        text = io.TextIOWrapper(file, 'utf-8', newline='')
        csv.writer(text, lineterminator='\n').writerows(rows)
        text.detach()  # flushes it, and leaves the file open


def model_hash(models: Iterable[SegModel]) -> str:
    """Return the SHA-256 of the weights of models."""
    digest = hashlib.sha256()
    for model in models:
        for name, tensor in model.state_dict().items():
            digest.update(name.encode())
            digest.update(tensor.cpu().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
