"""Read, write and check submission CSVs, strictly; and bring predictions to the size that is scored.

    python submission.py check output/submission.csv --data input/data     # every rule of the format
    python submission.py check output/submission.csv --against other.csv   # and how it differs from another
    python submission.py from-sample sample_submission.csv --data input/mine   # competition.yaml: submission

The home format: the header image_id,PredictionString; one row an image, in the order of test.json; 65,536
class ids separated by one space, the rows of a 256x256 mask one after another; \\n line ends. Where
competition.yaml says so, masks are run lengths, with a row for each image and class, or for each image. CSVs
are written so, and check accepts nothing else. Everything else reads the CSVs of other tools too, as pandas
does: a byte order mark, \\r\\n, quotes, other or swapped columns, an index, more spaces, 3.0 for 3, and ids
that differ from the data's in Unicode form, slashes or spaces at their ends alone. Files are read and written
a row at a time.

Shapes: N batch, K classes, H W the scored size, S side of a prediction, B side that downsample_probs returns:
SIDE, or S for block_max.
"""

from argparse import Namespace
from pathlib import Path

from utils.cli import ArgumentParser, add_config_arguments, next_line, parse_early, python_command, run_script
from utils.files import require_files


def read_arguments(argv: list[str] | None = None) -> Namespace:
    parser = ArgumentParser(__doc__)
    commands = parser.add_subparsers(title='commands', dest='command', required=True)
    summary = 'check every rule of the format, and show what share each class covers'
    check = commands.add_parser('check', help=summary, doc=f'{summary.capitalize()}.')
    check.add_argument('csv', type=Path, help='the submission')
    check.add_argument(
        '--data', type=Path, help='data root with test.json; by default that of --cfg, or input/data'
    )
    against = 'another submission to compare with; by default none'
    check.add_argument('--against', type=Path, metavar='CSV', help=against)
    add_config_arguments(check, required=False)
    summary = "write how CSVs are written into competition.yaml, by a competition's sample submission"
    sample = commands.add_parser('from-sample', help=summary, doc=f'{summary.capitalize()}.')
    sample.add_argument('csv', type=Path, help='the sample')
    root = 'data root with test.json, and competition.yaml with the classes'
    sample.add_argument('--data', type=Path, required=True, help=root)
    args = parser.parse_args(argv)
    require_files(args.csv, *([args.against] if getattr(args, 'against', None) else []))
    return args


if __name__ == '__main__':
    parse_early(read_arguments)  # --help does not wait for NumPy and pydantic

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any

import cv2
import numpy as np

from config import (
    COMPETITION_FILE,
    HOME,
    Competition,
    Config,
    load_config,
    make_competition,
    read_competition,
)
from metrics import Metric, count_pixels, iou_of_counts
from utils.csv_rows import id_key
from utils.errors import DONE, BadInput
from utils.files import normal_name, write_text
from utils.id_csv import IdReader, IdWriter, check_ids
from utils.id_text import SIDE
from utils.json_files import find_unknown_category, load_json, read_bytes, require, whole_number
from utils.ragged import Ragged, map_ragged
from utils.run_csv import RunReader, RunTable, RunWriter, check_runs, class_key
from utils.sample_csv import describe_sample, is_home, read_sample
from utils.yaml_files import read_mapping, replace_keys, show_yaml

if TYPE_CHECKING:
    from torch import Tensor

Size = tuple[int, int]  # (H, W)
WORST = 5  # images that a comparison lists
Reader = IdReader | RunReader
Writer = IdWriter | RunWriter


def main(argv: list[str] | None = None) -> int:
    args = read_arguments(argv)
    if args.command == 'from-sample':
        write_format_of_sample(args.csv, args.data)
        return DONE
    competition, data = competition_and_data(args)
    classes = competition.classes
    form = read_format(data, competition)
    files = [data / name for name in ('test.json', 'train_all.json', 'train.json')]
    if unknown := find_unknown_category(files, lambda name: competition.class_id(name) is not None):
        command = python_command('prepare.py', 'competition', '--data', data)
        raise BadInput(f'{unknown} is no class; {command} writes the classes of the data, or give --cfg')
    pixels = check_or_offer_rewrite(args, data, form)
    print(f'{args.csv}: {len(form.sizes)} images')
    width = max(map(len, classes))
    for name, share in zip(classes, pixels / form.total_pixels, strict=True):
        print(f'{name:<{width}}  {share:>7.3%}')
    if args.against is not None:
        print(compare_masks(args.csv, args.against, form))
    print('ok')
    return DONE


