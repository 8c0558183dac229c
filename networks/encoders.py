"""Encoders: timm's and smp's networks without their classifiers, as lists of features.

    encoder = TimmEncoder('convnext_xlarge.fb_in22k', drop_path=0.4, image_size=512)
    feats = encoder(images)     # strides 4, 8, 16, 32, finest first; of a plain ViT four of stride 16

Shapes: N batch, H W input, C_i channels of the feature of stride s_i.
"""

from collections.abc import Callable

import segmentation_models_pytorch as smp
import timm
import torch
from torch import Tensor, nn

from utils.errors import BadInput, one_line

STRIDES = [4, 8, 16, 32]
PLAIN_VITS = ('vit_', 'deit', 'beit', 'eva')  # timm's families of one stride, 16 or 14


class TwinsEncoder(nn.Module):
    """timm's Twins with a LayerNorm after each stage, whose output both the head and the next stage read, as
    its authors have it for segmentation (arXiv:2104.13840); timm's own ends in one alone. Where a map is no
    multiple of the window, timm pads it with zeros, and mmsegmentation masks the padding too.
    """

    fixed_size, is_plain = None, False

    def __init__(self, name: str, drop_path: float) -> None:
        super().__init__()
        build_options(name, 224)  # which says where timm has none of that name
        self.model = timm.create_model(name, num_classes=0, drop_path_rate=drop_path)
        self.channels = list(self.model.embed_dims)
        self.model.norm = nn.Identity()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for width in self.channels)

    def forward(self, images: Tensor) -> list[Tensor]:
        """(N, 3, H, W) normalised → (N, C_i, H / s_i, W / s_i)."""
        x, feats, twins = images, [], self.model
        for embed, blocks, position, norm in zip(
            twins.patch_embeds, twins.blocks, twins.pos_block, self.norms, strict=True
        ):
            x, size = embed(x)
            for number, block in enumerate(blocks):
                x = block(x, size)
                if number == 0:
                    x = position(x, size)
            x = norm(x).unflatten(1, size).permute(0, 3, 1, 2).contiguous()
            feats.append(x)
        return feats


class TimmEncoder(nn.Module):
    """timm's features of strides 4, 8, 16 and 32 (none above output_stride), or those of four blocks of a
    plain ViT; channels first, finest first.

    fixed_size: the one input size it takes, image_size; None where it takes any multiple of 32.
    Raises BadInput where timm has no such model, or it has other strides.
    """

    def __init__(
        self,
        name: str,
        drop_path: float,
        image_size: int,
        output_stride: int = 32,
        blocks: tuple[int, ...] | None = None,
    ) -> None:
        super().__init__()
        self.is_plain = name.startswith(PLAIN_VITS)
        if blocks is not None and not self.is_plain:
            raise BadInput(f"config key 'features': {name} is no plain ViT; its features are its stages'")
        options = build_options(name, image_size)
        if drop_path:
            options['drop_path_rate'] = drop_path
        if output_stride != 32:
            options['output_stride'] = output_stride
        if name.startswith('hrnet'):
            options['feature_location'] = ''  # the branches, not what the classifier makes of them
        try:
            if self.is_plain:
                options['out_indices'] = block_indices(name, blocks)
            self.model = timm.create_model(name, features_only=True, **options)
        except (TypeError, RuntimeError, AttributeError, AssertionError, NotImplementedError) as error:
            raise BadInput(
                f"config key 'encoder': {name} cannot be built as an encoder: {one_line(error)}"
            ) from None
        for module in self.modules():  # HRNet's branches meet bilinearly in segmentation (arXiv:1908.07919)
            if name.startswith('hrnet') and isinstance(module, nn.Upsample):
                module.mode, module.align_corners = 'bilinear', False
        self.fixed_size = image_size if 'img_size' in options and name.startswith('beit') else None
        self.keep = kept_features(name, self.model.feature_info.reduction(), output_stride, self.is_plain)
        self.channels = [self.model.feature_info.channels()[i] for i in self.keep]
        self.channels_first = str(getattr(self.model, 'output_fmt', 'NCHW')).endswith('NCHW')

    def forward(self, images: Tensor) -> list[Tensor]:
        """(N, 3, H, W) normalised → (N, C_i, H / s_i, W / s_i)."""
        feats = self.model(images)
        feats = [feats[i] for i in self.keep]
        if self.channels_first:
            return feats
        return [feat.permute(0, 3, 1, 2).contiguous() for feat in feats]  # NHWC → NCHW


