"""Stage 0: check a data set, draw its masks, cache it, assign folds; or make one: the demo set, TACO, an
import.

python prepare.py check --data input/data
python prepare.py masks --data input/data --out output/masks
python prepare.py folds --cfg configs/convnext.yaml   # the cache and folds.csv; train.py makes them too
python prepare.py demo --out input/demo --train 120 --test 40 --seed 0
python prepare.py taco --annotations annotations.json --out input/taco   # downloads the photos, 512x512
python prepare.py yolo --yaml set/data.yaml --out input/mine   # segmentation labels: class x1 y1 x2 y2 ...
python prepare.py from-masks --photos photos --masks masks --out input/mine [--test DIR]   # PNG ids
"""

import os
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import yaml
from PIL import Image

from config import CLASSES, Config, load_config
from data.cache import open_cache
from data.coco import CocoSet, Photo, draw_mask, read_coco, read_photo
from data.folds import folds_path, near_duplicates, read_folds, thumbnail
from data.importers import import_masks, import_yolo
from submission import classes_and_data
from utils.cli import MAX_SEED, ArgumentParser, add_config_arguments, at_least, next_line, run_script
from utils.errors import BadInput
from utils.files import lock, make_folder, remove_partials, write_whole
from utils.progress import progress

DEFAULT_CONFIG = Path('configs/convnext.yaml')  # of the next command that is printed
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

    command = add('check', check, 'check the records, photos and masks of a data set')
    command.add_argument('--data', type=Path, help='data root; by default that of --cfg, or input/data')
    add_config_arguments(command, required=False)

    command = add('masks', write_masks, 'write the masks that a model learns from, as PNG ids')
    command.add_argument('--data', type=Path, help='data root; by default that of --cfg, or input/data')
    command.add_argument('--out', type=Path, required=True, help='folder for <file_name>.png')
    add_config_arguments(command, required=False)

    command = add('folds', print_folds, 'make the cache and the folds of a config, print the folds')
    add_config_arguments(command)

    command = add('demo', make_demo, 'draw a demo set, with test labels')
    command.add_argument('--out', type=Path, default=Path('input/demo'), help='data root to make')
    command.add_argument('--train', type=at_least(1, MAX_PHOTOS), default=120, help='training photos')
    command.add_argument('--test', type=at_least(1, MAX_PHOTOS), default=40, help='test photos')
    command.add_argument('--seed', type=at_least(0, MAX_SEED), default=0, help='seed of the drawings')

    overwrite = {'action': 'store_true', 'help': 'replace a train_all.json that exists in --out'}
    command = add('taco', make_taco_set, 'download TACO and make a training set of it')
    command.add_argument('--annotations', type=Path, required=True, help="TACO's annotations.json")
    command.add_argument('--out', type=Path, required=True, help='data root to make or to complete')
    originals = 'folder of the original photos; by default they are downloaded'
    command.add_argument('--photos', type=Path, help=originals)
    command.add_argument('--workers', type=at_least(1), default=8, help='parallel downloads')
    command.add_argument('--retries', type=at_least(0), default=5, help='retries of a download')
    command.add_argument('--overwrite', **overwrite)

    command = add('yolo', import_yolo_set, 'import a YOLO segmentation set')
    command.add_argument('--yaml', type=Path, required=True, help='data.yaml: names, train, val, test')
    command.add_argument('--out', type=Path, required=True, help='data root to make')
    command.add_argument('--overwrite', **overwrite)

    command = add('from-masks', import_mask_set, 'import photos and PNG masks of ids')
    command.add_argument('--photos', type=Path, required=True, help='folder of the training photos')
    command.add_argument('--masks', type=Path, required=True, help='folder of <photo>.png: ids, 255 ignored')
    unlabelled = 'folder of photos without masks, for test.json; by default none'
    command.add_argument('--test', type=Path, help=unlabelled)
    command.add_argument('--out', type=Path, required=True, help='data root to make')
    command.add_argument('--overwrite', **overwrite)
    add_config_arguments(command, required=False)
    return parser.parse_args(argv)


def check(args: Namespace) -> None:
    """Read every record, decode every photo, and print a summary. Raises BadInput with the first fault."""
    classes, data = classes_and_data(args)
    splits = [read_coco(data, 'train', classes)]
    if (data / 'test.json').is_file():
        splits.append(read_coco(data, 'test', classes))
    thumbnails = []
    for coco in splits:
        print(f'{coco.split}: {len(coco.photos)} photos, {", ".join(str(path) for path in coco.files)}')
        thumbnails += decode_photos(coco)
    print_classes(splits[0], classes)
    print_duplicates(splits, thumbnails)
    if len(splits) == 1:
        print(f'{data / "test.json"}: not found, so no submission can be made')
    print(f'{data}: nothing wrong found')
    print_next(classes, data, args.cfg, args.set)


def decode_photos(coco: CocoSet) -> list[np.ndarray]:
    """Decode every photo, draw its mask, and return the thumbnails. Raises BadInput with the first fault."""
    faults: list[str] = []

    def decode(photo: Photo) -> np.ndarray | None:
        try:
            image = read_photo(coco, photo)  # checks the size before the mask is drawn
            draw_mask(photo)
            return thumbnail(image)
        except BadInput as error:
            faults.append(str(error))
            return None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = pool.map(decode, coco.photos)
        thumbnails = list(progress(jobs, f'check {coco.split}', 'photo', len(coco.photos)))
    if faults:
        count = f' (one of {len(faults)} faulty photos among {len(coco.photos)})' if len(faults) > 1 else ''
        raise BadInput(min(faults) + count)
    return thumbnails


