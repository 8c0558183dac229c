"""Stage 0: check a data set, draw its masks, cache it, assign folds; or make one: the demo set, TACO, an
import.

python prepare.py check --data input/data
python prepare.py competition --data input/mine   # competition.yaml: its categories become the classes
python prepare.py masks --data input/data --out output/masks
python prepare.py folds --cfg configs/convnext.yaml   # the cache and folds.csv; train.py makes them too
python prepare.py plan --data input/mine --memory 24 --hours 8   # configs/mine.yaml, with its reasons
python prepare.py demo --out input/demo --train 120 --test 40 --seed 0
python prepare.py taco --annotations annotations.json --out input/taco   # downloads the photos, 512x512
python prepare.py coco --data input/mine   # a COCO export as its tool lays it out; its photos stay there
python prepare.py yolo --yaml set/data.yaml --out input/mine   # segmentation labels: class x1 y1 x2 y2 ...
python prepare.py from-masks --photos photos --masks masks --out input/mine --classes can bottle   # PNG ids
python prepare.py from-masks --photos photos --masks masks --out input/mine --classes can --map 255=can
python prepare.py from-json --photos train/DCM --labels train/outputs_json --test test/DCM --out input/mine
python prepare.py from-rle --csv train.csv --photos train_images --out input/mine   # run lengths in a CSV
python prepare.py label-studio --json project-1.json --photos photos --out input/mine
python prepare.py cvat --xml annotations.xml --photos images --out input/mine
python prepare.py test --photos photos --data input/mine   # test.json of a folder of photos
"""

import argparse
import math
import re
import shutil
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

import numpy as np
from PIL import Image

from config import (
    COMPETITION_FILE,
    HOME,
    Competition,
    Config,
    load_config,
    make_config,
    match_key,
    read_competition,
)
from data.cache import open_cache
from data.check import check_data, origin_of_classes
from data.coco import draw_truth, read_coco
from data.exports import import_coco, write_classes
from data.folds import describe_split, folds_path, read_folds, read_pairs, read_rows
from data.import_cvat import import_cvat
from data.import_json import import_json
from data.import_labelstudio import import_label_studio
from data.import_masks import import_masks
from data.import_rle import RunCsv, import_rle
from data.import_yolo import import_yolo
from data.importers import natural_key, write_test
from data.labelled import TASKS, Boxes, Source, given_task, read_classes
from data.layout import annotation_files
from data.mask_legend import is_table, read_names
from data.mask_pairs import MaskSource, class_folders
from data.plan import Budget, make_plan, read_fingerprint
from submission import competition_and_data
from utils.cli import (
    MAX_SEED,
    ArgumentParser,
    add_config_arguments,
    at_least,
    in_repository,
    next_line,
    run_script,
)
from utils.competition import Order, Task
from utils.errors import BadInput, plural
from utils.files import (
    exists,
    lock,
    make_folder,
    normal_name,
    refuse_inside,
    remove_partials,
    write_text,
    write_whole,
)
from utils.json_files import load_json, read_bytes
from utils.log import log
from utils.progress import progress
from utils.run_csv import Role
from utils.yaml_files import parse_yaml, read_mapping

# configs of the next command that is printed: the small one without a GPU, and for few photos
LARGE, SMALL, FEW_PHOTOS = 'configs/convnext.yaml', 'configs/trash481.yaml', 200
MAX_PHOTOS = 10**6  # of a demo set


def command(argv: list[str] | None = None) -> None:
    args = read_arguments(argv)
    if getattr(args, 'out', None) is not None:
        inputs = ('annotations', 'csv', 'data', 'labels', 'yaml')  # importers check their folders of photos
        refuse_inside(args.out, (getattr(args, key, None) for key in inputs))
    args.run(args)


