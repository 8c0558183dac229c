"""Find the photos of a data root on disk by the names in its JSON files.

A name that differs in its Unicode form, in backslashes or in a leading './' alone is found; one that differs
in anything else is not, and the error says which file is there.
"""

import os
from functools import lru_cache
from itertools import takewhile
from pathlib import Path
from urllib.parse import unquote

from utils.files import exists, normal_name

LABELS = ('.json', '.txt', '.xml', '.csv', '.npy')  # endings of files that some tools write beside a photo


def find_photo(root: Path, file_name: str) -> Path:
    """Return the path of a photo: as it is named if that exists, else of the same normal_name, if any."""
    path = root / file_name
    if exists(path):
        return path
    folder, parts = root, Path(normal_name(file_name)).parts
    for n, part in enumerate(parts):
        path = folder / part
        if not exists(path):
            entries = list_folder(folder, modified(folder))
            whole = entries.get('/'.join(parts[n:]))  # a\b.jpg in one folder, as some programs unpack a ZIP
            if whole is not None:
                return folder / whole
            path = folder / entries.get(part, part)
        folder = path
    return path


def inside(root: Path, file_name: str, resolved: dict[Path, Path] | None = None) -> bool:
    """Return True if a photo stays below the root after symbolic links are resolved; `resolved` keeps the
    folders, resolved, for the next call.
    """
    resolved = {} if resolved is None else resolved

    def resolve(folder: Path) -> Path:
        if folder not in resolved:
            resolved[folder] = folder.resolve()
        return resolved[folder]

    try:
        path = find_photo(root, file_name)
        is_plain = path.name != '..' and not path.is_symlink()
        target = resolve(path.parent) / path.name if is_plain else path.resolve()
        return target.is_relative_to(resolve(root))
    except (RuntimeError, OSError):  # a loop of links
        return False


def modified(folder: Path) -> int:
    """Return when a folder was changed last, in ns; -1 if it is none."""
    try:
        return folder.stat().st_mtime_ns
    except OSError:
        return -1


@lru_cache(maxsize=256)
def list_folder(folder: Path, time: int) -> dict[str, str]:
    """Return the entries of a folder as it was at a time, by normal_name."""
    try:
        return {normal_name(name): name for name in sorted(os.listdir(folder))}  # noqa: PTH208 (names alone)
    except OSError:
        return {}


def index_files(root: Path) -> dict[str, list[str]]:
    """Return the files below a root, sorted, by their loose_key; without labels that lie beside photos."""
    index: dict[str, list[str]] = {}
    for folder, _, names in os.walk(root):
        for name in names:
            if not name.lower().endswith(LABELS):
                path = Path(folder, name).relative_to(root).as_posix()
                index.setdefault(loose_key(name), []).append(path)
    return {key: sorted(paths) for key, paths in index.items()}


def loose_parts(file_name: str) -> list[str]:
    """Return the parts of a name without case and %20, the last one first."""
    return [part.casefold() for part in reversed(Path(unquote(normal_name(file_name))).parts)]


def loose_key(file_name: str) -> str:
    """Return the last part of a name without its ending: what two tools' names of a photo share."""
    return Path(*loose_parts(file_name)[:1]).stem


def nearest_file(index: dict[str, list[str]], file_name: str) -> str | None:
    """Return the file that a name which does not exist may mean: the one that shares most of its path.

    A file of another ending is meant only in the same folder: masks are named like their photos.
    """
    parts = loose_parts(file_name)

    def shared(path: str) -> int:
        path_parts = loose_parts(path)
        if path_parts[1:] == parts[1:]:
            return len(parts)
        same = takewhile(lambda pair: pair[0] == pair[1], zip(parts, path_parts, strict=False))
        return len(list(same))

    best = max(index.get(loose_key(file_name), []), key=shared, default=None)
    return best if best is not None and shared(best) else None
