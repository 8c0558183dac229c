"""Know which checkpoints and settings a CSV was made with, and refuse it where they have changed since.

    begin_origin(csv, origin)           # before infer.py replaces the CSV and the files beside it,
    write_origin(csv, origin)           # and after
    refuse_outdated([csv, ...])         # whoever uses it
    fold, scene = read_origin(oof_csv).photos[image_id]

Beside each CSV, <split>.origin.json has its size, time and SHA-256, by which another file under its name is
known; the identity of each checkpoint, by the path from the folder of the CSV, so that output/ can be moved;
the settings of the prediction; the command; and of photos out of fold the fold and the scene of each. Nothing
is known against a CSV without this file, as another tool makes it, nor against one whose checkpoint is gone.
"""

import hashlib
import json
import os
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import lru_cache
from pathlib import Path
from typing import Any

from utils.cli import python_command
from utils.errors import BadInput
from utils.files import file_hash, write_text
from utils.json_files import read_bytes

DESCRIBED = {'bytes', 'modified', 'sha256'}  # keys of describe_file


@dataclass(frozen=True)
class Origin:
    """What a CSV was made with."""

    checkpoints: dict[str, str]  # by the path from the CSV's folder: identify_checkpoint
    settings: dict[str, Any]  # of the prediction, as JSON has them
    command: str = ''  # as it was typed; '' if a function was called
    photos: dict[str, list] | None = None  # out of fold, by image id: [fold, scene or None]
    csv: dict[str, Any] = field(default_factory=dict)  # its describe_file; {} while it is being replaced


def origin_path(csv: Path) -> Path:
    return csv.with_name(f'{csv.stem}.origin.json')


def identify_checkpoint(path: Path) -> str:
    """Return a hash of a checkpoint that takes milliseconds, whatever its size. Raises BadInput.

    torch.save writes a ZIP: its directory has the name, the size and the CRC-32 of each tensor.
    """
    return _identify(path, *_state(path))


@lru_cache(4096)
def _identify(path: Path, *_: int) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            records = [
                (info.filename.partition('/')[2], info.file_size, info.CRC) for info in archive.filelist
            ]
    except (zipfile.BadZipFile, NotImplementedError):
        return file_hash(path)
    except OSError as error:
        raise BadInput(f'{path}: cannot be read: {error.strerror}') from None
    return hashlib.sha256(repr(records).encode()).hexdigest()


def identify_checkpoints(folder: Path, paths: Iterable[Path]) -> dict[str, str]:
    """Return the identity of each checkpoint that exists, by its path from a folder. Raises BadInput."""
    names = {path: Path(os.path.relpath(path, folder)).as_posix() for path in paths if path.exists()}
    return {name: identify_checkpoint(path) for path, name in names.items()}


def _state(path: Path) -> tuple[int, int, int]:
    """Return what changes when a file is replaced. Raises BadInput."""
    try:
        status = path.stat()
    except OSError as error:
        raise BadInput(f'{path}: cannot be read: {error.strerror}') from None
    return status.st_ino, status.st_size, status.st_mtime_ns


@lru_cache(4096)
def _hash(path: Path, *_: int) -> str:
    return file_hash(path)


def content_hash(path: Path) -> str:
    """Return the SHA-256 of a file, computed once while its size and time stay the same. Raises BadInput."""
    return _hash(path, *_state(path))


def describe_file(path: Path) -> dict[str, Any]:
    """Return what tells a file from another. Raises BadInput."""
    digest, status = content_hash(path), path.stat()
    return {'bytes': status.st_size, 'modified': status.st_mtime_ns, 'sha256': digest}


def is_described(path: Path, description: Mapping[str, Any]) -> bool:
    """Tell whether a file is the one described; it is read only if its time is another, as that of a copy."""
    status = path.stat()
    if status.st_size != description.get('bytes'):
        return False
    return status.st_mtime_ns == description['modified'] or content_hash(path) == description['sha256']


def begin_origin(csv: Path, origin: Origin) -> None:
    """Mark a CSV as being replaced: if the process is killed, neither the old one passes nor the new one."""
    write_text(origin_path(csv), json.dumps(asdict(origin), ensure_ascii=False))


def write_origin(csv: Path, origin: Origin) -> None:
    """Write what a CSV was made with, when it and the files beside it are on the disk. Raises BadInput."""
    begin_origin(csv, replace(origin, csv=describe_file(csv)))