Add = Callable[[str, Callable[[Namespace], None], str], ArgumentParser]
# options that several commands share
CLASSES = 'names of the classes in the order of their ids, or a file of them; by default those found'
TASK = 'multilabel: classes may overlap, without a background; by default that of competition.yaml'
BOXES = 'boxes among the shapes: refuse them, leave them out, or take them as rectangles'
UNLABELLED = 'photos that have no label: leave them out, or take them as photos without objects'
OPTIONS: dict[str, dict[str, Any]] = {
    '--data': {'type': Path, 'required': True, 'help': 'data root'},
    '--photos': {'type': Path, 'required': True, 'help': 'folder of the training photos'},
    '--test': {'type': Path, 'help': 'folder of photos without labels, for test.json; by default none'},
    '--classes': {'nargs': '+', 'default': [], 'metavar': 'NAME', 'help': CLASSES},
    '--task': {'choices': get_args(Task), 'help': TASK},
    '--boxes': {'choices': get_args(Boxes), 'default': 'refuse', 'help': BOXES},
    '--unlabelled': {'choices': ['skip', 'empty'], 'default': 'skip', 'help': UNLABELLED},
    '--out': {'type': Path, 'required': True, 'help': 'data root to make'},
    '--overwrite': {'action': 'store_true', 'help': 'replace a train_all.json that exists'},
}


def read_arguments(argv: list[str] | None) -> Namespace:
    parser = ArgumentParser(__doc__)
    commands = parser.add_subparsers(dest='command', required=True)

    def add(name: str, run: Callable[[Namespace], None], doc: str) -> ArgumentParser:
        command = commands.add_parser(name, doc)
        command.set_defaults(run=run)
        return command

    add_looks(add)
    add_plan(add)
    add_demo(add)
    add_imports(add)
    add_labelling_tools(add)
    add_run_lengths(add)
    return parser.parse_args(argv)


def add_shared(command: ArgumentParser, *options: str) -> None:
    for option in options:
        command.add_argument(option, **OPTIONS[option])


def add_looks(add: Add) -> None:
    """Add the commands that look at a data root, and complete it."""
    data = {'type': Path, 'help': 'data root; by default that of --cfg, or input/data'}
    command = add('check', check, 'check the records, photos and masks of a data set')
    command.add_argument('--data', **data)
    add_config_arguments(command, required=False)

    command = add('competition', make_competition, 'write competition.yaml from the categories')
    add_shared(command, '--data', '--task')
    table = 'CSV category,class, such as data/taco.csv; by default each category is a class'
    command.add_argument('--table', type=Path, help=table)
    replace = 'replace the classes of a competition.yaml that exists'
    command.add_argument('--overwrite', action='store_true', help=replace)

    command = add('test', make_test_set, 'write test.json for a folder of photos')
    command.add_argument('--photos', type=Path, required=True, help='folder of the test photos')
    below = 'data root; photos that lie elsewhere are copied below its folder test'
    command.add_argument('--data', type=Path, required=True, help=below)
    command.add_argument('--overwrite', action='store_true', help='replace a test.json that exists')

    command = add('masks', write_masks, 'write the masks that a model learns from, as PNG ids')
    command.add_argument('--data', **data)
    places = 'folder for <file_name>.png, or <class>/<file_name>.png if classes may overlap'
    command.add_argument('--out', type=Path, required=True, help=places)
    add_config_arguments(command, required=False)

    command = add('folds', print_folds, 'make the cache and the folds of a config, print the folds')
    add_config_arguments(command)


def add_plan(add: Add) -> None:
    doc = 'plan a config from the data, the memory and the hours: docs/plan.md'
    command = add('plan', write_plan, doc)
    add_shared(command, '--data')
    command.add_argument('--memory', type=amount, required=True, help='GB that a training may take')
    command.add_argument('--hours', type=amount, required=True, help='hours for all folds, one after another')
    gpu = 'device that trains; by default cuda if there is an NVIDIA GPU'
    command.add_argument('--device', choices=['cpu', 'cuda'], help=gpu)
    no_up = 'photos from above or through a microscope: all flips and turns are harmless'
    command.add_argument('--no-up', action='store_true', help=no_up)
    command.add_argument('--name', help="name of the config; by default the data root's")
    command.add_argument('--out', type=Path, help='file to write; by default configs/<name>.yaml')
    command.add_argument('--overwrite', action='store_true', help='replace a file that exists')