def competition_and_data(args: Namespace) -> tuple[Competition, Path]:
    """Return what the data set is, and its root, by --cfg, --set and --data. Raises BadInput."""
    data = getattr(args, 'data', None)
    if args.cfg is not None:
        cfg = load_config(args.cfg, args.set, data)
        return cfg.competition, cfg.data_root
    if args.set:
        raise BadInput(f'--set {args.set[0]}: changes a config, but none is given; expected --cfg too')
    data = data or Config().data_root
    return read_competition(data) or HOME, data


def read_test_sizes(data: Path, competition: Competition) -> dict[str, Size]:
    """Read the image ids (file names) of a data root's test.json, in its order, and their (H, W).

    Sizes that the competition does not need may be missing, and are (0, 0) then. Raises BadInput.
    """
    path = data / 'test.json'
    images = require(f'{path}: the file', load_json(path, read_bytes(path)), 'images', list)
    sizes: dict[str, Size] = {}
    seen: set[str] = set()
    for position, image in enumerate(images):
        image_id = require(f'{path}: images[{position}]', image, 'file_name', str)
        if not image_id:
            raise BadInput(f"{path}: images[{position}]: file_name is '', expected a file name")
        if normal_name(image_id) in seen:
            raise BadInput(f'{path}: image {image_id!r} is listed twice')
        seen.add(normal_name(image_id))
        height, width = (whole_number(image.get(key)) or 0 for key in ('height', 'width'))
        if competition.score_size == 'own' and min(height, width) < 1:
            fault = f'image {image_id!r} has no height and width, the size at which it is scored'
            raise BadInput(f'{path}: {fault}; write them there, in pixels')
        sizes[image_id] = height, width
    if not sizes:
        raise BadInput(f'{path}: no images')
    return sizes


def check_or_offer_rewrite(args: Namespace, data: Path, form: 'MaskFormat') -> np.ndarray:
    """Check args.csv; if only its form is wrong, the error names the command that rewrites it."""
    try:
        return form.check(args.csv)
    except BadInput as fault:
        if not has_all_masks(args.csv, form):
            raise
        out = args.csv.with_name(f'{args.csv.stem}_rewritten.csv')
        words = ('ensemble.py', args.csv, '--out', out, '--data', data)
        command = next_line(*words, cfg=args.cfg, changes=args.set).removeprefix('next: ')
        raise BadInput(f'{fault}; to rewrite it: {command}') from None


def has_all_masks(path: Path, form: 'MaskFormat') -> bool:
    """Say whether a CSV, whatever its form, has a readable mask of each of the images and no other row."""
    try:
        with form.reader(path) as reader:
            require_same_images([*form.sizes], 'test.json', reader)
            for image_id in form.sizes:
                reader.read(image_id)
    except BadInput:
        return False
    return True


def compare_masks(path: Path, other: Path, form: 'MaskFormat') -> str:
    """Describe how two submissions differ: overall, by class (1 - IoU), at worst. Raises BadInput."""
    classes = form.competition.classes
    counts = np.zeros((3, len(classes)), np.int64)
    shares: dict[str, float] = {}
    with form.reader(path) as ours, form.reader(other) as theirs:
        require_same_images(ours.image_ids, path, theirs)
        for image_id in ours.image_ids:
            mask, other_mask = ours.read(image_id), theirs.read(image_id)
            counts += count_pixels(mask, other_mask, len(classes))
            differing = (mask != other_mask).reshape(-1, *mask.shape[-2:]).any(0)
            shares[image_id] = np.count_nonzero(differing) / differing.size
    width = max(map(len, classes))
    lines = [f'against {other}: {np.mean(list(shares.values())):.3%} of the pixels differ']
    total = sum(h * w for h, w in map(form.size, shares))
    for name, iou, pixels in zip(classes, iou_of_counts(*counts), counts[1], strict=True):
        difference = 'in neither' if np.isnan(iou) else f'{1 - iou:>7.2%} differ'
        lines.append(f'{name:<{width}}  {difference}, covers {pixels / total:>7.3%} there')
    for image_id in sorted(shares, key=lambda image_id: -shares[image_id])[:WORST]:
        lines.append(f'{image_id}: {shares[image_id]:.2%} differ')
    return '\n'.join(lines)


