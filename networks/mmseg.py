"""Checkpoints of mmsegmentation 1.x and mmpretrain 1.x under our names.

if is_mmseg(state_dict):
    state_dict = convert_mmseg(state_dict, 'convnext_xlarge.fb_in22k')     # encoder.*, neck.*, head.*
"""

import re

import torch
from torch import Tensor

from utils.errors import BadInput

HEAD_NAMES = (
    # the parts of a checkpoint; a decode head that is a list is OCR's cascade
    (r'^decode_head\.0\.', 'coarse.'),
    (r'^decode_head\.(1\.)?', ''),
    (r'^auxiliary_head\.(\d+)\.', r'aux.\1.'),
    (r'^auxiliary_head\.', 'aux.0.'),
    # everywhere
    (r'\bconv_seg\.', 'classifier.conv.'),
    (r'\.bn\.', '.norm.'),
    # FCN
    (r'\bconv_cat\.', 'fuse.'),
    # UPerNet
    (r'\bpsp_modules\.(\d+)\.1\.', r'pooling.branches.\1.'),
    (r'\blateral_convs\.', 'laterals.'),
    (r'\bfpn_convs\.', 'smooths.'),
    (r'\bfpn_bottleneck\.', 'fuse.'),
    # K-Net
    (r'^kernel_generate_head\.', 'upernet.'),
    (r'^kernel_update_head\.', 'stages.'),
    (r'\bfeat_transform\.conv\.', 'transform.'),
    (r'\.attention\.attn\.', '.attention.'),
    (r'\bffn\.layers\.0\.0\.', 'ffn.0.'),
    (r'\bffn\.layers\.1\.', 'ffn.2.'),
    (r'\bmask_fcs\.', 'to_mask_kernel.'),
    (r'\bfc_mask\.', 'to_mask_kernel.3.'),
    (r'\bkernel_update_conv\.', 'updater.'),
    (r'\bupdater\.dynamic_layer\.', 'updater.group_proj.'),
    (r'\bupdater\.input_layer\.', 'updater.kernel_proj.'),
    (r'\bupdater\.update_gate\.', 'updater.group_gate.0.'),
    (r'\bupdater\.norm_in\.', 'updater.group_gate.1.'),
    (r'\bupdater\.input_gate\.', 'updater.kernel_gate.0.'),
    (r'\bupdater\.input_norm_in\.', 'updater.kernel_gate.1.'),
    (r'\bupdater\.norm_out\.', 'updater.group_norm.'),
    (r'\bupdater\.input_norm_out\.', 'updater.kernel_norm.'),
    (r'\bupdater\.fc_layer\.', 'updater.out.0.'),
    (r'\bupdater\.fc_norm\.', 'updater.out.1.'),
    # OCR
    (r'\bobject_context_block\.(query|key|value|out)_project\.', r'\1.'),
    (r'\bobject_context_block\.bottleneck\.', 'fuse.'),
    # SETR
    (r'\bup_convs\.0\.0\.', 'conv.'),
)

MLP = ((r'\.ffn\.layers\.0\.0\.', '.mlp.fc1.'), (r'\.ffn\.layers\.1\.', '.mlp.fc2.'))
# of each family of encoders, by the start of its name: timm's names, or smp's
ENCODER_NAMES = {
    'convnext': (
        (r'^norm(\d)\.', r'neck.norms.\1.'),
        (r'^downsample_layers\.0\.', 'stem.'),
        (r'^downsample_layers\.(\d)\.', r'stages.\1.downsample.'),
        (r'^stages\.(\d)\.(\d+)\.', r'stages.\1.blocks.\2.'),
        (r'\.depthwise_conv\.', '.conv_dw.'),
        (r'\.pointwise_conv(\d)\.', r'.mlp.fc\1.'),
    ),
    'swin': (
        (r'^norm(\d)\.', r'neck.norms.\1.'),
        (r'^patch_embed\.projection\.', 'patch_embed.proj.'),
        (r'^stages\.(\d)\.downsample\.', lambda m: f'layers.{int(m[1]) + 1}.downsample.'),
        (r'^stages\.', 'layers.'),
        (r'\.attn\.w_msa\.', '.attn.'),
        *MLP,
    ),
    'twins': (
        (r'^norm_list\.', 'norms.'),
        (r'^patch_embeds\.(\d)\.projection\.', r'patch_embeds.\1.proj.'),
        (r'^position_encodings\.(\d)\.proj\.', r'pos_block.\1.proj.0.'),
        (r'^layers\.', 'blocks.'),
        *MLP,
    ),
    'hrnet': (),  # the names of its authors, as in timm
    'resnet': ((r'^stem\.7\.', 'bn1.'), (r'^stem\.', 'conv1.')),
    'mit': (
        (r'^layers\.(\d)\.0\.projection\.', lambda m: f'patch_embed{int(m[1]) + 1}.proj.'),
        (r'^layers\.(\d)\.0\.norm\.', lambda m: f'patch_embed{int(m[1]) + 1}.norm.'),
        (r'^layers\.(\d)\.1\.', lambda m: f'block{int(m[1]) + 1}.'),
        (r'^layers\.(\d)\.2\.', lambda m: f'norm{int(m[1]) + 1}.'),
        (r'\.ffn\.layers\.0\.', '.mlp.fc1.'),
        (r'\.ffn\.layers\.1\.', '.mlp.dwconv.dwconv.'),
        (r'\.ffn\.layers\.4\.', '.mlp.fc2.'),
    ),
    'beit': (
        (r'^patch_embed\.projection\.', 'patch_embed.proj.'),
        (r'^layers\.', 'blocks.'),
        (r'\.ln(\d)\.', r'.norm\1.'),
        *MLP,
    ),
    'vit': (
        (r'^patch_embed\.projection\.', 'patch_embed.proj.'),
        (r'^layers\.', 'blocks.'),
        (r'\.ln(\d)\.', r'.norm\1.'),
        *MLP,
    ),
}
NECK_NAMES = (
    (r'^neck\.upsample_4x\.', 'neck.up4.'),
    (r'^neck\.upsample_2x\.', 'neck.up2.'),
)
COMPUTED = re.compile(r'relative_position_index$|attn_mask$')  # tables that follow from the sizes


