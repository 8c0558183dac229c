"""Encoder + neck + head → SegModel.

    model = SegModel(cfg)                                       # encoder_weights are loaded
    outputs = model(normalize(images, model.mean, model.std))   # a list of logits, the main ones last
    python models.py                                  # a table of all configs: parameters, GMACs, outputs
    python models.py --cfg configs/beit.yaml --size 640

Encoders come from timm (networks/encoders.py) and, for smp-* heads, from segmentation-models-pytorch.
Shapes: N batch, B bands of a photo, K classes, H W input, h w output, C_i channels of the feature of
stride s_i.
"""

import inspect
from copy import deepcopy
from pathlib import Path
from typing import NamedTuple

from config import Config, load_config
from utils.cli import ArgumentParser, parse_early, run_script
from utils.errors import BadInput, one_line


def read_arguments(argv: list[str] | None = None) -> tuple[list[Config], int]:
    """Read the command line; return the configs and the side of the photo that GMACs are counted for."""
    parser = ArgumentParser(__doc__)
    parser.add_argument('--cfg', nargs='+', type=Path, metavar='YAML', help='by default all of configs/')
    parser.add_argument(
        '--set', nargs='+', action='extend', default=[], metavar='KEY=VALUE', help='config keys'
    )
    parser.add_argument('--size', type=int, default=512, help='side of the photo, for the GMACs')
    args = parser.parse_args(argv)
    if args.size <= 0 or args.size % 32:
        raise BadInput(f'--size: found {args.size}, expected a multiple of 32')
    paths = args.cfg or sorted((Path(__file__).parent / 'configs').glob('*.yaml'))
    return [load_config(path, args.set) for path in paths], args.size


if __name__ == '__main__':
    parse_early(read_arguments)

import segmentation_models_pytorch as smp
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from networks.blocks import use_fast_blocks
from networks.encoders import (
    TimmEncoder,
    checkpoint_gradients,
    find_custom_encoder,
    freeze_stages,
    set_bands,
    set_drop_path,
    timm_cfg,
)
from networks.heads import FCN, HEADS, SETR, Head
from networks.layers import (
    FeatureNorms,
    FeaturePyramid,
    Presence,
    Probe,
    feature_maps,
    multiply_by_presence,
    weigh_by_presence,
)
from networks.pretrained import load_encoder_weights

# a head's parameter, and the config key that it gets
HEAD_OPTIONS = {'channels': 'head_channels', 'dropout': 'dropout', 'stages': 'stages', 'queries': 'queries'}
# OCR's coarse map takes the place of an auxiliary head
COARSE_OPTIONS = {'coarse_channels': 'aux_channels', 'coarse_weight': 'aux_weight'}
# families whose features each get a LayerNorm, and its epsilon
FEATURE_NORMS = {'convnext': 1e-6, 'swin': 1e-5}


