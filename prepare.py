"""Stage 0: check a data set, draw its masks, cache it, assign folds; or make one: the demo set, TACO, an
import.

python prepare.py check --data input/data
python prepare.py competition --data input/mine   # competition.yaml: its categories become the classes
python prepare.py masks --data input/data --out output/masks
python prepare.py folds --cfg configs/convnext.yaml   # the cache and folds.csv; train.py makes them too
python prepare.py demo --out input/demo --train 120 --test 40 --seed 0
python prepare.py taco --annotations annotations.json --out input/taco   # downloads the photos, 512x512
python prepare.py coco --data input/mine   # a COCO export as its tool lays it out; its photos stay there
python prepare.py yolo --yaml set/data.yaml --out input/mine   # segmentation labels: class x1 y1 x2 y2 ...
python prepare.py from-masks --photos photos --masks masks --out input/mine --classes can bottle   # PNG ids
python prepare.py from-masks --photos photos --masks masks --out input/mine --classes can --map 255=can
"""

import shutil
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from config import (
    COMPETITION_FILE,
    Config,
    load_config,
    make_config,
    match_key,
    read_competition,
    read_mapping,
)
from data.cache import open_cache
from data.check import check_data, origin_of_classes
from data.coco import draw_mask, read_coco
from data.exports import import_coco, write_classes
from data.folds import folds_path, read_folds
from data.import_masks import import_masks
from data.import_yolo import import_yolo
from data.layout import annotation_files
from data.mask_legend import read_names
from data.mask_pairs import MaskSource
from submission import competition_and_data
from utils.cli import MAX_SEED, ArgumentParser, add_config_arguments, at_least, next_line, run_script
from utils.errors import BadInput
from utils.files import lock, make_folder, normal_name, remove_partials, write_whole
from utils.json_files import load_json, read_bytes
from utils.progress import progress

# configs of the next command that is printed: the small one without a GPU, and for few photos
LARGE, SMALL, FEW_PHOTOS = Path('configs/convnext.yaml'), Path('configs/trash481.yaml'), 200
MAX_PHOTOS = 10**6  # of a demo set


def command(argv: list[str] | None = None) -> None:
    args = read_arguments(argv)
    args.run(args)


def read_arguments(argv: list[str] | None) -> Namespace:
    parser = ArgumentParser(__doc__)
    commands = parser.add_subparsers(dest='command', required=True)

    def add(name: str, run: Callable[[Namespace], None], doc: str) -> ArgumentParser:
        command = commands.add_parser(name, doc)
        command.set_defaults(run=run)
        return command

    data = {'type': Path, 'help': 'data root; by default that of --cfg, or input/data'}
    command = add('check', check, 'check the records, photos and masks of a data set')
    command.add_argument('--data', **data)
    add_config_arguments(command, required=False)

    command = add('competition', make_competition, 'write competition.yaml from the categories')
    command.add_argument('--data', type=Path, required=True, help='data root')
    table = 'CSV category,class, such as data/taco.csv; by default each category is a class'
    command.add_argument('--table', type=Path, help=table)
    replace = 'replace the classes of a competition.yaml that exists'
    command.add_argument('--overwrite', action='store_true', help=replace)

    command = add('masks', write_masks, 'write the masks that a model learns from, as PNG ids')
    command.add_argument('--data', **data)
    command.add_argument('--out', type=Path, required=True, help='folder for <file_name>.png')
    add_config_arguments(command, required=False)

    command = add('folds', print_folds, 'make the cache and the folds of a config, print the folds')
    add_config_arguments(command)

    command = add('demo', make_demo, 'draw a demo set, with test labels')
    command.add_argument('--out', type=Path, default=Path('input/demo'), help='data root to make')
    command.add_argument('--train', type=at_least(1, MAX_PHOTOS), default=120, help='training photos')
    command.add_argument('--test', type=at_least(1, MAX_PHOTOS), default=40, help='test photos')
    command.add_argument('--seed', type=at_least(0, MAX_SEED), default=0, help='seed of the drawings')

    add_imports(add)
    return parser.parse_args(argv)


