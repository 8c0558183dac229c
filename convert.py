"""Published weights under our names.

head.load_state_dict(convert_mmseg_head(checkpoint['state_dict']))
"""

import re

from torch import Tensor

MMSEG_NAMES = (
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


def convert_mmseg_head(state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    """The weights of a head of mmsegmentation 1.x under the names of heads.py, for a strict load_state_dict.

    Takes the state_dict of a decode head, or of a whole checkpoint, whose `backbone.` is left out.
    """
    is_ocr = any('object_context_block.' in name for name in state_dict)
    names = (*MMSEG_NAMES, (r'^bottleneck\.', 'pixels.') if is_ocr else (r'\bbottleneck\.', 'pooling.fuse.'))
    converted = {}
    for name, tensor in state_dict.items():
        if name.startswith('backbone.'):
            continue
        for pattern, replacement in names:
            name = re.sub(pattern, replacement, name)
        converted[name] = tensor
    assert len(converted) == sum(not name.startswith('backbone.') for name in state_dict)
    return converted
