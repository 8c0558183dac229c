"""Rename the tensors of checkpoints of mmsegmentation 1.x and mmpretrain 1.x to ours."""

import re

import torch
from torch import Tensor

from utils.errors import BadInput

# each pattern and its replacement, for re.sub, in this order
HEAD_NAMES = (
    # the parts of a checkpoint; only OCR has a list of decode heads
    (r'^decode_head\.0\.', 'coarse.'),
    (r'^decode_head\.(1\.)?', ''),
    (r'^auxiliary_head\.(\d+)\.', r'aux.\1.'),
    (r'^auxiliary_head\.', 'aux.0.'),
    # all heads
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
VIT = (
    (r'^patch_embed\.projection\.', 'patch_embed.proj.'),
    (r'^layers\.', 'blocks.'),
    (r'\.ln(\d)\.', r'.norm\1.'),
    *MLP,
)
# the patterns of each family of encoders, by the start of its name; they give the names of timm, or of smp
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
    'hrnet': (),  # timm has the same names
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
    'beit': VIT,
    'vit': VIT,
}
NECK_NAMES = ((r'^neck\.upsample_4x\.', 'neck.up4.'), (r'^neck\.upsample_2x\.', 'neck.up2.'))
COMPUTED = re.compile(r'relative_position_index$|attn_mask$')  # tables that depend on the sizes alone


def is_mmseg(state_dict: dict[str, Tensor]) -> bool:
    """Return whether these are the weights of a network of mmsegmentation or mmpretrain."""
    return any(name.startswith('backbone.') for name in state_dict)


def known_family(encoder: str) -> str | None:
    """Return the family of ENCODER_NAMES that an encoder is of, if any."""
    return next((family for family in ENCODER_NAMES if encoder.startswith(family)), None)


def convert_mmseg(state_dict: dict[str, Tensor], encoder: str) -> dict[str, Tensor]:
    """Rename a whole network to encoder.* (with the names of timm or smp), neck.*, aux.* and head.*, and drop
    a classifier of whole images. Raises BadInput for an encoder of an unknown family.
    """
    family = known_family(encoder)
    if family is None:
        found, known = f"config key 'encoder': found {encoder}", ', '.join(ENCODER_NAMES)
        readable = f'checkpoints of mmsegmentation can be read for encoders that begin with {known}'
        raise BadInput(f'{found}; {readable}')
    # mmpretrain's classifier is called head
    state_dict = {name: v for name, v in state_dict.items() if not name.startswith('head.')}
    backbone = {name: v for name, v in state_dict.items() if name.startswith('backbone.')}
    neck = {rename(name, NECK_NAMES): v for name, v in state_dict.items() if name.startswith('neck.')}
    heads = convert_mmseg_head(state_dict)
    heads = {name if name.startswith('aux.') else f'head.{name}': v for name, v in heads.items()}
    return convert_encoder(backbone, family) | neck | heads


def convert_encoder(state_dict: dict[str, Tensor], family: str) -> dict[str, Tensor]:
    """Rename the tensors of a backbone to encoder.* and neck.*."""
    converted = {}
    bias, weight = (f'backbone.patch_embed.projection.{kind}' for kind in ('bias', 'weight'))
    if family == 'vit' and bias not in state_dict and weight in state_dict:
        state_dict = {**state_dict, bias: torch.zeros(len(state_dict[weight]))}
    for name, tensor in state_dict.items():
        name = rename(name.removeprefix('backbone.'), ENCODER_NAMES[family])
        if COMPUTED.search(name):
            continue
        if family == 'swin' and '.downsample.' in name:
            tensor = reorder_patch_merging(tensor)
        if family == 'mit' and re.search(r'\.mlp\.fc\d\.weight$', name):
            tensor = tensor.flatten(1)  # mmsegmentation has a 1x1 convolution
        for new_name, value in split_attention(name, tensor, joint_qkv=family == 'vit'):
            converted[new_name if new_name.startswith('neck.') else f'encoder.{new_name}'] = value
    return converted


def reorder_patch_merging(tensor: Tensor) -> Tensor:
    """Reorder the last axis (4C) of patch merging from (c, row, column) to timm's (column, row, c)."""
    return tensor.unflatten(-1, (-1, 2, 2)).transpose(-3, -1).flatten(-3)


def split_attention(name: str, tensor: Tensor, joint_qkv: bool) -> list[tuple[str, Tensor]]:
    """Rename a tensor of torch's MultiheadAttention to timm's qkv and proj, or to q, kv and proj."""
    name = name.replace('.attn.attn.out_proj.', '.attn.proj.')
    match = re.fullmatch(r'(.*\.attn)\.attn\.in_proj_(weight|bias)', name)
    if not match:
        return [(name, tensor)]
    prefix, kind = match.groups()
    if joint_qkv:
        return [(f'{prefix}.qkv.{kind}', tensor)]
    width = len(tensor) // 3
    return [(f'{prefix}.q.{kind}', tensor[:width]), (f'{prefix}.kv.{kind}', tensor[width:])]


def convert_mmseg_head(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the decode head, which may be alone, as in heads.py, and auxiliary heads to aux.0.* etc."""
    is_ocr = any('object_context_block.' in name for name in state_dict)
    bottleneck = (r'^bottleneck\.', 'pixels.') if is_ocr else (r'\bbottleneck\.', 'pooling.fuse.')
    heads = {name: v for name, v in state_dict.items() if not name.startswith(('backbone.', 'neck.'))}
    converted = {rename(name, (*HEAD_NAMES, bottleneck)): tensor for name, tensor in heads.items()}
    assert len(converted) == len(heads), 'two tensors got the same name'
    return converted


def rename(name: str, patterns: tuple) -> str:
    """Apply the patterns with re.sub, one after another."""
    for pattern, replacement in patterns:
        name = re.sub(pattern, replacement, name)
    return name