def add_imports(add: Callable[[str, Callable[[Namespace], None], str], ArgumentParser]) -> None:
    """Add the commands that make a data root of other formats."""
    overwrite = {'action': 'store_true', 'help': 'replace a train_all.json that exists'}
    command = add('taco', make_taco_set, 'download TACO and make a training set of it')
    command.add_argument('--annotations', type=Path, required=True, help="TACO's annotations.json")
    command.add_argument('--out', type=Path, required=True, help='data root to make or to complete')
    originals = 'folder of the original photos; by default they are downloaded'
    command.add_argument('--photos', type=Path, help=originals)
    command.add_argument('--workers', type=at_least(1), default=8, help='parallel downloads')
    command.add_argument('--retries', type=at_least(0), default=5, help='retries of a download')
    command.add_argument('--overwrite', **overwrite)

    command = add('coco', import_coco_set, 'make a data root of a COCO export, where it lies')
    command.add_argument('--data', type=Path, required=True, help='folder of the export, with its photos')
    command.add_argument('--overwrite', **overwrite)

    command = add('yolo', import_yolo_set, 'import a YOLO segmentation set')
    command.add_argument('--yaml', type=Path, required=True, help='data.yaml: names, train, val, test')
    command.add_argument('--out', type=Path, required=True, help='data root to make')
    boxes = 'boxes among the polygons: refuse them, leave them out, or take them as rectangles'
    command.add_argument('--boxes', choices=['refuse', 'skip', 'fill'], default='refuse', help=boxes)
    command.add_argument('--overwrite', **overwrite)

    command = add('from-masks', import_mask_set, 'import photos and masks of ids or colours')
    command.add_argument('--photos', type=Path, required=True, help='folder of the training photos')
    command.add_argument('--masks', type=Path, required=True, help='folder of <photo>.png: ids or colours')
    unlabelled = 'folder of photos without masks, for test.json; by default none'
    command.add_argument('--test', type=Path, help=unlabelled)
    names = (
        'names of the classes by id, after the background; by default those of --cfg, of competition.yaml in '
        '--out, of a file of --map, or of the home competition'
    )
    command.add_argument('--classes', nargs='+', metavar='NAME', help=names)
    values = "class of a value, as in 255=1 '#ff0000'=can 11=ignore, or a file of name,r,g,b (labelmap.txt)"
    command.add_argument('--map', nargs='+', action='extend', default=[], metavar='VALUE=CLASS', help=values)
    ending = 'ending of the names of masks: _mask, or _sat=_mask in place of _sat; by default it is found'
    command.add_argument('--suffix', help=ending)
    turned = 'how photos with an EXIF turn were when the masks were drawn'
    command.add_argument('--orientation', choices=['displayed', 'stored'], default='displayed', help=turned)
    command.add_argument('--out', type=Path, required=True, help='data root to make')
    command.add_argument('--overwrite', **overwrite)
    add_config_arguments(command, required=False)


def check(args: Namespace) -> None:
    """Check a data root; the last line counts what to look at. Raises BadInput with the first fault."""
    competition, data = competition_and_data(args)
    print(origin_of_classes(data, competition, args.cfg))
    cfg = Config() if args.cfg is None else load_config(args.cfg, args.set, data)
    folds = 1 if cfg.folds_csv else cfg.folds  # folds of one's own are not made
    remarks, folds_can_be_made = check_data(data, competition, folds)
    if remarks:
        count = '1 thing' if len(remarks) == 1 else f'{len(remarks)} things'
        print(f'{data}: {count} to look at: {"; ".join(remarks)}; nothing else wrong found')
    else:
        print(f'{data}: nothing wrong found')
    if folds_can_be_made:
        print_next(data, args.cfg, args.set)


def make_competition(args: Namespace) -> None:
    write_classes(args.data, args.overwrite, args.table)
    print(next_line('prepare.py', 'check', '--data', args.data))


def write_masks(args: Namespace) -> None:
    """Write the masks of the training photos at their own size as PNG ids, out/<file_name>.png."""
    (competition, data), out = competition_and_data(args), args.out
    coco = read_coco(data, 'train', competition)
    with lock(out / '.lock', 'drawing masks'):
        for folder in {(out / normal_name(photo.file_name)).parent for photo in coco.photos}:
            remove_partials(folder, '*')
        for photo in progress(coco.photos, 'masks', 'mask'):
            with write_whole(out / f'{normal_name(photo.file_name)}.png') as file:
                Image.fromarray(draw_mask(photo)).save(file, 'PNG', compress_level=1)
    ids = f'ids 0 to {len(competition.classes) - 1}, 255 ignored'
    print(f'wrote {len(coco.photos)} masks under {out}: {ids}')
    print_next(data, args.cfg, args.set)