def write_format_of_sample(sample: Path, data: Path) -> None:
    """Write the keys `submission` and `score_size` by a sample submission, keep the rest. Raises BadInput."""
    path = data / COMPETITION_FILE
    settings = read_mapping(path) if path.exists() else {}
    replaced = {'score_size': 'own', 'submission': None} if settings else {}
    competition = make_competition(settings | replaced, where=str(path))
    if not settings and not is_home(read_sample(sample), len(competition.object_ids)):
        command = python_command('prepare.py', 'competition', '--data', data)
        raise BadInput(f'{path}: no such file; expected the classes first: {command}')
    found, remarks = describe_sample(sample, list_image_names(data), list_class_names(competition))
    values: dict[str, Any] = {'submission': found, 'score_size': SIDE}
    if found is None:
        values = {key: value for key, value in values.items() if key in settings or key == 'score_size'}
    else:
        known = settings.get('submission') or {}
        found |= {key: known[key] for key in ('order', 'first', 'empty') if key in known}
        remarks = [remark for remark in remarks if remark.partition(':')[0] not in known]
        values['score_size'] = settings.get('score_size', 'own')
        if 'score_size' not in settings:
            remarks.append("score_size: own, the photos' sizes; write 256 if masks are 256x256 pixels")
        if 'metric' not in settings:
            remarks.append(f'metric: {competition.metric} is the default; write what the rules say')
    make_competition(settings | values, where=str(path))  # raises BadInput if the classes do not go with it
    write_text(path, replace_keys(path.read_text(encoding='utf-8') if settings else '', values))
    how = 'a class id for each pixel' if found is None else f'run lengths: {show_yaml(found)}'
    print(f'{path}: {how}')
    for remark in remarks:
        print(f'  to look at: {remark}')
    print(next_line('prepare.py', 'check', '--data', data))


def list_image_names(data: Path) -> dict[str, dict[str, str]]:
    """Return the image id of each name that a test photo may have, for each of `image_names` that names one
    photo alone. Raises BadInput.
    """
    sizes, names = read_test_sizes(data, HOME), {}
    for kind in ('path', 'name', 'stem'):
        with suppress(BadInput):  # two images would have the same name
            names[kind] = {id_key(name): image_id for image_id, name in name_images(sizes, kind).items()}
    return names


def list_class_names(competition: Competition) -> dict[str, dict[str, str]]:
    """Return the class of each name that it may have, for each of `class_names`."""
    objects = [competition.classes[k] for k in competition.object_ids]
    return {
        kind: dict(zip(map(class_key, name_classes(competition, kind)), objects, strict=True))
        for kind in ('name', 'id', 'number')
    }


def require_same_images(image_ids: Sequence[str], source: Path | str, reader: Reader) -> None:
    """Raise BadInput unless a CSV has exactly these images; `source` names their origin in the message."""
    expected, rows = set(image_ids), set(reader.image_ids)
    for image_id in image_ids:
        if image_id not in rows:
            raise BadInput(f'{reader.path}: has no row of image {image_id!r}, which {source} has')
    for image_id in reader.image_ids:
        if image_id not in expected:
            raise BadInput(f'{reader.path}: has a row of image {image_id!r}, which {source} does not have')


