"""Stage 0: looks at a data set, draws its masks, caches it, assigns folds; makes one: the demo set, TACO, or
of other formats.

python prepare.py check --data input/data
python prepare.py masks --data input/data --out output/masks
python prepare.py folds --cfg configs/convnext.yaml   # the cache and folds.csv; train.py makes them too
python prepare.py demo --out input/demo --train 120 --test 40 --seed 0
python prepare.py taco --annotations annotations.json --out input/taco   # photos too, 512x512
python prepare.py yolo --yaml set/data.yaml --out input/mine   # segmentation labels: class x1 y1 x2 y2 ...
python prepare.py from-masks --photos photos --masks masks --out input/mine [--test DIR]   # PNG ids
"""

import os
from argparse import Namespace
from collections import Counter
from collections.abc import Sequence
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
from data.taco import make_taco
from submission import classes_and_data
from utils.cli import MAX_SEED, ArgumentParser, add_config_arguments, at_least, next_line, run_script
from utils.errors import BadInput
from utils.files import lock, make_folder, remove_partials, write_whole
from utils.progress import progress

FIRST = Path('configs/convnext.yaml')  # the config of a next command, where none was given
MANY = 10**6  # photos of a demo set


def check(args: Namespace) -> None:
    """Reads every record and decodes every photo, and prints what there is. Raises BadInput naming what is
    wrong.
    """
    classes, data = classes_and_data(args)
    splits = [read_coco(data, 'train', classes)]
    if (data / 'test.json').is_file():
        splits.append(read_coco(data, 'test', classes))
    thumbs, names = [], []
    for coco in splits:
        print(f'{coco.split}: {len(coco.photos)} photos, {", ".join(str(path) for path in coco.files)}')
        thumbs += decode_all(coco)
        names += [photo.file_name for photo in coco.photos]
    print_classes(splits[0], classes)
    groups = near_duplicates(np.stack(thumbs))
    repeated = [
        np.flatnonzero(groups == group) for group, count in Counter(groups.tolist()).items() if count > 1
    ]
    across = sum(rows[0] < len(splits[0].photos) <= rows[-1] for rows in repeated)
    print(f'near-duplicates: {len(repeated)} groups of photos, {across} of them between train and test')
    for rows in repeated[:20]:
        print('  ' + ', '.join(names[row] for row in rows))
    if len(splits) == 1:
        print(f'{data / "test.json"} is not there: nothing can be submitted')
    print(f'{data}: nothing wrong found')
    print_next(classes, data, args.cfg, args.set)


def decode_all(coco: CocoSet) -> list[np.ndarray]:
    """Decodes every photo and draws its mask; their thumbnails. Raises BadInput with the first fault
    and how many there are.
    """
    faults: list[str] = []

    def look(photo: Photo) -> np.ndarray | None:
        try:
            thumb = thumbnail(read_photo(coco, photo))  # its size is checked before a mask is drawn
            draw_mask(photo)
            return thumb
        except BadInput as error:
            faults.append(str(error))
            return None

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        jobs = pool.map(look, coco.photos)
        thumbs = list(progress(jobs, f'check {coco.split}', 'photo', len(coco.photos)))
    if faults:
        more = (
            f' (and {len(faults) - 1} more photos like it, of {len(coco.photos)})' if len(faults) > 1 else ''
        )
        raise BadInput(min(faults) + more)
    return thumbs


def print_classes(coco: CocoSet, classes: tuple[str, ...]) -> None:
    """Photos, annotations and pixels of each class."""
    photos, annotations, pixels = Counter(), Counter(), np.zeros(256, np.int64)
    for photo in coco.photos:
        ids = [a.category_id for a in photo.annotations]
        photos.update(set(ids))
        annotations.update(ids)
        pixels += np.bincount(draw_mask(photo).ravel(), minlength=256)
    print(f'{"class":<16}{"photos":>8}{"objects":>9}{"pixels":>9}')
    for k, name in enumerate(classes):
        counts = f'{photos[k]:>8}{annotations[k]:>9}' if k else ' ' * 17
        print(f'{name:<16}{counts}{pixels[k] / pixels.sum():>9.2%}')


def write_masks(args: Namespace) -> None:
    """The masks of a data set's training photos, at their own size, as PNG ids: out/<file_name>.png."""
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
    """Builds the cache and assigns folds where that is not done yet, and prints the folds."""
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
    from data.demo.scenes import make_demo_set

    make_folder(args.out)
    ours = ('test_labels.json', '.demo.lock')  # the lock alone: of a set that was interrupted
    if any(args.out.iterdir()) and not any((args.out / name).exists() for name in ours):
        raise BadInput(f'{args.out}: is not empty and not a demo set; give another --out')
    with lock(args.out / '.demo.lock', 'drawing a demo set'):
        for name in ('train_all.json', 'test.json', 'test_labels.json'):
            (args.out / name).unlink(missing_ok=True)  # of other photos, until all are drawn
        make_demo_set(args.out, args.train, args.test, args.seed)
    print(
        f'wrote {args.train} training and {args.test} test photos under {args.out}; the test labels '
        'are in test_labels.json'
    )
    print_next(CLASSES, args.out, Path('configs/demo.yaml'))