def add_demo(add: Add) -> None:
    command = add('demo', make_demo, 'draw a demo set, with test labels')
    command.add_argument('--out', type=Path, default=Path('input/demo'), help='data root to make')
    command.add_argument('--train', type=at_least(1, MAX_PHOTOS), default=120, help='training photos')
    command.add_argument('--test', type=at_least(1, MAX_PHOTOS), default=40, help='test photos')
    command.add_argument('--seed', type=at_least(0, MAX_SEED), default=0, help='seed of the drawings')
    kinds = 'trash with one class a pixel, or hands with bones that overlap, as a competition gives them'
    command.add_argument('--task', choices=get_args(Task), default='multiclass', help=kinds)
    side = 'side of the photos of hands; by default 2048'
    command.add_argument('--size', type=at_least(128, 4096), help=side)


def add_imports(add: Add) -> None:
    """Add the commands that make a data root of other formats."""
    command = add('taco', make_taco_set, 'download TACO and make a training set of it')
    command.add_argument('--annotations', type=Path, required=True, help="TACO's annotations.json")
    command.add_argument('--out', type=Path, required=True, help='data root to make or to complete')
    originals = 'folder of the original photos; by default they are downloaded'
    command.add_argument('--photos', type=Path, help=originals)
    command.add_argument('--workers', type=at_least(1), default=8, help='parallel downloads')
    command.add_argument('--retries', type=at_least(0), default=5, help='retries of a download')
    mirror = 'host, or host:port, that may have an address in this network; by default none'
    command.add_argument('--mirror', metavar='HOST', help=mirror)
    add_shared(command, '--overwrite')

    command = add('coco', import_coco_set, 'make a data root of a COCO export, where it lies')
    command.add_argument('--data', type=Path, required=True, help='folder of the export, with its photos')
    add_shared(command, '--overwrite')

    command = add('yolo', import_yolo_set, 'import a YOLO segmentation set')
    command.add_argument('--yaml', type=Path, required=True, help='data.yaml: names, train, val, test')
    add_shared(command, '--boxes', '--task', '--out', '--overwrite')

    command = add('from-masks', import_mask_set, 'import photos and masks of ids or colours')
    add_shared(command, '--photos')
    command.add_argument('--masks', type=Path, required=True, help='folder of <photo>.png: ids or colours')
    names = (
        'names of the classes by id, after the background, or a file of them; by default those of --cfg, of '
        'competition.yaml in --out, of a file of --map, or of the home competition'
    )
    command.add_argument('--classes', nargs='+', metavar='NAME', help=names)
    values = "class of a value, as in 255=1 '#ff0000'=can 11=ignore, or a file of name,r,g,b (labelmap.txt)"
    command.add_argument('--map', nargs='+', action='extend', default=[], metavar='VALUE=CLASS', help=values)
    ending = 'ending of the names of masks: _mask, or _sat=_mask in place of _sat; by default it is found'
    command.add_argument('--suffix', help=ending)
    turned = 'how photos with an EXIF turn were when the masks were drawn'
    command.add_argument('--orientation', choices=['displayed', 'stored'], default='displayed', help=turned)
    task = 'multilabel: classes may overlap, and each has a folder, MASKS/<class>; by default as --out has it'
    command.add_argument('--task', choices=get_args(Task), help=task)
    add_shared(command, '--test', '--out', '--overwrite')
    add_config_arguments(command, required=False)


