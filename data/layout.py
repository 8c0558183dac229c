"""Find the annotation files of a data root; in a folder as a labelling tool exports it, say what to do."""

import re
import shlex
from pathlib import Path

from config import COMPETITION_FILE
from utils.cli import python_command
from utils.errors import BadInput, join_first

SPLITS = {'train': (('train_all.json',), ('train.json', 'val.json')), 'test': (('test.json',),)}
# where tools put the COCO files of an export, each tool's own names before names that any may choose
EXPORTS = (
    '*/_annotations.coco*.json',  # Roboflow: train, valid and test, the photos beside them
    '_annotations.coco*.json',
    'annotations/instances_*.json',  # CVAT, datumaro and COCO itself: photos in images/ or a folder a split
    '*/labels.json',  # FiftyOne: photos in data/
    'labels.json',
    'result.json',  # Label Studio: photos in images/
    'annotations/*.json',
    '*/annotations.json',  # labelme
    '*.json',
)


def annotation_files(root: Path, split: str) -> tuple[Path, ...]:
    """Return the JSON files of a split; raise BadInput if they do not exist."""
    if root.is_file():
        advice = f'give --data {shlex.quote(str(root.parent))}'
        raise BadInput(f'{root}: is a file, expected the folder of photos and JSON files; {advice}')
    if not root.is_dir():
        other = 'name another with --data DIR or --set data_root=DIR'
        raise BadInput(
            f'{root}: no such folder; put the photos and JSON files there (docs/data.md), or {other}'
        )
    for names in SPLITS[split]:
        if all((root / name).is_file() for name in names):
            return tuple(root / name for name in names)
    expected = ', or '.join(' + '.join(names) for names in SPLITS[split])
    found, way_out = describe_folder(root, split)
    lacks = 'has no annotations' if split == 'train' else 'has no test photos'
    raise BadInput(f'{root}: {lacks}; {found}expected {expected}{way_out}')


def describe_folder(root: Path, split: str) -> tuple[str, str]:
    """Return what a folder without the files of a split holds, and the way out: '' for what is not known."""
    for name, other in (('train.json', 'val.json'), ('val.json', 'train.json')):
        if split == 'train' and (root / name).is_file():
            rename = shlex.join(['mv', str(root / name), str(root / 'train_all.json')])
            return f'found {name} without {other}, ', f'; if it holds all training photos: {rename}'
    if split == 'train' and (source := find_yolo(root)):
        command = python_command('prepare.py', 'yolo', '--yaml', source, '--out', f'{root}_coco')
        return f'found {source.name}, ', f'; if that is a YOLO set: {command}'
    exports = find_exports(root)
    if any(split_of(root, path) == split for path in exports):
        names = join_first([path.relative_to(root).as_posix() for path in exports])
        command = python_command('prepare.py', 'coco', '--data', root)
        return f'found {names}, ', f'; if a tool exported it as COCO: {command}'
    if split == 'train':
        for folder in sorted(root.glob('*/')):
            files = [*folder.glob('train_all.json'), *find_exports(folder)]
            if files:
                name = shlex.quote(str(folder))
                way_out = f'; give --data {name}, or --set data_root={name}'
                return f'found {files[0].relative_to(root).as_posix()}, ', way_out
    if archives := sorted(root.glob('*.zip')):
        return f'found {archives[0].name}, ', '; unpack it there'
    page = 'tells how exports, YOLO labels and masks come in' if split == 'train' else 'says what it holds'
    return '', f'; docs/data.md {page}'


def find_yolo(root: Path) -> Path | None:
    """Return the data.yaml of a YOLO set, or the classes.txt that Label Studio writes in its place."""
    yaml_files = [path for path in sorted(root.glob('*.y*ml')) if path.name != COMPETITION_FILE]
    if yaml_files and ((root / 'train').is_dir() or (root / 'images').is_dir()):
        return yaml_files[0]
    names = root / 'classes.txt'
    return names if names.is_file() and (root / 'labels').is_dir() else None


def find_exports(root: Path) -> list[Path]:
    """List the COCO files of a tool's export, by the first of EXPORTS that finds any; not those that an
    import of it writes.
    """
    imported = {root / name for name in ('train_all.json', 'test.json', 'test_labels.json')}
    no_masks = re.compile(r'\.|captions_|person_keypoints_|image_info_')
    for pattern in EXPORTS:
        any_case = re.sub('[a-z]', lambda match: f'[{match[0]}{match[0].upper()}]', pattern)
        paths = [
            path for path in root.glob(any_case) if path not in imported and not no_masks.match(path.name)
        ]
        if paths:
            return sorted(paths)
    return []


def split_of(root: Path, path: Path) -> str:
    """Return the split that an exported file is for, by the name of its folder or its own.

    The folds are made anew, so val is for training, too.
    """
    words = f'{path.parent.name if path.parent != root else ""} {path.stem}'.lower()
    first = re.search('(?<![a-z])val', words) or re.search('(?<![a-z])test', words)
    return 'test' if first and first[0] == 'test' else 'train'
