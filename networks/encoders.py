"""Encoders: networks of timm and smp without their classifiers; images in, a list of features out.

Shapes: N batch, H W input, B its bands (3 if it is RGB), C_i channels of the feature of stride s_i.
"""

import re
from collections.abc import Callable

import segmentation_models_pytorch as smp
import timm
import torch
from timm.layers import DropPath
from torch import Tensor, nn

from utils.errors import BadInput, one_line, plural

STRIDES = [4, 8, 16, 32]
PLAIN_VITS = ('vit_', 'deit', 'beit', 'eva')  # timm's families with one stride, 16 or 14


class TwinsEncoder(nn.Module):
    """timm's Twins with a LayerNorm after each stage, which the head and the next stage read, as its authors
    have it for segmentation (arXiv:2104.13840), with their epsilon; mmsegmentation has 1e-5 in all norms.
    timm pads a map to a multiple of the window with zeros; mmsegmentation masks the padding, too.
    """

    fixed_size, is_plain = None, False

    def __init__(self, name: str, drop_path: float) -> None:
        super().__init__()
        build_options(name, 224)  # raises BadInput if timm does not have it
        self.model = timm.create_model(name, num_classes=0, drop_path_rate=drop_path)
        self.channels = list(self.model.embed_dims)
        self.model.norm = nn.Identity()
        self.norms = nn.ModuleList(nn.LayerNorm(width, eps=1e-6) for width in self.channels)

    def forward(self, images: Tensor) -> list[Tensor]:
        """Turn normalised images (N, B, H, W) into features (N, C_i, H / s_i, W / s_i)."""
        x, feats, twins = images, [], self.model
        for embed, blocks, position, norm in zip(
            twins.patch_embeds, twins.blocks, twins.pos_block, self.norms, strict=True
        ):
            x, size = embed(x)
            for number, block in enumerate(blocks):
                x = block(x, size)
                if number == 0:
                    x = position(x, size)
            x = norm(x).unflatten(1, size).permute(0, 3, 1, 2)  # NHWC in memory
            x = x if x.is_cuda else x.contiguous()  # a CPU's sums depend on the layout
            feats.append(x)
        return feats


class TimmEncoder(nn.Module):
    """A network of timm that gives features of strides 4, 8, 16 and 32 (none above output_stride), or those
    of four blocks of a plain ViT. Raises BadInput if timm lacks the model, or it has other strides.

    fixed_size: the one input size that it takes, or None if it takes any multiple of 32.
    """

    def __init__(
        self,
        name: str,
        drop_path: float,
        image_size: int,
        output_stride: int = 32,
        blocks: tuple | None = None,
        bands: int = 3,
    ) -> None:
        super().__init__()
        self.is_plain = name.startswith(PLAIN_VITS)
        if blocks is not None and not self.is_plain:
            raise BadInput(f"config key 'features': {name} is no plain ViT; remove the key")
        options = build_options(name, image_size)
        if drop_path:
            options['drop_path_rate'] = drop_path
        if output_stride != 32:
            options['output_stride'] = output_stride
        if bands != 3:
            options['in_chans'] = bands
        if name.startswith('hrnet'):
            options['feature_location'] = ''  # the branches, before the classifier's own layers
        try:
            if self.is_plain:
                options['out_indices'] = block_indices(name, blocks)
            self.model = timm.create_model(name, features_only=True, **options)
            if not drop_path:
                set_drop_path(self.model, name, 0)
        except (TypeError, RuntimeError, AttributeError, AssertionError) as error:
            message = f"config key 'encoder': {name} cannot be built as an encoder: {one_line(error)}"
            raise BadInput(message) from None
        for module in self.modules():  # HRNet's branches meet bilinearly in segmentation (arXiv:1908.07919)
            if name.startswith('hrnet') and isinstance(module, nn.Upsample):
                module.mode, module.align_corners = 'bilinear', False
        self.fixed_size = image_size if 'img_size' in options and name.startswith('beit') else None
        info = self.model.feature_info
        self.indices = feature_indices(name, info.reduction(), output_stride, self.is_plain)
        self.channels = [info.channels()[i] for i in self.indices]
        self.channels_first = str(getattr(self.model, 'output_fmt', 'NCHW')).endswith('NCHW')

    def forward(self, images: Tensor) -> list[Tensor]:
        """Turn normalised images (N, B, H, W) into features (N, C_i, H / s_i, W / s_i)."""
        feats = self.model(images)
        feats = [feats[i] for i in self.indices]
        if self.channels_first:
            return feats
        return [feat.permute(0, 3, 1, 2) for feat in feats]  # NHWC in memory


def timm_cfg(name: str):
    """Return timm's record of a model's published weights; None if timm lacks the model or the tag."""
    try:
        return timm.models.get_pretrained_cfg(name) if timm.is_model(name) else None
    except RuntimeError:  # timm has the model, but no such tag of weights
        return None


def build_options(name: str, image_size: int) -> dict:
    """Return timm.create_model's options for image_size and, if it can, other sizes. Raises BadInput."""
    pretrained_cfg = timm_cfg(name)
    if pretrained_cfg is None:
        similar = ', '.join(timm.list_models(f'*{name.split(".")[0][:8]}*')[:3])
        hint = f'; similar names: {similar}' if similar else ''
        raise BadInput(f"config key 'encoder': timm has no {name!r}{hint}")
    if name.startswith(PLAIN_VITS) and not name.startswith('beit'):
        return {'img_size': image_size, 'dynamic_img_size': True}
    if name.startswith('swin'):
        return {'img_size': image_size, 'strict_img_size': False}
    return {'img_size': image_size} if pretrained_cfg.fixed_input_size else {}


