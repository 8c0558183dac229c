"""Make what the items of the GPU check run: configs, batches, trainers of random weights.

With the option `tiny` networks have few weights and photos 64 pixels a side, for a CPU.
"""

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

import train
from config import Config, load_config
from data.demo.scenes import make_demo_set
from engine.distributed import Ranks, seed_everything
from engine.trainer import Trainer
from tools.bench.fixtures import ROOT, random_masks
from tools.bench.steps import build_model
from tools.gpu.runner import Options
from utils.signals import StopRequest

CONFIGS = ROOT / 'configs'
DEMO_PHOTOS, TINY_PHOTOS = 40, 16  # of a demo set
TINY = {'encoder': 'test_resnet.r160_in1k', 'image_size': 64, 'crop_size': 64, 'batch_size': 2, 'workers': 0}

# a small encoder of each family of configs/
ENCODERS = (
    'convnext_atto.d2_in1k',
    'beit_base_patch16_224',
    'hrnet_w18_small',
    'mit_b0',
    'resnet18',
    'swin_tiny_patch4_window7_224',
    'tf_efficientnet_lite0',
    'twins_svt_small',
    'vit_small_patch16_dinov3',
)

Batch = tuple[Tensor, Tensor, Tensor]  # images (N, 3, S, S) uint8, masks (N, S, S), positions (N,)


def make_config(name: str, options: Options, **changes: Any) -> Config:
    """Load a config of configs/, without published weights, and small if the options are tiny."""
    values = {'encoder_weights': 'none', 'device': options.device}
    if options.tiny:
        values |= TINY
        head = load_config(CONFIGS / f'{name}.yaml').head
        if not head.startswith('smp-'):
            values['head_channels'] = 64 if head in ('knet', 'mask2former') else 16
        if head not in ('mask2former', 'ocr'):
            values['aux_channels'] = 8
        if head == 'mask2former':
            values['queries'] = 8
    settings = [f'{key}={json.dumps(value)}' for key, value in {**values, **changes}.items()]
    return load_config(CONFIGS / f'{name}.yaml', settings)


def network_config(options: Options, **changes: Any) -> Config:
    """Make a config at a small size: the defaults with changes."""
    side, batch = (64, 2) if options.tiny else (128, 4)
    sizes = {'image_size': side, 'crop_size': side, 'batch_size': batch}
    return Config(**{'encoder_weights': 'none', 'device': options.device, **sizes, **changes})


def encoder_config(encoder: str, options: Options, **changes: Any) -> Config:
    """Make a config of an encoder with a head that takes it."""
    small = {'head': 'upernet', 'head_channels': 64}
    if encoder.startswith('mit'):
        small = {'head': 'smp-segformer', 'aux_weight': 0}
    return network_config(options, encoder=encoder, **small, **changes)


def with_data(cfg: Config, options: Options, name: str) -> Config:
    """Set the name, the data root, two folds and the folders of a config; without data, draw a demo set."""
    root = options.data or options.folder / 'demo'
    if not options.data and not (root / 'train_all.json').exists():
        make_demo_set(root, train=TINY_PHOTOS if options.tiny else DEMO_PHOTOS, test=1)
    places = {
        'data_root': root,
        'cache_dir': options.folder / 'cache',
        'output_dir': options.folder / 'output',
        'folds': 2,
    }
    return cfg.model_copy(update={**places, 'name': name})


def device_of(options: Options) -> torch.device:
    return torch.device(options.device)


def random_batch(cfg: Config, size: int | None = None) -> Batch:
    """Draw a batch: images of noise, masks of a few rectangles."""
    size = size or cfg.batch_size
    generator = torch.Generator().manual_seed(0)
    shape = (size, 3, cfg.crop_size, cfg.crop_size)
    images = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
    masks = torch.from_numpy(np.stack(list(random_masks(size, cfg.crop_size, seed=0))))
    return images, masks, torch.arange(size)


class ShortTrainer(Trainer):
    """A trainer whose epoch is some `batches`, or so many `steps` on photos."""

    def __init__(self, *args: Any, batches: list[Batch] | None = None, steps: int = 0) -> None:
        self.batches, self.count = batches, steps
        super().__init__(*args)
        if batches is not None:
            self.loader = batches

    def positions_in(self, epoch: int) -> Sequence[int]:
        if self.batches is not None:
            return range(len(self.batches) * self.cfg.batch_size)
        return np.resize(super().positions_in(epoch), self.count * self.cfg.batch_size)

    @property
    def losses(self) -> list[float]:
        """The losses of the batches of steps()."""
        return [loss.item() for _, loss, _ in self.unread]


def make_trainer(
    cfg: Config,
    ranks: Ranks | None = None,
    fold: int = 0,
    stop: StopRequest | None = None,
    **epoch: Any,
) -> ShortTrainer:
    """Make a trainer of random weights on a fold; `epoch` is ShortTrainer's batches or steps. Checkpoints go
    into the run folder.
    """
    ranks = ranks or Ranks(0, 1, torch.device(cfg.device))
    torch.use_deterministic_algorithms(False)
    seed_everything(cfg.seed, cfg.deterministic)
    data = train.load_data(cfg, fold, ranks, None, None)
    model = build_model(cfg, ranks.device)
    torch.manual_seed(cfg.seed + ranks.rank)
    folder = cfg.run_dir(fold) if ranks.is_main else None
    return ShortTrainer(cfg, model, ranks, data, folder, stop, **epoch)