def is_mmseg(state_dict: dict[str, Tensor]) -> bool:
    """Whether these are the weights of a network of mmsegmentation or mmpretrain."""
    return any(name.startswith('backbone.') for name in state_dict)


def convert_mmseg(state_dict: dict[str, Tensor], encoder: str) -> dict[str, Tensor]:
    """The weights of a whole network under the names encoder.* (timm's, or smp's, within it), neck.* and
    head.*. A classifier of whole images is left out. Raises BadInput for an encoder of no known family.
    """
    family = next((family for family in ENCODER_NAMES if encoder.startswith(family)), None)
    if family is None:
        raise BadInput(
            f'{encoder}: checkpoints of mmsegmentation are read for the encoders {", ".join(ENCODER_NAMES)}'
        )
    state_dict = {name: v for name, v in state_dict.items() if not name.startswith('head.')}  # mmpretrain's
    backbone = {name: v for name, v in state_dict.items() if name.startswith('backbone.')}
    neck = {name: v for name, v in state_dict.items() if name.startswith('neck.')}
    return (
        convert_encoder(backbone, family)
        | {rename(name, NECK_NAMES): tensor for name, tensor in neck.items()}
        | {
            name if name.startswith('aux.') else f'head.{name}': tensor
            for name, tensor in convert_mmseg_head(state_dict).items()
        }
    )


def convert_encoder(state_dict: dict[str, Tensor], family: str) -> dict[str, Tensor]:
    """A backbone's tensors, as encoder.* and neck.*."""
    converted = {}
    if family == 'vit' and 'backbone.patch_embed.projection.bias' not in state_dict:
        width = len(state_dict['backbone.patch_embed.projection.weight'])
        state_dict = {**state_dict, 'backbone.patch_embed.projection.bias': torch.zeros(width)}
    for name, tensor in state_dict.items():
        name = rename(name.removeprefix('backbone.'), ENCODER_NAMES[family])
        if COMPUTED.search(name):
            continue
        if family == 'swin' and '.downsample.' in name:
            tensor = merged_neighbours(tensor)
        if family == 'mit' and re.search(r'\.mlp\.fc\d\.weight$', name):
            tensor = tensor.flatten(1)  # a 1x1 convolution there
        for part, value in split_attention(name, tensor, whole=family == 'vit'):
            converted[part if part.startswith('neck.') else f'encoder.{part}'] = value
    return converted


def merged_neighbours(tensor: Tensor) -> Tensor:
    """Swin's patch merging, (..., 4C): mmsegmentation numbers the four neighbours (c, row, column), timm
    (column, row, c).
    """
    return tensor.unflatten(-1, (-1, 2, 2)).transpose(-3, -1).flatten(-3)


def split_attention(name: str, tensor: Tensor, whole: bool) -> list[tuple[str, Tensor]]:
    """torch's MultiheadAttention as timm's: one qkv, or q and kv, and proj."""
    name = name.replace('.attn.attn.out_proj.', '.attn.proj.')
    found = re.fullmatch(r'(.*\.attn)\.attn\.in_proj_(weight|bias)', name)
    if not found:
        return [(name, tensor)]
    if whole:
        return [(f'{found[1]}.qkv.{found[2]}', tensor)]
    width = len(tensor) // 3
    return [(f'{found[1]}.q.{found[2]}', tensor[:width]), (f'{found[1]}.kv.{found[2]}', tensor[width:])]


def convert_mmseg_head(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of decode and auxiliary heads under the names of heads.py, of a whole checkpoint or of a
    decode head alone.
    """
    is_ocr = any('object_context_block.' in name for name in state_dict)
    names = (*HEAD_NAMES, (r'^bottleneck\.', 'pixels.') if is_ocr else (r'\bbottleneck\.', 'pooling.fuse.'))
    heads = {name: v for name, v in state_dict.items() if not name.startswith(('backbone.', 'neck.'))}
    converted = {rename(name, names): tensor for name, tensor in heads.items()}
    assert len(converted) == len(heads), 'two tensors got one name'
    return converted


def rename(name: str, patterns: tuple) -> str:
    """Every pattern in turn, as re.sub has it."""
    for pattern, replacement in patterns:
        name = re.sub(pattern, replacement, name)
    return name