def add_labelling_tools(add: Add) -> None:
    """Add the commands that make a data root of shapes that people drew and named."""
    tools = {
        'from-json': ('--labels', 'folder of the JSON files, one a photo', 'one JSON file a photo'),
        'label-studio': ('--json', "Label Studio's export named JSON", 'an export of Label Studio'),
        'cvat': ('--xml', "CVAT's annotations.xml, for images or video", 'an export of CVAT'),
    }
    for name, (option, meaning, what) in tools.items():
        command = add(name, import_drawn_set, f'import photos and their shapes: {what}')
        command.add_argument(option, dest='labels', type=Path, required=True, help=meaning)
        task = 'whether classes may overlap; by default, as the shapes do'
        command.add_argument('--task', choices=get_args(Task), help=task)
        add_shared(
            command, '--photos', '--test', '--classes', '--unlabelled', '--boxes', '--out', '--overwrite'
        )


def add_run_lengths(add: Add) -> None:
    """Add the command that makes a data root of a CSV of run lengths."""
    command = add('from-rle', import_rle_set, 'import photos and the run lengths of a CSV, as train.csv')
    rows = 'the CSV: a row an image and class, an image, or an object'
    command.add_argument('--csv', type=Path, required=True, help=rows)
    order = 'how pixels are counted: down the columns, as is usual, or along the rows'
    command.add_argument('--order', choices=get_args(Order), default='column', help=order)
    first = 'number of the first pixel'
    command.add_argument('--first', type=int, choices=[0, 1], default=1, help=first)
    columns = 'columns of the CSV, as in image=id mask=annotation; by default they are found'
    command.add_argument('--columns', nargs='+', default=[], metavar='ROLE=NAME', help=columns)
    task = 'whether classes may overlap; by default they must not'
    command.add_argument('--task', choices=get_args(Task), help=task)
    add_shared(command, '--photos', '--test', '--classes', '--unlabelled', '--out', '--overwrite')


def check(args: Namespace) -> None:
    """Check a data root; the last line counts what to look at. Raises BadInput with the first fault."""
    cfg = Config() if args.cfg is None else load_config(args.cfg, args.set, args.data)
    competition, data = competition_and_data(args) if args.cfg is None else (cfg.competition, cfg.data_root)
    print(origin_of_classes(data, competition, args.cfg))
    folds = 1 if cfg.folds_csv else cfg.folds  # folds of one's own are not made
    made = folds_path(cfg) if exists(folds_path(cfg)) else None
    remarks, folds_can_be_made = check_data(data, competition, folds, made)
    things = f'{plural(len(remarks), "thing")} to look at: {"; ".join(remarks)}; nothing else wrong found'
    print(f'{data}: {things if remarks else "nothing wrong found"}')
    if folds_can_be_made:
        print_next(data, args.cfg, args.set)


def make_competition(args: Namespace) -> None:
    write_classes(args.data, args.overwrite, args.table, args.task)
    print(next_line('prepare.py', 'check', '--data', args.data))


def write_masks(args: Namespace) -> None:
    """Write the masks of the training photos at their own size as PNG, out/<file_name>.png of ids, or
    out/<class>/<file_name>.png of 0 and 1 if classes may overlap.
    """
    (competition, data), out = competition_and_data(args), args.out
    coco = read_coco(data, 'train', competition)
    folders = folders_of_masks(competition, out)
    with lock(out / '.lock', 'drawing masks'):
        names = {normal_name(photo.file_name) for photo in coco.photos}
        for parent in {(folder / name).parent for name in names for folder in folders}:
            remove_partials(parent, '*')
        for photo in progress(coco.photos, 'masks', 'mask'):
            truth = draw_truth(photo, competition)
            for folder, mask in zip(folders, truth.reshape(-1, *photo.size), strict=True):
                with write_whole(folder / f'{normal_name(photo.file_name)}.png') as file:
                    Image.fromarray(mask).save(file, 'PNG', compress_level=1)
    values = '0 and 1' if competition.is_multilabel else f'ids 0 to {len(competition.classes) - 1}'
    count = f'{len(coco.photos)} masks' + (' of each class' if competition.is_multilabel else '')
    print(f'wrote {count} under {out}: {values}, 255 ignored')
    print_next(data, args.cfg, args.set)


