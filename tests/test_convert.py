"""Checkpoints of mmsegmentation: small networks give equal logits (see tests/reference/make_networks.py)."""

import json
from pathlib import Path

import pytest
import timm
import torch

import train
from models import SegModel
from networks import encoders
from networks.mmseg import convert_mmseg, is_mmseg, reorder_patch_merging
from networks.pretrained import load_mmseg, read_groups
from utils.errors import BadInput

FOLDER = Path(__file__).parent / 'reference'
NETWORKS = sorted(path for path in FOLDER.glob('*.pt') if path.stem != 'mit_features')


def build(network: dict, tiny, monkeypatch) -> SegModel:
    """Build the model of a reference file, at its small sizes."""
    create = timm.create_model
    monkeypatch.setattr(
        encoders.timm, 'create_model', lambda name, **kwargs: create(name, **kwargs, **network['options'])
    )
    update = {'encoder': network['encoder'], 'head_channels': 16, **network['config']}
    if isinstance(update.get('features'), list):
        update['features'] = tuple(update['features'])
    return SegModel(tiny.model_copy(update=update)).eval()


def read(path: Path) -> dict:
    network = torch.load(path, weights_only=True)
    network['state_dict'] = {
        key: value.float() if value.is_floating_point() else value
        for key, value in network['state_dict'].items()
    }
    return network


def test_the_networks_are_found():
    assert len(NETWORKS) >= 7


@pytest.mark.parametrize('path', NETWORKS, ids=lambda path: path.stem)
def test_whole_network_gives_the_same_logits(path, tiny, monkeypatch):
    network = read(path)
    model = build(network, tiny, monkeypatch)
    assert is_mmseg(network['state_dict'])
    assert load_mmseg(model, network['state_dict'], network['encoder'], path) == []
    with torch.no_grad():
        logits = model(network['image'])[-1]
    difference = (logits - network['logits']).abs().max().item()
    print(f'{path.stem}: {difference:.1e} of {network["logits"].abs().max():.2f}')
    assert logits.shape == network['logits'].shape and difference < 1e-3
    assert network['logits'].std() > 0.01  # the comparison means something


def network_of(name: str) -> dict:
    return read(FOLDER / f'{name}.pt')


def test_mix_transformer_tensors_are_all_found(tiny, tmp_path):
    """Load tensors with mmsegmentation's names and shapes. smp has nothing smaller than mit_b0, whose weights
    are too large a file to keep; with those of make_networks.py the features were equal to 3e-5.
    """
    shapes = json.loads((FOLDER / 'mit_b0.json').read_text())
    state = {name: torch.full(shape, 0.5) for name, shape in shapes.items()}
    state['backbone.layers.0.1.0.attn.attn.in_proj_weight'][:32] = 1  # q; k and v follow
    torch.save({'state_dict': state}, tmp_path / 'w.pth')
    update = {'encoder': 'mit_b0', 'encoder_weights': str(tmp_path / 'w.pth'), 'head': 'smp-segformer'}
    model = SegModel(tiny.model_copy(update={**update, 'head_channels': 512}))
    attention = model.encoder.block1[0].attn
    assert (attention.q.weight == 1).all() and (attention.kv.weight == 0.5).all()


def test_training_starts_from_a_whole_checkpoint(tiny, tmp_path, monkeypatch, capsys):
    network = network_of('resnet_fcn')
    state = dict(network['state_dict'])
    for key in [key for key in state if '.conv_seg.' in key]:
        state[key] = torch.zeros(150, *state[key].shape[1:])
    torch.save({'meta': {}, 'state_dict': state}, tmp_path / 'w.pth')
    build(network, tiny, monkeypatch)  # patches timm to the small sizes
    update = {'encoder': network['encoder'], **network['config'], 'weights': tmp_path / 'w.pth', 'lr': 1e-12}
    cfg = tiny.model_copy(update={**update, 'warmup_iters': 0})
    train.main(cfg, 0)
    assert 'left out, for another number of classes: aux.0.classifier.conv.bias' in capsys.readouterr().out
    saved = torch.load(cfg.run_dir(0) / 'last.pt', weights_only=True)['model']
    assert torch.allclose(saved['encoder.model.conv1.weight'], state['backbone.conv1.weight'], atol=1e-6)


def test_patch_merging_order():
    """Channel 1 in row 0, column 1 has the index 4 * 1 + 1 in mmsegmentation, and 2 * C + 1 in timm."""
    mmseg = torch.arange(12.0)[None]  # C = 3
    assert reorder_patch_merging(mmseg)[0, 2 * 3 + 1] == 4 * 1 + 1


def test_class_layers_of_another_size_are_left_out_by_name(tiny, monkeypatch):
    network = network_of('twins_upernet')
    state = dict(network['state_dict'])
    for key in [key for key in state if '.conv_seg.' in key]:
        state[key] = torch.zeros(150, *state[key].shape[1:])
    model = build(network, tiny, monkeypatch)
    before = model.head.classifier.conv.weight.clone()
    assert load_mmseg(model, state, network['encoder'], Path('w.pth')) == [
        'aux.0.classifier.conv.bias',
        'aux.0.classifier.conv.weight',
        'head.classifier.conv.bias',
        'head.classifier.conv.weight',
    ]
    assert torch.equal(model.head.classifier.conv.weight, before)
    assert torch.equal(model.encoder.norms[0].weight, state['backbone.norm_list.0.weight'])


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda s: s.pop('backbone.conv1.weight'), 'encoder.conv1.weight is only in the model'),
        (lambda s: s.update({'backbone.extra': torch.zeros(1)}), 'encoder.extra is only in the file'),
        (
            lambda s: s.update({'backbone.conv1.weight': torch.zeros(8, 3, 3, 3)}),
            r'encoder.conv1.weight is \(8, 3, 3, 3\) in the file',
        ),
    ],
)
def test_tensors_that_do_not_fit_are_listed(change, message, tiny, monkeypatch):
    network = network_of('resnet_fcn')
    change(network['state_dict'])
    with pytest.raises(BadInput, match=f'w.pth: 1 tensors do not fit: {message}'):
        load_mmseg(
            build(network, tiny, monkeypatch), network['state_dict'], network['encoder'], Path('w.pth')
        )


def test_encoder_of_an_unknown_family_is_refused():
    with pytest.raises(BadInput, match='can be read for encoders that begin with convnext'):
        convert_mmseg({'backbone.x': torch.zeros(1)}, 'tf_efficientnet_lite0')


def test_encoder_weights_take_a_wrapped_checkpoint(tiny, tmp_path, monkeypatch):
    network = network_of('convnext_knet')
    path = tmp_path / 'w.pth'
    torch.save({'meta': {'CLASSES': ['a']}, 'state_dict': network['state_dict']}, path)
    network['config'] = {**network['config'], 'encoder_weights': str(path)}
    model = build(network, tiny, monkeypatch)
    expected = network['state_dict']['backbone.stages.0.0.depthwise_conv.weight']
    assert torch.equal(model.encoder.model.stages_0.blocks[0].conv_dw.weight, expected)


def test_file_without_a_state_dict_is_refused(tmp_path):
    torch.save({'model': 'none'}, tmp_path / 'w.pth')
    with pytest.raises(BadInput, match='something other than tensors'):
        read_groups(tmp_path / 'w.pth')