def print_folds(args: Namespace) -> None:
    """Make the cache and the folds if they do not exist, and print the photos of each class in each fold."""
    cfg = load_config(args.cfg, args.set)
    cache = open_cache(cfg, 'train')
    folds = read_folds(cfg, cache)
    counts = np.zeros((cfg.folds, len(cfg.classes)), int)
    for fold, photo in zip(folds, cache.coco.photos, strict=True):
        counts[fold, list(photo.classes)] += 1
    print(f'{folds_path(cfg)}: photos of each class in each fold')
    width = max(16, 1 + max(map(len, cfg.classes)))
    print(f'{"class":<{width}}' + ''.join(f'{f"fold {k}":>8}' for k in range(cfg.folds)))
    print(f'{"all":<{width}}' + ''.join(f'{(folds == k).sum():>8}' for k in range(cfg.folds)))
    for name, numbers in list(zip(cfg.classes, counts.T, strict=True))[1:]:
        print(f'{name:<{width}}' + ''.join(f'{number:>8}' for number in numbers))
    resume = ['--resume'] if (cfg.run_dir(0) / 'last.pt').exists() else []
    print(next_line('train.py', '--fold', 0, *resume, cfg=args.cfg, changes=args.set))


def make_demo(args: Namespace) -> None:
    """Draw the demo set; raise BadInput if the folder holds anything else."""
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
    print_next(args.out, Path('configs/demo.yaml'))


def make_taco_set(args: Namespace) -> None:
    from data.taco import make_taco  # slow to import

    make_taco(args.annotations, args.out, args.photos, args.workers, args.retries, args.overwrite)
    print_next(args.out)


def import_coco_set(args: Namespace) -> None:
    import_coco(args.data, args.overwrite)
    print(next_line('prepare.py', 'check', '--data', args.data))


def import_yolo_set(args: Namespace) -> None:
    import_yolo(args.yaml, args.out, args.boxes, args.overwrite)
    print_next(args.out)


def import_mask_set(args: Namespace) -> None:
    classes = classes_of_masks(args)
    options = {'changes': args.map, 'suffix': args.suffix, 'orientation': args.orientation}
    import_masks(MaskSource(args.photos, args.masks, classes, args.test, **options), args.out, args.overwrite)
    print_next(args.out, args.cfg, args.set)


def classes_of_masks(args: Namespace) -> tuple[str, ...]:
    """Return the classes by --classes, --cfg, competition.yaml in --out, or a file of --map."""
    files = [Path(entry) for entry in args.map if '=' not in entry]
    if args.classes is not None:
        if args.cfg is not None:
            raise BadInput('--classes: expected --classes or --cfg, not both')
        has_background = match_key(args.classes[0]) == 'background'
        names = args.classes if has_background else ['Background', *args.classes]
        return make_config({'classes': names}, where='--classes').classes
    if args.cfg is None and (competition := read_competition(args.out)) is not None:
        print(f'{len(competition.classes)} classes from {args.out / COMPETITION_FILE}')
        return competition.classes
    if args.cfg is None and files:
        return make_config({'classes': read_names(files[0])}, where=str(files[0])).classes
    return competition_and_data(args)[0].classes


def print_next(data: Path, cfg: Path | None = None, changes: Sequence[str] = ()) -> None:
    """Print the command that makes the folds of a data root, with its config or one that fits it."""
    settings = {} if cfg is None else read_mapping(cfg)
    settings |= dict(change.split('=', 1) for change in changes)
    known = data == Path(settings.get('data_root', Config().data_root))
    additions = [] if known else [f'data_root={data}', f'cache_dir={data}_cache']
    print(next_line('prepare.py', 'folds', cfg=cfg or fitting_config(data), changes=[*changes, *additions]))


def fitting_config(data: Path) -> Path:
    """Return the config to begin with: LARGE for a GPU and a few hundred photos, else SMALL."""
    files = annotation_files(data, 'train')
    photos = sum(len(load_json(path, read_bytes(path)).get('images', [])) for path in files)
    return LARGE if shutil.which('nvidia-smi') and photos >= FEW_PHOTOS else SMALL


if __name__ == '__main__':
    run_script(command)
