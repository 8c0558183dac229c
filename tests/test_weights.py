"""Weights in files of other tools: an encoder is found under any prefix and wrapper, and loaded whole."""

import argparse
from functools import cache
from pathlib import Path

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from safetensors.torch import save_file
from small_networks import narrow
from torch import Tensor

import train
from models import SegModel
from networks.pretrained import timm_key
from utils.errors import BadInput

RESNET, VIT, TWINS = narrow('resnet18'), narrow('vit_tiny_patch16_224'), narrow('twins_svt_small')
ENCODERS = (RESNET, VIT, 'test_convnext.r160_in1k')
PREFIXES = (
    '', 'module.', 'model.', 'encoder.', 'backbone.', '_orig_mod.', 'net.', 'module.encoder.',
    'encoder.module.', '_orig_mod.module.', 'module._orig_mod.', 'model.encoder.model.', 'student.backbone.',
    'teacher.', 'net.image_encoder.trunk.', 'model.model.model.',
)  # fmt: skip
WRAPPERS = (
    'state_dict', 'state_dict_ema', 'model_state_dict', 'model', 'model_ema', 'net', 'ema',
    'model.state_dict', 'checkpoint.networks.encoder', 'teacher',
)  # fmt: skip


def whole_state(encoder: str, classes: int = 1000, seed: int = 0) -> dict[str, Tensor]:
    """Make the tensors of a whole network of timm, all of them random."""
    return dict(draw_state(encoder, classes, seed))


@cache
def draw_state(encoder: str, classes: int, seed: int) -> dict[str, Tensor]:
    torch.manual_seed(seed)
    state = timm.create_model(encoder, num_classes=classes).state_dict()
    return {k: torch.rand_like(v) if v.is_floating_point() else v + 3 for k, v in state.items()}