def read_origin(csv: Path) -> Origin | None:
    """Read what a CSV was made with; None if nothing is known. Raises BadInput."""
    path = origin_path(csv)
    if not path.exists():
        return None
    try:
        origin = Origin(**json.loads(read_bytes(path)))
        texts = [*origin.checkpoints.keys(), *origin.checkpoints.values(), origin.command]
        if not all(isinstance(text, str) for text in texts) or {*origin.csv} not in (set(), DESCRIBED):
            raise ValueError('not the values that write_origin writes')
        for fold, scene in (origin.photos or {}).values():
            if not isinstance(fold, int) or not isinstance(scene, int | None):
                raise ValueError('not the fold and the scene of each photo')
        origin.settings.keys()
    except (AttributeError, RecursionError, TypeError, ValueError):
        advice = f'predict {csv} again, or remove the file'
        raise BadInput(f'{path}: not a file that infer.py wrote; {advice}') from None
    return origin


def read_photos(csvs: Iterable[Path]) -> dict[str, list]:
    """Return the fold and the scene of each photo, by image id, as far as they are known of oof.csv files.
    Raises BadInput.
    """
    origins = filter(None, map(read_origin, csvs))
    return {image_id: place for origin in origins for image_id, place in (origin.photos or {}).items()}


def fault_of(csv: Path) -> str:
    """Say in a line why a CSV is not what its checkpoints would make now, and the way out; '' if nothing is
    known against it. Raises BadInput.
    """
    origin = read_origin(csv)
    if origin is None or not csv.exists():
        return ''
    again = f'make it again: {origin.command}' if origin.command else 'make it again with infer.py'
    if not origin.csv:
        return f'{csv}: its prediction was interrupted; {again}'
    if not is_described(csv, origin.csv):
        return f'{csv}: is another file than infer.py wrote; {again}, or remove {origin_path(csv)}'
    if changed := changed_checkpoint(csv.parent, origin.checkpoints):
        return f'{csv}: was made before {changed} changed; {again}'
    return ''


def changed_checkpoint(folder: Path, checkpoints: Mapping[str, str]) -> Path | None:
    """Return the first checkpoint that has another identity now; one that is gone has not changed."""
    for name, identity in checkpoints.items():
        path = folder / name
        if path.exists() and identify_checkpoint(path) != identity:
            return path
    return None


def refuse_outdated(csvs: Iterable[Path]) -> None:
    """Raise BadInput for the first CSV whose checkpoints have changed since it was made."""
    for fault in list_faults(csvs):
        raise BadInput(fault)


def list_faults(csvs: Iterable[Path]) -> Iterator[str]:
    """List the faults of CSVs, for pages that show them nevertheless. Raises BadInput."""
    return filter(None, map(fault_of, csvs))


def is_current(csv: Path, checkpoints: Sequence[Path], settings: Mapping[str, Any]) -> bool:
    """Tell whether a CSV is there, made with these settings from these checkpoints as they are now."""
    try:
        origin = read_origin(csv)
    except BadInput:
        return False
    if origin is None or not csv.exists() or not all(path.exists() for path in checkpoints):
        return False
    if origin.checkpoints != identify_checkpoints(csv.parent, checkpoints):
        return False
    return origin.settings == json.loads(json.dumps(settings)) and is_described(csv, origin.csv)


def fitted_on(folder: Path, csvs: Iterable[Path], files: Iterable[Path]) -> dict[str, dict[str, str]]:
    """Return what a choice in a model's folder was made on, by path from there: the checkpoints of its CSVs,
    and the SHA-256 of the files that were read. Raises BadInput.
    """
    origins = {csv: read_origin(csv) for csv in csvs}
    checkpoints = {
        (csv.parent / name).relative_to(folder).as_posix(): identity
        for csv, origin in origins.items()
        if origin is not None
        for name, identity in origin.checkpoints.items()
    }
    hashes = {path.relative_to(folder).as_posix(): content_hash(path) for path in files}
    return {'checkpoints': checkpoints, 'files': hashes}


def refuse_outdated_fit(path: Path, fitted: Mapping[str, Mapping[str, str]] | None, command: str) -> None:
    """Raise BadInput if what a file in a model's folder was fitted_on has changed; files that are gone have
    not. Raises AttributeError, KeyError or TypeError for what fitted_on does not return.
    """
    folder = path.parent
    if not fitted:  # by an earlier version
        return
    changed = changed_checkpoint(folder, fitted['checkpoints'])
    for name, digest in fitted['files'].items():
        if changed is None and (folder / name).exists() and content_hash(folder / name) != digest:
            changed = folder / name
    if changed is not None:
        again = f'choose again: {python_command("evaluate.py", command, folder)}'
        raise BadInput(f'{path}: was made before {changed} changed; {again}')