def timm_cfg(name: str):
    """timm's record of a model's published weights; None where it has no such model or tag."""
    if not timm.is_model(name):
        return None
    try:
        return timm.models.get_pretrained_cfg(name)
    except RuntimeError:  # timm has the model, but no such tag of weights
        return None


def build_options(name: str, image_size: int) -> dict:
    """What timm.create_model needs beside the name, so that a model takes photos of image_size (and, where
    it can, of other sizes). Raises BadInput where timm has no such model.
    """
    pretrained_cfg = timm_cfg(name)
    if pretrained_cfg is None:
        near = timm.list_models(f'*{name.split(".")[0][:8]}*')[:3]
        raise BadInput(
            f"config key 'encoder': timm has no {name!r}" + (f'; near it: {", ".join(near)}' if near else '')
        )
    if name.startswith(PLAIN_VITS) and not name.startswith('beit'):
        return {'img_size': image_size, 'dynamic_img_size': True}
    if name.startswith('swin'):
        return {'img_size': image_size, 'strict_img_size': False}
    return {'img_size': image_size} if pretrained_cfg.fixed_input_size else {}


def block_indices(name: str, blocks: tuple[int, ...] | None) -> list[int]:
    """Places, from 0, of a plain ViT's blocks, given from 1; by default the last of each quarter."""
    with torch.device('meta'):
        depth = len(timm.create_model(name).blocks)
    if blocks is None:
        return [depth * quarter // 4 - 1 for quarter in (1, 2, 3, 4)]
    if list(blocks) != sorted(set(blocks)) or blocks[-1] > depth:
        raise BadInput(f"config key 'features': found {list(blocks)}, expected ascending, 1 to {depth}")
    return [block - 1 for block in blocks]


def kept_features(name: str, strides: list[int], output_stride: int, is_plain: bool) -> list[int]:
    """Which of a model's features are used: the last of each stride. Raises BadInput where one lacks."""
    wanted = [16] * 4 if is_plain else [min(stride, output_stride) for stride in STRIDES]
    if strides[-4:] == wanted:
        return list(range(len(strides) - 4, len(strides)))
    if wanted == STRIDES and set(STRIDES) <= set(strides):
        return [len(strides) - 1 - strides[::-1].index(stride) for stride in STRIDES]
    raise BadInput(f"config key 'encoder': {name} has the strides {strides}, expected {wanted} among them")


OWN_ENCODERS: dict[str, Callable[[str, float], nn.Module]] = {'twins': TwinsEncoder}  # by how a name starts


def find_custom_encoder(name: str) -> Callable[[str, float], nn.Module] | None:
    """The class of OWN_ENCODERS that builds it, from its name and drop_path; None where TimmEncoder does."""
    return next((build for start, build in OWN_ENCODERS.items() if name.startswith(start)), None)


def is_smp_encoder(name: str) -> bool:
    """Whether smp has an encoder that timm has not, such as mit_b5."""
    return timm_cfg(name) is None and name in smp.encoders.encoders


def smp_encoder_name(name: str) -> str:
    """timm's encoder under smp's prefix; smp's own name where timm has no such encoder."""
    return f'tu-{name}' if timm_cfg(name) else name


def checkpoint_gradients(encoder: nn.Module, name: str) -> None:
    """Makes an encoder recompute its activations in the backward pass. Raises BadInput where it cannot."""
    inner = getattr(encoder, 'model', encoder)
    inner = getattr(inner, 'model', inner)
    try:
        inner.set_grad_checkpointing(True)
    except (AttributeError, AssertionError):
        raise BadInput(f"config key 'grad_checkpointing': the encoder {name} cannot do it") from None
