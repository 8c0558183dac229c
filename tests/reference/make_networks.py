"""Small networks of mmsegmentation, whole, with what they give: the proof that its checkpoints load here.

Runs mmsegmentation 1.2.2 itself, in an environment of its own (pip install --no-deps
mmengine==0.10.7 mmsegmentation==1.2.2 mmcv-lite==2.1.0 mmpretrain==1.2.0, then addict yapf termcolor
rich prettytable ftfy regex einops mat4py modelindex importlib_metadata):

    python tests/reference/make_networks.py tests/reference [--seed 0]

One file a network, read with torch.load(weights_only=True): `encoder` and `options` (timm's or smp's name and
sizes), `config` (keys of this project's config), `state_dict` (float16 values, mmsegmentation's names),
`image` (1, 3, 64, 64) and `logits` (1, 11, h, w) in evaluation.
"""

import argparse
import sys
import types
from pathlib import Path


class NoCompiledOps(types.ModuleType):
    """In place of mmcv's compiled operations: mmcv-lite has none, and these networks call none."""

    def __getattr__(self, name: str):
        if name.startswith('__'):
            raise AttributeError(name)
        return lambda *args, **kwargs: sys.exit(f'{name} is a compiled operation')


sys.modules['mmcv._ext'] = NoCompiledOps('mmcv._ext')

import mmpretrain.models  # noqa: E402, F401 - registers ConvNeXt
import torch  # noqa: E402
from mmseg.registry import MODELS  # noqa: E402
from mmseg.utils import register_all_modules  # noqa: E402

NORM = {'type': 'BN'}
WIDTHS = [8, 16, 32, 64]
SIDE = 64


def head(kind: str, **options) -> dict:
    loss = {'type': 'CrossEntropyLoss'}
    return {
        'type': kind,
        'num_classes': 11,
        'norm_cfg': NORM,
        'align_corners': False,
        'loss_decode': loss,
        **options,
    }


def upernet(widths: list[int], channels: int = 16) -> dict:
    return head(
        'UPerHead', in_channels=widths, in_index=[0, 1, 2, 3], pool_scales=(1, 2, 3, 6), channels=channels
    )


def auxiliary(width: int, channels: int = 8) -> dict:
    return head('FCNHead', in_channels=width, in_index=2, channels=channels, num_convs=1, concat_input=False)


def setr(index: int) -> dict:
    return head(
        'SETRUPHead',
        in_channels=32,
        in_index=index,
        channels=16,
        num_convs=1,
        kernel_size=1,
        up_scale=4,
        dropout_ratio=0,
    )


def knet(widths: list[int], channels: int = 16) -> dict:
    updater = {
        'type': 'KernelUpdator',
        'in_channels': channels // 2,
        'feat_channels': channels // 2,
        'out_channels': channels // 2,
        'act_cfg': {'type': 'GELU'},
        'norm_cfg': {'type': 'LN'},
    }
    stage = {
        'type': 'KernelUpdateHead',
        'num_classes': 11,
        'num_ffn_fcs': 2,
        'num_heads': 8,
        'num_mask_fcs': 1,
        'feedforward_channels': 4 * channels,
        'in_channels': channels,
        'out_channels': channels,
        'dropout': 0.0,
        'conv_kernel_size': 1,
        'ffn_act_cfg': {'type': 'GELU'},
        'with_ffn': True,
        'feat_transform_cfg': {'conv_cfg': {'type': 'Conv2d'}, 'act_cfg': None},
        'kernel_updator_cfg': updater,
    }
    return {
        'type': 'IterativeDecodeHead',
        'num_stages': 2,
        'kernel_update_head': [dict(stage) for _ in range(2)],
        'kernel_generate_head': upernet(widths, channels),
    }


