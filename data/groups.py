"""Find the group of each photo: by a pattern of its file name, or by a CSV; and say if names look grouped.

`group` in competition.yaml is a regular expression, or the path of a CSV in the data root whose name ends
with .csv, with the columns file_name (or image_id) and group.
"""

import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

import numpy as np

from config import COMPETITION_FILE
from data.paths import inside
from utils.errors import BadInput, one_line
from utils.files import normal_name
from utils.foreign_csv import read_texts

# how a CSV may call a photo: by its path, without folders, or without its ending too
FORMS = (normal_name, lambda name: PurePosixPath(normal_name(name)).name, lambda name: stem_of(name))
# what often stands for one scene in a file name, and a pattern that finds it
SUBJECTS = 'patient|subject|person|case|video|vid|clip|scene|drive|seq|sequence|session|slide|site|id'
PORTION = '.*(?:batch|part|chunk|fold|shard|train|val|test)'  # of a set, whatever it shows
HINTS = {
    'a numbered patient, video or scene': rf'(?i)(?<![a-z])(?:{SUBJECTS})[-_ ]?\d+',
    'a date': r'((?<!\d)(?:19|20)\d\d([-_.]?)(?:0[1-9]|1[0-2])\2(?:0[1-9]|[12]\d|3[01])(?!\d))',
    'a numbered folder': rf'(?i)^(?!{PORTION})(.*\d.*)/',
    'an original': r'^(.+)\.rf\.',  # of Roboflow's augmented copies
    'a numbered beginning': rf'(?i)(?:^|/)(?!{PORTION}[^/]*$)([^/]*\d[^/]*)[-_ ][^-_ /]*$',
}
LEAST_GROUPS = 3
LEAST_SHARED = 0.5  # share of the photos that are not alone in their group
LARGEST_GROUP = 0.7  # share of the photos
MOST_OTHERS = 0.1  # share of the photos that a pattern does not match


def group_names(root: Path, names: Sequence[str], group: str) -> np.ndarray:
    """Return the (n,) group of each photo of a data root by its file name. Raises BadInput."""
    if group.lower().endswith('.csv'):
        return np.unique(read_groups(root, names, group), return_inverse=True)[1]
    texts = [match_group(name, group) for name in names]
    for name, text in zip(names, texts, strict=True):
        if text is None:
            fault = f'group: {group} matches nothing in the file name {name!r}'
            advice = 'a pattern that ends with |$ takes all other photos as one group'
            raise BadInput(f'{root / COMPETITION_FILE}: {fault}; {advice}')
    return np.unique(texts, return_inverse=True)[1]


def match_group(name: str, pattern: str) -> str | None:
    """Return the text in a file name that a pattern matches, or the first parenthesis in it; None if none."""
    match = re.search(pattern, normal_name(name))
    if match is None:
        return None
    return match[0] if not match.re.groups or match[1] is None else match[1]


def stem_of(name: str) -> str:
    """Return a file name without its folders and its ending."""
    path = PurePosixPath(normal_name(name))
    return path.name.removesuffix(path.suffix)


def read_groups(root: Path, names: Sequence[str], group: str) -> list[str]:
    """Return the group of each photo that a CSV in the data root gives it. Raises BadInput.

    Rows of other photos, such as those of the test, are passed over.
    """
    path = root / group
    if not inside(root, group):
        raise BadInput(f'{root / COMPETITION_FILE}: group: {group} leads out of {root}; put the CSV there')
    rows = read_rows(path)
    form = next((form for form in FORMS if set(rows) & set(map(form, names))), FORMS[0])
    for name in names:
        if form(name) not in rows:
            fault, expected = f'lacks the photo {name!r}', 'expected a row file_name,group for each'
            raise BadInput(f'{path}: {fault}, {expected}; add it')
    forms = Counter(map(form, names))
    if twins := next((name for name in names if forms[form(name)] > 1), None):
        raise BadInput(f'{path}: {form(twins)!r} may be several photos; give the file_name, as {twins!r} is')
    return [rows[form(name)] for name in names]


def read_rows(path: Path) -> dict[str, str]:
    """Read the groups of a CSV by normal_name of the photo. Raises BadInput."""
    groups: dict[str, str] = {}
    header = 'file_name,group'
    expected = f'expected lines of {header}'
    try:
        for where, (name, group) in read_texts(path, header, ('file_name', 'group'), ('image_id', 'group')):
            if not name or not group:
                lacks = 'file_name' if not name else f'group of {name!r}'
                raise BadInput(f'{where}: the {lacks} is empty, {expected}')
            if groups.setdefault(normal_name(name), group) != group:
                found = f'{groups[normal_name(name)]!r} and {group!r}'
                raise BadInput(f'{where}: {name!r} has the groups {found}; expected one')
    except OSError as error:
        fault = f'{path}: {one_line(error.strerror)}'
        raise BadInput(f'{fault} (group in {COMPETITION_FILE}); {expected} in the data root') from None
    return groups


def suggest_group(names: Sequence[str]) -> str:
    """Return a remark if file names look as if several photos shared a scene, or ''. Plain numbers do not.

    The first of HINTS counts that finds LEAST_GROUPS groups, with LEAST_SHARED of the photos not alone in
    theirs, LARGEST_GROUP of them at most in one, and MOST_OTHERS of them in none.
    """
    for what, pattern in HINTS.items():
        groups = Counter(match_group(name, pattern) for name in names)
        others = groups.pop(None, 0)
        shared = sum(count for count in groups.values() if count > 1)
        if others > MOST_OTHERS * len(names) or len(groups) < LEAST_GROUPS:
            continue
        (text, most), *_ = groups.most_common(1)
        if shared >= LEAST_SHARED * len(names) and most <= LARGEST_GROUP * len(names):
            setting = f"group: '{pattern}{'|$' if others else ''}'"
            found = f'the names share {what} ({len(groups)} of them, {text!r} in {most} photos)'
            return f'{found}; if one shows the same, write {setting} into {COMPETITION_FILE}'
    return ''
