"""Define what a data set is, as competition.yaml in its root says: Competition; read it and write it.

    competition = read_competition(Path('input/hands')) or HOME

config.py has it in each config, and prints the page of its keys.
"""

import difflib
import re
import unicodedata
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from utils.errors import BadInput, one_line
from utils.files import exists, write_text
from utils.key_tables import describe_values
from utils.yaml_files import dump_yaml, read_mapping

CLASSES = (
    'Background', 'General trash', 'Paper', 'Paper pack', 'Metal', 'Glass',
    'Plastic', 'Styrofoam', 'Plastic bag', 'Battery', 'Clothing',
)  # fmt: skip

MetricName = Literal['miou', 'dice', 'image_miou', 'image_dice']
Order = Literal['column', 'row']  # in which pixels are counted
Role = Literal['image', 'class', 'image_class', 'mask']  # of a column
Task = Literal['multiclass', 'multilabel']
Range = tuple[float, float]  # (low, high)
Model = TypeVar('Model', bound=BaseModel)
COMPETITION_FILE = 'competition.yaml'  # in a data root
MISSPELT_FILES = ('competition.yml', 'Competition.yaml', 'Competition.yml', 'competition.yaml.txt')
BACKGROUNDS = ('background', 'bg', 'void', 'unlabeled', 'unlabelled', '배경')  # in lower case, without _


def is_plain(text: str) -> bool:
    """Tell whether a text can be a path and stand in one line, without control characters and long names."""
    if any(unicodedata.category(character) in ('Cc', 'Cs', 'Zl', 'Zp') for character in text):
        return False
    return len(text) < 1000 and all(len(part.encode()) <= 255 for part in text.split('/'))


def match_key(name: str) -> str:
    """Return the form in which names of classes are compared: whatever the case, spaces and Unicode form."""
    return ' '.join(unicodedata.normalize('NFC', name).casefold().split())


class Submission(BaseModel):
    """Say how the CSV of a competition is written whose masks are run lengths."""

    model_config = ConfigDict(frozen=True, extra='forbid')

    columns: dict[str, Role] = {'image_id': 'image', 'class': 'class', 'rle': 'mask'}
    """What each column of the CSV holds, by its name and in its order: image; class; image_class, both in
    one, with _ between; mask. A CSV without a class has one row an image.
    """
    image_names: Literal['path', 'name', 'stem'] = 'path'
    """How images are called: by the file_name, by that without folders, or also without its ending."""
    class_names: Literal['name', 'id', 'number'] = 'name'
    """How classes are called: by name, by id in masks, or by number, the first object being 1."""
    order: Order = 'column'
    """Order in which pixels are counted: down the columns, as is usual, or along the rows."""
    first: Literal[0, 1] = 1
    """Number of the first pixel."""
    empty: str = Field('', pattern=r'^[^\n\r,"]{0,40}$')
    """Text of a mask without a pixel."""

    @model_validator(mode='after')
    def _check(self) -> 'Submission':
        """Raise ValueError for columns that do not say which mask a row holds."""
        roles = sorted(self.columns.values())
        if roles not in (['class', 'image', 'mask'], ['image', 'mask'], ['image_class', 'mask']):
            expected = 'image and mask, with class or without; or image_class and mask'
            raise ValueError(f'columns: found {", ".join(roles)}, expected {expected}')
        return self

    @property
    def has_classes(self) -> bool:
        """Return whether there is a row an image and class, not one an image."""
        return sorted(self.columns.values()) != ['image', 'mask']


class Slices(BaseModel):
    """Say which photos are neighbouring slices of a volume, whose bands a photo takes in (2.5D)."""

    model_config = ConfigDict(frozen=True, extra='forbid')

    pattern: str = r'^(.*?)_?(\d+)\.\w+$'
    """Regular expression that matches the file name; its last parenthesis is the number of the slice."""
    offsets: tuple[int, ...] = Field((-1, 0, 1), min_length=1, max_length=255)
    """Numbers that are added to a slice's own, in the order of the bands; where there is no such slice the
    nearest one on the way to it takes its place.
    """

    @model_validator(mode='after')
    def _check(self) -> 'Slices':
        """Raise ValueError for a pattern that has no number."""
        try:
            count = re.compile(self.pattern).groups
        except re.error as error:
            raise ValueError(f'slices: {self.pattern!r} is not a regular expression: {error}') from None
        if not count:
            raise ValueError(f'slices: {self.pattern!r} has no parenthesis for the number of the slice')
        return self