def networks() -> dict[str, dict]:
    """By name: timm's encoder and its sizes, the project's config, mmsegmentation's model."""
    branches = [4, 8, 16, 32]
    basic = {'num_modules': 1, 'block': 'BASIC'}
    hrnet = {
        'stage1': {
            'num_modules': 1,
            'num_branches': 1,
            'block': 'BOTTLENECK',
            'num_blocks': (1,),
            'num_channels': (8,),
        },
        **{
            f'stage{n}': {
                **basic,
                'num_branches': n,
                'num_blocks': (1,) * n,
                'num_channels': tuple(branches[:n]),
            }
            for n in (2, 3, 4)
        },
    }
    return {
        'convnext_knet': {
            'encoder': 'convnext_tiny',
            'options': {'depths': [1, 1, 2, 1], 'dims': WIDTHS},
            'config': {'head': 'knet', 'head_channels': 16, 'aux_channels': 8, 'stages': 2},
            'model': {
                'backbone': {
                    'type': 'mmpretrain.ConvNeXt',
                    'arch': {'depths': [1, 1, 2, 1], 'channels': WIDTHS},
                    'out_indices': [0, 1, 2, 3],
                    'gap_before_final_norm': False,
                },
                'decode_head': knet(WIDTHS),
                'auxiliary_head': auxiliary(WIDTHS[2]),
            },
        },
        'swin_upernet': {
            'encoder': 'swin_tiny_patch4_window7_224',
            'options': {'embed_dim': 8, 'depths': [1, 2, 1, 1], 'num_heads': [1, 2, 2, 4], 'window_size': 2},
            'config': {'head': 'upernet', 'head_channels': 16, 'aux_channels': 8},
            'model': {
                'backbone': {
                    'type': 'SwinTransformer',
                    'embed_dims': 8,
                    'depths': [1, 2, 1, 1],
                    'num_heads': [1, 2, 2, 4],
                    'window_size': 2,
                    'pretrain_img_size': SIDE,
                },
                'decode_head': upernet(WIDTHS),
                'auxiliary_head': auxiliary(WIDTHS[2]),
            },
        },
        'beit_upernet': {
            'encoder': 'beit_base_patch16_224',
            'options': {'embed_dim': 32, 'depth': 4, 'num_heads': 2},
            'config': {'head': 'upernet', 'head_channels': 16, 'aux_channels': 8, 'features': [1, 2, 3, 4]},
            'model': {
                'backbone': {
                    'type': 'BEiT',
                    'img_size': (SIDE, SIDE),
                    'patch_size': 16,
                    'embed_dims': 32,
                    'num_layers': 4,
                    'num_heads': 2,
                    'mlp_ratio': 4,
                    'out_indices': (0, 1, 2, 3),
                    'qv_bias': True,
                    'init_values': 0.1,
                    'norm_cfg': {'type': 'LN', 'eps': 1e-6},
                },
                'neck': {
                    'type': 'Feature2Pyramid',
                    'embed_dim': 32,
                    'rescales': [4, 2, 1, 0.5],
                    'norm_cfg': NORM,
                },
                'decode_head': upernet([32] * 4),
                'auxiliary_head': auxiliary(32),
            },
        },
        'twins_upernet': {
            'encoder': 'twins_svt_small',
            'options': {
                'embed_dims': WIDTHS,
                'depths': [2, 2, 2, 2],
                'num_heads': [1, 2, 4, 8],
                'wss': [2] * 4,
            },
            'config': {'head': 'upernet', 'head_channels': 16, 'aux_channels': 8},
            'model': {
                'backbone': {
                    'type': 'SVT',
                    'embed_dims': WIDTHS,
                    'num_heads': [1, 2, 4, 8],
                    'mlp_ratios': [4, 4, 4, 4],
                    'depths': [2, 2, 2, 2],
                    # spelt so; divisors of the maps, since timm pads with zeros where this masks
                    'windiow_sizes': [2, 2, 2, 2],
                    'sr_ratios': [8, 4, 2, 1],
                    'norm_after_stage': True,
                    'out_indices': (0, 1, 2, 3),
                    'qkv_bias': True,
                },
                'decode_head': upernet(WIDTHS),
                'auxiliary_head': auxiliary(WIDTHS[2]),
            },
        },
        'hrnet_ocr': {
            'encoder': 'hrnet_w18_small',
            'options': {name: timm_stage(stage) for name, stage in hrnet.items()},
            'config': {'head': 'ocr', 'head_channels': 16, 'aux_channels': sum(branches)},
            'model': {
                'type': 'CascadeEncoderDecoder',
                'num_stages': 2,
                'backbone': {'type': 'HRNet', 'extra': hrnet, 'norm_cfg': NORM},
                'decode_head': [
                    head(
                        'FCNHead',
                        in_channels=branches,
                        in_index=(0, 1, 2, 3),
                        channels=sum(branches),
                        input_transform='resize_concat',
                        kernel_size=1,
                        num_convs=1,
                        concat_input=False,
                        dropout_ratio=-1,
                    ),
                    head(
                        'OCRHead',
                        in_channels=branches,
                        in_index=(0, 1, 2, 3),
                        channels=16,
                        ocr_channels=8,
                        input_transform='resize_concat',
                        dropout_ratio=-1,
                    ),
                ],
            },
        },
        'vit_setr': {
            'encoder': 'vit_tiny_patch16_224',
            'options': {'embed_dim': 32, 'depth': 4, 'num_heads': 2},
            'config': {
                'head': 'setr_naive',
                'head_channels': 16,
                'aux_channels': 16,
                'features': [1, 2, 3, 4],
                'neck': 'none',
            },
            'model': {
                'backbone': {
                    'type': 'VisionTransformer',
                    'img_size': (SIDE, SIDE),
                    'patch_size': 16,
                    'embed_dims': 32,
                    'num_layers': 4,
                    'num_heads': 2,
                    'out_indices': (0, 1, 2, 3),
                    'norm_cfg': {'type': 'LN', 'eps': 1e-6},
                },
                'decode_head': setr(3),
                'auxiliary_head': [setr(i) for i in range(3)],
            },
        },
        'mit_features': {  # without a head, since smp's differs: the four features themselves
            'encoder': 'mit_b0',
            'options': {},
            'config': {},
            'model': {
                'backbone': {
                    'type': 'MixVisionTransformer',
                    'embed_dims': 32,
                    'num_heads': [1, 2, 5, 8],
                    'num_layers': [2, 2, 2, 2],
                },
                'decode_head': auxiliary(160),
            },
        },
        'resnet_fcn': {
            'encoder': 'resnet18',
            'options': {'channels': [8, 16, 32, 64]},
            'config': {'head': 'fcn', 'head_channels': 16, 'aux_channels': 8},
            'model': {
                'backbone': {
                    'type': 'ResNet',
                    'depth': 18,
                    'norm_cfg': NORM,
                    'style': 'pytorch',
                    'base_channels': 8,
                    'stem_channels': 64,
                },
                'decode_head': head(
                    'FCNHead', in_channels=64, in_index=3, channels=16, num_convs=2, concat_input=True
                ),
                'auxiliary_head': auxiliary(32),
            },
        },
    }


