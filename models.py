"""Encoder + neck + head → SegModel; parameter groups.

    model = SegModel(cfg)                                  # encoder_weights loaded
    outputs = model(normalize(images, model.mean, model.std))   # the main one last
    python models.py                                    # a table of all configs: parameters, GMACs, outputs
    python models.py --cfg configs/beit.yaml --groups   # depth, rate and decay of its parameters

Encoders come from timm (networks/encoders.py) and, under smp-* heads, from segmentation-models-pytorch.
Shapes: N batch, K classes, H W input, C_i channels of the feature of stride s_i.
"""

import inspect
from pathlib import Path
from typing import NamedTuple

import segmentation_models_pytorch as smp
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from config import Config, load_config
from networks.encoders import (
    TimmEncoder,
    checkpoint_gradients,
    own_encoder,
    smp_encoder_name,
    timm_cfg,
)
from networks.heads import HEADS, Head, fcn_aux
from networks.layers import FeatureNorms, FeaturePyramid
from networks.pretrained import load_encoder_weights
from utils.cli import ArgumentParser, run_script
from utils.errors import BadInput, one_line

# what a head can be told: its parameter, and the config's key
HEAD_OPTIONS = {
    'channels': 'head_channels',
    'dropout': 'dropout',
    'aux_weight': 'aux_weight',
    'aux_channels': 'aux_channels',
    'stages': 'stages',
    'queries': 'queries',
}
# families whose features get a LayerNorm each, and its epsilon
FEATURE_NORMS = {'convnext': 1e-6, 'swin': 1e-5}


class SegModel(nn.Module):
    """An encoder, a neck where it is a plain ViT, and a head. `mean` and `std` are what the encoder's weights
    were trained with; `loss_weights` is one an output; `fixed_size` is the one input size the encoder takes,
    or None; `encoder_report` says what was loaded.
    """

    def __init__(self, cfg: Config, load_weights: bool = True) -> None:
        super().__init__()
        build = build_smp if cfg.head.startswith('smp-') else build_timm
        self.encoder, self.neck, self.head = build(cfg)
        self.loss_weights: list[float] = self.head.loss_weights
        self.fixed_size: int | None = getattr(self.encoder, 'fixed_size', None)
        pretrained_cfg = timm_cfg(cfg.encoder)
        self.mean = tuple(pretrained_cfg.mean) if pretrained_cfg else (0.485, 0.456, 0.406)
        self.std = tuple(pretrained_cfg.std) if pretrained_cfg else (0.229, 0.224, 0.225)
        self.encoder_report = load_encoder_weights(self.encoder, cfg) if load_weights else []
        if cfg.grad_checkpointing:
            checkpoint_gradients(self.encoder, cfg.encoder)

    @property
    def fill(self) -> tuple[int, ...]:
        """The colour of `mean` (RGB, 0 to 255): what a crop shows outside of its photo."""
        return tuple(round(255 * value) for value in self.mean)

    def forward(self, images: Tensor) -> list:
        """(N, 3, H, W) normalised → logits, each (N, K, h, w) at the head's own stride, or Mask2Former's
        Queries: auxiliary ones first, the main one last.
        """
        return self.head(self.neck(self.encoder(images)))


def build_timm(cfg: Config) -> tuple[nn.Module, nn.Module, nn.Module]:
    """A timm encoder, a neck where it is a plain ViT, and a head of networks.heads.HEADS over them."""
    if cfg.head not in HEADS:
        raise BadInput(
            f"config key 'head': found {cfg.head!r}, expected one of {', '.join(HEADS)}, or "
            'smp-<architecture>'
        )
    if cfg.head == 'mask2former':  # which has a loss of its own
        refuse_unused(cfg, ['loss', 'label_smoothing', 'class_weights'])
    accepted = inspect.signature(HEADS[cfg.head]).parameters
    refuse_unused(cfg, [key for option, key in HEAD_OPTIONS.items() if option not in accepted])
    if build := own_encoder(cfg.encoder):
        refuse_unused(cfg, ['output_stride', 'features'])
        encoder = build(cfg.encoder, cfg.drop_path)
    else:
        encoder = TimmEncoder(cfg.encoder, cfg.drop_path, cfg.crop_size, cfg.output_stride, cfg.features)
    neck = build_neck(encoder, cfg.encoder) if cfg.neck == 'auto' else nn.Identity()
    options = {option: getattr(cfg, key) for option, key in HEAD_OPTIONS.items() if option in accepted}
    try:
        head = HEADS[cfg.head](encoder.channels, len(cfg.classes), **options)
    except ValueError as error:
        raise BadInput(f"config keys 'head', 'head_channels': {cfg.head}: {one_line(error)}") from None
    return encoder, neck, head


def build_neck(encoder: nn.Module, name: str) -> nn.Module:
    """What an encoder's features need before a head reads them."""
    if encoder.is_plain:
        return FeaturePyramid(encoder.channels[0])
    eps = next((eps for family, eps in FEATURE_NORMS.items() if name.startswith(family)), None)
    return FeatureNorms(encoder.channels, eps) if eps else nn.Identity()


