"""Heads: logits and losses equal those of mmsegmentation with the same weights."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from losses import segmentation_loss
from networks.heads import HEADS, Head
from networks.mmseg import convert_mmseg_head

NAMES = ('uper', 'knet_relu', 'knet_gelu', 'fcn_aux', 'fcn_hrnet', 'ocr', 'setr_naive')
TOLERANCE = 1e-4
RTOL = 1e-6  # at a width of 128 K-Net's logits reach 150, whose last bit in fp32 is 1.5e-5


def build(config: dict | list[dict], in_channels: list[int]) -> Head:
    """Build our head for a config of mmsegmentation."""
    if isinstance(config, list):
        coarse, main = config
        return HEADS['ocr'](
            in_channels,
            main['num_classes'],
            channels=main['channels'],
            ocr_channels=main['ocr_channels'],
            coarse_channels=coarse['channels'],
            coarse_weight=coarse['loss_decode']['loss_weight'],
        )
    if config['type'] == 'IterativeDecodeHead':
        uper, stage = config['kernel_generate_head'], config['kernel_update_head'][0]
        updater = stage['kernel_updator_cfg']
        assert stage['ffn_act_cfg'] == updater['act_cfg']
        return HEADS['knet'](
            in_channels,
            uper['num_classes'],
            channels=uper['channels'],
            stages=config['num_stages'],
            attention_heads=stage['num_heads'],
            ffn_ratio=stage['feedforward_channels'] // stage['in_channels'],
            split=stage['in_channels'] // updater['in_channels'],
            activation=stage['ffn_act_cfg']['type'].lower(),
        )
    if config['type'] == 'FCNHead' and config.get('input_transform') == 'resize_concat':
        options = {}
        name = 'fcn_hrnet'
    elif config['type'] == 'FCNHead':
        options = {key: config[key] for key in ('num_convs', 'concat_input')} | {'index': config['in_index']}
        name = 'fcn'
    elif config['type'] == 'SETRUPHead':
        options = {'index': config['in_index']}
        assert config['up_scale'] == 4
        name = 'setr_naive'
    elif config['type'] == 'UPerHead':
        options = {}
        name = 'upernet'
    else:
        raise ValueError(f'{config["type"]} has no head here')
    return HEADS[name](in_channels, config['num_classes'], channels=config['channels'], **options)


def loss_weight(config: dict | list[dict]) -> float:
    """Return the weight of a head's loss, which mmsegmentation keeps in the head, and we outside it."""
    return config['loss_decode']['loss_weight'] if 'loss_decode' in config else 1.0


def decode_head(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the tensors of a reference as in a published checkpoint."""
    cascade = {'fcn': 'decode_head.0', 'ocr': 'decode_head.1'}
    prefixes = {name: name.partition('.')[0] for name in state}
    if set(prefixes.values()) == set(cascade):
        return {cascade[prefix] + name[len(prefix) :]: state[name] for name, prefix in prefixes.items()}
    return {f'decode_head.{name}': tensor for name, tensor in state.items()}


def without_dropout(head: nn.Module) -> nn.Module:
    for module in head.modules():
        if isinstance(module, nn.Dropout | nn.Dropout2d):
            module.p = 0.0
    return head


def load(path: Path) -> tuple[dict, Head]:
    if not path.exists():
        pytest.skip(f'{path.name} is not among the reference tensors')
    reference = torch.load(path, weights_only=True)
    head = build(json.loads(reference['config']), [feat.shape[1] for feat in reference['inputs']])
    head.load_state_dict(convert_mmseg_head(decode_head(reference['state_dict'])))
    return reference, without_dropout(head)


@pytest.mark.parametrize('name', NAMES)
@torch.no_grad()
def test_equal_to_mmseg(reference_dir, name):
    reference, head = load(reference_dir / f'{name}.pt')
    close = {'rtol': RTOL, 'atol': TOLERANCE}

    head.eval()
    torch.testing.assert_close(head(reference['inputs'])[-1], reference['eval_logits'], **close)

    head.train()
    outputs = head(reference['inputs'])
    assert len(outputs) == len(reference['train_logits']) == len(head.loss_weights)
    for ours, theirs in zip(outputs, reference['train_logits'], strict=True):
        torch.testing.assert_close(ours, theirs, **close)

    loss = segmentation_loss(outputs, reference['target'], head.loss_weights)
    loss = loss * loss_weight(json.loads(reference['config']))
    assert loss.item() == pytest.approx(reference['loss'], abs=TOLERANCE)


def test_every_reference_is_compared(reference_dir):
    assert {path.stem for path in reference_dir.glob('*.pt')} <= set(NAMES)


@torch.no_grad()
def test_auxiliary_head_of_a_checkpoint(reference_dir):
    """Load the decode head and the auxiliary head of one checkpoint."""
    main, head = load(reference_dir / 'knet_gelu.pt')
    aux, aux_head = load(reference_dir / 'fcn_aux.pt')
    checkpoint = {'backbone.stem.weight': torch.zeros(1)} | decode_head(main['state_dict'])
    checkpoint |= {f'auxiliary_head.{name}': tensor for name, tensor in aux['state_dict'].items()}
    converted = convert_mmseg_head(checkpoint)
    aux_state = {name: tensor for name, tensor in converted.items() if name.startswith('aux.')}
    head.load_state_dict({name: tensor for name, tensor in converted.items() if name not in aux_state})
    aux_head.load_state_dict({name.removeprefix('aux.0.'): tensor for name, tensor in aux_state.items()})

    (logits,) = aux_head.train()(aux['inputs'])
    torch.testing.assert_close(logits, aux['train_logits'][0], rtol=RTOL, atol=TOLERANCE)
    outputs = head.train()(main['inputs'])
    loss = sum(segmentation_loss([logits], main['target'], [1.0]) for logits in outputs)
    assert loss.item() == pytest.approx(main['loss'], abs=TOLERANCE)