def from_masks(args: Namespace) -> None:
    classes, _ = classes_and_data(args)
    import_masks(args.photos, args.masks, classes, args.out, args.test, args.overwrite)
    print_config(classes, args.out, args.cfg, args.set)


def print_config(
    classes: tuple[str, ...], out: Path, cfg: Path | None = None, changes: Sequence[str] = ()
) -> None:
    """What a config needs to train on a set that was imported."""
    if classes != CLASSES:
        print('its config needs the line')
        print(f'classes: {flow(classes)}')
    print(f'and each command --set data_root={out} cache_dir={out}_cache')
    print_next(classes, out, cfg, changes)


def print_next(
    classes: tuple[str, ...], data: Path, cfg: Path | None = None, changes: Sequence[str] = ()
) -> None:
    """The command that goes on with a data root: under its config, or FIRST."""
    known = Config() if cfg is None else load_config(cfg, list(changes))
    own = [] if classes == known.classes else [f'classes={flow(classes)}']
    own += [] if data == known.data_root else [f'data_root={data}', f'cache_dir={data}_cache']
    print(next_line('prepare.py', 'folds', cfg=cfg or FIRST, changes=[*changes, *own]))


def flow(classes: tuple[str, ...]) -> str:
    """YAML's list of the classes, on one line."""
    return yaml.safe_dump(list(classes), default_flow_style=True, width=10_000, allow_unicode=True).strip()


def taco(args: Namespace) -> None:
    make_taco(args.annotations, args.out, args.photos, args.workers, args.retries, args.overwrite)
    print_next(CLASSES, args.out)


def command(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(__doc__)
    commands = parser.add_subparsers(dest='command', required=True)

    def add(name: str, doc: str, run) -> ArgumentParser:
        sub = commands.add_parser(name, doc=doc, help=doc)
        sub.set_defaults(run=run)
        return sub

    sub = add('check', 'what is wrong with a data set, if anything', check)
    sub.add_argument('--data', type=Path, help='data root; default input/data')
    add_config_arguments(sub, required=False)
    sub = add(
        'masks',
        'the masks that a model learns from, as PNG ids',
        write_masks,
    )
    sub.add_argument('--data', type=Path, help='data root; default input/data')
    add_config_arguments(sub, required=False)
    sub.add_argument('--out', type=Path, required=True, help='folder for <file_name>.png')
    add_config_arguments(
        add('folds', 'the cache and the folds of a config, made where they are not there yet', print_folds)
    )
    sub = add('demo', 'a demo set with hidden test labels, drawn from a seed', make_demo)
    sub.add_argument(
        '--out', type=Path, default=Path('input/demo'), help='data root to make; default input/demo'
    )
    sub.add_argument('--train', type=at_least(1, MANY), default=120, help='training photos; default 120')
    sub.add_argument('--test', type=at_least(1, MANY), default=40, help='test photos; default 40')
    sub.add_argument('--seed', type=at_least(0, MAX_SEED), default=0, help='of what is drawn')
    sub = add(
        'taco',
        'TACO as a training set of this competition: photos downloaded, checked, 512x512',
        taco,
    )
    sub.add_argument('--annotations', type=Path, required=True, help="TACO's annotations.json")
    sub.add_argument('--out', type=Path, required=True, help='data root to make, or to go on with')
    sub.add_argument(
        '--photos', type=Path, help='folder of the original photos; by default they are downloaded'
    )
    sub.add_argument('--workers', type=at_least(1), default=8, help='downloads at a time; default 8')
    sub.add_argument('--retries', type=at_least(0), default=5, help='of a photo; default 5')
    sub.add_argument('--overwrite', action='store_true', help='where it has another train_all.json already')
    sub = add(
        'yolo',
        'a YOLO segmentation set as a data root',
        lambda a: print_config(import_yolo(a.yaml, a.out, a.overwrite), a.out),
    )
    sub.add_argument('--yaml', type=Path, required=True, help='data.yaml: names, train, val, test')
    sub.add_argument('--out', type=Path, required=True, help='data root to make')
    sub.add_argument('--overwrite', action='store_true', help='where it has a train_all.json already')
    sub = add('from-masks', 'photos and PNG masks of ids as a data root', from_masks)
    sub.add_argument('--photos', type=Path, required=True, help='folder of the training photos')
    sub.add_argument('--masks', type=Path, required=True, help='folder of <photo>.png: ids, 255 ignored')
    sub.add_argument(
        '--test', type=Path, help='folder of photos without masks, for test.json; by default none'
    )
    sub.add_argument('--out', type=Path, required=True, help='data root to make')
    sub.add_argument('--overwrite', action='store_true', help='where it has a train_all.json already')
    add_config_arguments(sub, required=False)
    args = parser.parse_args(argv)
    args.run(args)


if __name__ == '__main__':
    run_script(command)