class SegModel(nn.Module):
    """An encoder, a neck, auxiliary heads, a head and, if asked for, a classifier of the whole photo, by
    whose probabilities the main logits are weighed in evaluation.

    `mean` and `std` have one number a band, of values from 0 to 1, `loss_weights` has one an output,
    `fixed_size` is the one input size that the encoder takes, or None, `encoder_report` says which weights
    were loaded.
    """

    def __init__(self, cfg: Config, load_weights: bool = True) -> None:
        super().__init__()
        build = build_smp if cfg.head.startswith('smp-') else build_timm
        self.encoder, self.neck, self.aux, self.head = build(cfg)
        use_fast_blocks(self.encoder, cfg.encoder)
        self.encoder_report = load_encoder_weights(self.encoder, cfg) if load_weights else []
        self.competition, self.probe_power = cfg.competition, cfg.probe
        self.presence, self.probe = build_presence(cfg, self.encoder), build_probe(cfg, self.encoder)
        self.loss_weights: list[float] = [cfg.aux_weight] * len(self.aux)
        self.loss_weights += [cfg.presence_weight] * (self.presence is not None) + [*self.head.loss_weights]
        self.fixed_size: int | None = getattr(self.encoder, 'fixed_size', None)
        self.mean, self.std = normalisation(cfg)
        self.max_value = cfg.competition.max_value
        self.frozen = freeze_stages(self.encoder, cfg.frozen_stages)
        if cfg.grad_checkpointing:
            checkpoint_gradients(self.encoder, cfg.encoder)

    def train(self, mode: bool = True) -> 'SegModel':
        super().train(mode)
        for module in self.frozen:
            module.eval()
        return self

    @property
    def fill(self) -> tuple[int, ...]:
        """The colour `mean` (0 to 255, or 65535 for 16 bits), which a crop shows outside its photo."""
        return tuple(round(self.max_value * value) for value in self.mean)

    def forward(self, images: Tensor) -> list:
        """Turn normalised images (N, B, H, W) into logits (N, K, h, w), or Queries, the main ones last; in
        training those of Presence, (N, K), come before the head's.
        """
        return self.decode(self.encoder(images), images)

    def decode(self, feats: list[Tensor], images: Tensor) -> list:
        """Turn the encoder's features of the images into the outputs."""
        feats = self.neck(feats)
        maps = feature_maps(feats)
        aux, outputs = [logits for aux in self.aux for logits in aux(maps)], self.head(feats)
        presence = [] if self.presence is None else [self.presence(maps[-1])]
        if self.training:
            return [*aux, *presence, *outputs]
        log_presence = [F.logsigmoid(logits.float()) for logits in presence]
        if self.probe is not None:
            log_presence.append(self.probe_power * self.probe(images).float())
        if log_presence:
            outputs = [*outputs[:-1], self.weigh(outputs[-1], sum(log_presence))]
        return aux + outputs

    def weigh(self, logits: Tensor, log_presence: Tensor) -> Tensor:
        """Weigh the logits of pixels, (N, K, h, w), by the logarithms (N, K) of what the photo shows."""
        if self.competition.is_multilabel:
            return multiply_by_presence(logits, log_presence)
        return weigh_by_presence(logits, log_presence, background=self.competition.object_ids.start)


class SkipDraws(TorchFunctionMode):
    """Skip the calls that draw random numbers into a tensor, and those that then scale them; the tensor keeps
    what was in memory.
    """

    draws = (Tensor.normal_, Tensor.uniform_, nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_)
    scalings = (Tensor.erfinv_, Tensor.mul_, Tensor.div_, Tensor.add_, Tensor.clamp_)
    last: Tensor | None = None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        tensor = args[0] if args else kwargs.get('tensor')
        if func in self.draws or (func in self.scalings and tensor is self.last):
            self.last = tensor
            return tensor
        return func(*args, **kwargs)


def empty_model(cfg: Config) -> SegModel:
    """Build a model whose weights will all be loaded; to draw random ones first would take seconds."""
    with SkipDraws():
        return SegModel(cfg, load_weights=False)


def memory_format(cfg: Config) -> torch.memory_format:
    """Return the order in memory of weights and images; another one changes the last bits of logits."""
    return torch.channels_last if cfg.channels_last else torch.contiguous_format


Values = tuple[float, ...]  # one a band


def normalisation(cfg: Config) -> tuple[Values, Values]:
    """Return the mean and std of each band, of values from 0 to 1: those of the config, or of the encoder's
    weights for RGB, or their averages for grey.

    A network for RGB, whose first weights timm adds up for grey, then sees a grey photo as it would in RGB.
    Other bands have no such values: train.py takes those of the training photos; 0.5 stands for them where no
    photos are read.
    """
    bands, weights = cfg.competition.channels, timm_cfg(cfg.encoder)
    mean = tuple(weights.mean) if weights else (0.485, 0.456, 0.406)
    std = tuple(weights.std) if weights else (0.229, 0.224, 0.225)
    if bands == 1:
        mean, std = (sum(mean) / 3,), (sum(std) / 3,)
    elif bands != 3:
        mean = std = (0.5,) * bands
    return cfg.mean or mean, cfg.std or std


Parts = tuple[nn.Module, nn.Module, nn.ModuleList, Head]  # encoder, neck, auxiliary heads, head