class Competition(BaseModel):
    """Hold what is true of a data set, whoever trains on it; the defaults are the home competition's."""

    model_config = ConfigDict(frozen=True, extra='forbid', allow_inf_nan=False)

    classes: tuple[str, ...] = Field(CLASSES, min_length=1, max_length=255)
    """Names of the classes in the order of their ids, matched with categories by name. Class 0 is the
    background, or the first object if the task is multilabel.
    """
    task: Task = 'multiclass'
    """Whether a pixel has one class, or any number of them, each with a mask of its own."""
    metric: MetricName = 'miou'
    """Score that is to be raised: that of the pixels of all photos together (miou, dice), or the mean over
    photos and classes of each one's (image_miou, image_dice).
    """
    score_size: Literal['own'] | Annotated[int, Field(ge=1, le=8192)] = 256
    """Size of the masks that are scored and submitted: that of each photo, or squares of so many pixels."""
    score_background: bool | None = None
    """Whether class 0 counts in the score of a multiclass task; null: if the metric is miou."""
    empty_score: Annotated[float, Field(ge=0, le=1)] | None = 1.0
    """Score in image_miou and image_dice of a class that neither the truth nor the prediction of a photo has;
    null leaves it out.
    """
    submission: Submission | None = None
    """How the CSV is written; null: ids of 256x256 pixels if score_size is 256, else run lengths."""
    categories: dict[str, str] = {}
    """Class of each category of the annotations that has another name than its class."""
    orientation: Literal['displayed', 'stored'] = 'displayed'
    """How photos with an EXIF turn were labelled: as viewers display them, or as their pixels are stored."""
    crowds: Literal['ignored', 'objects'] = 'ignored'
    """What annotations with iscrowd 1 are: regions that training and scores ignore, or objects."""
    labels: Literal['hard', 'soft'] = 'hard'
    """What the annotations of several annotators of a photo are: hard takes all as those of one; soft gives
    each a mask of their own (the key annotator of an annotation), trains on their mean and scores by their
    majority.
    """
    channels: int = Field(3, ge=1, le=255)
    """Bands of a photo: 1 grey; 3 red, green and blue; else those of a multi-band TIFF or .npy array, times
    the slices if `slices` is given.
    """
    depth: Literal[8, 16] = 8
    """Bits that a value of a band keeps in the cache and in training."""
    slices: Slices | None = None
    """Neighbouring slices that give a photo more bands; null: a photo is alone."""
    intensity: Range | Annotated[tuple[Range, ...], Field(min_length=1)] | None = None
    """Values of photos of more than 8 bits, such as 16-bit or float ones, that become the lowest and the
    highest of `depth`: one pair, or a list with a pair a band of one photo.
    """
    group: str | None = None
    """Regular expression; photos in whose file names it matches the same text stay in one fold. Or the path
    of a CSV in the data root, which ends with .csv and has the columns file_name and group.
    """

    @model_validator(mode='after')
    def _check(self) -> 'Competition':
        """Raise ValueError for names that are alike, and for values that cannot be used."""
        names = [match_key(name) for name in self.classes]
        for name, key in zip(self.classes, names, strict=True):
            if not key or not is_plain(name):
                raise ValueError(f'classes: found {name[:60]!r}, which is not a name for a class')
            if names.count(key) > 1:
                raise ValueError(f'classes: two of them have the same name, {name!r}')
        if self.is_multilabel:
            self._check_multilabel()
        elif len(self.classes) < 2:
            raise ValueError('classes: found 1, expected the background and an object')
        late = next((name for name in self.classes[1:] if match_key(name) == 'background'), None)
        if late is not None:
            raise ValueError(f'classes: {late!r} is not the first; the background is, as class 0 in masks')
        for category, name in self.categories.items():
            if name not in self.classes:
                raise ValueError(f'categories: {category} is {name!r}, which is none of the classes')
        self._check_bands()
        if self.group is not None:
            try:
                re.compile(self.group)
            except re.error as error:
                raise ValueError(f'group: {self.group!r} is not a regular expression: {error}') from None
        self._check_submission()
        return self

    def _check_bands(self) -> None:
        """Raise ValueError for bands and ranges that do not fit together."""
        count = len(self.slices.offsets) if self.slices else 1
        if self.channels % count:
            raise ValueError(
                f'channels: found {self.channels}, expected a multiple of the {count} offsets of slices'
            )
        for low, high in self.ranges or ():
            if low >= high:
                raise ValueError(f'intensity: found {[low, high]}, the first must be below the second')
        if self.ranges and len(self.ranges) not in (1, self.photo_channels):
            expected = f'expected one, or {self.photo_channels}, one a band'
            raise ValueError(f'intensity: found {len(self.ranges)} pairs, {expected}')

    def _check_multilabel(self) -> None:
        """Raise ValueError for what a task of overlapping classes cannot have."""
        if match_key(self.classes[0]) == 'background':
            raise ValueError(f'classes: {self.classes[0]!r} is no class of a multilabel task; leave it out')
        if self.score_size == 256 and self.submission is None:
            raise ValueError(
                'score_size: found 256, expected own; or say in submission how masks are written'
            )

    def _check_submission(self) -> None:
        """Raise ValueError for classes that the CSV cannot hold."""
        if self.submission is None or self.submission.has_classes or len(self.object_ids) == 1:
            return
        raise ValueError(f'submission: one row an image, but {len(self.object_ids)} classes of objects')

    @property
    def photo_channels(self) -> int:
        """Return the bands of one photo alone, without those of its neighbouring slices."""
        return self.channels // (len(self.slices.offsets) if self.slices else 1)

    @property
    def ranges(self) -> tuple[Range, ...] | None:
        """The pairs of `intensity`: one for all bands, or one a band."""
        if self.intensity is None or isinstance(self.intensity[0], tuple):
            return self.intensity
        return (self.intensity,)

    @property
    def max_value(self) -> int:
        """Return the highest value of a band: 255, or 65535."""
        return 2**self.depth - 1

    @property
    def is_rgb(self) -> bool:
        """Return whether photos are RGB of 8 bits: what changes of colour are made for."""
        return self.channels == 3 and self.depth == 8 and self.slices is None

    @property
    def is_multilabel(self) -> bool:
        """Return whether classes may overlap: each has a mask of its own."""
        return self.task == 'multilabel'

    @property
    def object_ids(self) -> range:
        """The ids of the classes of objects: all but the background, which a multilabel task has not."""
        return range(0 if self.is_multilabel else 1, len(self.classes))

    @property
    def scored_ids(self) -> range:
        """The ids of the classes that the metric counts."""
        background = self.metric == 'miou' if self.score_background is None else self.score_background
        return range(len(self.classes)) if background else self.object_ids

    @property
    def rle(self) -> Submission | None:
        """How masks are written as run lengths; None if the CSV holds the ids of 256x256 pixels."""
        return self.submission or (None if self.score_size == 256 else Submission())

    def class_id(self, category: str) -> int | None:
        """Return the id of a category's class, by its name or by `categories`; None if there is none."""
        ids = {match_key(name): k for k, name in enumerate(self.classes)}
        ids |= {match_key(other): ids[match_key(name)] for other, name in self.categories.items()}
        return ids.get(match_key(category))

    def knows_background(self, category: str) -> bool:
        """Tell whether a category is called like a background, or is said to be one in `categories`."""
        key = match_key(category)
        return key.strip('_') in BACKGROUNDS or key in map(match_key, self.categories)  # labelme's has _