def add_prefix(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


def wrap(content: dict, wrapper: str) -> dict:
    for key in reversed(wrapper.split('.')):
        content = {'epoch': 3, key: content}
    return content


def load(tiny, path, content, encoder: str = RESNET, **changes) -> SegModel:
    """Write a file and build a model that names it as encoder_weights."""
    save_file(content, path) if path.suffix == '.safetensors' else torch.save(content, path)
    update = {'encoder': encoder, 'encoder_weights': str(path), **changes}
    if encoder.startswith('vit') and not changes:
        update |= {'image_size': 224, 'crop_size': 224}  # as in the file
    return SegModel(tiny.model_copy(update=update))


def check_loaded(model: SegModel, state: dict[str, Tensor], count: int | None = None) -> None:
    """Check that each tensor of the encoder equals the network's."""
    loaded = {timm_key(key): value for key, value in model.encoder.state_dict().items()}
    assert all(torch.equal(value, state[key]) for key, value in loaded.items())
    counted = sum(not key.endswith('num_batches_tracked') for key in loaded)
    assert f' {counted} tensors loaded' in model.encoder_report[0]
    assert count is None or counted == count


@pytest.mark.parametrize('encoder', ENCODERS)
@pytest.mark.parametrize('prefix', PREFIXES)
def test_prefixes(tiny, tmp_path, encoder, prefix):
    state = whole_state(encoder, classes=7)
    model = load(tiny, tmp_path / 'w.pth', add_prefix(state, prefix), encoder)
    check_loaded(model, state, 100 if encoder == RESNET else None)
    assert len(model.encoder_report) == 1  # no warning


@pytest.mark.parametrize('wrapper', WRAPPERS)
@pytest.mark.parametrize('name', ['w.pth', 'w.ckpt', 'w.pth.tar'])
def test_wrappers(tiny, tmp_path, wrapper, name):
    state = whole_state(RESNET)
    model = load(tiny, tmp_path / name, wrap(add_prefix(state, 'module.'), wrapper))
    check_loaded(model, state, 100)
    assert f'from {wrapper}: module.*' in model.encoder_report[0]


@pytest.mark.parametrize('classes', [0, 7, 1000, 21843])
@pytest.mark.parametrize('encoder', ENCODERS)
@pytest.mark.parametrize('name', ['w.pth', 'w.safetensors'])
def test_any_number_of_classes(tiny, tmp_path, classes, encoder, name):
    state = whole_state(encoder, classes)
    check_loaded(load(tiny, tmp_path / name, state, encoder), state)


@pytest.mark.parametrize('encoder', ENCODERS)
@pytest.mark.parametrize('prefix', ['', 'model.encoder.'])
def test_names_of_features_only(tiny, tmp_path, encoder, prefix):
    state = whole_state(encoder)
    inner = SegModel(tiny.model_copy(update={'encoder': encoder})).encoder.model.state_dict()
    content = {prefix + key: state[timm_key(key)] for key in inner}
    check_loaded(load(tiny, tmp_path / 'w.pth', content, encoder), state)


@pytest.mark.parametrize('smp_name', ['resnet18', 'tu-resnet18'])
@pytest.mark.parametrize('arch', ['unet', 'fpn', 'deeplabv3plus'])
def test_whole_model_of_smp(tiny, tmp_path, smp_name, arch):
    torch.manual_seed(0)
    content = smp.create_model(arch, smp_name, None, classes=7).state_dict()
    start = 'encoder.model.' if smp_name.startswith('tu-') else 'encoder.'
    state = {key.removeprefix(start): value for key, value in content.items() if key.startswith(start)}
    for name in ('w.pth', 'w.safetensors'):
        model = load(tiny, tmp_path / name, add_prefix(content, 'model.'), 'resnet18')
        check_loaded(model, state, 100)
        assert model.encoder_report[0].endswith('not used (left aside: decoder, segmentation_head)')
        assert len(model.encoder_report) == 1


def test_smp_encoder_from_a_whole_model_of_smp(tiny, tmp_path):
    content = smp.create_model('unet', 'mit_b0', None, classes=7).state_dict()
    options = {'head': 'smp-unet', 'head_channels': 512}
    model = load(
        tiny, tmp_path / 'w.ckpt', {'state_dict': add_prefix(content, 'model.')}, 'mit_b0', **options
    )
    check_loaded(model, {key.removeprefix('encoder.'): value for key, value in content.items()})


def test_checkpoint_of_lightning(tiny, tmp_path):
    state = whole_state(RESNET)
    content = {
        'epoch': 1, 'global_step': 10, 'pytorch-lightning_version': '2.1',
        'loops': {'fit_loop': {'state': {}}},
        'state_dict': add_prefix(state, 'model.encoder.') | {'loss.weight': torch.ones(7)},
        'callbacks': {'ModelCheckpoint{}': {'best_model_score': torch.tensor(0.5), 'best_model_path': 'a'}},
        'optimizer_states': [{'state': {0: {'exp_avg': torch.ones(3)}}, 'param_groups': [{'lr': 0.1}]}],
        'lr_schedulers': [], 'hparams_name': 'kwargs', 'hyper_parameters': {'lr': 0.1, 'arch': 'unet'},
    }  # fmt: skip
    model = load(tiny, tmp_path / 'w.ckpt', content)
    check_loaded(model, state, 100)
    assert model.encoder_report[1:] == [
        'warning: encoder_weights: 1 tensors do not belong to the encoder: loss.weight'
    ]


@pytest.mark.parametrize('encoder', ENCODERS)
def test_names_that_compiled_or_sharded_parts_have(tiny, tmp_path, encoder):
    state = whole_state(encoder)
    parts = ('layer1.', 'blocks.0.', 'stages.1.')
    content = {}
    for key, value in state.items():
        for part in parts:
            key = key.replace(part, f'{part}_orig_mod._checkpoint_wrapped_module.')
        content[f'module.{key}'] = value
    check_loaded(load(tiny, tmp_path / 'w.pth', content, encoder), state)


@pytest.mark.parametrize(
    ('averaged', 'other'),
    [
        ('state_dict_ema', 'state_dict'),
        ('model_ema', 'model'),
        ('ema', 'model'),
        ('teacher', 'student'),
    ],
)
@pytest.mark.parametrize('first', [True, False])
def test_averaged_weights_go_first(tiny, tmp_path, averaged, other, first):
    state, second = whole_state(RESNET), whole_state(RESNET, seed=1)
    content = {averaged: state, other: second} if first else {other: second, averaged: state}
    model = load(tiny, tmp_path / 'w.pth', content)
    check_loaded(model, state)
    assert f'from {averaged} (not {other})' in model.encoder_report[0]


def test_mmengine_exchanges_the_weights_before_it_saves_them(tiny, tmp_path):
    state = whole_state(RESNET)
    content = {'state_dict': state, 'ema_state_dict': add_prefix(whole_state(RESNET, seed=1), 'module.')}
    check_loaded(load(tiny, tmp_path / 'w.pth', content), state)


@pytest.mark.parametrize('first', ['student', 'ema_model'])
def test_averaged_prefix_goes_first(tiny, tmp_path, first):
    states = {'ema_model': whole_state(RESNET), 'student': whole_state(RESNET, seed=1)}
    content = {}
    for prefix in sorted(states, key=lambda prefix: prefix != first):
        content |= add_prefix(states[prefix], f'{prefix}.')
    model = load(tiny, tmp_path / 'w.pth', content)
    check_loaded(model, states['ema_model'])
    assert 'from ema_model.* (not student.*)' in model.encoder_report[0]
    assert len(model.encoder_report) == 1


def test_averaged_weights_without_statistics_are_passed_over(tiny, tmp_path):
    state = whole_state(RESNET)
    average = {key: value for key, value in state.items() if 'running' not in key}
    check_loaded(load(tiny, tmp_path / 'w.pth', {'ema': average, 'model': state}), state)


@pytest.mark.parametrize('name', ['exp_avg', 'optimizer.exp_avg', 'grads'])
def test_an_optimizer_that_stands_first_is_passed_over(tiny, tmp_path, name):
    """A plain ViT has no statistics that would tell its weights from their moments."""
    state = whole_state(VIT)
    content = wrap(whole_state(VIT, seed=1), name) | {'model': state}
    check_loaded(load(tiny, tmp_path / 'w.pth', content, VIT), state)


def test_a_network_in_a_tuple(tiny, tmp_path):
    state = whole_state(RESNET)
    check_loaded(load(tiny, tmp_path / 'w.pth', (state, 3)), state)


def test_counters_of_batch_norm_may_be_missing(tiny, tmp_path):
    state = whole_state(RESNET)
    content = {key: value for key, value in state.items() if not key.endswith('num_batches_tracked')}
    model = load(tiny, tmp_path / 'w.pth', content)
    assert torch.equal(model.encoder.model.bn1.running_var, state['bn1.running_var'])


@pytest.mark.parametrize('prefix', ['', 'backbone.', 'model.encoder.model.'])
@pytest.mark.parametrize('classes', [0, 7])
def test_tables_of_positions_are_resized(tiny, tmp_path, prefix, classes):
    state = whole_state(VIT, classes)
    size = {'image_size': 96, 'crop_size': 96}
    model = load(tiny, tmp_path / 'w.pth', add_prefix(state, prefix), VIT, **size)
    loaded = {timm_key(key): value for key, value in model.encoder.state_dict().items()}
    same = [key for key, value in loaded.items() if torch.equal(value, state[key])]
    assert len(same) == len(loaded) - 1 and loaded['pos_embed'].shape == (1, 37, 48)
    assert loaded['pos_embed'].shape != state['pos_embed'].shape


def test_names_of_the_authors_are_known(tiny, tmp_path):
    """Write ConvNeXt's tensors as its authors name them, under their wrapper, with a classifier of 7."""
    encoder, content = 'test_convnext.r160_in1k', {}
    state = whole_state(encoder, classes=7)
    for key, value in state.items():
        key = key.replace('.blocks.', '.').replace('conv_dw', 'dwconv').replace('mlp.fc', 'pwconv')
        key = (
            key.replace('head.fc.', 'head.')
            .replace('head.norm.', 'norm.')
            .replace('stem.', 'downsample_layers.0.')
        )
        if '.downsample.' in key:
            key = key.removeprefix('stages.').replace('.downsample.', '.', 1)
            key = f'downsample_layers.{key}'
        content[f'module.{key}'] = value
    check_loaded(load(tiny, tmp_path / 'w.pth', {'model': content}, encoder), state)


@pytest.mark.parametrize('prefix', ['', 'backbone.', 'module.encoder.'])
@pytest.mark.parametrize('key', ['encoder_weights', 'weights'])
@pytest.mark.parametrize(
    ('change', 'message'),
    [
        (lambda s: s.pop('bn1.bias'), f'1 tensors of {RESNET} are missing, the first is bn1.bias'),
        (
            lambda s: s.update({'conv1.weight': torch.zeros(64, 1, 7, 7)}),
            rf'conv1.weight is \(64, 1, 7, 7\) in the file, \(64, 3, 7, 7\) in {RESNET}',
        ),
        (
            lambda s: s.update({'layer1.2.bn1.bias': torch.zeros(64)}),
            f'is of a larger network than {RESNET}, which has no layer1.2.bn1.bias',
        ),
    ],
)  # fmt: skip
def test_faults_name_the_tensor(tiny, tmp_path, prefix, key, change, message):
    state, path = whole_state(RESNET, classes=7), tmp_path / 'w.pth'
    change(state)
    torch.save({'state_dict': add_prefix(state, prefix)}, path)
    cfg = tiny.model_copy(update={'encoder': RESNET, key: str(path) if key == 'encoder_weights' else path})
    with pytest.raises(
        BadInput, match=rf"^config key '{key}': .*w.pth: {message}.*; expected weights of {RESNET}$"
    ):
        train.build_model(cfg, train.load_start(cfg), resume=False)


@pytest.mark.parametrize('encoder', [VIT, 'tf_efficientnet_lite0', 'test_convnext.r160_in1k'])
def test_missing_tensor_behind_the_prefix_of_mmsegmentation(tiny, tmp_path, encoder):
    state = whole_state(encoder)
    name = next(key for key in state if key.startswith(('blocks.', 'stages.')))
    del state[name]
    with pytest.raises(BadInput, match=f'1 tensors of {encoder} are missing, the first is {name}'):
        load(tiny, tmp_path / 'w.pth', add_prefix(state, 'backbone.'), encoder)


def test_plain_values_beside_the_tensors(tiny, tmp_path):
    state = whole_state(RESNET)
    content = {'state_dict': state, 'args': argparse.Namespace(lr=0.1, out=Path('out')), 'arch': RESNET}
    check_loaded(load(tiny, tmp_path / 'w.pth', content), state)


class AverageMeter:
    """Stand for an object of a training script."""


@pytest.mark.parametrize('key', ['encoder_weights', 'weights'])
@pytest.mark.parametrize('legacy', [True, False])
@pytest.mark.parametrize(
    ('make', 'name'),
    [
        (lambda: {'state_dict': {}, 'loss': AverageMeter()}, 'AverageMeter'),
        (lambda: timm.create_model('test_convnext'), 'timm.models.convnext.ConvNeXt'),
        (lambda: {'model': torch.nn.Linear(2, 2)}, 'torch.nn.modules.linear.Linear'),
    ],
)
def test_pickled_objects_are_one_line_with_the_way_out(tiny, tmp_path, key, legacy, make, name):
    path = tmp_path / 'w.pth'
    torch.save(make(), path, _use_new_zipfile_serialization=not legacy)
    cfg = tiny.model_copy(update={key: str(path) if key == 'encoder_weights' else path})
    with pytest.raises(BadInput, match=rf'w.pth: .*{name}, .*torch.save\(model.state_dict\(\)') as caught:
        train.build_model(cfg, train.load_start(cfg), resume=False)
    assert '\n' not in str(caught.value)


@pytest.mark.parametrize('name', ['w.pth', 'w.safetensors', 'w.ckpt'])
@pytest.mark.parametrize('prefix', ['', 'backbone.', 'module.encoder.'])
def test_training_starts_from_an_encoder_alone(tiny, tmp_path, name, prefix):
    state, path = whole_state(RESNET, classes=7), tmp_path / name
    content = add_prefix(state, prefix)
    save_file(content, path) if name.endswith('safetensors') else torch.save({'state_dict': content}, path)
    cfg = tiny.model_copy(update={'encoder': RESNET, 'encoder_weights': 'timm', 'weights': path})
    model, notes = train.build_model(cfg, train.load_start(cfg), resume=False)
    model.encoder_report = notes
    check_loaded(model, state, 100)
    assert (
        notes[-1]
        == 'weights: only the encoder is from the file, all that follows it starts from random values'
    )


@pytest.mark.parametrize('prefix', ['', 'module.', '_orig_mod.'])
def test_training_starts_from_the_tensors_of_a_whole_model(tiny, tmp_path, prefix):
    torch.manual_seed(1)
    state = SegModel(tiny).state_dict()
    torch.save(add_prefix(state, prefix), tmp_path / 'w.pth')
    cfg = tiny.model_copy(update={'weights': tmp_path / 'w.pth'})
    model, notes = train.build_model(cfg, train.load_start(cfg), resume=False)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert notes[0].endswith(f'all {len(state)} tensors loaded') and 'scores may be too high' in notes[1]


def test_encoder_of_a_training(tiny, tmp_path, capsys):
    """Take the encoder of a best.pt, whose labels the other fold must not be scored on."""
    first = tiny.model_copy(update={'ema': 0.5})
    train.main(first, 0)
    for name, place in (
        ('best.pt', 'model: encoder.*'),
        ('last.pt', 'resume.ema: encoder.* (not model: encoder.*)'),
    ):
        path = first.run_dir(0) / name
        content = torch.load(path, weights_only=True)
        state = content['model'] if name == 'best.pt' else content['resume']['ema']
        cfg = tiny.model_copy(update={'name': 'second', 'encoder_weights': str(path)})
        model = SegModel(cfg)
        assert all(torch.equal(v, state[f'encoder.{k}']) for k, v in model.encoder.state_dict().items())
        assert f'tensors loaded from {place}, ' in model.encoder_report[0]
        assert model.encoder_report[0].endswith('(left aside: aux, head)')
        capsys.readouterr()
    train.main(cfg, 1)
    assert 'saw their labels' in capsys.readouterr().out


def test_norms_of_an_encoder_with_a_class_of_its_own(tiny, tmp_path):
    update = {'encoder': TWINS, 'encoder_weights': str(tmp_path / 'w.pth')}
    state = SegModel(tiny.model_copy(update=update), load_weights=False).state_dict()
    state = {k: torch.rand_like(v) if v.is_floating_point() else v for k, v in state.items()}
    torch.save(add_prefix(state, 'module.'), tmp_path / 'w.pth')
    model = SegModel(tiny.model_copy(update=update))
    assert all(torch.equal(v, state[f'encoder.{k}']) for k, v in model.encoder.state_dict().items())
    assert len(model.encoder_report) == 1


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (b'<!DOCTYPE html><html><title>Too many requests', 'but a web page; download it again'),
        (b'\n<html><body>', 'but a web page'),
        (
            b'version https://git-lfs.github.com/spec/v1\noid sha256:0',
            'but a pointer of Git LFS; .* git lfs pull',
        ),
        (b'{"error": "not found"}', 'neither torch.save nor safetensors wrote it'),
    ],
)
def test_what_came_in_place_of_weights(tiny, tmp_path, content, message):
    (tmp_path / 'w.pth').write_bytes(content)
    with pytest.raises(BadInput, match=message):
        SegModel(tiny.model_copy(update={'encoder_weights': str(tmp_path / 'w.pth')}))


def test_safetensors_under_another_name(tiny, tmp_path):
    state = whole_state(RESNET)
    save_file(state, tmp_path / 'w.pth')
    update = {'encoder': RESNET, 'encoder_weights': str(tmp_path / 'w.pth')}
    check_loaded(SegModel(tiny.model_copy(update=update)), state, 100)


@pytest.mark.parametrize('encoder', ENCODERS)
def test_a_classifier_alone_is_no_encoder(tiny, tmp_path, encoder, monkeypatch):
    """Ask nobody for the rest: the weights that the hub has would take the place of those of the file."""
    fetch = 'timm.models._builder.load_state_dict_from_hf'
    monkeypatch.setattr(fetch, lambda *_, **__: pytest.fail('asked the hub'))
    state = {k: v for k, v in whole_state(encoder).items() if k.startswith(('fc.', 'head.fc.', 'head.'))}
    state = {k: v for k, v in state.items() if 'norm' not in k}
    with pytest.raises(BadInput, match='tensors of .* are missing'):
        load(tiny, tmp_path / 'w.pth', state, encoder)