def block_indices(name: str, blocks: tuple[int, ...] | None) -> list[int]:
    """Turn block numbers of a plain ViT, from 1, into indices; by default the last block of each quarter."""
    with torch.device('meta'):
        depth = len(timm.create_model(name).blocks)
    if blocks is None:
        return [depth * quarter // 4 - 1 for quarter in (1, 2, 3, 4)]
    if list(blocks) != sorted(set(blocks)) or blocks[-1] > depth:
        raise BadInput(f"config key 'features': found {list(blocks)}, expected ascending, 1 to {depth}")
    return [block - 1 for block in blocks]


def feature_indices(name: str, strides: list[int], output_stride: int, is_plain: bool) -> list[int]:
    """Choose the features to use: the last one of each stride. Raises BadInput if a stride is missing."""
    expected = [16] * 4 if is_plain else [min(stride, output_stride) for stride in STRIDES]
    if strides[-4:] == expected:
        return list(range(len(strides) - 4, len(strides)))
    if expected == STRIDES and set(STRIDES) <= set(strides):
        return [len(strides) - 1 - strides[::-1].index(stride) for stride in STRIDES]
    raise BadInput(f"config key 'encoder': {name} has the strides {strides}, expected {expected} among them")


# encoders with a class of their own, by the start of their names
CUSTOM_ENCODERS: dict[str, Callable[[str, float], nn.Module]] = {'twins': TwinsEncoder}


def find_custom_encoder(name: str) -> Callable[[str, float], nn.Module] | None:
    """Return the class of CUSTOM_ENCODERS that builds an encoder from its name and drop_path, or None."""
    return next((build for start, build in CUSTOM_ENCODERS.items() if name.startswith(start)), None)


# what belongs to a stage, or to a block of a plain ViT, by its number
STAGE = re.compile(
    r'(?<![A-Za-z_])(?:stages?|layers?|blocks?|patch_embeds?|pos_block|transition|norms?)[._]?(\d+)'
)


def freeze_stages(encoder: nn.Module, count: int) -> list[nn.Module]:
    """Freeze the weights of the first stages of an encoder and of its stem; return the modules in which
    nothing learns, to be kept in evaluation mode. Raises BadInput if that leaves no stage to train.
    """
    if not count:
        return []
    parameters = dict(encoder.named_parameters())
    stages = {name: int(match[1]) if (match := STAGE.search(name)) else -1 for name in parameters}
    numbers = sorted({*stages.values()} - {-1})
    if count >= len(numbers):
        fault = f'found {count}, the encoder has {plural(len(numbers), "stage")}'
        raise BadInput(f"config key 'frozen_stages': {fault}; expected fewer, or freeze_encoder")
    first = list(stages.values()).index(numbers[0])  # all before it is the stem
    for place, (name, stage) in enumerate(stages.items()):
        if place < first or -1 < stage < numbers[count]:
            parameters[name].requires_grad_(False)
    return [module for module in encoder.modules() if is_frozen(module)]


def is_frozen(module: nn.Module) -> bool:
    """Tell whether a module has parameters, and none of them learns."""
    learns = [parameter.requires_grad for parameter in module.parameters()]
    return bool(learns) and not any(learns)


def set_bands(encoder: nn.Module, bands: int) -> None:
    """Give the first convolution of an encoder for RGB so many input channels, with new random weights."""
    convs = (module for module in encoder.modules() if isinstance(module, nn.Conv2d))
    first = next((conv for conv in convs if conv.in_channels == 3 and conv.groups == 1), None)
    if first is None:
        raise BadInput(f"config key 'encoder': found no convolution of RGB to give {bands} bands")
    first.in_channels = bands
    first.weight = nn.Parameter(first.weight.new_empty((len(first.weight), bands, *first.kernel_size)))
    first.reset_parameters()


def set_drop_path(encoder: nn.Module, name: str, rate: float) -> None:
    """Scale the stochastic depth that an encoder has by default, which grows with each block, to the rate of
    its last block. Raises BadInput if it has none, unless the rate is 0.
    """
    if hasattr(encoder, '_drop_connect_rate'):  # of smp's efficientnet-b0 to b7
        encoder._drop_connect_rate = rate
        return
    paths = [module for module in encoder.modules() if isinstance(module, DropPath)]
    last = round(max((path.drop_prob for path in paths), default=0), 6)  # .1 may be that of float32
    if rate and not last:
        fault = f'found {rate}, but the encoder {name} has no stochastic depth'
        raise BadInput(f"config key 'drop_path': {fault}; remove the key")
    for path in paths:
        path.drop_prob *= rate / last if last else 0


def is_smp_encoder(name: str) -> bool:
    """Return whether smp has an encoder that timm lacks, such as mit_b5."""
    return timm_cfg(name) is None and name in smp.encoders.encoders


def checkpoint_gradients(encoder: nn.Module, name: str) -> None:
    """Let an encoder recompute its activations in the backward pass. Raises BadInput if it cannot."""
    inner = getattr(encoder, 'model', encoder)
    inner = getattr(inner, 'model', inner)
    try:
        inner.set_grad_checkpointing(True)
    except (AttributeError, AssertionError):
        message = f"config key 'grad_checkpointing': the encoder {name} cannot do it; remove the key"
        raise BadInput(message) from None
