"""Encoder + neck + head → SegModel; parameter groups.

    model = SegModel(cfg)                                  # encoder_weights loaded
    outputs = model(normalize(images, model.mean, model.std))   # the main one last
    python models.py                                    # a table of all configs: parameters, GMACs, outputs
    python models.py --cfg configs/beit.yaml --groups   # depth, rate and decay of its parameters

Encoders come from timm (networks/encoders.py) and, under smp-* heads, from segmentation-models-pytorch.
Shapes: N batch, K classes, H W input, C_i channels of the feature of stride s_i.
"""

import inspect
import re
from pathlib import Path
from typing import NamedTuple

import segmentation_models_pytorch as smp
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from config import ArgumentParser, BadInput, Config, load_config, one_line, run_script
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

# what a head can be told: its parameter, and the config's key
HEAD_OPTIONS = {
    'channels': 'head_channels',
    'dropout': 'dropout',
    'aux_weight': 'aux_weight',
    'aux_channels': 'aux_channels',
    'stages': 'stages',
    'queries': 'queries',
}
# position tables, tokens and layer scales
NOT_DECAYED = re.compile(r'pos_embed|position_bias|_token|gamma|\b(query|query_position|level)(\.weight)?$')
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


def parameter_groups(model: SegModel, cfg: Config) -> list[dict]:
    """Groups for an optimizer, by depth and decay, each with its own lr, `depth` and parameter `names`.

    The rate is lr for neck and head, and lr * encoder_lr_mult * layer_decay^(1 + blocks after it) for the
    encoder, as BEiT does (arXiv:2106.08254, appendix). It is the group's own lr, so that any scheduler of
    torch follows it. Vectors, biases, tokens, position tables and layer scales are not decayed.
    """
    depths = encoder_depths([name for name, _ in model.encoder.named_parameters()])
    deepest = max(depths.values())
    groups: dict[tuple, dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        in_encoder = name.startswith('encoder.')
        depth = depths[name.removeprefix('encoder.')] if in_encoder else deepest + 1
        rate = (
            cfg.lr * cfg.encoder_lr_mult * cfg.layer_decay ** (deepest + 1 - depth) if in_encoder else cfg.lr
        )
        decayed = parameter.ndim > 1 and not name.endswith('.bias') and not NOT_DECAYED.search(name)
        key = (rate, decayed) if cfg.layer_decay == 1 else (depth, decayed)
        group = groups.setdefault(
            key,
            {
                'params': [],
                'names': [],
                'lr': rate,
                'weight_decay': cfg.weight_decay if decayed else 0.0,
                'depth': depth,
            },
        )
        group['params'].append(parameter)
        group['names'].append(name)
    return list(groups.values())


def encoder_depths(names: list[str]) -> dict[str, int]:
    """Depth of each encoder parameter: 0 for the stem, then one more for each block, in the order of the
    forward pass.

    A block is what timm numbers inside a stage; what stands between two (a downsampling, a norm) goes with
    the next one, and a norm at the very end with the last.
    """
    pattern = re.compile(
        r'(?:(?:stages|layers|layer|blocks|block)[._]?\d+\.(?:blocks\.)?\d+|(?:stages|blocks|layers)[._]\d+)\b'
    )
    blocks: dict[str, int] = {}
    found: list[tuple[str, str | None]] = []
    for name in names:
        match = pattern.search(name)
        block = match.group() if match else None
        if (
            block is not None
            and re.search(r'downsample|patch_embed', name)
            and not re.search(r'\.blocks\.', name)
        ):
            block = None
        found.append((name, block))
        if block is not None:
            blocks.setdefault(block, len(blocks) + 1)
    depths: dict[str, int] = {}
    upcoming = len(blocks)
    for name, block in reversed(found):
        if block is not None:
            upcoming = blocks[block]
        depths[name] = upcoming
    first_block = next((i for i, (_, block) in enumerate(found) if block is not None), 0)
    for name, _ in found[:first_block]:
        depths[name] = 0
    return {name: depths[name] for name in names}


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


def print_groups(cfg: Config) -> None:
    """A line a group of parameter_groups: depth, peak learning rate, weight decay, parameters."""
    with shapes_device(cfg):
        groups = parameter_groups(SegModel(cfg, load_weights=False), cfg)
    print(f'{"depth":>5}{"lr":>12}{"decay":>9}{"tensors":>9}{"parameters":>13}  first')
    for group in sorted(groups, key=lambda group: (group['depth'], group['weight_decay'])):
        count = sum(p.numel() for p in group['params'])
        print(
            f'{group["depth"]:5}{group["lr"]:12.3e}{group["weight_decay"]:9.3g}{len(group["names"]):9}'
            f'{count:13,}  {group["names"][0]}'
        )


def main(argv: list[str] | None = None) -> None:
    parser = ArgumentParser(__doc__)
    parser.add_argument('--cfg', nargs='+', type=Path, metavar='YAML', help='by default all of configs/')
    parser.add_argument(
        '--set', nargs='+', action='extend', default=[], metavar='KEY=VALUE', help='changes of the config'
    )
    parser.add_argument('--groups', action='store_true', help='the parameter groups of each')
    parser.add_argument('--size', type=int, default=512, help='side of the photo for the GMACs')
    args = parser.parse_args(argv)
    if args.size <= 0 or args.size % 32:
        raise BadInput(f'--size: found {args.size}, expected a multiple of 32')
    paths = args.cfg or sorted((Path(__file__).parent / 'configs').glob('*.yaml'))
    cfgs = [load_config(path, args.set) for path in paths]
    if not args.groups:
        print_models(cfgs, args.size)
        return
    for cfg in cfgs:
        print_groups(cfg)


if __name__ == '__main__':
    run_script(main)
