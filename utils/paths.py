"""Keep paths in files so that both can be moved: relative to the file, and found again after a move.

text = path_from(folder, Path('input/data'))     # '../../../input/data', for a file in output/run/fold0
path = find_path(folder, text)                   # where it is now
"""

import os
from itertools import product
from pathlib import Path

from utils.files import exists


def path_from(folder: Path, path: Path) -> str:
    """Return the path from a folder to a file or folder, as a file in that folder keeps it: it begins with
    ./ or ../. Links on the way are followed, as the folder's parents are its real ones.
    """
    text = Path(os.path.relpath(path.parent.resolve() / path.name, folder.resolve())).as_posix()
    return text if text == '..' or text.startswith('../') else f'./{text}'


def is_kept(text: str) -> bool:
    """Tell whether path_from wrote a path; earlier versions kept paths as they were typed."""
    return text.startswith(('./', '../'))


def find_path(folder: Path, text: str) -> Path:
    """Return where a path leads that a file in a folder keeps: from the folder, or as it was typed.

    If nothing is there any more, because one of both was moved alone, two or more of its last parts are
    looked for in the current folder, in that of the file and in those above. A path that is found nowhere is
    the one whose folder exists, else that from the file.
    """
    folder, typed = folder.resolve(), Path(text)
    first = [folder / typed, typed] if is_kept(text) else [typed, folder / typed]
    parts = [part for part in typed.parts if part not in ('..', typed.anchor)]
    ends = [Path(*parts[n:]) for n in range(len(parts) - 1)]
    moved = [base / end for end, base in product(ends, (Path(), folder, *folder.parents))]
    paths = [*first, *moved]
    found = next(filter(exists, paths), None) or next((p for p in paths if exists(p.parent)), first[0])
    return shorten(found) if found is not typed else found


def shorten(path: Path) -> Path:
    """Return a path from the current folder if it lies there, else the whole path."""
    path, here = Path(os.path.abspath(path)), Path.cwd()  # noqa: PTH100 - it follows no links
    return path.relative_to(here) if path.is_relative_to(here) else path