def folders_of_masks(competition: Competition, out: Path) -> list[Path]:
    """Return the folder of the masks, or that of each class if classes may overlap."""
    if not competition.is_multilabel:
        return [out]
    return [out / name for name in class_folders(competition.classes)]


def print_folds(args: Namespace) -> None:
    """Make the cache and the folds if they do not exist, and print the photos of each class in each fold."""
    cfg = load_config(args.cfg, args.set)
    cache = open_cache(cfg, 'train')
    folds = read_folds(cfg, cache)
    if remark := describe_split(cache.coco.photos.names(), read_pairs(cache), folds):
        log.warning(f'warning: {folds_path(cfg)}: {remark}')
    counts = np.zeros((cfg.folds, len(cfg.classes)), int)
    for fold, classes in zip(folds, cache.coco.photos.classes(), strict=True):
        counts[fold, list(classes)] += 1
    print(f'{folds_path(cfg)}: photos of each class in each fold')
    width = max(16, 1 + max(map(len, cfg.classes)))
    print(f'{"class":<{width}}' + ''.join(f'{f"fold {k}":>8}' for k in range(cfg.folds)))
    print(f'{"all":<{width}}' + ''.join(f'{(folds == k).sum():>8}' for k in range(cfg.folds)))
    for k in cfg.competition.object_ids:
        name, numbers = cfg.classes[k], counts[:, k]
        print(f'{name:<{width}}' + ''.join(f'{number:>8}' for number in numbers))
    resume = ['--resume'] if (cfg.run_dir(0) / 'last.pt').exists() else []
    print(next_line('train.py', '--fold', 0, *resume, cfg=args.cfg, changes=args.set))


