"""Test the readers with random and edited input: they accept it or raise BadInput, and files round-trip."""

import json
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import fuzz
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from config import Competition, Config, dump_config, is_plain, load_config, match_key
from data import coco, masks
from engine.checkpoint import load_checkpoint, save_checkpoint

ROOT = Path(__file__).resolve().parents[1]
NAMES = ['csv', 'coco', 'config', 'checkpoint']
QUICK = settings(max_examples=30, deadline=None, suppress_health_check=list(HealthCheck))


@st.composite
def edited(draw, name: str) -> bytes:
    """Edit a good input: delete, repeat or replace some of its bytes."""
    data = draw(st.sampled_from(fuzz.seeds(name)))
    word = st.sampled_from(fuzz.WORDS[name]) | st.binary(max_size=8)
    for _ in range(draw(st.integers(0, 4))):
        start = draw(st.integers(0, len(data)))
        length = draw(st.integers(0, 6))
        data = data[:start] + draw(word) + data[start + length :]
    return data


@pytest.mark.parametrize('name', NAMES)
@settings(QUICK)
@given(data=st.data())
def test_edited_input(name, data):
    fuzz.TARGETS[name](data.draw(edited(name)))


@pytest.mark.parametrize('name', NAMES)
def test_good_inputs_are_accepted(name, monkeypatch):
    """Check that the readers accept most good inputs; else fuzzing would stop at their first line."""
    refused = []
    monkeypatch.setattr(fuzz, 'require_line', lambda error: refused.append(str(error)))
    for data in fuzz.seeds(name):
        before = len(refused)
        fuzz.TARGETS[name](data)
        tries = {'csv': 1, 'coco': 2, 'config': 3, 'checkpoint': 2}[name]
        assert len(refused) - before < tries or data.endswith(b'0 1 2\n'), refused[before:]


sides = st.integers(1, 40)


@st.composite
def photos(draw) -> coco.Photo:
    height, width = draw(sides), draw(sides)
    objects = []
    for _ in range(draw(st.integers(0, 3))):
        if draw(st.booleans()):
            across = st.floats(-width, 2 * width), st.floats(-height, 2 * height)
            shape = [[draw(across[n % 2]) for n in range(2 * draw(st.integers(3, 6)))]]
        else:
            first = draw(st.integers(0, height * width))
            shape = {'size': [height, width], 'counts': [first, height * width - first]}
        encoded = masks.encode_segmentation('', {'segmentation': shape}, (height, width), masks.LeftOut())
        if encoded:
            category = draw(st.integers(0, 2))
            objects.append(coco.Annotation(category, draw(st.booleans()), *encoded))
    name = draw(st.text('ab/_é한 ', min_size=1, max_size=9))
    return coco.Photo(0, f'{name}.jpg', height, width, tuple(objects))


@settings(QUICK)
@given(photo=photos())
def test_annotations_round_trip(photo, tmp_path_factory):
    if not coco.inside(fuzz.WORK, photo.file_name):
        return
    path = fuzz.WORK / 'labels.json'
    path.write_text(json.dumps(fuzz.as_coco([photo])))
    assert coco.read_labels(path, Competition(classes=fuzz.CLASSES)).photos == (photo,)
    assert coco.draw_mask(photo).shape == (photo.height, photo.width)


@settings(QUICK)
@given(
    lr=st.floats(1e-12, 1e12),
    seed=st.integers(0, 2**32 - 1),
    classes=st.lists(st.text(min_size=1, max_size=8), min_size=2, max_size=5, unique=True),
    loss=st.dictionaries(st.sampled_from(['ce', 'dice', 'focal']), st.floats(0.01, 9), min_size=1),
    flips=st.lists(st.sampled_from(['h', 'v', 'hv'])),
)
def test_configs_round_trip(lr, seed, classes, loss, flips):
    try:
        competition = Competition(classes=classes)
        cfg = Config(name='x', lr=lr, seed=seed, competition=competition, loss=loss, tta_flips=flips)
    except ValueError:
        names = [match_key(name) for name in classes]
        assert not all(map(is_plain, classes)) or '' in names or len(set(names)) < len(names)
        return
    path = fuzz.WORK / 'back.yaml'
    path.write_text(dump_config(cfg), encoding='utf-8')
    assert load_config(path) == cfg


values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=8,
)
dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.uint8, torch.bool])


@settings(QUICK)
@given(
    config=st.dictionaries(st.text(max_size=5), values, max_size=4),
    shapes=st.lists(st.tuples(st.lists(st.integers(0, 3), max_size=3), dtypes), max_size=4),
)
def test_checkpoints_round_trip(config, shapes):
    model = {f'w{n}': torch.ones(shape).to(dtype) for n, (shape, dtype) in enumerate(shapes)}
    content = {'model': model, 'config': config, 'fold': 0, 'held_out': None, 'epoch': 1, 'score': 0.5}
    save_checkpoint(fuzz.WORK / 'back.pt', content)
    assert fuzz.same(load_checkpoint(fuzz.WORK / 'back.pt'), content)


@pytest.mark.skipif(find_spec('atheris') is None, reason='atheris is not installed: scripts/fuzz.sh does it')
def test_some_seconds_of_coverage_guided_fuzzing():
    done = subprocess.run(
        [sys.executable, 'tests/fuzz.py', 'all', '--seconds', '5'],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert done.returncode == 0 and 'Done' in done.stderr, done.stderr[-2000:]
