"""Mask2Former: outputs and loss equal those of transformers with the same weights."""

import math
import re

import numpy as np
import pytest
import torch
from operations import Operations
from scipy.optimize import linear_sum_assignment
from torch._subclasses.fake_tensor import FakeTensorMode

from losses import segmentation_loss
from metrics import IGNORED
from networks import mask2former
from networks.mask2former import (
    Mask2Former,
    Queries,
    assign,
    attended_pixels,
    matching_costs,
    point_losses,
    sample_levels,
    sample_points,
    set_losses,
    uncertain_points,
)

WIDTHS = [8, 16, 32, 64]


def make_head(queries: int = 10, encoder_layers: int = 2, decoder_layers: int = 4) -> Mask2Former:
    torch.manual_seed(0)
    layers = {'encoder_layers': encoder_layers, 'decoder_layers': decoder_layers}
    return Mask2Former(WIDTHS, 11, channels=32, queries=queries, **layers)


def features(count: int = 2, height: int = 16, width: int = 24) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [
        torch.randn(count, c, height * 2 // 2**i, width * 2 // 2**i, generator=generator)
        for i, c in enumerate(WIDTHS)
    ]


DECODER = r'^transformer_module\.decoder\.'
THEIR_NAMES = (
    (r'^pixel_level_module\.decoder\.', 'pixels.'),
    (r'^pixels\.input_projections\.', 'pixels.projections.'),
    (r'^pixels\.level_embed$', 'pixels.level'),
    (r'^pixels\.encoder\.layers\.', 'pixels.layers.'),
    (r'^(pixels\.layers\.\d+)\.self_attn_layer_norm\.', r'\1.norms.0.'),
    (r'^(pixels\.layers\.\d+)\.final_layer_norm\.', r'\1.norms.1.'),
    (r'^(pixels\.layers\.\d+)\.fc1\.', r'\1.ffn.0.'),
    (r'^(pixels\.layers\.\d+)\.fc2\.', r'\1.ffn.2.'),
    (r'^(pixels\.layers\.\d+)\.mlp\.fc1\.', r'\1.ffn.0.'),
    (r'^(pixels\.layers\.\d+)\.mlp\.fc2\.', r'\1.ffn.2.'),
    (r'\.self_attn\.sampling_offsets\.', '.attention.offsets.'),
    (r'\.self_attn\.attention_weights\.', '.attention.weights.'),
    (r'\.self_attn\.value_proj\.', '.attention.value.'),
    (r'\.self_attn\.output_proj\.', '.attention.out.'),
    (r'^pixels\.mask_projection\.', 'pixels.embed.'),
    (r'^pixels\.adapter_1\.', 'pixels.lateral.'),
    (r'^pixels\.layer_1\.', 'pixels.smooth.'),
    (r'^transformer_module\.queries_embedder\.', 'query_position.'),
    (r'^transformer_module\.queries_features\.', 'query.'),
    (r'^transformer_module\.level_embed\.', 'level.'),
    (DECODER + r'layernorm\.', 'norm.'),
    (DECODER + r'mask_predictor\.mask_embedder\.(\d)\.0\.', lambda m: f'to_mask.{int(m[1]) * 2}.'),
    (DECODER + r'layers\.', 'layers.'),
    (r'^(layers\.\d+)\.cross_attn_layer_norm\.', r'\1.norms.0.'),
    (r'^(layers\.\d+)\.self_attn_layer_norm\.', r'\1.norms.1.'),
    (r'^(layers\.\d+)\.final_layer_norm\.', r'\1.norms.2.'),
    (r'^(layers\.\d+)\.cross_attn\.', r'\1.to_pixels.'),
    (r'^(layers\.\d+)\.self_attn\.', r'\1.to_queries.'),
    (r'^(layers\.\d+)\.(mlp\.)?fc1\.', r'\1.ffn.0.'),
    (r'^(layers\.\d+)\.(mlp\.)?fc2\.', r'\1.ffn.2.'),
    (r'^class_predictor\.', 'to_class.'),
)  # fmt: skip


def their_state(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Rename the tensors of transformers to our names, and join its q, k and v."""
    renamed: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        if ('.encoder.' in name and 'pixel_level_module.encoder' in name) or 'criterion' in name:
            continue
        for pattern, replacement in THEIR_NAMES:
            name = re.sub(pattern, replacement, name)
        renamed[name] = tensor
    for name in [name for name in renamed if '.to_queries.q_proj.' in name]:
        parts = [renamed.pop(name.replace('.q_proj.', f'.{part}_proj.')) for part in 'qkv']
        renamed[name.replace('q_proj.', 'in_proj_')] = torch.cat(parts)
    return renamed


@pytest.fixture(scope='module')
def theirs():
    """Build a small Mask2Former of transformers, for given features instead of a backbone's."""
    transformers = pytest.importorskip('transformers')
    from transformers.models.mask2former import modeling_mask2former as source

    config = transformers.Mask2FormerConfig(
        backbone_config=transformers.SwinConfig(
            embed_dim=8, depths=[1, 1, 1, 1], num_heads=[1, 1, 1, 1], image_size=64, window_size=2,
            out_features=['stage1', 'stage2', 'stage3', 'stage4'],
        ),
        feature_size=32, mask_feature_size=32, hidden_dim=32, encoder_feedforward_dim=128, encoder_layers=2,
        decoder_layers=5, num_attention_heads=8, dropout=0.0, dim_feedforward=256, num_queries=10,
        num_labels=11, pre_norm=False,
    )  # fmt: skip
    torch.manual_seed(0)
    model = source.Mask2FormerForUniversalSegmentation(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # its tables begin at 0
            parameter.add_(0.05 * torch.randn_like(parameter))
    return source, config, model


def test_equal_to_transformers(theirs):
    model = theirs[2]
    feats = features()
    head = make_head().eval()
    head.load_state_dict(their_state(dict(model.model.state_dict()) | {
        f'class_predictor.{k}': v for k, v in model.class_predictor.state_dict().items()
    }))  # fmt: skip
    with torch.no_grad():
        decoded = model.model.pixel_level_module.decoder(feats, output_hidden_states=False)
        expected = model.model.transformer_module(
            multi_scale_features=decoded.multi_scale_features,
            mask_features=decoded.mask_features,
            output_hidden_states=True,
            output_attentions=False,
        )
        outputs = head(feats)
    states = [model.class_predictor(state.transpose(0, 1)) for state in expected.intermediate_hidden_states]
    assert len(outputs) == len(states) == len(expected.masks_queries_logits) == 5
    for ours, classes, masks in zip(outputs, states, expected.masks_queries_logits, strict=True):
        torch.testing.assert_close(ours.classes, classes, atol=1e-4, rtol=1e-5)
        torch.testing.assert_close(ours.masks, masks, atol=1e-4, rtol=1e-5)


@pytest.fixture
def same_points(monkeypatch):
    """Let torch.rand draw the same points for each mask, in whatever order they are drawn."""
    rand = torch.rand

    def fixed(count: int, *shape: int, device: torch.device) -> torch.Tensor:
        return rand(1, *shape, generator=torch.Generator().manual_seed(shape[0])).repeat(count, 1, 1)

    monkeypatch.setattr(torch, 'rand', fixed)


def test_loss_equal_to_transformers(theirs, same_points):
    """Compare one output, at the same random points; nothing is ignored, as transformers cannot do that."""
    source, config, _ = theirs
    mask = torch.randint(0, 4, (2, 16, 24)).repeat_interleave(4, 1).repeat_interleave(4, 2)
    output = make_head().eval()(features())[-1]
    ids = [image.unique() for image in mask]
    binary = [
        torch.stack([image == k for k in known]).float() for image, known in zip(mask, ids, strict=True)
    ]
    weights = {'loss_cross_entropy': 2.0, 'loss_mask': 5.0, 'loss_dice': 5.0}
    criterion = source.Mask2FormerLoss(config, weights)
    expected = criterion(output.masks, output.classes, binary, ids)
    loss = set_losses([output], mask)
    total = sum(weights[name] * value for name, value in expected.items())
    torch.testing.assert_close(loss, total.reshape(1), atol=1e-4, rtol=1e-5)


def plain_loss(output: Queries, mask: torch.Tensor, points: int) -> torch.Tensor:
    """Compute the loss of one output, a segment after another, from masks of each class."""
    target = torch.full(output.classes.shape[:2], output.classes.shape[2] - 1)
    pairs = []
    for i, image in enumerate(mask):
        known = [k for k in image.unique().tolist() if k != IGNORED]
        locations = torch.rand(1, points, 2, device=None)
        planes = torch.stack([image == k for k in [*known, IGNORED]]).float()
        truth = sample_points(planes[None], locations)[0]
        sampled = sample_points(output.masks[i : i + 1].detach(), locations)[0]
        costs = torch.zeros(len(sampled), len(known))
        for (q, t), _ in np.ndenumerate(costs):
            cross, dice = point_losses(sampled[q], truth[t], 1 - truth[-1])
            costs[q, t] = 5 * cross + 5 * dice - 2 * output.classes[i, q].softmax(0)[known[t]]
        for q, t in zip(*linear_sum_assignment(costs.detach()), strict=True):
            target[i, q] = known[t]
            locations = uncertain_points(output.masks[i, q][None].detach(), points)
            truth = sample_points(planes[None, [t, -1]], locations)[0]
            logits = sample_points(output.masks[i, q][None, None], locations)[0, 0]
            cross, dice = point_losses(logits, truth[0], 1 - truth[1])
            pairs.append(5 * cross + 5 * dice)
    weight = torch.ones(output.classes.shape[2])
    weight[-1] = 0.1
    loss = 2 * torch.nn.functional.cross_entropy(output.classes.flatten(0, 1), target.flatten(), weight)
    return loss + torch.stack(pairs).mean()


@pytest.mark.parametrize('queries', [10, 3])
def test_all_outputs_and_images_at_once(same_points, queries):
    """Images of 1, 4 and 0 classes, some pixels ignored; also with fewer queries than classes."""
    mask = torch.randint(0, 5, (3, 12, 16)).repeat_interleave(8, 1).repeat_interleave(8, 2)
    mask[0], mask[2], mask[:, 60:, 40:] = 7, IGNORED, IGNORED
    mask[mask == 4] = IGNORED
    head = make_head(queries)
    outputs = head([feat[[0, 1, 1]] for feat in features()])
    found = set_losses(outputs, mask.byte(), 200)
    expected = torch.stack([plain_loss(output, mask, 200) for output in outputs])
    torch.testing.assert_close(found, expected)
    parameters = list(head.parameters())
    gradients = [torch.autograd.grad(loss.sum(), parameters, retain_graph=True) for loss in (found, expected)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_logits_of_queries_are_the_log_of_probabilities():
    head = make_head().eval()
    outputs = head(features())
    assert len(outputs) == len(head.loss_weights) == 5
    assert outputs[-1].classes.shape == (2, 10, 12) and outputs[-1].masks.shape == (2, 10, 32, 48)
    classes = torch.full((1, 2, 4), -20.0)
    classes[0, 0, 2] = classes[0, 1, 0] = 20  # query 0 is class 2, query 1 class 0
    masks = torch.tensor([[[[3.0, -3.0]], [[-3.0, 3.0]]]])
    probs = queries_with(classes, masks).logits().softmax(dim=1)
    assert probs[0, :, 0, 0].tolist() == pytest.approx([0.0474, 0, 0.9526], abs=1e-3)
    assert probs[0, :, 0, 1].tolist() == pytest.approx([0.9526, 0, 0.0474], abs=1e-3)


def test_a_query_with_an_empty_mask_attends_to_all():
    masks = torch.tensor([[[1.0, -1.0], [-1.0, -1.0]]])
    assert attended_pixels(masks).tolist() == [[[[True, False], [True, True]]]]


def test_channels_that_are_no_multiple_of_32_are_refused():
    with pytest.raises(ValueError, match='found 48 channels, expected a multiple of 32'):
        Mask2Former(WIDTHS, 11, channels=48)


def queries_with(classes: torch.Tensor, masks: torch.Tensor) -> Queries:
    """Return queries with given masks: each has a channel of its own."""
    return Queries(classes, torch.eye(masks.shape[1]).expand(len(masks), -1, -1), masks)


def queries_of(truth: torch.Tensor, classes: int = 3) -> Queries:
    """Return queries of which number 0 predicts class 1, number 1 class 0, and number 2 nothing."""
    logits = torch.full((1, 3, classes + 1), -9.0)
    logits[0, 0, 1] = logits[0, 1, 0] = logits[0, 2, classes] = 9
    masks = torch.stack([truth == 1, truth == 0, torch.zeros_like(truth) == 1]).float() * 8 - 4
    return queries_with(logits, masks[None])


def test_matching_and_a_perfect_prediction():
    truth = torch.zeros(16, 16, dtype=torch.long)
    truth[4:12, 4:12] = 1
    output = queries_of(truth)
    target, most = assign(matching_costs([output], truth[None], 500))
    assert target.tolist() == [[[1, 0, 3]]] and most == 2
    # a class that no query predicts
    assert set_losses([output], truth[None]) < 0.2 * set_losses([output], 2 * truth[None])


def test_matching_ignores_ignored_pixels():
    """Query 0 is right on the labelled half, and goes on into the ignored one; query 1 is a little wrong."""
    truth = torch.full((16, 16), IGNORED)
    truth[:, :8] = 0
    masks = torch.full((1, 2, 16, 16), 4.0)
    masks[0, 1, :, 8:] = masks[0, 1, :2] = -4.0
    output = queries_with(torch.zeros(1, 2, 4), masks)
    target, _ = assign(matching_costs([output], truth[None], 2000))
    assert target.tolist() == [[[0, 3]]]


def test_ignored_pixels_do_not_count():
    truth = torch.zeros(1, 32, 32, dtype=torch.long)
    truth[0, 8:24, 8:24] = 1
    output = queries_of(truth[0])
    output.pixels[..., 24:] *= -1  # wrong there
    wrong = set_losses([output], truth)
    truth[..., 22:] = IGNORED
    assert set_losses([output], truth) < 0.5 * wrong


def test_point_on_the_edge_of_ignored_pixels():
    """Three points with probabilities .8, .6, .3: half in the mask and half ignored, outside it, ignored."""
    logits = torch.tensor([[0.8, 0.6, 0.3]]).logit()
    cross, dice = point_losses(logits, torch.tensor([[0.5, 0.0, 0.0]]), torch.tensor([[0.5, 1.0, 0.0]]))
    assert cross.item() == pytest.approx(-(0.5 * math.log(0.8) + math.log(0.4)) / 1.5)
    assert dice.item() == pytest.approx(1 - (2 * 0.4 + 1) / (0.4 + 0.6 + 0.5 + 1))


@pytest.mark.parametrize('fill', [IGNORED, 3])
def test_every_parameter_gets_a_gradient_in_bf16(fill):
    head = make_head().train()
    with torch.autocast('cpu', torch.bfloat16):
        outputs = head(features())
    mask = torch.full((2, 128, 192), fill)
    loss = segmentation_loss(outputs, mask, head.loss_weights)
    loss.backward()
    assert loss.isfinite() and loss.dtype == torch.float32
    assert not [name for name, p in head.named_parameters() if p.grad is None or not p.grad.isfinite().all()]


def test_one_copy_to_the_host_and_one_back(monkeypatch):
    """Count those of a step on CUDA, with tensors that have no memory."""
    monkeypatch.setattr(
        mask2former, 'assign', lambda costs: (torch.zeros(costs.shape[:3], dtype=int, device='cpu'), 2)
    )
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device('cuda'):
        head = make_head(5, 1, 1)
        feats = [torch.randn(2, c, 32 // 2**i, 48 // 2**i) for i, c in enumerate(WIDTHS)]
        mask = torch.zeros(2, 128, 192, dtype=torch.uint8)
        with Operations() as operations:
            segmentation_loss(head(feats), mask, head.loss_weights)
    assert operations.copies == [('cpu', False), ('cuda', True)] and not operations.waiting


def test_samples_of_the_deterministic_form(deterministic):
    """Points inside a map, at its edge and beyond."""
    torch.manual_seed(0)
    sizes = [(3, 4), (6, 8), (12, 16)]
    values = torch.randn(2, 252, 8, 4, requires_grad=True)
    points = (torch.rand(2, 252, 8, 3, 4, 2) * 1.6 - 0.3).requires_grad_()
    weights = torch.rand(2, 252, 8, 3, 4, requires_grad=True)
    inputs = (values, points, weights)
    results = [sample_levels(*inputs, sizes)]
    torch.use_deterministic_algorithms(False)
    results.append(sample_levels(*inputs, sizes))
    torch.testing.assert_close(*results, atol=1e-5, rtol=1e-5)
    upstream = torch.randn(results[0].shape)
    for pair in zip(*(torch.autograd.grad(result, inputs, upstream) for result in results), strict=True):
        torch.testing.assert_close(*pair, atol=1e-4, rtol=1e-5)


def test_a_deterministic_step_equals_the_usual_one(deterministic):
    """Only the usual one has an operation that raises on CUDA if torch has to be deterministic."""
    steps = []
    for usual in (False, True):
        torch.use_deterministic_algorithms(not usual)
        head = make_head(5, 1, 2)
        with torch.no_grad():  # a point on the middle of a pixel has two derivatives
            for layer in head.pixels.layers:
                layer.attention.offsets.bias.add_(0.3)
        mask = torch.randint(0, 4, (2, 16, 24)).repeat_interleave(8, 1).repeat_interleave(8, 2)
        with Operations() as operations:
            loss = segmentation_loss(head(features()), mask, head.loss_weights)
            loss.backward()
        steps.append([loss.detach(), *(p.grad for p in head.parameters())])
        assert operations.refused == ({'grid_sampler_2d_backward'} if usual else set())
    for ours, theirs in zip(*steps, strict=True):
        torch.testing.assert_close(ours, theirs, atol=5e-5, rtol=1e-4)


@pytest.mark.slow
def test_the_head_compiles_to_one_graph():
    head = make_head(5, 1, 1).eval()
    compiled = torch.compile(head, backend='eager', fullgraph=True)
    with torch.no_grad():
        for ours, theirs in zip(compiled(features()), head(features()), strict=True):
            torch.testing.assert_close(ours, theirs)
    torch._dynamo.reset()


def test_points_are_where_the_network_is_uncertain():
    masks = torch.full((1, 32, 32), 9.0)
    masks[:, :, 16:] = 0.0
    places = uncertain_points(masks, 400)
    assert places.shape == (1, 400, 2) and (places[0, :300, 0] > 0.48).all()


def test_it_learns():
    """Train on two classes, a square on a background, for some seconds."""
    torch.manual_seed(0)
    head = Mask2Former(WIDTHS, 2, channels=32, queries=5, encoder_layers=1, decoder_layers=3)
    mask = torch.zeros(2, 64, 64, dtype=torch.long)
    mask[0, 8:40, 8:40] = mask[1, 24:56, 16:60] = 1
    feats = [
        torch.nn.functional.avg_pool2d(mask[:, None].float(), 4 * 2**i).repeat(1, c, 1, 1)
        for i, c in enumerate(WIDTHS)
    ]
    optimizer = torch.optim.AdamW(head.parameters(), lr=2e-3)
    for _ in range(60):
        loss = set_losses(head(feats), mask, 1000).sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
    pred = head.eval()(feats)[-1].logits().argmax(1)
    assert (pred == mask[:, ::4, ::4]).float().mean() > 0.97