def build_timm(cfg: Config) -> Parts:
    """Build a timm encoder, its neck and a head of networks.heads.HEADS. Raises BadInput."""
    if cfg.head not in HEADS:
        expected = f'{", ".join(HEADS)}, or smp-<architecture>'
        raise BadInput(f"config key 'head': found {cfg.head!r}, expected one of {expected}")
    if cfg.head == 'mask2former' and cfg.competition.is_multilabel:
        fault = 'gives each pixel one class, but those of this task may overlap (task: multilabel)'
        raise BadInput(f"config key 'head': mask2former {fault}; expected another head")
    if cfg.head == 'mask2former':  # it has a loss of its own
        losses = ['loss', 'label_smoothing', 'class_weights', 'aux_weight', 'aux_channels']
        refuse_unused(cfg, [*losses, 'presence_weight', 'probe'])
    accepted = inspect.signature(HEADS[cfg.head]).parameters
    refuse_unused(cfg, [key for option, key in HEAD_OPTIONS.items() if option not in accepted])
    bands = cfg.competition.channels
    if build := find_custom_encoder(cfg.encoder):
        refuse_unused(cfg, ['output_stride', 'features'])
        encoder = build(cfg.encoder, cfg.drop_path)
        if bands != 3:
            set_bands(encoder, bands)
    else:
        options = {'output_stride': cfg.output_stride, 'blocks': cfg.features, 'bands': bands}
        encoder = TimmEncoder(cfg.encoder, cfg.drop_path, cfg.crop_size, **options)
    neck = build_neck(encoder, cfg.encoder) if cfg.neck == 'auto' else nn.Identity()
    aux = build_aux(cfg, encoder.channels)
    keys = HEAD_OPTIONS | COARSE_OPTIONS
    options = {option: getattr(cfg, key) for option, key in keys.items() if option in accepted}
    if 'overlapping' in accepted:
        options['overlapping'] = cfg.competition.is_multilabel
    try:
        head = HEADS[cfg.head](encoder.channels, len(cfg.classes), **options)
    except ValueError as error:
        raise BadInput(f"config keys 'head', 'head_channels': {cfg.head}: {one_line(error)}") from None
    return encoder, neck, aux, head


def build_neck(encoder: nn.Module, name: str) -> nn.Module:
    """Build the layers that an encoder's features pass before a head reads them."""
    if encoder.is_plain:
        return FeaturePyramid(encoder.channels[0])
    eps = next((eps for family, eps in FEATURE_NORMS.items() if name.startswith(family)), None)
    return FeatureNorms(encoder.channels, eps) if eps else nn.Identity()


def build_aux(cfg: Config, channels: list[int]) -> nn.ModuleList:
    """Build the auxiliary heads: an FCN on the stride-16 feature, or a SETR on each feature but the last."""
    if not cfg.aux_weight or cfg.head in ('mask2former', 'ocr'):  # these have such outputs of their own
        return nn.ModuleList()
    options = {'channels': cfg.aux_channels, 'dropout': cfg.dropout}
    before_last = range(len(channels) - 1)
    if cfg.head == 'setr_naive':
        return nn.ModuleList(SETR(channels, len(cfg.classes), index=i, **options) for i in before_last)
    options |= {'num_convs': 1, 'concat_input': False}
    return nn.ModuleList([FCN(channels, len(cfg.classes), index=before_last[-1], **options)])


def build_presence(cfg: Config, encoder: nn.Module) -> Presence | None:
    """Build the classifier of the whole photo on the last feature, if its loss has a weight."""
    channels = last_channels(encoder)
    return Presence(channels, len(cfg.classes), cfg.dropout) if cfg.presence_weight else None


def build_probe(cfg: Config, encoder: nn.Module) -> Probe | None:
    """Build the probe of a copy of the encoder, if it has a power."""
    overlapping, channels = cfg.competition.is_multilabel, last_channels(encoder)
    return Probe(deepcopy(encoder), channels, len(cfg.classes), overlapping) if cfg.probe else None


def last_channels(encoder: nn.Module) -> int:
    channels = getattr(encoder, 'channels', None) or encoder.out_channels  # smp has the second name
    return channels[-1]


