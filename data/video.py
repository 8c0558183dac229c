"""Read every n-th frame of a video as a photo, upright, with its time; say if the file ends early.

    with Video(Path('belt.mp4')) as video:
        for frame in video.frames(every=15):
            frame.index, frame.seconds, frame.photo        # 0, 0.0, (H, W, 3) uint8 RGB
        video.fault                                        # '' if all frames were decoded

A file's first bytes must be those of a video: FFmpeg also opens playlists, which name other files.
"""

import math
import os
from collections.abc import Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from data.photos import HEIF, check_limits
from utils.errors import BadInput, plural
from utils.files import refuse_device

os.environ.setdefault('OPENCV_FFMPEG_LOGLEVEL', '-8')  # FFmpeg writes to standard error; faults are said here

# (first byte, content) of MP4 and MOV, Matroska and WebM, AVI, Ogg, FLV, WMV, MPEG-1 and 2, transport streams
SIGNATURES = (
    (4, b'ftyp'), (4, b'moov'), (4, b'mdat'), (4, b'wide'), (4, b'free'), (0, b'\x1aE\xdf\xa3'), (8, b'AVI '),
    (0, b'OggS'), (0, b'FLV\x01'), (0, b'0&\xb2u\x8ef\xcf\x11'), (0, b'\0\0\x01\xba'), (0, b'\0\0\x01\xb3'),
)  # fmt: skip
PACKETS = ((0, 188), (4, 192))  # of a transport stream: where the first begins, and their length
SYNC = 0x47  # their first byte
KINDS = 'MP4, MOV, MKV, WebM, AVI, Ogg, FLV, WMV, MPEG'
FPS = 30.0  # of a file that does not say it, as those that browsers record
MAX_FPS = 240.0  # more is a clock, and no rate
TOLERANCE = 0.01  # of the frames, which a header may count wrongly


@dataclass(frozen=True)
class Frame:
    """A frame of a video: its number from 0, its time, and its (H, W, 3) uint8 RGB pixels."""

    index: int
    seconds: float
    photo: np.ndarray


def is_video(path: Path) -> bool:
    """Return whether a file begins as a video does. Raises BadInput if it cannot be read."""
    refuse_device(path)
    try:
        with path.open('rb') as file:
            head = file.read(1024)
    except OSError as error:
        raise BadInput(f'{path}: cannot be read: {error.strerror}') from None
    if head[4:8] == b'ftyp' and head[8:12] in HEIF:
        return False
    if any(head[start : start + len(text)] == text for start, text in SIGNATURES):
        return True
    streams = (
        [head[start + n * length : start + n * length + 1] for n in range(5)] for start, length in PACKETS
    )
    return any(set(firsts) == {bytes([SYNC])} for firsts in streams)


class Video:
    """An opened video file. Raises BadInput if no frame of it can be decoded."""

    def __init__(self, path: Path) -> None:
        self.path, self.decoded = path, 0
        if not is_video(path):
            raise BadInput(f'{path}: expected a video: {KINDS}')
        with silence():
            self.capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG)
        rate, count = (self.capture.get(key) for key in (cv2.CAP_PROP_FPS, cv2.CAP_PROP_FRAME_COUNT))
        known = 0 < rate <= MAX_FPS
        self.fps = rate if known else FPS
        self.count = int(count) if known and 0 < count < 2**40 else None  # as the header says
        self.capture.set(cv2.CAP_PROP_ORIENTATION_AUTO, 1)
        size = [int(self.capture.get(key)) for key in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT)]
        check_limits(path, *size)
        if not self.capture.grab():
            advice = 'it is cut off or damaged, or of a codec that is not read; save it again as H.264 in MP4'
            raise BadInput(f'{path}: no frame can be decoded: {advice}')

    def __enter__(self) -> 'Video':
        return self

    def __exit__(self, *error: object) -> None:
        self.capture.release()

    def step(self, every: int | None) -> int:
        """Return how many frames lie from one that is taken to the next: by default half a second of them."""
        return every or max(1, round(self.fps / 2))

    def total(self, every: int) -> int | None:
        """Return how many frames will be taken, if the header says how many there are."""
        return self.count and math.ceil(self.count / every)

    def frames(self, every: int = 1, start: int = 0) -> Iterator[Frame]:
        """Decode all frames, and yield each whose number is a multiple of `every` and `start` at least."""
        has_frame = True  # the first one is grabbed
        while has_frame:
            index = self.decoded
            self.decoded += 1
            if index >= start and index % every == 0:
                is_whole, pixels = self.capture.retrieve()
                if is_whole:
                    yield Frame(index, self.time_of(index), cv2.cvtColor(pixels, cv2.COLOR_BGR2RGB))
            has_frame = self.capture.grab()

    def time_of(self, index: int) -> float:
        """Return the time in seconds of the frame that was grabbed last: the file's, or by its rate."""
        seconds = self.capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
        return seconds if math.isfinite(seconds) and seconds > 0 else index / self.fps

    @property
    def fault(self) -> str:
        """Say why not all frames were decoded; '' if they were, or nobody knows how many there are."""
        missing = (self.count or 0) - self.decoded
        if missing <= max(2, TOLERANCE * (self.count or 0)):
            return ''
        return (
            f'only {self.decoded:,} of {plural(self.count, "frame")} can be decoded: it is cut off or damaged'
        )


@contextmanager
def silence() -> Generator[None]:
    """Let OpenCV log nothing; the error says what is wrong."""
    level = cv2.utils.logging.getLogLevel()
    cv2.utils.logging.setLogLevel(cv2.utils.logging.LOG_LEVEL_SILENT)
    try:
        yield
    finally:
        cv2.utils.logging.setLogLevel(level)