def build_smp(cfg: Config) -> tuple[nn.Module, nn.Module, nn.Module]:
    """Encoder and decoder of an smp architecture, `smp-<arch>`, apart; smp has no neck."""
    arch = cfg.head.removeprefix('smp-')
    refuse_unused(cfg, ['head_channels', 'stages', 'queries', 'features', 'neck'])
    options = {'drop_path_rate': cfg.drop_path} if cfg.drop_path and timm_cfg(cfg.encoder) else {}
    known = {name.lower(): getattr(smp, name) for name in dir(smp) if inspect.isclass(getattr(smp, name))}
    if arch in known and 'encoder_output_stride' in inspect.signature(known[arch]).parameters:
        options['encoder_output_stride'] = cfg.output_stride
    else:
        refuse_unused(cfg, ['output_stride'])
    try:
        model = smp.create_model(
            arch,
            encoder_name=smp_encoder_name(cfg.encoder),
            encoder_weights=None,
            classes=len(cfg.classes),
            **options,
        )
    except (KeyError, ValueError, TypeError, RuntimeError, AttributeError, NotImplementedError) as error:
        raise BadInput(
            f"config keys 'head', 'encoder': smp cannot build {arch} over {cfg.encoder}: {one_line(error)}"
        ) from None
    head = SmpHead(model, len(cfg.classes), cfg.aux_weight, cfg.aux_channels, cfg.dropout)
    return model.encoder, nn.Identity(), head


def refuse_unused(cfg: Config, keys: list[str]) -> None:
    """Raises BadInput for a key that was changed, but that the config's head has no use for."""
    for key in keys:
        default = Config.model_fields[key].default
        if getattr(cfg, key) != default:
            raise BadInput(
                f'config key {key!r}: found {getattr(cfg, key)!r}, but {cfg.head} has no use for it; '
                f'expected its default, {default!r}'
            )


class SmpHead(Head):
    """The decoder and segmentation head of an smp model, and the auxiliary FCN on its stride-16 feature."""

    def __init__(
        self, model: nn.Module, num_classes: int, aux_weight: float, aux_channels: int, dropout: float
    ) -> None:
        channels = list(model.encoder.out_channels)
        super().__init__(
            fcn_aux(channels, num_classes, aux_weight, aux_channels, len(channels) - 2, dropout), aux_weight
        )
        self.decoder, self.segmentation_head = model.decoder, model.segmentation_head

    def forward(self, feats: list[Tensor] | tuple[list[Tensor], list[Tensor]]) -> list[Tensor]:
        # a plain ViT gives its features and its prefix tokens, for DPT
        parts = feats if isinstance(feats, tuple) else (feats,)
        main = self.segmentation_head(self.decoder(*parts))
        return [logits for head in self.aux for logits in head(parts[0])] + [main]


class ModelCost(NamedTuple):
    """Parameters and multiplications of a photo, of the encoder and of neck and head; outputs with a loss."""

    encoder: int
    head: int
    encoder_macs: float
    head_macs: float
    outputs: int

    @property
    def macs(self) -> float:
        return self.encoder_macs + self.head_macs


def count_model(cfg: Config, size: int) -> ModelCost:
    """The cost at size x size: torch's count, of convolutions, matrix products and attention."""
    update = {'crop_size': size, 'encoder_weights': 'none', 'weights': None}
    with shapes_device(cfg):
        model = SegModel(cfg.model_copy(update=update)).eval().requires_grad_(False)
    with FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False) as counter:
        model.to_empty(device='cpu')  # shapes, without memory or arithmetic
        feats = model.encoder(torch.zeros(1, 3, size, size))
        encoder_flops = counter.get_total_flops()
        model.head(model.neck(feats))
        head_flops = counter.get_total_flops() - encoder_flops
    encoder = sum(p.numel() for p in model.encoder.parameters())
    head = sum(p.numel() for p in model.parameters()) - encoder
    return ModelCost(encoder, head, encoder_flops / 2, head_flops / 2, len(model.loss_weights))


def print_models(cfgs: list[Config], size: int) -> None:
    """A line a config: millions of parameters, and billions of multiplications at size x size."""
    print(f'{"config":24}{"encoder":>12}{"head":>8}{"encoder":>12}{"head":>8}{"outputs":>9}')
    print(f'{"":24}{"M":>12}{"M":>8}{"GMACs":>12}{"GMACs":>8}')
    for cfg in cfgs:
        cost = count_model(cfg, size)
        print(
            f'{cfg.name:24}{cost.encoder / 1e6:12.1f}{cost.head / 1e6:8.1f}{cost.encoder_macs / 1e9:12.1f}'
            f'{cost.head_macs / 1e9:8.1f}{cost.outputs:9}'
        )


def shapes_device(cfg: Config) -> torch.device:
    """Where to build a model whose shapes alone matter: meta, but for encoders that calculate meanwhile."""
    return torch.device('meta' if timm_cfg(cfg.encoder) else 'cpu')


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(__doc__)
    parser.add_argument('--cfg', nargs='+', type=Path, metavar='YAML', help='by default all of configs/')
    parser.add_argument(
        '--set', nargs='+', action='extend', default=[], metavar='KEY=VALUE', help='changes of the config'
    )
    parser.add_argument('--size', type=int, default=512, help='side of the photo for the GMACs')
    args = parser.parse_args(argv)
    if args.size <= 0 or args.size % 32:
        raise BadInput(f'--size: found {args.size}, expected a multiple of 32')
    paths = args.cfg or sorted((Path(__file__).parent / 'configs').glob('*.yaml'))
    print_models([load_config(path, args.set) for path in paths], args.size)


if __name__ == '__main__':
    run_script(main)