HOME = Competition()


def read_competition(data_root: Path) -> Competition | None:
    """Read competition.yaml of a data root; None if there is no such file. Raises BadInput."""
    path = data_root / COMPETITION_FILE
    if not exists(path):
        for name in MISSPELT_FILES:
            if exists(data_root / name):
                raise BadInput(f'{data_root / name}: is not read; rename it to {COMPETITION_FILE}')
        return None
    return make_competition(read_mapping(path), where=str(path))


def make_competition(values: dict[str, Any], where: str) -> Competition:
    """Make a Competition of plain values. Raises BadInput, which names where they come from."""
    return validate(Competition, values, where, origins={})


def write_competition(data_root: Path, competition: Competition) -> None:
    """Write competition.yaml into a data root: the classes, and what differs from the defaults."""
    values = competition.model_dump(mode='json', exclude_defaults=True) | {'classes': [*competition.classes]}
    head = '# what this data set is; docs/data.md explains the keys'
    write_text(data_root / COMPETITION_FILE, f'{head}\n{dump_yaml(values)}')


def validate(model: type[Model], values: dict[str, Any], where: str, origins: Mapping[str, str]) -> Model:
    """Make a model of plain values. Raises BadInput for the first key or value that is not allowed."""
    for key in values:
        if key not in model.model_fields:
            name = str(key)[:60]
            near = difflib.get_close_matches(name, model.model_fields, n=1)
            hint = f'did you mean {near[0]!r}?' if near else 'docs/config.md lists the keys'
            raise BadInput(f'{origins.get(key, where)}: unknown key {name!r}; {hint}')
    try:
        return model.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        if first['type'] == 'model_type':  # a word in place of keys
            key = [key for key in first['loc'] if isinstance(key, str)][-1]
            found = f'key {key!r}: found {repr(first["input"])[:80]}, expected keys of its own'
            raise BadInput(f'{origins.get(first["loc"][0], where)}: {found}') from None
        keys = [key for key in first['loc'] if isinstance(key, str) and key != 'competition']
        if not keys:
            raise BadInput(f'{where}: {one_line(first["msg"].removeprefix("Value error, "))}') from None
        key = keys[0]
        owner = Competition if first['loc'][0] == 'competition' else model
        schema = owner.model_json_schema()
        part = schema['properties'].get(key)
        allowed = describe_values(part, schema).replace('`', '') if part else 'a key of docs/config.md'
        found = f'key {key!r}: found {repr(first["input"])[:80]}, expected {allowed}'
        raise BadInput(f'{origins.get(key, where)}: {found}') from None
