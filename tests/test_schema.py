"""docs/schema/*.json, by which an editor completes and checks YAML files, allow what the code allows."""

import json
import re
from pathlib import Path

import jsonschema
import pytest
import yaml
from test_docs import blocks_of
from test_import_masks import ids, write_pairs

import prepare
from config import Competition, dump_config, load_config, make_schema, write_competition
from utils.errors import BadInput

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / 'configs').glob('*.yaml'))
PAGES = [ROOT / f'docs/{page}.md' for page in ('competitions', 'data')]
COMPETITIONS = [text for page in PAGES for language, text in blocks_of(page) if language == 'yaml']


class EditorLoader(yaml.SafeLoader):
    """Read YAML as editors do, by version 1.2: 1e-4 is a number, and off is a word."""


EditorLoader.yaml_implicit_resolvers = {
    first: [pair for pair in pairs if pair[0] != 'tag:yaml.org,2002:bool' or first in 'tTfF']
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
number = re.compile(r'[-+]?(\.\d+|\d+(\.\d*)?)([eE][-+]?\d+)?$')
EditorLoader.add_implicit_resolver('tag:yaml.org,2002:float', number, list('-+0123456789.'))


def faults(name: str, text: str) -> list[str]:
    """List what an editor would mark."""
    schema = json.loads((ROOT / f'docs/schema/{name}.json').read_text())
    jsonschema.Draft7Validator.check_schema(schema)
    values = yaml.load(text, EditorLoader) or {}
    return [error.message for error in jsonschema.Draft7Validator(schema).iter_errors(values)]


@pytest.mark.parametrize('name', ['config', 'competition'])
def test_schema_is_up_to_date(name):
    path = f'docs/schema/{name}.json'
    assert (ROOT / path).read_text() == make_schema(name), f'python config.py --schema {name} > {path}'


@pytest.mark.parametrize('name', ['config', 'competition'])
def test_every_key_has_a_meaning(name):
    schema = json.loads(make_schema(name))
    for part in (schema, *schema['$defs'].values()):
        assert part['additionalProperties'] is False
        for key, value in part['properties'].items():
            assert len(value['description'].split()) > 2, key


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_every_config_is_valid_and_with_a_misspelt_key_is_not(path, tmp_path):
    text = path.read_text()
    assert faults('config', text) == []
    assert faults('config', f'{text}\nepohs: 1\n')
    (tmp_path / 'config.yaml').write_text(dump_config(load_config(path)))
    assert faults('config', (tmp_path / 'config.yaml').read_text()) == [], 'as a run folder has it'


@pytest.mark.parametrize('text', COMPETITIONS, ids=lambda text: text.splitlines()[0])
def test_every_competition_of_the_docs_is_valid(text):
    assert faults('competition', text) == []
    assert faults('competition', f'{text}\nclases: [a, b]\n')


def test_the_competition_of_an_importer_is_valid(tmp_path):
    prepare.command([*write_pairs(tmp_path, {'a': ids(0, 1, 2, 0)}), '--classes', 'can', 'big bottle'])
    text = (tmp_path / 'out/competition.yaml').read_text()
    assert 'classes' in text and faults('competition', text) == []


EVERY_KEY = {
    'classes': ('a', 'b'), 'task': 'multilabel', 'metric': 'image_dice', 'score_size': 'own',
    'score_background': False, 'empty_score': None, 'categories': {'c': 'b'}, 'orientation': 'stored',
    'crowds': 'objects', 'labels': 'soft', 'channels': 6, 'depth': 16, 'slices': {'offsets': (0, 1)},
    'intensity': ((0, 1), (0.5, 2), (-1, 1)), 'group': r'^(\d+)_',
    'submission': {'columns': {'id': 'image_class', 'rle': 'mask'}, 'order': 'row', 'first': 0},
}  # fmt: skip


def test_every_key_of_a_competition_is_valid_as_importers_write_it(tmp_path):
    assert EVERY_KEY.keys() == Competition.model_fields.keys()
    write_competition(tmp_path, Competition(**EVERY_KEY))
    text = (tmp_path / 'competition.yaml').read_text()
    assert all(f'{key}:' in text for key in EVERY_KEY) and faults('competition', text) == []


@pytest.mark.parametrize(
    'line',
    [
        'epochs: 0', 'epochs: 1.5', 'epochs: many', 'lr: true', 'crop_size: 100', 'scale_range: [1]',
        'scale_range: [0.5, 2, 3]', 'tta_flips: [x]', 'loss: {}', 'loss: {cee: 1}', 'head_channels: 4',
        'amp: fp8', 'extra_data: [{root: a}]', 'competition: {task: two}', 'features: [1, 2, 3]',
        'classes: []', 'competition: {submission: {colums: {a: image}}}', 'tta_scales: [17]',
    ],
)  # fmt: skip
def test_an_editor_marks_what_the_code_refuses(line, tmp_path):
    (tmp_path / 'a.yaml').write_text(line)
    with pytest.raises(BadInput):
        load_config(tmp_path / 'a.yaml', [f'data_root={tmp_path}'])
    assert faults('config', line)


@pytest.mark.parametrize(
    'line',
    [
        'lr: 1e-4', 'lr: 2.5E-05', 'amp: off', 'image_size: 0', 'mean: null', 'weights: null',
        'loss: {ce: 1, dice: 0.5}', 'classes: [a, b]', 'name: 쓰레기', 'scale_range: [1, 2]',
        'schedule: poly',
        'extra_data: [{root: a, share: .2, map: {Can: Metal}}]', 'competition: {submission: {order: row}}',
    ],
)  # fmt: skip
def test_an_editor_takes_what_the_code_takes(line, tmp_path):
    (tmp_path / 'a.yaml').write_text(line)
    load_config(tmp_path / 'a.yaml', [f'data_root={tmp_path}'])
    assert faults('config', line) == []


def test_an_editor_finds_the_schemas():
    schemas = json.loads((ROOT / '.vscode/settings.json').read_text())['yaml.schemas']
    for name, patterns in schemas.items():
        assert (ROOT / name).is_file() and patterns
    assert {path for pattern in schemas['./docs/schema/config.json'] for path in ROOT.glob(pattern)} >= {
        *CONFIGS
    }