def build_smp(cfg: Config) -> Parts:
    """Build the encoder and the decoder of an smp architecture, `smp-<arch>`. Raises BadInput."""
    arch = cfg.head.removeprefix('smp-')
    refuse_unused(cfg, ['head_channels', 'stages', 'queries', 'features', 'neck'])
    in_timm, bands = timm_cfg(cfg.encoder), cfg.competition.channels
    encoder = f'tu-{cfg.encoder}' if in_timm else cfg.encoder
    options = {'drop_path_rate': cfg.drop_path} if cfg.drop_path and in_timm else {}
    known = {name.lower(): getattr(smp, name) for name in dir(smp) if inspect.isclass(getattr(smp, name))}
    if arch in known and 'encoder_output_stride' in inspect.signature(known[arch]).parameters:
        options['encoder_output_stride'] = cfg.output_stride
    else:
        refuse_unused(cfg, ['output_stride'])
    try:
        model = smp.create_model(arch, encoder, None, bands, len(cfg.classes), **options)
    except (KeyError, ValueError, TypeError, RuntimeError, AttributeError) as error:
        message = f'smp cannot build {arch} over {cfg.encoder}: {one_line(error)}'
        raise BadInput(f"config keys 'head', 'encoder': {message}") from None
    if 'drop_path_rate' not in options:
        set_drop_path(model.encoder, cfg.encoder, cfg.drop_path)
    return model.encoder, nn.Identity(), build_aux(cfg, list(model.encoder.out_channels)), SmpHead(model)


def refuse_unused(cfg: Config, keys: list[str]) -> None:
    """Raise BadInput if a key was changed that this head ignores."""
    for key in keys:
        value, default = getattr(cfg, key), Config.model_fields[key].default
        if value != default:
            expected = f'expected the default, {default!r}; remove the key'
            raise BadInput(f'config key {key!r}: found {value!r}, which {cfg.head} ignores; {expected}')


class SmpHead(Head):
    """The decoder and the segmentation head of an smp model."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.decoder, self.segmentation_head = model.decoder, model.segmentation_head

    def forward(self, feats: list[Tensor] | tuple[list[Tensor], list[Tensor]]) -> list[Tensor]:
        # a plain ViT gives its features and its prefix tokens, for DPT
        inputs = feats if isinstance(feats, tuple) else (feats,)
        return [self.segmentation_head(self.decoder(*inputs))]


class ModelCost(NamedTuple):
    """Parameters, and multiplications for one photo, of the encoder and of all that follows it; outputs."""

    encoder: int
    head: int
    encoder_macs: float
    head_macs: float
    outputs: int

    @property
    def macs(self) -> float:
        return self.encoder_macs + self.head_macs


def count_model(cfg: Config, size: int) -> ModelCost:
    """Count parameters and multiplications at size x size: convolutions, matrix products, attention."""
    update = {'crop_size': size, 'encoder_weights': 'none', 'weights': None}
    with torch.device('meta' if timm_cfg(cfg.encoder) else 'cpu'):  # smp's encoders compute while being built
        model = SegModel(cfg.model_copy(update=update)).eval().requires_grad_(False)
    with FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False) as counter:
        model.to_empty(device='cpu')  # shapes, without memory or arithmetic
        images = torch.zeros(1, cfg.competition.channels, size, size)
        feats = model.encoder(images)
        copies = 1 if model.probe is None else 2  # of the encoder
        encoder_flops = copies * counter.get_total_flops()
        model.decode(feats, images)
        head_flops = counter.get_total_flops() - encoder_flops
    encoder = copies * sum(p.numel() for p in model.encoder.parameters())
    head = sum(p.numel() for p in model.parameters()) - encoder
    return ModelCost(encoder, head, encoder_flops / 2, head_flops / 2, len(model.loss_weights))


def main(argv: list[str] | None = None) -> None:
    """Print a line a config: millions of parameters, and billions of multiplications at size x size."""
    cfgs, size = read_arguments(argv)
    print(f'{"config":24}{"encoder":>12}{"head":>8}{"encoder":>12}{"head":>8}{"outputs":>9}')
    print(f'{"":24}{"M":>12}{"M":>8}{"GMACs":>12}{"GMACs":>8}')
    for cfg in cfgs:
        cost = count_model(cfg, size)
        print(
            f'{cfg.name:24}{cost.encoder / 1e6:12.1f}{cost.head / 1e6:8.1f}{cost.encoder_macs / 1e9:12.1f}'
            f'{cost.head_macs / 1e9:8.1f}{cost.outputs:9}'
        )


if __name__ == '__main__':
    run_script(main)
