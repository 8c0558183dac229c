"""Reference tensors of mmsegmentation's decode heads, which tests/test_reference.py compares ours with.

Runs mmsegmentation itself; make_networks.py, beside it, says how to install that apart.

    python tests/reference/make_heads.py OUT [--seed 0] [--width 8] [--size 16]
    REFERENCE_DIR=OUT python -m pytest tests/test_reference.py

One file a head, OUT/<name>.pt, read with torch.load(weights_only=True): `config` (mmsegmentation's, as JSON),
`state_dict` (its names), `inputs` (the features, stride 4 first, all at stride 16 for SETR), `target`
(N, 4 * size, 4 * size) uint8 with ignored rows, `eval_logits`, `train_logits` (a list, with dropout off), and
`loss`, the head's own in training.
"""

import argparse
import copy
import json
from pathlib import Path

import make_networks as networks
import torch
from make_networks import MODELS, auxiliary, head, register_all_modules, upernet
from mmengine.structures import PixelData
from mmseg.structures import SegDataSample
from torch import nn

CLASSES = 11
IGNORED_ROWS = 5


def cross_entropy(weight: float = 1.0) -> dict:
    """Averaged over the pixels that are not ignored."""
    return {'type': 'CrossEntropyLoss', 'loss_weight': weight, 'avg_non_ignore': True}


def knet(widths: list[int], activation: str) -> dict:
    """K-Net of three stages, as wide as its UPerNet, half as wide within its kernels."""
    config = networks.knet(widths, widths[2])
    stage = config['kernel_update_head'][0]
    stage['ffn_act_cfg'] = stage['kernel_updator_cfg']['act_cfg'] = {'type': activation}
    config['num_stages'] = 3
    config['kernel_update_head'] = [copy.deepcopy(stage) for _ in range(3)]
    config['kernel_generate_head'] |= {'dropout_ratio': 0.1, 'loss_decode': cross_entropy()}
    return config


def joined(kind: str, widths: list[int], **options) -> dict:
    """A head that reads all features, resized to the finest."""
    where = {'in_channels': widths, 'in_index': [0, 1, 2, 3], 'input_transform': 'resize_concat'}
    return head(kind, **where, dropout_ratio=-1, **options)


def configs(width: int) -> dict[str, list[dict]]:
    """By name: a head, or OCR's two, one after the other."""
    widths = [width * 2**i for i in range(4)]
    total = sum(widths)
    loss, aux_loss = {'loss_decode': cross_entropy()}, {'loss_decode': cross_entropy(0.4)}
    single = {'num_convs': 1, 'kernel_size': 1}
    coarse = {'channels': total, 'concat_input': False, **single}
    setr = {'in_channels': widths[2], 'in_index': 3, 'channels': widths[1], 'up_scale': 4, 'dropout_ratio': 0}
    return {
        'uper': [upernet(widths, widths[2]) | {'dropout_ratio': 0.1} | loss],
        'knet_relu': [knet(widths, 'ReLU')],
        'knet_gelu': [knet(widths, 'GELU')],
        'fcn_aux': [auxiliary(widths[2], widths[1]) | {'dropout_ratio': 0.1} | aux_loss],
        'fcn_hrnet': [joined('FCNHead', widths, **coarse) | loss],
        'setr_naive': [head('SETRUPHead', **setr, **single) | loss],
        'ocr': [
            joined('FCNHead', widths, **coarse) | aux_loss,
            joined('OCRHead', widths, channels=widths[3], ocr_channels=widths[2]) | loss,
        ],
    }


def randomise(model: nn.Module, generator: torch.Generator) -> None:
    """Weights of the size that initialisation gives; norms and their statistics away from their defaults."""
    for name, tensor in model.state_dict().items():
        if not tensor.is_floating_point():
            continue
        noise = torch.randn(tensor.shape, generator=generator)
        if name.endswith('running_var'):
            tensor.copy_(0.5 + noise.abs())
        elif tensor.ndim <= 1:
            tensor.copy_(0.5 + 0.1 * noise)
        else:
            tensor.copy_(noise * tensor[0].numel() ** -0.5)


def run(parts: nn.ModuleList, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    """The outputs of a head, or of OCR's two; K-Net gives several by itself while it trains."""
    outputs: list[torch.Tensor] = []
    for part in parts:
        given = part(inputs, outputs[-1]) if outputs else part(inputs)
        outputs += given if isinstance(given, (list, tuple)) else [given]
    return outputs


def own_loss(parts: nn.ModuleList, inputs: list[torch.Tensor], target: torch.Tensor) -> float:
    samples = []
    for mask in target:
        sample = SegDataSample()
        sample.gt_sem_seg = PixelData(data=mask[None].long())
        samples.append(sample)
    total, coarse = 0.0, None
    for part in parts:
        outputs = part(inputs) if coarse is None else part(inputs, coarse)
        total += sum(float(v) for k, v in part.loss_by_feat(outputs, samples).items() if 'loss' in k)
        coarse = outputs
    return total


@torch.no_grad()
def reference(name: str, config: list[dict], width: int, size: int, generator: torch.Generator) -> dict:
    shapes = [(width * 2**i, size // 2**i) for i in range(4)]
    if name == 'setr_naive':
        shapes = [(4 * width, size // 4)] * 4
    inputs = [torch.randn(2, c, side, side, generator=generator) for c, side in shapes]
    target = torch.randint(0, CLASSES, (2, 4 * size, 4 * size), generator=generator)
    target[:, :IGNORED_ROWS] = 255
    parts = nn.ModuleList(MODELS.build(copy.deepcopy(part)) for part in config)
    randomise(parts, generator)
    if name == 'ocr':
        parts_state = {
            f'{part}.{k}': v for part, m in zip(('fcn', 'ocr'), parts) for k, v in m.state_dict().items()
        }
    else:
        parts_state = parts[0].state_dict()
    state = {key: value.clone() for key, value in parts_state.items()}
    for module in parts.modules():
        if isinstance(module, nn.Dropout | nn.Dropout2d):
            module.p = 0.0
    eval_logits = run(parts.eval(), inputs)[-1].clone()
    before = copy.deepcopy(parts.state_dict())
    train_logits = [output.clone() for output in run(parts.train(), inputs)]
    parts.load_state_dict(before)  # training moved the running statistics
    loss = own_loss(parts, inputs, target)
    return {
        'config': json.dumps(config if name == 'ocr' else config[0]),
        'state_dict': state,
        'inputs': inputs,
        'target': target.to(torch.uint8),
        'eval_logits': eval_logits,
        'train_logits': train_logits,
        'loss': loss,
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument('out', type=Path)
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--width', type=int, default=8, help='channels of the first feature, a multiple of 8')
    parser.add_argument('--size', type=int, default=16, help='side of the finest feature, a multiple of 8')
    args = parser.parse_args()
    register_all_modules()
    args.out.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(args.seed)
    for name, config in configs(args.width).items():
        made = reference(name, config, args.width, args.size, generator)
        torch.save(made, args.out / f'{name}.pt')
        print(f'{name}: logits {tuple(made["eval_logits"].shape)}, loss {made["loss"]:.5f}')


if __name__ == '__main__':
    main()