def print_classes(coco: CocoSet, classes: tuple[str, ...]) -> None:
    """Print the photos, annotations and pixels of each class."""
    photos, annotations, pixels = Counter(), Counter(), np.zeros(256, np.int64)
    for photo in coco.photos:
        ids = [annotation.category_id for annotation in photo.annotations]
        photos.update(set(ids))
        annotations.update(ids)
        pixels += np.bincount(draw_mask(photo).ravel(), minlength=256)
    print(f'{"class":<16}{"photos":>8}{"objects":>9}{"pixels":>9}')
    for k, name in enumerate(classes):
        counts = f'{photos[k]:>8}{annotations[k]:>9}' if k else ' ' * 17
        print(f'{name:<16}{counts}{pixels[k] / pixels.sum():>9.2%}')


def print_duplicates(splits: list[CocoSet], thumbnails: list[np.ndarray]) -> None:
    """Print the groups of near-duplicates, at most 20 of them, and how many groups span train and test."""
    names = [photo.file_name for coco in splits for photo in coco.photos]
    groups = near_duplicates(np.stack(thumbnails))
    counts = Counter(groups.tolist())
    repeated = [np.flatnonzero(groups == group) for group, count in counts.items() if count > 1]
    across = sum(rows[0] < len(splits[0].photos) <= rows[-1] for rows in repeated)
    print(f'near-duplicates: {len(repeated)} groups of photos, {across} of them between train and test')
    for rows in repeated[:20]:
        print('  ' + ', '.join(names[row] for row in rows))


def write_masks(args: Namespace) -> None:
    """Write the masks of the training photos at their own size as PNG ids, out/<file_name>.png."""
    (classes, data), out = classes_and_data(args), args.out
    coco = read_coco(data, 'train', classes)
    with lock(out / '.lock', 'drawing masks'):
        for folder in {(out / photo.file_name).parent for photo in coco.photos}:
            remove_partials(folder, '*')
        for photo in progress(coco.photos, 'masks', 'mask'):
            with write_whole(out / f'{photo.file_name}.png') as file:
                Image.fromarray(draw_mask(photo)).save(file, 'PNG', compress_level=1)
    print(f'wrote {len(coco.photos)} masks under {out}')
    print_next(classes, data, args.cfg, args.set)


def print_folds(args: Namespace) -> None:
    """Make the cache and the folds if they do not exist, and print the photos of each class in each fold."""
    cfg = load_config(args.cfg, args.set)
    cache = open_cache(cfg, 'train')
    folds = read_folds(cfg, cache)
    counts = np.zeros((cfg.folds, len(cfg.classes)), int)
    for fold, photo in zip(folds, cache.coco.photos, strict=True):
        for k in photo.classes:
            counts[fold, k] += 1
    print(f'{folds_path(cfg)}: photos of each class in each fold')
    print(f'{"class":<16}' + ''.join(f'{f"fold {k}":>8}' for k in range(cfg.folds)))
    print(f'{"all":<16}' + ''.join(f'{(folds == k).sum():>8}' for k in range(cfg.folds)))
    for k, name in enumerate(cfg.classes):
        if k:
            print(f'{name:<16}' + ''.join(f'{n:>8}' for n in counts[:, k]))
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
    print_next(CLASSES, args.out, Path('configs/demo.yaml'))


def make_taco_set(args: Namespace) -> None:
    from data.taco import make_taco  # slow to import

    make_taco(args.annotations, args.out, args.photos, args.workers, args.retries, args.overwrite)
    print_next(CLASSES, args.out)


def import_yolo_set(args: Namespace) -> None:
    print_config(import_yolo(args.yaml, args.out, args.overwrite), args.out)


def import_mask_set(args: Namespace) -> None:
    classes, _ = classes_and_data(args)
    import_masks(args.photos, args.masks, classes, args.out, args.test, args.overwrite)
    print_config(classes, args.out, args.cfg, args.set)


def print_config(
    classes: tuple[str, ...], out: Path, cfg: Path | None = None, changes: Sequence[str] = ()
) -> None:
    """Print what a config needs for training on an imported set."""
    if classes != CLASSES:
        print('add this line to its config')
        print(f'classes: {flow(classes)}')
    print(f'add to each command --set data_root={out} cache_dir={out}_cache')
    print_next(classes, out, cfg, changes)


def print_next(
    classes: tuple[str, ...], data: Path, cfg: Path | None = None, changes: Sequence[str] = ()
) -> None:
    """Print the command that makes the folds of a data root, with its config or DEFAULT_CONFIG."""
    config = Config() if cfg is None else load_config(cfg, list(changes))
    additions = [] if classes == config.classes else [f'classes={flow(classes)}']
    additions += [] if data == config.data_root else [f'data_root={data}', f'cache_dir={data}_cache']
    print(next_line('prepare.py', 'folds', cfg=cfg or DEFAULT_CONFIG, changes=[*changes, *additions]))


def flow(classes: tuple[str, ...]) -> str:
    """Format the classes as a YAML list on one line."""
    return yaml.safe_dump(list(classes), default_flow_style=True, width=10_000, allow_unicode=True).strip()


if __name__ == '__main__':
    run_script(command)