def metric_of(competition: Competition) -> Metric:
    """Return the metric that a competition names."""
    scored = tuple(competition.scored_ids)
    return Metric(competition.metric, scored, competition.empty_score, competition.is_multilabel)


# --- from a prediction's size to the scored size: s times 256 → 256, by the config's `downsample`
#
#   nearest     every s-th pixel, as the organiser takes the truth
#   prob_mean   the mean probabilities of each s x s block, then the most probable class
#   block_max   the most probable class of each pixel, then the highest class id of each s x s block


def downsample_mask(mask: np.ndarray, side: int = SIDE) -> np.ndarray:
    """Take the truth at the scored size: (H, W) of any size → (256, 256) uint8; mask[::2, ::2] of 512x512."""
    return cv2.resize(mask, (side, side), interpolation=cv2.INTER_NEAREST)


def downsample_probs(probs: 'Tensor', rule: str, side: int = SIDE) -> 'Tensor':
    """Reduce probabilities to what is decided on: (N, K, S, S) → (N, K, B, B); S is a multiple of `side`.

    Results of several views, folds or models can be averaged. Raises ValueError for another size or rule.
    """
    step = _block_side(probs.shape, side)
    if rule == 'nearest':
        return probs[..., ::step, ::step]
    if rule == 'prob_mean':
        return probs.reshape(*probs.shape[:2], side, step, side, step).mean((3, 5))
    if rule == 'block_max':
        return probs
    raise ValueError(f'downsample is {rule!r}, expected nearest, prob_mean or block_max')


def downsample_ids(pred: 'Tensor', rule: str, side: int = SIDE) -> 'Tensor':
    """Apply the rest of the rule to ids, or to planes of 0 and 1: (N, B, B) → (N, side, side)."""
    step = _block_side(pred.shape, side)
    return pred.reshape(-1, side, step, side, step).amax((2, 4)) if rule == 'block_max' else pred


def probs_to_bytes(probs: 'Tensor', width: int = SIDE) -> np.ndarray:
    """Quantize the probabilities of a photo, or of rows of it: (K, H, width) → uint8, of which 255 is 1.

    Those of block_max, (K, S, S), are first reduced to the scored (K, width, width).
    """
    from torch.nn.functional import interpolate  # most commands do without torch

    if probs.shape[-1] != width:
        scaling = {'mode': 'bilinear', 'align_corners': False, 'antialias': True}
        probs = interpolate(probs[None].float(), (width, width), **scaling)[0]
    return (probs.float() * 255).round().byte().cpu().numpy()


def _block_side(shape: tuple[int, ...], side: int) -> int:
    """Return the pixels of a prediction along each side of a scored pixel. Raises ValueError."""
    if shape[-1] != shape[-2] or shape[-1] % side:
        raise ValueError(f'a prediction is {shape[-2]}x{shape[-1]}, expected a square of k x {side}')
    return shape[-1] // side


class MaskFormat(ABC):
    """The CSVs of a competition: their images, with the sizes of the photos, and how masks are written.

    with form.reader(path) as reader, form.writer(out) as writer:
        for image_id in reader.image_ids:
            writer.write(image_id, reader.read(image_id))

    A mask is (H, W) uint8 class ids, or (K, H, W) planes of 0 and 1 if classes may overlap.
    """

    def __init__(self, competition: Competition, sizes: Mapping[str, Size]) -> None:
        self.competition, self.sizes = competition, sizes

    def size(self, image_id: str) -> Size:
        """Return the (H, W) at which an image is scored."""
        side = self.competition.score_size
        return self.sizes[image_id] if side == 'own' else (side, side)

    def shape(self, image_id: str) -> tuple[int, ...]:
        """Return the shape of an image's mask."""
        planes = (len(self.competition.classes),) if self.competition.is_multilabel else ()
        return *planes, *self.size(image_id)

    @property
    def total_pixels(self) -> int:
        """The pixels of all images as they are scored."""
        return sum(h * w for h, w in map(self.size, self.sizes))

    @abstractmethod
    def reader(self, path: Path) -> Reader:
        """Open a CSV of any tool whose rows are read in any order."""

    @abstractmethod
    def writer(self, path: Path) -> Writer:
        """Write a CSV, whole or not at all."""

    @abstractmethod
    def check(self, path: Path) -> np.ndarray:
        """Check every rule of a CSV; return the (K,) pixels of each class. Raises BadInput."""


