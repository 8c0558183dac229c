"""Make a data root of a COCO export as its tool lays it out, and competition.yaml of its categories.

    import_coco(Path('export'), overwrite=False)   # train_all.json, test.json and competition.yaml there

The photos stay where they are: a file_name becomes the path from the root to the photo.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.parse import unquote

from pydantic import ValidationError

from config import (
    COMPETITION_FILE,
    HOME,
    Competition,
    make_competition,
    match_key,
    read_competition,
    write_competition,
)
from data.coco import name_annotation, not_listed
from data.importers import print_competition
from data.layout import annotation_files, describe_folder, find_exports, split_of
from data.paths import find_photo, index_files, nearest_file
from utils.errors import BadInput, one_line
from utils.files import exists, write_text
from utils.foreign_csv import read_texts
from utils.json_files import identify, load_json, read_bytes, require, whole_number

Content = dict[str, Any]  # of a COCO file
UPLOAD = re.compile(r'(^|/)[0-9a-f]{8}-(?=[^/]+$)')
SPLIT_WORD = re.compile('train|val|test')
LISTS = ('images', 'categories', 'annotations')


def import_coco(root: Path, overwrite: bool) -> None:
    """Write train_all.json, test.json and test_labels.json for the COCO files of a tool's export, and
    competition.yaml if there is none. Raises BadInput.

    All that is not for the test is for training, since the folds are made anew.
    """
    if not root.is_dir():
        fault = 'is a file, expected the folder of an export, unpacked' if exists(root) else 'no such folder'
        raise BadInput(f'{root}: {fault}')
    paths = keep_coco(find_exports(root))
    if not paths and (root / 'train_all.json').is_file():
        raise BadInput(f'{root}: is a data root already; expected a COCO export, which has no train_all.json')
    if not paths:
        found, way_out = describe_folder(root, 'train')
        raise BadInput(f'{root}: has no COCO file; {found}expected one as a tool exports it{way_out}')
    splits = {split: [path for path in paths if split_of(root, path) == split] for split in ('train', 'test')}
    if not splits['train']:
        raise BadInput(f'{paths[0]}: is for the test, by its name; found no file for training')
    contents = {split: merge([read_export(root, path) for path in files]) for split, files in splits.items()}
    competition = read_competition(root) or competition_of([contents['train']], splits['train'][0])
    targets = {'train_all.json': contents['train']}
    if splits['test']:
        targets['test.json'] = {key: contents['test'][key] for key in LISTS[:2]} | {'annotations': []}
    if contents['test']['annotations']:
        targets['test_labels.json'] = contents['test']
    existing = [root / name for name in targets if (root / name).exists()]
    if existing and not overwrite:
        raise BadInput(f'{existing[0]}: already exists; --overwrite replaces it')
    write_competition(root, competition)
    for name, content in reversed(targets.items()):  # the training set last: an interrupted import has none
        write_text(root / name, json.dumps(content))
        photos, annotations = len(content['images']), len(content['annotations'])
        print(f'wrote {root / name}: {photos} photos, {annotations} annotations')
    print_classes(root, competition)


def write_classes(root: Path, overwrite: bool, table: Path | None = None, task: str | None = None) -> None:
    """Write competition.yaml with the categories of the annotations as classes, or with the classes that a
    table gives them: those of the home competition if it has no others. Other keys stay. Raises BadInput.

    The task is as it was by default; classes of a multilabel one have no background.
    """
    path = root / COMPETITION_FILE
    if path.exists() and not overwrite:
        raise BadInput(f'{path}: already exists; --overwrite replaces its classes')
    files, categories = annotation_files(root, 'train'), {}
    if table is None:
        classes = competition_of([read_file(file) for file in files], files[0]).classes
    else:
        categories = read_table(table)
        classes = tuple(dict.fromkeys([HOME.classes[0], *categories.values()]))
        classes = HOME.classes if set(classes) <= set(HOME.classes) else classes
    earlier = read_competition(root) or HOME
    task = task or earlier.task
    if task == 'multilabel':
        classes = classes[1:]
        categories = {other: name for other, name in categories.items() if name in classes}
    values = {key: getattr(earlier, key) for key in earlier.model_fields_set}
    if 'score_size' not in values and classes != HOME.classes:
        values['score_size'] = 'own'
    values |= {'classes': classes, 'categories': categories, 'task': task}
    competition = make_competition(values, where=str(path))
    write_competition(root, competition)
    print_classes(root, competition)


def read_table(path: Path) -> dict[str, str]:
    """Read the class of each category from a CSV with the columns category and class. Raises BadInput."""
    table: dict[str, str] = {}
    header = 'category,class'
    try:
        for where, (category, name) in read_texts(path, header, ('category', 'class')):
            if not category or not name:
                raise BadInput(f'{where}: expected a category and its class, under {header}')
            if table.setdefault(category, name) != name:
                found = f'{table[category]!r} and {name!r}'
                raise BadInput(f'{where}: {category!r} has the classes {found}; expected one')
    except OSError as error:
        raise BadInput(f'{path}: cannot be read: {error.strerror}') from None
    if not table:
        raise BadInput(f'{path}: has no rows; expected a category and its class in each, under {header}')
    return table


def print_classes(root: Path, competition: Competition) -> None:
    """Print the classes of a data root, and what else competition.yaml says of scores."""
    objects = [competition.classes[k] for k in competition.object_ids]
    first = '' if competition.is_multilabel else f'{competition.classes[0]} and '
    print(f'{root / COMPETITION_FILE}: {first}{len(objects)} classes: {", ".join(objects)}')
    print_competition(root, competition)


def keep_coco(paths: list[Path]) -> list[Path]:
    """Return the files that hold images, without JSON of other kinds beside them; all if none does."""
    coco = [path for path in paths if len(paths) == 1 or seems_coco(path)] or paths
    others = [path for path in paths if path not in coco]
    if others:
        print(f'passed over, since they are no COCO: {len(others)} JSON files, the first: {others[0]}')
    return coco


def seems_coco(path: Path) -> bool:
    """Return False for JSON of another kind than COCO; a damaged file may be one, and is refused later."""
    try:
        content = json.loads(read_bytes(path))
    except (ValueError, RecursionError):
        return True
    return isinstance(content, dict) and 'images' in content


def read_file(path: Path) -> Content:
    """Read a COCO file; raise BadInput unless it has lists of images, categories and annotations."""
    content = load_json(path, read_bytes(path))
    content['annotations'] = content.get('annotations') or []  # of photos alone
    if not content['annotations']:
        content['categories'] = content.get('categories') or []
    for key in LISTS:
        records = content.get(key)
        if not isinstance(records, list) or not all(isinstance(record, dict) for record in records):
            raise BadInput(f'{path}: expected a COCO file, with lists of images, categories and annotations')
    if any(category.get('name') in (None, '') for category in content['categories']):
        raise BadInput(f'{path}: a category lacks its name')
    for category in content['categories']:
        category['name'] = str(category['name'])
    return content


def competition_of(contents: Sequence[Content], path: Path) -> Competition:
    """Return the competition whose classes are the categories, in the order of their ids, the background
    first. Raises BadInput, which names `path`.

    Roboflow's root, the category of all others under which no object is, is left out.
    """
    found: dict[str, str] = {}  # by match_key: names that differ in case or spaces are of one class
    for content in contents:
        used = {identify(annotation.get('category_id')) for annotation in content['annotations']}
        above = {category.get('supercategory') for category in content['categories']}
        for category in sorted(content['categories'], key=category_order):
            name = category['name']
            is_root = name in above and category.get('supercategory') in ('none', None, '')
            if not is_root or identify(category.get('id')) in used:
                found.setdefault(match_key(name), name)
    names = found.values()
    background = next((name for name in names if match_key(name).strip('_') == 'background'), 'Background')
    try:
        classes = (background, *(name for name in names if name != background))
        return Competition(classes=classes, score_size=256 if classes == HOME.classes else 'own')
    except ValidationError as error:
        fault = one_line(error.errors()[0]['msg'].removeprefix('Value error, '))
        raise BadInput(f'{path}: its categories cannot be classes: {fault}') from None


def category_order(category: Content) -> int:
    """Return the key that sorts categories by id; ids that are no numbers stay in the order of the file."""
    return whole_number(category.get('id')) or 0


def read_export(root: Path, path: Path) -> Content:
    """Read a COCO file of an export; each file_name becomes the path from `root`. Raises BadInput."""
    content = read_file(path)
    check_ids(path, content)
    names = [read_name(f'{path}: images[{n}]', image) for n, image in enumerate(content['images'])]
    folder, parts = find_photos(root, path, names)
    prefix = '' if folder == root else f'{folder.relative_to(root).as_posix()}/'
    images = [
        image | {'file_name': prefix + (name_on_disk(folder, name, parts) or name)}
        for image, name in zip(content['images'], names, strict=True)
    ]
    return {**content, 'images': images}


def check_ids(path: Path, content: Content) -> None:
    """Raise BadInput for an annotation of an image or a category that is not listed."""
    for key, listed in (('image_id', 'images'), ('category_id', 'categories')):
        ids = {identify(record.get('id')) for record in content[listed]}
        for position, annotation in enumerate(content['annotations']):
            if identify(annotation.get(key)) not in ids:
                where = name_annotation(path, position, annotation)
                raise not_listed(where, key, annotation.get(key), ids, listed)


def read_name(where: str, image: Content) -> str:
    """Return the file_name of an image with slashes, or the address that LVIS has instead of it."""
    key = 'file_name' if image.get('file_name') or not image.get('coco_url') else 'coco_url'
    return require(where, image, key, str).replace('\\', '/')


def find_photos(root: Path, path: Path, names: list[str]) -> tuple[Path, int]:
    """Return the folder below which photos lie, and how many parts of their names, from the last, lead there:
    0 for all. Raises BadInput if the first photos are nowhere.
    """
    subset = path.stem.removeprefix('instances_')
    usual = [path.parent, root]
    usual += [base / name for base in usual for name in ('images', 'data', 'photos', 'JPEGImages')]
    usual += [root / subset, root / 'images' / subset]
    folders = [*usual, *sorted(root.glob('*/'))]
    for parts in (0, 3, 2, 1):  # Label Studio and LVIS write paths of their servers
        counts = {
            folder: sum(name_on_disk(folder, name, parts) is not None for name in names[:20])
            for folder in dict.fromkeys(folders)
        }
        best = max(counts, key=counts.__getitem__)
        if counts[best] and best not in usual:
            best = choose_folder(path, names[0], [f for f in counts if counts[f] == counts[best]])
        if counts[best]:
            return best, parts
    first = names[0] if names else 'file_name'
    tried = ', '.join(sorted({f'{folder.relative_to(root)}/' for folder in folders if folder.is_dir()}))
    near = nearest_file(index_files(root), first)
    hint = f'{near} is there: ' if near else ''
    fault = f'found its photo {first!r} in none of {tried}'
    raise BadInput(f'{path}: {fault}; {hint}put the photos into {root}/images')


def choose_folder(path: Path, name: str, folders: list[Path]) -> Path:
    """Return which of several folders with photos of the same names a file means: that whose name has the
    same split. Raises BadInput.
    """
    split = SPLIT_WORD.search(path.stem.lower())
    same = [folder for folder in folders if SPLIT_WORD.findall(folder.name.lower()) == [split and split[0]]]
    if len(folders) > 1 and len(same) != 1:
        found = f'found its photo {name!r} in {folders[0].name}/ and in {folders[1].name}/'
        right = folders[0].parent / path.stem.removeprefix('instances_')
        raise BadInput(f'{path}: {found}; rename the right one to {right}')
    return same[0] if same else folders[0]


def name_on_disk(folder: Path, name: str, parts: int) -> str | None:
    """Return the last parts of a name, of all if 0, as they are in a folder: %20 may stand for a space, and
    the number that Label Studio writes before a name may be missing.
    """
    plain = unquote(name).replace('\\', '/')
    for form in (name, plain, UPLOAD.sub(r'\1', plain)):
        form = '/'.join(form.split('/')[-parts:])
        if form and not form.startswith('/') and exists(find_photo(folder, form)):
            return form
    return None


def merge(contents: list[Content]) -> Content:
    """Merge COCO files into one, categories by name; a single file keeps its ids."""
    if len(contents) == 1:
        return {key: contents[0][key] for key in LISTS}
    merged: Content = {key: [] for key in LISTS}
    category_ids: dict[str, int] = {}
    for content in contents:
        image_ids, new_ids = {}, {}
        for image in content['images']:
            image_ids[identify(image.get('id'))] = len(merged['images'])
            merged['images'].append(image | {'id': len(merged['images'])})
        for category in sorted(content['categories'], key=category_order):
            name = category['name']
            if name not in category_ids:
                category_ids[name] = len(category_ids) + 1
                merged['categories'].append(category | {'id': category_ids[name]})
            new_ids[identify(category.get('id'))] = category_ids[name]
        for annotation in content['annotations']:
            changes = {'id': len(merged['annotations'])}
            for key, ids in (('image_id', image_ids), ('category_id', new_ids)):
                changes[key] = ids[identify(annotation.get(key))]
            merged['annotations'].append(annotation | changes)
    return merged