def amount(text: str) -> float:
    """Convert the text of --memory or --hours: a number above 0."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < 100_000:
        raise argparse.ArgumentTypeError(f'found {text[:40]!r}, expected a number above 0')
    return value


def write_plan(args: Namespace) -> None:
    """Write a config for a data root and say what it is planned from. Raises BadInput."""
    name = args.name or re.sub(r'[^\w.-]+', '_', args.data.resolve().name).strip('.-') or 'plan'
    out = args.out or Path('configs') / f'{name}.yaml'
    if exists(out) and not args.overwrite:
        raise BadInput(f'{out}: exists; give another --name or --out, or --overwrite')
    competition = read_competition(args.data) or HOME
    coco = read_coco(args.data, 'train', competition)
    has_test = (args.data / 'test.json').is_file()
    test_photos = len(read_coco(args.data, 'test', competition).photos) if has_test else 0
    found = read_fingerprint(coco, test_photos)
    print('\n'.join(found.describe()))
    device = args.device or ('cuda' if shutil.which('nvidia-smi') else 'cpu')

    from engine.machine import Device  # imports torch

    budget = Budget(args.memory, args.hours, args.no_up)
    plan = make_plan(found, budget, Device(device, args.memory, competition))
    text = plan.text()
    make_config({'name': name, **parse_yaml(text, str(out)), 'competition': competition}, str(out))
    for note in plan.notes:
        print(note)
    make_folder(out.parent)
    write_text(out, text if args.out is None or out.stem == name else f'name: {name}\n{text}')
    print(f'wrote {out}:\n{text}')
    places = fit_folds(out, [f'data_root={args.data}', f'cache_dir={args.data}_cache'])
    print(next_line('train.py', '--fold', 0, '--dry-run', cfg=out, changes=places))


def make_demo(args: Namespace) -> None:
    """Draw the demo set; raise BadInput if the folder holds anything else."""
    if args.task == 'multilabel':
        make_hand_demo(args)
        return
    if args.size is not None:
        raise BadInput('--size is of --task multilabel; the photos of trash are 512x512')
    from data.demo.scenes import make_demo_set  # slow to import

    make_folder(args.out)
    traces = ('test_labels.json', '.demo.lock')  # a set that was interrupted has the lock alone
    if any(args.out.iterdir()) and not any((args.out / name).exists() for name in traces):
        raise BadInput(f'{args.out}: is not empty and not a demo set; give another --out')
    with lock(args.out / '.demo.lock', 'drawing a demo set'):
        for name in ('train_all.json', 'test.json', 'test_labels.json'):
            (args.out / name).unlink(missing_ok=True)  # they describe the photos that are replaced now
        make_demo_set(args.out, args.train, args.test, args.seed)
    counts = f'{args.train} training and {args.test} test photos'
    print(f'wrote {counts} under {args.out}; the test labels are in test_labels.json')
    print_next(args.out, in_repository('configs/demo.yaml'))


def make_hand_demo(args: Namespace) -> None:
    """Draw hands as a competition gives them, and print how to import them. Raises BadInput."""
    from data.demo.hands import make_hand_set  # slow to import

    make_folder(args.out)
    if any(args.out.iterdir()) and not (args.out / '.demo.lock').exists():
        raise BadInput(f'{args.out}: is not empty and not a demo set; give another --out')
    with lock(args.out / '.demo.lock', 'drawing a demo set'):
        make_hand_set(args.out, args.train, args.test, args.seed, args.size or 2048)
    counts = f'{args.train} training and {args.test} test photos'
    print(f'wrote {counts} under {args.out}; the test labels are in test_labels/outputs_json')
    folders = ['--photos', args.out / 'train/DCM', '--labels', args.out / 'train/outputs_json']
    folders += ['--test', args.out / 'test/DCM', '--out', f'{args.out}_data']
    print(next_line('prepare.py', 'from-json', *folders))


def make_test_set(args: Namespace) -> None:
    write_test(args.photos, args.data, args.overwrite)
    print(next_line('prepare.py', 'check', '--data', args.data))


def import_drawn_set(args: Namespace) -> None:
    """Import what a labelling tool wrote. Raises BadInput."""
    importers = {'from-json': import_json, 'label-studio': import_label_studio, 'cvat': import_cvat}
    options = {
        key: getattr(args, key) for key in ('test', 'classes', 'task', 'boxes', 'unlabelled', 'overwrite')
    }
    importers[args.command](Source(args.photos, args.out, **options), args.labels)
    print(next_line('prepare.py', 'check', '--data', args.out))


def import_rle_set(args: Namespace) -> None:
    """Import a CSV of run lengths. Raises BadInput."""
    columns = dict(entry.partition('=')[::2] for entry in args.columns)
    if unknown := [role for role, name in columns.items() if role not in get_args(Role) or not name]:
        roles = ', '.join(get_args(Role))
        raise BadInput(f'--columns: found {unknown[0]!r}, expected ROLE=NAME with a role of {roles}')
    options = {key: getattr(args, key) for key in ('test', 'classes', 'task', 'unlabelled', 'overwrite')}
    source = Source(args.photos, args.out, **options)
    import_rle(source, RunCsv(args.csv, columns, args.order, args.first))
    print(next_line('prepare.py', 'masks', '--data', args.out, '--out', f'{args.out}_masks'))


def make_taco_set(args: Namespace) -> None:
    from data.taco import Downloads, make_taco  # slow to import

    refuse_inside(args.out, [args.photos])
    source = args.photos or Downloads(args.retries, args.mirror)
    make_taco(args.annotations, args.out, source, args.workers, args.overwrite)
    print(next_line('prepare.py', 'check', '--data', args.out))


def import_coco_set(args: Namespace) -> None:
    import_coco(args.data, args.overwrite)
    print(next_line('prepare.py', 'check', '--data', args.data))


def import_yolo_set(args: Namespace) -> None:
    import_yolo(args.yaml, args.out, args.boxes, args.overwrite, args.task)
    print(next_line('prepare.py', 'check', '--data', args.out))


def import_mask_set(args: Namespace) -> None:
    classes = classes_of_masks(args)
    options = {'changes': args.map, 'suffix': args.suffix, 'orientation': args.orientation}
    source = MaskSource(args.photos, args.masks, classes, args.test, **options)
    import_masks(source, args.out, args.overwrite, task_of_masks(args))
    print(next_line('prepare.py', 'check', '--data', args.out, cfg=args.cfg, changes=args.set))


def task_of_masks(args: Namespace) -> Task:
    """Return the task by --task, or competition.yaml in --out."""
    return given_task(args.out, args.task) or 'multiclass'


def classes_of_masks(args: Namespace) -> tuple[str, ...]:
    """Return the classes by --classes, --cfg, competition.yaml in --out, a file of --map, or, if classes may
    overlap, the folders of the masks.
    """
    files = [Path(entry) for entry in args.map if '=' not in entry]
    if args.classes is not None:
        if args.cfg is not None:
            raise BadInput('--classes: expected --classes or --cfg, not both')
        file = Path(args.classes[0])
        if len(args.classes) == 1 and is_table(file):
            raise BadInput(f'--classes {file}: has the values of the classes, too; give --map {file}')
        is_multilabel, names = task_of_masks(args) == 'multilabel', read_classes(args.classes)
        has_background = is_multilabel or (names and match_key(names[0]) == 'background')
        names = names if has_background else ['Background', *names]
        facts = TASKS[task_of_masks(args)]
        return make_config({'classes': names, 'competition': facts}, where='--classes').classes
    if args.cfg is None and (competition := read_competition(args.out)) is not None:
        print(f'{len(competition.classes)} classes from {args.out / COMPETITION_FILE}')
        if competition.task != task_of_masks(args):
            raise BadInput(f'{args.out / COMPETITION_FILE}: its task is {competition.task}; give --classes')
        return competition.classes
    if args.cfg is None and args.task == 'multilabel' and args.masks.is_dir():
        names = sorted((path.name for path in args.masks.glob('[!.]*/')), key=natural_key)
        print(f'classes ({len(names)}), the folders of {args.masks}: {", ".join(names)}')
        return make_config({'classes': names, 'competition': TASKS['multilabel']}, where='--masks').classes
    if args.cfg is None and files:
        return make_config({'classes': read_names(files[0])}, where=str(files[0])).classes
    return competition_and_data(args)[0].classes


def print_next(data: Path, cfg: Path | None = None, changes: Sequence[str] = ()) -> None:
    """Print the command that makes the folds of a data root, with its config or one that fits it."""
    path = cfg or fitting_config(data)
    settings = read_mapping(path) | dict(change.split('=', 1) for change in changes)
    known = data.resolve() == Path(settings.get('data_root', Config().data_root)).resolve()
    additions = [] if known else [f'data_root={data}', f'cache_dir={data}_cache']
    print(next_line('prepare.py', 'folds', cfg=path, changes=fit_folds(path, [*changes, *additions])))


def fit_folds(path: Path, changes: Sequence[str]) -> list[str]:
    """Return the changes of a config with as many folds as folds.csv has there, if that is made already."""
    cfg = load_config(path, changes)
    made = folds_path(cfg)
    count = len({fold for _, fold in read_rows(made)}) if exists(made) else cfg.folds
    if count in (0, 1, cfg.folds):
        return [*changes]
    print(f'{made}: has {plural(count, "fold")}, not {cfg.folds}')
    return [*(change for change in changes if not change.startswith('folds=')), f'folds={count}']


def fitting_config(data: Path) -> Path:
    """Return the config to begin with: LARGE for a GPU and a few hundred photos, else SMALL."""
    files = annotation_files(data, 'train')
    photos = sum(len(load_json(path, read_bytes(path)).get('images', [])) for path in files)
    return in_repository(LARGE if shutil.which('nvidia-smi') and photos >= FEW_PHOTOS else SMALL)


if __name__ == '__main__':
    run_script(command)