class IdFormat(MaskFormat):
    """CSVs with a class id for each pixel of 256x256: those of the home competition."""

    def reader(self, path: Path) -> IdReader:
        return IdReader(path, len(self.competition.classes), self.sizes)

    def writer(self, path: Path) -> IdWriter:
        return IdWriter(path)

    def check(self, path: Path) -> np.ndarray:
        return check_ids(path, [*self.sizes], len(self.competition.classes))


class RunFormat(MaskFormat):
    """CSVs of run lengths, as `competition.rle` describes them."""

    def __init__(self, competition: Competition, sizes: Mapping[str, Size]) -> None:
        super().__init__(competition, sizes)
        how, ids = competition.rle, competition.object_ids
        self.table = RunTable(
            how,
            names=name_images(sizes, how.image_names),
            classes=name_classes(competition, how.class_names),
            first_id=ids.start,
            num_classes=len(competition.classes),
            may_overlap=competition.is_multilabel,
            sizes={image_id: self.size(image_id) for image_id in sizes},
        )

    def reader(self, path: Path) -> RunReader:
        return RunReader(path, self.table)

    def writer(self, path: Path) -> RunWriter:
        return RunWriter(path, self.table)

    def check(self, path: Path) -> np.ndarray:
        return check_runs(path, self.table)


def mask_format(competition: Competition, sizes: Mapping[str, Size]) -> MaskFormat:
    """Return the format of a competition's CSVs, by the (H, W) of its photos. Raises BadInput.

    CSVs of ids need no sizes, and take images that are not among them.
    """
    return IdFormat(competition, sizes) if competition.rle is None else RunFormat(competition, sizes)


def read_format(data: Path, competition: Competition, required: bool = True) -> MaskFormat:
    """Return the format of the CSVs of a data root's test.json; CSVs of ids do without the file unless it is
    `required`. Raises BadInput.
    """
    needed = required or competition.rle or (data / 'test.json').is_file()
    return mask_format(competition, read_test_sizes(data, competition) if needed else {})


def name_images(image_ids: Iterable[str], image_names: str) -> dict[str, str]:
    """Return how images are called in a CSV, by image id. Raises BadInput if two have the same name."""
    names: dict[str, str] = {}
    owners: dict[str, str] = {}
    for image_id in image_ids:
        path = PurePosixPath(normal_name(image_id))
        name = {'path': image_id, 'name': path.name, 'stem': path.stem}[image_names]
        if owners.setdefault(name, image_id) != image_id:
            fault = f'{owners[name]!r} and {image_id!r} are both {name!r} in the CSV'
            raise BadInput(f'{COMPETITION_FILE}: submission: {fault}; write image_names: path')
        names[image_id] = name
    return names


def name_classes(competition: Competition, class_names: str) -> list[str]:
    """Return how the classes of objects are called in a CSV, in the order of their ids."""
    ids = competition.object_ids
    if class_names == 'name':
        return [competition.classes[k] for k in ids]
    return [str(k + (1 - ids.start if class_names == 'number' else 0)) for k in ids]


def probs_path(csv: Path) -> Path:
    """Return where the probabilities of a CSV are: beside it, as <name>_probs.npy."""
    return csv.with_name(f'{csv.stem}_probs.npy')


def open_probs(reader: Reader, form: MaskFormat) -> Ragged:
    """Map the (K, H, W) uint8 probabilities that belong to each row of a CSV. Raises BadInput."""
    path = probs_path(reader.path)
    if not path.exists():
        raise BadInput(f'{path}: no such file; infer.py --save-probs writes it beside the CSV')
    num_classes = len(form.competition.classes)
    return map_ragged(path, [(num_classes, *form.size(image_id)) for image_id in reader.image_ids])


if __name__ == '__main__':
    run_script(main)