def timm_stage(stage: dict) -> dict:
    """A stage of HRNet as timm's options have it."""
    options = {key: value for key, value in stage.items() if key != 'block'}
    return {**options, 'block_type': stage['block'], 'fuse_method': 'SUM'}


def randomise(model: torch.nn.Module, generator: torch.Generator) -> None:
    """Weights that float16 holds exactly; norms and statistics away from their defaults."""
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith('running_var') or (name.endswith('weight') and tensor.ndim == 1) or 'gamma' in name:
            value = 1 + 0.1 * noise.abs()
        elif tensor.ndim <= 1:
            value = 0.1 * noise
        else:
            value = noise * tensor[0].numel() ** -0.5
        tensor.copy_(value.half())


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('out', type=Path)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--only')
    args = parser.parse_args()
    register_all_modules()
    generator = torch.Generator().manual_seed(args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    for name, network in networks().items():
        if args.only and name != args.only:
            continue
        model = MODELS.build({'type': 'EncoderDecoder', **network.pop('model')}).eval()
        image = torch.randn(1, 3, SIDE, SIDE, generator=generator)
        with torch.no_grad():
            randomise(model, generator)
            logits = model(image, mode='tensor')
            feats = model.backbone(image) if name == 'mit_features' else []
        state = {k: v.half() if v.is_floating_point() else v for k, v in model.state_dict().items()}
        path = args.out / f'{name}.pt'
        torch.save({**network, 'state_dict': state, 'image': image, 'logits': logits, 'feats': feats}, path)
        print(f'{path}: {path.stat().st_size / 1e3:.0f} kB, logits {tuple(logits.shape)}')


if __name__ == '__main__':
    main()
